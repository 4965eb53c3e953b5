"""The documents of a data set, each assigned to a split, or divided among both."""

import copy
import itertools
from collections.abc import Iterator

from tqdm import tqdm

from data import bins, formats
from data.documents import Corpus, Document, Piece
from data.errors import UserError
from data.tokenizer import END_OF_TEXT

MANY_DOCUMENTS = 100  # from this many on, whole documents are held out


class Texts:
    """The documents of a data set; look() comes first. `how` has the other fields of Corpus."""

    def __init__(
        self, inputs: tuple[str, ...], val_inputs: tuple[str, ...], val_fraction: float, **how
    ):
        self._val_fraction = val_fraction
        self._corpus, self._val_corpus = (Corpus(i, **how) for i in (inputs, val_inputs))
        self.sources = self._corpus.sources + self._val_corpus.sources
        self.val_files = self._val_corpus.files
        held_out = {file.path and file.path.resolve() for file in self.val_files}
        self._corpus.files = [
            file
            for file in self._corpus.files
            if (file.path and file.path.resolve()) not in held_out
        ]
        if not self._corpus.files:
            raise UserError(f"{', '.join(inputs)}: all of it is in --val_input; name other text")
        self._corpora = [c for c in (self._corpus, self._val_corpus) for _ in c.files]
        self.files = self._corpus.files + self.val_files
        self.cuts: list[int] = []  # where the validation text of a document begins, if few
        self._start_over()

    def look(self, cuts: list[int] | None = None) -> None:
        """Find out whether there are many documents, and where to cut them if not; unless the
        `cuts` of an earlier look are known. Raises UserError if there is no text."""
        if cuts:
            self.cuts = cuts
            return
        n_bytes = 0
        for document in itertools.islice(self._corpus, MANY_DOCUMENTS):
            size = document.size()
            self.cuts.append(document.boundary(int(size * (1 - self._val_fraction))))
            n_bytes += size
        if not n_bytes:
            notes = "".join(f"; {what}: {n}" for what, n in self._corpus.notes.items())
            raise UserError(f"{', '.join(self._corpus.inputs)}: no text found{notes}")

    def sample(self) -> Piece:
        """The first piece of the text."""
        return next(piece for document in self._corpus for piece in document.pieces())

    @property
    def n_bytes(self) -> float:
        """About how long the text is, judged by the sizes of the files."""
        return sum(formats.text_bytes(file.path, file.size) for file in self.files if file.path)

    def pieces(self, start: dict | None = None) -> Iterator[tuple[str, bool, Piece]]:
        """Yield the text in order, as (split, follows, piece), from a position() on.

        `follows`: the piece starts a document that is not the first of its split. The file of the
        position is read again from its beginning, without yielding what is before the position.
        Afterwards `counts` and `notes` are complete.
        """
        start = start or {"file": 0, "pieces": 0, "before": None}
        self._start_over(start["before"])
        done = [0, *itertools.accumulate(file.size for file in self.files)]  # before each file
        with tqdm(
            desc="text",
            total=done[-1] or None,
            initial=done[start["file"]],
            unit="B",
            unit_scale=True,
            delay=1,
            disable=None,
        ) as bar:
            for split, document, begin, end in self._assign(start["file"]):
                count = self.counts[split]
                follows, is_empty = count["documents"] > 0, True
                for piece in document.pieces(begin, end):
                    self._n_pieces += 1
                    self._counted["end_of_text"] += piece.text.count(END_OF_TEXT)
                    count["bytes"] += piece.n_bytes
                    if self._file > start["file"] or self._n_pieces > start["pieces"]:
                        yield split, follows, piece
                    follows = is_empty = False
                    position = done[self._file] + self._corpora[self._file].position
                    bar.update(max(0, position - bar.n))  # validation text may be read later
                count["documents"] += not is_empty

    def position(self) -> dict:
        """The position after the piece that was yielded last, to be stored as JSON."""
        return {
            "file": self._file,
            "pieces": self._n_pieces,  # of that file
            "before": self._before,  # what had been counted before that file
            "bytes": sum(count["bytes"] for count in self.counts.values()),
        }

    def _assign(self, n_done: int) -> Iterator[tuple[str, Document, int, int | None]]:
        """Yield (split, document, begin, end) in the order of the inputs, after n_done files."""
        for i in range(n_done, len(self.files)):
            self._file, self._n_pieces, self._before = i, 0, self._state()
            corpus = self._corpora[i]
            for document in corpus.read(self.files[i]):
                number, digests = self._counted["documents"], self._counted["digests"]
                self._counted["documents"] += 1
                if self.val_files:
                    yield "train" if corpus is self._corpus else "val", document, 0, None
                elif len(self.cuts) >= MANY_DOCUMENTS:
                    digest = document.digest()[:8]
                    if len(digests) < 2 and digest.hex() not in digests:
                        digests.append(digest.hex())
                    u = int.from_bytes(digest, "big") / 2**64
                    yield "val" if u < self._val_fraction else "train", document, 0, None
                else:
                    cut = self.cuts[number]
                    yield "train", document, 0, cut
                    yield "val", document, cut, None

    def _state(self) -> dict:
        """What was counted so far, to be stored as JSON."""
        notes = [dict(self._corpus.notes), dict(self._val_corpus.notes)]
        return copy.deepcopy(self._counted) | {"notes": notes}

    def _start_over(self, state: dict | None = None) -> None:
        """Count on from a _state()."""
        self._counted = copy.deepcopy(state) or {
            "splits": {split: {"documents": 0, "bytes": 0} for split in bins.SPLITS},
            "documents": 0,
            "digests": [],  # of two different documents
            "end_of_text": 0,
        }
        notes = self._counted.pop("notes", ({}, {}))
        for corpus, found in zip((self._corpus, self._val_corpus), notes, strict=True):
            corpus.forget(found)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """The numbers of documents and bytes of each split."""
        return self._counted["splits"]

    @property
    def has_fields(self) -> bool:
        return self._corpus.has_fields or self._val_corpus.has_fields

    @property
    def notes(self) -> dict[str, int]:
        """What was noticed in the text, and how often."""
        notes = self._corpus.notes + self._val_corpus.notes
        if n_end_of_text := self._counted["end_of_text"]:
            advice = f"--separator='{END_OF_TEXT}' makes it the end of a document"
            notes[f"{END_OF_TEXT} is in the text, as text; {advice}"] = n_end_of_text
        return {what: count for what, count in notes.items() if count}

    def check(self) -> None:
        """Raise UserError if a split got no text."""
        for split, count in self.counts.items():
            if not count["documents"]:
                n_bytes = sum(count["bytes"] for count in self.counts.values())
                if len(self._counted["digests"]) == 1:
                    raise UserError(
                        f"{', '.join(self.sources)}: all documents are the same, so that all are "
                        "in one split; remove the copies, or use --val_input"
                    )
                if len(self.cuts) >= MANY_DOCUMENTS:
                    raise UserError(
                        f"{', '.join(self.sources)}: no document was assigned to the {split} split "
                        f"with --val_fraction={self._val_fraction}; use another, or --val_input"
                    )
                raise UserError(
                    f"{', '.join(self.sources)}: the text is too short ({n_bytes:,} bytes), "
                    f"the {split} split is empty"
                )
