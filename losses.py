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

import math

import torch
import torch.nn.functional as F

from faces import box_slices

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


def sync_loss(expert, frames, mel):
    """What a generator minimises so that its mouth says its sound (FC-TFG's L_sync); a scalar.

    (-log sigmoid of the learned logit - log softmax among the sounds of the batch) / scale.
    The first is absolute and lets go where the expert is convinced, so the mouth need not exaggerate; the pull of a
    bare 1 - cos never ends. The second (StyleTalker's contrast, which the paper cites) asks that this sound fits better
    than the batch's others, which a mouth that half fits every sound does not do; a batch of one has no such term.
    Over the scale (ours), because an expert grows surer all its training: at 45 its gradient at a still mouth
    summed to 2800 times that of an L1 loss; so it is 60 times, and bounded alike for every expert.

    Args:
        expert: a frozen SyncNet, or what has its face, sound and logits (then the scale is taken as 1).
        frames: (B, 5, 3, H, W) in [-1, 1]; the gradient flows here.
        mel: (B, 1, 80, 16), the window of each middle frame.
    """
    assert len(frames) == len(mel), f"{len(frames)} windows of frames, {len(mel)} of sound"
    with torch.no_grad():
        sound = expert.sound(mel.float())
    logits = expert.logits(expert.face(frames.float()), sound)  # (B, B)
    absolute = F.softplus(-logits.diagonal()).mean()
    contrast = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    scale = expert.log_scale.exp() if hasattr(expert, "log_scale") else 1.0
    return (absolute + contrast) / scale
