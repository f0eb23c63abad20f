"""Packs return what was written, one rule holds clips out, item n depends on the seed and n alone."""

import argparse
import itertools
import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import torch

import audio
import data
from audio import log_mel, mel_windows
from data import Clips, Frames, Mixed, Pack, PackWriter, Packs, balance_people, batches, open_packs, split
from media import InputError, to_tensor

SIZE = 24
LENGTHS = (30, 11, 3)  # frames of the three clips of the test pack


def gradient_frames(count, size=SIZE, start=0.0):
    """uint8 (count, size, size, 3): smooth images whose brightness grows with the number of the frame"""
    y, x = np.mgrid[:size, :size] / size
    shade = (start + np.arange(count) * 5)[:, None, None]
    return np.stack([shade + 40 * x, shade + 40 * y, shade + 0 * x + 20], -1).clip(0, 255).astype(np.uint8)


def noise(count, seed):
    """Noise as long as `count` frames, without repetition"""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count * 640).astype(np.float32)


def add_clip(writer, i, count, size=SIZE):
    frames, name = gradient_frames(count, size, 7.0 * i), f"clip {i}, ö.mp4"
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


def test_a_pack_returns_the_frames_sound_and_metadata_that_were_written(pack):
    assert len(pack) == 3 and pack.size == SIZE and pack.template == "toy"
    assert pack.identities == ["person0", "person1"] and pack.identity.tolist() == [0, 1, 0]
    assert pack.n_frames.tolist() == list(LENGTHS)
    assert np.allclose(pack.box[1], (1, 2, 3.5, 4)) and np.isclose(pack.fps[2], 29.97)
    for c, count in enumerate(LENGTHS):
        frames = pack.frames(c, range(count))
        assert frames.shape == (count, SIZE, SIZE, 3) and frames.dtype == np.uint8
        assert np.abs(frames.astype(int) - gradient_frames(count, start=7.0 * c)).max() <= 4  # JPEG, quality 95
        assert np.abs(pack.sound(c) - noise(count, c)).max() <= 1 / 65536 + 1e-7
        assert pack.source(c) == f"clip {c}, ö.mp4"


def test_a_file_name_that_is_not_valid_utf8_is_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff.mp4")
    with PackWriter(tmp_path / "p", 16, "toy") as writer:
        writer.add(gradient_frames(2, 16), noise(2, 0), name, name)
    pack = Pack(tmp_path / "p")
    assert os.fsencode(pack.source(0)) == b"caf\xe9 \xff.mp4" and pack.identities == [name]


def test_sixteen_bit_sound_passes_through_a_pack_unchanged(tmp_path):
    samples = np.array([-32768, -1, 0, 1, 12345, 32767] * 200, np.int16)
    with PackWriter(tmp_path / "p", 16, "toy") as writer:
        writer.add(gradient_frames(2, 16), samples.astype(np.float32) / 32768, "a", "b")
    assert (Pack(tmp_path / "p").sound(0) * 32768 == samples).all()


def test_frames_can_be_read_one_by_one_in_any_order(pack):
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


def test_mel_windows_of_a_pack_equal_those_of_the_whole_sound_even_outside_the_clip(pack):
    ks = [-3, 0, 14, 29, 40]
    assert (pack.windows(0, ks) == mel_windows(log_mel(pack.sound(0)), np.array(ks))).all()
    assert (pack.windows(0, [40]) == audio.SILENCE).all()


def test_a_pack_is_pickled_as_its_path(pack):
    pack.frame(0, 0)
    parcel = pickle.dumps(Clips(pack, 5, 0))
    assert len(parcel) < 1000
    assert (pickle.loads(parcel).pack.frame(1, 4) == pack.frame(1, 4)).all()


@pytest.mark.parametrize("damage", ["no meta", "short frames", "short sound", "short index", "text", "code", "torn meta"])
def test_a_damaged_or_unfinished_pack_is_refused_in_one_line(tmp_path, damage):
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
        names = {"short frames": "frames.bin", "short sound": "sound.bin", "short index": "jpeg_start.npy"}
        path = folder / names[damage]
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


def test_a_missing_directory_and_a_directory_with_a_pack_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        Pack(tmp_path / "none")
    with pytest.raises(InputError, match="holds a pack already"):
        PackWriter(write_pack(tmp_path / "p"), SIZE, "toy")


def test_an_error_while_writing_leaves_no_readable_pack(tmp_path):
    with pytest.raises(ZeroDivisionError), PackWriter(tmp_path / "p", SIZE, "toy") as writer:
        writer.add(gradient_frames(3), noise(3, 0), "a", "b")
        raise ZeroDivisionError
    with pytest.raises(InputError, match="unfinished"):
        Pack(tmp_path / "p")


