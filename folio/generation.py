"""Text generation with a key/value cache, many samples at a time.

    ids (T,) -> generate(): model(new tokens, cache) -> logits (B, V) -> sample_token() -> ids (B,)
        -> TextStream.add(id) -> text

generate() does what model.generate() does, but computes each token once.
"""

import codecs
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from data.errors import UserError
from data.tokenizer import Tokenizer
from folio.ensemble import Ensemble
from folio.fast import CudaGraph, half_linear, pack, packed_linear
from folio.machine import available_memory, fast_dtype
from model import GPT, Bigram, GPTConfig, LanguageModel

HALF_WIDTH = 256  # smallest n_embd for which 16 bits are faster on a CPU with small batches
GRAPH_DEVICES = ("cuda",)  # devices on which each token replays a CUDA graph
CHUNK_TOKENS = 32  # tokens that are generated per sample before they are decoded


@dataclass
class Sampling:
    # sampling
    max_new_tokens: Annotated[int, "[1, 1e5]"] = 500  # length of a sample, in tokens
    temperature: Annotated[float, "[0, inf)"] = 0.8  # 0: greedy
    top_k: Annotated[int, "[1, inf)"] = 200  # sample from the k most likely tokens
    top_p: Annotated[float, "(0, 1]"] = 1.0  # and from the fewest that sum to this probability
    stop: tuple[str, ...] = ()  # end a sample before any of these texts; escapes as in the prompt
    seed: Annotated[int, "[0, inf)"] = 1337  # the same seed gives the same text


