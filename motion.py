"""Frame by frame motion of a talking photo, for warp.py: lips, blinks, brows, pose of the head.

    mouth_motion(opening, shape, speech, ..)  -> opening (T,), shape (T, K - 1); in silence those of the photo
    idle_motion(T, speech, seed)              -> Motion: blinks, and a head that sways a little with the speech
    driving_motion(landmarks, eyelids, brows) -> Motion of a driving clip, relative to the first frame of a scene

Ours: in the paper a generator's codes carry the motion. Units, signs and K are those of warp.py; 25 frames a second.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, rfft, rfftfreq  # scipy.signal takes a second to import
from scipy.ndimage import gaussian_filter1d, maximum_filter1d

from faces import crop_face, fill_missing, similarity
from landmarks import MIRROR
from media import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from warp import (
    LOWER_INNER, RIGID, UPPER_FACE, UPPER_INNER, Pose, Warp, angles, fit_pose, smoothstep, soft_limit, turned_place)

# all constants are ours
SILENCE_DEPTH = 30.0  # dB below the 95th percentile of the level: breath lies lower, GRID's noise floor at 40
SPEECH_RISE = 6.0  # dB above the quietest tenth: noise alone varies less, speech in noise of the same level more
VOICE_BAND = 250, 3400  # Hz, in which noise of any colour is steady
PAUSE = 25  # frames by which speech is extended on both sides. In longer silence the photo's own mouth returns
BLINK = (0.35, 0.85, 1.0, 0.85, 0.5, 0.2)  # closure of the lids in each frame: .24 s, faster down than up
BLINK_EVERY = 2.5, 6.0  # seconds between two blinks: 14 a minute on average
SWAY = 1.3, 0.8, 0.7  # standard deviations of yaw, pitch, roll in degrees: more looks like floating, less like a still
SWAY_SECONDS = 0.55  # sigma of the smoothing of the sway
NOD = 1.2  # degrees by which the chin drops where speech starts
DRIVE_SIGMA = 1.5  # frames: landmarks jitter more than heads do
# dlib's points of shut lips lie apart: on five GRID clips MediaPipe's opening has 1.35 to 1.5 times the slope of dlib's
OPENING_GAIN = 1.4
# standard deviations of random motion: yaw, pitch, roll in degrees, shift right and down, scale, brows
RANDOM = 10.0, 7.0, 5.0, 0.05, 0.05, 0.04, 0.02
DRIVE_GAIN = 1.15, 1.2  # of yaw and pitch: turns measured by our landmarks are smaller than by MediaPipe's, same clips
LIMITS = 15.0, 0.15, 0.15, 0.10, 0.08  # roll in degrees, shift right and down, scale, brows; for turns Head.turn_limits
LID_SHUT, LID_OPEN = 0.35, 0.85  # shares of a driver's usual opening: fully shut (blinks reach .05 to .3), fully open


def ping_pong(k: int, count: int) -> int:
    """Index of step k when `count` frames are played back and forth: 0 1 2 1 0 1 2 .."""
    k %= max(1, 2 * (count - 1))
    return min(k, 2 * (count - 1) - k)


@dataclass
class Motion:
    """Motion of T frames. poses: (T, 6) yaw, pitch, roll, shift right, shift down, scale - 1; blinks, brows: (T,)"""

    poses: np.ndarray
    blinks: np.ndarray
    brows: np.ndarray

    def __getitem__(self, k: int) -> dict:
        """Arguments of warp.Warp for frame k; a motion that is too short is played back and forth"""
        k = ping_pong(k, len(self.poses))
        yaw, pitch, roll, right, down, scale = self.poses[k].tolist()
        pose = Pose(yaw, pitch, roll, (right, down), 1 + scale)
        return dict(pose=pose, blink=float(self.blinks[k]), brows=float(self.brows[k]))


def detect_speech(wav: np.ndarray, n: int) -> np.ndarray:
    """wav (samples,) at 16 kHz -> (n,) in [0, 1]: speech activity of each frame, with soft edges. Steady noise has 0."""
    def frame_levels(x):  # (n,) in dB
        power = [np.square(x[k * SAMPLES_PER_FRAME : (k + 1) * SAMPLES_PER_FRAME]).sum() for k in range(n)]
        return 10 * np.log10(np.array(power) / SAMPLES_PER_FRAME + 1e-10)

    spectrum, hz = rfft(wav), rfftfreq(len(wav), 1 / SAMPLE_RATE)
    spectrum[(hz < VOICE_BAND[0]) | (hz > VOICE_BAND[1])] = 0
    level, voice_level = frame_levels(wav), frame_levels(irfft(spectrum, len(wav)))
    is_loud = level > max(np.percentile(level, 95), -60.0) - SILENCE_DEPTH
    is_speech = is_loud & (voice_level > np.percentile(voice_level, 10) + SPEECH_RISE)
    return gaussian_filter1d(maximum_filter1d(is_speech.astype(float), 2 * PAUSE + 1), 3.0)


def mouth_motion(opening, shape, speech, rest_opening: float, strength: float = 1.0):
    """Predicted opening (T,) and shape (T, K - 1), speech activity (T,) -> the same two for a photo with `rest_opening`.

    In silence they are exactly those of the photo. strength: factor of all motion, 1 as predicted"""
    amount = np.where(speech < 0.02, 0.0, speech) * strength
    return rest_opening + amount * (opening - rest_opening), amount[:, None] * shape


def idle_motion(n: int, speech: np.ndarray, seed: int, head: bool = True) -> Motion:
    """Motion without a driving clip: blinks; with `head` a slow sway from the photo's pose, and nods with speech (n,)"""
    rng = np.random.default_rng(seed)
    blinks, seconds = np.zeros(n + len(BLINK)), rng.uniform(1.0, BLINK_EVERY[1])
    while seconds * FPS < n:
        first = int(seconds * FPS)
        blinks[first : first + len(BLINK)] = BLINK
        seconds += rng.uniform(*BLINK_EVERY)
    poses = np.zeros((n, 6))
    if head:
        sigma, margin = SWAY_SECONDS * FPS, 64
        walk = gaussian_filter1d(rng.standard_normal((n + 2 * margin, 3)), sigma, axis=0)[margin : margin + n]
        poses[:, :3] = walk * np.array(SWAY) * np.sqrt(2 * np.sqrt(np.pi) * sigma)  # undoes the filter's loss of variance
        poses[:, 1] -= NOD * (gaussian_filter1d(speech, 6.0) - 0.5 * gaussian_filter1d(speech, 40.0))
        poses -= poses[:1]                                             # the first frame is the photo
        poses *= smoothstep(np.arange(n) / FPS)[:, None]               # the sway begins within a second
    return Motion(poses, blinks[:n], np.zeros(n))


