"""Promise: one command trains, and leaves behind what it says it leaves."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from conftest import MODERN, ROOT, after_backward, load, write_bins

import train as script
from data import tokenizer
from folio import checkpoint, machine, metrics, plan
from folio.checkpoint import Checkpoint
from folio.metrics import COLUMNS, Clock
from folio.optim import get_lr, make_optimizers
from folio.options import build_options
from folio.run import Run
from folio.startup import read_given, resumed_options
from model import GPT, GPTConfig
from train import TrainConfig


def rows(folder="run"):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(path):
    tensors, _ = load(path)
    return {k: v for k, v in tensors.items() if k.startswith("model.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what a run leaves


def test_a_run_learns_and_leaves_its_files(train_small, capsys):
    assert train_small("--max_iters=100", "--learning_rate=5e-3", "--num_samples=2") == 0
    out = capsys.readouterr().out
    for part in (
        "machine: cpu",
        "17,999 to train on",
        "parameters",
        "plan:    100 updates",
        "bits per byte",
        "max_iters=100 reached",
        "next:    python sample.py",
    ):
        assert part in out, part
    assert out.count("--- sample at iteration 100") == 2
    losses = [float(row["val_loss"]) for row in rows() if row["val_loss"]]
    assert len(losses) == 10 and losses[-1] < losses[0] < math.log(100)
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in Path("run").iterdir()} == {
        ".lock",
        "best.safetensors",
        "run.json",
        "ckpt.safetensors",
        "loss.png",
        "metrics.csv",
        "samples.txt",
    }


def test_metrics_are_what_was_done(train_small):
    assert train_small() == 0
    table = rows()
    assert list(table[0]) == COLUMNS
    assert [int(row["iter_num"]) for row in table] == [5, 10, 10, 15, 20, 20]
    for row in table:
        assert int(row["tokens"]) == int(row["iter_num"]) * 8 * 16
        assert float(row["wall_seconds"]) >= float(row["train_seconds"]) > 0
        assert (row["loss"] == "") == (row["val_loss"] != "")
    assert float(table[0]["lr"]) == pytest.approx(1e-3 * 5 / 6)
    bits = float(table[2]["val_bits_per_byte"])
    assert bits == pytest.approx(float(table[2]["val_loss"]) / math.log(2), rel=0.01)


def test_a_checkpoint_tells_all(train_small, data_dir):
    assert train_small() == 0
    tensors, meta = load("run/ckpt.safetensors")
    assert meta["progress"]["iter_num"] == 20 and meta["progress"]["n"] == 160
    assert meta["progress"]["tokens"] == 20 * 8 * 16
    assert meta["model_config"]["n_embd"] == 32
    assert meta["run_config"]["device"] == "cpu" and meta["run_config"]["dtype"] == "float32"
    assert meta["run_config"]["micro_batch_size"] == 8, "what auto chose is stored"
    assert meta["tokenizer"]["kind"] == "char"
    names = {name.partition(".")[2] for name in tensors if name.startswith("model.")}
    kinds = {name.split(".")[1] for name in tensors if name.startswith("optimizer.")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"} and len(tensors) == 4 * len(names)


def test_best_is_the_best_and_the_latest_the_last(train_small, resume_run):
    assert train_small() == 0
    assert resume_run("--max_iters=30", "--learning_rate=1", "--schedule=constant") == 0  # too much
    table = [(float(r["val_loss"]), int(r["iter_num"])) for r in rows() if r["val_loss"]]
    _, best = load("run/best.safetensors")
    assert best["progress"]["iter_num"] == min(table)[1] == 20
    assert best["progress"]["val_loss"] == best["progress"]["best_val_loss"]
    _, latest = load("run/ckpt.safetensors")
    assert latest["progress"]["iter_num"] == 30
    assert latest["progress"]["best_val_loss"] == best["progress"]["val_loss"]


def test_snapshots(train_small):
    assert train_small("--snapshot_interval=4", "--keep_snapshots=2") == 0
    kept = sorted(p.name for p in Path("run/snapshots").iterdir())
    assert kept == ["iter_000016.safetensors", "iter_000020.safetensors"]


def test_samples_of_a_deterministic_run(train_small, monkeypatch):
    """CUDA has no deterministic cumsum: there a draw would end the run."""
    enabled, cumsum = [], torch.Tensor.cumsum

    def watched(self, *args, **kwargs):
        enabled.append(torch.are_deterministic_algorithms_enabled())
        return cumsum(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cumsum", watched)
    assert train_small("--deterministic", "--max_iters=2") == 0
    assert enabled and not any(enabled)
    assert torch.are_deterministic_algorithms_enabled(), "but for samples it is"
    torch.use_deterministic_algorithms(False)


def test_samples_on_the_way(train_small, capsys):
    assert train_small("--sample_interval=10", "--sample_prompt=The", "--num_samples=1") == 0
    out = capsys.readouterr().out
    assert out.count("--- sample at iteration 10\nThe") == 1
    assert out.count("--- sample at iteration 20\nThe") == 1, "once, though it is the end too"


def test_the_prompt_of_samples_takes_escapes(train_small, capsys):
    assert train_small("--max_iters=1", r"--sample_prompt=The\nThe") == 0
    assert "--- sample at iteration 1\nThe\nThe" in capsys.readouterr().out


def test_an_odd_scaler_state_is_refused(train_small, monkeypatch, capsys):
    """As a file that was made to be hostile may have it."""
    import train as script

    assert train_small("--max_iters=1", "--num_samples=0") == 0
    tensors, meta = load("run/ckpt.safetensors")
    checkpoint.save(Path("run/ckpt.safetensors"), tensors, {**meta, "scaler": {"scale": 1}})
    monkeypatch.setattr(machine, "resolve_machine", lambda *_: ("cpu", "float16", False))
    assert script.main(["--init_from=resume", "--out_dir=run", "--max_iters=2"]) == 2
    assert "the scaler's state cannot be used" in capsys.readouterr().err


def test_an_older_run_is_moved_aside(train_small, capsys):
    assert train_small("--seed=1") == 0 and train_small("--seed=2") == 0
    assert "moved the older run to run.1" in capsys.readouterr().out
    for folder, seed in (("run.1", 1), ("run", 2)):
        _, meta = load(Path(folder) / "ckpt.safetensors")
        assert meta["run_config"]["seed"] == seed


def test_a_folder_that_cannot_be_moved_is_left_alone(train_small, monkeypatch, capsys):
    assert train_small("--max_iters=1", "--num_samples=0") == 0
    before = Path("run/ckpt.safetensors").read_bytes()

    def busy(self, target):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    assert train_small("--max_iters=2") == 2
    assert (
        "the older run cannot be moved aside (Device or resource busy)" in capsys.readouterr().err
    )
    assert Path("run/ckpt.safetensors").read_bytes() == before


def test_a_live_run_is_left_alone(train_small, resume_run, capsys):
    assert train_small() == 0
    before = Path("run/metrics.csv").read_bytes()
    with filelock.FileLock("run/.lock"):
        for call in (train_small, resume_run):
            assert call() == 2
            assert "another process is training in run" in capsys.readouterr().err
    assert Path("run/metrics.csv").read_bytes() == before and not Path("run.1").exists()


# ---- when it ends


@pytest.mark.parametrize(
    "argv, why",
    [
        (["--target_val_loss=3.5"], "target_val_loss=3.5"),
        (["--target_train_loss=3.5"], "target_train_loss=3.5"),
        (["--patience=2", "--learning_rate=1"], "patience=2"),
    ],
)
def test_max_iters_0_runs_until_a_condition_is_met(train_small, capsys, argv, why):
    assert train_small("--max_iters=0", "--schedule=constant", "--learning_rate=3e-3", *argv) == 0
    assert f"done:    {why}" in capsys.readouterr().out
    last = rows()[-1]
    assert last["val_loss"], "a run ends with an evaluation"
    if "target" in why:
        assert float(last[why.split("=")[0].removeprefix("target_")]) <= 3.5


@pytest.fixture
def slow(monkeypatch):
    """As if an update took 50 ms, an evaluation 200 ms, and all before the plan 500 ms."""
    monkeypatch.setattr(plan, "time_update", lambda *_: 0.05)
    monkeypatch.setattr(plan, "time_evaluation", lambda _: 0.2)
    monkeypatch.setattr(Clock, "read", lambda _: (0.0, 0.5))
    monkeypatch.setattr(metrics.Log, "tokens_per_second", lambda *_: 1.0)


def test_minutes_fix_the_number_of_updates(train_small, resume_run, slow, capsys):
    """The schedule, the intervals and a resume follow that number."""
    budget = ("--minutes=0.125", "--eval_interval=0", "--log_interval=0", "--schedule=linear")
    assert train_small(*budget, "--min_lr=0", "--snapshot_interval=50") == 0
    out = capsys.readouterr().out
    assert "budget:  8 s are 120 updates; --max_iters=120" in out and "plan:    120 updates" in out
    assert "6 s of training, 1 s of evaluations" in out
    table = rows()
    assert [int(r["iter_num"]) for r in table if r["val_loss"]] == [24, 48, 72, 96, 120]
    assert [int(r["iter_num"]) for r in table if r["loss"]] == list(range(2, 121, 2))
    assert float(table[-2]["lr"]) == pytest.approx(1e-3 / 115, rel=1e-3)
    assert json.loads(Path("run/run.json").read_text())["options"]["max_iters"] == 120
    whole, _ = load("run/ckpt.safetensors")
    assert resume_run("--checkpoint=run/snapshots/iter_000050.safetensors") == 0
    again, meta = load("run/ckpt.safetensors")
    assert meta["progress"]["iter_num"] == 120 and same(whole, again)
    fixed = ("--max_iters=120", "--out_dir=fixed", *budget[1:], "--min_lr=0")
    assert train_small(*fixed) == 0
    assert same(weights("run/ckpt.safetensors"), weights("fixed/ckpt.safetensors"))


def test_however_short_the_minutes_there_are_100_updates(train_small, capsys):
    """And a line says that they took longer."""
    assert train_small("--minutes=0.0001", "--eval_interval=50") == 0
    assert int(rows()[-1]["iter_num"]) == 100
    assert "s instead of 0 s" in capsys.readouterr().out


@pytest.mark.parametrize(("interval", "updates"), [(4, 115), (40, 209), (1000, 229)])
def test_minutes_count_evaluations_in(train_small, slow, interval, updates):
    """Of twelve seconds; an evaluation takes as long as four updates."""
    assert train_small("--minutes=0.2", f"--eval_interval={interval}", "--eval_tokens=64") == 0
    assert json.loads(Path("run/run.json").read_text())["options"]["max_iters"] == updates


def test_of_minutes_and_max_iters_the_last_counts(train_small, resume_run, slow):
    assert train_small("--minutes=0.125", "--max_iters=3") == 0
    assert int(rows()[-1]["iter_num"]) == 3
    assert train_small("--max_iters=3", "--minutes=0.125", "--eval_interval=0") == 0
    assert int(rows()[-1]["iter_num"]) == 120
    assert resume_run("--max_iters=125") == 0
    assert int(rows()[-1]["iter_num"]) == 125


def test_the_estimate_of_an_evaluation_is_that_of_all_its_batches(train_small, monkeypatch):
    """A batch takes a second: 32 of the validation split, and a quarter of that of the other."""
    monkeypatch.setattr(plan, "_time", lambda *_: 1.0)
    estimates = []
    estimate = plan.time_evaluation
    monkeypatch.setattr(
        plan, "time_evaluation", lambda run: estimates.append(estimate(run)) or estimates[-1]
    )
    size = ("--batch_size=4", "--micro_batch_size=2", "--block_size=16", "--eval_tokens=1024")
    assert train_small(*size, "--max_iters=1") == 0
    assert estimates == [pytest.approx(32 + 8, abs=0.1)]


def test_a_loss_of_zero_is_a_loss(train_small, resume_run, capsys):
    """And no missing one, which would never reach a target."""
    assert train_small("--max_iters=2", "--eval_interval=2") == 0
    tensors, meta = load("run/ckpt.safetensors")
    meta["progress"] |= {"train_loss": 0.0, "val_loss": 0.0, "best_val_loss": 0.0}
    checkpoint.save(Path("run/ckpt.safetensors"), tensors, meta)
    for target in ("target_val_loss", "target_train_loss"):
        assert resume_run("--max_iters=9", f"--{target}=0.1") == 0
        assert f"done:    {target}=0.1 reached after 2 updates" in capsys.readouterr().out


# ---- what an update is


def test_the_schedules():
    def lrs(**options):
        given = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "lr_decay_iters": 100}
        return [get_lr(TrainConfig(**{**given, **options}), i) for i in range(120)]

    for schedule in ("cosine", "linear", "constant"):
        lr = lrs(schedule=schedule)
        assert lr[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
        assert lr[10] == 1.0 and max(lr) == 1.0
    assert set(lrs(schedule="constant")[10:]) == {1.0}
    for schedule in ("cosine", "linear"):
        lr = lrs(schedule=schedule)
        assert lr[55] == pytest.approx(0.55) and set(lr[100:]) == {0.1}
        assert all(a > b for a, b in zip(lr[10:100], lr[11:101], strict=True))
    assert lrs(schedule="linear")[32] == pytest.approx(0.1 + 0.9 * (1 - 22 / 90))
    assert lrs(schedule="linear", lr_decay_iters=60)[60] == 0.1


def test_micro_batches_add_up_to_the_batch(train_small):
    """Accumulation is the same update: only rounding may differ. Dropout would draw otherwise."""
    args = ("--dropout=0", "--max_iters=3", "--eval_interval=3", "--log_interval=1")
    assert (
        train_small(*args) == 0
        and train_small(*args, "--micro_batch_size=2", "--out_dir=micro") == 0
    )
    for a, b in zip(rows("run")[:3], rows("micro")[:3], strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-4)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    whole, parts = weights("run/ckpt.safetensors"), weights("micro/ckpt.safetensors")
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-5), name
    assert not same(whole, parts)


def test_the_gradient_is_clipped(train_small):
    args = ("--max_iters=1", "--log_interval=1", "--eval_interval=1", "--beta1=0", "--dropout=0")
    for clip, factor in ((1e9, 1.0), (0.01, 0.01)):
        assert train_small(*args, f"--grad_clip={clip}", f"--out_dir=clip{clip}") == 0
        norm = float(rows(f"clip{clip}")[0]["grad_norm"])
        tensors, _ = load(f"clip{clip}/ckpt.safetensors")
        moments = [t for n, t in tensors.items() if n.startswith("optimizer.exp_avg.")]
        total = math.sqrt(sum(t.double().square().sum() for t in moments))
        assert total == pytest.approx(norm if clip > 1 else factor, rel=1e-3)


def test_only_matrices_and_embeddings_decay(train_small):
    """With a gradient clipped to nothing, what shrinks is what decays."""
    args = ("--max_iters=1", "--eval_interval=1", "--bias=True", "--warmup_iters=0")
    args += ("--grad_clip=1e-30", "--weight_decay=100")
    assert train_small(*args) == 0
    cfg = build_options(TrainConfig, {})
    assert cfg.weight_decay == 0.1
    for name, tensor in weights("run/ckpt.safetensors").items():
        if tensor.dim() == 1 and name.endswith("weight"):
            assert (tensor == 1).all(), name
        elif tensor.dim() == 2:
            std = 0.02 / 2 if "c_proj" in name else 0.02
            assert tensor.std().item() == pytest.approx(std * (1 - 1e-3 * 100), rel=0.05), name


@pytest.mark.parametrize("use_muon", [False, True])
def test_convolutions_do_not_decay(use_muon):
    model = GPT(GPTConfig(2, 2, 32, 16, 65, conv=3))
    rates = {"learning_rate": 1e-3, "muon_lr": 0.02, "beta1": 0.9, "beta2": 0.95}
    optimizers = make_optimizers(
        model, use_muon, **rates, weight_decay=0.1, muon_dtype=torch.float32
    )
    names = {p: name for name, p in model.named_parameters()}
    decaying = {
        names[p]
        for optimizer in optimizers
        for group in optimizer.param_groups
        if group["weight_decay"]
        for p in group["params"]
    }
    assert decaying == {name for p, name in names.items() if p.dim() == 2}
    assert "h.0.conv.weight" in set(names.values()) - decaying


def test_the_same_seed_gives_the_same_bits(train_small):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert train_small(f"--seed={seed}", f"--out_dir={folder}") == 0
    a, b, c = (weights(f"{folder}/ckpt.safetensors") for folder in "abc")
    assert same(a, b) and not same(a, c)


def test_looking_changes_no_bit(train_small):
    """Evaluating, logging, sampling and saving more often leaves the weights as they are."""
    assert train_small() == 0
    assert (
        train_small(
            "--eval_interval=3",
            "--log_interval=1",
            "--sample_interval=2",
            "--snapshot_interval=7",
            "--eval_tokens=100",
            "--out_dir=watched",
        )
        == 0
    )
    assert same(weights("run/ckpt.safetensors"), weights("watched/ckpt.safetensors"))


@pytest.mark.parametrize("model", ["gpt", "bigram"])
def test_resuming_gives_the_same_bits(train_small, resume_run, model):
    args = (
        "--micro_batch_size=4",
        "--max_iters=150",
        "--eval_interval=50",
        f"--model={model}",
        "--snapshot_interval=33",
        "--log_interval=7",
    )
    assert train_small(*args) == 0  # 150 updates of 8 windows: more than an epoch of 1058
    whole, _ = load("run/ckpt.safetensors")
    table = [[r[c] for c in COLUMNS[:8]] for r in rows()]
    assert resume_run("--checkpoint=run/snapshots/iter_000033.safetensors") == 0
    again, meta = load("run/ckpt.safetensors")
    assert meta["progress"]["iter_num"] == 150
    assert same(whole, again), "weights and the optimizer's moments"
    assert [[r[c] for c in COLUMNS[:8]] for r in rows()] == table


def test_a_resumed_run_goes_on_as_it_was_set_up(train_small, resume_run, capsys):
    assert train_small("--max_iters=10") == 0
    assert resume_run() == 0
    assert "max_iters=10 reached after 10 updates" in capsys.readouterr().out
    assert resume_run("--max_iters=15") == 0
    assert int(rows()[-1]["iter_num"]) == 15
    for change in ("--n_embd=64", "--seed=1", "--vocab_size=500"):
        assert resume_run(change) == 2
        assert "was made with" in capsys.readouterr().err


def test_a_run_goes_on_with_its_data_set_under_any_name(train_small, resume_run, data_dir, capsys):
    assert train_small("--max_iters=1") == 0
    shutil.copytree(data_dir / "small", data_dir / "renamed")
    assert resume_run("--dataset=renamed", "--max_iters=2") == 0
    write_bins(data_dir / "other", np.arange(1000) % 86, 86)
    meta = (data_dir / "small" / "meta.json").read_text()
    theirs = json.loads((data_dir / "other" / "meta.json").read_text())
    other = {**theirs, "tokenizer": json.loads(meta)["tokenizer"]}
    (data_dir / "other" / "meta.json").write_text(json.dumps(other))
    assert resume_run("--dataset=other", "--max_iters=3") == 2
    assert "is not the data set that" in capsys.readouterr().err


WORSE = ("--max_iters=8", "--learning_rate=1", "--schedule=constant")  # two updates that harm


def test_going_back_before_the_best_keeps_a_best(train_small, resume_run):
    """best.safetensors is the state with best_val_loss, or there is neither."""
    argv = ("--eval_interval=4", "--snapshot_interval=6", "--max_iters=12")
    assert train_small(*argv, "--learning_rate=3e-3") == 0
    _, best = load("run/best.safetensors")
    assert best["progress"]["iter_num"] == 12
    # the best before iteration 6 was that of iteration 4, which no file has any more
    back = "--checkpoint=run/snapshots/iter_000006.safetensors"
    assert resume_run(back, *WORSE) == 0
    _, latest = load("run/ckpt.safetensors")
    _, best = load("run/best.safetensors")
    assert best["progress"]["iter_num"] == 8
    assert latest["progress"]["best_val_loss"] == best["progress"]["val_loss"]


def test_going_back_finds_the_best_among_the_snapshots(train_small, resume_run):
    argv = ("--eval_interval=4", "--snapshot_interval=2", "--max_iters=12")
    assert train_small(*argv, "--learning_rate=3e-3") == 0
    assert resume_run("--checkpoint=run/snapshots/iter_000006.safetensors", *WORSE) == 0
    _, best = load("run/best.safetensors")
    _, latest = load("run/ckpt.safetensors")
    assert best["progress"]["iter_num"] == 4
    assert latest["progress"]["best_val_loss"] == best["progress"]["val_loss"]


def test_finetuning_takes_the_weights_and_nothing_else(train_small, capsys):
    assert train_small() == 0
    assert (
        train_small(
            "--init_from=run",
            "--out_dir=tuned",
            "--max_iters=1",
            "--learning_rate=1e-30",
            "--min_lr=0",
            "--eval_interval=1",
        )
        == 0
    )
    tuned, meta = load("tuned/ckpt.safetensors")
    assert meta["progress"]["iter_num"] == 1 and meta["progress"]["n"] == 8
    best = weights("run/best.safetensors")
    assert same(best, {k: v for k, v in tuned.items() if k.startswith("model.")})
    assert train_small("--init_from=run/best.safetensors", "--n_layer=3") == 2
    assert "n_layer=3, but run/best.safetensors was made with n_layer=2" in capsys.readouterr().err


def test_finetuning_pads_the_vocabulary_of_a_model_with_newer_parts(train_small):
    assert train_small("--max_iters=2", *MODERN) == 0
    options = (
        "--init_from=run",
        "--vocab_size=100",
        "--block_size=8",
        "--learning_rate=1e-30",
        "--min_lr=0",
    )
    options = (*MODERN, *options, "--optimizer=adamw", "--max_iters=1", "--out_dir=tuned")
    assert train_small(*options) == 0
    before, after = weights("run/best.safetensors"), weights("tuned/ckpt.safetensors")
    known, new = before["model.wte.weight"], after["model.wte.weight"]
    assert len(known) < 100 and torch.equal(new[: len(known)], known)
    assert torch.allclose(new[len(known) :], known.mean(0).expand(100 - len(known), -1))


def test_a_checkpoint_from_before_an_option_has_its_default(train_small, resume_run, capsys):
    assert train_small("--max_iters=4") == 0
    path = Path("run/ckpt.safetensors")
    tensors, meta = load(path)
    del meta["model_config"]["rotary"], meta["run_config"]["optimizer"]
    checkpoint.save(path, tensors, meta)
    for option, before in (("rotary=True", "rotary=False"), ("optimizer=muon", "optimizer=adamw")):
        assert resume_run(f"--{option}") == 2
        assert f"{path} was made with {before}" in capsys.readouterr().err
    assert resume_run("--max_iters=6") == 0


def test_the_word_to_try_is_a_whole_one():
    tok = tokenizer.load({"kind": "byte"})
    val = SimpleNamespace(tokens=np.frombuffer(b"RTENSIO: a good morrow", np.uint8))
    run = SimpleNamespace(tok=tok, dataset=SimpleNamespace(val=val))
    assert Run.first_word(run) == "good"


def test_evaluation_only(train_small, capsys):
    assert train_small() == 0
    last = [row for row in rows() if row["val_loss"]][-1]
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    assert train_small("--init_from=run/ckpt.safetensors", "--eval_only") == 0
    assert f"val loss {float(last['val_loss']):.4f}" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*")} == before, "nothing is written"


def test_evaluation_is_the_mean_over_all_tokens(train_small, data_dir, capsys):
    """Against every target predicted one by one, each window cut where evaluation cuts it."""
    from data import bins

    assert train_small() == 0
    _, meta = load("run/ckpt.safetensors")
    model = checkpoint.build_model(checkpoint.load(Path("run/ckpt.safetensors")))
    val = torch.from_numpy(np.asarray(bins.load(data_dir / "small").val.tokens).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(val) - 1, 16):
            window = val[i : i + 17]
            loss = model(window[None, :-1], window[None, 1:])[1]
            total += loss.item() * (len(window) - 1)
    assert meta["progress"]["val_loss"] == pytest.approx(total / (len(val) - 1), abs=1e-5)


def test_a_cpu_holds_at_a_time_what_it_keeps_the_memory_of():
    baby = TrainConfig(n_embd=384, n_head=6, block_size=256, device="cpu")
    model = checkpoint.empty_model("gpt", baby)
    for batch_size, dtype, expected in (
        (64, "bfloat16", 32),  # of 64 x 256 x 4 x 384 x 2 bytes
        (64, "float32", 16),
        (65, "float32", 65),
    ):
        cfg = replace(baby, batch_size=batch_size, dtype=dtype)
        assert machine.auto_micro_batch_size(model, cfg) == expected


def test_another_batch_or_device_chooses_the_micro_batch_anew(
    train_small, resume_run, monkeypatch, capsys
):
    monkeypatch.setattr(machine, "REUSED_BYTES", 2**15)
    assert train_small("--max_iters=10") == 0
    _, meta = load("run/ckpt.safetensors")
    assert meta["run_config"]["micro_batch_size"] == 2
    assert resume_run("--batch_size=9", "--max_iters=15") == 0
    _, meta = load("run/ckpt.safetensors")
    assert meta["run_config"]["micro_batch_size"] == 9
    known = set(TrainConfig.__dataclass_fields__)
    moved = resumed_options({"device": "cuda:1"}, Checkpoint(Path("run"), {}, meta), known)
    assert moved["micro_batch_size"] == 0 and moved["compile"] == "auto"


def test_only_a_resume_takes_the_threads_of_its_run(train_small, resume_run, monkeypatch):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert train_small("--max_iters=1") == 0
        torch.set_num_threads(2)
        assert resume_run("--max_iters=2") == 0
        assert torch.get_num_threads() == 2, "OMP_NUM_THREADS is set, and asks for more"
        torch.set_num_threads(1)
        assert train_small("--max_iters=1") == 0
        torch.set_num_threads(2)
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert train_small("--init_from=run", "--out_dir=tuned", "--max_iters=1") == 0
        assert torch.get_num_threads() == 2
        assert resume_run("--max_iters=2") == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="only there is memory kept")
def test_memory_that_is_kept_does_not_grow():
    """Something small that stays, in the place of something large, must not cost its size again."""
    code = """
