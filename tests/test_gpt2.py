"""Promise: GPT-2 here is GPT-2 as transformers has it, to the last gradient, in and out.

Random weights of GPT-2's shapes; transformers is the oracle.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODERN, load, needs_gpt2_vocabulary, script

import convert
import sample
import train as training
from data import tokenizer
from data.errors import UserError
from folio import gpt2, run_folder
from folio.checkpoint import build_model
from folio.generation import generate, generate_texts
from model import GPT

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 50257}


def load_model(name) -> tuple[GPT, dict]:
    ckpt = run_folder.open_checkpoint(str(name))
    return build_model(ckpt), ckpt.meta


def save_gpt2(folder: Path, **about) -> "transformers.GPT2LMHeadModel":
    """Random weights, biases too, saved as transformers does."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SMALL, **about}))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.05)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    save_gpt2(folder)
    return folder


def batch(vocab_size=50257, shape=(3, 17)):
    torch.manual_seed(1)
    idx = torch.randint(vocab_size, (shape[0], shape[1] + 1))
    return idx[:, :-1], idx[:, 1:].contiguous()


def theirs_of(folder, dtype=torch.float32):
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    return model.to(dtype).train()


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# ---- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, logits_within, within", [(torch.float32, 1e-5, 1e-5), (torch.float64, 1e-12, 1e-12)]
)
def test_logits_loss_gradients_and_adamw_agree(folder, dtype, logits_within, within):
    theirs = no_dropout(theirs_of(folder, dtype))
    ours = load_model(folder)[0].to(dtype)
    names = {name.removeprefix("transformer."): p for name, p in theirs.named_parameters()}
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, eps=1e-4) for m in (ours, theirs)]
    idx, targets = batch()
    for step in range(10):
        logits, _ = ours(idx)
        _, loss = ours(idx, targets)
        their_logits = theirs(idx).logits
        their_loss = torch.nn.functional.cross_entropy(
            their_logits.flatten(0, 1), targets.flatten()
        )
        if step == 0:
            assert (logits - their_logits).abs().max() < logits_within
            assert abs(loss.item() - their_loss.item()) < min(within, 1e-6)
        for optimizer, value in zip(optimizers, (loss, their_loss), strict=True):
            optimizer.zero_grad()
            value.backward()
        for name, p in ours.named_parameters():
            turned = p.grad.shape != names[name].grad.shape or name.endswith("c_proj.weight")
            grad = names[name].grad.t() if turned and p.dim() == 2 else names[name].grad
            if step == 0:
                assert (p.grad - grad).abs().max() < within, name
        for optimizer in optimizers:
            optimizer.step()
    for name, p in ours.named_parameters():
        turned = p.shape != names[name].shape or name.endswith("c_proj.weight")
        q = names[name].t() if turned and p.dim() == 2 else names[name]
        assert (p - q).abs().max() < within, name


def test_gpt2s_own_size(tmp_path):
    """124 million parameters."""
    theirs = save_gpt2(tmp_path, n_layer=12, n_head=12, n_embd=768, n_positions=1024)
    ours = load_model(tmp_path)[0]
    assert ours.n_params() == 124_439_808
    idx, _ = batch(shape=(1, 40))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


