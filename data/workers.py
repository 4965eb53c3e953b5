"""Encodes batches of text, several at a time: in threads, or in processes of their own.

A thread is enough where its work needs no Python, as in tiktoken. But only one thread can read and
take apart the input meanwhile. So for large inputs each thread hands its batches to a process. That
is a plain `python` with two pipes: it imports nothing but data/, needs no main module to import
again, and ends when the pipe from here is closed, however this process ended.
"""

import json
import os
import queue
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data import tokenizer
from data.bins import dtype_of
from data.tokenizer import Tokenizer, UnknownCharacters

ROOT = Path(__file__).resolve().parent.parent


class Text(NamedTuple):
    """A text to encode, for one split; `follows`: it starts a document, not the split's first."""

    split: str
    follows: bool
    text: str


class UnknownText(Exception):
    """Text `number` of a batch has characters outside the vocabulary; `error` says which."""

    def __init__(self, number: int, error: UnknownCharacters):
        super().__init__(number, error)
        self.number, self.error = number, error


def encode_batch(tok: Tokenizer, batch: list[Text]) -> dict[str, np.ndarray]:
    """The ids (n,) of the texts, for each split. End-of-text or a newline separates documents.

    Raises UnknownText.
    """
    ids = {split: [] for split, _, _ in batch}
    for number, (split, follows, text) in enumerate(batch):
        if follows:
            ids[split].append(tok.encode("\n") if tok.end_of_text is None else [tok.end_of_text])
        try:
            ids[split].append(tok.encode(text))
        except UnknownCharacters as error:
            raise UnknownText(number, error) from None
    dtype = dtype_of(tok.vocab_size)
    return {split: np.concatenate(parts).astype(dtype) for split, parts in ids.items()}


class Encoders:
    """A context manager that encodes up to `n_workers` batches at a time."""

    def __init__(self, tok: Tokenizer, n_workers: int, in_processes: bool):
        self._tok = tok
        self._pool = ThreadPoolExecutor(n_workers)
        self._processes = [_start() for _ in range(n_workers if in_processes else 0)]
        self._new = set(self._processes)  # they have not got the tokenizer yet
        self._idle = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def submit(self, batch: list[Text]) -> "Future[dict[str, np.ndarray]]":
        """The future ids of a batch. It raises OSError if a process was killed; UnknownText."""
        return self._pool.submit(self._encode, batch)

    def _encode(self, batch: list[Text]) -> dict[str, np.ndarray]:
        if not self._processes:
            return encode_batch(self._tok, batch)
        process = self._idle.get()
        try:
            if process in self._new:
                self._new.remove(process)
                _write_json(process.stdin, self._tok.meta())
            _write_json(process.stdin, batch)
            ids = _read_ids(process.stdout, dtype_of(self._tok.vocab_size))
        except (EOFError, OSError):
            raise OSError(
                f"a worker process ended (exit code {process.wait()}): it was killed, perhaps for "
                "lack of memory"
            ) from None
        finally:
            self._idle.put(process)  # a dead one too, or a thread would wait for it
        return encode_batch(self._tok, batch) if ids is None else ids  # raises its error here

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # they have nothing to save, and a thread may wait for one
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what it did not read any more
                    pipe.close()


def _start() -> subprocess.Popen:
    """A process that runs serve(), in a group of its own, so that Ctrl-C does not reach it."""
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from data.workers import serve; serve()"
    group = {"start_new_session": True}
    if sys.platform == "win32":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, **group)


def serve() -> None:
    """Read batches from standard input and write their ids, or null after an error, to stdout."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    with suppress(EOFError, BrokenPipeError):  # the process that asks has ended
        tok = tokenizer.load(_read_json(requests))
        while True:
            batch = [Text(*text) for text in _read_json(requests)]
            try:
                ids = encode_batch(tok, batch)
            except Exception:  # whatever it is, the parent encodes this batch again and raises it
                ids = None
            _write_ids(answers, ids)


def _write_json(pipe: BinaryIO, message: object) -> None:
    """Send a message, as one line of JSON."""
    pipe.write(json.dumps(message, ensure_ascii=False).encode() + b"\n")
    pipe.flush()


def _read_json(pipe: BinaryIO) -> Any:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def _write_ids(pipe: BinaryIO, ids: dict[str, np.ndarray] | None) -> None:
    """Send ids: the number of each split's as a line of JSON, then the ids; or null."""
    _write_json(pipe, ids and {split: len(part) for split, part in ids.items()})
    for part in (ids or {}).values():
        pipe.write(part.tobytes())
    pipe.flush()


def _read_ids(pipe: BinaryIO, dtype: np.dtype) -> dict[str, np.ndarray] | None:
    lengths, ids = _read_json(pipe), {}
    for split, length in (lengths or {}).items():
        data = pipe.read(length * dtype.itemsize)
        if len(data) < length * dtype.itemsize:
            raise EOFError
        ids[split] = np.frombuffer(data, dtype)
    return ids or None


def available_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
