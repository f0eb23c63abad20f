"""Packs: the dataset on disk, written, read and sampled.

A pack is a directory: all frames as JPEGs end to end (frames.bin), all sound as int16 at 16 kHz end to end (sound.bin),
an index of plain arrays, and meta.json. The big files are memory-mapped: reading any frame is one disk access.

The paper (FC-TFG, arXiv 2304.03275, section 3.5) does not say how frames are drawn for training. All of that is ours.
"""

import bisect
import fcntl
import hashlib
import io
import itertools
import json
import re
import sys
from array import array
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from audio import mfcc, sound_windows
from checkpoint import FORMAT, wrap_errors
from faces import TEMPLATES, complete_lines
from media import SAMPLES_PER_FRAME, InputError, Parser, atomic_write, check_file, to_int16, to_tensor

# ----------------------------------------------------------------------------------------------------------- packs

# The index has one number per clip, except jpeg_start (per frame) and box (four). *_start have one more, the last end.
INDEX = dict(
    frame_start=np.int64, n_frames=np.int32, sound_start=np.int64, n_samples=np.int64, identity=np.int32,
    box=np.float32, fps=np.float32, source_start=np.int64, jpeg_start=np.int64)


def encode_jpeg(frame: np.ndarray, size: int) -> bytes:
    """uint8 (size, size, 3) -> JPEG. Up to 64 px colour keeps its full resolution, since halving it blurs the lips."""
    assert frame.shape == (size, size, 3) and frame.dtype == np.uint8, f"frame is {frame.dtype} {frame.shape}"
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=95, subsampling=0 if size <= 64 else 2)
    return file.getvalue()


class PackWriter:
    """Writes a pack clip by clip. meta.json is written last: without it the directory is an unfinished pack.
    size: edge of the frames in pixels. template: a name in faces.TEMPLATES. n_kept: continue an unfinished pack after
    its first n_kept clips, as listed in journal.jsonl, which gets a line after each clip. shard_of: the folder of
    videos, if this pack holds a part of it. options: of the run, equal when it is continued. InputError: the directory
    holds a pack, or an unfinished one begun with other options, or is in use. OSError: it cannot be written."""

    def __init__(self, folder: str | Path, size: int, template: str, n_kept: int = 0, shard_of: str | None = None,
                 options: dict | None = None):
        assert template in TEMPLATES, f"template '{template}' is none of {sorted(TEMPLATES)}"
        self.folder, self.size, self.header = Path(folder).absolute(), size, dict(size=size, template=template)
        self.options = options or {}
        self.origin = dict(shard_of=str(shard_of)) if shard_of else {}
        self.index = {name: [] for name in ("n_frames", "n_samples", "identity", "box", "fps")}
        self.jpeg_start = array("q", [0])  # not a list: 75 million numbers take 600 MB here, 3 GB there
        self.identities, self.sources = {}, []  # identities: name -> number, by first appearance
        if (self.folder / "meta.json").exists():
            raise InputError(f"{folder}: holds a pack already, name another directory")
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ("frames.bin", "sound.bin", "journal.jsonl")
        self.files = self.frames, self.sound, self.journal = [open(self.folder / name, "ab") for name in names]
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another run is writing there") from None
        self.continue_after(n_kept)

    def continue_after(self, n_kept: int):
        """Reads the first n_kept clips from the journal and cuts the three files after them."""
        header = json.dumps(self.header | self.options).encode() + b"\n"
        lines = complete_lines(self.folder / "journal.jsonl")[: 1 + n_kept] if n_kept else []
        if n_kept and (len(lines) <= n_kept or lines[0] != header):
            raise InputError(f"{self.folder}: begun with other options, or its journal is damaged: remove it")
        for line in lines[1:]:
            self.add_to_index(json.loads(line))
        self.frames.truncate(self.jpeg_start[-1])
        self.sound.truncate(2 * sum(self.index["n_samples"]))
        self.journal.truncate(sum(map(len, lines)))
        self.journal.write(b"" if lines else header)

    def add_to_index(self, clip: dict):  # clip: one line of the journal
        number = self.identities.setdefault(clip["identity"], len(self.identities))
        for name, column in self.index.items():
            column.append(number if name == "identity" else clip[name])
        self.sources.append(clip["source"])
        self.jpeg_start.extend(self.jpeg_start[-1] + np.cumsum(clip["jpegs"]))

    def add(self, frames, wav: np.ndarray, identity: str, source: str, box=None, fps: float = 25.0):
        """Adds a clip. frames: iterable of uint8 (size, size, 3), or of JPEGs by encode_jpeg. wav: (n,) at 16 kHz,
        float in [-1, 1] or int16. identity: name of the person. source: name of the file. box: crop in the source."""
        samples = wav if wav.dtype == np.int16 else to_int16(wav)
        jpegs = (frame if isinstance(frame, bytes) else encode_jpeg(frame, self.size) for frame in frames)
        lengths = [self.frames.write(jpeg) for jpeg in jpegs]
        assert lengths, "a clip has at least one frame"
        self.sound.write(samples.tobytes())
        clip = dict(n_frames=len(lengths), n_samples=len(samples), identity=identity, source=source, fps=fps,
                    box=[float(v) for v in (box or (0, 0, 0, 0))], jpegs=lengths)
        self.frames.flush()
        self.sound.flush()  # before the journal: each of its lines stands for a complete clip
        self.journal.write(json.dumps(clip).encode() + b"\n")
        self.journal.flush()
        self.add_to_index(clip)

    def finish(self):
        """Writes the index, then meta.json."""
        assert self.sources, "a pack has at least one clip"
        names = [source.encode("utf-8", "surrogateescape") for source in self.sources]  # any file name
        (self.folder / "sources.txt").write_bytes(b"".join(names))
        lengths = dict(frame=self.index["n_frames"], sound=self.index["n_samples"], source=list(map(len, names)))
        starts = {f"{name}_start": np.cumsum([0, *column]) for name, column in lengths.items()}
        columns = dict(self.index, jpeg_start=self.jpeg_start, **starts)
        for name, dtype in INDEX.items():
            np.save(self.folder / f"{name}.npy", np.asarray(columns[name], dtype))
        meta = dict(format=FORMAT, **self.header, identities=list(self.identities), **self.origin)
        with atomic_write(self.folder / "meta.json") as draft:
            draft.write_text(json.dumps(meta))
        (self.folder / "journal.jsonl").unlink()
        self.close_files()

    def close_files(self):  # without finish(), it leaves an unfinished pack
        for file in self.files:
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.close_files() if error else self.finish()


