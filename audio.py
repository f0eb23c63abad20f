"""Sound: any file -> 16 kHz mono, log-mel and MFCC, the mel steps of a video frame, and the audio encoder.

Papers: FC-TFG (arXiv 2304.03275) section 3: 16 kHz, window 800, hop 200, 80 mel bands, encoder after Wav2Lip
(arXiv 2008.10010), whose hparams give the mel's other numbers; SyncNet (Chung & Zisserman 2016) for the MFCC.
Differs from them: the mel window of a frame is centred on the frame's middle (Wav2Lip's begins at int(3.2 k)
of the first of five frames); the encoder's norm is GroupNorm, its last layer linear (see AudioEncoder).

Being the lowest room, it also holds what all need: InputError, run(), check_file(), how ffmpeg is called.
"""

import argparse
import errno
import re
import signal
import subprocess
import sys
import tempfile
import wave
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

SAMPLE_RATE = 16000  # Hz (FC-TFG)
FPS = 25  # video frames a second, everywhere
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640: frame k is wav[640 k : 640 (k + 1)]

# the mel, all from Wav2Lip's hparams
N_FFT = 800  # samples: 50 ms, also the length of the Hann window
HOP = 200  # samples: 12.5 ms
N_MELS = 80
MEL_LOW, MEL_HIGH = 55.0, 7600.0  # Hz
PREEMPHASIS = 0.97
REFERENCE_DB, FLOOR_DB = 20.0, -100.0  # this level is 0 dB; what lies below the floor is silence
MEL_RATE = SAMPLE_RATE // HOP  # 80 steps a second, 3.2 a frame
WINDOW = 16  # mel steps of one window: 0.2 s, five frames
SILENCE = -4.0  # mel value of silence, and of everything outside the sound

BLOCK = 512  # ours: mel steps computed at once: they stay in the cache, however long the sound

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


def n_frames(n_samples: int) -> int:
    """Video frames of a sound: round(25 x seconds), halves up, at least 1."""
    assert n_samples > 0, "n_frames of an empty sound"
    return max(1, (2 * n_samples + SAMPLES_PER_FRAME) // (2 * SAMPLES_PER_FRAME))


# ------------------------------------------------------------------------------------------------------------
# samples -> mel -> windows of frames


@lru_cache
def band_corners(low: float = MEL_LOW, high: float = MEL_HIGH) -> np.ndarray:
    """(82,) Hz: band i of the mel is a triangle from corner i over i + 1 to i + 2. Slaney's scale."""

    def mel(hz):  # linear below 1 kHz, logarithmic above: 27 steps for a factor of 6.4
        return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))

    def hz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))

    return hz(np.linspace(mel(low), mel(high), N_MELS + 2))


@lru_cache
def filter_bank(n_fft: int = N_FFT, low: float = MEL_LOW, high: float = MEL_HIGH):
    """Slaney's mel filters from low to high Hz, triangles of equal area, as a sparse (80, n_fft / 2 + 1) matrix.

    librosa.filters.mel's default, written out because importing librosa takes 1.5 s of every start.
    """
    from scipy.sparse import csr_array

    corners = band_corners(low, high)
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]  # (80, 1)
    bins = np.arange(n_fft // 2 + 1) * SAMPLE_RATE / n_fft  # Hz
    triangles = np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle))
    return csr_array((np.maximum(0, triangles) * 2 / (right - left)).astype(np.float32))


