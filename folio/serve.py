"""A web page that generates text, for python sample.py --serve.

    GET /            serve.html, the whole page
    GET /settings    JSON: about the checkpoint, and the initial prompt and options
    POST /generate   JSON: a prompt and options of Sampling -> lines of JSON, one for some new text

A thread per connection reads the request. The main thread alone uses the model, for one request
after the other, so that Ctrl-C ends it there as it does without a page. A generation ends when its
browser closes the connection, as the page's Stop does.

Pages of other sites must not use it. A browser sends the name in their address as Host or Origin,
which is not ours, and asks before it posts JSON for them, which is refused.
"""

import errno
import ipaddress
import json
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from socketserver import TCPServer
from threading import Thread

from torch import Tensor

from data.errors import UserError
from data.tokenizer import Tokenizer
from folio.generation import Sampling, TextStream, encode_prompt, generate_texts, next_probs
from folio.options import build_options
from folio.page import content_hash
from folio.process import explain
from model import Bigram, LanguageModel

PATHS = {"/": "GET", "/settings": "GET", "/generate": "POST"}
BODY_BYTES = 1 << 20  # largest body of a request
TIMEOUT = 10  # seconds that a browser may take for a read or a write
LINE_SECONDS = 0.05  # shortest time between two lines of a generation
N_LIKELIEST = 10  # tokens that are shown with their probabilities


@dataclass
class Request(Sampling):
    prompt: str = ""  # the text to continue


