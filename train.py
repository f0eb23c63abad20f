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

import checkpoint
import judges
import losses
from audio import log_mel, mel_windows, n_frames
from checkpoint import (
    bf16_native, cosine_warmup, finite, load_checkpoint, memory_gib, pace, pick_device, restore_optimiser, revision,
    save_checkpoint, update_ema)
from data import Clips, Frames, Mixed, Pack, batches, split, split_options
from faces import TEMPLATES, Landmarks, mask_mouth, recrop
from fusion import CONTEXT, FCTFG, Config, middle, published
from initialise import collect_idle, fit_warp, shape, start, train_judge
from judges import SyncNetV2Expert
from losses import sync_loss
from media import InputError, Parser, VideoWriter, run, to_tensor, to_uint8
from stylegan2 import Discriminator, mix_styles
from syncnet import load_sync
from toyfaces import toy_pack

PAPERS_JUDGES = 128  # px, from which VGG19, ArcFace and a published sync expert are the default; below, small stand-ins
WINDOW = 5   # decoded frames of a sync window: the expert's 0.2 s


def parse(argv=None):
    p = Parser(description="train FC-TFG, one stage at a time",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--stage", type=int, choices=(1, 2, 3), required=True, help="1 StyleGAN2, 2 inversion, 3 end to end")
    p.add_argument("--out", default="out/toy32", help="directory of checkpoints, logs and pictures")
    p.add_argument("--data", help="pack directory written by prepare.py; "
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
    p.add_argument("--expert", help="sync expert for stage 3: a file of ours; wav2lip or syncnet_v2, both fetched; or "
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
CHANGEABLE = {"steps", "lr", "lr_gan", "ema_kimg", "data", "photos", "expert", "vgg", "lpips", "arcface",
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
    G, real = nets["model"].generator, batch["image"]
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
    model, real = nets["model"], batch["image"]
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
    boxes = mouth.mouth_crop(pictures.float(), margin=0.125)
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
            nets[name] = (copy.deepcopy(nets["D"]) if name == "critic" else judges.SmallFaceJudge().to(device))
        if name in nets:
            checkpoint.freeze(nets[name])
    return nets, copy.deepcopy(model).eval().requires_grad_(False)


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
    half = forward_stage1(nets, dict(image=out["real"][:max(1, len(out["real"]) // 2)]), args)
    penalty, nets["mean_path"] = losses.path_length_penalty(half["fake"], half["w_plus"], nets["mean_path"])
    finite("path", penalty)
    opt_g.zero_grad(set_to_none=True)
    (args.w_path * 4 * penalty).backward()
    opt_g.step()
    return penalty.detach()


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
        mfcc = see // 2 if getattr(sync, "uses_mfcc", False) else None
        data = [batches(Clips(pack, T + see, args.seed + T, context=CONTEXT - see // 2, clips=sets["clips"], mfcc=mfcc),
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
            batch["photo"] = next(photos)["image"]
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

        update_ema(ema, model, (step + 1) * args.batch, args.batch, args.ema_kimg)

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
    return cosine_warmup(step - a, b - a, 100)


def published_judges(args, device, template) -> dict:
    """The frozen judges that a weight asks for, from the user's files or fetched, for crops of a template"""
    judges = {}
    if args.stage > 1 and args.w_vgg:
        judges["vgg"] = unless("--w-vgg 0", judges.vgg19, device, args.vgg)
    if args.stage > 1 and args.w_lpips:
        judges["lpips"] = unless("--w-lpips 0", judges.lpips, device, *(args.lpips or ()))
    if args.stage > 1 and args.w_arcface:
        judges["arcface"] = unless("--w-arcface 0", judges.arcface, device, args.arcface, template)
    return judges


def unless(flag, make, *options):
    """make(*options), whose complaint about a file ends with the flag that does without it"""
    try:
        return make(*options)
    except InputError as error:
        raise InputError(f"{error}; {flag} does without") from None


def expert_for(args, device):
    """Stage 3's sync expert: that of --expert, else the trained one in --out, else, from 128 px on, Wav2Lip's"""
    if args.stage < 3 or not args.w_sync:
        return None
    path = args.expert or os.path.join(args.out, "sync.pt")
    if not args.expert and args.data and args.size >= PAPERS_JUDGES and not os.path.exists(path):
        path = "wav2lip"
    if path == "syncnet_v2" or path.endswith(".model"):
        print("SyncNet v2 is the judge: evaluate.py's LSE, which it scores, is no independent measure of this network")
        own = None if path == "syncnet_v2" else path
        return SyncNetV2Expert(unless("--w-sync 0", judges.syncnet_v2, device, own))
    return unless("--w-sync 0", load_sync, path, device, args.size)


def trunk(args):
    """--encoder, or where pSp's encoder starts from nothing the file of ArcFace's trunk, as in pSp"""
    starts = args.stage == 2 and not args.encoder and args.w_arcface and Config.at(args.size).encoder == "psp"
    return checkpoint.fetch("arcface", args.arcface) if starts else args.encoder


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
