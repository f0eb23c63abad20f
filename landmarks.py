"""Facial landmarks of photos and videos by one small network: a 64-pixel grey crop -> the 68 points of iBUG.

The crop is the square in which the mean shape, shifted, scaled and rotated to fit the face, lies where it lies in the
template. It follows from the points, so each pass gives a better crop for the next one. Eyes, brows and mouth are read
once more from crops of their own: in 64 pixels of a face an eye is 4 pixels high.

    python landmarks.py out/photos out/clips      # weights/landmarks.pt, from packs with landmarks (4 minutes)

Points are complex numbers x + iy here. A crop is a pair a, b: point u of the unit square lies at pixel a u + b of the
photo; |a| is the crop's side in pixels, arg a its rotation. Fitting one shape to another is then one division.
Axes: n samples, T frames, K = 68 points, S pixels of a crop. What is not marked with a source is ours.
"""

import itertools
import json
import os
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
    K, Landmarks, interpolate_gaps, landmark_detector, landmarks_header, open_landmarks, similarity, smooth, to_complex)
from media import InputError, Parser, check_output, parallel_map, run, wrap_os_errors

WEIGHTS = Path(__file__).resolve().parent / "weights/landmarks.pt"
GREY = torch.tensor([0.299, 0.587, 0.114])  # Rec. 601 luma
# point i of a face is point MIRROR[i] of its mirror image
MIRROR = np.r_[16:-1:-1, 26:16:-1, 27:31, 35:30:-1, 45:41:-1, 47, 46, 39:35:-1, 41, 40,
               54:47:-1, 59:54:-1, 64:59:-1, 67:64:-1]
FACE_SIZE = 64  # pixels of its crop
MIDDLE = 0.5 + 0.5j


class Part(NamedTuple):
    """What a network of its own reads, on the left of the image and, mirrored, on the right"""

    points: np.ndarray  # (2, k) of the 68; the second row in the mirror
    weight: list  # of the points in the loss
    first: int  # the points from here on give the crop's place
    place: complex  # where in the crop their mean lies
    side: float  # of the crop, in sides of the face's
    size: int  # pixels of the crop


LEFT = np.r_[17:22, 36:42]  # brow and eye on the left of the image
RIGHT, LIPS = MIRROR[LEFT], np.r_[48:68]
EYE = Part(np.stack([LEFT, RIGHT]), [1] * 5 + [3] * 6, 5, 0.5 + 0.62j, 0.38, 32)
MOUTH = Part(np.stack([LIPS, MIRROR[LIPS]]), [1] * 12 + [3] * 8, 0, MIDDLE, 0.45, 48)
STEADY = 0.02  # a crop that moves by more of its side between two frames is read again
LOST = 0.04  # sides of the crop: points of crop and mirror image are further apart where there is no face
CROPS_PER_BATCH = 64  # crops of a training batch
BATCH = 8  # frames whose eyes and mouths are read at once: a third of the time of one by one
JUMP, SWELL = 0.35, 1.4  # sides by which a face moves at most between two frames, factor by which it grows
SCATTER_LIMIT = 0.02  # see `doubt`: 99 of 100 UTKFace photos lie below; of 28 images without a face all but a dog above
# sides of the crop by which dlib's points lie too low: its line between shut lips is .0077 below the darkest row (median
# of 431 places in UTKFace's photos). Half of that: lids and the corners of eyes and mouth are that much off
DLIB_LOW = 0.004
# sides: dlib's gap between lips that touch (.006 in photos, .015 in GRID's videos); how far off its line is
SHUT, SEARCH = 0.016, 0.025


# ----------------------------------------------------------------------------------------------------- the network

def trunk(widths: list[int]) -> list[nn.Module]:
    """Convolutions that halve a grey crop once a width"""
    layers = []
    for c_in, c in zip([1, *widths], widths):
        layers += [nn.Conv2d(c_in, c, 3, 2, 1), nn.GroupNorm(4, c), nn.LeakyReLU(0.1)]
        layers += [nn.Conv2d(c, c, 3, 1, 1), nn.LeakyReLU(0.1)] if c_in > 1 else []
    return [*layers, nn.Flatten()]


