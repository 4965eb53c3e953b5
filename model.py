"""The GPT, whole: token ids in, logits and loss out; and the bigram model that it should beat.

    idx (B, T) -> wte + wpe -> x (B, T, C) -> n_layer times [x + attn(ln_1(x)), x + mlp(ln_2(x))]
        -> ln_f -> lm_head -> logits (B, T, V), loss

The architecture is GPT-2's (Radford et al. 2019): LayerNorm before each sublayer, learned
positions, tanh-approximated GELU, and an output head that shares the token embedding's weights.
Parameters keep the names that GPT-2 gave them. The later fields of GPTConfig put newer parts in the
place of some of these; the README has what each of them gains.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Output = tuple[Tensor | None, Tensor | None]  # of forward: logits or loss
Turns = tuple[Tensor, Tensor]  # cos and sin of the angles that rotary positions turn by


@dataclass
class GPTConfig:
    # the model; the defaults are GPT-2 (124M)
    n_layer: Annotated[int, "[1, 1000]"] = 12  # blocks, one after the other
    n_head: Annotated[int, "[1, 1000]"] = 12  # attention heads in a block
    n_embd: Annotated[int, "[1, 1e5]"] = 768  # width of the residual stream
    block_size: Annotated[int, "[1, 1e7]"] = 1024  # longest context, in tokens
    vocab_size: Annotated[int, "[1, 1e8]"] = 50257  # ids; train.py takes the data set's
    dropout: Annotated[float, "[0, 1)"] = 0.0  # share dropped of the embedding and sublayers
    bias: bool = True  # in linear layers and LayerNorms

    # parts that are newer than GPT-2; the defaults are its own
    activation: Literal["gelu_tanh", "gelu", "relu2", "swiglu"] = "gelu_tanh"  # of the MLP
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # rmsnorm: without parameters
    rotary: bool = False  # positions turn queries and keys; wpe goes
    qk_norm: bool = False  # LayerNorm of each query and key
    n_kv_head: Annotated[int, "[0, 1000]"] = 0  # heads of keys and values; 0: as many as n_head
    conv: Annotated[int, "[1, 100]"] = 1  # tokens that are mixed, channel by channel, for the MLP

    def __post_init__(self):
        if self.n_embd % self.n_head:
            near = self.n_embd - self.n_embd % self.n_head
            would = " or ".join(str(n) for n in (near, near + self.n_head) if n)
            raise ValueError(
                f"n_embd={self.n_embd} does not divide among n_head={self.n_head}; "
                f"n_embd={would} would"
            )
        if self.n_kv_head == self.n_head:
            self.n_kv_head = 0
        if self.n_kv_head and self.n_head % self.n_kv_head:
            divisors = [str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise ValueError(
                f"n_head={self.n_head} does not divide by n_kv_head={self.n_kv_head}, "
                f"but by {', '.join(divisors)}"
            )
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"rotary turns pairs, but n_embd={self.n_embd} among n_head={self.n_head} makes "
                f"heads of {self.n_embd // self.n_head}; an even number would do"
            )


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.qk_norm = config.qk_norm
        n_vectors = self.n_head + 2 * self.n_kv_head  # queries, keys, values
        width = n_vectors * (config.n_embd // config.n_head)
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        turns: Turns | None = None,
        cache: "Cache | None" = None,
        layer: int = 0,
    ) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, C // self.n_head)
        qk, v = qkv.split_with_sizes((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        if self.qk_norm:
            qk = F.layer_norm(qk, qk.shape[-1:])
        if turns is not None:
            qk = rotate(qk, turns)
        # (B, T, n_head, head_dim), (B, T, n_kv_head, head_dim)
        q, k = qk.split_with_sizes((self.n_head, self.n_kv_head), dim=2)
        if cache is not None:
            cache.add(layer, k, v)
        if cache is None or cache.length == 0:
            y = attend(q, k, v)
        else:
            y = attend_to(q, *cache.of(layer))
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = into = 4 * config.n_embd
        if config.activation == "swiglu":  # three matrices in place of two, of as many weights
            hidden = 64 * max(1, round(config.n_embd * 8 / 3 / 64))
            into = 2 * hidden
        self.c_fc = nn.Linear(config.n_embd, into, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)) over the last dimension, without parameters (Zhang & Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:])


def make_norm(config: GPTConfig) -> nn.Module:
    return RMSNorm() if config.norm == "rmsnorm" else nn.LayerNorm(config.n_embd, bias=config.bias)


class ShortConv(nn.Module):
    """x[t] + w[0] * x[t - 1] + w[1] * x[t - 2] ..., channel by channel; w begins at zero.

    It shows the MLP what stands just before, for which a layer of attention would be needed
    ("Canon layers", Allen-Zhu 2025).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.conv - 1, 1, config.n_embd))

    def forward(self, x: Tensor, cache: "Cache | None" = None, layer: int = 0) -> Tensor:
        T, n = x.shape[1], len(self.weight)
        padded = F.pad(x, (0, 0, n, 0)) if cache is None else cache.after_inputs(layer, x, n)
        y = x  # (B, T, C); padded (B, n + T, C)
        for k, w in enumerate(self.weight.to(x.dtype), 1):
            y = torch.addcmul(y, padded[:, n - k : n - k + T], w)
        return y


