"""Train FC-TFG: three stages, one loop.

FC-TFG (arXiv 2304.03275), section 3.5: a StyleGAN2 generator learns faces (stage 1), an inversion network learns to
encode images for that generator (stage 2), and the whole network is trained end to end with six losses (stage 3).

    python syncnet.py train                    # sync expert, for the sync loss of stage 3
    python train.py --stage 1                  # StyleGAN2                       (Karras et al. 2020)
    python train.py --stage 2                  # pSp encoder                     (Richardson et al. 2021)
    python train.py --stage 2 --part hyper     # optional: its hypernetwork      (Alaluf et al. 2022)
    python train.py --stage 3                  # end to end; writes weights.pt for sample.py

The default dataset is the toy world, drawn on first use. README lists the time and the expected result of each command.
Every stage continues with --resume, bit for bit on a CPU: item n of the data depends on the seed and n alone.

The paper states no loss weights, learning rates, batch or window sizes: all are ours. Stage 3 starts from a closed-form
motion space (initialise.py). With the sync loss its steps alternate between windows of five frames, for the sync expert,
and single frames of many clips, which teach identity and pose faster.
"""

import argparse
import contextlib
import copy
import functools
import os
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.data import default_collate

import initialise
import losses
from checkpoint import (
    RANK, WORLD_SIZE, StepTimer, add_run_options, barrier, claim_output, cosine_warmup, count_parameters,
    fp16_state_dict, init_distributed, load_checkpoint, open_log, optimiser_step, progress_bar, restore_run,
    resume_options, save_checkpoint, save_run, terms_to_floats, update_ema, warn_of_slow_bf16, write_log)
from data import Frames, add_split_options
from fusion import middle_frames
from media import InputError, Parser, atomic_write, run, to_tensor, to_uint8
from report import image_grid, write_report
from stylegan2 import mix_styles

STEPS = {1: 700, 2: 2000, 3: 1400}  # the documented run at 32 px: half an hour on two slow cores
LOG_EVERY, SAVE_EVERY = 50, 500  # steps
JUDGE_FILES = ("vgg19", "vgg16", "lpips_heads", "arcface")  # names for --path

# weights of the loss terms in stages 1, 2 and 3 (None: no such term), all ours. --w NAME=VALUE changes them
WEIGHTS = dict(
    adv=(1.0, 0.0, 0.01),           # adversarial; stage 2 with photos: 0.01
    r1=(1.0, 1.0, 1.0),             # R1 of the discriminator, every 16th of its steps
    path=(2.0, None, None),         # path length of the generator, every 4th step
    rec=(None, 1.0, 1.0),           # reconstruction, L1
    mouth=(None, 3.0, 3.0),         # within rec: additional L1 in the mouth box; with a mouth code, in the lips box
    eyes=(None, 3.0, 3.0),          # within rec: additional L1 in the eyes box
    l2=(None, 0.0, 0.0),            # squared error; pSp and HyperStyle: l2=1 lpips=.8 arcface=.1, all other terms 0
    feat=(None, 0.2, 0.2),          # perceptual, features of stage 1's discriminator; 0 if vgg is on
    vgg=(None, 0.0, 0.0),           # perceptual, VGG19 (downloaded); 0.2 from 128 px on
    lpips=(None, 0.0, 0.0),         # perceptual, LPIPS on VGG16 (downloaded)
    id=(None, 0.1, 0.1),            # identity, small face judge; replaced by arcface if that is on
    arcface=(None, 0.0, 0.0),       # identity, ArcFace (downloaded; also initialises pSp's trunk); 0.1 from 128 px on
    preserve=(None, 1.0, 1.0),      # swapped mouth: L1 outside the mouth
    mouth_cycle=(None, 0.5, 0.3),   # swapped mouth: lip shape read from the result
    orth=(None, None, 0.1),         # orthogonality
    sync=(None, None, 0.3))         # sync


