"""Where a face is in an image: crop templates, the mouth mask, face detectors, landmark detectors and their store."""

import itertools
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import correlate1d  # scipy.signal takes a second to import

from checkpoint import fetch, wrap_errors
from media import InputError, check_file

# ------------------------------------- crops: a square of an image in which eyes and mouth lie where the template says

@dataclass(frozen=True)
class Template:
    """A square crop of a face. Boxes are x0, y0, x1, y1 as fractions of the crop."""

    mouth: tuple  # hidden from the motion encoder, and weighted in losses: lips, cheeks and all of the jaw
    eyes: tuple
    lips: tuple  # the part of the mouth box that the MouthEncoder reads
    # the crop in units of a detection's larger side: its side, and the shift of its centre (right, down)
    side: float
    shift: tuple
    points: tuple = ()  # of both eyes and the middle of the mouth, as fractions; used before side and shift


TEMPLATES = {
    "toy": Template(mouth=(0.25, 0.55, 0.75, 0.90), eyes=(0.22, 0.30, 0.78, 0.56), lips=(0.25, 0.55, 0.75, 0.90),
                    side=1.5, shift=(0, 0)),
    # UTKFace's crop, so that its photos are used whole: on 150 of them and their mirror images blazeface's key points
    # are, at the median, eyes at .293 and .690 across, .298 down, mouth at .490 across, .723 down; ours is symmetric
    "face": Template(mouth=(0.10, 0.54, 0.90, 1.0), eyes=(0.14, 0.18, 0.86, 0.42),
                     lips=(0.22, 0.58, 0.78, 0.94), side=1.04, shift=(0, -0.015),
                     points=((0.302, 0.298), (0.698, 0.298), (0.5, 0.723))),
    # FFHQ's alignment (Karras et al. 2019), that of published generators and pSp, without its rotation. The points are
    # those of FFHQ faces in facexlib, made symmetric; the boxes are those of "face", brought to these points
    "ffhq": Template(mouth=(0.25, 0.61, 0.75, 0.92), eyes=(0.28, 0.39, 0.72, 0.55),
                     lips=(0.33, 0.64, 0.67, 0.86), side=1.7, shift=(0, -0.17),
                     points=((0.377, 0.469), (0.623, 0.469), (0.5, 0.725))),
    # SyncNet v2's crops, 1.4 times a detection and lower (Chung & Zisserman 2016); packs are not cut so
    "syncnet": Template(mouth=(0.2, 0.38, 0.8, 0.72), eyes=(0.23, 0.11, 0.77, 0.29),
                        lips=(0.29, 0.41, 0.71, 0.67), side=1.4, shift=(0, 0.2),
                        points=((0.353, 0.196), (0.647, 0.196), (0.5, 0.512))),
}
# eyes, tip of the nose, corners of the mouth in the 112 px crops that ArcFace was trained on (InsightFace)
ARCFACE_POINTS = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
                           (70.7299, 92.2041)])  # fmt: skip


def square_around(x: float, y: float, side: float) -> tuple:
    """The box x0, y0, x1, y1 of a square"""
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def middle_square(image: np.ndarray) -> tuple:
    """The largest square in the middle of an image (H, W, ..)"""
    H, W = image.shape[:2]
    return square_around(W / 2, H / 2, min(H, W))


def fit_square(points, wanted) -> tuple[float, float, float]:
    """x, y, side of the square in which `wanted`, (K, 2) as fractions of it, lie nearest to points (K, 2)"""
    points, wanted = np.asarray(points, float), np.asarray(wanted, float)
    centred = wanted - wanted.mean(0)
    side = (centred * points).sum() / (centred**2).sum()
    return (*(points.mean(0) - side * wanted.mean(0)), side)


def square_in_crop(template: str, wanted: str) -> tuple[float, float, float]:
    """x, y, side of the crop `wanted` as fractions of the crop `template`; all of it where one of them has no points"""
    a, b = TEMPLATES[template].points, TEMPLATES[wanted].points
    return fit_square(a, b) if a and b else (0.0, 0.0, 1.0)


