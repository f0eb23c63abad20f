"""Loss terms with known answers, the published judges against naive float64 references, the downloader against a
server."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import evaluate
import faces
import judges
import losses
from media import InputError

FORMATS = Path(__file__).parent.parent.parent / "shared" / "formats"  # key lists of the published files, where present


# ------------------------------------------------------------------------------------------------------------
# the terms


def test_a_discriminator_that_knows_nothing_costs_two_ln_2_and_its_generator_ln_2():
    zero = torch.zeros(5, 1)
    assert losses.discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert losses.generator_loss(zero).item() == pytest.approx(math.log(2), rel=1e-6)


def test_gan_losses_are_the_logarithms_of_the_paper():
    real, fake = torch.randn(7, 1, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    p_real, p_fake = 1 / (1 + torch.exp(-real)), 1 / (1 + torch.exp(-fake))
    expected = -p_real.log().mean() - (1 - p_fake).log().mean()
    assert torch.allclose(losses.discriminator_loss(real, fake), expected)
    assert torch.allclose(losses.generator_loss(fake), -p_fake.log().mean())


def test_r1_of_a_linear_discriminator_is_the_square_of_its_weight():
    real = torch.randn(4, 3, 5, 7, requires_grad=True)
    w = torch.randn(3, 5, 7, requires_grad=True)
    penalty = losses.r1_penalty(real, (real * w).sum((1, 2, 3))[:, None])
    assert torch.allclose(penalty, w.square().sum())
    penalty.backward()
    assert torch.allclose(w.grad, 2 * w)  # second order: it trains the discriminator


def test_path_length_of_a_linear_generator_is_the_length_of_its_columns():
    N, L, D, H, W = 2, 5, 3, 4, 6
    A = torch.randn(3 * H * W, L, D, dtype=torch.float64)  # the Jacobian itself
    w_plus = torch.randn(N, L, D, dtype=torch.float64, requires_grad=True)
    fake = torch.einsum("pld,nld->np", A, w_plus).unflatten(1, (3, H, W))
    noise = torch.randn(N, 3, H, W, dtype=torch.float64)
    mean_before = torch.tensor(2.0, dtype=torch.float64)
    penalty, mean_path = losses.path_length_penalty(fake, w_plus, mean_before, noise, decay=0.1)
    lengths = []
    for n in range(N):
        columns = [A[:, i].T @ noise[n].flatten() / math.sqrt(H * W) for i in range(L)]  # J^T y, layer by layer
        lengths.append(math.sqrt(sum(float(c @ c) for c in columns) / L))
    expected_mean = 2 + 0.1 * (sum(lengths) / N - 2)
    assert mean_path.item() == pytest.approx(expected_mean) and not mean_path.requires_grad
    assert penalty.item() == pytest.approx(sum((x - expected_mean) ** 2 for x in lengths) / N)


def test_the_gradient_of_path_length_goes_through_the_running_mean():
    noise = torch.randn(4, 3, 4, 6)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    A = torch.randn(3 * 4 * 6, 5, 3, dtype=torch.float64)
    w_plus = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)

    def penalty(scale):
        fake = scale * torch.einsum("pld,nld->np", A, w_plus).unflatten(1, (3, 4, 6))
        return losses.path_length_penalty(fake, w_plus, torch.tensor(2.0), noise.double())[0]

    slope, = torch.autograd.grad(penalty(scale), scale)
    numeric = (penalty(scale + 1e-5) - penalty(scale - 1e-5)) / 2e-5
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_orthogonality_is_0_for_right_angles_1_for_parallels_and_blind_to_length():
    z = torch.randn(2, 5, 8)  # (B, L, D)
    assert losses.orthogonality_loss(z, -3 * z[:, None].expand(2, 3, 5, 8)).item() == pytest.approx(1, abs=1e-5)
    a, b = torch.zeros(2, 5, 8), torch.zeros(2, 3, 5, 8)
    a[..., :4], b[..., 4:] = torch.randn(2, 5, 4), torch.randn(2, 3, 5, 4)
    assert losses.orthogonality_loss(a, b).item() == 0
    mixed = a[:, None] + b
    expected = a.square().sum(-1)[:, None] / mixed.square().sum(-1)  # cos^2 by Pythagoras
    assert torch.allclose(losses.orthogonality_loss(a, mixed), expected.mean())
    assert torch.allclose(losses.orthogonality_loss(7 * a, mixed), expected.mean())


def test_orthogonality_compares_each_style_layer_with_itself_only():
    a, b = torch.zeros(2, 5, 8), torch.zeros(2, 3, 5, 8)
    a[:, 0, 1], b[:, :, 1:, 1] = 1, 1  # the same direction, in other layers
    assert losses.orthogonality_loss(a, b).item() == 0


def test_reconstruction_is_0_for_equal_pictures_and_weighs_boxes_and_pyramid():
    x = torch.rand(2, 3, 16, 24)
    assert losses.reconstruction_loss(x, x, (((0, 0, 1, 1), 5),)).item() == 0
    assert losses.reconstruction_loss(x + 0.25, x, pyramid=0).item() == pytest.approx(0.25, rel=1e-5)
    assert losses.reconstruction_loss(x + 0.25, x, pyramid=0.5).item() == pytest.approx(0.25 * 2, rel=1e-5)
    left = x.clone()
    left[..., 4:8, 6:12] += 0.5  # rows 1/4..1/2 of 16, columns 1/4..1/2 of 24: a sixteenth of the picture
    inside, outside = (((0.25, 0.25, 0.5, 0.5), 3.0),), (((0.5, 0.25, 0.75, 0.5), 3.0),)
    assert losses.reconstruction_loss(left, x, inside, pyramid=0).item() == pytest.approx(0.5 / 16 + 3 * 0.5, rel=1e-5)
    assert losses.reconstruction_loss(left, x, outside, pyramid=0).item() == pytest.approx(0.5 / 16, rel=1e-5)


def test_perceptual_loss_is_relative_to_the_size_of_each_map():
    real = [torch.rand(2, 4, 6, 5) + 0.1, 100 * torch.rand(2, 8, 3, 2) + 1]
    assert losses.perceptual_loss(real, real).item() == 0
    assert losses.perceptual_loss([1.5 * real[0], 1.1 * real[1]], real).item() == pytest.approx((0.5 + 0.1) / 2, rel=1e-4)
    for maps in real:
        maps.requires_grad_()
    losses.perceptual_loss([2 * real[0].detach().requires_grad_(), real[1].detach()], real).backward()
    assert real[0].grad is None  # the real side is a target


def test_identity_loss_is_0_1_or_2_for_the_same_another_or_the_opposite_direction():
    e = torch.eye(4)[:3]
    assert losses.identity_loss(e, e).item() == 0
    assert losses.identity_loss(e, e.roll(1, 1)).item() == 1
    assert losses.identity_loss(e, -e).item() == 2


def test_same_person_loss_has_the_value_worked_out_by_hand():
    a = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    loss = judges.same_person_loss(a, a, torch.tensor([4, 4, 9]), torch.tensor(math.log(2.0)), torch.tensor(-1.0))
    # same: 5 pairs of cosine 1, logit 2 - 1 = 1; other: 4 pairs of cosine 0, logit -1
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1)), rel=1e-6)
    worse = judges.same_person_loss(a, a, torch.tensor([4, 9, 4]), torch.tensor(math.log(2.0)), torch.tensor(-1.0))
    assert worse > loss


def test_augmentation_at_p_0_changes_nothing_and_at_p_1_changes_every_picture():
    x = torch.rand(5, 3, 16, 24) * 2 - 1
    assert torch.equal(losses.Augment(0.0)(x), x)
    torch.manual_seed(0)
    y = losses.Augment(1.0)(x)
    assert y.shape == x.shape and all(not torch.equal(a, b) for a, b in zip(x, y))
    many = x.repeat(40, 1, 1, 1)
    changed = ((losses.Augment(0.05)(many) - many).abs().amax((1, 2, 3)) > 1e-5).sum()
    assert 20 < changed < 90  # 1 - 0.95^6 = 26 % of 200 pictures


def test_augmentation_has_the_gradient_of_finite_differences():
    x, d = (torch.randn(3, 3, 8, 12, dtype=torch.float64) for _ in range(2))
    augment = losses.Augment(1.0)

    def value(x):
        torch.manual_seed(3)
        return augment(x).pow(2).sum()

    x.requires_grad_()
    slope = (torch.autograd.grad(value(x), x)[0] * d).sum()
    numeric = (value(x + 1e-6 * d) - value(x - 1e-6 * d)) / 2e-6
    assert slope.item() != 0 and slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_augmentation_treats_each_picture_apart():
    x = torch.rand(4, 3, 8, 12)
    other = x.clone()
    other[1] = torch.rand(3, 8, 12)
    torch.manual_seed(5)
    a = losses.Augment(0.7)(x)
    torch.manual_seed(5)
    b = losses.Augment(0.7)(other)
    assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


def test_the_controller_moves_p_by_n_of_500k_towards_the_target_and_stays_in_0_1():
    augment = losses.Augment(p=0.5)
    augment.update(torch.ones(32, 1))  # all real pictures known: sign 1 > 0.6
    assert augment.p == pytest.approx(0.5 + 32 / 500_000)
    augment.update(torch.tensor([[1.0], [1], [-1]]))  # 1/3 < 0.6
    assert augment.p == pytest.approx(0.5 + 29 / 500_000)
    augment.p = 1.0
    augment.update(torch.ones(32, 1))
    assert augment.p == 1
    augment.p = 0.0
    augment.update(-torch.ones(32, 1))
    assert augment.p == 0


def test_a_frozen_judge_stays_in_eval_and_without_gradients_when_its_owner_trains():
    judge = checkpoint.freeze(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    owner = nn.ModuleDict(dict(judge=judge, free=nn.BatchNorm1d(4)))
    owner.train()
    assert owner["free"].training and not any(m.training for m in owner["judge"].modules())
    assert not any(p.requires_grad for p in owner["judge"].parameters())


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (20, 33)])
def test_the_small_judge_gives_unit_length_at_any_size(size):
    e = judges.SmallFaceJudge()(torch.rand(3, 3, *size))
    assert e.shape == (3, 64) and torch.allclose(e.norm(dim=1), torch.ones(3), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# published judges: names and shapes


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
    keys = {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}
    slices = [1] * 2 + [2] * 2 + [3] * 3 + [4] * 3 + [5] * 3
    for k, (i, c, c_in) in zip(slices, vgg_convolutions((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
        keys |= named(f"net.slice{k}.{i}", c, c_in, 3, 3)
    for k, c in enumerate((64, 128, 256, 512, 512)):
        keys |= named(f"lin{k}.model.1", 1, c, 1, 1, bias=False) | named(f"lins.{k}.model.1", 1, c, 1, 1, bias=False)
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


JUDGES = {  # class, expected keys, the list of the published file, tensors in it
    "vgg19": (judges.VGG19Features, expected_vgg19, "vgg19_features.txt", 32),
    "lpips": (judges.LPIPS, expected_lpips, "lpips_vgg.txt", 38),
    "arcface": (judges.ArcFace, expected_arcface, "arcface_ir_se50.txt", 397),
    "syncnet": (judges.SyncNetV2, expected_syncnet, "syncnet_v2.txt", 102),
    "wav2lip": (judges.Wav2LipExpert, expected_wav2lip, "wav2lip_sync_expert.txt", 217),
}


@pytest.fixture(scope="module")
def judges():
    """Each judge once, with random weights and BatchNorm statistics that matter, frozen."""
    torch.manual_seed(0)
    made = {}
    for name, (kind, *_) in JUDGES.items():
        made[name] = judge = checkpoint.freeze(kind())
        for module in judge.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 2)
        for key, value in judge.named_parameters():
            if ".lin" in "." + key:
                value.data.uniform_(0, 1)
    return made


def double(judge):
    return {k: v.double() for k, v in judge.state_dict().items()}


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_has_the_names_and_shapes_of_its_published_file(judges, name):
    expected = JUDGES[name][1]()
    assert len(expected) == JUDGES[name][3]
    assert {k: tuple(v.shape) for k, v in judges[name].state_dict().items()} == expected


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_agrees_with_the_key_list_of_its_published_file(judges, name):
    path = FORMATS / JUDGES[name][2]
    if not path.is_file():
        pytest.skip(f"the key list {path.name} is not at hand")
    rows = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    listed = {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape, _ in rows}
    assert {k: tuple(v.shape) for k, v in judges[name].state_dict().items()} == listed


# ------------------------------------------------------------------------------------------------------------
# published judges: numbers, against references written from the papers on the state dict, in float64


def batch_norm(s, name, x):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var, w, b = (s[f"{name}.{k}"].view(shape) for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def naive_vgg(s, prefix, x, stages):
    """All activations after a ReLU, by the index of that ReLU; prefix(index) names a convolution."""
    out, ends = {}, set()
    layers = vgg_convolutions(*stages)
    for (i, *_), (j, *_) in zip(layers, layers[1:]):
        if j == i + 3:
            ends.add(i)
    for i, *_ in layers:
        x = F.conv2d(x, s[f"{prefix(i)}.weight"], s[f"{prefix(i)}.bias"], padding=1).clamp(min=0)
        out[i + 1] = x
        if i in ends:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    return out


def close(ours, reference, tolerance=2e-4):
    assert ours.shape == reference.shape
    error = (ours.double() - reference).abs().max() / reference.abs().max()
    assert error < tolerance, f"relative error {error:.2g}"


def test_vgg19_gives_the_five_taps_of_imagenet_normalised_pictures(judges):
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    maps = judges["vgg19"](x)
    y = (x.double() + 1) / 2
    y = torch.stack([(y[:, 0] - 0.485) / 0.229, (y[:, 1] - 0.456) / 0.224, (y[:, 2] - 0.406) / 0.225], 1)
    every = naive_vgg(double(judges["vgg19"]), lambda i: f"features.{i}", y,
                      ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)))
    assert [m.shape[1:] for m in maps] == [(64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6), (512, 2, 3)]
    for index, ours in zip((1, 6, 11, 20, 29), maps):
        close(ours, every[index])


def test_lpips_is_the_weighted_distance_of_normalised_features(judges):
    a, b = (torch.rand(2, 3, 48, 32) * 2 - 1 for _ in range(2))
    s = double(judges["lpips"])
    where = {i: k for k, group in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), 1) for i in group}
    expected, sides = torch.zeros(2, dtype=torch.float64), []
    for x in (a, b):
        x = (x.double() - torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1))
        x = x / torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
        every = naive_vgg(s, lambda i: f"net.slice{where[i]}.{i}", x, ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)))
        sides.append([every[i] / (every[i].norm(dim=1, keepdim=True) + 1e-10) for i in (3, 8, 15, 22, 29)])
    for k, (u, v) in enumerate(zip(*sides)):
        expected += (s[f"lin{k}.model.1.weight"] * (u - v) ** 2).sum(1).mean((1, 2))
    close(judges["lpips"](a, b), expected)
    assert judges["lpips"](a, a).abs().max() == 0


def test_lpips_has_a_finite_gradient_where_all_channels_are_silent(judges):
    dead = judges.LPIPS()
    dead.load_state_dict(judges["lpips"].state_dict())
    checkpoint.freeze(dead).net.slice5[-2].bias.fill_(-100)  # the last ReLU gives 0 everywhere
    x = (torch.rand(1, 3, 16, 32) * 2 - 1).requires_grad_()
    assert dead.maps(x)[4].abs().max() == 0
    dead(x, -x.detach()).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def naive_arcface(s, x):
    x = batch_norm(s, "input_layer.1", F.conv2d(x, s["input_layer.0.weight"], padding=1))
    x = torch.where(x > 0, x, x * s["input_layer.2.weight"].view(1, -1, 1, 1))
    for k in range(24):
        b, stride = f"body.{k}.res_layer", 2 if k in (0, 3, 7, 21) else 1
        y = F.conv2d(batch_norm(s, f"{b}.0", x), s[f"{b}.1.weight"], padding=1)
        y = torch.where(y > 0, y, y * s[f"{b}.2.weight"].view(1, -1, 1, 1))
        y = batch_norm(s, f"{b}.4", F.conv2d(y, s[f"{b}.3.weight"], padding=1, stride=stride))
        gate = (y.mean((2, 3)) @ s[f"{b}.5.fc1.weight"][..., 0, 0].T).clamp(min=0) @ s[f"{b}.5.fc2.weight"][..., 0, 0].T
        short = x[:, :, ::stride, ::stride]
        if k in (3, 7, 21):
            weight = s[f"body.{k}.shortcut_layer.0.weight"][..., 0, 0]
            short = batch_norm(s, f"body.{k}.shortcut_layer.1", torch.einsum("nchw,dc->ndhw", short, weight))
        x = y / (1 + torch.exp(-gate))[:, :, None, None] + short
    x = batch_norm(s, "output_layer.0", x).flatten(1) @ s["output_layer.3.weight"].T + s["output_layer.3.bias"]
    x = batch_norm(s, "output_layer.4", x)
    return x / x.norm(dim=1, keepdim=True)


FFHQ = np.array([(192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935), (201.26117, 371.41043),
                 (313.08905, 371.15118)]) / 512  # fmt: skip
# (facexlib's five points of an FFHQ face, as fractions of the picture)


@pytest.mark.parametrize("template", ["face", "ffhq"])
def test_the_five_points_of_a_face_land_where_arcface_wants_them(template):
    judge = judges.ArcFace(template)
    x, y, side = faces.square_within("ffhq", template)
    five = (FFHQ - [x, y]) / side  # in the crop of this template
    np.testing.assert_allclose(five * judge.side + [judge.left, judge.top], faces.ARCFACE_POINTS, atol=3.2)  # of 112 px
    three = np.array(faces.TEMPLATES[template].points) * judge.side + [judge.left, judge.top]
    wanted = np.vstack([faces.ARCFACE_POINTS[:2], faces.ARCFACE_POINTS[3:].mean(0)])
    np.testing.assert_allclose(three, wanted, atol=2.5)
    if template == "ffhq":  # pSp's "interesting region" of 256 px: columns 32 .. 220, rows 35 .. 223
        box = 256 / judge.side * np.array([-judge.left, -judge.top, 112 - judge.left, 112 - judge.top])
        np.testing.assert_allclose(box, (32, 35, 220, 223), atol=4)


@pytest.mark.parametrize("template", ["face", "ffhq"])
def test_arcface_is_ir_se50_of_its_templates_crop(judges, template):
    judge, x = judges.ArcFace(template).eval(), torch.rand(2, 3, 256, 256) * 2 - 1
    judge.load_state_dict(judges["arcface"].state_dict())
    n, small = judge.side, torch.zeros(2, 3, judge.side, judge.side, dtype=torch.float64)
    for i in range(n):  # adaptive pooling, written out: cells from floor(i 256/n) to ceil((i + 1) 256/n)
        rows = x[:, :, i * 256 // n:-(-(i + 1) * 256 // n)].double().mean(2)
        for j in range(n):
            small[:, :, i, j] = rows[:, :, j * 256 // n:-(-(j + 1) * 256 // n)].mean(2)
    faces = torch.zeros(2, 3, 112, 112, dtype=torch.float64)
    for i in range(112):
        for j in range(112):  # beyond the picture its border
            row, column = (min(max(k - first, 0), n - 1) for k, first in ((i, judge.top), (j, judge.left)))
            faces[:, :, i, j] = small[:, :, row, column]
    close(judge(x), naive_arcface(double(judge), faces))


def test_arcface_takes_any_square_size_and_looks_at_its_crop_only(judges):
    judge, x = judges["arcface"], torch.rand(1, 3, 256, 256, requires_grad=True)
    e = judge(x)
    e[:, :7].sum().backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    assert seen[40:215, 40:215].all() and not seen[:28].any() and not seen[:, :28].any() and not seen[:, 225:].any()
    e = judge(torch.rand(2, 3, 40, 40))
    assert e.shape == (2, 512) and torch.allclose(e.norm(dim=1), torch.ones(2), atol=1e-5)
    with pytest.raises(AssertionError, match="square"):
        judge(torch.rand(1, 3, 40, 50))


def naive_syncnet_head(s, name, x):
    x = batch_norm(s, f"{name}.1", x @ s[f"{name}.0.weight"].T + s[f"{name}.0.bias"]).clamp(min=0)
    return x @ s[f"{name}.3.weight"].T + s[f"{name}.3.bias"]


def test_syncnet_v2_embeds_each_five_frames_as_published(judges):
    B, T = 1, 6
    frames = torch.rand(B, T, 3, 224, 224) * 2 - 1
    ours, s = judges["syncnet"].face(frames), double(judges["syncnet"])
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
        close(ours[:, first], naive_syncnet_head(s, "netfclip", x.flatten(1)))


def test_syncnet_v2_embeds_sound_as_published(judges):
    mfcc = torch.randn(3, 13, 20) * 10
    s, x = double(judges["syncnet"]), mfcc[:, None].double()
    for i, *_ in SOUND_V2:
        x = F.conv2d(x, s[f"netcnnaud.{i}.weight"], s[f"netcnnaud.{i}.bias"], padding=0 if i == 18 else 1)
        x = batch_norm(s, f"netcnnaud.{i + 1}", x).clamp(min=0)
        if i in (4, 14):
            x = x.unfold(2, 3, 1 if i == 4 else 2).unfold(3, 3, 2).amax((-1, -2))
    assert x.shape == (3, 512, 1, 1)
    close(judges["syncnet"].sound(mfcc), naive_syncnet_head(s, "netfcaud", x.flatten(1)))


def naive_wav2lip(s, name, plan, x):
    for i, step in enumerate(plan):
        stride, padding = (1, 1) if isinstance(step, int) else step[2:]
        y = F.conv2d(x, s[f"{name}.{i}.conv_block.0.weight"], s[f"{name}.{i}.conv_block.0.bias"], stride, padding)
        y = batch_norm(s, f"{name}.{i}.conv_block.1", y)
        x = (y + x if isinstance(step, int) else y).clamp(min=0)
    assert x.shape[1:] == (512, 1, 1)
    return x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)


def test_inception_is_tensorflows_of_2015_under_torchvisions_names():
    torch.manual_seed(0)
    net = checkpoint.freeze(evaluate.Inception())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    s = net.state_dict()
    assert len(s) == 6 * 94 + 2 and s["fc.weight"].shape == (1008, 2048)

    def conv(x, name, stride=1, padding=0):
        y = F.conv2d(x, s[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var, w, b = (s[f"{name}.bn.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
        return torch.relu((y - mean) / (var + 1e-3).sqrt() * w + b)

    def chain(x, name, *pads):  # layers _1, _2 ..
        for k, pad in enumerate(pads, 1):
            x = conv(x, f"{name}_{k}", *(pad if isinstance(pad, list) else [1, pad]))
        return x

    def average(x):  # of the pixels that are there
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)

    def fork(x, name):
        return [conv(x, name + "a", 1, (0, 1)), conv(x, name + "b", 1, (1, 0))]

    row, column = (0, 3), (3, 0)
    picture = torch.rand(1, 3, 90, 75) * 2 - 1
    x = F.interpolate(picture, (299, 299), mode="bilinear", align_corners=False)
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b.branch", "Mixed_5c.branch", "Mixed_5d.branch"):
        x = torch.cat([conv(x, m + "1x1"), chain(x, m + "5x5", 0, 2), chain(x, m + "3x3dbl", 0, 1, 1),
                       conv(average(x), m + "_pool")], 1)  # fmt: skip
    m = "Mixed_6a.branch"
    x = torch.cat([conv(x, m + "3x3", 2), chain(x, m + "3x3dbl", 0, 1, [2, 0]), F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b.branch", "Mixed_6c.branch", "Mixed_6d.branch", "Mixed_6e.branch"):
        double = chain(x, m + "7x7dbl", 0, column, row, column, row)
        x = torch.cat([conv(x, m + "1x1"), chain(x, m + "7x7", 0, row, column), double, conv(average(x), m + "_pool")], 1)
    m = "Mixed_7a.branch"
    long = chain(x, m + "7x7x3", 0, row, column, [2, 0])
    x = torch.cat([chain(x, m + "3x3", 0, [2, 0]), long, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_7b.branch", "Mixed_7c.branch"):
        pooled = average(x) if "7b" in m else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([conv(x, m + "1x1"), *fork(conv(x, m + "3x3_1"), m + "3x3_2"),
                       *fork(chain(x, m + "3x3dbl", 0, 1), m + "3x3dbl_3"), conv(pooled, m + "_pool")], 1)  # fmt: skip
    assert x.shape == (1, 2048, 8, 8)
    torch.testing.assert_close(net(picture), x.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_the_wav2lip_expert_sees_bgr_lower_halves_and_gives_the_published_embeddings(judges):
    judge, s = judges["wav2lip"], double(judges["wav2lip"])
    frames, mel = torch.rand(2, 5, 3, 96, 96) * 2 - 1, torch.randn(3, 1, 80, 16)
    channels = [(frames[:, t, c, 48:].double() + 1) / 2 for t in range(5) for c in (2, 1, 0)]
    close(judge.face(frames), naive_wav2lip(s, "face_encoder", FACE, torch.stack(channels, 1)))
    close(judge.sound(mel), naive_wav2lip(s, "audio_encoder", SOUND, mel.double()))
    logits = judge.logits(judge.face(frames), judge.sound(mel))
    assert logits.shape == (2, 3)
    assert torch.allclose(torch.sigmoid(logits), judge.face(frames) @ judge.sound(mel).T, atol=1e-5)


def test_the_sync_judges_take_crops_of_any_size(judges):
    frames = torch.rand(1, 5, 3, 64, 50)
    assert judges["wav2lip"].face(frames).shape == (1, 512)
    assert judges["syncnet"].face(frames).shape == (1, 1, 1024)
    with pytest.raises(AssertionError, match="expected"):
        judges["wav2lip"].face(frames[:, :4])


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_is_differentiable_by_the_picture_and_ignores_who_else_is_in_the_batch(judges, name):
    judge = judges[name]
    judge.train()  # has no effect: BatchNorm and dropout stay as they are in use
    shape = (3, 5, 3, 32, 32) if name in ("syncnet", "wav2lip") else (3, 3, 32, 32)
    x = (torch.rand(*shape) * 2 - 1).requires_grad_()
    run = {"vgg19": lambda x: judge(x)[4], "arcface": judge, "lpips": lambda x: judge(x, x.detach().flip(-1))}.get(name)
    run = run or judge.face
    out = run(x)
    close(run(x[1:2])[0], out[1].double(), 1e-4)
    if x.ndim == 4:
        close(run(x.detach().to(memory_format=torch.channels_last)), out.double(), 1e-4)
    (out * torch.rand_like(out)).sum().backward()
    if name == "wav2lip":
        assert x.grad[..., :15, :].abs().max() == 0  # the upper half is not seen
    assert x.grad.isfinite().all() and x.grad.flatten(1).abs().amax(1).min() > 0
    assert all(p.grad is None for p in judge.parameters())


# ------------------------------------------------------------------------------------------------------------
# published judges: files


def files_of(name, judges):
    """What the published files hold, from a judge's weights: (file of fetch, content) pairs."""
    state = judges[name].state_dict()
    if name == "vgg19":
        return {"vgg19": state | {"classifier.0.weight": torch.zeros(2, 3)}}
    if name == "lpips":
        trunk = {"features." + k.split(".", 2)[2]: v for k, v in state.items() if k.startswith("net.")}
        heads = {k: v for k, v in state.items() if k.startswith("lin") and not k.startswith("lins")}
        return {"vgg16": trunk | {"classifier.0.bias": torch.zeros(2)}, "lpips_heads": heads}
    if name == "wav2lip":
        return {"wav2lip_expert": {"state_dict": state, "optimizer": {}, "global_step": 3}}
    if name == "syncnet":
        return {"syncnet_v2": {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}}
    return {name: state}


