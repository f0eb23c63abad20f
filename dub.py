"""New words for a person who is already on video: the mouth of each frame is replaced by the clip's own pixels.

    landmarks of every frame                 ->  pose of the head, opening of the clip's own mouth      (Take)
    its own mouth, shut, + lip numbers       ->  where the mouth's points shall lie in each frame       (Take.target)
    frames that open widest                  ->  a bank of what shows between the lips: teeth, tongue   (Take.add)
    skin of the frame, lips of the nearest frames with a shut mouth, the bank  ->  the new frame        (Take)

Fields lead from the wanted points back to the source's, so nothing is inverted. The video is read four times
(scenes, landmarks, bank, frames) and never kept. Ours, without a paper. Units are warp.py's.
"""

import itertools
from collections import deque
from functools import partial

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d, minimum_filter1d

from faces import DETECT_EVERY, detect_faces, face_box, label_scenes, smooth
from landmarks import track_landmarks
from media import InputError, probe, read_video
from motion import lip_opening
from warp import (
    CORNERS, FIXED, LOWER_INNER, LOWER_OUTER, MAX_SHAPE_ERROR, UPPER_INNER, UPPER_OUTER, FacePlane, Nodes, angles,
    bounding_box, fit_pose, inner_lips, lip_surfaces, pixel_centres, read_grid, read_photo, shape_error, smoothstep,
    to_bytes)

# all constants are ours, chosen by looking at frames; lengths in units
POINTS_HEIGHT = 480  # pixels of the copy on which landmarks are found
TURNED = 35.0, 30.0  # degrees of yaw and pitch beyond which frames pass through
SHORTEST, FADE = 15, 5  # frames: shorter takes pass through; a take fades in and out beside frames that pass through
SLOW = 10  # frames, sigma: what stays of the own mouth for so long is a smile, not speech
SHUT = 0.023  # opening of lips that count as shut
REGION = 1.15, 0.12, 0.46  # beside the mouth's middle, above the nose's base (33), below the chin
SKIN_NODE, LIP_NODE = 0.067, 0.038  # distance of two nodes of the fields
INSET = 0.027  # seams of lips that are not quite shut lie so far inside the lip, or teeth stick to it
RIM = 1.15, 1.6  # lips are replaced within this ellipse around them, fading up to that one
ALIKE, CAST = 25.0, 0.077  # grey levels up to which colours at the rim are matched; sigma of spreading that match inwards
CANVAS, CELLS = (-0.58, -0.16, 0.58, 0.42), 110  # of the bank: x0, y0, x1, y1 about the mouth's middle; cells a unit
WIDEST = 0.75  # the bank uses frames that open at least so far, of the widest; their weight is this ratio ** 10
BORDER = np.array([(x, y) for x in np.linspace(0, 1, 8) for y in np.linspace(0, 1, 8) if {x, y} & {0, 1}])  # of a square
SHOWN = 0.058  # the least opening, of the widest frames, that shows what is inside


def skin_colour(frame: np.ndarray, points: np.ndarray, scale: float) -> np.ndarray:
    """Mean colour (3,) of patches beside both corners of the mouth, above the upper and below the lower lip"""
    at = np.r_[1.25 * points[[48, 54]] - 0.25 * points[48:68].mean(0), (points[[33, 8]] + points[[51, 57]]) / 2]
    boxes = [bounding_box(frame, p + 0.06 * scale * np.array([[-1, -1], [1, 1]])) for p in at]
    return np.mean([frame[y0:y1, x0:x1].mean((0, 1)) for x0, y0, x1, y1 in boxes], 0)


