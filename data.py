"""What lies on disk: videos -> packs, packs -> batches, and checkpoints.

    python data.py videos/ out/pack --size 128     # any folder of videos -> a pack; about 100 frames a second
                                                   # out/pack/manifest.jsonl: what became of every file
                                                   # out/pack/sheet.jpg: one frame of each clip, to look at

A pack is a directory: all frames as JPEGs end to end (frames.bin), all sound as int16 at 16 kHz end to end
(sound.bin), an index of plain arrays, and meta.json. The big files are memory-mapped: any frame of any clip is
one read, nothing is unpacked, and a million clips open in a moment.

The sampling rule of the method lives in `Clips`: source and driving frames come from one clip and are never the
same frame. Paper: FC-TFG (arXiv 2304.03275), section 3.5; it does not say how frames are drawn, so the distances
are ours. That the driving mouth is hidden from the network is vision.mask_mouth's (the loss needs the mouth).
"""

import argparse
import io
import json
import os
import tempfile
import time
from array import array
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from audio import SAMPLES_PER_FRAME, InputError, check_file, load_audio, run, sound_windows
from vision import TEMPLATES, crop_face, detect_faces, face_box, probe, read_video, to_tensor

NEAR = 4  # frames; ours: a window nearer than this sounds too alike to be called wrong
ENDLESS = 2**40  # items of a dataset: it never ends
STALE = 3600  # seconds; ours: no save takes an hour, an older draft is a killed run's
FORMAT = 1  # of packs and checkpoints


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
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)  # nothing that could run
    except Exception as error:  # on damaged files torch raises a dozen kinds
        code = "weights_only" in str(error).lower() and "Unsupported" in str(error)
        reason = "holds more than tensors and plain values" if code else "is truncated or no checkpoint at all"
        raise InputError(f"{path}: {reason}; {expected}") from None
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if not isinstance(found, str):
        raise InputError(f"{path}: was not written by this package; {expected}")
    if found not in kinds:
        raise InputError(f"{path}: is a '{found[:40]}' checkpoint; {expected}")
    if checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: has format {checkpoint.get('format')}, this version reads format {FORMAT}")
    return checkpoint


# ------------------------------------------------------------------------------------------------------------
# packs

# the index: one number a clip, but jpeg_start: one a frame, and box: four a clip; *_start have one more, the end
INDEX = dict(
    frame_start=np.int64, n_frames=np.int32, sound_start=np.int64, n_samples=np.int64, identity=np.int32,
    box=np.float32, fps=np.float32, source_start=np.int64, jpeg_start=np.int64,
)  # fmt: skip


class PackWriter:
    """Writes a pack clip by clip. meta.json comes last: a directory without it is no pack.

    with PackWriter("out/pack", 64, "toy") as pack:
        pack.add(frames, wav, identity="anna", source="anna/1.mp4")

    size: edge of the frames in pixels. template: name of the crop in vision.TEMPLATES. quality: of the JPEGs;
    up to 64 px colour keeps its full resolution (half of it is too little for lips).
    keep: how many clips of an unfinished pack, in the order they were added, to keep and go on behind. While
    it writes, journal.jsonl has a line for each clip, written after the clip itself.
    Raises InputError: the folder holds a pack, cannot be written, or was begun with another size.
    """

    def __init__(self, folder: str | Path, size: int, template: str, quality: int = 95, keep: int = 0):
        assert template in TEMPLATES, f"template '{template}' is none of {sorted(TEMPLATES)}"
        self.folder, self.size, self.template = Path(folder).absolute(), size, template
        self.jpeg = dict(format="JPEG", quality=quality, subsampling=0 if size <= 64 else 2)
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
        """Opens the three files, cut to the first `keep` clips."""
        journal, end = self.folder / "journal.jsonl", 0
        if keep:
            with open(journal, "rb") as lines:
                for line in islice(lines, keep):
                    self.enter(json.loads(line))
                end = lines.tell() if not hasattr(lines, "raw") else sum(map(len, self.lines(journal, keep)))
        sizes = {"frames.bin": self.jpeg_start[-1], "sound.bin": 2 * self.n_sound, "journal.jsonl": end}
        self.files = {}
        for name, length in sizes.items():
            file = self.files[name] = open(self.folder / name, "ab")
            file.truncate(length)

    @staticmethod
    def lines(journal: Path, keep: int) -> list[bytes]:
        with open(journal, "rb") as file:
            return list(islice(file, keep))
