"""Pictures and videos: out comes what went in, upright, at 25 fps, the sound in step; or a clear refusal."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
import scipy.io.wavfile
import torch
import torch.nn.functional as F
from PIL import Image

import faces
import media
import vision
from faces import mask_mouth
from media import (
    InputError, VideoWriter, check_output, load_audio, load_photo, probe, read_video, to_tensor, to_uint8)
from stylegan2 import Generator

RATE = 16000


def ffmpeg(*args):
    command = [media.ffmpeg_path(), "-nostdin", "-loglevel", "error", "-y", *map(str, args)]
    subprocess.run(command, check=True)


def picture(height=20, width=30):
    """Four patches of colour, none like another, so that any turn or mix-up of channels shows."""
    image = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    image[:h, :w], image[:h, w:], image[h:, :w], image[h:, w:] = (
        (220, 30, 40),
        (20, 200, 60),
        (30, 50, 210),
        (240, 230, 90),
    )
    return image


def drawn_frames(count, height, width):
    """Smooth coloured waves that move: a video as an encoder likes it, every frame different."""
    y, x = np.mgrid[:height, :width] / 16
    t = np.arange(count)[:, None, None]
    channels = [
        127 + 100 * np.sin(x + 0.3 * t),
        127 + 100 * np.cos(y - 0.2 * t),
        127 + 80 * np.sin(x + y + 0.1 * t),
    ]
    return np.stack(channels, -1).round().astype(np.uint8)  # (count, H, W, 3)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def write(path, frames, wav=None, **kw):
    with VideoWriter(path, *frames.shape[1:3], wav, **kw) as video:
        for frame in frames:
            video.write(frame)


# ------------------------------------------------------------------------------------------------------------
# photos


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright_by_its_exif_entry(tmp_path, orientation):
    stored = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    a = picture()
    upright = {  # the EXIF standard: what is done to the stored rows and columns to see it upright
        1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.transpose(1, 0, 2), 6: np.rot90(a, -1),
        7: a[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(a, 1),
    }[orientation]  # fmt: skip
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


def test_grey_and_grey_with_alpha(tmp_path):
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "la.png")
    for name in ("l.png", "la.png"):
        np.testing.assert_array_equal(load_photo(tmp_path / name), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_a_float_tiff_is_read_by_its_range(tmp_path, white):
    grey = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    Image.fromarray(grey * white).save(tmp_path / "a.tiff")
    assert abs(load_photo(tmp_path / "a.tiff") - 255 * grey[..., None]).max() <= 0.51
    grey[0, 0] = np.nan
    Image.fromarray(grey * white).save(tmp_path / "nan.tiff")
    with pytest.raises(InputError, match="nan.tiff: .* NaN"):
        load_photo(tmp_path / "nan.tiff")


def icc(space, pcs, **tags):
    """The bytes of an ICC profile (version 2) of a device space, with these tags"""
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


def seen(x):
    """XYZ (.., 3) for D50 -> sRGB in 0..255"""
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
    want = seen((stored / 255) ** g @ np.transpose(TO_XYZ[name]))
    assert abs(want - stored).max() > 12  # it matters
    assert abs(load_photo(tmp_path / kind) - want).max() <= 2.5


@pytest.mark.parametrize("order", ["little", "big"])
def test_adobe_rgb_that_only_exif_names_is_converted(tmp_path, order):
    def entry(*numbers):  # tag, type, how many, and the value
        return b"".join(n.to_bytes(k, order) for n, k in zip(numbers, (2, 2, 4, 4)))

    def one(tag, kind, count, value):
        return (1).to_bytes(2, order) + entry(tag, kind, count) + value + bytes(4)

    mark = one(1, 2, 4, b"R03\0")
    head = dict(little=b"II", big=b"MM")[order] + (42).to_bytes(2, order) + (8).to_bytes(4, order)
    exif = one(0x8769, 4, 1, (26).to_bytes(4, order)) + one(0xA005, 4, 1, (44).to_bytes(4, order)) + mark
    stored = (picture() * 0.6 + 50).astype(np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=b"Exif\0\0" + head + exif)
    want = seen((stored / 255) ** (563 / 256) @ np.transpose(TO_XYZ["adobe"]))
    assert abs(want - stored).max() > 12  # it matters
    assert abs(load_photo(tmp_path / "a.png") - want).max() <= 2.5
    profile = rgb_profile("srgb", 2.2)  # goes before the mark
    Image.fromarray(stored).save(tmp_path / "b.png", exif=b"Exif\0\0" + head + exif, icc_profile=profile)
    assert abs(load_photo(tmp_path / "b.png").astype(int) - stored).max() < 12


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
    want = seen(np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249])
    got = load_photo(tmp_path / "a.tiff")[[1, 1, 1, 6], [1, 6, 10, 1]]
    assert abs(got - want).max() <= 4, (got, want)


def test_grey_by_its_profile_stays_grey_and_a_profile_that_cannot_be_used_is_left_out(tmp_path):
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(grey).save(tmp_path / "a.png", icc_profile=icc(b"GRAY", b"XYZ ", wtpt=WHITE, kTRC=gamma(1)))
    photo = load_photo(tmp_path / "a.png")
    want = seen((grey / 255)[..., None] * [0.9642, 1, 0.8249])
    assert abs(photo - want).max() <= 3 and (np.ptp(photo, -1) == 0).all()
    Image.fromarray(grey).convert("RGB").save(tmp_path / "rgb.png", icc_profile=rgb_profile("p3", 2.2))
    assert (np.ptp(load_photo(tmp_path / "rgb.png"), -1) == 0).all()
    for profile in (b"no profile", rgb_profile("p3", 2.2)):  # of another kind of picture
        Image.fromarray(grey).save(tmp_path / "b.png", icc_profile=profile)
        np.testing.assert_array_equal(load_photo(tmp_path / "b.png")[..., 1], grey)


def test_avif_is_read_and_heic_is_one_line_that_tells_what_to_do(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.avif", quality=95, subsampling="4:4:4")
    assert psnr(load_photo(tmp_path / "a.avif"), picture()) > 30
    content = b"\0\0\0\x18ftypheic" + bytes(100)
    (tmp_path / "a.heic").write_bytes(content)
    for args in ((tmp_path / "a.heic",), (io.BytesIO(content), "b.npz#a.heic")):
        with pytest.raises(InputError, match="a.heic: is HEIC.*heif-convert"):
            load_photo(*args)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16", "CMYK"])
def test_a_large_photo_is_shrunk_while_it_is_read_and_its_size_is_known(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(media, "LARGEST", 60)
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


def test_palette_cmyk_and_bilevel(tmp_path):
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


def test_a_phones_double_picture_is_its_first(tmp_path):
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
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        folder / "whole.png"
    )
    Image.open(folder / "whole.png").save(folder / "whole.jpg")
    for name in ("png", "jpg"):
        (folder / f"cut.{name}").write_bytes((folder / f"whole.{name}").read_bytes()[:-900])
    Image.new("1", (20000, 10000)).save(folder / "bomb.png")
    return [
        ("missing.png", "no such file"),
        ("directory.png", "directory"),
        ("empty.png", "empty"),
        ("words.jpg", "not a picture"),
        ("draw.eps", "not a picture"),
        ("cut.png", "not a picture"),
        ("cut.jpg", "not a picture"),
        ("bomb.png", "pixels"),
    ]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_bad_photo_is_refused_in_one_line_that_names_it(tmp_path):
    for name, reason in bad_photos(tmp_path):
        with pytest.raises(InputError) as caught:
            load_photo(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value) and reason in str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# tensors


def test_bytes_to_tensor_and_back_is_the_identity():
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


def test_mask_mouth_greys_the_mouth_box_and_nothing_else():
    for name, template in faces.TEMPLATES.items():
        frames = torch.rand(2, 3, 40, 20) + 0.1
        masked = mask_mouth(frames, name)
        x0, y0, x1, y1 = template.mouth
        y, x = torch.meshgrid((torch.arange(40) + 0.5) / 40, (torch.arange(20) + 0.5) / 20, indexing="ij")
        inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)  # (40, 20)
        assert (masked[..., inside] == 0).all() and (masked[..., ~inside] == frames[..., ~inside]).all()
        assert (frames != 0).all()  # the caller's own frames are left alone


# ------------------------------------------------------------------------------------------------------------
# video: writer and reader together


def test_what_is_written_is_read_frame_by_frame(tmp_path):
    frames = drawn_frames(23, 48, 64)
    write(tmp_path / "a.mp4", frames)
    back = np.stack(list(read_video(tmp_path / "a.mp4")))
    assert back.shape == frames.shape and back.dtype == np.uint8
    for k in range(23):
        quality = [psnr(back[k], frames[j]) for j in range(23)]
        assert int(np.argmax(quality)) == k and quality[k] > 33, (k, quality[k])


def test_flat_colours_survive_the_round_trip(tmp_path):
    for colour in [(250, 20, 20), (20, 250, 20), (20, 20, 250), (128, 128, 128), (0, 0, 0), (255, 255, 255)]:
        write(tmp_path / "a.mp4", np.full((5, 32, 32, 3), colour, np.uint8), overwrite=True)
        back = np.stack(list(read_video(tmp_path / "a.mp4")))
        assert abs(back.astype(int) - colour).max() <= 4, (colour, back[0, 0, 0])


@pytest.mark.parametrize("count, n", [(1, 640), (2, 1600), (7, 4480), (26, 16321), (30, 9000), (30, 24000)])
def test_frame_count_is_exact_whatever_the_sounds_length(tmp_path, count, n):
    write(tmp_path / "a.mp4", drawn_frames(count, 32, 32), wav=np.zeros(n, np.float32))
    assert sum(1 for _ in read_video(tmp_path / "a.mp4")) == count
    assert abs(len(load_audio(tmp_path / "a.mp4")) - n) <= 1100  # AAC works in blocks of 1024


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
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


def test_odd_sizes_are_padded_by_their_own_border(tmp_path):
    frames = drawn_frames(4, 33, 47)
    write(tmp_path / "a.mp4", frames)
    back = np.stack(list(read_video(tmp_path / "a.mp4")))
    assert back.shape == (4, 34, 48, 3)
    assert psnr(back[:, :33, :47], frames) > 33
    assert psnr(back[:, :33, 47], frames[:, :, 46]) > 25 and psnr(back[:, 33, :47], frames[:, 32]) > 25


@pytest.mark.parametrize(
    "name", ["with space.mp4", "-y.mp4", "a'b\"c.mp4", "%03d.mp4", "http:x.mp4", "[a];&.mp4"]
)
def test_awkward_file_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    frames = drawn_frames(3, 32, 32)
    write(name, frames, wav=np.zeros(1920, np.float32))
    assert os.listdir(tmp_path) == [name]
    assert len(list(read_video(name))) == 3 and probe(name).has_audio and len(load_audio(name)) > 0


# ------------------------------------------------------------------------------------------------------------
# video: other people's


def counting_video(path, rate, *options):
    """Two seconds whose brightness tells the time: the frame at time t has luma 20 + 100 t."""
    source = f"nullsrc=s=32x24:r={rate}:d=2,geq=lum='20+100*T':cb=128:cr=128"
    ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-crf", "1", *options, path)


def seconds_late(path):
    """For each frame k, how long before (k + 1/2) / 25 s the picture it shows began, by its brightness."""
    luma = np.array([f[4:-4, 4:-4].mean() for f in read_video(path)]) * 219 / 255 + 16
    return (np.arange(len(luma)) + 0.5) / 25 - (luma - 20) / 100


@pytest.mark.parametrize("rate", ["24", "25", "30000/1001", "60", "12.5"])
def test_any_frame_rate_becomes_25_with_every_frame_at_its_time(tmp_path, rate):
    counting_video(tmp_path / "a.mp4", rate)
    late = seconds_late(tmp_path / "a.mp4")
    numerator, _, denominator = rate.partition("/")
    period = float(denominator or 1) / float(numerator)
    assert abs(len(late) - 50) <= 1
    # what shows in the middle of frame k began at most one source frame earlier, and not later
    # (16 ms: luma has 8 bits)
    assert late.min() > -0.016 and late.max() < period + 0.016, (late.min(), late.max())


def test_a_variable_frame_rate_keeps_time(tmp_path):
    counting_video(tmp_path / "a.mkv", 50, "-vf", "select='not(mod(n,7))+lt(t,1)'", "-fps_mode", "vfr")
    late = seconds_late(tmp_path / "a.mkv")
    assert abs(len(late) - 50) <= 4 and late.min() > -0.016
    assert late[:24].max() < 1 / 50 + 0.016 and late.max() < 7 / 50 + 0.016


def test_a_click_and_a_flash_at_60_fps_in_another_container_stay_together(tmp_path):
    wav = np.zeros(2 * 44100, np.int16)
    wav[round(1.21 * 44100) :][:90] = 30000
    scipy.io.wavfile.write(tmp_path / "a.wav", 44100, wav)
    flash = "nullsrc=s=32x32:r=60:d=2,geq=lum='if(between(T,1.199,1.239),235,20)':cb=128:cr=128"
    for name in ("a.mp4", "a.mpg", "a.ts", "a.avi", "a.webm"):
        ffmpeg("-f", "lavfi", "-i", flash, "-i", tmp_path / "a.wav", tmp_path / name)
        bright = int(np.argmax([f.mean() for f in read_video(tmp_path / name)]))
        loud = int(abs(load_audio(tmp_path / name)).argmax()) / 640
        assert abs(loud - 0.25 - bright) <= 1 and abs(bright - 30) <= 1, (name, bright, loud)


def test_a_picture_that_starts_later_than_the_sound_shows_its_first_frame_until_then(tmp_path):
    flash = "nullsrc=s=32x32:r=25:d=1,geq=lum='if(between(T,0.399,0.401),235,20)':cb=128:cr=128"
    sound = ("-f", "lavfi", "-i", "anoisesrc=d=2")
    ffmpeg(*sound, "-itsoffset", "0.6", "-f", "lavfi", "-i", flash, tmp_path / "a.mkv")
    shown = [f.mean() for f in read_video(tmp_path / "a.mkv")]
    assert int(np.argmax(shown)) == 25 and len(shown) == 40  # 0.6 + 0.4 s


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phones_rotation_is_applied(tmp_path, degrees):
    write(tmp_path / "flat.mp4", np.repeat(picture(40, 60)[None], 5, 0))
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "turned.mp4")
    want = np.rot90(picture(40, 60), degrees // 90)  # ffmpeg counts anticlockwise, as NumPy does
    frame = next(read_video(tmp_path / "turned.mp4"))
    info = probe(tmp_path / "turned.mp4")
    assert frame.shape == want.shape == (info.height, info.width, 3)
    assert info.rotation == 360 - degrees and psnr(frame, want) > 25


def test_alpha_is_dropped_grey_is_grey_and_pixels_become_square(tmp_path):
    ffmpeg(
        "-f", "lavfi", "-i", "color=red@0.5:s=32x24:d=0.2,format=rgba", "-c:v", "png", tmp_path / "alpha.mov"
    )
    assert abs(next(read_video(tmp_path / "alpha.mov")).astype(int) - (254, 0, 0)).max() < 4
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=32x24:d=0.2,format=gray", "-c:v", "ffv1", tmp_path / "grey.mkv")
    assert abs(next(read_video(tmp_path / "grey.mkv")).astype(int) - 128).max() < 4
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=32x24:d=0.2,setsar=2", tmp_path / "wide.mp4")
    assert next(read_video(tmp_path / "wide.mp4")).shape == (24, 64, 3)


def test_a_size_that_changes_in_the_middle_keeps_time_and_shape(tmp_path):
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


def test_a_transport_stream_cut_in_a_group_of_pictures_is_read(tmp_path):
    source = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=3", "-f", "lavfi", "-i", "sine=d=5")
    ffmpeg(*source, "-g", "25", "-c:v", "libx264", "-c:a", "aac", tmp_path / "whole.ts")
    content = (tmp_path / "whole.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(content[len(content) // 10 // 188 * 188 :])
    assert sum(1 for _ in read_video(tmp_path / "cut.ts")) >= 55
    assert len(load_audio(tmp_path / "cut.ts")) > 4 * RATE


def test_interlaced_video_is_deinterlaced_where_it_says_so(tmp_path):
    source = "testsrc2=s=64x64:r=50:d=0.6,geq=lum='if(lt(mod(X-4*N,32),16),235,20)':cb=128:cr=128"
    options = ("-vf", "tinterlace=interleave_top", "-c:v", "mpeg2video", "-flags", "+ildct+ilme", "-b:v", "4M")
    ffmpeg("-f", "lavfi", "-i", source, *options, tmp_path / "a.mpg")
    frames = np.stack(list(read_video(tmp_path / "a.mpg"))).astype(float)
    assert probe(tmp_path / "a.mpg").interlaced
    assert abs(frames[:, 1:-1:2] - (frames[:, :-2:2] + frames[:, 2::2]) / 2).mean() < 8  # 25 with its combs


@pytest.mark.parametrize("curve, white", [("arib-std-b67", 0.75), ("smpte2084", 0.5807)])  # 203 cd/m2
def test_hdr_video_looks_as_it_should(tmp_path, curve, white):
    grey = f"color=black:s=32x32:r=25:d=0.2,format=yuv420p10le,geq=lum='64+876*{white}':cb=512:cr=512"
    tags = ("-color_primaries", "bt2020", "-colorspace", "bt2020nc", "-color_trc", curve, "-color_range", "tv")
    tags += ("-vf", f"setparams=color_primaries=bt2020:colorspace=bt2020nc:color_trc={curve}:range=tv")
    ffmpeg("-f", "lavfi", "-i", grey, *tags, "-c:v", "ffv1", tmp_path / "a.mkv")
    frame = next(read_video(tmp_path / "a.mkv")).astype(int)
    assert probe(tmp_path / "a.mkv").hdr == curve
    assert 235 <= frame.min() and frame.max() <= 250


def test_hdr_colours_are_those_of_bt_709():
    for curve in ("arib-std-b67", "smpte2084"):
        table = np.array([row.split() for row in media.hdr_cube(curve).splitlines()[1:]], float).reshape(33, 33, 33, 3)
        grey = table[range(33), range(33), range(33)]
        assert (np.diff(grey, axis=0) >= 0).all() and np.ptp(grey, axis=1).max() < 0.01
        b, g, r = 5, 5, 20  # a red of BT.2020 is outside BT.709
        assert table[b, g, r, 0] > 3 * table[b, g, r, 1] and table.min() >= 0 and table.max() <= 1


def test_a_video_with_a_timecode_track_has_its_pictures(tmp_path):
    source = ("-f", "lavfi", "-i", "color=gray:s=32x24:r=25:d=0.4", "-timecode", "00:00:00:00")
    ffmpeg(*source, tmp_path / "camera.mov")  # ffmpeg lists its streams as a group
    assert len(list(read_video(tmp_path / "camera.mov"))) == 10


def test_read_video_resizes_to_the_height_asked_for(tmp_path):
    write(tmp_path / "a.mp4", np.repeat(picture(40, 60)[None], 3, 0))
    frame = next(read_video(tmp_path / "a.mp4", height=20))
    inside = np.ix_(np.r_[2:8, 12:18], np.r_[2:13, 17:28])  # away from the edges, where colours are coarser
    assert frame.shape == (20, 30, 3) and abs(frame[inside].astype(int) - picture(20, 30)[inside]).max() < 8


@pytest.mark.parametrize("rate, channels", [(48000, 2), (44100, 1), (22050, 6), (16000, 3), (8000, 8)])
def test_a_video_gets_the_users_own_sound(tmp_path, rate, channels):
    sound = 0.3 * np.sin(2 * np.pi * 300 * np.arange(rate)[:, None] / rate) * np.ones(channels)
    scipy.io.wavfile.write(tmp_path / "a.wav", rate, sound.astype(np.float32))
    frames = drawn_frames(20, 32, 32)  # shorter than the sound
    write(tmp_path / "a.mp4", frames, load_audio(tmp_path / "a.wav")[: 640 * 20], sound=tmp_path / "a.wav")
    _, heard, _, hz = media.sound_track(tmp_path / "a.mp4")
    assert (heard, hz) == (channels, rate)
    wav = load_audio(tmp_path / "a.mp4", level=False)
    assert abs(len(wav) - 640 * 20) <= 2048 * 16000 / rate and abs(abs(wav[3000:9000]).max() - 0.3) < 0.03


def test_probe_tells_what_a_video_is(tmp_path):
    source = "color=s=46x34:r=30000/1001:d=2"
    title = ("-metadata", "title=x\n  Stream #0:0: Video: h264, 1x1, 5 fps")
    ffmpeg("-f", "lavfi", "-i", source, "-f", "lavfi", "-i", "sine=d=2", *title, tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.fps, info.has_audio, info.rotation) == (46, 34, 29.97, True, 0)
    assert abs(info.seconds - 2) < 0.1
    write(tmp_path / "mute.mp4", drawn_frames(5, 32, 32))
    assert not probe(tmp_path / "mute.mp4").has_audio


def test_a_reader_that_is_left_early_ends_its_ffmpeg(tmp_path, monkeypatch):
    ffmpeg("-f", "lavfi", "-i", "color=s=64x64:r=25:d=60", tmp_path / "a.mp4")
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            started.append(self)

    monkeypatch.setattr(vision.subprocess, "Popen", Popen)
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
    return [
        ("missing.mp4", "no such file"),
        ("directory.mp4", "directory"),
        ("empty.mp4", "empty"),
        ("words.mp4", "not a video"),
        ("photo.png", "not a video"),
        ("sound.wav", "no picture"),
        ("headless.mp4", "not a video"),
        ("cut.mp4", "cut short"),
    ]


def test_every_bad_video_is_refused_in_one_line_that_names_it(tmp_path):
    for name, reason in bad_videos(tmp_path):
        with pytest.raises(InputError) as caught:
            list(read_video(tmp_path / name))
        assert "\n" not in str(caught.value) and name in str(caught.value) and reason in str(caught.value)


def test_what_is_no_video_is_refused_before_the_first_frame_is_asked_for(tmp_path):
    (tmp_path / "words.mp4").write_text("no video " * 99)
    with pytest.raises(InputError):
        read_video(tmp_path / "words.mp4")


# ------------------------------------------------------------------------------------------------------------
# video: nothing half-written


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A temporary directory of this test's own, so that leftovers show; and a place for the output."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(vision.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def leftovers(scratch):
    return sorted(str(p.relative_to(scratch)) for p in scratch.rglob("*") if p.is_file())


def test_an_error_while_writing_leaves_nothing_behind(scratch):
    with pytest.raises(ZeroDivisionError), VideoWriter(scratch / "out/a.mp4", 32, 32, np.zeros(999)) as video:
        video.write(drawn_frames(1, 32, 32)[0])
        1 / 0  # noqa: B018
    assert leftovers(scratch) == [] and not list((scratch / "tmp").iterdir())


def test_a_dying_ffmpeg_is_one_clear_error_and_leaves_nothing_behind(scratch):
    with pytest.raises(InputError, match="could not be written"):
        with VideoWriter(scratch / "out/a.mp4", 512, 512) as video:
            video.process.kill()
            for frame in drawn_frames(9, 512, 512):
                video.write(frame)
    assert leftovers(scratch) == [] and not list((scratch / "tmp").iterdir())


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_file(scratch, monkeypatch):
    (scratch / "out/a.mp4").write_bytes(b"old")

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vision.shutil, "copyfile", full)
    with pytest.raises(InputError, match="No space left"):
        write(scratch / "out/a.mp4", drawn_frames(2, 32, 32), overwrite=True)
    assert leftovers(scratch) == ["out/a.mp4"] and (scratch / "out/a.mp4").read_bytes() == b"old"


def test_a_writer_without_frames_is_an_error(scratch):
    with pytest.raises(InputError), VideoWriter(scratch / "out/a.mp4", 32, 32):
        pass
    assert leftovers(scratch) == []


def test_a_killed_writer_leaves_nothing_where_the_output_goes(scratch):
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import numpy as np, time, vision
with media.VideoWriter({str(scratch / "out/a.mp4")!r}, 64, 64, np.zeros(16000)) as video:
    for k in range(25):
        video.write(np.full((64, 64, 3), k, np.uint8))
    print("ready", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"TMPDIR": str(scratch / "tmp")}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    assert list((scratch / "out").iterdir()) == []


def test_the_file_appears_at_the_end_only_and_two_writers_do_not_meet(scratch):
    frames = drawn_frames(6, 32, 32)
    one = VideoWriter(scratch / "out/a.mp4", 32, 32)
    two = VideoWriter(scratch / "out/b.mp4", 32, 32)
    for frame in frames:
        one.write(frame), two.write(255 - frame)
    assert leftovers(scratch / "out") == []
    one.close(), two.close()
    assert leftovers(scratch) == ["out/a.mp4", "out/b.mp4"]
    assert psnr(np.stack(list(read_video(scratch / "out/a.mp4"))), frames) > 33
    assert psnr(np.stack(list(read_video(scratch / "out/b.mp4"))), 255 - frames) > 33


def test_a_file_that_appeared_meanwhile_is_not_overwritten(scratch):
    video = VideoWriter(scratch / "out/a.mp4", 32, 32)
    video.write(drawn_frames(1, 32, 32)[0])
    (scratch / "out/a.mp4").write_bytes(b"someone else's")
    with pytest.raises(InputError, match="exists"):
        video.close()
    assert (scratch / "out/a.mp4").read_bytes() == b"someone else's" and leftovers(scratch) == ["out/a.mp4"]


def test_check_output_refuses_what_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "there.mp4").write_bytes(b"x")
    (tmp_path / "folder.mp4").mkdir()
    cases = [("there.mp4", "--overwrite"), ("folder.mp4", "directory"), ("no/where.mp4", "no such directory")]
    cases += [
        ("a.avi", "must end in"),
        ("there.mp4/a.mp4", "no such directory"),
        ("x" * 300 + ".mp4", "cannot"),
    ]
    for name, reason in cases:
        with pytest.raises(InputError, match=reason):
            check_output(tmp_path / name, suffixes=media.VIDEO_SUFFIXES)
    assert check_output(tmp_path / "there.mp4", overwrite=True) == tmp_path / "there.mp4"
    monkeypatch.chdir(tmp_path)
    assert check_output("new.mp4") == tmp_path / "new.mp4"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    # root may write anywhere: chmod would not do
    monkeypatch.setattr(vision.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        check_output(tmp_path / "new.mp4")


# ------------------------------------------------------------------------------------------------------------
# faces


def test_the_crop_is_the_box_and_repeats_the_border_outside():
    image = picture(40, 60)
    np.testing.assert_array_equal(faces.crop_face(image, (0, 0, 20, 20), 20), image[:20, :20])
    np.testing.assert_array_equal(faces.crop_face(image, (25, 10, 45, 30), 20), image[10:30, 25:45])
    outside = faces.crop_face(image, (-20, -20, 20, 20), 40)
    assert (outside[:20, :20] == image[0, 0]).all() and (outside[20:, 20:] == image[0, 0]).all()
    small = faces.crop_face(image, (20.0, 10.0, 40.0, 30.0), 5)
    assert small.shape == (5, 5, 3) and abs(small[0, 0].astype(int) - image[0, 0]).max() < 30


def test_face_box_is_square_around_the_face_asked_for():
    boxes = [(10, 20, 50, 70, 0.9), (100, 100, 120, 130, 0.8)]
    x0, y0, x1, y1 = faces.face_box(boxes, "toy")
    assert (
        x1 - x0 == y1 - y0 == 50 * faces.TEMPLATES["toy"].side
        and (x0 + x1) / 2 == 30
        and (y0 + y1) / 2 == 45
    )
    x0, y0, x1, y1 = faces.face_box(boxes, "face", number=2)
    side = pytest.approx(30 * faces.TEMPLATES["face"].side)
    assert x1 - x0 == side and y1 - y0 == side and 100 < (x0 + x1) / 2 < 120
    for number in (0, 3):
        with pytest.raises(InputError, match="--face"):
            faces.face_box(boxes, "face", number)


def test_a_crop_brings_eyes_and_mouth_to_the_templates_places_whatever_the_box_says():
    points = np.array(faces.TEMPLATES["face"].points)
    for side, x, y in ((80.0, 17.0, 5.0), (33.0, -4.0, 9.5)):
        wanted = (x, y, x + side, y + side)
        for box in ((20, 20, 70, 75), (0, 0, 99, 99)):
            boxes = [(*box, 0.9, *(points * side + [x, y]).ravel())]
            np.testing.assert_allclose(faces.face_box(boxes, "face"), wanted, atol=1e-6)
    # a mouth 3 pixels lower: the square grows and moves a little, least squares against scipy's
    moved = points * 80 + [0, 0] + np.array([[0, 0], [0, 0], [0, 3.0]])
    found = faces.face_box([(0, 0, 9, 9, 0.9, *moved.ravel())], "face")
    from scipy.optimize import least_squares

    best = least_squares(lambda v: (points * v[0] + v[1:] - moved).ravel(), [80.0, 0, 0]).x
    np.testing.assert_allclose(found, (best[1], best[2], best[1] + best[0], best[2] + best[0]), atol=1e-5)


def test_a_crop_becomes_another_templates_with_its_points_where_that_has_them():
    x, y, side = faces.square_within("ffhq", "face")
    there = np.array(faces.TEMPLATES["face"].points) * side + [x, y]
    np.testing.assert_allclose(there, faces.TEMPLATES["ffhq"].points, atol=0.012)
    y, x = torch.meshgrid(*[(torch.arange(100) + 0.5) / 50 - 1] * 2, indexing="ij")
    wide = torch.stack([x, y, x * 0]).expand(2, 5, 3, 100, 100)  # every pixel says where it is
    face = faces.recrop(wide, "ffhq", "face")
    for px, py in faces.TEMPLATES["face"].points:
        seen = (face[1, 2, :2, int(py * 100), int(px * 100)] + 1) / 2
        assert min(np.abs(np.array(faces.TEMPLATES["ffhq"].points) - seen.numpy()).max(1)) < 0.02
    assert faces.recrop(wide, "face", "face") is wide and faces.recrop(wide, "toy", "face") is wide
    beyond = faces.recrop(wide, "face", "ffhq")  # the border is repeated
    assert beyond.shape == wide.shape and (beyond[..., 0, :, 0] < -0.98).all()


def test_faces_that_lie_or_stand_on_their_head_are_not_upright():
    points = np.array(faces.TEMPLATES["face"].points) - 0.5
    for angle, expected in ((0, True), (30, True), (-30, True), (60, False), (-90, False), (180, False)):
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turned = points @ np.array([[c, s], [-s, c]])
        assert faces.upright((0, 0, 9, 9, 0.9, *turned.ravel())) == expected, angle
    assert faces.upright((0, 0, 9, 9, 0.9))  # a detector without points


def test_without_weights_or_network_there_is_no_detector(tmp_path, monkeypatch):
    asked = []

    def offline(url, **options):
        asked.append(url)
        raise requests.ConnectionError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(requests, "get", offline)
    forget_detectors()
    try:
        assert faces.detect_faces(picture()) is None and faces.find_faces([picture()]) is None
    finally:
        forget_detectors()
    assert asked and all(url.startswith("https://") for url in asked)


def forget_detectors():
    faces.face_detectors.cache_clear()
    faces.blazeface.cache_clear()


SHARED = Path(__file__).parents[2] / "shared"


def seen_by(monkeypatch, near):
    """One detector, which finds one face of score .9; near: x, y of eye, eye and mouth in it as the look from near sees
    them, in a square of side 1, and the score there"""

    def look(detector, images, squares):
        return [[np.array([10, 10, 30, 30, 0.9])] for _ in images]

    def closer(frames, found):
        points, score = near
        return [[np.array([*face[:4], score, *(np.array(points) * 20 + face[0])]) for face in faces] for faces in found]

    monkeypatch.setattr(faces, "face_detectors", lambda: ["one"])
    monkeypatch.setattr(faces, "look", look)
    monkeypatch.setattr(faces, "closer", closer)


UPRIGHT, LYING = (0.3, 0.3, 0.7, 0.3, 0.5, 0.7), (0.3, 0.7, 0.3, 0.3, 0.7, 0.5)


def test_a_face_is_what_a_look_from_near_shows_upright_with_a_good_score(monkeypatch):
    for points, score, count in ((UPRIGHT, 0.7, 1), (LYING, 0.7, 0), (UPRIGHT, 0.5, 0)):
        seen_by(monkeypatch, (points, score))
        found = faces.detect_faces(np.zeros((50, 50, 3), np.uint8))
        assert len(found) == count and all(face[:4] == (10, 10, 30, 30) for face in found)


@pytest.mark.parametrize("turns, words", [(0, ""), (1, "90 degrees to the left"), (2, "180"), (3, "to the right")])
def test_a_photo_is_turned_until_a_face_in_it_is_upright(monkeypatch, turns, words):
    image = np.ascontiguousarray(np.rot90(picture(), -turns))

    def detect(turned):
        return [(1, 2, 3, 4, 0.9)] if np.array_equal(turned, picture()) else []

    monkeypatch.setattr(faces, "detect_faces", detect)
    turned, found, how = faces.turn_upright(image)
    assert np.array_equal(turned, picture()) and len(found) == 1 and words in how and bool(how) == bool(turns)
    for nothing in ([], None):
        monkeypatch.setattr(faces, "detect_faces", lambda turned, nothing=nothing: nothing)
        turned, found, how = faces.turn_upright(image)
        assert np.array_equal(turned, image) and found == nothing and how == ""


def test_faces_are_found_where_they_are_in_real_photos(monkeypatch):
    weights, photos = SHARED / "weights/torch_home", SHARED / "media/photos"
    if not (weights.is_dir() and photos.is_dir()):
        pytest.skip("no detector weights or photos at hand")
    monkeypatch.setenv("TORCH_HOME", str(weights))
    forget_detectors()
    try:
        image = load_photo(photos / "portrait_man.jpg")
        H, W = image.shape[:2]
        for shift in (0, H):  # the face out of the middle of a tall picture is found as well
            found = faces.detect_faces(np.concatenate([np.full((shift, W, 3), 99, np.uint8), image]))
            x0, y0, x1, y1, score, *points = found[0]
            assert score > 0.5 and x0 < W / 2 < x1 and shift < (y0 + y1) / 2 < shift + 0.7 * H
            assert len(points) == 6 and x0 < points[0] < points[2] < x1 and y0 < points[1] < points[5] < y1
            for turns in (1, 2, 3):  # lying and standing on the head
                turned = np.ascontiguousarray(np.rot90(image, turns))
                assert faces.detect_faces(turned) == []
                assert np.array_equal(faces.turn_upright(turned)[0], image)
        assert faces.turn_upright(load_photo(photos / "dog_no_human_face.jpg"))[1] == []
    finally:
        forget_detectors()


# ------------------------------------------------------------------------------------------------------------
# the published networks, against a float64 restatement of their papers on nothing but the files' tensors

FORMATS = Path(__file__).parent.parent.parent / "shared" / "formats"  # key lists of the published files, where present


def listed(name, part):
    path = FORMATS / name
    if not path.is_file():
        pytest.skip(f"the key list {name} is not at hand")
    rows = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    shapes = {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape, *_ in rows}
    return {key.removeprefix(part): shape for key, shape in shapes.items() if key.startswith(part)}


def published_forms():
    """Each network in its published widths, without storage: name -> (network, key list, prefix there, parameters)"""
    with torch.device("meta"):
        layers = [tuple(layer.conv.weight.shape[1:3]) for layer in Generator(256).styled_convs()]
        separable, shared = (vision.HyperStyleNet(layers, form) for form in ("separable", "shared"))
        return dict(psp=(vision.GradualStyleEncoder(14), "psp_256.txt", "encoder.", 209_450_688),
                    w=(vision.WEncoder(14), "hyperstyle_w_encoder.txt", "", 31_212_736),
                    separable=(separable, "hyperstyle_256_hypernet.txt", "hypernet.", 198_710_080),
                    shared=(shared, "hyperstyle_256_shared.txt", "hypernet.", 312_984_640))


@pytest.mark.parametrize("name", ["psp", "w", "separable", "shared"])
def test_names_shapes_and_sizes_are_those_of_the_published_files(name):
    network, file, part, parameters = published_forms()[name]
    assert sum(p.numel() for p in network.parameters()) == parameters
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items() if k != "latent_avg"}  # it lies beside them
    assert shapes == listed(file, part)


def lively(network, seed=0):
    """Random weights and running statistics everywhere, in eval mode -> (network, its tensors in float64)"""
    g = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2, generator=g)
        elif value.ndim == 1 and value.dtype.is_floating_point:
            value.normal_(0.3 if "relu" in key or key.endswith("2.weight") else 0, 0.3, generator=g)
        elif key.endswith("latent_avg"):
            value.normal_(generator=g)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data += 1
    return network.eval(), {k: v.double() for k, v in network.state_dict().items()}


def normed(s, name, x):
    mean, var, w, b = (s[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def conv(s, name, x, stride=1, padding=1):
    return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), stride, padding)


def prelu(s, name, x):
    return x.clamp(min=0) + s[f"{name}.weight"][:, None, None] * x.clamp(max=0)


def leaky(x):
    return torch.where(x > 0, x, 0.01 * x)


def equalised(s, name, x):
    return x @ s[f"{name}.weight"].t() / s[f"{name}.weight"].shape[1] ** 0.5 + s[f"{name}.bias"]


def stack(s, name, x, strides):
    for i, stride in enumerate(strides):
        x = leaky(conv(s, f"{name}.convs.{2 * i}", x, stride))
    return x


def trunk_maps(s, x):
    """ArcFace's IR-SE50: the map after each of its 24 blocks"""
    x, maps = prelu(s, "input_layer.2", normed(s, "input_layer.1", conv(s, "input_layer.0", x))), []
    for i in range(24):
        stride, r = 2 if i in (0, 3, 7, 21) else 1, f"body.{i}.res_layer"
        y = conv(s, f"{r}.3", prelu(s, f"{r}.2", conv(s, f"{r}.1", normed(s, f"{r}.0", x))), stride)
        y = normed(s, f"{r}.4", y)
        gate = conv(s, f"{r}.5.fc1", y.mean((2, 3), keepdim=True), padding=0).clamp(min=0)
        gate = 1 / (1 + torch.exp(-conv(s, f"{r}.5.fc2", gate, padding=0)))
        short = f"body.{i}.shortcut_layer"
        if f"{short}.0.weight" in s:
            x = normed(s, f"{short}.1", conv(s, f"{short}.0", x, stride, 0))
        else:
            x = x[:, :, ::stride, ::stride]
        x = x + y * gate
        maps.append(x)
    return maps


