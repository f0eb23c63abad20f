"""PC-AVS: each network against a naive float64 restatement, the four files, the mel, the order of calls, lengths,
alignment, user errors and training."""

import argparse
import itertools
import json
import math
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.io.wavfile
import torch
import torch.nn.functional as F
from PIL import Image

import audio
import evaluate
import pcavs
import stylegan2
from audio import lws_mel, lws_windows
from checkpoint import load_checkpoint, save_checkpoint
from data import Pack, PackWriter
from media import InputError, load_audio, read_video, to_tensor, write_video
from pcavs import PCAVS, Config
from toyfaces import make_toy_clip

RATE = 16000
NAMES = {letter: name for letter, (name, _) in pcavs.PUBLISHED.items()}  # letter -> file
FORMATS = Path(__file__).resolve().parents[2] / "shared" / "formats"  # published key lists, optional
NARROW = Config(size=96, v_base=4, v_groups=2, v_blocks=(2, 1, 1, 2), e_width=16, e_depth=4, e_maps=5,
                a_filters=(8, 16, 24, 32), a_blocks=(1, 2, 1, 1), a_hidden=6, hidden=20, mouth=9, pose=3,
                channels=(12, 10, 8, 7, 6, 4))  # no two equal numbers, stems as published


def randomised(module, seed=0):
    """The module with random BatchNorm statistics, biases and zero-initialised weights, so that each of them matters"""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight")):
                value.uniform_(0.5, 1.5, generator=g)
            elif value.ndim <= 1 and value.is_floating_point():
                value.add_(0.2 * torch.randn(value.shape, generator=g))
    return module.eval()


@pytest.fixture(scope="module")
def narrow():
    torch.manual_seed(1)
    return randomised(PCAVS(NARROW))


def float64_weights(module):
    return {k: v.double() for k, v in module.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# the networks, against restatements in float64

def bn(w, name, x):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var, scale, bias = (w[f"{name}.{k}"].reshape(shape) for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * scale + bias


def conv(w, name, x, **k):
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **k)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]