def face_box(faces: list[tuple], template: str, number: int = 1) -> tuple:
    """Faces of detect_faces -> the square crop (x0, y0, x1, y1) of face `number`, 1 the largest, by its points
    (three times as exact), without points by the detector's box"""
    if not 1 <= number <= len(faces):
        raise InputError(f"--face {number}: the number of faces found is {len(faces)}")
    x0, y0, x1, y1 = faces[number - 1][:4]
    t, points = TEMPLATES[template], np.reshape(faces[number - 1][5:], (-1, 2))
    if len(points) and t.points:
        x, y, side = map(float, fit_square(points, t.points))
        if side > 0:
            return (x, y, x + side, y + side)
    unit = max(x1 - x0, y1 - y0)
    return square_around((x0 + x1) / 2 + t.shift[0] * unit, (y0 + y1) / 2 + t.shift[1] * unit, t.side * unit)


def parse_box(text: str, width: int, height: int, scale: float = 1.0) -> tuple:
    """--box "x0,y0,x1,y1" in pixels of a width x height image -> the square around it in that image at `scale`"""
    try:
        x0, y0, x1, y1 = (float(v) for v in text.split(","))
    except ValueError:
        raise InputError(f"--box {text}: expected four numbers, x0,y0,x1,y1") from None
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(f"--box {text}: not a box inside the image of {width}x{height} pixels")
    return square_around(scale * (x0 + x1) / 2, scale * (y0 + y1) / 2, scale * max(x1 - x0, y1 - y0))


def crop_face(image: np.ndarray, box: tuple, size: int) -> np.ndarray:
    """uint8 (H, W, 3), box in pixels -> uint8 (size, size, 3); beyond the image its border is repeated."""
    H, W = image.shape[:2]
    x0, y0, x1, y1 = box
    assert x1 > x0 and y1 > y0, f"empty box {box}"
    left, top = max(0, int(np.ceil(-x0))), max(0, int(np.ceil(-y0)))
    right, bottom = max(0, int(np.ceil(x1)) - W), max(0, int(np.ceil(y1)) - H)
    if left or top or right or bottom:
        image = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge")
    box = (x0 + left, y0 + top, x1 + left, y1 + top)
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box=box))


def resize_square(x, size: int):
    """(N, 3, H, W) -> (N, 3, size, size), bilinear without prefilter: OpenCV's default, which the experts were fed"""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def cut_square(x: torch.Tensor, left: int, top: int, side: int) -> torch.Tensor:
    """(.., H, W) -> (.., side, side), from column `left` and row `top` on; the border is repeated beyond x"""
    rows, columns = ((first + torch.arange(side)).clamp(0, edge - 1) for first, edge in zip((top, left), x.shape[-2:]))
    return x[..., rows[:, None], columns]


def recrop(frames: torch.Tensor, template: str, wanted: str) -> torch.Tensor:
    """Crops (.., 3, H, H) of one template -> the crop `wanted` of the same faces, at the same size."""
    H = frames.shape[-1]
    left, top, side = (round(H * v) for v in square_in_crop(template, wanted))
    if (left, top, side) == (0, 0, H):
        return frames
    return resize_square(cut_square(frames, left, top, side).flatten(0, -4), H).unflatten(0, frames.shape[:-3])


def box_slices(box: tuple, H: int, W: int) -> tuple[slice, slice]:
    """Box x0, y0, x1, y1 in fractions of an image of H x W pixels -> its rows, its columns"""
    x0, y0, x1, y1 = box
    return slice(round(y0 * H), round(y1 * H)), slice(round(x0 * W), round(x1 * W))


def mask_mouth(frames: torch.Tensor, template: str, part: str = "mouth") -> torch.Tensor:
    """frames (.., 3, H, W) -> a copy with a grey (0) box: THE place that makes lips come from sound"""
    rows, cols = box_slices(getattr(TEMPLATES[template], part), *frames.shape[-2:])
    frames = frames.clone()
    frames[..., rows, cols] = 0
    return frames


# ----------------------------------------------------------------------------------------- face detection by blazeface
# a face: x0, y0, x1, y1, score, then x, y of the eye on the image's left, the other eye and the mouth, in pixels

MIN_SCORE = 0.65  # ours: 2 of 100 UTKFace portraits lie below; a dog has .63, a cat .5, textures less
SAME_FACE = 0.3  # overlap (intersection over union) of two boxes of one face; ours
MARGIN = 1.2  # of the larger side of a video's frame: the square that is searched (ours: faces at the edge are found)
NEAR = 2.0  # box sides: the square of `redetect` (ours: there key points scatter least, 2 of 128 px)


