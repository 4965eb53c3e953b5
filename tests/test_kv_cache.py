"""Promise: generation from a cache gives what model.generate() computes anew for every token."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import TracedGraph
from test_model import MODERN, SHAPES, SMALL, every_part, scrambled
from torch.nn import functional as F

import folio.generation
import model as model_py
from folio.ensemble import Ensemble
from folio.fast import half_linear, packed_linear
from folio.generation import KVCache, generate, prepare_for_sampling, sample_token
from model import GPT, Bigram

SIZE = 36  # block_size
LONG = 3 * SIZE


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lively(config):
    """A model whose texts do not soon repeat, and in which every part has an effect."""
    model = scrambled(replace(config, n_layer=2, n_embd=64, block_size=SIZE))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.mul_(0.2).add_(name.endswith("weight"))
        model.wte.weight *= 0.3
    return model


def draws(rows, n):
    return torch.rand(rows, n, generator=torch.Generator().manual_seed(1))


def generated(model, idx, n, **options):
    """The ids (B, n) that follow idx; B is 3 if idx is a single prompt."""
    uniforms = draws(max(3, len(idx)), n)
    return torch.stack(list(generate(model, idx, uniforms, **options)), dim=1)


def itemsize(dtype):
    return dtype.itemsize


def feed(model, idx, start, static=False):
    """Logits (B, V) after start, start + 1, ... tokens of idx (B, T), by a cache."""
    cache = KVCache(model.config, len(idx), idx.shape[1], static)
    steps = [idx[:, :start], *idx[:, start:].split(1, dim=1)]
    logits = []
    for step in steps:
        logits.append(model(step, cache=cache)[0][:, -1])
        cache.move_to(cache.length + step.shape[1])
    return logits, cache


@every_part
@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_same_tokens_as_the_plain_generate(config, length, temperature):
    """In float64, up to block_size, from one prompt for each text and from one for all."""
    model = lively(config)
    for rows in (3, 1):
        idx = torch.randint(65, (rows, length))
        options = {"temperature": temperature, "top_k": 20}
        n = SIZE - length
        plain = model.generate(idx.expand(3, -1), draws(3, n), **options)
        expected = torch.stack(list(plain), dim=1)
        assert torch.equal(generated(model, idx, n, **options), expected)
        assert rows == 1 or len(expected.unique()) > 5


@every_part
@pytest.mark.parametrize("static", [False, True])
def test_the_same_logits_in_float32(config, static):
    model, idx = lively(config).float(), torch.randint(65, (3, SIZE))
    with torch.inference_mode():
        cached, cache = feed(model, idx, 10, static)
        assert not static or cache.keys[0].shape[2] % 16 == 0, "or SDPA copies the mask"
        expected, _ = model(idx)
    for t, logits in enumerate(cached, 9):
        assert (logits - expected[:, t]).abs().max() < 1e-4, t


@pytest.mark.parametrize("config", [SMALL, SHAPES["conv"], SHAPES["qk_norm"]])
def test_with_learned_positions_the_newer_half_is_kept(config):
    """Past block_size, a text continues from the newer half of what it was."""
    model = lively(config)
    ids = torch.randint(65, (3, 10))
    ids = torch.cat((ids, generated(model, ids, LONG)), dim=1)
    start = 0
    for t in range(10, ids.shape[1]):
        if t - start > SIZE:
            start = t - SIZE // 2
        logits, _ = model(ids[:, start:t])
        u = draws(3, LONG)[:, t - 10]
        assert torch.equal(sample_token(logits[:, -1], u, 1.0, None, 1.0), ids[:, t]), t


@pytest.mark.parametrize("config", [MODERN, SHAPES["rotary"]])
@pytest.mark.parametrize("length", [10, SIZE, 50])
def test_with_rotary_positions_every_layer_attends_to_the_last_block(config, length, monkeypatch):
    """Past block_size, as if each token of the whole text attended to the last block_size."""
    model = lively(config)
    ids = torch.randint(65, (3, length))
    ids = torch.cat((ids, generated(model, ids, LONG, temperature=0)), dim=1)
    ids = ids[:, max(0, length - SIZE) :]  # what the cache has never held

    def banded(q, k, v, mask):
        T, n_shared = q.shape[2], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(n_shared, dim=1) for x in (k, v))
        band = torch.ones(T, T).tril().bool() & torch.ones(T, T).triu(1 - SIZE).bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)

    monkeypatch.setattr(model_py, "attention", banded)
    logits, _ = model(ids)
    expected = logits.argmax(-1)[:, min(length, SIZE) - 1 : -1]
    assert torch.equal(ids[:, min(length, SIZE) :], expected)


@every_part
@pytest.mark.parametrize("n", [1, 2, LONG])
def test_a_cuda_graph_gives_the_same_tokens(config, n, monkeypatch):
    """Also past block_size, where learned positions start again."""
    model, idx = lively(config), torch.randint(65, (3, 10))
    models = [model, Bigram(config), Ensemble([lively(config), lively(config)]).eval()]
    expected = [generated(model, idx, n, top_k=20, top_p=0.9) for model in models]
    monkeypatch.setattr(folio.generation, "CudaGraph", TracedGraph)
    monkeypatch.setattr(folio.generation, "GRAPH_DEVICES", ("cpu",))
    for model, ids in zip(models, expected, strict=True):
        assert torch.equal(generated(model, idx, n, top_k=20, top_p=0.9), ids)


def test_a_text_does_not_depend_on_those_beside_it():
    model, idx = lively(MODERN), torch.randint(65, (5, 10))
    together = generated(model, idx, LONG)
    for row, uniforms in enumerate(draws(5, LONG).split(1)):
        alone = torch.cat(list(generate(model, idx[row : row + 1], uniforms)))
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("config, most", [(MODERN, LONG + 10), (SMALL, 3 * LONG)])
def test_it_computes_each_token_once(config, most):
    """With learned positions about twice, because of the newer halves."""
    model, counts = lively(config), []
    model.wte.register_forward_hook(lambda module, args, output: counts.append(args[0].shape[1]))
    generated(model, torch.randint(65, (1, 10)), LONG)
    assert LONG <= sum(counts) <= most


def test_the_cache_is_freed_with_its_text(monkeypatch):
    """At once, without Python's garbage collector: the next batch of texts needs its memory."""
    made = []

    def noted(*args, **kwargs):
        cache = KVCache(*args, **kwargs)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(folio.generation, "KVCache", noted)
    gc.disable()
    try:
        generated(lively(MODERN), torch.zeros(1, 1, dtype=torch.long), 5)
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def test_the_bigram_needs_no_cache():
    model, idx = Bigram(SMALL), torch.randint(65, (3, 10))
    expected = torch.stack(list(model.generate(idx, draws(3, 100))), dim=1)
    assert torch.equal(generated(model, idx, 100), expected)
    assert len(expected.unique()) > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_keeps_float32_at_least_on_a_cpu(dtype):
    model, idx = lively(replace(MODERN, conv=3)).to(dtype), torch.randint(65, (2, 20))
    with torch.inference_mode():
        logits, cache = feed(model, idx, 10)
    assert cache.keys[0].dtype == cache.values[1].dtype == max(dtype, torch.float32, key=itemsize)
    assert logits[-1].dtype == dtype


