"""A photo and speech (and a driving video) -> a talking face: H.264 with the speech, 25 frames a second.

FC-TFG (arXiv 2304.03275) at work. Differs from the paper: of a real face the network only says how the lips go, and the
photo's own pixels are moved (warp.py), at the photo's resolution. --crop shows the network's own frames instead, and
--network pastes them back into the photo (class Paste), as is done with drawn faces.

    python sample.py                                         # examples/astronaut.jpg says examples/speech.flac
    python sample.py face.jpg speech.wav --out talk.mp4      # the whole photo talks, blinks, sways a little
    python sample.py face.jpg speech.wav --driving clip.mp4  # head pose, blinks and brows from clip.mp4
    python sample.py face.jpg speech.wav --crop              # the network's own frames alone
    python sample.py --toy                                   # the drawn face

Each prints one line: the file, its length, its speed. All that can be wrong with the files is found before
the network starts.
"""

import itertools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from audio import n_frames, sound_windows
from checkpoint import pick_device
from faces import (
    TEMPLATES, crop_face, detect_faces, face_box, landmark_detector, parse_box, square_around, turn_upright)
from fusion import load_model
from landmarks import DOUBT, doubt, find_landmarks, load_landmarks, track_landmarks
from media import (
    FPS, SAMPLES_PER_FRAME, VIDEO_SUFFIXES, InputError, Parser, VideoWriter, check_finite, check_output,
    is_grey, load_audio, load_photo, photo_size, probe, read_video, run, to_tensor, to_uint8)
from motion import activity, follow, idle, mouth
from warp import Face, Warp, enlarge

HERE = Path(__file__).resolve().parent
EXAMPLE, SPEECH = HERE / "examples/astronaut.jpg", HERE / "examples/speech.flac"
EXAMPLE_BOX = "134.5,130.1,381.7,377.3"  # where blazeface finds the astronaut's face: no weights are fetched for it
DRAWING, DRAWN_SPEECH = HERE / "examples/face.png", HERE / "examples/speech.wav"
TOY, FACE = HERE / "weights/toy.pt", HERE / "weights/face.pt"
DRAWN = 0.12  # ours: mean difference, of 2 from black to white: drawn portraits have up to .10, a disc .14, photos .25
SQUARE = 0.05  # ours: sides that differ by less than this make a square portrait
LOOKS = 8  # ours: frames of a driving video on which the face is searched
LOOK_HEIGHT = 360  # ours: their height in pixels
LONGEST = 1280  # ours: longest side of the video in pixels; a player's window, and 25 frames/s on a CPU
FEATHER = 0.12  # ours: width of a seam in units of the crop
COLOUR = 0.1  # ours: sigma of what counts as colour, in units of the crop: wider than lips, narrower than a cheek
SPREAD = 0.02  # ours: sigma of how far around a change the detail goes, in units of the crop
CAST = 0.15  # ours: sigma with which a cast of colour is carried inwards, in units of the crop
CRISP = 0.6  # ours: unsharp mask on the network's frames, radius one of its pixels; more shows rings
MOVED = (0.06, 0.2)  # ours: change, of 2 from black to white, that keeps all of the photo's detail; none of it
WAY_OUT = "say where the face is with --box x0,y0,x1,y1 (pixels)"


def parse(argv=None):
    p = Parser(description="A photo and speech (and a driving video) -> a talking face.")
    p.add_argument("face", nargs="?", help="photo (default: examples/astronaut.jpg)")
    p.add_argument("speech", nargs="?", help="sound, or video with it (default: examples/speech.flac)")
    p.add_argument("--toy", action="store_true", help="the drawn example in place of the photo")
    p.add_argument("--driving", help="video that gives pose, eyes, expression (default: the photo's, idling)")
    p.add_argument("--weights", help="network (default: weights/face.pt, for drawn portraits weights/toy.pt)")
    p.add_argument("--refine", type=int, help="refinements of the weights for this photo, where a hypernetwork "
                   "was trained; 0: none (default: as trained)")
    p.add_argument("--out", default="talk.mp4", help="the video to write (default: talk.mp4)")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    p.add_argument("--box", metavar="x0,y0,x1,y1", help="where the face is in the photo, in pixels")
    p.add_argument("--face", type=int, dest="number", metavar="N", help="the N-th largest face (default: 1)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--full", action="store_true", default=None,
                      help="the whole photo, the face pasted back (default: if it has more pixels than the crop)")
    what.add_argument("--crop", action="store_false", dest="full", help="only the crop, as the network makes it")
    what.add_argument("--network", action="store_true", help="the network's own frames, pasted into the photo, where "
                      "the photo's own pixels would be moved")
    p.add_argument("--landmarks", metavar="NAME", help="of the photo: mediapipe:FILE, dlib:FILE or fan, each an optional "
                   "package with its weights (default: a small network, weights/landmarks.pt)")
    p.add_argument("--still", action="store_true", help="the head of a photo does not sway; lips and lids move")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--seed", type=int, default=0, help="of whatever is random: blinks, sway")
    args = p.parse_args(argv)
    if args.face is None:
        args.face, args.box = (DRAWING, args.box) if args.toy else (EXAMPLE, args.box or EXAMPLE_BOX)
    args.speech = args.speech or (DRAWN_SPEECH if args.toy else SPEECH)
    return args


