"""A photo that talks, blinks and turns its head: its own pixels are moved, at its own resolution.

    68 landmarks                      ->  the lips in the plane of the face                               (Lips)
    lip numbers predicted from sound  ->  displacements of landmarks -> smooth fields on a grid of nodes  (Lips)
    one field for each lip            ->  two layers of the photo, cut between the lips                   (lip_layers)
    the gap between the layers        ->  the photo's own teeth, or painted teeth, tongue and cavity      (lip_layers)
    skin that slides over the eye     ->  a blink                                                         (Eyelids)
    a mean 3-D shape, turned          ->  one more field, applied last                                    (Head)

Fields are chained as coordinates: each pixel of a frame is read from the photo once. Pixels that do not move stay
bit for bit. Ours: in the paper a generator paints every frame.

    face = Face(photo, landmarks, mean_shape)        # once a photo
    warp = Warp(face, moves)
    frame = warp(opening=0.08, shape=numbers, blink=0.3, pose=Pose(yaw=5))

Units: the outer corners of the eyes are 1 apart, seen from the front. x points right, y down, z away from the
viewer. Angles are degrees: yaw > 0 turns to the picture's right, pitch > 0 lifts the chin, roll > 0 is clockwise.
Axes: h w pixels of a box, gh gw nodes of a grid, K lip numbers: the opening and K - 1 numbers of the lips' shape.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import cv2
import numpy as np
from scipy.interpolate import PchipInterpolator, RBFInterpolator
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

cv2.setNumThreads(1)  # several frames are computed in parallel

# iBUG's 68 points. Inner lips from the left corner to the right one; outer lips without the corners
UPPER_INNER, LOWER_INNER = np.array([60, 61, 62, 63, 64]), np.array([60, 67, 66, 65, 64])
UPPER_OUTER, LOWER_OUTER = np.arange(49, 54), np.arange(59, 54, -1)
JAW, CORNERS = np.arange(2, 15), np.array([48, 54, 60, 64])
FIXED = np.r_[17, 21, 22, 26:48]  # ends of the brows, nose and eyes do not follow the mouth
RIGID = np.r_[0:3, 14:17, 17:48]  # for the pose: without chin and lips, which move in speech
UPPER_FACE = np.r_[27:48]  # nose and eyes: their pitch follows a nod further than RIGID's, with more noise

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma

# all constants below are ours, chosen by looking at frames, unless a source is given
LIP_NODE, HEAD_NODE = 0.045, 0.06  # distances between neighbouring nodes
INVERSION_STEPS = 4  # of the fixed point x = p - displacement(x); errors stay below two pixels up to 15 degrees of yaw
LIP_OVAL = 1.10, 1.38  # multiples of the jaw's distance from the nose between which the lips' field fades
BELOW_EYES = 0.06, 0.22  # distances below the lower lids between which the lips' field fades in
MOUTH_REACH = 1.12  # half widths of the mouth: farther out both layers are one
# width of an edge between two layers: at least FEATHER, else BLUR times the photo's edge_width, which makes both equally
# soft (an edge of deviation s has an edge_width of 1.4 s; a smoothstep of that deviation is 4.5 s long)
FEATHER, BLUR = 0.012, 3.2
MAX_SHAPE_ERROR = 0.12  # 45 people and paintings had .03 to .06
VISIBLE_OPENING = 0.024  # opening from which a photo shows the inside of its mouth
OUTER_LIP_SHARE = 0.8  # of a closing inner lip: lips that a smile stretches thin get thicker as they close
RELAX = 0.5  # share of a smile's extra width and raised corners that is removed while the mouth is shut
MAX_OPENING = 0.22  # beyond the photo's own: what the box of the lips has room for. In wider mouths the field folds
# filter between pixels: moved photos keep .8 to 1.1 of their Laplacian's variance (film grain .8); cubic: .5 to .9
BETWEEN_PIXELS = np.float32([[0.05, -0.25, 0.7, 0.7, -0.25, 0.05]])
MAX_SIDE = 1280  # pixels of the video: the window of a player, and 25 frames/s on a CPU
MIN_UNIT = 135  # pixels between the eyes' corners: smaller faces are enlarged first, or edges get steps


def smoothstep(x):
    """0 below 0, 1 above 1, smooth in between. x: NumPy or torch"""
    x = x.clip(0, 1)
    return x * x * (3 - 2 * x)


def soft_limit(x, limit):
    """x, nearly unchanged up to .7 of the limit, and never beyond it. x: NumPy or torch"""
    return x / (1 + (x / limit) ** 4) ** 0.25


# ----------------------------------------------------------------------------------------------- the head in the photo

@dataclass
class Pose:
    """The head's pose relative to the photo. shift: right, down, in units; scale > 1: nearer"""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    shift: tuple = (0.0, 0.0)
    scale: float = 1.0


def rotation(yaw, pitch, roll) -> np.ndarray:
    """Degrees, numbers or (T,) -> (3, 3) or (T, 3, 3): first pitch, then yaw, then roll"""
    return Rotation.from_euler("xyz", np.stack((-pitch, -yaw, roll), -1), degrees=True).as_matrix()


