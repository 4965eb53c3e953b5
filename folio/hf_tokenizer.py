"""Tokenizers in transformers' formats: vocab.json and merges.txt, and tokenizer.json.

Byte-level BPE writes each byte as a printable character: itself, or if it is not printable the next
one from U+0100 on (Radford et al. 2019, encoder.py).
"""

import hashlib
import json
import sys
from pathlib import Path

from data.errors import UserError
from data.tokenizer import END_OF_TEXT, BytePairTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer

OURS = "folio_tokenizer.json"  # what convert.py writes beside transformers' files

PRINTABLE = {i: chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))}
for i in range(256):
    PRINTABLE.setdefault(i, chr(256 + len(PRINTABLE) - 188))
BYTES = {character: i for i, character in PRINTABLE.items()}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
GPT2_SHA256 = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"  # of its tokens


# ---- reading ------------------------------------------------------------------------------------


def read(folder: Path, vocab_size: int) -> dict:
    """The meta() of the tokenizer in the folder of a GPT-2 model with `vocab_size` ids.

    Without one it is GPT-2's, and a message says so. Raises UserError if the tokenizer is another
    than byte-level BPE as GPT-2's is.
    """
    try:
        if (folder / OURS).is_file():
            return _json(folder / OURS)
        meta = _read_byte_pairs(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder} has a tokenizer that cannot be used ({reason})") from None
    if meta is None and vocab_size < GPT2Tokenizer.vocab_size:
        raise UserError(f"{folder} has no tokenizer, and a smaller vocabulary than GPT-2's")
    if meta is None:
        print(f"{folder} has no tokenizer: GPT-2's is used", file=sys.stderr)
    return meta or {"kind": "gpt2"}


def _read_byte_pairs(folder: Path) -> dict | None:
    """The meta() of byte-level BPE; None if there is no tokenizer."""
    settings, form = {}, None
    if (folder / "tokenizer_config.json").is_file():
        settings = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        whole = _json(folder / "tokenizer.json")
        _check_parts(whole)
        form = (whole.get("normalizer") or {}).get("type")
        vocab = {**whole["model"]["vocab"]}
        vocab |= {token["content"]: token["id"] for token in whole.get("added_tokens") or ()}
        merges = whole["model"]["merges"]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        return None
    if settings.get("add_prefix_space"):
        raise ValueError("its tokenizer adds a space before a text; GPT-2's does not")
    in_order = json.dumps(sorted(vocab.items(), key=lambda item: item[1]))
    normalize = {"normalize": form} if form else {}
    if hashlib.sha256(in_order.encode()).hexdigest() == GPT2_SHA256:
        return {"kind": "gpt2", **normalize}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    learned = list(dict.fromkeys(a + b for a, b in pairs))
    end = settings.get("eos_token")
    if isinstance(end, dict):  # as older versions of transformers wrote it
        end = end["content"]
    return {
        "kind": "bpe",
        **normalize,
        "tokens": [bytes(BYTES[c] for c in token).decode("latin-1") for token in learned],
        "ids": [vocab.get(PRINTABLE[i], -1) for i in range(256)] + [vocab[t] for t in learned],
        "end_of_text": vocab.get(END_OF_TEXT, vocab.get(end)),
    }


def _json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def _check_parts(whole: dict) -> None:
    """Raise ValueError if a tokenizer.json has other parts than GPT-2's."""
    splitter = whole.get("pre_tokenizer") or {}
    same = (
        whole["model"].get("type") == "BPE"
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and splitter.get("use_regex", True)
        and (whole.get("normalizer") or {}).get("type") in (None, "NFC", "NFKC")
    )
    if not same:
        raise ValueError("its tokenizer.json is not byte-level BPE as GPT-2's is")


# ---- writing ------------------------------------------------------------------------------------


def files(tok: Tokenizer) -> dict[str, bytes]:
    """A tokenizer as files of transformers, by name: tokenizer.json, or GPT-2's two."""
    if isinstance(tok, CharTokenizer):
        return _write_characters(tok.characters, tok.normalize)
    if not isinstance(tok, BytePairTokenizer):
        return _write_bytes(tok.normalize)
    if isinstance(tok, GPT2Tokenizer):
        merges, vocab = (path.read_text("utf-8") for path in tok.paths)
        vocab, merges = json.loads(vocab), merges.splitlines()[1:]
        del vocab[END_OF_TEXT]
    else:
        vocab, merges = _byte_pairs([bytes([i]) for i in range(256)] + tok.tokens, tok.ids.tolist())
    return _write_bpe(vocab, merges, tok.end_of_text, tok.normalize)


def _write_bpe(
    vocab: dict[str, int], merges: list[str], end_of_text: int | None, form: str
) -> dict[str, bytes]:
    """vocab.json and merges.txt, or if there is a Unicode form tokenizer.json, which can say so."""
    if form:
        model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": False}
        splitter = {**BYTE_LEVEL, "use_regex": True}
        end = {"id": end_of_text, "content": END_OF_TEXT, "special": True}
        end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [] if end_of_text is None else [end]
        return _tokenizer_json(model, splitter, BYTE_LEVEL, form, added)
    if end_of_text is not None:
        vocab = {**vocab, END_OF_TEXT: end_of_text}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


def _byte_pairs(tokens: list[bytes], ids: list[int]) -> tuple[dict[str, int], list[str]]:
    """The vocabulary and the merges of tokens: the bytes, then the others in the order learned. A
    byte without an id is left out."""
    names = ["".join(PRINTABLE[i] for i in token) for token in tokens]
    ranks = {token: n for n, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        pair = _merged_pair(token, ranks)
        merges.append(" ".join("".join(PRINTABLE[i] for i in part) for part in pair))
    return {name: i for name, i in zip(names, ids, strict=True) if i >= 0}, merges


def _merged_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two earlier tokens that were merged into a token."""
    parts = [bytes([i]) for i in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _write_characters(characters: str, form: str) -> dict[str, bytes]:
    """A tokenizer.json whose tokens are single characters."""
    splitter = {
        "type": "Split",
        "pattern": {"Regex": r"[\s\S]"},
        "behavior": "Isolated",
        "invert": False,
    }
    vocab = {character: i for i, character in enumerate(characters)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"}
    return _tokenizer_json(model, splitter, {"type": "Fuse"}, form)


def _write_bytes(form: str) -> dict[str, bytes]:
    """A tokenizer.json whose tokens are the bytes of UTF-8."""
    vocab = {PRINTABLE[i]: i for i in range(256)}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False}
    return _tokenizer_json(model, BYTE_LEVEL, BYTE_LEVEL, form)


def _tokenizer_json(
    model: dict, splitter: dict, decoder: dict, form: str, added: list[dict] | None = None
) -> dict[str, bytes]:
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added or [],
        "normalizer": {"type": form} if form else None,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return {"tokenizer.json": json.dumps(whole, ensure_ascii=False).encode()}
