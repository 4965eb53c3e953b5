"""Token files of llm.c and modded-nanogpt, such as the FineWeb shards of kjj0/fineweb10B-gpt2.

A shard has a header of 256 int32 (magic, version, number of tokens, zeros), then ids of GPT-2's
tokenizer as uint16; each document begins with end-of-text.
"""

import copy
import os
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from data.bins import LLM_C_MAGIC, SPLITS
from data.errors import UserError
from data.files import File
from data.tokenizer import Tokenizer

MAGIC, OTHER_MAGIC = LLM_C_MAGIC  # of GPT-2's tokens; of Llama 3's
VERSION = 1
HEADER_BYTES = 1024
BLOCK_TOKENS = 1 << 22  # read at a time


def are_shards(files: list[File]) -> bool:
    """Whether the first file is a shard, by its magic; one of the Hub by its name."""
    first = files[0]
    if first.hub:
        return first.path.suffix == ".bin"
    if first.path is None or first.size < HEADER_BYTES:
        return False
    return int(np.fromfile(first.path, "<i4", 1)[0]) in LLM_C_MAGIC


class Shards:
    """The tokens of shards, each file for one split.

    Without `val_files`, those with "val" in their names are for validation. Raises UserError if
    there are none for a split, or if one that is on this machine is wrong.
    """

    def __init__(self, sources: list[str], files: list[File], val_files: list[File]):
        self.sources = sources
        files = [file for file in files if file not in val_files]
        if not val_files:
            val_files = [file for file in files if file.path and "val" in file.path.name]
            files = [file for file in files if file not in val_files]
        for split, found in (("train", files), ("val", val_files)):
            if not found:
                advice = "name them with --val_input" if split == "val" else "name them"
                raise UserError(f"{', '.join(sources)}: no tokens for the {split} split; {advice}")
        self.files = files + val_files
        self._split_of = ["train"] * len(files) + ["val"] * len(val_files)
        for file in self.files:
            if not file.hub:
                _n_tokens(file)
        self.counts = {split: {"documents": 0, "bytes": 0} for split in SPLITS}

    def n_left(self, start: dict | None) -> int:
        """About how many bytes of tokens there are from a position on."""
        left = sum(file.size for file in self.files[start["file"] if start else 0 :])
        return left - (2 * start["tokens"] if start else 0)

    def read(
        self, tok: Tokenizer, start: dict | None = None
    ) -> Iterator[tuple[dict[str, np.ndarray], dict]]:
        """Yield ({split: ids (n,)}, position) from a position on."""
        n_bytes, n_left = self.n_left(None), self.n_left(start)
        start = start or {"file": 0, "tokens": 0, "counts": self.counts}
        self.counts = copy.deepcopy(start["counts"])
        lengths = _token_lengths(tok)
        with tqdm(
            desc="tokens",
            total=n_bytes,
            initial=n_bytes - n_left,
            unit="B",
            unit_scale=True,
            delay=1,
            disable=None,
        ) as bar:
            for i in range(start["file"], len(self.files)):
                file, split = self.files[i], self._split_of[i]
                if file.hub:
                    file.hub.fetch()
                n_tokens, first = _n_tokens(file), start["tokens"] * (i == start["file"])
                for at in range(first, n_tokens, BLOCK_TOKENS):
                    ids = np.fromfile(file.path, "<u2", BLOCK_TOKENS, offset=HEADER_BYTES + 2 * at)
                    if (largest := int(ids.max())) >= tok.vocab_size:
                        raise UserError(f"{file.name}: GPT-2's vocabulary has no id {largest}")
                    count = self.counts[split]
                    count["documents"] += int((ids == tok.end_of_text).sum())
                    count["bytes"] += int(lengths[ids].sum())
                    position = {
                        "file": i,
                        "tokens": at + len(ids),
                        "counts": copy.deepcopy(self.counts),
                    }
                    position["bytes"] = sum(c["bytes"] for c in self.counts.values())
                    yield {split: ids}, position
                    bar.update(ids.nbytes)


def _token_lengths(tok: Tokenizer) -> np.ndarray:
    """The number of bytes of text of each token (vocab_size,); of end-of-text 0."""
    lengths = np.array([len(tok.decode_bytes([i])) for i in range(tok.vocab_size)])
    lengths[tok.end_of_text] = 0
    return lengths


def _n_tokens(file: File) -> int:
    """The number of a shard's tokens; raises UserError if it is not a whole shard of GPT-2's."""
    size = os.path.getsize(file.path)
    header = np.fromfile(file.path, "<i4", 3)
    if size < HEADER_BYTES or int(header[0]) not in LLM_C_MAGIC:
        raise UserError(f"{file.name} is not a token file of llm.c: its magic is not {MAGIC}")
    magic, version, n_tokens = map(int, header)
    if magic == OTHER_MAGIC:
        raise UserError(f"{file.name} has Llama 3's tokens ({magic}), not GPT-2's ({MAGIC})")
    if version != VERSION:
        raise UserError(f"{file.name} has version {version} of the format of llm.c, not {VERSION}")
    if n_tokens == 0 or size != HEADER_BYTES + 2 * n_tokens:
        raise UserError(
            f"{file.name} is damaged: {size:,} bytes, but a header and {n_tokens:,} tokens are "
            f"{HEADER_BYTES + 2 * n_tokens:,}"
        )
    return n_tokens
