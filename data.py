"""What lies on disk: videos -> packs, packs -> batches, and checkpoints.

    python data.py videos/ out/pack --size 128    # any folder of videos -> a pack; 335 frames a second on 2 cores
                                                  # out/pack/manifest.jsonl: what became of every file
                                                  # out/pack/sheet.png: a frame of each clip, to look at
    python data.py photos/ out/photos --size 128  # a folder of photos, or an .npz of JPEGs; 30 a second a core

A pack is a directory: all frames as JPEGs end to end (frames.bin), all sound as int16 at 16 kHz end to end
(sound.bin), an index of plain arrays, and meta.json. The big files are memory-mapped: any frame of any clip
is one read, nothing is unpacked, and a million clips open in a moment.

The sampling rule of the method lives in `Clips`: source and driving frames come from one clip and are never
the same frame. Paper: FC-TFG (arXiv 2304.03275), section 3.5; it does not say how frames are drawn, so the
distances are ours. That the driving mouth is hidden from the network is vision.mask_mouth's (the loss needs
the mouth).
"""

import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing stops a second run there
    fcntl = None

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from audio import (
    SAMPLES_PER_FRAME,
    InputError,
    Parser,
    check_file,
    isolate_voice,
    load_audio,
    log_mel,
    mfcc,
    n_frames,
    run,
    set_level,
    sound_windows,
    to_int16,
)
from stylegan2 import items, read_weights
from vision import (
    SAME_FACE,
    TEMPLATES,
    crop_face,
    detect_faces,
    face_box,
    find_faces,
    load_photo,
    overlap,
    probe,
    read_video,
    square_within,
    to_tensor,
)

NEAR = 4  # frames; ours: a window nearer than this sounds too alike to be called wrong
ENDLESS = 2**40  # items of a dataset: it never ends
STALE = 3600  # seconds; ours: no save takes an hour, an older draft is a killed run's
FORMAT = 1  # of packs and checkpoints
LARGEST = 1 << 16  # ours: no size in a network's config is larger; the base of StyleGAN2's channels is half of it


# ------------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path: str | Path, checkpoint: dict):
    """Writes plain dicts, tensors, numbers and strings; `path` is the old file or the whole new one, always.

    checkpoint needs "kind" (what it is) and "format" (1). Raises InputError where the disk refuses.
    """
    assert {"kind", "format"} <= set(checkpoint), "a checkpoint says its kind and format"
    path = Path(path).absolute()
    draft = None
    try:
        for old in path.parent.glob(f".{path.name}-*"):
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()
        handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # else the name could survive a power cut that the content does not
        os.chmod(draft, 0o644)  # mkstemp's 0600 is for secrets
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch's own writer turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({reason})") from None
    finally:
        if draft and os.path.exists(draft):
            os.unlink(draft)


