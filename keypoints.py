"""Audio -> facial keypoints: how far does plain regression from sound to landmarks go, before any GAN?

Systems: "Humans" (mouth landmarks -> PCA; speech encoder, Transformer, autoregressive output) and "WAV2KP" (MFCC in a
sliding window of 40 steps, LSTM, keypoints brought to the audio rate); the shape model and the look-ahead go back to
Suwajanakorn et al., "Synthesizing Obama" (SIGGRAPH 2017). Neither system's code or exact sizes are copied: what is not
marked with a source is ours.

    python keypoints.py train                    # out/toy_kp.pt: the toy world from nothing    (1.5 min, two cores)
    python keypoints.py evaluate out/toy_kp.pt   # the table, on people and speech never met    (15 s)
    python keypoints.py sample speech.wav        # keypoints.mp4, keypoints.npy by weights/keypoints.pt    (3 s)
    python keypoints.py extract PACK --mediapipe face_landmarker.task  # landmarks of one's own clips    (12 ms a frame)
    python keypoints.py train --data PACK --out out/kp.pt
    python keypoints.py show out/kp.pt --data PACK       # what each step made of a clip, side by side

A landmark is one of the 68 of iBUG's annotation. `normalise` takes place, size and in-plane tilt of the head away; the
mouth's 20 points, centred, become D = 8 principal components: the codes that the networks predict.

Axes: B clips, T frames, J steps of 10 ms, K points, M mouth points, D codes, P phases of a unit. Lengths are in
distances between the outer corners of the eyes; MSE is printed in (per cent of that)^2, a coordinate.
"""

import argparse
import json
import math
import os
import platform
import time
from bisect import bisect
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    cosine_warmup, load_checkpoint, load_strictly, pick_device, refusing, revision, save_checkpoint)
from control import correlation
from data import USES, Pack, batches, by_turns, clips_used, find_clips, fingerprints, split, split_options
from faces import (
    EYES, K, Landmarks, interpolate_gaps, landmark_detector, landmarks_header, open_landmarks, smooth)
from media import (
    FPS, SAMPLES_PER_FRAME, InputError, Parser, VideoWriter, check_file, check_output, load_audio, run)
from syncnet import TOY_VALID, load_sync

# iBUG's parts, as polylines to draw: points, and whether the line closes
PARTS = dict(jaw=(range(0, 17), False), brow_l=(range(17, 22), False), brow_r=(range(22, 27), False),
             ridge=(range(27, 31), False), nose=(range(31, 36), False), eye_l=(range(36, 42), True),
             eye_r=(range(42, 48), True), lips=(range(48, 60), True), inner=(range(60, 68), True))
MOUTHS = {20: tuple(range(48, 68)), 18: (*range(48, 60), 61, 62, 63, 65, 66, 67)}  # 18: Suwajanakorn's
GAP = 62, 66  # middle of the upper and the lower inner lip: the mouth's opening


def toy_points(who, truth: np.ndarray, size: int) -> np.ndarray:
    """Truth of a drawn clip (T, 10) -> float32 (T, 68, 2) in pixels: no detector, no error"""
    states = (dict(zip(toyfaces.FACTORS, row)) for row in truth.tolist())
    return np.stack([toyfaces.landmarks(who, state, size) for state in states])


# ---------------------------------------------------------------------------------------------------------------------
# landmarks beside a pack: points.bin, float32 (all frames, 68, 2) in pixels of the crop, NaN where a clip was dropped;
# clips.jsonl, first who looked and at what, then a line for each clip, written after its points


def landmarks_folder(args) -> Path:
    return Path(args.landmarks or Path(args.data) / "landmarks").absolute()


def extract(args):
    """Landmarks of every clip of a pack, beside it. A killed run goes on behind the last finished clip."""
    pack, folder = Pack(args.data), landmarks_folder(args)
    spec = f"mediapipe:{args.mediapipe}" if args.mediapipe else f"dlib:{args.dlib}" if args.dlib else "fan"
    toy = (pack.folder / "truth.npy").is_file() and spec == "fan"
    detector = "truth" if toy else spec.partition(":")[0]
    with eye_for(pack, detector, spec) as look:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = open_landmarks(folder, landmarks_header(pack, detector), args.overwrite)
            with open(folder / "clips.jsonl", "r+b") as log, open(folder / "points.bin", "ab") as out:
                log.truncate(sum(map(len, lines)))
                log.seek(0, os.SEEK_END)
                done = len(lines) - 1
                out.truncate(int(pack.frame_start[done]) * K * 2 * 4)
                for c in tqdm(range(done, len(pack)), "clips", initial=done, total=len(pack), disable=None):
                    line = dict(source=pack.source(c))
                    try:
                        found = look(c)
                        points, line["bridged"] = (found, 0) if toy else interpolate_gaps(found)
                        points = points if toy else smooth(points)
                    except InputError as error:
                        line["reason"] = str(error)
                        points = np.full((pack.n_frames[c], K, 2), np.nan, np.float32)
                    out.write(points.astype("<f4").tobytes())
                    out.flush()
                    log.write(json.dumps(line).encode() + b"\n")
                    log.flush()
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    found = Landmarks(folder, pack)
    print(f"{folder}: {len(found.kept)} of {len(pack)} clips have landmarks ({detector})")


@contextmanager
def eye_for(pack: Pack, detector: str, spec: str):
    """A function: number of a clip -> its landmarks, (68, 2) or None a frame"""
    if detector == "truth":
        truth = np.load(pack.folder / "truth.npy", allow_pickle=False)

        def look(c):
            who = toyfaces.person(int(pack.identities[pack.identity[c]].removeprefix("toy")))
            return toy_points(who, truth[pack.frame_start[c] : pack.frame_start[c + 1]], pack.size)

        yield look
        return
    with landmark_detector(spec, pack.template) as look:
        yield lambda c: [look(pack.frame(c, k)) for k in range(pack.n_frames[c])]


