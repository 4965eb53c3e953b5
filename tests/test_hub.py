"""Promise: a model comes from the Hub once, and is kept where transformers finds it.

A server on this machine plays the Hub.
"""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, try_to_load_from_cache

import sample
from data.errors import UserError
from folio import gpt2

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
FILES = {
    "config.json": json.dumps({"n_layer": 1}).encode(),
    "vocab.json": b"{}",
    "merges.txt": b"",
    "model.safetensors": bytes(range(256)) * 4000,
}


class Hub(BaseHTTPRequestHandler):
    """As huggingface.co answers: large files by a redirect that announces digest and size."""

    requests: list = []
    fault = ""

    def do_HEAD(self):
        self.requests.append(("HEAD", self.path))
        name = self.path.rsplit("/", 1)[-1]
        if name not in FILES or self.fault == "404":
            return self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
        body = FILES[name]
        if name != "model.safetensors":
            etag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            return self.answer(200, body, ETag=f'"{etag}"', **{"X-Repo-Commit": COMMIT})
        linked = {
            "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Linked-Size": str(len(body)),
            "X-Repo-Commit": COMMIT,
        }
        self.answer(302, b"", Location=self.cdn(), **linked)

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            return self.answer_about_model()
        asked = self.headers.get("Range")
        self.requests.append(("GET", self.path, asked))
        if self.path.endswith("model.safetensors"):
            return self.answer(302, b"", Location=self.cdn())
        name = self.path.rsplit("/", 1)[-1]
        if name in FILES:
            return self.answer(200, FILES[name])
        body = FILES["model.safetensors"]
        start = int(asked[6:-1]) if asked else 0
        cut = len(body) // 3 if self.fault == "cut" and not asked else len(body)
        self.answer(206 if start else 200, body[start:cut], length=len(body) - start)

    def answer_about_model(self):
        self.requests.append(("GET", self.path))
        if self.fault == "404":
            return self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
        if "/tree/" in self.path:
            others = dict.fromkeys(("pytorch_model.bin", "README.md"), b"")
            answer = [
                {"type": "file", "path": name, "size": len(body), "oid": name}
                for name, body in {**FILES, **others}.items()
            ]
        else:
            answer = {"id": "model", "sha": COMMIT}
        body = json.dumps(answer).encode()
        self.answer(200, body, **{"Content-Type": "application/json"})

    def cdn(self):
        return f"http://localhost:{self.server.server_port}/cdn/weights"

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    Hub.requests, Hub.fault = [], ""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_address[1]}")
        yield Hub
        httpd.shutdown()


def test_a_model_is_downloaded_once(hub, tmp_path):
    folder = gpt2.find_folder("gpt2", str(tmp_path))
    for name, data in FILES.items():
        assert (folder / name).read_bytes() == data
        found = try_to_load_from_cache("openai-community/gpt2", name, cache_dir=tmp_path)
        assert found == str(folder / name)
    n_requests = len(hub.requests)
    assert gpt2.find_folder("gpt2", str(tmp_path)) == folder
    assert len(hub.requests) == n_requests, "the second time without the network"


def test_after_a_cut_connection_the_next_call_completes_it(hub, tmp_path):
    hub.fault = "cut"
    with pytest.raises(UserError, match="cannot download openai-community/gpt2"):
        gpt2.find_folder("gpt2", str(tmp_path))
    hub.fault = ""
    folder = gpt2.find_folder("gpt2", str(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_any_model_by_its_id(hub, tmp_path):
    folder = gpt2.find_folder("someone/gpt2-czech", str(tmp_path))
    assert {path.name for path in folder.iterdir()} == set(FILES), "no pickle"
    n_requests = len(hub.requests)
    assert gpt2.find_folder("someone/gpt2-czech", str(tmp_path)) == folder
    assert len(hub.requests) == n_requests


def test_a_model_that_was_cached_without_its_tokenizer_gets_it(hub, tmp_path):
    """As transformers caches it, a file at a time."""
    for file in ("config.json", "model.safetensors"):
        where = {"cache_dir": tmp_path, "endpoint": os.environ["HF_ENDPOINT"]}
        folder = Path(hf_hub_download("someone/gpt2-czech", file, **where)).parent
    assert not (folder / "vocab.json").exists()
    assert gpt2.find_folder("someone/gpt2-czech", str(tmp_path)) == folder
    assert (folder / "vocab.json").is_file()


def test_paths_do_not_go_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("gpt3", "out", "out/mine", "../mine", "/mine", "a/b/c", "mine/", ""):
        assert gpt2.find_folder(name) is None
    assert not hub.requests


def test_a_model_that_is_missing_is_said(hub, tmp_path):
    hub.fault = "404"
    with pytest.raises(
        UserError, match="cannot download openai-community/gpt2 .*no public repository"
    ):
        gpt2.find_folder("gpt2", str(tmp_path))


def test_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    argv = ["--checkpoint=gpt2-xl", f"--cache_dir={tmp_path}", "--device=cpu"]
    assert sample.main(argv) == 2
    err = capsys.readouterr().err
    assert "cannot download openai-community/gpt2-xl" in err
    assert "(no connection); or give a folder with its config.json" in err
    assert err.count("\n") == 1
