"""faces.py: crops and boxes, detectors, clips of a video, landmarks and their files."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import torch

import faces
from faces import Template, interpolate_gaps, mask_mouth, parse_box, similarity, smooth
from media import InputError, load_photo, read_video
from test_media import picture

SHARED = Path(__file__).parents[2] / "shared"


# ---------------------------------------------------------------------------------------------------------------------
# points and boxes

def test_similarity_recovers_a_transform_and_is_the_least_squares_fit_of_noise():
    rng = np.random.default_rng(0)
    points, a, b = rng.random(7) + 1j * rng.random(7), 30 * np.exp(0.4j), 5 - 7j
    np.testing.assert_allclose(similarity(points, a * points + b), (a, b))
    target = rng.random((3, 7)) + 1j * rng.random((3, 7))
    for row, a, b in zip(target, *similarity(points, target)):
        columns = np.c_[points, np.ones(7)]
        np.testing.assert_allclose((a, b), np.linalg.lstsq(columns, row, rcond=None)[0])


@pytest.mark.parametrize("box", "1,2,3 a,b,c,d , 10,10,5,20 0,0,61,10 -1,0,10,10 0,0,nan,9".split())
def test_a_bad_box_is_refused(box):
    with pytest.raises(InputError, match="--box"):
        parse_box(box, width=60, height=90)


def test_a_box_becomes_the_square_around_it_in_the_scaled_image():
    assert parse_box("10,20,30,60", 60, 90) == (0, 20, 40, 60)
    assert parse_box("10,20,30,60", 60, 90, 0.5) == (0, 10, 20, 30)


def test_mask_mouth_greys_the_mouth_box_and_nothing_else():
    for name, template in faces.TEMPLATES.items():
        frames = torch.rand(2, 3, 40, 20) + 0.1
        masked = mask_mouth(frames, name)
        x0, y0, x1, y1 = template.mouth
        y, x = torch.meshgrid((torch.arange(40) + 0.5) / 40, (torch.arange(20) + 0.5) / 20, indexing="ij")
        inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)  # (40, 20)
        assert (masked[..., inside] == 0).all() and (masked[..., ~inside] == frames[..., ~inside]).all()
        assert (frames != 0).all()  # the caller's own frames are left alone


def test_the_crop_is_the_box_and_repeats_the_border_outside():
    image = picture(40, 60)
    np.testing.assert_array_equal(faces.crop_face(image, (0, 0, 20, 20), 20), image[:20, :20])
    np.testing.assert_array_equal(faces.crop_face(image, (25, 10, 45, 30), 20), image[10:30, 25:45])
    outside = faces.crop_face(image, (-20, -20, 20, 20), 40)
    assert (outside[:20, :20] == image[0, 0]).all() and (outside[20:, 20:] == image[0, 0]).all()
    small = faces.crop_face(image, (20.0, 10.0, 40.0, 30.0), 5)
    assert small.shape == (5, 5, 3) and abs(small[0, 0].astype(int) - image[0, 0]).max() < 30


def test_face_box_is_a_square_around_the_chosen_face():
    boxes = [(10, 20, 50, 70, 0.9), (100, 100, 120, 130, 0.8)]
    x0, y0, x1, y1 = faces.face_box(boxes, "toy")
    assert x1 - x0 == y1 - y0 == 50 * faces.TEMPLATES["toy"].side and (x0 + x1) / 2 == 30 and (y0 + y1) / 2 == 45
    x0, y0, x1, y1 = faces.face_box(boxes, "face", number=2)
    side = pytest.approx(30 * faces.TEMPLATES["face"].side)
    assert x1 - x0 == side and y1 - y0 == side and 100 < (x0 + x1) / 2 < 120
    for number in (0, 3):
        with pytest.raises(InputError, match="--face"):
            faces.face_box(boxes, "face", number)


def test_eyes_and_mouth_lie_at_the_templates_places_for_any_detector_box():
    points = np.array(faces.TEMPLATES["face"].points)
    for side, x, y in ((80.0, 17.0, 5.0), (33.0, -4.0, 9.5)):
        wanted = (x, y, x + side, y + side)
        for box in ((20, 20, 70, 75), (0, 0, 99, 99)):
            boxes = [(*box, 0.9, *(points * side + [x, y]).ravel())]
            np.testing.assert_allclose(faces.face_box(boxes, "face"), wanted, atol=1e-6)
    # a mouth 3 pixels lower: the square grows and moves a little; oracle: scipy's least squares
    moved = points * 80 + [0, 0] + np.array([[0, 0], [0, 0], [0, 3.0]])
    found = faces.face_box([(0, 0, 9, 9, 0.9, *moved.ravel())], "face")
    from scipy.optimize import least_squares

    best = least_squares(lambda v: (points * v[0] + v[1:] - moved).ravel(), [80.0, 0, 0]).x
    np.testing.assert_allclose(found, (best[1], best[2], best[1] + best[0], best[2] + best[0]), atol=1e-5)


def test_recrop_moves_the_key_points_to_those_of_the_other_template():
    x, y, side = faces.square_in_crop("ffhq", "face")
    there = np.array(faces.TEMPLATES["face"].points) * side + [x, y]
    np.testing.assert_allclose(there, faces.TEMPLATES["ffhq"].points, atol=0.012)
    y, x = torch.meshgrid(*[(torch.arange(100) + 0.5) / 50 - 1] * 2, indexing="ij")
    wide = torch.stack([x, y, x * 0]).expand(2, 5, 3, 100, 100)  # each pixel holds its position
    face = faces.recrop(wide, "ffhq", "face")
    for px, py in faces.TEMPLATES["face"].points:
        seen = (face[1, 2, :2, int(py * 100), int(px * 100)] + 1) / 2
        assert min(np.abs(np.array(faces.TEMPLATES["ffhq"].points) - seen.numpy()).max(1)) < 0.02
    assert faces.recrop(wide, "face", "face") is wide and faces.recrop(wide, "toy", "face") is wide
    beyond = faces.recrop(wide, "face", "ffhq")  # the border is repeated
    assert beyond.shape == wide.shape and (beyond[..., 0, :, 0] < -0.98).all()


# ---------------------------------------------------------------------------------------------------------------------
# face detectors

def test_faces_on_their_side_or_upside_down_are_not_upright():
    points = np.array(faces.TEMPLATES["face"].points) - 0.5
    for angle, expected in ((0, True), (30, True), (-30, True), (60, False), (-90, False), (180, False)):
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turned = points @ np.array([[c, s], [-s, c]])
        assert faces.is_upright((0, 0, 9, 9, 0.9, *turned.ravel())) == expected, angle


def test_without_weights_or_network_there_is_no_detector(tmp_path, monkeypatch):
    calls = []

    def offline(url, *_):
        calls.append(url)
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(faces.torch.hub, "download_url_to_file", offline)
    forget_detectors()
    try:
        for search in (faces.detect_faces, lambda image: faces.detect_faces_fast([image])):
            with pytest.raises(InputError, match="could not be fetched"):
                search(picture())
    finally:
        forget_detectors()
    assert calls and all(url.startswith("https://") for url in calls)


def forget_detectors():
    faces.face_detectors.cache_clear()


def mock_detector(monkeypatch, near):
    """Replaces the detector: the first detection has score .9. near: the second one, its x, y of eye, eye and mouth in a
    square of side 1, and its score"""

    def detect(detector, images, squares):
        return [[np.array([10, 10, 30, 30, 0.9])] for _ in images]

    def redetect(images, found):
        points, score = near
        return [np.array([*face[:4], score, *(np.array(points) * 20 + face[0])]) for face in found]

    monkeypatch.setattr(faces, "face_detectors", lambda: ["one"])
    monkeypatch.setattr(faces, "detect_in_squares", detect)
    monkeypatch.setattr(faces, "redetect", redetect)


UPRIGHT, LYING = (0.3, 0.3, 0.7, 0.3, 0.5, 0.7), (0.3, 0.7, 0.3, 0.3, 0.7, 0.5)


def test_a_face_needs_a_second_detection_that_is_upright_with_a_good_score(monkeypatch):
    for points, score, count in ((UPRIGHT, 0.7, 1), (LYING, 0.7, 0), (UPRIGHT, 0.5, 0)):
        mock_detector(monkeypatch, (points, score))
        found = faces.detect_faces(np.zeros((50, 50, 3), np.uint8))
        assert len(found) == count and all(face[:4] == (10, 10, 30, 30) for face in found)


@pytest.mark.parametrize("turns, words", [(0, ""), (1, "90 degrees to the left"), (2, "180"), (3, "to the right")])
def test_a_photo_is_turned_until_a_face_in_it_is_upright(monkeypatch, turns, words):
    image = np.ascontiguousarray(np.rot90(picture(), -turns))

    def detect(turned, *_):
        return [(1, 2, 3, 4, 0.9)] if np.array_equal(turned, picture()) else []

    monkeypatch.setattr(faces, "detect_faces", detect)
    turned, found, how = faces.turn_upright(image)
    assert np.array_equal(turned, picture()) and len(found) == 1 and words in how and bool(how) == bool(turns)
    monkeypatch.setattr(faces, "detect_faces", lambda turned, *_: [])
    turned, found, how = faces.turn_upright(image)
    assert np.array_equal(turned, image) and found == [] and how == ""
    monkeypatch.setattr(faces, "detect_faces", lambda turned, *tight: [(1, 2, 3, 4, 0.9)] * len(tight))
    turned, found, how = faces.turn_upright(image)  # a portrait that the face fills
    assert turned is image and len(found) == 1 and how == ""


def test_faces_are_found_where_they_are_in_real_photos(monkeypatch):
    weights, photos = SHARED / "weights/torch_home", SHARED / "media/photos"
    if not (weights.is_dir() and photos.is_dir()):
        pytest.skip("no detector weights or photos at hand")
    monkeypatch.setenv("TORCH_HOME", str(weights))
    forget_detectors()
    try:
        image = load_photo(photos / "portrait_man.jpg")
        H, W = image.shape[:2]
        for shift in (0, H):  # a face away from the middle of a tall picture is found as well
            found = faces.detect_faces(np.concatenate([np.full((shift, W, 3), 99, np.uint8), image]))
            x0, y0, x1, y1, score, *points = found[0]
            assert score > 0.5 and x0 < W / 2 < x1 and shift < (y0 + y1) / 2 < shift + 0.7 * H
            assert len(points) == 6 and x0 < points[0] < points[2] < x1 and y0 < points[1] < points[5] < y1
            for turns in (1, 2, 3):  # on its side and upside down
                turned = np.ascontiguousarray(np.rot90(image, turns))
                assert faces.detect_faces(turned) == []
                assert np.array_equal(faces.turn_upright(turned)[0], image)
        assert faces.turn_upright(load_photo(photos / "dog_no_human_face.jpg"))[1] == []
    finally:
        forget_detectors()


# ---------------------------------------------------------------------------------------------------------------------
# landmark detectors

@pytest.mark.parametrize("spec", ["", "fan:x", "dlib", "mediapipe:", "hog:x", "face.task"])
def test_an_unknown_landmark_detector_is_refused(spec):
    with pytest.raises(InputError, match="expected mediapipe:FILE, dlib:FILE or fan"):
        faces.landmark_detector(spec)


def test_fan_gets_the_detection_box_of_a_crop_and_a_low_score_gives_no_landmarks(monkeypatch):
    import face_alignment

    calls, score = [], [0.5]

    class Fan:
        def __init__(self, kind, **options):
            calls.append(options)

        def get_landmarks_from_image(self, image, detected_faces, return_landmark_score):
            calls.append(detected_faces[0])
            return [np.ones((68, 2))], [np.full(68, score[0])], None

    monkeypatch.setattr(face_alignment, "FaceAlignment", Fan)
    monkeypatch.setattr(faces, "fetch", lambda name: calls.append(name))
    loose = Template(mouth=(), eyes=(), lips=(), side=1.25, shift=(0.02, -0.1))
    monkeypatch.setitem(faces.TEMPLATES, "face", loose)
    detect = faces.landmark_detector("fan")
    assert detect(np.zeros((100, 100, 3), np.uint8)).shape == (68, 2)
    detect(np.zeros((100, 300, 3), np.uint8), (200, 10, 250, 60))
    score[0] = 0.1
    assert detect(np.zeros((100, 100, 3), np.uint8)) is None
    assert calls[0] == "fan" and calls[1]["device"] == "cpu"
    assert calls[1]["compile"] is False and calls[1]["flip_input"] is False
    np.testing.assert_allclose(calls[2], (8.4, 18, 88.4, 98))  # 80 wide; the crop is shifted off its centre
    np.testing.assert_allclose(calls[3], (204.2, 19, 244.2, 59))  # as in the whole image, half as large


def test_dlib_starts_from_five_boxes_derived_from_the_crop(tmp_path, monkeypatch):
    (tmp_path / "model.dat").write_bytes(b"trees")
    calls = []

    def rectangle(*box):
        calls.append(box)
        return box

    def predictor(path):  # puts every landmark into the middle of the box
        return lambda image, box: SimpleNamespace(
            parts=lambda: [SimpleNamespace(x=(box[0] + box[2]) / 2, y=(box[1] + box[3]) / 2)] * 68)

    monkeypatch.setitem(sys.modules, "dlib", SimpleNamespace(rectangle=rectangle, shape_predictor=predictor))
    spec, image = f"dlib:{tmp_path / 'model.dat'}", np.zeros((128, 400, 3), np.uint8)
    detect = faces.landmark_detector(spec)
    points, moved = detect(image[:, :128]), detect(image, (150, 0, 278, 128))
    middle, side = faces.DLIB_BOX["face"]
    np.testing.assert_allclose(points, [np.multiply(128, middle)] * 68, atol=1)
    np.testing.assert_allclose(moved - points, [(150, 0)] * 68)
    crop = faces.VIEW_SIDE / (1 + 2 * faces.VIEW_MARGIN)
    assert len(calls) == 10 and all(abs((x1 - x0) / crop - side) < 0.02 for x0, _, x1, _ in calls)
    with pytest.raises(InputError, match="not for crops of the template toy"):
        faces.landmark_detector(spec, "toy")
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(InputError, match="pip install dlib-bin"):
        faces.landmark_detector(spec)


def test_mediapipe_finds_the_face_in_the_box_and_not_the_larger_one_beside_it(tmp_path, monkeypatch):
    closed = []

    class Landmarker:  # finds the largest white square of an image
        @classmethod
        def create_from_options(cls, options):
            return cls()

        def detect(self, image):
            H, W = image.shape[:2]
            found, count = scipy.ndimage.label(image[..., 0] > 128)
            if not count:
                return SimpleNamespace(face_landmarks=[])
            largest = 1 + np.argmax(scipy.ndimage.sum_labels(found > 0, found, np.arange(1, count + 1)))
            y, x = (np.mean(at) + 0.5 for at in np.nonzero(found == largest))
            return SimpleNamespace(face_landmarks=[[SimpleNamespace(x=x / W, y=y / H)] * 478])

        def close(self):
            closed.append(True)

    tasks = SimpleNamespace(BaseOptions=lambda **_: None,
                            vision=SimpleNamespace(FaceLandmarker=Landmarker, FaceLandmarkerOptions=lambda **_: None))
    mediapipe = SimpleNamespace(__version__="1", Image=lambda form, data: data, ImageFormat=SimpleNamespace(SRGB=0))
    for name, module in (("mediapipe", mediapipe), ("mediapipe.tasks", tasks), ("mediapipe.tasks.python", tasks)):
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "face.task").write_bytes(b"model")
    image = np.zeros((120, 300, 3), np.uint8)
    image[40:80, 30:70], image[50:70, 240:260] = 255, 255
    detect = faces.landmark_detector(f"mediapipe:{tmp_path / 'face.task'}")
    np.testing.assert_allclose(detect(image, (235, 45, 265, 75)), np.full((68, 2), (250, 60)), atol=0.5)
    np.testing.assert_allclose(detect(image[:, :120]), np.full((68, 2), (50, 60)), atol=0.5)
    assert detect(image, (140, 45, 170, 75)) is None and not closed
    del detect
    assert len(closed) == 1


def test_mediapipe_finds_the_lips_of_a_real_face():
    pytest.importorskip("mediapipe", reason="mediapipe is an optional package")
    model, clips = SHARED / "weights" / "face_landmarker.task", SHARED / "media" / "grid_s1_original"
    if not model.is_file() or not clips.is_dir():
        pytest.skip("../shared has no model or no clips here")
    frame = next(iter(read_video(sorted(clips.iterdir())[0])))
    detect = faces.landmark_detector(f"mediapipe:{model}")
    assert detect(np.zeros((128, 128, 3), np.uint8)) is None
    p = detect(frame, (90, 60, 270, 240))
    assert (np.diff(p[1:16, 0]) > 0).all() and p[0, 0] < p[3, 0] and p[13, 0] < p[16, 0]
    assert p[36, 0] < p[39, 0] < p[42, 0] < p[45, 0]
    assert p[27:31, 1].max() < p[51, 1] < p[62, 1] <= p[66, 1] + 1 < p[57, 1] < p[8, 1]


def test_mediapipes_points_lie_near_dlibs_where_the_annotations_are_hard_to_match():
    pytest.importorskip("mediapipe", reason="mediapipe is an optional package")
    dlib = pytest.importorskip("dlib", reason="dlib is an optional package")
    models = importlib.util.find_spec("face_recognition_models")  # not imported: it wants pkg_resources
    model, clips = SHARED / "weights" / "face_landmarker.task", SHARED / "media" / "grid_others"
    if not models or not model.is_file() or not clips.is_dir():
        pytest.skip("dlib's network, or ../shared's model or clips are not here")
    network = Path(models.origin).parent / "models" / "shape_predictor_68_face_landmarks.dat"
    predict_68, off = dlib.shape_predictor(str(network)), []
    detect_dlib = dlib.get_frontal_face_detector()
    detect = faces.landmark_detector(f"mediapipe:{model}")
    for path in sorted(clips.iterdir()):
        frame = next(iter(read_video(path)))
        theirs = np.array([(p.x, p.y) for p in predict_68(frame, detect_dlib(frame)[0]).parts()])
        found = detect(frame, (90, 60, 270, 240))
        off.append(np.hypot(*(found - theirs).T) / np.hypot(*(theirs[45] - theirs[36])))
    off = np.mean(off, 0)
    assert off[[0, 16, 17, 26]].mean() < 0.08 and off[[4, 6, 9, 10, 12]].mean() < 0.08


# ---------------------------------------------------------------------------------------------------------------------
# landmarks of a clip

def test_short_gaps_are_filled_linearly_and_counted():
    rng = np.random.default_rng(0)
    base = rng.uniform(20, 60, (68, 2))
    base[36], base[45] = (30, 40), (70, 40)
    true = base + np.arange(30)[:, None, None] * rng.uniform(-0.1, 0.1, (68, 2))
    found = [None if t in (0, 7, 8, 9, 29) else true[t] for t in range(30)]
    points, missing = interpolate_gaps(found)
    assert missing == 5 and points.dtype == np.float32 and points.shape == (30, 68, 2)
    np.testing.assert_allclose(points[1:29], true[1:29], atol=1e-4)
    np.testing.assert_allclose(points[0], true[1], atol=1e-5)  # at the ends: the nearest


def test_landmarks_of_another_face_count_as_missing():
    face = np.random.default_rng(0).uniform(20, 60, (68, 2))
    found = [face] * 20
    found[6] = face * 0.4  # a smaller face in the background
    points, missing = interpolate_gaps(found)
    assert missing == 1
    np.testing.assert_allclose(points[6], face, atol=1e-4)


def test_long_gaps_and_many_gaps_are_refused_with_the_reason():
    face = np.random.default_rng(0).uniform(20, 60, (68, 2))
    with pytest.raises(InputError, match="no face in 6 frames in a row"):
        interpolate_gaps([face] * 20 + [None] * 6 + [face] * 20)
    with pytest.raises(InputError, match="a face in 14 of 21 frames"):
        interpolate_gaps([face, face, None] * 7)
    with pytest.raises(InputError, match="a face in 0 of 3"):
        interpolate_gaps([None] * 3)


def test_smoothing_keeps_a_parabola_and_removes_jitter():
    t = np.arange(40.0)
    curve = np.broadcast_to((0.3 * t**2 - 2 * t)[:, None, None], (40, 68, 2))
    np.testing.assert_allclose(smooth(curve)[2:-2], curve[2:-2], atol=1e-3)
    noise = np.random.default_rng(0).standard_normal((4000, 68, 2))
    weights = np.array((-3, 12, 17, 12, -3)) / 35  # Savitzky and Golay's table
    assert smooth(noise).var() == pytest.approx((weights**2).sum(), rel=0.02)
    short = np.ones((3, 68, 2), np.float32)
    assert smooth(short) is short


# ---------------------------------------------------------------------------------------------------------------------
# clips of a video

def faces_of_numbered(frames, boxes):
    """detect_faces_fast for frames whose top left pixel is their number: boxes[number] is the list of faces there."""
    return [[(*box, 0.9) for box in boxes(int(frame[0, 0, 0]))] for frame in frames]


def numbered(count, shade=lambda k: 100):
    frames = np.stack([np.full((60, 80, 3), shade(k), np.uint8) for k in range(count)])
    frames[:, 0, 0] = np.arange(count)[:, None]
    return list(frames)


def clips_and_reasons(monkeypatch, frames, boxes):
    """Clips (begin, end, left edge of the box) of faces.find_clips, and the reasons for the frames between them"""
    monkeypatch.setattr(faces, "detect_faces_fast", lambda views: faces_of_numbered(views, boxes))
    found = faces.find_clips(frames)
    assert [piece[0] for piece in found] == [0, *(piece[1] for piece in found[:-1])] and found[-1][1] == len(frames)
    left = faces.TEMPLATES["face"].side / 2 * 20 - 10  # extra width of the crop of a box 20 pixels wide
    clips = [(a, b, round(box[0] + left)) for a, b, box, _ in found if box]
    return clips, [reason for *_, box, reason in found if not box]


def test_scene_changes_end_clips_and_flicker_does_not(monkeypatch):
    cut = numbered(60, lambda k: 40 if k < 33 else 200)
    assert np.flatnonzero(np.diff(faces.label_scenes(cut))).tolist() == [32]
    assert faces.label_scenes(numbered(60, lambda k: 100 + 40 * (k % 2))).max() == 0  # each change is like its neighbours
    assert faces.label_scenes(numbered(60, lambda k: 4 * k)).max() == 0
    assert faces.label_scenes(numbered(1)).tolist() == [0]
    clips, _ = clips_and_reasons(monkeypatch, cut, lambda k: [(10, 10, 30, 30)])
    assert clips == [(0, 33, 10), (33, 60, 10)]


def test_short_gaps_without_a_face_are_filled_and_long_ones_end_a_clip(monkeypatch):
    def boxes(k):
        return [] if 20 <= k < 30 or 50 <= k < 75 else [(10, 10, 30, 30)]

    clips, reasons = clips_and_reasons(monkeypatch, numbered(110), boxes)
    assert clips == [(0, 46, 10), (75, 110, 10)] and len(reasons) == 1 and "no face" in reasons[0]


def test_the_face_that_is_largest_for_longest_becomes_the_clip(monkeypatch):
    def boxes(k):  # one for 70 frames, a larger one for a moment, a small one throughout
        return [(10, 10, 30, 30)] * (k < 70) + [(40, 5, 70, 35)] * (20 <= k <= 30) + [(60, 40, 70, 50)]

    clips, _ = clips_and_reasons(monkeypatch, numbered(100), boxes)
    assert clips[0] == (0, 66, 10) and len(clips) == 1


def test_faces_that_pass_each_other_keep_their_tracks():
    pairs = [[(2 * i, 5, 2 * i + 20, 25, 0.9), (60 - 2 * i, 40, 80 - 2 * i, 60, 0.9)] for i in range(12)]
    looks = [pair if i % 2 else pair[::-1] for i, pair in enumerate(pairs)]
    tracks = faces.link_tracks(looks, np.zeros(12))
    assert [len(track) for track in tracks] == [12, 12]
    assert all(np.ptp([face[1] for face in track.values()]) == 0 for track in tracks)


def test_a_face_that_moves_slowly_is_cut_into_steady_clips_and_a_fast_one_is_refused(monkeypatch):
    clips, _ = clips_and_reasons(monkeypatch, numbered(120), lambda k: [(k // 3, 10, k // 3 + 20, 30)])
    assert len(clips) == 4 and clips[0][0] == 0 and clips[-1][1] == 120
    assert all(a[1] == b[0] and 5 <= b[2] - a[2] <= 15 for a, b in itertools.pairwise(clips))

    def boxes(k):
        return [(9 * k % 50, 10, 9 * k % 50 + 20, 30)]

    monkeypatch.setattr(faces, "detect_faces_fast", lambda views: faces_of_numbered(views, boxes))
    with pytest.raises(InputError, match="moves too far|less than half"):
        faces.find_clip_box(numbered(40))
