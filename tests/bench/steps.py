"""Where the time of an update goes, and how it and the memory grow with block and width.

    python tests/bench/steps.py [ROUNDS]

Medians in ms of the parts of one update, for models made as config/shakespeare_char_cpu.py makes
them: gathering the batch, forward, backward, the norm of the gradient, the optimizers; then tokens
a second, the FLOPs of flops_per_token() in a second, and the most MiB that a process held
beyond its imports, weights and moments included. Every shape has a process of its own.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from noise import RECIPE, make_run, noise

from data import bins
from folio.batch import autocast, get_batch

SHAPES = [  # what, n_layer, n_head, n_embd, block_size, batch_size
    ("quick", 4, 2, 128, 256, 16),
    ("baby", 6, 6, 384, 256, 64),
    ("GPT-2", 12, 12, 768, 1024, 2),
    *(("block", 4, 4, 256, 2**k, 2 ** (13 - k)) for k in range(6, 13)),  # 8,192 tokens each
    *(("width", 4, width // 64, width, 256, 32) for width in (128, 256, 512, 1024)),
]
PARTS = ("data", "forward", "backward", "norm", "optimizer")


def one(shape: list, rounds: int) -> dict:
    """Medians of the parts in seconds, FLOPs and tokens of an update, bytes held at most."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
    sizes = dict(zip(names, shape, strict=True))
    vocab_size = 50257 if sizes["n_embd"] == 768 else 65
    with noise(vocab_size) as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run = make_run(folder, **{**RECIPE, **sizes, "vocab_size": vocab_size})
        cfg, split = run.cfg, run.dataset.train
        seconds = {part: [] for part in PARTS}
        for i in range(rounds + 2):
            spent = dict.fromkeys(PARTS, 0.0)
            for n in np.split(np.arange(cfg.batch_size), cfg.batch_size // cfg.micro_batch_size):
                marks = [now(cfg.device)]
                n += i * cfg.batch_size
                starts = bins.window(cfg.seed, n, len(split.tokens), cfg.block_size)
                idx, targets = get_batch(split, starts, cfg.block_size, cfg.device)
                marks.append(now(cfg.device))
                with autocast(cfg.device, cfg.dtype):
                    _, loss = run.model(idx, targets)
                marks.append(now(cfg.device))
                loss.backward()
                marks.append(now(cfg.device))
                for part, begin, end in zip(PARTS, marks, marks[1:], strict=False):
                    spent[part] += end - begin
            marks = [now(cfg.device)]
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), math.inf)
            marks.append(now(cfg.device))
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            spent["norm"], spent["optimizer"] = marks[1] - marks[0], now(cfg.device) - marks[1]
            if i >= 2:
                for part in PARTS:
                    seconds[part].append(spent[part])
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if cfg.device != "cpu":
        held = torch.accelerator.max_memory_allocated() // 1024
    tokens = cfg.batch_size * cfg.block_size
    return {
        "parts": [statistics.median(seconds[part]) for part in PARTS],
        "flops": tokens * run.model.flops_per_token(),
        "tokens": tokens,
        "KiB": held,
    }


def now(device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    if len(sys.argv) > 2:
        print(json.dumps(one(json.loads(sys.argv[2]), rounds)))
        return
    head = "layers heads width block batch"
    print(f"{'':6}{head}" + "".join(f"{p:>10}" for p in PARTS) + "  tokens/s  TFLOP/s   MiB")
    for what, *shape in SHAPES:
        command = [sys.executable, __file__, str(rounds), json.dumps(shape)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout)
        parts, total = result["parts"], sum(result["parts"])
        print(
            f"{what:6}"
            + "".join(f"{n:6}" for n in shape)
            + "".join(f"{1000 * part:7.1f} ms" for part in parts)
            + f"{result['tokens'] / total:10,.0f}{result['flops'] / total / 1e12:9.2f}"
            + f"{result['KiB'] / 1024:9,.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
