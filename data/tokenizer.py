"""Tokenizers: text to token ids and back, one class per kind, all with the same methods.

encode(text)       ids, uint32 (n,); raises UserError for a character without a token
decode_bytes(ids)  UTF-8 bytes; a single token may be part of a character
decode(ids)        text
meta()             the whole tokenizer as JSON data, for meta.json and every checkpoint
vocab_size         number of ids
end_of_text        the id that separates documents; None if a newline does
"""

import hashlib
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from data.download import fetch
from data.errors import UserError

KINDS = ("char", "byte", "gpt2", "bpe")
GPT2_PATTERN = (  # how GPT-2 splits text before merging byte pairs; no token crosses a split
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
END_OF_TEXT = "<|endoftext|>"


class UnknownCharacters(UserError):
    """A text has characters without a token; `index` is the first one's, `names` has them all."""

    def __init__(self, text: str, unknown: np.ndarray):
        first = {text[i]: int(i) for i in reversed(unknown)}
        in_order = sorted(first, key=first.get)
        places = [f"{c!r} (U+{ord(c):04X}, character {first[c] + 1})" for c in in_order[:5]]
        more = f" and {len(in_order) - 5} more" if len(in_order) > 5 else ""
        super().__init__(f"the vocabulary has no {', '.join(places)}{more}")
        self.index = int(unknown[0])
        self.names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in in_order[:5]) + more


class Tokenizer:
    """The base class. `normalize` is the Unicode form that text is converted to, or empty."""

    kind: str
    vocab_size: int
    end_of_text: int | None = None
    normalize = ""

    def encode(self, text: str, end_of_text: bool = False) -> np.ndarray:
        """The ids of a text; with `end_of_text`, <|endoftext|> in it becomes that token."""
        parts = [text]
        if end_of_text and self.end_of_text is not None:
            parts = text.split(END_OF_TEXT)
        ids = [self._encode(normalized(part, self.normalize)) for part in parts]
        for i in range(len(ids) - 1, 0, -1):
            ids.insert(i, np.array([self.end_of_text], np.uint32))
        return np.concatenate(ids)

    def _encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def meta(self) -> dict:
        form = {"normalize": self.normalize} if self.normalize else {}
        return {"kind": self.kind, **form, **self._content()}

    def _content(self) -> dict:
        """The entries of meta() besides the kind."""
        return {}


class CharTokenizer(Tokenizer):
    """Each character of the training text is a token.

    Ids are in the order of code points; characters that extended() adds come last.
    """

    kind = "char"

    def __init__(self, characters: str):
        codes = _code_points(characters)
        if len(codes) == 0 or len(np.unique(codes)) < len(codes):
            raise ValueError("a tokenizer's characters must be distinct")
        characters.encode()  # fails for a lone surrogate
        self.characters = characters
        self.vocab_size = len(codes)
        self._id_of = np.full(int(codes.max()) + 2, self.vocab_size, np.uint32)
        self._id_of[codes] = np.arange(self.vocab_size)

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The tokenizer of all characters in `texts`."""
        occurs = np.zeros(0x110000, bool)
        for text in texts:
            known_ascii = occurs[:128].nonzero()[0].astype(np.uint8).tobytes()
            rest = text.encode().translate(None, known_ascii).decode()  # fast, if most is ASCII
            occurs[_code_points(rest)] = True
        return cls("".join(map(chr, np.flatnonzero(occurs))))

    def extended(self, texts: Iterable[str]) -> "CharTokenizer":
        """The same with the other characters of `texts`, as further ids."""
        new = sorted(set(self.train(texts).characters) - set(self.characters))
        extended = CharTokenizer(self.characters + "".join(new))
        extended.normalize = self.normalize
        return extended

    def _encode(self, text: str) -> np.ndarray:
        # larger code points are clipped to the last entry of the table, which means unknown
        ids = self._id_of.take(_code_points(text), mode="clip")
        unknown = np.flatnonzero(ids == self.vocab_size)
        if len(unknown):
            raise UnknownCharacters(text, unknown)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode()

    def _content(self) -> dict:
        return {"characters": self.characters}


class ByteTokenizer(Tokenizer):
    """Each byte of UTF-8 is a token: any text in any language, with nothing to store."""

    kind = "byte"
    vocab_size = 256

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(int(i) for i in ids)


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding of bytes (Sennrich et al. 2016; Radford et al. 2019), by tiktoken.

    Ours has as ids the 256 bytes, then `tokens` in the order learned, each the concatenation of two
    earlier ones, then end-of-text. One of transformers has other `ids` for the bytes and `tokens`
    (-1: none) and may lack `end_of_text`.
    """

    kind = "bpe"

    def __init__(
        self, tokens: list[bytes], ids: list[int] | None = None, end_of_text: int | None = None
    ):
        import tiktoken

        self.tokens = tokens
        ranks = {bytes([i]): i for i in range(256)}
        ranks |= {token: 256 + i for i, token in enumerate(tokens)}
        if len(ranks) != 256 + len(tokens):
            raise ValueError("a tokenizer's tokens must be distinct and longer than a byte")
        self._imported = ids is not None
        self.end_of_text = end_of_text if self._imported else len(ranks)
        self.ids = np.array(ids if self._imported else range(len(ranks)), np.int64)
        if self.ids.shape != (len(ranks),) or len(np.unique(self.ids[256:])) != len(tokens):
            raise ValueError("a tokenizer's ids must be distinct, one for each token")
        known = [*self.ids.tolist(), -1 if self.end_of_text is None else self.end_of_text]
        if not -1 <= min(known) <= max(known) < 2**32:
            raise ValueError("a tokenizer's ids must be in [0, 2**32)")
        self.vocab_size = max(known) + 1
        self._rank_of = {i: rank for rank, i in enumerate(known) if i >= 0}
        special = {END_OF_TEXT: len(ranks)}
        self._encoding = tiktoken.Encoding(
            "folio", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BytePairTokenizer":
        """Learn the most frequent pairs of `texts`. The same texts give the same tokens."""
        try:
            import rustbpe
        except ImportError:
            raise UserError(
                "--tokenizer=bpe needs the package rustbpe: pip install rustbpe"
            ) from None
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, vocab_size=vocab_size - 1, pattern=GPT2_PATTERN)
        ranked = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        if len(ranked) < vocab_size - 1:
            raise UserError(
                f"--vocab_size={vocab_size} is too large for this text: it gives only "
                f"{len(ranked) + 1} ids"
            )
        return cls([bytes(token) for token, _ in ranked[256:]])

    def _encode(self, text: str) -> np.ndarray:
        try:  # <|endoftext|> too is plain text, so that no document can forge its end
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # a run of spaces too long for tiktoken's regex engine
            raise UserError(f"the tokenizer cannot encode this text: {error}") from None
        ids = self.ids[ranks]
        if (ids < 0).any():
            missing = int(ranks[int((ids < 0).argmax())])
            raise UserError(f"the vocabulary has no token for the byte 0x{missing:02x}")
        return ids.astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids without text, such as padding, give nothing."""
        ranks = [self._rank_of[int(i)] for i in ids if int(i) in self._rank_of]
        return self._encoding.decode_bytes(ranks)

    def _content(self) -> dict:
        content = {"tokens": [token.decode("latin-1") for token in self.tokens]}  # byte by byte
        if self._imported:
            content |= {"ids": self.ids.tolist(), "end_of_text": self.end_of_text}
        return content


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's byte-pair encoding; its vocabulary is downloaded on first use."""

    kind = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        import tiktoken

        self.paths = _fetch_gpt2_vocabulary()
        self._encoding = tiktoken.get_encoding("gpt2")
        self.ids = np.arange(self.vocab_size)
        self._rank_of = range(self.vocab_size)

    def _content(self) -> dict:
        return {}


