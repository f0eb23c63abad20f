"""Sound to features: log-mel, MFCC, the mel window of a video frame, voice isolation, and the audio encoder.

Papers: FC-TFG (arXiv 2304.03275), section 3: 16 kHz, window 800, hop 200, 80 mel bands, encoder after Wav2Lip (arXiv
2008.10010); SyncNet (Chung & Zisserman 2016): MFCC. Differences: the mel window of a frame is centred on the middle of
the frame (Wav2Lip's begins at int(3.2 k) of the first of five frames); see AudioEncoder. Axes: n samples, T frames.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.fft import dct, irfft, next_fast_len, rfft
from scipy.sparse import csr_array
from torch import nn

from media import SAMPLE_RATE, SAMPLES_PER_FRAME, to_int16

# mel spectrogram, all numbers from Wav2Lip's hparams
N_MELS = 80                              # M; change it here alone and before any training; at least 55
N_FFT = 800                              # samples: 50 ms, also the length of the Hann window
HOP = 200                                # samples: 12.5 ms; 80 steps a second, 3.2 per frame
MEL_LOW, MEL_HIGH = 55.0, 7600.0         # Hz
PREEMPHASIS = 0.97
REFERENCE_DB, FLOOR_DB = 20.0, -100.0    # the reference level is 0 dB; levels below the floor are silence
WINDOW = 16                              # S of one window: 0.2 s, five frames
SILENCE = -4.0                           # mel value of silence, and of everything outside the sound
HANN = torch.from_numpy((0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)).astype(np.float32))  # periodic
BLOCK = 512                              # ours: mel steps computed at a time, so that they stay in the cache


def n_frames(n_samples: int) -> int:
    """Number of video frames of a sound: round(25 x seconds), halves up, at least 1"""
    assert n_samples > 0, "n_frames of an empty sound"
    return max(1, (2 * n_samples + SAMPLES_PER_FRAME) // (2 * SAMPLES_PER_FRAME))


# --------------------------------------------------------------------------------- samples -> mel -> windows of frames

@lru_cache
def band_corners(bands: int, low: float = MEL_LOW, high: float = MEL_HIGH) -> np.ndarray:
    """(M + 2,) Hz: band i is a triangle over corners i, i + 1 and i + 2. Slaney's mel scale is linear below 1 kHz and
    logarithmic above, with 27 steps for a factor of 6.4."""
    low, high = (hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4) for hz in (low, high))
    mel = np.linspace(low, high, bands + 2)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


@lru_cache
def filter_bank(bands: int, n_fft: int = N_FFT, low: float = MEL_LOW, high: float = MEL_HIGH):
    """Slaney's mel filters, triangles of equal area, as a sparse (M, n_fft / 2 + 1) matrix. Equal to the default of
    librosa.filters.mel; importing librosa would add 1.5 s to every start."""
    corners = band_corners(bands, low, high)
    bins = np.arange(n_fft // 2 + 1) * SAMPLE_RATE / n_fft  # Hz
    return csr_array((triangle_filters(corners, bins) * 2 / (corners[2:] - corners[:-2])[:, None]).astype(np.float32))


def triangle_filters(corners: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Corners (M + 2,) -> (M, bins). Filter i rises from corner i to 1 at corner i + 1 and falls to corner i + 2."""
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]  # (M, 1)
    return np.maximum(0, np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)))


