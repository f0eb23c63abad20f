"""Pictures: photos and videos in and out, which square of them the face is, and the networks that look at it.

A photo becomes uint8 (H, W, 3) RGB as a person sees it (EXIF turned, alpha over white), a video a stream of
such frames at exactly 25 fps; frames become H.264 with sound, streamed too: memory does not grow with length.
Paper: FC-TFG (arXiv 2304.03275). Differs from it: lips must come from the sound, so mask_mouth() hides the
driving mouth before any network sees it.
"""

import contextlib
import io
import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile
import warnings
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import nn

from audio import (
    FPS,
    SAMPLE_RATE,
    STREAM,
    InputError,
    beside,
    check_file,
    check_whole,
    declared_seconds,
    decoder,
    describe,
    ffmpeg_path,
    to_int16,
    why,
    write_own_sound,
)
from stylegan2 import EqualLinear, load_strictly, one_line, read_weights, refusing

# Pillow's other formats are rare, or start other programs (EPS runs ghostscript)
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
LARGEST = 4096  # ours: longest side of a photo in pixels, thrice that of a video: what is larger only costs memory
# Adobe RGB (1998) in EXIF, where cameras leave out the profile: an InteroperabilityIndex of R03, in either byte order
ADOBE_RGB = rb"(\0\x01\0\x02\0\0\0\x04|\x01\0\x02\0\x04\0\0\0)R03\0"
SIPS = "sips -s format jpeg FILE --out FILE.jpg"
GREY = 4  # ours: levels of 255 by which the channels of a photo without colour may differ, from rounding
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")  # containers that hold H.264 and AAC


# ------------------------------------------------------------------------------------------------------------
# photos and tensors


def load_photo(path: str | Path | io.BytesIO, name: str = "") -> np.ndarray:
    """A picture file -> uint8 (H, W, 3) RGB in sRGB, turned upright by its EXIF entry, transparent parts white.

    path may be the file's content (BytesIO), with a name for complaints.
    Grey, 16-bit, float, palette and CMYK pictures are converted, and colours by the profile in the file; of an animation
    the first frame is taken. Shrunk to LARGEST while it is read; see photo_size for what the file says.
    Raises InputError: missing, directory, empty, not a picture, truncated, larger than Pillow's pixel limit.
    """
    with opened(path, name) as image:
        profile = image.info.get("icc_profile")
        is_adobe = not profile and re.search(ADOBE_RGB, image.info.get("exif", b""))
        if image.mode in ("P", "1"):  # their numbers cannot be averaged
            mode = "L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB"
            image = ImageOps.exif_transpose(image).convert(mode)
        image.thumbnail((LARGEST, LARGEST))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip at 255
            image = Image.fromarray(by_range(np.asarray(image)))
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        image = adobe_to_srgb(image.convert("RGB")) if is_adobe else to_srgb(image, profile)
        return np.array(image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha))


def photo_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as a viewer shows it, before load_photo shrinks it. InputError: as load_photo"""
    with opened(path) as image:
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # Pillow turns those
        return (image.height, image.width) if turned else image.size


@contextlib.contextmanager
def opened(path: str | Path | io.BytesIO, name: str = ""):
    """Pillow's image of a file, or of a file's content with a name; what is wrong with it becomes an InputError."""
    with path if name else open(check_file(path), "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own words about size and metadata
        path = name or Path(path).absolute()
        try:
            with Image.open(file, formats=PHOTO_FORMATS) as image:
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise InputError(f"{path}: {image.width}x{image.height} pixels are too many, make it smaller")
                yield image
        except (InputError, MemoryError):
            raise
        except Exception as error:  # Pillow's readers raise a dozen kinds on damaged files
            file.seek(0)
            reason = f"is not a picture that can be read ({error})"
            if re.match(b"....ftyp(hei|hev|mif1|msf1)", file.read(12), re.S):
                reason = f"is HEIC, which is not read: make it a JPEG with heif-convert, on a Mac with {SIPS}"
            raise InputError(f"{path}: {reason}") from None


def by_range(grey: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits, or float, (H, W) -> uint8. White is the first of 1, 255 and 65535 that 99 % of the pixels
    keep to, with .1 of it to spare (ours): files do not say it. ValueError: NaN or infinite."""
    if not np.isfinite(grey).all():
        raise ValueError("it holds NaN or infinite values")
    most = np.percentile(grey, 99)
    white = next((top for top in (1, 255) if most <= 1.1 * top), 65535)
    return (np.clip(grey / np.float32(white), 0, 1) * 255).round().astype(np.uint8)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture of 8 bits -> RGB, by its ICC profile where it has a usable one. What is grey stays grey."""
    if image.mode not in ("L", "CMYK"):
        image = image.convert("L" if image.mode == "LA" else "RGB")
    rgb = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            seen = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            rgb = seen.convert("L").convert("RGB") if is_grey(np.asarray(rgb)) else seen
        except (ImageCms.PyCMSError, OSError):  # damaged, or of another kind of picture: viewers leave it out, too
            pass
    return rgb


def adobe_to_srgb(image: Image.Image) -> Image.Image:
    """A picture in Adobe RGB (1998), whose gamma is 563 / 256 and whose white and blue and red hues are sRGB's"""
    to_709 = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]], np.float32)
    light = (np.asarray(image, np.float32) / 255) ** (563 / 256) @ to_709.T
    return Image.fromarray((srgb_curve(light.clip(0, 1)) * 255).round().astype(np.uint8))


def srgb_curve(light: np.ndarray) -> np.ndarray:
    """Light from 0 to 1 -> the number that stands for it in sRGB, from 0 to 1"""
    return np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def is_grey(image: np.ndarray) -> bool:
    """Whether a picture, uint8 (H, W, 3), is without colour: its channels are equal, but for rounding (GREY)."""
    r, g, b = image.astype(np.int16).transpose(2, 0, 1)
    return all(np.abs(x - y).max() <= GREY for x, y in ((r, g), (g, b), (b, r)))


def to_tensor(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (.., H, W, 3) -> float32 (.., 3, H, W) in [-1, 1]"""
    images = torch.as_tensor(images)
    assert images.dtype == torch.uint8 and images.shape[-1] == 3, f"{images.dtype} {tuple(images.shape)}"
    return images.movedim(-1, -3).float().div_(127.5).sub_(1)  # in place: the loader's time is copying


def check_finite(images: torch.Tensor):
    """Raises FloatingPointError: NaN as uint8 would be a black frame that nobody explains."""
    if not torch.isfinite(images).all():
        raise FloatingPointError("a picture holds NaN or infinite values")


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float (.., 3, H, W) in [-1, 1] -> uint8 (.., H, W, 3), rounded and clamped; NaN and inf raise."""
    assert images.shape[-3] == 3, f"images are {tuple(images.shape)}, expected (.., 3, H, W)"
    images = images.detach().float()
    check_finite(images)
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).contiguous().cpu().numpy()


# ------------------------------------------------------------------------------------------------------------
# video in


@dataclass(frozen=True)
class VideoInfo:
    width: int  # as shown: after rotation
    height: int
    fps: float  # on average; 0 where it does not say
    seconds: float  # of the container; 0 where it does not say
    has_audio: bool
    rotation: int  # degrees the stored picture is turned for showing: 0, 90, 180, 270
    aspect: float  # width / height as shown: pixels need not be square
    interlaced: bool
    hdr: str  # "arib-std-b67" (HLG), "smpte2084" (PQ) or ""


