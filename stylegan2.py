"""StyleGAN2: MappingNetwork, Generator and Discriminator in plain PyTorch.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020 (arXiv 1912.04958), sections 2-4.
Layer names and parameter shapes equal those of the public rosinality checkpoints, so that a published `g_ema` loads.

Differences from the public code: no CUDA extension. One convolution with shared weights serves the whole batch,
see ModulatedConv2d. Tensors are channels_last, which makes the depthwise blur ten times faster on a CPU. Demodulation,
gain, noise and bias follow the blur, in few passes. Generator.forward also takes `deltas` (HyperStyle's), `maps`,
`coarse` and `flow` (ours, see fusion.py). The minibatch standard deviation accepts every batch size.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import load_strictly, read_weights, wrap_errors
from media import InputError


def n_styles(size: int) -> int:
    """L, the number of style vectors of a generator: 8 at 32 px, 10 at 64, 14 at 256."""
    return 2 * int(math.log2(size)) - 2


def channels_at(res: int, base: int, cap: int) -> int:
    """Feature channels at a resolution. Published networks: base 32768, cap 512 (512 up to 64 px, 128 at 256 px)."""
    return min(cap, base // res)


# ---------- layers with an equalised learning rate: weights are initially N(0, 1) and scaled by He's constant at run time

class EqualLinear(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, bias_init: float = 0.0, lr_mul: float = 1.0, activate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim_out, dim_in) / lr_mul)
        self.bias = nn.Parameter(torch.full((dim_out,), float(bias_init)))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(dim_in), lr_mul, activate

    def forward(self, x):  # (.., dim_in) -> (.., dim_out)
        y = F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.activate else y


class EqualConv2d(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel).to(memory_format=torch.channels_last))
        self.scale, self.stride, self.padding = 1 / math.sqrt(c_in * kernel ** 2), stride, padding

    def forward(self, x, bias=None, gain: float = 1.0):  # (N, I, H, W) -> gain * (conv(x) + bias), (N, O, H', W')
        bias = None if bias is None else bias * gain
        return F.conv2d(x, self.weight * (self.scale * gain), bias, self.stride, self.padding)


class BiasLeakyReLU(nn.Module):
    """leaky_relu(x + bias, 0.2) * sqrt 2, which keeps unit variance. The previous layer applies bias and gain: it scales
    its weights and `bias` by the gain. For a leaky ReLU this equals scaling the result."""

    gain = math.sqrt(2)

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):  # (N, C, H, W), bias and gain already applied; overwritten
        return F.leaky_relu(x, 0.2, inplace=True)


class DepthwiseFilter(torch.autograd.Function):
    """The filter of Blur for all channels, stride 1. Its gradient is the same filter with padding 3 - pad, and so is its
    second derivative, for R1 and path length. PyTorch's own derivatives run one convolution per channel."""

    @staticmethod
    def forward(ctx, x, kernel, pad: int, gain: float):
        ctx.kernel, ctx.pad, ctx.gain = kernel, pad, gain
        if x.is_cuda:
            return blur_by_means(x, pad, gain)
        return F.conv2d(x, kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4), padding=pad, groups=x.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        return DepthwiseFilter.apply(gradient, ctx.kernel, 3 - ctx.pad, ctx.gain), None, None, None


def blur_by_means(x, pad: int, gain: float):
    """The same as three means of 2 x 2 pixels, for GPUs: cuDNN's depthwise convolutions are slow in channels_last."""
    for i in range(3):
        x = F.avg_pool2d(x, 2, stride=1, padding=int(i < pad), divisor_override=4 if i else round(4 / gain))
    return x


