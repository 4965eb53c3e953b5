"""How options reach the scripts: a dataclass of defaults, recipes in config/, and --key=value.

    python train.py config/shakespeare_char.py --batch_size=32 --compile

Each script declares its options as one flat dataclass. A field's type is its check:

    n_layer: Annotated[int, "[1, inf)"] = 12               a whole number in that interval
    schedule: Literal["cosine", "linear"] = "cosine"       one of these
    compile: Literal["auto", True, False] = "auto"         one of these; --compile alone is True
    input: tuple[str, ...] = ()                            all words up to the next --option

Arguments apply from left to right, over the defaults. A word that ends in .py is a recipe: a
Python file whose plain assignments are options. Recipes are the user's own code and are run;
everything else that Folio reads is data.
"""

import dataclasses
import difflib
import errno
import functools
import inspect
import os
import re
import runpy
import signal
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

BAD_PATH = {  # what a path that cannot be right ends in; a disk that is full or broken is not here
    errno.ENOENT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
WORDS = tuple[str, ...]  # the type of an option that takes several
LARGEST_INT = 2**53  # above it, a whole number is not exact as a float


class UserError(ValueError):
    """Something that the user can mend. The script prints it as one line and exits with 2."""


def script(main: Callable[[list[str]], int | None]) -> Callable[[list[str] | None], int]:
    """Wrap a script's `main(argv)` so that it returns an exit code and errors take one line.

    0: done; 2: the user can mend it; 1: the machine failed; 130, 143: SIGINT, SIGTERM, after what
    was begun is cleaned up.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed, as cron may have it
                setattr(sys, name, open(os.devnull, mode))
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # a narrow terminal must not end a run
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        except UserError as error:
            message, code = error, 2
        except BrokenPipeError:  # the reader left, as in `python sample.py | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (OSError, MemoryError) as error:
            message = str(error) or "out of memory"
            code = 2 if getattr(error, "errno", None) in BAD_PATH else 1
        except RuntimeError as error:  # torch raises no MemoryError
            if not re.search("out of memory|allocate memory", str(error)):
                raise
            message, code = "out of memory", 1
        except KeyboardInterrupt:
            message, code = "interrupted", 130
        finally:
            signal.signal(signal.SIGTERM, before)
        print("error:", " ".join(str(message).split()), file=sys.stderr)
        return code

    return run


def read(
    options: type,
    argv: list[str],
    bare: tuple[str, ...] = (),
    instead: dict[str, str] | None = None,
) -> dict[str, object]:
    """Return what `argv` sets, as {option: value}, checked; later words win.

    `bare` names the options that words without dashes set, one after the other. `instead` says, for
    names that other trainers use, what to write here. `--help` prints the script's page and exits.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    given = {}

    def put(name: str, value: object, source: str) -> None:
        if name not in hints:
            raise UserError(f"{source}: unknown option {name!r}; {_suggest(name, hints, instead)}")
        given[name] = _check(name, value, hints[name], source)

    words, left = list(argv), list(bare)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(_help(options))
            raise SystemExit(0)
        if word.startswith("--") and len(word) > 2:
            name, has_value, text = word[2:].partition("=")
            if name not in hints:
                put(name, text, "command line")
            if not has_value and True in _choices(hints[name]):
                text = "True"  # a flag never takes the next word
            elif not has_value:
                if not words or words[0].startswith("--"):
                    raise UserError(f"command line: --{name} needs a value: --{name}=VALUE")
                text = words.pop(0)
            value = _parse(text, hints[name])
            if hints[name] == WORDS:
                value = (text,)
                while not has_value and words and not words[0].startswith("--"):
                    value += (words.pop(0),)
            put(name, value, "command line")
        elif word.endswith(".py"):
            for name, value in _run_recipe(word).items():
                put(name, value, word)
        elif left and not word.startswith("-"):
            put(left.pop(0), word, "command line")
        else:
            raise UserError(
                f"command line: cannot read {word!r}; "
                "options are written --name=value, recipes are files that end in .py"
            )
    return given


def build(options: type, values: dict[str, object], source: str = "options"):
    """Return `options(**values)` after checking each value; what does not fit is a UserError."""
    hints = typing.get_type_hints(options, include_extras=True)
    if unknown := values.keys() - hints:
        raise UserError(f"{source}: unknown option {min(unknown)!r}")
    try:
        return options(**{k: _check(k, v, hints[k], source) for k, v in values.items()})
    except UserError:
        raise
    except ValueError as error:  # __post_init__ refuses a combination
        raise UserError(error) from None


def _run_recipe(path: str) -> dict[str, object]:
    """The plain assignments of a recipe; imports, functions, classes and _names are left out."""
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path("config").glob("[!_]*.py"))
        raise UserError(f"no recipe {path}; there are: {', '.join(known) or 'none here'}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        frames = [f for f in inspect.getinnerframes(error.__traceback__) if f.filename == path]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else "?")
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    return {
        name: value
        for name, value in names.items()
        if not (name.startswith("_") or callable(value) or isinstance(value, types.ModuleType))
    }


def _choices(hint: object) -> tuple:
    """What a hint admits by name: a Literal's values, True and False for bool, else nothing."""
    return (True, False) if hint is bool else typing.get_args(hint) if _is_literal(hint) else ()


def _listed(hint: object) -> str:
    return ", ".join(str(choice) or "''" for choice in _choices(hint))


def _is_literal(hint: object) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _parse(text: str, hint: object) -> object:
    """Turn a word of the command line into what it means for `hint`; _check judges the result."""
    for choice in _choices(hint):
        if text.lower() == str(choice).lower():
            return choice
    base = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    if base in (int, float):
        try:
            return base(text)
        except ValueError:
            pass  # _check says what it should have been
    return text


def _check(name: str, value: object, hint: object, source: str) -> object:
    """Return `value`, an int turned to float where a float is wanted, or raise a UserError."""
    if type(None) in typing.get_args(hint):  # Optional, in what a checkpoint stores
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    base, interval = hint, ""
    if hasattr(hint, "__metadata__"):
        base, interval = hint.__origin__, hint.__metadata__[0]
    if choices := _choices(hint):
        good = any(type(value) is type(choice) and value == choice for choice in choices)
        wanted = f"one of {_listed(hint)}"
    else:
        good = type(value) is (tuple if base == WORDS else base)
        good = good or (base is float and type(value) is int)
        wanted = {int: "a whole number", float: "a number", str: "text", WORDS: "words"}[base]
        if interval:
            wanted += f" in {interval}"
            good = good and _inside(value, interval)
        if type(value) is int and abs(value) > LARGEST_INT:
            good, wanted = False, f"{wanted}, at most {LARGEST_INT}"
    if not good:
        raise UserError(f"{source}: {name} must be {wanted}, not {value!r}")
    return float(value) if base is float else value


def _inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval written as in mathematics, such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _suggest(name: str, hints: dict, instead: dict[str, str] | None) -> str:
    if instead and name in instead:
        return instead[name]
    near = difflib.get_close_matches(name.replace("-", "_"), hints, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "--help lists them"


def _help(options: type) -> str:
    """The script's own description, then its options as they are declared and commented."""
    lines = [inspect.getmodule(options).__doc__.strip(), "", "options:"]
    hints = typing.get_type_hints(options)
    for cls in reversed(options.__mro__[:-1]):
        source = inspect.getsource(cls)
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        defaults = {k: " ".join(v) if type(v) is tuple else v for k, v in defaults.items()}
        for indent, comment, name, meaning in re.findall(
            r"^(    )(?:# (.+)|(\w+): .+?  # (.+))$", source, re.MULTILINE
        ):
            if comment:
                lines += ["", f"{indent}{comment}"]
            else:
                if _is_literal(hints[name]):
                    meaning += f" ({_listed(hints[name])})"
                lines.append(f"  --{name + '=' + str(defaults[name]):<32} {meaning}")
    return "\n".join(lines)
