"""Dubbing: a person in a video says new words. The mouth of each frame is replaced by pixels of the same clip.

    landmarks of each frame                    ->  pose of the head, opening of the source mouth    (Take)
    the shut source mouth + lip numbers        ->  target positions of the mouth's landmarks        (Take.target_points)
    the frames with the widest openings        ->  a bank of teeth and tongue                       (Take.add_to_bank)
    skin of the frame, lips of the nearest frames with a shut mouth, the bank  ->  the new frame    (Take.render)

Fields lead from the target points back to the source points, so no field is inverted. The video is read five times
(scenes, landmarks, bank, frames, shut lips ahead of them) and never stored. Ours, without a paper. Units: see warp.py.
"""

import itertools
from functools import partial

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d, minimum_filter1d

from faces import smooth
from landmarks import track_video
from media import InputError, read_video
from motion import lip_opening
from warp import (
    CORNERS, FIXED, LOWER_INNER, LOWER_OUTER, MAX_SHAPE_ERROR, UPPER_INNER, UPPER_OUTER, FacePlane, Nodes, angles,
    bounding_box, fit_pose, inner_lips, lip_surfaces, pixel_centres, read_grid, read_photo, shape_error, smoothstep,
    to_bytes)

# all constants are ours, chosen by looking at frames; lengths in units
MAX_TURN = 35.0, 30.0  # degrees of yaw and pitch; frames beyond are left unchanged
MIN_TAKE, FADE = 15, 5  # frames: shorter takes are left unchanged; length of the fade beside unchanged frames
SMILE_SIGMA = 10  # frames: slower changes of the source mouth count as a smile, not as speech
SHUT = 0.023  # opening up to which lips count as shut
REGION = 1.15, 0.12, 0.46  # reach beside the mouth's middle, above the base of the nose (33), below the chin
SKIN_NODE, LIP_NODE = 0.067, 0.038  # distance between two nodes of the fields
SEAM_INSET = 0.027  # the seam of nearly shut lips lies this far inside the lip, or teeth would stick to it
RIM = 1.15, 1.6  # lips are replaced inside the first multiple of the ellipse around them, and fade out up to the second
COLOUR_RANGE, COLOUR_SIGMA = 25.0, 0.077  # grey levels up to which colours at the rim are matched; blur of that match
CANVAS, CELLS = (-0.58, -0.16, 0.58, 0.42), 110  # of the bank: x0, y0, x1, y1 about the mouth's middle; cells a unit
BANK_OPENING = 0.75  # least opening of the bank's frames, as a share of the widest; their weight is the share ** 10
# 28 points on the edges of the unit square
BORDER = np.array([(x, y) for x in np.linspace(0, 1, 8) for y in np.linspace(0, 1, 8) if {x, y} & {0, 1}])
TEETH_OPENING = 0.058  # if a take opens no wider, its teeth are painted


def skin_colour(frame: np.ndarray, points: np.ndarray, scale: float) -> np.ndarray:
    """Mean colour (3,) of patches beside both corners of the mouth, above the upper lip and below the lower lip"""
    beside = 1.25 * points[[48, 54]] - 0.25 * points[48:68].mean(0)
    patches = np.r_[beside, (points[[33, 8]] + points[[51, 57]]) / 2]
    boxes = [bounding_box(frame, p + 0.06 * scale * np.array([[-1, -1], [1, 1]])) for p in patches]
    return np.mean([frame[y0:y1, x0:x1].mean((0, 1)) for x0, y0, x1, y1 in boxes], 0)


