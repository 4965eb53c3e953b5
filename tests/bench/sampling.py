"""Tokens a second of generate(), from its cache, and of the plain model.generate().

    python tests/bench/sampling.py [SHAPE ...]

For shapes with random weights, which are as fast as trained ones:

- ten samples of 500 tokens together, and the plain way, which computes the whole context anew for
  every token, one sample after another (one is timed);
- 1, 10 and 100 samples together, and how much of the memory's bandwidth one uses: the bytes of the
  weights that a token multiplies, over the bytes that a copy reads and writes in a second;
- the time of a token just before the block is full, over that of the 10th to 20th.

The plain way computes in float32; the cache in float32 too, and in the dtype that sample.py uses
for several samples of the shape if that is another.
"""

import copy
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from folio import process  # noqa: E402, F401, I001  (before torch, as in the scripts)
import torch  # noqa: E402
from folio.generation import generate, prepare_for_sampling  # noqa: E402
from folio.machine import find_device  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

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
    how = (idx, uniforms.to(device), 0.8, 200)  # temperature, top_k
    marks = [time.perf_counter()]
    for _ in model.generate(*how) if plain else generate(model, *how):
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
    print(f"{'':24}{'plain':>7}{'cache, 10':>11}{'ratio':>7}", end="")
    print("".join(f"{f'x {B}':>9}" for B in BATCHES) + "   bandwidth  last/10th: x 1, x 10")
    for name in names:
        torch.manual_seed(0)
        made = GPT(SHAPES[name]).to(device).eval()
        n_weights = sum(p.numel() for p in made.h.parameters()) + made.lm_head.weight.numel()
        plain = N / sum(seconds(made, 1, N, plain=True))
        for asked in ("float32", "auto"):
            model = copy.deepcopy(made)
            prepare_for_sampling(model, asked)
            dtype = model.wte.weight.dtype
            if asked == "auto" and dtype == torch.float32:
                continue
            seconds(model, 10, 20)
            rates, grows = {}, {}
            for B in BATCHES:
                repeats = 3 if B < 100 else 1
                trials = [seconds(model, B, N) for _ in range(repeats)]
                rates[B] = B * N / statistics.median(sum(trial) for trial in trials)
                each = [statistics.median(parts) for parts in zip(*trials, strict=True)]
                full = min(N, model.config.block_size)
                grows[B] = statistics.median(each[full - 10 : full]) / statistics.median(each[9:19])
            share = rates[1] * n_weights * dtype.itemsize / bandwidth
            print(
                f"{f'{name}, {str(dtype)[6:]}':24}{plain:7,.0f}"
                f"{rates[10]:11,.0f}{rates[10] / plain:7.1f}"
                + "".join(f"{rates[B]:9,.0f}" for B in BATCHES)
                + f"{share:12.0%}{grows[1]:17.2f}{grows[10]:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
