"""Metrics of talking clips: image quality, landmarks, identity and lip sync of generated clips against real ones.

    python evaluate.py pair real/ fake/       # clips of two folders, paired by name: one table  (a second a pair, 1 core)
    python evaluate.py pair real.mp4 fake.mp4 --landmarks mediapipe:face_landmarker.task --json numbers.json
    python evaluate.py toy weights/toy.pt     # the control table of the toy world, see control.py    (3 minutes, 2 cores)

METRICS lists each metric with its unit and source. Frames are read in chunks, both clips side by side, so memory does not
grow with their length. A metric whose weights are missing is left out by name, with the reason.

Differs from the metrics' papers: the face is detected every three seconds and its box interpolated, where SyncNet's
scripts detect it in every frame and smooth; LPIPS, CSIM and FID take every fifth frame.

Axes: n images or frames, K windows of five frames, E embedding, S offsets, H W.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import time
import unicodedata
from itertools import islice, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from media import (  # before torch, see there
    SAMPLES_PER_FRAME, InputError, Parser, check_file, check_output, load_audio, read_video, run, to_tensor)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import judges as published
from audio import log_mel, mel_windows, mfcc, n_frames
from checkpoint import PUBLISHED, checkpoints_dir, fetch, pick_device, read_weights, refusing, revision
from control import markdown, toy_report
from faces import (
    ARCFACE_POINTS, crop_face, detect_faces, face_box, face_detectors, landmark_detector, middle_square, need_detector,
    resized, similarity, to_complex, warp_face)
from landmarks import load_landmarks, read_eyes, track_landmarks
from report import pairs_page
from syncnet import HALF, MAX_OFFSET, SPAN, embed_frames, load_sync
from warp import angles, fit_pose

CHUNK = 75  # frames read at a time: the face is detected once in each
EVERY = 5  # LPIPS, CSIM and FID take every fifth frame: neighbours are nearly equal, and the networks are slow
EXPERT = Path(__file__).parent / "weights" / "sync.pt"
VIDEOS = (".mp4", ".mov", ".mkv", ".m4v", ".avi", ".mpg", ".mpeg", ".webm", ".gif")  # clips in a folder


class Metric(NamedTuple):
    """A column: unit, better ("higher" or "lower"), the value of a clip against itself (None: a property of one clip),
    digits printed, meaning and source, the usual value of real clips where it is not obvious"""

    unit: str
    better: str
    itself: float | None
    digits: int
    what: str
    usual: str = ""


METRICS = {
    "SSIM": Metric("", "higher", 1, 3, "structural similarity, windows of 11 px, colour; Wang et al. 2004"),
    "MS-SSIM": Metric("", "higher", 1, 3, "the same over five scales, 176 px or more; Wang et al. 2003"),
    "PSNR": Metric("dB", "higher", float("inf"), 2, "peak signal-to-noise ratio, mean over frames that differ"),
    "LPIPS": Metric("", "lower", 0, 3, "distance of VGG16's features, every fifth frame; Zhang et al. 2018"),
    "L1": Metric("", "lower", 0, 4, "mean absolute difference, white being 1"),
    "LMD": Metric("px", "lower", 0, 2, "distance of 68 landmarks, frames scaled to a height of 256; Chen et al. 2018"),
    "mouth LMD": Metric("px", "lower", 0, 2, "the same of the mouth's 20, both mouths centred; Chen et al. 2018"),
    "pose": Metric("deg", "lower", 0, 2, "mean difference of yaw, pitch and roll; see head_pose"),
    "blink": Metric("", "lower", 0, 3, "difference of the eyes' aspect ratio (open .3, shut .1); Soukupova & Cech 2016"),
    "lip dynamics": Metric("px", "as real", None, 2, "deviation over time of distances within the mouth; THEval, 2025"),
    "silent lips": Metric("", "as real", None, 4, "deviation of the lips' gap in pauses, in eye distances; THEval"),
    "lip-sync": Metric("", "as real", None, 3, "difference of the lips' gap and loudness in speech, each 0 to 1; THEval"),
    "brow dynamics": Metric("px", "as real", None, 2, "as lip dynamics, of the brows; THEval"),
    "head motion": Metric("deg", "as real", None, 2, "deviation over time of yaw, pitch and roll; after THEval"),
    "motion": Metric("", "higher", 1, 3, "mean over these five of 1 - |fake - real| / real, clip by clip; THEval"),
    "CSIM": Metric("", "higher", 1, 3, "cosine of ArcFace's identity embeddings, every fifth frame"),
    "FID": Metric("", "lower", 0, 2, "Frechet distance of Inception's features, every fifth frame; Heusel et al. 2017"),
    "LSE-D": Metric("", "lower", None, 3, "distance of lips and sound at the best offset, SyncNet v2; Wav2Lip, 2020",
                    "6.7 to 7.0 (Wav2Lip's table: LRW, LRS2, LRS3)"),
    "LSE-C": Metric("", "higher", None, 3, "median over the offsets less that distance, SyncNet v2; Wav2Lip, 2020",
                    "6.9 to 7.8 (Wav2Lip's table: LRW, LRS2, LRS3)"),
    "LSE offset": Metric("frames", "lower", None, 2, "size of that offset, which LSE itself does not punish"),
    "Sync-D": Metric("", "lower", None, 3, "as LSE-D, by our expert, whose embeddings have unit length",
                     "1.15 to 1.19 (GRID, seven speakers)"),
    "Sync-C": Metric("", "higher", None, 3, "as LSE-C, by our expert",
                     "0.15 to 0.21 (GRID, seven speakers)"),
    "Sync offset": Metric("frames", "lower", None, 2, "size of that offset"),
}  # fmt: skip
MOTION = ("lip dynamics", "silent lips", "lip-sync", "brow dynamics", "head motion")
LANDMARKS = ("LMD", "mouth LMD", "pose", "blink", *MOTION, "motion")
LSE, SYNC = ("LSE-D", "LSE-C", "LSE offset"), tuple(METRICS)[-3:]


# ---------------------------------------------------------------------------------------------------------------------
# image metrics: uint8 images (n, H, W, 3) -> float64 (n,)

def l1(a, b) -> np.ndarray:
    """Mean absolute difference in [0, 1]; 0 is equal."""
    return np.abs(a.astype(np.int16) - b).mean((-3, -2, -1)) / 255


def psnr(a, b) -> np.ndarray:
    """Peak signal-to-noise ratio in dB; inf is equal, above 30 is close."""
    mse = np.square(a.astype(np.int16) - b, dtype=np.int32).mean((-3, -2, -1))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / mse)


WINDOW = torch.exp(-torch.arange(-5.0, 6).square() / (2 * 1.5**2))  # Wang et al. 2004: 11 pixels, deviation 1.5
WINDOW = (WINDOW / WINDOW.sum()).view(1, 1, 11, 1).repeat(12, 1, 1, 1)
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, measured on people, fine to coarse


def ssim_and_cs(x, y):
    """Images (1, 3, H, W) of 0..255, H, W >= 11 -> SSIM of each channel (3,), and its contrast-structure part (3,).

    In terms of x + y and x - y: 4 cov = var(x + y) - var(x - y), 2 (var x + var y) is their sum, and so for the means.
    The same value, and a small difference keeps its digits in float32.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    maps = torch.cat([x + y, x - y], 1)
    maps = torch.cat([maps, maps.square()], 1)  # channels last, and a group each: the fastest convolution on a CPU
    means = F.conv2d(F.conv2d(maps, WINDOW, groups=12), WINDOW.mT, groups=12)
    mean_sum, mean_diff, square_sum, square_diff = means[0].unflatten(0, (4, 3))
    mean_sum, mean_diff = mean_sum.square(), mean_diff.square()
    var_sum, var_diff = square_sum - mean_sum, square_diff - mean_diff
    cs = (var_sum - var_diff + 2 * c2) / (var_sum + var_diff + 2 * c2)
    luminance = (mean_sum - mean_diff + 2 * c1) / (mean_sum + mean_diff + 2 * c1)
    return (luminance * cs).mean((1, 2)), cs.mean((1, 2))


