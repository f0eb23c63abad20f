"""Networks that read images: encoders, which give a W+ code, and a hypernetwork, which changes a generator's weights.

pSp (Richardson et al., CVPR 2021) and HyperStyle (Alaluf et al., CVPR 2022) have the names of the authors' files, which
`load_encoder` and `load_hypernet` read strictly. VisualEncoder, for toy sizes, and MouthEncoder are ours.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import load_strictly, one_line, read_weights, wrap_errors
from faces import TEMPLATES, box_slices, resize_square
from media import InputError
from stylegan2 import EqualLinear


def zero_init(layer):
    """The layer, with an output of zero at first"""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------------------- the networks at toy sizes

class ResDown(nn.Module):
    """Halve the size: two 3x3 convolutions beside a pooled 1x1 shortcut. No normalisation: batches may be of one."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_in, 3, padding=1), nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (N, C, H, W) -> (N, C', H/2, W/2)
        y = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        return (y + self.skip(F.avg_pool2d(x, 2))) / math.sqrt(2)


class VisualEncoder(nn.Module):
    """Image -> W+ code, after pSp: styles 0-2 from the coarse map of a feature pyramid, 3-6 from the middle one, the rest
    from the fine one. Differs: a slim residual trunk and one head a level. Ours: a linear path beside it (the image at
    32x32 -> `linear` numbers -> W+), from principal components: it fits an unseen face after little training."""

    def __init__(self, size: int, dim: int, L: int, width: int = 48, linear: int = 192):
        super().__init__()
        self.size, self.dim, self.L = size, dim, L
        depth = int(math.log2(size)) - 2                                     # halvings down to 4x4
        ch = [min(width * 2 ** i, width * 4) for i in range(depth + 1)]
        self.stem = nn.Conv2d(3, ch[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResDown(a, b) for a, b in zip(ch, ch[1:]))
        self.groups = [3, min(4, L - 3), max(0, L - 7)]                      # pSp: styles 0-2, 3-6, 7-
        finer = (ch[-2], ch[-3]) if L > 7 else (ch[-2],)                     # 16 px has no fine styles
        self.lateral = nn.ModuleList(nn.Conv2d(c, ch[-1], 1) for c in finer)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(ch[-1], 32, 3, padding=1), nn.LeakyReLU(0.2),
                          nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, n * dim))
            for n in self.groups if n)
        self.linear_down = nn.Linear(3 * min(32, size) ** 2, linear, bias=False)
        self.linear_up = nn.Linear(linear, L * dim, bias=False)
        self.register_buffer("latent_avg", torch.zeros(L, dim))

    def forward(self, x):
        """x (N, 3, size, size) in [-1, 1] -> (N, L, D)"""
        assert x.shape[1:] == (3, self.size, self.size), (
            f"image is {tuple(x.shape[1:])}, expected (3, {self.size}, {self.size})")
        maps = [self.stem(x.contiguous(memory_format=torch.channels_last))]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        pyramid = [maps[-1]]                                                 # coarse (N, C, 4, 4), middle, fine
        for lateral, finer in zip(self.lateral, maps[-2::-1]):
            pyramid.append(lateral(finer) + F.interpolate(pyramid[-1], scale_factor=2, mode="nearest"))
        z = torch.cat([head(level).unflatten(1, (-1, self.dim)) for head, level in zip(self.heads, pyramid)], 1)
        z = z + self.linear_up(self.linear_down(to_small_image(x))).unflatten(1, (self.L, self.dim))
        return self.latent_avg + z                                           # (N, L, D)

    @torch.no_grad()
    def start_linear(self, images):
        """linear_down becomes the principal components of images (n, 3, H, W), n > `linear`, with outputs of unit
        variance; linear_up zero, so that a fresh encoder is the trunk alone."""
        x = to_float64(to_small_image(images))
        x -= x.mean(0)
        power, v = torch.linalg.eigh(x.t() @ x / len(x))                   # ascending; an SVD of x takes twice as long
        power, v = (y.flip(-1)[..., :len(self.linear_down.weight)] for y in (power, v))
        self.linear_down.weight.copy_((v / power.clamp_min(1e-6 * power[0]).sqrt()).t())
        self.linear_up.weight.zero_()


def to_float64(x):
    """x in float64, on the CPU where its device has none, as Apple's chips"""
    try:
        return x.double()
    except TypeError:
        return x.cpu().double()


