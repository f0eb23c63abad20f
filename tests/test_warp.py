"""warp.py: which pixels move, and how far; poses against projected points."""

import functools

import cv2
import numpy as np
import pytest

import warp as W
from warp import Face, Lips, Nodes, Pose, Warp

SIZE, SCALE = 300, 90.0


def mean_shape():
    """A symmetric face for tests of geometry: (77, 3) in units, 68 landmarks and 9 points of the hairline"""
    def arc(x, y, z, n):
        return np.stack([np.linspace(*v, n) if len(v) == 2 else np.array(v, float) for v in (x, y, z)], 1)

    a = np.linspace(np.pi, 0, 17)
    jaw = np.c_[0.77 * np.cos(a), 1.25 * np.sin(a), 0.45 - 0.7 * np.sin(a)]
    brow = np.c_[np.linspace(-0.6, -0.15, 5), [-0.22, -0.28, -0.3, -0.29, -0.26], np.linspace(0, -0.25, 5)]
    nose = np.r_[arc((0, 0), (-0.05, 0.28), (-0.25, -0.55), 4), arc((-0.15, 0.15), (0.42, 0.42), (-0.3, -0.3), 5)]
    eye = np.c_[[-0.5, -0.41, -0.3, -0.21, -0.3, -0.41], [0, -0.06, -0.06, 0, 0.04, 0.04],
                [0.0, -0.1, -0.12, -0.08, -0.12, -0.1]]
    x = np.array([-0.3, -0.2, -0.08, 0, 0.08, 0.2, 0.3, 0.2, 0.08, 0, -0.08, -0.2])
    y = np.array([0.74, 0.69, 0.67, 0.68, 0.67, 0.69, 0.74, 0.8, 0.83, 0.84, 0.83, 0.8])
    inner = np.array([-0.27, -0.1, 0, 0.1, 0.27, 0.1, 0, -0.1])
    lips = np.r_[np.c_[x, y, np.abs(x) - 0.4], np.c_[inner, np.full(8, 0.74), np.abs(inner) - 0.4]]
    flip = (-1, 1, 1)
    hair = np.c_[0.75 * np.cos(a[::2]), -0.35 - 0.25 * np.sin(a[::2]), 0.2 - 0.3 * np.sin(a[::2])]
    right_eye = (eye * flip)[[3, 2, 1, 0, 5, 4]]
    return np.concatenate([jaw, brow, (brow * flip)[::-1], nose, eye, right_eye, lips, hair])


def moves():
    """Opening: the lower lip and the chin drop, the upper lip rises a little; first shape number: the mouth widens"""
    m, mean = np.zeros((3, 68, 2)), mean_shape()[:68]
    m[0, 55:60, 1], m[0, 65:68, 1], m[0, 49:54, 1], m[0, 61:64, 1] = 0.8, 0.8, -0.2, -0.2
    m[0, [48, 54, 60, 64], 1] = 0.3
    m[0, 2:15, 1] = 0.7 * np.sin(np.linspace(0.3, np.pi - 0.3, 13))
    m[1, 48:68, 0] = 0.1 * mean[48:68, 0]
    return m


def points(yaw=0.0, gap=0.0, **pose):
    mean = mean_shape()[:68].copy()
    mean[61:64, 1] -= gap / 4
    mean[65:68, 1] += 3 * gap / 4
    mean[55:60, 1] += 3 * gap / 4
    R = W.rotation(yaw, pose.get("pitch", 0), pose.get("roll", 0))
    return SCALE * (mean @ R.T)[:, :2] + (150, 120)


def photo(seed=0):
    """Soft random colours: every pixel differs from its neighbours, none is black or white"""
    x = np.random.default_rng(seed).random((40, 40, 3))
    return (40 + 170 * cv2.resize(x, (SIZE + 6, SIZE), interpolation=cv2.INTER_CUBIC).clip(0, 1)).astype(np.uint8)


def face(**options):
    return Face(photo(), points(**options), mean_shape())


