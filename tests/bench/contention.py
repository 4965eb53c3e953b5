"""How fast the quick start trains alone, and beside a program that keeps one core busy.

    python tests/bench/contention.py INPUT [ROUNDS] [SETTING...]

INPUT is tiny Shakespeare's input.txt. A SETTING is an environment variable, NAME=VALUE, or `none`,
which leaves all as Folio sets it. Each round trains by each setting in turn: 40 updates alone, 40
beside a Python loop that never waits. Prints medians of tokens a second, and their ratios to
libgomp's own default alone, GOMP_SPINCOUNT=300000.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shakespeare import ROOT, prepare, train

LIBGOMP = "GOMP_SPINCOUNT=300000"
SETTINGS = (LIBGOMP, "none", "OMP_WAIT_POLICY=passive")
WORDS = "--max_iters=40 --log_interval=5 --eval_interval=1000 --eval_tokens=1000 --num_samples=0"
BUSY = (sys.executable, "-c", "while True: pass")


def speed(folder: Path, setting: str) -> float:
    """Tokens a second with this setting."""
    name, _, value = setting.partition("=")
    if setting != "none":
        os.environ[name] = value
    try:
        recipe = str(ROOT / "config/shakespeare_char_cpu.py")
        return train(folder, recipe, *WORDS.split()).speed
    finally:
        os.environ.pop(name, None)


def main() -> None:
    text = Path(sys.argv[1]).resolve()
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    settings = (LIBGOMP, *sys.argv[3:]) if len(sys.argv) > 3 else SETTINGS
    alone, beside = ({setting: [] for setting in settings} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), text)
        for _ in range(rounds):
            for setting in settings:
                alone[setting].append(speed(Path(folder), setting))
            with subprocess.Popen(BUSY) as busy:
                try:
                    for setting in settings:
                        beside[setting].append(speed(Path(folder), setting))
                finally:
                    busy.kill()
    best = statistics.median(alone[LIBGOMP])
    print(f"{'tokens a second':26}{'alone':>10}{'ratio':>8}{'busy':>10}{'ratio':>8}")
    for setting in settings:
        print(f"{setting:26}", end="")
        for speeds in (alone[setting], beside[setting]):
            middle = statistics.median(speeds)
            print(f"{middle:10,.0f}{middle / best:8.2f}", end="")
        print()


if __name__ == "__main__":
    main()
