"""PC-AVS: identity from a photo, lips from speech, head pose from a second video as 12 numbers.

Zhou et al., "Pose-Controllable Talking Face Generation by Implicitly Modularized Audio-Visual Representation", CVPR 2021
(arXiv 2104.11116). The four networks have the names and shapes of the published files latest_net_{G,V,E,A_sync}.pth.

    python pcavs.py sample examples/face.png examples/speech.wav --out toy.mp4   # shipped toy weights, 100 frames, 2 s
    python pcavs.py train --bf16                                  # the toy world at 32 px; docs/pcavs.md has the result

Differs from the authors' code:
- Their video starts at the third frame and their sound at the first, so the video leads by 80 ms. Ours is in step.
- They run V and A_sync once, E and G twice a frame. Ours runs V once a photo, E once a pose frame, A_sync and G once.
- Noise is drawn once a clip, not for every frame. The landmarks of the alignment are those of landmarks.py, not FAN's.
- They published no training code. Ours has their losses. The adversary and VGG are off by default.

Axes: B clips, K frames of each, N = B K, P pose numbers, S mel steps.
"""

import copy
import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from face_alignment.models.fan import ConvBlock
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import judges
from audio import LWS_BANDS, LWS_STEPS, lws_mel, lws_windows, n_frames
from checkpoint import (
    StepTimer, add_run_options, claim_output, cosine_warmup, count_parameters, fp16_state_dict, load_checkpoint,
    load_frozen, load_strictly, open_log, optimiser_step, pick_device, progress_bar, read_weights, restore_run,
    resume_options, save_checkpoint, save_run, terms_to_floats, update_ema, warn_of_slow_bf16, wrap_errors,
    write_log)
from data import Pack, add_split_options, balance_people, batches, open_packs, split, to_flipped_tensor
from faces import (
    PCAVS_FILE, PCAVS_INPUT, PCAVS_POINTS, TEMPLATES, align_frames, crop_face, eyes_and_mouth, fill_missing, mask_mouth,
    middle_square, similarity)
from initialise import reduced_rank_regression
from landmarks import find_landmarks, load_landmarks, track_scene
from losses import discriminator_loss, generator_loss, perceptual_loss, r1_penalty, reconstruction_loss
from media import (
    FPS, VIDEO_SUFFIXES, InputError, Parser, check_file, check_output, is_grey, load_audio, load_photo, make_folder,
    probe, read_video, run, to_tensor, to_uint8, write_video)
from motion import ping_pong
from report import image_grid, write_report
from sample import SEARCH_HEIGHT, driving_crops, find_photo_face, is_drawn, to_grey
from stylegan2 import Discriminator, StyledLayers
from toyfaces import open_toy_pack
from vision import conv_norm, shortcut

# the authors' files; prefixes of the weights that inference does not use: heads for training, G's mapping and constant
PUBLISHED = {"G": ("latest_net_G.pth", ("style.", "input.", "noises.")), "V": ("latest_net_V.pth", ("fc.", "model.fc.")),
             "E": ("latest_net_E.pth", ("classifier.", "mouth_fc.", "headpose_fc.")),
             "A": ("latest_net_A_sync.pth", ("fc.",))}
TOY_WEIGHTS = Path(__file__).resolve().parent / "weights/pcavs_toy.pt"


@dataclass
class Config:
    """Shape of the four networks. The defaults are the published ones. Saved in every checkpoint as a plain dict."""
    size: int = 224
    template: str = "voxceleb"                 # crop of the images: the authors', or one of faces.TEMPLATES
    mask: bool = False                         # ours: E's input has no mouth, so that the pose code cannot carry lips
    noise: bool = True                         # the generator's noise; off at toy sizes, as in fusion.Config
    v_stem: int = 4                            # V: downsampling of its first layers; its four stages downsample by 8
    v_base: int = 64                           # channels of the first stage; the identity vector has 32 times as many
    v_groups: int = 32
    v_blocks: tuple = (3, 4, 6, 3)
    e_stem: int = 4                            # E: downsampling before the hourglass
    e_width: int = 256
    e_depth: int = 4                           # of the hourglass
    e_maps: int = 68                           # heat maps
    dropout: float = 0.5                       # in the hourglass
    a_filters: tuple = (32, 64, 128, 256)      # A_sync: channels of its stages
    a_blocks: tuple = (3, 4, 6, 3)
    a_hidden: int = 128                        # width of its attention
    hidden: int = 512                          # width of the features of E and A_sync
    mouth: int = 500                           # width of the mouth code
    pose: int = 12                             # P, width of the pose code
    channels: tuple = (512, 512, 512, 512, 256, 128)  # G: from the identity map's size up
    mouth_gain: float = 1.2                    # factor on the speech feature at inference, as published

    @classmethod
    def at(cls, size: int, template: str = "toy") -> "Config":
        """The dial of `train`: 16 (tests), 32 and 64 for a CPU, 128 for a GPU."""
        common = dict(mask=True, noise=False, v_base=8, v_groups=8, v_blocks=(1, 1, 1, 1), e_width=32, e_depth=2,
                      e_maps=16, dropout=0.0, a_filters=(16, 32, 32, 64), a_blocks=(1, 1, 1, 1), a_hidden=32,
                      hidden=128, mouth=32, mouth_gain=1.0)
        by_size = {16: dict(v_stem=1, e_stem=2, channels=(64, 64, 32, 16)),
                   32: dict(v_stem=1, e_stem=2, channels=(128, 128, 64, 32)),
                   64: dict(v_stem=2, channels=(128, 128, 128, 64, 32)),
                   128: dict(v_base=16, e_width=128, e_depth=3, e_maps=32, hidden=256, mouth=128,
                             channels=(256, 256, 256, 128, 64, 32))}
        return cls(**dict(size=size, template=template) | common | by_size[size])


