"""landmarks.py: geometry of crops, corrections of training data, the shipped network on turned and hidden faces."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import initialise
import landmarks
from data import Pack, PackWriter
from faces import crop_face, landmarks_header, square_in_crop
from landmarks import CENTRE, MIRROR, sample_crops, to_real
from media import InputError, load_photo, to_tensor, write_video
from motion import Motion
from warp import Face, Pose, Warp

PORTRAIT = Path(__file__).parents[1] / "examples/astronaut.jpg"
BOX = 134, 130, 382, 377  # where the face is in it


@pytest.fixture(scope="module")
def net():
    return landmarks.load_landmarks()


def photo():
    return crop_face(load_photo(PORTRAIT), BOX, 128)


def interocular(points):
    return np.hypot(*(points[45] - points[36]))


def test_the_mirror_image_swaps_left_and_right():
    assert [MIRROR[i] for i in MIRROR] == list(range(68))
    swapped = {0: 16, 17: 26, 31: 35, 36: 45, 37: 44, 40: 47, 48: 54, 50: 52, 59: 55, 60: 64, 61: 63, 67: 65, 8: 8}
    assert {i: MIRROR[i] for i in swapped} == swapped


@pytest.mark.parametrize("side", [20, 300])
def test_a_rotated_crop_shows_the_pixels_that_it_covers(side):
    y, x = np.mgrid[:500, :510] + 0.5
    ramp = torch.from_numpy(3 * x + y).float()[None, None]
    a = side * np.exp(0.5j)
    b = 255 + 250j - a * CENTRE
    at = a * landmarks.unit_square(8) + b
    assert np.allclose(sample_crops(ramp, [a], [b], 8)[0, 0], 3 * at.real + at.imag, atol=0.01)


def test_grey_crop_contains_all_pixels_of_the_crop():
    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    whole = (torch.from_numpy(image).float() @ landmarks.GREY)[None, None]
    inside, over_the_edge, beyond = (40 * np.exp(0.3j), 30 + 20j), (60 + 0j, -20 - 10j), (50 + 0j, 300 + 300j)
    for a, b in (inside, over_the_edge, beyond):
        part, corner = landmarks.grey_crop(image, a, b)
        got, wanted = sample_crops(part, [a], [b - corner], 16), sample_crops(whole, [a], [b], 16)
        assert got.isfinite().all() and torch.allclose(got, wanted, atol=0.01)


def test_shut_eyes_closes_the_lids_by_their_share():
    brow = np.array([0.2 + 0.3j, 0.35 + 0.22j, 0.5 + 0.2j, 0.65 + 0.22j, 0.8 + 0.27j])
    lids = np.array([0.25 + 0.62j, 0.42 + 0.52j, 0.58 + 0.52j, 0.75 + 0.62j, 0.58 + 0.68j, 0.42 + 0.68j])
    y = np.stack([np.concatenate([brow, lids])] * 2)
    v = np.stack([landmarks.unit_square(32)] * 2)
    taken, moved = landmarks.shut_eyes(v, y, np.array([0.0, 1.0]), np.random.default_rng(0))
    assert np.allclose(taken[0], v[0]) and np.allclose(moved[0], y[0])
    assert np.allclose(moved[1, [6, 7]], moved[1, [10, 9]], atol=0.01)
    assert np.allclose(moved[1, :6], y[1, :6])
    assert taken[1, 20, 16].imag < v[1, 20, 16].imag - 0.05, "the middle of a shut eye shows the skin of the upper lid"
    assert np.allclose(taken[1, :, 2], v[1, :, 2]) and np.allclose(taken[1, :4], v[1, :4]), "beyond the eye nothing moves"


def drawn_lips(seam, gap):
    """A dark upper lip, a darker seam, a bright lower lip -> picture, 68 points, of which only the lips are used"""
    x, y = np.meshgrid((np.arange(128) + 0.5) / 128, (np.arange(128) + 0.5) / 128)
    seam_at = seam + 0.03 * (1 - ((x - 0.5) / 0.18) ** 2)
    picture = 150 - 30 * (np.abs(y - seam_at + 0.03) < 0.03) - 60 * np.exp(-(((y - seam_at) / 0.006) ** 2))
    points = np.full(68, 0.5 + 0.5j)
    across = np.r_[np.linspace(-1, 1, 7), np.linspace(1, -1, 7)[1:-1], np.linspace(-1, 1, 5), np.linspace(1, -1, 5)[1:-1]]
    half = np.r_[0, [-0.05] * 5, 0, [0.05] * 5, 0, [-gap / 2] * 3, 0, [gap / 2] * 3]
    points[48:] = 0.5 + 0.18 * across + 1j * (0.7 + half)
    return torch.from_numpy(picture)[None].byte(), points


def test_nearly_shut_lips_meet_on_the_seam_and_open_lips_stay():
    drawn = [drawn_lips(0.69, 0.008), drawn_lips(0.705, -0.004), drawn_lips(0.69, 0.05), drawn_lips(2, 0.008)]
    before = np.stack([points for _, points in drawn])
    after = landmarks.seal_lips(torch.stack([picture for picture, _ in drawn]), before)
    middle = (after[:, [61, 62, 63]] + after[:, [67, 66, 65]]).imag / 2
    for i, seam in ((0, 0.69), (1, 0.705)):
        assert np.allclose(after[i, [61, 62, 63]], after[i, [67, 66, 65]])
        assert np.allclose(middle[i], seam + 0.03 * np.array([0.75, 1, 0.75]), atol=0.006)
        assert np.isclose(after[i, 51].imag - before[i, 51].imag, (middle[i, 1] - 0.7) / 2), "outer lips follow by half"
    assert np.allclose(after[2], before[2]), "open lips stay"
    assert np.allclose(middle[3], 0.7), "where nothing is dark the line stays"


def test_refined_parts_return_to_their_crops_and_the_mouth_is_the_mean_of_both_sides():
    net, photo = landmarks.LandmarkNet(), np.zeros((90, 120, 3), np.uint8)
    points, a = np.random.default_rng(0).random(68) * 20 + 40 + 40j, 60 * np.exp(0.2j)
    for network in (net.eye, net.mouth):
        torch.nn.init.zeros_(network.layers[-1].weight), torch.nn.init.zeros_(network.layers[-1].bias)
        network.mean[:] = 0.5
    net.mouth.mean[0, 0] = 0.4  # the corner on the left; in the mirror image, that on the right
    with torch.inference_mode():
        refined = landmarks.refine_parts(net, [landmarks.grey_crop(photo, a, 0j)], [a], [points])[0]
    middle = points[48:].mean()
    assert np.allclose(refined[50:54], middle) and np.allclose(refined[55:], middle)
    assert np.allclose(refined[[48, 54]] - middle, 0.45 * a * np.array([-0.05, 0.05]), atol=1e-4)
    for i in (landmarks.LEFT_EYE, landmarks.RIGHT_EYE):
        assert np.allclose(refined[i], points[i[5:]].mean() - 0.12j * 0.38 * a, atol=1e-4)
    unrefined = np.r_[:17, 27:36]
    assert np.allclose(refined[unrefined], points[unrefined])


def test_measure_eyes_gives_the_gap_of_the_lids_and_the_height_of_the_brows():
    points = np.zeros((3, 68, 2))
    points[:, 36:48, 0] = [0, 10, 20, 30, 20, 10, 60, 70, 80, 90, 80, 70]
    points[:, 40:42, 1], points[:, 46:48, 1] = 6, 9
    points[:, 17:27, 1] = -18
    eyes, brows = landmarks.measure_eyes(points)
    assert np.allclose(eyes, [0.2, 0.3]) and np.allclose(brows, 0.2)


def test_landmarks_follow_a_mirrored_rotated_or_enlarged_photo(net):
    image, box = photo(), (0, 0, 128, 128)
    points = landmarks.find_landmarks(net, image, box)
    unit = interocular(points)
    flipped = landmarks.find_landmarks(net, image[:, ::-1], box)[MIRROR] * (-1, 1) + (128, 0)
    assert np.abs(flipped - points).mean() < 0.01 * unit
    large = Image.fromarray(image).resize((384, 384), Image.Resampling.BICUBIC)
    turned = np.array(large.rotate(20, Image.Resampling.BICUBIC))
    found = landmarks.to_complex(landmarks.find_landmarks(net, turned, (0, 0, 384, 384))) / 3
    back = np.exp(1j * np.radians(20)) * (found - 64 - 64j) + 64 + 64j
    assert np.abs(to_real(back) - points).mean() < 0.04 * unit


def test_a_hidden_face_is_lost_and_found_again(net):
    image, noise = photo(), np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    frames = (frame for frame in [image, image, noise, image])
    points = landmarks.track_landmarks(net, frames, (0, 0, 128, 128))
    eyes, brows = landmarks.measure_eyes(points)
    assert points.shape == (4, 68, 2) and eyes.shape == brows.shape == (4, 2)
    assert np.isnan(points).all((1, 2)).tolist() == [False, False, True, False] == np.isnan(eyes).all(1).tolist()
    assert np.abs(points[3] - points[0]).max() < 0.1 * interocular(points[0])
    assert landmarks.track_landmarks(net, [], (0, 0, 9, 9)).shape == (0, 68, 2)


def test_each_scene_of_a_video_is_searched_for_its_own_face(net, tmp_path, monkeypatch):
    """The face jumps to the right in frame 13, and its detection fails in the first frame there: all frames have it"""
    image, wide = photo(), np.full((640, 1100, 3), 128, np.uint8)
    left, right, box = wide.copy(), wide[:, :, ::-1] // 3, np.array([40, 60, 600, 620])
    left[60:620, 40:600] = right[60:620, 500:1060] = np.array(Image.fromarray(image).resize((560, 560)))
    frames = [(left if k < 13 else right).copy() for k in range(25)]
    for k, frame in enumerate(frames):
        frame[:40, 1060:] = 10 * k  # readable in the video
    write_video(tmp_path / "a.mp4", iter(frames), 25)
    searched = []

    def detect_faces(frame):
        searched.append(round(frame[5:20, -20:-5].mean() / 10))
        return [] if searched[-1] == 13 else [None]

    monkeypatch.setattr(landmarks, "detect_faces", detect_faces)
    monkeypatch.setattr(
        landmarks, "face_box", lambda *_: (box + (searched[-1] > 12) * np.array([460, 0, 460, 0])) * 480 / 640)
    points, scene = landmarks.track_video(net, tmp_path / "a.mp4", 25)
    assert points.shape == (25, 68, 2) and scene.tolist() == [0] * 13 + [1] * 12 and searched == [0, 13, 18]
    expected = landmarks.find_landmarks(net, left, box)
    assert np.abs(points[:13] - expected).mean() < 4 and np.abs(points[13:] - expected - (460, 0)).mean() < 4
    assert len(landmarks.track_video(net, tmp_path / "a.mp4", 7)[0]) == 7
    monkeypatch.setattr(landmarks, "detect_faces", lambda frame: [None] * 2)
    assert np.isfinite(landmarks.track_video(net, tmp_path / "a.mp4", 2, number=2)[0]).all()
    assert np.isnan(landmarks.track_video(net, tmp_path / "a.mp4", 2, number=3)[0]).all()


def test_the_pose_of_crops_follows_turns_shifts_and_blinks(net):
    big = load_photo(PORTRAIT)
    face = Face(big, landmarks.find_landmarks(net, big, BOX), net.solid.double().numpy())
    warp = Warp(face)
    poses = dict(yaw=8), dict(pitch=8), dict(roll=8), dict(shift=(0.1, 0)), dict(shift=(0, 0.1)), dict(scale=1.1)
    frames = [warp()] + [warp(pose=Pose(**pose)) for pose in poses] + [warp(blink=1.0)]
    crops = to_tensor(np.stack([crop_face(frame, BOX, 64) for frame in frames]))
    read = landmarks.read_pose(net, crops)
    change = (read - read[0])[1:].abs()                                          # (7, POSE_DIM)
    assert change[:6].argmax(1).tolist()[:3] == [0, 1, 2] and (change.diagonal()[:3] > 4).all()
    assert (change[3:6, 3:6].argmax(1) == torch.arange(3)).all() and (change.diagonal()[3:6] > 0.02).all()
    assert change[6, 6] > 0.03 > 3 * change[:6, 6].max()
    assert read[7, 6] == pytest.approx(landmarks.SHUT_OPENING)                   # shut lids are read as .03 to .07
    left, top, side = square_in_crop("face", "ffhq")                             # a wider crop of the same photo
    wide = (BOX[0] + 247 * left, BOX[1] + 247 * top, BOX[0] + 247 * (left + side), BOX[1] + 247 * (top + side))
    wider = landmarks.read_pose(net, to_tensor(crop_face(frames[0], wide, 128)[None]), "ffhq")[0]
    torch.testing.assert_close(wider[:3], read[0, :3], atol=1.5, rtol=0)
    place = side * wider[3:6] + torch.tensor([left, top, 0]).float()
    torch.testing.assert_close(place, read[0, 3:6], atol=0.02, rtol=0)
    mirrored = landmarks.read_pose(net, crops.flip(-1))
    torch.testing.assert_close(mirrored[:, [0, 2]], -read[:, [0, 2]], atol=0.01, rtol=0)
    torch.testing.assert_close(mirrored[:, 3], 1 - read[:, 3], atol=1e-4, rtol=0)
    torch.testing.assert_close(mirrored[:, [1, 4, 5, 6]], read[:, [1, 4, 5, 6]], atol=0.01, rtol=1e-3)


def test_a_moved_photo_has_another_pose_and_shut_eyes(net, monkeypatch):
    big = load_photo(PORTRAIT)
    points = (landmarks.find_landmarks(net, big, BOX) - BOX[:2]) * 64 / 247.5
    pack, mean = SimpleNamespace(clip=lambda c: {3: np.stack([0 * points, points])}[c]), net.solid.double().numpy()
    photo, read = crop_face(big, BOX, 64), []
    for yaw, pitch, blink, *shift in ((0,) * 6, (9, 0, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0), (7, -14, 0, 0.05, 0.06, 0.07)):
        motion = Motion(np.array([[yaw, pitch, 0, *shift]]), np.array([blink]), np.zeros(1))
        monkeypatch.setattr(initialise, "random_motion", lambda rng, limits, motion=motion: motion)
        moved = initialise.move_photo(pack, mean, photo, 3, 1, None)
        assert moved.shape == photo.shape and moved.dtype == np.uint8
        read.append(landmarks.read_pose(net, to_tensor(moved[None]))[0])
    still, turned, shut, shifted = read
    torch.testing.assert_close(still, landmarks.read_pose(net, to_tensor(photo[None]))[0], atol=0.6, rtol=0)
    assert turned[0] - still[0] > 4 and abs(shut[0] - still[0]) < 1
    assert still[6] - shut[6] > 0.03 and abs(still[6] - turned[6]) < 0.02
    reader = landmarks.PoseReader("face")                                       # the numbers that stand for a motion
    followed = reader.follow(still[None], motion.poses, np.ones(1))[0]
    torch.testing.assert_close(followed[3:6], shifted[3:6], atol=0.01, rtol=0)
    assert followed[6] == landmarks.SHUT_OPENING and (still[3:6] - shifted[3:6]).abs().min() > 0.015


def test_landmarks_scatter_on_noise_and_not_on_a_face(net):
    box, noise = (0, 0, 128, 128), np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for image, scatters in ((photo(), False), (noise, True)):
        points = landmarks.find_landmarks(net, image, box)
        assert (landmarks.landmark_scatter(net, image, points) > landmarks.SCATTER_LIMIT) == scatters


def test_weights_of_another_kind_are_refused_in_one_line(tmp_path):
    torch.save(dict(kind="landmarks", format=1, config=dict(width=4), net={}), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="weights.pt: not the weights of LandmarkNet"):
        landmarks.load_landmarks(tmp_path / "weights.pt")


def test_training_on_a_pack_brings_the_landmarks_near_those_of_the_pack(net, tmp_path, monkeypatch):
    image, rng = photo(), np.random.default_rng(0)
    points = landmarks.find_landmarks(net, image, (0, 0, 128, 128))
    with PackWriter(tmp_path / "photos", 128, "face") as writer:
        for i in range(12):
            writer.add([image], np.zeros(640, np.float32), identity=f"person {i}", source=f"{i}.jpg")
    pack = Pack(tmp_path / "photos")
    lines = [landmarks_header(pack, "dlib"), *[{}] * 11, dict(reason="a face in 0 of 1 frames")]
    (tmp_path / "photos/landmarks").mkdir()
    (tmp_path / "photos/landmarks/clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (points + rng.normal(0, 0.1, (12, 1, 2))).astype("<f4").tofile(tmp_path / "photos/landmarks/points.bin")
    images, found = landmarks.read_packs([tmp_path / "photos"], rng)
    with PackWriter(tmp_path / "small", 64, "face") as writer:
        for i in range(12):
            writer.add([image[::2, ::2]], np.zeros(640, np.float32), identity=f"person {i}", source=f"{i}.jpg")
    shutil.copytree(tmp_path / "photos/landmarks", tmp_path / "small/landmarks")
    lines[0] = landmarks_header(Pack(tmp_path / "small"), "dlib")
    (tmp_path / "small/landmarks/clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="--size 128 or more, these have 64"):
        landmarks.main([str(tmp_path / "small"), "--out", str(tmp_path / "net.pt")])
    assert images.shape == (len(found), 1, 128, 128) and len(found) == 10, "one held out, one without a face"
    lower = landmarks.DLIB_SHIFT * 128
    np.testing.assert_allclose(to_real(found * 128) + (0, lower), np.stack([points] * 10), atol=0.5)
    out = tmp_path / "net.pt"
    monkeypatch.setattr(landmarks, "CROPS_PER_BATCH", 16)
    landmarks.main([str(tmp_path / "photos"), "--steps", "8", "--out", str(out)])
    trained = landmarks.load_landmarks(out)
    assert torch.equal(trained.solid, net.solid)
    again = landmarks.find_landmarks(trained, image, (0, 0, 128, 128))
    assert np.abs(again - points).mean() < 0.05 * interocular(points)
    with pytest.raises(InputError, match="exists"):
        landmarks.main([str(tmp_path / "photos"), "--out", str(out)])
