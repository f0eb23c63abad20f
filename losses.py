"""The loss terms of training as pure functions, the frozen judges behind three of them, and the one pinned downloader.

FC-TFG (arXiv 2304.03275), section 3.4, names six terms; the GAN terms are StyleGAN2's (arXiv 1912.04958):

    orthogonality   canonical and motion code share no direction          orthogonality_loss
    sync            mouth and sound agree, judged by a sync expert        syncnet.sync_loss
    identity        the same person, judged by a face recogniser          identity_loss
    reconstruction  L1                                                    reconstruction_loss
    perceptual      features of a judge agree                             perceptual_loss
    adversarial     non-saturating logistic                               generator_loss, discriminator_loss

The paper prints no weights: those in train.py are ours. Pictures are (N, 3, H, W) in [-1, 1]; every loss is a scalar.

The published judges (VGG19, LPIPS, ArcFace, SyncNet v2, the Wav2Lip expert, FID's Inception) are built under the names
of their authors' files and load them strictly; pictures come in as ours and are brought to each author's size, range and
channel order inside. Weights are fetched on first use into $TORCH_HOME/hub/checkpoints (default ~/.cache/torch), pinned
by SHA256.
None may be shipped; terms: VGG BSD (ImageNet's terms), LPIPS BSD-2, IR-SE50 trained on non-commercial data, SyncNet
without a licence (cite it), Wav2Lip research only.
"""

import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from audio import InputError, check_file
from stylegan2 import load_strictly, read_weights, refusing
from vision import (
    ARCFACE_POINTS,
    TEMPLATES,
    box_slices,
    checkpoints_dir,
    resized,
    square_at,
    trunk_ir_se50,
    window,
)

# ---------------------------------------------------------------------------------------------------------------------
# the six terms


def orthogonality_loss(z_s2c, z_c2d):
    """Squared cosine between canonical and motion code, a mean over clips, frames and style layers; in [0, 1].

    The paper drives the inner product of each style layer to 0. Ours is its square over the lengths: the bare inner
    product is also lowered by shrinking both codes.

    Args:
        z_s2c: (B, L, D).
        z_c2d: (B, T, L, D).
    """
    return F.cosine_similarity(z_s2c[:, None], z_c2d, dim=-1, eps=1e-6).square().mean()


def reconstruction_loss(fake, real, boxes=(), pyramid: float = 0.5):
    """L1 of the picture, of some boxes again, and of the picture at half and a quarter of its size.

    Args:
        boxes: ((x0, y0, x1, y1) as fractions of the picture, weight) pairs. Ours: mouth and eyes are a hundredth of the
            pixels and all that anyone looks at.
        pyramid: weight of the smaller pictures (ours: colour and place settle before edges do).
    """
    loss = (fake - real).abs().mean()
    for box, weight in boxes:
        rows, cols = box_slices(box, *fake.shape[-2:])
        loss = loss + weight * (fake[..., rows, cols] - real[..., rows, cols]).abs().mean()
    for factor in (2, 4) if pyramid else ():
        loss = loss + pyramid * (F.avg_pool2d(fake, factor) - F.avg_pool2d(real, factor)).abs().mean()
    return loss


def perceptual_loss(fake_maps, real_maps):
    """Mean over layers of the L1 distance of feature maps (N, C, H, W), each in units of the real map's mean size."""
    pairs = [(f.float(), r.detach().float()) for f, r in zip(fake_maps, real_maps)]
    terms = [(f - r).abs().mean() / r.abs().mean().clamp_min(1e-6) for f, r in pairs]
    return sum(terms) / len(terms)


