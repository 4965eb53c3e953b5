"""Reads documents from files.

A plain file is one document, or with a separator each of its parts is. Each line of JSON lines
(.jsonl, .ndjson) is one, and so is each row of a Parquet file. Files may be compressed (.gz, .bz2,
.xz).
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data import formats
from data.errors import UserError
from data.files import File, describe, find_files, language_reference

PIECE_BYTES = 1 << 18  # text that is encoded at a time: enough to be worth a thread's while
TAIL_BYTES = 1 << 12  # end of a piece that is searched for a good place to end it
CONTINUATIONS = [bytes([i]) for i in range(0x80, 0xC0)]  # of a character in UTF-8
CONTEXT_BYTES = 1 << 8  # before an offset, in which the start of its character is


@dataclass
class Document:
    """UTF-8 text that can be read again and again, in blocks; blocks(begin) starts at an offset."""

    source: str
    blocks: Callable[..., Iterator[bytes]]

    @staticmethod
    def of(data: bytes, source: str) -> "Document":
        """A document in memory."""
        return Document(source, lambda begin=0: iter((data[begin:],)))

    def size(self) -> int:
        """Its length in bytes, for which all of it is read."""
        return sum(map(len, self.blocks()))

    def digest(self) -> bytes:
        """The SHA-256 of its text."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.digest()

    def boundary(self, offset: int) -> int:
        """`offset`, moved back to the start of a character."""
        n_before = min(offset, CONTEXT_BYTES)
        window = b"".join(_until(n_before + 4, self.blocks(offset - n_before)))
        return offset - n_before + character_start(window, n_before)

    def pieces(self, begin: int = 0, end: int | None = None) -> "Iterator[Piece]":
        """Yield the text between two boundaries in pieces of at most PIECE_BYTES.

        A piece ends before whitespace, where GPT-2's tokenizer ends a token anyway, unless a word
        is longer than TAIL_BYTES.
        """
        data, offset = bytearray(), begin
        length = None if end is None else end - begin
        for block in itertools.chain(_until(length, self.blocks(begin)), (b"",)):
            data += block
            start = 0
            while start < len(data) and (len(data) - start > PIECE_BYTES or not block):
                stop = _piece_end(data, start)
                yield Piece(data[start:stop].decode(), stop - start, self, offset)
                offset, start = offset + stop - start, stop
            del data[:start]


class Piece(NamedTuple):
    """A part of a document that is encoded on its own."""

    text: str
    n_bytes: int
    document: Document
    offset: int  # in the document, in bytes

    def locate(self, index: int, form: str = "") -> str:
        """File, character and line of a character, for messages. `index` is its place in the text
        as normalized to a Unicode form."""
        if form:  # its place in the original
            index = bisect.bisect_left(
                range(len(self.text)),
                index + 1,
                key=lambda i: len(unicodedata.normalize(form, self.text[: i + 1])),
            )
        n_chars, n_lines = index + 1, self.text.count("\n", 0, index) + 1
        for block in _until(self.offset, self.document.blocks()):
            n_chars += len(block) - sum(map(block.count, CONTINUATIONS))
            n_lines += block.count(b"\n")
        return f"{self.document.source}, character {n_chars:,} (line {n_lines:,})"


