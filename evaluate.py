"""Metrics of talking clips: image quality, landmarks, identity and lip sync of generated clips against real ones.

    python evaluate.py pair real/ fake/       # clips of two folders, paired by name: one table  (a second a pair, 1 core)
    python evaluate.py pair real.mp4 fake.mp4 --landmarks mediapipe:face_landmarker.task --json numbers.json
    python evaluate.py toy weights/toy.pt     # the control table of the toy world, control.py  (10 minutes, 2 slow cores)

METRICS lists each metric with its unit and source. Metrics whose weights are missing are left out and listed. Differs
from the published metrics: the face is detected every three seconds and its box is interpolated, while SyncNet's scripts
detect it in every frame and smooth. LPIPS, CSIM and FID take every fifth frame.

Axes: n images or frames, K windows of five frames, E embedding, S offsets, H W.
"""

import contextlib
import functools
import json
import math
import time
import unicodedata
from collections import defaultdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy.ndimage import binary_opening
from tqdm import tqdm

import judges
from audio import log_mel, mfcc, n_frames
from checkpoint import PUBLISHED, checkpoints_dir, git_revision, pick_device
from control import measure_toy
from faces import (
    ARCFACE_POINTS, EYE_CORNERS, crop_face, detect_faces, face_box, face_detectors, landmark_detector, middle_square,
    similarity, to_complex, warp_face)
from landmarks import load_landmarks, measure_eyes, track_landmarks
from media import (
    SAMPLES_PER_FRAME, InputError, Parser, check_file, check_output, load_audio, read_video, run, to_tensor)
from report import markdown_table, write_pairs_page
from syncnet import (
    MAX_OFFSET, SHIPPED_EXPERT, WINDOW_FRAMES, best_offset, embed_clip, embed_sound, load_sync, logits_by_shift)
from warp import LOWER_INNER, UPPER_INNER, angles, fit_pose

MAX_CLIP_BYTES = 1 << 31  # of frames in memory: 7 minutes at 256 px, 14 s at 1920x1080; only the beginning is measured
DETECT_EVERY = 75  # frames, three seconds (not faces.DETECT_EVERY, which is for packs and dubbing)
FRAME_STEP = 5  # LPIPS, CSIM and FID: neighbouring frames are nearly equal, and the networks are slow
CLIP_SUFFIXES = (".mp4", ".mov", ".mkv", ".m4v", ".avi", ".mpg", ".mpeg", ".webm", ".gif")


class Metric(NamedTuple):
    """A column of the table."""

    unit: str
    better: str  # "higher", "lower" or "as real"
    itself: float | None  # value of a clip against itself; None: the metric needs no second clip
    digits: int  # printed decimals
    what: str  # meaning and source
    usual: str = ""  # value of real clips, where it is not obvious

    def heading(self, name: str) -> str:  # "LMD, px ↓"
        return name + (f", {self.unit}" if self.unit else "") + dict(higher=" ↑", lower=" ↓").get(self.better, "")

    def cell(self, value: float | None) -> str:
        return "–" if value is None else f"{value:.{self.digits}f}"


