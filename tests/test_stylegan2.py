"""StyleGAN2's layers against naive float64 references, and properties that training relies on."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from media import InputError
from stylegan2 import (
    Blur, Discriminator, EqualLinear, Generator, ModulatedConv2d, Upsample, add_map, blur_by_means, load_rosinality,
    mix_styles, move_pixels, n_styles)
from test_vision import listed


@pytest.mark.parametrize("up", [False, True])
def test_grouped_convolution_equals_one_convolution_per_clip(up):
    torch.manual_seed(0)
    layer, x, weight = ModulatedConv2d(6, 5, 7, up), torch.randn(6, 6, 8, 10), torch.randn(2, 5, 6, 3, 3)
    grouped, single = (layer.convolve_clips(x, weight, grouped) for grouped in (True, False))
    torch.testing.assert_close(grouped, single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_small_weight_changes_survive_bf16(kernel):
    torch.manual_seed(0)
    layer, x, style = ModulatedConv2d(6, 5, 7), torch.randn(2, 6, 8, 10), torch.randn(2, 7)
    for change in (0.001, 0.003):
        delta = torch.full((1, 5, 6, *kernel), change, dtype=torch.bfloat16)
        before, after = (layer(x, style, d)[0] for d in (None, delta))
        assert ((after * before).sum() / before.square().sum()).item() == pytest.approx(1 + change, abs=2e-5)


def test_w_and_the_score_are_fp32_under_autocast():
    torch.manual_seed(0)
    G, D = Generator(16, 24, 2, 256, 32), Discriminator(16, 256, 32)
    z, x = torch.randn(5, 24), torch.rand(5, 3, 16, 16)
    w, ends = G.mapping(z), []
    for layer in (D.final_conv[0], *D.final_linear):
        layer.register_forward_hook(lambda layer, given, result: ends.append(result.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(G.mapping(z), w) and D(x).dtype == torch.float32
    assert ends == [torch.float32] * 3


def test_upsample_equals_zeros_between_pixels_and_a_filter():
    x, up = torch.randn(2, 3, 5, 7), Upsample()
    zeros = torch.zeros(2, 3, 10, 14)
    zeros[:, :, ::2, ::2] = x
    want = F.conv2d(F.pad(zeros, (2, 1, 2, 1)), up.kernel.expand(3, 1, 4, 4), groups=3)
    torch.testing.assert_close(up(x), want)
    assert up(torch.ones(1, 3, 6, 8))[0, 0, 3:-3, 3:-3].sub(1).abs().max() < 1e-6  # preserves a constant


@pytest.mark.parametrize("pad", [1, 2])
def test_blur_has_the_right_first_and_second_derivative(pad):
    x = torch.randn(2, 3, 5, 6).double().requires_grad_()
    blur = Blur(pad, gain=4.0).double()
    assert torch.autograd.gradcheck(blur, x)
    assert torch.autograd.gradgradcheck(lambda x: blur(x).square(), x)
    want = F.conv2d(F.pad(x, (pad,) * 4), blur.kernel.expand(3, 1, 4, 4), groups=3)
    torch.testing.assert_close(blur(x), want)
    torch.testing.assert_close(blur_by_means(x, pad, gain=4.0), want)
    torch.testing.assert_close(blur_by_means(x, pad, gain=1.0), want / 4)


def test_equal_linear_scales_by_he_and_the_learning_rate():
    layer = EqualLinear(9, 4, bias_init=1, lr_mul=0.01)
    assert layer.weight.std() > 50  # N(0, 1) / lr_mul
    x = torch.randn(5, 9)
    torch.testing.assert_close(layer(x), x @ (layer.weight * 0.01 / 3).t() + 0.01 * layer.bias)


def test_default_networks_have_the_published_widths_and_parameter_counts():
    with torch.device("meta"):
        G, D = Generator(256), Discriminator(256)
    assert n_styles(256) == 14 and G.L == 14
    assert [layer.conv.weight.shape[1] for layer in G.styled_convs()] == [512] * 9 + [256] * 2 + [128] * 2
    assert sum(p.numel() for p in G.parameters()) == 30_034_338
    assert sum(p.numel() for p in D.parameters()) == 28_864_129


def test_each_style_affects_its_own_layer_and_later_ones():
    """Style 7 of 8 belongs to the last toRGB: it changes no features. Style 0 changes all features."""
    torch.manual_seed(0)
    G = Generator(32, dim=24, n_mlp=2, base=512, cap=32).eval()
    w = torch.randn(1, 8, 24)
    seen = {}
    G.convs[-1].register_forward_hook(lambda m, i, o: seen.__setitem__("x", o))
    features = []
    for layer in (None, 7, 0):
        v = w.clone()
        if layer is not None:
            v[:, layer] += 1
        G(v)
        features.append(seen["x"])
    assert torch.equal(features[0], features[1]) and not torch.allclose(features[0], features[2])


def test_noise_is_fixed_unless_random():
    G = Generator(16, dim=24, n_mlp=2, base=256, cap=32)
    for layer in G.styled_convs():
        torch.nn.init.ones_(layer.noise.weight)
    w = torch.randn(2, 6, 24)
    assert torch.equal(G(w), G(w)) and not torch.equal(G(w, noise="random"), G(w, noise="random"))
    given = [torch.zeros(1, 1, r, r) for r in (4, 8, 8, 16, 16)]
    assert not torch.equal(G(w, noise=given), G(w))


def test_identity_maps_are_added_to_the_first_channels_only():
    x, m = torch.zeros(2, 5, 4, 4), torch.ones(2, 3, 4, 4)
    assert add_map(x, [m], 0)[:, :3].min() == 1 and add_map(x, [m], 0)[:, 3:].max() == 0 and add_map(x, [m], 1) is x


def test_a_flow_reads_pixels_at_its_distance_and_moves_the_image_of_its_size():
    x, flow = torch.randn(2, 5, 8, 8), torch.zeros(2, 8, 8, 2)
    torch.testing.assert_close(move_pixels(x, flow), x)
    flow[1] = torch.tensor([2 * 2 / 8, -1 * 2 / 8])                      # two pixels right, one up
    moved = move_pixels(x, flow)
    torch.testing.assert_close(moved[0], x[0])
    torch.testing.assert_close(moved[1, :, 1:, :-2], x[1, :, :-1, 2:])
    x.requires_grad_(True)
    move_pixels(x, torch.full((2, 8, 8, 2), torch.nan)).sum().backward()  # of a NaN in the grid, this ends the process
    assert x.grad.isfinite().all()
    torch.manual_seed(0)
    G, w = Generator(16, dim=24, n_mlp=2, base=256, cap=32), torch.randn(2, 6, 24)
    still, moved = G(w, "off"), G(w, "off", flow=flow)
    torch.testing.assert_close(moved[0], still[0], atol=1e-5, rtol=1e-4)
    inner = slice(6, -6)                                                 # far from edges, 8 px move twice as far at 16 px
    torch.testing.assert_close(moved[1, :, inner, 4:8], still[1, :, 4:8, 8:12], atol=1e-4, rtol=1e-3)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    G, D = Generator(16, dim=24, n_mlp=2, base=256, cap=32), Discriminator(16, base=256, cap=32)
    z = torch.randn(6, 24)
    fake = G(G.mapping(z)[:, None].expand(-1, 6, -1), noise="random")
    D(fake).sum().backward()
    for name, p in [*G.named_parameters(), *D.named_parameters()]:
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_discriminator_features_halve_down_to_four():
    D, x = Discriminator(32, base=512, cap=32), torch.randn(3, 3, 32, 32)
    assert [f.shape[-1] for f in D.features(x)] == [16, 8, 4]
    assert D(x).shape == (3, 1)


# ------------------------------------------------------------------------------------------------------------
# whole networks in rosinality's names, against float64 references of the papers that use the tensors of a file only


def filtered(x, up=1, pad=(0, 0)):
    """Zeros between pixels, padding, the [1,3,3,1] filter (gain up^2) as a sum of shifted images."""
    N, C, H, W = x.shape
    y = x.new_zeros(N, C, H * up, W * up)
    y[:, :, ::up, ::up] = x
    y = F.pad(y, (*pad, *pad))
    k = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    h, w = y.shape[2] - 3, y.shape[3] - 3
    out = sum(k[i] * k[j] * y[:, :, i:i + h, j:j + w] for i in range(4) for j in range(4))
    return out * up ** 2


def equalised(s, name, x, lr_mul=1.0):
    weight = s[f"{name}.weight"]
    return x @ weight.t() * lr_mul / math.sqrt(weight.shape[1]) + s[f"{name}.bias"] * lr_mul


def lrelu(x):
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def reference_mapping(s, z):
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(1, 1 + sum(k.startswith("style.") and k.endswith("weight") for k in s)):
        x = lrelu(equalised(s, f"style.{i}", x, 0.01))
    return x


def reference_modulated(s, name, x, style, up=False, demodulate=True, delta=None):
    weight = s[f"{name}.weight"][0]
    out = []
    for n in range(len(x)):  # each sample has its own weights
        w = weight / math.sqrt(weight[0].numel()) * (1 if delta is None else 1 + delta[n])
        w = w * equalised(s, f"{name}.modulation", style[n])[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            y = F.conv_transpose2d(x[n:n + 1], w.transpose(0, 1), stride=2)
            y = filtered(y, pad=(1, 1)) * 4
        else:
            y = F.conv2d(x[n:n + 1], w, padding=w.shape[-1] // 2)
        out.append(y)
    return torch.cat(out)


def reference_generator(s, w_plus, noise, deltas=None):
    """rosinality's order: conv1, to_rgb1, then for each size an upsampling layer, a plain one and its toRGB."""
    deltas = deltas or [None] * len(noise)
    x, k = s["input.input"].expand(len(w_plus), -1, -1, -1), 0

    def styled(name, x, style, up, k):
        x = reference_modulated(s, f"{name}.conv", x, style, up, delta=deltas[k])
        return lrelu(x + s[f"{name}.noise.weight"] * noise[k] + s[f"{name}.activate.bias"][:, None, None])

    def to_rgb(name, x, style):
        return reference_modulated(s, f"{name}.conv", x, style, demodulate=False) + s[f"{name}.bias"]

    x = styled("conv1", x, w_plus[:, 0], False, 0)
    rgb = to_rgb("to_rgb1", x, w_plus[:, 1])
    for k in range(1, len(noise), 2):
        x = styled(f"convs.{k - 1}", x, w_plus[:, k], True, k)
        x = styled(f"convs.{k}", x, w_plus[:, k + 1], False, k + 1)
        rgb = filtered(rgb, up=2, pad=(2, 1)) + to_rgb(f"to_rgbs.{k // 2}", x, w_plus[:, k + 2])
    return rgb


