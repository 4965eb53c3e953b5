"""Models that people bring: GPT-2 folders and nanoGPT checkpoints of every shape.

The rule: what has GPT-2's parts is read, however its file names them; any other model is refused by
the name of what differs; nothing that we did not write is removed.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load, needs_gpt2_vocabulary
from safetensors.torch import load_file, save_file
from test_gpt2 import load_model, nanogpt_checkpoint, save_gpt2

import convert
import prepare
import sample
import train
from data import documents, tokenizer
from data.errors import UserError
from folio import checkpoint, hf_tokenizer
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    save_gpt2(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}))


def same_weights(one, other) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def with_tensors(folder: Path, change) -> None:
    """Rewrite a folder's weights: `change` gets them as a dict and returns what to save."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in change(tensors).items()}
    save_file(tensors, folder / "model.safetensors")


WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
READ = {  # the same model, stored in other ways
    "a head that is wte": lambda t: {**t, HEAD: t[WTE]},
    "wte only as the head": lambda t: {HEAD: t.pop(WTE), **t},
    "DDP and torch.compile": lambda t: {f"module._orig_mod.{n}": p for n, p in t.items()},
    "torch.compile and DDP": lambda t: {f"_orig_mod.module.{n}": p for n, p in t.items()},
    "masks": lambda t: {**t, "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).tril().bool()},
    "a mask and its bias": lambda t: {**t, "h.1.attn.masked_bias": torch.tensor(-1e4)},
}  # fmt: skip


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_the_same_model_stored_in_other_ways(folder, copy, change):
    with_tensors(copy, change)
    assert same_weights(load_model(folder)[0], load_model(copy)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"n_inner": 128},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"},
        {"n_inner": None, "activation_function": "gelu_new"},
    ],
)
def test_the_same_config_in_other_words(folder, copy, settings):
    change_json(copy / "config.json", **settings)
    assert load_model(copy)[0].config == load_model(folder)[0].config


def test_weights_in_several_files(folder, copy):
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    parts = {f"model-{i}-of-3.safetensors": names[i::3] for i in range(3)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    (copy / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(load_model(folder)[0], load_model(copy)[0])
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "../a.safetensors"}}))
    with pytest.raises(UserError, match="names a file outside the folder: ../a.safetensors"):
        load_model(copy)
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: 5}}))
    with pytest.raises(UserError, match="No such file"):
        load_model(copy)
    index.write_text("[]")
    with pytest.raises(UserError, match="has no weight_map"):
        load_model(copy)


REFUSED = {  # a model with something else: what to do with its folder, and the message
    "an untied head": (
        lambda f: with_tensors(f, lambda t: {**t, HEAD: t[WTE] + 1}),
        "lm_head.weight is not wte.weight; an untied head is not supported",
    ),
    "a head that the config unties": (
        lambda f: change_json(f / "config.json", tie_word_embeddings=False),
        "tie_word_embeddings=False; only True is supported",
    ),
    "a wider MLP": (
        lambda f: change_json(f / "config.json", n_inner=96),
        "n_inner=96; only 128 is supported",
    ),
    "another activation": (
        lambda f: change_json(f / "config.json", activation_function="silu"),
        "activation_function=silu",
    ),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which could run code",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it has no model.safetensors"),
}


@pytest.mark.parametrize("change, says", REFUSED.values(), ids=REFUSED)
def test_another_model_is_refused_by_what_differs(copy, change, says):
    change(copy)
    with pytest.raises(UserError, match=says):
        load_model(copy)


# ---- nanoGPT ------------------------------------------------------------------------------------