def random_motion(rng: np.random.Generator, turn_limits, n: int = 1) -> Motion:
    """n frames to train on: random poses and brows within the limits of driving_motion, eyes shut in every second one"""
    motion = soft_limit(rng.normal(0, RANDOM, (n, 7)), np.array([*turn_limits, *LIMITS]))
    return Motion(motion[:, :6], rng.integers(2, size=n), motion[:, 6])


def random_faces(warp: Warp, size: int, box, opening: np.ndarray, shape: np.ndarray, rng) -> tuple[Motion, np.ndarray]:
    """A photo in n random poses, to train on. box: of the crop, in pixels of warp's photo; opening (n,) and shape
    (n, K - 1) of the lips -> motion without brows, images uint8 (n, size, size, 3)"""
    motion = random_motion(rng, warp.head.turn_limits, len(opening))
    motion.brows[:] = 0
    frames = (warp(opening[k], shape[k], **motion[k]) for k in range(len(opening)))
    return motion, np.stack([crop_face(frame, box, size) for frame in frames])


def driving_motion(points: np.ndarray, lids: np.ndarray, brows: np.ndarray, mean: np.ndarray, turn_limits,
                   scene: np.ndarray) -> Motion:
    """Motion of a driving clip, softly limited to what looks right on the photo. Poses are relative to the first frame of
    a scene, brows to their median, blinks to the usual opening of the eyes.

    points: (T, 68, 2) landmarks in pixels; lids: (T, 2) openings of the eyes; brows: (T, 2) heights above them; all are
    NaN, and interpolated, in frames without a face (not in all frames). mean: (77, 3) shape; turn_limits: see warp.Head;
    scene: (T,) numbers of faces.label_scenes. Blinks are not smoothed: they last three frames."""
    has_face = np.isfinite(points).all((1, 2))
    cuts, limits = np.flatnonzero(np.diff(scene)) + 1, np.array([*turn_limits, *LIMITS])
    scenes = zip(*(np.split(fill_missing(x, has_face), cuts) for x in (points, lids, brows)))
    motion, blinks = map(np.concatenate, zip(*(scene_motion(*clip, mean, limits) for clip in scenes)))
    return Motion(motion[:, :6], blinks, motion[:, 6])


