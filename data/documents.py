"""Reads documents from files, folders, globs, URLs and JSON lines.

A plain file is one document, or with a separator each of its parts is. Each line of JSON lines
(.jsonl, .ndjson) is one. Files may be compressed (.gz, .bz2, .xz). A folder or a glob means its
text files, sorted by name. Two inputs are part of Python: `pydocs`, the language reference, and
`pystdlib`, the source of the standard library.
"""

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
CONTEXT_BYTES = 1 << 8  # before an offset, in which the start of its character is


class Piece(NamedTuple):
    """A part of a document that is encoded on its own."""

    text: str
    n_bytes: int
    source: str  # a file, or a line of it
    n_chars_before: int  # in the document
    n_lines_before: int

    def locate(self, index: int) -> str:
        """Where a character of the text is."""
        line = self.n_lines_before + self.text.count("\n", 0, index) + 1
        return f"{self.source}, character {self.n_chars_before + index + 1:,} (line {line:,})"


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
        """Its bytes."""
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

    def pieces(self, begin: int = 0, end: int | None = None) -> Iterator[Piece]:
        """Yield the text between two boundaries in pieces of at most PIECE_BYTES.

        A piece ends before whitespace, where GPT-2's tokenizer ends a token anyway, unless a word
        is longer than TAIL_BYTES.
        """
        data, n_chars, n_lines = bytearray(), 0, 0
        for block in itertools.chain(_between(self.blocks(), begin, end), (b"",)):
            data += block
            start = 0
            while start < len(data) and (len(data) - start > PIECE_BYTES or not block):
                stop = _piece_end(data, start)
                text = data[start:stop].decode()
                yield Piece(text, stop - start, self.source, n_chars, n_lines)
                n_chars, n_lines, start = n_chars + len(text), n_lines + text.count("\n"), stop
            del data[:start]


def _between(blocks: Iterator[bytes], begin: int, end: int | None) -> Iterator[bytes]:
    """The bytes from `begin` to `end` of a stream of blocks."""
    position = 0
    for block in blocks:
        if end is not None and position >= end:
            return
        yield block[max(0, begin - position) : None if end is None else end - position]
        position += len(block)


def character_start(data: bytes, offset: int) -> int:
    """The start of the character at `offset`, with all that Unicode may compose it with."""
    for start in range(offset, max(-1, offset - CONTEXT_BYTES), -1):
        if 0 < start < len(data):
            if data[start] & 0xC0 == 0x80:
                continue
            before = data[max(0, start - 16) : start].decode(errors="ignore")
            after = data[start : start + 4].decode(errors="ignore")[:1]
            if after > "\x7f" and not _apart(before, after):
                continue
        return start
    while 0 < offset < len(data) and data[offset] & 0xC0 == 0x80:  # at least no half of one
        offset -= 1
    return offset


