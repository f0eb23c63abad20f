"""The toy world: drawn faces and synthesised speech with ground truth. Ours: training, tests and metrics run anywhere,
and the control table can measure which parts of an image each input moves.

A person is a set of flat colours and shapes on a head that turns in 2.5-D. The voice is a small formant synthesiser
(source and filter, as in Klatt, JASA 1980). Head and eyes move independently of the speech.

    python toyfaces.py --out out                                   # out/toys.png and out/toy.mp4    (5 s)
    python toyfaces.py --pack out/toy32 --size 32 --people 300     # a pack to train on              (1 min)

Axes: T frames, H W, n sound samples, K control steps of 5 ms. Head units: half a head is 1 high; x right, y down,
z towards the viewer, origin in the middle of the head. who: a person of make_person. state: {factor: value}.
"""

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from audio import n_frames
from data import Pack, PackWriter
from media import (
    FPS, SAMPLE_RATE, InputError, Parser, check_output, make_folder, parallel_map, run, wrap_os_errors, write_video)
from report import image_grid

FACTORS = ("yaw", "pitch", "roll", "blink", "gaze_x", "gaze_y", "brow", "smile", "open", "wide")
REST = dict(zip(FACTORS, (0.0,) * 7 + (0.35, 0.0, 0.5)))  # frontal, eyes open, a closed mouth with a slight smile
MAX_YAW, MAX_PITCH, MAX_ROLL = 22.0, 16.0, 13.0  # degrees, ours: beyond, features leave the silhouette
TRAIN_SEED, TUNE_SEED, TEST_SEED = 0, 1_000_000, 2_000_000  # first person of each split; splits do not overlap
SPLITS = dict(train=(TRAIN_SEED, 400), tune=(TUNE_SEED, 40), test=(TEST_SEED, 40))  # first person, number of people
WORLD_VERSION = 1  # increased with each change of drawing or sound: packs of another version are refused

# --------------------------------------------------------------------------------------------------------------- people

def palette(colours: str) -> np.ndarray:
    """Hexadecimal RGB colours -> float (n, 3) in 0..255"""
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()], float)


SKINS = palette("ffe0c6 f6cdac e6b48e cc9670 a67050 80543c")
HAIRS = palette("30262a 523428 80502e b67a3a e8c26c c65234 a6a8b2 ec84a0 40929e")
IRISES = palette("523422 3a744e 3878ba 785c32 586676")
BACKDROPS = palette("b8dbec eed5bc cae4ca e8cee2 f5e6b8 cccef0")
CLOTHES = palette("de5c54 467ac2 50a27c f2b64a 8468b8 3e4a62 f0eee8")
GLASSES = palette("2c2e3e 703c28 b0303e 22546e")  # their frames
WHITE, INK = palette("ffffff 2e2026")
# hair styles: height of the hairline at t, -1..1 across the forehead; mirrored where the parting is on the other side
STYLES = dict(
    crop=lambda t: -0.60 - 0.05 * np.cos(3 * np.pi * t * 0.9),
    side=lambda t: -0.44 - 0.26 * np.exp(-(((t + 0.40) / 0.30) ** 2)) + 0.05 * t,
    bob=lambda t: -0.47 + 0.06 * t**2,
    long=lambda t: -0.42 - 0.40 * np.exp(-((np.abs(t) / 0.42) ** 1.5)),
    curls=lambda t: -0.55 + 0.045 * np.cos(t * 13),
    bun=lambda t: -0.66 + 0.08 * t**2,
    bald=None,
    quiff=lambda t: -0.66 - 0.04 * np.cos(np.pi * t) + 0.06 * t,
    tails=lambda t: -0.50 - 0.30 * np.exp(-((np.abs(t) / 0.35) ** 1.4)),
)


def make_person(seed: int) -> SimpleNamespace:
    """The person of a seed >= 0, the same on every machine: RGB colours in 0..255, lengths in head units"""
    rng = np.random.default_rng([seed, 1])

    def pick(options):
        return options[rng.integers(len(options))]

    high = rng.uniform()  # 0: deep voice and long vocal tract; 1: high voice and short vocal tract
    shade = rng.uniform(0, len(SKINS) - 1)
    skin = blend(SKINS[int(shade)], SKINS[min(int(shade) + 1, len(SKINS) - 1)], shade % 1)
    style = pick(list(STYLES))
    bearded = high < 0.45 and style not in ("bob", "long", "tails")
    return SimpleNamespace(  # a different order of these draws would give different people
        seed=seed, skin=skin, hair=pick(HAIRS), iris=pick(IRISES), backdrop=pick(BACKDROPS), clothes=pick(CLOTHES),
        frames=pick(GLASSES), style=style, side=int(pick((-1, 1))),  # side of the parting
        width=rng.uniform(0.78, 0.90), chin=rng.uniform(0.76, 0.97),  # half the width; 1 is a square chin
        eye_apart=rng.uniform(0.36, 0.41), eye_size=rng.uniform(0.92, 1.10), brow=rng.uniform(0.065, 0.10),
        nose=rng.uniform(0.8, 1.2), lips=rng.uniform(0.75, 1.25), mouth=rng.uniform(0.95, 1.07),
        blush=rng.uniform(0.2, 0.7), collar=pick(("round", "shirt")),
        glasses=rng.choice(("none", "round", "square"), p=(0.70, 0.18, 0.12)).item(),
        beard=rng.choice(("none", "full", "moustache"), p=(0.45, 0.35, 0.20) if bearded else (1, 0, 0)).item(),
        earrings=bool(rng.random() < (0.1 if high < 0.45 else 0.45)), f0=95 * 2.4**high,  # pitch, Hz
        tract=0.93 + 0.17 * high + rng.uniform(-0.02, 0.02))  # factor on the formants, by the vocal tract's length


