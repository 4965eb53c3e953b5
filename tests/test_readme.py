"""Promise: the README tells what the programs do now."""

import re

import pytest
from conftest import ROOT

import convert
import prepare
import sample
import train

README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("script", [prepare, sample, train, convert])
def test_every_option_stands_there_as_help_has_it(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  --"):
            assert line in README, line


def test_every_file_it_names_exists():
    for path in re.findall(r"(?:config|tests/bench|assets)/\w+\.\w+", README):
        assert (ROOT / path).exists(), path


def test_every_file_of_the_top_level_is_explained():
    for path in ROOT.glob("*.py"):
        assert f"    {path.name} " in README, path.name


def test_every_recipe_is_listed_and_says_what_it_takes():
    for path in (ROOT / "config").glob("[!_]*.py"):
        assert str(path.relative_to(ROOT)) in README, path.name
        text = path.read_text()
        assert len(text.splitlines()) <= 25 and f"python train.py config/{path.name}" in text
        assert "Hardware:" in text and "loss" in text, path.name
