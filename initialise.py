"""What happens once, before a stage's first step: closed forms that minutes on a CPU need.

ours: the paper trains long enough not to need them.
"""

import copy
import dataclasses
import functools
import math

import numpy as np
import torch
from tqdm import tqdm

import judges
import losses
from data import Clips, batches
from faces import mask_mouth
from fusion import CONTEXT, Config, mean_w
from landmarks import load_landmarks
from media import InputError, to_tensor
from motion import fit_moves, fit_opening, held_still, lip_opening
from vision import small_picture

# ---------------------------------------------------------------------------------------------------------------------
# starts: what a stage does once, before its first step

@torch.no_grad()
def start_encoder(model, pictures, device, most=3000):
    """Stage 2: mean w of the generator, principal components of training pictures for the linear path."""
    model.encoder.latent_avg.copy_(mean_w(model.generator))
    if getattr(model.encoder, "linear_down", None) is not None:
        n = max((8 if model.config.picture else 2) * len(model.encoder.linear_down.weight), most)
        seen = torch.stack([pictures[i]["image"] for i in range(n)]).to(device)
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
        box = model.mouth.mouth_crop(seen).flatten(1).cpu()
        if model.mouth.reader:                                                         # the lips' shape goes first
            shape = torch.cat([model.mouth.read(x) for x in model.mouth.mouth_crop(seen).split(256)]).cpu()
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
        air = model.mouth.mouth_crop(to_tensor(pack.frames(c, ks)), margin=0.125)                # to shift in
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
    judge = judges.SmallFaceJudge().to(device)
    opt = torch.optim.Adam(judge.parameters(), 2e-3)
    if photos is not None:
        batch, looks, template = 2 * batch, losses.Augment(p=0.5), photos.pack.template
    stream = batches(pictures, batch, 0)
    for _ in tqdm(range(steps), desc="face judge", leave=False, disable=None):
        item = next(stream)
        if photos is None:
            faces = item["source"], item["driving"][:, 0]                              # two of each clip
        else:
            faces = looks(item["image"]), looks(mask_mouth(item["image"], template, "lips"))
        # ours: colour and brightness move a little, so that the judge does not count pixels of one lamp
        a, b = (x.to(device) * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1, device=device)) for x in faces)
        loss = judges.same_person_loss(judge(a), judge(b), item[label].to(device), judge.log_scale, judge.bias)
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
            x = torch.stack([photos[k]["image"] for k in range(i, i + 64)]).to(device)
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
        nets["judge"] = judges.SmallFaceJudge().to(device)
        nets["judge"].load_state_dict(known["judge"])
    elif args.w_id and not args.w_arcface:
        nets["judge"] = train_judge(data, device, args.seed)
    if args.stage == 3:
        start_motion_space(model, data["pack"], data["clips"], device, data["photos"])
        if model.mouth:
            start_lips(model, data["pack"], data["clips"], args, device)


# the same mouth in a mirror: which of its 20 points stands for which
MIRRORED = (6, 5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 16, 15, 14, 13, 12, 19, 18, 17)


def mouth_shape(points: np.ndarray) -> np.ndarray:
    """Landmarks (n, 68, 2) -> (n, 42): how far the lips are open, the jaw's drop from nose to chin, and the mouth's 20
    points about their middle, averaged with their mirror image, all in the landmarks' unit. Upright heads."""
    mouth = points[:, 48:68] - points[:, 48:68].mean(1, keepdims=True)                # (n, 20, 2)
    mouth = (mouth + mouth[:, MIRRORED] * (-1, 1)) / 2
    opening = np.mean([points[:, b, 1] - points[:, a, 1] for a, b in ((61, 67), (62, 66), (63, 65))], 0)
    jaw = points[:, 8, 1] - points[:, 33, 1]
    return np.concatenate([opening[:, None], jaw[:, None], mouth.reshape(len(mouth), -1)], 1)
