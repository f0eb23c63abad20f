"""The toy world: sound determines the lips alone, and each factor moves its own part of the image."""

import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import solve_toeplitz
from scipy.stats import spearmanr

import toyfaces as toy
from data import Pack
from faces import TEMPLATES
from media import InputError, load_audio, load_photo, read_video

ROOT = Path(__file__).resolve().parent.parent
OPEN, WIDE, BLINK = (toy.FACTORS.index(name) for name in ("open", "wide", "blink"))
POSES = [dict(yaw=yaw, pitch=pitch, roll=roll) for yaw in (-22, 0, 22) for pitch in (-16, 16) for roll in (-13, 13)]


def deep_voice():
    """The person with the lowest pitch, whose dense harmonics give the best measurement of formants"""
    return min((toy.make_person(seed) for seed in range(40)), key=lambda who: who.f0)


def sustain_vowel(vowel, who, seconds=1.0):
    """-> wav of a sustained vowel without a consonant, and open and wide in its middle"""
    c = toy.make_controls([(0.0, 0.0, seconds, "", vowel, 1.0)], round(seconds / toy.STEP))
    wav = toy.synthesise_voice(np.random.default_rng(0), c, who, round(seconds * 16000))
    gap, wide = toy.move_lips(c)
    return wav, gap[len(gap) // 2], wide[len(wide) // 2]


def measure_formants(wav):
    """Formants in Hz by linear prediction of order 18 (two per kHz and two more)"""
    x = np.append(wav[0], wav[1:] - 0.97 * wav[:-1]) * np.hamming(len(wav))
    r = np.correlate(x, x, "full")[len(x) - 1 : len(x) + 18]
    r[0] *= 1 + 1e-6
    roots = np.roots(np.append(1, -solve_toeplitz(r[:-1], r[1:])))
    roots = roots[roots.imag > 0]
    hertz, bandwidth = np.angle(roots) * 16000 / (2 * np.pi), -np.log(np.abs(roots)) * 16000 / np.pi
    return np.sort(hertz[(hertz > 180) & (hertz < 5000) & (bandwidth < 400)])


def changed(who, pose, a, b, size=64):
    """-> bool (size, size): pixels that differ between states a and b"""
    first, second = (toy.draw(who, dict(pose, **state), size).astype(int) for state in (a, b))
    return np.abs(first - second).max(-1) > 12


def extent(mask):
    """x0, y0, x1, y1 of the pixels that are set, as fractions of the image"""
    y, x = np.nonzero(mask)
    return np.array((x.min(), y.min(), x.max() + 1, y.max() + 1)) / len(mask)


def inside(mask, box, slack):
    x0, y0, x1, y1 = extent(mask)
    return x0 >= box[0] - slack and y0 >= box[1] - slack and x1 <= box[2] + slack and y1 <= box[3] + slack


# --- determinism


def test_the_same_seed_gives_the_same_bytes():
    """The test of the shipped example covers other processes."""
    clip, again = toy.make_toy_clip(7, 0.4, 32), toy.make_toy_clip(7, 0.4, 32)
    assert all(np.array_equal(a, b) for a, b in zip(clip, again)) and clip[0].shape == (10, 32, 32, 3)


def test_another_seed_gives_the_same_person_another_sound_and_motion():
    (wav, truth), (other_wav, other_truth) = (toy.make_clip_truth(seed, 0.4, toy.make_person(3)) for seed in (1, 2))
    assert not np.array_equal(wav, other_wav) and not np.isclose(truth[:, :3], other_truth[:, :3]).any()


def test_people_differ_from_each_other():
    portraits = {toy.draw(toy.make_person(seed), {}, 32).tobytes() for seed in range(60)}
    assert len(portraits) == 60


# --- speech


def test_measured_formants_equal_those_of_the_vowel_scaled_by_the_vocal_tract():
    who = deep_voice()
    for vowel, (F1, F2, _) in toy.VOWELS.items():
        wav, _, _ = sustain_vowel(vowel, who)
        measured = measure_formants(wav[6000:8000])[:2]
        assert np.allclose(measured, np.array((F1, F2)) * who.tract, rtol=0.05), f"{vowel}: {measured}"


def test_a_higher_first_formant_opens_the_mouth_and_a_higher_second_formant_widens_it():
    who = deep_voice()
    measured = {}
    for vowel in "aeiou":
        wav, gap, wide = sustain_vowel(vowel, who)
        measured[vowel] = (*measure_formants(wav[6000:8000])[:2], gap, wide)
    F1, F2, gap, wide = np.array(list(measured.values())).T
    assert np.corrcoef(F1, gap)[0, 1] > 0.97 and np.corrcoef(F2, wide)[0, 1] > 0.97
    assert measured["a"][2] > 0.9 and measured["i"][2] < 0.3  # ah opens, ee does not
    assert measured["i"][3] > 0.9 and measured["u"][3] < 0.1  # ee is wide, oo is round


def test_in_running_speech_formants_and_lips_correlate():
    formants, lips = [], []
    who = deep_voice()
    for seed in range(4):
        wav, truth = toy.make_clip_truth(seed, 4, who)
        for t in range(1, len(truth) - 1):
            piece = wav[640 * t - 120 : 640 * (t + 1) + 120]
            measured = measure_formants(piece)
            if piece.std() > 0.05 and len(measured) > 1:
                formants.append(measured[:2])
                lips.append(truth[t, OPEN:])
    formants, lips = np.array(formants), np.array(lips)
    assert len(lips) > 100
    # rank correlation, because linear prediction sometimes misses a formant and returns the next one
    assert spearmanr(formants[:, 0], lips[:, 0])[0] > 0.75
    assert spearmanr(formants[:, 1], lips[:, 1])[0] > 0.8


def test_m_b_and_p_shut_the_lips_and_other_consonants_do_not():
    for consonant in toy.CONSONANTS:
        c = toy.make_controls([(0.1, 0.08, 0.2, consonant, "a", 1.0)], 80)
        during = toy.move_lips(c)[0][round(0.1 / toy.STEP) : round(0.18 / toy.STEP)]
        shut = consonant != "" and consonant in toy.CLOSURES
        assert (during.min() < 0.02) == shut, f"{consonant!r}: {during.min()}"


def test_silence_shuts_the_mouth_and_an_open_mouth_is_loud():
    level, gap = [], []
    for seed in range(12):
        wav, truth = toy.make_clip_truth(seed, 3, toy.make_person(seed))
        level.append(np.sqrt((wav.reshape(-1, 640) ** 2).mean(1)))
        gap.append(truth[:, OPEN])
    level, gap = np.concatenate(level), np.concatenate(gap)
    quiet = level < 0.003
    assert quiet.sum() > 20 and np.mean(gap[quiet] < 0.15) > 0.95  # lips close while the last sound fades
    assert np.mean(level[gap > 0.5] > 0.01) > 0.97
    c = toy.make_controls([], 60)  # no syllable
    wav = toy.synthesise_voice(np.random.default_rng(0), c, toy.make_person(1), 4800)
    assert toy.move_lips(c)[0].max() == 0 and np.abs(wav).max() < 0.01


@pytest.mark.parametrize("seconds", (0.2, 1.0, 2.37, 3.0))
def test_sound_and_truth_have_the_given_length(seconds):
    wav, truth = toy.make_clip_truth(5, seconds, toy.make_person(5))
    assert wav.shape == (round(16000 * seconds),) and wav.dtype == np.float32
    assert truth.shape == (round(25 * seconds), 10) and truth.dtype == np.float32
    assert np.abs(wav).max() <= 1 and np.isfinite(truth).all()


# --- motion


@pytest.fixture
def mute(monkeypatch):
    """Clips without a synthesised voice, for tests of the truth alone"""
    monkeypatch.setattr(toy, "synthesise_voice", lambda rng, c, who, n: np.zeros(n, np.float32))


def test_pose_gaze_and_blinks_do_not_correlate_with_the_lips(mute):
    truths = np.stack([toy.make_clip_truth(seed, 3, toy.make_person(seed))[1] for seed in range(90)])  # (90, 75, 10)
    within = (truths - truths.mean(1, keepdims=True)).reshape(-1, 10)
    r = np.corrcoef(within.T)[:OPEN, OPEN:]
    assert np.abs(r).max() < 0.08, dict(zip(toy.FACTORS, r.round(3).tolist()))
    voices = [toy.make_clip_truth(3, 2, toy.make_person(seed))[1] for seed in (0, 1)]  # same motion by two people
    assert np.array_equal(voices[0][:, :OPEN], voices[1][:, :OPEN])


def test_sound_motion_and_appearance_have_separate_random_streams(monkeypatch):
    seeds, original = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(tuple(seed)) or original(seed))
    toy.make_clip_truth(11, 0.4, toy.make_person(11))
    assert len(seeds) == 3 == len(set(seeds))