def to_small_image(x):
    """(N, 3, H, W) -> (N, 3 * 32 * 32): what the linear path sees"""
    if x.shape[-1] > 32:
        x = F.avg_pool2d(x, x.shape[-1] // 32)
    return x.contiguous().flatten(1)


class MouthEncoder(nn.Module):
    """The mouth of an image -> M numbers, what `mask_mouth` removes from the VisualEncoder's input. Ours. The
    first K: the shape of the lips, the same on every face. The others, linear in the pixels: colour, teeth, a
    beard."""

    def __init__(self, template: str, M: int, K: int, width: int = 32):
        super().__init__()
        self.template = template
        self.linear = nn.Linear(3 * 32 * 32, M - K)  # set by initialise.fit_coarse_rgb
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for a, b in ((1, 2), (2, 4), (4, 4)):
            layers += [nn.Conv2d(a * width, b * width, 3, 2, 1), nn.LeakyReLU(0.2)]
        self.reader = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, K))

    def mouth_crop(self, x, margin: float = 0.0):
        """(N, 3, H, W) -> (N, 3, 32, 32): the lips; margin: more on each side, in box sides, and so more pixels"""
        x0, y0, x1, y1 = TEMPLATES[self.template].lips
        across, down, edge = margin * (x1 - x0), margin * (y1 - y0), round(32 * (1 + 2 * margin))
        rows, cols = box_slices((x0 - across, y0 - down, x1 + across, y1 + down), *x.shape[-2:])
        return F.interpolate(x[..., rows, cols], (edge, edge), mode="bilinear", antialias=True, align_corners=False)

    def read(self, box):  # (N, 3, 32, 32) -> shape of the lips (N, K), the same for any colour, skin and light
        box = box.mean(1, keepdim=True)
        box = box - box.mean((2, 3), keepdim=True)
        box = box / box.std((2, 3), keepdim=True).clamp_min(1e-2)
        return self.reader(box.contiguous(memory_format=torch.channels_last))

    def read_softly(self, x):
        """(N, 3, H, W) -> (N, K), read from shifted and blurred boxes, for a loss: fine patterns cannot fool it"""
        box = self.mouth_crop(x.float(), margin=0.125)
        down, right = (int(v) for v in torch.randint(box.shape[-1] - 31, (2,)))
        box = F.avg_pool2d(box[..., down:down + 32, right:right + 32], 2)
        return self.read(F.interpolate(box, scale_factor=2, mode="bilinear")).float()

    def forward(self, x):  # (N, 3, H, W) -> (N, M)
        box = self.mouth_crop(x)
        return torch.cat([self.read(box), self.linear(box.flatten(1))], 1)


# ------------------------------- published networks, with their authors' keys and shapes; `width` narrows them for tests

class SqueezeExcite(nn.Module):
    """Each channel times a gate in (0, 1) made from the mean of all channels; Hu et al. 2018"""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


def conv_norm(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
    """A convolution without bias, which keeps the size but for its stride, and BatchNorm"""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out)


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Beside a residual block: 1x1 convolution and BatchNorm where channels or size change, else the identity"""
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


def resize_to_256(x):
    """(N, 3, H, H) -> (N, 3, 256, 256): larger images pooled, as by pSp's authors; smaller ones enlarged (ours)"""
    return F.adaptive_avg_pool2d(x, 256) if x.shape[2] > 256 else resize_square(x, 256)


def head_convolutions(c_in: int, inner: int, c_out: int, strides: tuple) -> nn.Sequential:
    """3x3 convolutions with these strides, each with a leaky ReLU of 0.01, `inner` channels between them"""
    ch, layers = [c_in, *[inner] * (len(strides) - 1), c_out], []
    for a, b, stride in zip(ch, ch[1:], strides):
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.LeakyReLU()]
    return nn.Sequential(*layers)


class StyleHead(nn.Module):
    """pSp's map2style: (N, C, s, s) -> (N, D), by convolutions down to one place, then an equalised layer"""

    def __init__(self, channels: int, inner: int, dim: int, strides: tuple):
        super().__init__()
        self.convs = head_convolutions(channels, inner, dim, strides)
        self.linear = EqualLinear(dim, dim)

    def forward(self, x):
        return self.linear(self.convs(x).flatten(1))


