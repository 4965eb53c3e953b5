"""Turn text into token bins.

    python prepare.py                       tiny Shakespeare, characters -> data/shakespeare_char
    python prepare.py shakespeare           tiny Shakespeare, GPT-2's tokens
    python prepare.py pydocs                the Python language reference, without a download
    python prepare.py shakespeare_char --input input.txt       the same, from a local file
    python prepare.py --name mine --input book.txt notes/ 'more/**/*.md' --tokenizer bpe
    python prepare.py --name mine --input https://example.org/a.txt docs.jsonl.gz --field body
    python prepare.py --name code --input pystdlib --tokenizer bpe --vocab_size 4096
    python prepare.py --name new --input new.txt --tokenizer out/mine     that of a run, to finetune

    text -> documents -> Tokenizer.encode -> data/<name>/{train.bin, val.bin, meta.json}

A plain file is one document, and so is each line of JSON lines. With 100 documents or more, a hash
of each document's text assigns it to a split, so that adding documents never moves others. With
fewer, the last tenth of each document is validation text. A failure leaves nothing behind. An older
data set of the same name is moved aside, not overwritten.
"""

from folio.process import script  # isort: skip  (first, for Ctrl-C during other imports)
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

from data import bins, tokenizer
from data.documents import PIECE_BYTES, SHAKESPEARE, Corpus, Document, Piece
from data.errors import UserError
from data.tokenizer import END_OF_TEXT, Tokenizer, UnknownCharacters
from folio.options import PathStr, PathStrs, build_options, read_options, unescape

MANY_DOCUMENTS = 100  # from this many on, whole documents are held out


@dataclass
class PrepareConfig:
    dataset: str = ""  # a recipe: shakespeare_char (the default), shakespeare or pydocs
    name: str = ""  # name of the folder in data_dir; empty: the recipe's
    data_dir: PathStr = "data"  # the parent folder of all data sets

    # the text
    input: PathStrs = ()  # files, folders, 'globs', URLs, pydocs, pystdlib; - for stdin
    separator: str = ""  # text between the documents of a plain file, such as \n or <|endoftext|>
    encoding: str = ""  # of plain files; empty: by the byte-order mark, or UTF-8
    errors: Literal["strict", "replace"] = "strict"  # replace: bad bytes become U+FFFD
    field: str = "text"  # field of JSON lines (.jsonl) with the text; a.b is b in a
    skip_bad_lines: bool = False  # leave out JSON lines that cannot be used
    val_input: PathStrs = ()  # separate validation text; input is then for training only
    val_fraction: Annotated[float, "(0, 1)"] = 0.1  # fraction of the text that is held out

    # its tokens
    tokenizer: PathStr = ""  # char, byte, gpt2, bpe, or that of a data set, run or model
    vocab_size: Annotated[int, "[257, 1e6]"] = 4096  # vocabulary size of a bpe tokenizer
    extend_vocab: bool = False  # add the text's other characters to those of --tokenizer
    normalize: Literal["", "NFC", "NFKC"] = ""  # Unicode normalization of the text
    workers: Annotated[int, "[0, 1024]"] = 0  # encoding threads; 0: one per core


class Recipe(NamedTuple):
    """A data set that is known by name: its default tokenizer, and its inputs."""

    tokenizer: str
    input: tuple[str, ...]


RECIPES = {
    "shakespeare_char": Recipe("char", (SHAKESPEARE,)),
    "shakespeare": Recipe("gpt2", (SHAKESPEARE,)),
    "pydocs": Recipe("char", ("pydocs",)),
}