# ------------------------------------------------------------------------------------------------------------
# which part of a picture is the face


def whole(image: np.ndarray) -> tuple | None:
    """The box of a picture that is square already, as near as makes no difference; None otherwise."""
    H, W = image.shape[:2]
    return square_around(W / 2, H / 2, min(H, W)) if abs(H - W) <= SQUARE * max(H, W) else None


def is_drawn(photo: np.ndarray) -> bool:
    """Whether a square picture is one of the drawn portraits that weights/toy.pt knows: that network draws it again."""
    model = load_model(TOY)
    x = to_tensor(crop_face(photo, whole(photo), model.config.size))
    with torch.inference_mode():
        off = model.still(x) - x
    # the second: an even picture is drawn again, too, but all that is in it is what is off (drawn ones: up to .31)
    return bool(off.abs().mean() < DRAWN and off.square().mean() < 0.4 * x.var((1, 2)).mean())


def pick_weights(photo: np.ndarray, args) -> Path:
    """--weights, else the network that knows such pictures: weights/toy.pt for drawn ones, else weights/face.pt."""
    if args.weights:
        return Path(args.weights)
    if args.toy or not FACE.exists():
        return TOY
    return TOY if whole(photo) and not (args.box or args.number) and is_drawn(photo) else FACE


def given_box(photo: np.ndarray, args) -> tuple:
    """--box, in pixels of the file, -> the square around it in the photo, which load_photo may have shrunk."""
    width, height = photo_size(args.face)
    return parse_box(args.box, width, height, photo.shape[1] / width)


def photo_box(photo: np.ndarray, args, template: str) -> tuple[np.ndarray, tuple, str]:
    """The photo, turned where the face in it lies, the square of it that the network gets, and why: --box, else the
    face found, else all of a square."""
    if args.box:
        return photo, given_box(photo, args), "the face is in --box"
    if template == "toy" and whole(photo) and not args.number:  # detectors do not know drawings
        return photo, whole(photo), "square, taken whole as a drawn portrait (else: --box)"
    photo, faces, turned = turn_upright(photo)
    if faces is None and whole(photo) and not args.number:
        return photo, whole(photo), "square, taken whole: no face detector's weights are at hand (or --box)"
    if faces is None:
        raise InputError(f"{args.face}: no face detector's weights are at hand; {WAY_OUT}")
    if not faces:
        raise InputError(f"{args.face}: no face was found, whichever way it is turned; {WAY_OUT}")
    box = face_box(faces, template, args.number or 1)
    how = f"turned {turned}, " if turned else ""
    at = f"face at {','.join(f'{v:.0f}' for v in box)}"
    if len(faces) > 1 and not args.number:
        return photo, box, f"{how}{at}, the largest of {len(faces)} (or --face N, or --box)"
    return photo, box, how + at


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
        reason = "no face that is upright was found" if found[0] is not None else "no face detector's weights are at hand"
        raise InputError(f"{path}: {reason}; crop the video to a square around the face")
    return count, tuple(np.median(boxes, axis=0)), height


def there_and_back(k: int, count: int) -> int:
    """Index of step k when `count` frames are walked to the end and back for ever: 0 1 2 1 0 1 2 .."""
    k %= max(1, 2 * (count - 1))
    return min(k, 2 * (count - 1) - k)


def driving_landmarks(net, path, n: int):
    """Landmarks (T, 68, 2), lids (T, 2) and brows (T, 2) of the first n frames of a driving video, T <= n, in pixels of a
    small copy. Raises InputError: no face."""
    _, box, height = driving_box(path, n, "face")
    return track_landmarks(net, itertools.islice(read_video(path, height), n), box)


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


