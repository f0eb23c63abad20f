"""FC-TFG: canonical space, motion space, and the whole network. Start here.

Jang et al., "That's What I Said: Fully-Controllable Talking Face Generation", ACM MM 2023 (arXiv 2304.03275), section 3.

    symbol   shape          what it is
    z_s      (B, L, D)      W+ code of the source image              z_s   = VisualEncoder(source)
    z_s2c    (B, L, D)      the same person in the canonical pose    z_s2c = CanonicalEncoder(z_s)
    z_a      (B, T, D)      sound                                    z_a   = AudioEncoder(mel)
    z_v      (B, T, L, D)   driving frames, mouths masked            z_v   = VisualEncoder(mask(driving))
    z_c2d    (B, T, L, D)   motion, without identity                 z_c2d = MotionEncoder(TemporalFusion(z_a, z_v))
    z_s2d    (B, T, L, D)   this person with this motion             z_s2d = z_s2c + z_c2d
    frames   (B, T, 3, H, W)                                         Generator(z_s2d, weights changed by a hypernetwork)

B clips, T consecutive frames, N = B * T, L style layers, D latent width, P width of the pose code, M width of the mouth
code, K of its numbers are the shape of the lips.

What differs from the paper (docs/differences.md says why):
- `Config.motion`: "direct", the default, or "paper": see DirectMotion and PaperMotion.
- IdentityMaps: the code also feeds the generator's coarse features and, for real faces, a coarse RGB image.
- Mouth code, for real faces: M numbers hold the lips, which are masked in the encoder's input. See DirectMotion.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from audio import AudioEncoder, WindowEncoder
from checkpoint import load_checkpoint, load_strictly, wrap_errors
from faces import mask_mouth
from media import InputError
from stylegan2 import Generator, load_rosinality, n_styles, infer_arguments
from vision import (
    GradualStyleEncoder, HyperStyleNet, MouthEncoder, VisualEncoder, load_encoder, load_hypernet, zero_init)

REACH = 6  # frames on each side that a convolution of SpeechContext sees; ours
SPEECH_DIM = 128  # numbers of its sound; ours


@dataclasses.dataclass
class Config:
    """Shape of the whole network; saved in every checkpoint as a plain dict. `Config.at(size)` is the dial."""

    size: int = 256             # edge of an image
    template: str = "toy"       # crop template, see faces.TEMPLATES
    dim: int = 512              # D
    n_mlp: int = 8              # layers of the mapping network
    base: int = 32768           # channels of generator and discriminator: min(cap, base / resolution)
    cap: int = 512
    noise: bool = True          # StyleGAN2's noise maps; off at toy sizes: a young generator imitates edges with them
    encoder: str = "psp"        # "slim": VisualEncoder; "psp": GradualStyleEncoder
    encoder_width: int = 64
    linear: int = 256           # numbers of the slim encoder's linear path
    map_code: int = 0           # numbers behind the identity maps; 0: none, as with published generators
    map_channels: tuple = (256, 64, 16, 4)  # at 4x4, 8x8, 16x16, 32x32
    coarse_rgb: int = 0         # edge of the coarse image, a linear map of the code, see IdentityMaps; 0: none
    audio_width: float = 1.0    # of Wav2Lip's channel counts; 0: WindowEncoder and SpeechContext
    voice_norm: bool = False    # sound by audio.normalise_voice: with real faces; files without this field have none
    motion: str = "direct"      # or "paper"
    pose_dim: int = 32          # P
    mouth_dim: int = 0          # M; 0: no mouth code, as in the paper
    shape_dim: int = 0          # K
    hyper: str = "separable"    # HyperStyle's heads: "separable" or "shared"; "none": no hypernetwork
    hyper_width: int = 64
    refine: int = 5             # refinements of a photo's weight changes (HyperStyle: 5); 0: leave the weights alone

    @property
    def L(self) -> int:
        return n_styles(self.size)

    @property
    def context(self) -> int:
        """Sound windows on each side of the decoded frames: the reach of the temporal convolutions"""
        return 2 if self.audio_width else 2 * REACH

    @classmethod
    def at(cls, size: int, **changes) -> "Config":
        """The dial: 32 and 64 for a CPU, 128 for an hour of a GPU, 256 as in the paper."""
        assert size in (16, 32, 64, 128, 256), f"size is {size}, expected one of 16, 32, 64, 128, 256"
        real, dial = changes.get("template", "toy") != "toy", {}
        if size < 256:
            dial = dict(encoder="slim", encoder_width=32, n_mlp=4, noise=False, refine=2, dim=128, base=32 * size,
                        cap=128, linear=128, map_code=96, map_channels=(128, 64, 16, 4), audio_width=0.25,
                        hyper_width=16)
            if real or size == 128:
                dial |= dict(dim=256, base=64 * size, cap=256, audio_width=0.5, hyper_width=32)
            if real:  # ours: real faces are harder than drawn ones
                codes = dict(linear=200, map_code=224) if size == 16 else dict(linear=1000, map_code=1024)
                dial |= codes | dict(map_channels=(), coarse_rgb=min(32, size))
                if changes.get("motion") != "paper":
                    dial |= dict(mouth_dim=24, shape_dim=6, audio_width=0)
            elif size == 128:
                dial |= dict(n_mlp=8, noise=True, encoder_width=48, linear=256, map_code=256,
                             map_channels=(256, 64, 16, 4))
        return cls(**(dict(size=size, voice_norm=real) | dial | changes))


# ------------------------------------------------------------------------------------------------------ the two spaces

class Whiten(nn.Module):
    """(z - mean) / std for each of the L x D numbers of a code, see `FCTFG.set_statistics`"""

    def __init__(self, L: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(L, dim))
        self.register_buffer("std", torch.ones(L, dim))

    def forward(self, z):  # (.., L, D) -> (.., L * D)
        return ((z - self.mean) / self.std).flatten(-2)


class CanonicalEncoder(nn.Module):
    """z_s -> z_s2c: remove the motion, keep the identity (paper, section 3.2: a two-layer MLP). z_s2c = z_s + linear(z) +
    MLP(z), z the whitened code; the linear part, ours, starts from a regression (initialise.fit_motion_space)."""

    def __init__(self, L: int, dim: int, hidden: int, rank: int):
        super().__init__()
        self.L, self.dim = L, dim
        self.whiten = Whiten(L, dim)
        self.down, self.up = nn.Linear(L * dim, rank, bias=False), zero_init(nn.Linear(rank, L * dim, bias=False))
        self.mlp = nn.Sequential(nn.Linear(L * dim, hidden), nn.LeakyReLU(0.2), zero_init(nn.Linear(hidden, L * dim)))

    def forward(self, z_s):  # (B, L, D) -> (B, L, D)
        z = self.whiten(z_s)
        return z_s + (self.up(self.down(z)) + self.mlp(z)).unflatten(-1, (self.L, self.dim))


class TemporalFusion(nn.Module):
    """One 1-D convolution over time for each modality (paper, section 3.3), added to its input; reach two frames.
    None for driving frames in "direct": it would let the mouth's rhythm into the pose."""

    def __init__(self, dim: int, modalities: tuple = ("audio",)):
        super().__init__()
        for name in modalities:
            self.add_module(name, nn.Conv1d(dim, dim, 5, padding=2))

    def forward(self, z, name: str = "audio"):  # (N, T, D) -> the same shape
        return z + self.get_submodule(name)(z.transpose(1, 2)).transpose(1, 2)