def load(meta: dict) -> Tokenizer:
    """Rebuild a tokenizer from its meta(); raises UserError if it is invalid."""
    try:
        match meta:
            case {"kind": "char", "characters": str(characters)}:
                tok = CharTokenizer(characters)
            case {"kind": "byte"}:
                tok = ByteTokenizer()
            case {"kind": "gpt2"}:
                tok = GPT2Tokenizer()
            case {"kind": "bpe", "tokens": list(tokens)}:
                tokens = [token.encode("latin-1") for token in tokens]
                tok = BytePairTokenizer(tokens, meta.get("ids"), meta.get("end_of_text"))
            case _:
                kind = str(meta.get("kind"))
                raise ValueError(f"no tokenizer of kind {kind!r}; the kinds are {', '.join(KINDS)}")
        tok.normalize = meta.get("normalize", "")
        normalized("a", tok.normalize)  # fails for an unknown form
        return tok
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(error) from None


def stored_in(path: Path) -> dict:
    """Read the meta() of the tokenizer of a data set, a run or a checkpoint; raises UserError if
    there is none."""
    try:
        if (path / "meta.json").is_file():
            return json.loads((path / "meta.json").read_text("utf-8"))["tokenizer"]
        for name in ("best.safetensors", "ckpt.safetensors"):
            if (path / name).is_file():
                return _checkpoint_meta(path / name)["tokenizer"]
        return _checkpoint_meta(path)["tokenizer"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is not a data set, run or checkpoint with a tokenizer ({reason})"
        ) from None


def _checkpoint_meta(path: Path) -> dict:
    """Read a checkpoint's meta without torch; the digest is verified."""
    with open(path, "rb") as file:
        digest, left = hashlib.sha256(), os.fstat(file.fileno()).st_size - 32
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        if file.read() != digest.digest():
            raise ValueError("not a checkpoint, or damaged: its digest does not match")
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["folio"])


def normalized(text: str, form: str) -> str:
    """`text` in a Unicode normalization form such as "NFC"; unchanged if the form is empty."""
    return unicodedata.normalize(form, text) if form else text


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _fetch_gpt2_vocabulary() -> list[Path]:
    """Download GPT-2's two vocabulary files, merges and ids, to where tiktoken looks for them.

    tiktoken would do so itself, but without a time-out. In its cache a file's name is the SHA-1 of
    its URL.
    """
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(cache or Path(tempfile.gettempdir()) / "data-gym-cache")
    paths = []
    for name, sha256 in {
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }.items():
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        path = folder / hashlib.sha1(url.encode()).hexdigest()
        paths.append(path)
        if not path.exists():
            try:
                fetch(url, path, sha256)
            except UserError as error:
                raise UserError(
                    f"GPT-2's vocabulary is needed: {error}; use --tokenizer=char, byte or bpe, or "
                    "set TIKTOKEN_CACHE_DIR to a folder that has it"
                ) from None
    return paths