def network_frames(model, photo, box, mel, n: int, full: bool, device, args):
    """The network's own frames of the crop, or pasted back into the photo (`full`) -> shape, iterator over n frames."""
    size = model.config.size
    source = to_tensor(crop_face(photo, box, size)).to(device)  # (3, size, size)
    driving = driving_frames(args.driving, n, size, model.config.template) if args.driving else None
    show, shape = to_uint8, (size, size)  # what makes a frame of the video of a frame of the network
    if full:
        turning, shape = driving is not None, photo.shape[:2]
        show = Paste(photo, box, source.cpu(), *still_of(model, source, device, turning), turning)
    crops = model.animate(source, mel, driving, sway=not (full or args.still))
    finish = without_colour if is_grey(photo) else lambda frame: frame
    return shape, (finish(show(frame)) for frames in crops for frame in frames.cpu())


# ------------------------------------------------------------------------------------------------------------
# a photo that moves


def photo_landmarks(net, photo, box, args) -> np.ndarray:
    """Landmarks (68, 2) of the face in a box, by the small network or by the detector of --landmarks. A line says where
    they are doubtful. Raises InputError: that detector is not at hand, or sees no face."""
    if not args.landmarks:
        points = find_landmarks(net, photo, box)
        if doubt(net, photo, points) > DOUBT:
            print(f"{args.face}: landmarks are uncertain (a profile, something before the mouth, not a face): check "
                  "the video, or try --landmarks or --network")
        return points

    with landmark_detector(args.landmarks) as detect:
        points = detect(photo, box)
    if points is None:
        raise InputError(f"{args.face}: --landmarks {args.landmarks} finds no face; {WAY_OUT}")
    return points


def talking_photo(model, photo, box, wav, mel, args):
    """A photo that talks -> shape (H, W, 3), iterator over n_frames(len(wav)) frames, uint8 (H, W, 3).

    The network turns the sound into the shape of lips, warp.py moves the photo's pixels. Raises InputError: its landmarks
    are not those of a face that can be moved.
    """
    net, T = load_landmarks(), n_frames(len(wav))
    mean = net.solid.double().numpy()
    try:
        larger, points = enlarge(photo, photo_landmarks(net, photo, box, args), mean)
        warp = Warp(Face(larger, points, mean, len(photo) / len(larger)), model.motion.moves.double().cpu().numpy())
    except ValueError as error:
        raise InputError(f"{args.face}: {error}; try another photo, --landmarks, or --network") from None
    active = activity(wav, T)
    opening, shape = mouth(*model.lips(mel), active, warp.own)
    if args.driving:
        try:
            motion = follow(*driving_landmarks(net, args.driving, T), mean, warp.room)
        except ValueError as error:
            raise InputError(f"{args.driving}: {error} that can be followed") from None
    else:
        motion = idle(T, active, args.seed, head=not args.still)
    return larger.shape, in_order(lambda k: warp(opening[k], shape[k], **motion[k]), T)


def in_order(job, n: int, workers: int = 2):
    """job(0), .. job(n - 1) as a stream, computed ahead by a few threads: PyTorch releases the interpreter's lock"""
    torch.set_num_threads(1)  # a frame each: threads within an operation would only wait for each other
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(job, k) for k in range(min(n, 2 * workers)))
        for k in range(n):
            frame = ahead.popleft().result()
            if k + 2 * workers < n:
                ahead.append(pool.submit(job, k + 2 * workers))
            yield frame


# ------------------------------------------------------------------------------------------------------------
# back into the photo


def limit(photo: np.ndarray, box: tuple) -> tuple[np.ndarray, tuple]:
    """A photo (H, W, 3) and a box in it -> the same, no larger than a video should be (LONGEST, even sides)."""
    H, W = photo.shape[:2]
    if max(H, W) <= LONGEST:
        return photo, box
    h, w = (2 * round(side * LONGEST / max(H, W) / 2) for side in (H, W))
    x0, y0, x1, y1 = box
    photo = np.array(Image.fromarray(photo).resize((w, h), Image.Resampling.LANCZOS))
    return photo, (x0 * w / W, y0 * h / H, x1 * w / W, y1 * h / H)


def cubic(d):
    """Keys' cubic kernel (a = -1/2) at distance d >= 0"""
    return torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, torch.where(d < 2, ((2.5 - 0.5 * d) * d - 4) * d + 2, 0))


