"""What a save costs, and how much of it is the digest that notices damage.

    python tests/bench/checkpoint.py [MILLIONS] [ROUNDS]

Saves a state of so many million float32 numbers (124: GPT-2's weights), with and without SHA-256 in
turn, and loads it, which verifies every byte.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from folio import checkpoint  # noqa: E402


class NoDigest:
    def update(self, block):
        pass

    def digest(self):
        return bytes(32)


def seconds(action, *args) -> float:
    began = time.perf_counter()
    action(*args)
    return time.perf_counter() - began


def main() -> None:
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 124
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    tensors = {f"model.{i}": torch.randn(1_000_000) for i in range(millions)}
    meta = {key: kind() for key, kind in checkpoint.META.items()}
    sha256, times = checkpoint.hashlib.sha256, {"with": [], "without": [], "load": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "ckpt.safetensors"
        for _ in range(rounds):
            checkpoint.hashlib.sha256 = NoDigest
            times["without"].append(seconds(checkpoint.save, path, tensors, meta))
            checkpoint.hashlib.sha256 = sha256
            times["with"].append(seconds(checkpoint.save, path, tensors, meta))
            times["load"].append(seconds(checkpoint.load, path))
    medians = {name: statistics.median(values) for name, values in times.items()}
    digest = 1 - medians["without"] / medians["with"]
    size = 4 * millions
    for name, value in medians.items():
        print(f"{name:8} {value:6.2f} s, {size / value:7.0f} MB/s")
    print(f"the digest takes {digest:.0%} of a save of {size} MB")


if __name__ == "__main__":
    main()