def parse(argv=None, saved=None):
    """saved: options in the checkpoint of a resumed run, the defaults of this call"""
    p = Parser(description="train FC-TFG, one stage at a time", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--stage", type=int, choices=(1, 2, 3), required=True,
        help="1: StyleGAN2, 2: inversion, 3: end to end; default steps: %s, %s and %s" % tuple(STEPS.values()))
    add("--part", choices=("encoder", "hyper", "lips"), help="stage 2: encoder (default), or hypernetwork for stage2.pt; "
        "stage 3: lips trains only sound -> lips of the weights in --init; images in --data may have another size")
    add_run_options(p, "out/toy32", steps=None, batch=16, lr=1e-3, batch_of="images")
    add("--data", nargs="+", help="packs of clips, by prepare.py; default: the toy world, drawn into --out on first use")
    add_split_options(p)
    add("--photos", help="pack of photos: more people than the clips have; stage 3 trains on it with a mouth code only")
    add("--size", type=int, default=32, choices=(16, 32, 64, 128, 256), help="edge of the images in pixels: the dial")
    add("--motion", default="direct", choices=("direct", "paper"), help="motion encoder, see fusion.py")
    add("--init", help="checkpoint of the previous stage, default: the one in --out; for stage 3 also weights.pt, which "
        "--size 128 enlarges from 64 px")
    add("--generator", help="StyleGAN2 checkpoint of rosinality's code (g_ema, d), replaces stage 1")
    add("--encoder", help="checkpoint of pSp (the first styles of a larger one), with --generator: replaces stage 2; or "
        "ArcFace's IR-SE50, for the trunk alone (default in stage 2 at 256 px)")
    add("--hyper", help="checkpoint of HyperStyle, with --generator")
    add("--expert", help="sync expert of stage 3: a file by syncnet.py; wav2lip or syncnet_v2, both downloaded; or your "
        "copy of one (.pth, .model). Default: sync.pt in --out, else, with --data from 128 px on, wav2lip")
    many = dict(nargs="+", action="extend")
    add("--path", type=functools.partial(parse_pair, JUDGE_FILES, str), metavar="NAME=FILE",
        help=f"your copies of {', '.join(JUDGE_FILES)}", **many)
    add("--w", type=functools.partial(parse_pair, WEIGHTS, float), metavar="NAME=VALUE",
        help=f"weights of loss terms, defaults in train.py: {', '.join(WEIGHTS)}", **many)
    add("--accumulate", type=int, default=1, help="batches per step and process, one after the other")
    add("--lr-gan", type=float, default=4e-3, help="learning rate of the layers with equalised learning rate")
    add("--augment", type=float, default=0.0, help="initial probability of discriminator augmentation; -1: always off")
    add("--bf16", action="store_true", help="bf16 autocast (a GPU, or a CPU with AVX512-BF16)")
    add("--compile", action="store_true", help="torch.compile of generator, encoder and discriminator")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0, help="processes that load data")
    if saved:
        p.set_defaults(**saved | dict(steps=None, path=[*saved["path"].items()], w=[*saved["w"].items()]))
    args = p.parse_args(argv)
    if args.part and args.stage != (3 if args.part == "lips" else 2):
        p.error("--part encoder and --part hyper need --stage 2, --part lips needs --stage 3")
    if args.part == "lips" and (args.resume or not args.init or WORLD_SIZE > 1):
        p.error("--part lips needs --init WEIGHTS and one process, and cannot --resume")
    args.part = args.part or ("encoder" if args.stage == 2 else None)
    args.w = loss_weights(args, dict(args.w or ()))
    args.path, args.world = dict(args.path or ()), WORLD_SIZE
    if args.steps is None and saved:                                                   # the same number of images
        args.steps = round(saved["steps"] * images_per_step(saved) / images_per_step(vars(args)))
    elif args.steps is None:
        args.steps = initialise.LIP_STEPS if args.part == "lips" else STEPS[args.stage]
    return args


def parse_pair(names, kind, text):
    """"NAME=VALUE" -> (NAME, kind(VALUE))"""
    name, _, value = text.partition("=")
    with contextlib.suppress(ValueError):
        if name in names:
            return name, kind(value)
    raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE with one of the names {', '.join(names)}")


