"""The sync expert: do these lips and this sound belong together? Trained here, then frozen for train.py's stage 3.

Papers: SyncNet (Chung & Zisserman 2016), two towers and a distance of their embeddings; the expert of Wav2Lip (arXiv
2008.10010), the lower half of five frames and 0.2 s of mel; SigLIP (arXiv 2303.15343), the pairwise sigmoid over a batch.

    python syncnet.py train                   # out/toy32/sync.pt, on the toy world    (3 min of one core: .96 unseen)
    python syncnet.py test                    # accuracy by shift, on people and speech that no training saw
    python syncnet.py offset clip.mp4         # by how many frames the sound is late (weights/sync.pt); --fix out.mp4

Differences from Wav2Lip, beside 3x3 kernels throughout and images of any size:
- The cosine gets a learned scale and bias. Theirs, after a ReLU, is itself the probability; at toy scale its loss stays
  at ln 2.
- All pairs of a batch count: several windows of each clip (hard negatives), and foreign sound from the other clips.
- A softmax over the batch is added to the sigmoid, which alone stayed at ln 2 for 400 steps of the toy run: a bias that
  rejects every pair is nearly a minimum. The softmax does not depend on the bias; with it 50 steps sufficed.
- The face tower gets the mean of the five frames and the deviations from it, enlarged: identity is most of an image's
  variance, motion little. Accuracy after 200 steps rose from .80 to .85.
- GroupNorm, not BatchNorm, whose statistics would tell the towers which windows of a batch share a clip.

Axes: B pairs, N windows of a batch, K windows of a clip, E embedding, S shifts, C H W.
"""

import argparse
import math
import re
import subprocess
import tempfile
from itertools import chain, islice
from pathlib import Path

from media import (  # before torch, see there
    FPS, READ_ALL, VIDEO_SUFFIXES, InputError, Parser, check_file, check_output, decoder, describe,
    last_error, load_audio, move_into_place, probe, read_video, run, to_tensor, write_original_sound)

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from audio import AudioEncoder, ConvBlock, change_voice, log_mel, mel_windows
from checkpoint import (
    StepTimer, check_finite, claim_output, cosine_warmup, half, load_checkpoint, load_strictly, open_log,
    pick_device, refusing, save_checkpoint, write_log)
from data import Pack, batches, clips_used, drawn_clips, find_clips, open_packs, split, split_options
from faces import HIGHEST, SEGMENT, crop_face, middle_square, need_detector, parse_box, segment_box
from judges import wav2lip_expert
from toyfaces import toy_pack

SPAN = 5  # frames of a window: what the 16 mel steps of its middle frame cover (Wav2Lip)
HALF = SPAN // 2
NEAR = 4  # frames; ours: sounds nearer than this are too alike to be a negative pair
FAR = SPAN  # frames: from this shift on two windows share no frame
MAX_OFFSET = 15  # frames: offsets are searched in -15 .. 15, as SyncNet does
TOY_VALID = 40  # toy people who choose the checkpoint, and as many others for the test
LOG_EVERY = 50  # steps
SHIPPED = Path(__file__).parent / "weights" / "sync.pt"  # a real speaker's, see its card
TOY = "out/toy32/sync.pt"  # where `train` without options writes
CHANCE = math.log(2)  # the sigmoid loss at zero logits


# ---------------------------------------------------------------------------------------------------------------------
# the networks

class FaceTower(nn.Module):
    """Lower half of five frames, as channels -> (B, dim). Wav2Lip's layout: to a square, then halvings."""

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
        deviation = self.GAIN * (x - mean)
        # the mean replaces the middle frame's deviation, which follows from the other four
        x = torch.cat([deviation[:, :HALF], mean, deviation[:, HALF + 1 :]], 1)
        return self.out(self.body(x.flatten(1, 2)).flatten(1))


class SyncNet(nn.Module):
    """Two towers; logit = scale * cosine + bias, positive for "in sync".

    size: edge of the whole crops, a multiple of 16; larger ones are shrunk to it, and their lower half is taken here: it
    has lips and chin, not the eyes. dim: E. width: channels of the towers, 1 is Wav2Lip's.
    """

    def __init__(self, size: int = 96, dim: int = 512, width: float = 1.0):
        super().__init__()
        assert size % 16 == 0 and size > 0, f"size is {size}, expected a multiple of 16"
        self.config = dict(size=size, dim=dim, width=width)
        self.size = size
        self.face_tower = FaceTower(size, dim, width)
        self.sound_tower = AudioEncoder(dim, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))  # ours; SigLIP's 10 starts at a larger loss
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