def load_checkpoint(path: str | Path, kind: str | tuple, map_location="cpu") -> dict:
    """Reads a file of save_checkpoint. kind: the expected one, or a tuple of accepted ones.

    Raises InputError, one line: missing, directory, truncated, no checkpoint, holding code, another kind or
    format. What is inside a checkpoint of the right kind is its reader's to check.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    expected = f"expected a '{' or '.join(kinds)}' checkpoint"
    path = check_file(path)
    try:
        checkpoint = read_weights(path, map_location)
    except InputError as error:
        raise InputError(f"{error}; {expected}") from None
    found = checkpoint.get("kind")
    if not isinstance(found, str):
        raise InputError(f"{path}: was not written by this package; {expected}")
    if found not in kinds:
        raise InputError(f"{path}: is a '{found[:40]}' checkpoint; {expected}")
    if checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: has format {checkpoint.get('format')}, this version reads format {FORMAT}")
    sizes = [v for v in items(checkpoint.get("config")) if isinstance(v, (int, float))]
    if not all(abs(size) <= LARGEST for size in sizes):
        raise InputError(f"{path}: its config asks for more than any network here has; {expected}")
    return checkpoint


# ------------------------------------------------------------------------------------------------------------
# packs

# the index: a number a clip, but jpeg_start: a frame, and box: four; *_start have one more, the end
INDEX = dict(
    frame_start=np.int64, n_frames=np.int32, sound_start=np.int64, n_samples=np.int64, identity=np.int32,
    box=np.float32, fps=np.float32, source_start=np.int64, jpeg_start=np.int64,
)  # fmt: skip


def encode_jpeg(frame: np.ndarray, size: int, quality: int = 95) -> bytes:
    """uint8 (size, size, 3) -> a JPEG; up to 64 px colour keeps its full resolution (half is too little for lips)."""
    assert frame.shape == (size, size, 3) and frame.dtype == np.uint8, f"frame is {frame.dtype} {frame.shape}"
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=quality, subsampling=0 if size <= 64 else 2)
    return file.getvalue()


class PackWriter:
    """Writes a pack clip by clip. meta.json comes last: a directory without it is no pack.

    with PackWriter("out/pack", 64, "toy") as pack:
        pack.add(frames, wav, identity="anna", source="anna/1.mp4")

    size: edge of the frames in pixels. template: name of the crop in vision.TEMPLATES. quality: of the JPEGs.
    keep: how many clips of an unfinished pack, in the order they were added, to keep and go on behind. While
    it writes, journal.jsonl has a line for each clip, written after the clip itself.
    Raises InputError: the folder holds a pack, cannot be written, or was begun with another size.
    """

    def __init__(self, folder: str | Path, size: int, template: str, quality: int = 95, keep: int = 0):
        assert template in TEMPLATES, f"template '{template}' is none of {sorted(TEMPLATES)}"
        self.folder, self.size, self.template, self.quality = Path(folder).absolute(), size, template, quality
        self.index = {name: [] for name in ("n_frames", "n_samples", "identity", "box", "fps")}
        self.jpeg_start = array("q", [0])  # not a list: 75 million numbers are 600 MB, not 3 GB
        self.identities, self.sources, self.n_sound = {}, [], 0
        if (self.folder / "meta.json").exists():
            raise InputError(f"{folder}: holds a pack already, name another directory")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.open(keep)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None

    def open(self, keep: int):
        """Opens the three files, cut behind the first `keep` clips."""
        self.files = {
            name: open(self.folder / name, "ab") for name in ("frames.bin", "sound.bin", "journal.jsonl")
        }
        journal = self.files["journal.jsonl"]
        if fcntl:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.folder}: another run is writing there") from None
        head, lines = json.dumps(dict(size=self.size, template=self.template)).encode() + b"\n", []
        if keep:
            lines = list(islice(open(journal.name, "rb"), 1 + keep))
            if len(lines) <= keep or lines[0] != head:
                raise InputError(
                    f"{self.folder}: was begun with other options, or its journal is damaged: remove it"
                )
            for line in lines[1:]:
                self.enter(json.loads(line))
        for name, end in (("frames.bin", self.jpeg_start[-1]), ("sound.bin", 2 * self.n_sound)):
            self.files[name].truncate(end)
            self.files[name].seek(end)  # else tell() would still count what was cut off
        journal.truncate(sum(map(len, lines)))
        if not lines:
            journal.write(head)

    def enter(self, clip: dict):
        """One line of the journal -> the index."""
        for name, column in self.index.items():
            value = clip[name]
            if name == "identity":  # names become numbers in the order of their appearance
                value = self.identities.setdefault(value, len(self.identities))
            column.append(value)
        self.sources.append(clip["source"])
        self.n_sound += clip["n_samples"]
        end = self.jpeg_start[-1]
        for length in clip["jpegs"]:
            end += length
            self.jpeg_start.append(end)

    def add(self, frames, wav: np.ndarray, identity: str, source: str, box=None, fps: float = 25.0) -> int:
        """One clip: frames (iterable of uint8 (size, size, 3)), wav float (n,) in [-1, 1] at 16 kHz, who it
        is, where it came from, its box in the source picture, the source's frame rate -> how many frames."""
        jpegs = (encode_jpeg(frame, self.size, self.quality) for frame in frames)
        return self.add_encoded(jpegs, to_int16(wav), identity, source, box, fps)

    def add_encoded(self, jpegs, samples: np.ndarray, identity: str, source: str, box=None, fps: float = 25.0) -> int:
        """As add, of what encode_jpeg and to_int16 gave, in another process maybe."""
        lengths = [self.files["frames.bin"].write(jpeg) for jpeg in jpegs]
        assert lengths, "a clip has at least one frame"
        self.files["sound.bin"].write(samples.tobytes())
        clip = dict(n_frames=len(lengths), n_samples=len(samples), identity=identity, source=source, fps=fps)
        clip |= dict(box=[float(v) for v in (box or (0, 0, 0, 0))], jpegs=lengths)
        for name in ("frames.bin", "sound.bin"):  # the clip first, then the line that says it is there
            self.files[name].flush()
        self.files["journal.jsonl"].write(json.dumps(clip).encode() + b"\n")
        self.files["journal.jsonl"].flush()
        self.enter(clip)
        return len(lengths)

    def close(self):
        """Finishes: the index, then meta.json under its name, which makes the directory a pack."""
        assert self.sources, "a pack has at least one clip"
        names = [source.encode("utf-8", "surrogateescape") for source in self.sources]  # any file name
        (self.folder / "sources.txt").write_bytes(b"".join(names))
        columns = dict(self.index, jpeg_start=self.jpeg_start)
        columns["frame_start"] = np.cumsum([0, *self.index["n_frames"]])
        columns["sound_start"] = np.cumsum([0, *self.index["n_samples"]])
        columns["source_start"] = np.cumsum([0, *map(len, names)])
        for name, kind in INDEX.items():
            np.save(self.folder / f"{name}.npy", np.asarray(columns[name], kind))
        meta = dict(format=FORMAT, size=self.size, template=self.template, identities=list(self.identities))
        draft = self.folder / ".meta.json"
        draft.write_text(json.dumps(meta))
        self.release()
        os.replace(draft, self.folder / "meta.json")
        (self.folder / "journal.jsonl").unlink()

    def release(self):
        """Stops without finishing; the folder is no pack, `keep` can go on with it."""
        for file in self.files.values():
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close() if kind is None else self.release()


