"""Frozen networks behind losses and metrics: VGG19, LPIPS, ArcFace, SyncNet v2, Wav2Lip's expert, Inception.

The parameter names are those of the authors' files, which are loaded strictly. Images are (N, 3, H, W) in [-1, 1].
Each network converts them to its own size, range and channel order. The files are not shipped. Their terms: VGG BSD
(ImageNet's terms), LPIPS BSD-2, IR-SE50 trained on non-commercial data, SyncNet without a licence (cite it), Wav2Lip
research only.
"""

import functools
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import fetch, load_frozen, read_weights, wrap_errors
from faces import ARCFACE_POINTS, TEMPLATES, cut_square, fit_square, resize_square
from vision import tapped_maps, trunk_ir_se50


class SmallFaceJudge(nn.Module):
    """Face recognition at toy size, in place of ArcFace: images (N, 3, H, W), resized to 32 px -> (N, 64) of unit length.
    initialise.train_judge trains it to tell people apart, see `same_person_loss`."""

    def __init__(self, width: int = 32, dim: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
            nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(2 * width * 16, dim))
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-4.0))

    def forward(self, x):
        return F.normalize(self.body(F.adaptive_avg_pool2d(x, 32)), dim=1)


def same_person_loss(a, b, identity, log_scale, bias):
    """Pairwise sigmoid loss over a batch (SigLIP, Zhai et al. 2023): a, b (N, E), identity (N,) -> scalar."""
    same = identity[:, None] == identity[None, :]                       # (N, N)
    logits = log_scale.exp() * (a @ b.t()) + bias
    losses = F.softplus(torch.where(same, -logits, logits))
    return losses[same].mean() + losses[~same].mean()                   # ours: positive and negative pairs weigh the same


# ------------------------------------------------ published networks, with the names and shapes of their authors' files

def check_images(x, min_size: int):
    assert x.ndim == 4 and x.shape[1] == 3 and min(x.shape[2:]) >= min_size, \
        f"images are {tuple(x.shape)}, expected (N, 3, H, W) with H, W >= {min_size}"


def vgg_layers(*depths: int) -> list[nn.Module]:
    """torchvision's `features`: five stages of `depths` 3x3 convolutions with ReLU, each stage followed by a pool."""
    layers, c_in = [], 3
    for n_convolutions, channels in zip(depths, (64, 128, 256, 512, 512)):
        for _ in range(n_convolutions):
            layers += [nn.Conv2d(c_in, channels, 3, padding=1), nn.ReLU()]
            c_in = channels
        layers.append(nn.MaxPool2d(2))
    return layers


class VGG19Features(nn.Module):
    """Images (N, 3, H, W) in [-1, 1], H, W >= 16 -> maps relu1_1, 2_1, 3_1, 4_1, 5_1 of 64, 128, 256, 512, 512 channels,
    each half as large as the one before. These are the layers of pix2pixHD, as the paper names none."""

    TAPS = (1, 6, 11, 20, 29)

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*vgg_layers(2, 2, 4, 4, 4))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, x):
        check_images(x, 16)
        x = ((x + 1) / 2 - self.mean) / self.std                        # ImageNet's normalisation
        return tapped_maps(self.features[:30], x, self.TAPS)            # the last three convolutions are not needed