def enlarged(x):
    """Twice the size, bilinear, corner pixels on corner pixels: as a matrix on each axis"""
    n = x.shape[-1]
    at = torch.arange(2 * n, dtype=x.dtype) * (n - 1) / (2 * n - 1)
    weight = (1 - (at[:, None] - torch.arange(n)).abs()).clamp(min=0)  # (2n, n)
    return weight @ x @ weight.t()


def test_psps_encoder_is_the_published_one():
    torch.manual_seed(0)
    encoder, s = lively(vision.GradualStyleEncoder(10, dim=24, width=16))
    x = torch.rand(2, 3, 256, 256) * 2 - 1
    maps = trunk_maps(s, x.double())
    coarse = maps[23]
    middle = enlarged(coarse) + conv(s, "latlayer1", maps[20], padding=0)
    fine = enlarged(middle) + conv(s, "latlayer2", maps[6], padding=0)
    want = []
    for i in range(10):
        level, halvings = (coarse, 4) if i < 3 else (middle, 5) if i < 7 else (fine, 6)
        want.append(equalised(s, f"styles.{i}.linear", stack(s, f"styles.{i}", level, [2] * halvings).flatten(1)))
    want = torch.stack(want, 1) + s["latent_avg"]
    got = encoder(x)
    assert got.shape == (2, 10, 24)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(encoder(x[1:]), got[1:], atol=1e-4, rtol=1e-3)  # no picture sees another
    torch.testing.assert_close(encoder(x.contiguous(memory_format=torch.channels_last)), got, atol=1e-4, rtol=1e-3)