class Blur(nn.Module):
    """Depthwise [1, 3, 3, 1] low-pass filter, padded on all sides. gain: 1, or 4 after an upsampling by zeros."""

    def __init__(self, pad: int, gain: float = 1.0):
        super().__init__()
        k = torch.tensor([1.0, 3.0, 3.0, 1.0])  # StyleGAN2 default
        self.register_buffer("kernel", k[:, None] * k[None, :] / 64 * gain)
        self.pad, self.gain = pad, gain

    def forward(self, x):  # (N, C, H, W) -> (N, C, H + 2 pad - 3, W + 2 pad - 3)
        return DepthwiseFilter.apply(x, self.kernel, self.pad, self.gain)


class Upsample(nn.Module):
    """Twice the size: zeros between the pixels, then the low-pass filter with padding (2, 1). On each axis a new pixel is
    3/4 and 1/4 of two old pixels: bilinear interpolation with zeros outside of the image."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", Blur(0, gain=4.0).kernel)  # a key of published files; equals the interpolation

    def forward(self, x):  # (N, 3, H, W) -> (N, 3, 2H, 2W)
        x = F.pad(x, (1, 1, 1, 1))
        return F.interpolate(x, scale_factor=2, mode="bilinear")[:, :, 2:-2, 2:-2]


# ----------------------------------------------------------------------------------------------------------- generator

class ModulatedConv2d(nn.Module):
    """3x3 convolution. A style scales the input channels (modulation), and the output is scaled to unit variance
    (demodulation). Paper, section 2.2: w'_oik = s_i w_oik, w''_oik = w'_oik / sqrt(sum_ik w'_oik^2 + eps). s does not
    depend on k, so that conv(x, w'') = conv(s x, w) / sqrt(..): the whole batch shares the weights w."""

    def __init__(self, c_in: int, c_out: int, dim: int, up: bool = False):
        super().__init__()
        # memory order that the convolution reads: (O, 3, 3, I), for a transposed convolution (I, 3, 3, O)
        order = (3, 0, 1, 2) if up else (0, 3, 1, 2)
        weight = torch.randn(c_in, 3, 3, c_out) if up else torch.randn(c_out, 3, 3, c_in)
        self.weight = nn.Parameter(weight.permute(order)[None])                 # (1, O, I, 3, 3)
        self.modulation = EqualLinear(dim, c_in, bias_init=1)
        self.scale, self.up = 1 / math.sqrt(9 * c_in), up
        if up:
            self.blur = Blur(1, gain=4.0)

    def convolve(self, x, weight):
        """x (N, B I, H, W), weight (B, O, I, 3, 3) of B groups of channels -> (N, B O, H', W')"""
        if self.up:
            x = F.conv_transpose2d(x, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=len(weight))
            return self.blur(x)                                                 # 2H + 1 -> 2H
        return F.conv2d(x, weight.flatten(0, 1), padding=1, groups=len(weight))

    def convolve_clips(self, x, weight, grouped: bool):
        """x (B T, I, H, W), weight (B, O, I, 3, 3), one per clip -> (B T, O, H', W'). grouped: faster on a GPU."""
        if not grouped:
            return torch.cat([self.convolve(x_b, w_b[None]) for x_b, w_b in zip(x.chunk(len(weight)), weight)])
        x = x.unflatten(0, (len(weight), -1)).transpose(0, 1).flatten(1, 2)     # (T, B I, H, W)
        return self.convolve(x, weight).unflatten(1, (len(weight), -1)).transpose(0, 1).flatten(0, 1)

    def forward(self, x, style, delta=None):
        """x (N, I, H, W), style (N, D) -> result before demodulation (N, O, H', W'), demodulation factors (N, O) in fp32.
        delta: None, or HyperStyle's relative change of the weights, (B, O, I, 3, 3) or (B, O, I, 1, 1), for B clips of
        N / B frames each; the weights become W (1 + delta)."""
        with torch.autocast(x.device.type, enabled=False):
            s = self.modulation(style.to(self.weight.dtype))                    # (N, I)
            weight = self.weight[0]                                             # (O, I, 3, 3)
            if delta is None:
                w = weight.transpose(0, 1) if self.up else weight               # in memory order
                power = w.square().sum((2, 3))                                  # (I, O) or (O, I)
                variance = s.square() @ (power if self.up else power.t())       # (N, O)
            else:
                weight = weight * (1 + delta.to(weight.dtype))                  # (B, O, I, 3, 3); in bf16 1 + 0.003 is 1
                per_clip = s.square().unflatten(0, (len(delta), -1))            # (B, T, I)
                variance = (per_clip @ weight.square().sum((3, 4)).transpose(1, 2)).flatten(0, 1)
            demodulation = torch.rsqrt(self.scale ** 2 * variance + 1e-8)
        x, weight = x * (s * self.scale).to(x.dtype)[:, :, None, None], weight.to(x.dtype)
        if delta is None:
            return self.convolve(x, weight[None]), demodulation
        return self.convolve_clips(x, weight, grouped=x.is_cuda), demodulation


class ModulatedPixels(nn.Module):
    """1x1 convolution to three channels, modulated, not demodulated. Scales its few weights in place of the pixels."""

    def __init__(self, c_in: int, c_out: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, c_out, c_in, 1, 1))
        self.modulation = EqualLinear(dim, c_in, bias_init=1)
        self.scale = 1 / math.sqrt(c_in)

    def forward(self, x, style):  # (N, I, H, W), (N, D) -> (N, O, H, W)
        with torch.autocast(x.device.type, enabled=False):
            s = self.modulation(style.to(self.weight.dtype)) * self.scale       # (N, I)
            weight = (s[:, :, None] * self.weight[0, :, :, 0, 0].t()).to(x.dtype)  # (N, I, O)
        y = x.permute(0, 2, 3, 1).flatten(1, 2) @ weight                        # (N, H * W, O)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class NoiseInjection(nn.Module):
    """x (N, H, W, C) -> noise to add, (1 or N, H, W, 1), or None. noise: a map (1 or N, 1, H, W), "random", or "off"."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # one strength per layer

    def forward(self, x, noise="random"):
        if isinstance(noise, str) and noise == "off":
            return None
        if isinstance(noise, str):
            noise = torch.randn(x.shape[0], 1, *x.shape[1:3], device=x.device, dtype=x.dtype)
        return self.weight * noise.movedim(1, 3)                                # (1 or N, H, W, 1)


class StyledConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, dim: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(c_in, c_out, dim, up)
        self.noise = NoiseInjection()
        self.activate = BiasLeakyReLU(c_out)

    def forward(self, x, style, noise="random", delta=None):
        y, demodulation = self.conv(x, style, delta)
        y, gain = y.permute(0, 2, 3, 1), self.activate.gain                     # (N, H, W, C), the memory order
        factor = demodulation[:, None, None] * gain                             # (N, 1, 1, C)
        offset, noise = self.activate.bias * gain, self.noise(y, noise)         # (C,), (1 or N, H, W, 1)
        if noise is not None and len(noise) == 1:
            offset = noise * gain + offset                                      # (1, H, W, C)
        y = torch.addcmul(offset.to(y.dtype), y, factor.to(y.dtype))            # one pass over memory
        if noise is not None and len(noise) > 1:
            y += (noise * gain).to(y.dtype)                                     # no temporary of y's size
        return self.activate(y).permute(0, 3, 1, 2)


class ToRGB(nn.Module):
    def __init__(self, c_in: int, dim: int, up: bool = True):
        super().__init__()
        self.conv = ModulatedPixels(c_in, 3, dim)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if up:
            self.upsample = Upsample()

    def forward(self, x, style, skip=None):
        rgb = self.conv(x, style).float() + self.bias  # the image is summed in fp32
        return rgb if skip is None else rgb + self.upsample(skip)


class MappingNetwork(nn.Sequential):
    """z (N, D) -> w (N, D): PixelNorm and n_mlp layers with a hundredth of the learning rate (StyleGAN2 default)."""

    def __init__(self, dim: int, n_mlp: int = 8):
        layers = (EqualLinear(dim, dim, lr_mul=0.01, activate=True) for _ in range(n_mlp))
        super().__init__(nn.Identity(), *layers)                                # PixelNorm is layer 0 in the files

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):                      # w in fp32, as in StyleGAN2-ADA
            return super().forward(z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))


