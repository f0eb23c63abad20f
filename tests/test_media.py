"""Sound, photos and videos of every kind are read as a player shows them, or refused in one line."""

import argparse
import errno
import importlib
import os
import signal
import struct
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import numpy as np
import pytest
import scipy.io.wavfile
import soundfile
import torch
from PIL import Image

import media
from audio import n_frames, sound_windows
from media import (
    InputError, check_output, load_audio, load_photo, probe, read_video, to_tensor, to_uint8, write_video,
    write_wav)

RATE = 16000


def noise(n, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, n).astype(np.float32)


def tone(hz, n, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(n) / rate)).astype(np.float32)


def ffmpeg(*args):
    command = [media.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y", *map(str, args)]
    subprocess.run(command, check=True)


def picture(height=20, width=30):
    """Four patches of different colours, so that a wrong rotation or channel order shows."""
    image = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    image[:h, :w], image[:h, w:] = (220, 30, 40), (20, 200, 60)
    image[h:, :w], image[h:, w:] = (30, 50, 210), (240, 230, 90)
    return image


def drawn_frames(count, height, width):
    """Smooth moving waves of colour, easy to encode, every frame different."""
    y, x = np.mgrid[:height, :width] / 16
    t = np.arange(count)[:, None, None]
    channels = 127 + 100 * np.sin(x + 0.3 * t), 127 + 100 * np.cos(y - 0.2 * t), 127 + 80 * np.sin(x + y + 0.1 * t)
    return np.stack(channels, -1).round().astype(np.uint8)  # (count, H, W, 3)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def write(path, frames, wav=None, **kw):
    write_video(path, iter(frames), len(frames), wav, **kw)


# ------------------------------------------------------------------------------------------------------------
# photos


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright_by_its_exif_entry(tmp_path, orientation):
    stored = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    a = picture()
    upright = {  # EXIF standard: operation on the stored rows and columns that turns the picture upright
        1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.transpose(1, 0, 2), 6: np.rot90(a, -1),
        7: a[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(a, 1),
    }[orientation]
    np.testing.assert_array_equal(load_photo(tmp_path / "a.png"), upright)


def test_transparent_parts_are_white(tmp_path):
    rgba = np.dstack([picture(), np.full((20, 30), 255, np.uint8)])
    rgba[:5, :, 3], rgba[5, :, 3] = 0, 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    assert (photo[:5] == 255).all()
    np.testing.assert_array_equal(photo[6:], picture()[6:])
    want = picture()[5] * (128 / 255) + 255 * (127 / 255)
    assert abs(photo[5] - want).max() <= 1


def test_grey_pictures_with_and_without_alpha_keep_their_values(tmp_path):
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "la.png")
    for name in ("l.png", "la.png"):
        np.testing.assert_array_equal(load_photo(tmp_path / name), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_the_white_of_a_float_tiff_follows_its_range(tmp_path, white):
    grey = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    Image.fromarray(grey * white).save(tmp_path / "a.tiff")
    assert abs(load_photo(tmp_path / "a.tiff") - 255 * grey[..., None]).max() <= 0.51
    grey[0, 0] = np.nan
    Image.fromarray(grey * white).save(tmp_path / "nan.tiff")
    with pytest.raises(InputError, match="nan.tiff: .* NaN"):
        load_photo(tmp_path / "nan.tiff")


def icc(space, pcs, **tags):
    """Bytes of an ICC profile (version 2) of a device colour space with these tags."""
    at, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", at + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s12s4s", 128 + len(body), b"", 0x02400000, b"scnr", space, pcs, b"", b"acsp")
    return head + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(128 - len(head) - 28 - 12) + body


def xyz(*v):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * x) for x in v))


def gamma(g):
    return b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(256 * g))


WHITE = xyz(0.9642, 1, 0.8249)
TO_XYZ = dict(  # columns red, green, blue for D50, as in the profiles of these names
    srgb=[[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7139]],
    adobe=[[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]],
    p3=[[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0010, 0.0419, 0.7841]],
    prophoto=[[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0.0, 0.0, 0.8249]],
)


def rgb_profile(name, g):
    columns = dict(zip(("rXYZ", "gXYZ", "bXYZ"), (xyz(*c) for c in np.transpose(TO_XYZ[name]))))
    return icc(b"RGB ", b"XYZ ", wtpt=WHITE, **columns, rTRC=gamma(g), gTRC=gamma(g), bTRC=gamma(g))


def xyz_to_srgb(x):
    """XYZ (.., 3) for D50 -> sRGB in 0..255."""
    x = np.clip(x @ np.linalg.inv(TO_XYZ["srgb"]).T, 0, 1)
    return 255 * np.where(x < 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name, g", [("adobe", 2.2), ("p3", 2.2), ("prophoto", 1.8)])
@pytest.mark.parametrize("kind", ["plain.png", "palette.png", "alpha.png", "plain.tiff", "plain.webp"])
def test_colours_are_converted_by_the_profile_in_the_file(tmp_path, name, g, kind):
    stored = (picture() * 0.6 + 50).astype(np.uint8)
    image = Image.fromarray(stored)
    image = image.quantize(4) if "palette" in kind else image.convert("RGBA") if "alpha" in kind else image
    options = dict(lossless=True) if kind.endswith("webp") else {}
    image.save(tmp_path / kind, icc_profile=rgb_profile(name, g), **options)
    want = xyz_to_srgb((stored / 255) ** g @ np.transpose(TO_XYZ[name]))
    assert abs(want - stored).max() > 12  # the profile matters
    assert abs(load_photo(tmp_path / kind) - want).max() <= 2.5


def test_cmyk_is_converted_by_its_profile(tmp_path):
    corners = np.full((16, 3), 128, np.uint8)  # Lab in bytes, the last ink fastest
    corners[:, 0] = np.where(np.arange(16) % 2, 0, 255)
    corners[4], corners[8] = (130, 178, 118), (140, 100, 90)  # magenta, cyan
    straight = np.arange(256, dtype=np.uint8).tobytes()
    head = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + (65536 * np.eye(3)).astype(">i4").tobytes()
    profile = icc(b"CMYK", b"Lab ", wtpt=WHITE,
                  A2B0=head + 4 * straight + corners.tobytes() + 3 * straight)
    inks = np.zeros((8, 12, 4), np.uint8)
    inks[:, 4:8, 1], inks[:, 8:, 0], inks[4:, :4, 3] = 255, 255, 255
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tiff", icc_profile=profile)
    lab = corners[[0, 4, 8, 1]].astype(float) * [100 / 255, 1, 1] - [0, 128, 128]
    y = (lab[:, 0] + 16) / 116
    f = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], 1)
    want = xyz_to_srgb(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249])
    got = load_photo(tmp_path / "a.tiff")[[1, 1, 1, 6], [1, 6, 10, 1]]
    assert abs(got - want).max() <= 4, (got, want)


