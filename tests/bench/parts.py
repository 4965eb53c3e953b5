"""What a run of train.py takes besides training, by part.

    python tests/bench/parts.py INPUT [RUNS] [AIM]

INPUT is tiny Shakespeare's input.txt; AIM is a row of time_to_loss.py, by default 1.898. Prints
medians of seconds over RUNS processes.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from shakespeare import ROOT, prepare, run
from time_to_loss import ROWS

CHILD = """
import json, sys, time
sys.path.insert(0, {root!r})
import train
from folio import run, startup
times = {{"imports": time.time() - {began}}}

def measure(part, owner, name):
    function = getattr(owner, name)
    def measured(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[part] = times.get(part, 0) + time.perf_counter() - start
    setattr(owner, name, measured)

measure("data set", startup, "find_dataset")
measure("model, optimizers", train, "build_run")
measure("plan", train.plan, "plan")
measure("evaluations", run.Run, "evaluate")
measure("saves", run.Run, "save")
measure("samples", train, "add_samples")
measure("continuations", run.Run, "continuation")
measure("pictures", train, "plot_losses")
loop = train.training_loop

def training_loop(run, log):
    reason = loop(run, log)
    times["training"], _ = run.clock.read()
    return reason

train.training_loop = training_loop
train.main(sys.argv[1:])
times["end"] = time.time() - {began}
print("TIMES", json.dumps(times))
"""


def measure(folder: Path, words: list[str]) -> dict[str, float]:
    """Seconds of one process by part."""
    began = time.time()
    code = CHILD.format(root=str(ROOT), began=began)
    output, wall = run(folder, "-c", code, *words, "--out_dir=out/bench")
    times = json.loads(output.rpartition("TIMES ")[2])
    end, training = times.pop("end"), times.pop("training")
    times["all else"] = end - training - sum(times.values())
    times["exit"] = wall - end
    return {**times, "sum": wall - training, "training": training, "wall": wall}


def main() -> None:
    text = Path(sys.argv[1]).resolve()
    runs = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    recipe, *words = ROWS[sys.argv[3] if len(sys.argv) > 3 else "1.898"].split()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), text)
        words = [str(ROOT / "config" / recipe), *words]
        table = [measure(Path(folder), words) for _ in range(runs)]
    for part in table[0]:
        print(f"{part:20}{statistics.median(times[part] for times in table):7.2f} s")


if __name__ == "__main__":
    main()