METRICS = {
    "SSIM": Metric("", "higher", 1, 3, "structural similarity, windows of 11 px, colour; Wang et al. 2004"),
    "MS-SSIM": Metric("", "higher", 1, 3, "SSIM over five scales, 176 px or more; Wang et al. 2003"),
    "PSNR": Metric("dB", "higher", float("inf"), 2, "peak signal-to-noise ratio, mean over frames that differ"),
    "LPIPS": Metric("", "lower", 0, 3, "distance of VGG16's features, every fifth frame; Zhang et al. 2018"),
    "L1": Metric("", "lower", 0, 4, "mean absolute difference; white is 1"),
    "LMD": Metric("px", "lower", 0, 2, "distance of 68 landmarks, frames scaled to a height of 256; Chen et al. 2018"),
    "mouth LMD": Metric("px", "lower", 0, 2, "LMD of the mouth's 20 landmarks, both mouths centred; Chen et al. 2018"),
    "pose": Metric("deg", "lower", 0, 2, "mean difference of yaw, pitch and roll; see head_pose"),
    "blink": Metric("", "lower", 0, 3, "difference of the eyes' aspect ratio (open .3, shut .1); Soukupova & Cech 2016"),
    "lip dynamics": Metric("px", "as real", None, 2, "deviation over time of distances within the mouth; THEval, 2025"),
    "silent lips": Metric("", "as real", None, 4, "deviation of the lips' gap in pauses, in eye distances; THEval"),
    "lip-sync": Metric("", "as real", None, 3, "difference of the lips' gap and loudness in speech, each 0 to 1; THEval"),
    "brow dynamics": Metric("px", "as real", None, 2, "lip dynamics, but of the brows; THEval"),
    "head motion": Metric("deg", "as real", None, 2, "deviation over time of yaw, pitch and roll; after THEval"),
    "motion": Metric("", "higher", 1, 3, "mean of 1 - |fake - real| / real over the five above, clip by clip; THEval"),
    "CSIM": Metric("", "higher", 1, 3, "cosine of ArcFace's identity embeddings, every fifth frame"),
    "FID": Metric("", "lower", 0, 2, "Frechet distance of Inception's features, every fifth frame; Heusel et al. 2017"),
    "LSE-D": Metric("", "lower", None, 3, "distance of lips and sound at the best offset, SyncNet v2; Wav2Lip, 2020",
                    "6.7 to 7.0 (Wav2Lip's table: LRW, LRS2, LRS3)"),
    "LSE-C": Metric("", "higher", None, 3, "median distance over the offsets minus LSE-D, SyncNet v2; Wav2Lip, 2020",
                    "6.9 to 7.8 (Wav2Lip's table: LRW, LRS2, LRS3)"),
    "LSE offset": Metric("frames", "lower", None, 2, "absolute value of the best offset, which LSE does not penalise"),
    "Sync-D": Metric("", "lower", None, 3, "LSE-D by our expert, whose embeddings have unit length",
                     "1.02 to 1.09 (GRID, seven speakers)"),
    "Sync-C": Metric("", "higher", None, 3, "LSE-C by our expert", "0.27 to 0.34 (GRID, seven speakers)"),
    "Sync offset": Metric("frames", "lower", None, 2, "absolute value of the best offset by our expert"),
}  # fmt: skip
MOTION_METRICS = ("lip dynamics", "silent lips", "lip-sync", "brow dynamics", "head motion")
LANDMARK_METRICS = ("LMD", "mouth LMD", "pose", "blink", *MOTION_METRICS, "motion")
LSE_METRICS, SYNC_METRICS = ("LSE-D", "LSE-C", "LSE offset"), ("Sync-D", "Sync-C", "Sync offset")


# --------------------------------------------------------------------- image metrics: two images, uint8 (H, W, 3)

def l1(a, b) -> float:
    """Mean absolute difference in [0, 1]. Equal images give 0."""
    return np.abs(a.astype(np.int16) - b).mean() / 255


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio in dB. Equal images give inf."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.square(a.astype(np.int16) - b, dtype=np.int32).mean())


SSIM_WINDOW = torch.exp(-torch.arange(-5.0, 6).square() / (2 * 1.5**2))  # Wang et al. 2004: 11 pixels, deviation 1.5
SSIM_WINDOW = (SSIM_WINDOW / SSIM_WINDOW.sum()).view(1, 1, 11, 1).repeat(12, 1, 1, 1)
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, measured on people, fine to coarse


def ssim_and_cs(x, y):
    """Images (1, 3, H, W) of 0..255, H, W >= 11 -> SSIM of each channel (3,), its contrast-structure factor (3,). Ours:
    by x + y and x - y, so that small differences keep their digits: 4 cov = var(x + y) - var(x - y)."""
    c1, c2 = 2 * (0.01 * 255) ** 2, 2 * (0.03 * 255) ** 2
    maps = torch.cat([x + y, x - y], 1)
    maps = torch.cat([maps, maps.square()], 1)  # (1, 12, H, W)
    means = F.conv2d(F.conv2d(maps, SSIM_WINDOW, groups=12), SSIM_WINDOW.mT, groups=12)  # one group each is fastest
    mean_sum, mean_diff, square_sum, square_diff = means[0].unflatten(0, (4, 3))
    mean_sum, mean_diff = mean_sum.square(), mean_diff.square()
    var_sum, var_diff = square_sum - mean_sum, square_diff - mean_diff
    cs = (var_sum - var_diff + c2) / (var_sum + var_diff + c2)
    return ((mean_sum - mean_diff + c1) / (mean_sum + mean_diff + c1) * cs).mean((1, 2)), cs.mean((1, 2))


