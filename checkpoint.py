"""Reading and writing of weights files, and helpers that all training scripts share.

A checkpoint is a plain dict of tensors, numbers and strings, read with weights_only=True. Published weights are
downloaded on first use to $TORCH_HOME/hub/checkpoints (default ~/.cache/torch) and checked by SHA256.
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
from urllib.parse import urlsplit

import torch
from torch import distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from media import InputError, atomic_write, check_file, check_output, make_folder
from report import PACE_KEYS, describe_pace, machine_name, write_report

FORMAT = 1                   # version of packs and checkpoints
STALE_SECONDS = 3600         # ours: no save takes an hour, so an older temporary file is left from a killed run
EXTRA_NUMBERS = 1 << 26      # numbers (256 MB) that a network may allocate beyond those in its file
MAX_CONFIG_SIZE = 1 << 16    # ours: above every size in a network's config; StyleGAN2's channels start at half of it


# ------------------------------------------------------------- reading: files are not trusted, an error is one line

@contextlib.contextmanager
def wrap_errors(source, problem: str):
    """Turn any exception of a block that reads a file into an InputError: "source: problem (reason)"."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(f"{source}: {problem} ({reason[:240]})") from error


def read_weights(path: str | Path) -> dict:
    """Read the dict in a weights file, published or ours, to the CPU. Code in the file never runs. InputError: damaged,
    cut short, holds more than tensors and plain values, not a dict with string keys, a tensor is not dense."""
    path = check_file(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # plain options
            warnings.simplefilter("ignore")                         # torch's, about unusual files
            content = torch.load(path, "cpu", weights_only=True)
    except Exception as error:                                      # torch has no exception type for this
        has_code = "global" in str(error).lower()                   # the message names a class or function
        reason = "holds more than tensors and plain values" if has_code else "damaged, cut short, or not a weights file"
        raise InputError(f"{path}: {reason} ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dict of names and weights")
    if not all(is_dense(value) for value in iterate_nested(content) if isinstance(value, torch.Tensor)):
        raise InputError(f"{path}: holds a tensor that is sparse or lacks its numbers, expected dense ones")
    return content


def iterate_nested(content):
    """Yield every value in nested dicts, lists and tuples once. A list in a file may contain itself."""
    stack, seen = [content], set()
    while stack:
        value = stack.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            if isinstance(value, (dict, list, tuple)):
                stack += value.values() if isinstance(value, dict) else value


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds all its numbers. Sparse and meta tensors and those with stride or size 0 need few bytes in
    a file, but may need any amount of memory later."""
    return (tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
            and tensor.numel() >= max(tensor.shape, default=0)
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


class AllocationLimit(TorchFunctionMode):
    """Raises ValueError when a block creates more than `left` numbers. The meta device would take 2 s to import."""

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


def load_strictly(make_network, state: dict, source) -> nn.Module:
    """Build a network and load a state dict whose names and shapes all match; fp16 becomes fp32. BatchNorm's counters
    may be absent (files of 2017). InputError: a mismatch, or sizes in the file that make_network() rejects."""
    numbers = sum(value.numel() for value in iterate_nested(state) if isinstance(value, torch.Tensor))
    limit = AllocationLimit(2 * numbers + EXTRA_NUMBERS)
    with wrap_errors(source, "its sizes do not fit a network of this version"), limit:
        network = make_network()
    problem = f"not the weights of {type(network).__name__}"
    with wrap_errors(source, problem):                              # a shape differs, or a value is no tensor
        absent, unknown = network.load_state_dict(state, strict=False)
    errors = [f"{key} is absent" for key in absent if not key.endswith("num_batches_tracked")]
    errors += [f"{key[:120]} is unknown" for key in unknown]
    if errors:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise InputError(f"{source}: {problem}: {errors[0]}{more}")
    return network


def freeze(network: nn.Module) -> nn.Module:
    """Disable gradients of the parameters and set eval mode. A later train() has no effect."""
    network.requires_grad_(False).eval()
    network.train = lambda mode=True: network
    return network


def load_frozen(make_network, state: dict, source, device) -> nn.Module:
    """load_strictly, then freeze and move to the device."""
    return freeze(load_strictly(make_network, state, source)).to(device)


# ----------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path: str | Path, checkpoint: dict):
    """Write a dict of tensors and plain values with a "kind". `path` is never a partial file. InputError: disk full."""
    assert "kind" in checkpoint, "a checkpoint has a kind"
    path = Path(path).absolute()
    try:
        with atomic_write(path) as draft, open(draft, "wb") as file:
            for old_draft in path.parent.glob(f".{path.name}-*"):
                if time.time() - old_draft.stat().st_mtime > STALE_SECONDS:
                    old_draft.unlink()
            torch.save(checkpoint | dict(format=FORMAT), file)
            file.flush()
            os.fsync(file.fileno())                       # else a power cut could keep the name without the content
    except RuntimeError as error:                         # torch's writer reports a full disk by this type
        raise InputError(f"{path}: cannot be written ({error})") from None


def load_checkpoint(path: str | Path, kind: str | tuple) -> dict:
    """Read a file of save_checkpoint to the CPU. kind: the expected kind or a tuple of kinds. InputError: see
    read_weights; another kind or format. The caller checks the content."""
    kinds = (kind,) if isinstance(kind, str) else kind
    expected = f"expected a '{' or '.join(kinds)}' checkpoint"
    try:
        checkpoint = read_weights(path)
    except InputError as error:
        raise InputError(f"{error}; {expected}") from None
    file_kind = checkpoint.get("kind")
    if not isinstance(file_kind, str):
        raise InputError(f"{path}: was not written by this package; {expected}")
    if file_kind not in kinds:
        raise InputError(f"{path}: is a '{file_kind[:40]}' checkpoint; {expected}")
    if checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: has format {checkpoint.get('format')}, this version reads format {FORMAT}")
    sizes = [value for value in iterate_nested(checkpoint.get("config")) if isinstance(value, (int, float))]
    if not all(abs(size) <= MAX_CONFIG_SIZE for size in sizes):
        raise InputError(f"{path}: its config holds a size beyond those of all networks here; {expected}")
    return checkpoint


def save_run(path: str | Path, checkpoint: dict, args, networks: dict, optimisers: dict):
    """Save a checkpoint with the whole state that the next step depends on, for --resume."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    save_checkpoint(path, checkpoint | dict(
        args=vars(args), rng=dict(torch=torch.get_rng_state(), cuda=cuda),
        networks={name: network.state_dict() for name, network in networks.items()},
        optimisers={name: optimiser.state_dict() for name, optimiser in optimisers.items()}))


