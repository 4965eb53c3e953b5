"""The board: how soon Folio and nanoGPT come to a loss on this CPU, and how fast they are.

    python tests/bench/board.py NANOGPT INPUT [AIM ...]

NANOGPT is a checkout of github.com/karpathy/nanoGPT, which is copied and not changed; INPUT is tiny
Shakespeare's input.txt; AIM is a row of time_to_loss.py, by default all. nanoGPT trains by its own
recipe for CPUs, which comes to a loss of 1.898 and to no other. Seconds are those of whole
processes; of Folio the median of three seeds is printed, with the loss on the whole validation text
in brackets. Tokens a second are those of nanoGPT's recipe in both, in training and in sampling
500 tokens. All but the longer aims is repeated beside a Python loop that never waits.
"""

import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sampling import SHAPES, N, seconds  # isort: skip  (first: it sets up OpenMP as the scripts do)
import torch
from contention import BUSY
from nanogpt_cpu import EITHER, RECIPES, train_nanogpt
from shakespeare import ROOT, prepare, run, train
from time_to_loss import ROWS

from folio.generation import prepare_for_sampling
from folio.machine import fast_dtype
from model import GPT

SEEDS = (1337, 1338, 1339)
NANOGPT_SAMPLING = f"""
import time, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False))
idx = torch.zeros(1, 1, dtype=torch.long)
with torch.no_grad():
    model.eval().generate(idx, 20)
    began = time.perf_counter()
    model.generate(idx, {N}, temperature=0.8, top_k=200)
print("speed", {N} / (time.perf_counter() - began))
"""


def to_loss(folder: Path, aim: str) -> tuple[float, str]:
    """Folio's seconds to an aim, and the loss."""
    recipe, *words = ROWS[aim].split()
    recipe = str(ROOT / "config" / recipe)
    results = [train(folder, recipe, *words, f"--seed={seed}") for seed in SEEDS]
    loss = statistics.median(r.loss for r in results)
    return statistics.median(r.wall for r in results), f"({loss:.4f})"


def nanogpt(checkout: Path, text: Path) -> dict[str, float]:
    """nanoGPT's seconds to 1.898, loss, and tokens a second in training and sampling."""
    both, alone, _ = RECIPES["small"]
    output, wall, loss = train_nanogpt(checkout, text, SEEDS[0], f"{EITHER} {both} {alone}")
    ms = statistics.median(map(float, re.findall(r"iter \d+: loss .* time ([\d.]+)ms", output)))
    sampled, _ = run(checkout, "-c", NANOGPT_SAMPLING)
    speed = float(re.search(r"speed ([\d.]+)", sampled)[1])
    return {"1.898": wall, "loss": loss, "training": 12 * 64 * 1000 / ms, "sampling": speed}


def training_speed(folder: Path) -> float:
    both, _, alone = RECIPES["small"]
    words = f"{EITHER} {both} {alone} --max_iters=500 --num_samples=0".split()
    return train(folder, str(ROOT / "config/shakespeare_char_gpt2.py"), *words).speed


def sampling_speed() -> float:
    model = GPT(SHAPES["small"]).eval()
    prepare_for_sampling(model)
    seconds(model, 1, 20)
    return N / statistics.median(sum(seconds(model, 1, N)) for _ in range(5))


def board(checkout: Path, text: Path, aims: list[str]) -> None:
    print(f"{'':30}{'Folio':>10}{'':10}{'nanoGPT':>10}{'':10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, text)
        theirs = nanogpt(checkout, text)
        for aim in aims:
            wall, loss = to_loss(folder, aim)
            line = f"{f'seconds to {aim}':30}{wall:10.1f}{loss:>10}"
            if aim in theirs:
                their_loss = f"({theirs['loss']:.4f})"
                line += f"{theirs[aim]:10.1f}{their_loss:>10}{theirs[aim] / wall:8.1f}"
            print(line, flush=True)
        for what, ours in (("training", training_speed(folder)), ("sampling", sampling_speed())):
            line = f"{f'{what}, tokens a second':30}{ours:10,.0f}{'':10}{theirs[what]:10,.0f}"
            print(f"{line}{'':10}{ours / theirs[what]:8.1f}", flush=True)


def main() -> None:
    checkout, text = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    dtype = fast_dtype(torch.device("cpu"))
    threads = torch.get_num_threads()
    print(f"{cpu}, {threads} threads, {dtype}, torch {torch.__version__}\n\nalone")
    board(checkout, text, sys.argv[3:] or list(ROWS))
    print("\nbeside a busy program")
    with subprocess.Popen(BUSY) as busy:
        try:
            board(checkout, text, ["1.898"])
        finally:
            busy.kill()


if __name__ == "__main__":
    main()
