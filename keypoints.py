"""Audio -> facial keypoints: plain regression from sound to landmarks, the baseline before any GAN.

Networks: "Humans" (--model transformer: mel windows, optionally autoregressive), "WAV2KP" (lstm: a sliding window of 40
MFCC steps, keypoints at the audio rate) and ours (context: the speech encoder of FC-TFG for real faces).

    python keypoints.py train                    # out/toy_kp.pt, on the toy world    (1.5 min, two cores)
    python keypoints.py evaluate out/toy_kp.pt   # the table, on held-out people and speech    (15 s)
    python keypoints.py sample speech.wav        # keypoints.mp4 and keypoints.npy, by weights/keypoints.pt    (3 s)

The networks predict codes: D principal components of the mouth's 20 centred points (Suwajanakorn et al., SIGGRAPH
2017). --face adds E components of all 68 points. The unit of length is the distance between the outer corners of
the eyes. MSE is in (per cent of this distance)^2 per coordinate.
Axes: B clips, T frames, J steps of 10 ms, D (+ E) codes, W width, P phases of a word.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
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
    optimiser_step, pick_device, progress_bar, restore_run, resume_options, save_checkpoint, save_run, terms_to_floats,
    wrap_errors, write_log)
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

MOUTH = slice(48, 68)  # of iBUG's 68 points
TOY_SECONDS = 3.0
TOY_CLIPS = dict(train=range(toyfaces.TRAIN_SEED, toyfaces.TRAIN_SEED + 200),
                 valid=range(toyfaces.TUNE_SEED, toyfaces.TUNE_SEED + 30),
                 test=range(toyfaces.TEST_SEED, toyfaces.TEST_SEED + 40))  # a clip's number is the seed of its person


# ------------------------------------------------------------------------------------------------ the shape of a mouth

def normalise(points: np.ndarray) -> np.ndarray:
    """Landmarks of a clip (T, 68, 2) in pixels -> (T, 68, 2) with the outer corners of the eyes level and their middle at
    the origin. Unit: the median distance of these corners; single ones vary with jitter and rotation of the head."""
    z = to_complex(points)  # (T, 68)
    left, right = z[:, EYE_CORNERS[0], None], z[:, EYE_CORNERS[1], None]
    distance = abs(right - left)  # (T, 1)
    return to_real((z - (left + right) / 2) * distance / (right - left) / np.median(distance))


def principal_components(rows: np.ndarray, n: int) -> np.ndarray:
    """(m, k) -> (n, k), orthonormal, in order of decreasing variance"""
    return np.linalg.eigh(np.cov(rows.T))[1][:, ::-1][:, :n].T


@dataclass
class Mouth:
    """The linear map between normalised landmarks and codes, fitted on training clips"""

    mean: np.ndarray  # (40,), the mean mouth
    basis: np.ndarray  # (D, 40), principal components, orthonormal
    scale: np.ndarray  # (D + E,), standard deviation of the codes
    rest: np.ndarray  # (D + E,), mean codes of a shut mouth: the tenth of frames with the smallest opening
    face: np.ndarray  # (1 + D + E, 136), maps (1, codes) to all 68 points, by least squares: the jaw follows the lips

    @classmethod
    def fit(cls, source, clips, codes: int, face_codes: int = 0):
        """Fits up to 400 clips. codes: D. face_codes: E, components of the residual that D codes leave of 68 points"""
        clips = tqdm(clips[:: -(-len(clips) // 400)], "mouths", disable=None)
        faces = np.concatenate([source.clip(c)[1] for c in clips])  # (n, 68, 2)
        shapes = cls.shapes(faces).astype(np.float64)  # (n, 40)
        flat = faces.reshape(len(faces), -1).astype(np.float64)  # (n, 136)
        mean, basis = shapes.mean(0), principal_components(shapes, codes)
        z = (shapes - mean) @ basis.T  # (n, D)
        inputs = np.c_[np.ones(len(z)), z]
        face = np.linalg.lstsq(inputs, flat, rcond=None)[0]
        residual = flat - inputs @ face
        face = np.r_[face, principal_components(residual, face_codes)]
        z = np.c_[z, residual @ face[1 + codes :].T]
        opening = cls.opening(faces)
        rest = z[opening <= np.quantile(opening, 0.1)].mean(0)
        return cls(*(np.float32(v) for v in (mean, basis, z.std(0) + 1e-6, rest, face)))

    @staticmethod
    def shapes(faces):  # normalised landmarks (T, 68, 2) -> mouths (T, 40), each centred on the mean of its points
        mouths = faces[:, MOUTH]
        return (mouths - mouths.mean(1, keepdims=True)).reshape(len(faces), -1)

    @staticmethod
    def opening(faces):  # normalised landmarks (T, 68, 2) -> distance between the middles of the inner lips (T,)
        return np.hypot(*(faces[:, 66] - faces[:, 62]).T)

    def encode(self, faces):  # normalised landmarks (T, 68, 2) -> codes (T, D + E)
        D = len(self.basis)
        z = (self.shapes(faces) - self.mean) @ self.basis.T
        residual = faces.reshape(len(faces), -1) - self.face[0] - z @ self.face[1 : 1 + D]
        return np.c_[z, residual @ self.face[1 + D :].T].astype(np.float32)

    def decode(self, codes):  # (T, D + E) -> normalised landmarks (T, 68, 2)
        return (self.face[0] + codes @ self.face[1:]).reshape(-1, K, 2).astype(np.float32)

    def moves(self) -> np.ndarray:
        """Displacements for warp.Warp (1 + D + E, 68, 2): per unit of opening, and of each code at constant opening"""
        face, variance = self.face[1:].reshape(-1, K, 2), self.scale**2
        openings = lip_opening(face)  # (D + E,), per unit of each code
        per_opening = np.tensordot(variance * openings, face, 1) / (variance * openings**2).sum()
        return np.stack([per_opening, *(face - openings[:, None, None] * per_opening)]).astype(np.float64)

    def state(self) -> dict:
        return {name: torch.from_numpy(value) for name, value in vars(self).items()}

    @classmethod
    def load(cls, state: dict):
        return cls(**{name: state[name].float().numpy() for name in cls.__dataclass_fields__})


# --------------------------------------------------------------------------------------------------- sources of clips
# clip(c): sound (n,), normalised landmarks (T, 68, 2). view(c): name, frames (T, H, W, 3), landmarks in pixels.
# alignment(c): [(start, end, word or phone), ..], in seconds.

def toy_landmarks(person, truth: np.ndarray, size: int) -> np.ndarray:
    """True factors of a toy clip (T, 10) -> its landmarks, float32 (T, 68, 2) in pixels"""
    factors = (dict(zip(toyfaces.FACTORS, row)) for row in truth.tolist())
    return np.stack([toyfaces.compute_landmarks(person, state, size) for state in factors])


class ToySource:
    """Clips of toy people"""

    @staticmethod
    @lru_cache(None)
    def clip(c):  # 50 ms, without drawing frames
        person = toyfaces.make_person(c)
        wav, truth = toyfaces.make_clip_truth(c, TOY_SECONDS, person)
        return wav, normalise(toy_landmarks(person, truth, 128))

    def view(self, c):
        frames, _, truth = toyfaces.make_toy_clip(c, TOY_SECONDS, 128)
        return f"toy{c}", frames, toy_landmarks(toyfaces.make_person(c), truth, 128)

    def alignment(self, c) -> list[tuple]:
        """Consonants, vowels, and "sil" for pauses"""
        times, previous_end = [], 0.0
        rng = np.random.default_rng([c, 2])  # the generator that make_clip_truth uses for the sound
        for start, onset, length, consonant, vowel, _ in toyfaces.sample_syllables(rng, TOY_SECONDS):
            end = start + onset + length
            times += [(previous_end, start, "sil"), (start, start + onset, consonant), (start + onset, end, vowel)]
            previous_end = end
        times.append((previous_end, TOY_SECONDS, "sil"))
        return [(start, end, name) for start, end, name in times if end > start + 1e-6]


class PackSource:
    """Clips of packs with landmarks. align_folder: folder with an .align file of GRID for each video"""

    def __init__(self, folders, align_folder=None):
        self.pack, self.align_folder = open_packs(folders), align_folder
        self.landmarks = Landmarks(self.pack)

    def clip(self, c):
        """Ours: all people get the same shut face and range of opening. A regression would infer them from the voice."""
        shut, deviation = self.people[self.pack.identity[c]]
        mean_shut, mean_deviation = (np.mean(values, 0) for values in zip(*self.people.values()))
        gain = np.clip(mean_deviation / deviation, 0.5, 2)
        return self.pack.sound(c), mean_shut + gain * (normalise(self.landmarks.clip(c)) - shut)

    @cached_property
    def people(self) -> dict:
        """{person: (mean face of the tenth of frames with the smallest opening (68, 2), deviation of the opening)}"""
        people, clips = {}, self.landmarks.usable_clips
        for person in dict.fromkeys(self.pack.identity[clips]):
            own_clips = clips[self.pack.identity[clips] == person]
            faces = np.concatenate([normalise(self.landmarks.clip(c)) for c in own_clips])
            opening = Mouth.opening(faces)
            people[person] = faces[opening <= np.quantile(opening, 0.1)].mean(0), opening.std()
        return people

    def view(self, c):
        frames = self.pack.frames(c, range(self.pack.n_frames[c]))
        return Path(self.pack.source(c)).name, frames, self.landmarks.clip(c)

    def alignment(self, c) -> list[tuple]:
        """The words of VIDEO.align: lines "start end word" in 1/25000 s"""
        video, _, frame = self.pack.source(c).rpartition("#")
        if not frame.isdecimal():
            raise InputError(f"{self.pack.folder}: clip '{frame}' is not cut from a video, --words has no times for it")
        path, begin = check_file(Path(self.align_folder) / f"{Path(video).stem}.align"), int(frame) / FPS
        with wrap_errors(path, "expected lines of start, end and word"):
            rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
            times = [(int(start) / 25000 - begin, int(end) / 25000 - begin, word) for start, end, word in rows]
        if not times:
            raise InputError(f"{path}: no words in it")
        return [(start, end, word) for start, end, word in times if end > 0 and start < self.pack.n_frames[c] / FPS]


def open_source(args, checkpoints=None):
    """-> source of --data or of the toy world, dict(train, valid, test) of clip numbers. checkpoints: {path: content}; if
    given, train and valid are the clips that all of them used for this purpose, test those that none of them used.
    InputError: no clip is left."""
    if not args.data:
        split((), args)  # raises InputError for lists of clips
        return ToySource(), TOY_CLIPS
    source = PackSource(args.data, args.words)
    parts = dict.fromkeys(PART_PURPOSES, np.arange(len(source.pack))) if checkpoints else split(source.pack, args)
    for path, saved in (checkpoints or {}).items():
        for part, clips in find_used_clips(saved, source.pack, path).items():
            parts[part], parts["test"] = np.intersect1d(parts[part], clips), np.setdiff1d(parts["test"], clips)
    parts = {part: np.intersect1d(clips, source.landmarks.usable_clips) for part, clips in parts.items()}
    for part in ("test",) if checkpoints else ("train", "valid"):
        if not len(parts[part]):
            raise InputError(f"{source.pack.folder}: no clip with landmarks is left to {PART_PURPOSES[part]}")
    return source, parts


# ------------------------------------------------------------------------------------------------ input of the networks

RATE = dict(lstm=4, transformer=1, context=1)  # codes per frame; the lstm's are at the audio rate, every 10 ms (WAV2KP)
MFCC_WINDOW = 40  # steps (WAV2KP)
SILENCE = np.r_[math.log(np.finfo(float).eps), np.zeros(12)]  # MFCC of digital silence
UNKNOWN = -100  # label of a frame without a known word, which cross_entropy ignores


def audio_features(kind: str, wav: np.ndarray, voice_norm: bool = False) -> np.ndarray:
    """Sound (n,) -> for kind "lstm" MFCC (S, 13) at 100 Hz, else log mel (80, S) at 80 Hz"""
    return mfcc(wav).T.astype(np.float32) if kind == "lstm" else log_mel(wav, voice_norm)


def audio_windows(kind: str, features, first: int, stop: int) -> np.ndarray:
    """Input for frames first .. stop-1: mel (T, 1, 80, 16) or MFCC (4 T, 40, 13), centred on steps of 10 ms. The LSTM
    thus looks 0.2 s ahead, because lips move before the sound (as in Suwajanakorn et al.)."""
    if kind != "lstm":
        return mel_windows(features, np.arange(first, stop))
    centres = np.arange(first * RATE[kind], stop * RATE[kind])
    steps = centres[:, None] + np.arange(-MFCC_WINDOW // 2, MFCC_WINDOW // 2)  # (J, 40)
    inside = (steps >= 0) & (steps < len(features))
    return np.where(inside[..., None], features[np.clip(steps, 0, len(features) - 1)], SILENCE).astype(np.float32)


def interpolate(values: np.ndarray, positions) -> np.ndarray:
    """Rows of values (n, D) at fractional positions (m,) -> (m, D), linear, constant outside"""
    return np.stack([np.interp(positions, np.arange(len(values)), column) for column in values.T], 1)


class KeypointDataset(Dataset):
    """Items of T frames: sound (T, 1, 80, 16) or (4 T, 40, 13); codes (T or 4 T, D), NaN after the end of a clip; with
    word_classes {word: class} also labels (T or 4 T,). Item n depends on (seed, n) alone. Augmentation is ours: loudness,
    SpecAugment, some items with a shut mouth and no speech, and with voice_norm some with echo and noise."""

    SILENT, NOISY = 0.08, 0.3  # shares of these items

    def __init__(self, source, clips, mouth: Mouth, kind: str, T: int, seed: int, word_classes: dict | None = None,
                 voice_norm: bool = False):
        self.source, self.clips, self.mouth, self.kind, self.T, self.seed = source, clips, mouth, kind, T, seed
        self.word_classes, self.voice_norm = word_classes or {}, voice_norm
        self.load_clip = lru_cache(4000)(self.load_clip)

    def load_clip(self, c, noisy):
        """A whole clip -> features; codes (T or 4 T, D), interpolated between frames; labels (T or 4 T,)"""
        (wav, faces), rate = self.source.clip(c), RATE[self.kind]
        positions = (np.arange(rate * len(faces)) + 0.5) / rate - 0.5  # in frames
        labels = np.full(len(positions), UNKNOWN)
        for start, end, name in self.source.alignment(c) if self.word_classes else ():
            inside = (positions + 0.5 >= start * FPS) & (positions + 0.5 < end * FPS)
            labels[inside] = self.word_classes.get(name, UNKNOWN)
        wav = add_echo_and_noise(wav, np.random.default_rng([self.seed, c])) if noisy else wav
        codes = interpolate(self.mouth.encode(faces), positions).astype(np.float32)
        return audio_features(self.kind, wav, self.voice_norm), codes, labels

    def __getitem__(self, n: int) -> dict:
        rng, rate = np.random.default_rng([self.seed, n]), RATE[self.kind]
        if rng.random() < self.SILENT:
            features = audio_features(self.kind, make_non_speech(self.T * SAMPLES_PER_FRAME, rng), self.voice_norm)
            codes = np.tile(self.mouth.rest, (self.T * rate, 1))
            labels = np.full(len(codes), self.word_classes.get("sil", UNKNOWN))
            first = 0
        else:
            noisy = self.voice_norm and rng.random() < self.NOISY
            features, codes, labels = self.load_clip(int(rng.choice(self.clips)), noisy)
            first = int(rng.integers(max(1, len(codes) // rate - self.T + 1)))
            decibel = np.float32(rng.uniform(-8, 8))
            if self.kind == "lstm":
                features = features + np.float32(math.log(10) / 10 * decibel) * (np.arange(13) == 0)  # the log energy
            else:
                if not self.voice_norm:
                    features = np.clip(features + np.float32(0.08) * decibel * (features > -4), -4, 4)  # .08 a dB
                features = spec_augment(features, rng, steps=8)
        sound = audio_windows(self.kind, features, first, first + self.T)
        codes, labels = (values[first * rate : (first + self.T) * rate] for values in (codes, labels))
        missing = self.T * rate - len(codes)
        item = dict(sound=sound, codes=np.pad(codes, ((0, missing), (0, 0)), constant_values=np.nan))
        if self.word_classes:
            item["labels"] = np.pad(labels, (0, missing), constant_values=UNKNOWN)
        return item


# -------------------------------------------------------------------------------------------------------- the networks

CHANGE_SCALE = 0.4  # deviation of a code's change per frame, divided by that of the code: .2 to .5 in GRID
MAP_SIZE = 8  # rows and columns of a heat map (ours)
CELLS = torch.arange(MAP_SIZE) - (MAP_SIZE - 1) / 2  # centres of its cells
MAP_REACH = 4  # distance from a map's centre to its outermost cells, in standard deviations of the point (ours)


class Network(nn.Module):
    """Base class: encode(sound) -> (B, T, W), decode -> codes (B, T, D), with J = 4 T in place of T for an LSTM.

    target, the last layer's output: components, the codes; displacements, their changes per frame from a shut mouth on;
    heatmaps, 20 maps whose centres of mass are the mouth's points. words: classes of a second head, used in training."""

    reach = 0  # frames on each side that codes depend on, beyond the window of their frame

    def __init__(self, codes: int, width: int = 128, target: str = "components", words: int = 0, **options):
        super().__init__()
        self.config, self.target = dict(codes=codes, width=width, target=target, words=words, **options), target
        self.register_buffer("scale", torch.ones(codes))  # deviation of the codes: outputs are of order 1
        self.out = nn.Linear(width, 20 * MAP_SIZE**2 if target == "heatmaps" else codes)
        if target != "components":
            self.register_buffer("rest", torch.zeros(codes))
            self.register_buffer("basis", torch.zeros(codes, 40))
            self.register_buffer("spacing", torch.ones(20, 2))  # of a map's cells, in eye distances
        if words:
            self.words = nn.Linear(width, words)

    def decode(self, h):
        if self.target == "displacements":
            return self.rest + CHANGE_SCALE * (self.out(h) * self.scale).cumsum(1)
        if self.target == "heatmaps":
            maps = self.log_maps(h).exp()
            centres = torch.stack((maps.sum(-2) @ CELLS.to(h), maps.sum(-1) @ CELLS.to(h)), -1)  # (B, T, 20, 2), cells
            return (centres * self.spacing).flatten(2) @ self.basis.T
        return self.out(h) * self.scale

    def log_maps(self, h):  # -> logarithms of maps that sum to 1, (B, T, 20, rows, columns)
        return self.out(h).unflatten(-1, (20, -1)).log_softmax(-1).unflatten(-1, (MAP_SIZE, MAP_SIZE))

    def forward(self, sound):
        return self.decode(self.encode(sound))

    def losses(self, batch: dict) -> dict:
        """keypoint_loss, and the cross-entropy of heat maps and words where the network has them"""
        h = self.encode(batch["sound"])
        codes = self.decode(h)
        true = batch["codes"].where(~batch["codes"].isnan(), codes.detach())  # no error after the end of a clip
        if self.target == "displacements":  # a training window starts from the true codes, not from a shut mouth
            codes = codes + (true - codes)[:, :1]
        terms = keypoint_loss(codes, true, RATE[self.kind])
        if self.target == "heatmaps":  # the true map is a Gaussian with a deviation of one cell
            points = (true @ self.basis).unflatten(-1, (20, 2)) / self.spacing  # cells
            x, y = (-0.5 * (points[..., None] - CELLS.to(h)) ** 2).softmax(-1).unbind(-2)  # (B, T, 20, 8) each
            terms["maps"] = -(y[..., None] * x[..., None, :] * self.log_maps(h)).sum((-1, -2)).mean()
        if self.config["words"]:
            terms["words"] = F.cross_entropy(self.words(h).flatten(0, 1), batch["labels"].flatten(), ignore_index=UNKNOWN)
        return terms


