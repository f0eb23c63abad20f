"""Several processes train like one process with all their batches, and end together. They run this file as a script."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import initialise  # noqa: E402
import judges  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from checkpoint import RANK, WORLD_SIZE, load_checkpoint, save_checkpoint  # noqa: E402
from data import batches  # noqa: E402
from fusion import FCTFG, Config  # noqa: E402
from media import InputError, run  # noqa: E402
from stylegan2 import Discriminator  # noqa: E402
from syncnet import SyncNet  # noqa: E402
from toyfaces import make_pack  # noqa: E402

# stage and options of the runs, with the batch of a process; 20 of stage 3 are four windows of five frames. Terms that
# depend on which images share a batch are left out: features (relative to their mean size), the sync loss's contrast
# among sounds (see `process`), the target of path length in accumulated batches. At the usual rates of a GAN a difference
# of rounding grows tenfold a step.
RUNS = dict(one=(1, "--batch 8 --lr-gan 4e-4 --w path=2"), flat=(1, "--batch 8 --lr-gan 4e-4 --w path=0"),
            two=(2, "--batch 8 --w feat=0 adv=0.01"), three=(3, "--batch 20 --w feat=0"))
CASES = dict(single=RUNS, double=["one", "two", "three"], micro=["flat", "two"], nan=["flat"], killed=["flat"])
STEPS = 5


DIAL = Config.at


def few_channels(size, **changes):
    few = dict(dim=32, n_mlp=2, base=256, cap=32, encoder_width=8, linear=24, map_code=16)
    return DIAL(size, **(few | changes))


def process(folder: Path, cases: list, patch: pytest.MonkeyPatch):
    """Trains every stage. Random numbers in the loop are rows of those of the whole batch."""
    now = dict(step=0, call=0)
    check = train.terms_to_floats

    def rows(*shape, **_):
        n, draws = WORLD_SIZE * now["micro"], torch.Generator().manual_seed(now["step"])
        return torch.empty(shape[0] * n, *shape[1:]).normal_(generator=draws)[now["first"]::n]

    def drawn(forward):
        def wrapped(model, batch):
            if now["call"] == now["step"] == 0:
                (folder / now["case"] / f"seed{RANK}").write_text(str(torch.initial_seed()))
            torch.manual_seed(now["step"])
            now.update(call=now["call"] + 1, first=RANK + WORLD_SIZE * (now["call"] % now["micro"]))
            with pytest.MonkeyPatch.context() as inside:
                inside.setattr(torch, "randn", rows)
                return forward(model, batch)
        return wrapped

    def checked(terms, step):
        now.update(step=step + 1, call=0)
        if RANK == 1 and step == 2 and now["case"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if RANK == 1 and step == 2 and now["case"] == "nan":
            terms["d"] = terms["d"] * torch.nan
        return check(terms, step)

    patch.setattr(train, "terms_to_floats", checked)
    patch.setattr(train, "STAGES", {k: (drawn(forward), terms) for k, (forward, terms) in train.STAGES.items()})
    patch.setattr(train, "LOG_EVERY", 1)
    for room, name in ((train, "save_examples"), (train, "write_report"), (checkpoint, "write_report")):
        patch.setattr(room, name, lambda *_: None)
    patch.setattr(torch, "randn_like", lambda x: rows(*x.shape))                                   # of path length
    patch.setattr(losses, "sync_loss", lambda expert, frames, mel: F.softplus(
        -expert.logits(expert.face(frames), expert.sound(mel)).diagonal()).mean())
    patch.setattr(Config, "at", few_channels)
    torch.manual_seed(4)
    patch.setattr(initialise, "train_judge", lambda *_: judges.SmallFaceJudge(width=32))
    patch.setattr(initialise, "fit_encoder",
                  lambda model, *_: torch.nn.init.normal_(model.encoder.linear_up.weight, std=0.01))
    jobs = [(case, name) for case in cases for name in CASES[case]]
    for case, name in jobs:
        stage, options = RUNS[name]
        now.update(step=0, call=0, case=case, micro=2 if case == "micro" else 1)
        if case == "single":
            options = re.sub("--batch (\\d+)", lambda found: f"--batch {2 * int(found[1])}", options)
        try:
            train.main([
                "--stage", str(stage), "--data", str(folder / "toys"), "--out", str(folder / case / name),
                "--size", "16", "--init", str(folder / f"init{stage}.pt"), "--expert", str(folder / "sync.pt"),
                "--device", "cpu", "--steps", str(STEPS), "--augment", "-1", "--accumulate", str(now["micro"]),
                *options.split()])
        except InputError as error:
            if case != "nan":
                raise
            (folder / case / f"error{RANK}").write_text(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pack, random networks in place of earlier stages, and an untrained sync expert"""
    folder = tmp_path_factory.mktemp("ranks")
    make_pack(folder / "toys", 16, people=6, seconds=0.6, first_seed=50)
    torch.manual_seed(0)
    net = dict(size=16, dim=32, width=0.125)
    save_checkpoint(folder / "sync.pt", dict(kind="syncnet", format=1, config=dict(net=net, template="toy"),
                                             networks=dict(expert=SyncNet(**net).state_dict())))
    config = few_channels(16, hyper="none")
    model, D = FCTFG(config).state_dict(), Discriminator(16, config.base, config.cap).state_dict()
    for stage in (2, 3):
        save_checkpoint(folder / f"init{stage}.pt", dict(
            kind=f"stage{stage - 1}", format=1, config=vars(config), ema=dict(model=model), networks=dict(D=D)))
    return folder


