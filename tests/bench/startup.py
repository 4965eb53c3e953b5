"""How long --help, an error and a first token take, beside `import torch` alone.

    python tests/bench/startup.py [RUNS]

Prints medians of whole processes, in turn, and what is left when torch's import is taken off. The
token is that of a small model, which is trained beforehand by one update.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "train.py --help": [str(ROOT / "train.py"), "--help"],
    "train.py --widht=3": [str(ROOT / "train.py"), "--widht=3"],
    "sample.py --help": [str(ROOT / "sample.py"), "--help"],
    "sample.py --top_k=0": [str(ROOT / "sample.py"), "--top_k=0"],
    "sample.py, a token": [str(ROOT / "sample.py"), "--max_new_tokens=1"],
    "prepare.py --help": [str(ROOT / "prepare.py"), "--help"],
    "prepare.py nowhere": [str(ROOT / "prepare.py"), "nowhere"],
}


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    times = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        train = [str(ROOT / "train.py"), "--dataset=pydocs", "--max_iters=1", "--num_samples=0"]
        subprocess.run([sys.executable, *train], cwd=folder, capture_output=True, check=True)
        for _ in range(runs):
            for name, command in COMMANDS.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, *command], cwd=folder, capture_output=True)
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(all_times) for name, all_times in times.items()}
    for name, seconds in medians.items():
        beyond = seconds - medians["import torch"]
        print(f"{name:22} {seconds:5.2f} s, {beyond:+5.2f} s against import torch")


if __name__ == "__main__":
    main()
