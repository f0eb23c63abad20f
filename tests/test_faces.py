"""Faces: crops and boxes, detectors, tracks, landmarks and their store."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage

import faces
from faces import Template, parse_box, similarity
from media import InputError, read_video

SHARED = Path(__file__).parents[2] / "shared"


# ---------------------------------------------------------------------------------------------------------------------
# points and boxes

def test_a_similarity_is_found_again_and_the_nearest_of_many_noisy_ones():
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


def test_a_box_becomes_the_square_around_it_at_the_size_shown():
    assert parse_box("10,20,30,60", 60, 90) == (0, 20, 40, 60)
    assert parse_box("10,20,30,60", 60, 90, 0.5) == (0, 10, 20, 30)


# ---------------------------------------------------------------------------------------------------------------------
# landmark detectors

@pytest.mark.parametrize("spec", ["", "fan:x", "dlib", "mediapipe:", "hog:x", "face.task"])
def test_an_unknown_landmark_detector_is_refused(spec):
    with pytest.raises(InputError, match="expected mediapipe:FILE, dlib:FILE or fan"):
        with faces.landmark_detector(spec):
            pass


def test_fan_gets_the_box_that_the_crop_implies_and_a_low_score_gives_no_landmarks(monkeypatch):
    import face_alignment

    asked, score = [], [0.5]

    class Fan:
        def __init__(self, kind, **options):
            asked.append(options)

        def get_landmarks_from_image(self, image, detected_faces, return_landmark_score):
            asked.append(detected_faces[0])
            return [np.ones((68, 2))], [np.full(68, score[0])], None

    monkeypatch.setattr(face_alignment, "FaceAlignment", Fan)
    monkeypatch.setattr(faces, "fetch", lambda name: asked.append(name))
    loose = Template(mouth=(), eyes=(), lips=(), side=1.25, shift=(0.02, -0.1))
    monkeypatch.setitem(faces.TEMPLATES, "face", loose)
    with faces.landmark_detector("fan") as detect:
        assert detect(np.zeros((100, 100, 3), np.uint8)).shape == (68, 2)
        detect(np.zeros((100, 300, 3), np.uint8), (200, 10, 250, 60))
        score[0] = 0.1
        assert detect(np.zeros((100, 100, 3), np.uint8)) is None
        assert "2DFAN4" in detect.name
    assert asked[0] == "fan" and asked[1]["device"] == "cpu"
    assert asked[1]["compile"] is False and asked[1]["flip_input"] is False
    np.testing.assert_allclose(asked[2], (8.4, 18, 88.4, 98))  # 80 wide; the crop is shifted off its centre
    np.testing.assert_allclose(asked[3], (204.2, 19, 244.2, 59))  # as in the whole image, half as large


def test_dlib_starts_from_five_boxes_that_follow_from_the_crop(tmp_path, monkeypatch):
    (tmp_path / "model.dat").write_bytes(b"trees")
    asked = []

    def rectangle(*box):
        asked.append(box)
        return box

    def predictor(path):  # puts every landmark into the middle of the box
        return lambda image, box: SimpleNamespace(
            parts=lambda: [SimpleNamespace(x=(box[0] + box[2]) / 2, y=(box[1] + box[3]) / 2)] * 68)

    monkeypatch.setitem(sys.modules, "dlib", SimpleNamespace(rectangle=rectangle, shape_predictor=predictor))
    spec, image = f"dlib:{tmp_path / 'model.dat'}", np.zeros((128, 400, 3), np.uint8)
    with faces.landmark_detector(spec) as detect:
        points, moved = detect(image[:, :128]), detect(image, (150, 0, 278, 128))
    middle, side = faces.DLIB_BOX["face"]
    np.testing.assert_allclose(points, [np.multiply(128, middle)] * 68, atol=1)
    np.testing.assert_allclose(moved - points, [(150, 0)] * 68)
    crop = faces.VIEW_SIDE / (1 + 2 * faces.MARGIN_68)
    assert len(asked) == 10 and all(abs((x1 - x0) / crop - side) < 0.02 for x0, _, x1, _ in asked)
    with pytest.raises(InputError, match="not for crops of the template toy"):
        with faces.landmark_detector(spec, "toy"):
            pass
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(InputError, match="pip install dlib-bin"):
        with faces.landmark_detector(spec):
            pass


def test_mediapipe_sees_the_face_in_the_box_and_not_the_larger_one_beside_it(tmp_path, monkeypatch):
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
    with faces.landmark_detector(f"mediapipe:{tmp_path / 'face.task'}") as detect:
        np.testing.assert_allclose(detect(image, (235, 45, 265, 75)), np.full((68, 2), (250, 60)), atol=0.5)
        np.testing.assert_allclose(detect(image[:, :120]), np.full((68, 2), (50, 60)), atol=0.5)
        assert detect(image, (140, 45, 170, 75)) is None and not closed
    with faces.landmark_detector(f"mediapipe:{tmp_path / 'face.task'}", None) as detect:
        np.testing.assert_allclose(detect(image), np.full((68, 2), (50, 60)), atol=0.5)
    assert len(closed) == 2


def test_mediapipe_finds_the_lips_of_a_real_face():
    pytest.importorskip("mediapipe", reason="mediapipe is an optional package")
    model, clips = SHARED / "weights" / "face_landmarker.task", SHARED / "media" / "grid_s1_original"
    if not model.is_file() or not clips.is_dir():
        pytest.skip("../shared has no model or no clips here")
    frame = next(iter(read_video(sorted(clips.iterdir())[0])))
    with faces.landmark_detector(f"mediapipe:{model}", None) as detect:
        assert detect(np.zeros((128, 128, 3), np.uint8)) is None
        p = detect(frame)
    assert (np.diff(p[1:16, 0]) > 0).all() and p[0, 0] < p[3, 0] and p[13, 0] < p[16, 0]
    assert p[36, 0] < p[39, 0] < p[42, 0] < p[45, 0]
    assert p[27:31, 1].max() < p[51, 1] < p[62, 1] <= p[66, 1] + 1 < p[57, 1] < p[8, 1]


def test_mediapipes_points_lie_near_dlibs_where_the_two_annotations_are_hard_to_match():
    pytest.importorskip("mediapipe", reason="mediapipe is an optional package")
    dlib = pytest.importorskip("dlib", reason="dlib is an optional package")
    models = importlib.util.find_spec("face_recognition_models")  # not imported: it wants pkg_resources
    model, clips = SHARED / "weights" / "face_landmarker.task", SHARED / "media" / "grid_others"
    if not models or not model.is_file() or not clips.is_dir():
        pytest.skip("dlib's network, or ../shared's model or clips are not here")
    network = Path(models.origin).parent / "models" / "shape_predictor_68_face_landmarks.dat"
    predict_68, off = dlib.shape_predictor(str(network)), []
    detect_dlib = dlib.get_frontal_face_detector()
    with faces.landmark_detector(f"mediapipe:{model}", None) as detect:
        for path in sorted(clips.iterdir()):
            frame = next(iter(read_video(path)))
            theirs = np.array([(p.x, p.y) for p in predict_68(frame, detect_dlib(frame)[0]).parts()])
            off.append(np.hypot(*(detect(frame) - theirs).T) / np.hypot(*(theirs[45] - theirs[36])))
    off = np.mean(off, 0)
    assert off[[0, 16, 17, 26]].mean() < 0.08 and off[[4, 6, 9, 10, 12]].mean() < 0.08
