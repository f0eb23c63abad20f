"""Measures against independent computations; the control table against networks whose control is known."""

import functools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import skimage.metrics
import torch
import torch.nn.functional as F
from torch import nn
from scipy.spatial.transform import Rotation

import checkpoint
import control
import evaluate
import judges
import toyfaces
from audio import log_mel, mel_windows, mfcc
from checkpoint import save_checkpoint
from control import (
    READ, Probe, change_matrix, control_table, correlation, l1, markdown, probe_row, retrieval, talker)
from evaluate import (
    METRICS, Moments, Watch, align_face, cpbd, eye_opening, five_points, frechet_distance, head_pose,
    landmark_distance, lip_sync_error, measure, mouth_distance, psnr, ssim, ssim_and_ms_ssim)
from media import InputError, VideoWriter, read_video, run, to_tensor, to_uint8
from toyfaces import FACTORS, TEST, person

LIPS = [FACTORS.index("open"), FACTORS.index("wide")]
CPU = torch.device("cpu")


NOBODY = dict(device=CPU, every=5, skip={}, sync=None, landmarks=None, lpips=None, arcface=None, syncnet=None,
              inception=None, follow=False)  # fmt: skip


@pytest.fixture(autouse=True)
def no_expert(monkeypatch, tmp_path):
    """The shipped expert wants a face detector, which may have to be fetched: no test needs a network"""
    monkeypatch.setattr(evaluate, "EXPERT", tmp_path / "no_sync.pt")


# ------------------------------------------------------------------------------------------------------------
# pure functions


def pictures(seed, *shape):
    """Two uint8 pictures that look somewhat alike"""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape)
    return a.astype(np.uint8), np.clip(a + rng.normal(8, 25, shape), 0, 255).astype(np.uint8)


def test_correlation_is_that_of_numpy_over_all_axes():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 41))
    b = 0.4 * a + rng.normal(2, 1, a.shape)
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-12)


def test_correlation_has_the_sign_of_the_slope_and_is_zero_for_a_flat_curve():
    t = np.linspace(0, 3, 17)
    assert correlation(t, 5 * t - 2) == pytest.approx(1)
    assert correlation(t, 4 - 0.1 * t) == pytest.approx(-1)
    assert correlation(t, np.full(17, 0.1)) == 0 and correlation(np.full(17, 0.1), t) == 0


def test_l1_and_psnr_of_a_known_difference():
    a, black = np.full((7, 9, 3), 30, np.uint8), np.zeros((7, 9, 3), np.uint8)
    assert l1(a, black) == pytest.approx(30 / 255) and l1(black, a) == l1(
        a, black
    )  # uint8 does not wrap round
    assert psnr(a, black) == pytest.approx(20 * np.log10(255 / 30)) and psnr(black, a) == psnr(a, black)
    assert l1(a, a) == 0 and psnr(a, a) == float("inf")


def test_a_frame_that_is_equal_does_not_make_a_clip_perfect():
    assert evaluate.mean_of([30, float("inf"), 32]) == 31 and evaluate.mean_of([float("inf")] * 2) == float("inf")
    assert np.isnan(evaluate.mean_of([1, float("nan")]))


def test_psnr_and_ssim_are_those_of_scikit_image():
    a, b = pictures(1, 23, 31, 3)
    assert psnr(a, b) == pytest.approx(
        skimage.metrics.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9
    )
    wang = dict(
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
    )
    assert ssim(a, b) == pytest.approx(skimage.metrics.structural_similarity(a, b, **wang), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1) and 0 < ssim(a, b) < 0.99
    dark = a // 20, a // 20 + (np.arange(31) % 2)[:, None].astype(np.uint8)  # little contrast, a small difference
    assert ssim(*dark) == pytest.approx(skimage.metrics.structural_similarity(*dark, **wang), abs=1e-6)


def test_measures_of_a_stack_of_pictures_are_those_of_each():
    a, b = pictures(2, 2, 5, 19, 17, 3)
    for metric in (l1, psnr, ssim):
        apart = [[metric(p, q) for p, q in zip(*rows)] for rows in zip(a, b)]
        np.testing.assert_allclose(metric(a, b), apart, rtol=1e-6)


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


def test_ms_ssim_is_that_of_a_loop_over_windows():
    rng = np.random.default_rng(3)
    a = rng.integers(0, 256, (23, 25, 1)).repeat(8, 0).repeat(8, 1)[:177, :181].astype(np.uint8).repeat(3, 2)
    b = np.clip(a * 0.9 + rng.normal(12, 30, (177, 181, 1)), 0, 255).astype(np.uint8)
    value, multi = ssim_and_ms_ssim(a, b)
    assert multi == pytest.approx(ms_ssim_by_loops(a[..., 0], b[..., 0]), abs=1e-5)
    assert 0.3 < multi < 0.99 and value == ssim(a, b)
    assert ssim_and_ms_ssim(a, a)[1] == pytest.approx(1)
    assert np.isnan(ssim_and_ms_ssim(a[:175], b[:175])[1])  # no room for the coarsest window


def slopes(width, contrast):
    """Uint8 (70, 140, 3) of upright edges `width` pixels wide, dark to bright and back"""
    ramp = (1 - np.cos(np.pi * np.arange(width + 1) / width)) / 2
    wave = np.concatenate([np.zeros(14), ramp, np.ones(14), ramp[::-1]])
    row = 100 + contrast * np.resize(wave, 140)
    return np.broadcast_to(row[None, :, None].round(), (70, 140, 3)).astype(np.uint8)


def test_cpbd_counts_edges_up_to_three_pixels_as_sharp_and_up_to_five_where_contrast_is_low():
    assert [cpbd(slopes(w, 150)) for w in (2, 4, 6)] == [1, 0, 0]
    assert [cpbd(slopes(w, 45)) for w in (2, 4, 6)] == [1, 1, 0]