def _apart(before: str, after: str) -> bool:
    """Whether normalizing two texts on their own is normalizing both together."""
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
        """Find the files; raises UserError for an input that does not exist or is empty."""
        self.sources = [_describe(word) for word in self.inputs]
        self.files = [found for word in self.inputs for found in _find(word, self.downloads)]

    @property
    def has_json_lines(self) -> bool:
        """Whether a file has JSON lines, judged by their names."""
        paths = [path for path, _ in self.files if path]
        return any(formats.is_json_lines(path, formats.read_head(path)) for path in paths)

    def __iter__(self) -> Iterator[Document]:
        self.notes.clear()
        for path, named in self.files:
            if path is None:
                yield Document.of(_language_reference(), "pydocs")
            else:
                yield from self._read(path, named)

    def _read(self, path: Path, named: bool) -> Iterator[Document]:
        head = formats.read_head(path)
        if not head and named:
            raise UserError(f"{path} is empty")
        if problem := formats.other_format(path, head):
            if named:
                raise UserError(f"{path} is {problem}")
            self.notes[f"files left out: {problem.split(':')[0]} ({path.name}, say)"] += 1
        elif formats.is_json_lines(path, head):
            yield from self._read_json_lines(path)
        elif not self.encoding and formats.is_binary(head) and self.errors == "strict":
            if named:
                raise UserError(
                    f"{path} is not text: it contains zero bytes (if it is UTF-16: "
                    "--encoding=utf-16-le)"
                )
            self.notes["binary files left out"] += 1
        elif head:
            yield from self._read_plain(path)

    def _blocks(self, path: Path, first: bool = False) -> Iterator[bytes]:
        """A file as UTF-8; what is noticed is counted when it is read for the first time."""
        counts = self.notes if first else Counter()
        for block in formats.utf8_blocks(path, self.encoding, self.errors, counts):
            counts["lines that end in CRLF"] += block.count(b"\r\n")
            yield block

    def _read_plain(self, path: Path) -> Iterator[Document]:
        if not self.separator:
            blocks = itertools.chain((True,), itertools.repeat(False))
            yield Document(str(path), lambda: self._blocks(path, next(blocks)))
            return
        separator, data, number = self.separator.encode(), b"", 0
        for block in itertools.chain(self._blocks(path, True), (None,)):
            *parts, data = (data + (block or b"")).split(separator)
            if block is None:
                parts.append(data)
            for part in parts:
                number += 1
                if part := part.strip(b"\r\n"):
                    yield Document.of(part, f"{path}, document {number}")

    def _read_json_lines(self, path: Path) -> Iterator[Document]:
        number, data = 0, b""
        for block in itertools.chain(self._blocks(path, True), (None,)):
            *lines, data = (data + (block or b"")).split(b"\n")
            if block is None:
                lines.append(data)
            for line in lines:
                number += 1
                source = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    if text := _text_of(line, source, self.field):
                        yield Document.of(text, source)
                except UserError as error:
                    if not self.skip_bad_lines:
                        raise UserError(
                            f"{error}; --skip_bad_lines leaves such lines out"
                        ) from None
                    self.notes["bad lines left out"] += 1


def _text_of(line: bytes, source: str, field: str) -> bytes:
    """Return the text in a field of a line of JSON; of a list of messages "role: content" lines."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from None
    if type(record) is not dict:
        raise UserError(f"{source}: not a JSON object")
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


def _find(word: str, downloads: Path) -> list[tuple[Path | None, bool]]:
    """Resolve an input to (path, explicitly named) pairs; the path of pydocs is None."""
    if not word:
        raise UserError("--input= is empty: give a file, a folder, a glob or a URL")
    if word == "pydocs":
        return [(None, True)]
    if word == "pystdlib":
        return [(path, False) for path in _standard_library()]
    if word.lower().startswith(("http://", "https://")):
        return [(_download(word, downloads), True)]
    if re.match(r"\w+://", word):
        raise UserError(f"input {word}: only http:// and https:// URLs can be read; name the file")
    path = Path(word)
    if word in STANDARD_INPUT or (path.exists() and stat.S_ISFIFO(path.stat().st_mode)):
        return [(_spool(word, downloads), True)]
    if path.is_dir():
        files = sorted(_walk(path), key=Path.as_posix)
    elif path.is_file():
        return [(path, True)]
    elif path.exists():
        raise UserError(f"input {word} is not a regular file")
    elif glob.has_magic(word):
        files = sorted((p for p in _expand(path) if p.is_file()), key=Path.as_posix)
    else:
        raise UserError(f"input {word}: no such file or folder")
    if not files:
        raise UserError(f"input {word}: no files found")
    return [(path, False) for path in files]


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
    except UserError as error:
        with suppress(OSError):  # not empty if a partial download was kept
            for folder in new:
                folder.rmdir()
        raise UserError(
            f"{error}; if you have the file: prepare.py with --input=FILE; "
            "without a network: python prepare.py pydocs"
        ) from None
