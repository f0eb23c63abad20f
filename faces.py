"""Faces in images: crop templates, the mouth mask, face detection, clips of a video, landmark detectors and files."""

import itertools
import json
import os
import sys
import weakref
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

# ------------------------------- crops: squares of an image with eyes and mouth at the places that the template gives

@dataclass(frozen=True)
class Template:
    """A square crop of a face. Boxes are x0, y0, x1, y1 as fractions of the crop."""

    mouth: tuple  # hidden from the motion encoder and weighted in losses: lips, cheeks and all of the jaw
    eyes: tuple
    lips: tuple  # part of the mouth box, input of the MouthEncoder
    # crop without key points, in units of the larger side of a detection: its side, shift of its centre (right, down)
    side: float
    shift: tuple
    points: tuple = ()  # positions of both eyes and the middle of the mouth, as fractions


TEMPLATES = {
    "toy": Template(mouth=(0.25, 0.55, 0.75, 0.90), eyes=(0.22, 0.30, 0.78, 0.56), lips=(0.25, 0.55, 0.75, 0.90),
                    side=1.5, shift=(0, 0)),
    # UTKFace's crop: its photos are used whole. Blazeface's key points on 150 of them and their mirror images have the
    # medians: eyes at .293 and .690 across, .298 down, mouth at .490 across, .723 down. Ours: made symmetric
    "face": Template(mouth=(0.10, 0.54, 0.90, 1.0), eyes=(0.14, 0.18, 0.86, 0.42),
                     lips=(0.22, 0.58, 0.78, 0.94), side=1.04, shift=(0, -0.015),
                     points=((0.302, 0.298), (0.698, 0.298), (0.5, 0.723))),
    # FFHQ's alignment (Karras et al. 2019) without its rotation, for published generators and pSp. Points: of FFHQ faces
    # in facexlib, made symmetric; boxes: those of "face", moved to these points
    "ffhq": Template(mouth=(0.25, 0.61, 0.75, 0.92), eyes=(0.28, 0.39, 0.72, 0.55),
                     lips=(0.33, 0.64, 0.67, 0.86), side=1.7, shift=(0, -0.17),
                     points=((0.377, 0.469), (0.623, 0.469), (0.5, 0.725))),
    # SyncNet v2's crops, 1.4 times a detection and lower (Chung & Zisserman 2016); not for packs
    "syncnet": Template(mouth=(0.2, 0.38, 0.8, 0.72), eyes=(0.23, 0.11, 0.77, 0.29),
                        lips=(0.29, 0.41, 0.71, 0.67), side=1.4, shift=(0, 0.2),
                        points=((0.353, 0.196), (0.647, 0.196), (0.5, 0.512))),
}
# eyes, tip of the nose, corners of the mouth in ArcFace's 112-pixel training crops (InsightFace)
ARCFACE_POINTS = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
                           (70.7299, 92.2041)])


def square_around(x: float, y: float, side: float) -> tuple:
    """Centre and side of a square -> its box x0, y0, x1, y1"""
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def middle_square(image: np.ndarray) -> tuple:
    """Box of the largest square in the middle of an image (H, W, ..)"""
    H, W = image.shape[:2]
    return square_around(W / 2, H / 2, min(H, W))


def fit_square(points, fractions) -> tuple[float, float, float]:
    """The square in which positions `fractions` (K, 2) lie nearest to points (K, 2) -> x, y of its corner, side"""
    points, fractions = np.asarray(points, float), np.asarray(fractions, float)
    centred = fractions - fractions.mean(0)
    side = (centred * points).sum() / (centred**2).sum()
    return (*(points.mean(0) - side * fractions.mean(0)), side)


def square_in_crop(template: str, wanted: str) -> tuple[float, float, float]:
    """x, y, side of the crop `wanted` as fractions of the crop `template`; all of it if one of them has no points"""
    a, b = TEMPLATES[template].points, TEMPLATES[wanted].points
    return fit_square(a, b) if a and b else (0.0, 0.0, 1.0)