class Dropout(nn.Module):
    """In training, zeros in the place of a share p of the numbers, and the others larger by that.

    On a CPU 16 random bits decide on each, in a fraction of the time of torch's own (README).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2^16
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        bits = bits.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.conv = ShortConv(config) if config.conv > 1 else None
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        turns: Turns | None = None,
        cache: "Cache | None" = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), turns, cache, layer))
        y = self.ln_2(x)
        if self.conv is not None:
            y = self.conv(y, cache, layer)
        return x + self.drop(self.mlp(y))


class Cache:
    """What a GPT keeps of B texts, so that their next tokens alone have to be computed.

    Each layer's keys and values of the last `size` tokens, of which a further one takes the place
    of the oldest, and the last inputs of its conv. `length` counts the tokens seen, and
    next_logits() alone advances it. Texts may begin with one prompt, as a batch of 1. With learned
    positions there is no place beyond block_size, and next_logits() begins anew, at 0.

    What is to be captured must have the same shapes at every token, and read where it stands from a
    tensor: `position`, which next_logits() sets to `length`. Of it forward() makes the `place` that
    a token takes, and `seen`: attention goes to all `size` places, and this mask leaves out those
    that are not yet filled.
    """

    def __init__(self, config: GPTConfig, B: int, size: int):
        self.B, self.size, self.length = B, size, 0
        self.position = self.place = self.seen = None  # (1,), (1,), bool (1, size)
        self.keys, self.values, self.inputs = ([None] * config.n_layer for _ in range(3))

    def add(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep k and v (B or 1, T, n_kv_head, head_dim); T is 1 unless they are the first."""
        T = k.shape[1]
        if self.keys[layer] is None:  # in the dtype computed in, whatever that of the weights
            shape = (self.B, k.shape[2], self.size, k.shape[3])
            self.keys[layer], self.values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        assert T == 1 or self.length == 0
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self.length == 0:
                kept[:, :, :T] = new.transpose(1, 2)
            elif self.position is None:
                kept.select(2, self.length % self.size).copy_(new.select(1, 0))
            else:
                kept.index_copy_(2, self.place, new.transpose(1, 2))

    def of(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, n_kv_head, n, head_dim) that a further token sees, and `seen`."""
        keys, values = self.keys[layer], self.values[layer]
        if self.position is None:
            n = min(self.length + 1, self.size)
            keys, values = keys.narrow(2, 0, n), values.narrow(2, 0, n)
        return keys, values, self.seen

    def after_inputs(self, layer: int, x: Tensor, n: int) -> Tensor:
        """x (B or 1, T, C) after the n inputs before it, zeros where there are none."""
        if self.inputs[layer] is None:
            self.inputs[layer] = x.new_empty(self.B, n, x.shape[2])
        inputs = self.inputs[layer]
        before = inputs if self.length else x.new_zeros(x.shape[0], n, x.shape[2])
        padded = torch.cat((before, x), dim=1)
        inputs.copy_(padded[:, -n:])
        return padded


class LanguageModel(nn.Module):
    """What the GPT and the bigram model share: counting, and drawing tokens from logits."""

    config: GPTConfig

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations that training spends on a token, forward and backward."""
        raise NotImplementedError

    def activations_per_token(self) -> int:
        """Numbers that forward keeps for backward, roughly."""
        raise NotImplementedError

    @torch.inference_mode()
    def generate(
        self,
        idx: Tensor,
        uniforms: Tensor,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        n_ids: int | None = None,
        plain: bool = False,
        capture: Callable[[Callable], Callable] | None = None,
    ) -> Iterator[Tensor]:
        """Continue `idx` (B or 1, T) by N ids, yielding them (B,) position after position.

        `uniforms` (B, N) in [0, 1) decide the draws of each row, so that a row's text depends on
        its own numbers alone. Ids from `n_ids` on are never drawn; temperature 0 takes the
        likeliest id. Ids are computed from the last block_size ids: by `plain` from nothing else,
        anew for every id; without it from a cache, to the same ids until there are more than
        block_size. From then on a cache with rotary positions still holds, in the deeper layers,
        something of what it saw before; with learned positions the older half of the text is
        forgotten each time that it is full.

        `capture`, such as graphs.Captured, makes of the function that computes logits after one
        further token another that does the same in one launch.
        """
        B, N = uniforms.shape
        cache, forward_one = None if plain else self.new_cache(B, idx.shape[1] + N), None
        if cache and capture:
            cache.position = torch.zeros(1, dtype=torch.long, device=idx.device)
            forward_one = capture(lambda idx: self.forward(idx, cache=cache)[0])
        for u in uniforms.to(idx.device).unbind(1):
            logits = self.next_logits(idx, cache, forward_one)[:, :n_ids].expand(B, -1)
            new = choose(logits, u, temperature, top_k, top_p)  # (B,)
            yield new
            idx = torch.cat((idx[:, -self.config.block_size :].expand(B, -1), new[:, None]), dim=1)

    def new_cache(self, B: int, n_tokens: int) -> Cache | None:
        """A cache for B texts of at most n_tokens; None where a model needs none."""
        return None

    def numbers_to_generate(self, n_tokens: int) -> int:
        """Numbers held at a time, roughly, while a text grows to n_tokens."""
        return 8 * self.config.vocab_size

    def next_logits(
        self, idx: Tensor, cache: Cache | None = None, forward_one: Callable | None = None
    ) -> Tensor:
        """Logits (B, V) of what follows idx (B, T), of which the cache saw all but the last.

        `forward_one`, where there is one, takes forward()'s place for a single token (B, 1).
        """
        # forward itself: a compiled model would be compiled anew for each length
        logits, _ = self.forward(idx[:, -self.config.block_size :])
        return logits[:, -1]