@script
def main(argv: list[str]) -> None:
    given, _ = read_options(PrepareConfig, argv, positional=("dataset",))
    options = build_options(PrepareConfig, given)
    started = time.perf_counter()
    name, recipe = find_recipe(options)
    kind = options.tokenizer or recipe.tokenizer
    check_tokenizer(kind, given)
    if options.val_input and "val_fraction" in given:
        raise UserError("--val_fraction cannot be combined with --val_input")
    bins.check_target(Path(options.data_dir) / name)
    try:
        texts = Texts(options, options.input or recipe.input)
    except UserError as error:
        if SHAKESPEARE not in (options.input or recipe.input):
            raise
        raise UserError(
            f"{error}; if you have the file: python prepare.py {name} --input FILE; without a "
            "network: python prepare.py pydocs"
        ) from None
    if "field" in given and not texts.has_json_lines:
        raise UserError(f"--field={options.field} is for JSON lines, and the input has none")
    tok = make_tokenizer(kind, options, texts)
    workers = options.workers or os.cpu_count() or 1
    with bins.Writer(Path(options.data_dir) / name, tok.vocab_size) as writer:
        for split, ids in encode(tok, texts, workers):
            writer.add(split, ids)
        texts.check()
        meta = writer.finish(texts.counts, tok.meta(), texts.sources)
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


# ---- text -> documents --------------------------------------------------------------------------


class Texts:
    """The documents of a data set, each assigned to a split, or divided among both."""

    def __init__(self, options: PrepareConfig, inputs: tuple[str, ...]):
        how = {name: getattr(options, name) for name in ("field", "encoding", "errors")}
        how |= {"skip_bad_lines": options.skip_bad_lines, "separator": unescape(options.separator)}
        how["downloads"] = Path(options.data_dir) / ".downloads"
        self._val_fraction = options.val_fraction
        self._corpus, self._val_corpus = (Corpus(i, **how) for i in (inputs, options.val_input))
        self.sources = self._corpus.sources + self._val_corpus.sources
        self._cuts, n_bytes = [], 0  # where the validation text of a document begins, if few
        for document in itertools.islice(self._corpus, MANY_DOCUMENTS):
            size = document.size()
            self._cuts.append(document.boundary(int(size * (1 - self._val_fraction))))
            n_bytes += size
        if not n_bytes:
            notes = "".join(f"; {what}: {n}" for what, n in self._corpus.notes.items())
            raise UserError(f"{', '.join(inputs)}: no text found{notes}")
        self.counts: dict[str, dict] = {}
        self._digests = set()

    def __iter__(self) -> Iterator[tuple[str, bool, Piece]]:
        """Yield all text in order, as (split, follows, piece), and fill `counts`.

        `follows`: the piece starts a document that is not the first of its split.
        """
        self.counts = {split: {"documents": 0, "bytes": 0} for split in bins.SPLITS}
        self._n_end_of_text = 0
        with tqdm(desc="text", unit="B", unit_scale=True, delay=1, disable=None) as bar:
            for split, document, begin, end in self._assign():
                count = self.counts[split]
                follows, is_empty = count["documents"] > 0, True
                for piece in document.pieces(begin, end):
                    self._n_end_of_text += piece.text.count(END_OF_TEXT)
                    yield split, follows, piece
                    follows = is_empty = False
                    count["bytes"] += piece.n_bytes
                    bar.update(piece.n_bytes)
                count["documents"] += not is_empty

    def _assign(self) -> Iterator[tuple[str, Document, int, int | None]]:
        """Yield (split, document, begin, end) in the order of the inputs."""
        if self._val_corpus.files:
            yield from (("train", document, 0, None) for document in self._corpus)
            yield from (("val", document, 0, None) for document in self._val_corpus)
        elif len(self._cuts) >= MANY_DOCUMENTS:
            for document in self._corpus:
                digest = document.digest()[:8]
                if len(self._digests) < 2:
                    self._digests.add(digest)
                u = int.from_bytes(digest, "big") / 2**64
                yield "val" if u < self._val_fraction else "train", document, 0, None
        else:
            for document, cut in zip(self._corpus, self._cuts, strict=True):
                yield "train", document, 0, cut
                yield "val", document, cut, None

    @property
    def has_json_lines(self) -> bool:
        return self._corpus.has_json_lines or self._val_corpus.has_json_lines

    @property
    def notes(self) -> dict[str, int]:
        """What was noticed in the text, and how often."""
        notes = self._corpus.notes + self._val_corpus.notes
        if self._n_end_of_text:
            advice = f"--separator='{END_OF_TEXT}' makes it the end of a document"
            notes[f"{END_OF_TEXT} is in the text, as text; {advice}"] = self._n_end_of_text
        return {what: count for what, count in notes.items() if count}

    def check(self) -> None:
        """Raise UserError if a split got no text."""
        for split, count in self.counts.items():
            if not count["documents"]:
                n_bytes = sum(count["bytes"] for count in self.counts.values())
                if len(self._digests) == 1:
                    raise UserError(
                        f"{', '.join(self.sources)}: all documents are the same, so that all are "
                        "in one split; remove the copies, or use --val_input"
                    )
                if len(self._cuts) >= MANY_DOCUMENTS:
                    raise UserError(
                        f"{', '.join(self.sources)}: no document was assigned to the {split} split "
                        f"with --val_fraction={self._val_fraction}; use another, or --val_input"
                    )
                raise UserError(
                    f"{', '.join(self.sources)}: the text is too short ({n_bytes:,} bytes), "
                    f"the {split} split is empty"
                )


