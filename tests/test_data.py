"""Packs give back what went in, items are functions of their number, checkpoints stay whole."""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import audio
import data
import faces
import media
import prepare
from audio import log_mel, mel_windows
from data import Clips, Frames, Mixed, Pack, PackWriter, batches, split
from faces import TEMPLATES
from media import InputError, VideoWriter, to_tensor

ROOT = Path(data.__file__).parent
SIZE = 24
LENGTHS = (30, 11, 3)  # frames of the three clips of the test pack


def drawn(count, size=SIZE, start=0.0):
    """uint8 (count, size, size, 3): a smooth picture whose brightness tells the number of the frame."""
    y, x = np.mgrid[:size, :size] / size
    shade = (start + np.arange(count) * 5)[:, None, None]
    return np.stack([shade + 40 * x, shade + 40 * y, shade + 0 * x + 20], -1).clip(0, 255).astype(np.uint8)


def noise(count, seed):
    """The sound of so many frames, every moment unlike every other"""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count * 640).astype(np.float32)


def add_clip(writer, i, count, size=SIZE):
    frames, name = drawn(count, size, 7.0 * i), f"clip {i}, ö.mp4"
    writer.add(frames, noise(count, i), f"person{i % 2}", name, (1, 2, 3.5, 4), 29.97)


def write_pack(folder, lengths=LENGTHS, size=SIZE):
    with PackWriter(folder, size, "toy") as writer:
        for i, count in enumerate(lengths):
            add_clip(writer, i, count, size)
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return Pack(write_pack(tmp_path_factory.mktemp("data") / "pack"))


def brightness(picture):
    return float(np.asarray(picture, float).mean())


# ------------------------------------------------------------------------------------------------------------
# packs


def test_a_pack_gives_back_frames_sound_and_notes(pack):
    assert len(pack) == 3 and pack.size == SIZE and pack.template == "toy"
    assert pack.identities == ["person0", "person1"] and pack.identity.tolist() == [0, 1, 0]
    assert pack.n_frames.tolist() == list(LENGTHS)
    assert np.allclose(pack.box[1], (1, 2, 3.5, 4)) and np.isclose(pack.fps[2], 29.97)
    for c, count in enumerate(LENGTHS):
        frames = pack.frames(c, range(count))
        assert frames.shape == (count, SIZE, SIZE, 3) and frames.dtype == np.uint8
        assert np.abs(frames.astype(int) - drawn(count, start=7.0 * c)).max() <= 4  # JPEG, quality 95
        assert np.abs(pack.sound(c) - noise(count, c)).max() <= 1 / 65536 + 1e-7
        assert pack.source(c) == f"clip {c}, ö.mp4"


def test_a_file_name_that_is_no_text_is_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff.mp4")
    with PackWriter(tmp_path / "p", 16, "toy") as writer:
        writer.add(drawn(2, 16), noise(2, 0), name, name)
    pack = Pack(tmp_path / "p")
    assert os.fsencode(pack.source(0)) == b"caf\xe9 \xff.mp4" and pack.identities == [name]


def test_sixteen_bit_sound_passes_through_a_pack_unchanged(tmp_path):
    samples = np.array([-32768, -1, 0, 1, 12345, 32767] * 200, np.int16)
    with PackWriter(tmp_path / "p", 16, "toy") as writer:
        writer.add(drawn(2, 16), samples.astype(np.float32) / 32768, "a", "b")
    assert (Pack(tmp_path / "p").sound(0) * 32768 == samples).all()


def test_any_frame_is_reached_alone_and_in_any_order(pack):
    whole = pack.frames(0, range(30))
    for k in (29, 0, 17):
        assert (pack.frame(0, k) == whole[k]).all()
    assert (pack.frames(0, [5, 28, 5]) == whole[[5, 28, 5]]).all()
    assert brightness(pack.frame(2, 0)) > brightness(pack.frame(1, 0))  # another clip is another picture
    with pytest.raises(AssertionError, match="frame 3 of clip 2"):
        pack.frame(2, 3)


def test_colour_keeps_its_full_resolution_in_small_frames(tmp_path):
    stripes = np.zeros((1, 16, 16, 3), np.uint8)
    stripes[:, :, ::2] = (220, 40, 40)
    stripes[:, :, 1::2] = (40, 160, 220)  # one column red, one blue: halved colour would be grey
    with PackWriter(tmp_path / "p", 16, "toy") as writer:
        writer.add(stripes, noise(1, 0), "a", "b")
    assert np.abs(Pack(tmp_path / "p").frame(0, 0).astype(int) - stripes[0]).mean() < 8


def test_mel_windows_of_a_pack_are_those_of_the_whole_sound_also_outside_the_clip(pack):
    ks = [-3, 0, 14, 29, 40]
    assert (pack.windows(0, ks) == mel_windows(log_mel(pack.sound(0)), np.array(ks))).all()
    assert (pack.windows(0, [40]) == audio.SILENCE).all()


def test_a_pack_travels_to_another_process_as_its_name(pack):
    pack.frame(0, 0)
    parcel = pickle.dumps(Clips(pack, 5, 0))
    assert len(parcel) < 1000
    assert (pickle.loads(parcel).pack.frame(1, 4) == pack.frame(1, 4)).all()


