"""Packs: the dataset on disk, written, read and sampled.

A pack is a directory: all frames as JPEGs end to end (frames.bin), all sound as int16 at 16 kHz end to end (sound.bin),
an index of plain arrays, and meta.json. The big files are memory-mapped: any frame of any clip is one read.

How frames are drawn is ours: the paper (FC-TFG, arXiv 2304.03275, section 3.5) does not say it.
"""

import bisect
import fcntl
import hashlib
import io
import itertools
import json
import os
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
from faces import TEMPLATES
from media import SAMPLES_PER_FRAME, InputError, Parser, check_file, to_int16, to_tensor, wrap_os_errors

# ----------------------------------------------------------------------------------------------------------- packs

# the index: one number a clip, except jpeg_start (a frame) and box (four); *_start have one more, the end
INDEX = dict(
    frame_start=np.int64, n_frames=np.int32, sound_start=np.int64, n_samples=np.int64, identity=np.int32,
    box=np.float32, fps=np.float32, source_start=np.int64, jpeg_start=np.int64)


def encode_jpeg(frame: np.ndarray, size: int) -> bytes:
    """uint8 (size, size, 3) -> a JPEG; up to 64 px colour keeps its full resolution (half is too little for lips)."""
    assert frame.shape == (size, size, 3) and frame.dtype == np.uint8, f"frame is {frame.dtype} {frame.shape}"
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=95, subsampling=0 if size <= 64 else 2)
    return file.getvalue()


