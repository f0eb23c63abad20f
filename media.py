"""Files in and out: sound, photos, videos, and what the user got wrong (InputError, run, Parser).

A photo becomes uint8 (H, W, 3) RGB as a viewer shows it (EXIF turned, alpha over white), a video a stream of such frames
at exactly 25 fps, sound float32 mono at 16 kHz in [-1, 1]. Frames become H.264 with sound. Videos are streamed both ways:
memory does not grow with length.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps

SAMPLE_RATE = 16000                          # Hz (FC-TFG)
FPS = 25                                     # video frames a second, everywhere
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS       # 640: frame k is wav[640 k : 640 (k + 1)]

# ffmpeg opens media containers only: its text and playlist formats (tty, hls, concat) can name other files
DEMUXERS = (
    "aac,ac3,aiff,amr,ape,apng,asf,au,avi,caf,dv,eac3,flac,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mov,mp4,"
    "m4a,3gp,mp3,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,voc,w64,wav,webp_anim,wv,yuv4mpegpipe"
)
# Pillow's other formats are rare, or start other programs (EPS runs ghostscript)
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")    # containers that hold H.264 and AAC


# ---------------------------------------------------------------------------------------------------------------------
# what the user got wrong

class InputError(Exception):
    """Something the user got wrong. str(e) is one line: the file or option, and what is wrong with it."""

    def __str__(self):
        return " ".join(super().__str__().split())


def run(main):
    """Runs a script's main(): InputError, or no memory, is one line on stderr and status 2, Ctrl-C 130, SIGTERM 143"""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: `with` and `finally` clean up
    try:
        main()
    except (InputError, MemoryError, OSError, RuntimeError) as error:
        if not isinstance(error, InputError) and not is_out_of_memory(error):
            raise
        reason = error if isinstance(error, InputError) else "not enough memory: close other programs, or give it less"
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was refused to Python, NumPy or the system, or to torch, whose CPU side has no exception for it"""
    by_torch = isinstance(error, RuntimeError) and re.search("allocat|bad_alloc|out of memory", str(error))
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or bool(by_torch)


# what a number option may be, by its name, in every script; others: whole ones from 1, floats from 0, up to 10^9.
# Ours: wide enough for all that can work
RATE = (1e-9, 1e3)
LIMITS = dict(seed=(0, 2**62), workers=(0, 256), refine=(0, 100), people=(1, 10**6), seconds=(0.2, 600), batch=(1, 10**5),
              lr=RATE, lr_gan=RATE, augment=(-1, 1))


class Parser(argparse.ArgumentParser):
    """ArgumentParser that reports in one line, without the usage, and keeps numbers within LIMITS"""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, args=None, namespace=None, **limits):
        """limits: (low, high) of options that mean something else in this script. InputError: a number outside, or NaN"""
        args = super().parse_args(args, namespace)
        for name, value in vars(args).items():
            if type(value) in (int, float):
                low, high = (LIMITS | limits).get(name, (1 if type(value) is int else 0, 10**9))
                if not low <= value <= high:
                    commands = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
                    actions = [a for parser in (self, *chain(*commands)) for a in parser._actions if a.option_strings]
                    option = next(a.option_strings[0] for a in actions if a.dest == name)
                    raise InputError(f"{option} {value}: must lie between {low} and {high}")
        return args


def check_file(path: str | Path) -> Path:
    """The absolute path of a file that exists, is not empty and may be read; InputError otherwise.

    Absolute, because '-i.wav' is an option to ffmpeg and 'http:x.wav' an address; '/here/-i.wav' is neither.
    """
    path = Path(path).absolute()
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a directory, expected a file")
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise InputError(f"{path}: the file is empty")
    except (OSError, ValueError) as error:                   # no permission, name too long, NUL in the name
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return path


def make_folder(path: str | Path) -> Path:
    """Absolute path of a folder, made with its parents. InputError: it cannot be made"""
    path = Path(path).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a directory ({error.strerror})") from None
    return path


def check_output(path: str | Path, overwrite: bool = False, suffixes: tuple = ()) -> Path:
    """The absolute path of a file that may be written; call it before anything slow.

    Raises InputError: exists without overwrite, is a directory, its directory is missing or cannot be written, its name
    does not end in one of `suffixes`.
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
        with tempfile.TemporaryFile(dir=path.parent):        # permission bits do not tell of read-only disks
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return path