def ssim_and_ms_ssim(a, b) -> tuple[float, float]:
    """SSIM and MS-SSIM, means over the channels. Equal images give 1. NaN if a side is shorter than 11 and 176 px.
    MS-SSIM is the product of the contrast-structure of all scales but the last, and the SSIM of the last."""
    x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].float() for image in (a, b))
    scales = []
    while len(scales) < len(SCALE_WEIGHTS) and min(x.shape[2:]) >= 11:
        scales.append(ssim_and_cs(x, y))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    ssim = float(scales[0][0].mean()) if scales else math.nan
    if len(scales) < len(SCALE_WEIGHTS):
        return ssim, math.nan
    terms = [cs for _, cs in scales[:-1]] + [scales[-1][0]]
    return ssim, float(math.prod(term.clamp_min(0) ** weight for term, weight in zip(terms, SCALE_WEIGHTS)).mean())


def frechet_distance(a, b) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two sets of features (n, E) (Heusel et al. 2017). Equal sets
    give 0. With C = R^T R, the trace of the root is the sum of the singular values of R_a R_b^T."""
    a, b = a.double(), b.double()
    root_a, root_b = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b))
    distance = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum()
    return max(0.0, float(distance - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()))


# ---------------------------------------- landmark metrics: iBUG's 68 points (n, 68, 2) in pixels, x right, y down

MOUTH, BROWS = slice(48, 68), slice(17, 27)


def landmark_distance(a, b) -> np.ndarray:
    """Mean distance of corresponding landmarks: (n, L, 2) twice -> (n,)."""
    return np.linalg.norm(a - b, axis=-1).mean(-1)


def mouth_distance(a, b) -> np.ndarray:
    """Landmark distance of two mouths, each relative to its own centre: (n, 68, 2) twice -> (n,)."""
    a, b = (p[:, MOUTH] - p[:, MOUTH].mean(1, keepdims=True) for p in (a, b))
    return landmark_distance(a, b)


def head_pose(points) -> np.ndarray:
    """Landmarks (n, 68, 2) -> yaw, pitch, roll (n, 3) in degrees: towards the image's right, chin up, clockwise. A face
    unlike the mean shape has a constant error, which cancels between two clips of one person. See warp.fit_pose."""
    mean = load_landmarks().solid.double().numpy()
    return angles(fit_pose(points, mean)[1])


def align_face(image, points) -> np.ndarray:
    """uint8 (H, W, 3), landmarks (68, 2) -> uint8 (112, 112, 3) with eyes, nose and mouth at ARCFACE_POINTS."""
    five = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    return warp_face(image, *similarity(to_complex(ARCFACE_POINTS), to_complex(five)), 112)


# ------------------------ motion and silence, after THEval (CVPR 2026, arXiv 2511.04520), which has a mesh of points

SILENCE_DB = 30  # below a clip's loudest twentieth, if there is no voice detector (ours)
MIN_PAUSE = 8  # frames; shorter pauses count as speech (THEval: .3 s)


@functools.cache
def voice_detector():
    """Silero's network, or None if its package is not installed."""
    with contextlib.suppress(ImportError):
        import silero_vad

        return functools.partial(silero_vad.get_speech_timestamps, model=silero_vad.load_silero_vad())


def loudness(wav, T: int) -> np.ndarray:
    """Sound (n,) -> root mean square of the 50 ms around the middle of each frame (T,)."""
    wav = np.pad(wav, (80, max(80, T * SAMPLES_PER_FRAME + 80 - len(wav))))
    windows = sliding_window_view(wav, 800)[::SAMPLES_PER_FRAME][:T]
    return np.sqrt(np.square(windows, dtype=float).mean(1))


