"""Promise: a run that is resumed, from any iteration, ends in the bits of one that never stopped.

The run has dropout, accumulation, Muon and every newer part; within its 20 iterations warm-up ends,
evaluations come and go, and an epoch ends.
"""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import MODERN, SMALL, after_backward, load

import train as script
from folio import machine, plan, run_folder
from folio import run as run_module
from folio.run import Run

ITERS = 20
OPTIONS = [
    *MODERN,
    "--block_size=64", "--batch_size=24", "--micro_batch_size=8", f"--max_iters={ITERS}",
    "--eval_interval=5", "--log_interval=1", "--snapshot_interval=1", "--num_samples=0",
]  # fmt: skip
CLOCKS = {"train_seconds", "wall_seconds", "tokens_per_second"}


class Ledger:
    """What every update drew, (iter_num, starts), and its loss to the last bit."""

    def __init__(self, monkeypatch):
        self.rows, self.recording, self.run = [], False, None
        window, update, build_run = script.bins.window, script.update, script.build_run

        def watched_window(seed, n, n_tokens, block_size):
            starts = window(seed, n, n_tokens, block_size)
            if self.recording:
                self.rows.append((n.tolist(), starts.tolist()))
            return starts

        def watched_update(run):
            if run is not self.run:  # a trial, to time it
                return update(run)
            self.recording = True
            loss, norm = update(run)
            self.recording = False
            self.rows.append((run.progress.iter_num, loss.item().hex(), norm.item().hex()))
            return loss, norm

        def watched_build(*args):
            self.run = build_run(*args)
            return self.run

        monkeypatch.setattr(script.bins, "window", watched_window)
        monkeypatch.setattr(script, "update", watched_update)
        monkeypatch.setattr(script, "build_run", watched_build)


def state(folder: Path) -> dict:
    """All of a run's folder that must not depend on whether it was interrupted."""
    files = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors, meta = load(path)
        progress = {k: v for k, v in meta["progress"].items() if k not in CLOCKS}
        files[str(path.relative_to(folder))] = (progress, tensors)
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]
    return {"files": files, "rows": rows}


