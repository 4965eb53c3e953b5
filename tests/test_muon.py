"""Promise: Muon is torch.optim.Muon, many matrices at a time; AdamW skips the same steps."""

from types import SimpleNamespace

import pytest
import torch

from folio.optim import AdamW, Muon, orthogonalize

SHAPES = [(96, 32), (32, 32), (128, 32), (32, 128), (32, 32)]


def make(weights, optimizer=lambda params, **options: Muon(params, [1] * len(params), **options)):
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    return params, optimizer(params, lr=0.03, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("found_inf", [None, torch.tensor(0.0)])
def test_it_updates_as_torch_does(found_inf):
    """To within the rounding of the last product, over steps that build on each other."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    ours, muon = make(weights)
    theirs, reference = make(weights, torch.optim.Muon)
    muon.found_inf = found_inf
    for step in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (muon, reference):
            optimizer.param_groups[0]["lr"] = 0.03 / (1 + step)
            optimizer.step()
        for p, q, before in zip(ours, theirs, weights, strict=True):
            assert (p - before).abs().max() > 1e-3
            assert torch.allclose(p, q, atol=2e-6, rtol=0)
            buffers = muon.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
            assert torch.equal(*buffers)


def test_pieces_are_updated_as_if_they_were_alone():
    torch.manual_seed(0)
    whole, grad = torch.randn(96, 32), torch.randn(96, 32)
    p, alone = torch.nn.Parameter(whole.clone()), whole.clone().chunk(3)
    alone = [torch.nn.Parameter(part.clone()) for part in alone]
    p.grad = grad
    for part, g in zip(alone, grad.chunk(3), strict=True):
        part.grad = g.clone()
    Muon([p], [3], lr=0.03).step()
    Muon(alone, [1, 1, 1], lr=0.03).step()
    assert torch.equal(p, torch.cat(alone))
    assert not torch.equal(p, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 128)])
def test_singular_values_come_near_1(shape, dtype):
    torch.manual_seed(0)
    x = orthogonalize(torch.randn(shape), dtype)
    singular = torch.linalg.svdvals(x.float())
    assert x.dtype == dtype and 0.4 < singular.min() and singular.max() < 1.3


def test_a_step_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    (p,), muon = make([torch.randn(32, 128)])
    p.grad = torch.randn_like(p)
    muon.found_inf = torch.tensor(0.0)
    muon.step()
    weight, momentum = p.detach().clone(), muon.state[p]["momentum_buffer"].clone()
    p.grad = torch.full_like(p, torch.nan)
    muon.found_inf = torch.tensor(1.0)
    muon.step()
    assert torch.equal(p, weight)
    assert torch.equal(muon.state[p]["momentum_buffer"], momentum)


def test_adamw_skips_a_step_on_mps_too():
    """Where torch's kernel may not look at found_inf."""
    p = torch.nn.Parameter(torch.ones(4))
    adamw, p.grad = AdamW([p], lr=0.1, fused=True), torch.ones(4)
    adamw.found_inf = SimpleNamespace(device=torch.device("mps"))  # as true as a tensor of 1
    adamw.step()
    assert torch.equal(p, torch.ones(4))
    for found_inf in (torch.tensor(1.0), torch.tensor(0.0)):
        adamw.found_inf = found_inf
        adamw.step()
        assert torch.equal(p, torch.ones(4)) == bool(found_inf)


def test_zeros_stay_zeros():
    (p,), muon = make([torch.zeros(32, 32)])
    p.grad = torch.zeros_like(p)
    muon.step()
    assert torch.equal(p, torch.zeros(32, 32))