def test_V_is_a_ResNeXt_with_its_last_map_projected_to_the_width_of_G(narrow):
    w, x = float64_weights(narrow.V), torch.randn(2, 3, 96, 96).double()
    y = F.max_pool2d(bn(w, "model.bn1", conv(w, "model.conv1", x, stride=2, padding=3)).relu(), 3, 2, 1)
    for layer, count in enumerate((2, 1, 1, 2), start=1):
        for i in range(count):
            n, stride = f"model.layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            z = bn(w, f"{n}.bn1", conv(w, f"{n}.conv1", y)).relu()
            halves = [F.conv2d(part, k, stride=stride, padding=1)                      # two groups, one by one
                      for part, k in zip(z.chunk(2, 1), w[f"{n}.conv2.weight"].chunk(2, 0))]
            z = bn(w, f"{n}.bn2", torch.cat(halves, 1)).relu()
            z = bn(w, f"{n}.bn3", conv(w, f"{n}.conv3", z))
            if f"{n}.downsample.0.weight" in w:
                y = bn(w, f"{n}.downsample.1", conv(w, f"{n}.downsample.0", y, stride=stride))
            y = (y + z).relu()
    vector, identity_map = narrow.V(x.float())
    assert vector.shape == (2, 128) and identity_map.shape == (2, 12, 3, 3)
    torch.testing.assert_close(vector.double(), y.mean((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(identity_map.double(), conv(w, "conv1x1", y), rtol=1e-4, atol=1e-4)


def fan_block(w, n, x):
    a = conv(w, f"{n}.conv1", bn(w, f"{n}.bn1", x).relu(), padding=1)
    b = conv(w, f"{n}.conv2", bn(w, f"{n}.bn2", a).relu(), padding=1)
    c = conv(w, f"{n}.conv3", bn(w, f"{n}.bn3", b).relu(), padding=1)
    if f"{n}.downsample.2.weight" in w:
        x = conv(w, f"{n}.downsample.2", bn(w, f"{n}.downsample.0", x).relu())
    return torch.cat([a, b, c], 1) + x


def bilinear(x, size):
    """Half-pixel bilinear interpolation, pixel by pixel"""
    n = x.shape[-1]
    position = ((np.arange(size) + 0.5) * n / size - 0.5).clip(0)
    lo = np.minimum(np.floor(position).astype(int), n - 1)
    hi, f = np.minimum(lo + 1, n - 1), torch.from_numpy(position - lo)
    x = x[..., lo] * (1 - f) + x[..., hi] * f
    return x[..., lo, :] * (1 - f)[:, None] + x[..., hi, :] * f[:, None]


def test_E_is_FAN_with_one_hourglass_whose_heat_maps_are_reduced_to_one(narrow):
    w, x = float64_weights(narrow.E), torch.randn(2, 3, 96, 96).double()
    y = fan_block(w, "model.conv2", bn(w, "model.bn1", conv(w, "model.conv1", x, stride=2, padding=3)).relu())
    y = fan_block(w, "model.conv4", fan_block(w, "model.conv3", F.max_pool2d(y, 2)))   # (2, 16, 24, 24)

    def hourglass(level, x):  # 24, 12, 6, 3, 1
        low = fan_block(w, f"model.m0.b2_{level}", F.max_pool2d(x, 2))
        low = hourglass(level - 1, low) if level > 1 else fan_block(w, "model.m0.b2_plus_1", low)
        return fan_block(w, f"model.m0.b1_{level}", x) + bilinear(fan_block(w, f"model.m0.b3_{level}", low), x.shape[-1])

    y = fan_block(w, "model.top_m_0", hourglass(4, y))
    y = conv(w, "model.l0", bn(w, "model.bn_end0", conv(w, "model.conv_last0", y)).relu())
    y = conv(w, "model.conv6", bn(w, "model.bn5", y).relu(), stride=2, padding=1)
    assert y.shape == (2, 1, 12, 12)
    feature = linear(w, "model.fc", y.reshape(2, 144).relu())
    torch.testing.assert_close(narrow.E.model(x.float()).double(), feature, rtol=1e-4, atol=1e-4)
    pose = linear(w, "to_headpose.2", linear(w, "to_headpose.0", feature).relu())
    pose = linear(w, "headpose_embed.1", pose.relu())
    torch.testing.assert_close(narrow.E(x.float()).double(), pose, rtol=1e-4, atol=1e-4)


def test_A_is_a_ResNet_with_squeeze_and_excitation_and_attention_over_time(narrow):
    w, x = float64_weights(narrow.A), torch.rand(3, 1, 80, 20).double()
    y = bn(w, "model.bn1", conv(w, "model.conv1", x, padding=1).relu())
    for layer, count in enumerate((1, 2, 1, 1), start=1):
        for i in range(count):
            n, stride = f"model.layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            z = bn(w, f"{n}.bn1", conv(w, f"{n}.conv1", y, stride=stride, padding=1).relu())
            z = bn(w, f"{n}.bn2", conv(w, f"{n}.conv2", z, padding=1))
            gate = linear(w, f"{n}.se.fc.2", linear(w, f"{n}.se.fc.0", z.mean((2, 3))).relu())
            z = z / (1 + (-gate).exp())[:, :, None, None]
            if f"{n}.downsample.0.weight" in w:
                y = bn(w, f"{n}.downsample.1", conv(w, f"{n}.downsample.0", y, stride=stride))
            y = (y + z).relu()
    assert y.shape == (3, 32, 10, 3)
    y = y.reshape(3, 320, 3)
    weights = torch.einsum("oi,nit->not", w["model.attention.0.weight"][..., 0], y) + w["model.attention.0.bias"][:, None]
    weights = bn(w, "model.attention.2", weights.relu())
    weights = torch.einsum("oi,nit->not", w["model.attention.3.weight"][..., 0], weights)
    weights = (weights + w["model.attention.3.bias"][:, None]).exp()
    y = (y * weights / weights.sum(2, keepdim=True)).sum(2)
    torch.testing.assert_close(narrow.A(x.float()).double(), linear(w, "model.fc", y), rtol=1e-4, atol=1e-4)


def blurred(x, before, after, gain):
    """[1, 3, 3, 1] along both axes, each sum written out"""
    k = torch.tensor([1, 3, 3, 1]).double() / 8 * math.sqrt(gain)
    x = F.pad(x, (before, after, before, after))
    n = x.shape[-1] - 3
    x = sum(k[i] * x[..., i:i + n] for i in range(4))
    return sum(k[i] * x[..., i:i + n, :] for i in range(4))


def with_zeros(x):
    """A zero after every pixel, along both axes"""
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    y[..., ::2, ::2] = x
    return y


def modulated(w, n, x, style, up=False, demodulate=True):
    """rosinality's order: one set of weights a sample; the upsampling as zeros and a full convolution"""
    weight, D = w[f"{n}.weight"][0], style.shape[1]
    s = style @ w[f"{n}.modulation.weight"].t() / math.sqrt(D) + w[f"{n}.modulation.bias"]
    rows = []
    for i in range(len(x)):
        k = weight * s[i][None, :, None, None] / math.sqrt(weight[0].numel())
        if demodulate:
            k = k / (k.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:  # transposed convolution: the kernel turned round, run over the zeros
            rows.append(blurred(F.conv2d(with_zeros(x[i:i + 1]), k.flip(2, 3), padding=2)[..., :-1, :-1], 1, 1, 4))
        else:
            rows.append(F.conv2d(x[i:i + 1], k, padding=k.shape[-1] // 2))
    return torch.cat(rows)


def test_G_is_rosinalitys_generator_from_the_identity_map_up_with_one_style_for_all_layers(narrow):
    w = float64_weights(narrow.G)
    style, x = torch.randn(2, narrow.G.dim).double(), torch.randn(2, 12, 3, 3).double()
    noise = narrow.G.draw_noise(torch.Generator().manual_seed(3))
    assert [m.shape[-1] for m in noise] == [3, 6, 6, 12, 12, 24, 24, 48, 48, 96, 96]

    def styled(n, x, up, m):
        y = modulated(w, f"{n}.conv", x, style, up) + w[f"{n}.noise.weight"] * m.double()
        return F.leaky_relu(y + w[f"{n}.activate.bias"][:, None, None], 0.2) * math.sqrt(2)

    y = styled("conv1", x, False, noise[0])
    rgb = modulated(w, "to_rgb1.conv", y, style, demodulate=False) + w["to_rgb1.bias"]
    for i in range(5):
        y = styled(f"convs.{2 * i}", y, True, noise[2 * i + 1])
        y = styled(f"convs.{2 * i + 1}", y, False, noise[2 * i + 2])
        part = modulated(w, f"to_rgbs.{i}.conv", y, style, demodulate=False) + w[f"to_rgbs.{i}.bias"]
        rgb = blurred(with_zeros(rgb), 2, 1, 4) + part
    assert rgb.shape == (2, 3, 96, 96)
    with torch.no_grad():
        ours = narrow.G(style.float(), x.float(), noise)
    torch.testing.assert_close(ours.double(), rgb.tanh(), rtol=1e-3, atol=1e-4)


def test_the_style_is_identity_vector_mouth_code_and_pose_code_in_this_order(narrow, monkeypatch):
    monkeypatch.setattr(narrow.G, "forward", lambda style, identity_map, noise: style)
    vector, speech, pose = torch.randn(1, 128), torch.randn(5, 20), torch.randn(5, 3)
    with torch.no_grad():
        style = narrow.decode((vector, torch.randn(1, 12, 3, 3)), speech, pose)
    w = float64_weights(narrow.E)
    mouth = linear(w, "mouth_embed.1", speech.double().relu())
    expected = torch.cat([vector.expand(5, -1).double(), mouth, pose.double()], 1)
    torch.testing.assert_close(style.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_published_shapes():
    with torch.device("meta"):
        model = PCAVS(Config())
    shapes = {k: {n: tuple(v.shape) for n, v in getattr(model, k).state_dict().items()} for k in "GVEA"}
    assert (model.G.dim, model.G.start) == (2560, 7)
    assert shapes["V"]["model.layer1.0.conv2.weight"] == (128, 4, 3, 3)
    assert shapes["V"]["model.layer4.2.conv3.weight"] == (2048, 1024, 1, 1)
    assert shapes["V"]["conv1x1.weight"] == (512, 2048, 1, 1)
    assert shapes["E"]["model.fc.weight"] == (512, 784) and shapes["E"]["model.l0.weight"] == (68, 256, 1, 1)
    assert shapes["E"]["mouth_embed.1.weight"] == (500, 512) and shapes["E"]["headpose_embed.1.weight"] == (12, 512)
    assert shapes["A"]["model.attention.3.weight"] == (2560, 128, 1) and shapes["A"]["model.fc.weight"] == (512, 2560)
    assert shapes["G"]["convs.9.conv.modulation.weight"] == (128, 2560)
    assert shapes["G"]["convs.8.conv.weight"] == (1, 128, 256, 3, 3)
    assert [len(shapes[k]) for k in "GVEA"] == [89, 320, 355, 292]


@pytest.mark.skipif(not FORMATS.is_dir(), reason="the published key lists are not at hand")
@pytest.mark.parametrize("letter", "GVEA")
def test_every_published_key_is_ours_or_unused(letter):
    lines = (FORMATS / f"pcavs_{NAMES[letter][11:-4]}.txt").read_text().splitlines()[1:]
    listed = {key: tuple(map(int, shape.split("x"))) if shape != "scalar" else ()
              for key, shape, _ in (line.split() for line in lines)}
    with torch.device("meta"):
        ours = {k: tuple(v.shape) for k, v in getattr(PCAVS(Config()), letter).state_dict().items()}
    unused = {k for k in listed if k.startswith(pcavs.PUBLISHED[letter][1])}
    used = {k: (v[1],) if k.endswith("activate.bias") else v for k, v in listed.items() if k not in unused}
    assert unused and used == ours


# ---------------------------------------------------------------------------------------------------------------------
# the four files

def published_state(net, letter):
    """As saved by the authors: biases (1, C, 1, 1), and weights that inference does not use"""
    state = {k: v.reshape(1, -1, 1, 1).clone() if k.endswith("activate.bias") else v.clone()
             for k, v in net.state_dict().items()}
    return state | {prefix + "weight": torch.zeros(7, 3) for prefix in pcavs.PUBLISHED[letter][1]}


@pytest.fixture(scope="module")
def saved(narrow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for letter, name in NAMES.items():
        torch.save(published_state(getattr(narrow, letter), letter), folder / name)
    return folder


@pytest.fixture
def four(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "four")


def test_four_published_files_load_without_their_unused_weights(narrow, four):
    model = pcavs.load_published(four, NARROW)
    for letter in "GVEA":
        net, ours = getattr(model, letter), getattr(narrow, letter).state_dict()
        loaded = net.state_dict()
        assert loaded.keys() == ours.keys()
        assert all(torch.equal(loaded[k], ours[k]) for k in ours)
        assert not any(p.requires_grad for p in net.parameters()) and not net.training


def damage(folder, name, how):
    path = folder / name
    state = torch.load(path, weights_only=True)
    key = next(k for k in state if k.endswith("weight") and not k.startswith(("style.", "input.", "noises.")))
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif how == "a web page":
        path.write_text("<!DOCTYPE html>")
    elif how == "holds code":
        torch.save(dict(state, x=argparse.Namespace()), path)
    elif how == "one key short":
        torch.save({k: v for k, v in state.items() if k != key}, path)
    elif how == "one key more":
        torch.save(state | {"surprise.weight": torch.zeros(2)}, path)
    elif how == "another shape":
        torch.save(state | {key: state[key][..., :-1]}, path)


DAMAGES = ("missing", "empty", "truncated", "a web page", "holds code", "one key short", "one key more", "another shape")


@pytest.mark.parametrize("how, name", [*zip(DAMAGES, [*NAMES.values()] * 2)])
def test_a_wrong_or_missing_file_is_one_line_that_names_it(four, how, name):
    damage(four, name, how)
    with pytest.raises(InputError) as caught:
        pcavs.load_published(four, NARROW)
    line = str(caught.value)
    assert name in line and "\n" not in line
    assert not any(other in line for other in NAMES.values() if other != name)


def test_a_file_under_the_name_of_another_network_is_refused(four):
    os.replace(four / "latest_net_E.pth", four / "latest_net_V.pth")
    torch.save(published_state(PCAVS(NARROW).E, "E"), four / "latest_net_E.pth")
    with pytest.raises(InputError, match="latest_net_V.pth: not the weights of IdentityEncoder"):
        pcavs.load_published(four, NARROW)


# ---------------------------------------------------------------------------------------------------------------------
# sound

def noise(n, seed=4):
    return (np.random.default_rng(seed).normal(size=n) * 2500).astype(np.int16)


def test_the_mel_agrees_with_a_naive_restatement():
    import librosa
    wav = (noise(2005) / 32768 * np.hanning(2005)).astype(np.float32)
    mel = lws_mel(wav)
    assert mel.shape == (13 + 7, 80) and mel.dtype == np.float32
    x = wav.astype(np.float64) / np.sqrt(np.mean(wav.astype(np.float64) ** 2)) * 0.1
    x = np.concatenate([np.zeros(1120), x, np.zeros(3000)])
    k = np.arange(1280)
    w = np.sqrt((1 - np.cos(2 * np.pi * (2 * k + 1) / 2560)) / 2)
    s = w / np.array([sum(w[j] ** 2 for j in range(i % 160, 1280, 160)) for i in k])
    bank = librosa.filters.mel(sr=16000, n_fft=1280, n_mels=80, fmin=125, fmax=7600)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(641), k) / 1280)
    for step in (0, 7, 12, 19):
        spectrum = fourier @ (x[160 * step:160 * step + 1280] * np.sqrt(w * s))
        level = 20 * np.log10(np.maximum(1e-5, bank @ np.abs(spectrum))) - 20
        np.testing.assert_allclose(mel[step], np.clip((level + 100) / 100, 0, 1), atol=2e-5)


def test_the_squares_of_the_window_add_up_to_one():
    np.testing.assert_allclose(np.square(audio.lws_hann()).reshape(8, 160).sum(0), 1)


def test_the_mel_does_not_depend_on_loudness_and_silence_is_zero(monkeypatch):
    wav = (noise(5000) / 32768).astype(np.float32)
    whole = lws_mel(wav)
    np.testing.assert_allclose(lws_mel(wav / 7), whole, atol=1e-5)
    assert not lws_mel(np.zeros(3000, np.float32)).any()
    monkeypatch.setattr(audio, "BLOCK", 9)
    np.testing.assert_allclose(lws_mel(wav), whole, atol=1e-6)


def test_the_window_of_a_frame_has_twenty_steps_from_two_frames_before_it_and_silence_outside():
    mel = np.arange(1, 27 * 80 + 1, dtype=np.float32).reshape(27, 80)
    windows = lws_windows(mel, [0, 3, 6])
    assert windows.shape == (3, 1, 80, 20)
    np.testing.assert_array_equal(windows[1, 0], mel[4:24].T)
    assert not windows[0, 0, :, :8].any()
    np.testing.assert_array_equal(windows[0, 0, :, 8:], mel[:12].T)
    np.testing.assert_array_equal(windows[2, 0, :, :11], mel[16:].T)
    assert not windows[2, 0, :, 11:].any()


def test_a_click_is_in_the_middle_of_the_window_of_its_frame():
    """Not two frames off, as if the first image were that of the third frame"""
    for k in (0, 1, 7, 24):
        wav = np.zeros(16000, np.float32)
        wav[640 * k + 320] = 1
        windows = lws_windows(lws_mel(wav), range(25))[:, 0].astype(np.float64).mean(1)      # (25, 20)
        loud = windows - windows.min()
        off = [abs((row * np.arange(20)).sum() / row.sum() - 9.5) if row.sum() else 99 for row in loud]
        whole = [i for i in range(25) if loud[i].sum() > 0.9 * loud.sum(1).max()]  # windows with all of the click
        assert k in whole and abs(np.mean(whole) - k) <= 1.5
        assert k in (0, 24) or off[k] < 6


# ---------------------------------------------------------------------------------------------------------------------
# the order of calls

def count_images(model, monkeypatch):
    """-> {network: number of images of each call}, filled by calls of the model"""
    calls = {k: [] for k in "VEAG"}

    def counting(forward, sizes):
        def count(x, *arguments):
            sizes.append(len(x))
            return forward(x, *arguments)
        return count

    for k in calls:
        monkeypatch.setattr(getattr(model, k), "forward", counting(getattr(model, k).forward, calls[k]))
    return calls


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(2)
    return randomised(PCAVS(Config.at(16)))


def test_V_runs_once_E_once_a_pose_frame_A_and_G_once_a_frame(tiny, monkeypatch):
    calls = count_images(tiny, monkeypatch)
    photo, pose = torch.randn(3, 16, 16), torch.randn(4, 3, 16, 16)
    mel = lws_mel(np.random.default_rng(0).normal(size=9000).astype(np.float32) / 9)
    frames = torch.cat(list(tiny.animate(photo, mel, 14, pose, batch=5)))
    assert frames.shape == (14, 3, 16, 16)
    assert calls == dict(V=[1], E=[4], A=[5, 5, 4], G=[5, 5, 4])


def test_pose_codes_repeat_backwards_and_forwards_at_any_batch_size(tiny):
    photo, pose = torch.randn(3, 16, 16), torch.randn(4, 3, 16, 16)
    mel = lws_mel(np.random.default_rng(0).normal(size=9000).astype(np.float32) / 9)
    frames = torch.cat(list(tiny.animate(photo, mel, 14, pose, batch=5)))
    pose_frames = pose[[0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]]
    with torch.no_grad():
        speech = tiny.A(torch.from_numpy(lws_windows(mel, range(14))))
        identity = tiny.V(photo[None])
        one_by_one = torch.cat([tiny.decode(identity, speech[i:i + 1], tiny.E(pose_frames[i:i + 1]), "off")
                                for i in range(14)])
    torch.testing.assert_close(frames, one_by_one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(list(tiny.animate(photo, mel, 14, pose, batch=1))), frames, rtol=1e-4, atol=1e-5)
    own = torch.cat(list(tiny.animate(photo, mel, 3, [photo])))                 # the photo's pose
    assert not torch.allclose(own, frames[:3], atol=1e-4)


def test_the_mouth_does_not_change_the_pose_code_of_our_networks(tiny, narrow):
    frames = torch.randn(2, 3, 16, 16)
    changed = frames.clone()
    changed[:, :, 11, 6:10] += 3
    assert torch.equal(tiny.E(frames), tiny.E(changed))
    frames = torch.randn(1, 3, 96, 96)
    assert torch.equal(narrow.E.pose_input(frames), frames)                     # the published E has no mask


# ---------------------------------------------------------------------------------------------------------------------
# alignment

def test_eyes_and_mouth_are_moved_to_their_positions_at_any_scale_and_rotation():
    for size in (224, 96):
        for turn, scale, shift in ((0.3, 0.9, 300 + 210j), (-0.2, 0.35, 150 + 130j)):
            points = (pcavs.PCAVS_POINTS - 112 - 90j) * scale * np.exp(1j * turn) + shift
            image = np.zeros((420, 600, 3), np.uint8)
            yy, xx = np.mgrid[:420, :600] + 0.5
            for channel, p in enumerate(points):
                image[..., channel] = 255 * np.exp(-((xx - p.real) ** 2 + (yy - p.imag) ** 2) / (2 * (4 * scale) ** 2))
            out = next(pcavs.align_frames([image], points[None] / 420, size)).astype(float)
            rows, cols = np.mgrid[:size, :size] + 0.5
            for channel, p in enumerate(pcavs.PCAVS_POINTS):
                mass = out[..., channel] / out[..., channel].sum()
                expected = (p - 16) * size / 192
                assert abs((cols * mass).sum() - expected.real) < 0.6 and abs((rows * mass).sum() - expected.imag) < 0.6


def test_an_aligned_image_is_cropped_as_by_the_authors(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "0.png")
    cut, = pcavs.crop_clip(tmp_path, 9, Config(size=192))
    np.testing.assert_array_equal(cut, image[:192, 16:208])
    args = types.SimpleNamespace(aligned=True)                                  # noise, in which no face could be found
    np.testing.assert_array_equal(pcavs.crop_photo(image, args, Config(size=192)), cut)


BASE = np.array([60 + 40j, 100 + 40j, 80 + 90j])  # eyes and mouth


def landmarks_at(points):
    """68 landmarks whose eyes and inner lips lie at three points, complex (3,), or NaN for None"""
    if points is None:
        return np.full((68, 2), np.nan)
    z = np.repeat(points, (42, 6, 20))
    return np.stack([z.real, z.imag], 1)


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """A grey clip of seven frames, and the points at which its landmarks are tracked from the second frame on"""
    write_video(tmp_path / "clip.mp4", itertools.repeat(np.full((120, 160, 3), 90, np.uint8), 7), 7)
    positions = [BASE, None, BASE + 10, BASE + 15 + 5j, BASE + 20, BASE + 20]
    monkeypatch.setattr(pcavs, "track_scene", lambda net, frames, number: (
        np.stack([landmarks_at(p) for p, _ in zip([None, *positions], frames)])))  # no face in the first frame
    return tmp_path / "clip.mp4", positions


def test_points_are_interpolated_in_frames_without_a_face(tracked, monkeypatch):
    clip, positions = tracked
    assert len(list(pcavs.align_clip(clip, 4, 32))) == 4
    monkeypatch.setattr(pcavs, "align_frames", lambda frames, points, *_: points)
    points = 120 * pcavs.align_clip(clip, 99, 32)
    shift = np.array([0, 0, 5, 10, 15 + 5j, 20, 20])
    np.testing.assert_allclose(points, BASE + shift[:, None], atol=1e-9)


def test_a_clip_with_few_or_no_faces_is_refused(tracked, monkeypatch):
    clip, positions = tracked
    positions[:] = [BASE, BASE, None, None, None, None]
    with pytest.raises(InputError, match="a face in 2 of 7 frames"):
        pcavs.align_clip(clip, 99, 32)
    positions[:] = [None] * 6
    with pytest.raises(InputError, match="clip.mp4: no upright face"):
        pcavs.align_clip(clip, 99, 32)


def test_align_writes_crops_that_are_not_aligned_a_second_time(tracked, capsys):
    clip, positions = tracked
    positions[:] = [BASE] * 6
    image = np.random.default_rng(0).integers(0, 256, (15, 20, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    (clip.parent / "frames").mkdir()
    for i in range(4):
        Image.fromarray(image).save(clip.parent / "frames" / f"{i:03d}.png")
    pcavs.main(["align", str(clip.parent / "frames")])
    out = clip.parent / "frames_cropped"
    assert f"{out}: 4 aligned images" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [f"{i:06d}.jpg" for i in range(4)]
    boxes = pcavs.PCAVS_FILE, pcavs.PCAVS_INPUT
    whole, cut = (next(pcavs.align_frames([image], BASE[None] / 120, 224, box)) for box in boxes)
    written = np.asarray(Image.open(out / "000002.jpg")).astype(int)
    assert written.shape == (224, 224, 3) and abs(written - whole).mean() < 8
    crops = list(pcavs.crop_clip(out, 9, Config()))                            # a folder is aligned
    assert len(crops) == 4 and abs(crops[2].astype(int) - cut).mean() < 12
    with pytest.raises(InputError, match="frames_cropped: exists; give --overwrite"):
        pcavs.main(["align", str(clip.parent / "frames")])
    (clip.parent / "frames/003.png").unlink()                                   # now a shorter clip
    pcavs.main(["align", str(clip.parent / "frames"), "--overwrite"])
    assert len(list(out.iterdir())) == 3


@pytest.mark.parametrize("clips, reason", [
    (["a.mp4", "b/a.mkv", "a.mkv"], "same folder and name"), (["my clip.mp4", "--csv", "p.csv"], "no spaces")])
def test_align_refuses_clips_that_share_a_folder_and_names_that_a_file_of_pairs_cannot_hold(clips, reason):
    with pytest.raises(InputError, match=reason):
        pcavs.main(["align", *clips])


def test_align_writes_a_file_of_pairs_in_which_each_video_drives_itself(tracked, capsys):
    clip, positions = tracked
    positions[:] = [BASE] * 6
    csv, out = clip.parent / "pairs.csv", clip.parent / "clip_cropped"
    pcavs.main(["align", str(clip), "--csv", str(csv)])
    assert pcavs.read_pairs(csv) == [[out, out, clip, out]]
    with pytest.raises(InputError, match="pairs.csv: exists"):                  # before the images are written again
        pcavs.main(["align", str(clip), "--csv", str(csv)])


# ---------------------------------------------------------------------------------------------------------------------
# the command

@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    save_checkpoint(path, dict(kind="pcavs", format=1, config=vars(tiny.config), args={},
                               networks=dict(model={k: v.half() if v.is_floating_point() else v
                                                    for k, v in tiny.state_dict().items()})))
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A drawn face, 0.84 s of noise, and a pose clip of 7 frames"""
    path = tmp_path_factory.mktemp("media")
    frames, wav, _ = make_toy_clip(3, 0.28, 64)
    Image.fromarray(frames[0]).save(path / "face.png")
    scipy.io.wavfile.write(path / "speech.wav", RATE, noise(13440))
    write_video(path / "pose.mp4", iter(frames), 7, wav)
    return path


@pytest.fixture
def folder(media, tmp_path, monkeypatch):
    """The working directory, with these files"""
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_sample(weights, *options, face="face.png", speech="speech.wav"):
    pcavs.main(["sample", str(face), str(speech), "--weights", str(weights), "--device", "cpu", *map(str, options)])


def frames_of(path):
    return np.stack(list(read_video(path)))


@pytest.mark.parametrize("n, frames", [(1, 1), (20800, 33), (20799, 32)])
def test_there_are_25_frames_a_second_of_speech(folder, weights, n, frames):
    scipy.io.wavfile.write("speech.wav", RATE, noise(n))
    run_sample(weights, "--pose", "pose.mp4", *["--bf16"] * (n == 1))
    assert frames_of("talk.mp4").shape == (frames, 16, 16, 3)
    assert abs(len(load_audio("talk.mp4")) - n) < 1100  # AAC works in blocks of 1024


def test_the_grid_shows_photo_pose_and_result_and_the_pose_repeats_backwards(folder, weights, capsys):
    run_sample(weights, "--pose", "pose.mp4", "--grid", "--out", "grid.mp4")
    run_sample(weights, "--pose", "pose.mp4", "--out", "alone.mp4")
    assert "21 frames" in capsys.readouterr().out.splitlines()[-1]
    grid, alone = frames_of("grid.mp4").astype(int), frames_of("alone.mp4").astype(int)
    assert grid.shape == (21, 16, 48, 3)
    photo = np.array(Image.open("face.png").resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    assert abs(grid[9, :, :16] - photo).mean() < 12                             # H.264's colours
    assert abs(grid[:, :, 32:] - alone).mean() < 12
    clip = frames_of("pose.mp4")
    for k, source in ((0, 0), (6, 6), (8, 4), (12, 0), (15, 3)):
        small = np.array(Image.fromarray(clip[source]).resize((16, 16), Image.Resampling.LANCZOS))
        assert abs(grid[k, :, 16:32] - small).mean() < 12


def test_the_same_seed_gives_the_same_frames_and_noise_is_constant_in_a_clip(tiny, narrow):
    args = argparse.Namespace(seed=5, bf16=False, weights="weights.pt")
    crop, wav = np.full((96, 96, 3), 100, np.uint8), (noise(1300) / 32768).astype(np.float32)
    a, b = (np.stack(list(pcavs.render(narrow, crop, wav, [crop], args, torch.device("cpu")))) for _ in "ab")
    args.seed = 6
    c = np.stack(list(pcavs.render(narrow, crop, wav, [crop], args, torch.device("cpu"))))
    assert a.shape == (2, 96, 96, 3) and np.array_equal(a, b) and not np.array_equal(a, c)
    assert abs(a[0].astype(int) - a[1]).mean() < abs(a.astype(int) - c).mean()


BAD = [  # (prepared file, arguments, part of the message)
    ("", ["sample", "nobody.png", "speech.wav"], "nobody.png: no such file"),
    ("", ["sample", "face.png", "nothing.wav"], "nothing.wav: no such file"),
    ("", ["sample", "face.png", "speech.wav", "--pose", "speech.wav"], "speech.wav: has no picture"),
    ("", ["sample", "face.png", "speech.wav", "--pose", "gone.mp4"], "gone.mp4: no such file"),
    ("cut", ["sample", "face.png", "speech.wav", "--pose", "cut.mp4"], "cut.mp4"),
    ("taken", ["sample", "face.png", "speech.wav"], "talk.mp4: exists; give --overwrite"),
    ("", ["sample", "face.png", "speech.wav", "--out", "talk.txt"], "must end in .mp4"),
    ("", ["sample", "face.png", "speech.wav", "--box", "5,5,500,500"], "--box 5,5,500,500: not a box inside"),
    ("", ["sample", "face.png", "speech.wav", "--weights", "."], "latest_net_G.pth: no such file"),
    ("", ["sample", "face.png", "speech.wav", "--weights", "none.pt"], "none.pt: no such file"),
    ("text", ["sample", "face.png", "speech.wav", "--weights", "text"], "text: damaged, cut short"),
    ("another kind", ["sample", "face.png", "speech.wav", "--weights", "other.pt"], "is a 'weights' checkpoint"),
    ("", ["sample", "face.png", "speech.wav", "--device", "toaster"], "--device toaster"),
    ("text", ["pairs", "text.csv"], "line 1 has 3 fields, expected 8"),
    ("text", ["pairs", "text.csv", "pose.mp4"], "pose.mp4: a file of pairs, text.csv, has to stand alone"),
]


@pytest.mark.parametrize("file, arguments, message", BAD)
def test_bad_input_is_one_line_and_exit_status_2(folder, weights, monkeypatch, refused, file, arguments, message):
    for name in ("text", "text.csv"):
        Path(name).write_text("this is nothing\n")
    if file == "cut":
        Path("cut.mp4").write_bytes(Path("pose.mp4").read_bytes()[:700])
    if file == "taken":
        Path("talk.mp4").touch()
    if file == "another kind":
        save_checkpoint("other.pt", dict(kind="weights", format=1))
    if "--weights" not in arguments:
        arguments = [*arguments, "--weights", str(weights)]
    monkeypatch.setattr(PCAVS, "animate", None)  # nothing is generated
    assert message in refused(pcavs.main, *arguments)


def test_networks_that_return_nan_give_one_line_and_no_file(folder, weights):
    checkpoint = load_checkpoint(weights, "pcavs")
    checkpoint["networks"]["model"]["G.to_rgb1.bias"].fill_(float("nan"))
    save_checkpoint("nan.pt", checkpoint)
    with pytest.raises(InputError, match="nan.pt: the networks fail"):
        run_sample("nan.pt")
    assert not Path("talk.mp4").exists()


# ---------------------------------------------------------------------------------------------------------------------
# measuring

def test_a_toy_network_prints_one_line_about_a_photo_that_is_no_drawing(folder, weights, capsys):
    run_sample(weights)
    assert "toy world only" not in capsys.readouterr().out
    image = np.asarray(Image.open("face.png"))[::-1]
    Image.fromarray(255 - image).save("other.png")
    run_sample(weights, "--overwrite", face="other.png")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "these weights draw the toy world only; other.png" in line] == lines[:1]


def test_a_clip_is_generated_from_itself_and_measured(folder, weights, capsys):
    pcavs.main(["pairs", "pose.mp4", "--weights", str(weights), "--out", "eval", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "1 clips, 1 with real frames" in out
    real, fake = frames_of("eval/real/001_pose.mp4"), frames_of("eval/fake/001_pose.mp4")
    assert real.shape == fake.shape == (7, 16, 16, 3)
    clip = np.stack([Image.fromarray(f).resize((16, 16), Image.Resampling.LANCZOS) for f in frames_of("pose.mp4")])
    assert abs(real.astype(int) - clip).mean() < 12
    args = evaluate.parse(out.splitlines()[-1].split()[2:])
    assert (args.command, args.real) == ("pair", str(folder / "eval" / "real")) and args.fake.endswith("eval/fake")


def test_the_authors_file_of_pairs(folder, weights, capsys):
    for name in ("id", "poses", "mouths"):
        Path(name).mkdir()
    for i, frame in enumerate(frames_of("pose.mp4")):
        Image.fromarray(frame).save(f"poses/{i:06d}.jpg")
        Image.fromarray(frame).save(f"mouths/{i:06d}.png")
    os.rename("face.png", "id/000000.png")
    Path("demo.csv").write_text("id 1 poses 7 speech.wav mouths 7 dummy\n"
                                "id/000000.png 1 None 1 speech.wav None 1 dummy\n\n")
    first, second = pcavs.read_pairs(Path("demo.csv"))
    assert first == [Path("id"), Path("poses"), Path("speech.wav"), Path("mouths")]
    assert second == [Path("id/000000.png"), None, Path("speech.wav"), None]
    pcavs.main(["pairs", "demo.csv", "--weights", str(weights), "--out", "eval", "--device", "cpu"])
    assert "2 clips, 1 with real frames" in capsys.readouterr().out
    assert sorted(p.name for p in Path("eval/fake").iterdir()) == ["001_speech.mp4", "002_speech.mp4"]
    assert [p.name for p in Path("eval/real").iterdir()] == ["001_speech.mp4"]


@pytest.mark.parametrize("line, message", [
    ("face.png 1 pse.mp4 7 speech.wav None 7 dummy", "line 1: pse.mp4: no such file or folder"),
    ("face.png 1 None 7 speech.wav mouth 7 dummy", "line 1: mouth: no such file or folder"),
    ("None 1 pose.mp4 7 speech.wav None 7 dummy", "line 1: None: no such file or folder"),
])
def test_a_missing_file_in_a_line_of_pairs_is_refused(folder, line, message):
    Path("demo.csv").write_text(line)
    with pytest.raises(InputError, match=message):
        pcavs.read_pairs(Path("demo.csv"))


def test_clips_of_another_run_in_the_folder_are_refused(folder, weights):
    command = ["pairs", "--weights", str(weights), "--out", "eval", "--device", "cpu"]
    for name in "ab":
        Path(name).mkdir()
        os.symlink(folder / "pose.mp4", f"{name}/00001.mp4")
    pcavs.main([*command, "a/00001.mp4", "b/00001.mp4"])                        # two of one name
    assert {str(path) for path in Path("eval").rglob("*.mp4")} == {f"eval/{k}/00{n}_00001.mp4" for k in ("real", "fake")
                                                                  for n in (1, 2)}
    with pytest.raises(InputError, match="00001.mp4: is of another run and would be measured"):
        pcavs.main([*command, "pose.mp4", "--overwrite"])
    with pytest.raises(InputError, match="001_00001.mp4: exists; give --overwrite"):
        pcavs.main([*command, "a/00001.mp4", "b/00001.mp4"])


# ---------------------------------------------------------------------------------------------------------------------
# losses

def test_the_contrast_is_ln_n_at_chance_and_its_gradient_reaches_the_second_argument_only():
    a, b = torch.ones(6, 5).requires_grad_(), torch.ones(6, 5).requires_grad_()
    assert float(pcavs.contrastive_loss(a, b).detach()) == pytest.approx(math.log(6), abs=1e-4)
    a, b = torch.eye(4, 5) * 3, torch.eye(4, 5) + 0.3 * torch.roll(torch.eye(4, 5), 1, 1)
    d = [[np.linalg.norm(p / np.linalg.norm(p) - q / np.linalg.norm(q)) for q in b.numpy()] for p in a.numpy()]
    expected = np.mean([-np.log(np.exp(1 / d[i][i]) / np.exp(1 / np.array(d[i])).sum()) for i in range(4)])
    a.requires_grad_()
    b.requires_grad_()
    loss = pcavs.contrastive_loss(a, b)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert a.grad is None and b.grad.abs().sum() > 0


def test_the_pose_augmentation_changes_colours_and_size_and_rotates_nothing():
    torch.manual_seed(0)
    frames = torch.zeros(40, 3, 32, 32)
    frames[:, :, 16] = 1                                                        # a level line
    out = pcavs.pose_augment(frames)
    assert out.shape == frames.shape and float((out.mean((2, 3)) - frames.mean((2, 3))).abs().mean()) > 0.1
    assert float((out - out[..., :1]).abs().max()) < 1e-4                       # still level


# ---------------------------------------------------------------------------------------------------------------------
# training

@pytest.fixture(scope="module")
def narrow_discriminator():
    """An eighth of the channels; its own tests are in test_stylegan2.py"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pcavs, "Discriminator", lambda size, base: stylegan2.Discriminator(size, base // 8))
        yield


def run_train(pack, out, *options, steps=4):
    pcavs.main(["train", "--data", str(pack), "--out", str(out), "--size", "16", "--batch", "12", "--steps", str(steps),
                "--device", "cpu", *options])


def test_every_tenth_clip_is_held_out_from_networks_teacher_and_samples(tmp_path, monkeypatch):
    frames, wav, _ = make_toy_clip(3, 0.28, 16)
    with PackWriter(tmp_path / "pack", 16, "toy") as writer:
        for i in range(20):
            writer.add(frames, wav, f"p{i % 3}", str(i))
    used = dict(networks=set(), samples=set(), teacher=set())
    item, fit = pcavs.ClipFrames.__getitem__, pcavs.fit_pose_teacher

    def recording_item(self, n):
        used["networks" if self.flip else "samples"].update(np.asarray(self.clips).tolist())
        return item(self, n)

    def recording_fit(teacher, pack, clips):
        used["teacher"].update(clips.tolist())
        fit(teacher, pack, clips)

    monkeypatch.setattr(pcavs.ClipFrames, "__getitem__", recording_item)
    monkeypatch.setattr(pcavs, "fit_pose_teacher", recording_fit)
    run_train(tmp_path / "pack", tmp_path / "out", steps=1)
    training = {*range(20)} - {9, 19}
    assert used == dict(networks=training, teacher=training, samples={9, 19})


def test_lists_of_clips_need_a_pack(tmp_path, monkeypatch):
    monkeypatch.setattr(pcavs, "open_toy_pack", lambda *_: types.SimpleNamespace(size=32))
    monkeypatch.setattr(pcavs, "ClipFrames", None)  # nothing is trained
    with pytest.raises(InputError, match="--test lists clips of --data"):
        pcavs.main(["train", "--out", str(tmp_path / "out"), "--test", "list"])


def test_an_item_has_different_frames_of_one_clip_with_their_sound(pack):
    pack = Pack(pack)
    data = pcavs.ClipFrames(pack, 4, 7, range(5), flip=False)
    for n in range(6):
        item, again = data[n], pcavs.ClipFrames(pack, 4, 7, range(5), flip=False)[n]
        assert all(torch.equal(torch.as_tensor(item[k]), torch.as_tensor(again[k])) for k in item)
        c = item["person"]                                                      # a clip a person here
        clip, mel = to_tensor(pack.frames(c, range(20))), lws_mel(pack.sound(c))
        images = torch.cat([item["source"][None], item["frames"]])
        indices = [int((clip - p).abs().sum((1, 2, 3)).argmin()) for p in images]
        assert len(set(indices)) == 5 and all(torch.equal(clip[k], p) for k, p in zip(indices, images))
        np.testing.assert_array_equal(item["mel"], lws_windows(mel, indices[1:]))


@pytest.fixture(scope="module")
def two_steps(pack, tmp_path_factory, narrow_discriminator):
    """A run of two steps with the adversary"""
    out = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pcavs, "LOG_EVERY", 1)
        patch.setattr(pcavs, "TEACHER_SHARE", 0)                                # E's pose code from the first step
        run_train(pack, out, "--w-adv", "1", steps=2)
    return out


def test_two_steps_equal_one_step_and_a_resumed_one_bit_for_bit(pack, two_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(pcavs, "TEACHER_SHARE", 0)
    rate = pcavs.cosine_warmup
    monkeypatch.setattr(pcavs, "cosine_warmup", lambda step, steps: rate(step, 2))  # also in the run of one step
    run_train(pack, tmp_path, "--w-adv", "1", steps=1)
    with pytest.raises(InputError, match="cannot change --w-adv 1.0 -> 0.5"):
        run_train(pack, tmp_path, "--resume", "--w-adv", ".5", steps=2)
    run_train(pack, tmp_path, "--resume", steps=2)
    a, b = (load_checkpoint(folder / "pcavs.pt", "pcavs-train") for folder in (two_steps, tmp_path))
    for part in ("model", "ema", "people", "teacher", "D"):
        for key, value in a["networks"][part].items():
            assert torch.equal(value, b["networks"][part][key]), (part, key)
    lines = [json.loads(line) for line in open(two_steps / "log_pcavs.jsonl")]
    assert "args" in lines[0] and [line["step"] for line in lines[1:]] == [0, 1]
    assert Image.open(two_steps / "pcavs.png").size == (8 * 128, 4 * (128 + 18))             # a title above each row
    model = pcavs.load_pcavs(two_steps / "weights.pt")
    assert model.config == Config.at(16)
    with pytest.raises(InputError, match="--resume continues it"):
        run_train(pack, two_steps)


def test_a_resumed_run_continues_at_the_new_rate_and_refuses_another_pack(pack, two_steps, tmp_path):
    options = ["--resume", "--w-adv", "1"]
    shutil.copytree(two_steps, tmp_path / "out")
    run_train(pack, tmp_path / "out", *options, "--lr", "0.0005", steps=3)
    groups = load_checkpoint(tmp_path / "out" / "pcavs.pt", "pcavs-train")["optimisers"]["g"]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.0005, 0.0025]
    with PackWriter(tmp_path / "others", 16, "toy") as writer:                   # fewer people
        for c in range(4):
            writer.add(Pack(pack).frames(c, range(20)), Pack(pack).sound(c), str(c), str(c))
    with pytest.raises(InputError, match="pcavs.pt: was trained with other options"):
        run_train(tmp_path / "others", tmp_path / "out", *options, steps=4)


def test_photos_in_a_pack_are_not_trained_on(pack, tmp_path):
    whole = Pack(pack)
    with PackWriter(tmp_path / "mixed", 16, "toy") as writer:
        for c in range(len(whole)):
            writer.add(whole.frames(c, range(20 if c % 2 else 1)), whole.sound(c), str(c), str(c))
    run_train(tmp_path / "mixed", tmp_path / "out", steps=1)
    with PackWriter(tmp_path / "photos", 16, "toy") as writer:
        for c in range(len(whole)):
            writer.add(whole.frames(c, [0]), np.zeros(640, np.float32), str(c), str(c))
    with pytest.raises(InputError, match="too few videos"):
        run_train(tmp_path / "photos", tmp_path / "other", steps=1)


class MovingPatterns:
    """Stands in for a pack: people made of forty random patterns each, who all move along the same two patterns"""

    template = "toy"

    def __init__(self, people, seed, T=20):
        rng = np.random.default_rng(seed)
        shapes = np.random.default_rng(1).normal(size=(42, 16, 16, 3))          # the same for all people
        self.motion, self.n_frames = rng.uniform(-1, 1, (people, T, 2)), np.full(people, T)
        looks = np.einsum("pk,khwc->phwc", rng.normal(size=(people, 40)), shapes[2:])
        moves = np.einsum("ptk,khwc->pthwc", self.motion, shapes[:2])
        clips = (128 + 3 * looks[:, None] + 12 * moves).clip(0, 255)
        self.clips = clips.round().astype(np.uint8).repeat(2, 2).repeat(2, 3)   # (people, T, 32, 32, 3)

    def frames(self, c, ks):
        return self.clips[c, ks]


def test_the_linear_teacher_encodes_motion_of_unseen_people_and_nothing_about_the_person():
    teacher = torch.nn.Linear(768, 12).requires_grad_(False)
    pcavs.fit_pose_teacher(teacher, MovingPatterns(150, 2), range(150))
    new = MovingPatterns(30, 3)
    frames = to_tensor(new.clips.reshape(-1, 32, 32, 3))
    codes, motion = teacher(pcavs.teacher_input(frames, "toy")).double().numpy(), new.motion.reshape(-1, 2)
    inputs = np.c_[codes, np.ones(len(codes))]
    fitted = inputs @ np.linalg.lstsq(inputs[:300], motion[:300], rcond=None)[0]
    assert all(np.corrcoef(fitted[300:, k], motion[300:, k])[0, 1] > 0.9 for k in range(2))
    moves = codes.reshape(30, 20, 12)
    means = np.c_[new.motion.mean(1), np.ones(30)]
    person = moves.mean(1) - means @ np.linalg.lstsq(means, moves.mean(1), rcond=None)[0]  # not explained by motion
    assert person.var(0).sum() < 0.05 * moves.var(1).mean(0).sum()
    lips = frames[:3].clone()
    lips[:, :, 20:26, 10:22] += 1                                               # masked
    torch.testing.assert_close(pcavs.teacher_input(lips, "toy"), pcavs.teacher_input(frames[:3], "toy"))


def prepare_step(pack, *options):
    """Networks, optimisers, one batch and the options of a run of two thousand steps"""
    args = pcavs.parse(["train", "--size", "16", "--batch", "6", *options])
    torch.manual_seed(0)
    pack = Pack(pack)
    nets, opts = pcavs.build_networks(args, pack, torch.device("cpu"))
    pcavs.fit_pose_teacher(nets["teacher"], pack, range(5))
    return nets, opts, next(pcavs.batches(pcavs.ClipFrames(pack, 2, 0, range(5)), 3)), args


@pytest.fixture(scope="module")
def first_step(pack):
    return prepare_step(pack)


@pytest.mark.parametrize("step", [0, 2000])  # G's pose input is the teacher's code, or E's
def test_every_term_is_nonzero_and_every_parameter_of_inference_gets_a_gradient(first_step, step):
    nets, opts, batch, args = first_step
    opts["g"].zero_grad()
    terms, _, _ = pcavs.generator_losses(nets, batch, step, args)
    assert set(terms) == set(pcavs.LOSS_WEIGHTS) - {"feat"} and all(float(v.detach()) != 0 for v in terms.values())
    sum(pcavs.LOSS_WEIGHTS[k] * v for k, v in terms.items()).backward()
    without_gradient = [n for n, p in nets["model"].named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert all(n.endswith("noise.weight") for n in without_gradient)             # noise is off at this size
    assert nets["people"].weight.grad.abs().sum() > 0


def test_one_batch_can_be_over_fitted(pack):
    nets, opts, batch, args = prepare_step(pack, "--lr", "0.002")
    curve = []
    for _ in range(30):
        terms, _, _ = pcavs.generator_losses(nets, batch, 49, args)
        opts["g"].zero_grad()
        sum(pcavs.LOSS_WEIGHTS[k] * v for k, v in terms.items()).backward()
        opts["g"].step()
        curve.append(float(terms["rec"].detach()))
    assert np.mean(curve[-5:]) < 0.55 * curve[0]


def test_the_adversary_reaches_the_generator_and_learns_to_recognise_its_frames(pack, narrow_discriminator):
    nets, opts, batch, args = prepare_step(pack, "--w-adv", "1")
    terms, real, fake = pcavs.generator_losses(nets, batch, 0, args)
    for k in ("adv", "feat"):
        grad = torch.autograd.grad(terms[k], nets["model"].G.conv1.conv.weight, retain_graph=True)[0]
        assert grad.abs().sum() > 0
    curve = []
    for step in range(5, 20):
        losses = pcavs.discriminator_losses(nets["D"], real, fake, step)
        assert ("r1" in losses) == (step == 16)
        opts["d"].zero_grad()
        sum(losses.values()).backward()
        opts["d"].step()
        curve.append(float(losses["d"].detach()))
    assert curve[-1] < 0.5 * curve[0]
    assert all(p.grad is None for p in nets["model"].parameters())               # D's step does not reach the networks


def test_nan_stops_the_training_and_names_the_term(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(pcavs, "contrastive_loss", lambda a, b: b.sum() * float("nan"))
    with pytest.raises(InputError, match="'contrast' is nan"):
        run_train(pack, tmp_path / "a")
