"""What lies on disk: videos -> packs, packs -> batches, and checkpoints.

    python data.py videos/ out/mypack --size 128     # any folder of videos -> a pack; out/mypack/manifest.jsonl says what became of each

A pack is a directory: all frames as JPEGs end to end (frames.bin), all sound as int16 at 16 kHz end to end (sound.bin), an index of
plain arrays, and meta.json. Both big files are memory-mapped: any frame of any clip is one read, and nothing is unpacked.

The sampling rule of the method lives in `Clips`: source and driving frames come from one clip and are never the same frame.
Paper: FC-TFG (arXiv 2304.03275), section 3.5; it does not say how frames are drawn, so the distances are ours. That the driving
mouth is hidden from the network is vision.mask_mouth's, for the network alone (the loss needs the mouth).
"""

import argparse
import io
import json
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from audio import FPS, SAMPLE_RATE, InputError, check_file, load_audio, run, sound_windows
from vision import TEMPLATES, crop_face, detect_faces, face_box, probe, read_video, to_tensor

NEAR = 4  # frames: a window nearer than this is no negative, speech is too alike (ours)
INDEX = ("frame_start", "n_frames", "sound_start", "n_samples", "identity", "box", "fps", "jpeg_start", "source_start")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def save_checkpoint(path: str, checkpoint: dict):
    """Write plain dicts, tensors, numbers and strings so that the file is the old one or the new one, whole.

    checkpoint needs "kind" (what it is) and "format" (1). Raises InputError where the disk refuses.
    """
    assert {"kind", "format"} <= set(checkpoint), "a checkpoint says its kind and format"
    folder, name = os.path.split(os.path.abspath(path))
    handle, draft = None, None
    try:
        handle, draft = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)  # mkstemp's 0600 is for secrets
        os.replace(draft, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if draft and os.path.exists(draft):
            os.unlink(draft)


def load_checkpoint(path: str, kind, map_location="cpu") -> dict:
    """Read a file of save_checkpoint. kind: the expected one, or a tuple of accepted ones.

    Raises InputError in one line: missing, directory, truncated, not a checkpoint, holding code, another kind or format.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    expected = f"expected a '{' or '.join(kinds)}' checkpoint"
    path = check_file(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)  # never anything that could run
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError) as error:
        reason = "holds more than tensors and plain values" if "weights_only" in str(error).lower() else "is truncated or no checkpoint at all"
        raise InputError(f"{path}: {reason}; {expected}") from None
    if not isinstance(checkpoint, dict) or "kind" not in checkpoint:
        raise InputError(f"{path}: was not written by this package; {expected}")
    if checkpoint["kind"] not in kinds:
        raise InputError(f"{path}: is a '{checkpoint['kind']}' checkpoint; {expected}")
    if checkpoint.get("format") != 1:
        raise InputError(f"{path}: has format {checkpoint.get('format')}, this version reads format 1")
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# packs

class PackWriter:
    """Write a pack clip by clip. The index comes last: a directory without it is not a pack.

    Args:
        folder: created; must not hold a pack.
        size: edge of the frames.
        template: name of the crop in vision.TEMPLATES.
        quality: of the JPEGs; colour at full resolution up to 64 px (half of 64 px is too little for lips).
    """

    def __init__(self, folder, size: int, template: str, quality: int = 95):
        assert template in TEMPLATES, f"template '{template}' is none of {sorted(TEMPLATES)}"
        self.folder, self.size, self.template = Path(folder), size, template
        self.jpeg = dict(format="JPEG", quality=quality, subsampling=0 if size <= 64 else 2)
        if (self.folder / "meta.json").exists():
            raise InputError(f"{folder}: holds a pack already")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.frames_file, self.sound_file = (open(self.folder / name, "wb") for name in ("frames.bin", "sound.bin"))
        self.index = {name: [] for name in INDEX}
        self.identities, self.sources, self.n_sound = {}, [], 0

    def add(self, frames, wav, identity: str, source: str, box=None, fps: float = 25.0):
        """One clip: frames (iterable of uint8 (size, size, 3)), wav float32 (n,) at 16 kHz, who it is, where it came from,
        the crop's box in the source picture, the source's frame rate. -> number of frames"""
        starts = []
        for frame in frames:
            assert frame.shape == (self.size, self.size, 3) and frame.dtype == np.uint8, f"frame is {frame.shape} {frame.dtype}"
            starts.append(self.frames_file.tell())
            Image.fromarray(frame).save(self.frames_file, **self.jpeg)
        assert starts, "a clip has at least one frame"
        samples = (np.clip(wav, -1, 1) * 32767).round().astype("<i2")
        self.sound_file.write(samples.tobytes())
        row = dict(frame_start=len(self.index["jpeg_start"]), n_frames=len(starts), sound_start=self.n_sound, n_samples=len(samples), fps=fps,
                   identity=self.identities.setdefault(identity, len(self.identities)), box=box or (0.0, 0.0, 0.0, 0.0))
        for name, value in row.items():
            self.index[name].append(value)
        self.index["jpeg_start"] += starts
        self.sources.append(source)
        self.n_sound += len(samples)
        return len(starts)

    def close(self):
        """Finish: index, then meta.json under its final name, which makes the directory a pack."""
        self.index["jpeg_start"].append(self.frames_file.tell())
        self.frames_file.close()
        self.sound_file.close()
        names = [source.encode() for source in self.sources]
        self.index["source_start"] = np.cumsum([0] + [len(name) for name in names])
        (self.folder / "sources.txt").write_bytes(b"".join(names))
        kinds = dict(box=np.float32, fps=np.float32, n_frames=np.int32, identity=np.int32)
        for name in INDEX:
            np.save(self.folder / f"{name}.npy", np.asarray(self.index[name], kinds.get(name, np.int64)))
        meta = dict(format=1, size=self.size, template=self.template, clips=len(self.sources), identities=list(self.identities))
        draft = self.folder / ".meta.json"
        draft.write_text(json.dumps(meta))
        os.replace(draft, self.folder / "meta.json")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        else:
            self.frames_file.close()
            self.sound_file.close()


class Pack:
    """A pack, open for reading. Everything is mapped, nothing is loaded: a million clips open in a moment.

    .size, .template, .identities (names), and for each clip c: .n_frames[c], .identity[c], .box[c], .fps[c].
    Raises InputError: no pack there, or a broken one.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such directory, expected a pack written by data.py")
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            self.size, self.template, self.identities = meta["size"], meta["template"], meta["identities"]
            for name in INDEX:
                setattr(self, name, np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            if meta["format"] != 1 or (self.folder / "frames.bin").stat().st_size != self.jpeg_start[-1]:
                raise ValueError("its files do not belong together")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{folder}: not a whole pack ({error})") from None
        if self.template not in TEMPLATES:
            raise InputError(f"{folder}: cropped by the template '{self.template}', which this version does not know")
        self.maps = {}

    def __len__(self):
        return len(self.n_frames)

    def __getstate__(self):  # a worker process maps the files anew
        return self.__dict__ | dict(maps={})

    def mapped(self, name, dtype):
        if name not in self.maps:
            path = self.folder / name
            self.maps[name] = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
        return self.maps[name]

    def frame(self, c: int, k: int) -> np.ndarray:
        """Frame k of clip c, uint8 (H, W, 3)"""
        assert 0 <= k < self.n_frames[c], f"frame {k} of clip {c}, which has {self.n_frames[c]}"
        i = int(self.frame_start[c]) + int(k)
        jpeg = self.mapped("frames.bin", np.uint8)[self.jpeg_start[i]:self.jpeg_start[i + 1]]
        return np.array(Image.open(io.BytesIO(jpeg), formats=("JPEG",)))

    def frames(self, c: int, ks) -> np.ndarray:
        """uint8 (len(ks), H, W, 3)"""
        return np.stack([self.frame(c, k) for k in ks])

    def sound(self, c: int) -> np.ndarray:
        """float32 (n,) in [-1, 1]"""
        start = int(self.sound_start[c])
        return self.mapped("sound.bin", "<i2")[start:start + int(self.n_samples[c])].astype(np.float32) / 32767

    def source(self, c: int) -> str:
        """The file it came from"""
        a, b = self.source_start[c], self.source_start[c + 1]
        return self.mapped("sources.txt", np.uint8)[a:b].tobytes().decode()


# ---------------------------------------------------------------------------------------------------------------------
# batches: item n is a function of (seed, n) alone, whatever process asks for it, so a resumed run goes on exactly

class Clips(Dataset):
    """Windows for stage 3, the sync expert and the face judge. Clips are drawn uniformly, windows uniformly within.

    Args:
        T: consecutive driving frames. A clip shorter than T stands still at its end.
        flip: mirror whole items in half of the cases.
    """

    def __init__(self, pack: Pack, T: int, seed: int, flip: bool = True):
        self.pack, self.T, self.seed, self.flip = pack, T, seed, flip

    def __len__(self):
        return 2 ** 40  # endless

    def __getitem__(self, n):
        """-> source (3, H, W), driving (T, 3, H, W) in [-1, 1], mel (T, 1, 80, 16), wrong_mel (1, 80, 16), and the integers
        identity, clip, frames (T,), wrong_frame"""
        rng = np.random.default_rng([self.seed, n, self.T])
        c = int(rng.integers(len(self.pack)))
        length = int(self.pack.n_frames[c])
        first = int(rng.integers(max(1, length - self.T + 1)))
        frames = np.minimum(np.arange(first, first + self.T), length - 1)
        others = np.setdiff1d(np.arange(length), frames)                       # never one of the driving frames
        source = int(rng.choice(others)) if len(others) else first             # unless the clip has no other
        middle = int(frames[self.T // 2])
        far = np.flatnonzero(np.abs(np.arange(length) - middle) >= NEAR)
        wrong = int(rng.choice(far)) if len(far) else middle + NEAR            # past the end: silence
        pictures = self.pack.frames(c, [source, *frames])
        if self.flip and rng.random() < 0.5:
            pictures = pictures[:, :, ::-1]
        pictures = to_tensor(np.ascontiguousarray(pictures))
        wav = self.pack.sound(c)
        mel = torch.from_numpy(sound_windows(wav, np.arange(first, first + self.T)))
        wrong_mel = torch.from_numpy(sound_windows(wav, np.array([wrong])))[0]
        return dict(source=pictures[0], driving=pictures[1:], mel=mel, wrong_mel=wrong_mel, identity=int(self.pack.identity[c]),
                    clip=c, frames=torch.from_numpy(frames), wrong_frame=wrong)


class Frames(Dataset):
    """Single pictures for stages 1 and 2: a person uniformly, then a clip of theirs, then a frame. -> picture (3, H, W), identity"""

    def __init__(self, pack: Pack, seed: int, flip: bool = True):
        self.pack, self.seed, self.flip = pack, seed, flip
        self.order = np.argsort(pack.identity, kind="stable")
        self.first = np.searchsorted(np.asarray(pack.identity)[self.order], np.arange(len(pack.identities) + 1))

    def __len__(self):
        return 2 ** 40

    def __getitem__(self, n):
        rng = np.random.default_rng([self.seed, n])
        who = int(rng.integers(len(self.pack.identities)))
        c = int(self.order[rng.integers(self.first[who], self.first[who + 1])])
        picture = self.pack.frame(c, int(rng.integers(self.pack.n_frames[c])))
        if self.flip and rng.random() < 0.5:
            picture = picture[:, ::-1]
        return dict(picture=to_tensor(np.ascontiguousarray(picture)), identity=who)


class From(torch.utils.data.Sampler):
    """start, start + 1, ..: the position in the data is a number"""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self):
        n = self.start
        while True:
            yield n
            n += 1


def batches(dataset: Dataset, batch: int, start_step: int = 0, workers: int = 0):
    """Endless iterator of collated batches; the first is that of step start_step."""
    if workers == 0:
        for n in From(start_step):
            yield default_collate([dataset[i] for i in range(n * batch, (n + 1) * batch)])
    yield from DataLoader(dataset, batch, sampler=From(start_step * batch), num_workers=workers, persistent_workers=True,
                          pin_memory=torch.cuda.is_available(), prefetch_factor=4)


# ---------------------------------------------------------------------------------------------------------------------
# videos -> pack

VIDEOS = (".mp4", ".mpg", ".mpeg", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".ts", ".flv", ".wmv", ".3gp", ".mts")
EVERY = 5       # frames between two looks of the detector (ours: a fifth of a second)
DETECT_AT = 320  # height of the copy that the detector sees


def one_box(path: Path) -> tuple:
    """The crop's box of a whole clip, in pixels of the decoded video: the average of the detections, so that it does not wobble.

    Raises InputError: fewer than half of the looked-at frames have a face, or it walks away from the average box.
    """
    found, looks, height = [], 0, probe(path).height
    for k, frame in enumerate(read_video(path, height=min(height, DETECT_AT))):
        if k % EVERY:
            continue
        looks += 1
        faces = detect_faces(frame, margins=(1.2,))
        if faces is None:
            raise InputError("face-alignment's detector weights are not at hand: set TORCH_HOME to where they are")
        if faces:
            found.append(face_box(faces, "face"))
    if len(found) * 2 < max(1, looks):
        raise InputError(f"{path}: a face in {len(found)} of {looks} frames looked at")
    boxes = np.array(found)
    box = np.median(boxes, 0)
    side = box[2] - box[0]
    if np.percentile(np.abs(boxes - box).max(1), 90) > 0.35 * side:
        raise InputError(f"{path}: the face moves out of any one box")
    return tuple(box * height / min(height, DETECT_AT))


def prepare(folder: Path, out: Path, size: int):
    """All videos below a folder -> a pack at `out` and manifest.jsonl in it: one line a file, with what became of it."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    out.mkdir(parents=True, exist_ok=True)
    with PackWriter(out, size, "face") as pack, open(out / "manifest.jsonl", "w") as manifest:
        for path in tqdm(paths, "videos", disable=None):
            line = dict(path=str(path.relative_to(folder)))
            try:
                if path.suffix.lower() not in VIDEOS:
                    raise InputError(f"{path}: not the name of a video")
                box, wav = one_box(path), load_audio(path)
                frames = [crop_face(frame, box, size) for frame in read_video(path)]
                n = min(len(frames), len(wav) * FPS // SAMPLE_RATE)            # what both sound and picture have
                if n < NEAR + 6:
                    raise InputError(f"{path}: {n} frames with sound are too short a clip")
                who = str(path.relative_to(folder).parent) if path.parent != folder else path.stem
                pack.add(frames[:n], wav[:n * SAMPLE_RATE // FPS], who, str(path), box, probe(path).fps)
                line |= dict(outcome="packed", frames=n, box=[round(float(v), 1) for v in box])
            except InputError as error:
                line |= dict(outcome="skipped", reason=str(error))
            manifest.write(json.dumps(line) + "\n")
            manifest.flush()
        if not pack.sources:
            raise InputError(f"{folder}: no clip of {len(paths)} files could be packed, {out}/manifest.jsonl says why")


def main(argv=None):
    p = argparse.ArgumentParser(description="a folder of videos -> a pack to train on", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("videos", help="folder; a folder in it is one person, a file of its own is one, too")
    p.add_argument("out", help="directory of the pack")
    p.add_argument("--size", type=int, default=128, choices=(32, 64, 128, 256), help="edge of the crops")
    args = p.parse_args(argv)
    if not Path(args.videos).is_dir():
        raise InputError(f"{args.videos}: no such directory")
    if Path(args.out, "meta.json").exists():
        raise InputError(f"{args.out}: holds a pack already, name another directory")
    prepare(Path(args.videos), Path(args.out), args.size)
    pack = Pack(args.out)
    print(f"{args.out}: {len(pack)} clips of {len(pack.identities)} people, {int(np.sum(pack.n_frames))} frames; skipped files: see manifest.jsonl")


if __name__ == "__main__":
    run(main)
