"""Train FC-TFG: three stages by flag, one loop.

FC-TFG (arXiv 2304.03275), section 3.5: a StyleGAN2 generator is trained on faces (stage 1), an inversion network on that
generator (stage 2), and everything end to end with six losses (stage 3).

    python syncnet.py train                    # the sync expert of stage 3's sync loss
    python train.py --stage 1                  # StyleGAN2                       (Karras et al. 2020)
    python train.py --stage 2                  # pSp encoder                     (Richardson et al. 2021)
    python train.py --stage 2 --part hyper     # optional: its hypernetwork      (Alaluf et al. 2022)
    python train.py --stage 3                  # end to end; writes weights.pt for sample.py

Without --data it trains on the toy world, drawn on first use; README has the time of each line and what to expect. Every
stage resumes with --resume, bit for bit on a CPU: item n of the data is a function of the seed and n alone.

The paper prints no weights, rates, batch or window: all numbers are ours. Stage 3 starts from a closed-form motion space
(initialise.py). With the sync loss its steps alternate between windows of five frames, for the expert, and many clips of
one frame, which teach people and poses faster.
"""

import argparse
import contextlib
import copy
import functools
import os
from collections import defaultdict

import torch
from torch.utils.data import default_collate

import initialise
import losses
from checkpoint import (
    RANK, WORLD_SIZE, StepTimer, add_run_options, barrier, claim_output, cosine_warmup, count_parameters,
    fp16_state_dict, init_distributed, load_checkpoint, open_log, optimiser_step, progress_bar, restore_run,
    save_checkpoint, save_run, terms_to_floats, update_ema, wrap_errors, write_log)
from data import add_split_options
from fusion import middle_frames
from media import InputError, Parser, run, to_tensor, to_uint8
from report import image_grid, write_report
from stylegan2 import mix_styles

STEPS = {1: 700, 2: 2000, 3: 1400}  # the documented run at 32 px: a quarter of an hour on two cores
LOG_EVERY, SAVE_EVERY = 50, 500  # steps
JUDGES = ("vgg19", "vgg16", "lpips_heads", "arcface")  # files that --path names

# weights of the loss terms in stages 1, 2, 3 (None: the stage has no such term); the paper prints none.
# --w NAME=VALUE changes them
WEIGHTS = dict(
    adv=(1.0, 0.0, 0.01),           # adversarial; 0.01 in stage 2 with photos
    r1=(1.0, 1.0, 1.0),             # R1 of the discriminator, every 16th of its steps
    path=(2.0, None, None),         # path length of the generator, every 4th step
    rec=(None, 1.0, 1.0),           # reconstruction, L1
    mouth=(None, 3.0, 3.0),         # .. once more in the box of the mouth, or, with a mouth code, of the lips
    eyes=(None, 3.0, 3.0),          # .. once more in the box of the eyes
    l2=(None, 0.0, 0.0),            # squared error; pSp and HyperStyle: l2=1 lpips=.8 arcface=.1, all others 0
    feat=(None, 0.2, 0.2),          # perceptual, features of stage 1's discriminator; 0 with vgg
    vgg=(None, 0.0, 0.0),           # perceptual, VGG19 (downloaded); 0.2 from 128 px on
    lpips=(None, 0.0, 0.0),         # perceptual, LPIPS on VGG16 (downloaded)
    id=(None, 0.1, 0.1),            # identity, a small face judge; not with arcface
    arcface=(None, 0.0, 0.0),       # identity, ArcFace (downloaded; pSp's trunk starts from it); 0.1 from 128 px on
    preserve=(None, 1.0, 1.0),      # a face with the mouth of another: its L1 around the mouth
    mouth_cycle=(None, 0.5, 0.3),   # .. and the mouth code read from it
    orth=(None, None, 0.1),         # orthogonality
    sync=(None, None, 0.3))         # sync


