"""The sync expert: does this mouth fit this sound? Trained here, then frozen for the sync loss of train.py's stage 3.

Papers: SyncNet (Chung & Zisserman 2016), two towers and the distance of their embeddings; the expert of Wav2Lip (arXiv
2008.10010), five frames and 0.2 s of mel; SigLIP (arXiv 2303.15343), the pairwise sigmoid over a batch.

    python syncnet.py train                   # out/toy32/sync.pt, on the toy world    (3 min of one core: .96 unseen)
    python syncnet.py test                    # accuracy by shift, on held-out people and speech
    python syncnet.py offset clip.mp4         # the lag of the sound in frames, by weights/sync.pt; --fix out.mp4

Differences from Wav2Lip, besides 3x3 kernels throughout (measurements: docs/sync.md):
- Real faces enter as the shape of the lips, 50 numbers per frame by landmarks.py, which generalises from few people.
  Drawn faces have no landmarks and enter as pixels.
- The cosine has a learned scale and bias. In Wav2Lip the cosine after a ReLU is itself the probability (--cosine).
- Negatives are all other pairs of a batch: of the same clip (hard) and, for drawn faces, of other clips.
- A softmax over the batch, which does not depend on the bias, is added: the sigmoid alone stays at ln 2 for long.
- Deviations of the five frames from their mean are enlarged, because most of the variance is identity, not motion.
- GroupNorm replaces BatchNorm, whose statistics reveal to the towers which windows of a batch share a clip.

Axes: n images, B pairs, N windows of a batch, K windows of a clip, E embedding, S shifts or mel steps, C H W.
"""

import math
import re
import shutil
import subprocess
import tempfile
from collections import OrderedDict
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from audio import N_MELS, WINDOW, AudioEncoder, ConvBlock, change_voice, log_mel, mel_windows
from checkpoint import (
    StepTimer, add_run_options, claim_output, cosine_warmup, count_parameters, fp16_state_dict, load_checkpoint,
    load_strictly, open_log, optimiser_step, pick_device, progress_bar, restore_run, resume_options, save_checkpoint,
    save_run, terms_to_floats, warn_of_slow_bf16, wrap_errors, write_log)
from data import Pack, add_split_options, balance_people, batches, find_used_clips, open_packs, split
from faces import MAX_CLIP_FRAMES, MAX_HEIGHT, crop_face, find_clip_box, middle_square, parse_box
from judges import wav2lip_expert
from landmarks import FACE_SIZE, LIP_MIRROR, LIP_POINTS, LandmarkNet, lip_shape, load_landmarks, read_lips
from media import (
    FPS, READ_ALL_STREAMS, InputError, Parser, atomic_write, check_file, check_output, decode_command,
    describe_media, last_error, load_audio, probe, read_video, run, to_tensor, write_original_sound)
from report import image_grid, markdown_table
from toyfaces import open_toy_pack

WINDOW_FRAMES = 5  # as long as the 16 mel steps of the middle frame (Wav2Lip)
HALF_WINDOW = WINDOW_FRAMES // 2
MIN_SHIFT = 4  # frames; ours: sounds nearer than this are too alike for a negative pair
MAX_OFFSET = 15  # frames: offsets are searched in -15 .. 15 (SyncNet)
LIP_SCALE = 0.07  # ours: deviation of lip coordinates, in distances of the eyes
MATCH_LOGIT = 0.65  # ours: for nine of ten other sentences of GRID's grammar the mean logit at every offset is less
DEVIATION_GAIN = 3.0  # of frames from their mean (ours): brings the variance of motion near that of the mean
PIECE_SECONDS = dict(offset_1s=1, offset_3s=3)  # length of the pieces whose offset is tested
LOG_EVERY = 50  # steps
SHIPPED_EXPERT = Path(__file__).parent / "weights" / "sync.pt"  # for real faces, see its card
TOY_EXPERT = "out/toy32/sync.pt"  # default output of `train`
CHANCE_LOSS = math.log(2)  # the sigmoid loss at zero logits


# --------------------------------------------------------------------------------------------------------- the networks

def make_time_tower(c_in: int, steps: int, strides: tuple, dim: int, channels: int = 96) -> nn.Sequential:
    """(B, c_in, steps) -> (B, dim), by a convolution over time for each stride"""
    layers = []
    for stride in strides:
        layers += [nn.Conv1d(c_in, channels, 3, stride, 1), nn.GroupNorm(8, channels), nn.GELU(), nn.Dropout(0.2)]
        c_in, steps = channels, -(-steps // stride)
    layers += [nn.Flatten(), nn.Linear(channels * steps, 2 * channels), nn.GELU()]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers), out=nn.Linear(2 * channels, dim)))