def face_box(faces: list[tuple], template: str, number: int = 1) -> tuple:
    """Faces of detect_faces -> square crop x0, y0, x1, y1 of the `number`-th largest. It is fitted to the key points,
    which are three times as exact as the detector's box; without key points to the box. InputError: fewer faces"""
    if not 1 <= number <= len(faces):
        raise InputError(f"--face {number}: the number of faces found is {len(faces)}")
    x0, y0, x1, y1 = faces[number - 1][:4]
    t, points = TEMPLATES[template], np.reshape(faces[number - 1][5:], (-1, 2))
    if len(points) and t.points:
        x, y, side = map(float, fit_square(points, t.points))
        return (x, y, x + side, y + side)
    unit = max(x1 - x0, y1 - y0)
    return square_around((x0 + x1) / 2 + t.shift[0] * unit, (y0 + y1) / 2 + t.shift[1] * unit, t.side * unit)


def parse_box(text: str, width: int, height: int, scale: float = 1.0) -> tuple:
    """--box "x0,y0,x1,y1" in pixels of a width x height image -> the square around it, in the image scaled by `scale`"""
    try:
        x0, y0, x1, y1 = (float(v) for v in text.split(","))
    except ValueError:
        raise InputError(f"--box {text}: expected four numbers, x0,y0,x1,y1") from None
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(f"--box {text}: not a box inside the image of {width}x{height} pixels")
    return square_around(scale * (x0 + x1) / 2, scale * (y0 + y1) / 2, scale * max(x1 - x0, y1 - y0))


def crop_face(image: np.ndarray, box: tuple, size: int) -> np.ndarray:
    """uint8 (H, W, 3), box in pixels -> uint8 (size, size, 3); the border is repeated beyond the image."""
    (H, W), (x0, y0, x1, y1) = image.shape[:2], box
    assert x1 > x0 and y1 > y0, f"empty box {box}"
    left, top = max(0, int(np.ceil(-x0))), max(0, int(np.ceil(-y0)))
    right, bottom = max(0, int(np.ceil(x1)) - W), max(0, int(np.ceil(y1)) - H)
    if left or top or right or bottom:
        image = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge")
    box = (x0 + left, y0 + top, x1 + left, y1 + top)
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box=box))


def resize_square(x, size: int):
    """(N, 3, H, W) -> (N, 3, size, size), bilinear without prefilter: OpenCV's default, as in the experts' training"""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def cut_square(x: torch.Tensor, left: int, top: int, side: int) -> torch.Tensor:
    """(.., H, W) -> (.., side, side), from column `left` and row `top` on; the border is repeated beyond x"""
    H, W = x.shape[-2:]
    rows, columns = (top + torch.arange(side)).clamp(0, H - 1), (left + torch.arange(side)).clamp(0, W - 1)
    return x[..., rows[:, None], columns]


def recrop(frames: torch.Tensor, template: str, wanted: str) -> torch.Tensor:
    """Crops (N, .., 3, H, H) of one template -> crops `wanted` of the same faces, of the same size"""
    H = frames.shape[-1]
    left, top, side = (round(H * v) for v in square_in_crop(template, wanted))
    if (left, top, side) == (0, 0, H):
        return frames
    return resize_square(cut_square(frames, left, top, side).flatten(0, -4), H).unflatten(0, frames.shape[:-3])


def box_slices(box: tuple, H: int, W: int) -> tuple[slice, slice]:
    """Box x0, y0, x1, y1 in fractions of an image of H x W pixels -> slices of rows and of columns"""
    x0, y0, x1, y1 = box
    return slice(round(y0 * H), round(y1 * H)), slice(round(x0 * W), round(x1 * W))


def mask_mouth(frames: torch.Tensor, template: str, part: str = "mouth") -> torch.Tensor:
    """frames (.., 3, H, W) -> a copy with a grey (0) box. part: "mouth" for driving frames, so that lips can only come
    from the sound; "lips", the smaller box, for images whose lips a mouth code describes"""
    rows, cols = box_slices(getattr(TEMPLATES[template], part), *frames.shape[-2:])
    frames = frames.clone()
    frames[..., rows, cols] = 0
    return frames