@pytest.mark.parametrize("yaw, pitch, roll", [(0, 0, 0), (20, -10, 5), (-35, 12, -30)])
def test_angles_are_the_inverse_of_rotation(yaw, pitch, roll):
    assert np.allclose(W.angles(W.rotation(yaw, pitch, roll)), (yaw, pitch, roll))


def test_fit_pose_recovers_the_pose_of_a_projected_shape():
    scale, R, shift = W.fit_pose(points(25.0, pitch=-8, roll=12), mean_shape())
    assert np.allclose(W.angles(R), (25, -8, 12), atol=1e-6)
    assert np.allclose((scale, *shift), (SCALE, 150, 120))


@pytest.mark.parametrize("gap", [0.0, 0.12])
def test_at_rest_a_frame_is_the_photo_bit_for_bit(gap):
    f = face(gap=gap)
    warp = Warp(f, moves())
    assert np.array_equal(warp(), f.photo)
    assert np.array_equal(warp(warp.lips.rest_opening, np.zeros(2)), f.photo)
    x0, y0, x1, y1 = warp.lips.box
    for read in f.read, functools.partial(W.read_photo, f.photo):     # reading alone changes nothing either
        assert np.array_equal(read(W.pixel_centres(warp.lips.box)), f.photo[y0:y1, x0:x1])


def test_grain_survives_moves_by_parts_of_a_pixel():
    def grain(picture):
        return cv2.Laplacian(picture[20:-20, 20:-20], cv2.CV_64F).var()

    noise = np.random.default_rng(0).integers(0, 255, photo().shape, dtype=np.uint8)
    f = Face(cv2.GaussianBlur(noise, (0, 0), 0.5), points(), mean_shape())
    pixels = W.pixel_centres((0, 0, SIZE, SIZE))
    shifts = (0.25, 0), (0.5, 0.25), (0.5, 0.5)
    ratios = [grain(f.read(pixels + np.float32(shift))) / grain(f.photo) for shift in shifts]
    assert all(0.7 < k < 1.2 for k in ratios), ratios                     # cubic: .65, .39, .37


def test_barely_open_lips_show_no_dark_line():
    f = face()
    darker = f.photo.astype(int) - Warp(f, moves())(0.004, np.zeros(2))
    assert np.abs(darker).max() < 30


def test_speech_changes_only_pixels_below_the_eyes_and_inside_the_face():
    f = face()
    warp = Warp(f, moves())
    changed = (warp(0.12, [1.0, 0.0]) != f.photo).any(-1)
    y, x = changed.nonzero()
    assert changed.sum() > 2000
    q = (np.c_[x, y] + 0.5 - f.points[30]) @ np.linalg.inv(f.plane).T / W.LIP_OVAL[1]
    assert y.min() > f.points[[40, 41, 46, 47], 1].max()
    assert (np.hypot(q[:, 0] / 0.9, q[:, 1] / 1.05) < 1).all()         # the jaw's oval, a little wider


def moved_landmarks(warp, opening, shape=(0.0, 0.0)):
    """Landmarks moved by both layers, in units: (2, 68, 2) upper layer, lower layer"""
    lips = warp.lips
    back = lips.displace(opening, shape)[0]
    return lips.local(np.stack([move_forwards(lips.face.points, back[..., k : k + 2], lips.box) for k in (0, 2)]))


def move_forwards(points, back, box):
    """Moves points (n, 2) move_forwards: p' = p + back(p')"""
    at, back = points[None], np.ascontiguousarray(back)
    for _ in range(60):
        at = points + W.read_grid(back, at, box)
    return at[0]


@pytest.mark.parametrize("gap", [0.0, 0.10])
def test_the_gap_between_the_lips_equals_the_opening(gap):
    warp = Warp(face(gap=gap), moves())
    assert abs(warp.lips.rest_opening - gap) < 1e-6
    for opening in (0.0, 0.03, 0.08, 0.14):
        if abs(opening - gap) > 1e-3:
            upper, lower = moved_landmarks(warp, opening)
            gaps = lower[[67, 66, 65], 1] - upper[[61, 62, 63], 1]
            assert np.abs(gaps - opening).max() < 0.006, (opening, gaps)


