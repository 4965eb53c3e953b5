"""Tokens a second that generate() makes: from its cache, and by the plain path.

    python tests/bench/sampling.py [SHAPE ...]

For shapes with random weights, which speak no faster or slower than trained ones:

- ten samples of 500 tokens together, and by the plain path, which computes the whole context anew
  for every token, one sample after another (of which one is timed);
- the time of a token just before the window is full, over that of the 10th to 20th;
- 1, 10 and 100 samples together, and what part of the bandwidth of memory one uses: the bytes of
  the weights that a token multiplies, over the bytes that a copy reads and writes in a second.

The plain path computes in float32, the cache in what sample.py takes for the shape.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from model import GPT, GPTConfig  # noqa: E402
from sample import SampleConfig, find_device, make_fast  # noqa: E402

MODERN = {"rotary": True, "qk_norm": True, "conv": 3, "activation": "gelu", "bias": False}
SHAPES = {
    "small": GPTConfig(4, 4, 128, 64, 65),
    "small, modern": GPTConfig(4, 4, 128, 64, 65, **MODERN),
    "baby": GPTConfig(6, 6, 384, 256, 65),
    "GPT-2": GPTConfig(),
    "XL": GPTConfig(48, 25, 1600),
}
N, BATCHES = 500, (1, 10, 100)


def seconds(model: GPT, B: int, n: int, plain: bool = False) -> list[float]:
    """Seconds of each of n tokens of B samples."""
    device = next(model.parameters()).device
    idx, uniforms = torch.zeros(1, 1, dtype=torch.long, device=device), torch.rand(B, n)
    marks = [time.perf_counter()]
    for _ in model.generate(idx, uniforms, temperature=0.8, top_k=200, plain=plain):
        if device.type != "cpu":
            torch.accelerator.synchronize()
        marks.append(time.perf_counter())
    return [end - begin for begin, end in zip(marks, marks[1:], strict=False)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes that are read and written in a second by a copy of what no cache of a CPU can hold."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target, trials = torch.empty_like(source), []
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        trials.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(trials)


def main() -> None:
    device = find_device("auto")
    names = sys.argv[1:] or [name for name in SHAPES if name != "XL" or device.type != "cpu"]
    bandwidth = copy_bandwidth(device)
    print(f"{device}, {torch.get_num_threads()} threads, copies {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':14}{'plain':>9}{'cache, 10':>11}{'ratio':>7}{'last/10th':>11}", end="")
    print("".join(f"{f'x {B}':>9}" for B in BATCHES) + "  of the bandwidth")
    for name in names:
        torch.manual_seed(0)
        model = GPT(SHAPES[name]).to(device).eval()
        weights = sum(p.numel() for p in model.h.parameters()) + model.lm_head.weight.numel()
        plain = N / sum(seconds(model, 1, N, plain=True))
        make_fast(model, SampleConfig())
        seconds(model, 10, 20)
        rates, times = {}, {}
        for B in BATCHES:
            trials = [seconds(model, B, N) for _ in range(3 if B < 100 else 1)]
            times[B] = [statistics.median(parts) for parts in zip(*trials, strict=True)]
            rates[B] = B * N / statistics.median(sum(trial) for trial in trials)
        full = min(N, model.config.block_size)
        grows = statistics.median(times[10][full - 10 : full]) / statistics.median(times[10][9:19])
        multiplied = weights * model.wte.weight.itemsize
        print(
            f"{name:14}{plain:9,.0f}{rates[10]:11,.0f}{rates[10] / plain:7.1f}{grows:11.2f}"
            + "".join(f"{rates[B]:9,.0f}" for B in BATCHES)
            + f"{rates[1] * multiplied / bandwidth:18.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
