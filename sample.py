"""A photo and speech (and a driving video) -> a talking face: H.264 with the speech, 25 frames a second.

Sampling of FC-TFG (arXiv 2304.03275). Differs from the paper: for a real face the network predicts only the shape of
the lips, and warp.py moves the photo's own pixels, at the photo's resolution. --crop shows the generator's frames
instead, and --network pastes them into the photo (class Paste). Drawn faces are always made by the generator.

    python sample.py                                         # examples/astronaut.jpg says examples/speech.flac
    python sample.py face.jpg speech.wav --driving clip.mp4  # head pose, blinks and brows from clip.mp4
    python sample.py clip.mp4 speech.wav                     # dubbing: new words for the person in a video (dub.py)

Errors in the input files are reported before the network starts.
"""

import contextlib
import functools
import itertools
import tempfile
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
from dub import find_takes, frame_jobs
from faces import (
    TEMPLATES, crop_face, detect_faces, face_box, label_scenes, landmark_detector, middle_square, parse_box, turn_upright)
from fusion import load_model
from landmarks import SCATTER_LIMIT, find_landmarks, landmark_scatter, load_landmarks, measure_eyes, track_video
from media import (
    FPS, VIDEO_SUFFIXES, InputError, Parser, check_finite, check_output, is_grey, load_audio, load_photo, photo_size,
    probe, read_video, run, to_tensor, to_uint8, write_video)
from motion import Motion, detect_speech, driving_motion, idle_motion, mouth_motion, ping_pong, random_faces
from warp import MAX_SIDE, Warp, smoothstep

HERE = Path(__file__).resolve().parent
EXAMPLE_PHOTO, EXAMPLE_SPEECH = HERE / "examples/astronaut.jpg", HERE / "examples/speech.flac"
EXAMPLE_BOX = "134.5,130.1,381.7,377.3"  # blazeface's box of the astronaut: saves the download of its weights
TOY_PHOTO, TOY_SPEECH = HERE / "examples/face.png", HERE / "examples/speech.wav"
TOY_WEIGHTS, FACE_WEIGHTS = HERE / "weights/toy.pt", HERE / "weights/face.pt"
# all constants below are ours
# a picture counts as drawn if weights/toy.pt reconstructs it with smaller errors: mean error, in [-1, 1] (drawn portraits
# up to .10, a disc .14, photos .25); squared error over variance (portraits up to .31; blank pictures lose all contrast)
DRAWN_ERROR, DRAWN_LOSS = 0.12, 0.4
SQUARE_TOLERANCE = 0.05  # relative difference of the sides of a square portrait
SEARCHED_FRAMES, SEARCH_HEIGHT = 8, 360  # number, and height in pixels, of the frames in which a driving face is searched
THREADS = torch.get_num_threads()  # of the machine, before anything here changes it
MEL_CHUNK = 32  # frames of sound encoded at once: larger chunks leave the CPU's cache
SEAM = 0.12  # of the crop: width of the seam around a pasted face
TONE_SIGMA = 0.1  # of the crop: blur that leaves the tone of the skin, wider than lips, narrower than a cheek
# of the opening given to the generator, which paints about half of it. Beyond the limit it paints the mouth green or blue
PAINTED_GAIN, PAINTED_LIMIT = 1.6, 0.22
FIT_STEPS, FIT_FACES = 30, 40  # of FCTFG.fit_weights: 18 s on two slow cores; moved faces
SHARPEN = 0.6  # unsharp mask on the generator's frames, radius 1 pixel: more gives rings
CHANGE_RANGE = 0.06, 0.2  # in [-1, 1]: up to the first change all of the photo's detail stays, from the second on none
BOX_ADVICE = "give the place of the face with --box x0,y0,x1,y1 (pixels)"


