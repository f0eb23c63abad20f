"""Measure: how good, how alike, how much in sync are talking clips; and does the face do what it was told?

    python evaluate.py real/ fake/                 # all pairs of the same name: one table    (a second a pair, 1 core)
    python evaluate.py real.mp4 fake.mp4           # one pair
    python evaluate.py real/ fake/ --landmarker face_landmarker.task --json numbers.json      # landmarks by MediaPipe
    python evaluate.py --toy weights/toy.pt        # the control table of the toy world       (about 3 minutes, 2 cores)

Two parts. The first measures pairs of clips of the same words: METRICS lists what, in which unit, and by whose
definition. Frames pass in chunks, both clips side by side, so memory does not grow with length. What has no weights at
hand is left out by name, and a pair that cannot be measured gets a line that says why.

The second is the toy world, the one place where the truth behind every frame is known. Sources, sounds and driving
clips are of people that nothing was ever trained on, three different ones for each trial: the face of A says the words
of B with the head and eyes of C. A small probe reads the frames; it was trained here on drawn frames of other people,
and its own accuracy on real frames stands beside, since no generated frame can be read better than a real one. The
network under test never sees the truth: probe and truth only measure.

What differs from the metrics' papers: one box follows a face from look to look (a look every three
seconds, a line between), where SyncNet's scripts detect in every frame and smooth; the metrics that say so in METRICS
look at every fifth frame.

Axes: n pictures or frames, K windows, E embedding, S offsets, H W.
"""

import argparse
import contextlib
import json
import os
import platform
import time
import unicodedata
from collections import OrderedDict
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import checkpoint
import judges
from audio import log_mel, mel_windows, mfcc, n_frames
from checkpoint import checkpoints_dir, fetch, load_frozen, pick_device, read_weights, revision
from control import difference, l1, markdown, toy_report
from faces import (
    ARCFACE_POINTS, crop_face, detect_faces, face_box, landmark_detector, need_detector, resized,
    similarity, to_complex, warp_face)
from judges import check_images
from media import (
    SAMPLES_PER_FRAME, InputError, Parser, check_file, check_output, load_audio, read_video, run, to_tensor)
from syncnet import HALF, MAX_OFFSET, SPAN, load_sync
from toyfaces import TEST

class MixedBlock(nn.Module):
    """An Inception block: several branches side by side, their channels joined. (N, C, H, W) -> (N, C', H', W').

    branches: lists of layer names, called in turn; a pair of names are two layers on the same input, joined; "avg", "max"
    keep the size, "half" halves it. layers: name -> (channels in, out, kernel) or (.., stride).
    """

    POOLS = dict(avg=nn.AvgPool2d(3, 1, 1, count_include_pad=False), max=nn.MaxPool2d(3, 1, 1), half=nn.MaxPool2d(3, 2))

    def __init__(self, branches: list, **layers):
        super().__init__()
        self.branches = branches
        for name, plan in layers.items():
            setattr(self, name, inception_conv(*plan))

    def step(self, name, x):
        if isinstance(name, tuple):
            return torch.cat([self.step(part, x) for part in name], 1)
        return self.POOLS[name](x) if name in self.POOLS else getattr(self, f"branch{name}")(x)

    def forward(self, x):
        outs = []
        for branch in self.branches:
            y = x
            for name in branch:
                y = self.step(name, y)
            outs.append(y)
        return torch.cat(outs, 1)


def inception_conv(c_in: int, c_out: int, kernel, stride: int = 1, padding: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU under torchvision's names; the size is kept where stride is 1 and padding on"""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = tuple(k // 2 for k in kernel) if padding and stride == 1 else 0
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(c_in, c_out, kernel, stride, pad, bias=False),
                                     bn=nn.BatchNorm2d(c_out, eps=0.001), relu=nn.ReLU()))


