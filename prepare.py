"""Videos and photos -> packs.

    python prepare.py videos/ out/pack --size 128    # any folder of videos -> a pack; 335 frames/s on 2 cores
    python prepare.py photos/ out/photos --size 128  # a folder of photos; 30 photos/s per core
    python prepare.py videos/ out/packs --shard 0/8  # every 8th file: the pack out/packs/0-of-8, on one of 8 machines
    python prepare.py videos/ --census               # sizes, frame rates and lengths; nothing is written

Several processes read the files, one process writes the results in their order. manifest.jsonl in the pack has the
outcome for each file; sheet.png shows one frame of each clip.
"""

import bisect
import errno
import json
import math
import os
import re
import shutil
import tempfile
import time
from functools import lru_cache, partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from audio import isolate_voice, log_mel, n_frames
from data import Pack, PackWriter, cut_sound, encode_jpeg
from faces import (
    MAX_CLIP_FRAMES, MAX_HEIGHT, TIGHT_MARGINS, complete_lines, crop_face, detect_faces, face_box, face_detectors,
    find_clips, square_in_crop)
from media import (
    FPS, InputError, Parser, load_audio, load_photo, normalise_loudness, parallel_map, probe, read_video, run, to_int16,
    wrap_os_errors)
from report import image_grid, markdown_table
from syncnet import MAX_OFFSET, best_offset, embed_clip, load_sync, logits_by_shift

sync_expert = lru_cache(1)(load_sync)  # loaded once per process

OFFSETS = 2, MAX_OFFSET  # frames, ours: on a clip of three seconds a sync expert is off by one at most
MAX_CROP_ERROR = 0.12  # share of the crop, ours: a square photo whose face box is this close to its edges is used whole
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif",
                  ".heic", ".heif")  # the last two cannot be read; the manifest then gives the reason


def prepare_video(path: Path, size: int, template: str, expert: Path | None = None, isolate: bool = False,
                  lag: int = 0, offsets: tuple[int, int] = OFFSETS):
    """Decodes a video once. Yields (segment, JPEGs, int16 samples) in order. segment: dict for the manifest with begin,
    frames (their number), outcome and reason. A skipped segment has no JPEGs. lag: frames by which the sound is late.
    offsets: the smallest and the largest lag, either way, that the expert corrects.
    InputError: not a video, no sound, damaged sound. If only the pictures break off, earlier segments are kept."""
    info, wav = probe(path), load_audio(path)
    if isolate:
        wav = normalise_loudness(isolate_voice(wav))  # again, because load_audio's level included the music
    height, total, first = min(info.height, MAX_HEIGHT), n_frames(len(wav)), 0
    length = math.ceil(total / math.ceil(total / MAX_CLIP_FRAMES))  # equal lengths: no remainder of a few frames
    stream = read_video(path, height=height)
    while frames := list(islice(stream, min(length, total - first))):
        for begin, end, box, reason in find_clips(frames, template):
            segment = dict(begin=first + begin, frames=end - begin, outcome="skipped", reason=reason)
            jpegs, samples = [], None
            if box is not None:
                crops, start = [crop_face(frame, box, size) for frame in frames[begin:end]], first + begin + lag
                if expert:
                    sound = cut_sound(wav, start, start + len(crops))
                    late = sound_offset(expert, crops, template, sound, segment, offsets[1])
                    start += late if abs(late) >= offsets[0] else 0
                crops, start = crops[max(0, -start) : max(0, total - start)], max(0, start)  # frames that have sound
                segment["reason"] = segment["reason"] or ("" if crops else "no sound at this offset")
                if not segment["reason"]:
                    jpegs = [encode_jpeg(crop, size) for crop in crops]
                    samples = to_int16(cut_sound(wav, start, start + len(crops)))
                    box = [round(v * info.height / height, 2) for v in box]
                    segment |= dict(outcome="packed", box=box, fps=info.fps)
            yield segment, jpegs, samples
        first += len(frames)
    if first < total - 1:  # the sound is longer than the pictures
        yield dict(begin=first, frames=total - first, outcome="skipped", reason="sound without picture"), [], None
    elif (rest := round(FPS * info.seconds) - first) > 1:
        yield dict(begin=first, frames=rest, outcome="skipped", reason="picture without sound"), [], None