def test_hyperstyles_w_encoder_is_the_published_one():
    torch.manual_seed(0)
    encoder, s = lively(vision.WEncoder(6, dim=24, width=16))
    x = torch.rand(1, 3, 256, 256) * 2 - 1
    w = equalised(s, "linear", trunk_maps(s, x.double())[-1].mean((2, 3)))
    torch.testing.assert_close(encoder(x).double(), w[:, None] + s["latent_avg"], atol=1e-4, rtol=1e-3)


LAYERS = [(32, 32), (32, 32), (32, 32), (24, 32), (24, 24)]  # of a generator of 16 px; at width 4 the widest is 32


def hyperstyle_trunk(s, x):
    x = prelu(s, "relu", normed(s, "bn1", conv(s, "conv1", x, 2, 3)))
    for i in range(16):  # ResNet-34: 3, 4, 6 and 3 blocks, each stage but the first begins by halving
        b, stride = f"body.{i}", 2 if i in (3, 7, 13) else 1
        y = normed(s, f"{b}.bn1", conv(s, f"{b}.conv1", x, stride)).clamp(min=0)
        y = normed(s, f"{b}.bn2", conv(s, f"{b}.conv2", y))
        if stride == 2:
            x = normed(s, f"{b}.downsample.1", conv(s, f"{b}.downsample.0", x, 2, 0))
        x = (x + y).clamp(min=0)
    return x