@torch.inference_mode()
def ssim_and_ms_ssim(a, b) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and MS-SSIM, means over the channels; 1 is equal. MS-SSIM is NaN below 176 px: the last scale has no window.

    MS-SSIM is the product of the contrast-structure of each scale and the SSIM of the last, each to the power of its
    weight; negative values count as 0. A scale is the mean of 2x2 pixels of the one before.
    """
    values = []
    for images in zip(a, b):  # one pair at a time bounds memory
        x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].float() for image in images)
        scales = []
        while len(scales) < len(SCALES) and min(x.shape[2:]) >= 11:
            scales.append(ssim_and_cs(x, y))
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        terms = [cs for _, cs in scales[:-1]] + [scales[-1][0]]
        product = math.prod(term.clamp_min(0) ** weight for term, weight in zip(terms, SCALES))
        values.append((scales[0][0].mean(), product.mean() if len(scales) == len(SCALES) else torch.nan))
    return tuple(np.array(values, float).T)


class Inception:
    """FID's network (Szegedy et al. 2015, as Heusel et al. 2017 use it): images (N, 3, H, W) in [-1, 1] -> (N, 2048).

    TensorFlow's weights of 2015-12-05 under torchvision's names, as pytorch-fid ports them: average pools do not count
    their padding, and the last block pools by maximum. Images are brought to 299 px bilinearly, without prefilter.
    """

    def __init__(self, device, path: str | Path | None = None):
        """path: your copy of pytorch-fid's file; None fetches it. Raises InputError."""
        path = fetch("inception", path)
        with refusing(path, "not the weights of Inception"):
            self.weights = {name: value.float().to(device) for name, value in read_weights(path).items()}
            self(torch.zeros(1, 3, 299, 299, device=device))

    def conv(self, x, name, stride=1, padding=0):
        """Convolution, BatchNorm, ReLU"""
        w = self.weights
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        statistics = (w[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *statistics, eps=0.001))

    def chain(self, x, name, *layers):
        """Convolutions name_1, name_2, ..; layers: the padding of each, or "half" for stride 2 without padding"""
        for k, padding in enumerate(layers, 1):
            x = self.conv(x, f"{name}_{k}", *((2, 0) if padding == "half" else (1, padding)))
        return x

    def fork(self, x, name):
        return [self.conv(x, f"{name}a", 1, (0, 1)), self.conv(x, f"{name}b", 1, (1, 0))]

    @torch.inference_mode()
    def __call__(self, x):
        conv, chain, row, column = self.conv, self.chain, (0, 3), (3, 0)
        published.check_images(x, 1)
        x = conv(resized(x, 299), "Conv2d_1a_3x3", 2)                                     # (N, 32, 149, 149)
        x = conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)                         # (N, 64, 147, 147)
        x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")           # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)
        for b in ("Mixed_5b.branch", "Mixed_5c.branch", "Mixed_5d.branch"):               # (N, 288, 35, 35)
            x = torch.cat([conv(x, f"{b}1x1"), chain(x, f"{b}5x5", 0, 2), chain(x, f"{b}3x3dbl", 0, 1, 1),
                           conv(average(x), f"{b}_pool")], 1)
        b = "Mixed_6a.branch"                                                             # (N, 768, 17, 17)
        x = torch.cat([conv(x, f"{b}3x3", 2), chain(x, f"{b}3x3dbl", 0, 1, "half"), F.max_pool2d(x, 3, 2)], 1)
        for b in ("Mixed_6b.branch", "Mixed_6c.branch", "Mixed_6d.branch", "Mixed_6e.branch"):
            x = torch.cat([conv(x, f"{b}1x1"), chain(x, f"{b}7x7", 0, row, column),
                           chain(x, f"{b}7x7dbl", 0, column, row, column, row), conv(average(x), f"{b}_pool")], 1)
        b = "Mixed_7a.branch"                                                             # (N, 1280, 8, 8)
        x = torch.cat([chain(x, f"{b}3x3", 0, "half"), chain(x, f"{b}7x7x3", 0, row, column, "half"),
                       F.max_pool2d(x, 3, 2)], 1)
        for b, pool in (("Mixed_7b.branch", average), ("Mixed_7c.branch", lambda x: F.max_pool2d(x, 3, 1, 1))):
            x = torch.cat([conv(x, f"{b}1x1"), *self.fork(conv(x, f"{b}3x3_1"), f"{b}3x3_2"),
                           *self.fork(chain(x, f"{b}3x3dbl", 0, 1), f"{b}3x3dbl_3"), conv(pool(x), f"{b}_pool")], 1)
        return x.mean((2, 3))                                                             # (N, 2048)