class Refused(UserError):
    """A request that is answered with this HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def serve(
    model: LanguageModel,
    tok: Tokenizer,
    about: str,
    prompt: str,
    sampling: Sampling,
    host: str,
    port: int,
) -> None:
    """Serve the page until a signal ends the program. `prompt` and `sampling` are what it starts
    with, `about` says which model it is. Raises UserError if the address cannot be used.
    """
    initial = Request(
        **{f.name: getattr(sampling, f.name) for f in fields(Sampling)}, prompt=prompt
    )
    try:
        server = Server(host, port)
    except (OSError, ValueError) as error:  # ValueError: no possible name of a host
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            reason = "the port is in use; --port=0 finds a free one"
        raise UserError(f"cannot serve at --host={host} --port={port}: {reason}") from None
    server.model, server.tok, server.initial = model, tok, initial
    block_size = None if isinstance(model, Bigram) else model.config.block_size
    server.settings = {"about": about, "n_ids": tok.vocab_size, "block_size": block_size}
    server.settings |= vars(initial)
    with server:
        Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        if not ipaddress.ip_address(server.server_address[0]).is_loopback:
            print(f"warning: --host={host}: others in the network can use it", file=sys.stderr)
        print(f"open {server.url} in a browser; Ctrl-C ends", file=sys.stderr, flush=True)
        try:
            server.work()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            server.shutdown()


class Server(ThreadingHTTPServer):
    """Threads for the connections, and a queue of what they want from the main thread."""

    allow_reuse_address = os.name != "nt"  # Windows would share a port that is in use
    server_bind = TCPServer.server_bind  # HTTPServer's looks up the host's name

    def __init__(self, host: str, port: int):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self.address_family, *_, address = found[0]
        super().__init__(address, Handler)
        self.queue = SimpleQueue()
        port = self.server_address[1]
        self.is_everywhere = ipaddress.ip_address(address[0]).is_unspecified
        name = "127.0.0.1" if self.is_everywhere else f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{port}"
        names = {name.lower(), "127.0.0.1", "localhost", "[::1]"}
        self.hosts = {f"{name}:{port}" for name in names}
        self.hosts |= names if port == 80 else set()  # browsers leave out :80
        self.page, self.policy = read_page()

    def in_main_thread(self, function: Callable, *args: object) -> None:
        """Call a function in the main thread, after those that wait, and raise what it raises."""
        future = Future()
        self.queue.put((future, function, args))
        future.result()

    def work(self) -> None:
        """Call these functions, forever. To be called in the main thread."""
        while True:
            try:  # on Windows, Ctrl-C does not interrupt a wait without a timeout
                future, function, args = self.queue.get(timeout=1)
            except Empty:
                continue
            try:
                future.set_result(function(*args))
            except Exception as error:  # raised again in the thread of the request
                future.set_exception(error)

    def is_own(self, host: str) -> bool:
        """Whether a request's Host is the address served.

        All addresses of the machine are not known in advance. Any IP address will do then: what an
        attacker's DNS server can make point here is a name.
        """
        if not self.is_everywhere or host in self.hosts:
            return host in self.hosts
        try:
            ipaddress.ip_address(re.sub(r":\d+$", "", host).strip("[]"))
        except ValueError:
            return False
        return True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a browser that went away is no error
            super().handle_error(request, client_address)


def read_page() -> tuple[bytes, str]:
    """The page, and the Content-Security-Policy that allows its own script and style only."""
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    policy = {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:"}
    policy |= dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'")
    for tag in ("script", "style"):
        policy[f"{tag}-src"] = content_hash(page, tag)
    return page.encode(), "; ".join(f"{name} {value}" for name, value in policy.items())


class Handler(BaseHTTPRequestHandler):
    """Answers one request; HTTP/1.0 closes the connection after it."""

    timeout = TIMEOUT
    server: Server

    def answer(self) -> None:
        try:
            self.check_sender()
            if self.path == "/":
                self.reply(200, "text/html; charset=utf-8", self.server.page)
            elif self.path == "/settings":
                self.reply_json(200, self.server.settings)
            else:
                self.server.in_main_thread(self.generate, self.read_object())
        except UserError as error:
            self.send_error(getattr(error, "status", 400), str(error))

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def check_sender(self) -> None:
        """Raise Refused for a request that our page would not send."""
        host = self.headers.get("Host", "").lower()
        if not self.server.is_own(host):
            raise Refused(403, f"Host must be the address served, not {host!r}")
        if self.headers.get("Origin", f"http://{host}").lower() != f"http://{host}":
            raise Refused(403, "the request comes from another site's page")
        if self.path not in PATHS:
            raise Refused(404, "there is no such page")
        if self.command != PATHS[self.path]:
            raise Refused(405, f"the method must be {PATHS[self.path]}")

    def read_object(self) -> dict:
        """The JSON object in the body; raises Refused if there is none."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refused(411, "Content-Length is missing")
        if not re.fullmatch("[0-9]+", length):
            raise Refused(400, "Content-Length must be a whole number")
        if len(length) > 9 or int(length) > BODY_BYTES:
            raise Refused(413, f"the body must have at most {BODY_BYTES:,} bytes")
        body = self.rfile.read(int(length))
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from None
        if type(values) is not dict:
            raise Refused(400, "the body must be a JSON object")
        return values

    def generate(self, values: dict) -> None:
        """Generate from a request's values, and send lines of JSON until the browser goes away."""
        server, start = self.server, time.monotonic()
        request = build_options(Request, {**vars(server.initial), **values}, "the request")
        ids = encode_prompt(server.tok, request.prompt, request.seed)
        if self.is_gone():  # while it waited
            return
        self.send_head(200, "application/x-ndjson")
        logits, last_line = None, 0.0

        def keep(new_logits: Tensor) -> None:
            nonlocal logits
            logits = new_logits

        def send(streams: list[TextStream]) -> None:
            nonlocal last_line
            (stream,), now = streams, time.monotonic()
            if self.is_gone():
                raise ConnectionAbortedError
            if stream.ended or now - last_line >= LINE_SECONDS:
                last_line = now
                self.send_line(
                    text=stream.take(),
                    likeliest=likeliest(server.tok, logits, request, stream.ids[-1]),
                    n_prompt=len(ids),
                    n_tokens=len(stream.ids),
                    seconds=now - start,
                    done=stream.ended,
                )

        try:
            generate_texts(
                server.model,
                server.tok,
                ids,
                request,
                range(1),
                send,
                chunk_tokens=1,
                on_logits=keep,
            )
        except (MemoryError, RuntimeError) as error:
            message, _ = explain(error)
            if not message:
                raise
            self.send_line(error=message)

    def is_gone(self) -> bool:
        """Whether the browser has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def send_line(self, **values: object) -> None:
        self.wfile.write(json.dumps(values).encode() + b"\n")

    def reply_json(self, status: int, value: object) -> None:
        self.reply(status, "application/json", json.dumps(value).encode())

    def reply(self, status: int, content_type: str, body: bytes) -> None:
        self.send_head(status, content_type)
        self.wfile.write(body)

    def send_head(self, status: int, content_type: str) -> None:
        self.send_response_only(status)
        if status == 405:
            self.send_header("Allow", PATHS[self.path])
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def send_error(self, code: int, message: str = "bad request", *_: object) -> None:
        """One line of JSON, also for what the base class refuses."""
        self.reply_json(code, {"error": " ".join(message.split())[:300]})

    def log_message(self, *_: object) -> None:
        """Nothing: neither requests nor slow browsers are logged."""


def likeliest(
    tok: Tokenizer, logits: Tensor, sampling: Sampling, drawn: int
) -> list[tuple[str, float, bool]]:
    """The likeliest next tokens by logits (1, V), the first one first: the text, the probability
    with which it is drawn, and whether it was. Bytes of an incomplete character are escaped."""
    probs = next_probs(logits, sampling.temperature, sampling.top_k, sampling.top_p)[0]
    top = probs.topk(min(N_LIKELIEST, len(probs)))
    return [
        (tok.decode_bytes([i]).decode(errors="backslashreplace"), p, i == drawn)
        for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        if p > 0
    ]
