"""Text in, token bins out.

    python prepare.py                       tiny Shakespeare, characters -> data/shakespeare_char
    python prepare.py shakespeare           tiny Shakespeare, GPT-2's tokens
    python prepare.py pydocs                the Python language reference: needs no download
    python prepare.py shakespeare_char --input input.txt       the same, from a file at hand
    python prepare.py --name mine --input book.txt notes/ 'more/**/*.md' --tokenizer bpe
    python prepare.py --name mine --input https://example.org/a.txt docs.jsonl.gz --field body
    python prepare.py --name code --input pystdlib --tokenizer bpe --vocab_size 4096
    python prepare.py --name new --input new.txt --tokenizer out/mine     a run's, to finetune it

    text -> documents -> Tokenizer.encode -> data/<name>/{train.bin, val.bin, meta.json}

A plain file is one document, a line of JSON lines is one. From 100 documents on, those validate
whose text's hash says so: adding more moves none to the other split. Of fewer, the last tenth of
each validates. Nothing is left behind by a run that fails, and a data set of the same name is moved
aside, not overwritten.
"""

import hashlib
import itertools
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

import config
from config import UserError
from data import bins, tokenizer
from data.documents import PIECE, SHAKESPEARE, Corpus, Document
from data.tokenizer import Tokenizer

MANY = 100  # documents, from which on whole ones validate


@dataclass
class PrepareConfig:
    dataset: str = ""  # a recipe: shakespeare_char (the default), shakespeare or pydocs
    name: str = ""  # the folder's name in data_dir; the recipe's where there is one
    data_dir: str = "data"  # where data sets lie

    # the text
    input: tuple[str, ...] = ()  # files, folders, 'globs', URLs, pydocs, pystdlib; .gz too
    field: str = "text"  # of JSON lines (.jsonl), the one that holds the text
    val_input: tuple[str, ...] = ()  # validate on these; input is then for training alone
    val_fraction: Annotated[float, "(0, 1)"] = 0.1  # the share of the text that validates

    # its tokens
    tokenizer: str = ""  # char, byte, gpt2, bpe, or that of a data set, run or checkpoint
    vocab_size: Annotated[int, "[257, 1e6]"] = 4096  # ids that a bpe tokenizer is to have
    normalize: Literal["", "NFC", "NFKC"] = ""  # a Unicode form to bring the text into first
    workers: Annotated[int, "[0, 1024]"] = 0  # threads that encode; 0: one a core


class Recipe(NamedTuple):
    """A data set that is known by name: where its text comes from, and its usual tokenizer."""

    tokenizer: str
    input: tuple[str, ...]


RECIPES = {
    "shakespeare_char": Recipe("char", (SHAKESPEARE,)),
    "shakespeare": Recipe("gpt2", (SHAKESPEARE,)),
    "pydocs": Recipe("char", ("pydocs",)),
}


@config.script
def main(argv: list[str]) -> None:
    given = config.read(PrepareConfig, argv, bare=("dataset",))
    options = config.build(PrepareConfig, given)
    started = time.perf_counter()
    name, recipe = choose(options)
    kind = options.tokenizer or recipe.tokenizer
    check_tokenizer(kind, given)
    if options.val_input and "val_fraction" in given:
        raise UserError("--val_input is all that validates: leave --val_fraction out")
    texts = Texts(options, options.input or recipe.input)
    tok = make_tokenizer(kind, options, texts)
    workers = options.workers or os.cpu_count() or 1
    with bins.Writer(Path(options.data_dir) / name, tok.vocab_size) as writer:
        for split, ids in encode(tok, texts, workers):
            writer.add(split, ids)
        texts.check()
        meta = writer.finish(texts.counts, tok.meta(), texts.sources)
    print_table(writer.folder, meta, texts.n_skipped, time.perf_counter() - started)


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
        recipe = Recipe("char", ())
    elif options.input and not options.dataset:
        raise UserError(f"--input={options.input[0]} needs a name for the data set: --name=NAME")
    else:
        recipe = RECIPES[options.dataset or "shakespeare_char"]
    name = options.name or options.dataset or "shakespeare_char"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name must be letters, digits, '_', '-' and '.', not {name!r}")
    return name, recipe


# ---- text -> documents --------------------------------------------------------------------------