def test_cpbd_falls_with_blur_and_is_not_a_number_where_nothing_is_upright_or_large_enough():
    from scipy.ndimage import gaussian_filter

    sharp = pictures(4, 16, 24, 3)[0].repeat(8, 0).repeat(8, 1)
    values = [cpbd(gaussian_filter(sharp, (s, s, 0))) for s in (0, 0.7, 1.2, 3)]
    assert values[0] > 0.95 and values == sorted(values, reverse=True) and values[-1] < 0.2
    assert np.isnan(cpbd(slopes(2, 150).swapaxes(0, 1))) and np.isnan(cpbd(np.full((64, 64, 3), 9, np.uint8)))
    assert np.isnan(cpbd(slopes(2, 150)[:63]))


def test_the_width_of_a_slope_runs_from_its_darkest_to_its_brightest_pixel():
    rng = np.random.default_rng(5)
    grey = rng.integers(0, 9, (3, 40)).astype(float)
    gradient = np.gradient(grey, axis=1)
    widths = evaluate.slope_widths(grey, gradient)
    for y, x in np.ndindex(grey.shape):
        sign, left, right = np.sign(gradient[y, x]), x, x
        while sign and left > 0 and np.sign(grey[y, left] - grey[y, left - 1]) == sign:
            left -= 1
        while sign and right < 39 and np.sign(grey[y, right + 1] - grey[y, right]) == sign:
            right += 1
        assert widths[y, x] == right - left, (y, x)


# ------------------------------------------------------------------------------------------------------------
# landmarks


def test_landmarks_that_move_are_as_far_as_they_moved_and_a_mouth_has_no_place():
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


def test_the_pose_of_a_turned_average_face_is_its_turn():
    turns = np.array([(0, 0, 0), (25, 0, 0), (0, -18, 0), (0, 0, 33), (-30, 12, -8)], float)  # yaw, pitch, roll
    points = np.full((len(turns), 68, 2), 500.0)  # what is not on the skull must not matter
    for k, (yaw, pitch, roll) in enumerate(turns):
        turn = Rotation.from_euler("zxy", [-roll, -pitch, yaw], degrees=True)  # first about y, then x, then z
        seen = turn.apply(evaluate.AVERAGE)[:, :2] * 4.3 + [3, -8]
        points[k, evaluate.RIGID] = seen * [1, -1] + 90
    # rows of a rotation: the face's direction is the third column
    expected = []
    for yaw, pitch, roll in turns:
        R = Rotation.from_euler("zxy", [-roll, -pitch, yaw], degrees=True).as_matrix()
        f = R[:, 2]
        angles = np.arctan2(f[0], f[2]), np.arctan2(f[1], np.hypot(f[0], f[2])), -np.arctan2(R[1, 0], R[0, 0])
        expected.append(np.degrees(angles))
    np.testing.assert_allclose(head_pose(points), expected, atol=1e-6)
    np.testing.assert_allclose(head_pose(points)[:4], turns[:4], atol=1e-6)  # one angle at a time: that angle


def test_an_eye_twice_as_open_has_twice_the_ratio():
    points = np.zeros((3, 68, 2))
    for k, height in enumerate((0, 3, 6)):
        for begin in (36, 42):
            points[k, begin : begin + 6] = [(0, 0), (7, height), (13, height), (20, 0), (13, -height), (7, -height)]
    np.testing.assert_allclose(eye_opening(points), [0, 0.3, 0.6])


@pytest.mark.parametrize("scale", [0.8, 4.6])
def test_an_aligned_face_has_its_points_where_arcface_wants_them(scale):
    y, x = np.mgrid[:700, :800]
    where = np.stack([x * 0.3, y * 0.3, 0 * x], 2).astype(np.uint8)  # the colour says the place
    turn = scale * np.exp(0.2j) * (evaluate.ARCFACE_POINTS @ [1, 1j]) + 90 + 70j
    five = np.stack([turn.real, turn.imag], 1)
    crop = align_face(where, five)
    assert crop.shape == (112, 112, 3)
    for (cx, cy), (px, py) in zip(evaluate.ARCFACE_POINTS, five):
        np.testing.assert_allclose(crop[int(cy), int(cx), :2], [px * 0.3, py * 0.3], atol=0.3 * scale + 1.5)
    points = np.zeros((68, 2))
    points[36:42], points[42:48], points[[30, 48, 54]] = five[0], five[1], five[2:]
    np.testing.assert_allclose(five_points(points), five)


# ------------------------------------------------------------------------------------------------------------
# lips and sound, sets of pictures


@pytest.mark.parametrize("late", [-6, 0, 4])
@pytest.mark.parametrize("pad", [True, False])
def test_sound_that_is_late_by_k_has_offset_k(late, pad):
    torch.manual_seed(0)
    face = torch.randn(60, 7)
    least, sure, found = lip_sync_error(face, face.roll(late, 0) + 0.1 * torch.randn(60, 7), pad=pad)
    assert found == late and least < 1 and sure > 2


def test_lip_sync_error_is_that_of_a_loop_with_zeros_beyond_the_ends():
    torch.manual_seed(1)
    face, sound, reach = torch.randn(9, 5), torch.randn(9, 5), 4
    means, inside = [], []
    for d in range(-reach, reach + 1):
        far = [[float((face[k] - (sound[k + d] if 0 <= k + d < 9 else 0)).norm()), 0 <= k + d < 9] for k in range(9)]
        means.append(np.mean([x for x, _ in far]))
        inside.append(np.mean([x for x, there in far if there]))
    expected = min(means), np.median(means) - min(means), np.argmin(means) - reach
    assert lip_sync_error(face, sound, reach) == pytest.approx(expected, abs=1e-4)
    expected = min(inside), np.median(inside) - min(inside), np.argmin(inside) - reach
    assert lip_sync_error(face, sound, reach, pad=False) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError):
        lip_sync_error(face[:0], sound[:0])


