"""Promise: TensorBoard and Weights & Biases get what metrics.csv gets, and go on after a resume."""

import json
import os
import struct
from pathlib import Path

import pytest
from conftest import SMALL, script

from folio import metrics


def measured(path: Path, names: set[str]) -> dict[str, list[tuple[int, float]]]:
    """The curves of a metrics.csv: {name: [(iter_num, value), ...]}."""
    curves = {name: [] for name in names}
    for row in metrics.read_metrics(path):
        for name in names:
            if row[name]:
                curves[name].append((int(row["iter_num"]), float(row[name])))
    return curves


def same(curve: list, other: list) -> bool:
    steps, values = zip(*curve, strict=True)
    return other == [
        (step, pytest.approx(value, rel=1e-5)) for step, value in zip(steps, values, strict=True)
    ]


def test_tensorboard_curves_go_on_after_a_resume(train_small, resume_run, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_SHARE", 100.0)  # as if continuations took no time
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train_small("--tensorboard", "--sample_interval=10", "--num_samples=2") == 0
    assert resume_run("--max_iters=30") == 0
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"loss", "lr", "grad_norm", "train_loss", "val_loss", "tokens_per_second"} <= names
    for name, curve in measured(Path("run/metrics.csv"), names).items():
        assert same(curve, [(e.step, e.value) for e in events.Scalars(name)]), name
    assert events.Scalars("val_loss")[-1].step == 30
    samples = events.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [10, 10, 20, 20, 30, 30]
    assert len(samples[0].tensor_proto.string_val[0]) > 20
    continued = events.Tensors("continuation/text_summary")
    assert [event.step for event in continued] == [10, 20, 30]
    options = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| n_embd | 32 |" in options


def test_tensorboard_hides_what_a_killed_run_wrote_beyond_its_checkpoint(train_small, resume_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train_small("--tensorboard", "--snapshot_interval=10") == 0
    assert resume_run("--checkpoint=run/snapshots/iter_000010.safetensors", "--max_iters=15") == 0
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [5, 10, 15]


def wandb_records(path: Path) -> list:
    """The records of a .wandb file: after 7 bytes a LevelDB log, blocks of 32 KiB in which each
    part has a checksum (4 bytes), a length (2) and a kind (whole, first, middle, last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:
            place += -place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def fields(items) -> dict:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def test_wandb_offline(data_dir, tmp_path):
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    argv = [*SMALL, f"--data_dir={data_dir}", "--wandb", "--wandb_project=p", "--num_samples=1"]
    done = script("train.py", *argv, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    argv = ["--init_from=resume", "--out_dir=run", "--max_iters=30"]
    done = script("train.py", *argv, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    rows = [fields(record.history.item) for record in records if record.HasField("history")]
    runs = [record.run for record in records if record.HasField("run")]
    assert len(files) == 2 and len({run.run_id for run in runs}) == 1, "one run, resumed"
    assert runs[0].display_name == "run" and runs[0].project == "p"
    assert fields(runs[0].config.update)["n_embd"] == 32
    names = {"loss", "lr", "grad_norm", "train_loss", "val_loss"}
    for name, curve in measured(tmp_path / "run/metrics.csv", names).items():
        assert same(curve, [(r["iter_num"], r[name]) for r in rows if name in r]), name
    samples = [r for r in rows if any(key.startswith("sample") for key in r)]
    assert [r["iter_num"] for r in samples] == [20, 30]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(train_small, monkeypatch, capsys, tracker):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert train_small(f"--{tracker}") == 2
    assert capsys.readouterr().err == (
        f"error: --{tracker} needs the package {tracker}: pip install {tracker}\n"
    )
    assert not Path("run").exists()


def test_wandb_without_a_key_leaves_the_older_run_where_it_is(data_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.csv").write_text("an older run")
    unset = ("WANDB_MODE", "WANDB_API_KEY")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
    argv = [*SMALL, f"--data_dir={data_dir}", "--wandb"]
    done = script("train.py", *argv, cwd=tmp_path, env=env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "WANDB_MODE=offline needs no key" in done.stderr
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]
    assert [path.name for path in tmp_path.glob("run/*")] == ["metrics.csv"]
