"""What happens before a stage's first step: its data, networks and optimisers, and a start by closed forms and short
regressions, so that minutes of a CPU suffice.

The start is ours: the paper trains long enough without it. `stage` is its order; fit_warp and collect_idle prepare a
network for sampling.
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
from faces import Landmarks, mask_mouth
from fusion import FCTFG, Config, estimate_mean_w, load_published
from landmarks import MIRROR, load_landmarks
from losses import SYNC_FRAMES, Augment
from media import SAMPLES_PER_FRAME, InputError, to_tensor
from motion import OPENING_GAIN, fit_moves, fit_opening, lip_opening, remove_head_motion
from stylegan2 import Discriminator
from syncnet import load_sync
from vision import to_float64, to_small_image, zero_init

PAPERS_JUDGES = 128  # px, from which VGG19, ArcFace and a published sync expert are the default
TOY_PEOPLE = 400   # of the toy world, one clip each, as syncnet.py's
PHOTO_SHARE = 0.75  # share of photos in stages 1 and 2: the clips show few people
FINETUNE_GENERATOR = 128  # px up to which stage 2 trains the generator on: minutes of stage 1 leave it half trained
LIP_STEPS = 4000   # of train_lips, at most: 11 minutes of one core; after 3000 others were followed as well
NO_SPEECH = 0.1    # share of its items that are silence, noise or music with shut lips
NOISY = 0.3        # share of the voices in a noisy room
LIP_GAIN = 1.25    # a regression on sound moves lips too little (it averages), and the generator paints less than it gets
bar = functools.partial(tqdm, leave=False, disable=None)


def stage(args, model, D, data, networks, device) -> dict:
    """What a stage starts with, once -> its frozen networks, see own_judges. networks: those of build_networks"""
    if args.stage == 1:
        return {}
    new = not args.resume
    if new and args.part == "encoder" and model.mouth:
        train_reader(model, data, device, args.seed, min(1500, args.steps))
    if new and args.part == "encoder" and "encoder" not in networks:
        fit_encoder(model, data["images"], device)
    if model.encoder.latent_avg.isnan().any():                                         # a published file without it
        model.encoder.latent_avg.copy_(estimate_mean_w(model.generator))
    frozen = own_judges(args, D, data, networks, device)
    if new and args.stage == 3 and "motion" not in networks:                           # --init is not a whole network
        fit_motion_space(model, data["pack"], data["clips"], device, data["photos"])
    if new and args.stage == 3 and model.mouth:
        train_lips(model, data, args, device)
    return frozen


# ------------------------------------------------------------------------------------------------------------ data

def load_data(args) -> dict:
    """pack and photos (or None); clips: numbers of the clips to train on; images: frames of these, and photos; landmarks:
    of pack and photos, or None; marked: clips that have some; held_out, held_out_photos: numbers of clips"""
    if args.data:
        pack = open_packs(args.data)
    else:
        from toyfaces import open_toy_pack  # drawn on first use
        pack = open_toy_pack(Path(args.out), args.size, TOY_PEOPLE, 3.0)
    if pack.size != args.size and args.part != "lips":
        raise InputError(f"{pack.folder}: images of {pack.size} px, --size is {args.size}")
    parts, packs = split(pack, args), [pack]
    data = dict(pack=pack, photos=None, clips=balance_people(pack, parts["train"], args), landmarks=None,
                held_out=np.union1d(parts["valid"], parts["test"]), images=Frames(pack, args.seed, clips=parts["train"]))
    if args.photos:
        photos = Pack(args.photos)
        check_same_format([pack, photos])
        parts = split(photos)
        data |= dict(held_out_photos=np.union1d(parts["valid"], parts["test"]),
                     photos=Frames(photos, args.seed + 1, clips=parts["train"]))
        data["images"] = Mixed(data["images"], data["photos"], PHOTO_SHARE, args.seed)
        packs.append(photos)
    if all((part.folder / "landmarks" / "clips.jsonl").exists() for p in packs for part in p.packs):
        data["landmarks"] = [Landmarks(p) for p in packs]
        data["marked"] = data["clips"][np.isin(data["clips"], data["landmarks"][0].usable_clips)]
    return data


def load_batches(args, data, config, mfcc: bool, start: int):
    """This process's batches from step `start` on. Stage 3: windows of five frames on even steps where there is a sync
    loss, else and on odd steps many clips of one frame; with a mouth code half of them are photos, if there are any"""
    def load(dataset, batch, first):
        return batches(dataset, max(1, batch) * args.accumulate, first, args.workers, RANK, WORLD_SIZE)

    if args.stage < 3:
        yield from load(data["images"], args.batch, start)
    windows = stage3_clips(data["pack"], SYNC_FRAMES, config, args.seed + SYNC_FRAMES, clips=data["clips"],
                           sync_sound="mfcc" if mfcc else "mel")
    singles = stage3_clips(data["pack"], 1, config, args.seed + 1, clips=data["clips"])
    turns, parts = 2 if args.w["sync"] else 1, 2 if args.photos and config.mouth_dim else 1
    windows = load(windows, args.batch // SYNC_FRAMES, (start + 1) // 2)
    singles = load(singles, args.batch // parts, start // turns)
    if parts == 2:
        photos = load(data["photos"], args.batch // 2, start // turns)
        singles = (clips | dict(photo=more["image"]) for clips, more in zip(singles, photos))
    for step in itertools.count(start):
        yield next(singles if (step + 1) % turns == 0 else windows)


def stage3_clips(pack, T, config, seed, **options):
    """Windows of which stage 3 decodes T frames"""
    extra = 0 if config.motion == "direct" else config.context  # driving frames on each side of the decoded ones
    return Clips(pack, T + 2 * extra, seed, context=config.context - extra, voice_norm=config.voice_norm, **options)


# -------------------------------------------------------------------------------------------------------- networks

def build_networks(args, data, ckpt, device):
    """-> model, D, and state dicts of the other networks of the checkpoint or of the stage before"""
    files, overrides, previous, encoder = {}, {}, None, args.encoder
    if not ckpt:
        if args.part == "encoder" and not encoder and args.w["arcface"] and Config.at(args.size).encoder == "psp":
            encoder = fetch("arcface", args.path.get("arcface"))                       # pSp starts from its trunk
        overrides, files = load_published(args.size, args.generator, encoder, args.hyper)
        previous = load_previous(args, files)
    config = Config(**ckpt["config"]) if ckpt else make_config(args, data["pack"], previous, overrides)
    if config.mouth_dim and not data["landmarks"]:
        text = "real faces need landmarks, for each pack: python keypoints.py extract PACK"
        if args.stage > 1:
            raise InputError(text)
        print(f"from stage 2 on {text}")
    model = FCTFG(config, generator_only=args.stage == 1).to(device)
    D = Discriminator(args.size, config.base, config.cap).to(device)
    known = dict((ckpt or previous or {}).get("networks", {}))
    state = known.pop("model", {})
    if not ckpt:
        learned = ("generator.", "encoder.", "maps.", "hyper.", "mouth.", "motion.mouth_up.")
        state = previous["ema"]["model"] if previous else {}
        state = {k: v for k, v in state.items() if "motion" in known or k.startswith(learned)}
        state |= {f"{name}.{k}": v for name, network in files.items() for k, v in network.state_dict().items()}
        known |= {name: network.state_dict() for name, network in files.items()}
    model.load_state_dict(state, strict=bool(ckpt))
    if "D" in known:
        D.load_state_dict(known.pop("D") if ckpt else known["D"])
    return model, D, known


def load_previous(args, files) -> dict | None:
    """Checkpoint of the stage before, where files of others do not replace it; from --init, else from --out"""
    encoder = args.stage == 3 or args.part == "hyper"                                  # whether this needs a trained one
    if args.stage == 1 or not args.init and {"generator", *["encoder"] * encoder} <= set(files):
        return None
    names = ["stage2_hyper.pt"] * (args.stage == 3) + ["stage2.pt"] if encoder else ["stage1.pt"]
    paths = [args.init] if args.init else [os.path.join(args.out, name) for name in names]
    path = next(filter(os.path.exists, paths), paths[-1])
    previous = load_checkpoint(path, "weights" if args.part == "lips" else ("stage2", "weights") if encoder else "stage1")
    if previous["kind"] == "weights":                                                  # of stage 3, without D and judges
        previous["ema"], previous["networks"] = previous["networks"], dict(motion=None)
    if previous["config"]["size"] != args.size:
        raise InputError(f"{path}: a network of {previous['config']['size']} px, --size is {args.size}")
    print(f"starts from {path}")
    return previous


def make_config(args, pack, previous, overrides) -> Config:
    """The dial's Config, or that of the stage before (`previous`), with published files' overrides"""
    dial = Config.at(args.size, template=pack.template, motion=args.motion)
    config = Config(**previous["config"]) if previous else dial
    config = dataclasses.replace(config, template=pack.template, motion=args.motion, **overrides)
    if not config.map_code or config.encoder != "slim":                                # published networks have none
        config.coarse_rgb = 0
    if "hyper" not in overrides and (args.stage == 2 or not previous):
        config.hyper, config.hyper_width = dial.hyper if args.part == "hyper" else "none", dial.hyper_width
    if args.stage == 2:                                                                # stage 3 inherits these
        config.mouth_dim, config.shape_dim, config.audio_width = dial.mouth_dim, dial.shape_dim, dial.audio_width
    elif args.stage == 3 and not previous:                                             # stage 2 would have learned it
        config.mouth_dim = config.shape_dim = 0
    if args.stage == 3 and config.mouth_dim and config.motion == "paper":
        raise InputError("--motion paper has no mouth code, but stage 2 trained one: train stage 2 with --motion paper")
    return config


def load_judges(args, device) -> dict:
    """The frozen networks that a loss weight asks for: published ones, fetched on first use, and stage 3's sync expert"""
    own, frozen = args.path, {}
    makers = dict(
        sync=lambda: sync_expert(args, device), vgg=lambda: judges.vgg19(device, own.get("vgg19")),
        lpips=lambda: judges.lpips(device, own.get("vgg16"), own.get("lpips_heads")),
        arcface=lambda: judges.arcface(
            device, own.get("arcface"), open_packs(args.data).template if args.data else "toy"))
    for name in [name for name in makers if args.w.get(name)]:
        try:
            frozen[name] = makers[name]()
        except InputError as error:
            raise InputError(f"{error}; --w {name}=0 does without") from None
    return frozen


