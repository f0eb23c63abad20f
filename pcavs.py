"""PC-AVS: the identity of a photo, the lips of a sound, the head pose of a second video as 12 numbers.

Zhou et al., "Pose-Controllable Talking Face Generation by Implicitly Modularized Audio-Visual Representation", CVPR 2021
(arXiv 2104.11116). The four networks have the names and shapes of the published files latest_net_{G,V,E,A_sync}.pth.

    python pcavs.py face.jpg speech.wav --pose pose.mp4 --weights checkpoints/demo --out talk.mp4     # published weights
    python pcavs.py examples/face.png examples/speech.wav --out toy.mp4    # shipped toy weights, 100 frames in a second
    python pcavs.py train --bf16                                   # the toy world at 32 px, README has time and result
    python pcavs.py evaluate clip.mp4 --weights checkpoints/demo   # or pairs.csv of the authors' demo
    python pcavs.py evaluate --toy                                 # the control table of the shipped weights

What differs from the authors' code:
- Sound and picture are in step: their frames begin with the third and their sound with the first, so their picture
  leads by two frames, 80 ms. Every frame of sound has its picture: round(25 x seconds) of them.
- V runs once a photo, E once a pose frame, A_sync and G once a frame, in batches; for every frame theirs run V and
  A_sync once, E and G twice.
- The generator's noise is drawn once a clip, from --seed (theirs anew for every frame); the pose clip is walked there
  and back without standing still for a frame at its ends.
- Alignment looks at every fifth frame of a clip; where landmarks' weights cannot be had, the detector's points stand in.
- They published no training. Ours follows their losses and adds what makes minutes enough, each marked "ours".
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import spectral_norm
from torch.utils.data import Dataset
from tqdm import tqdm

import control
import judges
from audio import filter_bank, n_frames
from checkpoint import (
    checkpoints_dir, cosine_warmup, finite, load_checkpoint, load_frozen, load_strictly, memory_gib, pace,
    pick_device, read_weights, refusing, restore_optimiser, revision, save_checkpoint, update_ema)
from data import Pack, batches, split, split_options
from faces import TEMPLATES, crop_face, detect_faces, face_box, mask_mouth, square_around
from initialise import reduced_rank_regression
from losses import identity_loss, perceptual_loss, reconstruction_loss
from media import (
    FPS, SAMPLES_PER_FRAME, VIDEO_SUFFIXES, InputError, Parser, VideoWriter, check_file, check_output,
    is_grey, load_audio, load_photo, probe, read_video, run, to_tensor, to_uint8)
from sample import LOOK_HEIGHT, WAY_OUT, driving_box, given_box, photo_box, there_and_back, without_colour
from stylegan2 import StyledConv, ToRGB
from toyfaces import toy_pack

PUBLISHED = {"G": "latest_net_G.pth", "V": "latest_net_V.pth", "E": "latest_net_E.pth", "A": "latest_net_A_sync.pth"}
HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class Config:
    """Shape of the four networks; the defaults are the published ones. Saved in every checkpoint as a plain dict."""
    size: int = 224
    template: str = "voxceleb"                 # crop of the pictures: the authors', or one of vision.TEMPLATES
    mask: bool = False                         # ours: E sees no mouth, so that the pose code cannot carry lips
    noise: bool = True                         # the generator's noise; off at toy sizes, as in fusion.Config
    v_stem: int = 4                            # V: what the first layers shrink by; the four stages shrink by 8 more
    v_base: int = 64                           # channels of the first stage; the vector has 32 times as many
    v_groups: int = 32
    v_blocks: tuple = (3, 4, 6, 3)
    e_stem: int = 4                            # E
    e_width: int = 256
    e_depth: int = 4                           # of the hourglass
    e_maps: int = 68                           # heat maps
    dropout: float = 0.5
    a_filters: tuple = (32, 64, 128, 256)      # A_sync
    a_blocks: tuple = (3, 4, 6, 3)
    a_hidden: int = 128                        # of its attention
    hidden: int = 512                          # width of the features of E and A_sync
    mouth: int = 500                           # numbers of the mouth code
    pose: int = 12                             # P, numbers of the pose code
    channels: tuple = (512, 512, 512, 512, 256, 128)  # G, from the identity map's size up
    mouth_gain: float = 1.2                    # the sound's mouth code at inference, exaggerated by the authors

    @property
    def start(self) -> int:
        """Edge of the identity map: 7 of 224"""
        return self.size // (8 * self.v_stem)

    @property
    def style(self) -> int:
        """Width of G's style: identity vector, mouth code, pose code; 2560 as published"""
        return 32 * self.v_base + self.mouth + self.pose

    @classmethod
    def load(cls, plain: dict) -> "Config":
        return cls(**{k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in plain.items()})

    @classmethod
    def at(cls, size: int, **changes) -> "Config":
        """The dial: 16 (tests), 32 and 64 for a CPU, 128 for a GPU, 224 as published."""
        small = dict(template="toy", mask=True, noise=False, v_base=8, v_groups=8, v_blocks=(1, 1, 1, 1), e_width=32,
                     e_depth=2, e_maps=16, dropout=0.0, a_filters=(16, 32, 32, 64), a_blocks=(1, 1, 1, 1), a_hidden=32,
                     hidden=128, mouth=32, mouth_gain=1.0)
        dial = {16: dict(small, v_stem=1, e_stem=2, channels=(64, 64, 32, 16)),
                32: dict(small, v_stem=1, e_stem=2, channels=(128, 128, 64, 32)),
                64: dict(small, v_stem=2, e_stem=4, channels=(128, 128, 128, 64, 32)),
                128: dict(small, v_stem=4, v_base=16, e_stem=4, e_width=128, e_depth=3, e_maps=32, hidden=256, mouth=128,
                          channels=(256, 256, 256, 128, 64, 32)),
                224: {}}
        assert size in dial, f"size is {size}, expected one of {sorted(dial)}"
        return cls(**(dict(size=size) | dial[size] | changes))


# ---------------------------------------------------------------------------------------------------------------------
# V, the identity network: ResNeXt50 32x4d (Xie et al. 2017), its last map brought to G's width

class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1 beside a shortcut: (N, C, H, W) -> (N, 4 planes, H/stride, W/stride)"""

    def __init__(self, c_in: int, planes: int, stride: int, groups: int):
        super().__init__()
        width, c_out = 2 * planes, 4 * planes                                  # 32x4d: twice ResNet's width
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNeXt(nn.Module):
    """Picture (N, 3, H, W) -> map (N, 32 base, H/(8 stem), W/(8 stem))"""

    def __init__(self, base: int, groups: int, blocks: tuple, stem: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, base, 7, 2 if stem > 1 else 1, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem == 4 else nn.Identity()
        c_in = base
        for i, count in enumerate(blocks):
            planes, stage = base * 2 ** i, []
            for k in range(count):
                stage.append(Bottleneck(c_in, planes, 2 if i and not k else 1, groups))
                c_in = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class IdentityEncoder(nn.Module):
    """V: photo (B, 3, H, W) -> identity vector (B, 32 base) and identity map (B, C, start, start)"""

    def __init__(self, c: Config):
        super().__init__()
        self.model = ResNeXt(c.v_base, c.v_groups, c.v_blocks, c.v_stem)
        self.conv1x1 = nn.Conv2d(32 * c.v_base, c.channels[0], 1)

    def forward(self, x):
        x = self.model(x)
        return x.mean((2, 3)), self.conv1x1(x)


# ---------------------------------------------------------------------------------------------------------------------
# E, the non-identity network: FAN (Bulat & Tzimiropoulos 2017) with one hourglass, then a mouth and a pose head

class ConvBlock(nn.Module):
    """Three 3x3 convolutions, each after BatchNorm and ReLU, their outputs side by side, beside a shortcut"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        half, quarter = c_out // 2, c_out // 4
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, half, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(half), nn.Conv2d(half, quarter, 3, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(quarter), nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.downsample = None
        if c_in != c_out:
            self.downsample = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x):  # (N, C, H, W) -> (N, C', H, W)
        a = self.conv1(torch.relu(self.bn1(x)))
        b = self.conv2(torch.relu(self.bn2(a)))
        c = self.conv3(torch.relu(self.bn3(b)))
        return torch.cat([a, b, c], 1) + (x if self.downsample is None else self.downsample(x))