def test_an_opening_beyond_the_limit_opens_to_the_limit():
    warp = Warp(face(gap=0.03), moves())
    limited = moved_landmarks(warp, 0.03 + W.MAX_OPENING)
    assert all(np.allclose(a, b) for a, b in zip(moved_landmarks(warp, 0.5), limited))


def test_shape_numbers_move_the_corners():
    warp = Warp(face(), moves())
    upper, _ = moved_landmarks(warp, 0.0, (1.0, 0.0))
    assert upper[54, 0] - upper[48, 0] > 1.07 * (warp.lips.q[54, 0] - warp.lips.q[48, 0])


def test_a_turned_face_moves_in_its_own_plane():
    f = Face(photo(), points(30.0), mean_shape())
    fields = Lips(f, moves()).fields                                   # (2, 1 + K, gh, gw, 2), pixels
    straight = Lips(face(), moves()).fields
    ratio = np.abs(fields[:, 2, ..., 0]).max() / np.abs(straight[:, 2, ..., 0]).max()
    assert 0.75 < ratio < 0.95                                         # cos 30 degrees = .87


def test_nodes_invert_a_field():
    nodes = Nodes((10, 20, 210, 180), 5.0)
    x, y = nodes.positions[..., 0], nodes.positions[..., 1]
    moved = np.stack([6 * np.sin(y / 40), 4 * np.cos(x / 50)], -1)
    back = nodes.invert(moved)
    again = W.read_grid(moved, nodes.positions - back, nodes.box)
    assert np.abs(again - back)[4:-4, 4:-4].max() < 0.05                # pixels


def test_a_linear_field_is_linear_between_its_nodes_and_at_every_pixel():
    nodes = Nodes((10, 20, 210, 183), 5.0)
    moved, pixels = np.float32(nodes.positions * (0.1, -0.2)), W.pixel_centres(nodes.box)
    inside = pixels[7:-7, 9:-9] + (0.37, -0.41)
    np.testing.assert_allclose(W.read_grid(moved, inside, nodes.box), inside * (0.1, -0.2), atol=1e-4)
    np.testing.assert_allclose(nodes.sources(moved)[5:-5, 5:-5], (pixels * (0.9, 1.2))[5:-5, 5:-5], atol=1e-4)


def test_a_blink_covers_the_eye_with_skin():
    f = face()
    eye = f.photo.copy()
    inside = [(x, y) for y in range(SIZE) for x in range(SIZE)
              if np.hypot((x - 150 + 0.355 * SCALE) / 12, (y - 119) / 4.5) < 1]
    for x, y in inside:
        eye[y, x] = 255
    warp = Warp(Face(eye, f.points, mean_shape()), moves())
    bright = [(warp(blink=b)[100:140, 100:140] > 235).all(-1).sum() for b in (0, 0.5, 1)]
    assert bright[0] > 100 and bright[0] > bright[1] > bright[2] and bright[2] < 0.15 * bright[0]
    changed = (warp(blink=1) != eye).any(-1)
    assert not changed[warp.lips.box[1] + 60:].any()


@pytest.mark.parametrize("pose", [dict(yaw=8.0), dict(pitch=-6.0), dict(roll=7.0), dict(yaw=-5.0, pitch=4.0, roll=3.0)])
def test_landmarks_of_a_turned_head_are_those_of_the_turned_shape(pose):
    f = face()
    head = Warp(f, moves()).head
    at = move_forwards(f.points, head.displace(Pose(**pose), 0.0), head.box)
    mean = mean_shape() * (1, 1, head.DEPTH)
    R = W.rotation(**{k: pose.get(k, 0.0) for k in ("yaw", "pitch", "roll")})
    wanted = SCALE * (((mean - head.PIVOT) @ R.T + head.PIVOT)[:, :2]) + (150, 120)
    moved, expected = (x[W.RIGID] - f.points[W.RIGID] for x in (at, wanted))
    slope = (moved * expected).sum() / (expected**2).sum()
    assert 0.85 < slope < 1.1 and np.corrcoef(moved.ravel(), expected.ravel())[0, 1] > 0.97