def keypoint_loss(codes, true, rate: int = 1) -> dict:
    """Codes (B, T, D) twice -> mean squares in (per cent of the eye distance)^2 per coordinate. position: of the error.
    velocity: of its change per frame. The basis is orthonormal, so norms of codes are norms of coordinates."""
    velocity, true_velocity, unit = rate * codes.diff(dim=1), rate * true.diff(dim=1), 1e4 / 40
    return dict(position=unit * (codes - true).square().sum(-1).mean(),
                velocity=unit * (velocity - true_velocity).square().sum(-1).mean())


class Wav2KP(Network):
    """WAV2KP: an LSTM reads each window of 40 MFCC steps; a linear layer maps its last state to codes."""

    kind = "lstm"

    def __init__(self, codes: int, width: int = 128, layers: int = 1, **options):
        super().__init__(codes, width, layers=layers, **options)
        self.register_buffer("mean", torch.zeros(13))  # of the MFCC of training clips
        self.register_buffer("deviation", torch.ones(13))
        self.lstm = nn.LSTM(13, width, layers, batch_first=True)

    def encode(self, sound):  # (B, J, 40, 13)
        assert sound.shape[2:] == (MFCC_WINDOW, 13), f"sound is {tuple(sound.shape)}, expected (B, J, 40, 13)"
        x = ((sound - self.mean) / self.deviation).clamp(-5, 5)  # digital silence is 15 deviations from the mean
        return self.lstm(x.flatten(0, 1))[0][:, -1].unflatten(0, sound.shape[:2])  # (B, J, W)