def test_published_lse_is_that_of_a_loop_over_windows_of_five_frames(monkeypatch):
    torch.manual_seed(2)
    net = checkpoint.freeze(judges.SyncNetV2())
    box = (30.0, 20.0, 60.0, 44.0)
    monkeypatch.setattr(evaluate, "detect_faces", lambda picture, margins: [(*box, 0.9)])
    frames = pictures(7, 8, 70, 90, 3)[0]
    wav = np.random.default_rng(8).uniform(-0.4, 0.4, 640 * 7 + 300).astype(np.float32)  # 7 frames of sound
    watch = Watch(SimpleNamespace(**(NOBODY | dict(syncnet=net, follow=True))))
    watch.add(frames[:6])
    watch.add(frames[6:])
    values, why = watch.alone(wav)
    x, y, s = 45, 32, 15  # SyncNet's script: from x - 1.4 s, y - s, a square of 2.8 s
    crop = [evaluate.crop_face(f, (x - 1.4 * s, y - s, x + 1.4 * s, y + 1.8 * s), 224) for f in frames]
    steps, face, sound = mfcc(wav), [], []
    for k in range(7 - 5):
        bgr = torch.from_numpy(np.stack(crop[k : k + 5])[..., ::-1].copy()).float().permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            face.append(net.netfclip(net.netcnnlip(bgr).flatten(1))[0])
            heard = torch.from_numpy(steps[None, None, :, 4 * k : 4 * k + 20]).float()
            sound.append(net.netfcaud(net.netcnnaud(heard).flatten(1))[0])
    means = []
    for d in range(-15, 16):
        pairs = [(face[k], sound[k + d] if 0 <= k + d < len(sound) else torch.zeros(1024)) for k in range(len(face))]
        means.append(float(np.mean([float((f - s).norm()) for f, s in pairs])))
    assert values["LSE-D"] == pytest.approx(min(means), rel=1e-3)
    assert values["LSE-C"] == pytest.approx(np.median(means) - min(means), abs=2e-3 * max(means)) and "LSE" not in why


def gaussian_moments(seed, n, mean, scale):
    moments = Moments()
    x = np.random.default_rng(seed).normal(size=(n, len(mean))) @ scale + mean
    for part in np.array_split(x, 3):
        moments.add(torch.from_numpy(part))
    return moments, x


def test_moments_in_batches_are_those_of_numpy_and_add_up():
    moments, x = gaussian_moments(0, 50, np.arange(4.0), np.diag([1, 2, 3, 4.0]))
    other, y = gaussian_moments(1, 30, np.ones(4), np.eye(4))
    moments.merge(other)
    both = np.concatenate([x, y])
    np.testing.assert_allclose(moments.mean(), both.mean(0))
    np.testing.assert_allclose(moments.covariance(), np.cov(both.T), atol=1e-12)


def test_frechet_distance_is_0_of_equal_sets_and_the_closed_form_of_two_gaussians():
    rng = np.random.default_rng(2)
    a, x = gaussian_moments(3, 90, rng.normal(size=5), rng.normal(size=(5, 5)))
    b, y = gaussian_moments(4, 70, rng.normal(size=5), rng.normal(size=(5, 5)))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    closed = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-6) and closed > 0.1
    few, x = gaussian_moments(5, 4, np.zeros(9), np.eye(9))  # fewer pictures than features
    moved = Moments()
    moved.add(torch.from_numpy(x + 2))
    assert frechet_distance(few, moved) == pytest.approx(9 * 4, rel=1e-6)


def test_retrieval_counts_the_queries_that_find_their_own_row():
    gallery = torch.eye(4, 6)
    assert retrieval(gallery, gallery) == 1
    assert retrieval(gallery[[1, 0, 2, 3]], gallery) == 0.5
    assert retrieval(gallery.roll(1, 0), gallery) == 0
    near = gallery + 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert retrieval(near[:3], gallery[:3]) == sum(int(near[k, :3].argmax()) == k for k in range(3)) / 3


def test_the_table_in_markdown_has_a_row_each_and_two_decimals():
    table = markdown({"real": dict(open=0.987, yaw=1), "out/a.pt": dict(yaw=-0.004, open=0.5)})
    assert table.splitlines() == [
        "| | open | yaw |",
        "|---|---|---|",
        "| real | 0.99 | 1.00 |",
        "| out/a.pt | 0.50 | -0.00 |",
    ]


# ------------------------------------------------------------------------------------------------------------
# the probe


@pytest.mark.parametrize("size", [16, 48])
def test_the_probe_reads_ten_factors_and_a_unit_embedding_from_each_picture_alone(size):
    torch.manual_seed(0)
    probe = Probe(size, width=8).eval()
    x = torch.randn(5, 3, size, size)
    read, who = probe(x)
    assert read.shape == (5, 10) and who.shape == (5, 64)
    torch.testing.assert_close(who.norm(dim=1), torch.ones(5))
    changed = x.clone()
    changed[3] += 1
    same = torch.tensor([0, 1, 2, 4])
    for before, after in zip((read, who), probe(changed)):
        torch.testing.assert_close(before[same], after[same])
        assert not torch.allclose(before[3], after[3])


def test_readings_are_in_the_factors_own_units_and_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    probe = Probe(16, width=8).eval()
    probe.mean.copy_(torch.arange(10.0))
    probe.std.copy_(torch.linspace(0.5, 9, 10))
    x = torch.randn(7, 3, 16, 16)
    whole, parts = probe.readings(x), probe.readings(x, batch=3)
    torch.testing.assert_close(whole[0], probe(x)[0] * torch.linspace(0.5, 9, 10) + torch.arange(10.0))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


