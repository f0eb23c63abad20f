"""motion.py: mouths in silence, blinks, sway, driving clips, and the fits of moves and opening."""

from pathlib import Path
from types import SimpleNamespace

from test_warp import SCALE, mean_shape, moves, points

import numpy as np
import pytest

import motion
from media import load_audio
from motion import (
    Motion, detect_speech, driving_motion, fit_moves, fit_opening, idle_motion, lip_opening, mouth_motion, random_faces)
from warp import Head, Pose, rotation, smoothstep, turned_place

ONE = np.zeros(1)  # scene
ROOT, RATE = Path(__file__).resolve().parents[1], 16000


def speech(seconds, seed=0):
    return 0.2 * np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32)


def test_long_silence_is_not_speech_and_a_short_pause_is():
    wav = np.concatenate([np.zeros(3 * RATE, np.float32), speech(1), np.zeros(RATE // 2, np.float32), speech(1),
                          np.zeros(3 * RATE, np.float32)])
    active = detect_speech(wav, 212)
    assert active[:35].max() < 0.02 and active[180:].max() < 0.02
    assert active[75:137].min() > 0.98
    assert detect_speech(np.zeros(2 * RATE, np.float32), 50).max() == 0
    quiet = detect_speech(0.01 * wav, 212)
    assert np.abs(quiet - active).max() < 1e-6


@pytest.mark.parametrize("slope", (0, 0.5, 1))
def test_steady_noise_is_not_speech_and_speech_in_noise_is(slope):
    speech = load_audio(ROOT / "examples" / "speech.flac")[: 4 * RATE]
    pitch = np.arange(len(speech) // 2 + 1) + 50.0
    noise = np.fft.irfft(np.fft.rfft(np.random.default_rng(0).standard_normal(len(speech))) / pitch**slope, len(speech))
    noise *= speech.std() / noise.std()
    assert detect_speech(noise, 100).max() == 0
    assert detect_speech(speech + noise, 100).mean() > 0.95 * detect_speech(speech, 100).mean() > 0.9


def test_in_silence_the_mouth_is_the_photos_own_and_strength_scales_its_motion():
    opening, shape, active = np.array([0.0, 0.1, 0.1]), np.ones((3, 2)), np.array([0.01, 0.5, 1.0])
    got, numbers = mouth_motion(opening, shape, active, rest_opening=0.04)
    assert got == pytest.approx([0.04, 0.07, 0.10]) and got[0] == 0.04
    assert (numbers[0] == 0).all() and numbers[2] == pytest.approx([1, 1])
    assert mouth_motion(opening, shape, active, 0.04, strength=2.0)[0][2] == pytest.approx(0.16)


def test_idle_motion_starts_at_rest_blinks_at_a_natural_rate_and_sways_by_its_seed():
    n = 60 * motion.FPS
    a, b = idle_motion(n, np.ones(n), 1), idle_motion(n, np.ones(n), 2)
    starts = np.flatnonzero(np.diff(a.blinks > 0.3, prepend=False) & (a.blinks > 0.3))
    assert 10 <= len(starts) <= 20 and a.blinks.max() == 1
    assert (a.poses[0] == 0).all() and np.abs(np.diff(a.poses[:, :3], axis=0)).max() < 0.4  # degrees a frame
    assert np.all(a.poses[:, :3].std(0) > 0.4) and np.all(a.poses[:, :3].std(0) < 3)
    assert np.array_equal(a.poses, idle_motion(n, np.ones(n), 1).poses) and not np.array_equal(a.poses, b.poses)
    still = idle_motion(n, np.ones(n), 1, head=False)
    assert not still.poses.any() and still.blinks.any() and still[5]["pose"] == Pose()


def test_random_motion_fills_the_limits_and_shuts_every_second_pair_of_eyes():
    rng, limits = np.random.default_rng(0), np.array([12, 9, *motion.LIMITS])
    drawn = [motion.random_motion(rng, (12, 9)) for _ in range(400)]
    numbers, blinks = np.array([np.r_[m.poses[0], m.brows] for m in drawn]), np.array([m.blinks[0] for m in drawn])
    assert (abs(numbers) < limits).all() and (numbers.std(0) > 0.2 * limits).all()
    assert (abs(numbers.mean(0)) < 0.1 * limits).all()
    assert set(blinks) == {0, 1} and 0.4 < blinks.mean() < 0.6


def test_a_short_motion_is_played_back_and_forth():
    m = Motion(np.arange(3)[:, None] * np.ones((3, 6)), np.arange(3.0), np.zeros(3))
    assert [m[k]["blink"] for k in range(7)] == [0, 1, 2, 1, 0, 1, 2]
    assert Motion(np.zeros((1, 6)), np.zeros(1), np.zeros(1))[9]["pose"] == Pose()


def driver(T=60):
    """A clip of a turning, nodding, blinking head whose mouth moves in every frame"""
    t = np.arange(T) / T
    yaw, pitch = 6 * np.sin(2 * np.pi * t), 4 * np.sin(4 * np.pi * t)
    lids, rng = np.full((T, 2), 0.3), np.random.default_rng(0)
    lids[20:23] = 0.1
    clip = np.stack([points(y, gap=g, pitch=p) for y, p, g in zip(yaw, pitch, rng.uniform(0, 0.2, T))])
    return clip, lids, np.zeros((T, 2)), yaw, pitch


def test_driving_motion_has_the_turns_and_blinks_of_the_clip():
    clip, lids, brows, yaw, pitch = driver()
    got = driving_motion(clip, lids, brows, mean_shape(), (20.0, 20.0), ONE)
    assert np.abs(got.poses[:, 0] - motion.DRIVE_GAIN[0] * yaw).max() < 1.0  # smoothed, softly limited
    assert np.abs(got.poses[:, 1] - motion.DRIVE_GAIN[1] * pitch).max() < 1.3
    assert (got.blinks[20:23] == 1).all() and np.delete(got.blinks, [20, 21, 22]).max() == 0
    turned = driving_motion(clip[15:], lids[15:], brows[15:], mean_shape(), (20.0, 20.0), ONE)  # starts at 6 degrees
    assert (turned.poses[0] == 0).all() and turned.poses[:, 0].min() < -8
    tight = driving_motion(clip, lids, brows, mean_shape(), (3.0, 3.0), ONE)
    assert np.abs(tight.poses[:, :2]).max() < 3.0


def test_the_head_goes_where_the_drivers_head_goes_although_turns_move_it_as_well():
    turns, mean, rest = np.zeros((30, 6)), mean_shape(), rotation(15, 10, 25)
    start = smoothstep(np.arange(30)[:, None] / 20)
    turns[:, :2] = start * (10, -10)
    for shift in (0, 0.1):
        turns[:, 3:5] = shift * start
        head = (mean[:68] * (1, 1, Head.DEPTH) - Head.PIVOT) @ rest.T  # about the neck
        head = head @ np.swapaxes(rotation(*turns.T[:3]), 1, 2)
        clip = SCALE * (head[..., :2] + turns[:, None, 3:5])
        poses = driving_motion(clip, np.full((30, 2), 0.3), np.zeros((30, 2)), mean, (20.0, 20.0), ONE).poses
        place, truth = (turned_place(x, rest, mean) + x[:, 3:5] for x in (poses, turns))
        assert np.abs(place - truth).max() < 0.02 < 0.1 < np.abs(truth[-1]).min()


def test_random_faces_have_the_lips_poses_and_lids_of_their_numbers_and_brows_at_rest():
    calls, photo = [], np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)

    def warp(opening, shape, blink, brows, pose):
        calls.append((opening, shape.tolist(), blink, brows, pose))
        return photo + np.uint8(len(calls))

    warp.head = SimpleNamespace(turn_limits=(15.0, 12.0))
    opening, shape = np.array([0.1, 0.2, 0.0]), np.arange(6.0).reshape(3, 2)
    motion, images = random_faces(warp, 8, (4, 4, 12, 12), opening, shape, np.random.default_rng(0))
    assert [c[:2] for c in calls] == [(0.1, [0, 1]), (0.2, [2, 3]), (0.0, [4, 5])] and not motion.brows.any()
    assert [(c[4], c[2], c[3]) for c in calls] == [(motion[k]["pose"], motion.blinks[k], 0) for k in range(3)]
    assert len({c[4].yaw for c in calls}) == 3 and np.abs(motion.poses[:, 0]).max() < 15
    assert np.array_equal(images, np.stack([photo[4:12, 4:12] + np.uint8(k) for k in (1, 2, 3)]))


def test_each_scene_of_a_driving_clip_starts_at_the_photos_pose_and_has_its_own_usual_eyes():
    clip, lids, brows, _, _ = driver()
    alone = driving_motion(clip, lids, brows, mean_shape(), (20.0, 20.0), ONE)
    both = np.concatenate([clip, 60 + 1.5 * clip]), np.concatenate([lids, lids / 2]), np.concatenate([brows, brows + 0.1])
    got = driving_motion(*both, mean_shape(), (20.0, 20.0), np.repeat([0, 1], 60))
    for part in ("poses", "blinks", "brows"):
        first, second = np.split(getattr(got, part), 2)
        assert np.array_equal(first, getattr(alone, part)) and np.abs(second - first).max() < 1e-3


def test_eyes_of_a_driver_who_looks_down_stay_half_shut():
    clip, lids, brows, _, _ = driver()
    lids[40:50] = 0.19
    blinks = driving_motion(clip, lids, brows, mean_shape(), (20.0, 20.0), ONE).blinks
    assert (blinks[20:23] == 1).all() and 0.2 < blinks[40:50].min() and blinks[40:50].max() < 0.6


def test_the_drivers_mouth_has_no_influence():
    clip, lids, brows, _, _ = driver()
    other = clip.copy()
    other[:, 3:14] += 5.0                                              # jaw and chin
    other[:, 48:] += np.random.default_rng(1).normal(0, 8, other[:, 48:].shape)
    a, b = (driving_motion(c, lids, brows, mean_shape(), (20.0, 20.0), ONE) for c in (clip, other))
    assert np.array_equal(a.poses, b.poses) and np.array_equal(a.blinks, b.blinks)


def test_frames_without_a_face_are_interpolated():
    clip, lids, brows, yaw, _ = driver()
    whole = driving_motion(clip, lids, brows, mean_shape(), (20.0, 20.0), ONE)
    for part in (clip, lids, brows):
        part[30:33] = np.nan
    assert np.abs(driving_motion(clip, lids, brows, mean_shape(), (20.0, 20.0), ONE).poses - whole.poses).max() < 0.5


def test_fit_moves_recovers_the_moves_of_synthetic_clips():
    rng, clips = np.random.default_rng(0), []
    for _ in range(4):
        T = 50
        opening, shape = rng.uniform(0, 0.1, T), rng.normal(0, 1, (T, 2))
        faces = mean_shape()[:68, :2] + np.einsum("tk,kpi->tpi", np.c_[opening, shape], moves())
        turn = rotation(0, 0, 10)[:2, :2]
        clips.append((SCALE * faces @ turn.T + rng.normal(0, 3, (T, 1, 2)) + 150, shape))
    fitted = fit_moves(clips, mean_shape())
    gap = lip_opening(moves()[:1])[0]
    lips = [*range(55, 60), 65, 66, 67]
    other_points = np.delete(np.arange(68), lips)
    assert np.abs(fitted[0, other_points] - moves()[0, other_points] / gap / motion.OPENING_GAIN)[:, 1].max() < 0.03
    assert lip_opening(fitted[:1])[0] == pytest.approx(1)
    assert np.abs(fitted[1] - moves()[1]).max() < 0.01


def test_fit_opening_gives_the_real_mean_and_deviation():
    rng = np.random.default_rng(0)
    real = np.maximum(0, rng.normal(0.05, 0.04, 4000)) + 0.02
    predicted = 0.3 * (real - 0.05) / 0.04 + rng.normal(0, 0.2, 4000)
    slope, offset = fit_opening(predicted, real)
    got, wanted = np.maximum(0, slope * predicted + offset), motion.OPENING_GAIN * (real - 0.02)
    assert got.mean() == pytest.approx(wanted.mean(), rel=0.02) and got.std() == pytest.approx(wanted.std(), rel=0.02)