def test_an_unfinished_pack_continues_after_the_clips_that_are_kept(tmp_path):
    writer = PackWriter(tmp_path / "p", SIZE, "toy")
    for i, count in enumerate(LENGTHS[:2]):
        add_clip(writer, i, count)
    writer.frames.write(b"half a frame of the next clip")
    writer.close_files()
    with PackWriter(tmp_path / "p", SIZE, "toy", n_kept=1) as writer:  # the second clip is written anew
        for i, count in list(enumerate(LENGTHS))[1:]:
            add_clip(writer, i, count)
    whole = write_pack(tmp_path / "whole")
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == names and "journal.jsonl" not in names
    for name in names:
        assert (tmp_path / "p" / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_runs_cannot_write_the_same_pack(tmp_path):
    writer = PackWriter(tmp_path / "p", SIZE, "toy")
    with pytest.raises(InputError, match="another run"):
        PackWriter(tmp_path / "p", SIZE, "toy")
    writer.close_files()
    PackWriter(tmp_path / "p", SIZE, "toy").close_files()


def test_an_unfinished_pack_of_another_size_is_not_continued(tmp_path):
    writer = PackWriter(tmp_path / "p", SIZE, "toy")
    writer.add(gradient_frames(3), noise(3, 0), "a", "b")
    writer.close_files()
    with pytest.raises(InputError, match="other options"):
        PackWriter(tmp_path / "p", 16, "toy", n_kept=1)


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
    assert held < 100_000, f"{held} bytes"  # one byte per clip; tracemalloc counts NumPy's arrays
    assert len(pack) == n and pack.n_frames[n - 1] == k and pack.windows(n - 1, [0, 1]).shape == (2, 1, 80, 16)


# ------------------------------------------------------------------------------------------------------------
# several packs


@pytest.fixture(scope="module")
def three_packs(tmp_path_factory):
    """Packs of 30, 12 and 5 clips of 4, 3 and 1 people. In each pack the people have the names p0, p1, .."""
    folder = tmp_path_factory.mktemp("three")
    return [write_clips(folder / str(n), n, people).folder for n, people in ((30, 4), (12, 3), (5, 1))]


def test_several_packs_read_as_one(three_packs, pack):
    whole, parts = open_packs(three_packs), [Pack(folder) for folder in three_packs]
    assert isinstance(whole, Packs) and len(whole) == 47 and whole.size == 8 and whole.template == "toy"
    assert whole.identities == ["p0", "p1", "p2", "p3", "p0", "p1", "p2", "p0"]  # equal names, different people
    assert whole.identity[[0, 1, 30, 31, 42]].tolist() == [0, 1, 4, 5, 7]
    for c, (part, own) in {0: (0, 0), 29: (0, 29), 30: (1, 0), 41: (1, 11), 42: (2, 0), 46: (2, 4)}.items():
        one = parts[part]
        assert (whole.frames(c, [0, 1]) == one.frames(own, [0, 1])).all() and whole.source(c) == one.source(own)
        assert (whole.windows(c, [0, 1]) == one.windows(own, [0, 1])).all() and whole.n_frames[c] == 2
    assert torch.equal(whole.fingerprints, torch.cat([part.fingerprints for part in parts]))
    assert (pickle.loads(pickle.dumps(whole)).frame(46, 1) == parts[2].frame(4, 1)).all()
    assert type(open_packs(three_packs[:1])) is type(open_packs(three_packs[0])) is Pack
    first = three_packs[0]
    for folders, message in (([first, pack.folder], f"{SIZE} px.* has 8 px"), ([first] * 2, "named twice")):
        with pytest.raises(InputError, match=message) as caught:
            open_packs(folders)
        assert "\n" not in str(caught.value)


def test_shards_of_one_folder_share_its_people(tmp_path):
    for i in range(2):
        with PackWriter(tmp_path / str(i), 8, "toy", shard_of="/videos") as writer:
            for k in range(3):
                writer.add(gradient_frames(2, 8), noise(2, k), f"p{k + i}", f"{k}.mp4")
    whole = open_packs([tmp_path / "0", tmp_path / "1"])
    assert whole.identities == ["p0", "p1", "p2", "p3"] and whole.identity.tolist() == [0, 1, 2, 1, 2, 3]


def test_people_are_held_out_over_all_packs(three_packs, tmp_path):
    folders = [*three_packs, write_clips(tmp_path / "more", 40, 20).folder]  # 28 people: the 10th and the 20th
    whole = open_packs(folders)
    parts = split(whole)
    assert set(whole.identity[parts["valid"]]) == {9} and set(whole.identity[parts["test"]]) == {19}
    assert split(open_packs(three_packs))["valid"].tolist() == [9, 29]  # eight people: every tenth clip


def test_by_person_draws_all_people_equally_often_and_all_of_their_clips(three_packs):
    whole = open_packs(three_packs)
    train = split(whole)["train"]
    assert balance_people(whole, train, options()) is train
    balanced = balance_people(whole, train, options(by_person=True))
    people, count = np.unique(whole.identity[balanced], return_counts=True)
    assert len(people) == 8 and len(set(count)) == 1 and set(balanced) == set(train)
    assert len(set(whole.identity[balanced[:8]])) == 8  # people take turns
    with pytest.raises(InputError, match="--by-person chooses clips of --data"):
        balance_people(whole, train, argparse.Namespace(data=None, by_person=True))


def test_clips_of_any_length_are_drawn_and_short_clips_are_used_as_a_whole(tmp_path):
    whole = open_packs([write_pack(tmp_path / "long", (75, 150)), write_pack(tmp_path / "short", (29, 5))])
    clips, seen = Clips(whole, 5, seed=3, flip=False), {}  # seen: clip -> frames
    for item in (clips[n] for n in range(300)):
        seen.setdefault(item["clip"], set()).update(item["frames"].tolist())
    assert seen[2] == set(range(29)) and seen[3] == set(range(5)) and len(seen[0]) > 70


# ------------------------------------------------------------------------------------------------------------
# held-out clips


def write_clips(folder, clips, people, names="{}/{:05d}.mp4"):
    """A pack of `clips` clips of 2 frames by `people` people in turn, each with a sound of its own"""
    with PackWriter(folder, 8, "toy") as writer:
        for i in range(clips):
            who = f"p{i % people}"
            writer.add(gradient_frames(2, 8), noise(2, i), who, "/videos/" + names.format(who, i // people) + "#0")
    return Pack(folder)


def options(**lists):
    return argparse.Namespace(data="pack", **dict(train=None, valid=None, test=None) | lists)


def test_every_tenth_person_or_clip_is_held_out_in_turn_for_validation_and_test(tmp_path):
    pack = write_clips(tmp_path / "people", 80, 40)
    parts = split(pack)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(80))
    assert parts["valid"].tolist() == [9, 29, 49, 69] and parts["test"].tolist() == [19, 39, 59, 79]
    people = [set(pack.identity[clips].tolist()) for clips in parts.values()]
    assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
    parts = split(write_clips(tmp_path / "clips", 40, 3))
    assert parts["valid"].tolist() == [9, 29] and parts["test"].tolist() == [19, 39] and len(parts["train"]) == 36


def test_a_small_pack_has_its_last_two_clips_held_out_and_one_clip_is_too_few(tmp_path):
    for clips, expected in ((15, ([*range(13)], [13], [14])), (2, ([0], [1], []))):
        assert tuple(part.tolist() for part in split(write_clips(tmp_path / str(clips), clips, 1)).values()) == expected
    with pytest.raises(InputError, match="1 clips leave none to validate on"):
        split(write_clips(tmp_path / "one", 1, 1))


def test_lists_of_clips_and_people_replace_the_rule_for_their_part(tmp_path):
    pack = write_clips(tmp_path / "pack", 40, 4)
    (tmp_path / "test").write_text("p3/00001.mp4\n\n  p2/00002  \n/videos/p0/00000.mp4\n")
    (tmp_path / "train").write_text("p0\np1\n")
    tested = split(pack, options(test=str(tmp_path / "test")))
    assert tested["test"].tolist() == [0, 7, 10] and len(tested["valid"]) == 3  # every tenth of the other 37
    assert sorted(np.concatenate(list(tested.values()))) == list(range(40))
    trained = split(pack, options(train=str(tmp_path / "train")))
    assert set(pack.identity[trained["train"]]) == {0, 1} and len(trained["train"]) == 20
    assert len(trained["valid"]) == len(trained["test"]) == 10  # all other people
    (tmp_path / "two").write_text("p2")
    (tmp_path / "one").write_text("p3/00000")
    lists = dict(train=str(tmp_path / "train"), valid=str(tmp_path / "two"), test=str(tmp_path / "one"))
    parts = split(pack, options(**lists))  # no list has the other clips of p3
    assert parts["test"].tolist() == [3] and len(parts["valid"]) == 10 and len(parts["train"]) == 20


def test_lists_name_photos_with_a_number_sign_and_files_whose_names_are_not_utf_8(tmp_path):
    with PackWriter(tmp_path / "pack", 8, "toy") as writer:
        for i, name in enumerate(("cat#1.jpg", "cat#2.jpg", "f\udcff.mp4#0")):
            writer.add(gradient_frames(2, 8), noise(2, i), f"p{i}", "/photos/" + name)
    for i, line in enumerate((b"cat#1", b"cat#2.jpg", b"f\xff.mp4")):
        (tmp_path / "list").write_bytes(line)
        assert data.read_clip_list(Pack(tmp_path / "pack"), tmp_path / "list").tolist() == [i]


@pytest.mark.parametrize("text, message", [
    ("p1\nnobody", "'nobody' fits no clip and no person"),
    ("00001.mp4", "'00001.mp4' is the name of several files"),
    ("p0/00001", "p0/00001.mp4#0 is in two of them"),
])
def test_lists_that_do_not_match_the_pack_are_refused_in_one_line(tmp_path, text, message):
    pack = write_clips(tmp_path / "pack", 40, 4)
    (tmp_path / "valid").write_text(text)
    (tmp_path / "test").write_text("p0")
    with pytest.raises(InputError, match=message):
        split(pack, options(valid=str(tmp_path / "valid"), test=str(tmp_path / "test")))
    with pytest.raises(InputError, match="--test lists clips of --data, which is not given"):
        split(pack, argparse.Namespace(data=None, test=str(tmp_path / "test")))


def test_used_clips_are_found_by_their_sound_in_a_pack_of_another_size_and_order(tmp_path, capsys):
    first, second = write_clips(tmp_path / "first", 30, 3), tmp_path / "second"
    with PackWriter(second, 16, "toy") as writer:
        for i in (50, 3, 29, 51):
            writer.add(gradient_frames(2, 16), noise(2, i), "x", f"{i}.mp4")
    parts = split(first)
    checkpoint = dict(clips={part: first.fingerprints[parts[part]] for part in ("train", "valid")})
    used = data.find_used_clips(checkpoint, Pack(second), "net.pt")
    assert sorted(np.concatenate([*used.values()])) == [1, 2]
    assert capsys.readouterr().err == ""
    used = data.find_used_clips(dict(clips=12345), first, "old.pt")  # without fingerprints
    assert sorted(np.concatenate([*used.values()])) == sorted({*range(30)} - {*parts["test"].tolist()})
    assert "old.pt: does not list its training clips" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# items


def test_the_source_is_any_frame_except_the_driving_frames(pack):
    seen, clips = set(), [to_tensor(pack.frames(c, range(length))) for c, length in enumerate(LENGTHS)]
    for n in range(400):
        item = Clips(pack, 5, seed=1, flip=False)[n]
        frames = item["frames"].tolist()
        if item["clip"] == 2:
            continue  # its three frames are all driving frames
        assert frames == list(range(frames[0], frames[0] + 5)) and frames[-1] < LENGTHS[item["clip"]]
        whole = clips[item["clip"]]
        source = int((whole - item["source"]).abs().mean((1, 2, 3)).argmin())
        assert torch.equal(whole[source], item["source"]) and source not in frames
        assert torch.equal(whole[frames], item["driving"])
        seen.add((item["clip"], source))
    assert len(seen) == 30 + 11  # every frame can be the source


def test_sound_and_frames_of_an_item_are_aligned(pack):
    data_set, norm = (Clips(pack, 4, seed=2, context=2, voice_norm=n, sync_sound="mel") for n in (False, True))
    for n in range(20):
        item, first = data_set[n], int(data_set[n]["frames"][0])
        for one, mel in ((item, log_mel(pack.sound(item["clip"]))), (norm[n], log_mel(pack.sound(item["clip"]), True))):
            assert (one["mel"].numpy() == mel_windows(mel, np.arange(first - 2, first + 6))).all()
        assert item["mel"].shape == (8, 1, 80, 16) and torch.equal(item["sync_sound"], item["mel"][3])
        assert torch.equal(norm[n]["sync_sound"], item["mel"][3])


def test_a_clip_shorter_than_the_window_repeats_its_last_frame(pack):
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


def test_batches_do_not_depend_on_the_number_of_workers_or_on_the_first_step(pack):
    clips = Clips(pack, 4, seed=9)
    whole = list(itertools.islice(batches(clips, 3), 5))
    assert whole[0]["driving"].shape == (3, 4, 3, SIZE, SIZE) and whole[0]["mel"].shape == (3, 4, 1, 80, 16)
    assert whole[0]["identity"].dtype == torch.int64
    for start, workers in ((0, 2), (2, 0), (2, 1)):
        part = itertools.islice(batches(clips, 3, start, workers), 5 - start)
        assert all(same(a, b) for a, b in zip(part, whole[start:], strict=True))


def test_single_images_are_drawn_by_person_not_by_clip(tmp_path):
    with PackWriter(tmp_path / "p", 16, "toy") as writer:
        for i in range(7):
            writer.add(gradient_frames(2, 16), noise(2, i), "many" if i < 6 else "one", str(i))
    frames = Frames(Pack(tmp_path / "p"), seed=0)
    ones = sum(frames[n]["identity"] for n in range(300))
    assert 115 <= ones <= 185  # half of 300, +-4 standard deviations; by clip it would be 43
    assert frames[0]["image"].shape == (3, 16, 16)


def test_a_change_applies_to_half_of_the_images_before_they_are_mirrored(pack):
    def shifted(frame, c, k, rng):
        assert np.array_equal(frame, pack.frame(c, k))
        return np.roll(frame, c + 1, 1)

    plain, items = Frames(pack, seed=0), [Frames(pack, seed=0, change=shifted)[n] for n in range(200)]
    assert all(torch.equal(item["image"], plain[n]["image"]) for n, item in enumerate(items))
    moved = [not torch.equal(item["image"], item["changed"]) for item in items]
    assert 70 < sum(moved) < 130
    shifts = {tuple(s for s in range(-9, 10) if torch.equal(item["image"].roll(s, 2), item["changed"])) for item in items}
    assert {s for s in shifts if s != (0,)} == {(sign * (c + 1),) for c in range(len(pack)) for sign in (1, -1)}


def test_a_mixed_dataset_draws_item_n_of_either_dataset_by_their_shares(pack):
    frames, others = Frames(pack, seed=1), [dict(image=n) for n in range(400)]
    mixed = Mixed(frames, others, share=0.25, seed=3)
    taken = [n for n in range(400) if mixed[n] == dict(image=n)]
    assert 70 < len(taken) < 130
    n = next(n for n in range(400) if n not in taken)
    assert torch.equal(mixed[n]["image"], frames[n]["image"])


def test_datasets_draw_only_from_the_given_clips(pack):
    assert {Clips(pack, 2, seed=0, clips=[1])[n]["clip"] for n in range(20)} == {1}
    assert {Frames(pack, seed=0, clips=[1])[n]["identity"] for n in range(20)} == {int(pack.identity[1])}


def test_a_click_and_a_flash_at_the_same_time_are_in_the_same_frame_of_an_item(tmp_path):
    """The click is at second t, the flash in frame floor(25 t). In each item with the flash, the loudest moment of the
    sound must be in the middle of that frame's mel window and of no other window."""
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
                loud = (item["mel"] - audio.SILENCE).sum((1, 2))  # (T, 16): the click is in five steps
                centre = (loud * torch.arange(16)).sum(1) / loud.sum(1)  # (T,) mel steps; NaN without the click
                distance = (centre - 7.5).abs().nan_to_num(99)
                assert int(distance.argmin()) == int(flash.int().argmax())
                assert float(distance[flash]) <= 1.6 + 0.5 + 0.2  # half a frame, rounding, length of the click
        assert shown > 3


def test_windows_are_drawn_from_videos_if_a_pack_also_has_photos(tmp_path):
    with PackWriter(tmp_path / "mixed", SIZE, "toy") as writer:
        for i, count in enumerate((1, 20, 1, 1)):
            writer.add(gradient_frames(count), noise(count, i)[: 640 * count if count > 1 else 0], str(i), "x")
    clips = Clips(Pack(tmp_path / "mixed"), 5, seed=0)
    assert {clips[n]["clip"] for n in range(20)} == {1}


def test_mfcc_of_a_window_equal_those_of_the_whole_clip(tmp_path):
    wav = noise(40, 5)
    with data.PackWriter(tmp_path / "pack", 16, "toy") as pack:
        pack.add(gradient_frames(40, 16), wav, "a", "a")
    pack = Pack(tmp_path / "pack")
    clips, whole = Clips(pack, 9, seed=1, sync_sound="mfcc"), audio.mfcc(pack.sound(0))
    for item in (clips[n] for n in range(5)):
        first = 4 * (int(item["frames"][0]) + 2)  # two frames before the middle of nine
        np.testing.assert_allclose(item["sync_sound"], whole[:, first : first + 20], rtol=1e-5, atol=1e-4)
    assert not any("sync_sound" in Clips(pack, 9, seed=1, voice_norm=norm)[0] for norm in (False, True))
