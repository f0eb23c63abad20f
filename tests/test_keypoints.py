"""Audio -> keypoints: landmarks lie on the face, codes are principal components, a frame's sound and codes match."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import faces
import initialise
import keypoints as kp
import landmarks
import syncnet
import toyfaces
from audio import n_frames
from checkpoint import load_checkpoint, save_checkpoint
from control import partial_correlation
from data import Pack, PackWriter
from keypoints import Humans, KeypointDataset, Mouth, Wav2KP, audio_features, normalise, predict
from media import InputError, load_audio, read_video, write_wav
from motion import lip_opening
from syncnet import SyncNet

class OneClipSource:
    """A source with a single clip of given normalised landmarks"""

    def __init__(self, faces):
        self.faces = faces

    def clip(self, c):
        return None, self.faces


def fit_mouth(faces, codes, face_codes=0):
    return Mouth.fit(OneClipSource(faces), [0], codes, face_codes)


@pytest.fixture(scope="module")
def drawn_faces():
    """Normalised landmarks (150, 68, 2): a second each of six toy people"""
    return np.concatenate([kp.ToySource().clip(500 + i)[1][25:50] for i in range(6)])


@pytest.fixture(scope="module")
def mouth(drawn_faces):
    return fit_mouth(drawn_faces, 5)


def write_landmarks(folder, points=None):
    """Writes the landmarks of a pack: points (all frames, 68, 2), by default a face with random jitter"""
    pack = Pack(folder)
    (folder / "landmarks").mkdir()
    lines = [faces.landmarks_header(pack, "fan"), *(dict(source=pack.source(c)) for c in range(len(pack)))]
    (folder / "landmarks" / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if points is None:
        jitter = np.random.default_rng(0).normal(0, 0.02 * pack.size, (int(pack.frame_start[-1]), 68, 2))
        points = toyfaces.compute_landmarks(toyfaces.make_person(1), {}, pack.size) + jitter
    points.astype("<f4").tofile(folder / "landmarks" / "points.bin")
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """20 toy people, a second each, with their sound, true landmarks and frames of a single colour"""
    folder, points = tmp_path_factory.mktemp("toys") / "pack", []
    with PackWriter(folder, 16, "toy") as writer:
        for seed in range(700, 720):
            wav, truth = toyfaces.make_clip_truth(seed, 1.0, toyfaces.make_person(seed))
            colours = np.random.default_rng(seed).integers(0, 256, (25, 1, 1, 3), np.uint8)
            writer.add(colours.repeat(16, 1).repeat(16, 2), wav, f"toy{seed}", f"toyfaces seed {seed}")
            points.append(kp.toy_landmarks(toyfaces.make_person(seed), truth, 16))
    return write_landmarks(folder, np.concatenate(points))


def open_brightness_detector(spec, template):
    """A detector that places the face the farther to the right, the brighter the image is"""
    return lambda frame: toyfaces.compute_landmarks(toyfaces.make_person(1), {}, 16) + (frame.mean() / 255, 0)


@pytest.fixture
def bare_pack(pack, tmp_path):
    """A copy of `pack` without landmarks"""
    return shutil.copytree(pack, tmp_path / "bare", ignore=shutil.ignore_patterns("landmarks"))


def make_network(kind="transformer", seed=3, **options):
    torch.manual_seed(seed)
    if kind == "transformer":
        model = Humans(5, width=16, layers=2, heads=4, look=3, **options).eval()
    else:
        model = dict(lstm=Wav2KP, context=kp.Context)[kind](5, 12, **options).eval()
    if model.target == "heatmaps":
        model.basis.copy_(torch.linalg.qr(torch.randn(40, 5)).Q.T)
    return model


def make_noise(frames, seed=0):
    rng = np.random.default_rng(seed)
    loud = np.repeat(rng.random(frames), 640)
    return (0.3 * loud * rng.uniform(-1, 1, 640 * frames)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ landmarks

@pytest.mark.parametrize("size", [90, 200])
def test_toy_landmarks_lie_on_the_edges_of_the_drawn_lips(size):
    who, state = toyfaces.make_person(4), dict(open=0.9, wide=0.6)
    picture, points = toyfaces.draw(who, state, size).astype(int), toyfaces.compute_landmarks(who, state, size)
    red = toyfaces.blend(who.skin * (0.88, 0.62, 0.62), np.array((208.0, 66, 82)), 0.62)
    y, x = np.nonzero(np.abs(picture - red).max(-1) < 25)
    lips = points[48:60]
    near = (np.abs(x + 0.5 - points[51, 0]) < 0.15 * size) & (y > points[33, 1] + 0.01 * size)  # not the cheeks
    slack = max(1.2, 0.012 * size)
    assert y[near].min() == pytest.approx(lips[:, 1].min(), abs=slack)
    assert y[near].max() + 1 == pytest.approx(lips[:, 1].max(), abs=slack)
    inside = picture[int(points[[62, 66], 1].mean()), int(points[62, 0])]
    assert np.abs(inside - red).max() > 40, "the gap between the inner lips is not red"


def test_each_factor_moves_its_own_landmarks_alone():
    who, still = toyfaces.make_person(7), toyfaces.compute_landmarks(toyfaces.make_person(7), {}, 64)
    assert still.shape == (68, 2) and still.dtype == np.float32
    points = dict(open=[*range(17), *range(48, 68)], blink=range(36, 48), brow=range(17, 27), wide=range(48, 68))
    for factor, own in points.items():
        value = 0.0 if factor == "wide" else 1.0
        moved = np.abs(toyfaces.compute_landmarks(who, {factor: value}, 64) - still).max(1) > 1e-4
        assert moved.any() and not moved[np.setdiff1d(np.arange(68), list(own))].any(), factor
    turned = toyfaces.compute_landmarks(who, dict(roll=13.0), 64)
    eyes = turned[45] - turned[36]
    assert math.degrees(math.atan2(eyes[1], eyes[0])) == pytest.approx(13, abs=1.0)


def test_the_landmarks_run_from_left_to_right_and_lips_clockwise():
    p = toyfaces.compute_landmarks(toyfaces.make_person(3), dict(open=0.8), 100)
    assert (np.diff(p[:17, 0]) > 0).all() and p[8, 1] == p[:17, 1].max()
    assert (np.diff(p[17:27, 0]) > 0).all() and (np.diff(p[31:36, 0]) > 0).all()
    for start, n in ((36, 6), (42, 6), (48, 12), (60, 8)):  # clockwise in a picture: the shoelace sum is positive
        x, y = p[start : start + n].T
        assert (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0, start
    assert p[62, 1] < p[66, 1] and p[51, 1] < p[62, 1] and p[57, 1] > p[66, 1]


def test_the_mesh_of_mediapipe_names_68_different_vertices():
    mesh = faces.MEDIAPIPE_POINTS
    assert len(mesh) == len(set(mesh)) == 68 and max(mesh) < 468
    assert {p for line in kp.LINES for p in line} == set(range(68))


def test_extract_finds_landmarks_in_every_frame_and_continues_after_a_kill(bare_pack, monkeypatch, capsys):
    monkeypatch.setattr(landmarks, "landmark_detector", open_brightness_detector)
    monkeypatch.setattr(landmarks, "smooth", lambda points: points)
    kp.main(["extract", str(bare_pack)])
    assert "20 of 20 clips have landmarks (fan)" in capsys.readouterr().out
    folder, opened = bare_pack / "landmarks", Pack(bare_pack)
    whole, lines = (folder / "points.bin").read_bytes(), (folder / "clips.jsonl").read_bytes().splitlines(True)
    store = faces.Landmarks(opened)
    assert len(store.usable_clips) == 20 and store.detectors == ["fan"] and len(lines) == 21
    expected = toyfaces.compute_landmarks(toyfaces.make_person(1), {}, 16) + (opened.frame(3, 7).mean() / 255, 0)
    np.testing.assert_allclose(store.clip(3)[7], expected, atol=1e-5)
    (folder / "clips.jsonl").write_bytes(b"".join(lines[:8]) + lines[8][:11])  # killed in the middle of a line
    (folder / "points.bin").write_bytes(whole[: int(opened.frame_start[8]) * 544 + 99])
    assert list(faces.Landmarks(opened).usable_clips) == list(range(7)), "finished clips can be used"
    kp.main(["extract", str(bare_pack)])
    assert (folder / "points.bin").read_bytes() == whole
    assert (folder / "clips.jsonl").read_bytes() == b"".join(lines)


def test_only_listed_clips_get_landmarks(bare_pack, tmp_path, monkeypatch):
    monkeypatch.setattr(landmarks, "landmark_detector", open_brightness_detector)
    names = [Pack(bare_pack).identities[c] for c in (2, 13)]
    (tmp_path / "list").write_text("\n".join(names))
    kp.main(["extract", str(bare_pack), "--list", str(tmp_path / "list")])
    assert list(faces.Landmarks(Pack(bare_pack)).usable_clips) == [2, 13]
    assert json.loads((bare_pack / "landmarks" / "clips.jsonl").read_text().splitlines()[1])["reason"] == "not in --list"


def test_two_workers_write_the_same_files_as_one(bare_pack, tmp_path, monkeypatch):
    monkeypatch.setattr(landmarks, "landmark_detector", open_brightness_detector)
    monkeypatch.setattr("media.ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(landmarks, "CLIPS_PER_JOB", 3)
    other = shutil.copytree(bare_pack, tmp_path / "other")
    for folder, workers in ((bare_pack, "1"), (other, "2")):
        kp.main(["extract", str(folder), "--workers", workers])
    for name in ("clips.jsonl", "points.bin"):
        assert (bare_pack / "landmarks" / name).read_bytes() == (other / "landmarks" / name).read_bytes()


def test_a_clip_without_a_face_is_dropped_with_a_reason(bare_pack, monkeypatch):
    folder, opened = bare_pack, Pack(bare_pack)
    face = toyfaces.compute_landmarks(toyfaces.make_person(1), {}, 16)
    blind = {opened.frame(2, k).tobytes() for k in (0, 1)} | {opened.frame(5, k).tobytes() for k in range(25)}

    def detector(spec, template):
        assert (spec, template) == ("fan", "toy")
        return lambda frame: None if frame.tobytes() in blind else face

    monkeypatch.setattr(landmarks, "landmark_detector", detector)
    kp.main(["extract", str(folder), "--landmarks", "fan"])
    store = faces.Landmarks(opened)
    lines = [json.loads(line) for line in open(folder / "landmarks" / "clips.jsonl")][1:]
    assert list(store.usable_clips) == [c for c in range(20) if c != 5]
    assert lines[5]["reason"] == "a face in 0 of 25 frames"
    assert lines[2]["interpolated"] == 2 and store.detectors == ["fan"]
    assert np.isnan(store.clip(5)).all()
    parts = kp.open_source(kp.parse(["train", "--data", str(folder)]))[1]
    assert 5 not in parts["train"] and 6 in parts["train"]
    with pytest.raises(InputError, match="of another pack or detector; --overwrite"):
        kp.main(["extract", str(folder), "--landmarks", "dlib:x"])


def test_missing_landmarks_and_those_of_another_pack_are_refused(pack, tmp_path):
    copy = Pack(shutil.copytree(pack, tmp_path / "pack", ignore=shutil.ignore_patterns("landmarks")))
    with pytest.raises(InputError, match="no landmarks"):
        faces.Landmarks(copy)
    folder, header = copy.folder / "landmarks", dict(format=1, detector="fan", clips=3, frames=9, size=16)
    folder.mkdir()
    (folder / "clips.jsonl").write_text(json.dumps(header) + "\n")
    (folder / "points.bin").write_bytes(b"")
    with pytest.raises(InputError, match="of another pack"):
        faces.Landmarks(copy)


def test_mouth_shape_has_the_opening_and_ignores_position_and_mirroring():
    shut, wide = (toyfaces.compute_landmarks(toyfaces.make_person(2), dict(open=v), 100)[None] for v in (0.0, 1.0))
    a, b = initialise.mouth_features(shut)[0], initialise.mouth_features(wide)[0]
    assert b[0] == pytest.approx(np.mean([wide[0, k, 1] - wide[0, j, 1] for j, k in ((61, 67), (62, 66), (63, 65))]))
    assert a.shape == (42,) and b[0] > a[0] + 3
    np.testing.assert_allclose(initialise.mouth_features(wide + (5, -7))[0], b, atol=1e-4)
    mirror = wide[:, [*range(48), *initialise.MIRROR[48:]]] * (-1, 1)
    np.testing.assert_allclose(initialise.mouth_features(mirror)[0], b, atol=1e-4)
    crooked = wide.copy()
    crooked[0, 48] += (-4, 2)                                                   # one corner: half of it is seen
    assert np.abs(initialise.mouth_features(crooked)[0] - b)[2:].max() < 2.1


# ------------------------------------------------------------------------------------------------- the shape of a mouth

def test_normalisation_removes_position_size_and_rotation_of_the_head(drawn_faces):
    c, s = math.cos(0.3), math.sin(0.3)
    moved = drawn_faces[:25] @ (70 * np.array(((c, s), (-s, c)))) + (31, -8)
    np.testing.assert_allclose(normalise(moved), normalise(drawn_faces[:25]), atol=2e-5)
    left, right = normalise(drawn_faces[:25])[:, 36], normalise(drawn_faces[:25])[:, 45]
    np.testing.assert_allclose(left[:, 1], 0, atol=1e-6)
    np.testing.assert_allclose(left, -right, atol=1e-6)
    assert np.median(right[:, 0] - left[:, 0]) == pytest.approx(1, abs=1e-5)


def test_codes_agree_with_a_singular_value_decomposition(drawn_faces):
    m = fit_mouth(drawn_faces, 5)
    x = drawn_faces[:, 48:].astype(np.float64)
    x = (x - x.mean(1, keepdims=True)).reshape(len(x), -1)
    _, sizes, basis = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs((m.basis * basis[:5]).sum(1)), 1, atol=1e-4)  # the same but for the sign
    error = 1e4 * np.square(m.shapes(m.decode(m.encode(drawn_faces))) - m.shapes(drawn_faces)).mean()
    assert error == pytest.approx(1e4 * (sizes[5:] ** 2).sum() / x.size, rel=1e-3)
    np.testing.assert_allclose(m.scale, sizes[:5] / math.sqrt(len(x)), rtol=1e-3)


def test_forty_codes_reconstruct_the_mouth(drawn_faces):
    m = fit_mouth(drawn_faces, 40)
    np.testing.assert_allclose(m.shapes(m.decode(m.encode(drawn_faces))), m.shapes(drawn_faces), atol=1e-5)


def test_the_opening_is_the_distance_between_the_inner_lips(mouth, drawn_faces):
    true = np.hypot(*(drawn_faces[:, 66] - drawn_faces[:, 62]).T)
    np.testing.assert_allclose(mouth.opening(drawn_faces), true, atol=1e-6)
    assert mouth.opening(mouth.decode(mouth.rest[None]))[0] <= np.quantile(true, 0.1) + 1e-3


def test_a_decoded_face_has_the_mouth_of_its_codes(mouth):
    codes = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32) * mouth.scale
    face = mouth.decode(codes)
    assert face.shape == (7, 68, 2)
    np.testing.assert_allclose(mouth.shapes(face), mouth.mean + codes @ mouth.basis, atol=1e-3)


def test_face_codes_reduce_the_residual_of_the_mouth_codes(drawn_faces, mouth):
    whole = fit_mouth(drawn_faces, 5, face_codes=131)  # 136 codes for 136 coordinates
    np.testing.assert_allclose(whole.decode(whole.encode(drawn_faces)), drawn_faces, atol=2e-3)
    face = fit_mouth(drawn_faces, 5, face_codes=4)
    np.testing.assert_allclose(face.encode(drawn_faces)[:, :5], mouth.encode(drawn_faces), atol=1e-5)
    errors = [np.square(m.decode(m.encode(drawn_faces)) - drawn_faces).mean() for m in (mouth, face, whole)]
    assert errors[0] > 2 * errors[1] > 0 and len(face.scale) == len(face.rest) == 9


def test_displacements_for_the_warp_add_up_to_those_of_the_codes(mouth):
    codes = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32) * mouth.scale
    moves, moved = mouth.moves(), codes - mouth.rest
    opening = lip_opening(mouth.decode(codes)) - lip_opening(mouth.decode(mouth.rest[None]))
    np.testing.assert_allclose(lip_opening(moves), [1, 0, 0, 0, 0, 0], atol=1e-5)
    sum_of_moves = opening[:, None, None] * moves[0] + np.tensordot(moved, moves[1:], 1)
    np.testing.assert_allclose(sum_of_moves, mouth.decode(codes) - mouth.decode(mouth.rest[None]), atol=1e-5)


def test_saving_and_loading_does_not_change_a_mouth(mouth, tmp_path):
    save_checkpoint(tmp_path / "m.pt", dict(kind="x", format=1, mouth=mouth.state()))
    again = Mouth.load(load_checkpoint(tmp_path / "m.pt", "x")["mouth"])
    for name in ("mean", "basis", "scale", "rest", "face"):
        np.testing.assert_array_equal(getattr(again, name), getattr(mouth, name))


# ------------------------------------------------------------------------------------------------ input of the networks

def test_mfcc_windows_agree_with_a_naive_loop():
    features = np.random.default_rng(0).standard_normal((50, 13)).astype(np.float32)
    windows = kp.audio_windows("lstm", features, 0, 13)
    for j in (0, 23, 49):
        for i, s in enumerate(range(j - 20, j + 20)):
            expected = features[s] if 0 <= s < 50 else [math.log(2.220446049250313e-16), *[0] * 12]
            np.testing.assert_allclose(windows[j, i], expected, rtol=1e-6)


def test_windows_are_padded_with_the_mfcc_of_silence():
    features = audio_features("lstm", np.zeros(4000, np.float32))
    np.testing.assert_allclose(features, np.tile(kp.SILENCE, (24, 1)), atol=1e-5)


def test_a_click_in_the_middle_of_a_frame_is_in_the_middle_of_its_windows():
    wav = np.zeros(40 * 640, np.float32)
    wav[20 * 640 + 320] = 0.9  # the middle of frame 20, at 82 steps of 10 ms
    windows = kp.audio_windows("lstm", audio_features("lstm", wav), 20, 21)  # (4, 40, 13)
    centre = [(np.flatnonzero(w[:, 0] > -30) + 0.5).mean() for w in windows]
    np.testing.assert_allclose(centre, np.array((21.25, 20.25, 19.25, 18.25)), atol=0.6)  # 19.75 on average


@pytest.fixture
def source(pack):
    return kp.PackSource(pack)


def test_codes_of_an_lstm_are_interpolated_linearly_to_the_audio_rate(source, mouth, monkeypatch):
    ramp = np.stack((np.arange(6.0), 5 - np.arange(6.0)), 1)
    monkeypatch.setattr(Mouth, "encode", lambda self, faces: ramp)
    monkeypatch.setattr(source, "clip", lambda c: (np.zeros(3840, np.float32), ramp))
    fine = KeypointDataset(source, [0], mouth, "lstm", 5, 0).load_clip(0, False)[1]
    assert fine.shape == (24, 2)
    np.testing.assert_allclose(fine[2:-2, 0], (np.arange(24) / 4 - 0.375)[2:-2], atol=1e-6)
    np.testing.assert_allclose(fine.reshape(6, 4, 2).mean(1)[1:-1], ramp[1:-1], atol=1e-6)


@pytest.mark.parametrize("kind, steps", [("transformer", 1), ("lstm", 4)])
def test_an_item_has_the_sound_of_its_codes_and_depends_on_its_number_alone(source, mouth, kind, steps, monkeypatch):
    monkeypatch.setattr(KeypointDataset, "SILENT", 0.0)
    data = KeypointDataset(source, np.arange(4, 9), mouth, kind, 7, seed=1)
    item, again = data[5], KeypointDataset(source, np.arange(4, 9), mouth, kind, 7, seed=1)[5]
    assert item["codes"].shape == (7 * steps, 5)
    assert item["sound"].shape == ((7, 1, 80, 16) if kind == "transformer" else (28, 40, 13))
    assert item["sound"].dtype == item["codes"].dtype == np.float32
    np.testing.assert_array_equal(item["sound"], again["sound"])
    correlations = []
    for c in range(4, 9):  # the item is a part of one of these clips: the sound belongs to the codes
        features, codes, _ = data.load_clip(c, False)
        for first in range(25 - 7 + 1):
            if np.array_equal(codes[first * steps : (first + 7) * steps], item["codes"]):
                windows = kp.audio_windows(kind, features, first, first + 7)
                correlations.append(np.corrcoef(windows.ravel(), item["sound"].ravel())[0, 1])
    assert len(correlations) == 1 and correlations[0] > 0.9
    assert not np.array_equal(data[6]["codes"], item["codes"])


def test_items_without_speech_have_a_shut_mouth(source, mouth, monkeypatch):
    monkeypatch.setattr(KeypointDataset, "SILENT", 1.0)
    for kind, rows in (("transformer", 3), ("lstm", 12)):
        item = KeypointDataset(source, np.arange(5), mouth, kind, 3, seed=1)[0]
        np.testing.assert_array_equal(item["codes"], np.tile(mouth.rest, (rows, 1)))


def test_frames_after_the_end_of_a_clip_have_no_loss(source, mouth, monkeypatch):
    monkeypatch.setattr(KeypointDataset, "SILENT", 0.0)
    item = KeypointDataset(source, [0], mouth, "transformer", 40, 0)[0]  # the clip has 25 frames
    assert np.isfinite(item["codes"][:25]).all() and np.isnan(item["codes"][25:]).all()
    model = make_network().eval()
    batch = {name: torch.from_numpy(item[name])[None] for name in item}
    loss = model.losses(batch)["position"]
    whole = model.losses(dict(sound=batch["sound"], codes=model(batch["sound"]).detach()))["position"]
    assert whole.item() == 0 and 0 < loss.item() < float("inf")
    batch["codes"][:, :25] = model(batch["sound"])[:, :25].detach()
    assert model.losses(batch)["position"].item() == 0


def test_all_people_of_a_pack_get_the_same_shut_mouth_and_range_of_opening(tmp_path, drawn_faces):
    folder, shapes = tmp_path / "pack", []
    with PackWriter(folder, 16, "toy") as writer:
        for seed, wide, open_ in ((1, 1.0, 1.0), (2, 1.3, 1.6)):
            shapes.append(100 * (drawn_faces[:25] * (wide, 1.0)))  # the second face is wider and opens its mouth farther
            shapes[-1][:, 66, 1] = shapes[-1][:, 62, 1] + open_ * (shapes[-1][:, 66, 1] - shapes[-1][:, 62, 1])
            writer.add(np.zeros((25, 16, 16, 3), np.uint8), np.ones(16000, np.float32), f"p{seed}", f"p{seed}.mp4")
    source = kp.PackSource([write_landmarks(folder, np.concatenate(shapes))])
    openings = [Mouth.opening(source.clip(c)[1]) for c in (0, 1)]
    raw = [Mouth.opening(normalise(points)) for points in shapes]
    assert raw[1].std() > 1.1 * raw[0].std() and np.corrcoef(*raw)[0, 1] > 0.99
    np.testing.assert_allclose(openings[0], openings[1], atol=0.02 * openings[0].max())


def test_every_tenth_person_is_held_out_and_parts_are_disjoint(pack):
    parts = {part: list(clips) for part, clips in kp.open_source(kp.parse(["train", "--data", str(pack)]))[1].items()}
    assert parts["valid"] == [9] and parts["test"] == [19] and len(parts["train"]) == 18
    train, valid, test = (set(clips) for clips in kp.open_source(kp.parse(["train"]))[1].values())
    assert not train & valid and not train & test and not valid & test


# --------------------------------------------------------------------------------------------------------- the networks

NETWORKS = [dict(kind="lstm"), dict(), dict(autoregressive=True), dict(tower=SyncNet(16, 24, 0.25).config),
            dict(target="displacements", words=6), dict(target="heatmaps"),
            dict(kind="lstm", target="heatmaps", words=6), dict(kind="context")]
NETWORK_NAMES = "lstm transformer autoregressive tower displacements heatmaps lstm-heatmaps context".split()


def inputs(model, B=3, T=7, seed=0):
    shape = (B, 4 * T, 40, 13) if model.kind == "lstm" else (B, T, 1, 80, 16)
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", NETWORKS, ids=NETWORK_NAMES)
def test_every_parameter_gets_a_gradient(options):
    model = make_network(**options).train()
    x = inputs(model)
    steps = x.shape[1]
    batch = dict(sound=x, codes=torch.randn(3, steps, 5), labels=torch.arange(3 * steps).reshape(3, steps) % 6)
    sum(model.losses(batch).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_displacements_start_from_a_shut_mouth_and_in_training_from_the_true_one():
    model = make_network(target="displacements")
    model.rest.copy_(torch.arange(5.0))
    h = torch.randn(2, 6, 16)
    codes = model.decode(h)
    steps = kp.CHANGE_SCALE * (model.out(h) * model.scale)
    torch.testing.assert_close(codes[:, 0], model.rest + steps[:, 0])
    torch.testing.assert_close(codes.diff(dim=1), steps[:, 1:])
    x = inputs(model)
    shifted = model(x) + torch.randn(3, 1, 5)  # the same motion from another start: no error
    assert model.losses(dict(sound=x, codes=shifted))["position"].item() < 1e-6


def test_points_are_centres_of_mass_of_heat_maps_and_true_maps_have_the_least_loss():
    model = make_network(target="heatmaps")
    model.spacing.copy_(0.01 * (1 + torch.rand(20, 2)))
    true = 0.02 * torch.randn(1, 2, 5)
    points = (true @ model.basis).unflatten(-1, (20, 2)) / model.spacing
    assert points.abs().max() < 3, "well inside the maps"
    cells = torch.arange(8) - 3.5
    rows, columns = (-0.5 * (points[..., i, None] - cells) ** 2 for i in (1, 0))
    logits = (rows[..., None] + columns[..., None, :]).flatten(3)  # (1, 2, 20, 64)
    model.out = torch.nn.Identity()
    assert (model.decode(logits.flatten(2)) - true).abs().max() < 2e-3
    model.encode = lambda sound: sound
    loss = {k: model.losses(dict(sound=(logits + k * torch.randn(logits.shape)).flatten(2), codes=true))["maps"].item()
            for k in (0, 0.3)}
    bell = logits.softmax(-1)
    assert loss[0] < loss[0.3] and loss[0] == pytest.approx(-(bell * bell.log()).sum(-1).mean().item(), rel=1e-3)


def test_the_loss_of_words_ignores_frames_without_a_word():
    model = make_network(words=6)
    x, labels = inputs(model), torch.full((3, 7), kp.UNKNOWN)
    labels[1, 2] = 4
    loss = model.losses(dict(sound=x, codes=torch.zeros(3, 7, 5), labels=labels))["words"]
    torch.testing.assert_close(loss, -model.words(model.encode(x))[1, 2].log_softmax(0)[4])


@pytest.mark.parametrize("options", NETWORKS, ids=NETWORK_NAMES)
def test_clips_of_a_batch_do_not_depend_on_each_other(options):
    model = make_network(**options)
    x = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_a_frame_depends_on_frames_within_the_reach_alone():
    model = make_network()
    x = inputs(model, B=1, T=23).requires_grad_()
    model(x)[0, 11].sum().backward()
    used = x.grad[0].abs().sum((1, 2, 3)) > 0
    assert model.reach == 6 and used.nonzero().ravel().tolist() == list(range(5, 18))


def test_an_autoregressive_frame_depends_on_earlier_frames_and_not_on_later_ones():
    model = make_network(autoregressive=True)
    h = torch.randn(1, 9, 16, requires_grad=True)
    model.decode(h)[0, 4].sum().backward()
    assert (h.grad[0].abs().sum(1) > 0).tolist() == [True] * 5 + [False] * 4


@pytest.mark.parametrize("options", NETWORKS, ids=NETWORK_NAMES)
def test_prediction_in_chunks_equals_prediction_in_one_pass(options):
    model, wav = make_network(**options), make_noise(37)
    whole = predict(model, wav, "cpu", chunk=1000)
    assert whole.shape == (37, 5)
    np.testing.assert_allclose(predict(model, wav, "cpu", chunk=8), whole, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 639, 960, 16000, 24321])
def test_there_are_as_many_codes_as_frames(samples):
    for options in NETWORKS[:2]:
        assert predict(make_network(**options), np.zeros(samples, np.float32), "cpu").shape == (n_frames(samples), 5)


def test_the_loss_is_the_mean_square_of_coordinates_and_of_their_velocities(mouth):
    rng = np.random.default_rng(0)
    codes, true = (rng.standard_normal((3, 6, 5)).astype(np.float32) * mouth.scale for _ in range(2))
    a, b = (x.astype(np.float64) @ mouth.basis for x in (codes, true))
    terms = kp.keypoint_loss(torch.from_numpy(codes), torch.from_numpy(true))
    assert terms["position"].item() == pytest.approx(1e4 * ((a - b) ** 2).mean(), rel=1e-4)
    moves = np.diff(a, axis=1) - np.diff(b, axis=1)
    assert terms["velocity"].item() == pytest.approx(1e4 * (moves**2).mean(), rel=1e-4)
    fine = kp.keypoint_loss(torch.from_numpy(codes), torch.from_numpy(true), rate=4)
    assert fine["velocity"].item() == pytest.approx(16 * terms["velocity"].item(), rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- scores

def test_the_score_is_the_error_of_the_mouth_in_both_units(mouth, drawn_faces):
    true = drawn_faces[:25]
    same = kp.score([(true, true)])
    assert same["mse"] == same["relative"] == 0 and same["r"] == same["jaw"] == pytest.approx(1)
    wide = true.copy()
    wide[:, 48:] = 1.1 * (true[:, 48:] - true[:, 48:].mean(1, keepdims=True)) + 7  # the position does not count
    scores = kp.score([(wide, true)])
    assert scores["relative"] == pytest.approx(0.01, rel=1e-3)
    assert scores["mse"] == pytest.approx(1e4 * np.square(0.1 * mouth.shapes(true)).mean(), rel=1e-3)
    raised = true.copy()
    raised[:, 17:27, 1] *= -1
    assert kp.score([(raised, true)])["brows"] == pytest.approx(-1) and kp.score([(raised, true)])["mse"] == 0


def test_a_partial_correlation_is_that_of_residuals_of_least_squares():
    rng = np.random.default_rng(0)
    profile, a, b = rng.random(60), rng.random(70), rng.random(70)
    a[:60], b[:60] = a[:60] + 5 * profile, b[:60] + 0.5 * a[:60] + 3 * profile
    A = np.stack((profile, np.ones(60)), 1)
    residuals = [x[:60] - A @ np.linalg.lstsq(A, x[:60], rcond=None)[0] for x in (a, b)]
    assert partial_correlation(a, b, profile) == pytest.approx(np.corrcoef(*residuals)[0, 1], abs=1e-9)
    assert partial_correlation(3 * profile + 2, b[:60], profile) == pytest.approx(0, abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- visemes

@pytest.fixture(scope="module")
def cut_pack(tmp_path_factory):
    """A pack of two clips of 40 frames, cut from a video at frames 0 and 25"""
    folder = tmp_path_factory.mktemp("cut")
    with PackWriter(folder / "pack", 16, "toy") as writer:
        for begin in (0, 25):
            writer.add(np.zeros((40, 16, 16, 3), np.uint8), make_noise(40, begin), f"p{begin}", f"videos/a.mp4#{begin}")
    return write_landmarks(folder / "pack")


def test_word_times_are_read_and_damaged_ones_refused(cut_pack, tmp_path):
    source = kp.PackSource(cut_pack, tmp_path)
    with pytest.raises(InputError, match="no such file"):
        source.alignment(0)
    (tmp_path / "a.align").write_text("0 23750 sil\n23750 29500 bin\n29500 90000 sil\n")
    assert source.alignment(0) == [(0, 0.95, "sil"), (0.95, 1.18, "bin"), (1.18, 3.6, "sil")]
    np.testing.assert_allclose([row[:2] for row in source.alignment(1)], [(-0.05, 0.18), (0.18, 2.6)], atol=1e-9)
    (tmp_path / "a.align").write_text("0 23750 sil\nnot two\n")
    with pytest.raises(InputError, match="a.align: expected lines"):
        source.alignment(0)


def test_the_alignment_of_a_toy_clip_fits_its_mouth():
    times = kp.ToySource().alignment(9)
    assert times[0][0] == 0 and times[-1][1] >= 3.0
    assert all(a[1] == pytest.approx(b[0]) for a, b in zip(times, times[1:]))
    opening = toyfaces.make_clip_truth(9, 3.0, toyfaces.make_person(9))[1][:, toyfaces.FACTORS.index("open")]
    long = [row for row in times if row[2] in ("a", "sil") and row[1] - row[0] > 0.15 and row[1] < 3]
    assert {"a", "sil"} == {name for *_, name in long}
    for start, end, name in long:
        middle = opening[round((start + end) / 2 * 25 - 0.5)]
        assert middle > 0.7 if name == "a" else middle < 0.1, (start, name)


class Spoken:
    """Two clips in which "up" raises the codes linearly from 0 to 1 and "down" lowers them, each for any duration"""

    times = [[(0.0, 0.4, "up"), (0.4, 1.2, "down")], [(0.0, 0.8, "down"), (0.8, 1.6, "up")]]

    def alignment(self, i):
        return self.times[i]

    def clip(self, i):
        return None, i


class LinearMouth:
    """A mouth whose codes follow the words of Spoken"""

    rest = np.full(5, -1.0, np.float32)

    def encode(self, i):
        t = (np.arange(40) + 0.5) / 25
        edges = [0.0, *(end for _, end, _ in Spoken.times[i])]
        values = [0, 1, 0] if i == 0 else [1, 0, 1]
        return np.interp(t, edges, values)[:, None] * np.ones((1, 5))


def test_visemes_are_mean_motions_and_stretch_to_any_length():
    table = kp.fit_visemes(Spoken(), [0, 1], LinearMouth())
    assert list(table) == ["down", "up"]
    assert table["up"].shape == table["down"].shape == (2, 8, 5)
    phases = (np.arange(8) + 0.5) / 8
    np.testing.assert_allclose(table["up"].mean(0)[:, 2], phases, atol=0.03)  # 25 frames/s round the corners
    np.testing.assert_allclose(table["down"].mean(0)[:, 0], 1 - phases, atol=0.03)
    codes = kp.viseme_codes(table, [(0.0, 2.0, "up"), (2.0, 2.4, "what"), (2.6, 3.0, "down")], 80, LinearMouth.rest)
    assert codes.shape == (80, 5)
    np.testing.assert_allclose(codes[4:46, 1], (np.arange(4, 46) + 0.5) / 50, atol=0.03)
    assert (codes[50:65] == -1).all() and (codes[75:] == -1).all(), "at rest without a known word"
    assert codes[65:75, 0].tolist() == sorted(codes[65:75, 0], reverse=True)


def test_the_picture_of_visemes_shows_every_word_with_its_mean(cut_pack, tmp_path):
    (tmp_path / "a.align").write_text("0 5000 sil\n5000 20000 bin\n20000 25000 sil\n25000 70000 blue\n")
    (tmp_path / "list").write_text("p0\np25\n")
    command = ["visemes", "--data", str(cut_pack), "--out", str(tmp_path / "v.png")]
    with pytest.raises(InputError, match="need --words"):
        kp.main(command)
    kp.main([*command, "--words", str(tmp_path)])
    picture = np.asarray(Image.open(tmp_path / "v.png")).astype(int)
    assert picture.shape == (64, 4 * 5 * 64, 3)  # bin, blue, sil
    red = (picture[..., 0] > picture[..., 1] + 60).reshape(64, 4, 5, 64).any((0, 3))
    assert red.tolist() == [[False, True, True, True, True]] * 3 + [[False] * 5]


# ----------------------------------------------------------------------------------------------------------- end to end

SMALL_RUN = "--batch 3 --codes 5 --device cpu".split()


@pytest.fixture(autouse=True, scope="module")
def validate_in_every_step():
    """and save in every second step; networks have 16 channels"""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Humans", "Wav2KP"):
            patch.setattr(kp, name, partial(getattr(kp, name), width=16))
        patch.setattr(kp, "VALIDATE_EVERY", 1)
        patch.setattr(kp, "SAVE_EVERY", 2)
        yield


def run_training(pack, out, *options):
    """Trains a network -> the checkpoint that --resume loads"""
    kp.main(["train", "--data", str(pack), "--out", str(out), *SMALL_RUN, *options])
    return load_checkpoint(out.with_stem(f"{out.stem}_last"), "keypoints")


@pytest.fixture(scope="module")
def checkpoint(pack, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "kp.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kp, "VALIDATE_EVERY", 4)
        patch.setattr(kp, "SAVE_EVERY", 16)
        run_training(pack, out, "--steps", "40", "--lr", "0.01")
    return out


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_four_steps_equal_two_steps_and_two_resumed_steps(pack, tmp_path, model, monkeypatch):
    options, save_run = ["--model", model, "--steps", "4"], kp.save_run
    whole = run_training(pack, tmp_path / "whole.pt", *options)

    def save_and_die(path, *content):
        save_run(path, *content)
        raise KeyboardInterrupt

    monkeypatch.setattr(kp, "save_run", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_training(pack, tmp_path / "half.pt", *options)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "half_last.pt", "keypoints")["step"] == 2
    resume = ["train", "--out", str(tmp_path / "half.pt"), "--steps", "4", "--resume"]
    with pytest.raises(InputError, match="cannot change --codes"):
        kp.main([*resume, "--codes", "6"])
    kp.main(resume)  # restores other options
    resumed = load_checkpoint(tmp_path / "half_last.pt", "keypoints")
    assert [t["mse"] for t in whole["top"]] == [t["mse"] for t in resumed["top"]]
    for name, p in whole["networks"]["last"].items():
        assert torch.equal(p, resumed["networks"]["last"][name]), name


def test_training_reduces_the_error_and_evaluate_prints_it(pack, checkpoint, capsys):
    lines = [json.loads(line) for line in open(checkpoint.with_name("log_kp.jsonl"))]
    assert lines[0]["args"]["steps"] == 40 and "revision" in lines[0]
    scores = [line["mse"] for line in lines if "mse" in line]
    mouth = kp.load_keypoints(checkpoint, "cpu")[1]
    mean_mouth = kp.baselines(mouth, {}, kp.PackSource(pack), [9])["mean mouth"]["mse"]
    assert min(scores) < 0.8 * mean_mouth and lines[-1]["best"] == min(scores)
    capsys.readouterr()
    kp.main(["evaluate", str(checkpoint), "--data", str(pack)])
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    assert cells[0][1:] == ["mse", "relative", "r", "residual", "jaw", "brows", "silence"]
    rows = {name.replace(f"{checkpoint} (transformer, components)", "kp"): values for name, *values in cells}
    assert float(rows["PCA, 5 codes"][0]) < float(rows["kp, average"][0]) < float(rows["mean mouth"][0])
    assert float(rows["PCA, 5 codes"][2]) > 0.98
    assert float(rows["kp, best"][6]) > 0 and rows["mean mouth"][6] == ""


def test_sample_writes_a_video_and_numbers_as_long_as_the_sound(checkpoint, tmp_path):
    for frames, samples in ((1, 500), (31, 31 * 640 + 300)):
        write_wav(tmp_path / "s.wav", make_noise(32)[:samples])
        out = tmp_path / f"{frames}.mp4"
        kp.main(["sample", str(tmp_path / "s.wav"), "--weights", str(checkpoint), "--out", str(out)])
        video, keypoints = list(read_video(out)), np.load(out.with_suffix(".npy"), allow_pickle=False)
        assert len(video) == frames and keypoints.shape == (frames, 68, 2) and keypoints.dtype == np.float32
        assert video[0].shape == (256, 256, 3) and video[0].std() > 10
    assert len(load_audio(out)) >= 31 * 640


def test_the_shipped_weights_shut_the_mouth_in_silence_and_open_it_in_speech():
    path = Path(kp.__file__).parent / "weights" / "keypoints.pt"
    if not path.is_file():
        pytest.skip("no keypoint weights are shipped")
    model, mouth = kp.load_keypoints(path, "cpu")
    shut = mouth.opening(mouth.decode(mouth.rest[None]))[0]
    speech = load_audio(Path(kp.__file__).parent / "examples" / "speech.wav")
    spoken = mouth.opening(mouth.decode(predict(model, speech, "cpu")))
    for seed, level in ((0, 0.0), (1, 0.0005)):
        room = level * np.random.default_rng(seed).standard_normal(32000)
        still = mouth.opening(mouth.decode(predict(model, room.astype(np.float32), "cpu")))
        assert still.max() < shut + 0.02 and spoken.max() > shut + 0.05


def test_a_file_has_the_best_weights_and_the_mean_of_the_ten_best_in_fp16(checkpoint):
    top = load_checkpoint(checkpoint.with_stem("kp_last"), "keypoints")["top"]
    small = load_checkpoint(checkpoint, "keypoints")
    assert [t["mse"] for t in top] == sorted(t["mse"] for t in top) and len(top) == 10
    assert "args" not in small, "the weights name no folder of this machine"
    for name, p in small["networks"]["average"].items():
        expected = torch.stack([t["state"][name] for t in top]).mean(0)
        torch.testing.assert_close(p, expected.half(), rtol=0, atol=0)
        assert torch.equal(small["networks"]["best"][name], top[0]["state"][name].half())
    default, average = (kp.load_keypoints(checkpoint, "cpu", which)[0] for which in (None, "average"))
    assert all(torch.equal(p, q) for p, q in zip(default.parameters(), average.parameters()))


def make_noise_pack(folder, seeds, size=16, T=10):
    """A pack with landmarks and a clip of noise for each seed"""
    with PackWriter(folder, size, "toy") as writer:
        for seed in seeds:
            writer.add(np.zeros((T, size, size, 3), np.uint8), make_noise(T, seed), f"p{seed}", f"{seed}")
    return write_landmarks(folder)


def test_networks_are_tested_on_clips_that_none_of_them_used(tmp_path):
    pack = make_noise_pack(tmp_path / "pack", range(20))
    larger_pack = make_noise_pack(tmp_path / "larger", [50, *range(20), 51, 52], 32)
    run_training(pack, tmp_path / "kp.pt", "--steps", "2")
    (tmp_path / "list").write_text("p19\np0\n")
    lists = ["--train", str(tmp_path / "list"), "--steps", "2"]
    run_training(pack, tmp_path / "other.pt", *lists)  # of the 18 other people, every other one validates

    def tested(data, *paths):
        args = kp.parse(["evaluate", *map(str, paths), "--data", str(data)])
        source, parts = kp.open_source(args, {path: load_checkpoint(path, "keypoints") for path in paths})
        return {part: [source.pack.source(c) for c in clips] for part, clips in parts.items()}

    assert tested(pack, tmp_path / "kp.pt")["test"] == ["19"] and tested(pack, tmp_path / "kp.pt")["valid"] == ["9"]
    assert tested(larger_pack, tmp_path / "kp.pt")["test"] == ["50", "19", "51", "52"]
    both = tested(larger_pack, tmp_path / "kp.pt", tmp_path / "other.pt")
    assert both["test"] == ["50", "51", "52"] and both["train"] == ["0"]
    with pytest.raises(InputError, match="no clip with landmarks is left to test on"):
        tested(pack, tmp_path / "kp.pt", tmp_path / "other.pt")


def test_words_need_clips_that_were_cut_from_a_video(pack):
    with pytest.raises(InputError, match="clip 'toyfaces seed 700' is not cut from a video"):
        kp.main(["visemes", "--data", str(pack), "--words", ".", "--out", "u.png"])


def test_words_of_a_pack_are_labels_of_its_frames(cut_pack, tmp_path, mouth, monkeypatch):
    monkeypatch.setattr(KeypointDataset, "SILENT", 0.0)
    (tmp_path / "a.align").write_text("0 5000 sil\n5000 20000 bin\n20000 25000 sil\n25000 70000 blue\n")
    source, words = kp.PackSource(cut_pack, tmp_path), dict(bin=0, blue=1)
    expected = [kp.UNKNOWN] * 5 + [0] * 15 + [kp.UNKNOWN] * 5 + [1] * 15  # .2, .6, .2 s
    for kind, rate in (("transformer", 1), ("lstm", 4)):
        item = KeypointDataset(source, [0], mouth, kind, 40, 0, words)[3]
        assert item["labels"].tolist() == np.repeat(expected, rate).tolist()
        monkeypatch.setattr(KeypointDataset, "SILENT", 1.0)
        assert set(KeypointDataset(source, [0], mouth, kind, 4, 0, words | dict(sil=7))[0]["labels"]) == {7}
        monkeypatch.setattr(KeypointDataset, "SILENT", 0.0)
        assert "labels" not in KeypointDataset(source, [0], mouth, kind, 40, 0)[3]
    (tmp_path / "a.align").write_text("\n")
    with pytest.raises(InputError, match="a.align: no words in it"):
        source.alignment(0)


@pytest.mark.parametrize("options", [["--phones", "--face"], ["--target", "heatmaps"], ["--target", "displacements"]])
def test_every_target_and_head_can_be_trained_and_evaluated(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kp, "TOY_CLIPS", dict(train=range(40, 44), valid=range(44, 45), test=range(45, 46)))
    out = tmp_path / "kp.pt"
    kp.main(["train", "--out", str(out), *SMALL_RUN, "--steps", "2", *options])
    kp.main(["evaluate", str(out)])
    assert "visemes, true timing" in capsys.readouterr().out
    model, mouth = kp.load_keypoints(out, "cpu")
    assert len(mouth.scale) == (13 if "--face" in options else 5)
    assert (model.config["words"] > 5) == ("--phones" in options)
    if model.target != "components":
        torch.testing.assert_close(model.rest, torch.from_numpy(mouth.rest), rtol=1e-3, atol=1e-4)


def test_a_network_with_an_experts_tower_is_not_tested_on_clips_of_the_expert(tmp_path):
    folder = make_noise_pack(tmp_path / "pack", range(40))
    small_run = "--size 16 --steps 1 --batch 2 --windows 6 --dim 8 --width 0.25 --device cpu".split()
    (tmp_path / "list").write_text("p19\n")
    lists = ["--train", str(tmp_path / "list"), "--valid", str(tmp_path / "list2")]
    (tmp_path / "list2").write_text("p29\n")
    syncnet.main(["train", "--data", str(folder), "--out", str(tmp_path / "sync.pt"), *small_run, *lists])
    expert = Pack(folder).fingerprints[[19, 29]]
    tuned = run_training(folder, tmp_path / "kp.pt", "--expert", str(tmp_path / "sync.pt"), "--finetune", "--steps", "2")
    assert torch.isin(expert, tuned["clips"]["train"]).all()
    args = kp.parse(["evaluate", "x", "--data", str(folder)])
    assert kp.open_source(args, {"kp.pt": tuned})[1]["test"].tolist() == [39]


@pytest.mark.parametrize("lips", [False, True])
def test_an_experts_tower_is_copied_and_changes_only_with_finetune(pack, tmp_path, lips):
    torch.manual_seed(0)
    expert = SyncNet(16, 24, 0.25, lips)
    config, networks = dict(net=expert.config, template="toy"), dict(expert=expert.state_dict())
    clips = {part: torch.zeros(0, dtype=torch.int64) for part in ("train", "valid")}  # its clips are in no pack here
    save_checkpoint(tmp_path / "sync.pt", dict(kind="syncnet", format=1, config=config, networks=networks, clips=clips))
    tower = expert.sound_tower.state_dict()
    unchanged = {}
    for name, extra in (("frozen", []), ("tuned", ["--finetune"])):
        saved = run_training(pack, tmp_path / f"{name}.pt", "--expert", str(tmp_path / "sync.pt"), "--steps", "2", *extra)
        last = saved["networks"]["last"]
        unchanged[name] = all(torch.equal(last[f"front.tower.sound_tower.{key}"], p) for key, p in tower.items())
    assert unchanged == dict(frozen=True, tuned=False)


def test_a_photo_is_moved_by_the_keypoints_and_keeps_its_mouth_in_silence(tmp_path, monkeypatch):
    root, box = Path(kp.__file__).parent, tuple(float(v) for v in kp.photos.EXAMPLE_BOX.split(","))
    monkeypatch.setattr(kp.photos, "find_photo_face", lambda photo, options, template: (photo, box, "by hand"))
    photo, changes = root / "examples" / "astronaut.jpg", {}
    for name, wav in (("speech", load_audio(root / "examples" / "speech.wav")[:24000]), ("silence", np.zeros(6400))):
        write_wav(tmp_path / f"{name}.wav", wav.astype(np.float32))
        out = tmp_path / f"{name}.mp4"
        kp.main(["sample", str(tmp_path / f"{name}.wav"), "--photo", str(photo), "--out", str(out)])
        frames = np.stack(list(read_video(out))).astype(int)
        assert len(frames) == n_frames(len(wav))
        changes[name] = np.abs(frames - frames[0]).max(-1).max(0)  # (H, W)
    assert changes["silence"][280:].max() < 40, "below the eyes only the codec changes pixels"
    assert changes["speech"][280:].max() > 80 and (changes["speech"] > 60).mean() < 0.05, "only the mouth moves"


def test_a_clip_is_shown_as_a_picture(pack, checkpoint, tmp_path):
    kp.main(["show", str(checkpoint), "--data", str(pack), "--out", str(tmp_path / "a.png")])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (3 * (112 + 18) + 200, 1008, 3) and all(part.std() > 5 for part in np.array_split(sheet, 5))
    with pytest.raises(InputError, match="has clips 0 to 0"):
        kp.main(["show", str(checkpoint), "--data", str(pack), "--clip", "1", "--out", str(tmp_path / "b.png")])


@pytest.mark.parametrize("command, message", [
    ("sample nothing.wav", "nothing.wav: no such file"),
    ("sample good.wav --out there.mp4", "exists; give --overwrite"),
    ("sample good.wav --out new.avi", "must end in .mp4"),
    ("sample good.wav --weights words.txt", "damaged, cut short"),
    ("sample good.wav --weights other.pt", "is a 'syncnet' checkpoint"),
    ("sample good.wav --weights empty.pt", "do not fit this version"),
    ("train --expert x.pt --model lstm", "need --model transformer"),
    ("train --finetune", "needs an --expert"),
    ("train --target heatmaps --face", "need components"),
    ("train --phones --data nowhere", "need --words"),
    ("sample good.wav --photo words.txt", "words.txt"),
    ("train --data nowhere", "nowhere"),
    ("train --out there.mp4", "exists"),
    ("train --test words.txt", "lists clips of --data, which is not given"),
    ("extract nowhere", "nowhere"),
    ("train --resume --out nothing.pt", "nothing_last.pt: no such file"),
    ("show other.pt", "is a 'syncnet' checkpoint"),
    ("evaluate words.txt", "damaged, cut short"),
])
def test_user_errors_are_one_line(command, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.mp4").write_text("old")
    (tmp_path / "words.txt").write_text("no sound at all")
    write_wav(tmp_path / "good.wav", make_noise(3))
    save_checkpoint(tmp_path / "other.pt", dict(kind="syncnet", format=1))
    save_checkpoint(tmp_path / "empty.pt", dict(kind="keypoints", format=1, networks={}))
    arguments = command.split()
    if arguments[0] == "sample" and "--weights" not in arguments:
        arguments += ["--weights", str(checkpoint)]
    with pytest.raises(InputError, match=message.replace(".", r"\.").replace("(", r"\(")) as error:
        kp.main(arguments)
    assert "\n" not in str(error.value)
    assert (tmp_path / "there.mp4").read_text() == "old" and not (tmp_path / "keypoints.mp4").exists()