class GradualStyleEncoder(nn.Module):
    """pSp's encoder: image -> W+ code. IR-SE50's maps at 64x64, 32x32 and 16x16, coarse ones added to finer ones, and a
    head for each style. Heads give the difference from latent_avg, the mean w, which files hold beside the weights."""

    TAPS = (6, 20, 23)  # blocks of the trunk

    def __init__(self, L: int, dim: int = 512, width: int = 64):
        super().__init__()
        self.input_layer, self.body = trunk_ir_se50(width)
        halvings = (4 if i < 3 else 5 if i < 7 else 6 for i in range(L))       # of maps at 16x16, 32x32, 64x64
        self.styles = nn.ModuleList(StyleHead(8 * width, dim, dim, (2,) * n) for n in halvings)
        self.latlayer1, self.latlayer2 = (nn.Conv2d(c * width, 8 * width, 1) for c in (4, 2))
        self.register_buffer("latent_avg", torch.zeros(L, dim))

    def forward(self, x):  # (N, 3, H, H) in [-1, 1], brought to 256 px -> (N, L, D)
        x, maps = self.input_layer(resize_to_256(x).contiguous(memory_format=torch.channels_last)), []
        for i, block in enumerate(self.body):
            x = block(x)
            if i in self.TAPS:
                maps.append(x)
        fine, middle, coarse = maps                                            # at 64x64, 32x32, 16x16
        middle = self.latlayer1(middle) + F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=True)
        fine = self.latlayer2(fine) + F.interpolate(middle, scale_factor=2, mode="bilinear", align_corners=True)
        levels = [coarse] * 3 + [middle] * 4 + [fine] * len(self.styles)
        return self.latent_avg + torch.stack([head(level) for head, level in zip(self.styles, levels)], 1)


