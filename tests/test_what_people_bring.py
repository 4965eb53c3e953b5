"""Promise: what people bring is read, or refused in one line that names the cause and what to do.

One line a case: what it is, the command, its exit code, and what it prints. The other tests of each
kind look closer: test_documents, test_other_models, test_bins, test_process, test_evaluate.
"""

# ruff: noqa: E501, for one line a case

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, load, needs_gpt2_vocabulary, script
from safetensors.torch import load_file, save_file
from test_gpt2 import nanogpt_checkpoint, save_gpt2

import convert
import evaluate
import prepare
import runs
import sample
import train
from data import bins, tokenizer
from folio.generation import encode_prompt

SCRIPTS = {
    "convert": convert.main,
    "evaluate": evaluate.main,
    "prepare": prepare.main,
    "runs": runs.main,
    "sample": sample.main,
    "train": train.main,
}
BOOK = "It was the best of times, it was the worst of times.\n" * 40
TINY = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --max_iters=1 --batch_size=2 --device=cpu"


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, BOOK)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("book.txt")
        entry.size = len(BOOK)
        archive.addfile(entry, io.BytesIO(BOOK.encode()))
    return file.getvalue()


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


FILES = {  # texts that people have
    "book.txt": BOOK.encode(),
    "stories.txt": b"<|endoftext|>".join([BOOK.encode()[:999]] * 3),
    "names.txt": "".join(f"{a}{b}o\n" for a in "KMRT" for b in "aeiou").encode() * 6,
    "book.zip": zipped("book.txt"),
    "book.docx": zipped("word/document.xml"),
    "book.pdf": b"%PDF-1.7\n" + BOOK.encode(),
    "book.tar": tarred(),
    "book.parquet": b"PAR1" + BOOK.encode() + b"PAR1",
    "book.rtf": b"{\\rtf1 " + BOOK.encode() + b"}",
    "book.html": b"<!doctype html><p>" + BOOK.encode(),
    "book.csv": b"title,text\nA,B\n" * 99,
    "book.tsv": b"title\ttext\nA\tB\n" * 99,
    "book.csv.gz": gzip.compress(b"title,text\nA,B\n" * 99),
    "book.json": json.dumps([{"text": BOOK}], indent=1).encode(),
    "book.txt.xz": lzma.compress(BOOK.encode()),
    "book.txt.bz2": bz2.compress(BOOK.encode()),
    "utf16.txt": BOOK.encode("utf-16"),
    "unmarked.txt": BOOK.encode("utf-16-be"),
    "nothing.txt": b"\xff\xfe",
    "latin1.txt": (BOOK + "café\n").encode("latin-1"),
    "zero.txt": b"a" * 9000 + b"\0" + BOOK.encode(),
    "zero16.txt": ("a" * 9000 + "\0" + BOOK).encode("utf-16"),
    "crlf.txt": BOOK.replace("\n", "\r\n").encode(),
    "accents.txt": (BOOK + "naïve\n").encode(),
    "mixed/book.txt": BOOK.encode(),
    "mixed/book.zip": zipped("book.txt"),
    "mixed/photo.png": b"\x89PNG\r\n\x1a\n\0\0\0",
    "nested.jsonl": lines(*({"data": {"text": BOOK[i:]}} for i in range(9))),
    "chat.jsonl": lines(*({"messages": [{"role": "user", "content": BOOK[i:]}]} for i in range(9))),
    "bad.jsonl": lines(*({"text": BOOK[i:]} for i in range(9))) + b"{\n",
    "null.jsonl": lines({"text": None}),
    "same.jsonl": lines(*[{"text": BOOK}] * 150),
    "lr.py": b"lr = 0.5\nmin_lr = 0.1\n",
    "tuple.py": b"input = (1,)\n",
    "prompt.txt": b"\xef\xbb\xbfIt",
    "data/mine/input.txt": BOOK.encode(),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with those texts, a data set, a run, and models of others."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for path, content in FILES.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)
        assert prepare.main(["--name=book", "--input=book.txt"]) == 0
        tiny = [SMALL[0], "--dataset=book", *SMALL[2:], "--max_iters=2"]
        assert train.main([*tiny, "--out_dir=out/run"]) == 0
        assert train.main([*tiny, "--out_dir=out/rotary", "--rotary"]) == 0
        nanogpt_checkpoint(Path("nano.pt"), True, False, bins.load(Path("data/book")).vocab_size)
        save_gpt2(Path("gpt2"), n_layer=1)
        for name, dtype in {"u4": "<u4", "i8": "<i8"}.items():
            bring_bins(name, np.arange(2000).astype(dtype))
        bring_bins("large", np.full(2000, 60000, "<u2"))
        header = np.zeros(256, "<i4")
        header[0] = 20240520
        bring_bins("headed", np.concatenate([header.view("<u2"), np.arange(2000, dtype="<u2")]))
    return folder


def bring_bins(name: str, ids: np.ndarray) -> None:
    Path("data", name).mkdir()
    for split in bins.SPLITS:
        ids.tofile(f"data/{name}/{split}.bin")


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, in which the test runs."""
    folder = Path(shutil.copytree(made, tmp_path / "here"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return folder


# ---- what is changed before some of the commands -------------------------------------------------


def change_config(**values) -> None:
    path = Path("gpt2/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}))


def change_tensors(change) -> None:
    path = "gpt2/model.safetensors"
    save_file({k: t.clone() for k, t in change(load_file(path)).items()}, path)


def change_nano(**values) -> None:
    torch.save({**torch.load("nano.pt", weights_only=True), **values}, "nano.pt")


def old_nano() -> None:
    nanogpt_checkpoint(Path("nano.pt"), False, False, bins.load(Path("data/book")).vocab_size)
    sizes = torch.load("nano.pt", weights_only=True)["model_args"]
    del sizes["bias"]
    change_nano(model_args=sizes)


def cut_nano() -> None:
    os.truncate("nano.pt", os.path.getsize("nano.pt") // 2)


def untie_nano() -> None:
    state = torch.load("nano.pt", weights_only=True)["model"]
    change_nano(model={**state, "lm_head.weight": state["transformer.wte.weight"] + 1})


def shard() -> None:
    tensors = load_file("gpt2/model.safetensors")
    os.unlink("gpt2/model.safetensors")
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-{i % 2 + 1:05}-of-00002.safetensors"
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, f"gpt2/{file}")
    Path("gpt2/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_bin() -> None:
    content = bytearray(Path("data/book/train.bin").read_bytes())
    content[10] ^= 1
    Path("data/book/train.bin").write_bytes(content)


def change_bin_unnoticed() -> None:
    change_bin()
    os.utime("data/book/meta.json")


def rebuild() -> None:
    assert prepare.main(["--name=book", "--input=crlf.txt"]) == 0


def link_folders() -> None:
    Path("linked").mkdir()
    Path("linked/to_mixed").symlink_to("../mixed")
    Path("linked/cycle").symlink_to("../linked")


def bring_empty_folder() -> None:
    Path("empty").mkdir()
    Path("empty/.DS_Store").write_text("")


def bring_thesis() -> None:
    for name in ("hf.partial", "data/new.partial"):
        Path(name).mkdir()
        Path(name, "thesis.txt").write_text("mine")


# ---- the cases -----------------------------------------------------------------------------------


class Case(NamedTuple):
    what: str
    command: str
    code: int
    says: str
    before: object = None
    then: object = None  # must be true afterwards


def kept() -> bool:
    return Path("hf.partial/thesis.txt").exists() and Path("data/new.partial/thesis.txt").exists()


def begins(text: str):
    """The training split of data/new begins with a text."""

    def check() -> bool:
        dataset = bins.load(Path("data/new"))
        tok = tokenizer.load(dataset.tokenizer)
        return tok.decode(dataset.train.tokens).startswith(text)

    return check


NEW = "prepare --name=new --input"
CASES = [
    # A. data lost or made wrong
    Case("TARGET.partial exists", "convert out/run hf", 0, "parameters", bring_thesis, kept),
    Case("NAME.partial exists", f"{NEW} book.txt", 0, "tokens", bring_thesis, kept),
    Case("uint32 bins", f"train --dataset=u4 {TINY}", 2, "seems to have 4 bytes per id"),
    Case("int64 bins", f"train --dataset=i8 {TINY}", 2, "seems to have 8 bytes per id"),
    Case("bins of other ids", f"train --dataset=large {TINY}", 2, "has the id 60000, which GPT-2's"),
    Case("bins with a header", f"train --dataset=headed {TINY}", 2, "header of 1,024 bytes"),
    Case("untied head", "sample --checkpoint=gpt2", 2, "an untied head is not supported",
         lambda: change_tensors(lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1})),
    Case("untied head in a .pt", "convert nano.pt new --dataset=book", 2, "an untied head", untie_nano),
    Case("no tokenizer", "sample --checkpoint=gpt2 --prompt=a", 0, "gpt2 has no tokenizer: GPT-2's is used"),
    Case("too few characters", "convert nano.pt new --dataset=new", 2, "use --dataset=NAME with the data",
         lambda: prepare.main(["--name=new", "--input=names.txt"])),
    Case("~ in out_dir", f"train --dataset=book --out_dir=~/r {TINY}", 0, "done:", None,
         lambda: Path("r/ckpt.safetensors").exists()),
    Case("~ in input", f"{NEW}=~/book.txt", 0, "char tokens from"),
    Case("a path with a space", f"train --dataset=book '--out_dir=a b' {TINY}", 0, "--checkpoint 'a b' "),
    Case("resume without out_dir", "train --init_from=resume --max_iters=3", 0,
         "resume:  out/rotary/ckpt.safetensors, saved 20"),
    Case("a changed bin", f"train --dataset=book {TINY}", 2, "was changed after prepare.py built it", change_bin),
    Case("verify a data set", "runs verify data/book", 2, "its digest does not match", change_bin_unnoticed),
    Case("linked folders", f"{NEW} linked", 0, "binary files left out: 1", link_folders),
    Case("field of plain text", f"{NEW} book.txt --field=body", 2, "--field=body is for JSON lines"),
    # B. has its tests in test_process and test_windows
    # C. plain text
    Case("end of text in plain text", f"{NEW} stories.txt --tokenizer=bpe --vocab_size=270", 0,
         "<|endoftext|> is in the text, as text; --separator='<|endoftext|>' makes it the end"),
    Case("a separator", f"{NEW} stories.txt --separator=<|endoftext|>", 0, "train                3"),
    Case("a line a document", f"{NEW} names.txt --separator=\\n", 0, "train              1", None, begins("Kao")),
    Case("mark in a prompt", "sample --checkpoint=out/run --prompt=FILE:prompt.txt", 0, "It"),
    *(
        Case(name, f"{NEW} book.{ending}", 2, says)
        for name, ending, says in [
            ("zip", "zip", "is a zip archive: unzip book.zip"),
            ("docx", "docx", "is a Word document: pandoc book.docx"),
            ("pdf", "pdf", "is a PDF: pdftotext book.pdf"),
            ("tar", "tar", "is a tar archive: tar xf book.tar"),
            ("parquet", "parquet", "Parquet file"),
            ("rtf", "rtf", "is an RTF document: pandoc"),
            ("html", "html", "is a web page (HTML): pandoc"),
            ("csv", "csv", "is a table: python -c"),
            ("tsv", "tsv", "is a table: python -c"),
            ("compressed csv", "csv.gz", "is a table: python -c"),
            ("json", "json", "is one JSON document, not a record per line"),
        ]
    ),
    Case("xz", f"{NEW} book.txt.xz", 0, "tokens", None, begins("It was")),
    Case("bz2", f"{NEW} book.txt.bz2", 0, "tokens", None, begins("It was")),
    Case("a zip in a folder", f"{NEW} mixed", 0, "files left out: a zip archive (such as book.zip): 1"),
    Case("binary files, errors=replace", f"{NEW} mixed --errors=replace", 0, "binary files left out: 1"),
    Case("binary files, latin-1", f"{NEW} mixed --encoding=latin-1", 0, "binary files left out: 1"),
    Case("UTF-16", f"{NEW} utf16.txt", 0, "tokens", None, begins("It was")),
    Case("UTF-16 without a mark", f"{NEW} unmarked.txt", 2, "if it is UTF-16: --encoding=utf-16-be"),
    Case("UTF-16 without a mark, said", f"{NEW} unmarked.txt --encoding=utf-16-be", 0, "tokens", None, begins("It was")),
    Case("a mark and nothing else", f"{NEW} nothing.txt", 2, "nothing.txt: no text found"),
    Case("latin-1", f"{NEW} latin1.txt", 2, "latin1.txt is not UTF-8: byte 0xe9 at offset 2,123"),
    Case("latin-1, said", f"{NEW} latin1.txt --encoding=latin-1", 0, "tokens"),
    Case("latin-1, replaced", f"{NEW} latin1.txt --errors=replace", 0, "bytes replaced: 1"),
    Case("a zero byte", f"{NEW} zero.txt", 2, "zero.txt has a zero byte at offset 9,000"),
    Case("a new character", f"{NEW} accents.txt --tokenizer=data/book", 2,
         "accents.txt, character 2,121 (line 41): the vocabulary has no 'n'"),
    Case("a zero in UTF-16", f"{NEW} zero16.txt", 2, "zero16.txt has a zero character (U+0000): it is damaged"),
    Case("CRLF", f"{NEW} crlf.txt", 0, "lines that end in CRLF: 40"),
    Case("a nested field", f"{NEW} nested.jsonl --field=data.text", 0, "train                9"),
    Case("messages", f"{NEW} chat.jsonl --field=messages", 0, "tokens", None, begins("user: It was")),
    Case("a bad line", f"{NEW} bad.jsonl", 2, "bad.jsonl, line 10: not JSON"),
    Case("a bad line, skipped", f"{NEW} bad.jsonl --skip_bad_lines", 0, "bad lines left out: 1"),
    Case("equal documents", f"{NEW} same.jsonl", 2, "all documents are the same"),
    # D. names and messages
    Case("text in its place", f"train --dataset=mine {TINY}", 0, "saved:   out/mine/"),
    Case("a path as data set", f"train --dataset=data/book {TINY}", 0, "saved:   out/book/"),
    Case("a path with ../", f"train --dataset=../here/data/book/ {TINY}", 0, "saved:   out/book/"),
    Case("an almost empty out_dir", f"train --dataset=book --out_dir=empty {TINY}", 0, "saved:   empty/",
         bring_empty_folder),
    Case("nanoGPT's checkpoint", "sample --checkpoint=nano.pt", 2, "import it: python convert.py nano.pt out/"),
    Case("nanoGPT's folder", "sample --checkpoint=nano", 2, "import it: python convert.py nano/ckpt.pt out/",
         lambda: (Path("nano").mkdir(), shutil.copy("nano.pt", "nano/ckpt.pt"))),
    Case("nanoGPT's name --lr", f"train --dataset=book --lr=0.5 --min_lr=0.4 {TINY}", 0, "done:"),
    Case("lr in a recipe", f"train lr.py --dataset=book --out_dir=out/lr {TINY}", 0, "done:"),
    Case("numbers for words", "prepare tuple.py --name=new", 2, "tuple.py: input must be a tuple of strings"),
    Case("two stops", "sample --checkpoint=out/run --stop=a --stop=e --output=s.jsonl --prompt=o", 0, "saved", None,
         lambda: not set("ae") & set(json.loads(Path("s.jsonl").read_text("utf-8"))["text"])),
    Case("a cut .pt", "convert nano.pt new --dataset=book", 2, "it is damaged, or cut short", cut_nano),
    Case("file://", f"{NEW} file:///etc/hosts", 2, "only http://, https:// and hf://datasets/ can be read"),
    Case("no such data set", f"train --dataset=gone {TINY}", 2, "there is no data set data/gone"),
    Case("a data set that is gone", "train --init_from=resume --out_dir=out/run", 2,
         "there is no data set data/book", lambda: shutil.rmtree("data/book")),
    Case("a rebuilt data set", "train --init_from=resume --out_dir=out/run", 2,
         "data/book.1 is: it was moved aside; use --dataset=book.1", rebuild),
    Case("a null field", f"{NEW} null.jsonl", 2, "field 'text' is null, not text"),
    Case("never evaluated", "convert nano.pt new --dataset=book", 0, "parameters, never evaluated",
         lambda: change_nano(best_val_loss=1e9)),
    Case("minutes=0 after max_iters", f"train --dataset=book {TINY} --minutes=0", 0, "max_iters=1 reached"),
    Case("a name with ../", "prepare --name=../x --input=book.txt", 2, "--name must be letters"),
    Case("a plot of no known format", "runs plot out/run --output=x.foo", 2, "x.foo: Format 'foo' is not"),
    Case("the CPU by number", f"train --dataset=book {TINY} --device=cpu:0", 0, "machine: cpu ("),
    # E. other models
    Case("n_inner", "sample --checkpoint=gpt2", 0, "gpt2: cpu", lambda: change_config(n_inner=128)),
    Case("gelu_pytorch_tanh", "sample --checkpoint=gpt2", 0, "gpt2: cpu",
         lambda: change_config(activation_function="gelu_pytorch_tanh")),
    Case("wte as the head", "sample --checkpoint=gpt2", 0, "gpt2: cpu",
         lambda: change_tensors(lambda t: {"lm_head.weight": t.pop("transformer.wte.weight"), **t})),
    Case("shards", "sample --checkpoint=gpt2", 0, "gpt2: cpu", shard),
    Case("pickled weights", "sample --checkpoint=gpt2", 2, "pytorch_model.bin is a pickle",
         lambda: os.rename("gpt2/model.safetensors", "gpt2/pytorch_model.bin")),
    Case("prefixes", "sample --checkpoint=gpt2", 0, "gpt2: cpu",
         lambda: change_tensors(lambda t: {f"module._orig_mod.{n}": p for n, p in t.items()})),
    Case("n_ctx", "convert out/run hf", 0, "parameters", None,
         lambda: json.loads(Path("hf/config.json").read_text())["n_ctx"] == 16),
    Case("only n_ctx", "sample --checkpoint=gpt2", 0, "gpt2: cpu",
         lambda: Path("gpt2/config.json").write_text(
             Path("gpt2/config.json").read_text("utf-8").replace("n_positions", "n_ctx"))),
    Case("a model of the Hub", "sample --checkpoint=someone/gpt2-czech", 2,
         "cannot download someone/gpt2-czech from http://127.0.0.1:9"),
    Case("export of newer parts", "convert out/rotary hf", 2, "transformers' GPT-2 has no rotary=True"),
    Case("a longer block", "train --init_from=out/rotary --block_size=32 --max_iters=1 --batch_size=2", 0,
         "block_size=32; out/rotary/best.safetensors was trained with 16"),
    Case("a longer block, learned", "train --init_from=out/run --block_size=32 --max_iters=1", 2,
         "was made with block_size=16"),
    Case("new characters, extended", f"{NEW} accents.txt --tokenizer=out/run --extend_vocab", 0, "vocabulary 20"),
    Case("nanoGPT before its option bias", "convert nano.pt new --dataset=book", 0, "parameters", old_nano),
    Case("a fork of nanoGPT", "convert nano.pt new --dataset=book", 2, "it has rope",
         lambda: change_nano(model_args={"n_layer": 1, "rope": True})),
    Case("a benchmark", "evaluate --checkpoint=out/run --task=bits_per_byte --input book.txt", 0, "bits_per_byte "),
]  # fmt: skip


@needs_gpt2_vocabulary
@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_what_people_bring(here, capsys, case):
    if case.before:
        case.before()
    name, *argv = re.findall(r"'[^']*'|\S+", case.command)
    capsys.readouterr()
    code = SCRIPTS[name]([word.strip("'") for word in argv])
    out, err = capsys.readouterr()
    assert (code, "Traceback" in err) == (case.code, False), err
    assert case.says in out + err, out + err
    if case.code:
        assert err.count("\n") == 1, err
    assert case.then is None or case.then()


def test_a_model_learns_new_characters(here, capsys):
    argv = ["--name=new", "--input=accents.txt", "--tokenizer=out/run", "--extend_vocab"]
    assert prepare.main(argv) == 0
    finetune = ["--init_from=out/run", "--dataset=new", "--out_dir=out/new", "--device=cpu"]
    assert train.main([*finetune, "--max_iters=1", "--learning_rate=1e-9"]) == 0
    out = capsys.readouterr().out
    assert "new characters, which start with the mean embedding: 3 ('nv\u00ef')" in out
    old, new = (load(f"out/{run}/ckpt.safetensors")[0] for run in ("run", "new"))
    wte, extended = old["model.wte.weight"], new["model.wte.weight"]
    assert len(extended) == len(wte) + 3
    mean = wte.mean(0).expand(3, -1)
    assert torch.allclose(extended, torch.cat((wte, mean)), atol=1e-6)
    assert sample.main(["--checkpoint=out/new", "--prompt=na\u00efve", "--device=cpu"]) == 0
    assert train.main(["--init_from=resume", "--out_dir=out/new", "--max_iters=2"]) == 0


def test_a_run_that_is_going_on(here, capsys):
    lock = filelock.FileLock("out/run/.lock")
    with lock:
        assert train.main(["--init_from=resume", "--out_dir=out/run"]) == 2
    assert "another process is training in out/run; wait for it" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["-", "/dev/stdin", "<(cat book.txt)"])
def test_text_from_a_pipe(here, word):
    command = f"{sys.executable} {ROOT}/prepare.py --name=new --input {word} < book.txt"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert begins("It was")()
    assert not list(Path("data/.downloads").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_no_copy_of_standard_input_stays_after_a_mistake_or_a_stop(here):
    command = [sys.executable, f"{ROOT}/prepare.py", "--name=new", "--input=-"]
    done = subprocess.run(command, input=FILES["latin1.txt"], capture_output=True)
    assert done.returncode == 2 and b"standard input is not UTF-8" in done.stderr
    assert not list(Path("data/.downloads").iterdir())
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        while not list(Path("data/.downloads").iterdir()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not list(Path("data/.downloads").iterdir())


def test_arguments_are_utf8_whatever_the_locale(here):
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert prepare.main(["--name=new", "--input=accents.txt"]) == 0
    assert train.main(["--dataset=new", *TINY.split(), "--out_dir=out/new"]) == 0
    argv = ["--checkpoint=out/new", "--prompt=naïve", "--stop=ï", "--num_samples=1", "--device=cpu"]
    done = script("sample.py", *argv, env=env, cwd=here)
    assert done.returncode == 0, done.stderr


def test_text_of_a_prompt_ends_documents(here):
    tok = tokenizer.BytePairTokenizer.train([BOOK], 270)
    assert tok.end_of_text in encode_prompt(tok, "a<|endoftext|>b", 0)
