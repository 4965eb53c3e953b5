"""Promise: any text becomes documents, the same on every run, and documents become splits."""

import bz2
import gzip
import json
import os
import random
import re
import sys
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_gpt2_vocabulary
from hypothesis import example, given
from hypothesis import strategies as st

import prepare
from data import bins, documents, formats, tokenizer
from data.documents import Corpus, Document
from data.errors import UserError

LIBRARY = Path(sysconfig.get_path("stdlib")) / "asyncio"  # half a megabyte of Python
LINES = "".join(json.dumps({"text": f"line {i}", "body": i}) + "\n" for i in range(3))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, data in {
        "book.txt": b"the book\r\n",
        "notes/b.md": b"b in notes",
        "notes/a/z.md": b"z in notes/a",
        "notes/picture.png": b"\x89PNG\r\n\x1a\n\0\0\0",
        "notes/.hidden": b"hidden",
        "notes/.git/config": b"hidden too",
        "notes/empty.txt": b"",
        "notes/bom.txt": b"\xef\xbb\xbfmarked",
        "lines.jsonl": LINES.encode(),
        "lines.jsonl.gz": gzip.compress(LINES.encode()),
        "old.txt.gz": gzip.compress(b"old"),
    }.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)


def read(*inputs: str) -> list[str]:
    return [b"".join(d.blocks()).decode() for d in Corpus(inputs, Path("downloads"))]


def build(*argv: str, name: str = "mine") -> tuple[bins.Dataset, str, str]:
    """The data set that prepare.py makes, and the text of its splits."""
    assert prepare.main([f"--name={name}", *argv]) == 0
    dataset = bins.load(Path("data") / name)
    tok = tokenizer.load(dataset.tokenizer)
    return dataset, tok.decode(dataset.train.tokens), tok.decode(dataset.val.tokens)


# ---- inputs -------------------------------------------------------------------------------------


def test_every_kind_of_input_in_the_order_of_the_arguments(folder):
    notes = ["z in notes/a", "b in notes", "marked"]
    lines = ["line 0", "line 1", "line 2"]
    assert read("book.txt") == ["the book\r\n"]
    assert read("notes") == notes
    assert read("**/*.md") == notes[:2]
    assert read("lines.jsonl.gz", "old.txt.gz", "lines.jsonl") == [*lines, "old", *lines]
    assert read("old.txt.gz", "notes", "book.txt") == ["old", *notes, "the book\r\n"]


def test_binary_files_in_a_folder_are_counted(folder, capsys):
    build("--input=notes")
    assert "binary files left out: 1" in capsys.readouterr().out


def test_pythons_own_library_needs_no_download():
    corpus = Corpus(("pystdlib",), Path())
    names = {file.path.name for file in corpus.files}
    assert {"argparse.py", "__future__.py"} <= names and "test_argparse.py" not in names
    assert sum(d.size() for d in corpus) > 5_000_000