def shrink(images, size: int):
    """(.., 3, H, H), H >= size -> (.., 3, size, size)"""
    if images.shape[-1] == size:
        return images
    x = F.interpolate(images.flatten(0, -4), (size, size), mode="bilinear", antialias=True)
    return x.view(*images.shape[:-2], size, size)


def load_sync(path: str | Path, device, size: int | None = None) -> nn.Module:
    """A trained expert, frozen, in eval mode. size: the images that it will get.

    path "wav2lip" is Wav2Lip's published expert, downloaded on first use; a file *.pth is a local copy of that.
    Raises InputError: as load_checkpoint; made for larger images; damaged; Wav2Lip's file cannot be downloaded.
    """
    if str(path) == "wav2lip" or Path(path).suffix == ".pth":
        expert = wav2lip_expert(device, None if str(path) == "wav2lip" else path)
        expert.size, expert.template = 96, "face"  # it enlarges smaller images
        return expert
    expert = build_expert(load_checkpoint(path, "syncnet"), path)
    if size is not None and size < expert.size:
        raise InputError(f"{path}: an expert for images of {expert.size} px or more, these are {size} px")
    return expert.to(device).eval().requires_grad_(False)


def build_expert(checkpoint: dict, path) -> SyncNet:
    """The expert in a checkpoint; InputError if config and weights do not fit"""
    with refusing(path, "its networks do not fit this version"):
        config = checkpoint["config"]
        expert = load_strictly(lambda: SyncNet(**config["net"]), checkpoint["networks"]["expert"], path)
        expert.template = config["template"]
    return expert


# ---------------------------------------------------------------------------------------------------------------------
# the loss

def expert_loss(logits, clip, k) -> dict:
    """logits (N, N), face i against sound j; clip, k (N,), clip of window i and its middle frame -> terms of the loss.

    Pairwise sigmoid, each -log sigmoid(+-logit), absent where the batch has no such pair: in_sync (the diagonal); shifted
    (same clip, NEAR frames or more apart); other (another clip). contrast: -log softmax of the true sound among the
    sounds and of the true face among the faces (CLIP), pairs nearer than NEAR left out.
    """
    N = len(clip)
    assert logits.shape == (N, N), f"logits are {tuple(logits.shape)}, expected {(N, N)}"
    same = clip[:, None] == clip[None]
    far = (k[:, None] - k[None]).abs() >= NEAR
    terms = dict(in_sync=F.softplus(-logits.diagonal()).mean())
    for name, pairs in (("shifted", same & far), ("other", ~same)):
        if pairs.any():
            terms[name] = F.softplus(logits[pairs]).mean()
    near = same & ~far & ~torch.eye(N, dtype=torch.bool, device=logits.device)
    logits, own = logits.masked_fill(near, -1e4), torch.arange(N, device=logits.device)
    terms["contrast"] = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    return terms


