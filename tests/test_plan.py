"""Promise: --plan says what a run takes and leaves nothing; errors of memory say what to do."""

import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import MODERN

import train as script
from data.errors import UserError
from folio import checkpoint, machine, plan
from folio.options import build_options
from model import GPTConfig
from train import TrainConfig


def numbers(line: str) -> list[float]:
    return [float(text.replace(",", "")) for text in re.findall(r"[\d,]*\.?\d+", line)]


@pytest.mark.parametrize("argv", [(), MODERN, ("--model=bigram",)])
def test_a_plan_adds_up_and_leaves_nothing(train_small, capsys, argv):
    assert train_small("--plan", "--n_embd=128", *argv) == 0
    out = capsys.readouterr().out
    assert not Path("run").exists()
    table, memory = out.split("\n\n")[:2]
    *rows, total = [numbers(line.rpartition(" x ")[2]) for line in table.splitlines()[1:]]
    assert sum(row[-1] for row in rows) == total[0]
    assert all(row[-3] * row[-2] == row[-1] for row in rows)
    assert f"{total[0]:,.0f} parameters" in out
    *parts, together = [numbers(line)[-1] for line in memory.splitlines()[1:]]
    assert sum(parts) == pytest.approx(together, abs=0.3)
    assert parts[:2] == [pytest.approx(4 * total[0] / 2**20, abs=0.1)] * 2
    (checkpoint_size,) = re.findall(r"checkpoints of ([\d.]+) MiB", out)
    assert parts[0] + parts[2] == pytest.approx(float(checkpoint_size), abs=0.16)
    if "--optimizer=muon" not in argv:
        assert parts[2] == pytest.approx(2 * parts[0], abs=0.2)
    assert f"about {together:.0f} MiB" in out
    assert "plan:    20 updates of 8 x 16 tokens, 2,560 in all" in out
    assert "(median of 3 updates)" in out and "3 checkpoints of" in out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("data:"))


def test_a_plan_makes_whole_updates(train_small, monkeypatch):
    """Three of all micro-batches, which change the weights, after those that only time it."""
    made, update = [], script.update

    def noted(run):
        before = run.model.wte.weight.detach().clone()
        result = update(run)
        changed = not torch.equal(before, run.model.wte.weight)
        made.append((run.cfg.batch_size, changed))
        return result

    monkeypatch.setattr(script, "update", noted)
    assert train_small("--plan", "--micro_batch_size=2") == 0
    assert made[-3:] == [(8, True)] * 3 and not any(changed for _, changed in made[:-3])


def test_a_plan_of_long_updates_is_an_estimate(train_small, monkeypatch, capsys):
    monkeypatch.setattr(plan, "time_update", lambda *_: 21.0)
    monkeypatch.setattr(plan, "time_real_updates", lambda *_: pytest.fail("took a minute"))
    assert train_small("--plan") == 0
    assert "21 s (estimated)" in capsys.readouterr().out


def test_what_a_run_that_does_not_fit_is_told_fits(data_dir, monkeypatch):
    """The largest micro-batch that fits, then activation checkpointing, then a smaller model."""
    options = {"device": "cpu", "dtype": "float32", "batch_size": 24, "micro_batch_size": 24}
    cfg = build_options(TrainConfig, {**options, "n_layer": 4, "n_embd": 64, "n_head": 2})
    model = checkpoint.empty_model("gpt", cfg, "meta")

    def advice(free: int) -> str:
        monkeypatch.setattr(machine, "available_memory", lambda _: free)
        with pytest.raises(UserError) as error:
            machine.check_memory(model, cfg)
        return str(error.value).partition(": use ")[2]

    def needed(**changed) -> int:
        return machine.memory_needed(model, replace(cfg, **changed))

    assert advice(needed(micro_batch_size=6) + 1) == "--micro_batch_size=6"
    full = needed(micro_batch_size=1, activation_checkpointing="full")
    assert advice(full + 1) == "--micro_batch_size=1 --activation_checkpointing=full"
    assert "a model of less than" in advice(full - 1)
    monkeypatch.setattr(machine, "available_memory", lambda _: needed() + 1)
    machine.check_memory(model, cfg)


