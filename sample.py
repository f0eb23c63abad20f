"""A photo and speech (and a driving video) -> a talking face: H.264 with the speech, 25 frames a second.

FC-TFG (arXiv 2304.03275) at work. Differs from the paper: for a real face the network predicts the shape of the lips
alone, and the photo's own pixels are moved (warp.py), at the photo's resolution. --crop shows the network's own frames
instead, and --network pastes them into the photo (class Paste), as is done with drawn faces.

    python sample.py                                         # examples/astronaut.jpg says examples/speech.flac
    python sample.py face.jpg speech.wav --driving clip.mp4  # head pose, blinks and brows from clip.mp4
    python sample.py clip.mp4 speech.wav                     # dubbing: the person in a video says other words (dub.py)

Whatever is wrong with the files is reported before the network starts.
"""

import contextlib
import functools
import itertools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter

from audio import N_MELS, SILENCE, WINDOW, log_mel, mel_windows, n_frames
from checkpoint import pick_device
from faces import (
    TEMPLATES, crop_face, detect_faces, face_box, landmark_detector, middle_square, parse_box, turn_upright)
from dub import find_takes, frame_jobs
from fusion import load_model
from landmarks import SCATTER_LIMIT, landmark_scatter, find_landmarks, load_landmarks, measure_eyes, track_landmarks
from media import (
    FPS, VIDEO_SUFFIXES, InputError, Parser, check_finite, check_output, is_grey, load_audio, load_photo, photo_size,
    probe, read_video, run, to_tensor, to_uint8, write_video)
from motion import detect_speech, driving_motion, idle_motion, mouth_motion, ping_pong
from warp import Face, Warp, enlarge_small_face, smoothstep

HERE = Path(__file__).resolve().parent
EXAMPLE_PHOTO, EXAMPLE_SPEECH = HERE / "examples/astronaut.jpg", HERE / "examples/speech.flac"
EXAMPLE_BOX = "134.5,130.1,381.7,377.3"  # where blazeface finds the astronaut's face: no weights are fetched for it
TOY_PHOTO, TOY_SPEECH = HERE / "examples/face.png", HERE / "examples/speech.wav"
TOY_WEIGHTS, FACE_WEIGHTS = HERE / "weights/toy.pt", HERE / "weights/face.pt"
# all constants below are ours
DRAWN = 0.12  # mean difference, of 2 from black to white: drawn portraits have up to .10, a disc .14, photos .25
SQUARE = 0.05  # sides that differ by less than this make a square portrait
LOOKS, SEARCH_HEIGHT = 8, 360  # frames of a driving video on which the face is searched, their height in pixels
LONGEST = 1280  # longest side of the video in pixels; a player's window, and 25 frames/s on a CPU
PIECE = 32  # frames whose sound is encoded at a time: larger pieces leave the CPU's cache
# for Paste, in units of the crop
FEATHER, COLOUR = 0.12, 0.1  # width of a seam; sigma of what counts as colour: wider than lips, narrower than a cheek
CRISP = 0.6  # unsharp mask on the network's frames, radius one of its pixels; more shows rings
NEW = 0.06, 0.2  # change, of 2 from black to white, that keeps all of the photo's detail; none of it
WAY_OUT = "say where the face is with --box x0,y0,x1,y1 (pixels)"


