"""Sound features against librosa, SciPy and naive loops; alignment with frames; voice normalisation; augmentation."""

import librosa
import numpy as np
import pytest
import scipy.fft
import scipy.io.wavfile
import scipy.signal
import torch

import audio
from audio import AudioEncoder, log_mel, mel_windows, mfcc, n_frames, sound_windows
from test_media import RATE, noise, tone


# ------------------------------------------------------------------------------------------------------------
# mel


def librosa_mel(wav):
    """Wav2Lip's audio.py step by step, with librosa"""
    emphasised = scipy.signal.lfilter([1, -0.97], [1], wav.astype(np.float64))
    magnitude = abs(librosa.stft(y=emphasised, n_fft=800, hop_length=200, win_length=800))
    bank = librosa.filters.mel(sr=RATE, n_fft=800, n_mels=80, fmin=55, fmax=7600)
    db = 20 * np.log10(np.maximum(1e-5, bank @ magnitude)) - 20
    return np.clip(8 * (db + 100) / 100 - 4, -4, 4)


@pytest.mark.filterwarnings("ignore:n_fft")  # librosa warns if a sound is shorter than a window
@pytest.mark.parametrize("n", [1, 199, 200, 801, 7777, 16000])
def test_log_mel_equals_wav2lips_mel_by_librosa(n):
    wav = noise(n)
    np.testing.assert_allclose(log_mel(wav), librosa_mel(wav), atol=1e-4)


def test_log_mel_agrees_with_scipys_stft():
    wav = noise(9000)
    window = scipy.signal.get_window("hann", 800)
    stft = scipy.signal.ShortTimeFFT(window, 200, RATE, scale_to=None)
    spectrum = abs(stft.stft(scipy.signal.lfilter([1, -0.97], [1], wav), p0=0, p1=46))  # (401, 46)
    bank = librosa.filters.mel(sr=RATE, n_fft=800, n_mels=80, fmin=55, fmax=7600)
    expected = np.clip(8 * (20 * np.log10(bank @ spectrum + 1e-9) + 80) / 100 - 4, -4, 4)
    np.testing.assert_allclose(log_mel(wav), expected, atol=1e-4)


def test_the_block_size_does_not_change_the_mel(monkeypatch):
    wav = noise(30000)
    whole = log_mel(wav)
    monkeypatch.setattr(audio, "BLOCK", 7)
    np.testing.assert_array_equal(log_mel(wav), whole)


def test_silence_is_exactly_minus_four():
    mel = log_mel(np.zeros(5000, np.float32))
    assert mel.shape == (80, 26) and mel.dtype == np.float32 and (mel == -4).all()


@pytest.mark.parametrize("hz", [220, 1000, 3300, 6100])
def test_a_sine_peaks_in_its_band(hz):
    corners = librosa.mel_frequencies(n_mels=82, fmin=55, fmax=7600)
    band = int(log_mel(tone(hz, 8000))[:, 20].argmax())
    assert corners[band] <= hz <= corners[band + 2]


def test_mel_stays_in_range_for_the_loudest_sound():
    mel = log_mel(np.sign(tone(440, 8000)))
    assert mel.min() >= -4 and mel.max() <= 4


# ------------------------------------------------------------------------------------------------------------
# frames and windows


def test_n_frames_is_25_a_second_rounded():
    assert [n_frames(n) for n in (1, 319, 640, 959, 960, 16000, 6 * RATE)] == [1, 1, 1, 1, 2, 25, 150]


@pytest.mark.parametrize("part", [0.17, 0.3, 0.5, 0.7, 0.83])
def test_a_click_at_time_t_is_in_the_middle_of_the_window_of_frame_floor_25t(part):
    for k in range(30):  # the click is `part` of a frame after the start of frame k
        wav = np.zeros(2 * RATE, np.float32)
        wav[round((k + part) / 25 * RATE)] = 1.0
        windows = mel_windows(log_mel(wav), range(50))[:, 0]  # (T, 80, 16)
        loudness = (windows.max(1) + 4).astype(np.float64) ** 8  # (T, 16)
        position = (loudness * np.arange(16)).sum(1) / np.maximum(loudness.sum(1), 1e-9)
        distance = np.where(loudness.sum(1) > 0, abs(position - 7.5), 99)  # 99: the window does not have the click
        assert distance.argmin() == k and distance[k] <= 2.1  # half a frame is 1.6 steps, the grid adds half a step


