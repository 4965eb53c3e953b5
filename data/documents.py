"""Reads documents from files, folders, globs, URLs and JSON lines.

A plain file is one document, or with a separator each of its parts is. Each line of JSON lines
(.jsonl, .ndjson) is one. Files may be compressed (.gz, .bz2, .xz). A folder or a glob means its
text files, sorted by name. Two inputs are part of Python: `pydocs`, the language reference, and
`pystdlib`, the source of the standard library.
"""

import bisect
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import re
import stat
import sys
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from data import formats
from data.download import fetch
from data.errors import UserError

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
KNOWN = {  # downloads whose digest is pinned
    SHAKESPEARE: {
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "size": 1_115_394,
    }
}
PART_OF_PYTHON = ("pydocs", "pystdlib")
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0")
PIECE_BYTES = 1 << 18  # text that is encoded at a time: enough to be worth a thread's while
TAIL_BYTES = 1 << 12  # end of a piece that is searched for a good place to end it
CONTINUATIONS = [bytes([i]) for i in range(0x80, 0xC0)]  # of a character in UTF-8
CONTEXT_BYTES = 1 << 8  # before an offset, in which the start of its character is


@dataclass
class Document:
    """UTF-8 text that can be read again and again, in blocks that end between characters."""

    source: str
    blocks: Callable[[], Iterator[bytes]]

    @staticmethod
    def of(data: bytes, source: str) -> "Document":
        """A document in memory."""
        return Document(source, lambda: iter((data,)))

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
        window = b"".join(_between(self.blocks(), offset - n_before, offset + 4))
        return offset - n_before + character_start(window, n_before)

    def pieces(self, begin: int = 0, end: int | None = None) -> "Iterator[Piece]":
        """Yield the text between two boundaries in pieces of at most PIECE_BYTES.

        A piece ends before whitespace, where GPT-2's tokenizer ends a token anyway, unless a word
        is longer than TAIL_BYTES.
        """
        data, offset = bytearray(), begin
        for block in itertools.chain(_between(self.blocks(), begin, end), (b"",)):
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
        for block in _between(self.document.blocks(), 0, self.offset):
            n_chars += len(block) - sum(map(block.count, CONTINUATIONS))
            n_lines += block.count(b"\n")
        return f"{self.document.source}, character {n_chars:,} (line {n_lines:,})"


def _between(blocks: Iterator[bytes], begin: int, end: int | None) -> Iterator[bytes]:
    """The bytes from `begin` to `end` of a stream of blocks."""
    position = 0
    for block in blocks:
        if end is not None and position >= end:
            return
        yield block[max(0, begin - position) : None if end is None else end - position]
        position += len(block)


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


class File(NamedTuple):
    """A file of a corpus."""

    path: Path | None  # None: pydocs
    name: str  # in messages: its path, or the URL that it was downloaded from
    explicit: bool  # an input of its own, not found in a folder or by a glob


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
        """Find the files; raises UserError for an input that does not exist or is empty."""
        self._counted = set()  # the files whose notes are in `notes`
        self.sources = [_describe(word) for word in self.inputs]
        self.files = [found for word in self.inputs for found in find_files(word, self.downloads)]

    @property
    def has_json_lines(self) -> bool:
        """Whether a file has JSON lines, judged by their names."""
        files = [file for file in self.files if file.path]
        return any(formats.is_json_lines(f.path, formats.read_head(f.path, f.name)) for f in files)

    def __iter__(self) -> Iterator[Document]:
        self.notes.clear()
        self._counted.clear()
        for file in self.files:
            if file.path is None:
                yield Document.of(_language_reference(), file.name)
            else:
                yield from self._read(file)

    def _read(self, file: File) -> Iterator[Document]:
        path, head = file.path, formats.read_head(file.path, file.name)
        if not head and file.explicit:
            raise UserError(f"{file.name} is empty")
        if problem := formats.other_format(path, head):
            if file.explicit:
                raise UserError(f"{file.name} is {problem}")
            self.notes[f"files left out: {problem.split(':')[0]} (such as {path.name})"] += 1
        elif formats.is_json_lines(path, head):
            yield from self._read_json_lines(file)
        elif self._is_binary(head) and not (file.explicit and self.errors == "replace"):
            if file.explicit:
                order = "be" if head.startswith(b"\0") else "le"
                raise UserError(
                    f"{file.name} is not text: it contains zero bytes (if it is UTF-16: "
                    f"--encoding=utf-16-{order})"
                )
            self.notes["binary files left out"] += 1
        elif head:
            yield from self._read_plain(file)

    def _is_binary(self, head: bytes) -> bool:
        try:
            return formats.is_binary(head, self.encoding)
        except LookupError:
            raise UserError(f"--encoding={self.encoding} is unknown to Python") from None

    def _blocks(self, file: File) -> Iterator[bytes]:
        """A file as UTF-8. What is noticed counts once, when the file was read to its end."""
        counts = Counter()
        for block in formats.utf8_blocks(file.path, file.name, self.encoding, self.errors, counts):
            counts["lines that end in CRLF"] += block.count(b"\r\n")
            yield block
        if file not in self._counted:
            self._counted.add(file)
            self.notes.update(counts)

    def _read_plain(self, file: File) -> Iterator[Document]:
        if not self.separator:
            yield Document(file.name, lambda: self._blocks(file))
            return
        separator, data, number = self.separator.encode(), b"", 0
        for block in itertools.chain(self._blocks(file), (None,)):
            *parts, data = (data + (block or b"")).split(separator)
            if block is None:
                parts.append(data)
            for part in parts:
                number += 1
                if part := part.strip(b"\r\n"):
                    yield Document.of(part, f"{file.name}, document {number}")

    def _read_json_lines(self, file: File) -> Iterator[Document]:
        for source, line in self._lines(file):
            try:
                if text := _text_of(_record(line, source), source, self.field):
                    yield Document.of(text, source)
            except UserError as error:
                if not self.skip_bad_lines:
                    raise UserError(f"{error}; --skip_bad_lines leaves such lines out") from None
                self.notes["bad lines left out"] += 1

    def _lines(self, file: File) -> Iterator[tuple[str, bytes]]:
        """Yield (source, line) for each line that is not empty."""
        number, data = 0, b""
        for block in itertools.chain(self._blocks(file), (None,)):
            *lines, data = (data + (block or b"")).split(b"\n")
            if block is None:
                lines.append(data)
            for line in lines:
                number += 1
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