@lru_cache
def hann() -> np.ndarray:
    """The periodic Hann window, float32 (800,)."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)).astype(np.float32)


def mel_steps(wav: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Log-mel of wav (n,), steps first .. stop-1 -> float32 (80, stop - first). Step s is at sample 200 s.

    Every step is computed alone, by the same operations in the same order, whatever the range: FFT by rows,
    square roots instead of np.abs, a sparse filter bank (a dense product rounds differently for each shape).
    So any range of steps equals that part of the whole, to the bit. float32 rounds below 16-bit samples.
    """
    mel = np.full((N_MELS, max(0, stop - first)), SILENCE, np.float32)
    for a in range(first, stop, BLOCK):
        b = min(a + BLOCK, stop)
        begin, end = a * HOP - N_FFT // 2, (b - 1) * HOP + N_FFT // 2  # samples that steps a .. b-1 see
        lo, hi = max(begin - 1, 0), min(end, len(wav))  # one more in front, for the pre-emphasis
        x = np.zeros(end - begin + 1, np.float32)  # x[0] is sample begin-1; zeros outside, as librosa pads today
        x[lo - begin + 1 : hi - begin + 1] = wav[lo:hi]
        x = x[1:] - np.float32(PREEMPHASIS) * x[:-1]
        if end > len(wav):  # padding comes after the pre-emphasis: no echo of the last sample
            x[max(0, len(wav) - begin) :] = 0
        frames = torch.from_numpy(x).unfold(0, N_FFT, HOP)  # (b-a, 800); PyTorch's FFT has three times NumPy's speed
        spectrum = torch.view_as_real(torch.fft.rfft(frames * torch.from_numpy(hann()))).square_()  # (b-a, 401, 2)
        magnitude = (spectrum[..., 0] + spectrum[..., 1]).sqrt_().numpy()
        power = filter_bank() @ np.ascontiguousarray(magnitude.T)  # (80, b-a)
        db = 20 * np.log10(np.maximum(10 ** (FLOOR_DB / 20), power)) - REFERENCE_DB
        mel[:, a - first : b - first] = np.clip(8 * (db - FLOOR_DB) / -FLOOR_DB - 4, -4, 4)  # symmetric
    return mel


def mel_length(n_samples: int) -> int:
    """Mel steps of a sound: one on every 200th sample, the first on sample 0."""
    return 1 + n_samples // HOP


def log_mel(wav: np.ndarray) -> np.ndarray:
    """Samples (n,) in [-1, 1] -> Wav2Lip's mel, float32 (80, S) in [-4, 4]; S = 1 + n // 200, silence -4."""
    assert wav.ndim == 1 and len(wav), f"sound is {wav.shape}, expected (n,) with n > 0"
    return mel_steps(wav, 0, mel_length(len(wav)))


def window_starts(frames) -> np.ndarray:
    """First mel step of each frame's window, (T,) -> (T,): THE place that turns frame into mel indices.

    The middle of frame k is at (k + 1/2) 3.2 steps, the middle of 16 steps from s on at s + 7.5 (a step is a
    point: the centre of its 50 ms). The nearest s is round(3.2 k - 5.9), here in integers: half a
    step, 6 ms, off at most.
    """
    return (16 * np.asarray(frames, np.int64) - 27) // 5


def mel_windows(mel: np.ndarray, frames) -> np.ndarray:
    """mel (80, S), T frame indices -> float32 (T, 1, 80, 16), centred on the frames; outside is silence."""
    assert mel.ndim == 2 and mel.shape[0] == N_MELS, f"mel is {mel.shape}, expected (80, S)"
    return gather_windows(mel, 0, window_starts(frames))


def gather_windows(mel: np.ndarray, first: int, starts: np.ndarray) -> np.ndarray:
    """Windows from `starts` (T,) of a piece of mel (80, S) whose first step is number `first`."""
    steps = starts[:, None] + np.arange(WINDOW) - first  # (T, 16)
    inside = (steps >= 0) & (steps < mel.shape[1])
    windows = mel[:, np.clip(steps, 0, mel.shape[1] - 1)]  # (80, T, 16)
    return np.where(inside, windows, np.float32(SILENCE)).transpose(1, 0, 2)[:, None]  # (T, 1, 80, 16)


def sound_windows(wav: np.ndarray, frames) -> np.ndarray:
    """mel_windows(log_mel(wav), frames), to the bit, computing only the stretch from first to last frame."""
    assert wav.ndim == 1 and len(wav), f"sound is {wav.shape}, expected (n,) with n > 0"
    starts = window_starts(frames)
    first = int(np.clip(starts.min(), 0, mel_length(len(wav)) - 1))
    stop = int(np.clip(starts.max() + WINDOW, first + 1, mel_length(len(wav))))
    return gather_windows(mel_steps(wav, first, stop), first, starts)


def spec_augment(mel: np.ndarray, rng: np.random.Generator, bands: int = 16, steps: int = 3) -> np.ndarray:
    """One frequency mask of 0..bands mel bands and one time mask of 0..steps mel steps, filled with silence.

    mel (.., 80, S) -> a copy; all leading axes get the same masks. SpecAugment (Park et al. 2019) without its
    time warping; its widths (27 bands, 100 steps) are for utterances, ours are a fifth of a window's.
    """
    mel = mel.copy()
    M, S = mel.shape[-2:]
    height, width = rng.integers(0, min(bands, M) + 1), rng.integers(0, min(steps, S) + 1)
    low, begin = rng.integers(0, M - height + 1), rng.integers(0, S - width + 1)
    mel[..., low : low + height, :] = SILENCE
    mel[..., begin : begin + width] = SILENCE
    return mel