class StyledLayers(nn.Module):
    """The layers of a StyleGAN2 generator after its first map. PC-AVS's generator uses them as well."""

    def add_layers(self, ch: list, dim: int):
        """ch: channels at the first size and at each doubled size. dim: width of a style."""
        self.conv1, self.to_rgb1 = StyledConv(ch[0], ch[0], dim), ToRGB(ch[0], dim, up=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out in zip(ch, ch[1:]):
            self.convs += [StyledConv(c_in, c_out, dim, up=True), StyledConv(c_out, c_out, dim)]
            self.to_rgbs.append(ToRGB(c_out, dim))

    def styled_convs(self):
        """The 3x3 layers from coarse to fine, in the order of noise maps and of `deltas`."""
        return [self.conv1, *self.convs]

    def synthesise(self, x, w, noise, maps=(), deltas=None, coarse=None, flow=None):
        """x (N, C, H, W) -> image. w: styles (N, D) of the 3x3 layers and, last, of the last toRGB. Each other toRGB has
        the style of the next 3x3 layer. Other arguments: see Generator.forward."""
        n_convs = len(self.convs) + 1
        noise = [noise] * n_convs if isinstance(noise, str) else noise
        deltas = deltas or [None] * n_convs
        x = self.conv1(add_map(x, maps, 0), w[0], noise[0], deltas[0])                # (N, C, H, W)
        rgb = self.to_rgb1(x, w[1])
        for i, to_rgb in enumerate(self.to_rgbs):
            a, b = 2 * i + 1, 2 * i + 2                                               # the two layers of this size
            x = self.convs[2 * i](x, w[a], noise[a], deltas[a])                       # (N, C, 2H, 2W)
            x = self.convs[2 * i + 1](add_map(x, maps, i + 1), w[b], noise[b], deltas[b])
            rgb = to_rgb(x, w[b + 1], rgb)
            if coarse is not None and rgb.shape == coarse.shape:
                rgb = rgb + coarse
            if flow is not None and rgb.shape[2] == flow.shape[1]:
                x, rgb = move_pixels(x, flow), move_pixels(rgb, flow)
        return rgb


class Generator(StyledLayers):
    """W+ code -> image of size x size pixels, a power of two from 8. dim: D, width of a style vector; n_mlp: layers of
    the mapping network; base, cap: channels, see `channels_at`."""

    def __init__(self, size: int, dim: int = 512, n_mlp: int = 8, base: int = 32768, cap: int = 512):
        super().__init__()
        self.size, self.dim, self.L = size, dim, n_styles(size)
        self.resolutions = [2 ** i for i in range(2, int(math.log2(size)) + 1)]  # 4, 8, .., size
        ch = [channels_at(res, base, cap) for res in self.resolutions]
        self.style = MappingNetwork(dim, n_mlp)
        self.input = nn.ParameterDict(dict(input=torch.randn(1, ch[0], 4, 4)))
        self.add_layers(ch, dim)
        self.noises = nn.Module()
        for i in range(self.L - 1):  # one noise map per 3x3 layer: one of 4x4, then two of each size
            res = self.resolutions[(i + 1) // 2]
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, res, res))

    def mapping(self, z):  # (N, D) -> w (N, D)
        return self.style(z)

    def forward(self, w_plus, noise="fixed", maps=(), deltas=None, coarse=None, flow=None):
        """w_plus (N, L, D) -> image (N, 3, size, size), about [-1, 1], unclamped.

        noise: "fixed" (the generator's own maps: a clip does not flicker), "random" (training of stage 1), "off", or a
            list of L - 1 maps (1 or N, 1, H, W).
        maps: list of (N, C', H, W), added to the first C' channels at 4x4, 8x8, ..; ours, see fusion.IdentityMaps.
        deltas: a relative weight change of each layer of styled_convs(), see ModulatedConv2d, or None.
        coarse: (N, 3, H, H), added to the RGB image of H px, or None; ours, see fusion.IdentityMaps.
        flow: (N, H, H, 2), see move_pixels, moves features and RGB of H px, or None; after StyleHEAT (2022)."""
        assert w_plus.shape[1:] == (self.L, self.dim), f"W+ is {tuple(w_plus.shape)}, expected (N, {self.L}, {self.dim})"
        if noise == "fixed":
            noise = [*self.noises.buffers()]
        x = self.input.input.to(memory_format=torch.channels_last).expand(len(w_plus), -1, -1, -1)  # (N, C, 4, 4)
        return self.synthesise(x, w_plus.unbind(1), noise, maps, deltas, coarse, flow)