def parse(argv=None, saved=None):
    """saved: the options in the checkpoint of a run that goes on, which hold where they are not given anew"""
    p = Parser(description="train FC-TFG, one stage at a time", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--stage", type=int, choices=(1, 2, 3), required=True,
        help="1 StyleGAN2, 2 inversion, 3 end to end; by default of %s, %s and %s steps" % tuple(STEPS.values()))
    add("--part", choices=("encoder", "hyper", "lips"), help="stage 2: encoder (default) or, on stage2.pt, hypernetwork; "
        "stage 3: of weights --init the lips from sound alone, from --data of any size")
    add_run_options(p, "out/toy32", steps=None, batch=16, lr=1e-3, batch_of="images")
    add("--data", nargs="+", help="packs of clips by prepare.py; default: the toy world, drawn into --out on first use")
    add_split_options(p)
    add("--photos", help="pack of photos: identities, for clips of few people; in stage 3 with the mouth code alone")
    add("--size", type=int, default=32, choices=(16, 32, 64, 128, 256), help="edge of the images: the dial")
    add("--motion", default="direct", choices=("direct", "paper"), help="the motion encoder, see fusion.py")
    add("--init", help="checkpoint of the stage before; default: the one in --out")
    add("--generator", help="StyleGAN2 checkpoint of rosinality's code (g_ema, d), in place of stage 1")
    add("--encoder", help="pSp's checkpoint (the first styles of a larger one), with --generator in place of stage 2; or "
        "ArcFace's IR-SE50 for the trunk alone (default at 256 px in stage 2)")
    add("--hyper", help="HyperStyle's checkpoint, with --generator")
    add("--expert", help="sync expert of stage 3: a file of ours; wav2lip or syncnet_v2, both fetched; or your copy "
        "(.pth, .model). Default: sync.pt in --out, else, with --data from 128 px on, wav2lip")
    many = dict(nargs="+", action="extend")
    add("--path", type=functools.partial(named, JUDGES, str), metavar="NAME=FILE",
        help=f"your copies of {', '.join(JUDGES)}", **many)
    add("--w", type=functools.partial(named, WEIGHTS, float), metavar="NAME=VALUE",
        help=f"weights of loss terms, defaults in train.py: {', '.join(WEIGHTS)}", **many)
    add("--accumulate", type=int, default=1, help="batches a step and process, one after the other")
    add("--lr-gan", type=float, default=4e-3, help="learning rate of layers with equalised learning rate")
    add("--augment", type=float, default=0.0, help="discriminator augmentation: first p; -1: off for good")
    add("--bf16", action="store_true", help="bf16 autocast (a GPU, or a CPU with AVX512-BF16)")
    add("--compile", action="store_true", help="torch.compile of generator, encoder and discriminator")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0, help="processes that load data")
    if saved:
        p.set_defaults(**saved | dict(steps=None, path=[*saved["path"].items()], w=[*saved["w"].items()]))
    args = p.parse_args(argv)
    if args.part and args.stage != (3 if args.part == "lips" else 2):
        p.error("--part encoder and hyper are of --stage 2, lips is of --stage 3")
    args.part = args.part or ("encoder" if args.stage == 2 else None)
    args.path, args.w, args.world = dict(args.path or ()), loss_weights(args, dict(args.w or ())), WORLD_SIZE
    if args.steps is None and saved:                                                   # as many images in all
        args.steps = round(saved["steps"] * images_a_step(saved) / images_a_step(vars(args)))
    elif args.steps is None:
        args.steps = initialise.LIP_STEPS if args.part == "lips" else STEPS[args.stage]
    return args


def named(names, kind, text):
    """NAME=VALUE -> (NAME, kind(VALUE))"""
    name, _, value = text.partition("=")
    with contextlib.suppress(ValueError):
        if name in names:
            return name, kind(value)
    raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE for one of {', '.join(names)}")


def loss_weights(args, given: dict) -> dict:
    """The stage's column of WEIGHTS, with what --size, --photos and --w change"""
    weight = {name: column[args.stage - 1] for name, column in WEIGHTS.items() if column[args.stage - 1] is not None}
    if args.part == "lips":
        return dict.fromkeys(weight, 0.0)
    for name, value in given.items():
        if not 0 <= value < float("inf") or value == 0 and name == "adv" and args.stage == 1:
            raise InputError(f"--w {name}={value:g}: expected a number from 0 on, and some adversarial loss in stage 1")
    if args.stage == 2 and args.photos:
        weight["adv"] = WEIGHTS["adv"][2]
    if args.stage > 1 and args.size >= initialise.PAPERS_JUDGES:
        weight |= dict(vgg=0.2, arcface=0.1)
    if args.stage > 1 and given.get("vgg", weight["vgg"]):
        weight["feat"] = 0.0
    return weight | {name: value for name, value in given.items() if name in weight}


