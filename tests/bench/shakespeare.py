"""What the benchmarks of whole runs share: train.py in a process of its own, and its losses."""

import re
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
from sample import load_model  # noqa: E402


@dataclass
class Result:
    wall: float  # seconds of the whole process
    training: float  # seconds of it that trained
    loss: float  # after the last update, nats per token of the whole validation text
    first: float  # of its first half, by which choices are made
    second: float  # and of its second half


def prepare(folder: Path, text: Path) -> None:
    """Build data/shakespeare_char in `folder`."""
    argv = [str(ROOT / "prepare.py"), "shakespeare_char", f"--input={text}"]
    subprocess.run([sys.executable, *argv], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def train(folder: Path, *words: str) -> Result:
    """Call train.py in `folder`; the run is in out/bench there."""
    command = [sys.executable, str(ROOT / "train.py"), *words, "--out_dir=out/bench"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    training, loss = re.findall(r"val loss ([\d.]+).*; ([\d.]+) s training", done.stdout)[-1][::-1]
    return Result(wall, float(training), float(loss), *halves(folder))


@torch.inference_mode()
def halves(folder: Path) -> list[float]:
    """The last state's loss on either half of the validation text, in windows as train.py's."""
    model, meta = load_model(str(folder / "out/bench/ckpt.safetensors"), torch.device("cpu"), "")
    dtype = getattr(torch, meta["run_config"]["dtype"])
    split = bins.load(folder / "data/shakespeare_char").val
    block_size = model.config.block_size
    starts = bins.eval_windows(len(split.tokens), block_size, len(split.tokens))
    losses = []
    for half in np.array_split(starts, 2):
        total = count = 0
        for batch in np.array_split(half, max(1, len(half) * block_size // 8192)):
            idx, targets = map(torch.from_numpy, split.batch(batch, block_size))
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                _, loss = model(idx, targets)
            tokens = int((targets != bins.IGNORED).sum())
            total, count = total + loss.item() * tokens, count + tokens
        losses.append(total / count)
    return losses