@lru_cache
def face_detectors() -> list:
    """Both models of blazeface (1 MB), that for near faces first, loaded once; [] where they cannot be fetched"""
    from face_alignment.detection.blazeface import FaceDetector  # here: the import takes seconds

    try:
        anchors, near, far = (str(fetch(name)) for name in ("blazeface_anchors", "blazeface", "blazeface_back"))
    except InputError:
        return []
    options = dict(device="cpu", path_to_anchor=anchors, min_score_thresh=0.3)  # detect_faces is stricter
    return [FaceDetector(path_to_detector=path, back_model=path == far, **options) for path in (near, far)]


def require_detectors() -> list:
    """face_detectors. Raises InputError: there are none"""
    if not face_detectors():
        raise InputError("no face detector's weights are at hand (see TORCH_HOME)")
    return face_detectors()


def square_view(image: np.ndarray, x: int, y: int, side: int, size: int) -> np.ndarray:
    """The square of uint8 (H, W, 3) whose corner is x, y -> uint8 (size, size, 3), grey beyond the image."""
    canvas = Image.new("RGB", (side, side), (128, 128, 128))
    canvas.paste(Image.fromarray(image), (-x, -y))
    return np.array(canvas.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BILINEAR))


def whole_square(image: np.ndarray, margin: float) -> tuple[int, int, int]:
    """x, y, side of the square around a whole image, `margin` times its larger side."""
    H, W = image.shape[:2]
    side = round(margin * max(H, W))
    return (W - side) // 2, (H - side) // 2, side


def detect(detector, images: list, squares: list) -> list[list[np.ndarray]]:
    """Faces that one model finds in a square (x, y, side) of each image, a list an image."""
    network = detector.face_detector
    size = 256 if network.back_model else 128
    views = [square_view(image, *square, size) for image, square in zip(images, squares)]
    # y0, x0, y1, x1, then x, y of eye, eye, nose, mouth, ear, ear as fractions, and the score
    order = [1, 0, 3, 2, 16, 4, 5, 6, 7, 10, 11]
    batches = (network.predict_on_batch(np.stack(views[i : i + 16])) for i in range(0, len(views), 16))
    found = [np.asarray(faces, np.float64).reshape(-1, 17)[:, order] for batch in batches for faces in batch]
    places = [0, 1, 2, 3, *range(5, 11)]
    for faces, (x, y, side) in zip(found, squares):
        faces[:, places] = faces[:, places] * side + np.resize([x, y], len(places))
    return [list(faces) for faces in found]


def redetect(images: list, faces: list) -> list[np.ndarray]:
    """A face of each image, detected once more in a square of NEAR times its size, where that finds it"""
    squares = []
    for x0, y0, x1, y1 in (face[:4] for face in faces):
        side = max(8, round(NEAR * max(x1 - x0, y1 - y0)))
        squares.append((round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), side))
    near = detect(face_detectors()[0], images, squares)
    best = [max(found, key=lambda other: overlap(other, face), default=face) for face, found in zip(faces, near)]
    return [other if overlap(other, face) > SAME_FACE else face for face, other in zip(faces, best)]


def overlap(a, b) -> float:
    """Intersection over union of two boxes."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, w) * max(0, h)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def is_upright(face) -> bool:
    """Whether a face's points lie less than 40 degrees off upright: crops are not rotated"""
    eye, other, mouth = np.reshape(face[5:11], (3, 2))
    across, down = other - eye, mouth - (eye + other) / 2
    return bool(across[0] > 1.2 * abs(across[1]) and down[1] > 1.2 * abs(down[0]))


def largest_first(faces) -> list[tuple]:
    return sorted((tuple(map(float, face)) for face in faces), key=lambda b: (b[0] - b[2]) * (b[3] - b[1]))


