"""Metrics: against independent computations, and on clips whose metrics are known."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import skimage.metrics
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

import checkpoint
import evaluate
import judges
from audio import mfcc
from evaluate import (
    METRICS, Clip, align_face, frechet_distance, head_pose, l1, landmark_distance, lip_sync_error, measure_pair,
    mouth_distance, psnr, ssim_and_ms_ssim)
from media import InputError, read_video, write_video

CPU = torch.device("cpu")
NO_NETWORKS = dict(device=CPU, left_out={}, sync=None, landmarks=None, lpips=None, arcface=None, syncnet=None,
                   inception=None)


@pytest.fixture(autouse=True)
def no_expert(monkeypatch, tmp_path):
    """Without the shipped expert, whose face detector may need a download"""
    monkeypatch.setattr(evaluate, "SHIPPED_EXPERT", tmp_path / "no_sync.pt")


# ------------------------------------------------------------------------------------------------------------
# images


def pictures(seed, *shape):
    """Two uint8 pictures that look somewhat alike"""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape)
    return a.astype(np.uint8), np.clip(a + rng.normal(8, 25, shape), 0, 255).astype(np.uint8)


def test_l1_and_psnr_of_a_known_difference():
    a, black = np.full((7, 9, 3), 30, np.uint8), np.zeros((7, 9, 3), np.uint8)
    assert l1(a, black) == pytest.approx(30 / 255) and l1(black, a) == l1(a, black)  # uint8 does not wrap round
    assert psnr(a, black) == pytest.approx(20 * np.log10(255 / 30)) and psnr(black, a) == psnr(a, black)
    assert l1(a, a) == 0 and psnr(a, a) == float("inf")


def test_an_equal_frame_does_not_make_the_mean_psnr_infinite():
    assert evaluate.finite_mean([30, float("inf"), 32]) == 31 and evaluate.finite_mean([float("inf")] * 2) == float("inf")
    assert np.isnan(evaluate.finite_mean([1, float("nan")]))


def ssim(a, b):
    return ssim_and_ms_ssim(a, b)[0]


def test_psnr_and_ssim_agree_with_scikit_image():
    a, b = pictures(1, 23, 31, 3)
    assert psnr(a, b) == pytest.approx(skimage.metrics.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255)
    assert ssim(a, b) == pytest.approx(skimage.metrics.structural_similarity(a, b, **wang), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1) and 0 < ssim(a, b) < 0.99
    dark = a // 20, a // 20 + (np.arange(31) % 2)[:, None].astype(np.uint8)  # little contrast, a small difference
    assert ssim(*dark) == pytest.approx(skimage.metrics.structural_similarity(*dark, **wang), abs=1e-6)


def ms_ssim_by_loops(a, b):
    """Wang et al. 2003 for one channel, (H, W), every window on its own, in float64"""
    a, b = a.astype(float), b.astype(float)
    g = np.exp(-np.square(np.arange(-5, 6)) / 4.5)
    g = np.outer(g, g) / g.sum() ** 2
    result = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        rows, columns = a.shape[0] - 10, a.shape[1] - 10
        structure, all_terms = np.zeros((rows, columns)), np.zeros((rows, columns))
        for i in range(rows):
            x, y = (np.stack([p[i : i + 11, j : j + 11] for j in range(columns)]) for p in (a, b))  # a row of windows
            mx, my = ((g * w).sum((1, 2)) for w in (x, y))
            x, y = x - mx[:, None, None], y - my[:, None, None]
            vx, vy, cov = (g * x * x).sum((1, 2)), (g * y * y).sum((1, 2)), (g * x * y).sum((1, 2))
            structure[i] = (2 * cov + 58.5225) / (vx + vy + 58.5225)
            all_terms[i] = structure[i] * (2 * mx * my + 6.5025) / (mx * mx + my * my + 6.5025)
        result *= (all_terms if scale == 4 else structure).mean() ** weight
        a, b = (x[: len(x) // 2 * 2, : x.shape[1] // 2 * 2] for x in (a, b))
        a, b = ((x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (a, b))
    return result


def test_ms_ssim_agrees_with_a_loop_over_windows():
    rng = np.random.default_rng(3)
    a = rng.integers(0, 256, (23, 25, 1)).repeat(8, 0).repeat(8, 1)[:177, :181].astype(np.uint8).repeat(3, 2)
    b = np.clip(a * 0.9 + rng.normal(12, 30, (177, 181, 1)), 0, 255).astype(np.uint8)
    value, multi = ssim_and_ms_ssim(a, b)
    assert multi == pytest.approx(ms_ssim_by_loops(a[..., 0], b[..., 0]), abs=1e-5)
    assert 0.3 < multi < 0.99 and value == ssim(a, b)
    assert ssim_and_ms_ssim(a, a)[1] == pytest.approx(1)
    assert np.isnan(ssim_and_ms_ssim(a[:175], b[:175])[1])  # no window in the last scale
    assert np.isnan(ssim_and_ms_ssim(a[:10], b[:10])).all()


# ------------------------------------------------------------------------------------------------------------
# landmarks


def test_a_shift_has_its_length_as_landmark_distance_and_zero_mouth_distance():
    rng = np.random.default_rng(6)
    a = rng.normal(60, 30, (4, 68, 2))
    np.testing.assert_allclose(landmark_distance(a, a + [3, -4]), 5)
    np.testing.assert_allclose(mouth_distance(a, a + [3, -4]), 0, atol=1e-12)
    b = a + rng.normal(0, 2, a.shape)
    far = [np.mean([np.hypot(*(p - q)) for p, q in zip(*faces)]) for faces in zip(a, b)]
    np.testing.assert_allclose(landmark_distance(a, b), far)
    wide = a.copy()
    wide[:, 48:] = 1.5 * (wide[:, 48:] - wide[:, 48:].mean(1, keepdims=True)) + 7
    spread = np.linalg.norm(a[:, 48:] - a[:, 48:].mean(1, keepdims=True), axis=2).mean(1)
    np.testing.assert_allclose(mouth_distance(a, wide), 0.5 * spread)


def turned_faces(solid, turns):
    """The mean face, turned by yaw, pitch, roll (n, 3): to the right, chin up, clockwise -> landmarks (n, 68, 2)"""
    R = Rotation.from_euler("xyz", np.asarray(turns, float)[:, [1, 0, 2]] * [-1, -1, 1], degrees=True).as_matrix()
    return (solid[None, :68] @ R.swapaxes(1, 2))[..., :2] * 43 + [90, 70]


def test_head_pose_recovers_the_rotation_of_the_mean_face():
    turns = np.array([(0, 0, 0), (25, 0, 0), (0, -18, 0), (0, 0, 33), (-30, 12, -8)], float)
    solid = evaluate.load_landmarks().solid.double().numpy()
    points = turned_faces(solid, turns)
    np.testing.assert_allclose(head_pose(points), turns, atol=1e-6)
    points[:, 48:] += 7  # a mouth does not turn the head
    np.testing.assert_allclose(head_pose(points), turns, atol=1e-6)
    assert points[1, 30, 0] > 90 and points[2, 30, 1] > points[0, 30, 1]  # the nose moves right, and down


@pytest.mark.parametrize("scale", [0.8, 4.6])
def test_an_aligned_face_has_its_points_where_arcface_expects_them(scale):
    y, x = np.mgrid[:700, :800]
    image = np.stack([x * 0.3, y * 0.3, 0 * x], 2).astype(np.uint8)  # the colour is the position
    turn = scale * np.exp(0.2j) * (evaluate.ARCFACE_POINTS @ [1, 1j]) + 90 + 70j
    five, points = np.stack([turn.real, turn.imag], 1), np.zeros((68, 2))
    points[36:42], points[42:48], points[[30, 48, 54]] = five[0], five[1], five[2:]
    crop = align_face(image, points)
    assert crop.shape == (112, 112, 3)
    for (cx, cy), (px, py) in zip(evaluate.ARCFACE_POINTS, five):
        np.testing.assert_allclose(crop[int(cy), int(cx), :2], [px * 0.3, py * 0.3], atol=0.3 * scale + 1.5)


# ------------------------------------------------------------------------------------------------------------
# motion and silence


def test_dynamics_are_the_mean_deviation_of_the_distances_of_all_pairs_of_points():
    points = np.random.default_rng(4).normal(0, 9, (7, 5, 2))
    pairs = [(i, j) for i in range(5) for j in range(i)]
    expected = np.mean([np.std([np.hypot(*(frame[i] - frame[j])) for frame in points]) for i, j in pairs])
    assert evaluate.dynamics(points) == pytest.approx(expected)
    assert evaluate.dynamics(points[:1] + np.arange(7)[:, None, None]) == pytest.approx(0, abs=1e-9)  # moved as a whole


@pytest.fixture
def spoken(monkeypatch):
    """60 frames of sound with speech in frames 20 .. 59, except for a pause of 4, and the loudness of each frame"""
    monkeypatch.setattr(evaluate, "voice_detector", lambda: None)
    level = np.zeros(60)
    level[20:] = 0.1 + 0.3 * np.random.default_rng(5).random(40)
    level[30:34] = 0
    tone = np.sin(np.arange(60 * 640) * 2 * np.pi * 1000 / 16000)
    return (tone * np.repeat(level, 640)).astype(np.float32), level


def test_loud_frames_and_short_pauses_between_them_are_speech(spoken):
    wav, level = spoken
    speech = evaluate.speech_frames(wav, 60)
    assert not speech[:19].any() and speech[20:].all()
    assert not evaluate.speech_frames(wav, 75)[61:].any()  # more frames than sound
    loudness = evaluate.loudness(wav, 60)
    k = 40  # 50 ms: the frame, and 5 ms of each neighbour
    squares = [level[k - 1] ** 2 * 0.1, level[k] ** 2 * 0.8, level[k + 1] ** 2 * 0.1]
    assert loudness[k] == pytest.approx(np.sqrt(sum(squares) / 2), rel=0.01)


def test_lips_that_follow_the_loudness_are_in_sync_and_lips_at_rest_are_stable_in_silence(spoken):
    (wav, _), rng = spoken, np.random.default_rng(6)
    solid = evaluate.load_landmarks().solid.double().numpy()
    loud = evaluate.loudness(wav, 60)

    def measured(gap, height=256, brows=0.0, yaw=0.0):
        points = turned_faces(solid, np.outer(yaw * np.sin(np.arange(60)), (1, 0, 0)))
        points[:, [67, 66, 65, 58, 57, 56], 1] += 20 * gap[:, None]
        points[:, 17:22, 1] -= brows
        return evaluate.motion_metrics(points * height / 256, wav, height)

    follows, still = measured(loud), measured(np.full(60, 0.1))
    assert follows["lip-sync"] == pytest.approx(0, abs=0.02) and follows["silent lips"] == pytest.approx(0, abs=1e-6)
    assert still["lip dynamics"] == pytest.approx(0, abs=1e-9) and still["lip-sync"] > 0.2
    assert measured(2 * loud)["lip dynamics"] > 1.8 * follows["lip dynamics"] > 0
    assert measured(loud, height=512) == pytest.approx(follows)
    restless = loud + 0.3 * rng.random(60)
    assert measured(restless)["silent lips"] > 0.01
    turning = measured(loud, yaw=3)
    assert turning["head motion"] == pytest.approx(np.std(3 * np.sin(np.arange(60))) / 3, rel=1e-3)
    assert follows["head motion"] == pytest.approx(0, abs=1e-6) and follows["brow dynamics"] == pytest.approx(0, abs=1e-9)
    assert measured(loud, brows=8 * rng.random((60, 5)))["brow dynamics"] > 0.3
    assert evaluate.motion_metrics(turned_faces(solid, np.zeros((9, 3))), None, 256).keys() == {
        "lip dynamics", "brow dynamics", "head motion"}  # without sound


def test_closeness_is_one_minus_the_relative_difference():
    values = evaluate.closeness({"lip dynamics": 2.0, "lip-sync": 0.4, "LMD": 1}, {"lip dynamics": 2.5, "lip-sync": 0.4})
    assert values == {"lip dynamics": pytest.approx(0.75), "lip-sync": 1, "motion": pytest.approx(0.875)}
    assert evaluate.closeness({}, {"lip-sync": 1}) == {}


# ------------------------------------------------------------------------------------------------------------
# lip sync, sets of images


@pytest.mark.parametrize("late", [-6, 0, 4])
@pytest.mark.parametrize("pad", [True, False])
def test_sound_that_is_k_frames_late_has_offset_k(late, pad):
    torch.manual_seed(0)
    face = torch.randn(60, 7)
    distance, confidence, offset = lip_sync_error(face, face.roll(late, 0) + 0.1 * torch.randn(60, 7), pad=pad)
    assert offset == late and distance < 1 and confidence > 2


def test_lip_sync_error_agrees_with_a_loop_over_windows_and_offsets():
    torch.manual_seed(1)
    face, sound = torch.randn(39, 5), torch.randn(39, 5)
    padded, unpadded = [], []  # mean distance by offset
    for d in range(-15, 16):
        inside = [float((face[k] - sound[k + d]).norm()) for k in range(39) if 0 <= k + d < 39]
        outside = [float(face[k].norm()) for k in range(39) if not 0 <= k + d < 39]
        padded.append(np.mean(inside + outside))
        unpadded.append(np.mean(inside))
    for means, pad in ((padded, True), (unpadded, False)):
        expected = min(means), np.median(means) - min(means), np.argmin(means) - 15
        assert lip_sync_error(face, sound, pad) == pytest.approx(expected, abs=1e-4)


def test_ssim_is_computed_in_fp32_under_bf16(monkeypatch):
    real = pictures(3, 3, 180, 200, 3)[0]
    fake = np.clip(real.astype(int) + np.random.default_rng(0).integers(-9, 10, real.shape), 0, 255).astype(np.uint8)
    networks = SimpleNamespace(**NO_NETWORKS)
    clips = [clip_of(frames, networks, monkeypatch) for frames in (real, fake)]
    plain = evaluate.image_metrics(*clips)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate.image_metrics(*clips) == plain and 0 < plain["SSIM"] < 1


def clip_of(frames, networks, monkeypatch):
    monkeypatch.setattr(evaluate, "read_video", lambda path: iter(frames))
    return Clip("a.mp4", networks)


def test_lse_agrees_with_a_loop_over_windows_of_five_frames(monkeypatch):
    torch.manual_seed(2)
    net = checkpoint.freeze(judges.SyncNetV2())
    box = (30.0, 20.0, 60.0, 44.0)
    monkeypatch.setattr(evaluate, "detect_faces", lambda picture, margins: [(*box, 0.9)])
    frames = pictures(7, 8, 70, 90, 3)[0]
    wav = np.random.default_rng(8).uniform(-0.4, 0.4, 640 * 7 + 300).astype(np.float32)  # 7 frames of sound
    monkeypatch.setattr(evaluate, "load_audio", lambda path, normalise: wav)
    networks = SimpleNamespace(**(NO_NETWORKS | dict(syncnet=net)))
    values, reasons = clip_of(frames, networks, monkeypatch).metrics()
    x, y, s = 45, 32, 15  # SyncNet's script: from x - 1.4 s, y - s, a square of 2.8 s
    crop = [evaluate.crop_face(f, (x - 1.4 * s, y - s, x + 1.4 * s, y + 1.8 * s), 224) for f in frames]
    steps, face, sound = mfcc(wav), [], []
    for k in range(7 - 5):
        bgr = torch.from_numpy(np.stack(crop[k : k + 5])[..., ::-1].copy()).float().permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            face.append(net.netfclip(net.netcnnlip(bgr).flatten(1))[0])
            window = torch.from_numpy(steps[None, None, :, 4 * k : 4 * k + 20]).float()
            sound.append(net.netfcaud(net.netcnnaud(window).flatten(1))[0])
    means = []
    for d in range(-15, 16):
        pairs = [(face[k], sound[k + d] if 0 <= k + d < len(sound) else torch.zeros(1024)) for k in range(len(face))]
        means.append(float(np.mean([float((f - s).norm()) for f, s in pairs])))
    assert values["LSE-D"] == pytest.approx(min(means), rel=1e-3)
    assert values["LSE-C"] == pytest.approx(np.median(means) - min(means), abs=2e-3 * max(means)) and "LSE" not in reasons
    monkeypatch.setattr(evaluate, "load_audio", lambda path, normalise: wav[:1600])
    assert "too short: 8 frames of picture, 2.5 of sound" in clip_of(frames, networks, monkeypatch).metrics()[1]["LSE"]


def test_frechet_distance_is_0_for_equal_sets_and_has_the_closed_form_for_two_gaussians():
    rng = np.random.default_rng(2)
    x, y = (rng.normal(size=(n, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5) for n in (90, 70))
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    closed = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-6) and closed > 0.1
    few = torch.randn(4, 9)  # fewer images than features
    assert frechet_distance(few, few + 2) == pytest.approx(9 * 4, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# the script


def cells(line):
    """| a | b | -> ["a", "b"]"""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def write_clip(path, frames, wav=None):
    write_video(path, iter(frames), len(frames), wav)
    return str(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A clip of 7 frames of 24x32 pixels, a brighter copy, and a clip of another aspect ratio"""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    frames = rng.integers(40, 190, (7, 4, 3, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)  # (T, 32, 24, 3)
    return (
        write_clip(folder / "real.mp4", frames),
        write_clip(folder / "fake.mp4", frames + 20),
        write_clip(folder / "wide.mp4", frames.swapaxes(1, 2)),
    )


def table_rows(text):
    """The printed table -> {metric: cell} of each row"""
    head, _, *rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    return [dict(zip([name.split(",")[0].rstrip(" ↑↓") for name in head], row)) for row in rows]


def test_two_clips_are_compared_frame_by_frame(clips, capsys):
    real, fake, _ = clips
    evaluate.main(["pair", real, fake])
    out = capsys.readouterr().out
    itself, row = table_rows(out)
    pairs = list(zip(read_video(real), read_video(fake)))
    assert "1 pairs, 7 frames" in out and len(pairs) == 7 and row[""] == "fake.mp4"
    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)
    similar = [skimage.metrics.structural_similarity(a, b, **wang) for a, b in pairs]
    assert float(row["SSIM"]) == pytest.approx(np.mean(similar), abs=0.0006)
    noise = [skimage.metrics.peak_signal_noise_ratio(a, b) for a, b in pairs]
    assert float(row["PSNR"]) == pytest.approx(np.mean(noise), abs=0.006)
    assert float(row["L1"]) == pytest.approx(20 / 255, abs=0.015)  # the codec rounds
    assert (itself["SSIM"], itself["PSNR"], itself["L1"]) == ("1.000", "inf", "0.0000")
    assert "MS-SSIM" not in row and "fake.mp4: MS-SSIM: 24x32 px are too few" in out
    assert "left out: FID" in out or "FID" in row


