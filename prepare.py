"""Turn text into token bins.

    python prepare.py                       tiny Shakespeare, characters -> data/shakespeare_char
    python prepare.py shakespeare           tiny Shakespeare, GPT-2's tokens
    python prepare.py pydocs                the Python language reference, without a download
    python prepare.py shakespeare_char --input input.txt       the same, from a local file
    python prepare.py --name mine --input book.txt notes/ 'more/**/*.md' --tokenizer bpe
    python prepare.py --name mine --input https://example.org/a.txt docs.jsonl.gz --field body
    python prepare.py --name code --input pystdlib --tokenizer bpe --vocab_size 4096
    python prepare.py --name new --input new.txt --tokenizer out/mine     that of a run, to finetune
    python prepare.py openwebtext           of the Hugging Face Hub; or fineweb_edu_10B
    python prepare.py fineweb10B_gpt2       FineWeb as GPT-2's tokens, from the Hub
    python prepare.py --name mine --input 'hf://datasets/OWNER/NAME/*.parquet'
    python prepare.py --name mine --input 'shards/*.bin'       token files of llm.c

    text -> documents -> Tokenizer.encode -> data/<name>/{train.bin, val.bin, meta.json}

A plain file is one document, and so is each line of JSON lines and each row of Parquet. With 100
documents or more, a hash of each document's text assigns it to a split, so that adding documents
never moves others. With fewer, the last tenth of each document is validation text.

An older data set of the same name is moved aside, not overwritten. After a mistake in the input,
only downloads are left behind. If the process was stopped in any other way, the same command
continues.
"""

from folio.process import script  # isort: skip  (first, for Ctrl-C during other imports)
import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np

from data import bins, hub, tokenizer
from data.documents import PIECE_BYTES, Piece
from data.errors import UserError
from data.files import SHAKESPEARE, drop
from data.shards import Shards, are_shards
from data.texts import Texts
from data.tokenizer import Tokenizer
from data.workers import Encoders, Text, UnknownText, available_cores
from data.writer import Writer, check_space, check_target, find_unfinished
from folio.options import PathStr, PathStrs, build_options, read_options, unescape

LARGE_BYTES = 32e6  # from this much text on, starting worker processes pays off
POSITIONS = 1  # the version of what a position in the input means
TEXT_OPTIONS = {  # that mean nothing for an input of tokens
    "separator", "encoding", "errors", "field", "skip_bad_lines", "val_fraction",
    "tokenizer", "vocab_size", "extend_vocab", "normalize",
}  # fmt: skip


@dataclass
class PrepareConfig:
    dataset: str = ""  # a recipe, such as shakespeare_char, which is the default
    name: str = ""  # name of the folder in data_dir; empty: the recipe's
    data_dir: PathStr = "data"  # the parent folder of all data sets

    # the text
    input: PathStrs = ()  # files, folders, 'globs', URLs, pydocs, pystdlib; - for stdin
    separator: str = ""  # text between the documents of a plain file, such as \n or <|endoftext|>
    encoding: str = ""  # of plain files; empty: by the byte-order mark, or UTF-8
    errors: Literal["strict", "replace"] = "strict"  # replace: bad bytes become U+FFFD
    field: str = "text"  # field of JSON lines or Parquet with the text; a.b is b in a
    skip_bad_lines: bool = False  # leave out lines and rows that cannot be used
    val_input: PathStrs = ()  # separate validation text; input is then for training only
    val_fraction: Annotated[float, "(0, 1)"] = 0.1  # fraction of the text that is held out

    # its tokens
    tokenizer: PathStr = ""  # char, byte, gpt2, bpe, or that of a data set, run or model
    vocab_size: Annotated[int, "[257, 1e6]"] = 4096  # vocabulary size of a bpe tokenizer
    extend_vocab: bool = False  # add the text's other characters to those of --tokenizer
    normalize: Literal["", "NFC", "NFKC"] = ""  # Unicode normalization of the text
    workers: Annotated[int, "[0, 1024]"] = 0  # how many encode at a time; 0: one per core


