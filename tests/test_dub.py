"""dub.py: lips open by the target opening, other pixels and frames without a face stay unchanged."""

import itertools

import numpy as np
import pytest
import torch

import dub
import landmarks
import sample
from fusion import load_model
from landmarks import find_landmarks, load_landmarks, track_landmarks
from media import InputError, load_photo, read_video, write_video, write_wav
from motion import lip_opening
from sample import EXAMPLE_PHOTO, FACE_WEIGHTS, compute_ahead
from warp import Face, Warp

T = 40
SOURCE_OPENING = 0.12 * (1 - np.cos(2 * np.pi * np.arange(T) / 13)) / 2
BOX = (67, 65, 191, 189)  # of the face in the photo at 256 px


@pytest.fixture(scope="module")
def net():
    return load_landmarks()


@pytest.fixture(scope="module")
def moves():
    return load_model(FACE_WEIGHTS, torch.device("cpu")).motion.moves.double().numpy()


@pytest.fixture(scope="module")
def clip(tmp_path_factory, net, moves):
    """The example photo, moved by warp.py: a clip of 256 px whose mouth opens by SOURCE_OPENING, with its head at rest"""
    from PIL import Image

    photo = np.array(Image.fromarray(load_photo(EXAMPLE_PHOTO)).resize((256, 256), Image.Resampling.LANCZOS))
    warp = Warp(Face(photo, find_landmarks(net, photo, BOX), net.solid.double().numpy()), moves)
    path = tmp_path_factory.mktemp("dub") / "clip.mp4"
    write_video(path, map(warp, SOURCE_OPENING), T, np.zeros(640 * T, np.float32))
    return path


def find_at_box(patch):
    """Replaces the face detector by the box of the clip's face"""
    patch.setattr(landmarks, "detect_faces", lambda frame: [(*BOX, 0.9)])
    patch.setattr(landmarks, "face_box", lambda faces, template, number: BOX)


@pytest.fixture(autouse=True)
def detector(monkeypatch):
    find_at_box(monkeypatch)


@pytest.fixture(scope="module")
def take(clip, net, moves):
    with pytest.MonkeyPatch.context() as patch:
        find_at_box(patch)
        return dub.find_takes(clip, net, moves, T)[1][0]


def dubbed(path, net, moves, opening):
    count, takes = dub.find_takes(path, net, moves, len(opening))
    jobs = dub.frame_jobs(path, takes, count, opening, np.zeros((len(opening), len(moves) - 1)))
    return takes, list(compute_ahead(jobs))


def openings(net, frames):
    points = track_landmarks(net, frames, BOX)
    return lip_opening(points) / np.linalg.norm(points[0, 45] - points[0, 36])


def test_lips_follow_the_target_opening_and_not_the_source(clip, net, moves):
    target = 0.10 * (1 - np.cos(2 * np.pi * np.arange(T) / 7)) / 2
    takes, frames = dubbed(clip, net, moves, target)
    assert len(takes) == 1 and len(frames) == T and frames[0].dtype == np.uint8
    assert np.corrcoef(takes[0].opening, SOURCE_OPENING)[0, 1] > 0.97
    measured = openings(net, frames)
    assert np.corrcoef(measured, target)[0, 1] > 0.93
    assert abs(np.corrcoef(measured, SOURCE_OPENING)[0, 1] - np.corrcoef(target, SOURCE_OPENING)[0, 1]) < 0.15


def test_silence_shuts_the_mouth_and_other_pixels_stay_bit_for_bit(clip, net, moves):
    _, frames = dubbed(clip, net, moves, np.zeros(T))
    before = openings(net, list(read_video(clip)))
    assert openings(net, frames).std() < 0.25 * before.std()
    for frame, source in zip(frames, read_video(clip)):
        assert np.array_equal(frame[:110], source[:110]) and np.array_equal(frame[:, :30], source[:, :30])
        assert not np.array_equal(frame[150:190], source[150:190])


def test_a_clip_shorter_than_the_sound_starts_again(clip, net, moves):
    takes, frames = dubbed(clip, net, moves, np.zeros(T + 5))
    assert sum(take.T for take in takes) == T and len(frames) == T + 5
    np.testing.assert_array_equal(frames[T + 3], frames[3])


def test_frames_of_a_scene_without_a_face_stay_unchanged(clip, net, moves, tmp_path, monkeypatch):
    frames, path = list(read_video(clip)), tmp_path / "cut.mp4"
    blank = np.full((256, 256, 3), 230, np.uint8)
    write_video(path, iter([*frames[:20], *[blank] * 20, *frames[20:]]), 60, np.zeros(640 * 60, np.float32))
    monkeypatch.setattr(landmarks, "detect_faces", lambda frame: [(*BOX, 0.9)] if frame.std() > 10 else [])
    takes, out = dubbed(path, net, moves, np.zeros(60))
    assert [(int(take.first), take.T) for take in takes] == [(0, 20), (40, 20)]
    assert not any(fade for take in takes for fade in take.fades), "takes do not fade at a cut"
    for k, (frame, source) in enumerate(zip(out, read_video(path))):
        assert np.array_equal(frame, source) == (20 <= k < 40)