def test_a_trained_probe_is_kept_and_knows_the_scale_of_each_factor(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.os, "cpu_count", lambda: 1)  # no processes for four clips
    probe = control.train_probe(16, tmp_path, CPU, people=4, steps=3, batch=6)
    truth = np.load(tmp_path / "probe_toys16" / "truth.npy")
    torch.testing.assert_close(probe.mean, torch.from_numpy(truth.mean(0)))
    torch.testing.assert_close(probe.std, torch.from_numpy(truth.std(0, ddof=1)))
    monkeypatch.setattr(evaluate, "make_pack", None)  # the second time nothing is drawn or trained
    again = control.train_probe(16, tmp_path, CPU)
    assert not again.training
    x = torch.randn(2, 3, 16, 16)
    for a, b in zip(probe.readings(x), again.readings(x)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", ["no checkpoint", "another network", "nothing in it"])
def test_a_kept_probe_that_is_damaged_is_trained_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(evaluate.os, "cpu_count", lambda: 1)
    few = dict(people=4, steps=2, batch=6)
    control.train_probe(16, tmp_path, CPU, **few)
    kept = tmp_path / f"probe16_world{toyfaces.WORLD}.pt"
    networks = {"another network": dict(probe=torch.nn.Linear(2, 3).state_dict()), "nothing in it": {}}
    if damage in networks:
        save_checkpoint(kept, dict(kind="probe", format=1, networks=networks[damage]))
    else:
        kept.write_bytes(kept.read_bytes()[:999])
    control.train_probe(16, tmp_path, CPU, **few)
    monkeypatch.setattr(evaluate, "make_pack", None)  # what was trained anew is kept, and whole
    control.train_probe(16, tmp_path, CPU)


# ------------------------------------------------------------------------------------------------------------
# the control table and the matrix of changes, where the right answer is known


class World:
    """Pack, probe and drawing hand in one, that never errs: all that is drawn is remembered, and looked up.

    Every factor of person c is a cosine of c + 1 turns a clip: two people have nothing in common, so what is
    0 in theory is 0 here.
    """

    size, people, T = 32, 7, 50

    def __init__(self):
        reach = 14, 10, 9, 0.3, 0.8, 0.7, 0.9, 0.4, 0.4, 0.45  # in the order of FACTORS
        middle = 0, 0, 0, 0.35, 0, 0, 0, 0.2, 0.5, 0.5
        c, t, j = np.ogrid[: self.people, : self.T, :10]
        curves = np.cos(2 * np.pi * (c + 1) * t / self.T + 0.5 * j)
        self.truth = (curves * reach + middle).astype(np.float32)  # (people, T, 10)
        self.known, self.drawn = {}, {}
        self.n_frames = [self.T] * self.people
        sounds = [mel_windows(log_mel(self.sound(c)), [5])[0] for c in range(self.people)]
        self.sixth_window = np.stack(sounds)  # (people, 1, 80, 16): tells whose sound it is

    def draw(self, who, state, size):
        """toyfaces.draw that remembers"""
        key = (who.seed, *state.values())
        if key not in self.drawn:
            picture = self.drawn[key] = toyfaces.draw(who, state, size).copy()
            self.known[picture.tobytes()] = who.seed - TEST, np.array([state[k] for k in FACTORS])
        return self.drawn[key]

    def states(self, picture):
        """(.., H, W, 3) in [-1, 1] as tensors are -> who, state (10,)"""
        return self.known[to_uint8(picture).tobytes()]

    # as a pack
    def __len__(self):
        return self.people

    def frame(self, c, k):
        return self.draw(person(TEST + c), dict(zip(FACTORS, map(float, self.truth[c, k]))), self.size)

    def frames(self, c, ks):
        return np.stack([self.frame(c, k) for k in ks])

    def sound(self, c):
        return np.random.default_rng(c).uniform(-0.5, 0.5, 640 * self.T).astype(np.float32)

    # as a probe
    def readings(self, pictures):
        who, state = zip(*map(self.states, pictures))
        return torch.tensor(np.stack(state)), torch.eye(64)[list(who)]


class Network:
    """Stands in for the network under test, with control that is known: perfect, or short of one input."""

    def __init__(self, world, ignores=()):
        self.world, self.ignores = world, ignores
        self.config = SimpleNamespace(size=world.size, template="toy")
        self.kind = "weights"

    def animate(self, source, mel, driving=None):
        world = self.world
        face, rest = world.states(source)
        state = np.stack([world.states(frame)[1] for frame in driving])
        heard = np.square(world.sixth_window - mel[5].numpy()).sum((1, 2, 3)).argmin()
        if "driving" in self.ignores:
            state[:] = rest
        if "sound" not in self.ignores:
            state[:, LIPS] = world.truth[heard, : len(mel), LIPS].T
        who = person(TEST + (0 if "face" in self.ignores else face))
        frames = np.stack([world.draw(who, dict(zip(FACTORS, map(float, s))), world.size) for s in state])
        yield from to_tensor(frames).split(16)


@pytest.fixture(scope="module")
def world():
    return World()


def table_of(world, *ignores):
    return control_table(talker(Network(world, ignores), CPU), world, world, world.truth, CPU)


HEAD = ("yaw", "pitch", "roll", "blink", "gaze")


def test_perfect_control_is_one_everywhere_and_leaks_nothing(world):
    table = table_of(world)
    for name in ("open", "wide", *HEAD, "identity", "open range"):
        assert table[name] == pytest.approx(1, abs=0.01), name
    for name in ("wrong sound", "driving mouth"):
        assert table[name] == pytest.approx(0, abs=0.01), name


def test_a_still_photo_follows_nothing_and_keeps_its_identity(world):
    table = table_of(world, "sound", "driving")
    for name in ("open", "wide", "wrong sound", "driving mouth", *HEAD):
        assert table[name] == pytest.approx(0, abs=0.01), name
    assert table["identity"] == 1


def test_a_network_that_ignores_everything_finds_one_person_of_seven_by_chance(world):
    assert table_of(world, "face")["identity"] == pytest.approx(1 / 7)
    assert table_of(world, "sound", "driving", "face")["open"] == pytest.approx(0, abs=0.01)


def test_lips_that_copy_the_driving_mouth_are_found_out(world):
    table = table_of(world, "sound")
    assert table["driving mouth"] == pytest.approx(1, abs=0.01)
    assert abs(table["open"]) < 0.01 and abs(table["wide"]) < 0.01
    assert all(table[name] == pytest.approx(1, abs=0.01) for name in HEAD)


def test_a_head_that_ignores_the_driving_clip_is_found_out(world):
    table = table_of(world, "driving")
    assert all(abs(table[name]) < 0.01 for name in HEAD) and table["open"] == pytest.approx(1, abs=0.01)


def test_the_probes_own_row_is_perfect_when_the_probe_is(world):
    row = probe_row(world, world, world.truth, CPU)
    for name in (*(k for k in READ if "gaze" not in k), "gaze", "identity", "open range"):
        assert row[name] == pytest.approx(1, abs=0.01), name
    assert row["wrong sound"] == pytest.approx(0, abs=0.01)
    assert row.keys() == table_of(world).keys()  # they stand in one table


def test_a_probe_that_confuses_two_factors_does_not_look_perfect(world):
    crossed = SimpleNamespace(readings=lambda x: (world.readings(x)[0].flip(1), world.readings(x)[1]))
    row = probe_row(crossed, world, world.truth, CPU)
    assert all(row[name] < 0.95 for name in HEAD) and row["identity"] == 1


# input -> the one thing that it moves
MOVES = dict(face="identity", sound="lips", pose="pose", eyes="eyes", mouth=None)


@pytest.mark.parametrize(
    "ignores, moves", [((), {}), (("sound",), dict(sound=None, mouth="lips")), (("face",), dict(face=None))]
)
def test_the_matrix_is_one_where_an_input_should_move_something_and_nought_elsewhere(
    world, monkeypatch, ignores, moves
):
    monkeypatch.setattr(evaluate, "draw", world.draw)
    matrix = change_matrix(talker(Network(world, ignores), CPU), world, world, world.truth, CPU, trials=1, T=world.T)
    for name, moved in {**MOVES, **moves}.items():
        for column, value in matrix[name].items():
            assert value == pytest.approx(float(column == moved), abs=0.02), (name, column)


def test_the_inversion_table_has_a_row_for_each_refinement(world):
    """A generator that is 9 grey levels off, and 3 less after each of two refinements"""
    pictures = 2 * torch.arange(4 * 3 * 8 * 8).reshape(4, 3, 8, 8) % 201 / 255 - 1         # whole grey levels
    network = SimpleNamespace(
        config=SimpleNamespace(refine=2), hyper=True, invert=lambda x: x,
        refine=lambda x, z, deltas: (deltas or 0) + 1, decode=lambda z, deltas: z + (9 - 3 * (deltas or 0)) / 127.5)

    class OneClip(list):
        n_frames = [4]

        def frames(self, c, seen):
            return to_uint8(pictures[seen])

    pack = OneClip(["clip"])
    judge = lambda x: (None, torch.nn.functional.normalize(x.flatten(1), dim=1))           # noqa: E731
    rows = control.inversion_table(network, judge, pack, CPU)
    assert [round(row["L1"], 3) for row in rows.values()] == [9, 6, 3]
    same = [row["identity"] for row in rows.values()]
    assert same == sorted(same) and same[-1] < 1


def test_the_toy_report_prints_both_tables_and_writes_the_numbers(world, tmp_path, monkeypatch, capsys):
    def make_pack(folder, size, people, seconds, first, workers):
        folder.mkdir()
        np.save(folder / "truth.npy", world.truth.reshape(-1, 10))

    networks = dict(good=Network(world), deaf=Network(world, ("sound",)))
    stand_ins = dict(
        load_model=lambda path, device, kinds: networks[path],
        train_probe=lambda size, folder, device: world,
        draw=world.draw,
        make_pack=make_pack,
        Pack=lambda folder: world,
        inversion_table=lambda model, *rest: {"the generator's own weights": dict(L1=3.0, identity=0.5)},
        change_matrix=functools.partial(change_matrix, trials=1),
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(evaluate, name, stand_in)
    numbers = tmp_path / "numbers.json"
    places = ["--cache", str(tmp_path / "new" / "cache"), "--json", str(numbers)]
    evaluate.main(["--toy", "good", "deaf", "--people", "7", "--device", "cpu", *places])
    report = json.loads(numbers.read_text())
    assert report["good"]["open"] > 0.99 and abs(report["deaf"]["open"]) < 0.01
    assert report["good matrix"]["sound"]["lips"] > 0.98 and report["deaf matrix"]["sound"]["lips"] < 0.02
    out = capsys.readouterr().out
    lines = [cells(line) for line in out.splitlines() if line.startswith("|")]
    columns = next(line for line in lines if "open" in line)
    good, deaf = (dict(zip(columns, line)) for line in lines if line[0] in networks)
    assert good["open"] == good["yaw"] == good["identity"] == "1.00" and deaf["driving mouth"] == "1.00"
    assert "deaf: change one input" in out


# ------------------------------------------------------------------------------------------------------------
# the script


def cells(line):
    """| a | b | -> ["a", "b"]"""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def film(path, frames, wav=None):
    with VideoWriter(path, *frames.shape[1:3], wav) as video:
        for frame in frames:
            video.write(frame)
    return str(path)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A clip of 7 frames of 24x32 pixels, the same a little brighter, and one of another shape"""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    frames = rng.integers(40, 190, (7, 4, 3, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)  # (T, 32, 24, 3)
    return (
        film(folder / "real.mp4", frames),
        film(folder / "fake.mp4", frames + 20),
        film(folder / "wide.mp4", frames.swapaxes(1, 2)),
    )


def printed(text):
    """The table printed -> {metric: cell} of the row of the real clips and of that of the others"""
    head, _, *rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    return [dict(zip([name.split(",")[0].rstrip(" ↑↓") for name in head], row)) for row in rows]


def test_two_clips_are_compared_frame_by_frame(clips, capsys):
    real, fake, _ = clips
    evaluate.main([real, fake])
    out = capsys.readouterr().out
    itself, row = printed(out)
    pairs = list(zip(read_video(real), read_video(fake)))
    assert "1 pairs, 7 frames" in out and len(pairs) == 7 and row[""] == "fake.mp4"
    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)
    similar = [skimage.metrics.structural_similarity(a, b, **wang) for a, b in pairs]
    assert float(row["SSIM"]) == pytest.approx(np.mean(similar), abs=0.0006)
    noise = [skimage.metrics.peak_signal_noise_ratio(a, b) for a, b in pairs]
    assert float(row["PSNR"]) == pytest.approx(np.mean(noise), abs=0.006)
    assert float(row["L1"]) == pytest.approx(20 / 255, abs=0.015)  # the codec rounds
    assert (itself["SSIM"], itself["PSNR"], itself["L1"]) == ("1.000", "inf", "0.0000")
    assert "MS-SSIM" not in row and "CPBD" not in row  # too small for them, and so it is said
    assert "fake.mp4: MS-SSIM: 24x32 px are too few" in out and "CPBD: no edge" in out
    assert "left out: FID" in out or "FID" in row


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        run(lambda: evaluate.main([str(a) for a in argv]))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err and out == ""
    return err


def test_what_the_user_got_wrong_is_one_line_and_status_two(clips, tmp_path, capsys, monkeypatch):
    real, fake, wide = clips
    text = tmp_path / "notes.txt"
    text.write_text("no clip, no weights")
    assert "two clips" in refused(capsys)
    assert "two clips" in refused(capsys, real)
    assert "nowhere.mp4" in refused(capsys, real, tmp_path / "nowhere.mp4")
    assert "notes.txt" in refused(capsys, text, real)
    error = refused(capsys, real, wide)
    assert "wide.mp4" in error and "32x24" in error and "24x32" in error
    assert "--every 0" in refused(capsys, real, fake, "--every", 0)
    assert "--skip SIM" in refused(capsys, real, fake, "--skip", "SIM")
    assert "--path vgg" in refused(capsys, real, fake, "--path", "vgg=a.pth")
    assert "nowhere.pth" in refused(capsys, real, fake, "--path", f"inception={tmp_path}/nowhere.pth")
    assert "notes.txt" in refused(capsys, real, fake, "--path", f"inception={text}")  # named, so not left out
    assert "notes.txt" in refused(capsys, real, fake, "--expert", text)
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    assert "pip install mediapipe" in refused(capsys, real, fake, "--landmarker", text)
    (tmp_path / "empty").mkdir()
    assert "no clip here" in refused(capsys, tmp_path / "empty", tmp_path / "empty")
    assert "directory" in refused(capsys, tmp_path / "empty", real)
    cache = ("--cache", tmp_path / "cache")
    assert "nowhere.pt" in refused(capsys, "--toy", tmp_path / "nowhere.pt", *cache)
    assert "notes.txt" in refused(capsys, "--toy", text, *cache)
    # A, B, C and the strangers must differ
    assert "--people 5" in refused(capsys, "--toy", text, "--people", 5, *cache)
    assert "nonsense" in refused(capsys, "--toy", text, "--device", "nonsense", *cache)
    assert "nowhere" in refused(capsys, "--toy", text, "--json", tmp_path / "nowhere" / "a.json", *cache)
    model = SimpleNamespace(config=SimpleNamespace(size=32, template="face"))
    monkeypatch.setattr(evaluate, "load_model", lambda path, device, kinds: model)
    assert "real faces" in refused(capsys, "--toy", "some.pt", *cache)
    model.config.template = "toy"
    assert "notes.txt" in refused(capsys, "--toy", "some.pt", "--cache", text / "cache")


# ------------------------------------------------------------------------------------------------------------
# pairs of clips, with judges whose answers are known


def bright(crops):
    """An expert's eye: is the middle frame of five bright?"""
    return torch.stack([torch.where(crops[:, 2].mean((1, 2, 3)) > 0, 1.0, -1.0), torch.ones(len(crops))], 1)


def loud(windows):
    """Its ear: is the middle of the sound loud?"""
    level = windows[:, 0, :, 7:9].amax((1, 2))
    return torch.stack([torch.where(level > (level.min() + level.max()) / 2, 1.0, -1.0), torch.ones(len(windows))], 1)


def all_judges(**others):
    def landmarks(picture, box):  # they hang on the colours
        base = np.random.default_rng(0).uniform(20, 70, (68, 2))
        return base * (1 + picture.mean() / 255)

    landmarks.name = "colours"
    return SimpleNamespace(**(NOBODY | dict(
        sync=SimpleNamespace(template="toy", size=16, face=bright, sound=loud), landmarks=landmarks,
        lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)), inception=lambda x: x.mean((2, 3)),
        arcface=SimpleNamespace(embed=lambda x: torch.nn.functional.normalize(x.mean((2, 3)) + 2, dim=1))) | others))