def test_heads_use_much_of_their_range_and_clip_means_vary_little(mute):
    truths = np.stack([toy.make_clip_truth(seed, 3, toy.make_person(seed))[1] for seed in range(60)])
    for i, limit in enumerate((toy.MAX_YAW, toy.MAX_PITCH, toy.MAX_ROLL)):
        angle = truths[:, :, i]
        assert np.abs(angle).max() <= limit
        assert np.ptp(angle, axis=1).mean() > limit  # on average half of the range
        assert angle.mean(1).std() < 0.7 * angle.std(1).mean()
        assert np.abs(np.diff(angle, axis=1)).max() < 0.35 * limit  # no jumps


def test_blinks_are_one_and_a_half_to_four_seconds_apart():
    blink = toy.sample_motion(np.random.default_rng(1), 25 * 120)["blink"]
    starts = np.flatnonzero((blink[1:] > 0) & (blink[:-1] == 0))
    assert np.diff(starts).min() >= 37 and np.diff(starts).max() <= 101 and blink.max() == 1


# --- drawing


@pytest.mark.parametrize("size", (32, 64))
def test_opening_and_widening_change_only_the_mouth_box(size):
    pixel = 1.01 / size
    for seed in range(7):
        for state in (dict(open=1), dict(open=1, wide=0), dict(open=1, wide=1), dict(wide=1), dict(wide=0)):
            mask = changed(toy.make_person(seed), {}, dict(open=0, wide=0.5), state, size)
            assert inside(mask, TEMPLATES["toy"].mouth, pixel), f"person {seed}, {state}: {extent(mask)}"


