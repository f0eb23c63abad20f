"""A photo that talks, blinks and turns its head: its own pixels are moved, at its own resolution.

    68 landmarks, lip numbers predicted from sound   ->  displacements of the landmarks      (Lips)
    displacements of points                          ->  a smooth field on a grid of nodes   (thin plate, Nodes)
    one field for what hangs on the upper jaw, one for the lower  ->  two layers of the photo
    the gap between both layers                      ->  the photo's own teeth, or painted ones, tongue and cavity
    a skin layer that slides over the eye            ->  a blink                             (Lids)
    a mean 3-D shape turned under the photo          ->  one more field, applied last        (Head)

Fields are chained as coordinates, so that every pixel of a frame is read from the photo once, bicubically. Where nothing
moves the photo stays as it is, bit for bit. Ours: the paper paints every frame with its generator instead.

    face = Face(photo, landmarks, mean_shape)        # once a photo
    warp = Warp(face, moves)
    frame = warp(opening=0.08, shape=numbers, blink=0.3, pose=Pose(yaw=5))

Units: the outer corners of the eyes are 1 apart, seen from the front. x points right, y down, z away from the viewer.
Angles are degrees: yaw > 0 turns to the picture's right, pitch > 0 lifts the chin, roll > 0 is clockwise.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.interpolate import PchipInterpolator, RBFInterpolator
from scipy.ndimage import gaussian_filter




# iBUG's 68 points. Inner lips from the left corner to the right one; outer lips between the corners
UPPER_LINE, LOWER_LINE = np.array([60, 61, 62, 63, 64]), np.array([60, 67, 66, 65, 64])
UPPER_LIP, LOWER_LIP = np.arange(49, 54), np.arange(59, 54, -1)
JAW, CORNERS = np.arange(2, 15), np.array([48, 54, 60, 64])
STILL = np.r_[17, 21, 22, 26:48]  # ends of the brows, nose and eyes do not follow the mouth
RIGID = np.r_[0:3, 14:17, 17:48]  # for the pose: no chin and no lips, for these talk

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma

# all constants below are ours, chosen by looking at frames, unless another source stands there
LIP_NODE, HEAD_NODE = 0.032, 0.06  # distance of two nodes
INVERSION_STEPS = 4  # of the fixed point x = p - moved(x); displacements are smooth, the error halves at least
OVAL = 1.10, 1.38  # times the jaw's distance from the nose: the lips' field fades between these two
UNDER_EYES = 0.06, 0.22  # below the lower lids: the field starts, is whole
BESIDE = 1.12  # half widths of the mouth: from here outwards both layers are one
FEATHER, BLUR = 0.012, 1.6  # edge between two layers: at least 1.5 pixels of the original photo, and BLUR times its edges
MISFIT = 0.12  # mean distance of landmarks from the fitted mean shape: 45 people and paintings had .03 to .06
SHOWS = 0.024  # opening from which a photo shows the inside of its mouth
THICKER = 0.8  # outer lips follow a closing mouth by so much: lips that are pulled thin by a smile get thicker
RELAX = 0.5  # part of a smile's extra width and of its raised corners that is lost while it is shut
LARGE = 220  # pixels between the eyes' corners: see Face
LEAST_UNIT = 135  # pixels between the eyes' corners: smaller photos are enlarged first, or edges go in steps


def smoothstep(x):
    """0 below 0, 1 above 1, smooth between. NumPy or torch."""
    x = x.clip(0, 1)
    return x * x * (3 - 2 * x)


# ---------------------------------------------------------------------------------------------------------------------
# the head in the photo


@dataclass
class Pose:
    """What a head does beside talking, relative to the photo. shift: right, down, in units; scale: nearer > 1."""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    shift: tuple = (0.0, 0.0)
    scale: float = 1.0

    @property
    def still(self) -> bool:
        return not (self.yaw or self.pitch or self.roll or any(self.shift)) and self.scale == 1


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Degrees -> (3, 3): first pitch, then yaw, then roll"""
    (cy, cp, cr), (sy, sp, sr) = (f(np.radians([yaw, pitch, roll])) for f in (np.cos, np.sin))
    about_x = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    about_y = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def angles(R: np.ndarray) -> tuple[float, float, float]:
    """(3, 3) -> yaw, pitch, roll in degrees: the inverse of `rotation`"""
    yaw = np.arctan2(R[2, 0], np.hypot(R[2, 1], R[2, 2]))
    return tuple(np.degrees([yaw, np.arctan2(-R[2, 1], R[2, 2]), np.arctan2(R[1, 0], R[0, 0])]).tolist())


