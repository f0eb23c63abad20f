"""Train FC-TFG: three stages by flag, one loop.

FC-TFG (arXiv 2304.03275), section 3.5: a StyleGAN2 generator is trained on faces (stage 1), an inversion network on the
frozen generator (stage 2), and everything end to end with six losses (stage 3).

    python syncnet.py train        # the sync expert that stage 3 listens to
    python train.py --stage 1      # StyleGAN2                       (Karras et al. 2020)
    python train.py --stage 2      # pSp encoder, then hypernetwork  (Richardson et al. 2021, Alaluf et al. 2022)
    python train.py --stage 3      # end to end; writes weights.pt for sample.py

Without --data it trains on the toy world, drawn on first use; README has the time of each line and what to expect. Every
stage resumes with --resume, bit for bit on a CPU: item n of the data is a function of the seed and n alone.

What differs from the paper (which prints no weights, rates, batch or window): all numbers are ours. Stage 3 starts from a
closed-form guess of the motion space (`start_motion_space`), and its steps alternate between a few five-frame windows,
which the sync expert can judge, and many clips of one frame, which teach people and poses faster (without the sync loss
all steps are such).
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import operator
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import losses
from audio import InputError, Parser, log_mel, mel_windows, n_frames, run
from data import Clips, Frames, Mixed, Pack, batches, load_checkpoint, save_checkpoint, split, split_options
from fusion import FCTFG, Config, bf16_native, mean_w, middle, pick_device, published
from keypoints import Landmarks, mouth_shape
from landmarks import load_landmarks
from motion import fit_moves, fit_opening, held_still, lip_opening
from stylegan2 import Discriminator, mix_styles
from syncnet import SyncNetV2Expert, load_sync, revision, sync_loss, toy_pack
from vision import TEMPLATES, VideoWriter, mask_mouth, recrop, small_picture, to_tensor, to_uint8

CONTEXT = 2  # sound windows on each side of the decoded frames: what the temporal convolution reaches
PAPERS_JUDGES = 128  # px, from which VGG19, ArcFace and a published sync expert are the default; below, small stand-ins
WINDOW = 5   # decoded frames of a sync window: the expert's 0.2 s


def parse(argv=None):
    p = Parser(description="train FC-TFG, one stage at a time",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--stage", type=int, choices=(1, 2, 3), required=True, help="1 StyleGAN2, 2 inversion, 3 end to end")
    p.add_argument("--out", default="out/toy32", help="directory of checkpoints, logs and pictures")
    p.add_argument("--data", help="pack directory written by data.py; "
                   "default: the toy world, drawn into --out on first use")
    split_options(p)
    p.add_argument("--photos", help="pack of photos: identities for all stages, where the clips show few people")
    p.add_argument("--photo-share", type=float, default=0.75, help="share of photos in the pictures of stages 1 and 2")
    p.add_argument("--size", type=int, default=32, choices=(16, 32, 64, 128, 256), help="edge of the picture: the dial")
    p.add_argument("--people", type=int, default=400, help="toy world: how many people (one clip each)")
    p.add_argument("--seconds", type=float, default=3.0, help="toy world: length of a clip")
    p.add_argument("--motion", default="direct", choices=("direct", "paper"),
                   help="form of the motion encoder, see fusion.py")
    p.add_argument("--init", help="checkpoint of the stage before; default: stage1.pt or stage2.pt in --out")
    p.add_argument("--sync", help="sync expert for stage 3: a file of ours; wav2lip or syncnet_v2, which are fetched; or "
                   "your copy (.pth, .model). Default: sync.pt in --out, else, with --data from 128 px on, wav2lip")
    # published files that stand in for what is trained here, and for downloads
    p.add_argument("--generator", help="StyleGAN2 checkpoint of rosinality's code (g_ema, d), in place of stage 1")
    p.add_argument("--encoder", help="pSp's checkpoint (the first styles of a larger one), HyperStyle's W encoder, "
                   "or ArcFace's IR-SE50 for the trunk alone (default at 256 px in stage 2); with --generator in place "
                   "of stage 2")
    p.add_argument("--hyper", help="HyperStyle's checkpoint; its generator is taken if no other is given")
    p.add_argument("--vgg", help="your copy of VGG19 for --w-vgg")
    p.add_argument("--lpips", nargs=2, metavar=("VGG16", "HEADS"), help="your copies of LPIPS's two files for --w-lpips")
    p.add_argument("--arcface", help="your copy of ArcFace's IR-SE50 for --w-arcface")
    # how long and how fast
    p.add_argument("--steps", type=int, help="steps in all; default by stage: 1 %s, 2 %s, 3 %s" % tuple(STEPS.values()))
    p.add_argument("--hyper-share", type=float, default=0.0,
                   help="stage 2: share of the steps for the hypernetwork; 0: none")
    p.add_argument("--refine", type=int, help="refinements of a photo's weight changes by the hypernetwork, 0: leave the "
                   "weights alone; default: 5 at 256 px, as HyperStyle, else 2, or as in the stage before")
    p.add_argument("--batch", type=int, default=16, help="pictures a step")
    p.add_argument("--lr", type=float, default=1e-3, help="rate of ordinary layers (stages 2, 3)")
    p.add_argument("--lr-gan", type=float, default=4e-3, help="rate of layers with equalised learning rate")
    p.add_argument("--thaw", type=float,
                   help="stage 2: the generator's rate as a share of --lr-gan; 0: frozen, as in pSp. "
                   "Default: 1 up to 64 px, where minutes of stage 1 leave it half trained, else 0")
    p.add_argument("--ema-kimg", type=float, default=3.0, help="half-life of the averaged weights in thousand pictures")
    p.add_argument("--bf16", action="store_true", help="bf16 autocast (a GPU, or a CPU with AVX512-BF16)")
    # loss weights; the paper prints none
    for name, default, note in (
            ("orth", 0.1, "orthogonality"), ("sync", 0.3, "sync"),
            ("id", 0.1, "identity"), ("rec", 1.0, "reconstruction"),
            ("l2", 0.0, "squared error. pSp and HyperStyle: --w-l2 1 --w-lpips .8 --w-arcface .1, all others 0"),
            ("vgg", None, "perceptual, VGG19 (downloads it); default: 0.2 from 128 px on, else 0"),
            ("lpips", 0.0, "perceptual, LPIPS on VGG16 (downloads it)"),
            ("arcface", None, "identity, ArcFace in place of the small judge, and start of pSp's trunk (downloads it); "
             "default: 0.1 from 128 px on, else 0"),
            ("feat", None, "perceptual, features of stage 1's discriminator; default: 0.2 without --w-vgg, else 0"),
            ("adv", None, "adversarial; default: 0.01 in stage 3, and with photos in stage 2, else 0"),
            ("around", 1.0, "photos with another mouth: L1 around it"),
            ("obey", None, "and the code read back; default: 0.5, 0.3 in stage 3, where landmarks taught it, "
             "else 0.1 and 0.03 (more spoils faces)"),
            ("mouth", 3.0, "extra L1 in the mouth box, or with a mouth code of the lips"),
            ("eyes", 3.0, "extra L1 in the eyes box"),
            ("r1", 1.0, "R1, every 16 steps"), ("path", 2.0, "path length, every 4 steps of stage 1")):
        p.add_argument(f"--w-{name}", type=float, default=default, help=note)
    p.add_argument("--articulate", type=float, help="stage 3 with a mouth code: how many times as far the lips go as the "
                   "regression on sound says; default: 1.25 where landmarks taught it, else 2")
    p.add_argument("--augment", type=float, default=0.0, help="discriminator augmentation: first p; -1: off for good")
    # running
    p.add_argument("--resume", action="store_true", help="continue the stage's checkpoint in --out, with its options")
    p.add_argument("--overwrite", action="store_true", help="start anew although a checkpoint exists")
    p.add_argument("--device", default="auto")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=0, help="processes that load data")
    p.add_argument("--log-every", type=int, default=50, help="steps between two log lines")
    p.add_argument("--sample-every", type=int, default=500)
    p.add_argument("--save-every", type=int, default=500)
    args = p.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))                            # defaults are not filled in here
    args.given = [k for k, v in vars(p.parse_args(argv, unset)).items() if v is not None]
    args.steps = STEPS[args.stage] if args.steps is None else args.steps
    args.thaw = float(args.size <= 64) if args.thaw is None else args.thaw
    papers = args.size >= PAPERS_JUDGES
    args.w_vgg = 0.2 * papers if args.w_vgg is None else args.w_vgg
    args.w_arcface = 0.1 * papers if args.w_arcface is None else args.w_arcface
    args.w_feat = 0.2 * (not args.w_vgg) if args.w_feat is None else args.w_feat
    args.w_adv = 0.01 * (args.stage == 3 or bool(args.photos)) if args.w_adv is None else args.w_adv
    return args


STEPS = {1: 700, 2: 2000, 3: 1400}  # the documented run at 32 px: a quarter of an hour on two cores

# what --resume may change (and loss weights): how long, how fast, where files lie, where and how it runs
CHANGEABLE = {"steps", "lr", "lr_gan", "ema_kimg", "data", "photos", "sync", "vgg", "lpips", "arcface",
              "device", "workers", "log_every", "sample_every", "save_every"}


def resume_options(args, before, path):
    """Options of a run that goes on: those in its checkpoint (`before`), but what is CHANGEABLE and given anew.

    A line says what has changed. InputError: another option is given with another value."""
    own = {"stage", "out", "resume", "overwrite", "given"}                             # of this call
    anew = {k: getattr(args, k) for k in args.given if k in before and k not in own and getattr(args, k) != before[k]}
    fixed = {k for k in anew if k not in CHANGEABLE and not k.startswith("w_")}
    if args.stage == 2 and before["hyper_share"]:                                      # a share of the steps
        fixed |= anew.keys() & {"steps"}
    words = [f"--{k.replace('_', '-')} {before[k]} -> {v}" for k, v in anew.items() if not fixed or k in fixed]
    if fixed:
        raise InputError(f"{path}: --resume cannot change {', '.join(words)}; --overwrite starts anew")
    print(f"{path}: goes on with its own options" + "".join(f", {word}" for word in words))
    return argparse.Namespace(**vars(args) | {k: v for k, v in before.items() if k in vars(args) and k not in own} | anew)


# ---------------------------------------------------------------------------------------------------------------------
# the generator's side of a step, one function a stage: forward, then (after the discriminator's step) the terms

def forward_stage1(nets, batch, args):
    """z -> w, two of them mixed in nine of ten pictures (StyleGAN2 default) -> fake"""
    G, real = nets["model"].generator, batch["picture"]
    N = len(real)
    w1, w2 = G.mapping(torch.randn(2 * N, G.dim, device=real.device)).chunk(2)         # (N, D) each
    crossover = int(torch.randint(1, G.L, ())) if torch.rand(()) < 0.9 else G.L
    w_plus = mix_styles(w1, w2, G.L, crossover)                                        # (N, L, D)
    return dict(real=real, fake=G(w_plus, "random" if nets["model"].config.noise else "off"), w_plus=w_plus)


def forward_stage2(nets, batch, args, deltas=None):
    """picture -> code -> picture; in the second phase the encoder rests and the hypernetwork refines `deltas`.

    With a mouth code, half of the faces are made once more with the mouth of another: `moved`. Where landmarks taught its
    shape, with the other's opening, and the rest of the shape a little off; and the looks of every fourth mouth are kept
    from the generator, so that it goes by the shape."""
    model, real = nets["model"], batch["picture"]
    if not model.mouth or nets["hyper_phase"]:
        z = model.invert(real)
        deltas = model.refine(real, z, deltas) if nets["hyper_phase"] else None
        return dict(real=real, fake=model.decode(z, deltas), deltas=deltas)
    mouth = model.mouth(real)                                                          # (N, M)
    said = mouth.detach().roll(1, 0)                                                   # the neighbours'
    if model.config.landmarks:
        shape, looks = mouth.split([model.config.state_dim, mouth.shape[1] - model.config.state_dim], 1)
        said = torch.cat([said[:, :1], shape[:, 1:] + torch.randn_like(shape[:, 1:]), looks], 1).detach()
        mouth = torch.cat([shape, looks * (torch.rand(len(looks), 1, device=looks.device) > 0.25)], 1)
    said = said[len(real) // 2:]
    own, other = (model.motion.mouth_up(m).unflatten(1, model.motion.shape) for m in (mouth, said))
    z = model.encode_source(real)                                                      # (N, L, D): no mouth in it
    fake, moved = model.decode(torch.cat([z + own, z[-len(said):] + other])).split([len(real), len(said)])
    return dict(real=real, fake=fake, moved=moved, said=said)


def forward_stage3(nets, batch, args):
    """source, driving frames and sound -> the driving frames, in the source's looks.

    Where landmarks taught the mouth's shape, every other clip is told the true one: what sound cannot tell, the generator
    would learn to paint half."""
    model, T = nets["model"], batch["mel"].shape[1] - 2 * CONTEXT
    real, told, shape = middle(batch["driving"], T), None, None                        # (B, T, 3, H, W)
    if model.config.landmarks:
        with torch.no_grad():
            source, shape = model.mouth(batch["source"]), model.mouth(real.flatten(0, 1)).unflatten(0, real.shape[:2])
            told = shape - (source - model.motion.spoken(source))[:, None]             # (B, T, M): beside the source's
            told[..., model.config.state_dim:] = 0                                     # looks
            told[1::2] = math.nan
    frames, z_s2c, z_c2d = model(batch["source"], batch["driving"], batch["mel"], CONTEXT, told)
    out = dict(shape=shape, real=real.flatten(0, 1), fake=frames.flatten(0, 1), frames=frames, z_s2c=z_s2c, z_c2d=z_c2d,
               mel=batch["mfcc"] if "mfcc" in batch else middle(batch["mel"], 1)[:, 0])  # of the window's middle frame
    return out | forward_photos(model, batch, out) if "photo" in batch else out


def forward_photos(model, batch, out):
    """Stage 3 on photos: each is its own driving video; once with its own mouth, once with what a clip's sound says.

    Without a mouth code the first is the photo's inversion, as no sound is known that fits its own mouth."""
    photo = batch["photo"]                                                             # (N, 3, H, W)
    if not model.mouth:
        mel = batch["mel"][torch.arange(len(photo)) % len(batch["mel"])]
        moved = model(photo, photo[:, None].expand(-1, mel.shape[1], -1, -1, -1), mel, CONTEXT)[0][:, 0]
        z_s = model.invert(photo)
        fake = model.decode(z_s, model.weight_changes(photo, z_s))
        return dict(real=torch.cat([out["real"], photo]), fake=torch.cat([out["fake"], fake]), moved=moved)
    (_, z_s2c), pose = model.person(photo), model.motion.pose(model.encode_driving(photo[None]))[0]
    mouth = model.mouth(photo)                                                         # (N, M)
    with torch.no_grad():
        said = model.motion.say(model.encode_sound(batch["mel"]), CONTEXT)[:, 0]       # (B, M)
        said = said[torch.arange(len(photo), device=said.device) % len(said)]
    spoken = model.motion.spoken(mouth), said
    fake, moved = model.decode(torch.cat([z_s2c + model.motion.join(pose, m) for m in spoken])).chunk(2)
    said = said + (mouth - spoken[0]).detach()                                         # what the picture should read as
    return dict(real=torch.cat([out["real"], photo]), fake=torch.cat([out["fake"], fake]), moved=moved, said=said)


