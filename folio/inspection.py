"""What a report asks of a model: its attention, its predictions, the names of its tokens."""

import math

import numpy as np
import torch
from torch import Tensor

from data import bins
from data.bins import Split
from data.tokenizer import Tokenizer
from folio.batch import get_batch
from model import GPT, LanguageModel

CONTEXT = 512  # longest context that is used, in tokens
BATCH_LOGITS = 2**25  # float32 logits at a time
KEPT = "\n\t\u00a0\u3000\u200c\u200d"  # spaces, and joiners, which are parts of words and of emoji


# ---- text ---------------------------------------------------------------------------------------


def visible(text: str, kept: str = KEPT) -> str:
    """Text in which controls, surrogates and marks of direction are escapes, such as \\u202e."""
    plain = (c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
    return "".join(plain)


def token_text(tok: Tokenizer, i: int) -> str:
    """The text of a token, with escapes for the bytes of an incomplete character."""
    known = i < tok.vocab_size
    return tok.decode_bytes([i]).decode(errors="backslashreplace") if known else ""


def token_name(tok: Tokenizer, i: int) -> str:
    """The text of a single token, with spaces visible; at most about 24 characters."""
    text = visible(token_text(tok, i), kept="").replace(" ", "\u2423") or f"id {i}"
    return text if len(text) <= 24 else f"{text[:22]}\u2026"


# ---- the model ----------------------------------------------------------------------------------


def first_window(model: LanguageModel, split: Split) -> tuple[Tensor, Tensor]:
    """idx and targets (1, T) at the start of a split, T at most CONTEXT."""
    T = min(model.config.block_size, CONTEXT, len(split.tokens) - 1)
    return get_batch(split, np.zeros(1, np.int64), T, "cpu")


def attention_weights(model: GPT, idx: Tensor) -> list[Tensor]:
    """The weights (B, n_head, T, T) of each layer: what each token's row gives to which token."""
    inputs = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda attn, args: inputs.append((attn, *args[:2])))
        for block in model.h
    ]
    try:
        model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for attn, x, rope in inputs:
        q, k, _ = attn.queries_keys_values(x, rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        result.append(scores.masked_fill(later, -math.inf).softmax(-1))
    return result


def predictions(
    model: LanguageModel, split: Split, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of up to max_tokens tokens of a split, and the likeliest ones; each (N,)."""
    T = min(model.config.block_size, CONTEXT)
    starts = bins.eval_windows(len(split.tokens), T, max_tokens)
    size, found = max(1, BATCH_LOGITS // (T * model.config.vocab_size)), []
    for first in range(0, len(starts), size):
        idx, targets = get_batch(split, starts[first : first + size], T, "cpu")
        pairs = torch.stack((targets, model(idx)[0].argmax(-1)))  # (2, B, T)
        found.append(pairs[:, targets != bins.IGNORED])
    true, predicted = torch.cat(found, dim=1)[:, :max_tokens].numpy()
    return true, predicted
