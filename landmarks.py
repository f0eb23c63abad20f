"""Facial landmarks of photos and videos by one small network: a 64-pixel grey crop -> the 68 points of iBUG.

The crop is the square in which the mean shape, fitted to the face by a similarity transform, lies at its place in the
template. It follows from the points, so each pass gives a better crop for the next one. Eyes, brows and mouth are then
refined in crops of their own: in the 64 pixels of a face an eye is 4 pixels high.

    python landmarks.py out/photos out/clips      # trains ./landmarks.pt on packs with landmarks (8 minutes of a core)

Points are complex numbers x + iy. A crop is a pair a, b: point u of the unit square lies at pixel a u + b of the photo;
|a| is the crop's side in pixels, arg a its rotation. Fitting one shape to another is then one division.
Axes: n samples, T frames, K = 68 points, S pixels of a crop. Everything without a source is ours.
"""

import itertools
import json
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import fp16_state_dict, load_checkpoint, load_frozen, save_checkpoint
from data import Pack, open_packs, read_clip_list, split
from faces import (
    DETECT_EVERY, K, Landmarks, complete_lines, detect_faces, face_box, interpolate_gaps, label_scenes, landmark_detector,
    landmarks_header, similarity, smooth, square_in_crop, to_complex)
from media import InputError, Parser, check_output, parallel_map, probe, read_video, run, wrap_os_errors
from warp import LOWER_INNER, UPPER_FACE, UPPER_INNER, angles, fit_pose, rotation, turned_place

WEIGHTS = Path(__file__).resolve().parent / "weights/landmarks.pt"
GREY = torch.tensor([0.299, 0.587, 0.114])  # Rec. 601 luma
# point i of a face is point MIRROR[i] of its mirror image
MIRROR = np.r_[16:-1:-1, 26:16:-1, 27:31, 35:30:-1, 45:41:-1, 47, 46, 39:35:-1, 41, 40,
               54:47:-1, 59:54:-1, 64:59:-1, 67:64:-1]
FACE_SIZE = 64  # pixels of its crop
CENTRE = 0.5 + 0.5j


class FacePart(NamedTuple):
    """A part with a network of its own, which reads it in the image and in the mirror image"""

    points: np.ndarray  # (2, k): indices of its points in the image, and of the points in their place in the mirror image
    weights: list  # (k,): of the points in the loss
    first: int  # the part's points from this one on determine the crop
    place: complex  # position of their mean in the crop
    side: float  # of the crop, in sides of the face's crop
    size: int  # pixels of the crop


LEFT_EYE = np.r_[17:22, 36:42]  # brow and eye on the left of the image
RIGHT_EYE, LIPS = MIRROR[LEFT_EYE], np.r_[48:68]
EYE = FacePart(np.stack([LEFT_EYE, RIGHT_EYE]), [1] * 5 + [3] * 6, 5, 0.5 + 0.62j, 0.38, 32)
MOUTH = FacePart(np.stack([LIPS, MIRROR[LIPS]]), [1] * 12 + [3] * 8, 0, CENTRE, 0.45, 48)
FRAMES_PER_BATCH = 8  # frames whose eyes and mouths are read at once: a third of the time of single frames
# tracking, in sides of the crop
REREAD_SHIFT = 0.02  # a frame is read again if its crop moves further
MAX_MIRROR_ERROR = 0.04  # mean distance of the points by the crop and by its mirror image; it is larger without a face
MAX_SHIFT, MAX_GROWTH = 0.35, 1.4  # motion and change of scale of a face between two frames
TRACKING_HEIGHT = 480  # pixels of a video's frames in which landmarks are found
SCATTER_LIMIT = 0.02  # 99 of 100 UTKFace photos lie below; of 28 images without a face all but a dog lie above
CROPS_PER_BATCH = 64  # in training
# in sides: dlib's points lie too low. Its line between shut lips is .0077 below the darkest row (median of 431 places in
# UTKFace's photos). Half of that is corrected, which is the error of lids and of the corners of eyes and mouth
DLIB_SHIFT = 0.004
SHUT_GAP = 0.016  # in sides: dlib's gap between touching lips is smaller, .006 in photos, .015 in GRID's videos
SEARCH_RANGE = 0.025  # in sides: error of dlib's line between shut lips


# ----------------------------------------------------------------------------------------------------- the network

def conv_trunk(widths: list[int]) -> list[nn.Module]:
    """Convolutions on a grey crop. Each width halves the resolution."""
    layers = []
    for c_in, c in zip([1, *widths], widths):
        layers += [nn.Conv2d(c_in, c, 3, 2, 1), nn.GroupNorm(4, c), nn.LeakyReLU(0.1)]
        layers += [nn.Conv2d(c, c, 3, 1, 1), nn.LeakyReLU(0.1)] if c_in > 1 else []
    return [*layers, nn.Flatten()]


def standardise(x: torch.Tensor) -> torch.Tensor:
    """Crops (n, 1, S, S) -> mean 0, deviation 1; one grey level is added so that blank crops stay finite"""
    x = x - x.mean((2, 3), keepdim=True)
    return x / (x.std((2, 3), keepdim=True) + 1)


