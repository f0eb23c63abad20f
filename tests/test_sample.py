"""sample.py: length, synchrony of sound and picture, the face in the photo, refusals in one line before slow work."""

import os
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io.wavfile
import torch
from PIL import Image

import audio
import faces
import landmarks
import media
import sample
from checkpoint import save_checkpoint
from faces import TEMPLATES, crop_face, parse_box
from fusion import FCTFG, Config, extract_blinks, load_model
from media import InputError, load_audio, load_photo, read_video, to_tensor
from motion import Motion
from warp import Pose

RATE = 16000
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small untrained network in a file as train.py writes them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    small = dict(dim=24, n_mlp=2, base=256, cap=32, encoder_width=8, linear=8, map_code=8)
    model = FCTFG(Config.at(32, **small, map_channels=(16, 8, 4)))
    networks = dict(model=model.state_dict())
    save_checkpoint(path, dict(kind="weights", format=1, config=asdict(model.config), networks=networks))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a square drawn face and 0.83 s of sound; no face detector."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "detect_faces", lambda image, **_: [])
    monkeypatch.setattr(sample, "turn_upright", lambda photo: (photo, [], ""))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save("face.png")
    scipy.io.wavfile.write("speech.wav", RATE, noise(13200))
    return tmp_path


def noise(n):
    return np.random.default_rng(n).integers(-9000, 9000, n).astype(np.int16)


def talk(*args, weights, face="face.png", speech="speech.wav"):
    sample.main(["--device", "cpu", "--weights", str(weights), *map(str, args), "--", str(face), str(speech)])


def shape_of(path):
    frames = list(read_video(path))
    return len(frames), *frames[0].shape


# ------------------------------------------------------------------------------------------------------------
# the video


@pytest.mark.parametrize("n, frames", [(1, 1), (20800, 33), (20799, 32)])
def test_the_video_has_25_frames_a_second_of_speech(folder, weights, n, frames):
    scipy.io.wavfile.write("speech.wav", RATE, noise(n))
    talk(weights=weights)
    assert shape_of("talk.mp4") == (frames, 32, 32, 3)
    assert abs(len(load_audio("talk.mp4")) - n) < 1100  # AAC works in blocks of 1024
    assert sorted(os.listdir()) == ["face.png", "speech.wav", "talk.mp4"]