# ---------------------------------------------------------------------------------------------------------------------
# ffmpeg

# an output for every stream that is not decoded. Where clocks jump, as in transport streams one after another, ffmpeg
# shifts all streams that it reads by one length: two runs shift alike, one for sound and one for pictures
READ_ALL = ["-map", "0:V?", "-map", "0:a?", "-c", "copy", "-f", "null", "-"]


@lru_cache
def ffmpeg_path() -> str:
    """Absolute path of an ffmpeg: the one of imageio-ffmpeg, else the one on PATH"""
    try:
        found = shutil.which(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        found = shutil.which("ffmpeg")
    if not found:
        raise InputError("ffmpeg is missing: pip install imageio-ffmpeg, or install ffmpeg")
    return str(Path(found).absolute())


def decoder(path: str | Path, *output: str, before: tuple = ()) -> list[str]:
    """Argument list of an ffmpeg that reads `path`, a local media file and nothing else, to `output`.

    before: options of the input.
    """
    quiet = ["-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info"]
    local = ["-protocol_whitelist", "file,pipe", "-format_whitelist", DEMUXERS]
    return [ffmpeg_path(), *quiet, *local, *before, "-i", f"file:{check_file(path)}", *output]


def describe(path: str | Path) -> str:
    """ffmpeg's description of a file before it decodes anything: container, length and streams"""
    return subprocess.run(decoder(path), capture_output=True).stderr.decode(errors="replace")


# a stream's line of it is indented by two spaces, in a group by four, tags otherwise: a title cannot pass for a stream
STREAM = r"^\[info\]   (?:  )?Stream #0:(\d+).*?: "


def last_error(log: str) -> str:
    """ffmpeg's last error message without its '[mov @ 0x55..] [error]' prefix: an InputError's reason"""
    errors = re.findall(r"^.*\[(?:error|fatal)\] (.*)$", log, re.M)
    return errors[-1].strip() if errors else "unknown format"


def length_is_open(path: Path) -> bool:
    """Whether the header of a WAV, RF64 or CAF file leaves the length open, as programs do that write to a pipe.

    They leave 0 or a number as large as the field holds. From 1.9e9 on (ours) no size is believed that the file lacks.
    """
    with open(path, "rb") as file:
        head = file.read(65536)
    if head[:4] == b"RF64":
        return not any(head[28:36])                          # the data's size in the chunk ds64
    at = head.find(b"data", 12)
    size = head[at + 4 : at + 12] if head[:4] == b"caff" else head[at + 7 : at + 3 : -1]  # CAF is big-endian
    return head[:4] in (b"RIFF", b"caff") and at > 0 and not 0 < int.from_bytes(size, "big") < 1.9e9


def last_packet(path: Path, *streams: str) -> float:
    """Seconds from the file's beginning to the end of the last packet of these streams, without decoding"""
    maps = chain(*(("-map", stream) for stream in streams))
    command = decoder(path, *maps, "-c", "copy", "-f", "framecrc", "pipe:1")
    table = subprocess.run(command, capture_output=True).stdout.decode(errors="replace")
    unit = {stream: int(a) / int(b) for stream, a, b in re.findall(r"^#tb (\d+): (\d+)/(\d+)", table, re.M)}
    packets = re.findall(r"^(\d+),[^,]*, *(-?\d+), *(\d+),", table, re.M)  # stream, dts, pts, duration
    return max(((int(begin) + int(length)) * unit[stream] for stream, begin, length in packets), default=0.0)


def check_whole(path: Path, log: str, status: int, stream: str, seconds: float):
    """InputError if ffmpeg's log, its status and the `seconds` that it decoded of a stream say a file is damaged or cut.

    A decoding error alone is not a reason: many files have one at their beginning and play well. Nor is a stream shorter
    than its file, nor a length that ffmpeg only estimates: the stream's own packets must go on, or those of no stream
    reach the length that the header states.
    """
    kind = "".join(re.findall(r"^\[info\] Input #0, ([^,]*)", log, re.M))
    length = re.search(r"^(?:\[info\] )?  Duration: (\d+):(\d+):([\d.]+)", log, re.M)
    length = 0.9 * (int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3])) if length else 0.0
    stated = kind not in ("mpegts", "mpeg", "h264", "hevc") and "Estimating duration" not in log
    short = stated and "[error]" in log and seconds < length
    short = short and (last_packet(path, "0:a?", "0:V?") < length or 0.9 * last_packet(path, stream) > seconds)
    # raw samples end before the size that the header states; other containers mark a lost packet so
    lacking = kind in ("wav", "w64", "caf", "mxf") and "corrupt input packet" in log and not length_is_open(path)
    if status or short or lacking or "partial file" in log:
        raise InputError(f"{path}: is damaged or cut short, only {seconds:.2f} s of it can be read")