class Take:
    """Consecutive frames of one face, which can be rendered with other lips: call `add_to_bank` with each frame, then
    `finish_bank`, then `render`. The bank is two canvases of the inside of the mouth, one fixed to the skull (upper
    teeth), one to the jaw.

    first: number of the first frame; points: (T, 68, 2) in pixels; mean: (77, 3) shape in units; moves: (K, 68, 2) of
    fusion.DirectMotion; fades: whether unchanged frames of the same scene lie before and after the take"""

    def __init__(self, first: int, points: np.ndarray, mean: np.ndarray, moves: np.ndarray, fades=(False, False)):
        self.first, self.moves, self.T, self.fades = int(first), moves, len(points), fades
        self.points = points = smooth(points.astype(np.float32, copy=False))
        scale, R, shift = fit_pose(points, mean)
        self.planes, depths = smooth(scale[:, None, None] * R[:, :2, :2]), smooth(scale[:, None] * R[:, :2, 2])
        flat = points - mean[:68, 2:3] * depths[:, None] - shift[:, None]
        self.frontal = np.float32(flat @ np.linalg.inv(self.planes).mT)  # (T, 68, 2) in units, without the head's motion
        self.opening = np.maximum(0, lip_opening(self.frontal))        # (T,)

        # frontal = shut + opening moves[0] + smile + speech; `smile` is first all but the opening, then without `shut`
        smile = self.opening[:, None, None] * -moves[0].astype(np.float32)
        smile += self.frontal
        weight = np.exp(-(self.opening - self.opening.min()) / SHUT)
        shut = np.einsum("t,tpi->pi", weight / weight.sum(), smile, dtype=np.float64)  # (68, 2)
        smile -= shut.astype(np.float32)
        gaussian_filter1d(smile, SMILE_SIGMA, axis=0, mode="nearest", output=smile)
        inner = np.stack([UPPER_INNER[1:4], LOWER_INNER[1:4]])
        smile[:, inner, 1] = smile[:, inner, 1].mean(1, keepdims=True)  # a smile does not open lips
        upper_share = moves[0, 62, 1] / (moves[0, 62, 1] - moves[0, 66, 1])  # of a gap, closed by the upper lip
        shut[inner, 1] = shut[inner[0], 1] + upper_share * (shut[inner[1], 1] - shut[inner[0], 1])
        self.shut, self.smile = shut, smile
        origin = shut[CORNERS[2:]].mean(0)
        self.middles = smooth(shift) + self.planes @ origin + mean[CORNERS[2:], 2].mean() * depths
        self.max_opening = float(np.sort(self.opening)[-4:].mean())
        self.shut_frames = self.find_shut_frames()
        self.cells = Nodes(CANVAS, 1 / CELLS).positions                # (h, w, 2), of the bank
        self.jaw_drop = moves[0, 66, 1]                                # for a unit of opening
        self.sums, self.dark_colours = np.zeros((2, *self.cells.shape[:2], 4)), []

    def face_plane(self, t: int) -> FacePlane:
        return FacePlane(self.planes[t], self.middles[t])

    def find_shut_frames(self) -> np.ndarray:
        """Sorted numbers of frames with nearly shut lips: the least open within three frames, and low for this take.
        Pressed lips count as open by as much as they are thinner than usual."""
        lower, upper = self.frontal[:, LOWER_OUTER[1:4], 1].mean(1), self.frontal[:, UPPER_OUTER[1:4], 1].mean(1)
        thickness = lower - upper - self.opening
        cost = self.opening + np.maximum(0, np.median(thickness) - thickness)
        low = max(SHUT, cost.min() + 0.12 * self.max_opening)
        minima, has_neighbour, chosen = minimum_filter1d(cost, 7), np.zeros(self.T, bool), []
        for t in np.argsort(cost, kind="stable").tolist():
            limit = low if has_neighbour[t] else 1.6 * low             # far from other shut frames: less shut is enough
            if cost[t] == minima[t] and (not chosen or cost[t] < limit):
                chosen.append(t)
                has_neighbour[max(0, t - 15) : t + 16] = True
        return np.sort(chosen)

    def nearest_shut_frames(self, t: int) -> list[tuple[int, float]]:
        """The shut frames before and after t with their weights, which sum to 1"""
        i = int(np.searchsorted(self.shut_frames, t))
        if i == 0 or i == len(self.shut_frames) or self.shut_frames[i] == t:
            return [(int(self.shut_frames[min(i, len(self.shut_frames) - 1)]), 1.0)]
        before, after = self.shut_frames[i - 1 : i + 1].tolist()
        weight = float(smoothstep(np.float64((t - before) / (after - before))))
        return [(before, 1 - weight), (after, weight)]

    def source_points(self, t: int) -> np.ndarray:
        """Landmarks (68, 2) of frame t, local; the inner ones of nearly shut lips are moved into the lips"""
        s = self.face_plane(t).local(self.points[t])
        inset = SEAM_INSET * smoothstep(self.opening[t] / 0.04)
        for inner, outer in ((UPPER_INNER, UPPER_OUTER), (LOWER_INNER, LOWER_OUTER)):
            thickness = s[outer[1:4]] - s[inner[1:4]]
            length = np.maximum(np.linalg.norm(thickness, axis=1, keepdims=True), 1e-4)
            s[inner[1:4]] += thickness * np.minimum(0.3, inset / length)
        return s

    def target_points(self, t: int, opening: float, shape: np.ndarray) -> np.ndarray:
        """Target landmarks (68, 2), local: the shut mouth, opened by `opening` and formed by shape (K - 1,)"""
        target = self.shut + self.smile[t] + opening * self.moves[0] + np.einsum("k,kpi->pi", shape, self.moves[1:])
        missing = np.minimum(target[LOWER_INNER[1:4], 1] - target[UPPER_INNER[1:4], 1] - 0.15 * opening, 0)
        target[UPPER_INNER[1:4], 1] += missing / 2                     # lips do not cross
        target[LOWER_INNER[1:4], 1] -= missing / 2
        return self.face_plane(t).local(self.points[t]) + target - self.frontal[t]

    def add_to_bank(self, t: int, frame: np.ndarray):
        """Adds the inside of the mouth in frame t, if it is open far enough"""
        if self.opening[t] <= max(0.03, BANK_OPENING * self.max_opening):
            return
        place = self.face_plane(t)
        s = place.local(self.points[t])
        at = np.stack([self.cells, self.cells + (0, self.jaw_drop * self.opening[t])])  # (2, h, w, 2)
        skin = skin_colour(frame, self.points[t], place.scale)
        colours = np.stack([read_photo(frame, where) for where in place.pixels(at)]) / skin
        inside = np.minimum(*inner_lips(s, at))                        # (2, h, w)
        weight = smoothstep((inside - 0.013) / 0.019)[..., None] * (self.opening[t] / self.max_opening) ** 10
        self.sums += np.concatenate([weight * colours, weight], -1)
        if (inside[0] > 0.015).any():
            self.dark_colours.append(np.percentile(colours[0][inside[0] > 0.015], 15, axis=0))

    def finish_bank(self):
        """Averages the canvases; cells without a frame get the colour of their neighbours or of the cavity"""
        dark = self.dark_colours
        self.cavity = np.minimum(np.median(dark, 0), 0.45) if dark else np.array([0.27, 0.18, 0.18])
        near = gaussian_filter(self.sums, (0, 5, 5, 0))
        base = (near[..., :3] + 0.02 * self.cavity) / (near[..., 3:] + 0.02)
        full = (self.sums[..., :3] + 0.03 * base) / (self.sums[..., 3:] + 0.03)
        self.canvases = full.astype(np.float32)                        # (2, h, w, 3)

    def render_inside(self, v, q, d, e, opening: float) -> np.ndarray:
        """Inside of the mouth at v (h, w, 2), d below the upper and e above the lower lip of q -> (h, w, 3), skin is 1"""
        if not self.dark_colours or self.max_opening < TEETH_OPENING:  # painted teeth (photos: warp.lip_layers)
            half_width = (q[64, 0] - q[60, 0]) / 2
            x = v[..., 0] / half_width
            tall = 0.16 * half_width * np.sqrt(np.clip(1 - (x / 0.9) ** 2, 0, 1)) + 1e-6
            front = 1 - smoothstep((np.abs(x) - 0.25) / 0.6)
            visible = smoothstep((tall - d) / (0.3 * tall + 0.008) + 0.5)
            visible = visible * (0.25 + 0.75 * smoothstep(np.float64(opening / 0.1)))
            return self.cavity + (visible * (0.25 + 0.65 * front))[..., None] * (0.95 - self.cavity)
        skull = read_grid(self.canvases[0], v, CANVAS)
        jaw = read_grid(self.canvases[1], v - (0, self.jaw_drop * opening), CANVAS)
        colour = jaw + smoothstep((e - d) / np.maximum(d + e, 0.02) + 0.5)[..., None] * (skull - jaw)
        shade = 0.72 + 0.28 * smoothstep(np.minimum(d, 0.6 * e + 0.02) / 0.038)  # darker under the lip
        light = 0.35 + 0.65 * smoothstep(np.float64(opening / TEETH_OPENING))  # a narrow gap is dark and red
        return colour * shade[..., None] * light ** np.array([1, 1.3, 1.25])

    def render(self, t: int, frame: np.ndarray, shut_frames: list, opening: float, shape: np.ndarray) -> np.ndarray:
        """Frame t, uint8 (H, W, 3) -> the same with new lips. shut_frames: the nearest, (number, weight, frame) each"""
        place = self.face_plane(t)
        s, q = self.source_points(t), self.target_points(t, opening, shape)
        # upper left and lower right corner of the region, local; pixels outside stay unchanged
        top, low = np.array([-REGION[0], s[33, 1] - REGION[1]]), np.array([REGION[0], max(s[8, 1], 0.7) + REGION[2]])
        border = top + (low - top) * BORDER
        ellipse = (q[48:60].max(0) + q[48:60].min(0)) / 2, np.ptp(q[48:60], axis=0) / 2 + 0.03  # around the lips
        around = (ellipse[0] + RIM[1] * ellipse[1] * (2 * BORDER - 1)).clip(top, low)
        skin_nodes, lip_nodes = (Nodes(bounding_box(frame, place.pixels(p)), spacing * place.scale)
                                 for p, spacing in ((border, SKIN_NODE), (around, LIP_NODE)))
        at, lips_at = (place.local(nodes.flat) for nodes in (skin_nodes, lip_nodes))  # (n, 2), (m, 2)

        # fields from the target points back to those of this frame and of the shut frames, for the upper and lower lip
        sources = [s, *(self.source_points(k) for k, _, _ in shut_frames)]
        moves = np.stack(sources, 1) - q[:, None]                      # (68, 1 + shut frames, 2)
        fields = lip_surfaces(q, moves, np.r_[border, s[FIXED]], np.r_[at, lips_at])
        upper, lower = (field[: len(at), 0] for field in fields)
        lip_sources = np.stack([field[len(at) :, 1:] for field in fields]) + lips_at[:, None]  # (2, m, shut frames, 2)
        below = smoothstep((at[:, 1:] - q[[60, 62, 64, 66], 1].mean()) / 0.1 + 0.5)
        edge = smoothstep((np.minimum(at - top, low - at).min(1, keepdims=True) - SKIN_NODE / 2) / 0.15)
        moved = edge * (upper + below * (lower - upper)) @ place.plane.T
        out = read_photo(frame, skin_nodes.sources(skin_nodes.to_grid(-moved))).astype(float)
        (a0, b0, a1, b1), (x0, y0, x1, y1) = lip_nodes.box, skin_nodes.box
        area = slice(b0 - y0, b1 - y0), slice(a0 - x0, a1 - x0)
        out[area] = self.render_mouth(t, frame, shut_frames, out[area], lip_nodes, lip_sources, q, ellipse, opening)
        distances = [n for n, fades in zip((t + 1, self.T - t), self.fades) if fades]  # from unchanged frames
        weight = smoothstep(np.float64(min([FADE + 1, *distances]) / (FADE + 1)))
        result, old = frame.copy(), frame[y0:y1, x0:x1]
        result[y0:y1, x0:x1] = to_bytes(old + weight * (out - old))
        return result

    def render_mouth(self, t, frame, shut_frames, skin, nodes, sources, q, ellipse, opening) -> np.ndarray:
        """skin (h, w, 3) at `nodes` -> the same with the lips of shut frames, from sources (2, m, n, 2), and the bank"""
        place = self.face_plane(t)
        light, layers = skin_colour(frame, self.points[t], place.scale), 0
        for i, (k, weight, shut_frame) in enumerate(shut_frames):
            other = self.face_plane(k)
            gain = weight * light / skin_colour(shut_frame, self.points[k], other.scale)
            moved = (nodes.to_grid(nodes.flat - other.pixels(at)) for at in sources[:, :, i])
            layers = layers + gain * np.stack([read_photo(shut_frame, nodes.sources(field)) for field in moved])
        upper, lower = layers
        v = place.local(pixel_centres(nodes.box))
        d, e = inner_lips(q, v)
        within = (np.abs(v[..., 0] - (q[64, 0] + q[60, 0]) / 2) < (q[64, 0] - q[60, 0]) / 2)[..., None]
        soft = max(0.015, 1.5 / place.scale)
        above = np.where(within, smoothstep(0.5 - d / soft)[..., None], 1)
        under = np.where(within, 1 - smoothstep((e - 0.5 * soft) / soft)[..., None], 1)
        radius = np.linalg.norm((v - ellipse[0]) / ellipse[1], axis=-1)
        rim = smoothstep((RIM[1] - radius) / (RIM[1] - RIM[0]))[..., None]
        # match the colours at the rim, except where the face ends
        change = skin - np.where((d > e)[..., None], lower, upper)
        weight = 4 * rim * (1 - rim) * np.exp(-((change.mean(-1, keepdims=True) / COLOUR_RANGE) ** 2))
        sigma = (COLOUR_SIGMA * place.scale, COLOUR_SIGMA * place.scale, 0)
        tint = gaussian_filter(change * weight, sigma) / (gaussian_filter(weight, sigma) + 1e-3)
        patch = light * self.render_inside(v, q, d, e, opening)
        patch = patch + under * (lower + tint - patch)
        patch = patch + above * (upper + tint - patch)
        return skin + rim * (patch - skin)