class BasicBlock(nn.Module):
    """ResNet-34's (He et al. 2016) under torchvision's names: (N, C, H, W) -> (N, C', H/stride, W/stride)"""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(c_in, c_out, 3, stride)
        self.conv2, self.bn2 = conv_norm(c_out, c_out, 3)
        self.downsample = shortcut(c_in, c_out, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class SharedHead(nn.Module):
    """HyperStyle's head for all the widest layers: a code (B, Z) -> changes (B, O, I, 3, 3), O = I = Z, by two
    linear maps (Ha et al. 2017). (B, I, O 3 3) is viewed as (B, O, I, 3, 3) without a transpose, as theirs."""

    def __init__(self, dim: int):
        super().__init__()
        self.w1, self.b1 = (nn.Parameter(torch.zeros(*shape, dim * 9)) for shape in ((dim,), ()))
        self.w2, self.b2 = (nn.Parameter(torch.randn(*shape, dim * dim) / 40) for shape in ((dim,), ()))  # 40: theirs

    def forward(self, code):
        B, dim = code.shape
        h = torch.addmm(self.b2, code, self.w2).unflatten(1, (dim, dim))       # (B, I, Z)
        return (h @ self.w1 + self.b1).view(B, dim, dim, 3, 3)


class SharedBlock(StyleHead):
    """Feature map (B, C, 16, 16) -> the code of one layer -> SharedHead, which every such block holds as `hypernet`"""

    def __init__(self, channels: int, head: SharedHead):
        super().__init__(channels, channels // 4, channels, (1, 2, 2, 2, 2))
        self.hypernet = head

    def forward(self, x):
        return self.hypernet(super().forward(x))


class LayerBlock(nn.Module):
    """Feature map (B, C, 16, 16) -> changes of a layer (B, O, I, 3, 3), or, "shared" by its taps, (B, O, I)"""

    def __init__(self, channels: int, O: int, I: int, form: str):
        super().__init__()
        self.convs = head_convolutions(channels, channels // 2, channels, (2,) * (3 if form == "shared" else 4))
        self.output = nn.Sequential(SeparableKernel(channels, O, I)) if form == "separable" else nn.Sequential(
            nn.AdaptiveAvgPool2d(1), zero_init(nn.Conv2d(channels, O * I, 1)), nn.Flatten(), nn.Unflatten(1, (O, I)))

    def forward(self, x):
        return self.output(self.convs(x))


class SeparableKernel(nn.Module):
    """A code (B, C, 1, 1) -> changes (B, O, I, 3, 3): for each tap an outer product, then a linear map of each axis"""

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
    """HyperStyle's hypernetwork, section 3.2: a photo and what the generator makes of its code -> relative changes
    of the generator's 3x3 layers. A ResNet-34 on six channels, without its first pool, and a block for each layer:
    SharedBlock for the widest, for others LayerBlock ("shared": the authors' SharedWeightsHyperNetResNet,
    "separable": ..Separable). Ours: the last layers start at zero, images below 256 px keep their size."""

    def __init__(self, layers: list, form: str, width: int = 64):
        """layers: (O, I) of each 3x3 layer of the generator, in the order of Generator.styled_convs()"""
        super().__init__()
        assert form in ("shared", "separable"), f"form is {form}, expected shared or separable"
        C = 8 * width
        self.conv1, self.bn1 = conv_norm(6, width, 7, 2)
        self.relu = nn.PReLU(width)
        ch = [width, *(f * width for f, count in ((1, 3), (2, 4), (4, 6), (8, 3)) for _ in range(count))]
        self.body = nn.Sequential(*(BasicBlock(a, b, 1 if a == b else 2) for a, b in zip(ch, ch[1:])))
        head = self.shared_weight_hypernet = SharedHead(C)
        blocks = [SharedBlock(C, head) if shape == (C, C) else LayerBlock(C, *shape, form) for shape in layers]
        # the authors also count toRGB layers, which are not changed: one after the first 3x3 layer, then after every two
        places = [None if i % 3 == 1 else blocks[i - (i + 1) // 3] for i in range(len(blocks) + len(blocks) // 2 + 1)]
        self.refinement_blocks = nn.ModuleList(places)
        for block in self.body:  # as torchvision starts its ResNets
            for conv in (block.conv1, block.conv2):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x, y_hat):
        """x, y_hat (B, 3, H, H) in [-1, 1], at most 256 px -> list of (B, O, I, 3, 3) or (B, O, I), one a 3x3 layer"""
        x = torch.cat([x, y_hat], 1).contiguous(memory_format=torch.channels_last)
        x = F.adaptive_avg_pool2d(x, 256) if x.shape[2] > 256 else x
        x = self.body(self.relu(self.bn1(self.conv1(x))))                      # (B, C, H/16, W/16)
        return [block(x) for block in self.refinement_blocks if block is not None]


# ----------------------------------------------------------------------------------------------------- and their files

def read_part(path: str | Path, part: str) -> tuple[dict, dict]:
    """A checkpoint of pSp's or HyperStyle's code -> (what lies beside the weights, the state dict of its "encoder" or
    "hypernet"; all of it where keys are bare). InputError: see read_weights; weights that belong to no part."""
    content = read_weights(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise InputError(f"{path}: its 'state_dict' is a {type(state).__name__}, expected a dict of weights")
    own = {key.removeprefix(f"{part}."): value for key, value in state.items() if str(key).startswith(f"{part}.")}
    strays = [key for key in state if not str(key).startswith(("encoder.", "hypernet.", "decoder."))]
    if own and strays:
        raise InputError(f"{path}: {one_line(strays[0]) or 'a nameless weight'} is unknown beside {part}")
    return content if "state_dict" in content else {}, own or state


def load_encoder(path: str | Path, L: int, dim: int = 512) -> nn.Module:
    """pSp's encoder for L styles from its authors' file; of one with more styles (1024 px: 18) the first L. Of
    ArcFace's IR-SE50 the trunk, from which pSp's training starts, with new heads for codes of `dim` numbers.
    latent_avg is NaN where the file has none. InputError: see read_weights; another kind; fewer than L styles."""
    beside, state = read_part(path, "encoder")
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
        dim, mean = len(state["styles.0.linear.weight"]), beside.get("latent_avg")
        styles = max(L, sum(f"styles.{i}.linear.weight" in state for i in range(18)))  # 18: those of 1024 px
        mean = mean.reshape(-1, mean.shape[-1]) if isinstance(mean, torch.Tensor) else torch.full((1, dim), torch.nan)
        mean = mean.repeat(styles, 1) if len(mean) == 1 else mean[:styles]             # (1, D): a file made in W
    encoder = load_strictly(lambda: GradualStyleEncoder(styles, dim, width), state | dict(latent_avg=mean), path)
    encoder.latent_avg, encoder.styles = encoder.latent_avg[:L].clone(), encoder.styles[:L]
    return encoder


def load_hypernet(path: str | Path, layers: list) -> tuple[HyperStyleNet, str]:
    """HyperStyle's hypernetwork from its authors' file -> (network, its form). layers: (O, I) of each 3x3 layer of the
    generator. InputError: as load_encoder; made for another generator."""
    _, state = read_part(path, "hypernet")
    with wrap_errors(path, "not a HyperStyle checkpoint"):
        width = len(state["conv1.weight"])
        form = "separable" if any("make_kernel_in" in key for key in state) else "shared"
    return load_strictly(lambda: HyperStyleNet(layers, form, width), state, path), form