import resource, torch
from folio.machine import reuse_freed_memory
reuse_freed_memory()
before, kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
for _ in range(30):
    a, b = torch.ones(2, 2**24)  # 64 MiB each
    a, b = a.clone(), b.clone()
    del a
    kept.append(torch.ones(2**10))
    del b
    kept.append(torch.ones(2**12))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 500  # MiB


# ---- when numbers fail


def test_a_diverging_run_ends_with_3_and_keeps_its_checkpoint(train_small, capsys):
    argv = (
        "--learning_rate=1e20",
        "--grad_clip=0",
        "--eval_interval=2",
        "--max_iters=100",
        "--schedule=constant",
        "--warmup_iters=3",
    )
    assert train_small("--max_iters=4", "--eval_interval=2") == 0
    assert train_small(*argv, "--out_dir=bad") == 3
    err = capsys.readouterr().err
    found = re.search(r"diverged at iteration (\d+): loss .*, windows (\d+) to (\d+) of seed", err)
    iter_num, first, last = map(int, found.groups())
    assert (first, last) == (8 * iter_num, 8 * iter_num + 7) and err.count("\n") == 1
    assert "learning rate" in err and "gradient norm" in err
    for path in Path("bad").glob("*.safetensors"):
        tensors, _ = load(path)
        assert all(t.isfinite().all() for t in tensors.values()), path