# ------------------------------------------------------------------------------------------------------ the whole clip

def find_takes(path, net, moves: np.ndarray, n: int, number: int = 1) -> tuple[int, list[Take]]:
    """Number of frames, at most n, and the takes of a video. Raises InputError: no face that can be tracked"""
    (points, scene), mean = track_video(net, path, n, number), net.solid.double().numpy()
    usable = np.array([is_usable(p, mean) for p in points])
    ends = [0, *np.flatnonzero(np.diff(scene) | np.diff(usable)) + 1, len(points)]
    spans = [(a, b) for a, b in itertools.pairwise(ends) if usable[a] and b - a >= min(MIN_TAKE, len(points))]
    if not spans:
        few = "none" if number == 1 else f"fewer than {number}"
        raise InputError(f"{path}: no face that can be tracked (turned too far, hidden, shown briefly, or {few})")
    fades = [[0 <= k < len(scene) and scene[k] == scene[a] for k in (a - 1, b)] for a, b in spans]
    return len(points), [Take(a, points[a:b], mean, moves, fade) for (a, b), fade in zip(spans, fades)]


def is_usable(points: np.ndarray, mean: np.ndarray) -> bool:
    """Whether landmarks (68, 2) belong to a face that is neither turned too far nor hidden, which distorts them"""
    if not np.isfinite(points).all():
        return False
    scale, R, shift = fit_pose(points, mean)
    yaw, pitch, _ = angles(R)
    is_frontal = abs(yaw) < MAX_TURN[0] and abs(pitch) < MAX_TURN[1]
    return is_frontal and shape_error(points, mean, scale, R, shift) < MAX_SHAPE_ERROR


