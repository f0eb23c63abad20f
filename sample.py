"""A photo and speech (and a driving video) -> a talking face: H.264 with the speech, 25 frames a second.

FC-TFG (arXiv 2304.03275) at work. Differs from the paper: without a driving video the face keeps its own pose
and moves a little by itself (idle motion, kept with the weights).

    python sample.py                                         # examples/face.png says examples/speech.wav
    python sample.py face.jpg speech.wav --out talk.mp4
    python sample.py face.jpg speech.wav --driving clip.mp4  # head pose, eyes and expression from clip.mp4

Each prints one line: the file, its length, its speed. All that can be wrong with the files is found before
the network starts.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import FPS, InputError, load_audio, n_frames, run, sound_windows
from fusion import load_model, pick_device
from vision import (
    VIDEO_SUFFIXES,
    VideoWriter,
    check_output,
    crop_face,
    detect_faces,
    face_box,
    load_photo,
    probe,
    read_video,
    to_tensor,
    to_uint8,
)

HERE = Path(__file__).resolve().parent
SQUARE = 0.05  # ours: sides that differ by less than this make a square portrait
LOOKS = 8  # ours: frames of a driving video on which the face is searched
LOOK_HEIGHT = 360  # ours: their height in pixels
WAY_OUT = "say where the face is with --box x0,y0,x1,y1 (pixels)"


def parse(argv=None):
    p = argparse.ArgumentParser(description="A photo and speech (and a driving video) -> a talking face.")
    p.add_argument("face", nargs="?", default=HERE / "examples/face.png", help="photo (default: an example)")
    p.add_argument("speech", nargs="?", default=HERE / "examples/speech.wav", help="sound, or video with it")
    p.add_argument("--driving", help="video that gives pose, eyes, expression (default: the photo's, idling)")
    p.add_argument("--weights", default=HERE / "weights/toy.pt", help="network (default: weights/toy.pt)")
    p.add_argument("--out", default="talk.mp4", help="the video to write (default: talk.mp4)")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    p.add_argument("--box", metavar="x0,y0,x1,y1", help="where the face is in the photo, in pixels")
    p.add_argument("--face", type=int, dest="number", metavar="N", help="the N-th largest face (default: 1)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--seed", type=int, default=0, help="of whatever is random in the network")
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------
# which part of a picture is the face


def parse_box(text: str, width: int, height: int) -> tuple:
    """ "x0,y0,x1,y1" in pixels of a width x height picture -> the square around it."""
    try:
        x0, y0, x1, y1 = (float(v) for v in text.split(","))
    except ValueError:
        raise InputError(f"--box {text}: expected four numbers, x0,y0,x1,y1") from None
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(f"--box {text}: not a box inside the picture of {width}x{height} pixels")
    return square_around((x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0))


def square_around(x: float, y: float, side: float) -> tuple:
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def whole(image: np.ndarray) -> tuple | None:
    """The box of a picture that is square already, as near as makes no difference; None otherwise."""
    H, W = image.shape[:2]
    return square_around(W / 2, H / 2, min(H, W)) if abs(H - W) <= SQUARE * max(H, W) else None


def photo_box(image: np.ndarray, args, template: str) -> tuple:
    """The square of the photo that the network gets: --box, else the face found, else all of a square."""
    H, W = image.shape[:2]
    if args.box:
        return parse_box(args.box, W, H)
    if template == "toy" and whole(image) and not args.number:  # detectors do not know drawings
        print(f"{args.face}: square, taken whole as a drawn portrait (else: --box)")
        return whole(image)
    faces = detect_faces(image)
    if faces is None and whole(image) and not args.number:
        print(f"{args.face}: square, taken whole: no face detector's weights are at hand (or --box)")
        return whole(image)
    if faces is None:
        raise InputError(f"{args.face}: no face detector's weights are at hand; {WAY_OUT}")
    if not faces:
        raise InputError(f"{args.face}: no face was found; {WAY_OUT}")
    if len(faces) > 1 and not args.number:
        print(f"{args.face}: {len(faces)} faces, the largest is taken (or --face N, or --box)")
    return face_box(faces, template, args.number or 1)


# ------------------------------------------------------------------------------------------------------------
# the driving video


def driving_box(path, n: int, template: str) -> tuple[int, tuple, int]:
    """Reads the first n frames of a driving video, small, to find the face in it.

    Returns how many there are, one box for all, and the height of the video in whose pixels the box is.
    Reading them all here finds a damaged file before the network starts.
    """
    info = probe(path)
    height = min(info.height, LOOK_HEIGHT)
    looks, count = [], 0
    for count, frame in enumerate(itertools.islice(read_video(path, height), n), start=1):
        if (count - 1) % max(1, n // LOOKS) == 0:
            looks.append(frame)
    if template == "toy" and whole(looks[0]):
        return count, whole(looks[0]), height
    found = [detect_faces(frame, margins=(1.2, 1.5)) for frame in looks]
    if found[0] is None and whole(looks[0]):
        return count, whole(looks[0]), height
    boxes = [face_box(faces, template) for faces in found if faces]
    if not boxes:
        reason = "no face was found" if found[0] is not None else "no face detector's weights are at hand"
        raise InputError(f"{path}: {reason}; crop the video to a square around the face")
    return count, tuple(np.median(boxes, axis=0)), height


def there_and_back(k: int, count: int) -> int:
    """Index of step k when `count` frames are walked to the end and back for ever: 0 1 2 1 0 1 2 .."""
    k %= max(1, 2 * (count - 1))
    return min(k, 2 * (count - 1) - k)


def driving_frames(path, n: int, size: int, template: str):
    """n frames (3, size, size) of a driving video, as a stream. One that is shorter is walked there and back.

    Memory: nothing for a long video; one shorter than the speech is kept as cropped bytes.
    """
    count, box, height = driving_box(path, n, template)
    full = probe(path).height
    # decode no larger than twice what the crop keeps: 4K video costs a tenth
    wanted = min(full, max(2, round(2 * size * height / (box[3] - box[1]))))
    box = tuple(v * wanted / height for v in box)

    def stream():
        kept = []
        for frame in itertools.islice(read_video(path, wanted), n):
            crop = crop_face(frame, box, size)
            if count < n:
                kept.append(crop)
            yield to_tensor(crop)
        for k in range(count, n):
            yield to_tensor(kept[there_and_back(k, count)])

    return stream()


class Stopwatch:
    """Passes an iterator on and adds up the seconds spent waiting for it."""

    def __init__(self, items):
        self.items, self.seconds = iter(items), 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse(argv)
    begin = time.perf_counter()

    # everything that can be wrong, the quick things first
    out = check_output(args.out, args.overwrite, VIDEO_SUFFIXES)
    photo = load_photo(args.face)  # (H, W, 3) uint8
    wav = load_audio(args.speech)  # (n,) at 16 kHz
    if args.driving:
        probe(args.driving)
    device = pick_device(args.device)
    model = load_model(args.weights, device)
    size, template = model.config.size, model.config.template
    T = n_frames(len(wav))

    source = to_tensor(crop_face(photo, photo_box(photo, args, template), size)).to(device)  # (3, size, size)
    driving = Stopwatch(driving_frames(args.driving, T, size, template)) if args.driving else None
    mel = torch.from_numpy(sound_windows(wav, range(T))).to(device)  # (T, 1, 80, 16)

    torch.manual_seed(args.seed)
    network = Stopwatch(map(to_uint8, model.animate(source, mel, driving)))  # of (b, size, size, 3)
    with VideoWriter(out, size, size, wav, args.overwrite) as video, tqdm(total=T, unit="frame") as bar:
        try:
            for frames in network:
                for frame in frames:
                    video.write(frame)
                bar.update(len(frames))
        except FloatingPointError as error:
            raise InputError(f"{args.weights}: the network fails, {error}") from None
        assert video.count == T, f"{video.count} frames for {T} of sound"

    seconds = time.perf_counter() - begin
    alone = network.seconds - (driving.seconds if driving else 0)  # without reading the driving video
    speed = f"{T / seconds:.0f} frames/s end to end, {T / alone:.0f} frames/s by the network alone"
    print(f"{out}: {T} frames, {T / FPS:.2f} s; {speed}")


if __name__ == "__main__":
    run(main)
