"""Promise: the benchmark for GPUs, which few machines can run, is ready."""

import subprocess
import sys

from conftest import ROOT


def test_the_gpu_benchmark_runs_dry():
    command = [sys.executable, ROOT / "tests/bench/gpu.py", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.startswith(("Folio, ", "small"))]
    assert len(rows) == 3 and "failed" not in done.stdout
    for row in rows:
        assert float(row.split()[-2].replace(",", "")) > 100, row