def test_grey_stays_grey_by_its_profile_and_an_unusable_profile_is_ignored(tmp_path):
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(grey).save(tmp_path / "a.png", icc_profile=icc(b"GRAY", b"XYZ ", wtpt=WHITE, kTRC=gamma(1)))
    photo = load_photo(tmp_path / "a.png")
    want = xyz_to_srgb((grey / 255)[..., None] * [0.9642, 1, 0.8249])
    assert abs(photo - want).max() <= 3 and (np.ptp(photo, -1) == 0).all()
    Image.fromarray(grey).convert("RGB").save(tmp_path / "rgb.png", icc_profile=rgb_profile("p3", 2.2))
    assert (np.ptp(load_photo(tmp_path / "rgb.png"), -1) == 0).all()
    for profile in (b"no profile", rgb_profile("p3", 2.2)):  # of another colour space
        Image.fromarray(grey).save(tmp_path / "b.png", icc_profile=profile)
        np.testing.assert_array_equal(load_photo(tmp_path / "b.png")[..., 1], grey)


def test_avif_is_read_and_heic_is_refused_with_the_command_to_convert_it(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.avif", quality=95, subsampling="4:4:4")
    assert psnr(load_photo(tmp_path / "a.avif"), picture()) > 30
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    for read in (load_photo, probe):  # ffmpeg takes it for a video
        with pytest.raises(InputError, match="a.heic: is HEIC.*heif-convert"):
            read(tmp_path / "a.heic")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16", "CMYK"])
def test_a_large_photo_is_shrunk_and_photo_size_gives_its_full_size(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(media, "MAX_PHOTO_SIDE", 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(picture(100, 150))
    image = image.convert("L") if mode == "I;16" else image
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    file = tmp_path / ("a.tiff" if mode in ("CMYK", "RGBA") else "a.png")
    image.save(file, exif=exif)
    photo = load_photo(file)
    assert photo.shape == (60, 40, 3) and media.photo_size(file) == (100, 150)
    if mode in ("RGB", "RGBA", "P"):
        np.testing.assert_array_equal(photo[[5, 5, 50, 50], [5, 35, 5, 35]], picture()[[15, 5, 15, 5], [5, 5, 25, 25]])


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_its_brightness(tmp_path, suffix):
    grey = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    photo = load_photo(tmp_path / f"a.{suffix}")
    assert abs(photo[..., 0] - grey / 257).max() <= 1 and (photo[..., 0] == photo[..., 2]).all()


def test_palette_cmyk_and_bilevel_pictures_keep_their_colours(tmp_path):
    source = Image.fromarray(picture())
    source.quantize(16).save(tmp_path / "p.gif")
    source.convert("CMYK").save(tmp_path / "c.jpg", quality=100, subsampling=0)
    source.convert("CMYK").save(tmp_path / "c.tiff")
    for name, tolerance in (("p.gif", 4), ("c.jpg", 12), ("c.tiff", 1)):
        photo = load_photo(tmp_path / name).astype(int)
        inside = np.r_[2:8, 12:18]
        assert abs(photo - picture())[inside][:, 3:12].max() <= tolerance, name
    source.convert("1").save(tmp_path / "1.png")
    assert set(np.unique(load_photo(tmp_path / "1.png"))) == {0, 255}


def test_the_first_picture_of_an_mpo_file_is_read(tmp_path):
    first, second = Image.fromarray(picture(64, 64)), Image.new("RGB", (64, 64))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second], quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert abs(load_photo(tmp_path / "a.jpg")[10, 10].astype(int) - (220, 30, 40)).max() < 8


def test_a_palette_with_transparency_shows_white(tmp_path):
    image = Image.fromarray(picture()).quantize(8)
    clear = image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=clear)
    photo = load_photo(tmp_path / "a.png")
    assert (photo[0, 0] == 255).all() and abs(photo[15, 25].astype(int) - (240, 230, 90)).max() <= 4


def bad_photos(folder):
    (folder / "directory.png").mkdir()
    (folder / "empty.png").touch()
    (folder / "words.jpg").write_text("no picture " * 99)
    (folder / "draw.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "whole.png")
    Image.open(folder / "whole.png").save(folder / "whole.jpg")
    for name in ("png", "jpg"):
        (folder / f"cut.{name}").write_bytes((folder / f"whole.{name}").read_bytes()[:-900])
    Image.new("1", (20000, 10000)).save(folder / "bomb.png")
    return {"missing.png": "no such file", "directory.png": "directory", "empty.png": "empty", "bomb.png": "pixels",
            **dict.fromkeys(("words.jpg", "draw.eps", "cut.png", "cut.jpg"), "not a picture")}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_bad_photo_is_refused_in_one_line_that_names_it(tmp_path):
    for name, reason in bad_photos(tmp_path).items():
        with pytest.raises(InputError) as caught:
            load_photo(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value) and reason in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# tensors


def test_to_uint8_inverts_to_tensor():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    x = to_tensor(images)
    assert x.shape == (2, 3, 5, 7) and x.dtype == torch.float32
    assert x[0, :, 0, 0].tolist() == [-1, -1, -1] and x[0, :, 0, 1].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(to_uint8(x), images)


def test_to_uint8_rounds_clamps_and_refuses_nan():
    x = torch.tensor([-3.0, -0.9999, 0.002, 0.998, 7.0]).expand(3, 2, 5)
    assert to_uint8(x)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    for value in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError):
            to_uint8(torch.full((3, 2, 5), value))


# ------------------------------------------------------------------------------------------------------------
# video: write, then read


def test_a_written_video_is_read_back_frame_by_frame(tmp_path):
    frames = drawn_frames(23, 48, 64)
    write(tmp_path / "a.mp4", frames)
    back = np.stack(list(read_video(tmp_path / "a.mp4")))
    assert back.shape == frames.shape and back.dtype == np.uint8
    for k in range(23):
        quality = [psnr(back[k], frames[j]) for j in range(23)]
        assert int(np.argmax(quality)) == k and quality[k] > 33, (k, quality[k])


def test_flat_colours_survive_the_round_trip(tmp_path):
    for colour in [(250, 20, 20), (20, 20, 250), (255, 255, 255)]:
        write(tmp_path / "a.mp4", np.full((5, 32, 32, 3), colour, np.uint8), overwrite=True)
        back = np.stack(list(read_video(tmp_path / "a.mp4")))
        assert abs(back.astype(int) - colour).max() <= 4, (colour, back[0, 0, 0])


@pytest.mark.parametrize("count, n", [(1, 640), (26, 16321), (30, 9000)])
def test_the_frame_count_is_exact_for_any_length_of_sound(tmp_path, count, n):
    write(tmp_path / "a.mp4", drawn_frames(count, 32, 32), wav=np.zeros(n, np.float32))
    assert sum(1 for _ in read_video(tmp_path / "a.mp4")) == count
    assert abs(len(load_audio(tmp_path / "a.mp4")) - n) <= 1100  # AAC works in blocks of 1024


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_click_and_a_flash_in_one_frame_stay_in_one_frame(tmp_path, suffix):
    frames = np.full((40, 32, 32, 3), 20, np.uint8)
    wav = np.zeros(40 * 640, np.float32)
    for k in (0, 11, 33):
        frames[k] = 235
        wav[640 * k + 300 : 640 * k + 340] = 0.9
    write(tmp_path / f"a{suffix}", frames, wav)
    bright = [f.mean() > 128 for f in read_video(tmp_path / f"a{suffix}")]
    loud = abs(load_audio(tmp_path / f"a{suffix}")[: 40 * 640]).reshape(40, 640).max(1) > 0.3
    assert np.flatnonzero(bright).tolist() == [0, 11, 33] == np.flatnonzero(loud).tolist()


def test_odd_sizes_are_padded_by_a_copy_of_their_border(tmp_path):
    frames = drawn_frames(4, 33, 47)
    write(tmp_path / "a.mp4", frames)
    back = np.stack(list(read_video(tmp_path / "a.mp4")))
    assert back.shape == (4, 34, 48, 3)
    assert psnr(back[:, :33, :47], frames) > 33
    assert psnr(back[:, :33, 47], frames[:, :, 46]) > 25 and psnr(back[:, 33, :47], frames[:, 32]) > 25


@pytest.mark.parametrize("name", ["-y %03d [a'b\"c];&.mp4", "http:x.mp4"])
def test_file_names_with_special_characters_work(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    frames = drawn_frames(3, 32, 32)
    write(name, frames, wav=np.zeros(1920, np.float32))
    assert os.listdir(tmp_path) == [name]
    assert len(list(read_video(name))) == 3 and len(load_audio(name)) > 0


# ------------------------------------------------------------------------------------------------------------
# video: files of other programs


def counting_video(path, rate, *options):
    """Two seconds of video whose brightness shows the time: at time t the luma is 20 + 100 t."""
    source = f"nullsrc=s=32x24:r={rate}:d=2,geq=lum='20+100*T':cb=128:cr=128"
    ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-crf", "1", *options, path)


def seconds_late(path):
    """For each frame k, the time from the start of its picture, by the brightness, to (k + 1/2) / 25 s."""
    luma = np.array([f[4:-4, 4:-4].mean() for f in read_video(path)]) * 219 / 255 + 16
    return (np.arange(len(luma)) + 0.5) / 25 - (luma - 20) / 100


@pytest.mark.parametrize("rate", ["24", "30000/1001", "60", "12.5"])
def test_any_frame_rate_becomes_25_with_every_frame_at_its_time(tmp_path, rate):
    counting_video(tmp_path / "a.mp4", rate)
    late = seconds_late(tmp_path / "a.mp4")
    numerator, _, denominator = rate.partition("/")
    period = float(denominator or 1) / float(numerator)
    assert abs(len(late) - 50) <= 1
    # the picture in the middle of frame k starts at most one source frame earlier and not later
    # (16 ms: luma has 8 bits)
    assert late.min() > -0.016 and late.max() < period + 0.016, (late.min(), late.max())


def test_video_of_variable_frame_rate_keeps_its_timing(tmp_path):
    counting_video(tmp_path / "a.mkv", 50, "-vf", "select='not(mod(n,7))+lt(t,1)'", "-fps_mode", "vfr")
    late = seconds_late(tmp_path / "a.mkv")
    assert abs(len(late) - 50) <= 4 and late.min() > -0.016
    assert late[:24].max() < 1 / 50 + 0.016 and late.max() < 7 / 50 + 0.016


def test_a_click_and_a_flash_at_60_fps_in_another_container_stay_together(tmp_path):
    wav = np.zeros(2 * 44100, np.int16)
    wav[round(1.21 * 44100) :][:90] = 30000
    scipy.io.wavfile.write(tmp_path / "a.wav", 44100, wav)
    flash = "nullsrc=s=32x32:r=60:d=2,geq=lum='if(between(T,1.199,1.239),235,20)':cb=128:cr=128"
    for name in ("a.mpg", "a.ts", "a.webm"):
        ffmpeg("-f", "lavfi", "-i", flash, "-i", tmp_path / "a.wav", tmp_path / name)
        bright = int(np.argmax([f.mean() for f in read_video(tmp_path / name)]))
        loud = int(abs(load_audio(tmp_path / name)).argmax()) / 640
        assert abs(loud - 0.25 - bright) <= 1 and abs(bright - 30) <= 1, (name, bright, loud)


def test_where_the_picture_starts_after_the_sound_its_first_frame_shows_from_0_on(tmp_path):
    flash = "nullsrc=s=32x32:r=25:d=1,geq=lum='if(between(T,0.399,0.401),235,20)':cb=128:cr=128"
    sound = ("-f", "lavfi", "-i", "anoisesrc=d=2")
    ffmpeg(*sound, "-itsoffset", "0.6", "-f", "lavfi", "-i", flash, tmp_path / "a.mkv")
    shown = [f.mean() for f in read_video(tmp_path / "a.mkv")]
    assert int(np.argmax(shown)) == 25 and len(shown) == 40  # 0.6 + 0.4 s


@pytest.mark.parametrize("degrees", [90, 180])
def test_a_phones_rotation_is_applied(tmp_path, degrees):
    write(tmp_path / "flat.mp4", np.repeat(picture(40, 60)[None], 5, 0))
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "turned.mp4")
    want = np.rot90(picture(40, 60), degrees // 90)  # ffmpeg counts anticlockwise, as NumPy does
    frame = next(read_video(tmp_path / "turned.mp4"))
    info = probe(tmp_path / "turned.mp4")
    assert frame.shape == want.shape == (info.height, info.width, 3)
    assert psnr(frame, want) > 25


def test_alpha_is_dropped_grey_video_stays_grey_and_pixels_become_square(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "color=red@0.5:s=32x24:d=0.2,format=rgba", "-c:v", "png", tmp_path / "alpha.mov")
    assert abs(next(read_video(tmp_path / "alpha.mov")).astype(int) - (254, 0, 0)).max() < 4
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=32x24:d=0.2,format=gray", "-c:v", "ffv1", tmp_path / "grey.mkv")
    assert abs(next(read_video(tmp_path / "grey.mkv")).astype(int) - 128).max() < 4
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=32x24:d=0.2,setsar=2", tmp_path / "wide.mp4")
    assert next(read_video(tmp_path / "wide.mp4")).shape == (24, 64, 3)


def test_a_change_of_size_in_the_middle_keeps_timing_and_shape(tmp_path):
    flash = "if(between(T,0.79,0.83),235,20)"
    source = f"nullsrc=s=64x32:r=25:d=1,geq=lum='{flash}':cb=128:cr=128"
    for name, size, at in (("a", "64:32", 0), ("b", "128:64", 1), ("c", "32:64", 2)):
        options = ("-vf", f"scale={size}", "-c:v", "mpeg2video", "-output_ts_offset", at)
        ffmpeg("-f", "lavfi", "-i", source, *options, tmp_path / f"{name}.ts")
    (tmp_path / "call.ts").write_bytes(b"".join((tmp_path / f"{name}.ts").read_bytes() for name in "abc"))
    frames = np.stack(list(read_video(tmp_path / "call.ts"))).astype(int)
    bright = frames.mean((1, 2, 3))
    flashes = sorted(bright.argsort()[-3:].tolist())
    assert len(frames) >= 74 and np.abs(np.subtract(flashes, (20, 45, 70))).max() <= 1
    last = frames[flashes[-1]]  # upright between bars
    assert last[8:-8, 30:34].min() > 200 and last[:, :20].max() < 40


def test_a_transport_stream_that_starts_within_a_group_of_pictures_is_read(tmp_path):
    source = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=3", "-f", "lavfi", "-i", "sine=d=5")
    ffmpeg(*source, "-g", "25", "-c:v", "libx264", "-c:a", "aac", tmp_path / "whole.ts")
    content = (tmp_path / "whole.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(content[len(content) // 10 // 188 * 188 :])
    assert sum(1 for _ in read_video(tmp_path / "cut.ts")) >= 55
    assert len(load_audio(tmp_path / "cut.ts")) > 4 * RATE


def test_video_that_is_marked_as_interlaced_is_deinterlaced(tmp_path):
    source = "testsrc2=s=64x64:r=50:d=0.6,geq=lum='if(lt(mod(X-4*N,32),16),235,20)':cb=128:cr=128"
    options = ("-vf", "tinterlace=interleave_top", "-c:v", "mpeg2video", "-flags", "+ildct+ilme", "-b:v", "4M")
    ffmpeg("-f", "lavfi", "-i", source, *options, tmp_path / "a.mpg")
    frames = np.stack(list(read_video(tmp_path / "a.mpg"))).astype(float)
    assert probe(tmp_path / "a.mpg").interlaced
    assert abs(frames[:, 1:-1:2] - (frames[:, :-2:2] + frames[:, 2::2]) / 2).mean() < 8  # 25 with its combs


@pytest.mark.parametrize("curve, white", [("arib-std-b67", 0.75), ("smpte2084", 0.5807)])  # 203 cd/m2
def test_white_of_hdr_video_is_white(tmp_path, curve, white):
    grey = f"color=black:s=32x32:r=25:d=0.2,format=yuv420p10le,geq=lum='64+876*{white}':cb=512:cr=512"
    tags = ("-color_primaries", "bt2020", "-colorspace", "bt2020nc", "-color_trc", curve, "-color_range", "tv")
    tags += ("-vf", f"setparams=color_primaries=bt2020:colorspace=bt2020nc:color_trc={curve}:range=tv")
    ffmpeg("-f", "lavfi", "-i", grey, *tags, "-c:v", "ffv1", tmp_path / "a.mkv")
    frame = next(read_video(tmp_path / "a.mkv")).astype(int)
    assert probe(tmp_path / "a.mkv").hdr == curve
    assert 235 <= frame.min() and frame.max() <= 250


def test_hdr_colours_are_those_of_bt_709(tmp_path):
    """Colours of BT.709, below the highlights, as light / 203 cd/m2 -> BT.2020 -> HLG or PQ -> read_video"""
    srgb = np.array([[180, 120, 90], [60, 120, 60], [40, 60, 160], [120, 120, 120]])
    light = np.where(srgb < 10.3, srgb / 255 / 12.92, ((srgb / 255 + 0.055) / 1.055) ** 2.4)
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # BT.2087
    wide = 203 * light @ to_2020.T  # cd/m2
    scene = wide / 1000 / ((wide / 1000) @ (0.2627, 0.678, 0.0593))[:, None] ** (0.2 / 1.2)  # BT.2100: OOTF of 1.2
    bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    hlg = np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)
    power = (wide / 10000) ** (1305 / 8192)
    pq = ((107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    for curve, code in (("arib-std-b67", hlg), ("smpte2084", pq)):
        frame = np.repeat(np.repeat((code * 65535).round().astype("<u2"), 16, 0)[None], 16, 0)  # (16, 64, 3)
        raw = subprocess.run(
            [media.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "64x16",
             "-i", "-", "-vf", f"scale=out_color_matrix=bt2020nc:out_range=tv,format=yuv444p10le,"
             f"setparams=color_primaries=bt2020:colorspace=bt2020nc:color_trc={curve}:range=tv", "-c:v", "ffv1",
             str(tmp_path / "a.mkv")], input=frame.tobytes())
        assert raw.returncode == 0
        got = next(read_video(tmp_path / "a.mkv"))[8, 8::16].astype(int)
        assert abs(got - srgb).max() <= 4, (curve, got)


def test_the_pictures_of_a_video_with_a_timecode_track_are_read(tmp_path):
    source = ("-f", "lavfi", "-i", "color=gray:s=32x24:r=25:d=0.4", "-timecode", "00:00:00:00")
    ffmpeg(*source, tmp_path / "camera.mov")  # ffmpeg lists its streams as a group
    assert len(list(read_video(tmp_path / "camera.mov"))) == 10


def test_read_video_resizes_to_a_given_height(tmp_path):
    write(tmp_path / "a.mp4", np.repeat(picture(40, 60)[None], 3, 0))
    frame = next(read_video(tmp_path / "a.mp4", height=20))
    inside = np.ix_(np.r_[2:8, 12:18], np.r_[2:13, 17:28])  # away from the edges, where colours are coarser
    assert frame.shape == (20, 30, 3) and abs(frame[inside].astype(int) - picture(20, 30)[inside]).max() < 8


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_channels_are_counted_by_the_name_of_their_layout(tmp_path, channels):
    soundfile.write(tmp_path / "a.flac", np.zeros((RATE, channels)), RATE)  # FLAC's layout of four is "quad"
    assert media.find_sound_track(tmp_path / "a.flac")[1:] == (channels, RATE)


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    with media.atomic_write(tmp_path / ("n" * 255)) as draft:
        draft.write_text("x")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


@pytest.mark.parametrize("rate, channels", [(48000, 2), (22050, 6), (8000, 8)])
def test_a_video_gets_the_users_sound_with_its_rate_and_channels(tmp_path, rate, channels):
    sound = 0.3 * np.sin(2 * np.pi * 300 * np.arange(rate)[:, None] / rate) * np.ones(channels)
    scipy.io.wavfile.write(tmp_path / "a.wav", rate, sound.astype(np.float32))
    frames = drawn_frames(20, 32, 32)  # shorter than the sound
    write(tmp_path / "a.mp4", frames, (tmp_path / "a.wav", 640 * 20))
    assert media.find_sound_track(tmp_path / "a.mp4")[1:] == (channels, rate)
    wav = load_audio(tmp_path / "a.mp4", normalise=False)
    assert abs(len(wav) - 640 * 20) <= 2048 * 16000 / rate and abs(abs(wav[3000:9000]).max() - 0.3) < 0.03


def test_probe_reads_size_and_rate_and_not_the_title(tmp_path):
    source = "color=s=46x34:r=30000/1001:d=2"
    title = ("-metadata", "title=x\n  Stream #0:0: Video: h264, 1x1, 5 fps")
    ffmpeg("-f", "lavfi", "-i", source, "-f", "lavfi", "-i", "sine=d=2", *title, tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.fps) == (46, 34, 29.97)


def test_closing_a_reader_early_ends_its_ffmpeg(tmp_path, monkeypatch):
    ffmpeg("-f", "lavfi", "-i", "color=s=64x64:r=25:d=60", tmp_path / "a.mp4")
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            started.append(self)

    monkeypatch.setattr(media.subprocess, "Popen", Popen)
    frames = read_video(tmp_path / "a.mp4")
    next(frames)
    assert started[-1].poll() is None
    frames.close()
    assert [process.returncode is not None for process in started] == [True] * len(started)


def bad_videos(folder):
    (folder / "directory.mp4").mkdir()
    (folder / "empty.mp4").touch()
    (folder / "words.mp4").write_text("no video " * 99)
    Image.fromarray(picture()).save(folder / "photo.png")
    scipy.io.wavfile.write(folder / "sound.wav", RATE, np.zeros(1600, np.int16))
    write(folder / "whole.mp4", np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8))
    (folder / "cut.mp4").write_bytes((folder / "whole.mp4").read_bytes()[:50000])
    ffmpeg("-i", folder / "whole.mp4", "-c", "copy", "-movflags", "-faststart", folder / "late.mp4")
    (folder / "headless.mp4").write_bytes((folder / "late.mp4").read_bytes()[:50000])
    return {"missing.mp4": "no such file", "directory.mp4": "directory", "empty.mp4": "empty", "words.mp4": "not a video",
            "photo.png": "not a video", "sound.wav": "no picture", "headless.mp4": "not a video", "cut.mp4": "cut short"}


def test_every_bad_video_is_refused_in_one_line_that_names_it(tmp_path):
    for name, reason in bad_videos(tmp_path).items():
        with pytest.raises(InputError) as caught:
            list(read_video(tmp_path / name))
        assert "\n" not in str(caught.value) and name in str(caught.value) and reason in str(caught.value)


def test_a_file_that_is_not_a_video_is_refused_before_the_first_frame_is_read(tmp_path):
    (tmp_path / "words.mp4").write_text("no video " * 99)
    with pytest.raises(InputError):
        read_video(tmp_path / "words.mp4")


# ------------------------------------------------------------------------------------------------------------
# video: no partial files


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A separate temporary directory, so that leftovers show, and a folder for the output."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(media.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def leftovers(scratch):
    return sorted(str(p.relative_to(scratch)) for p in scratch.rglob("*") if p.is_file())


def test_an_error_while_writing_leaves_nothing_behind(scratch):
    def frames():
        yield drawn_frames(1, 32, 32)[0]
        1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        write_video(scratch / "out/a.mp4", frames(), 2, np.zeros(999))
    assert leftovers(scratch) == [] and not list((scratch / "tmp").iterdir())


def test_a_killed_ffmpeg_is_one_error_and_leaves_nothing_behind(scratch, monkeypatch):
    started, Popen = [], subprocess.Popen
    monkeypatch.setattr(media.subprocess, "Popen", lambda *a, **kw: started.append(Popen(*a, **kw)) or started[-1])

    def frames():
        for k, frame in enumerate(drawn_frames(9, 512, 512)):
            if k == 1:
                started[-1].kill()
            yield frame

    with pytest.raises(InputError, match="could not be written"):
        write_video(scratch / "out/a.mp4", frames(), 9)
    assert leftovers(scratch) == [] and not list((scratch / "tmp").iterdir())


def test_a_full_disk_is_one_error_and_leaves_the_old_file(scratch, monkeypatch):
    (scratch / "out/a.mp4").write_bytes(b"old")

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media.shutil, "copyfile", full)
    with pytest.raises(InputError, match="No space left"):
        write(scratch / "out/a.mp4", drawn_frames(2, 32, 32), overwrite=True)
    assert leftovers(scratch) == ["out/a.mp4"] and (scratch / "out/a.mp4").read_bytes() == b"old"


def test_a_full_temporary_disk_is_not_taken_for_a_damaged_file(scratch, monkeypatch):
    write_wav(scratch / "a.wav", np.zeros(16000))
    files = iter([open("/dev/full", "r+b"), tempfile.TemporaryFile()])
    monkeypatch.setattr(media.tempfile, "TemporaryFile", lambda: next(files))
    with pytest.raises(OSError) as error:  # run() makes it one line, and prepare.py ends
        load_audio(scratch / "a.wav")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(scratch / "tmp")


@pytest.mark.parametrize("suffix", media.VIDEO_SUFFIXES)
def test_a_written_video_says_that_it_was_generated(scratch, suffix):
    path = scratch / f"out/a{suffix}"
    write(path, drawn_frames(2, 32, 32))
    assert media.GENERATED_COMMENT in media.describe_media(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are Unix's")
def test_a_killed_writer_leaves_nothing_in_the_output_folder(scratch):
    read, write_end = os.pipe()

    def frames():
        yield from drawn_frames(25, 64, 64)
        os.write(write_end, b"ready")
        signal.pause()

    pid = os.fork()
    if not pid:
        try:
            write_video(scratch / "out/a.mp4", frames(), 25, np.zeros(16000))
        finally:
            os._exit(1)
    assert os.read(read, 5) == b"ready"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert list((scratch / "out").iterdir()) == []


def test_the_file_appears_only_at_the_end_and_two_writers_do_not_interfere(scratch):
    frames = drawn_frames(6, 32, 32)

    def meanwhile():
        yield from frames
        write(scratch / "out/b.mp4", 255 - frames)
        assert leftovers(scratch / "out") == ["b.mp4"]

    write_video(scratch / "out/a.mp4", meanwhile(), 6)
    assert leftovers(scratch) == ["out/a.mp4", "out/b.mp4"]
    assert psnr(np.stack(list(read_video(scratch / "out/a.mp4"))), frames) > 33
    assert psnr(np.stack(list(read_video(scratch / "out/b.mp4"))), 255 - frames) > 33


def test_a_file_that_appeared_meanwhile_is_not_overwritten(scratch):
    def frames():
        yield drawn_frames(1, 32, 32)[0]
        (scratch / "out/a.mp4").write_bytes(b"someone else's")

    with pytest.raises(InputError, match="exists"):
        write_video(scratch / "out/a.mp4", frames(), 1)
    assert (scratch / "out/a.mp4").read_bytes() == b"someone else's" and leftovers(scratch) == ["out/a.mp4"]


def test_check_output_refuses_paths_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "there.mp4").write_bytes(b"x")
    (tmp_path / "folder.mp4").mkdir()
    cases = [("there.mp4", "--overwrite"), ("folder.mp4", "directory"), ("no/where.mp4", "no such directory")]
    cases += [("a.avi", "must end in"), ("there.mp4/a.mp4", "no such directory"), ("x" * 300 + ".mp4", "cannot")]
    for name, reason in cases:
        with pytest.raises(InputError, match=reason):
            check_output(tmp_path / name, suffixes=media.VIDEO_SUFFIXES)
    assert check_output(tmp_path / "there.mp4", overwrite=True) == tmp_path / "there.mp4"
    monkeypatch.chdir(tmp_path)
    assert check_output("new.mp4") == tmp_path / "new.mp4"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    # not chmod: root may write anywhere
    monkeypatch.setattr(media.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        check_output(tmp_path / "new.mp4")


# ------------------------------------------------------------------------------------------------------------
# files


def peak_hz(wav):
    return np.fft.rfft(wav * np.hanning(len(wav))).__abs__().argmax() * RATE / len(wav)


def test_16_bit_sound_at_16_khz_is_read_sample_by_sample(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 7001).astype(np.int16)
    scipy.io.wavfile.write(tmp_path / "a.wav", RATE, samples)
    wav = load_audio(tmp_path / "a.wav")
    assert wav.dtype == np.float32 and wav.flags.writeable
    np.testing.assert_array_equal(wav, samples / np.float32(32768))


@pytest.mark.parametrize("name, rate, channels, subtype", [
    ("8-bit.wav", 16000, 1, "PCM_U8"), ("24-bit.wav", 48000, 1, "PCM_24"), ("96khz.wav", 96000, 2, "PCM_16"),
    ("six channels.wav", 48000, 6, "PCM_16"), ("http:x.wav", 44100, 2, "FLOAT"), ("8khz.flac", 8000, 1, "PCM_16"),
    ("a b'c\"d.ogg", 44100, 2, "VORBIS"), ("-i %d [x];&$(touch y).mp3", 44100, 2, "MPEG_LAYER_III")])
def test_every_kind_of_sound_file_is_read_at_its_pitch(tmp_path, monkeypatch, name, rate, channels, subtype):
    monkeypatch.chdir(tmp_path)
    soundfile.write(str(tmp_path / name), np.tile(tone(700, rate, rate)[:, None], (1, channels)), rate, subtype=subtype)
    wav = load_audio(name)  # a relative path
    assert abs(len(wav) - RATE) <= 0.06 * RATE  # MP3 pads
    assert abs(peak_hz(wav) - 700) < 5
    assert 0.1 < abs(wav).max() <= 1


def test_sound_in_a_video_keeps_its_time(tmp_path):
    wav = np.zeros(2 * RATE, np.int16)
    wav[RATE : RATE + 40] = 30000
    scipy.io.wavfile.write(tmp_path / "click.wav", RATE, wav)
    picture = ("-f", "lavfi", "-i", "color=s=32x32:r=25:d=2")
    for name in ("v.mp4", "v.mkv", "v.mov"):
        ffmpeg(*picture, "-i", tmp_path / "click.wav", tmp_path / name)
        wav = load_audio(tmp_path / name)
        assert abs(int(abs(wav).argmax()) - RATE) < 320, name  # half a frame


def test_a_track_that_starts_late_in_a_video_is_padded_in_front(tmp_path):
    wav = np.zeros(RATE, np.int16)
    wav[:40] = 30000
    scipy.io.wavfile.write(tmp_path / "click.wav", RATE, wav)
    picture = ("-f", "lavfi", "-i", "color=s=32x32:r=25:d=2")
    ffmpeg(*picture, "-itsoffset", "0.6", "-i", tmp_path / "click.wav", tmp_path / "late.mp4")
    wav = load_audio(tmp_path / "late.mp4")
    assert abs(int(abs(wav).argmax()) - 0.6 * RATE) < 320


def test_a_tenth_of_a_second_of_silence_is_read(tmp_path):
    scipy.io.wavfile.write(tmp_path / "s.wav", RATE, np.zeros(1600, np.int16))
    wav = load_audio(tmp_path / "s.wav")
    assert len(wav) == 1600 and not wav.any()
    assert sound_windows(wav, range(n_frames(len(wav)))).shape == (3, 1, 80, 16)


def test_too_loud_floats_are_clipped(tmp_path):
    scipy.io.wavfile.write(tmp_path / "loud.wav", RATE, 3 * tone(300, 4000))
    assert abs(load_audio(tmp_path / "loud.wav")).max() == 1


def bad_sounds(folder):
    """{file name: text of the message} of files that must be refused."""
    (folder / "directory.wav").mkdir()
    (folder / "empty.wav").touch()
    (folder / "words.wav").write_text("this is not sound\n" * 99)
    (folder / "words.txt").write_text("this is not sound either\n" * 99)
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nfine.wav\n#EXT-X-ENDLIST\n")
    (folder / "list.ffconcat").write_text("ffconcat version 1.0\nfile fine.wav\n")
    scipy.io.wavfile.write(folder / "fine.wav", RATE, np.zeros(1600, np.int16))
    scipy.io.wavfile.write(folder / "zero.wav", RATE, np.zeros(0, np.int16))
    for name, value in (("nan", np.nan), ("inf", -np.inf)):
        samples = tone(300, 4000)
        samples[777] = value
        scipy.io.wavfile.write(folder / f"{name}.wav", RATE, samples)
    whole = folder / "whole.flac"
    soundfile.write(str(whole), noise(30000), RATE)
    (folder / "cut.flac").write_bytes(whole.read_bytes()[:20000])
    ffmpeg("-f", "lavfi", "-i", "color=s=32x32:r=25:d=1", folder / "mute.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=d=3", folder / "whole.m4a")
    (folder / "cut.m4a").write_bytes((folder / "whole.m4a").read_bytes()[:9000])
    with wave.open(str(folder / "whole.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(RATE)
        file.writeframes(bytes(64000))
    (folder / "cut.wav").write_bytes((folder / "whole.wav").read_bytes()[:20000])
    return {"missing.wav": "no such file", "directory.wav": "directory", "empty.wav": "empty", "words.wav": "not a sound",
            "words.txt": "not a sound", "list.m3u8": "not a sound", "list.ffconcat": "not a sound", "zero.wav": "0 s",
            "nan.wav": "NaN", "inf.wav": "inf", "cut.flac": "cut short", "cut.m4a": "can", "cut.wav": "cut short",
            "mute.mp4": "no sound", "x\0y.wav": "no such file", "x" * 300: "read"}


def test_every_bad_sound_is_refused_in_one_line_that_names_it(tmp_path):
    for name, reason in bad_sounds(tmp_path).items():
        with pytest.raises(InputError) as caught:
            load_audio(tmp_path / name)
        message = str(caught.value)
        assert "\n" not in message and name.split("\0")[0] in message and reason in message, (name, message)


# ------------------------------------------------------------------------------------------------------------
# unusual files


def click_at(seconds, length=2.0, rate=48000):
    """A click over a soft hum, which keeps encoders from dropping silence."""
    wav = 0.02 * tone(300, round(length * rate), rate)
    wav[round(seconds * rate) :][: rate // 400] = 0.9
    return wav


def click_time(path):
    wav = load_audio(path)
    return int(abs(wav).argmax()) / RATE


def syllables(n=2 * RATE):
    """Bursts of a buzz with loud and silent parts, similar to speech."""
    t = np.arange(n) / RATE
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 12))
    return (0.1 * buzz * (np.sin(2 * np.pi * 4 * t) > 0)).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.03, 0.08, 0.7])
def test_a_gap_of_any_length_in_the_sound_becomes_silence(tmp_path, seconds):
    soundfile.write(tmp_path / "a.wav", click_at(1.5), 48000)
    drop = f"noise=drop='between(pts*tb,0.5,{0.499 + seconds})'"
    ffmpeg("-i", tmp_path / "a.wav", "-c:a", "flac", "-frame_size", "480", "-bsf:a", drop, tmp_path / "a.mkv")
    assert abs(click_time(tmp_path / "a.mkv") - 1.5) < 0.01


def test_a_late_track_with_changes_of_rate_and_channels_keeps_its_time(tmp_path):
    for name, rate, channels, at in (("a", 44100, 2, 0.3), ("b", 48000, 1, 0.5), ("c", 48000, 6, 0.7)):
        sound = np.zeros((rate, channels))
        sound[round(at * rate) :][: rate // 400, -1] = dict(a=0.3, b=0.6, c=0.9)[name]
        soundfile.write(tmp_path / f"{name}.wav", sound, rate)
        start = ("-output_ts_offset", dict(a=0, b=1, c=2)[name])
        ffmpeg("-i", tmp_path / f"{name}.wav", "-c:a", "aac", *start, tmp_path / f"{name}.ts")
    ffmpeg("-f", "lavfi", "-i", "color=s=32x32:r=25:d=2", "-c:v", "mpeg2video", tmp_path / "v.ts")
    (tmp_path / "joined.ts").write_bytes(b"".join((tmp_path / f"{name}.ts").read_bytes() for name in "abc"))
    late = ("-itsoffset", "1", "-i", tmp_path / "joined.ts")
    ffmpeg("-i", tmp_path / "v.ts", *late, "-c", "copy", tmp_path / "call.ts")
    wav = abs(load_audio(tmp_path / "call.ts"))
    clicks = [(t * RATE + wav[t * RATE : (t + 1) * RATE].argmax()) / RATE for t in (1, 2, 3)]
    assert np.abs(np.subtract(clicks, (1.3, 2.5, 3.7))).max() < 0.05, clicks


def test_a_wav_of_open_length_is_read_whole_and_a_cut_one_is_refused(tmp_path):
    scipy.io.wavfile.write(tmp_path / "a.wav", RATE, noise(RATE))
    content = bytearray((tmp_path / "a.wav").read_bytes())
    at = content.index(b"data") + 4
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF, 2_000_000_000, 0x7FFFF000):
        content[at : at + 4] = size.to_bytes(4, "little")
        (tmp_path / "open.wav").write_bytes(content)
        assert abs(len(load_audio(tmp_path / "open.wav")) - RATE) <= 2, hex(size)
    content[at : at + 4] = (5 * 4 * RATE).to_bytes(4, "little")
    (tmp_path / "cut.wav").write_bytes(content)
    with pytest.raises(InputError, match="cut short"):
        load_audio(tmp_path / "cut.wav")
    ffmpeg("-i", tmp_path / "a.wav", "-rf64", "always", tmp_path / "rf64.wav")
    content = (tmp_path / "rf64.wav").read_bytes()
    (tmp_path / "open.wav").write_bytes(content[:20] + bytes(24) + content[44:])  # the chunk ds64
    assert len(load_audio(tmp_path / "rf64.wav")) == len(load_audio(tmp_path / "open.wav")) == RATE


def test_an_mp3_of_variable_rate_is_read_whole_with_junk_in_it(tmp_path):
    soundfile.write(tmp_path / "a.wav", syllables(3 * RATE), RATE)
    ffmpeg("-i", tmp_path / "a.wav", "-q:a", "4", tmp_path / "a.mp3")
    mp3, junk = (tmp_path / "a.mp3").read_bytes(), (noise(5000) * 256).astype(np.int8).tobytes()
    for name, content in (("front", junk + mp3), ("end", mp3 + 2 * junk), ("middle", mp3[:9000] + junk + mp3[9000:])):
        (tmp_path / f"{name}.mp3").write_bytes(content)
        assert abs(len(load_audio(tmp_path / f"{name}.mp3")) / RATE - 3) < 0.12, name


def test_a_sound_whose_second_half_cannot_be_decoded_is_refused(tmp_path):
    for name, layout in (("a", "mono"), ("b", "5.1")):
        sine = ("-f", "lavfi", "-i", "sine=d=2", "-af", f"aformat=channel_layouts={layout}")
        ffmpeg(*sine, "-c:a", "aac", tmp_path / f"{name}.ts")
    (tmp_path / "list").write_text("file a.ts\nfile b.ts\n")
    ffmpeg("-f", "concat", "-i", tmp_path / "list", "-c", "copy", tmp_path / "joined.mkv")
    with pytest.raises(InputError, match="only 2.* s of it can be read"):
        load_audio(tmp_path / "joined.mkv")


def test_a_sound_shorter_than_its_video_may_have_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", click_at(0.5, 1.0), 48000)
    picture = ("-f", "lavfi", "-i", "color=s=32x32:r=25:d=4")
    spoil = ("-bsf:a", "noise=amount='if(eq(n,3),-1,0)':dropamount=0")
    ffmpeg(*picture, "-i", tmp_path / "a.wav", "-c:a", "flac", "-frame_size", "480", *spoil, tmp_path / "a.mkv")
    assert abs(click_time(tmp_path / "a.mkv") - 0.5) < 0.01


def test_the_track_marked_default_is_read(tmp_path):
    soundfile.write(tmp_path / "voice.wav", syllables(), RATE)
    hum = ("-f", "lavfi", "-i", "sine=700:d=2")
    marks = ("-map", "0", "-map", "1", "-disposition:a:0", "comment", "-disposition:a:1", "default")
    ffmpeg(*hum, "-i", tmp_path / "voice.wav", *marks, "-c:a", "flac", tmp_path / "two.mkv")
    assert abs(peak_hz(load_audio(tmp_path / "two.mkv")) - 120) < 5


def channels_of(voice, kind):
    dead = np.zeros_like(voice)
    return {
        "opposite": [voice, -voice],
        "right alone": [dead, voice],
        "centre of 5.1": [dead, dead, voice, dead, dead, dead],
        "last of 8": [dead] * 7 + [voice],
        "last of 12": [dead] * 11 + [voice],
        "hiss on the other": [voice, 0.001 * noise(len(voice))],
    }[kind]


@pytest.mark.parametrize("kind", ["opposite", "right alone", "centre of 5.1", "last of 8", "last of 12",
                                  "hiss on the other"])
def test_a_voice_sounds_the_same_in_any_channels(tmp_path, kind):
    soundfile.write(tmp_path / "a.wav", np.stack(channels_of(syllables(), kind), 1), RATE, subtype="FLOAT")
    wav = load_audio(tmp_path / "a.wav", normalise=False)
    np.testing.assert_allclose(wav, syllables(), atol=0.002)


def mixed(samples):
    """(n, C) -> (n,) by media.mix_channels."""
    blocks = [samples[a : a + media.MIX_BLOCK] for a in range(0, len(samples), media.MIX_BLOCK)]
    return np.concatenate(list(media.mix_channels("x", lambda: blocks)))[:, 0]


def test_two_speakers_on_two_channels_are_both_kept():
    one, two = tone(300, RATE), tone(700, RATE)
    spectrum = abs(np.fft.rfft(mixed(np.stack([one, two], 1))))
    assert spectrum[[300, 700]].min() > 0.9 * spectrum.max()  # bins of 1 Hz


def test_a_voice_that_moves_from_one_channel_to_two_keeps_its_loudness():
    voice = syllables(4 * RATE)
    samples = np.stack([voice, np.where(np.arange(4 * RATE) < 2 * RATE, 0, voice)], 1)
    np.testing.assert_allclose(mixed(samples)[: RATE], voice[: RATE], atol=1e-6)
    np.testing.assert_allclose(mixed(samples)[3 * RATE :], voice[3 * RATE :], atol=1e-6)


def test_speech_gets_one_level_and_silence_and_noise_keep_theirs(tmp_path):
    levels = []
    for gain in (2, 0.6, 0.02):
        soundfile.write(tmp_path / "a.wav", gain * syllables(), RATE, subtype="PCM_24")
        levels.append(load_audio(tmp_path / "a.wav").std())
    assert np.ptp(levels) < 0.01 * levels[0]
    for still in (np.zeros(RATE, np.float32), 0.001 * noise(RATE), 1e-5 * syllables(), noise(RATE)):
        np.testing.assert_array_equal(media.normalise_loudness(still.copy()), still)


def test_a_constant_offset_is_removed_before_speech_is_amplified():
    late = np.concatenate([np.zeros(3 * RATE, np.float32), 0.05 * syllables() + 0.4])
    wav = media.normalise_loudness(late)  # in place
    assert abs(wav).max() < 1 and abs(wav[3 * RATE :].mean()) < 0.01 and not wav[: 3 * RATE].any()


def test_speech_at_the_loudness_of_training_stays_as_it_is():
    wav = syllables(4 * RATE)
    wav *= 10 ** (media.LOUDNESS / 20) / wav[abs(wav) > 0].std()
    gain = media.normalise_loudness(wav.copy()).std() / wav.std()
    assert abs(20 * np.log10(gain)) < 1


# ------------------------------------------------------------------------------------------------------------
# scripts


def test_a_user_error_is_one_line_and_status_2(monkeypatch, capsys):
    def main():
        raise InputError("a.wav: is\nbad")

    monkeypatch.setattr(sys, "argv", ["/somewhere/tool.py"])
    with pytest.raises(SystemExit, match="2"):
        media.run(main)
    assert capsys.readouterr() == ("", "tool.py: a.wav: is bad\n")


class Built(Exception):
    """Raised in place of parsing, with the parser and its limits."""


def parsers(monkeypatch):
    """Yield (name, parser, limits, required words, number options) of every script and command."""
    def stop(self, args=None, **limits):
        raise Built(self, limits)

    with monkeypatch.context() as patch:
        patch.setattr(media.Parser, "parse_args", stop)
        for name in ("prepare.main", "evaluate.parse", "keypoints.parse", "landmarks.main", "pcavs.parse", "sample.parse",
                     "syncnet.parse", "toyfaces.main", "train.parse"):
            script, function = name.split(".")
            with pytest.raises(Built) as built:
                getattr(importlib.import_module(script), function)()
            parser, limits = built.value.args
            commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
            for command, sub in (commands[0].choices.items() if commands else [(None, parser)]):
                required = [command] if command else []
                for a in sub._actions:
                    value = str(next(iter(a.choices))) if a.choices else "1"
                    required += [a.option_strings[0], value] if a.required and a.option_strings else []
                    required += [value] if not a.option_strings and a.nargs in (None, "+") else []
                options = [a for a in sub._actions if a.type in (int, float)]
                yield f"{name} {command or ''}", parser, limits, required, options


def test_the_number_options_of_all_scripts_refuse_absurd_values(monkeypatch, capsys):
    tried = set()
    for name, parser, limits, required, options in list(parsers(monkeypatch)):
        parser.parse_args(required, **limits)  # the defaults are accepted
        for a in options:
            counts = a.type is int and a.dest not in ("seed", "workers", "refine", "clip", "lag")
            zero = ["0"] if counts or a.dest.startswith(("lr", "seconds")) else []  # the remaining ones may be 0
            for value in [*zero, "-70", "1" + 30 * "0", "nan", "word"]:
                with pytest.raises((InputError, SystemExit)) as refused:
                    parser.parse_args([*required, f"{a.option_strings[0]}={value}"], **limits)
                    pytest.fail(f"{name} accepts {a.option_strings[0]} {value}")
                line = capsys.readouterr().err if refused.type is SystemExit else f"{refused.value}\n"
                assert a.option_strings[0] in line and line.count("\n") == 1, (name, line)
                assert refused.type is InputError or refused.value.code == 2
            tried.add((name, a.dest))
    assert len(tried) > 40


LACKS = [(MemoryError(), "not enough memory"), (OSError(12, "Cannot allocate memory"), "not enough memory"),
         (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
         (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "not enough memory"),
         (OSError(28, "No space left", "/a/b"), "no space left on the disk of /a/b"),
         (OSError(28, "No space left"), f"no space left on the disk of {tempfile.gettempdir()}")]


@pytest.mark.parametrize("error, text", LACKS)
def test_run_reports_lack_of_memory_or_disk_in_one_line(capsys, error, text):
    def main():
        raise error

    with pytest.raises(SystemExit, match="2"):
        media.run(main)
    out = capsys.readouterr().err
    assert text in out and out.count("\n") == 1


def test_run_cleans_up_on_sigterm_and_leaves_other_errors_alone(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def killed():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    def interrupted():
        raise KeyboardInterrupt

    try:
        for main, status in ((killed, 143), (interrupted, 130)):
            with pytest.raises(SystemExit) as caught:
                media.run(main)
            assert caught.value.code == status
        with pytest.raises(ZeroDivisionError):
            media.run(lambda: 1 / 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleaned


def test_a_missing_ffmpeg_is_named_in_one_line(monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/ffmpeg")
    with pytest.raises(InputError, match="ffmpeg was not found.*IMAGEIO_FFMPEG_EXE"):
        media.find_ffmpeg()
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    assert os.access(media.find_ffmpeg(), os.X_OK)
