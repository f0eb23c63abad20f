"""PC-AVS: identity from a photo, lips from speech, head pose from a second video as 12 numbers.

Zhou et al., "Pose-Controllable Talking Face Generation by Implicitly Modularized Audio-Visual Representation", CVPR 2021
(arXiv 2104.11116). The four networks have the names and shapes of the published files latest_net_{G,V,E,A_sync}.pth.

    python pcavs.py sample examples/face.png examples/speech.wav --out toy.mp4   # shipped toy weights, 100 frames, 2 s
    python pcavs.py train --bf16                                  # the toy world at 32 px; docs/pcavs.md has the result

What differs from the authors' code:
- Their frames begin with the third and their sound with the first, so their video leads by 80 ms. Ours is in step.
- They run V and A_sync once, E and G twice a frame. Ours runs V once a photo, E once a pose frame, A_sync and G once.
- Noise is drawn once a clip, not anew for every frame. landmarks.py stands in for FAN's landmarks in the alignment.
- They published no training code. Ours has their losses; adversary and VGG are off by default.

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
    save_checkpoint, save_run, terms_to_floats, update_ema, wrap_errors, write_log)
from data import Pack, add_split_options, balance_people, batches, open_packs, split, to_flipped_tensor
from faces import (
    PCAVS_FILE, PCAVS_INPUT, PCAVS_POINTS, TEMPLATES, align_frames, crop_face, detect_faces, eyes_and_mouth, face_box,
    fill_missing, mask_mouth, middle_square, similarity)
from initialise import reduced_rank_regression
from landmarks import find_landmarks, load_landmarks, track_landmarks
from losses import discriminator_loss, generator_loss, perceptual_loss, r1_penalty, reconstruction_loss
from media import (
    FPS, VIDEO_SUFFIXES, InputError, Parser, check_file, check_output, is_grey, load_audio, load_photo, make_folder,
    probe, read_video, run, to_tensor, to_uint8, write_video)
from motion import ping_pong
from report import image_grid, write_report
from sample import SEARCH_HEIGHT, find_driving_face, find_photo_face, is_drawn, to_grey
from stylegan2 import Discriminator, StyledLayers
from toyfaces import open_toy_pack
from vision import conv_norm, shortcut

# the authors' files, and what inference does not use of them: heads of training, G's mapping and constant
PUBLISHED = {"G": ("latest_net_G.pth", ("style.", "input.", "noises.")), "V": ("latest_net_V.pth", ("fc.", "model.fc.")),
             "E": ("latest_net_E.pth", ("classifier.", "mouth_fc.", "headpose_fc.")),
             "A": ("latest_net_A_sync.pth", ("fc.",))}
TOY_WEIGHTS = Path(__file__).resolve().parent / "weights/pcavs_toy.pt"


@dataclass
class Config:
    """Shape of the four networks; the defaults are the published ones. Saved in every checkpoint as a plain dict."""
    size: int = 224
    template: str = "voxceleb"                 # crop of the images: the authors', or one of faces.TEMPLATES
    mask: bool = False                         # ours: E's input has no mouth, so that the pose code cannot carry lips
    noise: bool = True                         # the generator's noise; off at toy sizes, as in fusion.Config
    v_stem: int = 4                            # V: its first layers shrink by this, the four stages by 8 more
    v_base: int = 64                           # channels of the first stage; the identity vector has 32 times as many
    v_groups: int = 32
    v_blocks: tuple = (3, 4, 6, 3)
    e_stem: int = 4                            # E
    e_width: int = 256
    e_depth: int = 4                           # of the hourglass
    e_maps: int = 68                           # heat maps
    dropout: float = 0.5                       # in the hourglass
    a_filters: tuple = (32, 64, 128, 256)      # A_sync
    a_blocks: tuple = (3, 4, 6, 3)
    a_hidden: int = 128                        # of its attention
    hidden: int = 512                          # width of the features of E and A_sync
    mouth: int = 500                           # width of the mouth code
    pose: int = 12                             # P, width of the pose code
    channels: tuple = (512, 512, 512, 512, 256, 128)  # G, from the identity map's size up
    mouth_gain: float = 1.2                    # factor on the speech feature at inference, as published

    @classmethod
    def at(cls, size: int, template: str = "toy") -> "Config":
        """The dial of `train`: 16 (tests), 32 and 64 for a CPU, 128 for a GPU"""
        small = dict(mask=True, noise=False, v_base=8, v_groups=8, v_blocks=(1, 1, 1, 1), e_width=32, e_depth=2,
                     e_maps=16, dropout=0.0, a_filters=(16, 32, 32, 64), a_blocks=(1, 1, 1, 1), a_hidden=32,
                     hidden=128, mouth=32, mouth_gain=1.0)
        dial = {16: dict(v_stem=1, e_stem=2, channels=(64, 64, 32, 16)),
                32: dict(v_stem=1, e_stem=2, channels=(128, 128, 64, 32)),
                64: dict(v_stem=2, channels=(128, 128, 128, 64, 32)),
                128: dict(v_base=16, e_width=128, e_depth=3, e_maps=32, hidden=256, mouth=128,
                          channels=(256, 256, 256, 128, 64, 32))}
        return cls(**dict(size=size, template=template) | small | dial[size])


# ----------------- the four networks. V, identity: ResNeXt50 32x4d (Xie et al. 2017), its last map brought to G's width

def stages(block, c_in: int, widths, counts) -> dict:
    """layer1, layer2, .. of a ResNet: `counts` blocks each, the first of all but layer1 with stride 2"""
    layers = {}
    for i, (c_out, count) in enumerate(zip(widths, counts)):
        blocks = [block(c_out if k else c_in, c_out, 2 if i and not k else 1) for k in range(count)]
        layers[f"layer{i + 1}"], c_in = nn.Sequential(*blocks), c_out
    return layers


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1 beside a shortcut: (N, C, H, W) -> (N, C', H/stride, W/stride)"""

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
    """V: photo (B, 3, H, W) -> identity vector (B, 32 base) and identity map (B, C, start, start)"""

    def __init__(self, c: Config):
        super().__init__()
        stem = dict(conv1=nn.Conv2d(3, c.v_base, 7, 2 if c.v_stem > 1 else 1, 3, bias=False),
                    bn1=nn.BatchNorm2d(c.v_base), relu=nn.ReLU(),
                    pool=nn.MaxPool2d(3, 2, 1) if c.v_stem == 4 else nn.Identity())
        widths, block = [c.v_base * k for k in (4, 8, 16, 32)], partial(Bottleneck, groups=c.v_groups)
        self.model = nn.Sequential(OrderedDict(stem | stages(block, c.v_base, widths, c.v_blocks)))
        self.conv1x1 = nn.Conv2d(widths[-1], c.channels[0], 1)

    def forward(self, x):
        x = self.model(x.contiguous(memory_format=torch.channels_last))         # (B, 32 base, H/(8 stem), W/(8 stem))
        return x.mean((2, 3)), self.conv1x1(x)


