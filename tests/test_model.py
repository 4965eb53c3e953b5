"""Promise: the model is GPT-2, it learns, and it does not look ahead."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHAKESPEARE, needs_shakespeare
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.errors import UserError
from folio import fast
from folio.fast import MATMUL_ATTENTION_BLOCK, Dropout, token_loss
from folio.options import build_options
from model import (
    GPT,
    Bigram,
    GPTConfig,
    attention,
    rope_cos_sin,
    rotate,
)

SMALL = GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65)
PARTS = {
    "activation": "relu2",
    "norm": "rmsnorm",
    "rotary": True,
    "qk_norm": True,
    "n_kv_head": 2,
    "key_shift": True,
    "conv": 3,
}
MODERN = replace(SMALL, **PARTS)
SHAPES = {"gpt2": SMALL, "modern": MODERN}
SHAPES |= {name: replace(SMALL, **{name: value}) for name, value in PARTS.items()}
SHAPES["swiglu"] = replace(SMALL, activation="swiglu")
every_part = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_batch(config, B=8):
    idx = torch.randint(config.vocab_size, (B, config.block_size + 1))
    return idx[:, :-1], idx[:, 1:]


def test_gpt2_has_124_439_808_parameters():
    with torch.device("meta"):
        assert GPT(GPTConfig()).n_params() == 124_439_808


def test_as_many_heads_of_keys_as_of_queries_are_gpt2s():
    assert GPTConfig(n_kv_head=12) == GPTConfig()


def test_the_usual_baby_size_builds():
    baby = GPTConfig(6, 6, 384, 256, 65, dropout=0.2, bias=False)
    with torch.device("meta"):
        assert GPT(baby).n_params() == 10_745_088


@every_part
def test_the_untrained_loss_is_ln_v(config):
    _, loss = GPT(config)(*random_batch(config, B=64))
    # with newer parts x is more of the last token's own embedding, whose weights the head shares
    assert abs(loss.item() - math.log(65)) < (0.05 if config is SMALL else 0.1)


def test_the_untrained_loss_of_the_bigram_is_ln_v():
    _, loss = Bigram(SMALL)(*random_batch(SMALL, B=64))
    assert abs(loss.item() - math.log(65)) < 0.05


def test_init_weights_draws_its_table():
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, block_size=256, vocab_size=500))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 20, name
    assert model.lm_head.weight is model.wte.weight


@every_part
@pytest.mark.parametrize("bias", [True, False])
def test_it_overfits_one_batch(bias, config):
    config = replace(config, n_layer=2, n_embd=64, block_size=32, bias=bias)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    idx, targets = random_batch(config, B=4)
    idx[:, 0] = torch.arange(4)  # two rows that begin alike could not both be learned
    for _ in range(400):
        _, loss = model(idx, targets)
        if loss.item() < 0.01:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"loss {loss.item()}")


def scrambled(config):
    """A model in float64 with weights large enough for every part to matter."""
    model = GPT(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@every_part
def test_it_does_not_look_ahead(config):
    model = scrambled(config)
    idx, _ = random_batch(config, B=1)
    logits, _ = model(idx)
    for t in (0, 1, 31, 63):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 65
        other, _ = model(changed)
        assert torch.equal(other[0, :t], logits[0, :t]), t
        assert not torch.allclose(other[0, t:], logits[0, t:]), t


@every_part
def test_positions_matter(config):
    """Without them the last position of a single layer sees a set of tokens."""
    idx = torch.tensor([[5, 6, 6, 7], [6, 5, 6, 7]])
    logits, _ = scrambled(replace(config, n_layer=1))(idx)
    assert not torch.allclose(logits[0, 3], logits[1, 3])


def test_rotary_positions_are_relative():
    """The product of a query and a key depends on how far apart they stand, and on that."""
    rope = rope_cos_sin(torch.arange(50), head_dim=16)
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 50, 1, 16) for _ in range(2))
    products = rotate(q, rope)[0, :, 0] @ rotate(k, rope)[0, :, 0].T  # (50, 50)
    for distance in (0, 1, 30):
        on_diagonal = products.diagonal(distance)
        assert torch.allclose(on_diagonal, on_diagonal[:1].expand_as(on_diagonal), atol=1e-4)
    assert not torch.allclose(products[0, 1], products[0, 30], atol=1e-2)
    assert torch.allclose(products[0, 0], (q[0, 0, 0] * k[0, 0, 0]).sum(), atol=1e-4)


def test_the_length_of_queries_and_keys_does_not_matter_with_qk_norm():
    model, idx = scrambled(MODERN), random_batch(MODERN)[0]
    before, _ = model(idx)
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight[: 128 + 64] *= 10  # four queries, two keys
            block.attn.c_attn.bias[: 128 + 64] *= 10
    assert torch.allclose(model(idx)[0], before, atol=1e-3)


def test_rms_norm_and_relu2_are_what_their_formulas_say():
    model, x = GPT(MODERN), torch.randn(3, 128) * 100
    assert torch.allclose(model.ln_f(x), x / x.square().mean(-1, keepdim=True).sqrt(), atol=1e-4)
    mlp = scrambled(MODERN).h[0].mlp
    x = x.double()
    assert torch.allclose(mlp(x), mlp.c_proj(mlp.c_fc(x).clamp(min=0) ** 2))


def test_swiglu_is_what_its_formula_says():
    """In three matrices of about as many weights as the two of GPT-2's MLP."""
    gpt2, mlp = GPT(SMALL).h[0].mlp, scrambled(SHAPES["swiglu"]).h[0].mlp
    x = torch.randn(3, 128).double()
    a, b = mlp.c_fc(x).split(320, dim=-1)
    assert torch.allclose(mlp(x), mlp.c_proj(a * torch.sigmoid(a) * b))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (gpt2, mlp)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_the_convolution_is_what_its_formula_says():
    conv, x = scrambled(replace(SMALL, conv=3)).h[0].conv, torch.randn(2, 10, 128).double()
    y, (one, two) = conv(x), conv.weight[:, 0]
    assert torch.allclose(y[:, 0], x[:, 0])
    assert torch.allclose(y[:, 1], x[:, 1] + one * x[:, 0])
    assert torch.allclose(y[:, 9], x[:, 9] + one * x[:, 8] + two * x[:, 7])
    fresh = GPT(replace(SMALL, conv=3)).h[0].conv
    assert torch.equal(fresh(x.float()), x.float()), "at first it changes nothing"