@pytest.mark.parametrize("name", JUDGES)
def test_a_published_file_loads_into_a_frozen_judge_with_its_very_weights(judges, name, monkeypatch):
    monkeypatch.setattr(checkpoint, "fetch", lambda name, path: name)
    monkeypatch.setattr(losses, "read_weights", lambda path: files_of(name, judges)[path])
    make = {"syncnet": judges.syncnet_v2, "wav2lip": judges.wav2lip_expert}.get(name) or getattr(losses, name)
    judge = make("cpu")
    counts = {k for k in judge.state_dict() if k.endswith("num_batches_tracked")}
    assert all(torch.equal(v, judges[name].state_dict()[k]) for k, v in judge.state_dict().items() if k not in counts)
    assert not any(p.requires_grad for p in judge.parameters()) and not judge.training


def test_other_keys_or_shapes_are_refused_in_one_line_that_names_them(judges):
    state = judges["syncnet"].state_dict()
    key = "netfcaud.3.weight"
    cases = (({k: v for k, v in state.items() if k != key}, f"{key} is absent"),
             (state | {"module.x": torch.zeros(2)}, "module.x is unknown"),
             (state | {key: torch.zeros(1024, 511)}, r"\(1024, 511\), expected \(1024, 512\)"),
             (state | {key: 7}, "no dense tensor"), ({}, "and .* more"))
    for wrong, message in cases:
        with pytest.raises(InputError, match=f"some.pth: not the weights of SyncNetV2: .*{message}"):
            checkpoint.load(judges.SyncNetV2, wrong, "some.pth", "cpu")