# E, all but identity: FAN (Bulat & Tzimiropoulos 2017) with one hourglass, then a mouth and a pose head. Its ConvBlock is
# of its authors' package: three 3x3 convolutions, their outputs concatenated, beside a shortcut

class Hourglass(nn.Module):
    """Down `depth` times and up again, with a branch across at every size: (N, C, H, W) -> the same shape"""

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
    """E: frames (N, 3, H, W) -> pose code (N, P). In training, and for the mouth code, its parts are called alone."""

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

    def forward(self, frames):
        return self.headpose_embed(self.to_headpose(self.model(frames)))


# A_sync, speech: a ResNet with squeeze and excitation (Chung et al. 2020), attention over time

class SEBlock(nn.Module):
    """(N, C, M, S) -> (N, C', M/stride, S/stride); ReLU before BatchNorm, as published; a gate of reduction 8"""

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
    """A_sync: mel windows (N, 1, 80, 20) of `lws_windows` -> speech feature (N, hidden)"""

    def __init__(self, c: Config):
        super().__init__()
        f, flat = c.a_filters, c.a_filters[-1] * LWS_BANDS // 8
        self.model = nn.ModuleDict(dict(
            conv1=nn.Conv2d(1, f[0], 3, padding=1), bn1=nn.BatchNorm2d(f[0]), **stages(SEBlock, f[0], f, c.a_blocks),
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
    """G: StyleGAN2's layers from the identity map up, one style for all of them"""

    def __init__(self, c: Config):
        super().__init__()
        self.start = c.size // (8 * c.v_stem)               # edge of the identity map, 7 of 224 px
        self.dim = 32 * c.v_base + c.mouth + c.pose                             # D: identity, mouth and pose; 2560
        self.add_layers(c.channels, self.dim)

    def draw_noise(self, generator=None) -> list:
        """One map (1, 1, H, W) for each 3x3 layer, coarse to fine"""
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
        """networks: those that are made already"""
        super().__init__()
        self.config = config
        for name, make in self.NETWORKS.items():
            setattr(self, name, networks.get(name) or make(config))

    def masked(self, frames):
        """E's input for a pose code: frames without a mouth where the config says so"""
        frames = mask_mouth(frames, self.config.template) if self.config.mask else frames
        return frames.contiguous(memory_format=torch.channels_last)

    def pose(self, frames):
        """frames (N, 3, H, W) -> pose codes (N, P)"""
        return self.E(self.masked(frames))

    def decode(self, identity, speech, pose, noise="random"):
        """identity: of V, for 1 or N photos; speech (N, hidden), pose (N, P) -> frames (N, 3, H, W) in (-1, 1)"""
        vector, identity_map = (x.expand(len(pose), *x.shape[1:]) for x in identity)
        style = torch.cat([vector.float(), self.E.mouth_embed(speech).float(), pose.float()], 1)      # (N, D)
        return self.G(style, identity_map.contiguous(memory_format=torch.channels_last), noise)

    @torch.inference_mode()
    def animate(self, photo, mel, n: int, pose=None, noise="off", bf16=False, batch: int = 0):
        """Frames 0 .. n-1 of a talking face, as a stream of (b, 3, H, W) in (-1, 1). photo (3, H, W) in [-1, 1]; mel
        (S, 80) of `lws_mel`; pose: iterable of frames (3, H, W), by default the photo; fewer than n go there and back.
        batch: frames at once; 0: as many as fit into a cache (4 at 224 px), 16 on a GPU"""
        c, autocast = self.config, torch.autocast(photo.device.type, torch.bfloat16, enabled=bf16)
        batch = batch or (16 if photo.is_cuda else max(4, min(64, (448 // c.size) ** 2)))
        frames = itertools.islice([photo] if pose is None else pose, n)
        with autocast:
            identity = self.V(photo[None])
            chunks = iter(lambda: list(itertools.islice(frames, batch)), [])
            codes = torch.cat([self.pose(torch.stack(chunk).to(photo)) for chunk in chunks])    # (T, P)
        codes = codes[[ping_pong(k, len(codes)) for k in range(n)]]
        for first in range(0, n, batch):
            windows = lws_windows(mel, range(first, min(first + batch, n)))
            with autocast:
                speech = c.mouth_gain * self.A(torch.from_numpy(windows).to(photo))
                fake = self.decode(identity, speech, codes[first:first + batch], noise)
            yield fake


# -------------------------------------------------------------------------------------------------------------- weights

def load_published(folder: Path, config: Config | None = None, device="cpu") -> PCAVS:
    """The networks in the authors' bare state_dicts, by every key and shape. InputError: one line names the file."""
    config, networks = config or Config(), {}
    for net, (name, unused) in PUBLISHED.items():
        state = {key.removeprefix("module."): v for key, v in read_weights(folder / name).items()}
        state = {key: v.flatten() if key.endswith("activate.bias") and torch.is_tensor(v) else v
                 for key, v in state.items() if not key.startswith(unused)}     # (1, C, 1, 1) there, (C,) here
        networks[net] = load_frozen(partial(PCAVS.NETWORKS[net], config), state, folder / name, device)
    return PCAVS(config, **networks).eval()


def load_pcavs(path: str | Path, device="cpu") -> PCAVS:
    """Networks for inference: a folder of the published files, or a weights.pt of `train`. InputError: see there."""
    if Path(path).is_dir():
        return load_published(Path(path), device=device)
    checkpoint = load_checkpoint(path, "pcavs")
    with wrap_errors(path, "not a network of this version"):
        model = load_strictly(lambda: PCAVS(Config(**checkpoint["config"])), checkpoint["networks"]["model"], path)
    return model.to(device).eval()


# -------- the networks' input: the authors' alignment for published weights, a template's square for weights of `train`

def images_in(path: Path) -> list[Path]:
    """The images of a folder, or the file where it is one; of a video none"""
    return sorted(file for file in (path.iterdir() if path.is_dir() else [path])
                  if file.suffix.lower() in (".jpg", ".jpeg", ".png"))


def clip_frames(path: Path, n: int | None, height: int | None = None):
    """The first n frames of a video, at most `height` pixels high, or of images_in: uint8 (H, W, 3)"""
    if images := images_in(path):
        return map(load_photo, images[:n])
    return itertools.islice(read_video(path, height and min(height, probe(path).height)), n)


def aligned_clip(path: Path, n: int | None, size: int, box: tuple = PCAVS_INPUT):
    """align_frames of a clip's first n frames, read twice. InputError: no detector; a face in less than half"""
    frames = clip_frames(path, n, SEARCH_HEIGHT)
    for before, frame in enumerate(frames):  # noqa: B007
        if faces := detect_faces(frame, margins=(1.2, 1.5)):
            break
    else:
        raise InputError(f"{path}: no face that is upright was found; crop the clip and give --aligned")
    tracked = track_landmarks(load_landmarks(), itertools.chain([frame], frames), face_box(faces, "face"))
    points = eyes_and_mouth(np.pad(tracked, ((before, 0), (0, 0), (0, 0)), constant_values=np.nan)) / len(frame)
    found = ~np.isnan(points[:, 2])                                             # (T,); points (T, 3), complex
    if 2 * found.sum() < len(found):
        raise InputError(f"{path}: a face in {found.sum()} of {len(found)} frames")
    points = fill_missing(points, found)
    scale = abs(similarity(points.mean(0), PCAVS_POINTS)[0])
    height = max(16, round(2 * scale * size / (box[2] - box[0])))               # twice what the crop keeps
    return align_frames(clip_frames(path, n, height), points, size, box)


def clip_crops(path: str | Path, n: int, config: Config, aligned: bool = False):
    """The first n frames of a video, or of images, which are aligned already, as the networks' input: a stream of
    uint8 (size, size, 3). aligned: for published weights, so is the video. InputError, at once: no face"""
    path, size, published = Path(path), config.size, config.template not in TEMPLATES

    def crop_aligned(frame):
        H, W = frame.shape[:2]
        box = tuple(v / 224 * n for v, n in zip(PCAVS_INPUT, (W, H, W, H))) if published else middle_square(frame)
        return crop_face(frame, box, size)

    if images_in(path) or aligned and published:
        return map(crop_aligned, clip_frames(path, n))
    if published:
        return aligned_clip(path, n, size)
    _, box, height = find_driving_face(path, n, config.template)
    frames = clip_frames(path, n, max(2, round(2 * size * height / (box[3] - box[1]))))  # twice what the crop keeps
    return (crop_face(frame, tuple(v * len(frame) / height for v in box), size) for frame in frames)


def photo_crop(photo: np.ndarray, args, config: Config) -> np.ndarray:
    """The photo as V's input, uint8 (size, size, 3). Raises InputError: no face."""
    published = config.template not in TEMPLATES
    if args.aligned and published:
        return next(clip_crops(args.face, 1, config, True))
    if config.template == "toy" and not is_drawn(photo):
        print(f"{args.weights}: these weights draw the toy world only; {args.face} is another kind of picture")
    photo, box, how = find_photo_face(photo, args, "face" if published else config.template)
    print(f"{args.face}: {how}")
    if not published:
        return crop_face(photo, box, config.size)
    points = eyes_and_mouth(find_landmarks(load_landmarks(), photo, box))
    return next(align_frames([photo], points[None] / len(photo), config.size))


def align(args):
    """Writes CLIP_cropped/000000.jpg ..: aligned frames, 224 px, and a file of pairs: each video drives itself"""
    pairs, pairs_file = [], args.csv and check_output(args.csv, args.overwrite)
    for path in map(Path, args.clips):
        out = path.with_name(f"{path.stem}_cropped")
        if out.exists() and not args.overwrite:
            raise InputError(f"{out}: exists; give --overwrite to replace its images")
        frames = aligned_clip(path, None, 224, PCAVS_FILE)
        out.mkdir(exist_ok=True)
        for k, frame in enumerate(tqdm(frames, path.name, unit="frame", disable=None)):
            Image.fromarray(frame).save(out / f"{k:06d}.jpg", quality=95)
        print(f"{out}: {k + 1} aligned images")
        pairs += [f"{out} 1 {out} {k + 1} {path} {out} {k + 1} None\n"] * (not images_in(path))
    if pairs_file:
        pairs_file.write_text("".join(pairs))


# ----------------------------------------------------- a photo, speech, a pose clip -> a talking face; and measuring it

def render(model, crop, wav, pose, args, device):
    """crop uint8 (size, size, 3), wav (n,), pose: iterable of such crops -> a stream of frames, uint8 (size, size, 3)"""
    noise = [x.to(device) for x in model.G.draw_noise(torch.Generator().manual_seed(args.seed))]
    noise, photo, n = noise if model.config.noise else "off", to_tensor(crop).to(device), n_frames(len(wav))
    for frames in model.animate(photo, lws_mel(wav), n, map(to_tensor, pose), noise, args.bf16):
        with wrap_errors(args.weights, "the networks fail"):
            frames = to_uint8(frames)                                           # (b, size, size, 3)
        yield from frames


def sample(args):
    begin = time.perf_counter()
    out = check_output(args.out, args.overwrite, VIDEO_SUFFIXES)
    photo, wav, device = load_photo(args.face), load_audio(args.speech), pick_device(args.device)
    model = load_pcavs(args.weights, device)
    crop, n = photo_crop(photo, args, model.config), n_frames(len(wav))
    pose = clip_crops(args.pose, n, model.config, args.aligned) if args.pose else [crop]
    pose = list(pose) if args.grid else pose
    frames = render(model, crop, wav, pose, args, device)
    if is_grey(photo):
        frames = map(to_grey, frames)
    if args.grid:
        frames = (np.hstack([crop, pose[ping_pong(k, len(pose))], frame]) for k, frame in enumerate(frames))
    write_video(out, frames, n, (args.speech, len(wav)), args.overwrite)
    print(f"{out}: {n} frames, {n / FPS:.2f} s; {n / (time.perf_counter() - begin):.1f} frames/s end to end")


def read_pairs(path: Path) -> list[list]:
    """The authors' csv -> photo, pose or None, speech, real frames or None of each line: fields 0, 2, 4, 5"""
    jobs = []
    for i, line in enumerate(check_file(path).read_text(errors="replace").splitlines(), start=1):
        fields = line.split()
        if len(fields) not in (0, 8):
            raise InputError(f"{path}: line {i} has {len(fields)} fields, expected 8")
        names = [fields[k] for k in (0, 2, 4, 5) if fields]
        job = [next((p for p in (Path(name), path.parent / name) if p.exists()), None) for name in names]
        for k, name in enumerate(names):
            if not job[k] and (name != "None" or k in (0, 2)):
                raise InputError(f"{path}: line {i}: {name}: no such file or folder")
        jobs += [job] * bool(job)
    return jobs


def pairs(args):
    """Each clip generated again from its first frame, sound and head pose, or each line of a file of pairs"""
    device = pick_device(args.device)
    if args.clips[0].endswith(".csv"):
        jobs, args.aligned = read_pairs(Path(args.clips[0])), True              # the authors' pairs are aligned
    else:
        jobs = [[check_file(clip)] * 4 for clip in args.clips]                  # each gives all that a pair has
    model = load_pcavs(args.weights, device)
    crops = partial(clip_crops, config=model.config, aligned=args.aligned)
    fake, real = (make_folder(Path(args.out).absolute() / kind) for kind in ("fake", "real"))
    names = [f"{i:03d}_{speech.stem}.mp4" for i, (_, _, speech, _) in enumerate(jobs, start=1)]
    if others := [file for file in (*fake.glob("*.mp4"), *real.glob("*.mp4")) if file.name not in names]:
        raise InputError(f"{others[0]}: is of another run and would be measured: remove it or give another --out")
    for name, (photo, pose, speech, clip) in zip(names, jobs):
        wav, crop = load_audio(speech), next(crops(photo, 1))
        n, sound = n_frames(len(wav)), (speech, len(wav))
        frames = render(model, crop, wav, crops(pose, n) if pose else [crop], args, device)
        write_video(fake / name, frames, n, sound, args.overwrite)
        if clip:
            write_video(real / name, crops(clip, n), n, sound, args.overwrite)
    print(f"{fake}: {len(jobs)} clips, {sum(job[3] is not None for job in jobs)} with real frames. Measure them with\n"
          f"    python evaluate.py pair {real} {fake}")


# ------------------------------------------------------------------------------------------------------------- training

FRAMES = 4                                     # K; ours
TEACHER_SHARE = 0.3                            # ours: of the steps; G's pose input is the linear teacher's code, then E's
G_RATE = 5.0                                   # ours: G's learning rate in --lr, as its layers have an equalised one
LOG_EVERY, SAVE_EVERY = 50, 500                # steps
WEIGHTS = dict(
    rec=10.0,                                  # ours, for VGG: L1 of the image, of mouth and eyes, of smaller images
    contrast=1.0,                              # speech feature and mouth feature, in both directions; published 100
    feat=1.0,                                  # ours: features are relative to their size; published 10
    cross=1.0,                                 # L1 of these two; published
    id=1.0,                                    # classification of people by V; published
    pose=1.0)                                  # ours: E's pose code against the linear teacher's


class ClipFrames(Dataset):
    """Item n, a function of (seed, n): source (3, H, W) and K frames (K, 3, H, W) of one of the clips, with their mel
    (K, 1, 80, 20) and the number of the person. Half of the items are mirrored."""

    def __init__(self, pack: Pack, K: int, seed: int, clips, flip: bool = True):
        self.pack, self.K, self.seed, self.clips, self.flip = pack, K, seed, clips, flip
        self.mel = lru_cache(512)(lambda c: lws_mel(pack.sound(c)))             # 50 MB of three-second clips

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng([self.seed, n, self.K])
        c = int(self.clips[rng.integers(len(self.clips))])
        length = int(self.pack.n_frames[c])
        chosen = rng.choice(length, self.K + 1, replace=length <= self.K)
        images = to_flipped_tensor(self.pack.frames(c, chosen), self.flip and rng.random() < 0.5)  # (1 + K, 3, H, W)
        mel = torch.from_numpy(lws_windows(self.mel(c), chosen[1:]))
        return dict(source=images[0], frames=images[1:], mel=mel, person=int(self.pack.identity[c]))


def pose_augment(frames):
    """The paper's augmentation of E's input (N, 3, H, W), which keeps the head's pose: width and height +-10 %,
    shift +-5 %, colours mixed and shifted. Numbers: ours."""
    N, dev = len(frames), frames.device
    theta = torch.zeros(N, 2, 3, device=dev)
    theta[:, (0, 1), (0, 1)] = 1 + 0.1 * (2 * torch.rand(N, 2, device=dev) - 1)
    theta[:, :, 2] = 0.1 * (2 * torch.rand(N, 2, device=dev) - 1)               # of half the edge
    grid = F.affine_grid(theta, frames.shape, align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    mix = torch.eye(3, device=dev) + 0.3 * torch.randn(N, 3, 3, device=dev)
    return torch.einsum("nij,njhw->nihw", mix, frames) + 0.2 * torch.randn(N, 3, 1, 1, device=dev)


def contrastive_loss(a, b):
    """Row i of a (n, E) belongs to row i of b (n, E): softmax over the published similarity 1 / |a - b| of features of
    unit length. ln n at chance. Gradients reach b alone, as published: call it in both directions."""
    a, b = F.normalize(a.detach().float(), dim=1), F.normalize(b.float(), dim=1)
    distance = (2 - 2 * a @ b.t()).clamp_min(1e-4).sqrt()                       # (n, n); ours: 1 / 0 is not finite
    return F.cross_entropy(1 / distance, torch.arange(len(a), device=a.device))


def small_frames(frames, template: str):
    """(N, 3, H, W) -> (N, 768), the input of the pose teacher: no mouth, 16 px"""
    return F.adaptive_avg_pool2d(mask_mouth(frames, template), 16).flatten(1)


@torch.no_grad()
def fit_pose_teacher(teacher: nn.Linear, pack: Pack, clips, per_clip: int = 16, ridge: float = 0.1):
    """Ours. A linear pose code in closed form, as by initialise.fit_motion_space: the target of E's pose code, and
    G's pose input in the first steps. People never seen, 32 px: yaw r .91, pitch .83, roll .88."""
    rng, codes = np.random.default_rng(2), []
    for c in rng.permutation(clips)[:400]:
        length = int(pack.n_frames[c])
        chosen = rng.choice(length, min(per_clip, length), replace=False)
        frames = to_tensor(pack.frames(c, chosen)).to(teacher.weight)
        codes += [small_frames(frames, pack.template), small_frames(frames.flip(3), pack.template)]
    mean, std = torch.cat(codes).mean(0), torch.cat(codes).std(0) + 1e-3
    codes = [(x - mean) / std for x in codes]
    motion = torch.cat([x - x.mean(0) for x in codes])
    down, _ = reduced_rank_regression(torch.cat(codes), motion, teacher.out_features, ridge)    # (P, 768), unit variance
    # fewer than P motions leave numbers that tell people apart: each is weighted by its share of variance within clips
    poses = [x @ down.t() for x in codes]
    share = torch.stack([x.var(0) for x in poses]).mean(0) / torch.cat(poses).var(0)
    teacher.weight.copy_(share[:, None] * down / std)
    teacher.bias.copy_(-teacher.weight @ mean)


def loss_terms(nets, batch, step, args) -> dict:
    """One forward: photo, speech and augmented frames -> the frames again, and the losses"""
    model, K = nets["model"], batch["frames"].shape[1]
    real = batch["frames"].flatten(0, 1)                                        # (N, 3, H, W), N = B K
    identity = model.V(batch["source"])
    people = nets["people"](identity[0])                                        # (B, people)
    identity = [x.repeat_interleave(K, 0) for x in identity]
    speech = model.A(batch["mel"].flatten(0, 1)).float()                        # (N, hidden)
    template = TEMPLATES[model.config.template]
    with torch.autocast(real.device.type, enabled=False):
        teacher_pose = nets["teacher"](small_frames(real, model.config.template))  # (N, P)
        inputs = torch.cat([pose_augment(real), pose_augment(model.masked(real))])  # for the mouth, for the pose
    mouth, head = model.E.model(inputs.contiguous(memory_format=torch.channels_last)).chunk(2)  # (N, hidden) each
    mouth = model.E.to_mouth(mouth).float()
    pose = model.E.headpose_embed(model.E.to_headpose(head)).float()
    pose_in = teacher_pose if step < TEACHER_SHARE * args.steps else pose
    fake = model.decode(identity, speech, pose_in, "random" if model.config.noise else "off").float()
    terms = dict(rec=reconstruction_loss(fake, real, ((template.mouth, 3.0), (template.eyes, 3.0))),  # ours: 3 times
                 contrast=contrastive_loss(mouth, speech) + contrastive_loss(speech, mouth),
                 cross=(mouth.detach() - speech).abs().mean(),
                 id=F.cross_entropy(people.float(), batch["person"]),
                 pose=F.mse_loss(pose, teacher_pose))
    if args.w_vgg:
        terms["vgg"] = perceptual_loss(nets["vgg"](fake), nets["vgg"](real))
    if args.w_adv:                                                              # D's own step drops what reaches it here
        D, maps = nets["D"], nets["D"].features(fake)
        terms |= dict(adv=generator_loss(D.score(maps[-1])), feat=perceptual_loss(maps, D.features(real)))
    return terms, real, fake


def discriminator_terms(D, real, fake, step: int) -> dict:
    """The logistic loss, and R1 at every 16th step, as in StyleGAN2"""
    terms = dict(d=discriminator_loss(D(real), D(fake.detach())))
    if step % 16 == 0:
        real = real.clone().requires_grad_()
        terms["r1"] = 16 / 2 * r1_penalty(real, D(real))
    return terms


def build(args, pack, device):
    """-> the networks that a checkpoint holds, and their optimisers, by name"""
    model = PCAVS(Config.at(args.size, pack.template)).to(device)
    nets = dict(model=model, ema=copy.deepcopy(model).eval().requires_grad_(False),
                teacher=nn.utils.skip_init(nn.Linear, 768, model.config.pose).to(device).requires_grad_(False),
                people=nn.Linear(32 * model.config.v_base, len(pack.identities)).to(device))
    encoders = [p for net in (model.V, model.E, model.A, nets["people"]) for p in net.parameters()]
    groups = [dict(params=encoders, initial_lr=args.lr), dict(params=model.G.parameters(), initial_lr=G_RATE * args.lr)]
    opts = dict(g=torch.optim.Adam(groups, args.lr, betas=(0.9, 0.99)))         # ours: L1 leads
    if args.w_adv:
        nets["D"] = Discriminator(args.size, base=2048).to(device)              # 64 channels at 32 px
        group = dict(params=nets["D"].parameters(), initial_lr=args.lr)
        opts["d"] = torch.optim.Adam([group], args.lr, betas=(0.0, 0.99))
    return nets, opts


def train(args):
    device, path = pick_device(args.device), claim_output(Path(args.out) / "pcavs.pt", args)
    saved = load_checkpoint(path, "pcavs-train") if args.resume else dict(step=0)
    pack = open_packs(args.data) if args.data else open_toy_pack(path.parent, args.size, args.people, 3.0)
    if pack.size != args.size:
        raise InputError(f"{pack.folder}: images of {pack.size} px, --size is {args.size}")
    parts = split(pack, args)
    torch.manual_seed(args.seed)
    nets, opts = build(args, pack, device)
    model, ema = nets["model"], nets["ema"]
    if args.resume:
        with wrap_errors(path, "was trained with other options"):
            for name, state in saved["networks"].items():
                nets[name].load_state_dict(state)
        restore_run(path, saved, opts)
    else:
        fit_pose_teacher(nets["teacher"], pack, parts["train"])
    vgg = dict(vgg=judges.vgg19(device)) if args.w_vgg else {}
    clips = ClipFrames(pack, FRAMES, args.seed, balance_people(pack, parts["train"], args))
    stream = batches(clips, args.batch // FRAMES, saved["step"])
    print(f"PC-AVS on {device}: {len(parts['train'])} clips to train on, {len(pack.identities)} people, "
          f"{count_parameters(model)}")
    weight = WEIGHTS | dict(vgg=args.w_vgg, adv=args.w_adv)
    log, timer = open_log(path.with_name("log_pcavs.jsonl"), args), StepTimer(device)
    for step in (bar := progress_bar("PC-AVS", saved["step"], args.steps)):
        batch = timer.next_batch(stream)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            terms, real, fake = loss_terms(nets | vgg, batch, step, args)
            terms = {k: weight[k] * v for k, v in terms.items()}
            d_terms = discriminator_terms(nets["D"], real, fake, step) if args.w_adv else {}
        line = dict(step=step)
        for opt, losses in zip(opts.values(), (terms, d_terms)):
            line |= terms_to_floats(losses, step)
            with optimiser_step(opt, cosine_warmup(step, args.steps)):
                sum(losses.values()).backward()
        update_ema(ema, model, (step + 1) * args.batch, args.batch)

        last = step + 1 == args.steps
        if step % LOG_EVERY == 0 or last:
            write_log(log, bar, line | timer.pace(args.batch), args.steps)
        if (step + 1) % SAVE_EVERY == 0 or last:
            save_samples(path.with_suffix(".png"), ema, pack, np.union1d(parts["valid"], parts["test"]), device)
            save_run(path, dict(kind="pcavs-train", config=vars(ema.config), step=step + 1), args, nets, opts)
    write_report(path.parent)  # with the last image
    save_checkpoint(path.with_name("weights.pt"), dict(
        kind="pcavs", format=1, config=vars(ema.config), args=vars(args), networks=dict(model=fp16_state_dict(ema))))
    print(f"{path.with_name('weights.pt')}: for pcavs.py --weights")


@torch.no_grad()
def save_samples(path, model, pack, clips, device, n=8):
    """Four rows of n: photos, the next clip's pose frames, results, the frames of the speech, of the clip after that"""
    data = ClipFrames(pack, 1, seed=12345, clips=clips, flip=False)
    items = [data[i] for i in range(n)]
    source, frames, mel = (torch.stack([item[k] for item in items]).to(device) for k in ("source", "frames", "mel"))
    pose, spoken = frames[:, 0].roll(1, 0), frames[:, 0].roll(2, 0)
    fake = model.decode(model.V(source), model.A(mel[:, 0].roll(2, 0)), model.pose(pose), "off")
    words = f"photo; held out: {len(clips)} clips", "pose", "result", "frame of the speech: lips as in the result"
    image_grid([to_uint8(row.clamp(-1, 1)) for row in (source, pose, fake, spoken)], words, 128).save(path)


def parse(argv=None):
    parser = Parser(description="PC-AVS: identity from a photo, lips from speech, head pose from a second video")
    p, learn, test, crop = parser.add_commands(
        sample="a photo, speech, a pose video -> a talking face", train="train the four networks together",
        pairs="clips generated again, beside the real ones, for evaluate.py pair",
        align="crop clips as published weights need it: CLIP_cropped/")
    p.add_argument("face", help="photo")
    p.add_argument("speech", help="sound, or video with it")
    p.add_argument("--pose", help="video, or folder of aligned images, for the head pose; default: the photo's own")
    p.add_argument("--out", default="talk.mp4", help="the video to write")
    p.add_argument("--grid", action="store_true", help="photo, pose and result side by side (the pose clip is in memory)")
    p.add_argument("--box", metavar="x0,y0,x1,y1", help="where the face is in the photo, in pixels")
    p.add_argument("--face", type=int, dest="number", metavar="N", help="the N-th largest face")
    test.add_argument("clips", nargs="+", help="videos with sound, or the authors' file of pairs (.csv)")
    test.add_argument("--out", default="out/pcavs_pairs", help="folder for the clips real/ and fake/")
    for command in (p, test):
        command.add_argument("--weights", default=TOY_WEIGHTS, help="folder of published files, or a weights.pt of train")
        command.add_argument("--aligned", action="store_true", help="published weights: images are aligned already")
        command.add_argument("--seed", type=int, default=0, help="of the generator's noise")
        command.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    add_run_options(learn, "out/pcavs32", steps=2000, batch=32, lr=2e-3, batch_of=f"images, {FRAMES} of each clip,")
    learn.add_argument("--data", nargs="+", help="packs of prepare.py; default: the toy world, drawn into --out")
    add_split_options(learn)
    learn.add_argument("--size", type=int, default=32, choices=(16, 32, 64, 128), help="edge of the images: the dial")
    learn.add_argument("--people", type=int, default=400, help="toy world: how many people (one clip each)")
    learn.add_argument("--w-adv", type=float, default=0.0, help="weight of the adversary; published 1")
    learn.add_argument("--w-vgg", type=float, default=0.0, help="weight of VGG19's features (downloads it); published 10")
    crop.add_argument("clips", nargs="+", help="folders of images, each one clip, or videos")
    crop.add_argument("--csv", help="file of pairs to write, for `pairs`: each video drives itself")
    for command in (p, test, crop):
        command.add_argument("--overwrite", action="store_true", help="replace what exists")
    for command in (p, test, learn):
        command.add_argument("--bf16", action="store_true", help="bf16 autocast: faster on a GPU or a CPU with AMX")
    return parser.parse_args(argv, batch=(FRAMES, 10**5))


def main(argv=None):
    args = parse(argv)
    dict(sample=sample, pairs=pairs, train=train, align=align)[args.command](args)


if __name__ == "__main__":
    run(main)