def sync_expert(args, device):
    """--expert, else the trained one in --out, else, for own clips from 128 px on, Wav2Lip's"""
    path = args.expert or os.path.join(args.out, "sync.pt")
    if not args.expert and not os.path.exists(path):
        if not args.data or args.size < PAPERS_JUDGES:
            of = f" --data {' '.join(args.data)} --size {args.size}" if args.data else ""
            raise InputError(f"{path}: no sync expert for stage 3; python syncnet.py train{of} --out {path} trains one, "
                             "--expert FILE names one")
        path = "wav2lip"
    if path == "syncnet_v2" or path.endswith(".model"):
        print("SyncNet v2 is the judge: evaluate.py's LSE, computed by it, is no independent measure of this network")
        return judges.syncnet_v2(device, None if path == "syncnet_v2" else path)
    return load_sync(path, device, args.size)


def own_judges(args, D, data, networks, device) -> dict:
    """Frozen networks without a download: feature_net, stage 1's discriminator, and judge, a small recogniser"""
    frozen = {}
    if features := networks.get("feature_net", networks.get("D")):
        frozen["feature_net"] = copy.deepcopy(D)
        frozen["feature_net"].load_state_dict(features)
    if "judge" in networks:
        frozen["judge"] = judges.SmallFaceJudge().to(device)
        frozen["judge"].load_state_dict(networks["judge"])
    elif args.w.get("id") and not args.w["arcface"]:
        frozen["judge"] = train_judge(data, device, args.seed, min(400, args.steps))
    return {name: freeze(network) for name, network in frozen.items()}