LIT = np.random.default_rng(9).integers(0, 2, 30).repeat(3)  # which frames are bright, and loud


def talking(late=0, n=90, size=72):
    """Frames (n, size, size, 3) that are bright, and sound (n,) that is loud `late` frames after, where LIT says so"""
    texture = np.random.default_rng(10).integers(0, 40, (n, 9, 9, 3)).repeat(size // 9, 1).repeat(size // 9, 2)
    frames = (60 + 110 * LIT[:n, None, None, None] + texture).astype(np.uint8)
    tone = np.sin(np.arange(640 * n) * 2 * np.pi * 900 / 16000)
    return frames, (tone * np.roll(np.where(LIT, 0.5, 0.003), late)[:n].repeat(640)).astype(np.float32)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    return folder, film(folder / "real.mp4", *talking()), film(folder / "late.mp4", *talking(late=4))


def test_a_clip_against_itself_has_the_values_that_the_table_says(talks):
    _, real, _ = talks
    pair = measure(real, real, all_judges())
    expected = {name: m.itself for name, m in METRICS.items() if m.itself is not None}
    for name in expected.keys() - {"FID", "MS-SSIM"}:  # one is of sets, one of larger pictures
        assert pair["fake"][name] == pytest.approx(expected[name], abs=1e-5), name
    assert frechet_distance(*(w.moments for w in pair["watches"])) == pytest.approx(0, abs=1e-9)
    assert pair["real"].items() <= pair["fake"].items() and {"CPBD", "Sync-D"} <= pair["real"].keys()


def test_the_offset_of_a_clip_whose_sound_is_four_frames_late_is_four(talks):
    _, real, late = talks
    pair = measure(real, late, all_judges())
    assert pair["real"]["Sync offset"] == 0 and pair["fake"]["Sync offset"] == 4
    assert pair["fake"]["Sync-D"] < 0.3 and pair["fake"]["Sync-C"] > 0.3


def test_a_reencoded_clip_stays_near_itself(talks, tmp_path):
    _, real, _ = talks
    again = film(tmp_path / "again.mp4", np.stack(list(read_video(real))), talking()[1])
    fake = measure(real, again, all_judges())["fake"]
    assert fake["SSIM"] > 0.97 and fake["PSNR"] > 35 and fake["L1"] < 0.01 and fake["CSIM"] > 0.999
    assert fake["LMD"] < 0.3 and fake["Sync offset"] == 0


def test_chunks_do_not_show_in_the_numbers(talks, monkeypatch):
    _, real, late = talks
    whole = measure(real, late, all_judges())
    monkeypatch.setattr(evaluate, "CHUNK", 13)
    parts = measure(real, late, all_judges())
    assert parts["fake"] == pytest.approx(whole["fake"], rel=1e-6) and parts["frames"] == whole["frames"] == 90


def test_a_face_is_followed_on_a_line_between_looks_and_a_clip_without_one_says_so(monkeypatch):
    looks = iter([None, [(10, 10, 30, 30, 0.9)], [(20, 10, 40, 30, 0.9)], None])
    monkeypatch.setattr(evaluate, "detect_faces", lambda picture, margins: next(looks))
    watch = Watch(SimpleNamespace(**(NOBODY | dict(follow=True))))
    frames = np.zeros((5, 60, 80, 3), np.uint8)
    watch.shape = (60, 80)
    assert {tuple(b[:4]) for b in watch.follow(frames)} == {(10, 10, 30, 30)}  # nothing at first: the first one found
    np.testing.assert_allclose(watch.follow(frames)[:, 0], [12, 14, 16, 18, 20])
    assert watch.faceless() is None
    np.testing.assert_allclose(watch.follow(frames)[:, 0], 20)  # lost: stays
    monkeypatch.setattr(evaluate, "detect_faces", lambda picture, margins: [])
    for _ in range(2):
        watch.follow(frames)
    assert watch.faceless() == "a face in 2 of 6 frames looked at"
    face = SimpleNamespace(template="face", size=16, face=bright, sound=loud)
    watch = Watch(all_judges(sync=face, follow=True, landmarks=lambda picture, box: None))
    watch.add(frames)
    assert "a face in 0 of 2" in watch.alone(np.zeros(3200, np.float32))[1]["Sync"]
    assert evaluate.between(watch, watch)[1].keys() == {"landmarks", "CSIM"}


def test_what_is_odd_about_a_pair_is_said_and_the_rest_of_the_table_comes(talks, tmp_path, capsys, monkeypatch):
    real, fake = tmp_path / "real", tmp_path / "fake"
    (real / "who").mkdir(parents=True)
    (fake / "who").mkdir(parents=True)
    frames, wav = talking()
    names = "long", "who/mute", "tiny", "small", "broken", "cut", "wide", "alone"
    for name in names:
        (real / f"{name}.mp4").symlink_to(talks[1])
    film(fake / "long.mp4", frames[:60], wav[: 60 * 640])
    film(fake / "who" / "mute.mp4", frames)
    film(fake / "tiny.mov", frames[:3], wav[:1920])
    film(fake / "small.mp4", frames[:, ::2, ::2], wav)
    (fake / "broken.mp4").write_bytes(b"no clip")
    (fake / "cut.mp4").write_bytes(open(talks[1], "rb").read()[:20000])
    film(fake / "wide.mp4", frames[:, :40], wav)
    stand_ins = all_judges(inception=None), {"FID": "no eye"}
    monkeypatch.setattr(evaluate, "judges_at_hand", lambda args, device: stand_ins)
    evaluate.main([str(real), str(fake), "--json", str(tmp_path / "n.json"), "--trained-with", "wav2lip"])
    out = capsys.readouterr().out
    assert "long: 60 frames, the real clip has 90: 60 compared" in out
    assert "who/mute: Sync: has no sound" in out and "4 pairs: MS-SSIM: 72x72 px are too few" in out
    assert "tiny: Sync: too short: 3 frames" in out and "small: resized from 36x36 to 72x72" in out
    for name, reason in dict(broken="is not a", cut="cut", wide="frames are 72x40").items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name}: left out: "))
        assert f"{name}.mp4: " in line and reason in line
    assert f"without a partner: {real / 'alone.mp4'}" in out and "left out: FID: no eye" in out
    assert "4 pairs, 243 frames" in out
    itself, row = printed(out)
    assert row[""] == "fake" and float(row["SSIM"]) > 0.8 and "FID" not in row and float(itself["CPBD"]) >= 0
    report = json.loads((tmp_path / "n.json").read_text())
    assert report["rows"]["fake"]["SSIM"] == pytest.approx(float(row["SSIM"]), abs=6e-4)
    assert report["rows"]["real, against itself"]["PSNR"] == "inf" and report["columns"]["PSNR"]["unit"] == "dB"
    assert [p["name"] for p in report["pairs"]] == sorted(n for n in names if n != "alone")
    assert report["left_out"] == {"FID": "no eye"} and report["versions"]["torch"] == torch.__version__
    alike = [p["fake"]["SSIM"] for p in report["pairs"] if "fake" in p]
    assert report["rows"]["fake"]["SSIM"] == pytest.approx(np.mean(alike))