# ---------------------------------------------------------------------------------------------------------------------
# sound in

MAX_JITTER = 0.01        # seconds, ours: many containers round the time of a packet to 1 ms and more
MIX_BLOCK = 8000         # samples, half a second, ours: so fast the weights of channels follow changes in a file
LOUDNESS = -15.0         # dBFS of speech, ours: the mean of GRID's clips, on which the shipped weights were trained


def load_audio(path: str | Path, level: bool = True) -> np.ndarray:
    """Any sound file, or the sound track of a video -> float32 (n,) in [-1, 1], 16 kHz, mono, of one loudness.

    Time 0 is the file's beginning, see fill_gaps, so that frame k of read_video and samples 640 k .. 640 (k + 1) belong
    together. Of several tracks the one marked default is read. level=False leaves the loudness as it is in the file.
    Raises InputError: missing, directory, empty, not media, cut short, no sound, 0 s, NaN or inf samples.
    """
    samples, packets, _ = decode_sound(path, SAMPLE_RATE)
    wav = np.concatenate(list(fill_gaps(mix(path, samples), packets, SAMPLE_RATE)))
    return set_level(wav) if level else np.clip(wav, -1, 1)


def write_original_sound(path: str | Path, out: str | Path, n: int, late: float = 0.0):
    """The sound that load_audio reads, with the file's own rate, channels and loudness -> a 16-bit WAV file.

    n: its length in samples at 16 kHz; late: seconds to cut off in front (negative: of silence to put there). Silence
    fills what is missing at the end. Sounds whose channels change, or that have more than 8, are mixed.
    Raises InputError: as load_audio.
    """
    samples, packets, rate = decode_sound(path)
    samples = samples if samples.shape[1] <= 8 else mix(path, samples)[:, None]
    skip, left = round(late * rate), round(n * rate / SAMPLE_RATE)
    silence = np.zeros((left + abs(skip), samples.shape[1]), np.float32)  # memory only where it is written
    with wave.open(str(out), "wb") as file:
        file.setparams((samples.shape[1], 2, rate, 0, "NONE", ""))
        for piece in chain([silence[: max(0, -skip)]], fill_gaps(samples, packets, rate), [silence]):
            piece, skip = piece[max(0, skip) :][:left], max(0, skip - len(piece))
            left -= len(piece)
            file.writeframes(to_int16(piece).tobytes())


def sound_track(path: Path) -> tuple[int, int, int]:
    """The sound that a player would choose: the first track marked default, else the first.

    Returns its stream, channels and Hz. Raises InputError: not media; no sound.
    """
    text = describe(path)
    tracks = re.findall(STREAM + r"Audio: .*?, (\d+) Hz, ([^,\n]+)(.*)", text, re.M)
    if "Input #0" not in text:
        raise InputError(f"{path}: is not a sound file or video that can be read ({last_error(text)})")
    if not tracks:
        raise InputError(f"{path}: has no sound")
    stream, rate, layout, _ = next((track for track in tracks if "(default)" in track[-1]), tracks[0])
    layout = layout.split("(")[0]                            # mono, stereo, 5.1(side), 7.1, 3 channels
    channels = {"mono": 1, "stereo": 2}.get(layout) or sum(map(int, re.findall(r"\d+", layout))) or 8
    return int(stream), channels, int(rate)