def start(folder, cases, world=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    return [subprocess.Popen([sys.executable, __file__, str(folder), *cases], env=env | dict(RANK=str(r)), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) for r in range(world)]


def finish(processes):
    outputs = [process.communicate(timeout=240) for process in processes]
    return [p.returncode for p in processes], [out for out, _ in outputs], [err.strip() for _, err in outputs]


@pytest.fixture(scope="module")
def runs(folder):
    """Runs of one process, and of two processes, the second of which is finally killed -> folder, stdouts, stderrs"""
    two, threads = start(folder, ("double", "nan", "killed")), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        process(folder, ("single", "micro"), patch)
    torch.set_num_threads(threads)
    codes, outs, errors = finish(two)
    assert codes == [2, -signal.SIGKILL], errors
    return folder, outs, errors


def assert_close_runs(folder, case, name):
    """Compares every logged term and the weights of every network."""
    stage = RUNS[name][0]
    logs = [(folder / c / name / f"log_stage{stage}.jsonl").read_text().splitlines()[1:] for c in ("single", case)]
    for a, b in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert a.keys() == b.keys()
        for term in a.keys() - {"ms", "images_s", "waiting", "gib"}:
            assert b[term] == pytest.approx(a[term], rel=1e-3, abs=1e-6), (a["step"], term)
    a, b = (load_checkpoint(folder / c / name / f"stage{stage}.pt", f"stage{stage}") for c in ("single", case))
    assert a["images"] == b["images"] and a["step"] == b["step"] == STEPS
    for x, y in ((a["networks"], b["networks"]), (a["ema"], b["ema"])):
        for network in x:
            for part in {k.partition(".")[0] for k in x[network]}:
                w, v = (torch.cat([p.flatten().float() for k, p in state[network].items() if k.startswith(part)])
                        for state in (x, y))
                assert (w - v).norm() <= 2e-4 * w.norm(), (network, part)


@pytest.mark.parametrize("name", CASES["double"])
def test_two_processes_follow_one_process_with_twice_the_batch(name, runs):
    assert_close_runs(runs[0], "double", name)


@pytest.mark.parametrize("name", CASES["micro"])
def test_two_accumulated_batches_follow_one_batch_of_twice_the_size(name, runs):
    assert_close_runs(runs[0], "micro", name)


def test_processes_use_different_seeds(runs):
    assert (runs[0] / "double" / "seed0").read_text() == "0" != (runs[0] / "double" / "seed1").read_text()


def test_each_item_goes_to_one_process():
    dealt = [next(batches(range(99), 3, 2, 0, rank, 2)).tolist() for rank in (0, 1)]  # step 1 ended with item 11
    assert dealt == [[12, 14, 16], [13, 15, 17]]


def test_a_nan_in_one_process_ends_both_processes_with_one_line(runs):
    lines = [(runs[0] / "nan" / f"error{rank}").read_text() for rank in (0, 1)]
    assert all("step 2: the loss term 'd' is nan" in line for line in lines)


def test_when_one_process_is_killed_the_other_ends(runs):
    _, outs, errors = runs
    assert not outs[1]                                                       # only process 0 prints
    assert "torchrun: another process of this run has ended" in errors[0].splitlines()[-1]


if __name__ == "__main__":
    run(lambda: process(Path(sys.argv[1]), sys.argv[2:], pytest.MonkeyPatch()))