def change_state(path: Path, change) -> None:
    saved = torch.load(path, weights_only=True)
    saved["model"] = change(saved["model"])
    torch.save(saved, path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_a_nanogpt_checkpoint(data_dir, tmp_path, prefix):
    path, target = tmp_path / "ckpt.pt", tmp_path / "out"
    theirs = nanogpt_checkpoint(path, True, False, vocab_size(data_dir))
    change_state(path, lambda state: {prefix + name: tensor for name, tensor in state.items()})
    argv = [str(path), str(target), "--dataset=small", f"--data_dir={data_dir}"]
    assert convert.main(argv) == 0
    assert same_weights(theirs, load_model(target)[0])


def vocab_size(data_dir: Path) -> int:
    return json.loads((data_dir / "small/meta.json").read_text("utf-8"))["vocab_size"]


def test_an_untied_head_of_a_nanogpt_checkpoint(data_dir, tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    nanogpt_checkpoint(path, True, False, vocab_size(data_dir))
    change_state(path, lambda state: {**state, HEAD: state[HEAD] + 1})
    argv = [str(path), str(tmp_path / "out"), "--dataset=small", f"--data_dir={data_dir}"]
    assert convert.main(argv) == 2
    assert "an untied head is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("more", [-1, 1, 64])
def test_the_data_set_must_have_as_many_ids(data_dir, tmp_path, capsys, more):
    path = tmp_path / "ckpt.pt"
    nanogpt_checkpoint(path, True, False, vocab_size(data_dir) + more)
    argv = [str(path), str(tmp_path / "out"), "--dataset=small", f"--data_dir={data_dir}"]
    assert convert.main(argv) == 2
    assert "use --dataset=NAME with the data set that it was trained on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- temporary names ----------------------------------------------------------------------------


@pytest.fixture
def exportable(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt_checkpoint(tmp_path / "ckpt.pt", True, False, vocab_size(data_dir))
    argv = ["ckpt.pt", "run", "--dataset=small", f"--data_dir={data_dir}"]
    assert convert.main(argv) == 0
    return argv


def test_nothing_of_the_users_is_removed(exportable):
    Path("hf.partial").mkdir()
    Path("hf.partial/thesis.txt").write_text("mine")
    assert convert.main(["run", "hf"]) == 0
    assert Path("hf.partial/thesis.txt").read_text() == "mine"
    assert json.loads(Path("hf/config.json").read_text())["n_ctx"] == 16


@pytest.mark.parametrize("kind", ["export", "import"])
def test_a_full_disk_leaves_nothing(exportable, monkeypatch, capsys, kind):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    argv = ["run", "target"] if kind == "export" else ["ckpt.pt", "target", *exportable[2:]]
    before = sorted(Path().iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", fail)
        patch.setattr(convert.safetensors.torch, "save_file", fail)
        assert convert.main(argv) == 1
    assert sorted(Path().iterdir()) == before
    assert convert.main(argv) == 0


# ---- tokenizers ---------------------------------------------------------------------------------

TEXTS = {  # with letters that other texts lack
    "English": "It was the best of times, it was the worst of times, it's what we've known. " * 50,
    "Portuguese": "Não há nada mais difícil do que a simplicidade: é o último degrau da arte. "
    * 50,
    "Russian": "Все счастливые семьи похожи друг на друга, 1878 год,\n\n  и так далее. " * 50,
}
UNSEEN = [
    "the times\n\n\n we don't 12345  know",
    "ação é 🙂",
    "друг\tи 日本",
    "   ",
    "a<|endoftext|>b",
    "",
]


@pytest.fixture(params=TEXTS)
def trained(request, copy):
    """A folder with a byte-pair vocabulary of its own, with special tokens before the bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(
        [TEXTS[request.param]], 400, special_tokens=["<s>", "<pad>", "<|endoftext|>"]
    )
    theirs.save_model(str(copy))
    return copy, theirs


@pytest.mark.parametrize("form", ["vocab.json and merges.txt", "tokenizer.json"])
def test_a_folders_own_vocabulary(trained, form):
    folder, theirs = trained
    if form == "tokenizer.json":
        theirs.save(str(folder / "tokenizer.json"))
        (folder / "vocab.json").unlink()
    ours = tokenizer.load(load_model(folder)[1]["tokenizer"])
    assert ours.end_of_text == 2 and ours.vocab_size == theirs.get_vocab_size()
    for text in (*TEXTS.values(), *UNSEEN[:4]):
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text).ids and ours.decode(ids) == text
    again = tokenizer.load(json.loads(json.dumps(ours.meta())))
    assert again.encode(TEXTS["English"]).tolist() == ours.encode(TEXTS["English"]).tolist()


def test_a_folders_own_vocabulary_is_exported_again(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, theirs = trained
    assert convert.main([str(folder), str(tmp_path / "hf")]) == 0
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*TEXTS.values(), *UNSEEN[:4]):
        assert exported(text)["input_ids"] == theirs.encode(text).ids, text


def test_an_end_of_text_of_another_name(trained):
    """eos_token is a string, or a dictionary in older versions of transformers."""
    folder, theirs = trained
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    vocab["<end>"] = vocab.pop("<|endoftext|>")
    (folder / "vocab.json").write_text(json.dumps(vocab))
    for end in ("<end>", {"content": "<end>", "lstrip": False, "__type": "AddedToken"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        assert load_model(folder)[1]["tokenizer"]["end_of_text"] == 2


def test_a_byte_without_an_id_is_not_exported(trained):
    folder, theirs = trained
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    missing = vocab.pop(hf_tokenizer.PRINTABLE[0])
    (folder / "vocab.json").write_text(json.dumps(vocab))
    ours = tokenizer.load(load_model(folder)[1]["tokenizer"])
    exported = json.loads(hf_tokenizer.files(ours)["vocab.json"])
    assert min(exported.values()) > 0 and missing not in exported.values()


@needs_gpt2_vocabulary
def test_gpt2s_own_vocabulary_is_known(copy):
    for name, data in hf_tokenizer.files(tokenizer.GPT2Tokenizer()).items():
        (copy / name).write_bytes(data)
    assert load_model(copy)[1]["tokenizer"] == {"kind": "gpt2"}


def test_without_a_tokenizer_gpt2s_is_used_and_said(copy, capsys):
    assert load_model(copy)[1]["tokenizer"] == {"kind": "gpt2"}
    assert "copy has no tokenizer: GPT-2's is used" in capsys.readouterr().err
    change_json(copy / "config.json", vocab_size=2000)
    with pytest.raises(UserError, match="has no tokenizer, and a smaller vocabulary than GPT-2's"):
        hf_tokenizer.read(copy, 2000)


OTHER_TOKENIZERS = {
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordPiece", "vocab": {"a": 0}},
}


@pytest.mark.parametrize("part, value", OTHER_TOKENIZERS.items())
def test_a_tokenizer_of_another_kind_is_refused(trained, part, value):
    folder, theirs = trained
    theirs.save(str(folder / "tokenizer.json"))
    change_json(folder / "tokenizer.json", **{part: value})
    with pytest.raises(UserError, match="is not byte-level BPE as GPT-2's is"):
        load_model(folder)


@pytest.mark.parametrize(
    "kind", ["char", "byte", "bpe", pytest.param("gpt2", marks=needs_gpt2_vocabulary)]
)
@pytest.mark.parametrize("form", ["", "NFC"])
def test_every_tokenizer_in_transformers(tmp_path, kind, form):
    transformers = pytest.importorskip("transformers")
    text = "".join(TEXTS.values()) + "e\u0301 \t\r\n日本🙂"
    if kind == "char":
        ours = tokenizer.CharTokenizer.train([tokenizer.normalized(text, form)])
    elif kind == "bpe":
        ours = tokenizer.BytePairTokenizer.train([text], 300)
    else:
        ours = tokenizer.load({"kind": kind})
    ours.normalize = form
    export(ours, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)
    if ours.end_of_text is not None:
        assert theirs("a<|endoftext|>")["input_ids"][-1] == theirs.eos_token_id == ours.end_of_text
    if kind in ("bpe", "gpt2"):  # and read without our own file
        (tmp_path / "hf" / hf_tokenizer.OURS).unlink()
        again = tokenizer.load(hf_tokenizer.read(tmp_path / "hf", 0))
        assert again.normalize == form and again.encode(text).tolist() == ids


def export(tok: tokenizer.Tokenizer, target: Path) -> None:
    """Export a small untrained model with this tokenizer."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=tok.vocab_size)
    tensors = {f"model.{name}": p for name, p in GPT(config).named_parameters()}
    meta = {
        "run_id": "untrained",
        "model": "gpt",
        "model_config": vars(config),
        "run_config": {},
        "tokenizer": tok.meta(),
        "dataset": "",
        "progress": {},
        "scaler": {},
        "threads": 1,
    }
    path = target.with_suffix(".safetensors")
    checkpoint.save(path, tensors, meta)
    assert convert.main([str(path), str(target)]) == 0


@pytest.mark.parametrize("vocab_size", [2000, 50258, 50304])
def test_a_vocabulary_smaller_than_the_embeddings(trained, capsys, vocab_size):
    folder, theirs = trained
    save_gpt2(folder, vocab_size=vocab_size, n_layer=1)
    argv = [f"--checkpoint={folder}", "--device=cpu", "--max_new_tokens=200", "--temperature=9"]
    assert sample.main([*argv, f"--output={folder}/samples.jsonl", "--prompt=It"]) == 0
    (record,) = map(json.loads, (folder / "samples.jsonl").read_text("utf-8").splitlines())
    assert max(record["tokens"]) < theirs.get_vocab_size()


def test_a_vocabulary_larger_than_the_embeddings(trained, capsys):
    folder, theirs = trained
    save_gpt2(folder, vocab_size=theirs.get_vocab_size() - 1, n_layer=1)
    assert sample.main([f"--checkpoint={folder}", "--device=cpu"]) == 2
    assert f"ids, but the model has {theirs.get_vocab_size() - 1}" in capsys.readouterr().err


def test_a_trained_nanogpt_checkpoint_still_writes_words(tmp_path, monkeypatch):
    """A model of nanoGPT's shape, trained for a while: a wrong tensor or id would make noise."""
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["pydocs"]) == 0
    options = "--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=32 --dropout=0"
    options += " --learning_rate=4e-3 --max_iters=600 --eval_interval=600 --activation=gelu"
    recipe = f"{ROOT}/config/shakespeare_char_gpt2.py"
    assert train.main([recipe, "--dataset=pydocs", "--out_dir=run", *options.split()]) == 0
    tensors, meta = load("run/ckpt.safetensors")
    names = {name.removeprefix("model."): name for name in tensors if name.startswith("model.")}
    state = {f"_orig_mod.transformer.{name}": tensors[full] for name, full in names.items()}
    state["_orig_mod.lm_head.weight"] = tensors["model.wte.weight"]
    sizes = {name: meta["model_config"][name] for name in convert.NANOGPT_ARGS}
    saved = {"model": state, "model_args": sizes, "iter_num": 400, "best_val_loss": 2.0}
    torch.save(saved, "ckpt.pt")
    assert convert.main(["ckpt.pt", "imported", "--dataset=pydocs"]) == 0
    argv = ["--max_new_tokens=1000", "--temperature=0.5", "--output=s.jsonl", "--prompt=The "]
    assert sample.main(["--checkpoint=imported", *argv]) == 0
    sampled = json.loads(Path("s.jsonl").read_text("utf-8"))["text"]
    (document,) = documents.Corpus(("pydocs",), Path())
    known = set(re.findall(r"\w{2,}", b"".join(document.blocks()).decode()))

    def share_of_words(text: str) -> float:
        words = re.findall(r"\w{2,}", text)
        return sum(word in known for word in words) / len(words)

    noise = "".join(chr(ord(c) + 1) for c in sampled)  # as if the ids were shifted by one
    assert share_of_words(sampled) > 0.6 > 0.4 > share_of_words(noise)
