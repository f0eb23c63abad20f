"""PC-AVS: the identity of a photo, the lips of a sound, the head pose of a second video as 12 numbers.

Zhou et al., "Pose-Controllable Talking Face Generation by Implicitly Modularized Audio-Visual Representation", CVPR 2021
(arXiv 2104.11116). The four networks have the names and shapes of the published files latest_net_{G,V,E,A_sync}.pth.

    python pcavs.py face.jpg speech.wav --pose pose.mp4 --weights checkpoints/demo --out talk.mp4
    python pcavs.py train                                          # the toy world at 32 px: TRAIN_TIME
    python pcavs.py examples/face.png examples/speech.wav --pose clip.mp4 --weights out/pcavs32/weights.pt
    python pcavs.py evaluate --weights checkpoints/demo clip.mp4   # or pairs.csv of the authors' demo
    python pcavs.py evaluate --weights out/pcavs32/weights.pt --toy

What differs from the authors' code:
- Sound and picture are in step: their frames begin with the third and their sound with the first, so their picture
  leads by two frames, 80 ms. Every frame of sound has its picture: round(25 x seconds) of them.
- V runs once a photo, E once a pose frame, A_sync and G once a frame, in batches; theirs run V once, E and G twice a frame.
- The noise of the generator is drawn once a clip, from --seed (theirs anew for every frame); the pose clip is walked there
  and back without standing still for a frame at its ends.
- Alignment looks at every fifth frame of a clip; where landmarks' weights cannot be had, the detector's box stands in.
- They published no training. Ours follows their losses and adds what makes minutes enough, each marked "ours".
"""

import argparse
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
from tqdm import tqdm

from audio import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, InputError, filter_bank, n_frames, run
from data import Clips, Pack, batches, load_checkpoint, save_checkpoint
from fusion import pick_device
from losses import Augment, load, read_weights, reconstruction_loss
from sample import there_and_back
from stylegan2 import StyledConv, ToRGB
from syncnet import lr_factor, revision, toy_pack
from train import finite, memory_gib, update_ema
from vision import TEMPLATES, mask_mouth, to_tensor, to_uint8

PUBLISHED = {"G": "latest_net_G.pth", "V": "latest_net_V.pth", "E": "latest_net_E.pth", "A": "latest_net_A_sync.pth"}
MOUTH_GAIN = 1.2  # the authors' factor on the sound's mouth code at inference


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
        small = dict(mask=True, noise=False, v_base=8, v_groups=8, v_blocks=(1, 1, 1, 1), e_width=64, e_depth=2,
                     e_maps=16, dropout=0.0, a_filters=(16, 32, 32, 64), a_blocks=(1, 1, 1, 1), a_hidden=32,
                     hidden=128, mouth=32)
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
