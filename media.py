"""Files in and out: sound, photos, videos, and what the user got wrong (InputError, run, Parser).

A photo becomes uint8 (H, W, 3) RGB as a person sees it (EXIF turned, alpha over white), a video a stream of such frames
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

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps




SAMPLE_RATE = 16000  # Hz (FC-TFG)
FPS = 25  # video frames a second, everywhere
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640: frame k is wav[640 k : 640 (k + 1)]

# ffmpeg opens media containers only: its text and playlist formats (tty, hls, concat) can name other files
DEMUXERS = (
    "aac,ac3,aiff,amr,ape,apng,asf,au,avi,caf,dv,eac3,flac,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mov,mp4,"
    "m4a,3gp,mp3,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,voc,w64,wav,webp_anim,wv,yuv4mpegpipe"
)


# ------------------------------------------------------------------------------------------------------------
# what the user got wrong, and ffmpeg


class InputError(Exception):
    """Something the user got wrong. str(e) is one line: the file or option, and what is wrong with it."""

    def __str__(self):
        return " ".join(super().__str__().split())


def run(main):
    """Runs a script's main(): InputError, or no memory, is one line on stderr and status 2, Ctrl-C 130, SIGTERM 143."""
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


# what a number option may be, by its name, in every script; others: whole ones from 1, floats from 0, up to 10^9.
# Ours: wide enough for all that can work
RATE, SHARE = (1e-9, 1e3), (0, 1)
LIMITS = dict(
    seed=(0, 2**62), workers=(0, 256), refine=(0, 100), first_person=(0, 2**62), people=(1, 10**6), seconds=(0.2, 600),
    batch=(1, 10**5), lr=RATE, lr_gan=RATE, lr_g=RATE, lr_d=RATE, ema_kimg=(1e-6, 1e6), photo_share=SHARE,
    hyper_share=SHARE, taught=SHARE, augment=(-1, 1),
)


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose complaints are one line, without the usage, and that knows LIMITS."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, args=None, namespace=None, **limits):
        """limits: (low, high) of options that mean something else in this script. InputError: a number outside, or NaN"""
        args = super().parse_args(args, namespace)
        for name, value in vars(args).items():
            if type(value) in (int, float):
                low, high = (LIMITS | limits).get(name, (1 if type(value) is int else 0, 10**9))
                if not low <= value <= high:
                    flags = [a.option_strings[0] for a in self._actions if a.dest == name]
                    option = flags[0] if flags else "--" + name.replace("_", "-")  # a subcommand's
                    raise InputError(f"{option} {value}: must lie between {low} and {high}")
        return args


def is_out_of_memory(error: Exception) -> bool:
    """Whether the system refused memory to Python or NumPy, to a new process or file, or to torch (whose CPU side has no
    exception of its own)."""
    torchs = isinstance(error, RuntimeError) and re.search("allocat|bad_alloc|out of memory", str(error))
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or bool(torchs)


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
    except (OSError, ValueError) as error:  # no permission, name too long, NUL in the name
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return path


@lru_cache
def ffmpeg_path() -> str:
    """Absolute path of an ffmpeg: the one imageio-ffmpeg brings, else the one on PATH."""
    import shutil

    import imageio_ffmpeg

    try:
        found = shutil.which(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        found = shutil.which("ffmpeg")
    if not found:
        raise InputError("ffmpeg is missing: pip install imageio-ffmpeg, or install ffmpeg")
    return str(Path(found).absolute())


def decoder(path: str | Path, *output: str, before: tuple = ()) -> list[str]:
    """Argument list of an ffmpeg that reads `path`, a local media file and nothing else, to `output`.

    before: options of the input itself.
    """
    quiet = ["-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info"]
    local = ["-protocol_whitelist", "file,pipe", "-format_whitelist", DEMUXERS]
    return [ffmpeg_path(), *quiet, *local, *before, "-i", f"file:{check_file(path)}", *output]


def describe(path: str | Path) -> str:
    """What ffmpeg says of a file before it decodes anything: its container, length and streams."""
    return subprocess.run(decoder(path), capture_output=True).stderr.decode(errors="replace")


# a stream's line of it is indented by two spaces, in a group by four, tags otherwise: a title cannot pass for a stream
STREAM = r"^\[info\]   (?:  )?Stream #0:(\d+).*?: "


def why(log: str) -> str:
    """ffmpeg's last complaint, without its '[mov @ 0x55..] [error]' prefix: an InputError's reason."""
    complaints = re.findall(r"^.*\[(?:error|fatal)\] (.*)$", log, re.M)
    return complaints[-1].strip() if complaints else "unknown format"


def declared_seconds(log: str) -> float:
    """How long a file says it is, from ffmpeg's description of it; 0 where it does not say."""
    length = re.search(r"^(?:\[info\] )?  Duration: (\d+):(\d+):([\d.]+)", log, re.M)
    return int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) if length else 0.0


