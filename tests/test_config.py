"""Promise: an option means what its dataclass says, in a recipe and on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from data.errors import UserError
from folio.options import read_options
from folio.process import script


@dataclass
class Options:
    # sizes
    width: Annotated[int, "[1, inf)"] = 8  # how wide
    rate: Annotated[float, "(0, 1]"] = 0.5  # how fast
    # the rest
    name: str = "none"  # what it is called
    names: tuple[str, ...] = ()  # what else
    fast: bool = False  # whether
    mode: Literal["auto", True, False] = "auto"  # how


def read(*argv):
    values, _ = read_options(Options, list(argv))
    return values


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="recipe.py"):
        (tmp_path / name).write_text(text)
        return name

    return write


@pytest.mark.parametrize("before", [["one"], ["--names=one"], ["--names", "one", "--width=3"]])
def test_a_python_file_among_names_or_files_is_not_run(recipe, before):
    path = recipe("open('it_ran', 'w')")
    if before == ["one"]:
        values, _ = read_options(Options, [*before, path], positional=("name", "names"))
        assert values == {"name": "one", "names": ("recipe.py",)}
    else:
        with pytest.raises(UserError, match="unexpected argument 'recipe.py'"):
            read(*before, path)
    assert not Path("it_ran").exists()
    read(path)
    assert Path("it_ran").exists()


def test_three_ways_to_write_a_value():
    assert read("--width=3", "--rate", "0.25", "--fast") == {"width": 3, "rate": 0.25, "fast": True}


def test_a_flag_never_takes_the_next_word(recipe):
    assert read("--fast", recipe("width = 2")) == {"fast": True, "width": 2}
    assert read("--mode", "--width=1") == {"mode": True, "width": 1}


@pytest.mark.parametrize("word, value", [("True", True), ("false", False), ("auto", "auto")])
def test_choices(word, value):
    assert read(f"--mode={word}") == {"mode": value}


def test_the_last_word_wins(recipe):
    path = recipe("width = 2\nname = 'recipe'")
    assert read(path, "--width=3") == {"width": 3, "name": "recipe"}
    assert read("--width=3", path) == {"width": 2, "name": "recipe"}


def test_an_int_is_taken_for_a_float(recipe):
    assert read(recipe("rate = 1"))["rate"] == 1.0 and read("--rate=1")["rate"] == 1.0
    assert type(read("--rate=1")["rate"]) is float


def test_text_stays_text():
    assert read("--name=12") == {"name": "12"} and read("--name=") == {"name": ""}
    assert read("--name=a=b") == {"name": "a=b"} and read("--name", "-x") == {"name": "-x"}


def test_what_a_recipe_may_hold_beside_options(recipe):
    path = recipe("import math\nfrom os import path\n_n = 3\ndef f(): return _n\nwidth = f() * 2")
    assert read(path) == {"width": 6}


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--widht=3"], "did you mean 'width'"),
        (["--zzz=3"], "--help lists all options"),
        (["--Width=3"], "did you mean 'width'"),
        (["--width=x"], r"width must be a whole number in \[1, inf\), not 'x'"),
        (["--width=1.5"], "not 1.5|not '1.5'"),
        (["--width=0"], "not 0"),
        (["--rate=0"], r"rate must be a number in \(0, 1\], not 0"),
        (["--rate=nan"], "not nan"),
        (["--rate=inf"], "not inf"),
        (["--rate=1.01"], "not 1.01"),
        (["--fast=maybe"], "fast must be one of True, False, not 'maybe'"),
        (["--mode=3"], "mode must be one of auto, True, False, not '3'"),
        (["--width"], "--width needs a value"),
        (["--width", "--fast"], "--width needs a value"),
        (["word"], "unexpected argument 'word'"),
        (["-w"], "unexpected argument '-w'"),
        (["--"], "unexpected argument '--'"),
        (["missing.py"], "no recipe missing.py"),
    ],
)
def test_what_does_not_fit_is_refused(argv, says):
    with pytest.raises(UserError, match=says):
        read(*argv)


@pytest.mark.parametrize(
    "text, says",
    [
        ("widht = 3", "recipe.py: unknown option 'widht'; did you mean 'width'"),
        ("width = '3'", "recipe.py: width must be a whole number"),
        ("width = True", "not True"),
        ("fast = 1", "fast must be one of True, False, not 1"),
        ("name = None", "name must be text, not None"),
        ("width = 3\nwidth +", "recipe.py, line 2: SyntaxError"),
        ("\n\nwidth = 1 / 0", "recipe.py, line 3: ZeroDivisionError"),
        ("import nothing_of_the_kind", "recipe.py, line 1: ModuleNotFoundError"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(recipe, text, says):
    with pytest.raises(UserError, match=says):
        read(recipe(text))


def test_names_of_other_trainers_are_translated():
    with pytest.raises(UserError, match="use width"):
        read_options(Options, ["--breadth=3"], hints={"breadth": "use width"})


def test_help_is_the_declaration(capsys):
    with pytest.raises(SystemExit) as exit:
        read("--width=1", "--help")
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("Promise:")
    for part in ("--width=8", "how wide", "how (auto, True, False)", "    sizes", "    the rest"):
        assert part in out


def test_every_option_of_every_script_is_explained(capsys):
    """A field without a comment would be missing from --help."""
    import convert
    import prepare
    import runs
    import sample
    import train

    for options in (
        prepare.PrepareConfig,
        sample.SampleConfig,
        train.TrainConfig,
        convert.ConvertConfig,
        runs.RunsConfig,
    ):
        with pytest.raises(SystemExit):
            read_options(options, ["-h"])
        out = capsys.readouterr().out
        for name in options.__dataclass_fields__:
            assert f"  --{name}=" in out, name


def test_errors_take_one_line_and_the_right_code(capsys):
    cases = [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (OSError(28, "No space left on device", "x"), 1, "No space left on device: 'x'\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "error: out of memory\n"),
    ]
    for error, code, says in cases:

        @script
        def main(argv, error=error):
            raise error

        assert main([]) == code
        assert capsys.readouterr().err.endswith(says)


def test_memory_that_torch_cannot_have_takes_one_line_too(capsys):
    main = script(lambda argv: torch.empty(2**60) and None)
    assert main([]) == 1
    assert capsys.readouterr().err == "error: out of memory\n"


def test_an_error_of_ours_is_shown_whole():
    def broken(argv):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        script(broken)([])