def test_half_of_each_key_is_that_of_the_token_before():
    """Of RoPE's pairs, j and j + 16, either both elements or none."""
    attn, k = GPT(replace(SMALL, key_shift=True)).h[0].attn, torch.randn(2, 10, 4, 32)
    shifted = attn.shift_half(k, None)
    for kept, moved in ((slice(0, 8), slice(8, 16)), (slice(16, 24), slice(24, 32))):
        assert torch.equal(shifted[..., kept], k[..., kept])
        assert torch.equal(shifted[:, 1:, :, moved], k[:, :-1, :, moved])
        assert not shifted[:, 0, :, moved].any()


def test_a_layer_with_shifted_keys_attends_to_what_followed_the_same_token():
    """Which is what it takes to continue a text that is repeated."""
    attn = GPT(replace(SMALL, n_head=1, n_embd=32, key_shift=True)).h[0].attn
    tokens = torch.tensor([3, 1, 4, 5, 9, 2, 6, 1])  # the last one was followed by a 4
    x = F.one_hot(tokens, 32).float()[None]
    with torch.no_grad():
        attn.c_attn.weight.zero_()
        attn.c_attn.bias.zero_()
        moved = torch.arange(8, 16)  # these elements of a key are the token before it
        attn.c_attn.weight[moved, torch.arange(8)] = 50.0  # queries
        attn.c_attn.weight[32 + moved, torch.arange(8)] = 1.0  # keys
        attn.c_attn.weight[64 + torch.arange(32), torch.arange(32)] = 1.0  # values
        attn.c_proj.weight.copy_(torch.eye(32))
        attn.c_proj.bias.zero_()
        y = attn(x)[0, -1]
    assert y.argmax() == 4 and y[4] > 0.9


