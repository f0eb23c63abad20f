"""FC-TFG: canonical space, motion space, and the whole network. Start here.

Jang et al., "That's What I Said: Fully-Controllable Talking Face Generation", ACM MM 2023 (arXiv 2304.03275), section 3.

    symbol   shape          meaning
    z_s      (B, L, D)      W+ code of the source image                 z_s   = VisualEncoder(source)
    z_s2c    (B, L, D)      the same person in the canonical pose       z_s2c = CanonicalEncoder(z_s)
    z_a      (B, T, D)      speech                                      z_a   = AudioEncoder(mel)
    z_v      (B, T, L, D)   driving frames with masked mouths           z_v   = VisualEncoder(mask(driving))
    z_c2d    (B, T, L, D)   motion without identity                     z_c2d = MotionEncoder(TemporalFusion(z_a, z_v))
    z_s2d    (B, T, L, D)   the source person with this motion          z_s2d = z_s2c + z_c2d
    frames   (B, T, 3, H, W)   output; a hypernetwork may change the weights    frames = Generator(z_s2d)

Sizes: B clips, T consecutive frames, N = B * T images, L style layers, D latent width, P width of the pose code, M width
of the mouth code. The first K numbers of the mouth code describe the shape of the lips.

Differences from the paper (docs/differences.md gives the reasons):
- Motion encoder: `Config.motion` is "direct" (default, ours) or "paper". See DirectMotion and PaperMotion.
- IdentityMaps: the W+ code also feeds the generator's coarse features. For real faces it also feeds a coarse RGB image.
- Mouth code, for real faces: M numbers describe the lips, which are masked in the encoder's input. See DirectMotion.
- Pose code, for real faces: P numbers are read from landmarks. They move the image by a flow. See IdentityMaps.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from audio import N_MELS, SILENCE, WINDOW, AudioEncoder, WindowEncoder
from checkpoint import load_checkpoint, load_strictly, wrap_errors
from faces import mask_mouth
from landmarks import POSE_DIM, PoseReader
from media import InputError
from motion import ping_pong
from stylegan2 import Generator, channels_at, load_rosinality, n_styles
from vision import (
    GradualStyleEncoder, HyperStyleNet, MouthEncoder, VisualEncoder, load_encoder, load_hypernet, zero_init)

REACH = 6  # frames on each side of a convolution of SpeechContext; ours
SPEECH_DIM = 128  # width of z_a in front of SpeechContext; ours
# of fit_weights, ours: first learning rate; moved faces in a batch; size in pixels at which images are compared: a fit of
# finer details would blur them, because those of moved faces are not where the generator can paint them
FIT_RATE, FIT_BATCH, FIT_EDGE = 0.02, 3, 32


@dataclasses.dataclass
class Config:
    """Shape of the whole network, saved in every checkpoint as a plain dict. `Config.at(size)` is the dial."""

    size: int = 256             # edge of an image in pixels
    template: str = "toy"       # crop template, see faces.TEMPLATES
    dim: int = 512              # D
    n_mlp: int = 8              # layers of the mapping network
    base: int = 32768           # channels of generator and discriminator: min(cap, base / resolution)
    cap: int = 512
    noise: bool = True          # StyleGAN2's noise maps; off at toy sizes: a young generator imitates edges with them
    encoder: str = "psp"        # "slim": VisualEncoder; "psp": GradualStyleEncoder
    encoder_width: int = 64
    linear: int = 256           # width of the slim encoder's linear path
    map_code: int = 0           # width of the code behind the identity maps; 0 (published generators): no maps
    map_channels: tuple = (256, 64, 16, 4)  # at 4x4, 8x8, 16x16, 32x32
    coarse_rgb: int = 0         # edge of the coarse image in pixels, see IdentityMaps; 0: no coarse image
    flow: int = 0               # nodes along an edge of the flow that moves the head, see IdentityMaps; 0: no flow
    audio_width: float = 1.0    # factor of Wav2Lip's channel counts; 0: WindowEncoder and SpeechContext
    voice_norm: bool = False    # real faces: normalise sound by audio.normalise_voice. Older files lack this field
    motion: str = "direct"      # or "paper"
    pose_dim: int = 32          # P
    mouth_dim: int = 0          # M; 0 (paper): no mouth code
    shape_dim: int = 0          # K
    hyper: str = "separable"    # heads of HyperStyle: "separable" or "shared"; "none": no hypernetwork
    hyper_width: int = 64
    refine: int = 5             # refinements of the weight changes for a photo (HyperStyle: 5); 0: unchanged weights

    @property
    def L(self) -> int:
        return n_styles(self.size)

    @property
    def context(self) -> int:
        """Reach of the temporal convolutions: sound windows needed on each side of the decoded frames"""
        return 2 if self.audio_width else 2 * REACH

    @classmethod
    def at(cls, size: int, **changes) -> "Config":
        """The dial: 32 and 64 for a CPU, 128 for an hour of a GPU, 256 as in the paper."""
        assert size in (16, 32, 64, 128, 256), f"size is {size}, expected one of 16, 32, 64, 128, 256"
        real_faces = changes.get("template", "toy") != "toy"
        dial = dict(size=size, voice_norm=real_faces)
        if size < 256:
            dial |= dict(encoder="slim", encoder_width=32, n_mlp=4, noise=False, refine=2, dim=128, base=32 * size,
                         cap=128, linear=128, map_code=96, map_channels=(128, 64, 16, 4), audio_width=0.25,
                         hyper_width=16)
            if real_faces or size == 128:
                dial |= dict(dim=256, base=64 * size, cap=256, audio_width=0.5, hyper_width=32)
            if real_faces:  # ours: real faces are harder than drawn faces
                dial |= dict(linear=200, map_code=231) if size == 16 else dict(linear=1000, map_code=1031)
                dial |= dict(map_channels=(), coarse_rgb=min(32, size))
                if changes.get("motion") != "paper":
                    dial |= dict(mouth_dim=24, shape_dim=6, audio_width=0, pose_dim=POSE_DIM, flow=16)
            elif size == 128:
                dial |= dict(n_mlp=8, noise=True, encoder_width=48, linear=256, map_code=256,
                             map_channels=(256, 64, 16, 4))
        return cls(**(dial | changes))


# ------------------------------------------------------------------------------------------------------ the two spaces

class Whiten(nn.Module):
    """(z - mean) / std for each of the L x D numbers of a code"""

    def __init__(self, L: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(L, dim))
        self.register_buffer("std", torch.ones(L, dim))

    @torch.no_grad()
    def fit(self, z):  # codes of training frames (n, L, D)
        self.mean.copy_(z.mean(0))
        self.std.copy_(z.std(0).clamp_min(0.05 * z.std()))                        # ours: constant numbers stay small

    def forward(self, z):  # (.., L, D) -> (.., L * D)
        return ((z - self.mean) / self.std).flatten(-2)


class CanonicalEncoder(nn.Module):
    """z_s -> z_s2c: remove the motion, keep the identity (paper, section 3.2: a two-layer MLP). z_s2c = z_s + linear(z) +
    MLP(z), where z is the whitened code. The linear part is ours, initialised by fit_motion_space in initialise.py."""

    def __init__(self, L: int, dim: int, hidden: int, rank: int):
        super().__init__()
        self.L, self.dim = L, dim
        self.whiten = Whiten(L, dim)
        self.down, self.up = nn.Linear(L * dim, rank, bias=False), zero_init(nn.Linear(rank, L * dim, bias=False))
        self.mlp = nn.Sequential(nn.Linear(L * dim, hidden), nn.LeakyReLU(0.2), zero_init(nn.Linear(hidden, L * dim)))

    def forward(self, z_s):  # (B, L, D) -> (B, L, D)
        z = self.whiten(z_s)
        return z_s + (self.up(self.down(z)) + self.mlp(z)).unflatten(-1, (self.L, self.dim))


class TemporalFusion(nn.ModuleDict):
    """One residual 1-D convolution over time for each modality (paper, section 3.3). Reach: two frames.
    DirectMotion omits the visual one, through which the rhythm of the mouth would reach the pose."""

    def __init__(self, dim: int, modalities: tuple = ("audio",)):
        super().__init__({modality: nn.Conv1d(dim, dim, 5, padding=2) for modality in modalities})

    def forward(self, z, modality: str = "audio"):  # (N, T, D) -> (N, T, D)
        return z + self[modality](z.transpose(1, 2)).transpose(1, 2)


class SpeechContext(nn.Module):
    """Replaces TemporalFusion for the voices of many people, ours: two residual blocks, half a second to each side."""

    def __init__(self, dim: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 2 * REACH + 1, padding=REACH) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, z_a):  # (B, T, D) -> (B, T, D)
        for norm, conv, mix in zip(self.norms, self.convs, self.mix):
            z_a = z_a + mix(F.gelu(conv(norm(z_a).transpose(1, 2)).transpose(1, 2)))
        return self.norms[2](z_a)


class PaperMotion(nn.Module):
    """Three-layer MLP over the fused modalities. The style layers share its weights. Each layer has a learned embedding
    (ours: the flattened W+ code at 256 px would cost 51 M weights per layer of the MLP)."""

    def __init__(self, config: Config):
        super().__init__()
        L, D = config.L, config.dim
        self.whiten = Whiten(L, D)
        self.fusion = TemporalFusion(D, ("audio", "visual"))
        self.layer = nn.Parameter(0.1 * torch.randn(L, D))
        self.mlp = nn.Sequential(nn.Linear(3 * D, 2 * D), nn.LeakyReLU(0.2), nn.Linear(2 * D, 2 * D), nn.LeakyReLU(0.2),
                                 nn.Linear(2 * D, D))
        nn.init.normal_(self.mlp[4].weight, std=0.01)
        nn.init.zeros_(self.mlp[4].bias)

    def forward(self, z_a, z_v, context=0, mouth=None):  # (B, T, D), (B, T, L, D) -> (B, T - 2 context, L, D)
        B, T, L, _ = z_v.shape
        z_v = self.whiten(z_v).unflatten(-1, (L, -1)).transpose(1, 2).flatten(0, 1)          # (B * L, T, D)
        z_v = self.fusion(z_v, "visual").unflatten(0, (B, L)).transpose(1, 2)                # (B, T, L, D)
        z_v = z_v[:, context:T - context]
        z_a = self.fusion(z_a, "audio")[:, context:T - context]
        return self.mlp(torch.cat([z_v, z_a[:, :, None].expand_as(z_v), self.layer.expand_as(z_v)], -1))


class DirectMotion(nn.Module):
    """z_c2d = pose(z_v) + lips(z_a), ours. The pose code of a frame is P linear functions of its whitened code; for real
    faces it is read from landmarks. The lips are an MLP of the sound. A joint MLP misses the pose, or copies the driver's
    face: in training, source and driving frames are of one clip.

    Mouth code, for real faces: the sound predicts its first K numbers, the shape of the lips. The first number, the
    opening, replaces that of the source. The other K - 1 numbers are added to those of the source: a wide mouth or a
    smile stays. The last M - K numbers (colour, teeth, beard) come from the source."""

    def __init__(self, config: Config, hidden: int = 192):
        super().__init__()
        L, D, P, M, K = config.L, config.dim, config.pose_dim, config.mouth_dim, config.shape_dim
        self.shape, self.M = (L, D), M
        A = D if config.audio_width else SPEECH_DIM                               # width of z_a
        self.fusion = TemporalFusion(A) if config.audio_width else SpeechContext(A)
        self.whiten, self.pose_down = (None, None) if config.flow else (Whiten(L, D), nn.Linear(L * D, P))
        self.pose_up = nn.Linear(P, L * D, bias=False)
        self.lips = nn.Sequential(nn.Linear(A, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2),
                                  nn.Linear(hidden, K or L * D))
        self.mouth_up = nn.Linear(M, L * D, bias=False) if M else nn.Identity()   # mouth code -> W+
        nn.init.normal_(self.lips[4].weight, std=0.01)
        nn.init.zeros_(self.lips[4].bias)
        # pose deviations of 8 clips of 3 s; with a pose code the motion of motion.py is used
        self.register_buffer("idle", None if config.flow else torch.zeros(8, 75, P))
        # for warp.py, set by initialise.fit_warp: landmark displacements per unit of each shape number; slope and offset
        # from the opening in the mouth code to that in warp.py, whose unit is the distance of the eyes' outer corners
        self.register_buffer("moves", torch.zeros(K, 68, 2) if M else None)
        self.register_buffer("opening", torch.zeros(2) if M else None)

    def pose(self, z_v):  # (B, T, L, D) -> (B, T, P). The z_v of a PoseReader are pose codes
        return self.pose_down(self.whiten(z_v)) if self.pose_down else z_v

    def predict_lip_shape(self, z_a, context=0):
        """z_a (B, T + 2 context, D) -> shape of the lips (B, T, K). Without a mouth code: lips in W+, (B, T, L * D)."""
        z_a = self.fusion(z_a)
        return self.lips(z_a[:, context:z_a.shape[1] - context])

    def audio_to_mouth(self, z_a, context=0):
        """z_a (B, T + 2 context, D) -> mouth code (B, T, M), the last M - K numbers 0. Without a mouth code: as
        predict_lip_shape."""
        lips = self.predict_lip_shape(z_a, context)                               # (B, T, K)
        return F.pad(lips, (0, self.M - lips.shape[-1])) if self.M else lips

    def appearance_part(self, mouth):
        """Mouth code (.., M) -> the same with an opening of 0: the part of the source's code that speech keeps"""
        return F.pad(mouth[..., 1:], (1, 0))

    def embed_mouth(self, mouth):  # (.., M) -> (.., L, D)
        return self.mouth_up(mouth).unflatten(-1, self.shape)

    def embed_pose(self, pose):  # (.., P) -> (.., L, D)
        return self.pose_up(pose).unflatten(-1, self.shape)

    def join(self, pose, mouth):  # (.., P), (.., M) -> (.., L, D)
        return self.embed_pose(pose) + self.embed_mouth(mouth)

    def forward(self, z_a, z_v, context=0, mouth=None):  # (B, T + 2 context, D), (B, T, L, D) -> (B, T, L, D)
        pose, predicted = self.pose(z_v), self.audio_to_mouth(z_a, context)
        if mouth is not None:                                                     # (B, T, M), NaN: use the prediction
            predicted = torch.where(mouth.isnan(), predicted, mouth.to(predicted))
        return self.join(pose, predicted)