class SpeechContext(nn.Module):
    """Ours, in TemporalFusion's place for many people's voices: two residual blocks, half a second to each side"""

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
    """Three-layer MLP over the fused modalities. The style layers share its weights and have a learned embedding each
    (ours: flattened W+ at 256 px would cost 51 M weights a layer)."""

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
        z_v = self.fusion(z_v, "visual").unflatten(0, (B, L)).transpose(1, 2)
        z_a, z_v = (z[:, context:T - context] for z in (self.fusion(z_a), z_v))
        z_a, layer = z_a[:, :, None].expand_as(z_v), self.layer.expand_as(z_v)
        return self.mlp(torch.cat([z_v, z_a, layer], -1))


class DirectMotion(nn.Module):
    """z_c2d = pose(z_v) + lips(z_a). The pose code of a frame is P linear functions of its whitened code; the lips are an
    MLP of the sound. (A joint MLP misses the pose or copies the driver's face: training pairs come from one clip.)

    With a mouth code (ours, real faces) sound predicts its first K numbers, the shape of the lips. The first of these,
    the opening, replaces the source's own, within `opening_limits`; the other K - 1 are added to the source's: a wide
    mouth or a smile stays. The remaining M - K (colour, teeth, a beard) are the source's appearance."""

    def __init__(self, config: Config, hidden: int = 192):
        super().__init__()
        L, D, P, M, K = config.L, config.dim, config.pose_dim, config.mouth_dim, config.shape_dim
        self.shape, self.M = (L, D), M
        self.whiten = Whiten(L, D)
        A = D if config.audio_width else SPEECH_DIM                               # width of z_a
        self.fusion = TemporalFusion(A) if config.audio_width else SpeechContext(A)
        self.pose_down, self.pose_up = nn.Linear(L * D, P), nn.Linear(P, L * D, bias=False)
        self.lips = nn.Sequential(nn.Linear(A, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2),
                                  nn.Linear(hidden, K or L * D))
        self.mouth_up = nn.Linear(M, L * D, bias=False) if M else nn.Identity()   # mouth code -> W+
        nn.init.normal_(self.lips[4].weight, std=0.01)
        nn.init.zeros_(self.lips[4].bias)
        self.register_buffer("idle", torch.zeros(8, 75, P))                       # pose deviations of 8 clips of 3 s
        self.register_buffer("opening_limits", torch.tensor([-torch.inf, torch.inf]) if M else None)  # of training clips
        # for warp.py, set by initialise.fit_warp: displacement of the landmarks with each number of the shape; slope and
        # offset of the opening, mouth code -> distances of the eyes' corners
        self.register_buffer("moves", torch.zeros(K, 68, 2) if M else None)
        self.register_buffer("opening", torch.zeros(2) if M else None)

    def pose(self, z_v):  # (B, T, L, D) -> (B, T, P)
        return self.pose_down(self.whiten(z_v))

    def predict_lip_shape(self, z_a, context=0):
        """z_a (B, T + 2 context, D) -> shape of the lips (B, T, K); without a mouth code the lips in W+, (B, T, L * D)"""
        z_a = self.fusion(z_a)
        return self.lips(z_a[:, context:z_a.shape[1] - context])

    def predict_mouth(self, z_a, context=0):
        """z_a (B, T + 2 context, D) -> mouth code (B, T, M), its opening limited to what the generator has learned"""
        mouth = self.predict_lip_shape(z_a, context)
        if not self.M:
            return mouth
        opening = mouth[..., :1].clamp(*self.opening_limits)
        return F.pad(torch.cat([opening, mouth[..., 1:]], -1), (0, self.M - mouth.shape[-1]))

    def keep_opening(self, mouth):
        """Mouth code (.., M) -> the part that sound replaces: the opening, zeros elsewhere"""
        return F.pad(mouth[..., :1], (0, self.M - 1))

    def embed_without_opening(self, mouth):
        """Mouth code (.., M) -> the part that sound does not replace, in W+ (.., L, D)"""
        return self.mouth_up(mouth - self.keep_opening(mouth)).unflatten(-1, self.shape)

    def join(self, pose, mouth):  # (.., P), (.., M) -> (.., L, D)
        return (self.pose_up(pose) + self.mouth_up(mouth)).unflatten(-1, self.shape)

    def forward(self, z_a, z_v, context=0, mouth=None):  # (B, T + 2 context, D), (B, T, L, D) -> (B, T, L, D)
        pose, spoken = self.pose(z_v), self.predict_mouth(z_a, context)
        if mouth is not None:                                                     # (B, T, M), NaN where sound decides
            spoken = torch.where(mouth.isnan(), spoken, mouth.to(spoken))
        return self.join(pose, spoken)


