"""One sample in float32, with float16 weights, and in bfloat16, on this CPU, for several shapes.

    python tests/bench/dtype_sampling.py [ROUNDS]

They generate in turn, from random weights; printed are the medians in tokens a second, and those of
their ratios to float32. What `sample.py --dtype=auto` chooses for a CPU (prepare_for_sampling() in
folio/generation.py) follows from this table. bfloat16 is left out if the CPU has no instructions
for it.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from folio import process  # noqa: E402, F401, I001  (before torch, as in the scripts)
import torch  # noqa: E402
from folio.fast import cpu_has_bfloat16  # noqa: E402
from folio.generation import generate, prepare_for_sampling  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

SHAPES = [  # the shape, and the tokens of a sample
    (GPTConfig(4, 4, 128, 64, 65), 500),
    (GPTConfig(4, 4, 256, 64, 65), 500),
    (GPTConfig(6, 6, 384, 256, 65), 500),
    (GPTConfig(6, 8, 512, 256, 4096), 500),
    (GPTConfig(), 200),
]


def rate(model: GPT, n: int) -> float:
    """Tokens a second of one sample of n tokens."""
    began = time.perf_counter()
    for _ in generate(model, torch.zeros(1, 1, dtype=torch.long), torch.rand(1, n), 0.8, 200):
        pass
    return n / (time.perf_counter() - began)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    dtypes = ["float32", "float16"] + ["bfloat16"] * cpu_has_bfloat16()
    print("layers heads width block vocabulary" + "".join(f"{dtype:>18}" for dtype in dtypes))
    for config, n in SHAPES:
        models = []
        for dtype in dtypes:
            models.append(GPT(config).eval())
            prepare_for_sampling(models[-1], dtype)
            rate(models[-1], 20)
        rates = [[rate(model, n) for model in models] for _ in range(rounds)]
        c = config
        sizes = (c.n_layer, c.n_head, c.n_embd, c.block_size)
        print("".join(f"{size:6}" for size in sizes) + f"{c.vocab_size:11}", end="")
        for i in range(len(dtypes)):
            median = statistics.median(row[i] for row in rates)
            ratio = statistics.median(row[i] / row[0] for row in rates)
            print(f"{median:12,.0f} {ratio:5.2f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
