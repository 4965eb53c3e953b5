"""Token bins: reading them, and the order of a run's training windows. writer.py writes them.

    data/<name>/train.bin   token ids, little-endian, no header; uint16, or uint32 where needed
    data/<name>/val.bin     the same
    data/<name>/meta.json   format, dtype, vocabulary size, tokenizer, sources, and of each split
                            the tokens, UTF-8 bytes and SHA-256

A folder without meta.json is taken for nanoGPT's: uint16 ids of GPT-2's tokenizer.
"""

import functools
import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import UserError

FORMAT = 1
SPLITS = ("train", "val")
IGNORED = -1  # a target that the loss ignores, because it is beyond the end of the split
CHECKED_IDS = 2**24  # ids of a split that are checked when it is opened; the rest when read
BIGRAM_TOKENS = 5_000_000  # enough for a baseline, and fast to count
MALFORMED = (  # what reading JSON with unexpected content raises
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
LLM_C_MAGIC = 20240520, 20240801  # the first int32 of the token files of llm.c, modded-nanogpt
OUR_FILES = ("train.bin", "val.bin", "meta.json")
ROUNDS = 6  # of the Feistel network: four remove correlations, small domains need more


# ---- windows ------------------------------------------------------------------------------------


def window(seed: int, n: np.ndarray, n_tokens: int, block_size: int) -> np.ndarray:
    """The start offsets of the n-th training windows of a run, (B,) int64: a pure function.

    An epoch is all non-overlapping windows of block_size + 1 tokens from a random offset on, in the
    order of a keyed permutation, which is computed and never stored. `n` is (B,) int64. The split
    must have room for two windows (`n_tokens >= 2 * (block_size + 1)`).
    """
    length = block_size + 1
    per_epoch = (n_tokens - block_size) // length  # the same for every phase
    epochs, indices = np.divmod(n, per_epoch)
    starts = np.empty_like(indices)
    for epoch in np.unique(epochs):  # nearly always one
        in_epoch = epochs == epoch
        *keys, phase = _epoch_keys(seed, int(epoch))
        order = permute(indices[in_epoch].astype(np.uint64), per_epoch, keys)
        starts[in_epoch] = order.astype(np.int64) * length + int(phase) % length
    return starts


@functools.lru_cache(maxsize=4)
def _epoch_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS + 1, np.uint64))


