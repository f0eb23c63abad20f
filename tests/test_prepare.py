"""Videos and photos become packs, which do not depend on the number of workers or on killed and continued runs."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import faces
import media
import prepare
from audio import n_frames
from data import Clips, Frames, Pack, PackWriter, open_packs
from faces import TEMPLATES
from media import InputError, write_video
from tests.test_data import brightness, gradient_frames, noise

ROOT = Path(prepare.__file__).parent


def bright_faces(frames):
    """A mock face detector: finds one face in each bright frame"""
    found = []
    for frame in frames:
        h, w = frame.shape[:2]
        found.append([(w * 0.3, h * 0.2, w * 0.7, h * 0.8, 0.9)] if frame.mean() > 25 else [])
    return found


def detect_by(monkeypatch, detector):
    monkeypatch.setattr(faces, "detect_faces_fast", detector)
    monkeypatch.setattr(prepare, "face_detectors", lambda: None)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two usable videos and six other files"""
    folder = tmp_path_factory.mktemp("recorded") / "videos"
    (folder / "anna").mkdir(parents=True)
    for name, frames, wav in (
        ("anna/-long name.mp4", gradient_frames(40, 64, 10.0), noise(40, 1)),
        ("bob.mkv", gradient_frames(20, 64, 80.0), noise(20, 2)),
        ("black.mp4", gradient_frames(20, 64) * 0, noise(20, 2)),
        ("brief.mp4", gradient_frames(5, 64, 90.0), noise(5, 2)),
        ("mute.mp4", gradient_frames(20, 64, 90.0), None),
    ):
        write_video(folder / name, iter(frames), len(frames), wav)
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes((folder / "bob.mkv").read_bytes()[:900])
    return folder


@pytest.fixture
def videos(recorded, tmp_path, monkeypatch):
    """A copy of the recorded files; the mock detector is active"""
    detect_by(monkeypatch, bright_faces)
    return shutil.copytree(recorded, tmp_path / "videos")


@pytest.fixture
def speakers(videos):
    """The two usable videos"""
    for path in [*videos.glob("*.mp4"), videos / "notes.txt"]:
        path.unlink()
    return videos


@pytest.fixture
def speaker(speakers):
    """Bob's video"""
    shutil.rmtree(speakers / "anna")
    return speakers


def manifest(out):
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return {line["path"]: line for line in lines}


def reason(line):
    return line.get("reason") or line["segments"][0]["reason"]


def test_a_folder_of_videos_becomes_a_pack_and_a_manifest_of_every_file(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_CLIP_FRAMES", 25)
    prepare.prepare(videos, tmp_path / "out", 32)
    pack, lines = Pack(tmp_path / "out"), manifest(tmp_path / "out")
    assert len(lines) == 8
    assert pack.identities == ["anna", "bob"] and pack.n_frames.tolist() == [20, 20, 20]  # 40 frames in two equal clips
    assert pack.source(1).endswith("-long name.mp4#20") and pack.template == "face"
    whole = media.load_audio(videos / "anna/-long name.mp4")
    assert np.abs(pack.sound(1)[:9600] - whole[12800 : 12800 + 9600]).max() < 1e-4  # frame 20 is second .8
    shades = [brightness(pack.frame(c, k)) for c, k in ((0, 0), (0, 19), (1, 0), (1, 19))]
    assert np.allclose(np.diff(shades), (19 * 5, 5, 19 * 5), atol=6)
    reasons = {name: reason(line) for name, line in lines.items()}
    assert reasons["anna/-long name.mp4"] == reasons["bob.mkv"] == ""
    assert "no face (a face in 0 of" in reasons["black.mp4"] and "no face for long enough" in reasons["brief.mp4"]
    assert "has no sound" in reasons["mute.mp4"] and "is empty" in reasons["empty.mp4"]
    assert "not a video" in reasons["notes.txt"] and reasons["cut.mp4"]
    assert prepare.contact_sheet(pack, columns=2).size == (2 * 96, 2 * (96 + 18))  # with names


def test_the_pack_does_not_depend_on_the_number_of_processes(videos, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # inherits the mock detector
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    prepare.prepare(videos, tmp_path / "one", 32, person="anna")
    prepare.prepare(videos, tmp_path / "three", 32, workers=3, person="anna")
    assert Pack(tmp_path / "three").identities == ["anna"]
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "three" / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_have_every_nth_file_and_together_equal_the_whole_pack(videos, tmp_path, monkeypatch):
    shutil.copy(videos / "bob.mkv", videos / "anna/second.mkv")
    prepare.prepare(videos, tmp_path / "whole", 32)
    for i in range(2):
        command = f"prepare.py {videos} {videos / 'out'} --size 32 --workers 1 --shard {i}/2"
        monkeypatch.setattr(sys, "argv", command.split())
        prepare.main()
    whole, shards = Pack(tmp_path / "whole"), open_packs([videos / f"out/{i}-of-2" for i in range(2)])
    found = {(shards.identities[shards.identity[c]], shards.source(c), shards.n_frames[c]) for c in range(len(shards))}
    assert len(shards) == 3 and sorted(shards.identities) == whole.identities == ["anna", "bob"]
    assert found == {(whole.identities[whole.identity[c]], whole.source(c), whole.n_frames[c]) for c in range(3)}
    assert sum(len(manifest(pack.folder)) for pack in shards.packs) == 9  # packs inside the folder of videos are skipped


def test_a_shard_is_i_of_n():
    assert prepare.parse_shard("0/1") == (0, 1) and prepare.parse_shard("3/8") == (3, 8)
    for wrong in ("8/8", "1", "-1/3", "a/b"):
        with pytest.raises(InputError, match=f"--shard {wrong}: expected I/N"):
            prepare.parse_shard(wrong)


@pytest.mark.parametrize("given", ["0 3", "3 2", "2 16"])
def test_offsets_run_from_min_to_max(tmp_path, monkeypatch, given):
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path), str(tmp_path / "out"), "--offsets", *given.split()])
    with pytest.raises(InputError, match=f"--offsets {given}: expected 1 <= MIN <= MAX <= 15"):
        prepare.main()


