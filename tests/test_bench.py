"""Promise: the benchmark for GPUs is ready, and what the others share reads a run's results."""

import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, load


def test_the_gpu_benchmark_runs_dry():
    command = [sys.executable, ROOT / "tests/bench/gpu.py", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    training = [line[50:].split()[0] for line in lines if line.startswith("Folio")]
    sampling = [line[50:].split()[0] for line in lines if line.startswith(("CUDA", "kernel"))]
    assert len(training) == len(sampling) == 2 and "failed" not in done.stdout
    assert all(float(rate.replace(",", "")) > 100 for rate in training + sampling), lines


def test_the_results_of_a_run_are_those_it_saved(text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/bench")
    from shakespeare import prepare, train

    (tmp_path / "input.txt").write_text(text, encoding="utf-8", newline="")
    prepare(tmp_path, tmp_path / "input.txt")
    result = train(tmp_path, *SMALL, "--dataset=shakespeare_char", "--eval_tokens=100000")
    _, meta = load(tmp_path / "out/bench/ckpt.safetensors")
    progress = meta["progress"]
    assert result.loss == pytest.approx(progress["val_loss"], abs=1e-6)
    assert (result.first + result.second) / 2 == pytest.approx(result.loss, abs=0.05)
    assert result.training == pytest.approx(progress["train_seconds"], abs=0.01)
    assert result.wall > result.training > 0 and result.speed > 100
    assert result.options["max_iters"] == 20
