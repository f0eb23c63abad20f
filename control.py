"""The toy world's control table: change one of identity, lips, pose and eyes, and measure what else moves. Ours.

The face of person A gets the speech of B and the head and eyes of C, three people that are in no training set. A probe, a
small network trained on drawn frames of other people, measures every factor in the frames. The first row of the table is
the probe on real frames, the upper bound for generated frames.

    python evaluate.py toy weights/toy.pt          # both tables, 10 minutes on two slow cores

Axes: n people (one clip and one trial each), T frames, N images, 10 factors in the order of toyfaces.FACTORS.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from audio import log_mel, lws_mel, mel_windows, n_frames
from checkpoint import load_checkpoint, load_frozen, save_checkpoint
from data import Pack
from fusion import load_model
from judges import same_person_loss
from media import SAMPLES_PER_FRAME, InputError, check_output, make_folder, to_tensor
from report import markdown_table, write_toy_page
from toyfaces import FACTORS, TEST_SEED, WORLD_VERSION, draw, make_pack, make_person

FACTOR_INDEX = {name: i for i, name in enumerate(FACTORS)}
GROUPS = dict(pose=("yaw", "pitch", "roll"), eyes=("blink", "gaze_x", "gaze_y"), mouth=("open", "wide", "smile"))
TEST_PEOPLE = 32  # held-out people, at least 6: change_matrix compares clips c and c + 5
CACHE = "out/evaluate"  # folder for the probe and these people's clips
MATRIX_COLUMNS = dict(lips=("open", "wide"), pose=GROUPS["pose"], eyes=GROUPS["eyes"])  # the last column is identity


# ------------------------------------------------------------------------------------------------------------ the probe

PROBE_PEOPLE = 4_000_000  # seed of the probe's first training person, outside TRAIN_SEED, TUNE_SEED and TEST_SEED


class Probe(nn.Module):
    """Images (N, 3, H, W) -> factors (N, 10) in units of their standard deviation, identity embeddings (N, 64)."""

    def __init__(self, size: int, width: int = 24):
        super().__init__()
        self.body, c_in = nn.Sequential(), 3
        for i, c in enumerate((width, 2 * width, 4 * width, 4 * width)):
            stride = 2 if i or size > 32 else 1
            self.body.append(nn.Sequential(nn.Conv2d(c_in, c, 3, stride, 1), nn.GroupNorm(8, c), nn.ReLU(),
                                           nn.Conv2d(c, c, 3, 1, 1), nn.GroupNorm(8, c), nn.ReLU()))
            c_in = c
        self.factors = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(4 * width * 16, 256), nn.ReLU(),
                                     nn.Linear(256, 10))
        self.embedding = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(4 * width * 16, 64))
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-4.0))
        self.register_buffer("mean", torch.zeros(10))
        self.register_buffer("std", torch.ones(10))

    def forward(self, x):
        h = self.body(x.contiguous(memory_format=torch.channels_last))
        return self.factors(h), F.normalize(self.embedding(h), dim=1)

    @torch.inference_mode()
    def measure(self, images, batch=128):
        """Images (N, 3, H, W) in [-1, 1] -> factors (N, 10) in their own units, embeddings (N, 64) of unit length."""
        outputs = [self(chunk) for chunk in images.split(batch)]
        factors, embeddings = (torch.cat(chunks) for chunks in zip(*outputs))
        return factors * self.std + self.mean, embeddings


def train_probe(size: int, folder: Path, device, people: int = 800, steps: int = 1800, batch: int = 32) -> Probe:
    """The probe in this folder, trained on drawn frames on first use (about a minute)."""
    path = folder / f"probe{size}_world{WORLD_VERSION}.pt"
    if path.exists():
        state = load_checkpoint(path, "probe")["networks"]["probe"]
        return load_frozen(lambda: Probe(size), state, path, device).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    probe = Probe(size).to(device, memory_format=torch.channels_last)
    pack_folder = folder / f"probe_toys{size}"
    make_pack(pack_folder, size, people, 0.8, PROBE_PEOPLE)
    pack, truth = Pack(pack_folder), torch.from_numpy(np.load(pack_folder / "truth.npy"))
    images = torch.cat([to_tensor(pack.frames(c, range(pack.n_frames[c]))) for c in range(people)])
    probe.mean.copy_(truth.mean(0))
    probe.std.copy_(truth.std(0))
    truth = (truth - truth.mean(0)) / truth.std(0)
    T = len(images) // people
    opt = torch.optim.Adam(probe.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="probe", leave=False, disable=None):
        clip = torch.randint(people, (batch,))
        rows = torch.cat([clip * T + torch.randint(T, (batch,)) for _ in range(2)])  # two frames of each clip
        x, target = images[rows].to(device), truth[rows].to(device)
        # augmentation: generated frames are softer than real ones, a little noisy and off in colour
        noise = 0.04 * torch.randn(1, device=device) * torch.randn_like(x)
        x = x + noise + 0.05 * torch.randn(len(x), 3, 1, 1, device=device)
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, blurred, 0.7 * torch.rand(len(x), 1, 1, 1, device=device))
        factors, embeddings = probe(x)
        same = same_person_loss(*embeddings.split(batch), clip.to(device), probe.log_scale, probe.bias)
        loss = F.smooth_l1_loss(factors, target) + 0.1 * same
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        schedule.step()
    save_checkpoint(str(path), dict(kind="probe", networks=dict(probe=probe.state_dict())))
    return probe.eval()


# ----------------------------------------------------------------------------- held-out clips, and networks to test

class ToyTest(NamedTuple):
    """The probe, and a clip of T frames of each of n held-out people, with the ground truth (n, T, 10)."""

    probe: Probe
    pack: Pack
    truth: np.ndarray
    device: torch.device

    def measure(self, images):
        """A clip (T, 3, H, W) in [-1, 1] -> factors (T, 10) in NumPy, mean embedding (64,) of unit length."""
        factors, embeddings = self.probe.measure(images)
        return factors.cpu().numpy(), F.normalize(embeddings.mean(0), dim=0).cpu()

    def measure_real(self, c: int, frames=slice(None)):
        """The same for clip c, or a slice of its frames."""
        return self.measure(to_tensor(self.pack.frames(c, range(self.pack.n_frames[c])[frames])).to(self.device))


def animator(model, device):
    """A network of fusion.py or pcavs.py -> the function that the tables measure: face uint8 (H, W, 3), wav (samples,)
    at 16 kHz, driving uint8 (T, H, W, 3) -> clip (T, 3, H, W) in [-1, 1]. Wrap any other model in the same way."""

    def animate(face, wav, driving):
        n, face, driving = n_frames(len(wav)), to_tensor(face).to(device), to_tensor(driving).to(device)
        if model.kind == "pcavs":
            return torch.cat(list(model.animate(face, lws_mel(wav), n, driving)))
        mel = torch.from_numpy(mel_windows(log_mel(wav), range(n))).to(device)
        return torch.cat(list(model.animate(face, mel, driving)))

    return animate


def load_network(path, device):
    """A network of the toy world. InputError: another kind of checkpoint, or a network of real faces."""
    if load_checkpoint(path, ("weights", "stage3", "pcavs"))["kind"] == "pcavs":
        from pcavs import load_pcavs  # here, since importing face_alignment takes seconds

        model = load_pcavs(path, device)
    else:
        model = load_model(path, device)
    if model.config.template != "toy":
        raise InputError(f"{path}: a network of real faces, for which there is no ground truth")
    return model


# ---------------------------------------------------------------------------------------------------- the control table

def correlation(a, b) -> float:
    """Pearson's r of two curves of the same shape, over all axes. It is 0 if one of them is constant."""
    a, b = np.ravel(a), np.ravel(b)
    return float(np.corrcoef(a, b)[0, 1]) if min(np.ptp(a), np.ptp(b)) > 1e-9 else 0.0


