"""Promise: GPT-2 from the Hub is whole and verified, and lies where transformers finds it.

A server on this machine plays the Hub.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import sample
from config import UserError
from data import download
from model import GPT

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
FILES = {
    "config.json": json.dumps({"n_layer": 1}).encode(),
    "model.safetensors": bytes(range(256)) * 4000,
}


class Hub(BaseHTTPRequestHandler):
    """As huggingface.co answers: large files by a redirect that announces digest and size."""

    seen: list = []
    fault = ""

    def do_HEAD(self):
        self.seen.append(("HEAD", self.path))
        name = self.path.rsplit("/", 1)[-1]
        if name not in FILES or self.fault == "404":
            return self.answer(404, b"")
        body = FILES[name]
        if name == "config.json":
            etag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            return self.answer(200, body, ETag=f'"{etag}"', **{"X-Repo-Commit": COMMIT})
        linked = {
            "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Linked-Size": str(len(body)),
            "X-Repo-Commit": COMMIT,
        }
        if self.fault == "no digest":
            del linked["X-Linked-Etag"]
        self.answer(302, b"", Location="/cdn/weights", **linked)

    def do_GET(self):
        asked = self.headers.get("Range")
        self.seen.append(("GET", self.path, asked))
        if self.path.endswith("model.safetensors"):
            return self.answer(302, b"", Location="/cdn/weights")
        if self.path.endswith("config.json"):
            body = FILES["config.json"]
            return self.answer(200, b"{}" if self.fault == "wrong config" else body)
        body = FILES["model.safetensors"]
        if self.fault == "wrong":
            return self.answer(200, body[:-1] + b"?")
        if self.fault == "page":
            return self.answer(200, b"<html>busy</html>", **{"Content-Type": "text/html"})
        start = int(asked[6:-1]) if asked and self.fault != "no range" else 0
        cut = len(body) // 3 if self.fault in ("cut", "no range") and not asked else len(body)
        self.answer(206 if start else 200, body[start:cut], length=len(body) - start)

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
    Hub.seen, Hub.fault = [], ""
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_address[1]}")
        yield Hub
        httpd.shutdown()


def check(folder):
    for name, data in FILES.items():
        assert (folder / name).read_bytes() == data


def test_whole_files_once_and_where_transformers_looks(hub, tmp_path):
    folder = download.pretrained_folder("gpt2", str(tmp_path))
    check(folder)
    requests = len(hub.seen)
    assert download.pretrained_folder("gpt2", str(tmp_path)) == folder
    assert len(hub.seen) == requests, "the second time without the network"
    from huggingface_hub import try_to_load_from_cache

    for name in FILES:
        found = try_to_load_from_cache("openai-community/gpt2", name, cache_dir=tmp_path)
        assert found == str(folder / name)


def test_gpt2_by_its_name(hub, tmp_path):
    with pytest.raises(ValueError, match="config.json"):  # that of this hub is none
        GPT.from_pretrained("gpt2", str(tmp_path))
    assert list(tmp_path.rglob("snapshots/*/model.safetensors"))
    with pytest.raises(ValueError, match="gpt3 is no folder with a config.json, nor one of GPT-2"):
        GPT.from_pretrained("gpt3")


def test_the_usual_cache(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = download.pretrained_folder("gpt2-medium")
    assert folder.parent.parent == tmp_path / "hub/models--openai-community--gpt2-medium"


@pytest.mark.parametrize("fault", ["cut", "no range"])
def test_a_cut_connection_is_resumed_or_begun_anew(hub, tmp_path, fault):
    hub.fault = fault
    check(download.pretrained_folder("gpt2", str(tmp_path)))
    ranges = [seen[2] for seen in hub.seen if seen[0] == "GET" and seen[1] == "/cdn/weights"]
    assert ranges[0] is None and ranges[1].startswith("bytes=") and len(ranges) == 2


@pytest.mark.parametrize(
    "fault, says",
    [
        ("404", "the server answers 404"),
        ("wrong", "SHA-256"),
        ("page", "a web page"),
        ("wrong config", "not what was announced"),
        ("no digest", "has no digest"),
    ],
)
def test_what_is_not_the_file_is_not_kept(hub, tmp_path, fault, says):
    hub.fault = fault
    with pytest.raises(UserError, match=says) as caught:
        download.pretrained_folder("gpt2", str(tmp_path))
    assert "or name a folder that holds gpt2's config.json" in str(caught.value)
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))


def test_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    argv = ["--checkpoint=gpt2-xl", f"--cache_dir={tmp_path}", "--device=cpu"]
    assert sample.main(argv) == 2
    err = capsys.readouterr().err
    assert "(no connection); or name a folder that holds gpt2-xl's config.json" in err
    assert err.count("\n") == 1