def test_heads_share_keys_and_values():
    """As if the weights of each key and value stood there once for every query."""
    few, many = scrambled(replace(SMALL, n_kv_head=2)), scrambled(SMALL)
    state = few.state_dict()
    for name, part in list(state.items()):
        if "c_attn" in name:
            q, k, v = part.split((128, 64, 64))  # two heads of 32 each
            k, v = (x.view(2, 32, *x.shape[1:]).repeat_interleave(2, 0) for x in (k, v))
            state[name] = torch.cat((q, k.flatten(0, 1), v.flatten(0, 1)))
    many.load_state_dict(state)
    idx, _ = random_batch(SMALL)
    assert few.n_params() < many.n_params()
    assert torch.allclose(few(idx)[0], many(idx)[0])


@pytest.mark.parametrize("T", [1, 10, 64, MATMUL_ATTENTION_BLOCK + 1])
def test_attention_in_bfloat16_is_attention(T):
    """By matrix products, or by SDPA where it is long; with its gradient."""
    qkv = torch.randn(3, 1, 4, T, 32).bfloat16()
    halves, exact = (x.clone().requires_grad_() for x in (qkv, qkv.float()))
    y, expected = attention(*halves), attention(*exact)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected, atol=0.03)
    weights = torch.randn_like(expected)
    (y.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(halves.grad.float(), exact.grad, atol=0.1)


def test_attention_is_what_the_formula_says():
    """SDPA's fused path against softmax(q k^T / sqrt(D)) v, written out."""
    attn = GPT(SMALL).double().h[0].attn
    x = torch.randn(2, 10, 128, dtype=torch.float64)
    q, k, v = (p.view(2, 10, 4, 32).transpose(1, 2) for p in attn.c_attn(x).split(128, dim=2))
    scores = q @ k.transpose(-2, -1) / math.sqrt(32)
    scores = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf)
    y = attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 10, 128))
    assert torch.allclose(attn(x), y, atol=1e-12)


@pytest.mark.parametrize("at_a_time", [2**22, 1000, 1])
@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_the_loss_is_cross_entropy_whatever_is_held_at_a_time(
    monkeypatch, at_a_time, dtype, within
):
    """Its gradients too: those of torch's own."""
    monkeypatch.setitem(fast.CHUNK_LOGITS, "cpu", at_a_time)
    x, weight = torch.randn(2, 7, 16).double(), torch.randn(300, 16).double()
    x, weight = (p.to(dtype).requires_grad_() for p in (x, weight))
    targets = torch.randint(300, (2, 7))
    targets[0, 3:5] = -1
    loss = token_loss(x, weight, targets)
    logits = x.double() @ weight.double().t()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    with torch.inference_mode():
        assert torch.equal(token_loss(x, weight, targets), loss)
    assert loss.item() == pytest.approx(expected.item(), rel=within)
    for ours, exact in zip(
        torch.autograd.grad(3 * loss, (x, weight)),
        torch.autograd.grad(3 * expected, (x, weight)),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= within * exact.norm()


def test_in_float16_a_large_batch_does_not_overflow_the_gradient():
    """100,000 tokens with one target sum to more than its largest number, 65,504."""
    x, weight = torch.ones(1, 100_000, 4).half(), torch.zeros(3, 4).half().requires_grad_()
    loss = token_loss(x, weight, torch.zeros(1, 100_000, dtype=torch.long))
    (grad,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3])[:, None].expand(3, 4)
    assert torch.allclose(grad.float(), expected, atol=1e-3)


