"""The toy world's control table: change one of identity, lips, pose, eyes, and measure what else moves."""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from audio import log_mel, mel_windows, n_frames
from checkpoint import load_checkpoint, save_checkpoint
from data import Pack
from fusion import load_model
from judges import same_person_loss
from media import InputError, check_output, to_tensor, to_uint8
from toyfaces import FACTORS, TEST, WORLD, draw, make_pack, person

# ---------------------------------------------------------------------------------------------------------------------
# pure functions: pictures

def correlation(a, b) -> float:
    """Pearson's r of two curves (n,); 0 where one of them does not move (it then follows nothing). Higher is better."""
    a, b = np.asarray(a, float).ravel(), np.asarray(b, float).ravel()
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 1e-9 else 0.0


def difference(a, b) -> np.ndarray:
    """uint8 pictures -> int16, without wrapping round"""
    return np.asarray(a).astype(np.int16) - np.asarray(b)


def l1(a, b) -> np.ndarray:
    """Mean absolute difference of each picture (.., H, W, 3) uint8 -> (..), in [0, 1]; 0 is equal."""
    return np.abs(difference(a, b)).mean((-3, -2, -1), dtype=np.float64) / 255


def retrieval(queries, gallery) -> float:
    """Share of the queries (n, E) whose nearest of the gallery (n, E) by cosine is the one of the same row."""
    return float(((queries @ gallery.t()).argmax(1) == torch.arange(len(queries))).float().mean())


# ---------------------------------------------------------------------------------------------------------------------
# the toy world: the probe

PROBE_PEOPLE = 4_000_000  # first person of the probe's own world: neither trained on, nor tuned on, nor tested on
READ = ("open", "wide", "yaw", "pitch", "roll", "blink", "gaze_x", "gaze_y")  # factors that the table is about


class Probe(nn.Module):
    """Picture (N, 3, H, W) -> readings (N, 10) in units of each factor's deviation, and an identity embedding (N, 64)."""

    def __init__(self, size: int, width: int = 24):
        super().__init__()
        self.body = nn.Sequential()
        for i, (a, b) in enumerate([(3, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)]):
            stride = 2 if i or size > 32 else 1
            self.body.append(nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.ReLU(),
                                           nn.Conv2d(b, b, 3, 1, 1), nn.GroupNorm(8, b), nn.ReLU()))
        self.read = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                  nn.Linear(4 * width * 16, 256), nn.ReLU(), nn.Linear(256, 10))
        self.who = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(4 * width * 16, 64))
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-4.0))
        self.register_buffer("mean", torch.zeros(10))
        self.register_buffer("std", torch.ones(10))

    def forward(self, x):
        h = self.body(x.contiguous(memory_format=torch.channels_last))
        return self.read(h), F.normalize(self.who(h), dim=1)

    @torch.inference_mode()
    def readings(self, pictures, batch=128):
        """(n, 3, H, W) in [-1, 1] -> readings (n, 10) in the factors' own units, embeddings (n, 64)"""
        out = [self(x) for x in pictures.split(batch)]
        return torch.cat([r for r, _ in out]) * self.std + self.mean, torch.cat([e for _, e in out])