def other_voice(mel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same words by another voice, nearer or farther, in a noisier room: mel (.., 80, S) -> a new array.

    The frequency axis is stretched by up to 15 % (vocal tract length perturbation, Jaitly & Hinton 2013, has 10), the
    level moves by up to 10 dB, the spectrum tilts by up to 5 dB to each end, and a hiss covers what is quieter than it
    in every third call (widths ours). Bands that the stretch takes from beyond 7.6 kHz repeat the last one.
    """
    centres = band_corners()[1:-1]
    wanted = np.interp(centres * np.exp(rng.uniform(-0.15, 0.15)), centres, np.arange(N_MELS))  # band to read, (80,)
    below = np.minimum(wanted.astype(int), N_MELS - 2)
    part = (wanted - below)[:, None]
    voice = (1 - part) * mel[..., below, :] + part * mel[..., below + 1, :]
    decibel = rng.uniform(-10, 10) + rng.uniform(-5, 5) * np.linspace(-1, 1, N_MELS)[:, None]
    voice = np.where(voice > SILENCE, voice + 8 * decibel / -FLOOR_DB, SILENCE)  # 8 units are 100 dB; silence stays
    if rng.random() < 1 / 3:
        voice = np.maximum(voice, rng.uniform(-4, -1.5) + rng.normal(0, 0.25, voice.shape))
    return np.clip(voice, SILENCE, -SILENCE).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------
# speech out of a mix

PIECE, OVERLAP = 60, 1  # seconds; ours: similar frames are looked for within a piece; its ends are faded


def isolate_voice(wav: np.ndarray) -> np.ndarray:
    """Speech over music or a steady noise, (n,) in [-1, 1] -> the same length with what repeats taken down.

    librosa's vocal separation (Rafii & Pardo's REPET-SIM, ISMIR 2012): the background of a frame is the median of the
    frames that are like it and far from it in time; a voice does not repeat. As in librosa's
    example, but for the voice's margin, 5 instead of 10 (ours: read speech loses 2 to 3 dB, not 3 to 5; a chord that
    beats under it 17 to 22, not 18 to 24), and for the 2 s between frames, less where a sound is shorter than 8 s.
    A sound of less than half a second comes back unchanged: nothing in it can repeat.
    """
    assert wav.ndim == 1 and len(wav), f"sound is {wav.shape}, expected (n,) with n > 0"
    piece, overlap = PIECE * SAMPLE_RATE, OVERLAP * SAMPLE_RATE
    voice, weight = np.zeros(len(wav)), np.zeros(len(wav))
    for a in range(0, max(1, len(wav) - overlap), piece - overlap):
        part = wav[a : a + piece]
        ramp = np.minimum(1, (np.arange(len(part)) + 1) / overlap)
        ramp = np.minimum(ramp, ramp[::-1])  # rises and falls over the overlap
        voice[a : a + piece] += ramp * isolate_piece(part)
        weight[a : a + piece] += ramp
    return (voice / weight).astype(np.float32)


def isolate_piece(wav: np.ndarray) -> np.ndarray:
    """isolate_voice of at most PIECE seconds; memory grows with their square"""
    import librosa

    if len(wav) < SAMPLE_RATE // 2:
        return wav
    spectrum = librosa.stft(wav, n_fft=1024, hop_length=256)  # 64 ms; the example's 2048 at 22 kHz are 93
    magnitude = np.abs(spectrum)
    apart = min(round(2 * SAMPLE_RATE / 256), magnitude.shape[1] // 4)  # steps
    back = librosa.decompose.nn_filter(magnitude, aggregate=np.median, metric="cosine", width=apart)
    back = np.minimum(magnitude, back)  # what repeats is a part of the mix, not more
    mask = librosa.util.softmask(magnitude - back, 5 * back, power=2)
    return librosa.istft(spectrum * mask, hop_length=256, n_fft=1024, length=len(wav))


# ------------------------------------------------------------------------------------------------------------
# MFCC, for SyncNet v2


@lru_cache
def mfcc_filters() -> np.ndarray:
    """(26, 257): triangles on HTK's mel scale, corners on whole FFT bins, as python_speech_features has."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = np.floor(513 * 700 * (10 ** (np.linspace(0, top, 28) / 2595) - 1) / SAMPLE_RATE)  # (28,)
    bins = np.arange(257)
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]  # (26, 1)
    rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    return np.clip(np.minimum(rising, falling), 0, None)