# ------------------------------------------------------------------------------------------------------ optimisers

def optimizers(model, D, args):
    """Adam for the trained parts, rates from `rates`; D's betas and rate corrected for lazy R1 (StyleGAN2)"""
    table, groups = rates(args, model.config), {}
    for name, parameter in model.named_parameters():
        share = next((table[k] for k in sorted(table, key=len, reverse=True) if name.startswith(k)), 0.0)
        parameter.requires_grad_(share > 0)
        if share:                                                                      # groups do not depend on rates
            groups.setdefault(("lr_gan" if name.startswith("generator.") else "lr", share), []).append(parameter)
    model.eval()                                                                       # BatchNorm of published forms:
    if args.stage == 2:                                                                # batch statistics where their
        (model.hyper if args.part == "hyper" else model.encoder).train()               # authors trained with them
    groups = [dict(params=p, lr=share * getattr(args, option)) for (option, share), p in groups.items()]
    beta1, c = (0.0, 4 / 5) if args.stage == 1 else (0.9, 1.0)                         # lazy path length: k/(k+1), k = 4
    opt_g = torch.optim.Adam(groups, betas=(beta1, 0.99 ** c), eps=1e-8)               # ours: .9 where L1 leads
    c = 16 / 17                                                                        # lazy R1: k = 16
    opt_d = torch.optim.Adam(D.parameters(), args.lr_gan * c, betas=(0.0, 0.99 ** c), eps=1e-8)
    return opt_g, opt_d