class Pack:
    """A pack, open for reading: .size, .template, .identities (names of the people), and for each clip c: .n_frames[c],
    .identity[c] (index in .identities), .box[c] (x0, y0, x1, y1 in the upright source picture with square pixels),
    .fps[c] (of the source). .packs: [self], see Packs. InputError: no pack, or missing or damaged files."""

    def __init__(self, folder: str | Path):
        self.folder, self.packs = Path(folder).absolute(), [self]
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such directory, expected a pack written by prepare.py")
        if not (self.folder / "meta.json").is_file():
            raise InputError(f"{folder}: not a pack, or an unfinished one (meta.json is missing)")
        with wrap_errors(folder, "a damaged pack"):
            meta = json.loads((self.folder / "meta.json").read_text())
            self.size, self.template, self.identities = meta["size"], meta["template"], meta["identities"]
            self.source_folder = meta.get("shard_of", str(self.folder))  # shards of one folder share its people
            for name in INDEX:  # np.asarray: indexing an np.memmap is slow
                setattr(self, name, np.asarray(np.load(self.folder / f"{name}.npy", "r", allow_pickle=False)))
            self.jpegs, self.samples = self.map_file("frames.bin", "u1"), self.map_file("sound.bin", "<i2")
            self.names = self.map_file("sources.txt", "u1")
            if (meta["format"] != FORMAT or not len(self) or len(self.frame_start) != len(self) + 1
                    or len(self.jpeg_start) != self.frame_start[-1] + 1
                    or len(self.jpegs) != self.jpeg_start[-1] or len(self.samples) != self.sound_start[-1]):
                raise ValueError("the sizes of its files disagree")
            if self.template not in TEMPLATES:
                raise ValueError(f"its crop is '{self.template}', expected one of {sorted(TEMPLATES)}")

    def map_file(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / name
        return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)

    def __len__(self):
        return len(self.n_frames)

    def __reduce__(self):  # a worker process gets the paths and maps the files itself
        return open_packs, ([pack.folder for pack in self.packs],)

    def locate(self, c: int) -> tuple[int, int]:
        """Clip c -> index of its pack in .packs, number of the clip in that pack"""
        return 0, c

    def frame(self, c: int, k: int) -> np.ndarray:
        """Frame k of clip c, uint8 (H, W, 3)"""
        assert 0 <= k < self.n_frames[c], f"frame {k} of clip {c}, which has {self.n_frames[c]}"
        i, c = self.locate(c)
        pack = self.packs[i]
        j = pack.frame_start[c] + k
        with wrap_errors(pack.folder, f"frame {k} of clip {c} is damaged"):
            jpeg = io.BytesIO(pack.jpegs[pack.jpeg_start[j] : pack.jpeg_start[j + 1]])
            return np.array(Image.open(jpeg, formats=("JPEG",)))

    def frames(self, c: int, ks) -> np.ndarray:
        """Frames ks of clip c, uint8 (len(ks), H, W, 3)"""
        return np.stack([self.frame(c, int(k)) for k in ks])

    def sound(self, c: int) -> np.ndarray:
        """Sound of clip c, float32 (n,) in [-1, 1] at 16 kHz. Frame k begins at sample 640 k."""
        i, c = self.locate(c)
        pack = self.packs[i]
        return pack.samples[pack.sound_start[c] : pack.sound_start[c + 1]].astype(np.float32) / 32768

    def windows(self, c: int, ks, voice_norm: bool = False) -> np.ndarray:
        """Mel windows of frames ks of clip c, float32 (len(ks), 1, 80, 16). Frames outside the clip are silent."""
        return sound_windows(self.sound(c), np.asarray(ks), voice_norm)

    @cached_property
    def fingerprints(self) -> torch.Tensor:
        """int64 (clips,), see hash_sounds. The first access reads all sound."""
        return hash_sounds(map(self.sound, range(len(self))))

    def source(self, c: int) -> str:
        """Name of the file that clip c was cut from"""
        i, c = self.locate(c)
        pack = self.packs[i]
        name = pack.names[pack.source_start[c] : pack.source_start[c + 1]].tobytes()
        return name.decode("utf-8", "surrogateescape")