def make_pixel_tower(size: int, dim: int, width: float) -> nn.Sequential:
    """Lower halves of five images (B, 15, size / 2, size) -> (B, dim). Wav2Lip's layout: to a square, then halvings"""
    c = [max(8, 8 * round(c * width / 8)) for c in (32, 64, 128, 256, 512)]
    layers = [ConvBlock(3 * WINDOW_FRAMES, c[0]), ConvBlock(c[0], c[1], stride=(1, 2)),
              ConvBlock(c[1], c[1], residual=True)]
    rows, level = size // 2, 1  # (B, c1, rows, rows) so far
    while rows > 4:  # 96 px: 48, 24, 12, 6, 3; 32 px: 16, 8, 4
        a, b = c[min(level, 4)], c[min(level + 1, 4)]
        layers += [ConvBlock(a, b, stride=2), ConvBlock(b, b, residual=True)]
        rows, level = -(-rows // 2), level + 1
    out = nn.Linear(c[min(level, 4)] * rows**2, dim)
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers, nn.Flatten()), out=out))


class SyncNet(nn.Module):
    """Two towers; logit = scale * cosine + bias, positive for "in sync". size: edge of the images, a multiple of 16;
    larger images are shrunk. dim: E. width: channels of the pixel towers, 1 as in Wav2Lip. lips: for real faces, by the
    shape of their lips, size 64. cosine: as in Wav2Lip, the cosine of embeddings after a ReLU is the probability."""

    def __init__(self, size: int = 96, dim: int = 512, width: float = 1.0, lips: bool = False, cosine: bool = False):
        super().__init__()
        assert size % 16 == 0 and size > 0, f"size is {size}, expected a multiple of 16"
        self.config = dict(size=size, dim=dim, width=width, lips=lips, cosine=cosine)
        self.size, self.lips, self.cosine = size, lips, cosine
        if lips:
            self.landmarks = LandmarkNet().requires_grad_(False)
            self.face_tower = make_time_tower(4 * len(LIP_POINTS), WINDOW_FRAMES, (1, 1), dim)
            self.sound_tower = make_time_tower(N_MELS, WINDOW, (1, 2, 2), dim)
        else:
            self.face_tower, self.sound_tower = make_pixel_tower(size, dim, width), AudioEncoder(dim, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))  # ours: SigLIP's 10 starts at a larger loss
        self.bias = nn.Parameter(torch.tensor(0.0))  # SigLIP's -10 is for one positive in 32,000; ours are balanced

    def read(self, images):
        """Whole crops (n, 3, H, H) in [-1, 1], H >= size -> lips (n, 50), or crops shrunk to size"""
        H = images.shape[-1]
        assert images.shape[1:] == (3, H, H) and H >= self.size, (
            f"images are {tuple(images.shape)}, expected (n, 3, H, H) with H >= {self.size}")
        if H > self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return read_lips(self.landmarks, images) if self.lips else images

    def embed(self, x):
        """Five frames of `read` (B, 5, ..) -> (B, E) of unit length"""
        if self.lips:
            x = (x - lip_shape(torch.view_as_complex(self.landmarks.mean))) / LIP_SCALE
            x = torch.cat([x, DEVIATION_GAIN * (x - x.mean(1, keepdim=True))], 2).mT  # (B, 100, 5)
        else:  # the mean replaces the middle frame's deviation, which the other four determine
            x = x[..., self.size // 2 :, :]  # (B, 5, 3, size/2, size): lips and chin, not the eyes
            mean = x.mean(1, keepdim=True)
            deviation = DEVIATION_GAIN * (x - mean)
            x = torch.cat([deviation[:, :HALF_WINDOW], mean, deviation[:, HALF_WINDOW + 1 :]], 1).flatten(1, 2)
        return self.to_unit_length(self.face_tower(x))

    def face(self, frames):
        """Whole crops (B, 5, 3, H, H) in [-1, 1] -> (B, E) of unit length"""
        assert frames.shape[1] == WINDOW_FRAMES, f"frames are {tuple(frames.shape)}, expected (B, 5, 3, H, H)"
        return self.embed(self.read(frames.flatten(0, 1)).unflatten(0, (-1, WINDOW_FRAMES)))

    def sound(self, mel):
        """Mel windows of the middle frames (B, 1, 80, 16) -> (B, E) of unit length"""
        return self.to_unit_length(self.sound_tower(mel[:, 0] / 4 if self.lips else mel))

    def to_unit_length(self, x):
        return F.normalize(x.float().relu() if self.cosine else x.float(), dim=1)

    def logits(self, face, sound):
        """(B, E), (B2, E) of unit length -> (B, B2), log odds of "in sync" """
        cosine = face @ sound.t()
        return torch.logit(cosine.float(), eps=1e-4) if self.cosine else self.log_scale.exp() * cosine + self.bias


def load_sync(path: str | Path, device, size: int | None = None) -> nn.Module:
    """A trained expert, frozen, for images of this size. path: "wav2lip" is Wav2Lip's published expert, downloaded on
    first use; *.pth is a copy of it. InputError: see load_checkpoint; images are too small; the download fails."""
    if str(path) == "wav2lip" or Path(path).suffix == ".pth":
        expert = wav2lip_expert(device, None if str(path) == "wav2lip" else path)
        expert.size, expert.template = 96, "face"  # it enlarges smaller images
        expert.read, expert.embed = nn.Identity(), expert.face
        return expert
    checkpoint = load_checkpoint(path, "syncnet")
    with wrap_errors(path, "its networks do not fit this version"):
        config = checkpoint["config"]
        expert = load_strictly(lambda: SyncNet(**config["net"]), checkpoint["networks"]["expert"], path)
        expert.template = config["template"]
    if size is not None and size < expert.size:
        raise InputError(f"{path}: an expert for images of {expert.size} px or more, these are {size} px")
    return expert.to(device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------- the loss

def expert_loss(logits, clip, middle, min_shift: int = MIN_SHIFT, other_clips: bool = True) -> dict:
    """logits (N, N) of face i and sound j; clip, middle frame (N,) of window i -> terms of the loss.

    Sigmoid terms, absent without such a pair: in_sync (the diagonal), shifted (same clip, at least min_shift frames
    apart), other (another clip, if other_clips). loss: half in_sync, half the mean of the negative terms; ln 2 at zero
    logits. contrast: CLIP's cross-entropy of softmaxes over these pairs. InputError: no pair is negative."""
    N = len(clip)
    assert logits.shape == (N, N), f"logits are {tuple(logits.shape)}, expected {(N, N)}"
    same_clip, shift = clip[:, None] == clip, (middle[:, None] - middle).abs()
    negatives = dict(shifted=same_clip & (shift >= min_shift), other=~same_clip & other_clips)
    in_sync = F.softplus(-logits.diagonal()).mean()
    terms = {name: F.softplus(logits[pairs]).mean() for name, pairs in negatives.items() if pairs.any()}
    if not terms:
        raise InputError("a batch has no negative pair: give a smaller --negatives, more --windows, or longer clips")
    loss = (in_sync + sum(terms.values()) / len(terms)) / 2
    index = torch.arange(N, device=logits.device)
    candidates = negatives["shifted"] | negatives["other"] | (index[:, None] == index)
    logits = logits.masked_fill(~candidates, -1e4)
    contrast = (F.cross_entropy(logits, index) + F.cross_entropy(logits.t(), index)) / 2
    return dict(loss=loss, in_sync=in_sync, **terms, contrast=contrast)


# ------------------------------------------------------------------------------------------------------------- the data

class Windows(Dataset):
    """Several five-frame windows of a clip; all clips have five frames or more. Item n depends on (seed, n) alone. Keeps
    the outputs of the expert's `read`, and mels, in memory. augment: vary faces and voices."""

    def __init__(self, pack: Pack, clips, expert, windows: int = 0, seed: int = 0, augment: bool = True):
        self.pack, self.clips, self.expert = pack, np.asarray(clips), expert
        self.windows, self.seed, self.augment = windows, seed, augment
        self.read = cache(self.read)

    def __getitem__(self, n: int) -> dict:
        """-> frames (windows, 5, ..), mel (windows, 1, 80, 16), clip (windows,), middle (windows,): middle frames"""
        rng = np.random.default_rng([self.seed, n])
        c, other = (int(v) for v in rng.choice(self.clips, 2))
        x, mel = self.read(c)
        K = len(x) - WINDOW_FRAMES + 1
        middle = HALF_WINDOW + np.sort(rng.choice(K, self.windows, replace=K < self.windows))  # (windows,)
        frames = middle[:, None] + np.arange(-HALF_WINDOW, HALF_WINDOW + 1)  # (windows, 5)
        x, mel = x[torch.from_numpy(frames)], mel_windows(mel, middle)
        if self.augment:
            x = augment_lips(x, self.read(other)[0], rng) if self.expert.lips else augment_images(x, rng)
            mel = change_voice(mel, rng)
        clip = torch.full(middle.shape, c)
        return dict(frames=x, mel=torch.from_numpy(mel), clip=clip, middle=torch.from_numpy(middle))

    @torch.no_grad()
    def read(self, c: int):
        """Clip c -> the expert's `read` of its frames (T, ..), mel (80, S)"""
        images = to_tensor(self.pack.frames(c, range(self.pack.n_frames[c])))
        images = images.to(next(self.expert.parameters()).device)
        return self.expert.read(images).cpu(), log_mel(self.pack.sound(c))


def augment_lips(x, other, rng):
    """Varies all windows of a clip (K, 5, 50) alike, and adds noise. other (T, 50): another clip. Ranges are ours."""
    mean = x.mean((0, 1))
    to_other = rng.uniform(0, 0.8) * (rng.random() < 0.7) * (other.mean(0) - mean)
    x = (mean + to_other + np.exp(rng.normal(0, 0.15)) * (x - mean)).unflatten(-1, (-1, 2))  # (K, 5, 25, 2)
    if rng.random() < 0.5:
        x = x[:, :, LIP_MIRROR] * torch.tensor([-1.0, 1.0])
    angle, middle = rng.normal(0, 0.06), x.mean((0, 1, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * np.exp(rng.normal(0, 0.12, 2))
    x = (x - middle) @ torch.from_numpy(turn).float() + middle + torch.from_numpy(rng.normal(0, 0.04, 2)).float()
    return (x + torch.from_numpy(rng.normal(0, 0.006 * rng.random(), x.shape)).float()).flatten(2)


def augment_images(frames, rng):
    """Varies each window of a clip (K, 5, 3, H, H), its five frames alike; mirrors all or none. Ranges are ours."""
    K, H = len(frames), frames.shape[-1]
    turn, zoom = rng.uniform(-0.07, 0.07, K), np.exp(rng.uniform(-0.05, 0.05, K))
    mirror = -1 if rng.random() < 0.5 else 1
    cos, sin, zero = zoom * np.cos(turn), zoom * np.sin(turn), np.zeros(K)
    theta = np.array([[mirror * cos, -sin, zero], [mirror * sin, cos, zero]]).transpose(2, 0, 1)  # (K, 2, 3)
    theta[:, :, 2] = rng.uniform(-0.1, 0.1, (K, 2))  # of half the edge
    grid = F.affine_grid(torch.from_numpy(theta).float(), (K, 1, H, H), align_corners=False)
    x = F.grid_sample(frames.flatten(1, 2), grid, padding_mode="border", align_corners=False)  # (K, 15, H, W)
    soft = torch.from_numpy(rng.random(K) < 1 / 3)  # as images of young generators are
    if soft.any():
        x[soft] = F.interpolate(F.avg_pool2d(x[soft], 2), (H, H), mode="bilinear")
    contrast = rng.uniform(0.7, 1.3, (K, 1, 1, 1, 1)) * rng.uniform(0.9, 1.1, (K, 1, 3, 1, 1))
    brightness = rng.uniform(-0.3, 0.3, (K, 1, 1, 1, 1))
    return x.view_as(frames) * torch.from_numpy(contrast).float() + torch.from_numpy(brightness).float()


# ------------------------------------------------------------------------------- logits of clips, by shift of the sound

@torch.no_grad()
def embed_clip(expert, images, mel, batch: int = 128):
    """Iterable of uint8 (H, H, 3), mel (80, S) -> embeddings of face (K, E) and sound (K, E) of all K = frames - 4
    windows; window i has frames i .. i+4. At most `batch` images are in memory."""
    images, overlap, faces, device = iter(images), [], [], next(expert.parameters()).device
    while new := list(islice(images, batch)):
        x = torch.cat([*overlap, expert.read(to_tensor(np.stack(new)).to(device))])
        if len(x) >= WINDOW_FRAMES:
            faces.append(embed_frames(expert, x))
        overlap = [x[1 - WINDOW_FRAMES :]]
    assert faces, "a clip of fewer than five frames has no window"
    face = torch.cat(faces)
    return face, embed_sound(expert, mel_windows(mel, HALF_WINDOW + np.arange(len(face))))


def embed_frames(expert, x):
    """The expert's `read` of n images -> embeddings (n - 4, E) of every five consecutive ones"""
    return expert.embed(x.unfold(0, WINDOW_FRAMES, 1).movedim(-1, 1))


def embed_sound(expert, windows: np.ndarray):
    """Windows of sound (K, ..) -> embeddings (K, E)"""
    device = next(expert.parameters()).device
    return torch.cat([expert.sound(block.to(device)) for block in torch.from_numpy(windows).split(128)]).float()


@torch.no_grad()
def logits_by_shift(logits_of, face, sound, beyond: float = math.nan):
    """An expert's `logits`, embeddings of face and sound (K, E) -> (K, S), S = 31: column MAX_OFFSET + d has the logits
    of face k and sound k + d. beyond: value of sound embeddings outside the clip."""
    rows, sound = [], F.pad(sound, (0, 0, MAX_OFFSET, MAX_OFFSET), value=beyond)
    for first in range(0, len(face), 256):  # a block of b windows at once
        logits = logits_of(face[first:][:256], sound[first:][: 256 + 2 * MAX_OFFSET])  # (b, b + 30)
        rows.append(torch.stack([logits.diagonal(d) for d in range(2 * MAX_OFFSET + 1)], 1))
    return torch.cat(rows).cpu().numpy()


def best_offset(table, largest: int = MAX_OFFSET):
    """(K, S) of logits_by_shift -> lag of the sound in frames, up to `largest`; confidence; fit. Offsets need half of
    the windows. confidence: mean logit at the lag minus the median over offsets (SyncNet's, with logits in place of
    distances). fit: mean logit at the lag minus MATCH_LOGIT * sqrt(3 s / length); above 0 mouth and sound match"""
    counts = np.isfinite(table).sum(0)
    means = np.where(2 * counts >= len(table), np.nansum(table, 0) / np.maximum(counts, 1), np.nan)  # (S,)
    best = MAX_OFFSET - largest + int(np.nanargmax(means[MAX_OFFSET - largest : MAX_OFFSET + largest + 1]))
    fit = means[best] - MATCH_LOGIT * (3 * FPS / len(table)) ** 0.5
    return best - MAX_OFFSET, float(means[best] - np.nanmedian(means)), float(fit)


@torch.no_grad()
def measure_clips(expert, windows: Windows, clips) -> list[dict]:
    """-> for each clip its table (K, S) of logits_by_shift; offset_1s, _3s, _clip: errors of offsets in frames"""
    results, device = [], next(expert.parameters()).device
    for c in clips:
        x, mel = windows.read(c)
        face = embed_frames(expert, x.to(device))
        sound = embed_sound(expert, mel_windows(mel, HALF_WINDOW + np.arange(len(face))))
        table = logits_by_shift(expert.logits, face, sound)
        result = dict(table=table, offset_clip=[best_offset(table)[0]])
        for name, seconds in PIECE_SECONDS.items():
            result[name], K = [], seconds * FPS - WINDOW_FRAMES + 1  # K windows of the piece
            for start in range(0, len(face) - K + 1, WINDOW_FRAMES):
                for shift in (-WINDOW_FRAMES, 0, WINDOW_FRAMES):  # artificial shift of the sound
                    if 0 <= start + shift <= len(face) - K:
                        piece = logits_by_shift(expert.logits, face[start:][:K], sound[start + shift :][:K])
                        result[name].append(best_offset(piece)[0] + shift)
        results.append(result)
    return results


def summarise(results: list[dict]) -> dict:
    """Results of measure_clips -> accuracy: share of logits with the right sign, the mean of windows in sync and windows
    shifted by five frames or more; second: the same for the mean logit of each second; by_shift: both for shifts
    0 .. MAX_OFFSET; loss: the sigmoid loss; offset_window, _1s, _3s, _clip: share of offsets found within one frame."""
    tables = [result["table"] for result in results]
    table = np.concatenate(tables)  # (windows, S)
    second = [sliding_window_view(t, min(FPS - WINDOW_FRAMES + 1, len(t)), 0).mean(-1) for t in tables]
    rates = dict(accuracy=accuracy_by_shift(table), second=accuracy_by_shift(np.concatenate(second)))
    close = range(MAX_OFFSET - WINDOW_FRAMES + 1, MAX_OFFSET + WINDOW_FRAMES)  # columns of windows that share frames
    in_sync, shifted = table[:, MAX_OFFSET], np.delete(table, close, 1)
    shifted_losses = np.logaddexp(0, shifted[np.isfinite(shifted)])
    shifted_loss = shifted_losses.mean() if len(shifted_losses) else CHANCE_LOSS
    errors = {name: np.concatenate([result[name] for result in results]) for name in (*PIECE_SECONDS, "offset_clip")}
    errors["offset_window"] = np.nanargmax(table, 1) - MAX_OFFSET
    return dict(by_shift={name: rate.tolist() for name, rate in rates.items()}, windows=len(table),
                loss=float(np.logaddexp(0, -in_sync).mean() + shifted_loss) / 2,
                **{name: float(np.nanmean(rate[WINDOW_FRAMES:])) if np.isfinite(rate[WINDOW_FRAMES:]).any() else math.nan
                   for name, rate in rates.items()},
                **{name: float((abs(e) <= 1).mean()) if len(e) else math.nan for name, e in errors.items()})


def accuracy_by_shift(table):
    """(K, S) of logits_by_shift -> (S // 2 + 1,) by size of the shift; NaN where no window has this shift"""
    middle = table.shape[1] // 2
    logits = np.concatenate([table[:, middle::-1], table[:, middle:]])  # (2 K, S // 2 + 1)
    with np.errstate(invalid="ignore"):
        positive = (logits > 0).sum(0) / np.isfinite(logits).sum(0)
    return np.r_[positive[0], (positive[0] + 1 - positive[1:]) / 2]  # at shift 0 no pair is negative


# ---------------------------------------------------------------------------------------------------------------- train

def train(args, argv=None):
    """Writes --out, the weights with the least held-out loss, and OUT_last.pt for --resume, which is exact on a CPU, but
    for `average` in the log, which starts anew."""
    out = claim_output(args.out, args)
    last = out.with_stem(f"{out.stem}_last")
    if args.resume:
        args = resume_options(parse, argv, args, load_checkpoint(last, "syncnet"), last)
    device = pick_device(args.device)
    warn_of_slow_bf16(args, device)
    expert, opt, start, best = start_or_resume(args, last, device)
    pack, clips, val_pack, val_clips = load_data(args, out.parent)
    print(f"sync expert on {device}: {len(clips)} clips to train on, {len(val_clips)} to validate, "
          f"{count_parameters(expert)}; chance is a loss of {CHANCE_LOSS:.3f}")

    used = dict(train=pack.fingerprints[clips], valid=val_pack.fingerprints[val_clips])
    windows = Windows(pack, balance_people(pack, clips, args), expert, args.windows, args.seed)
    val_windows, stream = Windows(val_pack, val_clips, expert), batches(windows, args.batch, start)
    log, timer = open_log(out.with_name(f"log_{out.stem}.jsonl"), args), StepTimer(device)
    min_shift, validate_every = round(args.negatives * FPS), max(1, min(1000, args.steps // 4))
    average = math.nan  # running mean of the sigmoid loss
    for step in (bar := progress_bar("sync expert", start, args.steps)):
        batch = {name: x.flatten(0, 1) for name, x in timer.next_batch(stream).items()}  # (N, ..)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            face, sound = expert.embed(batch["frames"]), expert.sound(batch["mel"])  # (N, E)
        terms = expert_loss(expert.logits(face, sound), batch["clip"], batch["middle"], min_shift, not expert.lips)
        line = terms_to_floats(terms, step)
        loss = terms["loss"] + (0 if args.cosine else 0.5 * terms["contrast"])  # ours: .5
        with optimiser_step(opt, cosine_warmup(step, args.steps)):
            loss.backward()
        sigmoid = terms["loss"].detach()
        average = sigmoid if step == start else average.lerp(sigmoid, 1 / LOG_EVERY)

        done, end = step + 1, step + 1 == args.steps
        if done % LOG_EVERY == 0 or end:
            line |= dict(average=average.item(), scale=expert.log_scale.exp().item(), bias=expert.bias.item())
            write_log(log, bar, dict(step=done) | line | timer.pace(len(face)), args.steps)
        if done % validate_every == 0 or end:
            summary = summarise(measure_clips(expert.eval(), val_windows, val_clips))
            expert.train()
            write_log(log, bar, dict(step=done) | {f"val_{k}": v for k, v in summary.items() if type(v) is float})
            checkpoint = dict(kind="syncnet", config=dict(net=expert.config, template=pack.template),
                              step=done, clips=used, val=summary)
            if summary["loss"] < best:
                best = summary["loss"]
                save_checkpoint(out, checkpoint | dict(networks=dict(expert=fp16_state_dict(expert))))
            save_run(last, checkpoint | dict(best=best), args, dict(expert=expert), dict(adam=opt))
            timer = StepTimer(device)  # without the time of validation
    print(f"{out}: held-out loss {best:.3f}; test it with  python syncnet.py test --expert {args.out}")


def start_or_resume(args, path: Path, device) -> tuple:
    """-> expert, optimiser, steps done, least held-out loss; with --resume those of `path`"""
    torch.manual_seed(args.seed)
    args.width = args.width or (0.25 if args.size <= 32 else 0.5)
    lips = bool(args.data) and open_packs(args.data).template != "toy"
    args.size = FACE_SIZE if lips else args.size
    expert = load_sync(path, device) if args.resume else SyncNet(args.size, args.dim, args.width, lips, args.cosine)
    if expert.size != args.size:
        raise InputError(f"{path}: an expert for images of {expert.size} px, --size is {args.size}")
    if lips and not args.resume:
        expert.landmarks = load_landmarks()
    expert = expert.to(device).train().requires_grad_(True)
    if lips:
        expert.landmarks.requires_grad_(False)
    towers, scale = [*expert.face_tower.parameters(), *expert.sound_tower.parameters()], [expert.log_scale, expert.bias]
    groups = [dict(params=towers), dict(params=scale, weight_decay=0.0, lr=10 * args.lr)]  # 10: it grows from 5 to 40
    opt = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.99), weight_decay=0.02)
    if not args.resume:
        return expert, opt, 0, math.inf
    saved = load_checkpoint(path, "syncnet")
    restore_run(path, saved, dict(adam=opt))
    return expert, opt, saved["step"], saved["best"]


def load_data(args, folder: Path):
    """-> pack, clips to train on; pack, clips to validate on. Without --data toy packs are drawn in the folder."""
    if not args.data:
        pack = open_toy_pack(folder, args.size)
        val_pack = open_toy_pack(folder, args.size, "tune")
        return pack, split(pack, args)["train"], val_pack, np.arange(len(val_pack))
    pack = open_packs(args.data)
    if pack.size < args.size:
        raise InputError(f"{pack.folder}: images of {pack.size} px, this expert needs {args.size} px or more")
    train, valid, _ = (clips[pack.n_frames[clips] >= WINDOW_FRAMES] for clips in split(pack, args).values())
    if not (len(train) and len(valid)):
        raise InputError(f"{pack.folder}: clips of {WINDOW_FRAMES} frames or more are too few to train and validate on")
    return pack, train, pack, valid


# ----------------------------------------------------------------------------------------------------------------- test

def test(args):
    """Prints scores of held-out clips, by shift and by person; --out is a histogram of offset errors."""
    out, device = args.out and check_output(args.out, True, (".png",)), pick_device(args.device)
    path = args.expert or (SHIPPED_EXPERT if args.data else TOY_EXPERT)
    expert = load_sync(path, device, open_packs(args.data).size if args.data else None)
    pack, clips, description = open_test_clips(args.data, expert, path)
    clips = clips[pack.n_frames[clips] >= WINDOW_FRAMES]
    if not len(clips):
        raise InputError(f"{pack.folder}: no clip to test on has {WINDOW_FRAMES} frames")
    results = measure_clips(expert, Windows(pack, [], expert), tqdm(clips, "clips", disable=None))
    summary, titles = summarise(results), dict(accuracy="accuracy, windows of 0.2 s", second="of seconds")
    rows = {f"shifted by {d} frames": {title: f"{summary['by_shift'][name][d]:.3f}" for name, title in titles.items()}
            for d in range(MAX_OFFSET + 1)}
    rows[f"{WINDOW_FRAMES} to {MAX_OFFSET}"] = {title: f"{summary[name]:.3f}" for name, title in titles.items()}
    print(f"{description}: {len(clips)} clips, {summary['windows']} windows; loss {summary['loss']:.3f} (chance "
          f"{CHANCE_LOSS:.3f})\n\n{markdown_table(rows)}\n")
    titles = dict(second="in sync or not, of 1 s", offset_window="offset within one frame: of 0.2 s",
                  offset_1s="of 1 s", offset_3s="of 3 s", offset_clip="of clips")
    people, rows = [pack.identities[pack.identity[c]] for c in clips], {}
    for name in [*sorted(set(people)), "all"]:
        own = [result for result, person in zip(results, people) if name in (person, "all")]
        summary = summarise(own)
        rows[name] = dict(clips=str(len(own))) | {title: summary[key] for key, title in titles.items()}
    print(markdown_table(rows))
    if out:
        draw_offset_errors(results).save(out)


def draw_offset_errors(results: list[dict]):
    """Results of measure_clips -> a histogram for each length of pieces; its ends include larger errors"""
    images, titles = [], []
    for name, seconds in PIECE_SECONDS.items():
        errors = np.concatenate([result[name] for result in results]).astype(int).clip(-MAX_OFFSET, MAX_OFFSET)
        counts = np.bincount(errors + MAX_OFFSET, minlength=2 * MAX_OFFSET + 1)
        bars = np.arange(100)[::-1, None] < 100 * counts / max(1, counts.max())  # (100, 31)
        images.append(np.where(bars[..., None], (110, 214, 140), (36, 40, 52)).astype(np.uint8).repeat(10, 1))
        titles.append(f"pieces of {seconds} s: frames off, -15 to 15 ({len(errors)})")
    return image_grid([images], [titles], 310)


def open_test_clips(data: list | None, expert, path) -> tuple:
    """-> pack, numbers of its clips outside the training and validation data of the expert, a description. data: packs;
    None: toy people who are reserved for tests. InputError: no such clip."""
    if not data and expert.template != "toy":
        raise InputError(f"{path}: not an expert of the toy world; give a pack of held-out clips with --data")
    if not data:
        pack = open_toy_pack(Path(path).absolute().parent, expert.size, "test")
        return pack, np.arange(len(pack)), "toy people and speech reserved for tests"
    pack, description = open_packs(data), " ".join(data)
    if not isinstance(expert, SyncNet):
        return pack, np.arange(len(pack)), description
    used = np.concatenate([*find_used_clips(load_checkpoint(path, "syncnet"), pack, path).values()])
    clips = np.setdiff1d(np.arange(len(pack)), used)
    if not len(clips):
        raise InputError(f"{pack.folder}: {path} was trained or validated on all its clips, none is left to test on")
    if len(used):
        description += ", the clips held out from training and validation"
    return pack, clips, description


# --------------------------------------------------------------------------------------------------------------- offset

def offset(args):
    """Prints the lag of a clip's sound in frames, and the confidence in it; --fix writes the clip in sync."""
    expert, path = load_sync(args.expert, pick_device(args.device)), check_file(args.clip)
    out = check_output(args.fix, args.overwrite, (".mp4",), (path,)) if args.fix else None
    mel, crops = log_mel(load_audio(path)), crop_faces(path, expert, args.box)
    first = list(islice(crops, WINDOW_FRAMES + 1))
    if len(first) < WINDOW_FRAMES + 1:
        raise InputError(f"{path}: {len(first)} frames are too few, an offset needs {WINDOW_FRAMES + 1}")
    face, sound = embed_clip(expert, tqdm(chain(first, crops), "frames", disable=None), mel)  # 8 kB per frame
    lag, confidence, fit = best_offset(logits_by_shift(expert.logits, face, sound))
    frames = f"{abs(lag)} frame{'s' * (abs(lag) != 1)} ({abs(lag) / FPS:.2f} s) {'late' if lag > 0 else 'early'}"
    print(f"{path}: the sound is {frames if lag else 'in sync'}; confidence {confidence:.1f}, "
          f"{'sure' if fit > 0 else 'a guess'} ({len(face)} windows)")
    if out:
        write_shifted(path, lag, out)
        print(f"{out}: the same pictures, the sound moved by {-lag / FPS:+.2f} s")


def crop_faces(path: Path, expert, box: str | None = None):
    """Yields the face in each frame of a video, uint8 (size, size, 3). box: "x0,y0,x1,y1" in pixels. Without a box, drawn
    faces lie in the middle square, and others are detected every six seconds or stay where they were. A square video is
    a crop already if no face is detected or if one fills it. InputError: a wrong box; no detector; no face."""
    source = probe(path)
    height = min(source.height, MAX_HEIGHT)
    frames = read_video(path, height)
    square = parse_box(box, source.width, source.height, height / source.height) if box else None
    while segment := list(islice(frames, MAX_CLIP_FRAMES)):
        if not box:
            H, W = segment[0].shape[:2]
            try:
                square = middle_square(segment[0]) if expert.template == "toy" else find_clip_box(segment)
            except InputError as error:
                if not square and H != W:
                    raise InputError(f"{path}: {error}; give --box x0,y0,x1,y1") from None
                square = square or (0, 0, W, H)
            if H == W and square[2] - square[0] > 0.8 * W:  # ours: .8
                square = (0, 0, W, H)
        yield from (crop_face(frame, square, expert.size) for frame in segment)


def write_shifted(path: Path, lag: int, out: Path):
    """Writes an MP4 with the sound `lag` frames earlier, silence in the gap. H.264 is copied, other codecs are encoded"""
    # scale: for sizes that change within the video; players need even sizes
    video_options = [["-vf", "scale=iw:ih,bwdif=mode=send_frame:deint=interlaced,pad=ceil(iw/2)*2:ceil(ih/2)*2",
                      "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p"]]
    if re.search(r"Stream #.*: Video: h264", describe_media(path)):
        video_options.insert(0, ["-c:v", "copy"])  # fails without timestamps, as in a .mkv that was cut by copying
    with tempfile.TemporaryDirectory(prefix="talk-") as folder:
        sound, draft = Path(folder) / "sound.wav", Path(folder) / "video.mp4"
        write_original_sound(path, sound, len(load_audio(path)), lag / FPS)
        for video in video_options:
            options = ["-i", str(sound), "-map", "0:V:0", "-map", "1:a:0", *video, "-c:a", "aac", "-b:a", "192k",
                       "-movflags", "+faststart", "-y", str(draft), *READ_ALL_STREAMS]
            command = decode_command(path, *options, input_options=("-reinit_filter", "0"))
            done = subprocess.run(command, capture_output=True)
            if not done.returncode:
                with atomic_write(out) as copy:
                    shutil.copyfile(draft, copy)
                return
        raise InputError(f"{out}: could not be written ({last_error(done.stderr.decode(errors='replace'))})")


def parse(argv=None, saved=None):
    parser = Parser(description="the sync expert: does this mouth fit this sound?")
    p, t, o = parser.add_commands(train="train an expert", test="accuracy by shift on held-out clips",
                              offset="the audio-video offset of a clip")
    p.add_argument("--data", nargs="+", help="packs; default: the toy world, drawn beside --out")
    add_split_options(p)
    add_run_options(p, out=TOY_EXPERT, steps=1000, batch=16, lr=2e-3)
    p.add_argument("--size", type=int, default=32, choices=(16, 32, 48, 64, 96), help="edge of drawn faces; real: 64")
    p.add_argument("--dim", type=int, default=128, help="length of an embedding (Wav2Lip: 512)")
    p.add_argument("--width", type=float, help="channels, 1 as in Wav2Lip; default: .25 up to 32 px, else .5")
    p.add_argument("--windows", type=int, default=4, help="windows per clip in a batch")
    p.add_argument("--cosine", action="store_true", help="Wav2Lip's loss: the cosine after a ReLU is the probability")
    p.add_argument("--negatives", type=float, default=MIN_SHIFT / FPS, help="seconds apart, sound of a clip is negative")
    p.add_argument("--bf16", action="store_true", help="convolutions in bfloat16: 4 times faster on CPUs with AMX")
    t.add_argument("--data", nargs="+", help="packs: their held-out clips; default: toy people reserved for tests")
    t.add_argument("--out", metavar="PNG", help="a histogram of offset errors")
    t.add_argument("--expert", help=f"see offset; default: weights/sync.pt with --data, {TOY_EXPERT} without")
    o.add_argument("clip", help="video with sound")
    o.add_argument("--expert", default=SHIPPED_EXPERT, help="checkpoint, wav2lip, or a copy of that (.pth)")
    o.add_argument("--box", help="box around the face, x0,y0,x1,y1 in pixels")
    o.add_argument("--fix", metavar="OUT", help="write the clip with its sound in sync (.mp4)")
    o.add_argument("--overwrite", action="store_true", help="replace an existing --fix")
    for command in (t, o):
        command.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.set_defaults(**saved or {})
    return parser.parse_args(argv, dim=(1, 4096), width=(0.01, 4), windows=(2, 100), negatives=(1 / FPS, 600))


def main(argv=None):
    args = parse(argv)
    dict(train=partial(train, argv=argv), test=test, offset=offset)[args.command](args)


if __name__ == "__main__":
    run(main)