def reference_discriminator(s, x):
    def conv(name, x, pad=0, stride=1):
        w = s[f"{name}.weight"]
        return F.conv2d(x, w / math.sqrt(w[0].numel()), padding=pad, stride=stride)

    def act(name, x):
        return lrelu(x + s[f"{name}.bias"][:, None, None])

    x = act("convs.0.1", conv("convs.0.0", x))
    for i in range(1, sum(k.endswith("skip.1.weight") for k in s) + 1):
        y = act(f"convs.{i}.conv1.1", conv(f"convs.{i}.conv1.0", x, 1))
        y = act(f"convs.{i}.conv2.2", conv(f"convs.{i}.conv2.1", filtered(y, pad=(2, 2)), stride=2))
        x = (y + conv(f"convs.{i}.skip.1", filtered(x, pad=(1, 1)), stride=2)) / math.sqrt(2)
    N = len(x)
    group = next(g for g in (4, 3, 2, N) if N % g == 0)
    groups = [x[n % (N // group)::N // group] for n in range(N)]
    deviation = torch.stack([(members.var(0, unbiased=False) + 1e-8).sqrt().mean() for members in groups])
    x = torch.cat([x, deviation[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)
    x = act("final_conv.1", conv("final_conv.0", x, 1)).flatten(1)
    return equalised(s, "final_linear.1", lrelu(equalised(s, "final_linear.0", x)))


def alive(network, seed=0):
    """Random weights, biases and noise strengths -> (network, its tensors in float64)"""
    g = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        torch.nn.init.normal_(p, std=0.5 if name.endswith(("bias", "noise.weight")) else 1.0, generator=g)
        if ".modulation.bias" in name:
            p.data += 1
        if name.startswith("style."):
            p.data *= 100
    return network, {k: v.double() for k, v in network.state_dict().items()}


def narrow_pair(seed=0):
    return Generator(32, dim=24, n_mlp=3, base=512, cap=40), Discriminator(32, base=512, cap=40)


def test_a_generator_is_the_papers_for_w_and_w_plus_noise_and_mixing():
    G, s = alive(narrow_pair()[0])
    torch.manual_seed(1)
    z = torch.randn(6, 24)
    w = G.mapping(z)
    truth = reference_mapping(s, z.double())
    torch.testing.assert_close(w.double(), truth, atol=1e-5, rtol=1e-4)
    mixed = mix_styles(w[:3], w[3:], G.L, 5)
    truth = torch.cat([truth[:3, None].expand(-1, 5, -1), truth[3:, None].expand(-1, G.L - 5, -1)], 1)
    own = [s[f"noises.noise_{i}"] for i in range(G.L - 1)]
    given = [torch.randn(3, 1, *n.shape[2:]) for n in own]
    for noise, used in (("fixed", own), ("off", [0] * len(own)), (given, [n.double() for n in given])):
        for codes, want in ((mixed, truth), (torch.randn(3, G.L, 24), None)):
            want = codes.double() if want is None else want
            want = reference_generator(s, want, used)
            torch.testing.assert_close(G(codes, noise).double(), want, atol=2e-4 * float(want.std()), rtol=1e-3)


def test_weight_changes_of_whole_kernels_are_hyperstyles():
    """Relative, on each tap of each kernel of each clip (2 of 3 frames), before modulation and demodulation."""
    G, s = alive(narrow_pair()[0])
    torch.manual_seed(1)
    codes = torch.randn(6, G.L, 24)
    deltas = [0.3 * torch.randn(2, *layer.conv.weight.shape[1:]) for layer in G.styled_convs()]
    own = [s[f"noises.noise_{i}"] for i in range(G.L - 1)]
    want = reference_generator(s, codes.double(), own, [d.double().repeat_interleave(3, 0) for d in deltas])
    torch.testing.assert_close(G(codes, deltas=deltas).double(), want, atol=2e-4 * float(want.std()), rtol=1e-3)
    whole = [d.mean((3, 4), keepdim=True) for d in deltas]  # one number for a pair of channels applies to every tap
    spread = [d.expand(-1, -1, -1, 3, 3) for d in whole]
    torch.testing.assert_close(G(codes, deltas=whole), G(codes, deltas=spread))


@pytest.mark.parametrize("N", [4, 8, 6, 5, 2, 1])
def test_the_discriminator_equals_a_float64_reference_for_every_batch_size(N):
    D, s = alive(narrow_pair()[1])
    x = torch.randn(N, 3, 32, 32)
    want = reference_discriminator(s, x.double())
    torch.testing.assert_close(D(x).double(), want, atol=1e-3 * float(want.abs().mean()), rtol=1e-3)


def test_results_do_not_depend_on_memory_format_or_threads():
    G, D = (alive(net)[0] for net in narrow_pair())
    codes, threads = torch.randn(3, G.L, 24), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        x = G(codes)
        score = D(x)
        torch.testing.assert_close(D(x.contiguous(memory_format=torch.channels_last)), score, atol=1e-4, rtol=1e-4)
        torch.set_num_threads(3)
        torch.testing.assert_close(G(codes), x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(D(x), score, atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------
# rosinality's files

@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_names_and_shapes_are_those_of_the_published_file(name):
    with torch.device("meta"):
        network = dict(generator=Generator, discriminator=Discriminator)[name](256)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == listed(f"stylegan2_256_{name}.txt")


def test_a_file_gives_networks_of_its_weights_and_widths(tmp_path):
    (G, s), (D, _) = alive(narrow_pair()[0]), alive(narrow_pair()[1])
    ema, _ = alive(narrow_pair()[0], seed=2)
    torch.save(dict(g=G.state_dict(), d=D.state_dict(), g_ema=ema.state_dict()), tmp_path / "all.pt")
    content = torch.load(tmp_path / "all.pt", weights_only=True)
    assert {"g", "d", "g_ema"} <= content.keys() and content["g"].keys() == s.keys()
    found_G, found_D, arguments = load_rosinality(tmp_path / "all.pt", 32)
    w = torch.randn(2, 8, 24)
    assert torch.equal(found_G(w), ema(w)) and torch.equal(found_D(G(w)), D(G(w))) and arguments["n_mlp"] == 3
    training = dict(content, g_optim=dict(state={}), args=argparse.Namespace(size=32), ada_aug_p=0.1)
    torch.save(training, tmp_path / "training.pt")  # as written by its training script
    assert torch.equal(load_rosinality(tmp_path / "training.pt", 32)[0](w), ema(w))
    torch.save(dict(g=G.state_dict()), tmp_path / "g.pt")
    found_G, found_D, _ = load_rosinality(tmp_path / "g.pt", 32)
    assert torch.equal(found_G(w), G(w)) and found_D is None


def test_unsuitable_files_are_refused_in_one_line(tmp_path):
    """Other defects of files: see test_checkpoint.py"""
    (G, D), path = narrow_pair(), tmp_path / "bad.pt"
    torch.save(dict(g_ema=G.state_dict(), d=D.state_dict()), path)
    content = torch.load(path, weights_only=True)
    g = content["g_ema"]
    for wrong, size, match in (
            (content, 64, "for 32 px, expected 64"), (dict(state_dict=g), 32, "neither g_ema nor g"),
            (dict(g_ema=g, d=g), 32, "not the weights of Discriminator"),
            (dict(g_ema=content["d"]), 32, "not the weights of a StyleGAN2 generator"),
            (dict(g_ema=g | {"convs.2.conv.weight": torch.ones(1, 9, 40, 3, 3)}), 32, "not StyleGAN2's")):
        torch.save(wrong, path)
        with pytest.raises(InputError, match=f"bad.pt.*{match}"):
            load_rosinality(path, size)
