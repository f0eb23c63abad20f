"""Metrics of talking clips: image quality, landmarks, identity and lip sync of generated clips against real ones.

    python evaluate.py pair real/ fake/       # clips of two folders, paired by name: one table  (a second a pair, 1 core)
    python evaluate.py pair real.mp4 fake.mp4 --landmarks mediapipe:face_landmarker.task --json numbers.json
    python evaluate.py toy weights/toy.pt     # the control table of the toy world, see control.py    (3 minutes, 2 cores)

METRICS lists each metric with its unit and source. One whose weights are missing is left out by name. Differs from the
metrics' papers: the face is detected every three seconds and its box interpolated, where SyncNet's scripts detect it in
every frame and smooth; LPIPS, CSIM and FID take every fifth frame.

Axes: n images or frames, K windows of five frames, E embedding, S offsets, H W.
"""

import contextlib
import functools
import json
import math
import os
import time
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
from tqdm import tqdm

import judges as published
from audio import log_mel, mfcc, n_frames
from checkpoint import PUBLISHED, checkpoints_dir, git_revision, pick_device
from control import toy_report
from faces import (
    ARCFACE_POINTS, crop_face, detect_faces, face_box, landmark_detector, middle_square, require_detectors, similarity,
    to_complex, warp_face)
from landmarks import load_landmarks, measure_eyes, track_landmarks
from media import (
    SAMPLES_PER_FRAME, InputError, Parser, check_file, check_output, load_audio, read_video, run, to_tensor)
from report import markdown_table, write_pairs_page
from syncnet import MAX_OFFSET, WINDOW_FRAMES, best_offset, embed_clip, embed_sound, load_sync, logits_by_shift
from warp import angles, fit_pose

MOST = 1 << 31  # bytes of a clip in memory: 7 minutes at 256 px, 14 s at 1920x1080; of a longer one the beginning counts
DETECT_EVERY = 75  # frames
EVERY = 5  # LPIPS, CSIM and FID take every fifth frame: neighbours are nearly equal, and the networks are slow
EXPERT = Path(__file__).parent / "weights" / "sync.pt"
VIDEOS = (".mp4", ".mov", ".mkv", ".m4v", ".avi", ".mpg", ".mpeg", ".webm", ".gif")  # clips in a folder


class Metric(NamedTuple):
    """A column of the table"""

    unit: str
    better: str  # "higher", "lower" or "as real"
    itself: float | None  # the value of a clip against itself; None: a property of one clip
    digits: int  # that are printed
    what: str  # meaning and source
    usual: str = ""  # value of real clips, where it is not obvious

    def heading(self, name: str) -> str:  # as "LMD, px ↓"
        return name + (f", {self.unit}" if self.unit else "") + dict(higher=" ↑", lower=" ↓").get(self.better, "")


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
    "Sync-C": Metric("", "higher", None, 3, "as LSE-C, by our expert", "0.15 to 0.21 (GRID, seven speakers)"),
    "Sync offset": Metric("frames", "lower", None, 2, "size of that offset"),
}  # fmt: skip
MOTION = ("lip dynamics", "silent lips", "lip-sync", "brow dynamics", "head motion")
LANDMARKS = ("LMD", "mouth LMD", "pose", "blink", *MOTION, "motion")
LSE, SYNC = ("LSE-D", "LSE-C", "LSE offset"), tuple(METRICS)[-3:]


# ------------------------------------------------------------------------ image metrics: of two images, uint8 (H, W, 3)

def l1(a, b) -> float:
    """Mean absolute difference in [0, 1]; 0 is equal"""
    return np.abs(a.astype(np.int16) - b).mean() / 255


def psnr(a, b) -> float:
    """Peak signal-to-noise ratio in dB; inf is equal, above 30 is close"""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.square(a.astype(np.int16) - b, dtype=np.int32).mean())


WINDOW = torch.exp(-torch.arange(-5.0, 6).square() / (2 * 1.5**2))  # Wang et al. 2004: 11 pixels, deviation 1.5
WINDOW = (WINDOW / WINDOW.sum()).view(1, 1, 11, 1).repeat(12, 1, 1, 1)
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, measured on people, fine to coarse


