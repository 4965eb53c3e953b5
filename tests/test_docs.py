"""Promise: README and docs/ say what the programs do now."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL
from options_page import PAGES, page

from folio.metrics import read_metrics

PATHS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PAGES_OF = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in PATHS}
README = PAGES_OF["README.md"]


def test_the_options_page_is_what_help_prints():
    assert PAGES_OF["docs/options.md"] == page(), "python tests/options_page.py > docs/options.md"


def test_every_script_has_its_options_on_that_page():
    assert {path.name for path in ROOT.glob("*.py")} - {"model.py"} == set(PAGES)


@pytest.mark.parametrize("name", PAGES_OF)
def test_every_file_that_is_named_exists(name):
    text = PAGES_OF[name]
    folders = "config|tests|tests/bench|assets|docs|folio|data"
    for path in re.findall(rf"\b(?:{folders})/\w+\.(?:py|md|png)\b", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", PAGES_OF)
def test_every_link_leads_to_what_it_names(name):
    """To a file, to a heading of a page, or to the line of a function or a class."""
    for text, target in re.findall(r"\[([^\]]+)\]\((?!https?:)([^)\s]+)\)", PAGES_OF[name]):
        path, _, place = target.partition("#")
        path = (ROOT / name).parent / path if path else ROOT / name
        assert path.exists(), target
        if place.startswith("L"):
            line = path.read_text("utf-8").splitlines()[int(place[1:]) - 1]
            assert re.match(rf"(def|class) {text.strip('`()')}\b", line), f"{text}: {line}"
        elif place:
            headings = re.findall(r"^#+ (.*)", path.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert place in anchors, target


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


def test_the_example_of_contributing_works(data_dir, tmp_path):
    """Its lines are added to a copy of the code, which then trains with what they add."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    for path in ("model.py", "train.py", "folio", "data", "config"):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        copy(ROOT / path, tmp_path / path)
    n_lines = 0
    for name, hunks in re.findall(r"\+\+\+ b/(\S+)\n(.*?)(?=^---|\Z)", diff[1], re.M | re.DOTALL):
        text = (tmp_path / name).read_text("utf-8")
        for hunk in hunks.split("@@\n")[1:]:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(x[1:] for x in lines if x[0] in kept) for kept in (" -", " +"))
            assert text.count(old) == 1, old
            text, n_lines = text.replace(old, new), n_lines + sum(x[0] == "+" for x in lines)
        (tmp_path / name).write_text(text, "utf-8")
    assert n_lines == 5
    words = [*SMALL, f"--data_dir={data_dir}", "--activation=silu", "--schedule=late"]
    words += ["--warmup_iters=0", "--log_interval=1", f"--out_dir={tmp_path / 'run'}"]
    subprocess.run([sys.executable, tmp_path / "train.py", *words], check=True, cwd=tmp_path)
    rates = [float(row["lr"]) for row in read_metrics(tmp_path / "run/metrics.csv") if row["lr"]]
    assert rates[:17] == [1e-3] * 17 and rates[17:] == pytest.approx([7.75e-4, 5.5e-4, 3.25e-4])