def rates(args, config) -> dict:
    """{beginning of a parameter's name: share of --lr, of the generator's: --lr-gan}; the longest counts"""
    if args.stage == 1:
        return {"generator": 4 / 5}                                                    # lazy path length
    small, joint = config.encoder == "slim", args.stage == 3                           # else 1e-4: pSp's, HyperStyle's
    if args.part == "hyper":
        return {"hyper": 1.0 if small else 0.1}
    learned = 0.2 if joint else 1.0                                                    # in stage 2: codes drift slowly
    network = learned if small else 0.1
    table = {"generator": float(joint or args.size <= FINETUNE_GENERATOR), "generator.style": 0.0,  # z -> w: stage 1's
             "encoder": network, "encoder.linear_down": 0.1,
             "maps": learned, "maps.down": 0.1, "mouth.linear": learned, "motion.mouth_up": 1.0}
    if joint:
        table |= {"hyper": network, "canonical": 0.2, "canonical.down": 0.1, "canonical.mlp.0": 0.1, "audio": 1.0,
                  "motion": 1.0, "motion.pose_down": 0.1, "motion.pose_up": 0.2}
    if config.coarse_rgb:                                                              # closed forms: Adam would only
        table |= {"encoder": 0.1, "encoder.linear_": 0.0, "maps.down": 0.0, "maps.coarse_rgb": 0.0,  # disturb them
                  "encoder.linear_down": 0.0, "mouth.linear": 0.0, "motion.mouth_up": 0.0}
        table |= {k: 0.01 for k in table if k.startswith(("canonical", "motion.pose_"))}
    if config.mouth_dim and joint:                                                     # found by initialise.train_lips
        table |= {"audio": 0.1, "motion.fusion": 0.1, "motion.lips": 0.1}
    return table


# ------------------------------------------------------------------- stage 2: the encoder, and what reads the lips

def regress(name, parameters, steps, lr, loss_of, decay=True) -> float:
    """Adam on loss_of(step), with a progress bar and a line that says how long it takes -> running mean of the loss"""
    opt, mean, begin = torch.optim.Adam(parameters, lr), 0.0, time.perf_counter()
    for step in bar(range(steps), name):
        loss = loss_of(step)
        opt.param_groups[0]["lr"] = lr * (1 - step / steps) if decay else lr
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        mean += max(0.02, 1 / (step + 1)) * (loss.item() - mean)
        if step + 1 == min(20, steps):
            minutes = (time.perf_counter() - begin) * steps / (60 * (step + 1))
            tqdm.write(f"before the first step: {steps} steps of the {name}, {minutes:.1f} min")
    return mean


@torch.no_grad()
def fit_encoder(model, images, device, most=3000):
    """Mean w of the generator, and principal components of training images for the encoder's linear path."""
    model.encoder.latent_avg.copy_(estimate_mean_w(model.generator))
    if model.config.encoder == "slim":
        coarse = model.config.coarse_rgb
        n = max((8 if coarse else 2) * len(model.encoder.linear_down.weight), most)
        print(f"before the first step: principal components of {n} images" + ", coarse RGB in closed form" * bool(coarse))
        seen = torch.stack([images[i]["image"] for i in bar(range(n), "images")]).to(device)
        masked = mask_mouth(seen, model.config.template, "lips") if model.mouth else seen
        model.encoder.start_linear(masked)
        if coarse:
            fit_coarse_rgb(model, masked, seen)