def mixed_a(c_in: int, pool: int) -> MixedBlock:
    return MixedBlock([["1x1"], ["5x5_1", "5x5_2"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3"], ["avg", "_pool"]],
                 branch1x1=(c_in, 64, 1), branch5x5_1=(c_in, 48, 1), branch5x5_2=(48, 64, 5),
                 branch3x3dbl_1=(c_in, 64, 1), branch3x3dbl_2=(64, 96, 3), branch3x3dbl_3=(96, 96, 3),
                 branch_pool=(c_in, pool, 1))


def mixed_c(c: int) -> MixedBlock:
    row, column = (1, 7), (7, 1)
    double = [f"7x7dbl_{k}" for k in range(1, 6)]
    return MixedBlock([["1x1"], ["7x7_1", "7x7_2", "7x7_3"], double, ["avg", "_pool"]], branch1x1=(768, 192, 1),
                 branch7x7_1=(768, c, 1), branch7x7_2=(c, c, row), branch7x7_3=(c, 192, column),
                 branch7x7dbl_1=(768, c, 1), branch7x7dbl_2=(c, c, column), branch7x7dbl_3=(c, c, row),
                 branch7x7dbl_4=(c, c, column), branch7x7dbl_5=(c, 192, row), branch_pool=(768, 192, 1))


def mixed_e(c_in: int, pool: str) -> MixedBlock:
    row, column = (1, 3), (3, 1)
    return MixedBlock([["1x1"], ["3x3_1", ("3x3_2a", "3x3_2b")], ["3x3dbl_1", "3x3dbl_2", ("3x3dbl_3a", "3x3dbl_3b")],
                  [pool, "_pool"]], branch1x1=(c_in, 320, 1), branch3x3_1=(c_in, 384, 1), branch3x3_2a=(384, 384, row),
                 branch3x3_2b=(384, 384, column), branch3x3dbl_1=(c_in, 448, 1), branch3x3dbl_2=(448, 384, 3),
                 branch3x3dbl_3a=(384, 384, row), branch3x3dbl_3b=(384, 384, column), branch_pool=(c_in, 192, 1))


class Inception(nn.Module):
    """FID's eye (Szegedy et al. 2015, as Heusel et al. 2017 use it): pictures (N, 3, H, W) in [-1, 1] -> (N, 2048).

    TensorFlow's network of 2015-12-05 under torchvision's names, as pytorch-fid ports it: average pools do not count
    their padding, and the last block pools by maximum. Pictures are brought to 299 px bilinearly, without prefilter.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = inception_conv(3, 32, 3, 2)                                   # (N, 32, 149, 149)
        self.Conv2d_2a_3x3 = inception_conv(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = inception_conv(32, 64, 3)                                     # 147, then pooled to 73
        self.Conv2d_3b_1x1 = inception_conv(64, 80, 1)
        self.Conv2d_4a_3x3 = inception_conv(80, 192, 3, padding=False)                     # 71, then pooled to 35
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = MixedBlock([["3x3"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3"], ["half"]],   # (N, 768, 17, 17)
                              branch3x3=(288, 384, 3, 2), branch3x3dbl_1=(288, 64, 1), branch3x3dbl_2=(64, 96, 3),
                              branch3x3dbl_3=(96, 96, 3, 2))
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(mixed_c, (128, 160, 160, 192))
        self.Mixed_7a = MixedBlock([["3x3_1", "3x3_2"], [f"7x7x3_{k}" for k in range(1, 5)], ["half"]],  # (N, 1280, 8, 8)
                              branch3x3_1=(768, 192, 1), branch3x3_2=(192, 320, 3, 2), branch7x7x3_1=(768, 192, 1),
                              branch7x7x3_2=(192, 192, (1, 7)), branch7x7x3_3=(192, 192, (7, 1)),
                              branch7x7x3_4=(192, 192, 3, 2))
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, "avg"), mixed_e(2048, "max")          # (N, 2048, 8, 8)
        self.fc = nn.Linear(2048, 1008)  # in the file, and not asked

    def forward(self, x):
        check_images(x, 1)
        x = resized(x, 299)
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name, block in self.named_children():
            x = block(x) if name.startswith("Mixed_") else x
        return x.mean((2, 3))


def inception(device, path: str | Path | None = None) -> Inception:
    """Frozen. path: your copy of pytorch-fid's file; None fetches it."""
    path = fetch("inception", path)
    return load_frozen(Inception, read_weights(path), path, device)

CHUNK = 75  # frames at a time: three seconds, as data.py has one box for
VIDEOS = (".mp4", ".mov", ".mkv", ".m4v", ".avi", ".mpg", ".mpeg", ".webm", ".gif")  # what is a clip in a folder
EXPERT = Path(__file__).parent / "weights" / "sync.pt"


class Metric(NamedTuple):
    """A column: unit, better (higher or lower), what a clip has against itself (None: a property of the clip), digits
    shown, meaning and source"""

    unit: str
    better: str
    itself: float | None
    digits: int
    what: str


METRICS = {
    "SSIM": Metric("", "higher", 1, 3, "structure of windows of 11 px, colour; Wang et al. 2004"),
    "MS-SSIM": Metric("", "higher", 1, 3, "the same over five scales, 176 px or more; Wang et al. 2003"),
    "PSNR": Metric("dB", "higher", float("inf"), 2, "peak signal to noise, mean over frames that differ"),
    "LPIPS": Metric("", "lower", 0, 3, "distance of VGG16's features, every fifth frame; Zhang et al. 2018"),
    "L1": Metric("", "lower", 0, 4, "mean absolute difference, white being 1"),
    "LMD": Metric("px", "lower", 0, 2, "distance of 68 landmarks, pictures scaled to a height of 256; Chen et al. 2018"),
    "mouth LMD": Metric("px", "lower", 0, 2, "the same of the mouth's 20, both mouths centred; Chen et al. 2018"),
    "pose": Metric("deg", "lower", 0, 2, "difference of yaw, pitch and roll, their mean; see head_pose"),
    "blink": Metric("", "lower", 0, 3, "difference of the eyes' aspect ratio (open .3, shut .1); Soukupova & Cech 2016"),
    "CSIM": Metric("", "higher", 1, 3, "cosine of ArcFace's embeddings, every fifth frame: the same person?"),
    "FID": Metric("", "lower", 0, 2, "Frechet distance of Inception's features, every fifth frame; Heusel et al. 2017"),
    "CPBD": Metric("", "higher", None, 3, "share of edges that look sharp, every fifth frame; Narvekar & Karam 2011"),
    "LSE-D": Metric("", "lower", None, 3, "distance of lips and sound at the best offset, SyncNet v2; Wav2Lip, 2020"),
    "LSE-C": Metric("", "higher", None, 3, "how much nearer than at the median offset, SyncNet v2; Wav2Lip, 2020"),
    "LSE offset": Metric("frames", "lower", None, 2, "size of that offset: LSE itself does not punish a delay"),
    "Sync-D": Metric("", "lower", None, 3, "as LSE-D, by our own expert, whose embeddings have unit length"),
    "Sync-C": Metric("", "higher", None, 3, "as LSE-C, by our own expert"),
    "Sync offset": Metric("frames", "lower", None, 2, "size of that offset"),
}  # fmt: skip


def psnr(a, b) -> np.ndarray:
    """Peak signal-to-noise ratio of each uint8 picture (.., H, W, 3) -> (..) in dB; inf is equal, above 30 is close."""
    mse = np.square(difference(a, b), dtype=np.int32).mean((-3, -2, -1), dtype=np.float64)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / mse)


WINDOW = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))  # Wang et al. 2004: 11 pixels, deviation 1.5
WINDOW = (WINDOW / WINDOW.sum()).tolist()
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, measured on people, fine to coarse


@lru_cache(64)
def scratch(shape, use):
    """Memory to write over: of a map's cost half was asking the system for new"""
    return torch.empty(shape)


def window_means(maps):
    """Maps (m, H, W) -> means under WINDOW around every pixel that has all of it, (m, H - 10, W - 10).

    Sums of shifted copies, pairs of equal weight at once: on a CPU, while the maps stay in its cache, several times as
    fast as conv2d.
    """
    for axis in (2, 1):
        length = maps.shape[axis] - 10
        middle = maps.narrow(axis, 5, length)
        pair = scratch(middle.shape, "pair")
        total = torch.mul(middle, WINDOW[5], out=scratch(middle.shape, "total") if axis == 2 else None)
        for k in range(5):
            torch.add(maps.narrow(axis, k, length), maps.narrow(axis, 10 - k, length), out=pair)
            total.add_(pair, alpha=WINDOW[k])
        maps = total
    return maps


