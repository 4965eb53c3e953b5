"""Seconds of a whole `python train.py` to a loss on tiny Shakespeare, over seeds.

    python tests/bench/time_to_loss.py INPUT [SEEDS] [ROW ...]

INPUT is tiny Shakespeare's input.txt. The recipes and their lengths were chosen beforehand; the
loss is that of the last update, on the whole validation text and on either half. The process
includes imports, evaluations, saving, the picture and, but for the first row, a sample.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from shakespeare import ROOT, prepare, train

QUICK_START = "shakespeare_char_cpu.py"  # what `python train.py` takes
ROWS = {  # what is aimed at: the recipe in config/, and the words that follow it
    "1.898": f"{QUICK_START} --n_layer=2 --block_size=64 --batch_size=12 --learning_rate=16e-3 "
    "--num_samples=0 --max_iters=210 --eval_interval=210",
    "quick start": QUICK_START,
    "1.4697": f"{QUICK_START} --max_iters=680 --eval_interval=680",
    "best": "shakespeare_char.py",
}


def main() -> None:
    text = Path(sys.argv[1]).resolve()
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    print(f"{'aim':12}{'seed':>8}{'wall':>10}{'training':>10}{'loss':>9}{'halves':>16}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, text)
        for aim in sys.argv[3:] or ROWS:
            recipe, *words = ROWS[aim].split()
            results = []
            for seed in range(1337, 1337 + seeds):
                r = train(folder, str(ROOT / "config" / recipe), *words, f"--seed={seed}")
                results.append(r)
                row = f"{r.wall:8.1f} s{r.training:8.1f} s{r.loss:9.4f}"
                print(f"{aim:12}{seed:8}{row}{r.first:8.4f}{r.second:8.4f}", flush=True)
            wall = statistics.median(r.wall for r in results)
            loss = statistics.median(r.loss for r in results)
            print(f"{aim:12}{'median':>8}{wall:8.1f} s{'':10}{loss:9.4f}", flush=True)


if __name__ == "__main__":
    main()
