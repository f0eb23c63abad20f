"""Initial state of a training stage: data, networks and optimisers, then closed forms and short regressions.

The closed forms and regressions are ours: with them, training takes minutes of a CPU. `start_stage` has their order.
`fit_warp`, `learn_moved_photos` and `collect_idle_motion` prepare a trained network for sampling.
"""

import copy
import dataclasses
import functools
import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import judges
from audio import add_echo_and_noise, log_mel, make_non_speech, mel_windows, spec_augment
from checkpoint import RANK, WORLD_SIZE, fetch, freeze, load_checkpoint
from data import Clips, Frames, Mixed, Pack, balance_people, batches, check_same_format, open_packs, split
from faces import TEMPLATES, Landmarks, box_slices, crop_face, mask_mouth
from fusion import (
    FCTFG, Config, enlarge_flow, enlarge_network, estimate_mean_w, image_loss, load_model, load_published)
from landmarks import MIRROR, load_landmarks
from losses import SYNC_FRAMES, Augment, mouth_cycle_loss, reconstruction_loss
from media import SAMPLES_PER_FRAME, InputError, to_tensor
from motion import (
    OPENING_GAIN, Motion, fit_moves, fit_opening, lip_opening, random_faces, random_motion, remove_head_motion)
from stylegan2 import Discriminator, move_pixels
from syncnet import load_sync
from vision import to_float64, to_small_image, zero_init
from warp import Warp

PAPERS_JUDGES = 128  # px from which VGG19, ArcFace and a published sync expert are the default
PHOTO_SHARE = 0.75  # share of photos in stages 1 and 2: the clips show few people
FINETUNE_GENERATOR = 128  # px up to which stage 2 trains the generator: after minutes of stage 1 it is half trained
LIP_STEPS = 4000  # of train_lips, most in stage 3: 11 minutes of one core. After 3000 unseen people were good as well
LIP_VELOCITY = 3.0  # weight of the change per frame in train_lips, ours: mean r of people who were left out .55 -> .565
NO_SPEECH = 0.1  # share of items of train_lips that are silence, noise or music, with shut lips
NOISY = 0.3  # share of its voices that get echo and noise
MOVED_STEPS, MOVED_PHOTOS = 2400, 3000  # of learn_moved_photos: 40 minutes of a core; photos, in five poses each
LIP_WEIGHT = 0.2  # of mouth_cycle_loss in learn_moved_photos
FLOW_STEPS = 2000  # of fit_flow: with its reading of 22,000 poses four minutes of one core
LIP_GAIN = 1.25  # the regression of lips on sound averages, and the generator paints smaller movements than its input
progress = functools.partial(tqdm, leave=False, disable=None)


def start_stage(args, model, D, data, states, device) -> dict:
    """Fit or train the parts of a new stage that no file gave -> its frozen networks. states: see build_networks"""
    if args.stage == 1:
        return {}
    new = not args.resume
    if new and args.part == "encoder" and model.mouth:
        train_reader(model, data, device, args.seed, min(1500, args.steps))
    if new and args.part == "encoder" and "encoder" not in states:
        fit_encoder(model, data["images"], device)
    if model.encoder.latent_avg.isnan().any():                                         # a published file without it
        model.encoder.latent_avg.copy_(estimate_mean_w(model.generator))
    frozen = small_judges(args, D, data, states, device)
    if new and args.stage == 3 and "motion" not in states:                             # --init lacks this part
        if model.pose:
            fit_flow(model, data, device, args.seed, min(FLOW_STEPS, args.steps))
        else:
            fit_motion_space(model, data["pack"], data["clips"], device, data["photos"])
    if new and args.stage == 3 and model.mouth:
        train_lips(model, data, args, device)
    return frozen


# ------------------------------------------------------------------------------------------------------------ data

def load_data(args) -> dict:
    """-> dict: pack; photos (Frames or None); images (dataset of stages 1 and 2); landmarks (of pack, photos; or None);
    arrays of clip numbers: clips (for training), clips_with_landmarks (of these), held_out (without --data: all),
    held_out_photos"""
    if args.data:
        pack = open_packs(args.data)
    else:
        from toyfaces import open_toy_pack  # drawn on first use
        pack = open_toy_pack(Path(args.out), args.size)
    if pack.size != args.size and args.part != "lips":
        raise InputError(f"{pack.folder}: images of {pack.size} px, --size is {args.size}")
    parts, packs = split(pack, args), [pack]
    data = dict(pack=pack, photos=None, clips=balance_people(pack, parts["train"], args), landmarks=None,
                held_out=np.union1d(parts["valid"], parts["test"]), images=Frames(pack, args.seed, clips=parts["train"]))
    if args.photos:
        photos = Pack(args.photos)
        check_same_format([pack, photos])
        parts = split(photos)
        data["held_out_photos"] = np.union1d(parts["valid"], parts["test"])
        data["photos"] = Frames(photos, args.seed + 1, clips=parts["train"])
        data["images"] = Mixed(data["images"], data["photos"], PHOTO_SHARE, args.seed)
        packs.append(photos)
    if all((part.folder / "landmarks" / "clips.jsonl").exists() for p in packs for part in p.packs):
        data["landmarks"] = [Landmarks(p) for p in packs]
        data["clips_with_landmarks"] = data["clips"][np.isin(data["clips"], data["landmarks"][0].usable_clips)]
    return data


