"""Causal attention, forward and backward, on this CPU: why causal_attention() is as it is.

    python tests/bench/attention_cpu.py [ROUNDS]

Medians in ms, from bfloat16 and back to it, of SDPA in float32, in bfloat16, and in float32 with
dropout 0.2 on the attention weights, and of two matrix products in bfloat16. causal_attention()
uses the last for short contexts and SDPA for long ones. They take turns.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from folio.fast import matmul_attention  # noqa: E402

SHAPES = [  # B, T, n_head, head_dim
    (12, 64, 4, 32),
    (24, 128, 2, 64),
    (16, 256, 6, 64),
    (8, 512, 6, 64),
    (4, 1024, 12, 64),
    (1, 4096, 12, 64),
]


def sdpa(dtype: torch.dtype, dropout: float = 0.0):
    def attention(qkv):
        q, k, v = (x.to(dtype).transpose(1, 2) for x in qkv.unbind(2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return y.transpose(1, 2).bfloat16()

    return attention


def matmul(qkv):
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return matmul_attention(q, k, v).transpose(1, 2)


KINDS = {
    "float32": sdpa(torch.float32),
    "bfloat16": sdpa(torch.bfloat16),
    "float32, dropout": sdpa(torch.float32, 0.2),
    "bfloat16, matmul": matmul,
}


def medians(functions: Iterable[Callable], x: Tensor, rounds: int) -> list[float]:
    """Milliseconds of each function of x, forward and backward; they take turns."""
    times = {function: [] for function in functions}
    for i in range(rounds + 2):
        for function, column in times.items():
            began = time.perf_counter()
            y = function(x)
            y.backward(torch.ones_like(y))
            if i >= 2:
                column.append(1000 * (time.perf_counter() - began))
    return [statistics.median(column) for column in times.values()]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    print(f"{'B, T, heads, D':>20}" + "".join(f"{name:>24}" for name in KINDS))
    for shape in SHAPES:
        B, T, H, D = shape
        qkv = torch.randn(B, T, 3, H, D, dtype=torch.bfloat16, requires_grad=True)
        row = "".join(f"{ms:21.2f} ms" for ms in medians(KINDS.values(), qkv, rounds))
        print(f"{', '.join(map(str, shape)):>20}{row}", flush=True)


if __name__ == "__main__":
    main()