def test_user_errors_are_one_line_with_status_2(clips, tmp_path, refused, monkeypatch):
    fails = functools.partial(refused, evaluate.main, "pair")
    real, fake, wide = clips
    text = tmp_path / "notes.txt"
    text.write_text("no clip, no weights")
    assert "real, fake" in fails() and "fake" in fails(real)
    assert "nowhere.mp4" in fails(real, tmp_path / "nowhere.mp4")
    assert "notes.txt" in fails(text, real)
    error = fails(real, wide)
    assert "wide.mp4" in error and "32x24" in error and "24x32" in error
    assert "--skip SIM" in fails(real, fake, "--skip", "SIM")
    assert "notes.txt" in fails(real, fake, "--expert", text)  # --expert names it, so it is not left out
    assert "--landmarks eyes" in fails(real, fake, "--landmarks", "eyes")
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    assert "pip install mediapipe" in fails(real, fake, "--landmarks", f"mediapipe:{text}")
    (tmp_path / "empty").mkdir()
    assert "no clip has the same name" in fails(tmp_path / "empty", tmp_path / "empty")
    assert "directory" in fails(tmp_path / "empty", real)


# ------------------------------------------------------------------------------------------------------------
# pairs of clips, with stand-in networks


def embed_brightness(crops):
    """An expert's embedding of five frames: whether the middle one is bright"""
    return torch.stack([torch.where(crops[:, 2].mean((1, 2, 3)) > 0, 1.0, -1.0), torch.ones(len(crops))], 1)