def probe(path: str | Path) -> VideoInfo:
    """What a video says about itself, read from ffmpeg's description of it (there may be no ffprobe).

    Raises InputError: missing, directory, empty, not a video.
    """
    path = check_file(path)
    text = describe(path)
    has_audio = bool(re.search(STREAM + "Audio: ", text, re.M))
    video = re.search(STREAM + r"Video: (?!.*\(attached pic\)).*, (?P<w>\d+)x(?P<h>\d+).*", text, re.M)
    if not video:
        reason = "holds sound but no picture" if has_audio else f"is not a video ({why(text)})"
        raise InputError(f"{path}: {reason}")
    width, height = int(video["w"]), int(video["h"])
    details = text[video.end() :].split("  Stream #")[0]
    turn = re.search(r"^\[info\] +[\w ]+: rotation of (-?[\d.]+) degrees", details, re.M)
    rotation = round(-float(turn[1])) % 360 if turn else 0
    if rotation in (90, 270):
        width, height = height, width
    fps = re.search(r", ([\d.]+) fps", video[0])
    aspect = width / height
    if pixel := re.search(r"SAR (\d+):(\d+)", video[0]):
        wide = int(pixel[1]) / int(pixel[2])
        aspect *= 1 / wide if rotation in (90, 270) else wide
    interlaced = bool(re.search(r"(top|bottom) (coded )?first", video[0]))
    hdr = re.search(r"arib-std-b67|smpte2084", video[0])
    return VideoInfo(width, height, float(fps[1]) if fps else 0.0, declared_seconds(text), has_audio, rotation,
                     aspect, interlaced, hdr[0] if hdr else "")


def read_video(path: str | Path, height: int | None = None) -> Iterator[np.ndarray]:
    """Frames of a video, uint8 (H, W, 3) RGB at exactly 25 fps, as a stream; frame k shows at (k + 1/2)/25 s.

    Any frame rate, also a variable one, is resampled from the file's beginning on, so that samples 640 k ..
    640 (k+1) of load_audio belong to frame k. Rotation is applied, pixels are made square, alpha is dropped, fields are
    deinterlaced, HDR becomes sRGB. Where the size changes in the middle, pictures are brought to the first, with bars.
    `height`: resized to it. Raises InputError: not a video; damaged or cut short (once the cut is reached).
    """
    path = check_file(path)
    return decode_frames(path, probe(path), height)  # probe refuses what is no video


def decode_frames(path: Path, info: VideoInfo, height: int | None) -> Iterator[np.ndarray]:
    """The generator behind read_video, which checks the file at once and not at the first frame."""
    H = height or info.height
    W = max(1, round(H * info.aspect))
    # scale: bwdif bears no change of size
    filters = ["scale=iw:ih,bwdif=mode=send_frame:deint=interlaced"] if info.interlaced else []
    # start_time=0: a picture that starts late shows its first frame from 0 on; near: see the docstring above
    filters += [f"fps={FPS}:start_time=0:round=near"]
    aspect = "iw*sar/ih"  # of each frame; 3 %: a little off is rounding, not another picture
    w, h = (f"if(lt(abs({aspect}/{W / H}-1),0.03),{side},max(1,min({side},round({fit}))))"
            for side, fit in ((W, f"{H}*{aspect}"), (H, f"{W}/({aspect})")))
    filters += [f"scale=w='{w}':h='{h}':eval=frame:flags=area+accurate_rnd+full_chroma_int"]
    filters += [f"format={'gbrp16' if info.hdr else 'rgb24'},pad={W}:{H}:-1:-1:eval=frame"]
    filters += ["lut3d=hdr.cube"] if info.hdr else []
    # reinit_filter: ffmpeg would build the filters anew where the size changes, and fps would count from 0 again
    args = ["-map", "0:V:0", "-vf", ",".join(filters), "-fps_mode", "passthrough"]
    args += ["-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "pipe:1"]
    args += beside("a") if info.has_audio else []
    with tempfile.TemporaryDirectory(prefix="talk-") as folder, tempfile.TemporaryFile() as log:
        if info.hdr:
            (Path(folder) / "hdr.cube").write_text(hdr_cube(info.hdr))
        command = decoder(path, *args, before=("-reinit_filter", "0"))
        # stderr: a file, for a full pipe would stop ffmpeg
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=folder)
        count = 0
        try:
            while (frame := read_ppm(process.stdout)) is not None:
                count += 1
                yield frame
            status = process.wait()
        finally:  # also when the caller stops early
            process.kill()
            process.wait()
            process.stdout.close()
        log.seek(0)
        complaint = log.read().decode(errors="replace")
    check_whole(path, complaint, status or not count, "0:V:0", count / FPS)


