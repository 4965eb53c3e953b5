"""What several models gain: the mean of their probabilities, and a model that learns from them.

    python tests/bench/teachers.py INPUT [UPDATES] [MODELS]

INPUT is tiny Shakespeare's input.txt. Trains MODELS models (8) by config/shakespeare_char_cpu.py
with UPDATES updates (800), each with its own seed; prints the loss of the mean of the first 1, 2,
4, ... on the whole validation text; then the loss of one more model of the same recipe, with yet
another seed, alone and taught by all of them.
"""

import sys
import tempfile
from pathlib import Path

from shakespeare import ROOT, bins, prepare, train

from folio.batch import split_loss
from folio.ensemble import load_models
from folio.machine import fast_dtype, find_device

SEED = 1337


def main() -> None:
    text = Path(sys.argv[1]).resolve()
    updates = int(sys.argv[2]) if len(sys.argv) > 2 else 800
    n_models = int(sys.argv[3]) if len(sys.argv) > 3 else 8
    dtype = fast_dtype(find_device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, text)
        val = bins.load(folder / "data/shakespeare_char").val
        words = [str(ROOT / "config/shakespeare_char_cpu.py"), f"--max_iters={updates}"]
        words += ["--eval_interval=1000000", "--num_samples=0"]

        def trained(seed: int, *more: str) -> str:
            result = train(folder, *words, f"--seed={seed}", *more)
            taught = "taught" if more else "alone"
            print(f"seed {seed}, {taught}: loss {result.loss:.4f}, {result.wall:.0f} s", flush=True)
            return (folder / "out/bench").rename(folder / f"out/{seed}-{taught}")

        paths = [str(trained(SEED + i)) for i in range(n_models)]
        n = 1
        while n <= n_models:
            model, _, _ = load_models(",".join(paths[:n]))
            loss = split_loss(model, val, len(val.tokens), 16, "cpu", dtype)
            print(f"the mean of {n}: loss {loss:.4f}", flush=True)
            n *= 2
        trained(SEED + n_models)
        trained(SEED + n_models, f"--teacher={','.join(paths)}")


if __name__ == "__main__":
    main()
