"""Videos and photos -> packs.

    python prepare.py videos/ out/pack --size 128    # any folder of videos -> a pack; 335 frames a second on 2 cores
                                                     # out/pack/manifest.jsonl: what became of every file
                                                     # out/pack/sheet.png: a frame of each clip, to look at
    python prepare.py photos/ out/photos --size 128  # a folder of photos; 30 a second a core
    python prepare.py videos/ out/packs --shard 0/8  # every 8th file: a pack, out/packs/0-of-8, on one of 8 machines
    python prepare.py videos/ --census               # sizes, frame rates and lengths; nothing is written

Several processes read the files, one writes the results in their order.
"""

import bisect
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
    MAX_CLIP_FRAMES, MAX_HEIGHT, complete_lines, crop_face, detect_faces, face_box, find_clips, require_detectors,
    square_in_crop)
from media import (
    InputError, Parser, load_audio, load_photo, normalise_loudness, parallel_map, probe, read_video, run, to_int16,
    wrap_os_errors)
from report import image_grid, markdown_table
from syncnet import WINDOW_FRAMES, best_offset, embed_clip, load_sync, logits_by_shift

sync_expert = lru_cache(1)(load_sync)  # loaded once a process

MAX_CROP_ERROR = 0.12  # of the crop, ours: a square photo whose face is this near to the template's is used whole
OFFSET_TOLERANCE = 1  # frame, ours: the error of a sync expert on a clip of three seconds
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif",
                  ".heic", ".heif")  # the last two so that the manifest says what is wrong with them


def prepare_video(path: Path, size: int, template: str, expert: Path | None = None, isolate: bool = False,
                  lag: int = 0):
    """One video, decoded once -> (segment, JPEGs, int16 samples) in order. segment is a dict for the manifest:
    begin and number of frames, outcome, reason; a skipped one has no JPEGs. lag: by how many frames its sound is
    late. InputError: not a video, no sound, damaged (only pictures that break off leave what came before)."""
    info, wav = probe(path), load_audio(path)
    wav = normalise_loudness(isolate_voice(wav)) if isolate else wav  # again: what was taken out is not speech
    wav = cut_sound(wav, lag, lag + n_frames(len(wav))) if lag else wav
    height, total, at = min(info.height, MAX_HEIGHT), n_frames(len(wav)), 0
    length = -(-total // -(-total // MAX_CLIP_FRAMES))  # as even as can be: no rest of a few frames
    stream = read_video(path, height=height)
    while frames := list(islice(stream, min(length, total - at))):
        for begin, end, box, reason in find_clips(frames, template):
            segment = dict(begin=at + begin, frames=end - begin, outcome="skipped", reason=reason)
            jpegs, samples = [], None
            if box is not None:
                crops, late = [crop_face(frame, box, size) for frame in frames[begin:end]], 0
                if expert:
                    late = sound_delay(expert, crops, template, cut_sound(wav, at + begin, at + end), segment)
                if not segment["reason"]:
                    jpegs = [encode_jpeg(crop, size) for crop in crops]
                    samples = to_int16(cut_sound(wav, at + begin + late, at + end + late))
                    box = [round(v * info.height / height, 2) for v in box]
                    segment |= dict(outcome="packed", box=box, fps=info.fps)
            yield segment, jpegs, samples
        at += len(frames)
    if at < total - 1:  # the sound is longer than the pictures
        yield dict(begin=at, frames=total - at, outcome="skipped", reason="sound without picture"), [], None


def sound_delay(path: Path, crops: list[np.ndarray], template: str, wav: np.ndarray, segment: dict) -> int:
    """By how many frames a clip's sound is late, by the sync expert in the file `path`; 0 within its tolerance.
    Adds that to the segment, and a reason to skip it where mouth and sound fit at no offset."""
    expert, size = sync_expert(path, "cpu"), len(crops[0])
    x, y, side = (size * v for v in square_in_crop(template, expert.template))
    if (x, y, side) != (0, 0, expert.size):
        crops = [crop_face(crop, (x, y, x + side, y + side), expert.size) for crop in crops]
    assert len(crops) >= WINDOW_FRAMES, "a clip is longer than a window"
    late, confidence, fit = best_offset(logits_by_shift(expert.logits, *embed_clip(expert, crops, log_mel(wav), "cpu")))
    segment |= dict(late=late, confidence=round(confidence, 2), fit=round(fit, 2))
    if fit <= 0:
        segment["reason"] = "mouth and sound do not fit"
    return late if abs(late) > OFFSET_TOLERANCE else 0


def prepare_photo(path: Path, size: int, template: str, **_):
    """prepare_video for a photo: one frame without sound, around its largest face; the whole of a square photo
    that is cropped so. InputError: not a picture, no upright face, or one cut off by the picture's edge"""
    image = load_photo(path)
    H, W = image.shape[:2]
    faces = detect_faces(image, margins=(1.5,))
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
    """The files below a folder by name, without those in `out`"""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not (out and out.absolute() in p.absolute().parents))