# ---- documents -> tokens ------------------------------------------------------------------------


def check_tokenizer(kind: str, given: dict) -> None:
    """Raise UserError for options that the tokenizer does not support."""
    if "vocab_size" in given and kind != "bpe":
        raise UserError(f"--vocab_size is for --tokenizer=bpe, not for {kind}")
    if given.get("normalize") and kind not in tokenizer.KINDS:
        raise UserError(f"--normalize cannot change the tokenizer of {kind}")
    if given.get("extend_vocab") and kind in tokenizer.KINDS:
        raise UserError("--extend_vocab needs a --tokenizer to extend, such as that of a run")


def make_tokenizer(kind: str, options: PrepareConfig, texts: Texts) -> Tokenizer:
    """Build the tokenizer: char from all of the text, bpe from the training split."""
    if kind not in tokenizer.KINDS:
        tok = load_tokenizer(kind)
        if options.extend_vocab and tok.kind != "char":
            raise UserError(f"--extend_vocab is for characters; {kind} has a {tok.kind} tokenizer")
        return tok.extended(separated(texts, tok.normalize)) if options.extend_vocab else tok
    form = options.normalize
    if kind == "char":
        tok = tokenizer.CharTokenizer.train(separated(texts, form))
    elif kind == "bpe":
        pieces = (tokenizer.normalized(p.text, form) for split, _, p in texts if split == "train")
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
    for _, follows, piece in texts:
        yield tokenizer.normalized("\n" * follows + piece.text, form)


def encode(tok: Tokenizer, texts: Texts, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (split, ids (n,)) for all texts in order.

    End-of-text or a newline separates documents. The ids are the same for any number of workers.
    """

    def encode_batch(batch: list[tuple[str, bool, Piece]]) -> dict[str, np.ndarray]:
        ids = {split: [] for split, _, _ in batch}
        for split, follows, piece in batch:
            if follows and tok.end_of_text is None:
                ids[split].append(tok.encode("\n"))
            elif follows:
                ids[split].append([tok.end_of_text])
            try:
                ids[split].append(tok.encode(piece.text))
            except UnknownCharacters as error:
                where = piece.locate(error.index, tok.normalize)
                raise UserError(
                    f"{where}: the vocabulary has no {error.names}; --extend_vocab adds them"
                ) from None
        return {split: np.concatenate(parts) for split, parts in ids.items()}

    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for batch in batches(texts):
            pending.append(pool.submit(encode_batch, batch))
            if len(pending) > 2 * workers:  # bounds the memory
                yield from pending.popleft().result().items()
        for result in pending:
            yield from result.result().items()


def batches(texts: Texts) -> Iterator[list[tuple[str, bool, Piece]]]:
    """The pieces of the texts in lists of about PIECE_BYTES."""
    batch, size = [], 0
    for split, follows, piece in texts:
        batch.append((split, follows, piece))
        size += piece.n_bytes
        if size >= PIECE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