def train_probe(size: int, folder: Path, device, people: int = 800, steps: int = 1800, batch: int = 32) -> Probe:
    """Train a probe on drawn frames, or take it from the folder if it was trained before. About a minute."""
    path = folder / f"probe{size}_world{WORLD}.pt"
    probe = Probe(size).to(device, memory_format=torch.channels_last)
    if path.exists():
        try:
            probe.load_state_dict(load_checkpoint(str(path), "probe")["networks"]["probe"])
            return probe.eval()
        except (InputError, KeyError, TypeError, RuntimeError, AttributeError):  # cut short, or of another version
            print(f"{path}: the kept probe cannot be read, another is trained")
            probe = Probe(size).to(device, memory_format=torch.channels_last)
    toys = folder / f"probe_toys{size}"
    make_pack(toys, size, people, 0.8, PROBE_PEOPLE, os.cpu_count())
    pack, truth = Pack(toys), torch.from_numpy(np.load(toys / "truth.npy"))
    pictures = torch.cat([to_tensor(pack.frames(c, range(pack.n_frames[c]))) for c in range(len(pack))])
    probe.mean.copy_(truth.mean(0))
    probe.std.copy_(truth.std(0))
    per_clip = len(pictures) // len(pack)
    torch.manual_seed(1)
    opt = torch.optim.Adam(probe.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="probe", leave=False, disable=None):
        clip = torch.randint(len(pack), (batch,))
        pair = [clip * per_clip + torch.randint(per_clip, (batch,)) for _ in "ab"]  # two frames a person
        rows = torch.stack(pair).flatten()
        x = pictures[rows].to(device)
        target = ((truth[rows] - truth.mean(0)) / truth.std(0)).to(device)
        # a generated frame is softer and a little off in colour: the probe must not mind
        grain = 0.04 * torch.randn(1, device=device) * torch.randn_like(x)
        tint = 0.05 * torch.randn(len(x), 3, 1, 1, device=device)
        x = x + grain + tint
        soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, soft, 0.7 * torch.rand(len(x), 1, 1, 1, device=device))
        read, who = probe(x)
        alike = same_person_loss(who[:batch], who[batch:], clip.to(device), probe.log_scale, probe.bias)
        loss = F.smooth_l1_loss(read, target) + 0.1 * alike
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        schedule.step()
    save_checkpoint(str(path), dict(kind="probe", format=1, networks=dict(probe=probe.state_dict())))
    return probe.eval()


# ---------------------------------------------------------------------------------------------------------------------
# the toy world: the control table

def person_of(embeddings):
    """Embeddings (n, 64) of a clip's frames -> the person in it: their mean, of unit length (64,)"""
    return F.normalize(embeddings.mean(0), dim=0)


def talker(model, device):
    """A network -> the function that the tables measure, which a model of any other making can be, too:
    face uint8 (H, W, 3), wav (n,) at 16 kHz, driving uint8 (T, H, W, 3) or None -> clip (T, 3, H, W) in [-1, 1]."""

    def talk(face, wav, driving=None):
        mel = torch.from_numpy(mel_windows(log_mel(wav), range(n_frames(len(wav))))).to(device)
        moving = to_tensor(driving).to(device) if driving is not None else None
        return torch.cat(list(model.animate(to_tensor(face).to(device), mel, moving)))

    return talk


def control_table(talk, probe, pack, truth, device) -> dict:
    """Trials of A's face, B's sound and C's head: every clip is A once, B once, C once.

    Args:
        talk: what makes a clip of face, sound and driving frames, as `talker` returns it.
        pack, truth: clips of equal length T of n people, truth (n, T, 10).

    Returns:
        name -> number; correlations are over all frames of all trials.
    """
    n = len(pack)
    shown, who = [], []
    for a in tqdm(range(n), desc="trials", leave=False, disable=None):
        b, c = (a + 1) % n, (a + 2) % n
        clip = talk(pack.frame(a, 0), pack.sound(b), pack.frames(c, range(pack.n_frames[c])))
        read, embedding = probe.readings(clip)
        shown.append(read.cpu().numpy())
        who.append(person_of(embedding).cpu())
    shown = np.stack(shown)                                                       # (n, T, 10): of trial a
    sound, driving = np.roll(truth, -1, 0), np.roll(truth, -2, 0)                 # of B and C
    wrong = np.roll(truth, -4, 0)                                                 # of a sound that was not given
    i = {name: FACTORS.index(name) for name in FACTORS}

    def r(name, of):
        return correlation(shown[..., i[name]], of[..., i[name]])

    real = [probe.readings(to_tensor(pack.frames(c, range(pack.n_frames[c]))).to(device)) for c in range(n)]
    gallery = torch.stack([person_of(e[::5]).cpu() for _, e in real])
    table = {f"{name}": r(name, sound) for name in ("open", "wide")}
    table |= {"wrong sound": r("open", wrong), "driving mouth": r("open", driving)}
    table |= {name: r(name, driving) for name in ("yaw", "pitch", "roll", "blink")}
    table["gaze"] = (r("gaze_x", driving) + r("gaze_y", driving)) / 2
    table["identity"] = retrieval(torch.stack(who), gallery)
    table["open range"] = float(shown[..., i["open"]].std() / sound[..., i["open"]].std())
    return table