class Pack:
    """A pack, open for reading. Everything is mapped, nothing is loaded.

    .size, .template, .identities (names), and for each clip c: .n_frames[c], .identity[c] (its place in
    .identities), .box[c] (x0, y0, x1, y1 in the source picture), .fps[c] (of the source).
    Raises InputError: no pack there, or one that is not whole.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such directory, expected a pack written by data.py")
        if not (self.folder / "meta.json").is_file():
            raise InputError(f"{folder}: not a pack, or an unfinished one (meta.json is missing)")
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            self.size, self.template, self.identities = meta["size"], meta["template"], meta["identities"]
            for name in INDEX:  # a plain array on top of the map: np.memmap's own indexing is slow
                setattr(self, name, np.asarray(np.load(self.folder / f"{name}.npy", "r", allow_pickle=False)))
            self.jpegs, self.samples = self.map("frames.bin", "u1"), self.map("sound.bin", "<i2")
            self.names = self.map("sources.txt", "u1")
            wholes = (len(self.jpegs), self.jpeg_start[-1]), (len(self.samples), self.sound_start[-1])
            wholes += (len(self.jpeg_start) - 1, self.frame_start[-1]), (len(self.frame_start), len(self) + 1)
            if meta["format"] != FORMAT or not len(self) or any(a != b for a, b in wholes):
                raise ValueError("its files do not belong together")
        except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
            raise InputError(f"{folder}: not a whole pack ({error})") from None
        if self.template not in TEMPLATES:
            raise InputError(f"{folder}: its crop, '{self.template}', is none that this version knows")

    def map(self, name: str, kind: str) -> np.ndarray:
        path = self.folder / name
        return np.asarray(np.memmap(path, kind, "r")) if path.stat().st_size else np.zeros(0, kind)

    def __len__(self):
        return len(self.n_frames)

    def __reduce__(self):  # a worker process gets the name and maps the files anew
        return Pack, (self.folder,)

    def frame(self, c: int, k: int) -> np.ndarray:
        """Frame k of clip c, uint8 (H, W, 3)"""
        return self.decode(c, k).copy()

    def decode(self, c: int, k: int) -> np.ndarray:
        """frame(c, k), read-only: Pillow's own memory"""
        assert 0 <= k < self.n_frames[c], f"frame {k} of clip {c}, which has {self.n_frames[c]}"
        i = self.frame_start[c] + k
        jpeg = self.jpegs[self.jpeg_start[i] : self.jpeg_start[i + 1]]
        try:
            return np.asarray(Image.open(io.BytesIO(jpeg), formats=("JPEG",)))
        except OSError as error:
            raise InputError(f"{self.folder}: frame {k} of clip {c} is damaged ({error})") from None

    def frames(self, c: int, ks) -> np.ndarray:
        """Frames ks of clip c, uint8 (len(ks), H, W, 3); a frame asked for twice is decoded once."""
        decoded = {k: self.decode(c, k) for k in dict.fromkeys(map(int, ks))}
        return np.stack([decoded[int(k)] for k in ks])

    def sound(self, c: int) -> np.ndarray:
        """The sound of clip c, float32 (n,) in [-1, 1] at 16 kHz; sample 640 k is the beginning of frame k"""
        return self.lazy_sound(c)[:]

    def lazy_sound(self, c: int) -> "LazySound":
        return LazySound(self.samples[self.sound_start[c] : self.sound_start[c + 1]])

    def windows(self, c: int, ks) -> np.ndarray:
        """Mel windows of frames ks of clip c, float32 (len(ks), 1, 80, 16); ks may lie outside the clip."""
        return sound_windows(self.lazy_sound(c), np.asarray(ks))

    @cached_property
    def fingerprints(self) -> torch.Tensor:
        """int64 (clips,): see `fingerprints`. Reads all sound, once."""
        return fingerprints(map(self.sound, range(len(self))))

    def source(self, c: int) -> str:
        """The file it came from"""
        name = self.names[self.source_start[c] : self.source_start[c + 1]].tobytes()
        return name.decode("utf-8", "surrogateescape")


class LazySound:
    """int16 samples (n,) on disk that become float32 where they are sliced: a window of an hour's sound costs
    what one of a second's does."""

    ndim = 1

    def __init__(self, samples: np.ndarray):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.samples[part].astype(np.float32) / 32768


# ------------------------------------------------------------------------------------------------------------
# what is held out: one rule for everything that is trained

USES = dict(train="train on", valid="validate on", test="test on")
SEVERAL = 10  # people; ours: where there are fewer, clips are held out, not people


def split_options(p: Parser):
    """The options that `split` reads"""
    for part, use in USES.items():
        text = f"list of clips or people of --data to {use}, one name a line; default: every tenth is held out"
        p.add_argument(f"--{part}", metavar="FILE", help=text)


def split(pack: Pack, args=None) -> dict:
    """-> dict(train, valid, test), the numbers of a pack's clips, each in one part at most; test may be empty.

    Every tenth person is held out, or every tenth clip where there are fewer than SEVERAL people; of fewer than twenty
    the last two. By turns they validate, which chooses the checkpoint, and test.
    args: has data, and of split_options train, valid and test. A listed part is that list. Beside a train list
    everything else is held out. Without data it is the toy world, whose held-out people are in no pack: all is in all.
    Raises InputError: a name of no clip, or of several files; a clip in two lists; too few clips.
    """
    lists = {part: path for part in USES if (path := getattr(args, part, None))}
    if args is not None and not args.data:
        if lists:
            raise InputError(f"--{next(iter(lists))} lists clips of --data, which is not given")
        return dict.fromkeys(USES, np.arange(len(pack)))
    parts = {part: named_clips(pack, path) for part, path in lists.items()}
    taken, count = np.unique(np.concatenate([np.zeros(0, int), *parts.values()]), return_counts=True)
    if (count > 1).any():
        raise InputError(f"{', '.join(lists.values())}: {pack.source(taken[count > 1][0])} is in two of them")
    free = np.setdiff1d(np.arange(len(pack)), taken)
    units = np.unique(unit_of(pack)[free])
    left = [part for part in ("valid", "test") if part not in parts]
    held = units if "train" in parts else units[9::10]
    if len(held) < len(left) and "train" not in parts:
        held = units[1:][-len(left) :]
    parts |= zip(left, by_turns(pack, free[np.isin(unit_of(pack)[free], held)], len(left)))
    if "train" not in parts:
        parts["train"] = np.setdiff1d(free, np.concatenate(list(parts.values())))
    for part in ("train", "valid"):
        if not len(parts[part]):
            raise InputError(f"{pack.folder}: {len(pack)} clips leave none to {USES[part]}")
    return {part: parts[part] for part in USES}


def unit_of(pack: Pack) -> np.ndarray:
    """(clips,): what is held out as a whole, the person or the clip"""
    return np.asarray(pack.identity) if len(pack.identities) >= SEVERAL else np.arange(len(pack))


def by_turns(pack: Pack, clips: np.ndarray, n: int = 2) -> list[np.ndarray]:
    """Clips dealt to n parts, person by person or clip by clip"""
    unit = unit_of(pack)[clips]
    return [clips[np.isin(unit, np.unique(unit)[k::n])] for k in range(n)]