def test_the_script_writes_the_video_and_reports_it_in_one_line(folder, weights, capsys, monkeypatch):
    files = ["face.png", "speech.wav", "--weights", str(weights), "--out", "a.mp4"]
    monkeypatch.setattr(sys, "argv", [sample.__file__, *files, "--device", "cpu"])
    runpy.run_path(sample.__file__, run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert shape_of("a.mp4")[0] == 21 and "a.mp4" in last and "21 frames" in last and "0.84 s" in last


class LoudFrames:
    """Replaces the network: a frame is bright when its own mel window is loudest in the middle."""

    config, mouth, pose = SimpleNamespace(size=16, template="toy", voice_norm=False), None, None

    def animate(self, source, mel, driving=None, sway=True, batch=7, deltas=None, mouth=None):
        mel = torch.cat(list(mel))
        assert source.shape == (3, 16, 16) and mel.shape[1:] == (1, 80, 16)
        loud = (mel[:, 0].amax(1) + 4).double() ** 8  # (n, 16)
        heard = (loud * torch.arange(16)).sum(1) / loud.sum(1).clamp_min(1e-9)
        bright = (loud.sum(1) > 0) & ((heard - 7.5).abs() <= 1.6)  # half a frame on both sides
        frames = torch.where(bright[:, None, None, None], 1.0, -1.0).expand(-1, 3, 16, 16)
        if driving is not None:
            frames = frames + 0 * torch.stack(list(driving))
        yield from frames.split(batch)


def test_a_click_appears_in_the_frame_of_its_sound(folder, monkeypatch):
    wav = np.zeros(2 * RATE, np.int16)
    clicks = [0, 11, 26, 47]
    for k in clicks:
        wav[640 * k + 320] = 32000
    scipy.io.wavfile.write("speech.wav", RATE, wav)
    monkeypatch.setattr(sample, "load_model", lambda path, device: LoudFrames())
    talk("--crop", weights="-")
    bright = [k for k, frame in enumerate(read_video("talk.mp4")) if frame.mean() > 128]
    heard = abs(load_audio("talk.mp4")[: 2 * RATE]).reshape(50, 640).max(1)
    assert bright == clicks == sorted(heard.argsort()[-4:].tolist())


def test_the_same_command_gives_the_same_frames(folder, weights):
    talk("--out", "a.mp4", weights=weights)
    talk("--out", "b.mp4", weights=weights)
    scipy.io.wavfile.write("speech.wav", RATE, noise(13201))
    talk("--out", "c.mp4", weights=weights)
    a, b = (np.stack(list(read_video(name))) for name in ("a.mp4", "b.mp4"))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(load_audio("a.mp4"), load_audio("c.mp4"))


AWKWARD = ['-a face\'s "best" %d [x];&$(touch y).png', "http:x.png"]


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_file_names_are_read_and_written(folder, weights, name):
    speech, out = Path(name).with_suffix(".wav"), Path(name).with_suffix(".mp4")
    os.rename("face.png", name)
    os.rename("speech.wav", speech)
    talk(f"--out={out}", weights=weights, face=name, speech=speech)
    assert shape_of(out)[0] == 21 and sorted(os.listdir()) == sorted([name, str(speech), str(out)])


def test_speech_may_be_in_a_video_and_the_photo_in_any_mode(folder, weights):
    picture = Image.open("face.png").resize((64, 62)).convert("LA")  # nearly square, grey, with alpha
    picture.save("odd.png")
    media.write_video("clip.mp4", iter(np.zeros((14, 32, 32, 3), np.uint8)), 14, noise(9000) / 32768)
    talk(weights=weights, face="odd.png", speech="clip.mp4")
    assert 14 <= shape_of("talk.mp4")[0] <= 16


# ------------------------------------------------------------------------------------------------------------
# the face in the photo


def options(**kw):
    return SimpleNamespace(**dict(face="f.png", box=None, number=None, toy=False) | kw)


def test_the_face_is_in_the_box_or_the_chosen_detection_or_a_square_drawing(monkeypatch):
    tall, square = np.zeros((90, 60, 3), np.uint8), np.zeros((60, 61, 3), np.uint8)
    two = [(10, 10, 40, 40, 0.9), (40, 50, 50, 60, 0.8)]

    def found(photo, template, faces=two, **kw):
        monkeypatch.setattr(sample, "turn_upright", lambda photo: (photo, faces, ""))
        return sample.find_photo_face(photo, options(**kw), template)[1:]

    monkeypatch.setattr(sample, "photo_size", lambda path: (120, 180))  # shrunk while it was read
    assert found(tall, "face", box="20,40,60,100")[0] == (5, 20, 35, 50)  # made square
    box, how = found(tall, "face")
    assert box == faces.face_box(two, "face", 1) and "largest of 2" in how
    at = how.removeprefix("face at ").split(", the")[0]
    again = found(tall, "face", box=at)[0]  # the message has the format of --box: pixels of the file, inside it
    np.testing.assert_allclose(np.mean(np.reshape(again, (2, 2)), 0), np.mean(np.reshape(box, (2, 2)), 0), atol=1)
    monkeypatch.setattr(sample, "photo_size", lambda path: (119, 178))
    edge = found(tall, "face", faces=[(30, 60, 62, 92, 0.9)])[1].removeprefix("face at ")
    assert sample.parse_box(edge, 119, 178, 1)  # inside the file
    monkeypatch.setattr(sample, "photo_size", lambda path: (120, 180))
    assert found(tall, "face", number=2)[0] == faces.face_box(two, "face", 2)
    assert found(square, "face")[0] == faces.face_box(two, "face", 1)
    box, how = found(square, "toy")  # detectors find no drawn faces
    assert box == (0.5, 0, 60.5, 60) and "taken whole" in how
    assert found(tall, "toy")[0] == faces.face_box(two, "toy", 1)


def test_a_photo_on_its_side_is_turned_with_a_message(monkeypatch):
    upright, face = np.ones((60, 90, 3), np.uint8), (10, 10, 40, 40, 0.9)
    monkeypatch.setattr(sample, "photo_size", lambda path: (90, 60))
    monkeypatch.setattr(sample, "turn_upright", lambda photo: (upright, [face], "by 180 degrees"))
    photo, box, how = sample.find_photo_face(np.zeros((90, 60, 3), np.uint8), options(), "face")
    assert photo is upright and box == faces.face_box([face], "face")
    assert how.startswith("turned by 180 degrees, face at ") and how.endswith("(--box needs an upright file)")


def test_a_drawn_portrait_is_recognised_and_pictures_of_things_are_not():
    assert sample.is_drawn(media.load_photo(sample.TOY_PHOTO))
    y, x = np.mgrid[:90, :90] / 90
    sky = np.stack([150 * y + 60, 120 + 100 * y, 255 - 60 * y], -1)
    land = np.where((y > 0.6 + 0.1 * np.sin(9 * x))[..., None], [60, 110, 40], sky)  # a landscape
    disc = np.where(((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1)[..., None], [150, 40, 30], [245, 245, 240])  # a thing
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3))
    for picture in (sky, land, disc, noise, 0 * sky, 0 * sky + 255):
        assert not sample.is_drawn(picture.astype(np.uint8))


def test_frames_of_a_grey_photo_are_grey(folder, weights, monkeypatch):
    written = []
    monkeypatch.setattr(sample, "write_video", lambda out, frames, *args: written.extend(frames))
    Image.open("face.png").resize((40, 40)).save("face.png")  # larger than the network's picture
    Image.open("face.png").convert("L").save("grey.png")
    for how, face, colour in ((["--crop"], "grey.png", False), ([], "grey.png", False), ([], "face.png", True)):
        written.clear()
        talk(*how, "--overwrite", weights=weights, face=face)
        assert (np.ptp(written, -1).max() > 0) == colour and len(written) == 21, (how, face)


def test_a_missing_face_is_refused_in_one_line_that_suggests_box(monkeypatch):
    tall, square = np.zeros((90, 60, 3), np.uint8), np.zeros((60, 60, 3), np.uint8)

    def no_weights(photo):
        raise InputError("no weights")

    for found in (lambda photo: (photo, [], ""), no_weights):
        monkeypatch.setattr(sample, "turn_upright", found)
        for image in (tall, square):
            with pytest.raises(InputError, match="--box x0,y0,x1,y1"):
                sample.find_photo_face(image, options(), "face")
    with pytest.raises(InputError, match="--face 2"):
        monkeypatch.setattr(sample, "turn_upright", lambda photo: (photo, [(1, 1, 9, 9, 0.9)], ""))
        sample.find_photo_face(tall, options(number=2), "face")


def test_photos_get_face_weights_and_square_drawings_toy_weights(monkeypatch):
    tall, square, drawn = np.zeros((90, 60, 3), np.uint8), np.zeros((60, 61, 3), np.uint8), np.ones((60, 61, 3), np.uint8)
    monkeypatch.setattr(sample, "is_drawn", lambda photo: photo is drawn)

    def picked(photo, **kw):
        return sample.pick_weights(photo, options(**dict(weights=None) | kw))

    assert picked(tall) == picked(square) == picked(None) == sample.FACE_WEIGHTS
    assert picked(drawn) == sample.TOY_WEIGHTS
    assert picked(drawn, box="1,1,9,9") == picked(drawn, number=1) == sample.FACE_WEIGHTS
    assert picked(square, toy=True) == sample.TOY_WEIGHTS
    assert picked(drawn, weights="my.pt") == Path("my.pt")