class Block(nn.Module):
    """A Transformer layer that attends to `reach` frames on each side, with a learned bias per distance (T5)"""

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
    """Humans: an audio encoder, by default of mel windows, and a Transformer whose blocks attend to `look` frames on each
    side. tower: config of a sync expert; its sound tower and a linear layer are then the audio encoder. autoregressive:
    a GRU combines the Transformer's output with the codes predicted for the last frame, without teacher forcing."""

    kind = "transformer"

    def __init__(self, codes: int, width: int = 128, layers: int = 3, heads: int = 4, look: int = 8,
                 dropout: float = 0.1, autoregressive: bool = False, tower: dict | None = None, **options):
        super().__init__(codes, width, layers=layers, heads=heads, look=look, dropout=dropout,
                         autoregressive=autoregressive, tower=tower, **options)
        self.reach = layers * look
        if tower:
            expert = SyncNet(**tower)
            expert.face_tower = expert.log_scale = expert.bias = expert.landmarks = None  # not needed by SyncNet.sound
            self.front = nn.ModuleDict(dict(tower=expert, out=nn.Linear(tower["dim"], width)))
        else:
            self.front = nn.ModuleDict(dict(body=WindowEncoder(width)))
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
    """Ours: the speech encoder of FC-TFG for real faces, which learns more than Humans from many people's voices"""

    kind = "context"
    reach = 2 * REACH

    def __init__(self, codes: int, width: int = 128, **options):
        super().__init__(codes, width, **options)
        self.front, self.context = WindowEncoder(width), SpeechContext(width)

    def encode(self, sound):  # (B, T, 1, 80, 16)
        return self.context(self.front(sound.flatten(0, 1)).unflatten(0, sound.shape[:2]))  # (B, T, W)