def sound_offset(path: Path, crops: list[np.ndarray], template: str, wav: np.ndarray, segment: dict,
                 largest: int) -> int:
    """Number of frames, from -largest to largest, by which a clip's sound is late, by the sync expert in the file `path`.
    Adds the measurement to the segment, and a reason to skip it if mouth and sound fit at no offset."""
    expert, size = sync_expert(path, "cpu"), len(crops[0])
    x, y, side = (size * v for v in square_in_crop(template, expert.template))
    if (x, y, side) != (0, 0, expert.size):
        crops = [crop_face(crop, (x, y, x + side, y + side), expert.size) for crop in crops]
    table = logits_by_shift(expert.logits, *embed_clip(expert, crops, log_mel(wav)))
    late, confidence, fit = best_offset(table, largest)
    segment |= dict(late=late, confidence=round(confidence, 2), fit=round(fit, 2))
    if fit <= 0:
        segment["reason"] = "mouth and sound do not fit"
    return late


def prepare_photo(path: Path, size: int, template: str, **_):
    """As prepare_video, for a photo: yields one frame without sound, around the largest face. A square photo that already
    has the template's crop is used whole. InputError: not a picture; no upright face; a face cut off"""
    image = load_photo(path)
    H, W = image.shape[:2]
    faces = detect_faces(image, margins=(1.5,))
    if len(faces) != 1:  # more searches, which take four times as long, find small faces and reject false ones
        faces = detect_faces(image, TIGHT_MARGINS)
    if not faces:
        raise InputError("no face that is upright was found")
    box = face_box(faces, template)
    if H == W and np.abs(np.subtract(box, (0, 0, W, H))).max() < MAX_CROP_ERROR * W:
        box = (0.0, 0.0, float(W), float(H))
    elif max(-box[0], -box[1], box[2] - W, box[3] - H) > MAX_CROP_ERROR * (box[2] - box[0]):
        raise InputError("the face is cut off by the edge of the picture")
    segment = dict(begin=0, frames=1, outcome="packed", reason="", box=[round(v, 2) for v in box], fps=0.0)
    yield segment, [encode_jpeg(crop_face(image, box, size), size)], np.zeros(0, "<i2")


