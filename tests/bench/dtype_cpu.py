"""An update in float32 and in bfloat16 on this CPU, for models of several shapes.

    python tests/bench/dtype_cpu.py [ROUNDS]

The two alternate, on random tokens; printed are the medians and their ratio. What `dtype=auto`
chooses (choose_machine in train.py) follows from this table.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import bins  # noqa: E402

SHAPES = [  # n_layer, n_head, n_embd, block_size, batch_size
    (4, 4, 64, 64, 12),
    (4, 4, 128, 64, 12),
    (4, 4, 128, 256, 12),
    (4, 4, 256, 64, 12),
    (6, 6, 384, 256, 4),
    (4, 12, 768, 256, 2),
    (2, 12, 768, 1024, 1),
]


def make_run(folder: Path, shape: tuple, dtype: str) -> train.Run:
    names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
    cfg = train.TrainConfig(
        **dict(zip(names, shape, strict=True)), vocab_size=65, bias=False, device="cpu", dtype=dtype
    )
    return train.make_run(train.choose_machine(cfg, None), bins.load(folder), {}, {}, None)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print("layers heads width block batch   float32  bfloat16   ratio")
    with tempfile.TemporaryDirectory() as parent:
        ids = np.random.default_rng(0).integers(0, 65, 20_000)
        with bins.Writer(Path(parent) / "noise", 65) as writer:
            for split in bins.SPLITS:
                writer.add(split, ids)
            writer.finish({s: {"bytes": len(ids)} for s in bins.SPLITS}, {"kind": "byte"}, [])
        for shape in SHAPES:
            runs = [make_run(Path(parent) / "noise", shape, d) for d in ("float32", "bfloat16")]
            times = [[], []]
            for i in range(rounds + 2):
                for run, column in zip(runs, times, strict=True):
                    began = time.perf_counter()
                    train.update(run)
                    if i >= 2:
                        column.append(1000 * (time.perf_counter() - began))
            a, b = map(statistics.median, times)
            sizes = "".join(f"{n:6}" for n in shape)
            print(f"{sizes}{a:7.1f} ms{b:7.1f} ms{a / b:8.2f}", flush=True)


if __name__ == "__main__":
    main()