class IdentityMaps(nn.Module):
    """W+ code (N, L, D) -> maps (N, C', H, W) for the generator's features up to 32x32, and a coarse image (N, 3,
    h, h) to add to its RGB, or None. Ours. Linear in z_s2d: maps of the source's own code would bypass the motion
    space. The coarse image, for real faces, is in closed form (initialise.fit_coarse_rgb)."""

    def __init__(self, config: Config):
        super().__init__()
        edge = config.coarse_rgb
        resolutions = [r for r in (4, 8, 16, 32) if r <= (edge or config.size // 2)]
        channels = [min(config.cap, config.base // r) for r in resolutions]
        self.shapes = [(min(c, most), r, r) for c, most, r in zip(config.map_channels, channels, resolutions)]
        self.down = nn.Linear(config.L * config.dim, config.map_code)
        self.up = nn.ModuleList(zero_init(nn.Linear(config.map_code, math.prod(s))) for s in self.shapes)
        self.coarse_rgb = zero_init(nn.Linear(config.map_code, 3 * edge ** 2)) if edge else None
        self.views = nn.ModuleList(zero_init(nn.Conv2d(3, c, 3, padding=1)) for c in channels if edge)

    def forward(self, w_plus):
        code = self.down(w_plus.flatten(1))
        maps, coarse = [up(code).unflatten(1, shape) for up, shape in zip(self.up, self.shapes)], None
        if self.coarse_rgb:
            edge = math.isqrt(self.coarse_rgb.out_features // 3)
            coarse = self.coarse_rgb(code).unflatten(1, (3, edge, edge))
            maps = [view(F.adaptive_avg_pool2d(coarse, 4 * 2 ** i)) for i, view in enumerate(self.views)]
        return [x.contiguous(memory_format=torch.channels_last) for x in maps], coarse


# --------------------------------------------------------------------------------------------------- the whole network

def weight_shapes(generator: Generator) -> list:
    """(O, I) of each 3x3 layer, in the order of styled_convs()"""
    return [tuple(layer.conv.weight.shape[1:3]) for layer in generator.styled_convs()]


class FCTFG(nn.Module):
    """The whole network; generator_only (stage 1): the generator alone."""

    def __init__(self, config: Config, generator_only: bool = False):
        super().__init__()
        c = self.config = config
        self.generator = Generator(c.size, c.dim, c.n_mlp, c.base, c.cap)
        self.encoder = self.maps = self.hyper = self.mouth = None
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

    def decode(self, w_plus, deltas=None):
        """w_plus (N, L, D), deltas as in Generator.forward -> (N, 3, H, W)"""
        maps, coarse = self.maps(w_plus) if self.maps else ((), None)
        return self.generator(w_plus, "fixed" if self.config.noise else "off", maps, deltas, coarse)

    def refine(self, source, z_s, deltas=None):
        """One refinement: source (B, 3, H, W), its code z_s (B, L, D), the deltas so far -> new deltas, as in
        Generator.forward. Gradients reach the hypernetwork through this change alone."""
        with torch.no_grad():
            y_hat = self.decode(z_s, deltas)
        changes = [change.float() for change in self.hyper(source, y_hat)]        # small ones add up
        return changes if deltas is None else [c + d.detach() for c, d in zip(changes, deltas)]

    def weight_changes(self, source, z_s):
        """source (B, 3, H, W), z_s (B, L, D) -> deltas of config.refine steps, the last with gradients, or None"""
        n, deltas = self.config.refine if self.hyper else 0, None
        if n and self.mouth:
            z_s = self.invert(source)                                             # the code with its mouth
        for i in range(n):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == n - 1):
                deltas = self.refine(source, z_s, deltas)
        return deltas

    def canonical_code(self, source):
        """source (B, 3, H, W) -> its code z_s and its canonical code z_s2c, both (B, L, D)"""
        z_s = self.encode_source(source)
        z_s2c = self.canonical(z_s)
        if self.mouth:
            z_s2c = z_s2c + self.motion.embed_without_opening(self.mouth(source))
        return z_s, z_s2c

    def encode_source(self, source):
        """source (B, 3, H, W) -> z_s (B, L, D); with a mouth code the lips are masked"""
        return self.encoder(mask_mouth(source, self.config.template, "lips") if self.mouth else source)

    def invert(self, images, mouth=None):
        """images (N, 3, H, W) -> W+ codes (N, L, D) that decode to them; mouth (N, M): other mouth codes"""
        if not self.mouth:
            return self.encoder(images)
        mouth = self.mouth(images) if mouth is None else mouth
        return self.encode_source(images) + self.motion.mouth_up(mouth).unflatten(-1, self.motion.shape)

    def encode_driving(self, driving):
        """driving (B, T, 3, H, W) -> z_v (B, T, L, D). The mouths are masked here: the lips must come from the sound."""
        B = len(driving)
        return self.encoder(mask_mouth(driving.flatten(0, 1), self.config.template)).unflatten(0, (B, -1))

    def encode_sound(self, mel):
        """mel (B, T, 1, 80, 16) -> z_a (B, T, D)"""
        return self.audio(mel.flatten(0, 1)).unflatten(0, (len(mel), -1))

    def forward(self, source, driving, mel, context: int = 0, mouth=None):
        """One window of each clip -> frames (B, T, 3, H, W), z_s2c (B, L, D), z_c2d (B, T, L, D).

        source: (B, 3, H, W) in [-1, 1]. driving: (B, T', 3, H, W), T' = T + 2 context, or T if "direct".
        mel: (B, T', 1, 80, 16). context: frames at both ends that the convolution over time reads, not decoded.
        mouth: (B, T, M), with a mouth code: replaces what the sound predicts, except where it is NaN."""
        T = mel.shape[1] - 2 * context
        assert driving.shape[1] in (T, mel.shape[1]), (
            f"{driving.shape[1]} driving frames, {mel.shape[1]} mel windows, context {context}")
        z_s, z_s2c = self.canonical_code(source)
        if self.config.motion == "direct":                                        # its poses need no neighbours
            driving = middle_frames(driving, T)
        z_a, z_v = self.encode_sound(mel), self.encode_driving(driving)
        z_c2d = self.motion(z_a, z_v, context, mouth)
        w_plus = (z_s2c[:, None] + z_c2d).flatten(0, 1)                           # (N, L, D)
        frames = self.decode(w_plus, self.weight_changes(source, z_s))
        return frames.unflatten(0, z_c2d.shape[:2]), z_s2c, z_c2d

    @torch.no_grad()
    def set_statistics(self, z, z_masked):
        """Set the whitening: z (n, L, D) codes of training frames, z_masked (n, L, D) of the same with masked mouths."""
        for whiten, codes in ((self.canonical.whiten, z), (self.motion.whiten, z_masked)):
            whiten.mean.copy_(codes.mean(0))
            whiten.std.copy_(codes.std(0).clamp_min(0.05 * codes.std()))          # ours: constant numbers stay small

    @torch.inference_mode()
    def reconstruct(self, source):
        """source (3, H, W) -> (3, H, W) in [-1, 1]: the reconstruction of a photo"""
        z_s = self.invert(source[None])
        return self.decode(z_s, self.weight_changes(source[None], z_s))[0].clamp(-1, 1)

    def encode_whole_sound(self, mel):
        """mel (n, 1, 80, 16), or an iterable of pieces of it -> z_a (1, n, D)"""
        return torch.cat([self.audio(m) for m in (mel.split(256) if torch.is_tensor(mel) else mel)])[None]

    @torch.inference_mode()
    def predict_lip_shape(self, mel):
        """Sound -> shape of the lips (n, K), without an image; needs a mouth code. mel: as for animate"""
        return self.motion.predict_lip_shape(self.encode_whole_sound(mel))[0]

    def predict_lips(self, mel):
        """mel, as for animate -> NumPy arrays in warp.py's units: opening (n,) in distances of the outer corners
        of the eyes, shape (n, K - 1)"""
        numbers, (slope, offset) = self.predict_lip_shape(mel).cpu().numpy(), self.motion.opening.tolist()
        return (slope * numbers[:, 0] + offset).clip(0), numbers[:, 1:]

    @torch.inference_mode()
    def animate(self, source, mel, driving=None, sway: bool = True, batch: int = 16):
        """A talking clip, streamed: yields (b, 3, H, W) in [-1, 1], n frames in all. source: (3, H, W) in [-1, 1].
        mel: (n, 1, 80, 16), one window a frame, or an iterable of pieces of it. driving: n frames (3, H, W), any
        iterable; None: the photo's own pose with idle motion. sway: it moves the head as well; without, only
        blinks. batch: frames decoded at a time; memory does not grow with n."""
        source = source[None]
        z_s, z_s2c = self.canonical_code(source)
        deltas, z_a = self.weight_changes(source, z_s), self.encode_whole_sound(mel)
        for z_c2d in self.stream_motion(source, z_a, driving, sway, batch):
            yield self.decode(z_s2c + z_c2d, deltas).clamp(-1, 1)

    def stream_motion(self, source, z_a, driving, sway, batch):
        """z_c2d (b, L, D) in order, each batch with the frames on both sides that the temporal convolution reaches"""
        n, reach, direct = z_a.shape[1], self.config.context, self.config.motion == "direct"
        idle = direct and (self.motion.idle if sway else extract_blinks(self.motion.idle))
        z_own = self.encode_driving(source[None])                                 # (1, 1, L, D)
        frames, codes, first = iter(() if driving is None else driving), z_own[:, :0], 0  # codes of frames first, ..
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            lo, hi = max(0, start - reach), min(n, stop + reach)
            if driving is not None:
                while first + codes.shape[1] < hi:                                # encode new frames, drop old ones
                    new = [next(frames).to(source) for _ in range(min(batch, hi - first - codes.shape[1]))]
                    codes = torch.cat([codes, self.encode_driving(torch.stack(new)[None])], 1)
                codes, first = codes[:, lo - first:], lo
                z_c2d = self.motion(z_a[:, lo:hi], codes[:, :hi - lo])
            elif direct:
                pose = self.motion.pose(z_own) + idle_poses(idle, lo, hi)[None]
                z_c2d = self.motion.join(pose, self.motion.predict_mouth(z_a[:, lo:hi]))
            else:
                z_c2d = self.motion(z_a[:, lo:hi], z_own.expand(1, hi - lo, -1, -1))
            yield z_c2d[0, start - lo:stop - lo]


def middle_frames(x, T: int):
    """The middle T of x (B, T', ..)"""
    start = (x.shape[1] - T) // 2
    return x[:, start:start + T]


def idle_poses(idle, lo: int, hi: int):
    """idle (n, T, P) -> frames lo .. hi - 1 of endless motion, (hi - lo, P): the clips in turn, there and back"""
    n, T, _ = idle.shape
    clip, t = np.divmod(np.arange(lo, hi), 2 * T)
    return idle[clip % n, np.minimum(t, 2 * T - 1 - t)]


def extract_blinks(idle, reach: int = 6):
    """idle (n, T, P) -> its brief deviations, zero elsewhere: blinks without sway. A blink lasts 3-7 frames: a
    running median of 13 is subtracted, then what is small is cut off. Ours: in the toy world blinks stand 3.5 to 5
    times above the median of the remainder, the rest below 2.5."""
    around = F.pad(idle.transpose(1, 2), (reach, reach), mode="replicate")
    brief = idle - around.unfold(2, 2 * reach + 1, 1).median(-1).values.transpose(1, 2)
    size = brief.norm(dim=-1, keepdim=True)
    return brief * (size / size.median().clamp_min(1e-6) - 2.5).clamp(0, 1)


@torch.no_grad()
def estimate_mean_w(generator: Generator, n: int = 4096):
    """The mean of n mapped z, (D,): where an encoder's codes start from"""
    return generator.mapping(torch.randn(n, generator.dim, device=generator.input.input.device)).mean(0)


# --------------------------------------------------------------------------------------------------------------- files

def load_published(size: int, generator=None, encoder=None, hyper=None) -> tuple[dict, dict]:
    """Networks from their authors' files, to stand in for stages 1 and 2 at `size` px -> (overrides of Config's
    fields, {"generator", "D", "encoder", "hyper": network}, those that the files have). generator: rosinality's
    StyleGAN2; encoder: pSp's or ArcFace's, see load_encoder; hyper: HyperStyle's, for this generator. InputError:
    a file that is missing, damaged, hostile, of another kind or size; networks that do not fit together."""
    networks, overrides, dim = {}, {}, Config.at(size).dim
    if generator:
        found = load_rosinality(generator, size)
        G = found.get("g_ema", found.get("g"))
        if G is None:
            raise InputError(f"{generator}: no generator in it")
        networks, dim = dict(generator=G) | ({"D": found["d"]} if "d" in found else {}), G.dim
        overrides = infer_arguments(Generator, G.state_dict(), generator) | dict(noise=True, map_code=0)
    if encoder:
        networks["encoder"] = load_encoder(encoder, n_styles(size), dim)
        overrides |= dict(encoder="psp", encoder_width=len(networks["encoder"].input_layer[0].weight))
        if generator and networks["encoder"].latent_avg.shape[1] != dim:
            raise InputError(f"{encoder}: the width of its codes is not the generator's {dim}")
    if hyper:
        if not generator:
            raise InputError(f"{hyper}: name its generator of {size} px with --generator")
        networks["hyper"], form = load_hypernet(hyper, weight_shapes(G))
        overrides |= dict(hyper=form, hyper_width=len(networks["hyper"].conv1.weight))
    return overrides, networks


def load_model(path: str, device="cpu", kinds: tuple = ("weights", "stage3")) -> FCTFG:
    """The EMA network of a file, in eval mode; `model.kind` is the file's. InputError: see load_checkpoint"""
    checkpoint = load_checkpoint(path, kinds)
    with wrap_errors(path, "not a network of this version"):
        state = checkpoint["networks" if checkpoint["kind"] == "weights" else "ema"]["model"]
        model = load_strictly(lambda: FCTFG(Config(**checkpoint["config"])), state, path)
    model.kind = checkpoint["kind"]
    return model.to(device).eval()