def parse(argv=None):
    p = Parser(description="A photo and speech (and a driving video) -> a talking face.")
    p.add_argument("face", nargs="?", help="photo, or a video to dub (default: examples/astronaut.jpg)")
    p.add_argument("speech", nargs="?", help="audio or video file with the speech (default: examples/speech.flac)")
    p.add_argument("--toy", action="store_true", help="the drawn example; with FACE: weights/toy.pt draws it")
    motion = p.add_mutually_exclusive_group()
    motion.add_argument("--driving", help="video that gives pose, eyes and brows (default: idle motion)")
    motion.add_argument("--still", action="store_true", help="keep the head of a photo still; lips and eyelids move")
    p.add_argument("--weights", help="network (default: weights/face.pt, for drawn portraits weights/toy.pt)")
    p.add_argument("--refine", type=int, help="steps that fit the generator's weights to a photo for generated frames, 0 "
                   f"for none (default: of a hypernetwork as trained, without one {FIT_STEPS})")
    p.add_argument("--out", default="talk.mp4", help="video to write (default: talk.mp4)")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    place = p.add_mutually_exclusive_group()
    place.add_argument("--box", metavar="x0,y0,x1,y1", help="place of the face in the photo, in pixels")
    place.add_argument("--face", type=int, dest="number", metavar="N", help="use the N-th largest face (default: 1)")
    generated = p.add_mutually_exclusive_group()
    generated.add_argument("--crop", action="store_true", help="show the generator's own frames: only the crop")
    generated.add_argument("--network", action="store_true", help="paste the generator's own frames into the photo")
    p.add_argument("--landmarks", metavar="NAME", help="landmark detector for the photo: mediapipe:FILE, dlib:FILE or "
                   "fan (default: a small network, weights/landmarks.pt)")
    p.add_argument("--grid", action="store_true", help="show photo, driving video and result side by side")
    p.add_argument("--mouth", type=float, default=1.0, help="strength of the lip motion, 0 to 2 (default: 1)")
    p.add_argument("--blink", type=float, default=1.0, help="how far a photo's eyes close, 0 to 1 (default: 1)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--seed", type=int, default=0, help="random seed of blinks and sway (default: 0)")
    args = p.parse_args(argv, mouth=(0, 2), blink=(0, 1))
    if args.face is None and args.toy:
        args.face = TOY_PHOTO
    elif args.face is None:
        args.face, args.box = EXAMPLE_PHOTO, args.box or EXAMPLE_BOX
    args.speech = args.speech or (TOY_SPEECH if args.toy else EXAMPLE_SPEECH)
    return args


def is_video(path) -> bool:
    """Whether a file is a video to dub. False for a photo and for an unreadable file, which load_photo then reports."""
    try:
        photo_size(path)
    except InputError:
        with contextlib.suppress(InputError):
            probe(path)
            return True
    return False


# ------------------------------------------------------------------------------ the weights, and the face in the photo

def square_box(image: np.ndarray) -> tuple | None:
    """Box of the largest square if an image (H, W, 3) is nearly square, else None."""
    return middle_square(image) if np.ptp(image.shape[:2]) <= SQUARE_TOLERANCE * max(image.shape[:2]) else None


load_toy_model = functools.cache(functools.partial(load_model, TOY_WEIGHTS))


def is_drawn(photo: np.ndarray) -> bool:
    """Whether a picture is a square drawn portrait: weights/toy.pt can reconstruct it."""
    box = square_box(photo)
    if box is None:
        return False
    model = load_toy_model()
    x = to_tensor(crop_face(photo, box, model.config.size))  # (3, S, S)
    with torch.inference_mode():
        error = model.reconstruct(x) - x
    return bool(error.abs().mean() < DRAWN_ERROR and error.square().mean() < DRAWN_LOSS * x.var((1, 2)).mean())


def pick_weights(photo: np.ndarray | None, args) -> Path:
    """--weights, else weights/toy.pt for drawn portraits, else weights/face.pt. photo: None for a video"""
    if args.weights or photo is None:
        return Path(args.weights or FACE_WEIGHTS)
    whole_photo = not (args.box or args.number)  # else the face is a part of the photo
    return TOY_WEIGHTS if args.toy or (whole_photo and is_drawn(photo)) else FACE_WEIGHTS