def mfcc(wav: np.ndarray) -> np.ndarray:
    """Samples (n,) in [-1, 1] -> float64 (13, S) at 100 steps a second: SyncNet v2's input.

    python_speech_features' defaults on int16 samples: 25 ms rectangular windows every 10 ms, 512-point FFT,
    26 filters, DCT-II, lifter 22, first coefficient replaced by log energy. S = 1 + ceil((n - 400) / 160).
    """
    assert wav.ndim == 1 and len(wav), f"sound is {wav.shape}, expected (n,) with n > 0"
    from scipy.fft import dct

    x = np.clip(np.round(wav.astype(np.float64) * 32768), -32768, 32767)
    x = np.append(x[0], x[1:] - 0.97 * x[:-1])
    S = 1 + max(0, -(-(len(x) - 400) // 160))
    x = np.pad(x, (0, max(0, (S - 1) * 160 + 400 - len(x))))
    frames = np.lib.stride_tricks.sliding_window_view(x, 400)[::160]  # (S, 400)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2 / 512  # (S, 257)
    eps = np.finfo(float).eps  # stands in for zero energy
    energy, bands = power.sum(1), power @ mfcc_filters().T  # (S,), (S, 26)
    cepstrum = dct(np.log(np.where(bands == 0, eps, bands)), type=2, axis=1, norm="ortho")[:, :13]
    cepstrum *= 1 + 11 * np.sin(np.pi * np.arange(13) / 22)  # lifter
    cepstrum[:, 0] = np.log(np.where(energy == 0, eps, energy))
    return cepstrum.T


# ------------------------------------------------------------------------------------------------------------
# the encoder


class ConvBlock(nn.Module):
    """Wav2Lip's building block: convolution, norm, (residual), ReLU. (N, C, M, S) -> (N, C', M', S')"""

    def __init__(self, c_in, c_out, stride=1, padding=1, residual=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, padding, bias=False)  # the norm has the bias
        self.norm = nn.GroupNorm(c_out // 8, c_out)  # ours: groups of 8 channels
        self.residual = residual

    def forward(self, x):
        y = self.norm(self.conv(x))
        return torch.relu(y + x if self.residual else y)


class AudioEncoder(nn.Module):
    """Mel window -> audio code z_a. Wav2Lip's layer plan (FC-TFG follows it), channels scaled by `width`.

    Differs from Wav2Lip: GroupNorm for BatchNorm, because the windows of a batch are neighbours in few clips:
    batch statistics would tie them together, and differ between training and sampling, where one photo
    speaks alone. And the last layer is linear (there: norm and ReLU), because a code has both signs.
    """

    def __init__(self, dim: int, width: float = 1.0):
        super().__init__()
        c1, c2, c3, c4, c5 = (max(8, 8 * round(c * width / 8)) for c in (32, 64, 128, 256, 512))
        self.body = nn.Sequential(  # (N, 1, 80, 16)
            ConvBlock(1, c1),
            ConvBlock(c1, c1, residual=True),
            ConvBlock(c1, c1, residual=True),
            ConvBlock(c1, c2, stride=(3, 1)),  # (N, c2, 27, 16)
            ConvBlock(c2, c2, residual=True),
            ConvBlock(c2, c2, residual=True),
            ConvBlock(c2, c3, stride=3),  # (N, c3, 9, 6)
            ConvBlock(c3, c3, residual=True),
            ConvBlock(c3, c3, residual=True),
            ConvBlock(c3, c4, stride=(3, 2)),  # (N, c4, 3, 3)
            ConvBlock(c4, c4, residual=True),
            ConvBlock(c4, c5, padding=0),  # (N, c5, 1, 1)
        )
        self.out = nn.Linear(c5, dim)

    def forward(self, mel):
        """mel (N, 1, 80, 16) in [-4, 4] -> z_a (N, dim)"""
        assert mel.shape[1:] == (1, N_MELS, WINDOW), f"mel is {tuple(mel.shape)}, expected (N, 1, 80, 16)"
        return self.out(self.body(mel / 4).flatten(1))