def picture_terms(nets, out, args):
    """Reconstruction, perceptual and identity: what stages 2 and 3 share."""
    template = TEMPLATES[nets["model"].config.template]
    mouth = template.lips if nets["model"].mouth else template.mouth
    boxes = ((mouth, args.w_mouth), (template.eyes, args.w_eyes))
    real, fake = out["real"], out["fake"]
    terms = dict(rec=losses.reconstruction_loss(fake, real, boxes))
    if args.w_feat and "critic" in nets:
        with torch.no_grad():
            real_maps = nets["critic"].features(real)
        terms["feat"] = losses.perceptual_loss(nets["critic"].features(fake), real_maps)
    if args.w_l2:
        terms["l2"] = (fake - real).square().mean()
    if args.w_vgg:
        terms["vgg"] = losses.perceptual_loss(nets["vgg"](fake), nets["vgg"](real))
    if args.w_lpips:
        terms["lpips"] = nets["lpips"](fake, real).mean()
    if args.w_arcface:
        terms["arcface"] = losses.identity_loss(nets["arcface"](fake), nets["arcface"](real))
    elif args.w_id:
        terms["id"] = losses.identity_loss(nets["judge"](fake), nets["judge"](real))
    return terms


def terms_stage1(nets, out, args):
    return dict(adv=losses.generator_loss(nets["D"](nets["augment"](out["fake"]))))


def terms_stage2(nets, out, args):
    terms = picture_terms(nets, out, args) | moved_terms(nets["model"], out)
    if args.w_adv:
        terms["adv"] = losses.generator_loss(nets["D"](nets["augment"](judged(out))))
    return terms