def find_photo_face(photo: np.ndarray, args, template: str) -> tuple[np.ndarray, tuple, str]:
    """The photo turned upright, the box of the face crop, and a message that says how the face was found"""
    if args.box:  # in pixels of the file; load_photo may have shrunk the photo
        width, height = photo_size(args.face)
        return photo, parse_box(args.box, width, height, photo.shape[1] / width), "the face is in --box"
    if template == "toy" and square_box(photo) and not args.number:  # detectors find no drawn faces
        return photo, square_box(photo), "square, taken whole as a drawn portrait (else: --box)"
    try:
        photo, faces, turn = turn_upright(photo)
        if not faces:
            raise InputError("no face was found in any of the four orientations")
    except InputError as error:
        raise InputError(f"{args.face}: {error}; {BOX_ADVICE}") from None
    (H, W), box = photo.shape[:2], face_box(faces, template, args.number or 1)
    file_size = sorted(photo_size(args.face), reverse=W > H)  # width, height; the photo may be shrunk and turned
    scale = max(file_size) / max(H, W)
    file_box = np.clip(scale * np.array(box), 0, file_size * 2)  # as --box expects it
    message = "face at " + ",".join(f"{v:.0f}" for v in file_box)
    if turn:  # --box turns no photo
        message = f"turned {turn}, {message} of the turned photo (--box needs an upright file)"
    if len(faces) > 1 and not args.number:
        message += f", the largest of {len(faces)} (or --face N, or --box)"
    return photo, box, message


def limit_size(photo: np.ndarray, box: tuple) -> tuple[np.ndarray, tuple]:
    """Shrinks a photo (H, W, 3) and a box in it to sides of at most MAX_SIDE, even numbers of pixels."""
    H, W = photo.shape[:2]
    if max(H, W) <= MAX_SIDE:
        return photo, box
    h, w = (2 * round(side * MAX_SIDE / max(H, W) / 2) for side in (H, W))
    photo = np.array(Image.fromarray(photo).resize((w, h), Image.Resampling.LANCZOS))
    return photo, tuple(v * new / old for v, new, old in zip(box, (w, h, w, h), (W, H, W, H)))


# ----------------------------------------------------------------------------------------------- the driving video

def find_driving_faces(path, n: int, template: str) -> tuple[np.ndarray, list, int]:
    """The first n frames of a driving video -> the scene of each (count,), see faces.label_scenes; a box of the face for
    each scene, the median of up to 8 frames; the height in pixels to which the boxes refer. Raises InputError: no face;
    the video is damaged"""
    height = min(probe(path).height, SEARCH_HEIGHT)
    scene, boxes = label_scenes(itertools.islice(read_video(path, 16), n)), []
    pairs = zip(scene, read_video(path, height))
    for k, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        step = -(-np.count_nonzero(scene == k) // SEARCHED_FRAMES)
        searched = [frame for _, frame in itertools.islice(group, 0, None, step)]
        if template == "toy" and square_box(searched[0]):
            found = [square_box(searched[0])]
        else:
            detections = (detect_faces(frame, margins=(1.2, 1.5)) for frame in searched)
            found = [face_box(faces, template) for faces in detections if faces]
        boxes.append(np.median(found, axis=0) if found else boxes[-1] if boxes else None)  # without a face: as before
    first = next((box for box in boxes if box is not None), None)
    if first is None:
        raise InputError(f"{path}: no upright face was found")
    return scene, [first if box is None else box for box in boxes], height


def play_ping_pong(frames, count: int, n: int):
    """Streams n of `count` frames, uint8 (H, W, 3). Too few are played back and forth."""
    with tempfile.TemporaryFile() as stored:  # not in memory: a frame of --grid has up to 5 MB
        for frame in itertools.islice(frames, n):
            if count < n:
                stored.write(frame)
            yield frame
        for k in range(count, n):
            stored.seek(ping_pong(k, count) * frame.nbytes)
            yield np.fromfile(stored, np.uint8, frame.size).reshape(frame.shape)


def driving_crops(path, n: int, size: int, template: str):
    """The number of a driving video's frames, at most n, and a stream of the face in them, uint8 (size, size, 3)"""
    scene, boxes, box_height = find_driving_faces(path, n, template)  # one crop for a scene: the head moves in it
    # decoding at twice the crop's resolution is enough: for 4K video it costs a tenth
    smallest = min(box[3] - box[1] for box in boxes)
    height = min(probe(path).height, max(2, round(2 * size * box_height / smallest)))
    boxes = [box * height / box_height for box in boxes]
    return len(scene), (crop_face(frame, boxes[k], size) for k, frame in zip(scene, read_video(path, height)))


def side_by_side(photo, frames, n: int, args):
    """Streams n frames: photo, or the dubbed video (photo: None) | driving video, if any | result"""
    first = next(frames)
    height = len(first)
    if photo is None:  # it starts again where the speech is longer
        columns = [itertools.chain.from_iterable(read_video(args.face, height) for _ in itertools.count())]
    else:
        width = round(height * photo.shape[1] / photo.shape[0])
        columns = [itertools.repeat(np.array(Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS)))]
    if args.driving:
        count = sum(1 for _ in itertools.islice(read_video(args.driving, 16), n))
        columns.append(play_ping_pong(read_video(args.driving, height), count, n))
    yield from map(np.hstack, zip(*columns, itertools.chain([first], frames)))