class Texts:
    """The documents of a data set, each with the split that it belongs to."""

    def __init__(self, options: PrepareConfig, inputs: tuple[str, ...]):
        downloads = Path(options.data_dir) / ".downloads"
        self._val_fraction = options.val_fraction
        self._corpus = Corpus(inputs, options.field, downloads)
        self._val_corpus = Corpus(options.val_input, options.field, downloads)
        self.sources = self._corpus.sources + self._val_corpus.sources
        self.n_documents = sum(1 for _ in itertools.islice(self._corpus, MANY))  # at least
        if not self.n_documents:
            n_binary = f", only {self.n_skipped} binary files" if self.n_skipped else ""
            raise UserError(f"{', '.join(inputs)}: no text there{n_binary}")
        self.counts: dict[str, dict] = {}

    def __iter__(self) -> Iterator[tuple[str, bool, str]]:
        """Read everything again, in the inputs' order, counting it, in pieces: (split, follows,
        text), where `follows` says that another document of the split ended just before."""
        self.counts = {split: {"documents": 0, "bytes": 0} for split in bins.SPLITS}
        with tqdm(desc="text", unit="B", unit_scale=True, delay=1, disable=None) as bar:
            for split, document in self._assign():
                if not document.data:
                    continue
                count = self.counts[split]
                follows = count["documents"] > 0
                for text in document.pieces():
                    yield split, follows, text
                    follows = False
                    bar.update(len(text))
                count["documents"] += 1
                count["bytes"] += len(document.data)

    def _assign(self) -> Iterator[tuple[str, Document]]:
        if self._val_corpus.files:
            yield from (("train", document) for document in self._corpus)
            yield from (("val", document) for document in self._val_corpus)
        elif self.n_documents >= MANY:
            for document in self._corpus:
                place = int.from_bytes(hashlib.sha256(document.data).digest()[:8], "big") / 2**64
                yield "val" if place < self._val_fraction else "train", document
        else:
            for document in self._corpus:
                size = len(document.data)
                cut = int(size * (1 - self._val_fraction))
                yield "train", document.cut(0, cut)
                yield "val", document.cut(cut, size)

    @property
    def n_skipped(self) -> int:
        """How many binary files the folders and globs hold."""
        return len(self._corpus.skipped | self._val_corpus.skipped)

    def check(self) -> None:
        """Refuse what leaves a split without text."""
        for split, count in self.counts.items():
            if not count["documents"]:
                n_bytes = sum(count["bytes"] for count in self.counts.values())
                raise UserError(
                    f"{', '.join(self.sources)}: of {n_bytes:,} bytes of text none are left for "
                    f"{split}"
                )


# ---- documents -> tokens ------------------------------------------------------------------------


def check_tokenizer(kind: str, given: dict) -> None:
    """Refuse options that the tokenizer has no use for."""
    if "vocab_size" in given and kind != "bpe":
        raise UserError(f"--vocab_size goes with --tokenizer=bpe, not with {kind}")
    if given.get("normalize") and kind not in tokenizer.KINDS:
        raise UserError(f"--normalize does not go with {kind}, whose tokenizer is fixed")


def make_tokenizer(kind: str, options: PrepareConfig, texts: Texts) -> Tokenizer:
    """The tokenizer that is asked for; char takes its characters from all of the text, bpe its
    tokens from what is trained on."""
    form = options.normalize
    if kind not in tokenizer.KINDS:
        try:
            return tokenizer.load(tokenizer.stored_in(Path(kind)))
        except UserError as error:
            kinds = ", ".join(tokenizer.KINDS)
            raise UserError(f"--tokenizer={kind} is none of {kinds}; {error}") from None
    if kind == "char":
        separated = ("\n" * follows + text for _, follows, text in texts)
        tok = tokenizer.CharTokenizer.train(tokenizer.normalized(t, form) for t in separated)
    elif kind == "bpe":
        pieces = (tokenizer.normalized(text, form) for split, _, text in texts if split == "train")
        tok = tokenizer.BytePairTokenizer.train(pieces, options.vocab_size)
    else:
        tok = tokenizer.load({"kind": kind})
    tok.normalize = form
    return tok


def encode(tok: Tokenizer, texts: Texts, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the ids (n,) of all texts, split by split as they come, with what stands between them.

    The order is that of the texts for any number of workers.
    """

    def encode_batch(batch: list[tuple[str, bool, str]]) -> dict[str, np.ndarray]:
        ids = {split: [] for split, _, _ in batch}
        for split, follows, text in batch:
            if follows and tok.end_of_text is None:
                ids[split].append(tok.encode("\n"))
            elif follows:
                ids[split].append([tok.end_of_text])
            ids[split].append(tok.encode(text))
        return {split: np.concatenate(parts) for split, parts in ids.items()}

    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for batch in batches(texts):
            pending.append(pool.submit(encode_batch, batch))
            if len(pending) > 2 * workers:  # so many pieces are in memory
                yield from pending.popleft().result().items()
        for result in pending:
            yield from result.result().items()


def batches(texts: Texts) -> Iterator[list[tuple[str, bool, str]]]:
    """The pieces of the texts in lists of about PIECE characters together."""
    batch, size = [], 0
    for piece in texts:
        batch.append(piece)
        size += len(piece[2])
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def print_table(folder: Path, meta: dict, n_skipped: int, seconds: float) -> None:
    print(f"{folder}: {meta['tokenizer']['kind']} tokens from {', '.join(meta['sources'])}")
    if n_skipped:
        print(f"binary files skipped: {n_skipped}")
    print(f"{'split':<8}{'documents':>14}{'tokens':>14}{'bytes':>14}{'bytes/token':>14}")
    total_bytes = 0
    for split, about in meta["splits"].items():
        documents, tokens, n_bytes = about["documents"], about["tokens"], about["bytes"]
        total_bytes += n_bytes
        print(f"{split:<8}{documents:>14,}{tokens:>14,}{n_bytes:>14,}{n_bytes / tokens:>14.2f}")
    print(
        f"vocabulary {meta['vocab_size']:,} ({meta['dtype']}), "
        f"{seconds:.2f} s, {total_bytes / seconds / 1e6:.1f} MB/s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