@torch.no_grad()
def fit_coarse_rgb(model, masked, seen, scale=0.1, ridge=0.02):
    """images (n, 3, H, W), lips `masked` -> linear path -> W+ -> the coarse RGB of `seen`, in closed form, ours.

    The mouth code is fitted to the lips that the rest of the face does not predict. Both go into W+ in orthonormal
    directions, so short (`scale`) that the generator hardly responds; longer for the shape of lips, to which it must.
    `maps.down` reads them back; coarse RGB is a ridge regression on them."""
    encoder, maps, edge = model.encoder, model.maps, model.config.coarse_rgb
    for layer in (*(head[-1] for head in encoder.heads), maps.coarse_rgb):             # the trunk starts at zero
        zero_init(layer)
    codes = encoder.linear_down(to_small_image(masked)).cpu()                           # (n, k), of unit variance
    drawn, wanted = (F.adaptive_avg_pool2d(x, edge).cpu()                              # solved on the CPU: Apple's chips
                     for x in (model.decode(encoder.latent_avg[None]), seen))          # have no float64
    mean, centre = codes.mean(0), wanted.mean(0)
    codes, rest = (codes - mean).double(), (wanted - centre).flatten(1).double()
    effect = ridge_regression(codes, rest, ridge).float()                              # (k, 3 * edge * edge)
    k, length = len(effect), torch.full((len(effect),), scale)
    if model.mouth:
        rest = (rest.float() - codes.float() @ effect).unflatten(1, (3, edge, edge))
        rest = (rest - mask_mouth(rest, model.config.template, "lips")).flatten(1)     # of the lips alone
        box = model.mouth.mouth_crop(seen)
        shape, box = torch.cat([model.mouth.read(x) for x in box.split(256)]).cpu(), box.flatten(1).cpu()
        mean, shape = torch.cat([mean, shape.mean(0)]), shape - shape.mean(0)
        by_shape = ridge_regression(shape, rest, ridge)                                # (K, 3 * edge * edge)
        free = len(model.mouth.linear.weight)                                          # M - K: colour, teeth, a beard
        down, up = reduced_rank_regression(
            box - box.mean(0), rest - shape @ by_shape, free, ridge * box.var(0).mean())
        model.mouth.linear.weight.copy_(down)
        model.mouth.linear.bias.copy_(-down @ box.mean(0))
        effect, mean = torch.cat([effect, by_shape, up.t()]), F.pad(mean, (0, free))
        length = torch.cat([length, torch.full((len(by_shape),), 40 * scale), torch.full((free,), scale)])
    directions = length * torch.linalg.qr(torch.randn(encoder.latent_avg.numel(), len(effect)))[0]
    encoder.linear_up.weight.copy_(directions[:, :k])                                  # (L * D, k)
    if model.mouth:
        model.motion.mouth_up.weight.copy_(directions[:, k:])
    back, n = (directions / length.square()).t(), len(effect)
    maps.down.weight[:n] = back
    maps.down.bias[:n] = -back @ encoder.latent_avg.flatten().cpu() - mean
    maps.coarse_rgb.weight[:, :n] = effect.t()
    maps.coarse_rgb.bias.copy_((centre - drawn[0]).flatten())


def mouth_shape(points: np.ndarray) -> np.ndarray:
    """Landmarks (n, 68, 2) -> (n, 42): how far the lips are open, the distance from nose to chin, and the mouth's 20
    points about their middle, averaged with their mirror image, all in the landmarks' unit. Upright heads."""
    mouth = points[:, 48:68] - points[:, 48:68].mean(1, keepdims=True)                 # (n, 20, 2)
    mouth = (mouth + mouth[:, np.array(MIRROR[48:]) - 48] * (-1, 1)) / 2               # and the same in a mirror
    jaw = points[:, 8, 1] - points[:, 33, 1]
    return np.concatenate([lip_opening(points)[:, None], jaw[:, None], mouth.reshape(len(mouth), -1)], 1)


@torch.no_grad()
def read_clips(model, pack, landmarks, clips):
    """Yields of each clip its landmarks (T, 68, 2), and the shape of its lips as the MouthEncoder reads it, (T, K)"""
    for c in bar(clips, "reading lips"):
        images = to_tensor(pack.frames(c, range(pack.n_frames[c]))).to(model.motion.moves.device)
        yield landmarks.clip(c), model.mouth(images)[:, :model.config.shape_dim]


