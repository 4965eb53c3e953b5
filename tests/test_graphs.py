"""Promise: updates that a GPU replays as CUDA graphs train as others. A CPU traces them instead."""

from pathlib import Path

import pytest
import torch
from conftest import MODERN, TracedGraph, load

import folio.run
from folio import machine, metrics


class NotReplayed:
    """Tensors instead of numbers, as a graph has them, and nothing else."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*map(torch.as_tensor, args))


@pytest.mark.parametrize("parts", [(), MODERN, ("--model=bigram",)])
@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_a_run_ends_in_the_same_bits(train_small, monkeypatch, parts, micro_batch_size):
    words = (*parts, "--dropout=0", f"--micro_batch_size={micro_batch_size}")
    assert train_small(*words, "--out_dir=plain") == 0
    monkeypatch.setattr(machine, "uses_cuda_graphs", lambda model, cfg: True)
    for name, graph in {"not_replayed": NotReplayed, "replayed": TracedGraph}.items():
        monkeypatch.setattr(folio.run, "CudaGraph", graph)
        assert train_small(*words, f"--out_dir={name}") == 0
    (plain, *_), (expected, *_), (tensors, *_) = (
        load(f"{name}/ckpt.safetensors") for name in ("plain", "not_replayed", "replayed")
    )
    for name, tensor in expected.items():
        if name != "sha256":
            assert torch.equal(tensors[name], tensor), name
            assert torch.allclose(tensor, plain[name], rtol=1e-3, atol=1e-5), name
    for column in ("lr", "loss", "grad_norm"):
        expected, values = (
            [row[column] for row in metrics.read_metrics(Path(name, "metrics.csv"))]
            for name in ("plain", "replayed")
        )
        assert [float(x or 0) for x in values] == pytest.approx([float(x or 0) for x in expected])