def detect_faces(image: np.ndarray, margins: tuple = (1.0, 1.2, 1.5, 2.0)) -> list[tuple]:
    """uint8 (H, W, 3) -> its faces, the largest first. A single detection is not reliable: a dog can score .82 and
    a woman .55. So both models search the image inside wider and wider margins. A face is what a third of the
    searches find with a mean score of MIN_SCORE, and `redetect` finds upright with that score (a cup seen from
    above has .7 from afar and .5 from near). Its box is the mean."""
    detectors, groups = require_detectors(), []  # one list of detections a face
    for detector, margin in itertools.product(detectors, margins):
        for face in detect(detector, [image], [whole_square(image, margin)])[0]:
            group = next((g for g in groups if overlap(g[0], face) > SAME_FACE), None)
            groups.append([face]) if group is None else group.append(face)
    faces = [np.mean(g, 0) for g in groups if 3 * len(g) >= len(margins) * len(detectors)]
    faces = [face for face in faces if face[4] >= MIN_SCORE]
    near = redetect([image] * len(faces), faces)
    return largest_first(face for face, seen in zip(faces, near) if is_upright(seen) and seen[4] >= MIN_SCORE)


def find_faces(frames: list) -> list[list[tuple]]:
    """Frames of one video, uint8 (H, W, 3) -> for each what detect_faces gives, by one or two detections in place
    of eight: `face_tracks` tolerates a wrong one."""
    found = [[] for _ in frames]
    for detector in require_detectors():
        blank = [i for i, faces in enumerate(found) if not faces]
        images = [frames[i] for i in blank]
        for i, faces in zip(blank, detect(detector, images, [whole_square(image, MARGIN) for image in images])):
            found[i] = [face for face in faces if face[4] >= MIN_SCORE]
    near = iter(redetect([frame for frame, faces in zip(frames, found) for _ in faces], sum(found, [])))
    return [largest_first(filter(is_upright, itertools.islice(near, len(faces)))) for faces in found]


def turn_upright(image: np.ndarray) -> tuple[np.ndarray, list[tuple], str]:
    """A photo, uint8 (H, W, 3) -> the same turned so that a face in it is upright, what detect_faces finds there,
    and how it was turned in words; unchanged where no way shows a face."""
    for k, how in enumerate(("", "by 90 degrees to the left", "by 180 degrees", "by 90 degrees to the right")):
        turned = np.ascontiguousarray(np.rot90(image, k))
        if faces := detect_faces(turned):
            return turned, faces, how
    return image, [], ""


# --------------------------------------------------------- clips: stretches of a video in which one box holds one face

DETECT_EVERY = 5  # frames (ours: a fifth of a second)
MAX_GAP = 3  # detections; ours: a face that is gone for longer, .6 s, ends its clip
MAX_CLIP_FRAMES = 150  # frames of a clip at most: what is held in memory while its box is found, 415 MB at 720p
SHORTEST = 10  # frames; ours: one five-frame window, and another that is not its neighbour
MAX_HEIGHT = 720  # pixels: videos are decoded at this height at most
STEADY = 0.35  # of the box: a face that moves farther has no box of its own in one clip
CUT, CUT_RATIO = 20, 4  # a cut changes the mean pixel by so many of 255, and so many times as much as its neighbours