def named_clips(pack: Pack, path: str | Path) -> np.ndarray:
    """Numbers of the clips that a list names: a person, or the end of a file's path, with or without its suffix.
    Raises InputError: see split."""
    lines = check_file(path).read_text(errors="replace").splitlines()
    found = {name: {} for line in lines if (name := line.strip())}  # name -> {clip: its file}
    for c in range(len(pack)):
        source = pack.source(c)
        file = source.rpartition("#")[0] or source  # of a video, without where in it the clip begins
        names = {pack.identities[pack.identity[c]]}
        for whole in (Path(source), Path(file), Path(file).with_suffix("")):
            names |= {"/".join(whole.parts[k:]) for k in range(len(whole.parts))} | {str(whole)}
        for name in names & found.keys():
            found[name][c] = file
    for name, files in found.items():
        if not files:
            raise InputError(f"{path}: '{name}' is no clip and no person of {pack.folder}")
        if len(set(files.values())) > 1 and name not in pack.identities:
            raise InputError(f"{path}: '{name}' is the name of several files, write more of the path")
    return np.array(sorted({c for files in found.values() for c in files}), int)


def fingerprints(sounds) -> torch.Tensor:
    """Sounds of clips (n,) -> int64, a number each, by which a clip is known in any pack and at any size of picture"""
    digests = (hashlib.blake2b(to_int16(wav).tobytes(), digest_size=8).digest() for wav in sounds)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)


def clips_used(checkpoint: dict, pack: Pack, path: str | Path) -> dict:
    """-> dict(train, valid): fingerprints of the clips that trained and that chose a checkpoint. A file of before they
    were stored counts as trained on this pack by the rule of `split`, which leaves its test part."""
    used = checkpoint.get("clips")
    if not isinstance(used, dict) or not all(torch.is_tensor(used.get(part)) for part in ("train", "valid")):
        print(f"{path}: does not say what it was trained on; of {pack.folder} the test part counts", file=sys.stderr)
        return {part: pack.fingerprints[clips] for part, clips in split(pack).items() if part != "test"}
    return used


def known_clips(pack: Pack, *prints: torch.Tensor) -> np.ndarray:
    """Numbers of the clips whose fingerprint is among these"""
    return np.flatnonzero(torch.isin(pack.fingerprints, torch.cat(prints)).numpy())


# ------------------------------------------------------------------------------------------------------------
# batches: item n is a function of (seed, n) alone, whichever process asks, so a resumed run goes on exactly


def elsewhere(rng: np.random.Generator, length: int, begin: int, end: int) -> int | None:
    """One of 0 .. length-1 outside begin .. end-1, all equally likely; None where there is none."""
    begin, end = max(begin, 0), min(end, length)
    if end - begin >= length:
        return None
    k = int(rng.integers(length - (end - begin)))
    return k if k < begin else k + end - begin