# ---- inputs -> files ----------------------------------------------------------------------------


def find_files(word: str, downloads: Path) -> list[File]:
    """The files of an input; raises UserError if there are none."""
    if not word:
        raise UserError("--input= is empty: give a file, a folder, a glob or a URL")
    if word == "pydocs":
        return [File(None, word, True)]
    if word == "pystdlib":
        return [File(path, str(path), False) for path in _standard_library()]
    if word.lower().startswith(("http://", "https://")):
        return [File(_download(word, downloads), word, True)]
    if re.match(r"\w+://", word):
        raise UserError(f"input {word}: only http:// and https:// URLs can be read; name the file")
    path = Path(word)
    if word in STANDARD_INPUT or (path.exists() and stat.S_ISFIFO(path.stat().st_mode)):
        return [File(_spool(word, downloads), "standard input", True)]
    if path.is_dir():
        files = sorted(_walk(path), key=Path.as_posix)
    elif path.is_file():
        return [File(path, str(path), True)]
    elif path.exists():
        raise UserError(f"input {word} is not a regular file")
    elif glob.has_magic(word):
        files = sorted((p for p in _expand(path) if p.is_file()), key=Path.as_posix)
    else:
        raise UserError(f"input {word}: no such file or folder")
    if not files:
        raise UserError(f"input {word}: no files found")
    return [File(path, str(path), False) for path in files]


def _spool(word: str, downloads: Path) -> Path:
    """Copy what can be read only once into a file."""
    downloads.mkdir(parents=True, exist_ok=True)
    source = sys.stdin.buffer if word in STANDARD_INPUT else open(word, "rb")
    digest, path = hashlib.sha256(), downloads / f"stdin.{os.getpid()}"
    with open(path, "wb") as file:
        while block := source.read(formats.BLOCK_BYTES):
            digest.update(block)
            file.write(block)
    final = downloads / digest.hexdigest()[:16] / "stdin"
    final.parent.mkdir(exist_ok=True)
    os.replace(path, final)
    return final


def _expand(pattern: Path) -> Iterator[Path]:
    """The matches of a glob; ** follows no symlinks, and matches hidden names only if asked to."""
    root = Path(pattern.anchor)
    hidden = any(part.startswith(".") and part.strip(".") for part in pattern.parts)
    for path in root.glob(str(pattern.relative_to(root))):
        parts = path.relative_to(root).parts
        if hidden or not any(part.startswith(".") and part.strip(".") for part in parts):
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, without hidden ones.

    Linked folders are entered, but each folder once, and none that `folder` is in. Raises OSError
    if a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    root = Path(os.path.realpath(folder))
    entered = {root, *root.parents}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        for name in sorted(folders):
            real = Path(os.path.realpath(Path(parent, name)))
            if name.startswith(".") or real in entered:
                folders.remove(name)
            entered.add(real)
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _standard_library() -> list[Path]:
    """The source files of Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (path for path in _walk(root) if path.suffix == ".py")
    return sorted(path for path in files if not excluded & set(path.relative_to(root).parts))


def _language_reference() -> bytes:
    """The topics of Python's help(), one after another."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data; use --input=FILE") from None
    return "\n".join(topics[name].strip("\n") + "\n" for name in sorted(topics)).encode()


def _describe(word: str) -> str:
    if word in PART_OF_PYTHON:
        return f"{word} of Python {sys.version.split()[0]}"
    return word.encode(errors="backslashreplace").decode()


def _download(url: str, downloads: Path) -> Path:
    try:
        name = Path(urlsplit(url).path).name or "index"
    except ValueError as error:
        raise UserError(f"input {url} is not a valid URL: {error}") from None
    path = downloads / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if path.exists():
        print(f"using the earlier download of {url}; to download it again, delete {path}")
        return path
    new = [folder for folder in (path.parent, downloads, downloads.parent) if not folder.exists()]
    try:
        return fetch(url, path, **KNOWN.get(url, {}))
    except UserError:
        with suppress(OSError):  # not empty if a partial download was kept
            for folder in new:
                folder.rmdir()
        raise