def shared_head(s, b, h):
    """Loops where the authors have matrices and a view: the product's numbers in memory order are (O, I, 3, 3)"""
    code = equalised(s, f"{b}.linear", stack(s, b, h, (1, 2, 2, 2, 2)).flatten(1))
    w1, b1, w2, b2 = (s[f"shared_weight_hypernet.{k}"] for k in ("w1", "b1", "w2", "b2"))
    out = []
    for c in code:
        parts = (c @ w2 + b2).split(32)  # one code an input channel
        out.append(torch.cat([part @ w1 + b1 for part in parts]).view(32, 32, 3, 3))
    return torch.stack(out)


def separable_head(s, b, h, O, I):  # noqa: E741
    code = stack(s, b, h, (2, 2, 2, 2)).flatten(1)
    o = f"{b}.output.0"

    def linear(name, x):
        return x @ s[f"{o}.{name}.weight"].t() + s[f"{o}.{name}.bias"]

    kernels = torch.zeros(len(code), O, I, 3, 3, dtype=code.dtype)
    for tap in range(9):
        a = linear("make_kernel_in", code)[:, tap * I:(tap + 1) * I]
        c = linear("make_kernel_out", code)[:, tap * O:(tap + 1) * O]
        plane = linear("kernel_linear_in", torch.einsum("no,ni->noi", c, a))
        plane = linear("kernel_linear_out", plane.transpose(1, 2)).transpose(1, 2)
        kernels[:, :, :, tap // 3, tap % 3] = plane
    return kernels


@pytest.mark.parametrize("form", ["shared", "separable"])
def test_hyperstyles_hypernetwork_is_the_published_one(form):
    torch.manual_seed(0)
    network, s = lively(vision.HyperStyleNet(LAYERS, form, width=4))
    x, y = (torch.rand(3, 3, 256, 256) * 2 - 1 for _ in "xy")
    h = hyperstyle_trunk(s, torch.cat([x, y], 1).double())
    got = network(x, y)
    for delta, (O, I), place in zip(got, LAYERS, (0, 2, 3, 5, 6)):  # toRGB layers have places, too: 1, 4  # noqa: E741
        b = f"refinement_blocks.{place}"
        if (O, I) == (32, 32):
            want = shared_head(s, b, h)
        elif form == "separable":
            want = separable_head(s, b, h, O, I)
        else:
            pooled = stack(s, b, h, (2, 2, 2)).mean((2, 3), keepdim=True)
            want = conv(s, f"{b}.output.1", pooled, padding=0).view(3, O, I)
        torch.testing.assert_close(delta.double(), want, atol=1e-4, rtol=1e-3)
    alone = network(x[1:2], y[1:2])
    for delta, one in zip(got, alone):
        torch.testing.assert_close(delta[1:2], one, atol=1e-5, rtol=1e-3)
    heads = {id(network.refinement_blocks[i].hypernet) for i in (0, 2, 3)}
    assert heads == {id(network.shared_weight_hypernet)} and network.refinement_blocks[1] is None


def test_pictures_of_other_sizes_are_brought_to_256():
    x = torch.rand(2, 3, 512, 512)
    torch.testing.assert_close(vision.at_256(x), F.avg_pool2d(x, 2))
    assert vision.at_256(x[..., :64, :64]).shape == (2, 3, 256, 256)


def psp_file(path, L=10, **more):
    """What pSp's training writes, with a narrow encoder"""
    encoder, _ = lively(vision.GradualStyleEncoder(L, dim=24, width=16), seed=L)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items() if k != "latent_avg"}
    state |= {f"decoder.{k}": v for k, v in Generator(16, dim=24, n_mlp=2, base=256, cap=32).state_dict().items()}
    torch.save(dict(state_dict=state, latent_avg=encoder.latent_avg, opts=dict(output_size=64)) | more, path)
    return encoder