def move_pixels(x, flow):
    """x (N, C, H, H), flow (N, H, H, 2) -> (N, C, H, H): each pixel is read that far right and down, in half edges"""
    still = F.affine_grid(torch.eye(2, 3, device=x.device).expand(len(x), 2, 3), x.shape, align_corners=False)
    grid = (still + flow.float()).nan_to_num()                                # on a CPU a NaN would end the process
    return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False).to(x.dtype)


def add_map(x, maps, i):
    """Add the i-th map (N, C', H, W), if it exists, to the first C' channels of x (N, C, H, W)."""
    if i >= len(maps):
        return x
    return x + F.pad(maps[i], (0, 0, 0, 0, 0, x.shape[1] - maps[i].shape[1])).to(x.dtype)


def mix_styles(w1, w2, L: int, crossover: int):
    """Style mixing: w1 (N, D) for the layers before `crossover`, w2 (N, D) for the other layers -> (N, L, D)"""
    first = torch.arange(L, device=w1.device)[None, :, None] < crossover
    return torch.where(first, w1[:, None], w2[:, None])


# ------------------------------------------------------------------------------------------------------- discriminator

class ConvLayer(nn.Sequential):
    """EqualConv2d. down: a blur before it, and stride 2. activate: bias and leaky ReLU after it."""

    def __init__(self, c_in: int, c_out: int, kernel: int, down: bool = False, activate: bool = True):
        conv = EqualConv2d(c_in, c_out, kernel, 2, 0) if down else EqualConv2d(c_in, c_out, kernel, 1, kernel // 2)
        blur = [Blur(2 if kernel == 3 else 1)] if down else []
        super().__init__(*blur, conv, *([BiasLeakyReLU(c_out)] if activate else []))
        self.down, self.activate = down, activate

    def forward(self, x, gain: float = 1.0):  # -> gain * result of the layer
        if self.down:
            x = self[0](x)
        if not self.activate:
            return self[-1](x, gain=gain)
        conv, activate = self[-2], self[-1]
        return activate(conv(x, activate.bias, gain * activate.gain))


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = ConvLayer(c_in, c_in, 3)
        self.conv2 = ConvLayer(c_in, c_out, 3, down=True)
        self.skip = ConvLayer(c_in, c_out, 1, down=True, activate=False)

    def forward(self, x):  # (N, C, H, W) -> (N, C', H/2, W/2)
        half = 1 / math.sqrt(2)
        return self.conv2(self.conv1(x), half) + self.skip(x, half)


def minibatch_stddev(x):
    """Append a map of the mean standard deviation over a group of 4 images: (N, C, H, W) -> (N, C + 1, H, W). Groups are
    strided, as published. If 4 does not divide N: groups of 3, else of 2, else the whole batch (ours)."""
    N, _, H, W = x.shape
    group = next(g for g in (4, 3, 2, N) if N % g == 0)
    y = x.float().unflatten(0, (group, N // group))                                   # (g, N/g, C, H, W)
    y = torch.sqrt(y.var(0, unbiased=False) + 1e-8).mean((1, 2, 3))                   # (N/g,)
    y = y.repeat(group)[:, None, None, None].expand(N, 1, H, W)
    return torch.cat([x, y.to(x.dtype)], 1)


class Discriminator(nn.Module):
    """Image -> score of realness. size, base, cap: as in Generator."""

    def __init__(self, size: int, base: int = 32768, cap: int = 512):
        super().__init__()
        resolutions = [2 ** i for i in range(int(math.log2(size)), 1, -1)]            # size, .., 8, 4
        ch = [channels_at(res, base, cap) for res in resolutions]
        self.size = size
        self.convs = nn.Sequential(ConvLayer(3, ch[0], 1), *(ResBlock(a, b) for a, b in zip(ch, ch[1:])))
        self.final_conv = ConvLayer(ch[-1] + 1, ch[-1], 3)
        self.final_linear = nn.Sequential(EqualLinear(ch[-1] * 16, ch[-1], activate=True), EqualLinear(ch[-1], 1))

    def features(self, x) -> list:
        """x (N, 3, size, size) -> list of the maps after each block, at size/2, .., 4 px"""
        assert x.shape[1:] == (3, self.size, self.size), (
            f"image is {tuple(x.shape[1:])}, expected (3, {self.size}, {self.size})")
        x, maps = self.convs[0](x.contiguous(memory_format=torch.channels_last)), []
        for block in self.convs[1:]:
            x = block(x)
            maps.append(x)
        return maps

    def forward(self, x):  # (N, 3, H, W) -> (N, 1)
        return self.score(self.features(x)[-1])

    def score(self, x):  # last map of `features` -> (N, 1)
        with torch.autocast(x.device.type, enabled=False):                            # in fp32, as in StyleGAN2-ADA
            return self.final_linear(self.final_conv(minibatch_stddev(x.float())).flatten(1))


def infer_arguments(state: dict, source) -> dict:
    """Arguments of the Generator that fits a state dict of rosinality. InputError: none fits."""
    with wrap_errors(source, "not the weights of a StyleGAN2 generator"):
        pairs = sum(key.startswith("convs.") and key.endswith(".conv.weight") for key in state) // 2
        layers = ["conv1", *(f"convs.{2 * i}" for i in range(pairs))]
        channels = [state[f"{layer}.conv.weight"].shape[1] for layer in layers]       # at 4, 8, .. px
        n_mlp = sum(f"style.{i}.weight" in state for i in range(1, 100))
        dim = state["style.1.weight"].shape[1]
    size, cap = 2 ** (len(channels) + 1), max(channels)
    base = channels[-1] * size
    if channels != [channels_at(2 ** (i + 2), base, cap) for i in range(len(channels))]:
        raise InputError(f"{source}: its channels {channels} at 4, 8, .. {size} px are not StyleGAN2's")
    return dict(size=size, dim=dim, n_mlp=n_mlp, base=base, cap=cap)


def load_rosinality(path: str | Path, size: int) -> tuple[Generator, Discriminator | None, dict]:
    """Generator (g_ema, else g) and Discriminator (d, or None) in a checkpoint of rosinality's stylegan2-pytorch, and the
    generator's arguments. InputError: see read_weights; not StyleGAN2; for another size than `size` px."""
    content = read_weights(path)
    name = "g_ema" if isinstance(content.get("g_ema"), dict) else "g"
    if not isinstance(content.get(name), dict):
        raise InputError(f"{path}: not a StyleGAN2 checkpoint: neither g_ema nor g in it")
    source, D = f"{path}, '{name}'", None
    arguments = infer_arguments(content[name], source)
    if arguments["size"] != size:
        raise InputError(f"{source}: a network for {arguments['size']} px, expected {size} px")
    G = load_strictly(lambda: Generator(**arguments), content[name], source)
    if isinstance(content.get("d"), dict):
        D = load_strictly(lambda: Discriminator(size, arguments["base"], arguments["cap"]), content["d"], f"{path}, 'd'")
    return G, D, arguments