def read_file(job: tuple[Path, Path], folder: Path, read) -> dict:
    """A file and its spool, in any process -> its line of the manifest. read: prepare_video or prepare_photo. A
    packed segment also has the lengths of its JPEGs and the number of its samples. Their bytes, all JPEGs of a
    clip, then its samples, are in the spool: memory does not grow with a video's length."""
    path, line = job[0], dict(path=str(job[0].relative_to(folder)), segments=[])
    with open(job[1], "wb") as spool:
        try:
            for segment, jpegs, samples in read(path):
                if jpegs:
                    segment |= dict(jpegs=list(map(spool.write, jpegs)), n_samples=len(samples))
                    spool.write(samples.tobytes())
                line["segments"].append(segment)
        except InputError as error:
            line["reason"] = str(error)
        except Exception as error:  # a bug, marked by its type: it must not end a run of days
            line["reason"] = f"{type(error).__name__}: {error}"
    return line


def write_file(path: Path, spool: Path, line: dict, pack: PackWriter, log, person: str | None, photo: bool):
    """The clips of a file that was read -> the pack, then its line -> the manifest; the spool is deleted."""
    parts = Path(line["path"]).parts
    identity = person or (parts[0] if len(parts) > 1 else path.stem)  # the folder, or the file by itself
    with open(spool, "rb") as content:
        for segment in line["segments"]:
            if segment["outcome"] == "packed":
                jpegs = [content.read(length) for length in segment.pop("jpegs")]
                samples = np.frombuffer(content.read(2 * segment.pop("n_samples")), "<i2")
                source = str(path) if photo else f"{path}#{segment['begin']}"
                pack.add(jpegs, samples, identity, source, segment["box"], segment["fps"])
    log.write(json.dumps(line).encode() + b"\n")
    log.flush()
    spool.unlink()


def prepare(folder: Path, out: Path, size: int, workers: int = 1, person: str | None = None,
            shard: tuple[int, int] = (0, 1), template: str = "face", **options) -> list[dict]:
    """All files below `folder`, videos or photos -> a pack at `out`, the same for any number of workers. Returns
    the lines of out/manifest.jsonl, one a file; a killed run continues after the last of them.

    person: the identity of all files; None: each folder in `folder` is one. shard: (i, n), file i and every n-th
    after it, into a pack whose people are those of the other shards (data.Packs). options: see prepare_video.
    InputError: no detector; not one clip; `out` cannot be written or holds a pack."""
    require_detectors()
    manifest = out / "manifest.jsonl"
    lines = complete_lines(manifest) if manifest.exists() else []
    outcomes = [json.loads(line) for line in lines]
    packed = sum(segment["outcome"] == "packed" for outcome in outcomes for segment in outcome["segments"])
    shard_of = folder.absolute() if shard[1] > 1 else None
    with PackWriter(out, size, template, packed, shard_of) as pack, open(manifest, "ab") as log:
        log.truncate(sum(map(len, lines)))
        for left in out.glob(".spool-*"):  # a killed run's; PackWriter holds the lock of this folder
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=".spool-", dir=out) as spools:
            paths, (i, n) = list_files(folder, out.parent if shard_of else out), shard
            photos = 2 * sum(path.suffix.lower() in PHOTO_SUFFIXES for path in paths) > len(paths)  # more than half
            read = partial(prepare_photo if photos else prepare_video, size=size, template=template, **options)
            done = {folder / outcome["path"] for outcome in outcomes}
            jobs = [(path, Path(spools) / str(k)) for k, path in enumerate(paths[i::n]) if path not in done]
            results = parallel_map(partial(read_file, folder=folder, read=read), jobs, workers)
            for line, job in zip(tqdm(results, "files", len(jobs), disable=None), jobs):
                write_file(*job, line, pack, log, person, photos)
                outcomes.append(line)
        if not pack.sources:
            raise InputError(f"{folder}: no clip in {len(outcomes)} files, {manifest} says why")
    return outcomes