class IdentityMaps(nn.Module):
    """W+ code (N, L, D) -> maps (N, C', H, W) for the generator's features up to 32x32, a coarse image (N, 3, h, h) to
    add to its RGB, and a flow (N, h, h, 2) that moves both with the head, or None. Ours, linear: the input is z_s2d,
    because maps of z_s would bypass the motion space. For real faces the maps are computed from the coarse image, which
    initialise.fit_coarse_rgb fits in closed form; added pixels alone would not turn the head of a stranger."""

    def __init__(self, config: Config):
        super().__init__()
        self.edge = config.coarse_rgb                                             # h
        resolutions = [r for r in (4, 8, 16, 32) if r <= (self.edge or config.size // 2)]
        channels = [channels_at(r, config.base, config.cap) for r in resolutions]
        self.shapes = [(min(c, most), r, r) for c, most, r in zip(config.map_channels, channels, resolutions)]
        self.down = nn.Linear(config.L * config.dim, config.map_code)
        self.up = nn.ModuleList(zero_init(nn.Linear(config.map_code, math.prod(s))) for s in self.shapes)
        self.coarse_rgb = zero_init(nn.Linear(config.map_code, 3 * self.edge ** 2)) if self.edge else None
        self.flow = zero_init(nn.Linear(config.map_code, 2 * config.flow ** 2)) if config.flow else None
        self.views = nn.ModuleList(zero_init(nn.Conv2d(3, c, 3, padding=1)) for c in channels if self.edge)

    def forward(self, w_plus):
        code = self.down(w_plus.flatten(1))                                       # (N, map_code)
        if self.edge:
            coarse = self.coarse_rgb(code).unflatten(1, (3, self.edge, self.edge))
            maps = [view(F.adaptive_avg_pool2d(coarse, 4 * 2 ** i)) for i, view in enumerate(self.views)]
            flow = enlarge_flow(self.flow(code), self.edge) if self.flow else None
        else:
            coarse = flow = None
            maps = [up(code).unflatten(1, shape) for up, shape in zip(self.up, self.shapes)]
        return [x.contiguous(memory_format=torch.channels_last) for x in maps], coarse, flow


def enlarge_flow(flow, edge: int):
    """Values of a flow at f x f nodes, (N, 2 f f) -> flow (N, edge, edge, 2) for move_pixels"""
    nodes = flow.unflatten(1, (2, math.isqrt(flow.shape[1] // 2), -1))
    return F.interpolate(nodes, (edge, edge), mode="bilinear", align_corners=False).movedim(1, -1)


# --------------------------------------------------------------------------------------------------- the whole network

def weight_shapes(generator: Generator) -> list:
    """(O, I) of each 3x3 layer, in the order of styled_convs()"""
    return [tuple(layer.conv.weight.shape[1:3]) for layer in generator.styled_convs()]


class FCTFG(nn.Module):
    """The whole network. generator_only (stage 1): without all other parts."""
    kind = "fctfg"  # control.py also measures networks of pcavs.py

    def __init__(self, config: Config, generator_only: bool = False):
        super().__init__()
        c = self.config = config
        self.generator = Generator(c.size, c.dim, c.n_mlp, c.base, c.cap)
        self.encoder = self.maps = self.hyper = self.mouth = self.pose = None
        if generator_only:
            return
        if c.encoder == "slim":
            self.encoder = VisualEncoder(c.size, c.dim, c.L, c.encoder_width, c.linear)
        else:
            self.encoder = GradualStyleEncoder(c.L, c.dim, c.encoder_width)
        self.maps = IdentityMaps(c) if c.map_code else None
        if c.hyper != "none":
            self.hyper = HyperStyleNet(weight_shapes(self.generator), c.hyper, c.hyper_width)
        self.canonical = CanonicalEncoder(c.L, c.dim, hidden=c.dim // 2, rank=2 * c.pose_dim)
        self.audio = AudioEncoder(c.dim, c.audio_width) if c.audio_width else WindowEncoder(SPEECH_DIM)
        self.motion = DirectMotion(c) if c.motion == "direct" else PaperMotion(c)
        assert not c.mouth_dim or c.motion == "direct", "a mouth code needs the direct motion encoder"
        self.mouth = MouthEncoder(c.template, c.mouth_dim, c.shape_dim) if c.mouth_dim else None
        self.pose = PoseReader(c.template) if c.flow else None

    def decode(self, w_plus, deltas=None):
        """w_plus (N, L, D), deltas as in Generator.forward -> images (N, 3, H, W)"""
        maps, coarse, flow = self.maps(w_plus) if self.maps else ((), None, None)
        return self.generator(w_plus, "fixed" if self.config.noise else "off", maps, deltas, coarse, flow)

    def refine(self, source, z_s, deltas=None):
        """One refinement by the hypernetwork: source (B, 3, H, W), its code z_s (B, L, D), previous deltas -> new deltas,
        as in Generator.forward. Gradients flow through the latest change only."""
        with torch.no_grad():
            y_hat = self.decode(z_s, deltas)
        changes = [change.float() for change in self.hyper(source, y_hat)]        # fp32: bf16 sums lose small changes
        return changes if deltas is None else [c + d.detach() for c, d in zip(changes, deltas)]

    def weight_changes(self, source, z_s):
        """source (B, 3, H, W), z_s (B, L, D) -> deltas after config.refine refinements, the last with gradients"""
        deltas = None
        steps = self.config.refine if self.hyper else 0
        if steps and self.mouth:
            z_s = self.invert(source)                                             # the code with the mouth of the source
        for i in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == steps - 1):
                deltas = self.refine(source, z_s, deltas)
        return deltas

    def canonical_code(self, source):
        """source (B, 3, H, W) -> its code z_s and its canonical code z_s2c, both (B, L, D)"""
        z_s = self.encode_source(source)
        z_s2c = self.canonical(z_s)
        if self.pose:
            z_s2c = z_s2c - self.motion.embed_pose(self.encode_driving(source[:, None])[:, 0])
        if self.mouth:
            z_s2c = z_s2c + self.motion.embed_mouth(self.motion.appearance_part(self.mouth(source)))
        return z_s, z_s2c

    def encode_source(self, source):
        """source (B, 3, H, W) -> z_s (B, L, D). With a mouth code the lips are masked."""
        return self.encoder(mask_mouth(source, self.config.template, "lips") if self.mouth else source)

    def invert(self, images, mouth=None):
        """images (N, 3, H, W) -> W+ codes (N, L, D) that decode to them. mouth (N, M): replaces their own mouth codes."""
        if not self.mouth:
            return self.encoder(images)
        mouth = self.mouth(images) if mouth is None else mouth
        return self.encode_source(images) + self.motion.embed_mouth(mouth)

    def encode_driving(self, driving):
        """driving (B, T, 3, H, W) -> z_v (B, T, L, D). The mouths are masked here: the lips must come from the sound. For
        real faces the pose codes (B, T, P), read from nose and eyes alone."""
        frames = driving.flatten(0, 1)
        z_v = self.pose(frames) if self.pose else self.encoder(mask_mouth(frames, self.config.template))
        return z_v.unflatten(0, driving.shape[:2])

    def encode_sound(self, mel):
        """mel (B, T, 1, 80, 16) -> z_a (B, T, D)"""
        return self.audio(mel.flatten(0, 1)).unflatten(0, mel.shape[:2])

    def forward(self, source, driving, mel, context: int = 0, mouth=None):
        """One window of each clip -> frames (B, T, 3, H, W), z_s2c (B, L, D), z_c2d (B, T, L, D).
        source: (B, 3, H, W) in [-1, 1]. driving: (B, T', 3, H, W), where T' = T + 2 context, or T if "direct".
        mel: (B, T + 2 context, 1, 80, 16). context: frames at both ends that only the temporal convolutions use.
        mouth: (B, T, M), with a mouth code: replaces the prediction from sound, except for NaN."""
        T = mel.shape[1] - 2 * context
        assert driving.shape[1] in (T, mel.shape[1]), (
            f"{driving.shape[1]} driving frames, {mel.shape[1]} mel windows, context {context}")
        z_s, z_s2c = self.canonical_code(source)
        if self.config.motion == "direct":                                        # a pose needs no neighbouring frames
            driving = middle_frames(driving, T)
        z_a, z_v = self.encode_sound(mel), self.encode_driving(driving)
        z_c2d = self.motion(z_a, z_v, context, mouth)
        z_s2d = z_s2c[:, None] + z_c2d                                            # (B, T, L, D)
        frames = self.decode(z_s2d.flatten(0, 1), self.weight_changes(source, z_s))
        return frames.unflatten(0, z_c2d.shape[:2]), z_s2c, z_c2d

    def moved_codes(self, source, motion, opening, shape):
        """One photo (1, 3, H, W), or one for each of n frames (n, 3, H, W); a motion.Motion relative to their poses; lips
        in the units of warp.py, opening (n,) and shape (n, K - 1) -> codes z_s2d (n, L, D)"""
        with torch.no_grad():
            pose = self.pose.follow(self.encode_driving(source[:, None])[:, 0], motion.poses, motion.blinks)
        return self.canonical_code(source)[1] + self.motion.join(pose, self.mouth_codes(opening, shape))

    def mouth_codes(self, opening, shape):
        """Lips in the units of warp.py, opening (n,) and shape (n, K - 1) -> mouth codes (n, M), the last M - K 0"""
        slope, offset = self.motion.opening.tolist()
        lips = torch.from_numpy(np.c_[(opening - offset) / slope, shape]).to(self.motion.moves)
        return F.pad(lips, (0, self.motion.M - lips.shape[1]))

    def fit_weights(self, source, codes, targets, steps: int):
        """Photo (3, H, W), codes (n, L, D) and images (n, 3, H, W) of its face in motion -> weight changes that bring its
        reconstruction nearer to it, and what the codes decode to nearer to the images. Gradient descent as in pivotal
        tuning (arXiv 2106.05744), ours of HyperStyle's relative changes. With the photo alone, lips would move less."""
        with torch.no_grad():
            z_s = self.invert(source[None])
        deltas = [source.new_zeros(1, *shape, 1, 1, requires_grad=True) for shape in weight_shapes(self.generator)]
        optimizer = torch.optim.Adam(deltas, betas=(0.9, 0.99))
        for step in tqdm(range(steps), "fitting the photo", leave=False, disable=None):
            optimizer.param_groups[0]["lr"] = FIT_RATE * (1 - step / steps)
            i = torch.arange(step * FIT_BATCH, (step + 1) * FIT_BATCH) % len(codes)
            error = self.decode(torch.cat([z_s, codes[i]]), deltas) - torch.cat([source[None], targets[i]])
            optimizer.zero_grad()
            image_loss(F.avg_pool2d(error, max(1, error.shape[-1] // FIT_EDGE))).backward(inputs=deltas)
            optimizer.step()
        return [delta.detach() for delta in deltas]

    @torch.inference_mode()
    def reconstruct(self, source, deltas=None):
        """Photo (3, H, W), weight changes of fit_weights, if any -> its reconstruction (3, H, W) in [-1, 1]"""
        z_s = self.invert(source[None])
        return self.decode(z_s, deltas or self.weight_changes(source[None], z_s))[0].clamp(-1, 1)

    def encode_whole_sound(self, mel):
        """mel (n, 1, 80, 16), or an iterable of consecutive pieces of it -> z_a (1, n, D)"""
        pieces = mel.split(256) if torch.is_tensor(mel) else mel
        return torch.cat([self.audio(piece) for piece in pieces])[None]

    def predict_lip_shape(self, mel):
        """mel, as for animate -> shape of the lips (n, K). Silence precedes and follows the sound, as in training: the
        convolutions would read zeros there. Needs a mouth code."""
        reach = self.config.context
        silence = self.audio(self.motion.moves.new_full((reach, 1, N_MELS, WINDOW), SILENCE))[None]  # (1, reach, D)
        z_a = torch.cat([silence, self.encode_whole_sound(mel), silence], 1)
        return self.motion.predict_lip_shape(z_a, reach)[0]

    @property
    def lip_moves(self) -> np.ndarray:
        """Landmark displacements (K, 68, 2) of each shape number, see warp.Lips. Needs a mouth code."""
        return self.motion.moves.cpu().double().numpy()

    @torch.inference_mode()
    def predict_lips(self, mel):
        """mel, as for animate -> NumPy arrays in the units of warp.py: opening (n,), in distances of the outer corners of
        the eyes, and shape (n, K - 1). Needs a mouth code."""
        numbers = self.predict_lip_shape(mel).cpu().numpy()
        slope, offset = self.motion.opening.tolist()
        return (slope * numbers[:, 0] + offset).clip(0), numbers[:, 1:]

    @torch.inference_mode()
    def read_opening(self, source) -> float:
        """Photo (3, H, W) -> opening of its lips in the unit of warp.py. Needs a mouth code."""
        slope, offset = self.motion.opening.tolist()
        return max(0.0, slope * float(self.mouth(source[None])[0, 0]) + offset)

    @torch.inference_mode()
    def animate(self, source, mel, driving=None, sway: bool = True, batch: int = 16, deltas=None, mouth=None):
        """A talking clip, streamed: yields (b, 3, H, W) in [-1, 1], n frames in all.
        source: (3, H, W) in [-1, 1]. mel: (n, 1, 80, 16), one window a frame, or an iterable of consecutive pieces of it.
        driving: iterable of n frames (3, H, W). None: the pose of the source with idle motion. With a pose code: a
        motion.Motion relative to the pose of the source. None: the source's own pose. sway: idle motion moves the head;
        if False, only blinks. batch: frames decoded at a time. deltas: weight changes of fit_weights, if any. mouth:
        (n, M), with a mouth code: replaces the prediction from sound, whose convolutions read zeros beyond both ends."""
        source = source[None]
        z_s, z_s2c = self.canonical_code(source)
        deltas, z_a = deltas or self.weight_changes(source, z_s), self.encode_whole_sound(mel)
        for z_c2d in self.stream_motion(source, z_a, driving, sway, batch, mouth):
            yield self.decode(z_s2c + z_c2d, deltas).clamp(-1, 1)

    def stream_motion(self, source, z_a, driving, sway, batch, mouth=None):
        """Yields z_c2d (b, L, D) in order. Each batch includes the frames within reach of the temporal convolutions."""
        n, reach, direct = z_a.shape[1], self.config.context, self.config.motion == "direct"
        z_source, first = self.encode_driving(source[None]), 0                    # (1, 1, L, D)
        if self.pose and driving is None:
            z_v = z_source.expand(1, n, -1)
        elif self.pose:  # a motion that is too short is played back and forth
            at = [ping_pong(k, len(driving.poses)) for k in range(n)]
            z_v = self.pose.follow(z_source[0], driving.poses[at], driving.blinks[at])[None]
        elif driving is not None:
            frames, z_v = iter(driving), z_source[:, :0]                          # codes of driving frames from first on
        elif direct:
            idle = self.motion.idle if sway else extract_blinks(self.motion.idle)
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            lo, hi = max(0, start - reach), min(n, stop + reach)
            given = None if mouth is None else mouth[None, lo:hi]
            if self.pose:
                z_c2d = self.motion(z_a[:, lo:hi], z_v[:, lo:hi], mouth=given)
            elif driving is not None:
                while first + z_v.shape[1] < hi:                                  # encode new frames
                    count = min(batch, hi - first - z_v.shape[1])
                    new = torch.stack([next(frames).to(source) for _ in range(count)])
                    z_v = torch.cat([z_v, self.encode_driving(new[None])], 1)
                z_v, first = z_v[:, lo - first:], lo                              # drop old frames
                z_c2d = self.motion(z_a[:, lo:hi], z_v, mouth=given)
            elif direct:
                pose = self.motion.pose(z_source) + idle_poses(idle, lo, hi)[None]
                z_c2d = self.motion.join(pose, self.motion.audio_to_mouth(z_a[:, lo:hi]) if given is None else given)
            else:
                z_c2d = self.motion(z_a[:, lo:hi], z_source.expand(1, hi - lo, -1, -1))
            yield z_c2d[0, start - lo:stop - lo]


def image_loss(error):
    """Differences of images (N, 3, H, W) -> L1 of them and of their gradients: edges count as much as areas"""
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def middle_frames(x, T: int):
    """x (B, T', ..) -> its middle (B, T, ..)"""
    start = (x.shape[1] - T) // 2
    return x[:, start:start + T]


def idle_poses(idle, lo: int, hi: int):
    """idle (n, T, P) -> frames lo .. hi - 1 of endless motion, (hi - lo, P): each clip in turn, forwards and backwards"""
    n, T, _ = idle.shape
    clip, t = np.divmod(np.arange(lo, hi), 2 * T)
    return idle[clip % n, np.minimum(t, 2 * T - 1 - t)]


def extract_blinks(idle):
    """idle (n, T, P) -> its blinks, zero elsewhere. A blink lasts 3 to 7 frames: a running median of 13 frames is
    subtracted, and small deviations are set to 0. Ours: in the toy world the deviation in a blink is 3.5 to 5 times the
    median deviation, in other frames less than 2.5 times."""
    padded = F.pad(idle.transpose(1, 2), (6, 6), mode="replicate")
    brief = idle - padded.unfold(2, 13, 1).median(-1).values.transpose(1, 2)
    size = brief.norm(dim=-1, keepdim=True)
    return brief * (size / size.median().clamp_min(1e-6) - 2.5).clamp(0, 1)


@torch.no_grad()
def estimate_mean_w(generator: Generator):
    """Mean w (D,) of random z: the initial output of an encoder"""
    return generator.mapping(torch.randn(4096, generator.dim, device=generator.input.input.device)).mean(0)


# --------------------------------------------------------------------------------------------------------------- files

def load_published(size: int, generator=None, encoder=None, hyper=None) -> tuple[dict, dict]:
    """Networks from published files, in place of stages 1 and 2 at `size` px -> (overrides of Config, networks by
    name: "generator", "D", "encoder", "hyper"). generator: rosinality's StyleGAN2. encoder: pSp's or ArcFace's, see
    load_encoder. hyper: HyperStyle's, for this generator. InputError: a file is missing, damaged, hostile, or of another
    kind or size; the hypernetwork does not fit the generator."""
    networks, overrides, dim = {}, {}, Config.at(size).dim
    if generator:
        G, D, arguments = load_rosinality(generator, size)
        dim, networks["generator"] = G.dim, G
        if D:
            networks["D"] = D
        overrides = arguments | dict(noise=True, map_code=0)
    if encoder:
        networks["encoder"] = load_encoder(encoder, n_styles(size), dim)
        overrides |= dict(encoder="psp", encoder_width=len(networks["encoder"].input_layer[0].weight))
    if hyper:
        if not generator:
            raise InputError(f"{hyper}: name its generator of {size} px with --generator")
        networks["hyper"], form = load_hypernet(hyper, weight_shapes(G))
        overrides |= dict(hyper=form, hyper_width=len(networks["hyper"].conv1.weight))
    return overrides, networks


@torch.no_grad()
def enlarge_network(model: FCTFG) -> FCTFG:
    """A network of 64 px -> the same one for 128 px, to train further, ours after progressive growing (arXiv 1710.10196).
    The codes get two more style layers, and the new toRGB starts at zero: at first the image is the old one, enlarged."""
    large = FCTFG(dataclasses.replace(model.config, size=2 * model.config.size))
    state = large.state_dict()
    for name, old in model.state_dict().items():
        if state[name].shape == old.shape:
            state[name].copy_(old)
        else:                                                                     # new styles: zeros, deviations of 1
            state[name].fill_(name.endswith("whiten.std"))[tuple(map(slice, old.shape))] = old
    L, average = model.config.L, large.encoder.latent_avg
    average[L:] = average[L - 1]
    large.generator.to_rgbs[-1].conv.weight.zero_()
    return large.to(average)


def load_model(path: str, device="cpu") -> FCTFG:
    """The EMA network of a weights.pt or stage3.pt, in eval mode. InputError: see load_checkpoint."""
    checkpoint = load_checkpoint(path, ("weights", "stage3"))
    with wrap_errors(path, "not a network of this version"):
        state = checkpoint["networks" if checkpoint["kind"] == "weights" else "ema"]["model"]
        model = load_strictly(lambda: FCTFG(Config(**checkpoint["config"])), state, path)
    return model.to(device).eval()