class Take:
    """Consecutive frames of one face: its place in each, its own mouth, its mouth as it would be shut; and the
    same with other lips. First `add` each of its frames to the bank, then `finish`, then call it for any frame.
    The bank is what shows between the lips, as two canvases: fixed to the skull (upper teeth), and to the jaw.

    first: number of its first frame; points: (T, 68, 2) in pixels; mean: (77, 3) shape in units; moves: (K, 68, 2)
    of fusion.DirectMotion; fades: whether frames of the scene that pass through lie before it, and after it."""

    def __init__(self, first: int, points: np.ndarray, mean: np.ndarray, moves: np.ndarray, fades=(False, False)):
        self.first, self.moves, self.T, self.fades = int(first), moves, len(points), fades
        self.points = points = smooth(points.astype(np.float32, copy=False))
        scale, R, shift = (np.array(x) for x in zip(*(fit_pose(p, mean) for p in points)))
        self.planes, depths = smooth(scale[:, None, None] * R[:, :2, :2]), smooth(scale[:, None] * R[:, :2, 2])
        self.q = np.empty_like(points)                                 # from the front, head at rest, in units
        for t, plane in enumerate(self.planes):
            self.q[t] = FacePlane(plane, shift[t]).local(points[t] - np.outer(mean[:68, 2], depths[t]))
        self.own = np.maximum(0, lip_opening(self.q))
        slow = self.own[:, None, None] * -moves[0].astype(np.float32)
        slow += self.q                                                 # without its opening
        weight = np.exp(-(self.own - self.own.min()) / SHUT)
        shut = np.einsum("t,tpi->pi", weight / weight.sum(), slow, dtype=np.float64)
        slow -= shut.astype(np.float32)
        gaussian_filter1d(slow, SLOW, axis=0, mode="nearest", output=slow)
        inner = np.stack([UPPER_INNER[1:4], LOWER_INNER[1:4]])
        slow[:, inner, 1] = slow[:, inner, 1].mean(1, keepdims=True)   # this does not open lips
        share = moves[0, 62, 1] / (moves[0, 62, 1] - moves[0, 66, 1])  # of a gap that the upper lip closes
        shut[inner, 1] = shut[inner[0], 1] + share * (shut[inner[1], 1] - shut[inner[0], 1])
        self.shut, self.slow = shut, slow
        origin = shut[CORNERS[2:]].mean(0)
        self.middles = smooth(shift) + self.planes @ origin + mean[CORNERS[2:], 2].mean() * depths
        self.widest = float(np.sort(self.own)[-4:].mean())
        self.keys = self.shut_frames()
        self.cells = Nodes(CANVAS, 1 / CELLS).at                       # (h, w, 2), of the bank
        self.drop = moves[0, 66, 1]                                    # of the jaw, a unit of opening
        self.sums, self.dark = np.zeros((2, *self.cells.shape[:2], 4)), []

    def place(self, t: int) -> FacePlane:
        return FacePlane(self.planes[t], self.middles[t])

    def shut_frames(self) -> np.ndarray:
        """Frames whose lips are as good as shut: the least open for three frames to either side, and low for this take.
        Pressed lips count as open by what they are thinner than usual."""
        thick = self.q[:, LOWER_OUTER[1:4], 1].mean(1) - self.q[:, UPPER_OUTER[1:4], 1].mean(1) - self.own
        cost = self.own + np.maximum(0, np.median(thick) - thick)
        low = max(SHUT, cost.min() + 0.12 * self.widest)
        least, near, keys = minimum_filter1d(cost, 7), np.zeros(self.T, bool), []
        for t in np.argsort(cost, kind="stable").tolist():
            if cost[t] == least[t] and (not keys or cost[t] < low or cost[t] < 1.6 * low and not near[t]):
                keys.append(t)
                near[max(0, t - 15) : t + 16] = True                   # where no key is near, less shut lips will do
        return np.sort(keys)

    def near_keys(self, t: int) -> list[tuple[int, float]]:
        """The shut frames before and after t with their weights, which sum to 1"""
        i = int(np.searchsorted(self.keys, t))
        if i == 0 or i == len(self.keys) or self.keys[i] == t:
            return [(int(self.keys[min(i, len(self.keys) - 1)]), 1.0)]
        before, after = self.keys[i - 1 : i + 1].tolist()
        w = float(smoothstep(np.float64((t - before) / (after - before))))
        return [(before, 1 - w), (after, w)]

    def source(self, t: int) -> np.ndarray:
        """The frame's own points (68, 2), local; the seam of lips that are not quite shut lies inside the lips"""
        s = self.place(t).local(self.points[t])
        inset = INSET * smoothstep(self.own[t] / 0.04)
        for inner, outer in ((UPPER_INNER, UPPER_OUTER), (LOWER_INNER, LOWER_OUTER)):
            way = s[outer[1:4]] - s[inner[1:4]]
            far = np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-4)
            s[inner[1:4]] += way * np.minimum(0.3, inset / far)
        return s

    def target(self, t: int, opening: float, shape: np.ndarray) -> np.ndarray:
        """Where the points shall lie, (68, 2) local: the mouth shut, opened by `opening` and formed by shape (K - 1,)"""
        full = self.shut + self.slow[t] + opening * self.moves[0] + np.einsum("k,kpi->pi", shape, self.moves[1:])
        short = np.minimum(full[LOWER_INNER[1:4], 1] - full[UPPER_INNER[1:4], 1] - 0.15 * opening, 0)
        full[UPPER_INNER[1:4], 1] += short / 2                          # lips do not cross
        full[LOWER_INNER[1:4], 1] -= short / 2
        return self.place(t).local(self.points[t]) + full - self.q[t]

    def add(self, t: int, frame: np.ndarray):
        """A frame for the bank, if it opens far enough"""
        place = self.place(t)
        if self.own[t] <= max(0.03, WIDEST * self.widest):
            return
        s, at = place.local(self.points[t]), np.stack([self.cells, self.cells + (0, self.drop * self.own[t])])
        skin = skin_colour(frame, self.points[t], place.scale)
        colours = np.stack([read_photo(frame, where) for where in place.pixels(at)]) / skin
        inside = np.stack([np.minimum(*inner_lips(s, v)) for v in at])  # (2, h, w)
        weight = smoothstep((inside - 0.013) / 0.019)[..., None] * (self.own[t] / self.widest) ** 10
        self.sums += np.concatenate([weight * colours, weight], -1)
        if (inside[0] > 0.015).any():
            self.dark.append(np.percentile(colours[0][inside[0] > 0.015], 15, axis=0))

    def finish(self):
        """Fills cells that no frame showed by their neighbours, then by the colour of the cavity"""
        self.cavity = np.minimum(np.median(self.dark, 0), 0.45) if self.dark else np.array([0.27, 0.18, 0.18])
        near = gaussian_filter(self.sums, (0, 5, 5, 0))
        base = (near[..., :3] + 0.02 * self.cavity) / (near[..., 3:] + 0.02)
        full = (self.sums[..., :3] + 0.03 * base) / (self.sums[..., 3:] + 0.03)
        self.canvas = full.astype(np.float32)                          # (2, h, w, 3)

    def inside(self, v, q, d, e, opening: float) -> np.ndarray:
        """Places v (h, w, 2), `d` below the upper and `e` above the lower lip of points q -> (h, w, 3), skin is 1"""
        if not self.dark or self.widest < SHOWN:                       # the clip never showed it: painted teeth
            half = (q[64, 0] - q[60, 0]) / 2
            x = v[..., 0] / half
            tall = 0.16 * half * np.sqrt(np.clip(1 - (x / 0.9) ** 2, 0, 1)) + 1e-6
            front = 1 - smoothstep((np.abs(x) - 0.25) / 0.6)
            seen = smoothstep((tall - d) / (0.3 * tall + 0.008) + 0.5)
            seen = seen * (0.25 + 0.75 * smoothstep(np.float64(opening / 0.1)))
            return self.cavity + (seen * (0.25 + 0.65 * front))[..., None] * (0.95 - self.cavity)
        skull, jaw = (read_grid(canvas, at, CANVAS) for canvas, at in zip(self.canvas, (v, v - (0, self.drop * opening))))
        colour = jaw + smoothstep((e - d) / np.maximum(d + e, 0.02) + 0.5)[..., None] * (skull - jaw)
        shade = 0.72 + 0.28 * smoothstep(np.minimum(d, 0.6 * e + 0.02) / 0.038)  # darker under the lip
        light = 0.35 + 0.65 * smoothstep(np.float64(opening / SHOWN))  # a narrow gap is dark, and red
        return colour * shade[..., None] * light ** np.array([1, 1.3, 1.25])

    def __call__(self, t: int, frame: np.ndarray, keys: list, opening: float, shape: np.ndarray) -> np.ndarray:
        """Frame t of the take, uint8 (H, W, 3) -> the same with lips open by `opening`, of shape (K - 1,). keys:
        (number in the take, weight, frame) of the nearest shut frames"""
        place = self.place(t)
        s, g = self.source(t), self.target(t, opening, shape)
        top, low = np.array([-REGION[0], s[33, 1] - REGION[1]]), np.array([REGION[0], max(s[8, 1], 0.7) + REGION[2]])
        border = top + (low - top) * BORDER                            # nothing beyond it changes
        lips = (g[48:60].max(0) + g[48:60].min(0)) / 2, np.ptp(g[48:60], axis=0) / 2 + 0.03  # an ellipse: middle, radii
        around = (lips[0] + RIM[1] * lips[1] * (2 * BORDER - 1)).clip(top, low)
        skin_nodes, lip_nodes = (Nodes(bounding_box(frame, place.pixels(p)), spacing * place.scale)
                                 for p, spacing in ((border, SKIN_NODE), (around, LIP_NODE)))
        at, mouth_at = (place.local(nodes.flat) for nodes in (skin_nodes, lip_nodes))  # (n, 2), (m, 2)

        # fields from the wanted points back to those of this frame and of the keys, for what hangs on either lip
        moves = np.stack([source - g for source in (s, *(self.source(k) for k, _, _ in keys))], 1)  # (68, 1 + keys, 2)
        fields = lip_surfaces(g, moves, np.r_[border, s[FIXED]], np.r_[at, mouth_at])
        upper, lower = (field[: len(at), 0] for field in fields)
        sources = np.stack([field[len(at) :, 1:] for field in fields]) + mouth_at[:, None]  # (2, m, keys, 2)
        below = smoothstep((at[:, 1:] - g[[60, 62, 64, 66], 1].mean()) / 0.1 + 0.5)
        edge = smoothstep((np.minimum(at - top, low - at).min(1, keepdims=True) - SKIN_NODE / 2) / 0.15)
        moved = edge * (upper + below * (lower - upper)) @ place.plane.T
        out = read_photo(frame, skin_nodes.came_from(skin_nodes.field(-moved))).astype(float)
        (a0, b0, a1, b1), (x0, y0, x1, y1) = lip_nodes.box, skin_nodes.box
        part = slice(b0 - y0, b1 - y0), slice(a0 - x0, a1 - x0)
        out[part] = self.mouth(t, frame, keys, out[part], lip_nodes, sources, g, lips, opening)
        steps = [step for step, fades in zip((t + 1, self.T - t), self.fades) if fades]
        w = smoothstep(np.float64(min([FADE + 1, *steps]) / (FADE + 1)))  # beside frames that pass through
        result, old = frame.copy(), frame[y0:y1, x0:x1]
        result[y0:y1, x0:x1] = to_bytes(old + w * (out - old))
        return result

    def mouth(self, t, frame, keys, skin, nodes, sources, g, lips, opening) -> np.ndarray:
        """skin (h, w, 3) at `nodes` -> the same with the keys' lips, from sources (2, m, keys, 2), and the bank"""
        place = self.place(t)
        light, layers = skin_colour(frame, self.points[t], place.scale), 0
        for i, (k, weight, key) in enumerate(keys):
            there = self.place(k)
            gain = weight * light / skin_colour(key, self.points[k], there.scale)
            moved = (nodes.flat - there.pixels(at) for at in sources[:, :, i])
            layers = layers + gain * np.stack([read_photo(key, nodes.came_from(nodes.field(m))) for m in moved])
        upper, lower = layers
        v = place.local(pixel_centres(nodes.box))
        d, e = inner_lips(g, v)
        within = (np.abs(v[..., 0] - (g[64, 0] + g[60, 0]) / 2) < (g[64, 0] - g[60, 0]) / 2)[..., None]
        soft = max(0.015, 1.5 / place.scale)
        above = np.where(within, smoothstep(0.5 - d / soft)[..., None], 1)
        under = np.where(within, 1 - smoothstep((e - 0.5 * soft) / soft)[..., None], 1)
        rim = smoothstep((RIM[1] - np.linalg.norm((v - lips[0]) / lips[1], axis=-1)) / (RIM[1] - RIM[0]))[..., None]
        change = skin - np.where((d > e)[..., None], lower, upper)
        # colours that differ at the rim are matched, but not where a face ends
        weight = 4 * rim * (1 - rim) * np.exp(-((change.mean(-1, keepdims=True) / ALIKE) ** 2))
        sigma = (CAST * place.scale, CAST * place.scale, 0)
        cast = gaussian_filter(change * weight, sigma) / (gaussian_filter(weight, sigma) + 1e-3)
        patch = light * self.inside(v, g, d, e, opening)
        patch = patch + under * (lower + cast - patch)
        patch = patch + above * (upper + cast - patch)
        return skin + rim * (patch - skin)


