"""Files of weights, and what every training script does around its loop.

Checkpoints are plain dicts of tensors, numbers and strings, written to a temporary name and renamed, and read with
weights_only=True. Published weights are fetched on first use into $TORCH_HOME/hub/checkpoints (default ~/.cache/torch),
pinned by SHA256.
"""

import argparse
import atexit
import contextlib
import copy
import ctypes
import functools
import hashlib
import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from torch import distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from media import InputError, atomic_write, check_file, check_output, make_folder
from report import PACE_KEYS, describe_pace, machine_name, write_report

FORMAT = 1                   # of packs and checkpoints
STALE = 3600                 # seconds; ours: no save takes an hour, an older temporary file is a killed run's
FREE_NUMBERS = 1 << 26       # numbers (256 MB) that any network may have beside those in its file
LARGEST_SIZE = 1 << 16       # ours: more than any size in a network's config; StyleGAN2's channels start at half of it


# ------------------------------------ reading: nothing in a file is trusted, and what is wrong with it is one line

@contextlib.contextmanager
def wrap_errors(source, what: str):
    """For a block that reads a file's content: any exception in it becomes an InputError, one line"""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(f"{source}: {what} ({one_line(reason)})") from error


def one_line(text) -> str:
    """The beginning of a name or message that comes from a file"""
    return " ".join(str(text)[:120].split())


def read_weights(path: str | Path) -> dict:
    """The dict in a file of weights, published or our own, on the CPU. Code in it is never run. InputError: damaged, cut
    short, or more than tensors and plain values; not a dict with names; a tensor in it, however deep, is not dense."""
    path = check_file(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # options: plain values
            warnings.simplefilter("ignore")                                            # torch asks to report odd files
            content = torch.load(path, "cpu", weights_only=True)
    except Exception as error:                                                         # torch has no type of its own
        code = "global" in str(error).lower()                                          # it names a class or function
        reason = "holds more than tensors and plain values" if code else "damaged, cut short, or not a file of weights"
        raise InputError(f"{path}: {reason} ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dict of names and weights")
    if not all(is_dense(item) for item in iterate_nested(content) if isinstance(item, torch.Tensor)):
        raise InputError(f"{path}: holds a tensor that is sparse or lacks its numbers, expected dense ones")
    return content


def iterate_nested(content):
    """Everything in nested dicts, lists and tuples, each once: a file may hold a list that holds itself"""
    todo, seen = [content], set()
    while todo:
        item = todo.pop()
        if id(item) not in seen:
            seen.add(id(item))
            yield item
            todo += item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()


def is_dense(value) -> bool:
    """Whether this is a plain tensor that holds all its numbers. Others (sparse, meta, of stride or size 0) take a
    few bytes in a file and ask for any size in memory."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided
            and not (value.is_nested or value.is_quantized or value.is_meta)
            and value.numel() >= max(value.shape, default=0)
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


class AllocationLimit(TorchFunctionMode):
    """Within it at most `left` numbers are made, else ValueError. (The meta device imports for 2 s.)"""

    FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye}

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.FACTORIES and args:
            self.left -= math.prod(args[0] if isinstance(args[0], (tuple, list)) else args)
            if self.left < 0:
                raise ValueError("more numbers than the file has")
        return func(*args, **(kwargs or {}))


def load_strictly(make, state: dict, source) -> nn.Module:
    """The network that make() builds, with a state dict's weights: dense tensors of its names, shapes and kinds. fp16
    becomes fp32. Batch counters of BatchNorm may be absent (files of 2017 have none). InputError: anything differs, or
    make(), which may take its widths from the file, fails."""
    def form(value):
        if not is_dense(value):
            return "no dense tensor"
        return f"{'' if value.is_floating_point() else f'{value.dtype} '}{tuple(value.shape)}"

    numbers = sum(value.numel() for value in iterate_nested(state) if is_dense(value))
    limit = AllocationLimit(2 * numbers + FREE_NUMBERS)
    with wrap_errors(source, "its sizes do not fit a network of this version"), limit:
        network = make()
    name = type(network).__name__
    if not isinstance(state, dict):
        raise InputError(f"{source}: holds a {type(state).__name__} in place of the weights of {name}")
    expected, given = ({key: form(value) for key, value in d.items()} for d in (network.state_dict(), state))
    wrong = [f"{key} is absent" for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    wrong += [f"{one_line(key)} is unknown" for key in given if key not in expected]
    wrong += [f"{k} is {given[k]}, expected {v}" for k, v in expected.items() if given.get(k, v) != v]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise InputError(f"{source}: not the weights of {name}: {wrong[0]}{more}")
    network.load_state_dict(state, strict=False)
    return network


def freeze(network: nn.Module) -> nn.Module:
    """No gradients for its parameters; eval mode, and train() keeps it there"""
    network.requires_grad_(False).eval()
    network.train = lambda mode=True: network
    return network


def load_frozen(make, state: dict, source, device) -> nn.Module:
    """load_strictly's network, frozen and on the device: for networks that are trained elsewhere"""
    return freeze(load_strictly(make, state, source)).to(device)


# ----------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path: str | Path, checkpoint: dict):
    """Writes plain dicts, tensors, numbers and strings, among them "kind" and "format". At any moment `path` is
    the old file or the whole new one. InputError: the disk is full, or cannot be written."""
    assert {"kind", "format"} <= set(checkpoint), "a checkpoint says its kind and format"
    path = Path(path).absolute()
    try:
        with atomic_write(path) as draft, open(draft, "wb") as file:
            for old in path.parent.glob(f".{path.name}-*"):
                if time.time() - old.stat().st_mtime > STALE:
                    old.unlink()
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())                       # else the name could survive a power cut, the content not
    except RuntimeError as error:                         # by which torch's own writer reports a full disk
        raise InputError(f"{path}: cannot be written ({one_line(error)})") from None