class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018): two batches (N, 3, H, W) in [-1, 1], H, W >= 16 -> distances (N,)"""

    TAPS = (3, 8, 15, 22, 29)  # the last ReLU of each stage

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*vgg_layers(2, 2, 3, 3, 3))
        for k, channels in enumerate((64, 128, 256, 512, 512)):         # one weight per channel
            model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{k}", nn.ModuleDict(dict(model=model)))
        # constants of the authors' code
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def feature_maps(self, x):
        """Images -> five feature maps of unit length at each position."""
        maps = tapped_maps(self.features[:30], (x - self.shift) / self.scale, self.TAPS)
        # the published x / (|x| + 1e-10) has no gradient where all channels are 0; this differs by under 1e-10
        return [x * (x.square().sum(1, keepdim=True) + 1e-20).rsqrt() for x in maps]

    def forward(self, a, b):
        check_images(a, 16)
        assert a.shape == b.shape, f"images are {tuple(a.shape)} and {tuple(b.shape)}, expected the same shape"
        heads = (self.get_submodule(f"lin{k}.model") for k in range(5))
        layers = zip(heads, self.feature_maps(a), self.feature_maps(b))
        return sum(head((x - y).square()).mean((1, 2, 3)) for head, x, y in layers)


class ArcFace(nn.Module):
    """Face recognition by IR-SE50: square crops of a face (N, 3, H, H) in [-1, 1], any H -> (N, 512) of unit length. The
    crop is moved so that the eyes and mouth of its template (faces.TEMPLATES) lie as in the network's training. For
    FFHQ's template that is pSp's "interesting region", within 4 of 256 px. Small crops are enlarged."""

    def __init__(self, template: str = "ffhq"):
        super().__init__()
        eyes_and_mouth = np.vstack([ARCFACE_POINTS[:2], ARCFACE_POINTS[3:].mean(0)])
        template_points = TEMPLATES[template].points or TEMPLATES["ffhq"].points        # ours: FFHQ's for drawn faces
        self.left, self.top, self.side = map(round, fit_square(eyes_and_mouth, template_points))  # in the 112 px input
        self.input_layer, self.body = trunk_ir_se50()
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.6), nn.Flatten(),
                                          nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512))

    def forward(self, x):
        check_images(x, 1)
        assert x.shape[2] == x.shape[3], f"images are {x.shape[2]} x {x.shape[3]}, expected square crops of a face"
        x = F.adaptive_avg_pool2d(x, self.side) if x.shape[2] > self.side else resize_square(x, self.side)
        return self.embed(cut_square(x, -self.left, -self.top, 112))

    def embed(self, x):
        """Aligned faces (N, 3, 112, 112) in [-1, 1] -> (N, 512) of unit length."""
        return F.normalize(self.output_layer(self.body(self.input_layer(x))), dim=1)


def with_batch_norm(batch_norm, *layers) -> nn.Sequential:
    """The layers, with BatchNorm and ReLU behind each convolution."""
    modules = []
    for layer in layers:
        modules.append(layer)
        if hasattr(layer, "out_channels"):
            modules += [batch_norm(layer.out_channels), nn.ReLU()]
    return nn.Sequential(*modules)


class SyncNetV2(nn.Module):
    """SyncNet (Chung & Zisserman 2016). The Euclidean distance of its embeddings (B, 1024) is small where lips and sound
    agree. Frames f..f+4 belong to the 20 MFCC steps from 4 f. Ours: `logits`, so that it can replace syncnet.SyncNet.
    They are the margin of its training minus the distance, which is about 7 in sync and 14 otherwise."""

    uses_mfcc, template, size, MARGIN = True, "syncnet", 224, 10.0

    def __init__(self):
        super().__init__()
        self.netcnnaud = with_batch_norm(nn.BatchNorm2d,                                   # (N, 1, 13, 20)
            nn.Conv2d(1, 64, 3, 1, 1), nn.MaxPool2d(1, 1), nn.Conv2d(64, 192, 3, 1, 1),
            nn.MaxPool2d(3, (1, 2)), nn.Conv2d(192, 384, 3, 1, 1), nn.Conv2d(384, 256, 3, 1, 1),  # (N, 192, 11, 9)
            nn.Conv2d(256, 256, 3, 1, 1), nn.MaxPool2d(3, 2), nn.Conv2d(256, 512, (5, 4)))         # (N, 256, 5, 4)
        self.netfcaud, self.netfclip = (nn.Sequential(
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024)) for _ in range(2))
        # the first layer spans five frames, all later layers see single frames
        self.netcnnlip = with_batch_norm(nn.BatchNorm3d,                                   # (B, 3, T, 224, 224)
            nn.Conv3d(3, 96, (5, 7, 7), (1, 2, 2)), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),    # (B, 96, T-4, 54, 54)
            nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)), nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)),  # 13 x 13
            nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),            # 6 x 6
            nn.Conv3d(256, 512, (1, 6, 6)))                                                # (B, 512, T-4, 1, 1)

    def windows(self, frames):
        """Face crops (B, T, 3, H, W) in [-1, 1] RGB, T >= 5 -> (B, T-4, 1024), one embedding per window of five frames.
        The authors' input is BGR in [0, 255] at 224 px."""
        assert frames.ndim == 5 and frames.shape[1] >= 5 and frames.shape[2] == 3, \
            f"frames are {tuple(frames.shape)}, expected (B, T, 3, H, W) with T >= 5"
        B, T = frames.shape[:2]
        x = resize_square((frames.flip(2).flatten(0, 1) + 1) * 127.5, 224).unflatten(0, (B, T))
        x = self.netcnnlip(x.transpose(1, 2)).flatten(2).transpose(1, 2)                   # (B, T-4, 512)
        return self.netfclip(x.flatten(0, 1)).unflatten(0, (B, T - 4))

    def face(self, frames):
        """(B, 5, 3, H, W) in [-1, 1] -> (B, 1024)"""
        return self.windows(frames)[:, 0]

    def sound(self, mfcc):
        """MFCC windows (B, 13, 20) of audio.mfcc -> (B, 1024)"""
        assert mfcc.shape[1:] == (13, 20), f"MFCC windows are {tuple(mfcc.shape)}, expected (B, 13, 20)"
        return self.netfcaud(self.netcnnaud(mfcc[:, None]).flatten(1))

    def logits(self, face, sound):
        """(B, 1024), (B2, 1024) -> (B, B2)"""
        return self.MARGIN - torch.cdist(face, sound)


