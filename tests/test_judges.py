"""Judges: the small face recogniser, and the published networks against float64 restatements and their files' keys."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import faces
import judges
from media import InputError
from test_vision import trunk_maps


def test_same_person_loss_has_the_value_computed_by_hand():
    a = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    loss = judges.same_person_loss(a, a, torch.tensor([4, 4, 9]), torch.tensor(math.log(2.0)), torch.tensor(-1.0))
    # same: 5 pairs of cosine 1, logit 2 - 1 = 1; other: 4 pairs of cosine 0, logit -1
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1)), rel=1e-6)
    worse = judges.same_person_loss(a, a, torch.tensor([4, 9, 4]), torch.tensor(math.log(2.0)), torch.tensor(-1.0))
    assert worse > loss


def test_a_frozen_judge_stays_in_eval_mode_without_gradients_when_its_owner_trains():
    judge = checkpoint.freeze(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    owner = nn.ModuleDict(dict(judge=judge, free=nn.BatchNorm1d(4)))
    owner.train()
    assert owner["free"].training and not any(m.training for m in owner["judge"].modules())
    assert not any(p.requires_grad for p in owner["judge"].parameters())


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (20, 33)])
def test_the_small_judge_returns_unit_length_at_any_size(size):
    e = judges.SmallFaceJudge()(torch.rand(3, 3, *size))
    assert e.shape == (3, 64) and torch.allclose(e.norm(dim=1), torch.ones(3), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# published networks: names and shapes


def named(name, *shape, bias=True):
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def norm(name, c):
    return named(name, c) | {f"{name}.running_mean": (c,), f"{name}.running_var": (c,), f"{name}.num_batches_tracked": ()}


def vgg_convolutions(*stages):
    """(index, out, in) of each convolution of torchvision's VGG"""
    index, c_in, out = 0, 3, []
    for count, c in stages:
        for _ in range(count):
            out.append((index, c, c_in))
            index, c_in = index + 2, c
        index += 1
    return out


def expected_vgg19():
    keys = {}
    for i, c, c_in in vgg_convolutions((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)):
        keys |= named(f"features.{i}", c, c_in, 3, 3)
    return keys