@lru_cache
def hdr_cube(curve: str, n: int = 33) -> str:
    """ffmpeg's lookup table from HDR video, BT.2020 with the curve "arib-std-b67" (HLG) or "smpte2084" (PQ), to sRGB.

    Both curves to light in cd/m2 (BT.2100; HLG on a display of 1000), 203 of which are white (BT.2408). What is below
    .7 of white stays; what is brighter, up to the sun, shares the rest (ours: an exponential).
    """
    b, g, r = np.meshgrid(*[np.linspace(0, 1, n)] * 3, indexing="ij")  # red changes fastest
    x = np.stack([r, g, b], -1).reshape(-1, 3)
    if curve == "smpte2084":
        root = x ** (32 / 2523)
        light = 10000 * (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305)
    else:
        scene = np.where(x <= 0.5, x**2 / 3, (np.exp((x - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = 1000 * scene * (scene @ (0.2627, 0.678, 0.0593))[:, None] ** 0.2
    to_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])  # BT.2407
    x = np.maximum(light / 203 @ to_709.T, 0)
    most = np.maximum(x.max(1, keepdims=True), 1e-9)  # all three are scaled alike: the hue stays
    x *= np.where(most < 0.7, 1, (1 - 0.3 * np.exp((0.7 - most) / 0.3)) / most)
    return f"LUT_3D_SIZE {n}\n" + "\n".join("%.5f %.5f %.5f" % tuple(row) for row in srgb_curve(x)) + "\n"


def read_ppm(stream) -> np.ndarray | None:
    """One binary PPM picture from a stream -> uint8 (H, W, 3), None at the end."""
    if stream.readline() != b"P6\n":
        return None
    width, height = map(int, stream.readline().split())
    stream.readline()  # 255
    data = np.frombuffer(stream.read(width * height * 3), np.uint8)
    return data.reshape(height, width, 3) if len(data) == width * height * 3 else None


# ------------------------------------------------------------------------------------------------------------
# video out


def check_output(path: str | Path, overwrite: bool = False, suffixes: tuple = ()) -> Path:
    """The absolute path of a file that may be written; call it before anything slow.

    Raises InputError: exists without overwrite, is a directory, its directory is missing or cannot be
    written, its name does not end in one of `suffixes`.
    """
    path = Path(path).absolute()
    try:
        if suffixes and path.suffix.lower() not in suffixes:
            raise InputError(f"{path}: the name of the output must end in {' or '.join(suffixes)}")
        if path.is_dir():
            raise InputError(f"{path}: is a directory, expected the name of a file to write")
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such directory to write to")
        if path.exists() and not overwrite:
            raise InputError(f"{path}: exists; give --overwrite to replace it")
        with tempfile.TemporaryFile(dir=path.parent):  # permission bits do not tell of read-only disks
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return path


class VideoWriter:
    """Writes frames and sound as H.264 + AAC at 25 fps; frames go to ffmpeg as they come.

    with VideoWriter("talk.mp4", 64, 64, wav) as video:
        video.write(frame)                              # uint8 (H, W, 3)

    wav: float (n,) in [-1, 1] at 16 kHz, or None; sample 0 is heard when frame 0 shows, and the sound keeps
    its length. sound: the file that wav was loaded from, whose own rate, channels and loudness the video gets then.
    Odd sizes get one more row or column (players want even ones). The file appears whole, or,
    after an error, not at all: ffmpeg works in a private temporary directory.
    Raises InputError: as check_output; disk full.
    """

    def __init__(self, path, height: int, width: int, wav: np.ndarray | None = None, overwrite: bool = False, sound=None):
        self.path = check_output(path, overwrite, VIDEO_SUFFIXES)
        self.overwrite = overwrite
        self.shape = (height, width, 3)
        self.count = 0
        self.folder = tempfile.TemporaryDirectory(prefix="talk-")
        folder = Path(self.folder.name)
        self.draft = folder / f"video{self.path.suffix.lower()}"
        self.log = open(folder / "log", "w+b")
        if sound is not None:
            write_own_sound(sound, folder / "sound.wav", len(wav))
        elif wav is not None:
            write_wav(folder / "sound.wav", wav)
        sound = [] if wav is None else ["-i", str(folder / "sound.wav"), "-c:a", "aac", "-b:a", "192k"]
        # the colours of HDTV, and said so: untagged video is shown differently by different players
        colours = "scale=out_color_matrix=bt709:out_range=tv"
        smear = f"fillborders=right={width % 2}:bottom={height % 2}:mode=smear"  # no black seam
        tags = "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv"
        command = [ffmpeg_path(), "-loglevel", "level+error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-video_size", f"{width}x{height}", "-framerate", str(FPS), "-i", "pipe:0", *sound]
        command += ["-vf", f"pad=w=ceil(iw/2)*2:h=ceil(ih/2)*2,{smear},{colours},format=yuv420p,{tags}"]
        # ours: 16 stays crisp at 64 px; veryfast takes half of the default's time
        command += ["-c:v", "libx264", "-crf", "16", "-preset", "veryfast", "-movflags", "+faststart"]
        self.process = subprocess.Popen(
            [*command, str(self.draft)], stdin=subprocess.PIPE, stderr=self.log, start_new_session=True
        )

    def write(self, frame: np.ndarray):
        """frame: uint8 (H, W, 3) RGB"""
        ok = frame.dtype == np.uint8 and frame.shape == self.shape
        assert ok, f"frame is {frame.dtype} {frame.shape}, expected uint8 {self.shape}"
        try:
            self.process.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            self.fail()
        self.count += 1

    def fail(self):
        """ffmpeg gave up: clean away, and say why."""
        self.process.wait()
        self.log.seek(0)
        reason = why(self.log.read().decode(errors="replace"))
        self.discard()
        raise InputError(f"{self.path}: could not be written ({reason})")

    def discard(self):
        """Ends ffmpeg and removes everything written so far."""
        self.process.kill()
        self.process.wait()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.log.close()
        self.folder.cleanup()

    def close(self):
        """Finishes the file and moves it to its place in one step."""
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            self.fail()
        if self.process.wait() or not self.count:
            self.fail()
        try:
            check_output(self.path, self.overwrite)  # another run may have been faster
            place(self.draft, self.path)
        finally:
            self.discard()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close() if kind is None else self.discard()


def write_wav(path: str | Path, wav: np.ndarray):
    """float (n,) in [-1, 1] at 16 kHz -> a 16-bit WAV file"""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(to_int16(wav).tobytes())


def place(draft: Path, path: Path):
    """Moves a finished file into place, maybe on another disk: the old file or the whole new one is there."""
    beside = path.with_name(f".talk-{os.getpid()}{path.suffix}")
    try:
        shutil.copyfile(draft, beside)
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------
# where the face is


@dataclass(frozen=True)
class Template:
    """What a square crop of a face looks like. Boxes are x0, y0, x1, y1 as fractions of the crop."""

    mouth: tuple  # hidden from the motion encoder, and weighted in losses: lips, cheeks and all of the jaw
    eyes: tuple
    lips: tuple  # the part of the mouth box that the MouthEncoder reads
    # the crop in units of a detection's larger side: its side, and the shift of its centre (right, down)
    side: float
    shift: tuple
    points: tuple = ()  # where both eyes and the middle of the mouth lie, as fractions; goes before side and shift


TEMPLATES = {
    "toy": Template(mouth=(0.25, 0.55, 0.75, 0.90), eyes=(0.22, 0.30, 0.78, 0.56), lips=(0.25, 0.55, 0.75, 0.90),
                    side=1.5, shift=(0, 0)),
    # UTKFace's crop, so that its photos are used whole: on 150 of them and their mirror images blazeface's key points
    # are, at the median, eyes at .293 and .690 across, .298 down, mouth at .490 across, .723 down; ours is symmetric
    "face": Template(mouth=(0.10, 0.54, 0.90, 1.0), eyes=(0.14, 0.18, 0.86, 0.42),
                     lips=(0.22, 0.58, 0.78, 0.94), side=1.04, shift=(0, -0.015),
                     points=((0.302, 0.298), (0.698, 0.298), (0.5, 0.723))),
    # FFHQ's alignment (Karras et al. 2019), which published generators and pSp know; ours does not rotate. The points are
    # those of FFHQ faces in facexlib, made symmetric; the boxes are those of "face", brought to these points
    "ffhq": Template(mouth=(0.25, 0.61, 0.75, 0.92), eyes=(0.28, 0.39, 0.72, 0.55),
                     lips=(0.33, 0.64, 0.67, 0.86), side=1.7, shift=(0, -0.17),
                     points=((0.377, 0.469), (0.623, 0.469), (0.5, 0.725))),
}
# what SyncNet v2 sees, 1.4 times a detection and lower (Chung & Zisserman's crops); no template of packs
TEMPLATES["syncnet"] = Template(mouth=(0.2, 0.38, 0.8, 0.72), eyes=(0.23, 0.11, 0.77, 0.29),
                                lips=(0.29, 0.41, 0.71, 0.67), side=1.4, shift=(0, 0.2),
                                points=((0.353, 0.196), (0.647, 0.196), (0.5, 0.512)))
# eyes, tip of the nose, corners of the mouth in the 112 px crops that ArcFace was trained on (InsightFace)
ARCFACE_POINTS = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
                           (70.7299, 92.2041)])  # fmt: skip


def square_at(points, wanted) -> tuple[float, float, float]:
    """x, y, side of the square in which `wanted`, (K, 2) as fractions of it, lie nearest to points (K, 2): least squares,
    no rotation."""
    points, wanted = np.asarray(points, float), np.asarray(wanted, float)
    spread = wanted - wanted.mean(0)
    side = (spread * points).sum() / (spread**2).sum()
    return (*(points.mean(0) - side * wanted.mean(0)), side)


