"""Dropout 0.2 on this CPU, forward and backward: the GPT's own beside torch's.

    python tests/bench/dropout_cpu.py [ROUNDS]

Medians in ms for activations (B, T, C) in bfloat16. They take turns.
"""

import sys

import torch
from attention_cpu import medians

from folio.fast import Dropout
from folio.machine import reuse_freed_memory

SHAPES = [(12, 64, 128), (16, 256, 128), (64, 256, 384)]
KINDS = {"torch": torch.nn.Dropout(0.2), "Folio": Dropout(0.2)}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    reuse_freed_memory()
    print(f"{'B, T, C':>14}" + "".join(f"{name:>12}" for name in KINDS))
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        row = "".join(f"{ms:9.2f} ms" for ms in medians(KINDS.values(), x, rounds))
        print(f"{', '.join(map(str, shape)):>14}{row}", flush=True)


if __name__ == "__main__":
    main()