# ----------------------------------------------------------------------------------------- face detection by blazeface
# a face: x0, y0, x1, y1, score, then x, y of the eye on the image's left, the other eye and the mouth, in pixels

MIN_SCORE = 0.65  # ours: 2 of 100 UTKFace portraits lie below; a dog has .63, a cat .5, textures less
SAME_FACE = 0.3  # intersection over union of two boxes of one face; ours
VIDEO_MARGIN = 1.2  # searched square, in larger sides of a frame (ours: faces at the edge are found)
TIGHT_MARGINS = (1.5, 2.0, 2.5)  # of `detect_faces`, for portraits that the face fills and photos for packs
NEAR_SIDE = 2.0  # square of `redetect`, in sides of a face (ours: there key points scatter least, 2 of 128 px)


@lru_cache
def face_detectors() -> list:
    """Both models of blazeface (1 MB), that for near faces first. InputError: their weights cannot be fetched"""
    from face_alignment.detection.blazeface import FaceDetector  # here: the import takes seconds

    anchors, near, far = (str(fetch(name)) for name in ("blazeface_anchors", "blazeface", "blazeface_back"))
    options = dict(device="cpu", path_to_anchor=anchors, min_score_thresh=0.3)  # MIN_SCORE is stricter
    return [FaceDetector(path_to_detector=path, back_model=path == far, **options) for path in (near, far)]


def square_view(image: np.ndarray, x: int, y: int, side: int, size: int) -> np.ndarray:
    """The square of uint8 (H, W, 3) whose corner is x, y -> uint8 (size, size, 3), grey beyond the image."""
    canvas = Image.new("RGB", (side, side), (128, 128, 128))
    canvas.paste(Image.fromarray(image), (-x, -y))
    return np.array(canvas.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BILINEAR))


def whole_square(image: np.ndarray, margin: float) -> tuple[int, int, int]:
    """x, y, side of the square with the centre of an image, `margin` times its larger side"""
    H, W = image.shape[:2]
    side = round(margin * max(H, W))
    return (W - side) // 2, (H - side) // 2, side


def detect_in_squares(detector, images: list, squares: list) -> list[list[np.ndarray]]:
    """The faces that one model detects in a square (x, y, side) of each image: one list for each image"""
    network = detector.face_detector
    size = 256 if network.back_model else 128
    views = [square_view(image, *square, size) for image, square in zip(images, squares)]
    batches = [network.predict_on_batch(np.stack(views[i : i + 16])) for i in range(0, len(views), 16)]
    # the network's output: y0, x0, y1, x1, then x, y of eye, eye, nose, mouth, ear, ear as fractions, score; see above
    order, coordinates = [1, 0, 3, 2, 16, 4, 5, 6, 7, 10, 11], [0, 1, 2, 3, *range(5, 11)]
    results = []
    for faces, (x, y, side) in zip(itertools.chain(*batches), squares):
        faces = np.asarray(faces, np.float64).reshape(-1, 17)[:, order]
        faces[:, coordinates] = faces[:, coordinates] * side + np.resize([x, y], len(coordinates))
        results.append(list(faces))
    return results


def redetect(images: list, faces: list) -> list[np.ndarray]:
    """One face in each image -> the same from a second detection near it, or unchanged if that fails"""
    squares = []
    for x0, y0, x1, y1 in (face[:4] for face in faces):
        side = max(8, round(NEAR_SIDE * max(x1 - x0, y1 - y0)))
        squares.append((round((x0 + x1 - side) / 2), round((y0 + y1 - side) / 2), side))
    results = []
    for face, candidates in zip(faces, detect_in_squares(face_detectors()[0], images, squares)):
        best = max(candidates, key=lambda other: overlap(other, face), default=face)
        results.append(best if overlap(best, face) > SAME_FACE else face)
    return results