def decode_sound(path: str | Path, rate: int | None = None, channels: int | None = None):
    """The sound track of a file, at `rate` Hz or its own: float32 (n, C), on disk; when its packets begin, a list of
    (sample, how many); Hz. Where the number of channels changes in the middle of the file, they are mixed to one.

    Raises InputError: as load_audio, but for samples that are not finite.
    """
    path = check_file(path)
    stream, stated, own_rate = sound_track(path)
    channels, rate = channels or stated, rate or own_rate
    # pan, which mixes nothing here, keeps the number of channels, whatever the file does; it takes layouts up to 8
    route = f",pan={channels}c|" + "|".join(f"c{i}=c{i}" for i in range(channels)) if channels <= 8 else ""
    args = ["-map", f"0:{stream}", "-af", f"aresample={rate}{route}", "-c:a", "pcm_f32le"]
    args += ["-f", "tee", "[f=f32le]pipe\\:1|[f=framecrc]times", *READ_ALL]  # framecrc: a table of packets
    with open(path, "rb") as file:                           # an RF64 file with an open length is empty to ffmpeg
        is_open = file.read(4) == b"RF64" and length_is_open(path)
    with tempfile.TemporaryDirectory(prefix="talk-") as folder, tempfile.TemporaryFile() as raw:
        command = decoder(path, *args, before=("-ignore_length", "1") if is_open else ())
        done = subprocess.run(command, stdout=raw, stderr=subprocess.PIPE, cwd=folder)
        log, size = done.stderr.decode(errors="replace"), raw.seek(0, 2) // 4
        if "audio parameters changed" in log and channels < 8:
            samples, packets, rate = decode_sound(path, rate, channels=8)
            return mix(path, samples)[:, None], packets, rate
        if done.returncode and not size:
            raise InputError(f"{path}: is not a sound file or video that can be read ({last_error(log)})")
        table = (Path(folder) / "times").read_text()
        packets = [(int(a), int(n)) for a, n in re.findall(r"^0,[^,]*, *(-?\d+), *(\d+),", table, re.M)]
        check_whole(path, log, done.returncode, f"0:{stream}", sum(packets[-1]) / rate if packets else 0)
        if not size:
            raise InputError(f"{path}: the sound is 0 s long")
        return np.memmap(raw, "<f4", "r").reshape(-1, channels), packets, rate


def fill_gaps(samples: np.ndarray, packets: list, rate: int):
    """Samples (n, ..) -> the same in pieces, in order, the first at time 0 of the file.

    Silence stands where the file has no sound: in front of a track that starts late, and in gaps of any length. What
    lies before 0, or comes twice, is left out. ffmpeg's own filters cannot do this: ffmpeg builds them anew, with their
    clock at 0, where rate or channels change in the middle.
    """
    end = read = 0                                           # samples that came out so far, samples that were read
    for begin, n in packets:
        late = begin - end
        if abs(late) <= MAX_JITTER * rate and read:
            late = 0
        if late > 0:
            yield np.zeros((late, *samples.shape[1:]), np.float32)
        yield samples[read + max(0, -late) : read + n]
        end += max(late, 0) + max(0, n - max(0, -late))
        read += n


def mix(path: Path, samples: np.ndarray) -> np.ndarray:
    """Channels (n, C) -> (n,): their mean, weighted by power; a channel in opposite phase is turned first.

    So a voice has one loudness in whichever channels it is (ours). The weights are those of half-second blocks, and
    linear in between; digital silence keeps those before it. InputError: NaN or inf samples.
    """
    n, C = samples.shape
    weights = [np.full(C, 1 / C)]
    for a in range(0, n, MIX_BLOCK):
        x = samples[a : a + MIX_BLOCK]
        if not np.isfinite(x).all():
            raise InputError(f"{path}: the sound holds NaN or infinite samples")
        x = x - x.mean(0)                                    # without an offset
        power = (x * x).mean(0, dtype=np.float64)
        likeness = x.T @ x[:, power.argmax()] / len(x)       # (C,), the loudest channel's is its power
        sign = np.where(likeness < -0.5 * np.sqrt(power * power.max()), -1, 1)
        weights.append(sign * power / power.sum() if power.any() else weights[-1])
    weights = np.array(weights[1:], np.float32)              # (blocks, C)
    centres = (np.arange(len(weights)) + 0.5) * MIX_BLOCK
    wav = np.empty(n, np.float32)
    for a in range(0, n, MIX_BLOCK):
        at = np.arange(a, min(a + MIX_BLOCK, n))
        wav[at] = sum(samples[at, c] * np.interp(at, centres, weights[:, c]).astype(np.float32) for c in range(C))
    return wav


