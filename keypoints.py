"""Audio -> facial keypoints: how far does plain regression from sound to landmarks go, before any GAN?

Two models, after "Humans" (--model transformer: mel windows, a Transformer, optionally autoregressive) and "WAV2KP"
(--model lstm: MFCC in a sliding window of 40 steps, an LSTM, keypoints at the audio rate). Both predict principal
components of the mouth, as Suwajanakorn et al., "Synthesizing Obama" (SIGGRAPH 2017). Ours: what has no source beside it.

    python keypoints.py train                    # out/toy_kp.pt: the toy world from nothing    (1.5 min, two cores)
    python keypoints.py evaluate out/toy_kp.pt   # the table, on people and speech not trained on    (15 s)
    python keypoints.py sample speech.wav        # keypoints.mp4, keypoints.npy by weights/keypoints.pt    (3 s)
    python keypoints.py extract PACK --landmarks mediapipe:face_landmarker.task    # of one's own clips (12 ms a frame)

`normalise` removes position, size and in-plane rotation of the head. The mouth's 20 points, centred, become D = 8
principal components: the codes that the networks predict. Lengths are in distances between the outer corners of the
eyes, MSE in (per cent of that)^2, a coordinate. Axes: B clips, T frames, J steps of 10 ms, D codes, W width.
"""

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from media import (  # before torch, see there
    FPS, SAMPLES_PER_FRAME, InputError, Parser, VideoWriter, check_file, check_output, load_audio, run)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import toyfaces
from audio import N_MELS, AudioEncoder, log_mel, mel_windows, mfcc, n_frames, spec_augment
from checkpoint import (
    StepTimer, check_finite, claim_output, cosine_warmup, load_checkpoint, load_strictly, open_log, pick_device,
    refusing, restore_optimiser, save_checkpoint, write_log)
from control import correlation
from data import (
    USES, Pack, batches, clips_used, drawn_clips, find_clips, fingerprints, open_packs, split, split_options)
from faces import EYES, K, Landmarks, interpolate_gaps, landmark_detector, landmarks_header, open_landmarks, smooth
from syncnet import load_sync

MOUTH = slice(48, 68)  # of iBUG's 68
TOY_SECONDS = 3.0
TOY_PARTS = dict(train=range(toyfaces.TRAIN, toyfaces.TRAIN + 200), valid=range(toyfaces.TUNE, toyfaces.TUNE + 30),
                 test=range(toyfaces.TEST, toyfaces.TEST + 40))  # seeds of the toy people


# ------------------------------------------------------------------------------------------------ landmarks of a pack

def toy_points(who, truth: np.ndarray, size: int) -> np.ndarray:
    """True landmarks of a drawn clip: factors (T, 10) -> float32 (T, 68, 2) in pixels"""
    return np.stack([toyfaces.landmarks(who, dict(zip(toyfaces.FACTORS, row)), size) for row in truth.tolist()])


def clip_landmarks(pack: Pack, c: int, detect) -> tuple[np.ndarray, int]:
    """Landmarks (T, 68, 2) of a clip and how many frames were interpolated. detect None: a toy pack's true ones."""
    if detect is None:
        who = toyfaces.person(int(pack.identities[pack.identity[c]].removeprefix("toy")))
        truth = np.load(pack.folder / "truth.npy", "r", allow_pickle=False)
        return toy_points(who, truth[pack.frame_start[c] : pack.frame_start[c + 1]], pack.size), 0
    points, missing = interpolate_gaps([detect(pack.frame(c, k)) for k in range(pack.n_frames[c])])
    return smooth(points), missing


def extract(args):
    """Landmarks of every clip of a pack, written beside it. A killed run continues after its last finished clip."""
    pack = Pack(args.pack)
    folder = pack.folder / "landmarks"
    spec = args.landmarks or ("truth" if (pack.folder / "truth.npy").is_file() else "fan")
    with nullcontext() if spec == "truth" else landmark_detector(spec, pack.template) as detect:
        try:
            folder.mkdir(exist_ok=True)
            lines = open_landmarks(folder, landmarks_header(pack, spec.partition(":")[0]), args.overwrite)
            (folder / "clips.jsonl").write_bytes(b"".join(lines))  # without a torn last line
            done = len(lines) - 1
            with open(folder / "clips.jsonl", "ab", 0) as log, open(folder / "points.bin", "ab", 0) as out:
                out.truncate(int(pack.frame_start[done]) * K * 2 * 4)
                for c in tqdm(range(done, len(pack)), "clips", initial=done, total=len(pack), disable=None):
                    line = dict(source=pack.source(c))
                    try:
                        points, line["interpolated"] = clip_landmarks(pack, c, detect)
                    except InputError as error:  # too few frames with a face
                        points, line["reason"] = np.full((pack.n_frames[c], K, 2), np.nan), str(error)
                    out.write(points.astype("<f4").tobytes())
                    log.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    print(f"{folder}: {len(Landmarks(pack).kept)} of {len(pack)} clips have landmarks ({spec})")


