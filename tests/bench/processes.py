"""How many tokens per second one process with all cores trains on, and one process for each core.

    python tests/bench/processes.py [ROUNDS] [ARGUMENTS OF train.py]

Both train on the same windows in updates of the same size, in turn. The second is started by
torchrun and averages gradients over gloo. Without further arguments it is the quick start's recipe.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORES = os.cpu_count() or 1
ITERS = 100


def tokens_per_second(launcher: list[str], threads: int, folder: str, argv: list[str]) -> float:
    """The median of the speeds that a run logs, except for the first."""
    command = [*launcher, str(ROOT / "train.py"), *argv, f"--out_dir={folder}/run"]
    subprocess.run(
        [*command, f"--max_iters={ITERS}", "--log_interval=10", "--eval_interval=1000"],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
        capture_output=True,
    )
    with open(f"{folder}/run/metrics.csv", newline="") as file:
        logged = [row["tokens_per_second"] for row in csv.DictReader(file)]
    return statistics.median(float(value) for value in logged[1:] if value)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    argv = sys.argv[2:] or [str(ROOT / "config/shakespeare_char_cpu.py")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={CORES}"]
    one, many = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            one.append(tokens_per_second([sys.executable], CORES, folder, argv))
            many.append(tokens_per_second([sys.executable, *torchrun], 1, folder, argv))
    ratios = [m / o for m, o in zip(many, one, strict=True)]
    print(f"1 process, {CORES} threads: {statistics.median(one):9,.0f} tokens/s")
    print(f"{CORES} processes, 1 thread: {statistics.median(many):9,.0f} tokens/s")
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