def load_batches(args, data, config, mfcc: bool, start: int):
    """Yields the batches of this process from step `start` on. Stage 3: single frames of many clips; with a sync loss,
    windows of five frames in even steps. With a mouth code and --photos, half of the single frames are photos, each with
    the same photo as a driving frame, see move_photo."""
    def load(dataset, size, first_step):
        return batches(dataset, max(1, size) * args.accumulate, first_step, args.workers, RANK, WORLD_SIZE)

    if args.stage < 3:                                                                 # an endless stream
        yield from load(data["images"], args.batch, start)
    with_photos, with_sync = args.photos and config.mouth_dim, args.w["sync"] > 0
    windows = stage3_clips(data["pack"], SYNC_FRAMES, config, args.seed + SYNC_FRAMES, clips=data["clips"],
                           sync_sound="mfcc" if mfcc else "mel")
    windows = load(windows, args.batch // SYNC_FRAMES, (start + 1) // 2)               # even steps before start
    singles = stage3_clips(data["pack"], 1, config, args.seed + 1, clips=data["clips"])
    size = args.batch // 2 if with_photos else args.batch
    first_step = start // 2 if with_sync else start                                    # odd steps before start, or all
    singles = load(singles, size, first_step)
    if with_photos:
        photos = copy.copy(data["photos"])
        photos.change = functools.partial(move_photo, data["landmarks"][1], load_landmarks().solid.double().numpy())
        photos = load(photos, size, first_step)
        singles = (clips | dict(photo=images["image"], photo_driving=images["changed"])
                   for clips, images in zip(singles, photos))
    for step in itertools.count(start):
        yield next(windows if with_sync and step % 2 == 0 else singles)


def move_photo(landmarks, mean, photo, c, k, rng):
    """Frame k of clip c, uint8 (H, W, 3) -> the same with a random motion of head and eyelids, or unchanged without
    usable landmarks. mean: see Warp. Ours: people in clips turn little and blink seldom, so the generator learns turned
    heads and shut eyes from photos."""
    try:
        warp = Warp.of(photo, landmarks.clip(c)[k], mean)
    except (ValueError, IndexError):                                                   # no face; landmarks unfinished
        return photo
    frame = warp(**random_motion(rng, warp.head.turn_limits)[0])
    return crop_face(frame, (0, 0, *frame.shape[1::-1]), len(photo))


def stage3_clips(pack, T, config, seed, **options):
    """Dataset of windows with T frames to decode"""
    extra = 0 if config.motion == "direct" else config.context  # driving frames on each side of the decoded frames
    return Clips(pack, T + 2 * extra, seed, context=config.context - extra, voice_norm=config.voice_norm, **options)


# -------------------------------------------------------------------------------------------------------- networks

def build_networks(args, data, checkpoint, device):
    """-> model, D, and the state dicts of all other networks in the checkpoint or in that of the previous stage"""
    files, overrides, previous, encoder = {}, {}, None, args.encoder
    if not checkpoint:
        if args.part == "encoder" and not encoder and args.w["arcface"] and Config.at(args.size).encoder == "psp":
            encoder = fetch("arcface", args.path.get("arcface"))                       # initialises pSp's trunk
        overrides, files = load_published(args.size, args.generator, encoder, args.hyper)
        previous = load_previous(args, files)
    config = Config(**checkpoint["config"]) if checkpoint else make_config(args, data["pack"], previous, overrides)
    if "encoder" in files and files["encoder"].latent_avg.shape[1] != config.dim:
        raise InputError(f"{encoder}: the width of its codes is not the generator's {config.dim}")
    if config.mouth_dim and not data["landmarks"]:
        hint = "real faces need landmarks, for each pack: python keypoints.py extract PACK"
        if args.stage > 1:
            raise InputError(hint)
        print(f"from stage 2 on {hint}")
    model = FCTFG(config, generator_only=args.stage == 1).to(device)
    D = Discriminator(args.size, config.base, config.cap).to(device)
    states = dict((checkpoint or previous or {}).get("networks", {}))
    model_state = states.pop("model", {})
    if not checkpoint:
        model_state = previous["ema"]["model"] if previous else {}
        if "motion" not in states:                                                     # previous is not of stage 3
            trained = ("generator.", "encoder.", "maps.", "hyper.", "mouth.", "motion.mouth_up.")
            trained += ("motion.pose_up.",) if model.pose else ()                          # directions of fit_coarse_rgb
            model_state = {k: v for k, v in model_state.items() if k.startswith(trained)}
        states |= {name: network.state_dict() for name, network in files.items()}
        model_state |= {f"{name}.{k}": v for name in files for k, v in states[name].items()}
    model.load_state_dict(model_state, strict=bool(checkpoint))
    if "D" in states:                                                                  # a new stage: also feature_net
        D.load_state_dict(states.pop("D") if checkpoint else states["D"])
    return model, D, states


def load_previous(args, files) -> dict | None:
    """Checkpoint of the previous stage, from --init or --out. None: stage 1, or published `files` replace it"""
    needs_encoder = args.stage == 3 or args.part == "hyper"
    replaced = "generator" in files and ("encoder" in files or not needs_encoder)
    if args.stage == 1 or replaced and not args.init:
        return None
    names, kinds = (["stage2.pt"], ("stage2", "weights")) if needs_encoder else (["stage1.pt"], "stage1")
    names = ["stage2_hyper.pt", *names] if args.stage == 3 else names
    kinds = "weights" if args.part == "lips" else kinds
    paths = [args.init] if args.init else [os.path.join(args.out, name) for name in names]
    if not any(map(os.path.exists, paths)):
        hint = "" if args.init else f"; train --stage {2 if needs_encoder else 1} first, or give a checkpoint with --init"
        raise InputError(f"{paths[-1]}: no such file{hint}")
    path = max(filter(os.path.exists, paths), key=os.path.getmtime)                    # the hypernetwork may be outdated
    previous = load_checkpoint(path, kinds)
    if previous["kind"] == "weights":                                                  # of stage 3, without D and judges
        config = Config(**previous["config"])
        if args.part == "lips" and not config.mouth_dim:
            raise InputError(f"{path}: has no mouth code, --part lips trains networks of real faces")
        if config.motion != args.motion:
            raise InputError(f"{path}: its motion encoder is --motion {config.motion}")
        if (config.size, args.size) == (64, 128) and args.part != "lips":
            large = enlarge_network(load_model(path))
            previous |= dict(config=vars(large.config), networks=dict(model=large.state_dict()))
        previous["ema"] = previous["networks"]
        previous["networks"] = dict(motion=None)                                       # mark for build_networks
    if previous["config"]["size"] != args.size:
        raise InputError(f"{path}: a network of {previous['config']['size']} px, --size is {args.size}")
    print(f"starts from {path}")
    return previous


def make_config(args, pack, previous, overrides) -> Config:
    """Config of the dial, or of the previous stage, with the overrides for published files"""
    dial = Config.at(args.size, template=pack.template, motion=args.motion)
    config = Config(**previous["config"]) if previous else dial
    config = dataclasses.replace(config, template=pack.template, motion=args.motion, **overrides)
    if not config.map_code or config.encoder != "slim":                                # published networks
        config.coarse_rgb = 0
    if "hyper" not in overrides and (args.stage == 2 or not previous):
        config.hyper = dial.hyper if args.part == "hyper" else "none"
        config.hyper_width = dial.hyper_width
    if args.stage == 2:                                                                # stage 3 inherits these
        config.mouth_dim, config.shape_dim, config.audio_width = dial.mouth_dim, dial.shape_dim, dial.audio_width
        config.flow, config.pose_dim = dial.flow, dial.pose_dim
    elif args.stage == 3 and not previous:                                             # the mouth code needs stage 2
        config.mouth_dim = config.shape_dim = 0
    if not config.coarse_rgb:
        config.flow, config.pose_dim = 0, Config.pose_dim
    if args.stage == 3 and config.mouth_dim and config.motion == "paper":
        raise InputError("--motion paper has no mouth code, but stage 2 trained one: train stage 2 with --motion paper")
    return config


def load_judges(args, device) -> dict:
    """Frozen networks of the loss weights above 0: published networks, downloaded on first use, and the sync expert"""
    loaders = dict(
        sync=lambda: load_expert(args, device),
        vgg=lambda: judges.vgg19(device, args.path.get("vgg19")),
        lpips=lambda: judges.lpips(device, args.path.get("vgg16"), args.path.get("lpips_heads")),
        arcface=lambda: judges.arcface(
            device, args.path.get("arcface"), open_packs(args.data).template if args.data else "toy"))
    frozen = {}
    for name, load in loaders.items():
        try:
            if args.w.get(name):
                frozen[name] = load()
        except InputError as error:
            raise InputError(f"{error}; --w {name}=0 does without") from None
    return frozen


def load_expert(args, device):
    """Sync expert: --expert, else sync.pt in --out, else, with --data from 128 px on, Wav2Lip's"""
    path = args.expert or os.path.join(args.out, "sync.pt")
    if not args.expert and not os.path.exists(path):
        if not args.data or args.size < PAPERS_JUDGES:
            options = f" --size {args.size if args.data else min(args.size, 64)}"
            options += f" --data {' '.join(args.data)}" if args.data else ""
            raise InputError(f"{path}: no sync expert for stage 3; python syncnet.py train{options} --out {path} trains "
                             "one, --expert FILE names one")
        path = "wav2lip"
    if path == "syncnet_v2" or path.endswith(".model"):
        print("SyncNet v2 is the sync expert: LSE of evaluate.py uses it too, and is no independent measure of this run")
        return judges.syncnet_v2(device, None if path == "syncnet_v2" else path)
    return load_sync(path, device, args.size)


def small_judges(args, D, data, states, device) -> dict:
    """Frozen networks without a download. feature_net: discriminator of stage 1. judge: a small face recogniser"""
    frozen = {}
    if "feature_net" in states or "D" in states:
        frozen["feature_net"] = copy.deepcopy(D)
        frozen["feature_net"].load_state_dict(states.get("feature_net", states.get("D")))
    if "judge" in states:
        frozen["judge"] = judges.SmallFaceJudge().to(device)
        frozen["judge"].load_state_dict(states["judge"])
    elif args.w.get("id") and not args.w["arcface"]:
        frozen["judge"] = train_judge(data, device, args.seed, min(400, args.steps))
    return {name: freeze(network) for name, network in frozen.items()}


# ------------------------------------------------------------------------------------------------------ optimisers

def optimizers(model, D, args):
    """-> Adam of the trained parameters, at the rates of rate_shares, and Adam of D. Regularisation adds a step to every
    k-th one: rates are multiplied by c = k / (k + 1), and betas are raised to the power of c (StyleGAN2)."""
    groups = {}
    for name, parameter, share in choose_trained(model, rate_shares(args, model.config)):
        option = "lr_gan" if name.startswith("generator.") else "lr"                   # --resume may change rates
        groups.setdefault((option, share), []).append(parameter)
    model.eval()
    if args.stage == 2:                                                                # BatchNorm by batches, as in pSp
        (model.hyper if args.part == "hyper" else model.encoder).train()
    groups = [dict(params=q, lr=share * getattr(args, option)) for (option, share), q in groups.items()]
    # stage 1: path length, k = 4. Stages 2 and 3: beta1 of 0.9 is ours, because L1 terms lead
    beta1, c = (0.0, 4 / 5) if args.stage == 1 else (0.9, 1.0)
    opt_g = torch.optim.Adam(groups, betas=(beta1, 0.99 ** c), eps=1e-8)
    c = 16 / 17                                                                        # R1: k = 16
    opt_d = torch.optim.Adam(D.parameters(), args.lr_gan * c, betas=(0.0, 0.99 ** c), eps=1e-8)
    return opt_g, opt_d


def choose_trained(model, rates: dict):
    """rates: {prefix of parameter names: learning rate}, the longest prefix counts -> (name, parameter, rate) of each
    parameter with a rate above 0. Gradients of the others are disabled."""
    for name, parameter in model.named_parameters():
        rate = rates.get(max((p for p in rates if name.startswith(p)), key=len, default=None), 0.0)
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            yield name, parameter, rate


def rate_shares(args, config) -> dict:
    """{prefix of parameter names: share of --lr, or, for the generator, of --lr-gan}, see choose_trained"""
    if args.stage == 1:
        return {"generator": 4 / 5}                                                    # path length: k / (k + 1), k = 4
    small, stage3 = config.encoder == "slim", args.stage == 3                          # else 1e-4, as in pSp, HyperStyle
    if args.part == "hyper":
        return {"hyper": 1.0 if small else 0.1}
    trained_before = 0.2 if stage3 else 1.0                                            # codes drift slowly in stage 3
    encoder_share = trained_before if small else 0.1
    shares = {"generator": float(stage3 or args.size <= FINETUNE_GENERATOR), "generator.style": 0.0,  # z -> w: stage 1
              "encoder": encoder_share, "encoder.linear_down": 0.1,
              "maps": trained_before, "maps.down": 0.1, "mouth.linear": trained_before, "motion.mouth_up": 1.0}
    if stage3:
        shares |= {"hyper": encoder_share, "canonical": 0.2, "canonical.down": 0.1, "canonical.mlp.0": 0.1, "audio": 1.0,
                   "motion": 1.0, "motion.pose_down": 0.1, "motion.pose_up": 0.2}
    if config.coarse_rgb:                                                              # real faces: keep closed forms
        shares |= {"encoder": 0.1, "encoder.linear_": 0.0, "maps.down": 0.0, "maps.coarse_rgb": 0.0, "maps.flow": 0.01,
                   "encoder.linear_down": 0.0, "mouth.linear": 0.0, "motion.mouth_up": 0.0}
        shares |= {prefix: 0.01 for prefix in shares if prefix.startswith(("canonical", "motion.pose_"))}
    if config.mouth_dim and stage3:                                                    # already trained by train_lips
        shares |= {"audio": 0.1, "motion.fusion": 0.1, "motion.lips": 0.1}
    return shares


# ------------------------------------------------------------------- stage 2: encoder, lip reader and face judge

def train_regression(name, parameters, steps, lr, loss_of, decay=True) -> float:
    """Adam on loss_of(step) -> running mean of the loss. Shows progress, and prints an estimate of the minutes."""
    opt, mean, begin = torch.optim.Adam(parameters, lr), 0.0, time.perf_counter()
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / steps if decay else 1.0)
    for step in progress(range(steps), name):
        loss = loss_of(step)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        mean += max(0.02, 1 / (step + 1)) * (loss.item() - mean)
        if step + 1 == min(20, steps):
            minutes = (time.perf_counter() - begin) * steps / (60 * (step + 1))
            tqdm.write(f"{steps} steps of the {name}, {minutes:.1f} min")
    return mean