def loss_weights(args, given: dict) -> dict:
    """The stage's column of WEIGHTS, changed by --size, --photos and --w (`given`)"""
    weights = {name: column[args.stage - 1] for name, column in WEIGHTS.items() if column[args.stage - 1] is not None}
    if args.part == "lips":
        return dict.fromkeys(weights, 0.0)
    for name, value in given.items():
        if not 0 <= value < float("inf") or (value == 0 and name == "adv" and args.stage == 1):
            raise InputError(f"--w {name}={value:g}: expected a number from 0 on, and above 0 for adv in stage 1")
    if args.stage == 2 and args.photos:
        weights["adv"] = WEIGHTS["adv"][2]
    if args.stage > 1 and args.size >= initialise.PAPERS_JUDGES:
        weights |= dict(vgg=0.2, arcface=0.1)
    if args.stage > 1 and given.get("vgg", weights["vgg"]):
        weights["feat"] = 0.0
    return weights | {name: value for name, value in given.items() if name in weights}


def images_per_step(options: dict) -> int:
    return options["batch"] * options["accumulate"] * options["world"]


# ---------------------------------------------------------------- forward pass of each stage: batch -> images and codes

def forward_stage1(model, batch):
    """z -> w -> image. Nine of ten batches mix the styles of two w (StyleGAN2 default)."""
    G, real = model.generator, batch["image"]
    N = len(real)
    w1, w2 = G.mapping(torch.randn(2 * N, G.dim, device=real.device)).chunk(2)         # (N, D) each
    crossover = int(torch.randint(1, G.L, ())) if torch.rand(()) < 0.9 else G.L
    w_plus = mix_styles(w1, w2, G.L, crossover)                                        # (N, L, D)
    return dict(real=real, fake=G(w_plus, "random" if model.config.noise else "off"), w_plus=w_plus)


def forward_stage2(model, batch):
    """image -> code -> image. With a mouth code (ours), half of the faces are decoded again with another mouth
    (fake_swapped): the opening of the previous face, and random changes of the other shape numbers. In a quarter of the
    faces' own mouth codes the appearance is set to 0, so that the generator responds to the shape."""
    real = batch["image"]                                                              # (N, 3, H, W)
    if not model.mouth:
        return dict(real=real, fake=model.decode(model.invert(real)))
    K, half, embed_mouth = model.config.shape_dim, len(real) // 2, model.motion.embed_mouth
    mouth = model.mouth(real)                                                          # (N, M)
    shape, appearance = mouth[:, :K], mouth[:, K:]
    opening = shape.roll(1, 0)[:, :1]                                                  # of the previous face
    target = torch.cat([opening, shape[:, 1:] + torch.randn_like(shape[:, 1:]), appearance], 1).detach()[half:]
    keep = torch.rand(len(real), 1, device=real.device) > 0.25
    mouth = torch.cat([shape, appearance * keep], 1)
    z = model.encode_source(real)                                                      # (N, L, D), lips masked
    z = torch.cat([z + embed_mouth(mouth), z[half:] + embed_mouth(target)])
    fake, swapped = model.decode(z).split([len(real), len(target)])
    return dict(real=real, fake=fake, fake_swapped=swapped, target_mouth=target)


def forward_stage2_hyper(model, batch):
    """image -> code -> image, after one more refinement by the hypernetwork. deltas: the weight changes so far"""
    real = batch["image"]
    with torch.no_grad():
        z = model.invert(real)
    deltas = model.refine(real, z, batch.get("deltas"))
    return dict(real=real, fake=model.decode(z, deltas), deltas=deltas)


def forward_stage3(model, batch):
    """source, driving frames, sound -> the driving frames with the identity of the source.

    With a mouth code, every other clip gets its true mouth (teacher forcing). Sound alone is ambiguous: regression
    averages, and the generator would learn to draw half of each movement."""
    source, driving, mel = batch["source"], batch["driving"], batch["mel"]
    B, T = len(mel), mel.shape[1] - 2 * model.config.context
    real, mouth, given = middle_frames(driving, T), None, None                         # (B, T, 3, H, W)
    if model.mouth:
        with torch.no_grad():
            mouth = model.mouth(real.flatten(0, 1)).unflatten(0, (B, T))               # (B, T, M)
            given = mouth - model.motion.appearance_part(model.mouth(source))[:, None]  # z_s2c holds this part
            given[..., model.config.shape_dim:] = 0                                    # appearance
            given[1::2] = torch.nan                                                    # predicted from sound
    out = dict(real=real.flatten(0, 1), mouth=mouth, sound=batch.get("sync_sound"))    # for windows: of the middle frame
    if "photo" in batch:
        source, driving, mel, given, target = append_photos(model, batch, given)
        out |= dict(real=torch.cat([out["real"], batch["photo_driving"]]), target_mouth=target)
    frames, z_s2c, z_c2d = model(source, driving, mel, model.config.context, given)
    fake, swapped = frames.flatten(0, 1).tensor_split([len(out["real"])])
    out |= dict(fake=fake, frames=frames[:B], z_s2c=z_s2c, z_c2d=z_c2d)
    return out | (dict(fake_swapped=swapped) if len(swapped) else {})