def partial_correlation(a, b, profile) -> float:
    """Correlation of two curves (T,) after the mean profile of all clips (silence, words, silence) is removed."""
    n = min(len(a), len(profile))
    a, b, profile = a[:n], b[:n], profile[:n]
    ab, ap, bp = correlation(a, b), correlation(a, profile), correlation(b, profile)
    return (ab - ap * bp) / max(np.sqrt(max(0, (1 - ap**2) * (1 - bp**2))), 1e-9)


def retrieval(queries, gallery) -> float:
    """Share of the queries (n, E) whose nearest neighbour in the gallery (n, E), by cosine, is in the same row."""
    return float(((queries @ gallery.t()).argmax(1) == torch.arange(len(queries))).float().mean())


def table_row(factors, speech, driving, unrelated, identity: float) -> dict:
    """Measured factors; the true ones of clips that gave speech, driving frames, no input; each (n, T, 10) -> a row."""
    def r(name, truth):
        return correlation(factors[..., FACTOR_INDEX[name]], truth[..., FACTOR_INDEX[name]])

    opening = FACTOR_INDEX["open"]
    return {"open": r("open", speech), "wide": r("wide", speech), "wrong sound": r("open", unrelated),
            "driving mouth": r("open", driving), **{name: r(name, driving) for name in (*GROUPS["pose"], "blink")},
            "gaze": (r("gaze_x", driving) + r("gaze_y", driving)) / 2, "identity": identity,
            "open range": float(factors[..., opening].std() / speech[..., opening].std())}


def control_table(animate, test: ToyTest) -> dict:
    """The row of a network. In trial a, person a gives the face, a + 1 the sound, and a + 2 the head."""
    n, pack, measured = len(test.pack), test.pack, []
    for a in tqdm(range(n), desc="trials", leave=False, disable=None):
        head = (a + 2) % n
        clip = animate(pack.frame(a, 0), pack.sound((a + 1) % n), pack.frames(head, range(pack.n_frames[head])))
        measured.append(test.measure(clip))
    factors, embeddings = zip(*measured)
    gallery = [test.measure_real(a, slice(0, None, 5))[1] for a in range(n)]
    speech, driving, unrelated = (np.roll(test.truth, -k, 0) for k in (1, 2, 4))
    identity = retrieval(torch.stack(embeddings), torch.stack(gallery))
    return table_row(np.stack(factors), speech, driving, unrelated, identity)