@pytest.mark.parametrize("parts", [[], MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("rate", ["1e38", "1e15"])
@pytest.mark.parametrize("saves_by", ["eval_interval", "snapshot_interval"])
def test_a_step_that_finite_gradients_make_infinite_is_not_saved(
    train_small, capsys, parts, rate, saves_by
):
    """Weights or moments that overflow, and weights so large that the loss does."""
    rates = (f"--learning_rate={rate}", f"--muon_lr={rate}", "--grad_clip=0", "--warmup_iters=0")
    assert (
        train_small(*parts, *rates, "--log_interval=20", f"--{saves_by}=1", "--num_samples=0") == 3
    )
    err = capsys.readouterr().err
    assert re.search(r"diverged at iteration \d+: .*loss .*, windows \d+ to \d+ of seed", err)
    assert "this state was not saved" in err and err.count("\n") == 1
    for path in Path("run").rglob("*.safetensors"):
        tensors, meta = load(path)
        assert all(t.isfinite().all() for t in tensors.values()), path
        assert math.isfinite(meta["progress"]["val_loss"] or 0)


@pytest.mark.parametrize("parts", [[], MODERN], ids=["gpt2", "modern"])
def test_nothing_that_is_no_number_reaches_the_weights(train_small, data_dir, monkeypatch, parts):
    """A single bad gradient, and no later update either: the flag on the device stays up."""
    states = []

    def poison(run):
        if run.progress.iter_num == 7:
            run.model.wte.weight.grad[0, 0] = math.nan
        now = {**dict(run.model.named_parameters()), **run.optimizer_tensors()}
        states.append((run.progress.iter_num, {n: p.clone() for n, p in now.items()}))

    after_backward(monkeypatch, poison)
    assert train_small("--max_iters=20", "--log_interval=10", "--eval_interval=20", *parts) == 3
    after = {iter_num: params for iter_num, params in states if iter_num >= 7}
    assert sorted(after) == [7, 8, 9], "noticed at the next log"
    assert same(after[7], after[9])


# ---- the quick start


def test_the_quick_start_without_a_network(tmp_path):
    """In a process of its own, where every address is refused: pydocs, a sample, and what next."""
    block = "import socket; socket.socket.connect = None; socket.create_connection = None"
    (tmp_path / "sitecustomize.py").write_text(block)
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--max_iters=3", "--eval_tokens=1000"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no tiny Shakespeare: cannot download" in done.stdout
    assert "using pydocs" in done.stdout and "next:    python sample.py" in done.stdout
    assert (tmp_path / "out/quickstart/best.safetensors").exists()
    after = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--prompt", "The", "--max_new_tokens=10"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert after.returncode == 0 and after.stdout.startswith("The")


def test_the_quick_start_checks_its_options_before_it_writes(tmp_path, monkeypatch, capsys):
    import train

    monkeypatch.chdir(tmp_path)
    for option in ("--n_embd=130", "--device=abacus", "--micro_batch_size=5"):
        assert train.main([option]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_ends_in_py_is_no_recipe(tmp_path, data_dir, monkeypatch):
    """The quick start's recipe is used where no other is named."""
    monkeypatch.chdir(tmp_path)
    argv = ["--wandb_run_name=hello.py", "--wandb_project", "other.py", "--dataset=small"]
    argv += [f"--data_dir={data_dir}", "--max_iters=1", "--num_samples=0", "--eval_tokens=256"]
    assert script.main(argv) == 0
    _, meta = load("out/small/ckpt.safetensors")
    assert meta["model_config"]["n_embd"] < 768, "not GPT-2"


def test_the_quick_start_on_a_gpu_is_another_recipe(monkeypatch):
    assert read_given(TrainConfig, [])[0]["n_embd"] == 128 or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for argv, n_embd in (([], 384), (["--device=cpu"], 128), (["--n_embd=96"], 96)):
        given, quick_start = read_given(TrainConfig, argv)
        assert given["n_embd"] == n_embd and given["out_dir"] == "out/quickstart" and quick_start


def test_only_the_quick_start_chooses_another_data_set(tmp_path, monkeypatch, capsys):
    import train

    monkeypatch.chdir(tmp_path)
    assert train.main(["--dataset=nothing_of_the_kind"]) == 2
    assert "no recipe 'nothing_of_the_kind'" in capsys.readouterr().err
    assert not Path("out").exists()