def label_scenes(frames) -> np.ndarray:
    """Frames of a video, from any iterable -> the number of the scene of each, (n,) from 0 on, by 256 pixels of each."""
    change, last = [], None  # mean difference of each frame to the one before
    for frame in frames:
        rows, columns = ((np.arange(16) * 2 + 1) * side // 32 for side in frame.shape[:2])
        small = frame[rows[:, None], columns].astype(np.float32)  # (16, 16, 3)
        change.append(0.0 if last is None else np.abs(small - last).mean())
        last = small
    cut = np.zeros(len(change), bool)
    for k in np.flatnonzero(np.array(change) > CUT):
        near = np.delete(change[max(1, k - DETECT_EVERY) : k + DETECT_EVERY + 1], min(k - 1, DETECT_EVERY))
        cut[k] = not len(near) or change[k] > CUT_RATIO * np.median(near)
    return np.cumsum(cut)


def link_tracks(found: list[list[tuple]], scene: np.ndarray) -> list[dict]:
    """Faces of find_faces, and the scene of each of its frames -> tracks: one face's {frame: face}"""
    tracks = []
    for i, faces in enumerate(found):
        open_tracks = [t for t in tracks if i - max(t) <= MAX_GAP and scene[max(t)] == scene[i]]
        pairs = [(overlap(t[max(t)], face), n, k) for n, t in enumerate(open_tracks) for k, face in enumerate(faces)]
        taken = set()
        for likeness, n, k in sorted(pairs, reverse=True):
            if likeness > SAME_FACE and i not in open_tracks[n] and k not in taken:
                open_tracks[n][i] = faces[k]
                taken.add(k)
        tracks += [{i: face} for k, face in enumerate(faces) if k not in taken]
    return tracks


def steady_parts(track: dict, begin: int, end: int, template: str) -> list[tuple]:
    """A track in frames begin .. end-1 -> [(begin, end, median box, "")], its halves' if that does not hold it"""
    boxes = np.array([face_box([face], template) for face in track.values()])  # (n, 4)
    box = np.median(boxes, 0)
    if np.percentile(np.abs(boxes - box).max(1), 90) <= STEADY * (box[2] - box[0]):
        return [(begin, end, tuple(map(float, box)), "")]
    at = sorted(track)
    half = len(at) // 2
    middle, (first, second) = at[half] * DETECT_EVERY, ({i: track[i] for i in part} for part in (at[:half], at[half:]))
    return steady_parts(first, begin, middle, template) + steady_parts(second, middle, end, template)


def find_clips(frames: list[np.ndarray], template: str = "face") -> list[tuple]:
    """Frames of a stretch of video -> [(begin, end, box or None, reason)], which cover it: a clip has one box, so
    that its crop does not wobble; what is not a clip has a reason. A clip ends where the scene ends, the face is
    gone, or one box would not hold it. Of several faces the largest for the longest time is taken."""
    scene, found = label_scenes(frames), find_faces(frames[::DETECT_EVERY])
    tracks = link_tracks(found, scene[::DETECT_EVERY])
    tracks.sort(key=lambda track: -sum((f[2] - f[0]) * (f[3] - f[1]) for f in track.values()))
    clips, taken = [], np.zeros(len(frames), bool)
    for track in tracks:
        begin, end = min(track) * DETECT_EVERY, max(track) * DETECT_EVERY + 1
        same = np.flatnonzero(scene == scene[begin])  # frames
        if same[0] > begin - DETECT_EVERY:  # in the scene's first detection: the face was there from its beginning on
            begin = int(same[0])
        if same[-1] < end - 1 + DETECT_EVERY:
            end = int(same[-1]) + 1
        if not taken[begin:end].any():
            taken[begin:end] = True
            clips += [clip for clip in steady_parts(track, begin, end, template) if clip[1] - clip[0] >= SHORTEST]
    n = sum(map(bool, found))
    reason = "no face for long enough, or one that moves too far" if n else "no face"
    reason += f" (a face in {n} of {len(found)} frames looked at)"
    ends = [0, *(k for clip in sorted(clips) for k in clip[:2]), len(frames)]
    return sorted(clips + [(a, b, None, reason) for a, b in zip(ends[::2], ends[1::2]) if a < b])


def find_clip_box(frames: list[np.ndarray]) -> tuple:
    """The box of the longest clip in a few seconds' frames. InputError, without the file's name: less than half"""
    begin, end, box, reason = max(find_clips(frames), key=lambda s: (s[2] is not None, s[1] - s[0]))
    if box is None or 2 * (end - begin) < len(frames):
        raise InputError(reason or "a face that stays for less than half of the time")
    return box


# -------------------------------------------------------------------------------------------------------------- points

K = 68  # iBUG's landmarks
EYE_CORNERS = 36, 45  # outer corners


def to_complex(points: np.ndarray) -> np.ndarray:
    """(.., 2) -> complex x + iy (..)"""
    return points[..., 0] + 1j * points[..., 1]


def similarity(points: np.ndarray, target: np.ndarray):
    """The similarity transform a p + b that brings points (K,) nearest to target (.., K), by least squares -> a, b
    (..), all complex, x + iy, of NumPy or torch: |a| is the scale, arg a the rotation"""
    centred = points - points.mean()
    a = (target * centred.conj()).sum(-1) / (abs(centred) ** 2).sum()
    return a, target.mean(-1) - a * points.mean()


def warp_face(image: np.ndarray, a: complex, b: complex, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3): point u shows point a u + b of the image, black beyond it"""
    shrink = max(1, int(abs(a)))  # first, as the transform has no prefilter
    a, b = a / shrink, b / shrink
    to_source = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
    image = Image.fromarray(image).reduce(shrink)
    return np.array(image.transform((size, size), Image.Transform.AFFINE, to_source, Image.Resampling.BILINEAR))


PCAVS_POINTS = np.array([87 + 59j, 137 + 59j, 112 + 120j]) + 0.5 + 0.5j  # x + iy of eyes and mouth in PC-AVS's 224 px
# x0, y0, x1, y1 in these 224 pixels
PCAVS_INPUT = (16, 0, 208, 192)  # what its networks take
PCAVS_FILE = (0, 0, 224, 224)  # what `pcavs.py align` writes


def eyes_and_mouth(points: np.ndarray) -> np.ndarray:
    """Landmarks (.., 68, 2) -> middles of both eyes and of the inner lips, complex (.., 3)"""
    return np.stack([to_complex(points[..., a:b, :].mean(-2)) for a, b in ((36, 42), (42, 48), (60, 68))], -1)


def align_frames(frames, points: np.ndarray, size: int, box: tuple = PCAVS_INPUT):
    """Frames, uint8 (H, W, 3), and eyes and mouth in them, (T, 3) in units of H -> a stream of uint8 (size, size, 3), the
    box of PC-AVS's 224 px. Scale and rotation are the mean, the mouth is held in its place; black beyond a frame."""
    scale = similarity(points.mean(0), PCAVS_POINTS)[0]
    step, corner = (box[2] - box[0]) / size / scale, (complex(*box[:2]) - PCAVS_POINTS[2]) / scale
    for frame, mouth in zip(frames, points[:, 2]):
        yield warp_face(frame, len(frame) * step, len(frame) * (mouth + corner), size)


# ---------------------------------------------------------------------------------------- landmark detectors of others

FAN_SCORE = 0.2  # ours: mean height of FAN's 68 heat maps below which there is no face
VIEW_MARGIN, VIEW_SIDE = 0.25, 256  # MediaPipe and dlib get the crop with this margin on each side, in pixels; ours
# dlib's box in a crop of this template, middle and side: ours, best of a few; that of "ffhq" is the same part of the face
DLIB_BOX = {"face": ((0.5, 0.58), 0.9), "ffhq": ((0.5, 0.64), 0.55)}
# of MediaPipe's 478 points those that lie nearest to iBUG's 68. Where two choices were in use, those nearer to dlib's
# points in 155 frames of 63 clips and photos: at the 12 points in doubt 6.4 % of the eye distance off, others 8.2, 9.3
MEDIAPIPE_POINTS = [
            127, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 356,       # chin, left to right
            70, 63, 105, 66, 107, 336, 296, 334, 293, 300, 168, 197, 5, 4, 75, 97, 2, 326, 305,      # brows, nose
            33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,                               # eyes
            61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87]  # lips, outer, inner


@contextmanager
def landmark_detector(spec: str, template: str = "face", device="cpu"):
    """A landmark detector as a function: image uint8 (H, W, 3), box -> (68, 2) in pixels of the image, or None.

    spec: "mediapipe:FILE", "dlib:FILE" or "fan". box: where the crop of `template` lies in the image, x0, y0, x1,
    y1 in pixels; None: all of the image. InputError: a package or weights are missing, a file of another kind."""
    kind, _, file = spec.partition(":")
    make = dict(mediapipe=mediapipe_landmarks, dlib=dlib_landmarks, fan=fan_landmarks).get(kind)
    if make is None or bool(file) != (kind != "fan"):
        raise InputError(f"--landmarks {spec}: expected mediapipe:FILE, dlib:FILE or fan")
    try:
        detect = make(file and check_file(file), template, device)
    except ImportError as error:
        package = "dlib-bin" if kind == "dlib" else kind
        raise InputError(f"--landmarks {spec} needs a package: pip install {package} ({error})") from None

    def landmarks(image, box=None):
        x0, y0, x1, y1 = (0, 0, image.shape[1], image.shape[0]) if box is None else box
        if kind == "fan":
            return detect(image, (x0, y0, x1, y1))
        margin = VIEW_MARGIN * (x1 - x0)
        points = detect(crop_face(image, (x0 - margin, y0 - margin, x1 + margin, y1 + margin), VIEW_SIDE))
        scale = (x1 - x0 + 2 * margin) / VIEW_SIDE
        return None if points is None else points * scale + (x0 - margin, y0 - margin)

    try:
        yield landmarks
    finally:
        if kind == "mediapipe":
            detect.close()  # else it prints a traceback at the interpreter's end


def mediapipe_landmarks(path: Path, *_):
    """MediaPipe's face landmarker: a function, image uint8 (H, W, 3) -> (68, 2) in pixels or None"""
    os.environ.setdefault("GLOG_minloglevel", "2")  # without it the network prints its start
    import mediapipe
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.FaceLandmarkerOptions(base_options=BaseOptions(model_asset_path=str(path)), num_faces=1)
    with wrap_errors(path, "not a face landmarker of MediaPipe"):
        network = vision.FaceLandmarker.create_from_options(options)

    def detect(image):  # one by one: its video mode lags
        H, W = image.shape[:2]
        found = network.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, np.ascontiguousarray(image))).face_landmarks
        return np.array([(found[0][i].x * W, found[0][i].y * H) for i in MEDIAPIPE_POINTS]) if found else None

    detect.close = network.close
    return detect


