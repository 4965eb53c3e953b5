"""Writes a data set, whole or not at all, and continues one that was interrupted.

Everything is written to a hidden folder beside the data set, `.NAME.<random>.partial`. It has the
bins, a lock that the process holds, and, once seconds of work are worth keeping, progress.json:
which command it belongs to, and how much of the bins is final. finish() renames the folder.
"""

import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import filelock
import numpy as np

from data.bins import FORMAT, OUR_FILES, SPLITS, dtype_of, free_name, is_foreign, move_aside
from data.errors import UserError

LOCK = "folio.lock"  # held while a data set is written
PROGRESS = "progress.json"
SAVE_SECONDS = 5  # between two records of the progress, which wait for the disk


class Writer:
    """Writes the bins of a data set; an older one of that name is moved aside.

    `progress` is what find_unfinished() returned; the bins are then continued. `keep` is stored
    with the progress. Without finish(), or if its last step fails, the folder stays if there is
    progress to continue from, unless a UserError says that the input is wrong; otherwise it is
    removed.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        keep: dict | None = None,
        progress: dict | None = None,
    ):
        self.folder = _target(folder)
        self.vocab_size = vocab_size
        self.dtype = dtype_of(vocab_size)
        self.n_tokens = dict.fromkeys(SPLITS, 0)
        self._keep, self._progress = keep or {}, progress
        self._is_complete = False  # all but its final name
        self._next_save = time.monotonic() + SAVE_SECONDS

    def __enter__(self) -> "Writer":
        if self._progress:
            self._partial = Path(self._progress["folder"])
            self.n_tokens = dict(self._progress["tokens"])
        else:
            name = f".{self.folder.name}.{secrets.token_hex(4)}.partial"
            self._partial = self.folder.parent / name
        self._files, self._lock = {}, filelock.FileLock(self._partial / LOCK, timeout=0)
        self._digests = {name: hashlib.sha256() for name in SPLITS}
        for other in _unfinished(self.folder):
            if other != self._partial:
                if _progress_in(other):
                    print(f"an unfinished {self.folder} of another command or input is removed")
                shutil.rmtree(other, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True, exist_ok=self._progress is not None)
            self._lock.acquire()
            for name in SPLITS:
                self._open(name)
        except filelock.Timeout:
            raise UserError(f"another process has begun to continue {self.folder}") from None
        except BaseException as error:  # Python does not call __exit__ if __enter__ raises
            self.__exit__(type(error), error)
            raise
        return self

    def _open(self, name: str) -> None:
        """Open a bin. What is beyond the progress was not recorded any more, and is cut off."""
        mode = "r+b" if self._progress else "x+b"
        self._files[name] = file = open(self._partial / f"{name}.bin", mode)
        file.truncate(self.n_tokens[name] * self.dtype.itemsize)
        while block := file.read(1 << 20):
            self._digests[name].update(block)

    def add(self, split: str, ids: np.ndarray) -> None:
        """Append ids (n,) to a split."""
        data = ids.astype(self.dtype, copy=False).tobytes()
        self._files[split].write(data)
        self._digests[split].update(data)
        self.n_tokens[split] += len(ids)

    def save(self, position: dict) -> bool:
        """Record, every few seconds, that all ids up to a position in the input were added."""
        if time.monotonic() < self._next_save:
            return False
        for file in self._files.values():
            _sync(file)
        progress = {**self._keep, "vocab_size": self.vocab_size, "tokens": self.n_tokens}
        progress["position"] = position
        new = self._partial / f"{PROGRESS}.new"
        _write_json(new, progress)
        os.replace(new, self._partial / PROGRESS)
        self._progress = progress
        self._next_save = time.monotonic() + SAVE_SECONDS
        return True

    def finish(self, splits: dict[str, dict], tokenizer: dict, sources: list[str]) -> dict:
        """Move the data set to its final name and return its meta.

        `splits` adds what the writer does not know about each split, such as its UTF-8 bytes.
        """
        meta = {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "tokenizer": tokenizer,
            "splits": {
                name: {
                    "tokens": self.n_tokens[name],
                    **splits[name],
                    "sha256": self._digests[name].hexdigest(),
                }
                for name in SPLITS
            },
            "sources": sources,
        }
        for file in self._files.values():
            _sync(file)
            file.close()  # Windows cannot rename a folder with an open file
        _write_json(self._partial / "meta.json", meta)
        self._lock.release()
        for name in (LOCK, PROGRESS):
            (self._partial / name).unlink(missing_ok=True)
        try:
            self._move()
        except (OSError, UserError):
            if self._progress:
                self._is_complete = True
                _write_json(self._partial / PROGRESS, self._progress)
            raise
        self._progress = None
        return meta

    def _move(self) -> None:
        """Give the folder its final name; raises OSError or UserError if it cannot have it."""
        others = {path.name for path in self.folder.glob("*")} - {*OUR_FILES}
        if self.folder.exists() and not others:
            move_aside(self.folder)
        if not self.folder.exists():
            self._partial.rename(self.folder)
            return
        if (self.folder / "meta.json").exists():  # the user's files stay where they are
            aside = free_name(self.folder.with_name(f"{self.folder.name}.1"))
            aside.mkdir()
            _move_files(self.folder, aside)
            print(f"moved the older data set in {self.folder} to {aside}")
        _move_files(self._partial, self.folder)

    def __exit__(self, _: type | None, error: BaseException | None, *__: object) -> None:
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            error.filename = str(self.folder)  # a full disk, most likely
        for file in self._files.values():
            with suppress(OSError):  # it is full
                file.close()
        self._lock.release()
        is_wrong = isinstance(error, UserError) and not self._is_complete
        if self._progress is None or is_wrong:
            shutil.rmtree(self._partial, ignore_errors=True)
        else:
            done = self._progress["position"]["bytes"] / 1e6
            print(f"{self.folder} is unfinished: the same command continues after {done:,.1f} MB")


def find_unfinished(folder: Path, command: str) -> dict | None:
    """The progress of an interrupted process that did the same, as `command` describes it."""
    for partial in _unfinished(_target(folder)):
        progress = _progress_in(partial)
        if progress.get("command") == command:
            return progress
    return None


def _target(folder: Path) -> Path:
    """The folder that is written: of a link, which stays, what it points to."""
    return folder.resolve() if folder.is_symlink() else folder


def _unfinished(folder: Path) -> list[Path]:
    """What interrupted processes left of this data set: folders of ours whose lock nobody has."""
    found = []
    pattern = f".{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.partial"
    for partial in sorted(folder.parent.glob(pattern)):
        # filelock deletes the lock file when it is released, on Windows and in some versions
        if (partial / LOCK).is_file() or (partial / "train.bin").is_file():
            with suppress(OSError, filelock.Timeout), filelock.FileLock(partial / LOCK, timeout=0):
                found.append(partial)
    return found


def _progress_in(partial: Path) -> dict:
    """What is recorded there; empty if nothing is, or if the bins are shorter than it says."""
    try:
        progress = json.loads((partial / PROGRESS).read_text("utf-8"))
        for name, n_tokens in progress["tokens"].items():
            size = n_tokens * dtype_of(progress["vocab_size"]).itemsize
            if (partial / f"{name}.bin").stat().st_size < size:
                return {}
        return {**progress, "folder": str(partial)}
    except (OSError, ValueError, LookupError):
        return {}


def check_target(folder: Path) -> None:
    """Raise UserError if a data set cannot be written to `folder`.

    It may have an older data set, or files that are not a data set's, such as its text.
    """
    if (folder.exists() and not folder.is_dir()) or is_foreign(folder):
        raise UserError(
            f"{folder} exists and is not a data set made by prepare.py; use another name"
        )


def check_space(folder: Path, needed: float) -> None:
    """Raise UserError if the disk of `folder` has less than `needed` bytes free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder} needs about {needed / 1e9:,.3g} GB, and {free / 1e9:,.3g} GB are free on "
            "that disk: use another --data_dir"
        )


def _move_files(source: Path, target: Path) -> None:
    """Move a data set's files that are there, or none of them if one cannot be moved."""
    moved = []
    try:
        for name in OUR_FILES:
            if (source / name).exists():
                os.replace(source / name, target / name)
                moved.append(name)
    except OSError:
        for name in moved:
            os.replace(target / name, source / name)
        raise


def _write_json(path: Path, content: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        _sync(file)


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