# -------------------------------------------------------------------------------------------------------------- drawing

ANGLE = np.linspace(0, 2 * np.pi, 40, endpoint=False)
COS, SIN = np.cos(ANGLE), np.sin(ANGLE)
U = np.linspace(-1, 1, 25)  # positions across the mouth and the hairline
SIDES = (-1, 1)
DEPTH = 0.68  # of the head, ours: flatter than real heads, so that eyes stay on the face at 22 degrees
PIVOT = np.array((0.0, 0.5, 0.22))  # centre of rotation, ours: a nod keeps eyes and mouth in their template boxes


def blend(a, b, t: float):
    return a * (1 - t) + b * t


def rounded(c, power: float):
    """Cosines or sines of a circle -> those of a superellipse, squarer for smaller powers"""
    return np.sign(c) * np.abs(c) ** power


class Head:
    """Geometry of the turned head, and drawing on an image of S x S pixels"""

    def __init__(self, who, state: dict, size: int, supersample: int):
        self.who, self.state, S = who, REST | state, size * supersample
        # small: 0 from 64 px on, 1 at 32 px and below. Small portraits have a larger head, larger eyes and a larger mouth
        small = float(np.clip(np.log2(64 / size), 0, 1))
        self.feature = 1 + 0.25 * small  # scale of eyes, brows and mouth
        self.unit = S * 0.305 * (1 + 0.15 * small)
        self.middle = np.array((0.5, 0.497 - 0.018 * small)) * S
        yaw, pitch, roll = np.deg2rad([self.state[name] for name in ("yaw", "pitch", "roll")])
        (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
        self.centre = self.middle + (0.15 * sy * self.unit, 0)  # a turn also shifts the head a little
        turn = np.array(((cy, 0, sy), (0, 1, 0), (-sy, 0, cy)))
        nod = np.array(((1, 0, 0), (0, cp, sp), (0, -sp, cp)))
        tilt = np.array(((cr, -sr, 0), (sr, cr, 0), (0, 0, 1)))
        self.rotation = tilt @ nod @ turn
        # scales outlines in x and y: a flat outline shrinks when it turns, the silhouette of an ellipsoid does not
        self.swell = np.hypot(cy, sy * DEPTH / who.width) / cy, np.hypot(cp, sp * DEPTH / 1.04) / cp
        self.image = Image.new("RGB", (S, S), tuple(who.backdrop.astype(int)))
        self.pen = ImageDraw.Draw(self.image)

    # head units to pixels: x, y (n,) -> (n, 2)
    def plane(self, x, y, z=0.0):  # a flat shape at depth z that turns with the head
        points = np.stack(np.broadcast_arrays(x, y, z), 1) - PIVOT
        points = points @ self.rotation.T + PIVOT
        return self.centre + points[:, :2] * (self.unit * (1 + 0.10 * points[:, 2:]))  # weak perspective

    def outline(self, x, y, z=0.0):  # a silhouette at depth z that keeps its width when the head turns
        return self.plane(np.asarray(x) * self.swell[0], np.asarray(y) * self.swell[1], z)

    def surface(self, x, y, lift=0.0):  # on the front of the head, or `lift` in front of it
        z = DEPTH * np.sqrt(np.clip(1 - 0.92 * (x / self.who.width) ** 2 - 0.8 * y**2, 0.0, 1))
        return self.plane(x, y, z + lift)

    def body(self, x, y):  # on the shoulders, which do not turn
        return self.middle + np.stack(np.broadcast_arrays(x, y), 1) * self.unit

    # drawing
    def fill(self, colour, *lines):  # the polygon of these lines, (n, 2) each, one after another
        self.pen.polygon(np.concatenate(lines).ravel().tolist(), fill=tuple(map(int, colour)))

    def oval(self, colour, place, centre: tuple, radii: tuple):  # place: plane, outline, surface or body
        self.fill(colour, place(centre[0] + COS * radii[0], centre[1] + SIN * radii[1], *centre[2:]))

    def stroke(self, colour, width, points):
        """A line with round ends, as one polygon. width: in head units, one number or one per point"""
        w = np.broadcast_to(np.asarray(width) * self.unit / 2, len(points))[:, None]
        along = np.gradient(points, axis=0)
        along /= np.maximum(np.hypot(along[:, :1], along[:, 1:]), 1e-6)
        across = along[:, ::-1] * (-1, 1)
        a = np.linspace(0, np.pi, 7)[1:-1, None]
        tail = points[-1] + w[-1] * (across[-1] * np.cos(a) + along[-1] * np.sin(a))
        head = points[0] - w[0] * (across[0] * np.cos(a) + along[0] * np.sin(a))
        self.fill(colour, points + w * across, tail, (points - w * across)[::-1], head)

    # curves in head units, both for drawing and for landmarks
    def face_edge(self, a, grow=0.0):
        """Outline of the face at angles a (0 right ear, pi/2 chin). The chin sinks when the mouth opens."""
        below = np.clip(np.sin(a), 0, 1)
        taper = 1 - (1 - self.who.chin) * below**2
        x = rounded(np.cos(a), 0.86) * (self.who.width + grow) * taper
        return x, np.sin(a) * (1.04 + grow) + 0.07 * self.state["open"] * below**4

    def eye_shape(self):
        """Half the width and half the height of an open eye, and y of its middle"""
        size = self.who.eye_size * self.feature
        return 0.178 * size, 0.158 * size, -0.07 - 0.16 * (self.feature - 1)

    def brow_curve(self, t):
        """x and y of the brow on the right of the picture. t: -1 at the nose, 1 at the temple"""
        x = self.who.eye_apart + 0.01 + t * 0.19 * self.feature
        rest = -0.37 - 0.05 * (self.feature - 1)
        return x, rest - 0.085 * self.state["brow"] + 0.075 * (t + 0.05) ** 2 + 0.02 * t

    def nose_base(self, t):
        x = np.linspace(-0.10, 0.10, len(t)) * self.who.nose
        return self.surface(x, 0.275 + 0.055 * (1 - t**2), 0.10)

    def mouth_curves(self):
        """Half the width; y at U of the line where the lips meet, of the inner and of the outer edges of both lips"""
        who, gap, wide, f = self.who, self.state["open"], self.state["wide"], self.feature
        half = (0.145 + 0.245 * wide) * who.mouth * (1 - 0.06 * gap) * (1 + 0.2 * (f - 1))
        y0, tall = 0.585 - 0.14 * (f - 1), 1 + 0.5 * (f - 1)
        arc = np.sqrt(np.clip(1 - U**2, 0, 1))
        smile = (0.13 * self.state["smile"] + 0.02) * min(1.0, half / 0.3)  # lifts the corners; less in a round mouth
        middle = y0 + 0.02 * gap - smile * (U**2 - 0.35)
        up, down = middle - 0.085 * tall * gap * arc, middle + 0.285 * tall * gap * arc**0.8
        thick = who.lips * (1.15 - 0.3 * wide) * f
        bow = arc**0.7 * (1 - 0.22 * np.exp(-((U / 0.16) ** 2)))  # Cupid's bow
        return half, middle, up, down, up - 0.052 * thick * bow, down + 0.072 * thick * arc**0.7


def draw(who, state: dict, size: int, supersample: int = 4) -> np.ndarray:
    """A portrait, uint8 (size, size, 3) RGB. state: any of FACTORS, by default as in REST. Yaw > 0 turns to the right of
    the picture, pitch > 0 nods down, roll > 0 tilts clockwise, in degrees; blink, open, wide in 0..1; others in -1..1"""
    unknown = set(state) - set(FACTORS)
    assert not unknown and size >= 8, f"draw: unknown factors {sorted(unknown)} or size {size} below 8"
    head = Head(who, state, size, supersample)
    head.oval(blend(who.backdrop, WHITE, 0.5), head.body, (0, -0.1), (1.44, 1.44))
    for draw_part in (draw_back_hair, draw_body, draw_face, draw_eyes, draw_nose, draw_mouth, draw_front_hair,
                      draw_brows, draw_glasses):  # from back to front
        draw_part(head, who)
    return np.asarray(head.image.reduce(supersample))


def compute_landmarks(who, state: dict, size: int) -> np.ndarray:
    """iBUG's 68 landmarks of draw(who, state, size), float32 (68, 2): x, y in pixels, on the drawn curves"""
    head = Head(who, state, size, 1)
    jaw = head.outline(*head.face_edge(np.pi - np.arange(17) * np.pi / 16))
    x, y = head.brow_curve(np.linspace(1, -1, 5))  # from temple to nose
    brows = head.surface(-x, y), head.surface(x[::-1], y[::-1])
    ridge = head.surface(np.zeros(4), np.linspace(-0.02, 0.25, 4), 0.09)
    a = np.pi * (1 + np.arange(6) / 3)  # clockwise from the left corner
    half_w, half_h, y0 = head.eye_shape()
    x, y = np.cos(a) * half_w, y0 + np.sin(a) * half_h * (1 - head.state["blink"])
    eyes = [head.surface(side * who.eye_apart + x, y) for side in SIDES]
    half, _, up, down, top, bottom = head.mouth_curves()
    # indices in U: outer edge of the lips clockwise from the left corner, then their inner edge
    outer_up, outer_down, inner_up, inner_down = np.r_[0:25:4], np.r_[20:0:-4], np.r_[0:25:6], np.r_[18:0:-6]
    x = U[np.concatenate((outer_up, outer_down, inner_up, inner_down))] * half
    y = np.concatenate((top[outer_up], bottom[outer_down], up[inner_up], down[inner_down]))
    points = jaw, *brows, ridge, head.nose_base(U[::6]), *eyes, head.surface(x, y, 0.02)
    return np.concatenate(points).astype(np.float32)


def draw_back_hair(head, who):
    w, shade, drop = who.width, who.hair * 0.82, {"long": 1.55, "bob": 0.95}.get(who.style)
    if drop:
        x = rounded(COS, 0.6) * (w + 0.17 + 0.05 * np.clip(SIN, 0, 1))
        head.fill(shade, head.outline(x, np.where(SIN > 0, SIN * drop, SIN * 1.12), -0.3))
    if who.style == "curls":
        for a in np.linspace(-0.35, np.pi + 0.35, 11):
            head.oval(shade, head.plane, (np.cos(a) * (w + 0.22), -0.34 - np.sin(a) * 0.82, -0.2), (0.29, 0.29))
    if who.style == "bun":
        head.oval(shade, head.plane, (0, -1.22, -0.2), (0.34, 0.30))
    for side in SIDES if who.style == "tails" else ():
        head.oval(who.hair, head.plane, (side * (w + 0.30), -0.52, -0.25), (0.30, 0.34))
        head.oval(who.clothes, head.plane, (side * (w + 0.05), -0.60, -0.2), (0.10, 0.13))


def draw_body(head, who):
    """Clothes, neck, collar and ears. The neck leans with the head."""
    head.fill(who.clothes, head.body(rounded(COS, 0.7) * 1.42, 2.12 + SIN * 0.86))
    base = head.body(COS[:21] * 0.40, 1.32 + SIN[:21] * 0.20)
    head.fill(blend(who.skin, who.skin * (0.78, 0.70, 0.70), 0.9), head.plane((-0.34, 0.34), 0.7, -0.1), base)
    if who.collar == "round":
        head.stroke(who.clothes * 0.85, 0.10, base)
    for side in SIDES:
        if who.collar == "shirt":
            x, y = np.array((0.36, 0.46, 0.30, 0.02)) * side, (1.22, 1.36, 1.74, 1.52)
            head.fill(blend(who.clothes, WHITE, 0.55), head.body(x, y))
        x = side * (who.width + 0.02)
        head.oval(who.skin * 0.90, head.outline, (x, 0.08, -0.10), (0.15, 0.21))
        x = x + side * 0.03
        head.oval(who.skin * (0.80, 0.70, 0.70), head.outline, (x, 0.08, -0.10), (0.07, 0.11))
        if who.earrings:
            head.oval((250, 208, 84), head.outline, (x, 0.33, -0.10), (0.085, 0.085))


def draw_face(head, who):
    head.fill(who.skin, head.outline(*head.face_edge(ANGLE)))
    for side in SIDES:
        rosy = blend(who.skin, np.array((238.0, 92, 96)), 0.42 * who.blush)
        head.oval(rosy, head.surface, (side * 0.46, 0.32), (0.16, 0.105))
    if who.style == "bald":
        shine = head.surface(np.linspace(-0.42, -0.05, 9), -0.76 - 0.06 * np.cos(U[::3]))
        head.stroke(blend(who.skin, WHITE, 0.35), 0.07, shine)
    if who.beard == "full":
        a = np.linspace(-0.12, np.pi + 0.12, 28)
        dip = np.sin(a[::-1])
        y = 0.26 + 0.50 * dip + 0.10 * head.state["open"] * np.clip(dip, 0, 1) ** 2
        head.fill(who.hair * 0.88, head.outline(*head.face_edge(a, 0.03)), head.surface(np.cos(a[::-1]) * 0.54, y))


def draw_eyes(head, who):
    size, state, (half_w, half_h, y0) = who.eye_size * head.feature, head.state, head.eye_shape()
    slit, iris = half_h * (1 - state["blink"]), (0.085 * size * state["gaze_x"], 0.06 * size * state["gaze_y"])
    shut = slit <= 0.2 * half_h
    # lashes follow the upper lid; on a shut eye they bend down
    lash = (1 - U**2) * 0.05 * size if shut else -np.sqrt(np.clip(1 - (U * 0.98) ** 2, 0, 1)) * slit
    for side in SIDES:
        x0 = side * who.eye_apart
        if not shut:
            head.oval(WHITE, head.surface, (x0, y0), (half_w, slit))
            discs = (0.112, 0, 0, who.iris), (0.064, 0, 0, INK * 0.6), (0.036, -0.04, -0.045, WHITE)
            for radius, dx, dy, colour in discs:  # iris, pupil, highlight
                x, y = COS * radius * size + iris[0] + dx * size, SIN * radius * size + iris[1] + dy * size
                outside = np.maximum(np.hypot(x / half_w, y / slit), 1)  # points under the lids move to their edge
                head.fill(colour, head.surface(x0 + x / outside, y0 + y / outside))
        head.stroke(INK, 0.055 * size, head.surface(x0 + U[::2] * half_w * 1.05, y0 + lash[::2]))


def draw_brows(head, who):
    # a mix of hair and a dark skin colour, which is visible on every person
    colour, (x, y) = blend(who.hair * 0.75, who.skin * (0.36, 0.32, 0.32), 0.55), head.brow_curve(U[::2])
    for side in SIDES:
        head.stroke(colour, who.brow * (1 - 0.45 * (U[::2] + 1) / 2), head.surface(side * x, y))


def draw_nose(head, who):
    """Nose, and the moustache below it"""
    shade = who.skin * (0.84, 0.76, 0.74)
    head.stroke(shade, 0.06, head.nose_base(U[::3]))
    x = np.full(5, -0.035) - 0.035 * who.nose * np.linspace(0, 1, 5) ** 2
    head.stroke(shade, 0.035, head.surface(x, np.linspace(0.04, 0.25, 5), 0.09))
    if who.beard != "none":
        y = 0.435 - 0.03 * (head.feature - 1) + 0.10 * U**2 - 0.05 * np.abs(U)
        head.stroke(who.hair * 0.80, 0.035 + 0.085 * (1 - U**2), head.surface(U * 0.30, y, 0.04))


def draw_mouth(head, who):
    """Lips and the line where they meet. In an open mouth: the dark inside, tongue and upper teeth"""
    gap, f = head.state["open"], head.feature
    half, middle, up, down, top, bottom = head.mouth_curves()
    red = blend(who.skin * (0.88, 0.62, 0.62), np.array((208.0, 66, 82)), 0.62)

    def fill_between(a, b, colour, skip=0):  # from curve a down to curve b, without `skip` points at each end
        keep = slice(skip, len(U) - skip)
        x = np.append(U[keep], U[keep][::-1]) * half
        head.fill(colour, head.surface(x, np.append(a[keep], b[keep][::-1]), 0.02))

    fill_between(top, bottom, red)
    head.stroke(blend(red, INK, 0.75), 0.048 * f * (1 - 0.3 * U**2), head.surface(U * half * 1.06, middle, 0.02))
    if gap >= 0.04:  # a polygon without area would still be drawn a pixel wide
        fill_between(up, down, (92, 22, 34))
    if gap > 0.1:
        height, tongue = down - up, np.sqrt(np.clip(1 - (U / 0.72) ** 2, 0, 1))
        fill_between(down - 0.42 * height * tongue, down - 0.04 * height, (232, 108, 116), 4)  # tongue
        fill_between(up, up + np.minimum(0.40 * height, 0.085 * f) * (1 - 0.15 * U**2), (252, 250, 246), 2)  # teeth


def draw_front_hair(head, who):
    """Hair between the silhouette and a hairline on the face, so that a turn opens no gap; side locks; a highlight"""
    if who.style == "bald":
        return
    w, drop = who.width, {"long": 1.25, "bob": 0.78}.get(who.style)
    ear_y = {"bob": 0.0, "long": 0.0, "curls": -0.10}.get(who.style, 0.02)  # where the hairline meets the ears
    line = blend(STYLES[who.style](U * who.side), ear_y, np.clip((np.abs(U) - 0.80) / 0.20, 0, 1) ** 1.5)
    edge = w * np.sqrt(1 - (line / 1.06) ** 2) * 0.99  # half the width of the head at that height
    a = np.linspace(0.02, -np.pi - 0.02, 33)  # from the right ear over the top to the left ear
    rise = 0.15 * np.exp(-(((np.cos(a) * who.side + 0.30) / 0.60) ** 2)) if who.style == "quiff" else 0.0
    grow = 0.13 if who.style == "curls" else 0.075
    cap = head.outline(np.cos(a) * (w + grow), np.sin(a) * (1.04 + grow + rise))
    head.fill(who.hair, cap, head.surface(U * edge, line, 0.02))
    for t in np.linspace(-0.75, 0.75, 6) if who.style == "curls" else ():
        head.oval(who.hair, head.surface, (t * w, -0.70 + 0.22 * t * t, 0.02), (0.17, 0.15))
    s = np.linspace(0, 1, 14)
    for side in SIDES if drop else ():
        outer = head.outline(side * (w + 0.09 + 0.10 * np.sin(s * np.pi * 0.8)), -0.25 + (drop + 0.25) * s)
        x = side * (w * (0.90 - 0.06 * np.sin(s * np.pi)) + 0.10 * s**3)
        head.fill(who.hair, outer, head.surface(x, -0.45 + (drop + 0.40) * s)[::-1])
    t = np.linspace(-0.5, 0.05, 9) * who.side * -1
    head.stroke(blend(who.hair, WHITE, 0.28), 0.075 * (1 - 0.8 * U[::3] ** 2), head.surface(t * w, -0.87 + 0.16 * t**2))


def draw_glasses(head, who):
    if who.glasses == "none":
        return
    power, r_x, r_y = dict(round=(1.0, 0.262, 0.25), square=(0.55, 0.25, 0.21))[who.glasses]
    grow, rim = 1 + 0.7 * (head.feature - 1), 0.05 * head.feature
    r_x, r_y, closed = r_x * grow, r_y * grow, np.r_[0:40, 0]
    cx, cy = rounded(COS, power)[closed], rounded(SIN, power)[closed]
    for side in SIDES:
        x0, y0 = side * who.eye_apart, -0.06 - 0.16 * (head.feature - 1)
        outer, inner = (head.surface(x0 + cx * (r_x + d), y0 + cy * (r_y + d), 0.05) for d in (rim / 2, -rim / 2))
        head.fill(who.frames, outer, inner[::-1])
        x = side * np.linspace(who.eye_apart + r_x, who.width, 4)
        head.stroke(who.frames, rim, head.surface(x, np.full(4, -0.09), 0.03))
    t = np.linspace(-1, 1, 5)
    bridge = head.surface(t * max(who.eye_apart - r_x, 0.03), -0.09 - 0.03 * (1 - t**2), 0.08)
    head.stroke(who.frames, rim, bridge)


# --------------------------------------------------------------------------------------------------------------- speech

STEP = 0.005  # seconds between values of the synthesiser's controls
# first three formants of an adult, Hz (close to Peterson and Barney, JASA 1952)
VOWELS = dict(a=(760, 1250, 2600), e=(500, 1900, 2600), i=(290, 2300, 3000), o=(500, 850, 2500), u=(310, 700, 2400))
VOWEL_ODDS = (0.30, 0.18, 0.18, 0.18, 0.16)
CONSONANTS = dict(m=0.14, b=0.12, p=0.12, s=0.10, t=0.10, l=0.12, n=0.10, k=0.08) | {"": 0.12}  # their probabilities
CLOSURES = ("m", "b", "p")  # consonants with closed lips
VOICED = {"m": 0.35, "n": 0.35, "l": 0.5, "b": 0.12, "": 1.0}  # strength of the voice during a consonant
PAUSE = 0.14  # probability of a pause before a syllable


def sample_syllables(rng, seconds: float) -> list[tuple]:
    """Random speech: a list of (start, length of consonant, length of vowel, consonant, vowel, stress). In seconds"""
    syllables, now = [], rng.uniform(0, 0.25)
    while now < seconds:
        if rng.random() < PAUSE:
            now += rng.uniform(0.2, 0.55)
            continue
        consonant = rng.choice(list(CONSONANTS), p=list(CONSONANTS.values())).item()
        vowel = rng.choice(list(VOWELS), p=VOWEL_ODDS).item()
        onset, length = rng.uniform(0.06, 0.10) if consonant else 0.0, rng.uniform(0.12, 0.26)
        syllables.append((now, onset, length, consonant, vowel, rng.uniform(0.8, 1.25)))
        now += onset + length
    return syllables


def smooth(x, steps: int):
    """Hann-weighted running mean over axis 0, (K, ..) -> (K, ..)"""
    kernel = np.hanning(steps + 2)[1:-1]
    ends = [(steps // 2, steps - 1 - steps // 2)] + [(0, 0)] * (x.ndim - 1)
    return np.apply_along_axis(np.convolve, 0, np.pad(x, ends, "edge"), kernel / kernel.sum(), "valid")


def make_controls(syllables: list[tuple], K: int) -> dict:
    """Syllables -> controls of the synthesiser: formants (K, 3) in Hz; voice, hiss, nasal, closed (lips) and speaking
    (within a syllable), each (K,) in 0..1; stress (K,) around 1."""
    formants, stress = np.full((K, 3), (500.0, 1500.0, 2500.0)), np.ones(K)  # formants of a neutral vocal tract
    voice, hiss, nasal, closed, speaking = np.zeros((5, K))
    for start, onset, length, consonant, vowel, accent in syllables:
        a, b, c = (min(K, round(t / STEP)) for t in (start, start + onset, start + onset + length))
        formants[a:c], speaking[a:c] = VOWELS[vowel], 1
        voice[a:b], voice[b:c], stress[b:c] = VOICED.get(consonant, 0.0), 1, accent
        nasal[a:b], closed[a:b] = consonant in ("m", "n"), consonant in CLOSURES
        if consonant == "s":
            hiss[a:b] = 0.5
        elif consonant in ("p", "t", "k"):
            hiss[max(a, b - 4) : b] = 0.4  # the burst: 20 ms
        if consonant and consonant not in CLOSURES:  # the tongue is raised: low F1, F2 half-way to the locus
            formants[a:b, 0] = 300
            formants[a:b, 1] = 0.5 * VOWELS[vowel][1] + 0.5 * (1700 if consonant in "stn" else 1400)
    # running means of n steps of 5 ms: jaw and formants over 75 ms, lips over 45 ms
    return dict(formants=smooth(formants, 15), speaking=smooth(speaking, 15), stress=smooth(stress, 31),
                voice=smooth(voice, 7), hiss=smooth(hiss, 5), nasal=smooth(nasal, 7), closed=smooth(closed, 9))


def move_lips(c: dict):
    """Controls -> open, wide (K,). F1 opens the lips, F2 widens them; m, b, p and silence close them."""
    F1, F2 = c["formants"][:, 0], c["formants"][:, 1]
    gap = 0.12 + 0.88 * np.clip((F1 - 250) / 480, 0, 1)  # "ee" leaves a slit
    gap = gap * (1 - np.clip(1.25 * c["closed"], 0, 1)) * c["speaking"]
    wide = np.clip((F2 - 700) / 1500, 0, 1)  # "oo" is round, "ee" is wide, a resting mouth is half as wide
    return gap, blend(0.5, wide, c["speaking"])


def synthesise_voice(rng, c: dict, who, n: int) -> np.ndarray:
    """Controls -> sound, float32 (n,). The source is a saw-tooth and noise; formants filter it every 5 ms."""
    K, hop = len(c["stress"]), round(STEP * SAMPLE_RATE)
    size, t = 4 * hop, np.arange(n) / SAMPLE_RATE
    # the pitch rises and falls slowly, and with stress
    melody = 1 + 0.10 * np.sin(2 * np.pi * (rng.uniform(0.25, 0.6) * t + rng.random()))
    melody += 0.06 * (np.interp(t, np.arange(K) * STEP, c["stress"]) - 1)
    saw = 1 - 2 * ((np.cumsum(who.f0 * melody) / SAMPLE_RATE + rng.random()) % 1)
    glottis = np.diff(np.maximum(saw, -0.2), prepend=0) + 0.35 * saw
    noise = rng.standard_normal(n)

    # frames of 20 ms, padded to 40 ms for the decay of the filters
    f = np.fft.rfftfreq(2 * size, 1 / SAMPLE_RATE)  # Hz
    shape = np.ones((K, len(f))) / np.sqrt(1 + (f / 3500) ** 4)
    for j, bandwidth in enumerate((80, 110, 160)):  # Hz
        centre = c["formants"][:, j : j + 1] * who.tract
        shape *= centre**2 / np.sqrt((centre**2 - f**2) ** 2 + (bandwidth * f) ** 2)
    nasal = 3 / np.sqrt(1 + (f / 350) ** 4)
    shape = blend(shape, nasal, c["nasal"][:, None]) * (0.10 * c["voice"][:, None])
    hiss = np.exp(-(((f - 5200) / 1500) ** 2)) * (0.12 * c["hiss"][:, None])
    frames = np.arange(K)[:, None] * hop + np.arange(size)  # (K, size): indices in the sound, padded by half a frame

    def spectrum(x):
        return np.fft.rfft(np.pad(x, (size // 2, 2 * size))[frames] * np.hanning(size + 1)[:-1], 2 * size)

    y = np.fft.irfft(spectrum(glottis) * shape + spectrum(noise) * hiss, 2 * size).reshape(K, -1, hop)
    wav = np.zeros((K + y.shape[1], hop))
    for m in range(y.shape[1]):  # overlap-add
        wav[m : m + K] += y[:, m]
    wav = np.pad(wav.ravel()[size // 2 :], (0, n))[:n]
    wav = 0.8 * wav / max(np.abs(wav).max(), 1e-3)
    wav += 0.0015 * rng.standard_normal(n)  # room noise: recordings have no digital silence
    return np.clip(wav, -1, 1).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------- motion

def sway(rng, T: int, seconds: float, reach: float):
    """A smooth curve (T,) within +-reach that turns back every `seconds`, so that each clip covers much of the range"""
    turns = int(T / FPS / seconds) + 3
    knots = rng.choice(SIDES) * (-1) ** np.arange(turns) * rng.uniform(0.15, 1.0, turns) * reach
    position = np.arange(T) / FPS / seconds + rng.random()
    i = position.astype(int)
    return blend(knots[i], knots[i + 1], 0.5 - 0.5 * np.cos(np.pi * (position - i)))


def sample_motion(rng, T: int) -> dict:
    """All factors except open and wide, each (T,): yaw, pitch, roll in degrees; blink in 0..1; others in -1..1"""
    gaze, blink, t = np.zeros((T, 2)), np.zeros(T), 0
    while t < T:  # a new target every 0.3 to 1.2 s; two of five are straight ahead
        hold = int(rng.integers(8, 31))
        gaze[t : t + hold] = rng.uniform(-1, 1, 2) * (rng.random() > 0.4)
        t += hold

    def turn(deviation, seconds, reach, limit):
        return np.clip(rng.normal(0, deviation) + sway(rng, T, seconds, reach), -limit, limit)

    factors = dict(yaw=turn(3, 1.1, 20.0, MAX_YAW), pitch=turn(2, 0.9, 14.0, MAX_PITCH),
                   roll=turn(1.5, 1.4, 11.0, MAX_ROLL), gaze_x=gaze[:, 0], gaze_y=gaze[:, 1], blink=blink)
    t = int(rng.integers(4, 60))
    while t < T:  # a blink of five frames every 1.5 to 4 s
        blink[t : t + 5] = (0.6, 1.0, 1.0, 0.9, 0.4)[: T - t]
        t += int(rng.integers(38, 101))
    factors["brow"] = sway(rng, T, 0.8, 1.0)
    factors["smile"] = np.clip(rng.normal(0.3, 0.3) + sway(rng, T, 1.6, 0.4), -0.5, 1)
    return factors


# ------------------------------------------------------------------------------------------------------ clips and packs

def make_clip_truth(seed: int, seconds: float, who):
    """A clip before it is drawn -> wav, float32 (n,) at 16 kHz in [-1, 1]; truth, float32 (T, 10) in order of FACTORS"""
    rng, n = np.random.default_rng([seed, 2]), round(seconds * SAMPLE_RATE)
    c = make_controls(sample_syllables(rng, seconds), -(-n // round(STEP * SAMPLE_RATE)))
    wav, middles = synthesise_voice(rng, c, who, n), (np.arange(n_frames(n)) + 0.5) / FPS
    gap, wide = (np.interp(middles, np.arange(len(x)) * STEP, x) for x in move_lips(c))
    factors = dict(sample_motion(np.random.default_rng([seed, 3]), len(gap)), open=gap, wide=wide)
    return wav, np.stack([factors[name] for name in FACTORS], 1).astype(np.float32)


def make_toy_clip(seed: int, seconds: float = 3, size: int = 64):
    """A clip of make_person(seed) -> frames uint8 (T, size, size, 3), wav and truth of make_clip_truth"""
    who = make_person(seed)
    wav, truth = make_clip_truth(seed, seconds, who)
    return np.stack([draw(who, dict(zip(FACTORS, row)), size) for row in truth.tolist()]), wav, truth


def open_toy_pack(folder: Path, size: int, part: str = "train") -> Pack:
    """Opens the pack of one of SPLITS in `folder` and draws it on first use."""
    path, (first_seed, people) = folder / ("toys" if part == "train" else f"toys_{part}"), SPLITS[part]
    make_pack(path, size, people, first_seed=first_seed)
    return Pack(path)


def make_pack(folder, size: int, people: int, seconds: float = 3, first_seed: int = TRAIN_SEED):
    """Writes a pack with one clip of each person, make_toy_clip(first_seed + i), and truth.npy, float32 (all frames, 10).
    A finished pack of the same arguments is kept, an unfinished one drawn anew. InputError: the folder holds anything
    else, or cannot be written."""
    folder, seeds, truths = make_folder(folder), range(first_seed, first_seed + people), []
    recipe = dict(world=WORLD_VERSION, size=size, people=people, seconds=float(seconds), first_seed=first_seed)
    recipe, recipe_file = json.dumps(recipe), folder / "toy.json"
    if recipe_file.is_file() and recipe_file.read_text() == recipe:
        if (folder / "meta.json").is_file():
            return
    elif any(folder.iterdir()):
        raise InputError(f"{folder}: holds something else than this toy pack; remove it or name another directory")
    workers = min(people // 8, os.cpu_count())  # ours: a process starts in the time of eight clips
    clips = parallel_map(partial(make_toy_clip, seconds=seconds, size=size), seeds, workers)
    with wrap_os_errors(folder, "written"):
        recipe_file.write_text(recipe)
        with PackWriter(folder, size, "toy") as pack:
            for (frames, wav, truth), seed in zip(tqdm(clips, "toy clips", people, disable=None), seeds):
                pack.add(frames, wav, f"toy{seed}", f"toyfaces seed {seed}")
                truths.append(truth)
            np.save(folder / "truth.npy", np.concatenate(truths))


# ----------------------------------------------------------------------------------------------------------- the script

def main():
    p = Parser(description="Draws the toy world: faces and speech with ground truth.")
    p.add_argument("--out", default="out", help="directory for toys.png and toy.mp4 (default out)")
    p.add_argument("--pack", metavar="DIR", help="write a pack to train on instead")
    p.add_argument("--size", type=int, default=64, help="edge of the images in pixels (default 64)")
    p.add_argument("--people", type=int, default=300, help="clips in the pack, one per person (default 300)")
    p.add_argument("--seed", type=int, default=TRAIN_SEED,
                   help=f"first person (default {TRAIN_SEED}: training; tuning {TUNE_SEED}, held out {TEST_SEED})")
    p.add_argument("--overwrite", action="store_true", help="replace existing pictures and videos")
    args = p.parse_args(size=(16, 1024))
    if args.pack:
        make_pack(args.pack, args.size, args.people, first_seed=args.seed)
        print(f"{args.pack}: {args.people} clips")
        return
    out = make_folder(args.out)
    toys, video = (check_output(out / name, args.overwrite) for name in ("toys.png", "toy.mp4"))

    def portrait(seed):  # one frame of the person's clip
        who = make_person(seed)
        truth = make_clip_truth(seed, 3, who)[1][(10, 26, 42, 58)[seed % 4]]
        return draw(who, dict(zip(FACTORS, truth.tolist())), args.size)

    seeds = np.arange(args.seed, args.seed + 32).reshape(4, 8).tolist()
    rows = [[portrait(seed) for seed in row] for row in seeds]
    image_grid(rows, [[f"toy{seed}" for seed in row] for row in seeds], max(128, args.size)).save(toys)
    frames, wav, _ = make_toy_clip(args.seed, size=args.size)
    write_video(video, iter(frames), len(frames), wav, args.overwrite)
    print(f"wrote {toys} and {video}")


if __name__ == "__main__":
    run(main)