def parse(argv=None):
    p = Parser(description="A photo and speech (and a driving video) -> a talking face.")
    p.add_argument("face", nargs="?", help="photo, or a video to be dubbed (default: examples/astronaut.jpg)")
    p.add_argument("speech", nargs="?", help="sound, or video with it (default: examples/speech.flac)")
    p.add_argument("--toy", action="store_true", help="the drawn example in place of the photo")
    p.add_argument("--driving", help="video that gives pose, eyes, expression (default: the photo's, idling)")
    p.add_argument("--weights", help="network (default: weights/face.pt, for drawn portraits weights/toy.pt)")
    p.add_argument("--refine", type=int, help="refinements by a hypernetwork; 0: none (default: as trained)")
    p.add_argument("--out", default="talk.mp4", help="the video to write (default: talk.mp4)")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    p.add_argument("--box", metavar="x0,y0,x1,y1", help="where the face is in the photo, in pixels")
    p.add_argument("--face", type=int, dest="number", metavar="N", help="the N-th largest face (default: 1)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--crop", action="store_true", help="the network's own frames: only the crop")
    what.add_argument("--network", action="store_true", help="the network's own frames, pasted into the photo")
    p.add_argument("--landmarks", metavar="NAME", help="of the photo: mediapipe:FILE, dlib:FILE or fan (default: a small "
                   "network, weights/landmarks.pt)")
    p.add_argument("--grid", action="store_true", help="photo, driving clip and result side by side")
    p.add_argument("--still", action="store_true", help="the head of a photo does not sway; lips and lids move")
    p.add_argument("--mouth", type=float, default=1.0, help="strength of the lips' motion, 0 to 2 (default: 1)")
    p.add_argument("--blink", type=float, default=1.0, help="how far a photo's lids shut, 0: not at all (default: 1)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--seed", type=int, default=0, help="of whatever is random: blinks, sway")
    args = p.parse_args(argv, mouth=(0, 2), blink=(0, 1))
    if args.face is None:
        args.face, args.box = (TOY_PHOTO, args.box) if args.toy else (EXAMPLE_PHOTO, args.box or EXAMPLE_BOX)
    args.speech = args.speech or (TOY_SPEECH if args.toy else EXAMPLE_SPEECH)
    return args


def is_video(path) -> bool:
    """Whether a file is a video, which is dubbed, and not a photo"""
    try:
        photo_size(path)
    except InputError:
        with contextlib.suppress(InputError):  # neither: load_photo says what is wrong with it
            probe(path)
            return True
    return False


# ---------------------------------------------------------- which network, and which part of the photo is the face

def square_box(image: np.ndarray) -> tuple | None:
    """The box of a picture that is square already, as near as makes no difference; None otherwise."""
    return middle_square(image) if np.ptp(image.shape[:2]) <= SQUARE * max(image.shape[:2]) else None


toy_model = functools.cache(functools.partial(load_model, TOY_WEIGHTS))


def is_drawn(photo: np.ndarray) -> bool:
    """Whether a picture is a square drawn portrait of the toy world: weights/toy.pt can then draw it again."""
    box = square_box(photo)
    if box is None:
        return False
    model = toy_model()
    x = to_tensor(crop_face(photo, box, model.config.size))
    with torch.inference_mode():
        off = model.reconstruct(x) - x
    # the second: an even picture is drawn again as well, but all its contrast is lost (drawn portraits lose up to .31)
    return bool(off.abs().mean() < DRAWN and off.square().mean() < 0.4 * x.var((1, 2)).mean())


def pick_weights(photo: np.ndarray | None, args) -> Path:
    """--weights, else weights/toy.pt for drawn portraits, else weights/face.pt. photo: None for a video"""
    if args.weights or photo is None:
        return Path(args.weights or FACE_WEIGHTS)
    return TOY_WEIGHTS if args.toy or not (args.box or args.number) and is_drawn(photo) else FACE_WEIGHTS