def compare(args):
    """Seconds a frame of landmark detectors on the same frames, with one thread, and the distance of their points."""
    pack, found = Pack(args.pack), []
    torch.set_num_threads(1)
    frames = [pack.frame(c, pack.n_frames[c] // 2) for c in np.linspace(0, len(pack) - 1, 50).round().astype(int)]
    print(f"{len(frames)} crops of {pack.size} px from {args.pack}, one thread, loading not counted\n")
    print("| detector | seconds a frame | found | distance to the first, % of the eye distance |\n|---|---:|---:|---:|")
    for spec in args.landmarks:
        with landmark_detector(spec, pack.template) as detect:
            detect(frames[0])  # the first image pays for the set-up
            start = time.perf_counter()
            found.append([detect(frame) for frame in tqdm(frames, spec, disable=None, leave=False)])
            seconds = (time.perf_counter() - start) / len(frames)
        pairs = [(a, b) for a, b in zip(found[0], found[-1]) if a is not None and b is not None]
        apart = [np.hypot(*(a - b).T).mean() / np.hypot(*(a[EYES[1]] - a[EYES[0]])) for a, b in pairs]
        hits = sum(points is not None for points in found[-1])
        print(f"| {spec} | {seconds:.4f} | {hits} of {len(frames)} | {100 * np.mean(apart) if apart else math.nan:.1f} |")


# ------------------------------------------------------------------------------------------------ the shape of a mouth

def normalise(points: np.ndarray) -> np.ndarray:
    """Landmarks of a clip in pixels (T, 68, 2) -> the same with the outer corners of the eyes level, the origin in their
    middle. Unit: the clip's median of their distance, since a detector's jitter and turns of the head change it."""
    left, right = points[:, EYES[0]], points[:, EYES[1]]  # (T, 2)
    x, y = (right - left).T
    length = np.hypot(x, y)
    rotation = np.stack((np.stack((x, -y), 1), np.stack((y, x), 1)), 1) / length[:, None, None]  # (T, 2, 2), row vectors
    return ((points - (left + right)[:, None] / 2) @ rotation / np.median(length)).astype(np.float32)


@dataclass
class Mouth:
    """Codes of mouths: principal components of their 20 centred points, fitted on training clips."""

    mean: np.ndarray  # (40,)
    basis: np.ndarray  # (D, 40), orthonormal
    scale: np.ndarray  # (D,), the codes' deviation
    rest: np.ndarray  # (D,), a closed mouth: the mean of the tenth of frames with the smallest opening
    face: np.ndarray  # (1 + D, 136), the face as a linear function of the codes, by least squares: the jaw moves along

    @classmethod
    def fit(cls, source, clips, codes: int):
        """To the mouths in up to 400 clips"""
        some = tqdm(clips[:: -(-len(clips) // 400)], "mouths", disable=None)
        faces = np.concatenate([source.clip(c)[1] for c in some])  # (n, 68, 2)
        shapes = cls.shapes(faces).astype(np.float64)
        mean, (_, basis) = shapes.mean(0), np.linalg.eigh(np.cov(shapes.T))
        basis = basis[:, ::-1][:, :codes].T  # the largest first
        z, opening = (shapes - mean) @ basis.T, cls.opening(shapes)
        rest = z[opening <= np.quantile(opening, 0.1)].mean(0)
        face = np.linalg.lstsq(np.c_[np.ones(len(z)), z], faces.reshape(len(faces), -1), rcond=None)[0]
        return cls(*(np.float32(v) for v in (mean, basis, z.std(0) + 1e-6, rest, face)))

    @staticmethod
    def shapes(faces):  # normalised landmarks (T, 68, 2) -> mouths (T, 40), centred on the mean of their points
        mouths = faces[:, MOUTH]
        return (mouths - mouths.mean(1, keepdims=True)).reshape(len(faces), -1)

    @staticmethod
    def opening(shapes):  # mouths (T, 40) -> distance of the inner lips' middles (T,)
        upper, lower = (shapes.reshape(len(shapes), 20, 2)[:, p - MOUTH.start] for p in (62, 66))
        return np.hypot(*(lower - upper).T)

    def encode(self, faces):  # normalised landmarks (T, 68, 2) -> codes (T, D)
        return ((self.shapes(faces) - self.mean) @ self.basis.T).astype(np.float32)

    def decode(self, codes):  # (T, D) -> mouths (T, 40)
        return self.mean + codes @ self.basis

    def to_face(self, codes):  # (T, D) -> normalised landmarks (T, 68, 2)
        return (self.face[0] + codes @ self.face[1:]).reshape(-1, K, 2).astype(np.float32)

    def state(self) -> dict:
        return {name: torch.from_numpy(value) for name, value in vars(self).items()}

    @classmethod
    def load(cls, state: dict):
        return cls(**{name: state[name].float().numpy() for name in cls.__dataclass_fields__})


# ------------------------------------------------------------------------------- clips to train and test on, by number
# clip: sound (n,), normalised landmarks (T, 68, 2). view: name, frames (T, H, W, 3), landmarks in pixels.
# alignment: [(start, end in seconds, word or phone), ..]

class ToySource:
    """Toy people; a clip's number is its seed."""

    @staticmethod
    @lru_cache(None)
    def clip(c):  # nothing is drawn: 50 ms
        who = toyfaces.person(c)
        wav, truth = toyfaces.clip_truth(c, TOY_SECONDS, who)
        return wav, normalise(toy_points(who, truth, 128))

    def view(self, c):
        frames, _, truth = toyfaces.toy_clip(c, TOY_SECONDS, 128)
        return f"toy{c}", frames, toy_points(toyfaces.person(c), truth, 128)

    def alignment(self, c) -> list[tuple]:
        """Consonants, vowels, and "sil" in the pauses"""
        times, now = [], 0.0
        syllables = toyfaces.syllables(np.random.default_rng([c, 2]), TOY_SECONDS)  # the sound's own stream
        for start, onset, length, consonant, vowel, _ in syllables:
            end = start + onset + length
            times += [(now, start, "sil"), (start, start + onset, consonant), (start + onset, end, vowel)]
            now = end
        times.append((now, TOY_SECONDS, "sil"))
        return [(a, b, name) for a, b, name in times if b > a + 1e-6]


class PackSource:
    """The clips of packs that have landmarks. words: folder of GRID's .align files, one for each video of the pack"""

    def __init__(self, folders, words=None):
        self.pack, self.words = open_packs(folders), words
        self.landmarks = Landmarks(self.pack)

    def clip(self, c):
        return self.pack.sound(c), normalise(self.landmarks.clip(c))

    def view(self, c):
        frames = self.pack.frames(c, range(self.pack.n_frames[c]))
        return Path(self.pack.source(c)).name, frames, self.landmarks.clip(c)

    def alignment(self, c) -> list[tuple]:
        """The words of WORDS/video.align: lines "start end word" in 1/25000 s"""
        video, _, begin = self.pack.source(c).rpartition("#")
        if not begin.isdecimal():
            raise InputError(f"{self.pack.folder}: clip '{begin}' is not cut from a video, --words has no times for it")
        path, first = check_file(Path(self.words) / f"{Path(video).stem}.align"), int(begin) / FPS
        with refusing(path, "expected lines of start, end and word"):
            rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
            times = [(int(a) / 25000 - first, int(b) / 25000 - first, word) for a, b, word in rows]
        return [(a, b, word) for a, b, word in times if b > 0 and a < self.pack.n_frames[c] / FPS]


def open_source(args, checkpoints=None):
    """The clips of the pack --data or of the toy world, and dict(train, valid, test): their numbers, to train with.

    checkpoints {path: content}, to evaluate: test has the clips that trained or chose none of them, train and valid
    those that all of them used so. InputError: no clip is left to train, validate or test with.
    """
    if not args.data:
        split((), args)  # refuses lists of clips
        return ToySource(), TOY_PARTS
    source = PackSource(args.data, getattr(args, "words", None))
    parts = dict.fromkeys(USES, np.arange(len(source.pack))) if checkpoints else split(source.pack, args)
    for path, saved in (checkpoints or {}).items():
        for part, prints in clips_used(saved, source.pack, path).items():
            used = find_clips(source.pack, prints)
            parts[part], parts["test"] = np.intersect1d(parts[part], used), np.setdiff1d(parts["test"], used)
    parts = {part: np.intersect1d(clips, source.landmarks.kept) for part, clips in parts.items()}
    for part in ("test",) if checkpoints else ("train", "valid"):
        if not len(parts[part]):
            raise InputError(f"{source.pack.folder}: no clip with landmarks is left to {USES[part]}")
    return source, parts


# ------------------------------------------------------------------------------------------------ input of the networks

RATE = dict(lstm=4, transformer=1)  # codes a frame; the lstm's are at the audio rate, one each 10 ms (WAV2KP)
WINDOW = 40  # MFCC steps (WAV2KP)
SILENCE = np.r_[math.log(np.finfo(float).eps), np.zeros(12)]  # MFCC of digital silence


def audio_features(kind: str, wav: np.ndarray) -> np.ndarray:
    """Sound (n,) -> of kind "lstm" MFCC (S, 13) at 100 Hz, of "transformer" log mel (80, S) at 80 Hz"""
    return log_mel(wav) if kind == "transformer" else mfcc(wav).T.astype(np.float32)


def audio_windows(kind: str, features, first: int, stop: int) -> np.ndarray:
    """The input for frames first .. stop-1: mel (T, 1, 80, 16) or MFCC (4 T, 40, 13). MFCC windows are centred on steps
    of 10 ms, so the LSTM looks .2 s ahead: lips move before the sound (Suwajanakorn: the same)."""
    if kind == "transformer":
        return mel_windows(features, np.arange(first, stop))
    at = np.arange(first * RATE[kind], stop * RATE[kind])[:, None] + np.arange(-WINDOW // 2, WINDOW // 2)  # (J, 40)
    inside = (at >= 0) & (at < len(features))
    return np.where(inside[..., None], features[np.clip(at, 0, len(features) - 1)], SILENCE).astype(np.float32)


def interpolate(values: np.ndarray, positions) -> np.ndarray:
    """Rows of values (n, D) at fractional positions (m,), linearly -> (m, D); constant outside"""
    return np.stack([np.interp(positions, np.arange(len(values)), column) for column in values.T], 1)


class KeypointDataset(Dataset):
    """Windows of T frames: sound (T, 1, 80, 16) or (4 T, 40, 13), codes (T or 4 T, D). Item n is a function of (seed, n).

    Augmentation (ours): loudness, SpecAugment on the mel, and SILENT of the items are a quiet room and a mouth at rest,
    from digital silence to -50 dB of noise, since clips have no silence of other microphones."""

    SILENT = 0.05

    def __init__(self, source, clips, mouth: Mouth, kind: str, T: int, seed: int):
        self.source, self.clips, self.mouth, self.kind, self.T, self.seed = source, clips, mouth, kind, T, seed
        self.clip = lru_cache(4000)(self.features_and_codes)

    def features_and_codes(self, c):
        """Of a whole clip; codes (T or 4 T, D), interpolated between the middles of frames"""
        (wav, faces), rate = self.source.clip(c), RATE[self.kind]
        at = (np.arange(rate * len(faces)) + 0.5) / rate - 0.5
        return audio_features(self.kind, wav), interpolate(self.mouth.encode(faces), at).astype(np.float32)

    def __getitem__(self, n: int) -> dict:
        rng, rate = np.random.default_rng([self.seed, n]), RATE[self.kind]
        silent = rng.random() < self.SILENT
        if silent:
            noise = rng.standard_normal(self.T * SAMPLES_PER_FRAME) * 10 ** (rng.uniform(-100, -50) / 20)
            features = audio_features(self.kind, noise.astype(np.float32) * (rng.random() < 0.7))
            codes = np.tile(self.mouth.rest, (self.T * rate, 1))
        else:
            features, codes = self.clip(int(rng.choice(self.clips)))
        first = int(rng.integers(max(1, len(codes) // rate - self.T + 1)))
        louder = 0 if silent else np.float32(rng.uniform(-8, 8))  # dB
        if self.kind == "lstm":
            features = features + np.float32(math.log(10) / 10 * louder) * (np.arange(13) == 0)  # the log energy
        elif not silent:
            features = np.clip(features + np.float32(0.08) * louder * (features > -4), -4, 4)  # the mel's 8 for 100 dB
            features = spec_augment(features, rng, steps=8)
        at = np.arange(first * rate, (first + self.T) * rate)
        codes = codes[np.minimum(at, len(codes) - 1)]  # a clip shorter than T stands still at its end
        return dict(sound=audio_windows(self.kind, features, first, first + self.T), codes=codes)


# -------------------------------------------------------------------------------------------------------- the networks
# encode(sound) -> (B, T, W), decode -> codes (B, T, D); of an LSTM J = 4 T in place of T

class Wav2KP(nn.Module):
    """WAV2KP: an LSTM reads each window of 40 MFCC steps by itself; a linear layer maps its last state to codes."""

    kind, reach = "lstm", 0  # reach: frames to each side that a code depends on, beyond its own window

    def __init__(self, codes: int, width: int = 128, layers: int = 1):
        super().__init__()
        self.config = dict(codes=codes, width=width, layers=layers)
        self.register_buffer("mean", torch.zeros(13))  # of the MFCC of training clips
        self.register_buffer("deviation", torch.ones(13))
        self.register_buffer("scale", torch.ones(codes))  # the codes' deviation, so that outputs are of order 1
        self.lstm = nn.LSTM(13, width, layers, batch_first=True)
        self.out = nn.Linear(width, codes)

    def encode(self, sound):  # (B, J, 40, 13)
        assert sound.shape[2:] == (WINDOW, 13), f"sound is {tuple(sound.shape)}, expected (B, J, 40, 13)"
        x = ((sound - self.mean) / self.deviation).clamp(-5, 5)  # digital silence is 15 deviations off
        return self.lstm(x.flatten(0, 1))[0][:, -1].unflatten(0, sound.shape[:2])  # (B, J, W)

    def decode(self, h):
        return self.out(h) * self.scale

    def forward(self, sound):
        return self.decode(self.encode(sound))


class AudioFront(nn.Module):
    """Mel window -> (N, W): two convolutions over time, all bands at once; or, of a sync expert (tower: its dim and
    width), the sound tower and a linear layer"""

    def __init__(self, width: int, tower: dict | None):
        super().__init__()
        if tower:
            self.tower, self.out = AudioEncoder(**tower), nn.Linear(tower["dim"], width)
        else:
            self.body = nn.Sequential(
                nn.Conv1d(N_MELS, width, 5, 2, 2), nn.GELU(), nn.Conv1d(width, width, 3, 2, 1), nn.GELU(),
                nn.Flatten(), nn.Linear(4 * width, width))  # 16, 8, 4 steps

    def forward(self, mel):  # (N, 1, 80, 16)
        if hasattr(self, "body"):
            return self.body(mel[:, 0] / 4)
        return self.out(F.normalize(self.tower(mel), dim=1) * math.sqrt(self.out.in_features))  # elements of order 1


class Block(nn.Module):
    """A Transformer layer with attention to `reach` frames on each side. A learned bias for each distance and head (T5)
    stands for positions, so the result does not depend on a frame's place or the length of the sound."""

    def __init__(self, width: int, heads: int, reach: int, dropout: float):
        super().__init__()
        self.heads, self.reach, self.dropout = heads, reach, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * reach + 1))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def forward(self, x):  # (B, T, W)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        frame = torch.arange(x.shape[1], device=x.device)
        distance = frame - frame[:, None]  # (T, T), key - query
        bias = self.bias[:, distance.clamp(-self.reach, self.reach) + self.reach]  # (nh, T, T)
        bias = bias.masked_fill(distance.abs() > self.reach, -math.inf).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Humans(nn.Module):
    """Humans: an audio encoder and a Transformer, whose blocks attend to `look` frames on each side.

    autoregressive: a GRU takes the last frame's codes beside the Transformer's output. In training it is unrolled on its
    own output as in use (no teacher forcing), so it cannot drift. tower: see AudioFront."""

    kind = "transformer"

    def __init__(self, codes: int, width: int = 128, layers: int = 3, heads: int = 4, look: int = 8,
                 autoregressive: bool = False, tower: dict | None = None, dropout: float = 0.1):
        super().__init__()
        self.config = dict(codes=codes, width=width, layers=layers, heads=heads, look=look,
                           autoregressive=autoregressive, tower=tower, dropout=dropout)
        self.reach = layers * look  # frames to each side that frame t depends on
        self.register_buffer("scale", torch.ones(codes))
        self.front = AudioFront(width, tower)
        self.blocks = nn.Sequential(*(Block(width, heads, look, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.cell = nn.GRUCell(width + codes, width) if autoregressive else None
        self.out = nn.Linear(width, codes)

    def encode(self, sound):  # (B, T, 1, 80, 16)
        return self.norm(self.blocks(self.front(sound.flatten(0, 1)).unflatten(0, sound.shape[:2])))  # (B, T, W)

    def decode(self, h):  # (B, T, W)
        if self.cell is None:
            return self.out(h) * self.scale
        state, last, codes = torch.zeros_like(h[:, 0]), torch.zeros_like(self.out(h[:, 0])), []
        for t in range(h.shape[1]):
            state = self.cell(torch.cat((h[:, t], last), 1), state)
            last = self.out(h[:, t] + state)
            codes.append(last)
        return torch.stack(codes, 1) * self.scale  # (B, T, D)

    def forward(self, sound):
        return self.decode(self.encode(sound))


@torch.no_grad()
def predict(model, wav: np.ndarray, device, chunk: int = 500) -> np.ndarray:
    """Any sound (n,) -> codes (T, D), T = n_frames(n). Chunks of frames overlap by the network's reach, so the result is
    that of one pass."""
    T, rate, features, hidden = n_frames(len(wav)), RATE[model.kind], audio_features(model.kind, wav), []
    for first in range(0, T, chunk):
        stop = min(T, first + chunk)
        low, high = max(0, first - model.reach), min(T, stop + model.reach)
        sound = torch.from_numpy(audio_windows(model.kind, features, low, high))[None].to(device)
        hidden.append(model.encode(sound)[:, (first - low) * rate : (stop - low) * rate])
    codes = model.decode(torch.cat(hidden, 1))[0].float()
    return codes.unflatten(0, (T, rate)).mean(1).cpu().numpy()


def load_keypoints(path, device, which: str | None = None):
    """A trained network and its Mouth; which: its "last", "best" or "average" weights, by default the average of the
    best where there is one. InputError: what load_checkpoint refuses; parts that do not fit"""
    saved = load_checkpoint(path, "keypoints")
    which = which or ("average" if "average" in saved.get("networks", {}) else "best")
    with refusing(path, "its networks do not fit this version"):
        network, net = dict(lstm=Wav2KP, transformer=Humans)[saved["config"]["kind"]], saved["config"]["net"]
        model = load_strictly(lambda: network(**net), saved["networks"][which], path)
        return model.to(device).eval(), Mouth.load(saved["mouth"])


# --------------------------------------------------------------------------------------------------------------- train

FRAMES = dict(transformer=50, lstm=5)  # of an item (ours)
FREE = "steps out resume overwrite device".split()  # options that --resume may change


def keypoint_loss(codes, true, rate: int = 1) -> dict:
    """Terms in (per cent of the eye distance)^2 a coordinate, (B, T, D) each. The basis is orthonormal, so squares of
    codes are squares of coordinates. position: mean square. velocity: of the differences of neighbours, a frame."""
    unit = 1e4 / 40  # coordinates of a mouth
    velocity, true_velocity = rate * codes.diff(dim=1), rate * true.diff(dim=1)
    return dict(position=unit * (codes - true).square().sum(-1).mean(),
                velocity=unit * (velocity - true_velocity).square().sum(-1).mean())


def new_model(args, source, clips):
    """(network, mouth) with their statistics from training clips, and with the sound tower of --expert"""
    mouth = Mouth.fit(source, clips, args.codes)
    if args.model == "lstm":
        model, some = Wav2KP(args.codes, args.width), clips[:: max(1, len(clips) // 100)]
        features = np.concatenate([audio_features("lstm", source.clip(c)[0]) for c in some])  # (S, 13)
        model.mean.copy_(torch.from_numpy(features.mean(0)))
        model.deviation.copy_(torch.from_numpy(features.std(0) + 1e-3))
    else:
        tower = load_sync(args.expert, "cpu").sound_tower if args.expert else None
        config = dict(dim=tower.out.out_features, width=tower.body[0].conv.out_channels / 32) if tower else None
        model = Humans(args.codes, args.width, autoregressive=args.autoregressive, tower=config)
        if tower:
            model.front.tower.load_state_dict(tower.state_dict())
    model.scale.copy_(torch.from_numpy(mouth.scale))
    return model, mouth


def optimiser(model, args):
    """AdamW; a fine-tuned sound tower learns at a tenth of the rate (ours), a frozen one not at all"""
    tower = [p for name, p in model.named_parameters() if name.startswith("front.tower.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("front.tower.")]
    for p in tower:
        p.requires_grad_(args.finetune)
    groups = [dict(params=rest, initial_lr=args.lr), dict(params=tower, initial_lr=0.1 * args.lr)]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.99), weight_decay=0.01)


def train(args):
    """Writes --out, the best and the averaged weights, and OUT_last.pt for --resume, bit for bit the same on a CPU."""
    device, out, saved, start, top = pick_device(args.device), claim_output(args.out, args), None, 0, []
    last = out.with_stem(f"{out.stem}_last")
    if args.resume:
        saved = load_checkpoint(last, "keypoints")
        vars(args).update({name: value for name, value in saved["args"].items() if name not in FREE})
    torch.manual_seed(args.seed)
    source, parts = open_source(args)
    model, mouth = load_keypoints(last, device, "last") if saved else new_model(args, source, parts["train"])
    opt = optimiser(model.to(device), args)
    if saved:
        restore_optimiser(opt, saved["optimisers"]["adamw"])
        torch.set_rng_state(saved["rng"]["torch"].cpu())
        start, top = saved["step"], saved["top"]
    used = {part: fingerprints(source.clip(c)[0] for c in parts[part]) for part in ("train", "valid")}
    if args.expert:  # clips that trained or chose it do not test this network
        used["train"] = torch.cat([used["train"], *load_checkpoint(args.expert, "syncnet").get("clips", {}).values()])
    still = baselines(mouth, {}, source, parts["valid"])["mean mouth"]["mse"]
    print(f"{model.kind} on {device}: {len(parts['train'])} clips to train on, {len(parts['valid'])} to validate, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; MSE of the mean mouth {still:.3g}")

    clips = drawn_clips(getattr(source, "pack", None), parts["train"], args)
    dataset = KeypointDataset(source, clips, mouth, model.kind, FRAMES[model.kind], args.seed)
    data, timer = batches(dataset, args.batch, start), StepTimer(device)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=model.kind, disable=None)
    log = open_log(out.with_name(f"log_{out.stem}.jsonl"), args)
    for step in bar:
        batch = timer.next(data)  # sound (B, T, 1, 80, 16), an LSTM's (B, 4 T, 40, 13); codes (B, T or 4 T, D)
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * cosine_warmup(step, args.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            codes = model.train()(batch["sound"])
        terms = keypoint_loss(codes.float(), batch["codes"], RATE[model.kind])
        check_finite(terms, step)
        opt.zero_grad(set_to_none=True)
        (terms["position"] + terms["velocity"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)  # ours: no step of a healthy run reaches it
        opt.step()

        done, save = step + 1, (step + 1) % args.save_every == 0 or step + 1 == args.steps
        if save or done % max(1, args.save_every // 4) == 0:
            pace = timer.pace(args.batch * FRAMES[model.kind])
            found = validate(model.eval(), mouth, source, parts["valid"], device)
            state = {name: p.detach().cpu().clone() for name, p in model.state_dict().items()}
            top = sorted([*top, dict(mse=found["mse"], step=done, state=state)], key=lambda t: t["mse"])[:10]  # Humans
            terms = {name: value.item() for name, value in terms.items()}
            write_log(log, bar, dict(step=done, **terms, **found, best=top[0]["mse"], **pace), args.steps)
            timer = StepTimer(device)  # validation does not count
        if save:
            average = {name: torch.stack([t["state"][name] for t in top]).mean(0) for name in state}
            both = {which: {name: p.half() for name, p in weights.items()}
                    for which, weights in (("best", top[0]["state"]), ("average", average))}
            checkpoint = dict(kind="keypoints", format=1, config=dict(kind=model.kind, net=model.config), step=done,
                              mouth=mouth.state(), clips=used)
            save_checkpoint(out, checkpoint | dict(networks=both))
            save_checkpoint(last, checkpoint | dict(
                networks=dict(last=state), args=vars(args), top=top, optimisers=dict(adamw=opt.state_dict()),
                rng=dict(torch=torch.get_rng_state())))
    log.close()
    print(f"{out}: python keypoints.py evaluate {args.out}")


# ------------------------------------------------------------------------------------------------------------ evaluate

def lagged(predicted, true, lag: int) -> float:
    """r of two curves (T,), the predicted one taken `lag` frames later; positive: it is late"""
    n = len(true) - abs(lag)
    return correlation(predicted[max(0, lag) :][:n], true[max(0, -lag) :][:n]) if n > 2 else 0.0


def partial(a, b, profile) -> float:
    """Partial correlation of two curves (T,), without the mean profile of all clips: where every clip is silence, words,
    silence, the profile alone correlates with every clip."""
    n = min(len(a), len(profile))
    ab, ap, bp = (correlation(x[:n], y[:n]) for x, y in ((a, b), (a, profile), (b, profile)))
    return (ab - ap * bp) / max(math.sqrt(max(0, (1 - ap**2) * (1 - bp**2))), 1e-9)


def score(pairs: list, profile=None) -> dict:
    """Predicted and true mouths of clips [(predicted, true (T, 40)), ..] -> means over clips.

    mse; moving: the same without each clip's mean mouth; r of the opening; residual: its partial r; lag: in frames, that
    with the highest mean r; std_ratio: deviation of the opening, predicted over true."""
    curves = [(Mouth.opening(a), Mouth.opening(b)) for a, b in pairs]
    r = {lag: np.mean([lagged(a, b, lag) for a, b in curves]) for lag in range(-8, 9)}
    std, true_std = (np.mean([curve.std() for curve in side]) for side in zip(*curves))
    out = dict(mse=np.mean([1e4 * np.square(a - b).mean() for a, b in pairs]),
               moving=np.mean([1e4 * np.square((a - a.mean(0)) - (b - b.mean(0))).mean() for a, b in pairs]),
               r=r[0], lag=max(r, key=lambda lag: (r[lag], -abs(lag))), std_ratio=std / max(true_std, 1e-9))
    if profile is not None:
        out["residual"] = np.mean([partial(a, b, profile) for a, b in curves])
    return {name: float(value) for name, value in out.items()}


def validate(model, mouth: Mouth, source, clips, device, profile=None) -> dict:
    """score of a network on clips, and how far two seconds of silence open the mouth, in % of the eye distance"""
    sounds = [np.zeros(2 * FPS * SAMPLES_PER_FRAME, np.float32), *(source.clip(c)[0] for c in clips)]
    silence, *mouths = (mouth.decode(predict(model, wav, device)) for wav in sounds)
    pairs = [(made, mouth.shapes(source.clip(c)[1])) for made, c in zip(mouths, clips)]
    return score(pairs, profile) | dict(silence=100 * float(mouth.opening(silence).max()))


def baselines(mouth: Mouth, table: dict, source, clips, profile=None) -> dict:
    """Rows of the table that need no network: what the codes can do, a still mouth, the mean motion of each viseme"""
    faces = [source.clip(c)[1] for c in clips]
    made = {f"PCA, {len(mouth.scale)} codes": [mouth.decode(mouth.encode(f)) for f in faces],
            "mean mouth": [np.tile(mouth.mean, (len(f), 1)) for f in faces]}
    if table:
        made["visemes, true timing"] = [
            mouth.decode(viseme_codes(table, source.alignment(c), len(f), mouth.rest)) for c, f in zip(clips, faces)]
    return {name: score(list(zip(mouths, map(mouth.shapes, faces))), profile) for name, mouths in made.items()}


def evaluate(args):
    """The table of baselines and networks on the test part. Visemes are fitted where some clips trained all networks."""
    device, nets = pick_device(args.device), {}
    checkpoints = {path: load_checkpoint(path, "keypoints") for path in args.weights}
    for path, saved in checkpoints.items():
        for which in [name for name in ("best", "average") if name in saved.get("networks", {})] or ["best"]:
            model, mouth = load_keypoints(path, device, which)
            kind = [model.kind, *(name for name in ("autoregressive", "tower") if model.config.get(name))]
            nets[f"{Path(path).stem} ({', '.join(kind)}), {which}"] = model, mouth
    source, parts = open_source(args, checkpoints)
    train, test = parts["train"], parts["test"]
    clips = tqdm(train if len(train) else test, "clips", disable=None)
    curves = [mouth.opening(mouth.shapes(source.clip(c)[1])) for c in clips]
    stop = sorted(map(len, curves), reverse=True)[len(curves) // 5]  # a fifth of the clips lasts so long
    profile = np.array([np.mean([curve[k] for curve in curves if len(curve) > k]) for k in range(stop)])  # mean opening
    table = fit_visemes(source, train, mouth) if len(train) and (args.words or not args.data) else {}
    rows = baselines(mouth, table, source, test, profile)
    for name, (model, own) in tqdm(nets.items(), "networks", disable=None, leave=False):
        rows[name] = validate(model, own, source, test, device, profile)
    columns = dict(mse=".2f", moving=".2f", r=".3f", residual=".3f", lag="+.0f", std_ratio=".2f", silence=".1f")
    name = source.pack.folder if args.data else "toy world"
    print(f"{name}: {len(test)} test clips; mse in (% of the eye distance)^2 a coordinate; moving: "
          f"without each clip's mean mouth; silence: opening in %, in clips {100 * profile.mean():.1f} on average\n")
    print(f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(format(row[key], form) if key in row else '' for key, form in columns.items())} |")


# ------------------------------------------------------------------------------------------------------------- visemes
# the mean lip motion of each word or phone: a baseline from transcripts with times instead of sound

PHASES = 8  # moments of a viseme at which its mean motion is kept (ours)


def fit_visemes(source, clips, mouth: Mouth) -> dict:
    """{word or phone: (its mean length in seconds, its mean motion (P, D))}"""
    seen, phase = {}, (np.arange(PHASES) + 0.5) / PHASES
    for c in clips:
        codes = mouth.encode(source.clip(c)[1])
        for start, end, name in source.alignment(c):
            if end > start:
                motion = interpolate(codes, (start + phase * (end - start)) * FPS - 0.5)
                seen.setdefault(name, []).append((end - start, motion))
    return {name: tuple(np.mean(values, 0) for values in zip(*found)) for name, found in sorted(seen.items())}


def viseme_codes(table: dict, alignment: list[tuple], T: int, rest: np.ndarray) -> np.ndarray:
    """Codes (T, D): the mean motion of each viseme, stretched to its time; rest elsewhere"""
    codes, at = np.tile(rest, (T, 1)).astype(np.float32), (np.arange(T) + 0.5) / FPS
    for start, end, name in alignment:
        inside = (at >= start) & (at < end)
        if name in table and inside.any():
            codes[inside] = interpolate(table[name][1], (at[inside] - start) / (end - start) * PHASES - 0.5)
    return codes


def text_to_codes(text: str, table: dict, rest: np.ndarray) -> np.ndarray:
    """Words or phones, each of its mean length, between pauses where the table has "sil" -> (T, D); joins are softened by
    a mean over three frames. InputError: a name that the table does not have"""
    words = text.split()
    for word in words or [text]:
        if word not in table:
            raise InputError(f"--text: '{word}' is unknown; the table has {' '.join(table)}")
    words = ["sil", *words, "sil"] if "sil" in table else words
    ends = np.cumsum([table[word][0] for word in words])
    codes = viseme_codes(table, list(zip([0.0, *ends], ends, words)), max(1, round(ends[-1] * FPS)), rest)
    padded = np.pad(codes, ((1, 1), (0, 0)), mode="edge")
    return (0.25 * padded[:-2] + 0.5 * codes + 0.25 * padded[2:]).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ pictures

DARK, LIGHT, RED, GREEN, ORANGE = (24, 26, 34), (214, 220, 232), (255, 112, 126), (110, 214, 140), (255, 166, 77)
FINE = 3  # drawn so many times larger, then reduced
# iBUG's parts: jaw, brows, nose; eyes and the two lines of the lips are closed
LINES = [range(0, 17), range(17, 22), range(22, 27), range(27, 31), range(31, 36), (*range(36, 42), 36),
         (*range(42, 48), 42), (*range(48, 60), 48), (*range(60, 68), 60)]


def draw_face(points: np.ndarray, size: int, frame=None) -> np.ndarray:
    """Landmarks (68, 2) as lines, (size, size, 3): normalised ones, or those of a frame (H, W, 3) in its pixels, on it"""
    edge = size * FINE
    image = Image.new("RGB", (edge, edge), DARK) if frame is None else Image.fromarray(frame).resize((edge, edge))
    xy = edge * (points * 0.42 + (0.5, 0.32) if frame is None else points / len(frame))
    for line in LINES:
        colour = RED if line[0] >= MOUTH.start else LIGHT
        ImageDraw.Draw(image).line([tuple(xy[p]) for p in line], colour, max(1, round(edge / 110)), "curve")
    return np.asarray(image.reduce(FINE))


def draw_panel(wav, curves: list, alignment: list, title: str, width: int) -> np.ndarray:
    """Mel, curves [(values (T,), colour), ..] and words over time, (212, width, 3)"""
    t = (log_mel(wav)[::-1, :, None] + 4) / 8  # (80, S, 1) in [0, 1]; from dark blue over red to yellow
    mel = np.concatenate((np.clip(1.8 * t, 0, 1), np.clip(2 * t - 0.9, 0, 1), 0.25 + 0.4 * t * (1 - t)), 2)
    image = Image.new("RGB", (width * FINE, 212 * FINE), DARK)
    image.paste(Image.fromarray((255 * mel).astype(np.uint8)).resize((width * FINE, 88 * FINE)))
    pen, T, top = ImageDraw.Draw(image), len(curves[0][0]), 1.1 * max(values.max() for values, _ in curves) + 1e-6
    for values, colour in curves:
        x = (np.arange(T) + 0.5) / T * width * FINE
        pen.line(list(zip(x, (180 - 88 * values / top) * FINE)), colour, 2 * FINE, "curve")
    for start, end, name in alignment:
        a, b = (time * FPS / T * width * FINE for time in (start, end))
        pen.line((a, 88 * FINE, a, 194 * FINE), (70, 76, 92), FINE)
        pen.text(((a + b) / 2, 181 * FINE), name, LIGHT, anchor="ma", font_size=10 * FINE)
    pen.text((6 * FINE, 197 * FINE), title, LIGHT, font_size=10 * FINE)
    return np.asarray(image.reduce(FINE))


def show(args):
    """A test clip: frames with landmarks, true and predicted keypoints, mel, the mouth's opening; a .png or a video."""
    out, device = check_output(args.out, args.overwrite, (".png", ".mp4")), pick_device(args.device)
    model, mouth = load_keypoints(args.weights, device)
    source, parts = open_source(args, {args.weights: load_checkpoint(args.weights, "keypoints")})
    if args.clip >= len(parts["test"]):
        raise InputError(f"--clip {args.clip}: the test part has clips 0 to {len(parts['test']) - 1}")
    c = parts["test"][args.clip]
    (wav, true), (name, frames, points) = source.clip(c), source.view(c)
    made = mouth.to_face(predict(model, wav, device))[: len(true)]
    openings = [mouth.opening(mouth.shapes(faces[: len(made)])) for faces in (true, made)]
    title = f"{name}: opening of the mouth, true (green) and from the sound (orange), r {correlation(*openings):.2f}"
    alignment, film = source.alignment(c) if args.words or not args.data else [], out.suffix.lower() == ".mp4"
    panel = draw_panel(wav, list(zip(openings, (GREEN, ORANGE))), alignment, title, 672 if film else 1008)

    def images(k, size):
        return draw_face(points[k], size, frames[k]), draw_face(true[k], size), draw_face(made[k], size)

    if film:
        with VideoWriter(out, 224 + len(panel), 672, wav, args.overwrite) as video:
            for k in tqdm(range(len(made)), "frames", disable=None):
                frame = np.vstack([np.hstack(images(k, 224)), panel])
                frame[224:404, int((k + 0.5) / len(made) * 672)] = 255  # a cursor
                video.write(frame)
    else:  # nine columns, each above its moment of the panel
        columns = [np.vstack(images(int((i + 0.5) / 9 * len(made)), 112)) for i in range(9)]
        Image.fromarray(np.vstack([np.hstack(columns), panel])).save(out)
    print(f"{out}: {title}")


def sample(args):
    """Speech, or --text, -> a video of drawn keypoints, and beside it a .npy: float32 (T, 68, 2), normalised."""
    out = check_output(args.out, args.overwrite, (".mp4", ".mov", ".mkv"))
    numbers = check_output(out.with_suffix(".npy"), args.overwrite)
    if bool(args.speech) == bool(args.text):
        raise InputError("give a sound file or --text")
    if args.text and args.data and not args.words:
        raise InputError("--text of --data needs --words, the folder of its .align files")
    if args.text:
        (source, parts), wav = open_source(args), None
        mouth = Mouth.fit(source, parts["train"], codes=8)
        codes = text_to_codes(args.text, fit_visemes(source, parts["train"], mouth), mouth.rest)
    else:
        device, wav = pick_device(args.device), load_audio(args.speech)
        model, mouth = load_keypoints(args.weights, device)
        codes = predict(model, wav, device)
    faces = mouth.to_face(codes)  # (T, 68, 2)
    with VideoWriter(out, args.size, args.size, wav, args.overwrite, args.speech) as video:
        for face in tqdm(faces, "frames", disable=None):
            video.write(draw_face(face, args.size))
    with refusing(numbers, "cannot be written"):
        np.save(numbers, faces)
    print(f"{out}, {numbers}: {len(faces)} frames, {len(faces) / FPS:.2f} s")


# -------------------------------------------------------------------------------------------------------------- options

SHARED = {  # by several commands
    "pack": dict(metavar="PACK", help="of prepare.py"),
    "weights": dict(help="of train"),
    "--data": dict(nargs="+", metavar="PACK", help="of prepare.py, with landmarks (see extract); default: the toy world"),
    "--words": dict(metavar="DIR", help=".align files of --data, the times of its words; the toy world has its own"),
    "--device": dict(default="auto", help="cpu, cuda, mps; auto: the fastest that is there"),
    "--overwrite": dict(action="store_true", help="replace what is there")}


def train_options(p):
    split_options(p)
    p.add_argument("--out", default="out/toy_kp.pt", help="weights; beside it a log, and OUT_last.pt for --resume")
    p.add_argument("--model", default="transformer", choices=tuple(RATE), help="Humans' or WAV2KP's")
    p.add_argument("--autoregressive", action="store_true", help="transformer: one frame after the other")
    p.add_argument("--expert", metavar="SYNC.pt", help="transformer: its audio encoder is this sync expert's sound tower")
    p.add_argument("--finetune", action="store_true", help="train the sound tower of --expert at a tenth of the rate")
    p.add_argument("--codes", type=int, default=8, help="principal components of the mouth (Humans: 8)")
    p.add_argument("--width", type=int, default=128, help="channels, a multiple of 4, the number of heads")
    p.add_argument("--batch", type=int, default=16, help="windows a step")
    p.add_argument("--steps", type=int, default=600, help="steps in all; the rate falls towards the last")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    p.add_argument("--bf16", action="store_true", help="bfloat16, where the processor has it")
    p.add_argument("--resume", action="store_true", help="continue --out by its own options")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, default=60, help="steps between checkpoints; validations: a fourth of it")


def parse(argv=None):
    parser = Parser(description="audio -> facial keypoints")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, *shared):
        p = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for option in shared:
            p.add_argument(option, **SHARED[option])
        return p

    p = command("extract", "landmarks of a pack, beside it", "pack", "--overwrite")
    p.add_argument("--landmarks", help="mediapipe:FILE, dlib:FILE or fan; default: fan, of a toy pack its true ones")
    p = command("compare", "seconds a frame of landmark detectors", "pack")
    p.add_argument("--landmarks", nargs="+", default=["fan"], help="each mediapipe:FILE, dlib:FILE or fan")
    train_options(command("train", "train a network", "--data", "--device", "--overwrite"))
    p = command("evaluate", "the table, on held-out clips", "--data", "--words", "--device")
    p.add_argument("weights", nargs="+", help="of train; a row for each one's best and averaged weights")
    p = command("sample", "speech -> a video of keypoints, and a .npy", "--data", "--words", "--device", "--overwrite")
    p.add_argument("speech", nargs="?", help="any sound file, or a video with sound")
    p.add_argument("--weights", default=str(Path(__file__).parent / "weights" / "keypoints.pt"), help="of train")
    p.add_argument("--text", help="instead of speech: words of --words, or consonants and vowels of the toy world")
    p.add_argument("--out", default="keypoints.mp4", help="video; the numbers go beside it, as .npy")
    p.add_argument("--size", type=int, default=256, help="of the video in pixels")
    p = command("show", "a test clip and its keypoints", "weights", "--data", "--words", "--device", "--overwrite")
    p.add_argument("--clip", type=int, default=0, help="number among the test clips")
    p.add_argument("--out", default="show.png", help=".png or .mp4")
    limits = dict(codes=(1, 40), width=(4, 4096), clip=(0, 10**9), size=(32, 2048))
    args = parser.parse_args(argv, **limits)
    if args.command == "train" and args.model == "lstm" and (args.expert or args.autoregressive):
        raise InputError("--expert and --autoregressive are the transformer's")
    if args.command == "train" and args.finetune and not args.expert:
        raise InputError("--finetune needs an --expert")
    if args.command == "train" and args.width % 4:
        raise InputError(f"--width {args.width}: must be a multiple of 4, the number of heads")
    return args


def main(argv=None):
    args = parse(argv)
    jobs = dict(extract=extract, compare=compare, train=train, evaluate=evaluate, sample=sample, show=show)
    jobs[args.command](args)


if __name__ == "__main__":
    run(main)