# ------------------------------------------------------------------------------- moving the pixels of a photo or video

def photo_landmarks(net, photo, box, args) -> np.ndarray:
    """Landmarks (68, 2) of the face in a box, by the small network or --landmarks. Raises InputError: no face"""
    if not args.landmarks:
        points = find_landmarks(net, photo, box)
        if landmark_scatter(net, photo, points) > SCATTER_LIMIT:
            print(f"{args.face}: landmarks are uncertain (a profile, a covered mouth, or not a face): check the video, "
                  "or try --landmarks or --network")
        return points
    points = landmark_detector(args.landmarks)(photo, box)
    if points is None:
        raise InputError(f"{args.face}: --landmarks {args.landmarks} finds no face; {BOX_ADVICE}")
    return points


def talking_photo(model, photo, box, mel, speech, args):
    """Streams T frames, uint8 (H, W, 3): the network predicts the lips, warp.py moves the photo's pixels. mel: chunks
    (n, 1, 80, 16) of the T windows; speech: (T,), see detect_speech. Raises InputError: no face that can be moved"""
    net, T = load_landmarks(), len(speech)
    try:
        warp = Warp.of(photo, photo_landmarks(net, photo, box, args), net.solid.double().numpy(), model.lip_moves)
    except ValueError as error:
        raise InputError(f"{args.face}: {error}; try another photo, --landmarks, or --network") from None
    opening, shape = mouth_motion(*model.predict_lips(mel), speech, warp.lips.rest_opening, args.mouth)
    motion = head_motion(net, speech, warp.head.turn_limits, args)
    return compute_ahead(functools.partial(warp, opening[k], shape[k], **motion[k]) for k in range(T))


def head_motion(net, speech, turn_limits, args, still: bool = False) -> Motion:
    """Motion of head, eyelids and brows, of the driving video or idle. still: the idle head does not move. speech: (T,);
    turn_limits: see driving_motion. Raises InputError: no face"""
    if args.driving:
        points, scene = track_video(net, args.driving, len(speech))
        if np.isnan(points).all():
            raise InputError(f"{args.driving}: no upright face was found")
        motion = driving_motion(points, *measure_eyes(points), net.solid.double().numpy(), turn_limits, scene)
    else:
        motion = idle_motion(len(speech), speech, args.seed, head=not (still or args.still))
    motion.blinks *= args.blink
    return motion


def dubbed_video(model, mel, speech, args):
    """Streams T frames, uint8 (H, W, 3), of a video with new words. mel, speech: as in talking_photo"""
    if (args.crop or args.driving or args.box or args.landmarks or args.network or args.still or args.toy
            or args.blink != 1 or args.refine is not None):
        raise InputError(f"{args.face}: a video is dubbed, without --driving, --box, --landmarks, --crop, --network, "
                         "--still, --toy, --blink or --refine")
    if not has_lip_moves(model):
        raise InputError(f"{args.weights}: dubbing needs a network of real faces, as weights/face.pt")
    opening, shape = mouth_motion(*model.predict_lips(mel), speech, 0.0, args.mouth)
    T = len(speech)
    count, takes = find_takes(args.face, load_landmarks(), model.lip_moves, T, args.number or 1)
    print(f"{args.face}: {sum(take.T for take in takes)} of {count} frames have a face that can be tracked"
          + ("; the speech is longer: the video starts again" if T > count else ""))
    return compute_ahead(frame_jobs(args.face, takes, count, opening, shape))