@torch.no_grad()
def predict(model, wav: np.ndarray, device, chunk: int = 500) -> np.ndarray:
    """Sound (n,) -> codes (T, D), T = n_frames(n). Chunks overlap by the network's reach: the result equals one pass."""
    T, rate, hidden = n_frames(len(wav)), RATE[model.kind], []
    features = audio_features(model.kind, wav, model.config.get("voice_norm"))
    for first in range(0, T, chunk):
        low, high = max(0, first - model.reach), min(T, first + chunk + model.reach)
        sound = torch.from_numpy(audio_windows(model.kind, features, low, high))[None].to(device)
        hidden.append(model.encode(sound)[:, (first - low) * rate : (first - low + chunk) * rate])
    codes = model.decode(torch.cat(hidden, 1))[0].float()
    return codes.unflatten(0, (T, rate)).mean(1).cpu().numpy()


def load_keypoints(path, device, which: str | None = None):
    """-> network, Mouth. which: "last", "best" or "average" weights; default: the average, or the best without one"""
    saved = load_checkpoint(path, "keypoints")
    which = which or ("average" if "average" in saved.get("networks", {}) else "best")
    with wrap_errors(path, "its networks do not fit this version"):
        network = dict(lstm=Wav2KP, transformer=Humans, context=Context)[saved["config"]["kind"]]
        model = load_strictly(lambda: network(**saved["config"]["net"]), saved["networks"][which], path)
        return model.to(device).eval(), Mouth.load(saved["mouth"])