def mel_steps(wav: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Steps first .. stop - 1 of the log-mel of wav (n,) -> float32 (M, stop - first). Step s is centred on sample
    200 s. Bit for bit that part of the whole mel: a dense filter bank's rounding depends on the number of steps."""
    mel = np.full((N_MELS, max(0, stop - first)), SILENCE, np.float32)
    for a in range(first, stop, BLOCK):
        b = min(a + BLOCK, stop)
        begin, end = a * HOP - N_FFT // 2, (b - 1) * HOP + N_FFT // 2  # samples under the windows of steps a .. b-1
        lo, hi = max(begin - 1, 0), min(end, len(wav))  # one more sample in front, for the pre-emphasis
        x = np.zeros(end - begin + 1, np.float32)  # x[0] is sample begin - 1; zeros outside, as in librosa
        x[lo - begin + 1 : hi - begin + 1] = wav[lo:hi]
        x = x[1:] - np.float32(PREEMPHASIS) * x[:-1]
        if end > len(wav):  # padding comes after the pre-emphasis, so the last sample has no echo
            x[max(0, len(wav) - begin) :] = 0
        frames = torch.from_numpy(x).unfold(0, N_FFT, HOP)  # (b-a, 800); PyTorch's FFT is three times as fast as NumPy's
        spectrum = torch.view_as_real(torch.fft.rfft(frames * HANN)).square_()  # (b-a, 401, 2)
        magnitude = (spectrum[..., 0] + spectrum[..., 1]).sqrt_().numpy()
        power = filter_bank(N_MELS) @ np.ascontiguousarray(magnitude.T)  # (M, b-a)
        db = 20 * np.log10(np.maximum(10 ** (FLOOR_DB / 20), power)) - REFERENCE_DB
        mel[:, a - first : b - first] = np.clip(8 * (db - FLOOR_DB) / -FLOOR_DB - 4, -4, 4)  # symmetric
    return mel


def log_mel(wav: np.ndarray, voice_norm: bool = False) -> np.ndarray:
    """Samples (n,) in [-1, 1] -> Wav2Lip's mel, float32 (M, 1 + n // 200) in [-4, 4]. voice_norm: normalise_voice"""
    check_sound(wav)
    mel = mel_steps(wav, 0, 1 + len(wav) // HOP)
    return normalise_voice(mel, wav) if voice_norm else mel


def check_sound(wav: np.ndarray):
    assert wav.ndim == 1 and len(wav), f"sound is {wav.shape}, expected (n,) with n > 0"


def window_starts(frames) -> np.ndarray:
    """Frame indices (T,) -> first mel step of each frame's window, (T,). No other code turns frame into mel indices.
    The middle of frame k is at step 3.2 (k + 1/2), the middle of a window from step s at s + 7.5. The nearest s is
    round(3.2 k - 5.9), here in integers. The error is at most half a step, 6 ms."""
    return (16 * np.asarray(frames, np.int64) - 27) // 5


def mel_windows(mel: np.ndarray, frames, first: int = 0) -> np.ndarray:
    """mel (M, S) from step `first` on, T frame indices -> float32 (T, 1, M, 16), centred on the frames"""
    assert mel.ndim == 2 and mel.shape[0] == N_MELS, f"mel is {mel.shape}, expected ({N_MELS}, S)"
    return take_steps(mel, window_starts(frames)[:, None] + np.arange(WINDOW) - first, SILENCE)


def take_steps(mel: np.ndarray, steps: np.ndarray, outside: float) -> np.ndarray:
    """mel (M, S), steps of windows (T, n) -> float32 (T, 1, M, n). Steps that the mel does not have are `outside`."""
    inside = (steps >= 0) & (steps < mel.shape[1])
    windows = mel[:, np.clip(steps, 0, mel.shape[1] - 1)]  # (M, T, n)
    return np.where(inside, windows, np.float32(outside)).transpose(1, 0, 2)[:, None]


def sound_windows(wav: np.ndarray, frames, voice_norm: bool = False) -> np.ndarray:
    """Bit for bit mel_windows(log_mel(wav, voice_norm), frames). Without voice_norm it computes these steps alone."""
    if voice_norm:
        return mel_windows(log_mel(wav, True), frames)
    check_sound(wav)
    starts, length = window_starts(frames), 1 + len(wav) // HOP
    first = int(np.clip(starts.min(), 0, length - 1))
    stop = int(np.clip(starts.max() + WINDOW, first + 1, length))
    return mel_windows(mel_steps(wav, first, stop), frames, first)


def resample_bands(mel: np.ndarray, hz: np.ndarray) -> np.ndarray:
    """mel (.., M, S), frequencies (M,) -> mel whose band i has the old value at hz[i], by linear interpolation"""
    position = np.interp(hz, band_corners(N_MELS)[1:-1], np.arange(N_MELS))  # (M,)
    below = np.minimum(position.astype(int), N_MELS - 2)
    share = (position - below)[:, None]
    return (1 - share) * mel[..., below, :] + share * mel[..., below + 1, :]


def spec_augment(mel: np.ndarray, rng: np.random.Generator, bands: int = 16, steps: int = 3) -> np.ndarray:
    """SpecAugment (Park et al. 2019) without time warping. mel (.., M, S) -> a copy with a frequency mask of 0..bands
    and a time mask of 0..steps, the same for all leading axes. Ours: each at most a fifth of a window."""
    mel = mel.copy()
    M, S = mel.shape[-2:]
    height, width = rng.integers(0, min(bands, M) + 1), rng.integers(0, min(steps, S) + 1)
    low, begin = rng.integers(0, M - height + 1), rng.integers(0, S - width + 1)
    mel[..., low : low + height, :] = SILENCE
    mel[..., begin : begin + width] = SILENCE
    return mel


def change_voice(mel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """mel (.., M, S) -> the same words in another voice. The frequency axis is scaled by up to 16 % (vocal tract
    length perturbation, Jaitly & Hinton 2013). Ours: level +-10 dB, tilt +-5 dB at each end, hiss in every third sound"""
    voice = resample_bands(mel, band_corners(N_MELS)[1:-1] * np.exp(rng.uniform(-0.15, 0.15)))
    decibel = rng.uniform(-10, 10) + rng.uniform(-5, 5) * np.linspace(-1, 1, N_MELS)[:, None]
    voice = np.where(voice > SILENCE, voice + 8 * decibel / -FLOOR_DB, SILENCE)  # 8 units are 100 dB
    if rng.random() < 1 / 3:
        voice = np.maximum(voice, rng.uniform(-4, -1.5) + rng.normal(0, 0.25, voice.shape))
    return np.clip(voice, SILENCE, -SILENCE).astype(np.float32)


# ----------------------------------- voice normalisation: one level and one vocal tract length for all voices. Ours

# levels are in units of the mel, 12.5 dB each
LOUD_RANGE = 1.0                         # steps at most this far below the 95th percentile count as loud speech
MIN_LEVEL = -1.2                         # lowest level of speech: silence stays silent
BELOW, ABOVE = 2.6, 2.4                  # distances from the level of speech that become -4 and 4
MEAN_PITCH, MIN_PITCH, MAX_PITCH = 108.0, 70, 400  # Hz: GRID's speaker 1, the first voice in training; search range
KNEE = 4800.0                            # Hz: lower frequencies are scaled; from here a line leads to MEL_HIGH


def estimate_pitch(wav: np.ndarray) -> float | None:
    """Median pitch in Hz of a voice (n,), by autocorrelation of loud frames of 64 ms. None: no frame is periodic"""
    if len(wav) < 1024:
        return None
    frames = np.lib.stride_tricks.sliding_window_view(wav, 1024)[::320]
    frames = frames[:: -(-len(frames) // 2000)]
    level = frames.std(1)
    frames = frames[level > max(0.3 * np.quantile(level, 0.95), 1e-4)]
    power = np.abs(np.fft.rfft(frames - frames.mean(1, keepdims=True), 2048)) ** 2
    r = np.fft.irfft(power)[:, : SAMPLE_RATE // MIN_PITCH]               # (frames, lags)
    r /= r[:, :1] * (1 - np.arange(r.shape[1]) / 1024)                   # the overlap shrinks with the lag
    first = SAMPLE_RATE // MAX_PITCH
    before, here, after = r[:, first - 1 : -2], r[:, first:-1], r[:, first + 1 :]
    threshold = np.maximum(0.5, 0.85 * here.max(1, keepdims=True))
    peaks = (here >= before) & (here >= after) & (here > threshold)
    lag = first + peaks.argmax(1)[peaks.any(1)]                          # the first peak: one at two periods is as high
    return float(SAMPLE_RATE / np.median(lag)) if len(lag) else None


def normalise_voice(mel: np.ndarray, wav: np.ndarray) -> np.ndarray:
    """log_mel (M, S) of a sound (n,) -> mel with one level and one vocal tract length for all voices, so that a
    network trained on few voices also follows others. Loud speech gets one mean level. Frequencies are divided by
    (pitch / MEAN_PITCH)^(1/3), piecewise linearly, as in vocal tract length normalisation (Lee & Rose 1996)."""
    loud = mel.mean(0) >= np.quantile(mel.mean(0), 0.95) - LOUD_RANGE    # (S,)
    level = max(float(mel[:, loud].mean()), MIN_LEVEL)
    alpha = np.clip((MEAN_PITCH / (estimate_pitch(wav) or MEAN_PITCH)) ** (1 / 3), 0.7, 1.3)
    knee = KNEE * min(1, 1 / alpha)                                      # Hz of the sound
    hz = np.interp(band_corners(N_MELS)[1:-1], (0, alpha * knee, MEL_HIGH), (0, knee, MEL_HIGH))
    return np.interp(resample_bands(mel, hz) - level, (-BELOW, ABOVE), (SILENCE, -SILENCE)).astype(np.float32)


# -------------------------------------------------------- rooms and sounds other than speech, for training. All ours

def coloured_noise(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) with standard deviation 1, falling by 0 to 6 dB per octave like fans, wind and breath"""
    spectrum = np.fft.rfft(rng.standard_normal(n)) * np.arange(1, n // 2 + 2) ** rng.uniform(-1, 0)
    noise = np.fft.irfft(spectrum, n)
    return noise / noise.std()


def add_echo_and_noise(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Voice (n,) -> the voice with an echo that falls by 60 dB in .1 to .7 s, and with noise 5 to 35 dB below it"""
    t = np.arange(int(SAMPLE_RATE * rng.uniform(0.1, 0.7)))
    response = rng.standard_normal(len(t)) * 10 ** (-3 * t / len(t))
    response *= rng.uniform(0, 1) / np.linalg.norm(response)
    response[0] = 1                                                      # the voice itself
    n = next_fast_len(len(wav) + len(response))                          # importing scipy.signal takes a second
    wav = irfft(rfft(wav, n) * rfft(response, n), n)[: len(wav)]
    noise = coloured_noise(len(wav), rng) * wav.std() * 10 ** (-rng.uniform(5, 35) / 20)
    return np.clip(wav + noise, -1, 1).astype(np.float32)


def make_non_speech(n: int, rng: np.random.Generator) -> np.ndarray:
    """Sound (n,) for shut lips: a quiet room, steady noise, noise that swells like breath, or fading chords"""
    t, wav = np.arange(n) / SAMPLE_RATE, coloured_noise(n, rng)
    kind = rng.integers(4)
    if kind == 0:                                                        # a quiet room
        return (wav * rng.integers(2) * 10 ** (-rng.uniform(50, 100) / 20)).astype(np.float32)
    if kind == 1:                                                        # breath; kind 3 stays steady noise
        wav *= np.maximum(0.05, np.sin(2 * np.pi * (rng.uniform(0.3, 1.5) * t + rng.random()))) ** rng.uniform(1, 3)
    if kind == 2:                                                        # chords
        notes = rng.uniform(80, 350) * 2 ** (rng.integers(0, 24, rng.integers(1, 5)) / 12)
        hz = (notes[:, None] * np.arange(1, 7)).ravel()                  # six partials each
        loudness = np.tile(np.arange(1, 7) ** -rng.uniform(0.5, 2), len(notes))
        wav = 0.01 * wav + loudness @ np.sin(2 * np.pi * (hz[:, None] * t + rng.random((len(hz), 1))))
        wav *= np.exp(-rng.uniform(0, 3) * ((t + rng.random()) % rng.uniform(0.4, 2)))
    return (wav / abs(wav).max() * 10 ** (-rng.uniform(0, 50) / 20)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------- voice isolation

PIECE = 60                               # seconds, ours: repetitions are searched within a piece


def isolate_voice(wav: np.ndarray) -> np.ndarray:
    """Speech over music or steady noise, (n,) in [-1, 1] -> (n,) with repeating sounds attenuated, by librosa's vocal
    separation (REPET-SIM, Rafii & Pardo, ISMIR 2012): the background of a frame is the median of similar frames that
    are far from it in time. Differences from librosa's example: margin 5, not 10 (read speech loses 2 to 3 dB, not 3 to
    5; a beating chord 17 to 22, not 18 to 24); frames 2 s apart, or less in sounds under 8 s."""
    import librosa                       # here, because it takes 1.5 s

    check_sound(wav)
    pieces = np.array_split(wav, -(-len(wav) // (PIECE * SAMPLE_RATE)))
    if len(pieces) > 1:                  # memory grows with the square of their length
        return np.concatenate([isolate_voice(piece) for piece in pieces])
    if len(wav) < SAMPLE_RATE // 2:      # too short to repeat anything
        return wav
    spectrum = librosa.stft(wav, n_fft=1024, hop_length=256)  # 64 ms; the example's 2048 at 22 kHz are 93 ms
    magnitude = np.abs(spectrum)
    distance = min(round(2 * SAMPLE_RATE / 256), magnitude.shape[1] // 4)  # steps
    background = librosa.decompose.nn_filter(magnitude, aggregate=np.median, metric="cosine", width=distance)
    background = np.minimum(magnitude, background)
    mask = librosa.util.softmask(magnitude - background, 5 * background, power=2)
    return librosa.istft(spectrum * mask, hop_length=256, n_fft=1024, length=len(wav)).astype(np.float32)


# ------------------------------------------------------------------------------------------------ MFCC, for SyncNet v2

def mfcc(wav: np.ndarray) -> np.ndarray:
    """Samples (n,) in [-1, 1] -> float64 (13, 1 + ceil((n - 400) / 160)), by the defaults of python_speech_features on
    int16: rectangular windows of 25 ms every 10 ms, 512-point FFT, 26 filters, DCT-II, lifter 22, log energy"""
    check_sound(wav)
    x = to_int16(wav).astype(np.float64)
    x = np.append(x[0], x[1:] - 0.97 * x[:-1])
    S = 1 + max(0, -(-(len(x) - 400) // 160))
    x = np.pad(x, (0, max(0, (S - 1) * 160 + 400 - len(x))))
    frames = np.lib.stride_tricks.sliding_window_view(x, 400)[::160]  # (S, 400)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2 / 512  # (S, 257)
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    hz = 700 * (10 ** (np.linspace(0, top, 28) / 2595) - 1)  # HTK's mel scale
    filters = triangle_filters(np.floor(513 * hz / SAMPLE_RATE), np.arange(257))  # (26, 257), corners on whole FFT bins
    eps = np.finfo(float).eps  # in place of zero energy
    energy, bands = power.sum(1), power @ filters.T  # (S,), (S, 26)
    cepstrum = dct(np.log(np.where(bands == 0, eps, bands)), type=2, axis=1, norm="ortho")[:, :13]
    cepstrum *= 1 + 11 * np.sin(np.pi * np.arange(13) / 22)  # lifter
    cepstrum[:, 0] = np.log(np.where(energy == 0, eps, energy))
    return cepstrum.T


# ------------------------------------------------------------- PC-AVS's mel: the STFT of the lws package, in NumPy

LWS_BANDS, LWS_FFT, LWS_HOP, LWS_LOW = 80, 1280, 160, 125.0  # as published; 80 ms and 10 ms in samples; Hz
LWS_STEPS, LWS_STEPS_A_FRAME = 20, SAMPLES_PER_FRAME // LWS_HOP  # of a window, 0.2 s; four per frame


@lru_cache
def lws_hann() -> np.ndarray:
    """(1280,): the analysis window of lws, a half sine. The squares of its copies, a hop apart, add up to one"""
    w2 = (1 - np.cos(2 * np.pi * (2 * np.arange(LWS_FFT) + 1) / (2 * LWS_FFT))) / 2
    overlap = w2.reshape(-1, LWS_HOP).sum(0)  # (160,): the same for every hop
    return np.sqrt(w2 / np.tile(overlap, LWS_FFT // LWS_HOP))


def lws_mel(wav: np.ndarray) -> np.ndarray:
    """Samples (n,), scaled to r.m.s. 0.1 -> mel, float32 (S, 80) in [0, 1] with S = ceil(n / 160) + 7. 0 is silence.
    Step s covers samples 160 s - 1120 .. 160 s + 160."""
    check_sound(wav)
    scale = 0.1 / max(1e-4, float(np.sqrt(np.mean(np.square(wav, dtype=np.float64)))))
    S = -(-len(wav) // LWS_HOP) + LWS_FFT // LWS_HOP - 1
    x = np.pad(wav, (LWS_FFT - LWS_HOP, S * LWS_HOP - len(wav)))
    frames = np.lib.stride_tricks.sliding_window_view(x, LWS_FFT)[::LWS_HOP]  # (S, 1280), a view
    bank, mel = filter_bank(LWS_BANDS, LWS_FFT, LWS_LOW, MEL_HIGH), []
    for block in np.array_split(frames, -(-S // BLOCK)):
        magnitude = np.abs(np.fft.rfft(block * (lws_hann() * scale)))  # (s, 641)
        db = 20 * np.log10(np.maximum(10 ** (FLOOR_DB / 20), (bank @ magnitude.T).T)) - REFERENCE_DB
        mel.append(np.clip((db - FLOOR_DB) / -FLOOR_DB, 0, 1).astype(np.float32))
    return np.concatenate(mel)


def lws_windows(mel: np.ndarray, frames) -> np.ndarray:
    """mel (S, 80), T frame indices -> float32 (T, 1, 80, 20): 20 steps from step 4 (f - 2) of frame f on"""
    steps = (np.asarray(frames, np.int64)[:, None] - 2) * LWS_STEPS_A_FRAME + np.arange(LWS_STEPS)  # (T, 20)
    return take_steps(mel.T, steps, 0)


# --------------------------------------------------------------------------------------------------------- the encoder

class WindowEncoder(nn.Sequential):
    """Mel windows (N, 1, M, 16) in [-4, 4] -> (N, dim): two convolutions over time, on all bands together. Ours: for
    few clips, with a twelfth of the multiplications of AudioEncoder"""

    def __init__(self, dim: int):
        super().__init__(nn.Conv1d(N_MELS, dim, 5, 2, 2), nn.GELU(), nn.Conv1d(dim, dim, 3, 2, 1), nn.GELU(),
                         nn.Flatten(), nn.Linear(4 * dim, dim))  # 16, 8, 4 steps

    def forward(self, mel):
        return super().forward(mel[:, 0] / 4)


class ConvBlock(nn.Module):
    """Wav2Lip's block: convolution, norm, (residual), ReLU. (N, C, M, S) -> (N, C', M', S')"""

    def __init__(self, c_in, c_out, stride=1, padding=1, residual=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, padding, bias=False)  # the norm has a bias
        self.norm = nn.GroupNorm(c_out // 8, c_out)  # ours: groups of 8 channels
        self.residual = residual

    def forward(self, x):
        y = self.norm(self.conv(x))
        return torch.relu(y + x if self.residual else y)


class AudioEncoder(nn.Module):
    """Mel window -> audio code z_a, by Wav2Lip's layers as in FC-TFG. width scales the channels. Differences: GroupNorm
    in place of BatchNorm, because windows of a batch come from few clips and sampling has batches of one; no norm and
    ReLU after the last layer, because codes have both signs."""

    def __init__(self, dim: int, width: float = 1.0):
        super().__init__()
        plan = ((32, 1, 2), (64, (3, 1), 2), (128, 3, 2), (256, (3, 2), 1))  # channels, stride, residual blocks
        self.body, c_in = nn.Sequential(), 1                 # (N, 1, M, 16)
        for channels, stride, residual in plan:              # at M = 80: 80 x 16, 27 x 16, 9 x 6, 3 x 3
            c = max(8, 8 * round(channels * width / 8))
            self.body.extend([ConvBlock(c_in, c, stride), *(ConvBlock(c, c, residual=True) for _ in range(residual))])
            c_in = c
        c = max(8, 8 * round(512 * width / 8))
        self.body.append(ConvBlock(c_in, c, padding=0))      # (N, C, 1, 1)
        self.out = nn.Linear(c * (-(-N_MELS // 27) - 2), dim)  # rows of the last map: 1 for 80 bands

    def forward(self, mel):
        """mel (N, 1, M, 16) in [-4, 4] -> z_a (N, dim)"""
        assert mel.shape[1:] == (1, N_MELS, WINDOW), f"mel is {tuple(mel.shape)}, expected (N, 1, {N_MELS}, {WINDOW})"
        return self.out(self.body(mel / 4).flatten(1))