def test_blinks_and_gaze_change_only_the_eyes():
    for seed in range(7):
        for state in (dict(blink=1), dict(gaze_x=1), dict(gaze_y=-1), dict(blink=0.5)):
            mask = changed(toy.make_person(seed), {}, dict(blink=0, gaze_x=0), state)
            assert mask.sum() > 8, f"person {seed}: {state} changes nothing"
            assert inside(mask, TEMPLATES["toy"].eyes, 0), f"person {seed}, {state}: {extent(mask)}"


@pytest.mark.parametrize("size", (32, 64))
def test_mouth_and_eyes_stay_within_two_pixels_of_their_boxes_at_extreme_poses(size):
    template = TEMPLATES["toy"]
    for seed in range(3) if size == 32 else range(2, 5):
        who = toy.make_person(seed)
        for pose in POSES:
            lips = changed(who, pose, dict(open=0, wide=0.5), dict(open=1, wide=1), size)
            eyes = changed(who, pose, dict(blink=1), dict(blink=0), size)
            assert inside(lips, template.mouth, 0.066), f"person {seed}, {pose}: lips {extent(lips)}"
            assert inside(eyes, template.eyes, 0.066), f"person {seed}, {pose}: eyes {extent(eyes)}"
            (x0, y0, x1, y1), H = (round(v * size) for v in template.mouth), lips.sum()
            assert lips[y0:y1, x0:x1].sum() > 0.93 * H  # the mask hides nearly all of the lips


def test_the_mouth_opens_gradually_and_a_closed_mouth_is_a_dark_line():
    dark = np.array((0.3, 0.4, 0.3))
    for seed in (0, 2, 8, 16):
        who = toy.make_person(seed)
        rest = toy.draw(who, dict(open=0), 64).astype(float)
        moved = [np.abs(toy.draw(who, dict(open=gap), 64) - rest).sum() for gap in (0.15, 0.35, 0.6, 1.0)]
        assert np.all(np.diff([0.0, *moved]) > 0)
        column = rest[36:56, 31:33].mean(1) @ dark  # down the middle of nose, lips and chin
        assert column.min() < 0.62 * (who.skin @ dark), f"person {seed}"


def test_a_turn_moves_the_face_to_the_right_and_a_nod_moves_it_down():
    who = toy.make_person(0)

    def middle_of_the_eyes(**pose):
        y, x = np.nonzero(changed(who, pose, dict(blink=1), dict(blink=0)))
        return x.mean(), y.mean()

    (left, _), (x, y), (right, _) = (middle_of_the_eyes(yaw=v) for v in (-22, 0, 22))
    assert right - x > 2.5 and x - left > 2.5
    assert middle_of_the_eyes(pitch=16)[1] - y > 1.5 and y - middle_of_the_eyes(pitch=-16)[1] > 1.5