# ------------------------------------------------------------------------------------------------------ the whole clip

def scene_landmarks(net, frames, number: int) -> np.ndarray:
    """Frames of one scene -> landmarks (n, 68, 2), pixels, of the number-th largest face; NaN in frames without
    it"""
    frames, missed = iter(frames), deque(maxlen=DETECT_EVERY)
    for k, frame in enumerate(frames):
        faces = detect_faces(frame, margins=(1.2,)) if k % DETECT_EVERY == 0 else ()
        if len(faces) >= number:
            box = face_box(faces, "face", number)
            # backwards to the last detection, then forwards
            before = track_landmarks(net, [frame, *reversed(missed)], box)[:0:-1]
            after = track_landmarks(net, itertools.chain([frame], frames), box)
            return np.concatenate([np.full((k - len(missed), 68, 2), np.nan, np.float32), before, after])
        missed.append(frame)
    return np.full((k + 1, 68, 2), np.nan, np.float32)


def find_takes(path, net, moves: np.ndarray, n: int, number: int = 1) -> tuple[int, list[Take]]:
    """Of the first n frames of a video: how many there are, and its takes. InputError: no face can be followed"""
    info, mean = probe(path), net.solid.double().numpy()
    scene = label_scenes(itertools.islice(read_video(path, 16), n))
    small = zip(scene, read_video(path, min(info.height, POINTS_HEIGHT)))
    points = np.concatenate([scene_landmarks(net, (frame for _, frame in group), number)
                             for _, group in itertools.groupby(small, key=lambda pair: pair[0])])
    points *= max(1.0, info.height / POINTS_HEIGHT)
    usable = np.array([is_usable(p, mean) for p in points])
    ends = [0, *np.flatnonzero(np.diff(scene) | np.diff(usable)) + 1, len(points)]
    parts = [(a, b) for a, b in itertools.pairwise(ends) if usable[a] and b - a >= SHORTEST]
    if not parts:
        few = "none" if number == 1 else f"fewer than {number}"
        raise InputError(f"{path}: no face that can be tracked (turned beyond {TURNED[0]:.0f} degrees, hidden, or {few})")
    fades = [[0 <= k < len(scene) and scene[k] == scene[a] for k in (a - 1, b)] for a, b in parts]
    return len(points), [Take(a, points[a:b], mean, moves, fade) for (a, b), fade in zip(parts, fades)]