class Wav2LipConv(nn.Module):
    """Wav2Lip's block under its published name: convolution, BatchNorm, (residual), ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride=1, padding: int = 1, residual: bool = False):
        super().__init__()
        self.conv_block = nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, padding), nn.BatchNorm2d(c_out))
        self.residual = residual

    def forward(self, x):
        return torch.relu(self.conv_block(x) + x if self.residual else self.conv_block(x))


class Wav2LipExpert(nn.Module):
    """Wav2Lip's sync expert (Prajwal et al. 2020): the cosine of two embeddings (B, 512) is the probability of being in
    sync. It has the methods of syncnet.SyncNet and can replace it. It was trained on S3FD's boxes, forehead to chin."""

    def __init__(self):
        super().__init__()

        def stage(c_in, c_out, kernel, stride=1, padding=1, n_residual=0):  # one block, then n_residual residual blocks
            residual = (Wav2LipConv(c_out, c_out, 3, residual=True) for _ in range(n_residual))
            return Wav2LipConv(c_in, c_out, kernel, stride, padding), *residual

        self.face_encoder = nn.Sequential(                                                 # (B, 15, 48, 96)
            *stage(15, 32, 7, 1, 3), *stage(32, 64, 5, (1, 2), 1, 2),                      # (B, 64, 46, 47)
            *stage(64, 128, 3, 2, 1, 3), *stage(128, 256, 3, 2, 1, 2), *stage(256, 512, 3, 2, 1, 2),  # (B, 512, 6, 6)
            *stage(512, 512, 3, 2), *stage(512, 512, 3, 1, 0), *stage(512, 512, 1, 1, 0))
        self.audio_encoder = nn.Sequential(                                                # (B, 1, 80, 16)
            *stage(1, 32, 3, n_residual=2), *stage(32, 64, 3, (3, 1), 1, 2),               # (B, 64, 27, 16)
            *stage(64, 128, 3, 3, 1, 2), *stage(128, 256, 3, (3, 2), 1, 2),                # (B, 256, 3, 3)
            *stage(256, 512, 3, 1, 0), *stage(512, 512, 1, 1, 0))

    def face(self, frames):
        """Face crops (B, 5, 3, H, W) in [-1, 1] RGB -> (B, 512) of unit length. The authors' input is the lower half at
        96 px, BGR in [0, 1], the five frames as 15 channels."""
        assert frames.ndim == 5 and frames.shape[1:3] == (5, 3), \
            f"frames are {tuple(frames.shape)}, expected (B, 5, 3, H, W)"
        x = resize_square((frames.flip(2).flatten(0, 1) + 1) / 2, 96)[:, :, 48:]                 # (5 B, 3, 48, 96)
        return F.normalize(self.face_encoder(x.unflatten(0, (-1, 5)).flatten(1, 2)).flatten(1), dim=1)

    def sound(self, mel):
        """Mel windows (B, 1, 80, 16) of the middle frames, from audio.mel_windows -> (B, 512) of unit length."""
        assert mel.shape[1:] == (1, 80, 16), f"mel window is {tuple(mel.shape)}, expected (B, 1, 80, 16)"
        return F.normalize(self.audio_encoder(mel).flatten(1), dim=1)

    def logits(self, face, sound):
        """(B, 512), (B2, 512) -> (B, B2). The sigmoid of a logit is the cosine, Wav2Lip's probability."""
        return torch.logit((face @ sound.t()).float(), eps=1e-4)  # ours: at most +-9.2, finite where a cosine is 0 or 1


