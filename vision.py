"""Networks that read images: encoders give a W+ code, a hypernetwork changes the weights of a generator.

The layers of pSp (Richardson et al., CVPR 2021) and HyperStyle (Alaluf et al., CVPR 2022) have the names in the authors'
files, which `load_encoder` and `load_hypernet` read strictly. VisualEncoder (for toy sizes) and MouthEncoder are ours.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import load_strictly, read_weights, wrap_errors
from faces import TEMPLATES, box_slices, resize_square
from media import InputError
from stylegan2 import EqualLinear


def zero_init(layer):
    """layer -> the layer, its weights and bias set to zero"""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# ------------------------------------------------------------------------------------------- the networks at toy sizes

class ResDown(nn.Module):
    """Halve the size: two 3x3 convolutions and a pooled 1x1 shortcut. No normalisation: a batch may hold one image."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_in, 3, padding=1), nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (N, C, H, W) -> (N, C', H/2, W/2)
        y = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        return (y + self.skip(F.avg_pool2d(x, 2))) / math.sqrt(2)


class VisualEncoder(nn.Module):
    """Image -> W+ code, after pSp: styles 0-2 from the coarse map of a feature pyramid, 3-6 from the middle map, later
    ones from the fine map. Differences: a slim residual trunk, one head per level, and (ours) a parallel linear path,
    image at 32x32 -> `linear` numbers -> W+. It starts from principal components and soon fits unseen faces. Images above
    64 px are shrunk to 64, ours: the heads read maps of 4, 8 and 16 px at any size."""

    def __init__(self, size: int, dim: int, L: int, width: int = 48, linear: int = 192):
        super().__init__()
        self.size, self.dim, self.L = size, dim, L
        depth = int(math.log2(min(size, 64))) - 2                            # halvings down to 4x4
        ch = [min(width * 2 ** i, width * 4) for i in range(depth + 1)]
        self.stem = nn.Conv2d(3, ch[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResDown(a, b) for a, b in zip(ch, ch[1:]))
        styles = [3, 4, L - 7] if L > 7 else [3, L - 3]                      # per level; 16 px has no fine styles
        finer = (ch[-2], ch[-3]) if L > 7 else (ch[-2],)
        self.lateral = nn.ModuleList(nn.Conv2d(c, ch[-1], 1) for c in finer)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(ch[-1], 32, 3, padding=1), nn.LeakyReLU(0.2),
                          nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, n * dim)) for n in styles)
        self.linear_down = nn.Linear(3 * min(32, size) ** 2, linear, bias=False)
        self.linear_up = nn.Linear(linear, L * dim, bias=False)
        self.register_buffer("latent_avg", torch.zeros(L, dim))

    def forward(self, x):
        """x (N, 3, size, size) in [-1, 1] -> (N, L, D)"""
        assert x.shape[1:] == (3, self.size, self.size), (
            f"image is {tuple(x.shape[1:])}, expected (3, {self.size}, {self.size})")
        small = F.avg_pool2d(x, max(1, self.size // 64)).contiguous(memory_format=torch.channels_last)
        maps = [self.stem(small)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        pyramid = [maps.pop()]                                               # coarse (N, C, 4, 4), middle, fine
        for lateral in self.lateral:
            pyramid.append(lateral(maps.pop()) + F.interpolate(pyramid[-1], scale_factor=2, mode="nearest"))
        z = torch.cat([head(level).unflatten(1, (-1, self.dim)) for head, level in zip(self.heads, pyramid)], 1)
        z = z + self.linear_up(self.linear_down(to_small_image(x))).unflatten(1, (self.L, self.dim))
        return self.latent_avg + z                                           # (N, L, D)

    @torch.no_grad()
    def fit_linear(self, images):
        """Set linear_down to the principal components of images (n, 3, H, W), n > `linear`, with outputs of unit
        variance, and linear_up to zero."""
        x = to_float64(to_small_image(images))
        x -= x.mean(0)
        variances, directions = torch.linalg.eigh(x.t() @ x / len(x))        # an SVD of x takes twice as long
        k = len(self.linear_down.weight)
        variances, directions = variances.flip(-1)[:k], directions.flip(-1)[:, :k]  # largest first
        self.linear_down.weight.copy_((directions / variances.clamp_min(1e-6 * variances[0]).sqrt()).t())
        self.linear_up.weight.zero_()


def to_float64(x):
    """x -> x in float64, on the CPU if its device lacks float64 (Apple's GPUs)"""
    try:
        return x.double()
    except TypeError:
        return x.cpu().double()


def to_small_image(x):
    """(N, 3, H, H) -> (N, 3 * 32 * 32), the input of the linear path; images below 32 px keep their size"""
    return F.avg_pool2d(x, max(1, x.shape[-1] // 32)).flatten(1)


class MouthEncoder(nn.Module):
    """Image -> mouth code of M numbers: the lips, which `mask_mouth` removes from VisualEncoder's input. Ours. The first
    K numbers are the shape of the lips on any face. The last M - K, linear in the pixels, are colour, teeth, beard."""

    def __init__(self, template: str, M: int, K: int, width: int = 32):
        super().__init__()
        self.template = template
        self.linear = nn.Linear(3 * 32 * 32, M - K)  # set by initialise.fit_coarse_rgb
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for a, b in ((1, 2), (2, 4), (4, 4)):
            layers += [nn.Conv2d(a * width, b * width, 3, 2, 1), nn.LeakyReLU(0.2)]
        self.reader = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, K))

    def mouth_crop(self, x, margin: float = 0.0):
        """(N, 3, H, W) -> the lips (N, 3, 32, 32). margin: share of the box added on each side, at the same scale"""
        x0, y0, x1, y1 = TEMPLATES[self.template].lips
        dx, dy, edge = margin * (x1 - x0), margin * (y1 - y0), round(32 * (1 + 2 * margin))
        rows, cols = box_slices((x0 - dx, y0 - dy, x1 + dx, y1 + dy), *x.shape[-2:])
        return F.interpolate(x[..., rows, cols], (edge, edge), mode="bilinear", antialias=True, align_corners=False)

    def read(self, box):  # (N, 3, 32, 32) -> shape of the lips (N, K), independent of colour and brightness
        box = box.mean(1, keepdim=True)
        box = box - box.mean((2, 3), keepdim=True)
        box = box / box.std((2, 3), keepdim=True).clamp_min(1e-2)
        return self.reader(box.contiguous(memory_format=torch.channels_last))

    def read_softly(self, x):
        """(N, 3, H, W) -> (N, K), read from shifted and blurred boxes: fine patterns do not lower a loss"""
        box = self.mouth_crop(x.float(), margin=0.125)
        down, right = (int(v) for v in torch.randint(box.shape[-1] - 31, (2,)))
        box = F.avg_pool2d(box[..., down:down + 32, right:right + 32], 2)
        return self.read(F.interpolate(box, scale_factor=2, mode="bilinear")).float()

    def forward(self, x):  # (N, 3, H, W) -> (N, M)
        box = self.mouth_crop(x)
        return torch.cat([self.read(box), self.linear(box.flatten(1))], 1)


# --------------------------- published networks with the keys and shapes of their authors; `width` narrows them for tests

class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in (0, 1), computed from the means of all channels; Hu et al. 2018"""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
    """-> convolution without bias, BatchNorm. At stride 1 it preserves the size."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out)


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Of a residual block: 1x1 convolution and BatchNorm if channels or size change, else the identity"""
    same = stride == 1 and c_in == c_out
    return nn.Identity() if same else nn.Sequential(*conv_norm(c_in, c_out, 1, stride))


class BlockIRSE(nn.Module):
    """ArcFace's improved residual block with squeeze and excitation. (N, C, H, W) -> (N, C', H/stride, W/stride)"""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        changed = c_in != c_out
        self.shortcut_layer = nn.Sequential(*conv_norm(c_in, c_out, 1, stride)) if changed else nn.MaxPool2d(1, stride)
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), nn.PReLU(c_out),
            *conv_norm(c_out, c_out, 3, stride), SqueezeExcite(c_out))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


def trunk_ir_se50(width: int = 64) -> tuple[nn.Sequential, nn.Sequential]:
    """(input_layer, body) of IR-SE50, ArcFace's and pSp's trunk: (N, 3, H, W) -> (N, 64, H, W) -> (N, 512, H/16, W/16)"""
    blocks, c_in = [], width
    for factor, count in ((1, 3), (2, 4), (4, 14), (8, 3)):
        for k in range(count):
            blocks.append(BlockIRSE(c_in, factor * width, 1 if k else 2))
            c_in = factor * width
    return nn.Sequential(*conv_norm(3, width, 3), nn.PReLU(width)), nn.Sequential(*blocks)


def tapped_maps(layers, x, taps: tuple) -> list:
    """Run x through all layers -> the outputs of those numbered in `taps`"""
    maps = []
    for i, layer in enumerate(layers):
        x = layer(x)
        if i in taps:
            maps.append(x)
    return maps


def resize_to_256(x):
    """(N, 3, H, H) -> (N, 3, 256, 256). Larger images are pooled, as by pSp's authors, smaller images enlarged (ours)."""
    return F.adaptive_avg_pool2d(x, 256) if x.shape[2] > 256 else resize_square(x, 256)


def head_convolutions(c_in: int, inner: int, c_out: int, strides: tuple) -> nn.Sequential:
    """3x3 convolutions with these strides and `inner` channels between them, each followed by a leaky ReLU of 0.01"""
    ch, layers = [c_in, *[inner] * (len(strides) - 1), c_out], []
    for a, b, stride in zip(ch, ch[1:], strides):
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.LeakyReLU()]
    return nn.Sequential(*layers)


class StyleHead(nn.Module):
    """pSp's map2style: (N, C, s, s) -> (N, D), by convolutions down to 1x1 and an equalised linear layer"""

    def __init__(self, channels: int, inner: int, dim: int, strides: tuple):
        super().__init__()
        self.convs = head_convolutions(channels, inner, dim, strides)
        self.linear = EqualLinear(dim, dim)

    def forward(self, x):
        return self.linear(self.convs(x).flatten(1))


class GradualStyleEncoder(nn.Module):
    """pSp's encoder: image -> W+ code. A feature pyramid of IR-SE50's maps at 64x64, 32x32 and 16x16, and a head for each
    style. Heads give the difference from latent_avg, the mean w. Files hold it outside of the state dict."""

    TAPS = (6, 20, 23)  # blocks of the trunk

    def __init__(self, L: int, dim: int = 512, width: int = 64):
        super().__init__()
        self.input_layer, self.body = trunk_ir_se50(width)
        halvings = (4 if i < 3 else 5 if i < 7 else 6 for i in range(L))       # of maps at 16x16, 32x32, 64x64
        self.styles = nn.ModuleList(StyleHead(8 * width, dim, dim, (2,) * n) for n in halvings)
        self.latlayer1, self.latlayer2 = (nn.Conv2d(c * width, 8 * width, 1) for c in (4, 2))
        self.register_buffer("latent_avg", torch.zeros(L, dim))

    def forward(self, x):  # (N, 3, H, H) in [-1, 1], brought to 256 px -> (N, L, D)
        x = self.input_layer(resize_to_256(x).contiguous(memory_format=torch.channels_last))
        fine, middle, coarse = tapped_maps(self.body, x, self.TAPS)            # at 64x64, 32x32, 16x16
        middle = self.latlayer1(middle) + F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=True)
        fine = self.latlayer2(fine) + F.interpolate(middle, scale_factor=2, mode="bilinear", align_corners=True)
        levels = [coarse] * 3 + [middle] * 4 + [fine] * len(self.styles)
        return self.latent_avg + torch.stack([head(level) for head, level in zip(self.styles, levels)], 1)