def test_a_psp_file_loads_and_a_larger_one_gives_its_first_styles(tmp_path):
    x, path = torch.rand(1, 3, 256, 256) * 2 - 1, tmp_path / "psp.pt"
    author = psp_file(path)
    encoder, decoder = vision.load_encoder(path, 10)
    assert torch.equal(encoder.eval()(x), author(x)) and decoder.keys() == Generator(16, n_mlp=2).state_dict().keys()
    first, _ = vision.load_encoder(path, 8)
    assert torch.equal(first.eval()(x), author(x)[:, :8])
    psp_file(path, latent_avg=torch.full((24,), 2.0))
    assert vision.load_encoder(path, 10)[0].latent_avg.equal(torch.full((10, 24), 2.0))
    psp_file(path, latent_avg=None)
    assert vision.load_encoder(path, 10)[0].latent_avg.isnan().all()


def test_a_w_encoder_and_arcface_are_told_apart_from_psp(tmp_path):
    path = tmp_path / "file.pt"
    author, _ = lively(vision.WEncoder(8, dim=24, width=16))
    state = {k: v for k, v in author.state_dict().items() if k != "latent_avg"}
    for content in (state, dict(state_dict={f"encoder.{k}": v for k, v in state.items()})):  # bare keys, or a part
        torch.save(content, path)
        found, _ = vision.load_encoder(path, 8)
        assert isinstance(found, vision.WEncoder) and found.linear.weight.equal(author.linear.weight)
    torch.save({k: v for k, v in state.items() if "linear" not in k} | {"output_layer.3.weight": torch.ones(24, 9)}, path)
    trunk, _ = vision.load_encoder(path, 8)
    assert isinstance(trunk, vision.GradualStyleEncoder) and trunk.latent_avg.isnan().all()
    assert trunk.body[20].res_layer[1].weight.equal(author.body[20].res_layer[1].weight)