def enlarger(first: int, last: int, x0: float, x1: float, size: int):
    """(last - first, size): reads `size` cells that span x0..x1 at the centres of pixels first .. last - 1.

    Cubic, antialiased where pixels are larger than cells; beyond the outermost cells these repeat.
    """
    cells = size / (x1 - x0)  # a pixel
    u = (torch.arange(first, last, dtype=torch.float64) + 0.5 - x0) * cells - 0.5
    wide = max(1.0, cells)
    margin = int(np.ceil(2 * wide)) + int(np.ceil(cells))
    taps = torch.arange(-margin, size + margin)
    weight = cubic((u[:, None] - taps).abs() / wide)
    weight /= weight.sum(1, keepdim=True)
    return torch.zeros(last - first, size, dtype=torch.float64).index_add_(1, taps.clamp(0, size - 1), weight).float()


def span(lo: float, hi: float, x0: float, x1: float, n: int) -> tuple[int, int]:
    """The pixels first .. last - 1 of n that touch both lo..hi and x0..x1."""
    return max(0, int(max(lo, x0))), min(n, int(np.ceil(min(hi, x1))))


def blurrer(size: int, sigma: float):
    """(size, size): a Gaussian of sigma * size cells; edges keep their brightness"""
    x = torch.arange(size)
    weight = torch.exp(-0.5 * ((x[:, None] - x) / (sigma * size)) ** 2)
    return weight / weight.sum(1, keepdim=True)


def separable(rows, x, columns):
    """rows (h, S) and columns (w, S) applied to pictures x (.., S, S) -> (.., h, w)"""
    return rows @ x @ columns.T


def smoothstep(x):
    """0 below 0, 1 above 1, smooth between"""
    return x.clamp(0, 1) ** 2 * (3 - 2 * x.clamp(0, 1))


def soft_box(size: int, box: tuple):
    """(size, size): 1 inside a box (fractions of the crop), falling to 0 at its edges over FEATHER"""
    t = (torch.arange(size) + 0.5) / size
    x, y = (smoothstep((t - lo) / FEATHER) * smoothstep((hi - t) / FEATHER) for lo, hi in (box[::2], box[1::2]))
    return y[:, None] * x


def oval(size: int):
    """(size, size): 1 in the middle of the crop, falling to 0 towards the circle in it: a face without its hair's outline

    Ours: the outline of a head that turns in a square would be cut off at the seam; the photo's stands instead.
    """
    t = (torch.arange(size) + 0.5) / size * 2 - 1
    return smoothstep((1 - (t[:, None] ** 2 + t**2).sqrt()) / (3 * FEATHER))


class Paste:
    """Puts frames of the network (the crop, S x S pixels) back into the photo, at the photo's resolution.

        out = photo + mask (frame - still) - mask moved (photo - still - colour)

    The first term adds the change: where frame and still agree, the photo stays as it is, pore by pore. The second
    takes the photo's detail away where the change is large: teeth must not shine through lips that closed over them.
    What changes at the mask's own edge is no movement but a cast of colour: it is spread inwards and taken off the change
    (a cheap form of Poisson image editing, Perez et al. 2003), so that there is no seam.
    `colour` is what still differs from the photo by in the large, and stays: skin keeps its own tone. Where `moved` is
    1, this is a feathered copy of the colour-matched frame, and so it is everywhere for a head that turns.

    photo: uint8 (H, W, 3); box: x0, y0, x1, y1 of the crop in it, in pixels; source: (3, S, S) the crop itself;
    still: (3, S, S) the generated frame that stands for it; mask: (S, S) in [0, 1]; turning: the head moves.
    """

    def __init__(self, photo, box, source, still, mask, turning: bool):
        H, W = photo.shape[:2]
        S, (x0, y0, x1, y1) = source.shape[-1], box
        used = mask.nonzero()  # (n, 2): only this part of the crop is ever touched, with a cell more for the cubic
        (top, left), (bottom, right) = used.amin(0).tolist(), used.amax(0).tolist()
        rows = span(y0 + (y1 - y0) * (top - 2) / S, y0 + (y1 - y0) * (bottom + 3) / S, y0, y1, H)
        columns = span(x0 + (x1 - x0) * (left - 2) / S, x0 + (x1 - x0) * (right + 3) / S, x0, x1, W)
        self.rows, self.columns = enlarger(*rows, y0, y1, S), enlarger(*columns, x0, x1, S)
        self.soft, self.spread, wide, self.far = (blurrer(S, sigma) for sigma in (1 / S, SPREAD, COLOUR, CAST))
        self.edge = mask * (1 - mask)
        self.photo, self.still, self.mask, self.turning = photo, self.crisp(still), mask, turning
        self.place = (slice(*rows), slice(*columns))
        # from here on in steps of a byte
        region = torch.as_tensor(photo[self.place]).movedim(-1, 0).float()  # (3, h, w)
        colour = separable(wide, source - still, wide)
        self.detail = region - self.enlarge(self.still + colour + 1)
        self.region = region + 0.5  # rounds when cut off

    def crisp(self, x):
        return x + CRISP * (x - separable(self.soft, x, self.soft))

    def enlarge(self, x):
        """(.., S, S) in units of the network -> (.., h, w) in steps of a byte"""
        return separable(self.rows, 127.5 * x, self.columns)

    def cast(self, change):
        """change (3, S, S) -> (3, S, S): its values on the mask's edge, carried on over all of it"""
        sums, weights = (separable(self.far, x, self.far) for x in (self.edge * change, self.edge))
        return sums / weights.clamp_min(1e-6)

    def moved(self, change):
        """change (3, S, S) -> (S, S) in [0, 1]: where the photo's detail is no longer true"""
        if self.turning:
            return torch.ones_like(self.mask)
        most = F.max_pool2d(change.abs().amax(0)[None], 3, 1, 1)[0]
        most = separable(self.spread, most, self.spread)
        return smoothstep((most - MOVED[0]) / (MOVED[1] - MOVED[0]))

    def __call__(self, frame):
        """(3, S, S) in [-1, 1] -> uint8 (H, W, 3)"""
        check_finite(frame)
        change = self.crisp(frame) - self.still
        if not self.turning:
            change = change - self.cast(change)
        out = self.enlarge(self.mask * change)  # (3, h, w); all in place: these are the slow lines
        out.addcmul_(self.enlarge(self.mask * self.moved(change)) / 127.5, self.detail, value=-1).add_(self.region)
        picture = self.photo.copy()
        picture[self.place] = out.clamp_(0, 255).byte().movedim(0, -1).numpy()
        return picture