def overlap(a, b) -> float:
    """Intersection over union of two boxes"""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(0, w) * max(0, h)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def is_upright(face) -> bool:
    """Whether a face's key points are less than 40 degrees off upright: crops are not rotated"""
    left, right, mouth = np.reshape(face[5:11], (3, 2))
    across, down = right - left, mouth - (left + right) / 2
    return bool(across[0] > 1.2 * abs(across[1]) and down[1] > 1.2 * abs(down[0]))


def largest_first(faces) -> list[tuple]:
    return sorted((tuple(map(float, face)) for face in faces), key=lambda b: -(b[2] - b[0]) * (b[3] - b[1]))


def detect_faces(image: np.ndarray, margins: tuple = (1.0, 1.2, 1.5, 2.0)) -> list[tuple]:
    """uint8 (H, W, 3) -> its upright faces, the largest first. A single detection is not reliable: a dog can score .82
    and a woman .55. So both models search the image with several margins. A face is kept if at least a third of the
    searches detect it, if their mean score is at least MIN_SCORE, and if `redetect` finds it upright with such a
    score (a cup seen from above has .7 from afar and .5 from near). Box and key points are means."""
    detectors, groups = face_detectors(), []  # one group of detections for each face
    for detector, margin in itertools.product(detectors, margins):
        for face in detect_in_squares(detector, [image], [whole_square(image, margin)])[0]:
            group = next((g for g in groups if overlap(g[0], face) > SAME_FACE), [])
            if not group:
                groups.append(group)
            group.append(face)
    faces = [np.mean(group, 0) for group in groups if 3 * len(group) >= len(margins) * len(detectors)]
    faces = [face for face in faces if face[4] >= MIN_SCORE]
    near = redetect([image] * len(faces), faces)
    return largest_first(face for face, again in zip(faces, near) if is_upright(again) and again[4] >= MIN_SCORE)


def detect_faces_fast(frames: list) -> list[list[tuple]]:
    """Frames of one video -> the upright faces of each. The second model searches those without a face by the first"""
    found = [[] for _ in frames]
    for detector in face_detectors():
        missing = [i for i, faces in enumerate(found) if not faces]
        squares = [whole_square(frames[i], VIDEO_MARGIN) for i in missing]
        for i, faces in zip(missing, detect_in_squares(detector, [frames[i] for i in missing], squares)):
            found[i] = [face for face in faces if face[4] >= MIN_SCORE]  # link_tracks tolerates errors
    images = [frame for frame, faces in zip(frames, found) for _ in faces]
    near = iter(redetect(images, list(itertools.chain(*found))))
    return [largest_first(face for face in itertools.islice(near, len(faces)) if is_upright(face)) for faces in found]


def turn_upright(image: np.ndarray) -> tuple[np.ndarray, list[tuple], str]:
    """Turns uint8 (H, W, 3) until upright faces are found -> photo, faces, the turn in words. None found: unchanged"""
    if faces := detect_faces(image) or detect_faces(image, TIGHT_MARGINS):
        return image, faces, ""
    for k, turn in enumerate(("by 90 degrees to the left", "by 180 degrees", "by 90 degrees to the right"), 1):
        turned = np.ascontiguousarray(np.rot90(image, k))
        if faces := detect_faces(turned):
            return turned, faces, turn
    return image, [], ""


# ------------------------------------------------------------ clips: parts of a video in which one box holds one face

DETECT_EVERY = 5  # frames (ours: a fifth of a second)
MAX_GAP = 3  # detections; ours: a clip ends where a face is missing for longer, .6 s
MAX_CLIP_FRAMES = 150  # frames in memory while a box is searched, 415 MB at 720p
MIN_CLIP_FRAMES = 10  # ours: two five-frame windows that are not neighbours
MAX_HEIGHT = 720  # pixels at which videos are decoded
MAX_MOTION = 0.35  # sides of the box by which a face may move in a clip
CUT, CUT_RATIO = 20, 4  # a cut changes the mean pixel by 20 of 255, and by 4 times as much as the neighbouring frames