def square_within(template: str, wanted: str) -> tuple[float, float, float]:
    """x, y, side of the crop `wanted` as fractions of the crop `template`; all of it where one of them has no points"""
    a, b = TEMPLATES[template].points, TEMPLATES[wanted].points
    return square_at(a, b) if a and b else (0.0, 0.0, 1.0)


def window(x: torch.Tensor, left: int, top: int, side: int) -> torch.Tensor:
    """(.., H, W) -> (.., side, side), what is seen from column `left` and row `top` on; the border repeated beyond x"""
    rows, cols = (torch.arange(first, first + side, device=x.device).clamp(0, edge - 1)
                  for first, edge in ((top, x.shape[-2]), (left, x.shape[-1])))
    return x.index_select(-2, rows).index_select(-1, cols)


def recrop(frames: torch.Tensor, template: str, wanted: str) -> torch.Tensor:
    """Crops (.., 3, H, H) of one template -> what the crop `wanted` would show, at the same size."""
    H = frames.shape[-1]
    left, top, side = (round(H * v) for v in square_within(template, wanted))
    if (left, top, side) == (0, 0, H):
        return frames
    return resized(window(frames, left, top, side).flatten(0, -4), H).unflatten(0, frames.shape[:-3])


def mask_mouth(frames: torch.Tensor, template: str, part: str = "mouth") -> torch.Tensor:
    """frames (.., 3, H, W) -> a copy with a grey (0) mouth box: THE place that makes lips come from sound.

    part: "mouth", jaw and cheeks with it, for driving frames; or "lips", which leaves a source its face."""
    rows, cols = box_slices(getattr(TEMPLATES[template], part), *frames.shape[-2:])
    frames = frames.clone()
    frames[..., rows, cols] = 0
    return frames


def box_slices(box: tuple, H: int, W: int) -> tuple[slice, slice]:
    """Box x0, y0, x1, y1 in fractions of a picture of H x W pixels -> its rows, its columns"""
    x0, y0, x1, y1 = box
    return slice(round(y0 * H), round(y1 * H)), slice(round(x0 * W), round(x1 * W))


S3FD = "s3fd-619a316812.pth"  # face-alignment's default, 90 MB: used where it lies, never fetched
S3FD_SIDE = 512  # pixels it is shown, ours: it takes seconds on larger pictures
MIN_SCORE = 0.65  # ours: 2 of 100 UTKFace portraits lie below; a dog has .63, a cat .5, textures less
SAME_FACE = 0.3  # overlap (intersection over union) of two boxes of one face; ours
MARGIN = 1.2  # of the larger side of a video's frame: what blazeface is shown (ours: faces at the edge are found)
CLOSER = 2.0  # box sides: the square of a second look (ours: there key points scatter least, 2 of 128 px)


def checkpoints_dir() -> Path:
    """Where face-alignment and torch.hub keep weights: $TORCH_HOME/hub/checkpoints."""
    return Path(torch.hub.get_dir()) / "checkpoints"


@lru_cache
def face_detectors() -> list:
    """face-alignment's detectors with weights at hand or within reach, loaded once a process; else []."""
    path = checkpoints_dir() / S3FD
    if not path.is_file():
        return blazeface()
    from face_alignment.detection.sfd import FaceDetector

    return [FaceDetector(device="cpu", path_to_detector=str(path))]  # sees all sizes at once


@lru_cache
def blazeface() -> list:
    """Both models of blazeface, that for near faces first (0.4 MB each, fetched if need be); else []."""
    from face_alignment.detection.blazeface import FaceDetector

    from losses import fetch  # here: losses imports this room

    detectors = []
    for name in ("blazeface", "blazeface_back"):
        try:
            paths = dict(path_to_detector=str(fetch(name)), path_to_anchor=str(fetch("blazeface_anchors")))
        except InputError:  # out of reach; the caller says what to do then
            return []
        options = dict(back_model=name == "blazeface_back", min_score_thresh=0.3)  # see detect_faces
        detectors.append(FaceDetector(device="cpu", **options, **paths))
    return detectors


def square_view(image: np.ndarray, x: int, y: int, side: int, size: int) -> np.ndarray:
    """The square of uint8 (H, W, 3) whose corner is x, y -> uint8 (size, size, 3), grey beyond the picture."""
    canvas = Image.new("RGB", (side, side), (128, 128, 128))
    canvas.paste(Image.fromarray(image), (-x, -y))
    return np.array(canvas.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BILINEAR))


def around(image: np.ndarray, margin: float) -> tuple[int, int, int]:
    """x, y, side of the square around a whole picture, `margin` times its larger side."""
    H, W = image.shape[:2]
    side = round(margin * max(H, W))
    return (W - side) // 2, (H - side) // 2, side


def look(detector, images: list, squares: list) -> list[list[np.ndarray]]:
    """One look of one detector at a square (x, y, side) of each picture -> float arrays x0, y0, x1, y1, score, and
    blazeface's points, in pixels of the picture; a list of them for each picture."""
    net = getattr(detector, "face_detector", None)
    blaze = hasattr(net, "back_model")
    size = S3FD_SIDE if not blaze else 256 if net.back_model else 128
    views = [square_view(image, *square, size) for image, square in zip(images, squares)]
    if blaze:
        # y0, x0, y1, x1, then x, y of eye, eye, nose, mouth, ear, ear as fractions, and the score
        order = [1, 0, 3, 2, 16, 4, 5, 6, 7, 10, 11]
        parts = (net.predict_on_batch(np.stack(views[i : i + 16])) for i in range(0, len(views), 16))
        found = [np.asarray(faces, np.float64).reshape(-1, 17)[:, order] for part in parts for faces in part]
    else:
        found = [np.reshape(detector.detect_from_image(view), (-1, 5)) / [*[size] * 4, 1] for view in views]
    for faces, (x, y, side) in zip(found, squares):
        for columns in (slice(0, 4), slice(5, None)):
            faces[:, columns] = faces[:, columns] * side + np.resize([x, y], faces[:, columns].shape[1])
    return [list(faces) for faces in found]


def detect_faces(image: np.ndarray, margins: tuple = (1.0, 1.2, 1.5, 2.0)) -> list[tuple] | None:
    """uint8 (H, W, 3) -> [(x0, y0, x1, y1, score, *points), ..] in pixels, the largest first.

    points, of blazeface only: x, y of the eye on the left of the picture, of the other eye, and of the mouth's middle.
    One look of blazeface says little: a dog can score .82 and a woman .55. So both its models look at the
    picture inside wider and wider margins, and a face is what a third of the looks find with a mean score of
    MIN_SCORE; its box is their mean. In video, where faces are known to be, margins=(1.2,) is enough, in a
    quarter of the time. Only what a look from near shows upright, with that score again, is kept (a cup seen from
    above has .7 from afar and .5 from near).
    None when no detector's weights are at hand or can be fetched (the caller says what to do then).
    """
    detectors = face_detectors()
    if not detectors:
        return None
    groups = []  # one list of boxes a face
    margins = margins if len(detectors) > 1 else (MARGIN,)
    for detector, margin in itertools.product(detectors, margins):  # blazeface sees squares only
        for box in look(detector, [image], [around(image, margin)])[0]:
            group = next((g for g in groups if overlap(g[0], box) > SAME_FACE), None)
            groups.append([box]) if group is None else group.append(box)
    faces = [np.mean(g, 0) for g in groups if 3 * len(g) >= len(margins) * len(detectors)]
    faces = [face for face in faces if face[4] >= MIN_SCORE]
    near = closer([image], [faces])[0]
    faces = [tuple(map(float, f)) for f, seen in zip(faces, near) if upright(seen) and seen[4] >= MIN_SCORE]
    return sorted(faces, key=lambda b: (b[0] - b[2]) * (b[3] - b[1]))