def without_colour(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same in grey: what a photo without colour gets of networks that know skin and lips only"""
    return np.asarray(Image.fromarray(frame).convert("L"))[..., None].repeat(3, 2)


def still_of(model, source, device, turning: bool):
    """What stands still in the frames of a photo: (still (3, S, S), mask (S, S) of what may move in it).

    In the mouth it is the generated face that fits the photo best on the way from the one at rest (in silence) to the
    one that holds the photo as it is (its inversion): a smile is to be closed by the change, a closed mouth to be left
    alone. Elsewhere it is the face at rest: eyes only blink. A head that turns is replaced as a whole.
    """
    S, template = source.shape[-1], TEMPLATES[model.config.template]
    own = model.still(source.to(device)).cpu()
    if turning:
        return own, oval(S)
    silence = sound_windows(np.zeros(5 * SAMPLES_PER_FRAME, np.float32), range(5))
    rest = next(model.animate(source.to(device), torch.from_numpy(silence).to(device), sway=False))[2].cpu()
    mouth = soft_box(S, template.lips if model.mouth else template.mouth)  # with a mouth code speech is told there
    eyes = soft_box(S, template.eyes)
    way = own - rest
    share = float((mouth * way * (source - rest)).sum() / (mouth * way * way).sum().clamp_min(1e-6))  # least squares
    return rest + min(max(share, 0), 1) * mouth * way, torch.maximum(mouth, eyes)


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
    weights = pick_weights(photo, args)
    model = load_model(weights, device)
    if args.refine is not None:
        model.config.refine = args.refine
    size, template = model.config.size, model.config.template
    T = n_frames(len(wav))
    photo, box, how = photo_box(photo, args, template)
    print(f"{args.face}: {how}; network: {weights}")

    pieces = np.array_split(np.arange(T), -(-T // 256))
    mel = (torch.from_numpy(sound_windows(wav, k)).to(device) for k in pieces)  # (k, 1, 80, 16), T in all

    torch.manual_seed(args.seed)
    full = max(photo.shape[:2]) > size if args.full is None else args.full
    if full:
        photo, box = limit(photo, box)
    if full and model.config.landmarks and model.motion.moves.any() and not args.network:
        shape, frames = talking_photo(model, photo, box, wav, mel, args)
    else:
        shape, frames = network_frames(model, photo, box, mel, T, full, device, args)
    with VideoWriter(out, *shape[:2], wav, args.overwrite, args.speech) as video:
        try:
            for frame in tqdm(frames, total=T, unit="frame"):
                video.write(frame)
        except FloatingPointError as error:
            raise InputError(f"{weights}: the network fails, {error}") from None
        assert video.count == T, f"{video.count} frames for {T} of sound"
    print(f"{out}: {T} frames, {T / FPS:.2f} s; {T / (time.perf_counter() - begin):.0f} frames/s end to end")


if __name__ == "__main__":
    run(main)