def embed_loudness(windows):
    """An expert's embedding of a sound: whether its middle is loud"""
    level = windows[:, 0, :, 7:9].amax((1, 2))
    return torch.stack([torch.where(level > (level.min() + level.max()) / 2, 1.0, -1.0), torch.ones(len(windows))], 1)


def all_networks(**replaced):
    def landmarks(frames, boxes):  # they depend on the colours
        base = np.random.default_rng(0).uniform(20, 70, (68, 2))
        return np.stack([base * (1 + image.mean() / 255) for image in frames])

    networks = dict(
        sync=SimpleNamespace(template="toy", size=16, read=lambda x: x, embed=embed_brightness, sound=embed_loudness,
                             parameters=lambda: iter([torch.zeros(1)])),
        landmarks=landmarks, lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)), inception=lambda x: x.mean((2, 3)),
        arcface=SimpleNamespace(embed=lambda x: F.normalize(x.mean((2, 3)) + 2, dim=1)))
    return SimpleNamespace(**(NO_NETWORKS | networks | replaced))


LIT = np.random.default_rng(9).integers(0, 2, 30).repeat(3)  # 1 for frames that are bright and loud


def talking(late=0, n=90, size=72):
    """Frames (n, size, size, 3) that are bright where LIT is 1, and sound (n,) that is loud `late` frames after them"""
    texture = np.random.default_rng(10).integers(0, 40, (n, 9, 9, 3)).repeat(size // 9, 1).repeat(size // 9, 2)
    frames = (60 + 110 * LIT[:n, None, None, None] + texture).astype(np.uint8)
    tone = np.sin(np.arange(640 * n) * 2 * np.pi * 900 / 16000)
    return frames, (tone * np.roll(np.where(LIT, 0.5, 0.003), late)[:n].repeat(640)).astype(np.float32)


@pytest.fixture
def face_found(monkeypatch):
    """A face in every frame"""
    monkeypatch.setattr(evaluate, "detect_faces", lambda image, margins: [(10, 10, 30, 30, 0.9)])


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    return folder, write_clip(folder / "real.mp4", *talking()), write_clip(folder / "late.mp4", *talking(late=4))


@pytest.mark.usefixtures("face_found")
def test_a_clip_against_itself_has_the_values_in_METRICS(talks):
    _, real, _ = talks
    pair = measure_pair(real, real, all_networks())
    expected = {name: m.itself for name, m in METRICS.items() if m.itself is not None}
    for name in expected.keys() - {"FID", "MS-SSIM"}:  # FID is of sets, MS-SSIM needs larger frames
        assert pair["fake"][name] == pytest.approx(expected[name], abs=1e-5), name
    assert frechet_distance(*pair["features"]) == pytest.approx(0, abs=1e-9) and len(pair["features"][0]) == 18
    assert pair["real"].items() <= pair["fake"].items() and "Sync-D" in pair["real"]


@pytest.mark.usefixtures("face_found")
def test_a_clip_whose_sound_is_four_frames_late_has_offset_four(talks):
    _, real, late = talks
    pair = measure_pair(real, late, all_networks())
    assert pair["real"]["Sync offset"] == 0 and pair["fake"]["Sync offset"] == 4
    assert pair["fake"]["Sync-D"] < 0.3 and pair["fake"]["Sync-C"] > 0.3


@pytest.mark.usefixtures("face_found")
def test_a_reencoded_clip_is_close_to_the_original(talks, tmp_path):
    _, real, _ = talks
    again = write_clip(tmp_path / "again.mp4", np.stack(list(read_video(real))), talking()[1])
    fake = measure_pair(real, again, all_networks())["fake"]
    assert fake["SSIM"] > 0.97 and fake["PSNR"] > 35 and fake["L1"] < 0.01 and fake["CSIM"] > 0.999
    assert fake["LMD"] < 0.3 and fake["Sync offset"] == 0


def test_only_the_beginning_of_a_clip_that_is_too_long_for_memory_is_measured(monkeypatch):
    frames = list(np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    monkeypatch.setattr(evaluate, "MAX_CLIP_BYTES", 5 * 8 * 8 * 3)
    clip = clip_of(frames, SimpleNamespace(**NO_NETWORKS), monkeypatch)
    assert len(clip.frames) == 6 and clip.is_cut
    monkeypatch.setattr(evaluate, "read_video", lambda path: iter(frames))
    pair = measure_pair("a.mp4", "b.mp4", SimpleNamespace(**NO_NETWORKS))
    assert pair["frames"] == 6 and any("only the beginning is measured" in note for note in pair["notes"])
    assert not clip_of(frames[:6], SimpleNamespace(**NO_NETWORKS), monkeypatch).is_cut


def replace_detections(monkeypatch, detections):
    """detect_faces returns these in turn, then nothing"""
    detections = iter(detections)
    monkeypatch.setattr(evaluate, "detect_faces", lambda image, margins: next(detections, []))


def test_a_face_box_is_interpolated_between_detections(monkeypatch):
    monkeypatch.setattr(evaluate, "DETECT_EVERY", 5)  # frames 0, 4, 9, 14, 17
    faces = {4: (10, 10, 30, 30, 0.9), 9: (20, 10, 40, 30, 0.9), 17: (36, 10, 56, 30, 0.9)}
    replace_detections(monkeypatch, [[faces[k]] if k in faces else [] for k in (0, 4, 9, 14, 17)])
    frames = np.zeros((18, 60, 80, 3), np.uint8)
    x = clip_of(frames, SimpleNamespace(**NO_NETWORKS), monkeypatch).detections[:, 0]
    np.testing.assert_allclose(x, [10] * 5 + [12, 14, 16, 18] + [20 + 2 * k for k in range(9)])


def test_a_clip_without_a_face_has_reasons_in_place_of_face_metrics(monkeypatch):
    replace_detections(monkeypatch, [])
    monkeypatch.setattr(evaluate, "load_audio", lambda path, normalise: np.zeros(3200, np.float32))
    networks = all_networks()
    networks.sync.template = "face"
    clips = [clip_of(np.zeros((5, 60, 80, 3), np.uint8), networks, monkeypatch) for _ in range(2)]
    reason = "a face in 0 of 2 sampled frames"
    assert clips[0].metrics() == ({}, dict(Sync=reason, motion=reason))
    with pytest.raises(InputError, match=reason):
        evaluate.face_metrics(*clips)


def test_metrics_of_lost_landmarks_are_left_out(monkeypatch):
    replace_detections(monkeypatch, [[(10, 10, 30, 30, 0.9)]] * 2)
    lost = all_networks(sync=None, landmarks=lambda frames, boxes: [None] * 4 + [np.ones((68, 2))])
    clip = clip_of(np.zeros((5, 60, 80, 3), np.uint8), lost, monkeypatch)
    monkeypatch.setattr(evaluate, "load_audio", lambda path, normalise: np.zeros(3200, np.float32))
    assert clip.metrics() == ({}, dict(motion="a face in 1 of 5 frames"))


@pytest.mark.usefixtures("face_found")
def test_problems_of_a_pair_are_printed_below_the_table_of_the_other_pairs(tmp_path, capsys, monkeypatch):
    real, fake = tmp_path / "real", tmp_path / "fake"
    (real / "who").mkdir(parents=True)
    (fake / "who").mkdir(parents=True)
    frames, wav = talking(n=40)
    whole = write_clip(tmp_path / "whole.mp4", frames, wav)
    names = "long", "who/mute", "tiny", "small", "broken", "cut", "wide", "alone"
    for name in names:
        (real / f"{name}.mp4").symlink_to(whole)
    write_clip(fake / "long.mp4", frames[:30], wav[: 30 * 640])
    write_clip(fake / "who" / "mute.mp4", frames[:15])
    write_clip(fake / "tiny.mov", frames[:3], wav[:1920])
    write_clip(fake / "small.mp4", frames[:20, ::2, ::2], wav)
    (fake / "broken.mp4").write_bytes(b"no clip")
    (fake / "cut.mp4").write_bytes(Path(whole).read_bytes()[: Path(whole).stat().st_size // 2])
    write_clip(fake / "wide.mp4", frames[:, :40], wav)
    networks = all_networks(inception=None, left_out={"FID": "no weights"})
    monkeypatch.setattr(evaluate, "load_networks", lambda args, device: networks)
    evaluate.main(["pair", str(real), str(fake), "--json", str(tmp_path / "n.json")])
    out = capsys.readouterr().out
    assert "long: 30 frames, the real clip has 40: 30 compared" in out
    assert "who/mute: Sync: has no sound" in out and "4 pairs: MS-SSIM: 72x72 px are too few" in out
    assert "tiny: Sync: too short: 3 frames" in out and "small: resized from 36x36 to 72x72" in out
    for name, reason in dict(broken="is not a", cut="cut", wide="frames are 72x40").items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name}: left out: "))
        assert f"{name}.mp4: " in line and reason in line
    assert f"without a partner: {real / 'alone.mp4'}" in out and "left out: FID: no weights" in out
    assert "4 pairs, 68 frames" in out
    itself, row, near = table_rows(out)
    assert near[""] == "closeness of these means" and near["SSIM"] == "–" and float(near["lip dynamics"]) <= 1
    assert row[""] == "fake" and float(row["SSIM"]) > 0.8 and "FID" not in row and float(itself["Sync-D"]) >= 0
    report = json.loads((tmp_path / "n.json").read_text())
    assert report["rows"]["fake"]["SSIM"] == pytest.approx(float(row["SSIM"]), abs=6e-4)
    assert report["rows"]["real, against itself"]["PSNR"] == "Infinity" and report["columns"]["PSNR"]["unit"] == "dB"
    assert [p["name"] for p in report["pairs"]] == sorted(n for n in names if n != "alone")
    assert report["left_out"] == {"FID": "no weights"} and report["versions"]["torch"] == torch.__version__
    alike = [p["fake"]["SSIM"] for p in report["pairs"] if "fake" in p]
    assert report["rows"]["fake"]["SSIM"] == pytest.approx(np.mean(alike))


def test_usual_values_are_printed_for_our_expert_only():
    args = SimpleNamespace(expert=None, landmarks=None)
    assert "Sync-C of real clips is usually 0.27" in "\n".join(evaluate.explain(args, all_networks(), METRICS, 0))
    args.expert = "wav2lip"
    assert "Sync-C of" not in "\n".join(evaluate.explain(args, all_networks(), METRICS, 0))


def test_metrics_without_weights_are_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(evaluate, "SHIPPED_EXPERT", tmp_path / "sync.pt")
    args = evaluate.parse(["pair", "a.mp4", "b.mp4", "--skip", "SSIM, L1", "--landmarks", "fan"])
    networks = evaluate.load_networks(args, CPU)
    assert not any(getattr(networks, k) for k in ("sync", "landmarks", "lpips", "arcface", "syncnet", "inception"))
    reasons = networks.left_out
    assert reasons.keys() == METRICS.keys() - {"MS-SSIM", "PSNR"}
    assert "vgg16" in reasons["LPIPS"] and "2DFAN4" in reasons["LMD"] and "sync.pt" in reasons["Sync-D"]
    assert "inception" in reasons["FID"] and "syncnet_v2" in reasons["LSE-D"] and reasons["SSIM"] == "--skip"


def test_clips_are_paired_by_name_and_two_of_one_name_are_refused(tmp_path):
    for name in ("a/x.mp4", "b/x.mpg", "b/.x.mp4", "b/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"clip")
    pairs, unpaired = evaluate.pairs_of(tmp_path / "a", tmp_path / "b")
    assert [p[0] for p in pairs] == ["x"] and pairs[0][2].name == "x.mpg" and unpaired == []
    (tmp_path / "b" / "x.avi").write_bytes(b"clip")
    with pytest.raises(InputError, match="same name"):
        evaluate.pairs_of(tmp_path / "a", tmp_path / "b")


def test_clips_pair_by_name_whichever_way_their_accents_are_stored(tmp_path):
    for folder, name in (("real", "Jos\u00e9.1.mp4"), ("fake", "Jose\u0301.1.mp4")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    pairs, unpaired = evaluate.pairs_of(tmp_path / "real", tmp_path / "fake")
    assert [name for name, *_ in pairs] == ["Jos\u00e9.1"] and not unpaired


def test_inception_agrees_with_a_restatement_of_tensorflows_network_of_2015(monkeypatch):
    """The restatement draws random weights layer by layer. The network then loads them."""
    torch.manual_seed(0)
    w = {}

    def conv(x, name, c_out, kernel, stride=1, padding=0):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        shape = (c_out, x.shape[1], *kernel)
        w[f"{name}.conv.weight"] = torch.randn(shape) * (2 / np.prod(shape[1:])) ** 0.5
        mean, var, scale, bias = 0.3 * torch.randn(c_out), 0.5 + torch.rand(c_out), torch.rand(c_out), torch.randn(c_out)
        w.update({f"{name}.bn.running_mean": mean, f"{name}.bn.running_var": var, f"{name}.bn.weight": scale,
                  f"{name}.bn.bias": bias})
        y = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var, scale, bias = (v[:, None, None] for v in (mean, var, scale, bias))
        return torch.relu((y - mean) / (var + 1e-3).sqrt() * scale + bias)

    def average(x):  # of the pixels that are inside
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)

    def chain(x, name, *layers):  # layers _1, _2, ..: channels, kernel, and stride 2 or the same size
        for k, (c, kernel, *stride) in enumerate(layers, 1):
            sides = (kernel, kernel) if isinstance(kernel, int) else kernel
            x = conv(x, f"{name}_{k}", c, kernel, *stride or (1, tuple(side // 2 for side in sides)))
        return x

    def fork(x, name):
        return [conv(x, f"{name}a", 384, (1, 3), 1, (0, 1)), conv(x, f"{name}b", 384, (3, 1), 1, (1, 0))]

    row, column = (1, 7), (7, 1)
    image, sizes, resize = torch.rand(1, 3, 90, 75) * 2 - 1, [], judges.resize_square
    monkeypatch.setattr(judges, "resize_square", lambda x, size: sizes.append(size) or resize(x, 139))  # for 299 px
    x = F.interpolate(image, (139, 139), mode="bilinear", align_corners=False)
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 32, 3, 2), "Conv2d_2a_3x3", 32, 3), "Conv2d_2b_3x3", 64, 3, 1, 1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1", 80, 1), "Conv2d_4a_3x3", 192, 3)
    x = F.max_pool2d(x, 3, 2)
    for m, pool in (("Mixed_5b.branch", 32), ("Mixed_5c.branch", 64), ("Mixed_5d.branch", 64)):
        x = torch.cat([conv(x, m + "1x1", 64, 1), chain(x, m + "5x5", (48, 1), (64, 5)),
                       chain(x, m + "3x3dbl", (64, 1), (96, 3), (96, 3)), conv(average(x), m + "_pool", pool, 1)], 1)
    m = "Mixed_6a.branch"
    x = torch.cat([conv(x, m + "3x3", 384, 3, 2), chain(x, m + "3x3dbl", (64, 1), (96, 3), (96, 3, 2)),
                   F.max_pool2d(x, 3, 2)], 1)
    for m, c in (("Mixed_6b.branch", 128), ("Mixed_6c.branch", 160), ("Mixed_6d.branch", 160), ("Mixed_6e.branch", 192)):
        double = chain(x, m + "7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row))
        x = torch.cat([conv(x, m + "1x1", 192, 1), chain(x, m + "7x7", (c, 1), (c, row), (192, column)), double,
                       conv(average(x), m + "_pool", 192, 1)], 1)
    m = "Mixed_7a.branch"
    x = torch.cat([chain(x, m + "3x3", (192, 1), (320, 3, 2)),
                   chain(x, m + "7x7x3", (192, 1), (192, row), (192, column), (192, 3, 2)), F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_7b.branch", "Mixed_7c.branch"):
        pooled = average(x) if "7b" in m else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([conv(x, m + "1x1", 320, 1), *fork(conv(x, m + "3x3_1", 384, 1), m + "3x3_2"),
                       *fork(chain(x, m + "3x3dbl", (448, 1), (384, 3)), m + "3x3dbl_3"),
                       conv(pooled, m + "_pool", 192, 1)], 1)
    assert x.shape == (1, 2048, 3, 3) and len(w) == 5 * 94
    monkeypatch.setattr(judges, "fetch", lambda name: name)
    monkeypatch.setattr(judges, "read_weights", lambda path: w)
    network = judges.Inception(CPU)
    torch.testing.assert_close(network(image), x.mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert set(sizes) == {299}
    w["Mixed_7c.branch_pool.conv.weight"] = torch.zeros(192, 7, 1, 1)
    with pytest.raises(InputError, match="not the weights of Inception"):
        judges.Inception(CPU)