@torch.no_grad()
def fit_encoder(model, dataset, device, most=3000):
    """Set the encoder's mean w and its linear path (principal components of training images), and the coarse RGB."""
    model.encoder.latent_avg.copy_(estimate_mean_w(model.generator))
    if model.config.encoder != "slim":
        return
    coarse = model.config.coarse_rgb > 0
    n = max((8 if coarse else 2) * len(model.encoder.linear_down.weight), most)
    print(f"before the first step: principal components of {n} images" + ", coarse RGB in closed form" * coarse)
    images = torch.stack([dataset[i]["image"] for i in progress(range(n), "images")]).to(device)
    masked = mask_mouth(images, model.config.template, "lips") if model.mouth else images
    model.encoder.fit_linear(masked)
    if coarse:
        fit_coarse_rgb(model, masked, images)


@torch.no_grad()
def fit_coarse_rgb(model, masked, images, scale=0.1, ridge=0.02):
    """Fit linear path -> W+ -> coarse RGB to images (n, 3, H, W) in closed form, ours. masked: the images without lips.
    The mouth code is fitted to the part of the lips that the face around them does not predict. Both codes enter W+
    along orthogonal directions of length `scale`, so short that the generator hardly responds. For the lip shape, to
    which it must respond, they are 40 times longer. The pose gets directions as well, see fit_flow; that of the eyelids
    is 10 times longer. `maps.down` reads the codes back from W+. Coarse RGB is a ridge regression on the codes."""
    encoder, maps, edge = model.encoder, model.maps, model.config.coarse_rgb
    for layer in (*(head[-1] for head in encoder.heads), maps.coarse_rgb):             # the trunk starts at 0
        zero_init(layer)
    codes = encoder.linear_down(to_small_image(masked)).cpu()                          # (n, k), of unit variance
    generated, target = (F.adaptive_avg_pool2d(x, edge).cpu()                          # CPU: Apple's GPUs lack float64
                         for x in (model.decode(encoder.latent_avg[None]), images))
    code_mean, target_mean = codes.mean(0), target.mean(0)
    codes, residual = (codes - code_mean).double(), (target - target_mean).flatten(1).double()
    effect = ridge_regression(codes, residual, ridge).float()                          # (k, 3 * edge * edge)
    k, lengths = len(effect), torch.full((len(effect),), scale)
    if model.mouth:
        residual = (residual.float() - codes.float() @ effect).unflatten(1, (3, edge, edge))
        residual = (residual - mask_mouth(residual, model.config.template, "lips")).flatten(1)  # of the lips only
        crops = model.mouth.mouth_crop(images)                                         # (n, 3, 32, 32)
        shape = torch.cat([model.mouth.read(x) for x in crops.split(256)]).cpu()       # (n, K)
        pixels = crops.flatten(1).cpu()
        code_mean, shape = torch.cat([code_mean, shape.mean(0)]), shape - shape.mean(0)
        shape_effect = ridge_regression(shape, residual, ridge)                        # (K, 3 * edge * edge)
        appearance_dim = len(model.mouth.linear.weight)                                # M - K
        down, up = reduced_rank_regression(
            pixels - pixels.mean(0), residual - shape @ shape_effect, appearance_dim, ridge * pixels.var(0).mean())
        model.mouth.linear.weight.copy_(down)
        model.mouth.linear.bias.copy_(-down @ pixels.mean(0))
        effect, code_mean = torch.cat([effect, shape_effect, up.t()]), F.pad(code_mean, (0, appearance_dim))
        lengths = torch.cat([lengths, torch.full((len(shape_effect),), 40 * scale), torch.full((appearance_dim,), scale)])
    P = model.config.pose_dim if model.pose else 0                                     # of the pose: no effect so far
    effect, code_mean = torch.cat([effect, effect.new_zeros(P, effect.shape[1])]), F.pad(code_mean, (0, P))
    lengths = torch.cat([lengths, scale * torch.tensor([1.0] * (P - 1) + [10.0] * (P > 0))])
    directions = lengths * torch.linalg.qr(torch.randn(encoder.latent_avg.numel(), len(effect)))[0]
    encoder.linear_up.weight.copy_(directions[:, :k])                                  # (L * D, k)
    if model.mouth:
        model.motion.mouth_up.weight.copy_(directions[:, k:k + model.config.mouth_dim])
    if model.pose:
        model.motion.pose_up.weight.copy_(directions[:, -P:])
    inverse, n = (directions / lengths.square()).t(), len(effect)
    maps.down.weight[:n] = inverse
    maps.down.bias[:n] = -inverse @ encoder.latent_avg.flatten().cpu() - code_mean
    maps.coarse_rgb.weight[:, :n] = effect.t()
    maps.coarse_rgb.bias.copy_((target_mean - generated[0]).flatten())