class Hourglass(nn.Module):
    """Down `depth` times and up again, with a branch across at every size: (N, C, H, W) -> the same shape"""

    def __init__(self, width: int, depth: int, dropout: float):
        super().__init__()
        self.depth, self.dropout = depth, nn.Dropout(dropout)
        for level in range(1, depth + 1):
            for name in ("b1", "b2", "b3") if level > 1 else ("b1", "b2", "b2_plus", "b3"):
                self.add_module(f"{name}_{level}", ConvBlock(width, width))

    def forward(self, x):
        return self.at(self.depth, x)

    def at(self, level, x):
        across = self.dropout(self.get_submodule(f"b1_{level}")(x))
        low = self.get_submodule(f"b2_{level}")(F.max_pool2d(x, 2))
        low = self.at(level - 1, low) if level > 1 else self.b2_plus_1(low)
        low = self.get_submodule(f"b3_{level}")(low)
        return across + F.interpolate(low, across.shape[2:], mode="bilinear", align_corners=False)


class FAN(nn.Module):
    """Picture (N, 3, H, W) -> feature (N, hidden), through one map of H / (2 stem)"""

    def __init__(self, c: Config):
        super().__init__()
        w = c.e_width
        self.pool = c.e_stem == 4
        self.conv1, self.bn1 = nn.Conv2d(3, w // 4, 7, 2, 3), nn.BatchNorm2d(w // 4)
        self.conv2, self.conv3, self.conv4 = ConvBlock(w // 4, w // 2), ConvBlock(w // 2, w // 2), ConvBlock(w // 2, w)
        self.m0 = Hourglass(w, c.e_depth, c.dropout)
        self.top_m_0 = ConvBlock(w, w)
        self.conv_last0, self.bn_end0 = nn.Conv2d(w, w, 1), nn.BatchNorm2d(w)
        self.l0, self.bn5 = nn.Conv2d(w, c.e_maps, 1), nn.BatchNorm2d(c.e_maps)
        self.conv6 = nn.Conv2d(c.e_maps, 1, 3, 2, 1)
        self.fc = nn.Linear((c.size // (2 * c.e_stem)) ** 2, c.hidden)

    def forward(self, x):
        x = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        x = self.conv4(self.conv3(F.max_pool2d(x, 2) if self.pool else x))      # (N, w, H/stem, W/stem)
        x = self.top_m_0(self.m0(x))
        maps = self.l0(torch.relu(self.bn_end0(self.conv_last0(x))))            # (N, 68, H/stem, W/stem)
        x = self.conv6(torch.relu(self.bn5(maps)))                              # (N, 1, H/(2 stem), W/(2 stem))
        return self.fc(torch.relu(x.flatten(1)))


class NonIdentityEncoder(nn.Module):
    """E: frame -> feature (N, hidden) of all that is not identity; heads for the mouth's and the head's part of it"""

    def __init__(self, c: Config):
        super().__init__()
        h = c.hidden
        self.model = FAN(c)
        self.to_mouth = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h))
        self.mouth_embed = nn.Sequential(nn.ReLU(), nn.Linear(h, c.mouth))
        self.to_headpose = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h))
        self.headpose_embed = nn.Sequential(nn.ReLU(), nn.Linear(h, c.pose))

    def forward(self, frames):
        """frames (N, 3, H, W) -> pose code (N, P)"""
        return self.headpose_embed(self.to_headpose(self.model(frames)))


# ---------------------------------------------------------------------------------------------------------------------
# A_sync, the speech network: a ResNet with squeeze and excitation (Chung et al. 2020), attention over time

class SELinear(nn.Module):
    """Squeeze and excitation of reduction 8, as losses.SqueezeExcite but with linear layers and biases"""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels // 8), nn.ReLU(), nn.Linear(channels // 8, channels))

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


class SEBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.se = SELinear(c_out)
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):  # (N, C, M, S) -> (N, C', M/stride, S/stride); ReLU before BatchNorm, as published
        y = self.se(self.bn2(self.conv2(self.bn1(torch.relu(self.conv1(x))))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNetSE(nn.Module):
    """Mel window (N, 1, 80, 20) -> feature (N, hidden)"""

    def __init__(self, c: Config):
        super().__init__()
        f = c.a_filters
        self.conv1, self.bn1 = nn.Conv2d(1, f[0], 3, padding=1), nn.BatchNorm2d(f[0])
        c_in = f[0]
        for i, (c_out, count) in enumerate(zip(f, c.a_blocks)):
            stage = [SEBlock(c_in if not k else c_out, c_out, 2 if i and not k else 1) for k in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            c_in = c_out
        flat = f[-1] * MELS // 8
        self.attention = nn.Sequential(nn.Conv1d(flat, c.a_hidden, 1), nn.ReLU(), nn.BatchNorm1d(c.a_hidden),
                                       nn.Conv1d(c.a_hidden, flat, 1), nn.Softmax(2))
        self.fc = nn.Linear(flat, c.hidden)

    def forward(self, x):
        x = self.bn1(torch.relu(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).flatten(1, 2)  # (N, 10 C, 3): 3 steps of time
        return self.fc((x * self.attention(x)).sum(2))


class SpeechEncoder(nn.Module):
    """A_sync: mel windows (N, 1, 80, 20) of `speech_windows` -> speech content (N, hidden)"""

    def __init__(self, c: Config):
        super().__init__()
        self.model = ResNetSE(c)

    def forward(self, mel):
        assert mel.shape[1:] == (1, MELS, STEPS), f"mel window is {tuple(mel.shape)}, expected (N, 1, {MELS}, {STEPS})"
        return self.model(mel)


# ---------------------------------------------------------------------------------------------------------------------
# G, the generator: StyleGAN2's layers from the identity map up, one style for all of them

class FaceGenerator(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        ch, self.dim, self.start = c.channels, c.style, c.start
        self.conv1 = StyledConv(ch[0], ch[0], self.dim)
        self.to_rgb1 = ToRGB(ch[0], self.dim, up=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out in zip(ch, ch[1:]):
            self.convs += [StyledConv(c_in, c_out, self.dim, up=True), StyledConv(c_out, c_out, self.dim)]
            self.to_rgbs.append(ToRGB(c_out, self.dim))

    def draw_noise(self, generator=None) -> list:
        """One map (1, 1, H, W) for each 3x3 layer, coarse to fine"""
        sizes = [self.start * 2 ** ((i + 1) // 2) for i in range(len(self.convs) + 1)]
        return [torch.randn(1, 1, s, s, generator=generator) for s in sizes]

    def forward(self, style, identity_map, noise="random"):
        """style (N, D), identity_map (N, C, start, start), noise: a list of maps, "random" or "off" -> (N, 3, size, size)
        in (-1, 1)"""
        assert style.shape[1] == self.dim, f"style is {tuple(style.shape)}, expected (N, {self.dim})"
        noise = [noise] * (len(self.convs) + 1) if isinstance(noise, str) else noise
        x = self.conv1(identity_map, style, noise[0])
        rgb = self.to_rgb1(x, style)
        for i, to_rgb in enumerate(self.to_rgbs):
            x = self.convs[2 * i](x, style, noise[2 * i + 1])
            x = self.convs[2 * i + 1](x, style, noise[2 * i + 2])
            rgb = to_rgb(x, style, rgb)
        return torch.tanh(rgb)


# ---------------------------------------------------------------------------------------------------------------------
# the whole

class PCAVS(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.V, self.E = IdentityEncoder(config), NonIdentityEncoder(config)
        self.A, self.G = SpeechEncoder(config), FaceGenerator(config)

    def identity(self, photo):
        """photo (B, 3, H, W) -> identity vector (B, 32 base), identity map (B, C, start, start)"""
        return self.V(photo.contiguous(memory_format=torch.channels_last))

    def masked(self, frames):
        """What E sees of pose frames"""
        frames = mask_mouth(frames, self.config.template) if self.config.mask else frames
        return frames.contiguous(memory_format=torch.channels_last)

    def pose(self, frames):
        """frames (N, 3, H, W) -> pose codes (N, P)"""
        return self.E(self.masked(frames))

    def decode(self, identity, speech, pose, noise="random"):
        """identity: of `identity`, for 1 or N; speech (N, hidden), pose (N, P) -> frames (N, 3, H, W) in (-1, 1)"""
        vector, identity_map = (x.expand(len(pose), *x.shape[1:]) for x in identity)
        style = torch.cat([vector.float(), self.E.mouth_embed(speech).float(), pose.float()], 1)      # (N, D)
        return self.G(style, identity_map.contiguous(memory_format=torch.channels_last), noise)

    @torch.inference_mode()
    def animate(self, photo, mel, n: int, pose=None, noise="off", batch: int = 0):
        """Frames 0 .. n-1 of a talking face, as a stream.

        Args:
            photo: (3, H, W) in [-1, 1].
            mel: numpy (S, 80) of `speech_mel`.
            pose: iterable of pose frames (3, H, W); None: the photo's own pose. Each is encoded once; a clip that is
                shorter is walked there and back, on its 12 numbers.
            noise: of G, "off" or a list of maps.
            batch: frames at once; 0: as many as fit into a cache (4 at 224 px), 16 on a GPU.

        Yields:
            (b, 3, H, W) in (-1, 1), n frames in all.
        """
        c = self.config
        batch = batch or (16 if photo.is_cuda else max(4, min(64, (448 // c.size) ** 2)))
        identity = self.identity(photo[None])
        codes, frames = [], iter(pose) if pose is not None else iter([photo])
        for first in range(0, n, batch):
            ks = range(first, min(first + batch, n))
            while len(codes) < ks.stop and (fresh := list(itertools.islice(frames, batch))):
                codes += self.pose(torch.stack(fresh).to(photo))
            head = torch.stack([codes[there_and_back(k, len(codes))] if k >= len(codes) else codes[k] for k in ks])
            speech = c.mouth_gain * self.A(torch.from_numpy(speech_windows(mel, ks)).to(photo))
            yield self.decode(identity, speech, head, noise)


# ---------------------------------------------------------------------------------------------------------------------
# sound: the authors' mel (the lws package's STFT, in plain NumPy), 100 steps a second, 4 a frame

N_FFT, HOP, MELS = 1280, 160, 80               # samples: 80 and 10 ms; bands
MEL_LOW, MEL_HIGH = 125.0, 7600.0              # Hz
STEPS, STEPS_A_FRAME = 20, SAMPLES_PER_FRAME // HOP  # mel steps of a window, 0.2 s; 4
BLOCK = 1024                                   # ours: mel steps computed at once, 13 MB however long the sound


@lru_cache
def stft_window() -> np.ndarray:
    """(1280,): lws' analysis window, a sine whose squares over the hops add up to one"""
    w2 = (1 - np.cos(2 * np.pi * (2 * np.arange(N_FFT) + 1) / (2 * N_FFT))) / 2
    overlap = w2.reshape(-1, HOP).sum(0)                                        # (160,): the same for every hop
    return np.sqrt(w2 / np.tile(overlap, N_FFT // HOP))


def speech_mel(wav: np.ndarray) -> np.ndarray:
    """Samples (n,) at 16 kHz -> mel, float32 (S, 80) in [0, 1]; 0 is silence, S = ceil(n / 160) + 7.

    Brought to r.m.s. 0.1 first, so loudness does not matter. Step s sees samples 160 s - 1120 .. 160 s + 160.
    """
    assert wav.ndim == 1 and len(wav), f"sound is {wav.shape}, expected (n,) with n > 0"
    loud = 0.1 / max(1e-4, float(np.sqrt(np.mean(np.square(wav, dtype=np.float64)))))
    S = -(-len(wav) // HOP) + N_FFT // HOP - 1
    x = np.pad(wav, (N_FFT - HOP, S * HOP - len(wav)))                           # float32, as it came
    bank, mel = filter_bank(MELS, N_FFT, MEL_LOW, MEL_HIGH), np.empty((S, MELS), np.float32)
    for a in range(0, S, BLOCK):
        b = min(a + BLOCK, S)
        frames = np.lib.stride_tricks.sliding_window_view(x[a * HOP:(b - 1) * HOP + N_FFT], N_FFT)[::HOP]  # (b-a, 1280)
        magnitude = np.abs(np.fft.rfft(frames * (stft_window() * loud)))        # (b-a, 641)
        db = 20 * np.log10(np.maximum(1e-5, (bank @ magnitude.T).T)) - 20
        mel[a:b] = np.clip((db + 100) / 100, 0, 1)
    return mel


def speech_windows(mel: np.ndarray, frames) -> np.ndarray:
    """mel (S, 80), T frame indices -> float32 (T, 1, 80, 20): steps 4 (f - 2) .. + 20 of frame f; outside is silence."""
    steps = (np.asarray(frames, np.int64)[:, None] - 2) * STEPS_A_FRAME + np.arange(STEPS)  # (T, 20)
    inside = (steps >= 0) & (steps < len(mel))
    windows = mel[np.clip(steps, 0, len(mel) - 1)] * inside[..., None]           # (T, 20, 80)
    return np.ascontiguousarray(windows.transpose(0, 2, 1)[:, None].astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# weights

UNUSED = {"G": ("style.", "input.", "noises."), "V": ("fc.", "model.fc."),
          "E": ("classifier.", "mouth_fc.", "headpose_fc."), "A": ("fc.",)}  # heads of training, G's mapping and constant


def load_published(folder: Path, names="GVEA", config: Config | None = None, device="cpu") -> dict:
    """{letter: network} from the authors' bare state_dicts, strictly: every key of ours there and of its shape, none
    unknown. Parameters that inference does not use are accepted and dropped; so is the prefix of old DataParallel files.

    Raises InputError, one line that names the file: missing, damaged, another network's, other shapes.
    """
    config, nets = config or Config(), {}
    missing = [PUBLISHED[k] for k in names if not (folder / PUBLISHED[k]).is_file()]
    if missing:
        raise InputError(f"{folder}: {' and '.join(missing)} missing, of the four files {', '.join(PUBLISHED.values())}")
    classes = dict(G=FaceGenerator, V=IdentityEncoder, E=NonIdentityEncoder, A=SpeechEncoder)
    for k in names:
        path = folder / PUBLISHED[k]
        state = read_weights(path)
        if state and all(key.startswith("module.") for key in state):
            state = {key.removeprefix("module."): v for key, v in state.items()}
        state = {key: v.flatten() if key.endswith("activate.bias") and torch.is_tensor(v) else v
                 for key, v in state.items() if not key.startswith(UNUSED[k])}  # (1, C, 1, 1) there, (C,) here
        nets[k] = load_frozen(lambda make=classes[k]: make(config), state, path, device)
    return nets


def load_pcavs(path: str | Path, device="cpu") -> PCAVS:
    """Networks for inference: a folder of the four published files, or a weights.pt of `train`.

    Raises InputError: what is missing or wrong, by name.
    """
    path = Path(path)
    if path.is_dir():
        with torch.device("meta"):
            model = PCAVS(Config())
        for k, net in load_published(path, device=device).items():
            setattr(model, k, net)
        return model.eval()
    checkpoint = load_checkpoint(path, "pcavs")
    with refusing(path, "not a network of this version"):
        model = load_strictly(lambda: PCAVS(Config.load(checkpoint["config"])), checkpoint["networks"]["model"], path)
    return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# pictures: the crop that the published networks know

ALIGNED = np.array([87 + 59j, 137 + 59j, 112 + 120j]) + 0.5 + 0.5j  # x + iy of eyes and mouth in the authors' 224 px
SEEN = (16, 0, 208, 192)                       # of these 224 px, x0 y0 x1 y1: what the networks see, enlarged to 224
LOOK_EVERY = 5                                 # ours: frames of a clip between two looks for the face
IN_BOX = np.array([complex(*p) for p in TEMPLATES["face"].points])  # eyes and mouth in a box of vision.py, of side 1


@lru_cache
def landmarks_network():
    """FAN of face-alignment, 0.7 s a picture: function of (picture, detection) -> (68, 2) or None; None: its weights are
    not at hand."""
    weights = checkpoints_dir() / "2DFAN4-11f355bf06.pth.tar"
    if not weights.is_file():
        print(f"aligned by the detector's own points, rougher than landmarks (they need {weights})")
        return None
    from face_alignment import FaceAlignment, LandmarksType
    fan = FaceAlignment(LandmarksType.TWO_D, device="cpu", flip_input=False, compile=False, face_detector="folder")

    def landmarks(picture, box):
        found = fan.get_landmarks_from_image(np.ascontiguousarray(picture), detected_faces=[box])
        return np.asarray(found[0], float) if found else None

    return landmarks


def three_points(image: np.ndarray, box=None) -> np.ndarray | None:
    """uint8 (H, W, 3) -> x + iy of eyes and mouth in pixels, complex (3,), of the largest face; None: there is none.

    box: the square around the face, where the user says it.
    """
    if box is None:
        faces = detect_faces(image, margins=(1.2, 1.5))
        if faces is None:
            raise InputError("no face detector's weights are at hand")
        if not faces:
            return None
        if landmarks_network():
            points = landmarks_network()(image, faces[0][:4])
            if points is not None:
                x, y = np.stack([points[a:b].mean(0) for a, b in ((36, 42), (42, 48), (60, 68))]).T
                return x + 1j * y + 0.5 + 0.5j
        if len(faces[0]) > 5:                                                   # blazeface's eyes and mouth
            return np.array(faces[0][5::2]) + 1j * np.array(faces[0][6::2])
        box = face_box(faces, "face")
    x0, y0, x1, _ = box
    return x0 + 1j * y0 + IN_BOX * (x1 - x0)


def scale_and_turn(points: np.ndarray) -> complex:
    """z of the similarity z p + t that brings three points (3,) nearest to ALIGNED, by least squares"""
    p, q = points - points.mean(), ALIGNED - ALIGNED.mean()
    return complex((p.conj() * q).sum() / (p.conj() * p).sum())


def align(image: np.ndarray, z: complex, mouth: complex, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3): turned and scaled by z, the mouth in its place, cut as SEEN; black
    beyond the picture, as the authors have it."""
    shrink = max(1, int(SEEN[2] - SEEN[0]) / size / abs(z))                      # pixels of the picture in one of ours
    picture, k = Image.fromarray(image), max(1, int(shrink))
    picture = picture.reduce(k) if k > 1 else picture
    unit = (SEEN[2] - SEEN[0]) / size / z / k                                   # one step right in the result
    corner = (mouth + (SEEN[0] + 1j * SEEN[1] - ALIGNED[2]) / z) / k
    data = (unit.real, -unit.imag, corner.real, unit.imag, unit.real, corner.imag)
    return np.array(picture.transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))


def ready_box(image: np.ndarray) -> tuple:
    """What the networks see of a picture that is cropped the authors' way already (--aligned)"""
    H, W = image.shape[:2]
    return tuple(v / 224 * n for v, n in zip(SEEN, (W, H, W, H)))


def square_middle(image: np.ndarray) -> tuple:
    H, W = image.shape[:2]
    return square_around(W / 2, H / 2, min(H, W))


def photo_crop(image: np.ndarray, args, config: Config) -> np.ndarray:
    """The photo as V sees it, uint8 (size, size, 3)"""
    if config.template in TEMPLATES:                                            # trained here
        image, box, how = photo_box(image, args, config.template)
        print(f"{args.face}: {how}")
        return crop_face(image, box, config.size)
    if args.aligned:
        return crop_face(image, ready_box(image), config.size)
    try:
        points = three_points(image, given_box(image, args) if args.box else None)
    except InputError as error:
        raise InputError(f"{args.face}: {error}; {WAY_OUT}, or --aligned") from None
    if points is None:
        raise InputError(f"{args.face}: no face that is upright was found; {WAY_OUT}")
    return align(image, scale_and_turn(points), points[2], config.size)


def look_for_face(path, n: int) -> tuple:
    """First pass over a pose clip -> frames (n at most), height looked at, z, mouth (frames,) as complex x + iy.

    Scale and turn are the clip's mean; the mouth is held in its place, frame by frame, as the authors do.
    """
    height = min(probe(path).height, LOOK_HEIGHT)
    points, at, count = [], [], 0
    for count, frame in enumerate(itertools.islice(read_video(path, height), n), start=1):
        if (count - 1) % LOOK_EVERY == 0:
            try:
                found = three_points(frame)
            except InputError as error:
                raise InputError(f"{path}: {error}; crop the video and give --aligned") from None
            if found is not None:
                points.append(found)
                at.append(count - 1)
    if 2 * len(at) < -(-count // LOOK_EVERY):
        raise InputError(f"{path}: a face in {len(at)} of {-(-count // LOOK_EVERY)} frames looked at")
    points = np.array(points)                                                   # (looks, 3)
    mouth = np.interp(np.arange(count), at, points[:, 2].real) + 1j * np.interp(np.arange(count), at, points[:, 2].imag)
    return count, height, scale_and_turn(points.mean(0)), mouth


def pose_clip(path, n: int, config: Config, aligned: bool):
    """-> number of frames (n at most), a stream of them as uint8 (size, size, 3). The clip is read twice: where the
    face is must be known before the first frame. InputError: before the stream begins."""
    size = config.size
    if Path(path).is_dir():                                                     # the authors' way to store a clip
        pictures = pictures_in(Path(path))[:n]
        if not pictures:
            raise InputError(f"{path}: no picture (jpg, png) in this folder")
        images = map(load_photo, pictures)
        box = square_middle if config.template in TEMPLATES else ready_box
        return len(pictures), (crop_face(image, box(image), size) for image in images)
    full = probe(path).height
    if config.template in TEMPLATES:
        count, box, height = driving_box(path, n, config.template)
        wanted = min(full, max(2, round(2 * size * height / (box[3] - box[1]))))
        box = tuple(v * wanted / height for v in box)
        crops = (crop_face(frame, box, size) for frame in read_video(path, wanted))
    elif aligned:
        count = sum(1 for _ in itertools.islice(read_video(path, 16), n))
        crops = (crop_face(frame, ready_box(frame), size) for frame in read_video(path))
    else:
        count, height, z, mouth = look_for_face(path, n)
        wanted = min(full, max(16, round(2 * height * abs(z) * size / (SEEN[2] - SEEN[0]))))
        f = wanted / height
        crops = (align(frame, z / f, m * f, size) for frame, m in zip(read_video(path, wanted), mouth))
    return count, itertools.islice(crops, count)


# ---------------------------------------------------------------------------------------------------------------------
# a photo, a sound, a pose clip -> a talking face

def sampling_options(p):
    """What `sample` and `evaluate` share"""
    p.add_argument("--weights", default=HERE / "weights/pcavs_toy.pt",
                   help="folder of the four published files, or a weights.pt of training (default: weights/pcavs_toy.pt)")
    p.add_argument("--aligned", action="store_true",
                   help="photo and pose clip are cropped the authors' way already (published weights)")
    p.add_argument("--overwrite", action="store_true", help="replace what exists")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--seed", type=int, default=0, help="of the generator's noise")
    p.add_argument("--bf16", action="store_true", help="bf16 autocast: 2 to 5 times as fast on a CPU with AMX, and a GPU")


def parse_sample(argv):
    p = Parser(prog="pcavs.py", description="PC-AVS: a photo, a sound, a pose video -> a talking face. "
                                "Other commands: pcavs.py train, pcavs.py evaluate (each with --help)")
    p.add_argument("face", help="photo (a file named train or evaluate: ./train)")
    p.add_argument("speech", help="sound, or video with it")
    p.add_argument("--pose", help="video whose head pose is taken (default: the photo's own)")
    p.add_argument("--out", default="talk.mp4", help="the video to write (default: talk.mp4)")
    p.add_argument("--grid", action="store_true", help="write photo, pose and result side by side "
                   "(keeps the pose clip in memory: 0.15 MB a frame at 224 px)")
    p.add_argument("--box", metavar="x0,y0,x1,y1", help="where the face is in the photo, in pixels")
    p.add_argument("--face", type=int, dest="number", metavar="N", help="the N-th largest face (weights of training)")
    sampling_options(p)
    return p.parse_args(argv)


def talk(model, crop, wav, pose, args, device):
    """crop uint8 (size, size, 3), wav (n,), pose: None or a stream of crops -> a stream of uint8 (b, size, size, 3)"""
    generator = torch.Generator().manual_seed(args.seed)
    noise = [x.to(device) for x in model.G.draw_noise(generator)] if model.config.noise else "off"
    frames = map(to_tensor, pose) if pose is not None else None
    stream = model.animate(to_tensor(crop).to(device), speech_mel(wav), n_frames(len(wav)), frames, noise)
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            made = next(stream, None)                                           # (b, 3, size, size)
        if made is None:
            return
        yield to_uint8(made)


class Kept:
    """Passes a stream of crops on and keeps them, for the grid: crop k of a clip walked there and back"""

    def __init__(self, items, keep: bool):
        self.items, self.keep, self.crops = items, keep, []

    def __iter__(self):
        for crop in self.items:
            if self.keep:
                self.crops.append(crop)
            yield crop

    def __getitem__(self, k):
        return self.crops[there_and_back(k, len(self.crops)) if k >= len(self.crops) else k]


def sample(argv):
    args = parse_sample(argv)
    begin = time.perf_counter()

    # everything that can be wrong, the quick things first
    out = check_output(args.out, args.overwrite, VIDEO_SUFFIXES)
    photo, wav = load_photo(args.face), load_audio(args.speech)
    if args.pose:
        probe(args.pose)
    device = pick_device(args.device)
    model = load_pcavs(args.weights, device)
    size, n = model.config.size, n_frames(len(wav))
    crop, grey = photo_crop(photo, args, model.config), is_grey(photo)
    pose = Kept(pose_clip(args.pose, n, model.config, args.aligned)[1] if args.pose else [crop], args.grid)

    network = talk(model, crop, wav, pose, args, device)
    width = 3 * size if args.grid else size
    with VideoWriter(out, size, width, wav, args.overwrite, args.speech) as video, tqdm(total=n, unit="frame") as bar:
        try:
            for frames in network:
                for frame in map(without_colour, frames) if grey else frames:
                    video.write(np.hstack([crop, pose[video.count], frame]) if args.grid else frame)
                bar.update(len(frames))
        except FloatingPointError as error:
            raise InputError(f"{args.weights}: the networks fail, {error}") from None
        assert video.count == n, f"{video.count} frames for {n} of sound"

    print(f"{out}: {n} frames, {n / FPS:.2f} s; {n / (time.perf_counter() - begin):.1f} frames/s end to end")


# ---------------------------------------------------------------------------------------------------------------------
# measuring

def parse_evaluate(argv):
    p = Parser(prog="pcavs.py evaluate", description="measure clips driven by themselves (photo: their "
                                "first frame; their pose, their sound) or the pairs of a csv against the real frames")
    p.add_argument("clips", nargs="*", help="videos with sound, or one file of pairs (.csv) as in the authors' demo")
    p.add_argument("--toy", action="store_true", help="weights of the toy world: evaluate.py's control table, no clips")
    p.add_argument("--people", type=int, default=32, help="toy world: people held out for good")
    p.add_argument("--cache", default="out/evaluate", help="toy world: where the probe and its drawn people are kept")
    p.add_argument("--out", default="out/pcavs_eval", help="folder for the clips real/ and fake/")
    p.add_argument("--json", help="write evaluate.py's numbers there, too")
    sampling_options(p)
    args = p.parse_args(argv)
    if bool(args.clips) == args.toy:
        raise InputError("give clips, a file of pairs (.csv), or --toy")
    return args


def pairs_of(path: Path) -> list[dict]:
    """The authors' csv: a line has photo folder, its number, pose folder, its number, sound, folder of the real frames,
    its number, mel file, with blanks between -> photo, pose (None: the photo's own), sound, truth (None: there is none)

    A folder of pictures counts as a clip. Names are relative to the working directory, or to the csv; the pose and the
    real frames may be the word None. Raises InputError: a line of other fields, one that names what is not there.
    """
    jobs = []
    for i, line in enumerate(check_file(path).read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 8:
            raise InputError(f"{path}: line {i} has {len(fields)} fields, expected 8")
        paths = {}
        for kind, field in zip(("photo", "pose", "sound", "truth"), (fields[k] for k in (0, 2, 4, 5))):
            there = [p for p in (Path(field), path.parent / field) if p.exists()]
            if not there and (field != "None" or kind in ("photo", "sound")):
                raise InputError(f"{path}: line {i}: {field}: no such file or folder")
            if there and there[0].is_dir() and not pictures_in(there[0]):
                raise InputError(f"{path}: line {i}: no picture in {there[0]}")
            paths[kind] = there[0] if there else None
        photo, pose, sound, truth = paths.values()
        jobs.append(dict(name=f"{i:03d}_{photo.stem}_{pose.stem if pose else None}_{sound.stem}", pose=pose,
                         photo=pictures_in(photo)[0] if photo.is_dir() else photo, sound=check_file(sound), truth=truth))
    if not jobs:
        raise InputError(f"{path}: no pairs in it")
    return jobs


def clips_of(names: list[str]) -> list[dict]:
    """Clips that drive themselves, as pairs_of; each is named by its path below the folder that all of them are in."""
    paths = [check_file(name).absolute() for name in names]
    root = os.path.commonpath([path.parent for path in paths])
    jobs = {str(path.relative_to(root).with_suffix("")): path for path in paths}
    if len(jobs) < len(paths):
        raise InputError(f"{len(paths)} clips have {len(jobs)} names (without suffix): measure them one by one")
    return [dict(name=name, photo=None, pose=path, sound=path, truth=path) for name, path in jobs.items()]


def eval_files(out: Path, jobs: list[dict], overwrite: bool):
    """Checks where the clips of `evaluate` go. Raises InputError: not writable; there already; others lie there, which
    would be measured, too."""
    files = [out / "fake" / f"{job['name']}.mp4" for job in jobs]
    files += [out / "real" / f"{job['name']}.mp4" for job in jobs if job["truth"]]
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: no directory to write to ({error.strerror})") from None
    for file in files:
        check_output(file, overwrite)
    for kind in ("fake", "real"):
        for file in (out / kind).rglob("*"):
            if file.suffix.lower() in VIDEO_SUFFIXES and file not in files:
                raise InputError(f"{file}: is of another run and would be measured, too: "
                                 "remove it or give another --out")


def pictures_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))


def grey_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two uint8 (H, W, 3) pictures, grey, at 224 px: talkingface-toolkit's"""
    from evaluate import ssim
    a, b = (np.array(Image.fromarray(x).convert("L").resize((224, 224), Image.Resampling.BILINEAR)) for x in (a, b))
    return float(ssim(*(np.repeat(x[..., None], 3, -1) for x in (a, b))))


def measure_clip(model, job: dict, args, device, out: Path) -> float | None:
    """Makes one clip: fake/NAME.mp4 and, where there are real frames, real/NAME.mp4 -> mean grey SSIM, or None"""
    c, wav = model.config, load_audio(job["sound"])
    n, scores = n_frames(len(wav)), []
    truth = pose_clip(job["truth"], n, c, args.aligned)[1] if job["truth"] else None
    if job["photo"]:
        args.face, args.box, args.number = job["photo"], None, None
        crop = photo_crop(load_photo(job["photo"]), args, c)
    else:
        crop = next(pose_clip(job["pose"], 1, c, args.aligned)[1])              # its own first frame
    pose = pose_clip(job["pose"], n, c, args.aligned)[1] if job["pose"] else [crop]
    fakes = (frame for frames in talk(model, crop, wav, pose, args, device) for frame in frames)
    with contextlib.ExitStack() as stack:
        fake_video, real_video = (
            stack.enter_context(VideoWriter(out / kind / f"{job['name']}.mp4", c.size, c.size, wav, args.overwrite,
                                            job["sound"]))
            if kind == "fake" or truth is not None else None for kind in ("fake", "real"))
        for frame in tqdm(fakes, job["name"], n, unit="frame", leave=False, disable=None):
            fake_video.write(frame)
            if truth is not None and (real := next(truth, None)) is not None:
                real_video.write(real)
                scores.append(grey_ssim(real, frame))
    return float(np.mean(scores)) if scores else None


def evaluate(argv):
    import evaluate as metrics
    args = parse_evaluate(argv)
    device = pick_device(args.device)
    pairs = len(args.clips) == 1 and args.clips[0].endswith(".csv")
    jobs = [] if args.toy else pairs_of(Path(args.clips[0])) if pairs else clips_of(args.clips)
    args.aligned = args.aligned or pairs                                        # the authors' pairs are cropped already
    model = load_pcavs(args.weights, device)
    if args.toy:
        return toy_table(model, args, device)
    out = Path(args.out).absolute()
    eval_files(out, jobs, args.overwrite)
    scores = {job["name"]: measure_clip(model, job, args, device, out) for job in jobs}
    measured = {name: score for name, score in scores.items() if score is not None}
    for name in scores.keys() - measured.keys():
        print(f"{out / 'fake' / name}.mp4: made; no real frames to compare it with")
    if measured:
        print(f"SSIM, grey at 224 px: {np.mean(list(measured.values())):.3f}, {len(measured)} clips")
        names = [f"{name}.mp4" for name in measured]
        real, fake = (out / kind / names[0] if len(names) == 1 else out / kind for kind in ("real", "fake"))
        metrics.main(["pair", str(real), str(fake), "--device", args.device, *["--bf16"] * args.bf16,
                      *(["--json", args.json] if args.json else [])])


def toy_table(model, args, device):
    """The control table and matrix of changes of control.py, for PC-AVS"""
    if model.config.template != "toy":
        raise InputError("--toy: networks of real faces have no ground truth to be compared with")

    def animate(face, wav, driving=None):
        frames = to_tensor(driving) if driving is not None else None
        n = len(frames) if frames is not None else n_frames(len(wav))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            return torch.cat(list(model.animate(to_tensor(face).to(device), speech_mel(wav), n, frames))).float()

    test = control.toy_test(model.config.size, args.people, args.cache, device)
    rows = control.control_report({str(args.weights): animate}, test)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# training

class Moments(Dataset):
    """Item: one clip at K + 1 different moments. source (3, H, W), frames (K, 3, H, W), mel (K, 1, 80, 20), person.

    Half of the items are mirrored, each as a whole. Item n is a function of (seed, n) alone, as in data.py.
    clips: the numbers of the clips to draw from; all where None.
    """

    def __init__(self, pack: Pack, K: int, seed: int, flip: bool = True, clips=None):
        self.pack, self.K, self.seed, self.flip, self.mels = pack, K, seed, flip, {}
        self.clips = np.arange(len(pack)) if clips is None else clips

    def mel(self, c: int) -> np.ndarray:
        """The mel of clip c, kept for some hundred clips"""
        if c not in self.mels:
            if len(self.mels) >= 512:                                           # 50 MB of three-second clips
                self.mels.clear()
            self.mels[c] = speech_mel(self.pack.sound(c))
        return self.mels[c]

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng([self.seed, n, self.K])
        c = int(self.clips[rng.integers(len(self.clips))])
        length = int(self.pack.n_frames[c])
        moments = rng.choice(length, self.K + 1, replace=length <= self.K)
        pictures = self.pack.frames(c, moments)                                 # (1 + K, H, W, 3)
        if self.flip and rng.random() < 0.5:
            pictures = pictures[:, :, ::-1]
        pictures = to_tensor(np.ascontiguousarray(pictures))
        mel = torch.from_numpy(speech_windows(self.mel(c), moments[1:]))
        return dict(source=pictures[0], frames=pictures[1:], mel=mel, person=int(self.pack.identity[c]))


def disguise(frames):
    """The paper's augmented frames: another person's shape and colours, the same head pose. (N, 3, H, W) -> the same.

    Shape: width and height stretched by up to 10 %, each alone, and moved by up to 5 %; no turning, that is pose.
    Colours: mixed among each other and shifted. The numbers are ours.
    """
    N, dev = len(frames), frames.device
    theta = torch.zeros(N, 2, 3, device=dev)
    theta[:, (0, 1), (0, 1)] = 1 + 0.1 * (2 * torch.rand(N, 2, device=dev) - 1)
    theta[:, :, 2] = 0.1 * (2 * torch.rand(N, 2, device=dev) - 1)  # of half the edge
    grid = F.affine_grid(theta, frames.shape, align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    mix = torch.eye(3, device=dev) + 0.3 * torch.randn(N, 3, 3, device=dev)
    return torch.einsum("nij,njhw->nihw", mix, frames) + 0.2 * torch.randn(N, 3, 1, 1, device=dev)


def contrastive_loss(a, b):
    """Row i of a (n, E) belongs to row i of b (n, E): softmax over b with the published similarity 1 / |a - b| of
    features of unit length. ln n where nothing is known. Gradients go to b alone, as published: call it both ways."""
    a, b = F.normalize(a.detach().float(), dim=1), F.normalize(b.float(), dim=1)
    distance = (2 - 2 * a @ b.t()).clamp_min(1e-4).sqrt()                       # (n, n); ours: 1 / 0 is no number
    return F.cross_entropy(1 / distance, torch.arange(len(a), device=a.device))


class PoseTeacher(nn.Module):
    """Ours. A linear pose code in closed form, which E learns to give and G to obey from the first step on.

    Over the frames of one clip the person is constant: a frame minus the clip's mean is motion. A linear map that
    predicts it from the frame alone, fitted over many people, can use no direction in which people differ (compare
    train.start_motion_space). With the mouth masked it is the head and the eyes. People never seen, 32 px: yaw r .91,
    pitch .83, roll .88, after two seconds; the bottleneck of 12 numbers alone finds nothing in the first minutes.
    """

    EDGE = 16  # pictures are seen at this size

    def __init__(self, config: Config):
        super().__init__()
        self.template, n = config.template, 3 * self.EDGE ** 2
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))
        self.register_buffer("down", torch.zeros(config.pose, n))

    def small(self, frames):
        return F.adaptive_avg_pool2d(mask_mouth(frames, self.template), self.EDGE).flatten(1)

    def forward(self, frames):
        """frames (N, 3, H, W), not disguised -> pose codes (N, P) of unit variance"""
        return ((self.small(frames) - self.mean) / self.std) @ self.down.t()

    @torch.no_grad()
    def learn(self, pack: Pack, clips=None, per_clip: int = 16, ridge: float = 0.1):
        """clips: the numbers of those to look at, 400 at most; all where None"""
        rng, codes = np.random.default_rng(2), []
        for c in rng.permutation(len(pack) if clips is None else clips)[:400]:
            length = int(pack.n_frames[c])
            frames = to_tensor(pack.frames(c, rng.choice(length, min(per_clip, length), replace=False)))
            codes += [self.small(frames.to(self.mean.device)), self.small(frames.flip(3).to(self.mean.device))]
        self.mean.copy_(torch.cat(codes).mean(0))
        self.std.copy_(torch.cat(codes).std(0) + 1e-3)
        codes = [(x - self.mean) / self.std for x in codes]
        motion = torch.cat([x - x.mean(0) for x in codes])
        down = reduced_rank_regression(torch.cat(codes), motion, len(self.down), ridge)[0]
        poses = [x @ down.t() for x in codes]                                   # a world that moves in fewer than P ways
        within = torch.stack([x.var(0) for x in poses]).mean(0)                 # leaves some that tell people apart:
        self.down.copy_(down * (within / torch.cat(poses).var(0))[:, None])     # each as far as it varies within clips


class PatchDiscriminator(nn.Module):
    """Two scales of 4x4 convolutions with spectral and instance norm (pix2pixHD, SPADE) -> maps of each, scores last"""

    def __init__(self, width: int = 64, layers: int = 4):
        super().__init__()
        def net():
            ch = [3] + [min(width * 2 ** i, 512) for i in range(layers)]
            parts = nn.ModuleList([nn.Sequential(nn.Conv2d(3, ch[1], 4, 2, 2), nn.LeakyReLU(0.2))])
            for i in range(1, layers):
                conv = nn.Conv2d(ch[i], ch[i + 1], 4, 1 if i == layers - 1 else 2, 2)
                parts.append(nn.Sequential(spectral_norm(conv), nn.InstanceNorm2d(ch[i + 1]), nn.LeakyReLU(0.2)))
            return parts.append(nn.Conv2d(ch[-1], 1, 4, 1, 2))
        self.scales = nn.ModuleList([net(), net()])

    def forward(self, x) -> list:
        out = []
        for net in self.scales:
            maps = [x]
            for part in net:
                maps.append(part(maps[-1]))
            out.append(maps[1:])
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        return out


def hinge_d(real, fake):
    """-min(0, D(real) - 1) - min(0, -D(fake) - 1), mean over scales; 2 where D knows nothing"""
    return sum(torch.relu(1 - r[-1]).mean() + torch.relu(1 + f[-1]).mean() for r, f in zip(real, fake)) / len(real)


def hinge_g(fake):
    return -sum(f[-1].mean() for f in fake) / len(fake)


def matching_loss(real, fake):
    """L1 of the discriminator's maps, a mean over scales of the sum over layers (pix2pixHD)"""
    return sum((f - r.detach()).abs().mean() for rs, fs in zip(real, fake) for r, f in zip(rs[:-1], fs[:-1])) / len(real)


def parse_train(argv):
    p = Parser(prog="pcavs.py train", description="train the four networks together",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="out/pcavs32", help="directory of checkpoint, log and pictures")
    p.add_argument("--data", help="pack directory written by prepare.py; default: the toy world, drawn into --out")
    split_options(p)
    p.add_argument("--size", type=int, default=32, choices=(16, 32, 64, 128), help="edge of the picture: the dial")
    p.add_argument("--people", type=int, default=400, help="toy world: how many people (one clip each)")
    p.add_argument("--seconds", type=float, default=3.0, help="toy world: length of a clip")
    p.add_argument("--identity", help="folder of the published latest_net_V.pth: V as it is, frozen, in place of one "
                   "that learns by classification (--size 128)")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--clips", type=int, default=8, help="clips of a step")
    p.add_argument("--frames", type=int, default=4, help="frames of each clip")
    p.add_argument("--taught", type=float, default=0.3,
                   help="share of the steps in which G obeys the linear teacher's pose code, not yet E's")
    p.add_argument("--lr", type=float, default=2e-3, help="rate of V, E, A_sync")
    p.add_argument("--lr-g", type=float, default=1e-2, help="rate of G, whose layers have an equalised learning rate")
    p.add_argument("--lr-d", type=float, default=1e-3, help="rate of the discriminator")
    p.add_argument("--ema-kimg", type=float, default=3.0, help="half-life of the averaged weights in thousand pictures")
    p.add_argument("--bf16", action="store_true", help="bf16 autocast (a GPU, or a CPU with AMX)")
    for name, default, note in (
            ("adv", 0.0, "hinge GAN; published 1"), ("match", 0.0, "feature matching; published 10"),
            ("vgg", 0.0, "VGG19's features (downloads it); published 10"),
            ("arcface", 0.0, "ArcFace in VGGFace's place (downloads it); VGGFace published 5"),
            ("rec", 10.0, "ours, in VGG's place: L1 of picture, mouth, eyes and smaller pictures"),
            ("contrast", 1.0, "speech content: sound and mouth, both ways; published 100"),
            ("cross", 1.0, "L1 of the sound's and the mouth's features; published 1"),
            ("id", 1.0, "classification of people by V; published 1"),
            ("pose", 1.0, "ours: E's pose code against the linear teacher's"),
            ("mouth", 3.0, "of the mouth box in rec"), ("eyes", 3.0, "of the eyes box in rec")):
        p.add_argument(f"--w-{name}", type=float, default=default, help=note)
    p.add_argument("--resume", action="store_true", help="continue the checkpoint in --out")
    p.add_argument("--overwrite", action="store_true", help="start anew although a checkpoint exists")
    p.add_argument("--device", default="auto")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=0, help="processes that load data")
    p.add_argument("--log-every", type=int, default=50, help="steps between two log lines")
    p.add_argument("--save-every", type=int, default=500)
    args = p.parse_args(argv)
    if args.w_match and not args.w_adv:
        raise InputError("--w-match compares the discriminator's features: give --w-adv, too")
    if args.identity and Config.at(args.size).v_stem != Config.v_stem:
        raise InputError(f"--identity: the published V has strides for --size 128 and more, --size is {args.size}")
    args.batch = args.clips * args.frames
    args.w_id = 0.0 if args.identity else args.w_id
    return args


def forward(nets, batch, step, args):
    """One forward: photo, sounds, disguised frames -> the frames, and all that the losses compare"""
    model = nets["model"]
    frames = batch["frames"].flatten(0, 1)                                      # (N, 3, H, W), N = B K
    identity = model.identity(batch["source"])
    scores = nets["people"](identity[0])                                        # (B, people)
    identity = [x.repeat_interleave(args.frames, 0) for x in identity]
    speech = model.A(batch["mel"].flatten(0, 1))                                # (N, hidden)
    with torch.autocast(frames.device.type, enabled=False):
        taught = nets["teacher"](frames)                                        # (N, P)
        seen = torch.cat([disguise(frames), disguise(model.masked(frames))])    # for the mouth, for the head
    mouth, head = model.E.model(seen.contiguous(memory_format=torch.channels_last)).chunk(2)  # (N, hidden) each
    pose = model.E.headpose_embed(model.E.to_headpose(head))
    obey = taught if step < args.taught * args.steps else pose
    fake = model.decode(identity, speech, obey, "random" if model.config.noise else "off").float()
    return dict(real=frames, fake=fake, scores=scores, speech=speech, mouth=model.E.to_mouth(mouth),
                pose=pose, taught=taught)


def loss_terms(nets, out, batch, args):
    template = TEMPLATES[nets["model"].config.template]
    boxes = ((template.mouth, args.w_mouth), (template.eyes, args.w_eyes))
    real, fake, speech, mouth = out["real"], out["fake"], out["speech"].float(), out["mouth"].float()
    terms = dict(rec=reconstruction_loss(fake, real, boxes),
                 contrast=contrastive_loss(mouth, speech) + contrastive_loss(speech, mouth),
                 cross=(mouth.detach() - speech).abs().mean(),
                 id=F.cross_entropy(out["scores"].float(), batch["person"]),
                 pose=F.mse_loss(out["pose"].float(), out["taught"]))
    if args.w_adv:
        fake_maps = nets["D"](fake)
        terms["adv"] = hinge_g(fake_maps)
        if args.w_match:
            with torch.no_grad():
                real_maps = nets["D"](real)
            terms["match"] = matching_loss(real_maps, fake_maps)
    if args.w_vgg:
        terms["vgg"] = perceptual_loss(nets["vgg"](fake), nets["vgg"](real))
    if args.w_arcface:
        terms["arcface"] = identity_loss(nets["arcface"](fake), nets["arcface"](real))
    return terms


GIVEN_V = {k: getattr(Config, k) for k in ("v_base", "v_groups", "v_blocks")}   # the published V's shape
GIVEN_MAP = Config.channels[0]


def build(args, pack, device):
    """-> nets, the averaged model, optimisers"""
    changes = dict(template=pack.template)
    if args.identity:
        changes |= GIVEN_V | dict(channels=(GIVEN_MAP, *Config.at(args.size).channels[1:]))
    model = PCAVS(Config.at(args.size, **changes)).to(device)
    if args.identity:
        model.V = load_published(Path(args.identity), "V", model.config, device)["V"]
    nets = dict(model=model, teacher=PoseTeacher(model.config).to(device),
                people=nn.Linear(32 * model.config.v_base, len(pack.identities)).to(device))
    if args.w_adv:
        nets["D"] = PatchDiscriminator(32 if args.size < 128 else 64, 3 if args.size < 128 else 4).to(device)
    groups = [dict(params=[*model.V.parameters(), *model.E.parameters(), *model.A.parameters(),
                           *nets["people"].parameters()], lr=args.lr),
              dict(params=model.G.parameters(), lr=args.lr_g)]
    optimisers = dict(g=torch.optim.Adam(groups, betas=(0.9, 0.99)))            # ours: L1 leads, not the adversary
    if args.w_adv:
        optimisers["d"] = torch.optim.Adam(nets["D"].parameters(), args.lr_d, betas=(0.0, 0.9))  # published
    for opt in optimisers.values():
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
    return nets, copy.deepcopy(model).eval().requires_grad_(False), optimisers


def train(argv):
    args = parse_train(argv)
    device = pick_device(args.device)
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: no directory to write to ({error.strerror})") from None
    path = os.path.join(args.out, "pcavs.pt")
    if os.path.exists(path) and not (args.resume or args.overwrite):
        raise InputError(f"{path} exists: --resume continues it, --overwrite starts anew")
    saved = load_checkpoint(path, "pcavs-train", map_location=device) if args.resume else None
    pack = Pack(args.data) if args.data else toy_pack(Path(args.out), args.size, args.people, args.seconds)
    if pack.size != args.size:
        raise InputError(f"{args.data}: pictures of {pack.size} px, --size is {args.size}")
    parts = split(pack, args)
    unseen = np.union1d(parts["valid"], parts["test"])

    torch.manual_seed(args.seed)
    nets, ema, optimisers = build(args, pack, device)
    model, start = nets["model"], 0
    if args.w_vgg:
        nets["vgg"] = judges.vgg19(device)
    if args.w_arcface:
        nets["arcface"] = judges.arcface(device, None, nets["model"].config.template)
    if saved:
        start = restore(saved, path, nets, ema, optimisers)
    else:
        nets["teacher"].learn(pack, parts["train"])
    data = batches(Moments(pack, args.frames, args.seed, clips=parts["train"]), args.clips, start, args.workers)
    count = {k: sum(q.numel() for q in part.parameters()) / 1e6 for k, part in model.named_children()}
    print(f"PC-AVS on {device}: {len(parts['train'])} clips to train on, {len(pack.identities)} people, M parameters: "
          + ", ".join(f"{k} {v:.2f}" for k, v in count.items()))
    log = open(os.path.join(args.out, "log_pcavs.jsonl"), "a" if saved else "w")
    versions = dict(torch=torch.__version__, python=sys.version.split()[0])
    log.write(json.dumps(dict(revision=revision(), **versions, args=vars(args))) + "\n")
    weight = {k[2:]: v for k, v in vars(args).items() if k.startswith("w_")}
    waited, clock, logged = 0.0, time.perf_counter(), start - 1

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="PC-AVS", disable=None)
    for step in bar:
        before = time.perf_counter()
        batch = {k: v.to(device, non_blocking=True) for k, v in next(data).items()}
        waited += time.perf_counter() - before
        for opt in optimisers.values():
            for group in opt.param_groups:
                group["lr"] = group["initial_lr"] * cosine_warmup(step, args.steps)

        # one fake forward
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            out = forward(nets, batch, step, args)

        # discriminator
        diagnostics = {}
        if args.w_adv:
            diagnostics = discriminator_step(nets["D"], out, optimisers["d"], args)

        # the four networks
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            terms = loss_terms(nets, out, batch, args)
        for name, value in terms.items():
            finite(name, value)
        loss = sum(weight[k] * v for k, v in terms.items())
        optimisers["g"].zero_grad(set_to_none=True)
        loss.backward()
        optimisers["g"].step()
        update_ema(ema, model, (step + 1) * args.batch, args.batch, args.ema_kimg)

        last = step + 1 == args.steps
        if step % args.log_every == 0 or last:
            line = {k: float(weight[k] * v.detach()) for k, v in terms.items()}
            line |= {k: float(v) for k, v in diagnostics.items()}
            line |= dict(step=step, gib=round(memory_gib(device), 2))
            line |= pace(time.perf_counter() - clock, waited, step - logged, args.batch)
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.write(format_line(line, args))
            waited, clock, logged = 0.0, time.perf_counter(), step
        if (step + 1) % args.save_every == 0 or last:
            save_samples(os.path.join(args.out, "pcavs.png"), ema, pack, unseen, device)
            save(path, step + 1, nets, ema, optimisers, args)
    log.close()
    weights = os.path.join(args.out, "weights.pt")
    state = {k: v.half() if v.is_floating_point() else v for k, v in ema.state_dict().items()}
    save_checkpoint(weights, dict(kind="pcavs", format=1, config=vars(ema.config), args=vars(args),
                                  networks=dict(model=state)))
    print(f"{weights}: for pcavs.py --weights")


def discriminator_step(D, out, opt, args):
    """Hinge loss on real and generated frames -> diagnostics"""
    D.requires_grad_(True)
    with torch.autocast(out["real"].device.type, torch.bfloat16, enabled=args.bf16):
        real, fake = D(out["real"]), D(out["fake"].detach())
        loss = hinge_d(real, fake)
    finite("d", loss)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    D.requires_grad_(False)
    return dict(d=loss.detach(), real=-hinge_g(real).detach(), fake=-hinge_g(fake).detach())


def save(path, step, nets, ema, optimisers, args):
    """Everything that the next step depends on"""
    networks = {k: nets[k].state_dict() for k in ("model", "people", "teacher", "D") if k in nets}
    save_checkpoint(path, dict(
        kind="pcavs-train", format=1, config=vars(ema.config), args=vars(args), step=step, networks=networks,
        ema=dict(model=ema.state_dict()), optimisers={k: v.state_dict() for k, v in optimisers.items()},
        rng=dict(torch=torch.get_rng_state())))


def restore(saved, path, nets, ema, optimisers) -> int:
    """Load a checkpoint of `save` -> its step"""
    try:
        for name, state in saved["networks"].items():
            nets[name].load_state_dict(state)
        ema.load_state_dict(saved["ema"]["model"])
        for name, state in saved["optimisers"].items():
            restore_optimiser(optimisers[name], state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: was trained with other options ({str(error).splitlines()[0]})") from None
    torch.set_rng_state(saved["rng"]["torch"].cpu())
    return saved["step"]


def format_line(line, args):
    skip = ("step", "ms", "images_s", "waiting", "gib")
    numbers = "  ".join(f"{k} {v:.3f}" for k, v in line.items() if k not in skip)
    eta = (args.steps - line["step"]) * line["ms"] / 60000
    return (f"{line['step']:6d}  {numbers}  | {line['ms']:.0f} ms, {line['images_s']:.0f} images/s, "
            f"{100 * line['waiting']:.0f} % waiting, {line['gib']:.1f} GiB, {eta:.1f} min left")


@torch.no_grad()
def save_samples(path, model, pack, clips, device, n=8):
    """Four rows of n: photos, the next clip's pose frames, results; below, the frames whose sound is heard"""
    data = Moments(pack, 1, seed=12345, flip=False, clips=clips)
    items = [data[i] for i in range(n)]
    source, frames, mel = (torch.stack([item[k] for item in items]).to(device) for k in ("source", "frames", "mel"))
    pose, heard = frames[:, 0].roll(1, 0), frames[:, 0].roll(2, 0)
    fake = model.decode(model.identity(source), model.A(mel[:, 0].roll(2, 0)), model.pose(pose), "off")
    rows = torch.cat([torch.cat(list(row), -1) for row in (source, pose, fake, heard)], -2)
    image = Image.fromarray(to_uint8(rows.clamp(-1, 1)))
    scale = max(1, 64 // model.config.size)
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path + ".tmp.png")
    os.replace(path + ".tmp.png", path)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    command = dict(train=train, evaluate=evaluate).get(argv[0]) if argv else None
    command(argv[1:]) if command else sample(argv)


if __name__ == "__main__":
    run(main)
