"""Speed of PC-AVS, compared with the authors' order of calls on the same networks, in turns.

    python tests/bench_pcavs.py                 # about two minutes on two idle CPU cores, 4 GB
    python tests/bench_pcavs.py --frames 4 --rounds 1 --threads 1

224 px, fp32, random weights in the published shapes: photo, sound and a pose clip of half as many frames -> uint8 frames.
The authors run for every frame, in batches of 16: V and E on the photo, E on the pose frame, A_sync, and G twice, with
the photo's pose and with the clip's. The frames of both orders are compared first.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from audio import lws_mel, lws_windows  # noqa: E402
from media import to_uint8  # noqa: E402
from pcavs import PCAVS, Config  # noqa: E402
from motion import ping_pong  # noqa: E402


def generate(model, photo, wav, clip, frames, noise):
    return np.concatenate([to_uint8(x) for x in model.animate(photo, lws_mel(wav), frames, clip, noise)])


def generate_as_authors(model, photo, wav, clip, frames, noise, batch=16):
    results, mel = [], lws_mel(wav)
    for first in range(0, frames, batch):
        ks = range(first, min(first + batch, frames))
        photos = photo.expand(len(ks), -1, -1, -1)
        heads = torch.stack([clip[ping_pong(k, len(clip))] for k in ks])
        identity = model.V(photos)
        speech = model.config.mouth_gain * model.A(torch.from_numpy(lws_windows(mel, ks)))
        to_uint8(model.decode(identity, speech, model.E(photos), noise))  # with the photo's pose
        results.append(to_uint8(model.decode(identity, speech, model.E(heads), noise)))
    return np.concatenate(results)


@torch.inference_mode()
def main():
    p = argparse.ArgumentParser(description="Frames a second of PC-AVS, ours and in the authors' order of calls.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--frames", type=int, default=16, help="frames of speech")
    p.add_argument("--rounds", type=int, default=2, help="repetitions")
    p.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = PCAVS(Config()).eval()
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, 640 * args.frames).astype(np.float32)
    clip = torch.rand(max(1, args.frames // 2), 3, 224, 224)
    inputs = model, torch.rand(3, 224, 224), wav, clip, args.frames, model.G.draw_noise()
    difference = generate(*inputs).astype(int) - generate_as_authors(*inputs)
    assert np.abs(difference).max() <= 1, "the two orders of calls give different frames"

    ratios, rates = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        generate(*inputs)
        middle = time.perf_counter()
        generate_as_authors(*inputs)
        ratios.append((time.perf_counter() - middle) / (middle - start))
        rates.append(args.frames / (middle - start))
    rate, ratio = statistics.median(rates), statistics.median(ratios)
    print(f"PC-AVS 224 px: {rate:.2f} frames/s, {ratio:.2f} times as fast as in the authors' order")


if __name__ == "__main__":
    main()