def test_the_expert_that_trained_must_not_score_in_silence(tmp_path):
    expert = tmp_path / "sync.pt"
    expert.write_bytes(b"weights")
    args = SimpleNamespace(expert=str(expert), trained_with=str(expert))
    lines = evaluate.said(args, all_judges(landmarks=None), {}, [], [], 0)
    assert any("THE ONE THAT SCORES" in line for line in lines)
    args.trained_with = "wav2lip"
    assert not any("THE ONE" in line for line in evaluate.said(args, all_judges(landmarks=None), {}, [], [], 0))


def test_judges_without_weights_are_left_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(evaluate, "EXPERT", tmp_path / "sync.pt")
    args = evaluate.parse(["a.mp4", "b.mp4", "--skip", "CPBD, L1"])
    found, missing = evaluate.judges_at_hand(args, CPU)
    assert not any((found.sync, found.landmarks, found.lpips, found.arcface, found.syncnet, found.inception))
    assert missing.keys() == METRICS.keys() - {"SSIM", "MS-SSIM", "PSNR"}
    assert "vgg16" in missing["LPIPS"] and "2DFAN4" in missing["LMD"] and "sync.pt" in missing["Sync-D"]
    assert "inception" in missing["FID"] and "syncnet_v2" in missing["LSE-D"] and missing["CPBD"] == "--skip"