def permute(i: np.ndarray, size: int, keys: Iterable[np.uint64]) -> np.ndarray:
    """A keyed permutation of range(size) at the indices `i` (uint64), in constant memory.

    A balanced Feistel network over the next even power of two; a result outside the range goes
    through again until it is inside ("cycle walking", Black and Rogaway 2002).
    """
    half = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = i.copy()
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[outside] = (left << half) | right
        outside = out >= size
    return out


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def eval_windows(n_tokens: int, block_size: int, max_tokens: int) -> np.ndarray:
    """The start offsets of the windows for evaluation: int64, ordered, not overlapping.

    They cover the split, and the last one may reach beyond its end. If the split is larger than
    `max_tokens`, they cover that many tokens, evenly spaced.
    """
    starts = np.arange(0, n_tokens - 1, block_size)
    count = min(len(starts), max(1, math.ceil(max_tokens / block_size)))
    return starts[np.arange(count) * len(starts) // count]


# ---- reading ------------------------------------------------------------------------------------


@dataclass
class Split:
    """The tokens of one split, mapped from their file."""

    path: Path
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    vocab_size: int
    n_bytes: int | None  # of UTF-8 text; None for nanoGPT's bins, which do not say

    def batch(self, starts: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows at `starts` (B,): idx and targets, int64 (B, T).

        Targets beyond the split's end are IGNORED. Raises UserError for an unknown id.
        """
        offsets = starts[:, None] + np.arange(block_size + 1)
        last = len(self.tokens) - 1
        rows = self.tokens[np.minimum(offsets, last)].astype(np.int64)
        if isinstance(self.tokens, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            # else all that was ever read counts as memory; the pages stay in the disk's cache
            self.tokens.base.madvise(mmap.MADV_DONTNEED)
        self.check(rows)
        idx, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        targets[offsets[:, 1:] > last] = IGNORED
        return idx, targets

    def check(self, ids: np.ndarray) -> None:
        """Raise UserError if an id is beyond the vocabulary."""
        if ids.size and (largest := int(ids.max())) >= self.vocab_size:
            raise UserError(
                f"{self.path}: token id {largest} is beyond the vocabulary of {self.vocab_size}"
            )

    def bits_per_byte(self, loss: float) -> float | None:
        """Convert a loss in nats per token to bits per byte of text; None if bytes are unknown."""
        if self.n_bytes is None:
            return None
        return loss / math.log(2) * len(self.tokens) / self.n_bytes


@dataclass
class Dataset:
    """A prepared data set: its two splits and its tokenizer."""

    folder: Path
    tokenizer: dict  # what tokenizer.load() takes
    vocab_size: int
    train: Split
    val: Split
    fingerprint: str  # a digest of the splits' digests; of nanoGPT's bins, of their sizes


def find(data_dir: Path, name: str) -> Path:
    """The folder of a data set, which is named by its folder in `data_dir`, or by a path."""
    is_path = Path(name).name != name
    return Path(name) if is_path and not (data_dir / name).exists() else data_dir / name


def dtype_of(vocab_size: int) -> np.dtype:
    """The type of a bin's ids."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def is_built(folder: Path) -> bool:
    """Whether a folder has any file of a data set."""
    return any((folder / name).exists() for name in (*OUR_FILES, "meta.pkl"))


def is_foreign(folder: Path) -> bool:
    """Whether a folder has a data set that prepare.py did not make, and does not replace."""
    return is_built(folder) and not (folder / "meta.json").is_file()


def load(folder: Path) -> Dataset:
    """Open the data set in `folder`; raises UserError if it is incomplete or inconsistent."""
    rebuild = f"rebuild it: python prepare.py --name {folder.name} --input FILE"
    if is_foreign(folder):
        rebuild = "prepare its text under another name: python prepare.py --name NAME --input FILE"
    if not (folder / "meta.json").exists() and (folder / "meta.pkl").exists():
        raise UserError(f"{folder}/meta.pkl is a pickle, which could run code; {rebuild}")
    try:
        meta = _read_meta(folder)
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        vocab_size = meta["vocab_size"]
        _check_count("vocab_size", vocab_size, 2**32)
        splits, digests, changed = {}, [], []
        built = (folder / "meta.json").stat().st_mtime_ns if "format" in meta else 0
        for name in SPLITS:
            path, entry = folder / f"{name}.bin", meta["splits"][name]
            size, n_tokens, n_bytes = path.stat().st_size, entry["tokens"], entry["bytes"]
            if n_tokens is None:  # nanoGPT's bins do not say
                n_tokens = size // dtype.itemsize
            if n_bytes is not None:
                _check_count(f"{name}'s bytes", n_bytes, 2**50)
            if size != n_tokens * dtype.itemsize:
                wrong = f"{path} has {size} bytes, not {n_tokens} {dtype} tokens"
                raise UserError(f"{wrong}; {rebuild}")
            tokens = np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
            if entry["sha256"] is None:
                _check_foreign(path)
            elif path.stat().st_mtime_ns > built:
                _check_digest(path, entry["sha256"])
                changed.append(path)
            splits[name] = Split(path, tokens, vocab_size, n_bytes)
            splits[name].check(tokens[:CHECKED_IDS])
            digests.append(str(entry["sha256"] or f"{size} bytes"))
        if changed:
            with suppress(OSError):  # the next time they need no check
                os.utime(folder / "meta.json")
        return Dataset(
            folder=folder,
            tokenizer=dict(meta["tokenizer"]),
            vocab_size=vocab_size,
            fingerprint=hashlib.sha256(" ".join(digests).encode()).hexdigest(),
            **splits,
        )
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; {rebuild}") from None
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}/meta.json cannot be read ({reason}); {rebuild}") from None


def verify(folder: Path) -> None:
    """Check the digests of a data set's bins; raises UserError if one is wrong."""
    dataset = load(folder)
    for split in (dataset.train, dataset.val):
        entry = _read_meta(folder)["splits"][split.path.stem]
        if entry["sha256"] is not None:
            _check_digest(split.path, entry["sha256"])


def _check_digest(path: Path, sha256: str) -> None:
    """Raise UserError if a bin is not what it was when it was built."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise UserError(
            f"{path} was changed after prepare.py built it: its digest does not match meta.json; "
            f"rebuild it: python prepare.py --name {path.parent.name} --input FILE"
        )


def _check_foreign(path: Path) -> None:
    """Raise UserError if a bin without meta.json cannot be nanoGPT's: uint16 ids of GPT-2."""
    size = path.stat().st_size
    head = np.fromfile(path, "<u2", count=1 << 20)
    problem, advice = "", "prepare its text under another name"
    if len(head) > 2 and int(head[:2].view("<i4")[0]) in LLM_C_MAGIC:
        problem = "starts with a header of 1,024 bytes, as llm.c writes"
        train, val = (path.with_name(f"{name}.bin") for name in SPLITS)
        advice = f"python prepare.py --name NAME --input {train} --val_input {val} reads them"
    elif size % 2:
        problem = "has an odd number of bytes"
    elif len(head) >= 64 and (head[1::2] == 0).mean() > 0.5:
        dtype = "<i8" if (head[2::4] == 0).mean() > 0.5 else "<u4"
        problem = f"seems to have {np.dtype(dtype).itemsize} bytes per id"
        advice = f"or convert it: numpy.fromfile({str(path)!r}, {dtype!r}).astype('<u2')"
    elif head.size and head.max() >= 50257:
        problem = f"has the id {head.max()}, which GPT-2's vocabulary does not have"
    if problem:
        raise UserError(
            f"{path} {problem}; without a meta.json it must have uint16 ids of GPT-2's tokenizer, "
            f"as nanoGPT writes them; {advice}"
        )


def _read_meta(folder: Path) -> dict:
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r:.20} is not {FORMAT}")
        return meta
    unknown = {"tokens": None, "bytes": None, "sha256": None}
    return {
        "dtype": "uint16",
        "vocab_size": 50257,
        "tokenizer": {"kind": "gpt2"},
        "splits": dict.fromkeys(SPLITS, unknown),
    }


