"""The sync expert: does this mouth say this sound? Trained here, then frozen as the judge of train.py's stage 3.

Papers: SyncNet (Chung & Zisserman 2016), two towers whose embeddings meet; the expert of Wav2Lip (arXiv 2008.10010),
five frames' lower half and 0.2 s of mel; SigLIP (arXiv 2303.15343) for the pairwise sigmoid over a batch.

    python syncnet.py train                   # out/toy32/sync.pt, on the toy world    (3 min of one core: .96 unseen)
    python syncnet.py test                    # people and speech it never met: accuracy by shift, drawn
    python syncnet.py offset clip.mp4         # by how many frames the sound is late (weights/sync.pt); --fix out.mp4

What differs from Wav2Lip:
- The cosine gets a learned scale and bias and may be negative; theirs, after a ReLU, is itself the probability, and
  the loss can sit at ln 2 for ever (at toy scale it does).
- All pairs of a batch are judged, not one a picture: several windows of each clip give shifted sound (the hard
  negatives), the other clips give foreign sound. Windows of one clip nearer than NEAR frames sound too alike: dropped.
- Beside the sigmoid there is a softmax over the batch. The sigmoid alone stayed at ln 2 for 400 steps of the toy run:
  a bias that gives up is nearly a minimum of it; the softmax knows no bias, and with it 50 steps were enough.
- The face tower gets the mean of the five frames and the deviations from it, enlarged: who somebody is fills most of a
  picture's variance, how he moves little. It raised accuracy after 200 steps from .80 to .85.
- GroupNorm, not BatchNorm: windows of one clip are neighbours, batch statistics would tell the towers which of them
  belong together; and the frozen expert must judge one picture alone as it judged a batch.
- 3x3 kernels throughout, widths scaled, pictures of any size.

Axes: B pairs, N windows of a batch, K windows of a clip, E embedding, S shifts, C H W.
"""

import argparse
import json
import math
import platform
import re
import subprocess
import tempfile
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from audio import AudioEncoder, ConvBlock, log_mel, mel_windows, other_voice, spec_augment
from checkpoint import (
    cosine_warmup, load_checkpoint, load_strictly, pick_device, refusing, revision, save_checkpoint)
from data import Pack, batches, clips_used, find_clips, split, split_options
from faces import HIGHEST, SEGMENT, crop_face, face_detectors, parse_box, segment_box
from judges import wav2lip_expert
from media import (
    FPS, READ_ALL, VIDEO_SUFFIXES, InputError, Parser, check_file, check_output, decoder, describe,
    last_error, load_audio, move_into_place, probe, read_video, run, to_tensor, write_original_sound)
from toyfaces import toy_pack

SPAN = 5  # frames of a window: what the 16 mel steps of its middle frame cover (Wav2Lip)
HALF = SPAN // 2
NEAR = 4  # frames; ours: windows nearer than this sound too alike to be called wrong
FAR = SPAN  # frames: a sound shifted so far shares nothing with the own one
TOY_VALID = 40  # toy people who choose the checkpoint, from toyfaces.TUNE on
MAX_OFFSET = 15  # frames: offsets are looked for in -15 .. 15, as SyncNet does
SHIPPED = Path(__file__).parent / "weights" / "sync.pt"  # a real speaker's, see its card
TOY = "out/toy32/sync.pt"  # where `train` without options writes
CHANCE = math.log(2)  # the loss of an expert that knows nothing


# ---------------------------------------------------------------------------------------------------------------------
# the towers