def ssim_and_cs(x, y):
    """Images (1, 3, H, W) of 0..255, H, W >= 11 -> SSIM of each channel (3,), and its contrast-structure part (3,). By
    x + y and x - y, so that small differences keep their digits: 4 cov = var(x + y) - var(x - y), and so for means."""
    c1, c2 = 2 * (0.01 * 255) ** 2, 2 * (0.03 * 255) ** 2
    maps = torch.cat([x + y, x - y], 1)
    maps = torch.cat([maps, maps.square()], 1)  # a group each: the fastest convolution on a CPU
    means = F.conv2d(F.conv2d(maps, WINDOW, groups=12), WINDOW.mT, groups=12)
    mean_sum, mean_diff, square_sum, square_diff = means[0].unflatten(0, (4, 3))
    mean_sum, mean_diff = mean_sum.square(), mean_diff.square()
    var_sum, var_diff = square_sum - mean_sum, square_diff - mean_diff
    cs = (var_sum - var_diff + c2) / (var_sum + var_diff + c2)
    return ((mean_sum - mean_diff + c1) / (mean_sum + mean_diff + c1) * cs).mean((1, 2)), cs.mean((1, 2))


def ssim_and_ms_ssim(a, b) -> tuple[float, float]:
    """SSIM and MS-SSIM, means over the channels; 1 is equal; NaN where a side has less than 11, 176 px. MS-SSIM is the
    product of the contrast-structure of each scale and the SSIM of the last, each to the power of its weight."""
    x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].float() for image in (a, b))
    scales = []
    while len(scales) < len(SCALES) and min(x.shape[2:]) >= 11:
        scales.append(ssim_and_cs(x, y))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    if not scales:
        return math.nan, math.nan
    terms = [cs for _, cs in scales[:-1]] + [scales[-1][0]]
    product = math.prod(term.clamp_min(0) ** weight for term, weight in zip(terms, SCALES)).mean()
    return float(scales[0][0].mean()), float(product) if len(scales) == len(SCALES) else math.nan