def append_photos(model, batch, mouth):
    """N photos as further clips of one frame, driven by themselves, half of them moved by warp.py: with their own mouth,
    then with one that the sound of a clip predicts -> source, driving, mel, mouth; mouth codes (N, M) of the latter"""
    photo, mel, motion, context = batch["photo"], batch["mel"], model.motion, model.config.context
    clip = torch.arange(len(photo), device=photo.device) % len(mel)
    with torch.no_grad():
        own = model.mouth(photo)                                                       # (N, M)
        source_part = motion.appearance_part(own)                                      # z_s2c holds this part
        predicted = motion.audio_to_mouth(model.encode_sound(mel), context)[clip, 0]   # (N, M)
    driving = batch["photo_driving"][:, None]                                          # (N, 1, 3, H, W)
    return (torch.cat([batch["source"], photo, photo]), torch.cat([batch["driving"], driving, driving]),
            torch.cat([mel, mel[clip], mel[clip]]),
            torch.cat([mouth, own[:, None] - source_part[:, None], predicted[:, None]]), predicted + source_part)


def all_fakes(out):
    """All generated images, for the discriminator"""
    return torch.cat([out["fake"], out["fake_swapped"]]) if "fake_swapped" in out else out["fake"]


STAGES = dict(stage1=(forward_stage1, lambda *_: {}), stage2=(forward_stage2, losses.stage2_losses),
              stage2_hyper=(forward_stage2_hyper, losses.stage2_losses), stage3=(forward_stage3, losses.stage3_losses))


# ------------------------------------------------------------------------------------------------------------- the loop