def train_reader(model, data, device, seed, steps, batch=128, clips=400, per_clip=30):
    """The MouthEncoder learns to read the shape of lips from clips and photos with landmarks, ours. Its first number is
    how far the lips are open. The others are principal components of what else moves while one person speaks, less what
    follows the opening. Each is in units of its deviation there, from its mean."""
    rng, K = np.random.default_rng([seed, 4]), model.config.shape_dim
    boxes, shapes = [], []
    of_clips, *of_photos = data["landmarks"]

    def collect(pack, landmarks, c, ks):
        boxes.append(model.mouth.mouth_crop(to_tensor(pack.frames(c, ks)), margin=0.125).to(torch.float16))
        shapes.append(mouth_shape(landmarks.clip(c)[ks] / pack.size))

    for c in bar(rng.permutation(data["marked"])[:clips], "mouths"):
        collect(data["pack"], of_clips, c, np.sort(rng.permutation(data["pack"].n_frames[c])[:per_clip]))
    shape, n_clips = np.concatenate(shapes), sum(map(len, shapes))                     # (n, 42)
    deviation = np.concatenate([s - s.mean(0) for s in shapes])                        # of one person, within a clip
    slope = deviation[:, 0] @ deviation[:, 1:] / (deviation[:, 0] @ deviation[:, 0])   # what follows the opening
    rest = deviation[:, 1:] - deviation[:, :1] * slope
    directions = np.linalg.eigh(rest.T @ rest)[1][:, :-K:-1]                           # (41, K - 1), largest first

    def numbers(shape):  # (n, 42) -> (n, K)
        return np.concatenate([shape[:, :1], (shape[:, 1:] - shape[:, :1] * slope) @ directions], 1)

    centre, std = numbers(shape).mean(0), numbers(deviation).std(0)
    for landmarks in of_photos:
        for c in rng.permutation(np.intersect1d(data["photos"].order, landmarks.usable_clips))[:n_clips]:
            collect(data["photos"].pack, landmarks, c, np.arange(1))
    boxes, target = torch.cat(boxes), (numbers(np.concatenate(shapes)) - centre) / std
    target = torch.from_numpy(target).float().clamp(-8, 8).to(device)                  # landmarks have outliers
    weight = 1 / target.cpu().var(0).to(device)

    def loss_of(step):
        half = torch.randint(n_clips, (batch // 2,))                                   # half clips, half photos
        i = torch.cat([half, torch.randint(n_clips, len(boxes), (batch // 2,)) if len(boxes) > n_clips else half])
        down, right = (int(v) for v in torch.randint(boxes.shape[-1] - 31, (2,)))
        x = boxes[i][..., down:down + 32, right:right + 32].to(device, torch.float32)
        x = x.flip(-1) if step % 2 else x                                              # shapes are symmetric
        if step % 4 > 1:                                                               # generated images are soft
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        return ((model.mouth.read(x) - target[i.to(device)]).square() * weight).mean()

    model.mouth.reader.requires_grad_(True)
    unread = regress(f"lip reader, {len(boxes)} mouths", model.mouth.reader.parameters(), steps, 1e-3, loss_of)
    print(f"lip reader: {100 * (1 - unread):.0f} % of the variance of landmarks' shape is read from pixels")


def train_judge(data, device, seed, steps, batch=48):
    """A small face recogniser: frames of one clip show one person, clips of other people (of one person: other clips)
    show others. With photos, two views of one: shifted, mirrored, and one without its mouth, which differs in clips."""
    photos, label = data["photos"], "identity"
    images = photos or Clips(data["pack"], T=1, seed=seed + 1, clips=data["clips"])
    if photos is None and len(np.unique(images.pack.identity[images.clips])) == 1:
        label = "clip"
    if len(photos.people if photos else images.clips) < 2:
        raise InputError(f"{images.pack.folder}: one person is too few for the face judge; --w id=0 does without it")
    torch.manual_seed(seed)
    judge, augment = judges.SmallFaceJudge().to(device), Augment(p=0.5)
    batch = 2 * batch if photos else batch
    stream = batches(images, batch, 0)

    def loss_of(step):
        item = next(stream)
        if photos is None:
            views = item["source"], item["driving"][:, 0]                              # two frames of each clip
        else:
            views = map(augment, (item["image"], mask_mouth(item["image"], photos.pack.template, "lips")))
        # ours: brightness varies a little, so that the judge does not rely on exact colours
        a, b = (x.to(device) * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1, device=device)) for x in views)
        return judges.same_person_loss(judge(a), judge(b), item[label].to(device), judge.log_scale, judge.bias)

    regress("small face judge", judge.parameters(), steps, 2e-3, loss_of, decay=False)
    return judge


# ------------------------------------------------------------------------------------------------- stage 3: motion

@torch.no_grad()
def fit_motion_space(model, pack, chosen, device, photos=None, clips=300, per_clip=16, ridge=0.02):
    """A closed-form start of canonical encoder and pose path, ours. A code minus its clip's mean is motion. A
    linear map that predicts it from one frame's code, over many people, can use no direction in which people
    differ. It gives the canonical encoder what to remove, by the mouth-masked image's code the pose."""
    rng = np.random.default_rng(2)
    chosen = rng.permutation(chosen)[:clips]
    print(f"before the first step: motion space in closed form from {len(chosen)} clips" + ", and photos" * bool(photos))
    z, z_masked, deviation = [], [], []                                                # of each clip (n, L, D)

    def add(x, moving):  # (n, 3, H, W)
        z.append(model.encode_source(x.to(device)))
        z_masked.append(model.encode_driving(x[None].to(device))[0])
        deviation.append(moving * (z[-1] - z[-1].mean(0)))

    for c in bar(chosen, "motion space"):
        length = int(pack.n_frames[c])
        add(to_tensor(pack.frames(c, np.sort(rng.choice(length, min(per_clip, length), replace=False)))), 1)
    for i in range(0, clips * per_clip // 2, 64) if photos else ():
        add(torch.stack([photos[k]["image"] for k in range(i, i + 64)]), 0)
    z, z_masked, deviation = torch.cat(z), torch.cat(z_masked), torch.cat(deviation).flatten(1)  # (n, L * D)
    model.set_statistics(z, z_masked)
    canonical, motion = model.canonical, model.motion
    down, up = reduced_rank_regression(canonical.whiten(z), -deviation, len(canonical.down.weight), ridge)
    canonical.down.weight.copy_(down)
    canonical.up.weight.copy_(up)
    if model.config.motion == "direct":
        down, up = reduced_rank_regression(motion.whiten(z_masked), deviation, model.config.pose_dim, ridge)
        motion.pose_down.weight.copy_(down)
        motion.pose_down.bias.zero_()
        motion.pose_up.weight.copy_(up)


def train_lips(model, data, args, device, most=2000, batch=12, span=16):
    """Sound -> shape of the lips, before any image is made; also the limits of the opening. A step costs a tenth of one
    through the generator. It takes `batch` stretches of `span` frames: neighbouring frames share their sound windows."""
    pack, landmarks, steps = data["pack"], data["landmarks"][0], min(LIP_STEPS, args.steps)
    rng, reach = np.random.default_rng([args.seed, 3]), model.config.context
    long = data["marked"][pack.n_frames[data["marked"]] >= span]                       # with --by-person clips come twice
    held_out = np.intersect1d([c for c in data["held_out"] if pack.n_frames[c] >= span], landmarks.usable_clips)[:50]
    if not len(long):
        raise InputError(f"{pack.folder}: no clip has the {span} frames that the regression of lips on sound needs")
    chosen = rng.permutation(np.unique(long))[:most]
    n, number = len(chosen), {c: i for i, c in enumerate(chosen)}
    drawn, chosen = [number[c] for c in long if c in number], [*chosen, *held_out.astype(int)]
    shapes = lip_shapes(model, pack, landmarks, chosen, device)                        # (T, K) each
    train = torch.cat(shapes[:n])
    openings, power = train[:, 0], train.var(0).clamp_min(1e-3)
    shut = train[openings <= openings.quantile(0.05)].mean(0)
    weight = 1 / power
    weight[0] *= 5                                                                     # ours: the opening shows most
    weight = weight / (weight @ power)                                                 # the mean shape has loss 1

    @functools.cache
    def mel(i, noisy):
        """Of a clip; for i < 0 of what is not speech"""
        draw = np.random.default_rng([args.seed, 5, abs(i)])
        wav = make_non_speech(5 * span * SAMPLES_PER_FRAME, draw) if i < 0 else pack.sound(chosen[i])
        return log_mel(add_echo_and_noise(wav, draw) if noisy else wav, model.config.voice_norm)

    def stretch(i, clean):
        """`span` frames of clip i, or of no speech -> windows of their sound and `reach` more, shape of their lips"""
        i = -rng.integers(1, 200) if not clean and rng.random() < NO_SPEECH else i
        target = shapes[i] if i >= 0 else shut.expand(5 * span, -1)                    # (T, K)
        k = int(rng.integers(len(target) - span + 1))
        sound = mel(i, not clean and i >= 0 and rng.random() < NOISY)
        sound = sound if clean else spec_augment(sound, rng)
        return mel_windows(sound, np.arange(k - reach, k + span + reach)), target[k:k + span]

    def loss_of(step, clips=None):
        clean, clips = clips is not None, rng.choice(drawn, batch) if clips is None else clips
        sound, targets = zip(*[stretch(i, clean) for i in clips])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            z_a = model.encode_sound(torch.from_numpy(np.stack(sound)).to(device))
            predicted = model.motion.predict_lip_shape(z_a, reach)                             # (B, span, K)
        return ((predicted.float() - torch.stack(targets)).square() * weight).sum(-1).mean()

    trained = [q for part in (model.audio, model.motion.fusion, model.motion.lips) for q in part.parameters()]
    missed, words = regress(f"regression of lips on sound, {n} clips", trained, steps, 1e-3, loss_of), ""
    if len(held_out):
        with torch.no_grad():
            words = f", {100 * (1 - loss_of(0, range(n, len(chosen)))):.0f} % in {len(held_out)} held-out clips"
    for q in model.motion.lips[-1].parameters():
        q.data.mul_(LIP_GAIN)
    model.motion.opening_limits.copy_(openings.quantile(torch.tensor([0.02, 0.9], device=device)))
    print(f"lips from sound: {100 * (1 - missed):.0f} % of the variance of their shape" + words)


@torch.no_grad()
def lip_shapes(model, pack, landmarks, clips, device) -> list:
    """Clips -> shape of the lips in their frames, [(T, K), ..]: the landmarks' opening, and those linear functions of the
    landmarks that are nearest to the MouthEncoder's other numbers, since it reads single people badly."""
    mean = load_landmarks().solid.double().numpy()
    found, read = zip(*read_clips(model, pack, landmarks, clips))
    points = [torch.from_numpy(mouth_shape(remove_head_motion(p, mean))).float().to(device) for p in found]  # (T, 42)
    x, y = (torch.cat([v - v.mean(0) for v in values]).cpu().double() for values in (points, read))
    std = x.std(0).clamp_min(1e-6)                                                     # some are 0: mirrored
    linear = (ridge_regression(x / std, y, 0.01) / std[:, None]).float().to(device)
    # the opening is the landmarks' alone, with the deviation and mean of the readings
    linear[:, 0] = 0
    linear[0, 0] = y[:, 0].std() / std[0]
    offset = torch.cat(read)[:, 0].mean() - linear[0, 0] * torch.cat(points)[:, 0].mean()
    shapes = [p @ linear for p in points]
    return equalise_openings([torch.cat([s[:, :1] + offset, s[:, 1:] - s[:, 1:].mean(0)], 1) for s in shapes],
                     pack.identity[clips])


def equalise_openings(shapes: list, people) -> list:
    """Shapes of clips (T, K) and their people's numbers -> the same with one rest (5th percentile) and deviation of the
    opening for everybody: sound does not tell how far a person opens the mouth; a regression would guess it by voice."""
    of = {p: torch.cat([s for s, q in zip(shapes, people) if q == p])[:, 0] for p in np.unique(people)}
    rest = {p: o.quantile(0.05) for p, o in of.items()}
    mean, std = torch.stack(list(rest.values())).mean(), torch.stack([o.std() for o in of.values()]).mean()
    gain = {p: (std / o.std()).clamp(0.5, 2) for p, o in of.items()}
    return [torch.cat([mean + gain[p] * (s[:, :1] - rest[p]), gain[p] * s[:, 1:]], 1) for s, p in zip(shapes, people)]


def fit_warp(model, data, clips=200):
    """For warp.py, least squares over training clips, ours: how landmarks move with the lips' numbers"""
    pack, landmarks, motion = data["pack"], data["landmarks"][0], model.motion
    mean, moving, predicted, real = load_landmarks().solid.double().numpy(), [], [], []
    chosen = np.sort(np.random.default_rng(4).permutation(np.unique(data["marked"]))[:clips])  # of all people
    print(f"after the last step: landmarks' motion with the lips, least squares over {len(chosen)} clips")
    for c, (points, shape) in zip(chosen, read_clips(model, pack, landmarks, chosen)):
        points = points.astype(np.float64)
        moving.append((points, shape[:, 1:].cpu().numpy()))
        mel = torch.from_numpy(pack.windows(c, range(len(points)), model.config.voice_norm)).to(shape.device)
        predicted.append(model.predict_lip_shape(mel)[:, 0].cpu().numpy())
        real.append(lip_opening(remove_head_motion(points, mean)))
        if landmarks.detectors[pack.locate(c)[0]] == "mediapipe":                        # fit_opening expects dlib's
            real[-1] /= OPENING_GAIN
    if not motion.moves.any():                                                         # --init may have them
        motion.moves.copy_(torch.from_numpy(fit_moves(moving, mean)))
    people = pack.identity[chosen]                                                     # shut lips of everybody are 0
    shut = {p: np.quantile(np.concatenate([r for r, q in zip(real, people) if q == p]), 0.05) for p in people}
    real = np.concatenate([r - shut[p] for r, p in zip(real, people)])
    motion.opening.copy_(torch.tensor(fit_opening(np.concatenate(predicted), real)))


@torch.no_grad()
def collect_idle(model, pack, chosen, device):
    """Fill DirectMotion.idle: pose deviations of the calmest of 64 training clips, from zero at their first frame"""
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


# ---------------------------------------------------------------------------------------- least squares in float64

def ridge_regression(x, y, ridge):
    """x (n, i), y (n, o) -> (i, o): y ~ x @ it"""
    n, i = x.shape
    gram = x @ x.t() if n < i else x.t() @ x                                           # the smaller of two equal ways
    gram = gram + ridge * n * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    return x.t() @ torch.linalg.solve(gram, y) if n < i else torch.linalg.solve(gram, x.t() @ y)


def reduced_rank_regression(x, y, rank, ridge):
    """x (n, i), y (n, o) -> down (rank, i), up (o, rank): y ~ x down^T up^T, with numbers of unit variance between"""
    device, x, y = x.device, to_float64(x), to_float64(y)
    full = ridge_regression(x, y, ridge)                                               # (i, o)
    fitted = x @ full
    v = torch.linalg.eigh(fitted.t() @ fitted)[1][:, -rank:].flip(1)                   # (o, rank): where most of it moves
    v = F.pad(v, (0, rank - v.shape[1]))                                               # few numbers: the rest is zero
    down = full @ v
    std = (x @ down).std(0).clamp_min(1e-6)
    return (down / std).t().float().to(device), (v * std).float().to(device)
