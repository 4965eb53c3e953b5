"""Options: the defaults of a dataclass, overridden by recipes and --key=value.

    python train.py config/shakespeare_char.py --batch_size=32 --compile

Each script declares its options as one flat dataclass. The type of a field defines its check:

    n_layer: Annotated[int, "[1, inf)"] = 12               a whole number in that interval
    schedule: Literal["cosine", "linear"] = "cosine"       one of these
    compile: Literal["auto", True, False] = "auto"         one of these; --compile alone is True
    out_dir: PathStr = "out/run"                           a path, in which ~ is the home folder
    input: tuple[str, ...] = ()                            all words up to the next --option; each
                                                           further --input adds to them

Arguments apply from left to right; later ones win. An argument that ends in .py is a recipe: a
Python file whose plain assignments are options. Recipes are the user's own code and are executed;
everything else that Folio reads is data. argparse has no recipes, no ranges, and does not suggest
the right option for a wrong one.
"""

import dataclasses
import difflib
import inspect
import os
import re
import runpy
import types
import typing
from pathlib import Path

from data.errors import UserError

WORDS = tuple[str, ...]  # the type of an option that takes several words
PathStr = typing.Annotated[str, "path"]
PathStrs = typing.Annotated[WORDS, "path"]
ALIASES = {"lr": "learning_rate"}
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
LARGEST_INT = 2**53  # above it, a whole number is not exact as a float


def read_options(
    cls: type,
    argv: list[str],
    positional: tuple[str, ...] = (),
    hints: dict[str, str] | None = None,
) -> tuple[dict[str, object], list[str]]:
    """Parse `argv` into {option: value}, in the order of setting, and the recipes that it names.

    Arguments without dashes are recipes, or set the `positional` options in turn. After one of
    these, or after an option that takes several words, such as --input, a .py file is one more word
    and is not run. `hints` maps option names of other trainers to advice. --help prints the
    script's help and exits. Raises UserError for an unknown option or a value out of range.
    """
    types_of = typing.get_type_hints(cls, include_extras=True)
    values, recipes, from_argv = {}, [], set()

    def put(name: str, value: object, source: str) -> None:
        name = full_name(name)
        if name not in types_of:
            hint = _suggest(name, types_of, hints)
            raise UserError(f"{source}: unknown option {name!r}; {hint}")
        values.pop(name, None)  # the order is that of the last assignment
        values[name] = _check(name, value, types_of[name], source)

    def full_name(name: str) -> str:
        return ALIASES[name] if ALIASES.get(name) in types_of else name

    words, unfilled, has_words = list(argv), list(positional), False
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            description = inspect.getmodule(cls).__doc__ or ""  # python -OO has none
            print(f"{description.strip()}\n\noptions:\n{options_help(cls)}")
            raise SystemExit(0)
        if word.startswith("--") and len(word) > 2:
            name, has_value, text = word[2:].partition("=")
            name = full_name(name)
            if name not in types_of:
                put(name, text, "command line")
            if not has_value and True in _choices(types_of[name]):
                text = "True"  # a flag never takes the next word
            elif not has_value:
                if not words or words[0].startswith("--"):
                    raise UserError(f"command line: --{name} needs a value: --{name}=VALUE")
                text = words.pop(0)
            value = _parse(text, types_of[name])
            if _base(types_of[name]) == WORDS:
                value = (*(values[name] if name in from_argv else ()), text)
                while not has_value and words and not words[0].startswith("--"):
                    value += (words.pop(0),)
                has_words = True
            put(name, value, "command line")
            from_argv.add(name)
        elif word.endswith(".py") and not has_words:
            for name, value in _run_recipe(word).items():
                put(name, value, word)
            recipes.append(word)
        elif unfilled and not word.startswith("-"):
            name, has_words = unfilled[0], True
            if _base(types_of[name]) == WORDS:  # takes all remaining words
                put(name, (*values.get(name, ()), word), "command line")
            else:
                put(unfilled.pop(0), _parse(word, types_of[name]), "command line")
        else:
            raise UserError(
                f"command line: unexpected argument {word!r}; options are written --name=value, "
                "recipes end in .py and come first"
            )
    return values, recipes


def build_options(cls: type, values: dict[str, object], source: str = "options"):
    """Return `cls(**values)` with every value checked; raises UserError for an invalid one."""
    types_of = typing.get_type_hints(cls, include_extras=True)
    if unknown := values.keys() - types_of:
        raise UserError(f"{source}: unknown option {min(unknown)!r}")
    try:
        return cls(**{k: _check(k, v, types_of[k], source) for k, v in values.items()})
    except ValueError as error:  # __post_init__ rejects a combination
        raise UserError(error) from None


