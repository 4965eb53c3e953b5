"""An update in float32 and in bfloat16 on this CPU, for models of several shapes.

    python tests/bench/dtype_cpu.py [ROUNDS]

The two alternate, on random tokens; printed are the medians and their ratio. What `dtype=auto`
chooses (fast_dtype in folio/machine.py) follows from this table.
"""

import statistics
import sys
import time

from noise import make_run, noise, train

SHAPES = [  # n_layer, n_head, n_embd, block_size, batch_size
    (4, 4, 64, 64, 12),
    (4, 4, 128, 64, 12),
    (4, 4, 128, 256, 12),
    (4, 4, 256, 64, 12),
    (6, 6, 384, 256, 4),
    (4, 12, 768, 256, 2),
    (2, 12, 768, 1024, 1),
]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
    print("layers heads width block batch   float32  bfloat16   ratio")
    with noise() as folder:
        for shape in SHAPES:
            sizes = dict(zip(names, shape, strict=True))
            runs = [
                make_run(folder, **sizes, vocab_size=65, device="cpu", dtype=dtype)
                for dtype in ("float32", "bfloat16")
            ]
            times = [[], []]
            for i in range(rounds + 2):
                for run, column in zip(runs, times, strict=True):
                    began = time.perf_counter()
                    train.update(run)
                    if i >= 2:
                        column.append(1000 * (time.perf_counter() - began))
            a, b = map(statistics.median, times)
            columns = "".join(f"{n:6}" for n in shape)
            print(f"{columns}{a:7.1f} ms{b:7.1f} ms{a / b:8.2f}", flush=True)


if __name__ == "__main__":
    main()