def label_scenes(frames) -> np.ndarray:
    """Frames of a video, an iterable -> (n,), the scene number of each frame, from 0 on, by 256 pixels of it"""
    change, last = [], None  # mean difference from the frame before
    for frame in frames:
        rows, columns = ((np.arange(16) * 2 + 1) * side // 32 for side in frame.shape[:2])
        small = frame[rows[:, None], columns].astype(np.float32)  # (16, 16, 3)
        change.append(0.0 if last is None else np.abs(small - last).mean())
        last = small
    is_cut = np.zeros(len(change), bool)
    for k in np.flatnonzero(np.array(change) > CUT):
        neighbours = np.delete(change[max(1, k - DETECT_EVERY) : k + DETECT_EVERY + 1], min(k - 1, DETECT_EVERY))
        is_cut[k] = not len(neighbours) or change[k] > CUT_RATIO * np.median(neighbours)
    return np.cumsum(is_cut)


def link_tracks(faces_by_frame: list[list[tuple]], scene: np.ndarray) -> list[dict]:
    """Faces and scene of each searched frame -> tracks of one person each: {number of the searched frame: face}"""
    tracks = []
    for i, faces in enumerate(faces_by_frame):
        open_tracks = [t for t in tracks if i - max(t) <= MAX_GAP and scene[max(t)] == scene[i]]
        pairs = [(overlap(t[max(t)], face), n, k) for n, t in enumerate(open_tracks) for k, face in enumerate(faces)]
        linked = set()
        for likeness, n, k in sorted(pairs, reverse=True):
            if likeness > SAME_FACE and i not in open_tracks[n] and k not in linked:
                open_tracks[n][i] = faces[k]
                linked.add(k)
        tracks += [{i: face} for k, face in enumerate(faces) if k not in linked]
    return tracks


def split_until_steady(track: dict, begin: int, end: int, template: str) -> list[tuple]:
    """A track in a video's frames begin .. end - 1 -> [(begin, end, median box, "")], halved until one holds the face"""
    boxes = np.array([face_box([face], template) for face in track.values()])  # (n, 4)
    box = np.median(boxes, 0)
    if np.percentile(np.abs(boxes - box).max(1), 90) <= MAX_MOTION * (box[2] - box[0]):
        return [(begin, end, tuple(map(float, box)), "")]
    half = sorted(track)[len(track) // 2]
    first, second = ({i: f for i, f in track.items() if (i < half) == is_first} for is_first in (True, False))
    middle = half * DETECT_EVERY
    return split_until_steady(first, begin, middle, template) + split_until_steady(second, middle, end, template)


def find_clips(frames: list[np.ndarray], template: str = "face") -> list[tuple]:
    """Frames of a video -> [(begin, end, box or None, reason)], which cover them. A clip has one box, so that its crop
    does not wobble; frames outside clips have None and a reason. A clip ends where the scene ends, the face is
    missing, or one box would not hold it. The face that is largest for the longest time has priority."""
    scene, faces = label_scenes(frames), detect_faces_fast(frames[::DETECT_EVERY])
    tracks = link_tracks(faces, scene[::DETECT_EVERY])
    tracks.sort(key=lambda track: -sum((f[2] - f[0]) * (f[3] - f[1]) for f in track.values()))
    clips, used = [], np.zeros(len(frames), bool)
    for track in tracks:
        begin, end = min(track) * DETECT_EVERY, max(track) * DETECT_EVERY + 1
        same_scene = np.flatnonzero(scene == scene[begin])
        if same_scene[0] > begin - DETECT_EVERY:  # detected in the first searched frame of the scene: extend to its start
            begin = int(same_scene[0])
        if same_scene[-1] < end - 1 + DETECT_EVERY:
            end = int(same_scene[-1]) + 1
        if not used[begin:end].any():
            used[begin:end] = True
            clips += split_until_steady(track, begin, end, template)
    clips = [clip for clip in clips if clip[1] - clip[0] >= MIN_CLIP_FRAMES]
    n = sum(map(bool, faces))
    reason = "no face for long enough, or one that moves too far" if n else "no face"
    reason += f" (a face in {n} of {len(faces)} frames looked at)"
    ends = [0, *(k for clip in sorted(clips) for k in clip[:2]), len(frames)]
    return sorted(clips + [(a, b, None, reason) for a, b in zip(ends[::2], ends[1::2]) if a < b])


def find_clip_box(frames: list[np.ndarray]) -> tuple:
    """Box of the longest clip in a few seconds of video. Raises InputError: it covers less than half of the frames"""
    begin, end, box, reason = max(find_clips(frames), key=lambda clip: (clip[2] is not None, clip[1] - clip[0]))
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
    """Least squares similarity transform a p + b from points to target, (K,) or (.., K), complex x + iy -> a, b (..)"""
    mean = points.mean(-1)
    centred = points - mean[..., None]
    a = (target * centred.conj()).sum(-1) / (abs(centred) ** 2).sum(-1)
    return a, target.mean(-1) - a * mean


def warp_face(image: np.ndarray, a: complex, b: complex, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3): point u shows point a u + b of the image, black beyond it"""
    shrink = max(1, int(abs(a)))  # first, because the transform has no prefilter
    a, b = a / shrink, b / shrink
    to_source = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
    image = Image.fromarray(image).reduce(shrink)
    return np.array(image.transform((size, size), Image.Transform.AFFINE, to_source, Image.Resampling.BILINEAR))


PCAVS_POINTS = np.array([87 + 59j, 137 + 59j, 112 + 120j]) + 0.5 + 0.5j  # x + iy of eyes and mouth in PC-AVS's 224 px
# x0, y0, x1, y1 in these 224 pixels: input of its networks; files of `pcavs.py align`
PCAVS_INPUT, PCAVS_FILE = (16, 0, 208, 192), (0, 0, 224, 224)


def eyes_and_mouth(points: np.ndarray) -> np.ndarray:
    """Landmarks (.., 68, 2) -> centres of both eyes and of the inner lips, complex (.., 3)"""
    return np.stack([to_complex(points[..., a:b, :].mean(-2)) for a, b in ((36, 42), (42, 48), (60, 68))], -1)


def align_frames(frames, points: np.ndarray, size: int, box: tuple = PCAVS_INPUT):
    """Frames, uint8 (H, W, 3), with eyes_and_mouth (T, 3) in units of H -> a stream of uint8 (size, size, 3), the box of
    PC-AVS's 224 pixels. Scale and rotation are the mean's, the mouth keeps its place; black beyond a frame"""
    scale = similarity(points.mean(0), PCAVS_POINTS)[0]
    step, corner = (box[2] - box[0]) / size / scale, (complex(*box[:2]) - PCAVS_POINTS[2]) / scale
    for frame, mouth in zip(frames, points[:, 2]):
        yield warp_face(frame, len(frame) * step, len(frame) * (mouth + corner), size)


# ----------------------------------------------------------------------------------------- published landmark detectors

MIN_FAN_SCORE = 0.2  # ours: least mean height of FAN's 68 heat maps on a face
VIEW_MARGIN, VIEW_SIDE = 0.25, 256  # ours: MediaPipe and dlib get the crop with this margin on each side; its pixels
# centre and side of dlib's box in a crop: ours, best of a few; both templates give the same part of the face
DLIB_BOX = {"face": ((0.5, 0.58), 0.9), "ffhq": ((0.5, 0.64), 0.55)}
# those of MediaPipe's 478 points that lie nearest to iBUG's 68. Where published choices differ, those nearer to dlib's
# points in 155 frames of 63 clips and photos: at 12 such points 6.4 % of the eye distance off, the others 8.2 and 9.3
MEDIAPIPE_POINTS = [127, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 356,  # jaw
                    70, 63, 105, 66, 107, 336, 296, 334, 293, 300, 168, 197, 5, 4, 75, 97, 2, 326, 305,  # brows, nose
                    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # eyes
                    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87]  # lips


def landmark_detector(spec: str, template: str = "face", device="cpu"):
    """-> a landmark detector, a function: image uint8 (H, W, 3), box -> (68, 2) in pixels of the image, or None

    spec: "mediapipe:FILE", "dlib:FILE" or "fan". box: x0, y0, x1, y1 in pixels of the image, a crop of `template`;
    None: the whole image. Raises InputError: a package or weights are missing, a file of another kind"""
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

    return landmarks


def mediapipe_landmarks(path: Path, *_):
    """MediaPipe's face landmarker, a function: image uint8 (H, W, 3) -> (68, 2) in pixels or None"""
    os.environ.setdefault("GLOG_minloglevel", "2")  # fewer messages
    import mediapipe
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.FaceLandmarkerOptions(base_options=BaseOptions(model_asset_path=str(path)), num_faces=1)
    with wrap_errors(path, "not a face landmarker of MediaPipe"):
        network = vision.FaceLandmarker.create_from_options(options)

    def detect(image):  # in image mode: its video mode lags
        H, W = image.shape[:2]
        faces = network.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, np.ascontiguousarray(image))).face_landmarks
        return np.array([(faces[0][i].x * W, faces[0][i].y * H) for i in MEDIAPIPE_POINTS]) if faces else None

    weakref.finalize(detect, network.close)  # without close() it prints a traceback at exit
    return detect