def angles(R: np.ndarray) -> np.ndarray:
    """(.., 3, 3) -> (.., 3) yaw, pitch, roll in degrees: the inverse of `rotation`"""
    return Rotation.from_matrix(R).as_euler("xyz", degrees=True)[..., [1, 0, 2]] * (-1, -1, 1)


def turned_place(poses: np.ndarray, R: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Poses (T, 6), see motion.Motion -> (T, 2) right and down, in units: how far Head moves the middle of nose and eyes
    of a face in pose R, (3, 3) or (T, 3, 3), when it turns about the neck's joint, without the shifts in `poses`"""
    arm = R @ (mean[UPPER_FACE].mean(0) * (1, 1, Head.DEPTH) - Head.PIVOT)
    turned = (rotation(*poses[:, :3].T) @ arm[..., None])[..., 0]
    return (1 + poses[:, 5:]) * turned[:, :2] - arm[..., :2]


def fit_pose(points: np.ndarray, mean: np.ndarray, used=RIGID) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares fit points (.., 68, 2) ~ scale (mean R^T)[:, :2] + shift over landmarks `used` (weak perspective).
    mean: (>= 68, 3) in units -> scale (..) in pixels a unit, R (.., 3, 3), shift (.., 2): the place of mean's origin"""
    middle, centre = mean[used].mean(0), points[..., used, :].mean(-2)
    x, p = mean[used] - middle, points[..., used, :] - centre[..., None, :]
    U, _, V = np.linalg.svd(np.swapaxes(np.linalg.pinv(x) @ p, -1, -2), full_matrices=False)
    rows = U @ V  # (.., 2, 3): the orthonormal rows nearest to the fitted ones
    flat = x @ np.swapaxes(rows, -1, -2)
    scale = (flat * p).sum((-2, -1)) / (flat**2).sum((-2, -1))
    R = np.concatenate([rows, np.cross(rows[..., :1, :], rows[..., 1:, :])], -2)
    return scale, R, centre - scale[..., None] * (rows @ middle)


def shape_error(points: np.ndarray, mean: np.ndarray, scale: float, R: np.ndarray, shift: np.ndarray) -> float:
    """Mean distance, in units, of the rigid landmarks from the mean shape in the pose fitted to them"""
    error = (points - shift) / scale - (mean[:68] @ R.T)[:, :2]
    return float(np.hypot(*error[RIGID].T).mean())


def enlarge_small_face(photo: np.ndarray, points: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Enlarges a photo and its landmarks until a unit has MIN_UNIT pixels, or the photo MAX_SIDE. Larger ones stay."""
    unit = max(float(fit_pose(points, mean)[0]), 4)  # damaged landmarks have 0
    k = min(MIN_UNIT / unit, MAX_SIDE / max(photo.shape))
    if k <= 1:
        return photo, points
    H, W = photo.shape[:2]
    h, w = 2 * round(k * H / 2), 2 * round(k * W / 2)
    return cv2.resize(photo, (w, h), interpolation=cv2.INTER_CUBIC), points * (w / W, h / H)


class Face:
    """A photo with its landmarks and the pose of its head.

    photo: uint8 (H, W, 3); points: (68, 2) in pixels; mean: (77, 3) in units, 68 landmarks and 9 points of the hairline;
    sharpness: 1 over the factor of enlarge_small_face. Raises ValueError: not landmarks of an upright face"""

    def __init__(self, photo: np.ndarray, points: np.ndarray, mean: np.ndarray, sharpness: float = 1.0):
        points = np.asarray(points, np.float64)
        if points.shape != (68, 2) or not np.isfinite(points).all():
            raise ValueError("landmarks are not 68 finite points")
        self.photo, self.points, self.mean, self.sharpness = photo, points, mean, sharpness
        scale, self.R, self.shift = fit_pose(points, mean)
        self.scale = float(scale)  # a NumPy number would turn float32 arrays into float64
        H, W = photo.shape[:2]
        yaw, pitch, roll = angles(self.R)
        if self.scale < 4 or not ((points > (-W, -H)) & (points < (2 * W, 2 * H))).all():
            raise ValueError("landmarks lie outside the photo")
        if not (abs(roll) < 60 and points[8, 1] > points[27, 1] and points[45, 0] > points[36, 0]):
            raise ValueError("the face is not upright")
        if abs(yaw) > 50 or abs(pitch) > 45:
            raise ValueError(f"the head is turned too far (yaw {yaw:.0f}, pitch {pitch:.0f} degrees)")
        self.plane = self.scale * self.R[:2, :2]  # of the face in the picture: foreshortened, in pixels a unit
        if shape_error(points, mean, self.scale, self.R, self.shift) > MAX_SHAPE_ERROR:
            raise ValueError("landmarks are not those of a face")
        self.doubled = cv2.cvtColor(double_resolution(photo), cv2.COLOR_RGB2RGBA)  # four channels are read faster

    def read(self, where):
        """where (h, w, 2) in pixels, centres at .5 -> uint8 (h, w, 3); mirrored beyond the photo's edges"""
        at = np.multiply(where, 2, dtype=np.float32) - np.float32(1)
        colours = cv2.remap(self.doubled, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        return cv2.cvtColor(colours, cv2.COLOR_RGBA2RGB)


# -------------------------------------------------------------------------------------------------------------- fields

@dataclass
class FacePlane:
    """Position of a face in a picture: pixels = plane @ local + middle. Local coordinates are in units, in the face's
    plane as seen from the front, about the middle between the inner corners of the lips."""

    plane: np.ndarray  # (2, 2)
    middle: np.ndarray  # (2,)

    @property
    def scale(self) -> float:
        """Pixels a unit"""
        return float(np.sqrt(abs(np.linalg.det(self.plane))))

    def local(self, pixels):
        return (pixels - self.middle) @ np.linalg.inv(self.plane).T

    def pixels(self, local):
        return local @ self.plane.T + self.middle


def read_photo(photo: np.ndarray, where: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) at where (h, w, 2) in pixels, centres at .5 -> uint8 (h, w, 3), bicubic; mirrored beyond edges"""
    at = np.subtract(where, 0.5, dtype=np.float32)
    return cv2.remap(photo, at, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)


def double_resolution(photo: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (2 H - 1, 2 W - 1, 3). Bilinear reading of this takes a sixth of the time of bicubic reading.
    BETWEEN_PIXELS sharpens as much as bilinear reading softens; otherwise grain would flicker."""
    H, W, _ = photo.shape
    doubled = np.empty((2 * H - 1, 2 * W - 1, 3), np.uint8)
    doubled[::2, ::2] = photo
    doubled[::2, 1::2] = cv2.filter2D(photo, -1, BETWEEN_PIXELS, anchor=(2, 0))[:, :-1]
    doubled[1::2] = cv2.filter2D(doubled[::2], -1, BETWEEN_PIXELS.T, anchor=(0, 2))[:-1]
    return doubled


def read_grid(values: np.ndarray, where: np.ndarray, box) -> np.ndarray:
    """float32 (rows, columns, C > 1) that cover a box evenly, at where (h, w, 2) in pixels -> (h, w, C), bilinear"""
    (rows, columns, _), (x0, y0, x1, y1) = values.shape, box
    x = (np.asarray(where[..., 0], np.float32) - x0) * np.float32(columns / (x1 - x0)) - np.float32(0.5)
    y = (np.asarray(where[..., 1], np.float32) - y0) * np.float32(rows / (y1 - y0)) - np.float32(0.5)
    return cv2.merge([cv2.remap(channel, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
                      for channel in cv2.split(values)])  # one by one: faster, and exact


class Nodes:
    """A grid of nodes over a box of whole pixels of the photo: the centres of cells about `spacing` pixels large. Smooth
    displacements are stored there. positions: (gh, gw, 2) in pixels; flat: the same, (gh * gw, 2)"""

    def __init__(self, box, spacing: float):
        x0, y0, x1, y1 = self.box = box
        columns, rows = (max(4, round(side / spacing)) for side in (x1 - x0, y1 - y0))
        cells = pixel_centres((0, 0, columns, rows)) * ((x1 - x0) / columns, (y1 - y0) / rows)
        self.positions = np.float32(cells + (x0, y0))
        self.flat = self.positions.reshape(-1, 2).astype(np.float64)

    def to_grid(self, values: np.ndarray) -> np.ndarray:
        """(gh * gw, .., C) -> float32 (.., gh, gw, C)"""
        values = values.reshape(*self.positions.shape[:2], *values.shape[1:])
        return np.ascontiguousarray(np.moveaxis(values, (0, 1), (-3, -2)), np.float32)

    def invert(self, forward: np.ndarray) -> np.ndarray:
        """Displacements (gh, gw, 2) of pixels that start at the nodes -> back: a pixel at p came from p - back(p)"""
        back = forward
        for _ in range(INVERSION_STEPS):
            back = read_grid(forward, self.positions - back, self.box)
        return back

    def sources(self, back: np.ndarray) -> np.ndarray:
        """back (gh, gw, 2), see `invert` -> (h, w, 2): where each pixel of the box started"""
        pixels = pixel_centres(self.box)
        shifts = cv2.resize(back, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        return np.subtract(pixels, shifts, out=shifts)


def thin_plate(points: np.ndarray, values: np.ndarray, at: np.ndarray, stiffness: float = 1e-4) -> np.ndarray:
    """Thin-plate spline (Duchon 1977) through values (n, ..) at points (n, 2), read at (m, 2) -> (m, ..)"""
    return RBFInterpolator(points, values, smoothing=stiffness)(at)


def bounding_box(photo, points) -> tuple[int, int, int, int]:
    """The box of whole pixels around points (n, 2), inside the photo, each side at least 4 pixels long"""
    sides = photo.shape[1::-1]
    x0, y0 = (int(min(max(v, 0), side - 4)) for v, side in zip(points.min(0), sides))
    x1, y1 = (int(min(max(np.ceil(v), low + 4), side)) for v, low, side in zip(points.max(0), (x0, y0), sides))
    return x0, y0, x1, y1


@lru_cache(16)
def pixel_centres(box) -> np.ndarray:
    """x0, y0, x1, y1 -> float32 (h, w, 2), read-only"""
    x0, y0, x1, y1 = box
    pixels = np.stack(np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5), -1).astype(np.float32)
    pixels.setflags(write=False)
    return pixels


def covering_slices(box, where: np.ndarray, stride: int = 4) -> tuple[slice, slice] | None:
    """Smooth coordinates `where` (h, w, 2) -> slices of rows and columns that cover all in a box. None: none is in it"""
    hits = cv2.inRange(where[::stride, ::stride], np.subtract(box[:2], stride), np.add(box[2:], stride))
    x, y, w, h = cv2.boundingRect(hits)
    rows, columns = (slice(max(0, stride * (k - 1)), stride * (k + n) + 1) for k, n in ((y, h), (x, w)))
    return (rows, columns) if w else None


def curve_height(points: np.ndarray, x: np.ndarray) -> np.ndarray:
    """y at x of a curve through points (n, 2), left to right, level beyond its ends; it does not overshoot"""
    knots = np.maximum.accumulate(points[:, 0]) + 1e-4 * np.arange(len(points))
    return PchipInterpolator(knots, points[:, 1])(np.clip(x, knots[0], knots[-1]))


def stack_channels(*maps) -> np.ndarray:
    """Arrays (h, w) or (h, w, C) -> float32 (h, w, all channels)"""
    return np.dstack(maps).astype(np.float32)


def to_bytes(colours: np.ndarray) -> np.ndarray:
    """float (h, w, 3) in [0, 255] -> uint8, rounded"""
    return (colours + 0.5).clip(0, 255).astype(np.uint8)


# -------------------------------- lips: displacements of landmarks -> smooth fields -> two layers -> the gap between them

def inner_lips(q: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks q (68, 2), positions (h, w, 2), local -> distance below the upper and above the lower inner lip (h, w)"""
    upper, lower = (curve_height(q[line], at[..., 0]) for line in (UPPER_INNER, LOWER_INNER))
    return at[..., 1] - upper, np.maximum(upper, lower) - at[..., 1]


def lip_surfaces(q: np.ndarray, moves: np.ndarray, fixed: np.ndarray, at: np.ndarray) -> list[np.ndarray]:
    """Displacements (68, n, 2) of landmarks q (68, 2), zero at points `fixed` (m, 2), all local -> two smooth fields
    (k, n, 2) at positions (k, 2): for the upper and for the lower lip. Beside the mouth they are equal."""
    fields = []
    for inner, outer in ((UPPER_INNER, UPPER_OUTER), (LOWER_INNER, LOWER_OUTER)):
        used = np.r_[JAW, CORNERS, outer, inner[1:4]]
        values = np.concatenate([moves[used], np.zeros((len(fixed), *moves.shape[1:]))])
        fields.append(thin_plate(np.r_[q[used], fixed], values, at))
    half_width, centre = (q[64, 0] - q[60, 0]) / 2, (q[64, 0] + q[60, 0]) / 2
    beside = smoothstep((np.abs(at[:, 0] - centre) / half_width - MOUTH_REACH + 0.12) / 0.12)[:, None, None]
    fields[1] += beside * (fields[0] - fields[1])
    return fields


class Lips(FacePlane):
    """The lips of a photo and their motion, which fades out towards the eyes and the outline of the face.

    q: landmarks (68, 2), local; half_width, centre (x): of the inner lips; gaps: (5,) between them, 0 at the corners;
    rest_opening: mean gap in the photo; jaw: (17, 2), its outline about the nose's tip. moves: (K, 68, 2), displacements
    of landmarks in the face's plane, for a unit of opening and of each shape number (motion.fit_moves)"""

    def __init__(self, face: Face, moves: np.ndarray):
        super().__init__(face.plane, face.points[CORNERS[2:]].mean(0))
        self.face, self.q = face, self.local(face.points)
        q = self.q
        self.half_width, self.centre = (q[64, 0] - q[60, 0]) / 2, (q[64, 0] + q[60, 0]) / 2
        self.gaps = q[LOWER_INNER, 1] - q[UPPER_INNER, 1]
        self.rest_opening = max(0.0, self.gaps[1:4].mean())
        self.jaw = q[:17] - q[30]

        # fields (2, 1 + K, gh, gw, 2) in pixels, of the upper and lower lip; eyes, nose and a ring around the jaw stay
        ring = q[30] + LIP_OVAL[1] * self.jaw
        lids = q[[40, 41, 46, 47], 1].min()
        self.box = self.box_around((ring[:, 0].min(), ring[:, 0].max()), (lids, ring[:, 1].max()))
        self.nodes = Nodes(self.box, LIP_NODE * face.scale)
        at = self.local(self.nodes.flat)                               # (n, 2)
        moves = np.stack([moves[0], self.closing(moves[0]), *moves[1:]], 1)  # (68, 1 + K, 2): opening, closing, shape
        fields = np.stack(lip_surfaces(q, moves, np.r_[q[FIXED], ring], at), 1)
        self.fields = self.nodes.to_grid(fields * self.fade(at)[:, None, None, None] @ face.plane.T)

        # skin inside the box of the lips: between these heights the upper field blends into the lower one
        top = q[UPPER_OUTER, 1].min() - 0.10
        bottom = max(q[LOWER_OUTER, 1].max(), q[66, 1] + self.rest_opening + MAX_OPENING) + 0.12
        self.blend = self.nodes.to_grid(smoothstep((at[:, 1:] - top) / (bottom - top)))  # (gh, gw, 1)
        reach = MOUTH_REACH * self.half_width
        self.lips_box = self.box_around((self.centre - reach, self.centre + reach), (top, bottom))
        self.masks, self.teeth, self.red = lip_layers(self, self.lips_box)

    def box_around(self, x, y):
        """The box of whole pixels around the local rectangle x (left, right), y (top, bottom)"""
        return bounding_box(self.face.photo, self.pixels(np.array([(a, b) for a in x for b in y])))

    def closing(self, opening: np.ndarray) -> np.ndarray:
        """Displacements (68, 2) of landmarks for each unit that an open mouth closes, with the sign of `opening` (68, 2).
        Each of the three gaps closes by its own size: the lips meet along their whole length. A smile gets narrower, as
        far as it is wider than the mean face's mouth, and its corners drop."""
        if not self.rest_opening:
            return opening
        q, mean, closing = self.q, self.face.mean, opening.copy()
        for inner, outer in ((UPPER_INNER, UPPER_OUTER), (LOWER_INNER, LOWER_OUTER)):
            share = opening[inner[2], 1] / (opening[66, 1] - opening[62, 1]) / self.rest_opening
            closing[inner[1:4], 1] = share * self.gaps[1:4]
            closing[outer, 1] = OUTER_LIP_SHARE * share * self.gaps[[1, 1, 2, 3, 3]]
        widened = max(0.0, self.half_width - (mean[64, 0] - mean[60, 0]) / 2) / self.half_width
        raised = max(0.0, q[[61, 63], 1].mean() - q[[60, 64], 1].mean() - (mean[[61, 63], 1].mean() - mean[60, 1]))
        lips = np.r_[48:68]
        from_centre = q[lips, 0] - self.centre
        closing[lips, 0] += RELAX * widened * from_centre / self.rest_opening
        closing[lips, 1] -= RELAX * raised * (from_centre / self.half_width) ** 2 / self.rest_opening
        return closing

    def fade(self, at: np.ndarray) -> np.ndarray:
        """at (n, 2) -> (n,): 1 on jaw and lips, 0 outside the jaw's oval and at the eyes"""
        polar, q = at - self.q[30], self.q
        outline = np.arctan2(self.jaw[:, 1], self.jaw[:, 0]), np.hypot(*self.jaw.T)  # angle, radius
        radius = np.hypot(*polar.T) / np.interp(np.arctan2(polar[:, 1], polar[:, 0]), *outline, period=2 * np.pi)
        lids = np.interp(at[:, 0], *zip(*sorted([(q[k, 0], q[k, 1]) for k in (36, 41, 40, 47, 46, 45)])))
        inside = 1 - smoothstep((radius - LIP_OVAL[0]) / (LIP_OVAL[1] - LIP_OVAL[0]))
        return inside * smoothstep((at[:, 1] - lids - BELOW_EYES[0]) / (BELOW_EYES[1] - BELOW_EYES[0]))

    def displace(self, opening: float | None, shape):
        """opening in units, shape (K - 1,), None: as in the photo -> backward displacements on the nodes: (gh, gw, 4) of
        both layers, and (gh, gw, 2) outside the lips' box; light on the teeth. None: nothing moves"""
        opening = self.rest_opening if opening is None else max(0.0, float(opening))
        shape = np.zeros(self.fields.shape[1] - 2) if shape is None else shape
        change = min(opening - self.rest_opening, MAX_OPENING)
        amount = np.float32([max(change, 0.0), min(change, 0.0), *shape])
        if np.abs(amount).max() < 1e-6:
            return None
        upper, lower = map(self.nodes.invert, np.tensordot(amount, self.fields, (0, 1)))  # (gh, gw, 2) each
        light = 0.25 + 0.75 * float(smoothstep(np.float64(opening / 0.10)))  # a narrow gap is darker
        return stack_channels(upper, lower), upper + self.blend * (lower - upper), light

    def render(self, where, moved):
        """where (h, w, 2) inside the lips' box, moved: of `displace` -> uint8 (h, w, 3): both layers and the gap"""
        back, _, light = moved
        shifts = read_grid(back, where, self.box)                      # (h, w, 4)
        upper, lower = where - shifts[..., :2], where - shifts[..., 2:]
        above, below = (np.float32(cv2.split(self.face.read(at))) for at in (upper, lower))  # (3, h, w): faster
        cover, visible = cv2.split(read_grid(self.masks[0], upper, self.lips_box))
        ground, shade = cv2.split(read_grid(self.masks[1], lower, self.lips_box))
        teeth = above
        if self.teeth is not None:
            teeth, visible = np.array(cv2.split(read_grid(self.teeth, upper, self.lips_box))), visible * light
        inside = shade * self.red
        inside += visible * (teeth - inside)
        out = below + cover * (above - below) + np.maximum(1 - cover - ground, 0) * (inside - below)
        return to_bytes(cv2.merge(list(out)))


def edge_width(grey: np.ndarray) -> float:
    """Width in pixels of the edges in a picture (H, W): RMS of gradients over RMS of the Laplacian"""
    slopes = np.gradient(grey)
    laplacian = sum(np.gradient(g, axis=k) for k, g in enumerate(slopes))
    return float(np.sqrt(sum((g**2).mean() for g in slopes) / max((laplacian**2).mean(), 1e-6)))


def lip_layers(mouth: Lips, box):
    """Both layers over a box of h x w pixels -> masks (h, w, 2) of the upper lip (opacity, visibility of the teeth) and
    of the lower lip (opacity, brightness of the cavity); painted teeth (h, w, 3) or None; cavity's colour (3, 1, 1)"""
    face, q, half_width, (x0, y0, x1, y1) = mouth.face, mouth.q, mouth.half_width, box
    region = face.photo[y0:y1, x0:x1].astype(np.float64)               # (h, w, 3)
    v = mouth.local(pixel_centres(box))                                # (h, w, 2)
    x, y = (v[..., 0] - mouth.centre) / half_width, v[..., 1]          # x: -1 .. 1 between the corners
    d, e = inner_lips(q, v)                                            # below the upper lip's edge, above the lower one's
    edge = max(1.5 / face.sharpness, BLUR * edge_width(region @ GREY))  # pixels
    soft = max(FEATHER, edge / face.scale)
    cover = smoothstep(0.5 - d / soft)                                 # 1 on the upper lip and all above it
    ground = 1 - (np.abs(x) < 1.02) * smoothstep(e / soft + 0.5)       # 1 on the lower lip and all below it
    front = 1 - smoothstep((np.abs(x) - 0.25) / 0.6)                   # the corners of the mouth are dark
    near = region[np.abs(x) < 1]                                       # (n, 3)
    lips = region[(np.abs(x) < 0.6) & (((y > q[51, 1]) & (d < 0)) | ((e < 0) & (y < q[57, 1])))]
    light, black = np.percentile(near @ GREY, (90, 1))

    # cavity and tongue: colour (3,) times brightness (h, w)
    red = lips.mean(0) if len(lips) else near.mean(0)
    red = red @ GREY + 1.7 * (red - red @ GREY)                        # the inside is redder; a grey photo stays grey
    red = np.maximum(red, 0) * (0.6 * light / max(red @ GREY, 1))
    dark = max(0.16, 0.6 * black / max(red.max(), 1)) * (0.6 + 0.4 * front)
    tongue = smoothstep((0.42 - e / half_width) / 0.4) * smoothstep((0.8 - np.abs(x)) / 0.5)
    lower = stack_channels(ground, dark + tongue * np.maximum(0.62 * (0.3 + 0.7 * front) - dark, 0))
    red = np.float32(red)[:, None, None]
    if mouth.rest_opening > max(VISIBLE_OPENING, 4 / face.scale):      # the photo's own teeth
        return (stack_channels(cover, smoothstep(2 * e / soft)), lower), None, red

    # painted upper teeth (dubbing: dub.Take.render_inside): colours (h, w, 3), visibility (h, w)
    skin, tall = near.mean(0), 0.15 * half_width * np.sqrt(np.clip(1 - (x / 0.9) ** 2, 0, 1)) + 1e-6
    fine = smoothstep(half_width * face.scale * face.sharpness / 40 - 0.25)  # few pixels: a strip without gaps
    gaps = fine * np.exp(-((np.abs(np.abs(x)[..., None] - (0, 0.30, 0.54, 0.74)).min(-1) / 0.03) ** 2))
    bright = (0.65 + 0.35 * smoothstep(d / (0.5 * tall))) * (0.35 + 0.65 * front) * (1 - 0.14 * gaps)
    teeth = 0.85 * light * bright[..., None] * (1 + 0.4 * (skin / max(skin @ GREY, 1) - 1))
    visible = smoothstep((tall * (1 - 0.2 * gaps) - d) / np.maximum(0.3 * tall, soft) + 0.5)
    return (stack_channels(cover, visible * (np.abs(x) < 0.95)), lower), stack_channels(teeth), red


# ------------------------------------------------------------------------------------------------------------- eyelids

class Eyelids:
    """One eye of a photo. A blink: the skin between lid and brow slides down over it, the lower lid rises a little.

    eye: 6 landmarks, corner to corner over the upper lid and back; brow: 5. Lengths are in widths of this eye."""

    LOWER_SHARE, OVERLAP, LASH = 0.20, 0.07, 0.06  # share of the gap closed by the lower lid; overlap; lashes
    SKIN, LASH_LINE = 0.7, 0.35  # share of the skin below the eye in a shut lid's colour; darkness of its lash line

    def __init__(self, face: Face, eye: np.ndarray, brow: np.ndarray):
        self.width = max(float(np.linalg.norm(eye[3] - eye[0])), 2.0)
        across, middle = (eye[3] - eye[0]) / self.width, (eye[0] + eye[3]) / 2
        axes = np.array([across, [-across[1], across[0]]])
        self.down = np.float32(axes[1] * self.width)                   # one width downwards, in pixels
        q, b = ((p - middle) @ axes.T / self.width for p in (eye, brow))
        stretch = float(np.clip(-b[:, 1].max() - 0.02, 0.2, 0.75))     # height of the skin that stretches
        reach = stretch + 0.4
        self.box = bounding_box(face.photo, middle + reach * self.width * np.array([[-1, -1], [1, 1]]))
        x0, y0, x1, y1 = self.box
        u, v = np.moveaxis((pixel_centres(self.box) - middle) @ axes.T / self.width, -1, 0)
        upper, lower = (curve_height(q[k], u) for k in ([0, 1, 2, 3], [0, 5, 4, 3]))
        near = smoothstep((0.66 - np.abs(u)) / 0.2)                    # beyond the corners: their lashes move as well
        gap = np.maximum(lower - upper, 0) * near
        self.max_gap = max(float(gap.max()), 1e-3)
        self.maps = stack_channels(upper, lower, v, gap, near, np.maximum(upper + stretch, 0.12))
        soft = gaussian_filter(face.photo[y0:y1, x0:x1].astype(float), (0.03 * self.width, 0.12 * self.width, 0))
        below = (np.abs(u) < 0.3) & (v > lower + 0.12) & (v < lower + 0.3)
        lid = soft[below].mean(0) if below.any() else soft.mean((0, 1))
        self.smooth = stack_channels(soft + self.SKIN * (lid - soft))  # stretched lashes would be streaks

    def render(self, where, blink: float, read):
        """where (h, w, 2) -> uint8 (h, w, 3): the eye shut by `blink`, 0 to 1. read: coordinates -> colours"""
        up, low, v, gap, near, height = cv2.split(read_grid(self.maps, where, self.box))
        # heights by which the lower lid rises and the upper lid falls, in widths of the eye
        rise, fall = blink * self.LOWER_SHARE * gap, blink * ((1 - self.LOWER_SHARE) * gap + self.OVERLAP * near)
        d = up + fall - v                                              # distance above the moved edge of the upper lid
        skin = where - (fall * (1 - smoothstep(d / (height + fall))))[..., None] * self.down
        under = read(where + (rise * (1 - smoothstep((v - low + rise) / 0.4)))[..., None] * self.down)
        stretched = smoothstep((d - self.LASH) / 0.1) * smoothstep(fall / 0.15) * smoothstep(2 - 2 * d / (height + fall))
        smooth, skin = read_grid(self.smooth, skin, self.box), read(skin).astype(np.float32)
        skin += stretched[..., None] * (smooth - skin)
        skin *= (1 - self.LASH_LINE * np.exp(-((d / 0.05) ** 2)) * near * smoothstep(fall / 0.15))[..., None]
        edge = (d + self.LASH * gap / self.max_gap) / max(0.04, 1.2 / self.width) + 0.5
        return to_bytes(under + (smoothstep(edge) * smoothstep(fall / 0.02))[..., None] * (skin - under))


# ------------------------------------------------------------------------------------------------------------ the head

class Head:
    """A displacement field for any pose. Each node gets a depth, from the mean shape under the landmarks. The outline of
    the head lies in the plane of the neck's joint: it hardly moves in a turn, and the background does not tear.
    turn_limits: degrees of yaw and pitch up to which turns look right, from the steepest depth"""

    DEPTH = 1.15  # MediaPipe's depths are too flat by this factor: measured turns over intended ones
    PIVOT = np.array([0, 0.60, 0.50])  # the neck's joint, in the mean's frame
    OUTLINE, AXES = np.array([0, -0.05, 0.50]), np.array([1.02, 1.38])  # the outline's middle, half axes; with the hair
    AIR, NECK = 0.9, 0.75  # shifts fade within AIR outside the outline, turns within NECK below the chin
    STIFFNESS = 0.03  # of the depth: softer plates fold sooner
    MAX_STRETCH = 0.65  # change of width that a turn may cause at any place

    def __init__(self, face: Face):
        scale, R, shift = face.scale, face.R, face.shift
        mean = face.mean * (1, 1, self.DEPTH)
        place = mean @ R.T                                             # (77, 3), units, axes of the picture
        place[:68, :2] = (face.points - shift) / scale                 # the photo's landmarks with the mean's depth
        roll = np.radians(angles(R)[2])
        upright = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
        pivot, middle = R @ self.PIVOT, R[:2] @ self.OUTLINE
        reach = self.AXES + self.AIR
        self.box = bounding_box(face.photo, np.stack([middle - reach, middle + reach + (0, 0.3)]) * scale + shift)
        self.nodes, self.scale = Nodes(self.box, HEAD_NODE * scale), scale
        nodes = (self.nodes.flat - shift) / scale                      # (n, 2)
        v = (nodes - middle) @ upright.T
        out = np.hypot(*(v / self.AXES).T) - 1                         # 0 on the outline

        # depth: that of the landmarks, running smoothly into the joint's plane at the outline
        a = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        ring = np.concatenate([np.c_[np.cos(a), np.sin(a)] * self.AXES * k for k in (1, 1.25)])
        ring = ring[ring[:, 1] < 0.75 * self.AXES[1]] @ upright + middle  # without the neck
        used = np.r_[0:60, 68:len(mean)]
        depths = np.r_[place[used, 2], np.full(len(ring), pivot[2])]
        z = thin_plate(np.r_[place[used, :2], ring], depths, nodes, self.STIFFNESS) - pivot[2]
        z = np.minimum(z, 0) * (1 - smoothstep(out / 0.3))
        grid = self.nodes.positions
        step = grid[1, 1] - grid[0, 0]                                 # pixels from node to node
        dy, dx = np.gradient(z.reshape(grid.shape[:2]) * scale, step[1], step[0])
        steepest = (max(np.abs(slope).max(), 0.1) for slope in (dx, dy))
        self.turn_limits = tuple(float(np.degrees(np.arctan(self.MAX_STRETCH / slope))) for slope in steepest)

        # share of a turn, of a shift and of raised brows that each node follows
        chin = ((place[8, :2] - middle) @ upright.T)[1]
        (x0, y0, x1, y1), (H, W) = self.box, face.photo.shape[:2]
        # left, top, right, bottom: whether the box ends at the edge of the photo; the gap between that and the outline
        is_edge = np.array([x0 == 0, y0 == 0, x1 == W, y1 == H])
        gaps = np.r_[middle, -middle] + np.r_[shift, (W, H) - shift] / scale - np.tile(self.AXES, 2)
        distances = np.c_[nodes - nodes.min(0), nodes.max(0) - nodes]  # (n, 4)
        inside = smoothstep(np.where(is_edge, 1, distances / 0.25)).prod(1)
        # nothing moves across an edge of the photo: mirrored hair or cheeks would appear
        held = smoothstep(np.where(is_edge, distances / gaps.clip(0.25, self.AIR), 1))
        turns = (1 - smoothstep((v[:, 1] - chin) / self.NECK)) * inside
        shifts = turns * (1 - smoothstep(out * self.AXES[0] / self.AIR))
        fixed = np.r_[0:17, 27:48, 68:len(mean)]
        brows = np.r_[np.ones(10), np.zeros(len(fixed) + len(ring))]
        lift = thin_plate(np.r_[place[17:27, :2], place[fixed, :2], ring], brows, nodes) * turns * (out < 0.2)
        fields = np.c_[nodes - pivot[:2], z, turns, shifts, np.outer(lift, -upright[1]), held[:, :2] * held[:, 2:]]
        self.fields = self.nodes.to_grid(fields)                       # (gh, gw, 9)

    def displace(self, pose: Pose, brows: float) -> np.ndarray:
        """Backward displacements (gh, gw, 2) in pixels, see Nodes.invert"""
        xyz, turns, shifts, lift, held = np.split(self.fields, (3, 4, 5, 7), -1)
        full = pose.scale * rotation(pose.yaw, pose.pitch, pose.roll)[:2] - np.eye(3)[:2]
        flat = pose.scale * rotation(0, 0, pose.roll)[:2] - np.eye(3)[:2]  # in the plane of the picture
        flat[:, 2] = 0
        bent, rigid = xyz @ (full - flat).T, xyz @ flat.T + pose.shift
        return self.nodes.invert(np.float32(self.scale * held * (turns * bent + shifts * rigid + brows * lift)))


# ----------------------------------------------------------------------------------------------------------- the whole

class Warp:
    """Renders frames of a photo, uint8 (H, W, 3). moves: see Lips, None: the lips do not move"""

    def __init__(self, face: Face, moves: np.ndarray | None = None):
        p, self.face, self.head = face.points, face, Head(face)
        self.eyes = Eyelids(face, p[36:42], p[17:22]), Eyelids(face, p[42:48], p[22:27])  # left, right in the picture
        self.lips = None if moves is None else Lips(face, moves)

    @classmethod
    def of(cls, photo: np.ndarray, points: np.ndarray, mean: np.ndarray, moves: np.ndarray | None = None) -> "Warp":
        """Of a photo of any size, see enlarge_small_face, and its landmarks. Raises ValueError: see Face"""
        larger, points = enlarge_small_face(photo, points, mean)
        return cls(Face(larger, points, mean, len(photo) / len(larger)), moves)

    def __call__(self, opening=None, shape=None, blink: float = 0.0, brows: float = 0.0, pose: Pose | None = None):
        """opening, brows: in units; shape: (K - 1,), see Lips; opening or shape None: as in the photo; blink: 0 to 1"""
        lips, frame = self.lips, self.face.photo.copy()
        moved = lips and lips.displace(opening, shape)
        layers = self.layers(moved, min(float(blink), 1.0))
        if brows or pose not in (None, Pose()):
            patches = [self.render_head(moved, layers, self.head.displace(pose or Pose(), brows))]
        else:
            patches = [(lips.box, self.face.read(lips.nodes.sources(moved[1])))] if moved else []
            patches += [(box, render(pixel_centres(box))) for box, render in layers]
        for (x0, y0, x1, y1), colours in patches:
            frame[y0:y1, x0:x1] = colours
        return frame

    def layers(self, moved, blink: float) -> list:
        """Layers on top of the moved skin: boxes, and functions from coordinates (h, w, 2) to uint8 (h, w, 3)"""
        lips, read, layers = self.lips, self.face.read, []
        if moved:
            layers.append((lips.lips_box, partial(lips.render, moved=moved)))
            read = lambda at: self.face.read(at - read_grid(moved[1], at, lips.box))  # noqa: E731
        for eye in self.eyes if blink > 0 else ():
            layers.append((eye.box, partial(eye.render, blink=blink, read=read)))
        return layers

    def render_head(self, moved, layers, back):
        """The head's box and its colours. back: of Head.displace. Lips and lids are drawn on the head before it turns."""
        lips, where = self.lips, self.head.nodes.sources(back)         # (h, w, 2)
        covered = [(covering_slices(box, where), render) for box, render in layers]
        covered = [(area, render, where[area].copy()) for area, render in covered if area]
        if moved and (area := covering_slices(lips.box, where)):
            where[area] -= read_grid(moved[1], where[area], lips.box)
        out = self.face.read(where)
        for area, render, at in covered:
            out[area] = render(at)
        return self.head.box, out
