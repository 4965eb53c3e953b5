"""Promise: what is captured once and repeated is what would have been computed step by step.

A CUDA graph needs a GPU. Here its part is played by a recording of every operation that the step
calls, with its tensors, which is repeated as a graph is: on the same memory, without Python. As
with a graph, to capture a step changes nothing, and a step in which the host waits cannot be.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MODERN
from test_kv_cache import LONG, generate, lively
from test_model import SMALL, every_part
from test_train import rows, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graphs
import sample
import train as script
from data.tokenizer import ByteTokenizer
from graphs import Captured
from model import Bigram
from sample import SampleConfig, TextStream


def tensors(nested):
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


class Recording(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph and torch.cuda.graph."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host waits for a number")
        for i, about in enumerate(func._schema.arguments):
            if about.alias_info and about.alias_info.is_write:
                changed = args[i] if i < len(args) else kwargs[about.name]
                self.before += [(t, t.detach().clone()) for t in tensors(changed)]
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(tensors(out), tensors(again), strict=True):
                if kept.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    kept.copy_(new)


@contextmanager
def record(graph, stream):
    with graph:
        yield
    graph.undo()


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What graphs.py calls of torch, without a GPU."""
    made = []

    def new_graph():
        made.append(Recording())
        return made[-1]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        device=lambda device: nullcontext(),
        stream=lambda stream: nullcontext(),
        current_stream=lambda: stream,
        CUDAGraph=new_graph,
        graph=record,
    )
    monkeypatch.setattr(graphs, "side_stream", lambda device: stream)
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(as_tensor=torch.as_tensor, cuda=cuda))
    return made


def captured(step):
    return Captured(step, "cpu")


def test_a_step_is_repeated_on_new_inputs():
    seen, total = [], torch.zeros(3)

    def step(x, factor):
        seen.append(x)
        total.add_(x)
        return total * factor

    again, expected = captured(step), torch.zeros(3)
    outputs = []
    for i in range(5):
        x = torch.full((3,), float(i))
        expected = expected + x
        outputs.append(again(x, 2 * i))
        assert torch.equal(total, expected)
        assert torch.equal(outputs[-1], expected * 2 * i)
    assert len(seen) == 2, "once as it is, once captured"
    assert torch.equal(outputs[1], torch.full((3,), 2.0)), "an output stays what it was"


def test_what_the_host_waits_for_cannot_be_captured():
    again = captured(lambda x: x + x.sum().item())
    again(torch.ones(3))
    with pytest.raises(RuntimeError, match="host waits"):
        again(torch.ones(3))


@every_part
@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_text(config, rows, gpu):
    """Far beyond block_size, where learned positions begin anew and rotary ones go on."""
    model, idx = lively(config), torch.randint(65, (rows, 5))
    options = {"temperature": 1.0, "top_k": 20}
    expected = generate(model, idx, LONG, **options)
    assert torch.equal(generate(model, idx, LONG, capture=captured, **options), expected)
    assert len(gpu) == 1 and len(expected.unique()) > 5


def test_samples_are_drawn_from_a_graph(gpu):
    model, tok, ids = lively(SMALL), ByteTokenizer(), np.arange(5)
    texts = []
    for cuda_graphs in (False, True):
        streams = [TextStream(tok) for _ in range(3)]
        options = SampleConfig(max_new_tokens=20, cuda_graphs=cuda_graphs)
        list(sample.complete(model, streams, ids, options))
        texts.append([stream.ids for stream in streams])
    assert texts[0] == texts[1] and len(gpu) == 1


def test_the_bigram_model_has_nothing_to_capture(gpu):
    model, idx = Bigram(SMALL), torch.zeros(3, 1, dtype=torch.long)
    assert torch.equal(generate(model, idx, 9, capture=captured), generate(model, idx, 9))
    assert not gpu


@pytest.fixture
def train_captured(train, monkeypatch):
    """Train with --cuda_graphs, which a CPU refuses."""
    choose_machine = script.choose_machine

    def choose(cfg, threads):
        return replace(choose_machine(replace(cfg, cuda_graphs=False), threads), cuda_graphs=True)

    def call(*argv):
        with monkeypatch.context() as patch:
            patch.setattr(script, "choose_machine", choose)
            return train(*argv)

    return call


@pytest.mark.parametrize("parts", [(), MODERN, ("--micro_batch_size=2",), ("--dropout=0",)])
def test_training_comes_to_the_same(train, train_captured, parts, gpu):
    """With its schedule, its dropout, its evaluations; the learning rate is rounded otherwise."""
    assert train(*parts) == 0
    assert train_captured(*parts, "--out_dir=captured") == 0
    assert len(gpu) == 2
    for one, two in zip(rows(), rows("captured"), strict=True):
        for name in ("iter_num", "tokens", "lr", "loss", "train_loss", "val_loss", "grad_norm"):
            assert one[name] == two[name] == "" or float(two[name]) == pytest.approx(
                float(one[name]), rel=1e-4
            ), name
    one, two = weights("run/ckpt.safetensors"), weights("captured/ckpt.safetensors")
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm(), name


def test_divergence_is_noticed_where_it_was(train, train_captured, capsys):
    words = ("--learning_rate=1e20", "--grad_clip=0", "--warmup_iters=3", "--schedule=constant")
    words += ("--dropout=0", "--max_iters=100", "--eval_interval=100")
    errors = []
    for call in (train, train_captured):
        capsys.readouterr()
        assert call(*words) == 3
        errors.append(capsys.readouterr().err)
    assert "diverged at iteration" in errors[0]
    assert errors[1].split(":")[1] == errors[0].split(":")[1]


def test_what_cannot_be_captured_is_said(train, train_captured, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("operation not permitted\nand much more")

    monkeypatch.setattr(script, "add_gradient", fail)
    assert train_captured() == 2
    said = "error: an update failed (operation not permitted); --cuda_graphs=False may help\n"
    assert capsys.readouterr().err.endswith(said)
    with pytest.raises(RuntimeError, match="much more"):
        train()


def test_a_cpu_has_none(train, capsys):
    assert train("--cuda_graphs") == 2
    assert "cuda_graphs needs CUDA; on cpu leave it out" in capsys.readouterr().err
    assert sample.main(["--device=cpu", "--cuda_graphs"]) == 2
    assert "cuda_graphs needs CUDA; on cpu leave it out" in capsys.readouterr().err