def has_lip_moves(model) -> bool:
    """Whether a network has the map from lip shapes to landmarks: networks of real faces do"""
    return bool(model.mouth and model.motion.moves.any())


def compute_ahead(jobs, workers: int = 2):
    """Yields the results of functions without arguments, in order; threads compute them ahead"""
    torch.set_num_threads(1)  # threads compute whole frames: threads inside an operation would wait for each other
    jobs = iter(jobs)
    with ThreadPoolExecutor(workers) as pool:
        pending = deque(pool.submit(job) for job in itertools.islice(jobs, 2 * workers))
        while pending:
            frame = pending.popleft().result()
            pending.extend(pool.submit(job) for job in itertools.islice(jobs, 1))
            yield frame


# --------------------------------------------------------- the generator's own frames, alone or pasted into the photo

def network_frames(model, photo, box, mel, speech, whole: bool, device, args):
    """Streams T frames of the generator: the crop alone, or pasted into the photo (`whole`), where an idle head does not
    move. mel, speech: as in talking_photo. Raises InputError: an option that only moves pixels of a photo"""
    if args.landmarks or (args.mouth != 1 and not has_lip_moves(model)) or (args.blink != 1 and not model.pose):
        raise InputError(f"{args.face}: the generator draws its frames (a drawn face, a tiny photo, --crop, --network): "
                         "leave out --landmarks and, for a drawn face, --mouth and --blink, which have no effect there")
    size = model.config.size
    source = to_tensor(crop_face(photo, box, size)).to(device)  # (3, size, size)
    to_picture, turning, driving, deltas, mouth = to_uint8, bool(args.driving), None, None, None
    if has_lip_moves(model):
        mel = list(mel)  # read twice
        opening, shape = model.predict_lips(mel)
        rest, opening = model.read_opening(source), np.minimum(PAINTED_GAIN * opening, PAINTED_LIMIT)
        opening, shape = mouth_motion(opening, shape, speech, rest, args.mouth)
        lips = np.minimum(opening, max(rest, PAINTED_LIMIT)), shape  # again, because --mouth may enlarge it
        mouth = model.mouth_codes(*lips)
        if model.pose and not model.hyper:
            deltas = fit_to_photo(model, photo, box, source, *lips, FIT_STEPS if args.refine is None else args.refine)
    if model.pose:
        driving = head_motion(load_landmarks(), speech, model.pose.turn_limits, args, still=whole)
        if whole:
            driving.poses[:, 3:] = 0  # a pasted head turns at its place: hair and neck stay
    elif turning:
        count, crops = driving_crops(args.driving, len(speech), size, model.config.template)
        driving = map(to_tensor, play_ping_pong(crops, count, len(speech)))
    if whole:
        to_picture = Paste(photo, box, source.cpu(), *still_and_mask(model, source, turning, deltas), turning)
    batches = model.animate(source, mel, driving, sway=not (whole or args.still), deltas=deltas, mouth=mouth)
    frames = (to_picture(frame) for batch in batches for frame in batch.cpu())  # of (3, size, size)
    return map(to_grey, frames) if is_grey(photo) else frames