def main(argv=None):
    args = parse(argv)
    name = f"stage{args.stage}" + ("_hyper" if args.part == "hyper" else "")
    path = os.path.join(args.out, "weights.pt" if args.part == "lips" else f"{name}.pt")
    device = init_distributed(args.device)
    warn_of_slow_bf16(args, device)
    if RANK:  # process 0 alone downloads, draws and fits; the other processes load the checkpoint that it saves
        barrier()
        args.resume = True
    checkpoint = load_checkpoint(path, f"stage{args.stage}") if args.resume else None  # on the CPU
    if checkpoint:
        args = resume_options(parse, argv, args, checkpoint, path)
    w, images = args.w, images_per_step(vars(args))
    claim_output(path, args)
    frozen = initialise.load_judges(args, device)                                      # fails before anything slow
    data = initialise.load_data(args)

    torch.manual_seed(args.seed)
    model, D, states = initialise.build_networks(args, data, checkpoint, device)
    frozen |= initialise.start_stage(args, model, D, data, states, device)
    if args.part == "lips":                                                            # start_stage has trained them
        return export_weights(model.eval().requires_grad_(False), data, args, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt_g, opt_d = initialise.optimizers(model, D, args)
    augment, mean_path, step0 = losses.Augment(max(args.augment, 0.0)), 0.0, 0
    if checkpoint:
        ema.load_state_dict(checkpoint["ema"]["model"])
        restore_run(path, checkpoint, dict(g=opt_g, d=opt_d))
        augment.p, mean_path, step0 = checkpoint["augment_p"], checkpoint["mean_path"], checkpoint["images"] // images
        if RANK:                                                                       # another seed than process 0
            torch.manual_seed(args.seed + checkpoint["images"] + RANK)
    del checkpoint, states                                                             # free their tensors

    def save(step):
        trained_here = {k: frozen[k] for k in ("feature_net", "judge") if k in frozen}
        save_run(path, dict(kind=f"stage{args.stage}", config=vars(ema.config), step=step, images=step * images,
                            ema=dict(model=ema.state_dict()), augment_p=augment.p, mean_path=mean_path),
                 args, dict(model=model, D=D) | trained_here, dict(g=opt_g, d=opt_d))

    if WORLD_SIZE > 1 and not RANK:
        save(step0)
        barrier()
    trained = sum(q.numel() for q in model.parameters() if q.requires_grad) / 1e6
    print(f"stage {args.stage} on {WORLD_SIZE} x {device}: {len(data['pack'])} clips, "
          f"{trained:.2f} of {count_parameters(model)} trained; loss weights "
          + " ".join(f"{k}={v:g}" for k, v in w.items() if k != "feat" or "feature_net" in frozen))
    forward, losses_of = STAGES[name]
    refinements = model.config.refine if args.part == "hyper" else 1
    bf16 = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    eager = contextlib.nullcontext
    if args.compile:                                                                   # except second derivatives
        eager = functools.partial(torch.compiler.set_stance, "force_eager")
        for network in filter(None, (model.generator, model.encoder, D)):
            network.compile()

    log = None if RANK else open_log(os.path.join(args.out, f"log_{name}.jsonl"), args)
    uses_mfcc = getattr(frozen.get("sync"), "uses_mfcc", False)
    stream = initialise.load_batches(args, data, model.config, uses_mfcc, step0)
    timer, logged = StepTimer(device), {}                                              # latest value of each term
    bar = progress_bar(name, step0, args.steps)
    for step in bar:
        last = step + 1 == args.steps
        batch = timer.next_batch(stream)                                               # images (N, 3, H, W), see data.py
        micro_batches = [{k: v[i::args.accumulate] for k, v in batch.items()} for i in range(args.accumulate)]
        rate = 1.0 if args.stage == 1 else cosine_warmup(step, args.steps, 100)        # long warm-up of trained weights
        # no adversary on windows: five frames of one clip are nearly one sample
        adversarial = w["adv"] and (args.stage < 3 or batch["mel"].shape[1] == 1 + 2 * model.config.context)
        g_terms, d_terms, reals = defaultdict(list), defaultdict(list), []             # of each micro-batch

        if adversarial:                                                                # discriminator: logistic loss
            D.requires_grad_(True)
            with optimiser_step(opt_d, rate):
                for micro in micro_batches:
                    with bf16():
                        with torch.set_grad_enabled(args.accumulate == 1):             # memory for one graph only
                            out = forward(model, micro)
                        real, fake = D(augment(out["real"])), D(augment(all_fakes(out).detach()))  # (N, 1)
                    loss = losses.discriminator_loss(real, fake)
                    (loss / args.accumulate).backward()
                    append_terms(d_terms, d=loss, real=real.mean(), fake=fake.mean(), sign=real.sign().mean())
                    micro["out"] = out if args.accumulate == 1 else None               # used again below

        D.requires_grad_(False)                                                        # generator and encoders
        with optimiser_step(opt_g, rate):
            for micro in micro_batches:
                for _ in range(refinements):                                           # 1, except for the hypernetwork
                    with bf16():
                        out = micro.pop("out", None) or forward(model, micro)
                        terms = losses_of(model, frozen, out, w)
                        if adversarial:
                            terms["adv"] = losses.generator_loss(D(augment(all_fakes(out))))
                    terms = {k: w[k] * v for k, v in terms.items()}
                    (sum(terms.values()) / args.accumulate).backward()
                    micro["deltas"] = out.get("deltas")
                append_terms(g_terms, **terms)
                reals.append(out["real"])
        del micro_batches, micro, out, terms                                           # free graphs and weight changes

        # lazy regularisation in fp32: R1 in every 16th step of D, path length in every 4th step, on half a batch
        d_step = step // 2 if w.get("sync") else step                                  # with sync every second step has D
        if adversarial and w["r1"] and d_step % 16 == 0:
            D.requires_grad_(True)
            with optimiser_step(opt_d, rate), eager():
                for real in reals:
                    real = augment(real).detach().requires_grad_(True)
                    penalty = w["r1"] / 2 * losses.r1_penalty(real, D(real))
                    (16 * penalty / args.accumulate).backward()
                    append_terms(d_terms, r1=penalty)
        if w.get("path") and step % 4 == 0:
            with optimiser_step(opt_g, rate), eager():
                for real in reals:
                    out = forward(model, dict(image=real[:max(1, args.batch // 2)]))
                    penalty, mean = losses.path_length_penalty(out["fake"], out["w_plus"], mean_path)
                    (4 * w["path"] * penalty / args.accumulate).backward()
                    append_terms(d_terms, path=w["path"] * penalty, mean_path=mean)
        terms = {term: sum(values) / len(values) for term, values in (g_terms | d_terms).items()}
        terms = terms_to_floats(terms, step)                                           # means over all processes
        mean_path, sign = terms.pop("mean_path", mean_path), terms.pop("sign", None)
        if adversarial and args.augment >= 0:
            augment.update(sign, images)
        update_ema(ema, model, (step + 1) * images, images)

        logged |= terms
        if RANK:                                                                       # process 0 logs and saves
            continue
        if step % LOG_EVERY == 0 or last:
            write_log(log, bar, dict(step=step) | logged | dict(p=augment.p) | timer.pace(images), args.steps)
        if (step + 1) % SAVE_EVERY == 0 or last:
            save_examples(os.path.join(args.out, f"{name}.png"), ema, data, args)
            if args.stage == 3 and last:
                initialise.collect_idle_motion(ema, data["pack"], data["clips"], device)
            save(step + 1)
    if RANK:
        return
    log.close()
    write_report(args.out)                                                             # with the last image
    if args.stage == 3:
        export_weights(ema, data, args, device)


def export_weights(model, data, args, device):
    if model.mouth:
        initialise.fit_warp(model, data)
    if model.pose and not args.part:
        initialise.learn_moved_photos(model, data, device)
    weights = os.path.join(args.out, "weights.pt")
    save_checkpoint(weights, dict(kind="weights", config=vars(model.config), args=vars(args),
                                  networks=dict(model=fp16_state_dict(model))))
    print(f"{weights}: for sample.py --weights")


def append_terms(lists, **terms):
    for name, term in terms.items():
        lists[name].append(term.detach())


# ------------------------------------------------------------------------------------------------------- example images

@torch.no_grad()
def save_examples(path, ema, data, args, n=8):
    """An image of labelled rows with n columns: held-out clips, and in the last six columns held-out photos, if given"""
    device = ema.generator.input.input.device
    if args.stage == 1:
        z = torch.randn(3 * n, ema.generator.dim, generator=torch.Generator().manual_seed(0)).to(device)
        w = ema.generator.mapping(z)[:, None].expand(-1, ema.generator.L, -1)
        rows = dict(zip(("samples", "more samples", "and more"), ema.generator(w).unflatten(0, (3, n))))
    else:
        options = dict(seed=12345, clips=data["held_out"])
        if args.stage == 2:                                                            # the pack may hold photos alone
            key, images = "image", Frames(data["pack"], **options)
        else:
            key, images = "source", initialise.stage3_clips(data["pack"], 1, ema.config, flip=False, **options)
        items = [images[i] for i in range(n)]
        held_out = f"held out: {len(data['held_out'])} clips" if args.data else "clips of the training set"
        if args.photos:
            held_out += f", {len(data['held_out_photos'])} photos (from the third column on)"
            for item, c in zip(items[2:], data["held_out_photos"]):
                item[key] = to_tensor(data["photos"].pack.frame(c, 0))
        batch = {name: x.to(device) for name, x in default_collate(items).items()}
        source = batch[key]
    if args.stage == 2:
        z = ema.invert(source)
        rows = {f"image; {held_out}": source, "inversion": ema.decode(z)}
        if ema.hyper:
            rows["refined by the hypernetwork"] = ema.decode(z, ema.weight_changes(source, z))
        elif ema.mouth:
            swapped = ema.invert(source, ema.mouth(source).roll(1, 0))
            rows["inversion with the mouth of the column to the left"] = ema.decode(swapped)
    elif args.stage == 3:
        driving, mel = batch["driving"].roll(1, 0), batch["mel"].roll(1, 0)            # of another person
        rows = {f"source; {held_out}": source,
                "driving frame and its sound: of the column to the left": middle_frames(driving, 1)[:, 0],
                "result": ema(source, driving, mel, ema.config.context)[0][:, 0]}
    with atomic_write(Path(path)) as draft:
        image_grid([to_uint8(row.clamp(-1, 1)) for row in rows.values()], rows, max(128, args.size)).save(draft, "PNG")


if __name__ == "__main__":
    run(main)