class PartNet(nn.Module):
    """Grey crops of a part (n, 1, S, S) -> its points (n, k, 2) in units of the crop"""

    def __init__(self, part: FacePart, width: int = 16):
        super().__init__()
        k = part.points.shape[1]
        head = nn.Linear((part.size // 8) ** 2 * 3 * width, 64), nn.LeakyReLU(0.1), nn.Linear(64, 2 * k)
        self.layers = nn.Sequential(*conv_trunk([width, 2 * width, 3 * width]), *head)
        self.register_buffer("mean", torch.zeros(k, 2))

    def forward(self, x):
        return self.mean + 0.1 * self.layers(standardise(x)).unflatten(-1, (-1, 2))


class LandmarkNet(nn.Module):
    """Grey crops of faces (n, 1, 64, 64) -> points (n, 68, 2) in units of the crop; `eye`, `mouth`: networks of parts.
    The output is a sum of principal components of shapes: no point can leave its neighbours."""

    def __init__(self, width: int = 20, components: int = 40):
        super().__init__()
        head = nn.Linear(16 * 4 * width, 128), nn.LeakyReLU(0.1), nn.Linear(128, components)
        self.layers = nn.Sequential(*conv_trunk([width, 2 * width, 3 * width, 4 * width]), *head)
        self.eye, self.mouth = PartNet(EYE), PartNet(MOUTH)
        self.config = dict(width=width, components=components)
        self.register_buffer("mean", torch.zeros(K, 2))
        self.register_buffer("basis", torch.zeros(components, 2 * K))
        # mean 3-D face for warp.py: the 68 points and 9 of the hairline, in distances of the eyes' outer corners; median
        # of MediaPipe's points on 177 photos of UTKFace. Not trained here: `main` copies it
        self.register_buffer("solid", torch.zeros(K + 9, 3))

    def forward(self, x):
        return self.mean + (self.layers(standardise(x)) @ self.basis).unflatten(-1, (K, 2))

    def crop_of(self, points: np.ndarray):
        """The crops a, b (..) in which the mean shape lies nearest to points (.., K) in pixels"""
        return similarity(to_complex(self.mean.numpy()), points)


def load_landmarks(path: str | Path = WEIGHTS) -> LandmarkNet:
    """The network of a file, frozen, on the CPU. Raises InputError: as load_checkpoint; damaged"""
    checkpoint = load_checkpoint(path, "landmarks")
    return load_frozen(lambda: LandmarkNet(**checkpoint["config"]), checkpoint.get("net"), path, "cpu")


# ------------------------------------------------------------------------------------------------ points and crops

def to_real(points: np.ndarray) -> np.ndarray:
    """complex (..) -> float32 (.., 2)"""
    return np.stack([points.real, points.imag], -1).astype(np.float32)


def mirror(points: np.ndarray) -> np.ndarray:
    """Points (.., K) in units of a crop -> those of its mirror image"""
    return 1 - points[..., MIRROR].conj()


def box_crop(box) -> tuple[float, complex]:
    """x0, y0, x1, y1 in pixels, nearly square -> a, b of the square with the same centre"""
    corner, far = complex(*box[:2]), complex(*box[2:])
    side = (far - corner).real / 2 + (far - corner).imag / 2
    return side, (corner + far) / 2 - side * CENTRE


def part_crops(part: FacePart, a, points: np.ndarray):
    """a (..) of face crops, points (.., K) of the picture -> a (..), b (.., 2) of a part's crops, left and right"""
    a = part.side * a
    return a, points[..., part.points[:, part.first :]].mean(-1) - a[..., None] * part.place


def unit_square(size: int) -> np.ndarray:
    """Centres of size x size pixels, complex (size, size)"""
    t = (np.arange(size) + 0.5) / size
    return t + 1j * t[:, None]


def read_pixels(grey: torch.Tensor, at) -> torch.Tensor:
    """Grey images (n or 1, 1, H, W), pixels x + iy (n, S, S) -> (n, 1, S, S), bilinear; the border is repeated"""
    size = torch.tensor([grey.shape[-1], grey.shape[-2]], device=grey.device)
    grid = (torch.view_as_real(torch.as_tensor(at, dtype=torch.complex64)) * 2 / size - 1).nan_to_num()  # NaN would crash
    return F.grid_sample(grey.expand(len(at), -1, -1, -1), grid, padding_mode="border", align_corners=False)


def sample_crops(grey: torch.Tensor, a, b, size: int) -> torch.Tensor:
    """Crops a, b (n,) of grey images -> (n, 1, size, size). Pixels are means of up to 6 x 6 samples, against aliasing."""
    a, b = np.asarray(a)[:, None, None], np.asarray(b)[:, None, None]
    fine = min(6, max(1, round(float(np.abs(a).max()) / size / 1.5)))
    return F.avg_pool2d(read_pixels(grey, a * unit_square(fine * size) + b), fine)


def grey_crop(photo: np.ndarray, a: complex, b: complex) -> tuple[torch.Tensor, complex]:
    """The part of a photo, uint8 (H, W, 3), that the crop a, b covers with a margin of a tenth -> grey (1, 1, h, w), its
    corner x + iy. To convert all of a large photo would take longer than the network."""
    corners = a * (1.2 * np.array([0, 1, 1j, 1 + 1j]) - 0.1 - 0.1j) + b
    H, W = photo.shape[:2]
    x0, y0 = (int(np.clip(v.min(), 0, n - 1)) for v, n in ((corners.real, W), (corners.imag, H)))
    x1, y1 = (int(np.clip(v.max() + 1, o + 1, n)) for v, o, n in ((corners.real, x0, W), (corners.imag, y0, H)))
    return (torch.from_numpy(np.array(photo[y0:y1, x0:x1])).float() @ GREY)[None, None], complex(x0, y0)


# ------------------------------------------------------------------------------------------------------- detection

def predict_both_sides(net, crops: torch.Tensor, mirrored: np.ndarray) -> torch.Tensor:
    """Crops (n, 1, S, S) -> points (2, n, k), complex, by each crop and by its mirror image. mirrored: (k,) as MIRROR"""
    points, points_of_mirror = torch.view_as_complex(net(torch.cat([crops, crops.flip(-1)]))).chunk(2)
    return torch.stack([points, 1 - points_of_mirror[:, mirrored].conj()])


def predict_face(net: LandmarkNet, photo: np.ndarray, a: complex, b: complex, shifts=(0,)) -> np.ndarray:
    """Photo, uint8 (H, W, 3), crop a, b, shifts of it in sides -> predict_both_sides, (2, len(shifts), K), in pixels"""
    grey, corner = grey_crop(photo, a, b)
    b = b + a * np.array(shifts)
    crops = sample_crops(grey, np.full(len(b), a), b - corner, FACE_SIZE)
    return a * predict_both_sides(net, crops, MIRROR).numpy() + b[:, None]


def refine_parts(net: LandmarkNet, views, a, points) -> np.ndarray:
    """grey_crop, crop's a and points (K,) in pixels of each of n faces -> points (n, K) with refined eyes and mouth"""
    points = np.array(points)
    for network, part in ((net.eye, EYE), (net.mouth, MOUTH)):
        side, b = part_crops(part, np.array(a), points)  # (n,), (n, 2)
        crops = torch.cat([sample_crops(grey, [s, s], at - corner, part.size)
                           for (grey, corner), s, at in zip(views, side, b)])  # (2n, 1, S, S): left and right of each
        crops[1::2] = crops[1::2].flip(-1)
        refined = to_complex(network(crops).numpy()).reshape(len(points), 2, -1)  # (n, 2, k)
        refined[:, 1] = 1 - refined[:, 1].conj()
        refined = side[:, None, None] * refined + b[..., None]
        total, count = np.zeros_like(points), np.bincount(part.points.ravel(), minlength=K)  # the mouth is read twice
        np.add.at(total, np.s_[:, part.points], refined)
        points = np.where(count, total / count.clip(1), points)
    return points


@torch.inference_mode()
def find_landmarks(net: LandmarkNet, photo: np.ndarray, box) -> np.ndarray:
    """Photo, uint8 (H, W, 3), box x0, y0, x1, y1 of a face in pixels -> landmarks, float32 (68, 2) in pixels. Check
    landmark_scatter: the network gives landmarks of any image."""
    a, b = box_crop(box)
    for _ in range(3):
        points = predict_face(net, photo, a, b).mean((0, 1))
        a, b = net.crop_of(points)
    for _ in range(2):  # the second time from centred crops; frames of a video get one pass
        points = refine_parts(net, [grey_crop(photo, a, b)], [a], [points])[0]
    return to_real(points)


@torch.inference_mode()
def landmark_scatter(net: LandmarkNet, photo: np.ndarray, points: np.ndarray) -> float:
    """Mean deviation of landmarks (68, 2), in sides of the crop, when the crop is shifted and mirrored. Above
    SCATTER_LIMIT they are unreliable: a profile, a covered mouth, not a face."""
    a, b = net.crop_of(to_complex(points))
    predicted = predict_face(net, photo, a, b, (0.08, -0.08, 0.08j, -0.08j)).reshape(-1, K)
    return float(np.abs(predicted - predicted.mean(0)).mean() / np.abs(a))


def lid_opening(p):
    """Points of an EYE, complex (.., 11): brow 0..4, corner 5, upper lid 6, 7, corner 8, lower lid 9, 10 -> gap between
    its lids (..), in widths of the eye. p: NumPy or torch"""
    gap = (p[..., 9] + p[..., 10] - p[..., 6] - p[..., 7]) / 2
    return (gap / (p[..., 8] - p[..., 5])).imag


def measure_eyes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks (.., 68, 2) -> eyelid openings (.., 2), left and right in the image, in widths of the eye (.3 open, below
    .1 shut); heights of the brows above the eyes (.., 2), in distances of the eyes' outer corners"""
    points = to_complex(points)
    p = points[..., EYE.points]  # (.., 2, 11)
    heights = (p[..., 5] + p[..., 8]) / 2 - p[..., :5].mean(-1)
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        openings, brows = lid_opening(p), (heights / (points[..., 45, None] - points[..., 36, None])).imag
    openings[..., 1] *= -1  # the right eye's corners run from right to left
    return openings, brows


def track_video(net: LandmarkNet, path, n: int, number: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The first n frames of a video -> landmarks (T, 68, 2) in its pixels, of the `number`-th largest face of each scene,
    NaN in frames without it; the scene of each frame (T,)"""
    height = probe(path).height
    scene = label_scenes(itertools.islice(read_video(path, 16), n))
    small = zip(scene, read_video(path, min(height, TRACKING_HEIGHT)))
    points = [track_scene(net, (frame for _, frame in group), number)
              for _, group in itertools.groupby(small, key=lambda pair: pair[0])]
    return max(1.0, height / TRACKING_HEIGHT) * np.concatenate(points), scene


def track_scene(net: LandmarkNet, frames, number: int) -> np.ndarray:
    """Frames of one scene -> (n, 68, 2), see track_video. The face is tracked from the first detection on, both ways."""
    frames, skipped = iter(frames), deque(maxlen=DETECT_EVERY)
    for k, frame in enumerate(frames):
        faces = detect_faces(frame) if k % DETECT_EVERY == 0 else ()
        if len(faces) >= number:
            box = face_box(faces, "face", number)
            # backwards to the last detection, then forwards
            before = track_landmarks(net, [frame, *reversed(skipped)], box)[:0:-1]
            after = track_landmarks(net, itertools.chain([frame], frames), box)
            return np.concatenate([np.full((k - len(skipped), K, 2), np.nan, np.float32), before, after])
        skipped.append(frame)
    return np.full((k + 1, K, 2), np.nan, np.float32)


@torch.inference_mode()
def track_landmarks(net: LandmarkNet, frames, box) -> np.ndarray:
    """Frames uint8 (H, W, 3), box of the face in the first -> float32 (T, 68, 2) in pixels, NaN where it is lost"""
    faces, landmarks = track_face(net, frames, box), [np.zeros((0, K, 2), np.float32)]
    while batch := list(itertools.islice(faces, FRAMES_PER_BATCH)):
        landmarks.append(to_real(refine_parts(net, *zip(*batch))))
    return np.concatenate(landmarks)


def track_face(net: LandmarkNet, frames, box):
    """Yields the arguments of refine_parts for each frame. The crop follows the points: one pass a frame, two if it
    moves, three after a loss. Points are NaN where crop and mirror image disagree or the crop jumps: then it stays."""
    is_lost, (a, b) = True, box_crop(box)
    for k, frame in enumerate(frames):
        last_a, last_b = a, b
        for _ in range(3 if is_lost else 2):
            both = predict_face(net, frame, a, b)[:, 0]  # (2, K): by the crop and by its mirror image
            centre, (a, b) = a * CENTRE + b, net.crop_of(both.mean(0))
            if not is_lost and abs(a * CENTRE + b - centre) <= REREAD_SHIFT * abs(a):
                break
        shift = abs(a * CENTRE + b - last_a * CENTRE - last_b) / abs(last_a)
        is_steady = k == 0 or (shift < MAX_SHIFT and 1 / MAX_GROWTH < abs(a / last_a) < MAX_GROWTH)
        is_face = np.abs(both[0] - both[1]).mean() < MAX_MIRROR_ERROR * abs(a)
        is_lost, points = not (is_steady and is_face), both.mean(0)
        if is_lost:
            points, a, b = np.full(K, complex(np.nan, np.nan)), last_a, last_b
        yield grey_crop(frame, a, b), a, points


# ---------------- read from crops: the pose, for fusion.py; the shape of the lips, differentiable, for the sync expert

POSE_DIM = 7  # numbers of read_pose
# of an eye, in its widths; ours: above the usual opening people differ (.2 to .35), below the other one eyes are shut
SHUT_OPENING, USUAL_OPENING = 0.07, 0.15
TURN_LIMIT = 3.0  # of a driven head, in deviations of the training frames; ours: beyond it the generator's flow tears


def crops_to_grey(images):
    """Crops of real faces (n, 3, H, H) in [-1, 1] -> grey levels (n, 1, H, H)"""
    return (((images.float() + 1) * 127.5).movedim(1, -1) @ GREY.to(images.device))[:, None]


@torch.no_grad()
def read_pose(net: LandmarkNet, images, template: str = "face"):
    """Crops of real faces (n, 3, H, H) in [-1, 1] -> (n, 7): yaw, pitch, roll in degrees; place of the head, right and
    down, and its size, in edges of the crop; opening of the eyes. By the points of nose and eyes alone: others would let
    the mouth change the pitch. template: of the crops"""
    grey = F.avg_pool2d(crops_to_grey(images), max(1, images.shape[-1] // 128))

    def crop(a, b, size):  # (n,), (n, k), in edges of the image -> (n k, 1, size, size)
        at = a[:, None, None, None] * torch.from_numpy(unit_square(size)).to(a) + b[..., None, None]
        return read_pixels(grey.repeat_interleave(b.shape[1], 0), grey.shape[-1] * at.flatten(0, 1))

    left, top, side = square_in_crop(template, "face")
    a, b = torch.tensor([[side], [left + 1j * top]], device=grey.device, dtype=torch.complex64).expand(2, len(grey))
    for _ in range(2):  # the second time in the crop that fits
        points = predict_both_sides(net, crop(a, b[:, None], FACE_SIZE), MIRROR).mean(0)
        points = a[:, None] * points + b[:, None]                              # (n, 68)
        a, b = similarity(torch.view_as_complex(net.mean), points)
    eyes = crop(*part_crops(EYE, a, points), EYE.size)                         # (2n, 1, ..): left and right of each
    eyes[1::2] = eyes[1::2].flip(-1)
    eyes = torch.view_as_complex(net.eye(eyes)).unflatten(0, (-1, 2))          # (n, 2, 11)
    opening = lid_opening(eyes).mean(1)
    points, mean = torch.view_as_real(points).cpu().double().numpy(), net.solid.cpu().double().numpy()
    scale, R, _ = fit_pose(points, mean, UPPER_FACE)
    pose = torch.from_numpy(np.c_[angles(R), points[:, UPPER_FACE].mean(1), scale]).float().to(opening)
    return torch.cat([pose, opening.clamp(SHUT_OPENING, USUAL_OPENING)[:, None]], 1)


class PoseReader(nn.Module):
    """Crops of real faces (n, 3, H, H) -> pose codes (n, POSE_DIM): the numbers of read_pose, whitened. Frozen"""

    def __init__(self, template: str):
        super().__init__()
        self.template, self.landmarks = template, load_landmarks()
        self.register_buffer("mean", torch.zeros(POSE_DIM))
        self.register_buffer("std", torch.ones(POSE_DIM))

    def forward(self, images):
        return (self.read(images) - self.mean) / self.std

    def read(self, images):
        return read_pose(self.landmarks, images, self.template)

    @property
    def turn_limits(self) -> np.ndarray:
        """Of yaw and pitch in degrees, for motion.driving_motion"""
        return TURN_LIMIT * self.std[:2].cpu().numpy()

    def follow(self, code, poses: np.ndarray, blinks: np.ndarray):
        """Pose code of one photo (1, POSE_DIM), or of a photo for each frame (T, POSE_DIM); poses (T, 6) relative to them
        and blinks (T,), as in motion.Motion -> pose codes (T, POSE_DIM)"""
        own, moves = (code * self.std + self.mean).cpu().double().numpy(), np.c_[poses, blinks]
        moves[:, 3:5] += turned_place(poses, rotation(*own[:, :3].T), self.landmarks.solid.cpu().double().numpy())
        moves[:, 3:] *= np.c_[own[:, [5, 5, 5]], SHUT_OPENING - own[:, 6]]
        return code + torch.from_numpy(moves).to(code) / self.std


LIP_POINTS = np.r_[48:68, 6:11]  # lips and chin
LIP_MIRROR = [LIP_POINTS.tolist().index(i) for i in MIRROR[LIP_POINTS]]


def read_lips(net: LandmarkNet, images):
    """Crops of real faces (n, 3, 64, 64) in [-1, 1] -> lip_shape (n, 50), the mean of each image and its mirror image.
    Differentiable in the pixels around the mouth alone: the sync loss must not move eyes or head."""
    grey = crops_to_grey(images)
    with torch.no_grad():
        face = predict_both_sides(net, grey, MIRROR).mean(0)  # (n, 68) in units of the image
        a, b = part_crops(MOUTH, similarity(torch.view_as_complex(net.mean), face)[0], face)
        a, b = a[:, None], b[:, :1]  # (n, 1)
        at = a[..., None] * torch.from_numpy(unit_square(MOUTH.size)).to(a) + b[..., None]
    crops = read_pixels(grey, images.shape[-1] * at)
    lips = a * predict_both_sides(net.mouth, crops, MIRROR[LIPS] - 48).mean(0) + b  # (n, 20)
    return lip_shape(torch.cat([face[:, :48], lips], 1))


def lip_shape(points):
    """Landmarks, complex (.., 68) -> x, y of lips and chin (.., 50); eyes level, 1 apart, the origin between them"""
    left, right = points[..., 36:42].mean(-1, keepdim=True), points[..., 42:48].mean(-1, keepdim=True)
    return torch.view_as_real((points[..., LIP_POINTS] - (left + right) / 2) / (right - left)).flatten(-2)


# --------------------------------------------------------------------------------------------------- training data

def read_packs(folders: list[Path], rng: np.random.Generator, most: int = 8000) -> tuple[torch.Tensor, np.ndarray]:
    """Packs with landmarks -> grey frames, uint8 (n, 1, S, S), up to `most` of a pack, spread evenly over its training
    clips; points (n, K) in units of the crop. Raises InputError: no pack, no landmarks, packs of several sizes"""
    images, points = [], []
    for pack in open_packs(folders).packs:
        landmarks = Landmarks(pack)
        clips = np.intersect1d(split(pack)["train"], landmarks.usable_clips)
        shift = DLIB_SHIFT * (landmarks.detectors[0] == "dlib")
        for c in tqdm(rng.permutation(clips)[:most], desc=pack.folder.name, leave=False, disable=None):
            for k in rng.permutation(pack.n_frames[c])[: -(-most // len(clips))]:
                images.append((torch.from_numpy(pack.frame(c, k)).float() @ GREY).round().byte())
                points.append(to_complex(landmarks.clip(c)[k] / pack.size) - 1j * shift)
    if not images:
        raise InputError("no clip for training has landmarks: " + ", ".join(str(folder) for folder in folders))
    return torch.stack(images)[:, None], np.stack(points)


def mean_shape(points: np.ndarray) -> np.ndarray:
    """Shapes (n, K) in units of upright crops -> Procrustes mean (K,), symmetric, placed as in the median crop"""
    mean = median = np.median(points.real, 0) + 1j * np.median(points.imag, 0)
    for _ in range(3):
        a, b = similarity(mean, points)
        aligned = (points - b[:, None]) / a[:, None]
        mean = np.median(aligned.real, 0) + 1j * np.median(aligned.imag, 0)
    a, b = similarity(mean, median)
    return (a * mean + b + mirror(a * mean + b)) / 2


def random_crops(n: int, scale, turn, shift, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random crops a, b (n,) in units of the exact one. Deviations: scale of log |a|, turn in radians, shift in sides"""
    a = np.exp(scale * rng.normal(size=n) + 1j * turn * rng.normal(size=n))
    return a, CENTRE - a * CENTRE + shift * (rng.normal(size=(n, 2)) @ (1, 1j))


def degrade(x: torch.Tensor) -> torch.Tensor:
    """Crops (n, 1, S, S) -> the same as by other cameras: random gamma and noise, every fourth is blurred"""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = ((x - low) / (high - low + 1)) ** torch.exp(0.3 * torch.randn(len(x), 1, 1, 1)) * 200
    x[::4] = F.interpolate(F.avg_pool2d(x[::4], 2), scale_factor=2, mode="bilinear")
    return x + 6 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def shut_eyes(v: np.ndarray, y: np.ndarray, share: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """Shuts eyes by moving their own lids and stretching the skin between brow and lid. dlib's points hardly follow a
    blink, so real blinks are no ground truth. v (n, S, S): positions of pixels, and y (n, 11): points, both in the exact
    crop; share (n,) of the gap that closes -> positions (n, S, S) at which the pixels are read, moved points (n, 11)"""
    corner, far = y[:, 5, None], y[:, 8, None]

    def corner_line(z):
        """At z: height of the line through both corners; a parabola of x that is 0 at the corners and 1 in the middle"""
        t = (z.real - corner.real) / (far.real - corner.real)
        return corner.imag + t * (far - corner).imag, np.clip(4 * t * (1 - t), 0, None)

    def lid_height(z):  # of the parabola nearest to a lid's two points
        base, arch = corner_line(z)
        return ((base - z.imag) / arch.clip(0.3)).mean(1, keepdims=True)

    top, bottom, flat = y[:, [6, 7]], y[:, [10, 9]], v.reshape(len(v), -1)
    upper, lower = lid_height(top), -lid_height(bottom)
    y, closing = y.copy(), share[:, None] * (upper + lower)
    y[:, [6, 7]] += 0.88j * closing * corner_line(top)[1]  # the upper lid goes .88 of the way
    y[:, [10, 9]] -= 0.12j * closing * corner_line(bottom)[1]
    upper, lower = (h + 0.02 * rng.normal(size=h.shape) for h in (upper, lower))  # errors of the landmarks
    (base, arch), height = corner_line(flat), flat.imag
    up, low = base - upper * arch, base + lower * arch  # edges of the lids; new_up and new_low after the closure
    gap = share[:, None] * (low - up).clip(0)
    new_up, new_low = up + 0.88 * gap, low - 0.12 * gap
    # the skin between `above` and the upper lid, and between the lower lid and `below`, is stretched
    above, below = up - 0.6 * (corner.imag - y[:, :5].imag.mean(1, keepdims=True)).clip(0.1), low + 0.15
    is_upper, is_lower = (height > above) & (height < new_up), (height < below) & (height > new_low)
    source = np.where(is_upper, above + (height - above) * (up - above) / (new_up - above), height)
    source = np.where(is_lower, below - (below - height) * (below - low) / (below - new_low), source)
    return (flat.real + 1j * source).reshape(v.shape), y


def seal_lips(images: torch.Tensor, points: np.ndarray) -> np.ndarray:
    """Points (n, K) of dlib in units of upright grey images (n, 1, S, S) -> the same, but nearly shut lips meet on the
    seam of the image: the curve near dlib's line that is dark and brighter below"""
    upper, lower, across, S = UPPER_INNER, LOWER_INNER, np.linspace(-1, 1, 5), images.shape[-1]
    gap = (points[:, lower] - points[:, upper]).imag[:, 1:4].mean(1)
    i = np.flatnonzero(gap < 2 * SHUT_GAP)
    if not len(i):
        return points
    grey, fine = images[torch.from_numpy(i)].float(), np.linspace(-0.8, 0.8, 13)  # across the mouth; -1, 1: corners
    grey = grey / (grey.std((2, 3), keepdim=True) + 1)
    line = (points[i][:, upper] + points[i][:, lower]) / 2 @ np.stack([np.interp(fine, across, one) for one in np.eye(5)])
    steps = np.meshgrid(np.linspace(-1, 1, 21) * SEARCH_RANGE, np.linspace(-0.5, 0.5, 5) * SEARCH_RANGE)
    rise, bend = (v.ravel() for v in steps)
    curves = line[:, None] + 1j * (rise[:, None] + bend[:, None] * (1 - fine**2))  # (n, 105, 13)

    def brightness(curves):  # (.., m, 13) -> (.., m), mean along each curve
        return read_pixels(grey, S * curves)[:, 0].mean(-1).numpy()

    distance = 0.2 * (rise**2 + 4 * bend**2) / SEARCH_RANGE**2
    best = (1.5 * brightness(curves) - 0.5 * brightness(curves + 0.012j) + distance).argmin(1)
    seam = curves[np.arange(len(i)), best][:, None]
    contrast = brightness(seam + SEARCH_RANGE * np.array([[-1j], [1j]])).min(1) - brightness(seam)[:, 0]
    i, best = i[contrast > 0.2], best[contrast > 0.2]
    all_across = np.r_[np.linspace(-1, 1, 7), np.linspace(1, -1, 7)[1:-1], across, across[3:0:-1]]  # of the 20 points
    share = np.r_[np.full(12, 0.5), np.ones(8)]  # outer lips follow by half
    points = points.copy()
    points[i, 48:] += 1j * share * (rise[best, None] + bend[best, None] * (1 - all_across**2))
    closed = SHUT_GAP / gap[i, None].clip(SHUT_GAP) - 0.5  # up to SHUT_GAP they meet, from 2 SHUT_GAP they are unchanged
    up, low = points[i][:, upper], points[i][:, lower]
    points[np.ix_(i, upper)], points[np.ix_(i, lower)] = up + closed * (low - up), low + closed * (up - low)
    return points


# -------------------------------------------------------------------------------------------------------- training

def train(network: nn.Module, sample_batch, weights, steps: int, peak: float, name: str):
    """Trains on sample_batch() -> crops, points in them. Loss: mean distance, not squared: landmarks have errors"""
    network.to(memory_format=torch.channels_last)  # a third faster on a CPU
    weights = torch.tensor(weights / np.mean(weights), dtype=torch.float32)
    opt = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, peak, total_steps=steps)
    for _ in tqdm(range(steps), desc=name, disable=None):
        x, y = sample_batch()
        error = network(degrade(x).contiguous(memory_format=torch.channels_last)) - torch.from_numpy(to_real(y))
        loss = ((error.square().sum(-1) + 1e-6).sqrt() * weights).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    network.to(memory_format=torch.contiguous_format)


def face_batches(net: LandmarkNet, images: torch.Tensor, points: np.ndarray, rng):
    """Sets a network's mean and components from grey frames, uint8 (n, 1, S, S), and points (n, K) in their units ->
    sample_batch for `train`. Half of the crops have the errors of a detector's box, the others those of a first pass."""
    n, S, mean = CROPS_PER_BATCH, images.shape[-1], mean_shape(points)
    is_wide = np.arange(n) % 2 == 0
    exact_a, exact_b = similarity(mean, points)

    def sample_places():  # frames of a batch, its crops a, b in units of the frame, points in units of the crops
        i = rng.integers(len(points), size=n)
        deviations = np.where(is_wide, [[0.10], [0.25], [0.06]], [[0.04], [0.05], [0.02]])  # scale, turn, shift
        a, b = random_crops(n, *deviations, rng)
        a, b = exact_a[i] * a, exact_a[i] * b + exact_b[i]
        return i, a, b, (points[i] - b[:, None]) / a[:, None]

    def sample_batch():
        i, a, b, y = sample_places()
        x, half = sample_crops(images[i].float(), S * a, S * b, FACE_SIZE), n // 2
        return torch.cat([x[:half], x[half:].flip(-1)]), np.concatenate([y[:half], mirror(y[half:])])

    shapes = [y for _ in range(4000 // n) for y in (sample_places()[3], mirror(sample_places()[3]))]
    shapes = np.concatenate(shapes) - mean
    _, s, v = torch.linalg.svd(torch.from_numpy(to_real(shapes)).flatten(1), full_matrices=False)
    net.mean.copy_(torch.from_numpy(to_real(mean)))
    net.basis.copy_((v * s[:, None] / len(shapes) ** 0.5)[: len(net.basis)])  # weights of deviation 1
    return sample_batch


def part_batches(net: LandmarkNet, network: PartNet, part: FacePart, images: torch.Tensor, points: np.ndarray, rng):
    """As face_batches, for the network of a part. Only open eyes are used; shut_eyes shuts two thirds of a batch"""
    if part is EYE:
        is_open = (measure_eyes(to_real(points))[0] > 0.2).all(1)
        images, points = images[torch.from_numpy(is_open)], points[is_open]
    n, S = CROPS_PER_BATCH, images.shape[-1]
    a, b = part_crops(part, net.crop_of(points)[0], points)
    shapes = (points[:, part.points] - b[..., None]) / a[:, None, None]  # (frames, 2, k)
    shapes[:, 1] = 1 - shapes[:, 1].conj()
    network.mean.copy_(torch.from_numpy(to_real(shapes.mean((0, 1)))))

    def sample_batch():
        i, side = rng.integers(len(points), size=n), rng.integers(2, size=n)
        turn, shift = random_crops(n, 0.08, 0.08, 0.03, rng)
        v, y = turn[:, None, None] * unit_square(part.size) + shift[:, None, None], shapes[i, side]
        if part is EYE:
            v, y = shut_eyes(v, y, (1.5 * rng.random(n)).clip(0, 1) * (rng.random(n) > 0.33), rng)
        v = np.where(side[:, None, None] == 1, 1 - v.conj(), v)
        x = read_pixels(images[i].float(), S * (a[i, None, None] * v + b[i, side][:, None, None]))
        return x, (y - shift[:, None]) / turn[:, None]

    return sample_batch


# --------------------------------------------------- landmarks of a pack by another detector: keypoints.py extract

CLIPS_PER_JOB = 10  # clips for which a process opens its detector once


def detect_clips(clips, pack: Pack, detector: str, selected) -> list[dict]:
    """Clips of a pack -> dict(points (T, 68, 2), interpolated: number of frames) each, or NaN and the reason"""
    results, detect = [], landmark_detector(detector, pack.template)
    for c in clips:
        try:
            if c not in selected:
                raise InputError("not in --list")
            points, interpolated = interpolate_gaps([detect(pack.frame(c, k)) for k in range(pack.n_frames[c])])
            results.append(dict(points=smooth(points), interpolated=interpolated))
        except InputError as error:  # too few frames with a face, or not selected
            results.append(dict(points=np.full((pack.n_frames[c], K, 2), np.nan), reason=str(error)))
    return results


def extract(args):
    """Writes the landmarks of a pack beside it. An interrupted run continues after its last finished clip."""
    pack = Pack(args.pack)
    folder, path = pack.folder / "landmarks", pack.folder / "landmarks/clips.jsonl"
    selected = set(read_clip_list(pack, args.list) if args.list else range(len(pack)))
    header = json.dumps(landmarks_header(pack, args.landmarks.partition(":")[0])).encode() + b"\n"
    with wrap_os_errors(folder, "written"):
        folder.mkdir(exist_ok=True)
        lines = complete_lines(path) if path.exists() and not args.overwrite else []
        if lines and lines[0] != header:
            raise InputError(f"{folder}: holds landmarks of another pack or detector; --overwrite replaces them")
        done = max(0, len(lines) - 1)
        jobs = [range(first, min(first + CLIPS_PER_JOB, len(pack))) for first in range(done, len(pack), CLIPS_PER_JOB)]
        detect = partial(detect_clips, pack=pack, detector=args.landmarks, selected=selected)
        results = tqdm(parallel_map(detect, jobs, args.workers), f"{CLIPS_PER_JOB} clips", len(jobs), disable=None)
        with open(path, "ab", 0) as log, open(folder / "points.bin", "ab", 0) as out:
            log.truncate(sum(map(len, lines)))  # without an incomplete last line
            log.write(b"" if lines else header)
            out.truncate(int(pack.frame_start[done]) * K * 2 * 4)
            for clip_results, clips in zip(results, jobs):
                for c, result in zip(clips, clip_results):
                    out.write(result.pop("points").astype("<f4").tobytes())
                    log.write(json.dumps(dict(source=pack.source(c)) | result).encode() + b"\n")
    print(f"{folder}: {len(Landmarks(pack).usable_clips)} of {len(pack)} clips have landmarks ({args.landmarks})")


# ------------------------------------------------------------------------------------------------------ the script

def main(argv=None):
    p = Parser(description="Trains the landmark network on packs of prepare.py with dlib's landmarks beside them.")
    p.add_argument("packs", type=Path, nargs="+", help="packs of one --size, 128 or more; see keypoints.py extract")
    p.add_argument("--out", type=Path, default=Path("landmarks.pt"), help="weights to write (default: landmarks.pt)")
    p.add_argument("--steps", type=int, default=1200, help="steps of each network, 64 crops each (default: 1200)")
    p.add_argument("--seed", type=int, default=0, help="random seed of batches and initial weights (default: 0)")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    args = p.parse_args(argv)
    out, rng = check_output(args.out, args.overwrite, (".pt",)), np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    images, points = read_packs(args.packs, rng)
    if images.shape[-1] < 128:
        raise InputError(f"packs must have --size 128 or more, these have {images.shape[-1]}")
    net = LandmarkNet()
    net.solid.copy_(load_landmarks().solid)
    points = seal_lips(images, points)
    weights = np.repeat([1.0, 3, 4, 8], [36, 12, 12, 8])  # more where warp.py needs them: eyes, outer lips, inner lips
    train(net, face_batches(net, images, points, rng), weights, args.steps, 3e-3, "landmarks")
    for name, network, part in (("eyes", net.eye, EYE), ("mouth", net.mouth, MOUTH)):
        train(network, part_batches(net, network, part, images, points, rng), part.weights, args.steps, 5e-3, name)
    save_checkpoint(out, dict(kind="landmarks", config=net.config, net=fp16_state_dict(net)))
    print(f"{out}: trained on {len(points)} frames")


if __name__ == "__main__":
    run(main)