def expected_lpips():
    keys = {}
    for i, c, c_in in vgg_convolutions((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        keys |= named(f"features.{i}", c, c_in, 3, 3)
    for k, c in enumerate((64, 128, 256, 512, 512)):
        keys |= named(f"lin{k}.model.1", 1, c, 1, 1, bias=False)
    return keys


def expected_arcface():
    keys = named("input_layer.0", 64, 3, 3, 3, bias=False) | norm("input_layer.1", 64) | {"input_layer.2.weight": (64,)}
    keys |= norm("output_layer.0", 512) | named("output_layer.3", 512, 25088) | norm("output_layer.4", 512)
    widths = [64] * 3 + [128] * 4 + [256] * 14 + [512] * 3
    for k, (c_in, c) in enumerate(zip([64] + widths, widths)):
        b = f"body.{k}.res_layer"
        if c_in != c:
            keys |= named(f"body.{k}.shortcut_layer.0", c, c_in, 1, 1, bias=False) | norm(f"body.{k}.shortcut_layer.1", c)
        keys |= norm(f"{b}.0", c_in) | named(f"{b}.1", c, c_in, 3, 3, bias=False) | {f"{b}.2.weight": (c,)}
        keys |= named(f"{b}.3", c, c, 3, 3, bias=False) | norm(f"{b}.4", c)
        keys |= named(f"{b}.5.fc1", c // 16, c, 1, 1, bias=False) | named(f"{b}.5.fc2", c, c // 16, 1, 1, bias=False)
    return keys


SOUND_V2 = ((0, 64, 1, 3, 3), (4, 192, 64, 3, 3), (8, 384, 192, 3, 3), (11, 256, 384, 3, 3), (14, 256, 256, 3, 3),
            (18, 512, 256, 5, 4))
LIPS_V2 = ((0, 96, 3, 5, 7, 7), (4, 256, 96, 1, 5, 5), (8, 256, 256, 1, 3, 3), (11, 256, 256, 1, 3, 3),
           (14, 256, 256, 1, 3, 3), (18, 512, 256, 1, 6, 6))


def expected_syncnet():
    keys = {}
    for name, layers in (("netcnnaud", SOUND_V2), ("netcnnlip", LIPS_V2)):
        for i, *shape in layers:
            keys |= named(f"{name}.{i}", *shape) | norm(f"{name}.{i + 1}", shape[0])
    for name in ("netfcaud", "netfclip"):
        keys |= named(f"{name}.0", 512, 512) | norm(f"{name}.1", 512) | named(f"{name}.3", 1024, 512)
    return keys


# Wav2Lip: (channels, kernel, stride, padding); one number is a residual block of so many channels
FACE = ((32, 7, 1, 3), (64, 5, (1, 2), 1), 64, 64, (128, 3, 2, 1), 128, 128, 128, (256, 3, 2, 1), 256, 256,
        (512, 3, 2, 1), 512, 512, (512, 3, 2, 1), (512, 3, 1, 0), (512, 1, 1, 0))
SOUND = ((32, 3, 1, 1), 32, 32, (64, 3, (3, 1), 1), 64, 64, (128, 3, 3, 1), 128, 128, (256, 3, (3, 2), 1), 256, 256,
         (512, 3, 1, 0), (512, 1, 1, 0))


def expected_wav2lip():
    keys = {}
    for name, c_in, plan in (("face_encoder", 15, FACE), ("audio_encoder", 1, SOUND)):
        for i, step in enumerate(plan):
            c, kernel = (step, 3) if isinstance(step, int) else step[:2]
            keys |= named(f"{name}.{i}.conv_block.0", c, c_in, kernel, kernel) | norm(f"{name}.{i}.conv_block.1", c)
            c_in = c
    return keys


JUDGES = {  # class, expected keys, tensors in the published file
    "vgg19": (judges.VGG19Features, expected_vgg19, 32),
    "lpips": (judges.LPIPS, expected_lpips, 31),
    "arcface": (judges.ArcFace, expected_arcface, 397),
    "syncnet": (judges.SyncNetV2, expected_syncnet, 102),
    "wav2lip": (judges.Wav2LipExpert, expected_wav2lip, 217),
}


@pytest.fixture(scope="module")
def frozen():
    """Each judge once, frozen, with random weights and non-trivial BatchNorm statistics"""
    torch.manual_seed(0)
    frozen_judges = {}
    for name, (network, *_) in JUDGES.items():
        frozen_judges[name] = judge = checkpoint.freeze(network())
        for module in judge.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 2)
        for key, value in judge.named_parameters():
            if ".lin" in "." + key:
                value.data.uniform_(0, 1)
    return frozen_judges


def double(judge):
    return {k: v.double() for k, v in judge.state_dict().items()}


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_has_the_names_and_shapes_of_its_published_file(frozen, name):
    expected = JUDGES[name][1]()
    assert len(expected) == JUDGES[name][2]
    assert {k: tuple(v.shape) for k, v in frozen[name].state_dict().items()} == expected


# ------------------------------------------------------------------------------------------------------------
# published networks: numbers, against references written from the papers on the state dict, in float64


def batch_norm(s, name, x):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var, w, b = (s[f"{name}.{k}"].view(shape) for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def naive_vgg(s, x, stages):
    """{index of a ReLU: its output}"""
    out, ends = {}, set()
    layers = vgg_convolutions(*stages)
    for (i, *_), (j, *_) in zip(layers, layers[1:]):
        if j == i + 3:
            ends.add(i)
    for i, *_ in layers:
        x = F.conv2d(x, s[f"features.{i}.weight"], s[f"features.{i}.bias"], padding=1).clamp(min=0)
        out[i + 1] = x
        if i in ends:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    return out


def assert_close(ours, reference, tolerance=2e-4):
    assert ours.shape == reference.shape
    error = (ours.double() - reference).abs().max() / reference.abs().max()
    assert error < tolerance, f"relative error {error:.2g}"


def test_vgg19_returns_the_five_feature_maps_of_normalised_images(frozen):
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    maps = frozen["vgg19"](x)
    y = (x.double() + 1) / 2
    y = torch.stack([(y[:, 0] - 0.485) / 0.229, (y[:, 1] - 0.456) / 0.224, (y[:, 2] - 0.406) / 0.225], 1)
    maps_by_layer = naive_vgg(double(frozen["vgg19"]), y, ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)))
    assert [m.shape[1:] for m in maps] == [(64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6), (512, 2, 3)]
    for index, ours in zip((1, 6, 11, 20, 29), maps):
        assert_close(ours, maps_by_layer[index])


def test_lpips_is_the_weighted_distance_of_normalised_features(frozen):
    a, b = (torch.rand(2, 3, 48, 32) * 2 - 1 for _ in range(2))
    s = double(frozen["lpips"])
    expected, features = torch.zeros(2, dtype=torch.float64), []
    for x in (a, b):
        x = (x.double() - torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1))
        x = x / torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
        maps = naive_vgg(s, x, ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)))
        features.append([maps[i] / (maps[i].norm(dim=1, keepdim=True) + 1e-10) for i in (3, 8, 15, 22, 29)])
    for k, (u, v) in enumerate(zip(*features)):
        expected += (s[f"lin{k}.model.1.weight"] * (u - v) ** 2).sum(1).mean((1, 2))
    assert_close(frozen["lpips"](a, b), expected)
    assert frozen["lpips"](a, a).abs().max() == 0


