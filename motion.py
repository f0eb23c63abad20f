"""Frame by frame motion of a talking photo, for warp.py: lips, blinks, brows, pose of the head.

    mouth(numbers of the sound)         -> opening (T,), shape (T, K - 1); the photo's own in silence
    idle(T, activity, seed)             -> Motion: blinks, and a head that sways a little with the speech
    follow(landmarks of a driving clip) -> Motion: its pose, blinks and brows, relative to its first frame

Ours: the paper moves codes of a generator instead. Units and signs are warp.py's; 25 frames a second.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, rfft, rfftfreq  # scipy.signal takes a second to import
from scipy.ndimage import gaussian_filter1d, maximum_filter1d

from faces import fill_missing
from landmarks import MIRROR
from media import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from warp import LOWER_INNER, RIGID, UPPER_INNER, Pose, angles, fit_pose, smoothstep

# constants are ours
QUIET = 30.0  # dB below the level of speech (95th percentile): silence; breath lies lower, and GRID's noise floor at 40
STEADY = 6.0  # dB above the quietest tenth: noise alone varies less, speech under noise of its own level more
VOICE_BAND = 250, 3400  # Hz, in which noise of any colour is steady
PAUSE = 25  # frames: in shorter pauses the lips stay shut, in longer ones the photo gets its own mouth back
BLINK = (0.35, 0.85, 1.0, 0.85, 0.5, 0.2)  # of a lid, frame by frame: .24 s, faster down than up
BLINK_EVERY = 2.5, 6.0  # seconds between two blinks: 14 a minute on average
SWAY = 1.3, 0.8, 0.7  # degrees of yaw, pitch, roll, standard deviation; with more it floats, with less it freezes
SWAY_SECONDS = 0.55  # sigma of the sway's smoothing
NOD = 1.2  # degrees that the chin drops where speech starts
DRIVE_SIGMA = 1.5  # frames: landmarks jitter more than heads do
# dlib's points of shut lips lie apart: on five GRID clips MediaPipe's opening has 1.35 to 1.5 times the slope of dlib's
OPENING_GAIN = 1.4
NODDING = np.r_[27:48]  # nose and eyes: their fit follows a nod further than RIGID's, with more noise; both are averaged
DRIVE_GAIN = 1.15, 1.2  # yaw and pitch by the small network's points are smaller than by MediaPipe's, on the same clips
LIMITS = 15.0, 0.15, 0.15, 0.10, 0.08  # of roll in degrees, shift right and down, scale, brows; see warp.Head.room
LID_SHUT, LID_OPEN = 0.35, 0.85  # of a driver's usual opening: wholly shut (blinks reach .05 to .3), not yet a blink


def ping_pong(k: int, count: int) -> int:
    """Index of step k when `count` frames are played to the end and back for ever: 0 1 2 1 0 1 2 .."""
    k %= max(1, 2 * (count - 1))
    return min(k, 2 * (count - 1) - k)


@dataclass
class Motion:
    """Of T frames. poses: (T, 6) yaw, pitch, roll, shift right, shift down, scale - 1; blinks, brows: (T,)"""

    poses: np.ndarray
    blinks: np.ndarray
    brows: np.ndarray

    def __getitem__(self, k: int) -> dict:
        """Arguments of warp.Warp for frame k; a driving clip that is shorter is played back and forth"""
        k = ping_pong(k, len(self.poses))
        yaw, pitch, roll, right, down, scale = self.poses[k].tolist()
        pose = Pose(yaw, pitch, roll, (right, down), 1 + scale)
        return dict(pose=pose, blink=float(self.blinks[k]), brows=float(self.brows[k]))


def detect_speech(wav: np.ndarray, n: int) -> np.ndarray:
    """wav (samples,) at 16 kHz -> (n,) in [0, 1]: whether frame k has speech, with soft edges. A fan's noise is none."""
    def level(x):  # of frames, in dB
        power = [np.square(x[k * SAMPLES_PER_FRAME : (k + 1) * SAMPLES_PER_FRAME]).sum() for k in range(n)]
        return 10 * np.log10(np.array(power) / SAMPLES_PER_FRAME + 1e-10)

    spectrum, hz = rfft(wav), rfftfreq(len(wav), 1 / SAMPLE_RATE)
    spectrum[(hz < VOICE_BAND[0]) | (hz > VOICE_BAND[1])] = 0
    loud, voice = level(wav), level(irfft(spectrum, len(wav)))
    speaks = (loud > max(np.percentile(loud, 95), -60.0) - QUIET) & (voice > np.percentile(voice, 10) + STEADY)
    return gaussian_filter1d(maximum_filter1d(speaks.astype(float), 2 * PAUSE + 1), 3.0)


def mouth_motion(opening, shape, active, own: float, strength: float = 1.0):
    """opening (T,), shape (T, K - 1), active (T,) -> the same two for a photo whose lips are open by `own` at rest.

    In silence the photo keeps its own mouth, bit for bit. strength: of all movement, 1 as predicted."""
    active = np.where(active < 0.02, 0.0, active) * strength
    return own + active * (opening - own), active[:, None] * shape