class PackWriter:
    """Writes a pack clip by clip. meta.json is written last and makes the directory a pack. size: edge of the
    frames in pixels. template: of faces.TEMPLATES. keep: continue an unfinished pack behind its first `keep`
    clips, by journal.jsonl, which has a line for each clip, written after it. shard_of: the folder of which this
    pack has a part. InputError: the folder holds a pack, cannot be written, is in use, or has another size."""

    def __init__(self, folder: str | Path, size: int, template: str, keep: int = 0, shard_of: str | None = None):
        assert template in TEMPLATES, f"template '{template}' is none of {sorted(TEMPLATES)}"
        self.folder, self.size, self.head = Path(folder).absolute(), size, dict(size=size, template=template)
        self.more = dict(shard_of=str(shard_of)) if shard_of else {}
        self.index = {name: [] for name in ("n_frames", "n_samples", "identity", "box", "fps")}
        self.jpeg_start = array("q", [0])  # not a list: 75 million numbers are 600 MB, not 3 GB
        self.identities, self.sources = {}, []
        if (self.folder / "meta.json").exists():
            raise InputError(f"{folder}: holds a pack already, name another directory")
        with wrap_os_errors(folder, "written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.open(keep)

    def open(self, keep: int):
        """Opens the three files, cut behind the first `keep` clips."""
        self.files = {name: open(self.folder / name, "ab") for name in ("frames.bin", "sound.bin", "journal.jsonl")}
        frames, sound, journal = self.files.values()
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another run is writing there") from None
        head = json.dumps(self.head).encode() + b"\n"
        with open(journal.name, "rb") as file:
            lines = list(itertools.islice(file, 1 + keep)) if keep else [head]
        if len(lines) <= keep or lines[0] != head:
            raise InputError(f"{self.folder}: was begun with other options, or its journal is damaged: remove it")
        for line in lines[1:]:
            self.append(json.loads(line))
        frames.truncate(self.jpeg_start[-1])
        sound.truncate(2 * sum(self.index["n_samples"]))
        journal.truncate(sum(map(len, lines)) if keep else 0)
        journal.write(b"" if keep else head)

    def append(self, clip: dict):
        """One line of the journal -> the index."""
        people = self.identities  # names become numbers in the order of their appearance
        for name, column in self.index.items():
            column.append(people.setdefault(clip[name], len(people)) if name == "identity" else clip[name])
        self.sources.append(clip["source"])
        self.jpeg_start.extend(self.jpeg_start[-1] + np.cumsum(clip["jpegs"]))

    def add(self, frames, wav: np.ndarray, identity: str, source: str, box=None, fps: float = 25.0):
        """Adds a clip. frames: iterable of uint8 (size, size, 3), or of JPEGs by encode_jpeg. wav: (n,) at 16 kHz,
        float in [-1, 1] or int16. identity, source: names of person and file. box: of the crop in the source."""
        to_frames, to_sound, journal = self.files.values()
        samples = wav if wav.dtype == np.int16 else to_int16(wav)
        jpegs = (frame if isinstance(frame, bytes) else encode_jpeg(frame, self.size) for frame in frames)
        lengths = [to_frames.write(jpeg) for jpeg in jpegs]
        assert lengths, "a clip has at least one frame"
        to_sound.write(samples.tobytes())
        clip = dict(n_frames=len(lengths), n_samples=len(samples), identity=identity, source=source, fps=fps,
                    box=[float(v) for v in (box or (0, 0, 0, 0))], jpegs=lengths)
        to_frames.flush()
        to_sound.flush()  # the clip first, then its line in the journal
        journal.write(json.dumps(clip).encode() + b"\n")
        journal.flush()
        self.append(clip)

    def close(self):
        """Writes the index, then meta.json."""
        assert self.sources, "a pack has at least one clip"
        names = [source.encode("utf-8", "surrogateescape") for source in self.sources]  # any file name
        (self.folder / "sources.txt").write_bytes(b"".join(names))
        columns = dict(self.index, jpeg_start=self.jpeg_start)
        for name, lengths in (("frame", self.index["n_frames"]), ("sound", self.index["n_samples"]),
                              ("source", map(len, names))):
            columns[f"{name}_start"] = np.cumsum([0, *lengths])
        for name, kind in INDEX.items():
            np.save(self.folder / f"{name}.npy", np.asarray(columns[name], kind))
        draft = self.folder / ".meta.json"
        draft.write_text(json.dumps(dict(format=FORMAT, **self.head, identities=list(self.identities)) | self.more))
        self.release()
        os.replace(draft, self.folder / "meta.json")
        (self.folder / "journal.jsonl").unlink()

    def release(self):
        """Stops without finishing; `keep` can continue."""
        for file in self.files.values():
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close() if kind is None else self.release()


class Pack:
    """A pack, open for reading, memory-mapped: .size, .template, .identities (names), and for each clip c:
    .n_frames[c], .identity[c] (its place in .identities), .box[c] (x0, y0, x1, y1 in the source picture), .fps[c]
    (of the source). .packs: itself, see Packs. InputError: no pack there, or one with missing or damaged files."""

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
            for name in INDEX:  # np.asarray: np.memmap's own indexing is slow
                setattr(self, name, np.asarray(np.load(self.folder / f"{name}.npy", "r", allow_pickle=False)))
            self.jpegs, self.samples = self.map("frames.bin", "u1"), self.map("sound.bin", "<i2")
            self.names = self.map("sources.txt", "u1")
            sizes = (len(self.jpegs), self.jpeg_start[-1]), (len(self.samples), self.sound_start[-1])
            sizes += (len(self.jpeg_start) - 1, self.frame_start[-1]), (len(self.frame_start), len(self) + 1)
            if meta["format"] != FORMAT or not len(self) or any(a != b for a, b in sizes):
                raise ValueError("the sizes of its files disagree")
            if self.template not in TEMPLATES:
                raise ValueError(f"its crop is '{self.template}', expected one of {sorted(TEMPLATES)}")

    def map(self, name: str, kind: str) -> np.ndarray:
        path = self.folder / name
        return np.asarray(np.memmap(path, kind, "r")) if path.stat().st_size else np.zeros(0, kind)

    def __len__(self):
        return len(self.n_frames)

    def __reduce__(self):  # a worker process gets the paths and maps the files itself
        return open_packs, ([pack.folder for pack in self.packs],)

    def locate(self, c: int) -> tuple[int, int]:
        """Clip c -> number of its pack in .packs, its number there"""
        return 0, c

    def at(self, c: int) -> tuple:
        """Clip c -> its pack, its number there"""
        i, c = self.locate(c)
        return self.packs[i], c

    def frame(self, c: int, k: int) -> np.ndarray:
        """Frame k of clip c, uint8 (H, W, 3)"""
        assert 0 <= k < self.n_frames[c], f"frame {k} of clip {c}, which has {self.n_frames[c]}"
        pack, c = self.at(c)
        i = pack.frame_start[c] + k
        with wrap_errors(pack.folder, f"frame {k} of clip {c} is damaged"):
            jpeg = io.BytesIO(pack.jpegs[pack.jpeg_start[i] : pack.jpeg_start[i + 1]])
            return np.array(Image.open(jpeg, formats=("JPEG",)))

    def frames(self, c: int, ks) -> np.ndarray:
        """Frames ks of clip c, uint8 (len(ks), H, W, 3)"""
        return np.stack([self.frame(c, int(k)) for k in ks])

    def sound(self, c: int) -> np.ndarray:
        """The sound of clip c, float32 (n,) in [-1, 1] at 16 kHz; frame k begins at sample 640 k"""
        pack, c = self.at(c)
        return pack.samples[pack.sound_start[c] : pack.sound_start[c + 1]].astype(np.float32) / 32768

    def windows(self, c: int, ks, voice_norm: bool = False) -> np.ndarray:
        """Mel windows of frames ks of clip c, float32 (len(ks), 1, 80, 16); ks may lie outside the clip."""
        return sound_windows(self.sound(c), np.asarray(ks), voice_norm)

    @cached_property
    def fingerprints(self) -> torch.Tensor:
        """int64 (clips,): see hash_sounds. Reads all sound, once."""
        return hash_sounds(map(self.sound, range(len(self))))

    def source(self, c: int) -> str:
        """The file that clip c comes from"""
        pack, c = self.at(c)
        name = pack.names[pack.source_start[c] : pack.source_start[c + 1]].tobytes()
        return name.decode("utf-8", "surrogateescape")


def check_same_format(packs: list):
    """InputError: packs of different sizes or templates"""
    for pack in packs[1:]:
        if (pack.size, pack.template) != (packs[0].size, packs[0].template):
            raise InputError(f"{pack.folder}: {pack.size} px, template {pack.template}; {packs[0].folder} has "
                             f"{packs[0].size} px, template {packs[0].template}")


class Packs(Pack):
    """Several packs, read as one: clips, frames and people are numbered on from pack to pack. People of different
    packs are different, also if their names are equal; those of shards of one folder are not. .packs: the packs;
    .box, .fps and the index of JPEGs are theirs alone. InputError: see check_same_format; one named twice."""

    def __init__(self, folders):
        self.packs = packs = [Pack(folder) for folder in folders]
        check_same_format(packs)
        if len({pack.folder for pack in packs}) < len(packs):
            raise InputError(f"{' '.join(map(str, folders))}: a pack is named twice")
        self.size, self.template, self.folder = packs[0].size, packs[0].template, " ".join(map(str, folders))
        people = {}  # (folder, name) -> number
        number = [[people.setdefault((pack.source_folder, name), len(people)) for name in pack.identities]
                  for pack in packs]
        self.identities = [name for _, name in people]
        self.identity = np.concatenate([np.array(n, np.int32)[pack.identity] for n, pack in zip(number, packs)])
        self.n_frames = np.concatenate([pack.n_frames for pack in packs])
        self.frame_start = np.append(0, np.cumsum(self.n_frames, dtype=np.int64))
        self.first = np.cumsum([0, *map(len, packs)]).tolist()  # number of each pack's first clip

    def locate(self, c: int) -> tuple[int, int]:
        i = bisect.bisect(self.first, c) - 1
        return i, c - self.first[i]


def open_packs(folders) -> Pack:
    """--data: a folder, or a list of one or more -> a Pack. Raises InputError: see Pack and Packs."""
    folders = [folders] if isinstance(folders, str | Path) else folders
    return Pack(folders[0]) if len(folders) == 1 else Packs(folders)


def cut_sound(wav: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The samples of frames begin .. end-1, silence outside the sound."""
    begin, end = begin * SAMPLES_PER_FRAME, end * SAMPLES_PER_FRAME
    before, after = max(0, -begin), max(0, end - max(begin, len(wav)))
    return np.pad(wav[max(0, begin) : max(0, end)], (before, min(after, end - begin)))


# ----------------------------------------------------- the held-out clips: one rule for everything that is trained

PART_PURPOSES = dict(train="train on", valid="validate on", test="test on")
MIN_PEOPLE = 10  # ours: in packs of fewer people single clips are held out, not people
MOST_DRAWN = 2**24  # numbers of balance_people: 128 MB


def add_split_options(p: Parser):
    """The options that `split` and `balance_people` read"""
    p.add_argument("--by-person", action="store_true", help="train on every person as often, not on every clip of --data")
    for part, use in PART_PURPOSES.items():
        text = f"list of clips or people of --data to {use}, one name a line; default: every tenth is held out"
        p.add_argument(f"--{part}", metavar="FILE", help=text)


def split(pack: Pack, args=None) -> dict:
    """-> dict(train, valid, test) of clip numbers, each clip in one part at most; test may be empty.

    Every tenth person is held out, or every tenth clip where there are fewer than MIN_PEOPLE people; of fewer than
    twenty the last two. They go by turns to valid, which chooses the checkpoint, and to test. args: has data and
    the lists of add_split_options, which replace the rule; beside a train list all else is held out. Without data (the
    toy world) all clips are in all parts. InputError: see read_clip_list; a clip in two lists; too few clips."""
    lists = {part: path for part in PART_PURPOSES if (path := getattr(args, part, None))}
    if args is not None and not args.data:
        if lists:
            raise InputError(f"--{next(iter(lists))} lists clips of --data, which is not given")
        return dict.fromkeys(PART_PURPOSES, np.arange(len(pack)))
    parts = {part: read_clip_list(pack, path) for part, path in lists.items()}
    taken, count = np.unique(np.concatenate([np.zeros(0, int), *parts.values()]), return_counts=True)
    if (count > 1).any():
        raise InputError(f"{', '.join(lists.values())}: {pack.source(taken[count > 1][0])} is in two of them")
    free = np.setdiff1d(np.arange(len(pack)), taken)
    unit = np.asarray(pack.identity) if len(pack.identities) >= MIN_PEOPLE else np.arange(len(pack))  # held out whole
    units, left = np.unique(unit[free]), [part for part in ("valid", "test") if part not in parts]
    held = units if "train" in parts else units[9::10]
    if len(held) < len(left) and "train" not in parts:
        held = units[1:][-len(left) :]
    parts |= {part: free[np.isin(unit[free], held[k :: len(left)])] for k, part in enumerate(left)}
    parts.setdefault("train", np.setdiff1d(free, np.concatenate(list(parts.values()))))
    for part in ("train", "valid"):
        if not len(parts[part]):
            raise InputError(f"{pack.folder}: {len(pack)} clips leave none to {PART_PURPOSES[part]}")
    return {part: parts[part] for part in PART_PURPOSES}


def balance_people(pack: Pack, clips: np.ndarray, args) -> np.ndarray:
    """Clips to train on -> numbers of which each is to be drawn alike. With --by-person clips of the people who have few
    are repeated, person by person in turn (of people who have very many, the last are left out)."""
    if not getattr(args, "by_person", False):
        return clips
    if not args.data:
        raise InputError("--by-person chooses clips of --data, which is not given")
    identity = pack.identity[clips]
    people, count = np.unique(identity, return_counts=True)
    own = np.split(clips[np.argsort(identity, kind="stable")], np.cumsum(count)[:-1])  # the clips of each person
    rows = min(count.max(), -(-MOST_DRAWN // len(people)))
    return np.stack([np.resize(c, rows) for c in own], 1).ravel()  # (rows * people,)


def read_clip_list(pack: Pack, path: str | Path) -> np.ndarray:
    """Numbers of the clips in a list. A line is a person, or the end of a file's path, with or without its suffix.
    InputError: a name that fits no clip, or several files"""
    lines = check_file(path).read_text(errors="replace").splitlines()
    found = {name: {} for line in lines if (name := line.strip())}  # name -> {clip: its file}
    for c in range(len(pack)):
        source = pack.source(c)
        file = source.rpartition("#")[0] or source  # of a video: without "#first frame of the clip"
        names = {pack.identities[pack.identity[c]]}
        for whole in (Path(source), Path(file), Path(file).with_suffix("")):
            names |= {"/".join(whole.parts[k:]) for k in range(len(whole.parts))} | {str(whole)}
        for name in names & found.keys():
            found[name][c] = file
    for name, files in found.items():
        if not files:
            raise InputError(f"{path}: '{name}' fits no clip and no person of {pack.folder}")
        if len(set(files.values())) > 1 and name not in pack.identities:
            raise InputError(f"{path}: '{name}' is the name of several files, write more of the path")
    return np.array(sorted({c for files in found.values() for c in files}), int)


def hash_sounds(sounds) -> torch.Tensor:
    """Sounds of clips (n,) -> int64 hashes, which identify a clip in any pack and at any size of picture"""
    digests = (hashlib.blake2b(to_int16(wav).tobytes(), digest_size=8).digest() for wav in sounds)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)


def find_used_clips(checkpoint: dict, pack: Pack, path: str | Path) -> dict:
    """-> dict(train, valid): numbers of a pack's clips that trained and that chose a checkpoint, by fingerprints.
    A file without them counts as trained on this pack by the rule of `split`."""
    used, parts = checkpoint.get("clips"), ("train", "valid")
    if isinstance(used, dict) and all(torch.is_tensor(used.get(part)) for part in parts):
        return {part: np.flatnonzero(torch.isin(pack.fingerprints, used[part]).numpy()) for part in parts}
    print(f"{path}: does not list its training clips; only the test part of {pack.folder} is used", file=sys.stderr)
    return {part: split(pack)[part] for part in parts}


# --------- endless datasets: item n depends on (seed, n) alone, in any process, so a resumed run continues exactly

class Clips(Dataset):
    """Windows of T consecutive frames for stage 3. Clips are drawn uniformly, then windows within the clip.

    clips: numbers of the clips to draw from, default all; photos are left out. A clip shorter than T repeats its
    last frame. flip: half of the items are mirrored. context: mel windows beyond the frames on each side.
    voice_norm: of mel, see audio.py. mfcc: for SyncNet v2. With either, sync_sound is a sync expert's sound of the
    middle frame: (13, 20), or a plain (1, 80, 16)."""

    def __init__(self, pack: Pack, T: int, seed: int, flip: bool = True, context: int = 0, clips=None,
                 voice_norm: bool = False, mfcc: bool = False):
        self.pack, self.T, self.seed, self.flip, self.context = pack, T, seed, flip, context
        self.voice_norm, self.mfcc = voice_norm, mfcc
        clips = np.arange(len(pack)) if clips is None else np.asarray(clips)
        self.clips = clips[pack.n_frames[clips] > 1]
        if not len(self.clips):
            raise InputError(f"{pack.folder}: holds photos only, windows are drawn from videos")

    def __getitem__(self, n: int) -> dict:
        """-> source (3, H, W), driving (T, 3, H, W) in [-1, 1], mel (T + 2 context, 1, 80, 16), identity, clip,
        frames (T,). The source is any frame of the clip except the driving ones (unless there is no other)."""
        rng = np.random.default_rng([self.seed, n, self.T])
        c = int(self.clips[rng.integers(len(self.clips))])
        length = int(self.pack.n_frames[c])
        first = int(rng.integers(max(1, length - self.T + 1)))
        driving = np.arange(first, first + self.T).clip(max=length - 1)
        others = np.setdiff1d(np.arange(length), driving)
        source = rng.choice(others) if len(others) else first
        frames = self.pack.frames(c, [source, *driving])
        images = to_flipped_tensor(frames, self.flip and rng.random() < 0.5)  # (1 + T, 3, H, W)
        mel = self.pack.windows(c, np.arange(first - self.context, first + self.T + self.context), self.voice_norm)
        item = dict(source=images[0], driving=images[1:], mel=torch.from_numpy(mel),
                    identity=int(self.pack.identity[c]), clip=c, frames=torch.from_numpy(driving))
        middle = first + (self.T - 1) // 2
        if self.mfcc:  # five frames; four steps a frame, from a frame earlier on: pre-emphasis looks back
            wav = cut_sound(self.pack.sound(c), middle - 3, middle + 4)
            item["sync_sound"] = torch.from_numpy(mfcc(wav)[:, 4:24]).float()
        elif self.voice_norm:
            item["sync_sound"] = torch.from_numpy(self.pack.windows(c, [middle])[0])
        return item


def to_flipped_tensor(images: np.ndarray, flip: bool) -> torch.Tensor:
    """uint8 (.., H, W, 3) -> float (.., 3, H, W) in [-1, 1], mirrored or not"""
    return to_tensor(np.ascontiguousarray(images[..., ::-1, :]) if flip else images)


class Frames(Dataset):
    """Single images for stages 1 and 2: a person uniformly, then one of their clips, then a frame. Item: image (3,
    H, W) in [-1, 1], identity. clips: numbers of the clips to draw from, default all."""

    def __init__(self, pack: Pack, seed: int, flip: bool = True, clips=None):
        self.pack, self.seed, self.flip = pack, seed, flip
        clips = np.arange(len(pack)) if clips is None else np.asarray(clips)
        identity = np.asarray(pack.identity)[clips]
        self.order = clips[np.argsort(identity, kind="stable")]  # clips, person by person
        self.people, count = np.unique(identity, return_counts=True)
        self.first = np.cumsum([0, *count])

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng([self.seed, n])
        person = int(rng.integers(len(self.people)))
        c = int(self.order[rng.integers(self.first[person], self.first[person + 1])])
        image = self.pack.frame(c, int(rng.integers(self.pack.n_frames[c])))
        return dict(image=to_flipped_tensor(image, self.flip and rng.random() < 0.5), identity=int(self.people[person]))


class Mixed(Dataset):
    """Items of two datasets, `share` of them from the second: frames of clips, and photos."""

    def __init__(self, first: Dataset, second: Dataset, share: float, seed: int):
        self.datasets, self.share, self.seed = (first, second), share, seed

    def __getitem__(self, n: int) -> dict:
        return self.datasets[int(np.random.default_rng([self.seed, n, 2]).random() < self.share)][n]


def batches(dataset: Dataset, batch: int, start_step: int = 0, workers: int = 0, rank: int = 0, world: int = 1):
    """Endless iterator of collated batches, from step start_step on. Process `rank` takes every world-th item."""
    numbers = itertools.count(start_step * batch * world + rank, world)
    generator = torch.Generator()  # its own: the loader's draw for its workers must not change a run's
    ahead = dict(prefetch_factor=4, pin_memory=torch.cuda.is_available()) if workers else {}
    yield from DataLoader(dataset, batch, sampler=numbers, num_workers=workers, generator=generator, **ahead)
