"""Promise: on a GPU everything is as on a CPU, but for rounding. Skipped where there is none."""

import pytest
import torch
from conftest import MODERN, SMALL, load
from test_distributed import Processes
from test_kv_cache import SHAPES, generated, lively
from torch.nn import functional as F

import sample
import train
from folio import generation, machine
from folio.fast import token_loss

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PLAIN = ("--dropout=0", "--compile=False")


def state(run: str) -> tuple[dict, dict]:
    return load(f"{run}/ckpt.safetensors")


def val_loss(run: str) -> float:
    return state(run)[1]["progress"]["val_loss"]


@pytest.mark.parametrize("parts", [(), MODERN])
def test_float32_comes_to_the_loss_of_a_cpu(train_small, parts):
    assert train_small(*PLAIN, *parts, "--out_dir=cpu") == 0
    assert train_small(*PLAIN, *parts, f"--device={DEVICE}", "--out_dir=gpu") == 0
    assert val_loss("gpu") == pytest.approx(val_loss("cpu"), abs=2e-3)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("compile", ["False", "True"])
def test_half_precision_and_compiling_come_close(train_small, dtype, compile):
    assert train_small(*PLAIN, *MODERN, "--out_dir=cpu") == 0
    words = (f"--device={DEVICE}", f"--dtype={dtype}", f"--compile={compile}", "--out_dir=gpu")
    assert train_small(*PLAIN, *MODERN, *words) == 0
    assert val_loss("gpu") == pytest.approx(val_loss("cpu"), abs=0.05)