def average(x):
    """Means of 3x3 pixels, of those that are inside"""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def frechet_distance(a, b) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two sets of features (n, E); 0 is equal. Heusel et al. 2017.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^1/2 C_b C_a^1/2. That matrix is symmetric, so
    sets of fewer images than features need no small number added.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(apart + cov_a.trace() + cov_b.trace() - 2 * shared))


# ---------------------------------------------------------------------------------------------------------------------
# landmark metrics: iBUG's 68 points (n, 68, 2) in pixels, x to the right, y down

MOUTH, BROWS = slice(48, 68), slice(17, 27)
LEFT_EYE, RIGHT_EYE = slice(36, 42), slice(42, 48)  # left and right of the image
UPPER_LIP, LOWER_LIP = [61, 62, 63], [67, 66, 65]  # inner line
# eyes, tip of the nose and corners of the mouth in a crop of faces.TEMPLATES["face"], as fractions, where there are no
# landmarks: eyes and height of the mouth as there, the rest by the proportions of ARCFACE_POINTS
CROP_POINTS = np.array([(0.302, 0.298), (0.698, 0.298), (0.5, 0.51), (0.336, 0.723), (0.664, 0.723)])


def landmark_distance(a, b) -> np.ndarray:
    """Mean distance of corresponding landmarks, (n, L, 2) twice -> (n,) in their unit; 0 is equal. Chen et al. 2018."""
    return np.linalg.norm(a - b, axis=-1).mean(-1)


def mouth_distance(a, b) -> np.ndarray:
    """Landmark distance of two mouths, each about its own centre, so the head's position does not count: (n, 68, 2)
    twice -> (n,); 0 is the same shape. Chen et al. 2018."""
    a, b = (p[:, MOUTH] - p[:, MOUTH].mean(1, keepdims=True) for p in (a, b))
    return landmark_distance(a, b)


def head_pose(points) -> np.ndarray:
    """Landmarks (n, 68, 2) -> yaw, pitch, roll (n, 3) in degrees: towards the image's right, chin up, clockwise; see
    warp.fit_pose. A face unlike the mean shape has a constant error, which cancels between two clips of one person."""
    mean = load_landmarks().solid.double().numpy()
    return np.array([angles(fit_pose(p, mean)[1]) for p in points])


def five_points(points):
    """Landmarks (68, 2) -> eyes, tip of the nose, corners of the mouth (5, 2)"""
    return np.stack([points[LEFT_EYE].mean(0), points[RIGHT_EYE].mean(0), points[30], points[48], points[54]])


def align_face(image, five) -> np.ndarray:
    """uint8 (H, W, 3) and five points in it (5, 2) -> uint8 (112, 112, 3), by the similarity transform that brings them
    nearest to ARCFACE_POINTS."""
    return warp_face(image, *similarity(to_complex(ARCFACE_POINTS), to_complex(np.asarray(five, float))), 112)


# ---------------------------------------------------------------------------------------------------------------------
# motion and silence, after THEval (CVPR 2026, arXiv 2511.04520), which has MediaPipe's 40 points of the lips and 8 gaps
# between them for our 20 and 3

GATE = 30  # dB below a clip's loudest twentieth: silence where there is no voice detector (ours)
PAUSE = 8  # frames: a shorter silence is speech (THEval: .3 s)


@functools.cache
def voice_detector():
    """Silero's network, where its package is installed, else None"""
    try:
        import silero_vad
    except ImportError:
        return None
    return functools.partial(silero_vad.get_speech_timestamps, model=silero_vad.load_silero_vad())


def loudness(wav, T: int) -> np.ndarray:
    """Sound (n,) -> (T,) root mean square of 50 ms about the middle of each frame"""
    wav = np.pad(wav, (80, max(80, T * SAMPLES_PER_FRAME + 80 - len(wav))))
    windows = np.lib.stride_tricks.sliding_window_view(wav, 800)[::SAMPLES_PER_FRAME][:T]
    return np.sqrt(np.square(windows, dtype=float).mean(1))