def turn_upright(image: np.ndarray) -> tuple[np.ndarray, list[tuple] | None, str]:
    """A photo, uint8 (H, W, 3), that may lie on its side or stand on its head -> the same turned so that a face in it is
    upright, what detect_faces finds there, and how it was turned in words; as it is where no way shows a face."""
    for k, how in enumerate(("", "by 90 degrees to the left", "by 180 degrees", "by 90 degrees to the right")):
        turned = np.ascontiguousarray(np.rot90(image, k))
        faces = detect_faces(turned)
        if faces is None or faces:
            return turned, faces, how
    return image, [], ""


def find_faces(frames: list) -> list[list[tuple]] | None:
    """Frames of one video, uint8 (H, W, 3) -> for each what detect_faces gives, by one or two looks in place of eight.

    A single look can be wrong; who follows a face through many frames (data.face_tracks) is not misled by it.
    The model for far faces looks where the first saw nothing. Each face is looked at once more from near, for points; who
    lies or stands on the head is left out.
    """
    detectors = face_detectors()
    if not detectors:
        return None
    found = [[] for _ in frames]
    for detector in detectors:
        blank = [i for i, faces in enumerate(found) if not faces]
        views = [frames[i] for i in blank]
        for i, faces in zip(blank, look(detector, views, [around(frame, MARGIN) for frame in views])):
            found[i] = [face for face in faces if face[4] >= MIN_SCORE]
    found = [[face for face in faces if upright(face)] for faces in closer(frames, found)]
    return [sorted((tuple(map(float, f)) for f in faces), key=lambda b: (b[0] - b[2]) * (b[3] - b[1])) for faces in found]


def upright(face) -> bool:
    """Whether a face's points, where it has them, show it less than 40 degrees off upright: blazeface finds lying and
    standing-on-its-head faces, too, which a crop without rotation cannot bring to the template."""
    if len(face) < 11:
        return True
    eye, other, mouth = np.reshape(face[5:11], (3, 2))
    across, down = other - eye, mouth - (eye + other) / 2
    return bool(across[0] > 1.2 * abs(across[1]) and down[1] > 1.2 * abs(down[0]))


def closer(frames: list, found: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Each face as blazeface sees it from near, where it does: in the middle, and of the size that it knows best."""
    places = [(i, k) for i, faces in enumerate(found) for k in range(len(faces))]
    detectors = blazeface()
    if not places or not detectors:
        return found
    squares = []
    for i, k in places:
        x0, y0, x1, y1 = found[i][k][:4]
        side = max(8, round(CLOSER * max(x1 - x0, y1 - y0)))
        squares.append((round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), side))
    seen = look(detectors[0], [frames[i] for i, _ in places], squares)
    better = [list(faces) for faces in found]
    for (i, k), faces in zip(places, seen):
        best = max(faces, key=lambda face: overlap(face, found[i][k]), default=None)
        if best is not None and overlap(best, found[i][k]) > SAME_FACE:
            better[i][k] = best
    return better


def overlap(a, b) -> float:
    """Intersection over union of two boxes."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, w) * max(0, h)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def face_box(faces: list[tuple], template: str, number: int = 1) -> tuple:
    """Faces of detect_faces -> the square crop (x0, y0, x1, y1) around face `number`, 1 being the largest.

    Where the detector gave points, the square that brings them nearest (least squares, no rotation) to the template's:
    three times as exact as the detector's box, which also depends on hair and beard.
    """
    if not 1 <= number <= len(faces):
        raise InputError(f"--face {number}: the number of faces found is {len(faces)}")
    x0, y0, x1, y1 = faces[number - 1][:4]
    t, points = TEMPLATES[template], np.reshape(faces[number - 1][5:], (-1, 2))
    if len(points) and t.points:
        x, y, side = square_at(points, t.points)  # side: pixels of the crop's edge
        if side > 0:
            return (float(x), float(y), float(x + side), float(y + side))
    unit = max(x1 - x0, y1 - y0)
    x, y = (x0 + x1) / 2 + t.shift[0] * unit, (y0 + y1) / 2 + t.shift[1] * unit
    half = t.side * unit / 2
    return (x - half, y - half, x + half, y + half)


def crop_face(image: np.ndarray, box: tuple, size: int) -> np.ndarray:
    """uint8 (H, W, 3), box in pixels -> uint8 (size, size, 3); beyond the picture its border is repeated."""
    H, W = image.shape[:2]
    x0, y0, x1, y1 = box
    assert x1 > x0 and y1 > y0, f"empty box {box}"
    left, top = max(0, int(np.ceil(-x0))), max(0, int(np.ceil(-y0)))
    right, bottom = max(0, int(np.ceil(x1)) - W), max(0, int(np.ceil(y1)) - H)
    if left or top or right or bottom:
        image = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge")
    box = (x0 + left, y0 + top, x1 + left, y1 + top)
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box=box))


# ------------------------------------------------------------------------------------------------------------
# the networks at toy sizes