# --------------------------------------------------------------------------------------------------------------- train

ITEM_FRAMES = dict(transformer=50, context=50, lstm=5)  # ours
LOSS_WEIGHTS = dict(position=1, velocity=1, maps=1, words=0.3)  # ours
VALIDATE_EVERY, SAVE_EVERY = 15, 60  # steps


def make_model(args, source, clips, words: int):
    """-> network, Mouth, with statistics of training clips and the sound tower of --expert"""
    mouth = Mouth.fit(source, clips, args.codes, 8 if args.face else 0)  # ours: 8 codes as for the mouth
    options = dict(codes=len(mouth.scale), target=args.target, words=words)
    if args.model == "lstm":
        model, some_clips = Wav2KP(**options), clips[:: max(1, len(clips) // 100)]
        features = np.concatenate([audio_features("lstm", source.clip(c)[0]) for c in some_clips])  # (S, 13)
        model.mean.copy_(torch.from_numpy(features.mean(0)))
        model.deviation.copy_(torch.from_numpy(features.std(0) + 1e-3))
    elif args.model == "context":
        model = Context(**options, voice_norm=bool(args.data))
    else:
        expert = load_sync(args.expert, "cpu") if args.expert else None
        with wrap_errors(args.expert, "expected an expert of syncnet.py"):
            tower = expert.config if expert else None
        voice_norm = bool(args.data) and not expert  # the sync expert was trained without it
        model = Humans(**options, autoregressive=args.autoregressive, tower=tower, voice_norm=voice_norm)
        if expert:
            model.front.tower.load_state_dict(expert.state_dict(), strict=False)
    model.scale.copy_(torch.from_numpy(mouth.scale))
    if args.target != "components":
        deviation = np.hypot.reduce(mouth.scale[:, None] * mouth.basis)  # (40,), of the coordinates
        spacing = 2 * MAP_REACH / (MAP_SIZE - 1) * deviation.reshape(20, 2)
        for buffer, values in ((model.rest, mouth.rest), (model.basis, mouth.basis), (model.spacing, spacing)):
            buffer.copy_(torch.from_numpy(values))
    return model, mouth


def make_optimiser(model, args):
    """AdamW. The sound tower of --expert is frozen, or fine-tuned at a tenth of the learning rate (ours)."""
    tower = [p.requires_grad_(args.finetune) for name, p in model.named_parameters() if name.startswith("front.tower.")]
    others = [p for name, p in model.named_parameters() if not name.startswith("front.tower.")]
    groups = [dict(params=others), dict(params=tower, lr=0.1 * args.lr)]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.99), weight_decay=0.01)