def dlib_landmarks(path: Path, template: str, *_):
    """dlib's shape predictor: a function, a crop of the template with VIEW_MARGIN, uint8 (S, S, 3) -> (68, 2) in pixels,
    the mean from five boxes (ours: its trees jitter with the box that they start from)."""
    import dlib

    with wrap_errors(path, "not a shape predictor of dlib"):
        network = dlib.shape_predictor(str(path))
    if template not in DLIB_BOX:
        raise InputError(f"--landmarks dlib: for real faces, not for crops of the template {template}")
    middle, side = DLIB_BOX[template]

    def detect(image):
        unit = len(image) / (1 + 2 * VIEW_MARGIN)  # the crop without its margin
        points = []
        for shift in ((0, 0), (-0.02, 0), (0.02, 0), (0, -0.03), (0, 0.03)):
            x, y = (unit * (VIEW_MARGIN + m - side / 2 + d) for m, d in zip(middle, shift))
            box = dlib.rectangle(*(round(v) for v in (x, y, x + side * unit, y + side * unit)))
            points.append([(p.x, p.y) for p in network(np.ascontiguousarray(image), box).parts()])
        return np.mean(points, 0)

    return detect


def fan_landmarks(_, template: str, device):
    """face-alignment's FAN (Bulat & Tzimiropoulos 2017): a function, image uint8 (H, W, 3), box of the template's
    crop in it -> (68, 2) in pixels or None; .7 s a frame on a CPU"""
    fetch("fan")  # to where face-alignment looks for it
    from face_alignment import FaceAlignment, LandmarksType

    # "folder": no detector of its own; one core, no compiler, no second pass over the mirror image
    options = dict(device=torch.device(device).type, flip_input=False, compile=False, face_detector="folder")
    fan, t = FaceAlignment(LandmarksType.TWO_D, **options), TEMPLATES[template]

    def detect(image, box):
        unit = (box[2] - box[0]) / t.side  # the larger side of a detection
        x, y = ((low + high) / 2 - shift * unit for low, high, shift in zip(box[:2], box[2:], t.shift))
        points, scores, _ = fan.get_landmarks_from_image(
            np.ascontiguousarray(image), [np.array(square_around(x, y, unit))], return_landmark_score=True)
        return np.asarray(points[0], float) if float(np.mean(scores[0])) >= FAN_SCORE else None

    return detect