class ResDown(nn.Module):
    """Halve the size: two 3x3 convolutions beside a pooled 1x1 shortcut. No normalisation: batches may be of one."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_in, 3, padding=1), nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (N, C, H, W) -> (N, C', H/2, W/2)
        y = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        return (y + self.skip(F.avg_pool2d(x, 2))) / math.sqrt(2)


class VisualEncoder(nn.Module):
    """Picture -> W+ code: a feature pyramid with heads for coarse, middle and fine styles.

    Richardson et al., "Encoding in Style: pSp", CVPR 2021, section 3: styles 0-2 are read from the coarse map, 3-6 from
    the middle one, the rest from the fine one, and the sum of top-down features feeds the finer levels.
    Differs: a slim residual trunk and one head a level instead of IR-SE50 and one a style; and, ours, a linear path
    beside the trunk (the picture at 32x32 -> `linear` numbers -> W+), which holds an unseen face after little training
    where a young trunk does not. It starts from the principal components of the training pictures (`start_linear`).
    """

    def __init__(self, size: int, dim: int, L: int, width: int = 48, linear: int = 192):
        super().__init__()
        self.size, self.dim, self.L = size, dim, L
        depth = int(math.log2(size)) - 2                                     # halvings down to 4x4
        ch = [min(width * 2 ** i, width * 4) for i in range(depth + 1)]
        self.stem = nn.Conv2d(3, ch[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResDown(a, b) for a, b in zip(ch, ch[1:]))
        self.groups = [3, min(4, L - 3), max(0, L - 7)]                      # pSp: styles 0-2, 3-6, 7-
        finer = (ch[-2], ch[-3]) if L > 7 else (ch[-2],)                     # 16 px has no fine styles
        self.lateral = nn.ModuleList(nn.Conv2d(c, ch[-1], 1) for c in finer)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(ch[-1], 32, 3, padding=1), nn.LeakyReLU(0.2),
                          nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, n * dim))
            for n in self.groups if n)
        self.linear_down = nn.Linear(3 * min(32, size) ** 2, linear, bias=False) if linear else None
        self.linear_up = nn.Linear(linear, L * dim, bias=False) if linear else None
        self.register_buffer("latent_avg", torch.zeros(L, dim))

    def forward(self, x):
        """x (N, 3, size, size) in [-1, 1] -> (N, L, D)"""
        assert x.shape[1:] == (3, self.size, self.size), (
            f"picture is {tuple(x.shape[1:])}, expected (3, {self.size}, {self.size})")
        maps = [self.stem(x.contiguous(memory_format=torch.channels_last))]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        pyramid = [maps[-1]]                                                 # coarse (N, C, 4, 4), middle, fine
        for lateral, finer in zip(self.lateral, maps[-2::-1]):
            pyramid.append(lateral(finer) + F.interpolate(pyramid[-1], scale_factor=2, mode="nearest"))
        z = torch.cat([head(level).unflatten(1, (-1, self.dim)) for head, level in zip(self.heads, pyramid)], 1)
        if self.linear_down is not None:
            z = z + self.linear_up(self.linear_down(small_picture(x))).unflatten(1, (self.L, self.dim))
        return self.latent_avg + z                                           # (N, L, D)

    @torch.no_grad()
    def start_linear(self, pictures):
        """Set the linear path to the principal components of pictures (n, 3, H, W), n > `linear`; output unit variance.

        The way up starts at zero (the training finds it), so that a fresh encoder is still the trunk alone.
        """
        x = small_picture(pictures).cpu().double()                           # Apple's chips have no float64
        _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        k = len(self.linear_down.weight)
        self.linear_down.weight.copy_(v[:k] * (math.sqrt(len(x)) / s[:k].clamp_min(1e-3 * s[0]))[:, None])
        self.linear_up.weight.zero_()


class MouthEncoder(nn.Module):
    """The mouth of a picture -> M numbers: what `mask_mouth` hides from the VisualEncoder. Ours.

    So few numbers that they must mean the same on every face: how far it is open, how wide, teeth, a smile. Trained in
    stage 2 on photos of many people, they are the language in which stage 3 lets the sound speak: see fusion.py.

    With `shape_dim` the first so many are the lips' shape, as landmarks taught the `reader` (train.train_reader), and
    mean the same by force; the others are what it leaves: colour, teeth, a beard.
    """

    def __init__(self, template: str, dim: int, shape_dim: int = 0, width: int = 32):
        super().__init__()
        self.template = template
        self.linear = nn.Linear(3 * 32 * 32, dim - shape_dim)  # as of the VisualEncoder: train.start_picture sets it
        body = nn.Sequential(
            nn.Conv2d(1 if shape_dim else 3, width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 4 * width, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(4 * width * 16, shape_dim or dim))
        self.reader, self.body = (body, None) if shape_dim else (None, body)

    def box(self, x, air: float = 0.0):
        """(N, 3, H, W) -> (N, 3, 32, 32): the lips; air: more on each side, in box sides, and so more pixels"""
        x0, y0, x1, y1 = TEMPLATES[self.template].lips
        across, down, edge = air * (x1 - x0), air * (y1 - y0), round(32 * (1 + 2 * air))
        rows, cols = box_slices((x0 - across, y0 - down, x1 + across, y1 + down), *x.shape[-2:])
        return F.interpolate(x[..., rows, cols], (edge, edge), mode="bilinear", antialias=True, align_corners=False)

    def read(self, box):  # (N, 3, 32, 32) -> the lips' shape (N, K): colour, skin and lamp say nothing about it
        box = box.mean(1, keepdim=True)
        box = box - box.mean((2, 3), keepdim=True)
        box = box / box.std((2, 3), keepdim=True).clamp_min(1e-2)
        return self.reader(box.contiguous(memory_format=torch.channels_last))

    def forward(self, x):  # (N, 3, H, W) -> (N, M)
        box = self.box(x)
        if self.reader:
            return torch.cat([self.read(box), self.linear(box.flatten(1))], 1)
        return self.linear(box.flatten(1)) + self.body(box.contiguous(memory_format=torch.channels_last))


def small_picture(x):
    """(N, 3, H, W) -> (N, 3 * 32 * 32): what the linear path sees"""
    if x.shape[-1] > 32:
        x = F.avg_pool2d(x, x.shape[-1] // 32)
    return x.contiguous().flatten(1)


class HyperNetwork(nn.Module):
    """A photo and what the generator makes of its code -> relative changes of the generator's weights.

    Alaluf et al., "HyperStyle", CVPR 2022, sections 3.2-3.3: six channels in, one change an (out, in) channel pair of
    each convolution (the kernel's taps share it), W <- W (1 + delta); toRGB layers are left alone.
    Differs at these sizes: a slim trunk and deltas of low rank, u v^T (ours: a full head for 128 x 128 channels would
    outweigh the generator).
    """

    def __init__(self, size: int, layers: list, width: int = 16, rank: int = 2):
        """layers: (O, I) of each 3x3 layer of the generator that is changed, or None for one that is not, in the order of
        Generator.styled_convs()"""
        super().__init__()
        depth = int(math.log2(size)) - 2
        ch = [min(width * 2 ** i, width * 4) for i in range(depth + 1)]
        self.layers, self.rank = layers, rank
        self.trunk = nn.Sequential(nn.Conv2d(6, ch[0], 3, padding=1), *(ResDown(a, b) for a, b in zip(ch, ch[1:])),
                                   nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(ch[-1] * 16, 128), nn.LeakyReLU(0.2))
        self.heads = nn.ModuleList(nn.Linear(128, sum(oi) * rank) if oi else None for oi in layers)
        for head, oi in zip(self.heads, layers):
            if oi:
                nn.init.zeros_(head.weight[:oi[0] * rank])  # u starts at zero: the first delta is none
                nn.init.zeros_(head.bias)

    def forward(self, x, y_hat):
        """x, y_hat (B, 3, H, W) in [-1, 1] -> list of (B, O, I) or None, one a layer"""
        h = self.trunk(torch.cat([x, y_hat], 1).contiguous(memory_format=torch.channels_last))
        deltas = []
        for head, oi in zip(self.heads, self.layers):
            if oi:
                u, v = head(h).unflatten(1, (-1, self.rank)).split(oi, 1)    # (B, O, r), (B, I, r)
            deltas.append(u @ v.transpose(1, 2) if oi else None)
        return deltas


# ------------------------------------------------------------------------------------------------------------
# the published networks. Keys and shapes are those of the authors' files; `width` narrows them for tests (64 published)


class SqueezeExcite(nn.Module):
    """Each channel times a gate in (0, 1) made from the mean of all channels; Hu et al. 2018"""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class BlockIRSE(nn.Module):
    """ArcFace's improved residual block with squeeze and excitation. (N, C, H, W) -> (N, C', H/stride, W/stride)"""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if c_in == c_out else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), nn.PReLU(c_out),
            nn.Conv2d(c_out, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), SqueezeExcite(c_out))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


def trunk_ir_se50(width: int = 64) -> tuple[nn.Sequential, nn.Sequential]:
    """(input_layer, body) of IR-SE50, ArcFace's and pSp's trunk: (N, 3, H, W) -> (N, 64, H, W) -> (N, 512, H/16, W/16)"""
    blocks, c_in = [], width
    for factor, count in ((1, 3), (2, 4), (4, 14), (8, 3)):
        for k in range(count):
            blocks.append(BlockIRSE(c_in, factor * width, 1 if k else 2))
            c_in = factor * width
    entry = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width))
    return entry, nn.Sequential(*blocks)


def resized(x, size: int):
    """(N, 3, H, W) -> (N, 3, size, size), bilinear without prefilter: OpenCV's default, which the experts were fed"""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def at_256(x):
    """(N, 3, H, H) -> (N, 3, 256, 256), what pSp, HyperStyle and ArcFace's crop are made for: larger pictures pooled,
    as their authors do; smaller ones enlarged bilinearly (ours)"""
    return F.adaptive_avg_pool2d(x, 256) if x.shape[2] > 256 else resized(x, 256)