@pytest.mark.parametrize("config", [SMALL, MODERN, replace(SMALL, n_layer=1, n_embd=256)])
@pytest.mark.parametrize("dtype, within", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_fast_layout_gives_the_same_logits(config, dtype, within):
    model, idx = lively(config).float(), torch.randint(65, (3, SIZE))
    with torch.inference_mode():
        expected, _ = model(idx)
        if dtype == "bfloat16":
            expected -= expected.mean(-1, keepdim=True)
        prepare_for_sampling(model, dtype)
        logits, _ = model(idx)
        cached, _ = feed(model, idx, 10)
    assert logits.dtype == getattr(torch, dtype)
    assert (logits - expected).norm() < within * expected.norm()
    cached = torch.stack(cached, dim=1)
    assert (cached - expected[:, 9:]).norm() < within * expected[:, 9:].norm()
    called = [m for m in model.modules() if m is not model]
    assert all(isinstance(m, torch.nn.Embedding) for m in called), "functions instead of modules"


@pytest.mark.parametrize("config", [SMALL, MODERN, replace(SMALL, n_layer=1, n_embd=256)])
def test_float16_weights_give_the_same_logits(config):
    model, idx = lively(config).float(), torch.randint(65, (1, SIZE))
    with torch.inference_mode():
        expected, _ = model(idx)
        expected -= expected.mean(-1, keepdim=True)
        prepare_for_sampling(model, "float16")
        cached = torch.stack(feed(model, idx, 10)[0], dim=1)
    assert cached.dtype == torch.float32
    error = (cached - expected[:, 9:]).norm() / expected[:, 9:].norm()
    assert 1e-5 < error < 2e-3


def test_one_token_is_multiplied_in_float16():
    """Several are slow there; so they are in float32."""
    weight, x = torch.randn(8, 16), torch.randn(1, 3, 16)
    linear = half_linear(weight, None)
    assert torch.equal(linear(x[:, :1]), F.linear(x[:, :1].half(), weight.half()).float())
    assert torch.equal(linear(x), F.linear(x, weight.half().float()))


def test_what_float16_cannot_hold_is_computed_in_float32():
    weight, bias, x = torch.randn(8, 16), torch.randn(8), torch.randn(1, 1, 16)
    for scale_x, scale_weight in ((1, 1), (1e6, 1), (100, 1e4), (1, 1e6)):
        expected = F.linear(x * scale_x, weight * scale_weight, bias)
        y = half_linear(weight * scale_weight, bias)(x * scale_x)
        assert (y - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "n_embd, capable, single, dtype, linear",
    [
        (256, {"avx2", "avx512_bf16"}, True, torch.bfloat16, packed_linear),
        (128, {"avx2", "avx512_bf16"}, True, torch.float32, packed_linear),
        (256, {"avx2"}, False, torch.float32, packed_linear),
        (256, {"avx2"}, True, torch.float32, half_linear),
        (128, {"avx2"}, True, torch.float32, packed_linear),
        (256, {}, True, torch.float32, packed_linear),
    ],
)
def test_auto_is_the_fastest_for_the_cpu(monkeypatch, n_embd, capable, single, dtype, linear):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capable, True))
    bfloat16 = "avx512_bf16" in capable
    monkeypatch.setattr("folio.machine.cpu_has_bfloat16", lambda: bfloat16)
    made_by = []
    monkeypatch.setattr(folio.generation, "pack", lambda model, linear: made_by.append(linear))
    model = GPT(replace(SMALL, n_layer=1, n_embd=n_embd))
    prepare_for_sampling(model, single=single)
    assert (model.wte.weight.dtype, made_by) == (dtype, [linear])