def set_level(wav: np.ndarray) -> np.ndarray:
    """Samples (n,) -> float32 (n,) in [-1, 1] whose speech has LOUDNESS, wherever the microphone was.

    Measured is the mean power of 50 ms blocks, gated as in ITU-R BS.1770: without blocks 10 dB below the mean (here twice
    instead of an absolute gate, so that it does not depend on the level). Sound that nowhere exceeds -70 dBFS is silence,
    and steady sound (ours: within 6 dB) is a noise or a tone: both stay as they are.
    """
    blocks = np.array_split(wav, max(1, len(wav) // 800))
    power = np.array([block.var() for block in blocks], np.float64)
    quiet, loud = np.percentile(power, (10, 95))
    if power.max() > 1e-7 and loud >= 4 * quiet:
        for _ in range(2):
            power = power[power >= power.mean() / 10]
        offset = np.mean([block.mean() for block in blocks if block.any()])  # the gain would bring it out of range
        wav = (wav - (wav != 0) * offset) * np.float32(10 ** (LOUDNESS / 20) / np.sqrt(power.mean()))
    return np.clip(wav, -1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# photos

LARGEST = 4096           # ours: longest side of a photo in pixels, thrice that of a video: more only costs memory
GREY = 4                 # ours: levels of 255 by which the channels of a photo without colour may differ, from rounding
# Adobe RGB (1998) in EXIF, where cameras leave out the profile: an InteroperabilityIndex of R03, in either byte order
ADOBE_RGB = rb"(\0\x01\0\x02\0\0\0\x04|\x01\0\x02\0\x04\0\0\0)R03\0"
ADOBE_TO_SRGB = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]], np.float32)  # of light


def load_photo(path: str | Path | io.BytesIO, name: str = "") -> np.ndarray:
    """A picture file -> uint8 (H, W, 3) RGB in sRGB, turned upright by its EXIF entry, transparent parts white.

    path may be the file's content (BytesIO), with a name for messages. Grey, 16-bit, float, palette and CMYK pictures
    are converted, and colours by the profile in the file; of an animation the first frame is taken. Shrunk to LARGEST
    while it is read; photo_size has the size before that.
    Raises InputError: missing, directory, empty, not a picture, truncated, larger than Pillow's pixel limit.
    """
    with open_image(path, name) as image:
        profile = image.info.get("icc_profile")
        is_adobe = not profile and re.search(ADOBE_RGB, image.info.get("exif", b""))
        if image.mode in ("P", "1"):                         # their numbers cannot be averaged
            mode = "L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB"
            image = ImageOps.exif_transpose(image).convert(mode)
        image.thumbnail((LARGEST, LARGEST))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip at 255
            image = Image.fromarray(scale_to_uint8(np.asarray(image)))
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        image = adobe_to_srgb(image.convert("RGB")) if is_adobe else to_srgb(image, profile)
        return np.array(image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha))