# what --resume may change, with loss weights
CHANGEABLE = {"steps", "lr", "lr_gan", "data", "photos", "expert", "path", "device", "workers", "accumulate", "compile"}


def resume_options(argv, args, saved: dict, path):
    """Options of a run that goes on: those in its checkpoint (`saved`), but what is CHANGEABLE and given anew. A line
    says what has changed. InputError: another option is given with another value."""
    here = {k: getattr(args, k) for k in ("stage", "part", "out", "resume", "overwrite")}
    args = parse(argv, saved | here)
    old, new = (options | {f"w {k}": v for k, v in options["w"].items()} for options in (saved, vars(args)))
    changes = {k: f"--{k.replace('_', '-')} {old[k]} -> {v}" for k, v in new.items()
               if k in old and v != old[k] and k not in (*here, "w", "world")}
    if fixed := [change for k, change in changes.items() if k not in CHANGEABLE and not k.startswith("w ")]:
        raise InputError(f"{path}: --resume cannot change {', '.join(fixed)}; --overwrite starts anew")
    print(", ".join([f"{path}: goes on with its own options", *changes.values()]))
    return args


def images_a_step(options: dict) -> int:
    return options["batch"] * options["accumulate"] * options["world"]


# ---------------------------------------------------------------------------------------------------------------------
# one function a stage: batch -> images and codes

def forward_stage1(model, batch):
    """z -> w, two of them mixed in nine of ten images (StyleGAN2 default) -> fake"""
    G, real = model.generator, batch["image"]
    N = len(real)
    w1, w2 = G.mapping(torch.randn(2 * N, G.dim, device=real.device)).chunk(2)         # (N, D) each
    crossover = int(torch.randint(1, G.L, ())) if torch.rand(()) < 0.9 else G.L
    w_plus = mix_styles(w1, w2, G.L, crossover)                                        # (N, L, D)
    return dict(real=real, fake=G(w_plus, "random" if model.config.noise else "off"), w_plus=w_plus)


def forward_stage2(model, batch):
    """image -> code -> image. With a mouth code, half of the faces once more with the mouth of another: fake_swapped.

    target_mouth, ours: the neighbour's opening, the rest of the shape disturbed. A quarter of the true codes lose their
    appearance part, so that the generator responds to the shape."""
    real = batch["image"]                                                              # (N, 3, H, W)
    if not model.mouth:
        return dict(real=real, fake=model.decode(model.invert(real)))
    K, n, up = model.config.shape_dim, len(real) // 2, model.motion.mouth_up
    mouth = model.mouth(real)                                                          # (N, M)
    shape, appearance = mouth[:, :K], mouth[:, K:]
    neighbour = mouth.detach().roll(1, 0)[:, :1]
    target = torch.cat([neighbour, shape[:, 1:] + torch.randn_like(shape[:, 1:]), appearance], 1).detach()[n:]
    kept = torch.rand(len(real), 1, device=real.device) > 0.25
    mouth = torch.cat([shape, appearance * kept], 1)
    z = model.encode_source(real)                                                      # (N, L, D): the lips are masked
    z = torch.cat([z + up(mouth).view_as(z), z[n:] + up(target).view_as(z[n:])])
    fake, swapped = model.decode(z).split([len(real), len(target)])
    return dict(real=real, fake=fake, fake_swapped=swapped, target_mouth=target)


def forward_hyper(model, batch):
    """image -> code -> image by weights that the hypernetwork has changed once more; deltas: changes of before"""
    real = batch["image"]
    with torch.no_grad():
        z = model.invert(real)
    deltas = model.refine(real, z, batch.get("deltas"))
    return dict(real=real, fake=model.decode(z, deltas), deltas=deltas)