def scene_motion(points, lids, brows, mean, limits) -> tuple[np.ndarray, np.ndarray]:
    """Motion of one scene, see driving_motion -> pose and brows (n, 7), within limits (7,); blinks (n,)"""
    scale, R, shift = fit_pose(points, mean)                       # (n,), (n, 3, 3), (n, 2)
    nods = angles(fit_pose(points, mean, UPPER_FACE)[1])[:, 1]
    yaws, pitches, rolls = angles(R @ R[0].T).T
    places = scale[:, None] * (R[:, :2] @ mean[UPPER_FACE].mean(0)) + shift
    raised = brows.mean(1) - np.median(brows)
    motion = np.c_[yaws, (pitches + nods) / 2, rolls, places / scale[0], scale / scale[0] - 1, raised]  # (n, 7)
    motion = gaussian_filter1d(motion, DRIVE_SIGMA, axis=0, mode="nearest")
    motion[:, :6] -= motion[0, :6]
    motion[:, :2] *= DRIVE_GAIN
    motion[:, 3:5] -= turned_place(soft_limit(motion, limits)[:, :6], R[0], mean)  # a head that turns moves its place
    opening = lids.mean(1) / max(np.percentile(lids.mean(1), 80), 1e-6)
    return soft_limit(motion, limits), smoothstep((LID_OPEN - opening) / (LID_OPEN - LID_SHUT))


# ---------------------------------------------------------------- fitted once for a network: its lip numbers -> landmarks

def remove_head_motion(points: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """A clip's landmarks (T, 68, 2) in pixels -> the same in units, seen from the front, made symmetric. A similarity
    transform of each frame brings its rigid points nearest to the clip's median face."""
    median = np.median(points, 0)
    scale, R, _ = fit_pose(median, mean)
    z = points @ (1, 1j)                                               # (T, 68): x + iy
    a, b = similarity(z[:, RIGID], median[RIGID] @ (1, 1j))            # (T,)
    z = a[:, None] * z + b[:, None]
    q = np.stack([z.real, z.imag], -1) @ np.linalg.inv(scale * R[:2, :2]).T
    return (q + q[:, MIRROR] * (-1, 1)) / 2


def lip_opening(q: np.ndarray) -> np.ndarray:
    """Upright landmarks (.., 68, 2) -> (..): the mean gap between the inner lips"""
    return (q[..., LOWER_INNER[1:4], 1] - q[..., UPPER_INNER[1:4], 1]).mean(-1)


def fit_moves(clips: list, mean: np.ndarray) -> np.ndarray:
    """The moves (K, 68, 2) of warp.Lips: least squares of landmarks on opening and shape numbers, less each clip's mean.
    clips: [(landmarks (T, 68, 2) in pixels, shape numbers (T, K - 1) of the same frames)]"""
    x, y = [], []
    for points, shape in clips:
        q = remove_head_motion(points, mean)
        numbers = np.c_[OPENING_GAIN * lip_opening(q), shape]
        x.append(numbers - numbers.mean(0))
        y.append((q - q.mean(0)).reshape(len(q), -1))
    moves = np.linalg.lstsq(np.concatenate(x), np.concatenate(y), rcond=None)[0].reshape(-1, 68, 2)
    # dlib's lower lips move too little: move them until a unit of opening opens the lips by 1
    moves[0, [*range(55, 60), 65, 66, 67], 1] += 1 - lip_opening(moves[:1])[0]
    return moves


def fit_opening(predicted: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """slope, offset with which max(0, slope predicted + offset) has the mean and the deviation of real openings.

    predicted: (n,) first number from sound; real: (n,), whose smallest twentieth counts as shut (see OPENING_GAIN).
    Least squares would open mouths less: its predictions have less variance than the truth."""
    real = OPENING_GAIN * np.maximum(0, real - np.quantile(real, 0.05))
    slope, offset = real.std() / predicted.std(), 0.0
    for _ in range(50):
        fitted = np.maximum(0, slope * predicted + offset)
        slope *= (real.std() / max(fitted.std(), 1e-6)) ** 0.5
        offset += 0.5 * (real.mean() - fitted.mean())
    return float(slope), float(offset)
