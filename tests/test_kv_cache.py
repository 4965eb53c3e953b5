"""Promise: from a cache comes what the plain path computes anew for every token."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from test_model import MODERN, SHAPES, SMALL, every_part, scrambled
from torch.nn import functional as F

import model as model_py
from model import GPT, Bigram
from sample import SampleConfig, make_fast

SIZE = 32  # block_size
LONG = 3 * SIZE


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lively(config):
    """A model whose texts do not soon go in circles: every part of it says something of its own."""
    model = scrambled(replace(config, n_layer=2, n_embd=64, block_size=SIZE))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.mul_(0.2).add_(name.endswith("weight"))
        model.wte.weight *= 0.3
    return model


def generate(model, idx, n, **options):
    uniforms = torch.rand(max(3, len(idx)), n, generator=torch.Generator().manual_seed(1))
    return torch.stack(list(model.generate(idx, uniforms, **options)), dim=1)  # (B, n)


@every_part
@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_same_tokens_in_float64(config, length, temperature):
    """As many as block_size, from a prompt for each text and from one for all."""
    model = lively(config)
    for rows in (3, 1):
        idx = torch.randint(65, (rows, length))
        options = {"temperature": temperature, "top_k": 20, "top_p": 0.9}
        n = SIZE - length
        expected = generate(model, idx, n, plain=True, **options)
        assert torch.equal(generate(model, idx, n, **options), expected)
        assert rows == 1 or len(expected.unique()) > 5


@every_part
def test_the_same_logits_in_float32(config):
    model, idx = lively(config).float(), torch.randint(65, (3, SIZE))
    with torch.inference_mode():
        cache = model.new_cache(3, SIZE)
        for t in range(10, SIZE + 1):
            logits = model.next_logits(idx[:, :t], cache)
            assert (logits - model.next_logits(idx[:, :t])).abs().max() < 1e-4, t


@pytest.mark.parametrize("config", [SMALL, SHAPES["conv"], SHAPES["qk_norm"]])
def test_with_learned_positions_the_newer_half_goes_on(config):
    """Past block_size, a text is what the plain path makes of the half that was kept."""
    model = lively(config)
    ids = torch.randint(65, (3, 10))
    ids = torch.cat((ids, generate(model, ids, LONG)), dim=1)
    kept = 0
    for t in range(10, ids.shape[1]):
        if t - kept > SIZE:
            kept = t - SIZE // 2
        logits, _ = model(ids[:, kept:t])
        u = torch.rand(3, LONG, generator=torch.Generator().manual_seed(1))[:, t - 10]
        assert torch.equal(model_py.choose(logits[:, -1], u, 1.0, None, 1.0), ids[:, t]), t


@pytest.mark.parametrize("config", [MODERN, SHAPES["rotary"]])
@pytest.mark.parametrize("length", [10, SIZE, 50])
def test_with_rotary_positions_every_layer_sees_the_last_block(config, length, monkeypatch):
    """Past block_size, as if the whole text went through attention to the last block_size."""
    model = lively(config)
    ids = torch.randint(65, (3, length))
    ids = torch.cat((ids, generate(model, ids, LONG, temperature=0)), dim=1)
    ids = ids[:, max(0, length - SIZE) :]  # what the cache never saw

    def banded(q, k, v):
        T, n_shared = q.shape[1], q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(n_shared, dim=1) for x in (k, v))
        seen = torch.ones(T, T).tril().bool() & torch.ones(T, T).triu(1 - SIZE).bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    monkeypatch.setattr(model_py, "attend", banded)
    logits, _ = model(ids)
    expected = logits.argmax(-1)[:, min(length, SIZE) - 1 : -1]
    assert torch.equal(ids[:, min(length, SIZE) :], expected)


def test_a_text_does_not_depend_on_those_beside_it():
    model, idx = lively(MODERN), torch.randint(65, (5, 10))
    together = generate(model, idx, LONG)
    uniforms = torch.rand(5, LONG, generator=torch.Generator().manual_seed(1))
    for row in range(5):
        alone = torch.cat(list(model.generate(idx[row : row + 1], uniforms[row : row + 1])))
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("config, most", [(MODERN, LONG + 10), (SMALL, 3 * LONG)])
def test_it_computes_each_token_once(config, most):
    """With learned positions about twice, where the newer half begins anew."""
    model, seen = lively(config), []
    model.wte.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    generate(model, torch.randint(65, (1, 10)), LONG)
    assert LONG <= sum(seen) <= most


@pytest.mark.parametrize("capture", [None, lambda step: step])
def test_the_cache_goes_with_its_text(monkeypatch, capture):
    """At once, without Python's collector: the next batch of texts wants its memory."""
    model, made = lively(MODERN), []
    new_cache = model.new_cache

    def noted(*args):
        cache = new_cache(*args)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model, "new_cache", noted)
    gc.disable()
    try:
        generate(model, torch.zeros(1, 1, dtype=torch.long), 5, capture=capture)
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def test_the_bigram_needs_none():
    model, idx = Bigram(SMALL), torch.randint(65, (3, 10))
    assert torch.equal(model.next_logits(idx), model(idx)[0][:, -1])
    assert len(generate(model, idx, 50).unique()) > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_keeps_what_autocast_computes_in(dtype):
    model, idx = lively(replace(MODERN, conv=3)).float(), torch.randint(65, (2, 10))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        cache = model.new_cache(2, 20)
        for t in range(10, 20):
            logits = model.next_logits(idx[:, :t], cache)
            new = logits.argmax(-1, keepdim=True)
            idx = torch.cat((idx, new), dim=1)
    assert cache.keys[0].dtype == dtype