# ---------------------------------------------------------------------------------------------------- the four networks

def resnet_stages(block, c_in: int, widths, depths) -> dict:
    """layer1, layer2, ... of a ResNet, each of `depths` blocks. All but layer1 halve the size in their first block."""
    layers = {}
    for i, (c_out, depth) in enumerate(zip(widths, depths), 1):
        first = block(c_in, c_out, 1 if i == 1 else 2)
        layers[f"layer{i}"] = nn.Sequential(first, *(block(c_out, c_out, 1) for _ in range(depth - 1)))
        c_in = c_out
    return layers


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1 beside a shortcut: (N, C, H, W) -> (N, C', H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int):
        super().__init__()
        width = c_out // 2                                                      # 32x4d: twice ResNet's
        self.conv1, self.bn1 = conv_norm(c_in, width, 1)
        self.conv2, self.bn2 = conv_norm(width, width, 3, stride, groups)
        self.conv3, self.bn3 = conv_norm(width, c_out, 1)
        self.downsample = shortcut(c_in, c_out, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class IdentityEncoder(nn.Module):
    """V, ResNeXt50 32x4d (Xie et al. 2017): photo (B, 3, H, W) -> vector (B, 32 base), map (B, C, start, start)."""

    def __init__(self, c: Config):
        super().__init__()
        stem = dict(conv1=nn.Conv2d(3, c.v_base, 7, 2 if c.v_stem > 1 else 1, 3, bias=False),
                    bn1=nn.BatchNorm2d(c.v_base), relu=nn.ReLU(),
                    pool=nn.MaxPool2d(3, 2, 1) if c.v_stem == 4 else nn.Identity())
        widths, block = [c.v_base * k for k in (4, 8, 16, 32)], partial(Bottleneck, groups=c.v_groups)
        self.model = nn.Sequential(OrderedDict(stem | resnet_stages(block, c.v_base, widths, c.v_blocks)))
        self.conv1x1 = nn.Conv2d(widths[-1], c.channels[0], 1)                  # to the width of G

    def forward(self, x):
        x = self.model(x.contiguous(memory_format=torch.channels_last))         # (B, 32 base, H/(8 stem), W/(8 stem))
        return x.mean((2, 3)), self.conv1x1(x)


class Hourglass(nn.Module):
    """(N, C, H, W) -> the same shape: down `depth` times and up again, with a branch across at every size. Its blocks are
    FAN's ConvBlock: three 3x3 convolutions with concatenated outputs, beside a shortcut."""

    def __init__(self, width: int, depth: int, dropout: float):
        super().__init__()
        self.depth, self.dropout = depth, nn.Dropout(dropout)
        for level in range(1, depth + 1):
            for name in ("b1", "b2", "b3") if level > 1 else ("b1", "b2", "b2_plus", "b3"):
                self.add_module(f"{name}_{level}", ConvBlock(width, width))

    def forward(self, x, level=None):
        level = level or self.depth
        b1, b2, b3 = (self.get_submodule(f"b{i}_{level}") for i in (1, 2, 3))
        across = self.dropout(b1(x))
        low = b2(F.max_pool2d(x, 2))
        low = b3(self(low, level - 1) if level > 1 else self.b2_plus_1(low))
        return across + F.interpolate(low, across.shape[2:], mode="bilinear", align_corners=False)


class NonIdentityEncoder(nn.Module):
    """E, FAN with one hourglass (Bulat & Tzimiropoulos 2017), then a mouth and a pose head: frames (N, 3, H, W) -> pose
    code (N, P). Training and the mouth code call its modules one by one."""

    def __init__(self, c: Config):
        super().__init__()
        h, w, pool = c.hidden, c.e_width, nn.MaxPool2d(2) if c.e_stem == 4 else nn.Identity()
        self.model = nn.Sequential(OrderedDict(                                 # FAN: (N, 3, H, W) -> feature (N, hidden)
            conv1=nn.Conv2d(3, w // 4, 7, 2, 3), bn1=nn.BatchNorm2d(w // 4), relu1=nn.ReLU(),
            conv2=ConvBlock(w // 4, w // 2), pool=pool, conv3=ConvBlock(w // 2, w // 2), conv4=ConvBlock(w // 2, w),
            m0=Hourglass(w, c.e_depth, c.dropout), top_m_0=ConvBlock(w, w),     # (N, w, H/stem, W/stem)
            conv_last0=nn.Conv2d(w, w, 1), bn_end0=nn.BatchNorm2d(w), relu2=nn.ReLU(),
            l0=nn.Conv2d(w, c.e_maps, 1), bn5=nn.BatchNorm2d(c.e_maps), relu3=nn.ReLU(),  # (N, 68, H/stem, W/stem)
            conv6=nn.Conv2d(c.e_maps, 1, 3, 2, 1), flatten=nn.Flatten(), relu4=nn.ReLU(),  # a map of H/(2 stem)
            fc=nn.Linear((c.size // (2 * c.e_stem)) ** 2, h)))
        self.to_mouth = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h))
        self.mouth_embed = nn.Sequential(nn.ReLU(), nn.Linear(h, c.mouth))
        self.to_headpose = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h))
        self.headpose_embed = nn.Sequential(nn.ReLU(), nn.Linear(h, c.pose))
        self.config = c

    def pose_input(self, frames):
        """Frames (N, 3, H, W), with a masked mouth if the config says so."""
        frames = mask_mouth(frames, self.config.template) if self.config.mask else frames
        return frames.contiguous(memory_format=torch.channels_last)

    def forward(self, frames):
        return self.headpose_embed(self.to_headpose(self.model(self.pose_input(frames))))


class SEBlock(nn.Module):
    """(N, C, M, S) -> (N, C', M/stride, S/stride). As published: ReLU before BatchNorm, a gate of reduction 8."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(c_in, c_out, 3, stride)
        self.conv2, self.bn2 = conv_norm(c_out, c_out, 3)
        gate = nn.Sequential(nn.Linear(c_out, c_out // 8), nn.ReLU(), nn.Linear(c_out // 8, c_out), nn.Sigmoid())
        self.se = nn.ModuleDict(dict(fc=gate))                                  # se.fc: the published name
        self.downsample = shortcut(c_in, c_out, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(torch.relu(self.conv1(x)))))
        gate = self.se["fc"](y.mean((2, 3)))                                    # (N, C')
        return torch.relu(y * gate[:, :, None, None] + self.downsample(x))


class SpeechEncoder(nn.Module):
    """A_sync, a ResNet with squeeze and excitation (Chung et al. 2020), then attention over time: mel windows (N, 1, 80,
    20) of `lws_windows` -> speech feature (N, hidden)."""

    def __init__(self, c: Config):
        super().__init__()
        filters, flat = c.a_filters, c.a_filters[-1] * LWS_BANDS // 8
        self.model = nn.ModuleDict(dict(
            conv1=nn.Conv2d(1, filters[0], 3, padding=1), bn1=nn.BatchNorm2d(filters[0]),
            **resnet_stages(SEBlock, filters[0], filters, c.a_blocks),
            attention=nn.Sequential(nn.Conv1d(flat, c.a_hidden, 1), nn.ReLU(), nn.BatchNorm1d(c.a_hidden),
                                    nn.Conv1d(c.a_hidden, flat, 1), nn.Softmax(2)),
            fc=nn.Linear(flat, c.hidden)))

    def forward(self, mel):
        assert mel.shape[1:] == (1, LWS_BANDS, LWS_STEPS), f"mel window is {tuple(mel.shape)}, expected (N, 1, 80, 20)"
        m = self.model
        x = m.layer1(m.bn1(torch.relu(m.conv1(mel))))
        x = m.layer4(m.layer3(m.layer2(x))).flatten(1, 2)                       # (N, 10 C, 3): 3 steps of time
        return m.fc((x * m.attention(x)).sum(2))


class FaceGenerator(StyledLayers):
    """G: StyleGAN2's layers from the identity map up, with one style for all layers."""

    def __init__(self, c: Config):
        super().__init__()
        self.start = c.size // (8 * c.v_stem)                                   # edge of the identity map, 7 of 224 px
        self.dim = 32 * c.v_base + c.mouth + c.pose                             # D: identity, mouth and pose; 2560
        self.add_layers(c.channels, self.dim)

    def draw_noise(self, generator=None) -> list:
        """One map (1, 1, H, W) for each 3x3 layer, coarse to fine."""
        sizes = [self.start * 2 ** ((i + 1) // 2) for i in range(len(self.convs) + 1)]
        return [torch.randn(1, 1, s, s, generator=generator) for s in sizes]

    def forward(self, style, identity_map, noise="random"):
        """style (N, D), identity_map (N, C, start, start), noise: maps, "random" or "off" -> (N, 3, H, W)"""
        assert style.shape[1] == self.dim, f"style is {tuple(style.shape)}, expected (N, {self.dim})"
        return torch.tanh(self.synthesise(identity_map, [style] * (len(self.convs) + 2), noise))


class PCAVS(nn.Module):
    kind = "pcavs"
    NETWORKS = dict(V=IdentityEncoder, E=NonIdentityEncoder, A=SpeechEncoder, G=FaceGenerator)

    def __init__(self, config: Config, **networks):
        """networks: V, E, A and G, or none of them to make new ones"""
        super().__init__()
        self.config = config
        for name, network_class in self.NETWORKS.items():
            setattr(self, name, networks.get(name) or network_class(config))

    def decode(self, identity, speech, pose, noise="random"):
        """identity: output of V for 1 or N photos, speech (N, hidden), pose (N, P) -> frames (N, 3, H, W) in (-1, 1)"""
        vector, identity_map = (x.expand(len(pose), *x.shape[1:]) for x in identity)
        style = torch.cat([vector.float(), self.E.mouth_embed(speech).float(), pose.float()], 1)      # (N, D)
        return self.G(style, identity_map.contiguous(memory_format=torch.channels_last), noise)

    @torch.inference_mode()
    def animate(self, photo, mel, n: int, pose, noise="off", bf16=False, batch: int = 0):
        """Frames 0 .. n-1 of a talking face, as a stream of (b, 3, H, W) in (-1, 1). photo (3, H, W) in [-1, 1]. mel
        (S, 80) of `lws_mel`. pose: iterable of frames (3, H, W); a short clip is played forwards and backwards. batch:
        frames at once; 0 is what fits into a cache (4 at 224 px), or 16 on a GPU."""
        c, autocast = self.config, torch.autocast(photo.device.type, torch.bfloat16, enabled=bf16)
        batch = batch or (16 if photo.is_cuda else max(4, min(64, (448 // c.size) ** 2)))
        frames, codes = itertools.islice(pose, n), []
        with autocast:
            identity = self.V(photo[None])
            while chunk := list(itertools.islice(frames, batch)):
                codes.append(self.E(torch.stack(chunk).to(photo)))
        codes = torch.cat(codes)                                                # (T, P)
        codes = codes[[ping_pong(k, len(codes)) for k in range(n)]]             # (n, P)
        for first in range(0, n, batch):
            windows = lws_windows(mel, range(first, min(first + batch, n)))
            with autocast:
                speech = c.mouth_gain * self.A(torch.from_numpy(windows).to(photo))
                fake = self.decode(identity, speech, codes[first:first + batch], noise)
            yield fake


# -------------------------------------------------------------------------------------------------------------- weights

def load_published(folder: Path, config: Config | None = None, device="cpu") -> PCAVS:
    """The networks of the authors' bare state_dicts. InputError names the file with a missing or wrong weight."""
    config, networks = config or Config(), {}
    for letter, (name, unused_prefixes) in PUBLISHED.items():
        state = read_weights(folder / name)
        state = {key: value for key, value in state.items() if not key.startswith(unused_prefixes)}
        for key, value in state.items():
            if key.endswith("activate.bias") and torch.is_tensor(value):
                state[key] = value.flatten()                                    # (1, C, 1, 1) there, (C,) here
        networks[letter] = load_frozen(partial(PCAVS.NETWORKS[letter], config), state, folder / name, device)
    return PCAVS(config, **networks).eval()


def load_pcavs(path: str | Path, device="cpu") -> PCAVS:
    """Networks for inference, from a folder of the published files or a weights.pt of `train`. InputError: damaged."""
    if Path(path).is_dir():
        return load_published(Path(path), device=device)
    checkpoint = load_checkpoint(path, "pcavs")
    with wrap_errors(path, "not a network of this version"):
        model = load_strictly(lambda: PCAVS(Config(**checkpoint["config"])), checkpoint["networks"]["model"], path)
    return model.to(device).eval()


# -------- the networks' input: the authors' alignment for published weights, a template's crop for weights of `train`

def list_images(path: Path) -> list[Path]:
    """The images of a folder, or the path itself if it is an image. Empty for a video."""
    files = path.iterdir() if path.is_dir() else [path]
    return sorted(file for file in files if file.suffix.lower() in (".jpg", ".jpeg", ".png"))


def read_frames(path: Path, n: int | None, height: int | None = None):
    """The first n images, or frames of a video at most `height` pixels high: a stream of uint8 (H, W, 3)."""
    images = list_images(path)
    if images:
        return map(load_photo, images[:n])
    return itertools.islice(read_video(path, height and min(height, probe(path).height)), n)


def align_clip(path: Path, n: int | None, size: int, box: tuple = PCAVS_INPUT):
    """align_frames of the first n frames of a clip, which is read twice. InputError: no face, or in less than half."""
    frames = read_frames(path, n, SEARCH_HEIGHT)
    first = next(frames)
    landmarks = track_scene(load_landmarks(), itertools.chain([first], frames), 1)              # (T, 68, 2)
    points = eyes_and_mouth(landmarks) / len(first)                             # (T, 3), complex
    if np.isnan(points).all():
        raise InputError(f"{path}: no upright face was found; crop the clip and give --aligned")
    has_face = ~np.isnan(points[:, 2])
    if 2 * has_face.sum() < len(points):
        raise InputError(f"{path}: a face in {has_face.sum()} of {len(points)} frames")
    points = fill_missing(points, has_face)
    scale = abs(similarity(points.mean(0), PCAVS_POINTS)[0])
    height = max(16, round(2 * scale * size / (box[2] - box[0])))               # twice the resolution of the crop
    return align_frames(read_frames(path, n, height), points, size, box)


def crop_aligned(frame: np.ndarray, config: Config) -> np.ndarray:
    """An aligned image, uint8 (H, W, 3) -> uint8 (size, size, 3): the authors' part of it, or its middle square."""
    H, W = frame.shape[:2]
    box = middle_square(frame)
    if config.template == "voxceleb":
        box = tuple(v / 224 * side for v, side in zip(PCAVS_INPUT, (W, H, W, H)))
    return crop_face(frame, box, config.size)


def crop_clip(path: str | Path, n: int, config: Config, aligned: bool = False):
    """The first n images, or frames of a video, as the networks' input: a stream of uint8 (size, size, 3). Images count
    as aligned. aligned: so do videos, for published weights. InputError, before the first frame: no face."""
    path, size, published = Path(path), config.size, config.template == "voxceleb"
    if list_images(path) or (aligned and published):
        return (crop_aligned(frame, config) for frame in read_frames(path, n))
    if published:
        return align_clip(path, n, size)
    return driving_crops(path, n, size, config.template)[1]


def crop_photo(photo: np.ndarray, args, config: Config) -> np.ndarray:
    """A photo as V's input, uint8 (size, size, 3). InputError: no face."""
    published = config.template == "voxceleb"
    if args.aligned and published:
        return crop_aligned(photo, config)
    if config.template == "toy" and not is_drawn(photo):
        print(f"{args.weights}: these weights draw the toy world only; {args.face} is not a drawing of it")
    photo, box, description = find_photo_face(photo, args, "face" if published else config.template)
    print(f"{args.face}: {description}")
    if not published:
        return crop_face(photo, box, config.size)
    points = eyes_and_mouth(find_landmarks(load_landmarks(), photo, box))
    return next(align_frames([photo], points[None] / len(photo), config.size))


def align(args):
    """Writes aligned frames as CLIP_cropped/000000.jpg .., and a file of pairs in which each video drives itself."""
    lines, csv = [], args.csv and check_output(args.csv, args.overwrite)
    if csv and any(" " in clip for clip in args.clips):
        raise InputError("--csv: names in the authors' file of pairs contain no spaces")
    folders = [Path(clip).with_name(f"{Path(clip).stem}_cropped") for clip in args.clips]
    if len(set(folders)) < len(folders):
        raise InputError("two of the clips have the same folder and name, and would share one folder of images")
    for path, out in zip(map(Path, args.clips), folders):
        if out.exists() and not args.overwrite:
            raise InputError(f"{out}: exists; give --overwrite to replace its images")
        frames = align_clip(path, None, 224, PCAVS_FILE)
        for image in list_images(make_folder(out)):                             # of an earlier, longer clip
            image.unlink()
        for k, frame in enumerate(tqdm(frames, path.name, unit="frame", disable=None)):
            Image.fromarray(frame).save(out / f"{k:06d}.jpg", quality=95)
        print(f"{out}: {k + 1} aligned images")
        if not list_images(path):                                               # images have no sound
            lines.append(f"{out} 1 {out} {k + 1} {path} {out} {k + 1} None\n")
    if csv:
        csv.write_text("".join(lines))


# ----------------------------------------------------- a photo, speech, a pose clip -> a talking face; and pairs of clips

def render(model, crop, wav, pose_crops, args, device):
    """crop uint8 (size, size, 3), wav (n,), pose_crops: an iterable -> a stream of frames, uint8 (size, size, 3)."""
    maps = model.G.draw_noise(torch.Generator().manual_seed(args.seed))
    noise = [x.to(device) for x in maps] if model.config.noise else "off"
    photo, n = to_tensor(crop).to(device), n_frames(len(wav))
    for frames in model.animate(photo, lws_mel(wav), n, map(to_tensor, pose_crops), noise, args.bf16):
        with wrap_errors(args.weights, "the networks fail"):
            frames = to_uint8(frames)                                           # (b, size, size, 3)
        yield from frames


def sample(args):
    start = time.perf_counter()
    out = check_output(args.out, args.overwrite, VIDEO_SUFFIXES, (args.face, args.speech, args.pose))
    photo, wav, device = load_photo(args.face), load_audio(args.speech), pick_device(args.device)
    model = load_pcavs(args.weights, device)
    crop, n = crop_photo(photo, args, model.config), n_frames(len(wav))
    pose = crop_clip(args.pose, n, model.config, args.aligned) if args.pose else [crop]
    pose = list(pose) if args.grid else pose
    frames = render(model, crop, wav, pose, args, device)
    if is_grey(photo):
        frames = map(to_grey, frames)
    if args.grid:
        frames = (np.hstack([crop, pose[ping_pong(k, len(pose))], frame]) for k, frame in enumerate(frames))
    write_video(out, frames, n, (args.speech, len(wav)), args.overwrite)
    print(f"{out}: {n} frames, {n / FPS:.2f} s; {n / (time.perf_counter() - start):.1f} frames/s end to end")


def read_pairs(path: Path) -> list[list]:
    """The authors' csv -> [photo, pose or None, speech, real frames or None] of each line: fields 0, 2, 4 and 5."""
    lines, pairs = check_file(path).read_text(errors="replace").splitlines(), []
    for i, fields in enumerate(map(str.split, lines), start=1):
        if not fields:
            continue
        if len(fields) != 8:
            raise InputError(f"{path}: line {i} has {len(fields)} fields, expected 8")
        pairs.append([])
        for k in (0, 2, 4, 5):
            candidates = [p for p in (Path(fields[k]), path.parent / fields[k]) if p.exists()]
            if not candidates and (fields[k] != "None" or k in (0, 4)):
                raise InputError(f"{path}: line {i}: {fields[k]}: no such file or folder")
            pairs[-1].append(candidates[0] if candidates else None)
    return pairs


def generate_pairs(args):
    """Generates each clip from its own first frame, sound and head pose, or each line of a file of pairs."""
    device = pick_device(args.device)
    if args.clips[0].endswith(".csv"):
        if len(args.clips) > 1:
            raise InputError(f"{args.clips[1]}: a file of pairs, {args.clips[0]}, has to stand alone")
        pairs, args.aligned = read_pairs(Path(args.clips[0])), True             # the authors' pairs are aligned
    else:
        pairs = [[check_file(clip)] * 4 for clip in args.clips]
    model = load_pcavs(args.weights, device)
    crops = partial(crop_clip, config=model.config, aligned=args.aligned)
    fake_folder, real_folder = (make_folder(Path(args.out).absolute() / name) for name in ("fake", "real"))
    names = [f"{i:03d}_{speech.stem}.mp4" for i, (_, _, speech, _) in enumerate(pairs, start=1)]
    for file in (*fake_folder.glob("*.mp4"), *real_folder.glob("*.mp4")):
        if file.name not in names:
            raise InputError(f"{file}: is of another run and would be measured: remove it or give another --out")
    for name, (photo, pose, speech, real) in zip(names, pairs):
        wav, crop = load_audio(speech), next(crops(photo, 1))
        n, sound = n_frames(len(wav)), (speech, len(wav))
        frames = render(model, crop, wav, crops(pose, n) if pose else [crop], args, device)
        write_video(fake_folder / name, frames, n, sound, args.overwrite)
        if real:
            write_video(real_folder / name, crops(real, n), n, sound, args.overwrite)
    n_real = sum(real is not None for *_, real in pairs)
    print(f"{fake_folder}: {len(pairs)} clips, {n_real} with real frames. Measure them with\n"
          f"    python evaluate.py pair {real_folder} {fake_folder}")


# ------------------------------------------------------------------------------------------------------------- training

FRAMES_PER_CLIP = 4                            # K; ours
TEACHER_SHARE = 0.3                            # ours: of the steps, in which G's pose input is the linear teacher's code
G_LR_FACTOR = 5.0                              # ours: G's learning rate over --lr, as its layers have an equalised one
LOG_EVERY, SAVE_EVERY = 50, 500                # steps
LOSS_WEIGHTS = dict(
    rec=10.0,                                  # ours, for VGG: L1 of the image, of mouth and eyes, of smaller images
    contrast=1.0,                              # speech feature and mouth feature, in both directions; published 100
    feat=1.0,                                  # ours: features are relative to their size; published 10
    cross=1.0,                                 # L1 of speech feature and mouth feature; published
    id=1.0,                                    # classification of people by V; published
    pose=1.0)                                  # ours: E's pose code against the linear teacher's


class ClipFrames(Dataset):
    """Item n, a function of (seed, n): source (3, H, W) and K frames (K, 3, H, W) of one of the clips, their mel (K, 1,
    80, 20) and the number of the person. Half of the items are mirrored."""

    def __init__(self, pack: Pack, K: int, seed: int, clips, flip: bool = True):
        self.pack, self.K, self.seed, self.clips, self.flip = pack, K, seed, clips, flip
        self.mel = lru_cache(512)(lambda c: lws_mel(pack.sound(c)))             # 50 MB of three-second clips

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng([self.seed, n, self.K])
        c = int(self.clips[rng.integers(len(self.clips))])
        length = int(self.pack.n_frames[c])
        indices = rng.choice(length, self.K + 1, replace=length <= self.K)
        images = to_flipped_tensor(self.pack.frames(c, indices), self.flip and rng.random() < 0.5)  # (1 + K, 3, H, W)
        mel = torch.from_numpy(lws_windows(self.mel(c), indices[1:]))
        return dict(source=images[0], frames=images[1:], mel=mel, person=int(self.pack.identity[c]))


def pose_augment(frames):
    """The paper's augmentation of E's input (N, 3, H, W), which keeps the head pose: width and height +-10 %, shift
    +-5 %, colours mixed and shifted. Numbers: ours."""
    N, device = len(frames), frames.device
    theta = torch.zeros(N, 2, 3, device=device)
    theta[:, (0, 1), (0, 1)] = 1 + 0.1 * (2 * torch.rand(N, 2, device=device) - 1)
    theta[:, :, 2] = 0.1 * (2 * torch.rand(N, 2, device=device) - 1)            # in half edges
    grid = F.affine_grid(theta, frames.shape, align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    mix = torch.eye(3, device=device) + 0.3 * torch.randn(N, 3, 3, device=device)
    return torch.einsum("nij,njhw->nihw", mix, frames) + 0.2 * torch.randn(N, 3, 1, 1, device=device)


def contrastive_loss(a, b):
    """Row i of a (n, E) belongs to row i of b (n, E): softmax over the published similarity 1 / |a - b| of features of
    unit length. ln n at chance. Gradients reach only b, as published. Call it in both directions."""
    a, b = F.normalize(a.detach().float(), dim=1), F.normalize(b.float(), dim=1)
    distance = (2 - 2 * a @ b.t()).clamp_min(1e-4).sqrt()                       # (n, n); ours: 1 / 0 is not finite
    return F.cross_entropy(1 / distance, torch.arange(len(a), device=a.device))


def teacher_input(frames, template: str):
    """Frames (N, 3, H, W) -> (N, 768): without mouth, 16 px"""
    return F.adaptive_avg_pool2d(mask_mouth(frames, template), 16).flatten(1)


@torch.no_grad()
def fit_pose_teacher(teacher: nn.Linear, pack: Pack, clips, per_clip: int = 16, ridge: float = 0.1):
    """Ours. Fits a linear pose code in closed form, as in initialise.fit_motion_space. It is the target of E's pose code,
    and G's pose input in the first steps. On unseen people at 32 px: yaw r .91, pitch .83, roll .88."""
    rng, inputs = np.random.default_rng(2), []                                  # one tensor a clip, and mirrored
    for c in rng.permutation(clips)[:400]:
        length = int(pack.n_frames[c])
        indices = rng.choice(length, min(per_clip, length), replace=False)
        frames = to_tensor(pack.frames(c, indices)).to(teacher.weight)
        inputs += [teacher_input(frames, pack.template), teacher_input(frames.flip(3), pack.template)]
    mean, std = torch.cat(inputs).mean(0), torch.cat(inputs).std(0) + 1e-3
    inputs = [(x - mean) / std for x in inputs]
    motion = torch.cat([x - x.mean(0) for x in inputs])
    down, _ = reduced_rank_regression(torch.cat(inputs), motion, teacher.out_features, ridge)   # (P, 768), unit variance
    # with fewer than P motions, some numbers describe the person: each is weighted by its share of variance within clips
    poses = [x @ down.t() for x in inputs]
    share = torch.stack([x.var(0) for x in poses]).mean(0) / torch.cat(poses).var(0)
    teacher.weight.copy_(share[:, None] * down / std)
    teacher.bias.copy_(-teacher.weight @ mean)


def generator_losses(nets, batch, step, args) -> tuple:
    """Reconstructs the frames from photo, speech and augmented frames -> losses, real and fake (N, 3, H, W)."""
    model, K = nets["model"], batch["frames"].shape[1]
    real = batch["frames"].flatten(0, 1)                                        # (N, 3, H, W), N = B K
    identity = model.V(batch["source"])
    people = nets["people"](identity[0])                                        # (B, people)
    identity = [x.repeat_interleave(K, 0) for x in identity]
    speech = model.A(batch["mel"].flatten(0, 1)).float()                        # (N, hidden)
    template = TEMPLATES[model.config.template]
    with torch.autocast(real.device.type, enabled=False):
        teacher_pose = nets["teacher"](teacher_input(real, model.config.template))  # (N, P)
        mouth_and_pose = torch.cat([pose_augment(real), pose_augment(model.E.pose_input(real))])
    mouth, head = model.E.model(mouth_and_pose.contiguous(memory_format=torch.channels_last)).chunk(2)  # (N, hidden) each
    mouth = model.E.to_mouth(mouth).float()
    pose = model.E.headpose_embed(model.E.to_headpose(head)).float()
    G_pose = teacher_pose if step < TEACHER_SHARE * args.steps else pose
    fake = model.decode(identity, speech, G_pose, "random" if model.config.noise else "off").float()
    terms = dict(rec=reconstruction_loss(fake, real, ((template.mouth, 3.0), (template.eyes, 3.0))),  # ours: 3 times
                 contrast=contrastive_loss(mouth, speech) + contrastive_loss(speech, mouth),
                 cross=(mouth.detach() - speech).abs().mean(),
                 id=F.cross_entropy(people.float(), batch["person"]),
                 pose=F.mse_loss(pose, teacher_pose))
    if args.w_vgg:
        terms["vgg"] = perceptual_loss(nets["vgg"](fake), nets["vgg"](real))
    if args.w_adv:                                                              # D's gradients are zeroed before D's step
        D, maps = nets["D"], nets["D"].features(fake)
        terms |= dict(adv=generator_loss(D.score(maps[-1])), feat=perceptual_loss(maps, D.features(real)))
    return terms, real, fake


def discriminator_losses(D, real, fake, step: int) -> dict:
    """The logistic loss, and R1 at every 16th step, as in StyleGAN2."""
    terms = dict(d=discriminator_loss(D(real), D(fake.detach())))
    if step % 16 == 0:
        real = real.clone().requires_grad_()
        terms["r1"] = 16 / 2 * r1_penalty(real, D(real))
    return terms


def build_networks(args, pack, device) -> tuple[dict, dict]:
    """-> {name: network} of a checkpoint, {name: optimiser}"""
    model = PCAVS(Config.at(args.size, pack.template)).to(device)
    nets = dict(model=model, ema=copy.deepcopy(model).eval().requires_grad_(False),
                teacher=nn.utils.skip_init(nn.Linear, 768, model.config.pose).to(device).requires_grad_(False),
                people=nn.Linear(32 * model.config.v_base, len(pack.identities)).to(device))
    encoders = [p for net in (model.V, model.E, model.A, nets["people"]) for p in net.parameters()]
    groups = [dict(params=encoders), dict(params=model.G.parameters(), lr=G_LR_FACTOR * args.lr)]
    opts = dict(g=torch.optim.Adam(groups, args.lr, betas=(0.9, 0.99)))         # ours: L1 leads
    if args.w_adv:
        nets["D"] = Discriminator(args.size, base=2048).to(device)              # 64 channels at 32 px
        opts["d"] = torch.optim.Adam(nets["D"].parameters(), args.lr, betas=(0.0, 0.99))
    return nets, opts


def train(args, argv=None):
    path, saved = claim_output(Path(args.out) / "pcavs.pt", args), dict(step=0)
    if args.resume:
        saved = load_checkpoint(path, "pcavs-train")
        args = resume_options(parse, argv, args, saved, path)
    device = pick_device(args.device)
    warn_of_slow_bf16(args, device)
    pack = open_packs(args.data) if args.data else open_toy_pack(path.parent, args.size)
    if pack.size != args.size:
        raise InputError(f"{pack.folder}: images of {pack.size} px, --size is {args.size}")
    clips = {part: numbers[pack.n_frames[numbers] > 1] for part, numbers in split(pack, args).items()}  # no photos
    if not (len(clips["train"]) and len(clips["valid"])):
        raise InputError(f"{pack.folder}: holds too few videos to train and validate on")
    torch.manual_seed(args.seed)
    nets, opts = build_networks(args, pack, device)
    model, ema = nets["model"], nets["ema"]
    if args.resume:
        with wrap_errors(path, "was trained with other options"):
            for name, state in saved["networks"].items():
                nets[name].load_state_dict(state)
        restore_run(path, saved, opts)
    else:
        fit_pose_teacher(nets["teacher"], pack, clips["train"])
    vgg = dict(vgg=judges.vgg19(device)) if args.w_vgg else {}
    data = ClipFrames(pack, FRAMES_PER_CLIP, args.seed, balance_people(pack, clips["train"], args))
    stream = batches(data, args.batch // FRAMES_PER_CLIP, saved["step"])
    print(f"PC-AVS on {device}: {len(clips['train'])} clips to train on, {len(pack.identities)} people, "
          f"{count_parameters(model)}")
    weights = LOSS_WEIGHTS | dict(vgg=args.w_vgg, adv=args.w_adv)
    log, timer = open_log(path.with_name("log_pcavs.jsonl"), args), StepTimer(device)
    line = {}  # latest value of each term
    for step in (bar := progress_bar("PC-AVS", saved["step"], args.steps)):
        batch = timer.next_batch(stream)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            terms, real, fake = generator_losses(nets | vgg, batch, step, args)
            losses = dict(g={k: weights[k] * v for k, v in terms.items()})
            if args.w_adv:
                losses["d"] = discriminator_losses(nets["D"], real, fake, step)
        line["step"] = step
        for name, opt in opts.items():
            line |= terms_to_floats(losses[name], step)
            with optimiser_step(opt, cosine_warmup(step, args.steps)):
                sum(losses[name].values()).backward()
        update_ema(ema, model, (step + 1) * args.batch, args.batch)

        last = step + 1 == args.steps
        if step % LOG_EVERY == 0 or last:
            write_log(log, bar, line | timer.pace(args.batch), args.steps)
        if (step + 1) % SAVE_EVERY == 0 or last:
            save_samples(path.with_suffix(".png"), ema, pack, np.union1d(clips["valid"], clips["test"]), device)
            save_run(path, dict(kind="pcavs-train", config=vars(ema.config), step=step + 1), args, nets, opts)
    write_report(path.parent)  # with the last image
    save_checkpoint(path.with_name("weights.pt"), dict(
        kind="pcavs", config=vars(ema.config), args=vars(args), networks=dict(model=fp16_state_dict(ema))))
    print(f"{path.with_name('weights.pt')}: for pcavs.py --weights")


@torch.no_grad()
def save_samples(path, model, pack, clips, device, n=8):
    """Four rows of n images: photos, pose frames (of the next item), results, frames of the speech (the item after)."""
    data = ClipFrames(pack, 1, seed=12345, clips=clips, flip=False)             # the same items in every picture
    items = [data[i] for i in range(n)]
    source, frames, mel = (torch.stack([item[k] for item in items]).to(device) for k in ("source", "frames", "mel"))
    pose, spoken = frames[:, 0].roll(1, 0), frames[:, 0].roll(2, 0)
    fake = model.decode(model.V(source), model.A(mel[:, 0].roll(2, 0)), model.E(pose), "off")
    titles = f"photo; {len(clips)} clips", "pose", "result", "frame of the speech: lips as in the result"
    image_grid([to_uint8(row.clamp(-1, 1)) for row in (source, pose, fake, spoken)], titles, 128).save(path)


def parse(argv=None, saved=None):
    parser = Parser(description="PC-AVS: identity from a photo, lips from speech, head pose from a second video")
    p_sample, p_train, p_pairs, p_align = parser.add_commands(
        sample="a photo, speech, a pose video -> a talking face", train="train the four networks together",
        pairs="generate clips again, and write the real ones beside them, for evaluate.py pair",
        align="crop clips for published weights: CLIP_cropped/")
    p_sample.add_argument("face", help="photo")
    p_sample.add_argument("speech", help="sound, or a video with sound")
    p_sample.add_argument("--pose", help="video or folder of aligned images for the head pose; default: the photo's pose")
    p_sample.add_argument("--out", default="talk.mp4", help="the video to write")
    p_sample.add_argument("--grid", action="store_true", help="photo, pose, result side by side (pose clip in memory)")
    p_sample.add_argument("--box", metavar="x0,y0,x1,y1", help="box of the face in the photo, in pixels")
    p_sample.add_argument("--face", type=int, dest="number", metavar="N", help="the N-th largest face")
    p_pairs.add_argument("clips", nargs="+", help="videos with sound, or the authors' file of pairs (.csv)")
    p_pairs.add_argument("--out", default="out/pcavs_pairs", help="folder for the clips real/ and fake/")
    for p in (p_sample, p_pairs):
        p.add_argument("--weights", default=TOY_WEIGHTS, help="folder of published files, or a weights.pt of train")
        p.add_argument("--aligned", action="store_true", help="published weights: images are aligned already")
        p.add_argument("--seed", type=int, default=0, help="seed of the generator's noise")
        p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    batch_of = f"images, {FRAMES_PER_CLIP} of each clip,"
    add_run_options(p_train, "out/pcavs32", steps=2000, batch=32, lr=2e-3, batch_of=batch_of)
    p_train.add_argument("--data", nargs="+", help="packs of prepare.py; default: the toy world, drawn into --out")
    add_split_options(p_train)
    p_train.add_argument("--size", type=int, default=32, choices=(16, 32, 64, 128), help="edge of the images: the dial")
    p_train.add_argument("--w-adv", type=float, default=0.0, help="weight of the adversary; published 1")
    p_train.add_argument("--w-vgg", type=float, default=0.0, help="weight of VGG19's features (a download); published 10")
    p_align.add_argument("clips", nargs="+", help="videos, or folders of images, each one clip")
    p_align.add_argument("--csv", help="file of pairs to write, for `pairs`: each video drives itself")
    for p in (p_sample, p_pairs, p_align):
        p.add_argument("--overwrite", action="store_true", help="replace existing files")
    for p in (p_sample, p_pairs, p_train):
        p.add_argument("--bf16", action="store_true", help="bf16 autocast: faster on a GPU or a CPU with AMX")
    p_train.set_defaults(**saved or {})
    return parser.parse_args(argv, batch=(FRAMES_PER_CLIP, 10**5))


def main(argv=None):
    args = parse(argv)
    dict(sample=sample, pairs=generate_pairs, train=partial(train, argv=argv), align=align)[args.command](args)


if __name__ == "__main__":
    run(main)
