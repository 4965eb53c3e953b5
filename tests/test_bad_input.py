"""Promise: what a user gets wrong ends with code 2 and one line that says what would be right.

Nothing is written, and there is no traceback.
"""

import gzip
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHAKESPEARE, SMALL, script, write_bins

import convert
import prepare
import sample
import train as training

TEXT = "It was the best of times, it was the worst of times. "


@pytest.fixture
def folder(tmp_path, monkeypatch, data_dir):
    """A working folder with data sets, texts, recipes and a run, some good and some bad."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/small").symlink_to(data_dir / "small")
    (tmp_path / "good.txt").write_text(TEXT * 100)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "é.txt").write_text("café " * 100)
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested/meta.json").write_text("[" * 100_000)
    for name in ("bare", "binary", "mixed"):
        (tmp_path / name).mkdir()
    (tmp_path / "binary/a").write_bytes(b"PNG\0\1\2")
    (tmp_path / "mixed/a.txt").write_text(TEXT)
    (tmp_path / "mixed/b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.txt.gz").write_text(TEXT)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(TEXT.encode())[:-9])
    (tmp_path / "good.jsonl").write_text('{"text": "a b"}\n\n{"text": "c d"}\n')
    (tmp_path / "no.jsonl").write_text('{"text": "a b"}\n{"text": ')
    (tmp_path / "list.jsonl").write_text('["text"]')
    (tmp_path / "half.jsonl").write_text(r'{"text": "\ud800"}')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9" + TEXT.encode())
    (tmp_path / "typo.py").write_text("bach_size = 3")
    (tmp_path / "type.py").write_text("batch_size = '3'")
    (tmp_path / "broken.py").write_text("batch_size = ")
    (tmp_path / "raises.py").write_text("raise RuntimeError('no')")
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    (tmp_path / "text.safetensors").write_text(TEXT)
    for name, ids, vocab_size in (
        ("short", np.zeros(20, np.uint16), 5),
        ("beyond", np.full(5000, 7, np.uint16), 5),
        ("cut", np.zeros(5000, np.uint16), 5),
        ("bytes", np.zeros(5000, np.uint16), 256),
    ):
        write_bins(tmp_path / "data" / name, ids, vocab_size)
    os.truncate(tmp_path / "data/cut/val.bin", 9999)
    return tmp_path


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "run"
    argv = [*SMALL, f"--data_dir={data_dir}", f"--out_dir={folder}", "--max_iters=1"]
    assert training.main([*argv, "--num_samples=0"]) == 0
    return folder


def files(folder: Path) -> dict:
    return {p: p.is_file() and p.stat().st_mtime_ns for p in folder.rglob("*")}


CASES = (
    [
        # options
        (training.main, "typo.py", "typo.py: unknown option 'bach_size'; did you mean 'batch_size'"),
        (training.main, "type.py", "batch_size must be a whole number in [1, 1e6], not '3'"),
        (training.main, "broken.py", "broken.py, line 1: SyntaxError"),
        (training.main, "raises.py", "raises.py, line 1: RuntimeError: no"),
        (training.main, "nowhere.py", "no recipe nowhere.py"),
        (training.main, "--lerning_rate=1", "unknown option 'lerning_rate'; did you mean 'learning_r"),
        (training.main, "--learning-rate=1", "did you mean 'learning_rate'"),
        (training.main, "learning_rate=1", "unexpected argument 'learning_rate=1'"),
        (training.main, "--batch_size=many", "batch_size must be a whole number"),
        (training.main, "--batch_size=0", "batch_size must be a whole number in [1, 1e6], not 0"),
        (training.main, "--learning_rate=0", "learning_rate must be a number in (0, inf), not 0"),
        (training.main, "--learning_rate=nan", "learning_rate must be a number"),
        (training.main, "--dropout=1", "dropout must be a number in [0, 1), not 1"),
        (training.main, "--dtype=int8", "dtype must be one of auto, float32, bfloat16, float16"),
        (training.main, "--schedule=step", "schedule must be one of cosine, linear, constant"),
        (training.main, "--compile=maybe", "compile must be one of auto, True, False"),
        (training.main, "--seed=-1", "seed must be a whole number in [0, inf), not -1"),
        (training.main, "--gradient_accumulation_steps=4", "batch_size counts all sequences"),
        (training.main, "--eval_iters=4", "evaluation reads the whole split"),
        (training.main, "--decay_lr=False", "use schedule=constant"),
        (training.main, "--always_save_checkpoint", "every evaluation saves ckpt.safetensors"),
        (training.main, "--wandb_log", "use wandb"),
        (training.main, "--backend=nccl", "the device decides it"),
        (training.main, "--start=x", "use sample_prompt"),
        (training.main, "--minutes=inf", "minutes must be a number in [0, 1e6], not inf"),
        (training.main, "--weight_decay=-inf", "weight_decay must be a number in [0, inf), not -inf"),
        # what does not go together
        (training.main, "--n_embd=30 --n_head=4", "is not a multiple of n_head=4; use n_embd=28 or 32"),
        (training.main, "--n_embd=6 --n_head=12", "use n_embd=12"),
        (training.main, "--n_embd=6 --n_head=2 --rotary", "rotary needs a head size that is a multiple of 2"),
        (training.main, "--n_embd=12 --n_head=2 --key_shift", "key_shift needs a head size that is a multiple of 4"),
        (training.main, "--n_kv_head=-1", "n_kv_head must be"),
        (training.main, "--optimizer=sgd", "optimizer must be one of adamw, muon"),
        (training.main, "--optimizer=muon --muon_lr=0", "muon_lr must be"),
        (training.main, "--init_from=RUN --rotary", "made with rotary=False"),
        (training.main, "--init_from=resume --out_dir=RUN --optimizer=muon", "made with optimizer=adamw"),
        (training.main, "--batch_size=12 --micro_batch_size=5", "micro_batch_size=4 or batch_size=15"),
        (training.main, "--max_iters=0", "max_iters=0 never ends"),
        (training.main, "--max_iters=0 --patience=9", "needs lr_decay_iters"),
        (training.main, "--min_lr=1", "min_lr=1.0 is above learning_rate"),
        (training.main, "--vocab_size=3", "vocab_size=3 is below the "),
        (training.main, "--checkpoint=x", "checkpoint=x needs --init_from=resume"),
        # data sets
        (training.main, "--dataset=nowhere", "no recipe 'nowhere'"),
        (training.main, "--dataset=short", "two windows of block_size=16 need 34"),
        (training.main, "--dataset=beyond", "token id 7 is beyond the vocabulary of 5"),
        (training.main, "--dataset=cut", "val.bin has 9999 bytes"),
        (training.main, "--block_size=4096", "use a longer text or a smaller block_size"),
        (training.main, "--sample_prompt=日本", "the vocabulary has no '日' (U+65E5"),
        # checkpoints and machines
        (training.main, "--init_from=nowhere", "cannot open checkpoint nowhere: No such file"),
        (training.main, "--init_from=text.safetensors", "is not a usable checkpoint"),
        (training.main, "--init_from=data", "is a folder without best.safetensors or ckpt"),
        (training.main, "--init_from=resume --out_dir=nowhere", "no run in nowhere: no such folder"),
        (training.main, "--init_from=resume --out_dir=mixed", "no run in mixed: it has none of run.json"),
        (training.main, "--init_from=RUN --n_embd=64", "made with n_embd=32"),
        (training.main, "--init_from=RUN --dataset=bytes", "data/bytes has a different tokenizer"),
        (training.main, "--dataset=good --data_dir=good.txt", "--data_dir=good.txt is a file, not a f"),
        (training.main, "--init_from=resume --checkpoint=RUN/ckpt.safetensors", "belongs to the run in"),
        (training.main, "--device=cuda:9", "device 'cuda:9'"),
        (training.main, "--device=abacus", "no device 'abacus'"),
        (training.main, "--dtype=float16", "dtype=float16 needs CUDA"),
        (training.main, "--n_embd=65536 --n_layer=99", "or a model of less than"),
        (training.main, "--batch_size=1000000 --n_layer=999", "use --micro_batch_size="),
        (training.main, "--out_dir=", "cannot be a folder for a run"),
        (training.main, "--out_dir=data", "--out_dir=data has files that are not a run's"),
        (training.main, f"--out_dir={'a' * 300}", "File name too long"),
        (training.main, f"--seed={'9' * 40}", "seed must be a whole number"),
        (training.main, f"--max_iters=1{'0' * 400}", "max_iters must be a whole number"),
        (training.main, "--num_samples=100000000000", "num_samples must be a whole number in [0, 1e4]"),
        (training.main, "--device=cpu:7", "no device 'cpu:7'; this machine has 1"),
        (training.main, "exits.py", "exits.py, line 1: SystemExit"),
        (prepare.main, "--name=x --input=/dev/zero", "/dev/zero is not a regular file"),
        (prepare.main, "--name=good.txt --input=good.txt --data_dir=.", "good.txt exists and is not a data set"),
        (prepare.main, "--name=x --input=good.txt --data_dir=good.txt", "Not a directory"),
        (training.main, "--out_dir=good.txt", "--out_dir=good.txt cannot be a folder for a run"),
        (training.main, "--out_dir=good.txt/x", "Not a directory"),
        # prepare.py
        (prepare.main, "nowhere", "no recipe 'nowhere'; known recipes: shakespeare_char, shakes"),
        (prepare.main, "--name=x", "--name=x needs its text: --input=FILE"),
        (prepare.main, "--input=good.txt", "needs a name for the data set"),
        (prepare.main, "--name=../x --input=good.txt", "--name must be letters"),
        (prepare.main, "--name=x --input=nowhere.txt", "input nowhere.txt: no such file or folder"),
        (prepare.main, "--name=x --input=bare", "input bare: no files found"),
        (prepare.main, "--name=x --input=binary", "no text found; binary files left out: 1"),
        (prepare.main, "--name=x --input=binary/a", "binary/a is not text: it contains zero bytes"),
        (prepare.main, "--name=x --input 'no/*.txt'", "input no/*.txt: no files found"),
        (prepare.main, "--name=x --input 'no/**.txt'", "input no/**.txt: ** stands for folders only, as in"),
        (prepare.main, "--name=x --input mixed", "mixed/b.txt is not UTF-8: byte 0xe9 at offset 3"),
        (prepare.main, "--name=x --input=broken.txt.gz", "broken.txt.gz is a broken .gz file"),
        (prepare.main, "--name=x --input=cut.txt.gz", "cut.txt.gz is damaged, or not compressed as its"),
        (prepare.main, "--name=x --input=no.jsonl", "no.jsonl, line 2: not JSON"),
        (prepare.main, "--name=x --input=list.jsonl", "list.jsonl, line 1: not a JSON object"),
        (prepare.main, "--name=x --input=good.jsonl --field=body", "good.jsonl, line 1: no field 'body'"),
        (prepare.main, "--name=x --input=half.jsonl", "half.jsonl, line 1: not Unicode"),
        (prepare.main, "--name=x --input=deep.jsonl", "deep.jsonl, line 1: not JSON"),
        (prepare.main, "--name=x --input --tokenizer=byte", "--input needs a value"),
        (prepare.main, "--name=x --input=good.txt --tokenizer=bpe --vocab_size=256", "in [257, 1e6], not 256"),
        (prepare.main, "--name=x --input=good.txt --tokenizer=bpe --vocab_size=999", "--vocab_size=999 is too large for this text"),
        (prepare.main, "--name=x --input=good.txt --vocab_size=999", "--vocab_size is for --tokenizer=bpe"),
        (prepare.main, "--name=x --input=good.txt --tokenizer=RUN --normalize=NFC", "--normalize cannot change the tok"),
        (prepare.main, "--name=x --input=good.txt --tokenizer=text.safetensors", "is not a data set, run or chec"),
        (prepare.main, "--name=x --input=good.txt --tokenizer=bare", "bare is not a data set, run or checkp"),
        (prepare.main, "--name=x --input=é.txt --tokenizer=RUN", "the vocabulary has no 'é'"),
        (prepare.main, "--name=x --input=", "--input= is empty: give a file"),
        (prepare.main, "--name=x --input=http://[::1/a", "is not a valid URL"),
        (prepare.main, "--name=x --input=good.txt --tokenizer=nested", "is not a data set, run or checkpo"),
        (training.main, "--dataset=nested --data_dir=.", "nested/meta.json cannot be read"),
        (prepare.main, "--name=x --input=good.txt --val_input=bare", "input bare: no files found"),
        (prepare.main, "--name=x --input=empty.txt", "empty.txt is empty"),
        (prepare.main, "--name=x --input=one.txt", "the text is too short (1 bytes), the train split is e"),
        (prepare.main, "--name=x --input=latin1.txt", "not UTF-8: byte 0xe9 at offset 3"),
        (prepare.main, "--name=x --input=good.txt --separator=\udcff", "is not UTF-8"),
        (prepare.main, "--name=x --input=good.txt --skip_bad_lines", "--skip_bad_lines=True is for JSON lines and"),
        (prepare.main, "--name=x --input=good.txt --encoding=abacus", "--encoding=abacus is unknown to Python"),
        (prepare.main, "--name=x --input=good.jsonl --encoding=abacus", "--encoding=abacus is unknown to Python"),
        (prepare.main, "--name=x --input=good.jsonl --encoding=hex", "--encoding=hex is unknown to Python"),
        (prepare.main, "--name=x --input=good.txt --encoding=utf-16", "good.txt: UTF-16 stream does not start with"),
        (prepare.main, "--name=x --input=good.txt --encoding=utf-32 --errors=replace", "name its byte order, as in"),
        (prepare.main, "--name=x --input=good.txt --tokenizer=words", "--tokenizer=words is not one of char"),
        (prepare.main, "--name=x --input=good.txt --val_fraction=1", "val_fraction must be a number"),
        (
            prepare.main,
            "--name=x --input=good.txt --val_input=good.txt --val_fraction=0.2",
            "--val_fraction cannot be combined with --val_input",
        ),
        # sample.py
        (sample.main, "--checkpoint=nowhere", "cannot open checkpoint nowhere"),
        (sample.main, "--checkpoint=data", "is a folder without best.safetensors or ckpt"),
        (sample.main, "--checkpoint=text.safetensors", "is not a usable checkpoint"),
        (sample.main, "", "no run in out/ has a checkpoint yet"),
        (sample.main, "--checkpoint=RUN --prompt=日本日", "'日' (U+65E5, character 1), '本' (U+672C"),
        (sample.main, "--prompt=FILE:nowhere.txt", "--prompt: nowhere.txt: No such file"),
        (sample.main, "--prompt=FILE:latin1.txt", "--prompt: latin1.txt is not UTF-8 at offset 3"),
        (sample.main, "--top_k=0", "top_k must be a whole number in [1, inf), not 0"),
        (sample.main, "--temperature=-1", "temperature must be a number in [0, inf), not -1"),
        (sample.main, "--top_p=0", "top_p must be a number in (0, 1], not 0"),
        (sample.main, "--top_p=1.5", "top_p must be a number in (0, 1], not 1.5"),
        (sample.main, "--num_samples=0", "num_samples must be a whole number in [1, 1e6]"),
        (sample.main, "--max_new_tokens=0", "max_new_tokens must be a whole number in [1, 1e5]"),
        (sample.main, "--device=cuda:9 --checkpoint=RUN", "device 'cuda:9'"),
        (sample.main, "--start=x", "unknown option 'start'; use prompt"),
        (sample.main, "--port=8001", "--port needs --serve"),
        (convert.main, "RUN new --dataset=small", "--dataset is for nanoGPT's checkpoints"),
    ]
)  # fmt: skip


def words(main, argv: str, run: str) -> list[str]:
    options = [*SMALL, "--data_dir=data"] if main is training.main else []
    return options + [word.replace("RUN", run) for word in shlex.split(argv)]


@pytest.mark.parametrize("main, argv, says", CASES)
def test_one_line_and_nothing_written(folder, run, capsys, main, argv, says):
    before = files(folder)
    assert main(words(main, argv, str(run))) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert files(folder) == before


WITHOUT_ASSERTS = """
import contextlib, io, sys
sys.path[:0] = sys.argv[1:3]
import test_bad_input as table