# ------------------------------------------------------------------------------------------------------------
# frames of the generator pasted into the photo


def test_a_large_photo_is_shrunk_to_even_sides_with_its_box():
    photo = np.zeros((1000, 2561, 3), np.uint8)
    small, box = sample.limit_size(photo, (256.1, 100, 512.2, 200))
    assert small.shape == (500, 1280, 3)
    np.testing.assert_allclose(box, (128, 50, 256, 100))
    assert sample.limit_size(photo[:, :1280], (1, 2, 3, 4))[0].shape == (1000, 1280, 3)
    assert sample.limit_size(photo[:, :999], (1, 2, 3, 4))[0].shape == (1000, 999, 3)


BOX = (20.5, 10.2, 84.5, 74.2)  # 64 pixels


def striped_photo():
    """90 x 100, grey with stripes of one pixel, finer than a network of 16 pixels can show"""
    photo = np.full((90, 100, 3), 128, np.uint8)
    photo[:, ::2] += 40
    return photo


def pasting(turning=False, still=0.2, mask=None):
    photo = striped_photo()
    source = media.to_tensor(faces.crop_face(photo, BOX, 16))
    mask = sample.soft_box(16, (0, 0, 1, 1)) if mask is None else mask
    return photo, sample.Paste(photo, BOX, source, torch.full_like(source, still), mask, turning)


def stripes(picture):
    return float(np.abs(np.diff(picture[40:50, 45:60].astype(int), axis=1)).mean())


def test_without_a_change_the_photo_stays_bit_for_bit():
    photo, paste = pasting()
    np.testing.assert_array_equal(paste(torch.full((3, 16, 16), 0.2)), photo)
    out = paste(torch.rand(3, 16, 16))  # changes stay inside the crop
    inside = np.zeros(photo.shape[:2], bool)
    inside[10:75, 20:85] = True
    assert (out != photo)[inside].any() and not (out != photo)[~inside].any()
    np.testing.assert_array_equal(photo, striped_photo())  # the photo itself is not modified


def test_a_small_change_keeps_the_photos_detail_and_a_large_one_removes_it():
    photo, paste = pasting()
    patch = torch.zeros(3, 16, 16)
    patch[:, 4:12, 4:12] = 1
    small, large = paste(0.2 + 0.04 * patch), paste(0.2 + 0.4 * patch)
    assert stripes(photo) == stripes(small) == 40 and stripes(large) < 1
    # the middle: change 0.04 and 0.4 of 127.5 a unit; the still's wrong colour does not matter
    for out, change in ((small, 0.04), (large, 0.4)):
        assert abs(out[40:50, 45:61].mean() - photo[40:50, 45:61].mean() - 127.5 * change) < 1


def test_a_turning_head_is_replaced_completely_in_the_photos_colours():
    photo, paste = pasting(turning=True)
    same = paste(torch.full((3, 16, 16), 0.2))
    assert stripes(same) < 1 and abs(same[40:50, 45:61].mean() - 148) < 1  # no detail, the photo's grey
    np.testing.assert_array_equal(same[:10], photo[:10])


def test_nothing_changes_outside_the_mask():
    mask = sample.soft_box(16, faces.TEMPLATES["face"].mouth)
    photo, paste = pasting(mask=mask)
    frame = torch.full((3, 16, 16), 0.2)
    frame[:, 3:14, 4:12] += 0.7
    changed = (paste(frame) != photo).any((1, 2))
    assert changed[52:64].all() and not changed[:38].any()


class Smiler(LoudFrames):
    """Its face at rest is -0.5 all over, its inversion of any photo 0.5."""

    mouth = None

    def reconstruct(self, source, deltas=None):
        return torch.full_like(source, 0.5)

    def animate(self, source, mel, driving=None, sway=True, batch=7, deltas=None, mouth=None):
        assert not sway and (mel == -4).all()  # silence
        yield torch.full((len(mel), *source.shape), -0.5)


@pytest.mark.parametrize("photo, mouth", [(-0.5, -0.5), (0.5, 0.5), (0.2, 0.2), (0.9, 0.5), (-0.9, -0.5)])
def test_the_still_mixes_rest_and_inversion_to_fit_the_photos_mouth(photo, mouth):
    still, mask = sample.still_and_mask(Smiler(), torch.full((3, 16, 16), photo), False)
    assert mask[11, 8] == 1 and mask[6, 5] > 0.9 and mask[0].max() == 0
    torch.testing.assert_close(still[:, 11, 8], torch.full((3,), mouth))
    torch.testing.assert_close(still[:, 6, 5], torch.full((3,), -0.5))
    still, mask = sample.still_and_mask(Smiler(), torch.full((3, 16, 16), photo), True)
    assert (still == 0.5).all() and mask[8, 8] == 1 and mask[0].max() < 0.1 and mask[:, 0].max() < 0.1


def example_crop() -> torch.Tensor:
    photo = media.load_photo(sample.EXAMPLE_PHOTO)
    return media.to_tensor(faces.crop_face(photo, faces.parse_box(sample.EXAMPLE_BOX, *photo.shape[1::-1]), 128))


def test_with_a_mouth_code_the_still_has_the_lips_of_the_photo_and_the_mask_is_their_box():
    model, source = load_model(sample.FACE_WEIGHTS), example_crop()
    still, mask = sample.still_and_mask(model, source, False)
    x0, y0, x1, y1 = (round(128 * v) for v in TEMPLATES["face"].lips)
    below = mask[round(0.45 * 128):]  # without the eyes
    assert below[:, :x0].max() == below[:, x1:].max() == mask[y1:].max() == 0 and mask[100, 64] == 1
    shut = next(model.animate(source, torch.full((5, 1, 80, 16), audio.SILENCE), sway=False))[2]
    of_lips = (slice(None), slice(y0, y1), slice(x0, x1))
    errors = [(x - model.reconstruct(source))[of_lips].abs().mean() for x in (still, shut)]
    assert errors[0] < 0.03 and errors[0] < 0.4 * errors[1]  # she smiles