def test_lpips_has_a_finite_gradient_where_all_channels_are_zero(frozen):
    dead = judges.LPIPS()
    dead.load_state_dict(frozen["lpips"].state_dict())
    checkpoint.freeze(dead).features[28].bias.fill_(-100)  # the last ReLU gives 0 everywhere
    x = (torch.rand(1, 3, 16, 32) * 2 - 1).requires_grad_()
    assert dead.feature_maps(x)[4].abs().max() == 0
    dead(x, -x.detach()).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def naive_arcface(s, x):
    x = batch_norm(s, "output_layer.0", trunk_maps(s, x)[-1]).flatten(1)
    x = batch_norm(s, "output_layer.4", x @ s["output_layer.3.weight"].T + s["output_layer.3.bias"])
    return x / x.norm(dim=1, keepdim=True)


FFHQ = np.array([(192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935), (201.26117, 371.41043),
                 (313.08905, 371.15118)]) / 512  # fmt: skip
# (facexlib's five points of an FFHQ face, as fractions of the picture)


@pytest.mark.parametrize("template", ["face", "ffhq"])
def test_the_five_points_of_a_face_lie_where_arcface_expects_them(template):
    with torch.device("meta"):
        judge = judges.ArcFace(template)
    x, y, side = faces.square_in_crop("ffhq", template)
    five = (FFHQ - [x, y]) / side  # in the crop of this template
    np.testing.assert_allclose(five * judge.side + [judge.left, judge.top], faces.ARCFACE_POINTS, atol=3.2)  # of 112 px
    three = np.array(faces.TEMPLATES[template].points) * judge.side + [judge.left, judge.top]
    wanted = np.vstack([faces.ARCFACE_POINTS[:2], faces.ARCFACE_POINTS[3:].mean(0)])
    np.testing.assert_allclose(three, wanted, atol=2.5)
    if template == "ffhq":  # pSp's "interesting region" of 256 px: columns 32 .. 220, rows 35 .. 223
        box = 256 / judge.side * np.array([-judge.left, -judge.top, 112 - judge.left, 112 - judge.top])
        np.testing.assert_allclose(box, (32, 35, 220, 223), atol=4)


def test_arcface_agrees_with_a_restatement_of_ir_se50(frozen):
    x = torch.rand(1, 3, 112, 112) * 2 - 1
    assert_close(frozen["arcface"].embed(x), naive_arcface(double(frozen["arcface"]), x.double()))