def test_the_files_of_the_hub_have_other_names(folder, tmp_path):
    """No "transformer." before the names, and the causal mask among the tensors."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    tensors = {name: t.clone() for name, t in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    one, other = load_model(folder)[0], load_model(tmp_path)[0]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t, a: t.pop("transformer.h.1.ln_2.bias"), "tensor h.1.ln_2.bias is missing"),
        (lambda t, a: t.update(extra=torch.zeros(1)), "unknown tensor extra"),
        (lambda t, a: a.update(n_positions=16), r"wpe.weight is \(32, 32\), not"),
        (lambda t, a: a.update(activation_function="relu"), "activation_function=relu, whi"),
        (lambda t, a: a.update(scale_attn_by_inverse_layer_idx=True), "idx=True; only False"),
        (lambda t, a: a.update(model_type="llama"), "model_type=llama; only gpt2 is supported"),
        (lambda t, a: a.pop("n_head"), "config.json lacks n_head"),
        (lambda t, a: a.update(n_head=3), "n_embd=32 is not a multiple"),
        (lambda t, a: a.update(n_layer=-1), "a size that is not in"),
        (lambda t, a: a.update(n_layer=10**8), "28 tensors are too few for n_layer"),
        (lambda t, a: a.update(n_embd=10**8), r"is \(.*\), not \("),
        (lambda t, a: a.update(n_embd=2 * 10**30), "a size that is not in"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(folder, tmp_path, capsys, change, says):
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    change(tensors, about)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=says):
        load_model(tmp_path)


@pytest.mark.parametrize("text", [b"[]", b"7", b"{", b"\xff", b"[" * 100_000])
def test_a_config_that_is_none_is_refused(folder, tmp_path, text):
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd/config.json").write_bytes(text)
    with pytest.raises(UserError, match="is not a usable model"):
        load_model(tmp_path / "odd")


def test_truncated_weights_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut/model.safetensors").write_bytes(data[:length])
        with pytest.raises(UserError, match="is not a usable model"):
            load_model(tmp_path / "cut")


# ---- out to transformers ------------------------------------------------------------------------


@needs_gpt2_vocabulary
def test_out_and_in_again_is_bit_identical(folder, tmp_path):
    assert convert.main([str(folder), str(tmp_path / "out")]) == 0
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    one, other = load_model(folder)[0], load_model(tmp_path / "again")[0]
    assert one.config == other.config
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        same = (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert same, name


def greedy(name: str, prompt: str, count: int) -> list[int]:
    model, meta = load_model(name)
    ids = tokenizer.load(meta["tokenizer"]).encode(prompt).astype(np.int64)
    drawn = generate(model, torch.from_numpy(ids)[None], torch.zeros(1, count), temperature=0)
    return [int(i) for i in drawn]


@needs_gpt2_vocabulary
@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_exported_run_says_the_same_in_transformers(
    train_small, data_dir, tmp_path, text, monkeypatch, kind, bias
):
    import prepare

    Path("text.txt").write_text(text)
    vocab = ["--vocab_size=400"] if kind == "bpe" else []
    assert prepare.main(["--name=mine", "--input=text.txt", f"--tokenizer={kind}", *vocab]) == 0
    options = ("--dataset=mine", "--data_dir=data", f"--bias={bias}", "--num_samples=0")
    assert train_small(*options, "--max_iters=5") == 0
    assert convert.main(["run", "hf"]) == 0
    tok = transformers.AutoTokenizer.from_pretrained("hf")
    model = transformers.AutoModelForCausalLM.from_pretrained("hf").eval()
    ours, meta = load_model("run")
    own = tokenizer.load(meta["tokenizer"])
    for words in (text[:3000], "naïve 日本 \n\n\t x=1 don't <s>", " ", "a  b   c"):
        assert tok.encode(words) == own.encode(words).tolist(), words
        assert tok.decode(tok.encode(words), clean_up_tokenization_spaces=False) == words
    assert tok.eos_token_id == own.end_of_text == model.config.eos_token_id
    idx, _ = batch(own.vocab_size, (2, 16))
    with torch.no_grad():
        assert (ours(idx)[0] - model(idx).logits).abs().max() < 1e-5
    ids = torch.tensor([tok.encode("The")])
    said = model.generate(
        ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert said[0, ids.shape[1] :].tolist() == greedy("run", "The", 10) == greedy("hf", "The", 10)


def test_characters_and_bigrams(train_small, capsys):
    """A model of characters goes out, its tokenizer in our own file alone; a bigram does not."""
    assert train_small("--max_iters=2", "--num_samples=0") == 0
    assert convert.main(["run", "hf"]) == 0
    assert not Path("hf/vocab.json").exists()
    assert sample.main(["--checkpoint=hf", "--prompt=The", "--max_new_tokens=5"]) == 0
    assert convert.main(["run", "hf"]) == 2
    assert "hf exists already" in capsys.readouterr().err
    assert train_small("--max_iters=2", "--num_samples=0", "--model=bigram", "--out_dir=two") == 0
    assert convert.main(["two", "hf2"]) == 2
    assert "bigram model, which transformers lacks" in capsys.readouterr().err
    assert not list(Path().glob("hf2*"))


def test_newer_parts_are_refused_by_name(train_small, capsys):
    assert train_small("--max_iters=1", "--num_samples=0", *MODERN) == 0
    assert convert.main(["run", "hf"]) == 2
    err = capsys.readouterr().err
    assert "norm=rmsnorm, rotary=True, qk_norm=True, n_kv_head=1, key_shift=True, conv=3, " in err
    assert (
        "activation=relu2; a model to export must be trained without" in err
        and err.count("\n") == 1
    )
    assert not list(Path().glob("hf*"))


# ---- finetuning and evaluating ------------------------------------------------------------------


@pytest.fixture
def gpt2_data(text, tmp_path, monkeypatch):
    import prepare

    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)
    assert prepare.main(["--name=mine", "--input=text.txt", "--tokenizer=gpt2"]) == 0
    return ["--dataset=mine", "--device=cpu", "--dtype=float32"]


@needs_gpt2_vocabulary
def test_finetuning_with_a_cropped_block_and_a_padded_vocabulary(folder, gpt2_data, capsys):
    argv = [*gpt2_data, f"--init_from={folder}", "--block_size=16", "--vocab_size=50304"]
    argv += ["--batch_size=2", "--max_iters=2", "--num_samples=0", "--learning_rate=1e-30"]
    assert training.main([*argv, "--out_dir=tuned"]) == 0
    tensors, meta = load("tuned/ckpt.safetensors")
    original = load_model(folder)[0]
    assert torch.equal(tensors["model.wpe.weight"], original.wpe.weight[:16])
    wte = tensors["model.wte.weight"]
    assert wte.shape == (50304, 32) and torch.equal(wte[:50257], original.wte.weight)
    assert meta["model_config"]["block_size"] == 16
    capsys.readouterr()
    for argv, says in (
        (["--block_size=64"], "block_size=64, but"),
        (["--vocab_size=50000"], "vocab_size=50000, but"),
        (["--n_layer=3"], "n_layer=3, but"),
    ):
        assert training.main([*gpt2_data, f"--init_from={folder}", *argv]) == 2
        assert says in capsys.readouterr().err


@needs_gpt2_vocabulary
def test_evaluation_is_that_of_transformers(folder, gpt2_data, capsys):
    argv = [*gpt2_data, f"--init_from={folder}", "--eval_only", "--batch_size=4"]
    outputs = set()
    for _ in range(2):
        assert training.main(argv) == 0
        outputs.add(capsys.readouterr().out)
    (out,) = outputs
    loss = float(out.split("val loss ")[1].split()[0])
    perplexity = float(out.split("perplexity ")[1].split()[0])
    ids = np.fromfile("data/mine/val.bin", "<u2").astype(np.int64)
    theirs, total = theirs_of(folder).eval(), 0.0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, 32):
            window = torch.from_numpy(ids[i : i + 33])
            logits = theirs(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert loss == pytest.approx(total / (len(ids) - 1), abs=1e-4)
    assert perplexity == pytest.approx(np.exp(loss), rel=1e-3) and "bits per byte" in out


@needs_gpt2_vocabulary
def test_padded_ids_are_never_drawn(folder, gpt2_data):
    """They would have no text to decode to."""
    argv = [*gpt2_data, f"--init_from={folder}", "--vocab_size=60000", "--batch_size=2"]
    assert training.main([*argv, "--max_iters=1", "--num_samples=0", "--out_dir=tuned"]) == 0
    model, meta = load_model("tuned")
    with torch.no_grad():
        model.wte.weight[50257:] *= 1e4  # were they possible, they would be likely
    tok = tokenizer.load(meta["tokenizer"])
    options = sample.SampleConfig(max_new_tokens=20, temperature=5.0, top_k=60000)
    texts = generate_texts(model, tok, tok.encode("a"), options, range(5), lambda _: None)
    assert all(len(text.ids) == 20 and max(text.ids) < 50257 for text in texts)


# ---- in from nanoGPT ----------------------------------------------------------------------------


def nanogpt_checkpoint(path: Path, bias: bool, compiled: bool, vocab_size: int) -> GPT:
    """A ckpt.pt as nanoGPT saves one, of a model of ours with the exact GELU."""
    from model import GPTConfig

    torch.manual_seed(0)
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    args |= {"vocab_size": vocab_size, "bias": bias}
    model = GPT(GPTConfig(**args, activation="gelu"))
    prefix = "_orig_mod." if compiled else ""
    state = {f"{prefix}transformer.{name}": p.detach() for name, p in model.named_parameters()}
    state[f"{prefix}lm_head.weight"] = model.wte.weight.detach()
    saved = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": {**args, "dropout": 0.1},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "device": "cpu"},
    }
    torch.save(saved, path)
    return model.eval()


@pytest.mark.parametrize("bias, compiled", [(True, False), (False, True)])
def test_a_nanogpt_checkpoint_becomes_one_of_ours(
    data_dir, tmp_path, monkeypatch, capsys, bias, compiled
):
    monkeypatch.chdir(tmp_path)
    from data import bins

    vocab_size = bins.load(data_dir / "small").vocab_size
    theirs = nanogpt_checkpoint(tmp_path / "ckpt.pt", bias, compiled, vocab_size)
    argv = ["ckpt.pt", "out/imported", "--dataset=small", f"--data_dir={data_dir}"]
    assert convert.main(argv) == 0
    assert "validation loss 1.5000 according to nanoGPT" in capsys.readouterr().out
    ours, meta = load_model("out/imported")
    assert meta["progress"]["iter_num"] == 2000 and ours.config.activation == "gelu"
    idx, _ = batch(vocab_size, (2, 16))
    with torch.no_grad():
        assert torch.equal(ours(idx)[0], theirs(idx)[0])
    assert sample.main(["--prompt=The", "--max_new_tokens=5"]) == 0
    argv = ["--init_from=out/imported", "--dataset=small", f"--data_dir={data_dir}"]
    assert training.main([*argv, "--eval_only", "--device=cpu"]) == 0


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_a_nanogpt_checkpoint_can_run_no_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pt")
    torch.save([1], "list.pt")
    torch.save({"model": {}}, "half.pt")
    Path("text.pt").write_text("text")
    Path("empty.pt").write_text("")
    for name in ("evil", "list", "half", "text", "empty", "missing"):
        assert convert.main([f"{name}.pt", "out"]) == 2, name
        err = capsys.readouterr().err
        assert f"{name}.pt" in err and err.count("\n") == 1, err
    assert not Path("touched").exists() and not Path("out").exists()


@pytest.mark.parametrize(
    "lie, says",
    [
        ({"n_layer": 1000, "n_embd": 100_000, "n_head": 1}, "lacks tensor"),
        ({"n_embd": 4096}, "not \\(65, 4096\\) of torch.float32"),
        ({"n_layer": -1}, "n_layer must be"),
        ({"n_layer": "two"}, "n_layer must be"),
    ],
)
def test_sizes_that_are_not_those_of_nanogpts_tensors(tmp_path, capsys, lie, says):
    """Before anything of such a size is allocated."""
    nanogpt_checkpoint(tmp_path / "ckpt.pt", True, False, 65)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    saved["model_args"] |= lie
    torch.save(saved, tmp_path / "lie.pt")
    assert convert.main([str(tmp_path / "lie.pt"), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert re.search(says, err) and err.count("\n") == 1, err


@needs_gpt2_vocabulary
def test_the_wrong_tokenizer_for_a_nanogpt_checkpoint(tmp_path, capsys):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", True, False, 65)
    assert convert.main([str(tmp_path / "ckpt.pt"), str(tmp_path / "out")]) == 2
    assert "has 65 ids and the gpt2 tokenizer 50257" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- sample.py ----------------------------------------------------------------------------------


def test_interactive_input_that_is_not_utf8(train_small, tmp_path):
    assert train_small("--max_iters=2", "--num_samples=0") == 0
    argv = ["--checkpoint=run", "--interactive", "--max_new_tokens=5", "--device=cpu"]
    done = script("sample.py", *argv, cwd=tmp_path, input=b"caf\xe9\nThe\n", text=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"U+FFFD" in done.stderr and done.stdout.startswith(b"The")


def test_interactive(train_small, tmp_path):
    assert train_small("--max_iters=2", "--num_samples=0") == 0
    argv = ["--checkpoint=run", "--interactive", "--max_new_tokens=5", "--device=cpu"]
    done = script("sample.py", *argv, cwd=tmp_path, input="The\n日\n\nThe\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The"), "and no prompt of ours: nobody types"
    _, first, second = done.stdout.split("The")
    assert first.split("\n")[0] != second.split("\n")[0], "asked again, it answers anew"
    assert done.stderr.count("error: the vocabulary has no '日'") == 1
    assert sample.main([*argv, "--prompt=x"]) == 2


def test_configs_of_gpt2_do_not_name_what_is_not_there():
    about = transformers.GPT2Config().to_dict()
    config = gpt2.config_from_gpt2(about)
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (12, 12, 768, 1024)