class KVCache:
    """Keys and values of the last `size` tokens of B texts, and what modules need of the last ones.

    It is a ring buffer: token i of a text is in slot i % size. `length` is the number of tokens so
    far, which move_to() sets after each model.forward(); move_to(0) empties the cache. All texts
    may share one prompt, given as a batch of 1. Buffers are allocated on first use.

    If it is `static`, each further token uses the same memory and shapes, as a CUDA graph demands:
    the length is on the device too, and unused slots are masked, not left out.
    """

    def __init__(self, config: GPTConfig, B: int, size: int, static: bool = False):
        self.B, self.size, self.length, self.static = B, size, 0, static
        self.keys, self.values = ([None] * config.n_layer for _ in range(2))
        self.last = {}  # module -> its last inputs
        # if static: the length (1,), the next token's slot (1,), and the attention mask (1, S)
        self.start = self.slot = self.mask = None

    def move_to(self, length: int) -> None:
        """Set the number of tokens in the cache."""
        self.length = length
        if self.mask is None:
            return
        if length == 0:
            self.mask.fill_(-math.inf)
        self.start.fill_(length)
        self.slot.fill_(length % self.size)
        self.mask[:, : min(length + 1, self.size)] = 0

    def positions(self, T: int, device: torch.device) -> Tensor:
        """The positions (T,) of T new tokens."""
        if self.static and self.length:
            return self.start.expand(T)
        return torch.arange(self.length, self.length + T, device=device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k and v of new tokens; return the keys and values that they attend to, and a mask.

        k and v are (B or 1, n_kv_head, T, head_dim). If the cache is empty, T is at most `size`,
        and k and v themselves are returned. Otherwise T is 1, and the slots in use are returned:
        (B, n_kv_head, S, head_dim). Their order does not matter, since keys carry their positions.
        """
        T = k.shape[2]
        assert T == 1 or self.length == 0
        if self.keys[layer] is None:
            self._allocate(layer, k)
        keys, values, slot = self.keys[layer], self.values[layer], self.length % self.size
        if self.static and self.length:
            keys.index_copy_(2, self.slot, k)
            values.index_copy_(2, self.slot, v)
            return keys, values, self.mask
        keys.narrow(2, slot, T).copy_(k)
        values.narrow(2, slot, T).copy_(v)
        if self.length == 0:
            return k, v, None
        n_used = min(self.length + 1, self.size)
        return keys.narrow(2, 0, n_used), values.narrow(2, 0, n_used), None

    def _allocate(self, layer: int, k: Tensor) -> None:
        # SDPA copies a mask whose width is not a multiple of 16
        n_slots = 16 * math.ceil(self.size / 16) if self.static else self.size
        # a CPU attends from one token four times as fast in float32 as in bfloat16
        dtype = torch.float32 if k.device.type == "cpu" and k.dtype.itemsize < 4 else k.dtype
        shape = (self.B, k.shape[1], n_slots, k.shape[3])
        self.keys[layer], self.values[layer] = (k.new_zeros(shape, dtype=dtype) for _ in "kv")
        if self.static and self.mask is None:
            self.start, self.slot = torch.zeros(2, 1, dtype=torch.int64, device=k.device)
            self.mask = k.new_full((1, n_slots), -math.inf, dtype=dtype)

    def prepend(self, module: nn.Module, x: Tensor, n: int) -> Tensor:
        """Prepend the module's previous n to x (B or 1, T, ...), or zeros if there are none."""
        if module not in self.last:
            self.last[module] = x.new_empty(self.B, n, *x.shape[2:])
        stored = self.last[module]
        before = stored if self.length else x.new_zeros(x.shape[0], n, *x.shape[2:])
        padded = torch.cat((before, x), dim=1)
        stored.copy_(padded[:, -n:])
        return padded


@torch.inference_mode()
def generate(
    model: LanguageModel,
    idx: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    n_ids: int | None = None,
    on_logits: Callable[[Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Generate N tokens after idx (B or 1, T), yielding the ids (B,) of each position.

    `uniforms` (B, N) in [0, 1) are the random numbers for sampling, a row for each text. Ids from
    `n_ids` on are never sampled. `on_logits` is called with the logits (B, V) of each position. Up
    to block_size tokens the result is that of model.generate(). Beyond, a model with rotary
    positions attends to the last block_size tokens in every layer; one with learned positions has
    no more of them, and restarts from the newer half of its context.
    """
    B, N = uniforms.shape
    block_size, rotary = model.config.block_size, model.config.rotary
    static = idx.device.type in GRAPH_DEVICES
    cache = KVCache(model.config, B, min(idx.shape[1] + N, block_size), static)

    def step(new_ids: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = model.forward(new_ids, cache=cache)  # not compiled: T varies
        logits = logits[:, -1, :n_ids].expand(B, -1)
        return logits, sample_token(logits, u, temperature, top_k, top_p)

    replayed = CudaGraph(step) if static else step
    context = idx[:, -block_size:].expand(B, -1)  # the last tokens, kept for learned positions only
    new_ids = idx[:, -block_size:]  # those that are not in the cache yet
    for u in uniforms.to(idx.device).unbind(1):
        if cache.length == cache.size and not rotary:
            cache.move_to(0)
            new_ids = context[:, -max(1, cache.size // 2) :]
        logits, ids = (replayed if cache.length else step)(new_ids, u)
        cache.move_to(cache.length + new_ids.shape[1])
        if on_logits:
            on_logits(logits)
        yield ids
        new_ids = ids[:, None]
        if not rotary:
            context = torch.cat((context[:, -block_size:], new_ids), dim=1)


def sample_token(
    logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    """Sample ids (B,) from logits (B, V), using u (B,) in [0, 1); temperature 0 is greedy.

    top_k keeps the k most likely ids (Fan et al. 2018), top_p the fewest of these whose
    probabilities sum to p (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    ids, probs = _candidates(logits, temperature, top_k, top_p)
    index = inverse_cdf(probs, u)
    return index if ids is None else ids.gather(-1, index[:, None])[:, 0]


def next_probs(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """The probabilities (B, V) with which sample_token() draws each id."""
    if temperature == 0:
        return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    ids, probs = _candidates(logits, temperature, top_k, top_p)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else probs.new_zeros(logits.shape).scatter(-1, ids, probs)


def _candidates(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float
) -> tuple[Tensor | None, Tensor]:
    """The ids (B, K) that top_k keeps, ascending (None: all of them), and their token_probs()."""
    if top_k is None or top_k >= logits.shape[-1]:
        return None, token_probs(logits, temperature, top_p)
    ids = logits.topk(top_k, sorted=False).indices.sort().values
    return ids, token_probs(logits.gather(-1, ids), temperature, top_p)


def token_probs(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """softmax(logits / temperature), (B, V), with the tail beyond top_p set to 0.

    The rest is not normalized again. At least one id remains.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # the largest logit becomes 0, which can be divided by any temperature
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probs.sort(descending=True, stable=True)
        keep = ranked.cumsum(-1) - ranked < top_p  # the probability of all likelier ids
        probs = probs.where(torch.zeros_like(keep).scatter(-1, order, keep), 0)
    return probs


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """The first ids (B,) at which the cumulative probs (B, V) exceed u (B,) of their total."""
    dtype = torch.float32 if probs.device.type == "mps" else torch.float64  # mps has no float64
    cdf = probs.cumsum(-1, dtype=dtype)
    ids = torch.searchsorted(cdf, u[:, None].to(dtype) * cdf[:, -1:], right=True).squeeze(-1)
    return ids.where(ids < probs.shape[-1], probs.argmax(-1))  # if u was rounded up to 1


def prepare_for_sampling(model: LanguageModel, dtype: str = "auto", single: bool = False) -> None:
    """Convert a model, in place, to the dtype and the layout in which it generates fastest.

    "auto" is bfloat16 where that is faster, float32 elsewhere. On a CPU with AVX2 and no bfloat16,
    a wide model has float16 weights, and float32 activations, if it generates a `single` text at a
    time.
    """
    if isinstance(model, Ensemble):
        for part in model.models:
            prepare_for_sampling(part, dtype, single)
        return
    device = next(model.parameters()).device
    is_gpt, on_cpu = isinstance(model, GPT), device.type == "cpu"
    if dtype == "auto":
        dtype = "float32"
        if is_gpt and not (on_cpu and model.config.n_embd < HALF_WIDTH):
            if fast_dtype(device) == "bfloat16":
                dtype = "bfloat16"
            elif on_cpu and single and torch.cpu.get_capabilities().get("avx2"):
                dtype = "float16"
    if dtype != "float32" and is_gpt:
        # Subtracting the mean shifts all logits alike, which changes no probability. They are near
        # 0 then, where 16 bits are precise enough; GPT-2's are near -100.
        head = model.lm_head.weight.detach()
        model.lm_head.weight = nn.Parameter(head - head.mean(0))
    model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    if on_cpu:
        pack(model, half_linear if dtype == "float16" else packed_linear)


# ---- prompts and texts --------------------------------------------------------------------------


def encode_prompt(tok: Tokenizer, prompt: str, seed: int) -> np.ndarray:
    """Return the ids (T,) of a prompt; raises UserError for an unknown character.

    An empty prompt becomes one id: end-of-text, else a newline, else a random one, by `seed`.
    """
    if prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start + 1} of the prompt is not Unicode") from None
        return tok.encode(prompt, end_of_text=True)
    if tok.end_of_text is not None:
        return np.array([tok.end_of_text])
    try:
        return tok.encode("\n")
    except UserError:
        return np.random.default_rng(seed).integers(tok.vocab_size, size=1)


def batches(
    model: LanguageModel, n_prompt: int, num_samples: int, max_new_tokens: int
) -> Iterator[range]:
    """Split range(num_samples) into batches that fit in a quarter of the available memory."""
    elements, n_tokens = 0, n_prompt + max_new_tokens
    for part in model.models if isinstance(model, Ensemble) else (model,):
        c = part.config
        elements += 8 * c.vocab_size  # logits, and temporaries of sampling
        if not isinstance(part, Bigram):
            kv_width = 2 * c.n_layer * c.n_embd * (c.n_kv_head or c.n_head) // c.n_head
            elements += min(n_tokens, c.block_size) * (kv_width + 16 * c.n_embd)
    bytes_per_sample = 4 * elements + 40 * max_new_tokens  # the latter for random numbers and ids
    available = available_memory(next(model.parameters()).device) or 2**32
    size = max(1, available // 4 // bytes_per_sample)
    for first in range(0, num_samples, size):
        yield range(first, min(first + size, num_samples))


def generate_texts(
    model: LanguageModel,
    tok: Tokenizer,
    ids: np.ndarray,
    sampling: Sampling,
    samples: range,
    on_chunk: "Callable[[list[TextStream]], None]",
    chunk_tokens: int = CHUNK_TOKENS,
    on_logits: Callable[[Tensor], None] | None = None,
) -> "list[TextStream]":
    """Generate the samples of these numbers after ids (T,), as one batch; return their texts.

    `on_chunk` is called with the texts after every chunk_tokens tokens and at the end; it may
    raise. The random numbers of a sample depend on the seed and its number only, so that sample 7
    is the same among 10 or 1000, up to rounding.
    """
    n, seed = sampling.max_new_tokens, sampling.seed
    streams = [TextStream(tok, sampling.stop) for _ in samples]
    uniforms = [np.random.default_rng((seed, i)).random(n, np.float32) for i in samples]
    new_ids = generate(
        model,
        torch.from_numpy(ids.astype(np.int64))[None].to(next(model.parameters()).device),
        torch.from_numpy(np.stack(uniforms)),
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        tok.vocab_size,
        on_logits,
    )
    while chunk := list(islice(new_ids, chunk_tokens)):  # (B,) each
        for step in torch.stack(chunk).tolist():
            for stream, i in zip(streams, step, strict=True):
                stream.add(i)
        if all(stream.ended for stream in streams):
            break
        on_chunk(streams)
    for stream in streams:
        stream.finish()
    on_chunk(streams)
    return streams


class TextStream:
    """Decodes ids as they come: complete characters only, up to the first stop string."""

    def __init__(self, tok: Tokenizer, stop: tuple[str, ...] = ()):
        self.tok, self.ids, self.ended = tok, [], False
        self._stop = tuple(filter(None, stop))
        self._ready, self._held_back = [], ""  # final text; text that may become a stop string
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, i: int) -> None:
        """Append an id; ignored after the end of the text."""
        if self.ended:
            return
        self.ids.append(i)
        if i == self.tok.end_of_text:
            return self.finish()
        text = self._held_back + self._utf8.decode(self.tok.decode_bytes([i]))
        if found := [text.index(stop) for stop in self._stop if stop in text]:
            self.ended = True
            self._ready.append(text[: min(found)])
            return
        n_held_back = max((_overlap(text, stop) for stop in self._stop), default=0)
        end = len(text) - n_held_back
        self._ready.append(text[:end])
        self._held_back = text[end:]

    def finish(self) -> None:
        """End the text, which includes what was held back."""
        if not self.ended:
            self.ended = True
            self._ready.append(self._held_back + self._utf8.decode(b"", final=True))

    def take(self) -> str:
        """Return the text that became final since the last call."""
        text = "".join(self._ready)
        self._ready.clear()
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of a text that is a proper prefix of `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