if not sys.flags.optimize:
    raise SystemExit("asserts are on")
for main, argv, says in table.CASES:
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with contextlib.redirect_stderr(err):
        code = main(table.words(main, argv, sys.argv[3]))
    text = err.buffer.getvalue().decode()
    if code != 2 or says not in text or text.count("\\n") != 1:
        print("WRONG:", argv, code, text)
print("all done")
"""


def test_the_same_without_asserts(folder, run):
    """Under python -O, in one process."""
    command = [
        sys.executable,
        "-O",
        "-c",
        WITHOUT_ASSERTS,
        str(ROOT / "tests"),
        str(ROOT),
        str(run),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "WRONG" not in done.stdout and "all done" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "name, argv, says",
    [
        ("train.py", ["--bs=1"], "unknown option 'bs'"),
        ("sample.py", ["--top_k=0"], "top_k must be"),
        ("prepare.py", ["nowhere"], "no recipe 'nowhere'"),
        ("prepare.py", ["shakespeare_char"], "python prepare.py shakespeare_char --input FILE; without a net"),
        ("prepare.py", ["--name=x", "--input=good.txt", "--tokenizer=gpt2"], "set TIKTOKEN_CACHE_DIR"),
        ("train.py", [f"{ROOT}/config/shakespeare_char.py"], "without a network: python prepare"),
    ],
)  # fmt: skip
def test_real_processes_without_a_network(folder, name, argv, says):
    """The same through the shell, with every address refused and no vocabulary at hand."""
    env = {
        "PATH": "", "TIKTOKEN_CACHE_DIR": str(folder / "nothing"),
        "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9",
    }  # fmt: skip
    before = sorted(folder.rglob("*"))
    done = script(name, *argv, cwd=folder, env=env)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"needs {SHAKESPEARE}")
def test_a_checkpoint_of_another_tokenizer_is_refused(folder, run, capsys):
    assert prepare.main(["--name=mine", "--input=good.txt"]) == 0
    argv = [f"--init_from={run}", "--dataset=mine", "--out_dir=tuned"]
    assert training.main(argv) == 2
    assert "has a different tokenizer from" in capsys.readouterr().err
    assert not Path("tuned").exists()