def length_is_open(path: Path) -> bool:
    """Whether the header of a WAV, RF64 or CAF file leaves the length open, as programs do that write to a pipe.

    They leave 0 or a number as large as the field holds. From 1.9e9 on (ours) no size is believed that the file lacks.
    """
    with open(path, "rb") as file:
        head = file.read(65536)
    if head[:4] == b"RF64":
        return not any(head[28:36])  # the data's size in the chunk ds64
    at = head.find(b"data", 12)
    size = head[at + 4 : at + 12] if head[:4] == b"caff" else head[at + 7 : at + 3 : -1]  # CAF is big-endian
    return head[:4] in (b"RIFF", b"caff") and at > 0 and not 0 < int.from_bytes(size, "big") < 1.9e9


def last_packet(path: Path, *streams: str) -> float:
    """Seconds from the file's beginning to the end of the last packet of these streams, without decoding"""
    options = [*chain(*(("-map", stream) for stream in streams)), "-c", "copy", "-f", "framecrc", "pipe:1"]
    table = subprocess.run(decoder(path, *options), capture_output=True).stdout.decode(errors="replace")
    unit = {stream: int(a) / int(b) for stream, a, b in re.findall(r"^#tb (\d+): (\d+)/(\d+)", table, re.M)}
    packets = re.findall(r"^(\d+),[^,]*, *(-?\d+), *(\d+),", table, re.M)  # stream, dts, pts, duration
    return max(((int(begin) + int(length)) * unit[stream] for stream, begin, length in packets), default=0.0)


def check_whole(path: Path, log: str, status: int, stream: str, seconds: float):
    """InputError if ffmpeg's log, its status and the `seconds` that it decoded of a stream say a file is damaged or cut.

    A decoding error alone is no reason: many files have one at their beginning and play well. Neither is a stream shorter
    than its file, nor a length that ffmpeg only estimates: the stream's own packets must go on, or those of no stream
    reach the length that the header states.
    """
    kind = re.search(r"^\[info\] Input #0, ([^,]*)", log, re.M)
    kind = kind[1] if kind else ""
    stated = kind not in ("mpegts", "mpeg", "h264", "hevc") and "Estimating duration" not in log
    length = 0.9 * declared_seconds(log)
    short = stated and "[error]" in log and seconds < length
    short = short and (last_packet(path, "0:a?", "0:V?") < length or 0.9 * last_packet(path, stream) > seconds)
    # raw samples end before the size that the header states; other containers mark a lost packet so
    lacking = kind in ("wav", "w64", "caf", "mxf") and "corrupt input packet" in log and not length_is_open(path)
    if status or short or lacking or "partial file" in log:
        raise InputError(f"{path}: is damaged or cut short, only {seconds:.2f} s of it can be read")


# ------------------------------------------------------------------------------------------------------------
# files -> samples

TOLERANCE = 0.01  # seconds, ours: many containers round the time of a packet to 1 ms and more
PIECE_OF_MIX = 0.5  # seconds, ours: so fast the weights of channels change where a file changes
LOUDNESS = -15.0  # dBFS of speech, ours: the mean of GRID's clips, on which the shipped weights were trained