def _check_count(name: str, value: object, largest: int) -> None:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name} must be a whole number in [1, {largest}], not {value!r:.20}")


def baselines(dataset: Dataset) -> dict[str, float]:
    """The validation losses of models that need no training, in nats per token: a guess among all
    ids alike, and a bigram model."""
    bigram = bigram_loss(dataset.train.tokens, dataset.val.tokens, dataset.vocab_size)
    return {"uniform": math.log(dataset.vocab_size), "bigram": bigram}


def bigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """The loss on `val`, in nats per token, of a bigram model counted on `train`: a baseline.

    p(b | a) = (count(a, b) + p(b)) / (count(a) + 1), where p(b) is smoothed by one, so that no pair
    has probability 0. At most the first BIGRAM_TOKENS are read.
    """
    train, val = (part[:BIGRAM_TOKENS].astype(np.int64) for part in (train, val))
    single = np.bincount(train, minlength=vocab_size)
    known, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    pairs = val[:-1] * vocab_size + val[1:]
    index = np.minimum(np.searchsorted(known, pairs), len(known) - 1)
    count = np.where(known[index] == pairs, counts[index], 0)
    before = np.bincount(train[:-1], minlength=vocab_size)[val[:-1]]
    prior = (single[val[1:]] + 1) / (len(train) + vocab_size)
    return float(-np.log((count + prior) / (before + 1)).mean())


# ---- names --------------------------------------------------------------------------------------


def move_aside(folder: Path) -> None:
    """Rename a folder to NAME.1, or the next free number, with a message."""
    aside = free_name(folder.with_name(f"{folder.name}.1"))
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(
            f"the older {folder} cannot be moved aside ({error.strerror}): use another name"
        ) from None
    print(f"moved the older {folder} to {aside}")


def free_name(path: Path) -> Path:
    """`path`, or if it exists the same with the next free number at its end."""
    stem, n = re.sub(r"\.\d+$", "", path.name), 1
    while path.exists():
        n += 1
        path = path.with_name(f"{stem}.{n}")
    return path
