"""Promise: what an earlier version of Folio saved still loads, samples and resumes.

tests/earlier_version/ is a run of 40 updates with every newer part and Muon. The version of
2026-11-22 saved it, whose options included `cuda_graphs`. That of 2026-11-25, which resumed as it
did, trained on to 60 updates without dropout; since then, dropout is seeded differently.
"""

import csv
import shutil
from pathlib import Path

import pytest
from conftest import load

import prepare
import runs
import sample
import train

LOSSES = {41: 2.109626, 50: 2.144255, 60: 2.026955}  # of its further updates
VAL_LOSS = 2.016933


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(__file__).parent / "earlier_version", "run")
    Path("text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    assert prepare.main(["--name=times", "--input=text.txt"]) == 0


def test_it_resumes_as_an_earlier_version_did(run, capsys):
    argv = ["--init_from=resume", "--out_dir=run", "--max_iters=60", "--dropout=0"]
    assert train.main(argv) == 0
    with open("run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["iter_num"]): float(row["loss"]) for row in rows if row["loss"]}
    assert sorted(losses) == list(range(1, 61))
    for iter_num, loss in LOSSES.items():
        assert losses[iter_num] == pytest.approx(loss, abs=1e-4)
    _, meta = load("run/ckpt.safetensors")
    assert meta["progress"]["val_loss"] == pytest.approx(VAL_LOSS, abs=1e-4)
    assert "cuda_graphs" not in meta["run_config"]


def test_it_samples_as_that_version_did(run, capsys):
    argv = ["--checkpoint=run", "--temperature=0", "--prompt=It was", "--max_new_tokens=40"]
    assert sample.main([*argv, "--device=cpu"]) == 0
    assert capsys.readouterr().out == "It was tttttttwas was tttttttwas was tttttttwa\n"


def test_it_can_be_finetuned_evaluated_and_verified(run):
    argv = ["--init_from=run", "--dataset=times", "--device=cpu"]
    assert train.main([*argv, "--eval_only"]) == 0
    assert train.main([*argv, "--max_iters=2", "--batch_size=2", "--out_dir=tuned"]) == 0
    assert runs.main(["verify", "run"]) == 0
