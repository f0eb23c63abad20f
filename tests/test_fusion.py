"""The two spaces and the whole network: which inputs reach which outputs, streaming, and published files."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import vision
from audio import SILENCE
from checkpoint import save_checkpoint
from faces import TEMPLATES
from fusion import (
    FCTFG, CanonicalEncoder, Config, IdentityMaps, PaperMotion, Whiten, weight_shapes, idle_poses,
    enlarge_network, estimate_mean_w, load_model, load_published)
from landmarks import SHUT_OPENING
from media import InputError
from motion import Motion
from stylegan2 import Discriminator, Generator
from vision import GradualStyleEncoder, HyperStyleNet
from warp import rotation, turned_place

SMALL = dict(dim=24, n_mlp=2, base=256, cap=32, encoder_width=8, linear=20, map_code=12, map_channels=(8, 6), pose_dim=5,
             hyper_width=8, refine=1)


def tiny(motion="direct", **changes):
    """16 px, L = 6, D = 24: no two axes of a batch are equal"""
    torch.manual_seed(0)
    return FCTFG(Config.at(16, **(SMALL | dict(motion=motion) | changes))).eval()


def window(B=2, T=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(B, 3, 16, 16, generator=g) * 2 - 1, torch.rand(B, T, 3, 16, 16, generator=g) * 2 - 1,
            torch.rand(B, T, 1, 80, 16, generator=g) * 8 - 4)


def randomise_zeros(model):
    """The same network with random weights in its zero-initialised layers, as after training"""
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if p.abs().sum() == 0 or "lips.4" in name or "mlp.4" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("motion", ["direct", "paper"])
@pytest.mark.parametrize("B", [1, 3, 5, 6])
def test_batches_of_any_size_give_the_expected_shapes(motion, B):
    frames, z_s2c, z_c2d = tiny(motion)(*window(B, T=7), context=2)
    assert frames.shape == (B, 3, 3, 16, 16) and z_s2c.shape == (B, 6, 24) and z_c2d.shape == (B, 3, 6, 24)


def test_temporal_fusion_reaches_two_frames_on_each_side_within_one_clip_and_style_layer():
    torch.manual_seed(0)
    motion = PaperMotion(Config.at(16, dim=7, motion="paper"))
    z_a, z_v = torch.randn(2, 11, 7, requires_grad=True), torch.randn(2, 11, 6, 7, requires_grad=True)
    out = motion(z_a, z_v)
    of_sound, of_frames = torch.autograd.grad(out[0, 5, 3].sum(), (z_a, z_v))  # clip 0, frame 5, style layer 3
    assert (of_sound.abs().sum(-1) > 0).nonzero().tolist() == [[0, t] for t in range(3, 8)]
    assert (of_frames.abs().sum(-1) > 0).nonzero().tolist() == [[0, t, 3] for t in range(3, 8)]


@pytest.mark.parametrize("motion", ["direct", "paper"])
def test_the_driving_mouth_has_no_effect(motion):
    model = randomise_zeros(tiny(motion))
    source, driving, mel = window()
    other = driving.clone()
    x0, y0, x1, y1 = (round(16 * v) for v in TEMPLATES["toy"].mouth)
    other[..., y0:y1, x0:x1] = torch.rand(2, 5, 3, y1 - y0, x1 - x0)
    assert torch.equal(model(source, driving, mel)[0], model(source, other, mel)[0])
    other[..., :y0, :] *= -1
    assert not torch.allclose(model(source, driving, mel)[0], model(source, other, mel)[0])


@pytest.mark.parametrize("motion", ["direct", "paper"])
def test_different_sound_gives_different_frames(motion):
    model = randomise_zeros(tiny(motion))
    source, driving, mel = window()
    assert not torch.allclose(model(source, driving, mel)[0], model(source, driving, -mel)[0], atol=1e-4)


def test_the_direct_pose_of_a_frame_depends_on_that_frame_alone():
    model = randomise_zeros(tiny())
    z_v = torch.randn(2, 5, 6, 24, requires_grad=True)
    grad, = torch.autograd.grad(model.motion.pose(z_v)[1, 2].sum(), z_v)
    assert (grad.abs().sum((2, 3)) > 0).nonzero().tolist() == [[1, 2]]


def face(**changes):
    return randomise_zeros(tiny(**(dict(template="face", mouth_dim=3, shape_dim=2, pose_dim=7, hyper="none") | changes)))


def test_the_lips_of_an_image_reach_its_w_plus_code_only_through_the_mouth_code():
    model, (x, _, _) = face(), window()
    other = x.clone()
    x0, y0, x1, y1 = TEMPLATES["face"].lips
    other[..., round(16 * y0):round(16 * y1), round(16 * x0):round(16 * x1)] = 0.7
    assert torch.equal(model.encode_source(x), model.encode_source(other))
    change = model.invert(other) - model.invert(x)                              # (B, L, D), in M directions
    direct = model.motion.mouth_up(model.mouth(other) - model.mouth(x)).unflatten(1, change.shape[1:])
    torch.testing.assert_close(change, direct, atol=1e-5, rtol=1e-4)
    assert change.abs().max() > 1e-3


def test_a_given_mouth_code_replaces_that_of_the_image():
    model, (x, _, _) = face(), window()
    own, swapped = model.invert(x), model.invert(x, model.mouth(x).flip(0))      # of two images
    both = model.motion.mouth_up(model.mouth(x).sum(0)).unflatten(0, own.shape[1:])
    torch.testing.assert_close(own + swapped, 2 * model.encode_source(x) + both)
    assert (own - swapped).abs().max() > 1e-3


def test_sound_predicts_the_shape_numbers_of_the_mouth_code_and_zeros_for_its_appearance():
    model, (x, driving, mel) = face(), window()
    mouth = model.motion.audio_to_mouth(model.encode_sound(mel), context=2)
    assert mouth.shape == (2, 1, 3) and mouth[..., :2].abs().min() > 0 and mouth[..., 2].abs().max() == 0
    pose = model.motion.pose(model.encode_driving(driving[:, 2:3]))
    _, _, z_c2d = model(x, driving, mel, context=2)
    torch.testing.assert_close(z_c2d, model.motion.join(pose, mouth))


def test_a_face_that_drives_itself_keeps_its_pose_and_other_poses_move_it():
    model, (x, _, mel) = face(), window(T=1)
    pose = torch.randn(4, 7)
    model.pose.forward = lambda images: pose[:len(images)]                         # a pose for each image
    own = model(x, x[:, None], mel)[0]
    pose = pose + 1                                                             # another canonical pose, the same turn
    torch.testing.assert_close(model(x, x[:, None], mel)[0], own, atol=1e-3, rtol=1e-3)
    assert model.pose(x).shape == (2, 7)
    poses = iter((pose[:2], pose[2:]))                                          # of the source, of the driving frame
    model.pose.forward = lambda images: next(poses)
    assert (model(x, x[:, None], mel)[0] - own).abs().max() > 1e-2


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_a_real_face_follows_a_motion_from_its_own_pose_back_and_forth_if_it_is_short(batch):
    model, rng, own = face(), np.random.default_rng(0), torch.randn(1, 7)
    model.pose.forward = lambda images: own
    torch.nn.init.uniform_(model.pose.std, 0.5, 2)
    torch.nn.init.zeros_(model.motion.mouth_up.weight)
    source, z_a = torch.zeros(1, 3, 16, 16), model.encode_whole_sound(torch.zeros(20, 1, 80, 16))
    motion = Motion(rng.normal(size=(12, 6)), rng.random(12), np.zeros(12))
    z_c2d = torch.cat(list(model.stream_motion(source, z_a, motion, sway=True, batch=batch)))
    pose = z_c2d.flatten(1) @ torch.linalg.pinv(model.motion.pose_up.weight).t() * model.pose.std + model.pose.mean
    start, ks = own[0] * model.pose.std + model.pose.mean, [*range(12), *range(10, 2, -1)]
    poses, blinks = (torch.from_numpy(x[ks]).float() for x in (motion.poses, motion.blinks))
    torch.testing.assert_close(pose[:, :3], start[:3] + poses[:, :3], atol=1e-3, rtol=1e-3)
    solid = model.pose.landmarks.solid.double().numpy()
    poses[:, 3:5] += torch.from_numpy(turned_place(motion.poses[ks], rotation(*start[:3].tolist()), solid)).float()
    torch.testing.assert_close(pose[:, 3:6], start[3:6] + start[5] * poses[:, 3:], atol=1e-3, rtol=1e-3)  # in units
    torch.testing.assert_close(pose[:, 6], torch.lerp(start[6], torch.tensor(SHUT_OPENING), blinks), atol=1e-3, rtol=1e-3)
    still = torch.cat(list(model.stream_motion(source, z_a, None, sway=True, batch=batch)))
    torch.testing.assert_close(still, model.motion.embed_pose(own).expand(20, -1, -1), atol=1e-4, rtol=1e-3)


def test_fitted_weights_bring_a_photo_and_its_moved_faces_nearer_but_not_to_their_finest_details(monkeypatch):
    model, (x, _, mel), rng = face(), window(T=4), np.random.default_rng(0)
    model.motion.opening.copy_(torch.tensor([0.1, 0.05]))
    torch.nn.init.uniform_(model.pose.std, 0.5, 2)
    source, opening = 0.5 * x[0], np.linspace(0, 0.2, 6)
    moves = Motion(rng.normal(0, 5, (6, 6)), np.zeros(6), np.zeros(6))
    with torch.no_grad():
        codes = model.moved_codes(source[None], moves, opening, np.zeros((6, model.config.shape_dim - 1)))
        targets = 0.5 * model.decode(codes) + torch.tensor([0.2, 0.2, 0.2, -0.2, -0.2, -0.2])[:, None, None, None]
    deltas = model.fit_weights(source, codes, targets, 60)
    assert not any(p.grad is not None for p in model.parameters()) and not deltas[0].requires_grad
    photo, moved = zip(*(((model.reconstruct(source, d) - source).abs().mean(),
                          (model.decode(codes, d) - targets).abs().mean((1, 2, 3))) for d in (None, deltas)))
    assert photo[1] < 0.8 * photo[0] and (moved[1] < 0.8 * moved[0]).all()
    frames = [torch.cat(list(model.animate(source, mel[0], deltas=d))) for d in (None, deltas)]
    assert (frames[0] - frames[1]).abs().mean() > 0.01
    monkeypatch.setattr("fusion.FIT_EDGE", 8)
    finer = targets + 0.3 * (-1) ** torch.arange(16)                            # columns of one pixel
    for a, b in zip(*(model.fit_weights(source, codes, images, 3) for images in (targets, finer))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_lips_from_sound_are_as_if_silence_preceded_and_followed_it():
    model, mel = face(), window(T=4)[2][0]
    torch.nn.init.normal_(model.motion.lips[4].weight)
    silence = torch.full((model.config.context + 1, *mel.shape[1:]), SILENCE)
    longer = model.predict_lip_shape([silence, mel[:3], mel[3:], silence])
    torch.testing.assert_close(model.predict_lip_shape(mel), longer[len(silence):-len(silence)], atol=1e-5, rtol=1e-4)


def test_codes_of_moved_photos_are_those_that_sampling_uses_for_each_photo_by_itself():
    model, (x, _, mel), rng = face(), window(T=4), np.random.default_rng(0)
    model.motion.opening.copy_(torch.tensor([0.1, 0.05]))
    torch.nn.init.uniform_(model.pose.std, 0.5, 2)
    moves = Motion(rng.normal(size=(4, 6)), rng.random(4), np.zeros(4))
    numbers = model.motion.predict_lip_shape(model.encode_whole_sound(mel[0]))[0].detach().numpy()
    opening, shape = 0.1 * numbers[:, 0] + 0.05, numbers[:, 1:]
    two = torch.cat([model.canonical_code(s[None])[1] + torch.cat(list(model.stream_motion(
        s[None], model.encode_whole_sound(mel[0]), moves, True, 9))) for s in x])
    sources, again = x.repeat_interleave(4, 0), Motion(*(np.concatenate([v, v]) for v in vars(moves).values()))
    codes = model.moved_codes(sources, again, np.tile(opening, 2), np.tile(shape, (2, 1)))
    torch.testing.assert_close(codes, two, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.moved_codes(x[:1], moves, opening, shape), two[:4], atol=1e-4, rtol=1e-4)
    lips = dict(mouth=model.mouth_codes(opening, shape), batch=3)               # with other sound
    silent, spoken = (torch.cat(list(model.animate(x[0], -mel[0], moves, **kw))) for kw in (dict(batch=3), lips))
    torch.testing.assert_close(spoken, model.decode(two[:4]).clamp(-1, 1), atol=1e-3, rtol=1e-3)
    assert (silent - spoken).abs().max() > 0.01


def test_speech_replaces_the_opening_and_keeps_all_other_numbers_of_the_source():
    model, (x, driving, mel) = face(), window()
    mouth = model.mouth(x)                                                      # (B, M)
    torch.testing.assert_close(mouth[:, :2], model.mouth.read(model.mouth.mouth_crop(x)))  # the shape
    motion = model.motion
    kept = motion.embed_mouth(motion.appearance_part(mouth))                      # (B, L, D)
    torch.testing.assert_close(motion.embed_mouth(mouth * torch.tensor([0.0, 1, 1])), kept)
    more_open, wider, redder = (mouth + 2 * direction for direction in torch.eye(3))
    torch.testing.assert_close(motion.embed_mouth(motion.appearance_part(more_open)), kept)  # an open photo starts shut
    for changed in (wider, redder):
        assert (motion.embed_mouth(motion.appearance_part(changed)) - kept).abs().max() > 1e-3
    z_s, z_s2c = model.canonical_code(x)
    pose = model.motion.embed_pose(model.pose(x))
    torch.testing.assert_close(z_s2c, model.canonical(z_s) - pose + kept)
    assert kept.abs().max() > 1e-3 and torch.equal(model(x, driving, mel)[1], z_s2c)


@pytest.mark.parametrize("driven", [False, True])
def test_without_a_pose_code_given_mouth_codes_replace_the_sound_as_well(driven):
    model, (x, driving, mel) = face(flow=0, pose_dim=4), window(T=9)

    def animate(sound, mouth):
        driver = iter(driving[0]) if driven else None
        return torch.cat(list(model.animate(x[0], sound, driver, batch=4, mouth=mouth)))

    free, given = ([animate(sound, mouth) for sound in (mel[0], -mel[0])] for mouth in (None, torch.ones(9, 3)))
    assert torch.equal(*given) and (free[0] - free[1]).abs().max() > 1e-3


def test_a_given_mouth_code_replaces_the_prediction_from_sound_except_for_nan():
    model, (x, driving, mel) = face(), window()
    given = torch.full((2, 1, 3), math.nan)
    torch.testing.assert_close(model(x, driving, mel, 2, given), model(x, driving, mel, 2))
    given[0] = torch.tensor([1.0, -2.0, 0.5])
    loud, quiet = (model(x, driving, sound, 2, given)[0] for sound in (mel, -mel))
    torch.testing.assert_close(loud[0], quiet[0])                               # the sound has no effect
    assert not torch.allclose(loud[1], quiet[1], atol=1e-4)
    assert not torch.allclose(loud[0], model(x, driving, mel, 2)[0][0], atol=1e-4)


def test_brightness_and_tint_do_not_change_the_lip_shape():
    model, (x, _, _) = face(), window()
    box = model.mouth.mouth_crop(x)
    tinted = 0.5 * box + torch.tensor([0.3, -0.1, 0.2])[:, None, None]
    torch.testing.assert_close(model.mouth.read(box), model.mouth.read(tinted))
    larger = model.mouth.mouth_crop(x, margin=0.125)
    assert box.shape[-2:] == (32, 32) and larger.shape[-2:] == (40, 40)


@pytest.mark.parametrize("changes, context", [({}, 2), (dict(motion="paper"), 2), (dict(audio_width=0), 12)])
def test_frames_decoded_with_context_equal_the_middle_of_a_longer_window(changes, context):
    model = randomise_zeros(tiny(**changes))
    source, driving, mel = window(T=5 + 2 * context)
    assert model.config.context == context
    whole = model(source, driving, mel)[0][:, context:-context]
    torch.testing.assert_close(model(source, driving, mel, context)[0], whole, atol=1e-5, rtol=1e-4)
    if model.config.motion == "direct":  # poses need no neighbouring frames
        alone = model(source, driving[:, context:-context], mel, context)[0]
        torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-4)


def test_clips_of_a_batch_are_independent():
    for motion in ("direct", "paper"):
        model = randomise_zeros(tiny(motion))
        batch = window(3)
        alone = model(*(x[1:2] for x in batch))[0]
        torch.testing.assert_close(model(*batch)[0][1:2], alone, atol=1e-5, rtol=1e-4)


def test_every_parameter_gets_a_gradient():
    for motion in ("direct", "paper"):
        model = randomise_zeros(tiny(motion)).train()
        frames, z_s2c, z_c2d = model(*window())
        z = torch.randn(2, 24)
        noisy = model.generator(model.encoder(window()[0]), noise="random")
        (frames.square().sum() + model.generator.mapping(z).sum() + noisy.sum()).backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
        assert all("shared_weight_hypernet" in name for name in unused), unused  # no layer is as wide as the shared head


def test_the_canonical_encoder_is_initially_the_identity():
    z = torch.randn(2, 6, 24)
    assert torch.equal(CanonicalEncoder(6, 24, hidden=8, rank=4)(z), z)


def test_identity_maps_are_initially_zero_and_linear_in_the_code():
    maps = IdentityMaps(tiny().config)
    (m4, m8), coarse, flow = maps(torch.randn(3, 6, 24))
    assert (m4.shape, m8.shape, coarse, flow) == ((3, 8, 4, 4), (3, 6, 8, 8), None, None)
    assert m4.abs().max() == m8.abs().max() == 0
    for layer in maps.up:
        torch.nn.init.normal_(layer.weight)
    a, b = torch.randn(2, 1, 6, 24).unbind(0)
    for m_ab, m_a, m_b, m_0 in zip(*(maps(z)[0] for z in (a + b, a, b, torch.zeros_like(a)))):
        torch.testing.assert_close(m_ab, m_a + m_b - m_0, atol=1e-4, rtol=1e-4)


def test_the_coarse_image_is_linear_in_the_code_and_added_to_the_rgb():
    model, z = tiny(coarse_rgb=8, map_channels=()), torch.randn(3, 6, 24)
    maps, coarse, _ = model.maps(z)
    channels = [min(32, 256 // r) for r in (4, 8)]
    assert [m.shape for m in maps] == [(3, c, r, r) for c, r in zip(channels, (4, 8))] and coarse.shape == (3, 3, 8, 8)
    assert coarse.abs().max() == 0 and all(m.abs().max() == 0 for m in maps)   # initially zero
    before = model.decode(z)
    model.maps.coarse_rgb.bias.data.fill_(0.25)
    torch.testing.assert_close(model.decode(z)[..., 4:-4, 4:-4], before[..., 4:-4, 4:-4] + 0.25, atol=1e-5, rtol=1e-4)
    torch.nn.init.normal_(model.maps.coarse_rgb.weight)
    a, b, ab, zero = (model.maps(x)[1] for x in (z[:1], z[1:2], z[:1] + z[1:2], torch.zeros_like(z[:1])))
    torch.testing.assert_close(ab, a + b - zero, atol=1e-4, rtol=1e-4)


def test_whitened_training_codes_have_zero_mean_and_unit_variance():
    whiten, z = Whiten(6, 24), 3 * torch.randn(500, 6, 24) + 7
    assert whiten(z).equal(z.flatten(1))
    whiten.fit(z)
    white = whiten(z)
    assert white.shape == (500, 144) and white.mean(0).abs().max() < 1e-4 and (white.std(0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("motion", ["direct", "paper"])
def test_streaming_gives_the_frames_of_one_pass(motion):
    model = randomise_zeros(tiny(motion))
    torch.nn.init.normal_(model.audio.out.weight)
    source, driving, mel = window(B=1, T=23)
    whole = model(source, driving, mel)[0][0].clamp(-1, 1)
    for batch in (4, 23, 64):
        streamed = list(model.animate(source[0], mel[0], iter(driving[0]), batch=batch))
        assert sum(map(len, streamed)) == 23 and max(map(len, streamed)) <= batch
        torch.testing.assert_close(torch.cat(streamed), whole, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("motion", ["direct", "paper"])
def test_without_a_driving_clip_only_sound_and_idle_motion_move_the_photo(motion):
    model = randomise_zeros(tiny(motion))
    source, _, mel = window(B=1, T=13)
    still = torch.cat(list(model.animate(source[0], mel[0, :1].expand(13, -1, -1, -1), batch=5)))
    assert still.shape == (13, 3, 16, 16)
    torch.testing.assert_close(still[2:-2], still[2:3].expand(9, -1, -1, -1), atol=1e-5, rtol=1e-4)  # without the padding
    if motion == "direct":
        torch.nn.init.normal_(model.motion.idle)
        alive = torch.cat(list(model.animate(source[0], mel[0, :1].expand(13, -1, -1, -1), batch=5)))
        assert (alive[1:] - alive[:-1]).abs().mean() > 1e-4


def test_idle_motion_is_continuous_and_endless():
    idle = torch.arange(1.0, 5)[None, :, None].expand(3, 4, 2)  # a ramp of four frames
    walk = idle_poses(idle, 0, 40)[:, 0]
    assert walk[:9].tolist() == [1, 2, 3, 4, 4, 3, 2, 1, 1] and (walk[1:] - walk[:-1]).abs().max() == 1
    assert torch.equal(idle_poses(idle, 7, 19), idle_poses(idle, 0, 40)[7:19])


def test_the_hypernetwork_initially_changes_nothing_and_changes_frames_after_training():
    model = tiny()
    source = window()[0]
    z = model.encoder(source)
    deltas = model.weight_changes(source, z)
    assert len(deltas) == 5 and all(d.abs().max() == 0 for d in deltas)
    torch.testing.assert_close(model.decode(z, deltas), model.decode(z), atol=1e-5, rtol=1e-4)
    randomise_zeros(model)
    deltas = model.weight_changes(source, z)
    assert not torch.allclose(model.decode(z, deltas), model.decode(z), atol=1e-4)


def test_the_hypernetwork_learns_the_weight_changes_of_a_generator():
    """Images of the same generator with other weights"""
    model, errors = tiny(hyper_width=16), []
    opt = torch.optim.Adam(model.hyper.train().parameters(), 2e-3)
    with torch.no_grad():
        z = model.encoder(window()[0])
        deltas = [0.5 * torch.randn(2, *shape, 1, 1) for shape in weight_shapes(model.generator)]
        source = model.decode(z, deltas)
    for _ in range(10):
        error = (model.decode(z, model.refine(source, z)) - source).square().mean()
        opt.zero_grad()
        error.backward()
        opt.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0], errors


def test_refinements_add_up_and_gradients_flow_through_the_last_one_only():
    model = randomise_zeros(tiny(refine=3))
    source = window()[0]
    z = model.encoder(source).detach()
    deltas, pictures = None, []
    for _ in range(3):  # HyperStyle, by hand: decode, then add the next change
        pictures.append(model.decode(z, deltas).detach())
        change = model.hyper(source, pictures[-1])
        deltas = change if deltas is None else [c + d.detach() for c, d in zip(change, deltas)]
    got = model.weight_changes(source, z)
    for a, b in zip(got, deltas):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    parameters = [p for name, p in model.hyper.named_parameters() if "shared" not in name]  # no layer is as wide
    want = torch.autograd.grad(sum(c.square().sum() for c in deltas), parameters)
    given = torch.autograd.grad(sum(c.square().sum() for c in got), parameters)
    for a, b in zip(given, want):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    model.config.refine = 0  # the generator's own weights
    assert model.weight_changes(source, z) is None
    assert tiny(hyper="none").weight_changes(source, z) is None


def test_refinements_are_summed_in_fp32_under_autocast():
    model, source = randomise_zeros(tiny(refine=2)), window()[0]
    with torch.autocast("cpu", torch.bfloat16):
        deltas = model.weight_changes(source, model.encoder(source))
    assert {d.dtype for d in deltas} == {torch.float32}


# narrow, but not below 16: there the gradient of a 1x1 convolution of stride 2 crashes oneDNN (channels_last, torch 2.13)
PUBLISHED = dict(encoder_width=16, hyper_width=16, base=1024, cap=128, map_code=0, noise=True)


@pytest.mark.parametrize("hyper", ["shared", "separable"])
def test_every_parameter_of_the_published_forms_gets_a_gradient(hyper, monkeypatch):
    monkeypatch.setattr(vision, "resize_to_256", lambda x: F.interpolate(x, 64))        # a sixteenth of the pixels
    model = randomise_zeros(tiny(encoder="psp", hyper=hyper, refine=2, **PUBLISHED))
    frames, *_ = model(*window(B=1, T=1))
    (frames.square().sum() + model.generator.mapping(torch.randn(2, 24)).sum()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    # a gate has one inner unit at this width, which may be off; 16 px has no fine styles for pSp's finest map
    assert all(".res_layer.5.fc" in name or ".latlayer2." in name for name in unused), unused


def test_the_dial_at_256_px_gives_networks_of_the_published_sizes():
    with torch.device("meta"):
        model = FCTFG(Config.at(256))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["generator"] == 30_034_338 and count["encoder"] == 209_450_688 and count["hyper"] == 198_710_080
    assert model.maps is None and model.config.refine == 5 and model.config.L == 14
    with torch.device("meta"):
        alone = FCTFG(Config.at(256), generator_only=True)
    assert [name for name, _ in alone.named_children()] == ["generator"]


def write_published_files(tmp_path):
    """Small files in the published forms: generator and discriminator, pSp, HyperStyle (both with the generator)"""
    torch.manual_seed(0)
    G, D = Generator(16, dim=24, n_mlp=2, base=1024, cap=128), Discriminator(16, base=1024, cap=128)
    encoder, hyper = GradualStyleEncoder(6, 24, 16), HyperStyleNet(weight_shapes(G), "shared", 16)
    decoder = {f"decoder.{k}": v for k, v in G.state_dict().items()}
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items() if k != "latent_avg"}
    torch.save(dict(g_ema=G.state_dict(), d=D.state_dict()), tmp_path / "g.pt")
    torch.save(dict(state_dict=decoder | state, latent_avg=torch.randn(6, 24)), tmp_path / "psp.pt")
    torch.save(dict(state_dict=decoder | {f"hypernet.{k}": v for k, v in hyper.state_dict().items()}), tmp_path / "h.pt")
    torch.save(dict(state_dict=state), tmp_path / "bare.pt")
    return (str(tmp_path / name) for name in ("g.pt", "psp.pt", "h.pt", "bare.pt")), G, D, encoder, hyper


def test_a_network_is_built_from_published_files(tmp_path):
    (g, psp, h, bare), G, D, encoder, hyper = write_published_files(tmp_path)
    changes, parts = load_published(16, g, psp, h)
    assert set(parts) == {"generator", "D", "encoder", "hyper"}
    model = FCTFG(Config.at(**changes))
    for name, author in (("generator", G), ("encoder", encoder), ("hyper", hyper)):
        getattr(model, name).load_state_dict(parts[name].state_dict())
        for a, b in zip(getattr(model, name).parameters(), author.parameters()):
            assert torch.equal(a, b), name
    assert model.config.encoder == "psp" and model.config.hyper == "shared" and model.maps is None
    assert parts["D"].state_dict()["final_conv.0.weight"].equal(D.final_conv[0].weight)
    changes, parts = load_published(16, None, bare, None)
    assert changes == dict(encoder="psp", encoder_width=16) and set(parts) == {"encoder"}
    assert load_published(16) == ({}, {})
    w = estimate_mean_w(G)
    assert w.shape == (24,) and (w - G.mapping(torch.randn(4096, 24)).mean(0)).abs().max() < 0.05 * w.std() + 0.05


def test_published_files_that_do_not_fit_together_are_refused(tmp_path):
    (g, _, h, bare), *_ = write_published_files(tmp_path)
    torch.save(dict(d=Discriminator(16, base=256, cap=32).state_dict()), tmp_path / "d.pt")
    torch.save(dict(g=Generator(16, dim=24, n_mlp=2, base=512, cap=128).state_dict()), tmp_path / "thin.pt")
    for arguments, match in (((32, g), "g.pt.*16 px"), ((16, str(tmp_path / "d.pt")), "neither g_ema nor g"),
                             ((16, str(tmp_path / "thin.pt"), None, h), "h.pt: not the weights"),
                             ((16, g, None, bare), "not a HyperStyle"), ((16, None, None, h), "with --generator")):
        with pytest.raises(InputError, match=match):
            load_published(*arguments)


def test_every_size_of_the_dial_builds_and_the_64_px_network_takes_less_than_12_mb():
    for size in (16, 32, 64):
        model = FCTFG(Config.at(size))
        assert model.generator.size == size and model.config.L == model.generator.L
    shipped = FCTFG(Config.at(64, hyper="none"))
    assert 2 * sum(v.numel() for v in shipped.state_dict().values()) < 12_000_000  # bytes of the fp16 file
    with pytest.raises(AssertionError, match="expected one of"):
        Config.at(48)


@pytest.mark.parametrize("template, motion", [("face", "direct"), ("toy", "direct"), ("toy", "paper")])
def test_an_enlarged_network_paints_the_same_image_at_twice_the_size(template, motion):
    torch.manual_seed(0)
    small = FCTFG(Config.at(64, template=template, motion=motion, hyper="none", dim=16, cap=8, linear=20, map_code=51,
                            encoder_width=4))
    with torch.no_grad():
        for q in small.parameters():
            q += 0.1 * torch.randn_like(q)
    small.encoder.latent_avg.normal_()
    small.canonical.whiten.mean.normal_()
    large = enlarge_network(small)
    assert (large.config.size, large.config.L, small.config.L) == (128, 12, 10)
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    code, few = large.encoder(image), small.encoder(F.avg_pool2d(image, 2))
    torch.testing.assert_close(code[:, :10], few)
    torch.testing.assert_close(code[:, 10:], few.new_zeros(2, 2, 16) + small.encoder.latent_avg[9])
    torch.testing.assert_close(large.canonical(code)[:, :10], small.canonical(few))
    z_a, pose = small.encode_sound(torch.randn(2, 1, 1, 80, 16)), torch.randn(2, 1, 7)
    moved, expected = (m.motion(z_a, pose if m.pose else z[:, None]) for m, z in ((large, code), (small, few)))
    torch.testing.assert_close(moved[:, :, :10], expected)
    assert moved.isfinite().all() and large.canonical(code).isfinite().all()
    expected = large.generator.to_rgbs[-1].upsample(small.decode(few))
    torch.testing.assert_close(large.decode(code), expected, rtol=1e-4, atol=1e-4)


def test_saved_weights_load_unchanged_and_unsuitable_files_are_refused(tmp_path):
    model, path = tiny(), str(tmp_path / "w.pt")
    config = dataclasses.asdict(model.config)
    good = dict(kind="weights", format=1, config=config, networks=dict(model=model.state_dict()))
    save_checkpoint(path, good)
    source, driving, mel = window()
    assert torch.equal(load_model(path)(source, driving, mel)[0], model(source, driving, mel)[0])
    for changes in (dict(kind="syncnet"), dict(config=dict(config, dim=32)), dict(config=dict(size=16)),
                    dict(networks={})):
        save_checkpoint(path, good | changes)
        with pytest.raises(InputError, match="w.pt"):
            load_model(path)