@pytest.mark.parametrize("config", [SMALL, MODERN])
@pytest.mark.parametrize("dtype, within", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_fast_layout_gives_the_same_logits(config, dtype, within):
    model, idx = lively(config).float(), torch.randint(65, (3, SIZE))
    with torch.inference_mode():
        expected, _ = model(idx)
        if dtype == "bfloat16":
            expected -= expected.mean(-1, keepdim=True)
        make_fast(model, SampleConfig(dtype=dtype))
        logits, _ = model(idx)
        cache = model.new_cache(3, SIZE)
        last = [model.next_logits(idx[:, :t], cache) for t in range(10, SIZE + 1)]
    assert logits.dtype == getattr(torch, dtype)
    assert (logits - expected).norm() < within * expected.norm()
    cached = torch.stack(last, dim=1)
    assert (cached - expected[:, 9:]).norm() < within * expected[:, 9:].norm()
    called = [m for m in model.modules() if m is not model]
    assert all(isinstance(m, torch.nn.Embedding) for m in called), "functions in place of modules"


def test_wide_models_are_sampled_in_bfloat16_where_the_cpu_has_it(monkeypatch):
    for n_embd, capable, dtype in (
        (256, True, torch.bfloat16),
        (128, True, torch.float32),
        (256, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capable: {"avx512_bf16": c})
        model = GPT(replace(SMALL, n_layer=1, n_embd=n_embd))
        make_fast(model, SampleConfig())
        assert model.wte.weight.dtype == dtype
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    bigram = Bigram(replace(SMALL, n_embd=768))
    make_fast(bigram, SampleConfig())
    assert bigram.wte.weight.dtype == torch.float32


def test_bfloat16_keeps_the_probabilities_of_logits_far_from_zero():
    """GPT-2's lie about -100, where bfloat16 has nothing between two halves."""
    model, idx = lively(SMALL).float(), torch.randint(65, (3, SIZE))
    with torch.inference_mode():
        model.wte.weight[:, 0] += 1
        model.ln_f.weight[0], model.ln_f.bias[0] = 0, -100
        expected, _ = model(idx)
        make_fast(model, SampleConfig(dtype="bfloat16"))
        logits, _ = model(idx)
    assert expected.mean() < -90
    assert (logits.float().softmax(-1) - expected.softmax(-1)).abs().max() < 0.02


def test_attention_takes_sdpas_answer_in_any_layout(monkeypatch):
    """On CUDA it is another in float32."""
    model, sdpa = lively(SHAPES["n_kv_head"]), F.scaled_dot_product_attention
    expected = generate(model, torch.zeros(3, 1, dtype=torch.long), 10)

    def other(*args, **kwargs):
        return sdpa(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    assert torch.equal(generate(model, torch.zeros(3, 1, dtype=torch.long), 10), expected)
