"""Speed relative to plain baselines. Each line is the median ratio to a baseline timed alternately in the same run.

    python tests/bench.py                    # all benchmarks: about twelve minutes on two idle CPU cores, 4 GB
    python tests/bench.py forward1 mel       # a selection of forward1 forward8 training r1 mel pcavs gpu threads

Baselines of the generator: the public forms of StyleGAN2 in PyTorch, written out below and checked for equal images:
grouped      weights scaled for each image, the batch as groups of one convolution (the public default)
loop         weights scaled for each image, one convolution after another
activations  activations scaled, weights shared (the public form without fused modulation)
All three are in NCHW with the public resampling: transposed convolution, explicit zeros and padding, 4x4 filter.
A ratio of 2 means that this code is twice as fast as the baseline. Use an idle machine: on a busy machine the ratios are
noise. pytest times nothing.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from audio import log_mel, lws_mel, lws_windows  # noqa: E402
from checkpoint import keep_freed_memory  # noqa: E402
from losses import discriminator_loss, generator_loss, path_length_penalty, r1_penalty  # noqa: E402
from media import to_uint8  # noqa: E402
from motion import ping_pong  # noqa: E402
from stylegan2 import Blur, Discriminator, Generator, channels_at  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# the public forms, with the weights of our Generator

def resample(x, kernel, up=1, pad=(0, 0)):
    """Zeros between pixels, padding, filter; each channel is treated as an image."""
    N, C, H, W = x.shape
    x = F.pad(x.reshape(N * C, 1, H, 1, W, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(N * C, 1, H * up, W * up)
    y = F.conv2d(F.pad(x, (*pad, *pad)), kernel.to(x.dtype)[None, None])
    return y.view(N, C, *y.shape[2:])


def public_conv(layer, x, style, form, demodulate, up):
    """Modulated convolution in one of the public forms: x (N, I, H, W), style (N, D) -> (N, O, H', W')"""
    N, I, H, W = x.shape
    s, weight = layer.modulation(style), layer.weight * layer.scale                   # (N, I), (1, O, I, k, k)
    O, k = weight.shape[1], weight.shape[-1]
    if form == "activations":
        w = weight[0]
        x = x * s[:, :, None, None]
        y = F.conv_transpose2d(x, w.transpose(0, 1), stride=2) if up else F.conv2d(x, w, padding=k // 2)
        if demodulate:
            power = (weight * s[:, None, :, None, None]).square().sum((2, 3, 4))      # (N, O)
            y = y * torch.rsqrt(power + 1e-8)[:, :, None, None]
    else:
        w = weight * s[:, None, :, None, None]                                        # (N, O, I, k, k)
        if demodulate:
            w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        if form == "loop":
            pairs = zip(x.split(1), w)
            y = torch.cat([F.conv_transpose2d(a, b.transpose(0, 1), stride=2) if up else F.conv2d(a, b, padding=k // 2)
                           for a, b in pairs])
        elif up:
            w = w.transpose(1, 2).reshape(N * I, O, k, k)
            y = F.conv_transpose2d(x.reshape(1, N * I, H, W), w, stride=2, groups=N)
        else:
            y = F.conv2d(x.reshape(1, N * I, H, W), w.view(N * O, I, k, k), padding=k // 2, groups=N)
        y = y.view(N, O, *y.shape[2:])
    return resample(y, layer.blur.kernel, pad=(1, 1)) if up else y


def public_generator(G, w_plus, form):
    """Images of G with fixed noise maps, all in NCHW"""
    noise = iter(G.noises.buffers())

    def styled(layer, x, style):
        y = public_conv(layer.conv, x, style, form, True, layer.conv.up)
        y = y + layer.noise.weight * next(noise)
        return F.leaky_relu(y + layer.activate.bias[:, None, None], 0.2) * math.sqrt(2)

    def to_rgb(layer, x, style, skip):
        y = public_conv(layer.conv, x, style, form, False, False) + layer.bias
        return y if skip is None else y + resample(skip, layer.upsample.kernel, up=2, pad=(2, 1))

    x = styled(G.conv1, G.input.input.repeat(len(w_plus), 1, 1, 1), w_plus[:, 0])
    rgb = to_rgb(G.to_rgb1, x, w_plus[:, 1], None)
    for i, layer in enumerate(G.to_rgbs):
        x = styled(G.convs[2 * i], x, w_plus[:, 2 * i + 1])
        x = styled(G.convs[2 * i + 1], x, w_plus[:, 2 * i + 2])
        rgb = to_rgb(layer, x, w_plus[:, 2 * i + 3], rgb)
    return rgb


# ---------------------------------------------------------------------------------------------------------------------
# timing

def timed(call, device="cpu") -> float:
    """Seconds of one call"""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_alternately(calls: dict, rounds: int, device="cpu") -> dict:
    """Times the calls alternately, after a warm-up round -> seconds of each call, (rounds,)"""
    seconds = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            time.sleep(0.2)  # until the threads of the last call stop spinning
            elapsed = timed(call, device)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def print_ratios(title, seconds, work=None):
    """Prints one line: our seconds and the ratio to each baseline. work: GFLOP of ours and of the plain convolution; adds
    the rates of both."""
    ours = seconds["ours"]
    parts = [f"{title}: ours {statistics.median(ours):.3g} s"]
    for name, elapsed in seconds.items():
        if name not in ("ours", "plain convolution"):
            parts.append(f"{statistics.median(b / a for a, b in zip(ours, elapsed)):.2f} x {name}")
    if work:
        rate = statistics.median(work[0] / a for a in ours)
        parts.append(f"{rate:.0f} GFLOP/s")
        share = statistics.median(work[0] / a / (work[1] / b) for a, b in zip(ours, seconds["plain convolution"]))
        plain = statistics.median(work[1] / b for b in seconds["plain convolution"])
        parts[-1] += f", {share:.2f} of a plain convolution's {plain:.0f}"
    print("  ".join(parts), flush=True)


def gflop(size: int, base=32768, cap=512) -> float:
    """GFLOP of the 3x3 convolutions for one image, at two operations per multiplication. A transposed convolution counts
    at the size of its input."""
    total, before = 2 * 9 * channels_at(4, base, cap) ** 2 * 4 ** 2, channels_at(4, base, cap)
    for res in [2 ** i for i in range(3, int(math.log2(size)) + 1)]:
        here = channels_at(res, base, cap)
        total += 2 * 9 * here * (before * (res // 2) ** 2 + here * res ** 2)
        before = here
    return total / 1e9


def plain_convolution(channels=512, edge=64, batch=1, **kind):
    """-> (call, its GFLOP): a 3x3 convolution with weights and images in the fastest memory format"""
    x = torch.randn(batch, channels, edge, edge, **kind).to(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, **kind).to(memory_format=torch.channels_last)

    def call():
        with torch.no_grad():
            F.conv2d(x, w, padding=1)
    return call, 2 * 9 * channels ** 2 * edge ** 2 * batch / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks

FORMS = ("grouped", "loop", "activations")


def forward(batch: int, rounds: int, size=256):
    """The generator as in sampling: W+ codes -> images, fp32"""
    torch.manual_seed(0)
    G = Generator(size).eval()
    w = torch.randn(batch, G.L, G.dim)
    with torch.inference_mode():
        for form in FORMS:
            torch.testing.assert_close(public_generator(G, w[:1], form), G(w[:1]), atol=2e-4, rtol=1e-3)
        calls = dict(ours=lambda: G(w)) | {form: lambda form=form: public_generator(G, w, form) for form in FORMS}
        calls["plain convolution"], work = plain_convolution()
        seconds = time_alternately(calls, rounds)
    print_ratios(f"generator {size} px, forward, batch {batch}", seconds, (gflop(size) * batch, work))


def training(batch=8, size=64, rounds=3):
    """Forward and backward pass of the full-width generator at 64 px, fp32"""
    torch.manual_seed(0)
    G = Generator(size)
    w = torch.randn(batch, G.L, G.dim)

    def step(generate):
        def call():
            G.zero_grad(set_to_none=True)
            generate().square().mean().backward()
        return call
    calls = dict(ours=step(lambda: G(w)))
    calls |= {form: step(lambda form=form: public_generator(G, w, form)) for form in FORMS}
    calls["plain convolution"], work = plain_convolution()
    print_ratios(f"generator {size} px, forward + backward, batch {batch}", time_alternately(calls, rounds),
         (3 * gflop(size) * batch, work))


def r1(batch=16, size=64, rounds=5):
    """R1, a second derivative, of the 64 px discriminator, against PyTorch's own derivative of its filters"""
    torch.manual_seed(0)
    D = Discriminator(size, base=2048, cap=128)
    x = torch.randn(batch, 3, size, size)

    def grouped(blur, x):
        return F.conv2d(F.pad(x, (blur.pad,) * 4), blur.kernel.expand(x.shape[1], 1, 4, 4), groups=x.shape[1])

    def call():
        D.zero_grad(set_to_none=True)
        real = x.clone().requires_grad_(True)
        r1_penalty(real, D(real)).backward()

    def plain():
        own, Blur.forward = Blur.forward, grouped
        try:
            call()
        finally:
            Blur.forward = own
    print_ratios(f"R1 {size} px, batch {batch}", time_alternately(dict(ours=call, grouped=plain), rounds))