class Recipe(NamedTuple):
    """A data set that is known by name: its default tokenizer, and its inputs."""

    tokenizer: str
    input: tuple[str, ...]


RECIPES = {
    "shakespeare_char": Recipe("char", (SHAKESPEARE,)),
    "shakespeare": Recipe("gpt2", (SHAKESPEARE,)),
    "pydocs": Recipe("char", ("pydocs",)),
    **{name: Recipe("gpt2", (address,)) for name, (address, _) in hub.DATA_SETS.items()},
}


@script
def main(argv: list[str]) -> None:
    given, _ = read_options(PrepareConfig, argv, positional=("dataset",))
    options = build_options(PrepareConfig, given)
    started = time.perf_counter()
    name, recipe = find_recipe(options)
    folder = Path(options.data_dir) / name
    kind = options.tokenizer or recipe.tokenizer
    check_tokenizer(kind, given)
    if options.val_input and "val_fraction" in given:
        raise UserError("--val_fraction cannot be combined with --val_input")
    check_target(folder)
    texts = open_texts(options, name, options.input or recipe.input)
    if kind not in tokenizer.KINDS:
        kind = load_tokenizer(kind)
    command = describe_command(options, kind, texts)
    progress = find_unfinished(folder, command)
    start = progress and progress["position"]
    if start:
        print(f"continuing after {start['bytes'] / 1e6:,.1f} MB of text")
    if are_shards(texts.files):
        source, tok = open_shards(texts, given), tokenizer.load({"kind": "gpt2"})
        n_bytes, encoded = source.n_left(start), source.read(tok, start)
    else:
        for option in ("field", "skip_bad_lines"):
            if option in given and not texts.has_fields:
                raise UserError(
                    f"--{option}={given[option]} is for JSON lines and Parquet, and the input has "
                    "none"
                )
        texts.look(progress and progress["cuts"])
        if progress:
            tok = tokenizer.load(progress["tokenizer"])
        else:
            if kind in ("char", "bpe") or options.extend_vocab:  # made from all of the text
                new = [f for f in texts.files if f.hub and not f.path.exists()]
                check_space(folder, sum(file.size for file in new))
            tok = make_tokenizer(kind, options, texts)
        source, n_bytes = texts, bytes_needed(tok, texts, progress)
        encoded = encode(tok, texts, options.workers or available_cores(), start)
    largest = max((file.size for file in source.files if file.hub), default=0)
    check_space(folder, n_bytes + largest)
    keep = {"command": command, "tokenizer": tok.meta(), "cuts": texts.cuts}
    with Writer(folder, tok.vocab_size, keep, progress) as writer, closing(encoded):
        for ids, position in encoded:
            for split, part in ids.items():
                writer.add(split, part)
            if writer.save(position):
                drop(source.files[: position["file"]])
        meta = writer.finish(source.counts, tok.meta(), source.sources)
    drop(source.files)
    print_table(writer.folder, meta, texts.notes, time.perf_counter() - started)


def find_recipe(options: PrepareConfig) -> tuple[str, Recipe]:
    """Return the data set's name and its recipe. The user's own text defaults to characters.

    As in nanoGPT, text that is in data/NAME/input.txt already needs no --input.
    """
    name = options.name or options.dataset or "shakespeare_char"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name must be letters, digits, '_', '-' and '.', not {name!r}")
    own_text = Path(options.data_dir) / name / "input.txt"
    if name not in RECIPES and not options.input and own_text.is_file():
        return name, Recipe("char", (str(own_text),))
    if options.dataset and options.dataset not in RECIPES:
        raise UserError(
            f"no recipe {options.dataset!r}; known recipes: {', '.join(RECIPES)}; "
            "for your own text: python prepare.py --name NAME --input FILE"
        )
    if options.name and not options.dataset:
        if not options.input:
            raise UserError(f"--name={options.name} needs its text: --input=FILE")
        recipe = Recipe("char", ())
    elif options.input and not options.dataset:
        raise UserError(f"--input={options.input[0]} needs a name for the data set: --name=NAME")
    else:
        recipe = RECIPES[options.dataset or "shakespeare_char"]
    return name, recipe


