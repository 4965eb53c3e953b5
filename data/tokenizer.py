"""Text to token ids and back: one class per kind, all with the same few methods.

encode(text)       ids, uint32 (n,); raises UserError where a character has no token
decode_bytes(ids)  UTF-8 bytes; a single token may be part of a character
decode(ids)        text
meta()             all of the tokenizer as JSON data, for meta.json and every checkpoint
vocab_size         how many ids there are
end_of_text        the id that stands between documents, or None
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from config import UserError
from data.download import fetch


class CharTokenizer:
    """Every character that occurs in the text is a token; ids follow the order of code points."""

    end_of_text = None

    def __init__(self, characters: str):
        codes = _code_points(characters)
        if len(codes) == 0 or (np.diff(codes.astype(np.int64)) <= 0).any():
            raise ValueError("the characters of a tokenizer must be in order, each once")
        characters.encode()  # a lone surrogate is no character
        self.characters = characters
        self.vocab_size = len(codes)
        self._id_of = np.full(int(codes.max()) + 2, self.vocab_size, np.uint32)
        self._id_of[codes] = np.arange(self.vocab_size)

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = self._id_of[np.minimum(codes, len(self._id_of) - 1)]
        unknown = np.flatnonzero(ids == self.vocab_size)
        if len(unknown):
            first = {text[i]: int(i) for i in reversed(unknown)}
            named = sorted(first, key=first.get)
            places = [f"{c!r} (U+{ord(c):04X}, character {first[c] + 1})" for c in named[:5]]
            more = f" and {len(named) - 5} more" if len(named) > 5 else ""
            raise UserError(f"the vocabulary has no {', '.join(places)}{more}")
        return ids

    def decode(self, ids) -> str:
        return "".join(self.characters[i] for i in ids)

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode()

    def meta(self) -> dict:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer:
    """The 256 bytes of UTF-8: any text, any language, nothing to store."""

    end_of_text = None
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids) -> bytes:
        return bytes(int(i) for i in ids)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def meta(self) -> dict:
        return {"kind": "byte"}


class GPT2Tokenizer:
    """GPT-2's byte-pair tokenizer, by tiktoken; its vocabulary is downloaded on first use."""

    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        import tiktoken

        _fetch_gpt2_vocabulary()
        self._encoding = tiktoken.get_encoding("gpt2")

    def encode(self, text: str) -> np.ndarray:
        # <|endoftext|> inside a text is ordinary text there: no document can end another
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids) -> bytes:
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def meta(self) -> dict:
        return {"kind": "gpt2"}


Tokenizer = CharTokenizer | ByteTokenizer | GPT2Tokenizer


def load(meta: dict) -> Tokenizer:
    """Rebuild the tokenizer that `meta()` described."""
    try:
        match meta:
            case {"kind": "char", "characters": str(characters)}:
                return CharTokenizer(characters)
            case {"kind": "byte"}:
                return ByteTokenizer()
            case {"kind": "gpt2"}:
                return GPT2Tokenizer()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(error) from None
    raise UserError(f"no tokenizer of kind {str(meta.get('kind'))!r}; there are char, byte, gpt2")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _fetch_gpt2_vocabulary() -> None:
    """Put GPT-2's two vocabulary files where tiktoken looks for them.

    tiktoken would download them itself, but without a time-out. Its cache names a file by the
    SHA-1 of its address.
    """
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(cache or Path(tempfile.gettempdir()) / "data-gym-cache")
    for name, sha256 in {
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }.items():
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        path = folder / hashlib.sha1(url.encode()).hexdigest()
        if not path.exists():
            try:
                fetch(url, path, sha256)
            except UserError as error:
                raise UserError(
                    f"GPT-2's vocabulary is not here and cannot be downloaded: {error}; "
                    "use --tokenizer=char or byte, or set TIKTOKEN_CACHE_DIR to a folder with it"
                ) from None