def photo_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as a viewer shows it, before load_photo shrinks it. InputError: as load_photo"""
    with open_image(path) as image:
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # Pillow turns those
        return (image.height, image.width) if turned else image.size


@contextlib.contextmanager
def open_image(path: str | Path | io.BytesIO, name: str = ""):
    """Pillow's image of a file, or of a file's content with a name. InputError: as load_photo"""
    with path if name else open(check_file(path), "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # Pillow's, about size and metadata
        path = name or Path(path).absolute()
        try:
            with Image.open(file, formats=PHOTO_FORMATS) as image:
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise InputError(f"{path}: {image.width}x{image.height} pixels are too many, make it smaller")
                yield image
        except (InputError, MemoryError):
            raise
        except Exception as error:                           # Pillow's readers raise a dozen kinds on damaged files
            file.seek(0)
            reason = f"is not a picture that can be read ({error})"
            if re.match(b"....ftyp(hei|hev|mif1|msf1)", file.read(12), re.S):
                reason = ("is HEIC, which is not read: make it a JPEG with heif-convert, on a Mac with "
                          "sips -s format jpeg FILE --out FILE.jpg")
            raise InputError(f"{path}: {reason}") from None


def scale_to_uint8(grey: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits, or float, (H, W) -> uint8. White is the first of 1, 255 and 65535 that 99 % of the pixels
    do not exceed by more than a tenth (ours): files do not say it. ValueError: NaN or infinite."""
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
        # a damaged profile, or one of another kind of picture, is left out, as viewers do
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            seen = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            rgb = seen.convert("L").convert("RGB") if is_grey(np.asarray(rgb)) else seen
    return rgb


def adobe_to_srgb(image: Image.Image) -> Image.Image:
    """A picture in Adobe RGB (1998), whose gamma is 563 / 256 and whose white, red and blue are sRGB's"""
    light = ((np.asarray(image, np.float32) / 255) ** (563 / 256) @ ADOBE_TO_SRGB.T).clip(0, 1)
    srgb = np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray((srgb * 255).round().astype(np.uint8))


def is_grey(image: np.ndarray) -> bool:
    """Whether a picture, uint8 (H, W, 3), is without colour: its channels are equal, but for rounding (GREY)"""
    r, g, b = image.astype(np.int16).transpose(2, 0, 1)
    return all(np.abs(x - y).max() <= GREY for x, y in ((r, g), (g, b), (b, r)))


def to_tensor(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (.., H, W, 3) -> float32 (.., 3, H, W) in [-1, 1]"""
    images = torch.as_tensor(images)
    assert images.dtype == torch.uint8 and images.shape[-1] == 3, f"{images.dtype} {tuple(images.shape)}"
    return images.movedim(-1, -3).float().div_(127.5).sub_(1)  # in place: the loader's time is copying


def check_finite(images: torch.Tensor):
    """Raises FloatingPointError: NaN as uint8 would be a black frame without an explanation"""
    if not torch.isfinite(images).all():
        raise FloatingPointError("a picture holds NaN or infinite values")


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float (.., 3, H, W) in [-1, 1] -> uint8 (.., H, W, 3), rounded and clamped; FloatingPointError: NaN or inf"""
    assert images.shape[-3] == 3, f"images are {tuple(images.shape)}, expected (.., 3, H, W)"
    images = images.detach().float()
    check_finite(images)
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).contiguous().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# video in

@dataclass(frozen=True)
class VideoInfo:
    width: int           # as shown: after rotation
    height: int
    fps: float           # on average; 0 where the file does not say
    aspect: float        # width / height as shown: pixels need not be square
    interlaced: bool
    hdr: str             # "arib-std-b67" (HLG), "smpte2084" (PQ) or ""


def probe(path: str | Path) -> VideoInfo:
    """A video's properties from ffmpeg's description of it (there may be no ffprobe).

    Raises InputError: missing, directory, empty, not a video.
    """
    path = check_file(path)
    text = describe(path)
    video = re.search(STREAM + r"Video: (?!.*\(attached pic\)).*, (?P<w>\d+)x(?P<h>\d+).*", text, re.M)
    if not video:
        is_sound = re.search(STREAM + "Audio: ", text, re.M)
        raise InputError(f"{path}: " + ("has no picture" if is_sound else f"is not a video ({last_error(text)})"))
    width, height = int(video["w"]), int(video["h"])
    pixel = re.search(r"SAR (\d+):(\d+)", video[0])
    aspect = width / height * (int(pixel[1]) / int(pixel[2]) if pixel else 1)
    details = text[video.end() :].split("  Stream #")[0]
    turn = re.search(r"^\[info\] +[\w ]+: rotation of (-?[\d.]+) degrees", details, re.M)
    if turn and round(float(turn[1])) % 180 == 90:
        width, height, aspect = height, width, 1 / aspect
    fps = re.search(r", ([\d.]+) fps", video[0])
    interlaced = bool(re.search(r"(top|bottom) (coded )?first", video[0]))
    hdr = re.search(r"arib-std-b67|smpte2084", video[0])
    return VideoInfo(width, height, float(fps[1]) if fps else 0.0, aspect, interlaced, hdr[0] if hdr else "")