def sigmoid_part(terms: dict):
    """Half for the positive pairs, half for the negative ones: ln 2 at zero logits."""
    wrong = [terms[name] for name in ("shifted", "other") if name in terms]
    assert wrong, "a batch needs windows far enough apart, or two clips"
    return (terms["in_sync"] + sum(wrong) / len(wrong)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# the data

class Windows(Dataset):
    """Several five-frame windows of one clip, NEAR frames or more apart where it is long enough.

    clips: numbers of the pack's clips to draw from. size: edge of the images, the pack's or less. augment: vary images
    and voices. Item n depends on (seed, n) alone: see data.batches.
    """

    CACHE = 2**31  # bytes; ours: the shrunk images of a pack up to this size stay in memory

    def __init__(self, pack: Pack, clips, windows: int, seed: int, size: int | None = None, augment: bool = True):
        self.pack, self.clips, self.windows, self.seed = pack, np.asarray(clips), windows, seed
        self.size, self.augment = size or pack.size, augment
        self.fits = int(pack.frame_start[-1]) * self.size**2 * 3 <= self.CACHE
        self.cache = {}  # clip -> images, mel: decoding and shrinking cost as much as a training step

    def __getitem__(self, n: int) -> dict:
        """-> frames (windows, 5, 3, H, W), mel (windows, 1, 80, 16), clip (windows,), k (windows,): middle frames"""
        rng = np.random.default_rng([self.seed, n])
        c = int(rng.choice(self.clips))
        length = int(self.pack.n_frames[c])
        k = HALF + spaced(rng, max(1, length - SPAN + 1), self.windows)  # (windows,)
        shown = np.minimum(k[:, None] + np.arange(-HALF, HALF + 1), length - 1)  # a short clip repeats its last frame
        frames, mel = self.read(c, k, shown)
        if self.augment:
            frames, mel = vary(frames, rng), change_voice(mel, rng)
        return dict(frames=frames, mel=torch.from_numpy(mel), clip=torch.full((len(k),), c), k=torch.from_numpy(k))

    def read(self, c: int, k, shown):
        """Clip c -> its frames `shown` (windows, 5) as (windows, 5, 3, size, size), the mel windows of frames k."""
        if not self.fits:
            images = to_tensor(self.pack.frames(c, shown.ravel()))
            return shrink(images, self.size).unflatten(0, shown.shape), self.pack.windows(c, k)
        if c not in self.cache:
            images = to_tensor(self.pack.frames(c, range(self.pack.n_frames[c])))
            images = ((shrink(images, self.size) + 1) * 127.5).round().byte()  # (T, 3, size, size)
            self.cache[c] = images, log_mel(self.pack.sound(c))
        images, mel = self.cache[c]
        return images[torch.from_numpy(shown)].float() / 127.5 - 1, mel_windows(mel, k)


def vary(frames, rng):
    """Augments windows of one clip (K, 5, 3, H, W); the five frames of a window always alike.

    All are mirrored or none. Each window is turned by up to 4 degrees, zoomed and moved by up to 5 %, lit otherwise (gain
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
# logits of clips, by shift of the sound

@torch.no_grad()
def embed(expert, images, mel, device, batch: int = 128):
    """All windows of a clip: iterable of uint8 (H, H, 3), mel (80, S) -> face (K, E), sound (K, E); K = frames - 4.

    Window i has frames i .. i+4. Images are streamed: at most batch + 4 are in memory.
    """
    images, held, faces = iter(images), [], []
    while new := list(islice(images, batch if held else batch + SPAN - 1)):
        held = held[1 - SPAN :] + new  # windows overlap by four frames
        assert len(held) >= SPAN, "a clip of fewer than five frames has no window"
        frames = to_tensor(np.stack(held)).to(device)  # (b + 4, 3, H, H)
        if frames.shape[-1] > expert.size:
            frames = shrink(frames, expert.size)  # here, and not five times each
        faces.append(expert.face(frames.unfold(0, SPAN, 1).movedim(-1, 1)))  # (b, 5, 3, H, W)
    face = torch.cat(faces)
    sound = [expert.sound(torch.from_numpy(mel_windows(mel, HALF + np.arange(a, min(a + batch, len(face))))).to(device))
             for a in range(0, len(face), batch)]
    return face, torch.cat(sound)


@torch.no_grad()
def by_shift(expert, face, sound, reach: int = MAX_OFFSET):
    """Each window with its own sound and the sounds up to `reach` frames away: face, sound (K, E) -> (K, S) logits.

    Column reach + d has face k with sound k + d, NaN beyond the clip; S = 2 reach + 1.
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

    Fit is the mean logit at the best offset: above 0, the clip is in sync there. Confidence is fit minus the median over
    the offsets: SyncNet's definition, with logits for distances. Offsets that fewer than half of the windows have are
    left out.
    """
    counts = np.isfinite(table).sum(0)
    means = np.where(2 * counts >= len(table), np.nansum(table, 0) / np.maximum(counts, 1), np.nan)  # (S,)
    best = int(np.nanargmax(means))
    return best - table.shape[1] // 2, float(means[best] - np.nanmedian(means)), float(means[best])


def validate(expert, pack: Pack, clips, device) -> dict:
    """Measures an expert on clips of a pack; those of fewer than five frames are skipped.

    Returns by_shift, lists over the shifts 0 .. MAX_OFFSET, and the means of all but the first from FAR on:
        positive_rate      share of windows of 0.2 s with a logit above 0: right at shift 0 only
        accuracy           half of the positives at shift 0, half of the negatives at this shift
        speech             accuracy where the own or the shifted sound is speech: all pauses sound alike
        second             accuracy of the mean logit of each second
        pairwise_accuracy  share of windows whose own sound has a higher logit than the shifted one: no threshold
    loss (in sync and shifted by FAR or more, half and half); windows, clips (how many); window, clip (share whose offset
    is found within one frame, from one window and from the whole clip).
    """
    tables, seconds, speech = [], [], []
    for c in clips:
        T = int(pack.n_frames[c])
        if T >= SPAN:
            mel = log_mel(pack.sound(c))
            table = by_shift(expert, *embed(expert, (pack.frame(c, k) for k in range(T)), mel, device))
            tables.append(table)
            seconds.append(sliding_window_view(table, min(FPS - SPAN + 1, len(table)), 0).mean(-1))
            speech.append(np.where(speech_pairs(mel, len(table)), table, math.nan))
    if not tables:
        raise InputError(f"{pack.folder}: no clip has {SPAN} frames")
    table, seconds, speech = map(np.concatenate, (tables, seconds, speech))  # (windows, S)
    rates = shift_rates(table) | dict(speech=shift_rates(speech)["accuracy"], second=shift_rates(seconds)["accuracy"])
    own, wrong = table[:, MAX_OFFSET], np.delete(table, range(MAX_OFFSET - FAR + 1, MAX_OFFSET + FAR), 1)
    wrong = wrong[np.isfinite(wrong)]
    loss = (np.logaddexp(0, -own).mean() + (np.logaddexp(0, wrong).mean() if len(wrong) else CHANCE)) / 2
    return {name: float(np.mean(rate[FAR:])) for name, rate in rates.items() if name != "positive_rate"} | dict(
        by_shift={name: rate.tolist() for name, rate in rates.items()}, windows=len(table), clips=len(tables),
        loss=float(loss), window=float((abs(np.nanargmax(table, 1) - MAX_OFFSET) <= 1).mean()),
        clip=float(np.mean([abs(best_offset(t)[0]) <= 1 for t in tables])))


def shift_rates(table) -> dict:
    """(K, S) of by_shift -> positive_rate, accuracy, pairwise_accuracy, each (S // 2 + 1,) over the size of the shift;
    NaN where no window has such a shift"""
    middle = table.shape[1] // 2
    logits = np.concatenate([table[:, middle::-1], table[:, middle:]])  # (2 K, S // 2 + 1)
    with np.errstate(invalid="ignore"):
        positive, above = ((x.sum(0) / np.isfinite(logits).sum(0)) for x in (logits > 0, logits[:, :1] > logits))
    accuracy = (positive[0] + 1 - positive) / 2
    accuracy[0], above[0] = positive[0], 0.5  # at shift 0 there is no negative
    return dict(positive_rate=positive, accuracy=accuracy, pairwise_accuracy=above)


def speech_pairs(mel, K: int):
    """(K, S): whether a clip's window k, or the one d frames away, is speech: louder than the middle, in dB, of its
    quietest and its loudest window."""
    level = mel_windows(mel, HALF + np.arange(K)).mean((1, 2, 3))
    speech = level > (level.min() + level.max()) / 2
    return speech[:, None] | sliding_window_view(np.pad(speech, MAX_OFFSET), 2 * MAX_OFFSET + 1)


# ---------------------------------------------------------------------------------------------------------------------
# train

def train(args):
    """Writes --out, the weights with the least loss on held-out clips, and OUT_last.pt for --resume, which continues
    bit for bit on a CPU."""
    device, out = pick_device(args.device), claim_output(args.out, args)
    last = out.with_stem(f"{out.stem}_last")
    expert, opt, start, best = start_run(args, last, device)
    if start >= args.steps:
        return print(f"{last}: has {start} steps already; --steps is {args.steps}")
    pack, clips, val, val_clips = load_data(args, out.parent)
    print(f"sync expert on {device}: {len(clips)} clips to train on, {len(val_clips)} to validate, "
          f"{sum(p.numel() for p in expert.parameters()) / 1e6:.2f} M parameters; chance is a loss of {CHANCE:.3f}")

    used = dict(train=pack.fingerprints[clips], valid=val.fingerprints[val_clips])
    windows = Windows(pack, drawn_clips(pack, clips, args), args.windows, args.seed, args.size)
    stream = batches(windows, args.batch, start, args.workers)
    log, timer = open_log(out.with_name(f"log_{out.stem}.jsonl"), args), StepTimer(device)
    validate_every = max(1, min(1000, args.steps // 4))
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="sync expert", disable=None)
    for step in bar:
        batch = {name: x.flatten(0, 1) for name, x in timer.next(stream).items()}  # (N, ..)
        for group, factor in zip(opt.param_groups, (1, 10)):  # ours: the scale has to go from 5 to 40
            group["lr"] = factor * args.lr * cosine_warmup(step, args.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            face, sound = expert.face(batch["frames"]), expert.sound(batch["mel"])  # (N, E)
        terms = expert_loss(expert.logits(face, sound), batch["clip"], batch["k"])
        check_finite(terms, step)
        sigmoid = sigmoid_part(terms)
        opt.zero_grad(set_to_none=True)
        (sigmoid + 0.5 * terms["contrast"]).backward()  # ours: .5
        opt.step()

        end = step + 1 == args.steps
        if (step + 1) % LOG_EVERY == 0 or end:
            line = dict(step=step + 1, loss=sigmoid.item(), **{name: value.item() for name, value in terms.items()},
                        scale=expert.log_scale.exp().item(), bias=expert.bias.item())
            write_log(log, bar, line | timer.pace(len(face)), args.steps)
        if (step + 1) % validate_every == 0 or end:
            found = validate(expert.eval(), val, val_clips, device)
            expert.train()
            write_log(log, bar, dict(step=step + 1) | {f"val_{k}": v for k, v in found.items() if type(v) is float})
            checkpoint = dict(kind="syncnet", format=1, config=dict(net=expert.config, template=pack.template),
                              step=step + 1, clips=used, val=found)
            if found["loss"] < best:
                best = found["loss"]
                save_checkpoint(out, checkpoint | dict(networks=dict(expert=half(expert))))
            save_checkpoint(last, checkpoint | dict(
                args=vars(args), best=best, networks=dict(expert=expert.state_dict()),
                optimisers=dict(adam=opt.state_dict())))
            timer = StepTimer(device)  # validation is not a step
    print(f"{out}: held-out loss {best:.3f}; test it with  python syncnet.py test --expert {args.out}")


def start_run(args, path: Path, device) -> tuple:
    """-> expert, optimiser, steps done, least held-out loss; with --resume as they were saved in `path`"""
    saved = load_checkpoint(path, "syncnet") if args.resume else None
    torch.manual_seed(args.seed)
    expert = (build_expert(saved, path) if saved else SyncNet(args.size, args.dim, args.width)).to(device)
    if expert.size != args.size:
        raise InputError(f"{path}: an expert for images of {expert.size} px, --size is {args.size}")
    weights = [p for name, p in expert.named_parameters() if name not in ("log_scale", "bias")]
    opt = torch.optim.Adam([dict(params=weights), dict(params=[expert.log_scale, expert.bias])], betas=(0.9, 0.99))
    if not saved:
        return expert, opt, 0, math.inf
    opt.load_state_dict(saved["optimisers"]["adam"])
    return expert, opt, saved["step"], saved["best"]


def load_data(args, folder: Path):
    """-> pack, clips to train on; pack, clips to validate on. Without --data toy packs in the folder, drawn on first use.
    InputError: images smaller than --size; see split."""
    if args.data:
        pack = open_packs(args.data)
        if pack.size < args.size:
            raise InputError(f"{pack.folder}: images of {pack.size} px, --size is {args.size}")
        parts = split(pack, args)
        return pack, parts["train"], pack, parts["valid"]
    pack = toy_pack(folder, args.size, args.people, 3.0)
    val = toy_pack(folder, args.size, TOY_VALID, 3.0, "tune")
    return pack, split(pack, args)["train"], val, np.arange(len(val))


# ---------------------------------------------------------------------------------------------------------------------
# test

def test(args):
    """Prints the results of `validate` on held-out clips as a table."""
    device = pick_device(args.device)
    path = args.expert or (SHIPPED if args.data else TOY)
    expert = load_sync(path, device)
    pack, clips, what = held_out_clips(args.data, expert, path)
    found = validate(expert, pack, tqdm(clips, "clips", disable=None), device)
    print(f"{what}: {found['clips']} clips, {found['windows']} windows; loss {found['loss']:.3f} (chance {CHANCE:.3f})\n")
    columns = ("positive_rate", "accuracy", "speech", "second", "pairwise_accuracy")
    print("| shift, frames | called in sync | accuracy | of speech | of seconds | own above shifted |\n|" + "---:|" * 6)
    for d in range(MAX_OFFSET + 1):
        print(f"| {d} | " + " | ".join(f"{found['by_shift'][name][d]:.3f}" for name in columns) + " |")
    print(f"| {FAR}-{MAX_OFFSET} | | " + " | ".join(f"{found[name]:.3f}" for name in columns[1:]) + " |\n")
    print(f"offset within one frame: {found['window']:.3f} of single windows, {found['clip']:.3f} of clips")


def held_out_clips(data: list | None, expert, path) -> tuple:
    """-> pack, the numbers of its clips that the expert was neither trained nor chosen on, and a description of them.

    data: packs, or None for toy people and speech that no training uses. InputError: no such clip; the wrong images.
    """
    if not data:
        if expert.template != "toy":
            raise InputError(f"{path}: not an expert of the toy world; give a pack of held-out clips with --data")
        pack = toy_pack(Path(path).absolute().parent, expert.size, TOY_VALID, 3.0, "test")
        return pack, np.arange(len(pack)), "toy people and speech held out for good"
    pack = open_packs(data)
    clips, what = np.arange(len(pack)), " ".join(data)
    if isinstance(expert, SyncNet):
        if pack.size < expert.size:
            raise InputError(f"{pack.folder}: images of {pack.size} px, the expert is for {expert.size} px or more")
        used = find_clips(pack, *clips_used(load_checkpoint(path, "syncnet"), pack, path).values())
        clips = np.setdiff1d(clips, used)
        what += ", the clips held out from training and validation" if len(used) else ""
        if not len(clips):
            raise InputError(f"{pack.folder}: all its clips trained {path} or chose it, none is left to test on")
    return pack, clips, what


# ---------------------------------------------------------------------------------------------------------------------
# offset

def offset(args):
    """Prints by how many frames a clip's sound is late, and with what confidence; --fix writes it in sync."""
    device = pick_device(args.device)
    expert = load_sync(args.expert, device)
    path = check_file(args.clip)
    out = check_output(args.fix, args.overwrite, VIDEO_SUFFIXES) if args.fix else None
    late, confidence, fit, windows = clip_offset(expert, path, device, args.box)
    words = f"{abs(late)} frame{'s' * (abs(late) != 1)} ({abs(late) / FPS:.2f} s) {'late' if late > 0 else 'early'}"
    doubt = "" if fit > 0 else "; a guess, mouth and sound fit at no offset"
    words = f"{words if late else 'in sync'}; confidence {confidence:.1f} (above 4 is sure; {windows} windows){doubt}"
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
    else where the detector finds it, every six seconds (where it finds none later on, the last box stays). A square
    video without a detected face, or filled by it, is a crop already.
    Raises InputError: no such box; no detector; no face in the first six seconds, or one that moves too far.
    """
    source = probe(path)
    height = min(source.height, HIGHEST)
    frames = read_video(path, height)
    where = parse_box(box, source.width, source.height, height / source.height) if box else None
    while part := list(islice(frames, SEGMENT)):
        if not box:
            where = middle_square(part[0]) if expert.template == "toy" else detect_box(path, part, where)
        for frame in part:
            yield crop_face(frame, where, expert.size)


def detect_box(path: Path, frames: list, last: tuple | None) -> tuple:
    """Where the detector finds the face in these frames; see face_crops."""
    H, W = frames[0].shape[:2]
    whole = (0, 0, W, H)
    try:
        need_detector()
        box = segment_box(frames)
    except InputError as error:
        if last or H == W:
            return last or whole
        raise InputError(f"{path}: {error}; give --box x0,y0,x1,y1") from None
    return whole if H == W and box[2] - box[0] > 0.8 * W else box  # ours: .8


def write_shifted(path: Path, late: int, out: Path):
    """The video with its sound moved `late` frames towards the beginning.

    Pictures that are H.264 are copied where possible, others encoded as H.264; so are those of an MP4 that goes into a
    .mkv, which would show what an edit list hides. The sound keeps its rate, channels and length: silence fills what is
    missing.
    Raises InputError: ffmpeg fails.
    """
    text = describe(path)
    # scale: where the size changes in the middle; players want even sizes
    ways = [["-vf", "scale=iw:ih,bwdif=mode=send_frame:deint=interlaced,pad=ceil(iw/2)*2:ceil(ih/2)*2",
             "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p"]]
    if re.search(r"Stream #.*: Video: h264", text) and not ("Input #0, mov" in text and out.suffix.lower() == ".mkv"):
        ways.insert(0, ["-c:v", "copy"])  # fails for pictures without timestamps, as in a .mkv that was cut by copying
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
    parser = Parser(description="the sync expert: do these lips and this sound belong together?")
    commands = parser.add_subparsers(dest="command", required=True)
    scripts = dict(train="train an expert", test="accuracy by shift on held-out clips",
                   offset="the audio-video offset of a clip")
    p, t, o = (commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
               for name, text in scripts.items())
    p.add_argument("--data", nargs="+", help="packs, a tenth of which is held out; default: the toy world, drawn beside "
                   "--out")
    split_options(p)
    p.add_argument("--size", type=int, default=32, choices=(16, 32, 48, 64, 96),
                   help="edge of the images it looks at; larger ones are shrunk to it")
    p.add_argument("--out", default=TOY, help="checkpoint")
    p.add_argument("--people", type=int, default=400, help="toy world: how many people (one clip each)")
    p.add_argument("--dim", type=int, default=128, help="length of an embedding (Wav2Lip: 512)")
    p.add_argument("--width", type=float, help="channels, 1 is Wav2Lip's; default: .25 up to 32 px, else .5")
    p.add_argument("--steps", type=int, default=1000, help="steps in all; validates and saves four times and more")
    p.add_argument("--batch", type=int, default=16, help="clips a step")
    p.add_argument("--windows", type=int, default=4, help="windows a clip")
    p.add_argument("--lr", type=float, default=2e-3, help="learning rate of Adam")
    p.add_argument("--resume", action="store_true", help="continue --out; give the same options")
    p.add_argument("--overwrite", action="store_true", help="start anew although --out exists")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=0, help="processes that load data")
    p.add_argument("--bf16", action="store_true", help="convolutions in bfloat16: 4 times faster on CPUs with AMX")
    t.add_argument("--data", nargs="+", help="packs; of those that the expert was trained on, the held-out clips; "
                   "default: toy people and speech held out for good, drawn beside --expert")
    t.add_argument("--expert", help="checkpoint, wav2lip, or a copy of that (.pth); default: with --data the shipped "
                   f"weights/sync.pt, without {TOY}")
    o.add_argument("clip", help="video with sound")
    o.add_argument("--expert", default=SHIPPED, help="checkpoint, wav2lip, or a copy of that (.pth)")
    o.add_argument("--box", help="box around the face, x0,y0,x1,y1 in pixels")
    o.add_argument("--fix", metavar="OUT", help="write the clip with its sound in sync (mp4, mov or mkv)")
    o.add_argument("--overwrite", action="store_true", help="replace what --fix names")
    for command in (p, t, o):
        command.add_argument("--device", default="auto")
    args = parser.parse_args(argv, dim=(1, 4096), width=(0.01, 4), windows=(2, 100))
    if args.command == "train" and args.width is None:
        args.width = 0.25 if args.size <= 32 else 0.5
    return args


def main(argv=None):
    args = parse(argv)
    dict(train=train, test=test, offset=offset)[args.command](args)


if __name__ == "__main__":
    run(main)