def find_photo_face(photo: np.ndarray, args, template: str) -> tuple[np.ndarray, tuple, str]:
    """The photo, turned upright, the square that the network gets, and why: --box, a drawn portrait, a face"""
    if args.box:  # in pixels of the file, which load_photo may have shrunk
        width, height = photo_size(args.face)
        return photo, parse_box(args.box, width, height, photo.shape[1] / width), "the face is in --box"
    if template == "toy" and square_box(photo) and not args.number:  # detectors find no drawn faces
        return photo, square_box(photo), "square, taken whole as a drawn portrait (else: --box)"
    try:
        photo, faces, turned = turn_upright(photo)
        if not faces:
            raise InputError("no face was found, whichever way it is turned")
    except InputError as error:
        raise InputError(f"{args.face}: {error}; {WAY_OUT}") from None
    box, scale = face_box(faces, template, args.number or 1), max(photo_size(args.face)) / max(photo.shape)
    place = [scale * min(max(0, v), end) for v, end in zip(box, 2 * photo.shape[1::-1])]  # as --box takes it
    how = (f"turned {turned}, " if turned else "") + "face at " + ",".join(f"{v:.0f}" for v in place)
    if len(faces) > 1 and not args.number:
        how += f", the largest of {len(faces)} (or --face N, or --box)"
    return photo, box, how


def limit_size(photo: np.ndarray, box: tuple) -> tuple[np.ndarray, tuple]:
    """A photo (H, W, 3) and a box in it -> the same, no larger than a video should be (LONGEST, even sides)."""
    H, W = photo.shape[:2]
    if max(H, W) <= LONGEST:
        return photo, box
    h, w = (2 * round(side * LONGEST / max(H, W) / 2) for side in (H, W))
    photo = np.array(Image.fromarray(photo).resize((w, h), Image.Resampling.LANCZOS))
    return photo, tuple(v * new / old for v, new, old in zip(box, (w, h, w, h), (W, H, W, H)))


# ----------------------------------------------------------------------------------------------- the driving video

def find_driving_face(path, n: int, template: str) -> tuple[int, tuple, int]:
    """The first n frames of a driving video, read small to find a face, or damage, before the network starts ->
    how many there are, one box for all, the height of the video in whose pixels the box is"""
    height = min(probe(path).height, SEARCH_HEIGHT)
    looks, count = [], 0
    for count, frame in enumerate(itertools.islice(read_video(path, height), n), start=1):
        if (count - 1) % max(1, n // LOOKS) == 0:
            looks.append(frame)
    if template == "toy" and square_box(looks[0]):
        return count, square_box(looks[0]), height
    boxes = [face_box(faces, template) for frame in looks if (faces := detect_faces(frame, margins=(1.2, 1.5)))]
    if not boxes:
        raise InputError(f"{path}: no face that is upright was found")
    return count, tuple(np.median(boxes, axis=0)), height


def play(path, height: int, count: int, n: int):
    """n frames, uint8 (height, W, 3), of a video of `count`: a short one is played back and forth"""
    kept = []
    for frame in itertools.islice(read_video(path, height), n):
        if count < n:
            kept.append(frame)
        yield frame
    for k in range(count, n):
        yield kept[ping_pong(k, count)]


def driving_frames(path, n: int, size: int, template: str):
    """n crops of the face in a driving video, (3, size, size), as a stream"""
    count, box, height = find_driving_face(path, n, template)
    # decode no larger than twice what the crop keeps: 4K video costs a tenth
    wanted = min(probe(path).height, max(2, round(2 * size * height / (box[3] - box[1]))))
    box = tuple(v * wanted / height for v in box)
    return (to_tensor(crop_face(frame, box, size)) for frame in play(path, wanted, count, n))


def side_by_side(photo, frames, n: int, args):
    """photo, or the video that is dubbed (photo: None) | driving clip, if any | result: n frames of one height"""
    first = next(frames)
    height = len(first)
    if photo is None:  # starts again where the sound is longer
        columns = [itertools.chain.from_iterable(read_video(args.face, height) for _ in itertools.count())]
    else:
        size = round(height * photo.shape[1] / photo.shape[0]), height
        columns = [itertools.repeat(np.array(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS)))]
    if args.driving:
        count = sum(1 for _ in itertools.islice(read_video(args.driving, 16), n))
        columns.append(play(args.driving, height, count, n))
    yield from map(np.hstack, zip(*columns, itertools.chain([first], frames)))