def train(args, argv=None):
    """Writes --out, the best and the averaged weights, and OUT_last.pt for --resume, which is exact on a CPU."""
    out = claim_output(args.out, args)
    last, saved, start, top = out.with_stem(f"{out.stem}_last"), None, 0, []
    if args.resume:
        saved = load_checkpoint(last, "keypoints")
        args = resume_options(parse, argv, args, saved, last)
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    source, parts = open_source(args)
    words = sorted({word for c in parts["train"] for _, _, word in source.alignment(c)}) if args.phones else []
    word_classes = {word: number for number, word in enumerate(words)}
    model, mouth = load_keypoints(last, device, "last") if saved else make_model(args, source, parts["train"], len(words))
    opt = make_optimiser(model.to(device), args)
    if saved:
        restore_run(last, saved, dict(adamw=opt))
        start, top = saved["step"], saved["top"]
    used = {part: hash_sounds(source.clip(c)[0] for c in parts[part]) for part in ("train", "valid")}
    if args.expert:  # clips that the expert used cannot test this network
        used["train"] = torch.cat([used["train"], *load_checkpoint(args.expert, "syncnet").get("clips", {}).values()])
    mean_mouth = baselines(mouth, {}, source, parts["valid"])["mean mouth"]
    print(f"{model.kind} on {device}: {len(parts['train'])} clips to train on, {len(parts['valid'])} to validate, "
          f"{count_parameters(model)}; MSE of the mean mouth {mean_mouth['mse']:.3g}")

    clips = balance_people(getattr(source, "pack", None), parts["train"], args)
    dataset = KeypointDataset(source, clips, mouth, model.kind, ITEM_FRAMES[model.kind], args.seed, word_classes,
                              model.config.get("voice_norm"))
    stream, timer = batches(dataset, args.batch, start), StepTimer(device)
    log = open_log(out.with_name(f"log_{out.stem}.jsonl"), args)
    for step in (bar := progress_bar(model.kind, start, args.steps)):
        batch = timer.next_batch(stream)  # sound (B, T, 1, 80, 16), an LSTM's (B, 4 T, 40, 13); codes (B, T or 4 T, D)
        terms = model.train().losses(batch)
        values = terms_to_floats(terms, step)
        loss = sum(LOSS_WEIGHTS[name] * value for name, value in terms.items())
        with optimiser_step(opt, cosine_warmup(step, args.steps)):
            loss.backward()

        done, end = step + 1, step + 1 == args.steps
        if done % VALIDATE_EVERY == 0 or end:
            pace = timer.pace(args.batch * ITEM_FRAMES[model.kind])
            scores = validate(model.eval(), mouth, source, parts["valid"], device)
            state = {name: p.detach().cpu().clone() for name, p in model.state_dict().items()}
            top = sorted([*top, dict(mse=scores["mse"], step=done, state=state)], key=lambda t: t["mse"])
            top = top[:10]  # Humans averages the ten best
            write_log(log, bar, dict(step=done, **scores, **values, best=top[0]["mse"], **pace), args.steps)
            timer = StepTimer(device)  # without the time of validation
        if done % SAVE_EVERY == 0 or end:
            best = {name: p.half() for name, p in top[0]["state"].items()}
            average = {name: torch.stack([t["state"][name] for t in top]).mean(0).half() for name in best}
            checkpoint = dict(kind="keypoints", config=dict(kind=model.kind, net=model.config), step=done,
                              mouth=mouth.state(), clips=used)
            save_checkpoint(out, checkpoint | dict(networks=dict(best=best, average=average)))
            save_run(last, checkpoint | dict(top=top), args, dict(last=model), dict(adamw=opt))
    print(f"{out}: python keypoints.py evaluate {args.out}")


# ------------------------------------------------------------------------------------------------------------ evaluate

def score(pairs: list, profile=None) -> dict:
    """[(predicted, true faces (T, 68, 2)), ..] -> means over clips. mse: of the mouth; relative: mse divided by the mean
    square of its coordinates; r: of the opening; residual: partial r given the profile; jaw, brows: r of their height."""
    rows = []
    for predicted, true in pairs:
        mouth, openings = Mouth.shapes(true), (Mouth.opening(predicted), Mouth.opening(true))
        mse = np.square(Mouth.shapes(predicted) - mouth).mean()
        row = dict(mse=1e4 * mse, relative=mse / np.square(mouth).mean(), r=correlation(*openings),
                   jaw=correlation(predicted[:, 8, 1], true[:, 8, 1]),
                   brows=correlation(predicted[:, 17:27, 1].mean(1), true[:, 17:27, 1].mean(1)))
        if profile is not None:
            row["residual"] = partial_correlation(*openings, profile)
        rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def validate(model, mouth: Mouth, source, clips, device, profile=None) -> dict:
    """score of a network, and silence: the largest opening in two seconds of silence, in % of the eye distance"""
    silence = mouth.decode(predict(model, np.zeros(2 * FPS * SAMPLES_PER_FRAME, np.float32), device))
    pairs = [(mouth.decode(predict(model, wav, device)), true) for wav, true in map(source.clip, clips)]
    return score(pairs, profile) | dict(silence=100 * float(mouth.opening(silence).max()))


def baselines(mouth: Mouth, visemes: dict, source, clips, profile=None) -> dict:
    """Rows of the table without a network: the true codes, a still mouth, the mean motion of each viseme"""
    faces = [source.clip(c)[1] for c in clips]
    codes = {f"PCA, {len(mouth.scale)} codes": [mouth.encode(face) for face in faces],
             "mean mouth": [np.zeros((len(face), len(mouth.scale))) for face in faces]}
    if visemes:
        codes["visemes, true timing"] = [viseme_codes(visemes, source.alignment(c), len(face), mouth.rest)
                                         for c, face in zip(clips, faces)]
    return {name: score(list(zip(map(mouth.decode, rows), faces)), profile) for name, rows in codes.items()}