def mouth_features(points: np.ndarray) -> np.ndarray:
    """Landmarks (n, 68, 2) of upright heads -> (n, 42), in their unit: opening of the lips, distance from nose to chin,
    and the 20 points of the mouth relative to their mean, averaged with their mirror image."""
    mouth = points[:, 48:68] - points[:, 48:68].mean(1, keepdims=True)                 # (n, 20, 2)
    mouth = (mouth + mouth[:, np.array(MIRROR[48:]) - 48] * (-1, 1)) / 2
    jaw = points[:, 8, 1] - points[:, 33, 1]
    return np.concatenate([lip_opening(points)[:, None], jaw[:, None], mouth.reshape(len(mouth), -1)], 1)


def train_reader(model, data, device, seed, steps, batch=128, clips=400, per_clip=30):
    """Train the MouthEncoder to read the shape of the lips, ours. Targets are linear functions of landmarks of clips and
    photos. The first is the opening. The K - 1 others are principal components of the mouth's motion within a clip,
    without the part linear in the opening. Each has zero mean over the clips and unit deviation within a clip."""
    rng, K = np.random.default_rng([seed, 4]), model.config.shape_dim
    clip_landmarks, *photo_landmarks = data["landmarks"]
    boxes, features = [], []

    def add_frames(pack, landmarks, c, frames):
        boxes.append(model.mouth.mouth_crop(to_tensor(pack.frames(c, frames)), margin=0.125).to(torch.float16))
        features.append(mouth_features(landmarks.clip(c)[frames] / pack.size))

    for c in progress(rng.permutation(data["clips_with_landmarks"])[:clips], "mouths"):
        add_frames(data["pack"], clip_landmarks, c, np.sort(rng.permutation(data["pack"].n_frames[c])[:per_clip]))
    clip_features, n_frames = np.concatenate(features), sum(map(len, features))        # (n_frames, 42)
    deviation = np.concatenate([x - x.mean(0) for x in features])
    slope = deviation[:, 0] @ deviation[:, 1:] / (deviation[:, 0] @ deviation[:, 0])   # motion with the opening
    residual = deviation[:, 1:] - deviation[:, :1] * slope
    directions = np.linalg.eigh(residual.T @ residual)[1][:, :-K:-1]                   # (41, K - 1), largest first

    def to_shape(x):  # (n, 42) -> (n, K)
        return np.concatenate([x[:, :1], (x[:, 1:] - x[:, :1] * slope) @ directions], 1)

    mean, std = to_shape(clip_features).mean(0), to_shape(deviation).std(0)
    for landmarks in photo_landmarks:
        for c in rng.permutation(np.intersect1d(data["photos"].order, landmarks.usable_clips))[:n_frames]:
            add_frames(data["photos"].pack, landmarks, c, np.arange(1))
    boxes, target = torch.cat(boxes), (to_shape(np.concatenate(features)) - mean) / std
    target = torch.from_numpy(target).float().clamp(-8, 8).to(device)                  # landmarks have outliers
    weight = 1 / target.var(0)

    def loss_of(step):
        i = torch.randint(n_frames, (batch // 2,))                                     # half clips, half photos
        i = torch.cat([i, torch.randint(n_frames, len(boxes), (batch // 2,)) if len(boxes) > n_frames else i])
        down, right = (int(v) for v in torch.randint(boxes.shape[-1] - 31, (2,)))
        x = boxes[i][..., down:down + 32, right:right + 32].to(device, torch.float32)
        x = x.flip(-1) if step % 2 else x                                              # shapes are symmetric
        if step % 4 > 1:                                                               # generated images are soft
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        return ((model.mouth.read(x) - target[i.to(device)]).square() * weight).mean()

    model.mouth.reader.requires_grad_(True)
    error = train_regression(f"lip reader, {len(boxes)} mouths", model.mouth.reader.parameters(), steps, 1e-3, loss_of)
    print(f"lip reader: explains {100 * (1 - error):.0f} % of the variance of the lip shape")


def train_judge(data, device, seed, steps, batch=48):
    """Train a small face recogniser on two frames of each clip. Negative pairs are of different people, or of different
    clips if all show one person. With photos: on two augmented views of each, one with masked lips, which vary."""
    photos, label = data["photos"], "identity"
    if photos is None and data["pack"].n_frames[data["clips"]].max() == 1:             # a pack of photos alone
        photos = Frames(data["pack"], seed + 1, data["clips"])
    dataset = photos or Clips(data["pack"], T=1, seed=seed + 1, clips=data["clips"])
    if photos is None and len(np.unique(dataset.pack.identity[dataset.clips])) == 1:
        label = "clip"
    if len(photos.people if photos else dataset.clips) < 2:
        raise InputError(f"{dataset.pack.folder}: one person is too few for the face judge; --w id=0 does without it")
    torch.manual_seed(seed)
    judge, augment = judges.SmallFaceJudge().to(device), Augment(p=0.5)
    batch = 2 * batch if photos else batch
    stream = batches(dataset, batch, 0)

    def loss_of(step):
        item = next(stream)
        if photos:
            views = map(augment, (item["image"], mask_mouth(item["image"], photos.pack.template, "lips")))
        else:
            views = item["source"], item["driving"][:, 0]                              # two frames of each clip
        # ours: brightness varies a little, so that the judge does not rely on exact colours
        a, b = (x.to(device) * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1, device=device)) for x in views)
        return judges.same_person_loss(judge(a), judge(b), item[label].to(device), judge.log_scale, judge.bias)

    train_regression("small face judge", judge.parameters(), steps, 2e-3, loss_of, decay=False)
    return judge


# ------------------------------------------------------------------------------------------------- stage 3: motion

@torch.no_grad()
def fit_motion_space(model, pack, chosen, device, photos=None, clips=300, per_clip=16, ridge=0.02):
    """Fit canonical encoder and pose path in closed form, ours. The motion of a frame is its code minus the mean of its
    clip. A linear map that predicts the motion from one code, over many people, cannot use directions in which people
    differ. The canonical encoder subtracts this prediction. The pose path is the same map from the mouth-masked code."""
    rng = np.random.default_rng(2)
    chosen = rng.permutation(chosen)[:clips]
    print(f"before the first step: motion space in closed form from {len(chosen)} clips" + ", and photos" * bool(photos))
    z, z_masked, motions = [], [], []                                                  # of each clip (n, L, D)

    def add_images(x, moving):  # (n, 3, H, W)
        z.append(model.encode_source(x.to(device)))
        z_masked.append(model.encode_driving(x[None].to(device))[0])
        motions.append(moving * (z[-1] - z[-1].mean(0)))

    for c in progress(chosen, "motion space"):
        length = int(pack.n_frames[c])
        add_images(to_tensor(pack.frames(c, np.sort(rng.choice(length, min(per_clip, length), replace=False)))), 1)
    if photos:                                                                         # faces at rest
        for i in range(0, clips * per_clip // 2, 64):
            add_images(torch.stack([photos[k]["image"] for k in range(i, i + 64)]), 0)
    z, z_masked, motions = torch.cat(z), torch.cat(z_masked), torch.cat(motions).flatten(1)  # (n, L * D)
    canonical, motion = model.canonical, model.motion
    canonical.whiten.fit(z)
    motion.whiten.fit(z_masked)
    down, up = reduced_rank_regression(canonical.whiten(z), -motions, len(canonical.down.weight), ridge)
    canonical.down.weight.copy_(down)
    canonical.up.weight.copy_(up)
    if model.config.motion == "direct":
        down, up = reduced_rank_regression(motion.whiten(z_masked), motions, model.config.pose_dim, ridge)
        motion.pose_down.weight.copy_(down)
        motion.pose_down.bias.zero_()
        motion.pose_up.weight.copy_(up)


@torch.no_grad()
def fit_pose_codes(model, data, device, seed, clips=600, per_clip=20):
    """Set PoseReader and the whitening of codes -> training frames, uint8 (n, H, W, 3), their pose codes (n, P), and for
    each the range (begin, end) of frames of its clip. Photos are clips of one frame."""
    rng, images, ranges, n = np.random.default_rng([seed, 6]), [], [], 0
    chosen = [(data["pack"], rng.permutation(np.unique(data["clips"]))[:clips])]
    if data["photos"]:
        chosen.append((data["photos"].pack, data["photos"].order[:clips * per_clip]))
    for pack, some in chosen:
        for c in progress(some, "poses"):
            images.append(pack.frames(c, np.sort(rng.permutation(pack.n_frames[c])[:per_clip])))
            ranges += [(n, n + len(images[-1]))] * len(images[-1])
            n += len(images[-1])
    images, reader = np.concatenate(images), model.pose
    batches = np.array_split(images, 1 + n // 256)
    poses = torch.cat([reader.read(to_tensor(x).to(device)) for x in progress(batches, "poses")])
    reader.mean.copy_(poses.median(0).values)
    reader.mean[[0, 2, 3]] = torch.tensor([0.0, 0.0, 0.5], device=device)              # of faces and mirror images
    reader.std.copy_(poses.std(0).clamp_min(1e-3))
    model.canonical.whiten.fit(torch.cat([model.encode_source(to_tensor(x[::8]).to(device)) for x in batches]))
    return images, (poses - reader.mean) / reader.std, np.array(ranges)


def similarity_flow(reader, f: int):
    """Flow (P, 2, f, f) of a unit of each number of the pose code, for f x f nodes: exact for roll, place and size"""
    flow, t = reader.mean.new_zeros(len(reader.mean), 2, f, f), torch.linspace(1 / f - 1, 1 - 1 / f, f).to(reader.mean)
    middle, (roll, right, down, size) = 2 * reader.mean[3:5] - 1, reader.std[2:6]      # of the head; half edges
    x, y = (t - middle[0]).expand(f, f), (t - middle[1])[:, None].expand(f, f)
    flow[2] = torch.deg2rad(roll) * torch.stack([y, -x])                               # a frame reads the face at rest
    flow[3, 0], flow[4, 1] = -2 * right, -2 * down
    flow[5] = -size / reader.mean[5] * torch.stack([x, y])
    return flow


def fit_flow(model, data, device, seed, steps, batch=64):
    """Fit the flow that moves a face with its pose, ours: a face in one pose, moved by the flow of the difference of two
    poses, should equal the face in the other pose. Pairs are two frames of a clip, or a photo and its mirror image. The
    flow is linear in the pose and the same for all people. It starts from similarity_flow and is smooth: half of the
    nodes of an edge, except for the eyelids, the last number, which slide over the eyes."""
    images, codes, ranges = fit_pose_codes(model, data, device, seed)
    rng, maps, edge = np.random.default_rng([seed, 7]), model.maps, model.maps.edge
    is_photo = ranges[:, 1] - ranges[:, 0] == 1
    eyes_shut = (codes[:, -1] < -2).cpu().numpy() & ~is_photo                          # rare, drawn more often
    groups = [np.flatnonzero(group) for group in (is_photo, ~is_photo, eyes_shut) if group.any()]
    f = model.config.flow
    head = similarity_flow(model.pose, f // 2).requires_grad_(True)
    lids = torch.zeros(1, 2, f, f, device=device, requires_grad=True)
    sign = torch.tensor([-1, 1, -1, -1, 1, 1, 1], device=device)                       # of the code of a mirror image

    def draw(i, flip):  # -> coarse images (N, 3, h, h), pose codes (N, P)
        x, flip = to_tensor(images[i]).to(device), torch.as_tensor(flip, device=device)[:, None]
        x = F.adaptive_avg_pool2d(torch.where(flip[..., None, None], x.flip(-1), x), edge)
        return x, torch.where(flip, sign * codes[i], codes[i])

    def flow():  # (P, 2 f f)
        return torch.cat([F.interpolate(head[:-1], (f, f), mode="bilinear"), lids]).flatten(1)

    def loss_of(step):
        j = np.concatenate([rng.choice(group, batch // len(groups)) for group in groups])
        i, flip = rng.integers(*ranges[j].T), rng.random(len(j)) < 0.5
        (x, code), (y, target) = draw(i, flip ^ is_photo[j]), draw(j, flip)
        moved = move_pixels(x, enlarge_flow((target - code) @ flow(), edge))
        return reconstruction_loss(moved, y, ((TEMPLATES[model.config.template].eyes, 3.0),))

    error = train_regression("flow of the pose", [head, lids], steps, 5e-3, loss_of)
    print(f"flow of the pose: error {error:.3f}")
    read_pose_code = maps.down.weight.data @ model.motion.pose_up.weight.data          # (map_code, P)
    maps.flow.weight.data += (read_pose_code @ flow().data).t()


def train_lips(model, data, args, device, most=4000, batch=12, span=16):
    """Train sound -> shape of the lips, before any image is generated. A step costs a tenth of one through the generator.
    A batch holds spans of `span` frames: neighbours share their sound windows."""
    pack, landmarks = data["pack"], data["landmarks"][0]
    steps = args.steps if args.part == "lips" else min(LIP_STEPS, args.steps)
    rng, reach = np.random.default_rng([args.seed, 3]), model.config.context
    clips = data["clips_with_landmarks"]                                               # with repeats if --by-person
    clips = clips[pack.n_frames[clips] >= span]
    held_out = np.intersect1d([c for c in data["held_out"] if pack.n_frames[c] >= span], landmarks.usable_clips)[:50]
    if not len(clips):
        raise InputError(f"{pack.folder}: no clip has the {span} frames that the regression of lips on sound needs")
    chosen = rng.permutation(np.unique(clips))[:most]
    # items: n training clips, then held-out clips up to n_speech, then items without speech
    n, index = len(chosen), {c: i for i, c in enumerate(chosen)}
    train_items = [index[c] for c in clips if c in index]
    chosen = [*chosen, *held_out.astype(int)]
    shapes, n_speech = lip_targets(model, pack, landmarks, chosen, device), len(chosen)  # (T, K) each
    train = torch.cat(shapes[:n])
    variance, shut = train.var(0).clamp_min(1e-3), train[train[:, 0] <= train[:, 0].quantile(0.05)].mean(0)
    shapes += [shut.expand(5 * span, -1)] * 199                                        # without speech; ours: 199
    weight = 1 / variance
    weight[0] *= 5                                                                     # ours: the opening shows most
    weight = weight / (weight @ variance)                                              # the mean shape has loss 1

    @functools.cache
    def load_mel(i, noisy):  # the sounds without speech do not depend on the number of clips
        draw = np.random.default_rng([args.seed, 5, i if i < n_speech else i - n_speech + 1])
        wav = pack.sound(chosen[i]) if i < n_speech else make_non_speech(5 * span * SAMPLES_PER_FRAME, draw)
        return log_mel(add_echo_and_noise(wav, draw) if noisy else wav, model.config.voice_norm)

    def take_span(i, first=None):
        """Item i from frame `first` on -> sound windows (span + 2 reach, 1, 80, 16), lip shapes (span, K). None: from a
        random frame, augmented, and sometimes an item without speech instead"""
        augment = first is None
        if augment and rng.random() < NO_SPEECH:
            i = int(rng.integers(n_speech, len(shapes)))
        first = int(rng.integers(len(shapes[i]) - span + 1)) if augment else first
        mel = load_mel(i, augment and i < n_speech and rng.random() < NOISY)
        mel = spec_augment(mel, rng, steps=8) if augment else mel
        return mel_windows(mel, np.arange(first - reach, first + span + reach)), shapes[i][first:first + span]

    def predict_errors(spans):
        sound, targets = zip(*[take_span(*item) for item in spans])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            z_a = model.encode_sound(torch.from_numpy(np.stack(sound)).to(device))
            predicted = model.motion.predict_lip_shape(z_a, reach)                     # (B, span, K)
        return weight.sqrt() * (predicted.float() - torch.stack(targets))

    def loss_of(step):
        error = predict_errors([(i, None) for i in rng.choice(train_items, batch)])
        return error.square().sum(-1).mean() + LIP_VELOCITY * error.diff(dim=1).square().sum(-1).mean()

    parameters = itertools.chain(*(m.parameters() for m in (model.audio, model.motion.fusion, model.motion.lips)))
    held_out_spans = [(i, k) for i in range(n, n_speech) for k in range(0, len(shapes[i]) - span + 1, span)]

    @torch.no_grad()
    def explained():
        error = predict_errors(held_out_spans).square().sum(-1).mean() if held_out_spans else np.nan
        return f"{100 * (1 - error):.0f} %"

    before = explained()
    train_regression(f"regression of lips on sound, {n} clips", parameters, steps, 1e-3, loss_of)
    print(f"lips from sound: variance explained in {len(held_out)} held-out clips: {before} -> {explained()}")
    for q in model.motion.lips[-1].parameters():
        q.data.mul_(LIP_GAIN)


@torch.no_grad()
def read_lips(model, pack, landmarks, clips):
    """Yields for each clip its landmarks (T, 68, 2), and its lip shapes (T, K) as read by the MouthEncoder"""
    for c in progress(clips, "reading lips"):
        images = to_tensor(pack.frames(c, range(pack.n_frames[c]))).to(model.motion.moves.device)
        yield landmarks.clip(c), model.mouth(images)[:, :model.config.shape_dim]


@torch.no_grad()
def lip_targets(model, pack, landmarks, clips, device) -> list:
    """Clips -> list of lip shapes (T, K) of their frames: the opening by landmarks, and the linear functions of landmarks
    that best fit the other numbers of the MouthEncoder. Its own readings are less exact for a single person."""
    solid, features, readings = load_landmarks().solid.double().numpy(), [], []
    for points, reading in read_lips(model, pack, landmarks, clips):
        features.append(torch.from_numpy(mouth_features(remove_head_motion(points, solid))).float().to(device))  # (T, 42)
        readings.append(reading)
    x, y = (torch.cat([v - v.mean(0) for v in values]).cpu().double() for values in (features, readings))
    std = x.std(0).clamp_min(1e-6)                                                     # mirrored points: some are 0
    linear = (ridge_regression(x / std, y, 0.01) / std[:, None]).float().to(device)
    # the opening comes from landmarks alone, with the deviation and mean of the readings
    linear[:, 0] = 0
    linear[0, 0] = y[:, 0].std() / std[0]
    offset = torch.cat(readings)[:, 0].mean() - linear[0, 0] * torch.cat(features)[:, 0].mean()
    shapes = [x @ linear for x in features]
    shapes = [torch.cat([s[:, :1] + offset, s[:, 1:] - s[:, 1:].mean(0)], 1) for s in shapes]
    return equalise_openings(shapes, pack.identity[clips])


def equalise_openings(shapes: list, people) -> list:
    """Lip shapes (T, K) of clips, person of each clip -> shapes with the same rest (5th percentile) and deviation of the
    opening for all people. How far a person opens the mouth is not in the sound; a regression would guess it by voice."""
    openings = {p: torch.cat([s[:, 0] for s, q in zip(shapes, people) if q == p]) for p in np.unique(people)}
    rest = {p: opening.quantile(0.05) for p, opening in openings.items()}
    mean_rest = torch.stack(list(rest.values())).mean()
    mean_std, equal = torch.stack([opening.std() for opening in openings.values()]).mean(), []
    for shape, p in zip(shapes, people):
        gain = (mean_std / openings[p].std()).clamp(0.5, 2)
        equal.append(torch.cat([mean_rest + gain * (shape[:, :1] - rest[p]), gain * shape[:, 1:]], 1))
    return equal


@torch.no_grad()
def fit_warp(model, data, clips=200):
    """Set motion.moves and motion.opening for warp.py by least squares over training clips, ours."""
    pack, landmarks, motion = data["pack"], data["landmarks"][0], model.motion
    solid, moving, predicted, openings = load_landmarks().solid.double().numpy(), [], [], []
    chosen = np.sort(np.random.default_rng(4).permutation(np.unique(data["clips_with_landmarks"]))[:clips])
    print(f"after the last step: landmarks' motion with the lips, least squares over {len(chosen)} clips")
    for c, (points, shape) in zip(chosen, read_lips(model, pack, landmarks, chosen)):
        points = points.astype(np.float64)
        moving.append((points, shape[:, 1:].cpu().numpy()))
        mel = torch.from_numpy(pack.windows(c, range(len(points)), model.config.voice_norm)).to(shape.device)
        predicted.append(model.predict_lip_shape(mel)[:, 0].cpu().numpy())
        opening = lip_opening(remove_head_motion(points, solid))
        is_mediapipe = landmarks.detectors[pack.locate(c)[0]] == "mediapipe"           # fit_opening expects dlib's
        openings.append(opening / OPENING_GAIN if is_mediapipe else opening)
    people = pack.identity[chosen]
    shut = {p: np.quantile(np.concatenate([o for o, q in zip(openings, people) if q == p]), 0.05) for p in people}
    openings = np.concatenate([opening - shut[p] for opening, p in zip(openings, people)])  # shut lips: 0
    slope, offset = fit_opening(np.concatenate(predicted), openings)
    if motion.moves.any():                                                             # loaded from --init
        set_lip_unit(motion, slope, offset)
    else:
        motion.moves.copy_(torch.from_numpy(fit_moves(moving, solid)))
        motion.opening.copy_(torch.tensor([slope, offset]))


def set_lip_unit(motion, slope: float, offset: float):
    """Scale the lips from sound so that motion.opening stays as it is: the generator was trained with its unit. slope,
    offset: from the opening that sound predicts to that of the landmarks"""
    unit, shift = motion.opening.tolist()
    for q in motion.lips[-1].parameters():
        q.data.mul_(slope / unit)
    motion.lips[-1].bias.data[0] += (offset - shift) / unit


def learn_moved_photos(model, data, device):
    """After stage 3, ours: regression of photos that warp.py moves, with known poses, eyelids and lips. In clips people
    turn little, blink seldom and nod while they speak: without this a nod opens the mouth, and eyes shut to a blur.
    Without --photos the first frames of clips are moved."""
    rng, size = np.random.default_rng(5), model.config.size
    parts = list(photos_in_motion(model, data, rng, device))
    if not parts:
        return print("no photo can be moved by its landmarks")
    photos, poses, blinks, opening, shape, images = map(np.concatenate, zip(*parts))
    template, weight = TEMPLATES[model.config.template], torch.ones(size, size, device=device)
    for box, more in ((template.eyes, 4), (template.lips, 2)):                         # small parts of the image
        weight[box_slices(box, size, size)] += more
    # Adam's first rates: 1e-3 of the size of equalised weights; closed forms drift slowly
    rates = {"generator": 1e-3, "generator.style": 0.0, "maps.flow": 5e-6, "maps.coarse_rgb": 5e-6, "maps.views": 1.5e-4,
             "motion.pose_up": 1e-4, "motion.mouth_up": 5e-5}
    groups = [dict(params=[parameter], lr=rate) for _, parameter, rate in choose_trained(model, rates)]

    def loss_of(step):
        i = rng.choice(len(images), 6)
        source = to_tensor(photos[i // (len(images) // len(photos))]).to(device)
        codes = model.moved_codes(source, Motion(poses[i], blinks[i], 0 * blinks[i]), opening[i], shape[i])
        codes = torch.cat([codes, model.invert(source[:2])])                           # and two photos as they are
        targets, made = torch.cat([to_tensor(images[i]).to(device), source[:2]]), model.decode(codes)
        # with the lips as the MouthEncoder reads them: L1 alone paints small openings
        lips, target_lips = (model.mouth(x[:6])[:, :model.config.shape_dim] for x in (made, targets))  # (6, K)
        return image_loss(weight * (made - targets)) + LIP_WEIGHT * mouth_cycle_loss(lips, target_lips)

    train_regression(f"faces in motion, {len(images)} images", groups, MOVED_STEPS, 1e-3, loss_of)
    model.requires_grad_(False)


def photos_in_motion(model, data, rng, device, frames: int = 5):
    """Photos in random poses with lips of training clips. Yields for each: photo, uint8 (1, S, S, 3), and of n = `frames`
    images poses (n, 6), blinks (n,), opening (n,), shape (n, K - 1) and the images, uint8 (n, S, S, 3)"""
    pack, landmarks = data["pack"], data["landmarks"][bool(data["photos"])]
    photos, clips = (data["photos"].pack, data["photos"].order) if data["photos"] else (pack, data["clips"])
    mean, moves = load_landmarks().solid.double().numpy(), model.lip_moves
    for c in progress(rng.permutation(np.intersect1d(clips, landmarks.usable_clips))[:MOVED_PHOTOS], "moving photos"):
        photo = photos.frame(c, 0)
        try:
            warp = Warp.of(photo, landmarks.clip(c)[0], mean, moves)
        except ValueError:                                                             # not an upright face
            continue
        spoken = rng.choice(data["clips"])
        mel = pack.windows(spoken, range(pack.n_frames[spoken]), model.config.voice_norm)
        some = rng.integers(len(mel), size=frames)
        opening, shape = (x[some] for x in model.predict_lips(torch.from_numpy(mel).to(device)))
        whole = (0, 0, *warp.face.photo.shape[1::-1])
        motion, images = random_faces(warp, photos.size, whole, opening, shape, rng)
        yield photo[None], motion.poses, motion.blinks, opening, shape, images


@torch.no_grad()
def collect_idle_motion(model, pack, chosen, device):
    """Set DirectMotion.idle: pose deviations from the first frame, of the calmest of 64 training clips"""
    if model.config.motion != "direct" or model.pose:
        return
    n, T, _ = model.motion.idle.shape
    deviations = []
    chosen = chosen[np.sort(np.unique(chosen, return_index=True)[1])]                  # --by-person repeats clips
    for c in chosen[pack.n_frames[chosen] >= T][:64]:
        pieces = to_tensor(pack.frames(c, range(T))).split(16)                         # bounded memory
        pose = torch.cat([model.motion.pose(model.encode_driving(x[None].to(device)))[0] for x in pieces])
        deviations.append(0.7 * (pose - pose[:1]))                                     # (T, P); ours: less than in clips
    deviations.sort(key=lambda deviation: float(deviation.mean(0).norm()))             # ours: calm ones first
    for i in range(n if deviations else 0):                                            # few clips repeat
        model.motion.idle[i] = deviations[i % len(deviations)]


# ---------------------------------------------------------------------------------------- least squares in float64

def ridge_regression(x, y, ridge):
    """x (n, i), y (n, o) -> weights (i, o), so that y ~ x @ weights"""
    n, i = x.shape
    gram = x @ x.t() if n < i else x.t() @ x                                           # the smaller of two equal ways
    gram = gram + ridge * n * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    return x.t() @ torch.linalg.solve(gram, y) if n < i else torch.linalg.solve(gram, x.t() @ y)


def reduced_rank_regression(x, y, rank, ridge):
    """x (n, i), y (n, o) -> down (rank, i), up (o, rank), so that y ~ x down^T up^T. x down^T has unit variance."""
    device, x, y = x.device, to_float64(x), to_float64(y)
    full = ridge_regression(x, y, ridge)                                               # (i, o)
    fitted = x @ full
    v = torch.linalg.eigh(fitted.t() @ fitted)[1][:, -rank:].flip(1)                   # (o, rank), largest first
    down = full @ v
    std = (x @ down).std(0).clamp_min(1e-6)
    return (down / std).t().float().to(device), (v * std).float().to(device)