def forward_stage3(model, batch):
    """source, driving frames and sound -> the driving frames, with the source's identity.

    With a mouth code every other clip gets its true mouth (teacher forcing): sound alone is ambiguous, regression
    averages, and the generator would learn to draw half of each movement."""
    T = batch["mel"].shape[1] - 2 * model.config.context
    real, mouth, true_mouth = middle_frames(batch["driving"], T), None, None                  # (B, T, 3, H, W)
    if model.mouth:
        with torch.no_grad():
            of_source = model.mouth(batch["source"])                                   # (B, M)
            mouth = model.mouth(real.flatten(0, 1)).unflatten(0, real.shape[:2])       # (B, T, M)
            true_mouth = mouth - (of_source - model.motion.keep_opening(of_source))[:, None]  # is added to the source's
            true_mouth[..., model.config.shape_dim:] = 0                               # appearance
            true_mouth[1::2] = torch.nan                                               # from sound
    frames, z_s2c, z_c2d = model(batch["source"], batch["driving"], batch["mel"], model.config.context, true_mouth)
    out = dict(real=real.flatten(0, 1), fake=frames.flatten(0, 1), frames=frames, mouth=mouth, z_s2c=z_s2c, z_c2d=z_c2d,
               sound=batch.get("sync_sound", middle_frames(batch["mel"], 1)[:, 0]))                # of the middle frame
    return out | forward_photos(model, batch, out) if "photo" in batch else out


def forward_photos(model, batch, out):
    """Stage 3 on photos, with a mouth code: each is its own driving video, once with its own mouth, once with a clip's
    sound."""
    photo, motion = batch["photo"], model.motion                                       # (N, 3, H, W)
    (_, z_s2c), pose = model.canonical_code(photo), motion.pose(model.encode_driving(photo[None]))[0]
    mouth = model.mouth(photo)                                                         # (N, M)
    own = motion.keep_opening(mouth)
    with torch.no_grad():
        spoken = motion.predict_mouth(model.encode_sound(batch["mel"]), model.config.context)[:, 0]
        spoken = spoken[torch.arange(len(photo), device=photo.device) % len(spoken)]   # (N, M)
    fake, swapped = model.decode(torch.cat([z_s2c + motion.join(pose, m) for m in (own, spoken)])).chunk(2)
    return dict(real=torch.cat([out["real"], photo]), fake=torch.cat([out["fake"], fake]), fake_swapped=swapped,
                target_mouth=spoken + (mouth - own).detach())


def all_fakes(out):
    """Every generated image, for the discriminator"""
    return torch.cat([out["fake"], out["fake_swapped"]]) if "fake_swapped" in out else out["fake"]