def test_compiled_the_loss_is_the_plain_one(monkeypatch):
    """Unrolled, the rows of TokenLoss would take a minute to compile."""
    x, weight = torch.randn(2, 7, 16), torch.randn(30, 16)
    targets = torch.randint(-1, 30, (2, 7))
    expected = token_loss(x, weight, targets)
    monkeypatch.setattr(fast, "TokenLoss", None)
    compiled = torch.compile(token_loss, backend="eager")
    assert torch.allclose(compiled(x, weight, targets), expected)


def test_ignored_targets_count_for_nothing():
    model = GPT(SMALL)
    idx, targets = random_batch(SMALL)
    masked = targets.clone()
    masked[:, 10:] = -1
    _, loss = model(idx, masked)
    _, alone = model(idx[:, :10], targets[:, :10])
    assert loss.item() == pytest.approx(alone.item(), abs=1e-5)


def test_dropout_works_in_training_only():
    model = GPT(GPTConfig(2, 2, 32, 16, 65, dropout=0.5))
    idx, _ = random_batch(model.config)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.999999])
def test_dropout_drops_a_share_and_keeps_the_mean(p):
    x = torch.ones(3, 333, 1001, requires_grad=True)
    y = Dropout(p)(x)
    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=2e-3)
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)), rtol=1e-3) or p > 0.9
    assert y.mean().item() == pytest.approx(1, abs=5e-3) or p > 0.9
    (y * 2).sum().backward()
    assert torch.equal(x.grad, 2 * y), "what is dropped learns nothing"
    ones = (y != 0).float()
    for lag in (1, 2, 3, 4, 1001):  # neighbours know nothing of each other
        together = (ones.flatten()[lag:] * ones.flatten()[:-lag]).mean().item()
        assert together == pytest.approx((1 - dropped) ** 2, abs=2e-3)


@pytest.mark.parametrize("sublayer", ["attn", "mlp"])
def test_half_of_what_a_sublayer_adds_is_dropped(sublayer):
    block = GPT(GPTConfig(1, 2, 32, 16, 65, dropout=0.5)).h[0]
    for name in ("attn", "mlp"):
        c_proj = getattr(block, name).c_proj
        torch.nn.init.zeros_(c_proj.weight)
        torch.nn.init.constant_(c_proj.bias, float(name == sublayer))
    added = block(torch.zeros(4, 16, 32))
    assert set(added.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (added == 0).float().mean() < 0.6


@pytest.mark.parametrize("config", [SMALL, GPTConfig(2, 2, 96, 128, 300)])
def test_flops_per_token_are_what_torch_counts(config):
    """Attention as two products of matrices, so that torch sees all of them."""
    model = GPT(config)
    idx, targets = random_batch(config, B=2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, targets)[1].backward()
    assert counter.get_total_flops() / idx.numel() == model.flops_per_token()


def test_a_width_that_does_not_divide_among_the_heads_is_refused():
    with pytest.raises(UserError, match="n_embd=100 is not a multiple of n_head=3"):
        build_options(GPTConfig, {"n_embd": 100, "n_head": 3})
    with pytest.raises(UserError, match="not a multiple of n_kv_head=3; use one of 1, 2, 4"):
        build_options(GPTConfig, {"n_head": 4, "n_kv_head": 3})


@needs_shakespeare
def test_the_trained_bigram_finds_the_counts():
    """Its best training loss is the entropy of pairs, counted."""
    text = np.frombuffer(SHAKESPEARE.read_bytes(), np.uint8)
    ids = torch.from_numpy(np.unique(text, return_inverse=True)[1]).long()
    pairs = torch.bincount(ids[:-1] * 65 + ids[1:], minlength=65 * 65).view(65, 65).double()
    joint = pairs / pairs.sum()
    entropy = -(joint * (pairs / pairs.sum(1, keepdim=True)).log().nan_to_num(neginf=0)).sum()

    model = Bigram(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 400)
    for _ in range(400):
        start = torch.randint(len(ids) - 50_001, ())
        chunk = ids[start : start + 50_001]
        _, loss = model(chunk[None, :-1], chunk[None, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        _, loss = model(ids[None, :-1], ids[None, 1:])
    assert loss.item() == pytest.approx(entropy.item(), abs=0.01)