def fit_pose(points: np.ndarray, mean: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """points (68, 2) ~ scale (mean R^T)[:, :2] + shift, weak perspective by least squares over RIGID.

    mean: (>= 68, 3) in units. Returns scale in pixels a unit, R (3, 3), shift (2,) in pixels: where mean's origin lies.
    """
    x, p = mean[RIGID] - mean[RIGID].mean(0), points[RIGID] - points[RIGID].mean(0)
    U, _, V = np.linalg.svd(np.linalg.lstsq(x, p, rcond=None)[0].T, full_matrices=False)
    R = np.stack([*(U @ V), np.cross(*(U @ V))])
    flat = x @ R[:2].T
    scale = (flat * p).sum() / (flat**2).sum()
    return float(scale), R, points[RIGID].mean(0) - scale * R[:2] @ mean[RIGID].mean(0)


def enlarge(photo: np.ndarray, points: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A photo whose face has few pixels, and its points, get more pixels; others stay as they are."""
    k = LEAST_UNIT / fit_pose(points, mean)[0]
    if k <= 1:
        return photo, points
    H, W = photo.shape[:2]
    h, w = 2 * round(k * H / 2), 2 * round(k * W / 2)
    return np.array(Image.fromarray(photo).resize((w, h), Image.Resampling.BICUBIC)), points * (w / W, h / H)


class Face:
    """A photo with its landmarks and the pose of its head.

    photo: uint8 (H, W, 3); points: (68, 2) iBUG, in pixels; mean: (77, 3) in units, 68 landmarks and 9 of the hairline;
    sharpest: size of the original photo over that of this one, where it was enlarged.
    Raises ValueError, with the reason: points that are not finite, not those of an upright face, or too turned.
    """

    def __init__(self, photo: np.ndarray, points: np.ndarray, mean: np.ndarray, sharpest: float = 1.0):
        points = np.asarray(points, np.float64)
        if points.shape != (68, 2) or not np.isfinite(points).all():
            raise ValueError("landmarks are not 68 finite points")
        self.points, self.mean, self.sharpest = points, mean, sharpest
        self.scale, self.R, self.shift = fit_pose(points, mean)
        self.photo = photo
        # (1, 3, H, W) in [0, 255], read bicubically. For a large face every half pixel is interpolated once, then read
        # linearly: nearly as sharp in a fifth of the time. Both are exact at the photo's pixels
        self.pixels, (H, W) = torch.from_numpy(photo).permute(2, 0, 1)[None].float(), photo.shape[:2]
        self.mode = "bicubic"
        if self.scale > LARGE:
            self.pixels = F.interpolate(self.pixels, (2 * H - 1, 2 * W - 1), mode="bicubic", align_corners=True)
            self.mode = "bilinear"
        self.to_grid = 2 / torch.tensor([W - 1, H - 1])               # pixels -> grid_sample's units
        yaw, pitch, roll = angles(self.R)
        if self.scale < 4 or not ((points > (-W, -H)) & (points < (2 * W, 2 * H))).all():
            raise ValueError("landmarks lie outside the photo")
        if not (abs(roll) < 60 and points[8, 1] > points[27, 1] and points[45, 0] > points[36, 0]):
            raise ValueError("the face is not upright")
        if abs(yaw) > 50 or abs(pitch) > 45:
            raise ValueError(f"the head is turned too far (yaw {yaw:.0f}, pitch {pitch:.0f} degrees)")
        self.plane = self.scale * self.R[:2, :2]  # the face's plane in the picture: foreshortened, in pixels a unit
        miss = (points - self.shift) / self.scale - (mean[:68] @ self.R.T)[:, :2]
        if np.hypot(*miss[RIGID].T).mean() > MISFIT:
            raise ValueError("landmarks are not those of a face")

    def read(self, where):
        """where (h, w, 2) in pixels, centres at .5 -> (3, h, w) in [0, 255]; mirrored beyond the photo's edges"""
        grid = torch.addcmul(-1 - 0.5 * self.to_grid, where, self.to_grid)
        return F.grid_sample(self.pixels, grid[None], self.mode, "reflection", align_corners=True)[0]

    def local(self, p, about):
        """Pixels (.., 2) -> units in the plane of the face, as seen from the front, about a point"""
        return (p - about) @ np.linalg.inv(self.plane).T


# ---------------------------------------------------------------------------------------------------------------------
# fields


def thin_plate(points: np.ndarray, values: np.ndarray, at: np.ndarray, stiffness: float = 1e-4) -> np.ndarray:
    """Values (n, ..) at points (n, 2) -> the smoothest surface through them (Duchon 1977), read at (m, 2): (m, ..)"""
    flat = RBFInterpolator(points, values.reshape(len(points), -1), smoothing=stiffness)(at)
    return flat.reshape(len(at), *values.shape[1:])


def read(maps, where, corner):
    """maps (C, H, W), first pixel at `corner` of the photo, read at where (h, w, 2) -> (C, h, w); edges are repeated"""
    C, H, W = maps.shape
    grid = (where - torch.tensor(corner)) * torch.tensor([2 / W, 2 / H]) - 1
    return F.grid_sample(maps[None], grid[None], padding_mode="border", align_corners=False)[0]


class Nodes:
    """A grid of nodes over a rectangle of the photo, on which displacements are kept: they are smooth.

    box: x0, y0, x1, y1, whole pixels; spacing: of the nodes, in pixels.
    """

    def __init__(self, box, spacing: float):
        x0, y0, x1, y1 = box
        x, y = (torch.linspace(a + 0.5, b - 0.5, max(4, round((b - a) / spacing))) for a, b in ((x0, x1), (y0, y1)))
        self.box, self.at = box, torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (gh, gw, 2), pixels
        first, last = self.at[0, 0], self.at[-1, -1]
        self.to_grid = 2 / (last - first)
        self.offset = -1 - first * self.to_grid

    def flat(self) -> np.ndarray:
        """(gh * gw, 2), pixels, for NumPy"""
        return self.at.flatten(0, 1).double().numpy()

    def field(self, values: np.ndarray) -> torch.Tensor:
        """(gh * gw, .., C) -> (.., C, gh, gw)"""
        return torch.from_numpy(np.moveaxis(values, 0, -1)).float().unflatten(-1, self.at.shape[:2]).contiguous()

    def read(self, values, where):
        """values (n, C, gh, gw) at where (n or 1, h, w, 2), pixels -> (n, C, h, w); beyond the box the edge's"""
        grid = torch.addcmul(self.offset, where, self.to_grid)
        return F.grid_sample(values, grid.expand(len(values), -1, -1, -1), padding_mode="border", align_corners=True)

    def invert(self, moved):
        """Displacements of what lies at the nodes, (n, 2, gh, gw) -> of what arrives there: p came from p - back(p)"""
        back = moved
        for _ in range(INVERSION_STEPS):
            back = self.read(moved, self.at - back.permute(0, 2, 3, 1))
        return back


def window(box, where, stride: int = 4) -> tuple[slice, slice] | None:
    """Rows and columns of coordinates `where` (h, w, 2), a smooth map, that cover a box in pixels; None: none do"""
    x, y = where[::stride, ::stride].unbind(-1)
    hit = (x > box[0] - stride) & (x < box[2] + stride) & (y > box[1] - stride) & (y < box[3] + stride)
    rows, columns = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
    if not len(rows):
        return None
    return tuple(slice(max(0, stride * (int(k[0]) - 1)), stride * (int(k[-1]) + 1) + 1) for k in (rows, columns))


def box_in(photo, points) -> tuple[int, int, int, int]:
    """The box of whole pixels around points (n, 2), cut at the photo's edges"""
    H, W = photo.shape[:2]
    x0, y0 = np.clip(np.floor(points.min(0)), 0, (W - 4, H - 4)).astype(int)
    x1, y1 = np.clip(np.ceil(points.max(0)), (x0 + 4, y0 + 4), (W, H)).astype(int)
    return int(x0), int(y0), int(x1), int(y1)


def centres(box) -> np.ndarray:
    """x0, y0, x1, y1 -> (h, w, 2): the pixels' centres"""
    x0, y0, x1, y1 = box
    return np.stack(np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5), -1)


def curve(points: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Height at x of a line through points (n, 2), left to right, level beyond its ends. Piecewise cubic: it
    does not overshoot where points crowd on the far side of a turned face."""
    ends = np.maximum.accumulate(points[:, 0]) + 1e-4 * np.arange(len(points))
    return PchipInterpolator(ends, points[:, 1])(np.clip(x, ends[0], ends[-1]))


def edge_width(grey: np.ndarray) -> float:
    """Width of the edges in a picture (H, W), in pixels: root of the power of gradients over that of Laplacians"""
    slopes = np.gradient(grey)
    laplacian = sum(np.gradient(g, axis=k) for k, g in enumerate(slopes))
    return float(np.sqrt(sum((g**2).mean() for g in slopes) / max((laplacian**2).mean(), 1e-6)))


# ---------------------------------------------------------------------------------------------------------------------
# lips


class Lips:
    """The mouth of a photo: everything below the eyes follows the lips, smoothly, and nothing outside the face does.

    moves: (K, 68, 2), how the landmarks of a talking face move: moves[0] for each unit that the lips open, the others for
    each unit of a shape number (see `fit_moves`). They were learned on frontal faces: here they lie in the face's plane.
    """

    def __init__(self, face: Face, moves: np.ndarray):
        self.face, points = face, face.points
        self.middle = points[CORNERS[2:]].mean(0)
        q = self.q = face.local(points, self.middle)                  # (68, 2)
        self.half, self.centre = (q[64, 0] - q[60, 0]) / 2, (q[64, 0] + q[60, 0]) / 2
        gaps = q[LOWER_LINE, 1] - q[UPPER_LINE, 1]                     # (5,): 0 at the corners
        self.own = max(0.0, gaps[1:4].mean())                          # how far the photo's mouth is open

        # the jaw's oval, around the tip of the nose
        jaw = q[:17] - q[30]
        outline = np.arctan2(jaw[:, 1], jaw[:, 0]), np.hypot(*jaw.T)   # angle, radius
        ring = q[30] + OVAL[1] * jaw
        corners = np.array([[x, y] for x in (ring[:, 0].min(), ring[:, 0].max())
                            for y in (q[[40, 41, 46, 47], 1].min(), ring[:, 1].max())])
        self.box = box_in(face.photo, corners @ face.plane.T + self.middle)
        self.nodes = Nodes(self.box, LIP_NODE * face.scale)
        at = face.local(self.nodes.flat(), self.middle)                # (n, 2)

        moves = np.stack([moves[0], self.closing(moves[0], gaps), *moves[1:]])  # (1 + K, 68, 2)
        fixed = np.r_[q[STILL], ring]

        def surface(line, lip):
            used = np.r_[JAW, CORNERS, lip, line[1:4]]
            values = np.r_[moves[:, used].transpose(1, 0, 2), np.zeros((len(fixed), len(moves), 2))]
            return thin_plate(np.r_[q[used], fixed], values, at)       # (n, 1 + K, 2)

        upper, lower = surface(UPPER_LINE, UPPER_LIP), surface(LOWER_LINE, LOWER_LIP)
        beside = smoothstep((np.abs(at[:, 0] - self.centre) / self.half - BESIDE + 0.12) / 0.12)[:, None, None]
        lower = lower + beside * (upper - lower)
        polar = at - q[30]
        out = np.hypot(*polar.T) / np.interp(np.arctan2(polar[:, 1], polar[:, 0]), *outline, period=2 * np.pi)
        fade = 1 - smoothstep((out - OVAL[0]) / (OVAL[1] - OVAL[0]))
        under = np.interp(at[:, 0], *zip(*sorted([(q[k, 0], q[k, 1]) for k in (36, 41, 40, 47, 46, 45)])))
        fade *= smoothstep((at[:, 1] - under - UNDER_EYES[0]) / (UNDER_EYES[1] - UNDER_EYES[0]))
        fields = np.stack([upper, lower], 1) * fade[:, None, None, None]
        self.fields = self.nodes.field(fields @ face.plane.T)          # (2, 1 + K, 2, gh, gw), pixels

        # between these two heights the upper field turns into the lower one, inside the box of the lips
        opened = self.own + 0.22                                       # no mouth opens wider: FULL is less
        top, bottom = q[UPPER_LIP, 1].min() - 0.10, max(q[LOWER_LIP, 1].max(), q[66, 1] + opened) + 0.12
        self.blend = torch.from_numpy(smoothstep((at[:, 1] - top) / (bottom - top))).float().unflatten(
            0, self.nodes.at.shape[:2])                                # (gh, gw)
        corners = np.array([(self.centre + a * BESIDE * self.half, y) for a in (-1, 1) for y in (top, bottom)])
        self.lips_box = box_in(face.photo, corners @ face.plane.T + self.middle)
        self.layers()

    def closing(self, opens, gaps):
        """How the points move for each unit that an open mouth closes, downwards as `opens`: (68, 2).

        Each of the three gaps closes by its own size, so that the lips meet all along. A smile that shuts also gets
        narrower and its corners drop, as far as it is wider than the mean face's mouth: the cheeks follow."""
        if not self.own:
            return opens
        q, closes = self.q, opens.copy()
        for line, lip in ((UPPER_LINE, UPPER_LIP), (LOWER_LINE, LOWER_LIP)):
            share = opens[line[2], 1] / (opens[66, 1] - opens[62, 1]) / self.own
            closes[line[1:4], 1] = share * gaps[1:4]
            closes[lip, 1] = THICKER * share * gaps[[1, 1, 2, 3, 3]]
        mean = self.face.mean
        wide = max(0.0, self.half - (mean[64, 0] - mean[60, 0]) / 2) / self.half    # share of the half width
        raised = max(0.0, q[[61, 63], 1].mean() - q[[60, 64], 1].mean() - (mean[[61, 63], 1].mean() - mean[60, 1]))
        lips = np.r_[48:68]
        reach = (q[lips, 0] - self.centre) / self.half                 # -1 at the left corner, 1 at the right
        closes[lips, 0] += RELAX * wide * (q[lips, 0] - self.centre) / self.own
        closes[lips, 1] -= RELAX * raised * reach**2 / self.own
        return closes

    def layers(self):
        """What both layers show near the lips: masks and paint, over the lips' box of the photo."""
        face, q, half = self.face, self.q, self.half
        x0, y0, x1, y1 = self.lips_box
        self.region = face.photo[y0:y1, x0:x1].astype(np.float64)      # (h, w, 3)
        v = face.local(centres(self.lips_box), self.middle)            # (h, w, 2)
        x, y = (v[..., 0] - self.centre) / half, v[..., 1]             # x: -1 .. 1 between the corners
        up, low = (curve(q[k], v[..., 0]) for k in (UPPER_LINE, LOWER_LINE))
        low = np.maximum(low, up)
        d, e = y - up, low - y                                         # below the upper lip's edge, above the lower one's
        edge = max(1.5 / face.sharpest, BLUR * edge_width(self.region @ GREY))  # pixels
        soft = self.soft = max(FEATHER, edge / face.scale)
        self.open = self.own > max(SHOWS, 4 / face.scale)
        inside = np.abs(x) < 1.02
        cover = smoothstep(0.5 - d / soft)                             # the upper lip and all above it: 1
        ground = 1 - inside * smoothstep((e - 1.5 / face.scale) / soft - 0.5)  # the lower lip and all below it: 1
        teeth, seen, shade = self.paint(x, y, d, e)
        self.upper_maps = self.maps(cover, seen)
        self.lower_maps = self.maps(ground, (1 - ground) * shade)
        self.teeth = None if teeth is None else self.maps(*np.moveaxis(teeth, -1, 0))

    @staticmethod
    def maps(*maps) -> torch.Tensor:
        return torch.from_numpy(np.stack(maps)).float().contiguous()

    def paint(self, x, y, d, e):
        """Teeth (h, w, 3) on the upper layer, None where the photo has its own; how far they are seen (h, w); brightness
        (h, w) of cavity and tongue on the lower layer, times the colour of the lips, `self.red`."""
        face, q, half = self.face, self.q, self.half
        near, region = np.abs(x) < 1, self.region
        light, black = np.percentile(region[near] @ GREY, (90, 1))
        skin = region[near].mean(0)
        lips = (np.abs(x) < 0.6) & (((y > q[51, 1]) & (d < 0)) | ((e < 0) & (y < q[57, 1])))
        red = region[lips].mean(0) if lips.any() else skin
        red = red @ GREY + 1.7 * (red - red @ GREY)                    # flesh is redder inside; a grey photo stays grey
        red = np.maximum(red, 0) * (0.6 * light / max(red @ GREY, 1))
        self.red = torch.from_numpy(red).float().view(3, 1, 1)
        front = 1 - smoothstep((np.abs(x) - 0.25) / 0.6)               # the corners of the mouth lie in the dark
        dark = max(0.16, 0.6 * black / max(red.max(), 1)) * (0.6 + 0.4 * front)
        tongue = smoothstep((0.42 - e / half) / 0.4) * smoothstep((0.8 - np.abs(x)) / 0.5)
        shade = dark + tongue * np.maximum(0.62 * (0.3 + 0.7 * front) - dark, 0)
        if self.open:
            return None, smoothstep(2 * e / self.soft), shade
        tall = 0.15 * half * np.sqrt(np.clip(1 - (x / 0.9) ** 2, 0, 1)) + 1e-6
        fine = smoothstep(half * face.scale * face.sharpest / 40 - 0.25)  # few pixels: a strip without gaps
        gaps = fine * np.exp(-((np.abs(np.abs(x)[..., None] - (0, 0.30, 0.54, 0.74)).min(-1) / 0.03) ** 2))
        bright = (0.65 + 0.35 * smoothstep(d / (0.5 * tall))) * (0.35 + 0.65 * front) * (1 - 0.14 * gaps)
        teeth = 0.85 * light * bright[..., None] * (1 + 0.4 * (skin / max(skin @ GREY, 1) - 1))
        seen = smoothstep((tall * (1 - 0.2 * gaps) - d) / np.maximum(0.3 * tall, self.soft) + 0.5)
        return teeth, seen * smoothstep(d / self.soft + 0.5) * (np.abs(x) < 0.95), shade

    def displace(self, opening: float, shape):
        """opening in units, at least 0; shape: K - 1 numbers -> what `source` and `render` need; None: nothing moves"""
        beyond = opening - self.own
        amount = torch.tensor([max(beyond, 0.0), min(beyond, 0.0), *map(float, shape)], dtype=torch.float32)
        if amount.abs().max() < 1e-6:
            return None
        back = self.nodes.invert(torch.einsum("k,lkcyx->lcyx", amount, self.fields))  # (2, 2, gh, gw)
        light = 0.25 + 0.75 * float(smoothstep(np.float64(opening / 0.10)))  # little of it falls into a narrow gap
        return back, back[:1] + self.blend * (back[1:] - back[:1]), light

    def shift(self, where, moved):
        """where (h, w, 2) in the talking photo, outside the lips' box -> (h, w, 2): the pixel came from where - shift"""
        return self.nodes.read(moved[1], where[None])[0].permute(1, 2, 0)

    def render(self, where, moved):
        """where (h, w, 2), inside the lips' box -> (3, h, w): the upper layer over its teeth over the lower layer"""
        back, _, light = moved
        upper, lower = where - self.nodes.read(back, where[None]).permute(0, 2, 3, 1)
        corner = self.lips_box[:2]
        above, below = self.face.read(upper), self.face.read(lower)
        cover, seen = read(self.upper_maps, upper, corner)
        ground, shade = read(self.lower_maps, lower, corner)
        if self.teeth is None:
            teeth = above
        else:
            teeth, seen = read(self.teeth, upper, corner), seen * light
        dark = shade * self.red
        out = ground * below + dark
        out = out + seen * ((1 - ground) * teeth - dark)
        return out + cover * (above - out)


# ---------------------------------------------------------------------------------------------------------------------
# lids


class Lids:
    """One eye of a photo: the skin between lid and brow slides down over it, the lower lid rises a little.

    eye: 6 landmarks, corner to corner over the upper lid and back; brow: 5. Lengths are widths of this eye.
    """

    RISE, SEAL, LASH = 0.20, 0.07, 0.06  # share of the gap that the lower lid closes; overlap of both lids; lashes

    def __init__(self, face: Face, eye: np.ndarray, brow: np.ndarray):
        self.face, self.width = face, max(np.linalg.norm(eye[3] - eye[0]), 2.0)
        across, middle = (eye[3] - eye[0]) / self.width, (eye[0] + eye[3]) / 2
        axes = np.array([across, [-across[1], across[0]]])
        self.down = torch.from_numpy(axes[1] * self.width).float()     # one width downwards, in pixels
        q, b = ((p - middle) @ axes.T / self.width for p in (eye, brow))
        far = float(np.clip(-b[:, 1].max() - 0.02, 0.2, 0.75))         # how high the skin reaches that stretches
        reach = far + 0.4
        self.box = box_in(face.photo, middle + reach * self.width * np.array([[-1, -1], [1, 1]]))
        u, v = np.moveaxis((centres(self.box) - middle) @ axes.T / self.width, -1, 0)
        upper, lower = (curve(q[k], u) for k in ([0, 1, 2, 3], [0, 5, 4, 3]))
        near = smoothstep((0.66 - np.abs(u)) / 0.2)                    # lashes at the corners come along
        gap = np.maximum(lower - upper, 0) * near
        self.tallest = max(float(gap.max()), 1e-3)
        self.maps = Lips.maps(upper, lower, v, gap, near, np.maximum(upper + far, 0.12))
        x0, y0, x1, y1 = self.box
        soft = gaussian_filter(face.photo[y0:y1, x0:x1].astype(float), (0.03 * self.width, 0.12 * self.width, 0))
        self.smooth = Lips.maps(*np.moveaxis(soft, -1, 0))             # lashes that are stretched would be streaks

    def render(self, where, blink: float, photo):
        """where (h, w, 2) -> (3, h, w): the eye shut by `blink`, 0 to 1. photo: reads colours at such places"""
        up, low, v, gap, near, height = read(self.maps, where, self.box[:2])
        rise, fall = blink * self.RISE * gap, blink * ((1 - self.RISE) * gap + self.SEAL * near)
        d = up + fall - v                                              # above the upper lid's edge, where that is now
        skin = where - (fall * (1 - smoothstep(d / (height + fall))))[..., None] * self.down
        under = where + (rise * (1 - smoothstep((v - low + rise) / 0.4)))[..., None] * self.down
        stretched = smoothstep((d - self.LASH) / 0.1) * smoothstep(fall / 0.15) * smoothstep(2 - 2 * d / (height + fall))
        smooth = read(self.smooth, skin, self.box[:2])
        skin, under = photo(skin), photo(under)
        skin = skin + stretched * (smooth - skin)
        edge = (d + self.LASH * gap / self.tallest) / max(0.04, 1.2 / self.width) + 0.5
        return under + smoothstep(edge) * smoothstep(fall / 0.02) * (skin - under)


# ---------------------------------------------------------------------------------------------------------------------
# the head


class Head:
    """A field for any pose: each node has a depth, from the mean shape below the landmarks.

    The head's outline lies in the plane of the neck's joint, like a ball's: it hardly moves when the head turns, so
    that the background does not tear. `room`: degrees of yaw and of pitch that look right, from the steepest depth.
    """

    DEPTH = 1.15  # MediaPipe's depths are too flat by so much: measured turns against asked ones
    PIVOT = np.array([0, 0.60, 0.50])  # the neck's joint, in the mean's frame
    SKULL, AXES = np.array([0, -0.05, 0.50]), np.array([1.02, 1.38])  # the outline's middle, half axes, hair included
    AIR, NECK = 0.9, 0.75  # shifts fade within AIR outside the outline, turns within NECK below the chin
    STIFFNESS = 0.03  # of the depth: softer plates fold sooner
    FOLD = 0.65  # a turn may widen or narrow a place by so much

    def __init__(self, face: Face):
        scale, R, shift, points = face.scale, face.R, face.shift, face.points
        mean = face.mean * (1, 1, self.DEPTH)
        place = mean @ R.T                                             # (77, 3), units, axes of the picture
        place[:68, :2] = (points - shift) / scale                      # the photo's own points with the mean's depth
        roll = np.radians(angles(R)[2])
        upright = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
        pivot, middle = R @ self.PIVOT, R[:2] @ self.SKULL
        reach = self.AXES + self.AIR
        H, W = face.photo.shape[:2]
        self.box = box_in(face.photo, np.stack([middle - reach, middle + reach + (0, 0.3)]) * scale + shift)
        self.nodes = Nodes(self.box, HEAD_NODE * scale)
        nodes = (self.nodes.flat() - shift) / scale                    # (n, 2)

        # depth: the landmarks', running smoothly into the plane of the joint at the outline
        a = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        ring = np.concatenate([np.c_[np.cos(a), np.sin(a)] * self.AXES * k for k in (1, 1.25)])
        ring = ring[ring[:, 1] < 0.75 * self.AXES[1]] @ upright + middle  # none on the neck
        used = np.r_[0:60, 68:len(mean)]
        depths = np.r_[place[used, 2], np.full(len(ring), pivot[2])]
        z = thin_plate(np.r_[place[used, :2], ring], depths, nodes, self.STIFFNESS) - pivot[2]
        v = (nodes - middle) @ upright.T
        out = np.hypot(*(v / self.AXES).T) - 1                         # 0 on the outline
        z = np.minimum(z, 0) * (1 - smoothstep(out / 0.3))
        rows, columns = self.nodes.at.shape[:2]
        step = (self.nodes.at[1, 1] - self.nodes.at[0, 0]).tolist()    # pixels from node to node
        dy, dx = np.gradient(z.reshape(rows, columns) * scale, step[1], step[0])
        self.room = tuple(float(np.degrees(np.arctan(self.FOLD / max(np.abs(s).max(), 0.1)))) for s in (dx, dy))

        # how much of a turn, and of a shift, each node follows. The region's edge stays, where it is not the picture's
        chin = ((place[8, :2] - middle) @ upright.T)[1]
        turns = 1 - smoothstep((v[:, 1] - chin) / self.NECK)
        x0, y0, x1, y1 = self.box
        lo, hi = nodes.min(0), nodes.max(0)
        for distance, inner in zip((*(nodes - lo).T, *(hi - nodes).T), (x0 > 0, y0 > 0, x1 < W, y1 < H)):
            turns = turns * (smoothstep(distance / 0.25) if inner else 1)
        shifts = turns * (1 - smoothstep(out * self.AXES[0] / self.AIR))
        still = np.r_[0:17, 27:48, 68:len(mean)]
        brows = np.r_[np.ones(10), np.zeros(len(still) + len(ring))]
        lift = thin_plate(np.r_[place[17:27, :2], place[still, :2], ring], brows, nodes) * turns * (out < 0.2)
        fields = np.c_[nodes - pivot[:2], z, turns, shifts, np.outer(lift, -upright[1])]
        self.fields, self.scale = self.nodes.field(fields), scale      # (7, gh, gw)

    def back(self, pose: Pose, brows: float):
        """(1, 2, gh, gw), pixels: what arrives at the nodes came from there minus this"""
        xyz, (turns, shifts), lift = self.fields[:3], self.fields[3:5], self.fields[5:]
        full = torch.from_numpy(pose.scale * rotation(pose.yaw, pose.pitch, pose.roll)[:2] - np.eye(3)[:2]).float()
        flat = torch.from_numpy(pose.scale * rotation(0, 0, pose.roll)[:2] - np.eye(3)[:2]).float()
        flat[:, 2] = 0
        rigid = torch.einsum("ij,jyx->iyx", flat, xyz) + torch.tensor(pose.shift).float().view(2, 1, 1)
        bent = torch.einsum("ij,jyx->iyx", full - flat, xyz)
        return self.nodes.invert(self.scale * (turns * bent + shifts * rigid + brows * lift)[None])


# ---------------------------------------------------------------------------------------------------------------------
# the whole


class Warp:
    """Frames of a photo. warp(opening, shape, blink, brows, pose) -> uint8 (H, W, 3), each read once from the photo.

    At rest (`opening` the photo's own, `shape` 0, no blink, no pose) it is the photo, bit for bit.
    """

    def __init__(self, face: Face, moves: np.ndarray):
        self.face, self.lips, self.head = face, Lips(face, moves), Head(face)
        p = face.points
        self.eyes = Lids(face, p[36:42], p[17:22]), Lids(face, p[42:48], p[22:27])
        self.own, self.room = self.lips.own, self.head.room
        self.grid = torch.from_numpy(centres((0, 0, *face.photo.shape[1::-1]))).float()  # (H, W, 2)

    def __call__(self, opening=None, shape=None, blink: float = 0.0, brows: float = 0.0, pose: Pose | None = None):
        """opening: of the lips, in units, None: the photo's; shape: (K - 1,) numbers of `moves`; blink: 0 to 1; brows:
        raised by so much; pose: of the head."""
        lips = self.lips
        shape = np.zeros(lips.fields.shape[1] - 2) if shape is None else shape
        moved = lips.displace(lips.own if opening is None else max(0.0, float(opening)), shape)
        frame = self.face.photo.copy()
        if (pose is None or pose.still) and not brows:
            parts = [part.box for part in (lips,) * (moved is not None) + self.eyes * (blink > 0)]
            parts = [(box, self.grid[box[1] : box[3], box[0] : box[2]].clone()) for box in parts]
        else:
            x0, y0, x1, y1 = box = self.head.box
            back = self.head.back(pose or Pose(), brows)
            back = F.interpolate(back, (y1 - y0, x1 - x0), mode="bilinear", align_corners=True)
            parts = [(box, self.grid[y0:y1, x0:x1] - back[0].permute(1, 2, 0))]
        for (x0, y0, x1, y1), where in parts:
            colours = self.colours(where, moved, min(float(blink), 1.0))
            frame[y0:y1, x0:x1] = (colours + 0.5).clamp_(0, 255).byte().permute(1, 2, 0).numpy()
        return frame

    def colours(self, where, moved, blink: float):
        """where (h, w, 2): coordinates before the head turned, overwritten -> (3, h, w), the talking photo there"""
        lips, photo = self.lips, self.face.read
        layers = []
        if moved:
            layers.append((lips.lips_box, lambda at: lips.render(at, moved)))
            photo = lambda at: self.face.read(at - lips.shift(at, moved))  # noqa: E731
        for eye in self.eyes if blink > 0 else ():
            layers.append((eye.box, functools.partial(eye.render, blink=blink, photo=photo)))
        layers = [(part, layer, where[part].clone()) for box, layer in layers if (part := window(box, where))]
        part = window(lips.box, where) if moved else None
        if part:
            where[part] -= lips.shift(where[part], moved)
        out = self.face.read(where)
        for part, layer, at in layers:
            out[:, *part] = layer(at)
        return out