# ---- input -> documents -------------------------------------------------------------------------


def open_texts(options: PrepareConfig, name: str, inputs: tuple[str, ...]) -> Texts:
    """Find the files of the inputs, and download URLs; else nothing is read yet."""
    how = {key: getattr(options, key) for key in ("field", "encoding", "errors", "skip_bad_lines")}
    how["separator"] = unescape(options.separator)
    how["downloads"] = Path(options.data_dir) / ".downloads"
    try:
        return Texts(inputs, options.val_input, options.val_fraction, **how)
    except UserError as error:
        if SHAKESPEARE not in inputs:
            raise
        raise UserError(
            f"{error}; if you have the file: python prepare.py {name} --input FILE; without a "
            "network: python prepare.py pydocs"
        ) from None


def open_shards(texts: Texts, given: dict) -> Shards:
    """The input as tokens; raises UserError for options that are for text."""
    if wrong := [name for name in given if name in TEXT_OPTIONS]:
        raise UserError(f"--{wrong[0]} is for text, and {texts.files[0].name} has GPT-2's tokens")
    return Shards(texts.sources, texts.files, texts.val_files)


def describe_command(options: PrepareConfig, kind: Tokenizer | str, texts: Texts) -> str:
    """A digest of all that decides about the bins: options, files, and a known tokenizer."""
    chosen = asdict(options)
    for name in ("dataset", "name", "data_dir", "workers", "tokenizer"):
        del chosen[name]
    files = [(file.name, file.size, file.version) for file in texts.files]
    tok = kind if isinstance(kind, str) else kind.meta()
    content = json.dumps([POSITIONS, PIECE_BYTES, chosen, texts.sources, files, tok])
    return hashlib.sha256(content.encode()).hexdigest()


def bytes_needed(tok: Tokenizer, texts: Texts, progress: dict | None) -> float:
    """About how much larger the bins will become, judged by what is there, or the first piece."""
    if progress:
        n_bytes, n_tokens = progress["position"]["bytes"], sum(progress["tokens"].values())
    else:
        piece = texts.sample()
        n_bytes = n_tokens = piece.n_bytes
        with suppress(UserError):  # encode() will say where a character is unknown
            n_tokens = len(tok.encode(piece.text))
    left = texts.n_bytes - (n_bytes if progress else 0)
    return max(0, left) * n_tokens / n_bytes * bins.dtype_of(tok.vocab_size).itemsize


# ---- documents -> tokens ------------------------------------------------------------------------


def check_tokenizer(kind: str, given: dict) -> None:
    """Raise UserError for options that the tokenizer does not support."""
    if "vocab_size" in given and kind != "bpe":
        raise UserError(f"--vocab_size is for --tokenizer=bpe, not for {kind}")
    if given.get("normalize") and kind not in tokenizer.KINDS:
        raise UserError(f"--normalize cannot change the tokenizer of {kind}")
    if given.get("extend_vocab") and kind in tokenizer.KINDS:
        raise UserError("--extend_vocab needs a --tokenizer to extend, such as that of a run")