def fit_to_photo(model, photo, box, source, opening, shape, steps: int):
    """Weight changes for a photo and its crop `source` (3, S, S), see FCTFG.fit_weights; the images are random motions of
    the photo by warp.py, with lips of the speech, opening (T,) and shape (T, K - 1). None: no steps, or no landmarks by
    which warp.py could move it"""
    net, (photo, box) = load_landmarks(), limit_size(photo, box)
    points = find_landmarks(net, photo, box)
    if not steps or landmark_scatter(net, photo, points) > SCATTER_LIMIT:
        return None
    try:
        warp = Warp.of(photo, points, net.solid.double().numpy(), model.lip_moves)
    except ValueError:
        return None
    some = opening.argsort()[np.linspace(0, len(opening) - 1, FIT_FACES).astype(int)]  # of all openings
    rng = np.random.default_rng(0)
    rng.shuffle(some)
    box = np.multiply(box, len(warp.face.photo) / len(photo))
    motion, images = random_faces(warp, source.shape[-1], box, opening[some], shape[some], rng)
    with torch.no_grad():
        codes = model.moved_codes(source[None], motion, opening[some], shape[some])
    return model.fit_weights(source, codes, to_tensor(images).to(source), steps)


def to_grey(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same without colour, for grey photos: the networks were trained on coloured faces"""
    return np.asarray(Image.fromarray(frame).convert("L").convert("RGB"))


class Paste:
    """Pastes frames of the generator (S x S pixels) into the photo, at the photo's resolution.

        out = photo + mask (frame - still) - mask changed (photo - still - tone)

    The first term adds the change. The second removes the photo's detail where the change is large (`changed`; 1 for a
    turning head): otherwise teeth would show through shut lips. `tone`, the blurred difference of source and still,
    keeps the tone of the skin. photo: uint8 (H, W, 3); box: of the crop in it, in pixels; source: (3, S, S), the crop;
    still: (3, S, S), generated in its place; mask: (S, S) in [0, 1]; turning: whether the head moves."""

    def __init__(self, photo, box, source, still, mask, turning: bool):
        (H, W), S, (x0, y0, x1, y1) = photo.shape[:2], source.shape[-1], (round(v) for v in box)
        self.size = y1 - y0, x1 - x0
        self.inside = slice(max(0, -y0), H - y0), slice(max(0, -x0), W - x0)  # part of the box inside the photo
        self.place = slice(max(0, y0), max(0, y1)), slice(max(0, x0), max(0, x1))
        self.photo, self.still, self.mask, self.turning = photo, self.sharpen(still), mask, turning
        tone = torch.from_numpy(gaussian_filter((source - still).numpy(), (0, TONE_SIGMA * S, TONE_SIGMA * S)))
        self.region = torch.as_tensor(photo[self.place]).movedim(-1, 0).float()  # (3, h, w) in 0 .. 255
        self.detail = self.region - self.enlarge(self.still + tone + 1)

    def sharpen(self, x):
        """Unsharp mask on (3, S, S): the generator's frames are soft"""
        return x + SHARPEN * (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1))

    def enlarge(self, x):
        """Differences (C, S, S) in units of the network -> (C, h, w) in grey levels; x + 1 for colours x"""
        return F.interpolate(127.5 * x[None], self.size, mode="bicubic")[0][(slice(None), *self.inside)]

    def __call__(self, frame):
        """(3, S, S) in [-1, 1] -> uint8 (H, W, 3)"""
        check_finite(frame)
        change = self.sharpen(frame) - self.still
        low, high = CHANGE_RANGE
        changed = smoothstep((F.max_pool2d(change.abs().amax(0)[None], 5, 1, 2) - low) / (high - low))  # (1, S, S)
        changed = torch.ones_like(changed) if self.turning else F.avg_pool2d(changed, 3, 1, 1)
        out = self.region + self.enlarge(self.mask * change) - self.enlarge(self.mask * changed) / 127.5 * self.detail
        picture = self.photo.copy()
        picture[self.place] = (out + 0.5).clamp_(0, 255).byte().movedim(0, -1).numpy()
        return picture


def soft_box(size: int, box: tuple):
    """(size, size): 1 inside a box (fractions of the crop), falling to 0 at its edges within SEAM"""
    t = (torch.arange(size) + 0.5) / size
    x, y = (smoothstep((t - low) / SEAM) * smoothstep((high - t) / SEAM) for low, high in (box[::2], box[1::2]))
    return y[:, None] * x