def dlib_landmarks(path: Path, template: str, *_):
    """dlib's shape predictor, a function: a crop of the template with VIEW_MARGIN, uint8 (S, S, 3) -> (68, 2) in pixels,
    the mean of five start boxes (ours: its trees jitter with the start)"""
    import dlib

    with wrap_errors(path, "not a shape predictor of dlib"):
        network = dlib.shape_predictor(str(path))
    if template not in DLIB_BOX:
        raise InputError(f"--landmarks dlib: for real faces, not for crops of the template {template}")
    centre, side = DLIB_BOX[template]

    def detect(image):
        unit = len(image) / (1 + 2 * VIEW_MARGIN)  # the crop without its margin
        points = []
        for shift in ((0, 0), (-0.02, 0), (0.02, 0), (0, -0.03), (0, 0.03)):
            x, y = (unit * (VIEW_MARGIN + m - side / 2 + d) for m, d in zip(centre, shift))
            box = dlib.rectangle(*(round(v) for v in (x, y, x + side * unit, y + side * unit)))
            points.append([(p.x, p.y) for p in network(np.ascontiguousarray(image), box).parts()])
        return np.mean(points, 0)

    return detect


def fan_landmarks(_, template: str, device):
    """FAN (Bulat & Tzimiropoulos 2017), a function: image, box of its crop -> (68, 2) in pixels or None; .7 s on a CPU"""
    fetch("fan")  # into face-alignment's cache
    from face_alignment import FaceAlignment, LandmarksType

    # "folder": without a face detector
    options = dict(device=torch.device(device).type, flip_input=False, compile=False, face_detector="folder")
    fan, t = FaceAlignment(LandmarksType.TWO_D, **options), TEMPLATES[template]

    def detect(image, box):
        unit = (box[2] - box[0]) / t.side  # the larger side of a detection
        x, y = ((low + high) / 2 - shift * unit for low, high, shift in zip(box[:2], box[2:], t.shift))
        points, scores, _ = fan.get_landmarks_from_image(
            np.ascontiguousarray(image), [np.array(square_around(x, y, unit))], return_landmark_score=True)
        return np.asarray(points[0], float) if float(np.mean(scores[0])) >= MIN_FAN_SCORE else None

    return detect