def is_usable(points: np.ndarray, mean: np.ndarray) -> bool:
    """Landmarks (68, 2) of a face that is turned little enough, and not hidden by what makes them jump"""
    if not np.isfinite(points).all():
        return False
    scale, R, shift = fit_pose(points, mean)
    yaw, pitch, _ = angles(R)
    is_turned = abs(yaw) >= TURNED[0] or abs(pitch) >= TURNED[1]
    return not is_turned and shape_error(points, mean, scale, R, shift) < MAX_SHAPE_ERROR


def frame_jobs(path, takes: list[Take], count: int, opening: np.ndarray, shape: np.ndarray):
    """Functions without arguments that return the frames, uint8 (H, W, 3), of a video of `count` frames with other
    lips: opening (T,), shape (T, K - 1). A video that is shorter is shown again."""
    of_frame = {take.first + t: (take, t) for take in takes for t in range(take.T)}
    for k, frame in enumerate(itertools.islice(read_video(path), count)):
        if k in of_frame:
            take, t = of_frame[k]
            take.add(t, frame)
    for take in takes:
        take.finish()
    for begin in range(0, len(opening), count):
        ahead, held = enumerate(read_video(path)), {}                  # a second reader, for the shut frames to come
        for k, frame in enumerate(itertools.islice(read_video(path), min(count, len(opening) - begin))):
            if k not in of_frame:
                yield lambda frame=frame: frame
                continue
            take, t = of_frame[k]
            first, near = take.first, take.near_keys(t)
            while first + near[-1][0] not in held:
                at, later = next(ahead)
                if at - first in take.keys:
                    held[at] = later
            held = {at: later for at, later in held.items() if at >= first + near[0][0]}
            keys = [(key, weight, held[first + key]) for key, weight in near]
            yield partial(take, t, frame, keys, float(opening[begin + k]), shape[begin + k])