NO_TEXTS = {  # what is answered under an address that seems to be a text's: type, content
    "/page": ("text/html; charset=utf-8", b"from afar"),
    "/sorry.txt": ("text/plain", b"\n<!DOCTYPE html>\n<p>Sorry"),
    "/remark.txt": ("text/plain", b"<!-- a page -->\n<HTML><p>Sorry"),
    "/strict.txt": ("application/xml", b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">'),
    "/x.xhtml": ("application/xhtml+xml", b"from afar"),
    "/nothing.txt": ("text/plain", b""),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        text = b"caf\xe9" if self.path == "/latin.txt" else b"from afar"
        kind, body = NO_TEXTS.get(self.path, ("text/plain", text))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(gzip.compress(LINES.encode()) if "gz" in self.path else body)

    def log_message(self, *_):
        pass


def test_a_cut_among_many_combining_marks_is_still_utf8():
    """Where the letter that they belong to is too far back."""
    data = ("a" + "\u0301" * 100).encode()
    for offset in range(len(data) + 1):
        document = Document.of(data, "x")
        assert data[: document.boundary(offset)].decode() in data.decode()


def test_addresses(folder, capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_address[1]}"
        assert read(f"{url}/a.txt?v=1", f"{url}/x.jsonl.gz") == ["from afar", *read("lines.jsonl")]
        assert read(f"{url}/a.txt?v=1") == ["from afar"]
        assert "using the earlier download of" in capsys.readouterr().out
        before = sorted(Path("data").rglob("*"))
        for path, (_, body) in NO_TEXTS.items():
            assert prepare.main(["--name=page", f"--input={url}{path}"]) == 2
            says = "returned a web page" if body else "returned nothing"
            assert f"{url}{path} {says}" in capsys.readouterr().err
        assert sorted(Path("data").rglob("*")) == before, "nothing is left of it"
        assert prepare.main(["--name=latin", f"--input={url}/latin.txt"]) == 2
        assert f"{url}/latin.txt is not UTF-8: byte 0xe9 at offset 3" in capsys.readouterr().err
        httpd.shutdown()


def test_a_file_that_is_named_as_pythons_own_text_is(folder):
    Path("pydocs").write_text("my own")
    assert read("./pydocs") == read("pydoc[s]") == ["my own"]
    assert len(read("pydocs")[0]) > 100_000


def test_linked_folders_are_not_walked_in_circles(folder):
    Path("notes/a/up").symlink_to("..", target_is_directory=True)
    Path("notes/a/top").symlink_to("../..", target_is_directory=True)
    notes = ["z in notes/a", "b in notes", "marked"]
    assert read("notes") == notes and read("notes/**/*.md") == notes[:2]
    assert read(str(Path("notes/**/*.md").absolute())) == notes[:2]
    assert read("notes/.git/*") == ["hidden too"]


def test_normalization_sees_no_seam(folder):
    Path("nfd.txt").write_text("e\u0301" * 400_000)
    dataset, train, val = build("--input=nfd.txt", "--normalize=NFC")
    assert dataset.vocab_size == 1 and train + val == "\u00e9" * 400_000


def test_a_file_name_that_is_no_unicode(folder):
    name = os.fsdecode(b"b\xff.txt")
    Path(name).write_text("odd name " * 20)
    _, train, _ = build(f"--input={name}")
    assert train.startswith("odd name")


# ---- pieces -------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("ab \n\r\u3000é字😀\u0301.")), st.integers(5, 40))
@example(" " * 50 + "a", 7)
def test_pieces_are_the_document_and_short(text, size):
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", size)
        pieces = [p.text for p in Document.of(data, "x").pieces()]
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= size for piece in pieces)


@needs_gpt2_vocabulary
@pytest.mark.parametrize("seed", range(20))
def test_pieces_give_the_tokens_of_the_whole(seed, monkeypatch):
    """Runs of every kind of space between words, as GPT-2's expression tells them apart."""
    words = random.Random(seed).choices(
        ["ab", "12", "!?", " ", "\n", "\r\n", "\u3000", "字"], k=500
    )
    text = "".join(words)
    monkeypatch.setattr(documents, "PIECE_BYTES", 200)
    tok = tokenizer.GPT2Tokenizer()
    pieces = [p.text for p in Document.of(text.encode(), "x").pieces()]
    ids = np.concatenate([tok.encode(piece) for piece in pieces])
    assert len(pieces) > 4 and ids.tolist() == tok.encode(text).tolist()


@needs_gpt2_vocabulary
@pytest.mark.parametrize("text", [" " * 2_000_000 + "a", "a" * 2_000_000, "\n" * 999_999 + "字"])
def test_a_text_that_is_one_endless_run(folder, text):
    Path("run.txt").write_text(text, newline="")
    _, train, val = build("--input=run.txt", "--tokenizer=gpt2")
    assert train + val == text


def test_where_a_byte_is_wrong(folder, capsys):
    data = b"ab \n" * 100_000
    Path("bad.txt").write_bytes(data + b"\xff" + data)
    assert prepare.main(["--name=x", "--input=bad.txt"]) == 2
    assert "bad.txt is not UTF-8: byte 0xff at offset 400,000" in capsys.readouterr().err


@given(st.text("ab"), st.text("ab", min_size=1, max_size=3), st.integers(1, 9))
@example("aabaab", "aab", 1)
def test_documents_between_separators_of_any_length(text, separator, size):
    data, separator = text.encode(), separator.encode()
    blocks = iter([data[i : i + size] for i in range(0, len(data), size)])
    assert list(documents.split_blocks(blocks, separator)) == data.split(separator)


def test_every_byte_is_searched_once():
    """Also if the separator never comes, or the next part would be as long."""

    class Block(bytes):
        searched = 0

        def __radd__(self, rest: bytes) -> bytes:
            Block.searched += len(rest) + len(self)
            return rest + bytes(self)

    blocks = [Block(b"a" * 1000) for _ in range(500)]
    assert list(documents.split_blocks(iter(blocks), b"<|end|>")) == [b"a" * 500_000]
    assert 500_000 <= Block.searched < 510_000


# ---- splits -------------------------------------------------------------------------------------


def test_the_end_of_each_of_a_few_documents_validates(folder):
    Path("one.txt").write_text("1234567890" * 10)
    Path("two.txt").write_text("äbcdefghij" * 10)
    _, train, val = build("--input", "one.txt", "two.txt", "--val_fraction=0.2")
    assert train == "1234567890" * 8 + "\n" + "äbcdefghij" * 8
    assert val == "1234567890" * 2 + "\n" + "äbcdefghij" * 2


def test_of_many_documents_whole_ones_validate_and_stay_where_they_are(folder):
    def splits(count: int) -> list[set[str]]:
        records = [json.dumps({"text": f"document {i}."}) for i in range(count)]
        random.Random(count).shuffle(records)
        Path("many.jsonl").write_text("\n".join(records))
        return [set(text.split("\n")) for text in build("--input=many.jsonl")[1:]]

    train, val = splits(500)
    more_train, more_val = splits(1000)
    assert train | val == {f"document {i}." for i in range(500)}
    assert 25 <= len(val) <= 75, "about a tenth"
    assert train < more_train and val < more_val


def test_a_text_of_ones_own_to_validate_on(folder):
    _, train, val = build("--input", "book.txt", "old.txt.gz", "--val_input", "notes/b.md")
    assert train == "the book\r\n\nold" and val == "b in notes"
    _, train, val = build("--input", "old.txt.gz", "--val_input", "notes/b.md", "notes/a")
    assert train == "old" and val == "b in notes\nz in notes/a"


@pytest.mark.parametrize("inputs", [["notes"], ["**/*.md"], ["old.txt.gz", "notes/b.md"]])
def test_what_validates_is_not_trained_on(folder, capsys, inputs):
    for path in ("notes/b.md", "./notes/../notes/b.md", str(Path("notes/b.md").absolute())):
        _, train, val = build("--input", *inputs, "--val_input", path)
        assert val == "b in notes" and val not in train
    assert prepare.main(["--name=new", "--input=book.txt", "--val_input=book.txt"]) == 2
    assert "book.txt: all of it is in --val_input; name other text" in capsys.readouterr().err


@needs_gpt2_vocabulary
@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_end_of_text_stands_between_documents(folder, kind):
    vocab = ["--vocab_size=260"] if kind == "bpe" else []
    text = '{"text": "so said <|endoftext|> he, so said he"}\n'
    Path("x.jsonl").write_text(text * 3)
    argv = ["--input=x.jsonl", "--val_input=book.txt", f"--tokenizer={kind}", *vocab]
    dataset, train, _ = build(*argv)
    ids, end = dataset.train.tokens, tokenizer.load(dataset.tokenizer).end_of_text
    assert (ids == end).sum() == 2 and ids[-1] != end
    assert train.count("<|endoftext|>") == 5, "three of them are ordinary text"


def test_the_same_input_gives_the_same_bins_for_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "PIECE_BYTES", 5000)  # more batches than can be waiting
    Path("own.txt").write_text("import asyncio")
    text = "\n".join(path.read_text("utf-8") for path in sorted(LIBRARY.glob("*.py")))
    for kind in ("char", "bpe"):
        made = set()
        for workers in (1, 2, 5, 5):
            argv = [
                f"--input={LIBRARY}/*.py",
                "--val_input=own.txt",
                f"--tokenizer={kind}",
                f"--workers={workers}",
            ]
            if kind == "bpe":
                argv.append("--vocab_size=300")
            dataset, train, _ = build(*argv, name=f"{kind}{workers}{len(made)}")
            assert kind == "bpe" or train == text
            made.add((json.dumps(dataset.tokenizer), dataset.fingerprint))
        assert len(made) == 1


