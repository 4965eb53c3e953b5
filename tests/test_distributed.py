"""Promise: several processes train the same as one, and all of them end when one does.

Real processes on CPUs: they are killed, stopped, and given broken disks.
"""

import copy
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import MODERN, ROOT, SMALL, load, write_bins

import train
from data import bins
from folio import checkpoint, distributed, machine, startup
from folio.metrics import read_metrics
from model import GPT, GPTConfig

WORKER = str(ROOT / "tests" / "worker.py")
LONG = ("--max_iters=100000", "--log_interval=1", "--num_samples=0")
GONE_SECONDS = 45  # within which all processes end after one has

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs POSIX")


class Processes:
    """n processes of worker.py, whose folder is the current one; of torchrun if it has options."""

    def __init__(
        self, n: int, *runs: list[str], fault: str = "", at: int = 7, torchrun: tuple = ()
    ):
        launcher = [sys.executable]
        if torchrun:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={n}", *torchrun]
        argv = " and ".join(" ".join(run) for run in runs).split()
        self.process = subprocess.Popen(
            [*launcher, WORKER, str(n), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FAULT": fault, "FAULT_AT": str(at), "OMP_NUM_THREADS": "1"},
        )

    def wait(self, seconds: float = 120) -> int:
        """Wait for the exit code. If there is none in time, kill all processes and fail."""
        try:
            self.out, self.err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for pid in (self.process.pid, *pids()):
                os.kill(pid, signal.SIGKILL)
            self.out, self.err = self.process.communicate()
            pytest.fail(f"still running after {seconds} seconds: {self.out} {self.err}")
        return self.process.returncode

    def errors(self) -> list[str]:
        """The lines that start with "error:"."""
        return re.findall(r"^error: .*", self.err, re.MULTILINE)

    def wait_for(self, path: str, text: str = "") -> None:
        """Until a file exists and has the text."""
        end = time.monotonic() + 60
        while not (Path(path).exists() and text in Path(path).read_text()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)


def pids() -> list[int]:
    """The workers that still run, by rank."""
    paths = sorted(Path().glob("pid.*"))
    started = [int(line) for path in paths for line in path.read_text().split()]
    return [pid for pid in started if Path(f"/proc/{pid}/cmdline").exists()]


def codes(n: int) -> list[int]:
    return [int(Path(f"code.{rank}").read_text().split()[-1]) for rank in range(n)]


def words(data_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"--data_dir={data_dir}", "--micro_batch_size=2", "--batch_size=12", *more]


def assert_same_run(one: str, other: str, rel: float) -> None:
    logs = [read_metrics(Path(run, "metrics.csv")) for run in (one, other)]
    losses, other_losses = ([float(row["loss"] or 0) for row in rows] for rows in logs)
    assert other_losses == pytest.approx(losses, rel=rel)
    (one, meta), (other, other_meta) = (load(f"{run}/ckpt.safetensors") for run in (one, other))
    assert meta["progress"]["n"] == other_meta["progress"]["n"] == 240
    for name in ("train_loss", "val_loss", "best_val_loss"):
        assert other_meta["progress"][name] == pytest.approx(meta["progress"][name], rel=rel), name
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if name != "sha256":
            assert (other[name] - tensor).norm() <= 100 * rel * tensor.norm(), name


def drawn(n: int, run: int) -> list[list[int]]:
    """The windows of each update of a run, in the order of micro-steps and ranks."""
    updates = {}
    for rank in range(n):
        text = Path(f"windows.{rank}").read_text().split("run\n")[1 + run]
        of_rank = {}
        for update in text.split("update ")[1:]:
            iter_num, *lines = update.splitlines()
            of_rank[int(iter_num)] = [[int(w) for w in line.split()] for line in lines]
        for iter_num, micro_batches in of_rank.items():
            updates.setdefault(iter_num, []).append(micro_batches)
    return [
        [w for step in zip(*updates[i], strict=True) for micro_batch in step for w in micro_batch]
        for i in sorted(updates)
    ]


@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_train_as_one(data_dir, tmp_path, monkeypatch, n):
    monkeypatch.chdir(tmp_path)
    modern = [*MODERN, "--activation_checkpointing=half"]
    full = ["--fsdp", "--activation_checkpointing=full"]
    runs = {"ddp": [], "fsdp": full, "muon": modern}
    several = Processes(n, *(words(data_dir, *m, f"--out_dir={run}") for run, m in runs.items()))
    assert train.main(words(data_dir, "--out_dir=one")) == 0
    assert train.main(words(data_dir, *MODERN, "--out_dir=one_muon")) == 0
    assert several.wait() == 0, several.err
    assert several.out.count("machine: cpu") == 3, "one rank prints"
    tokens = bins.load(data_dir / "small").train.tokens
    for run, name in enumerate(runs):
        assert_same_run("one_muon" if name == "muon" else "one", name, rel=1e-5)
        n_windows = np.arange(240).reshape(20, 12)
        expected = [bins.window(1337, n, len(tokens), 16).tolist() for n in n_windows]
        assert drawn(n, run) == expected


def test_a_run_resumes_with_another_number_of_processes(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = ["--max_iters=10", "--lr_decay_iters=20"]
    resume = ["--init_from=resume", "--max_iters=20"]
    for run, more in {"one": [], "half_ddp": half, "half_fsdp": half}.items():
        assert train.main(words(data_dir, *more, f"--out_dir={run}")) == 0
    several = Processes(
        2,
        [*resume, "--out_dir=half_ddp"],
        [*resume, "--out_dir=half_fsdp", "--fsdp"],
        words(data_dir, *half, "--out_dir=ddp_half"),
        words(data_dir, *half, "--out_dir=fsdp_half", "--fsdp"),
    )
    assert several.wait() == 0, several.err
    assert train.main([*resume, "--out_dir=ddp_half"]) == 0
    assert train.main([*resume, "--out_dir=fsdp_half"]) == 0
    for run in ("half_ddp", "half_fsdp", "ddp_half", "fsdp_half"):
        assert_same_run("one", run, rel=1e-5)


def test_a_killed_process_ends_all(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Processes(2, words(data_dir, *LONG))
    run.wait_for("run/metrics.csv", "\n30,")
    os.kill(pids()[1], signal.SIGKILL)
    assert run.wait(GONE_SECONDS) == 1
    assert run.errors() == ["error: another process ended; the last save is intact"]
    assert not pids() and Path("run/ckpt.safetensors").exists()


def test_a_restart_goes_on_to_the_same_bits(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = words(data_dir, "--max_iters=200", "--num_samples=0", "--log_interval=1")
    run = Processes(
        2, argv, [*argv, "--out_dir=undisturbed"], torchrun=("--standalone", "--max-restarts=1")
    )
    run.wait_for("run/metrics.csv", "\n50,")
    os.kill(pids()[1], signal.SIGKILL)
    assert run.wait() == 0, run.err
    assert run.out.count("resume:  run/ckpt.safetensors") == 1
    one, other = (load(f"{name}/ckpt.safetensors")[0] for name in ("undisturbed", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one if name != "sha256")


def test_a_restart_finds_the_run_wherever_it_is(train_small, monkeypatch):
    """In the default folder, with what the first start chose."""
    assert train_small("--out_dir=out/run", "--max_iters=2", "--num_samples=0") == 0
    monkeypatch.setattr(distributed, "is_restart", lambda: True)
    argv = ["--init_from=gpt2", "--dataset=other", "--minutes=5"]
    given, quick_start = startup.read_given(train.TrainConfig, argv)
    assert (given["init_from"], given["out_dir"]) == ("resume", "out/run") and not quick_start
    assert (given["dataset"], given["max_iters"], given["minutes"]) == ("small", 2, 0)
    assert not given.keys() & {"micro_batch_size", "fsdp"}, "there may be fewer processes"
    given, _ = startup.read_given(train.TrainConfig, [*argv, "--out_dir=out/new"])
    assert given["init_from"] == "gpt2", "nothing was saved there"


def test_what_is_broadcast_is_contiguous(monkeypatch):
    """As NCCL demands; the momentum of a tall matrix is a view that is not."""
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed.dist, "broadcast", broadcast := Mock())
        broadcast.side_effect = lambda tensor, src: tensor.copy_(torch.arange(8.0).view(4, 2))
        momentum = torch.zeros(2, 4).t()
        source = {"momentum": torch.ones(4, 2)} if rank == 0 else {}
        distributed.load({"momentum": momentum}, source)
        assert broadcast.call_args.args[0].is_contiguous()
        assert torch.equal(momentum, torch.arange(8.0).view(4, 2))


@pytest.mark.parametrize("more", [(), pytest.param(("--fsdp",), marks=pytest.mark.soak)])
def test_a_value_that_is_no_number_on_one_rank_ends_all_with_3(
    data_dir, tmp_path, monkeypatch, more
):
    monkeypatch.chdir(tmp_path)
    run = Processes(2, words(data_dir, "--eval_interval=5", *more), fault="nan")
    assert run.wait(GONE_SECONDS) == 1
    assert codes(2) == [3, 3]
    (error,) = run.errors()
    assert "training diverged at iteration 7" in error
    tensors, meta = load("run/ckpt.safetensors")
    assert meta["progress"]["iter_num"] == 5
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("more", [pytest.param((), marks=pytest.mark.soak), ("--fsdp",)])
def test_a_full_disk_of_rank_0_ends_all_with_1(data_dir, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    run = Processes(2, words(data_dir, *more), fault="full disk")
    assert run.wait(GONE_SECONDS) == 1
    assert codes(2) == [1, 1]
    assert run.errors() == ["error: [Errno 28] No space left on device: 'run'"]


def test_a_signal_to_one_process_stops_and_saves_all(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Processes(2, words(data_dir, *LONG))
    run.wait_for("run/metrics.csv", "\n30,")
    os.kill(pids()[1], signal.SIGINT)
    assert run.wait(GONE_SECONDS) == 1
    assert codes(2) == [130, 130]
    assert run.out.count("resume:  python train.py --init_from=resume --out_dir=run") == 1
    assert load("run/ckpt.safetensors")[1]["progress"]["iter_num"] >= 30


def test_torchrun_passes_a_signal_on(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Processes(2, words(data_dir, *LONG), torchrun=("--standalone",))
    run.wait_for("run/metrics.csv", "\n30,")
    run.process.terminate()
    assert run.wait(GONE_SECONDS) == 1
    assert codes(2) == [143, 143]
    assert load("run/ckpt.safetensors")[1]["progress"]["iter_num"] >= 30


def test_only_rank_0_reads_the_checkpoint(data_dir, tmp_path, monkeypatch):
    """Rank 1 has another state at the same path, as on machines that do not share a disk."""
    monkeypatch.chdir(tmp_path)
    half = ["--max_iters=10", "--lr_decay_iters=20"]
    assert train.main(words(data_dir, "--out_dir=one")) == 0
    for folder, more in (("elsewhere", ["--seed=2"]), (".", [])):
        Path(folder).mkdir(exist_ok=True)
        argv = words(data_dir, *half, *more, f"--out_dir={folder}/run")
        assert train.main(argv) == 0
    there = load("elsewhere/run/ckpt.safetensors")[0]
    run = Processes(2, ["--init_from=resume", "--out_dir=run", "--max_iters=20"], fault="elsewhere")
    assert run.wait() == 0, run.err
    assert_same_run("one", "run", rel=1e-5)
    same = load("elsewhere/run/ckpt.safetensors")[0]
    assert all(torch.equal(there[name], same[name]) for name in there), "rank 1 writes nothing"


def test_what_a_user_did_wrong_is_said_once(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = {
        "--no_such_option=1": "unknown option",
        "--batch_size=9 --micro_batch_size=0": "9 is not a multiple of 2 processes; use",
        "--fsdp --optimizer=muon": "which Muon needs whole",
        "--dataset=none": "there is no data set",
        "--init_from=none": "cannot open checkpoint",
        "--out_dir=/dev/null/run": "/dev/null",
    }
    run = Processes(2, *(words(data_dir, *argv.split()) for argv in wrong))
    assert run.wait(GONE_SECONDS) == 1
    assert codes(2) == [2, 2]
    assert all(set(Path(f"code.{rank}").read_text().split()) == {"2"} for rank in range(2))
    for error, message in zip(run.errors(), wrong.values(), strict=True):
        assert message in error
    assert not Path("run").exists()


def test_ranks_with_different_data_are_refused(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("data", 1), ("elsewhere/data", 2)):
        ids = np.random.default_rng(seed).integers(0, 256, 5000)
        write_bins(Path(folder) / "random", ids, 256)
    run = Processes(2, words(Path("data"), "--dataset=random"), fault="elsewhere")
    assert run.wait(GONE_SECONDS) == 1
    assert codes(2) == [2, 2]
    assert run.errors() == ["error: data/random of rank 1 is not the one of rank 0"]


@pytest.mark.parametrize(("mode", "n_calls"), [("none", 4), ("half", 6), ("full", 8)])
def test_activation_checkpointing_computes_blocks_again(monkeypatch, mode, n_calls):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=16, block_size=8, vocab_size=10, dropout=0.2))
    plain, calls = copy.deepcopy(model), []
    for block in model.h:
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    cfg = train.TrainConfig(device="cpu", compile=False, activation_checkpointing=mode)
    monkeypatch.setattr(distributed, "checkpoint", watched := Mock(wraps=distributed.checkpoint))
    gradients = []
    for module in (plain, distributed.parallelize(model, cfg)):
        torch.manual_seed(1)
        idx = torch.randint(10, (3, 8))
        module(idx, idx)[1].backward()
        gradients.append([p.grad for p in module.parameters()])
    assert len(calls) == n_calls
    n_again = watched.call_count
    with torch.no_grad():
        model(idx)
    assert watched.call_count == n_again, "a CUDA graph of sampling cannot hold one"
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_micro_batch_that_does_not_fit_is_halved(train_small, monkeypatch, capsys):
    """As on a GPU on which three sequences fit."""
    forward = GPT.forward

    def limited(self, idx, *args, most=None, **kwargs):
        if len(idx) > (most or (6 if self.wte.weight.grad is None else 3)):
            kind = torch.OutOfMemoryError if len(idx) % 2 else RuntimeError  # as on CUDA, on MPS
            raise kind("out of memory")
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", limited)
    shrunk = []

    def build(cfg, *args):
        run = build_run(cfg, *args)
        if run.teacher:  # of which two sequences fit
            monkeypatch.setattr(run.teacher, "forward", partial(limited, run.teacher, most=2))
        run.shrink_micro_batch_size()
        shrunk.append(run.cfg.micro_batch_size)
        return run

    build_run = train.build_run
    monkeypatch.setattr(train, "build_run", build)
    assert train_small("--batch_size=24", "--micro_batch_size=24") == 0
    assert train_small("--batch_size=25", "--micro_batch_size=25") == 0
    assert shrunk == [3, 1]
    argv = ("--batch_size=24", "--micro_batch_size=24", "--teacher=run", "--out_dir=taught")
    assert train_small(*argv) == 0
    assert shrunk == [3, 1, 1]
    assert train_small("--batch_size=24") == 0


def test_ranks_whose_memory_differs_agree(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ("--micro_batch_size=6", "--dropout=0")
    several = Processes(2, words(data_dir, *more), fault="memory")
    assert several.wait(GONE_SECONDS) == 0, several.err
    assert load("run/ckpt.safetensors")[1]["run_config"]["micro_batch_size"] == 1
    assert train.main(words(data_dir, *more, "--out_dir=one")) == 0
    assert_same_run("one", "run", rel=1e-5)


def test_a_gpu_takes_what_its_memory_holds(monkeypatch):
    cfg = train.TrainConfig(batch_size=24, device="cuda", dtype="bfloat16")
    model = checkpoint.empty_model("gpt", GPTConfig())
    need = {n: machine.memory_needed(model, replace(cfg, micro_batch_size=n)) for n in (1, 6, 24)}
    for n, free in ((1, 2**20), (1, need[6]), (6, need[6] + 1), (24, need[24] + 1)):
        monkeypatch.setattr(machine, "available_memory", lambda _, free=free: free)
        assert machine.auto_micro_batch_size(model, cfg) == (4 if free == need[6] else n)


@pytest.mark.soak
def test_a_process_that_hangs_ends_all_after_the_time_out(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Processes(2, words(data_dir, *LONG), fault="hang", torchrun=("--standalone",))
    assert run.wait(GONE_SECONDS + 15) == 1  # torchrun kills a process 30 s after SIGTERM
    (error,) = run.errors()
    assert "another process did not answer" in error and not pids()


@pytest.mark.soak
@pytest.mark.parametrize("fsdp", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM", "SIGINT", "small disk", "nan"])
def test_whatever_ends_one_process_at_any_moment(data_dir, tmp_path, monkeypatch, fault, fsdp):
    """Ten times each, 20 with and without FSDP: nothing hangs, and what was saved resumes."""
    expected = {"SIGKILL": 1, "SIGTERM": 143, "SIGINT": 130, "small disk": 1, "nan": 3}[fault]
    rng = random.Random(fault)
    for i in range(10):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.chdir(folder)
        at = rng.randrange(1000, 300_000) if fault == "small disk" else rng.randrange(1, 60)
        argv = words(data_dir, *LONG, "--snapshot_interval=7", *fsdp)
        run = Processes(2, argv, fault=fault, at=at)
        if fault.startswith("SIG"):
            run.wait_for("run/metrics.csv", f"\n{at},")
            time.sleep(rng.random() / 50)
            victim = rng.randrange(2)
            os.kill(pids()[victim], getattr(signal, fault))
            began = time.monotonic()
            assert run.wait(GONE_SECONDS) == 1
            assert time.monotonic() - began < GONE_SECONDS and not pids()
            ranks = {0, 1} - ({victim} if fault == "SIGKILL" else set())
        else:
            assert run.wait(GONE_SECONDS + 30) == 1, run.out
            ranks = {0, 1}
        for rank in ranks:
            assert Path(f"code.{rank}").read_text().split() == [str(expected)], run.err
        if Path("run/ckpt.safetensors").exists():
            assert train.main(["--init_from=resume", "--out_dir=run", "--eval_only"]) == 0