def probe_row(probe, pack, truth, device) -> dict:
    """The probe's own accuracy on real frames of the same people: what a perfect network would reach."""
    clips = (to_tensor(pack.frames(c, range(pack.n_frames[c]))) for c in range(len(pack)))
    read, who = zip(*(probe.readings(clip.to(device)) for clip in clips))
    read = torch.stack(read).cpu().numpy()
    i = {name: FACTORS.index(name) for name in FACTORS}
    row = {name: correlation(read[..., i[name]], truth[..., i[name]]) for name in READ}
    row["gaze"] = (row.pop("gaze_x") + row.pop("gaze_y")) / 2
    halves = [torch.stack([person_of(e[first::10]).cpu() for e in who]) for first in (0, 5)]
    wrong = np.roll(truth, -3, 0)                                                 # two utterances with nothing in common
    row |= {"wrong sound": correlation(read[..., i["open"]], wrong[..., i["open"]]), "driving mouth": 0.0}
    row["identity"] = retrieval(*halves)
    row["open range"] = float(read[..., i["open"]].std() / truth[..., i["open"]].std())
    return row


def change_matrix(talk, probe, pack, truth, device, trials: int = 8, T: int = 50, first_person: int = TEST) -> dict:
    """Change one input, see what else moves.

    Each clip is generated twice, with one input replaced between the two: the face, the sound, or one group of factors of
    the driving clip, which is drawn again with only that group taken from another clip. A cell is the r.m.s. difference
    of the readings between the two, over that of two unrelated real clips: 1 on the diagonal and 0 elsewhere is
    perfect. For the eyes, which move little of the time, r.m.s. is over all frames alike.
    """
    groups = dict(pose=("yaw", "pitch", "roll"), eyes=("blink", "gaze_x", "gaze_y"), mouth=("open", "wide", "smile"))
    columns = dict(lips=("open", "wide"), pose=groups["pose"], eyes=groups["eyes"])
    n = len(pack)

    def drive(c, group=None, other=None):
        """Driving frames of clip c, with the factors of one group from another clip"""
        states = truth[c, :T].copy()
        if group:
            rows = [FACTORS.index(name) for name in groups[group]]
            states[:, rows] = truth[other, :T, rows].T
        who = person(first_person + c)
        return np.stack([draw(who, dict(zip(FACTORS, map(float, s))), pack.size) for s in states])

    def unrelated(names):
        """R.m.s. difference of two unrelated real clips, each factor in units of its deviation"""
        squares = [np.mean(np.square(truth[c, :T, i] - truth[(c + 5) % n, :T, i]) / truth[..., i].var())
                   for c in range(n) for i in map(FACTORS.index, names)]
        return np.sqrt(np.mean(squares))

    rows = {name: {k: [] for k in (*columns, "identity")} for name in ("face", "sound", "pose", "eyes", "mouth")}
    norm = {k: unrelated(names) for k, names in columns.items()}
    apart = np.mean([1 - float(a @ b) for a, b in zip(*people_apart(probe, pack, device))])
    for c in tqdm(range(trials), desc="one change at a time", leave=False, disable=None):
        a, b, other = (c + 1) % n, (c + 2) % n, (c + 5) % n
        face, sound, base_drive = pack.frame(a, 0), pack.sound(b)[:640 * T], drive(c)
        base = probe.readings(talk(face, sound, base_drive))
        variants = dict(face=(pack.frame(other, 0), sound, base_drive),
                        sound=(face, pack.sound(other)[:640 * T], base_drive))
        variants |= {g: (face, sound, drive(c, g, other)) for g in groups}
        for name, inputs in variants.items():
            read, who = probe.readings(talk(*inputs))
            for k, names in columns.items():
                cols = [FACTORS.index(f) for f in names]
                diff = (read - base[0])[:, cols].cpu().numpy() / truth[..., cols].reshape(-1, len(cols)).std(0)
                rows[name][k].append(np.sqrt(np.square(diff).mean()) / norm[k])
            cosine = float((person_of(who) * person_of(base[1])).sum())
            rows[name]["identity"].append((1 - cosine) / apart)
    return {name: {k: float(np.mean(v)) for k, v in row.items()} for name, row in rows.items()}


