"""Text in, token bins out.

    python prepare.py                       tiny Shakespeare, characters -> data/shakespeare_char
    python prepare.py shakespeare           tiny Shakespeare, GPT-2's tokens
    python prepare.py pydocs                the Python language reference: needs no download
    python prepare.py shakespeare_char --input input.txt       the same, from a file at hand
    python prepare.py --name mine --input book.txt --tokenizer char

    text -> Tokenizer.encode -> data/<name>/{train.bin, val.bin, meta.json}

The first part of the text is for training, the rest for validation. Nothing is left behind by a
run that fails, and a data set of the same name is moved aside, not overwritten.
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import config
from config import UserError
from data import bins, tokenizer
from data.download import fetch


@dataclass
class PrepareConfig:
    dataset: str = ""  # a recipe: shakespeare_char (the default), shakespeare or pydocs
    input: str = ""  # a UTF-8 text file, in place of the recipe's source
    name: str = ""  # the folder's name in data_dir; the recipe's where there is one
    tokenizer: Literal["", "char", "byte", "gpt2"] = ""  # empty: the recipe's, or char
    val_fraction: Annotated[float, "(0, 1)"] = 0.1  # the share of the text that validates
    data_dir: str = "data"  # where data sets lie


class Recipe(NamedTuple):
    """A data set that is known by name: where its text comes from, and its usual tokenizer."""

    tokenizer: str
    source: str  # an address, or python:MODULE.NAME for a dictionary inside Python's own library
    size: int | None = None
    sha256: str | None = None


SHAKESPEARE = Recipe(
    tokenizer="char",
    source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    size=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
RECIPES = {
    "shakespeare_char": SHAKESPEARE,
    "shakespeare": SHAKESPEARE._replace(tokenizer="gpt2"),
    "pydocs": Recipe(tokenizer="char", source="python:pydoc_data.topics"),
}


@config.script
def main(argv: list[str]) -> None:
    options = config.build(PrepareConfig, config.read(PrepareConfig, argv, bare="dataset"))
    started = time.perf_counter()
    name, recipe = choose(options)
    text, source = read_text(options, recipe)

    tok = make_tokenizer(options.tokenizer or recipe.tokenizer, text)
    cut = int(len(text) * (1 - options.val_fraction))
    splits = {}
    for split, part in zip(bins.SPLITS, (text[:cut], text[cut:]), strict=True):
        if not part:
            raise UserError(f"{source} has {len(text)} characters: none are left for {split}")
        splits[split] = (tok.encode(part), len(part.encode()))

    folder = Path(options.data_dir) / name
    meta = bins.write(folder, splits, tok.meta(), tok.vocab_size, [source])
    print_table(folder, meta, time.perf_counter() - started)


def choose(options: PrepareConfig) -> tuple[str, Recipe]:
    """Return the data set's name and its recipe, made up on the spot for the user's own text."""
    if options.dataset and options.dataset not in RECIPES:
        raise UserError(
            f"no recipe {options.dataset!r}; there are {', '.join(RECIPES)}; "
            "for own text: python prepare.py --name NAME --input FILE"
        )
    if options.name and not options.dataset:
        if not options.input:
            raise UserError(f"--name={options.name} needs its text: --input=FILE")
        recipe = Recipe(tokenizer="char", source="")
    elif options.input and not options.dataset:
        raise UserError(f"--input={options.input} needs a name for the data set: --name=NAME")
    else:
        recipe = RECIPES[options.dataset or "shakespeare_char"]
    name = options.name or options.dataset or "shakespeare_char"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name must be letters, digits, '_', '-' and '.', not {name!r}")
    return name, recipe


def read_text(options: PrepareConfig, recipe: Recipe) -> tuple[str, str]:
    """Return the whole text and where it came from."""
    if options.input:
        return decode(Path(options.input)), options.input
    if recipe.source.startswith("python:"):
        return python_reference(), f"{recipe.source} of Python {sys.version.split()[0]}"
    path = Path(options.data_dir) / ".downloads" / f"{recipe.sha256[:16]}.txt"
    if not path.exists():
        try:
            fetch(recipe.source, path, recipe.sha256, recipe.size)
        except UserError as error:
            raise UserError(
                f"{error}; with the file at hand add --input=FILE, "
                "or without any download: python prepare.py pydocs"
            ) from None
    return decode(path), recipe.source


def decode(path: Path) -> str:
    """The text of a UTF-8 file, line ends as they are; the first byte that is wrong is named."""
    try:
        if path.is_char_device():
            raise UserError(f"{path} is a device, not a text")
        data = path.read_bytes()
        if not data:
            raise UserError(f"{path} is empty")
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}"
        ) from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"--input={path}: {error.strerror}") from None


def python_reference() -> str:
    """The Python language reference that CPython carries for `help()`, one topic after another."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python comes without pydoc_data; use --input=FILE") from None
    return "\n".join(topics[name].strip("\n") + "\n" for name in sorted(topics))


def make_tokenizer(kind: str, text: str) -> tokenizer.Tokenizer:
    if kind == "char":
        return tokenizer.CharTokenizer.train(text)
    return tokenizer.load({"kind": kind})


def print_table(folder: Path, meta: dict, seconds: float) -> None:
    print(f"{folder}: {meta['tokenizer']['kind']} tokens from {', '.join(meta['sources'])}")
    print(f"{'split':<8}{'tokens':>14}{'bytes':>14}{'bytes/token':>14}")
    total_bytes = 0
    for split, about in meta["splits"].items():
        tokens, n_bytes = about["tokens"], about["bytes"]
        total_bytes += n_bytes
        print(f"{split:<8}{tokens:>14,}{n_bytes:>14,}{n_bytes / tokens:>14.2f}")
    print(
        f"vocabulary {meta['vocab_size']:,} ({meta['dtype']}), "
        f"{seconds:.2f} s, {total_bytes / seconds / 1e6:.1f} MB/s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