@pytest.mark.parametrize("compile", ["False", "True"])
@pytest.mark.parametrize("parts", [(), MODERN, ("--teacher=cpu",)])
def test_graphs_train_as_kernels_do_alone(train_small, monkeypatch, capsys, parts, compile):
    """Also with dropout, of which the masks are the same if nothing is compiled."""
    assert train_small("--out_dir=cpu", "--max_iters=2") == 0
    dropout = "--dropout=0" if compile == "True" else "--dropout=0.1"
    words = (*parts, f"--device={DEVICE}", f"--compile={compile}", "--micro_batch_size=4", dropout)
    capsys.readouterr()
    assert train_small(*words, "--out_dir=graphs") == 0
    out, err = capsys.readouterr()
    assert ", CUDA graphs" in out and "cannot be used" not in err
    monkeypatch.setattr(machine, "uses_cuda_graphs", lambda model, cfg: False)
    assert train_small(*words, "--out_dir=kernels") == 0
    assert ", CUDA graphs" not in capsys.readouterr().out
    assert val_loss("graphs") == pytest.approx(val_loss("kernels"), abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_micro_batches_train_the_same(train_small, dtype):
    words = (*PLAIN, f"--device={DEVICE}", f"--dtype={dtype}")
    assert train_small(*words, "--out_dir=whole") == 0
    assert train_small(*words, "--micro_batch_size=2", "--out_dir=parts") == 0
    assert val_loss("parts") == pytest.approx(val_loss("whole"), abs=5e-3)


def test_deterministic_runs_and_resumes_end_in_the_same_bits(train_small, resume_run):
    words = (f"--device={DEVICE}", "--dtype=bfloat16", "--deterministic", *MODERN)
    assert train_small(*words, "--out_dir=one") == 0
    assert train_small(*words, "--max_iters=10", "--lr_decay_iters=20") == 0
    assert resume_run("--max_iters=20") == 0
    (one, _), (two, _) = state("one"), state("run")
    for name, tensor in one.items():
        assert name == "sha256" or torch.equal(tensor, two[name]), name


def test_a_loss_that_is_no_number_ends_with_3(train_small, capsys):
    words = ("--learning_rate=1e20", "--grad_clip=0", "--warmup_iters=3", "--max_iters=100")
    assert train_small(f"--device={DEVICE}", "--schedule=constant", *words) == 3
    assert "training diverged" in capsys.readouterr().err


@pytest.fixture
def one_gib():
    """All but a GiB of the GPU is in use."""
    torch.cuda.empty_cache()
    used = torch.empty(torch.cuda.mem_get_info()[0] - 2**30, dtype=torch.uint8, device=DEVICE)
    yield
    del used
    torch.cuda.empty_cache()


@pytest.mark.parametrize("estimated", [True, False])
def test_a_batch_that_does_not_fit(train_small, one_gib, capsys, monkeypatch, estimated):
    """It is halved until it fits, whether the estimate knows that or not; if asked for, refused."""
    words = ("--batch_size=4096", "--n_embd=512", "--block_size=256", "--compile=False")
    words += ("--max_iters=2", f"--device={DEVICE}")
    if not estimated:
        monkeypatch.setattr("folio.machine.available_memory", lambda device: None)
    assert train_small(*words) == 0
    assert state("run")[1]["run_config"]["micro_batch_size"] < 4096
    assert train_small(*words, "--micro_batch_size=4096") == 2
    message = "training needs about" if estimated else "out of memory: use --micro_batch_size"
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_process_samples_on_two_gpus():
    model, idx = lively(SHAPES["rotary"]), torch.randint(65, (3, 10))
    expected = generated(model, idx, 60)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        assert torch.equal(generated(model.to(device), idx.to(device), 60).cpu(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_gpus_train_as_one(data_dir, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL, f"--data_dir={data_dir}", f"--device={DEVICE}", f"--dtype={dtype}"]
    argv += ["--micro_batch_size=2", "--compile=False"]
    more = {"ddp": [], "compiled": ["--compile"], "muon": MODERN}
    if dtype != "float16":
        more |= {"fsdp": ["--fsdp"], "fsdp_compiled": ["--fsdp", "--compile"]}
    runs = [[*argv, *words, f"--out_dir={name}"] for name, words in more.items()]
    two = Processes(2, *runs, torchrun=("--standalone",))
    assert two.wait(600) == 0, two.err
    for name, words in {"one": [], "one_muon": MODERN}.items():
        assert train.main([*argv, *words, f"--out_dir={name}"]) == 0
    for name in more:
        one = "one_muon" if name == "muon" else "one"
        assert val_loss(name) == pytest.approx(
            val_loss(one), abs=2e-3 if dtype == "float32" else 0.05
        )
    resume = ["--init_from=resume", "--out_dir=muon", "--max_iters=25"]
    again = Processes(2, resume, torchrun=("--standalone",))
    assert again.wait(600) == 0, again.err


def test_the_loss_is_cross_entropy():
    x, weight = torch.randn(4, 32, 64, device=DEVICE), torch.randn(5000, 64, device=DEVICE)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(-1, 5000, (4, 32), device=DEVICE)
    loss = token_loss(x, weight, targets)
    logits = (x @ weight.t()).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (x, weight)),
        torch.autograd.grad(expected, (x, weight)),
        strict=True,
    ):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_the_same_text_as_on_a_cpu_in_float64(config, monkeypatch):
    model, idx = lively(config), torch.randint(65, (3, 10))
    expected = generated(model, idx, 60, top_k=20, top_p=0.9)
    model.to(DEVICE)
    assert torch.equal(generated(model, idx.to(DEVICE), 60, top_k=20, top_p=0.9).cpu(), expected)
    monkeypatch.setattr(generation, "GRAPH_DEVICES", ())
    assert torch.equal(generated(model, idx.to(DEVICE), 60, top_k=20, top_p=0.9).cpu(), expected)


AGAIN = ("--activation_checkpointing=half", f"--device={DEVICE}")


@pytest.mark.parametrize("parts", [MODERN, ("--n_head=4", "--n_kv_head=2"), AGAIN])
def test_sample_speaks(train_small, capsys, parts):
    assert train_small(*parts) == 0
    capsys.readouterr()
    for options in (("--dtype=auto",), ("--dtype=float32",)):
        words = [f"--device={DEVICE}", *options, "--checkpoint=run", "--prompt=The"]
        assert sample.main([*words, "--num_samples=5", "--max_new_tokens=50"]) == 0
        assert capsys.readouterr().out.count("-" * 80) == 5