STAGES = dict(stage1=(forward_stage1, lambda *_: {}), stage2=(forward_stage2, losses.stage2),
              stage2_hyper=(forward_hyper, losses.stage2), stage3=(forward_stage3, losses.stage3))


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def main(argv=None):
    args = parse(argv)
    name = f"stage{args.stage}" + "_hyper" * (args.part == "hyper")
    path = os.path.join(args.out, f"{name}.pt")
    device = init_distributed(args.device)
    if RANK:                                                                           # of several processes the first
        barrier()                                                                      # fetches, draws and fits,
        args.resume = True                                                             # others load what it saved
    ckpt = load_checkpoint(path, f"stage{args.stage}") if args.resume else None        # to the CPU
    with wrap_errors(path, "not a run of this version"):
        args = resume_options(argv, args, ckpt["args"], path) if ckpt else args
    w, images = args.w, images_a_step(vars(args))
    claim_output(path, args)
    frozen = initialise.load_judges(args, device)                                      # before anything slow
    data = initialise.load_data(args)

    torch.manual_seed(args.seed)
    model, D, known = initialise.build_networks(args, data, ckpt, device)
    frozen |= initialise.stage(args, model, D, data, known, device)
    if args.part == "lips":
        return export(model.eval().requires_grad_(False), data, args)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt_g, opt_d = initialise.optimizers(model, D, args)
    augment, mean_path, step0 = losses.Augment(max(args.augment, 0.0)), 0.0, 0
    if ckpt:
        ema.load_state_dict(ckpt["ema"]["model"])
        restore_run(path, ckpt, dict(g=opt_g, d=opt_d))
        augment.p, mean_path, step0 = ckpt["augment_p"], ckpt["mean_path"], ckpt["images"] // images
        if RANK:                                                                       # other draws than the first's
            torch.manual_seed(args.seed + ckpt["images"] + RANK)
    del ckpt, known                                                                    # their tensors

    def save(step):
        kept = {k: frozen[k] for k in ("feature_net", "judge") if k in frozen}
        save_run(path, dict(kind=f"stage{args.stage}", config=vars(ema.config), step=step, images=step * images,
                            ema=dict(model=ema.state_dict()), augment_p=augment.p, mean_path=mean_path),
                 args, dict(model=model, D=D) | kept, dict(g=opt_g, d=opt_d))

    if WORLD_SIZE > 1 and not RANK:
        save(step0)
        barrier()
    trained = sum(q.numel() for q in model.parameters() if q.requires_grad) / 1e6
    print(f"stage {args.stage} on {WORLD_SIZE} x {device}: {len(data['pack'])} clips, "
          f"{trained:.2f} of {count_parameters(model)} trained; loss weights "
          + " ".join(f"{k}={v:g}" for k, v in w.items()))
    forward, losses_of = STAGES[name]
    refinements = model.config.refine if args.part == "hyper" else 1
    bf16 = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    eager = contextlib.nullcontext
    if args.compile:                                                                   # but for gradients of gradients
        eager = functools.partial(torch.compiler.set_stance, "force_eager")
        for network in filter(None, (model.generator, model.encoder, D)):
            network.compile()

    log = None if RANK else open_log(os.path.join(args.out, f"log_{name}.jsonl"), args)
    stream = initialise.load_batches(args, data, model.config, getattr(frozen.get("sync"), "uses_mfcc", False), step0)
    timer, shown = StepTimer(device), {}                                               # the last value of each term
    for step in (bar := progress_bar(name, step0, args.steps)):
        last = step + 1 == args.steps
        batch = timer.next_batch(stream)                                                # images (N, 3, H, W), see data.py
        micro = [{k: v[i::args.accumulate] for k, v in batch.items()} for i in range(args.accumulate)]
        rate = 1.0 if args.stage == 1 else cosine_warmup(step, args.steps, 100)        # slow: keep what is learned
        # no adversary on windows: five frames of one clip are nearly one sample
        adversarial = w["adv"] and (args.stage < 3 or batch["mel"].shape[1] == 1 + 2 * model.config.context)
        of_g, of_d, reals = defaultdict(list), defaultdict(list), []                   # terms of each micro-batch

        if adversarial:                                                                # discriminator: logistic loss
            D.requires_grad_(True)
            with optimiser_step(opt_d, rate):
                for part in micro:
                    with bf16():
                        with torch.set_grad_enabled(args.accumulate == 1):             # no graphs of several
                            out = forward(model, part)
                        real, fake = D(augment(out["real"])), D(augment(all_fakes(out).detach()))  # (N, 1)
                    loss = losses.discriminator_loss(real, fake)
                    (loss / len(micro)).backward()
                    collect(of_d, d=loss, real=real.mean(), fake=fake.mean(), sign=real.sign().mean())
                    part["out"] = out if args.accumulate == 1 else None

        D.requires_grad_(False)                                                        # generator, and all before it
        with optimiser_step(opt_g, rate):
            for part in micro:
                for _ in range(refinements):                                           # 1, but of the hypernetwork
                    with bf16():
                        out = part.pop("out", None) or forward(model, part)
                        terms = losses_of(model, frozen, out, w)
                        if adversarial:
                            terms["adv"] = losses.generator_loss(D(augment(all_fakes(out))))
                    terms = {k: w[k] * v for k, v in terms.items()}
                    (sum(terms.values()) / len(micro)).backward()
                    part["deltas"] = out.get("deltas")
                collect(of_g, **terms)
                reals.append(out["real"])
        del micro, part, out, terms                                                    # graphs, weight changes

        # lazy regularisation, in fp32: R1 every 16th step of D, path length every 4th, on half a batch
        if adversarial and step // (2 if w.get("sync") else 1) % 16 == 0:
            D.requires_grad_(True)
            with optimiser_step(opt_d, rate), eager():
                for real in reals:
                    real = augment(real).detach().requires_grad_(True)
                    penalty = w["r1"] / 2 * losses.r1_penalty(real, D(real))
                    (16 * penalty / len(reals)).backward()
                    collect(of_d, r1=penalty)
        if w.get("path") and step % 4 == 0:
            with optimiser_step(opt_g, rate), eager():
                for real in reals:
                    out = forward(model, dict(image=real[:max(1, args.batch // 2)]))
                    penalty, mean = losses.path_length_penalty(out["fake"], out["w_plus"], mean_path)
                    (4 * w["path"] * penalty / len(reals)).backward()
                    collect(of_d, path=w["path"] * penalty, mean_path=mean)
        terms = {name: sum(found) / len(found) for name, found in (of_g | of_d).items()}
        terms = terms_to_floats(terms, step)                                           # floats, over all processes
        mean_path, sign = terms.pop("mean_path", mean_path), terms.pop("sign", None)
        if adversarial and args.augment >= 0:
            augment.update(sign, images)
        update_ema(ema, model, (step + 1) * images, images)

        shown |= terms
        if RANK:                                                                       # the first process logs and saves
            continue
        if step % LOG_EVERY == 0 or last:
            write_log(log, bar, dict(step=step) | shown | dict(p=augment.p) | timer.pace(images), args.steps)
        if (step + 1) % SAVE_EVERY == 0 or last:
            save_examples(os.path.join(args.out, f"{name}.png"), ema, data, args)
            if args.stage == 3 and last:
                initialise.collect_idle(ema, data["pack"], data["clips"], device)
            save(step + 1)
    if RANK:
        return
    log.close()
    write_report(args.out)                                                             # with the last image
    if args.stage == 3:
        export(ema, data, args)


def export(model, data, args):
    if model.mouth:
        initialise.fit_warp(model, data)
    weights = os.path.join(args.out, "weights.pt")
    save_checkpoint(weights, dict(kind="weights", format=1, config=vars(model.config), args=vars(args),
                                  networks=dict(model=fp16_state_dict(model))))
    print(f"{weights}: for sample.py --weights")


def collect(found, **terms):
    for name, term in terms.items():
        found[name].append(term.detach())


# ---------------------------------------------------------------------------------------------------------------------
# what the user sees

@torch.no_grad()
def save_examples(path, ema, data, args, n=8):
    """An image of n columns, of held-out clips and photos (the last six columns) where there are some"""
    device = ema.generator.input.input.device
    if args.stage == 1:
        z = torch.randn(3 * n, ema.generator.dim, generator=torch.Generator().manual_seed(0)).to(device)
        w = ema.generator.mapping(z)[:, None].expand(-1, ema.generator.L, -1)
        rows = dict(zip(("samples", "", " "), ema.generator(w).unflatten(0, (3, n))))
    else:
        clips = initialise.stage3_clips(data["pack"], 1, ema.config, 12345, flip=False, clips=data["held_out"])
        items, about = [clips[i] for i in range(n)], f"held out: {len(data['held_out'])} clips"
        if args.photos:
            about += f", {len(data['held_out_photos'])} photos (from the third column on)"
            for item, c in zip(items[2:], data["held_out_photos"]):
                item["source"] = to_tensor(data["photos"].pack.frame(c, 0))
        source, driving, mel = (default_collate([item[k] for item in items]).to(device)
                                for k in ("source", "driving", "mel"))
    if args.stage == 2:
        z = ema.invert(source)
        rows = {f"image; {about}": source, "inversion": ema.decode(z)}
        if ema.hyper:
            rows["refined by the hypernetwork"] = ema.decode(z, ema.weight_changes(source, z))
        elif ema.mouth:
            swapped = ema.decode(ema.invert(source, ema.mouth(source).roll(1, 0)))
            rows["inversion with the mouth of the column to the left"] = swapped
    elif args.stage == 3:
        driving, mel = driving.roll(1, 0), mel.roll(1, 0)                              # another person's head and sound
        rows = {f"source; {about}": source,
                "driving frame, with its sound: the column to the left": middle_frames(driving, 1)[:, 0],
                "source, driven": ema(source, driving, mel, ema.config.context)[0][:, 0]}
    image_grid([to_uint8(row.clamp(-1, 1)) for row in rows.values()], rows, max(128, args.size)).save(path + ".tmp.png")
    os.replace(path + ".tmp.png", path)


if __name__ == "__main__":
    run(main)