class Clips(Dataset):
    """Windows of T consecutive frames for stage 3. Clips are drawn uniformly, then windows within the clip.

    flip: half of the items are mirrored, each as a whole. A clip shorter than T stands still at its end.
    Photos (clips of one frame) are left out.
    hear: sound windows beyond the frames, on each side (for a temporal convolution that reaches so far).
    clips: the numbers of the clips to draw from; all where None.
    mfcc: items also have mfcc (13, 20), SyncNet v2's sound of the five frames from this one of the window on.
    """

    def __init__(self, pack: Pack, T: int, seed: int, flip: bool = True, hear: int = 0, clips=None, mfcc=None):
        self.pack, self.T, self.seed, self.flip, self.hear, self.mfcc = pack, T, seed, flip, hear, mfcc
        clips = np.arange(len(pack)) if clips is None else np.asarray(clips)
        self.clips = clips[pack.n_frames[clips] > 1]  # the others are photos
        if not len(self.clips):
            raise InputError(f"{pack.folder}: holds photos only, windows are drawn from videos")

    def __len__(self):
        return ENDLESS

    def __getitem__(self, n: int) -> dict:
        """-> source (3, H, W), driving (T, 3, H, W) in [-1, 1], mel (T + 2 hear, 1, 80, 16),
        wrong_mel (1, 80, 16), and the numbers identity, clip, frames (T,), wrong_frame.

        Source: any frame of the clip but the driving ones (unless there is no other). Wrong: the sound of a
        moment of the same clip, NEAR frames or more from the window's middle.
        """
        rng = np.random.default_rng([self.seed, n, self.T])
        c = int(self.clips[rng.integers(len(self.clips))])
        length = int(self.pack.n_frames[c])
        first = int(rng.integers(max(1, length - self.T + 1)))
        window = np.arange(first, first + self.T)
        source = elsewhere(rng, length, first, first + self.T)
        source = first if source is None else source
        middle = min(first + self.T // 2, length - 1)
        wrong = elsewhere(rng, length, middle - NEAR + 1, middle + NEAR)
        wrong = middle + NEAR if wrong is None else wrong  # behind the end: silence
        frames = np.minimum(window, length - 1)
        pictures = self.pack.frames(c, [source, *frames])  # (1 + T, H, W, 3)
        if self.flip and rng.random() < 0.5:
            pictures = pictures[:, :, ::-1]
        pictures = to_tensor(np.ascontiguousarray(pictures))
        heard = np.arange(first - self.hear, first + self.T + self.hear)
        mel = torch.from_numpy(self.pack.windows(c, heard))
        wrong_mel = torch.from_numpy(self.pack.windows(c, [wrong]))[0]
        numbers = dict(identity=int(self.pack.identity[c]), clip=c, frames=torch.from_numpy(frames))
        if self.mfcc is not None:  # four steps a frame, from a frame earlier on: pre-emphasis looks back
            wav = sound_of(self.pack.lazy_sound(c), first + self.mfcc - 1, first + self.mfcc + 6)
            numbers["mfcc"] = torch.from_numpy(mfcc(wav)[:, 4:24]).float()
        return (
            dict(source=pictures[0], driving=pictures[1:], mel=mel, wrong_mel=wrong_mel, wrong_frame=wrong)
            | numbers
        )


class Frames(Dataset):
    """Single pictures for stages 1 and 2: a person uniformly, then a clip of theirs, then a frame.

    Item: picture (3, H, W) in [-1, 1], identity. clips: the numbers of the clips to draw from; all where None.
    """

    def __init__(self, pack: Pack, seed: int, flip: bool = True, clips=None):
        self.pack, self.seed, self.flip = pack, seed, flip
        clips = np.arange(len(pack)) if clips is None else np.asarray(clips)
        identity = np.asarray(pack.identity)[clips]
        self.order = clips[np.argsort(identity, kind="stable")]  # clips, person by person
        self.people, self.first = np.unique(np.sort(identity), return_index=True)
        self.first = np.append(self.first, len(clips))

    def __len__(self):
        return ENDLESS

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng([self.seed, n])
        who = int(rng.integers(len(self.people)))
        c = int(self.order[rng.integers(self.first[who], self.first[who + 1])])
        picture = self.pack.frame(c, int(rng.integers(self.pack.n_frames[c])))
        if self.flip and rng.random() < 0.5:
            picture = picture[:, ::-1]
        return dict(picture=to_tensor(np.ascontiguousarray(picture)), identity=int(self.people[who]))


class Mixed(Dataset):
    """Items of two datasets, `share` of them from the second: frames of clips, and photos."""

    def __init__(self, first: Dataset, second: Dataset, share: float, seed: int):
        self.datasets, self.share, self.seed = (first, second), share, seed

    def __len__(self):
        return ENDLESS

    def __getitem__(self, n: int) -> dict:
        return self.datasets[int(np.random.default_rng([self.seed, n, 2]).random() < self.share)][n]


class From(Sampler):
    """start, start + 1, ..: a position in the data is one number."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self):
        n = self.start
        while True:
            yield n
            n += 1


def batches(dataset: Dataset, batch: int, start_step: int = 0, workers: int = 0):
    """Endless iterator of collated batches; its first is the one of step start_step, whatever came before."""
    if not workers:
        for step in From(start_step):
            yield default_collate([dataset[n] for n in range(step * batch, (step + 1) * batch)])
    options = dict(
        sampler=From(start_step * batch), num_workers=workers, pin_memory=torch.cuda.is_available()
    )
    yield from DataLoader(dataset, batch, prefetch_factor=4, **options)


# ------------------------------------------------------------------------------------------------------------
# videos and photos -> pack: jobs, one a file, are done by several processes and written in their order

EVERY = 5  # frames between two looks of the detector (ours: a fifth of a second)
BRIDGE = 3  # looks; ours: a face that is gone for longer, .6 s, ends its clip
SEGMENT = 150  # frames of a clip at most: what is held in memory while its box is found, 415 MB at 720p
SHORTEST = 10  # frames; ours: one five-frame window, and another that is no neighbour
HIGHEST = 720  # pixels: videos are decoded at this height at most
STEADY = 0.35  # of the box: a face that moves farther has no box of its own in one clip
CUT, SUDDEN = 20, 4  # a cut changes the mean pixel by so many of 255, and so many times as much as its neighbours
CLOSE = 0.12  # of the crop: a square photo whose face lies so near to the template's is used whole (ours)
SURE = 1  # frame: what a sync expert is wrong by on a clip of three seconds (ours)
PHOTOS = 64  # photos of an archive in one job
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif",
                  ".heic", ".heif")  # the last two so that the manifest says what is wrong with them


def scenes(frames: list[np.ndarray]) -> np.ndarray:
    """Frames of a video -> the number of the scene of each, (n,) from 0 on. Looks at 256 pixels of each frame."""
    H, W = frames[0].shape[:2]
    rows, columns = (np.arange(16) * 2 + 1) * H // 32, (np.arange(16) * 2 + 1) * W // 32
    small = np.stack([frame[rows[:, None], columns] for frame in frames]).astype(np.float32)  # (n, 16, 16, 3)
    change = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))  # (n - 1,) from each frame to the next
    cut = np.zeros(len(frames), bool)
    for k in np.flatnonzero(change > CUT):
        near = np.delete(change[max(0, k - EVERY) : k + EVERY + 1], min(k, EVERY))
        cut[k + 1] = not len(near) or change[k] > SUDDEN * np.median(near)
    return np.cumsum(cut)


def face_tracks(looks: list[list[tuple]], scene: np.ndarray) -> list[dict]:
    """Faces of each look (vision.find_faces) and the scene of each -> tracks, {number of the look: face}: one face
    followed through one scene, missed by no more than BRIDGE - 1 looks in a row."""
    tracks = []
    for i, faces in enumerate(looks):
        open_tracks = [t for t in tracks if i - max(t) <= BRIDGE and scene[max(t)] == scene[i]]
        pairs = [(overlap(t[max(t)], face), n, k) for n, t in enumerate(open_tracks) for k, face in enumerate(faces)]
        taken = set()
        for likeness, n, k in sorted(pairs, reverse=True):
            if likeness > SAME_FACE and i not in open_tracks[n] and k not in taken:
                open_tracks[n][i] = faces[k]
                taken.add(k)
        tracks += [{i: face} for k, face in enumerate(faces) if k not in taken]
    return tracks


def steady_parts(track: dict, begin: int, end: int, template: str) -> list[tuple]:
    """A track in frames begin .. end-1 -> [(begin, end, box)]: itself with the median of its boxes, or, where that does
    not hold the face, its halves' parts."""
    boxes = np.array([face_box([face], template) for face in track.values()])  # (n, 4)
    box = np.median(boxes, 0)
    if np.percentile(np.abs(boxes - box).max(1), 90) <= STEADY * (box[2] - box[0]):
        return [(begin, end, tuple(map(float, box)))]
    looks = sorted(track)
    half = len(looks) // 2
    parts = (looks[:half], begin, looks[half] * EVERY), (looks[half:], looks[half] * EVERY, end)
    return [clip for part, a, b in parts for clip in steady_parts({i: track[i] for i in part}, a, b, template)]


def pieces(frames: list[np.ndarray], template: str = "face") -> list[tuple]:
    """Frames of a stretch of video -> [(begin, end, box or None, reason)], which share it out: clips have one box each
    that cannot wobble, the median of what was found; what is no clip has a reason.

    A clip ends where the scene ends, or the face is gone, or one box would not hold it. Of several faces the one that
    fills most of picture and time is taken, then those of other times.
    """
    scene = scenes(frames)
    looks = find_faces(frames[::EVERY])
    tracks = face_tracks(looks, scene[::EVERY])
    tracks.sort(key=lambda track: -sum((f[2] - f[0]) * (f[3] - f[1]) for f in track.values()))
    clips, taken = [], []
    for track in tracks:
        begin, end = min(track) * EVERY, max(track) * EVERY + 1
        same = np.flatnonzero(scene == scene[begin])  # frames
        if same[0] > begin - EVERY:  # the scene's first look: the face was there from its beginning on
            begin = int(same[0])
        if same[-1] < end - 1 + EVERY:
            end = int(same[-1]) + 1
        if all(end <= a or b <= begin for a, b in taken):
            taken.append((begin, end))
            parts = steady_parts(track, begin, end, template)
            clips += [clip for clip in parts if clip[1] - clip[0] >= SHORTEST]
    seen, gaps, at = sum(map(bool, looks)), [], 0
    for begin, end, _ in [*sorted(clips), (len(frames), len(frames), None)]:
        if at < begin:
            found = "no face" if not seen else "no face for long enough, or one that moves too far"
            gaps.append((at, begin, None, f"{found} (a face in {seen} of {len(looks)} frames looked at)"))
        at = end
    return sorted([(*clip, "") for clip in clips] + gaps)


def segment_box(frames: list[np.ndarray]) -> tuple:
    """One box for all of a few seconds' frames (uint8 (H, W, 3)): that of the longest clip in them.

    Raises InputError, without the file's name: no clip, or one shorter than half of the frames.
    """
    begin, end, box, reason = max(pieces(frames), key=lambda piece: (piece[2] is not None, piece[1] - piece[0]))
    if box is None or 2 * (end - begin) < len(frames):
        raise InputError(reason or "a face that stays for less than half of the time")
    return box


def prepare_video(path: Path, size: int, template: str, sync: Path | None = None, isolate: bool = False):
    """One video, decoded once -> (what became of a stretch of it, JPEGs, samples) one by one, in order.

    Raises InputError: not a video, no sound, damaged. Sound is read first, so of most such files nothing gets
    into the pack; of a video whose pictures break off, what came before does.
    """
    info, wav = probe(path), load_audio(path)
    wav = set_level(isolate_voice(wav)) if isolate else wav  # again: what was taken out is not speech
    height = min(info.height, HIGHEST)
    total = n_frames(len(wav))
    length = -(-total // -(-total // SEGMENT))  # as even as can be: no rest of a few frames
    stream, at = read_video(path, height=height), 0
    while frames := list(islice(stream, min(length, total - at))):
        for begin, end, box, reason in pieces(frames, template):
            segment = dict(begin=at + begin, frames=end - begin, outcome="skipped", reason=reason)
            jpegs, late = [], 0
            if box is not None:
                crops = [crop_face(frame, box, size) for frame in frames[begin:end]]
                if sync:
                    late = lateness(sync, crops, template, sound_of(wav, at + begin, at + end), segment)
                if not segment["reason"]:
                    jpegs = [encode_jpeg(crop, size) for crop in crops]
                    box = [round(v * info.height / height, 2) for v in box]
                    segment = dict(segment, outcome="packed", box=box, fps=info.fps)
            yield segment, jpegs, to_int16(sound_of(wav, at + begin + late, at + end + late)) if jpegs else None
        at += len(frames)
    if at < total - 1:  # frames of the sound's end that have no picture
        yield dict(begin=at, frames=total - at, outcome="skipped", reason="sound without picture"), [], None


def sound_of(wav: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The samples of frames begin .. end-1, silence where there are none."""
    begin, end = begin * SAMPLES_PER_FRAME, end * SAMPLES_PER_FRAME
    before, after = max(0, -begin), max(0, end - max(begin, len(wav)))
    return np.pad(wav[max(0, begin) : max(0, end)], (before, min(after, end - begin)))


@lru_cache(1)
def sync_expert(path: Path):
    from syncnet import load_sync  # here: syncnet imports this room

    return load_sync(path, "cpu")


def lateness(sync: Path, crops: list[np.ndarray], template: str, wav: np.ndarray, segment: dict) -> int:
    """By how many frames the sound of a clip is late, by the expert in the file `sync`; 0 where that is no more than
    its own error. The segment gets what it found, and a reason to skip the clip where mouth and sound fit nowhere."""
    from syncnet import SPAN, best_offset, by_shift, embed

    expert = sync_expert(sync)
    size = len(crops[0])
    x, y, side = (size * v for v in square_within(template, expert.template))
    if (x, y, side) != (0, 0, expert.size):
        crops = [crop_face(crop, (x, y, x + side, y + side), expert.size) for crop in crops]
    assert len(crops) >= SPAN, "a clip is longer than a window"
    late, confidence, fit = best_offset(by_shift(expert, *embed(expert, crops, log_mel(wav), "cpu")))
    segment |= dict(late=late, confidence=round(confidence, 2), fit=round(fit, 2))
    if fit <= 0:
        segment["reason"] = "mouth and sound do not fit"
    return late if abs(late) > SURE else 0


def photo_box(image: np.ndarray, template: str) -> tuple:
    """The crop of a photo, uint8 (H, W, 3): all of a square one that is cropped as ours already, else around its
    largest face. Raises InputError, without the file's name: no upright face, or one that the picture's edge cuts off."""
    H, W = image.shape[:2]
    faces = detect_faces(image, margins=(1.5,))
    if not faces:
        raise InputError("no face that is upright was found")
    box = face_box(faces, template)
    if H == W and np.abs(np.subtract(box, (0, 0, W, H))).max() < CLOSE * W:
        return (0.0, 0.0, float(W), float(H))
    if max(-box[0], -box[1], box[2] - W, box[3] - H) > CLOSE * (box[2] - box[0]):
        raise InputError("the face is cut off by the edge of the picture")
    return box


@lru_cache(1)
def open_archive(path: Path) -> tuple:
    """An .npz of JPEGs -> jpeg, uint8 (bytes of all files end to end); offset (n + 1,); name (n,). Raises InputError."""
    try:
        with np.load(check_file(path), allow_pickle=False) as archive:
            jpeg, offset, names = (archive[key] for key in ("jpeg", "offset", "name"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected an .npz with jpeg, offset and name ({error})") from None
    if len(offset) != len(names) + 1 or offset[0] or offset[-1] != len(jpeg) or (np.diff(offset) < 0).any():
        raise InputError(f"{path}: its offsets and names do not belong together")
    return jpeg, offset, names


def prepare_photo(path: Path | io.BytesIO, name: str, size: int, template: str):
    """One photo -> a clip of one frame without sound, as prepare_video. Raises InputError: not a picture, no face."""
    image = load_photo(path, name)
    box = photo_box(image, template)
    segment = dict(begin=0, frames=1, outcome="packed", reason="", box=[round(v, 2) for v in box], fps=0.0)
    yield segment, [encode_jpeg(crop_face(image, box, size), size)], np.zeros(0, "<i2")


@dataclass(frozen=True)
class Job:
    """One file to prepare, or photos first .. first + PHOTOS - 1 of an archive; names are told, paths are opened."""

    path: Path
    name: str
    kind: str  # "video", "photo" or "archive"
    size: int
    template: str
    spool: Path  # what the parent will write into the pack: of each clip all JPEGs, then its samples
    sync: Path | None = None
    isolate: bool = False
    first: int = 0

    def inputs(self):
        """-> name, identity, source, and a generator as prepare_video's, of each video or photo."""
        parts = Path(self.name).parts
        who = parts[0] if len(parts) > 1 else Path(self.name).stem  # the folder, or the file by itself
        if self.kind == "video":
            yield self.name, who, str(self.path), prepare_video(
                self.path, self.size, self.template, self.sync, self.isolate)
        elif self.kind == "photo":
            yield self.name, who, str(self.path), prepare_photo(self.path, "", self.size, self.template)
        else:
            jpeg, offset, names = open_archive(self.path)
            for i in range(self.first, min(self.first + PHOTOS, len(names))):
                content, source = io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()), f"{self.path}#{names[i]}"
                segments = prepare_photo(content, source, self.size, self.template)
                yield f"{self.name}#{names[i]}", Path(names[i]).stem, source, segments


def work(job: Job) -> list[dict]:
    """Does a job in any process -> lines of the manifest, whose packed segments also have the lengths of their JPEGs
    and the number of their samples; these bytes lie in the job's spool: memory does not grow with a video's length."""
    lines = []
    with open(job.spool, "wb") as spool:
        for name, who, source, segments in job.inputs():
            line = dict(path=name, identity=who, source=source, segments=[])
            for segment, jpegs, samples in caught(segments, line):
                if jpegs:
                    segment |= dict(jpegs=list(map(spool.write, jpegs)), n_samples=len(samples))
                    spool.write(samples.tobytes())
                line["segments"].append(segment)
            lines.append(line)
    return lines


def caught(segments, line: dict):
    """The segments; what goes wrong with a file is told in its line of the manifest, and the others go on."""
    try:
        yield from segments
    except InputError as error:
        line["reason"] = str(error)
    except Exception as error:  # no file may end a run of days; the kind says that it is ours to mend
        line["reason"] = f"{type(error).__name__}: {error}"


def start_worker():
    """A worker process: one thread, and it ends with its parent, also where that is killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def watch():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(jobs: list[Job], workers: int):
    """(job, its lines) in the order of the jobs, whoever is first. InputError: a worker died."""
    if workers <= 1:
        yield from ((job, work(job)) for job in jobs)
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), start_worker)
    waiting, rest = deque(), iter(jobs)
    try:
        while True:
            while len(waiting) < 4 * workers and (job := next(rest, None)):
                waiting.append((job, pool.submit(work, job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            yield job, future.result()
    except BrokenProcessPool:
        raise InputError("a worker process died (out of memory?): run it again, with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def jobs_of(folder: Path, out: Path, spools: Path, done: list[str], **common) -> list[Job]:
    """The jobs that are left when the manifest has lines about `done`, in the order of the files' names; common: a Job's
    size, sync and isolate.

    A folder in which more than half of the files are named as pictures is one of photos; an .npz is an archive.
    """
    if folder.is_file():
        count = len(open_archive(folder)[2])
        return [Job(folder, folder.name, "archive", spool=spools / str(first), first=first, **common)
                for first in range(len(done), count, PHOTOS)]
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and out.absolute() not in p.absolute().parents)
    photos = 2 * sum(p.suffix.lower() in PHOTO_SUFFIXES for p in paths) > len(paths)
    names, done = [str(p.relative_to(folder)) for p in paths], set(done)
    return [Job(path, name, "photo" if photos else "video", spool=spools / str(i), **common)
            for i, (path, name) in enumerate(zip(paths, names)) if name not in done]


def pour(job: Job, lines: list[dict], pack: PackWriter, log, person: str | None):
    """The clips of a finished job into the pack, then its lines into the manifest; the spool goes."""
    with open(job.spool, "rb") as spool:
        for line in lines:
            who, source = person or line.pop("identity"), line.pop("source")
            line.pop("identity", None)
            for segment in line["segments"]:
                if segment["outcome"] == "packed":
                    jpegs = [spool.read(length) for length in segment.pop("jpegs")]
                    samples = np.frombuffer(spool.read(2 * segment.pop("n_samples")), "<i2")
                    at = "" if job.kind != "video" else f"#{segment['begin']}"
                    pack.add_encoded(jpegs, samples, who, source + at, segment["box"], segment["fps"])
            log.write(json.dumps(line).encode() + b"\n")
            log.flush()
    job.spool.unlink()


def prepare(folder: Path, out: Path, size: int, workers: int = 1, person: str | None = None,
            sync: Path | None = None, isolate: bool = False, template: str = "face") -> list[dict]:
    """All files below `folder`, videos or photos, or an archive of photos -> a pack at `out`; manifest.jsonl there has
    a line for each, also returned.

    person: who it is in all of them; None: the folder in `folder` says it. sync: file of a sync expert that corrects
    offsets and drops clips that do not fit. isolate: of the sound the speech alone, what repeats taken down. template:
    how faces are cropped, see vision.TEMPLATES. The pack is the same whatever the number of workers. A killed run goes
    on where it stopped: behind the last file that the manifest names.
    Raises InputError: no detector; not one clip; `out` cannot be written or holds a pack.
    """
    if find_faces([]) is None:
        raise InputError("no face detector's weights are at hand: set TORCH_HOME to where they are")
    manifest, lines = out / "manifest.jsonl", []
    if manifest.exists():  # a killed run's last line may be torn
        lines = [line for line in manifest.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    outcomes = [json.loads(line) for line in lines]
    packed = sum(segment["outcome"] == "packed" for outcome in outcomes for segment in outcome["segments"])
    with PackWriter(out, size, template, keep=packed) as pack, open(manifest, "ab") as log:
        log.truncate(sum(map(len, lines)))
        for left in out.glob(".spool-*"):  # a killed run's; the pack is ours alone
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=".spool-", dir=out) as spools:
            done = [outcome["path"] for outcome in outcomes]
            jobs = jobs_of(folder, out, Path(spools), done, size=size, template=template, sync=sync, isolate=isolate)
            for job, found in tqdm(in_order(jobs, workers), "files", len(jobs), disable=None):
                pour(job, found, pack, log, person)
                outcomes += found
        if not pack.sources:
            raise InputError(f"{folder}: no clip in {len(outcomes)} files, {manifest} says why")
    return outcomes


def contact_sheet(pack: Pack, columns: int = 10, rows: int = 6) -> Image.Image:
    """The middle frame of up to columns x rows clips, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(pack) - 1, columns * rows).round().astype(int))
    sheet = Image.new("RGB", (columns * pack.size, -(-len(chosen) // columns) * pack.size))
    for i, c in enumerate(chosen):
        frame = Image.fromarray(pack.frame(c, pack.n_frames[c] // 2))
        sheet.paste(frame, (i % columns * pack.size, i // columns * pack.size))
    return sheet


def report(pack: Pack, outcomes: list[dict], seconds: float, out: Path):
    """Prints what came of how much, and how fast."""
    segments = [segment for outcome in outcomes for segment in outcome["segments"]]
    used = sum(any(s["outcome"] == "packed" for s in outcome["segments"]) for outcome in outcomes)
    frames = sum(segment["frames"] for segment in segments)
    kept = int(pack.frame_start[-1])
    print(f"{out}: {len(pack)} clips, {len(pack.identities)} people, {kept} frames, {100 * kept / frames:.1f} % of "
          f"{frames} in {len(outcomes)} files, {used} of them used; why not the others: {out}/manifest.jsonl")
    late = np.array([segment["late"] for segment in segments if "late" in segment])
    if len(late):
        print(f"sound late by {np.median(late):+.0f} frames at the median; by more than {SURE}, so moved, in "
              f"{np.mean(np.abs(late) > SURE):.0%} of {len(late)} clips")
    print(f"{seconds:.0f} s, {frames / seconds:.0f} frames a second; look at {out}/sheet.png")


def main():
    parser = Parser(description="A folder of videos or photos -> a pack to train on.")
    help = "folder of videos or of photos; a folder in it is one person, a file another. Or an .npz of JPEGs"
    parser.add_argument("videos", type=Path, help=help)
    parser.add_argument("out", type=Path, help="folder of the pack; a killed run's is continued")
    sizes = dict(type=int, default=128, choices=(32, 64, 128, 256))
    parser.add_argument("--size", **sizes, help="edge of the crops in pixels (default 128)")
    help = "the crop: face; or ffhq, with more around the face, as published StyleGAN2, pSp and HyperStyle files know it"
    parser.add_argument("--template", default="face", choices=("face", "ffhq"), help=help)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--one-person", action="store_true", help="all files show one person, named as the folder")
    help = "checkpoint of a sync expert (syncnet.py): corrects each clip's offset, drops clips that do not fit"
    parser.add_argument("--check-sync", type=Path, metavar="FILE", help=help)
    help = "take music and noise that repeat down (librosa's vocal separation; 0.2 s a second of sound)"
    parser.add_argument("--isolate-voice", action="store_true", help=help)
    args = parser.parse_args(workers=(1, 256))
    if not args.videos.is_dir() and not (args.videos.suffix == ".npz" and args.videos.is_file()):
        raise InputError(f"{args.videos}: no such directory, nor an .npz of photos")
    if args.check_sync:
        sync_expert(args.check_sync)  # refused now, not in every worker
    begun, person = time.time(), args.videos.absolute().name if args.one_person else None
    try:
        outcomes = prepare(args.videos, args.out, args.size, args.workers, person, args.check_sync, args.isolate_voice,
                           args.template)
        pack = Pack(args.out)
        contact_sheet(pack).save(args.out / "sheet.png")
    except OSError as error:  # of the output; what cannot be read is a line of the manifest
        raise InputError(f"{args.out}: cannot be written ({error.strerror})") from None
    report(pack, outcomes, time.time() - begun, args.out)


if __name__ == "__main__":
    run(main)
