"""Promise: text becomes the same bins everywhere, whole or not at all."""

import hashlib
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SHAKESPEARE, needs_gpt2_vocabulary, needs_shakespeare
from hypothesis import given
from hypothesis import strategies as st

import prepare
from data import bins, tokenizer


@needs_shakespeare
def test_tiny_shakespeare_in_characters(tmp_path, capsys):
    argv = ["shakespeare_char", f"--input={SHAKESPEARE}", f"--data_dir={tmp_path}"]
    assert prepare.main(argv) == 0
    dataset = bins.load(tmp_path / "shakespeare_char")
    assert dataset.vocab_size == 65
    assert (len(dataset.train.tokens), len(dataset.val.tokens)) == (1_003_854, 111_540)
    tok = tokenizer.load(dataset.tokenizer)
    text = tok.decode(dataset.train.tokens) + tok.decode(dataset.val.tokens)
    assert text == SHAKESPEARE.read_bytes().decode()
    table = capsys.readouterr().out
    assert "1,003,854" in table and "111,540" in table and "MB/s" in table


@needs_shakespeare
@needs_gpt2_vocabulary
def test_tiny_shakespeare_in_gpt2_tokens(tmp_path):
    argv = ["shakespeare", f"--input={SHAKESPEARE}", f"--data_dir={tmp_path}"]
    assert prepare.main(argv) == 0
    dataset = bins.load(tmp_path / "shakespeare")
    assert (len(dataset.train.tokens), len(dataset.val.tokens)) == (301_966, 36_059)
    text = tokenizer.load(dataset.tokenizer).decode(dataset.val.tokens)
    assert SHAKESPEARE.read_text().endswith(text)


def test_pydocs_needs_no_network(tmp_path):
    assert prepare.main(["pydocs", f"--data_dir={tmp_path}"]) == 0
    dataset = bins.load(tmp_path / "pydocs")
    assert len(dataset.train.tokens) > 300_000
    assert "object" in tokenizer.load(dataset.tokenizer).decode(dataset.val.tokens)


def test_meta_tells_all(data_dir, text):
    meta = json.loads((data_dir / "small/meta.json").read_text("utf-8"))
    train = (data_dir / "small/train.bin").read_bytes()
    assert meta["splits"]["train"] == {
        "tokens": len(train) // 2,
        "documents": 1,
        "bytes": len(text.encode()) * 9 // 10,
        "sha256": hashlib.sha256(train).hexdigest(),
    }
    assert meta["tokenizer"] == {"kind": "char", "characters": "".join(sorted(set(text)))}
    assert np.frombuffer(train, "<u2").max() < meta["vocab_size"]


def test_an_older_data_set_is_moved_aside(tmp_path, capsys):
    source = tmp_path / "source.txt"
    argv = ["--name=mine", f"--input={source}", f"--data_dir={tmp_path}"]
    for words in ("one two three", "four five six"):
        source.write_text(words)
        assert prepare.main(argv) == 0
    assert "moved" in capsys.readouterr().out
    for folder, words in (("mine.1", "one two thr"), ("mine", "four five s")):
        dataset = bins.load(tmp_path / folder)
        assert tokenizer.load(dataset.tokenizer).decode(dataset.train.tokens) == words


def test_an_older_data_set_without_a_bin_is_moved_aside_too(tmp_path):
    source, folder = tmp_path / "source.txt", tmp_path / "mine"
    source.write_text("one two three")
    argv = ["--name=mine", f"--input={source}", f"--data_dir={tmp_path}"]
    assert prepare.main(argv) == 0
    (folder / "notes.txt").write_text("the user's")
    (folder / "train.bin").unlink()
    assert prepare.main(argv) == 0
    assert len(bins.load(folder).train.tokens) == 11 and (folder / "notes.txt").exists()
    assert {path.name for path in (tmp_path / "mine.1").iterdir()} == {"val.bin", "meta.json"}


def test_line_ends_stay_as_they_are(tmp_path):
    source = tmp_path / "source.txt"
    source.write_bytes(b"a\r\nb\rc\n" * 10)
    assert prepare.main(["--name=ends", f"--input={source}", f"--data_dir={tmp_path}"]) == 0
    dataset = bins.load(tmp_path / "ends")
    assert tokenizer.load(dataset.tokenizer).decode(dataset.train.tokens).startswith("a\r\nb\rc\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("To be, or not to be. " * 10_000)

    def no_file_above_100_kb():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, str(ROOT / "prepare.py"), "--name=mine", f"--input={source}"]
    done = subprocess.run(
        [*command, f"--data_dir={tmp_path}/data"],
        preexec_fn=no_file_above_100_kb,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr and "data/mine" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "data").iterdir()) == []


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_comes_back(text):
    byte_pairs = tokenizer.BytePairTokenizer([b"th", b"the", b"\xc3\xa9"])
    for tok in (tokenizer.CharTokenizer.train([text]), tokenizer.ByteTokenizer(), byte_pairs):
        again = tokenizer.load(json.loads(json.dumps(tok.meta())))
        assert again.decode(again.encode(text)) == text
        assert again.encode(text).max() < again.vocab_size


@needs_gpt2_vocabulary
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_gpt2_tokens_give_any_text_back(text):
    tok = tokenizer.GPT2Tokenizer()
    assert tok.decode(tok.encode(text)) == text


@needs_gpt2_vocabulary
def test_gpt2_tokens_are_gpt2s():
    tok = tokenizer.GPT2Tokenizer()
    assert tok.encode("Hello world").tolist() == [15496, 995]
    assert len(tok.encode("<|endoftext|>")) > 1, "text cannot forge the end of a document"
    assert tok.decode([tok.end_of_text]) == "<|endoftext|>"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_sigterm_leaves_nothing(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("To be, or not to be. " * 2_000_000)
    command = [sys.executable, str(ROOT / "prepare.py"), "--name=mine", f"--input={source}"]
    run = subprocess.Popen([*command, f"--data_dir={tmp_path}/data"], stderr=subprocess.PIPE)
    while not list(tmp_path.glob("data/.mine.*.partial")):
        assert run.poll() is None, run.stderr.read()
    run.terminate()
    assert run.wait(timeout=60) == 143
    assert list((tmp_path / "data").iterdir()) == []
