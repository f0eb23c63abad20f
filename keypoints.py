"""Audio -> facial keypoints: how far does plain regression from sound to landmarks go, before any GAN?

Models after "Humans" (--model transformer: mel windows, a Transformer, optionally autoregressive) and "WAV2KP" (lstm:
MFCC in a sliding window of 40 steps, keypoints at the audio rate), and FC-TFG's own form (context).

    python keypoints.py train                    # out/toy_kp.pt: the toy world from nothing    (1.5 min, two cores)
    python keypoints.py evaluate out/toy_kp.pt   # the table, on people and speech not trained on    (15 s)
    python keypoints.py sample speech.wav        # keypoints.mp4, keypoints.npy by weights/keypoints.pt    (3 s)

The networks predict codes: D principal components of the mouth's 20 centred points (Suwajanakorn et al., SIGGRAPH
2017); with --face, E more hold what these leave of all 68 points. Lengths are in distances between the eyes' outer
corners, MSE in (per cent of that)^2, a coordinate.
Axes: B clips, T frames, J steps of 10 ms, D (+ E) codes, W width, P moments of a word.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import sample as photos
import toyfaces
from audio import WindowEncoder, add_echo_and_noise, log_mel, make_non_speech, mel_windows, mfcc, n_frames, spec_augment
from checkpoint import (
    StepTimer, add_run_options, claim_output, cosine_warmup, count_parameters, load_checkpoint, load_strictly, open_log,
    optimiser_step, pick_device, progress_bar, restore_run, save_checkpoint, save_run, terms_to_floats, wrap_errors,
    write_log)
from control import correlation, partial_correlation
from data import (
    PART_PURPOSES, add_split_options, balance_people, batches, find_used_clips, hash_sounds, open_packs, split)
from faces import EYE_CORNERS, K, Landmarks, to_complex
from fusion import REACH, SpeechContext
from landmarks import extract, to_real
from media import (
    FPS, SAMPLES_PER_FRAME, VIDEO_SUFFIXES, InputError, Parser, check_file, check_output, load_audio, load_photo, run,
    write_video)
from motion import detect_speech, lip_opening
from report import image_grid, markdown_table
from syncnet import SyncNet, load_sync

MOUTH = slice(48, 68)  # of iBUG's 68
TOY_SECONDS = 3.0
TOY_PARTS = dict(train=range(toyfaces.TRAIN_SEED, toyfaces.TRAIN_SEED + 200),
                 valid=range(toyfaces.TUNE_SEED, toyfaces.TUNE_SEED + 30),
                 test=range(toyfaces.TEST_SEED, toyfaces.TEST_SEED + 40))  # seeds of the toy people


# ------------------------------------------------------------------------------------------------ the shape of a mouth

def normalise(points: np.ndarray) -> np.ndarray:
    """Landmarks of a clip in pixels (T, 68, 2) -> the same with the outer corners of the eyes level, the origin in their
    middle. Unit: the clip's median of their distance, since a detector's jitter and turns of the head change it."""
    z = to_complex(points)  # (T, 68)
    left, right = z[:, EYE_CORNERS[0], None], z[:, EYE_CORNERS[1], None]
    return to_real((z - (left + right) / 2) * abs(right - left) / (right - left) / np.median(abs(right - left)))


@dataclass
class Mouth:
    """Codes of mouths: principal components of their 20 centred points, fitted on training clips"""

    mean: np.ndarray  # (40,)
    basis: np.ndarray  # (D, 40), orthonormal
    scale: np.ndarray  # (D + E,), the codes' deviation
    rest: np.ndarray  # (D + E,), a closed mouth: the mean of the tenth of frames with the smallest opening
    face: np.ndarray  # (1 + D + E, 136), the face by the codes, by least squares: the jaw moves along

    @classmethod
    def fit(cls, source, clips, codes: int, more: int = 0):
        """To the mouths in up to 400 clips; more: E, the principal components of what the mouth's codes leave"""
        some = tqdm(clips[:: -(-len(clips) // 400)], "mouths", disable=None)
        faces = np.concatenate([source.clip(c)[1] for c in some])  # (n, 68, 2)
        shapes, flat = cls.shapes(faces).astype(np.float64), faces.reshape(len(faces), -1).astype(np.float64)
        mean, basis = shapes.mean(0), principal_components(shapes, codes)
        z, opening = (shapes - mean) @ basis.T, cls.opening(faces)
        known = np.c_[np.ones(len(z)), z]
        face = np.linalg.lstsq(known, flat, rcond=None)[0]
        left = flat - known @ face
        face = np.r_[face, principal_components(left, more)]
        z = np.c_[z, left @ face[1 + codes :].T]
        rest = z[opening <= np.quantile(opening, 0.1)].mean(0)
        return cls(*(np.float32(v) for v in (mean, basis, z.std(0) + 1e-6, rest, face)))

    @staticmethod
    def shapes(faces):  # normalised landmarks (T, 68, 2) -> mouths (T, 40), centred on the mean of their points
        mouths = faces[:, MOUTH]
        return (mouths - mouths.mean(1, keepdims=True)).reshape(len(faces), -1)

    @staticmethod
    def opening(faces):  # normalised landmarks (T, 68, 2) -> distance of the inner lips' middles (T,)
        return np.hypot(*(faces[:, 66] - faces[:, 62]).T)

    def encode(self, faces):  # normalised landmarks (T, 68, 2) -> codes (T, D + E)
        D, z = len(self.basis), (self.shapes(faces) - self.mean) @ self.basis.T
        left = faces.reshape(len(faces), -1) - self.face[0] - z @ self.face[1 : 1 + D]
        return np.c_[z, left @ self.face[1 + D :].T].astype(np.float32)

    def decode(self, codes):  # (T, D + E) -> normalised landmarks (T, 68, 2)
        return (self.face[0] + codes @ self.face[1:]).reshape(-1, K, 2).astype(np.float32)

    def moves(self) -> np.ndarray:
        """(1 + D + E, 68, 2) for warp.Warp: how landmarks move with the opening (least squares), and each code"""
        face, power = self.face[1:].reshape(-1, K, 2), self.scale**2
        opens = lip_opening(face)  # (D + E,)
        first = np.tensordot(power * opens, face, 1) / (power * opens**2).sum()
        return np.stack([first, *(face - opens[:, None, None] * first)]).astype(np.float64)

    def state(self) -> dict:
        return {name: torch.from_numpy(value) for name, value in vars(self).items()}

    @classmethod
    def load(cls, state: dict):
        return cls(**{name: state[name].float().numpy() for name in cls.__dataclass_fields__})


def principal_components(rows: np.ndarray, n: int) -> np.ndarray:
    """(m, k) -> (n, k), orthonormal, the largest first"""
    return np.linalg.eigh(np.cov(rows.T))[1][:, ::-1][:, :n].T


# ------------------------------------------------------------------------------- clips to train and test on, by number
# clip: sound (n,), normalised landmarks (T, 68, 2). view: name, frames (T, H, W, 3), landmarks in pixels.
# alignment: [(start, end in seconds, word or phone), ..]

def toy_landmarks(who, truth: np.ndarray, size: int) -> np.ndarray:
    """True landmarks of a drawn clip: factors (T, 10) -> float32 (T, 68, 2) in pixels"""
    return np.stack([toyfaces.compute_landmarks(who, dict(zip(toyfaces.FACTORS, row)), size) for row in truth.tolist()])


class ToySource:
    """Toy people; a clip's number is its seed."""

    @staticmethod
    @lru_cache(None)
    def clip(c):  # nothing is drawn: 50 ms
        who = toyfaces.make_person(c)
        wav, truth = toyfaces.make_clip_truth(c, TOY_SECONDS, who)
        return wav, normalise(toy_landmarks(who, truth, 128))

    def view(self, c):
        frames, _, truth = toyfaces.make_toy_clip(c, TOY_SECONDS, 128)
        return f"toy{c}", frames, toy_landmarks(toyfaces.make_person(c), truth, 128)

    def alignment(self, c) -> list[tuple]:
        """Consonants, vowels, and "sil" in the pauses"""
        times, now = [], 0.0
        syllables = toyfaces.sample_syllables(np.random.default_rng([c, 2]), TOY_SECONDS)  # the sound's own stream
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
        rest, deviation = self.people[self.pack.identity[c]]
        common_rest, common_deviation = (np.mean(values, 0) for values in zip(*self.people.values()))
        gain = np.clip(common_deviation / deviation, 0.5, 2)
        return self.pack.sound(c), common_rest + gain * (normalise(self.landmarks.clip(c)) - rest)

    @cached_property
    def people(self) -> dict:
        """{person: (mean of the tenth of frames with the smallest opening (68, 2), deviation of the opening)}. clip gives
        all people one of both (ours): sound tells neither, and a regression would guess them by the voice."""
        found, kept = {}, self.landmarks.usable_clips
        for person in dict.fromkeys(self.pack.identity[kept]):
            clips = kept[self.pack.identity[kept] == person]
            faces = np.concatenate([normalise(self.landmarks.clip(c)) for c in clips])
            opening = Mouth.opening(faces)
            found[person] = faces[opening <= np.quantile(opening, 0.1)].mean(0), opening.std()
        return found

    def view(self, c):
        frames = self.pack.frames(c, range(self.pack.n_frames[c]))
        return Path(self.pack.source(c)).name, frames, self.landmarks.clip(c)

    def alignment(self, c) -> list[tuple]:
        """The words of WORDS/video.align: lines "start end word" in 1/25000 s"""
        video, _, begin = self.pack.source(c).rpartition("#")
        if not begin.isdecimal():
            raise InputError(f"{self.pack.folder}: clip '{begin}' is not cut from a video, --words has no times for it")
        path, first = check_file(Path(self.words) / f"{Path(video).stem}.align"), int(begin) / FPS
        with wrap_errors(path, "expected lines of start, end and word"):
            rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
            times = [(int(a) / 25000 - first, int(b) / 25000 - first, word) for a, b, word in rows]
        return [(a, b, word) for a, b, word in times if b > 0 and a < self.pack.n_frames[c] / FPS]


def open_source(args, checkpoints=None):
    """The clips of --data or the toy world, and dict(train, valid, test) of their numbers; with checkpoints {path:
    content} test has those that none used, train and valid those that all used so. InputError: no clip is left."""
    if not args.data:
        split((), args)  # refuses lists of clips
        return ToySource(), TOY_PARTS
    source = PackSource(args.data, args.words)
    parts = dict.fromkeys(PART_PURPOSES, np.arange(len(source.pack))) if checkpoints else split(source.pack, args)
    for path, saved in (checkpoints or {}).items():
        for part, used in find_used_clips(saved, source.pack, path).items():
            parts[part], parts["test"] = np.intersect1d(parts[part], used), np.setdiff1d(parts["test"], used)
    parts = {part: np.intersect1d(clips, source.landmarks.usable_clips) for part, clips in parts.items()}
    for part in ("test",) if checkpoints else ("train", "valid"):
        if not len(parts[part]):
            raise InputError(f"{source.pack.folder}: no clip with landmarks is left to {PART_PURPOSES[part]}")
    return source, parts


# ------------------------------------------------------------------------------------------------ input of the networks

RATE = dict(lstm=4, transformer=1, context=1)  # codes a frame; the lstm's are at the audio rate, one each 10 ms (WAV2KP)
WINDOW = 40  # MFCC steps (WAV2KP)
SILENCE = np.r_[math.log(np.finfo(float).eps), np.zeros(12)]  # MFCC of digital silence
UNKNOWN = -100  # label of a frame without a known word: cross-entropy leaves it out


def audio_features(kind: str, wav: np.ndarray, voice_norm: bool = False) -> np.ndarray:
    """Sound (n,) -> of kind "lstm" MFCC (S, 13) at 100 Hz, else log mel (80, S) at 80 Hz"""
    return mfcc(wav).T.astype(np.float32) if kind == "lstm" else log_mel(wav, voice_norm)


def audio_windows(kind: str, features, first: int, stop: int) -> np.ndarray:
    """The input for frames first .. stop-1: mel (T, 1, 80, 16) or MFCC (4 T, 40, 13). MFCC windows are centred on steps
    of 10 ms, so the LSTM looks .2 s ahead: lips move before the sound (Suwajanakorn: the same)."""
    if kind != "lstm":
        return mel_windows(features, np.arange(first, stop))
    at = np.arange(first * RATE[kind], stop * RATE[kind])[:, None] + np.arange(-WINDOW // 2, WINDOW // 2)  # (J, 40)
    inside = (at >= 0) & (at < len(features))
    return np.where(inside[..., None], features[np.clip(at, 0, len(features) - 1)], SILENCE).astype(np.float32)


def interpolate(values: np.ndarray, positions) -> np.ndarray:
    """Rows of values (n, D) at fractional positions (m,), linearly -> (m, D); constant outside"""
    return np.stack([np.interp(positions, np.arange(len(values)), column) for column in values.T], 1)


class KeypointDataset(Dataset):
    """Windows of T frames: sound (T, 1, 80, 16) or (4 T, 40, 13), codes (T or 4 T, D), NaN behind a clip's end;
    with words {name: number} labels (T or 4 T,), or UNKNOWN. Item n depends on (seed, n) alone. Ours: SpecAugment,
    loudness; SILENT items are a mouth at rest without speech; with voice_norm NOISY have a room."""

    SILENT, NOISY = 0.08, 0.3

    def __init__(self, source, clips, mouth: Mouth, kind: str, T: int, seed: int, words: dict | None = None,
                 voice_norm: bool = False):
        self.source, self.clips, self.mouth, self.kind, self.T, self.seed = source, clips, mouth, kind, T, seed
        self.words, self.voice_norm, self.clip = words or {}, voice_norm, lru_cache(4000)(self.features_and_codes)

    def features_and_codes(self, c, noisy):
        """Of a whole clip; codes (T or 4 T, D), interpolated between the middles of frames; labels (T or 4 T,)"""
        (wav, faces), rate = self.source.clip(c), RATE[self.kind]
        at = (np.arange(rate * len(faces)) + 0.5) / rate - 0.5
        labels = np.full(len(at), UNKNOWN)
        for start, end, name in self.source.alignment(c) if self.words else ():
            labels[(at + 0.5 >= start * FPS) & (at + 0.5 < end * FPS)] = self.words.get(name, UNKNOWN)
        wav = add_echo_and_noise(wav, np.random.default_rng([self.seed, c])) if noisy else wav
        codes = interpolate(self.mouth.encode(faces), at).astype(np.float32)
        return audio_features(self.kind, wav, self.voice_norm), codes, labels

    def __getitem__(self, n: int) -> dict:
        rng, rate = np.random.default_rng([self.seed, n]), RATE[self.kind]
        silent = rng.random() < self.SILENT
        if silent:
            features = audio_features(self.kind, make_non_speech(self.T * SAMPLES_PER_FRAME, rng), self.voice_norm)
            codes = np.tile(self.mouth.rest, (self.T * rate, 1))
            labels = np.full(len(codes), self.words.get("sil", UNKNOWN))
        else:
            noisy = self.voice_norm and rng.random() < self.NOISY
            features, codes, labels = self.clip(int(rng.choice(self.clips)), noisy)
        first = int(rng.integers(max(1, len(codes) // rate - self.T + 1)))
        louder = 0 if silent else np.float32(rng.uniform(-8, 8))  # dB
        if self.kind == "lstm":
            features = features + np.float32(math.log(10) / 10 * louder) * (np.arange(13) == 0)  # the log energy
        elif not silent:
            if not self.voice_norm:
                features = np.clip(features + np.float32(0.08) * louder * (features > -4), -4, 4)  # 8 for 100 dB
            features = spec_augment(features, rng, steps=8)
        at = slice(first * rate, (first + self.T) * rate)
        missing = self.T * rate - len(codes[at])
        item = dict(sound=audio_windows(self.kind, features, first, first + self.T),
                    codes=np.pad(codes[at], ((0, missing), (0, 0)), constant_values=np.nan))
        return item | (dict(labels=np.pad(labels[at], (0, missing), constant_values=UNKNOWN)) if self.words else {})


# -------------------------------------------------------------------------------------------------------- the networks

TARGETS = "components", "displacements", "heatmaps"
STEP = 0.4  # deviation of a code's displacement, over the code's own: GRID has .2 to .5
MAP = 8  # a heat map's rows and columns (ours)
AXIS = torch.arange(MAP) - (MAP - 1) / 2  # middles of its cells
MAP_REACH = 4  # deviations of its point from a map's middle to the middles of its outermost cells (ours)


class Network(nn.Module):
    """What the networks share: encode(sound) -> (B, T, W), decode -> codes (B, T, D); of an LSTM J = 4 T in place of T.
    target, of the last layer: components, the codes; displacements, their change from the frame before, from a mouth at
    rest on; heatmaps, for each of the mouth's 20 points a map, whose centre of mass is the point.
    words: the number of words or phones that a second head tells apart, in training only."""

    reach = 0  # frames to each side that a code depends on, beyond its own window

    def __init__(self, codes: int, width: int = 128, target: str = TARGETS[0], words: int = 0, **more):
        super().__init__()
        self.config, self.target = dict(codes=codes, width=width, target=target, words=words, **more), target
        self.register_buffer("scale", torch.ones(codes))  # the codes' deviation, so that outputs are of order 1
        self.out = nn.Linear(width, 20 * MAP**2 if target == "heatmaps" else codes)
        if target != "components":
            self.register_buffer("rest", torch.zeros(codes))
            self.register_buffer("basis", torch.zeros(codes, 40))
            self.register_buffer("spacing", torch.ones(20, 2))  # of the cells of a map, in eye distances
        if words:
            self.words = nn.Linear(width, words)

    def decode(self, h):
        if self.target == "displacements":
            return self.rest + STEP * (self.out(h) * self.scale).cumsum(1)
        if self.target == "heatmaps":
            maps = self.maps(h).exp()  # (B, T, 20, rows, columns)
            centres = torch.stack((maps.sum(-2) @ AXIS.to(h), maps.sum(-1) @ AXIS.to(h)), -1)  # (B, T, 20, 2), cells
            return (centres * self.spacing).flatten(2) @ self.basis.T
        return self.out(h) * self.scale

    def maps(self, h):  # -> logarithm of the 20 maps, each of which sums to 1
        return self.out(h).unflatten(-1, (20, -1)).log_softmax(-1).unflatten(-1, (MAP, MAP))

    def forward(self, sound):
        return self.decode(self.encode(sound))

    def losses(self, batch: dict) -> dict:
        """keypoint_loss; cross-entropy of maps with bells one cell wide at true points, and of the second head"""
        h, rate, terms = self.encode(batch["sound"]), RATE[self.kind], {}
        codes = self.decode(h)
        true = batch["codes"].where(~batch["codes"].isnan(), codes.detach())
        if self.target == "displacements":  # windows do not begin at rest
            codes = codes + (true - codes)[:, :1]
        if self.target == "heatmaps":
            points = (true @ self.basis).unflatten(-1, (20, 2)) / self.spacing  # cells
            x, y = (-0.5 * (points[..., None] - AXIS.to(h)) ** 2).softmax(-1).unbind(-2)  # (B, T, 20, 8) each
            terms["maps"] = -(y[..., None] * x[..., None, :] * self.maps(h)).sum((-1, -2)).mean()
        if self.config["words"]:
            terms["words"] = F.cross_entropy(self.words(h).flatten(0, 1), batch["labels"].flatten(), ignore_index=UNKNOWN)
        return keypoint_loss(codes, true, rate) | terms


def keypoint_loss(codes, true, rate: int = 1) -> dict:
    """Terms in (per cent of the eye distance)^2 a coordinate, (B, T, D) each. The basis is orthonormal, so squares of
    codes are squares of coordinates. position: mean square. velocity: of the differences of neighbours, a frame."""
    velocity, true_velocity, unit = rate * codes.diff(dim=1), rate * true.diff(dim=1), 1e4 / 40
    return dict(position=unit * (codes - true).square().sum(-1).mean(),
                velocity=unit * (velocity - true_velocity).square().sum(-1).mean())


class Wav2KP(Network):
    """WAV2KP: an LSTM reads each window of 40 MFCC steps by itself; a linear layer maps its last state to codes."""

    kind = "lstm"

    def __init__(self, codes: int, width: int = 128, layers: int = 1, **more):
        super().__init__(codes, width, layers=layers, **more)
        self.register_buffer("mean", torch.zeros(13))  # of the MFCC of training clips
        self.register_buffer("deviation", torch.ones(13))
        self.lstm = nn.LSTM(13, width, layers, batch_first=True)

    def encode(self, sound):  # (B, J, 40, 13)
        assert sound.shape[2:] == (WINDOW, 13), f"sound is {tuple(sound.shape)}, expected (B, J, 40, 13)"
        x = ((sound - self.mean) / self.deviation).clamp(-5, 5)  # digital silence is 15 deviations off
        return self.lstm(x.flatten(0, 1))[0][:, -1].unflatten(0, sound.shape[:2])  # (B, J, W)


class Block(nn.Module):
    """A Transformer layer that attends to `reach` frames on each side, with a learned bias a distance (T5)"""

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


class Humans(Network):
    """Humans: an audio encoder, of windows or a sync expert's (tower: its config) with a linear layer, and a
    Transformer, whose blocks attend to `look` frames on each side. autoregressive: a GRU takes the last frame's
    codes beside the Transformer's output, in training its own."""

    kind = "transformer"

    def __init__(self, codes: int, width: int = 128, layers: int = 3, heads: int = 4, look: int = 8,
                 dropout: float = 0.1, autoregressive: bool = False, tower: dict | None = None, **more):
        super().__init__(codes, width, layers=layers, heads=heads, look=look, dropout=dropout,
                         autoregressive=autoregressive, tower=tower, **more)
        self.reach = layers * look
        self.front = nn.ModuleDict(dict(tower=SyncNet(**tower), out=nn.Linear(tower["dim"], width)) if tower else
                                   dict(body=WindowEncoder(width)))
        if tower:  # without what SyncNet.sound does not need
            expert = self.front.tower
            expert.face_tower = expert.log_scale = expert.bias = expert.landmarks = None
        self.blocks = nn.Sequential(*(Block(width, heads, look, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.cell = nn.GRUCell(width + codes, width) if autoregressive else None

    def encode(self, sound):  # (B, T, 1, 80, 16)
        front, mel = self.front, sound.flatten(0, 1)
        if self.config["tower"]:
            x = front.out(front.tower.sound(mel) * math.sqrt(front.out.in_features))  # elements of order 1
        else:
            x = front.body(mel)
        return self.norm(self.blocks(x.unflatten(0, sound.shape[:2])))  # (B, T, W)

    def decode(self, h):  # (B, T, W)
        if self.cell is None:
            return super().decode(h)
        state, last, codes = torch.zeros_like(h[:, 0]), torch.zeros_like(self.out(h[:, 0])), []
        for t in range(h.shape[1]):
            state = self.cell(torch.cat((h[:, t], last), 1), state)
            last = self.out(h[:, t] + state)
            codes.append(last)
        return torch.stack(codes, 1) * self.scale  # (B, T, D)


class Context(Network):
    """Ours, FC-TFG's form for real faces, which learns more of many people's voices than Humans does"""

    kind = "context"
    reach = 2 * REACH

    def __init__(self, codes: int, width: int = 128, **more):
        super().__init__(codes, width, **more)
        self.front, self.context = WindowEncoder(width), SpeechContext(width)

    def encode(self, sound):  # (B, T, 1, 80, 16)
        return self.context(self.front(sound.flatten(0, 1)).unflatten(0, sound.shape[:2]))  # (B, T, W)


@torch.no_grad()
def predict(model, wav: np.ndarray, device, chunk: int = 500) -> np.ndarray:
    """Any sound (n,) -> codes (T, D), T = n_frames(n). Chunks overlap by the network's reach: the result of one pass."""
    T, rate, hidden = n_frames(len(wav)), RATE[model.kind], []
    features = audio_features(model.kind, wav, model.config.get("voice_norm"))
    for first in range(0, T, chunk):
        stop = min(T, first + chunk)
        low, high = max(0, first - model.reach), min(T, stop + model.reach)
        sound = torch.from_numpy(audio_windows(model.kind, features, low, high))[None].to(device)
        hidden.append(model.encode(sound)[:, (first - low) * rate : (stop - low) * rate])
    codes = model.decode(torch.cat(hidden, 1))[0].float()
    return codes.unflatten(0, (T, rate)).mean(1).cpu().numpy()


def load_keypoints(path, device, which: str | None = None):
    """A trained network, its "last", "best" or "average", by default the average where there is one; its Mouth"""
    saved = load_checkpoint(path, "keypoints")
    which = which or ("average" if "average" in saved.get("networks", {}) else "best")
    with wrap_errors(path, "its networks do not fit this version"):
        network = dict(lstm=Wav2KP, transformer=Humans, context=Context)[saved["config"]["kind"]]
        net = saved["config"]["net"]
        model = load_strictly(lambda: network(**net), saved["networks"][which], path)
        return model.to(device).eval(), Mouth.load(saved["mouth"])


# --------------------------------------------------------------------------------------------------------------- train

FRAMES = dict(transformer=50, context=50, lstm=5)  # of an item (ours)
WEIGHTS = dict(position=1, velocity=1, maps=1, words=0.3)  # of the terms (ours)
FREE = "steps out resume overwrite device".split()  # options that --resume may change
VALIDATE_EVERY, SAVE_EVERY = 15, 60  # steps


def new_model(args, source, clips, words: int):
    """(network, mouth) with their statistics from training clips, and with the sound tower of --expert"""
    mouth = Mouth.fit(source, clips, args.codes, 8 if args.face else 0)  # ours: as many as of the mouth
    options = dict(codes=len(mouth.scale), width=args.width, target=args.target, words=words)
    if args.model == "lstm":
        model, some = Wav2KP(**options), clips[:: max(1, len(clips) // 100)]
        features = np.concatenate([audio_features("lstm", source.clip(c)[0]) for c in some])  # (S, 13)
        model.mean.copy_(torch.from_numpy(features.mean(0)))
        model.deviation.copy_(torch.from_numpy(features.std(0) + 1e-3))
    elif args.model == "context":
        model = Context(**options, voice_norm=bool(args.data))
    else:
        tower = load_sync(args.expert, "cpu") if args.expert else None
        with wrap_errors(args.expert, "its sound tower is another than syncnet.py's"):
            config = tower.config if tower else None
        voice_norm = bool(args.data) and not tower  # the sync expert has heard voices as they are
        model = Humans(**options, autoregressive=args.autoregressive, tower=config, voice_norm=voice_norm)
        if tower:
            model.front.tower.load_state_dict(tower.state_dict(), strict=False)
    deviations = mouth.scale[: len(mouth.basis), None] * mouth.basis  # (D, 40)
    known = vars(mouth) | dict(spacing=2 * MAP_REACH / (MAP - 1) * np.hypot.reduce(deviations).reshape(20, 2))
    for name in {"scale", "rest", "basis", "spacing"} & dict(model.named_buffers()).keys():
        getattr(model, name).copy_(torch.from_numpy(known[name]))
    return model, mouth


def optimiser(model, args):
    """AdamW; a fine-tuned sound tower learns at a tenth of the rate (ours), a frozen one not at all"""
    groups = [dict(params=[], initial_lr=args.lr), dict(params=[], initial_lr=0.1 * args.lr)]
    for name, p in model.named_parameters():
        in_tower = name.startswith("front.tower.")
        p.requires_grad_(args.finetune or not in_tower)
        groups[in_tower]["params"].append(p)
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
    names = {name for c in parts["train"] for *_, name in source.alignment(c)} if args.phones else ()
    words = {name: number for number, name in enumerate(sorted(names))}
    model, mouth = load_keypoints(last, device, "last") if saved else new_model(args, source, parts["train"], len(words))
    opt = optimiser(model.to(device), args)
    if saved:
        restore_run(last, saved, dict(adamw=opt))
        start, top = saved["step"], saved["top"]
    used = {part: hash_sounds(source.clip(c)[0] for c in parts[part]) for part in ("train", "valid")}
    if args.expert:  # clips that trained or chose it do not test this network
        used["train"] = torch.cat([used["train"], *load_checkpoint(args.expert, "syncnet").get("clips", {}).values()])
    still = baselines(mouth, {}, source, parts["valid"])["mean mouth"]["mse"]
    print(f"{model.kind} on {device}: {len(parts['train'])} clips to train on, {len(parts['valid'])} to validate, "
          f"{count_parameters(model)}; MSE of the mean mouth {still:.3g}")

    clips = balance_people(getattr(source, "pack", None), parts["train"], args)
    dataset = KeypointDataset(source, clips, mouth, model.kind, FRAMES[model.kind], args.seed, words,
                              model.config.get("voice_norm"))
    data, timer = batches(dataset, args.batch, start), StepTimer(device)
    log = open_log(out.with_name(f"log_{out.stem}.jsonl"), args)
    for step in (bar := progress_bar(model.kind, start, args.steps)):
        batch = timer.next_batch(data)  # sound (B, T, 1, 80, 16), an LSTM's (B, 4 T, 40, 13); codes (B, T or 4 T, D)
        terms = model.train().losses(batch)
        values = terms_to_floats(terms, step)
        loss = sum(WEIGHTS[name] * value for name, value in terms.items())
        with optimiser_step(opt, cosine_warmup(step, args.steps)):
            loss.backward()

        done, end = step + 1, step + 1 == args.steps
        if done % VALIDATE_EVERY == 0 or end:
            pace = timer.pace(args.batch * FRAMES[model.kind])
            found = validate(model.eval(), mouth, source, parts["valid"], device)
            state = {name: p.detach().cpu().clone() for name, p in model.state_dict().items()}
            top = sorted([*top, dict(mse=found["mse"], step=done, state=state)], key=lambda t: t["mse"])[:10]  # Humans
            write_log(log, bar, dict(step=done, **found, **values, best=top[0]["mse"], **pace), args.steps)
            timer = StepTimer(device)  # validation does not count
        if done % SAVE_EVERY == 0 or end:
            average = {name: torch.stack([t["state"][name] for t in top]).mean(0) for name in state}
            both = {which: {name: p.half() for name, p in weights.items()}
                    for which, weights in (("best", top[0]["state"]), ("average", average))}
            checkpoint = dict(kind="keypoints", format=1, config=dict(kind=model.kind, net=model.config), step=done,
                              mouth=mouth.state(), clips=used)
            save_checkpoint(out, checkpoint | dict(networks=both))
            save_run(last, checkpoint | dict(top=top), args, dict(last=model), dict(adamw=opt))
    print(f"{out}: python keypoints.py evaluate {args.out}")


# ------------------------------------------------------------------------------------------------------------ evaluate

def score(pairs: list, profile=None) -> dict:
    """[(predicted, true faces (T, 68, 2)), ..] -> means over clips: mse of the mouth; relative, over the mean
    square of its centred coordinates; r of the opening; residual, its partial r; jaw, brows, r of their height."""
    rows = []
    for made, true in pairs:
        mouth, curves = Mouth.shapes(true), (Mouth.opening(made), Mouth.opening(true))
        off = Mouth.shapes(made) - mouth
        row = dict(mse=1e4 * np.square(off).mean(), relative=np.square(off).mean() / np.square(mouth).mean(),
                   r=correlation(*curves), jaw=correlation(made[:, 8, 1], true[:, 8, 1]),
                   brows=correlation(made[:, 17:27, 1].mean(1), true[:, 17:27, 1].mean(1)))
        rows.append(row if profile is None else row | dict(residual=partial_correlation(*curves, profile)))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def validate(model, mouth: Mouth, source, clips, device, profile=None) -> dict:
    """score of a network on clips, and how far two seconds of silence open the mouth, in % of the eye distance"""
    silence = mouth.decode(predict(model, np.zeros(2 * FPS * SAMPLES_PER_FRAME, np.float32), device))
    pairs = [(mouth.decode(predict(model, wav, device)), true) for wav, true in map(source.clip, clips)]
    return score(pairs, profile) | dict(silence=100 * float(mouth.opening(silence).max()))


def baselines(mouth: Mouth, table: dict, source, clips, profile=None) -> dict:
    """Rows of the table that need no network: what the codes can do, a still mouth, the mean motion of each viseme"""
    faces = [source.clip(c)[1] for c in clips]
    made = {f"PCA, {len(mouth.scale)} codes": [mouth.encode(f) for f in faces],
            "mean mouth": [np.zeros((len(f), len(mouth.scale))) for f in faces]}
    if table:
        made["visemes, true timing"] = [
            viseme_codes(table, source.alignment(c), len(f), mouth.rest) for c, f in zip(clips, faces)]
    return {name: score(list(zip(map(mouth.decode, codes), faces)), profile) for name, codes in made.items()}


def evaluate(args):
    """The table of baselines and networks on the test part. Visemes are fitted where some clips trained all networks."""
    device, nets = pick_device(args.device), {}
    checkpoints = {path: load_checkpoint(path, "keypoints") for path in args.weights}
    for path, saved in checkpoints.items():
        for which in [name for name in ("best", "average") if name in saved.get("networks", {})] or ["best"]:
            model, mouth = load_keypoints(path, device, which)
            kind = [model.target, *(k for k in ("autoregressive", "tower", "words") if model.config.get(k))]
            nets[f"{Path(path).stem} ({', '.join([model.kind, *kind])}), {which}"] = model, mouth
    source, parts = open_source(args, checkpoints)
    train, test = parts["train"], parts["test"]
    clips = tqdm(train if len(train) else test, "clips", disable=None)
    curves = [Mouth.opening(source.clip(c)[1]) for c in clips]
    stop = sorted(map(len, curves), reverse=True)[len(curves) // 5]  # a fifth of the clips lasts so long
    profile = np.array([np.mean([curve[k] for curve in curves if len(curve) > k]) for k in range(stop)])  # mean opening
    table = fit_visemes(source, train, mouth) if len(train) and (args.words or not args.data) else {}
    rows = baselines(mouth, table, source, test, profile)
    for name, (model, own) in tqdm(nets.items(), "networks", disable=None, leave=False):
        rows[name] = validate(model, own, source, test, device, profile)
    columns = dict(mse=".2f", relative=".4f", r=".3f", residual=".3f", jaw=".3f", brows=".3f", silence=".1f")
    name = source.pack.folder if args.data else "toy world"
    print(f"{name}: {len(test)} test clips; mse in (% of the eye distance)^2 a coordinate; relative: over the mouth's "
          f"mean square; silence: opening in %, in clips {100 * profile.mean():.1f} on average\n")
    print(markdown_table({name: {key: format(row[key], form) if key in row else "" for key, form in columns.items()}
                    for name, row in rows.items()}))


# ------------------------------------------------------------------------------------------------------------- visemes
# the mean lip motion of each word or phone: a baseline from transcripts with times instead of sound

PHASES = 8  # moments of a viseme at which its motion is kept (ours)


def fit_visemes(source, clips, mouth: Mouth) -> dict:
    """{word or phone: its motions (n, P, D)}, whatever its length"""
    seen, phase = {}, (np.arange(PHASES) + 0.5) / PHASES
    for c in clips:
        codes = mouth.encode(source.clip(c)[1])
        for start, end, name in source.alignment(c):
            if end > start:
                motion = interpolate(codes, (start + phase * (end - start)) * FPS - 0.5)
                seen.setdefault(name, []).append(motion)
    return {name: np.stack(motions) for name, motions in sorted(seen.items())}


def viseme_codes(table: dict, alignment: list[tuple], T: int, rest: np.ndarray) -> np.ndarray:
    """Codes (T, D): the mean motion of each viseme, stretched to its time; rest elsewhere"""
    codes, at = np.tile(rest, (T, 1)).astype(np.float32), (np.arange(T) + 0.5) / FPS
    for start, end, name in alignment:
        inside = (at >= start) & (at < end)
        if name in table and inside.any():
            codes[inside] = interpolate(table[name].mean(0), (at[inside] - start) / (end - start) * PHASES - 0.5)
    return codes


def visemes(args):
    """A picture: for each word or phone the lips of up to 40 samples, thin, and their mean, at four of its moments"""
    out = check_output(args.out, args.overwrite, (".png",))
    source, parts = open_source(args)
    mouth = Mouth.fit(source, parts["train"], codes=8)
    table = fit_visemes(source, parts["train"], mouth)
    side, columns = 64 * FINE, 4
    image = Image.new("RGB", (columns * 5 * side, -(-len(table) // columns) * side), DARK)
    pen = ImageDraw.Draw(image, "RGBA")
    for n, (name, motions) in enumerate(table.items()):
        x, y = n % columns * 5 * side, n // columns * side
        pen.text((x + side / 8, y + side / 3), f"{name}\n{len(motions)}", LIGHT, font_size=12 * FINE)
        for k in range(4):
            motion = motions[:, (2 * k + 1) * PHASES // 8]
            lips = mouth.shapes(mouth.decode(np.r_[motion[:40], motion.mean(0)[None]])).reshape(-1, 20, 2)
            lips = lips * 1.3 * side + (x + (k + 1.5) * side, y + side / 2)
            for i, points in enumerate(lips):
                style = (RED, FINE) if i == len(lips) - 1 else ((*LIGHT, 40), 1)
                for line in LINES[-2:]:
                    pen.line([tuple(points[p - MOUTH.start]) for p in line], *style)
    image.reduce(FINE).save(out)
    print(f"{out}: {len(table)} words or phones of {len(parts['train'])} clips")


# ------------------------------------------------------------------------------------------------------------ pictures

DARK, LIGHT, RED, GREEN, ORANGE = (24, 26, 34), (214, 220, 232), (255, 112, 126), (110, 214, 140), (255, 166, 77)
FINE = 3  # drawn so many times larger, then reduced
# iBUG's parts: jaw, brows, nose; eyes and the two lines of the lips are closed
LINES = [range(0, 17), range(17, 22), range(22, 27), range(27, 31), range(31, 36), (*range(36, 42), 36),
         (*range(42, 48), 42), (*range(48, 60), 48), (*range(60, 68), 60)]


def draw_face(points: np.ndarray, size: int, frame=None) -> np.ndarray:
    """Landmarks (68, 2) as lines, (size, size, 3): normalised ones, or those of a frame (H, W, 3), on it"""
    edge = size * FINE
    image = Image.new("RGB", (edge, edge), DARK) if frame is None else Image.fromarray(frame).resize((edge, edge))
    xy = edge * (points * 0.42 + (0.5, 0.32) if frame is None else points / len(frame))
    for line in LINES:
        colour = RED if line[0] >= MOUTH.start else LIGHT
        ImageDraw.Draw(image).line([tuple(xy[p]) for p in line], colour, max(1, round(edge / 110)), "curve")
    return np.asarray(image.reduce(FINE))


def show(args):
    """A picture of a test clip: frames with landmarks, true and predicted keypoints, mel, the mouth's opening"""
    out, device = check_output(args.out, args.overwrite, (".png",)), pick_device(args.device)
    model, mouth = load_keypoints(args.weights, device)
    source, parts = open_source(args, {args.weights: load_checkpoint(args.weights, "keypoints")})
    if args.clip >= len(parts["test"]):
        raise InputError(f"--clip {args.clip}: the test part has clips 0 to {len(parts['test']) - 1}")
    c = parts["test"][args.clip]
    (wav, true), (name, frames, points) = source.clip(c), source.view(c)
    made = mouth.decode(predict(model, wav, device))[: len(true)]
    T, width, openings = len(made), 1008, [mouth.opening(faces[: len(made)]) for faces in (true, made)]
    columns = [int((i + 0.5) / 9 * T) for i in range(9)]  # each above its moment of the panel below
    rows = [[draw_face(points[k], 112, frames[k]) for k in columns], [draw_face(true[k], 112) for k in columns],
            [draw_face(made[k], 112) for k in columns]]
    title = f"opening of the mouth, true (green) and from the sound (orange), r {correlation(*openings):.2f}"
    grid = image_grid(rows, (f"{name}: frames and landmarks", "keypoints", f"from the sound; below: {title}"), 112)
    panel = Image.new("RGB", (width, 200), DARK)
    panel.paste(Image.fromarray((31.8 * (log_mel(wav)[::-1] + 4)).astype(np.uint8)).resize((width, 88)))  # -4 to 4
    pen = ImageDraw.Draw(panel)
    for opening, colour in zip(openings, (GREEN, ORANGE)):
        y = 180 - 80 * opening / (np.max(openings) + 1e-6)
        pen.line(list(zip((np.arange(T) + 0.5) / T * width, y)), colour, 2, "curve")
    for start, _, word in source.alignment(c) if args.words or not args.data else []:
        x = start * FPS / T * width
        pen.line((x, 88, x, 194), (70, 76, 92))
        pen.text((x + 3, 183), word, LIGHT, font_size=10)
    Image.fromarray(np.vstack([grid, panel])).save(out)
    print(f"{out}: {name}: {title}")


def sample(args):
    """Speech -> a video of keypoints, drawn or moving a photo, and beside it a .npy: float32 (T, 68, 2), normalised"""
    out = check_output(args.out, args.overwrite, VIDEO_SUFFIXES)
    numbers = check_output(out.with_suffix(".npy"), args.overwrite)
    device, wav = pick_device(args.device), load_audio(args.speech)
    model, mouth = load_keypoints(args.weights, device)
    codes = predict(model, wav, device)
    faces = mouth.decode(codes)  # (T, 68, 2)
    frames = (draw_face(face, 256) for face in faces)
    if args.photo:  # sample.py moves its pixels as by its network's lips; no network paints
        options = photos.parse([args.photo, args.speech, "--still"])
        photo, box = photos.limit_size(*photos.find_photo_face(load_photo(args.photo), options, "face")[:2])
        moved = codes - mouth.rest  # (T, D + E)
        lips = moved @ lip_opening(mouth.face[1:].reshape(-1, K, 2)), moved
        motion = SimpleNamespace(moves=torch.from_numpy(mouth.moves()))
        animator = SimpleNamespace(predict_lips=lambda mel: lips, motion=motion)
        frames = photos.talking_photo(animator, photo, box, None, detect_speech(wav, len(codes)), options)
    write_video(out, iter(frames), len(faces), (args.speech, len(wav)), args.overwrite)
    with wrap_errors(numbers, "cannot be written"):
        np.save(numbers, faces)
    print(f"{out}, {numbers}: {len(faces)} frames, {len(faces) / FPS:.2f} s")


# -------------------------------------------------------------------------------------------------------------- options


def parse(argv=None):
    parser = Parser(description="audio -> facial keypoints")
    e, t, v, s, w, c = parser.add_commands(
        extract="landmarks of a pack, beside it", train="train a network", evaluate="the table, on held-out clips",
        sample="speech -> a video of keypoints, and a .npy", visemes="a picture: the lip motions of each word",
        show="a test clip and its keypoints")
    e.add_argument("pack", metavar="PACK", help="of prepare.py")
    e.add_argument("--landmarks", default="fan", help="mediapipe:FILE, dlib:FILE or fan")
    e.add_argument("--list", metavar="FILE", help="of clips or people, a name a line; default: all")
    e.add_argument("--workers", type=int, default=1, help="processes, each with a detector of its own")
    add_run_options(t, "out/toy_kp.pt", steps=600, batch=16, lr=1e-3, batch_of="windows")
    add_split_options(t)
    t.add_argument("--model", default="transformer", choices=tuple(RATE), help="Humans', WAV2KP's or ours")
    t.add_argument("--target", default=TARGETS[0], choices=TARGETS, help="what the network outputs for the lips")
    t.add_argument("--face", action="store_true", help="predict all 68 points: 8 codes for what the mouth's leave")
    t.add_argument("--phones", action="store_true", help="a second head learns each frame's word (toy world: phone)")
    t.add_argument("--autoregressive", action="store_true", help="transformer: one frame after the other")
    t.add_argument("--expert", metavar="SYNC.pt", help="transformer: its audio encoder is this sync expert's sound tower")
    t.add_argument("--finetune", action="store_true", help="train the sound tower of --expert at a tenth of the rate")
    t.add_argument("--codes", type=int, default=8, help="principal components of the mouth (Humans: 8)")
    t.add_argument("--width", type=int, default=128, help="channels, a multiple of 4, the number of heads")
    v.add_argument("weights", nargs="+", help="of train; a row for each one's best and averaged weights")
    s.add_argument("speech", help="any sound file, or a video with sound")
    s.add_argument("--photo", help="its pixels are moved by the keypoints, where these would be drawn")
    s.add_argument("--weights", default=str(Path(__file__).parent / "weights" / "keypoints.pt"), help="of train")
    s.add_argument("--out", default="keypoints.mp4", help="video; the numbers go beside it, as .npy")
    w.add_argument("--out", default="visemes.png")
    c.add_argument("weights", help="of train")
    c.add_argument("--clip", type=int, default=0, help="number among the test clips")
    c.add_argument("--out", default="show.png")
    for p in (t, v, w, c):
        p.add_argument("--data", nargs="+", metavar="PACK", help="with landmarks (see extract); default: the toy world")
        p.add_argument("--words", metavar="DIR", help=".align files of --data, times of words; the toy world has its own")
    for p in (v, s, c):
        p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    for p in (e, s, w, c):
        p.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv, codes=(1, 40), width=(4, 4096), clip=(0, 10**9), workers=(1, 256))
    if args.command in ("train", "visemes") and args.data and not args.words and getattr(args, "phones", True):
        raise InputError("the words of --data need --words, the folder of its .align files")
    if args.command == "train":
        if args.model != "transformer" and (args.expert or args.autoregressive):
            raise InputError("--expert and --autoregressive are the transformer's")
        if args.target != TARGETS[0] and (args.autoregressive or args.face):
            raise InputError(f"--target {args.target}: --autoregressive and --face take components")
        if args.finetune and not args.expert:
            raise InputError("--finetune needs an --expert")
        if args.width % 4:
            raise InputError(f"--width {args.width}: must be a multiple of 4, the number of heads")
    return args


def main(argv=None):
    args = parse(argv)
    dict(extract=extract, train=train, evaluate=evaluate, sample=sample, visemes=visemes, show=show)[args.command](args)


if __name__ == "__main__":
    run(main)