def test_frames_before_the_first_detection_are_tracked_backwards(clip, net, moves, monkeypatch):
    answers = itertools.chain([[]], itertools.repeat([(*BOX, 0.9)]))   # nothing in frame 0, a face in frame 5
    monkeypatch.setattr(landmarks, "detect_faces", lambda frame: next(answers))
    takes = dub.find_takes(clip, net, moves, T)[1]
    assert [(take.first, take.T) for take in takes] == [(0, T)]
    assert np.corrcoef(takes[0].opening, SOURCE_OPENING)[0, 1] > 0.97


def test_shut_frames_belong_to_the_take_and_have_shut_lips(take):
    assert all(take.opening[k] < 0.04 for k in take.shut_frames) and len(take.shut_frames) >= 3
    for t in range(T):
        near = take.nearest_shut_frames(t)
        assert sum(weight for _, weight in near) == pytest.approx(1) and all(0 <= k < T for k, _ in near)
        assert len(near) == 1 or near[0][0] < t < near[1][0]


def test_target_lips_without_an_opening_meet_in_every_frame(take, moves):
    gaps = [lip_opening(take.target_points(t, 0.0, np.zeros(len(moves) - 1))) for t in range(T)]
    assert np.abs(gaps).max() < 0.02 < 0.08 < take.opening.max()


def test_a_slow_opening_is_an_opening_and_not_a_smile(net, moves):
    opening, mean = 0.05 * (1 - np.cos(2 * np.pi * np.arange(120) / 60)), net.solid.double().numpy()
    take = dub.Take(0, 100 * (mean[:68, :2] + opening[:, None, None] * moves[0]) + 128, mean, moves)
    np.testing.assert_allclose(take.opening - take.opening.min(), opening, atol=0.01)
    chin_and_lip = (take.shut + take.smile)[:, [8, 57], 1]
    assert np.ptp(chin_and_lip, axis=0).max() < 0.01 < 0.03 < 0.1 * moves[0, [8, 57], 1].min()


def test_target_lips_never_cross(take, moves):
    rng = np.random.default_rng(0)
    for t in range(0, T, 7):
        g = take.target_points(t, 0.05 * rng.random(), rng.standard_normal(len(moves) - 1))
        assert (g[[67, 66, 65], 1] >= g[[61, 62, 63], 1] - 0.03).all()


def test_a_video_without_a_trackable_face_is_refused_in_one_line(clip, net, moves, monkeypatch):
    monkeypatch.setattr(landmarks, "detect_faces", lambda frame: [])
    with pytest.raises(InputError, match="no face that can be tracked"):
        dub.find_takes(clip, net, moves, T)


@pytest.mark.parametrize("n", [1, dub.MIN_TAKE - 1])
def test_a_short_sentence_is_dubbed(clip, net, moves, n):
    _, takes = dub.find_takes(clip, net, moves, n)
    assert [take.T for take in takes] == [n]


def test_turned_lost_or_hidden_faces_are_not_usable(net):
    mean = net.solid.double().numpy()
    front = 100 * mean[:68, :2] + 128
    assert dub.is_usable(front, mean)
    assert not dub.is_usable(front * np.nan, mean)
    c, s = np.cos(np.radians(50)), np.sin(np.radians(50))
    assert not dub.is_usable(100 * (mean[:68] @ [[c, 0], [0, 1], [-s, 0]]) + 128, mean)
    assert not dub.is_usable(front + np.random.default_rng(0).normal(0, 30, (68, 2)), mean)


def test_the_script_dubs_a_video_and_refuses_options_of_photos(clip, tmp_path, capsys):
    speech, out = tmp_path / "speech.wav", tmp_path / "out.mp4"
    write_wav(speech, np.random.default_rng(0).normal(0, 0.1, 640 * 30).astype(np.float32))
    sample.main([str(clip), str(speech), "--out", str(out), "--mouth", "1.5"])
    assert "30 of 30 frames have a face" in capsys.readouterr().out
    frames, source = list(read_video(out)), list(read_video(clip))[:30]
    assert len(frames) == 30 and any(not np.array_equal(a, b) for a, b in zip(frames, source))
    for wrong in (["--crop"], ["--still"], ["--box", "1,2,30,40"], ["--blink", "0"], ["--toy"], ["--refine", "0"]):
        with pytest.raises(InputError, match="a video is dubbed"):
            sample.main([str(clip), str(speech), "--out", str(out), "--overwrite", *wrong])
    with pytest.raises(InputError, match="real faces"):
        sample.main([str(clip), str(speech), "--out", str(out), "--overwrite", "--weights", str(sample.TOY_WEIGHTS)])