def test_blinks_are_the_brief_part_of_idle_motion():
    t = torch.arange(75.0)
    idle = torch.stack([torch.sin(t / 12), torch.cos(t / 9), 0.02 * torch.randn(75)], -1)[None].repeat(2, 1, 1)
    idle[1, 40:45, 2] += 3
    brief = extract_blinks(idle)
    assert brief[0].abs().max() < 0.5 and brief[1, 41:44, 2].min() > 2
    brief[1, 40:45] = 0
    assert brief[1].abs().max() < 0.5


def test_between_blinks_a_pasted_photo_keeps_its_eyes():
    model, source = load_model(sample.FACE_WEIGHTS), example_crop()
    still, _ = sample.still_and_mask(model, source, False)
    silence = torch.full((30, 1, 80, 16), audio.SILENCE)  # the first blink starts in frame 36
    frames = torch.cat(list(model.animate(source, silence, sway=False)))
    eyes = sample.soft_box(128, TEMPLATES["face"].eyes)
    assert ((frames - still).abs().mean(1) * eyes).sum() / (30 * eyes.sum()) < 0.02


def test_the_video_shows_the_whole_photo_and_only_the_face_moves(folder, weights):
    photo = np.random.default_rng(1).integers(0, 255, (10, 14, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    Image.fromarray(photo).save("photo.png")
    talk("--box=40,20,90,70", weights=weights, face="photo.png")
    frames = np.stack(list(read_video("talk.mp4"))).astype(int)
    assert frames.shape == (21, 100, 140, 3)
    assert abs(frames[:, :16] - photo[:16]).mean() < 12 and abs(frames[:, :, 100:] - photo[:, 100:]).mean() < 12
    talk("--box=40,20,90,70", "--crop", "--overwrite", weights=weights, face="photo.png")
    assert shape_of("talk.mp4") == (21, 32, 32, 3)
    talk("--overwrite", weights=weights)  # smaller than the network's picture
    assert shape_of("talk.mp4") == (21, 32, 32, 3)


@pytest.mark.parametrize("crop", [False, True])
def test_the_shipped_face_keeps_its_mouth_shut_in_silence_and_opens_it_to_speech(crop):
    if not sample.TOY_WEIGHTS.exists():
        pytest.skip("weights/toy.pt is not there")
    model, photo = load_model(sample.TOY_WEIGHTS), media.load_photo(sample.TOY_PHOTO)
    source = media.to_tensor(faces.crop_face(photo, (0, 0, *photo.shape[:2]), model.config.size))
    speech = load_audio(HERE.parent / "examples/speech.wav")[: 2 * RATE]
    show = media.to_uint8 if crop else sample.Paste(
        photo, (0, 0, *photo.shape[:2]), source, *sample.still_and_mask(model, source, False), False)

    def mouth(wav):  # how much its pixels change over the clip
        mel = torch.from_numpy(audio.sound_windows(wav, range(8, 40, 4)))
        frames = [show(f) for batch in model.animate(source, mel, sway=False) for f in batch]
        frames = np.stack(frames).astype(float)
        h, w = frames.shape[1:3]
        return frames[:, int(0.6 * h):int(0.85 * h), int(0.3 * w):int(0.7 * w)].std(0).mean()

    assert mouth(speech) > 5 and mouth(np.zeros(2 * RATE, np.float32)) < 0.8  # levels of 255


# ------------------------------------------------------------------------------------------------------------
# the driving video


def numbered_video(path, count, height=40, width=40, rate=25):
    """A video in which frame k has brightness 8 k"""
    command = [media.get_ffmpeg_exe(), "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(rate), "-i", "-", "-crf", "1", str(path)]
    data = np.arange(count, dtype=np.uint8).repeat(height * width * 3) * 8
    subprocess.run(command, input=data.tobytes(), check=True)


@pytest.mark.parametrize("length, expected", [
    (4, [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]), (30, [*range(15)]), (1, [0] * 15)])
def test_a_short_driving_video_is_played_back_and_forth_and_a_long_one_is_cut(folder, length, expected):
    numbered_video("d.mp4", length)
    count, crops = sample.driving_crops("d.mp4", 15, 16, "toy")
    frames = list(sample.play_ping_pong(crops, count, 15))
    assert all(f.shape == (16, 16, 3) for f in frames)
    assert [round(frame.mean() / 8) for frame in frames] == expected


def test_each_scene_of_the_driving_video_is_cropped_by_one_box_around_its_face(folder, monkeypatch):
    frames = np.zeros((30, 80, 120, 3), np.uint8)
    frames[:, 40:60, 70:90] = 255  # the "face"
    frames[10:20] = 60
    frames[10:20, 10:50, 20:60] = 255
    frames[20:] = 128              # a scene without a face has the box of the one before

    def look(image, margins):
        scale, corner = image.shape[0] / 80, image[5, 5, 0]
        face = (20, 10, 60, 50) if corner > 30 else (70, 40, 90, 60)
        return [(*(v * scale for v in face), 0.9)] if corner < 100 else []

    monkeypatch.setattr(sample, "detect_faces", look)
    media.write_video("d.mp4", iter(frames), len(frames))
    count, crops = sample.driving_crops("d.mp4", 40, 16, "face")
    crops = np.stack(list(crops))
    assert count == 30 and crops.shape == (30, 16, 16, 3)
    inside = crops[:, 2:-2, 2:-2]
    assert inside[:20].min() > 230 and abs(inside[20:] - 128.0).max() < 5
    boxes = sample.find_driving_faces("d.mp4", 40, "face")[1]
    assert (boxes[0] != boxes[1]).any() and (boxes[1] == boxes[2]).all()
    media.write_video("late.mp4", iter(frames[::-1][:20]), 20)
    boxes = sample.find_driving_faces("late.mp4", 40, "face")[1]
    assert (boxes[0] == boxes[1]).all()
    monkeypatch.setattr(sample, "detect_faces", lambda image, margins: [])
    with pytest.raises(InputError, match="no upright face"):
        sample.driving_crops("d.mp4", 6, 16, "face")


def test_the_networks_own_frames_move_as_the_photo_does(folder, monkeypatch):
    seen, mouths, points = [], [], np.zeros((9, 68, 2))

    def driven(*args):
        seen.append(args[4])
        return Motion(np.ones((9, 6)), np.ones(9), np.ones(9))

    def animate(self, source, mel, driving=None, sway=True, deltas=None, mouth=None):
        seen.append((driving, deltas))
        mouths.append(mouth)
        yield torch.zeros(21, 3, 128, 128)

    monkeypatch.setattr(FCTFG, "animate", animate)
    monkeypatch.setattr(FCTFG, "reconstruct", lambda self, source, deltas: seen.append((source, deltas)) or source)
    monkeypatch.setattr(sample, "fit_to_photo", lambda *args: [*map(np.shape, args[4:6]), args[6]])
    monkeypatch.setattr(sample, "track_video", lambda net, path, n: seen.append((path, n)) or (points, np.zeros(9)))
    monkeypatch.setattr(sample, "measure_eyes", lambda points: (np.ones((9, 2)), np.ones((9, 2))))
    monkeypatch.setattr(sample, "driving_motion", driven)
    numbered_video("d.mp4", 9)
    Image.new("RGB", (80, 80), (200, 60, 40)).save("face.png")
    for options in ("--crop --driving d.mp4 --blink 0.5", "--crop --refine 7", "--crop --still", "--network",
                    "--network --driving d.mp4"):
        talk("--box=4,4,76,76", "--overwrite", *options.split(), weights=sample.FACE_WEIGHTS)
    (path, n), limits, (motion, fitted), (sway, refined), (still, _), inverted, rest, pasted = seen[:8]
    assert (path, n) == ("d.mp4", 21) and 15 < limits[1] < limits[0] < 30
    assert (motion.poses == 1).all() and (motion.blinks == 0.5).all()
    assert sway.poses.any() and not still.poses.any() and sway.poses.shape == (21, 6)
    assert rest[0] is None and not pasted[0].poses.any()
    turned = seen[-1][0].poses
    assert (turned[:, :3] == 1).all() and not turned[:, 3:].any(), "a pasted head turns at its place"
    assert not mouths[2][:, 1:].any() and len(mouths[2][:, 0].unique()) == 1, "in silence the lips are those of the photo"
    monkeypatch.setattr(sample, "detect_speech", lambda wav, n: np.ones(n))
    monkeypatch.setattr(FCTFG, "predict_lips", lambda self, mel: (np.linspace(0, 0.2, 21), np.ones((21, 5))))
    monkeypatch.setattr(FCTFG, "read_opening", lambda self, source: 0.07)
    monkeypatch.setattr(sample, "fit_to_photo", lambda *args: args[4:6])
    for strength in "012":
        talk("--box=4,4,76,76", "--overwrite", "--crop", "--mouth", strength, weights=sample.FACE_WEIGHTS)
    own, once, twice = mouths[-3:]
    torch.testing.assert_close((twice - own)[:, 1:], 2 * (once - own)[:, 1:], atol=1e-4, rtol=1e-4)
    slope, offset = load_model(sample.FACE_WEIGHTS).motion.opening.tolist()
    expected = np.minimum(sample.PAINTED_GAIN * np.linspace(0, 0.2, 21), sample.PAINTED_LIMIT)
    np.testing.assert_allclose(slope * once[:, 0] + offset, expected, atol=1e-4)
    np.testing.assert_allclose(slope * own[:, 0] + offset, 0.07, atol=1e-4)
    expected = np.minimum(2 * expected - 0.07, sample.PAINTED_LIMIT)
    np.testing.assert_allclose(seen[-1][1][0], expected, atol=1e-6)  # fitted with these lips
    assert refined[2] == 7 and fitted == inverted[1] == rest[1] == pasted[1] == [(21,), (21, 5), sample.FIT_STEPS]


def test_a_network_from_the_middle_of_stage_3_which_has_no_lip_moves_yet_paints_the_lips_that_it_predicts(folder):
    torch.manual_seed(0)
    model = FCTFG(Config.at(16, template="face", hyper="none", dim=32))
    save_checkpoint("stage3.pt", dict(kind="stage3", config=asdict(model.config), ema=dict(model=model.state_dict())))
    talk("--box=2,2,28,28", "--crop", weights="stage3.pt")
    assert shape_of("talk.mp4") == (21, 16, 16, 3)


def test_weights_are_fitted_to_the_photo_in_motion_with_lips_of_the_speech(monkeypatch):
    seen, model, photo = [], load_model(sample.FACE_WEIGHTS), load_photo(sample.EXAMPLE_PHOTO)[::4, ::4]
    monkeypatch.setattr(sample, "FIT_FACES", 4)
    monkeypatch.setattr(FCTFG, "fit_weights", lambda self, *args: seen.append(args) or "deltas")
    lips = model.predict_lips([torch.randn(5, 1, 80, 16), torch.randn(4, 1, 80, 16)])
    box = parse_box(sample.EXAMPLE_BOX, 512, 512, 0.25)  # warp.py enlarges such a small photo
    source = to_tensor(crop_face(photo, box, 128))
    assert sample.fit_to_photo(model, photo, box, source, *lips, 3) == "deltas"
    (given, codes, targets, steps), = seen
    assert given is source and codes.shape == (4, model.config.L, model.config.dim) and steps == 3
    assert targets.shape == (4, 3, 128, 128) and 0.02 < (targets - source).abs().mean() < 0.4
    with torch.inference_mode():
        assert (model.decode(codes) - targets).abs().mean() < (model.decode(codes) - targets.flip(0)).abs().mean()
    assert sample.fit_to_photo(model, photo, box, source, *lips, 0) is None
    monkeypatch.setattr(sample, "landmark_scatter", lambda *_: sample.SCATTER_LIMIT + 0.001)
    assert sample.fit_to_photo(model, photo, box, source, *lips, 3) is None
    monkeypatch.setattr(sample, "landmark_scatter", lambda *_: 0.0)
    monkeypatch.setattr(sample, "find_landmarks", lambda *_: np.zeros((68, 2)))
    assert sample.fit_to_photo(model, photo, box, source, *lips, 3) is None and len(seen) == 1


def test_a_grid_shows_the_photo_the_driving_clip_and_the_result(folder, weights):
    numbered_video("d.mp4", 12)
    Image.new("RGB", (30, 30), (200, 60, 40)).save("face.png")
    talk("--driving", "d.mp4", weights=weights)
    talk("--driving", "d.mp4", "--grid", "--out", "grid.mp4", weights=weights)
    grid, alone = (np.stack(list(read_video(name))).astype(int) for name in ("grid.mp4", "talk.mp4"))
    assert grid.shape == (21, 32, 96, 3)
    assert abs(grid[:, 4:28, 4:28] - (200, 60, 40)).mean() < 5 and abs(grid[:, :, 70:90] - alone[:, :, 6:26]).mean() < 8
    shown = grid[:, 8:24, 40:56].mean((1, 2, 3)) / 8
    np.testing.assert_allclose(shown, [*range(12), *range(10, 1, -1)], atol=0.6)


def test_a_driving_video_does_not_change_the_length(folder, weights):
    media.write_video("d.mp4", iter(np.random.default_rng(0).integers(0, 255, (8, 40, 40, 3), np.uint8)), 8)
    talk("--driving", "d.mp4", weights=weights)
    assert shape_of("talk.mp4") == (21, 32, 32, 3)


# ------------------------------------------------------------------------------------------------------------
# bad input


def refused(capsys, monkeypatch, *args, **kw):
    """Runs the sampler as its script does -> the one line of its error, with exit status 2"""
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit) as caught:
        media.run(lambda: talk(*args, **kw))
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("sample.py: ")
    return captured.err


@pytest.fixture
def nothing_slow(monkeypatch):
    """The test fails if the network starts."""

    def started(*args, **kw):
        raise AssertionError("the network started before all inputs were checked")

    monkeypatch.setattr(FCTFG, "animate", started)
    monkeypatch.setattr(sample, "write_video", started)


def bad_inputs(folder):
    """Writes bad files into the folder -> [(argument of talk, file, expected part of the message)]"""
    good = tuple(folder.joinpath(n).read_bytes() for n in ("face.png", "speech.wav"))
    Path("empty").touch()
    Path("directory").mkdir()
    Path("words.txt").write_text("neither picture nor sound " * 99)
    Path("cut.png").write_bytes(good[0][:-700])
    Path("cut.wav").write_bytes(good[1][:-9000])
    Image.fromarray(np.zeros((40, 70, 3), np.uint8)).save("wide.png")
    scipy.io.wavfile.write("zero.wav", RATE, np.zeros(0, np.int16))
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        scipy.io.wavfile.write(f"{name}.wav", RATE, np.array([0, value, 0.5, 0] * 99, np.float32))
    media.write_video("mute.mp4", iter(np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), np.uint8)), 40)
    whole = Path("mute.mp4").read_bytes()
    Path("cut.mp4").write_bytes(whole[: len(whole) // 3])
    anything = [("missing", "no such file"), ("directory", "directory"), ("empty", "empty")]
    rows = [("face", *row) for row in anything]
    rows += [("face", "words.txt", "not a picture"), ("face", "cut.png", "not a picture")]
    rows += [("face", "speech.wav", "not a picture"), ("face", "wide.png", "--box x0,y0,x1,y1")]
    rows += [("speech", *row) for row in anything]
    rows += [("speech", "words.txt", "not a sound"), ("speech", "cut.wav", "cut short")]
    rows += [("speech", "zero.wav", "0 s"), ("speech", "nan.wav", "NaN"), ("speech", "inf.wav", "inf")]
    rows += [("speech", "mute.mp4", "no sound"), ("speech", "face.png", "not a sound")]
    rows += [("--driving", *row) for row in anything]
    rows += [("--driving", "words.txt", "not a video"), ("--driving", "cut.mp4", "cut short")]
    rows += [("--driving", "face.png", "not a video"), ("--driving", "speech.wav", "no picture")]
    return rows


@pytest.mark.usefixtures("nothing_slow")
def test_every_bad_file_is_refused_in_one_line_before_slow_work(folder, weights, capsys, monkeypatch):
    for what, name, reason in bad_inputs(folder):
        option, kw = ([what, name], {}) if what.startswith("--") else ([], {what: name})
        line = refused(capsys, monkeypatch, *option, weights=weights, **kw)
        assert name in line and reason in line, (what, name, line)
    assert not Path("talk.mp4").exists()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize("option", [["--mouth", "1.5"], ["--blink", "0"], ["--landmarks", "fan"]])
def test_options_without_an_effect_on_generated_frames_are_refused(folder, weights, capsys, monkeypatch, option):
    assert option[0] in refused(capsys, monkeypatch, *option, weights=weights)


def test_the_face_of_a_driving_clip_shorter_than_the_speech_is_searched_in_all_its_frames(folder, monkeypatch):
    face, searched = (9, 9, 40, 40, 0.9), []

    def detect_faces(frame, **_):  # finds a face in the last frame only
        searched.append(frame)
        return [face] if len(searched) == 6 else []

    monkeypatch.setattr(sample, "detect_faces", detect_faces)
    media.write_video("drive.mp4", iter(np.zeros((6, 48, 64, 3), np.uint8)), 6)
    scene, boxes, _ = sample.find_driving_faces("drive.mp4", 1000, "face")
    assert len(scene) == len(searched) == 6 and boxes[0].tolist() == list(faces.face_box([face], "face"))
    monkeypatch.setattr(sample, "detect_faces", lambda frame, **_: searched.append(frame) or [face])
    for n in (8, 9, 15, 16, 23):
        searched.clear()
        media.write_video("drive.mp4", iter(np.zeros((n, 48, 64, 3), np.uint8)), n, overwrite=True)
        sample.find_driving_faces("drive.mp4", 1000, "face")
        assert sample.SEARCHED_FRAMES / 2 < len(searched) <= sample.SEARCHED_FRAMES


@pytest.mark.usefixtures("nothing_slow")
def test_bad_weights_are_refused_in_one_line_with_the_expected_kind(folder, weights, capsys, monkeypatch):
    Path("cut.pt").write_bytes(weights.read_bytes()[:-5000])
    Path("empty.pt").touch()
    Path("directory.pt").mkdir()
    torch.save(Hostile(), "hostile.pt")
    torch.save([1, 2], "list.pt")
    save_checkpoint("other.pt", dict(kind="syncnet", format=1, config={}, networks={}))
    content = torch.load(weights, weights_only=True)
    content["config"]["dim"] += 8
    torch.save(content, "shape.pt")
    for name in ("missing", "cut", "empty", "directory", "hostile", "list", "other", "shape"):
        line = refused(capsys, monkeypatch, weights=f"{name}.pt")
        assert f"{name}.pt" in line, line
    assert "weights" in refused(capsys, monkeypatch, weights="other.pt")
    assert not Path("hacked").exists()


@pytest.mark.usefixtures("nothing_slow")
def test_bad_outputs_and_options_are_refused_in_one_line(folder, weights, capsys, monkeypatch):
    Path("there.mp4").write_bytes(b"x")
    rows = [("--out", "there.mp4", "--overwrite"), ("--out", "no/where.mp4", "no such directory")]
    rows += [("--out", str(folder), "must end in"), ("--out", "a.avi", "must end in")]
    assert "not allowed with" in refused(capsys, monkeypatch, "--still", "--driving", "d.mp4", weights=weights)
    assert "not allowed with" in refused(capsys, monkeypatch, "--box", "0,0,9,9", "--face", "2", weights=weights)
    rows += [("--box", "9,9", "--box"), ("--box", "0,0,99,99", "30x30"), ("--device", "abacus", "--device")]
    for option, value, reason in rows:
        assert reason in refused(capsys, monkeypatch, option, value, weights=weights)
    assert Path("there.mp4").read_bytes() == b"x"


def test_the_output_is_atomic(folder, monkeypatch, capsys):
    """A network that fails halfway leaves the old file as it was, and nothing else."""

    class Failing(LoudFrames):
        def animate(self, source, mel, driving=None, sway=True, deltas=None, mouth=None):
            yield torch.zeros(4, 3, 16, 16)
            assert Path("talk.mp4").read_bytes() == b"old"
            yield torch.full((4, 3, 16, 16), float("nan"))

    Path("talk.mp4").write_bytes(b"old")
    monkeypatch.setattr(sample, "load_model", lambda path, device: Failing())
    monkeypatch.setattr(media, "tqdm", lambda frames, *_, **kw: frames)  # no progress bar around the message
    assert "NaN" in refused(capsys, monkeypatch, "--overwrite", "--crop", weights="w.pt")
    assert Path("talk.mp4").read_bytes() == b"old"
    assert sorted(os.listdir()) == ["face.png", "speech.wav", "talk.mp4"]


SHARED = HERE.parents[1] / "shared/media"


def test_a_real_photo_and_real_speech_give_a_video(tmp_path, weights, monkeypatch):
    photo, speech = SHARED / "photos/portrait_man.jpg", SHARED / "speech/2414-128291-0000.flac"
    if not (photo.exists() and speech.exists()):
        pytest.skip("no real photo and speech at hand")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "turn_upright", lambda photo: (photo, [(119, 125, 265, 271, 0.7)], ""))
    talk(weights=weights, face=photo, speech=speech)
    assert shape_of("talk.mp4")[0] == round(25 * len(load_audio(speech)) / RATE)


# ------------------------------------------------------------------------------------------------------------
# a photo moved by its own pixels


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A working directory with .6 s of sound that comes and goes, as speech does: speech.wav"""
    monkeypatch.chdir(tmp_path)
    scipy.io.wavfile.write("speech.wav", RATE, noise(9600) * (np.arange(9600) % 3200 < 2400))
    return tmp_path


def example(*args):
    photo, box = str(sample.EXAMPLE_PHOTO), sample.EXAMPLE_BOX
    sample.main([photo, "speech.wav", "--box", box, "--device", "cpu", *map(str, args)])


def test_a_still_photo_talks_at_its_own_size_and_changes_only_below_the_eyes(short, monkeypatch):
    frames, write = [], sample.write_video
    monkeypatch.setattr(sample, "write_video",
                        lambda out, made, *args: frames.extend(made) or write(out, iter(frames), *args))
    example("--still", "--blink", 0, "--out", "a.mp4")
    photo = media.load_photo(sample.EXAMPLE_PHOTO)
    changed = np.any([(frame != photo).any(-1) for frame in frames], 0)
    assert len(frames) == 15 and frames[0].shape == photo.shape and changed.sum() > 1000
    assert not changed[:205].any() and len(list(read_video("a.mp4"))) == 15


@pytest.mark.parametrize("driven", [False, True])
def test_a_head_sways_or_follows_the_landmarks_of_a_driving_clip(short, monkeypatch, driven):
    calls = []

    def record(self, *args, **motion):
        calls.append(motion["pose"])
        return self.face.photo

    monkeypatch.setattr(sample.Warp, "__call__", record)
    options = []
    if driven:
        photo = media.load_photo(sample.EXAMPLE_PHOTO)
        turned = (Image.fromarray(photo).rotate(-k, Image.Resampling.BICUBIC, center=(255, 255)) for k in range(12))
        media.write_video("drive.mp4", map(np.array, turned), 12)
        monkeypatch.setattr(landmarks, "detect_faces", lambda frame: [()])
        monkeypatch.setattr(landmarks, "face_box", lambda *a: np.array([134.5, 130.1, 381.7, 377.3]) * 480 / 512)
        options = ["--driving", "drive.mp4"]
    example("--out", "a.mp4", *options)
    if driven:
        monkeypatch.setattr(landmarks, "detect_faces", lambda frame: [])
        with pytest.raises(InputError, match="drive.mp4: no upright face was found"):
            example("--out", "b.mp4", *options)
    calls.sort(key=lambda pose: pose.roll)
    assert len(calls) == 15 and any(pose == Pose() for pose in calls)
    assert (7 < calls[-1].roll < 13 and abs(calls[-1].yaw) < 3) if driven else 0 < max(abs(p.yaw) for p in calls) < 4


def test_a_photo_drawn_by_toy_weights_is_reported_and_a_drawing_in_a_wide_picture_is_not(short, capsys):
    example("--toy", "--out", "a.mp4")
    assert "but examples" not in (out := capsys.readouterr().out) and "is not one: the frames will not resemble" in out
    drawing = media.load_photo(sample.TOY_PHOTO)
    side = len(drawing)
    Image.fromarray(np.pad(drawing, ((0, 0), (0, side), (0, 0)))).save("wide.png")
    sample.main(["wide.png", "speech.wav", "--toy", "--box", f"0,0,{side},{side}", "--crop", "--out", "b.mp4"])
    assert "will not resemble" not in capsys.readouterr().out


def test_a_photo_smaller_than_the_networks_crop_is_shown_whole_and_enlarged(short):
    photo, box = media.load_photo(sample.EXAMPLE_PHOTO), (24, 20, 492, 488)
    Image.fromarray(faces.crop_face(photo, box, 60)).save("small.png")
    at = (np.array(sample.EXAMPLE_BOX.split(","), float) - np.tile(box[:2], 2)) * 60 / 468
    sample.main(["small.png", "speech.wav", "--box", ",".join(map(str, at)), "--out", "a.mp4"])
    assert shape_of("a.mp4")[1] > 100


def test_an_input_is_not_overwritten(short):
    speech = Path("speech.wav").read_bytes()
    media.write_video("d.mp4", iter(np.zeros((5, 48, 64, 3), np.uint8)), 5)
    Path("link.mp4").symlink_to("d.mp4")
    for args in (["d.mp4", "speech.wav"], [str(sample.EXAMPLE_PHOTO), "d.mp4"],
                 [str(sample.EXAMPLE_PHOTO), "speech.wav", "--driving", "link.mp4"]):
        with pytest.raises(InputError, match="d.mp4: is an input as well"):
            sample.main([*args, "--out", "d.mp4", "--overwrite"])
    assert len(list(read_video("d.mp4"))) == 5 and Path("speech.wav").read_bytes() == speech


def test_a_refused_job_leaves_the_number_of_threads(short, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(sample, "THREADS", 3)
    try:
        for _ in range(2):
            with pytest.raises(InputError):
                example("--landmarks", "dlib:missing.dat", "--out", "a.mp4")
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_photo_that_cannot_be_moved_is_refused_in_one_line_with_advice(short, monkeypatch):
    with pytest.raises(InputError, match="save it as"):
        monkeypatch.setenv("TORCH_HOME", str(short))
        example("--landmarks", "fan", "--out", "a.mp4")
    with pytest.raises(InputError, match="--landmarks.*--network"):
        monkeypatch.setattr(sample, "find_landmarks", lambda *a: np.full((68, 2), np.nan))
        monkeypatch.setattr(sample, "landmark_scatter", lambda *a: 0.0)
        example("--out", "a.mp4")
    assert not Path("a.mp4").exists()


def test_mouth_and_blink_scale_the_motion_of_lips_and_eyelids(short, monkeypatch):
    calls = []

    def record(self, opening, shape, **motion):
        calls.append((opening - self.lips.rest_opening, np.abs(shape).max(), motion["blink"]))
        return self.face.photo

    monkeypatch.setattr(sample.Warp, "__call__", record)
    monkeypatch.setattr(sample, "compute_ahead", lambda jobs: (job() for job in jobs))
    monkeypatch.setattr(sample, "idle_motion", lambda n, *_, **__: Motion(np.zeros((n, 6)), np.full(n, 0.8), np.zeros(n)))
    for k, (mouth, blink) in enumerate([(1, 1), (2, 0.5), (0, 0)]):
        example("--mouth", mouth, "--blink", blink, "--still", "--out", f"{k}.mp4")
    one, two, none = np.array(calls).reshape(3, 15, 3)
    np.testing.assert_allclose(two, one * (2, 2, 0.5), atol=1e-6)
    assert (np.abs(one).max(0) > 0.01).all() and not none.any()
    for option, value in (("--mouth", 2.1), ("--blink", 1.5), ("--blink", "nan")):
        with pytest.raises(InputError, match=option):
            example(option, value, "--overwrite", "--out", "0.mp4")


def test_network_and_crop_show_the_generators_frames(short, monkeypatch):
    monkeypatch.setattr(sample, "FIT_STEPS", 2)
    monkeypatch.setattr(sample, "FIT_FACES", 6)
    example("--network", "--out", "whole.mp4")
    example("--crop", "--out", "crop.mp4")
    assert next(read_video("whole.mp4")).shape == (512, 512, 3) and next(read_video("crop.mp4")).shape == (128, 128, 3)