def test_the_census_counts_sizes_frame_rates_and_lengths(videos, capsys):
    (videos / "cut.mp4").unlink()
    prepare.census(prepare.list_files(videos), 2)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert ["| size 64x64", "5", "71.4%", "4 |"] in lines and ["| rate 25 frames/s", "5", "71.4%", "4 |"] in lines
    lengths = [line[:2] for line in lines if "length" in line[0]]
    assert lengths == [["| length 0 to 1 s", "4"], ["| length 1 to 2 s", "1"]]
    assert ["| not a video", "2", "28.6%", "0 |"] in lines


def test_an_exception_in_one_file_is_recorded_and_the_other_files_are_packed(speakers, tmp_path, monkeypatch):
    real = prepare.probe
    monkeypatch.setattr(prepare, "probe", lambda path: 1 // 0 if path.suffix == ".mkv" else real(path))
    prepare.prepare(speakers, tmp_path / "out", 32)
    assert Pack(tmp_path / "out").identities == ["anna"]
    assert manifest(tmp_path / "out")["bob.mkv"]["reason"].startswith("ZeroDivisionError")


def test_lag_shifts_the_sound_against_the_frames(speakers, tmp_path):
    (speakers / "bob.mkv").unlink()
    for lag in (0, 2, -3):
        prepare.prepare(speakers, tmp_path / str(lag), 32, lag=lag)
    (asis, late, early), step = (Pack(tmp_path / str(lag)) for lag in (0, 2, -3)), 16000 // 25
    n = asis.n_frames[0]
    np.testing.assert_array_equal(late.sound(0), asis.sound(0)[2 * step :])  # the last two frames have no sound
    np.testing.assert_array_equal(late.frames(0, range(n - 2)), asis.frames(0, range(n - 2)))
    np.testing.assert_array_equal(early.sound(0), asis.sound(0)[: -3 * step])  # nor have the first three
    np.testing.assert_array_equal(early.frames(0, range(n - 3)), asis.frames(0, range(3, n)))
    assert (late.n_frames[0], early.n_frames[0]) == (n - 2, n - 3) and asis.sound(0).any()


def test_isolate_voice_packs_the_isolated_voice(speaker, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "isolate_voice", lambda wav: 0.25 * wav)
    for isolate in (False, True):
        prepare.prepare(speaker, tmp_path / str(isolate), 32, isolate=isolate)
    whole, voice = (Pack(tmp_path / name).sound(0) for name in ("False", "True"))
    assert np.abs(whole).max() > 0.01 and np.abs(voice - 0.25 * whole).max() < 2 / 32768


def test_each_clip_has_one_box_in_pixels_of_the_source(speaker, tmp_path):
    prepare.prepare(speaker, tmp_path / "out", 32)
    box = Pack(tmp_path / "out").box[0]
    assert np.allclose(box, faces.face_box([(64 * 0.3, 64 * 0.2, 64 * 0.7, 64 * 0.8, 0.9)], "face"), atol=0.02)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three images: one that is already the crop, one with a face in its left half, one without a face"""

    def detector(image, margins=None):
        h, w = image.shape[:2]
        points = np.array(TEMPLATES["face"].points) * h
        if image.mean() < 30:
            return []
        return [(0, 0, h, h, 0.9, *(points + 0.01 * h).ravel())]

    monkeypatch.setattr(prepare, "detect_faces", detector)
    detect_by(monkeypatch, bright_faces)
    folder = tmp_path / "photos"
    (folder / "anna").mkdir(parents=True)
    y, x = np.mgrid[:40, :70]
    wide = np.stack([2 * x + 40, 5 * y, 0 * x + 90], -1).astype(np.uint8)
    for name, picture in (("anna/1.png", wide[:, :40]), ("anna/2.png", wide), ("black.png", wide * 0)):
        Image.fromarray(picture).save(folder / name)
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def test_the_pack_records_the_template_of_its_crops(speaker, tmp_path):
    for template in ("face", "ffhq"):
        prepare.prepare(speaker, tmp_path / template, 32, template=template)
        assert Pack(tmp_path / template).template == template
    small, large = (Pack(tmp_path / template).box[0] for template in ("face", "ffhq"))
    assert 1.6 < (large[2] - large[0]) / (small[2] - small[0]) < 1.7  # the ratio of the eye distances
    with pytest.raises(InputError, match="holds a pack|other options"):
        prepare.prepare(speaker, tmp_path / "ffhq", 32, template="face")


def test_a_photo_with_several_faces_is_searched_again(photos, tmp_path, monkeypatch):
    false, true = (2, 2, 38, 38, 0.9), (40, 10, 60, 30, 0.8)
    monkeypatch.setattr(prepare, "detect_faces",
                        lambda image, margins: [true] if margins == faces.TIGHT_MARGINS else [false, true])
    prepare.prepare(photos, tmp_path / "out", 32)
    assert Pack(tmp_path / "out").box[0].tolist() == pytest.approx(faces.face_box([true], "face"), abs=0.01)


def test_photos_become_clips_of_one_frame_without_sound(photos, tmp_path):
    prepare.prepare(photos, tmp_path / "out", 32)
    pack, lines = Pack(tmp_path / "out"), manifest(tmp_path / "out")
    assert pack.n_frames.tolist() == [1, 1] and pack.identities == ["anna"] and pack.sound(0).shape == (0,)
    assert pack.box[0].tolist() == [0, 0, 40, 40]  # square and nearly the template's crop: used whole
    assert np.allclose(pack.box[1], [0.4, 0.4, 40.4, 40.4], atol=0.01)
    assert "no face" in lines["black.png"]["reason"] and "cut.jpg" in lines["cut.jpg"]["reason"]
    assert Frames(pack, seed=0)[3]["image"].shape == (3, 32, 32)
    with pytest.raises(InputError, match="photos only"):
        Clips(pack, 5, seed=0)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL and fork")


def kill_after(n_clips: int, videos, out):
    """Runs prepare in a child process and kills it after n_clips clips."""
    pid, real, written = os.fork(), prepare.PackWriter.add, []
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        return

    def add_and_die(*args, **options):
        written.append(real(*args, **options))
        if len(written) == n_clips:
            os.kill(os.getpid(), signal.SIGKILL)  # the clip is in the pack but not yet in the manifest

    prepare.PackWriter.add = add_and_die
    try:
        prepare.prepare(videos, out, 32)
    finally:
        os._exit(1)


@needs_fork
def test_a_run_killed_twice_and_continued_writes_the_same_pack(videos, tmp_path, monkeypatch):
    for name in ("brief.mp4", "mute.mp4", "empty.mp4", "cut.mp4"):
        (videos / name).unlink()
    monkeypatch.setattr(prepare, "MAX_CLIP_FRAMES", 12)
    prepare.prepare(videos, tmp_path / "whole", 32)
    assert Pack(tmp_path / "whole").identity.tolist() == [0, 0, 0, 0, 1]
    out = tmp_path / "out"
    for n_clips in (2, 5):  # within the first file; within the second
        kill_after(n_clips, videos, out)
        with open(out / "manifest.jsonl", "a") as log:
            log.write('{"path": "torn li')
    prepare.prepare(videos, out, 32)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


PIPE = []  # read end, write end


def slow(job):
    os.write(PIPE[1], b"working")
    time.sleep(600)


@needs_fork
def test_workers_die_with_a_killed_parent(monkeypatch):
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    PIPE[:] = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            list(media.parallel_map(slow, [1, 2], 2))
        finally:
            os._exit(1)
    os.close(PIPE[1])
    with os.fdopen(PIPE[0], "rb") as pipe:
        assert pipe.read(14) == 2 * b"working"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert pipe.read() == b""  # end of file: no worker holds the pipe open


class SyncExpert:
    """A mock sync expert for crops of 32 px"""

    size, template, logits = 32, "face", None


@pytest.mark.parametrize("late, fit, smallest", [(2, 1.5, 2), (-3, 1.5, 2), (1, 1.5, 2), (1, 1.5, 1), (0, -1.0, 2)])
def test_check_sync_shifts_the_sound_and_drops_clips_that_do_not_fit(
        speaker, tmp_path, monkeypatch, late, fit, smallest):
    monkeypatch.setattr(prepare, "sync_expert", lambda path, device: SyncExpert())
    monkeypatch.setattr(prepare, "embed_clip", lambda expert, crops, mel: (len(crops), mel))
    monkeypatch.setattr(prepare, "logits_by_shift", lambda expert, face, sound: None)
    monkeypatch.setattr(prepare, "best_offset", lambda table, largest: (late, 3.0, fit))
    if fit < 0:
        with pytest.raises(InputError, match="no clip in 1 files"):
            prepare.prepare(speaker, tmp_path / "out", 32, expert=Path("sync.pt"))
        assert reason(manifest(tmp_path / "out")["bob.mkv"]) == "mouth and sound do not fit"
        return
    prepare.prepare(speaker, tmp_path / "out", 32, expert=Path("sync.pt"), offsets=(smallest, 7))
    pack, whole = Pack(tmp_path / "out"), media.load_audio(speaker / "bob.mkv")
    assert manifest(tmp_path / "out")["bob.mkv"]["segments"][0]["late"] == late
    begin = late * (abs(late) >= smallest)  # sound of frame k + late moves to frame k; frames without sound are left out
    first, stop = max(0, begin), min(20 + begin, n_frames(len(whole)))  # the codec adds a fraction of a frame
    assert len(pack.sound(0)) == 640 * pack.n_frames[0] == 640 * (stop - first)
    expected = np.pad(whole, (0, 640))[640 * first : 640 * stop]
    assert np.abs(pack.sound(0) - expected).max() < 1e-4


def test_the_script_refuses_a_missing_folder_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "none"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        media.run(prepare.main)
    line = f"prepare.py: {tmp_path}/none: no such directory (a file? name the folder that holds it)\n"
    assert capsys.readouterr().err == line


def test_an_output_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    detect_by(monkeypatch, bright_faces)
    (tmp_path / "videos").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "videos"), str(tmp_path / "file" / "out")])
    with pytest.raises(InputError, match="file/out: cannot be written"):
        prepare.main()


def test_all_files_are_listed_but_those_of_the_run_itself(tmp_path):
    for name in ("videos/a/1.mp4", "videos/packs/frames.bin", "elsewhere/2.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    videos = tmp_path / "videos"
    (videos / "b").symlink_to(tmp_path / "elsewhere")
    assert prepare.list_files(videos, videos / "packs") == [videos / "a/1.mp4", videos / "b/2.mp4"]
    assert len(prepare.list_files(videos, tmp_path)) == 3  # `out` is above: it holds nothing of the run there
    (videos / "a" / "up").symlink_to(videos)
    assert len(prepare.list_files(videos, tmp_path)) == 3


@pytest.mark.parametrize("out, shard", [("videos", (0, 1)), ("videos/shard", (0, 2))])
def test_the_folder_of_the_videos_is_no_output(tmp_path, monkeypatch, out, shard):
    (tmp_path / "videos").mkdir()
    monkeypatch.setattr(prepare, "face_detectors", lambda: None)
    with pytest.raises(InputError, match="videos: holds the files to read, name another folder"):
        prepare.prepare(tmp_path / "videos", tmp_path / out, 64, shard=shard)
    assert not list((tmp_path / "videos").iterdir())


def test_a_folder_without_files_is_refused_and_leaves_no_pack(tmp_path, monkeypatch):
    detect_by(monkeypatch, bright_faces)
    (tmp_path / "videos").mkdir()
    with pytest.raises(InputError, match="no clip in 0 files"):
        prepare.prepare(tmp_path / "videos", tmp_path / "out", 32)
    with pytest.raises(InputError, match="unfinished"):
        Pack(tmp_path / "out")


def test_after_a_run_without_a_clip_all_files_are_read_again(videos, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(videos / "mute.mp4", tmp_path / "mine/bob.mkv")
    with pytest.raises(InputError, match="no clip in 1 files"):
        prepare.prepare(tmp_path / "mine", tmp_path / "out", 32)
    shutil.copy(videos / "bob.mkv", tmp_path / "mine/bob.mkv")
    prepare.prepare(tmp_path / "mine", tmp_path / "out", 64)
    assert Pack(tmp_path / "out").size == 64 and len(manifest(tmp_path / "out")) == 1


def test_a_full_disk_ends_the_run_and_the_file_is_read_again(speakers, tmp_path, monkeypatch):
    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "read_video", fill)
    with pytest.raises(OSError, match="No space left"):
        prepare.prepare(speakers, tmp_path / "out", 32)
    monkeypatch.undo()
    detect_by(monkeypatch, bright_faces)
    prepare.prepare(speakers, tmp_path / "out", 32)
    assert Pack(tmp_path / "out").identities == ["anna", "bob"]


def test_a_run_is_not_continued_with_other_options(videos, tmp_path, monkeypatch):
    real = PackWriter.add
    monkeypatch.setattr(PackWriter, "add", lambda self, *args: 1 // 0 if self.sources else real(self, *args))
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(videos, tmp_path / "out", 32)
    monkeypatch.setattr(PackWriter, "add", real)
    for options in (dict(lag=2), dict(person="anna"), dict(isolate=True), dict(expert=Path("sync.pt"))):
        with pytest.raises(InputError, match="begun with other options"):
            prepare.prepare(videos, tmp_path / "out", 32, **options)
    prepare.prepare(videos, tmp_path / "out", 32)
    assert len(Pack(tmp_path / "out")) == 2


def test_pictures_after_the_end_of_the_sound_are_listed(tmp_path, monkeypatch):
    detect_by(monkeypatch, bright_faces)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos/a.mp4", iter(gradient_frames(40, 64, 80.0)), 40, noise(25, 2))
    prepare.prepare(tmp_path / "videos", tmp_path / "out", 32)
    packed, rest = manifest(tmp_path / "out")["a.mp4"]["segments"]
    assert packed["outcome"] == "packed" and rest["reason"] == "picture without sound"
    assert packed["frames"] + rest["frames"] == 40


def test_without_a_detector_nothing_is_written(tmp_path, monkeypatch):
    def missing():
        raise InputError("anchors.npy is missing")

    monkeypatch.setattr(prepare, "face_detectors", missing)
    (tmp_path / "videos").mkdir()
    with pytest.raises(InputError, match="anchors.npy is missing"):
        prepare.prepare(tmp_path / "videos", tmp_path / "out", 32)
    assert not (tmp_path / "out").exists()


def test_real_clips_are_packed_with_the_real_detector(tmp_path, monkeypatch):
    shared = ROOT.parent / "shared"
    clips = sorted((shared / "media" / "grid_s1").glob("*.mp4"))[:1]
    if not clips or not (shared / "weights" / "torch_home").is_dir():
        pytest.skip("../shared has no clips or no detector's weights here")
    monkeypatch.setenv("TORCH_HOME", str(shared / "weights" / "torch_home"))
    monkeypatch.setattr(faces, "face_detectors", faces.face_detectors.__wrapped__)  # without the cache
    (tmp_path / "videos").mkdir()
    shutil.copy(clips[0], tmp_path / "videos")
    prepare.prepare(tmp_path / "videos", tmp_path / "out", 64)
    pack = Pack(tmp_path / "out")
    assert len(pack) == 1 and 74 <= pack.n_frames[0] <= 75
    assert pack.frame(0, 40).std() > 20  # a face, not a flat background