def idle_motion(n: int, active: np.ndarray, seed: int, head: bool = True) -> Motion:
    """A photo that is not driven: blinks at a person's rate, a slow sway that starts from the photo, nods with speech."""
    rng = np.random.default_rng(seed)
    blinks, k = np.zeros(n + len(BLINK)), rng.uniform(1.0, BLINK_EVERY[1])
    while k * FPS < n:
        at = int(k * FPS)
        blinks[at : at + len(BLINK)] = BLINK
        k += rng.uniform(*BLINK_EVERY)
    poses = np.zeros((n, 6))
    if head:
        sigma, margin = SWAY_SECONDS * FPS, 64
        walk = gaussian_filter1d(rng.standard_normal((n + 2 * margin, 3)), sigma, axis=0)[margin : margin + n]
        poses[:, :3] = walk * np.array(SWAY) * np.sqrt(2 * np.sqrt(np.pi) * sigma)  # a filtered walk has this deviation
        poses[:, 1] -= NOD * (gaussian_filter1d(active, 6.0) - 0.5 * gaussian_filter1d(active, 40.0))
        poses -= poses[:1]
        poses *= smoothstep(np.arange(n) / FPS)[:, None]
    return Motion(poses, blinks[:n], np.zeros(n))


def driving_motion(points: np.ndarray, lids: np.ndarray, brows: np.ndarray, mean: np.ndarray, room: tuple) -> Motion:
    """A driving clip -> its motion, softly limited to what looks right on the photo.

    points: (T, 68, 2) landmarks in pixels; lids: (T, 2) openings of the eyes; brows: (T, 2) heights above them; NaN where
    there is no face. mean: (77, 3) shape; room: limits of yaw and pitch in degrees, of warp.Head.
    The first frame is the photo. Blinks are not smoothed: they last three frames. Frames without a face are interpolated.
    Raises ValueError: no frame has a face.
    """
    seen = np.isfinite(points).all((1, 2))
    if not seen.any():
        raise ValueError("no face")
    points, lids, brows = (fill_missing(x, seen) for x in (points, lids, brows))
    scale, R, shift = (np.array(x) for x in zip(*(fit_pose(p, mean) for p in points)))  # (T,), (T, 3, 3), (T, 2)
    nods = angles(np.array([fit_pose(p, mean, NODDING)[1] for p in points]))[:, 1]
    yaws, pitches, rolls = angles(R @ R[0].T).T
    places = scale[:, None] * (R[:, :2, :2] @ mean[:68, :2].mean(0)) + shift
    raised = brows.mean(1) - np.median(brows)
    asked = np.c_[yaws, (pitches + nods) / 2, rolls, places / scale[0], scale / scale[0] - 1, raised]
    asked = gaussian_filter1d(asked, DRIVE_SIGMA, axis=0, mode="nearest")
    asked[:, :6] -= asked[0, :6]
    asked[:, :2] *= DRIVE_GAIN
    limits = np.array([*room, *LIMITS])
    asked = asked / (1 + (asked / limits) ** 4) ** 0.25                # nearly linear up to .7 of the limit
    opened = lids.mean(1) / max(np.percentile(lids.mean(1), 80), 1e-6)
    blinks = smoothstep((LID_OPEN - opened) / (LID_OPEN - LID_SHUT))
    return Motion(asked[:, :6], blinks, asked[:, 6])


# ---------------------------------------------------------------------------------------------------------------------
# once for a network: how its numbers move landmarks


def remove_head_motion(points: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """A clip's landmarks (T, 68, 2) in pixels -> in units, seen from the front, without the head's own motion: each frame
    is mapped by the similarity that fits its rigid points to the clip's median face. Made symmetric."""
    middle = np.median(points, 0)
    scale, R, _ = fit_pose(middle, mean)
    a, b = points[:, RIGID], middle[RIGID]
    ma, mb = a.mean(1, keepdims=True), b.mean(0)
    za, zb = (a - ma) @ (1, 1j), (b - mb) @ (1, 1j)                    # (T, n), (n,): a similarity is one complex factor
    turn = (za.conj() * zb).sum(1) / (abs(za) ** 2).sum(1)
    z = (points - ma) @ (1, 1j) * turn[:, None]
    q = np.stack([z.real, z.imag], -1) @ np.linalg.inv(scale * R[:2, :2]).T
    return (q + q[:, MIRROR] * (-1, 1)) / 2


def lip_opening(q: np.ndarray) -> np.ndarray:
    """Landmarks (.., 68, 2), upright -> (..): the mean gap between the inner lips"""
    return (q[..., LOWER_INNER[1:4], 1] - q[..., UPPER_INNER[1:4], 1]).mean(-1)


def fit_moves(clips: list, mean: np.ndarray) -> np.ndarray:
    """[(landmarks (T, 68, 2) in pixels, shape numbers (T, K - 1) of the same frames)] -> moves (K, 68, 2) of warp.Lips:
    least squares of the landmarks, less each clip's mean, on the opening of the lips and the other numbers."""
    x, y = [], []
    for points, shape in clips:
        q = remove_head_motion(points, mean)
        known = np.c_[OPENING_GAIN * lip_opening(q), shape]
        x.append(known - known.mean(0))
        y.append((q - q.mean(0)).reshape(len(q), -1))
    moves = np.linalg.lstsq(np.concatenate(x), np.concatenate(y), rcond=None)[0].reshape(-1, 68, 2)
    moves[0, [*range(55, 60), 65, 66, 67], 1] += 1 - lip_opening(moves[:1])[0]  # a gap of 1 a unit: dlib's lower lips lag
    return moves


def fit_opening(predicted: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """predicted (n,), the first number from sound, real (n,) openings -> slope, offset: max(0, slope predicted + offset)
    has the real mean and deviation. Least squares would open mouths less: a half predictable motion is predicted half as
    far. The smallest twentieth of the openings counts as shut, see OPENING_GAIN."""
    real = OPENING_GAIN * np.maximum(0, real - np.quantile(real, 0.05))
    slope, offset = real.std() / predicted.std(), 0.0
    for _ in range(50):
        got = np.maximum(0, slope * predicted + offset)
        slope *= (real.std() / max(got.std(), 1e-6)) ** 0.5
        offset += 0.5 * (real.mean() - got.mean())
    return float(slope), float(offset)