def head_convolutions(c_in: int, inner: int, c_out: int, strides: tuple) -> nn.Sequential:
    """3x3 convolutions with these strides, each with a leaky ReLU of 0.01, `inner` channels between them"""
    ch, layers = [c_in, *[inner] * (len(strides) - 1), c_out], []
    for a, b, stride in zip(ch, ch[1:], strides):
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.LeakyReLU()]
    return nn.Sequential(*layers)


class StyleHead(nn.Module):
    """pSp's map2style: (N, C, s, s) -> (N, D), halved by convolutions down to one place, then an equalised layer"""

    def __init__(self, channels: int, dim: int, spatial: int):
        super().__init__()
        self.convs = head_convolutions(channels, dim, dim, (2,) * int(math.log2(spatial)))
        self.linear = EqualLinear(dim, dim)

    def forward(self, x):
        return self.linear(self.convs(x).flatten(1))


class GradualStyleEncoder(nn.Module):
    """pSp's encoder as published: picture -> W+ code. Richardson et al., CVPR 2021, section 3.

    IR-SE50 is tapped at 64x64, 32x32 and 16x16; coarse features are enlarged and added to finer ones; styles 0-2 are read
    from the coarse map, 3-6 from the middle, the rest from the fine one, each by a head of its own. What the heads say
    is a difference from latent_avg, the mean w, which lies beside the weights in the authors' files.
    """

    TAPS = (6, 20, 23)  # blocks of the trunk

    def __init__(self, L: int, dim: int = 512, width: int = 64):
        super().__init__()
        self.input_layer, self.body = trunk_ir_se50(width)
        self.styles = nn.ModuleList(StyleHead(8 * width, dim, 16 if i < 3 else 32 if i < 7 else 64) for i in range(L))
        self.latlayer1, self.latlayer2 = (nn.Conv2d(c * width, 8 * width, 1) for c in (4, 2))
        self.register_buffer("latent_avg", torch.zeros(L, dim))

    def forward(self, x):  # (N, 3, H, H) in [-1, 1], brought to 256 px -> (N, L, D)
        x, maps = self.input_layer(at_256(x).contiguous(memory_format=torch.channels_last)), []
        for i, block in enumerate(self.body):
            x = block(x)
            if i in self.TAPS:
                maps.append(x)
        fine, middle, coarse = maps                                            # at 64x64, 32x32, 16x16
        middle = self.latlayer1(middle) + F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=True)
        fine = self.latlayer2(fine) + F.interpolate(middle, scale_factor=2, mode="bilinear", align_corners=True)
        levels = [coarse] * 3 + [middle] * 4 + [fine] * len(self.styles)
        return self.latent_avg + torch.stack([head(level) for head, level in zip(self.styles, levels)], 1)


class WEncoder(nn.Module):
    """HyperStyle's own first guess: one w for all style layers, from the mean of IR-SE50's last map."""

    def __init__(self, L: int, dim: int = 512, width: int = 64):
        super().__init__()
        self.input_layer, self.body = trunk_ir_se50(width)
        self.linear = EqualLinear(8 * width, dim)
        self.register_buffer("latent_avg", torch.zeros(L, dim))

    def forward(self, x):  # (N, 3, H, H) in [-1, 1] -> (N, L, D)
        x = self.body(self.input_layer(at_256(x).contiguous(memory_format=torch.channels_last)))
        return self.latent_avg + self.linear(x.mean((2, 3)))[:, None]