def frame_jobs(path, takes: list[Take], count: int, opening: np.ndarray, shape: np.ndarray):
    """Yields functions without arguments that return the frames, uint8 (H, W, 3), of a video of `count` frames with
    other lips: opening (T,), shape (T, K - 1). A video that is too short starts again."""
    take_of_frame = {take.first + t: (take, t) for take in takes for t in range(take.T)}
    for k, frame in enumerate(itertools.islice(read_video(path), count)):
        if k in take_of_frame:
            take, t = take_of_frame[k]
            take.add_to_bank(t, frame)
    for take in takes:
        take.finish_bank()
    for begin in range(0, len(opening), count):
        lookahead, stored = enumerate(read_video(path)), {}            # a second reader, for the next shut frames
        for k, frame in enumerate(itertools.islice(read_video(path), min(count, len(opening) - begin))):
            if k not in take_of_frame:
                yield lambda frame=frame: frame
                continue
            take, t = take_of_frame[k]
            first, nearest = take.first, take.nearest_shut_frames(t)
            while first + nearest[-1][0] not in stored:
                number, later_frame = next(lookahead)
                if number - first in take.shut_frames:
                    stored[number] = later_frame
            stored = {number: later for number, later in stored.items() if number >= first + nearest[0][0]}
            shut_frames = [(i, weight, stored[first + i]) for i, weight in nearest]
            yield partial(take.render, t, frame, shut_frames, float(opening[begin + k]), shape[begin + k])