def make_tokenizer(kind: Tokenizer | str, options: PrepareConfig, texts: Texts) -> Tokenizer:
    """Build the tokenizer: char from all of the text, bpe from the training split. For both, all
    files of the Hub are downloaded, and stay until they have been encoded."""
    if isinstance(kind, Tokenizer):
        if options.extend_vocab and kind.kind != "char":
            raise UserError(
                f"--extend_vocab is for characters; {options.tokenizer} has a {kind.kind} tokenizer"
            )
        return kind.extended(separated(texts, kind.normalize)) if options.extend_vocab else kind
    form = options.normalize
    if kind == "char":
        tok = tokenizer.CharTokenizer.train(separated(texts, form))
    elif kind == "bpe":
        pieces = (
            tokenizer.normalized(piece.text, form)
            for split, _, piece in texts.pieces()
            if split == "train"
        )
        tok = tokenizer.BytePairTokenizer.train(pieces, options.vocab_size)
    else:
        tok = tokenizer.load({"kind": kind})
    tok.normalize = form
    return tok


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a data set, a run, a checkpoint or a model of the Hugging Face Hub."""
    path = Path(name)
    if not path.exists() or (path / "config.json").exists():
        from folio import gpt2  # here, because it imports torch

        if folder := gpt2.find_folder(name):
            return tokenizer.load(gpt2.load(name, folder).meta["tokenizer"])
    try:
        return tokenizer.load(tokenizer.stored_in(path))
    except UserError as error:
        kinds = ", ".join(tokenizer.KINDS)
        raise UserError(f"--tokenizer={name} is not one of {kinds}; {error}") from None


def separated(texts: Texts, form: str) -> Iterator[str]:
    """Yield all of the text, normalized, with newlines between documents."""
    for _, follows, piece in texts.pieces():
        yield tokenizer.normalized("\n" * follows + piece.text, form)


def encode(
    tok: Tokenizer, texts: Texts, n_workers: int, start: dict | None
) -> Iterator[tuple[dict[str, np.ndarray], dict]]:
    """Yield ({split: ids (n,)}, position after them) for all texts in order, from `start` on.

    The ids are the same for any number of workers.
    """
    is_slow = isinstance(tok, tokenizer.BytePairTokenizer) and texts.n_bytes > LARGE_BYTES
    with Encoders(tok, n_workers, in_processes=is_slow and n_workers > 1) as encoders:
        waiting = deque()
        for pieces, position in batches(texts, start):
            batch = [Text(split, follows, piece.text) for split, follows, piece in pieces]
            waiting.append((encoders.submit(batch), pieces, position))
            if len(waiting) > 2 * n_workers:  # bounds the memory
                yield finished(tok, *waiting.popleft())
        while waiting:
            yield finished(tok, *waiting.popleft())
    texts.check()


def finished(
    tok: Tokenizer, ids: Future, pieces: list[tuple[str, bool, Piece]], position: dict
) -> tuple[dict[str, np.ndarray], dict]:
    """Wait for the ids of a batch; raises UserError that says where a character is unknown."""
    try:
        return ids.result(), position
    except UnknownText as unknown:
        where = pieces[unknown.number][2].locate(unknown.error.index, tok.normalize)
        names = unknown.error.names
        raise UserError(
            f"{where}: the vocabulary has no {names}; --extend_vocab adds them"
        ) from None


def batches(
    texts: Texts, start: dict | None
) -> Iterator[tuple[list[tuple[str, bool, Piece]], dict]]:
    """The pieces of the texts in lists of about PIECE_BYTES, each with the position after it."""
    batch, size = [], 0
    for split, follows, piece in texts.pieces(start):
        batch.append((split, follows, piece))
        size += piece.n_bytes
        if size >= PIECE_BYTES:
            yield batch, texts.position()
            batch, size = [], 0
    if batch:
        yield batch, texts.position()


def print_table(folder: Path, meta: dict, notes: dict[str, int], seconds: float) -> None:
    print(f"{folder}: {meta['tokenizer']['kind']} tokens from {', '.join(meta['sources'])}")
    for what, count in notes.items():
        print(f"{what}: {count:,}")
    print(f"{'split':<8}{'documents':>14}{'tokens':>14}{'bytes':>14}{'bytes/token':>14}")
    total_bytes = 0
    for split, entry in meta["splits"].items():
        documents, tokens, n_bytes = entry["documents"], entry["tokens"], entry["bytes"]
        total_bytes += n_bytes
        print(f"{split:<8}{documents:>14,}{tokens:>14,}{n_bytes:>14,}{n_bytes / tokens:>14.2f}")
    print(
        f"vocabulary {meta['vocab_size']:,} ({meta['dtype']}), "
        f"{seconds:.2f} s, {total_bytes / seconds / 1e6:.1f} MB/s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