def test_a_turned_head_changes_nothing_outside_its_region():
    f = face()
    warp = Warp(f, moves())
    frame = warp(0.08, pose=Pose(yaw=6, pitch=3), blink=0.5, brows=0.03)
    assert frame.shape == f.photo.shape and (frame != f.photo).any(-1).sum() > 20000
    x0, y0, x1, y1 = warp.head.box
    outside = np.ones(f.photo.shape[:2], bool)
    outside[y0:y1, x0:x1] = False
    assert np.array_equal(frame[outside], f.photo[outside])


def test_lips_are_the_same_on_a_still_and_on_a_turned_head():
    warp = Warp(face(), moves())
    still = warp(0.1).astype(float)
    turned = warp(0.1, pose=Pose(roll=1e-4)).astype(float)             # by render_head
    assert np.abs(still - turned).max() <= 1


def test_a_grey_photo_stays_grey():
    grey = np.repeat(photo()[..., :1], 3, -1)
    for gap in (0.0, 0.1):
        warp = Warp(Face(grey, points(gap=gap), mean_shape()), moves())
        frame = warp(0.12, [0.5, 0], blink=0.5, pose=Pose(yaw=3)).astype(int)
        assert np.ptp(frame, axis=-1).max() <= 1


def test_a_small_face_is_enlarged_and_a_large_one_unchanged():
    large, p = W.enlarge_small_face(photo(), points(), mean_shape())
    assert large.shape[0] == 450 and abs(W.fit_pose(p, mean_shape())[0] - W.MIN_UNIT) < 1
    wide = np.zeros((40, 900, 3), np.uint8)
    assert W.enlarge_small_face(wide, points() / 8, mean_shape())[0].shape == (56, W.MAX_SIDE, 3)
    same, p = W.enlarge_small_face(large, 2 * p, mean_shape())
    assert same is large


@pytest.mark.parametrize("spoil, reason", [
    (lambda p: p * np.nan, "finite"), (lambda p: p[:60], "68"), (lambda p: p * (-1, 1) + (SIZE, 0), "upright|face"),
    (lambda p: p * (1, -1) + (0, SIZE), "upright"), (lambda p: p * 0 + 100, "face|outside"),
    (lambda p: p + 5000, "outside"), (lambda p: p @ np.array([[0, 1], [-1, 0]]) + (SIZE, 0), "upright"),
    (lambda p: p * (0.05, 1) + (100, 0), "face|turned"),
])
def test_wrong_landmarks_are_refused(spoil, reason):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=reason):
        Face(photo(), spoil(points()), mean_shape())


def test_a_profile_is_refused_with_its_angle():
    with pytest.raises(ValueError, match="turned too far"):
        Face(photo(), points(62.0), mean_shape())


def test_a_face_at_the_edge_of_its_photo_still_talks():
    f = Face(photo(), points() + (-90, 130), mean_shape())
    frame = Warp(f, moves())(0.1, blink=1.0, pose=Pose(yaw=4))
    assert frame.shape == f.photo.shape


@pytest.mark.parametrize("at", [(0, 0), (-60, -40), (70, 0)])
def test_no_pixel_comes_from_beyond_the_photos_edges(at):
    f = Face(photo(), points() + at, mean_shape())                     # also where an edge cuts the head
    head, (H, W) = Warp(f).head, f.photo.shape[:2]
    for sign in (-1, 1):
        pose = Pose(8 * sign, 6 * sign, 3, (0.12 * sign, 0.1 * sign), 1 + 0.06 * sign)
        where = head.nodes.sources(head.displace(pose, 0.05))
        assert where.min() > -0.5 and where[..., 0].max() < W + 0.5 and where[..., 1].max() < H + 0.5
    x0, y0, *_ = head.box
    assert y0 == 0 and np.abs(where[H // 2, W // 2 - x0] - (W // 2, H // 2)).max() > 3


def test_each_eye_shuts_by_its_own_landmarks():
    left, right = Warp(face()).eyes
    assert left.box[2] < right.box[2] and abs(left.width - right.width) < 1e-6
