"""Promise: data sets of the Hub, Parquet files and token files are read, or refused in one line.

A server on this machine plays the Hub.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from conftest import needs_gpt2_vocabulary

import prepare
import train
from data import bins, hub, tokenizer, writer

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
DOCUMENTS = [f"Document {i} says {'so ' * (i % 50)}and ends." for i in range(300)]
END = 50256


class Hub(BaseHTTPRequestHandler):
    """Has the `files` of one data set, by their paths."""

    files: dict[str, bytes] = {}
    fetched: list[str] = []  # the files that were downloaded

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/datasets/some/texts/resolve/\w+/(.+)", path):
            return self.answer_file(match[1])
        if path == "/api/datasets/some/texts":
            return self.answer(200, {"id": "some/texts", "sha": COMMIT})
        if match := re.fullmatch(rf"/api/datasets/some/texts/tree/{COMMIT}/?(.*)", path):
            found = {p: body for p, body in self.files.items() if p.startswith(match[1])}
            if not found:
                return self.answer(404, {}, **{"X-Error-Code": "EntryNotFound"})
            about = {"type": "file", "oid": "x"}
            tree = [about | {"path": p, "size": len(body)} for p, body in found.items()]
            return self.answer(200, tree)
        self.answer(404, {}, **{"X-Error-Code": "RepoNotFound"})

    def answer_file(self, path):
        body = self.files[path]
        if self.command == "GET":
            self.fetched.append(path)
        etag = hashlib.sha1(body).hexdigest()
        self.answer(200, body, **{"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    def answer(self, status, body, **headers):
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Hub.files, Hub.fetched = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_address[1]}")
        yield Hub
        httpd.shutdown()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def build(*argv: str) -> bins.Dataset:
    assert prepare.main(["--name=mine", *argv]) == 0
    return bins.load(Path("data/mine"))


def documents_of(dataset: bins.Dataset) -> list[str]:
    """All documents of both splits, sorted."""
    tok = tokenizer.load(dataset.tokenizer)
    texts = [tok.decode(split.tokens) for split in (dataset.train, dataset.val)]
    return sorted(text for part in texts for text in part.split(tokenizer.END_OF_TEXT))


@contextmanager
def before_fetching(path: str, act: Callable[[], None]) -> Iterator[None]:
    """Call act() before that file of the Hub is downloaded."""
    fetch = hub.HubFile.fetch

    def hooked(self):
        if self.path == path:
            act()
        return fetch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.HubFile, "fetch", hooked)
        yield


def interrupt() -> None:
    raise KeyboardInterrupt


def fails(capsys, *argv: str) -> str:
    """Run a command that fails; the one line that it prints."""
    capsys.readouterr()
    assert prepare.main(["--name=mine", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


# ---- the Hub ------------------------------------------------------------------------------------


@needs_gpt2_vocabulary
def test_files_of_the_hub_one_at_a_time(server, monkeypatch):
    server.files |= {
        "README.md": b"# Texts",
        "sample/a/000.jsonl": json_lines(DOCUMENTS[:150]),
        "sample/a/001.jsonl": json_lines(DOCUMENTS[150:250]),
        "sample/b/000.jsonl": json_lines(DOCUMENTS[250:]),
    }
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(prepare, "PIECE_BYTES", 1000)
    stored = []
    fetch = hub.HubFile.fetch

    def noted(self):
        stored.append([p.name for p in sorted(Path("data/.downloads/hub").rglob("*.jsonl"))])
        return fetch(self)

    monkeypatch.setattr(hub.HubFile, "fetch", noted)
    dataset = build(
        "--input=hf://datasets/some/texts/sample/*.jsonl", "--tokenizer=gpt2", "--workers=1"
    )
    assert documents_of(dataset) == sorted(DOCUMENTS)
    assert server.fetched == sorted(server.files)[1:], "each file once"
    assert stored[-1] != ["000.jsonl", "001.jsonl"], "what was used is dropped"
    assert not list(Path("data/.downloads/hub").rglob("*.jsonl"))
    n_fetched = len(server.fetched)
    dataset = build("--input=hf://datasets/some/texts/sample/b/000.jsonl", "--tokenizer=byte")
    assert len(server.fetched) == n_fetched + 1


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.txt"])
def test_the_field_of_a_file_of_the_hub(server, capsys, name):
    content = b'{"body": "some text"}\n' * 9
    server.files[name] = gzip.compress(content) if name.endswith("gz") else content
    argv = [f"--input=hf://datasets/some/texts/{name}", "--field=body"]
    if name == "a.txt":
        assert "--field=body is for JSON lines and Parquet" in fails(capsys, *argv)
    else:
        assert build(*argv).train.n_bytes == 9 * 8


def test_a_tokenizer_made_of_all_files_needs_room_for_them(server, monkeypatch, capsys):
    server.files |= {f"{i}.jsonl": json_lines(DOCUMENTS[i::3]) for i in range(3)}
    usage, free = namedtuple("usage", "free"), sum(map(len, server.files.values())) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free))
    says = fails(capsys, "--input=hf://datasets/some/texts/*.jsonl", "--tokenizer=char")
    assert "data/mine needs about" in says and server.fetched == ["0.jsonl"]


@needs_gpt2_vocabulary
def test_a_stopped_download_goes_on_where_it_was(server, monkeypatch, capsys):
    names = [f"{i:03}.jsonl" for i in range(4)]
    server.files |= {name: json_lines(DOCUMENTS[i::4]) for i, name in enumerate(names)}
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(prepare, "PIECE_BYTES", 1000)
    argv = ["--input=hf://datasets/some/texts/*.jsonl", "--tokenizer=gpt2", "--workers=1"]
    with before_fetching("003.jsonl", interrupt):
        assert prepare.main(["--name=mine", *argv]) == 130
    assert server.fetched == names[:3]
    dataset = build(*argv)
    assert "continuing after" in capsys.readouterr().out
    assert server.fetched == names, "and none twice"
    assert documents_of(dataset) == sorted(DOCUMENTS)


@needs_gpt2_vocabulary
def test_a_lost_connection_does_not_lose_the_work(server, monkeypatch, capsys):
    names = [f"{i:03}.jsonl" for i in range(3)]
    server.files |= {name: json_lines(DOCUMENTS[i::3]) for i, name in enumerate(names)}
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(prepare, "PIECE_BYTES", 1000)
    argv = ["--input=hf://datasets/some/texts/*.jsonl", "--tokenizer=gpt2", "--workers=1"]
    address = os.environ["HF_ENDPOINT"]
    with before_fetching(names[2], lambda: monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")):
        assert prepare.main(["--name=mine", *argv]) == 1
    out, err = capsys.readouterr()
    assert "cannot download some/texts/002.jsonl from http://127.0.0.1:9 (no connection)" in err
    assert "data/mine is unfinished: the same command continues after" in out
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert documents_of(build(*argv)) == sorted(DOCUMENTS)
    assert server.fetched == names, "and none twice"


def test_what_is_wrong_with_an_address(server, capsys, monkeypatch):
    server.files["a.jsonl"] = b""
    for address, says in {
        "some/texts/*.parquet": "no files found",
        "some/texts/none/*.parquet": "no such file or folder there",
        "some/other/*": "no public repository of that name",
        "some": "an address is hf://datasets/OWNER/NAME/FILE",
    }.items():
        assert says in fails(capsys, f"--input=hf://datasets/{address}")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    says = "cannot download some/texts from http://127.0.0.1:9 (no connection)"
    assert says in fails(capsys, "--input=hf://datasets/some/texts/*")
    assert not Path("data").exists()


def test_the_recipes_are_addresses(server):
    for address, gigabytes in hub.DATA_SETS.values():
        assert hub.ADDRESS.fullmatch(address) and gigabytes > 10
    assert set(hub.DATA_SETS) < set(prepare.RECIPES)


@pytest.mark.parametrize("name", hub.DATA_SETS)
def test_training_does_not_begin_with_a_huge_download(here, capsys, name):
    assert train.main([f"--dataset={name}", "--device=cpu", "--out_dir=run"]) == 2
    err = capsys.readouterr().err
    assert f"python prepare.py {name}" in err and "GB" in err and err.count("\n") == 1


# ---- Parquet ------------------------------------------------------------------------------------


def test_parquet_needs_pyarrow_by_name(here, capsys, monkeypatch):
    Path("a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    says = "a.parquet is a Parquet file, which needs the package pyarrow: pip install pyarrow"
    assert says in fails(capsys, "--input=a.parquet")


@needs_gpt2_vocabulary
def test_parquet(here, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {"id": range(300), "body": DOCUMENTS, "to": [{"x": t} for t in DOCUMENTS]}
    )
    parquet.write_table(table, "a.parquet", row_group_size=70)
    for field in ("body", "to.x"):
        dataset = build("--input=a.parquet", f"--field={field}", "--tokenizer=gpt2")
        assert documents_of(dataset) == sorted(DOCUMENTS)
    assert "a.parquet, row 1: no field 'text' (--field); its fields: 'id', 'body', 'to'" in fails(
        capsys, "--input=a.parquet"
    )
    assert "row 1: field 'id' is a int" in fails(capsys, "--input=a.parquet", "--field=id")
    Path("cut.parquet").write_bytes(Path("a.parquet").read_bytes()[:2000])
    assert "cut.parquet is damaged, or not a Parquet file" in fails(capsys, "--input=cut.parquet")


def test_a_row_that_is_not_utf8(here, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [b"one " * 9, b"caf\xe9", b"two " * 9]
    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), "a.parquet")
    says = fails(capsys, "--input=a.parquet")
    assert "a.parquet, row 2: not UTF-8: " in says and "--skip_bad_lines leaves" in says
    dataset = build("--input=a.parquet", "--skip_bad_lines")
    assert "bad lines left out: 1" in capsys.readouterr().out
    assert dataset.train.n_bytes + dataset.val.n_bytes == 2 * 36


# ---- token files --------------------------------------------------------------------------------


def shard(ids: np.ndarray, magic: int = 20240520, version: int = 1, n_tokens: int = -1) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if n_tokens < 0 else n_tokens
    return header.tobytes() + ids.astype("<u2").tobytes()


def ids_of(documents: list[str]) -> np.ndarray:
    tok = tokenizer.load({"kind": "gpt2"})
    return np.concatenate([[END, *tok.encode(text)] for text in documents])


@needs_gpt2_vocabulary
def test_token_files(here, monkeypatch):
    parts = [ids_of(DOCUMENTS[i : i + 100]) for i in (0, 100, 200)]
    Path("shards").mkdir()
    for name, ids in zip(("train_000001", "train_000002", "val_000000"), parts, strict=True):
        Path(f"shards/fineweb_{name}.bin").write_bytes(shard(ids))
    monkeypatch.setattr("data.shards.BLOCK_TOKENS", 100)
    n_bytes = [len("".join(DOCUMENTS[a:b]).encode()) for a, b in ((0, 200), (200, 300))]
    for argv in (
        ["--input", "shards/*.bin"],
        ["--input", "shards/*train*.bin", "--val_input=shards/fineweb_val_000000.bin"],
        ["--input", "shards/*.bin", "--val_input=shards/fineweb_val_000000.bin"],
    ):
        dataset = build(*argv)
        assert (dataset.train.tokens == np.concatenate(parts[:2])).all()
        assert (dataset.val.tokens == parts[2]).all()
        assert [dataset.train.n_bytes, dataset.val.n_bytes] == n_bytes
        meta = json.loads(Path("data/mine/meta.json").read_text())
        assert [meta["splits"][s]["documents"] for s in bins.SPLITS] == [200, 100]
        assert dataset.tokenizer == {"kind": "gpt2"}


@needs_gpt2_vocabulary
def test_token_files_of_the_hub_and_a_stop(server, monkeypatch, capsys):
    parts = [ids_of(DOCUMENTS[i : i + 100]) for i in (0, 100, 200)]
    names = ["x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"]
    server.files |= {name: shard(ids) for name, ids in zip(names, parts, strict=True)}
    monkeypatch.setattr("data.shards.BLOCK_TOKENS", 100)
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    argv = ["--input=hf://datasets/some/texts/*.bin"]
    with before_fetching(names[1], interrupt):
        assert prepare.main(["--name=mine", *argv]) == 130
    dataset = build(*argv)
    assert "continuing after" in capsys.readouterr().out
    assert (dataset.train.tokens == np.concatenate(parts[:2])).all()
    assert (dataset.val.tokens == parts[2]).all()
    assert dataset.train.n_bytes == len("".join(DOCUMENTS[:200]).encode())
    assert server.fetched == names, "and none twice"


@needs_gpt2_vocabulary
@pytest.mark.parametrize(
    "content, says",
    [
        (b"x" * 2000, "b_val.bin is not a token file of llm.c: its magic is not 20240520"),
        (b"\0" * 10, "b_val.bin is not a token file of llm.c"),
        (shard(np.arange(9), 20240801), "b_val.bin has Llama 3's tokens (20240801), not GPT-2's"),
        (shard(np.arange(9), version=2), "b_val.bin has version 2 of the format of llm.c, not 1"),
        (
            shard(np.arange(9), n_tokens=10),
            "b_val.bin is damaged: 1,042 bytes, but a header and 10",
        ),
        (shard(np.arange(9), n_tokens=8), "b_val.bin is damaged"),
        (shard(np.arange(0)), "b_val.bin is damaged: 1,024 bytes"),
        (shard(np.full(9, 60000)), "b_val.bin: GPT-2's vocabulary has no id 60000"),
    ],
)
def test_what_is_wrong_with_a_token_file(here, capsys, content, says):
    Path("a_train.bin").write_bytes(shard(np.arange(9)))
    Path("b_val.bin").write_bytes(content)
    assert says in fails(capsys, "--input", "a_train.bin", "b_val.bin")
    assert not list(Path("data").glob("*"))


@needs_gpt2_vocabulary
def test_token_files_take_no_options_of_text(here, capsys):
    Path("a.bin").write_bytes(shard(np.arange(9)))
    says = "--tokenizer is for text, and a.bin has GPT-2's tokens"
    assert says in fails(capsys, "--input=a.bin", "--tokenizer=char")
    says = "no tokens for the val split; name them with --val_input"
    assert says in fails(capsys, "--input=a.bin")
