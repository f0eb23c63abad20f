"""Sound: against librosa, SciPy and naive loops; where a click lands; every format and every refusal."""

import argparse
import importlib
import soundfile
import subprocess
import sys
import wave

import librosa
import numpy as np
import pytest
import scipy.fft
import scipy.io.wavfile
import scipy.signal
import torch

import audio
import media
from audio import AudioEncoder, log_mel, mel_windows, mfcc, n_frames, sound_windows
from media import InputError, load_audio

RATE = 16000


def noise(n, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, n).astype(np.float32)


def tone(hz, n, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(n) / rate)).astype(np.float32)


def ffmpeg(*args):
    command = [media.ffmpeg_path(), "-nostdin", "-loglevel", "error", "-y", *map(str, args)]
    subprocess.run(command, check=True)


# ------------------------------------------------------------------------------------------------------------
# mel


def librosa_mel(wav):
    """Wav2Lip's audio.py, step by step, with librosa doing the work."""
    emphasised = scipy.signal.lfilter([1, -0.97], [1], wav.astype(np.float64))
    magnitude = abs(librosa.stft(y=emphasised, n_fft=800, hop_length=200, win_length=800))
    bank = librosa.filters.mel(sr=RATE, n_fft=800, n_mels=80, fmin=55, fmax=7600)
    db = 20 * np.log10(np.maximum(1e-5, bank @ magnitude)) - 20
    return np.clip(8 * (db + 100) / 100 - 4, -4, 4)


@pytest.mark.filterwarnings("ignore:n_fft")  # librosa, of sounds shorter than a window
@pytest.mark.parametrize("n", [1, 199, 200, 801, 7777, 16000])
def test_log_mel_is_wav2lips_mel_by_librosa(n):
    wav = noise(n)
    np.testing.assert_allclose(log_mel(wav), librosa_mel(wav), atol=1e-4)


def test_log_mel_agrees_with_scipys_stft():
    wav = noise(9000)
    window = scipy.signal.get_window("hann", 800)
    stft = scipy.signal.ShortTimeFFT(window, 200, RATE, scale_to=None)
    spectrum = abs(stft.stft(scipy.signal.lfilter([1, -0.97], [1], wav), p0=0, p1=46))  # (401, 46)
    bank = librosa.filters.mel(sr=RATE, n_fft=800, n_mels=80, fmin=55, fmax=7600)
    want = np.clip(8 * (20 * np.log10(bank @ spectrum + 1e-9) + 80) / 100 - 4, -4, 4)
    np.testing.assert_allclose(log_mel(wav), want, atol=1e-4)


def test_mel_blocks_do_not_show(monkeypatch):
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
def test_a_click_at_time_t_lands_in_the_window_of_frame_floor_25t(part):
    for k in range(30):  # the click is `part` of a frame after frame k's beginning
        wav = np.zeros(2 * RATE, np.float32)
        wav[round((k + part) / 25 * RATE)] = 1.0
        windows = mel_windows(log_mel(wav), range(50))[:, 0]  # (T, 80, 16)
        loudness = (windows.max(1) + 4).astype(np.float64) ** 8  # (T, 16)
        heard = (loudness * np.arange(16)).sum(1) / np.maximum(loudness.sum(1), 1e-9)
        # the frame that hears it closest to the middle of its window, where there is something to hear
        apart = np.where(loudness.sum(1) > 0, abs(heard - 7.5), 99)
        assert apart.argmin() == k and apart[k] <= 2.1  # half a frame is 1.6 steps, the grid adds half a step


def test_windows_are_within_half_a_step_of_the_frames_middle():
    k = np.arange(1000)
    middle_of_window = (audio.window_starts(k) + 7.5) / 80  # seconds
    assert abs(middle_of_window - (k + 0.5) / 25).max() <= 0.00625 + 1e-9


def test_windows_take_their_steps_and_silence_outside():
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


def test_windows_of_a_frame_do_not_depend_on_later_sound():
    wav = noise(RATE)
    longer = np.concatenate([wav, noise(RATE, seed=1)])
    np.testing.assert_array_equal(sound_windows(wav, [9]), sound_windows(longer, [9]))