def identity_loss(fake_embedding, real_embedding):
    """1 - cosine of the judge's embeddings (N, E) of unit length; pSp, section 3.3. In [0, 2]."""
    return 1 - (fake_embedding * real_embedding.detach()).sum(-1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# the GAN terms: scores are (N, 1) logits

def discriminator_loss(real_score, fake_score):
    """-log D(real) - log(1 - D(fake)); 2 ln 2 where D knows nothing"""
    return F.softplus(-real_score).mean() + F.softplus(fake_score).mean()


def generator_loss(fake_score):
    """Non-saturating: -log D(fake); ln 2 where D knows nothing"""
    return F.softplus(-fake_score).mean()


def r1_penalty(real, score):
    """E |grad_x D(x)|^2 at real pictures, Mescheder et al. 2018. real must require a gradient and lead to score."""
    grad, = torch.autograd.grad(score.sum(), real, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def path_length_penalty(fake, w_plus, mean_path, noise=None, decay: float = 0.01):
    """E (|J^T y| - a)^2, StyleGAN2 section 3.2, J the Jacobian of the picture by w, a the running mean of the length.

    Args:
        fake: (N, 3, H, W) made from w_plus (N, L, D), which requires a gradient.
        mean_path: scalar tensor, a before this step.
        noise: y (N, 3, H, W) ~ N(0, 1); drawn where None. Divided by sqrt(H W), so that the length is one of a pixel.

    Returns:
        (penalty, a after this step, detached)
    """
    noise = torch.randn_like(fake) if noise is None else noise
    y = noise / math.sqrt(fake.shape[2] * fake.shape[3])
    grad, = torch.autograd.grad((fake * y).sum(), w_plus, create_graph=True)
    lengths = grad.square().sum(2).mean(1).sqrt()                       # (N,): root mean square over the L layers
    mean_path = mean_path + decay * (lengths.mean() - mean_path)        # with its gradient, as in StyleGAN2
    return (lengths - mean_path).square().mean(), mean_path.detach()


class Augment:
    """What the discriminator sees of small data: DiffAugment's operations (Zhao et al. 2020), each drawn for each picture
    with probability p, and ADA's controller for p (Karras et al. 2020, section 3: aim at E sign D(real) = 0.6).

    ADA's full pipeline warps and filters at three times the generator's cost on a CPU; flips, shifts, colour and cutout
    are most of its gain and all differentiable.
    """

    def __init__(self, p: float = 0.0, target: float = 0.6, kimg: float = 500.0):
        self.p, self.target, self.kimg = p, target, kimg

    def update(self, real_score):
        """Move p by N / 500k pictures towards the target; p in [0, 1]. real_score (N, 1)."""
        direction = math.copysign(1.0, real_score.sign().mean().item() - self.target)
        self.p = min(1.0, max(0.0, self.p + direction * len(real_score) / (self.kimg * 1000)))

    def __call__(self, x):
        """x (N, 3, H, W) -> augmented, differentiable by x"""
        if self.p == 0:
            return x
        N, _, H, W = x.shape

        def drawn():  # (N, 1, 1, 1), 1 where the operation is applied
            return (torch.rand(N, 1, 1, 1, device=x.device) < self.p).to(x.dtype)

        flip = drawn()
        x = flip * x.flip(3) + (1 - flip) * x
        x = x + drawn() * (torch.rand(N, 1, 1, 1, device=x.device) - 0.5)                       # brightness
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * (1 + drawn() * (2 * torch.rand(N, 1, 1, 1, device=x.device) - 1))  # saturation
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * (1 + drawn() * (torch.rand(N, 1, 1, 1, device=x.device) - 0.5))  # contrast
        shift = (drawn().flatten() * (torch.rand(N, device=x.device) - 0.5) * W / 4).round().long()  # up to 1/8 sideways
        columns = (torch.arange(W, device=x.device)[None] + shift[:, None]).clamp(0, W - 1)
        x = x.gather(3, columns[:, None, None].expand(N, 3, H, W))
        hole = drawn()                                                                           # cutout: half the edge
        cy, cx = (torch.rand(2, N, 1, 1, device=x.device) * torch.tensor([H, W], device=x.device)[:, None, None, None])
        rows = (torch.arange(H, device=x.device)[None, :, None] - cy).abs() < H / 4
        cols = (torch.arange(W, device=x.device)[None, None, :] - cx).abs() < W / 4
        return x * (1 - hole * (rows & cols)[:, None].to(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# judges: networks that are trained elsewhere, frozen for good, and differentiable with respect to the picture

def freeze(judge: nn.Module) -> nn.Module:
    """No gradients for its parameters; eval mode, and train() keeps it there."""
    judge.requires_grad_(False).eval()
    judge.train = lambda mode=True: judge
    return judge


class SmallFaceJudge(nn.Module):
    """Who is it? A small recogniser for packs at toy size, in ArcFace's place: (N, 3, H, W) -> (N, 64) of unit length.

    Trained by train.py on pairs of frames of one clip against frames of others (no labels but the clip's): see
    `same_person_loss`. Pictures are seen at 32 px.
    """

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
    return losses[same].mean() + losses[~same].mean()                   # ours: both halves weigh the same


# ---------------------------------------------------------------------------------------------------------------------
# published judges. Keys and shapes are those of the authors' files; a copy with others is refused

def check_pictures(x, least: int):
    assert x.ndim == 4 and x.shape[1] == 3 and min(x.shape[2:]) >= least, \
        f"pictures are {tuple(x.shape)}, expected (N, 3, H, W) with H, W >= {least}"


def vgg_layers(*stages) -> list[nn.Module]:
    """torchvision's `features` in order: for each (convolutions, channels) 3x3 convolutions with ReLU, then a pool."""
    layers, c_in = [], 3
    for convolutions, channels in stages:
        for _ in range(convolutions):
            layers += [nn.Conv2d(c_in, channels, 3, padding=1), nn.ReLU()]
            c_in = channels
        layers.append(nn.MaxPool2d(2))
    return layers


class VGG19Features(nn.Module):
    """Perceptual judge: pictures (N, 3, H, W) in [-1, 1], H, W >= 16 -> feature maps relu1_1, 2_1, 3_1, 4_1, 5_1.

    The maps are (N, 64, H, W), (N, 128, H/2, W/2), (N, 256, H/4, W/4), (N, 512, H/8, W/8), (N, 512, H/16, W/16), the
    taps that pix2pixHD made customary; the paper names VGG19 and no layers. Needs torchvision's ImageNet normalisation,
    done here.
    """

    TAPS = (1, 6, 11, 20, 29)

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*vgg_layers((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, x):
        check_pictures(x, 16)
        x, maps = ((x + 1) / 2 - self.mean) / self.std, []
        for i, layer in enumerate(self.features[:self.TAPS[-1] + 1]):  # the file's last three convolutions rest
            x = layer(x)
            if i in self.TAPS:
                maps.append(x)
        return maps


class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018): two batches (N, 3, H, W) in [-1, 1], H, W >= 16 -> distances (N,).

    The published file registers its heads twice, as lin0.. and as lins.0..; so does this.
    """

    SCALING = dict(shift=[-0.030, -0.088, -0.188], scale=[0.458, 0.448, 0.450])  # in no file
    ENDS = (4, 9, 16, 23, 30)  # layers of VGG16 in the slices: each tap is the last ReLU of a stage

    def __init__(self):
        super().__init__()
        layers = vgg_layers((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
        self.scaling_layer = nn.Module()
        for name, value in self.SCALING.items():
            self.scaling_layer.register_buffer(name, torch.tensor(value)[None, :, None, None])
        self.net = nn.Sequential(OrderedDict(
            (f"slice{k + 1}", nn.Sequential(OrderedDict((str(i), layers[i]) for i in range(start, stop))))
            for k, (start, stop) in enumerate(zip((0,) + self.ENDS, self.ENDS))))
        for k, channels in enumerate((64, 128, 256, 512, 512)):
            head = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))  # a weight a channel
            setattr(self, f"lin{k}", nn.Sequential(OrderedDict(model=head)))
        self.lins = nn.ModuleList(getattr(self, f"lin{k}") for k in range(5))

    def maps(self, x):
        """Feature maps of unit length at every place"""
        x, maps = (x - self.scaling_layer.shift) / self.scaling_layer.scale, []
        for part in self.net:
            x = part(x)
            # the published x / (|x| + 1e-10) has no gradient where all channels are 0; this differs by under 1e-10
            maps.append(x * (x.square().sum(1, keepdim=True) + 1e-20).rsqrt())
        return maps

    def forward(self, a, b):
        check_pictures(a, 16)
        assert a.shape == b.shape, f"pictures are {tuple(a.shape)} and {tuple(b.shape)}, expected the same shape"
        return sum(head((x - y).square()).mean((1, 2, 3)) for head, x, y in zip(self.lins, self.maps(a), self.maps(b)))


class ArcFace(nn.Module):
    """Who is it? IR-SE50: square crops of a face (N, 3, H, H) in [-1, 1], any H -> (N, 512) of unit length.

    The face is cut so that the eyes and mouth of the pictures' template (see vision.TEMPLATES) lie where the network's
    own training had them. Of FFHQ's template that is pSp's "interesting region", within 4 of 256 px. The border is
    repeated where the network wants to see more than there is; smaller pictures are enlarged bilinearly.
    """

    def __init__(self, template: str = "ffhq"):
        super().__init__()
        wanted = np.vstack([ARCFACE_POINTS[:2], ARCFACE_POINTS[3:].mean(0)])               # eyes, middle of the mouth
        square = square_at(wanted, (TEMPLATES[template].points or TEMPLATES["ffhq"].points))  # drawn faces: FFHQ's (ours)
        self.left, self.top, self.side = map(round, square)                                # of the picture in the 112 px
        self.input_layer, self.body = trunk_ir_se50()
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.6), nn.Flatten(),
                                          nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512))

    def forward(self, x):
        check_pictures(x, 1)
        assert x.shape[2] == x.shape[3], f"pictures are {x.shape[2]} x {x.shape[3]}, expected square crops of a face"
        x = F.adaptive_avg_pool2d(x, self.side) if x.shape[2] > self.side else resized(x, self.side)
        return self.embed(window(x, -self.left, -self.top, 112))

    def embed(self, x):
        """Faces already cut, (N, 3, 112, 112) in [-1, 1] -> (N, 512) of unit length"""
        return F.normalize(self.output_layer(self.body(self.input_layer(x))), dim=1)


def normed(batch_norm, *layers) -> nn.Sequential:
    """Each convolution followed by BatchNorm and ReLU; pools as they are"""
    return nn.Sequential(*(part for layer in layers for part in (
        (layer, batch_norm(layer.out_channels), nn.ReLU()) if hasattr(layer, "out_channels") else (layer,))))


class SyncNetV2(nn.Module):
    """The published SyncNet (Chung & Zisserman 2016): distance of embeddings (N, 1024), small where lips and sound agree.

    Its embeddings have no unit length and are compared by Euclidean distance. Frames f..f+4 belong to the 20 MFCC steps
    from 4 f.
    """

    def __init__(self):
        super().__init__()
        self.netcnnaud = normed(nn.BatchNorm2d,                                            # (N, 1, 13, 20)
            nn.Conv2d(1, 64, 3, 1, 1), nn.MaxPool2d(1, 1), nn.Conv2d(64, 192, 3, 1, 1),
            nn.MaxPool2d(3, (1, 2)), nn.Conv2d(192, 384, 3, 1, 1), nn.Conv2d(384, 256, 3, 1, 1),  # (N, 192, 11, 9)
            nn.Conv2d(256, 256, 3, 1, 1), nn.MaxPool2d(3, 2), nn.Conv2d(256, 512, (5, 4)))         # (N, 256, 5, 4)
        self.netfcaud = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))
        self.netfclip = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))
        # only the first layer sees time: t = 5 frames at once, all others work frame by frame
        self.netcnnlip = normed(nn.BatchNorm3d,                                            # (B, 3, T, 224, 224)
            nn.Conv3d(3, 96, (5, 7, 7), (1, 2, 2)), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),    # (B, 96, T-4, 54, 54)
            nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)), nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)),  # 13 x 13
            nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),            # 6 x 6
            nn.Conv3d(256, 512, (1, 6, 6)))                                                # (B, 512, T-4, 1, 1)

    def face(self, frames):
        """Whole face crops (B, T, 3, H, W) in [-1, 1] RGB, T >= 5 -> (B, T-4, 1024), one for each five frames.

        The authors' input is BGR in [0, 255] at 224 px; other sizes are resized.
        """
        assert frames.ndim == 5 and frames.shape[1] >= 5 and frames.shape[2] == 3, \
            f"frames are {tuple(frames.shape)}, expected (B, T, 3, H, W) with T >= 5"
        B, T = frames.shape[:2]
        x = resized((frames.flip(2).flatten(0, 1) + 1) * 127.5, 224).unflatten(0, (B, T))
        x = self.netcnnlip(x.transpose(1, 2)).flatten(2).transpose(1, 2)                   # (B, T-4, 512)
        return self.netfclip(x.flatten(0, 1)).unflatten(0, (B, T - 4))

    def sound(self, mfcc):
        """MFCC windows (N, 13, 20) of audio.mfcc -> (N, 1024)"""
        assert mfcc.shape[1:] == (13, 20), f"MFCC windows are {tuple(mfcc.shape)}, expected (N, 13, 20)"
        return self.netfcaud(self.netcnnaud(mfcc[:, None]).flatten(1))


class Wav2LipConv(nn.Module):
    """Wav2Lip's block under its published name: convolution, BatchNorm, (residual), ReLU"""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride=1, padding: int = 1, residual: bool = False):
        super().__init__()
        self.conv_block = nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, padding), nn.BatchNorm2d(c_out))
        self.residual = residual

    def forward(self, x):
        return torch.relu(self.conv_block(x) + x if self.residual else self.conv_block(x))


class Wav2LipExpert(nn.Module):
    """The published lip-sync expert (Prajwal et al. 2020): cosine of embeddings (B, 512) = probability of being in sync.

    face, sound and logits mean the same as those of syncnet.SyncNet, so that it can stand in its place. Its faces are
    the boxes of S3FD's detections, forehead to chin.
    """

    def __init__(self):
        super().__init__()

        def same(channels):
            return Wav2LipConv(channels, channels, 3, residual=True)

        self.face_encoder = nn.Sequential(                                                 # (B, 15, 48, 96)
            Wav2LipConv(15, 32, 7, 1, 3),
            Wav2LipConv(32, 64, 5, (1, 2)), same(64), same(64),                            # (B, 64, 46, 47)
            Wav2LipConv(64, 128, 3, 2), same(128), same(128), same(128),                   # (B, 128, 23, 24)
            Wav2LipConv(128, 256, 3, 2), same(256), same(256),                             # (B, 256, 12, 12)
            Wav2LipConv(256, 512, 3, 2), same(512), same(512),                             # (B, 512, 6, 6)
            Wav2LipConv(512, 512, 3, 2), Wav2LipConv(512, 512, 3, 1, 0), Wav2LipConv(512, 512, 1, 1, 0))
        self.audio_encoder = nn.Sequential(                                                # (B, 1, 80, 16)
            Wav2LipConv(1, 32, 3), same(32), same(32),
            Wav2LipConv(32, 64, 3, (3, 1)), same(64), same(64),                            # (B, 64, 27, 16)
            Wav2LipConv(64, 128, 3, 3), same(128), same(128),                              # (B, 128, 9, 6)
            Wav2LipConv(128, 256, 3, (3, 2)), same(256), same(256),                        # (B, 256, 3, 3)
            Wav2LipConv(256, 512, 3, 1, 0), Wav2LipConv(512, 512, 1, 1, 0))

    def face(self, frames):
        """Whole crops (B, 5, 3, H, W) in [-1, 1] RGB -> (B, 512) of unit length.

        The authors' input is the lower half at 96 px, BGR in [0, 1], the five frames side by side as 15 channels.
        """
        assert frames.ndim == 5 and frames.shape[1:3] == (5, 3), (
            f"frames are {tuple(frames.shape)}, expected (B, 5, 3, H, W)")
        x = resized((frames.flip(2).flatten(0, 1) + 1) / 2, 96)[:, :, 48:]                 # (5 B, 3, 48, 96)
        return F.normalize(self.face_encoder(x.unflatten(0, (-1, 5)).flatten(1, 2)).flatten(1), dim=1)

    def sound(self, mel):
        """Mel windows (B, 1, 80, 16) of audio.mel_windows, of the middle frame -> (B, 512) of unit length"""
        assert mel.shape[1:] == (1, 80, 16), f"mel window is {tuple(mel.shape)}, expected (B, 1, 80, 16)"
        return F.normalize(self.audio_encoder(mel).flatten(1), dim=1)

    def logits(self, face, sound):
        """(B, 512), (B2, 512) -> (B, B2): sigmoid of it is the cosine, which Wav2Lip takes for the probability"""
        return torch.logit(face @ sound.t(), eps=1e-4)  # ours: at most +-9.2, finite where a cosine is 0 or 1


class Mixed(nn.Module):
    """An Inception block: several branches side by side, their channels joined. (N, C, H, W) -> (N, C', H', W').

    branches: lists of layer names, called in turn; a pair of names are two layers on the same input, joined; "avg", "max"
    keep the size, "half" halves it. layers: name -> (channels in, out, kernel) or (.., stride).
    """

    POOLS = dict(avg=nn.AvgPool2d(3, 1, 1, count_include_pad=False), max=nn.MaxPool2d(3, 1, 1), half=nn.MaxPool2d(3, 2))

    def __init__(self, branches: list, **layers):
        super().__init__()
        self.branches = branches
        for name, plan in layers.items():
            setattr(self, name, inception_conv(*plan))

    def step(self, name, x):
        if isinstance(name, tuple):
            return torch.cat([self.step(part, x) for part in name], 1)
        return self.POOLS[name](x) if name in self.POOLS else getattr(self, f"branch{name}")(x)

    def forward(self, x):
        outs = []
        for branch in self.branches:
            y = x
            for name in branch:
                y = self.step(name, y)
            outs.append(y)
        return torch.cat(outs, 1)


def inception_conv(c_in: int, c_out: int, kernel, stride: int = 1, padding: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU under torchvision's names; the size is kept where stride is 1 and padding on"""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = tuple(k // 2 for k in kernel) if padding and stride == 1 else 0
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(c_in, c_out, kernel, stride, pad, bias=False),
                                     bn=nn.BatchNorm2d(c_out, eps=0.001), relu=nn.ReLU()))


def mixed_a(c_in: int, pool: int) -> Mixed:
    return Mixed([["1x1"], ["5x5_1", "5x5_2"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3"], ["avg", "_pool"]],
                 branch1x1=(c_in, 64, 1), branch5x5_1=(c_in, 48, 1), branch5x5_2=(48, 64, 5),
                 branch3x3dbl_1=(c_in, 64, 1), branch3x3dbl_2=(64, 96, 3), branch3x3dbl_3=(96, 96, 3),
                 branch_pool=(c_in, pool, 1))


def mixed_c(c: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    double = [f"7x7dbl_{k}" for k in range(1, 6)]
    return Mixed([["1x1"], ["7x7_1", "7x7_2", "7x7_3"], double, ["avg", "_pool"]], branch1x1=(768, 192, 1),
                 branch7x7_1=(768, c, 1), branch7x7_2=(c, c, row), branch7x7_3=(c, 192, column),
                 branch7x7dbl_1=(768, c, 1), branch7x7dbl_2=(c, c, column), branch7x7dbl_3=(c, c, row),
                 branch7x7dbl_4=(c, c, column), branch7x7dbl_5=(c, 192, row), branch_pool=(768, 192, 1))


def mixed_e(c_in: int, pool: str) -> Mixed:
    row, column = (1, 3), (3, 1)
    return Mixed([["1x1"], ["3x3_1", ("3x3_2a", "3x3_2b")], ["3x3dbl_1", "3x3dbl_2", ("3x3dbl_3a", "3x3dbl_3b")],
                  [pool, "_pool"]], branch1x1=(c_in, 320, 1), branch3x3_1=(c_in, 384, 1), branch3x3_2a=(384, 384, row),
                 branch3x3_2b=(384, 384, column), branch3x3dbl_1=(c_in, 448, 1), branch3x3dbl_2=(448, 384, 3),
                 branch3x3dbl_3a=(384, 384, row), branch3x3dbl_3b=(384, 384, column), branch_pool=(c_in, 192, 1))


class Inception(nn.Module):
    """FID's eye (Szegedy et al. 2015, as Heusel et al. 2017 use it): pictures (N, 3, H, W) in [-1, 1] -> (N, 2048).

    TensorFlow's network of 2015-12-05 under torchvision's names, as pytorch-fid ports it: average pools do not count
    their padding, and the last block pools by maximum. Pictures are brought to 299 px bilinearly, without prefilter.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = inception_conv(3, 32, 3, 2)                                   # (N, 32, 149, 149)
        self.Conv2d_2a_3x3 = inception_conv(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = inception_conv(32, 64, 3)                                     # 147, then pooled to 73
        self.Conv2d_3b_1x1 = inception_conv(64, 80, 1)
        self.Conv2d_4a_3x3 = inception_conv(80, 192, 3, padding=False)                     # 71, then pooled to 35
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = Mixed([["3x3"], ["3x3dbl_1", "3x3dbl_2", "3x3dbl_3"], ["half"]],   # (N, 768, 17, 17)
                              branch3x3=(288, 384, 3, 2), branch3x3dbl_1=(288, 64, 1), branch3x3dbl_2=(64, 96, 3),
                              branch3x3dbl_3=(96, 96, 3, 2))
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(mixed_c, (128, 160, 160, 192))
        self.Mixed_7a = Mixed([["3x3_1", "3x3_2"], [f"7x7x3_{k}" for k in range(1, 5)], ["half"]],  # (N, 1280, 8, 8)
                              branch3x3_1=(768, 192, 1), branch3x3_2=(192, 320, 3, 2), branch7x7x3_1=(768, 192, 1),
                              branch7x7x3_2=(192, 192, (1, 7)), branch7x7x3_3=(192, 192, (7, 1)),
                              branch7x7x3_4=(192, 192, 3, 2))
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, "avg"), mixed_e(2048, "max")          # (N, 2048, 8, 8)
        self.fc = nn.Linear(2048, 1008)  # in the file, and not asked

    def forward(self, x):
        check_pictures(x, 1)
        x = resized(x, 299)
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name, block in self.named_children():
            x = block(x) if name.startswith("Mixed") else x
        return x.mean((2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# their weights

# torchvision's VGG files hold a classifier, too
CLASSIFIER = {f"classifier.{i}.{name}" for i in (0, 3, 6) for name in ("weight", "bias")}


def vgg19(device, path: str | Path | None = None) -> VGG19Features:
    """Frozen, with torchvision's weights. path: your copy of the file; None fetches it. InputError: see fetch, load."""
    path = fetch("vgg19", path)
    state = {k: v for k, v in read_weights(path).items() if k not in CLASSIFIER}
    return load(VGG19Features, state, path, device)


def lpips(device, path: str | Path | None = None, heads: str | Path | None = None) -> LPIPS:
    """Frozen. path: your copy of torchvision's VGG16, heads: of the authors' vgg.pth; None fetches them."""
    path, heads = fetch("vgg16", path), fetch("lpips_heads", heads)
    state = {f"scaling_layer.{k}": torch.tensor(v)[None, :, None, None] for k, v in LPIPS.SCALING.items()}
    for key, value in read_weights(path).items():
        index = re.match(r"features\.(\d{1,2})\.", key)
        if index:
            part = 1 + sum(int(index[1]) >= end for end in LPIPS.ENDS)
            key = key.replace("features.", f"net.slice{part}.")
        if key not in CLASSIFIER:
            state[key] = value
    for key, value in read_weights(heads).items():                                         # lin0.model.1.weight ..
        state |= {key: value, key.replace("lin", "lins.", 1): value}
    return load(LPIPS, state, f"{path} with {heads}", device)


def arcface(device, path: str | Path | None = None, template: str = "ffhq") -> ArcFace:
    """Frozen, for pictures of a crop template. path: your copy (pSp's model_ir_se50.pth is the same); None fetches it."""
    path = fetch("arcface", path)
    return load(lambda: ArcFace(template), read_weights(path), path, device)


def syncnet_v2(device, path: str | Path | None = None) -> SyncNetV2:
    """Frozen. path: your copy; None fetches it."""
    path = fetch("syncnet_v2", path)
    return load(SyncNetV2, read_weights(path), path, device)


def wav2lip_expert(device, path: str | Path | None = None) -> Wav2LipExpert:
    """Frozen. path: your copy; None fetches it. The file is a training checkpoint: weights under 'state_dict'."""
    path = fetch("wav2lip_expert", path)
    with refusing(path, "not the Wav2Lip expert"):
        return load(Wav2LipExpert, read_weights(path)["state_dict"], path, device)


def inception(device, path: str | Path | None = None) -> Inception:
    """Frozen. path: your copy of pytorch-fid's file; None fetches it."""
    path = fetch("inception", path)
    return load(Inception, read_weights(path), path, device)


def load(make, state: dict, source, device) -> nn.Module:
    """The judge that make() builds with its weights, strictly (see load_strictly); it is frozen and put on the device."""
    return freeze(load_strictly(make, state, source)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# the downloader

@dataclass(frozen=True)
class Published:
    """A file to fetch: its name in the cache, its hash or the beginning of it, its bytes (None: unknown), where it is"""

    file: str
    sha256: str
    size: int | None
    urls: tuple[str, ...]


LPIPS_COMMIT = "082bb24f84c091ea94de2867d34c4544f68e0963"
BLAZEFACE_URL = "https://github.com/hollance/BlazeFace-PyTorch/raw/master"
PUBLISHED = {
    "vgg19": Published(
        "vgg19-dcbb9e9d.pth", "dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44", 574673361,
        ("https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",)),
    "vgg16": Published(
        "vgg16-397923af.pth", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", 553433881,
        ("https://download.pytorch.org/models/vgg16-397923af.pth",)),
    "lpips_heads": Published(
        "lpips_v0.1_vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", 7289,
        (f"https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/{LPIPS_COMMIT}/lpips/weights/v0.1/vgg.pth",)),
    "arcface": Published(
        "recognition_arcface_ir_se50.pth", "a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28", 175367323,
        ("https://github.com/xinntao/facexlib/releases/download/v0.1.0/recognition_arcface_ir_se50.pth",)),
    "syncnet_v2": Published(
        "syncnet_v2.model", "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442", 54573114,
        ("https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
         "https://huggingface.co/ByteDance/LatentSync-1.6/resolve/main/auxiliary/syncnet_v2.model")),
    # hollance/BlazeFace-PyTorch, Apache-2.0; face-alignment fetches the same files but does not check them
    "blazeface": Published(
        "blazeface.pth", "54ecff653feaaaf1f7d44b6aff28fd2fc50e483a4e847563b6dd261369c43ba4", 420224,
        (f"{BLAZEFACE_URL}/blazeface.pth",)),
    "blazeface_anchors": Published(  # of both models
        "anchors.npy", "a10bb2fb93ab54ca426d6c750bfc3aad685028a16dcf231357d03694f261fd95", 28800,
        (f"{BLAZEFACE_URL}/anchors.npy",)),
    "blazeface_back": Published(
        "blazefaceback.pth", "e2c03bb3ae45e769eaaa0a7cc7d4f61f54a5e3fbae6367d870166702e7022b11", 594825,
        (f"{BLAZEFACE_URL}/blazefaceback.pth",)),
    "wav2lip_expert": Published(  # about 197 MB; the hash is confirmed by one source only
        "lipsync_expert.pth", "9b9936c721696446eeed353032cab242a8cf0eed8c46cde540366f6ae5493be5", None,
        ("https://huggingface.co/camenduru/Wav2Lip/resolve/main/checkpoints/lipsync_expert.pth",
         "https://huggingface.co/Nekochu/Wav2Lip/resolve/main/lipsync_expert.pth")),
    "fan": Published(  # 100 MB, landmarks, for face-alignment; of this hash and the next the file's name tells the
        "2DFAN4-11f355bf06.pth.tar", "11f355bf06", None,  # beginning, as is torch.hub's custom
        ("https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar",)),
    "inception": Published(  # 96 MB, FID's
        "pt_inception-2015-12-05-6726825d.pth", "6726825d", None,
        ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",)),
}
TIMEOUT = (10, 30)  # seconds to connect, and without a byte; ours
ABANDONED = 120  # seconds; ours: a part file this long untouched, four timeouts, belongs to no living download
BLOCK = 1 << 14  # bytes; ours: what a cut loses at most
LARGEST = 1 << 30  # bytes; ours: the end of patience where the size is unknown


def fetch(name: str, path: str | Path | None = None) -> Path:
    """Where the published file `name` of PUBLISHED lies: `path`, the user's own copy, or the cache, fetched if need be.

    What is in the cache is checked by SHA256 every time (a second for 500 MB), what is damaged there replaced. A cut
    download is resumed, by this call or a later one; only a file with the right hash gets its name, by os.replace, so
    that any number of processes may fetch at once.

    Raises:
        InputError: path is no file; or the file cannot be had, with its URL and where to put it by hand.
    """
    if path is not None:
        return check_file(path)
    pin = PUBLISHED[name]
    target = checkpoints_dir() / pin.file
    part, failures = None, []
    try:
        if matches(target, pin):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        part = claim_part(target)
        for url in pin.urls:
            try:
                fetch_from(url, part, pin)
                os.replace(part, target)
                return target
            except (requests.RequestException, ValueError) as error:
                failures.append(f"{urlsplit(url).netloc}: {explain(error)}")
    except OSError as error:  # disk full, read-only, no permission: a part is of no use there
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink()
        failures.append(f"{target.parent} cannot be written ({error.strerror or error})")
    finally:
        if part is not None and part.exists():  # cut, or Ctrl-C: the next call may take it at once
            os.utime(part, (0, 0)) if part.stat().st_size else part.unlink()
    state = "damaged" if target.is_file() else "missing"
    raise InputError(f"{pin.file} is {state} and could not be fetched ({'; '.join(failures)}): "
                     f"download {pin.urls[0]} and save it as {target}")


def matches(path: Path, pin: Published) -> bool:
    """Is this the published file?"""
    if not path.is_file() or pin.size not in (None, path.stat().st_size):
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(pin.sha256)


def claim_part(target: Path) -> Path:
    """A part file of our own beside the target: an abandoned one, taken over by its renaming, or a new one."""
    own = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    for left in sorted(target.parent.glob(f"{target.name}.*.part")):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.rename(own)
                os.utime(own)
                return own
    own.touch(exist_ok=False)
    return own


def fetch_from(url: str, part: Path, pin: Published):
    """Fills `part` from one URL until its hash is right; resumes as long as every attempt brings something."""
    fresh, whole = part.stat().st_size == 0, False
    while not matches(part, pin):
        if whole:
            os.truncate(part, 0)
            if fresh:
                raise ValueError(f"what came has another SHA256 than {pin.sha256}")
            fresh, whole = True, False  # the beginning, left by another run or URL, may be at fault: once more from 0
        before = part.stat().st_size
        try:
            stream(url, part, pin)
            whole = True
        except requests.RequestException:
            if part.stat().st_size <= before:
                raise


def stream(url: str, part: Path, pin: Published):
    """One request, appended to what `part` holds where the server can do that. ValueError: this is not the file."""
    have = part.stat().st_size
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # no such range: what we have is not the beginning of this file
            os.truncate(part, 0)
            return
        answer.raise_for_status()
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise ValueError("a web page came in place of the file")
        partial = answer.status_code == 206
        if partial and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ValueError("another part came than was asked for")
        start, length = have if partial else 0, int(answer.headers.get("Content-Length", 0))
        if pin.size and length and start + length != pin.size:
            raise ValueError(f"{start + length} bytes are offered, expected {pin.size}")
        if length > shutil.disk_usage(part.parent).free:
            raise OSError(errno.ENOSPC, f"disk full: {length / 1e6:.0f} MB are needed")
        bar = tqdm(total=start + length or pin.size, initial=start, desc=pin.file, unit="B", unit_scale=True)
        with open(part, "r+b") as file, bar:
            file.truncate(start)
            file.seek(start)
            for block in answer.iter_content(BLOCK):
                if file.tell() + len(block) > (pin.size or LARGEST):
                    file.truncate(0)
                    raise ValueError("more came than the file has")
                file.write(block)
                bar.update(len(block))


def explain(error: Exception) -> str:
    """A network's failure in a few words"""
    if isinstance(error, requests.HTTPError):
        return f"HTTP {error.response.status_code}"
    return "no connection, or cut" if isinstance(error, requests.RequestException) else str(error)