def frechet_distance(a, b) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two sets of features (n, E); 0 is equal. Heusel et al. 2017.
    With C = R^T R, the trace of the root is the sum of the singular values of R_a R_b^T."""
    a, b = a.double(), b.double()
    root_a, root_b = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b))
    apart = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum()
    return max(0.0, float(apart - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()))


# -------------------------------------- landmark metrics: iBUG's 68 points (n, 68, 2) in pixels, x to the right, y down

MOUTH, BROWS = slice(48, 68), slice(17, 27)


def landmark_distance(a, b) -> np.ndarray:
    """Mean distance of corresponding landmarks, (n, L, 2) twice -> (n,) in their unit; 0 is equal"""
    return np.linalg.norm(a - b, axis=-1).mean(-1)


def mouth_distance(a, b) -> np.ndarray:
    """Landmark distance of two mouths, each about its own centre: (n, 68, 2) twice -> (n,); 0 is the same shape"""
    a, b = (p[:, MOUTH] - p[:, MOUTH].mean(1, keepdims=True) for p in (a, b))
    return landmark_distance(a, b)


def head_pose(points) -> np.ndarray:
    """Landmarks (n, 68, 2) -> yaw, pitch, roll (n, 3) in degrees: towards the image's right, chin up, clockwise; see
    warp.fit_pose. A face unlike the mean shape has a constant error, which cancels between two clips of one person."""
    mean = load_landmarks().solid.double().numpy()
    return np.array([angles(fit_pose(p, mean)[1]) for p in points])


def align_face(image, points) -> np.ndarray:
    """uint8 (H, W, 3), landmarks (68, 2) -> uint8 (112, 112, 3): eyes, nose, mouth nearest to ARCFACE_POINTS"""
    five = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    return warp_face(image, *similarity(to_complex(ARCFACE_POINTS), to_complex(five)), 112)


# --------------------------- motion and silence, after THEval (CVPR 2026, arXiv 2511.04520), whose mesh has more points

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
    windows = sliding_window_view(wav, 800)[::SAMPLES_PER_FRAME][:T]
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
    """Landmarks (T, 68, 2), NaN where there are none, sound or None, height of frames -> {metric: value}"""
    seen = np.isfinite(points).all((1, 2))
    p = points[seen]
    values = {"lip dynamics": dynamics(p[:, MOUTH]) * 256 / height, "brow dynamics": dynamics(p[:, BROWS]) * 256 / height,
              "head motion": float(head_pose(p).std(0).mean())}
    if wav is None:
        return values
    speech, level = speech_frames(wav, len(points))[seen], loudness(wav, len(points))[seen]
    gap = np.linalg.norm(p[:, [67, 66, 65]] - p[:, [61, 62, 63]], axis=-1).mean(1)  # between the inner lips
    gap /= np.linalg.norm(p[:, 45] - p[:, 36], axis=-1)  # in distances of the eyes' outer corners
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


# ------------------------------------------------------------------------------------------------------------- lip sync

def lip_sync_error(face, sound, reach: int = MAX_OFFSET, pad: bool = True):
    """Embeddings (K, E) of windows of frames and of sound -> D, C, and by how many frames the sound is late. D is
    the least mean distance at an offset, C their median less D: SyncNet's (2016), LSE-D and LSE-C of Wav2Lip
    (Prajwal et al. 2020). pad: as published, sound beyond either end is zeros; else see best_offset."""
    distance = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    table = -logits_by_shift(distance, face.float(), sound.float(), reach, 0.0 if pad else math.nan)  # (K, S): as logits
    late, confidence, _ = best_offset(table)
    return -float(np.nanmean(table[:, reach + late])), confidence, late


# ------------------------------------------------------------------------------------------------- the networks at hand

def load_networks(args, device, stack) -> tuple[SimpleNamespace, dict]:
    """Networks that measure, None where missing, and {metric: why it is left out}. stack closes the detector"""
    missing = {name.strip(): "--skip" for name in args.skip.split(",") if name.strip()}
    for name in missing.keys() - METRICS.keys():
        raise InputError(f"--skip {name}: not a metric; there are {', '.join(METRICS)}")

    def landmarks():
        """A function: frames (n, H, W, 3), n boxes -> points (68, 2) or None of each"""
        if args.landmarks:
            detector = stack.enter_context(landmark_detector(args.landmarks, "face", device))
            return lambda frames, boxes: map(detector, frames, boxes)
        net = load_landmarks()
        return lambda frames, boxes: track_landmarks(net, frames, boxes[0])

    fan = args.landmarks == "fan"
    wanted = dict(  # network: its metrics, files that may be absent, how it is loaded, whether an option names it
        sync=(SYNC, (), lambda: load_sync(args.expert or EXPERT, device), args.expert),
        syncnet=(LSE, ("syncnet_v2",), lambda: published.syncnet_v2(device), False),
        landmarks=((*LANDMARKS, "CSIM"), ("fan",) * fan, landmarks, args.landmarks and not fan),
        arcface=(("CSIM",), ("arcface",), lambda: published.arcface(device), False),
        lpips=(("LPIPS",), ("vgg16", "lpips_heads"), lambda: published.lpips(device), False),
        inception=(("FID",), ("inception",), lambda: published.Inception(device), False))
    networks = SimpleNamespace(device=device, skip=missing.copy(), **dict.fromkeys(wanted))
    for name, (metrics, files, load, named) in wanted.items():
        if missing.keys() >= set(metrics):
            continue
        try:
            for file in (PUBLISHED[file].file for file in files):
                if not (args.fetch or (checkpoints_dir() / file).is_file()):
                    raise InputError(f"{file} is not in {checkpoints_dir()} (--fetch downloads what is missing)")
            network = load()
            if name in ("sync", "syncnet", "landmarks") and getattr(network, "template", "") != "toy":
                require_detectors()  # drawn clips are crops already
            setattr(networks, name, network)
        except InputError as error:
            if named:
                raise
            missing |= {metric: str(error) for metric in metrics if metric not in missing}
    return networks, missing


# ------------------------------------------------------------------------------------------------------------- one clip

class Clip:
    """A clip, and what the networks find in it when it is asked for. InputError, without the file's name: nothing"""

    def __init__(self, path, networks):
        self.path, self.networks, stream = path, networks, read_video(path)
        frames = list(islice(stream, 1))
        frames += islice(stream, MOST // frames[0].nbytes)
        self.frames = np.stack(frames)  # (T, H, W, 3)
        self.is_cut = next(stream, None) is not None

    @functools.cached_property
    def wav(self):
        try:
            return load_audio(self.path, normalise=False)  # as published
        except InputError as error:
            raise InputError(str(error).removeprefix(f"{Path(self.path).absolute()}: ")) from None

    @functools.cached_property
    def detections(self):
        """(T, 4 or more): box, score and points of the face, see faces.face_box"""
        T = len(self.frames)
        at = np.unique(np.r_[0, DETECT_EVERY - 1 : T : DETECT_EVERY, T - 1])
        with torch.autocast(self.networks.device.type, enabled=False):  # the detector needs fp32
            found = {k: faces[0] for k in at if (faces := detect_faces(self.frames[k], margins=(1.2,)))}
        if 2 * len(found) < len(at):
            raise InputError(f"a face in {len(found)} of {len(at)} frames looked at")
        return np.stack([np.interp(range(T), list(found), column) for column in zip(*found.values())], 1)

    @functools.cached_property
    def points(self):
        """Landmarks (T, 68, 2), NaN where there are none"""
        boxes, points = [face_box([d], "face") for d in self.detections], []
        for a in range(0, len(self.frames), DETECT_EVERY):
            part = slice(a, a + DETECT_EVERY)
            points.extend(self.networks.landmarks(self.frames[part], boxes[part]))
        points = np.stack([np.full((68, 2), np.nan) if p is None else p for p in points])
        there = np.isfinite(points).all((1, 2)).sum()
        if 2 * there < len(points):
            raise InputError(f"a face in {there} of {len(points)} frames")
        return points

    def through(self, network, images):
        """Images, uint8 (n, H, W, 3) -> what a network gives of them, (n, ..)"""
        parts = (to_tensor(np.stack(images[i : i + 16])).to(self.networks.device) for i in range(0, len(images), 16))
        return torch.cat([network(part).float().cpu() for part in parts])

    def alone(self) -> tuple[dict, dict]:
        """{metric: value} of the clip alone, {what is left out: why}"""
        nets = self.networks
        return gather(Sync=nets.sync and self.sync, LSE=nets.syncnet and self.lse, motion=nets.landmarks and self.motion)

    def motion(self) -> dict:
        wav = None
        with contextlib.suppress(InputError):
            wav = self.wav
        return motion_metrics(self.points, wav, self.frames.shape[1])

    def windows(self, sound: int, less: int) -> int:
        """How many windows of five frames, but `less`, picture and `sound` frames of sound have"""
        K = min(len(self.frames), sound) - WINDOW_FRAMES + 1 - less
        if K <= 0:
            raise InputError(f"too short: {len(self.frames)} frames, {len(self.wav) / SAMPLES_PER_FRAME:.1f} of sound")
        return K

    def sync(self) -> dict:
        net, K = self.networks.sync, self.windows(n_frames(len(self.wav)), 0)
        drawn = net.template == "toy"  # such clips are crops already
        boxes = map(middle_square, self.frames) if drawn else (face_box([d], "face") for d in self.detections)
        crops = (crop_face(frame, box, net.size) for frame, box in zip(self.frames, boxes))
        face, sound = embed_clip(net, crops, log_mel(self.wav), self.networks.device)
        return dict(zip(SYNC, lip_sync_error(face[:K], sound[:K], pad=False)))

    def lse(self) -> dict:
        """By SyncNet v2, as its script: crops by the box alone, one window less than would fit. 4 MFCC a frame"""
        net, K = self.networks.syncnet, self.windows(len(self.wav) // SAMPLES_PER_FRAME, 1)
        crops = [crop_face(f, face_box([d[:5]], "syncnet"), 224) for f, d in zip(self.frames, self.detections)]
        parts = (to_tensor(np.stack(crops[a : a + 63 + WINDOW_FRAMES])).to(self.networks.device) for a in range(0, K, 64))
        face = torch.cat([net.windows(part[None])[0] for part in parts])[:K]
        sound = sliding_window_view(mfcc(self.wav), 20, 1)[:, ::4].swapaxes(0, 1)[:K]  # (K, 13, 20)
        return dict(zip(LSE, lip_sync_error(face, embed_sound(net, sound.astype(np.float32)))))


def gather(**parts) -> tuple[dict, dict]:
    """name=function, or None -> the values that they give, and why others give none"""
    values, why = {}, {}
    for name, part in parts.items():
        try:
            values |= part() if part else {}
        except InputError as error:
            why[name] = str(error)
    return values, why


# ------------------------------------------------------------------------------------------------------- pairs of clips

@torch.inference_mode()
def measure(real, fake, networks) -> dict:
    """A pair -> dict(real=values, fake=values, frames, notes, features). As many frames are compared as both have,
    a fake of another size after resizing. InputError: a file cannot be read, another aspect ratio."""
    a, b, notes = Clip(real, networks), Clip(fake, networks), []
    T, (H, W), (h, w) = min(len(a.frames), len(b.frames)), a.frames.shape[1:3], b.frames.shape[1:3]
    if len(a.frames) != len(b.frames):
        notes.append(f"{len(b.frames)} frames, the real clip has {len(a.frames)}: {T} compared")
    notes += ["longer than memory allows: its beginning is measured"] * (a.is_cut or b.is_cut)
    a.frames, b.frames = a.frames[:T], b.frames[:T]
    if (h, w) != (H, W):
        if abs(np.log(w * H / (h * W))) > 0.02:  # ours: 2 % is what rounding a small side makes
            raise InputError(f"{fake}: frames are {w}x{h}, those of the real clip are {W}x{H}")
        b.frames = np.stack([Image.fromarray(f).resize((W, H), Image.Resampling.LANCZOS) for f in b.frames])
        notes.append(f"resized from {w}x{h} to {W}x{H}")
    values, why = gather(images=lambda: image_metrics(a, b),
                         landmarks=networks.landmarks and (lambda: face_metrics(a, b)))
    why |= {name: f"{W}x{H} px are too few" for name, v in values.items() if np.isnan(v)}
    (own, not_own), (fakes, not_fakes) = a.alone(), b.alone()
    notes += [f"{name}: {reason}" for name, reason in (why | not_fakes).items()]
    notes += [f"{name} of the real clip: {reason}" for name, reason in not_own.items()]
    near = {name: v for name, v in closeness(own, fakes).items() if name == "motion"}
    values = {name: v for name, v in (values | fakes | near).items() if name not in why}
    features = [clip.through(networks.inception, clip.frames[::EVERY]) for clip in (a, b) if networks.inception]
    return dict(real=own, fake=values, frames=T, notes=notes, features=features)


def image_metrics(real: Clip, fake: Clip) -> dict:
    """Means over the frames; NaN: too small"""
    nets, pairs = real.networks, list(zip(real.frames, fake.frames))
    rows = dict(PSNR=[psnr(*pair) for pair in pairs], L1=[l1(*pair) for pair in pairs])
    if not nets.skip.keys() >= {"SSIM", "MS-SSIM"}:
        rows["SSIM"], rows["MS-SSIM"] = zip(*(ssim_and_ms_ssim(*pair) for pair in pairs))
    if nets.lpips:
        beside = np.concatenate([real.frames[::EVERY], fake.frames[::EVERY]], 2)
        rows["LPIPS"] = real.through(lambda x: nets.lpips(*x.chunk(2, -1)), beside)
    return {name: finite_mean(values) for name, values in rows.items()}


def face_metrics(real: Clip, fake: Clip) -> dict:
    a, b, unit, arcface = real.points, fake.points, real.frames.shape[1] / 256, real.networks.arcface
    both = np.flatnonzero(np.isfinite(a).all((1, 2)) & np.isfinite(b).all((1, 2)))
    if 2 * len(both) < len(a):
        raise InputError(f"a face in {len(both)} of {len(a)} frames of both")
    few, a, b = both[both % EVERY == 0], a[both], b[both]
    found = {"LMD": landmark_distance(a, b) / unit, "mouth LMD": mouth_distance(a, b) / unit,
             "pose": np.abs(head_pose(a) - head_pose(b)), "blink": np.abs(measure_eyes(a)[0] - measure_eyes(b)[0])}
    if arcface and len(few):
        x, y = (clip.through(arcface.embed, [align_face(clip.frames[k], clip.points[k]) for k in few])
                for clip in (real, fake))
        found["CSIM"] = (x * y).sum(1)
    return {name: float(v.mean()) for name, v in found.items()}


def pairs_of(real: Path, fake: Path) -> tuple[list, list]:
    """Two files, or two folders -> [(name, real file, fake file)], clips without a partner. InputError: no pair."""
    if real.is_dir() != fake.is_dir():
        raise InputError(f"{real} and {fake}: one is a directory, one is not")
    if not real.is_dir():
        return [(fake.name, check_file(real), check_file(fake))], []
    sides = {}, {}
    for folder, clips in zip((real, fake), sides):
        for path in sorted(folder.rglob("[!.]*")):
            if path.suffix.lower() in VIDEOS and path.is_file():
                other = clips.setdefault(str(path.relative_to(folder).with_suffix("")), path)
                if other != path:
                    raise InputError(f"{path}: {other.name} beside it has the same name")
    names = sorted(sides[0].keys() & sides[1].keys())
    if not names:
        raise InputError(f"{real} and {fake}: no clip here has the name of one there")
    alone = [str(side[name]) for side in sides for name in sorted(side) if name not in names]
    return [(name, sides[0][name], sides[1][name]) for name in names], alone


# ------------------------------------------------------------------------------------------------------------ the table

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


def measure_pairs(args, device):
    """`python evaluate.py pair REAL FAKE`"""
    begin, page = time.perf_counter(), args.json and check_output(args.json, True, (".json",))  # before minutes of work
    (pairs, alone), reports = pairs_of(Path(args.real), Path(args.fake)), []
    with contextlib.ExitStack() as stack:
        networks, missing = load_networks(args, device, stack)
        for name, real, fake in tqdm(pairs, "pairs", disable=None):
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                    reports.append(dict(name=name) | measure(real, fake, networks))
            except InputError as error:
                if len(pairs) == 1:
                    raise
                reports.append(dict(name=name, error=str(error)))
    measured = [report for report in reports if "error" not in report]
    if not measured:
        raise InputError(f"none of {len(pairs)} pairs could be measured; the first: {reports[0]['error']}")
    features = [torch.cat(side) for side in zip(*(pair.pop("features") for pair in measured))]
    real, fake = mean_rows(measured)
    if features and len(features[0]) > 1:
        real["FID"], fake["FID"] = METRICS["FID"].itself, frechet_distance(*features)
    order = [name for name in METRICS if name in fake and name not in missing]
    rows = {"real, against itself": real, os.path.basename(os.path.abspath(args.fake)): fake}
    if near := closeness(real, fake):  # THEval's: of means over the clips
        rows["closeness of these means"] = near
    rows = {row: {name: values.get(name) for name in order} for row, values in rows.items()}
    seconds, frames = time.perf_counter() - begin, sum(pair["frames"] for pair in measured)
    print(markdown_table({row: {METRICS[name].heading(name): "–" if value is None else f"{value:.{METRICS[name].digits}f}"
                          for name, value in values.items()} for row, values in rows.items()}))
    print(f"\n{len(measured)} pairs, {frames} frames, {seconds:.1f} s")
    notes = legend(args, networks, order, len(features[0]) if features else 0) + problems(missing, reports, alone)
    print("\n".join(notes))
    if page:
        versions = dict(revision=git_revision(), torch=torch.__version__, numpy=np.__version__)
        columns = {name: METRICS[name]._asdict() for name in order}
        report = dict(rows=rows, columns=columns, pairs=reports, frames=frames, seconds=seconds, left_out=missing,
                      alone=alone, notes=notes, versions=versions, device=str(device))
        report = json.loads(json.dumps(report), parse_constant=str)  # JSON has no infinity: the string "Infinity"
        page.write_text(json.dumps(report, indent=1))
        write_pairs_page(page, report, {name: files for name, *files in pairs})


def legend(args, networks, order, n: int) -> list[str]:
    """Lines under the table: which networks scored, usual values, and what makes a number doubtful"""
    lines = [f"LSE scored by SyncNet v2, as published: {PUBLISHED['syncnet_v2'].file}"] if networks.syncnet else []
    if networks.sync:
        lines.append(f"Sync scored by our expert: {args.expert or EXPERT.name}; one that trained the fakes flatters them")
    for name in order:
        if METRICS[name].usual and not (name in SYNC and args.expert):  # of another expert they are unknown
            lines.append(f"{name} of real clips is usually {METRICS[name].usual}")
    if networks.landmarks:
        lines.append(f"landmarks by {args.landmarks or 'weights/landmarks.pt'}")
        voice = "Silero's detector" if voice_detector() else f"loudness, {GATE} dB below a clip's loudest (no silero-vad)"
        lines.append(f"speech and silence by {voice}; closeness: 1 - |fake - real| / real")
    if "FID" in order and n < 2048:
        lines.append(f"FID is from {n} frames a side: with fewer than the 2048 features it comes out too high")
    return lines


def problems(missing, reports, alone) -> list[str]:
    """Lines under the table: metrics and clips that are left out, and the notes of pairs"""
    reasons, notes = defaultdict(list), defaultdict(list)
    for name, reason in missing.items():
        reasons[reason].append(name)
    for pair in reports:
        for note in [f"left out: {pair['error']}"] if "error" in pair else pair["notes"]:
            notes[note].append(pair["name"])
    lines = [f"left out: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    for note, names in notes.items():  # one line for many pairs
        lines += [f"{name}: {note}" for name in names] if len(names) <= 3 else [f"{len(names)} pairs: {note}"]
    return lines + [f"without a partner: {path}" for path in alone]


def parse(argv=None):
    p = Parser(description="Metrics of talking clips.")
    pair, toy = p.commands(pair="generated clips against real ones",
                           toy="the control table of networks trained on the toy world")
    pair.add_argument("real", help="a real clip, or a folder of them")
    pair.add_argument("fake", help="a generated clip, or a folder whose clips have the same names")
    pair.add_argument("--landmarks", help="mediapipe:FILE, dlib:FILE or fan (default: our network, weights/landmarks.pt)")
    pair.add_argument("--expert", help="sync expert of syncnet.py, or wav2lip (default: weights/sync.pt)")
    pair.add_argument("--fetch", action="store_true", help="download the networks that are missing (about 1 GB in all)")
    pair.add_argument("--skip", default="", help="metrics to leave out, with commas between: LPIPS,FID")
    pair.add_argument("--bf16", action="store_true", help="bf16 autocast: faster on a CPU with AMX and a GPU, less exact")
    toy.add_argument("weights", nargs="+", help="weights.pt or stage3.pt; of a stage2.pt the inversion is measured")
    toy.add_argument("--people", type=int, default=32, help="held-out people")
    toy.add_argument("--cache", default="out/evaluate", help="where the probe and its drawn people are kept")
    for command in (pair, toy):
        command.add_argument("--json", help="write the numbers to this .json, and a page beside it (.html)")
        command.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return p.parse_args(argv, people=(6, 10**6))  # a trial takes three, and is compared with another's


def main(argv=None):
    args = parse(argv)
    (toy_report if args.command == "toy" else measure_pairs)(args, pick_device(args.device))


if __name__ == "__main__":
    run(main)