def read_video(path: str | Path, height: int | None = None) -> Iterator[np.ndarray]:
    """Frames of a video, uint8 (H, W, 3) RGB at exactly 25 fps, as a stream; frame k shows at (k + 1/2)/25 s.

    Any frame rate, also a variable one, is resampled from the file's beginning on, so that samples 640 k ..
    640 (k+1) of load_audio belong to frame k. Rotation is applied, pixels are made square, alpha is dropped, fields are
    deinterlaced, HDR becomes sRGB. Where the size changes in the middle, pictures are brought to the first, with bars.
    `height`: resized to it. Raises InputError: not a video; damaged or cut short (once the cut is reached).
    """
    path = check_file(path)
    info = probe(path)                                       # refuses other files before the first frame
    H = height or info.height
    return decode_frames(path, info, H, max(1, round(H * info.aspect)))


def frame_filters(info: VideoInfo, H: int, W: int) -> str:
    """ffmpeg's filters from the pictures of a video to the frames (H, W) of read_video"""
    # scale: bwdif does not take a change of size
    filters = ["scale=iw:ih,bwdif=mode=send_frame:deint=interlaced"] if info.interlaced else []
    # start_time=0: a picture that starts late shows its first frame from 0 on; near: frame k shows at (k + 1/2)/25 s
    filters += [f"fps={FPS}:start_time=0:round=near"]
    aspect = "iw*sar/ih"                                     # of each frame
    same = f"lt(abs({aspect}/{W / H}-1),0.03)"               # 3 %: a little off is rounding, not another picture
    w = f"if({same},{W},max(1,min({W},round({H}*{aspect}))))"
    h = f"if({same},{H},max(1,min({H},round({W}/({aspect})))))"
    filters += [f"scale=w='{w}':h='{h}':eval=frame:flags=area+accurate_rnd+full_chroma_int"]
    filters += [f"format={'gbrp16' if info.hdr else 'rgb24'},pad={W}:{H}:-1:-1:eval=frame"]
    if info.hdr:  # to light, 203 cd/m2 of which are white (BT.2408), and to sRGB; above .8 of white it is compressed
        filters += [f"zscale=tin={info.hdr}:pin=bt2020:min=gbr:rin=full:t=linear:npl=203:agamma=0,format=gbrpf32le"]
        filters += ["zscale=p=bt709,tonemap=mobius:param=0.8:desat=0,zscale=t=iec61966-2-1"]
    return ",".join(filters)


def decode_frames(path: Path, info: VideoInfo, H: int, W: int) -> Iterator[np.ndarray]:
    """The generator behind read_video"""
    args = ["-map", "0:V:0", "-vf", frame_filters(info, H, W), "-fps_mode", "passthrough"]
    args += ["-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1", *READ_ALL]
    # reinit_filter: ffmpeg would build the filters anew where the size changes, and fps would count from 0 again
    command = decoder(path, *args, before=("-reinit_filter", "0"))
    with tempfile.TemporaryFile() as log:                    # a file: a full pipe would stop ffmpeg
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        count = 0
        try:
            while len(data := process.stdout.read(H * W * 3)) == H * W * 3:
                count += 1
                yield np.frombuffer(data, np.uint8).reshape(H, W, 3)
            status = process.wait()
        finally:                                             # also when the caller stops early
            process.kill()
            process.wait()
            process.stdout.close()
        log.seek(0)
        text = log.read().decode(errors="replace")
    check_whole(path, text, status or not count, "0:V:0", count / FPS)