# ------------------------------------------------------------------------------------ landmarks of a pack, in a folder
# points.bin: float32 (all frames, 68, 2) in pixels of the crop, NaN where a clip was dropped; clips.jsonl: first
# the detector and the pack, then a line for each clip, written after its points

LONGEST_GAP = 5  # frames, ours: a fifth of a second is filled; a mouth may open and shut in more
MOST_MISSING = 0.2  # of a clip
STRAY = 0.3  # landmarks whose eye distance is so far off the clip's median are wrong


def interpolate_gaps(found: list) -> tuple[np.ndarray, int]:
    """Landmarks of a clip, (68, 2) or None a frame -> float32 (T, 68, 2), gaps and strays filled, and how many
    frames were. InputError, without the clip's name: too many, too long a gap."""
    there = np.array([p is not None for p in found])
    points = np.stack([np.full((K, 2), np.nan, np.float32) if p is None else np.float32(p) for p in found])  # (T, 68, 2)
    if there.any():
        span = np.hypot(*(points[:, EYE_CORNERS[1]] - points[:, EYE_CORNERS[0]]).T)  # (T,)
        there &= np.abs(span / np.median(span[there]) - 1, where=there, out=np.ones(len(span))) <= STRAY
    missing = int((~there).sum())
    if missing > MOST_MISSING * len(found):
        raise InputError(f"a face in {len(found) - missing} of {len(found)} frames")
    at = np.flatnonzero(there)
    longest = int(np.diff(np.concatenate(([-1], at, [len(found)]))).max()) - 1
    if longest > LONGEST_GAP:
        raise InputError(f"no face in {longest} frames in a row")
    return fill_missing(points, there).astype(np.float32), missing


