"""StyleGAN2's layers against naive float64 references, and the mathematics that the training relies on."""

import math

import pytest
import torch
import torch.nn.functional as F

from stylegan2 import (
    Blur,
    ConvLayer,
    Discriminator,
    EqualLinear,
    Generator,
    ModulatedConv2d,
    ResBlock,
    StyledConv,
    Upsample,
    add_map,
    minibatch_stddev,
    mix_styles,
    n_styles,
)


def naive_modulated(layer, x, style, delta=None):
    """The paper's equations 1 and 3, a loop over samples, weights modulated and demodulated one by one."""
    out = []
    for n in range(len(x)):
        s = F.linear(style[n], layer.modulation.weight * layer.modulation.scale, layer.modulation.bias)
        w = layer.weight[0] * layer.scale
        if delta is not None:
            w = w * (1 + delta[n * len(delta) // len(x)])[:, :, None, None]
        w = w * s[None, :, None, None]
        if layer.demodulate:
            w = w / torch.sqrt(w.square().sum((1, 2, 3), keepdim=True) + 1e-8)
        if layer.up:
            y = F.conv_transpose2d(x[n:n + 1], w.transpose(0, 1), stride=2)
            k = torch.tensor([1.0, 3, 3, 1], dtype=x.dtype)
            k = k[:, None] * k / 64 * 4
            out.append(F.conv2d(F.pad(y, (1, 1, 1, 1)), k.expand(len(w), 1, 4, 4), groups=len(w)))
        else:
            out.append(F.conv2d(x[n:n + 1], w, padding=layer.padding))
    return torch.cat(out)


@pytest.mark.parametrize("kernel, up, demodulate", [(3, False, True), (3, True, True), (1, False, False)])
def test_scaled_activations_give_the_papers_modulated_weights(kernel, up, demodulate):
    torch.manual_seed(0)
    layer = ModulatedConv2d(6, 5, kernel, 7, demodulate, up).double()
    x, style = torch.randn(3, 6, 8, 10).double(), torch.randn(3, 7).double()
    torch.testing.assert_close(layer(x, style), naive_modulated(layer, x, style))


def test_weight_changes_belong_to_the_clip_and_not_to_its_neighbour():
    torch.manual_seed(0)
    layer = ModulatedConv2d(6, 5, 3, 7).double()
    x, style = torch.randn(6, 6, 8, 10).double(), torch.randn(6, 7).double()
    delta = torch.randn(2, 5, 6).double()  # 2 clips of 3 pictures
    torch.testing.assert_close(layer(x, style, delta), naive_modulated(layer, x, style, delta))
    torch.testing.assert_close(layer(x, style, torch.zeros_like(delta)), layer(x, style))


def test_upsample_is_zeros_between_pixels_and_a_filter():
    x, up = torch.randn(2, 3, 5, 7), Upsample()
    zeros = torch.zeros(2, 3, 10, 14)
    zeros[:, :, ::2, ::2] = x
    want = F.conv2d(F.pad(zeros, (2, 1, 2, 1)), up.kernel.expand(3, 1, 4, 4), groups=3)
    torch.testing.assert_close(up(x), want)
    assert up(torch.ones(1, 3, 6, 8))[0, 0, 3:-3, 3:-3].sub(1).abs().max() < 1e-6  # keeps a grey picture grey


def test_blur_keeps_a_constant():
    assert Blur(2)(torch.ones(1, 2, 9, 11))[:, :, 4:-4, 4:-4].sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("pad", [1, 2])
def test_blur_has_the_right_first_and_second_derivative(pad):
    x = torch.randn(2, 3, 5, 6).double().requires_grad_()
    blur = Blur(pad, gain=4.0).double()
    assert torch.autograd.gradcheck(blur, x)
    assert torch.autograd.gradgradcheck(lambda x: blur(x).square(), x)
    want = F.conv2d(F.pad(x, (pad,) * 4), blur.kernel.expand(3, 1, 4, 4), groups=3)
    torch.testing.assert_close(blur(x), want)


@pytest.mark.parametrize("up", [False, True])
def test_styled_layer_is_convolution_then_noise_then_bias_then_activation(up):
    """The gain that lies in factor, noise and bias is the one that the paper's layer multiplies its result by."""
    torch.manual_seed(0)
    layer = StyledConv(6, 5, 7, up).double()
    torch.nn.init.normal_(layer.activate.bias)
    torch.nn.init.normal_(layer.noise.weight)
    x, style = torch.randn(3, 6, 8, 10).double(), torch.randn(3, 7).double()
    noise = torch.randn(1, 1, 16, 20).double() if up else torch.randn(3, 1, 8, 10).double()
    y = naive_modulated(layer.conv, x, style) + layer.noise.weight * noise + layer.activate.bias[:, None, None]
    torch.testing.assert_close(layer(x, style, noise), torch.where(y > 0, y, 0.2 * y) * math.sqrt(2))


def naive_conv(layer: ConvLayer, x):
    """[1,3,3,1] blur, strided convolution with He's constant, bias, leaky ReLU with gain: one after the other."""
    *blur, conv = [m for m in layer if hasattr(m, "kernel") or hasattr(m, "weight")]
    for b in blur:
        k = torch.tensor([1.0, 3, 3, 1], dtype=x.dtype) / 8
        x = F.conv2d(F.pad(x, (b.pad,) * 4), (k[:, None] * k).expand(x.shape[1], 1, 4, 4), groups=x.shape[1])
    y = F.conv2d(x, conv.weight / math.sqrt(conv.weight[0].numel()), stride=2 if blur else 1, padding=0 if blur else 1)
    if not layer.activate:
        return y
    return F.leaky_relu(y + layer[-1].bias[:, None, None], 0.2) * math.sqrt(2)


def test_residual_block_is_the_mean_of_two_paths_times_root_two():
    torch.manual_seed(0)
    block, x = ResBlock(4, 5).double(), torch.randn(3, 4, 8, 12).double()
    for layer in (block.conv1, block.conv2):
        torch.nn.init.normal_(layer[-1].bias)
    want = (naive_conv(block.conv2, naive_conv(block.conv1, x)) + naive_conv(block.skip, x)) / math.sqrt(2)
    assert want.shape == (3, 5, 4, 6)
    torch.testing.assert_close(block(x), want)


def test_equalised_layer_scales_by_he_and_learning_rate():
    layer = EqualLinear(9, 4, bias_init=1, lr_mul=0.01)
    assert layer.weight.std() > 50  # N(0, 1) / lr_mul
    x = torch.randn(5, 9)
    torch.testing.assert_close(layer(x), x @ (layer.weight * 0.01 / 3).t() + 0.01 * layer.bias)


def test_published_widths_and_parameter_count():
    G, D = Generator(256), Discriminator(256)
    assert n_styles(256) == 14 and G.L == 14
    assert [layer.conv.weight.shape[1] for layer in G.styled_convs()] == [512] * 9 + [256] * 2 + [128] * 2
    assert sum(p.numel() for p in G.parameters()) == 30_034_338
    assert sum(p.numel() for p in D.parameters()) == 28_864_129


def test_an_element_of_the_batch_does_not_depend_on_another():
    torch.manual_seed(0)
    G = Generator(32, dim=24, n_mlp=2, base=512, cap=32).eval()
    w = torch.randn(5, 8, 24)
    one_by_one = torch.cat([G(x[None]) for x in w])
    torch.testing.assert_close(G(w), one_by_one, atol=1e-5, rtol=1e-4)


def test_each_style_acts_from_its_own_layer_on():
    """Style 7 of 8 is the last toRGB's: changing it leaves all features, and changing style 0 changes everything."""
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


def test_noise_is_fixed_unless_random_is_asked_for():
    G = Generator(16, dim=24, n_mlp=2, base=256, cap=32)
    for layer in G.styled_convs():
        torch.nn.init.ones_(layer.noise.weight)
    w = torch.randn(2, 6, 24)
    assert torch.equal(G(w), G(w)) and not torch.equal(G(w, noise="random"), G(w, noise="random"))
    given = [torch.zeros(1, 1, r, r) for r in (4, 8, 8, 16, 16)]
    assert not torch.equal(G(w, noise=given), G(w))


def test_style_mixing_changes_hands_at_the_crossover():
    w = mix_styles(torch.zeros(2, 5), torch.ones(2, 5), L=6, crossover=4)
    assert w.shape == (2, 6, 5) and w[:, :4].sum() == 0 and w[:, 4:].min() == 1


def test_truncation_pulls_towards_the_mean():
    G = Generator(8, dim=24, n_mlp=2, base=128, cap=32)
    z, mean = torch.randn(3, 24), torch.randn(24)
    torch.testing.assert_close(G.mapping(z, 0.0, mean), mean.expand(3, -1))
    torch.testing.assert_close(G.mapping(z, 0.5, mean), (G.mapping(z) + mean) / 2)


def test_identity_maps_reach_the_first_channels_only():
    x, m = torch.zeros(2, 5, 4, 4), torch.ones(2, 3, 4, 4)
    assert add_map(x, [m], 0)[:, :3].min() == 1 and add_map(x, [m], 0)[:, 3:].max() == 0 and add_map(x, [m], 1) is x


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 6, 8, 12])
def test_minibatch_deviation_accepts_every_batch(N):
    x = torch.randn(N, 3, 4, 5)
    y = minibatch_stddev(x)
    assert y.shape == (N, 4, 4, 5) and torch.isfinite(y).all() and torch.equal(y[:, :3], x)
    group = 4 if N % 4 == 0 else 3 if N % 3 == 0 else 2 if N % 2 == 0 else N
    for n in range(N):  # groups are strided: n, n + N/g, ..
        members = x[n % (N // group)::N // group].double()
        want = torch.sqrt(members.var(0, unbiased=False) + 1e-8).mean()
        assert math.isclose(y[n, 3, 0, 0].item(), want.item(), rel_tol=1e-4, abs_tol=1e-6)


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