# ------------------------------------------------------------------------------------------------------------
# MFCC and SpecAugment


def naive_mfcc(samples):
    """python_speech_features.mfcc and its defaults as loops over frames, filters and coefficients."""
    x = [float(samples[0])] + [
        float(samples[i]) - 0.97 * float(samples[i - 1]) for i in range(1, len(samples))
    ]
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
def test_mfcc_is_what_python_speech_features_computes(n):
    samples = np.random.default_rng(n).integers(-9000, 9000, n)
    np.testing.assert_allclose(
        mfcc((samples / 32768).astype(np.float32)), naive_mfcc(samples), rtol=1e-7, atol=1e-7
    )


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
    """A random generator that gives the middle of what it is asked for, or a chosen value for the first uniform."""

    def __init__(self, first, hiss=False):
        self.first, self.hiss = first, hiss

    def uniform(self, low, high):
        value, self.first = (low + high) / 2 if self.first is None else self.first, None
        return value

    def random(self):
        return 0.0 if self.hiss else 1.0


def test_another_voice_is_the_same_one_with_its_frequencies_stretched():
    log_stretch = 0.12
    low, high = tone(1500, RATE), tone(1500 * np.exp(-log_stretch), RATE)
    heard = audio.other_voice(log_mel(low), Fixed(log_stretch))  # band at f shows what was at f e^.12
    band, wanted, before = (mel[:, 40].argmax() for mel in (heard, log_mel(high), log_mel(low)))
    assert abs(band - wanted) <= 1 < abs(band - before)
    same = audio.other_voice(log_mel(low), Fixed(0.0))
    np.testing.assert_allclose(same, log_mel(low), atol=1e-5)


def test_another_voice_keeps_silence_and_range_and_moves_no_step_in_time():
    rng = np.random.default_rng(1)
    mel = log_mel(np.concatenate([np.zeros(4000, np.float32), noise(4000), np.zeros(4000, np.float32)]))
    onsets = set()
    for _ in range(40):
        out = audio.other_voice(mel[None, None], rng)
        assert out.shape == (1, 1, *mel.shape) and out.dtype == np.float32 and np.abs(out).max() <= 4
        onsets.add(int(np.diff(out[0, 0].mean(0)).argmax()))
    assert len(onsets) == 1
    quiet = [audio.other_voice(np.full((80, 16), -4, np.float32), rng) for _ in range(40)]
    hissing = [q.max() > -4 for q in quiet]
    assert 4 < sum(hissing) < 25  # every third


def speech_over_music(seconds):
    """Words that never come back, a chord that comes back every half second; each (n,)"""
    t = np.arange(seconds * RATE) / RATE
    rng = np.random.default_rng(4)
    glide = np.cumsum(np.interp(t, np.arange(0, seconds + 1, 0.2), rng.uniform(120, 300, 5 * seconds + 5))) / RATE
    loud = np.interp(t, np.arange(0, seconds + 1, 0.11), rng.random(len(np.arange(0, seconds + 1, 0.11))))
    words = 0.1 * loud * sum(np.sin(2 * np.pi * h * glide) / h for h in range(1, 9))
    chord = 0.05 * (t % 0.5 < 0.25) * sum(np.sin(2 * np.pi * hz * t) for hz in (440, 554, 659, 1500))
    return words.astype(np.float32), chord.astype(np.float32)


def test_an_isolated_voice_stands_out_of_the_music_that_repeats():
    words, chord = speech_over_music(6)
    voice = audio.isolate_voice(words + chord)
    assert voice.shape == words.shape and voice.dtype == np.float32

    def level(wav, hz):  # of one tone, by projection
        return np.abs(np.exp(-2j * np.pi * hz * np.arange(len(wav)) / RATE) @ wav)

    assert all(level(voice, hz) < 0.25 * level(words + chord, hz) for hz in (440, 554, 659, 1500))  # 12 dB
    assert voice @ words > 0.4 * (words @ words)  # 8 dB