def fill_missing(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """values (T, ..), those of frames not `seen` (T,) interpolated linearly, at the ends the nearest"""
    frames, flat = np.arange(len(values)), values.reshape(len(values), -1)
    return np.stack([np.interp(frames, frames[seen], column[seen]) for column in flat.T], 1).reshape(values.shape)


def smooth(points: np.ndarray) -> np.ndarray:
    """(T, ..): a parabola through five frames (Savitzky & Golay 1964), which keeps a short closure of the lips: a
    running mean of the same length would halve it"""
    weights = np.array([-3, 12, 17, 12, -3]) / 35
    return correlate1d(points, weights, axis=0, mode="nearest") if len(points) >= 5 else points


def landmarks_header(pack, detector: str) -> dict:
    return dict(format=1, detector=detector, clips=len(pack), frames=int(pack.frame_start[-1]), size=pack.size)


class Landmarks:
    """Landmarks of a pack, or of several read as one, each in landmarks/ beside its pack. kept: the clips that
    have some; detectors: of each pack. InputError: missing, of another pack, not one clip."""

    def __init__(self, pack):
        self.pack, self.points, self.detectors, kept, before = pack, [], [], [], 0
        for part in pack.packs:
            folder = part.folder / "landmarks"
            try:
                header, *clips = map(json.loads, complete_lines(folder / "clips.jsonl"))
                done = int(part.frame_start[min(len(clips), len(part))])
                self.points.append(np.memmap(folder / "points.bin", "<f4", "r", shape=(done, K, 2)) if done else None)
            except (OSError, ValueError) as error:
                raise InputError(f"{folder}: no landmarks ({error}): python keypoints.py extract {part.folder}") from None
            if header != landmarks_header(part, header.get("detector")):
                raise InputError(f"{folder}: landmarks of another pack than {part.folder}")
            if len(clips) < len(part):
                print(f"{folder}: unfinished, {len(clips)} of {len(part)} clips so far", file=sys.stderr)
            self.detectors.append(header["detector"])
            kept += [before + i for i, line in enumerate(clips) if "reason" not in line]
            before += len(part)
        self.usable_clips = np.array(kept, int)
        if not len(self.usable_clips):
            raise InputError(f"{folder}: not one clip has landmarks, clips.jsonl says why")

    def clip(self, c: int) -> np.ndarray:
        """float32 (T, 68, 2) in pixels of the crop; NaN where the clip was dropped"""
        i, c = self.pack.locate(c)
        first, end = self.pack.packs[i].frame_start[c : c + 2]
        return np.array(self.points[i][first:end])


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file that end: a killed run's last one may be torn"""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def open_landmarks(folder: Path, header: dict, overwrite: bool) -> list[bytes]:
    """The whole lines of an earlier run's clips.jsonl; where there is none, a new one's header"""
    path, head = folder / "clips.jsonl", json.dumps(header).encode() + b"\n"
    lines = complete_lines(path) if path.exists() and not overwrite else []
    if lines and lines[0] != head:
        raise InputError(f"{folder}: holds landmarks of another pack or detector; --overwrite replaces them")
    if not lines:
        path.write_bytes(head)
        (folder / "points.bin").write_bytes(b"")
    return lines or [head]