def load_checkpoint(path: str | Path, kind: str | tuple) -> dict:
    """A file of save_checkpoint, on the CPU. kind: the expected one, or a tuple of them. InputError: as
    read_weights; another kind or format. The caller checks what is inside."""
    kinds = (kind,) if isinstance(kind, str) else kind
    expected = f"expected a '{' or '.join(kinds)}' checkpoint"
    try:
        checkpoint = read_weights(path)
    except InputError as error:
        raise InputError(f"{error}; {expected}") from None
    found = checkpoint.get("kind")
    if not isinstance(found, str):
        raise InputError(f"{path}: was not written by this package; {expected}")
    if found not in kinds:
        raise InputError(f"{path}: is a '{found[:40]}' checkpoint; {expected}")
    if checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: has format {checkpoint.get('format')}, this version reads format {FORMAT}")
    sizes = [v for v in iterate_nested(checkpoint.get("config")) if isinstance(v, (int, float))]
    if not all(abs(size) <= LARGEST_SIZE for size in sizes):
        raise InputError(f"{path}: its config asks for more than any network here has; {expected}")
    return checkpoint


def save_run(path: str | Path, checkpoint: dict, args, networks: dict, optimisers: dict):
    """A checkpoint that also has all that the next step depends on, for --resume"""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    save_checkpoint(path, checkpoint | dict(
        format=FORMAT, args=vars(args), networks={k: v.state_dict() for k, v in networks.items()},
        optimisers={k: v.state_dict() for k, v in optimisers.items()}, rng=dict(torch=torch.get_rng_state(), cuda=cuda)))


def restore_run(path: str | Path, saved: dict, optimisers: dict):
    """Adam's moments and the random state as save_run saved them, at the rates of today's options"""
    with wrap_errors(path, "not a run of this version"):
        for name, opt in optimisers.items():
            state, groups = saved["optimisers"][name], opt.state_dict()["param_groups"]
            groups = [now | dict(params=then["params"]) for now, then in zip(groups, state["param_groups"], strict=True)]
            opt.load_state_dict(state | dict(param_groups=groups))
        torch.set_rng_state(saved["rng"]["torch"])
        if torch.cuda.is_initialized() and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])