def _until(length: int | None, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The first bytes of a stream of blocks; None: all."""
    for block in blocks:
        if length is None:
            yield block
        elif length > 0:
            yield block[:length]
            length -= len(block)
        else:
            return


def split_blocks(blocks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """The parts, between separators, of a text that comes in blocks. Each block is searched once,
    so that the time is linear in the length of a part."""
    part, rest = [], b""  # of a part that has not ended: what was searched, and the last few bytes
    for block in blocks:
        first, *others = (rest + block).split(separator)
        for other in others:
            yield b"".join((*part, first))
            part, first = [], other
        end = max(0, len(first) - len(separator) + 1)
        part.append(first[:end])
        rest = first[end:]  # a separator may begin in it
    yield b"".join((*part, rest))


def character_start(data: bytes, offset: int) -> int:
    """`offset`, moved back so that no characters are separated which Unicode would compose."""
    for start in range(offset, max(-1, offset - CONTEXT_BYTES), -1):
        if 0 < start < len(data):
            if data[start] & 0xC0 == 0x80:
                continue
            before = data[max(0, start - 16) : start].decode(errors="ignore")
            after = data[start : start + 4].decode(errors="ignore")[:1]
            if after > "\x7f" and not _normalize_apart(before, after):
                continue
        return start
    while 0 < offset < len(data) and data[offset] & 0xC0 == 0x80:  # at least no half of one
        offset -= 1
    return offset


def _normalize_apart(before: str, after: str) -> bool:
    """Whether two texts can be normalized separately, with the same result."""
    if unicodedata.combining(after):
        return False
    whole = unicodedata.normalize("NFKC", before + after)
    return whole == unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", after)


def _piece_end(data: bytes, start: int) -> int:
    """Where the piece that starts at `start` ends."""
    if start + PIECE_BYTES >= len(data):
        return len(data)
    end = character_start(data, start + PIECE_BYTES)
    if end <= start:  # nothing but combining marks
        end = start + PIECE_BYTES
        while data[end] & 0xC0 == 0x80:
            end -= 1
    tail = data[max(start, end - TAIL_BYTES) : end].decode(errors="surrogateescape")
    if breaks := [match.start() for match in re.finditer(r"(?<=\S)[ \n]", tail)]:
        return end - len(tail[breaks[-1] :].encode(errors="surrogateescape"))
    return end


@dataclass
class Corpus:
    """The documents of some inputs; each iteration reads them again, in the same order.

    `notes` says what was noticed in the last iteration, as {what: how often}.
    """

    inputs: tuple[str, ...]
    downloads: Path  # where URLs and standard input are stored
    field: str = "text"  # of JSON lines; a.b is b in a
    separator: str = ""  # between the documents of a plain file
    encoding: str = ""  # of plain files; empty: by the byte-order mark, or UTF-8
    errors: str = "strict"  # or replace: what cannot be decoded becomes U+FFFD
    skip_bad_lines: bool = False  # of JSON lines
    notes: Counter = dataclasses.field(default_factory=Counter)

    def __post_init__(self):
        """Find the files; raises UserError for an input that does not exist or is empty, for an
        unknown encoding, and for a separator that is not UTF-8."""
        try:
            b"a".decode(self.encoding or "utf-8", "ignore")
        except (LookupError, UnicodeError):
            raise UserError(f"--encoding={self.encoding} is unknown to Python") from None
        try:
            self._separator = self.separator.encode()
        except UnicodeEncodeError:
            raise UserError(f"--separator={self.separator} is not UTF-8") from None
        self._counted = set()  # the files whose notes are in `notes`
        self._checked = {}  # files whose bytes are their text, with their notes
        self.position = 0.0  # how many bytes of its file have been read
        self.sources = [describe(word) for word in self.inputs]
        self.files = [found for word in self.inputs for found in find_files(word, self.downloads)]

    @property
    def has_fields(self) -> bool:
        """Whether a file has JSON lines, judged by their names, or is a Parquet file."""
        for file in self.files:
            if file.path is None:
                continue
            # a .json file of the Hub may have lines, or may not: it is not there yet
            head = b"{}" if file.hub else formats.read_head(file.path, file.name)
            is_parquet = head.startswith(formats.PARQUET) or file.path.suffix == ".parquet"
            if is_parquet or formats.is_json_lines(file.path, head):
                return True
        return False

    def __iter__(self) -> Iterator[Document]:
        self.forget()
        for file in self.files:
            yield from self.read(file)

    def forget(self, notes: dict[str, int] | None = None) -> None:
        """Reset the notes before a new iteration, to `notes` or to none."""
        self.notes = Counter(notes)
        self._counted.clear()

    def read(self, file: File) -> Iterator[Document]:
        """The documents of one of the files."""
        if file.path is None:
            yield Document.of(language_reference(), file.name)
            return
        if file.hub:
            file.hub.fetch()
        path, head = file.path, formats.read_head(file.path, file.name)
        if not head and file.explicit:
            raise UserError(f"{file.name} is empty")
        if problem := formats.other_format(path, head):
            if file.explicit:
                raise UserError(f"{file.name} is {problem}")
            self.notes[f"files left out: {problem.split(':')[0]} (such as {path.name})"] += 1
        elif head.startswith(formats.PARQUET):
            yield from self._texts(self._rows(file))
        elif formats.is_json_lines(path, head):
            yield from self._texts(self._objects(file))
        elif formats.is_binary(head, self.encoding) and not (
            file.explicit and self.errors == "replace"
        ):
            if file.explicit:
                order = "be" if head.startswith(b"\0") else "le"
                raise UserError(
                    f"{file.name} is not text: it contains zero bytes (if it is UTF-16: "
                    f"--encoding=utf-16-{order})"
                )
            self.notes["binary files left out"] += 1
        elif head:
            yield from self._read_plain(file)

    def _blocks(self, file: File, begin: int = 0) -> Iterator[bytes]:
        """Yield a file as UTF-8, starting at offset `begin` of the UTF-8 text. Notes are counted
        once, when the file has been read to its end."""
        if file in self._checked:  # no need to decode it again
            counts = self._checked[file]
            if isinstance(file.version, int) and File.at(file.path).version != file.version:
                raise UserError(f"{file.name} was changed while it was read")
            try:
                with open(file.path, "rb") as stream:
                    stream.seek(begin)
                    while block := stream.read(formats.BLOCK_BYTES):
                        self.position = stream.tell()
                        yield block
            except OSError as error:
                raise formats.broken_file(file.name, error) from None
        else:
            counts, n_bytes, how = Counter(), 0, (self.encoding, self.errors)
            for block, self.position in formats.utf8_blocks(file.path, file.name, *how, counts):
                counts["lines that end in CRLF"] += block.count(b"\r\n")
                n_bytes += len(block)
                if n_bytes > begin:
                    yield block[max(0, begin - n_bytes + len(block)) :]
            unchanged = counts.total() == counts["lines that end in CRLF"]
            if unchanged and formats.is_stored_as_utf8(file.path, self.encoding):
                self._checked[file] = counts
        if file not in self._counted:
            self._counted.add(file)
            self.notes.update(counts)

    def _read_plain(self, file: File) -> Iterator[Document]:
        if not self._separator:
            yield Document(file.name, lambda begin=0: self._blocks(file, begin))
            return
        for number, part in enumerate(split_blocks(self._blocks(file), self._separator), 1):
            if part := part.strip(b"\r\n"):
                yield Document.of(part, f"{file.name}, document {number}")

    def _texts(self, records: Iterator[tuple[str, Callable[[], dict]]]) -> Iterator[Document]:
        """The text of each record, which is given with its source, and unread."""
        for source, read in records:
            try:
                if text := _text_of(read(), source, self.field):
                    yield Document.of(text, source)
            except UserError as error:
                if not self.skip_bad_lines:
                    raise UserError(f"{error}; --skip_bad_lines leaves such lines out") from None
                self.notes["bad lines left out"] += 1

    def _rows(self, file: File) -> Iterator[tuple[str, Callable[[], dict]]]:
        rows = formats.parquet_rows(file.path, file.name, self.field)
        for number, (row, self.position) in enumerate(rows, 1):
            source = f"{file.name}, row {number}"
            yield source, functools.partial(_row, row, source)

    def _objects(self, file: File) -> Iterator[tuple[str, Callable[[], dict]]]:
        for source, line in self._lines(file):
            yield source, functools.partial(_record, line, source)

    def _lines(self, file: File) -> Iterator[tuple[str, bytes]]:
        """Yield (source, line) for each line that is not empty."""
        for number, line in enumerate(split_blocks(self._blocks(file), b"\n"), 1):
            if line.strip():
                yield f"{file.name}, line {number}", line

    def records(self) -> Iterator[tuple[str, dict]]:
        """Yield (source, JSON object) for each line of the files, whatever their names."""
        for file in self.files:
            for source, line in self._lines(file):
                yield source, _record(line, source)


def _record(line: bytes, source: str) -> dict:
    """A line's JSON object; raises UserError if it is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from None
    if type(record) is not dict:
        raise UserError(f"{source}: not a JSON object")
    return record


def _row(batch: Any, source: str) -> dict:
    """Convert a row of a Parquet file to a dict; raises UserError if its text is not UTF-8."""
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8: {error.reason}") from None


def _text_of(record: dict, source: str, field: str) -> bytes:
    """Return the text in a field of a record; of a list of messages "role: content" lines."""
    text = record
    for name in (field,) if field in record else field.split("."):
        if type(text) is not dict or name not in text:
            names = ", ".join(map(repr, text if type(text) is dict else record)) or "none"
            raise UserError(f"{source}: no field {field!r} (--field); its fields: {names}")
        text = text[name]
    if type(text) is list and text and all(_is_message(item) for item in text):
        text = "\n".join(f"{item['role']}: {item['content']}" for item in text)
    if type(text) is not str:
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise UserError(f"{source}: field {field!r} is {kind}, not text")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: not Unicode: the text has a lone surrogate") from None


def _is_message(item: object) -> bool:
    return type(item) is dict and all(type(item.get(key)) is str for key in ("role", "content"))
