"""Dropout 0.2 on this CPU, forward and backward: the GPT's own beside torch's.

    python tests/bench/dropout_cpu.py [ROUNDS]

Medians in ms for activations (B, T, C) in bfloat16. They take turns.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import Dropout  # noqa: E402
from train import keep_freed_memory  # noqa: E402

SHAPES = [(12, 64, 128), (16, 256, 128), (64, 256, 384)]
KINDS = {"torch": torch.nn.Dropout(0.2), "Folio": Dropout(0.2)}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    keep_freed_memory()
    print(f"{'B, T, C':>14}" + "".join(f"{name:>12}" for name in KINDS))
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        times = {name: [] for name in KINDS}
        for i in range(rounds + 2):
            for name, dropout in KINDS.items():
                began = time.perf_counter()
                y = dropout(x)
                y.backward(torch.ones_like(y))
                if i >= 2:
                    times[name].append(1000 * (time.perf_counter() - began))
        row = "".join(f"{statistics.median(column):9.2f} ms" for column in times.values())
        print(f"{', '.join(map(str, shape)):>14}{row}", flush=True)


if __name__ == "__main__":
    main()