# ---------------------------------------------------------------------------------------------- a photo that moves

def photo_landmarks(net, photo, box, args) -> np.ndarray:
    """Landmarks (68, 2) of the face in a box, by the small network or --landmarks. InputError: no face"""
    if not args.landmarks:
        points = find_landmarks(net, photo, box)
        if landmark_scatter(net, photo, points) > SCATTER_LIMIT:
            print(f"{args.face}: landmarks are uncertain (a profile, something before the mouth, not a face): check "
                  "the video, or try --landmarks or --network")
        return points
    with landmark_detector(args.landmarks) as detect:
        points = detect(photo, box)
    if points is None:
        raise InputError(f"{args.face}: --landmarks {args.landmarks} finds no face; {WAY_OUT}")
    return points


def talking_photo(model, photo, box, mel, active, args):
    """A photo that talks -> iterator over T frames, uint8 (H, W, 3): the network turns the sound into the shape of
    lips, warp.py moves the photo's pixels. mel: pieces (n, 1, 80, 16); active: (T,). InputError: not a face"""
    net, T = load_landmarks(), len(active)
    mean = net.solid.double().numpy()
    try:
        larger, points = enlarge_small_face(photo, photo_landmarks(net, photo, box, args), mean)
        warp = Warp(Face(larger, points, mean, len(photo) / len(larger)), model.motion.moves.double().cpu().numpy())
    except ValueError as error:
        raise InputError(f"{args.face}: {error}; try another photo, --landmarks, or --network") from None
    opening, shape = mouth_motion(*model.predict_lips(mel), active, warp.own, args.mouth)
    if args.driving:
        _, box, height = find_driving_face(args.driving, T, "face")
        points = track_landmarks(net, itertools.islice(read_video(args.driving, height), T), box)
        try:
            motion = driving_motion(points, *measure_eyes(points), mean, warp.room)
        except ValueError as error:
            raise InputError(f"{args.driving}: {error} that can be followed") from None
    else:
        motion = idle_motion(T, active, args.seed, head=not args.still)
    motion.blinks *= args.blink
    return compute_ahead(functools.partial(warp, opening[k], shape[k], **motion[k]) for k in range(T))


def dubbed_video(model, mel, active, args):
    """A video whose person says other words -> iterator over T frames of its size. mel, active: as of talking_photo"""
    if args.crop or args.driving or args.box or args.landmarks or args.network or args.still:
        raise InputError(f"{args.face}: a video is dubbed, which takes no --driving, --box, --landmarks, --crop, "
                         "--network or --still")
    if not moves_pixels(model):
        raise InputError(f"{args.weights}: dubbing needs a network of real faces, as weights/face.pt")
    opening, shape = mouth_motion(*model.predict_lips(mel), active, 0.0, args.mouth)
    moves, T = model.motion.moves.double().cpu().numpy(), len(active)
    count, takes = find_takes(args.face, load_landmarks(), moves, T, args.number or 1)
    print(f"{args.face}: {sum(take.T for take in takes)} of {count} frames have a face that can be tracked"
          + ("; the sound is longer: the video starts again" if T > count else ""))
    return compute_ahead(frame_jobs(args.face, takes, count, opening, shape))


def moves_pixels(model) -> bool:
    """Whether a network knows how lips move landmarks: those of real faces do"""
    return bool(model.mouth and model.motion.moves.any())


def compute_ahead(jobs, workers: int = 2):
    """Results of functions without arguments, in order, computed ahead by threads: PyTorch releases the lock"""
    torch.set_num_threads(1)  # a frame each: threads within an operation would only wait for each other
    jobs = iter(jobs)
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(job) for job in itertools.islice(jobs, 2 * workers))
        while ahead:
            frame = ahead.popleft().result()
            ahead.extend(pool.submit(job) for job in itertools.islice(jobs, 1))
            yield frame