def evaluate(args):
    """Prints scores of baselines and networks on the test part. Visemes are fitted on clips that trained all networks."""
    device, networks = pick_device(args.device), {}
    checkpoints = {path: load_checkpoint(path, "keypoints") for path in args.weights}
    for path, saved in checkpoints.items():
        for which in [name for name in ("best", "average") if name in saved.get("networks", {})] or ["best"]:
            model, mouth = load_keypoints(path, device, which)
            features = [name for name in ("autoregressive", "tower", "words") if model.config.get(name)]
            networks[f"{path} ({', '.join([model.kind, model.target, *features])}), {which}"] = model, mouth
    source, parts = open_source(args, checkpoints)  # baselines use the Mouth of the last file
    train, test = parts["train"], parts["test"]
    clips = tqdm(train if len(train) else test, "clips", disable=None)
    curves = [Mouth.opening(source.clip(c)[1]) for c in clips]
    T = sorted(map(len, curves), reverse=True)[len(curves) // 5]  # frames that a fifth of the clips have
    profile = np.array([np.mean([curve[k] for curve in curves if len(curve) > k]) for k in range(T)])  # mean opening
    visemes = fit_visemes(source, train, mouth) if len(train) and (args.words or not args.data) else {}
    rows = baselines(mouth, visemes, source, test, profile)
    for name, (model, mouth) in tqdm(networks.items(), "networks", disable=None, leave=False):
        rows[name] = validate(model, mouth, source, test, device, profile)
    formats = dict(mse=".2f", relative=".4f", r=".3f", residual=".3f", jaw=".3f", brows=".3f", silence=".1f")
    name = source.pack.folder if args.data else "toy world"
    print(f"{name}: {len(test)} test clips; mse in (% of the eye distance)^2 per coordinate; relative: mse / mean square "
          f"of the mouth; silence: largest opening in %, {100 * profile.mean():.1f} on average in clips\n")
    print(markdown_table({name: {key: format(row[key], form) if key in row else "" for key, form in formats.items()}
                          for name, row in rows.items()}))


# -------------------------------------------------------- visemes: a baseline from timed transcripts instead of sound

PHASES = 8  # moments of a viseme at which its motion is sampled (ours)


def fit_visemes(source, clips, mouth: Mouth) -> dict:
    """-> {word or phone: its motions (n, P, D), each stretched to P phases}"""
    motions, phase = {}, (np.arange(PHASES) + 0.5) / PHASES
    for c in clips:
        codes = mouth.encode(source.clip(c)[1])
        for start, end, name in source.alignment(c):
            if end > start:
                motion = interpolate(codes, (start + phase * (end - start)) * FPS - 0.5)
                motions.setdefault(name, []).append(motion)
    return {name: np.stack(motions[name]) for name in sorted(motions)}


def viseme_codes(visemes: dict, alignment: list[tuple], T: int, rest: np.ndarray) -> np.ndarray:
    """Codes (T, D): the mean motion of each viseme, stretched to its time; rest elsewhere"""
    codes, seconds = np.tile(rest, (T, 1)).astype(np.float32), (np.arange(T) + 0.5) / FPS
    for start, end, name in alignment:
        inside = (seconds >= start) & (seconds < end)
        if name in visemes and inside.any():
            phase = (seconds[inside] - start) / (end - start)
            codes[inside] = interpolate(visemes[name].mean(0), phase * PHASES - 0.5)
    return codes


def visemes(args):
    """Draws for each word or phone the lips of up to 40 samples, thin, and their mean, at four phases."""
    out = check_output(args.out, args.overwrite, (".png",))
    source, parts = open_source(args)
    mouth = Mouth.fit(source, parts["train"], codes=8)
    motions_by_name = fit_visemes(source, parts["train"], mouth)
    cell, columns = 64 * OVERSAMPLING, 4
    image = Image.new("RGB", (columns * 5 * cell, -(-len(motions_by_name) // columns) * cell), DARK)
    pen = ImageDraw.Draw(image, "RGBA")
    for n, (name, motions) in enumerate(motions_by_name.items()):
        x, y = n % columns * 5 * cell, n // columns * cell
        pen.text((x + cell / 8, y + cell / 3), f"{name}\n{len(motions)}", LIGHT, font_size=12 * OVERSAMPLING)
        for k in range(4):
            codes = motions[:, (2 * k + 1) * PHASES // 8]  # (n, D)
            lips = mouth.shapes(mouth.decode(np.r_[codes[:40], codes.mean(0)[None]])).reshape(-1, 20, 2)
            lips = lips * 1.3 * cell + (x + (k + 1.5) * cell, y + cell / 2)
            for i, points in enumerate(lips):
                style = (RED, OVERSAMPLING) if i == len(lips) - 1 else ((*LIGHT, 40), 1)
                for line in LINES[-2:]:
                    pen.line([tuple(points[p - MOUTH.start]) for p in line], *style)
    image.reduce(OVERSAMPLING).save(out)
    print(f"{out}: {len(motions_by_name)} words or phones of {len(parts['train'])} clips")


# ------------------------------------------------------------------------------------------------------------ pictures

DARK, LIGHT, RED, GREEN, ORANGE = (24, 26, 34), (214, 220, 232), (255, 112, 126), (110, 214, 140), (255, 166, 77)
OVERSAMPLING = 3  # pictures are drawn larger by this factor, then reduced
# iBUG's jaw, brows and nose, then closed lines: eyes, outer and inner lips
LINES = [range(0, 17), range(17, 22), range(22, 27), range(27, 31), range(31, 36), (*range(36, 42), 36),
         (*range(42, 48), 42), (*range(48, 60), 48), (*range(60, 68), 60)]


def draw_face(points: np.ndarray, size: int, frame=None) -> np.ndarray:
    """Landmarks (68, 2) -> lines, (size, size, 3). frame (H, W, 3): draws on it; points are then its pixels"""
    edge = size * OVERSAMPLING
    image = Image.new("RGB", (edge, edge), DARK) if frame is None else Image.fromarray(frame).resize((edge, edge))
    xy = edge * (points * 0.42 + (0.5, 0.32) if frame is None else points / len(frame))
    for line in LINES:
        colour = RED if line[0] >= MOUTH.start else LIGHT
        ImageDraw.Draw(image).line([tuple(xy[p]) for p in line], colour, max(1, round(edge / 110)), "curve")
    return np.asarray(image.reduce(OVERSAMPLING))


def show(args):
    """Draws a test clip: frames with landmarks, true and predicted keypoints, the mel, the opening of the mouth."""
    out, device = check_output(args.out, args.overwrite, (".png",)), pick_device(args.device)
    model, mouth = load_keypoints(args.weights, device)
    source, parts = open_source(args, {args.weights: load_checkpoint(args.weights, "keypoints")})
    if args.clip >= len(parts["test"]):
        raise InputError(f"--clip {args.clip}: the test part has clips 0 to {len(parts['test']) - 1}")
    c = parts["test"][args.clip]
    (wav, true), (name, frames, points) = source.clip(c), source.view(c)
    predicted = mouth.decode(predict(model, wav, device))[: len(true)]
    T, width, openings = len(predicted), 1008, [mouth.opening(faces) for faces in (true[: len(predicted)], predicted)]
    columns = [int((i + 0.5) / 9 * T) for i in range(9)]  # each above its time in the panel below
    rows = [[draw_face(points[k], 112, frames[k]) for k in columns], [draw_face(true[k], 112) for k in columns],
            [draw_face(predicted[k], 112) for k in columns]]
    title = f"opening of the mouth, true (green) and from the sound (orange), r {correlation(*openings):.2f}"
    grid = image_grid(rows, (f"{name}: frames and landmarks", "keypoints", f"from the sound; below: {title}"), 112)
    panel = Image.new("RGB", (width, 200), DARK)
    mel = (31.8 * (log_mel(wav)[::-1] + 4)).astype(np.uint8)  # -4 .. 4 -> 0 .. 254
    panel.paste(Image.fromarray(mel).resize((width, 88)))
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
    """Writes keypoints of speech as a video, drawn or moving a photo, and as .npy, float32 (T, 68, 2), normalised."""
    out = check_output(args.out, args.overwrite, VIDEO_SUFFIXES, (args.speech, args.photo))
    npy = check_output(out.with_suffix(".npy"), args.overwrite)
    device, wav = pick_device(args.device), load_audio(args.speech)
    model, mouth = load_keypoints(args.weights, device)
    codes = predict(model, wav, device)
    faces = mouth.decode(codes)  # (T, 68, 2)
    frames = (draw_face(face, 256) for face in faces)
    if args.photo:  # sample.py moves its pixels; the codes take the place of lips that its network predicts
        options = photos.parse([args.photo, args.speech, "--still"])
        photo, box = photos.limit_size(*photos.find_photo_face(load_photo(args.photo), options, "face")[:2])
        shape = codes - mouth.rest  # (T, D + E)
        opening = shape @ lip_opening(mouth.face[1:].reshape(-1, K, 2))
        animator = SimpleNamespace(predict_lips=lambda mel: (opening, shape), lip_moves=mouth.moves())
        frames = photos.talking_photo(animator, photo, box, None, detect_speech(wav, len(codes)), options)
    write_video(out, iter(frames), len(faces), (args.speech, len(wav)), args.overwrite)
    with wrap_errors(npy, "cannot be written"):
        np.save(npy, faces)
    print(f"{out}, {npy}: {len(faces)} frames, {len(faces) / FPS:.2f} s")


def parse(argv=None, saved=None):
    parser = Parser(description="audio -> facial keypoints")
    ex, tr, ev, sa, vi, sh = parser.add_commands(
        extract="landmarks of a pack, beside it", train="train a network", evaluate="the table, on held-out clips",
        sample="speech -> a video of keypoints, and a .npy", visemes="a picture: the lip motions of each word",
        show="a picture: a test clip and its keypoints")
    ex.add_argument("pack", metavar="PACK", help="pack of prepare.py")
    ex.add_argument("--landmarks", default="fan", help="mediapipe:FILE, dlib:FILE or fan")
    ex.add_argument("--list", metavar="FILE", help="list of clips or people, a name per line; default: all")
    ex.add_argument("--workers", type=int, default=1, help="processes, each with its own detector")
    add_run_options(tr, "out/toy_kp.pt", steps=600, batch=16, lr=1e-3, batch_of="windows")
    add_split_options(tr)
    tr.add_argument("--model", default="transformer", choices=tuple(RATE), help="network of Humans, of WAV2KP or ours")
    tr.add_argument("--target", default="components", choices=("components", "displacements", "heatmaps"),
                    help="the network's output for the lips")
    tr.add_argument("--face", action="store_true", help="predict all 68 points, by 8 further components")
    tr.add_argument("--phones", action="store_true", help="a second head classifies each frame's word (toy world: phone)")
    tr.add_argument("--autoregressive", action="store_true", help="transformer: predict frame after frame")
    tr.add_argument("--expert", metavar="SYNC.pt", help="transformer: use the sound tower of this sync expert")
    tr.add_argument("--finetune", action="store_true", help="train the sound tower of --expert at a tenth of the rate")
    tr.add_argument("--codes", type=int, default=8, help="principal components of the mouth (Humans: 8)")
    ev.add_argument("weights", nargs="+", help="files of train; a row each for best and averaged weights")
    sa.add_argument("speech", help="any sound file, or a video with sound")
    sa.add_argument("--photo", help="move the pixels of this photo by the keypoints, instead of drawing them")
    sa.add_argument("--weights", default=str(Path(__file__).parent / "weights" / "keypoints.pt"), help="file of train")
    sa.add_argument("--out", default="keypoints.mp4", help="video; the numbers have the same name and .npy")
    vi.add_argument("--out", default="visemes.png")
    sh.add_argument("weights", help="file of train")
    sh.add_argument("--clip", type=int, default=0, help="number among the test clips")
    sh.add_argument("--out", default="show.png")
    for p in (tr, ev, vi, sh):
        p.add_argument("--data", nargs="+", metavar="PACK", help="with landmarks (see extract); default: the toy world")
        p.add_argument("--words", metavar="DIR", help=".align files of --data, times of words; the toy world has its own")
    for p in (ev, sa, sh):
        p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    for p in (ex, sa, vi, sh):
        p.add_argument("--overwrite", action="store_true", help="replace existing files")
    tr.set_defaults(**saved or {})
    args = parser.parse_args(argv, codes=(1, 40), clip=(0, 10**9), workers=(1, 256))
    needs_words = args.command == "visemes" or args.command == "train" and args.phones
    if needs_words and args.data and not args.words:
        raise InputError("the words of --data need --words, the folder of its .align files")
    if args.command == "train":
        if args.model != "transformer" and (args.expert or args.autoregressive):
            raise InputError("--expert and --autoregressive need --model transformer")
        if args.target != "components" and (args.autoregressive or args.face):
            raise InputError(f"--target {args.target}: --autoregressive and --face need components")
        if args.finetune and not args.expert:
            raise InputError("--finetune needs an --expert")
    return args


def main(argv=None):
    args = parse(argv)
    dict(extract=extract, train=partial(train, argv=argv), evaluate=evaluate, sample=sample, visemes=visemes,
         show=show)[args.command](args)


if __name__ == "__main__":
    run(main)
