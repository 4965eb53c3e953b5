"""Promise: updates that a GPU replays as CUDA graphs train as others. A CPU traces them instead."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MODERN, ROOT, TracedGraph, load

import folio.run
from folio import checkpoint, distributed, fast, generation, machine, metrics
from folio.options import read_options
from train import TrainConfig

RECIPES = ROOT / "config"


class NotReplayed:
    """Converts numbers to tensors, as CudaGraph does, but runs the function every time."""

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


def test_a_divergence_is_where_it_is_without_graphs(train_small, monkeypatch, capsys):
    words = ("--learning_rate=1e20", "--grad_clip=0", "--warmup_iters=3", "--schedule=constant")
    words += ("--dropout=0",)
    assert train_small(*words) == 3
    expected = capsys.readouterr().err
    assert "training diverged at iteration" in expected
    monkeypatch.setattr(machine, "uses_cuda_graphs", lambda model, cfg: True)
    monkeypatch.setattr(folio.run, "CudaGraph", TracedGraph)
    assert train_small(*words) == 3
    assert capsys.readouterr().err == expected


def on_a_gpu(*argv):
    """The options of a run on a GPU, and its model without weights."""
    given, _ = read_options(TrainConfig, [*map(str, argv), "--device=cuda", "--vocab_size=65"])
    cfg = TrainConfig(**{"dtype": "bfloat16", "micro_batch_size": 1, **given})
    return checkpoint.empty_model(cfg.model, cfg, "meta"), cfg


@pytest.mark.parametrize(
    ("argv", "compiles"),
    [
        ([RECIPES / "shakespeare_char.py"], False),
        ([RECIPES / "shakespeare_char_gpt2.py"], False),
        ([RECIPES / "train_gpt2.py"], True),
        (["--minutes=1"], False),
        (["--minutes=10"], True),
        (["--max_iters=0", "--patience=3", "--schedule=constant"], True),
        ([RECIPES / "train_gpt2.py", "--compile=False"], False),
        (["--minutes=1", "--compile"], True),
    ],
)
def test_only_long_runs_are_compiled(monkeypatch, argv, compiles):
    monkeypatch.setattr(machine, "peak_flops", lambda device: 989e12)
    assert machine.compiles(*on_a_gpu(*argv)) is compiles


def test_float32_and_an_unknown_gpu_are_slower(monkeypatch):
    recipe = RECIPES / "shakespeare_char_gpt2.py"
    monkeypatch.setattr(machine, "peak_flops", lambda device: 989e12)
    assert machine.compiles(*on_a_gpu(recipe, "--dtype=float32"))
    monkeypatch.setattr(machine, "peak_flops", lambda device: None)
    assert machine.compiles(*on_a_gpu(recipe))


def test_a_run_goes_on_without_graphs_that_cannot_be_recorded(train_small, monkeypatch, capsys):
    """And so do its samples; it is said once."""

    def refuse():
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    monkeypatch.setattr(fast.CudaGraph, "can_record", True)
    monkeypatch.setattr(machine, "uses_cuda_graphs", lambda model, cfg: True)
    words = ("--dropout=0", *MODERN)
    monkeypatch.setattr(folio.run, "CudaGraph", NotReplayed)
    assert train_small(*words, "--out_dir=not_replayed") == 0
    monkeypatch.setattr(folio.run, "CudaGraph", fast.CudaGraph)
    monkeypatch.setattr(generation, "GRAPH_DEVICES", ("cpu",))
    capsys.readouterr()
    assert train_small(*words, "--out_dir=refused") == 0
    said = "slower, as CUDA graphs cannot be used: operation not permitted\n"
    assert capsys.readouterr().err.count(said) == 1
    (expected, _), (tensors, _) = (
        load(f"{name}/ckpt.safetensors") for name in ("not_replayed", "refused")
    )
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    texts = [Path(name, "samples.txt").read_text() for name in ("not_replayed", "refused")]
    assert texts[0] == texts[1]


def test_graphs_are_used_where_nothing_prevents_them(monkeypatch):
    def has_memory(n_bytes):
        monkeypatch.setattr(machine, "available_memory", lambda device: n_bytes)

    has_memory(2**31)
    assert not machine.uses_cuda_graphs(*on_a_gpu())
    has_memory(2**34)
    assert machine.uses_cuda_graphs(*on_a_gpu())
    for argv in ("--device=cpu", "--dtype=float16", "--activation_checkpointing=half"):
        model, cfg = on_a_gpu()
        name, _, value = argv.removeprefix("--").partition("=")
        assert not machine.uses_cuda_graphs(model, replace(cfg, **{name: value})), argv
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert not machine.uses_cuda_graphs(*on_a_gpu())