class GPT(LanguageModel):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rotary:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew from torch's current random state, as GPT-2 did.

        | parameter                            | distribution                |
        |--------------------------------------|-----------------------------|
        | wte (and with it lm_head), wpe       | N(0, 0.02)                  |
        | attn.c_attn, mlp.c_fc: weight        | N(0, 0.02)                  |
        | attn.c_proj, mlp.c_proj: weight      | N(0, 0.02 / sqrt(2 n_layer))|
        | LayerNorms: weight                   | 1                           |
        | every bias, conv                     | 0                           |

        The two projections of each block write into the residual stream; the smaller scale keeps
        its variance from growing with depth.
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
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> Output:
        """Return logits (B, T, V) and None or, of targets (B, T), None and their mean loss in nats.

        Targets of -1 count for nothing. With a cache idx is what comes after the tokens that it
        has seen, a single one unless it is empty, and the logits are those of the last: (B, 1, V).
        """
        c = self.config
        start = cache.length if cache else 0
        end = start + idx.shape[1]
        position = cache.position if start else None  # where shapes must stay the same
        if position is not None:
            cache.place = position % cache.size
            cache.seen = torch.arange(cache.size, device=idx.device)[None] <= position
        x, turns = self.wte(idx), None  # (B, T, C)
        if c.rotary:
            at = torch.arange(start, end, device=idx.device) if position is None else position
            turns = rotary_turns(at, c.n_embd // c.n_head)
        else:
            x = x + (self.wpe.weight[start:end] if position is None else self.wpe(position))
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            x = block(x, turns, cache, layer)
        if cache:
            x = x[:, -1:]
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x), None
        return None, token_loss(x, self.lm_head.weight, targets)

    def new_cache(self, B: int, n_tokens: int) -> Cache:
        return Cache(self.config, B, min(n_tokens, self.config.block_size))

    def numbers_to_generate(self, n_tokens: int) -> int:
        c = self.config
        width = 2 * c.n_layer * c.n_embd * (c.n_kv_head or c.n_head) // c.n_head  # of the cache
        width += 16 * c.n_embd  # of a layer, when the newer half of a text is computed anew
        return min(n_tokens, c.block_size) * width + super().numbers_to_generate(n_tokens)

    def next_logits(
        self, idx: Tensor, cache: Cache | None = None, forward_one: Callable | None = None
    ) -> Tensor:
        if cache is None:
            return super().next_logits(idx)
        if cache.length == cache.size and not self.config.rotary:
            cache.length, idx = 0, idx[:, -max(1, cache.size // 2) :]
        idx = idx[:, -1:] if cache.length else idx[:, -cache.size :]
        if forward_one and cache.length:
            cache.position.fill_(cache.length)
            logits = forward_one(idx)
        else:
            logits, _ = self.forward(idx, cache=cache)
        cache.length += idx.shape[1]
        return logits[:, -1]

    def flops_per_token(self) -> int:
        """6 for each weight that multiplies a token, and 12 * n_layer * n_embd * block_size.

        A multiply-add is 2 operations and backward does twice the work of forward; the second term
        is attention, not halved for causality (PaLM, Chowdhery et al. 2022, appendix B). Looking
        up an embedding multiplies nothing; the output head does.
        """
        c = self.config
        weights = sum(p.numel() for p in self.h.parameters() if p.dim() == 2)
        weights += self.lm_head.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    def activations_per_token(self) -> int:
        """Of a block 16 times its width, and the logits."""
        return 16 * self.config.n_layer * self.config.n_embd + self.config.vocab_size

    @staticmethod
    def from_pretrained(name: str | Path, cache_dir: str = "") -> "GPT":
        """GPT-2 by its name, or the model in a folder of transformers' GPT-2.

        The names are gpt2, gpt2-medium, gpt2-large and gpt2-xl, which are downloaded once, and a
        folder holds config.json and model.safetensors. Without dropout, in float32, on the CPU. The
        weights stay mapped from the file: what is not used is not read, and a matrix that is stored
        the other way round becomes a view of it. Raises ValueError for what is missing, unknown, or
        of another shape, by name, and for parts that this model does not have.
        """
        from safetensors import safe_open  # here, so that this file needs torch alone

        from data.download import pretrained_folder

        folder = pretrained_folder(str(name), cache_dir)
        if folder is None:
            raise ValueError(f"{name} is no folder with a config.json, nor one of GPT-2's names")
        config = config_from_gpt2(json.loads((folder / "config.json").read_text("utf-8")))
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored_names, weights = file.keys(), {}
            if config.n_layer > len(stored_names):
                raise ValueError(f"{len(stored_names)} tensors are not n_layer={config.n_layer}")
            expected = {name: p.shape for name, p in outline("gpt", config).named_parameters()}
            for stored_name in stored_names:
                name = stored_name.removeprefix("transformer.")
                if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight", name):
                    continue  # the causal mask; the head, which is wte
                if name not in expected:
                    raise ValueError(f"unknown tensor {stored_name}")
                tensor = file.get_tensor(stored_name).float()
                if re.sub(r"h\.\d+\.", "", name) in TRANSPOSED and tensor.dim() == 2:
                    tensor = tensor.t()
                if tensor.shape != (shape := expected.pop(name)):
                    raise ValueError(
                        f"{stored_name} gives shape {tuple(tensor.shape)}, not {tuple(shape)}"
                    )
                weights[name] = tensor
        if expected:
            raise ValueError(f"tensor {min(expected)} is missing")
        return assemble("gpt", config, weights)


class Bigram(LanguageModel):
    """The next token from the last one alone: a table of logits, (V, V). Beat this first."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.normal_(self.wte.weight, 0, 0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Output:
        """As GPT.forward."""
        logits = self.wte(idx)  # (B, T, V)
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def next_logits(
        self, idx: Tensor, cache: Cache | None = None, forward_one: Callable | None = None
    ) -> Tensor:
        return self.wte(idx[:, -1])

    def flops_per_token(self) -> int:
        """None to speak of: a row is looked up, and its gradient added."""
        return 0

    def activations_per_token(self) -> int:
        return 3 * self.config.vocab_size


MODELS = {"gpt": GPT, "bigram": Bigram}


class Undrawn(TorchFunctionMode):
    """Within it no random numbers are drawn into tensors; on "meta" that would take a second."""

    DRAWING = (Tensor.normal_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def outline(kind: str, config: GPTConfig) -> LanguageModel:
    """A model that has shapes, on "meta", and no numbers: however large, it takes no memory."""
    with torch.device("meta"), Undrawn():
        return MODELS[kind](config)


def assemble(kind: str, config: GPTConfig, weights: dict[str, Tensor]) -> LanguageModel:
    """The model of which these tensors are the parameters, by name; they are not copied."""
    model = outline(kind, config)
    model.load_state_dict(weights, strict=False, assign=True)
    if isinstance(model, GPT):
        model.lm_head.weight = model.wte.weight
    return model


def pack(model: nn.Module) -> None:
    """Make a model good for inference on a CPU alone: plain functions in the place of its modules.

    Beside products of a few rows the calls of modules take their time too. Of its parameters those
    of the embeddings alone remain in sight.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Embedding):
            continue
        if isinstance(child, nn.ModuleList):
            for block in child:
                pack(block)
            function = [block.forward for block in child]
        elif isinstance(child, nn.Linear):
            function = packed_linear(child.weight.detach(), child.bias)
        elif isinstance(child, nn.LayerNorm):
            function = packed_norm(child)
        else:
            pack(child)
            function = child.forward
        delattr(model, name)
        setattr(model, name, function)


def packed_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer whose weights lie as products of a few rows on a CPU read them fastest."""
    onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype == torch.bfloat16 and onednn:
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")
    turned = weight.t().contiguous()
    return lambda x: x @ turned if bias is None else (x @ turned).add_(bias)


def packed_norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias = norm.normalized_shape, norm.weight, norm.bias
    return lambda x: torch.layer_norm(x, shape, weight, bias)


def fit(tensors: dict[str, Tensor], cfg: GPTConfig) -> dict[str, Tensor]:
    """A GPT's tensors with positions cropped to block_size and the vocabulary padded to vocab_size.

    Ids that are new get the mean embedding, and with it a middling logit: far below the likely
    ones. (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models")
    """
    fitted = dict(tensors)
    if "model.h.0.attn.c_attn.weight" not in tensors:  # the bigram model has nothing to fit
        return fitted
    wte = tensors["model.wte.weight"]
    if (missing := cfg.vocab_size - len(wte)) > 0:
        new = wte.mean(0, keepdim=True).expand(missing, -1)
        fitted["model.wte.weight"] = torch.cat((wte, new))
    if (wpe := tensors.get("model.wpe.weight")) is not None:
        fitted["model.wpe.weight"] = wpe[: cfg.block_size]
    return fitted


# ---- activations, positions, attention, draws ----------------------------------------------------


def relu2(x: Tensor) -> Tensor:
    """max(0, x)^2 (So et al. 2021, "Primer")."""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of the halves a and b of x (Shazeer 2020, "GLU Variants")."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": relu2,
    "swiglu": swiglu,
}


def rotary_turns(positions: Tensor, head_dim: int) -> Turns:
    """cos and sin (T, 1, head_dim / 2) of the angles by which a position turns its pairs.

    Pair j turns by position * 10000^(-2j / head_dim) (Su et al. 2021, "RoFormer").
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    angles = positions[:, None, None] * 10000.0 ** (-pairs / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turns: Turns) -> Tensor:
    """x (B, T, n_head, head_dim) turned; numbers j and j + head_dim / 2 of a vector are a pair."""
    cos, sin = (part.to(x.dtype) for part in turns)  # in bfloat16 to 3 digits, as x itself
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: softmax(q k^T / sqrt(head_dim)) v, shaped as q (B, T, n_head, head_dim).

    Each of k and v (B, T, n_kv_head, head_dim) serves n_head / n_kv_head queries (Ainslie et al.
    2023, "GQA"). Without dropout on the weights, which would take SDPA off its fused path (README).
    """
    if (queries := q.shape[2] // k.shape[2]) > 1:
        k, v = (x.repeat_interleave(queries, dim=2) for x in (k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] <= LONGEST_WRITTEN_OUT:
        return written_out(q, k, v)  # which is faster there (README)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, n_head, T, head_dim)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def attend_to(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of a single token's queries q (B, 1, n_head, head_dim), heads as in attend().

    They see all of keys and values (B, n_kv_head, n, head_dim), or those that `seen`, bool (1, n),
    marks. Returns (B, n_kv_head, n_head / n_kv_head, head_dim), the order of the heads in q.
    """
    q = q.view(len(q), keys.shape[1], -1, q.shape[3])  # that share a key and value
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)


LONGEST_WRITTEN_OUT = 512  # tokens


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attend() as two products of matrices, which keep all T * T weights of a head."""
    B, T, n_head, head_dim = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * n_head, T, head_dim)
    mask = q.new_full((T, T), -math.inf).triu(1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=head_dim**-0.5)  # (B * n_head, T, T)
    return (scores.softmax(-1) @ v).view(B, n_head, T, head_dim).transpose(1, 2)


def token_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits x weight^T, over the targets (B, T) that are not -1.

    x (B, T, C), weight (V, C).
    """
    return TokenLoss.apply(x.flatten(0, 1), weight, targets.flatten(), torch.is_grad_enabled())


class TokenLoss(torch.autograd.Function):
    """token_loss() of N tokens, which makes the gradients at once.

    The logits (N, V) are by far the largest tensor of a small model. They are kept once, in the
    dtype of the product, and become their own gradient, softmax(logits) less 1 at the target, a few
    rows at a time; so only these are ever there in float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, backward_follows: bool) -> Tensor:
        logits = F.linear(x, weight)
        exact = torch.promote_types(logits.dtype, torch.float32)
        at_a_time = LOGITS_AT_A_TIME["cpu" if x.device.type == "cpu" else "gpu"]
        rows = max(1, at_a_time // len(weight))
        loss_sum = torch.zeros((), dtype=exact, device=x.device)
        for some, t in zip(logits.split(rows), targets.split(rows), strict=True):
            log_probs = some.log_softmax(-1, dtype=exact)
            loss_sum += F.nll_loss(log_probs, t, ignore_index=-1, reduction="sum")
            if backward_follows:
                gradient = log_probs.exp_()
                gradient[torch.arange(len(t), device=t.device), t.clamp(min=0)] -= 1
                some.copy_(gradient.masked_fill_(t[:, None] < 0, 0))
        count = (targets >= 0).sum()
        if backward_follows:
            dx = logits @ weight.to(logits.dtype)
            dweight = logits.t() @ x.to(logits.dtype)
            ctx.save_for_backward(dx.to(x.dtype), dweight.to(weight.dtype), count)
        return loss_sum / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight, count = ctx.saved_tensors
        return dx * (grad / count), dweight * (grad / count), None, None


LOGITS_AT_A_TIME = {"cpu": 2**22, "gpu": 2**28}  # enough to keep it busy


def choose(
    logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    """Ids (B,) drawn from logits (B, V) by u (B,) in [0, 1); the likeliest at temperature 0.

    top_k leaves the k likeliest ids to draw from (Fan et al. 2018), top_p the fewest of these that
    hold a share p (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is None or top_k >= logits.shape[-1]:
        return draw(token_probs(logits, temperature, top_p), u)
    kept = logits.topk(top_k, sorted=False).indices.sort().values
    places = draw(token_probs(logits.gather(-1, kept), temperature, top_p), u)
    return kept.gather(-1, places[:, None])[:, 0]


def token_probs(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities (B, V) from logits (B, V): tempered, then those of the likeliest that hold a
    share top_p, at least one."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # with the largest logit at 0, no temperature above 0 is too small to divide by
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probs.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # the share held by likelier ids
        keep = (before < top_p).scatter(-1, order, before < top_p)
        probs = probs.where(keep, 0)
    return probs


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Ids (B,) where the cumulative distribution of probs (B, V) passes u (B,), u in [0, 1)."""
    exact = torch.float32 if probs.device.type == "mps" else torch.float64  # all that it has
    cumulative = probs.cumsum(-1, dtype=exact)
    passed = u[:, None].to(exact) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, passed, right=True).squeeze(-1)
    return ids.where(ids < probs.shape[-1], probs.argmax(-1))  # u so near 1 that it rounded up


# ---- GPT-2 as transformers stores it ------------------------------------------------------------

# Names are the same on both sides, after "transformer." there; the matrices of a block are stored
# the other way round, (in, out), since GPT-2 wrote its linear layers as convolutions of width 1.
TRANSPOSED = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
SIZES = {  # ours: theirs
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
FIXED = {  # what config.json may also say, and where this model is the only way
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "n_inner": None,
}


def config_from_gpt2(about: dict) -> GPTConfig:
    """GPTConfig from a config.json; ValueError names what this model does not have."""
    if type(about) is not dict:
        raise ValueError("config.json is no JSON object")
    for name, value in FIXED.items():
        if about.get(name, value) != value:
            raise ValueError(f"config.json: {name}={about[name]}, but this model has {value}")
    activation = about.get("activation_function", "gelu_new")
    if activation not in GPT2_ACTIVATIONS.values():
        raise ValueError(f"config.json: activation_function={activation} is not known here")
    ours = {theirs: name for name, theirs in GPT2_ACTIVATIONS.items()}[activation]
    if missing := [name for name in SIZES.values() if type(about.get(name)) is not int]:
        raise ValueError(f"config.json: {missing[0]} is missing, or is no whole number")
    sizes = {name: about[theirs] for name, theirs in SIZES.items()}
    if not all(1 <= size <= 10**8 for size in sizes.values()):
        raise ValueError("config.json: sizes must be in [1, 1e8]")
    return GPTConfig(**sizes, activation=ours)


def config_to_gpt2(config: GPTConfig) -> dict:
    """The config.json of a model; ValueError names the parts of it that GPT-2 does not have."""
    gpt2 = GPTConfig()
    foreign = [
        f"{name}={getattr(config, name)}"
        for name in ("norm", "rotary", "qk_norm", "n_kv_head", "conv")
        if getattr(config, name) != getattr(gpt2, name)
    ]
    if config.activation not in GPT2_ACTIVATIONS:
        foreign.append(f"activation={config.activation}")
    if foreign:
        raise ValueError(f"transformers' GPT-2 has no {', '.join(foreign)}")
    return {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        **{theirs: getattr(config, name) for name, theirs in SIZES.items()},
        "activation_function": GPT2_ACTIVATIONS[config.activation],
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "use_cache": True,
    }


def weights_to_gpt2(model: GPT) -> dict[str, Tensor]:
    """The tensors of a model under the names, and in the layout, of transformers' GPT-2.

    That has biases everywhere: a model without them gets zeros.
    """
    c, tensors = model.config, {}
    for name, p in model.named_parameters():
        kind = re.sub(r"h\.\d+\.", "", name)
        p = p.detach()
        tensors[f"transformer.{name}"] = (p.t() if kind in TRANSPOSED else p).contiguous()
        if not c.bias and name.endswith(".weight") and not name.startswith(("wte", "wpe")):
            tensors[f"transformer.{name.removesuffix('weight')}bias"] = torch.zeros(p.shape[0])
    return tensors