def fp16_state_dict(network: nn.Module) -> dict:
    """A network's weights in fp16, for a file to sample with. A weight that two layers share stays one"""
    return copy.deepcopy(network).half().state_dict()


# --------------------------------------------------------------------------- published files, fetched on first use

class Published(NamedTuple):
    file: str               # its name in the cache
    sha256: str             # or the beginning of it
    urls: tuple[str, ...]


def pinned(sha256: str, *urls: str, file: str | None = None) -> Published:
    return Published(file or urls[0].rpartition("/")[2], sha256, urls)


LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/082bb24f84c091ea94de2867d34c4544f68e0963/lpips"
BLAZEFACE = "https://github.com/hollance/BlazeFace-PyTorch/raw/master"  # Apache-2.0; the anchors are those of both models
PUBLISHED = dict(
    vgg19=pinned("dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",             # 575 MB
        "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"),
    vgg16=pinned("397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",             # 553 MB
        "https://download.pytorch.org/models/vgg16-397923af.pth"),
    lpips_heads=pinned("a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        f"{LPIPS}/weights/v0.1/vgg.pth", file="lpips_v0.1_vgg.pth"),
    arcface=pinned("a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",           # 175 MB
        "https://github.com/xinntao/facexlib/releases/download/v0.1.0/recognition_arcface_ir_se50.pth"),
    syncnet_v2=pinned("961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",        # 55 MB
        "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
        "https://huggingface.co/ByteDance/LatentSync-1.6/resolve/main/auxiliary/syncnet_v2.model"),
    blazeface=pinned("54ecff653feaaaf1f7d44b6aff28fd2fc50e483a4e847563b6dd261369c43ba4", f"{BLAZEFACE}/blazeface.pth"),
    blazeface_anchors=pinned("a10bb2fb93ab54ca426d6c750bfc3aad685028a16dcf231357d03694f261fd95",
        f"{BLAZEFACE}/anchors.npy"),
    blazeface_back=pinned("e2c03bb3ae45e769eaaa0a7cc7d4f61f54a5e3fbae6367d870166702e7022b11",
        f"{BLAZEFACE}/blazefaceback.pth"),
    wav2lip_expert=pinned("9b9936c721696446eeed353032cab242a8cf0eed8c46cde540366f6ae5493be5",    # 197 MB; of one source
        "https://huggingface.co/camenduru/Wav2Lip/resolve/main/checkpoints/lipsync_expert.pth",
        "https://huggingface.co/Nekochu/Wav2Lip/resolve/main/lipsync_expert.pth"),
    # of these only the hash's beginning is known, from the file's name
    fan=pinned("11f355bf06", "https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar"),  # 100 MB
    inception=pinned("6726825d",                                                                 # 96 MB, FID's
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"))
TIMEOUT = 30                # seconds without a byte; ours


def checkpoints_dir() -> Path:
    """Where face-alignment and torch.hub keep weights: $TORCH_HOME/hub/checkpoints"""
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(name: str, path: str | Path | None = None) -> Path:
    """Where the file `name` of PUBLISHED lies: `path`, the user's own copy, or the cache, checked by SHA256 every
    time, fetched where it is missing. InputError: no file there; the download failed, with its URL"""
    if path is not None:
        return check_file(path)
    pin = PUBLISHED[name]
    target, failures, timeout = checkpoints_dir() / pin.file, [], socket.getdefaulttimeout()
    if found := target.is_file():
        with open(target, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest().startswith(pin.sha256):
                return target
    socket.setdefaulttimeout(TIMEOUT)
    try:
        for url in pin.urls:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(target), pin.sha256)
                return target
            except (OSError, HTTPException, RuntimeError) as error:    # no network, a full disk; a cut; another hash
                failures.append(f"{urlsplit(url).netloc}: {one_line(error)}")
    finally:
        socket.setdefaulttimeout(timeout)
    raise InputError(f"{pin.file} is {'damaged' if found else 'missing'} and could not be fetched "
                     f"({'; '.join(failures)}): download {pin.urls[0]} and save it as {target}")


# --------------------------------------------------------------------------------------------------------- devices

def pick_device(name: str) -> torch.device:
    """The device of --device: "auto" is cuda, else mps, else cpu"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")         # TF32, which its convolutions use by default
        torch.backends.cudnn.benchmark = True              # the shapes of a run are few
    return device


def keep_freed_memory():
    """glibc keeps freed memory for the next tensor. Else a tensor above 32 MB is mapped and zeroed anew each time:
    at 256 px that costs an elementwise operation twice the time of its work."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                                # M_MMAP_MAX: no mapping for one tensor
        libc.mallopt(-1, 2 ** 31 - 1)                      # M_TRIM_THRESHOLD: give nothing back


def peak_memory_gib(device) -> float:
    """The most memory used so far: the device's on a GPU, else the process's"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 2 ** 10                          # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# ------------------------------------------ around a training loop: train, syncnet, keypoints, landmarks and pcavs

def claim_output(path: str | Path, args) -> Path:
    """Absolute path of the checkpoint that a run writes, its folder made. InputError: it exists already"""
    path = make_folder(Path(path).parent) / Path(path).name
    if path.exists() and not (args.resume or args.overwrite):
        raise InputError(f"{path} exists: --resume continues it, --overwrite starts anew")
    return check_output(path, overwrite=True)


def git_revision() -> str | None:
    """The git commit of this folder, where there is one"""
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(Path(__file__).absolute().parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def open_log(path: str | Path, args):
    """A log of JSON lines, continued with --resume; the first line has the revision, versions and options"""
    log = open(path, "a" if args.resume else "w", 1)                                  # each line is written at once
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, machine=machine_name())
    log.write(json.dumps(dict(revision=git_revision(), **versions, args=vars(args)), default=str) + "\n")
    return log


def write_log(log, bar, line: dict, steps: int | None = None):
    """One line of the log: as JSON, in report.html, and above the progress bar, `name value` pairs | the pace"""
    log.write(json.dumps(line) + "\n")
    write_report(Path(log.name).parent)
    text = f"{line['step']:6d}  " + "  ".join(f"{k} {v:.3f}" for k, v in line.items() if k not in PACE_KEYS)
    bar.write(text + (f"  | {describe_pace(line, steps)}" if "ms" in line else ""))


class StepTimer:
    """Times the steps between two log lines, and the share of it spent waiting for the loader"""

    def __init__(self, device):
        self.device, self.waited, self.steps, self.start = device, 0.0, 0, time.perf_counter()

    def next_batch(self, stream) -> dict:
        """The next batch of a stream, on the device"""
        before = time.perf_counter()
        batch = next(stream)
        self.waited, self.steps = self.waited + time.perf_counter() - before, self.steps + 1
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def pace(self, batch: int) -> dict:
        """For the log, with `batch` images a step; the clock starts anew"""
        seconds = time.perf_counter() - self.start
        pace = dict(ms=round(1000 * seconds / self.steps, 1), images_s=round(batch * self.steps / seconds, 1),
                    waiting=round(self.waited / seconds, 3), gib=round(peak_memory_gib(self.device), 2))
        self.waited, self.steps, self.start = 0.0, 0, time.perf_counter()
        return pace


def add_run_options(p, out: str, steps: int, batch: int, lr: float, batch_of: str = "clips"):
    """Options of every script that trains; batch_of: what a batch holds"""
    p.add_argument("--out", default=out, help="what is written")
    p.add_argument("--steps", type=int, default=steps, help="steps in all; the learning rate falls towards the last")
    p.add_argument("--batch", type=int, default=batch, help=f"{batch_of} at once")
    p.add_argument("--lr", type=float, default=lr, help="learning rate of Adam")
    p.add_argument("--seed", type=int, default=0, help="of whatever is random")
    p.add_argument("--resume", action="store_true", help="continue what --out holds")
    p.add_argument("--overwrite", action="store_true", help="start anew although --out exists")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")


def progress_bar(name: str, start: int, steps: int):
    """A progress bar over the numbers of the steps that are left"""
    return tqdm(range(start, steps), initial=start, total=steps, desc=name, disable=True if RANK else None)


def count_parameters(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"


@contextlib.contextmanager
def optimiser_step(opt, rate: float):
    """An optimiser's step at `rate` times its first rates, by this block's gradients, averaged over processes"""
    opt.zero_grad(set_to_none=True)
    yield
    for group in opt.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate
    all_reduce_mean([q.grad for group in opt.param_groups for q in group["params"] if q.grad is not None])
    opt.step()


def minimise(opt, loss, rate: float):
    """`descent` by one loss"""
    with optimiser_step(opt, rate):
        loss.backward()


def cosine_warmup(step: int, steps: int, warmup: int = 20) -> float:
    """Factor of the learning rate: `warmup` steps up (Adam's moments begin at 0), then a cosine down to a twentieth"""
    return min(1, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def terms_to_floats(terms: dict, step: int) -> dict:
    """Scalars -> their means over all processes, as floats: the one time that a step waits for the device.
    InputError: one of them is NaN or infinite, in any process; it is named"""
    values = torch.stack([value.detach().float() for value in terms.values()])
    all_reduce_mean([values])
    values = dict(zip(terms, values.tolist()))
    bad = [f"'{name}' is {value:g}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise InputError(f"step {step}: the loss term {', '.join(bad)}: stopped; the last checkpoint is whole. "
                         "Lower the learning rate")
    return values


@torch.no_grad()
def update_ema(ema, model, images: int, batch: int, kimg: float = 3.0):
    """Averaged weights: half-life of kimg thousand images, shorter at the start (StyleGAN2-ADA's ramp-up of 0.05).
    images: seen so far, in steps of `batch`."""
    beta = 0.5 ** (batch / min(1000 * kimg, 0.05 * images + batch))
    live = [(e, q) for e, q in zip(ema.parameters(), model.parameters()) if q.requires_grad]
    torch._foreach_lerp_([e for e, _ in live], [q for _, q in live], 1 - beta)
    torch._foreach_copy_(list(ema.buffers()), list(model.buffers()))


# ------------------------------------------- several processes of one run: torchrun --nproc-per-node 8 train.py ..

RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
wrap_peer_errors = functools.partial(wrap_errors, "torchrun", "another process of this run has ended")


def init_distributed(name: str) -> torch.device:
    """pick_device's, but each process of torchrun has a GPU of its own, and the first alone prints"""
    if WORLD_SIZE > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(name)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        with wrap_peer_errors():                           # 4 h: the others wait while the first draws, fetches and fits
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
        atexit.register(dist.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def barrier():
    """Waits until every process is here"""
    if WORLD_SIZE > 1:
        with wrap_peer_errors():
            dist.barrier()


def all_reduce_mean(tensors: list):
    """Tensors of one kind become their means over all processes, by one all_reduce of a flat buffer. (The hooks of
    DistributedDataParallel expect one backward pass a step. Here are several, some through graphs by create_graph.)"""
    if WORLD_SIZE > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with wrap_peer_errors():
            dist.all_reduce(flat)
        parts = (flat / WORLD_SIZE).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


class MeanOverProcesses(torch.autograd.Function):
    """The same for a tensor in a graph: its gradient becomes the mean as well"""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        all_reduce_mean([x])
        return x

    backward = forward
