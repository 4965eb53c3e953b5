"""What the benchmarks of whole runs share: train.py in a process of its own, and its losses."""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import bins  # noqa: E402
from folio import checkpoint, metrics  # noqa: E402
from folio.batch import autocast  # noqa: E402


@dataclass
class Result:
    wall: float  # seconds of the whole process
    training: float  # seconds of it that trained
    speed: float  # tokens trained on in a second, the median of metrics.csv
    loss: float  # after the last update, nats per token of the whole validation text
    first: float  # of its first half, by which choices are made
    second: float  # and of its second half
    options: dict  # by which it was trained


def run(folder: Path, *command: str) -> tuple[str, float]:
    """The output of `python COMMAND` in `folder`, and the seconds that it took."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout, seconds


def prepare(folder: Path, text: Path) -> None:
    """Build data/shakespeare_char in `folder`."""
    run(folder, str(ROOT / "prepare.py"), "shakespeare_char", f"--input={text}")


def train(folder: Path, *words: str) -> Result:
    """Call train.py in `folder`; the run is in out/bench there."""
    _, wall = run(folder, str(ROOT / "train.py"), *words, "--out_dir=out/bench")
    rows = metrics.read_metrics(folder / "out/bench/metrics.csv")
    loss, training = float(rows[-1]["val_loss"]), float(rows[-1]["train_seconds"])
    speeds = [float(row["tokens_per_second"]) for row in rows if row["tokens_per_second"]]
    options = json.loads((folder / "out/bench/run.json").read_text("utf-8"))["options"]
    return Result(wall, training, statistics.median(speeds), loss, *halves(folder), options)


@torch.inference_mode()
def halves(folder: Path) -> list[float]:
    """The last state's loss on either half of the validation text, in windows as train.py's."""
    ckpt = checkpoint.load(folder / "out/bench/ckpt.safetensors")
    model, dtype = checkpoint.build_model(ckpt), ckpt.meta["run_config"]["dtype"]
    split = bins.load(folder / "data/shakespeare_char").val
    block_size = model.config.block_size
    starts = bins.eval_windows(len(split.tokens), block_size, len(split.tokens))
    losses = []
    for half in np.array_split(starts, 2):
        total = count = 0
        for batch in np.array_split(half, max(1, len(half) * block_size // 8192)):
            idx, targets = map(torch.from_numpy, split.batch(batch, block_size))
            with autocast("cpu", dtype):
                _, loss = model(idx, targets)
            tokens = int((targets != bins.IGNORED).sum())
            total, count = total + loss.item() * tokens, count + tokens
        losses.append(total / count)
    return losses
