"""Causal attention, forward and backward, on this CPU: what `attend()` in model.py is built on.

    python tests/bench/attention_cpu.py [ROUNDS]

Medians in ms of: SDPA in float32, in bfloat16, in float32 with dropout 0.2 on the attention
weights, and softmax(q k^T) v written out with that dropout. They take turns.
"""

import math
import statistics
import sys
import time

import torch
from torch.nn import functional as F

SHAPES = [(12, 4, 64, 32), (8, 6, 256, 64), (4, 6, 512, 64), (2, 12, 1024, 64)]  # B, n_head, T, D


def sdpa(dtype: torch.dtype, dropout: float):
    def attention(qkv):
        parts = qkv.to(dtype).unbind(2)
        return F.scaled_dot_product_attention(*parts, dropout_p=dropout, is_causal=True)

    return attention


def written_out(qkv):
    q, k, v = qkv.unbind(2)
    T = q.shape[2]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return F.dropout(scores.softmax(-1), 0.2) @ v


KINDS = {
    "float32": sdpa(torch.float32, 0),
    "bfloat16": sdpa(torch.bfloat16, 0),
    "float32, dropout": sdpa(torch.float32, 0.2),
    "written out, dropout": written_out,
}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    print(f"{'B, heads, T, D':>20}" + "".join(f"{name:>22}" for name in KINDS))
    for B, H, T, D in SHAPES:
        qkv = torch.randn(B, H, 3, T, D, requires_grad=True)
        times = {name: [] for name in KINDS}
        for i in range(rounds + 2):
            for name, attention in KINDS.items():
                began = time.perf_counter()
                y = attention(qkv)
                y.backward(torch.ones_like(y))
                if i >= 2:
                    times[name].append(1000 * (time.perf_counter() - began))
        row = "".join(f"{statistics.median(column):19.2f} ms" for column in times.values())
        print(f"{f'{B}, {H}, {T}, {D}':>20}{row}", flush=True)


if __name__ == "__main__":
    main()