def check_same_format(packs: list):
    """InputError: the packs differ in size or template"""
    first, *others = packs
    for pack in others:
        if (pack.size, pack.template) != (first.size, first.template):
            raise InputError(f"{pack.folder}: {pack.size} px, template {pack.template}; {first.folder} has "
                             f"{first.size} px, template {first.template}")


class Packs(Pack):
    """Several packs that read as one. Clips, frames and people are numbered consecutively over .packs. People of
    different packs are different people even if their names are equal, except in shards of one folder. Only .packs
    have .box, .fps, .frame_start and .jpeg_start. InputError: see check_same_format; a pack is named twice."""

    def __init__(self, folders):
        self.packs = packs = [Pack(folder) for folder in folders]
        check_same_format(packs)
        if len({pack.folder for pack in packs}) < len(packs):
            raise InputError(f"{' '.join(map(str, folders))}: a pack is named twice")
        self.size, self.template, self.folder = packs[0].size, packs[0].template, " ".join(map(str, folders))
        people, identity = {}, []  # people: (folder of videos, name) -> number
        for pack in packs:
            numbers = [people.setdefault((pack.source_folder, name), len(people)) for name in pack.identities]
            identity.append(np.array(numbers, np.int32)[pack.identity])
        self.identities, self.identity = [name for _, name in people], np.concatenate(identity)
        self.n_frames = np.concatenate([pack.n_frames for pack in packs])
        self.first_clip = np.cumsum([0, *map(len, packs)]).tolist()  # of each pack

    def locate(self, c: int) -> tuple[int, int]:
        i = bisect.bisect(self.first_clip, c) - 1
        return i, c - self.first_clip[i]