class BasicBlock(nn.Module):
    """ResNet-34's (He et al. 2016) under torchvision's names: (N, C, H, W) -> (N, C', H/stride, W/stride)"""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.downsample = None if c_in == c_out else nn.Sequential(
            nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class SharedHead(nn.Module):
    """HyperStyle's head for all the widest layers: a code (B, Z) -> changes (B, O, I, 3, 3), O = I = Z, by two linear
    maps, the first to a code an input channel (Ha et al. 2017, "HyperNetworks").

    The authors view the product (B, I, O 3 3) as (B, O, I, 3, 3) without turning it; so do we, for their weights' sake.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.w1, self.b1 = (nn.Parameter(torch.randn(*shape, dim * 9) / 40) for shape in ((dim,), ()))  # 40: HyperStyle's
        self.w2, self.b2 = (nn.Parameter(torch.randn(*shape, dim * dim) / 40) for shape in ((dim,), ()))

    def forward(self, code):
        B, dim = code.shape
        h = torch.addmm(self.b2, code, self.w2).unflatten(1, (dim, dim))       # (B, I, Z)
        return (h @ self.w1 + self.b1).view(B, dim, dim, 3, 3)


class SharedBlock(nn.Module):
    """Feature map (B, C, 16, 16) -> the code of one layer -> SharedHead, which every such block holds as `hypernet`"""

    def __init__(self, channels: int, head: SharedHead):
        super().__init__()
        self.convs = head_convolutions(channels, channels // 4, channels, (1, 2, 2, 2, 2))
        self.linear = EqualLinear(channels, channels)
        self.hypernet = head

    def forward(self, x):
        return self.hypernet(self.linear(self.convs(x).flatten(1)))


class FullBlock(nn.Module):
    """Feature map (B, C, 16, 16) -> changes (B, O, I): one number a pair of channels"""

    def __init__(self, channels: int, O: int, I: int):  # noqa: E741
        super().__init__()
        self.shape = (O, I)
        self.convs = head_convolutions(channels, channels // 2, channels, (2, 2, 2))
        self.output = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, O * I, 1))

    def forward(self, x):
        return self.output(self.convs(x)).view(len(x), *self.shape)


class SeparableKernel(nn.Module):
    """A code (B, C, 1, 1) -> changes (B, O, I, 3, 3): for each tap an outer product, then a linear map of each axis"""

    def __init__(self, channels: int, O: int, I: int):  # noqa: E741
        super().__init__()
        self.make_kernel_in, self.make_kernel_out = nn.Linear(channels, 9 * I), nn.Linear(channels, 9 * O)
        self.kernel_linear_in, self.kernel_linear_out = nn.Linear(I, I), nn.Linear(O, O)

    def forward(self, code):
        code = code.flatten(1)
        a, b = self.make_kernel_in(code).unflatten(1, (9, -1)), self.make_kernel_out(code).unflatten(1, (9, -1))
        kernel = self.kernel_linear_in(b[..., :, None] * a[..., None, :])      # (B, 9, O, I)
        kernel = self.kernel_linear_out(kernel.transpose(2, 3))                # (B, 9, I, O)
        return kernel.permute(0, 3, 2, 1).unflatten(3, (3, 3))


class SeparableBlock(nn.Module):
    """Feature map (B, C, 16, 16) -> changes (B, O, I, 3, 3)"""

    def __init__(self, channels: int, O: int, I: int):  # noqa: E741
        super().__init__()
        self.convs = head_convolutions(channels, channels // 2, channels, (2, 2, 2, 2))
        self.output = nn.Sequential(SeparableKernel(channels, O, I))

    def forward(self, x):
        return self.output(self.convs(x))


class HyperStyleNet(nn.Module):
    """HyperStyle's hypernetwork as published: a photo and what the generator makes of its code -> relative changes of the
    generator's 3x3 layers. Alaluf et al., CVPR 2022, section 3.2.

    A ResNet-34 on six channels, without its first pool, and a block for each layer; the widest layers share a head. The
    others have one of two forms: "shared" gives a number a channel pair (the authors' SharedWeightsHyperNetResNet),
    "separable" a number a tap from an outer product, with a third fewer weights (..Separable).
    """

    def __init__(self, layers: list, form: str, width: int = 64):
        """layers: (O, I) of each 3x3 layer of the generator, in the order of Generator.styled_convs()"""
        super().__init__()
        assert form in ("shared", "separable"), f"form is {form}, expected shared or separable"
        C = 8 * width
        self.conv1, self.bn1 = nn.Conv2d(6, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.PReLU(width)
        ch = [width, *(f * width for f, count in ((1, 3), (2, 4), (4, 6), (8, 3)) for _ in range(count))]
        self.body = nn.Sequential(*(BasicBlock(a, b, 1 if a == b else 2) for a, b in zip(ch, ch[1:])))
        self.shared_weight_hypernet = SharedHead(C)
        blocks = [SharedBlock(C, self.shared_weight_hypernet) if oi == (C, C) else
                  (FullBlock if form == "shared" else SeparableBlock)(C, *oi) for oi in layers]
        # the authors count toRGB layers, too, which they leave alone: one after the first 3x3 layer, then after every two
        places = [None if i % 3 == 1 else blocks[i - (i + 1) // 3] for i in range(len(blocks) + len(blocks) // 2 + 1)]
        self.refinement_blocks = nn.ModuleList(places)
        for module in self.modules():  # as torchvision starts its ResNets
            if isinstance(module, BasicBlock):
                for conv in (module.conv1, module.conv2):
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x, y_hat):
        """x, y_hat (B, 3, H, H) in [-1, 1], brought to 256 px -> list of (B, O, I, 3, 3) or (B, O, I), one a 3x3 layer"""
        x = torch.cat([at_256(x), at_256(y_hat)], 1).contiguous(memory_format=torch.channels_last)
        x = self.body(self.relu(self.bn1(self.conv1(x))))                      # (B, C, 16, 16)
        return [block(x) for block in self.refinement_blocks if block is not None]


# ------------------------------------------------------------------------------------------------------------
# and their files


def parts_of(path: str | Path) -> tuple[dict, dict]:
    """A checkpoint of pSp's or HyperStyle's code -> (what lies beside the weights, {part: its state dict}).

    The parts are "encoder", "hypernet", "decoder", as far as the file has them; of a file with bare keys "".
    InputError: see read_weights; weights that belong to no part beside those that do.
    """
    content = read_weights(path)
    state, parts = content.get("state_dict", content), {}
    if not isinstance(state, dict):
        raise InputError(f"{path}: its 'state_dict' is a {type(state).__name__}, expected a dict of weights")
    for key, value in state.items():
        part, _, rest = str(key).partition(".")
        part, rest = (part, rest) if part in ("encoder", "hypernet", "decoder") else ("", str(key))
        parts.setdefault(part, {})[rest] = value
    if "" in parts and len(parts) > 1:
        raise InputError(f"{path}: {one_line(next(iter(parts['']))) or 'a nameless weight'} is unknown beside "
                         f"{' and '.join(part for part in parts if part)}")
    return content if "state_dict" in content else {}, parts


# ArcFace's last layers, which a trunk does without
EMBEDDING = re.compile(r"output_layer\.[034]\.(weight|bias|running_mean|running_var|num_batches_tracked)")


def load_encoder(path: str | Path, L: int, dim: int = 512) -> tuple[nn.Module, dict | None]:
    """pSp's encoder, or HyperStyle's W encoder, for L styles, from a file of their authors.

    Of a file with more styles (1024 px: 18) the first L are taken, which are the same layers' of a smaller generator.
    ArcFace's IR-SE50 is taken, too: it gives the trunk alone, from which pSp's training starts, with heads for codes of
    `dim` numbers.

    Returns:
        (encoder, the decoder's state dict or None). encoder.latent_avg is NaN where the file has none: estimate it.

    Raises:
        InputError: no such file; damaged, hostile or of another kind; fewer than L styles.
    """
    beside, parts = parts_of(path)
    state = parts.get("encoder") or parts.get("", {})
    with refusing(path, "no encoder of pSp or HyperStyle, and no ArcFace"):
        width = len(state["input_layer.0.weight"])
        if "output_layer.3.weight" in state:
            trunk = {key: value for key, value in state.items() if not EMBEDDING.fullmatch(key)}
            trunk = load_strictly(
                lambda: nn.ModuleDict(zip(("input_layer", "body"), trunk_ir_se50(width))), trunk, f"{path}, ArcFace")
            encoder = GradualStyleEncoder(L, dim, width)
            encoder.load_state_dict(trunk.state_dict(), strict=False)
            encoder.latent_avg.fill_(torch.nan)
            return encoder, None
        kind, last = WEncoder, "linear.weight"
        if "styles.0.linear.weight" in state:
            kind, last = GradualStyleEncoder, "styles.0.linear.weight"
        dim, mean = len(state[last]), beside.get("latent_avg")
        styles = max(L, sum(f"styles.{i}.linear.weight" in state for i in range(18)))  # 18: those of 1024 px
        mean = mean.reshape(-1, mean.shape[-1]) if isinstance(mean, torch.Tensor) else torch.full((1, dim), torch.nan)
        mean = mean.repeat(styles, 1) if len(mean) == 1 else mean[:styles]             # (1, D): a file made in W
    encoder = load_strictly(lambda: kind(styles, dim, width), state | dict(latent_avg=mean), path)
    encoder.latent_avg = encoder.latent_avg[:L].clone()
    if kind is GradualStyleEncoder:
        encoder.styles = encoder.styles[:L]
    return encoder, parts.get("decoder")


def load_hypernet(path: str | Path, layers: list) -> tuple[HyperStyleNet, str, dict | None]:
    """HyperStyle's hypernetwork from its authors' file -> (network, its form, the decoder's state dict or None).

    layers: (O, I) of each 3x3 layer of the generator. InputError: as load_encoder; made for another generator.
    """
    _, parts = parts_of(path)
    state = parts.get("hypernet", {})
    with refusing(path, "no HyperStyle checkpoint"):
        width = len(state["conv1.weight"])
        form = "separable" if any("make_kernel_in" in key for key in state) else "shared"
    return load_strictly(lambda: HyperStyleNet(layers, form, width), state, path), form, parts.get("decoder")