class BasicBlock(nn.Module):
    """ResNet-34's block (He et al. 2016), torchvision's names: (N, C, H, W) -> (N, C', H/stride, W/stride)"""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(c_in, c_out, 3, stride)
        self.conv2, self.bn2 = conv_norm(c_out, c_out, 3)
        self.downsample = shortcut(c_in, c_out, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class SharedHead(nn.Module):
    """HyperStyle's common head of the widest layers: code (B, Z) -> changes (B, O, I, 3, 3), O = I = Z, by two linear
    maps (Ha et al. 2017). (B, I, O 3 3) is viewed as (B, O, I, 3, 3) without a transpose, as in the authors' code."""

    def __init__(self, dim: int):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.zeros(dim, dim * 9)), nn.Parameter(torch.zeros(dim * 9))
        self.w2, self.b2 = nn.Parameter(torch.randn(dim, dim * dim) / 40), nn.Parameter(torch.randn(dim * dim) / 40)

    def forward(self, code):
        B, dim = code.shape
        h = torch.addmm(self.b2, code, self.w2).unflatten(1, (dim, dim))       # (B, I, Z)
        return (h @ self.w1 + self.b1).view(B, dim, dim, 3, 3)


class SharedBlock(StyleHead):
    """Feature map (B, C, 16, 16) -> code of one layer -> changes of its weights, by the common SharedHead"""

    def __init__(self, channels: int, head: SharedHead):
        super().__init__(channels, channels // 4, channels, (1, 2, 2, 2, 2))
        self.hypernet = head

    def forward(self, x):
        return self.hypernet(super().forward(x))


class LayerBlock(nn.Module):
    """Feature map (B, C, 16, 16) -> changes of one layer, (B, O, I, 3, 3), or (B, O, I, 1, 1) for the form "shared" """

    def __init__(self, channels: int, O: int, I: int, form: str):
        super().__init__()
        self.convs = head_convolutions(channels, channels // 2, channels, (2,) * (3 if form == "shared" else 4))
        if form == "separable":
            self.output = nn.Sequential(SeparableKernel(channels, O, I))
        else:
            last = zero_init(nn.Conv2d(channels, O * I, 1))
            self.output = nn.Sequential(nn.AdaptiveAvgPool2d(1), last, nn.Unflatten(1, (O, I)))

    def forward(self, x):
        return self.output(self.convs(x))


class SeparableKernel(nn.Module):
    """Code (B, C, 1, 1) -> changes (B, O, I, 3, 3): an outer product for each tap, then a linear map of each axis"""

    def __init__(self, channels: int, O: int, I: int):
        super().__init__()
        self.make_kernel_in, self.make_kernel_out = nn.Linear(channels, 9 * I), nn.Linear(channels, 9 * O)
        self.kernel_linear_in, self.kernel_linear_out = nn.Linear(I, I), zero_init(nn.Linear(O, O))

    def forward(self, code):
        code = code.flatten(1)
        a, b = self.make_kernel_in(code).unflatten(1, (9, -1)), self.make_kernel_out(code).unflatten(1, (9, -1))
        kernel = self.kernel_linear_in(b[..., :, None] * a[..., None, :])      # (B, 9, O, I)
        kernel = self.kernel_linear_out(kernel.transpose(2, 3))                # (B, 9, I, O)
        return kernel.permute(0, 3, 2, 1).unflatten(3, (3, 3))


class HyperStyleNet(nn.Module):
    """HyperStyle's hypernetwork, section 3.2: a photo and its reconstruction -> relative changes of the generator's 3x3
    layers. A ResNet-34 on six channels, without its first pooling, and a block per layer: SharedBlock for the widest,
    else LayerBlock. form: "shared" (the authors' SharedWeightsHyperNetResNet) or "separable" (..Separable).
    Ours: the last layers are zero-initialised, and images below 256 px keep their size."""

    def __init__(self, layers: list, form: str, width: int = 64):
        """layers: (O, I) of each 3x3 layer of the generator, in the order of Generator.styled_convs()"""
        super().__init__()
        assert form in ("shared", "separable"), f"form is {form}, expected shared or separable"
        C = 8 * width
        self.conv1, self.bn1 = conv_norm(6, width, 7, 2)
        self.relu = nn.PReLU(width)
        ch = [width] + 3 * [width] + 4 * [2 * width] + 6 * [4 * width] + 3 * [8 * width]
        self.body = nn.Sequential(*(BasicBlock(a, b, 1 if a == b else 2) for a, b in zip(ch, ch[1:])))
        head = self.shared_weight_hypernet = SharedHead(C)
        blocks = [SharedBlock(C, head) if shape == (C, C) else LayerBlock(C, *shape, form) for shape in layers]
        for i in range(1, len(blocks) + len(blocks) // 2 + 1, 3):
            blocks.insert(i, None)  # the authors also count the toRGB layers, which are not changed
        self.refinement_blocks = nn.ModuleList(blocks)
        for block in self.body:  # torchvision's initialisation
            for conv in (block.conv1, block.conv2):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x, y_hat):
        """x, y_hat (B, 3, H, H) in [-1, 1] -> list of (B, O, I, 3, 3) or (B, O, I, 1, 1), one per 3x3 layer"""
        x = torch.cat([x, y_hat], 1).contiguous(memory_format=torch.channels_last)
        x = F.adaptive_avg_pool2d(x, 256) if x.shape[2] > 256 else x
        x = self.body(self.relu(self.bn1(self.conv1(x))))                      # (B, C, H/16, W/16)
        return [block(x) for block in self.refinement_blocks if block is not None]


# --------------------------------------------------------------------------------------------------------- their files

def read_part(path: str | Path, part: str) -> tuple[dict, dict]:
    """File of pSp's or HyperStyle's code -> (its content, state dict of `part`, which is "encoder" or "hypernet", without
    this prefix; bare keys are kept). InputError: see read_weights."""
    content = read_weights(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise InputError(f"{path}: its 'state_dict' is a {type(state).__name__}, expected a dict of weights")
    others = tuple(f"{other}." for other in {"encoder", "hypernet", "decoder"} - {part})
    return content, {str(k).removeprefix(f"{part}."): v for k, v in state.items() if not str(k).startswith(others)}


def load_encoder(path: str | Path, L: int, dim: int = 512) -> nn.Module:
    """pSp's encoder for L styles from the authors' file; a file with more styles (18 at 1024 px) gives the first L.
    ArcFace's IR-SE50 gives the trunk alone, to start the training of pSp, with new heads for codes of `dim` numbers.
    latent_avg is NaN if the file has none. InputError: see read_weights; another kind of file; fewer than L styles."""
    content, state = read_part(path, "encoder")
    with wrap_errors(path, "not pSp's encoder, nor ArcFace"):
        width = len(state["input_layer.0.weight"])
        if "output_layer.3.weight" in state:
            trunk = {key: value for key, value in state.items() if not key.startswith("output_layer.")}
            trunk = load_strictly(
                lambda: nn.ModuleDict(zip(("input_layer", "body"), trunk_ir_se50(width))), trunk, f"{path}, ArcFace")
            encoder = GradualStyleEncoder(L, dim, width)
            encoder.load_state_dict(trunk.state_dict(), strict=False)
            encoder.latent_avg.fill_(torch.nan)
            return encoder
        dim, mean = len(state["styles.0.linear.weight"]), content.get("latent_avg")
        styles = max(L, sum(f"styles.{i}.linear.weight" in state for i in range(18)))  # 18: at 1024 px
        mean = mean.reshape(-1, mean.shape[-1]) if isinstance(mean, torch.Tensor) else torch.full((1, dim), torch.nan)
        mean = mean.repeat(styles, 1) if len(mean) == 1 else mean[:styles]             # (1, D): a mean w
    encoder = load_strictly(lambda: GradualStyleEncoder(styles, dim, width), state | dict(latent_avg=mean), path)
    encoder.latent_avg, encoder.styles = encoder.latent_avg[:L].clone(), encoder.styles[:L]
    return encoder


def load_hypernet(path: str | Path, layers: list) -> tuple[HyperStyleNet, str]:
    """HyperStyle's hypernetwork from the authors' file -> (network, its form). layers: (O, I) of each 3x3 layer of the
    generator. InputError: as load_encoder; a file for another generator."""
    _, state = read_part(path, "hypernet")
    with wrap_errors(path, "not a HyperStyle checkpoint"):
        width = len(state["conv1.weight"])
        form = "separable" if any("make_kernel_in" in key for key in state) else "shared"
    return load_strictly(lambda: HyperStyleNet(layers, form, width), state, path), form