def test_every_size_gives_a_square_image_and_unknown_factors_are_refused():
    for size in (16, 32, 50, 256):
        picture = toy.draw(toy.make_person(4), dict(yaw=10), size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    with pytest.raises(AssertionError, match="nostril"):
        toy.draw(toy.make_person(4), dict(nostril=1), 32)


# --- packs and the script


def test_a_pack_has_the_clips_and_their_truth(tmp_path, monkeypatch):
    """Two processes, forked because new ones need seconds for imports"""
    folder, get_context, kinds = tmp_path / "pack", multiprocessing.get_context, []
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: kinds.append(kind) or get_context("fork"))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    toy.make_pack(folder, 32, people=16, seconds=0.2, first_seed=toy.TUNE_SEED)
    pack, truth = Pack(folder), np.load(folder / "truth.npy")
    assert kinds == ["forkserver"] and len(pack) == 16 and pack.size == 32 and pack.template == "toy"
    assert truth.shape == (80, 10) and truth.dtype == np.float32
    for i in (0, 7, 15):
        frames, wav, expected = toy.make_toy_clip(toy.TUNE_SEED + i, 0.2, 32)
        assert pack.identities[pack.identity[i]] == f"toy{toy.TUNE_SEED + i}" and pack.n_frames[i] == 5
        assert np.array_equal(truth[5 * i : 5 * (i + 1)], expected)
        assert np.abs(pack.sound(i) - wav).max() < 1e-4
        assert np.abs(pack.frame(i, 4).astype(int) - frames[4]).mean() < 4  # JPEG
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    toy.make_pack(folder, 32, people=16, seconds=0.2, first_seed=toy.TUNE_SEED)  # nothing to do
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(InputError, match="something else"):
        toy.make_pack(folder, 32, people=17, seconds=0.2, first_seed=toy.TUNE_SEED)
    assert json.loads((folder / "toy.json").read_text())["people"] == 16


def test_an_interrupted_pack_is_refused_and_then_drawn_anew(tmp_path, monkeypatch):
    draw, drawn = toy.draw, []

    def fails_later(*args):
        drawn.append(1)
        if len(drawn) > 7:
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy, "draw", fails_later)
        toy.make_pack(tmp_path / "late", 32, people=3, seconds=0.2)
    with pytest.raises(InputError):
        Pack(tmp_path / "late")
    for name in ("late", "whole"):
        toy.make_pack(tmp_path / name, 32, people=3, seconds=0.2)
    late, whole = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("late", "whole"))
    assert late == whole and len(late) > 9


def test_the_script_writes_images_and_a_clip_with_sound_and_keeps_existing_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"toyfaces.py --out {tmp_path / 'new'} --size 32".split())
    sine = np.sin(np.arange(48000, dtype=np.float32) / 9)  # synthesised voices of 33 people take longer
    monkeypatch.setattr(toy, "synthesise_voice", lambda rng, c, who, n: sine)
    toy.main()
    assert load_photo(tmp_path / "new/toys.png").shape == (4 * (128 + 18), 8 * 128, 3)
    assert sum(1 for _ in read_video(tmp_path / "new/toy.mp4")) == 75
    assert np.abs(load_audio(tmp_path / "new/toy.mp4")).max() > 0.1
    with pytest.raises(InputError, match="--overwrite"):
        toy.main()
    monkeypatch.setattr(sys, "argv", f"toyfaces.py --pack {tmp_path / 'pack'} --size 32 --people 1 --seed 7".split())
    toy.main()
    assert Pack(tmp_path / "pack").source(0) == "toyfaces seed 7"


def test_the_shipped_example_is_drawn_and_synthesised_by_this_code():
    seed = toy.TEST_SEED + 500_002
    who = toy.make_person(seed)
    assert np.array_equal(np.array(Image.open(ROOT / "examples/face.png")), toy.draw(who, toy.REST, 256))
    spoken = toy.make_clip_truth(seed, 4, who)[0]
    shipped = load_audio(ROOT / "examples/speech.wav", normalise=False)
    assert np.abs(shipped - spoken).max() < 1e-4


@pytest.mark.parametrize("args", (("--size", 3), ("--people", 0, "--pack", "x"), ("--people", "nan")))
def test_a_bad_argument_gets_one_line_and_exit_status_2(args, monkeypatch, refused):
    monkeypatch.setattr(sys, "argv", ["toyfaces.py", *map(str, args)])
    assert args[0] in refused(lambda argv: toy.main())


def test_a_pack_in_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        toy.make_pack(tmp_path, 32, people=1, seconds=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