def test_windows_are_centred_on_their_frame_within_half_a_step():
    k = np.arange(1000)
    middle_of_window = (audio.window_starts(k) + 7.5) / 80  # seconds
    assert abs(middle_of_window - (k + 0.5) / 25).max() <= 0.00625 + 1e-9


def test_windows_are_slices_of_the_mel_and_silent_outside_it():
    mel = np.arange(80 * 40, dtype=np.float32).reshape(80, 40)
    windows = mel_windows(mel, [0, 5, 12, 300])
    assert windows.shape == (4, 1, 80, 16) and windows.dtype == np.float32
    assert (windows[0, 0, :, :6] == -4).all()  # six steps before the sound
    np.testing.assert_array_equal(windows[0, 0, :, 6:], mel[:, :10])
    np.testing.assert_array_equal(windows[1, 0], mel[:, 10:26])
    np.testing.assert_array_equal(windows[2, 0, :, :7], mel[:, 33:])
    assert (windows[2, 0, :, 7:] == -4).all() and (windows[3] == -4).all()


def test_sound_windows_equal_the_windows_of_the_whole_mel_to_the_bit():
    rng = np.random.default_rng(3)
    for n in (1, 150, 640, 3200, 16001, 40000):
        wav = noise(n, seed=n)
        T = n_frames(n)
        cases = [range(T), [0], [T - 1], [T + 30], [-9], [T // 2, T // 2 + 1], rng.integers(-4, T + 4, 5)]
        for frames in cases:
            np.testing.assert_array_equal(sound_windows(wav, frames), mel_windows(log_mel(wav), frames))


def test_the_window_of_a_frame_does_not_depend_on_later_sound():
    wav = noise(RATE)
    longer = np.concatenate([wav, noise(RATE, seed=1)])
    np.testing.assert_array_equal(sound_windows(wav, [9]), sound_windows(longer, [9]))


# ------------------------------------------------------------------------------------------------------------
# MFCC and SpecAugment


def naive_mfcc(samples):
    """python_speech_features.mfcc with its defaults, as loops over frames, filters and coefficients"""
    x = [float(samples[0])] + [float(samples[i]) - 0.97 * float(samples[i - 1]) for i in range(1, len(samples))]
    S = 1 if len(x) <= 400 else 1 + int(np.ceil((len(x) - 400) / 160))
    x = np.array(x + [0.0] * ((S - 1) * 160 + 400 - len(x)))
    hz = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)]
    bins = [int(513 * f // RATE) for f in hz]
    rows = []
    for s in range(S):
        power = abs(np.fft.fft(x[160 * s : 160 * s + 400], 512)[:257]) ** 2 / 512
        bands = []
        for j in range(26):
            total = 0.0
            for i in range(bins[j], bins[j + 1]):
                total += power[i] * (i - bins[j]) / (bins[j + 1] - bins[j])
            for i in range(bins[j + 1], bins[j + 2]):
                total += power[i] * (bins[j + 2] - i) / (bins[j + 2] - bins[j + 1])
            bands.append(np.log(total if total > 0 else np.finfo(float).eps))
        row = []
        for c in range(13):
            total = sum(bands[j] * np.cos(np.pi * c * (2 * j + 1) / 52) for j in range(26))
            row.append(total * np.sqrt((1 if c == 0 else 2) / 26) * (1 + 11 * np.sin(np.pi * c / 22)))
        row[0] = np.log(power.sum() if power.sum() > 0 else np.finfo(float).eps)
        rows.append(row)
    return np.array(rows).T


@pytest.mark.parametrize("n", [100, 400, 401, 1999])
def test_mfcc_equals_python_speech_features(n):
    samples = np.random.default_rng(n).integers(-9000, 9000, n)
    computed = mfcc((samples / 32768).astype(np.float32))
    np.testing.assert_allclose(computed, naive_mfcc(samples), rtol=1e-7, atol=1e-7)


def test_mfcc_of_silence_is_finite():
    assert np.isfinite(mfcc(np.zeros(3000, np.float32))).all()


def test_spec_augment_masks_one_block_of_bands_and_one_of_steps():
    rng = np.random.default_rng(0)
    mel = rng.uniform(-3, 4, (5, 1, 80, 16)).astype(np.float32)
    seen_bands, seen_steps = set(), set()
    for _ in range(200):
        out = audio.spec_augment(mel, rng, bands=9, steps=4)
        masked = (out == -4)[:, 0]  # (5, 80, 16)
        np.testing.assert_array_equal(out[~masked[:, None]], mel[~masked[:, None]])
        assert (masked == masked[0]).all()  # all windows get the same masks
        rows, columns = masked[0].all(1), masked[0].all(0)
        np.testing.assert_array_equal(masked[0], rows[:, None] | columns[None, :])
        for line in (rows, columns):  # one contiguous block each
            assert np.count_nonzero(np.diff(line.astype(int))) <= 2
        seen_bands.add(int(rows.sum()))
        seen_steps.add(int(columns.sum()))
    assert seen_bands == set(range(10)) and seen_steps == set(range(5))


class Fixed:
    """A random generator that returns the middle of each range, except a given value for the first"""

    def __init__(self, first, hiss=False):
        self.first, self.hiss = first, hiss

    def uniform(self, low, high):
        value, self.first = (low + high) / 2 if self.first is None else self.first, None
        return value

    def random(self):
        return 0.0 if self.hiss else 1.0


def test_change_voice_stretches_the_frequencies():
    log_stretch = 0.12
    low, high = tone(1500, RATE), tone(1500 * np.exp(-log_stretch), RATE)
    changed = audio.change_voice(log_mel(low), Fixed(log_stretch))  # the band at f has the old value at f e^.12
    band, expected, before = (mel[:, 40].argmax() for mel in (changed, log_mel(high), log_mel(low)))
    assert abs(band - expected) <= 1 < abs(band - before)
    same = audio.change_voice(log_mel(low), Fixed(0.0))
    np.testing.assert_allclose(same, log_mel(low), atol=1e-5)


def test_change_voice_keeps_silence_the_value_range_and_the_timing():
    rng = np.random.default_rng(1)
    mel = log_mel(np.concatenate([np.zeros(4000, np.float32), noise(4000), np.zeros(4000, np.float32)]))
    onsets = set()
    for _ in range(40):
        out = audio.change_voice(mel[None, None], rng)
        assert out.shape == (1, 1, *mel.shape) and out.dtype == np.float32 and np.abs(out).max() <= 4
        onsets.add(int(np.diff(out[0, 0].mean(0)).argmax()))
    assert len(onsets) == 1
    quiet = [audio.change_voice(np.full((80, 16), -4, np.float32), rng) for _ in range(40)]
    hissing = [q.max() > -4 for q in quiet]
    assert 4 < sum(hissing) < 25  # every third


def speech_over_music(seconds):
    """-> words that do not repeat, a chord that repeats every half second, (n,) each"""
    t = np.arange(seconds * RATE) / RATE
    rng = np.random.default_rng(4)
    glide = np.cumsum(np.interp(t, np.arange(0, seconds + 1, 0.2), rng.uniform(120, 300, 5 * seconds + 5))) / RATE
    loud = np.interp(t, np.arange(0, seconds + 1, 0.11), rng.random(len(np.arange(0, seconds + 1, 0.11))))
    words = 0.1 * loud * sum(np.sin(2 * np.pi * h * glide) / h for h in range(1, 9))
    chord = 0.05 * (t % 0.5 < 0.25) * sum(np.sin(2 * np.pi * hz * t) for hz in (440, 554, 659, 1500))
    return words.astype(np.float32), chord.astype(np.float32)


def test_isolate_voice_attenuates_repeating_music_more_than_words():
    words, chord = speech_over_music(6)
    voice = audio.isolate_voice(words + chord)
    assert voice.shape == words.shape and voice.dtype == np.float32

    def level(wav, hz):  # of one sine, by projection
        return np.abs(np.exp(-2j * np.pi * hz * np.arange(len(wav)) / RATE) @ wav)

    assert all(level(voice, hz) < 0.25 * level(words + chord, hz) for hz in (440, 554, 659, 1500))  # 12 dB
    assert voice @ words > 0.4 * (words @ words)  # 8 dB


def test_a_long_sound_is_isolated_in_pieces_and_keeps_its_length(monkeypatch):
    monkeypatch.setattr(audio, "PIECE", 3)
    wav = noise(int(7.3 * RATE))
    pieces = [audio.isolate_voice(piece) for piece in np.array_split(wav, 3)]
    assert np.array_equal(audio.isolate_voice(wav), np.concatenate(pieces))


def test_short_and_silent_sounds_can_be_isolated():
    for wav in (noise(1), noise(100), noise(9000), np.zeros(20000, np.float32)):
        voice = audio.isolate_voice(wav)
        assert voice.shape == wav.shape and np.isfinite(voice).all()


# ------------------------------------------------------------------------------------------------------------
# encoder


def test_audio_encoder_treats_each_window_alone_and_equally_in_train_and_eval_mode():
    torch.manual_seed(0)
    encoder = AudioEncoder(dim=12, width=0.25)
    mel = torch.randn(5, 1, 80, 16)
    together = encoder(mel)
    assert together.shape == (5, 12)
    torch.testing.assert_close(together[3:4], encoder(mel[3:4]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together, encoder.eval()(mel))


def test_every_parameter_of_the_audio_encoder_gets_a_gradient():
    torch.manual_seed(0)
    encoder = AudioEncoder(dim=12, width=0.25)
    (encoder(torch.randn(3, 1, 80, 16)) ** 2).sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_every_mel_step_and_band_changes_the_audio_code():
    torch.manual_seed(0)
    encoder = AudioEncoder(dim=12, width=0.25)
    mel = torch.randn(1, 1, 80, 16, requires_grad=True)
    (encoder(mel) ** 2).sum().backward()
    assert (mel.grad[0, 0] != 0).all()


def test_audio_encoder_of_silence_is_finite():
    assert torch.isfinite(AudioEncoder(dim=12, width=0.25)(torch.full((1, 1, 80, 16), -4.0))).all()


def test_audio_encoder_refuses_windows_of_another_shape():
    with pytest.raises(AssertionError, match="expected"):
        AudioEncoder(dim=12, width=0.25)(torch.zeros(2, 1, 16, 80))


@pytest.mark.parametrize("bands", [64, 80, 100, 128])
def test_the_number_of_mel_bands_can_be_changed_by_one_constant(monkeypatch, bands):
    monkeypatch.setattr(audio, "N_MELS", bands)
    wav = noise(8000)
    mel = log_mel(wav)
    assert mel.shape == (bands, 41) and mel_windows(mel, range(3)).shape == (3, 1, bands, 16)
    assert audio.change_voice(mel, np.random.default_rng(0)).shape == mel.shape
    code = AudioEncoder(dim=12, width=0.25)(torch.from_numpy(sound_windows(wav, range(12))))
    assert code.shape == (12, 12)


# ------------------------------------------------------------------------------------------------------------
# voice normalisation


def voice(hz, formant, seconds=2.0):
    """A voice of pitch hz: syllables of a pulse train through one formant, over faint noise"""
    n = round(seconds * RATE)
    pulses = np.zeros(n)
    pulses[np.round(np.arange(0, n, RATE / hz)).astype(int).clip(max=n - 1)] = 1
    b, a = scipy.signal.iirpeak(formant, 5, fs=RATE)
    syllables = np.abs(np.sin(2 * np.pi * 2 * np.arange(n) / RATE)) + 0.05
    return (0.5 * scipy.signal.lfilter(b, a, pulses) * syllables + 1e-3 * noise(n)).astype(np.float32)


@pytest.mark.parametrize("hz", [87, 150, 211, 320])
def test_the_pitch_of_a_pulse_train_is_estimated_correctly(hz):
    assert audio.estimate_pitch(voice(hz, 900)) == pytest.approx(hz, rel=0.02)


@pytest.mark.parametrize("wav", [np.zeros(9000, np.float32), noise(9000), noise(500), np.cumsum(noise(9000)) / 100])
def test_noise_and_silence_have_no_pitch(wav):
    assert audio.estimate_pitch(wav) is None


def test_the_normalised_mel_does_not_depend_on_the_level():
    wav = voice(120, 900) + noise(2 * RATE) * np.float32(np.abs(np.sin(np.arange(2 * RATE) / 1600)) + 0.05)
    for gain in (0.6, 2.0):
        np.testing.assert_allclose(log_mel(gain * wav, True), log_mel(wav, True), atol=1e-4)
    assert abs(log_mel(0.6 * wav) - log_mel(wav)).max() > 0.3


@pytest.mark.parametrize("hz", [80, 160, 250])  # periods of whole samples
def test_formants_of_shorter_and_longer_vocal_tracts_are_normalised_to_the_same_band(hz):
    voices = [voice(p, 3000 * (p / 108) ** (1 / 3)) for p in (RATE / 148, hz)]
    mels = [[log_mel(wav, norm).mean(1) for wav in voices] for norm in (True, False)]
    bands, plain = ([np.convolve(mel + 4, np.hanning(9), "same").argmax() for mel in pair] for pair in mels)
    assert abs(bands[1] - bands[0]) <= 1 < abs(plain[1] - plain[0])


def test_normalised_silence_is_exactly_minus_four_and_faint_noise_stays_low():
    assert (log_mel(np.zeros(5000, np.float32), True) == -4).all()
    assert log_mel(1e-4 * noise(RATE), True).max() < -1
    wav = np.concatenate([voice(150, 900), np.zeros(RATE, np.float32)])
    assert (log_mel(wav, True)[:, -70:] == -4).all()


def test_normalised_windows_equal_those_of_the_whole_sound():
    wav = np.concatenate([np.zeros(8000, np.float32), voice(200, 1200)])
    expected = mel_windows(log_mel(wav, True), range(40))
    np.testing.assert_array_equal(sound_windows(wav, range(20, 24), True), expected[20:24])
    assert not np.array_equal(sound_windows(wav, range(20, 24), True), sound_windows(wav, range(20, 24)))


def test_an_echo_does_not_stretch_the_voice(monkeypatch):
    monkeypatch.setattr(audio, "next_fast_len", lambda n: n + 1 - n % 2)  # always odd
    voice = 0.1 * np.random.default_rng(1).standard_normal(30000)
    for seed in range(3):
        noisy = audio.add_echo_and_noise(voice, np.random.default_rng(seed))
        assert np.corrcoef(voice[-1000:], noisy[-1000:])[0, 1] > 0.5


def test_echo_and_noise_follow_the_voice_and_do_not_shift_it():
    click = np.zeros(RATE, np.float32)
    click[4000] = 0.9
    for seed in range(4):
        noisy = audio.add_echo_and_noise(click, np.random.default_rng(seed))
        assert abs(noisy).argmax() == 4000 and noisy.shape == click.shape and noisy.dtype == np.float32
        assert abs(noisy[4001:6000]).mean() > abs(noisy[12000:]).mean() * 1.05
    clean = voice(120, 900)
    assert min((audio.add_echo_and_noise(clean, np.random.default_rng(k)) - clean).std() for k in range(9)) > 0


def test_non_speech_has_silent_quiet_loud_and_periodic_sounds():
    sounds = [audio.make_non_speech(8000, np.random.default_rng(k)) for k in range(40)]
    assert all(x.shape == (8000,) and x.dtype == np.float32 and np.abs(x).max() <= 1 for x in sounds)
    peaks = np.array([abs(x).max() for x in sounds])
    assert (peaks == 0).any() and (peaks > 0.1).any() and ((peaks > 1e-3) & (peaks < 0.05)).any()
    assert any(audio.estimate_pitch(x) for x in sounds) and not all(audio.estimate_pitch(x) for x in sounds)