@pytest.mark.parametrize("template", ["face", "ffhq"])
def test_arcface_shrinks_and_pads_the_crop_of_its_template(template, monkeypatch):
    monkeypatch.setattr(judges.ArcFace, "embed", lambda judge, x: x)
    with torch.device("meta"):
        judge = judges.ArcFace(template)
    x = torch.rand(2, 3, 256, 256) * 2 - 1
    n, small = judge.side, torch.zeros(2, 3, judge.side, judge.side, dtype=torch.float64)
    for i in range(n):  # adaptive pooling, written out: cells from floor(i 256/n) to ceil((i + 1) 256/n)
        rows = x[:, :, i * 256 // n:-(-(i + 1) * 256 // n)].double().mean(2)
        for j in range(n):
            small[:, :, i, j] = rows[:, :, j * 256 // n:-(-(j + 1) * 256 // n)].mean(2)
    rows, columns = ((np.arange(112) - first).clip(0, n - 1) for first in (judge.top, judge.left))  # the border beyond
    assert_close(judge(x), small[:, :, rows][..., columns])


def test_arcface_accepts_any_square_size_and_depends_on_its_crop_only(frozen):
    judge, x = frozen["arcface"], torch.rand(1, 3, 256, 256, requires_grad=True)
    e = judge(x)
    e[:, :7].sum().backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    assert seen[40:215, 40:215].all() and not seen[:28].any() and not seen[:, :28].any() and not seen[:, 225:].any()
    e = judge(torch.rand(1, 3, 40, 40))
    assert e.shape == (1, 512) and torch.allclose(e.norm(dim=1), torch.ones(1), atol=1e-5)
    with pytest.raises(AssertionError, match="square"):
        judge(torch.rand(1, 3, 40, 50))


def naive_syncnet_head(s, name, x):
    x = batch_norm(s, f"{name}.1", x @ s[f"{name}.0.weight"].T + s[f"{name}.0.bias"]).clamp(min=0)
    return x @ s[f"{name}.3.weight"].T + s[f"{name}.3.bias"]


def test_syncnet_v2_embeds_every_five_frames_as_published(frozen):
    B, T = 1, 6
    frames = torch.rand(B, T, 3, 224, 224) * 2 - 1
    ours, s = frozen["syncnet"].windows(frames), double(frozen["syncnet"])
    assert ours.shape == (B, T - 4, 1024)
    bgr = (frames.double()[:, :, [2, 1, 0]] + 1) / 2 * 255
    for first in range(T - 4):
        # five planes of the first kernel, one a frame, as 15-channel convolution in the plane
        w = s["netcnnlip.0.weight"].transpose(1, 2).flatten(1, 2)  # (96, 3, 5, 7, 7) -> (96, 15, 7, 7)
        x = F.conv2d(bgr[:, first:first + 5].flatten(1, 2), w, s["netcnnlip.0.bias"], stride=2)
        x = F.max_pool2d(batch_norm(s, "netcnnlip.1", x).clamp(min=0), 3, 2)
        plan = ((4, 2, 1, 1), (8, 1, 1, None), (11, 1, 1, None), (14, 1, 1, 0), (18, 1, 0, None))
        for i, stride, padding, pool in plan:
            x = F.conv2d(x, s[f"netcnnlip.{i}.weight"][:, :, 0], s[f"netcnnlip.{i}.bias"], stride, padding)
            x = batch_norm(s, f"netcnnlip.{i + 1}", x).clamp(min=0)
            x = x if pool is None else F.max_pool2d(x, 3, 2, pool)
        assert x.shape == (B, 512, 1, 1)
        assert_close(ours[:, first], naive_syncnet_head(s, "netfclip", x.flatten(1)))


def test_syncnet_v2_embeds_sound_as_published(frozen):
    mfcc = torch.randn(3, 13, 20) * 10
    s, x = double(frozen["syncnet"]), mfcc[:, None].double()
    for i, *_ in SOUND_V2:
        x = F.conv2d(x, s[f"netcnnaud.{i}.weight"], s[f"netcnnaud.{i}.bias"], padding=0 if i == 18 else 1)
        x = batch_norm(s, f"netcnnaud.{i + 1}", x).clamp(min=0)
        if i in (4, 14):
            x = x.unfold(2, 3, 1 if i == 4 else 2).unfold(3, 3, 2).amax((-1, -2))
    assert x.shape == (3, 512, 1, 1)
    assert_close(frozen["syncnet"].sound(mfcc), naive_syncnet_head(s, "netfcaud", x.flatten(1)))


def naive_wav2lip(s, name, plan, x):
    for i, step in enumerate(plan):
        stride, padding = (1, 1) if isinstance(step, int) else step[2:]
        y = F.conv2d(x, s[f"{name}.{i}.conv_block.0.weight"], s[f"{name}.{i}.conv_block.0.bias"], stride, padding)
        y = batch_norm(s, f"{name}.{i}.conv_block.1", y)
        x = (y + x if isinstance(step, int) else y).clamp(min=0)
    assert x.shape[1:] == (512, 1, 1)
    return x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)


def test_the_wav2lip_expert_embeds_bgr_lower_halves_as_published(frozen):
    judge, s = frozen["wav2lip"], double(frozen["wav2lip"])
    frames, mel = torch.rand(2, 5, 3, 96, 96) * 2 - 1, torch.randn(3, 1, 80, 16)
    channels = [(frames[:, t, c, 48:].double() + 1) / 2 for t in range(5) for c in (2, 1, 0)]
    assert_close(judge.face(frames), naive_wav2lip(s, "face_encoder", FACE, torch.stack(channels, 1)))
    assert_close(judge.sound(mel), naive_wav2lip(s, "audio_encoder", SOUND, mel.double()))
    logits = judge.logits(judge.face(frames), judge.sound(mel))
    assert logits.shape == (2, 3)
    assert torch.allclose(torch.sigmoid(logits), judge.face(frames) @ judge.sound(mel).T, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert judge.logits(judge.face(frames), judge.face(frames)).isfinite().all()


def test_the_sync_judges_accept_crops_of_any_size(frozen):
    frames = torch.rand(1, 5, 3, 64, 50)
    assert frozen["wav2lip"].face(frames).shape == (1, 512)
    assert frozen["syncnet"].face(frames).shape == (1, 1024)
    with pytest.raises(AssertionError, match="expected"):
        frozen["wav2lip"].face(frames[:, :4])


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_is_differentiable_and_independent_of_the_other_images_in_a_batch(frozen, name):
    judge = frozen[name]
    judge.train()  # has no effect: BatchNorm and dropout stay in eval mode
    shape = (2, 5, 3, 32, 32) if name in ("syncnet", "wav2lip") else (2, 3, 32, 32)
    x = (torch.rand(*shape) * 2 - 1).requires_grad_()
    run = {"vgg19": lambda x: judge(x)[4], "arcface": judge, "lpips": lambda x: judge(x, x.detach().flip(-1))}.get(name)
    run = run or judge.face
    out = run(x)
    assert_close(run(x[1:2])[0], out[1].double(), 1e-4)
    if x.ndim == 4:
        assert_close(run(x.detach().to(memory_format=torch.channels_last)), out.double(), 1e-4)
    (out * torch.rand_like(out)).sum().backward()
    if name == "wav2lip":
        assert x.grad[..., :15, :].abs().max() == 0  # the upper half is cut off
    assert x.grad.isfinite().all() and x.grad.flatten(1).abs().amax(1).min() > 0
    assert all(p.grad is None for p in judge.parameters())


# ------------------------------------------------------------------------------------------------------------
# published networks: files


def published_files(name, frozen):
    """{file of `fetch`: its content}, made from a judge's weights"""
    state = frozen[name].state_dict()
    if name == "vgg19":
        return {"vgg19": state | {"classifier.0.weight": torch.zeros(2, 3)}}
    if name == "lpips":
        trunk, heads = ({k: v for k, v in state.items() if k.startswith(part)} for part in ("features.", "lin"))
        return {"vgg16": trunk | {"classifier.0.bias": torch.zeros(2)}, "lpips_heads": heads}
    if name == "wav2lip":
        return {"wav2lip_expert": {"state_dict": state, "optimizer": {}, "global_step": 3}}
    if name == "syncnet":
        return {"syncnet_v2": {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}}
    return {name: state}


@pytest.mark.parametrize("name", JUDGES)
def test_a_published_file_loads_into_a_frozen_judge_with_its_weights(frozen, name, monkeypatch):
    monkeypatch.setattr(judges, "fetch", lambda name, path: name)
    monkeypatch.setattr(judges, "read_weights", lambda path: published_files(name, frozen)[path])
    make = {"syncnet": judges.syncnet_v2, "wav2lip": judges.wav2lip_expert}.get(name) or getattr(judges, name)
    judge, expected = make("cpu"), frozen[name].state_dict()
    counts = {k for k in expected if k.endswith("num_batches_tracked")}
    assert all(torch.equal(v, expected[k]) for k, v in judge.state_dict().items() if k not in counts)
    assert not any(p.requires_grad for p in judge.parameters()) and not judge.training


def test_wrong_keys_or_shapes_are_refused_in_one_line_that_names_them(frozen):
    state = frozen["syncnet"].state_dict()
    key = "netfcaud.3.weight"
    cases = (({k: v for k, v in state.items() if k != key}, f"{key} is absent"),
             (state | {"module.x": torch.zeros(2)}, "module.x is unknown"),
             (state | {key: torch.zeros(1024, 511)}, r"size mismatch for netfcaud.3.weight: .*1024, 511.*1024, 512"),
             (state | {key: 7}, "expected torch.Tensor"), ({}, "and .* more"))
    for wrong, message in cases:
        with pytest.raises(InputError, match=f"some.pth: not the weights of SyncNetV2.*{message}"):
            checkpoint.load_frozen(judges.SyncNetV2, wrong, "some.pth", "cpu")