def test_a_long_sound_is_isolated_piece_by_piece_without_a_seam(monkeypatch):
    monkeypatch.setattr(audio, "PIECE", 3)
    monkeypatch.setattr(audio, "isolate_piece", lambda wav: 0.5 * wav)
    wav = noise(int(7.3 * RATE))
    np.testing.assert_allclose(audio.isolate_voice(wav), 0.5 * wav, atol=1e-6)


def test_short_and_silent_sounds_are_isolated_too():
    for wav in (noise(1), noise(100), noise(9000), np.zeros(20000, np.float32)):
        voice = audio.isolate_voice(wav)
        assert voice.shape == wav.shape and np.isfinite(voice).all()


# ------------------------------------------------------------------------------------------------------------
# encoder


def test_audio_encoder_codes_each_window_alone_in_train_and_eval_alike():
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


def test_audio_encoder_hears_every_mel_step_and_band():
    torch.manual_seed(0)
    encoder = AudioEncoder(dim=12, width=0.25)
    mel = torch.randn(1, 1, 80, 16, requires_grad=True)
    (encoder(mel) ** 2).sum().backward()
    assert (mel.grad[0, 0] != 0).all()


def test_audio_encoder_of_silence_is_finite():
    assert torch.isfinite(AudioEncoder(dim=12, width=0.25)(torch.full((1, 1, 80, 16), -4.0))).all()


def test_audio_encoder_refuses_another_window():
    with pytest.raises(AssertionError, match="expected"):
        AudioEncoder(dim=12, width=0.25)(torch.zeros(2, 1, 16, 80))


# ------------------------------------------------------------------------------------------------------------
# files


def peak_hz(wav):
    return np.fft.rfft(wav * np.hanning(len(wav))).__abs__().argmax() * RATE / len(wav)


def test_16_bit_16_khz_comes_back_sample_by_sample(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 7001).astype(np.int16)
    scipy.io.wavfile.write(tmp_path / "a.wav", RATE, samples)
    wav = load_audio(tmp_path / "a.wav")
    assert wav.dtype == np.float32 and wav.flags.writeable
    np.testing.assert_array_equal(wav, samples / np.float32(32768))


@pytest.mark.parametrize(
    "name, rate, channels, subtype",
    [
        ("8-bit.wav", 16000, 1, "PCM_U8"),
        ("24-bit.wav", 48000, 1, "PCM_24"),
        ("96khz.wav", 96000, 2, "PCM_16"),
        ("six channels.wav", 48000, 6, "PCM_16"),
        ("float.wav", 44100, 2, "FLOAT"),
        ("8khz.flac", 8000, 1, "PCM_16"),
        ("a b'c\"d.ogg", 44100, 2, "VORBIS"),
        ("-i.mp3", 44100, 2, "MPEG_LAYER_III"),
        ("http:x.wav", 16000, 1, "PCM_16"),
        ("%d [x];&$(touch y).wav", 16000, 1, "PCM_16"),
    ],
)
def test_every_kind_of_sound_file_is_heard_at_its_pitch(tmp_path, monkeypatch, name, rate, channels, subtype):
    monkeypatch.chdir(tmp_path)
    soundfile.write(
        str(tmp_path / name), np.tile(tone(700, rate, rate)[:, None], (1, channels)), rate, subtype=subtype
    )
    wav = load_audio(name)  # a relative path, as typed
    assert abs(len(wav) - RATE) <= 0.06 * RATE  # MP3 pads
    assert abs(peak_hz(wav) - 700) < 5
    assert 0.1 < abs(wav).max() <= 1


def test_sound_inside_a_video_is_found_at_its_time(tmp_path):
    wav = np.zeros(2 * RATE, np.int16)
    wav[RATE : RATE + 40] = 30000
    scipy.io.wavfile.write(tmp_path / "click.wav", RATE, wav)
    picture = ("-f", "lavfi", "-i", "color=s=32x32:r=25:d=2")
    for name in ("v.mp4", "v.mkv", "v.mov"):
        ffmpeg(*picture, "-i", tmp_path / "click.wav", tmp_path / name)
        heard = load_audio(tmp_path / name)
        assert abs(int(abs(heard).argmax()) - RATE) < 320, name  # half a frame


