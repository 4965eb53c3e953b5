"""Promise: several models predict as one, and teach another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MODERN, load
from test_kv_cache import SMALL, lively
from torch.nn import functional as F

import evaluate
import sample
import train
from folio import generation
from folio.ensemble import Ensemble
from folio.fast import token_loss
from folio.generation import generate, prepare_for_sampling
from model import GPT, Bigram

WIDE = replace(SMALL, n_layer=1, n_embd=64, vocab_size=70)
ROTARY = replace(SMALL, rotary=True, qk_norm=True, conv=3, n_layer=3)


def mean_probs(models, idx):
    probs = [model(idx)[0][..., :65].double().softmax(-1) for model in models]
    return torch.stack(probs).mean(0)


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [lively(SMALL), lively(WIDE), lively(ROTARY), Bigram(SMALL).double()]


def test_its_probabilities_are_the_mean(models):
    idx, targets = torch.randint(65, (2, 3, 20))
    expected = mean_probs(models, idx)
    model = Ensemble(models)
    logits, _ = model(idx)
    assert torch.allclose(logits.double().exp(), expected, atol=1e-6)
    targets[0, :5] = -1
    _, loss = model(idx, targets)
    picked = expected.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert loss.item() == pytest.approx(-picked.log()[targets >= 0].mean().item(), abs=1e-6)


def test_its_context_is_that_of_the_model_with_the_shortest():
    models = [GPT(replace(SMALL, block_size=n)) for n in (12, 8, 10)]
    idx, uniforms = torch.zeros(1, 1).long(), torch.rand(1, 30)
    assert Ensemble(models).config.block_size == 8
    assert len(list(generate(Ensemble(models).eval(), idx, uniforms))) == 30


def test_it_generates_with_a_cache_what_it_does_without(models):
    model, idx, uniforms = Ensemble(models[:3]).eval(), torch.randint(65, (3, 5)), torch.rand(3, 9)
    expected = torch.stack(list(model.generate(idx, uniforms)), 1)
    assert torch.equal(torch.stack(list(generate(model, idx, uniforms)), 1), expected)


@pytest.mark.parametrize("config", [SMALL, ROTARY])
def test_a_model_and_itself_generate_what_it_does_alone(config):
    """Also beyond block_size."""
    model, twin, idx, uniforms = (
        lively(config),
        lively(config),
        torch.zeros(1, 1).long(),
        torch.rand(2, 100),
    )
    twin.load_state_dict(model.state_dict())
    expected = torch.stack(list(generate(model, idx, uniforms)), 1)
    both = torch.stack(list(generate(Ensemble([model, twin]).eval(), idx, uniforms)), 1)
    assert (both == expected).float().mean() == 1


def test_a_batch_has_room_for_all_models(monkeypatch):
    """In whatever order they are named."""
    monkeypatch.setattr(generation, "available_memory", lambda _: 2**28)
    small, wide = GPT(SMALL), GPT(replace(SMALL, n_embd=512))

    def largest(*models):
        model = models[0] if len(models) == 1 else Ensemble(list(models))
        return len(next(generation.batches(model, 1, 10_000, 20)))

    assert largest(small, wide) == largest(wide, small) < largest(wide) < largest(small) < 10_000


def test_models_of_every_kind_generate_together(models):
    model, idx, uniforms = (
        Ensemble(models).float().eval(),
        torch.zeros(1, 1).long(),
        torch.rand(2, 9),
    )
    plain = torch.stack(list(model.generate(idx.expand(2, 1), uniforms)), 1)
    prepare_for_sampling(model, "float32")
    assert not any(isinstance(m, torch.nn.Linear) for m in model.modules()), "functions instead"
    assert torch.equal(torch.stack(list(generate(model, idx, uniforms)), 1), plain)


def test_the_scripts_take_several_checkpoints(train_small, capsys):
    assert train_small("--max_iters=20", "--out_dir=a") == 0
    assert train_small("--max_iters=20", "--out_dir=b", "--seed=2", *MODERN) == 0
    tokens = ("--max_new_tokens=40", "--temperature=0")
    texts = []
    for names in ("a", "b", "a,b", "b,a", "a,a"):
        capsys.readouterr()
        assert sample.main([f"--checkpoint={names}", *tokens, "--prompt=The "]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert ("the mean of several models" in err) == ("," in names)
    assert texts[2] == texts[3] and texts[4] == texts[0]
    Path("text.txt").write_text("The text of a test. " * 50)
    bits = {}
    for names in ("a", "b", "a,b"):
        argv = [f"--checkpoint={names}", "--task=bits_per_byte", "--input=text.txt"]
        assert evaluate.main(argv) == 0
        bits[names] = float(capsys.readouterr().out.split()[-1])
    assert bits["a,b"] < (bits["a"] + bits["b"]) / 2, "the logarithm is concave"


def test_other_tokenizers_are_refused(train_small, data_dir, capsys):
    import prepare

    Path("other.txt").write_text("another alphabet: 0123456789 " * 100)
    assert prepare.main(["--name=other", "--input=other.txt", "--data_dir=."]) == 0
    small = ("--max_iters=1", "--num_samples=0")
    assert train_small(*small, "--out_dir=a") == 0
    assert train_small(*small, "--out_dir=b", "--dataset=other", "--data_dir=.") == 0
    assert sample.main(["--checkpoint=a,b"]) == 2
    assert "b has another tokenizer than a" in capsys.readouterr().err
    assert sample.main(["--checkpoint=a,nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert train_small("--teacher=b", "--out_dir=c") == 2
    assert "--teacher=b has another tokenizer than the data set" in capsys.readouterr().err
    assert train_small("--teacher=a", "--block_size=32", "--out_dir=c") == 2
    assert "block_size=16, which is less than 32" in capsys.readouterr().err
    assert train_small("--teacher=a", "--model=bigram", "--out_dir=c") == 2
    assert not Path("c").exists()


def test_the_loss_with_a_teacher_is_the_mean_of_two():
    x, weight, targets = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(11, (2, 5))
    probs = torch.randn(2, 5, 11).softmax(-1)
    log_probs = (x @ weight.t()).log_softmax(-1)
    text = F.nll_loss(log_probs.flatten(0, 1), targets.flatten())
    taught = -(probs * log_probs).sum(-1).mean()
    assert token_loss(x, weight, targets, probs).item() == pytest.approx(
        (text + taught).item() / 2, abs=1e-6
    )


def test_a_run_learns_from_teachers(train_small, resume_run, capsys):
    """Two of them teach more than the text alone, and a resume goes on with them."""
    for seed in (1, 2):
        assert train_small("--max_iters=300", f"--seed={seed}", f"--out_dir=t{seed}") == 0
    losses = {}
    for teacher in ("", "t1,t2"):
        assert train_small(f"--teacher={teacher}", "--max_iters=60") == 0
        tensors, meta = load("run/ckpt.safetensors")
        losses[teacher] = meta["progress"]["val_loss"]
    assert losses["t1,t2"] < losses[""] - 0.005, losses
    assert meta["run_config"]["teacher"] == "t1,t2"
    options = ("--teacher=t1,t2", "--max_iters=60", "--out_dir=parts")
    assert train_small(*options, "--snapshot_interval=30") == 0
    again = "--checkpoint=parts/snapshots/iter_000030.safetensors"
    assert train.main(["--init_from=resume", "--out_dir=parts", again]) == 0
    resumed, _ = load("parts/ckpt.safetensors")
    assert all(torch.equal(t, resumed[k]) for k, t in tensors.items() if k.startswith("model."))


def test_a_resume_takes_no_other_model_for_the_teacher(train_small, resume_run, capsys):
    few = ("--max_iters=2", "--num_samples=0")
    assert train_small(*few, "--out_dir=old") == 0
    assert train_small(*few, "--teacher=old") == 0
    Path("old").rename("moved")
    assert train_small(*few, "--seed=1", "--out_dir=old") == 0
    assert resume_run("--max_iters=3") == 2
    assert "--teacher=old is not the model that taught run/ckpt" in capsys.readouterr().err
    assert resume_run("--max_iters=3", "--teacher=moved") == 0
    assert resume_run("--max_iters=4") == 0
    assert resume_run("--max_iters=5", "--teacher=old") == 0, "another name: it is meant"


def test_a_new_run_does_not_move_its_teacher(train_small, capsys):
    few = ("--max_iters=2", "--num_samples=0")
    assert train_small(*few, "--out_dir=old") == 0
    for teacher in ("old", "moved,old/best.safetensors"):
        assert train_small(*few, f"--teacher={teacher}", "--out_dir=old") == 2
        assert "is in --out_dir=old, where a new run moves it aside" in capsys.readouterr().err
