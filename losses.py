"""The loss terms of training as pure functions, and the discriminator's augmentation.

FC-TFG (arXiv 2304.03275), section 3.4, names six terms. The GAN terms are StyleGAN2's (arXiv 1912.04958).

    orthogonality   canonical and motion code have no common direction        orthogonality_loss
    sync            a sync expert judges that the mouth fits the sound        sync_loss
    identity        a face recogniser judges that the person is the same      identity_loss
    reconstruction  L1                                                        reconstruction_loss
    perceptual      L1 of features of a frozen network                        perceptual_loss
    adversarial     non-saturating logistic                                   generator_loss, discriminator_loss

Images are (N, 3, H, W) in [-1, 1], losses are scalars. Frozen networks: judges.py. Weights of the terms: train.py.
"""

import math

import torch
import torch.nn.functional as F

from checkpoint import MeanOverProcesses
from faces import TEMPLATES, box_slices, mask_mouth, recrop

SYNC_FRAMES = 5  # frames in a window of the sync loss: the 0.2 s of the expert

# --------------------------------------------------------------------------------------------------- the six terms

def orthogonality_loss(z_s2c, z_c2d):
    """Mean squared cosine, in [0, 1], between canonical code z_s2c (B, L, D) and motion code z_c2d (B, T, L, D).
    The paper uses the inner product of each style layer, which also falls when both codes shrink."""
    return F.cosine_similarity(z_s2c[:, None], z_c2d, dim=-1, eps=1e-6).square().mean()


def reconstruction_loss(fake, real, boxes=()):
    """L1 of the image, plus weighted L1 in boxes, plus half of the L1 at a half and a quarter of the image's size.
    boxes: pairs of a box (x0, y0, x1, y1), as fractions, and its weight. Ours: mouth and eyes are few pixels, and viewers
    look at them most; with the small images colour and place settle before edges."""
    error = fake - real
    loss = error.abs().mean()
    for box, weight in boxes:
        rows, cols = box_slices(box, *error.shape[-2:])
        loss = loss + weight * error[..., rows, cols].abs().mean()
    for factor in (2, 4):
        loss = loss + 0.5 * F.avg_pool2d(error, factor).abs().mean()
    return loss


def perceptual_loss(fake_maps, real_maps):
    """Mean over layers of the L1 distance of feature maps (N, C, H, W), divided by the mean magnitude of the real map"""
    pairs = [(f.float(), r.detach().float()) for f, r in zip(fake_maps, real_maps)]
    terms = [(f - r).abs().mean() / r.abs().mean().clamp_min(1e-6) for f, r in pairs]
    return sum(terms) / len(terms)


def identity_loss(fake_embedding, real_embedding):
    """1 - cosine, in [0, 2], of a face recogniser's embeddings (N, E) of unit length; pSp, section 3.3"""
    return 1 - (fake_embedding * real_embedding.detach()).sum(-1).mean()


def sync_loss(expert, frames, mel):
    """(absolute + contrast) / scale. absolute: -log sigmoid of the logit of each face and its own sound; it vanishes at
    high logits. contrast: -log softmax of this logit among all sounds of the batch, as in StyleTalker.
    expert: a frozen SyncNet, or another network with its methods face, sound and logits. frames: (B, 5, 3, H, W) in
    [-1, 1], with gradient. mel: (B, 1, 80, 16), the window of each middle frame; MFCC (B, 13, 20) for SyncNet v2.
    scale (ours): the logits of an expert grow throughout its training. Without the division, at a scale of 45, the
    gradient was 2800 times that of L1."""
    assert len(frames) == len(mel), f"{len(frames)} windows of frames, {len(mel)} of sound"
    with torch.no_grad():
        sound = expert.sound(mel.float())
    logits = expert.logits(expert.face(frames.float()), sound)  # (B, B) of faces and sounds; pairs on the diagonal
    absolute = F.softplus(-logits.diagonal()).mean()
    contrast = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    scale = 1.0 if getattr(expert, "cosine", True) else expert.log_scale.exp()  # published experts have none
    return (absolute + contrast) / scale


# ------- two terms of ours for faces with a swapped mouth: with them, lips move on a person known from one photo only