def test_a_track_that_starts_late_in_a_video_is_padded_in_front(tmp_path):
    wav = np.zeros(RATE, np.int16)
    wav[:40] = 30000
    scipy.io.wavfile.write(tmp_path / "click.wav", RATE, wav)
    picture = ("-f", "lavfi", "-i", "color=s=32x32:r=25:d=2")
    ffmpeg(*picture, "-itsoffset", "0.6", "-i", tmp_path / "click.wav", tmp_path / "late.mp4")
    heard = load_audio(tmp_path / "late.mp4")
    assert abs(int(abs(heard).argmax()) - 0.6 * RATE) < 320


def test_silence_and_a_tenth_of_a_second_work(tmp_path):
    scipy.io.wavfile.write(tmp_path / "s.wav", RATE, np.zeros(1600, np.int16))
    wav = load_audio(tmp_path / "s.wav")
    assert len(wav) == 1600 and not wav.any()
    assert sound_windows(wav, range(n_frames(len(wav)))).shape == (3, 1, 80, 16)


def test_too_loud_floats_are_clipped(tmp_path):
    scipy.io.wavfile.write(tmp_path / "loud.wav", RATE, 3 * tone(300, 4000))
    assert abs(load_audio(tmp_path / "loud.wav")).max() == 1


def bad_sounds(folder):
    """(path, what the message must say) of everything that must be refused."""
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
    return [
        ("missing.wav", "no such file"),
        ("directory.wav", "directory"),
        ("empty.wav", "empty"),
        ("words.wav", "not a sound"),
        ("words.txt", "not a sound"),
        ("list.m3u8", "not a sound"),
        ("list.ffconcat", "not a sound"),
        ("zero.wav", "0 s"),
        ("nan.wav", "NaN"),
        ("inf.wav", "inf"),
        ("cut.flac", "cut short"),
        ("cut.m4a", "can"),
        ("cut.wav", "cut short"),
        ("mute.mp4", "no sound"),
        ("x\0y.wav", "no such file"),
        ("x" * 300, "read"),
    ]


def test_every_bad_sound_is_refused_in_one_line_that_names_it(tmp_path):
    for name, reason in bad_sounds(tmp_path):
        with pytest.raises(InputError) as caught:
            load_audio(tmp_path / name)
        message = str(caught.value)
        assert "\n" not in message and name.split("\0")[0] in message and reason in message, (name, message)


# ------------------------------------------------------------------------------------------------------------
# files as people have them


def click_at(seconds, length=2.0, rate=48000):
    """A soft hum, so that encoders have something to do, and a click"""
    wav = 0.02 * tone(300, round(length * rate), rate)
    wav[round(seconds * rate) :][: rate // 400] = 0.9
    return wav


def heard_at(path):
    wav = load_audio(path)
    return int(abs(wav).argmax()) / RATE


def syllables(n=2 * RATE):
    """A buzz in bursts: loud and silent parts, as speech has"""
    t = np.arange(n) / RATE
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 12))
    return (0.1 * buzz * (np.sin(2 * np.pi * 4 * t) > 0)).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.03, 0.08, 0.7])
def test_a_hole_of_any_length_in_the_sound_is_silence(tmp_path, seconds):
    soundfile.write(tmp_path / "a.wav", click_at(1.5), 48000)
    drop = f"noise=drop='between(pts*tb,0.5,{0.499 + seconds})'"
    ffmpeg("-i", tmp_path / "a.wav", "-c:a", "flac", "-frame_size", "480", "-bsf:a", drop, tmp_path / "a.mkv")
    assert abs(heard_at(tmp_path / "a.mkv") - 1.5) < 0.01


def test_rate_and_channels_that_change_in_a_late_track_keep_its_time(tmp_path):
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