def list_files(folder: Path, out: Path | None = None) -> list[Path]:
    """All files below a folder, sorted, also those in linked folders, without those below an `out` inside of it"""
    inside, paths, seen = out and folder.absolute() in out.absolute().parents, [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link to a folder above it would be followed forever
            folders.clear()
        else:
            paths += [Path(parent, name) for name in names]
        seen.add(os.path.realpath(parent))
    return sorted(p for p in paths if p.is_file() and not (inside and out.absolute() in p.absolute().parents))


def is_photo(path: Path) -> bool:
    return path.suffix.lower() in PHOTO_SUFFIXES


def read_file(job: tuple[Path, Path], folder: Path, **options) -> dict:
    """job: a file and its spool -> line of the manifest. options: of prepare_video. JPEGs and samples go to the spool
    and their lengths into the segment, so memory does not grow with the length of a video."""
    path, spool = job
    read = prepare_photo if is_photo(path) else prepare_video
    line = dict(path=str(path.relative_to(folder)), segments=[])
    with open(spool, "wb") as file:
        try:
            for segment, jpegs, samples in read(path, **options):
                if jpegs:
                    segment |= dict(jpegs=list(map(file.write, jpegs)), n_samples=len(samples))
                    file.write(samples.tobytes())
                line["segments"].append(segment)
        except InputError as error:
            line["reason"] = str(error)
        except Exception as error:  # a bug, marked by its type: it must not end a run of days
            if getattr(error, "errno", None) == errno.ENOSPC:  # a full disk must: the next run reads the file again
                raise
            line["reason"] = f"{type(error).__name__}: {error}"
    return line


def write_file(path: Path, spool: Path, line: dict, pack: PackWriter, manifest, person: str | None):
    """Moves the clips of a file from its spool into the pack and writes its line of the manifest."""
    parts = Path(line["path"]).parts
    identity = person or (parts[0] if len(parts) > 1 else path.stem)  # the folder, else the name of the file
    with open(spool, "rb") as content:
        for segment in line["segments"]:
            if segment["outcome"] == "packed":
                jpegs = [content.read(length) for length in segment.pop("jpegs")]
                samples = np.frombuffer(content.read(2 * segment.pop("n_samples")), "<i2")
                source = str(path) if is_photo(path) else f"{path}#{segment['begin']}"
                pack.add(jpegs, samples, identity, source, segment["box"], segment["fps"])
    manifest.write(json.dumps(line).encode() + b"\n")
    manifest.flush()
    spool.unlink()


def prepare(folder: Path, out: Path, size: int, workers: int = 1, person: str | None = None,
            shard: tuple[int, int] = (0, 1), template: str = "face", **options) -> list[dict]:
    """All files below `folder`, videos or photos -> a pack in `out`, independent of the number of workers. Returns the
    lines of out/manifest.jsonl, one per file. A killed run continues after the last of them. person: identity of all
    files; None: each folder in `folder` is one person. shard: (i, n), every n-th file from file i on. options: of
    prepare_video. InputError: no detector; no clip; `out` is `folder`, cannot be written, or holds a pack."""
    face_detectors()
    path = out / "manifest.jsonl"
    lines = complete_lines(path) if path.exists() else []
    outcomes = [json.loads(line) for line in lines]
    n_packed = sum(segment["outcome"] == "packed" for outcome in outcomes for segment in outcome["segments"])
    if not n_packed:  # nothing to continue: files and options may have changed
        lines, outcomes = [], []
    shard_of = folder.absolute() if shard[1] > 1 else None
    written = out.parent if shard_of else out
    if written.absolute() == folder.absolute():
        raise InputError(f"{written}: holds the files to read, name another folder to write to")
    run_options = dict(options, person=person, expert=str(options.get("expert")))
    with PackWriter(out, size, template, n_packed, shard_of, run_options) as pack, open(path, "ab") as manifest:
        manifest.truncate(sum(map(len, lines)))
        for spools in out.glob(".spool-*"):  # of a killed run: PackWriter holds the lock of this folder
            shutil.rmtree(spools)
        with tempfile.TemporaryDirectory(prefix=".spool-", dir=out) as spools:
            files = list_files(folder, written)
            finished = {folder / outcome["path"] for outcome in outcomes}
            files = [file for file in files[shard[0] :: shard[1]] if file not in finished]
            jobs = [(file, Path(spools) / str(k)) for k, file in enumerate(files)]
            read = partial(read_file, folder=folder, size=size, template=template, **options)
            results = parallel_map(read, jobs, workers)
            for line, job in zip(tqdm(results, "files", len(jobs), disable=None), jobs):
                write_file(*job, line, pack, manifest, person)
                outcomes.append(line)
        if not pack.sources:
            raise InputError(f"{folder}: no clip in {len(outcomes)} files, see {path} for the reasons")
    return outcomes


def contact_sheet(pack: Pack, columns: int = 10, rows: int = 6) -> Image.Image:
    """The middle frames of up to columns x rows evenly spaced clips, with their names"""
    clips = np.unique(np.linspace(0, len(pack) - 1, columns * rows).round().astype(int))
    grid = [clips[i : i + columns] for i in range(0, len(clips), columns)]
    frames = [[pack.frame(c, pack.n_frames[c] // 2) for c in row] for row in grid]
    return image_grid(frames, [[pack.source(c) for c in row] for row in grid], max(96, pack.size))


def report(pack: Pack, outcomes: list[dict], seconds: float, out: Path, smallest: int):
    """Prints the share of frames and files that were used, the offsets of the sound, and the speed."""
    segments = [segment for outcome in outcomes for segment in outcome["segments"]]
    used = sum(any(segment["outcome"] == "packed" for segment in outcome["segments"]) for outcome in outcomes)
    total, packed = sum(segment["frames"] for segment in segments), int(pack.frame_start[-1])
    print(f"{out}: {len(pack)} clips, {len(pack.identities)} people, {packed} of {total} frames "
          f"({100 * packed / total:.1f} %), from {used} of {len(outcomes)} files; {out}/manifest.jsonl has the reasons "
          "for the others")
    offsets = np.array([segment["late"] for segment in segments if "late" in segment])
    if len(offsets):
        print(f"sound late by {np.median(offsets):+.0f} frames at the median; off by {smallest} or more, so "
              f"corrected, in {np.mean(np.abs(offsets) >= smallest):.0%} of {len(offsets)} clips")
    print(f"{seconds:.0f} s; look at {out}/sheet.png")


CENSUS_SECONDS = (0, 1, 2, 3, 5, 10, 20, 60, 600, math.inf)  # the census counts lengths between these


def census(paths: list[Path], workers: int):
    """Prints a table: for each size, frame rate and length, the number of videos, their share and their seconds."""
    def describe(path):
        try:
            info = probe(path)
        except InputError:
            return ["not a video"], 0.0
        i = bisect.bisect(CENSUS_SECONDS, info.seconds)
        length = f"length {CENSUS_SECONDS[i - 1]} to {CENSUS_SECONDS[i]} s"
        return [f"size {info.width}x{info.height}", f"rate {info.fps:g} frames/s", length], info.seconds

    seconds_of = {}  # size, rate or length -> seconds of each video
    with ThreadPool(workers) as pool:
        for labels, seconds in tqdm(pool.imap(describe, paths), "files", len(paths), disable=None):
            for label in labels:
                seconds_of.setdefault(label, []).append(seconds)
    rows = sorted(seconds_of.items(), key=lambda row: (row[0].split()[0], -len(row[1])))
    print(markdown_table({label: dict(files=str(len(seconds)), share=f"{len(seconds) / len(paths):.1%}",
                                      seconds=f"{sum(seconds):.0f}") for label, seconds in rows}))


def parse_shard(text: str) -> tuple[int, int]:
    """--shard I/N -> (i, n)"""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard {text}: expected I/N, I from 0 to N - 1")
    return int(match[1]), int(match[2])


def main():
    p = Parser(description="A folder of videos or photos -> a pack to train on.")
    add = p.add_argument
    add("videos", type=Path, help="folder of videos or photos; each folder in it is one person, each file another")
    add("out", type=Path, nargs="?", help="folder of the pack; a killed run is continued")
    add("--census", action="store_true", help="only print the sizes, frame rates and lengths of the videos")
    add("--shard", metavar="I/N", default="0/1", help="only every N-th file from file I (0 .. N-1) on, into the pack "
        "out/I-of-N")
    add("--size", type=int, default=128, choices=(16, 32, 64, 128, 256), help="edge of the crops (128)")
    add("--template", default="face", choices=("face", "ffhq"), help="the crop: face; or ffhq, with more around the "
        "face, for published StyleGAN2, pSp and HyperStyle files")
    add("--workers", type=int, default=min(256, len(os.sched_getaffinity(0))),
        help="processes (default: one per available core)")
    add("--one-person", action="store_true", help="all files show one person, named after the folder")
    add("--check-sync", type=Path, metavar="EXPERT", help="checkpoint of a sync expert (syncnet.py): corrects the "
        "offset of each clip, drops clips that fit at no offset")
    add("--offsets", type=int, nargs=2, metavar=("MIN", "MAX"), default=OFFSETS, help="offsets in frames that "
        "--check-sync corrects (2 15); 1 4 if each short clip of a source has a small offset of its own")
    add("--lag", type=int, default=0, help="frames (25 a second) by which the sound of these files is late")
    add("--isolate-voice", action="store_true", help="attenuate repeating music and noise (librosa's vocal separation; "
        "0.2 s per second of sound)")
    args = p.parse_args(workers=(1, 256), lag=(-25, 25))
    if not 1 <= args.offsets[0] <= args.offsets[1] <= MAX_OFFSET:
        raise InputError(f"--offsets {args.offsets[0]} {args.offsets[1]}: expected 1 <= MIN <= MAX <= {MAX_OFFSET}")
    if not args.videos.is_dir():
        raise InputError(f"{args.videos}: no such directory (a file? name the folder that holds it)")
    if args.census:
        return census(list_files(args.videos), args.workers)
    if not args.out:
        p.error("name the folder of the pack")
    i, n = parse_shard(args.shard)
    if n > 1:
        args.out /= f"{i:0{len(str(n - 1))}}-of-{n}"
    if args.check_sync:
        sync_expert(args.check_sync, "cpu")  # a bad file ends the run here, not in every worker
    start, person = time.time(), args.videos.absolute().name if args.one_person else None
    with wrap_os_errors(args.out, "written"):  # an input that cannot be read is a line of the manifest instead
        outcomes = prepare(args.videos, args.out, args.size, args.workers, person, (i, n), args.template,
                           expert=args.check_sync, isolate=args.isolate_voice, lag=args.lag, offsets=tuple(args.offsets))
        pack = Pack(args.out)
        contact_sheet(pack).save(args.out / "sheet.png")
    report(pack, outcomes, time.time() - start, args.out, args.offsets[0])


if __name__ == "__main__":
    run(main)
