"""Reads documents from files, folders, globs, URLs and JSON lines.

A plain file is one document, and so is each line of JSON lines (.jsonl, .ndjson). Both may be .gz.
A folder or a glob means its text files, sorted by name. Two inputs are part of Python: `pydocs`,
the language reference, and `pystdlib`, the source of the standard library.
"""

import codecs
import glob
import gzip
import hashlib
import json
import os
import re
import sys
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

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
JSON_LINES = (".jsonl", ".ndjson")
SNIFF_BYTES = 1 << 13  # a zero byte in the first ones means a binary file, as in git
PIECE_BYTES = 1 << 18  # text that is encoded at a time: enough to be worth a thread's while
TAIL_BYTES = 1 << 12  # end of a piece that is searched for a good place to end it


class Document(NamedTuple):
    data: bytes  # UTF-8, not validated yet
    source: str  # a file, or a line of it
    offset: int = 0  # of the data in the source, in bytes

    def cut(self, start: int, end: int) -> "Document":
        """The part between two byte offsets, each moved back to the start of a character."""
        start, end = (_character_start(self.data, offset) for offset in (start, end))
        return Document(self.data[start:end], self.source, self.offset + start)

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of at most PIECE_BYTES.

        A piece ends before whitespace, where GPT-2's tokenizer ends a token anyway, unless a word
        is longer than TAIL_BYTES. Raises UserError if the bytes are not UTF-8.
        """
        start = 0
        while start < len(self.data):
            end = _piece_end(self.data, start)
            try:
                yield self.data[start:end].decode()
            except UnicodeDecodeError as error:
                bad = start + error.start
                raise UserError(
                    f"{self.source} is not UTF-8: byte 0x{self.data[bad]:02x} at offset "
                    f"{self.offset + bad:,}"
                ) from None
            start = end


class Corpus:
    """The documents of some inputs; each iteration reads them again, in the same order."""

    def __init__(self, inputs: tuple[str, ...], field: str, downloads: Path):
        """Find the files; raises UserError for an input that does not exist or is empty."""
        self.field = field
        self.sources = [_describe(word) for word in inputs]
        self.files = [found for word in inputs for found in _find(word, downloads)]
        self.skipped: set[Path] = set()  # binary files in folders and globs

    def __iter__(self) -> Iterator[Document]:
        for path, named in self.files:
            if path is None:
                yield Document(_language_reference(), "pydocs")
            else:
                yield from self._read(path, named)

    def _read(self, path: Path, named: bool) -> Iterator[Document]:
        try:
            with _open(path) as file:
                if b"\0" in file.read(SNIFF_BYTES):
                    if named:
                        raise UserError(
                            f"{path} is not text: it contains zero bytes "
                            "(if it is UTF-16: iconv -f utf-16 -t utf-8)"
                        )
                    self.skipped.add(path)
                    return
                file.seek(0)
                if Path(path.name.lower().removesuffix(".gz")).suffix in JSON_LINES:
                    yield from self._read_lines(path, file)
                elif data := file.read().removeprefix(codecs.BOM_UTF8):
                    yield Document(data, str(path))
                elif named:
                    raise UserError(f"{path} is empty")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a broken .gz file: {error}") from None

    def _read_lines(self, path: Path, file: BinaryIO) -> Iterator[Document]:
        for number, line in enumerate(file, 1):
            source = f"{path}, line {number}"
            if line.strip() and (data := _text_of(line, source, self.field)):
                yield Document(data, source)


def _text_of(line: bytes, source: str, field: str) -> bytes:
    """Return the text in a field of a line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from None
    if type(record) is not dict:
        raise UserError(f"{source}: not a JSON object")
    if type(text := record.get(field)) is not str:
        names = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{source}: no text in field {field!r} (--field); its fields: {names}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: not Unicode: the text has a lone surrogate") from None


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
    path = Path(word)
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


def _expand(pattern: Path) -> Iterator[Path]:
    """The matches of a glob; ** follows no symlinks, and matches hidden names only if asked to."""
    root = Path(pattern.anchor)
    hidden = any(part.startswith(".") and part.strip(".") for part in pattern.parts)
    for path in root.glob(str(pattern.relative_to(root))):
        parts = path.relative_to(root).parts
        if hidden or not any(part.startswith(".") and part.strip(".") for part in parts):
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, without hidden ones; raises OSError if one cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
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


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _character_start(data: bytes, offset: int) -> int:
    """The start of the character at `offset`; combining marks belong to their base character."""
    for start in range(offset, max(-1, offset - 64), -1):
        if 0 < start < len(data):
            character = data[start : start + 4].decode(errors="ignore")[:1]
            inside = data[start] & 0xC0 == 0x80
            if inside or (character and unicodedata.combining(character)):
                continue
        return start
    return _byte_boundary(data, offset)


def _byte_boundary(data: bytes, offset: int) -> int:
    """The start of the UTF-8 sequence at `offset`."""
    while data[offset] & 0xC0 == 0x80:
        offset -= 1
    return offset


def _piece_end(data: bytes, start: int) -> int:
    """Where the piece that starts at `start` ends."""
    if start + PIECE_BYTES >= len(data):
        return len(data)
    end = _character_start(data, start + PIECE_BYTES)
    if end <= start:  # nothing but combining marks
        end = _byte_boundary(data, start + PIECE_BYTES)
    tail = data[max(start, end - TAIL_BYTES) : end].decode(errors="surrogateescape")
    if breaks := [match.start() for match in re.finditer(r"(?<=\S)[ \n]", tail)]:
        return end - len(tail[breaks[-1] :].encode(errors="surrogateescape"))
    return end
