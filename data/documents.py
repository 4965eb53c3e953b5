"""Files, folders, globs, addresses and JSON lines to documents, one after the other.

A plain file is one document, a line of JSON lines (.jsonl, .ndjson) is one; each may be a .gz. A
folder or a glob stands for the text files in it, in the order of their names. Two inputs are inside
Python itself: `pydocs`, the language reference, and `pystdlib`, the source of its library.
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

from config import UserError
from data.download import fetch

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
KNOWN = {  # what a download must be, where that is known
    SHAKESPEARE: {
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "size": 1_115_394,
    }
}
PYTHONS_OWN = ("pydocs", "pystdlib")
JSON_LINES = (".jsonl", ".ndjson")
SNIFFED = 1 << 13  # bytes in which a NUL tells a binary file; git looks at as many
PIECE = 1 << 18  # bytes: small enough to share out among cores, large enough to be worth it
TAIL = 1 << 12  # bytes at the end of a piece in which a good place to end it is looked for


class Document(NamedTuple):
    data: bytes  # UTF-8, not yet checked
    source: str  # a file, or its line
    offset: int = 0  # where in the source the data begins, in bytes

    def cut(self, start: int, end: int) -> "Document":
        """The part between two bytes, each moved back to where a character begins."""
        start, end = (_character_start(self.data, place) for place in (start, end))
        return Document(self.data[start:end], self.source, self.offset + start)

    def pieces(self) -> Iterator[str]:
        """The text in parts of at most PIECE bytes; together they are the document.

        A part ends before a space or a line end that follows something else, where GPT-2's
        tokenizer ends a token anyway; within a word only where that is KiB long. Raises UserError
        where the bytes are no UTF-8.
        """
        start = 0
        while start < len(self.data):
            end = _piece_end(self.data, start)
            try:
                yield self.data[start:end].decode()
            except UnicodeDecodeError as error:
                place = start + error.start
                raise UserError(
                    f"{self.source} is not UTF-8: byte 0x{self.data[place]:02x} at offset "
                    f"{self.offset + place:,}"
                ) from None
            start = end


class Corpus:
    """The documents that some inputs hold; each iteration reads them again, in the same order."""

    def __init__(self, inputs: tuple[str, ...], field: str, downloads: Path):
        """Find the files; raises UserError for an input that is not there or holds no text."""
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
                if b"\0" in file.read(SNIFFED):
                    if named:
                        raise UserError(
                            f"{path} is not text: it holds zero bytes "
                            "(UTF-16? iconv -f utf-16 -t utf-8 makes it UTF-8)"
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
    """The text in a field of a line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from None
    if type(record) is not dict:
        raise UserError(f"{source}: not a JSON object")
    if type(text := record.get(field)) is not str:
        has = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{source}: no text in the field {field!r} (--field); its fields: {has}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{source}: its text is not Unicode: a lone surrogate") from None


def _find(word: str, downloads: Path) -> list[tuple[Path | None, bool]]:
    """The files that an input means, each with whether it was named itself; None for pydocs."""
    if not word:
        raise UserError("--input= is empty: name a file, a folder, a glob or an address")
    if word == "pydocs":
        return [(None, True)]
    if word == "pystdlib":
        return [(path, False) for path in _standard_library()]
    if word.lower().startswith(("http://", "https://")):
        return [(_download(word, downloads), True)]
    path = Path(word)
    if path.is_dir():
        files = sorted(_walk(path))
    elif path.is_file():
        return [(path, True)]
    elif path.exists():
        raise UserError(f"input {word} is a device, not a text")
    elif glob.has_magic(word):
        files = sorted(p for p in _expand(path) if p.is_file())
    else:
        raise UserError(f"input {word}: no such file or folder")
    if not files:
        raise UserError(f"input {word}: no files there")
    return [(path, False) for path in files]


def _expand(pattern: Path) -> Iterator[Path]:
    """What a glob matches; ** goes into no linked folder, and hidden names must be asked for."""
    root = Path(pattern.anchor)
    hidden = any(part.startswith(".") and part.strip(".") for part in pattern.parts)
    for path in root.glob(str(pattern.relative_to(root))):
        parts = path.relative_to(root).parts
        if hidden or not any(part.startswith(".") and part.strip(".") for part in parts):
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, but for hidden ones; OSError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _standard_library() -> list[Path]:
    """Python's own library in source, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    outside = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (path for path in _walk(root) if path.suffix == ".py")
    return sorted(path for path in files if not outside & set(path.relative_to(root).parts))


def _language_reference() -> bytes:
    """The topics of `help()`, which CPython carries, one after another."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python comes without pydoc_data; use --input=FILE") from None
    return "\n".join(topics[name].strip("\n") + "\n" for name in sorted(topics)).encode()


def _describe(word: str) -> str:
    if word in PYTHONS_OWN:
        return f"{word} of Python {sys.version.split()[0]}"
    return word.encode(errors="backslashreplace").decode()


def _download(url: str, downloads: Path) -> Path:
    try:
        name = Path(urlsplit(url).path).name or "index"
    except ValueError as error:
        raise UserError(f"input {url} is no address: {error}") from None
    path = downloads / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if path.exists():
        print(f"{url} was downloaded before; to fetch it again delete {path}")
        return path
    new = [folder for folder in (path.parent, downloads, downloads.parent) if not folder.exists()]
    try:
        return fetch(url, path, **KNOWN.get(url, {}))
    except UserError as error:
        with suppress(OSError):  # where nothing of it has arrived
            for folder in new:
                folder.rmdir()
        raise UserError(
            f"{error}; with the file at hand call prepare.py with --input=FILE; "
            "without any download: python prepare.py pydocs"
        ) from None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _character_start(data: bytes, place: int) -> int:
    """`place`, or before it where the character there, with its combining marks, begins."""
    for earlier in range(place, max(-1, place - 64), -1):
        if 0 < earlier < len(data):
            character = data[earlier : earlier + 4].decode(errors="ignore")[:1]
            inside = data[earlier] & 0xC0 == 0x80
            if inside or (character and unicodedata.combining(character)):
                continue
        return earlier
    return place


def _piece_end(data: bytes, start: int) -> int:
    if start + PIECE >= len(data):
        return len(data)
    if (end := _character_start(data, start + PIECE)) <= start:  # nothing but combining marks
        end = start + PIECE
        while data[end] & 0xC0 == 0x80:
            end -= 1
    tail = data[max(start, end - TAIL) : end].decode(errors="surrogateescape")
    if breaks := [match.start() for match in re.finditer(r"(?<=\S)[ \n]", tail)]:
        return end - len(tail[breaks[-1] :].encode(errors="surrogateescape"))
    return end