@pytest.mark.parametrize("form", ["shared", "separable"])
def test_a_hyperstyle_file_loads_in_the_form_that_it_has(tmp_path, form):
    path = tmp_path / "hyper.pt"
    author, _ = lively(vision.HyperStyleNet(LAYERS, form, width=4))
    torch.save(dict(state_dict={f"hypernet.{k}": v for k, v in author.state_dict().items()}, latent_avg=None), path)
    network, found, decoder = vision.load_hypernet(path, LAYERS)
    assert found == form and decoder is None
    for a, b in zip(network.state_dict().values(), author.state_dict().values()):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="hyper.pt: not the weights of HyperStyleNet"):
        vision.load_hypernet(path, LAYERS[:3])  # another generator's


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a file was run')",)


def test_files_of_other_kinds_are_refused_in_one_line(tmp_path):
    path, good = tmp_path / "bad.pt", tmp_path / "good.pt"
    psp_file(good)
    state = torch.load(good, weights_only=True)["state_dict"]
    for content, match in (
            (dict(state_dict=state | {"encoder.more": torch.ones(1)}), "more is unknown"),
            (dict(state_dict={k: v for k, v in state.items() if "latlayer1.bias" not in k}), "latlayer1.bias is absent"),
            (dict(state_dict=state | {"encoder.latlayer1.bias": torch.ones(5)}), r"\(5,\), expected \(128,\)"),
            (dict(state_dict=state, latent_avg=torch.ones(10, 9)), "latent_avg is"),
            (dict(state_dict=[1]), "expected a dict"), (dict(g_ema={}), "no encoder of pSp"), ([state], "holds a list"),
            (dict(state_dict=state, opts=Hostile()), "holds more than tensors")):
        torch.save(content, path)
        with pytest.raises(InputError, match=match) as error:
            vision.load_encoder(path, 10)
        assert "bad.pt" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="styles.10.convs"):
        vision.load_encoder(good, 12)  # fewer styles than the generator has
    with pytest.raises(InputError, match="no HyperStyle checkpoint"):
        vision.load_hypernet(good, LAYERS)
    path.write_bytes(good.read_bytes()[:-4000])
    with pytest.raises(InputError, match="cut short"):
        vision.load_encoder(path, 10)