def test_a_streamed_wav_is_read_whole_and_a_cut_one_refused(tmp_path):
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


def test_a_variable_mp3_is_read_whole_with_junk_in_it(tmp_path):
    soundfile.write(tmp_path / "a.wav", syllables(3 * RATE), RATE)
    ffmpeg("-i", tmp_path / "a.wav", "-q:a", "4", tmp_path / "a.mp3")
    mp3, junk = (tmp_path / "a.mp3").read_bytes(), (noise(5000) * 256).astype(np.int8).tobytes()
    for name, content in (("front", junk + mp3), ("end", mp3 + 2 * junk), ("middle", mp3[:9000] + junk + mp3[9000:])):
        (tmp_path / f"{name}.mp3").write_bytes(content)
        assert abs(len(load_audio(tmp_path / f"{name}.mp3")) / RATE - 3) < 0.12, name


def test_a_sound_of_which_the_second_half_cannot_be_decoded_is_refused(tmp_path):
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
    assert abs(heard_at(tmp_path / "a.mkv") - 0.5) < 0.01


def test_the_track_marked_default_is_read(tmp_path):
    soundfile.write(tmp_path / "voice.wav", syllables(), RATE)
    hum = ("-f", "lavfi", "-i", "sine=700:d=2")
    marks = ("-map", "0", "-map", "1", "-disposition:a:0", "comment", "-disposition:a:1", "default")
    ffmpeg(*hum, "-i", tmp_path / "voice.wav", *marks, "-c:a", "flac", tmp_path / "two.mkv")
    assert abs(peak_hz(load_audio(tmp_path / "two.mkv")) - 120) < 5


def channels_of(voice, kind):
    dead = np.zeros_like(voice)
    return {
        "both": [voice, voice],
        "opposite": [voice, -voice],
        "right alone": [dead, voice],
        "centre of 5.1": [dead, dead, voice, dead, dead, dead],
        "last of 3": [dead, dead, voice],
        "last of 8": [dead] * 7 + [voice],
        "last of 12": [dead] * 11 + [voice],
        "hiss on the other": [voice, 0.001 * noise(len(voice))],
    }[kind]


@pytest.mark.parametrize("kind", ["both", "opposite", "right alone", "centre of 5.1", "last of 3", "last of 8",
                                  "last of 12", "hiss on the other"])
def test_a_voice_sounds_the_same_in_whichever_channels_it_is(tmp_path, kind):
    soundfile.write(tmp_path / "a.wav", np.stack(channels_of(syllables(), kind), 1), RATE, subtype="FLOAT")
    wav = load_audio(tmp_path / "a.wav", level=False)
    np.testing.assert_allclose(wav, syllables(), atol=0.002)


def test_a_voice_that_goes_from_one_channel_to_two_keeps_its_loudness():
    voice = syllables(4 * RATE)
    samples = np.stack([voice, np.where(np.arange(4 * RATE) < 2 * RATE, 0, voice)], 1)
    np.testing.assert_allclose(media.mix("x", samples)[: RATE], voice[: RATE], atol=1e-6)
    np.testing.assert_allclose(media.mix("x", samples)[3 * RATE :], voice[3 * RATE :], atol=1e-6)


def test_the_level_of_speech_is_one_and_silence_and_noise_stay(tmp_path):
    levels = []
    for gain in (2, 0.6, 0.02):
        soundfile.write(tmp_path / "a.wav", gain * syllables(), RATE, subtype="PCM_24")
        levels.append(load_audio(tmp_path / "a.wav").std())
    assert np.ptp(levels) < 0.01 * levels[0]
    for still in (np.zeros(RATE, np.float32), 0.001 * noise(RATE), 1e-5 * syllables(), noise(RATE)):
        np.testing.assert_array_equal(media.set_level(still), still)


def test_an_offset_is_taken_out_before_speech_is_made_louder():
    late = np.concatenate([np.zeros(3 * RATE, np.float32), 0.05 * syllables() + 0.4])
    wav = media.set_level(late)
    assert abs(wav).max() < 1 and abs(wav[3 * RATE :].mean()) < 0.01 and not wav[: 3 * RATE].any()