def still_and_mask(model, source, turning: bool, deltas=None):
    """The generated face at rest (3, S, S) for a photo's crop `source`, and the mask (S, S) of the pixels that may
    change. A turning head: the inversion of the photo, and all of the head. Else the face in silence, and mouth and
    eyes. deltas: see FCTFG.fit_weights"""
    S, template = source.shape[-1], TEMPLATES[model.config.template]
    inversion = model.reconstruct(source, deltas).cpu()
    if turning:  # 1 in the middle, 0 from the circle on: the outline of the head stays
        t = (torch.arange(S) + 0.5) / S * 2 - 1
        return inversion, smoothstep((1 - (t[:, None] ** 2 + t**2).sqrt()) / (3 * SEAM))
    silence, eyes = torch.full((5, 1, N_MELS, WINDOW), SILENCE, device=source.device), soft_box(S, template.eyes)
    if has_lip_moves(model):  # in silence the lips are those of the photo
        own = model.mouth_codes(np.full(5, model.read_opening(source)), np.zeros((5, model.config.shape_dim - 1)))
        rest = next(model.animate(source, silence, sway=False, deltas=deltas, mouth=own))[2].cpu()
        return rest, torch.maximum(soft_box(S, template.lips), eyes)
    # the least squares mix of the mouths of silence and inversion: a smile is closed, a shut mouth stays
    rest = next(model.animate(source, silence, sway=False))[2].cpu()
    mouth, difference = soft_box(S, template.mouth), inversion - rest
    weighted = mouth * difference
    share = float((weighted * (source.cpu() - rest)).sum() / (weighted * difference).sum().clamp_min(1e-6))
    return rest + min(max(share, 0), 1) * mouth * difference, torch.maximum(mouth, eyes)


def main(argv=None):
    args = parse(argv)
    begin = time.perf_counter()

    # check all inputs, the quick checks first
    out = check_output(args.out, args.overwrite, VIDEO_SUFFIXES, (args.face, args.speech, args.driving))
    photo = None if is_video(args.face) else load_photo(args.face)  # (H, W, 3) uint8
    wav = load_audio(args.speech)  # (n,) at 16 kHz
    if args.driving:
        probe(args.driving)
    device = pick_device(args.device)
    torch.set_num_threads(1)  # the detector's layers are too small for several threads
    weights = pick_weights(photo, args)
    model = load_model(weights, device)
    if args.refine is not None:
        model.config.refine = args.refine
    if photo is not None:
        photo, box, message = find_photo_face(photo, args, model.config.template)
        print(f"{args.face}: {message}; network: {weights}; speech: {args.speech}")
        if model.config.template == "toy" and not is_drawn(crop_face(photo, box, model.config.size)):
            print(f"{weights}: trained on drawn faces, but {args.face} is not one: the frames will not resemble it")
    torch.set_num_threads(THREADS)

    sound, T = (args.speech, len(wav)), n_frames(len(wav))
    spectrogram, speech = log_mel(wav, model.config.voice_norm), detect_speech(wav, T)  # (80, S), (T,)
    chunks = np.array_split(np.arange(T), -(-T // MEL_CHUNK))
    mel = (torch.from_numpy(mel_windows(spectrogram, frames)).to(device) for frames in chunks)  # (n, 1, 80, 16)
    del wav  # 4 MB a minute
    torch.manual_seed(args.seed)
    # the whole photo is shown, but of a drawing that is as small as the network's crop: the crop
    whole = photo is not None and not args.crop and (has_lip_moves(model) or max(photo.shape[:2]) > model.config.size)
    if whole:
        photo, box = limit_size(photo, box)
    if photo is None:
        frames = dubbed_video(model, mel, speech, args)
    elif whole and has_lip_moves(model) and not args.network:
        frames = talking_photo(model, photo, box, mel, speech, args)
    else:
        frames = network_frames(model, photo, box, mel, speech, whole, device, args)
    if args.grid:
        frames = side_by_side(photo, frames, T, args)
    try:
        write_video(out, frames, T, sound, args.overwrite)
    except FloatingPointError as error:
        raise InputError(f"{weights}: the network failed, {error}") from None
    print(f"{out}: {T} frames, {T / FPS:.2f} s; {T / (time.perf_counter() - begin):.0f} frames/s end to end")


if __name__ == "__main__":
    run(main)