def _run_recipe(path: str) -> dict[str, object]:
    """The plain assignments of a recipe; imports, functions, classes and _names are left out."""
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path("config").glob("[!_]*.py"))
        raise UserError(f"no recipe {path}; known recipes: {', '.join(known) or 'none here'}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        frames = [f for f in inspect.getinnerframes(error.__traceback__) if f.filename == path]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else "?")
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    return {
        name: value
        for name, value in names.items()
        if not (name.startswith("_") or callable(value) or isinstance(value, types.ModuleType))
    }


def _choices(hint: object) -> tuple:
    """The values of a Literal, True and False for bool, nothing for other types."""
    return (True, False) if hint is bool else typing.get_args(hint) if _is_literal(hint) else ()


def _join_choices(hint: object) -> str:
    return ", ".join(str(choice) or "''" for choice in _choices(hint))


def _is_literal(hint: object) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _base(hint: object) -> object:
    """A type without its annotation."""
    return hint.__origin__ if hasattr(hint, "__metadata__") else hint


def _parse(text: str, hint: object) -> object:
    """Convert an argument to the type of its option; _check validates the result."""
    for choice in _choices(hint):
        if text.lower() == str(choice).lower():
            return choice
    base = _base(hint)
    if base in (int, float):
        try:
            return base(text)
        except ValueError:
            pass  # _check reports it
    return text


def _check(name: str, value: object, hint: object, source: str) -> object:
    """Return `value`, converted from int to float if needed; raises UserError if invalid."""
    if type(None) in typing.get_args(hint):  # Optional, in what a checkpoint stores
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    base, interval = _base(hint), getattr(hint, "__metadata__", ("",))[0]
    if base == WORDS and not (type(value) is tuple and all(type(word) is str for word in value)):
        raise UserError(f"{source}: {name} must be a tuple of strings, not {value!r}")
    if interval == "path":
        interval = ""
        if type(value) is str:
            value = expand_path(value)
        elif type(value) is tuple:
            value = tuple(map(expand_path, value))
    if choices := _choices(hint):
        good = any(type(value) is type(choice) and value == choice for choice in choices)
        wanted = f"one of {_join_choices(hint)}"
    else:
        good = base == WORDS or type(value) is base or (base is float and type(value) is int)
        wanted = {int: "a whole number", float: "a number", str: "text", WORDS: "words"}[base]
        if interval:
            wanted += f" in {interval}"
            good = good and _is_inside(value, interval)
        if type(value) is int and abs(value) > LARGEST_INT:
            good, wanted = False, f"{wanted}, at most {LARGEST_INT}"
    if not good:
        raise UserError(f"{source}: {name} must be {wanted}, not {value!r}")
    return float(value) if base is float else value


def _is_inside(value: float, interval: str) -> bool:
    """Whether a number is in an interval in mathematical notation, such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def expand_path(path: str) -> str:
    """A path with ~ replaced, as the file system wants it: bytes in UTF-8, whatever the locale."""
    if path.startswith("~"):  # which a shell leaves after =
        path = os.path.expanduser(path)
    try:
        return os.fsdecode(path.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return path


def unescape(text: str) -> str:
    r"""Replace the escapes \n, \t, \r and \\."""
    return re.sub(r"\\[ntr\\]", lambda match: ESCAPES[match[0]], text)


def _suggest(name: str, types_of: dict, hints: dict[str, str] | None) -> str:
    if hints and name in hints:
        return hints[name]
    near = difflib.get_close_matches(name.replace("-", "_"), types_of, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "--help lists all options"


def options_help(cls: type) -> str:
    """One line per option, from the declarations and comments of the dataclass."""
    lines = []
    types_of = typing.get_type_hints(cls)
    for base in reversed(cls.__mro__[:-1]):
        defaults = {f.name: f.default for f in dataclasses.fields(base)}
        defaults = {k: " ".join(v) if type(v) is tuple else v for k, v in defaults.items()}
        for indent, comment, name, meaning in re.findall(
            r"^(    )(?:# (.+)|(\w+): .+?  # (.+))$", inspect.getsource(base), re.MULTILINE
        ):
            if comment:
                lines += ["", f"{indent}{comment}"]
            else:
                if _is_literal(types_of[name]):
                    meaning += f" ({_join_choices(types_of[name])})"
                lines.append(f"  --{name + '=' + str(defaults[name]):<32} {meaning}")
    return "\n".join(lines).strip("\n")