def compare(args):
    """Seconds a frame of each detector, one thread, on the same frames; and how far apart they put the points."""
    pack, torch_threads = Pack(args.data), torch.get_num_threads()
    torch.set_num_threads(1)
    which = np.linspace(0, len(pack) - 1, args.frames).round().astype(int)
    frames = [pack.frame(c, int(pack.n_frames[c]) // 2) for c in which]
    found = {}
    print(f"{len(frames)} crops of {pack.size} px from {args.data}, one thread, loading not counted\n")
    print("| detector | seconds a frame | found | apart from the first, % of the eye distance |\n|---|---:|---:|---:|")
    for name, detector in (("face-alignment FAN", "fan"), ("MediaPipe", "mediapipe"), ("dlib", "dlib")):
        try:
            file = "" if detector == "fan" else getattr(args, detector)
            if file is None:
                raise InputError(f"--{detector} not given")
            with landmark_detector(detector + ":" * bool(file) + file, pack.template) as look:
                look(frames[0])  # the first picture pays for the set-up
                clock = time.perf_counter()
                found[name] = [look(frame) for frame in tqdm(frames, name, disable=None, leave=False)]
                seconds = (time.perf_counter() - clock) / len(frames)
        except InputError as error:
            print(f"| {name} | not run: {error} | | |")
            continue
        hits = sum(p is not None for p in found[name])
        both = list(found.values())[:: len(found) - 1 or 1]  # the first and this one, where they are two
        print(f"| {name} | {seconds:.4f} | {hits} of {len(frames)} | {apart(*both)} |")
    torch.set_num_threads(torch_threads)
    if not found:
        raise InputError("no detector is at hand")


def apart(first: list, second: list | None = None) -> str:
    """Mean distance of two detectors' points where both found a face, in per cent of the eye distance"""
    pairs = [(a, b) for a, b in zip(first, second or []) if a is not None and b is not None]
    if not pairs:
        return ""
    return f"{np.mean([100 * np.hypot(*(a - b).T).mean() / np.hypot(*(a[EYES[1]] - a[EYES[0]])) for a, b in pairs]):.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# the shape of a mouth


def normalise(points: np.ndarray) -> np.ndarray:
    """Landmarks of a clip in pixels (T, 68, 2) -> the same with the head's place, size and tilt taken out.

    Origin: the middle between the outer corners of the eyes; their line is level, in every frame. Unit: their distance,
    the clip's median, for it changes with a detector's jitter and with a turn of the head, but not the head.
    """
    left, right = points[:, EYES[0]], points[:, EYES[1]]  # (T, 2)
    x, y = (right - left).T
    length = np.hypot(x, y)
    turn = np.stack((np.stack((x, -y), 1), np.stack((y, x), 1)), 1) / length[:, None, None]  # (T, 2, 2) @ row vectors
    return ((points - (left + right)[:, None] / 2) @ turn / np.median(length)).astype(np.float32)


@dataclass
class Mouth:
    """Codes of mouths: principal components of their centred points, fitted on training clips.

    points: which of the 68 they are (M of them). mean (2M,), basis (D, 2M) orthonormal, scale (D,) the codes' deviation,
    rest (D,) a shut mouth: the mean of the tenth of frames with the smallest opening. face (1 + D, 136): the whole face
    as a linear function of the codes, by least squares: the jaw comes along, eyes and brows stand still.
    """

    points: tuple
    mean: np.ndarray
    basis: np.ndarray
    scale: np.ndarray
    rest: np.ndarray
    face: np.ndarray

    @classmethod
    def fit(cls, faces: np.ndarray, codes: int, points: int):
        """faces: normalised landmarks (n, 68, 2)"""
        which = MOUTHS[points]
        shapes = cls.shapes_of(faces, which).astype(np.float64)
        mean = shapes.mean(0)
        _, basis = np.linalg.eigh(np.cov(shapes.T))
        basis = basis[:, ::-1][:, :codes].T  # the largest first
        z = (shapes - mean) @ basis.T
        gap = np.hypot(*(faces[:, GAP[1]] - faces[:, GAP[0]]).T)
        face = np.linalg.lstsq(np.c_[np.ones(len(z)), z], faces.reshape(len(faces), -1), rcond=None)[0]
        rest = z[gap <= np.quantile(gap, 0.1)].mean(0)
        return cls(which, *(np.float32(v) for v in (mean, basis, z.std(0) + 1e-6, rest, face)))

    @staticmethod
    def shapes_of(faces, which):
        """(T, 68, 2) -> (T, 2M), centred on the mean of its points"""
        mouth = faces[:, list(which)]
        return (mouth - mouth.mean(1, keepdims=True)).reshape(len(faces), -1)

    def shapes(self, faces):
        return self.shapes_of(faces, self.points)

    def encode(self, faces):
        """Normalised landmarks (T, 68, 2) -> codes (T, D)"""
        return ((self.shapes(faces) - self.mean) @ self.basis.T).astype(np.float32)

    def decode(self, codes):
        """(T, D) -> centred mouths (T, 2M)"""
        return self.mean + codes @ self.basis

    def to_face(self, codes):
        """(T, D) -> normalised landmarks (T, 68, 2)"""
        return (self.face[0] + codes @ self.face[1:]).reshape(-1, K, 2).astype(np.float32)

    def opening(self, shapes):
        """Mouths (T, 2M) -> distance of the inner lips (T,)"""
        up, down = (shapes.reshape(len(shapes), -1, 2)[:, self.points.index(p)] for p in GAP)
        return np.hypot(*(down - up).T)

    def state(self) -> dict:
        return dict(points=len(self.points)) | {
            name: torch.from_numpy(getattr(self, name)) for name in ("mean", "basis", "scale", "rest", "face")}

    @classmethod
    def load(cls, state: dict):
        arrays = (state[name].float().numpy() for name in ("mean", "basis", "scale", "rest", "face"))
        return cls(MOUTHS[state["points"]], *arrays)


# ---------------------------------------------------------------------------------------------------------------------
# who talks: sound(i), faces(i) normalised landmarks, frames(i) pictures, points(i) in their pixels, said(i) timed units


class ToyTalk:
    """Toy people of a split, heard but not drawn: a clip costs 50 ms, once. said(i): consonants and vowels."""

    def __init__(self, first: int, count: int, seconds: float = 3.0):
        self.seeds, self.seconds, self.kept = range(first, first + count), seconds, {}

    def __len__(self):
        return len(self.seeds)

    def clip(self, i):
        if i not in self.kept:
            who = toyfaces.person(self.seeds[i])
            wav, truth = toyfaces.clip_truth(self.seeds[i], self.seconds, who)
            self.kept[i] = wav, toy_points(who, truth, 128)
        return self.kept[i]

    def sound(self, i):
        return self.clip(i)[0]

    def points(self, i):
        return self.clip(i)[1]

    def faces(self, i):
        return normalise(self.points(i))

    def frames(self, i):
        return toyfaces.toy_clip(self.seeds[i], self.seconds, 128)[0]

    def name(self, i):
        return f"toy{self.seeds[i]}"

    def said(self, i):
        spoken = toyfaces.syllables(np.random.default_rng([self.seeds[i], 2]), self.seconds)  # the sound's own stream
        times = []
        for start, onset, length, consonant, vowel, _ in spoken:
            times += [(start, start + onset, consonant)] if onset else []
            times += [(start + onset, start + onset + length, vowel)]
        return with_pauses(times, self.seconds)


class PackTalk:
    """The clips of a pack that have landmarks. said(i): words (or phones) of DIR/stem.align, GRID's format."""

    def __init__(self, pack: Pack, landmarks: Landmarks, words: str | None = None):
        self.pack, self.landmarks, self.clips, self.words = pack, landmarks, landmarks.kept, words

    def __len__(self):
        return len(self.clips)

    def sound(self, i):
        return self.pack.sound(self.clips[i])

    def points(self, i):
        a, b = self.pack.frame_start[self.clips[i]], self.pack.frame_start[self.clips[i] + 1]
        return np.asarray(self.landmarks.points[a:b])

    def faces(self, i):
        return normalise(self.points(i))

    def frames(self, i):
        return self.pack.frames(self.clips[i], range(self.pack.n_frames[self.clips[i]]))

    def name(self, i):
        return Path(self.pack.source(self.clips[i])).name

    def said(self, i):
        source, _, begin = self.pack.source(self.clips[i]).rpartition("#")
        if not begin.isdecimal():
            raise InputError(f"{self.pack.folder}: clip '{begin}' says no place in a video, --words has no times for it")
        offset = int(begin) / FPS
        times = read_align(Path(self.words) / f"{Path(source).stem}.align")
        length = self.pack.n_frames[self.clips[i]] / FPS
        return [(a - offset, b - offset, unit) for a, b, unit in times if b > offset and a < offset + length]


def read_align(path: Path) -> list[tuple]:
    """GRID's .align, lines "start end unit" in 1/25000 s -> [(start, end, unit), ..] in seconds"""
    try:
        rows = [line.split() for line in check_file(path).read_text().splitlines() if line.strip()]
        return [(int(a) / 25000, int(b) / 25000, unit) for a, b, unit in rows]
    except ValueError as error:
        raise InputError(f"{path}: expected lines of start, end and unit ({error})") from None


def with_pauses(times: list[tuple], seconds: float) -> list[tuple]:
    """The same with "sil" in the gaps, from 0 to seconds"""
    out, now = [], 0.0
    for start, end, unit in times:
        out += [(now, start, "sil")] if start > now + 1e-6 else []
        out.append((start, end, unit))
        now = end
    return out + ([(now, seconds, "sil")] if seconds > now + 1e-6 else [])


def toy_split(people: int, beside: int = 0) -> dict:
    """part -> (talk, its clips); people that never meet. beside: of those to validate on, how many to pass over"""
    sizes = dict(train=(toyfaces.TRAIN, people), valid=(toyfaces.TUNE + beside, 30), test=(toyfaces.TEST, 40))
    talks = {part: ToyTalk(*size) for part, size in sizes.items()}
    return {part: (talk, np.arange(len(talk))) for part, talk in talks.items()}


def talk_of(args) -> PackTalk:
    """The clips of --data that have landmarks"""
    pack = Pack(args.data)
    return PackTalk(pack, Landmarks(landmarks_folder(args), pack), getattr(args, "words", None))


def of_talk(talk: PackTalk, parts: dict) -> dict:
    """part -> clips of the pack, to part -> (talk, its clips)"""
    return {part: (talk, np.flatnonzero(np.isin(talk.clips, clips))) for part, clips in parts.items()}


def expert_clips(args) -> list[torch.Tensor]:
    """Fingerprints of the clips that trained and that chose the sync expert of --encoder"""
    if not args.encoder:
        return []
    saved = load_checkpoint(args.encoder, "syncnet")
    if args.data:
        return list(clips_used(saved, Pack(args.data), args.encoder).values())
    return list(saved["clips"].values()) if isinstance(saved.get("clips"), dict) else []


def parts_of(args, expert=()) -> dict:
    """part -> (talk, its clips), of --data or the toy world, to train on.

    expert: of expert_clips; these neither validate nor test. Where that leaves nothing to validate on, since the expert
    was chosen by the same rule's clips, half of the test part does.
    """
    if not args.data:
        return toy_split(args.people, TOY_VALID if getattr(args, "encoder", None) else 0)
    talk = talk_of(args)
    parts = split(talk.pack, args)
    if expert:
        seen = find_clips(talk.pack, *expert)
        parts |= {part: np.setdiff1d(parts[part], seen) for part in ("valid", "test")}
        if not len(parts["valid"]):
            parts["valid"], parts["test"] = by_turns(talk.pack, parts["test"])
    parts = of_talk(talk, parts)
    for part in ("train", "valid"):
        if not len(parts[part][1]):
            beside = f" that {args.encoder} was not trained on or chosen by" if expert else ""
            raise InputError(f"{args.data}: no clip with landmarks{beside} is left to {USES[part]}")
    return parts


def judged_parts(args, nets: list) -> dict:
    """part -> (talk, its clips), of --data or the toy world, for checkpoints [(path, content), ..]: test has the clips
    that trained or chose none of them, train and valid those that trained and chose all."""
    if not args.data:
        for path, saved in nets:
            if saved["args"].get("data"):
                raise InputError(f"{path}: not trained on the toy world; give --data, a pack with landmarks")
        tower = any(saved["config"]["net"].get("tower") for _, saved in nets)
        return toy_split(args.people, TOY_VALID if tower else 0)
    talk = talk_of(args)
    parts, test = {}, set(range(len(talk.pack)))
    for path, saved in nets:
        for part, prints in clips_used(saved, talk.pack, path).items():
            known = set(find_clips(talk.pack, prints).tolist())
            parts[part] = parts.get(part, known) & known
            test -= known
    parts = of_talk(talk, {part: sorted(clips) for part, clips in (parts | dict(test=test)).items()})
    if not len(parts["test"][1]):
        raise InputError(f"{args.data}: all its clips trained or chose one of the networks, none is left to test on")
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# what the networks hear

STEPS = 4  # of 10 ms a frame: the rate to which WAV2KP brings keypoints
WINDOW = 40  # MFCC steps that WAV2KP's network sees at once
QUIET = np.r_[math.log(np.finfo(float).eps), np.zeros(12)]  # MFCC of digital silence


def hear(kind: str, wav: np.ndarray) -> np.ndarray:
    """What a network of this kind listens to: "lstm" MFCC (S, 13) at 100 Hz, "transformer" the mel (80, S) at 80 Hz"""
    if kind == "transformer":
        return log_mel(wav)
    out, block = [], 6000  # steps at once: a minute
    for s in range(0, 1 + max(0, -(-(len(wav) - 400) // 160)), block):
        before = min(s, 1)  # one step more in front, for the pre-emphasis, and away with it
        part = wav[(s - before) * 160 : (s + block - 1) * 160 + 400]
        out.append(mfcc(part).T[before:][:block])
    return np.concatenate(out).astype(np.float32)


def mfcc_windows(features: np.ndarray, steps) -> np.ndarray:
    """MFCC (S, 13) -> (J, 40, 13) centred on steps of 10 ms (J,): step j is the middle of [j/100, (j+1)/100) s.

    MFCC number s is centred at (s + 1.25)/100 s, so the middle of those from j - 20 on is 2.5 ms off. The network reads
    them in order and so has heard .2 s of what comes: lips move before the sound (Suwajanakorn: the same delay).
    """
    at = np.asarray(steps)[:, None] + np.arange(-WINDOW // 2, WINDOW // 2)
    inside = (at >= 0) & (at < len(features))
    return np.where(inside[..., None], features[np.clip(at, 0, len(features) - 1)], QUIET).astype(np.float32)


def windows_of(kind: str, features, first: int, stop: int) -> np.ndarray:
    """A network's input for frames first .. stop-1: (T, 1, 80, 16) or (4 T, 40, 13)"""
    if kind == "transformer":
        return mel_windows(features, np.arange(first, stop))
    return mfcc_windows(features, np.arange(first * STEPS, stop * STEPS))


def upsample(codes: np.ndarray) -> np.ndarray:
    """Codes at frames (T, D) -> at steps of 10 ms (4 T, D), linearly; a frame stands for its middle"""
    at = (np.arange(STEPS * len(codes)) + 0.5) / STEPS - 0.5
    return np.stack([np.interp(at, np.arange(len(codes)), column) for column in codes.T], 1).astype(np.float32)


class Talks(Dataset):
    """Windows of T frames: sound and codes. Item n is a function of (seed, n) alone: see data.batches.

    Augmentation (ours): loudness by +-8 dB, SpecAugment on the mel, and SILENT of the items are a quiet room, from
    digital silence to -50 dB of noise, with a mouth at rest: a corpus teaches no silence of other microphones.
    """

    SILENT = 0.05

    def __init__(self, talk, clips, mouth: Mouth, kind: str, T: int, seed: int):
        self.talk, self.clips, self.mouth, self.kind, self.T, self.seed = talk, clips, mouth, kind, T, seed
        self.kept = {}  # features and codes of up to 4000 clips

    def clip(self, c):
        if c not in self.kept:
            if len(self.kept) == 4000:
                del self.kept[next(iter(self.kept))]
            codes = self.mouth.encode(self.talk.faces(c))
            self.kept[c] = hear(self.kind, self.talk.sound(c)), codes if self.kind == "transformer" else upsample(codes)
        return self.kept[c]

    def __getitem__(self, n: int) -> dict:
        """-> sound (T, 1, 80, 16) or (4 T, 40, 13), codes (T or 4 T, D)"""
        rng = np.random.default_rng([self.seed, n])
        if rng.random() < self.SILENT:
            noise = rng.standard_normal(self.T * SAMPLES_PER_FRAME) * 10 ** (rng.uniform(-100, -50) / 20)
            features = hear(self.kind, noise.astype(np.float32) * (rng.random() < 0.7))
            codes = np.tile(self.mouth.rest, (self.T * (1 if self.kind == "transformer" else STEPS), 1))
            return dict(sound=windows_of(self.kind, features, 0, self.T), codes=codes)
        features, codes = self.clip(int(rng.choice(self.clips)))
        rate = 1 if self.kind == "transformer" else STEPS
        first = int(rng.integers(max(1, len(codes) // rate - self.T + 1)))
        louder = np.float32(rng.uniform(-8, 8))  # dB
        if self.kind == "transformer":
            features = np.clip(features + np.float32(0.08) * louder * (features > -4), -4, 4)  # the mel's 8 for 100 dB
            features = spec_augment(features, rng, steps=8)
        else:
            features = features + np.float32(math.log(10) / 10 * louder) * (np.arange(13) == 0)  # the log energy
        at = np.minimum(np.arange(first * rate, (first + self.T) * rate), len(codes) - 1)  # short: stands still
        return dict(sound=windows_of(self.kind, features, first, first + self.T), codes=codes[at])


# ---------------------------------------------------------------------------------------------------------------------
# the networks: encode(sound) -> (B, T, W), decode -> codes (B, T, D)


class Wav2KP(nn.Module):
    """WAV2KP: an LSTM reads each window of 40 MFCC steps alone; its last state, fully connected, is the mouth.

    mean, deviation: of the MFCC, from training clips. scale: the codes' deviation, so that outputs are of order 1.
    """

    kind, reach = "lstm", 0  # frames around a chunk that it depends on, beyond each window's own

    def __init__(self, codes: int, width: int = 128, layers: int = 1):
        super().__init__()
        self.config = dict(codes=codes, width=width, layers=layers)
        self.register_buffer("mean", torch.zeros(13))
        self.register_buffer("deviation", torch.ones(13))
        self.register_buffer("scale", torch.ones(codes))
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


class MelFront(nn.Module):
    """Mel window -> (N, W): two convolutions over time, all bands at once"""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(N_MELS, width, 5, 2, 2), nn.GELU(),
                                  nn.Conv1d(width, width, 3, 2, 1), nn.GELU(),  # 16, 8, 4 steps
                                  nn.Flatten(), nn.Linear(4 * width, width))

    def forward(self, mel):  # (N, 1, 80, 16)
        return self.body(mel[:, 0] / 4)


class SyncFront(nn.Module):
    """The sound tower of a sync expert (its `tower` config: dim, width), embedding and all -> (N, W)"""

    def __init__(self, width: int, tower: dict):
        super().__init__()
        self.tower = AudioEncoder(**tower)
        self.out = nn.Linear(tower["dim"], width)

    def forward(self, mel):  # (N, 1, 80, 16)
        z = F.normalize(self.tower(mel), dim=1) * math.sqrt(self.out.in_features)  # elements of order 1
        return self.out(z)


class Block(nn.Module):
    """A Transformer's layer whose heads look `reach` frames to each side; a learned bias for each distance and head
    (T5) stands for positions, so a frame is heard alike wherever it is and however long the sound."""

    def __init__(self, width: int, heads: int, reach: int, dropout: float):
        super().__init__()
        self.heads, self.reach, self.dropout = heads, reach, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * reach + 1))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def forward(self, x):  # (B, T, W)
        T = x.shape[1]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        away = torch.arange(T, device=x.device) - torch.arange(T, device=x.device)[:, None]  # (T, T), key - query
        bias = self.bias[:, away.clamp(-self.reach, self.reach) + self.reach]  # (nh, T, T)
        bias = bias.masked_fill(away.abs() > self.reach, -math.inf).to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, dropout)  # (B, nh, T, hs)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Humans(nn.Module):
    """Humans: a speech encoder, a Transformer, and the codes of each frame at once, or one frame after the other.

    autoregressive: a GRU takes the last frame's codes beside what it hears. It is unrolled in training as in use, on its
    own output (no teacher forcing), so there is nothing that it could drift from.
    tower: None, the network learns its own front; or the config of a sync expert's sound tower.
    """

    kind = "transformer"

    def __init__(self, codes: int, width: int = 128, layers: int = 3, heads: int = 4, look: int = 8,
                 autoregressive: bool = False, tower: dict | None = None, dropout: float = 0.1):
        super().__init__()
        self.config = dict(codes=codes, width=width, layers=layers, heads=heads, look=look,
                           autoregressive=autoregressive, tower=tower, dropout=dropout)
        self.reach = layers * look  # frames to each side that frame t depends on
        self.register_buffer("scale", torch.ones(codes))
        self.front = SyncFront(width, tower) if tower else MelFront(width)
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


KINDS = dict(lstm=Wav2KP, transformer=Humans)


def keypoint_loss(codes, true, mouth_points: int, rate: int = 1) -> dict:
    """Terms in (per cent of the eye distance)^2 a coordinate, (B, T, D) each; the basis is orthonormal, so squares of
    codes are squares of coordinates. position: mean square. velocity: of the differences of neighbours, a frame."""
    unit = 1e4 / (2 * mouth_points)
    moves, true_moves = rate * codes.diff(dim=1), rate * true.diff(dim=1)
    return dict(position=unit * (codes - true).square().sum(-1).mean(),
                velocity=unit * (moves - true_moves).square().sum(-1).mean())


@torch.no_grad()
def predict(model, wav: np.ndarray, device, chunk: int = 500) -> np.ndarray:
    """Any sound (n,) -> codes (T, D), T = n_frames(n). Streams: chunks overlap by what a frame depends on, so the result
    is that of one pass."""
    T, features, out = n_frames(len(wav)), hear(model.kind, wav), []
    for a in range(0, T, chunk):
        lo, b = max(0, a - model.reach), min(T, a + chunk)
        hi, rate = min(T, b + model.reach), 1 if model.kind == "transformer" else STEPS
        sound = torch.from_numpy(windows_of(model.kind, features, lo, hi))[None].to(device)
        out.append(model.encode(sound)[:, (a - lo) * rate : (b - lo) * rate])
    codes = model.decode(torch.cat(out, 1))[0].float()
    if model.kind == "lstm":
        codes = codes.unflatten(0, (T, STEPS)).mean(1)  # the four steps of a frame
    return codes.cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# train

BEST = 10  # checkpoints whose weights are averaged (Humans)


def new_model(args, mouth: Mouth, parts: dict):
    """A network of --model with its statistics from training clips; --encoder's tower in it, frozen or not"""
    if args.model == "lstm":
        model = Wav2KP(args.codes, args.width)
        talk, clips = parts["train"]
        heard = np.concatenate([hear("lstm", talk.sound(c)) for c in clips[:: max(1, len(clips) // 100)]])
        model.mean.copy_(torch.from_numpy(heard.mean(0)))
        model.deviation.copy_(torch.from_numpy(heard.std(0) + 1e-3))
    else:
        tower = load_sync(args.encoder, "cpu").sound_tower if args.encoder else None
        config = dict(dim=tower.out.out_features, width=tower.body[0].conv.out_channels / 32) if tower else None
        options = dict(look=args.look, autoregressive=args.autoregressive, tower=config)
        model = Humans(args.codes, args.width, args.layers, **options)
        if tower:
            model.front.tower.load_state_dict(tower.state_dict())
    model.scale.copy_(torch.from_numpy(mouth.scale))
    return model


def model_of(checkpoint: dict, path, which: str = "best"):
    """(model, mouth) of a checkpoint; which: "last", "best" or "average" weights. InputError if parts do not fit."""
    with refusing(path, "its networks do not fit this version"):
        config = checkpoint["config"]
        model = load_strictly(lambda: KINDS[config["kind"]](**config["net"]), checkpoint["networks"][which], path)
        return model, Mouth.load(checkpoint["mouth"])


def load_keypoints(path, device, which: str | None = None):
    """A trained network, frozen, and its Mouth. which: default the average of the best weights where there is one.

    Raises InputError: what load_checkpoint refuses; not whole.
    """
    checkpoint = load_checkpoint(path, "keypoints")
    which = which or ("average" if "average" in checkpoint.get("networks", {}) else "best")
    model, mouth = model_of(checkpoint, path, which)
    return model.to(device).eval().requires_grad_(False), mouth


def average(states: list[dict]) -> dict:
    """Mean of weights, element by element"""
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}


def optimiser(model, args):
    """AdamW; a fine-tuned encoder learns at a tenth of the rate (ours), a frozen one not at all"""
    tower = list(model.front.tower.parameters()) if getattr(model, "config", {}).get("tower") else []
    for p in tower:
        p.requires_grad_(args.finetune)
    rest = [p for p in model.parameters() if all(p is not q for q in tower)]
    groups = [dict(params=rest, rate=args.lr)]
    if tower and args.finetune:
        groups.append(dict(params=tower, rate=0.1 * args.lr))
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.99), weight_decay=0.01)


def train(args):
    """Resumable, bit for bit on a CPU: item n of the data is a function of the seed and n alone."""
    device, out = pick_device(args.device), Path(args.out).absolute()
    saved = load_checkpoint(out, "keypoints") if args.resume else None
    if saved and "last" not in saved.get("networks", {}):
        raise InputError(f"{out}: weights alone cannot be resumed")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out.parent}: cannot be made a directory ({error.strerror})") from None
    if out.exists() and not (args.resume or args.overwrite):
        raise InputError(f"{out} exists: --resume continues it, --overwrite starts anew")
    check_output(out, overwrite=True)
    torch.manual_seed(args.seed)
    expert = expert_clips(args)
    parts = parts_of(args, expert)
    if saved:
        model, mouth = model_of(saved, out, "last")
        if model.kind != args.model:
            raise InputError(f"{out}: holds an '{model.kind}', --model is '{args.model}'")
        if saved["args"].get("finetune") != args.finetune:
            wrong = "without --finetune, leave it out" if args.finetune else "with --finetune, give it"
            raise InputError(f"{out}: was trained {wrong}")
    else:
        talk, clips = parts["train"]
        faces = [talk.faces(c) for c in tqdm(clips[:: -(-len(clips) // 400)], "mouths", disable=None)]
        mouth = Mouth.fit(np.concatenate(faces), args.codes, args.points)
        model = new_model(args, mouth, parts)
    model.to(device)
    opt, start, top = optimiser(model, args), 0, []
    if saved:
        opt.load_state_dict(saved["optimisers"]["adamw"])
        torch.set_rng_state(saved["rng"]["torch"].cpu())
        start, top = saved["step"], saved["top"]
    if start >= args.steps:
        return print(f"{out}: has {start} steps already; --steps is {args.steps}")
    talk, clips = parts["train"]
    used = {part: fingerprints(map(parts[part][0].sound, parts[part][1])) for part in ("train", "valid")}
    used["train"] = torch.cat([used["train"], *expert])
    M = len(mouth.points)
    print(f"{model.kind} on {device}: {len(clips)} clips to train on, {len(parts['valid'][1])} to validate, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {args.codes} codes of {M} points miss "
          f"{unseen_mse(mouth, *parts['valid']):.3g}, the mean mouth {mean_mouth_mse(mouth, *parts['valid']):.3g}")

    data = batches(Talks(talk, clips, mouth, model.kind, args.frames, args.seed), args.batch, start, args.workers)
    rate = 1 if model.kind == "transformer" else STEPS
    log = open(out.with_name(f"log_{out.stem}.jsonl"), "a" if saved else "w")
    versions = dict(torch=torch.__version__, numpy=np.__version__, python=platform.python_version())
    log.write(json.dumps(dict(revision=revision(), **versions, args=vars(args))) + "\n")
    clock, counted = time.perf_counter(), 0
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=model.kind, disable=None)
    for step in bar:
        batch = {name: x.to(device, non_blocking=True) for name, x in next(data).items()}
        for group in opt.param_groups:
            group["lr"] = group["rate"] * cosine_warmup(step, args.steps)
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            codes = model(batch["sound"])  # (B, T, D), an LSTM's (B, 4 T, D)
        terms = keypoint_loss(codes.float(), batch["codes"], M, rate)
        loss = terms["position"] + args.w_velocity * terms["velocity"]
        if not torch.isfinite(loss):
            bad = ", ".join(f"'{name}' is {value.item():g}" for name, value in terms.items() if not torch.isfinite(value))
            raise InputError(f"step {step}: the loss term {bad}: stopped; the last checkpoint is whole. Lower --lr")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        opt.step()
        counted += 1

        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            seconds = (time.perf_counter() - clock) / counted
            line = dict(step=step + 1, **{name: value.item() for name, value in terms.items()}, ms=1000 * seconds,
                        eta=seconds * (args.steps - step - 1))
            write(log, bar, line, "position {position:.2f}, velocity {velocity:.2f}; {ms:.0f} ms, {eta:.0f} s to go")
            clock, counted = time.perf_counter(), 0
        due = (step + 1) % args.save_every == 0 or last
        if (step + 1) % args.val_every == 0 or due:
            found = judge(model.eval(), mouth, *parts["valid"], device)
            state = {name: p.detach().cpu().clone() for name, p in model.state_dict().items()}
            top = sorted([*top, dict(mse=found["mse"], step=step + 1, state=state)], key=lambda t: t["mse"])[:BEST]
            line = dict(step=step + 1, **found, best=top[0]["mse"])
            write(log, bar if due else None, line,
                  "unseen: MSE {mse:.2f} (best {best:.2f}), opening r {r:.3f}, delay {delay:+d} frames")
            clock, counted = time.perf_counter(), 0
        if due:
            networks = dict(last=state, best=top[0]["state"], average=average([t["state"] for t in top]))
            save_checkpoint(out, dict(
                kind="keypoints", format=1, config=dict(kind=model.kind, net=model.config), mouth=mouth.state(),
                args=vars(args), clips=used, step=step + 1, networks=networks, top=top,
                optimisers=dict(adamw=opt.state_dict()), rng=dict(torch=torch.get_rng_state())))
    log.close()
    print(f"{out}: judge it with  python keypoints.py evaluate {args.out}")


def write(log, bar, line: dict, text: str):
    """One line of the log, as JSON and, where there is a bar, for people."""
    log.write(json.dumps(line) + "\n")
    log.flush()
    if bar is not None:
        bar.write(f"{line['step']:6d}  " + text.format(**line))


def export(args):
    """Weights alone, in fp16: the mean of a training run's best checkpoints (--best 1: the best alone)."""
    out = check_output(args.out, args.overwrite, (".pt",))
    saved = load_checkpoint(args.weights, "keypoints")
    if "top" not in saved:
        raise InputError(f"{args.weights}: weights alone hold no checkpoints to average")
    top = saved["top"][: args.best]
    which = "average" if len(top) > 1 else "best"
    state = {name: p.half() for name, p in average([t["state"] for t in top]).items()}
    keep = {name: saved[name] for name in ("kind", "format", "config", "mouth", "clips") if name in saved}
    data = saved["args"].get("data")
    keep["args"] = dict(data=data and Path(data).name)  # the pack's name; folders of one's own disk stay at home
    save_checkpoint(out, keep | dict(networks={which: state}))
    steps = ", ".join(str(t["step"]) for t in top)
    print(f"{out}: {which} of the {len(top)} best, steps {steps}; {out.stat().st_size / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------------------------------
# evaluate: MSE in (per cent of the eye distance)^2 a coordinate, r of the mouth's opening

LAGS = range(-8, 9)  # frames


def mse(a, b) -> float:
    return float(1e4 * np.square(a - b).mean())


def unseen_mse(mouth: Mouth, talk, clips) -> float:
    """What the principal components cannot say: MSE of decode(encode(x))"""
    return float(np.mean([mse(mouth.decode(mouth.encode(f)), mouth.shapes(f)) for f in map(talk.faces, clips)]))


def mean_mouth_mse(mouth: Mouth, talk, clips) -> float:
    return float(np.mean([mse(mouth.mean, mouth.shapes(f)) for f in map(talk.faces, clips)]))


def residual(curve: np.ndarray, profile: np.ndarray) -> np.ndarray:
    """A curve (T,) with the mean profile of its corpus and a constant regressed out: in a corpus where every clip is
    silence, words, silence, the profile alone correlates with every clip."""
    n = min(len(curve), len(profile))
    A = np.stack((profile[:n], np.ones(n)), 1)
    return curve[:n] - A @ np.linalg.lstsq(A, curve[:n], rcond=None)[0]


def mean_profile(mouth: Mouth, talk, clips) -> np.ndarray:
    """Mean opening at each frame number, over clips (those that a fifth of the clips still has)"""
    curves = [mouth.opening(mouth.shapes(talk.faces(c))) for c in clips]
    lengths = sorted(map(len, curves), reverse=True)
    stop = lengths[len(lengths) // 5]
    return np.array([np.mean([curve[k] for curve in curves if len(curve) > k]) for k in range(stop)])


def lagged(made, true, lag: int) -> float:
    """r of two curves (T,), the made one taken `lag` frames later; positive: it is late"""
    n = len(true) - abs(lag)
    return correlation(made[max(0, lag) :][:n], true[max(0, -lag) :][:n]) if n > 2 else 0.0


def score(mouth: Mouth, pairs: list, profile=None) -> dict:
    """Predicted and true mouths of clips [(made, true (T, 2M)), ..] -> means over clips.

    mse; moving: the same with each clip's mean mouth taken from both (whose mouth it is does not count); r of the
    opening at lag 0; residual r; delay, the lag in frames with the highest mean r; spread, the opening's deviation over
    the true one's.
    """
    curves = [(mouth.opening(a), mouth.opening(b)) for a, b in pairs]
    by_lag = [np.mean([lagged(a, b, lag) for a, b in curves]) for lag in LAGS]
    out = dict(mse=float(np.mean([mse(a, b) for a, b in pairs])),
               moving=float(np.mean([mse(a - a.mean(0), b - b.mean(0)) for a, b in pairs])),
               r=float(by_lag[LAGS.index(0)]), delay=int(LAGS[int(np.argmax(by_lag))]),
               spread=float(np.mean([a.std() for a, _ in curves]) / max(np.mean([b.std() for _, b in curves]), 1e-9)))
    if profile is not None:
        out["residual"] = float(np.mean([correlation(residual(a, profile), residual(b, profile)) for a, b in curves]))
    return out


def judge(model, mouth: Mouth, talk, clips, device, profile=None) -> dict:
    """score of a network on clips"""
    return score(mouth, [(mouth.decode(predict(model, talk.sound(c), device)), mouth.shapes(talk.faces(c)))
                         for c in clips], profile)


def evaluate(args):
    """The table: what no network does, the units' table, and each checkpoint's best and averaged weights."""
    device, start = pick_device(args.device), time.perf_counter()
    nets = [(path, load_checkpoint(path, "keypoints")) for path in args.weights]
    loaded = [(path, which, *model_of(saved, path, which)) for path, saved in nets
              for which in ("best", "average") if which in saved.get("networks", {})]
    mouth = loaded[0][3]
    for path, _, _, own in loaded:
        if own.points != mouth.points:
            raise InputError(f"{path}: has {len(own.points)} points of the mouth, {loaded[0][0]} {len(mouth.points)}: "
                             "their errors do not compare, evaluate them one by one")
    parts = judged_parts(args, nets)
    rows = {part: {} for part in ("valid", "test") if len(parts[part][1])}
    home = len(parts["train"][1]) > 0
    profile = mean_profile(mouth, *parts["train" if home else "test"])
    table = None
    if home and (args.words or not args.data):
        table = unit_table(*parts["train"], mouth)
    for part, found in rows.items():
        talk, clips = parts[part]
        faces = [talk.faces(c) for c in tqdm(clips, part, disable=None)]
        true = [mouth.shapes(f) for f in faces]
        found[f"PCA, {len(mouth.scale)} codes"] = score(
            mouth, [(mouth.decode(mouth.encode(f)), b) for f, b in zip(faces, true)], profile)
        found["mean mouth"] = score(mouth, [(np.tile(mouth.mean, (len(b), 1)), b) for b in true], profile)
        if table:
            made = [by_table(table, talk.said(c), len(b), mouth.rest) for c, b in zip(clips, true)]
            found["table of units, true timing"] = score(
                mouth, [(mouth.decode(a), b) for a, b in zip(made, true)], profile)
        for path, which, model, own in loaded:
            name = f"{Path(path).stem} ({model.kind}{label(model)}), {which}"
            found[name] = judge(model.to(device).eval(), own, talk, clips, device, profile)
    counts = ", ".join(f"{len(clips)} {part}" for part, (_, clips) in parts.items() if len(clips))
    print(f"{args.data or 'toy world'}: clips: {counts}; MSE in (% of the eye distance)^2 a "
          f"coordinate, moving: each clip's mean mouth taken out\n")
    print("| | MSE valid | MSE test | moving | opening r | residual r | delay, frames | spread |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, t in rows["test"].items():
        valid = f"{rows['valid'][name]['mse']:.2f}" if "valid" in rows else ""
        still = t["spread"] < 1e-6  # the mean mouth: there is nothing to correlate
        tail = "| | | " if still else f"{t['r']:.3f} | {t['residual']:.3f} | {t['delay']:+d} "
        print(f"| {name} | {valid} | {t['mse']:.2f} | {t['moving']:.2f} | {tail}| {t['spread']:.2f} |")
    print()
    for path, which, model, own in loaded:
        codes = predict(model, np.zeros(2 * FPS * SAMPLES_PER_FRAME, np.float32), device)
        gap, shut = own.opening(own.decode(codes)).max(), own.opening(own.decode(own.rest[None]))[0]
        print(f"{Path(path).stem}, {which}: two seconds of silence open the mouth to {100 * gap:.1f} % of the eye "
              f"distance; at rest {100 * shut:.1f} %, in clips {100 * profile.mean():.1f} % on average")
    print(f"{time.perf_counter() - start:.0f} s")


def label(model) -> str:
    """What a row says of a network beside its kind"""
    extra = ["autoregressive"] * bool(model.config.get("autoregressive")) + ["encoder"] * bool(model.config.get("tower"))
    return "".join(f", {word}" for word in extra)


# ---------------------------------------------------------------------------------------------------------------------
# units to lips: a baseline that knows what is said and when, and nothing of how

PHASES = 8  # moments of a unit at which its mean motion is kept (ours)


def at_phase(codes: np.ndarray, start: float, end: float) -> np.ndarray:
    """Codes (T, D) at the PHASES moments of the stretch start .. end in seconds -> (P, D)"""
    moments = (start + (np.arange(PHASES) + 0.5) / PHASES * (end - start)) * FPS - 0.5
    return np.stack([np.interp(moments, np.arange(len(codes)), column) for column in codes.T], 1)


def unit_table(talk, clips, mouth: Mouth) -> dict:
    """Unit -> how often it was said (count), its mean length (seconds), its mean motion (P, D)"""
    heard = {}
    for c in clips:
        codes = mouth.encode(talk.faces(c))
        for start, end, unit in talk.said(c):
            if end > start:
                heard.setdefault(unit, []).append((end - start, at_phase(codes, start, end)))
    return {unit: dict(count=len(times), seconds=float(np.mean([seconds for seconds, _ in times])),
                       motion=np.mean([motion for _, motion in times], 0).astype(np.float32))
            for unit, times in sorted(heard.items())}


def by_table(table: dict, said: list[tuple], T: int, rest: np.ndarray) -> np.ndarray:
    """Codes (T, D) of timed units: the mean motion of each, stretched to its time; rest where nothing known is said"""
    codes = np.tile(rest, (T, 1)).astype(np.float32)
    starts = [start for start, _, _ in said]
    for k in range(T):
        i = bisect(starts, (k + 0.5) / FPS) - 1
        if i < 0 or said[i][2] not in table or (k + 0.5) / FPS >= said[i][1]:
            continue
        start, end, unit = said[i]
        phase = ((k + 0.5) / FPS - start) / (end - start) * PHASES - 0.5
        motion = table[unit]["motion"]
        codes[k] = [np.interp(phase, np.arange(PHASES), column) for column in motion.T]
    return codes


def text_to_codes(text: str, table: dict, rest: np.ndarray) -> np.ndarray:
    """Units by name, each as long as it is on average, "sil" before and after where the table has it; -> (T, D).

    Joins are softened by a mean over three frames. Raises InputError: a unit that the table does not have.
    """
    words = text.split()
    unknown = [word for word in words if word not in table]
    if unknown or not words:
        wrong = f"unknown: {unknown[0]}" if words else "nothing to say"
        raise InputError(f"--text: {wrong}; the table knows {' '.join(table)}")
    words = ["sil", *words, "sil"] if "sil" in table else words
    times, now = [], 0.0
    for word in words:
        times.append((now, now + table[word]["seconds"], word))
        now = times[-1][1]
    codes = by_table(table, times, max(1, round(now * FPS)), rest)
    padded = np.pad(codes, ((1, 1), (0, 0)), mode="edge")
    return (0.25 * padded[:-2] + 0.5 * codes + 0.25 * padded[2:]).astype(np.float32)


def units(args):
    """Fits the table on training clips, saves it, and draws it."""
    out = check_output_in_new_folder(args.out, args.overwrite, (".pt",))
    picture = check_output(out.with_suffix(".png"), args.overwrite)
    if args.data and not args.words:
        raise InputError("--data needs --words, the folder of its .align files")
    talk, clips = parts_of(args)["train"]
    mouth = Mouth.fit(np.concatenate([talk.faces(c) for c in clips[:: -(-len(clips) // 400)]]), args.codes, args.points)
    table = unit_table(talk, tqdm(clips, "clips", disable=None), mouth)
    stored = {unit: row | dict(motion=torch.from_numpy(row["motion"])) for unit, row in table.items()}
    save_checkpoint(out, dict(kind="lip-units", format=1, mouth=mouth.state(), table=stored, args=vars(args)))
    draw_table(table, mouth).save(picture)
    print(f"{out}, {picture}: {len(table)} units of {len(clips)} clips; python keypoints.py sample --units {args.out} "
          f"--text '{' '.join([unit for unit in table if unit != 'sil'][:4])}'")


def load_units(path):
    """-> table, Mouth"""
    saved = load_checkpoint(path, "lip-units")
    try:
        table = {unit: row | dict(motion=row["motion"].numpy()) for unit, row in saved["table"].items()}
        return table, Mouth.load(saved["mouth"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: a damaged table ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# pictures

INK, LINE, MADE, TRUE = (24, 26, 34), (214, 220, 232), (255, 166, 77), (110, 214, 140)
LIPS = (255, 112, 126)
FINE = 3  # drawn so many times larger, then reduced


def draw_face(face: np.ndarray, size: int, parts=tuple(PARTS), middle=(0.5, 0.32), unit: float = 0.42) -> Image.Image:
    """Normalised landmarks (68, 2) as lines -> a picture; the origin at `middle` of it, the eye distance `unit` of it"""
    image = Image.new("RGB", (size * FINE, size * FINE), INK)
    pen = ImageDraw.Draw(image)
    xy = (face * unit + middle) * size * FINE
    for part in parts:
        which, closed = PARTS[part]
        line = [tuple(xy[p]) for p in (*which, *which[:closed])]
        pen.line(line, LIPS if part in ("lips", "inner") else LINE, max(1, round(size * FINE / 110)), "curve")
    return image.reduce(FINE)


def draw_mouth(face: np.ndarray, size: int) -> Image.Image:
    """The mouth alone, larger"""
    centre = face[48:68].mean(0)
    return draw_face(face - centre, size, ("lips", "inner"), (0.5, 0.5), 1.05)


def on_frame(frame: np.ndarray, points: np.ndarray, size: int) -> Image.Image:
    """A crop (H, W, 3) with its landmarks (68, 2) in pixels, resized"""
    image = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
    pen, scale, r = ImageDraw.Draw(image), size / len(frame), max(0.8, size / 160)
    for k, (x, y) in enumerate(points * scale):
        pen.ellipse((x - r, y - r, x + r, y + r), LIPS if k >= 48 else TRUE)
    return image


def draw_mel(mel: np.ndarray, width: int, height: int) -> Image.Image:
    """(80, S) in [-4, 4] -> low notes below, from dark blue over red to yellow"""
    t = (mel[::-1, :, None] + 4) / 8
    colour = np.concatenate((np.clip(1.8 * t, 0, 1), np.clip(2 * t - 0.9, 0, 1), 0.25 + 0.4 * t * (1 - t)), 2)
    return Image.fromarray((255 * colour).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)


def draw_curves(curves: list, width: int, height: int) -> Image.Image:
    """Openings [(values (T,), colour), ..] over the same time, zero at the bottom"""
    image = Image.new("RGB", (width * FINE, height * FINE), INK)
    pen, high = ImageDraw.Draw(image), 1.1 * max(curve.max() for curve, _ in curves) + 1e-6
    for curve, colour in curves:
        x = (np.arange(len(curve)) + 0.5) / len(curve) * width * FINE
        pen.line(list(zip(x, (1 - curve / high) * height * FINE)), colour, 2 * FINE, "curve")
    return image.reduce(FINE)


def draw_table(table: dict, mouth: Mouth, columns: int = 3, mouth_size: int = 40) -> Image.Image:
    """The table of units: name, how often, mean length, PHASES mouths and the opening over them"""
    names, left, curve = list(table), 92, 70
    rows, wide = -(-len(names) // columns), left + PHASES * mouth_size + curve + 14
    sheet = Image.new("RGB", (columns * wide, rows * (mouth_size + 6)), INK)
    pen = ImageDraw.Draw(sheet)
    shapes = {unit: mouth.to_face(row["motion"]) for unit, row in table.items()}
    highest = max(mouth.opening(mouth.shapes(face)).max() for face in shapes.values())
    for i, unit in enumerate(names):
        x, y = i // rows * wide, i % rows * (mouth_size + 6)
        pen.text((x + 6, y + 6), f"{unit}\n{table[unit]['count']}x {1000 * table[unit]['seconds']:.0f} ms", LINE)
        for p, face in enumerate(shapes[unit]):
            sheet.paste(draw_mouth(face, mouth_size), (x + left + p * mouth_size, y))
        gap = mouth.opening(mouth.shapes(shapes[unit]))
        sheet.paste(draw_curves([(gap, MADE), (np.full(2, highest), INK)], curve, mouth_size), (x + wide - curve - 8, y))
    return sheet


class Strip:
    """Everything about a clip over time: frames with landmarks, true and predicted keypoints, mel, mouth curves."""

    def __init__(self, talk, c: int, model, mouth: Mouth, device, words: bool):
        self.wav, self.points = talk.sound(c), talk.points(c)
        self.frames, faces = talk.frames(c), talk.faces(c)
        self.true, self.made = faces, mouth.to_face(predict(model, self.wav, device))
        self.gaps = [mouth.opening(mouth.shapes(x)) for x in (self.true, self.made)]
        T = min(len(self.true), len(self.made))
        r = correlation(self.gaps[0][:T], self.gaps[1][:T])
        self.title = f"{talk.name(c)}: opening of the mouth, true (green) and from the sound (orange), r {r:.2f}"
        self.said = talk.said(c) if words else []

    def panel(self, width: int) -> Image.Image:
        """Mel above curves above what is said"""
        image = Image.new("RGB", (width, 216), INK)
        image.paste(draw_mel(log_mel(self.wav), width, 88))
        curves = [(self.gaps[0], TRUE), (self.gaps[1], MADE)]
        image.paste(draw_curves(curves, width, 88), (0, 92))
        pen = ImageDraw.Draw(image)
        for start, end, unit in self.said:
            x0, x1 = (round(t * FPS / len(self.true) * width) for t in (start, end))
            pen.line((x0, 88, x0, 196), (70, 76, 92))
            pen.text(((x0 + x1) / 2, 182), unit, LINE, anchor="ma")
        pen.text((6, 200), self.title, LINE)
        return image

    def at(self, k: int, size: int) -> list[Image.Image]:
        """Frame k: the crop with its landmarks; true keypoints; predicted ones"""
        crop = on_frame(self.frames[k], self.points[k], size)
        return [crop, draw_face(self.true[k], size), draw_face(self.made[k], size)]

    def sheet(self, columns: int = 9, size: int = 112) -> Image.Image:
        """The whole clip in one picture; a tick over the mel marks each column's moment"""
        image = Image.new("RGB", (columns * size, 3 * size + 226), INK)
        chosen = ((np.arange(columns) + 0.5) / columns * len(self.frames)).astype(int)  # below it lies its moment
        for i, k in enumerate(chosen):
            for row, picture in enumerate(self.at(int(k), size)):
                image.paste(picture, (i * size, row * size))
        image.paste(self.panel(columns * size), (0, 3 * size + 8))
        return image

    def film(self, size: int = 224):
        """Frames of a video: three pictures over the panel, a cursor in it"""
        panel = self.panel(3 * size)
        for k in range(len(self.frames)):
            image = Image.new("RGB", (3 * size, size + 222), INK)
            for i, picture in enumerate(self.at(k, size)):
                image.paste(picture, (i * size, 0))
            image.paste(panel, (0, size + 4))
            x = (k + 0.5) / len(self.frames) * 3 * size
            ImageDraw.Draw(image).line((x, size + 4, x, size + 184), (255, 255, 255))
            yield np.asarray(image)


def show(args):
    """One clip, every step of the way: a picture, or where --out ends in .mp4 a video with the sound."""
    out = check_output(args.out, args.overwrite, (".png", ".mp4"))
    device = pick_device(args.device)
    saved = load_checkpoint(args.weights, "keypoints")
    model, mouth = load_keypoints(args.weights, device)
    talk, clips = judged_parts(args, [(args.weights, saved)])["test"]
    if not 0 <= args.clip < len(clips):
        raise InputError(f"--clip {args.clip}: the test part has clips 0 to {len(clips) - 1}")
    strip = Strip(talk, int(clips[args.clip]), model, mouth, device, words=bool(args.words or not args.data))
    if out.suffix.lower() == ".png":
        strip.sheet().save(out)
    else:
        with VideoWriter(out, 446, 672, strip.wav, args.overwrite) as video:
            for frame in tqdm(strip.film(), "frames", len(strip.frames), disable=None):
                video.write(frame)
    print(f"{out}: {strip.title}")


# ---------------------------------------------------------------------------------------------------------------------
# sample


def sample(args):
    """Speech, or units by name, -> a video of drawn keypoints, and beside it a .npy: float32 (T, 68, 2), normalised."""
    out = check_output(args.out, args.overwrite, (".mp4", ".mov", ".mkv"))
    table_of_points = check_output(out.with_suffix(".npy"), args.overwrite)
    if bool(args.speech) == bool(args.text):
        raise InputError("give a sound file, or --text with --units")
    if args.text:
        if not args.units:
            raise InputError("--text needs --units, a table made by  python keypoints.py units")
        table, mouth = load_units(args.units)
        codes, wav = text_to_codes(args.text, table, mouth.rest), None
    else:
        device = pick_device(args.device)
        model, mouth = load_keypoints(args.weights, device)
        wav = load_audio(args.speech)
        codes = predict(model, wav, device)
    faces = mouth.to_face(codes)  # (T, 68, 2)
    with VideoWriter(out, args.size, args.size, wav, args.overwrite, args.speech) as video:
        for face in tqdm(faces, "frames", disable=None):
            video.write(np.asarray(draw_face(face, args.size)))
    draft = table_of_points.with_name(f".{table_of_points.stem}-{os.getpid()}.npy")
    try:
        np.save(draft, faces)
        os.replace(draft, table_of_points)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InputError(f"{table_of_points}: cannot be written ({error.strerror})") from None
    print(f"{out}, {table_of_points}: {len(faces)} frames, {len(faces) / FPS:.2f} s")


def check_output_in_new_folder(path, overwrite: bool, suffixes: tuple) -> Path:
    """check_output, making the folder"""
    try:
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return check_output(path, overwrite, suffixes)


# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(description="audio -> facial keypoints")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, data=False, device=False):
        p = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if data:
            p.add_argument("--data", help="pack of prepare.py with landmarks (see extract); default: the toy world")
            p.add_argument("--landmarks", help="folder of its landmarks; default: DATA/landmarks")
            p.add_argument("--people", type=int, default=200, help="toy world: how many people to train on")
        if device:
            p.add_argument("--device", default="auto")
        return p

    for name, text in (("extract", "landmarks of a pack, beside it"), ("compare", "seconds a frame of the detectors")):
        p = command(name, text)
        p.add_argument("data", help="pack of prepare.py; a toy pack brings its own truth")
        p.add_argument("--mediapipe", metavar="FILE", help="MediaPipe's face_landmarker.task (pip install mediapipe); "
                       "without it face-alignment's FAN looks")
        p.add_argument("--dlib", metavar="FILE", help="or dlib's shape_predictor_68_face_landmarks.dat "
                       "(pip install dlib-bin)")
        if name == "extract":
            p.add_argument("--landmarks", help="folder to write; default: DATA/landmarks")
            p.add_argument("--overwrite", action="store_true", help="replace landmarks of another detector")
        else:
            p.add_argument("--frames", type=int, default=50, help="how many frames to look at")
    p = command("train", "train a network", data=True, device=True)
    split_options(p)
    p.add_argument("--out", default="out/toy_kp.pt", help="checkpoint")
    p.add_argument("--model", default="transformer", choices=tuple(KINDS), help="Humans' or WAV2KP's")
    p.add_argument("--autoregressive", action="store_true", help="transformer: one frame after the other")
    p.add_argument("--encoder", metavar="SYNC.pt", help="transformer: hear through the sound tower of this sync expert")
    p.add_argument("--finetune", action="store_true", help="train the --encoder along, at a tenth of the rate")
    p.add_argument("--codes", type=int, default=8, help="principal components of the mouth (Humans: 8)")
    p.add_argument("--points", type=int, default=20, choices=tuple(MOUTHS), help="of the mouth; 18: no inner corners")
    p.add_argument("--width", type=int, default=128, help="channels")
    p.add_argument("--layers", type=int, default=3, help="transformer: blocks")
    p.add_argument("--look", type=int, default=8, help="transformer: frames to each side that a block looks")
    p.add_argument("--w-velocity", type=float, default=1.0, help="weight of the loss on velocities")
    p.add_argument("--frames", type=int, help="of a window; default: transformer 50, lstm 5")
    p.add_argument("--batch", type=int, default=16, help="windows a step")
    p.add_argument("--steps", type=int, default=600, help="steps in all; the rate falls towards the last")
    p.add_argument("--lr", type=float, default=1e-3, help="rate of AdamW")
    p.add_argument("--clip", type=float, default=100.0, help="gradients are cut to this norm")
    p.add_argument("--bf16", action="store_true", help="bfloat16 where the chip likes it")
    p.add_argument("--resume", action="store_true", help="continue --out; give the same options")
    p.add_argument("--overwrite", action="store_true", help="start anew although --out exists")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=0, help="processes that load data")
    p.add_argument("--log-every", type=int, default=60)
    p.add_argument("--val-every", type=int, default=15, help="steps between validations; the best ten are averaged")
    p.add_argument("--save-every", type=int, default=60)
    p = command("evaluate", "the table, on held-out clips", data=True, device=True)
    p.add_argument("weights", nargs="+", help="checkpoints of train; a row for each one's best and averaged weights")
    p.add_argument("--words", help="folder of .align files of --data: adds the table of units")
    p = command("export", "weights alone: the mean of the best checkpoints of a run")
    p.add_argument("weights", help="checkpoint of train")
    p.add_argument("--best", type=int, default=BEST, help="how many to average")
    p.add_argument("--out", required=True, help="file to write")
    p.add_argument("--overwrite", action="store_true")
    p = command("sample", "speech -> a video of keypoints, and a .npy", device=True)
    p.add_argument("speech", nargs="?", help="any sound file, or a video with sound")
    p.add_argument("--weights", default=str(Path(__file__).parent / "weights" / "keypoints.pt"), help="checkpoint")
    p.add_argument("--text", help="units by name, instead of speech")
    p.add_argument("--units", help="--text: the table to speak by")
    p.add_argument("--out", default="keypoints.mp4", help="video; the numbers go beside it, as .npy")
    p.add_argument("--size", type=int, default=256, help="of the video in pixels")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")
    p = command("units", "mean lip motion of words or phones, and a picture of it", data=True)
    split_options(p)
    p.add_argument("--words", help="folder of .align files of --data; the toy world brings its own")
    p.add_argument("--codes", type=int, default=8, help="principal components of the mouth")
    p.add_argument("--points", type=int, default=20, choices=tuple(MOUTHS), help="of the mouth")
    p.add_argument("--out", default="out/units.pt", help="the table; the picture goes beside it, as .png")
    p.add_argument("--overwrite", action="store_true")
    p = command("show", "frames, landmarks, mel and mouth curves of a test clip", data=True, device=True)
    p.add_argument("weights", help="checkpoint")
    p.add_argument("--clip", type=int, default=0, help="number among the test clips")
    p.add_argument("--words", help="folder of .align files: writes what is said")
    p.add_argument("--out", default="show.png", help=".png or .mp4")
    p.add_argument("--overwrite", action="store_true")
    limits = dict(codes=(1, 36), width=(4, 4096), layers=(1, 64), look=(1, 1000), clip=(0, 10**9), best=(1, BEST),
                  size=(32, 2048))
    return checked(parser.parse_args(argv, **limits))


def checked(args):
    """Options that go together"""
    if args.command == "extract" and args.mediapipe and args.dlib:
        raise InputError("--mediapipe and --dlib: give one of them")
    if args.command in ("train", "units") and not args.data and (args.train or args.valid or args.test):
        raise InputError("--train, --valid and --test list clips of --data, which is not given")
    if args.command == "train":
        if args.frames is None:
            args.frames = 50 if args.model == "transformer" else 5
        if args.model == "transformer" and args.frames < 2:
            raise InputError(f"--frames {args.frames}: one frame has no velocity, give two or more")
        if args.model == "lstm" and (args.encoder or args.autoregressive):
            raise InputError("--encoder and --autoregressive are the transformer's")
        if args.finetune and not args.encoder:
            raise InputError("--finetune needs an --encoder")
        if args.width % 4:
            raise InputError(f"--width {args.width}: must be a multiple of 4, the number of heads")
    return args


def main(argv=None):
    args = parse(argv)
    jobs = (extract, compare, train, evaluate, export, sample, units, show)
    {job.__name__: job for job in jobs}[args.command](args)


if __name__ == "__main__":
    run(main)
