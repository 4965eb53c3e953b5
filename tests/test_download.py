"""Promise: a download is whole and right, or its final name does not exist."""

import hashlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from data import download
from data.errors import UserError

BODY = b"Now is the winter of our discontent\n" * 4000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves BODY in the way that the path names; `seen` remembers each request's Range."""

    seen: list = []
    half, rest = threading.Event(), threading.Event()  # of /halting: is sent, may be sent

    def do_GET(self):
        asked = self.headers.get("Range")
        self.seen.append(asked)
        if self.path == "/missing":
            return self.answer(404, b"<html>no such file</html>")
        if self.path == "/broken":
            return self.answer(503, b"later")
        if self.path == "/wrong":
            return self.answer(200, BODY[:-1] + b"?")
        if self.path == "/halting" and len(self.seen) == 1:
            self.answer(200, BODY[: len(BODY) // 2], length=len(BODY))
            self.half.set()
            self.rest.wait(30)
            return self.wfile.write(BODY[len(BODY) // 2 :])
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if self.path == "/no-range":
            start = 0
        elif start >= len(BODY):
            return self.answer(416, b"")
        body = BODY[start:]
        cut = len(body) // 2 if self.path == "/cut" and not asked else len(body)
        self.answer(206 if start else 200, body[:cut], length=len(body))

    def answer(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Handler.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


def fetch(url, path):
    return download.fetch(url, path, SHA256, len(BODY))


def test_a_whole_file(server, tmp_path):
    assert fetch(f"{server}/file", tmp_path / "deep" / "file").read_bytes() == BODY
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]


def test_a_cut_connection_is_resumed(server, tmp_path):
    assert fetch(f"{server}/cut", tmp_path / "file").read_bytes() == BODY
    first, second = Handler.seen
    assert first is None and second.startswith("bytes=") and second != "bytes=0-"


@pytest.mark.parametrize("path", ["file", "no-range"])
def test_what_an_earlier_call_left_is_used_where_the_server_can(server, tmp_path, path):
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    assert fetch(f"{server}/{path}", tmp_path / "file").read_bytes() == BODY
    assert Handler.seen == ["bytes=1000-"]


def test_a_part_that_was_whole_already(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY)
    assert fetch(f"{server}/file", tmp_path / "file").read_bytes() == BODY


def test_a_wrong_part_is_dropped_and_fetched_anew(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * len(BODY))
    assert fetch(f"{server}/file", tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize(
    "path, says, requests",
    [
        ("missing", "HTTP 404", 1),
        ("broken", "HTTP 503", download.TRIES),
        ("wrong", "SHA-256", download.TRIES),
    ],
)
def test_what_is_not_the_file_never_gets_its_name(server, tmp_path, path, says, requests):
    with pytest.raises(UserError, match=says):
        fetch(f"{server}/{path}", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    assert len(Handler.seen) == requests


def test_two_processes_that_download_the_same(server, tmp_path):
    """Without a digest, half a file of the other one would not be noticed."""
    url, path = f"{server}/halting", tmp_path / "file"
    code = "import pathlib, sys; from data.download import fetch; fetch(sys.argv[1], pathlib.Path"
    command = [sys.executable, "-c", f"{code}(sys.argv[2]))", url, str(path)]
    with subprocess.Popen(command, cwd=ROOT) as other:
        assert Handler.half.wait(30)
        assert download.fetch(url, path).read_bytes() == BODY
        Handler.rest.set()
        assert other.wait(30) == 0
    assert path.read_bytes() == BODY and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_many_remarks_at_the_head_of_a_text_are_read_quickly():
    """Each way to read them anew would double the time."""
    remarks = b"<!-- a --> \n" * 3000
    assert not download.HTML.match(remarks + b"text")
    assert download.HTML.match(remarks + b"<html>")


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="no connection"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file")