def test_a_table_stays_in_float32(monkeypatch):
    monkeypatch.setattr("folio.machine.cpu_has_bfloat16", lambda: True)
    bigram = Bigram(replace(SMALL, n_embd=768))
    prepare_for_sampling(bigram)
    assert bigram.wte.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype, within", [("bfloat16", 0.02), ("float16", 0.002)])
def test_16_bits_keep_the_probabilities_of_logits_far_from_zero(dtype, within):
    """GPT-2's are near -100, where bfloat16 has nothing between two halves."""
    model, idx = lively(SMALL).float(), torch.randint(65, (1, SIZE))
    with torch.inference_mode():
        model.wte.weight[:, 0] += 1
        model.ln_f.weight[0], model.ln_f.bias[0] = 0, -100
        expected, _ = model(idx)
        prepare_for_sampling(model, dtype)
        logits = torch.stack(feed(model, idx, 1)[0], dim=1)
    assert expected.mean() < -90
    assert (logits.float().softmax(-1) - expected.softmax(-1)).abs().max() < within


def test_attention_takes_sdpas_result_in_any_layout(monkeypatch):
    """On CUDA it is another in float32."""
    model, sdpa = lively(SHAPES["n_kv_head"]), F.scaled_dot_product_attention
    expected = generated(model, torch.zeros(3, 1, dtype=torch.long), 10)

    def other(*args, **kwargs):
        return sdpa(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    assert torch.equal(generated(model, torch.zeros(3, 1, dtype=torch.long), 10), expected)