# ---------------------------------------------------------------------------------------------------------------------
# video out

class VideoWriter:
    """Writes frames and sound as H.264 + AAC at 25 fps; frames go to ffmpeg as they come.

    with VideoWriter("talk.mp4", 64, 64, wav) as video:
        video.write(frame)                                   # uint8 (H, W, 3)

    wav: float (n,) in [-1, 1] at 16 kHz, or None; its sample 0 is at the beginning of frame 0, and the sound keeps its
    length. sound: the file that wav was loaded from, whose own rate, channels and loudness the video gets then.
    Odd sizes get one more row or column (players want even ones). The file appears whole, or, after an error, not at
    all: ffmpeg works in a private temporary directory. Raises InputError: as check_output; disk full.
    """

    def __init__(self, path, height: int, width: int, wav: np.ndarray | None = None, overwrite: bool = False, sound=None):
        self.path, self.overwrite = check_output(path, overwrite, VIDEO_SUFFIXES), overwrite
        self.shape, self.count = (height, width, 3), 0
        self.folder, self.log = tempfile.TemporaryDirectory(prefix="talk-"), tempfile.TemporaryFile()
        track = Path(self.folder.name) / "sound.wav"
        self.draft = track.with_name(f"video{self.path.suffix.lower()}")
        if sound is not None:
            write_original_sound(sound, track, len(wav))
        elif wav is not None:
            write_wav(track, wav)
        sound = [] if wav is None else ["-i", str(track), "-c:a", "aac", "-b:a", "192k"]
        # the colours of HDTV, and said so: untagged video is shown differently by different players
        colours = "scale=out_color_matrix=bt709:out_range=tv"
        border = f"fillborders=right={width % 2}:bottom={height % 2}:mode=smear"  # no black seam
        tags = "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv"
        command = [ffmpeg_path(), "-loglevel", "level+error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-video_size", f"{width}x{height}", "-framerate", str(FPS), "-i", "pipe:0", *sound]
        command += ["-vf", f"pad=w=ceil(iw/2)*2:h=ceil(ih/2)*2,{border},{colours},format=yuv420p,{tags}"]
        # ours: 16 stays crisp at 64 px; veryfast takes half of the default's time
        command += ["-c:v", "libx264", "-crf", "16", "-preset", "veryfast", "-movflags", "+faststart", str(self.draft)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self.log, start_new_session=True)

    def write(self, frame: np.ndarray):
        """frame: uint8 (H, W, 3) RGB"""
        ok = frame.dtype == np.uint8 and frame.shape == self.shape
        assert ok, f"frame is {frame.dtype} {frame.shape}, expected uint8 {self.shape}"
        try:
            self.process.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            raise self.failure() from None
        self.count += 1

    def failure(self) -> InputError:
        """The reason why ffmpeg stopped"""
        self.process.wait()
        self.log.seek(0)
        return InputError(f"{self.path}: could not be written ({last_error(self.log.read().decode(errors='replace'))})")

    def close(self):
        """Finishes the file and moves it to its place in one step"""
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            if self.process.wait() or not self.count:
                raise self.failure()
            check_output(self.path, self.overwrite)          # another run may have been faster
            move_into_place(self.draft, self.path)
        finally:
            self.discard()

    def discard(self):
        """Ends ffmpeg and removes everything written so far"""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.log.close()
        self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close() if kind is None else self.discard()


def to_int16(wav: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] -> int16; what is louder is clipped"""
    return np.clip(np.round(wav * 32768), -32768, 32767).astype("<i2")


def write_wav(path: str | Path, wav: np.ndarray):
    """float (n,) in [-1, 1] at 16 kHz -> a 16-bit WAV file"""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(to_int16(wav).tobytes())


def move_into_place(draft: Path, path: Path):
    """Moves a finished file, maybe to another disk: at any moment the old file or the whole new one is there"""
    copy = path.with_name(f".talk-{os.getpid()}{path.suffix}")
    try:
        shutil.copyfile(draft, copy)
        os.replace(copy, path)
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error.strerror})") from None
    finally:
        copy.unlink(missing_ok=True)
