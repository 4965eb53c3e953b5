"""Promise: a signal saves the run and ends it; going on gives the bits of no interruption.

Real processes and real signals.
"""

import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, load

import train as script

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (getattr(signal, "SIGHUP", None), 129)],
)
def test_a_signal_saves_and_the_resumed_run_is_the_same(train_small, data_dir, number, code):
    args = ("--max_iters=1000", "--eval_interval=200", "--log_interval=12", "--num_samples=0")
    assert train_small(*args, "--out_dir=whole") == 0
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--data_dir={data_dir}", *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        for line in run.stdout:
            if re.match(r"iter +120:", line):
                break
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    assert f"stopped: {number.name}" in out and "--init_from=resume" in out
    _, meta = load("run/ckpt.safetensors")
    assert 120 <= meta["progress"]["iter_num"] < 1000
    assert script.main(["--init_from=resume", "--out_dir=run"]) == 0
    whole, _ = load("whole/ckpt.safetensors")
    again, _ = load("run/ckpt.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_nobody_reads_is_saved(data_dir, tmp_path):
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--data_dir={data_dir}"]
    command += ["--max_iters=100000", "--eval_interval=90000", "--num_samples=0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if re.match(r"iter +100:", line):
                break
        run.stdout.close()
        assert run.wait(timeout=60) == 1
    _, meta = load(tmp_path / "run/ckpt.safetensors")
    assert meta["progress"]["iter_num"] >= 100


def test_under_nohup_a_closed_terminal_ends_nothing(data_dir, tmp_path):
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--data_dir={data_dir}"]
    with subprocess.Popen(
        ["nohup", *command, "--max_iters=200", "--num_samples=0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as run:
        for line in run.stdout:
            if re.match(r"iter +50:", line):
                break
        run.send_signal(signal.SIGHUP)
        run.communicate(timeout=60)
    assert run.returncode == 0


def test_a_signal_during_evaluation_and_another_are_one(data_dir, tmp_path):
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--data_dir={data_dir}"]
    command += ["--max_iters=100000", "--eval_interval=5", "--num_samples=0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if "val loss" in line:  # the save comes next
                break
        run.send_signal(signal.SIGINT)
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    assert run.returncode in (130, 143)
    load(tmp_path / "run/ckpt.safetensors")
