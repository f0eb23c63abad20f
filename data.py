"""What lies on disk: packs are written, read and sampled.

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
import os
import sys
from array import array
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from audio import mfcc, sound_windows
from checkpoint import FORMAT
from faces import TEMPLATES
from media import SAMPLES_PER_FRAME, InputError, Parser, check_file, run, to_int16, to_tensor

try:
    import fcntl
except ImportError:  # Windows: nothing stops a second run there
    fcntl = None

NEAR = 4  # frames; ours: a window nearer than this sounds too alike to be called wrong
ENDLESS = 2**40  # items of a dataset: it never ends


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


def sound_of(wav: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The samples of frames begin .. end-1, silence where there are none."""
    begin, end = begin * SAMPLES_PER_FRAME, end * SAMPLES_PER_FRAME
    before, after = max(0, -begin), max(0, end - max(begin, len(wav)))
    return np.pad(wav[max(0, begin) : max(0, end)], (before, min(after, end - begin)))

def main():
    raise InputError(f"packs are written by another script: python prepare.py {' '.join(sys.argv[1:])}")


if __name__ == "__main__":
    run(main)
