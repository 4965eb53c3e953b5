"""Inputs, as a user names them -> files.

A folder or a glob means its text files, sorted by name. A URL is downloaded. Two inputs are part of
Python: `pydocs`, the language reference, and `pystdlib`, the source of the standard library.
"""

import atexit
import glob
import hashlib
import os
import re
import stat
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from data import formats, hub
from data.download import fetch
from data.errors import UserError
from data.hub import HubFile

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


class File(NamedTuple):
    """A file of a corpus."""

    path: Path | None  # None: pydocs
    name: str  # in messages: its path, or the URL that it was downloaded from
    explicit: bool  # an input of its own, not found in a folder or by a glob
    size: int  # in bytes
    version: int | str  # the time of its last change, or what stands for its content
    hub: HubFile | None = None  # if it is downloaded when it is read

    @staticmethod
    def at(path: Path, name: str = "", explicit: bool = False) -> "File":
        """A file on this machine."""
        status = path.stat()
        return File(path, name or str(path), explicit, status.st_size, status.st_mtime_ns)


def find_files(word: str, downloads: Path) -> list[File]:
    """The files of an input; raises UserError if there are none."""
    if not word:
        raise UserError("--input= is empty: give a file, a folder, a glob or a URL")
    if word == "pydocs":
        return [File(None, word, True, 0, "")]
    if word == "pystdlib":
        return [File.at(path) for path in _standard_library()]
    if word.lower().startswith(("http://", "https://")):
        return [File.at(_download(word, downloads), word, True)]
    if word.startswith(hub.PREFIX):
        return [
            File(f.folder / f.path, f"{f.repo}/{f.path}", True, f.size, f.commit, f)
            for f in hub.find(word, downloads)
        ]
    if re.match(r"\w+://", word):
        raise UserError(
            f"input {word}: only http://, https:// and {hub.PREFIX} can be read; name the file"
        )
    path = Path(word)
    if word in STANDARD_INPUT or (path.exists() and stat.S_ISFIFO(path.stat().st_mode)):
        return [_spool(word, downloads)]
    if path.is_dir():
        files = sorted(_walk(path), key=Path.as_posix)
    elif path.is_file():
        return [File.at(path, explicit=True)]
    elif path.exists():
        raise UserError(f"input {word} is not a regular file")
    elif glob.has_magic(word):
        files = sorted((p for p in _expand(path) if p.is_file()), key=Path.as_posix)
    else:
        raise UserError(f"input {word}: no such file or folder")
    if not files:
        raise UserError(f"input {word}: no files found")
    return [File.at(path) for path in files]


def drop(files: list[File]) -> None:
    """Remove those that were downloaded from the Hub: they are not needed any more."""
    for file in files:
        if file.hub:
            file.path.unlink(missing_ok=True)


def _spool(word: str, downloads: Path) -> File:
    """Copy standard input or a pipe, which can be read only once, to a file that is removed when
    the process ends."""
    downloads.mkdir(parents=True, exist_ok=True)
    source = sys.stdin.buffer if word in STANDARD_INPUT else open(word, "rb")
    digest, path = hashlib.sha256(), downloads / f"stdin.{uuid.uuid4().hex}"
    atexit.register(path.unlink, missing_ok=True)
    with open(path, "xb") as file:
        while block := source.read(formats.BLOCK_BYTES):
            digest.update(block)
            file.write(block)
    return File.at(path, "standard input", True)._replace(version=digest.hexdigest())


def _expand(pattern: Path) -> Iterator[Path]:
    """The matches of a glob; ** follows no symlinks, and matches hidden names only if asked to.
    Raises UserError if ** is a part of a name, for which Python's versions differ."""
    if any("**" in part and part != "**" for part in pattern.parts):
        raise UserError(f"input {pattern}: ** stands for folders only, as in notes/**/*.md")
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


def language_reference() -> bytes:
    """The topics of Python's help(), one after another."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data; use --input=FILE") from None
    return "\n".join(topics[name].strip("\n") + "\n" for name in sorted(topics)).encode()


def describe(word: str) -> str:
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