def standardise(x: torch.Tensor) -> torch.Tensor:
    """Crops (n, 1, S, S) without their brightness and contrast; + 1 grey level: a blank one stays finite"""
    x = x - x.mean((2, 3), keepdim=True)
    return x / (x.std((2, 3), keepdim=True) + 1)


class PartNet(nn.Module):
    """Grey crops of a part (n, 1, S, S) -> its points (n, k, 2) in units of the crop"""

    def __init__(self, part: Part, width: int = 16):
        super().__init__()
        k = part.points.shape[1]
        head = nn.Linear((part.size // 8) ** 2 * 3 * width, 64), nn.LeakyReLU(0.1), nn.Linear(64, 2 * k)
        self.layers = nn.Sequential(*trunk([width, 2 * width, 3 * width]), *head)
        self.register_buffer("mean", torch.zeros(k, 2))

    def forward(self, x):
        return self.mean + 0.1 * self.layers(standardise(x)).unflatten(-1, (-1, 2))


class LandmarkNet(nn.Module):
    """Grey crops of faces (n, 1, 64, 64) -> points (n, 68, 2) in units of the crop; `eye`, `mouth`: networks of parts.
    The trunk gives `components` weights of the principal components of shapes: no point can leave the others."""

    def __init__(self, width: int = 20, components: int = 40):
        super().__init__()
        head = nn.Linear(16 * 4 * width, 128), nn.LeakyReLU(0.1), nn.Linear(128, components)
        self.layers = nn.Sequential(*trunk([width, 2 * width, 3 * width, 4 * width]), *head)
        self.eye, self.mouth = PartNet(EYE), PartNet(MOUTH)
        self.config = dict(width=width, components=components)
        self.register_buffer("mean", torch.zeros(K, 2))
        self.register_buffer("basis", torch.zeros(components, 2 * K))
        # the mean face in 3-D for warp.py: the 68 points and 9 of the hairline, in distances of the eyes' outer corners;
        # the median of MediaPipe's points on 177 photos of UTKFace. Not trained here: `train` copies it
        self.register_buffer("solid", torch.zeros(K + 9, 3))

    def forward(self, x):
        return self.mean + (self.layers(standardise(x)) @ self.basis).unflatten(-1, (K, 2))

    def crop_of(self, points: np.ndarray):
        """The crops a, b (..) in which the mean shape lies nearest to points (.., K) in pixels"""
        return similarity(to_complex(self.mean.numpy()), points)


def load_landmarks(path: str | Path = WEIGHTS) -> LandmarkNet:
    """The network of a file, frozen, on the CPU. Raises InputError: as load_checkpoint; damaged."""
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
    """x0, y0, x1, y1 in pixels, nearly square -> a, b of the square about its middle"""
    corner, far = complex(*box[:2]), complex(*box[2:])
    side = (far - corner).real / 2 + (far - corner).imag / 2
    return side, (corner + far) / 2 - side * MIDDLE


def part_crops(part: Part, a, points: np.ndarray):
    """a (..) of face crops and their points (.., K) -> a (..), b (.., 2) of the crops of a part"""
    a = part.side * a
    return a, points[..., part.points[:, part.first :]].mean(-1) - a[..., None] * part.place


def unit_square(size: int) -> np.ndarray:
    """Middles of size x size pixels, complex (size, size)"""
    t = (np.arange(size) + 0.5) / size
    return t + 1j * t[:, None]


def sample(grey: torch.Tensor, at) -> torch.Tensor:
    """Grey images (n or 1, 1, H, W), pixels x + iy (n, S, S) -> (n, 1, S, S), bilinear; the border is repeated"""
    size = torch.tensor([grey.shape[-1], grey.shape[-2]], device=grey.device)
    grid = torch.view_as_real(torch.as_tensor(at, dtype=torch.complex64)) * 2 / size - 1
    return F.grid_sample(grey.expand(len(at), -1, -1, -1), grid, padding_mode="border", align_corners=False)


def sample_crops(grey: torch.Tensor, a, b, size: int) -> torch.Tensor:
    """Crops a, b (n,) of grey images -> (n, 1, size, size). A pixel is the mean of up to 6 x 6 samples: no aliasing"""
    a, b = np.asarray(a)[:, None, None], np.asarray(b)[:, None, None]
    fine = min(6, max(1, round(float(np.abs(a).max()) / size / 1.5)))
    return F.avg_pool2d(sample(grey, a * unit_square(fine * size) + b), fine)


def grey_crop(photo: np.ndarray, a: complex, b: complex) -> tuple[torch.Tensor, complex]:
    """What the crop a, b covers of a photo, uint8 (H, W, 3), with a margin of a tenth -> grey (1, 1, h, w), its corner
    x + iy. All of a large photo in grey would take longer than the network."""
    corners = a * (1.2 * np.array([0, 1, 1j, 1 + 1j]) - 0.1 - 0.1j) + b
    H, W = photo.shape[:2]
    x0, y0 = (int(np.clip(v.min(), 0, n - 1)) for v, n in ((corners.real, W), (corners.imag, H)))
    x1, y1 = (int(np.clip(v.max() + 1, o + 1, n)) for v, o, n in ((corners.real, x0, W), (corners.imag, y0, H)))
    return (torch.from_numpy(np.array(photo[y0:y1, x0:x1])).float() @ GREY)[None, None], complex(x0, y0)


# ------------------------------------------------------------------------------------------------------- detection

def both_sides(net, crops: torch.Tensor, mirrored: np.ndarray) -> torch.Tensor:
    """Crops (n, 1, S, S) -> a network's points (2, n, k), complex: those of each crop, and of its mirror image"""
    points, others = torch.view_as_complex(net(torch.cat([crops, crops.flip(-1)]))).chunk(2)
    return torch.stack([points, 1 - others[:, mirrored].conj()])


def read_face(net: LandmarkNet, photo: np.ndarray, a: complex, b: complex, shifts=(0,)) -> np.ndarray:
    """The crop a, b of a photo, uint8 (H, W, 3), shifted by sides -> both_sides (2, len(shifts), K) in pixels"""
    grey, corner = grey_crop(photo, a, b)
    b = b + a * np.array(shifts)
    crops = sample_crops(grey, np.full(len(b), a), b - corner, FACE_SIZE)
    return a * both_sides(net, crops, MIRROR).numpy() + b[:, None]


def read_parts(net: LandmarkNet, views, a, points) -> np.ndarray:
    """Of n faces grey_part, scale of the crop, points (K,) in pixels -> (n, K), eyes and mouth from own crops"""
    points = np.array(points)
    for network, part in ((net.eye, EYE), (net.mouth, MOUTH)):
        side, b = part_crops(part, np.array(a), points)  # (n,), (n, 2)
        crops = torch.cat([sample_crops(grey, [s, s], at - corner, part.size)
                           for (grey, corner), s, at in zip(views, side, b)])  # (2n, 1, S, S): left and right of each
        crops[1::2] = crops[1::2].flip(-1)
        found = to_complex(network(crops).numpy()).reshape(len(points), 2, -1)  # (n, 2, k)
        found[:, 1] = 1 - found[:, 1].conj()
        found = side[:, None, None] * found + b[..., None]
        total, times = np.zeros_like(points), np.bincount(part.points.ravel(), minlength=K)  # the mouth is in both rows
        for row in (0, 1):
            total[:, part.points[row]] += found[:, row]
        points = np.where(times, total / times.clip(1), points)
    return points


@torch.inference_mode()
def find_landmarks(net: LandmarkNet, photo: np.ndarray, box) -> np.ndarray:
    """Landmarks of the face in a box, x0, y0, x1, y1 in pixels, of a photo, uint8 (H, W, 3) -> float32 (68, 2) in
    pixels. After each pass the crop follows the points. Read `doubt` as well: the network gives landmarks of anything."""
    a, b = box_crop(box)
    for _ in range(3):
        points = read_face(net, photo, a, b).mean((0, 1))
        a, b = net.crop_of(points)
    for _ in range(2):  # the second time from centred crops; a frame of a video has one
        points = read_parts(net, [grey_crop(photo, a, b)], [a], [points])[0]
    return to_real(points)


@torch.inference_mode()
def landmark_scatter(net: LandmarkNet, photo: np.ndarray, points: np.ndarray) -> float:
    """How far landmarks (68, 2) scatter, in sides of the crop, when the crop is shifted and mirrored. Above DOUBT they
    are not to be trusted: a profile, something before the mouth, not a face."""
    a, b = net.crop_of(to_complex(points))
    found = read_face(net, photo, a, b, (0.08, -0.08, 0.08j, -0.08j)).reshape(-1, K)
    return float(np.abs(found - found.mean(0)).mean() / np.abs(a))


def measure_eyes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks (.., 68, 2) -> eyes (.., 2): opening of the lids, left and right in the image, in widths of the eye (.3
    open, below .1 shut); brows (.., 2): height over the eye, in distances of the eyes' outer corners."""
    points = to_complex(points)
    eyes, brows = [], []
    for part, sign in ((LEFT, 1), (RIGHT, -1)):
        p = points[..., part]  # brow 0..4, corner 5, upper lid 6, 7, corner 8, lower lid 9, 10
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            eyes.append(sign * ((p[..., 9] + p[..., 10] - p[..., 6] - p[..., 7]) / (p[..., 8] - p[..., 5])).imag / 2)
            brows.append((((p[..., 5] + p[..., 8]) / 2 - p[..., :5].mean(-1)) / (points[..., 45] - points[..., 36])).imag)
    return np.stack(eyes, -1), np.stack(brows, -1)


@torch.inference_mode()
def track_landmarks(net: LandmarkNet, frames, box) -> np.ndarray:
    """Frames uint8 (H, W, 3), box of the first's face -> float32 (T, 68, 2) in pixels, NaN where it is lost"""
    faces, found = follow_face(net, frames, box), [np.zeros((0, K, 2), np.float32)]
    for batch in iter(lambda: list(itertools.islice(faces, BATCH)), []):
        found.append(to_real(read_parts(net, *zip(*batch))))
    return np.concatenate(found)


def follow_face(net: LandmarkNet, frames, box):
    """Of each frame the arguments of read_parts. The crop follows the points: a pass a frame, two where it moves.
    Points are NaN where crop and mirror image disagree or the crop jumps: it stays where the face was last."""
    seen, passes, (a, b) = False, 3, box_crop(box)
    for frame in frames:
        last, searched = (a, b), passes > 1
        while passes:
            found = read_face(net, frame, a, b)[:, 0]
            centre, (a, b) = a * MIDDLE + b, net.crop_of(found.mean(0))
            passes -= 1
            if not searched and abs(a * MIDDLE + b - centre) > STEADY * abs(a):
                passes, searched = 1, True
        moved = abs(a * MIDDLE + b - last[0] * MIDDLE - last[1]) / abs(last[0])
        steady = not seen or moved < JUMP and 1 / SWELL < abs(a / last[0]) < SWELL
        seen, passes, points = True, 1, found.mean(0)
        if not (steady and np.abs(found[0] - found[1]).mean() < LOST * abs(a)):
            points, passes, (a, b) = np.full(K, complex(np.nan, np.nan)), 3, last
        yield grey_crop(frame, a, b), a, points


# -------------------------------------- the shape of the lips, differentiable: what the sync expert gets of a face

LIP_POINTS = np.r_[48:68, 6:11]  # lips and chin
LIP_MIRROR = [LIP_POINTS.tolist().index(i) for i in MIRROR[LIP_POINTS]]


def read_lips(net: LandmarkNet, images):
    """Crops of real faces (n, 3, 64, 64) in [-1, 1] -> lip_shape (n, 50), by the networks of each image and its
    mirror image. Differentiable in the pixels around the mouth alone: no eye or head must move for the lips."""
    grey = (((images.float() + 1) * 127.5).movedim(1, -1) @ GREY.to(images.device))[:, None]  # (n, 1, 64, 64)
    with torch.no_grad():
        face = both_sides(net, grey, MIRROR).mean(0)  # (n, 68) in units of the image
        a, b = part_crops(MOUTH, similarity(torch.view_as_complex(net.mean), face)[0], face)
        a, b = a[:, None], b[:, :1]  # (n, 1)
        at = a[..., None] * torch.from_numpy(unit_square(MOUTH.size)).to(a) + b[..., None]
    crops = sample(grey, images.shape[-1] * at)
    lips = a * both_sides(net.mouth, crops, MIRROR[LIPS] - 48).mean(0) + b  # (n, 20)
    return lip_shape(torch.cat([face[:, :48], lips], 1))


def lip_shape(points):
    """Landmarks, complex (.., 68) -> lips and chin (.., 50): x, y; eyes level, 1 apart, origin between them"""
    left, right = points[..., 36:42].mean(-1, keepdim=True), points[..., 42:48].mean(-1, keepdim=True)
    return torch.view_as_real((points[..., LIP_POINTS] - (left + right) / 2) / (right - left)).flatten(-2)


# --------------------------------------------------------------------------------------------------- training data

def read_packs(folders: list[Path], rng: np.random.Generator, most: int = 8000) -> tuple[torch.Tensor, np.ndarray]:
    """Packs with landmarks beside them -> grey frames, uint8 (n, 1, S, S), up to `most` a pack, evenly from its clips for
    training; points (n, K) in units of the crop. Raises InputError: no pack, no landmarks, packs of several sizes."""
    images, points = [], []
    for pack, found in [(pack, Landmarks(pack)) for pack in open_packs(folders).packs]:
        clips, shift = np.intersect1d(split(pack)["train"], found.usable_clips), DLIB_LOW * (found.detectors[0] == "dlib")
        for c in tqdm(rng.permutation(clips)[:most], desc=pack.folder.name, leave=False, disable=None):
            for k in rng.permutation(pack.n_frames[c])[: -(-most // len(clips))]:
                images.append((torch.from_numpy(pack.frame(c, k)).float() @ GREY).round().byte())
                points.append(to_complex(found.clip(c)[k] / pack.size) - 1j * shift)
    if not images:
        raise InputError("no clip for training has landmarks: " + ", ".join(str(folder) for folder in folders))
    return torch.stack(images)[:, None], np.stack(points)


def mean_shape(points: np.ndarray) -> np.ndarray:
    """Shapes (n, K) in units of upright crops -> Procrustes mean (K,), symmetric, placed as by the median crop"""
    mean = place = np.median(points.real, 0) + 1j * np.median(points.imag, 0)
    for _ in range(3):
        a, b = similarity(mean, points)
        aligned = (points - b[:, None]) / a[:, None]
        mean = np.median(aligned.real, 0) + 1j * np.median(aligned.imag, 0)
    a, b = similarity(mean, place)
    return (a * mean + b + mirror(a * mean + b)) / 2


def random_crops(n: int, scale, turn, shift, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Crops that are off, (n,) each: a, b in units of the right crop; deviations of log scale, radians, sides"""
    a = np.exp(scale * rng.normal(size=n) + 1j * turn * rng.normal(size=n))
    return a, MIDDLE - a * MIDDLE + shift * (rng.normal(size=(n, 2)) @ (1, 1j))


def degrade(x: torch.Tensor) -> torch.Tensor:
    """Crops (n, 1, S, S) as other cameras give them: gamma, every fourth blurred, noise"""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = ((x - low) / (high - low + 1)) ** torch.exp(0.3 * torch.randn(len(x), 1, 1, 1)) * 200
    x[::4] = F.interpolate(F.avg_pool2d(x[::4], 2), scale_factor=2, mode="bilinear")
    return x + 6 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def shut_eyes(v: np.ndarray, y: np.ndarray, share: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """Shuts eyes by moving their own lids: dlib's points hardly follow lids that shut, so they cannot teach blinks.
    Places of pixels in the right crops v (n, S, S), points there y (n, 11), share (n,) of the gap that closes ->
    where each pixel is taken from, the moved points. The skin between brow and lid is stretched."""
    corner, far = y[:, 5, None], y[:, 8, None]

    def line(z):
        """Height of the line through the corners at z, and a parabola over it, 1 in the middle"""
        t = (z.real - corner.real) / (far.real - corner.real)
        return corner.imag + t * (far - corner).imag, np.clip(4 * t * (1 - t), 0, None)

    def height(z):  # of a lid's two points over the middle of that line
        base, arch = line(z)
        return ((base - z.imag) / arch.clip(0.3)).mean(1, keepdims=True)

    top, bottom, flat = y[:, [6, 7]], y[:, [10, 9]], v.reshape(len(v), -1)
    upper, lower = height(top), -height(bottom)
    y, down = y.copy(), share[:, None] * (upper + lower)
    y[:, [6, 7]] += 0.88j * down * line(top)[1]  # the upper lid goes .88 of the way
    y[:, [10, 9]] -= 0.12j * down * line(bottom)[1]
    upper, lower = (h + 0.02 * rng.normal(size=h.shape) for h in (upper, lower))  # landmarks err
    (base, arch), at = line(flat), flat.imag
    up, low = base - upper * arch, base + lower * arch
    gap = share[:, None] * (low - up).clip(0)
    new_up, new_low = up + 0.88 * gap, low - 0.12 * gap
    above, below = up - 0.6 * (corner.imag - y[:, :5].imag.mean(1, keepdims=True)).clip(0.1), low + 0.15
    taken = np.where((at > above) & (at < new_up), above + (at - above) * (up - above) / (new_up - above), at)
    taken = np.where((at < below) & (at > new_low), below - (below - at) * (below - low) / (below - new_low), taken)
    return (flat.real + 1j * taken).reshape(v.shape), y


def seal_lips(images: torch.Tensor, points: np.ndarray) -> np.ndarray:
    """Points (n, K) in units of upright grey images (n, 1, S, S), as dlib reads them -> the same, but lips that are
    nearly shut meet where they do in the image: on the line near dlib's that is dark, and brighter below"""
    upper, lower, at, S = [60, 61, 62, 63, 64], [60, 67, 66, 65, 64], np.linspace(-1, 1, 5), images.shape[-1]
    gap = (points[:, lower] - points[:, upper]).imag[:, 1:4].mean(1)
    i = np.flatnonzero(gap < 2 * SHUT)
    if not len(i):
        return points
    grey, fine = images[torch.from_numpy(i)].float(), np.linspace(-0.8, 0.8, 13)  # -1, 1: corners
    grey = grey / (grey.std((2, 3), keepdim=True) + 1)
    line = (points[i][:, upper] + points[i][:, lower]) / 2 @ np.stack([np.interp(fine, at, one) for one in np.eye(5)])
    rise, bend = (v.ravel() for v in np.meshgrid(np.linspace(-1, 1, 21) * SEARCH, np.linspace(-0.5, 0.5, 5) * SEARCH))
    curves = line[:, None] + 1j * (rise[:, None] + bend[:, None] * (1 - fine**2))  # (n, 105, 13)

    def light(curves):
        return sample(grey, S * curves)[:, 0].mean(-1).numpy()

    far = 0.2 * (rise**2 + 4 * bend**2) / SEARCH**2
    best = (1.5 * light(curves) - 0.5 * light(curves + 0.012j) + far).argmin(1)
    found = curves[np.arange(len(i)), best][:, None]
    clear = light(found + SEARCH * np.array([[-1j], [1j]])).min(1) - light(found)[:, 0] > 0.2
    i, best = i[clear], best[clear]
    across = np.r_[np.linspace(-1, 1, 7), np.linspace(1, -1, 7)[1:-1], at, at[3:0:-1]]  # of the 20 points
    share = np.r_[np.full(12, 0.5), np.ones(8)]  # outer lips follow by half
    points = points.copy()
    points[i, 48:] += 1j * share * (rise[best, None] + bend[best, None] * (1 - across**2))
    closed = SHUT / gap[i, None].clip(SHUT) - 0.5  # up to SHUT they meet, from 2 SHUT they stay as they are
    up, low = points[i][:, upper], points[i][:, lower]
    points[np.ix_(i, upper)], points[np.ix_(i, lower)] = up + closed * (low - up), low + closed * (up - low)
    return points


# -------------------------------------------------------------------------------------------------------- training

def train(network: nn.Module, draw, weight, steps: int, peak: float, name: str):
    """Trains on batches of draw(): crops, points in them. Loss: mean distance, not squared, since landmarks err"""
    network.to(memory_format=torch.channels_last)  # a third faster on a CPU
    weight = torch.tensor(weight / np.mean(weight), dtype=torch.float32)
    opt = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, peak, total_steps=steps)
    for _ in tqdm(range(steps), desc=name, disable=None):
        x, y = draw()
        error = network(degrade(x).contiguous(memory_format=torch.channels_last)) - torch.from_numpy(to_real(y))
        loss = ((error.square().sum(-1) + 1e-6).sqrt() * weight).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
    network.to(memory_format=torch.contiguous_format)


def face_crops(net: LandmarkNet, images: torch.Tensor, points: np.ndarray, rng):
    """Sets the shapes of a network from grey frames, uint8 (n, 1, S, S), and their points (n, K) in units of the frame ->
    draw() for `train`. Crops are as far off as a detector's box (every second), or as the pass before."""
    S, wide, mean = images.shape[-1], np.arange(CROPS_PER_BATCH) % 2 == 0, mean_shape(points)
    right_a, right_b = similarity(mean, points)

    def choose():
        """Places of a batch, its crops in units of the frame, points in units of the crops"""
        i = rng.integers(len(points), size=CROPS_PER_BATCH)
        a, b = random_crops(CROPS_PER_BATCH, *np.where(wide, [[0.10], [0.25], [0.06]], [[0.04], [0.05], [0.02]]), rng)
        a, b = right_a[i] * a, right_a[i] * b + right_b[i]
        return i, a, b, (points[i] - b[:, None]) / a[:, None]

    def draw():
        i, a, b, y = choose()
        x, half = sample_crops(images[i].float(), S * a, S * b, FACE_SIZE), CROPS_PER_BATCH // 2
        return torch.cat([x[:half], x[half:].flip(-1)]), np.concatenate([y[:half], mirror(y[half:])])

    batches = [y for _ in range(4000 // CROPS_PER_BATCH) for y in (choose()[3], mirror(choose()[3]))]
    shapes = np.concatenate(batches) - mean
    _, s, v = torch.linalg.svd(torch.from_numpy(to_real(shapes)).flatten(1), full_matrices=False)
    net.mean.copy_(torch.from_numpy(to_real(mean)))
    net.basis.copy_((v * s[:, None] / len(shapes) ** 0.5)[: len(net.basis)])  # weights of deviation 1
    return draw


def eye_or_mouth_crops(net: LandmarkNet, network: PartNet, part: Part, images: torch.Tensor, points: np.ndarray, rng):
    """As face_crops, for a part's network. Of eyes only open ones, two thirds of a batch shut more or less"""
    if part is EYE:
        is_open = (measure_eyes(to_real(points))[0] > 0.2).all(1)
        images, points = images[torch.from_numpy(is_open)], points[is_open]
    a, b = part_crops(part, net.crop_of(points)[0], points)
    shapes, S = (points[:, part.points] - b[..., None]) / a[:, None, None], images.shape[-1]  # (n, 2, k)
    shapes[:, 1] = 1 - shapes[:, 1].conj()
    network.mean.copy_(torch.from_numpy(to_real(shapes.mean((0, 1)))))

    def draw():
        i, side = rng.integers(len(points), size=CROPS_PER_BATCH), rng.integers(2, size=CROPS_PER_BATCH)
        turn, shift = random_crops(CROPS_PER_BATCH, 0.08, 0.08, 0.03, rng)
        v, y = turn[:, None, None] * unit_square(part.size) + shift[:, None, None], shapes[i, side]
        if part is EYE:
            share = (1.5 * rng.random(CROPS_PER_BATCH)).clip(0, 1) * (rng.random(CROPS_PER_BATCH) > 0.33)
            v, y = shut_eyes(v, y, share, rng)
        v = np.where(side[:, None, None] == 1, 1 - v.conj(), v)
        x = sample(images[i].float(), S * (a[i, None, None] * v + b[i, side][:, None, None]))
        return x, (y - shift[:, None]) / turn[:, None]

    return draw


# --------------------------------------------------- landmarks of a pack by another detector: keypoints.py extract

CLIPS_PER_JOB = 10  # clips for which a process opens its detector once (ours)


def detect_clips(clips, pack: Pack, spec: str, wanted) -> list[dict]:
    """For each clip dict(points (T, 68, 2), interpolated: how many frames), or NaN and the reason for leaving it out"""
    found = []
    with landmark_detector(spec, pack.template) as detect:
        for c in clips:
            try:
                if c not in wanted:
                    raise InputError("not in --list")
                points, missing = interpolate_gaps([detect(pack.frame(c, k)) for k in range(pack.n_frames[c])])
                found.append(dict(points=smooth(points), interpolated=missing))
            except InputError as error:  # or too few frames with a face
                found.append(dict(points=np.full((pack.n_frames[c], K, 2), np.nan), reason=str(error)))
    return found


def extract(args):
    """Landmarks of the clips of a pack, written beside it. A killed run continues after its last finished clip."""
    pack = Pack(args.pack)
    folder, wanted = pack.folder / "landmarks", set(read_clip_list(pack, args.list) if args.list else range(len(pack)))
    with wrap_os_errors(folder, "written"):
        folder.mkdir(exist_ok=True)
        lines = open_landmarks(folder, landmarks_header(pack, args.landmarks.partition(":")[0]), args.overwrite)
        (folder / "clips.jsonl").write_bytes(b"".join(lines))  # without a torn last line
        done = len(lines) - 1
        os.truncate(folder / "points.bin", int(pack.frame_start[done]) * K * 2 * 4)
        chunks = [range(first, min(first + CLIPS_PER_JOB, len(pack))) for first in range(done, len(pack), CLIPS_PER_JOB)]
        job = partial(detect_clips, pack=pack, spec=args.landmarks, wanted=wanted)
        results = tqdm(parallel_map(job, chunks, args.workers), f"{CLIPS_PER_JOB} clips", len(chunks), disable=None)
        with open(folder / "clips.jsonl", "ab", 0) as log, open(folder / "points.bin", "ab", 0) as out:
            for found, clips in zip(results, chunks):
                for c, line in zip(clips, found):
                    out.write(line.pop("points").astype("<f4").tobytes())
                    log.write(json.dumps(dict(source=pack.source(c)) | line).encode() + b"\n")
    print(f"{folder}: {len(Landmarks(pack).usable_clips)} of {len(pack)} clips have landmarks ({args.landmarks})")


# ------------------------------------------------------------------------------------------------------ the script

def main(argv=None):
    p = Parser(description="Weights of the landmark network, from packs of prepare.py with dlib's landmarks beside them.")
    p.add_argument("packs", type=Path, nargs="+", help="packs of one --size, 128 or more; see keypoints.py extract")
    p.add_argument("--out", type=Path, default=Path("landmarks.pt"), help="weights to write (default landmarks.pt)")
    p.add_argument("--steps", type=int, default=1200, help="of each network, 64 crops each (default 1200)")
    p.add_argument("--seed", type=int, default=0, help="of the draws and the start (default 0)")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    args = p.parse_args(argv)
    out, rng = check_output(args.out, args.overwrite, (".pt",)), np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    images, points = read_packs(args.packs, rng)
    net = LandmarkNet()
    net.solid.copy_(load_landmarks().solid)
    points = seal_lips(images, points)
    weight = np.repeat([1.0, 3, 4, 8], [36, 12, 12, 8])  # most where points move later: eyes, lips, the line between them
    train(net, face_crops(net, images, points, rng), weight, args.steps, 3e-3, "landmarks")
    for name, network, part in (("eyes", net.eye, EYE), ("mouth", net.mouth, MOUTH)):
        train(network, eye_or_mouth_crops(net, network, part, images, points, rng), part.weight, args.steps, 5e-3, name)
    save_checkpoint(out, dict(kind="landmarks", format=1, config=net.config, net=fp16_state_dict(net)))
    print(f"{out}: trained on {len(points)} frames")


if __name__ == "__main__":
    run(main)
