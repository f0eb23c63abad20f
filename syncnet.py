"""The sync expert: does this mouth say this sound? Trained here, then frozen as the judge of train.py's stage 3.

Papers: SyncNet (Chung & Zisserman 2016), two towers whose embeddings meet; the expert of Wav2Lip (arXiv 2008.10010),
five frames' lower half and 0.2 s of mel; SigLIP (arXiv 2303.15343) for the pairwise sigmoid over a batch.

    python syncnet.py train                   # out/toy32/sync.pt, on the toy world    (2 min of one core)
    python syncnet.py test                    # people and speech it never met         (15 s: .95 in sync against shifted)
    python syncnet.py offset clip.mp4         # by how many frames the sound is late

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
import os
import platform
import subprocess
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from audio import FPS, AudioEncoder, ConvBlock, InputError, check_file, load_audio, log_mel, mel_windows, run
from data import ENDLESS, NEAR, Pack, batches, load_checkpoint, save_checkpoint, segment_box
from fusion import pick_device
from vision import check_output, crop_face, detect_faces, probe, read_video, to_tensor

SPAN = 5  # frames of a window: what the 16 mel steps of its middle frame cover (Wav2Lip)
HALF = SPAN // 2
LARGEST = 96  # pixels: Wav2Lip's size; larger pictures are shrunk to it, the lips need no more
REACH = 15  # frames: offsets are looked for in -15 .. 15, as SyncNet does
CHANCE = math.log(2)  # the loss of an expert that knows nothing


# ---------------------------------------------------------------------------------------------------------------------
# the towers


class FaceTower(nn.Module):
    """Lower half of five frames, side by side as channels -> (B, dim). Wav2Lip's plan: to a square, then halvings."""

    GAIN = 3.0  # of the deviations (ours): brings their variance near the mean's

    def __init__(self, size: int, dim: int, width: float):
        super().__init__()
        c = [max(8, 8 * round(c * width / 8)) for c in (32, 64, 128, 256, 512)]
        rows = min(size, LARGEST) // 2
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

    size: edge of the whole crops, a multiple of 16. dim: E. width: channels of the towers, 1 is Wav2Lip's.
    The crop's lower half is taken here, whatever the face's template: lips and chin are in it, eyes are not.
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
        """Whole crops (B, 5, 3, H, W) in [-1, 1] -> (B, E) of unit length"""
        expected = (SPAN, 3, self.size, self.size)
        assert frames.shape[1:] == expected, f"frames are {tuple(frames.shape)}, expected (B, {expected})"
        x = frames[..., self.size // 2 :, :]  # (B, 5, 3, H/2, W)
        if self.size > LARGEST:
            x = F.interpolate(x.flatten(0, 1), (LARGEST // 2, LARGEST), mode="bilinear", antialias=True)
            x = x.unflatten(0, (-1, SPAN))
        return F.normalize(self.face_tower(x), dim=1)

    def sound(self, mel):
        """Mel windows (B, 1, 80, 16) of the middle frames -> (B, E) of unit length"""
        return F.normalize(self.sound_tower(mel), dim=1)

    def logits(self, face, sound):
        """(B, E), (B2, E) of unit length -> (B, B2): log odds that they belong together"""
        return self.log_scale.exp() * face @ sound.t() + self.bias


def load_sync(path: str | Path, device, size: int | None = None) -> SyncNet:
    """A trained expert, frozen, in eval mode. size: the pictures it will be shown.

    Raises InputError: what load_checkpoint refuses; made for pictures of another size; not whole.
    """
    expert = network_of(load_checkpoint(path, "syncnet", map_location="cpu"), path)
    if size is not None and size != expert.size:
        raise InputError(f"{path}: an expert for pictures of {expert.size} px, these are {size} px")
    return expert.to(device).eval().requires_grad_(False)


def network_of(checkpoint: dict, path) -> SyncNet:
    """The expert in a checkpoint; InputError if its parts do not fit"""
    try:
        expert = SyncNet(**checkpoint["config"]["net"])
        expert.load_state_dict(checkpoint["networks"]["expert"])
        expert.template = checkpoint["config"]["template"]
    except (KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise InputError(f"{path}: its networks do not fit this version ({str(error).splitlines()[0][:120]})") from None
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


def sync_loss(expert, frames, mel):
    """What a generator minimises so that its mouth says its sound (FC-TFG's L_sync); a scalar.

    (-log sigmoid of the learned logit - log softmax among the sounds of the batch) / scale.
    The first is absolute and lets go where the expert is convinced, so the mouth need not exaggerate; the pull of a
    bare 1 - cos never ends. The second (StyleTalker's contrast, which the paper cites) asks that this sound fits better
    than the batch's others, which a mouth that half fits every sound does not do; a batch of one has no such term.
    Over the scale (ours), because an expert grows surer all its training: at 45 its gradient at a still mouth
    summed to 2800 times that of an L1 loss; so it is 60 times, and bounded alike for every expert.

    Args:
        expert: a frozen SyncNet, or what has its face, sound and logits (then the scale is taken as 1).
        frames: (B, 5, 3, H, W) in [-1, 1]; the gradient flows here.
        mel: (B, 1, 80, 16), the window of each middle frame.
    """
    assert len(frames) == len(mel), f"{len(frames)} windows of frames, {len(mel)} of sound"
    with torch.no_grad():
        sound = expert.sound(mel.float())
    logits = expert.logits(expert.face(frames.float()), sound)  # (B, B)
    absolute = F.softplus(-logits.diagonal()).mean()
    contrast = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    scale = expert.log_scale.exp() if hasattr(expert, "log_scale") else 1.0
    return (absolute + contrast) / scale


# ---------------------------------------------------------------------------------------------------------------------
# the data


class Windows(Dataset):
    """Several five-frame windows of one clip, NEAR frames or more apart where it is long enough.

    clips: which clips of the pack to draw from. Item n is a function of (seed, n) alone: see data.batches.
    """

    def __init__(self, pack: Pack, clips, windows: int, seed: int, augment: bool = True):
        self.pack, self.clips, self.windows, self.seed, self.augment = pack, np.asarray(clips), windows, seed, augment
        self.mels = {}  # of the last 1000 clips: computing a mel costs more than decoding the pictures

    def __len__(self):
        return ENDLESS

    def __getitem__(self, n: int) -> dict:
        """-> frames (windows, 5, 3, H, W), mel (windows, 1, 80, 16), clip (windows,), k (windows,): middle frames"""
        rng = np.random.default_rng([self.seed, n])
        c = int(rng.choice(self.clips))
        length = int(self.pack.n_frames[c])
        k = HALF + spaced(rng, max(1, length - SPAN + 1), self.windows)  # (windows,)
        shown = np.minimum(k[:, None] + np.arange(-HALF, HALF + 1), length - 1)  # a short clip stands still at its end
        pictures, mel = self.pack.frames(c, shown.ravel()), self.mel(c, k)
        if self.augment and rng.random() < 0.5:
            pictures = pictures[:, :, ::-1]
        frames = to_tensor(np.ascontiguousarray(pictures)).unflatten(0, shown.shape)
        if self.augment:  # ours: light and colour of the whole item move a little
            frames = frames * torch.from_numpy(rng.uniform(0.9, 1.1, (3, 1, 1))).float()
        return dict(frames=frames, mel=torch.from_numpy(mel), clip=torch.full((len(k),), c), k=torch.from_numpy(k))

    def mel(self, c: int, k):
        """pack.windows(c, k), from the kept mel of the clip where it is short"""
        if self.pack.n_frames[c] > 1000:
            return self.pack.windows(c, k)
        if c not in self.mels:
            if len(self.mels) == 1000:
                del self.mels[next(iter(self.mels))]
            self.mels[c] = log_mel(self.pack.sound(c))
        return mel_windows(self.mels[c], k)


def spaced(rng, length: int, count: int):
    """`count` of 0 .. length-1, NEAR or more apart, all such choices equally likely; any where they do not fit."""
    slack = length - (count - 1) * (NEAR - 1)
    if slack < count:
        return np.sort(rng.integers(length, size=count))
    return np.sort(rng.choice(slack, count, replace=False)) + (NEAR - 1) * np.arange(count)


def held_out(pack: Pack):
    """-> clips to train on, clips to validate on: every tenth person, or every tenth clip where people are few"""
    by = np.asarray(pack.identity) if len(pack.identities) >= 10 else np.arange(len(pack))
    if len(by) < 2:
        raise InputError(f"{pack.folder}: one clip is too few, one is needed to train and one to validate")
    out = by % 10 == min(9, len(np.unique(by)) - 1)
    return np.flatnonzero(~out), np.flatnonzero(out)


# ---------------------------------------------------------------------------------------------------------------------
# judging clips


@torch.no_grad()
def embed(expert, pictures, mel, device, batch: int = 128):
    """All windows of a clip: iterable of uint8 (H, W, 3), mel (80, S) -> face (K, E), sound (K, E); K = frames - 4.

    Window i has frames i .. i+4. Streams: no more than `batch` windows are held.
    """
    faces, held = [], []

    def flush():
        frames = to_tensor(np.stack(held)).to(device).unfold(0, SPAN, 1).movedim(-1, 1)  # (b, 5, 3, H, W)
        faces.append(expert.face(frames))
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
def by_shift(expert, face, sound, reach: int = REACH):
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


def judge(expert, pack: Pack, clips, device, reach: int = REACH) -> dict:
    """How well an expert hears on these clips of a pack.

    Returns, all in 0..1 but loss: accuracy (in sync called in sync, and sound NEAR .. reach frames away called shifted,
    half and half), paired (the own sound's logit is above the shifted one's: no threshold), by_shift (size of the shift
    -> accuracy, paired), window and clip (the offset found within one frame, from one window and from a whole clip),
    loss (in sync and shifted, ln 2 is chance), windows, clips. Clips of fewer than five frames are skipped.
    """
    tables, clip_hits = [], []
    for c in clips:
        T = int(pack.n_frames[c])
        if T >= SPAN:
            pictures = (pack.frame(c, k) for k in range(T))
            tables.append(by_shift(expert, *embed(expert, pictures, log_mel(pack.sound(c)), device), reach))
            clip_hits.append(abs(best_offset(tables[-1])[0]) <= 1)
    if not tables:
        raise InputError(f"{pack.folder}: no clip has {SPAN} frames")
    table = np.concatenate(tables)  # (windows, S)
    own = table[:, reach]
    shifts = {}
    for d in range(1, reach + 1):
        wrong = table[:, [reach - d, reach + d]]  # (windows, 2)
        there = np.isfinite(wrong)
        if there.any():
            paired = (own[:, None] > wrong)[there].mean()
            shifts[d] = (((own > 0).mean() + (wrong[there] < 0).mean()) / 2, paired)
    far = [shifts[d] for d in shifts if d >= NEAR] or [(math.nan, math.nan)]
    wrong = np.delete(table, range(reach - NEAR + 1, reach + NEAR), 1)
    wrong = wrong[np.isfinite(wrong)]
    loss = (np.logaddexp(0, -own).mean() + (np.logaddexp(0, wrong).mean() if len(wrong) else CHANCE)) / 2
    guess = np.nanargmax(table, 1) - reach
    accuracy, paired = np.mean(far, 0)
    return dict(accuracy=float(accuracy), paired=float(paired), loss=float(loss), window=float((abs(guess) <= 1).mean()),
                clip=float(np.mean(clip_hits)), by_shift={d: [round(float(v), 4) for v in s] for d, s in shifts.items()},
                windows=len(table), clips=len(tables))


# ---------------------------------------------------------------------------------------------------------------------
# train


def train(args):
    """Resumable, bit for bit on a CPU: item n of the data is a function of the seed and n alone."""
    device = pick_device(args.device)
    out = Path(args.out).absolute()
    saved = load_checkpoint(out, "syncnet", map_location=device) if args.resume else None
    expert = network_of(saved, out) if saved else None
    if saved and expert.size != args.size:
        raise InputError(f"{out}: an expert for pictures of {expert.size} px, --size is {args.size}")
    given = Pack(args.data) if args.data else None
    if given and given.size != args.size:
        raise InputError(f"{args.data}: pictures of {given.size} px, --size is {args.size}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out.parent}: cannot be made a directory ({error.strerror})") from None
    if out.exists() and not (args.resume or args.overwrite):
        raise InputError(f"{out} exists: --resume continues it, --overwrite starts anew")
    check_output(out, overwrite=True)
    if given:
        pack, (clips, val_clips) = given, held_out(given)
        val = pack
    else:
        pack = toy_pack(out.parent, args.size, args.people, args.seconds)
        val = toy_pack(out.parent, args.size, 40, 3.0, "tune")
        clips, val_clips = np.arange(len(pack)), np.arange(len(val))

    torch.manual_seed(args.seed)
    expert = (expert or SyncNet(args.size, args.dim, args.width)).to(device)
    calibration = [expert.log_scale, expert.bias]
    weights = [p for p in expert.parameters() if all(p is not q for q in calibration)]
    # ours: two lone numbers have to come far, from 5 to 40
    groups = [dict(params=weights, lr=args.lr), dict(params=calibration, lr=10 * args.lr)]
    opt = torch.optim.Adam(groups, betas=(0.9, 0.99))
    start = 0
    if saved:
        opt.load_state_dict(saved["optimisers"]["adam"])
        torch.set_rng_state(saved["rng"]["torch"].cpu())
        start = saved["step"]
    if start >= args.steps:
        return print(f"{out}: has {start} steps already; --steps is {args.steps}")
    print(f"sync expert on {device}: {len(clips)} clips to train on, {len(val_clips)} to validate, "
          f"{sum(p.numel() for p in expert.parameters()) / 1e6:.2f} M parameters; chance is a loss of {CHANCE:.3f}")

    data = batches(Windows(pack, clips, args.windows, args.seed), args.batch, start, args.workers)
    log = open(out.with_name(f"log_{out.stem}.jsonl"), "a" if saved else "w")
    versions = dict(torch=torch.__version__, numpy=np.__version__, python=platform.python_version())
    log.write(json.dumps(dict(revision=revision(), **versions, args=vars(args))) + "\n")
    clock, counted = time.perf_counter(), 0
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="sync expert", disable=None)
    for step in bar:
        batch = {name: x.to(device, non_blocking=True).flatten(0, 1) for name, x in next(data).items()}  # (N, ..)
        for group, rate in zip(opt.param_groups, (1, 10)):
            group["lr"] = rate * args.lr * lr_factor(step, args.steps)
        logits = expert.logits(expert.face(batch["frames"]), expert.sound(batch["mel"]))  # (N, N)
        terms = expert_loss(logits, batch["clip"], batch["k"])
        sigmoid = sigmoid_part(terms)
        loss = sigmoid + 0.5 * terms["contrast"]  # ours: .5
        if not torch.isfinite(loss):
            bad = ", ".join(f"'{name}' is {value.item():g}" for name, value in terms.items() if not torch.isfinite(value))
            raise InputError(f"step {step}: the loss term {bad}: stopped; the last checkpoint is whole. Lower --lr")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        counted += 1

        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            seconds = (time.perf_counter() - clock) / counted
            line = dict(step=step + 1, loss=sigmoid.item(), **{name: value.item() for name, value in terms.items()},
                        accuracy=batch_accuracy(logits.detach(), batch["clip"], batch["k"]),
                        scale=expert.log_scale.exp().item(), bias=expert.bias.item(), ms=1000 * seconds,
                        eta=seconds * (args.steps - step - 1))
            write(log, bar, line, "loss {loss:.3f} (chance {chance:.3f}): in sync {in_sync:.3f}, shifted {shifted:.3f}, "
                  "other {other:.3f}; contrast {contrast:.2f}; accuracy {accuracy:.3f}; "
                  "logit {scale:.1f} cos {bias:+.2f}; {ms:.0f} ms, {eta:.0f} s to go")
            clock, counted = time.perf_counter(), 0
        if (step + 1) % args.val_every == 0 or last:
            line = dict(step=step + 1, val=judge(expert.eval(), val, val_clips, device))
            expert.train()
            write(log, bar, line, "unseen: accuracy {val[accuracy]:.3f}, paired {val[paired]:.3f}, offset within "
                  "one frame: {val[window]:.2f} of windows, {val[clip]:.2f} of clips")
            clock, counted = time.perf_counter(), 0
        if (step + 1) % args.save_every == 0 or last:
            save_checkpoint(out, dict(
                kind="syncnet", format=1, config=dict(net=expert.config, template=pack.template), args=vars(args),
                step=step + 1, networks=dict(expert=expert.state_dict()), optimisers=dict(adam=opt.state_dict()),
                rng=dict(torch=torch.get_rng_state()), data=dict(step=step + 1)))
    log.close()
    print(f"{out}: test it with  python syncnet.py test --sync {args.out}")


def lr_factor(step: int, steps: int) -> float:
    """Twenty steps up (Adam's first ones are blind), then a cosine down to a twentieth."""
    return min(1, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


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


def revision() -> str | None:
    """The commit this runs from, where there is one"""
    try:
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def toy_pack(folder: Path, size: int, people: int, seconds: float, split: str = "train") -> Pack:
    """The toy world in `folder`, drawn on first use: the training people as train.py has them, or another split's."""
    import toyfaces

    first = dict(train=toyfaces.TRAIN, tune=toyfaces.TUNE, test=toyfaces.TEST)[split]
    path = folder / ("toys" if split == "train" else f"toys_{split}")
    toyfaces.make_pack(path, size, people, seconds, first, os.cpu_count())
    return Pack(path)


# ---------------------------------------------------------------------------------------------------------------------
# test


def test(args):
    """Prints what `judge` finds on held-out clips."""
    device = pick_device(args.device)
    path = Path(args.sync).absolute()
    expert = load_sync(path, device)
    if args.data:
        pack = Pack(args.data)
        if pack.size != expert.size:
            raise InputError(f"{args.data}: pictures of {pack.size} px, the expert is for {expert.size} px")
        trained_on = load_checkpoint(path, "syncnet")["args"]["data"]
        same = trained_on and Path(trained_on).absolute() == Path(args.data).absolute()
        clips = held_out(pack)[1] if same else np.arange(len(pack))
        what = f"{args.data}" + (", the tenth held out from training" if same else "")
    elif expert.template == "toy":
        pack = toy_pack(path.parent, expert.size, args.people, 3.0, "test")
        clips, what = np.arange(len(pack)), "toy people and speech held out for good"
    else:
        raise InputError(f"{path}: not an expert of the toy world; give a pack of held-out clips with --data")
    found = judge(expert, pack, tqdm(clips, "clips", disable=None), device)
    print(f"{what}: {found['clips']} clips, {found['windows']} windows; loss {found['loss']:.3f} (chance {CHANCE:.3f})\n")
    print("| shift, frames | accuracy (threshold 0) | own sound above the shifted |\n|---:|---:|---:|")
    for d, (accuracy, paired) in found["by_shift"].items():
        print(f"| {d} | {accuracy:.3f} | {paired:.3f} |")
    print(f"| {NEAR}-{REACH} | {found['accuracy']:.3f} | {found['paired']:.3f} |\n")
    print(f"offset within one frame: {found['window']:.3f} of single windows, {found['clip']:.3f} of clips")


# ---------------------------------------------------------------------------------------------------------------------
# offset


def clip_box(path: Path, box: str | None) -> tuple:
    """Where the face is in a video: --box, the whole of a square one, else the median of what the detector finds.

    Raises InputError: the box is none; no detector, no face, a face that moves too far, in the first six seconds.
    """
    height = min(720, probe(path).height)  # what data.py looks at
    first = list(islice(read_video(path, height), 150))
    if not first:
        raise InputError(f"{path}: holds no picture")
    H, W = first[0].shape[:2]
    if box:
        scale = H / probe(path).height
        try:
            x0, y0, x1, y1 = (float(v) * scale for v in box.split(","))
        except ValueError:
            raise InputError(f"--box {box}: expected x0,y0,x1,y1 in pixels") from None
        if not (0 <= x0 < x1 <= W + 1 and 0 <= y0 < y1 <= H + 1):
            raise InputError(f"--box {box}: not inside the picture of {path}")
        return x0, y0, x1, y1
    if H == W:
        print(f"{path}: square, taken whole as a crop of the face (else: --box)")
        return 0, 0, W, H
    if detect_faces(first[0]) is None:
        raise InputError(f"{path}: no face detector's weights are at hand; give --box x0,y0,x1,y1")
    try:
        return segment_box(first)
    except InputError as error:
        raise InputError(f"{path}: {error}; give --box x0,y0,x1,y1") from None


def offset(args):
    """Prints by how many frames a clip's sound is late, and how sure that is. Streams: memory grows by 1 kB a frame."""
    device = pick_device(args.device)
    expert = load_sync(args.sync, device)
    path = check_file(args.clip)
    mel = log_mel(load_audio(path))
    box, height = clip_box(path, args.box), min(720, probe(path).height)
    crops = (crop_face(frame, box, expert.size) for frame in tqdm(read_video(path, height), "frames", disable=None))
    first = list(islice(crops, SPAN + 1))
    if len(first) < SPAN + 1:
        raise InputError(f"{path}: {len(first)} frames are too few, an offset needs {SPAN + 1}")
    table = by_shift(expert, *embed(expert, chain(first, crops), mel, device))
    late, confidence, fit = best_offset(table)
    words = f"{abs(late)} frame{'s' * (abs(late) != 1)} ({abs(late) / FPS:.2f} s) {'late' if late > 0 else 'early'}"
    doubt = "" if fit > 0 else "; a guess, nowhere do mouth and sound fit"
    words = f"{words if late else 'in step'}; confidence {confidence:.1f} ({len(table)} windows){doubt}"
    print(f"{path}: the sound is {words}")


# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description="the sync expert: does this mouth say this sound?")
    commands = parser.add_subparsers(dest="command", required=True)
    options = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = commands.add_parser("train", help="train an expert", **options)
    p.add_argument("--data", help="pack, a tenth of which is held out; default: the toy world, drawn beside --out")
    p.add_argument("--size", type=int, default=32, choices=(16, 32, 64, 96, 128, 256), help="edge of the picture")
    p.add_argument("--out", default="out/toy32/sync.pt", help="checkpoint")
    p.add_argument("--people", type=int, default=400, help="toy world: how many people (one clip each)")
    p.add_argument("--seconds", type=float, default=3.0, help="toy world: length of a clip")
    p.add_argument("--dim", type=int, default=128, help="length of an embedding (Wav2Lip: 512)")
    p.add_argument("--width", type=float, help="channels, 1 is Wav2Lip's; default: .25 up to 64 px, else .5")
    p.add_argument("--steps", type=int, default=1000, help="steps in all; the rate falls towards the last")
    p.add_argument("--batch", type=int, default=16, help="clips a step")
    p.add_argument("--windows", type=int, default=4, help="windows a clip")
    p.add_argument("--lr", type=float, default=2e-3, help="rate of Adam")
    p.add_argument("--resume", action="store_true", help="continue --out; give the same options")
    p.add_argument("--overwrite", action="store_true", help="start anew although --out exists")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=0, help="processes that load data")
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--val-every", type=int, default=250)
    p.add_argument("--save-every", type=int, default=250)
    p.add_argument("--device", default="auto")
    p = commands.add_parser("test", help="accuracy on held-out clips", **options)
    p.add_argument("--sync", default="out/toy32/sync.pt", help="checkpoint")
    p.add_argument("--data", help="pack of held-out clips; default: toy people held out for good, drawn beside --sync")
    p.add_argument("--people", type=int, default=40, help="toy world: how many people")
    p.add_argument("--device", default="auto")
    p = commands.add_parser("offset", help="the audio-video offset of a clip", **options)
    p.add_argument("clip", help="video with sound")
    p.add_argument("--sync", default="out/toy32/sync.pt", help="checkpoint")
    p.add_argument("--box", help="square around the face, x0,y0,x1,y1 in pixels")
    p.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    many = (1, 10**9)
    limits = dict(people=(1, 10**6), seconds=(0.4, 600), dim=(1, 4096), width=(0.01, 4), steps=many, batch=(1, 10**4),
                  windows=(2, 100), lr=(0, math.inf), seed=(0, 2**62), workers=(0, 256), log_every=many,
                  val_every=many, save_every=many)
    for name, (low, high) in limits.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
    if args.command == "train" and args.width is None:
        args.width = 0.25 if args.size <= 64 else 0.5
    return args


def main(argv=None):
    args = parse(argv)
    dict(train=train, test=test, offset=offset)[args.command](args)


if __name__ == "__main__":
    run(main)