# --------------------------------------------------------------------------- landmarks of a pack, in landmarks/ beside it
# points.bin: float32 (all frames, 68, 2) in pixels of the crop, NaN in dropped clips; clips.jsonl: a header with the
# detector and the pack, then a line for each clip, written after its points

MAX_FILLED_GAP = 5  # frames, ours: a fifth of a second; a mouth may open and shut in a longer gap
MAX_MISSING = 0.2  # share of a clip
MAX_SPAN_CHANGE = 0.3  # of the eye distance from the clip's median: landmarks that change it more are wrong


def interpolate_gaps(detections: list) -> tuple[np.ndarray, int]:
    """Landmarks of a clip, (68, 2) or None for each frame -> float32 (T, 68, 2) without gaps and outliers, the number of
    interpolated frames. InputError, without the clip's name: too many frames without a face, or too many in a row"""
    valid = np.array([p is not None for p in detections])
    points = np.stack([np.full((K, 2), np.nan, np.float32) if p is None else np.float32(p) for p in detections])
    if valid.any():
        span = np.hypot(*(points[:, EYE_CORNERS[1]] - points[:, EYE_CORNERS[0]]).T)  # (T,)
        valid &= np.abs(span / np.median(span[valid]) - 1) <= MAX_SPAN_CHANGE  # False for NaN
    missing = int((~valid).sum())
    if missing > MAX_MISSING * len(detections):
        raise InputError(f"a face in {len(detections) - missing} of {len(detections)} frames")
    gaps = np.diff([-1, *np.flatnonzero(valid), len(detections)]) - 1
    if gaps.max() > MAX_FILLED_GAP:
        raise InputError(f"no face in {gaps.max()} frames in a row")
    return fill_missing(points, valid).astype(np.float32), missing