def open_packs(folders) -> Pack:
    """A folder, or a list of one or more (--data) -> Pack. InputError: see Pack and Packs."""
    folders = [folders] if isinstance(folders, str | Path) else folders
    return Pack(folders[0]) if len(folders) == 1 else Packs(folders)


def cut_sound(wav: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Samples of frames begin .. end - 1. Outside the sound they are zero."""
    begin, end = begin * SAMPLES_PER_FRAME, end * SAMPLES_PER_FRAME
    inside, before = wav[max(0, begin) : max(0, end)], min(max(0, -begin), end - begin)
    return np.pad(inside, (before, end - begin - before - len(inside)))


# -------------------------------------------------------- held-out clips: one rule for everything that is trained

PART_PURPOSES = dict(train="train on", valid="validate on", test="test on")
MIN_PEOPLE = 10  # ours: a pack with fewer people has single clips held out, not people
MAX_BALANCED = 2**24  # clip numbers that balance_people returns at most: 128 MB


def add_split_options(p: Parser):
    """Options that `split` and `balance_people` read"""
    p.add_argument("--by-person", action="store_true", help="draw all people of --data equally often, not all clips")
    for part, purpose in PART_PURPOSES.items():
        text = f"list of clips or people of --data to {purpose}, one name per line; default: every tenth is held out"
        p.add_argument(f"--{part}", metavar="FILE", help=text)


def split(pack: Pack, args=None) -> dict:
    """-> dict(train, valid, test) of clip numbers. Each clip is in at most one part. test may be empty.

    Every tenth person is held out, or every tenth clip if there are fewer than MIN_PEOPLE people; if these are fewer than
    twenty, the last two. They go to valid, which selects the checkpoint, and to test in turn. args: data and the options
    of add_split_options. A list replaces the rule for its part. With a list for training all other clips are held out.
    Without data (the toy world) each part has all clips. InputError: see read_clip_list; a clip in two lists; no clip."""
    lists = {part: getattr(args, part) for part in PART_PURPOSES if getattr(args, part, None)}
    if args is not None and not args.data:
        if lists:
            raise InputError(f"--{next(iter(lists))} lists clips of --data, which is not given")
        return dict.fromkeys(PART_PURPOSES, np.arange(len(pack)))
    parts = {part: read_clip_list(pack, path) for part, path in lists.items()}
    listed, count = np.unique(np.concatenate([np.zeros(0, int), *parts.values()]), return_counts=True)
    if (count > 1).any():
        raise InputError(f"{', '.join(lists.values())}: {pack.source(listed[count > 1][0])} is in two of them")
    unlisted = np.setdiff1d(np.arange(len(pack)), listed)
    # a unit is held out as a whole: all clips of a person, or one clip
    unit_of_clip = np.asarray(pack.identity) if len(pack.identities) >= MIN_PEOPLE else np.arange(len(pack))
    units = np.unique(unit_of_clip[unlisted])
    unlisted_parts = [part for part in ("valid", "test") if part not in lists]
    held_out = units if "train" in lists else units[9::10]
    if len(held_out) < len(unlisted_parts) and "train" not in lists:
        held_out = units[1:][-len(unlisted_parts) :]
    for k, part in enumerate(unlisted_parts):
        parts[part] = unlisted[np.isin(unit_of_clip[unlisted], held_out[k :: len(unlisted_parts)])]
    if "train" not in lists:
        parts["train"] = np.setdiff1d(unlisted, np.concatenate(list(parts.values())))
    for part in ("train", "valid"):
        if not len(parts[part]):
            raise InputError(f"{pack.folder}: {len(pack)} clips leave none to {PART_PURPOSES[part]}")
    return {part: parts[part] for part in PART_PURPOSES}


def balance_people(pack: Pack, clips: np.ndarray, args) -> np.ndarray:
    """Training clips -> clip numbers that are drawn with equal probability. With --by-person people take turns, and
    people with few clips repeat them. Beyond MAX_BALANCED numbers, people with many clips lose the last ones."""
    if not getattr(args, "by_person", False):
        return clips
    if not args.data:
        raise InputError("--by-person chooses clips of --data, which is not given")
    identity = pack.identity[clips]
    people, count = np.unique(identity, return_counts=True)
    clips_by_person = np.split(clips[np.argsort(identity, kind="stable")], np.cumsum(count)[:-1])
    clips_each = min(count.max(), -(-MAX_BALANCED // len(people)))
    return np.stack([np.resize(c, clips_each) for c in clips_by_person], 1).ravel()  # (clips_each * people,)


def read_clip_list(pack: Pack, path: str | Path) -> np.ndarray:
    """Numbers of the clips in a list. Each line is the name of a person, or the end of a file's path, with or without
    its suffix. InputError: a name fits no clip, or several files"""
    lines = [line.strip() for line in check_file(path).read_text("utf-8-sig", "surrogateescape").splitlines()]
    matches = {name: {} for name in lines if name}  # name -> {clip: its file}
    for c in range(len(pack)):
        source = pack.source(c)
        file = re.sub(r"#\d+$", "", source)  # the source of a video's clip ends in #first frame
        names = {pack.identities[pack.identity[c]]}
        for form in (Path(source), Path(file), Path(file).with_suffix("")):
            names |= {"/".join(form.parts[k:]) for k in range(len(form.parts))} | {str(form)}
        for name in names & matches.keys():
            matches[name][c] = file
    for name, files in matches.items():
        if not files:
            raise InputError(f"{path}: '{name}' fits no clip and no person of {pack.folder}")
        if len(set(files.values())) > 1 and name not in pack.identities:
            raise InputError(f"{path}: '{name}' is the name of several files, write more of the path")
    return np.array(sorted({c for files in matches.values() for c in files}), int)


def hash_sounds(sounds) -> torch.Tensor:
    """Sounds of clips, each (n,) -> int64 hashes. They identify a clip in any pack and at any size of frames.
    All photos, and silent clips of equal length, share a hash."""
    digests = (hashlib.blake2b(to_int16(wav).tobytes(), digest_size=8).digest() for wav in sounds)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)


def find_used_clips(checkpoint: dict, pack: Pack, path: str | Path) -> dict:
    """-> dict(train, valid): clips of the pack that trained a checkpoint and that selected it, by their fingerprints.
    A checkpoint without fingerprints counts as trained on this pack by the rule of `split`."""
    used, parts = checkpoint.get("clips"), ("train", "valid")
    if isinstance(used, dict) and all(torch.is_tensor(used.get(part)) for part in parts):
        return {part: np.flatnonzero(torch.isin(pack.fingerprints, used[part]).numpy()) for part in parts}
    print(f"{path}: does not list its training clips; only the test part of {pack.folder} is used", file=sys.stderr)
    return {part: split(pack)[part] for part in parts}


# --------------------------- endless datasets: item n is a function of the seed and n, so a resumed run is exact

class Clips(Dataset):
    """Windows of T consecutive frames for stage 3. Clips are drawn uniformly, then a window within the clip.

    clips: numbers of the clips to draw from, default all; photos are skipped. A clip shorter than T repeats its last
    frame. flip: mirror half of the items. context: mel windows beyond the frames on each side. voice_norm: see audio.py.
    sync_sound: "mel" or "mfcc" adds the middle frame's sound for a sync expert: mel (1, 80, 16) or MFCC (13, 20)."""

    def __init__(self, pack: Pack, T: int, seed: int, flip: bool = True, context: int = 0, clips=None,
                 voice_norm: bool = False, sync_sound: str | None = None):
        self.pack, self.T, self.seed, self.flip, self.context = pack, T, seed, flip, context
        self.voice_norm, self.sync_sound = voice_norm, sync_sound
        clips = np.arange(len(pack)) if clips is None else np.asarray(clips)
        self.clips = clips[pack.n_frames[clips] > 1]
        if not len(self.clips):
            raise InputError(f"{pack.folder}: holds photos only, windows are drawn from videos")

    def __getitem__(self, n: int) -> dict:
        """-> source (3, H, W) and driving (T, 3, H, W) in [-1, 1], mel (T + 2 context, 1, 80, 16), identity, clip,
        frames (T,). The source is any frame of the clip that is not a driving frame, if there is one."""
        rng = np.random.default_rng([self.seed, n, self.T])
        c = int(self.clips[rng.integers(len(self.clips))])
        length = int(self.pack.n_frames[c])
        first = int(rng.integers(max(1, length - self.T + 1)))
        driving = np.arange(first, first + self.T).clip(max=length - 1)
        other_frames = np.setdiff1d(np.arange(length), driving)
        source = rng.choice(other_frames) if len(other_frames) else first
        frames = self.pack.frames(c, [source, *driving])
        images = to_flipped_tensor(frames, self.flip and rng.random() < 0.5)  # (1 + T, 3, H, W)
        mel = self.pack.windows(c, np.arange(first - self.context, first + self.T + self.context), self.voice_norm)
        item = dict(source=images[0], driving=images[1:], mel=torch.from_numpy(mel), clip=c,
                    identity=int(self.pack.identity[c]), frames=torch.from_numpy(driving))
        middle = first + (self.T - 1) // 2
        if self.sync_sound == "mel":
            plain = self.pack.windows(c, [middle])[0] if self.voice_norm else mel[self.context + middle - first]
            item["sync_sound"] = torch.from_numpy(plain)
        elif self.sync_sound == "mfcc":  # five frames of four steps; the frames beside them are context
            wav = cut_sound(self.pack.sound(c), middle - 3, middle + 4)
            item["sync_sound"] = torch.from_numpy(mfcc(wav)[:, 4:24]).float()
        return item


def to_flipped_tensor(images: np.ndarray, flip: bool) -> torch.Tensor:
    """uint8 (.., H, W, 3) -> float (.., 3, H, W) in [-1, 1], mirrored if flip"""
    return to_tensor(np.ascontiguousarray(images[..., ::-1, :]) if flip else images)


class Frames(Dataset):
    """Single images for stages 1 and 2: a person is drawn uniformly, then one of their clips, then a frame of it.
    Item: image (3, H, W) in [-1, 1], identity. clips: numbers of the clips to draw from, default all. change: a function
    (frame, clip, its number in the clip, rng) -> frame; items get `changed`, the same image, in half of them after it."""

    def __init__(self, pack: Pack, seed: int, clips=None, change=None):
        self.pack, self.seed, self.change = pack, seed, change
        clips = np.arange(len(pack)) if clips is None else np.asarray(clips)
        identity = np.asarray(pack.identity)[clips]
        self.order = clips[np.argsort(identity, kind="stable")]  # clips, person by person
        self.people, count = np.unique(identity, return_counts=True)
        self.first = np.cumsum([0, *count])  # of each person in .order

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng([self.seed, n])
        person = int(rng.integers(len(self.people)))
        c = int(self.order[rng.integers(self.first[person], self.first[person + 1])])
        k = int(rng.integers(self.pack.n_frames[c]))
        frame = self.pack.frame(c, k)
        flip = rng.random() < 0.5
        item = dict(image=to_flipped_tensor(frame, flip), identity=int(self.people[person]))
        if self.change:
            item["changed"] = to_flipped_tensor(self.change(frame, c, k, rng) if rng.random() < 0.5 else frame, flip)
        return item


class Mixed(Dataset):
    """Items of two datasets, such as frames of clips and photos. share: probability of an item of the second one."""

    def __init__(self, first: Dataset, second: Dataset, share: float, seed: int):
        self.datasets, self.share, self.seed = (first, second), share, seed

    def __getitem__(self, n: int) -> dict:
        return self.datasets[int(np.random.default_rng([self.seed, n, 2]).random() < self.share)][n]


def batches(dataset: Dataset, batch: int, start_step: int = 0, workers: int = 0, rank: int = 0, world: int = 1):
    """Endless iterator of collated batches from step start_step on. Process `rank` gets every world-th item."""
    numbers = itertools.count(start_step * batch * world + rank, world)
    generator = torch.Generator()  # a separate one: the loader's seeds for workers must not change a run's draws
    options = dict(prefetch_factor=4, pin_memory=torch.cuda.is_available()) if workers else {}
    yield from DataLoader(dataset, batch, sampler=numbers, num_workers=workers, generator=generator, **options)