class FaceTower(nn.Module):
    """Lower half of five frames, side by side as channels -> (B, dim). Wav2Lip's plan: to a square, then halvings."""

    GAIN = 3.0  # of the deviations (ours): brings their variance near the mean's

    def __init__(self, size: int, dim: int, width: float):
        super().__init__()
        c = [max(8, 8 * round(c * width / 8)) for c in (32, 64, 128, 256, 512)]
        rows = size // 2
        layers = [ConvBlock(3 * SPAN, c[0]), ConvBlock(c[0], c[1], stride=(1, 2)), ConvBlock(c[1], c[1], residual=True)]
        level = 1  # (B, c1, rows, rows) so far
        while rows > 4:  # 96 px: 48, 24, 12, 6, 3; 32 px: 16, 8, 4
            a, b = c[min(level, 4)], c[min(level + 1, 4)]
            layers += [ConvBlock(a, b, stride=2), ConvBlock(b, b, residual=True)]
            rows, level = -(-rows // 2), level + 1
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(c[min(level, 4)] * rows**2, dim)

    def forward(self, x):  # (B, 5, 3, H/2, W)
        mean = x.mean(1, keepdim=True)
        moves = self.GAIN * (x - mean)
        x = torch.cat([moves[:, :HALF], mean, moves[:, HALF + 1 :]], 1)  # the middle's deviation follows from the others
        return self.out(self.body(x.flatten(1, 2)).flatten(1))


class SyncNet(nn.Module):
    """Two towers and what their cosine means: logit = scale * cos + bias, positive for "in sync".

    size: edge of the whole crops it looks at, a multiple of 16; larger ones are shrunk to it. dim: E. width: channels of
    the towers, 1 is Wav2Lip's. The crop's lower half is taken here: lips and chin are in it, eyes are not.
    """

    def __init__(self, size: int = 96, dim: int = 512, width: float = 1.0):
        super().__init__()
        assert size % 16 == 0 and size > 0, f"size is {size}, expected a multiple of 16"
        self.config = dict(size=size, dim=dim, width=width)
        self.size = size
        self.face_tower = FaceTower(size, dim, width)
        self.sound_tower = AudioEncoder(dim, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))  # ours; SigLIP's 10 begins farther above chance
        self.bias = nn.Parameter(torch.tensor(0.0))  # SigLIP's -10 is for one positive in 32,000; ours are balanced

    def face(self, frames):
        """Whole crops (B, 5, 3, H, H) in [-1, 1], H >= size -> (B, E) of unit length"""
        H = frames.shape[-1]
        assert frames.shape[1:] == (SPAN, 3, H, H) and H >= self.size, (
            f"frames are {tuple(frames.shape)}, expected (B, {SPAN}, 3, H, H) with H >= {self.size}")
        x = shrink(frames, self.size)[..., self.size // 2 :, :]  # (B, 5, 3, size/2, size)
        return F.normalize(self.face_tower(x).float(), dim=1)

    def sound(self, mel):
        """Mel windows (B, 1, 80, 16) of the middle frames -> (B, E) of unit length"""
        return F.normalize(self.sound_tower(mel).float(), dim=1)

    def logits(self, face, sound):
        """(B, E), (B2, E) of unit length -> (B, B2): log odds that they belong together"""
        return self.log_scale.exp() * face @ sound.t() + self.bias


def shrink(frames, size: int):
    """Pictures (.., 3, H, H), H >= size -> (.., 3, size, size)"""
    if frames.shape[-1] == size:
        return frames
    shape = frames.shape[:-2]
    x = F.interpolate(frames.flatten(0, -4), (size, size), mode="bilinear", antialias=True)
    return x.view(*shape, size, size)


def load_sync(path: str | Path, device, size: int | None = None) -> nn.Module:
    """A trained expert, frozen, in eval mode. size: the pictures it will be shown.

    path "wav2lip" is Wav2Lip's published expert, fetched; a file *.pth is one's own copy of that.
    Raises InputError: what load_checkpoint refuses; made for larger pictures; not whole; Wav2Lip's cannot be had.
    """
    if str(path) == "wav2lip" or Path(path).suffix == ".pth":
        expert = wav2lip_expert(device, None if str(path) == "wav2lip" else path)
        expert.size, expert.template = 96, "face"  # it enlarges what is smaller
        return expert
    expert = network_of(load_checkpoint(path, "syncnet", map_location="cpu"), path)
    if size is not None and size < expert.size:
        raise InputError(f"{path}: an expert for pictures of {expert.size} px or more, these are {size} px")
    return expert.to(device).eval().requires_grad_(False)


def network_of(checkpoint: dict, path) -> SyncNet:
    """The expert in a checkpoint; InputError if its parts do not fit"""
    with refusing(path, "its networks do not fit this version"):
        config = checkpoint["config"]
        expert = load_strictly(lambda: SyncNet(**config["net"]), checkpoint["networks"]["expert"], path)
        expert.template = config["template"]
    return expert


# ---------------------------------------------------------------------------------------------------------------------
# the losses


def expert_loss(logits, clip, k) -> dict:
    """Terms of the expert's loss: three of the pairwise sigmoid, each -log sigmoid(+-logit), and the softmax.

    Args:
        logits: (N, N), face i against sound j.
        clip, k: (N,), where window i is from: number of its clip, its middle frame.
    Returns: in_sync (the diagonal); shifted (same clip, NEAR frames or more apart); other (another clip); each ln 2
        at zero logits, and left out where the batch has no such pair. contrast: -log softmax of the own sound among
        the sounds that are not dropped, and of the own face among the faces (CLIP).
    """
    N = len(clip)
    assert logits.shape == (N, N), f"logits are {tuple(logits.shape)}, expected {(N, N)}"
    same = clip[:, None] == clip[None]
    far = (k[:, None] - k[None]).abs() >= NEAR
    terms = dict(in_sync=F.softplus(-logits.diagonal()).mean())
    for name, pairs in (("shifted", same & far), ("other", ~same)):
        if pairs.any():
            terms[name] = F.softplus(logits[pairs]).mean()
    dropped = same & ~far & ~torch.eye(N, dtype=torch.bool, device=logits.device)
    logits, own = logits.masked_fill(dropped, -1e4), torch.arange(N, device=logits.device)
    terms["contrast"] = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    return terms


def sigmoid_part(terms: dict):
    """Half for what belongs together, half for what does not: an expert that knows nothing pays ln 2."""
    wrong = [terms[name] for name in ("shifted", "other") if name in terms]
    assert wrong, "a batch needs windows far enough apart, or two clips"
    return (terms["in_sync"] + sum(wrong) / len(wrong)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# the data


class Windows(Dataset):
    """Several five-frame windows of one clip, NEAR frames or more apart where it is long enough.

    clips: which clips of the pack to draw from. size: edge of the pictures, the pack's or less. augment: pictures and
    voices vary. masks: SpecAugment on the sound. Item n is a function of (seed, n) alone: see data.batches.
    """

    KEPT = 2**31  # bytes; ours: what a pack may hold for its shrunk pictures to be kept in memory

    def __init__(self, pack: Pack, clips, windows: int, seed: int, size: int | None = None, augment: bool = True,
                 masks: bool = False):
        self.pack, self.clips, self.windows, self.seed = pack, np.asarray(clips), windows, seed
        self.size, self.augment, self.masks = size or pack.size, augment, masks
        self.keep = int(pack.frame_start[-1]) * self.size**2 * 3 <= self.KEPT
        self.kept = {}  # clip -> pictures, mel: decoding and shrinking cost as much as a training step

    def __getitem__(self, n: int) -> dict:
        """-> frames (windows, 5, 3, H, W), mel (windows, 1, 80, 16), clip (windows,), k (windows,): middle frames"""
        rng = np.random.default_rng([self.seed, n])
        c = int(rng.choice(self.clips))
        length = int(self.pack.n_frames[c])
        k = HALF + spaced(rng, max(1, length - SPAN + 1), self.windows)  # (windows,)
        shown = np.minimum(k[:, None] + np.arange(-HALF, HALF + 1), length - 1)  # a short clip stands still at its end
        frames, mel = self.read(c, k, shown)
        if self.augment:
            frames, mel = vary(frames, rng), other_voice(mel, rng)
        if self.masks:
            mel = np.stack([spec_augment(window, rng) for window in mel])
        return dict(frames=frames, mel=torch.from_numpy(mel), clip=torch.full((len(k),), c), k=torch.from_numpy(k))

    def read(self, c: int, k, shown):
        """Clip c -> its frames `shown` (windows, 5) as (windows, 5, 3, size, size), the mel windows of frames k."""
        if not self.keep:
            pictures = to_tensor(self.pack.frames(c, shown.ravel()))
            return shrink(pictures, self.size).unflatten(0, shown.shape), self.pack.windows(c, k)
        if c not in self.kept:
            pictures = to_tensor(self.pack.frames(c, range(self.pack.n_frames[c])))
            pictures = ((shrink(pictures, self.size) + 1) * 127.5).round().byte()  # (T, 3, size, size)
            self.kept[c] = pictures, log_mel(self.pack.sound(c))
        pictures, mel = self.kept[c]
        return pictures[torch.from_numpy(shown)].float() / 127.5 - 1, mel_windows(mel, k)


def vary(frames, rng):
    """Windows of one clip (K, 5, 3, H, W) as other cameras might have seen them; the five of a window always alike.

    All are mirrored or none; each window is turned by up to 4 degrees, zoomed and moved by up to 5 %, lit otherwise (gain
    30 %, tint 10 %, brightness .15 of the range), and every third is blurred to half its size, as young generators do.
    The widths are ours.
    """
    K, H = len(frames), frames.shape[-1]
    turn, zoom = rng.uniform(-0.07, 0.07, K), np.exp(rng.uniform(-0.05, 0.05, K))
    mirror = -1 if rng.random() < 0.5 else 1
    cos, sin, zero = zoom * np.cos(turn), zoom * np.sin(turn), np.zeros(K)
    theta = np.array([[mirror * cos, -sin, zero], [mirror * sin, cos, zero]]).transpose(2, 0, 1)  # (K, 2, 3)
    theta[:, :, 2] = rng.uniform(-0.1, 0.1, (K, 2))  # of half the edge
    grid = F.affine_grid(torch.from_numpy(theta).float(), (K, 1, H, H), align_corners=False)
    x = F.grid_sample(frames.flatten(1, 2), grid, padding_mode="border", align_corners=False)  # (K, 15, H, W)
    soft = torch.from_numpy(rng.random(K) < 1 / 3)
    if soft.any():
        x[soft] = F.interpolate(F.avg_pool2d(x[soft], 2), (H, H), mode="bilinear")
    light = rng.uniform(0.7, 1.3, (K, 1, 1, 1, 1)) * rng.uniform(0.9, 1.1, (K, 1, 3, 1, 1))
    brightness = rng.uniform(-0.3, 0.3, (K, 1, 1, 1, 1))
    return x.view_as(frames) * torch.from_numpy(light).float() + torch.from_numpy(brightness).float()


def spaced(rng, length: int, count: int):
    """`count` of 0 .. length-1, NEAR or more apart, all such choices equally likely; any where they do not fit."""
    slack = length - (count - 1) * (NEAR - 1)
    if slack < count:
        return np.sort(rng.integers(length, size=count))
    return np.sort(rng.choice(slack, count, replace=False)) + (NEAR - 1) * np.arange(count)


# ---------------------------------------------------------------------------------------------------------------------
# judging clips


@torch.no_grad()
def embed(expert, pictures, mel, device, batch: int = 128):
    """All windows of a clip: iterable of uint8 (H, H, 3), mel (80, S) -> face (K, E), sound (K, E); K = frames - 4.

    Window i has frames i .. i+4. Streams: no more than `batch` windows are held.
    """
    faces, held = [], []

    def flush():
        frames = to_tensor(np.stack(held)).to(device)
        if frames.shape[-1] > expert.size:
            frames = shrink(frames, expert.size)  # here, and not five times each
        faces.append(expert.face(frames.unfold(0, SPAN, 1).movedim(-1, 1)))  # (b, 5, 3, H, W)
        del held[: len(held) - SPAN + 1]  # the next window begins with the last four

    for picture in pictures:
        held.append(picture)
        if len(held) == batch + SPAN - 1:
            flush()
    if len(held) >= SPAN:
        flush()
    assert faces, "a clip of fewer than five frames has no window"
    face = torch.cat(faces)
    sound = [expert.sound(torch.from_numpy(mel_windows(mel, HALF + np.arange(a, min(a + batch, len(face))))).to(device))
             for a in range(0, len(face), batch)]
    return face, torch.cat(sound)


@torch.no_grad()
def by_shift(expert, face, sound, reach: int = MAX_OFFSET):
    """Each window against its own sound and the sound up to `reach` frames away: face, sound (K, E) -> (K, S) logits.

    Column reach + d holds picture k against sound k + d, NaN where the clip has none; S = 2 reach + 1.
    """
    K, block = len(face), 256
    rows = []
    for a in range(0, K, block):
        lo, hi = max(0, a - reach), min(K, a + block + reach)
        logits = expert.logits(face[a : a + block], sound[lo:hi])  # (b, hi - lo)
        at = torch.arange(a, min(a + block, K), device=face.device)[:, None]
        at = at + torch.arange(-reach, reach + 1, device=face.device)  # (b, S)
        picked = logits.gather(1, (at - lo).clamp(0, hi - lo - 1))
        rows.append(picked.masked_fill((at < 0) | (at >= K), math.nan))
    return torch.cat(rows).cpu().numpy()


def best_offset(table):
    """(K, S) of by_shift -> frames by which the sound is late; confidence; fit.

    Fit is the mean logit at the best offset: above 0, the expert calls the clip in sync there. Confidence is fit minus
    the median over the offsets: SyncNet's definition, with logits for distances. Offsets that fewer than half of the
    windows have are left out.
    """
    counts = np.isfinite(table).sum(0)
    means = np.where(2 * counts >= len(table), np.nansum(table, 0) / np.maximum(counts, 1), np.nan)  # (S,)
    best = int(np.nanargmax(means))
    return best - table.shape[1] // 2, float(means[best] - np.nanmedian(means)), float(means[best])


def judge(expert, pack: Pack, clips, device, reach: int = MAX_OFFSET) -> dict:
    """How well an expert hears on these clips of a pack. Clips of fewer than five frames are skipped.

    Returns loss (in sync and shifted by FAR .. reach, half and half; ln 2 is chance), accuracy, paired, speech, second
    (means of by_shift over FAR .. reach), window and clip (the offset found within one frame, from one window and from
    a whole clip), curve (mean logit at each offset), windows, clips, and by_shift: size of the shift -> dict of

        called    windows of 0.2 s with a logit above 0, which is the word "in sync": right at shift 0 only
        accuracy  half of what is called in sync at 0, half of what is not at this shift
        speech    the same where own or shifted sound speaks: in a pause any pause is as good as another
        second    the same for the mean logit of each second of the clip
        paired    the own sound's logit is above the shifted one's: no threshold
    """
    tables, seconds, speech = [], [], []
    for c in clips:
        T = int(pack.n_frames[c])
        if T >= SPAN:
            mel = log_mel(pack.sound(c))
            tables.append(by_shift(expert, *embed(expert, (pack.frame(c, k) for k in range(T)), mel, device), reach))
            seconds.append(running_mean(tables[-1], FPS - SPAN + 1))
            speech.append(np.where(either(speaks(mel, len(tables[-1])), reach), tables[-1], math.nan))
    if not tables:
        raise InputError(f"{pack.folder}: no clip has {SPAN} frames")
    table, seconds, speech = map(np.concatenate, (tables, seconds, speech))  # (windows, S)
    shifts = {d: dict(called=called(table, d), accuracy=accuracy(table, d), speech=accuracy(speech, d),
                      second=accuracy(seconds, d), paired=paired(table, d)) for d in range(reach + 1)}
    far = [shifts[d] for d in range(FAR, reach + 1)]
    own, wrong = table[:, reach], np.delete(table, range(reach - FAR + 1, reach + FAR), 1)
    wrong = wrong[np.isfinite(wrong)]
    loss = (np.logaddexp(0, -own).mean() + (np.logaddexp(0, wrong).mean() if len(wrong) else CHANCE)) / 2
    means = {name: float(np.mean([d[name] for d in far])) for name in ("accuracy", "paired", "speech", "second")}
    return means | dict(loss=float(loss), window=float((abs(np.nanargmax(table, 1) - reach) <= 1).mean()),
                        clip=float(np.mean([abs(best_offset(t)[0]) <= 1 for t in tables])),
                        curve=[round(float(v), 4) for v in column_means(table)], windows=len(table), clips=len(tables),
                        by_shift={d: {k: round(float(v), 4) for k, v in row.items()} for d, row in shifts.items()})


def at_shift(table, d: int):
    """(K, S) of by_shift -> (K, 2), what stands d frames to both sides of the own sound; NaN where a clip ends"""
    middle = table.shape[1] // 2
    return table[:, [middle - d, middle + d]]


def called(table, d: int) -> float:
    """Share called in sync at shift d; NaN where no window has such a shift"""
    logits = at_shift(table, d)
    logits = logits[np.isfinite(logits)]
    return float((logits > 0).mean()) if len(logits) else math.nan


def accuracy(table, d: int) -> float:
    """Half of what is called in sync at shift 0, half of what is not at shift d"""
    return called(table, 0) if d == 0 else (called(table, 0) + 1 - called(table, d)) / 2


def paired(table, d: int) -> float:
    """How often the own sound's logit is above the one d frames away; at d = 0 a coin's half"""
    wrong = at_shift(table, d)
    there = np.isfinite(wrong)
    above = (table[:, table.shape[1] // 2, None] > wrong)[there]
    return 0.5 if d == 0 else float(above.mean()) if len(above) else math.nan


def column_means(table):
    """Mean logit at each offset, (S,); NaN where no window has it"""
    counts = np.isfinite(table).sum(0)
    return np.where(counts, np.nansum(table, 0) / np.maximum(counts, 1), math.nan)


def running_mean(table, n: int):
    """(K, S) -> the mean of every n consecutive rows, (K - n + 1, S); of all where there are fewer"""
    views = np.lib.stride_tricks.sliding_window_view(table, min(n, len(table)), 0)  # (K - n + 1, S, n)
    return views.mean(-1)


def speaks(mel, K: int):
    """In which of a clip's K windows somebody speaks, (K,) bool: above the middle, in dB, of its quietest and loudest."""
    level = mel_windows(mel, HALF + np.arange(K)).mean((1, 2, 3))
    return level > (level.min() + level.max()) / 2


def either(speech, reach: int):
    """(K,) bool -> (K, S): the own window speaks, or the one d frames away"""
    return speech[:, None] | np.lib.stride_tricks.sliding_window_view(np.pad(speech, reach), 2 * reach + 1)


# ---------------------------------------------------------------------------------------------------------------------
# train


def train(args):
    """Writes --out, the weights with the least loss on held-out clips, and beside it OUT_last.pt for --resume, which
    goes on bit for bit on a CPU: item n of the data is a function of the seed and n alone."""
    device = pick_device(args.device)
    out = Path(args.out).absolute()
    last = out.with_stem(f"{out.stem}_last")
    saved = load_checkpoint(last, "syncnet", map_location=device) if args.resume else None
    expert = network_of(saved, last) if saved else None
    if saved and expert.size != args.size:
        raise InputError(f"{last}: an expert for pictures of {expert.size} px, --size is {args.size}")
    pack, clips, val, val_clips = worlds(args, out)
    torch.manual_seed(args.seed)
    expert = (expert or SyncNet(args.size, args.dim, args.width)).to(device)
    calibration = [expert.log_scale, expert.bias]
    weights = [p for p in expert.parameters() if all(p is not q for q in calibration)]
    # ours: two lone numbers have to come far, from 5 to 40
    groups = [dict(params=weights, lr=args.lr), dict(params=calibration, lr=10 * args.lr)]
    opt = torch.optim.Adam(groups, betas=(0.9, 0.99))
    start, best = 0, math.inf
    if saved:
        opt.load_state_dict(saved["optimisers"]["adam"])
        torch.set_rng_state(saved["rng"]["torch"].cpu())
        start, best = saved["step"], saved["best"]
    if start >= args.steps:
        return print(f"{last}: has {start} steps already; --steps is {args.steps}")
    print(f"sync expert on {device}: {len(clips)} clips to train on, {len(val_clips)} to validate, "
          f"{sum(p.numel() for p in expert.parameters()) / 1e6:.2f} M parameters; chance is a loss of {CHANCE:.3f}")

    used = dict(train=pack.fingerprints[clips], valid=val.fingerprints[val_clips])
    windows = Windows(pack, clips, args.windows, args.seed, args.size, masks=args.masks)
    data = batches(windows, args.batch, start, args.workers)
    log = open(out.with_name(f"log_{out.stem}.jsonl"), "a" if saved else "w")
    versions = dict(torch=torch.__version__, numpy=np.__version__, python=platform.python_version())
    log.write(json.dumps(dict(revision=revision(), **versions, args=vars(args))) + "\n")
    clock, counted = time.perf_counter(), 0
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="sync expert", disable=None)
    for step in bar:
        batch = {name: x.to(device, non_blocking=True).flatten(0, 1) for name, x in next(data).items()}  # (N, ..)
        for group, rate in zip(opt.param_groups, (1, 10)):
            group["lr"] = rate * args.lr * cosine_warmup(step, args.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            face, sound = expert.face(batch["frames"]), expert.sound(batch["mel"])
        logits = expert.logits(face, sound)  # (N, N)
        terms = expert_loss(logits, batch["clip"], batch["k"])
        sigmoid = sigmoid_part(terms)
        loss = sigmoid + 0.5 * terms["contrast"]  # ours: .5
        if not torch.isfinite(loss):
            bad = ", ".join(f"'{name}' is {value.item():g}" for name, value in terms.items() if not torch.isfinite(value))
            log.write(json.dumps(dict(step=step, error=bad)) + "\n")
            log.close()
            raise InputError(f"step {step}: the loss term {bad}: stopped; the last checkpoint is whole. Lower --lr")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        counted += 1

        end = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or end:
            ms = 1000 * (time.perf_counter() - clock) / counted
            line = dict(step=step + 1, loss=sigmoid.item(), **{name: value.item() for name, value in terms.items()},
                        accuracy=batch_accuracy(logits.detach(), batch["clip"], batch["k"]),
                        scale=expert.log_scale.exp().item(), bias=expert.bias.item(), ms=ms,
                        eta=ms / 1000 * (args.steps - step - 1))
            write(log, bar, line, "loss {loss:.3f} (chance {chance:.3f}): in sync {in_sync:.3f}, shifted {shifted:.3f}, "
                  "other {other:.3f}; contrast {contrast:.2f}; accuracy {accuracy:.3f}; "
                  "logit {scale:.1f} cos {bias:+.2f}; {ms:.0f} ms, {eta:.0f} s to go")
            clock, counted = time.perf_counter(), 0
        if (step + 1) % args.val_every == 0 or end:
            found = judge(expert.eval(), val, val_clips, device)
            expert.train()
            write(log, bar, dict(step=step + 1, val=found), "unseen: loss {val[loss]:.3f}, accuracy {val[accuracy]:.3f}, "
                  "of speech {val[speech]:.3f}, offset found for {val[window]:.2f} of windows, {val[clip]:.2f} of clips")
            net = dict(kind="syncnet", format=1, config=dict(net=expert.config, template=pack.template),
                       step=step + 1, clips=used, val=found)
            if found["loss"] < best:
                best = found["loss"]
                half = {name: p.half() for name, p in expert.state_dict().items()}
                save_checkpoint(out, net | dict(networks=dict(expert=half)))
            save_checkpoint(last, net | dict(
                args=vars(args), best=best, networks=dict(expert=expert.state_dict()),
                optimisers=dict(adam=opt.state_dict()), rng=dict(torch=torch.get_rng_state())))
            clock, counted = time.perf_counter(), 0
    log.close()
    print(f"{out}: held-out loss {best:.3f}; test it with  python syncnet.py test --expert {args.out}")


def worlds(args, out: Path):
    """Checks where train reads and writes -> pack, clips to train on; pack, clips to validate on"""
    given = Pack(args.data) if args.data else None
    if given and given.size < args.size:
        raise InputError(f"{args.data}: pictures of {given.size} px, --size is {args.size}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out.parent}: cannot be made a directory ({error.strerror})") from None
    if out.exists() and not (args.resume or args.overwrite):
        raise InputError(f"{out} exists: --resume continues it, --overwrite starts anew")
    check_output(out, overwrite=True)
    pack = given or toy_pack(out.parent, args.size, args.people, args.seconds)
    parts = split(pack, args)
    if given:
        return pack, parts["train"], pack, parts["valid"]
    val = toy_pack(out.parent, args.size, TOY_VALID, 3.0, "tune")
    return pack, parts["train"], val, np.arange(len(val))


def batch_accuracy(logits, clip, k) -> float:
    """In sync called in sync, and shifted called shifted, half and half; of the batch in training"""
    shifted = (clip[:, None] == clip[None]) & ((k[:, None] - k[None]).abs() >= NEAR)
    wrong = logits[shifted] if shifted.any() else logits[clip[:, None] != clip[None]]
    return ((logits.diagonal() > 0).float().mean().item() + (wrong < 0).float().mean().item()) / 2


def write(log, bar, line: dict, text: str):
    """One line of the log, as JSON and for people."""
    log.write(json.dumps(line) + "\n")
    log.flush()
    shown = {"chance": CHANCE, "shifted": math.nan, "other": math.nan} | line
    bar.write(f"{line['step']:6d}  " + text.format(**shown))


# ---------------------------------------------------------------------------------------------------------------------
# test


def test(args):
    """Prints what `judge` finds on held-out clips, and draws it."""
    device = pick_device(args.device)
    path = args.expert or (SHIPPED if args.data else TOY)
    picture = Path(args.picture).absolute()
    if picture.parent.is_dir():
        check_output(picture, overwrite=True, suffixes=(".png",))
    expert = load_sync(path, device)
    if args.data:
        pack = Pack(args.data)
        if isinstance(expert, SyncNet) and pack.size < expert.size:
            raise InputError(f"{args.data}: pictures of {pack.size} px, the expert is for {expert.size} px or more")
        clips, what = np.arange(len(pack)), f"{args.data}"
        if isinstance(expert, SyncNet):
            known = find_clips(pack, *clips_used(load_checkpoint(path, "syncnet"), pack, path).values())
            clips = np.setdiff1d(clips, known)
            what += ", the clips held out from training and validation" if len(known) else ""
            if not len(clips):
                raise InputError(f"{args.data}: all its clips trained {path} or chose it, none is left to test on")
    elif expert.template == "toy":
        pack = toy_pack(Path(path).absolute().parent, expert.size, args.people, 3.0, "test")
        clips, what = np.arange(len(pack)), "toy people and speech held out for good"
    else:
        raise InputError(f"{path}: not an expert of the toy world; give a pack of held-out clips with --data")
    found = judge(expert, pack, tqdm(clips, "clips", disable=None), device)
    print(f"{what}: {found['clips']} clips, {found['windows']} windows; loss {found['loss']:.3f} (chance {CHANCE:.3f})\n")
    columns = ("called", "accuracy", "speech", "second", "paired")
    print("| shift, frames | called in sync | accuracy | of speech | of seconds | own above shifted |\n|" + "---:|" * 6)
    for d, row in found["by_shift"].items():
        print(f"| {d} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |")
    print(f"| {FAR}-{MAX_OFFSET} | | " + " | ".join(f"{found[name]:.3f}" for name in columns[1:]) + " |\n")
    print(f"offset within one frame: {found['window']:.3f} of single windows, {found['clip']:.3f} of clips")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(found, what).save(picture)
    print(f"{picture}: accuracy by shift, and the mean logit by offset")


def draw(found: dict, title: str) -> Image.Image:
    """What `judge` found: bars of accuracy by size of the shift; the mean logit over the offsets."""
    image, font = Image.new("RGB", (1000, 380), "white"), ImageFont.load_default(13)
    pen = ImageDraw.Draw(image)
    pen.text((500, 10), title, "black", font, "ma")
    series = dict(accuracy=("#4878a8", "0.2 s"), speech=("#e49444", "0.2 s of speech"), second=("#6a9f58", "1 s"))

    def axes(x0, x1, low, high, ticks, name):
        """-> function that turns a value into a height"""
        def y(v):
            return 320 - 250 * (v - low) / (high - low)
        for tick in ticks:
            pen.line((x0, y(tick), x1, y(tick)), "#ddd")
            pen.text((x0 - 6, y(tick)), f"{tick:g}", "black", font, "rm")
        pen.text(((x0 + x1) / 2, 352), name, "black", font, "ma")
        return y

    y = axes(60, 540, 0.4, 1, np.arange(4, 11) / 10, "shift of the sound, frames; bars: accuracy (.5 is chance)")
    shifts = [d for d in found["by_shift"] if d]
    step = 480 / max(1, len(shifts))
    for n, d in enumerate(shifts):
        for i, (name, (colour, _)) in enumerate(series.items()):
            if math.isfinite(value := found["by_shift"][d][name]):
                left = 60 + n * step + 3 + i * (step - 6) / 3
                pen.rectangle((left, y(max(0.4, value)), left + (step - 6) / 3 - 1, y(0.4)), colour)
        pen.text((60 + (n + 0.5) * step, 328), str(d), "black", font, "ma")
    for i, (colour, name) in enumerate(series.values()):
        pen.rectangle((70 + 120 * i, 40, 80 + 120 * i, 50), colour)
        pen.text((86 + 120 * i, 45), name, "black", font, "lm")

    curve = [(i - len(found["curve"]) // 2, v) for i, v in enumerate(found["curve"]) if math.isfinite(v)]
    values = [v for _, v in curve]
    low, high = math.floor(min(values + [0])), math.ceil(max(values + [1]))
    ticks = np.unique(np.linspace(low, high, 6).round()) + 0.0  # no -0
    y = axes(610, 980, low, high, ticks, "offset of the sound, frames; line: mean logit")
    points = [(795 + 175 * d / max(1, len(found["curve"]) // 2), y(v)) for d, v in curve]
    pen.line((610, y(0), 980, y(0)), "#999")
    pen.line((795, y(low), 795, y(high)), "#999")
    pen.line(points, series["accuracy"][0], 3)
    for (x, _), (d, _) in zip(points, curve):
        if d % 5 == 0:
            pen.text((x, 328), str(d), "black", font, "ma")
    return image


# ---------------------------------------------------------------------------------------------------------------------
# offset


def offset(args):
    """Prints by how many frames a clip's sound is late, and how sure that is; --fix writes it in step."""
    device = pick_device(args.device)
    expert = load_sync(args.expert, device)
    path = check_file(args.clip)
    out = check_output(args.fix, args.overwrite, VIDEO_SUFFIXES) if args.fix else None
    late, confidence, fit, windows = clip_offset(expert, path, device, args.box)
    words = f"{abs(late)} frame{'s' * (abs(late) != 1)} ({abs(late) / FPS:.2f} s) {'late' if late > 0 else 'early'}"
    doubt = "" if fit > 0 else "; a guess, nowhere do mouth and sound fit"
    words = f"{words if late else 'in step'}; confidence {confidence:.1f} ({windows} windows){doubt}"
    print(f"{path}: the sound is {words}")
    if out:
        write_shifted(path, late, out)
        print(f"{out}: the same pictures, the sound moved by {-late / FPS:+.2f} s")


def clip_offset(expert, path: Path, device, box: str | None = None):
    """-> frames by which the sound is late, confidence, fit (see best_offset), windows. Memory grows by 1 kB a frame."""
    mel = log_mel(load_audio(path))
    crops = face_crops(path, expert, box)
    first = list(islice(crops, SPAN + 1))
    if len(first) < SPAN + 1:
        raise InputError(f"{path}: {len(first)} frames are too few, an offset needs {SPAN + 1}")
    table = by_shift(expert, *embed(expert, tqdm(chain(first, crops), "frames", disable=None), mel, device))
    return *best_offset(table), len(table)


def face_crops(path: Path, expert, box: str | None = None):
    """A video -> crops uint8 (size, size, 3) of the face in it, as a stream.

    The face is in `box` ("x0,y0,x1,y1" in pixels); for an expert of drawn faces in the largest square in the middle;
    else where the detector finds it, anew every six seconds (where it finds none later on, it keeps the last box). A
    square video in which it finds none, or one that fills it, is a crop already.
    Raises InputError: no such box; no detector; no face in the first six seconds, or one that moves too far.
    """
    source = probe(path)
    height = min(source.height, HIGHEST)
    frames = read_video(path, height)
    where = parse_box(box, source.width, source.height, height / source.height) if box else None
    while part := list(islice(frames, SEGMENT)):
        H, W = part[0].shape[:2]
        if where is None and expert.template == "toy":
            side = min(H, W)
            where = ((W - side) / 2, (H - side) / 2, (W + side) / 2, (H + side) / 2)
        elif not box and expert.template != "toy":
            where = found_box(path, part, where)
        for frame in part:
            yield crop_face(frame, where, expert.size)


def found_box(path: Path, frames: list, last: tuple | None) -> tuple:
    """Where the detector finds the face in these frames; see face_crops."""
    H, W = frames[0].shape[:2]
    whole = (0, 0, W, H)
    if not face_detectors():
        if H == W:
            return whole
        raise InputError(f"{path}: no face detector's weights are at hand; give --box x0,y0,x1,y1")
    try:
        box = segment_box(frames)
    except InputError as error:
        if last or H == W:
            return last or whole
        raise InputError(f"{path}: {error}; give --box x0,y0,x1,y1") from None
    return whole if H == W and box[2] - box[0] > 0.8 * W else box  # ours: .8


def write_shifted(path: Path, late: int, out: Path):
    """The video with its sound moved `late` frames towards the beginning.

    Pictures are copied where they are H.264 and can be copied, else encoded as that: so are those of an MP4 that goes
    into a .mkv, which would show what an edit list hides. The sound keeps its rate, channels and length: silence fills
    what is missing.
    Raises InputError: ffmpeg cannot.
    """
    text = describe(path)
    # scale: where the size changes in the middle; players want even sizes
    ways = [["-vf", "scale=iw:ih,bwdif=mode=send_frame:deint=interlaced,pad=ceil(iw/2)*2:ceil(ih/2)*2",
             "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p"]]
    if re.search(r"Stream #.*: Video: h264", text) and not ("Input #0, mov" in text and out.suffix.lower() == ".mkv"):
        ways.insert(0, ["-c:v", "copy"])  # fails where pictures have no time, as in a .mkv that was cut by copying
    with tempfile.TemporaryDirectory(prefix="talk-") as folder:
        sound, draft = Path(folder) / "sound.wav", Path(folder) / f"video{out.suffix.lower()}"
        write_original_sound(path, sound, len(load_audio(path)), late / FPS)
        for pictures in ways:
            options = ["-i", str(sound), "-map", "0:V:0", "-map", "1:a:0", *pictures, "-c:a", "aac", "-b:a", "192k"]
            options += ["-movflags", "+faststart", "-y", str(draft), *READ_ALL]
            done = subprocess.run(decoder(path, *options, before=("-reinit_filter", "0")), capture_output=True)
            if not done.returncode:
                break
        else:
            raise InputError(f"{out}: could not be written ({last_error(done.stderr.decode(errors='replace'))})")
        move_into_place(draft, out)


# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(description="the sync expert: does this mouth say this sound?")
    commands = parser.add_subparsers(dest="command", required=True)
    options = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = commands.add_parser("train", help="train an expert", **options)
    p.add_argument("--data", help="pack, a tenth of which is held out; default: the toy world, drawn beside --out")
    split_options(p)
    p.add_argument("--size", type=int, default=32, choices=(16, 32, 48, 64, 96),
                   help="edge of the pictures it looks at; larger ones are shrunk to it")
    p.add_argument("--out", default=TOY, help="checkpoint")
    p.add_argument("--people", type=int, default=400, help="toy world: how many people (one clip each)")
    p.add_argument("--seconds", type=float, default=3.0, help="toy world: length of a clip")
    p.add_argument("--dim", type=int, default=128, help="length of an embedding (Wav2Lip: 512)")
    p.add_argument("--width", type=float, help="channels, 1 is Wav2Lip's; default: .25 up to 32 px, else .5")
    p.add_argument("--steps", type=int, default=1000, help="steps in all; the rate falls towards the last")
    p.add_argument("--batch", type=int, default=16, help="clips a step")
    p.add_argument("--windows", type=int, default=4, help="windows a clip")
    p.add_argument("--lr", type=float, default=2e-3, help="rate of Adam")
    p.add_argument("--resume", action="store_true", help="continue --out; give the same options")
    p.add_argument("--overwrite", action="store_true", help="start anew although --out exists")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=0, help="processes that load data")
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--val-every", type=int, default=250, help="steps between looks at held-out clips; it saves then")
    p.add_argument("--bf16", action="store_true", help="convolutions in bfloat16: 4 times faster on CPUs with AMX")
    p.add_argument("--masks", action="store_true", help="SpecAugment: mask bands and steps of the sound")
    p.add_argument("--device", default="auto")
    p = commands.add_parser("test", help="accuracy by shift on held-out clips", **options)
    p.add_argument("--expert", help="checkpoint, wav2lip, or a copy of that (.pth); default: with --data the shipped "
                   f"weights/sync.pt, without {TOY}")
    p.add_argument("--data", help="pack; of one that the expert was trained on, the held-out clips; default: toy people "
                   "and speech held out for good, drawn beside --expert")
    p.add_argument("--people", type=int, default=40, help="toy world: how many people")
    p.add_argument("--picture", default="out/sync_test.png", help="what is found, drawn")
    p.add_argument("--device", default="auto")
    p = commands.add_parser("offset", help="the audio-video offset of a clip", **options)
    p.add_argument("clip", help="video with sound")
    p.add_argument("--expert", default=SHIPPED, help="checkpoint, wav2lip, or a copy of that (.pth)")
    p.add_argument("--box", help="square around the face, x0,y0,x1,y1 in pixels")
    p.add_argument("--fix", metavar="OUT", help="write the clip with its sound in step (mp4, mov or mkv)")
    p.add_argument("--overwrite", action="store_true", help="replace what --fix names")
    p.add_argument("--device", default="auto")
    args = parser.parse_args(argv, seconds=(0.4, 600), dim=(1, 4096), width=(0.01, 4), windows=(2, 100))
    if args.command == "train" and args.width is None:
        args.width = 0.25 if args.size <= 32 else 0.5
    return args


def main(argv=None):
    args = parse(argv)
    dict(train=train, test=test, offset=offset)[args.command](args)


if __name__ == "__main__":
    run(main)