def probe_row(test: ToyTest) -> dict:
    """The row of the probe on real frames of the same people, the result of a perfect network."""
    clips = range(len(test.pack))
    factors = np.stack([test.measure_real(c)[0] for c in clips])
    queries, gallery = (torch.stack([test.measure_real(c, slice(k, None, 10))[1] for c in clips]) for k in (0, 5))
    unrelated = np.roll(test.truth, -3, 0)
    row = table_row(factors, test.truth, test.truth, unrelated, retrieval(queries, gallery))
    return row | {"driving mouth": 0.0}  # real clips have no driving clip


# ------------------------------------------------------------------------------------------------ the matrix of changes

def driving_frames(test: ToyTest, c: int, T: int, group: str = "", other: int = 0) -> np.ndarray:
    """Clip c drawn again, with one group of factors taken from clip `other` -> uint8 (T, H, W, 3)."""
    factors, drawn_person = test.truth[c, :T].copy(), make_person(TEST_SEED + c)
    for name in GROUPS.get(group, ()):
        factors[:, FACTOR_INDEX[name]] = test.truth[other, :T, FACTOR_INDEX[name]]
    return np.stack([draw(drawn_person, dict(zip(FACTORS, row)), test.pack.size) for row in factors.tolist()])


def change_matrix(animate, test: ToyTest, trials: int = 8, T: int = 50) -> dict:
    """{changed input: {group of factors: how far it moves}}. Each clip is generated twice, the second time with one input
    replaced: the face, the sound, or one group of factors of the driving clip. A cell is the r.m.s. difference of the two
    clips over that of two unrelated real clips. Perfect is 1 for the group that belongs to the input, else 0."""
    n, pack, truth = len(test.pack), test.pack, test.truth
    deviation = truth.reshape(-1, 10).std(0)

    def difference(a, b):
        """Factors (T, 10) twice -> r.m.s. difference of each group (3,), in units of the factors' deviation."""
        squares = np.square((a - b) / deviation)
        return np.sqrt([squares[:, [FACTOR_INDEX[name] for name in names]].mean() for names in MATRIX_COLUMNS.values()])

    unrelated = [difference(truth[c, :T], truth[(c + 5) % n, :T]) for c in range(n)]
    unrelated = np.sqrt(np.square(unrelated).mean(0))  # (3,)
    people = torch.stack([test.measure_real(c, slice(0, T, 10))[1] for c in range(n)])
    unrelated_people = float(1 - (people * people.roll(-5, 0)).sum(1).mean())  # cosine distance of two people
    rows = {name: [] for name in ("face", "sound", *GROUPS)}
    for c in tqdm(range(min(trials, n)), desc="one change at a time", leave=False, disable=None):
        a, b, other = (c + 1) % n, (c + 2) % n, (c + 5) % n
        face, sound, driving = pack.frame(a, 0), pack.sound(b)[: SAMPLES_PER_FRAME * T], driving_frames(test, c, T)
        variants = dict(face=(pack.frame(other, 0), sound, driving),
                        sound=(face, pack.sound(other)[: SAMPLES_PER_FRAME * T], driving))
        variants |= {group: (face, sound, driving_frames(test, c, T, group, other)) for group in GROUPS}
        factors, embedding = test.measure(animate(face, sound, driving))
        for name, inputs in variants.items():
            new_factors, new_embedding = test.measure(animate(*inputs))
            identity = (1 - float(embedding @ new_embedding)) / unrelated_people
            rows[name].append([*difference(new_factors, factors) / unrelated, identity])
    return {name: dict(zip((*MATRIX_COLUMNS, "identity"), np.mean(cells, 0).tolist())) for name, cells in rows.items()}


def measure_toy(args, device):
    """`python evaluate.py toy WEIGHTS ..`: prints the control table, and the matrix of each network."""
    json_path = args.json and check_output(args.json, True, (".json",))  # fails before minutes of work
    models, report = {path: load_network(path, device) for path in args.weights}, {}
    for size in sorted({model.config.size for model in models.values()}):
        folder = make_folder(CACHE)
        probe, pack_folder = train_probe(size, folder, device), folder / f"test_toys{size}_{TEST_PEOPLE}"
        make_pack(pack_folder, size, TEST_PEOPLE, 3.0, TEST_SEED)
        truth = np.load(pack_folder / "truth.npy").reshape(TEST_PEOPLE, -1, 10)
        test = ToyTest(probe, Pack(pack_folder), truth, device)
        rows = {f"real frames, {size} px (the probe's ceiling)": probe_row(test)}
        animators = {path: animator(m, device) for path, m in models.items() if m.config.size == size}
        rows |= {path: control_table(animate, test) for path, animate in animators.items()}
        print(markdown_table(rows))
        report |= rows
        for path, animate in animators.items():
            matrix = report[f"{path} matrix"] = change_matrix(animate, test)
            print(f"\n{path}: change one input (row), see what moves (column)\n{markdown_table(matrix)}\n")
    if json_path:
        json_path.write_text(json.dumps(report, indent=1))
        write_toy_page(json_path, report, args.weights)