# ---- tokenizers ---------------------------------------------------------------------------------


def test_bpe_learns_the_most_frequent_pairs():
    tok = tokenizer.BytePairTokenizer.train(["aab\naab\naab\nac"], 259)
    assert tok.tokens == [b"aa", b"aab"] and tok.vocab_size == 259 and tok.end_of_text == 258
    assert tok.encode("aab").tolist() == [257]


def test_bpe_learns_from_what_is_trained_on_alone(folder):
    Path("train.txt").write_text("ab\n" * 50)
    Path("val.txt").write_text("cd\n" * 500)
    argv = ["--input=train.txt", "--val_input=val.txt", "--tokenizer=bpe", "--vocab_size=258"]
    dataset, _, val = build(*argv)
    assert dataset.tokenizer["tokens"] == ["ab"] and val == "cd\n" * 500


def test_any_language_in_characters(folder):
    text = "床前明月光，疑是地上霜。\nالسلام عليكم\n👩‍👩‍👧 e\u0301\n" * 20
    Path("world.txt").write_text(text)
    _, train, val = build("--input=world.txt")
    assert train + val == text


def test_more_characters_than_two_bytes_can_count(folder):
    """And the CJK characters beyond the basic plane."""
    codes = [c for c in range(0x20, 0x2FA20) if not 0xD800 <= c < 0xE000][:70_000]
    Path("all.txt").write_text("".join(map(chr, codes)))
    dataset, train, val = build("--input=all.txt")
    assert dataset.vocab_size == 70_000 and dataset.train.tokens.dtype == np.uint32
    assert [ord(c) for c in train + val] == codes


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_normalize(folder, kind):
    Path("nfd.txt").write_text("cafe\u0301 " * 100)
    vocab = ["--vocab_size=260"] if kind == "bpe" else []
    dataset, train, _ = build("--input=nfd.txt", "--normalize=NFC", f"--tokenizer={kind}", *vocab)
    assert train.startswith("caf\u00e9 ") and "\u0301" not in train
    tok = tokenizer.load(dataset.tokenizer)
    assert tok.decode(tok.encode("cafe\u0301")) == "caf\u00e9", "a prompt takes the same form"