def fill_missing(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """values (T, ..), linearly interpolated in frames that are not `valid` (T,); at the ends the nearest valid frame"""
    frames, flat = np.arange(len(values)), values.reshape(len(values), -1)
    return np.stack([np.interp(frames, frames[valid], v[valid]) for v in flat.T], 1).reshape(values.shape)


def smooth(points: np.ndarray) -> np.ndarray:
    """(T, ..) -> the same, smoothed by a parabola over five frames (Savitzky & Golay 1964). It keeps short closures of
    the lips, which a running mean of that length would halve."""
    weights = np.array([-3, 12, 17, 12, -3]) / 35
    return correlate1d(points, weights, axis=0, mode="nearest") if len(points) >= 5 else points


def landmarks_header(pack, detector: str) -> dict:
    return dict(format=1, detector=detector, clips=len(pack), frames=int(pack.frame_start[-1]), size=pack.size)


class Landmarks:
    """Landmarks of one pack or of several read as one. usable_clips: the clips that have landmarks; detectors: of each
    pack. Raises InputError: missing, of another pack, no clip has landmarks"""

    def __init__(self, pack):
        self.pack, self.points, self.detectors, usable_clips, first = pack, [], [], [], 0
        for part in pack.packs:
            folder = part.folder / "landmarks"
            try:
                header, *lines = map(json.loads, complete_lines(folder / "clips.jsonl"))
                n = int(part.frame_start[min(len(lines), len(part))])
                self.points.append(np.memmap(folder / "points.bin", "<f4", "r", shape=(n, K, 2)) if n else None)
            except (OSError, ValueError) as error:
                raise InputError(f"{folder}: no landmarks ({error}): python keypoints.py extract {part.folder}") from None
            if header != landmarks_header(part, header.get("detector")):
                raise InputError(f"{folder}: landmarks of another pack than {part.folder}")
            if len(lines) < len(part):
                print(f"{folder}: unfinished, {len(lines)} of {len(part)} clips so far", file=sys.stderr)
            self.detectors.append(header["detector"])
            usable_clips += [first + i for i, line in enumerate(lines) if "reason" not in line]
            first += len(part)
        self.usable_clips = np.array(usable_clips, int)
        if not len(self.usable_clips):
            raise InputError(f"{folder}: not one clip has landmarks, clips.jsonl says why")

    def clip(self, c: int) -> np.ndarray:
        """float32 (T, 68, 2) in pixels of the crop; NaN in a dropped clip"""
        i, c = self.pack.locate(c)
        first, end = self.pack.packs[i].frame_start[c : c + 2]
        return np.array(self.points[i][first:end])


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file. An incomplete last line, left by an interrupted run, is dropped"""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