def moved_terms(model, out):
    """A face with the mouth of another: around the mouth it is the same picture, and the mouth reads as it was told.
    Where its shape is read, the whole keeps its colours, too.

    This is what moves the lips of people who are known from one photo. Ours."""
    if "moved" not in out:
        return {}
    moved, real = out["moved"], out["real"][-len(out["moved"]):]
    around = (mask_mouth(moved, model.config.template) - mask_mouth(real, model.config.template)).abs().mean()
    if not model.mouth:
        return dict(around=around)
    said = out["said"].float()
    if model.config.landmarks:
        hue = [x - x.mean(1, keepdim=True) for x in (moved, real)]
        hue = torch.nn.functional.avg_pool2d(hue[0] - hue[1], max(1, moved.shape[-1] // 16))
        if "frames" in out:                                                            # stage 3: clips have a truth
            moved = torch.cat([moved, out["frames"].flatten(0, 1)])
            said = torch.cat([said, out["shape"].flatten(0, 1).float()])
        said = said[:, :model.config.state_dim]
        wrong = (read_softly(model.mouth, moved) - said).square() / variance(said).clamp_min(0.25)
        wrong = (wrong[:, 0].mean() + wrong[:, 1:].mean()) / 2                         # the opening is half of it
        return dict(around=around + hue.abs().mean(), obey=wrong)
    frozen = {k: q.detach() for k, q in model.mouth.named_parameters()}                # else they would agree on a sign
    read = torch.func.functional_call(model.mouth, frozen, (moved,)).float()
    if "frames" in out and model.motion.state is not None:                             # stage 3: what is spoken counts
        read, said = read @ model.motion.state.t(), said @ model.motion.state.t()
    return dict(around=around, obey=(read - said).square().mean() / variance(said).mean().clamp_min(1e-6))


def variance(codes):
    """Of mouth codes (N, M), over the batch; of a single one the 1 that all mouth codes have at the start -> (M,)"""
    return codes.var(0) if len(codes) > 1 else torch.ones_like(codes[0])


def read_softly(mouth, pictures):
    """The lips' shape (N, K) of pictures as a loss reads it: shifted and soft, so that fine patterns tell it nothing"""
    boxes = mouth.box(pictures.float(), air=0.125)
    down, right = (int(v) for v in torch.randint(boxes.shape[-1] - 31, (2,)))
    boxes = torch.nn.functional.avg_pool2d(boxes[..., down:down + 32, right:right + 32], 2)
    return mouth.read(torch.nn.functional.interpolate(boxes, scale_factor=2, mode="bilinear")).float()


def judged(out):
    """Every picture of the generator that the discriminator is to see"""
    return torch.cat([out["fake"], out["moved"]]) if "moved" in out else out["fake"]


def terms_stage3(nets, out, args):
    terms = picture_terms(nets, out, args) | moved_terms(nets["model"], out)
    terms["orth"] = losses.orthogonality_loss(out["z_s2c"], out["z_c2d"])
    if args.w_adv and adversarial(out):
        terms["adv"] = losses.generator_loss(nets["D"](nets["augment"](judged(out))))
    if args.w_sync and out["frames"].shape[1] == WINDOW:
        seen = recrop(out["frames"], nets["model"].config.template, nets["sync"].template)
        terms["sync"] = sync_loss(nets["sync"], seen, out["mel"])
    return terms


def adversarial(out):
    """Whether this batch trains the discriminator: the many clips of stage 3 do, five frames of one clip are nearly one
    sample"""
    return "frames" not in out or out["frames"].shape[1] == 1


FORWARD = {1: forward_stage1, 2: forward_stage2, 3: forward_stage3}
TERMS = {1: terms_stage1, 2: terms_stage2, 3: terms_stage3}


# ---------------------------------------------------------------------------------------------------------------------
# starts: what a stage does once, before its first step

@torch.no_grad()
def start_encoder(model, pictures, device, most=3000):
    """Stage 2: mean w of the generator, principal components of training pictures for the linear path."""
    model.encoder.latent_avg.copy_(mean_w(model.generator))
    if getattr(model.encoder, "linear_down", None) is not None:
        n = max((8 if model.config.picture else 2) * len(model.encoder.linear_down.weight), most)
        seen = torch.stack([pictures[i]["picture"] for i in range(n)]).to(device)
        masked = mask_mouth(seen, model.config.template, "lips") if model.mouth else seen
        model.encoder.start_linear(masked)
        if model.config.picture:
            start_picture(model, masked, seen)


@torch.no_grad()
def start_picture(model, masked, seen, scale=0.1, ridge=0.02):
    """Stage 2 with a coarse picture: pictures (n, 3, H, W), lips `masked` -> linear path -> W+ -> the picture as `seen`,
    in closed form; so is the mouth code's, for what the rest of the face cannot tell about its lips. Ours.

    Principal components and mouth numbers go into W+ in orthonormal directions, so short that the generator hardly
    notices (`scale`; the shape of lips is longer), `maps.down` reads them back, and the picture is a ridge regression on
    them, less what the generator paints by itself.
    """
    encoder, maps, edge, k = model.encoder, model.maps, model.config.picture, model.config.linear
    for layer in (*(head[-1] for head in encoder.heads), maps.picture):                # the trunk speaks up later
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    codes = encoder.linear_down(small_picture(masked)).cpu()                           # (n, k), of unit variance
    by_itself, wanted = (torch.nn.functional.adaptive_avg_pool2d(x, edge).cpu()        # solved there: Apple's chips have
                         for x in (model.decode(encoder.latent_avg[None]), seen))      # no float64
    mean, centre = codes.mean(0), wanted.mean(0)
    codes, rest = (codes - mean).double(), (wanted - centre).flatten(1).double()
    gram = codes.t() @ codes + ridge * len(codes) * torch.eye(k)
    picture = torch.linalg.solve(gram, codes.t() @ rest).float()                       # (k, 3 * edge * edge)
    if model.mouth:
        rest = (rest.float() - codes.float() @ picture).unflatten(1, (3, edge, edge))
        rest = (rest - mask_mouth(rest, model.config.template, "lips")).flatten(1)     # of the lips alone
        box = model.mouth.box(seen).flatten(1).cpu()
        if model.mouth.reader:                                                         # the lips' shape goes first
            shape = torch.cat([model.mouth.read(x) for x in model.mouth.box(seen).split(256)]).cpu()
            mean, shape = torch.cat([mean, shape.mean(0)]), shape - shape.mean(0)
            gram = shape.t() @ shape + ridge * len(shape) * torch.eye(shape.shape[1])
            effect = torch.linalg.solve(gram, shape.t() @ rest)                        # (K, 3 * edge * edge)
            picture, rest = torch.cat([picture, effect]), rest - shape @ effect
        free = len(model.mouth.linear.weight)
        down, up = reduced_rank_regression(box - box.mean(0), rest, free, ridge * box.var(0).mean())
        model.mouth.linear.weight.copy_(down)
        model.mouth.linear.bias.copy_(-down @ box.mean(0))
        for q in model.mouth.body[-1].parameters() if model.mouth.body else ():
            torch.nn.init.zeros_(q)
        picture, mean = torch.cat([picture, up.t()]), torch.nn.functional.pad(mean, (0, len(down)))
    length = torch.full((len(picture),), scale)
    if model.mouth and model.mouth.reader:                                             # these few must be heard: they
        length[k:k + model.config.state_dim] = 40 * scale                              # decide what the mouth is
    directions = length * torch.linalg.qr(torch.randn(encoder.latent_avg.numel(), len(picture)))[0]
    encoder.linear_up.weight.copy_(directions[:, :k])                                  # (L * D, k)
    if model.mouth:
        model.motion.mouth_up.weight.copy_(directions[:, k:])
    back = (directions / length.square()).t()
    maps.down.weight[:len(picture)] = back
    maps.down.bias[:len(picture)] = -back @ encoder.latent_avg.flatten().cpu() - mean
    maps.picture.weight[:, :len(picture)] = picture.t()
    maps.picture.bias.copy_((centre - by_itself[0]).flatten())


def train_reader(model, data, device, seed, steps=1500, batch=128, clips=400, per_clip=30):
    """Stage 2 with landmarks: the MouthEncoder learns to read the shape of lips off clips and photos. Ours.

    The shape's first number is how far the lips are open; the others are principal components of what else moves while
    one person speaks, less what follows the opening; each in units of its spread there, from its mean.
    """
    rng, K = np.random.default_rng([seed, 4]), model.config.state_dim
    boxes, shapes = [], []
    of_clips, of_photos = data["landmarks"]

    def collect(pack, marks, c, ks):
        air = model.mouth.box(to_tensor(pack.frames(c, ks)), air=0.125)                # to shift in
        boxes.append(air.to(torch.float16))
        shapes.append(mouth_shape(np.asarray(marks.points[pack.frame_start[c] + ks]) / pack.size))

    for c in rng.permutation(np.intersect1d(data["clips"], of_clips.kept))[:clips]:
        collect(data["pack"], of_clips, c, np.sort(rng.permutation(data["pack"].n_frames[c])[:per_clip]))
    shape, moving = np.concatenate(shapes), sum(map(len, shapes))                      # (n, 42)
    moves = np.concatenate([s - s.mean(0) for s in shapes])                            # one person's, at one time
    slope = moves[:, 0] @ moves[:, 1:] / (moves[:, 0] @ moves[:, 0])                   # what follows the opening
    rest = moves[:, 1:] - moves[:, :1] * slope
    _, directions = np.linalg.eigh(rest.T @ rest)                                      # ascending
    directions = directions[:, :-K:-1]                                                 # (41, K - 1)

    def numbers(shape):
        return np.concatenate([shape[:, :1], (shape[:, 1:] - shape[:, :1] * slope) @ directions], 1)

    centre, spread = numbers(shape).mean(0), numbers(moves).std(0)
    if of_photos is not None:
        photos = data["photos"].pack
        for c in rng.permutation(np.intersect1d(data["photos"].order, of_photos.kept))[:moving]:
            collect(photos, of_photos, c, np.arange(1))
    boxes, target = torch.cat(boxes), (numbers(np.concatenate(shapes)) - centre) / spread
    target = torch.from_numpy(target).float().clamp(-8, 8)                             # landmarks err
    weight, unread = 1 / target.var(0), 1.0
    model.mouth.reader.requires_grad_(True)
    opt = torch.optim.Adam(model.mouth.reader.parameters(), 1e-3)
    for step in tqdm(range(steps), desc="reader of lips", leave=False, disable=None):
        half = torch.randint(moving, (batch // 2,))
        i = torch.cat([half, torch.randint(moving, len(boxes), (batch // 2,)) if len(boxes) > moving else half])
        down, right = (int(v) for v in torch.randint(boxes.shape[-1] - 31, (2,)))
        x = boxes[i][..., down:down + 32, right:right + 32].to(device, torch.float32)
        if step % 2:
            x = x.flip(-1)                                                             # shapes are symmetric
        if step % 4 > 1:                                                               # what a generator paints is soft
            x = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        loss = ((model.mouth.read(x) - target[i].to(device)).square() * weight.to(device)).mean()
        opt.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        unread += 0.02 * (loss.item() - unread)
    print(f"shape of lips: {100 * (1 - unread):.0f} % of its variance, as landmarks tell it, is read off pixels")


def train_judge(data, device, seed, steps=400, batch=48):
    """The small face judge: frames of one clip are one person, other people's are others, and where all clips show one
    person, other clips are. About 20 s at 32 px on a CPU.

    With photos, two looks at one: shifted, mirrored, and one without its mouth (a clip's two frames differ there)."""
    photos, label = data["photos"], "identity"
    pictures = photos or Clips(data["pack"], T=1, seed=seed + 1, clips=data["clips"])
    if photos is None and len(np.unique(np.asarray(data["pack"].identity)[pictures.clips])) == 1:
        label = "clip"
    if len(photos.people if photos else pictures.clips) < 2:
        raise InputError(f"{pictures.pack.folder}: one person, from whom the face judge can tell nobody: --w-id 0 "
                         "does without it")
    torch.manual_seed(seed)
    judge = losses.SmallFaceJudge().to(device)
    opt = torch.optim.Adam(judge.parameters(), 2e-3)
    if photos is not None:
        batch, looks, template = 2 * batch, losses.Augment(p=0.5), photos.pack.template
    stream = batches(pictures, batch, 0)
    for _ in tqdm(range(steps), desc="face judge", leave=False, disable=None):
        item = next(stream)
        if photos is None:
            faces = item["source"], item["driving"][:, 0]                              # two of each clip
        else:
            faces = looks(item["picture"]), looks(mask_mouth(item["picture"], template, "lips"))
        # ours: colour and brightness move a little, so that the judge does not count pixels of one lamp
        a, b = (x.to(device) * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1, device=device)) for x in faces)
        loss = losses.same_person_loss(judge(a), judge(b), item[label].to(device), judge.log_scale, judge.bias)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
    return judge


@torch.no_grad()
def start_motion_space(model, pack, chosen, device, photos=None, clips=300, per_clip=16, ridge=0.02, still=1.0):
    """Stage 3: a closed-form start of canonical encoder and pose path. Ours.

    Over the frames t of one clip the person is constant, so z_t minus the clip's mean is motion. A linear map that
    predicts it from the code of frame t alone, fitted over many people, can use no direction in which people differ: it
    is free of identity by construction. From the whole picture's code it gives what the canonical encoder must take
    away, from the mouth-masked picture's code the pose path. Reduced-rank ridge regression, seconds on a CPU.

    Where the clips show few people, photos stand in for the many: of one photo there is no mean to deviate from, so it
    enters as a face that keeps still, with a weight of `still`.
    """
    rng = np.random.default_rng(2)
    chosen = rng.permutation(chosen)[:clips]
    z, z_masked = [], []                                                               # per clip (K, L, D)
    for c in chosen:
        length = int(pack.n_frames[c])
        seen = np.sort(rng.choice(length, min(per_clip, length), replace=False))
        x = to_tensor(pack.frames(c, seen)).to(device)                                 # (K, 3, H, W)
        z.append(model.encode_source(x))
        z_masked.append(model.encode_driving(x[None])[0])
    deviation = [codes - codes.mean(0) for codes in z]
    weight = [torch.ones(len(torch.cat(z)), 1)]
    if photos is not None:
        for i in range(0, clips * per_clip // 2, 64):
            x = torch.stack([photos[k]["picture"] for k in range(i, i + 64)]).to(device)
            z.append(model.encode_source(x))
            z_masked.append(model.encode_driving(x[None])[0])
            deviation.append(torch.zeros_like(z[-1]))
            weight.append(torch.full((64, 1), math.sqrt(still)))
    z, z_masked, weight = torch.cat(z), torch.cat(z_masked), torch.cat(weight).to(device)
    deviation = torch.cat(deviation).flatten(1)                                        # (n, L * D)
    model.set_statistics(z, z_masked)
    canonical, motion = model.canonical, model.motion
    down, up = reduced_rank_regression(weight * canonical.whiten(z), -deviation, len(canonical.down.weight), ridge)
    canonical.down.weight.copy_(down)
    canonical.up.weight.copy_(up)
    if model.config.motion == "direct":
        down, up = reduced_rank_regression(weight * motion.whiten(z_masked), deviation, model.config.pose_dim, ridge)
        motion.pose_down.weight.copy_(down)
        motion.pose_down.bias.zero_()
        motion.pose_up.weight.copy_(up)


def start_lips(model, pack, chosen, args, device, clips=800, steps=2000, batch=12, span=16):
    """Stage 3, with a mouth code: sound -> code, regressed on the MouthEncoder's readings before any picture is made.
    Without landmarks also the directions in which the mouth of a clip moves; with them the range of its opening.

    A step of this costs a tenth of one through the generator, which then only refines it. `batch` stretches of `span`
    frames a step: neighbouring frames share their sound windows."""
    rng = np.random.default_rng([args.seed, 3])
    chosen = rng.permutation([c for c in chosen if pack.n_frames[c] >= span])[:clips]
    with torch.no_grad():
        codes = [model.mouth(to_tensor(pack.frames(c, range(pack.n_frames[c]))).to(device)) for c in chosen]  # (T, M)
    if model.config.landmarks:                                                         # opening; the rest from its mean
        shapes = [c[:, :model.config.state_dim] for c in codes]
        codes = [torch.cat([s[:, :1], s[:, 1:] - s[:, 1:].mean(0)], 1) @ model.motion.state for s in shapes]  # (T, M)
    elif model.config.state_dim:
        moves = torch.cat([c - c.mean(0) for c in codes])                              # (n, M): one person's, at one time
        variance, directions = torch.linalg.eigh((moves.t() @ moves / len(moves)).cpu())  # ascending
        model.motion.state.copy_(directions[:, -model.config.state_dim:].t())
        model.motion.mouth_mean.copy_(torch.cat(codes).mean(0))
        spoken = variance[-model.config.state_dim:].sum() / variance.sum()
        print(f"of a mouth's motion {100 * spoken:.0f} % lie in {model.config.state_dim} directions")
        codes = [model.motion.spoken(c) for c in codes]
    else:
        model.motion.lips[-1].bias.data.copy_(torch.cat(codes).mean(0))
    spread, weight = torch.cat(codes).std().clamp_min(1e-3), torch.ones(codes[0].shape[1], device=device)
    if model.config.landmarks:                                                         # each in units of its own spread
        power = torch.cat(codes).var(0)
        weight = spread.square() / power.clamp_min(1e-3)
        weight[0] *= 5                                                                 # ours: the opening shows most
        weight = weight / (weight * power / spread.square()).mean()
    trained = [q for part in (model.audio, model.motion.fusion, model.motion.lips) for q in part.parameters()]
    opt = torch.optim.Adam(trained, 1e-3)
    # each clip's sound windows are computed once: 0.4 MB a clip of 3 s
    heard = functools.cache(lambda i: pack.windows(chosen[i], np.arange(-CONTEXT, len(codes[i]) + CONTEXT)))
    for step in tqdm(range(steps), desc="lips", leave=False, disable=None):
        items = [(i, int(rng.integers(len(codes[i]) - span + 1))) for i in rng.integers(len(chosen), size=batch)]
        mel = torch.from_numpy(np.stack([heard(i)[k:k + span + 2 * CONTEXT] for i, k in items])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            said = model.motion.say(model.encode_sound(mel), CONTEXT)                  # (B, span, M)
        target = torch.stack([codes[i][k:k + span] for i, k in items])
        loss = (((said.float() - target) / spread).square() * weight).mean()
        opt.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
    if model.config.state_dim:  # ours: what is half predictable is predicted half as far, and drawn less than it is told
        reach = args.articulate or (1.25 if model.config.landmarks else 2.0)
        for q in (model.motion.lips[-1].weight, model.motion.lips[-1].bias):
            q.data.mul_(reach)
        if model.config.landmarks:
            model.motion.range.copy_(torch.cat(shapes)[:, 0].quantile(torch.tensor([0.02, 0.9], device=device)))
    print(f"lips from sound: {100 * (1 - loss.item()):.0f} % of the mouth code's variance before the first step")


def fit_warp(model, data, clips=200):
    """Stage 3, with landmarks: how the points of a face move with the mouth code, and the opening that its first number
    stands for, so that warp.py can move photos. Least squares over training clips, a minute on a CPU. Ours."""
    pack, marks = data["pack"], data["landmarks"][0]
    motion, mean = model.motion, load_landmarks().solid.double().numpy()
    moving, said, real = [], [], []
    for c in np.intersect1d(data["clips"], marks.kept)[:clips]:
        frames = range(int(pack.n_frames[c]))
        points = np.asarray(marks.points[pack.frame_start[c]:pack.frame_start[c + 1]], np.float64)  # (T, 68, 2)
        with torch.no_grad():
            pictures = to_tensor(pack.frames(c, frames)).to(motion.moves.device)
            read = torch.cat([model.mouth(x) for x in pictures.split(64)])
        moving.append((points, read[:, 1:model.config.state_dim].cpu().numpy()))
        said.append(model.lip_numbers(torch.from_numpy(pack.windows(c, frames)).to(read.device))[:, 0].cpu().numpy())
        real.append(lip_opening(held_still(points, mean)))
    motion.moves.copy_(torch.from_numpy(fit_moves(moving, mean)))
    motion.opening.copy_(torch.tensor(fit_opening(np.concatenate(said), np.concatenate(real))))


def reduced_rank_regression(x, y, rank, ridge):
    """y ~ x down^T up^T with `rank` numbers of unit variance between, solved on the CPU: Apple's chips have no float64.

    x (n, i), y (n, o) -> down (rank, i), up (o, rank), on the device of x
    """
    device, x, y = x.device, x.cpu().double(), y.cpu().double()
    n, i = x.shape
    gram = x @ x.t() if n < i else x.t() @ x                                           # the smaller of two equal ways
    gram += ridge * n * torch.eye(len(gram), dtype=x.dtype)
    full = x.t() @ torch.linalg.solve(gram, y) if n < i else torch.linalg.solve(gram, x.t() @ y)  # (i, o)
    fitted = x @ full
    if n < y.shape[1]:
        power, u = torch.linalg.eigh(fitted @ fitted.t())                              # ascending
        v = fitted.t() @ u / power.clamp_min(1e-12 * power[-1]).sqrt()
    else:
        _, v = torch.linalg.eigh(fitted.t() @ fitted)
    v = v[:, -rank:].flip(1)                                                           # (o, rank): where most of it moves
    v = torch.nn.functional.pad(v, (0, rank - v.shape[1]))                             # few pictures: the rest is zero
    down = full @ v
    std = (x @ down).std(0).clamp_min(1e-6)
    return (down / std).t().float().to(device), (v * std).float().to(device)


@torch.no_grad()
def collect_idle(model, pack, chosen, device):
    """Fill DirectMotion.idle: pose deviations of the calmest of 64 training clips, from zero at their first frame."""
    if model.config.motion != "direct":
        return
    n, T, _ = model.motion.idle.shape
    walks = []
    for c in chosen[pack.n_frames[chosen] >= T][:64]:
        frames = to_tensor(pack.frames(c, range(T))).split(16)                         # memory does not grow with T
        pose = torch.cat([model.motion.pose(model.encode_driving(x[None].to(device)))[0] for x in frames])
        walks.append(pose - pose[:1])                                                  # (T, P)
    walks.sort(key=lambda walk: float(walk.mean(0).norm()))                            # ours: those near the photo
    for i, walk in enumerate(walks[:n]):
        model.motion.idle[i] = 0.7 * walk                                              # ours: a little less than speech


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def build(args, data, device, saved=None):
    """Networks of the stage, from nothing, from the stage before or published files, or as they were saved
    -> (nets, ema). nets["model"] is what is trained. data: of `training_sets`."""
    changes, parts = ({}, {}) if saved else published(args.size, args.generator, trunk(args), args.hyper)
    before = None
    if args.stage > 1 and not saved and (args.init or "generator" not in parts):
        path = args.init or os.path.join(args.out, f"stage{args.stage - 1}.pt")
        before = load_checkpoint(path, f"stage{args.stage - 1}", map_location=device)
        if before["config"]["size"] != args.size:
            raise InputError(f"{path}: a network of {before['config']['size']} px, --size is {args.size}")
    config = Config.load(saved["config"]) if saved else shape(args, data["pack"], before, changes, data["landmarks"])
    model = FCTFG(config, generator_only=args.stage == 1).to(device)
    nets = dict(model=model, D=Discriminator(args.size, config.base, config.cap).to(device), hyper_phase=False,
                augment=losses.Augment(max(args.augment, 0.0)))
    if before:
        names = ("generator", "encoder", "maps", "hyper", "mouth") + ("motion.mouth_up",) * bool(model.mouth)
        for name in names[:1 if args.stage == 2 else None]:                            # what was trained before
            part = operator.attrgetter(name)(model)
            if part is not None and name not in parts:
                prefix = name + "."
                averaged = before["ema"]["model"].items()
                part.load_state_dict({k[len(prefix):]: v for k, v in averaged if k.startswith(prefix)})
        nets["D"].load_state_dict(before["networks"]["D"])
    for name, network in parts.items():
        target = nets["D"] if name == "D" else getattr(model, name)
        if target is not None:
            target.load_state_dict(network.state_dict())
    if args.stage > 1 and not saved:
        start(args, nets, data, device, before["networks"] if before else {}, parts)
    if saved and args.stage > 1 and args.w_id and not args.w_arcface and "judge" not in saved["networks"]:
        nets["judge"] = train_judge(data, device, args.seed)                           # a weight that was 0 so far
    for name in ("critic", "judge"):
        if saved and name in saved["networks"]:                                       # filled by `restore`
            nets[name] = (copy.deepcopy(nets["D"]) if name == "critic" else losses.SmallFaceJudge().to(device))
        if name in nets:
            losses.freeze(nets[name])
    return nets, copy.deepcopy(model).eval().requires_grad_(False)


def shape(args, pack, before, changes, landmarks=None) -> Config:
    """The dial's, or that of the stage before, with what published files demand; a hypernetwork where one is trained"""
    dial = Config.at(args.size, template=pack.template, motion=args.motion)
    config = Config.load(before["config"]) if before else dial
    config = dataclasses.replace(config, template=pack.template, motion=args.motion, **changes)
    if not config.map_code or config.encoder != "slim":                                # published networks know no such
        config.picture = 0
    if "hyper" not in changes and (args.stage == 2 or not before):
        config.hyper = dial.hyper if args.stage == 2 and args.hyper_share else "none"
    if args.refine is not None:
        config.refine = args.refine
    if args.stage == 2 and args.hyper_share and not config.refine:
        raise InputError("--hyper-share trains the hypernetwork, --refine 0 switches it off: leave out one of them")
    if args.stage == 2:                                                                # later stages inherit these
        config.mouth_dim, config.state_dim = dial.mouth_dim, dial.state_dim
        config.landmarks = bool(config.state_dim) and landmarks is not None
        config.state_dim = min(config.state_dim, 6) if config.landmarks else config.state_dim
    if args.stage == 3 and config.mouth_dim and config.motion == "paper":
        raise InputError("--motion paper has no mouth code, but stage 2 trained one: train stage 2 with --motion paper")
    return config


def start(args, nets, data, device, known, parts):
    """What stages 2 and 3 begin with: judges (of the stage before: `known`), the encoder's mean, the motion space"""
    model = nets["model"]
    texture = known.get("critic", known.get("D"))                                      # stage 1's D knows texture
    if texture or "D" in parts:
        nets["critic"] = copy.deepcopy(nets["D"])
        nets["critic"].load_state_dict(texture or parts["D"].state_dict())
    if args.stage == 2 and model.config.landmarks:
        train_reader(model, data, device, args.seed)
    elif args.stage == 2 and model.mouth:
        print("no landmarks beside all packs (keypoints.py extract): what a mouth is, is learned from pixels alone, and "
              "strangers' lips obey sound less")
    if args.stage == 2 and "encoder" not in parts:
        start_encoder(model, data["pictures"], device)
    if model.encoder.latent_avg.isnan().any():                                         # a file without one
        model.encoder.latent_avg.copy_(mean_w(model.generator))
    if "judge" in known:
        nets["judge"] = losses.SmallFaceJudge().to(device)
        nets["judge"].load_state_dict(known["judge"])
    elif args.w_id and not args.w_arcface:
        nets["judge"] = train_judge(data, device, args.seed)
    if args.stage == 3:
        start_motion_space(model, data["pack"], data["clips"], device, data["photos"])
        if model.mouth:
            start_lips(model, data["pack"], data["clips"], args, device)


def optimisers(nets, args):
    """Adam for the stage's trained parts: rates by kind of layer; the discriminator's corrected for lazy R1."""
    model = nets["model"]
    model.requires_grad_(False)
    model.eval()                                                                       # BatchNorm of the published forms:
    if args.stage == 2:                                                                # batch statistics where their
        (model.hyper if nets["hyper_phase"] else model.encoder).train()                # authors trained with them
    inversion = [model.encoder, model.maps] + [model.generator] * (args.thaw > 0)
    inversion += [model.mouth, model.motion.mouth_up] if model.mouth else []
    parts = {1: [model.generator], 2: inversion, 3: [model]}[args.stage]
    if nets["hyper_phase"]:
        parts = [model.hyper]
    for part in parts:
        if part is not None:
            part.requires_grad_(True)
    if args.stage > 1:
        model.generator.style.requires_grad_(False)                                    # z -> w is stage 1's alone
    if model.config.picture and model.encoder:                                         # its closed forms stay:
        linear = [model.encoder.linear_down, model.encoder.linear_up, model.maps.down, model.maps.picture]
        if model.mouth:
            linear += [model.mouth.linear, model.motion.mouth_up]
        for part in linear:
            part.requires_grad_(False)                                                 # Adam would shake a picture apart
    if model.mouth and model.mouth.reader:                                             # else it and the generator would
        model.mouth.reader.requires_grad_(False)                                       # agree on another shape
    c = 4 / 5 if args.stage == 1 else 1.0                                              # lazy path length: k/(k+1), k = 4
    beta1 = 0.0 if args.stage == 1 else 0.9                                            # StyleGAN2: 0; ours where L1 leads
    groups = {}                                                                        # not by rate: rates may change
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            option = "lr"
            if name.startswith("generator."):
                option, share = "lr_gan", args.thaw if args.stage == 2 else c
            elif name.startswith("encoder.") and model.config.encoder != "slim" or (
                    name.startswith("hyper.") and model.config.hyper != "slim"):
                share = 0.1  # 1e-4: pSp's and HyperStyle's
            elif model.config.picture and name.startswith(("canonical.", "motion.pose_")):
                share = 0.01  # closed forms, too, and a small step in W+ is a large one in the coarse picture
            elif model.config.picture and name.startswith(("encoder.", "mouth.")):
                share = 0.1
            elif model.config.landmarks and name.startswith(("audio.", "motion.fusion", "motion.lips")):
                share = 0.1  # regressed on the shape itself, which tells them more than a picture of it
            elif "down." in name or "canonical.mlp.0" in name:
                share = 0.1  # a thousand whitened inputs: ten times as touchy
            elif args.stage == 3 and (not name.startswith(("audio.", "motion.")) or "pose_up" in name):
                share = 0.2  # found before: codes drift slowly under the maps
            else:
                share = 1.0
            groups.setdefault((option, share), []).append(parameter)
    groups = [dict(params=parameters, lr=share * getattr(args, option)) for (option, share), parameters in groups.items()]
    opt_g = torch.optim.Adam(groups, betas=(beta1, 0.99 ** c), eps=1e-8)
    c = 16 / 17                                                                        # lazy R1: k = 16
    opt_d = torch.optim.Adam(nets["D"].parameters(), args.lr_gan * c, betas=(0.0, 0.99 ** c), eps=1e-8)
    for opt in (opt_g, opt_d):
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
    return opt_g, opt_d


def discriminator_step(nets, out, opt_d, step, args):
    """Logistic loss, and R1 (in fp32: it is a second derivative) on every 16th turn; -> diagnostics"""
    D, augment = nets["D"].requires_grad_(True), nets["augment"]
    real, fake = augment(out["real"]), augment(judged(out).detach())
    with torch.autocast(real.device.type, torch.bfloat16, enabled=args.bf16):
        real_score, fake_score = D(real), D(fake)                                      # (N, 1)
    loss = losses.discriminator_loss(real_score, fake_score)
    finite("d", loss)
    opt_d.zero_grad(set_to_none=True)
    loss.backward()
    opt_d.step()
    turn = step // 2 if args.stage == 3 and args.w_sync else step                      # the discriminator's own count
    if turn % 16 == 0:
        real = augment(out["real"]).detach().requires_grad_(True)
        penalty = args.w_r1 / 2 * 16 * losses.r1_penalty(real, D(real))
        finite("r1", penalty)
        opt_d.zero_grad(set_to_none=True)
        penalty.backward()
        opt_d.step()
        nets["r1"] = penalty.detach() / 16
    D.requires_grad_(False)
    if args.augment >= 0:
        nets["augment"].update(real_score.detach())
    return dict(d=loss.detach(), r1=nets.get("r1", loss.new_zeros(())),
                real=real_score.detach().mean(), fake=fake_score.detach().mean())


def path_length_step(nets, out, opt_g, args):
    """StyleGAN2's path length regularisation on half a batch (every 4th step of stage 1)"""
    half = forward_stage1(nets, dict(picture=out["real"][:max(1, len(out["real"]) // 2)]), args)
    penalty, nets["mean_path"] = losses.path_length_penalty(half["fake"], half["w_plus"], nets["mean_path"])
    finite("path", penalty)
    opt_g.zero_grad(set_to_none=True)
    (args.w_path * 4 * penalty).backward()
    opt_g.step()
    return penalty.detach()


def finite(name, value):
    if not torch.isfinite(value):
        raise InputError(f"the loss term '{name}' is {float(value.detach())}: stopped; the last checkpoint is whole. "
                         "Lower --lr or --lr-gan")


@torch.no_grad()
def update_ema(ema, model, images, args):
    """Averaged weights: half-life of --ema-kimg, shorter at the start (StyleGAN2-ADA's ramp-up of 0.05)"""
    half_life = min(args.ema_kimg * 1000, 0.05 * images + args.batch)
    beta = 0.5 ** (args.batch / half_life)
    live = [(e, q) for e, q in zip(ema.parameters(), model.parameters()) if q.requires_grad]
    torch._foreach_lerp_([e for e, _ in live], [q for _, q in live], 1 - beta)
    for e, b in zip(ema.buffers(), model.buffers()):
        e.copy_(b)


def main(argv=None):
    args = parse(argv)
    checkpoint_path = os.path.join(args.out, f"stage{args.stage}.pt")
    saved = load_checkpoint(checkpoint_path, f"stage{args.stage}") if args.resume else None
    if saved:
        args = resume_options(args, saved["args"], checkpoint_path)
    del args.given
    device = pick_device(args.device)
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: no directory to write to ({error.strerror})") from None
    if os.path.exists(checkpoint_path) and not (args.resume or args.overwrite):
        raise InputError(f"{checkpoint_path} exists: --resume continues it, --overwrite starts anew")
    sync = expert_for(args, device)
    judges = published_judges(args, device, Pack(args.data).template if args.data else "toy")
    pack = Pack(args.data) if args.data else toy_pack(Path(args.out), args.size, args.people, args.seconds)
    if pack.size != args.size:
        raise InputError(f"{args.data}: pictures of {pack.size} px, --size is {args.size}")
    if saved and pack.template != saved["config"]["template"]:
        raise InputError(f"{args.data}: template {pack.template}, --resume needs {saved['config']['template']} as so far")
    sets = training_sets(args, pack)

    torch.manual_seed(args.seed)
    nets, ema = build(args, sets, device, saved)
    model = nets["model"]
    if args.w_obey is None:
        args.w_obey = ((0.1, 0.03), (0.5, 0.3))[model.config.landmarks][args.stage == 3]
    nets |= dict(sync=sync, mean_path=torch.zeros((), device=device))
    nets |= judges
    hyper_from = args.steps - round(args.hyper_share * args.steps) if args.stage == 2 else args.steps + 1
    start = 0
    if saved:
        start = restore(saved, nets, ema)
    nets["hyper_phase"] = start > hyper_from and model.hyper is not None              # at hyper_from the loop switches
    opt_g, opt_d = optimisers(nets, args)
    if saved:
        restore_optimiser(opt_g, saved["optimisers"]["g"])
        restore_optimiser(opt_d, saved["optimisers"]["d"])
        torch.set_rng_state(saved["rng"]["torch"].cpu())

    if args.stage == 3:  # even steps: few windows of five frames, for the sync loss; odd steps: many clips of one
        see = 0 if args.motion == "direct" else 2 * CONTEXT                            # driving frames not decoded
        turns = 2 if args.w_sync else 1
        windows = (WINDOW, max(1, args.batch // WINDOW), (start + 1) // 2)             # T, B, batches already seen
        singles = (1, max(1, args.batch // (2 if args.photos else 1)), start // turns)  # half of these are photos
        mfcc = see // 2 if getattr(sync, "hears_mfcc", False) else None
        data = [batches(Clips(pack, T + see, args.seed + T, hear=CONTEXT - see // 2, clips=sets["clips"], mfcc=mfcc),
                        B, first, args.workers) for T, B, first in (windows, singles)[-turns:]]
        photos = batches(sets["photos"], singles[1], singles[2], args.workers) if args.photos else None
    else:
        data = [batches(sets["pictures"], args.batch, start, args.workers)]
    header(args, model, pack, device)
    log = open(os.path.join(args.out, f"log_stage{args.stage}.jsonl"), "a" if saved else "w")
    versions = dict(torch=torch.__version__, python=sys.version.split()[0])
    log.write(json.dumps(dict(revision=revision(), **versions, args=vars(args))) + "\n")
    weight = {k[2:]: v for k, v in vars(args).items() if k.startswith("w_")} | (dict(adv=1.0) if args.stage == 1 else {})
    waited, clock, logged = 0.0, time.perf_counter(), start - 1

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=f"stage {args.stage}", disable=None)
    for step in bar:
        before = time.perf_counter()
        batch = next(data[step % len(data)])
        if args.stage == 3 and args.photos and (step + 1) % turns == 0:
            batch["photo"] = next(photos)["picture"]
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        waited += time.perf_counter() - before
        if step == hyper_from and not nets["hyper_phase"]:                             # stage 2: now the encoder rests
            nets["hyper_phase"] = True
            model.load_state_dict(ema.state_dict())
            opt_g, _ = optimisers(nets, args)
        for group in opt_g.param_groups + opt_d.param_groups:                          # ours: cosine down to a twentieth
            group["lr"] = group["initial_lr"] * lr_factor(step, args)

        # one fake forward
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            out = FORWARD[args.stage](nets, batch, args)
        out["fake"] = out["fake"].float()

        # discriminator, lazy R1
        diagnostics = {}
        if args.stage == 1 or (args.w_adv and adversarial(out)):
            diagnostics = discriminator_step(nets, out, opt_d, step, args)

        # generator and everything before it; of the hypernetwork a backward pass at each refinement
        opt_g.zero_grad(set_to_none=True)
        for turn in range(model.config.refine if nets["hyper_phase"] else 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                if turn:
                    out = forward_stage2(nets, batch, args, out["deltas"])
                terms = TERMS[args.stage](nets, out, args)
            for name, value in terms.items():
                finite(name, value)
            loss = sum(weight[k] * v for k, v in terms.items())
            loss.backward()
        opt_g.step()

        # lazy path length
        if args.stage == 1 and args.w_path and step % 4 == 0:
            diagnostics["path"] = path_length_step(nets, out, opt_g, args)

        update_ema(ema, model, (step + 1) * args.batch, args)

        last = step + 1 == args.steps
        if step % args.log_every == 0 or last:
            line = {k: float(weight[k] * v.detach()) for k, v in terms.items()}
            line |= {k: float(v) for k, v in diagnostics.items()}
            line |= dict(step=step, p=nets["augment"].p, gib=round(memory_gib(device), 2))
            line |= pace(time.perf_counter() - clock, waited, step - logged, args.batch)
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.write(format_line(line, args))
            waited, clock, logged = 0.0, time.perf_counter(), step
        if (step + 1) % args.sample_every == 0 or last:
            save_samples(os.path.join(args.out, f"stage{args.stage}.png"), ema, sets, device, args)
        if (step + 1) % args.save_every == 0 or last:
            if args.stage == 3:
                collect_idle(ema, pack, sets["clips"], device)
            save(checkpoint_path, step + 1, nets, ema, opt_g, opt_d, args)
    log.close()
    if args.stage == 3:
        if ema.config.landmarks and sets["landmarks"]:
            fit_warp(ema, sets)
        weights, talk = (os.path.join(args.out, name) for name in ("weights.pt", "talk.mp4"))
        export_weights(weights, ema, args)
        save_talk(talk, ema, pack, device)
        print(f"{talk}: the first clip's face says the last one's words; {weights}: for sample.py --weights")


# ---------------------------------------------------------------------------------------------------------------------
# around the loop

def training_sets(args, pack) -> dict:
    """The pack, its clips to train on (of own videos every tenth is held out), photos or None, pictures: both mixed"""
    parts = split(pack, args)
    clips, unseen = parts["train"], np.union1d(parts["valid"], parts["test"])
    pictures, photos, unseen_photos = Frames(pack, args.seed, clips=clips), None, None
    if args.photos:
        photos = Pack(args.photos)
        if (photos.size, photos.template) != (pack.size, pack.template):
            raise InputError(f"{args.photos}: {photos.size} px, template {photos.template}; the clips have "
                             f"{pack.size} px, template {pack.template}")
        parts = split(photos)
        unseen_photos = np.union1d(parts["valid"], parts["test"])
        photos = Frames(photos, args.seed + 1, clips=parts["train"])
        pictures = Mixed(pictures, photos, args.photo_share, args.seed)
    return dict(pack=pack, clips=clips, photos=photos, pictures=pictures, held_out=unseen, held_out_photos=unseen_photos,
                landmarks=landmarks_of(pack, photos.pack if photos else None))


def landmarks_of(pack, photos):
    """Those beside the pack and beside that of photos (keypoints.py extract); None unless all have some"""
    packs = [p for p in (pack, photos) if p is not None]
    if not all((p.folder / "landmarks" / "clips.jsonl").exists() for p in packs):
        return None
    return [Landmarks(p.folder / "landmarks", p) for p in packs] + [None] * (2 - len(packs))


def lr_factor(step, args):
    """A hundred steps up, so that what the stage before found is not thrown about, then cosine decay to 0.05; in
    stage 2 the hypernetwork's phase has its own"""
    a, b = 0, args.steps
    if args.stage == 2 and args.hyper_share:
        split = args.steps - round(args.hyper_share * args.steps)
        a, b = (0, split) if step < split else (split, args.steps)
    if args.stage == 1:
        return 1.0  # StyleGAN2 default: a constant rate, the average does the settling
    return min(1.0, (step - a + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - a) / max(1, b - a))))


def published_judges(args, device, template) -> dict:
    """The frozen judges that a weight asks for, from the user's files or fetched, for crops of a template"""
    judges = {}
    if args.stage > 1 and args.w_vgg:
        judges["vgg"] = unless("--w-vgg 0", losses.vgg19, device, args.vgg)
    if args.stage > 1 and args.w_lpips:
        judges["lpips"] = unless("--w-lpips 0", losses.lpips, device, *(args.lpips or ()))
    if args.stage > 1 and args.w_arcface:
        judges["arcface"] = unless("--w-arcface 0", losses.arcface, device, args.arcface, template)
    return judges


def unless(flag, make, *options):
    """make(*options), whose complaint about a file ends with the flag that does without it"""
    try:
        return make(*options)
    except InputError as error:
        raise InputError(f"{error}; {flag} does without") from None


def expert_for(args, device):
    """Stage 3's sync expert: that of --sync, else the trained one in --out, else, from 128 px on, Wav2Lip's"""
    if args.stage < 3 or not args.w_sync:
        return None
    path = args.sync or os.path.join(args.out, "sync.pt")
    if not args.sync and args.data and args.size >= PAPERS_JUDGES and not os.path.exists(path):
        path = "wav2lip"
    if path == "syncnet_v2" or path.endswith(".model"):
        print("SyncNet v2 is the judge: evaluate.py's LSE, which it scores, is no independent measure of this network")
        own = None if path == "syncnet_v2" else path
        return SyncNetV2Expert(unless("--w-sync 0", losses.syncnet_v2, device, own))
    return unless("--w-sync 0", load_sync, path, device, args.size)


def trunk(args):
    """--encoder, or where pSp's encoder starts from nothing the file of ArcFace's trunk, as in pSp"""
    starts = args.stage == 2 and not args.encoder and args.w_arcface and Config.at(args.size).encoder == "psp"
    return losses.fetch("arcface", args.arcface) if starts else args.encoder


def save(path, step, nets, ema, opt_g, opt_d, args):
    """Everything that the next step depends on."""
    networks = {k: v.state_dict() for k, v in nets.items() if k in ("model", "D", "critic", "judge")}
    save_checkpoint(path, dict(
        kind=f"stage{args.stage}", format=1, config=vars(ema.config), args=vars(args), step=step, networks=networks,
        ema=dict(model=ema.state_dict()), optimisers=dict(g=opt_g.state_dict(), d=opt_d.state_dict()),
        augment_p=nets["augment"].p, mean_path=nets["mean_path"],
        rng=dict(torch=torch.get_rng_state()), data=dict(step=step)))


def restore(saved, nets, ema) -> int:
    """Load a checkpoint of `save` -> its step"""
    for name, state in saved["networks"].items():
        nets[name].load_state_dict(state)
    ema.load_state_dict(saved["ema"]["model"])
    nets["augment"].p, nets["mean_path"] = saved["augment_p"], saved["mean_path"].to(nets["mean_path"])
    return saved["step"]


def restore_optimiser(opt, state):
    """Adam's moments as they were saved, at the rates of today's options"""
    rates = [group["initial_lr"] for group in opt.param_groups]
    opt.load_state_dict(state)
    for group, rate in zip(opt.param_groups, rates):
        group["initial_lr"] = rate


def export_weights(path, ema, args):
    """What sampling needs, in fp16: the averaged network and its config."""
    halves = {}                                                                        # a shared head stays one tensor
    for v in ema.state_dict().values():
        halves.setdefault((v.data_ptr(), v.shape), v.half() if v.is_floating_point() else v)
    state = {k: halves[v.data_ptr(), v.shape] for k, v in ema.state_dict().items()}
    save_checkpoint(path, dict(kind="weights", format=1, config=vars(ema.config), args=vars(args),
                               networks=dict(model=state)))


def header(args, model, pack, device):
    count = {k: sum(q.numel() for q in part.parameters()) for k, part in model.named_children()}
    print(f"stage {args.stage} on {device}: {len(pack)} clips, {sum(count.values()) / 1e6:.2f} M parameters ("
          + ", ".join(f"{k} {v / 1e6:.2f}" for k, v in count.items()) + ")")
    moved = sum(q.numel() for q in model.parameters() if q.requires_grad)
    print(f"memory: {8 * sum(count.values()) / 2 ** 30:.2f} GiB of weights and averages, {12 * moved / 2 ** 30:.2f} "
          f"of gradients and Adam's moments ({moved / 1e6:.2f} M learn now), then pictures in the making; "
          f"{memory_gib(device):.2f} GiB so far")
    if args.bf16 != bf16_native(device):
        print("--bf16 is emulated on this chip: slower than fp32" if args.bf16 else "this chip has bf16: try --bf16")
    if args.stage > 1 and not (args.w_vgg and args.w_arcface):
        off = [n for n, w in (("VGG19 (--w-vgg)", args.w_vgg), ("ArcFace (--w-arcface)", args.w_arcface)) if not w]
        print(f"off: {', '.join(off)}; on in their place: features of stage 1's discriminator, "
              "a face judge trained on this pack")


def format_line(line, args):
    eta = (args.steps - line["step"]) * line["ms"] / 60000
    skip = ("step", "ms", "images_s", "waiting", "gib")
    numbers = "  ".join(f"{k} {v:.3f}" for k, v in line.items() if k not in skip)
    return (f"{line['step']:6d}  {numbers}  | {line['ms']:.0f} ms, {line['images_s']:.0f} images/s, "
            f"{100 * line['waiting']:.0f} % waiting, {line['gib']:.1f} GiB, {eta:.1f} min left")


def pace(seconds, waited, steps, batch) -> dict:
    """For the log: `seconds` went by in `steps` steps of `batch` pictures, `waited` of them for data"""
    return dict(ms=round(1000 * seconds / steps, 1), images_s=round(batch * steps / seconds, 1),
                waiting=round(waited / seconds, 3))


def memory_gib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:                                                                # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2 ** 10                                  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


@torch.no_grad()
def save_samples(path, ema, sets, device, args, n=8):
    """A grid, n columns. Stage 1: samples. Stage 2: pictures, inversions, and these with the neighbour's mouth or the
    hypernetwork. Stage 3: sources, drivings of the next clip, results. With own clips and photos: held-out ones, the last
    six columns photos."""
    if args.stage == 1:
        z = torch.randn(3 * n, ema.generator.dim, generator=torch.Generator().manual_seed(0)).to(device)
        w = ema.generator.mapping(z)[:, None].expand(-1, ema.generator.L, -1)
        rows = ema.generator(w).unflatten(0, (3, n))
    else:
        data = Clips(sets["pack"], 1 + 2 * CONTEXT, seed=12345, flip=False, clips=sets["held_out"])
        items = [data[i] for i in range(n)]
        if sets["photos"]:
            for i, c in enumerate(sets["held_out_photos"][:n - 2]):
                items[2 + i]["source"] = to_tensor(sets["photos"].pack.frame(c, 0))
        source, driving, mel = (torch.stack([item[k] for item in items]).to(device) for k in ("source", "driving", "mel"))
        if args.stage == 2:
            z = ema.invert(source)
            if ema.mouth:                                                              # and with the neighbour's mouth
                rows = torch.stack([source, ema.decode(z), ema.decode(ema.invert(source, ema.mouth(source).roll(1, 0)))])
            else:
                rows = torch.stack([source, ema.decode(z), ema.decode(z, ema.weight_changes(source, z))])
        else:
            driving, mel = driving.roll(1, 0), mel.roll(1, 0)                          # somebody else's head and sound
            rows = torch.stack([source, middle(driving, 1)[:, 0], ema(source, driving, mel, context=CONTEXT)[0][:, 0]])
    picture = torch.cat(list(torch.cat(list(rows.permute(1, 0, 2, 3, 4)), -1)), -2)    # (3, rows * H, n * W)
    image = Image.fromarray(to_uint8(picture.clamp(-1, 1)))
    scale = max(1, 128 // args.size)
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path + ".tmp.png")
    os.replace(path + ".tmp.png", path)


def save_talk(path, ema, pack, device):
    """A talking picture: the face of the first clip, the sound of the last, enlarged to 256 px at least."""
    wav, zoom = pack.sound(len(pack) - 1), max(1, 256 // pack.size)
    mel = torch.from_numpy(mel_windows(log_mel(wav), range(n_frames(len(wav))))).to(device)
    with VideoWriter(path, zoom * pack.size, zoom * pack.size, wav, overwrite=True) as video:
        for frames in ema.animate(to_tensor(pack.frame(0, 0)).to(device), mel):
            for frame in to_uint8(frames):
                video.write(frame.repeat(zoom, 0).repeat(zoom, 1))


if __name__ == "__main__":
    run(main)