def test_the_tokenizer_of_a_data_set_a_run_and_a_checkpoint(data_dir, train_small, capsys):
    assert train_small("--max_iters=1", "--num_samples=0") == 0
    Path("new.txt").write_text("the new text " * 40)
    small = bins.load(data_dir / "small")
    for place in (data_dir / "small", "run", "run/ckpt.safetensors"):
        dataset, text, _ = build("--input=new.txt", f"--tokenizer={place}")
        assert dataset.tokenizer == small.tokenizer and text.startswith("the new text the")
    argv = ["--init_from=run", "--dataset=mine", "--data_dir=data", "--out_dir=tuned"]
    import train as script

    assert script.main([*argv, "--max_iters=2", "--num_samples=0", "--block_size=16"]) == 0


def test_a_damaged_checkpoint_gives_no_tokenizer(train_small, capsys):
    assert train_small("--max_iters=1", "--num_samples=0") == 0
    path = Path("run/ckpt.safetensors")
    data = bytearray(path.read_bytes())
    place = re.search(rb'characters\\": \\"(.)', data).end()
    data[place] ^= 1
    path.write_bytes(data)
    Path("new.txt").write_text("the new text " * 40)
    assert prepare.main(["--name=x", "--input=new.txt", f"--tokenizer={path}"]) == 2
    assert "its digest does not match" in capsys.readouterr().err