def people_apart(probe, pack, device):
    """Embeddings of clips (n, 64) and the same rolled by five: two strangers a row"""
    clips = (to_tensor(pack.frames(c, range(0, 50, 10))) for c in range(len(pack)))
    people = torch.stack([person_of(probe.readings(clip.to(device))[1]).cpu() for clip in clips])
    return people, people.roll(-5, 0)


@torch.no_grad()
def inversion_table(model, probe, pack, device, frames: int = 4) -> dict:
    """People never seen as the generator makes them from their codes, with its own weights and with those that the
    hypernetwork changes for each of them, after 1, 2, .. refinements: L1 in grey levels (of 255), and the cosine of the
    probe's embeddings."""
    rows = {}
    for c in range(len(pack)):
        seen = np.linspace(0, pack.n_frames[c] - 1, frames).astype(int)
        real = to_tensor(pack.frames(c, seen)).to(device)
        z, deltas = model.invert(real), None
        for n in range(1 + (model.config.refine if model.hyper else 0)):
            deltas = model.refine(real, z, deltas) if n else None
            fake = model.decode(z, deltas).clamp(-1, 1)
            same = (probe(fake)[1] * probe(real)[1]).sum(1).mean()
            rows.setdefault(f"{n} refinements" if n else "the generator's own weights", []).append(
                (255 * l1(to_uint8(fake), to_uint8(real)).mean(), float(same)))
    return {name: dict(zip(("L1", "identity"), np.mean(values, 0))) for name, values in rows.items()}


def markdown(rows: dict) -> str:
    """{row name: {column: number, or text}} -> a table"""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [row[c] if isinstance(row[c], str) else f"{row[c]:.2f}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def toy_report(args, device):
    if args.people < 6:
        raise InputError(f"--people {args.people}: at least 6, so that the people of a trial and the strangers differ")
    if args.json:
        check_output(args.json, overwrite=True)                                   # before minutes of work
    models = {path: load_model(path, device, ("weights", "stage3", "stage2")) for path in args.toy}
    sizes = {m.config.size for m in models.values()}
    if any(m.config.template != "toy" for m in models.values()):
        raise InputError("--toy: a network of real faces has no truth to be measured by")
    folder, report = Path(args.cache), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--cache {folder}: cannot be made a directory ({error.strerror})") from None
    for size in sorted(sizes):
        probe = train_probe(size, folder, device)
        toys = folder / f"test_toys{size}_{args.people}"
        make_pack(toys, size, args.people, 3.0, args.first_person, os.cpu_count())
        pack = Pack(toys)
        truth = np.load(toys / "truth.npy").reshape(len(pack), -1, 10)
        inverters = {path: m for path, m in models.items() if m.config.size == size}
        for path, m in inverters.items():
            table = inversion_table(m, probe, pack, device)
            print(f"{path}: pictures of people never seen, from their codes alone\n" + markdown(table) + "\n")
            report[path + " inversion"] = table
        mine = {path: m for path, m in inverters.items() if m.kind != "stage2"}       # that can talk
        if not mine:
            continue
        rows = {f"real frames, {size} px (the probe's ceiling)": probe_row(probe, pack, truth, device)}
        rows |= {path: control_table(talker(m, device), probe, pack, truth, device) for path, m in mine.items()}
        order = list(next(iter(r for k, r in rows.items() if k in mine)))
        print(markdown({name: {k: row[k] for k in order} for name, row in rows.items()}))
        report |= rows
        for path, m in mine.items():
            matrix = change_matrix(talker(m, device), probe, pack, truth, device, first_person=args.first_person)
            print(f"\n{path}: change one input (row), see what moves (column)\n" + markdown(matrix) + "\n")
            report[path + " matrix"] = matrix
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
