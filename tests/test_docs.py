"""Promise: README and docs/ say what the programs do now."""

import re

import pytest
from conftest import ROOT
from options_page import PAGES, page

README = (ROOT / "README.md").read_text("utf-8")
DOCS = {path.name: path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")}


def test_the_options_page_is_what_help_prints():
    assert DOCS["options.md"] == page(), "python tests/options_page.py > docs/options.md"


def test_every_script_has_its_options_on_that_page():
    assert {path.name for path in ROOT.glob("*.py")} - {"model.py"} == set(PAGES)


@pytest.mark.parametrize("name", ["README.md", *DOCS])
def test_every_file_that_is_named_exists(name):
    text = README if name == "README.md" else DOCS[name]
    folders = "config|tests|tests/bench|assets|docs|folio|data"
    for path in re.findall(rf"\b(?:{folders})/\w+\.(?:py|md|png)\b", text):
        assert (ROOT / path).exists(), path


def test_every_file_is_in_the_tree():
    for path in ROOT.glob("*.py"):
        assert f"    {path.name} " in README, path.name
    for path in (ROOT / "folio").glob("[!_]*.py"):
        assert re.search(rf"\b{path.stem}\b", README), path.name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def test_every_recipe_is_listed_and_says_what_it_takes():
    for path in (ROOT / "config").glob("*.py"):
        assert str(path.relative_to(ROOT)) in README, path.name
        text = path.read_text()
        assert len(text.splitlines()) <= 25 and f"python train.py config/{path.name}" in text
        assert "Hardware:" in text and "loss" in text, path.name