# -------------------------------------------------------- the network's own frames, alone or pasted into the photo

def network_frames(model, photo, box, mel, n: int, whole: bool, device, args):
    """The network's own frames of the crop, or pasted back into the photo (`whole`) -> iterator over n frames"""
    size = model.config.size
    source = to_tensor(crop_face(photo, box, size)).to(device)  # (3, size, size)
    driving = driving_frames(args.driving, n, size, model.config.template) if args.driving else None
    show, turning = to_uint8, driving is not None  # show: what makes a frame of the video of a frame of the network
    if whole:
        show = Paste(photo, box, source.cpu(), *still_and_mask(model, source, device, turning), turning)
    crops = model.animate(source, mel, driving, sway=not (whole or args.still))
    finish = to_grey if is_grey(photo) else lambda frame: frame
    return (finish(show(frame)) for frames in crops for frame in frames.cpu())


def to_grey(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same in grey, for photos without colour: the networks know coloured skin and lips only"""
    return np.asarray(Image.fromarray(frame).convert("L"))[..., None].repeat(3, 2)


class Paste:
    """Pastes frames of the network (the crop, S x S pixels) into the photo, at the photo's resolution.

        out = photo + mask (frame - still) - mask new (photo - still - colour)

    The first term adds the change. The second removes the photo's detail where the change is large (`new`, 1 for a
    head that turns), or teeth would shine through shut lips. `colour`, the smoothed difference of source and
    still, keeps the tone of the skin. photo: uint8 (H, W, 3); box: of the crop in it, in pixels; source: (3, S,
    S), the crop; still: (3, S, S), generated in its place; mask: (S, S) in [0, 1]; turning: the head moves."""

    def __init__(self, photo, box, source, still, mask, turning: bool):
        (H, W), S, (x0, y0, x1, y1) = photo.shape[:2], source.shape[-1], (round(v) for v in box)
        self.size = y1 - y0, x1 - x0
        self.inside = slice(max(0, -y0), H - y0), slice(max(0, -x0), W - x0)  # the part of the box that the photo has
        self.place = slice(max(0, y0), max(0, y1)), slice(max(0, x0), max(0, x1))
        self.photo, self.still, self.mask, self.turning = photo, self.crisp(still), mask, turning
        colour = torch.from_numpy(gaussian_filter((source - still).numpy(), (0, COLOUR * S, COLOUR * S)))
        self.region = torch.as_tensor(photo[self.place]).movedim(-1, 0).float()  # (3, h, w), in steps of a byte
        self.detail = self.region - self.enlarge(self.still + colour + 1)

    def crisp(self, x):
        """(3, S, S), sharpened: the generator's frames are soft"""
        return x + CRISP * (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1))

    def enlarge(self, x):
        """(C, S, S) in units of the network -> (C, h, w) in steps of a byte"""
        return F.interpolate(127.5 * x[None], self.size, mode="bicubic")[0][(slice(None), *self.inside)]

    def __call__(self, frame):
        """(3, S, S) in [-1, 1] -> uint8 (H, W, 3)"""
        check_finite(frame)
        change = self.crisp(frame) - self.still
        new = smoothstep((F.max_pool2d(change.abs().amax(0)[None], 5, 1, 2) - NEW[0]) / (NEW[1] - NEW[0]))
        new = torch.ones_like(new) if self.turning else F.avg_pool2d(new, 3, 1, 1)
        out = self.region + self.enlarge(self.mask * change) - self.enlarge(self.mask * new) / 127.5 * self.detail
        picture = self.photo.copy()
        picture[self.place] = (out + 0.5).clamp_(0, 255).byte().movedim(0, -1).numpy()
        return picture


def soft_box(size: int, box: tuple):
    """(size, size): 1 inside a box (fractions of the crop), falling to 0 at its edges over FEATHER"""
    t = (torch.arange(size) + 0.5) / size
    x, y = (smoothstep((t - lo) / FEATHER) * smoothstep((hi - t) / FEATHER) for lo, hi in (box[::2], box[1::2]))
    return y[:, None] * x