def test_an_index_of_many_clips_is_mapped_and_not_read(tmp_path):
    clips, frames = 200_000, 75
    folder = write_pack(tmp_path / "p", (1,))
    columns = dict(frame_start=np.arange(clips + 1) * frames, n_frames=np.full(clips, frames))
    columns |= dict(
        sound_start=np.zeros(clips + 1), n_samples=np.zeros(clips), source_start=np.zeros(clips + 1)
    )
    columns |= dict(
        identity=np.zeros(clips),
        box=np.zeros((clips, 4)),
        fps=np.zeros(clips),
        jpeg_start=np.zeros(clips * frames + 1),
    )
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column.astype(data.INDEX[name]))
    for name in ("frames.bin", "sound.bin", "sources.txt"):
        (folder / name).write_bytes(b"")
    code = "import resource, sys; from data import Pack; before = resource.getrusage(0).ru_maxrss;"
    code += "p = Pack(sys.argv[1]); assert len(p) == 200_000 and p.frame_start[-1] == 15_000_000;"
    code += "print(resource.getrusage(0).ru_maxrss - before)"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # KiB; the index alone has 130 MB


@pytest.mark.parametrize(
    "damage", ["no meta", "short frames", "short sound", "short index", "text", "code", "torn meta"]
)
def test_what_is_no_whole_pack_is_refused_in_one_line(tmp_path, damage):
    folder = write_pack(tmp_path / "p")
    if damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "torn meta":
        (folder / "meta.json").write_text('{"format": 1, "si')
    elif damage == "text":
        (folder / "n_frames.npy").write_text("not an array")
    elif damage == "code":  # an array of objects would be unpickled
        np.save(folder / "n_frames.npy", np.array([print], object), allow_pickle=True)
    else:
        path = (
            folder
            / {"short frames": "frames.bin", "short sound": "sound.bin", "short index": "jpeg_start.npy"}[
                damage
            ]
        )
        os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(InputError, match="pack") as caught:
        Pack(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_frame_is_named(tmp_path):
    folder = write_pack(tmp_path / "p")
    start = int(Pack(folder).jpeg_start[4])
    with open(folder / "frames.bin", "r+b") as file:
        file.seek(start)
        file.write(bytes(60))
    pack = Pack(folder)
    pack.frame(0, 3)
    with pytest.raises(InputError, match="frame 4 of clip 0"):
        pack.frame(0, 4)


def test_a_missing_directory_and_one_that_holds_a_pack_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        Pack(tmp_path / "none")
    with pytest.raises(InputError, match="holds a pack already"):
        PackWriter(write_pack(tmp_path / "p"), SIZE, "toy")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        PackWriter(tmp_path / "file" / "p", SIZE, "toy")


def test_an_error_while_writing_leaves_no_readable_pack(tmp_path):
    with pytest.raises(ZeroDivisionError), PackWriter(tmp_path / "p", SIZE, "toy") as writer:
        writer.add(drawn(3), noise(3, 0), "a", "b")
        raise ZeroDivisionError
    with pytest.raises(InputError, match="unfinished"):
        Pack(tmp_path / "p")


def test_an_unfinished_pack_goes_on_behind_the_clips_that_are_kept(tmp_path):
    writer = PackWriter(tmp_path / "p", SIZE, "toy")
    for i, count in enumerate(LENGTHS[:2]):
        add_clip(writer, i, count)
    writer.files["frames.bin"].write(b"half a frame of the next clip")
    writer.release()
    with PackWriter(tmp_path / "p", SIZE, "toy", keep=1) as writer:  # the second clip is written anew
        for i, count in list(enumerate(LENGTHS))[1:]:
            add_clip(writer, i, count)
    whole = write_pack(tmp_path / "whole")
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == names and "journal.jsonl" not in names
    for name in names:
        assert (tmp_path / "p" / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_runs_do_not_write_one_pack(tmp_path):
    writer = PackWriter(tmp_path / "p", SIZE, "toy")
    with pytest.raises(InputError, match="another run"):
        PackWriter(tmp_path / "p", SIZE, "toy")
    writer.release()
    PackWriter(tmp_path / "p", SIZE, "toy").release()


def test_a_begun_pack_of_another_size_is_not_continued(tmp_path):
    writer = PackWriter(tmp_path / "p", SIZE, "toy")
    writer.add(drawn(3), noise(3, 0), "a", "b")
    writer.release()
    with pytest.raises(InputError, match="other options"):
        PackWriter(tmp_path / "p", 16, "toy", keep=1)


# ------------------------------------------------------------------------------------------------------------
# what is held out


def many(folder, clips, people, names="{}/{:05d}.mp4"):
    """A pack of `clips` clips of 2 frames by `people` people in turn, each with a sound of its own"""
    with PackWriter(folder, 8, "toy") as writer:
        for i in range(clips):
            who = f"p{i % people}"
            writer.add(drawn(2, 8), noise(2, i), who, "/videos/" + names.format(who, i // people) + "#0")
    return Pack(folder)


def asked(**lists):
    return argparse.Namespace(data="pack", **dict(train=None, valid=None, test=None) | lists)


def test_every_tenth_person_or_of_few_people_every_tenth_clip_is_held_out_and_by_turns_validates_and_tests(tmp_path):
    pack = many(tmp_path / "people", 80, 40)
    parts = split(pack)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(80))
    assert parts["valid"].tolist() == [9, 29, 49, 69] and parts["test"].tolist() == [19, 39, 59, 79]
    people = [set(pack.identity[clips].tolist()) for clips in parts.values()]
    assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
    parts = split(many(tmp_path / "clips", 40, 3))
    assert parts["valid"].tolist() == [9, 29] and parts["test"].tolist() == [19, 39] and len(parts["train"]) == 36


def test_of_a_small_pack_the_last_two_clips_are_held_out_and_one_clip_is_too_few(tmp_path):
    for clips, expected in ((15, ([*range(13)], [13], [14])), (2, ([0], [1], []))):
        assert tuple(part.tolist() for part in split(many(tmp_path / str(clips), clips, 1)).values()) == expected
    with pytest.raises(InputError, match="1 clips leave none to validate on"):
        split(many(tmp_path / "one", 1, 1))


def test_lists_of_clips_and_people_are_the_parts_that_they_are_given_for(tmp_path):
    pack = many(tmp_path / "pack", 40, 4)
    (tmp_path / "test").write_text("p3/00001.mp4\n\n  p2/00002  \n/videos/p0/00000.mp4\n")
    (tmp_path / "train").write_text("p0\np1\n")
    tested = split(pack, asked(test=str(tmp_path / "test")))
    assert tested["test"].tolist() == [0, 7, 10] and len(tested["valid"]) == 3  # every tenth of the other 37
    assert sorted(np.concatenate(list(tested.values()))) == list(range(40))
    trained = split(pack, asked(train=str(tmp_path / "train")))
    assert set(pack.identity[trained["train"]]) == {0, 1} and len(trained["train"]) == 20
    assert len(trained["valid"]) == len(trained["test"]) == 10  # everybody else
    (tmp_path / "two").write_text("p2")
    (tmp_path / "one").write_text("p3/00000")
    three = split(pack, asked(**{part: str(tmp_path / name) for part, name in zip(data.USES, ("train", "two", "one"))}))
    assert three["test"].tolist() == [3] and len(three["valid"]) == 10 and len(three["train"]) == 20  # p3's rest: unused


@pytest.mark.parametrize("text, message", [
    ("p1\nnobody", "'nobody' fits no clip and no person"),
    ("00001.mp4", "'00001.mp4' is the name of several files"),
    ("p0/00001", "p0/00001.mp4#0 is in two of them"),
])
def test_lists_that_do_not_fit_the_pack_are_refused_in_one_line(tmp_path, text, message):
    pack = many(tmp_path / "pack", 40, 4)
    (tmp_path / "valid").write_text(text)
    (tmp_path / "test").write_text("p0")
    with pytest.raises(InputError, match=message):
        split(pack, asked(valid=str(tmp_path / "valid"), test=str(tmp_path / "test")))
    with pytest.raises(InputError, match="--test lists clips of --data, which is not given"):
        split(pack, argparse.Namespace(data=None, test=str(tmp_path / "test")))


def test_clips_are_known_by_their_sound_in_another_pack_at_another_size_and_place(tmp_path, capsys):
    first, second = many(tmp_path / "first", 30, 3), tmp_path / "second"
    with PackWriter(second, 16, "toy") as writer:
        for i in (50, 3, 29, 51):
            writer.add(drawn(2, 16), noise(2, i), "x", f"{i}.mp4")
    parts = split(first)
    checkpoint = dict(clips={part: first.fingerprints[parts[part]] for part in ("train", "valid")})
    used = data.clips_used(checkpoint, Pack(second), "net.pt")
    assert data.find_clips(Pack(second), *used.values()).tolist() == [1, 2]
    assert capsys.readouterr().err == ""
    used = data.clips_used(dict(clips=12345), first, "old.pt")  # of before
    assert sorted(data.find_clips(first, *used.values())) == sorted({*range(30)} - {*parts["test"].tolist()})
    assert "old.pt: does not list its training clips" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# items


def test_the_source_is_never_one_of_the_driving_frames_but_any_other(pack):
    seen = set()
    for n in range(400):
        item = Clips(pack, 5, seed=1, flip=False)[n]
        frames = item["frames"].tolist()
        if item["clip"] == 2:
            continue  # three frames: there is no other
        assert frames == list(range(frames[0], frames[0] + 5)) and frames[-1] < LENGTHS[item["clip"]]
        whole = to_tensor(pack.frames(item["clip"], range(LENGTHS[item["clip"]])))
        source = int((whole - item["source"]).abs().mean((1, 2, 3)).argmin())
        assert torch.equal(whole[source], item["source"]) and source not in frames
        assert torch.equal(whole[frames], item["driving"])
        seen.add((item["clip"], source))
    assert len(seen) == 30 + 11  # every frame can be the source


def test_sound_and_frames_of_an_item_are_of_the_same_moments(pack):
    data_set = Clips(pack, 4, seed=2, context=2)
    for n in range(20):
        item = data_set[n]
        first = int(item["frames"][0])
        heard = mel_windows(log_mel(pack.sound(item["clip"])), np.arange(first - 2, first + 6))
        assert (item["mel"].numpy() == heard).all() and item["mel"].shape == (8, 1, 80, 16)


def test_a_clip_shorter_than_the_window_stands_still_at_its_end(pack):
    item = next(item for n in itertools.count() if (item := Clips(pack, 5, 0, flip=False)[n])["clip"] == 2)
    assert item["frames"].tolist() == [0, 1, 2, 2, 2]
    assert torch.equal(item["driving"][4], item["driving"][2])
    assert item["mel"].shape == (5, 1, 80, 16)


def test_an_item_is_mirrored_as_a_whole_or_not_at_all(pack):
    flips = 0
    for n in range(40):
        plain, item = Clips(pack, 4, 5, flip=False)[n], Clips(pack, 4, 5)[n]
        flipped = not torch.equal(plain["source"], item["source"])
        for key in ("source", "driving"):
            assert torch.equal(plain[key].flip(-1) if flipped else plain[key], item[key])
        assert torch.equal(plain["mel"], item["mel"]) and plain["frames"].tolist() == item["frames"].tolist()
        flips += flipped
    assert 8 <= flips <= 32  # half of 40, +-4 standard deviations


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@pytest.mark.parametrize("make", [lambda pack, seed: Clips(pack, 4, seed), Frames])
def test_item_n_depends_on_seed_and_n_alone(pack, make):
    forwards = [make(pack, 7)[n] for n in range(6)]
    again = make(pack, 7)
    assert all(same(again[n], forwards[n]) for n in (5, 0, 3))
    assert not all(same(make(pack, 8)[n], forwards[n]) for n in range(6))


def test_batches_are_the_same_with_any_number_of_workers_and_from_any_position(pack):
    clips = Clips(pack, 4, seed=9)
    whole = list(itertools.islice(batches(clips, 3), 5))
    assert whole[0]["driving"].shape == (3, 4, 3, SIZE, SIZE) and whole[0]["mel"].shape == (3, 4, 1, 80, 16)
    assert whole[0]["identity"].dtype == torch.int64
    for start, workers in ((0, 2), (2, 0), (2, 1)):
        part = itertools.islice(batches(clips, 3, start, workers), 5 - start)
        assert all(same(a, b) for a, b in zip(part, whole[start:], strict=True))


def test_single_pictures_are_drawn_by_person_and_not_by_clip(tmp_path):
    with PackWriter(tmp_path / "p", 16, "toy") as writer:
        for i in range(7):
            writer.add(drawn(2, 16), noise(2, i), "many" if i < 6 else "one", str(i))
    frames = Frames(Pack(tmp_path / "p"), seed=0)
    ones = sum(frames[n]["identity"] for n in range(300))
    assert 115 <= ones <= 185  # half of 300, +-4 standard deviations; by clip it would be 43
    assert frames[0]["image"].shape == (3, 16, 16)


def test_mixed_datasets_give_their_shares_and_item_n_of_each(pack):
    frames, others = Frames(pack, seed=1), [dict(image=n) for n in range(400)]
    mixed = Mixed(frames, others, share=0.25, seed=3)
    taken = [n for n in range(400) if mixed[n] == dict(image=n)]
    assert 70 < len(taken) < 130
    n = next(n for n in range(400) if n not in taken)
    assert torch.equal(mixed[n]["image"], frames[n]["image"])


def test_datasets_keep_to_the_clips_they_are_given(pack):
    assert {Clips(pack, 2, seed=0, clips=[1])[n]["clip"] for n in range(20)} == {1}
    assert {Frames(pack, seed=0, clips=[1])[n]["identity"] for n in range(20)} == {int(pack.identity[1])}


def test_a_click_and_a_flash_at_one_time_are_in_the_same_frame_of_an_item(tmp_path):
    """The click is at second t; frame floor(25 t) flashes. In each item that shows the flash, the sound's
    loudest moment must be in the middle of that frame's mel window, and of no other's."""
    for seconds in (0.42, 1.0, 1.37):
        k = int(25 * seconds)
        frames = np.zeros((50, 16, 16, 3), np.uint8)
        frames[k] = 255
        wav = np.zeros(50 * 640, np.float32)
        wav[int(16000 * seconds) : int(16000 * seconds) + 20] = 0.9
        with PackWriter(tmp_path / str(k), 16, "toy") as writer:
            writer.add(frames, wav, "a", "b")
        clips, shown = Clips(Pack(tmp_path / str(k)), 6, seed=0), 0
        for n in range(60):
            item = clips[n]
            flash = item["driving"].mean((1, 2, 3)) > 0
            if flash.any():
                shown += 1
                loud = (item["mel"] - audio.SILENCE).sum((1, 2))  # (T, 16): five steps hear the click
                centre = (loud * torch.arange(16)).sum(1) / loud.sum(1)  # (T,) mel steps; NaN: not heard
                distance = (centre - 7.5).abs().nan_to_num(99)
                assert int(distance.argmin()) == int(flash.int().argmax())
                assert (
                    float(distance[flash]) <= 1.6 + 0.5 + 0.2
                )  # half a frame, rounding, length of the click
        assert shown > 3


# ------------------------------------------------------------------------------------------------------------
# videos -> pack


def bright_faces(frames):
    """A detector's stand-in: a face in what is bright"""
    found = []
    for frame in frames:
        h, w = frame.shape[:2]
        found.append([(w * 0.3, h * 0.2, w * 0.7, h * 0.8, 0.9)] if frame.mean() > 25 else [])
    return found


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """Two videos, six files of rubbish, and a detector that finds a face in what is bright."""
    monkeypatch.setattr(data, "find_faces", bright_faces)
    folder = tmp_path / "videos"
    (folder / "anna").mkdir(parents=True)
    for name, frames, wav in (
        ("anna/-long name.mp4", drawn(40, 64, 10.0), noise(40, 1)),
        ("bob.mkv", drawn(20, 64, 80.0), noise(20, 2)),
        ("black.mp4", drawn(20, 64) * 0, noise(20, 2)),
        ("brief.mp4", drawn(5, 64, 90.0), noise(5, 2)),
        ("mute.mp4", drawn(20, 64, 90.0), None),
    ):
        with VideoWriter(folder / name, 64, 64, wav) as video:
            for frame in frames:
                video.write(frame)
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes((folder / "bob.mkv").read_bytes()[:900])
    return folder


def manifest(out):
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return {line["path"]: line for line in lines}


def reason(line):
    return line.get("reason") or line["segments"][0]["reason"]


def test_a_folder_of_videos_becomes_a_pack_and_a_manifest_of_every_file(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(faces, "SEGMENT", 25)
    prepare.prepare(videos, tmp_path / "out", 32)
    pack, lines = Pack(tmp_path / "out"), manifest(tmp_path / "out")
    assert len(lines) == 8
    assert pack.identities == ["anna", "bob"] and pack.n_frames.tolist() == [20, 20, 20]  # 40 is shared out evenly
    assert pack.source(1).endswith("-long name.mp4#20") and pack.template == "face"
    whole = media.load_audio(videos / "anna/-long name.mp4")
    assert np.abs(pack.sound(1)[:9600] - whole[12800 : 12800 + 9600]).max() < 1e-4  # frame 20 is second .8
    shades = [brightness(pack.frame(c, k)) for c, k in ((0, 0), (0, 19), (1, 0), (1, 19))]
    assert np.allclose(np.diff(shades), (19 * 5, 5, 19 * 5), atol=6)
    said = {name: reason(line) for name, line in lines.items()}
    assert said["anna/-long name.mp4"] == said["bob.mkv"] == ""
    assert "no face (a face in 0 of" in said["black.mp4"] and "no face for long enough" in said["brief.mp4"]
    assert "has no sound" in said["mute.mp4"] and "is empty" in said["empty.mp4"]
    assert "not a video" in said["notes.txt"] and said["cut.mp4"]
    assert prepare.contact_sheet(pack, columns=2).size == (64, 64)


def test_several_processes_write_the_same_pack_as_one(videos, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # inherits the stand-in for the detector
    monkeypatch.setattr(data.multiprocessing, "get_context", lambda method: fork)
    prepare.prepare(videos, tmp_path / "one", 32, person="anna")
    prepare.prepare(videos, tmp_path / "three", 32, workers=3, person="anna")
    assert Pack(tmp_path / "three").identities == ["anna"]
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "three" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_file_that_meets_a_bug_is_a_line_and_the_others_go_on(videos, tmp_path, monkeypatch):
    real = data.probe
    monkeypatch.setattr(data, "probe", lambda path: 1 // 0 if path.suffix == ".mkv" else real(path))
    prepare.prepare(videos, tmp_path / "out", 32)
    assert Pack(tmp_path / "out").identities == ["anna"]
    assert manifest(tmp_path / "out")["bob.mkv"]["reason"].startswith("ZeroDivisionError")


def test_the_voice_alone_goes_into_the_pack_where_that_is_asked_for(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "isolate_voice", lambda wav: 0.25 * wav)
    for isolate in (False, True):
        prepare.prepare(videos, tmp_path / str(isolate), 32, isolate=isolate)
    whole, voice = (Pack(tmp_path / name).sound(0) for name in ("False", "True"))
    assert np.abs(whole).max() > 0.01 and np.abs(voice - 0.25 * whole).max() < 2 / 32768


def test_the_box_is_in_pixels_of_the_source_and_one_for_the_clip(videos, tmp_path):
    prepare.prepare(videos, tmp_path / "out", 32)
    box = Pack(tmp_path / "out").box[0]
    assert np.allclose(box, data.face_box([(64 * 0.3, 64 * 0.2, 64 * 0.7, 64 * 0.8, 0.9)], "face"), atol=0.02)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three pictures: one that is the crop already, one with a face in its left half, one without."""

    def detector(image, margins=None):
        h, w = image.shape[:2]
        points = np.array(TEMPLATES["face"].points) * h
        if image.mean() < 30:
            return []
        return [(0, 0, h, h, 0.9, *(points + 0.01 * h).ravel())]

    monkeypatch.setattr(data, "detect_faces", detector)
    monkeypatch.setattr(data, "find_faces", bright_faces)
    folder = tmp_path / "photos"
    (folder / "anna").mkdir(parents=True)
    y, x = np.mgrid[:40, :70]
    wide = np.stack([2 * x + 40, 5 * y, 0 * x + 90], -1).astype(np.uint8)
    for name, picture in (("anna/1.png", wide[:, :40]), ("anna/2.png", wide), ("black.png", wide * 0)):
        Image.fromarray(picture).save(folder / name)
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def test_mfcc_of_a_window_are_those_of_the_whole_clip(tmp_path):
    wav = noise(40, 5)
    with data.PackWriter(tmp_path / "pack", 16, "toy") as pack:
        pack.add(drawn(40, 16), wav, "a", "a")
    pack = Pack(tmp_path / "pack")
    clips, whole = Clips(pack, 9, seed=1, mfcc=2), audio.mfcc(pack.sound(0))
    for item in (clips[n] for n in range(5)):
        first = 4 * (int(item["frames"][0]) + 2)  # the window's third frame
        np.testing.assert_allclose(item["mfcc"], whole[:, first : first + 20], rtol=1e-5, atol=1e-4)
    assert "mfcc" not in Clips(pack, 9, seed=1)[0]


def test_a_pack_is_cropped_by_the_template_that_it_records(videos, tmp_path):
    for template in ("face", "ffhq"):
        out = tmp_path / f"{videos.name}-{template}"
        prepare.prepare(videos, out, 32, template=template)
        assert Pack(out).template == template
    small, large = (Pack(tmp_path / f"{videos.name}-{template}").box[0] for template in ("face", "ffhq"))
    assert 1.6 < (large[2] - large[0]) / (small[2] - small[0]) < 1.7  # as the distance of the eyes
    with pytest.raises(InputError, match="holds a pack|other options"):
        prepare.prepare(videos, tmp_path / f"{videos.name}-ffhq", 32, template="face")


def test_photos_become_clips_of_one_frame_without_sound(photos, tmp_path):
    prepare.prepare(photos, tmp_path / "out", 32)
    pack, lines = Pack(tmp_path / "out"), manifest(tmp_path / "out")
    assert pack.n_frames.tolist() == [1, 1] and pack.identities == ["anna"] and pack.sound(0).shape == (0,)
    assert pack.box[0].tolist() == [0, 0, 40, 40]  # square and nearly our crop: whole
    assert np.allclose(pack.box[1], [0.4, 0.4, 40.4, 40.4], atol=0.01)
    assert "no face" in lines["black.png"]["reason"] and "cut.jpg" in lines["cut.jpg"]["reason"]
    assert Frames(pack, seed=0)[3]["image"].shape == (3, 32, 32)
    with pytest.raises(InputError, match="photos only"):
        Clips(pack, 5, seed=0)


def test_an_archive_of_jpegs_is_a_folder_of_photos(photos, tmp_path):
    files = []
    for path in ("anna/1.png", "anna/2.png", "black.png"):
        content = io.BytesIO()
        Image.open(photos / path).save(content, "JPEG", quality=100, subsampling=0)
        files.append(content.getvalue())
    offset = np.cumsum([0, *map(len, files)])
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    np.savez(tmp_path / "a.npz", jpeg=jpeg, offset=offset, name=np.array(["x/ö.jpg", "y.jpg", "z.jpg"]))
    prepare.prepare(tmp_path / "a.npz", tmp_path / "out", 40)
    pack = Pack(tmp_path / "out")
    assert pack.identities == ["ö", "y"] and pack.source(1).endswith("a.npz#y.jpg")
    assert np.abs(pack.frame(0, 0).astype(int) - np.array(Image.open(photos / "anna/1.png"))).mean() < 2
    assert "no face" in manifest(tmp_path / "out")["a.npz#z.jpg"]["reason"]
    np.savez(tmp_path / "b.npz", jpeg=jpeg, offset=offset)
    with pytest.raises(InputError, match="b.npz: expected an .npz with jpeg, offset and name"):
        prepare.prepare(tmp_path / "b.npz", tmp_path / "out2", 40)


def test_windows_are_drawn_from_videos_in_a_pack_that_holds_photos_too(tmp_path):
    with PackWriter(tmp_path / "mixed", SIZE, "toy") as writer:
        for i, count in enumerate((1, 20, 1, 1)):
            writer.add(drawn(count), noise(count, i)[: 640 * count if count > 1 else 0], str(i), "x")
    clips = Clips(Pack(tmp_path / "mixed"), 5, seed=0)
    assert {clips[n]["clip"] for n in range(20)} == {1}


KILLED = """
import os, sys, signal, random
import data
sys.path.insert(0, sys.argv[1])
from tests.test_data import bright_faces
data.find_faces = bright_faces
real, lives = data.PackWriter.add_encoded, [int(sys.argv[4])]
def mortal(*args, **options):
    real(*args, **options)
    lives[0] -= 1
    if not lives[0]:
        os.kill(os.getpid(), signal.SIGKILL)  # the clip is in the pack, the manifest does not say so yet
data.PackWriter.add_encoded = mortal
faces.SEGMENT = 12
prepare.prepare(data.Path(sys.argv[2]), data.Path(sys.argv[3]), 32)
"""


def test_a_preparation_killed_again_and_again_ends_as_if_it_had_not_been(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(faces, "SEGMENT", 12)
    prepare.prepare(videos, tmp_path / "whole", 32)
    assert Pack(tmp_path / "whole").identity.tolist() == [0, 0, 0, 0, 1]
    out = tmp_path / "out"
    for lives in (2, 5):  # within the first file; behind it, within the second
        command = [sys.executable, "-c", KILLED, ROOT, videos, out, str(lives)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        with open(out / "manifest.jsonl", "a") as log:
            log.write('{"path": "torn li')
    prepare.prepare(videos, out, 32)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


ORPHANS = r"""
import os, sys, time
import data
def slow(job):
    os.write(1, b"working\n")  # in one piece: two processes share the pipe
    time.sleep(600)
prepare.work = slow
if __name__ == "__main__":
    data.multiprocessing.get_context = lambda method, get=data.multiprocessing.get_context: get("fork")
    list(prepare.in_order([1, 2], 2))
"""


def test_an_index_of_a_hundred_thousand_clips_is_mapped_and_not_read(tmp_path):
    n, k = 100_000, 5
    columns = dict(n_frames=np.full(n, k), n_samples=np.full(n, 640 * k), identity=np.arange(n) % 7)
    columns |= dict(box=np.zeros((n, 4)), fps=np.full(n, 25), source_start=np.arange(n + 1) * 3)
    columns |= dict(frame_start=np.arange(n + 1) * k, sound_start=np.arange(n + 1) * 640 * k)
    columns["jpeg_start"] = np.arange(n * k + 1) * 11
    for name, kind in data.INDEX.items():
        np.save(tmp_path / f"{name}.npy", np.asarray(columns[name], kind))
    for name, size in (("frames.bin", n * k * 11), ("sound.bin", 2 * n * k * 640), ("sources.txt", 3 * n)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # holes: takes no room
    identities = list("abcdefg")
    (tmp_path / "meta.json").write_text(json.dumps(dict(format=1, size=8, template="toy", identities=identities)))
    tracemalloc.start()
    pack = Pack(tmp_path)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 100_000, f"{held} bytes"  # a byte a clip: NumPy tells tracemalloc of what it allocates
    assert len(pack) == n and pack.n_frames[n - 1] == k and pack.windows(n - 1, [0, 1]).shape == (2, 1, 80, 16)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork are Unix's")
def test_workers_die_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline() for _ in range(2)] == 2 * ["working\n"]
    parent.kill()
    assert parent.stdout.read() == ""  # the pipe's end: nobody holds it any more


def scripted(frames, boxes):
    """find_faces for frames whose top left pixel is their number: boxes[number] is the list of faces there."""
    return [[(*box, 0.9) for box in boxes(int(frame[0, 0, 0]))] for frame in frames]


def numbered(count, shade=lambda k: 100):
    frames = np.stack([np.full((60, 80, 3), shade(k), np.uint8) for k in range(count)])
    frames[:, 0, 0] = np.arange(count)[:, None]
    return list(frames)


def cut_up(monkeypatch, frames, boxes):
    """The clips (begin, end, left edge of the box) that faces.segments makes, and the reasons of the rest."""
    monkeypatch.setattr(data, "find_faces", lambda views: scripted(views, boxes))
    found = faces.segments(frames)
    assert [piece[0] for piece in found] == [0, *(piece[1] for piece in found[:-1])] and found[-1][1] == len(frames)
    left = TEMPLATES["face"].side / 2 * 20 - 10  # how much wider the crop is than a box 20 pixels wide
    clips = [(a, b, round(box[0] + left)) for a, b, box, _ in found if box]
    return clips, [reason for *_, box, reason in found if not box]


def test_scene_changes_end_clips_and_flicker_does_not(monkeypatch):
    cut = numbered(60, lambda k: 40 if k < 33 else 200)
    assert np.flatnonzero(np.diff(faces.scenes(cut))).tolist() == [32]
    assert faces.scenes(numbered(60, lambda k: 100 + 40 * (k % 2))).max() == 0  # each change is like its neighbours
    assert faces.scenes(numbered(60, lambda k: 4 * k)).max() == 0
    assert faces.scenes(numbered(1)).tolist() == [0]
    clips, _ = cut_up(monkeypatch, cut, lambda k: [(10, 10, 30, 30)])
    assert clips == [(0, 33, 10), (33, 60, 10)]


def test_short_gaps_are_bridged_and_long_ones_end_a_clip(monkeypatch):
    def boxes(k):
        return [] if 20 <= k < 30 or 50 <= k < 75 else [(10, 10, 30, 30)]

    clips, reasons = cut_up(monkeypatch, numbered(110), boxes)
    assert clips == [(0, 46, 10), (75, 110, 10)] and len(reasons) == 1 and "no face" in reasons[0]


def test_of_several_faces_the_largest_for_longest_is_taken(monkeypatch):
    def boxes(k):  # one stays, a larger one comes for a moment, a small one for longer than the first
        return [(10, 10, 30, 30)] * (k < 70) + [(40, 5, 70, 35)] * (20 <= k <= 30) + [(60, 40, 70, 50)]

    clips, _ = cut_up(monkeypatch, numbered(100), boxes)
    assert clips[0] == (0, 66, 10) and len(clips) == 1


def test_faces_that_pass_each_other_keep_their_tracks():
    pairs = [[(2 * i, 5, 2 * i + 20, 25, 0.9), (60 - 2 * i, 40, 80 - 2 * i, 60, 0.9)] for i in range(12)]
    looks = [pair if i % 2 else pair[::-1] for i, pair in enumerate(pairs)]
    tracks = faces.face_tracks(looks, np.zeros(12))
    assert [len(track) for track in tracks] == [12, 12]
    assert all(np.ptp([face[1] for face in track.values()]) == 0 for track in tracks)


def test_a_face_that_walks_is_cut_into_steady_clips_and_one_that_runs_is_none(monkeypatch):
    clips, _ = cut_up(monkeypatch, numbered(120), lambda k: [(k // 3, 10, k // 3 + 20, 30)])
    assert len(clips) == 4 and clips[0][0] == 0 and clips[-1][1] == 120
    assert all(a[1] == b[0] and 5 <= b[2] - a[2] <= 15 for a, b in itertools.pairwise(clips))

    def boxes(k):
        return [(9 * k % 50, 10, 9 * k % 50 + 20, 30)]

    monkeypatch.setattr(data, "find_faces", lambda views: scripted(views, boxes))
    with pytest.raises(InputError, match="moves too far|less than half"):
        faces.segment_box(numbered(40))


class Listener:
    """A sync expert's stand-in that calls the sound `late` frames late, or fitting nowhere."""

    size, template = 32, "face"


@pytest.mark.parametrize("late, fit", [(2, 1.5), (-3, 1.5), (1, 1.5), (0, -1.0)])
def test_the_sync_check_moves_the_sound_and_drops_what_does_not_fit(videos, tmp_path, monkeypatch, late, fit):
    import syncnet

    monkeypatch.setattr(prepare, "sync_expert", lambda path: Listener())
    monkeypatch.setattr(syncnet, "embed", lambda expert, crops, mel, device: (len(crops), mel))
    monkeypatch.setattr(syncnet, "by_shift", lambda expert, face, sound: None)
    monkeypatch.setattr(syncnet, "best_offset", lambda table: (late, 3.0, fit))
    (videos / "notes.txt").unlink()
    if fit < 0:
        with pytest.raises(InputError, match="no clip in 7 files"):
            prepare.prepare(videos, tmp_path / "out", 32, sync=Path("sync.pt"))
        assert reason(manifest(tmp_path / "out")["bob.mkv"]) == "mouth and sound do not fit"
        return
    prepare.prepare(videos, tmp_path / "out", 32, sync=Path("sync.pt"))
    pack, whole = Pack(tmp_path / "out"), media.load_audio(videos / "bob.mkv")
    moved = pack.sound(1)
    assert manifest(tmp_path / "out")["bob.mkv"]["segments"][0]["late"] == late and len(moved) == 20 * 640
    begin = 640 * late * (abs(late) > 1)  # what was heard at frame k + late is heard at k; one frame is its error
    expected = np.pad(whole, 20 * 640)[20 * 640 + begin : 40 * 640 + begin]
    assert np.abs(moved - expected).max() < 1e-4


def script(*args):
    env = os.environ | dict(TORCH_HOME="/nonexistent", OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, ROOT / "prepare.py", *map(str, args)], capture_output=True, text=True, env=env
    )


def test_the_script_refuses_a_missing_folder_in_one_line(tmp_path):
    done = script(tmp_path / "none", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"prepare.py: {tmp_path}/none: no such directory")


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_faces", bright_faces)
    (tmp_path / "videos").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "videos"), str(tmp_path / "file" / "out")])
    with pytest.raises(InputError, match="file/out: cannot be written"):
        prepare.main()


def test_nothing_to_pack_is_one_line_and_no_pack(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_faces", bright_faces)
    (tmp_path / "videos").mkdir()
    with pytest.raises(InputError, match="no clip in 0 files"):
        prepare.prepare(tmp_path / "videos", tmp_path / "out", 32)
    with pytest.raises(InputError, match="unfinished"):
        Pack(tmp_path / "out")


def test_without_a_detector_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_faces", lambda frames: None)
    (tmp_path / "videos").mkdir()
    with pytest.raises(InputError, match="TORCH_HOME"):
        prepare.prepare(tmp_path / "videos", tmp_path / "out", 32)
    assert not (tmp_path / "out").exists()


def test_real_clips_are_packed_with_the_real_detector(tmp_path, monkeypatch):
    shared = ROOT.parent / "shared"
    clips = sorted((shared / "media" / "grid_s1").glob("*.mp4"))[:1]
    if not clips or not (shared / "weights" / "torch_home").is_dir():
        pytest.skip("../shared has no clips or no detector's weights here")
    monkeypatch.setenv("TORCH_HOME", str(shared / "weights" / "torch_home"))
    (tmp_path / "videos").mkdir()
    shutil.copy(clips[0], tmp_path / "videos")
    prepare.prepare(tmp_path / "videos", tmp_path / "out", 64)
    pack = Pack(tmp_path / "out")
    assert len(pack) == 1 and 74 <= pack.n_frames[0] <= 75
    assert pack.frame(0, 40).std() > 20  # a face, not a wall