def load_audio(path: str | Path, level: bool = True) -> np.ndarray:
    """Any sound file, or the sound track of a video -> float32 (n,) in [-1, 1], 16 kHz, mono, of one loudness.

    Time 0 is the file's beginning, see on_time, so that frame k of read_video and samples 640 k .. 640 (k + 1) belong
    together. Of several tracks the one marked default is read. level=False leaves the loudness as it is in the file.
    Raises InputError: missing, directory, empty, not media, cut short, no sound, 0 s, NaN or inf samples.
    """
    path = check_file(path)
    *track, _ = sound_track(path)
    samples, packets = decode_sound(path, *track, SAMPLE_RATE)
    wav = np.concatenate(list(on_time(mix(path, samples), packets, SAMPLE_RATE)))
    return set_level(wav) if level else np.clip(wav, -1, 1)


def write_own_sound(path: str | Path, out: str | Path, n: int, late: float = 0.0):
    """The sound that load_audio reads, with the file's own rate, channels and loudness -> a 16-bit WAV file.

    n: its length in samples at 16 kHz; late: seconds to cut off in front (negative: of silence to put there). Silence
    fills what is missing at the end. Sounds whose channels change, or that have more than 8, are mixed.
    Raises InputError: as load_audio.
    """
    path = check_file(path)
    stream, channels, pictures, rate = sound_track(path)
    samples, packets = decode_sound(path, stream, channels, pictures, rate)
    if samples.shape[1] != channels or channels > 8:
        samples, channels = mix(path, samples)[:, None], 1
    skip, left = round(late * rate), round(n * rate / SAMPLE_RATE)
    with wave.open(str(out), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        silence = (np.zeros((k, channels), np.float32) for k in (max(0, -skip), max(0, left + skip)))
        for piece in chain([next(silence)], on_time(samples, packets, rate), silence):
            piece, skip = piece[max(0, skip) :][:left], max(0, skip - len(piece))
            left -= len(piece)
            file.writeframes(to_int16(piece).tobytes())


def to_int16(wav: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] -> int16; what is louder is clipped"""
    return np.clip(np.round(wav * 32768), -32768, 32767).astype("<i2")


def beside(kind: str) -> list[str]:
    """Options for ffmpeg to read the streams of a kind ("a", "V"), too, without decoding them.

    Where clocks jump, as in transport streams one after another, ffmpeg shifts all streams that it reads by one length:
    sound and pictures that are read by two runs are shifted alike if both read both.
    """
    return ["-map", f"0:{kind}", "-c", "copy", "-f", "null", "-"]


def sound_track(path: Path) -> tuple[int, int, bool, int]:
    """The sound that a player would choose: the first track marked default, else the first.

    Returns: its stream, channels, whether the file has pictures, Hz.

    Raises InputError: not media; no sound.
    """
    text = describe(path)
    tracks = re.findall(STREAM + r"Audio: .*?, (\d+) Hz, ([^,\n]+)(.*)", text, re.M)
    if "Input #0" not in text:
        raise InputError(f"{path}: is not a sound file or video that can be read ({why(text)})")
    if not tracks:
        raise InputError(f"{path}: has no sound")
    stream, rate, layout, _ = next((track for track in tracks if "(default)" in track[-1]), tracks[0])
    layout = layout.split("(")[0]  # mono, stereo, 5.1(side), 7.1, 3 channels
    channels = {"mono": 1, "stereo": 2}.get(layout) or sum(map(int, re.findall(r"\d+", layout))) or 8
    return int(stream), channels, bool(re.search(STREAM + r"Video: (?!.*\(attached pic\))", text, re.M)), int(rate)


def decode_sound(path: Path, stream: int, channels: int, pictures: bool, rate: int) -> tuple[np.ndarray, list]:
    """A track's samples, float32 (n, channels or more), on disk, and when its packets begin: [(sample, how many), ..].

    The arguments but for the rate are sound_track's. Where the channels' number changes in the middle of a
    file there are 8. Raises InputError: 0 s, damaged, cut short.
    """
    # pan, which mixes nothing here, keeps the number of channels, whatever the file does; it knows layouts up to 8
    route = f",pan={channels}c|" + "|".join(f"c{i}=c{i}" for i in range(channels)) if channels <= 8 else ""
    args = ["-map", f"0:{stream}", "-af", f"aresample={rate}{route}", "-c:a", "pcm_f32le"]
    args += ["-f", "tee", "[f=f32le]pipe\\:1|[f=framecrc]times"]  # framecrc: a table of packets
    args += beside("V") if pictures else []
    with open(path, "rb") as file:  # ffmpeg takes a RF64 file with an open length for an empty one
        wave_is_open = file.read(4) == b"RF64" and length_is_open(path)
    with tempfile.TemporaryDirectory(prefix="talk-") as folder, tempfile.TemporaryFile() as raw:
        command = decoder(path, *args, before=("-ignore_length", "1") if wave_is_open else ())
        done = subprocess.run(command, stdout=raw, stderr=subprocess.PIPE, cwd=folder)
        log, size = done.stderr.decode(errors="replace"), raw.seek(0, 2) // 4
        if "audio parameters changed" in log and channels < 8:
            return decode_sound(path, stream, 8, pictures, rate)
        if done.returncode and not size:
            raise InputError(f"{path}: is not a sound file or video that can be read ({why(log)})")
        table = (Path(folder) / "times").read_text()
        packets = [(int(a), int(n)) for a, n in re.findall(r"^0,[^,]*, *(-?\d+), *(\d+),", table, re.M)]
        check_whole(path, log, done.returncode, f"0:{stream}", sum(packets[-1]) / rate if packets else 0)
        if not size:
            raise InputError(f"{path}: the sound is 0 s long")
        return np.memmap(raw, "<f4", "r").reshape(-1, channels), packets


def on_time(samples: np.ndarray, packets: list, rate: int):
    """Samples (n, ..) -> the same in pieces, in order, the first at time 0 of the file.

    Silence stands where the file has no sound: in front of a track that starts late, and in holes of any length. What
    lies before 0, or comes twice, is left out. ffmpeg's own filters cannot do this: ffmpeg builds them anew, with their
    clock at 0, where rate or channels change in the middle.
    """
    end = read = 0  # samples that came out so far, samples that were read
    for begin, n in packets:
        late = begin - end
        if abs(late) <= TOLERANCE * rate and read:
            late = 0
        if late > 0:
            yield np.zeros((late, *samples.shape[1:]), np.float32)
        yield samples[read + max(0, -late) : read + n]
        end += max(late, 0) + max(0, n - max(0, -late))
        read += n


def mix(path: Path, samples: np.ndarray) -> np.ndarray:
    """Channels (n, C) -> (n,): the mean of those that carry sound, or the loudest alone where their mean cancels.

    Decided every half second, with weights that move from one to the next in between. Ours: a channel 30 dB below the
    loudest carries none; a mean of C channels cancels below 1 / 2 C of the loudest. InputError: NaN or inf samples.
    """
    n, C = samples.shape
    hop = round(PIECE_OF_MIX * SAMPLE_RATE)
    weights = []
    for a in range(0, n, hop):
        x = samples[a : a + hop]
        if not np.isfinite(x).all():
            raise InputError(f"{path}: the sound holds NaN or infinite samples")
        power = x.var(0)  # without an offset
        carries = power > 1e-3 * power.max()
        weight = carries / max(1, carries.sum())
        if (x @ weight).var() < power.max() / (2 * carries.sum() + 1e-9) ** 2:
            weight = np.arange(C) == np.argmax(power >= power.max() / 2)
        weights.append(weight if carries.any() else None)
    known = [k for k, weight in enumerate(weights) if weight is not None]
    if not known:
        return np.zeros(n, np.float32)
    weights = np.array([weights[k] for k in known], np.float32)  # silence takes those of its neighbours
    centres = (np.array(known) + 0.5) * hop
    wav = np.empty(n, np.float32)
    for a in range(0, n, hop):
        at = np.arange(a, min(a + hop, n))
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