@pytest.mark.parametrize(
    "meta",
    [
        {"kind": "bpe", "tokens": ["a"]},
        {"kind": "bpe", "tokens": ["ab", "ab"]},
        {"kind": "bpe", "tokens": ["\u0100b"]},
        {"kind": "bpe", "tokens": [7]},
        {"kind": "bpe", "tokens": "ab"},
        {"kind": "bpe", "tokens": ["ab"], "ids": [*range(256), 2**70]},
        {"kind": "bpe", "tokens": ["ab"], "ids": [*range(257)], "end_of_text": 2**70},
        {"kind": "byte", "normalize": "NFX"},
        {"kind": "byte", "normalize": 7},
        {"kind": "abacus"},
        [],
    ],
)
def test_what_is_no_tokenizer_is_refused(meta):
    with pytest.raises(prepare.UserError):
        tokenizer.load(meta)


# ---- long files ---------------------------------------------------------------------------------


def test_what_is_noticed_counts_to_the_end_of_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_bytes(b"a\r\n" * 600_000 + b"\xff")
    build("--input=long.txt", "--errors=replace")
    out = capsys.readouterr().out
    assert "lines that end in CRLF: 600,000" in out and "bytes replaced: 1" in out


def test_a_mark_at_the_start_of_a_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in (2, 1, 0):  # the newline and the mark, each on either side of the border
        first = b"x" * (formats.BLOCK_BYTES - n) + b"\n"
        Path("marks.txt").write_bytes(first + b"\xef\xbb\xbfmarked\n")
        assert read("marks.txt") == [first.decode() + "marked\n"]


def test_what_is_left_out_is_left_out_whenever_the_file_is_read(tmp_path, monkeypatch):
    """Also where its size stays: two marks fewer, and three bytes that become three each."""
    monkeypatch.chdir(tmp_path)
    mark = b"\xef\xbb\xbf"
    Path("a.txt").write_bytes(
        b"one\n" + mark + b"two\n" + mark + b"three\xff\xff\xff" + b" four" * 30
    )
    Path("b.txt").write_bytes(mark + b"four " * 30)
    _, train, val = build("--input", "a.txt", "b.txt", "--errors=replace", "--tokenizer=byte")
    texts = "one\ntwo\nthree\ufffd\ufffd\ufffd" + " four" * 30, "four " * 30
    (train_a, train_b), (val_a, val_b) = (part.rsplit("\n", 1) for part in (train, val))
    assert (train_a + val_a, train_b + val_b) == texts


def test_damage_in_the_middle_of_a_compressed_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = bytearray(bz2.compress(random.Random(0).randbytes(2_000_000).hex().encode()))
    content[len(content) // 2 :] = bytes(len(content) // 2)
    Path("damaged.txt.bz2").write_bytes(content)
    assert prepare.main(["--name=mine", "--input=damaged.txt.bz2"]) == 2
    assert "damaged.txt.bz2 is damaged" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that cannot be read")
def test_a_disk_that_fails_in_an_input(folder, capsys):
    Path("many.jsonl").write_text(LINES * 40)
    argv = ["--name=mine", "--input", "many.jsonl", "/proc/self/mem", "--tokenizer=byte"]
    assert prepare.main(argv) == 1
    err = capsys.readouterr().err
    assert "Input/output error: '/proc/self/mem'" in err and "data/mine" not in err


def test_a_place_in_a_normalized_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("known.txt").write_text("e\u0301\n" * 30, encoding="utf-8")
    assert prepare.main(["--name=mine", "--input=known.txt", "--normalize=NFC"]) == 0
    Path("new.txt").write_text("e\u0301\n" * 30 + "\n\nx", encoding="utf-8")
    argv = ["--name=new", "--input=new.txt", "--tokenizer=data/mine"]
    assert prepare.main(argv) == 2
    assert "new.txt, character 93 (line 33): the vocabulary has no 'x'" in capsys.readouterr().err


def test_no_document_in_a_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("many.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(100)))
    argv = ["--name=mine", "--input=many.jsonl", "--val_fraction=1e-9"]
    assert prepare.main(argv) == 2
    assert "no document was assigned to the val split" in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"one line\n")
    (document,) = Corpus((str(path),), tmp_path)
    assert document.size() == 9
    path.write_bytes(b"\xff" * 9)
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="log.txt was changed while it was read"):
        document.size()