@pytest.mark.parametrize(
    ("size", "modern", "dtype", "held"),
    [
        ("GPT-2", False, "bfloat16", 15.1),
        ("GPT-2", True, "bfloat16", 17.1),
        ("GPT-2", False, "bfloat16", 18.1),
        ("baby", False, "bfloat16", 1.5),
        ("baby", True, "bfloat16", 1.8),
        ("baby", True, "bfloat16", 2.1),
        ("baby", False, "float32", 2.5),
    ],
)
def test_the_estimate_is_near_what_a_gpu_held(size, modern, dtype, held):
    """GiB on an H200, compiled or eager, as in docs/measurements.md."""
    shape = GPTConfig(bias=False, vocab_size=50304)
    if size == "baby":
        shape = GPTConfig(6, 6, 384, 256, 65, bias=False)
    parts = {"rotary": True, "qk_norm": True, "conv": 3, "optimizer": "muon"} if modern else {}
    batch_size = 64 if size == "baby" else 32
    cfg = TrainConfig(
        **{**vars(shape), **parts}, batch_size=batch_size, micro_batch_size=batch_size
    )
    cfg = replace(cfg, device="cuda", dtype=dtype)
    needed = machine.memory_needed(checkpoint.empty_model("gpt", cfg, "meta"), cfg) / 2**30
    assert needed == pytest.approx(held, rel=0.13)


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        ([], "use --micro_batch_size=4"),
        (["--micro_batch_size=1"], "use --activation_checkpointing=half"),
        (["--micro_batch_size=1", "--activation_checkpointing=full"], "a smaller block_size"),
    ],
)
def test_out_of_memory_in_a_run_says_which_option_needs_less(
    train_small, monkeypatch, capsys, argv, advice
):
    errors = [torch.OutOfMemoryError("full"), RuntimeError("MPS backend out of memory")]
    update = script.update

    def full(run):
        if run.progress.iter_num == 12:
            raise errors.pop()
        return update(run)

    monkeypatch.setattr(script, "update", full)
    while errors:
        assert train_small(*argv) == 2
        assert advice in capsys.readouterr().err


def test_a_plan_on_a_slow_machine_is_of_one_micro_batch(train_small, monkeypatch, capsys):
    """Where one takes long, there is no other: the update has four of it."""
    seconds, calls, update = [9.0, 7.0], [], script.update
    monkeypatch.setattr(plan, "_seconds", lambda _, trial: (trial(), seconds.pop(0))[1])
    monkeypatch.setattr(
        script, "update", lambda run: calls.append(run.cfg.batch_size) or update(run)
    )
    monkeypatch.setattr(script.Run, "loss", lambda *_: 1.0)
    assert (
        train_small("--plan", "--micro_batch_size=2", "--max_iters=30", "--eval_interval=30") == 0
    )
    assert "36 s (estimated)" in capsys.readouterr().out
    assert calls == [2] and not seconds


def test_a_plan_leaves_the_run_of_its_folder_alone(train_small, capsys):
    """Though it is being trained, or cannot be written to."""
    assert train_small() == 0
    Path("run/.lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in (Path("run"), *Path("run").iterdir())}
    assert train_small("--plan") == 0
    assert script.main(["--plan", "--init_from=resume", "--out_dir=run", "--max_iters=30"]) == 0
    assert "plan:    10 updates" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in (Path("run"), *Path("run").iterdir())}
    assert after == before


def test_ctrl_c_ends_the_timing(train_small, monkeypatch, capsys):
    """At once, though a timing of many updates goes on for long."""
    calls, update = [], script.update

    def interrupted(run):
        calls.append(1)
        signal.raise_signal(signal.SIGINT)
        return update(run)

    monkeypatch.setattr(script, "update", interrupted)
    assert train_small("--plan") == 130
    assert len(calls) == 1 and "stopped: SIGINT" in capsys.readouterr().out


def test_a_plan_evaluates_nothing(train_small, capsys):
    assert train_small("--plan", "--eval_only") == 2
    assert "plan and eval_only exclude each other" in capsys.readouterr().err


def test_all_ranks_fit_as_many_updates_into_the_minutes(monkeypatch):
    """Their clocks differ; the number is that of the one that started first."""
    clocks = [10.0, 10.4]
    monkeypatch.setattr(plan.distributed, "maximum", lambda _: max(clocks))

    def fitting(wall_seconds: float) -> int:
        progress = SimpleNamespace(wall_seconds=wall_seconds)
        cfg = SimpleNamespace(minutes=1.0, eval_interval=0)
        run = SimpleNamespace(cfg=cfg, progress=progress, read_clock=lambda: None)
        return plan.updates_that_fit(run, 0.005, 1.0)

    assert fitting(clocks[0]) == fitting(clocks[1]) == int((60 - 10.4 - 5) / 0.005)
