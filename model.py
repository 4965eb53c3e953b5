"""The complete GPT, from token ids to logits and loss, and a bigram model as a baseline.

    idx (B, T) -> wte + wpe -> x (B, T, C) -> n_layer times: x + attn(ln_1(x)), x + mlp(ln_2(x))
        -> ln_f -> lm_head -> logits (B, T, V) -> loss

The defaults are GPT-2 (Radford et al. 2019): LayerNorm before each sublayer, learned positions,
tanh-approximated GELU, and an output head that shares the weights of the token embedding.
Parameters have GPT-2's names. The modern parts are the later fields of GPTConfig;
docs/measurements.md shows what each of them gains.

The imports from folio/fast.py are faster equivalents of plain operations of torch, which are listed
at the top of that file.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, Protocol

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from folio.fast import Dropout, causal_attention, token_loss

Rope = tuple[Tensor, Tensor]  # cos and sin of RoPE's angles, each (T, 1, head_dim / 2)


@dataclass
class GPTConfig:
    # the model; the defaults are GPT-2 (124M)
    n_layer: Annotated[int, "[1, 1000]"] = 12  # number of blocks
    n_head: Annotated[int, "[1, 1000]"] = 12  # attention heads per block
    n_embd: Annotated[int, "[1, 1e5]"] = 768  # width of the residual stream
    block_size: Annotated[int, "[1, 1e7]"] = 1024  # longest context, in tokens
    vocab_size: Annotated[int, "[1, 1e8]"] = 50257  # train.py's default is the data set's
    dropout: Annotated[float, "[0, 1)"] = 0.0  # dropout of the embeddings and sublayer outputs
    bias: bool = True  # biases in linear layers and LayerNorms

    # modern parts; the defaults are GPT-2's
    activation: Literal["gelu_tanh", "gelu", "relu2", "swiglu"] = "gelu_tanh"  # MLP activation
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm has no parameters
    rotary: bool = False  # rotary positions (RoPE) instead of learned ones
    qk_norm: bool = False  # normalize queries and keys
    n_kv_head: Annotated[int, "[0, 1000]"] = 0  # key/value heads (GQA); 0: n_head
    key_shift: bool = False  # half of each key is that of the token before
    conv: Annotated[int, "[1, 100]"] = 1  # width of a causal convolution before each MLP; 1: none

    def __post_init__(self):
        if self.n_embd % self.n_head:
            below = self.n_embd - self.n_embd % self.n_head
            fits = " or ".join(str(n) for n in (below, below + self.n_head) if n)
            raise ValueError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; use n_embd={fits}"
            )
        if self.n_kv_head == self.n_head:
            self.n_kv_head = 0
        if self.n_kv_head and self.n_head % self.n_kv_head:
            divisors = [str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise ValueError(
                f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}; "
                f"use one of {', '.join(divisors)}"
            )
        for name, divisor in (("rotary", 2), ("key_shift", 4)):
            if getattr(self, name) and self.n_embd // self.n_head % divisor:
                raise ValueError(
                    f"{name} needs a head size that is a multiple of {divisor}, but n_embd="
                    f"{self.n_embd} over n_head={self.n_head} is {self.n_embd // self.n_head}"
                )


class Cache(Protocol):
    """What generation keeps of earlier tokens: KVCache in folio/generation.py.

    positions() are those of T new tokens; update() stores their keys and values and returns those
    to attend to, and a mask or None; prepend() puts before x the last n tokens' x of the module.
    After each forward(), generate() advances it by T tokens.
    """

    def positions(self, T: int, device: torch.device) -> Tensor: ...
    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def prepend(self, module: nn.Module, x: Tensor, n: int) -> Tensor: ...


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.qk_norm, self.key_shift = layer, config.qk_norm, config.key_shift
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.n_embd // config.n_head
        n_vectors = self.n_head + 2 * self.n_kv_head  # queries, keys, values
        self.c_attn = nn.Linear(config.n_embd, n_vectors * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rope: Rope | None = None, cache: Cache | None = None) -> Tensor:
        (q, k, v), mask = self.queries_keys_values(x, rope, cache), None
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)
        y = attention(q, k, v, mask)  # (B, n_head, T, head_dim)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))

    def queries_keys_values(
        self, x: Tensor, rope: Rope | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, ...]:
        """q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim) of x (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)
        qk, v = qkv.split_with_sizes((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        if self.qk_norm:
            qk = F.layer_norm(qk, qk.shape[-1:])
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split_with_sizes((self.n_head, self.n_kv_head), dim=2)
        if self.key_shift:
            k = self.shift_half(k, cache)
        return tuple(part.transpose(1, 2) for part in (q, k, v))

    def shift_half(self, k: Tensor, cache: Cache | None) -> Tensor:
        """Replace half of the elements of k (B, T, heads, head_dim) by those of the token before.

        A key then also tells what came before its token, so that one layer can find where the last
        tokens occurred before and what followed ("induction heads", Olsson et al. 2022), which
        takes two layers otherwise. RoPE's pairs, j and j + head_dim / 2, stay together.
        """
        kept, moved = k.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, T, heads, 2, head_dim / 4)
        moved = previous(self, moved, 1, cache)[:, :-1]
        return torch.stack((kept, moved), dim=-2).flatten(-3)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of q (B, n_head, T, D) to k and v (B, n_kv_head, S, D); returns q's shape.

    Either T == S, or T == 1 and the query is that of the last of the S tokens; then a mask (1, S)
    may be added to the scores. n_head / n_kv_head query heads share a key/value head (Ainslie et
    al. 2023, "GQA"). The attention weights have no dropout, which SDPA's CPU kernel does not have.
    """
    B, n_head, T, D = q.shape
    n_shared = n_head // k.shape[1]
    if T > 1:
        if n_shared > 1:
            k, v = (x.repeat_interleave(n_shared, dim=1) for x in (k, v))
        return causal_attention(q, k, v)
    if n_shared > 1:  # stack the query heads that share a key/value head as if they were tokens
        q = q.reshape(B, -1, n_shared, D)
    y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask)
    return y.to(q.dtype).reshape(B, n_head, 1, D)


def previous(module: nn.Module, x: Tensor, n: int, cache: Cache | None) -> Tensor:
    """x (B, T, ...) of a module after its last n tokens' x, which are zero before the first."""
    if cache is not None:
        return cache.prepend(module, x, n)
    return torch.cat((x.new_zeros(x.shape[0], n, *x.shape[2:]), x), dim=1)


def rope_cos_sin(positions: Tensor, head_dim: int) -> Rope:
    """cos and sin, each (T, 1, head_dim / 2), of RoPE's angles (Su et al. 2021, "RoFormer").

    The angle of pair j is position * 10000^(-2j / head_dim).
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    angles = positions[:, None, None] * 10000.0 ** (-pairs / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate x (B, T, heads, head_dim); elements j and j + head_dim / 2 of a head are a pair."""
    cos, sin = (part.to(x.dtype) for part in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        n_hidden = n_out = 4 * config.n_embd
        if config.activation == "swiglu":  # three matrices, with about as many parameters as two
            n_hidden = 64 * max(1, round(config.n_embd * 8 / 3 / 64))
            n_out = 2 * n_hidden
        self.c_fc = nn.Linear(config.n_embd, n_out, bias=config.bias)
        self.c_proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


def relu2(x: Tensor) -> Tensor:
    """max(0, x)^2 (So et al. 2021, "Primer")."""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of the two halves a and b of x (Shazeer 2020, "GLU Variants")."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": relu2,
    "swiglu": swiglu,
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) over the last dimension, without parameters (Zhang & Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:])


