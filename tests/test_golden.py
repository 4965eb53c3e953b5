"""Promise: every recipe trains as before: the first 20 losses of each, shrunk, are recorded.

They were recorded in float32 on one core, and hold on any processor within 1e-4. The text is
Python's own reference, which differs from one version of Python to the next.

    python tests/test_golden.py FOLDER      records them again, if a change is meant to change them
"""

import csv
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import prepare
import train
from data import bins

RECORDED = Path(__file__).with_suffix(".json")
RECIPES = sorted(path.stem for path in (ROOT / "config").glob("*.py"))
SHRUNK = (  # the parts, the optimizer and the first 20 of 500 updates of the schedule stay
    "--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=2 --micro_batch_size=1 "
    "--dataset=pydocs --init_from=scratch --eval_only=False --device=cpu --dtype=float32 "
    "--max_iters=20 --lr_decay_iters=500 --log_interval=1 --eval_interval=1000 --eval_tokens=64 "
    "--num_samples=0"
).split()


def losses(recipe: str, folder: Path) -> list[float]:
    """The loss of each of 20 updates; the data set is in folder/data."""
    argv = [str(ROOT / f"config/{recipe}.py"), *SHRUNK]
    argv += [f"--data_dir={folder / 'data'}", f"--out_dir={folder / recipe}"]
    assert train.main(argv) == 0
    with open(folder / recipe / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    assert prepare.main(["pydocs", f"--data_dir={folder / 'data'}"]) == 0
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_losses_are_what_they_were(recipe, folder):
    recorded = json.loads(RECORDED.read_text())
    if bins.load(folder / "data/pydocs").fingerprint != recorded["fingerprint"]:
        pytest.skip("the losses were recorded with the reference of another Python")
    assert losses(recipe, folder) == pytest.approx(recorded[recipe], abs=1e-4)


def test_every_recipe_is_recorded():
    assert json.loads(RECORDED.read_text()).keys() == {"fingerprint", *RECIPES}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    prepare.main(["pydocs", f"--data_dir={place / 'data'}"])
    found = {"fingerprint": bins.load(place / "data/pydocs").fingerprint}
    found |= {recipe: losses(recipe, place) for recipe in RECIPES}
    RECORDED.write_text(json.dumps(found).replace("], ", "],\n").replace(', "', ',\n"') + "\n")