def preserve_loss(swapped, real, template: str):
    """L1 outside the mouth box of a crop template, plus L1 of the hue of the whole image at 16 px"""
    loss = (mask_mouth(swapped, template) - mask_mouth(real, template)).abs().mean()
    hue_error = (swapped - swapped.mean(1, keepdim=True)) - (real - real.mean(1, keepdim=True))
    return loss + F.avg_pool2d(hue_error, max(1, swapped.shape[-1] // 16)).abs().mean()


def mouth_cycle_loss(read_shape, target):
    """Squared error of the lip shape (N, K) read from generated images, divided by the target's variance over the batch;
    half of it for the opening, the first number"""
    variance = target.var(0) if len(target) > 1 else torch.ones_like(target[0])  # 1: that of the training clips
    error = (read_shape - target).square() / variance.clamp_min(0.25)
    return (error[:, 0].mean() + error[:, 1:].mean()) / 2


# ------------------------------------------------------------------------- the GAN terms: scores are (N, 1) logits

def discriminator_loss(real_score, fake_score):
    """-log D(real) - log(1 - D(fake)); 2 ln 2 where D = 1/2"""
    return F.softplus(-real_score).mean() + F.softplus(fake_score).mean()


def generator_loss(fake_score):
    """Non-saturating: -log D(fake); ln 2 where D = 1/2"""
    return F.softplus(-fake_score).mean()


def r1_penalty(real, score):
    """E |grad_x D(x)|^2 at real images, Mescheder et al. 2018. `real` requires a gradient, and `score` depends on it."""
    grad, = torch.autograd.grad(score.sum(), real, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def path_length_penalty(fake, w_plus, mean_path):
    """E (|J^T y| - a)^2, StyleGAN2 section 3.2, where J is the Jacobian of the image by w and a the running mean of the
    length -> (penalty, next a). fake: (N, 3, H, W), made from w_plus (N, L, D), which requires a gradient. mean_path: a.
    y is N(0, 1) noise / sqrt(H W), so that lengths do not grow with the size."""
    y = torch.randn_like(fake) / math.sqrt(fake.shape[2] * fake.shape[3])
    grad, = torch.autograd.grad((fake * y).sum(), w_plus, create_graph=True)
    lengths = grad.square().sum(2).mean(1).sqrt()                       # (N,): root mean square over the L layers
    mean = MeanOverProcesses.apply(lengths.mean())
    mean_path = mean_path + 0.01 * (mean - mean_path)                   # with its gradient, as in StyleGAN2
    return (lengths - mean_path).square().mean(), mean_path.detach()


class Augment:
    """Augmentation of the discriminator's input, for small datasets: the operations of DiffAugment (Zhao et al. 2020),
    each with probability p per image, and ADA's controller of p (Karras et al. 2020, section 3: E sign D(real) = 0.6).
    On a CPU ADA's own pipeline costs three times the generator and improves little."""

    def __init__(self, p: float):
        self.p = p

    def update(self, sign: float, images: int):
        """sign: mean sign of D's scores of real images. Above 0.6 p rises by images / 500k, below it falls, in [0, 1]."""
        self.p = min(1.0, max(0.0, self.p + math.copysign(images / 500_000, sign - 0.6)))

    def __call__(self, x):
        """x (N, 3, H, W) -> augmented images, differentiable in x"""
        if self.p == 0:
            return x
        N, _, H, W = x.shape

        def random_mask():  # (N, 1, 1, 1): 1 for the images to change
            return (torch.rand(N, 1, 1, 1, device=x.device) < self.p).to(x.dtype)

        flip = random_mask()
        x = flip * x.flip(3) + (1 - flip) * x
        x = x + random_mask() * (torch.rand(N, 1, 1, 1, device=x.device) - 0.5)                 # brightness
        for axes, span in ((1, 2.0), ((1, 2, 3), 1.0)):                                         # saturation, contrast
            mean = x.mean(axes, keepdim=True)
            x = mean + (x - mean) * (1 + span * random_mask() * (torch.rand(N, 1, 1, 1, device=x.device) - 0.5))
        shift = random_mask().flatten() * (torch.rand(N, device=x.device) - 0.5) * W / 4        # up to 1/8 sideways
        columns = (torch.arange(W, device=x.device)[None] + shift.round().long()[:, None]).clamp(0, W - 1)
        x = x.gather(3, columns[:, None, None].expand(N, 3, H, W))
        hole = random_mask()                                                                     # cutout: half the edge
        cy, cx = torch.rand(2, N, 1, 1, device=x.device)
        rows = (torch.arange(H, device=x.device)[None, :, None] - H * cy).abs() < H / 4
        cols = (torch.arange(W, device=x.device)[None, None, :] - W * cx).abs() < W / 4
        return x * (1 - hole * (rows & cols)[:, None].to(x.dtype))


# ------- all terms of a stage except the adversarial one: output of train.py's forward pass -> terms without weights

def stage2_losses(model, frozen, out, w):
    """Reconstruction, perceptual and identity terms. With swapped mouths also preserve and mouth_cycle.
    frozen: networks by name. w: weights of the terms by name; at weight 0 other networks are not run."""
    template = TEMPLATES[model.config.template]
    boxes = ((template.lips if model.mouth else template.mouth, w["mouth"]), (template.eyes, w["eyes"]))
    real, fake = out["real"], out["fake"]
    terms = dict(rec=reconstruction_loss(fake, real, boxes))
    if w["l2"]:
        terms["l2"] = (fake - real).square().mean()
    if w["feat"] and "feature_net" in frozen:
        features = frozen["feature_net"].features
        terms["feat"] = perceptual_loss(features(fake), features(real))
    if w["vgg"]:
        terms["vgg"] = perceptual_loss(frozen["vgg"](fake), frozen["vgg"](real))
    if w["lpips"]:
        terms["lpips"] = frozen["lpips"](fake, real).mean()
    if w["arcface"]:
        terms["arcface"] = identity_loss(frozen["arcface"](fake), frozen["arcface"](real))
    elif w["id"]:
        terms["id"] = identity_loss(frozen["judge"](fake), frozen["judge"](real))
    if "fake_swapped" in out:                                                          # ours
        swapped, target = out["fake_swapped"], out["target_mouth"]
        original = real[-len(swapped):]                                                # with their own mouths
        terms["preserve"] = preserve_loss(swapped, original, model.config.template)
        if "frames" in out:                                                            # stage 3: clips have ground truth
            swapped = torch.cat([swapped, out["frames"].flatten(0, 1)])
            target = torch.cat([target, out["mouth"].flatten(0, 1)])
        terms["mouth_cycle"] = mouth_cycle_loss(
            model.mouth.read_softly(swapped), target[:, :model.config.shape_dim].float())
    return terms


def stage3_losses(model, frozen, out, w):
    """The terms of stage 2, orthogonality, and sync for windows of SYNC_FRAMES"""
    terms = stage2_losses(model, frozen, out, w)
    terms["orth"] = orthogonality_loss(out["z_s2c"], out["z_c2d"])
    if w["sync"] and out["frames"].shape[1] == SYNC_FRAMES:
        face = recrop(out["frames"], model.config.template, frozen["sync"].template)
        terms["sync"] = sync_loss(frozen["sync"], face, out["sound"])
    return terms