def still_and_mask(model, source, device, turning: bool):
    """What stands still in the frames of a photo (3, S, S), and a mask (S, S) of what may move in it: all of a
    head that turns. Else the face at rest (in silence), in its mouth the best fit to the photo between that and
    the photo's inversion: a smile is closed by the change, a closed mouth stays."""
    S, template = source.shape[-1], TEMPLATES[model.config.template]
    own = model.reconstruct(source.to(device)).cpu()
    if turning:  # 1 in the middle, 0 from the circle on: the head keeps its outline
        t = (torch.arange(S) + 0.5) / S * 2 - 1
        return own, smoothstep((1 - (t[:, None] ** 2 + t**2).sqrt()) / (3 * FEATHER))
    silence = torch.full((5, 1, N_MELS, WINDOW), SILENCE, device=device)
    rest = next(model.animate(source.to(device), silence, sway=False))[2].cpu()
    mouth = soft_box(S, template.lips if model.mouth else template.mouth)  # a mouth code decides the lips' box only
    way = own - rest
    share = float((mouth * way * (source - rest)).sum() / (mouth * way * way).sum().clamp_min(1e-6))  # least squares
    return rest + min(max(share, 0), 1) * mouth * way, torch.maximum(mouth, soft_box(S, template.eyes))


def main(argv=None):
    args = parse(argv)
    begin = time.perf_counter()

    # everything that can be wrong, the quick things first
    out = check_output(args.out, args.overwrite, VIDEO_SUFFIXES)
    photo = None if is_video(args.face) else load_photo(args.face)  # (H, W, 3) uint8
    wav = load_audio(args.speech)  # (n,) at 16 kHz
    if args.driving:
        probe(args.driving)
    device, threads = pick_device(args.device), torch.get_num_threads()
    torch.set_num_threads(1)  # the detector's layers are so small that threads would only wait for each other
    weights = pick_weights(photo, args)
    model = load_model(weights, device)
    if args.refine is not None:
        model.config.refine = args.refine
    if photo is not None:
        photo, box, how = find_photo_face(photo, args, model.config.template)
        print(f"{args.face}: {how}; network: {weights}")
        if model.config.template == "toy" and args.weights and not is_drawn(photo):
            print(f"{weights}: trained on drawn faces, which {args.face} is not: frames will not look like it")
    torch.set_num_threads(threads)

    sound, T = (args.speech, len(wav)), n_frames(len(wav))
    spectrogram, active = log_mel(wav, model.config.voice_norm), detect_speech(wav, T)  # (80, S), (T,)
    pieces = np.array_split(np.arange(T), -(-T // PIECE))
    mel = (torch.from_numpy(mel_windows(spectrogram, k)).to(device) for k in pieces)  # (k, 1, 80, 16), one a frame
    del wav  # 4 MB a minute
    torch.manual_seed(args.seed)
    whole = photo is not None and not args.crop and max(photo.shape[:2]) > model.config.size
    if whole:
        photo, box = limit_size(photo, box)
    if photo is None:
        frames = dubbed_video(model, mel, active, args)
    elif whole and moves_pixels(model) and not args.network:
        frames = talking_photo(model, photo, box, mel, active, args)
    else:
        frames = network_frames(model, photo, box, mel, T, whole, device, args)
    if args.grid:
        frames = side_by_side(photo, frames, T, args)
    try:
        write_video(out, frames, T, sound, args.overwrite)
    except FloatingPointError as error:
        raise InputError(f"{weights}: the network fails, {error}") from None
    print(f"{out}: {T} frames, {T / FPS:.2f} s; {T / (time.perf_counter() - begin):.0f} frames/s end to end")


if __name__ == "__main__":
    run(main)