def contact_sheet(pack: Pack, columns: int = 10, rows: int = 6) -> Image.Image:
    """The middle frame of up to columns x rows clips, evenly chosen, each below its name"""
    chosen = np.unique(np.linspace(0, len(pack) - 1, columns * rows).round().astype(int))
    lines = [chosen[i : i + columns] for i in range(0, len(chosen), columns)]
    frames = [[pack.frame(c, pack.n_frames[c] // 2) for c in line] for line in lines]
    return image_grid(frames, [[pack.source(c) for c in line] for line in lines], max(96, pack.size))


def report(pack: Pack, outcomes: list[dict], seconds: float, out: Path):
    """Prints how many frames and files were used, the offsets of the sound, and the speed."""
    found = [segment for outcome in outcomes for segment in outcome["segments"]]
    used = sum(any(s["outcome"] == "packed" for s in outcome["segments"]) for outcome in outcomes)
    frames, kept = sum(segment["frames"] for segment in found), int(pack.frame_start[-1])
    print(f"{out}: {len(pack)} clips, {len(pack.identities)} people, {kept} frames, {100 * kept / frames:.1f} % of "
          f"{frames} in {len(outcomes)} files, {used} of them used; why not the others: {out}/manifest.jsonl")
    late = np.array([segment["late"] for segment in found if "late" in segment])
    if len(late):
        print(f"sound late by {np.median(late):+.0f} frames at the median; by more than {OFFSET_TOLERANCE}, so moved, in "
              f"{np.mean(np.abs(late) > OFFSET_TOLERANCE):.0%} of {len(late)} clips")
    print(f"{seconds:.0f} s, {frames / seconds:.0f} frames a second; look at {out}/sheet.png")


LENGTHS = (0, 1, 2, 3, 5, 10, 20, 60, 600, math.inf)  # seconds: rows of the census


def census(paths: list[Path], workers: int):
    """Prints how many videos, which share of the files and how many seconds have which size, rate and length"""
    def look(path):
        try:
            info = probe(path)
        except InputError:
            return ["not a video"], 0.0
        longer = bisect.bisect(LENGTHS, info.seconds)
        length = f"length {LENGTHS[longer - 1]} to {LENGTHS[longer]} s"
        return [f"size {info.width}x{info.height}", f"rate {info.fps:g} frames/s", length], info.seconds

    found = {}  # a size, rate or length -> seconds of each video
    with ThreadPool(workers) as pool:
        for values, seconds in tqdm(pool.imap(look, paths), "files", len(paths), disable=None):
            for value in values:
                found.setdefault(value, []).append(seconds)
    rows = sorted(found.items(), key=lambda row: (row[0].split()[0], -len(row[1])))
    print(markdown_table({value: dict(files=str(len(seconds)), share=f"{len(seconds) / len(paths):.1%}",
                                seconds=f"{sum(seconds):.0f}") for value, seconds in rows}))


def parse_shard(text: str | None) -> tuple[int, int]:
    """--shard i/n, else what torchrun, a Slurm array or srun has set, else all files -> (i, n)"""
    for i, n in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
                 ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if not text and os.environ.get(n, "1") != "1":
            text = f"{os.environ.get(i)}/{os.environ[n]}"
    match = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if not match or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard {text}: expected I/N, I from 0 to N - 1")
    return int(match[1]), int(match[2])


def main():
    p = Parser(description="A folder of videos or photos -> a pack to train on.")
    add = p.add_argument
    add("videos", type=Path, help="folder of videos or photos; a folder in it is one person, a file another")
    add("out", type=Path, nargs="?", help="folder of the pack; a killed run's is continued")
    add("--census", action="store_true", help="only print the sizes, frame rates and lengths of the videos")
    add("--shard", metavar="I/N", help="only every N-th file, from file I (0 .. N-1) on, into the pack out/I-of-N; set "
        "for each process by torchrun, a Slurm array or srun")
    add("--size", type=int, default=128, choices=(16, 32, 64, 128, 256), help="edge of the crops (128)")
    add("--template", default="face", choices=("face", "ffhq"), help="the crop: face; or ffhq, with more around the "
        "face, for published StyleGAN2, pSp and HyperStyle files")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    add("--one-person", action="store_true", help="all files show one person, named as the folder")
    add("--check-sync", type=Path, metavar="EXPERT", help="checkpoint of a sync expert (syncnet.py): corrects each "
        "clip's offset, drops clips that fit at none")
    add("--lag", type=int, default=0, help="frames (25 a second) by which the sound of this source is late")
    add("--isolate-voice", action="store_true", help="take music and noise that repeat down (librosa's vocal separation; "
        "0.2 s a second of sound)")
    args = p.parse_args(workers=(1, 256), lag=(-25, 25))
    if not args.videos.is_dir():
        raise InputError(f"{args.videos}: no such directory")
    if args.census:
        return census(list_files(args.videos), args.workers)
    if not args.out:
        p.error("name the folder of the pack")
    shard = i, n = parse_shard(args.shard)
    if n > 1:
        args.out /= f"{i:0{len(str(n - 1))}}-of-{n}"
    if args.check_sync:
        sync_expert(args.check_sync, "cpu")  # an error now, not in every worker
    start, person = time.time(), args.videos.absolute().name if args.one_person else None
    with wrap_os_errors(args.out, "written"):  # an input that cannot be read is a line of the manifest
        outcomes = prepare(args.videos, args.out, args.size, args.workers, person, shard, args.template,
                           expert=args.check_sync, isolate=args.isolate_voice, lag=args.lag)
        pack = Pack(args.out)
        contact_sheet(pack).save(args.out / "sheet.png")
    report(pack, outcomes, time.time() - start, args.out)


if __name__ == "__main__":
    run(main)