def test_speech_at_the_loudness_that_was_trained_on_stays_as_it_is():
    wav = syllables(4 * RATE)
    wav *= 10 ** (media.LOUDNESS / 20) / wav[abs(wav) > 0].std()
    gain = media.set_level(wav).std() / wav.std()
    assert abs(20 * np.log10(gain)) < 1


# ------------------------------------------------------------------------------------------------------------
# scripts


def run_script(tmp_path, body):
    script = tmp_path / "tool.py"
    script.write_text(f"import sys\nsys.path[:0] = {sys.path!r}\nfrom audio import InputError, run\n{body}\n")
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True)


def test_what_the_user_got_wrong_is_one_line_and_status_2(tmp_path):
    done = run_script(tmp_path, "def main():\n    raise InputError('a.wav: is\\nbad')\nrun(main)")
    assert (done.returncode, done.stderr, done.stdout) == (2, "tool.py: a.wav: is bad\n", "")


class Built(Exception):
    """In the place of parsing: the parser and its limits"""


def parsers(monkeypatch):
    """The parser of every script: (name, parser, limits, the words before an option)"""
    def stop(self, args=None, **limits):
        raise Built(self, limits)

    with monkeypatch.context() as patch:
        patch.setattr(media.Parser, "parse_args", stop)
        for name in ("data.main", "evaluate.parse", "keypoints.parse", "landmarks.main", "pcavs.parse_sample",
                     "pcavs.parse_evaluate", "pcavs.parse_train", "sample.parse", "syncnet.parse", "toyfaces.main",
                     "train.parse"):
            script, function = name.split(".")
            with pytest.raises(Built) as built:
                getattr(importlib.import_module(script), function)(*[[]] * (script == "pcavs"))
            parser, limits = built.value.args
            commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
            for word, sub in (commands[0].choices.items() if commands else [(None, parser)]):
                words = [word] if word else []
                for a in sub._actions:
                    value = str(next(iter(a.choices))) if a.choices else "1"
                    words += [a.option_strings[0], value] if a.required and a.option_strings else []
                    words += [value] if not a.option_strings and a.nargs in (None, "+") else []
                yield f"{name} {word or ''}", parser, limits, words, [a for a in sub._actions if a.type in (int, float)]


# 0 is fine for these
NOUGHT = "seed workers refine first_person clip w_ photo_share hyper_share taught thaw articulate augment".split()


def test_no_number_option_of_any_script_takes_an_absurd_value(monkeypatch, capsys):
    tried = set()
    for name, parser, limits, words, options in list(parsers(monkeypatch)):
        parser.parse_args(words, **limits)  # goes well, defaults and all
        for a in options:
            zero = [] if a.dest.startswith(tuple(NOUGHT)) and not name.startswith("data") else ["0"]
            for value in [*zero, "-7", "1" + 30 * "0", "nan", "-inf", "inf", "word"]:
                with pytest.raises((InputError, SystemExit)) as refused:
                    parser.parse_args([*words, f"{a.option_strings[0]}={value}"], **limits)
                    pytest.fail(f"{name} takes {a.option_strings[0]} {value}")
                line = capsys.readouterr().err if refused.type is SystemExit else f"{refused.value}\n"
                assert a.option_strings[0] in line and line.count("\n") == 1, (name, line)
                assert refused.type is InputError or refused.value.code == 2
            tried.add((name, a.dest))
    assert len(tried) > 100


NO_MEMORY = [MemoryError(), OSError(12, "Cannot allocate memory"), torch.OutOfMemoryError("CUDA out of memory"),
             RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_run_says_in_one_line_that_there_is_no_memory(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit, match="2"):
        media.run(main)
    out = capsys.readouterr().err
    assert "not enough memory" in out and out.count("\n") == 1


def test_run_cleans_up_on_sigterm_and_leaves_other_errors_alone(monkeypatch):
    import os
    import signal

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