class Inception:
    """FID's network (Szegedy et al. 2015, Heusel et al. 2017): images (N, 3, H, W) in [-1, 1] -> (N, 2048). The weights
    are TensorFlow's of 2015-12-05 under torchvision's names, as ported by pytorch-fid. Average pools do not count their
    padding. The last block has a max pool. Images are resized to 299 px bilinearly, without prefilter."""

    def __init__(self, device):
        """InputError: another file in place of pytorch-fid's."""
        path = fetch("inception")
        with wrap_errors(path, "not the weights of Inception"):
            self.weights = {name: value.float().to(device) for name, value in read_weights(path).items()}
            self(torch.zeros(1, 3, 299, 299, device=device))

    def conv(self, x, name, stride=1, padding=0):
        """Convolution, BatchNorm, ReLU"""
        w = self.weights
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        statistics = (w[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *statistics, eps=0.001))

    def chain(self, x, name, *paddings):
        """Convolutions name_1, name_2, ... with these paddings. "half" is stride 2 without padding."""
        for k, padding in enumerate(paddings, 1):
            x = self.conv(x, f"{name}_{k}", 2) if padding == "half" else self.conv(x, f"{name}_{k}", 1, padding)
        return x

    def fork(self, x, name):
        """A 1x3 and a 3x1 convolution of the same input"""
        return [self.conv(x, f"{name}a", 1, (0, 1)), self.conv(x, f"{name}b", 1, (1, 0))]

    @torch.inference_mode()
    def __call__(self, x):
        conv, chain, row, column = self.conv, self.chain, (0, 3), (3, 0)
        average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        check_images(x, 1)
        x = conv(resize_square(x, 299), "Conv2d_1a_3x3", 2)                                     # (N, 32, 149, 149)
        x = conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)                         # (N, 64, 147, 147)
        x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")           # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)
        for b in ("Mixed_5b.branch", "Mixed_5c.branch", "Mixed_5d.branch"):               # (N, 288, 35, 35)
            x = torch.cat([conv(x, f"{b}1x1"), chain(x, f"{b}5x5", 0, 2), chain(x, f"{b}3x3dbl", 0, 1, 1),
                           conv(average(x), f"{b}_pool")], 1)
        b = "Mixed_6a.branch"                                                             # (N, 768, 17, 17)
        x = torch.cat([conv(x, f"{b}3x3", 2), chain(x, f"{b}3x3dbl", 0, 1, "half"), F.max_pool2d(x, 3, 2)], 1)
        for b in ("Mixed_6b.branch", "Mixed_6c.branch", "Mixed_6d.branch", "Mixed_6e.branch"):
            x = torch.cat([conv(x, f"{b}1x1"), chain(x, f"{b}7x7", 0, row, column),
                           chain(x, f"{b}7x7dbl", 0, column, row, column, row), conv(average(x), f"{b}_pool")], 1)
        b = "Mixed_7a.branch"                                                             # (N, 1280, 8, 8)
        x = torch.cat([chain(x, f"{b}3x3", 0, "half"), chain(x, f"{b}7x7x3", 0, row, column, "half"),
                       F.max_pool2d(x, 3, 2)], 1)
        for b, pool in (("Mixed_7b.branch", average), ("Mixed_7c.branch", lambda x: F.max_pool2d(x, 3, 1, 1))):
            x = torch.cat([conv(x, f"{b}1x1"), *self.fork(conv(x, f"{b}3x3_1"), f"{b}3x3_2"),
                           *self.fork(chain(x, f"{b}3x3dbl", 0, 1), f"{b}3x3dbl_3"), conv(pool(x), f"{b}_pool")], 1)
        return x.mean((2, 3))                                                             # (N, 2048)


# ------------------------------------------------------------------------------------- loading the published weights

def load_network(name: str, make_network, device, path=None, convert=lambda content: content) -> nn.Module:
    """A frozen network with the weights of the file PUBLISHED[name]. path: the user's copy. None downloads it."""
    path = fetch(name, path)
    content = read_weights(path)
    with wrap_errors(path, f"not the weights of {name}"):
        state = convert(content)
    return load_frozen(make_network, state, path, device)


def without_classifier(content: dict) -> dict:
    """torchvision's VGG files without the classifier, which is not used."""
    return {key: value for key, value in content.items() if not key.startswith("classifier.")}


# functions of a device and optionally of a copy of the file
vgg19 = functools.partial(load_network, "vgg19", VGG19Features, convert=without_classifier)
syncnet_v2 = functools.partial(load_network, "syncnet_v2", SyncNetV2)
wav2lip_expert = functools.partial(load_network, "wav2lip_expert", Wav2LipExpert, convert=itemgetter("state_dict"))


def arcface(device, path: str | Path | None = None, template: str = "ffhq") -> ArcFace:
    """template: the crop of the images. pSp's model_ir_se50.pth holds the same weights."""
    return load_network("arcface", lambda: ArcFace(template), device, path)


def lpips(device, path: str | Path | None = None, heads: str | Path | None = None) -> LPIPS:
    """path: torchvision's VGG16. heads: the authors' vgg.pth."""
    heads = read_weights(fetch("lpips_heads", heads))
    return load_network("vgg16", LPIPS, device, path, lambda content: without_classifier(content) | heads)
