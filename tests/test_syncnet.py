"""The sync expert: losses with known answers, offsets of constructed clips, accuracy by shift, an exact resume."""

import json
import math
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import faces
import landmarks
import media
import syncnet
import toyfaces
from audio import log_mel, mel_windows
from checkpoint import load_checkpoint, save_checkpoint
from data import Pack, PackWriter
from judges import SyncNetV2, Wav2LipExpert
from landmarks import load_landmarks
from losses import sync_loss
from media import InputError, load_audio, read_video, to_tensor, write_video
from syncnet import SyncNet, Windows, best_offset, embed_clip, expert_loss, load_sync, logits_by_shift

LN2 = math.log(2)
CLIP = torch.tensor([7, 7, 7, 3, 3, 9])
MIDDLE = torch.tensor([10, 13, 14, 5, 60, 11])  # of clip 7, only 10 and 14 are MIN_SHIFT = 4 apart


# ----------------------------- data that is learnt in seconds: the height of a bright bar follows the loudness of noise

def bar_clip(seed, T=60, size=16):
    """-> frames uint8 (T, size, size, 3), wav (640 T,)"""
    rng = np.random.default_rng(seed)
    loud = np.interp(np.arange(T), np.arange(0, T + 6, 3), rng.random(len(range(0, T + 6, 3))))  # random every 3 frames
    frames = np.full((T, size, size, 3), rng.integers(40, 120, 3), np.uint8)
    for t in range(T):
        frames[t, size - 1 - round(loud[t] * (size // 2 - 2)) : size - 1, 4:13] = 230
    envelope = np.interp(np.arange(640 * T) / 640 - 0.5, np.arange(T), loud)
    wav = 0.5 * 10 ** (2 * (envelope - 1)) * rng.uniform(-1, 1, 640 * T)  # a range of 40 dB
    return frames, wav.astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """-> folder of a pack of 24 people with a clip each, and an expert trained on it for seconds"""
    folder = tmp_path_factory.mktemp("world")
    with PackWriter(folder / "pack", 16, "toy") as pack:
        for seed in range(24):
            pack.add(*bar_clip(seed), identity=f"p{seed}", source=f"bar {seed}")
    command = ["train", "--data", str(folder / "pack"), "--out", str(folder / "sync.pt"), "--device", "cpu"]
    small_run = "--size 16 --steps 60 --batch 6 --windows 5 --dim 24 --width 0.1"
    syncnet.main(command + small_run.split())
    return folder / "pack", folder / "sync.pt"


def make_expert(**options):
    torch.manual_seed(1)
    return SyncNet(**(dict(size=32, dim=20, width=0.1) | options))


@pytest.fixture(scope="module")
def lips():
    """An expert for real faces with untrained towers"""
    net = make_expert(size=64, lips=True)
    net.landmarks = load_landmarks()
    return net.eval()


@pytest.fixture(scope="module")
def portrait():
    """A face (1, 3, 64, 64), cropped as in template "face" """
    photo = Image.open(Path(syncnet.__file__).parent / "examples/astronaut.jpg").convert("RGB")
    return to_tensor(np.array(photo.crop((130, 122, 398, 390)).resize((64, 64))))[None]


def random_batch(B=3, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    frames, mel = torch.rand(B, 5, 3, 8, 8, generator=g) * 2 - 1, torch.rand(B, 1, 10, 4, generator=g) * 8 - 4
    blocks = torch.ones(size // 8, size // 8)  # patches: convolutions average fine noise
    return torch.kron(frames, blocks), torch.kron(mel, torch.ones(8, 4))


# ---------------------------------------------------------------------------------------------------- the expert's loss

def test_zero_logits_have_loss_ln_2_and_the_logarithm_of_the_number_of_candidates():
    terms = expert_loss(torch.zeros(6, 6, dtype=torch.float64), CLIP, MIDDLE)
    assert {name: v.item() for name, v in terms.items() if name != "contrast"} == pytest.approx(
        dict(loss=LN2, in_sync=LN2, shifted=LN2, other=LN2))
    candidates = [5, 4, 5, 6, 6, 6]  # windows 0 and 1, 1 and 2 are too near
    assert terms["contrast"].item() == pytest.approx(np.mean(np.log(candidates)))


def test_the_terms_agree_with_a_naive_loop():
    logits = torch.randn(6, 6, dtype=torch.float64) * 3
    kinds = dict(in_sync=[], shifted=[], other=[])
    for i in range(6):
        for j in range(6):
            p = 1 / (1 + math.exp(-logits[i, j]))
            if i == j:
                kinds["in_sync"].append(-math.log(p))
            elif CLIP[i] != CLIP[j]:
                kinds["other"].append(-math.log(1 - p))
            elif abs(int(MIDDLE[i] - MIDDLE[j])) >= 4:
                kinds["shifted"].append(-math.log(1 - p))
    terms = expert_loss(logits, CLIP, MIDDLE)
    for name, values in kinds.items():
        assert terms[name].item() == pytest.approx(np.mean(values)), name
    a, b, c = (np.mean(kinds[name]) for name in ("in_sync", "shifted", "other"))
    assert terms["loss"].item() == pytest.approx(a / 2 + b / 4 + c / 4)


def test_only_windows_of_a_clip_nearer_than_four_frames_are_left_out():
    base = torch.randn(6, 6, dtype=torch.float64)
    reference = expert_loss(base, CLIP, MIDDLE)
    changes = torch.zeros(6, 6, dtype=torch.bool)
    for i in range(6):
        for j in range(6):
            logits = base.clone()
            logits[i, j] += 2
            terms = expert_loss(logits, CLIP, MIDDLE)
            changes[i, j] = any(abs(terms[name] - reference[name]) > 1e-9 for name in terms)
    dropped = {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert {(i, j) for i, j in np.argwhere(~changes.numpy()).tolist()} == dropped


def test_without_other_clips_their_sound_changes_no_term():
    logits = torch.randn(6, 6, dtype=torch.float64)
    terms = expert_loss(logits, CLIP, MIDDLE, other_clips=False)
    changed = expert_loss(logits + 3 * (CLIP[:, None] != CLIP), CLIP, MIDDLE, other_clips=False)
    assert set(terms) == {"loss", "in_sync", "shifted", "contrast"}
    assert all(torch.equal(terms[k], changed[k]) for k in terms)


def test_terms_without_a_pair_are_absent_and_a_batch_without_negatives_is_refused():
    one = expert_loss(torch.zeros(3, 3), torch.zeros(3), torch.tensor([0, 10, 20]))
    singles = expert_loss(torch.zeros(3, 3), torch.arange(3), torch.tensor([5, 5, 5]))
    assert "other" not in one and "shifted" not in singles
    assert one["loss"].item() == pytest.approx(LN2) == singles["loss"].item()
    with pytest.raises(InputError, match="give a smaller --negatives"):
        expert_loss(torch.zeros(2, 2), torch.zeros(2), torch.tensor([0, 1]))


# --------------------------------------------------------------------------------------------------------- the networks

@pytest.mark.parametrize("size, image_size, options", [
    (16, 16, {}), (48, 48, {}), (96, 96, {}), (48, 128, {}), (32, 72, dict(cosine=True)), (64, 80, dict(lips=True))])
def test_every_parameter_gets_a_gradient_at_every_size(size, image_size, options):
    net = make_expert(size=size, **options)
    if net.lips:
        net.landmarks = load_landmarks()
    frames, mel = random_batch(B=4, size=image_size)
    clip, k = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 9, 5, 5])
    terms = expert_loss(net.logits(net.face(frames), net.sound(mel)), clip, k)
    (terms["loss"] + terms["contrast"]).backward()
    without = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {name for name, p in net.named_parameters() if not p.requires_grad} | (
        {"log_scale", "bias"} if net.cosine else set())


def test_embeddings_have_unit_length_and_logits_are_scale_times_cosine_plus_bias():
    net = make_expert()
    with torch.no_grad():
        net.log_scale.fill_(math.log(7)), net.bias.fill_(-1.5)
        face, sound = net.face(random_batch(3)[0]), net.sound(random_batch(4, seed=5)[1])
        logits = net.logits(face, sound)
    assert face.shape == (3, 20) and sound.shape == (4, 20) and logits.shape == (3, 4)
    assert torch.allclose(face.norm(dim=1), torch.ones(3)) and torch.allclose(sound.norm(dim=1), torch.ones(4))
    cosine = F.cosine_similarity(face[:, None], sound[None], dim=2)
    assert torch.allclose(logits, 7 * cosine - 1.5, atol=1e-5)


def test_a_window_has_the_same_embedding_alone_as_in_a_batch_in_training_and_in_evaluation():
    frames, mel = random_batch(5)
    with torch.no_grad():
        net = make_expert().train()
        face, sound = net.face(frames), net.sound(mel)
        net.eval()
        for i in range(5):
            assert torch.allclose(net.face(frames[i : i + 1])[0], face[i], atol=1e-5)
            assert torch.allclose(net.sound(mel[i : i + 1])[0], sound[i], atol=1e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_the_face_tower_uses_the_lower_half_of_all_five_frames_alone(size):
    net, (frames, _) = make_expert(), random_batch(2, size)
    frames.requires_grad_(True)
    net.face(frames)[:, 0].sum().backward()
    assert frames.grad[..., : size // 2 - (size > 32), :].abs().max() == 0  # shrinking mixes rows at the border
    assert (frames.grad[..., size // 2 :, :].abs().amax((2, 3, 4)) > 0).all()  # (B, 5)


def test_the_order_of_the_frames_matters():
    net, (frames, _) = make_expert(), random_batch(2)
    assert not torch.allclose(net.face(frames), net.face(frames.flip(1)), atol=1e-3)


def test_wrong_shapes_of_frames_and_sound_are_named():
    net = make_expert()
    with pytest.raises(AssertionError, match=r"\(2, 4, 3, 32, 32\)"):
        net.face(torch.zeros(2, 4, 3, 32, 32))
    with pytest.raises(AssertionError, match=r"\(10, 3, 16, 16\)"):
        net.face(torch.zeros(2, 5, 3, 16, 16))
    with pytest.raises(AssertionError, match=r"\(10, 3, 48, 40\)"):
        net.face(torch.zeros(2, 5, 3, 48, 40))
    with pytest.raises(AssertionError, match=r"\(2, 1, 80, 15\)"):
        net.sound(torch.zeros(2, 1, 80, 15))


def test_one_batch_can_be_overfitted():
    net, (frames, mel) = make_expert(size=16, dim=32), random_batch(6, 16)
    clip, k = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([2, 20, 30, 2, 9, 2])
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(20):
        terms = expert_loss(net.logits(net.face(frames), net.sound(mel)), clip, k)
        opt.zero_grad()
        (terms["loss"] + 0.5 * terms["contrast"]).backward()
        opt.step()
    assert terms["loss"] < 0.2  # from .69


# ------------------------------------------------------------------------------------------------ the shape of the lips

def test_the_shape_of_lips_does_not_depend_on_position_size_and_rotation():
    z = torch.randn(3, 68, dtype=torch.complex64)
    shape = landmarks.lip_shape(z)
    moved = landmarks.lip_shape(z * (2.5 * np.exp(0.3j)) + (7 - 4j))
    assert shape.shape == (3, 50) and torch.allclose(shape, moved, atol=1e-4)
    x, y = shape.unflatten(1, (25, 2))[0, 3]  # landmark 51 from the middle between the eyes, in distances of the eyes
    left, right = z[0, 36:42].mean(), z[0, 42:48].mean()
    assert complex(x, y) == pytest.approx(complex((z[0, 51] - (left + right) / 2) / (right - left)), rel=1e-4)


def test_the_expert_reads_the_same_lips_as_find_landmarks(lips, portrait):
    image = ((portrait[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    points = landmarks.find_landmarks(lips.landmarks, image, (0, 0, 64, 64))
    expected = landmarks.lip_shape(torch.from_numpy(faces.to_complex(points)))
    with torch.no_grad():
        assert (lips.read(portrait)[0] - expected).abs().max() < 0.05  # find_landmarks moves and rotates its crop


def test_lips_of_a_mirror_image_are_the_mirrored_lips(lips, portrait):
    with torch.no_grad():
        one, other = (lips.read(x)[0].unflatten(0, (25, 2)) for x in (portrait, portrait.flip(-1)))
    assert torch.allclose(other, one[landmarks.LIP_MIRROR] * torch.tensor([-1.0, 1.0]), atol=1e-3)


def test_the_sync_loss_of_lips_has_a_gradient_at_the_mouth_of_every_frame_alone(lips, portrait):
    frames = portrait.expand(2, 5, 3, 64, 64).clone() + 0.1 * torch.randn(2, 5, 3, 64, 64)
    frames.requires_grad_(True)
    sync_loss(lips, frames, random_batch(2)[1]).backward()
    gradient = frames.grad.abs().sum(2)  # (B, 5, H, W)
    assert (gradient.amax((2, 3)) > 0).all() and gradient[:, :, :24].max() == 0  # eyes
    rows = gradient.sum((0, 1, 3))
    assert rows[34:62].sum() > 0.8 * rows.sum()


def test_pixels_follow_the_gradient_of_an_opening_mouth(lips, portrait):
    x = portrait.clone().requires_grad_(True)

    def opening(x):  # middle of the lower inner lip minus that of the upper one
        shape = lips.read(x)[0].unflatten(0, (25, 2))
        return shape[18, 1] - shape[14, 1]

    before = opening(x)
    before.backward()
    with torch.no_grad():
        assert opening(x + 2 * x.grad / x.grad.norm()) > before + 0.01


def test_lips_are_augmented_alike_in_all_windows_and_mirrored_in_half_of_the_items(lips):
    x = lips.landmarks.mean.new_zeros(7, 5, 50) + landmarks.lip_shape(torch.view_as_complex(lips.landmarks.mean))
    x[..., 0] -= 1  # moves the left corner of the mouth far out; the right one is number 6
    mirrored = []
    for seed in range(40):
        augmented = syncnet.augment_lips(x, x[0], np.random.default_rng(seed))
        assert (augmented - augmented[0, 0]).abs().max() < 0.06  # noise alone
        mirrored.append(augmented[0, 0, 12].item() > 0.8)
        assert mirrored[-1] != (augmented[0, 0, 0].item() < -0.8)
    assert 10 < sum(mirrored) < 30


# -------------------------------------------------------------------------------------------------------- the sync loss

class FixedLogits:
    """An expert with the same logits for every input"""

    def __init__(self, logits):
        self.given = torch.tensor(logits, dtype=torch.float64)

    def face(self, frames):
        return torch.zeros(len(frames), 2, dtype=torch.float64)

    sound = face

    def logits(self, face, sound):
        return self.given


def test_the_sync_loss_at_zero_logits_is_ln_2_plus_ln_b():
    frames, mel = random_batch(3)
    assert sync_loss(FixedLogits([[0.0] * 3] * 3), frames, mel).item() == pytest.approx(LN2 + math.log(3))
    assert sync_loss(FixedLogits([[0.0]]), frames[:1], mel[:1]).item() == pytest.approx(LN2)


def test_the_sync_loss_of_known_logits():
    a, b, c, d = 2.0, -1.0, 0.5, 3.0  # face 0 against sounds 0, 1; face 1 against sounds 0, 1
    absolute = (math.log(1 + math.exp(-a)) + math.log(1 + math.exp(-d))) / 2
    chosen = math.exp(a) / (math.exp(a) + math.exp(b)), math.exp(d) / (math.exp(c) + math.exp(d))
    contrast = -sum(map(math.log, chosen)) / 2
    frames, mel = random_batch(2)
    assert sync_loss(FixedLogits([[a, b], [c, d]]), frames, mel).item() == pytest.approx(absolute + contrast)


def test_the_gradient_of_the_sync_loss_does_not_grow_with_the_experts_scale():
    net, (frames, mel) = make_expert().requires_grad_(False), random_batch(1)
    norms = []
    for scale in (50.0, 400.0):
        net.log_scale.fill_(math.log(scale)), net.bias.fill_(-2 * scale)  # negative logits for any input
        x = frames.clone().requires_grad_(True)
        sync_loss(net, x, mel).backward()
        norms.append(x.grad.norm())
    assert norms[0] > 0 and torch.allclose(norms[0], norms[1], rtol=1e-3)


def test_the_sync_loss_of_an_expert_without_a_scale_is_not_divided():
    net, (frames, mel) = SyncNet(16, 24, 0.25, cosine=True).eval(), random_batch(3)
    given = FixedLogits(net.logits(net.face(frames), net.sound(mel)).tolist())
    assert sync_loss(net, frames, mel).item() == pytest.approx(sync_loss(given, frames, mel).item(), rel=1e-4)


def test_the_sync_loss_has_a_gradient_in_every_frame_and_does_not_change_the_expert(world):
    expert = load_sync(world[1], "cpu", size=16)
    frames, mel = random_batch(3, 16)
    before = {name: p.clone() for name, p in expert.state_dict().items()}
    frames.requires_grad_(True)
    sync_loss(expert, frames, mel).backward()
    assert (frames.grad[..., 8:, :].abs().amax((2, 3, 4)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in expert.parameters()) and not expert.training
    assert all(torch.equal(p, before[name]) for name, p in expert.state_dict().items())


def test_minimising_the_sync_loss_makes_logits_positive(world):
    expert = load_sync(world[1], "cpu")
    item = Windows(Pack(world[0]), range(24), expert, 3, seed=4)[0]
    frames = item["frames"][:, 2:3].expand(-1, 5, -1, -1, -1).clone().requires_grad_(True)  # a still mouth
    opt = torch.optim.Adam([frames], 0.02)

    def lowest_logit():
        return expert.logits(expert.face(frames), expert.sound(item["mel"])).diagonal().min().item()

    before = lowest_logit()
    for _ in range(30):
        opt.zero_grad()
        sync_loss(expert, frames, item["mel"]).backward()
        opt.step()
    assert before < 0 < lowest_logit()


# ------------------------------------------------------------------------------------------------------------- the data

def test_an_item_has_the_frames_and_mel_windows_of_its_clip_and_frame_numbers(world):
    pack = Pack(world[0])
    for n in range(5):
        item = Windows(pack, [4, 5], make_expert(size=16), 3, seed=2, augment=False)[n]
        c, ks = int(item["clip"][0]), item["middle"].tolist()
        assert c in (4, 5) and item["frames"].shape == (3, 5, 3, 16, 16) and item["mel"].shape == (3, 1, 80, 16)
        for i, k in enumerate(ks):
            assert torch.equal(item["frames"][i], to_tensor(pack.frames(c, range(k - 2, k + 3))))
        assert np.array_equal(item["mel"].numpy(), mel_windows(log_mel(pack.sound(c)), ks))
        assert min(np.diff(ks)) >= 1 and min(ks) >= 2 and max(ks) < 58


def test_an_item_depends_on_its_seed_and_number_alone(world):
    pack, net = Pack(world[0]), make_expert(size=16)
    a, b = Windows(pack, range(24), net, 3, seed=2), Windows(pack, range(24), net, 3, seed=2)
    [b[n] for n in (9, 1, 4)]  # earlier items must not matter
    assert all(torch.equal(a[7][name], b[7][name]) for name in ("frames", "mel", "clip", "middle"))
    assert not torch.equal(a[7]["frames"], Windows(pack, range(24), net, 3, seed=3)[7]["frames"])
    assert not torch.equal(a[7]["frames"], a[8]["frames"])


def test_images_vary_between_windows_and_not_within_a_window():
    rng = np.random.default_rng(3)
    still = random_batch(7, 32)[0][:1, :1].expand(7, 5, -1, -1, -1)  # one picture, seven windows of five
    augmented = syncnet.augment_images(still, rng)
    assert augmented.shape == still.shape
    for window in augmented:
        assert all(torch.allclose(frame, window[0], atol=1e-5) for frame in window)
    assert all((augmented[i] - augmented[j]).abs().mean() > 0.02 for i in range(7) for j in range(i))


def test_a_clip_is_mirrored_as_a_whole_in_half_of_the_items():
    ramp = torch.linspace(-0.5, 0.5, 32).expand(6, 5, 3, 32, 32)  # bright to the right
    mirrored = []
    for seed in range(40):
        augmented = syncnet.augment_images(ramp, np.random.default_rng(seed))
        windows = (augmented[..., 20:].mean((1, 2, 3, 4)) < augmented[..., :12].mean((1, 2, 3, 4))).tolist()
        assert len(set(windows)) == 1
        mirrored.append(windows[0])
    assert 10 < sum(mirrored) < 30


def test_larger_images_are_shrunk_alike_in_training_and_in_validation(world):
    pack, net = Pack(world[0]), make_expert(size=16)
    pack.size, big = 32, lambda c, k: np.kron(Pack(world[0]).frame(c, k), np.ones((2, 2, 1), np.uint8))
    pack.frame = big
    item = Windows(pack, [4], net, 3, seed=2, augment=False)[0]
    plain = Windows(Pack(world[0]), [4], net, 3, seed=2, augment=False)[0]
    assert item["frames"].shape == (3, 5, 3, 16, 16)
    assert (item["frames"] - plain["frames"]).abs().mean() < 0.06  # the filter softens edges
    face, _ = embed_clip(net, (big(4, k) for k in range(60)), log_mel(pack.sound(4)))
    with torch.no_grad():
        alike = (net.face(item["frames"]) * face[item["middle"] - 2]).sum(1)  # cosines; `big` rounds to uint8
        unlike = (net.face(item["frames"]) * face[(item["middle"] + 18) % 50]).sum(1)
    assert alike.min() > 0.98 and alike.min() > unlike.max(), (alike, unlike)


def test_clips_without_a_window_are_not_trained_on(tmp_path):
    with PackWriter(tmp_path / "pack", 16, "toy") as pack:
        for seed, T in enumerate((3, 9, 9, 9)):
            pack.add(*bar_clip(seed, T=T), f"p{seed}", "")
    args = syncnet.parse(["train", "--data", str(tmp_path / "pack"), "--size", "16"])
    _, clips, _, val_clips = syncnet.load_data(args, tmp_path)
    assert {*clips, *val_clips} <= {1, 2, 3} and len(clips)


# -------------------------------------------------------------------------------------------------------------- offsets

def test_logits_by_shift_agree_with_a_naive_loop_over_several_blocks():
    net, K = make_expert(), 300
    g = torch.Generator().manual_seed(3)
    face, sound = (F.normalize(torch.randn(K, 20, generator=g), dim=1) for _ in range(2))
    table = logits_by_shift(net.logits, face, sound)
    expected = np.full((K, 31), np.nan)
    logits = net.logits(face, sound).detach().numpy()
    for k in range(K):
        for d in range(-15, 16):
            if 0 <= k + d < K:
                expected[k, 15 + d] = logits[k, k + d]
    assert np.allclose(table, expected, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("late", [-8, -1, 0, 3, 8])
def test_the_offset_is_the_shift_of_a_constructed_clip(late):
    g = torch.Generator().manual_seed(3)
    own = F.normalize(torch.randn(75, 20, generator=g), dim=1)
    face, sound = own[20:55], own[20 - late : 55 - late]  # sound k + late belongs to picture k
    found, confidence, fit = best_offset(logits_by_shift(make_expert().logits, face, sound))
    assert found == late and 3 < confidence < 7  # scale 5, cosine 1 and about 0
    assert fit == pytest.approx(5 - syncnet.MATCH_LOGIT * (75 / 31) ** 0.5, abs=0.2)  # a clip shorter than 3 s


def test_an_offset_of_few_windows_is_not_chosen():
    table = np.zeros((8, 31))
    for d in range(-15, 16):
        table[[k for k in range(8) if not 0 <= k + d < 8], 15 + d] = np.nan
    table[0, 15 + 7] = 100  # one window of eight
    table[:, 15 + 2] += 1
    table[:, 15 - 1] += 0.5
    assert best_offset(table)[0] == 2 and best_offset(table, largest=1)[0] == -1


def test_a_streamed_clip_has_the_embeddings_of_its_windows():
    net, (frames, wav) = make_expert(size=16), bar_clip(5, T=23)
    mel = log_mel(wav)
    face, sound = embed_clip(net, iter(frames), mel, batch=4)  # 19 windows: not a multiple of 4
    x = to_tensor(frames)
    with torch.no_grad():
        for k in range(2, 21):
            assert torch.allclose(net.face(x[None, k - 2 : k + 3])[0], face[k - 2], atol=1e-5)
            assert torch.allclose(net.sound(torch.from_numpy(mel_windows(mel, [k])))[0], sound[k - 2], atol=1e-5)
    assert len(face) == len(sound) == 19


@pytest.mark.parametrize("late", [-6, 0, 5])
def test_the_offset_of_a_video_with_shifted_sound_is_found(world, tmp_path, capsys, late):
    frames, wav = bar_clip(1001)  # not in the training data
    wav = np.concatenate([np.zeros(640 * late, np.float32), wav]) if late >= 0 else wav[-640 * late :]
    write_clip(tmp_path / "clip.mp4", frames, wav)
    syncnet.main(["offset", str(tmp_path / "clip.mp4"), "--expert", str(world[1]), "--device", "cpu"])
    line = capsys.readouterr().out.splitlines()[-1]
    words = {-6: "6 frames (0.24 s) early", 0: "in sync", 5: "5 frames (0.20 s) late"}[late]
    assert f"the sound is {words};" in line and "56 windows" in line and "guess" not in line


def test_an_offset_without_a_match_is_called_a_guess(world, tmp_path, capsys, monkeypatch):
    write_clip(tmp_path / "clip.mp4", *bar_clip(1001, T=12))
    for fit, verdict in ((-0.1, "a guess"), (0.1, "sure")):
        monkeypatch.setattr(syncnet, "best_offset", lambda table, fit=fit: (-2, 1.25, fit))
        syncnet.main(["offset", str(tmp_path / "clip.mp4"), "--expert", str(world[1]), "--device", "cpu"])
        assert f"2 frames (0.08 s) early; confidence 1.2, {verdict} (8 windows)" in capsys.readouterr().out


def write_clip(path, frames, wav):
    write_video(path, iter(frames), len(frames), wav)


@pytest.mark.parametrize("late", [-6, 5])
def test_a_clip_is_written_in_sync_with_the_same_pictures(world, tmp_path, capsys, late):
    frames, own = bar_clip(1001)
    wav = np.concatenate([np.zeros(640 * late, np.float32), own])[: 640 * 60] if late > 0 else own[-640 * late :]
    write_clip(tmp_path / "clip.mp4", frames, wav)
    command = ["offset", str(tmp_path / "clip.mp4"), "--expert", str(world[1]), "--device", "cpu"]
    syncnet.main([*command, "--fix", str(tmp_path / "fixed.mp4")])
    assert f"the sound moved by {-late / 25:+.2f} s" in capsys.readouterr().out
    before, after = (np.stack(list(read_video(tmp_path / name))) for name in ("clip.mp4", "fixed.mp4"))
    assert np.array_equal(before, after)
    sound = load_audio(tmp_path / "fixed.mp4")
    assert abs(len(sound) - len(wav)) <= 1024  # a block of AAC
    middle = slice(640 * 10, 640 * 45)  # the bar follows the loudness of this sound
    assert np.corrcoef(sound[middle], own[middle])[0, 1] > 0.8
    syncnet.main([*command[:1], str(tmp_path / "fixed.mp4"), *command[2:]])
    assert "the sound is in sync;" in capsys.readouterr().out
    with pytest.raises(InputError, match="--overwrite"):
        syncnet.main([*command, "--fix", str(tmp_path / "fixed.mp4")])


def test_other_codecs_become_h264_and_the_sound_keeps_its_rate_and_channels(tmp_path):
    frames, wav = bar_clip(1001)
    write_clip(tmp_path / "clip.mp4", frames, wav)
    args = ["-i", tmp_path / "clip.mp4", "-vf", "scale=64:48", "-c:v", "mpeg1video", "-b:v", "2M"]
    args += ["-ac", "2", "-ar", "44100", "-c:a", "mp2"]
    subprocess.run([media.get_ffmpeg_exe(), "-loglevel", "error", *args, tmp_path / "old.mpg"], check=True)
    syncnet.write_shifted(tmp_path / "old.mpg", 3, tmp_path / "new.mp4")
    text = subprocess.run(media.decode_command(tmp_path / "new.mp4"), capture_output=True, text=True).stderr
    assert "Video: h264" in text and "44100 Hz, stereo" in text and "64x48" in text
    moved, old = load_audio(tmp_path / "new.mp4"), load_audio(tmp_path / "old.mpg")
    assert np.corrcoef(moved[5000:25000], old[5000 + 3 * 640 : 25000 + 3 * 640])[0, 1] > 0.9


@pytest.mark.parametrize("source", ["whole.mp4", "cut.mp4", "cut.mkv", "late.mov", "late.ts"])
def test_a_shifted_click_is_within_a_frame_of_where_it_should_be(tmp_path, source):
    frames, wav = np.zeros((50, 32, 32, 3), np.uint8), np.zeros(32000, np.float32)
    frames[35], wav[35 * 640 + 320 : 36 * 640] = 255, 0.5
    write_clip(tmp_path / "whole.mp4", frames, wav)
    start = ["-ss", "0.5"] if "cut" in source else []
    late = ["-itsoffset", "0.3", "-ss", "0.3", "-i", tmp_path / "whole.mp4"]
    options = ["-map", "0:v", "-map", "1:a", "-c:v", "libx264", "-c:a", "aac"]
    options = [*late, *options] if "late" in source else ["-c", "copy", "-avoid_negative_ts", "disabled"]
    if source != "whole.mp4":
        command = [media.get_ffmpeg_exe(), "-loglevel", "error", *start, "-i", tmp_path / "whole.mp4", *options]
        subprocess.run([*command, tmp_path / source], check=True)
    at, count = flash_and_click(tmp_path / source)
    syncnet.write_shifted(tmp_path / source, 3, tmp_path / "out.mp4")
    moved, n = flash_and_click(tmp_path / "out.mp4")
    assert abs(moved - at + 3) < 1 and abs(n - count) <= 1, (at, moved, count, n)


def flash_and_click(path):
    """-> frames from the brightest picture to the loudest sound, number of pictures"""
    light = [frame.mean() for frame in read_video(path)]
    wav = abs(load_audio(path, normalise=False))
    return np.argmax(wav > wav.max() / 2) / 640 - np.argmax(light), len(light)


def test_a_drawn_face_is_cropped_from_the_middle_of_a_wide_picture(world, tmp_path, capsys):
    frames, wav = bar_clip(1001)
    wide = np.pad(frames, ((0, 0), (0, 0), (10, 10), (0, 0)))  # (60, 16, 36, 3)
    write_clip(tmp_path / "wide.mp4", wide, np.concatenate([np.zeros(640 * 3, np.float32), wav]))
    command = ["offset", str(tmp_path / "wide.mp4"), "--expert", str(world[1]), "--device", "cpu"]
    syncnet.main(command)
    assert "the sound is 3 frames" in capsys.readouterr().out
    syncnet.main([*command, "--box", "10,0,26,16"])
    assert "the sound is 3 frames" in capsys.readouterr().out


def test_a_face_is_detected_every_six_seconds_and_otherwise_keeps_its_last_box(world, tmp_path, monkeypatch):
    write_clip(tmp_path / "clip.mp4", bar_clip(1, T=330, size=32)[0][:, :, :24], bar_clip(1, T=330)[1])
    expert, segments = load_sync(world[1], "cpu"), []
    expert.template = "face"

    def detect(frames):
        segments.append(len(frames))
        if len(segments) == 2:
            raise InputError("a face in 0 of 30 frames looked at")
        return (4.0 * len(segments), 0.0, 16.0, 12.0)

    def refuse():
        raise InputError("weights are missing")

    crops = []
    monkeypatch.setattr(syncnet, "find_clip_box", detect)
    monkeypatch.setattr(syncnet, "crop_face", lambda frame, box, size: crops.append(box[0]))
    list(syncnet.crop_faces(tmp_path / "clip.mp4", expert))
    assert segments == [150, 150, 30] and crops == [4.0] * 300 + [12.0] * 30
    monkeypatch.undo()
    monkeypatch.setattr(faces, "face_detectors", refuse)
    with pytest.raises(InputError, match="weights are missing; give --box"):
        list(syncnet.crop_faces(tmp_path / "clip.mp4", expert))


# ------------------------------------------------------------------------------------ Wav2Lip's expert in place of ours

def test_wav2lips_expert_can_replace_ours(world, tmp_path, capsys):
    torch.manual_seed(0)
    net = Wav2LipExpert()
    for module in net.modules():  # random weights, scaled so that ReLUs pass half of the values
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    torch.save(dict(state_dict=net.state_dict()), tmp_path / "lipsync_expert.pth")
    expert = load_sync(tmp_path / "lipsync_expert.pth", "cpu", size=16)
    frames, mel = random_batch(2, 32)
    frames.requires_grad_(True)
    loss = sync_loss(expert, frames, mel)
    loss.backward()
    assert loss.isfinite() and (frames.grad[..., 16:, :].abs().amax((2, 3, 4)) > 0).all()
    assert not expert.training and all(not p.requires_grad for p in expert.parameters())

    with PackWriter(tmp_path / "pack", 16, "toy") as pack:
        pack.add(*bar_clip(3, T=8), "a", "a")
    write_clip(tmp_path / "clip.mp4", *bar_clip(3, T=8))
    options = ["--expert", str(tmp_path / "lipsync_expert.pth"), "--device", "cpu"]
    syncnet.main(["test", "--data", str(tmp_path / "pack"), *options])
    assert "1 clips, 4 windows" in capsys.readouterr().out
    syncnet.main(["offset", str(tmp_path / "clip.mp4"), "--box", "0,0,16,16", *options])
    assert "(4 windows)" in capsys.readouterr().out
    with pytest.raises(InputError, match="not the weights of wav2lip_expert"):
        torch.save(dict(weights=1), tmp_path / "other.pth")
        load_sync(tmp_path / "other.pth", "cpu")


# ---------------------------------------------------------------------------------------- validation: accuracy by shift

def test_accuracies_by_shift_agree_with_a_naive_count():
    rng = np.random.default_rng(2)
    table = rng.normal(size=(40, 9))
    table[:3, 0] = table[-2:, 8] = math.nan
    accuracy = syncnet.accuracy_by_shift(table)
    for d in range(1, 5):
        wrong = [v for row in table for v in (row[4 - d], row[4 + d]) if math.isfinite(v)]
        yes, no = np.mean([v > 0 for v in table[:, 4]]), np.mean([v > 0 for v in wrong])
        assert accuracy[d] == pytest.approx((yes + 1 - no) / 2)
    assert accuracy[0] == np.mean(table[:, 4] > 0)
    table[:, 8], table[:, 0] = math.nan, math.nan
    assert np.isnan(syncnet.accuracy_by_shift(table)[4])


class Matching:
    """An expert for which equal embeddings are in sync"""

    def __init__(self, embeddings):
        self.parameters = lambda: iter([embeddings])

    def read(self, images):
        raise AssertionError("not needed")

    def logits(self, face, sound):
        return 5 * face @ sound.t() - 2


def test_a_summary_counts_correct_seconds_pieces_and_clips(monkeypatch):
    g = torch.Generator().manual_seed(3)
    clips = [F.normalize(torch.randn(T, 40, generator=g), dim=1) for T in (71, 56, 26)]
    expert, windows = Matching(clips[0]), SimpleNamespace(read=lambda c: (clips[c], c))
    monkeypatch.setattr(syncnet, "embed_frames", lambda expert, x: x)
    monkeypatch.setattr(syncnet, "mel_windows", lambda mel, frames: mel)
    monkeypatch.setattr(syncnet, "embed_sound", lambda expert, mel: clips[mel])
    results = syncnet.measure_clips(expert, windows, range(3))
    assert [len(r["offset_3s"]) for r in results] == [1, 0, 0]
    assert [len(r["offset_1s"]) for r in results] == [31, 22, 4]  # pieces of 21 windows, by the shift of their sound
    result = syncnet.summarise(results)
    assert result["windows"] == 153 and result["offset_3s"] == result["offset_1s"] == result["offset_clip"] == 1
    assert result["second"] == 1 and result["offset_window"] > 0.95
    means = np.stack([results[2]["table"][i : i + 21].mean(0) for i in range(6)])
    expected = (np.mean(means[:, 15] > 0) + 1 - np.nanmean(np.where(np.isnan(means), np.nan, means > 0)[:, [12, 18]])) / 2
    assert syncnet.summarise(results[2:])["by_shift"]["second"][3] == pytest.approx(expected)
    assert math.isnan(syncnet.summarise(results[2:])["offset_3s"])  # the clip is shorter than 3 s


# ------------------------------------------------------------------------------------------------- training, end to end

def test_a_trained_expert_separates_in_sync_from_shifted_on_held_out_people(world, tmp_path, capsys):
    command = ["test", "--expert", str(world[1]), "--data", str(world[0]), "--out", str(tmp_path / "offsets.png")]
    syncnet.main([*command, "--device", "cpu"])
    out = capsys.readouterr().out
    assert "held out from training" in out and "1 clips, 56 windows" in out  # of 24 people, number 9 validates, 19 tests
    rows = {cells[0]: cells[1:] for line in out.splitlines() if (cells := [v.strip() for v in line.split("|")[1:-1]])}
    assert min(map(float, rows["5 to 15"])) > 0.75 and float(rows["shifted by 0 frames"][0]) > 0.7
    count, second, _, one_second, _, clip = map(float, rows["p19"])
    assert count == clip == 1 and one_second > 0.8 and second > 0.75
    bars = np.asarray(Image.open(tmp_path / "offsets.png")).astype(int)[18:, :310]  # of pieces of 1 s
    assert (bars[40, 150:160, 1] > 200).all() and (bars[40, :100, 1] < 100).all()  # most are right, no error is large


def test_training_clips_are_found_in_a_larger_pack_and_test_clips_are_not_trained_on(world, tmp_path, monkeypatch):
    with PackWriter(tmp_path / "more", 16, "toy") as pack:
        for seed in (99, *range(24)):
            pack.add(*bar_clip(seed), identity=f"p{seed}", source=f"bar {seed}")
    tested = []
    monkeypatch.setattr(syncnet, "measure_clips", lambda expert, windows, clips: tested.extend(clips) or 1 / 0)
    command = ["test", "--data", str(tmp_path / "more"), "--device", "cpu", "--expert"]
    with pytest.raises(ZeroDivisionError):
        syncnet.main([*command, str(world[1])])
    assert tested == [0, 20]  # seed 99 is new, seed 19 was held out for the test
    monkeypatch.undo()
    (tmp_path / "list").write_text("p0\np1\np5")
    args = syncnet.parse(["train", "--data", str(world[0]), "--size", "16", "--test", str(tmp_path / "list")])
    _, clips, _, val_clips = syncnet.load_data(args, tmp_path)
    assert not {0, 1, 5} & {*clips, *val_clips} and len(clips) + len(val_clips) == 21


def test_the_log_has_options_losses_and_validations(world):
    lines = [json.loads(line) for line in open(world[1].with_name("log_sync.jsonl"))]
    assert {"revision", "torch", "python", "args"} <= set(lines[0]) and lines[0]["args"]["steps"] == 60
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [50, 60]
    assert {"average", "in_sync", "shifted", "other", "contrast", "scale", "bias", "ms", "waiting"} <= set(steps[0])
    assert [line["step"] for line in lines if "val_loss" in line] == [15, 30, 45, 60]
    assert steps[-1]["loss"] < LN2 and lines[-1]["val_accuracy"] > 0.75


def training(folder, pack, *more):
    small_run = "--size 16 --steps 4 --batch 3 --windows 2 --dim 8 --width 0.05 --device cpu"
    return ["train", "--data", str(pack), "--out", str(folder / "sync.pt"), *small_run.split(), *more]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, (list, tuple)) else a == b


def test_four_steps_equal_two_steps_a_kill_and_two_steps_bit_for_bit(world, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    syncnet.main(training(tmp_path / "a", world[0]))

    save_run = syncnet.save_run

    def save_and_die(path, checkpoint, *more):
        save_run(path, checkpoint, *more)
        if checkpoint["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(syncnet, "save_run", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        syncnet.main(training(tmp_path / "b", world[0]))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "b" / "sync_last.pt", "syncnet")["step"] == 2
    torch.rand(7)  # changes the random state
    syncnet.main(training(tmp_path / "b", world[0], "--resume"))
    a, b = (load_checkpoint(tmp_path / name / "sync_last.pt", "syncnet") for name in "ab")
    for part in ("networks", "optimisers", "step", "config", "clips"):
        assert same(a[part], b[part]), part
    first = SyncNet(**a["config"]["net"]).state_dict()
    assert not same(a["networks"]["expert"], first)
    heads = [json.loads(line) for line in open(tmp_path / "b" / "log_sync.jsonl") if "revision" in line]
    assert len(heads) == 2  # the log is continued


def test_with_cosine_the_probability_and_the_loss_are_those_of_wav2lip():
    net, (frames, mel) = make_expert(cosine=True), random_batch(4)
    with torch.no_grad():
        face, sound = net.face(frames), net.sound(mel)
        logits = net.logits(face, sound)
    assert (face >= 0).all() and (sound >= 0).all()
    assert torch.allclose(logits.sigmoid(), (face @ sound.t()).clamp(1e-4, 1 - 1e-4), atol=1e-5)
    clip, k = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 60, 2, 30])
    terms = expert_loss(logits, clip, k, min_shift=50)
    p = F.cosine_similarity(face[:, None], sound[None], dim=2).clamp(1e-4, 1 - 1e-4)
    assert terms["in_sync"].item() == pytest.approx(F.binary_cross_entropy(p.diagonal(), torch.ones(4)).item(), rel=1e-3)
    far = -(1 - p[[0, 1], [1, 0]]).log().mean()  # 58 frames apart; 28 are too near
    assert terms["shifted"].item() == pytest.approx(far.item(), rel=1e-3)


def test_a_resumed_run_keeps_its_options_and_prints_changes(world, tmp_path, capsys):
    command = training(tmp_path, world[0], "--cosine", "--negatives", ".4")
    syncnet.main(command)
    resume = ["train", "--out", str(tmp_path / "sync.pt"), "--resume"]
    with pytest.raises(InputError, match="cannot change --windows 2 -> 3"):
        syncnet.main([*resume, "--windows", "3"])
    capsys.readouterr()
    syncnet.main([*resume, "--steps", "6", "--lr", "1e-4"])
    assert "continues with its own options, --steps 4 -> 6, --lr 0.002 -> 0.0001" in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "sync_last.pt", "syncnet")
    assert saved["step"] == 6 and saved["args"]["cosine"] and saved["args"]["negatives"] == 0.4


def test_clips_shorter_than_a_window_are_left_out_and_packs_of_them_are_refused(world, tmp_path):
    for name, lengths in (("some", (60, 3) * 12), ("photos", (1,) * 24)):
        with PackWriter(tmp_path / name, 16, "toy") as pack:
            for seed, n in enumerate(lengths):
                frames, wav = bar_clip(100 + seed)
                pack.add(frames[:n], wav[: 640 * n], identity=f"p{seed}", source=f"bar {seed}")
    command = ["test", "--expert", str(world[1]), "--device", "cpu", "--data"]
    syncnet.main([*command, str(tmp_path / "some")])
    with pytest.raises(InputError, match="no clip to test on has 5 frames"):
        syncnet.main([*command, str(tmp_path / "photos")])
    with pytest.raises(InputError, match="too few to train"):
        syncnet.main(training(tmp_path, tmp_path / "photos"))


def test_an_expert_for_real_faces_uses_lips_and_resumes_bit_for_bit(tmp_path, portrait, monkeypatch):
    face = ((portrait[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    with PackWriter(tmp_path / "pack", 64, "face") as pack:
        for seed in range(4):
            shown = np.stack([np.roll(face, t % 3, 0) for t in range(24)])
            pack.add(shown, bar_clip(seed, T=24)[1], f"p{seed}", "")
    steps = "--batch 2 --windows 9 --dim 8 --device cpu --negatives 0.2 --steps".split()
    for name in "ab":
        monkeypatch.setattr(syncnet, "cosine_warmup", lambda *_: 1)  # independent of the number of steps
        command = ["train", "--data", str(tmp_path / "pack"), "--out", str(tmp_path / name / "sync.pt"), *steps]
        for more in [["2"]] if name == "a" else [["1"], ["2", "--resume"]]:
            syncnet.main([*command, *more])
    a, b = (load_checkpoint(tmp_path / name / "sync_last.pt", "syncnet") for name in "ab")
    assert same(a["networks"], b["networks"]) and a["config"]["net"]["lips"] and a["config"]["net"]["size"] == 64
    expert = load_sync(tmp_path / "a" / "sync.pt", "cpu", size=64)
    assert expert.template == "face" and expert.lips
    assert same(expert.landmarks.mouth.state_dict(), load_landmarks().mouth.state_dict())  # not trained


def test_the_shipped_expert_is_small_and_has_a_gradient_in_real_faces(portrait):
    assert syncnet.SHIPPED_EXPERT.stat().st_size < 20e6
    expert = load_sync(syncnet.SHIPPED_EXPERT, "cpu", size=64)
    assert expert.lips and expert.template == "face"
    frames = portrait.expand(2, 5, 3, 64, 64).clone().requires_grad_(True)
    sync_loss(expert, frames, random_batch(2)[1]).backward()
    assert (frames.grad.abs().amax((2, 3, 4)) > 0).all()


def test_a_nan_stops_the_run_with_the_name_of_its_term_and_keeps_the_last_checkpoint(world, tmp_path, monkeypatch):
    calls, loss = [], syncnet.expert_loss

    def poisoned(*args, **options):
        calls.append(1)
        terms = loss(*args, **options)
        return terms | dict(shifted=terms["shifted"] * math.nan) if len(calls) == 4 else terms

    monkeypatch.setattr(syncnet, "expert_loss", poisoned)
    with pytest.raises(InputError, match="step 3.*'shifted' is nan"):
        syncnet.main(training(tmp_path, world[0]))
    kept = load_checkpoint(tmp_path / "sync_last.pt", "syncnet")
    assert kept["step"] == 3 and all(p.isfinite().all() for p in kept["networks"]["expert"].values())


def test_without_data_it_trains_on_the_toy_world_of_train_py(tmp_path, monkeypatch):
    drawn = []

    def draw(folder, size, people, first_seed):
        drawn.append((folder.name, size, people, first_seed))
        with PackWriter(folder, size, "toy") as pack:
            for seed in range(3):
                pack.add(*bar_clip(seed, T=12, size=size), identity=str(seed), source="")

    monkeypatch.setattr(toyfaces, "make_pack", draw)
    out = tmp_path / "new" / "sync.pt"
    syncnet.main(["train", "--out", str(out), "--device", "cpu", *"--steps 1 --batch 2 --windows 2 --width 0.05".split()])
    assert drawn == [("toys", 32, 400, toyfaces.TRAIN_SEED), ("toys_tune", 32, 40, toyfaces.TUNE_SEED)]
    expert = load_sync(out, "cpu", size=32)
    assert expert.template == "toy" and expert.config["size"] == 32
    syncnet.main(["test", "--expert", str(out), "--device", "cpu"])
    assert drawn[2] == ("toys_test", 32, 40, toyfaces.TEST_SEED)


# ----------------------------------------------------------- user errors: one line, exit status 2, before anything slow

@pytest.fixture
def fails(refused, monkeypatch):
    """A function that runs syncnet.py with these arguments, which it has to refuse before it draws or trains"""
    def slow(*_, **__):
        raise AssertionError("started something slow")

    for module, name in ((toyfaces, "make_pack"), (syncnet, "batches"), (syncnet, "measure_clips")):
        monkeypatch.setattr(module, name, slow)
    return partial(refused, syncnet.main)


def test_an_existing_expert_is_not_overwritten_without_the_option(world, fails):
    before = world[1].read_bytes()
    assert "--resume" in fails("train", "--out", world[1])
    assert world[1].read_bytes() == before and not (world[1].parent / "toys").exists()


def test_unsuitable_experts_are_refused(world, tmp_path, fails):
    other, broken = tmp_path / "weights.pt", tmp_path / "broken.pt"
    save_checkpoint(other, dict(kind="weights", format=1))
    whole = load_checkpoint(world[1], "syncnet")
    save_checkpoint(broken, whole | dict(networks=dict(expert=dict(list(whole["networks"]["expert"].items())[1:]))))
    with pytest.raises(InputError, match="weights.pt: is a 'weights' checkpoint; expected a 'syncnet'"):
        load_sync(other, "cpu")
    with pytest.raises(InputError, match="images of 16 px or more, these are 8 px"):
        load_sync(world[1], "cpu", size=8)
    assert load_sync(world[1], "cpu", size=128).size == 16  # larger images are shrunk
    with pytest.raises(InputError, match="broken.pt: not the weights of SyncNet: log_scale is absent"):
        load_sync(broken, "cpu")
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(world[1].read_bytes()[:1000])
    shutil.copy(broken, tmp_path / "broken_last.pt")
    again = fails("train", "--resume", "--out", broken, "--size", 16)
    assert "not a run of this version" in again
    missing = tmp_path / "no.pt"
    for path, reason in ((other, "'weights'"), (truncated, "cut short"), (tmp_path, "directory"), (missing, "no such")):
        assert reason in fails("test", "--expert", path)
        assert reason in fails("offset", __file__, "--expert", path)
    assert "no_last.pt: no such file" in fails("train", "--resume", "--out", missing)


@pytest.mark.parametrize(
    "args, reason",
    [
        (["train", "--data", "PACK", "--size", "32", "--out", "new.pt"], "images of 16 px, this expert needs 32 px"),
        (["train", "--data", "nowhere", "--out", "new.pt"], "no such directory"),
        (["train", "--out", "."], "exists"),
        (["train", "--out", "file.txt/sync.pt"], "cannot be made a directory"),
        (["train", "--resume", "--out", "SYNC", "--size", "32"], "cannot change --size 16 -> 32"),
        (["train", "--steps", "0"], "--steps 0: must lie"),
        (["train", "--windows", "1"], "--windows 1: must lie"),
        (["train", "--lr", "nan"], "--lr nan: must lie"),
        (["train", "--device", "abacus"], "--device abacus"),
        (["test", "--expert", "SYNC", "--data", "file.txt"], "no such directory"),
        (["offset", "clip.mp4", "--expert", "SYNC"], "clip.mp4: no such file"),
        (["offset", "file.txt", "--expert", "SYNC"], "file.txt"),
        (["offset", "mute.mp4", "--expert", "SYNC"], "has no sound"),
        (["offset", "short.mp4", "--expert", "SYNC"], "4 frames are too few"),
        (["offset", "short.mp4", "--expert", "SYNC", "--box", "1,2,3"], "--box 1,2,3"),
        (["offset", "short.mp4", "--expert", "SYNC", "--box", "4,4,99,99"], "not a box inside"),
        (["offset", "short.mp4", "--expert", "file.txt"], "expected a 'syncnet'"),
    ],
)
def test_user_errors_are_one_line_and_status_2(world, tmp_path, fails, monkeypatch, args, reason):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("not media")
    for name, T, wav in (("mute.mp4", 12, None), ("short.mp4", 4, bar_clip(0)[1][:2560])):
        if name in args:
            write_clip(name, bar_clip(0, T=T)[0], wav)
    args = [dict(PACK=world[0], SYNC=world[1]).get(a, a) for a in args]
    assert reason in fails(*args)


def test_the_logit_of_syncnet_v2_is_a_margin_minus_the_distance():
    face, sound = torch.tensor([[0.0, 0], [6, 8]], requires_grad=True), torch.tensor([[3.0, 4], [0, 0], [6, 8]])
    logits = SyncNetV2.logits(SyncNetV2, face, sound)  # it has no weights
    assert torch.allclose(logits, SyncNetV2.MARGIN - torch.tensor([[5.0, 0, 10], [5, 10, 0]]), atol=1e-5)
    torch.nn.functional.softplus(-logits[:, 0]).sum().backward()
    assert (face.grad[0] < 0).all() and (face.grad[1] > 0).all()  # descent moves both towards the sound