def speech_frames(wav, T: int) -> np.ndarray:
    """Sound (n,) -> True for frames with speech (T,), by Silero's detector or else by loudness."""
    detect, level = voice_detector(), loudness(wav, T)
    speech = level > np.percentile(level, 95) * 10 ** (-SILENCE_DB / 20)
    if detect:
        speech[:] = False
        for segment in detect(torch.from_numpy(wav)):
            speech[segment["start"] // SAMPLES_PER_FRAME : -(-segment["end"] // SAMPLES_PER_FRAME)] = True
    return ~binary_opening(~speech, np.ones(MIN_PAUSE))  # without short pauses


def dynamics(points) -> float:
    """Points (T, k, 2) -> standard deviation over time of the distance of two points, mean over all pairs of points."""
    i, j = np.triu_indices(points.shape[1], 1)
    return float(np.linalg.norm(points[:, i] - points[:, j], axis=-1).std(0).mean())


def motion_metrics(points, wav, height: int) -> dict:
    """Landmarks (T, 68, 2), NaN where no face was found, sound (n,) or None, height of the frames -> {metric: value}."""
    detected = np.isfinite(points).all((1, 2))
    p = points[detected]
    values = {"lip dynamics": dynamics(p[:, MOUTH]) * 256 / height, "brow dynamics": dynamics(p[:, BROWS]) * 256 / height,
              "head motion": float(head_pose(p).std(0).mean())}
    if wav is None:
        return values
    speech, level = speech_frames(wav, len(points))[detected], loudness(wav, len(points))[detected]
    gap = np.linalg.norm(p[:, LOWER_INNER[1:4]] - p[:, UPPER_INNER[1:4]], axis=-1).mean(1)  # between the inner lips
    gap /= np.linalg.norm(p[:, EYE_CORNERS[1]] - p[:, EYE_CORNERS[0]], axis=-1)  # in distances of the eyes' outer corners
    if (~speech).sum() >= MIN_PAUSE:
        values["silent lips"] = float(np.median(np.abs(gap[~speech] - gap[~speech].mean())))
    if speech.sum() >= MIN_PAUSE:
        gap, level = ((x[speech] - x[speech].min()) / max(np.ptp(x[speech]), 1e-9) for x in (gap, level))
        values["lip-sync"] = float(np.abs(gap - level).mean())
    return values


def closeness(real: dict, fake: dict) -> dict:
    """Values of MOTION_METRICS -> 1 - |fake - real| / real of each, and their mean as "motion"."""
    names = [name for name in MOTION_METRICS if fake.get(name) is not None and real.get(name) is not None]
    values = {name: 1 - abs(fake[name] - real[name]) / max(real[name], 1e-9) for name in names}
    return values | dict(motion=float(np.mean(list(values.values())))) if values else {}


# ------------------------------------------------------------------------------------------------------------- lip sync

def lip_sync_error(face, sound, pad: bool = True):
    """Embeddings (K, E) of face and sound windows -> D, C, and the number of frames by which the sound is late. D is the
    smallest mean distance over the offsets, C the median over the offsets minus D: SyncNet's (2016), LSE-D and LSE-C of
    Wav2Lip (Prajwal et al. 2020). pad: the sound is zero beyond its ends, as published; without, see best_offset."""
    distance = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    logits = -logits_by_shift(distance, face.float(), sound.float(), 0.0 if pad else math.nan)  # (K, S)
    late, confidence, _ = best_offset(logits)
    return -float(np.nanmean(logits[:, MAX_OFFSET + late])), confidence, late


# ------------------------------------------------------------------------------------------------------- the networks

def load_networks(args, device) -> SimpleNamespace:
    """-> device; the networks of the metrics, None if missing; left_out: {metric: reason}. InputError: --skip names no
    metric; a network named by an option cannot be loaded."""
    left_out = {name.strip(): "--skip" for name in args.skip.split(",") if name.strip()}
    for name in left_out.keys() - METRICS.keys():
        raise InputError(f"--skip {name}: not a metric; the metrics are {', '.join(METRICS)}")
    networks = SimpleNamespace(device=device, left_out=left_out, sync=None, syncnet=None, landmarks=None, arcface=None,
                               lpips=None, inception=None)

    def load(name, metrics, make_network, files=(), required=False):
        """Sets networks.NAME, or the reason why its metrics are left out. required: an option names it."""
        if left_out.keys() >= set(metrics):
            return
        try:
            for file in files:
                if not args.fetch and not (checkpoints_dir() / PUBLISHED[file].file).is_file():
                    raise InputError(f"{PUBLISHED[file].file} is not in {checkpoints_dir()} (--fetch downloads it)")
            network = make_network()
            if name in ("sync", "syncnet", "landmarks") and getattr(network, "template", None) != "toy":
                face_detectors()  # clips of the toy world are face crops already
            setattr(networks, name, network)
        except InputError as error:
            if required:
                raise
            left_out.update({metric: str(error) for metric in metrics if metric not in left_out})

    def landmarks():
        """A function: frames (n, H, W, 3), n boxes -> (68, 2) or None for each frame."""
        if args.landmarks:
            return functools.partial(map, landmark_detector(args.landmarks, "face", device))
        network = load_landmarks()
        return lambda frames, boxes: track_landmarks(network, frames, boxes[0])

    load("sync", SYNC_METRICS, lambda: load_sync(args.expert or SHIPPED_EXPERT, device), required=args.expert)
    load("syncnet", LSE_METRICS, lambda: judges.syncnet_v2(device), ["syncnet_v2"])
    fan = args.landmarks == "fan"  # the detector whose weights are downloaded
    load("landmarks", (*LANDMARK_METRICS, "CSIM"), landmarks, ["fan"] * fan, required=args.landmarks and not fan)
    load("arcface", ["CSIM"], lambda: judges.arcface(device), ["arcface"])
    load("lpips", ["LPIPS"], lambda: judges.lpips(device), ["vgg16", "lpips_heads"])
    load("inception", ["FID"], lambda: judges.Inception(device), ["inception"])
    return networks


# ------------------------------------------------------------------------------------------------------------- one clip

class Clip:
    """A clip in memory. Sound, faces and landmarks are computed on first use. InputError without the path: none in it."""

    def __init__(self, path, networks):
        self.path, self.networks, stream = path, networks, read_video(path)
        first = next(stream)
        self.frames = np.stack([first, *islice(stream, MAX_CLIP_BYTES // first.nbytes)])  # (T, H, W, 3)
        self.is_cut = next(stream, None) is not None

    @functools.cached_property
    def wav(self):
        try:
            return load_audio(self.path, normalise=False)  # as published
        except InputError as error:
            raise InputError(str(error).removeprefix(f"{Path(self.path).absolute()}: ")) from None

    @functools.cached_property
    def detections(self):
        """The face in each frame, (T, 4 or more): box, score and points, see faces.face_box."""
        T = len(self.frames)
        sampled = np.unique(np.r_[0, DETECT_EVERY - 1 : T : DETECT_EVERY, T - 1])
        with torch.autocast(self.networks.device.type, enabled=False):  # the detector needs fp32
            faces = {k: detect_faces(self.frames[k], margins=(1.2,)) for k in sampled}
        faces = {k: found[0] for k, found in faces.items() if found}
        if 2 * len(faces) < len(sampled):
            raise InputError(f"a face in {len(faces)} of {len(sampled)} sampled frames")
        return np.stack([np.interp(range(T), list(faces), column) for column in zip(*faces.values())], 1)

    @functools.cached_property
    def points(self):
        """Landmarks (T, 68, 2), NaN where no face was found."""
        boxes, points = [face_box([face], "face") for face in self.detections], []
        for start in range(0, len(self.frames), DETECT_EVERY):
            block = slice(start, start + DETECT_EVERY)
            points.extend(self.networks.landmarks(self.frames[block], boxes[block]))
        points = np.stack([np.full((68, 2), np.nan) if p is None else p for p in points])
        n_found = np.isfinite(points).all((1, 2)).sum()
        if 2 * n_found < len(points):
            raise InputError(f"a face in {n_found} of {len(points)} frames")
        return points

    def apply(self, network, images):
        """A network's outputs (n, ..) for images, uint8 (n, H, W, 3)."""
        batches = (to_tensor(np.stack(images[i : i + 16])).to(self.networks.device) for i in range(0, len(images), 16))
        return torch.cat([network(batch).float().cpu() for batch in batches])

    def metrics(self) -> tuple[dict, dict]:
        """{metric: value} of the metrics that need no second clip, {group of metrics: reason} of those that fail."""
        nets = self.networks
        return collect(Sync=nets.sync and self.sync, LSE=nets.syncnet and self.lse, motion=nets.landmarks and self.motion)

    def motion(self) -> dict:
        wav = None
        with contextlib.suppress(InputError):
            wav = self.wav
        return motion_metrics(self.points, wav, self.frames.shape[1])

    def n_windows(self, sound_frames: int, unused: int = 0) -> int:
        """The number of five-frame windows with both picture and sound, without the `unused` last ones."""
        K = min(len(self.frames), sound_frames) - WINDOW_FRAMES + 1 - unused
        if K <= 0:
            sound = len(self.wav) / SAMPLES_PER_FRAME
            raise InputError(f"too short: {len(self.frames)} frames of picture, {sound:.1f} of sound")
        return K

    def sync(self) -> dict:
        """By our expert, or that of --expert."""
        net, K = self.networks.sync, self.n_windows(n_frames(len(self.wav)))
        toy = net.template == "toy"  # such clips are face crops already
        boxes = map(middle_square, self.frames) if toy else (face_box([face], "face") for face in self.detections)
        crops = (crop_face(frame, box, net.size) for frame, box in zip(self.frames, boxes))
        face, sound = embed_clip(net, crops, log_mel(self.wav))
        return dict(zip(SYNC_METRICS, lip_sync_error(face[:K], sound[:K], pad=False)))

    def lse(self) -> dict:
        """By SyncNet v2, as in its script: crops by the box alone, without the last window; 4 MFCC steps a frame."""
        net, K = self.networks.syncnet, self.n_windows(len(self.wav) // SAMPLES_PER_FRAME, unused=1)
        boxes = (face_box([face[:5]], "syncnet") for face in self.detections)
        crops = [crop_face(frame, box, 224) for frame, box in zip(self.frames, boxes)]
        blocks = (to_tensor(np.stack(crops[i : i + 63 + WINDOW_FRAMES])) for i in range(0, K, 64))
        face = torch.cat([net.windows(block[None].to(self.networks.device))[0] for block in blocks])[:K]
        sound = sliding_window_view(mfcc(self.wav), 20, 1)[:, ::4].swapaxes(0, 1)[:K]  # (K, 13, 20)
        return dict(zip(LSE_METRICS, lip_sync_error(face, embed_sound(net, sound.astype(np.float32)))))


def collect(**functions) -> tuple[dict, dict]:
    """NAME=function or None -> {metric: value} of all functions, {NAME: reason} of those that raise InputError."""
    values, reasons = {}, {}
    for name, measure in functions.items():
        try:
            values |= measure() if measure else {}
        except InputError as error:
            reasons[name] = str(error)
    return values, reasons


# ------------------------------------------------------------------------------------------------------- pairs of clips

@torch.inference_mode()
def measure_pair(real_path, fake_path, networks) -> dict:
    """-> dict(real=values, fake=values, frames, notes, features). The longer clip is cut to the shorter one. A fake of
    another size is resized. InputError: a file cannot be read, or the aspect ratios differ."""
    real, fake, notes = Clip(real_path, networks), Clip(fake_path, networks), []
    T = min(len(real.frames), len(fake.frames))
    if len(real.frames) != len(fake.frames):
        notes.append(f"{len(fake.frames)} frames, the real clip has {len(real.frames)}: {T} compared")
    if real.is_cut or fake.is_cut:
        notes.append("too long for memory: only the beginning is measured")
    real.frames, fake.frames = real.frames[:T], fake.frames[:T]
    (H, W), (h, w) = real.frames.shape[1:3], fake.frames.shape[1:3]
    if (h, w) != (H, W):
        if abs(np.log(w * H / (h * W))) > 0.02:  # ours: rounding a small side changes the ratio by up to 2 %
            raise InputError(f"{fake_path}: frames are {w}x{h}, those of the real clip are {W}x{H}")
        fake.frames = np.stack([Image.fromarray(f).resize((W, H), Image.Resampling.LANCZOS) for f in fake.frames])
        notes.append(f"resized from {w}x{h} to {W}x{H}")
    values, reasons = collect(images=lambda: image_metrics(real, fake),
                              landmarks=networks.landmarks and (lambda: face_metrics(real, fake)))
    reasons |= {name: f"{W}x{H} px are too few" for name, value in values.items() if np.isnan(value)}
    (real_values, real_reasons), (fake_values, fake_reasons) = real.metrics(), fake.metrics()
    notes += [f"{name}: {reason}" for name, reason in (reasons | fake_reasons).items()]
    notes += [f"{name} of the real clip: {reason}" for name, reason in real_reasons.items()]
    values |= fake_values
    if near := closeness(real_values, fake_values):
        values["motion"] = near["motion"]
    values = {name: value for name, value in values.items() if name not in reasons}
    features = [clip.apply(networks.inception, clip.frames[::FRAME_STEP]) for clip in (real, fake) if networks.inception]
    return dict(real=real_values, fake=values, frames=T, notes=notes, features=features)


def image_metrics(real: Clip, fake: Clip) -> dict:
    """Means over the frames, NaN if the frames are too small."""
    networks, pairs = real.networks, list(zip(real.frames, fake.frames))
    values = dict(PSNR=[psnr(*pair) for pair in pairs], L1=[l1(*pair) for pair in pairs])
    if not networks.left_out.keys() >= {"SSIM", "MS-SSIM"}:
        with torch.autocast("cpu", enabled=False):  # variances of 0..255 need fp32
            values["SSIM"], values["MS-SSIM"] = zip(*(ssim_and_ms_ssim(*pair) for pair in pairs))
    if networks.lpips:
        side_by_side = np.concatenate([real.frames[::FRAME_STEP], fake.frames[::FRAME_STEP]], 2)
        values["LPIPS"] = real.apply(lambda x: networks.lpips(*x.chunk(2, -1)), side_by_side)
    return {name: finite_mean(x) for name, x in values.items()}


def face_metrics(real: Clip, fake: Clip) -> dict:
    """Means over the frames with a face in both clips. InputError: these are fewer than half."""
    a, b, unit, arcface = real.points, fake.points, real.frames.shape[1] / 256, real.networks.arcface
    frames = np.flatnonzero(np.isfinite(a).all((1, 2)) & np.isfinite(b).all((1, 2)))
    if 2 * len(frames) < len(a):
        raise InputError(f"a face in {len(frames)} of {len(a)} frames of both")
    a, b = a[frames], b[frames]
    values = {"LMD": landmark_distance(a, b) / unit, "mouth LMD": mouth_distance(a, b) / unit,
              "pose": np.abs(head_pose(a) - head_pose(b)), "blink": np.abs(measure_eyes(a)[0] - measure_eyes(b)[0])}
    frames = frames[frames % FRAME_STEP == 0]
    if arcface and len(frames):
        x, y = (clip.apply(arcface.embed, [align_face(clip.frames[k], clip.points[k]) for k in frames])
                for clip in (real, fake))
        values["CSIM"] = (x * y).sum(1)
    return {name: float(x.mean()) for name, x in values.items()}


def pairs_of(real: Path, fake: Path) -> tuple[list, list]:
    """Two files or two folders -> [(name, real file, fake file)], clips without a partner. InputError: no pair."""
    if real.is_dir() != fake.is_dir():
        raise InputError(f"{real} and {fake}: one is a directory, one is not")
    if not real.is_dir():
        return [(fake.name, check_file(real), check_file(fake))], []
    real_clips, fake_clips = find_clips(real), find_clips(fake)
    names = sorted(real_clips.keys() & fake_clips.keys())
    if not names:
        raise InputError(f"{real} and {fake}: no clip has the same name in both")
    unpaired = [str(clips[name]) for clips in (real_clips, fake_clips) for name in sorted(clips) if name not in names]
    return [(name, real_clips[name], fake_clips[name]) for name in names], unpaired


def find_clips(folder: Path) -> dict:
    """{path below the folder without its suffix: file}. InputError: two clips of one name."""
    clips = {}
    for path in sorted(folder.rglob("[!.]*")):
        if path.suffix.lower() in CLIP_SUFFIXES and path.is_file():
            name = unicodedata.normalize("NFC", str(path.relative_to(folder).with_suffix("")))  # macOS decomposes accents
            if name in clips:
                raise InputError(f"{path}: {clips[name].name} beside it has the same name")
            clips[name] = path
    return clips


# ------------------------------------------------------------------------------------------------------------ the table

def finite_mean(values) -> float:
    """Mean without infinite values (the PSNR of equal frames), unless all are infinite."""
    values = np.asarray(values, float)
    finite = values[~np.isinf(values)]
    return float(finite.mean() if len(finite) else values.mean())


def mean_rows(reports: list[dict]) -> tuple[dict, dict]:
    """Reports of pairs -> the row of the real clips against themselves, the row of the fakes: means over the pairs."""
    def mean(side, name):
        values = [report[side][name] for report in reports if name in report[side]]
        return finite_mean(np.abs(values) if "offset" in name else values) if values else None

    fake = {name: value for name in METRICS if (value := mean("fake", name)) is not None}
    real = {name: mean("real", name) if METRICS[name].itself is None else METRICS[name].itself for name in fake}
    return real, fake


def measure_pairs(args, device):
    """`python evaluate.py pair REAL FAKE`: prints the table and writes --json."""
    start, reports = time.perf_counter(), []
    json_path = args.json and check_output(args.json, True, (".json",))  # fails before minutes of work
    pairs, unpaired = pairs_of(Path(args.real), Path(args.fake))
    networks = load_networks(args, device)
    for name, real, fake in tqdm(pairs, "pairs", disable=None):
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                reports.append(dict(name=name) | measure_pair(real, fake, networks))
        except InputError as error:
            reports.append(dict(name=name, error=str(error)))
    measured = [report for report in reports if "error" not in report]
    if not measured:
        raise InputError(f"{reports[0]['error']} (pairs measured: 0 of {len(pairs)})")
    real, fake = mean_rows(measured)
    features = [torch.cat(side) for side in zip(*(report.pop("features") for report in measured))]  # real, fake; or []
    n_features = len(features[0]) if features else 0
    if n_features > 1:
        real["FID"], fake["FID"] = METRICS["FID"].itself, frechet_distance(*features)
    names = [name for name in METRICS if name in fake and name not in networks.left_out]
    rows = {"real, against itself": real, Path(args.fake).absolute().name: fake}
    if near := closeness(real, fake):  # of the means over the clips, as in THEval
        rows["closeness of these means"] = near
    rows = {row: {name: values.get(name) for name in names} for row, values in rows.items()}
    seconds, frames = time.perf_counter() - start, sum(report["frames"] for report in measured)
    print(markdown_table({row: {METRICS[k].heading(k): METRICS[k].cell(value) for k, value in values.items()}
                          for row, values in rows.items()}))
    print(f"\n{len(measured)} pairs, {frames} frames, {seconds:.1f} s")
    notes = explain(args, networks, names, n_features) + list_problems(networks.left_out, reports, unpaired)
    print("\n".join(notes))
    if json_path:
        versions = dict(revision=git_revision(), torch=torch.__version__, numpy=np.__version__)
        columns = {name: METRICS[name]._asdict() | dict(heading=METRICS[name].heading(name)) for name in names}
        report = dict(rows=rows, columns=columns, pairs=reports, frames=frames, seconds=seconds,
                      left_out=networks.left_out, alone=unpaired, notes=notes, versions=versions, device=str(device))
        report = json.loads(json.dumps(report), parse_constant=str)  # JSON has no infinity: the string "Infinity"
        json_path.write_text(json.dumps(report, indent=1))
        write_pairs_page(json_path, report, {name: files for name, *files in pairs})


def explain(args, networks, names, n_features: int) -> list[str]:
    """Lines under the table: the networks of the metrics, usual values, and a warning if the FID has few frames."""
    lines = [f"LSE scored by SyncNet v2, as published: {PUBLISHED['syncnet_v2'].file}"] if networks.syncnet else []
    if networks.sync:
        expert = args.expert or f"our expert, {SHIPPED_EXPERT.name}"
        lines.append(f"Sync scored by {expert}; for fakes that were trained with it the scores are too good")
    for name in names:
        if METRICS[name].usual and not (name in SYNC_METRICS and args.expert):  # unknown for other experts
            lines.append(f"{name} of real clips is usually {METRICS[name].usual}")
    if networks.landmarks:
        lines.append(f"landmarks by {args.landmarks or 'weights/landmarks.pt'}")
        loud = f"loudness, {SILENCE_DB} dB below a clip's loudest (no silero-vad)"
        detector = "Silero's detector" if voice_detector() else loud
        lines.append(f"speech and silence by {detector}; closeness: 1 - |fake - real| / real")
    if "FID" in names and n_features < 2048:
        lines.append(f"FID is from {n_features} frames a side: with fewer than its 2048 features it is too high")
    return lines


def list_problems(left_out, reports, unpaired) -> list[str]:
    """Lines under the table: metrics and clips that are left out, and the notes of pairs."""
    metrics_by_reason, pairs_by_note = defaultdict(list), defaultdict(list)
    for metric, reason in left_out.items():
        metrics_by_reason[reason].append(metric)
    for report in reports:
        for note in [f"left out: {report['error']}"] if "error" in report else report["notes"]:
            pairs_by_note[note].append(report["name"])
    lines = [f"left out: {', '.join(metrics)}: {reason}" for reason, metrics in metrics_by_reason.items()]
    for note, pairs in pairs_by_note.items():
        lines += [f"{name}: {note}" for name in pairs] if len(pairs) <= 3 else [f"{len(pairs)} pairs: {note}"]
    return lines + [f"without a partner: {path}" for path in unpaired]


def parse(argv=None):
    p = Parser(description="Metrics of talking clips.")
    pair, toy = p.add_commands(pair="generated clips against real ones",
                           toy="the control table of networks trained on the toy world")
    pair.add_argument("real", help="a real clip, or a folder of them")
    pair.add_argument("fake", help="a generated clip, or a folder whose clips have the same names")
    pair.add_argument("--landmarks", help="mediapipe:FILE, dlib:FILE or fan (default: our network, weights/landmarks.pt)")
    pair.add_argument("--expert", help="sync expert of syncnet.py, or wav2lip (default: weights/sync.pt)")
    pair.add_argument("--fetch", action="store_true", help="download missing networks (about 1 GB in all)")
    pair.add_argument("--skip", default="", help="metrics to leave out, separated by commas: LPIPS,FID")
    pair.add_argument("--bf16", action="store_true", help="bf16 autocast: faster on a GPU or a CPU with AMX, less exact")
    toy.add_argument("weights", nargs="+", help="weights.pt or stage3.pt")
    for command in (pair, toy):
        command.add_argument("--json", help="write the numbers to this .json, and a page beside it (.html)")
        command.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    measure = measure_toy if args.command == "toy" else measure_pairs
    measure(args, pick_device(args.device))


if __name__ == "__main__":
    run(main)