def make_norm(config: GPTConfig) -> nn.Module:
    return RMSNorm() if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class ShortConv(nn.Module):
    """x[t] + w[0] * x[t - 1] + w[1] * x[t - 2] + ..., channel by channel; w starts at zero.

    It gives the MLP the tokens just before, which otherwise takes a layer of attention ("Canon
    layers", Allen-Zhu 2025).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.conv - 1, 1, config.n_embd))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        T, n = x.shape[1], len(self.weight)
        padded, y = previous(self, x, n, cache), x  # (B, n + T, C), (B, T, C)
        for k, w in enumerate(self.weight.to(x.dtype), 1):
            y = torch.addcmul(y, padded[:, n - k : n - k + T], w)
        return y


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.conv = ShortConv(config) if config.conv > 1 else None
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Rope | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), rope, cache))
        y = self.ln_2(x)
        if self.conv is not None:
            y = self.conv(y, cache)
        return x + self.drop(self.mlp(y))


class LanguageModel(nn.Module):
    """The base class of GPT and Bigram."""

    config: GPTConfig

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @torch.inference_mode()
    def generate(
        self, idx: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int | None = None
    ) -> Iterator[Tensor]:
        """Generate N tokens after idx (B, T), yielding the ids (B,) of each position.

        `uniforms` (B, N) in [0, 1) are the random numbers for sampling. The model must be in
        evaluation mode. This reference implementation computes the whole context for every token;
        folio/generation.py gives the same tokens many times faster, and is tested against it.
        """
        for u in uniforms.unbind(1):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1].double()  # (B, V)
            if top_k is not None and top_k < logits.shape[-1]:
                kth_largest = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < kth_largest, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                cdf = (logits / temperature).softmax(-1).cumsum(-1)
                new = torch.searchsorted(cdf, u[:, None].double(), right=True).squeeze(-1)
            yield new
            idx = torch.cat((idx, new[:, None]), dim=1)


class GPT(LanguageModel):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rotary:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize all parameters as in GPT-2, using torch's global random state.

        | parameter                      | distribution                 |
        |--------------------------------|------------------------------|
        | wte (lm_head shares it), wpe   | N(0, 0.02)                   |
        | attn.c_attn, mlp.c_fc: weight  | N(0, 0.02)                   |
        | attn.c_proj, mlp.c_proj: weight| N(0, 0.02 / sqrt(2 n_layer)) |
        | LayerNorm: weight              | 1                            |
        | conv: weight; all biases       | 0                            |

        The two projections of a block write to the residual stream. Their smaller scale keeps its
        variance from growing with depth.
        """
        for name, p in self.named_parameters():
            if name.endswith(("bias", "conv.weight")):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1)
            elif name.endswith("c_proj.weight"):
                p.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(0, 0.02)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        teacher_probs: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits, None), or (None, loss) if targets are given.

        idx and targets are (B, T), logits (B, T, V); T is at most block_size. The loss is the mean
        cross-entropy in nats per token over the targets that are not -1, averaged with that of
        teacher_probs (B, T, V) if these are given. With a cache, idx follows the tokens in it, and
        only the logits of the last token are returned: (B, 1, V).
        """
        T, device = idx.shape[1], idx.device
        positions = torch.arange(T, device=device) if cache is None else cache.positions(T, device)
        x, rope = self.wte(idx), None  # (B, T, C)
        if self.config.rotary:
            rope = rope_cos_sin(positions, self.config.n_embd // self.config.n_head)
        else:
            x = x + self.wpe(positions)
        x = self.drop(x)
        for block in self.h:
            x = block(x, rope, cache)
        if cache is not None:
            x = x[:, -1:]
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x), None
        return None, token_loss(x, self.lm_head.weight, targets, teacher_probs)

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward.

        6 for each weight that multiplies a token, plus 12 * n_layer * n_embd * block_size for
        attention, not halved for causality (Chowdhery et al. 2022, "PaLM", appendix B). A
        multiply-add counts as 2, and backward costs twice as much as forward. Embedding lookups
        are free; the output head counts.
        """
        c = self.config
        weights = sum(p.numel() for p in self.h.parameters() if p.dim() == 2)
        weights += self.lm_head.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    def activations_per_token(self) -> int:
        """Rough number of elements saved for backward: in a block 16 * n_embd, and 2 * n_embd for
        each part that adds operations; and the logits."""
        c = self.config
        per_block = 16 + 2 * (c.rotary + c.qk_norm + c.key_shift + (c.conv > 1))
        return per_block * c.n_layer * c.n_embd + c.vocab_size


class Bigram(LanguageModel):
    """Predicts the next token from the last one alone: a (V, V) table of logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.normal_(self.wte.weight, 0, 0.02)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """As GPT.forward(), but the cache is ignored, and the logits are those of all tokens."""
        logits = self.wte(idx)  # (B, T, V)
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def flops_per_token(self) -> int:
        """0: the model is a table."""
        return 0

    def activations_per_token(self) -> int:
        return 3 * self.config.vocab_size


MODELS = {"gpt": GPT, "bigram": Bigram}