def speech_frames(wav, T: int) -> np.ndarray:
    """Sound (n,) -> (T,) whether a frame lies in speech: by Silero's detector or, without it, louder than GATE"""
    speech = np.zeros(T, bool)
    if detector := voice_detector():
        for part in detector(torch.from_numpy(wav)):
            speech[part["start"] // SAMPLES_PER_FRAME : -(-part["end"] // SAMPLES_PER_FRAME)] = True
    else:
        level = loudness(wav, T)
        speech = level > np.percentile(level, 95) * 10 ** (-GATE / 20)
    for begin, end in np.flatnonzero(np.diff(speech, prepend=True, append=True)).reshape(-1, 2):
        speech[begin:end] |= end - begin < PAUSE
    return speech


def dynamics(points) -> float:
    """Points (T, k, 2) -> mean over all pairs of points of the deviation over time of their distance"""
    i, j = np.triu_indices(points.shape[1], 1)
    return float(np.linalg.norm(points[:, i] - points[:, j], axis=-1).std(0).mean())


def motion_metrics(points, wav, height: int) -> dict:
    """Landmarks of a clip (T, 68, 2), NaN where there are none, its sound or None, the height of its frames -> {metric:
    value}. Those of silence and of speech need as many such frames as a pause has."""
    there = np.isfinite(points).all((1, 2))
    p = points[there]
    values = {"lip dynamics": dynamics(p[:, MOUTH]) * 256 / height, "brow dynamics": dynamics(p[:, BROWS]) * 256 / height,
              "head motion": float(head_pose(p).std(0).mean())}
    if wav is not None:
        speech, level = speech_frames(wav, len(points))[there], loudness(wav, len(points))[there]
        gap = np.linalg.norm(p[:, LOWER_LIP] - p[:, UPPER_LIP], axis=-1).mean(1)
        gap /= np.linalg.norm(p[:, 45] - p[:, 36], axis=-1)
        if (~speech).sum() >= PAUSE:
            values["silent lips"] = float(np.median(np.abs(gap[~speech] - gap[~speech].mean())))
        if speech.sum() >= PAUSE:
            scaled = [(x[speech] - x[speech].min()) / max(np.ptp(x[speech]), 1e-9) for x in (gap, level)]
            values["lip-sync"] = float(np.abs(scaled[0] - scaled[1]).mean())
    return values


def closeness(real: dict, fake: dict) -> dict:
    """Values of MOTION -> 1 - |fake - real| / real of each, and "motion", their mean"""
    found = {k: 1 - abs(fake[k] - real[k]) / max(real[k], 1e-9) for k in MOTION if k in fake and real.get(k) is not None}
    return found | (dict(motion=float(np.mean(list(found.values())))) if found else {})


# ---------------------------------------------------------------------------------------------------------------------
# lip sync

def lip_sync_error(face, sound, reach: int = MAX_OFFSET, pad: bool = True):
    """Embeddings (K, E) of windows of frames and of sound -> D, C, and by how many frames the sound is late.

    At each offset d of -reach .. reach, the mean over k of the Euclidean distance of face k to sound k + d. D is the
    least (lower is better), C the median less D (higher is better). SyncNet (Chung and Zisserman 2016); Wav2Lip
    (Prajwal et al. 2020) calls them LSE-D and LSE-C. SyncNet's script gives the offset the other sign.

    pad: as published, sound beyond either end is an embedding of zeros; else such pairs do not count, nor offsets that
    fewer than half of the windows have. ValueError: no window.
    """
    K = len(face)
    if not K or len(sound) != K:
        raise ValueError(f"{K} windows of frames, {len(sound)} of sound")
    padded = F.pad(sound, (0, 0, reach, reach), value=0.0 if pad else torch.nan)
    distances = torch.stack([F.pairwise_distance(face, padded[d : d + K]) for d in range(2 * reach + 1)], 1)  # (K, S)
    means = distances.nanmean(0)
    means[2 * distances.isfinite().sum(0) < K] = torch.nan
    best = int(means.nan_to_num(torch.inf).argmin())
    distance = float(means[best])
    return distance, float(means.nanmedian()) - distance, best - reach


def sync_sound(expert, wav, K: int):
    """Our expert's embeddings of up to K windows of sound, of those that lie in the sound (empty: none does)"""
    K = min(K, n_frames(len(wav)) - SPAN + 1)
    return embed_sound(expert, mel_windows(log_mel(wav), HALF + np.arange(K))) if K > 0 else ()


def lse_sound(network, wav, frames: int):
    """SyncNet v2's: window k is MFCC steps 4 k .. 4 k + 19. As in its script, one window fewer than would fit."""
    K = min(frames, len(wav) // SAMPLES_PER_FRAME) - SPAN
    if K <= 0:
        return ()
    windows = np.lib.stride_tricks.sliding_window_view(mfcc(wav), 20, 1)[:, ::4].swapaxes(0, 1)  # (.., 13, 20)
    return embed_sound(network, windows[:K].astype(np.float32))


def embed_sound(network, windows):
    device = next(network.parameters()).device
    return torch.cat([network.sound(part.to(device)) for part in torch.from_numpy(windows).split(128)]).float()


class FaceWindows:
    """Embeddings of all windows of five frames of a stream of face crops; keeps the last four crops."""

    def __init__(self, embed, size: int, crop):
        """embed: crops (n, 3, size, size) in [-1, 1], n >= 5 -> (n - 4, E). crop: detection -> its box, in pixels."""
        self.embed, self.size, self.crop, self.last, self.embeddings = embed, size, crop, None, []

    def add(self, frames, detections):
        crops = to_tensor(np.stack([crop_face(f, self.crop(d), self.size) for f, d in zip(frames, detections)]))
        crops = crops if self.last is None else torch.cat([self.last, crops])
        if len(crops) >= SPAN:
            self.embeddings.append(self.embed(crops).float())
        self.last = crops[-(SPAN - 1) :]


# ---------------------------------------------------------------------------------------------------------------------
# the networks at hand

FILES = ("vgg16", "lpips_heads", "arcface", "syncnet_v2", "inception")  # of checkpoint.PUBLISHED: what --path can name


def load_networks(args, device, stack) -> tuple[SimpleNamespace, dict]:
    """Networks that measure, None where they are missing, and {metric: why it is left out}.

    stack: the ExitStack that closes the landmark detector. Raises InputError: a file that the user named is not what it
    should be.
    """
    missing = {name.strip(): "--skip" for name in args.skip.split(",") if name.strip()}
    paths = dict(item.partition("=")[::2] for item in args.path)
    for name in missing.keys() - METRICS.keys():
        raise InputError(f"--skip {name}: not a metric; there are {', '.join(METRICS)}")
    for name in paths.keys() - set(FILES):
        raise InputError(f"--path {name}: expected NAME=FILE, NAME being {', '.join(FILES)}")
    paths = {name: check_file(path) for name, path in paths.items()}

    def network(metrics, load, *files, named=False, detector=True):
        """load(device, path of each file), or None where it is skipped or cannot be had. That is an error where the user
        named a file of it."""
        if missing.keys() >= set(metrics):
            return None
        try:
            for name in files:
                target = checkpoints_dir() / PUBLISHED[name].file
                if not (args.fetch or name in paths or target.is_file()):
                    raise InputError(f"{target.name} is not in {target.parent} (--fetch downloads what is missing)")
            if detector:
                need_detector()
            return load(device, *(paths.get(name) for name in files))
        except InputError as error:
            if named or any(name in paths for name in files):
                raise
            missing.update({metric: str(error) for metric in metrics if metric not in missing})

    def expert(device):
        """syncnet.py's; one for real faces needs a detector"""
        found = load_sync(args.expert or EXPERT, device)
        if found.template != "toy":
            need_detector()
        return found

    def landmarks(device, *_):
        """Frames (n, H, W, 3), n boxes or None -> points (68, 2) or None of each"""
        if not args.landmarks:
            need_detector()
            net = load_landmarks()
            return lambda frames, boxes: track_landmarks(net, frames, boxes[0])
        mediapipe = args.landmarks.startswith("mediapipe:")                   # it can search in all of the frame
        whole = mediapipe and not face_detectors()
        found = stack.enter_context(landmark_detector(args.landmarks, None if whole else "face", device))
        if not mediapipe:
            need_detector()
        return lambda frames, boxes: map(found, frames, boxes)

    fan = args.landmarks == "fan"
    found = SimpleNamespace(device=device, skip=missing.copy())
    found.sync = network(SYNC, expert, named=args.expert, detector=False)
    found.landmarks = network(LANDMARKS, landmarks, *["fan"] * fan, named=args.landmarks and not fan, detector=False)
    found.lpips = network(("LPIPS",), published.lpips, "vgg16", "lpips_heads", detector=False)
    found.arcface = network(("CSIM",), published.arcface, "arcface")
    found.syncnet = network(LSE, published.syncnet_v2, "syncnet_v2")
    found.inception = network(("FID",), Inception, "inception", detector=False)
    found.detect = bool(found.arcface or found.syncnet or found.sync and found.sync.template != "toy"
                        or found.landmarks and face_detectors())
    return found, missing


# ---------------------------------------------------------------------------------------------------------------------
# one clip

class ClipMetrics:
    """What the networks find in one clip, gathered chunk by chunk; no frame is kept but those in FaceWindows."""

    def __init__(self, networks):
        self.networks, self.count, self.detection, self.looks, self.found = networks, 0, None, 0, 0
        self.points, self.embeddings, self.features, self.windows = [], [], [], {}
        if expert := networks.sync:
            def sync_embed(crops):  # (n, 3, H, H) -> (n - 4, E)
                return embed_frames(expert, expert.read(crops.to(networks.device)))

            def sync_crop(detection):  # drawn clips are crops already
                return self.middle if expert.template == "toy" else face_box([detection], "face")

            self.windows["Sync"] = FaceWindows(sync_embed, expert.size, sync_crop)
        if syncnet := networks.syncnet:
            def lse_embed(crops):
                return syncnet.face(crops[None].to(networks.device))[0]

            def lse_crop(detection):  # by the box alone, as its script
                return face_box([detection[:5]], "syncnet")

            self.windows["LSE"] = FaceWindows(lse_embed, 224, lse_crop)

    def detect(self, frame):
        """The face's detection; the last one where there is none now; or None"""
        with torch.autocast(self.networks.device.type, enabled=False):  # the detector needs fp32
            faces = detect_faces(frame, margins=(1.2,))
        self.looks, self.found = self.looks + 1, self.found + bool(faces)
        if faces:
            self.detection = np.array(faces[0])  # box, score, and points of some detectors: see faces.face_box
        return self.detection

    def follow(self, frames):
        """Detections of the frames (n, 4 or more), interpolated from the last one to one in the last frame; the middle of
        the frame where there is none"""
        if not self.networks.detect:
            return np.tile(self.middle, (len(frames), 1))
        begin = self.detect(frames[0]) if self.detection is None else self.detection
        end = self.detect(frames[-1])
        if end is None:
            begin = end = np.array(self.middle)
        return np.linspace(end if begin is None else begin, end, len(frames) + 1)[1:]

    @torch.inference_mode()
    def add(self, frames, sampled):
        """frames: uint8 (n, H, W, 3), the next of the clip. sampled: indices of those that the slow metrics take"""
        nets, self.shape, self.middle = self.networks, frames.shape[1:3], middle_square(frames[0])
        detections = self.follow(frames)
        self.count += len(frames)
        for windows in self.windows.values():
            windows.add(frames, detections)
        if nets.landmarks:
            boxes = [face_box([d], "face") if nets.detect else None for d in detections]
            self.points += [np.full((68, 2), np.nan) if p is None else p for p in nets.landmarks(frames, boxes)]
        if nets.arcface and sampled:
            faces = np.stack([self.aligned(frames, detections, k) for k in sampled])
            self.embeddings.append(nets.arcface.embed(to_tensor(faces).to(nets.device)).cpu())
        if nets.inception and sampled:
            self.features.append(nets.inception(to_tensor(frames[sampled]).to(nets.device)).cpu())

    def aligned(self, frames, detections, k):
        """The face of frame k as ArcFace's training had it, uint8 (112, 112, 3), by landmarks where there are any"""
        if self.points and np.isfinite(points := self.points[k - len(frames)]).all():
            return align_face(frames[k], five_points(points))
        x0, y0, x1, y1 = face_box([detections[k]], "face")
        return align_face(frames[k], CROP_POINTS * (x1 - x0, y1 - y0) + (x0, y0))

    def faceless(self):
        """Why face metrics are left out, or None"""
        if self.networks.detect and 2 * self.found < self.looks:
            return f"a face in {self.found} of {self.looks} frames looked at"

    @torch.inference_mode()
    def lip_sync(self, path) -> tuple[dict, dict]:
        """path: the file, for its sound -> {metric: value} of the clip alone, {metric: why there is none}"""
        values, why, wav = {}, {}, None
        try:
            wav = load_audio(path, level=False)  # as published
        except InputError as error:
            why = dict.fromkeys(self.windows, str(error).removeprefix(f"{Path(path).absolute()}: "))
        if self.points and not self.faceless() and 2 * np.isfinite(self.points).all((1, 2)).sum() >= self.count:
            values = motion_metrics(np.stack(self.points), wav, self.shape[0])
        for name, windows in self.windows.items() if wav is not None else ():
            if self.faceless() and not (name == "Sync" and self.networks.sync.template == "toy"):
                why[name] = self.faceless()
                continue
            face = torch.cat(windows.embeddings) if windows.embeddings else ()
            sound = (sync_sound(self.networks.sync, wav, len(face)) if name == "Sync"
                     else lse_sound(self.networks.syncnet, wav, self.count))
            try:
                distance, confidence, late = lip_sync_error(face[: len(sound)], sound, pad=name == "LSE")
            except ValueError:
                why[name] = f"too short: {self.count} frames, {len(wav) / SAMPLES_PER_FRAME:.1f} frames of sound"
                continue
            values |= {f"{name}-D": distance, f"{name}-C": confidence, f"{name} offset": late}
        return values, why


# ---------------------------------------------------------------------------------------------------------------------
# pairs of clips

def chunks(path):
    """Frames of a video, uint8 (n, H, W, 3), n up to CHUNK. InputError: as read_video; frames of several sizes."""
    stream = read_video(path)
    while frames := list(islice(stream, CHUNK)):
        if any(f.shape != frames[0].shape for f in frames):
            raise InputError(f"{path}: its frames have several sizes")
        yield np.stack(frames)


def resize_frames(frames, shape, name):
    """uint8 (n, H, W, 3) -> (n, *shape). InputError: another aspect ratio."""
    (h, w), (H, W) = frames.shape[1:3], shape[:2]
    if abs(np.log(w * H / (h * W))) > 0.02:  # ours: 2 % is what rounding a small side makes
        raise InputError(f"{name}: frames are {w}x{h}, those of the real clip are {W}x{H}")
    return np.stack([np.asarray(Image.fromarray(f).resize((W, H), Image.Resampling.LANCZOS)) for f in frames])


def measure(real, fake, networks) -> dict:
    """One pair of clips -> dict(real=values, fake=values, frames, notes, features of the two).

    Frames are compared one by one from the first on, as many as both have, a fake of another size after resizing; the
    notes tell. Raises InputError: a file that cannot be read, another aspect ratio.
    """
    clips, per_frame, notes, counts = (ClipMetrics(networks), ClipMetrics(networks)), {}, [], np.zeros(2, int)
    for pair in zip_longest(chunks(real), chunks(fake)):
        counts += [0 if frames is None else len(frames) for frames in pair]
        if any(frames is None for frames in pair):
            continue  # the rest of the longer clip is read to its end, which finds damage, and counted
        a, b = (frames[: min(map(len, pair))] for frames in pair)
        if a.shape != b.shape:
            notes = [f"resized from {b.shape[2]}x{b.shape[1]} to {a.shape[2]}x{a.shape[1]}"]
            b = resize_frames(b, a.shape[1:], fake)
        sampled = [k for k in range(len(a)) if (clips[0].count + k) % EVERY == 0]
        for name, values in image_metrics(a, b, networks, sampled).items():
            per_frame.setdefault(name, []).append(values)
        for clip, frames in zip(clips, (a, b)):
            clip.add(frames, sampled)
    if counts[0] != counts[1]:
        notes.append(f"{counts[1]} frames, the real clip has {counts[0]}: {counts.min()} compared")
    values = {name: finite_mean(np.concatenate(v)) for name, v in per_frame.items()}
    why = {name: f"{a.shape[2]}x{a.shape[1]} px are too few" for name, v in values.items() if np.isnan(v)}
    faces, no_faces = face_metrics(*clips)
    (own, not_own), (fakes, not_fakes) = (clip.lip_sync(path) for clip, path in zip(clips, (real, fake)))
    notes += [f"{name}: {reason}" for name, reason in (why | no_faces | not_fakes).items()]
    notes += [f"{name} of the real clip: {reason}" for name, reason in not_own.items()]
    fakes |= {name: v for name, v in closeness(own, fakes).items() if name == "motion"}
    values = {name: v for name, v in (values | faces | fakes).items() if name not in why}
    return dict(real=own, fake=values, frames=int(counts.min()), notes=notes, features=[c.features for c in clips])


@torch.inference_mode()
def image_metrics(real, fake, networks, sampled) -> dict:
    """Chunks (n, H, W, 3) of two clips -> {metric: its values a frame}; NaN: too small"""
    values = dict(PSNR=psnr(real, fake), L1=l1(real, fake))
    if not networks.skip.keys() >= {"SSIM", "MS-SSIM"}:
        small = min(real.shape[1:3]) < 11
        values |= zip(("SSIM", "MS-SSIM"), [np.full(len(real), np.nan)] * 2 if small else ssim_and_ms_ssim(real, fake))
    if networks.lpips and sampled:
        a, b = (to_tensor(frames[sampled]).to(networks.device) for frames in (real, fake))
        values["LPIPS"] = networks.lpips(a, b).double().cpu().numpy()
    return values


def face_metrics(real: ClipMetrics, fake: ClipMetrics) -> tuple[dict, dict]:
    """Two clips -> {metric: value} by landmarks and identity embeddings, {metric: why there is none}"""
    values, why, faceless = {}, {}, real.faceless() or fake.faceless()
    if real.points:
        a, b = np.stack(real.points), np.stack(fake.points)
        both = np.isfinite(a).all((1, 2)) & np.isfinite(b).all((1, 2))
        if faceless or 2 * both.sum() < len(both):
            why["landmarks"] = faceless or f"a face in {both.sum()} of {len(both)} frames of both"
        else:
            a, b, unit = a[both], b[both], real.shape[0] / 256
            found = {"LMD": landmark_distance(a, b) / unit, "mouth LMD": mouth_distance(a, b) / unit,
                     "pose": np.abs(head_pose(a) - head_pose(b)), "blink": np.abs(read_eyes(a)[0] - read_eyes(b)[0])}
            values |= {name: float(v.mean()) for name, v in found.items()}
    if real.embeddings:
        if faceless:
            why["CSIM"] = faceless
        else:
            values["CSIM"] = float((torch.cat(real.embeddings) * torch.cat(fake.embeddings)).sum(1).mean())
    return values, why


def pairs_of(real: Path, fake: Path) -> tuple[list, list]:
    """Two files, or two folders -> [(name, real file, fake file)], clips without a partner. InputError: no pair."""
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

def finite_mean(values) -> float:
    """Mean without infinite values (the PSNR of an equal frame), unless all are"""
    values = np.asarray(values, float)
    return float(values[~np.isinf(values)].mean() if not np.isinf(values).all() else values.mean())


def mean_rows(pairs: list[dict]) -> tuple[dict, dict]:
    """Measured pairs -> the row of the real clips, each against itself, and that of the fakes: means over the pairs"""
    def mean(side, name):
        values = [pair[side][name] for pair in pairs if name in pair[side]]
        return finite_mean(np.abs(values) if "offset" in name else values) if values else None

    fake = {name: value for name in METRICS if (value := mean("fake", name)) is not None}
    real = {name: mean("real", name) if METRICS[name].itself is None else METRICS[name].itself for name in fake}
    return real, fake


def heading(name: str) -> str:
    """LMD -> "LMD, px ↓" """
    unit = METRICS[name].unit
    return f"{name}{', ' if unit else ''}{unit} {dict(higher='↑', lower='↓').get(METRICS[name].better, '')}".rstrip()


def measure_pairs(args, device):
    """`python evaluate.py pair REAL FAKE`"""
    begin = time.perf_counter()
    if args.json:
        check_output(args.json, True, (".json",))  # before minutes of work
    pairs, alone = pairs_of(Path(args.real), Path(args.fake))
    measured, reports, features = [], [], ([], [])
    with contextlib.ExitStack() as stack:
        networks, missing = load_networks(args, device, stack)
        for name, real, fake in tqdm(pairs, "pairs", disable=None):
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    pair = measure(real, fake, networks)
            except InputError as error:
                if len(pairs) == 1:
                    raise
                reports.append(dict(name=name, error=str(error)))
                continue
            for all_clips, clip in zip(features, pair.pop("features")):
                all_clips += clip
            measured.append(pair)
            reports.append(dict(name=name) | pair)
    if not measured:
        raise InputError(f"none of {len(pairs)} pairs could be measured; the first: {reports[0]['error']}")
    real, fake = mean_rows(measured)
    near = closeness(real, fake)  # THEval's: of means over the clips
    n_features = sum(map(len, features[0]))
    if n_features > 1:
        real["FID"], fake["FID"] = METRICS["FID"].itself, frechet_distance(*map(torch.cat, features))
    rows = {"real, against itself": real, os.path.basename(os.path.abspath(args.fake)): fake}
    rows |= {"closeness of these means": near} if near else {}
    order = [name for name in METRICS if name in fake and name not in missing]
    seconds, frames = time.perf_counter() - begin, sum(pair["frames"] for pair in measured)
    cells = {row: {heading(k): f"{values[k]:.{3 if values is near else METRICS[k].digits}f}" if values.get(k) is not None
                   else "–" for k in order} for row, values in rows.items()}
    print(markdown(cells))
    print(f"\n{len(measured)} pairs, {frames} frames, {seconds:.1f} s")
    notes = legend(args, networks, order, n_features) + problems(missing, reports, alone)
    print("\n".join(notes))
    if args.json:
        versions = dict(revision=revision(), torch=torch.__version__, numpy=np.__version__)
        columns = {name: METRICS[name]._asdict() for name in order}
        rows = {row: {name: values.get(name) for name in order} for row, values in rows.items()}
        report = dict(rows=rows, columns=columns, pairs=reports, frames=frames, seconds=seconds, left_out=missing,
                      alone=alone, notes=notes, versions=versions, device=str(device))
        report = json.loads(json.dumps(report), parse_constant=str)  # JSON has no infinity: the string "Infinity"
        Path(args.json).write_text(json.dumps(report, indent=1))
        pairs_page(Path(args.json), report, {name: files for name, *files in pairs})


def legend(args, networks, order, n: int) -> list[str]:
    """Lines under the table: which networks scored, usual values, and what makes a number doubtful"""
    lines = [f"LSE scored by SyncNet v2, as published: {PUBLISHED['syncnet_v2'].file}"] if networks.syncnet else []
    if networks.sync:
        lines.append(f"Sync scored by our expert: {args.expert or EXPERT.name}")
    for name in order:
        if METRICS[name].usual and not (name in SYNC and args.expert):  # of another expert they are unknown
            lines.append(f"{name} of real clips is usually {METRICS[name].usual}")
    if networks.syncnet or networks.sync:
        lines.append(f"the fakes were trained with the expert: {args.trained_with or 'not given (--trained-with)'}")
        if args.trained_with and networks.sync and same_file(args.trained_with, args.expert or EXPERT):
            lines[-1] += ": THE ONE THAT SCORES, which flatters them"
    if networks.landmarks:
        lines.append(f"landmarks by {args.landmarks or 'weights/landmarks.pt'}")
        voice = "Silero's detector" if voice_detector() else f"loudness, {GATE} dB below a clip's loudest (no silero-vad)"
        lines.append(f"speech and silence by {voice}; closeness: 1 - |fake - real| / real")
    if "FID" in order and n < 2048:
        lines.append(f"FID is from {n} frames a side: with fewer than the 2048 features it comes out too high")
    return lines


def problems(missing, reports, alone) -> list[str]:
    """Lines under the table: metrics and clips that are left out, and the notes of pairs"""
    lines, reasons, pairs = [], {}, {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"left out: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    for pair in reports:
        for note in [f"left out: {pair['error']}"] if "error" in pair else pair["notes"]:
            pairs.setdefault(note, []).append(pair["name"])
    for note, names in pairs.items():  # one line for many pairs
        lines += [f"{name}: {note}" for name in names] if len(names) <= 3 else [f"{len(names)} pairs: {note}"]
    return lines + [f"without a partner: {path}" for path in alone]


def same_file(a, b) -> bool:
    try:
        return Path(a).read_bytes() == Path(b).read_bytes()
    except OSError:  # a word, not a file
        return str(a) == str(b)


def parse(argv=None):
    p = Parser(description="Metrics of talking clips.")
    commands = p.add_subparsers(dest="command", required=True)
    options = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    pair = commands.add_parser("pair", help="generated clips against real ones", **options)
    pair.add_argument("real", help="a real clip, or a folder of them")
    pair.add_argument("fake", help="a generated clip, or a folder whose clips have the same names")
    pair.add_argument("--landmarks", help="mediapipe:FILE, dlib:FILE or fan (default: our network, weights/landmarks.pt)")
    pair.add_argument("--expert", help="sync expert of syncnet.py, or wav2lip (default: weights/sync.pt)")
    pair.add_argument("--trained-with", help="the sync expert that the generated clips were trained with, for the record")
    pair.add_argument("--fetch", action="store_true", help="download the networks that are missing (about 1 GB in all)")
    pair.add_argument("--path", action="append", default=[], metavar="NAME=FILE",
                      help=f"your copy of published weights; NAME: {', '.join(FILES)}")
    pair.add_argument("--skip", default="", help="metrics to leave out, with commas between: LPIPS,FID")
    pair.add_argument("--bf16", action="store_true", help="bf16 autocast: faster on a CPU with AMX and a GPU, less exact")
    toy = commands.add_parser("toy", help="the control table of networks trained on the toy world", **options)
    toy.add_argument("weights", nargs="+", help="weights.pt or stage3.pt; of a stage2.pt the inversion is measured")
    toy.add_argument("--people", type=int, default=32, help="held-out people")
    toy.add_argument("--cache", default="out/evaluate", help="where the probe and its drawn people are kept")
    for command in (pair, toy):
        command.add_argument("--json", help="write the numbers to this .json, and a page beside it (.html)")
        command.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    (toy_report if args.command == "toy" else measure_pairs)(args, pick_device(args.device))


if __name__ == "__main__":
    run(main)