def mel(minutes=10, rounds=5):
    """Wav2Lip's mel of ten minutes, against the functions of librosa"""
    import librosa
    import scipy.signal
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, minutes * 60 * 16000).astype(np.float32)

    def plain():
        emphasised = scipy.signal.lfilter([1, -0.97], [1], wav)
        spectrum = np.abs(librosa.stft(emphasised, n_fft=800, hop_length=200, win_length=800))
        bank = librosa.filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600)
        db = 20 * np.log10(np.maximum(1e-5, bank @ spectrum)) - 20
        return np.clip(8 * (db + 100) / 100 - 4, -4, 4)
    np.testing.assert_allclose(log_mel(wav), plain(), atol=1e-4)
    calls = dict(ours=lambda: log_mel(wav), librosa=plain)
    print_ratios(f"log-mel of {minutes} minutes", time_alternately(calls, rounds))


@torch.inference_mode()
def pcavs(frames=16, batch=16, rounds=2):
    """PC-AVS at 224 px, fp32, random weights: photo, sound and a pose clip of half as many frames -> uint8 frames. The
    authors run for every frame: V and E on the photo, E on the pose frame, A_sync, and G twice, with the photo's pose and
    with the clip's."""
    from pcavs import PCAVS, Config  # here, since importing face_alignment takes seconds
    torch.manual_seed(0)
    model = PCAVS(Config()).eval()
    mel = lws_mel(np.random.default_rng(0).uniform(-0.5, 0.5, 640 * frames).astype(np.float32))
    photo, clip, noise = torch.rand(3, 224, 224), torch.rand(frames // 2, 3, 224, 224), model.G.draw_noise()

    def ours():
        return np.concatenate([to_uint8(x) for x in model.animate(photo, mel, frames, clip, noise)])

    def as_authors():
        results = []
        for ks in torch.arange(frames).split(batch):
            photos, heads = photo.expand(len(ks), -1, -1, -1), clip[[ping_pong(int(k), len(clip)) for k in ks]]
            identity, speech = model.V(photos), model.config.mouth_gain * model.A(torch.from_numpy(lws_windows(mel, ks)))
            to_uint8(model.decode(identity, speech, model.E(photos), noise))
            results.append(to_uint8(model.decode(identity, speech, model.E(heads), noise)))
        return np.concatenate(results)

    assert np.abs(ours().astype(int) - as_authors()).max() <= 1, "the two orders of calls give different frames"
    calls = {"ours": ours, "the authors' order of calls": as_authors}
    print_ratios(f"PC-AVS 224 px, {frames} frames", time_alternately(calls, rounds))


def gpu(device="cuda", size=256, batches=(8, 32), rounds=10, **width):
    """bf16 on a GPU: forward; forward and backward; sixteen complete steps of stage 1"""
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu: SKIPPED, no CUDA device here: none of the GPU's numbers were measured", flush=True)
        return
    torch.manual_seed(0)
    G, D = Generator(size, **width).to(device), Discriminator(size, **width).to(device)
    for batch in batches:
        gpu_ratios(G, batch, gflop(size, **width) * batch, device, rounds)
        elapsed = timed(lambda n=batch: stage1_steps(G, D, n, device), device)  # warm-up
        elapsed = timed(lambda n=batch: stage1_steps(G, D, n, device), device)
        print(f"{device} bf16 {size} px, stage 1, batch {batch}: {16 * batch / elapsed:.1f} images/s", flush=True)


def gpu_ratios(G, batch, work, device, rounds):
    w = torch.randn(batch, G.L, G.dim, device=device)
    forms = dict(ours=lambda: G(w), grouped=lambda: public_generator(G, w, "grouped"))
    plain, plain_work = plain_convolution(batch=batch, device=device, dtype=torch.bfloat16)

    def forward(generate):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            generate()

    def train(generate):
        G.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            fake = generate()
        fake.float().square().mean().backward()

    for what, step, passes in (("forward", forward, 1), ("forward + backward", train, 3)):
        calls = {name: lambda s=step, g=generate: s(g) for name, generate in forms.items()}
        calls["plain convolution"] = plain
        print_ratios(f"{device} bf16 {G.size} px, {what}, batch {batch}", time_alternately(calls, rounds, device),
             (passes * work, plain_work))


def stage1_steps(G, D, batch, device, steps=16):
    """Sixteen steps of stage 1 as in train.py, with R1 once and path length four times, on noise in place of images"""
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 1e-4, betas=(0.0, 0.99)) for net in (G, D))
    bf16 = torch.autocast(device, torch.bfloat16)

    def generate(n):
        w = G.mapping(torch.randn(n, G.dim, device=device))[:, None].repeat(1, G.L, 1)
        return G(w, "random").float(), w

    def descend(opt, loss):
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()

    for step in range(steps):
        real = torch.randn(batch, 3, G.size, G.size, device=device)
        with bf16:
            fake, _ = generate(batch)
            scores = D(real), D(fake.detach())
        descend(opt_d, discriminator_loss(*scores))
        if step % 16 == 0:
            real.requires_grad_(True)
            descend(opt_d, r1_penalty(real, D(real)))
        with bf16:
            score = D(fake)
        descend(opt_g, generator_loss(score))
        if step % 4 == 0:
            penalty, _ = path_length_penalty(*generate(max(1, batch // 2)), torch.zeros((), device=device))
            descend(opt_g, penalty)


WAITING = {"ours": {}, "1000 turns": dict(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")}


def threads(rounds=15):
    """A step of generator and discriminator at 32 px with two ways of waiting for OpenMP's threads: libgomp's default,
    and sleeping after 1000 turns of a loop. Alone, and beside one and two busy processes."""
    steps = {}
    for name, setting in WAITING.items():
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | setting
        steps[name] = subprocess.Popen([sys.executable, __file__, "--steps"], env=env, text=True, bufsize=1,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def step(process):
        process.stdin.write("\n")
        return float(process.stdout.readline())

    for busy in (0, 1, 2):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        seconds = {name: [] for name in steps}
        for turn in range(rounds + 1):
            for name, process in steps.items():
                elapsed = step(process)
                if turn:
                    seconds[name].append(elapsed)
        for other in others:
            other.kill()
        print_ratios(f"32 px, forward + backward beside {busy} busy processes", seconds)
    for process in steps.values():
        process.kill()


def time_steps():
    """For `threads`: runs a step for each line of stdin and prints its seconds."""
    G, D = Generator(32, 128, 4, 1024, 128), Discriminator(32, 1024, 128)
    w = torch.randn(16, G.L, 128)
    for _ in sys.stdin:
        print(timed(lambda: D(G(w, "off")).mean().backward()), flush=True)


BENCHMARKS = dict(forward1=partial(forward, 1, rounds=7), forward8=partial(forward, 8, rounds=3), training=training,
                  r1=r1, mel=mel, pcavs=pcavs, gpu=gpu, threads=threads)


def main():
    p = argparse.ArgumentParser(description="Speed of this code relative to plain baselines.")
    p.add_argument("names", nargs="*", help=f"benchmarks, from {' '.join(BENCHMARKS)} (default: all)")
    p.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    p.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--rounds", type=int, help="timed rounds (default: enough for a stable median of each)")
    args = p.parse_args()
    unknown = set(args.names) - set(BENCHMARKS)
    if unknown:
        p.error(f"{' '.join(sorted(unknown))}: expected names from {' '.join(BENCHMARKS)}")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.steps:
        return time_steps()
    print(f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}", flush=True)
    for name in args.names or BENCHMARKS:
        BENCHMARKS[name](**(dict(rounds=args.rounds) if args.rounds else {}))


if __name__ == "__main__":
    main()