def same(one: dict, other: dict) -> bool:
    """Whether two states are equal, tensors bit by bit."""
    if one["rows"] != other["rows"] or one["files"].keys() != other["files"].keys():
        return False
    for name, (progress, tensors) in one["files"].items():
        other_progress, other_tensors = other["files"][name]
        if progress != other_progress or tensors.keys() != other_tensors.keys():
            return False
        for key, tensor in tensors.items():
            if not torch.equal(
                tensor.view(-1).view(torch.uint8), other_tensors[key].view(-1).view(torch.uint8)
            ):
                return False
    return True


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """The folder of a run that was never stopped, its state, and its ledger."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        ledger = Ledger(monkeypatch)
        argv = [*SMALL, *OPTIONS, f"--data_dir={data_dir}", f"--out_dir={folder}"]
        assert script.main(argv) == 0
    n_tokens = len(script.bins.load(data_dir / "small").train.tokens)
    assert ITERS * 24 > (n_tokens - 64) // 65, "it must cross the end of an epoch"
    return folder, state(folder), ledger.rows


def go_on(whole, tmp_path, iter_num: int, *argv: str) -> int:
    """Resume a copy of the whole run from its snapshot of an iteration."""
    shutil.copytree(whole[0], tmp_path / "run")
    snapshot = tmp_path / f"run/snapshots/iter_{iter_num:06d}.safetensors"
    return script.main(["--init_from=resume", f"--checkpoint={snapshot}", *argv])


@pytest.mark.parametrize("iter_num", range(1, ITERS))
def test_resumed_from_any_iteration(whole, tmp_path, monkeypatch, iter_num):
    ledger = Ledger(monkeypatch)
    assert go_on(whole, tmp_path, iter_num) == 0
    per_update = len(whole[2]) // ITERS
    assert ledger.rows == whole[2][iter_num * per_update :]
    beyond = tmp_path / f"run/beyond_{iter_num:06d}"
    assert len(list(beyond.glob("iter_*"))) == ITERS - iter_num, "what lay beyond is kept"
    assert {"metrics.csv", "samples.txt"} <= {path.name for path in beyond.iterdir()}
    shutil.rmtree(beyond)
    assert same(state(tmp_path / "run"), whole[1])


def leave_out_moments(monkeypatch):
    monkeypatch.setattr(Run, "restore_optimizers", lambda *_: None)


def change_progress(field: str, change):
    def mutate(monkeypatch):
        build_run = script.build_run

        def mutant(*args):
            run = build_run(*args)
            setattr(run.progress, field, change(getattr(run.progress, field)))
            return run

        monkeypatch.setattr(script, "build_run", mutant)

    return mutate


def change_seed(monkeypatch):
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: manual_seed(seed + 1))


@pytest.mark.parametrize(
    "mutate",
    [
        leave_out_moments,
        change_progress("iter_num", lambda i: i + 1),
        change_progress("n", lambda n: n + 1),
        change_progress("best_val_loss", lambda loss: 0.0),
        change_seed,
    ],
    ids=["moments", "iteration", "windows", "best", "seed"],
)
def test_a_state_restored_wrongly_would_be_noticed(whole, tmp_path, monkeypatch, mutate):
    mutate(monkeypatch)
    assert go_on(whole, tmp_path, 7) == 0
    for beyond in (tmp_path / "run").glob("beyond_*"):
        shutil.rmtree(beyond)
    assert not same(state(tmp_path / "run"), whole[1])


def test_stopping_in_the_middle_of_an_evaluation(whole, data_dir, tmp_path, monkeypatch):
    """What was not finished is done when the run goes on, and no bit differs."""
    split_loss, calls = run_module.split_loss, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:  # the second split of the second evaluation
            signal.raise_signal(signal.SIGTERM)
        return split_loss(*args, **kwargs)

    monkeypatch.setattr(run_module, "split_loss", interrupted)
    monkeypatch.setattr(plan, "time_evaluation", lambda _: 0.0)
    argv = [*SMALL, *OPTIONS, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    assert script.main(argv) == 143
    _, meta = load(tmp_path / "run/ckpt.safetensors")
    assert meta["progress"]["iter_num"] == 10 and meta["progress"]["eval_iter"] == 5
    assert script.main(["--init_from=resume", f"--out_dir={tmp_path / 'run'}"]) == 0
    assert same(state(tmp_path / "run"), whole[1])


@pytest.mark.parametrize(
    "missing, iter_num", [("best.safetensors", 20), ("snapshots/iter_000010.safetensors", 10)]
)
def test_killed_between_a_save_and_its_other_names(
    whole, data_dir, tmp_path, monkeypatch, missing, iter_num
):
    class Killed(BaseException):
        pass

    link = run_folder._link

    def killed(out_dir, source, target):
        _, meta = load(source)
        if target == out_dir / missing and meta["progress"]["iter_num"] == iter_num:
            raise Killed
        link(out_dir, source, target)

    monkeypatch.setattr(run_folder, "_link", killed)
    argv = [*SMALL, *OPTIONS, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    with pytest.raises(Killed):
        script.main(argv)
    monkeypatch.undo()
    assert script.main(["--init_from=resume", f"--out_dir={tmp_path / 'run'}"]) == 0
    assert same(state(tmp_path / "run"), whole[1])


gpt2_and_modern = pytest.mark.parametrize("parts", [[], MODERN], ids=["gpt2", "modern"])


@gpt2_and_modern
def test_float16s_scaler_goes_on_too(train_small, resume_run, monkeypatch, parts):
    """On CPU, where the scaler and its arithmetic work as on CUDA, though slowly."""
    float16_on_cpu(monkeypatch)
    options = ["--dtype=float16", "--max_iters=8", *parts]
    assert train_small(*options, "--eval_interval=8", "--out_dir=whole") == 0
    assert train_small(*options, "--eval_interval=4", "--snapshot_interval=4") == 0
    assert resume_run("--checkpoint=run/snapshots/iter_000004.safetensors") == 0
    one, meta = load("whole/ckpt.safetensors")
    other, other_meta = load("run/ckpt.safetensors")
    assert meta["scaler"] == other_meta["scaler"] and meta["scaler"]["_growth_tracker"] > 0
    assert all(torch.equal(one[name], other[name]) for name in one)


def float16_on_cpu(monkeypatch):
    """Have float16 accepted on a CPU."""
    resolve = machine.resolve_machine

    def mutant(device, dtype, compile):
        device, _, compile = resolve(device, "float32", compile)
        return device, dtype, compile

    monkeypatch.setattr(machine, "resolve_machine", mutant)


@gpt2_and_modern
@pytest.mark.parametrize("clip", [0, 1])
def test_an_overflow_in_float16_skips_all_of_the_update(train_small, monkeypatch, parts, clip):
    """Both optimizers, whichever of their gradients is not finite; the next update goes on."""
    float16_on_cpu(monkeypatch)
    states = []

    def overflow(run):
        state = {**dict(run.model.named_parameters()), **run.optimizer_tensors()}
        states.append({name: tensor.detach().clone() for name, tensor in state.items()})
        if run.progress.iter_num == 3:
            run.model.wte.weight.grad[0, 0] = float("inf")

    after_backward(monkeypatch, overflow)
    options = ["--dtype=float16", "--max_iters=6", f"--grad_clip={clip}", *parts]
    assert train_small(*options) == 0
    before, after, later = states[-3:]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(t.isfinite().all() for t in later.values())
    assert not torch.equal(after["h.0.mlp.c_fc.weight"], later["h.0.mlp.c_fc.weight"])


@gpt2_and_modern
def test_with_float16_no_update_follows_a_divergence(train_small, monkeypatch, parts):
    float16_on_cpu(monkeypatch)
    weights, update = [], script.update

    def broken(run):
        weights.append(run.model.wte.weight.detach().clone())
        if run.progress.iter_num == 3:
            run.model.wte.weight.data.fill_(float("inf"))
        return update(run)

    def mend(table):
        table.copy_(weights[-1])

    monkeypatch.setattr(script, "update", broken)
    after_backward(monkeypatch, lambda run: mend(run.model.wte.weight.data))
    options = ["--dtype=float16", "--max_iters=8", "--eval_interval=8", "--log_interval=8"]
    assert train_small(*options, *parts) == 3
    before_three, *later = weights[-5:]
    assert not torch.equal(weights[-6], before_three)
    assert all(torch.equal(table, before_three) for table in later)


def test_a_resume_says_which_run_goes_on(train_small, monkeypatch, capsys, data_dir):
    assert train_small("--max_iters=3", "--out_dir=out/a") == 0
    capsys.readouterr()
    assert script.main(["--init_from=resume", "--max_iters=4", "--learning_rate=1e-4"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(
        r"resume:  out/a/ckpt\.safetensors, saved 20\d\d-\d\d-\d\d \d\d:\d\d, 3 updates", first
    )


def test_a_finished_run_without_its_best_state_is_evaluated_again(train_small, resume_run, capsys):
    """Its last state was worse than the best, which was then deleted."""
    assert train_small("--eval_interval=5", "--max_iters=10") == 0
    other = ("--learning_rate=0.5", "--grad_clip=0", "--schedule=constant", "--lr_decay_iters=10")
    assert resume_run("--max_iters=20", *other) == 0
    (_, latest), (_, best) = (load(f"run/{name}.safetensors") for name in ("ckpt", "best"))
    assert best["progress"]["iter_num"] < latest["progress"]["iter_num"] == 20
    Path("run/best.safetensors").unlink()
    capsys.readouterr()
    assert resume_run() == 0
    assert f"loss:    {latest['progress']['val_loss']:.3f} nats" in capsys.readouterr().out
    assert load("run/best.safetensors")[1]["progress"]["iter_num"] == 20


def test_as_many_keys_as_queries_is_the_same_as_0(train_small, resume_run):
    few = ("--max_iters=1", "--num_samples=0")
    assert train_small(*few, "--n_head=2", "--n_kv_head=2") == 0
    assert resume_run("--n_head=2", "--n_kv_head=2", "--max_iters=2") == 0
    assert train_small(*few, "--init_from=run", "--n_kv_head=2", "--out_dir=tuned") == 0
    assert resume_run("--n_kv_head=1") == 2


def test_run_json_has_what_a_resume_changed(train_small, resume_run):
    assert train_small("--max_iters=3", "--learning_rate=1e-3") == 0
    assert "before" not in json.loads(Path("run/run.json").read_text("utf-8"))
    assert resume_run("--max_iters=4", "--learning_rate=1e-4") == 0
    assert resume_run("--max_iters=5") == 0
    record = json.loads(Path("run/run.json").read_text("utf-8"))
    assert record["options"]["max_iters"] == 5 and record["options"]["learning_rate"] == 1e-4
    assert record["command"] == ["train.py", "--init_from=resume", "--out_dir=run", "--max_iters=5"]
    assert record["software"]["torch"] == torch.__version__ and record["machine"]["threads"]
    first, second = record["before"]
    assert first["until"] == 3 and second["until"] == 4
    assert "--learning_rate=1e-3" in first["command"]
    assert first.get("started", record["started"]) <= record["started"]  # seconds may be the same
    assert "machine" not in first, "what did not change is not repeated"
    assert first["options"]["learning_rate"] == 1e-3 and first["options"]["max_iters"] == 3
    assert second["options"]["max_iters"] == 4 and "learning_rate" not in second["options"]


def test_commands_to_paste_quote_their_paths(train_small, capsys):
    assert train_small("--out_dir=my runs/a b", "--num_samples=0") == 0
    assert "sample.py --checkpoint 'my runs/a b' --prompt" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".DS_Store", "desktop.ini", ".directory", "Thumbs.db"])
def test_a_folder_with_a_file_of_the_desktop_is_empty(train_small, name):
    Path("run").mkdir()
    Path("run", name).write_text("")
    assert train_small("--num_samples=0", "--max_iters=1") == 0
    assert Path("run/ckpt.safetensors").exists() and not Path("run.1").exists()


@pytest.mark.parametrize("name", ["new.partial", "notes.partial", "ckpt.safetensors.partial"])
def test_a_users_file_is_never_taken_for_ours(train_small, name):
    Path("run").mkdir()
    Path("run", name).write_text("mine")
    assert train_small("--num_samples=0", "--max_iters=1") == 2
    assert Path("run", name).read_text() == "mine"