def restore_run(path: str | Path, saved: dict, optimisers: dict):
    """Restore Adam's moments and the random state from a checkpoint of save_run, but keep the current learning rates."""
    with wrap_errors(path, "not a run of this version"):
        for name, optimiser in optimisers.items():
            state, groups = saved["optimisers"][name], optimiser.state_dict()["param_groups"]
            for group, saved_group in zip(groups, state["param_groups"], strict=True):
                group["params"] = saved_group["params"]
            optimiser.load_state_dict(state | dict(param_groups=groups))
        torch.set_rng_state(saved["rng"]["torch"])
        if torch.cuda.is_initialized() and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])


def fp16_state_dict(network: nn.Module) -> dict:
    """A network's weights in fp16, for a file for inference. Weights that layers share are stored once."""
    return copy.deepcopy(network).half().state_dict()


# ------------------------------------------------------------------------- published files, downloaded on first use

class Pinned:
    """A published file. sha256: or its first digits. file: name in the cache, by default that of the first URL."""

    def __init__(self, sha256: str, *urls: str, file: str | None = None):
        self.sha256, self.urls, self.file = sha256, urls, file or urls[0].rpartition("/")[2]


LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/082bb24f84c091ea94de2867d34c4544f68e0963/lpips"
BLAZEFACE = "https://github.com/hollance/BlazeFace-PyTorch/raw/master"  # Apache-2.0; both models use these anchors
PUBLISHED = dict(
    vgg19=Pinned("dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",             # 575 MB
        "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"),
    vgg16=Pinned("397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",             # 553 MB
        "https://download.pytorch.org/models/vgg16-397923af.pth"),
    lpips_heads=Pinned("a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        f"{LPIPS}/weights/v0.1/vgg.pth", file="lpips_v0.1_vgg.pth"),
    arcface=Pinned("a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",           # 175 MB
        "https://github.com/xinntao/facexlib/releases/download/v0.1.0/recognition_arcface_ir_se50.pth"),
    syncnet_v2=Pinned("961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",        # 55 MB
        "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
        "https://huggingface.co/ByteDance/LatentSync-1.6/resolve/main/auxiliary/syncnet_v2.model"),
    blazeface=Pinned("54ecff653feaaaf1f7d44b6aff28fd2fc50e483a4e847563b6dd261369c43ba4", f"{BLAZEFACE}/blazeface.pth"),
    blazeface_anchors=Pinned("a10bb2fb93ab54ca426d6c750bfc3aad685028a16dcf231357d03694f261fd95",
        f"{BLAZEFACE}/anchors.npy"),
    blazeface_back=Pinned("e2c03bb3ae45e769eaaa0a7cc7d4f61f54a5e3fbae6367d870166702e7022b11",
        f"{BLAZEFACE}/blazefaceback.pth"),
    wav2lip_expert=Pinned("9b9936c721696446eeed353032cab242a8cf0eed8c46cde540366f6ae5493be5",    # 197 MB; of one source
        "https://huggingface.co/camenduru/Wav2Lip/resolve/main/checkpoints/lipsync_expert.pth",
        "https://huggingface.co/Nekochu/Wav2Lip/resolve/main/lipsync_expert.pth"),
    # only the first digits of these hashes are known, from the file names
    fan=Pinned("11f355bf06", "https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar"),  # 100 MB
    inception=Pinned("6726825d",                                                                 # 96 MB, for FID
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"))
TIMEOUT = 30                # seconds without data, ours


def checkpoints_dir() -> Path:
    """The folder where torch.hub and face-alignment keep weights: $TORCH_HOME/hub/checkpoints."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(name: str, path: str | Path | None = None) -> Path:
    """Path of a file of PUBLISHED: `path`, the user's copy, or the file in the cache, which is downloaded if missing
    and checked by SHA256 each time. InputError: `path` is missing; the download failed, with its URL."""
    if path is not None:
        return check_file(path)
    pin = PUBLISHED[name]
    target, failures, default_timeout = checkpoints_dir() / pin.file, [], socket.getdefaulttimeout()
    exists = target.is_file()
    if exists:
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
            except (OSError, HTTPException, RuntimeError) as error:    # no network or full disk; cut; other hash
                failures.append(f"{urlsplit(url).netloc}: {error}")
    finally:
        socket.setdefaulttimeout(default_timeout)
    raise InputError(f"{pin.file} is {'damaged' if exists else 'missing'} and could not be fetched "
                     f"({'; '.join(failures)}): download {pin.urls[0]} and save it as {target}")


# --------------------------------------------------------------------------------------------------------- devices

def pick_device(name: str) -> torch.device:
    """The device of option --device. "auto" is cuda if available, else mps, else cpu. InputError: not usable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")         # TF32, as cuDNN's convolutions by default
        torch.backends.cudnn.benchmark = True              # a run has few different shapes
    return device


def warn_of_slow_bf16(args, device):
    """--bf16 on a CPU without bf16 instructions takes ten times as long as without (measured: 114 s a step for 9)"""
    is_fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if args.bf16 and not is_fast:
        print("--bf16: this CPU has neither AVX512-BF16 nor AMX, without --bf16 a step is up to ten times as fast")


def keep_freed_memory():
    """Let glibc keep freed memory for the next tensor. By default it maps and zeroes every new tensor above 32 MB. At
    256 px this takes twice as long as an elementwise operation on it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                                # M_MMAP_MAX: no separate mapping for one tensor
        libc.mallopt(-1, 2 ** 31 - 1)                      # M_TRIM_THRESHOLD: return nothing to the system


def peak_memory_gib(device) -> float:
    """Peak memory so far in GiB: the device's on a GPU, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # Linux counts KiB


# ------------------------------------------------------------------------------------ shared by all training scripts

def add_run_options(parser, out: str, steps: int, batch: int, lr: float, batch_of: str = "clips"):
    """Add the options of every training script, with these defaults. batch_of: the unit of --batch."""
    parser.add_argument("--out", default=out, help="output path")
    parser.add_argument("--steps", type=int, default=steps, help="total steps; the learning rate falls until the end")
    parser.add_argument("--batch", type=int, default=batch, help=f"{batch_of} per step")
    parser.add_argument("--lr", type=float, default=lr, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="start anew although --out exists")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")


def claim_output(path: str | Path, args) -> Path:
    """Absolute path of the checkpoint that a run writes; its folder is created. InputError: it exists already."""
    path = make_folder(Path(path).parent) / Path(path).name
    if path.exists() and not (args.resume or args.overwrite):
        raise InputError(f"{path} exists: --resume continues it, --overwrite starts anew")
    return check_output(path, overwrite=True)


# options that --resume may change, besides loss weights (--w)
CHANGEABLE = {"steps", "lr", "lr_gan", "data", "photos", "expert", "path", "device", "workers", "accumulate", "compile"}


def resume_options(parse, argv, args, checkpoint: dict, path):
    """Options of a resumed run: those of its checkpoint, except CHANGEABLE ones that argv gives. Prints the changes.
    parse: (argv, defaults) -> options. InputError: argv gives another value for another option."""
    with wrap_errors(path, "not a run of this version"):
        saved = checkpoint["args"]
    own = {k: v for k, v in vars(args).items() if k in ("command", "stage", "part", "out", "resume", "overwrite")}
    args = parse(argv, saved | own)
    # an entry "w NAME" for each loss weight
    old, new = (options | {f"w {k}": v for k, v in options.get("w", {}).items()} for options in (saved, vars(args)))
    changes = {k: f"--{k if k[:2] == 'w ' else k.replace('_', '-')} {old[k]} -> {v}" for k, v in new.items()
               if k in old and v != old[k] and k not in (*own, "w", "world")}
    refused = [change for k, change in changes.items() if k not in CHANGEABLE and not k.startswith("w ")]
    if refused:
        raise InputError(f"{path}: --resume cannot change {', '.join(refused)}; --overwrite starts anew")
    print(", ".join([f"{path}: continues with its own options", *changes.values()]))
    return args


def git_revision() -> str | None:
    """The git commit of this folder; None outside a repository."""
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(Path(__file__).absolute().parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def open_log(path: str | Path, args):
    """Open a log of JSON lines; --resume appends. The first line holds the revision, versions and options."""
    log = open(path, "a" if args.resume else "w", buffering=1)      # each line is written at once
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, machine=machine_name())
    log.write(json.dumps(dict(revision=git_revision(), **versions, args=vars(args)), default=str) + "\n")
    return log


def write_log(log, bar, line: dict, steps: int | None = None):
    """Write a line of the log as JSON, update report.html, and print the line above the progress bar."""
    log.write(json.dumps(line) + "\n")
    write_report(Path(log.name).parent)
    values = "  ".join(f"{key} {value:.3f}" for key, value in line.items() if key not in PACE_KEYS)
    bar.write(f"{line['step']:6d}  {values}" + (f"  | {describe_pace(line, steps)}" if "ms" in line else ""))


class StepTimer:
    """Measures the time of the steps between two log lines and the share that waits for the data loader."""

    def __init__(self, device):
        self.device = device
        self.restart()

    def restart(self):
        self.waited, self.steps, self.start = 0.0, 0, time.perf_counter()

    def next_batch(self, stream) -> dict:
        """The next batch of a stream, on the device."""
        before = time.perf_counter()
        batch = next(stream)
        self.waited, self.steps = self.waited + time.perf_counter() - before, self.steps + 1
        return {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}

    def pace(self, batch: int) -> dict:
        """PACE_KEYS of a log line, with `batch` images per step. The clock restarts."""
        seconds = time.perf_counter() - self.start
        pace = dict(ms=round(1000 * seconds / self.steps, 1), images_s=round(batch * self.steps / seconds, 1),
                    waiting=round(self.waited / seconds, 3), gib=round(peak_memory_gib(self.device), 2))
        self.restart()
        return pace


def progress_bar(name: str, start: int, steps: int):
    """Progress bar over the remaining step numbers; process 0 alone shows it."""
    return tqdm(range(start, steps), initial=start, total=steps, desc=name, disable=True if RANK else None)


def count_parameters(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"


@contextlib.contextmanager
def optimiser_step(optimiser, rate: float):
    """Step by the gradients that the block computes, averaged over processes. rate: factor of the initial rates."""
    optimiser.zero_grad(set_to_none=True)
    yield
    for group in optimiser.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate
    all_reduce_mean([p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None])
    optimiser.step()


def cosine_warmup(step: int, steps: int, warmup: int = 20) -> float:
    """Factor of the learning rate: linear warm-up (Adam's moments start at 0), then a cosine down to a twentieth."""
    return min(1, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))


def terms_to_floats(terms: dict, step: int) -> dict:
    """Scalar tensors -> floats, averaged over processes. A step waits for the device only here. InputError: a term is
    NaN or infinite in a process; the message names it."""
    values = torch.stack([value.detach().float() for value in terms.values()])
    all_reduce_mean([values])
    terms = dict(zip(terms, values.tolist()))
    errors = [f"'{name}' is {value:g}" for name, value in terms.items() if not math.isfinite(value)]
    if errors:
        raise InputError(f"step {step}: the loss term {', '.join(errors)}: stopped; the last checkpoint is intact. "
                         "Lower the learning rate")
    return terms


@torch.no_grad()
def update_ema(ema, model, images: int, batch: int, kimg: float = 3.0):
    """Average the weights: half-life of kimg thousand images, at the start 0.05 of the images so far (StyleGAN2-ADA's
    ramp-up). images: number so far. batch: images per step."""
    beta = 0.5 ** (batch / min(1000 * kimg, 0.05 * images + batch))
    trained = [(average, p) for average, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([average for average, _ in trained], [p for _, p in trained], 1 - beta)
    torch._foreach_copy_(list(ema.buffers()), list(model.buffers()))


# -------------------------------------- several processes in one run: torchrun --nproc-per-node 8 train.py ..

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
wrap_peer_errors = functools.partial(wrap_errors, "torchrun", "another process of this run has ended")


def init_distributed(name: str) -> torch.device:
    """pick_device, with one GPU for each process of torchrun. Only process 0 prints."""
    if WORLD_SIZE > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(name)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        with wrap_peer_errors():                           # 4 h: process 0 draws data, downloads and fits alone
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
        atexit.register(dist.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return device


def barrier():
    """Wait until every process is here."""
    if WORLD_SIZE > 1:
        with wrap_peer_errors():
            dist.barrier()


def all_reduce_mean(tensors: list):
    """Replace tensors of one dtype by their means over all processes, with one all_reduce of a flat buffer.
    (DistributedDataParallel expects one backward pass per step. Here are several, some with create_graph.)"""
    if WORLD_SIZE > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with wrap_peer_errors():
            dist.all_reduce(flat)
        means = (flat / WORLD_SIZE).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [mean.view_as(tensor) for mean, tensor in zip(means, tensors)])


class MeanOverProcesses(torch.autograd.Function):
    """all_reduce_mean of a tensor in a graph; its gradient becomes the mean as well."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        all_reduce_mean([x])
        return x

    backward = forward