def test_a_clip_whose_face_is_gone_has_no_landmark_distance_but_a_note_as_for_its_identity(monkeypatch):
    looks = iter([[(10, 10, 30, 30, 0.9)], [(10, 10, 30, 30, 0.9)], [], []])
    monkeypatch.setattr(evaluate, "detect_faces", lambda picture, margins: next(looks))
    watches = Watch(all_judges(follow=True)), Watch(all_judges(follow=True))  # landmarks answers for any box
    for watch in watches:
        watch.add(np.zeros((5, 60, 80, 3), np.uint8))
    values, why = evaluate.between(*watches)
    assert not values and why == dict.fromkeys(("landmarks", "CSIM"), "a face in 0 of 2 frames looked at")


def test_pairs_are_of_the_same_name_and_two_of_one_name_are_refused(tmp_path):
    for name in ("a/x.mp4", "b/x.mpg", "b/.x.mp4", "b/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"clip")
    pairs, alone = evaluate.pairs_of(tmp_path / "a", tmp_path / "b")
    assert [p[0] for p in pairs] == ["x"] and pairs[0][2].name == "x.mpg" and alone == []
    (tmp_path / "b" / "x.avi").write_bytes(b"clip")
    with pytest.raises(InputError, match="same name"):
        evaluate.pairs_of(tmp_path / "a", tmp_path / "b")


def test_names_of_clips_are_the_same_however_their_accents_are_stored(tmp_path):
    for side, name in (("real", "Jos\u00e9.1.mp4"), ("fake", "Jose\u0301.1.mp4")):
        (tmp_path / side).mkdir()
        (tmp_path / side / name).touch()
    pairs, alone = evaluate.pairs_of(tmp_path / "real", tmp_path / "fake")
    assert [name for name, *_ in pairs] == ["Jos\u00e9.1"] and not alone


def test_inception_is_tensorflows_of_2015_under_torchvisions_names():
    torch.manual_seed(0)
    net = checkpoint.freeze(evaluate.Inception())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    s = net.state_dict()
    assert len(s) == 6 * 94 + 2 and s["fc.weight"].shape == (1008, 2048)

    def conv(x, name, stride=1, padding=0):
        y = F.conv2d(x, s[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var, w, b = (s[f"{name}.bn.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
        return torch.relu((y - mean) / (var + 1e-3).sqrt() * w + b)

    def chain(x, name, *pads):  # layers _1, _2 ..
        for k, pad in enumerate(pads, 1):
            x = conv(x, f"{name}_{k}", *(pad if isinstance(pad, list) else [1, pad]))
        return x

    def average(x):  # of the pixels that are there
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)

    def fork(x, name):
        return [conv(x, name + "a", 1, (0, 1)), conv(x, name + "b", 1, (1, 0))]

    row, column = (0, 3), (3, 0)
    picture = torch.rand(1, 3, 90, 75) * 2 - 1
    x = F.interpolate(picture, (299, 299), mode="bilinear", align_corners=False)
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b.branch", "Mixed_5c.branch", "Mixed_5d.branch"):
        x = torch.cat([conv(x, m + "1x1"), chain(x, m + "5x5", 0, 2), chain(x, m + "3x3dbl", 0, 1, 1),
                       conv(average(x), m + "_pool")], 1)  # fmt: skip
    m = "Mixed_6a.branch"
    x = torch.cat([conv(x, m + "3x3", 2), chain(x, m + "3x3dbl", 0, 1, [2, 0]), F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b.branch", "Mixed_6c.branch", "Mixed_6d.branch", "Mixed_6e.branch"):
        double = chain(x, m + "7x7dbl", 0, column, row, column, row)
        x = torch.cat([conv(x, m + "1x1"), chain(x, m + "7x7", 0, row, column), double, conv(average(x), m + "_pool")], 1)
    m = "Mixed_7a.branch"
    long = chain(x, m + "7x7x3", 0, row, column, [2, 0])
    x = torch.cat([chain(x, m + "3x3", 0, [2, 0]), long, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_7b.branch", "Mixed_7c.branch"):
        pooled = average(x) if "7b" in m else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([conv(x, m + "1x1"), *fork(conv(x, m + "3x3_1"), m + "3x3_2"),
                       *fork(chain(x, m + "3x3dbl", 0, 1), m + "3x3dbl_3"), conv(pooled, m + "_pool")], 1)  # fmt: skip
    assert x.shape == (1, 2048, 8, 8)
    torch.testing.assert_close(net(picture), x.mean((2, 3)), rtol=1e-4, atol=1e-4)