def structure(x, y):
    """Maps (m, H, W) of 0..255, H, W >= 11 -> SSIM (m,), and its part without the means, contrast and structure (m,).

    Written with sum and difference of the two: 4 cov = var(x + y) - var(x - y), 2 (var x + var y) = their sum, and so for
    the means. The same value, fewer steps, and a small difference keeps its digits.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    s, d = x + y, x - y
    mean_s, mean_d = window_means(s).square_(), window_means(d).square_()
    var_s, var_d = window_means(s.square_()).sub_(mean_s), window_means(d.square_()).sub_(mean_d)
    contrast = (var_s - var_d).add_(2 * c2).div_(var_s.add_(var_d).add_(2 * c2))
    light = (mean_s - mean_d).add_(2 * c1).div_(mean_s.add_(mean_d).add_(2 * c1))
    return light.mul_(contrast).mean((1, 2)), contrast.mean((1, 2))


def halved(maps):
    """Maps (m, H, W) -> means of 2x2 pixels, (m, H // 2, W // 2)"""
    rows = maps[:, 0 : maps.shape[1] // 2 * 2]
    rows = rows[:, ::2] + rows[:, 1::2]
    even = maps.shape[2] // 2 * 2
    return (rows[:, :, 0:even:2] + rows[:, :, 1:even:2]).mul_(0.25)


@torch.inference_mode()
def over_scales(x, y):
    """Maps (m, H, W) of 0..255 twice -> SSIM (m,), MS-SSIM (m,), NaN where the coarsest scale has no window"""
    small = min(x.shape[1:]) < 11 * 2 ** (len(SCALES) - 1)
    product, first = 1.0, None
    for k, weight in enumerate(SCALES[: 1 if small else None]):
        if k:
            x, y = halved(x), halved(y)
        step = max(1, 2**16 // x[0].numel())  # as many maps as fit into a core's cache
        whole, contrast = map(torch.cat, zip(*map(structure, x.split(step), y.split(step))))
        first = whole if first is None else first
        product = product * (whole if k == len(SCALES) - 1 else contrast).clamp_min(0) ** weight
    return first, torch.full_like(first, torch.nan) if small else product


def ssim_and_ms_ssim(a, b) -> tuple[np.ndarray, np.ndarray]:
    """SSIM, and SSIM over five scales, of uint8 pictures (.., H, W, 3), H, W >= 11 -> (..), (..); 1 is equal, higher is
    better. Means over the channels.

    Wang et al. 2004, where the window lies inside the picture; and Wang et al. 2003: contrast and structure of each
    scale, which is the mean of 2x2 pixels of the one before, and the means of the coarsest, each to the power of its
    weight. NaN below 176 px, where the coarsest has no window; a negative term counts as 0. They come together because
    the first is a by-product of the second's finest scale.
    """
    shape, values = np.shape(a)[:-3], []
    a, b = (np.reshape(p, (-1, *np.shape(p)[-3:])) for p in (a, b))
    for k in range(0, len(a), 8):  # pictures at a time: bounds memory
        maps = (torch.from_numpy(p[k : k + 8].transpose(0, 3, 1, 2).astype(np.float32, "C")) for p in (a, b))
        values.append(torch.stack(over_scales(*(m.flatten(0, 1) for m in maps))).double().unflatten(1, (-1, 3)).mean(2))
    return tuple(v.numpy().reshape(shape) for v in torch.cat(values, 1))


def ssim(a, b) -> np.ndarray:
    """Structural similarity alone; see ssim_and_ms_ssim."""
    return ssim_and_ms_ssim(a, b)[0]


BLOCK = 64  # pixels; this and EDGES: Narvekar & Karam 2011
EDGES = 0.002  # a block with a larger share of edge pixels is judged
TAN = np.tan(np.pi / 8)  # edges upright within 22.5 degrees


def cpbd(picture) -> float:
    """Sharpness of a uint8 picture (H, W, 3): share of the edges whose blur is not noticed; in [0, 1], higher is sharper.

    Narvekar & Karam 2011: an edge w pixels wide is seen to be blurred with probability 1 - exp(-(w / v)^3.6), v being 5
    in blocks of little contrast (50 or less) and 3 in others, and counts as sharp up to 1 - 1/e: where w <= v. Widths
    are measured along the row, from the darkest to the brightest pixel of the slope (Marziliano et al. 2002). Which
    pixels are edges the paper leaves open; as in the Python package cpbd, whose figures are the usual ones: where
    Sobel's upright gradient is a maximum of its row or column and its square above twice its root mean square. That
    package picks the blocks with Canny's detector (ours: the same edges; r = .999 with it, .007 apart).
    NaN: less than 64 px, or not one edge.
    """
    grey = np.asarray(picture).astype(np.float32) @ np.float32([0.299, 0.587, 0.114])  # Rec. 601 luma
    H, W = (side // BLOCK * BLOCK for side in grey.shape)
    if not H or not W:
        return float("nan")
    around = np.pad(grey, 1, mode="edge")
    rows = around[:-2] + 2 * around[1:-1] + around[2:]
    gradient = (rows[:, 2:] - rows[:, :-2]) / 8  # grey levels a pixel, (H, W)
    upward = around[2:, 1:-1] - around[:-2, 1:-1]
    sideways = around[1:-1, 2:] - around[1:-1, :-2]
    strength = np.square(gradient)
    s = np.pad(np.where(strength > 2 * np.sqrt(strength.mean()), strength, 0), 1)
    here = s[1:-1, 1:-1]
    edge = (here >= s[1:-1, :-2]) & (here > s[1:-1, 2:]) | (here >= s[:-2, 1:-1]) & (here > s[2:, 1:-1])

    def blocks(x):  # (H, W) -> (H / 64, W / 64, 64, 64)
        return x[:H, :W].reshape(H // BLOCK, BLOCK, W // BLOCK, BLOCK).swapaxes(1, 2)

    judged = blocks(edge).mean((2, 3)) > EDGES
    noticed = np.where(np.ptp(blocks(grey), axis=(2, 3)) <= 50, 5, 3)  # v, pixels
    y, x = np.nonzero(edge[:H, :W] & (np.abs(upward) <= TAN * np.abs(sideways))[:H, :W])
    v, counts = noticed[y // BLOCK, x // BLOCK], judged[y // BLOCK, x // BLOCK]
    width = slope_widths(grey, gradient)[y, x]
    counts = counts & (width > 0)
    return float((width <= v)[counts].mean()) if counts.any() else float("nan")


def slope_widths(grey, gradient):
    """Width in pixels of the slope that each pixel is on, measured along its row in the gradient's direction: (H, W)"""
    H, W = grey.shape
    step = np.sign(np.diff(grey, axis=1)).astype(np.int8)  # (H, W - 1): between x and x + 1
    place = np.arange(W - 1)
    new = np.ones_like(step, bool)
    new[:, 1:] = step[:, 1:] != step[:, :-1]
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)  # where the run of equal steps began
    last = np.ones_like(new)
    last[:, :-1] = new[:, 1:]
    stop = np.minimum.accumulate(np.where(last, place, W)[:, ::-1], axis=1)[:, ::-1] + 1
    sign, x = np.sign(gradient), np.arange(W)
    before, after = np.pad(step, ((0, 0), (1, 0))), np.pad(step, ((0, 0), (0, 1)))  # the steps on either side of x
    left = np.where(before == sign, np.pad(first, ((0, 0), (1, 0))), x)
    right = np.where(after == sign, np.pad(stop, ((0, 0), (0, 1))), x)
    return np.where(sign == 0, 0, right - left)


# ---------------------------------------------------------------------------------------------------------------------
# pure functions: landmarks in iBUG's order of 68, (n, 68, 2) pixels, x to the right and y down

MOUTH, LEFT_EYE, RIGHT_EYE = slice(48, 68), slice(36, 42), slice(42, 48)  # left and right of the picture
# Points that the skull holds still: before the ears, nose, corners of the eyes; and where they are on an average face,
# in cm, x to the picture's right, y up, z towards the viewer (MediaPipe's canonical face, Apache-2.0)
RIGID = [0, 16, 27, 28, 29, 30, 31, 33, 35, 36, 39, 42, 45]
AVERAGE = np.array([(-7.74, 2.36, -2.01), (7.74, 2.36, -2.01), (0, 3.27, 5.24), (0, 1.73, 6.32), (0, 0.37, 7.24),
                    (0, -0.46, 7.59), (-1.04, -1.46, 5.66), (0, -2.09, 6.06), (1.04, -1.46, 5.66), (-4.45, 2.66, 3.17),
                    (-1.86, 2.59, 3.76), (1.86, 2.59, 3.76),
                    (4.45, 2.66, 3.17)])  # fmt: skip


def landmark_distance(a, b) -> np.ndarray:
    """Mean distance of corresponding landmarks, (n, L, 2) twice -> (n,) in their unit; 0 is equal. Chen et al. 2018."""
    return np.linalg.norm(a - b, axis=-1).mean(-1)


def mouth_distance(a, b) -> np.ndarray:
    """Landmark distance of two mouths, each about its own middle: (n, 68, 2) twice -> (n,); 0 is the same shape.

    Chen et al. 2018, whose calibrated mouths do not count where the head is.
    """
    a, b = (p[:, MOUTH] - p[:, MOUTH].mean(1, keepdims=True) for p in (a, b))
    return landmark_distance(a, b)


def head_pose(points) -> np.ndarray:
    """Landmarks (n, 68, 2) -> yaw, pitch, roll (n, 3) in degrees: towards the picture's right, chin up, clockwise.

    Seen from far away, a face that is turned by R is a linear map of its points, the first two rows of R times a scale.
    The map is fitted to RIGID by least squares, and the nearest pair of orthogonal rows taken. No camera is needed; a
    face unlike the average has a constant error, which falls out of the difference of two clips of one person.
    """
    shape = AVERAGE - AVERAGE.mean(0)
    seen = points[:, RIGID] * [1, -1]
    seen = seen - seen.mean(1, keepdims=True)
    u, _, v = np.linalg.svd((np.linalg.pinv(shape) @ seen).swapaxes(1, 2), full_matrices=False)
    right, up = np.moveaxis(u @ v, 1, 0)  # (n, 3) each: rows of R
    toward = np.cross(right, up)
    yaw = np.arctan2(right[:, 2], toward[:, 2])
    pitch = np.arctan2(up[:, 2], np.hypot(right[:, 2], toward[:, 2]))
    return np.degrees(np.stack([yaw, pitch, -np.arctan2(up[:, 0], right[:, 0])], 1))


def eye_opening(points) -> np.ndarray:
    """Eye aspect ratio (n, 68, 2) -> (n,), a mean of both eyes; about .3 open, below .15 shut. Soukupova & Cech 2016."""
    ratios = []
    for eye in (points[:, LEFT_EYE], points[:, RIGHT_EYE]):
        lids = np.linalg.norm(eye[:, [1, 2]] - eye[:, [5, 4]], axis=-1).sum(-1)
        ratios.append(lids / (2 * np.linalg.norm(eye[:, 0] - eye[:, 3], axis=-1)))
    return np.mean(ratios, 0)


# the same in the crop of vision.TEMPLATES["face"], as fractions, for want of landmarks: eyes and height of the mouth as
# there, the rest by ARCFACE_POINTS' proportions
CROP_POINTS = np.array([(0.302, 0.298), (0.698, 0.298), (0.5, 0.51), (0.336, 0.723), (0.664, 0.723)])


def five_points(points):
    """Landmarks (68, 2) -> eyes, tip of the nose, corners of the mouth (5, 2)"""
    return np.stack([points[LEFT_EYE].mean(0), points[RIGHT_EYE].mean(0), points[30], points[48], points[54]])


def align_face(picture, five) -> np.ndarray:
    """uint8 (H, W, 3) and five points in it (5, 2) -> uint8 (112, 112, 3), by the similarity that brings them nearest to
    ARCFACE_POINTS"""
    return warp_face(picture, *similarity(to_complex(ARCFACE_POINTS), to_complex(np.asarray(five, float))), 112)


# ---------------------------------------------------------------------------------------------------------------------
# pure functions: lips and sound, sets of pictures

def lip_sync_error(face, sound, reach: int = MAX_OFFSET, pad: bool = True):
    """Embeddings (K, E) of windows of frames and of sound -> D, C, and by how many frames the sound is late.

    Distance of window k's picture to the sound at k + d, its mean over k, at each offset d of -reach .. reach: D is the
    least (lower is better), C the median less D (higher is better), Euclidean, in the expert's own unit. SyncNet (Chung
    and Zisserman 2016); Wav2Lip (Prajwal et al. 2020) calls them LSE-D and LSE-C. SyncNet's script gives the offset
    the other sign.

    pad: as published, sound beyond either end is an embedding of zeros; else such pairs do not count, nor offsets that
    fewer than half of the windows have. ValueError: no window.
    """
    K = len(face)
    if not K or len(sound) != K:
        raise ValueError(f"{K} windows of frames, {len(sound)} of sound")
    padded = F.pad(sound, (0, 0, reach, reach))
    distances = torch.stack([F.pairwise_distance(face, padded[d : d + K]) for d in range(2 * reach + 1)], 1)  # (K, S)
    if pad:
        means = distances.mean(0)
    else:
        at = torch.arange(K)[:, None] + torch.arange(-reach, reach + 1)
        inside = ((at >= 0) & (at < K)).to(distances.device)
        means = (distances * inside).sum(0) / inside.sum(0)
        means[2 * inside.sum(0) < K] = float("nan")
    best = int(means.nan_to_num(torch.inf).argmin())
    least = float(means[best])
    return least, float(means.nanmedian()) - least, best - reach


class Moments:
    """Mean and covariance of features that come in batches (n, E), in float64; holds E x E numbers, never the features"""

    def __init__(self):
        self.n, self.total, self.products = 0, 0.0, 0.0

    def add(self, features):
        x = features.double().cpu()
        self.n, self.total, self.products = self.n + len(x), self.total + x.sum(0), self.products + x.t() @ x

    def merge(self, other):
        self.n, self.total, self.products = self.n + other.n, self.total + other.total, self.products + other.products

    def mean(self):
        return self.total / self.n

    def covariance(self):
        return (self.products - self.n * torch.outer(self.mean(), self.mean())) / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two sets of features; 0 is equal. Heusel et al. 2017.

    The trace of the root is a sum over the roots of the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric, so that
    sets of fewer pictures than features need no small number added.
    """
    values, vectors = torch.linalg.eigh(a.covariance())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.t()
    shared = torch.linalg.eigvalsh(root @ b.covariance() @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean() - b.mean()).square().sum()
    return max(0.0, float(apart + a.covariance().trace() + b.covariance().trace() - 2 * shared))
SYNCNET, OURS = ("LSE-D", "LSE-C", "LSE offset"), ("Sync-D", "Sync-C", "Sync offset")
SHAPES = ("LMD", "mouth LMD", "pose", "blink")
FILES = ("vgg16", "lpips_heads", "arcface", "syncnet_v2", "inception")  # of losses.PUBLISHED: what --path can name


def judges_at_hand(args, device) -> tuple[SimpleNamespace, dict]:
    """Networks that measure, None where they are missing, and {metric: why it is left out}.

    Raises InputError: a file that the user named is not what it should be.
    """
    missing = {name.strip(): "--skip" for name in args.skip.split(",") if name.strip()}
    paths = dict(item.partition("=")[::2] for item in args.path)
    for name in missing.keys() - METRICS.keys():
        raise InputError(f"--skip {name}: not a metric; there are {', '.join(METRICS)}")
    for name in paths.keys() - set(FILES):
        raise InputError(f"--path {name}: expected NAME=FILE, NAME being {', '.join(FILES)}")
    paths = {name: check_file(path) for name, path in paths.items()}

    def judge(metrics, named, load):
        """A network, or None; that it cannot be had is an error where the user named its file"""
        if not missing.keys() >= set(metrics):
            try:
                return load()
            except InputError as error:
                if named:
                    raise
                missing.update({metric: str(error) for metric in metrics if metric not in missing})

    def published(metrics, load, *names, detects=False):
        def at_hand():
            for name in names:
                target = checkpoints_dir() / checkpoint.PUBLISHED[name].file
                if not (args.fetch or name in paths or target.is_file()):
                    raise InputError(f"{target.name} is not in {target.parent} (--fetch downloads what is missing)")
            if detects:
                need_detector()
            return load(device, *(paths.get(name) for name in names))

        return judge(metrics, any(name in paths for name in names), at_hand)

    found = SimpleNamespace(device=device, every=args.every, skip=missing.copy())
    found.sync = judge(OURS, args.expert, lambda: own_expert(args.expert or EXPERT, device))
    boxed = not args.landmarker or detect_faces(np.zeros((64, 64, 3), np.uint8)) is not None
    if args.landmarker:
        detector = landmark_detector(f"mediapipe:{args.landmarker}", "face" if boxed else None)
        found.landmarks = judge(SHAPES, True, lambda: args.at_end.enter_context(detector))
    else:
        detector = landmark_detector("fan", device=device)
        found.landmarks = published(SHAPES, lambda *_: args.at_end.enter_context(detector), "fan", detects=True)
    found.lpips = published(("LPIPS",), judges.lpips, "vgg16", "lpips_heads")
    found.arcface = published(("CSIM",), judges.arcface, "arcface", detects=True)
    found.syncnet = published(SYNCNET, judges.syncnet_v2, "syncnet_v2", detects=True)
    found.inception = published(("FID",), inception, "inception")
    found.follow = any((found.arcface, found.syncnet, found.landmarks and boxed,                # for a box
                        found.sync and found.sync.template != "toy"))
    return found, missing


def own_expert(path, device):
    """syncnet.py's expert; one for real faces needs a detector"""
    expert = load_sync(path, device)
    if expert.template != "toy":
        need_detector()
    return expert


# ---------------------------------------------------------------------------------------------------------------------
# one clip, watched

class Lips:
    """Embeddings of all windows of five frames of a stream of crops; holds four crops."""

    def __init__(self, embed, size: int, box):
        """embed: crops (n, 3, size, size) in [-1, 1], n >= 5 -> (n - 4, E). box: detection -> crop, in pixels."""
        self.embed, self.size, self.box, self.held, self.out = embed, size, box, None, []

    def add(self, frames, boxes):
        crops = to_tensor(np.stack([crop_face(f, self.box(b), self.size) for f, b in zip(frames, boxes)]))
        crops = crops if self.held is None else torch.cat([self.held, crops])
        if len(crops) >= SPAN:
            self.out.append(self.embed(crops).float())
        self.held = crops[-(SPAN - 1) :]


def syncnet_crop(detection) -> tuple:
    """Detection -> the square that SyncNet v2's scripts cut: s half the box's larger side, 1.4 s to either side, s above
    the middle, 1.8 s below it (their crop scale is .4)."""
    x0, y0, x1, y1 = detection[:4]
    x, y, s = (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) / 2
    return x - 1.4 * s, y - s, x + 1.4 * s, y + 1.8 * s


class Watch:
    """What the judges make of one clip, gathered chunk by chunk; no picture is kept but those in Lips."""

    def __init__(self, judges):
        self.judges, self.count, self.box, self.looks, self.found = judges, 0, None, 0, 0
        self.sharp, self.points, self.who, self.lips = [], [], [], {}
        self.moments = Moments()
        if expert := judges.sync:
            whole = expert.template == "toy"  # drawn clips are crops already

            def windows(crops):
                return expert.face(crops.to(judges.device).unfold(0, SPAN, 1).movedim(-1, 1))

            self.lips["Sync"] = Lips(windows, expert.size, self.whole if whole else lambda b: face_box([b], "face"))
        if judges.syncnet:
            published = judges.syncnet
            self.lips["LSE"] = Lips(lambda crops: published.face(crops[None].to(judges.device))[0], 224, syncnet_crop)

    def whole(self, _):
        """The largest square in the middle of the picture"""
        H, W = self.shape
        half = min(H, W) / 2
        return W / 2 - half, H / 2 - half, W / 2 + half, H / 2 + half

    def look(self, picture):
        """Detects the face; the box, or the last one found, or None"""
        with torch.autocast(self.judges.device.type, enabled=False):  # the detector wants fp32
            found = detect_faces(picture, margins=(1.2,))
        self.looks, self.found = self.looks + 1, self.found + bool(found)
        if found:
            self.box = np.array(found[0])  # with the points that some detectors give: see vision.face_box
        return self.box

    def follow(self, frames):
        """Detections (n, 4 or more) on a line from the last look to one at the end; the middle if there is none"""
        if not self.judges.follow:
            return np.tile(self.whole(None), (len(frames), 1))
        begin = self.look(frames[0]) if self.box is None else self.box
        end = self.look(frames[-1])
        if end is None:
            begin = end = np.array(self.whole(None))
        return np.linspace(end if begin is None else begin, end, len(frames) + 1)[1:]

    @torch.inference_mode()
    def add(self, frames):
        """frames: uint8 (n, H, W, 3), the next of the clip"""
        judges, self.shape = self.judges, frames.shape[1:3]
        boxes = self.follow(frames)
        some = [k for k in range(len(frames)) if (self.count + k) % judges.every == 0]
        self.count += len(frames)
        if "CPBD" not in judges.skip:
            self.sharp += [cpbd(frames[k]) for k in some]
        for lips in self.lips.values():
            lips.add(frames, boxes)
        if judges.landmarks:
            points = [judges.landmarks(frame, face_box([tuple(box)], "face")) for frame, box in zip(frames, boxes)]
            self.points += [np.full((68, 2), np.nan) if p is None else p for p in points]
        if judges.arcface and some:
            self.who.append(judges.arcface.embed(to_tensor(self.aligned(frames, boxes, some)).to(judges.device)).cpu())
        if judges.inception and some:
            self.moments.add(judges.inception(to_tensor(frames[some]).to(judges.device)))

    def aligned(self, frames, boxes, some):
        """Faces as ArcFace wants them, uint8 (len(some), 112, 112, 3), by landmarks where there are any"""
        faces = []
        for k in some:
            x0, y0, x1, y1 = face_box([tuple(boxes[k])], "face")
            five = CROP_POINTS * (x1 - x0, y1 - y0) + (x0, y0)
            if self.points and np.isfinite(p := self.points[k - len(frames)]).all():
                five = five_points(p)
            faces.append(align_face(frames[k], five))
        return np.stack(faces)

    def faceless(self):
        """Why nothing can be said of a face here, or None"""
        if self.judges.follow and 2 * self.found < self.looks:
            return f"a face in {self.found} of {self.looks} frames looked at"

    @torch.inference_mode()
    def alone(self, wav) -> tuple[dict, dict]:
        """wav (n,) at 16 kHz, or why there is none -> {metric: value} of the clip alone, {metric: why there is none}"""
        values, why = {}, {}
        if np.isfinite(self.sharp).any():
            values["CPBD"] = float(np.nanmean(self.sharp))
        elif self.sharp:
            why["CPBD"] = f"no edge, or less than {BLOCK} px"
        for name, lips in self.lips.items():
            face = None if name == "Sync" and self.judges.sync.template == "toy" else self.faceless()
            if isinstance(wav, str) or face:
                why[name] = face or wav
                continue
            face, sound = torch.cat(lips.out) if lips.out else (), ()
            sound = self.heard_ours(wav, len(face)) if name == "Sync" else self.heard_syncnet(wav, self.count)
            try:
                least, sure, late = lip_sync_error(face[: len(sound)], sound, pad=name == "LSE")
            except ValueError:
                why[name] = f"too short: {self.count} frames, {len(wav) / SAMPLES_PER_FRAME:.1f} frames of sound"
                continue
            values |= {f"{name}-D": least, f"{name}-C": sure, f"{name} offset": late}
        return values, why

    def heard_ours(self, wav, K: int):
        """Our expert's embeddings of sound, one for each window of frames that has sound"""
        K = min(K, n_frames(len(wav)) - SPAN + 1)
        if K <= 0:
            return ()
        parts = torch.from_numpy(mel_windows(log_mel(wav), HALF + np.arange(K))).to(self.judges.device).split(128)
        return torch.cat([self.judges.sync.sound(part) for part in parts]).float()

    def heard_syncnet(self, wav, frames: int):
        """SyncNet v2's: window k hears MFCC steps 4 k .. 4 k + 19. As in its script, one window fewer than would fit."""
        steps, K = mfcc(wav), min(frames, len(wav) // SAMPLES_PER_FRAME) - SPAN
        if K <= 0:
            return ()
        windows = np.lib.stride_tricks.sliding_window_view(steps, 20, 1)[:, ::4].swapaxes(0, 1)[:K]  # (K, 13, 20)
        parts = torch.from_numpy(windows.astype(np.float32)).to(self.judges.device).split(128)
        return torch.cat([self.judges.syncnet.sound(part) for part in parts]).float()


# ---------------------------------------------------------------------------------------------------------------------
# pairs of clips

def chunks(path):
    """Frames of a video, uint8 (n, H, W, 3), n up to CHUNK. InputError: as read_video; frames of several sizes."""
    stream = read_video(path)
    while frames := list(islice(stream, CHUNK)):
        if any(f.shape != frames[0].shape for f in frames):
            raise InputError(f"{path}: its frames have several sizes")
        yield np.stack(frames)


def brought_to(frames, shape, name):
    """uint8 (n, H, W, 3) -> (n, *shape), resized. InputError: another shape of picture altogether."""
    (h, w), (H, W) = frames.shape[1:3], shape[:2]
    if abs(np.log(w * H / (h * W))) > 0.02:  # ours: 2 % is what rounding a small side makes
        raise InputError(f"{name}: frames are {w}x{h}, those of the real clip are {W}x{H}")
    return np.stack([np.asarray(Image.fromarray(f).resize((W, H), Image.Resampling.LANCZOS)) for f in frames])


def sound_of(path):
    """Samples (n,), or why there are none"""
    try:
        return load_audio(path, level=False)  # as published
    except InputError as error:
        return str(error).removeprefix(f"{Path(path).absolute()}: ")


def measure(real, fake, judges) -> dict:
    """One pair of clips -> dict(real=values, fake=values, frames, notes, watches).

    Frames are compared one by one from the first on, as many as both have, a fake of another size after resizing; both
    are said in the notes. Raises InputError: a file that cannot be read, shapes that differ.
    """
    watches, per_frame, notes, counts = (Watch(judges), Watch(judges)), {}, [], np.zeros(2, int)
    for pair in zip_longest(chunks(real), chunks(fake)):
        counts += [0 if frames is None else len(frames) for frames in pair]
        if any(frames is None for frames in pair):
            continue  # the rest of the longer one is only counted, and must be whole
        a, b = (frames[: min(map(len, pair))] for frames in pair)
        if a.shape != b.shape:
            notes = [f"resized from {b.shape[2]}x{b.shape[1]} to {a.shape[2]}x{a.shape[1]}"]
            b = brought_to(b, a.shape[1:], fake)
        for name, values in compare(a, b, judges, watches[0].count).items():
            per_frame.setdefault(name, []).append(values)
        watches[0].add(a)
        watches[1].add(b)
    if counts[0] != counts[1]:
        notes.append(f"{counts[1]} frames, the real clip has {counts[0]}: {counts.min()} compared")
    values = {name: mean_of(np.concatenate(v)) for name, v in per_frame.items()}
    small = {name: f"{a.shape[2]}x{a.shape[1]} px are too few" for name, v in values.items() if np.isnan(v)}
    shapes, none = between(*watches)
    (own, own_none), (fakes, fakes_none) = (w.alone(sound_of(path)) for w, path in zip(watches, (real, fake)))
    notes += [f"{name}: {reason}" for name, reason in (small | none | fakes_none).items()]
    notes += [f"{name} of the real clip: {reason}" for name, reason in own_none.items()]
    values = {name: v for name, v in (values | shapes | fakes).items() if name not in small}
    return dict(real=own, fake=values, frames=int(counts.min()), notes=notes, watches=watches)


@torch.inference_mode()
def compare(real, fake, judges, begin: int) -> dict:
    """Chunks (n, H, W, 3) of two clips, which begin at frame `begin` -> {metric: its values a frame}; NaN: too small"""
    values = dict(PSNR=psnr(real, fake), L1=l1(real, fake))
    if not judges.skip.keys() >= {"SSIM", "MS-SSIM"}:
        small = min(real.shape[1:3]) < 11
        similar = [np.full(len(real), np.nan)] * 2 if small else ssim_and_ms_ssim(real, fake)
        values |= zip(("SSIM", "MS-SSIM"), similar)
    some = [k for k in range(len(real)) if (begin + k) % judges.every == 0]
    if judges.lpips and some:
        tensors = (to_tensor(frames[some]).to(judges.device) for frames in (real, fake))
        values["LPIPS"] = judges.lpips(*tensors).double().cpu().numpy()
    return values


def between(real: Watch, fake: Watch) -> tuple[dict, dict]:
    """Two watched clips -> {metric: value} of what lies between them, {metric: why there is none}"""
    values, why, faceless = {}, {}, real.faceless() or fake.faceless()
    if real.points:
        a, b = np.stack(real.points), np.stack(fake.points)
        seen = np.isfinite(a).all((1, 2)) & np.isfinite(b).all((1, 2))
        if faceless or 2 * seen.sum() < len(seen):
            why["landmarks"] = faceless or f"a face in {seen.sum()} of {len(seen)} frames of both"
        else:
            a, b = a[seen], b[seen]
            unit = real.shape[0] / 256
            found = dict(LMD=landmark_distance(a, b) / unit, pose=np.abs(head_pose(a) - head_pose(b)),
                         blink=np.abs(eye_opening(a) - eye_opening(b)))
            found["mouth LMD"] = mouth_distance(a, b) / unit
            values |= {name: float(v.mean()) for name, v in found.items()}
    if real.who:
        if faceless:
            why["CSIM"] = faceless
        else:
            values["CSIM"] = float((torch.cat(real.who) * torch.cat(fake.who)).sum(1).mean())
    return values, why


def pairs_of(real: Path, fake: Path) -> tuple[list, list]:
    """Two files, or two folders -> [(name, real file, fake file)], names without a partner. InputError: no pair."""
    if real.is_dir() != fake.is_dir():
        raise InputError(f"{real} and {fake}: one is a directory, one is not")
    if not real.is_dir():
        return [(fake.name, check_file(real), check_file(fake))], []
    sides = []
    for folder in (real, fake):
        clips = {}
        for path in sorted(folder.rglob("*")):
            name = unicodedata.normalize("NFC", str(path.relative_to(folder).with_suffix("")))  # a Mac splits letters
            if path.is_file() and path.suffix.lower() in VIDEOS and not path.name.startswith("."):
                if name in clips:
                    raise InputError(f"{path}: {clips[name].name} beside it has the same name")
                clips[name] = path
        sides.append(clips)
    names = sorted(sides[0].keys() & sides[1].keys())
    if not names:
        raise InputError(f"{real} and {fake}: no clip here has the name of one there")
    alone = [str(side[name]) for side in sides for name in sorted(side) if name not in names]
    return [(name, sides[0][name], sides[1][name]) for name in names], alone


# ---------------------------------------------------------------------------------------------------------------------
# the table

def mean_of(values) -> float:
    """Mean without what is infinite (the PSNR of a frame that is equal), unless all of it is"""
    values = np.asarray(values, float)
    return float(values[~np.isinf(values)].mean() if not np.isinf(values).all() else values.mean())


def mean_rows(pairs: list[dict]) -> tuple[dict, dict]:
    """Measured pairs -> the row of the real clips, each against itself, and that of the fakes: means over the pairs"""
    def mean(side, name):
        values = [pair[side][name] for pair in pairs if name in pair[side]]
        return mean_of(np.abs(values) if "offset" in name else values) if values else None

    fake = {name: value for name in METRICS if (value := mean("fake", name)) is not None}
    real = {name: mean("real", name) if METRICS[name].itself is None else METRICS[name].itself for name in fake}
    return real, fake


def cell(name: str, value) -> str:
    return "–" if value is None else f"{value:.{METRICS[name].digits}f}"


def heading(name: str) -> str:
    """LMD -> "LMD, px ↓" """
    unit = METRICS[name].unit
    return f"{name}{', ' if unit else ''}{unit} {dict(higher='↑', lower='↓')[METRICS[name].better]}"


def evaluate(args, device):
    """The table of `python evaluate.py real fake`; see the top."""
    begin = time.perf_counter()
    if args.json:
        check_output(args.json, overwrite=True)  # before minutes of work
    pairs, alone = pairs_of(*map(Path, args.clips))
    judges, missing = judges_at_hand(args, device)
    measured, reports, moments = [], [], (Moments(), Moments())
    for name, real, fake in tqdm(pairs, "pairs", disable=None):
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                pair = measure(real, fake, judges)
        except InputError as error:
            if len(pairs) == 1:
                raise
            reports.append(dict(name=name, error=str(error)))
            continue
        for total, watch in zip(moments, pair.pop("watches")):
            total.merge(watch.moments)
        measured.append(pair)
        reports.append(dict(name=name) | pair)
    if not measured:
        raise InputError(f"none of {len(pairs)} pairs could be measured; the first: {reports[0]['error']}")
    real, fake = mean_rows(measured)
    if judges.inception and min(m.n for m in moments) > 1:
        real["FID"], fake["FID"] = METRICS["FID"].itself, frechet_distance(*moments)
    rows = {"real, against itself": real, os.path.basename(os.path.abspath(args.clips[1])): fake}
    order = [name for name in METRICS if name in fake and name not in missing]
    seconds, frames = time.perf_counter() - begin, sum(pair["frames"] for pair in measured)
    print(markdown({row: {heading(k): cell(k, values.get(k)) for k in order} for row, values in rows.items()}))
    print(f"\n{len(measured)} pairs, {frames} frames, {seconds:.1f} s")
    lines = said(args, judges, missing, reports, alone, moments[0].n)
    print("\n".join(lines))
    if args.json:
        versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
        versions["revision"] = revision()
        columns = {name: METRICS[name]._asdict() for name in order}
        Path(args.json).write_text(json.dumps(finite(dict(
            rows={row: {name: values.get(name) for name in order} for row, values in rows.items()}, columns=columns,
            pairs=reports, frames=frames, seconds=seconds, left_out=missing, alone=alone, said=lines, every=args.every,
            versions=versions, device=str(device))), indent=1, allow_nan=False))


def said(args, judges, missing, reports, alone, n: int) -> list[str]:
    """What a reader of the table must know: who scored, what is left out, what was odd about which pair; lines"""
    lines = []
    if judges.syncnet:
        lines.append(f"LSE scored by SyncNet v2, as published: {checkpoint.PUBLISHED['syncnet_v2'].file}")
    if judges.sync:
        lines.append(f"Sync scored by our expert: {args.expert or EXPERT.name}")
    if judges.syncnet or judges.sync:
        lines.append(f"the fakes were trained with the expert: {args.trained_with or 'not said (--trained-with)'}")
        if args.trained_with and judges.sync and same_file(args.trained_with, args.expert or EXPERT):
            lines[-1] += ": THE ONE THAT SCORES, which flatters them"
    if judges.landmarks:
        lines.append(f"landmarks by {judges.landmarks.name}")
    if judges.inception and n < 2048:
        lines.append(f"FID is from {n} frames a side: with fewer than the 2048 features it comes out too high")
    reasons = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"left out: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    whose = {}
    for pair in reports:
        for note in [f"left out: {pair['error']}"] if "error" in pair else pair["notes"]:
            whose.setdefault(note, []).append(pair["name"])
    for note, names in whose.items():  # what many have in common is said once
        lines += [f"{name}: {note}" for name in names] if len(names) <= 3 else [f"{len(names)} pairs: {note}"]
    return lines + [f"without a partner: {path}" for path in alone]


def same_file(a, b) -> bool:
    try:
        return Path(a).read_bytes() == Path(b).read_bytes()
    except OSError:  # a word, not a file
        return str(a) == str(b)


def finite(value):
    """JSON knows no infinity: it becomes the string "inf" """
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def parse(argv=None):
    p = Parser(description="measure pairs of clips, or control on the toy world",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("clips", nargs="*", help="real and generated: two clips, or two folders whose clips pair by name")
    p.add_argument("--landmarker", help="MediaPipe's face_landmarker.task, for landmarks (pip install mediapipe)")
    p.add_argument("--expert", help="our sync expert, or wav2lip; default: weights/sync.pt beside this file")
    p.add_argument("--trained-with", help="the sync expert that the generated clips were trained with, for the record")
    p.add_argument("--fetch", action="store_true", help="download the judges that are missing (about 1 GB in all)")
    p.add_argument("--path", action="append", default=[], metavar="NAME=FILE",
                   help=f"your copy of a judge's weights; NAME: {', '.join(FILES)}")
    p.add_argument("--skip", default="", help="metrics to leave out, with commas between: LPIPS,FID")
    p.add_argument("--every", type=int, default=5, help="CPBD, LPIPS, CSIM and FID look at every so many frames")
    p.add_argument("--bf16", action="store_true", help="networks compute in bf16: faster where the CPU can, less exact")
    p.add_argument("--toy", nargs="+", help="weights trained on the toy world, in place of clips; "
                   "of a stage2.pt its inversion alone")
    p.add_argument("--people", type=int, default=32, help="toy world: people held out for good")
    p.add_argument("--first-person", type=int, default=TEST, help="toy world: the first of them")
    p.add_argument("--cache", default="out/evaluate", help="toy world: where the probe and its drawn people are kept")
    p.add_argument("--json", help="write the numbers there, too")
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    if bool(args.toy) == bool(args.clips) or len(args.clips) not in (0, 2):
        raise InputError("give two clips or two folders, real and generated, or --toy weights.pt")
    return args


def main(argv=None):
    args = parse(argv)
    with contextlib.ExitStack() as args.at_end:
        (toy_report if args.toy else evaluate)(args, pick_device(args.device))


if __name__ == "__main__":
    run(main)
