"""Promise: the page of sample.py --serve writes what sample.py writes, for nobody but its user."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from browser import open_page  # noqa: F401  (a fixture)
from conftest import ROOT, SMALL

import sample
from data.tokenizer import ByteTokenizer
from folio import serve
from folio.ensemble import load_models
from folio.generation import Sampling

LONG = {"prompt": "a", "max_new_tokens": 100_000}  # takes half a minute


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """A folder with a GPT's run and a bigram model's."""
    import train

    folder = tmp_path_factory.mktemp("out")
    for name, more in (("gpt", ()), ("bigram", ("--model=bigram",))):
        assert (
            train.main([*SMALL, f"--data_dir={data_dir}", f"--out_dir={folder / name}", *more]) == 0
        )
    return folder


@contextmanager
def serving(*argv):
    """A process of sample.py --serve, and the URL that it prints."""
    command = [sys.executable, ROOT / "sample.py", "--serve", "--port=0", "--device=cpu", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            process.said = []
            for line in process.stderr:
                process.said.append(line)
                if found := re.search(r"http://\S+", line):
                    process.url = found[0]
                    process.port = int(found[0].rpartition(":")[2])
                    break
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(runs):
    with serving(f"--checkpoint={runs / 'gpt'}", "--prompt=The", "--temperature=1.5") as process:
        yield process
        process.kill()
        assert process.stderr.read() == "", "the log stays empty"


def ask(server, method="POST", path="/generate", body="{}", **headers):
    """Send a request; the open answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if method == "POST":
        headers.setdefault("Content-Type", "application/json")
    headers = {name: value for name, value in headers.items() if value is not None}
    connection.request(method, path, body if method == "POST" else None, headers)
    return connection.getresponse()


def generate(server, **values):
    """The lines of an answer."""
    answer = ask(server, body=json.dumps(values))
    assert answer.status == 200, answer.read()
    return [json.loads(line) for line in answer]


def text_of(lines):
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    return "".join(line["text"] for line in lines)


# ---- the text and the probabilities


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "The ", "seed": 1},
        {"prompt": "a\nb", "temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_new_tokens": 40},
        {"prompt": "longer than the block of 16 tokens", "temperature": 0, "seed": 2},
        {"prompt": "", "top_k": 10**6, "top_p": 0.5},
    ],
)
def test_the_text_is_that_of_sample_py(server, runs, capsys, values):
    text = text_of(generate(server, **values))
    values = {"temperature": 1.5, **values}
    argv = [f"--{name}={value}" for name, value in values.items()]
    assert sample.main([f"--checkpoint={runs / 'gpt'}", "--device=cpu", *argv]) == 0
    assert values["prompt"] + text + "\n" == capsys.readouterr().out


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.5, 200, 1), (2, 4, 1), (1, 20, 0.6)])
def test_the_bars_are_the_models_probabilities(server, runs, temperature, top_k, top_p):
    model, tok, _ = load_models(str(runs / "gpt"))
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(tok.encode("the s").astype("int64"))[None])
    probs, ids = (logits[0, -1] / temperature).softmax(-1).topk(min(top_k, tok.vocab_size))
    probs /= probs.sum()
    probs = probs[probs.cumsum(0) - probs < top_p]
    probs = (probs / probs.sum())[:10].tolist()
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": 1}
    lines = generate(server, prompt="the s", **values)
    shown = lines[-1]["likeliest"]
    assert [token for token, _, _ in shown] == [tok.decode([i]) for i in ids[: len(probs)]]
    assert [p for _, p, _ in shown] == pytest.approx(probs, rel=1e-4)
    assert [token for token, _, drawn in shown if drawn] in ([], [text_of(lines)])


def test_greedy_has_one_bar_which_was_drawn(server):
    lines = generate(server, prompt="x", temperature=0, max_new_tokens=1)
    assert lines[-1]["likeliest"] == [[text_of(lines), 1.0, True]]


def test_a_token_that_is_part_of_a_character_is_shown():
    logits = torch.full((1, 256), -9.0)
    logits[0, 0xC3] = 9.0
    sampling = Sampling(top_k=1)
    assert serve.likeliest(ByteTokenizer(), logits, sampling, 0xC3) == [("\\xc3", 1.0, True)]


# ---- one generation at a time, which ends with its browser or the program


def test_a_generation_streams_and_ends_when_the_browser_goes(server):
    first = ask(server, body=json.dumps(LONG))
    line = json.loads(first.readline())
    assert line["text"] and not line["done"] and line["n_tokens"] < 1000
    second = {}
    short = {"prompt": "b", "max_new_tokens": 1}
    waiting = threading.Thread(target=lambda: second.update(lines=generate(server, **short)))
    waiting.start()
    waiting.join(0.5)
    assert not second, "it waits for the first"
    assert not json.loads(first.readline())["done"]
    first.close()
    waiting.join(10)
    assert second


@pytest.fixture
def own(runs):
    """A server in this process."""
    with serve.Server("127.0.0.1", 0) as own:
        own.model, own.tok, _ = load_models(str(runs / "gpt"))
        own.initial, own.port = serve.Request(), own.server_address[1]
        for work in (own.serve_forever, own.work):
            threading.Thread(target=work, daemon=True).start()
        yield own
        own.shutdown()


def test_a_generation_ends_within_a_chunk(own, monkeypatch):
    """Even if there is no line to send, which would fail."""
    monkeypatch.setattr(serve, "LINE_SECONDS", 1000)
    first = ask(own, body=json.dumps(LONG))
    assert not json.loads(first.readline())["done"]
    first.close()
    start = time.monotonic()
    generate(own, prompt="b", max_new_tokens=1)
    assert time.monotonic() - start < 10


def test_a_lack_of_memory_ends_one_generation(own, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch, "searchsorted", fail)
    assert generate(own, prompt="a") == [{"error": "out of memory"}]
    monkeypatch.undo()
    assert text_of(generate(own, prompt="a"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    "names, number, code", [("gpt,bigram", "SIGINT", 130), ("bigram", "SIGTERM", 143)]
)
def test_any_model_is_served_until_a_signal(runs, monkeypatch, capsys, names, number, code):
    monkeypatch.chdir(runs)
    argv = (f"--checkpoint={names}", "--prompt=The ", "--stop=ee")
    assert sample.main([*argv, "--device=cpu"]) == 0
    expected = capsys.readouterr().out
    with serving(*argv, "--host=0.0.0.0") as server:
        assert any("warning: --host=0.0.0.0" in line for line in server.said)
        assert server.url.startswith("http://127.0.0.1:")
        assert "The " + text_of(generate(server)) + "\n" == expected
        idle = socket.create_connection(("127.0.0.1", server.port))
        running = ask(server, body=json.dumps({**LONG, "temperature": 0}))
        assert not json.loads(running.readline())["done"]
        server.send_signal(getattr(signal, number))
        assert server.wait(timeout=10) == code
        rest = server.stderr.read()
        assert rest == ("stopped\n" if code == 130 else ""), rest
        idle.close()


# ---- who may ask, and for what


def test_pages_of_other_sites_are_refused(server):
    port = server.port
    own = f"127.0.0.1:{port}"
    for host in (own, f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert ask(server, "GET", "/settings", Host=host).status == 200, host
        assert ask(server, "GET", "/settings", Host=host, Origin=f"http://{host}").status == 200
    hosts = f"evil.example evil.example:{port} 10.0.0.1:{port} 127.0.0.1:1 127.0.0.1 {own}.example"
    for host in ("", *hosts.split()):
        for method, path in (("GET", "/"), ("GET", "/settings"), ("POST", "/generate")):
            assert ask(server, method, path, Host=host).status == 403, host
    origins = f"null http://evil.example https://{own} http://localhost:{port} http://127.0.0.1"
    for origin in ("", *origins.split()):
        assert ask(server, Origin=origin).status == 403, origin


def test_everywhere_a_host_must_be_a_number():
    """A name might be an attacker's, whose DNS points it here."""
    with serve.Server("0.0.0.0", 0) as everywhere:
        port = everywhere.server_address[1]
        for host in (f"10.0.0.1:{port}", f"[fe80::1]:{port}", "10.0.0.1", f"localhost:{port}"):
            assert everywhere.is_own(host), host
        for host in (f"evil.example:{port}", "evil.example", "", f":{port}", f"10.0.0.1.:{port}"):
            assert not everywhere.is_own(host), host


def test_an_answer_may_not_be_framed_stored_or_extended(server):
    for method, path in (("GET", "/"), ("GET", "/settings"), ("GET", "/no"), ("POST", "/generate")):
        answer = ask(server, method, path, body=json.dumps({"max_new_tokens": 1}))
        policy = answer.headers["Content-Security-Policy"]
        policy = dict(part.split(" ", 1) for part in policy.split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
        assert "unsafe" not in str(policy) and "*" not in str(policy)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Python" not in str(answer.headers)


def test_the_page_needs_nothing_from_elsewhere():
    page = (ROOT / "folio/serve.html").read_text("utf-8")
    assert not re.search(r"https?:|//\w+\.|(inner|outer)HTML|insertAdjacent|\.write|eval", page)


def test_wrong_paths_and_methods(server):
    for path in ("/no", "/serve.html", "/../sample.py", "/settings/"):
        assert ask(server, "GET", path).status == 404, path
    wrong = "POST / POST /settings GET /generate PUT / HEAD / DELETE /generate OPTIONS /generate"
    for method, path in re.findall(r"(\S+) (\S+)", wrong):
        answer = ask(server, method, path)
        assert answer.status == 405 and answer.headers["Allow"] == serve.PATHS[path], (method, path)


def refusal(answer, status):
    """The error in a refusal, which is one line of JSON."""
    message = json.loads(answer.read())["error"]
    assert answer.status == status and 0 < len(message) <= 300 and "\n" not in message, message
    return message


NOT_JSON = ["", "{", "{}{}", b"\xff\xfe\x00", "[" * 500_000, '{"a":' * 100_000, "1" * 5000]
NO_REQUEST = """[] null "a" {"prompt":1} {"prompt":null} {"prompt":"\\ud800"} {"\\ud800":1}
    {"unknown":1} {"checkpoint":"x"} {"stop":["a"]} {"temperature":"1"} {"temperature":-1}
    {"temperature":NaN} {"temperature":Infinity} {"temperature":1e999} {"temperature":true}
    {"top_k":0} {"top_k":1.5} {"top_p":0} {"top_p":1.1} {"max_new_tokens":100001}
    {"max_new_tokens":0} {"max_new_tokens":1e3} {"seed":-1} {"seed":[[]]} """
HUGE = ['{"seed":' + "9" * 400 + "}", '{"temperature":"' + "x" * 100_000 + '"}']


@pytest.mark.parametrize("bodies", [NOT_JSON, NO_REQUEST.split(), HUGE], ids=len)
def test_a_wrong_request_is_an_error_of_one_line(server, bodies):
    for body in bodies:
        refusal(ask(server, body=body), 400)


def test_a_character_without_a_token_is_named(server):
    assert "the vocabulary has no '\u4e00'" in refusal(
        ask(server, body='{"prompt": "\\u4e00"}'), 400
    )


def test_a_body_must_be_json_of_a_known_small_size(server):
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        refusal(ask(server, Content_Type=kind), 415)
    for length, status in (
        (str(2**20 + 1), 413),
        ("9" * 5000, 413),
        ("-1", 400),
        ("x", 400),
        ("\xb2", 400),
    ):
        refusal(ask(server, Content_Length=length), status)
    raw = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
    for header in ("", "Transfer-Encoding: chunked\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{raw}Content-Type: application/json\r\n{header}\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.0 411 ")
    assert ask(server, Content_Type="application/json; charset=utf-8").status == 200


def test_a_slow_client_holds_nobody_and_is_left(own, monkeypatch, capsys):
    assert serve.Handler.timeout <= 30
    monkeypatch.setattr(serve.Handler, "timeout", 1)
    own.page = bytes(2**26)
    head = f"POST /generate HTTP/1.0\r\nHost: 127.0.0.1:{own.port}\r\n"
    body = f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    page = f"{head}\r\n".replace("POST /generate", "GET /")
    slow = [socket.create_connection(("127.0.0.1", own.port), timeout=10) for _ in range(4)]
    for connection, start in zip(slow, ("", head, body, page), strict=True):
        connection.sendall(start.encode())
    assert text_of(generate(own, prompt="a", max_new_tokens=3))
    for connection in slow[:3]:
        assert connection.recv(100) == b"", "it was closed"
    time.sleep(0.5)  # the page has had its second too
    assert sum(map(len, iter(lambda: slow[3].recv(2**20), b""))) < 2**26
    for connection in slow:
        connection.close()
    assert capsys.readouterr().err == ""


# ---- the options


def test_a_port_in_use_is_an_error_that_says_so(server, runs, capsys):
    argv = [f"--checkpoint={runs / 'gpt'}", "--serve", "--device=cpu"]
    assert sample.main([*argv, f"--port={server.port}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("error: ")
        and f"--port={server.port}" in error
        and "in use; --port=0" in error
    )
    for host in ("", "a" * 70, "192.0.2.1"):
        assert sample.main([*argv, "--port=0", f"--host={host}"]) == 2
        assert f"--host={host}" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_page_cannot_do_is_refused(capsys):
    for option in ("--interactive", "--output=a.jsonl", "--num_samples=2"):
        assert sample.main(["--serve", option]) == 2
        assert "--serve does not take" in capsys.readouterr().err
    for port in ("-1", "65536", "http"):
        assert sample.main(["--serve", f"--port={port}"]) == 2
        assert "port must be" in capsys.readouterr().err


# ---- the page in a browser


def test_the_page_streams_the_right_text(server, open_page):  # noqa: F811
    page = open_page(server.url)
    page.locator("#after", has_text="after").wait_for()
    assert "iteration 20, validation loss" in page.inner_text("#about")
    assert page.input_value("#prompt") == "The" and page.input_value("#temperature") == "1.5"
    prompt = "more than 16 tokens </span><b>a\n"
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Length").fill("2000")
    page.get_by_label("Seed").fill("5")
    page.keyboard.press("Control+Enter")
    under_way = re.compile(r"^\d{1,3} of 2,000 tokens, [\d,.]+ tokens/s$")
    page.locator("#speed", has_text=under_way).wait_for()
    note = f"Only the last 16 of the prompt's {len(prompt)} tokens were used."
    page.locator("#status", has_text=note).wait_for()
    expected = text_of(generate(server, prompt=prompt, max_new_tokens=2000, seed=5))
    assert page.text_content("#text") == expected
    assert page.text_content("#given") == prompt and page.locator("b").count() == 0
    assert page.errors == []


def test_stop_stops(server, open_page):  # noqa: F811
    page = open_page(server.url)
    page.get_by_label("Length").fill("100000")
    page.get_by_role("button", name="Generate").click()
    page.locator("#speed", has_text="of 100,000 tokens").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#status", has_text="Stopped.").wait_for()
    start = time.monotonic()
    generate(server, prompt="a", max_new_tokens=1)
    assert time.monotonic() - start < 10 and page.errors == []
    assert len(page.text_content("#text")) < 90_000
    assert page.get_by_role("button", name="Stop").is_disabled()


def test_sliders_and_typing_change_the_bars(server, open_page):  # noqa: F811
    page = open_page(server.url)
    rows = page.locator("#bars li:visible")

    def bars(after):
        page.locator("#after", has_text=f"after “{after}”").wait_for()
        return rows.all_inner_texts()

    first = bars("The")
    page.get_by_label("Prompt").fill("of\n the")
    assert bars("of\\n␣the") != first and len(first) == 10
    likeliest = generate(server, prompt="of\n the", max_new_tokens=1)[-1]["likeliest"]
    for row, (token, p, _) in zip(rows.all_inner_texts(), likeliest, strict=True):
        shown, percent = row.split("\n")[0], row.split("\n")[-1]
        assert (
            shown == token.replace(" ", "␣").replace("\n", "\\n") and percent == f"{100 * p:.1f}%"
        )
    page.get_by_label("Temperature, slider").fill("0")
    page.locator("#bars .percent", has_text="100.0%").wait_for()
    assert rows.count() == 1 and page.input_value("#temperature") == "0"
    page.get_by_label("Temperature, slider").fill("2")
    page.locator("#bars li:visible").nth(9).wait_for()
    slider = page.get_by_label("Top-k, slider")
    slider.fill("0")
    slider.press("ArrowRight")
    page.locator("#bars li:visible").nth(2).wait_for(state="hidden")
    assert rows.count() == 2 and page.input_value("#top_k") == "2"
    assert slider.get_attribute("aria-valuetext") == "2" and page.errors == []


def test_an_error_is_shown_until_it_is_mended(server, open_page):  # noqa: F811
    page = open_page(server.url, viewport={"width": 400, "height": 800})
    page.get_by_label("Prompt").fill("\u4e00")
    page.locator("#status", has_text="the vocabulary has no '\u4e00'").wait_for()
    page.get_by_label("Prompt").fill("a")
    page.locator("#status", has_text=re.compile("^$")).wait_for(state="attached")
    page.get_by_label("Top-p", exact=True).fill("7")
    page.get_by_role("button", name="Generate").click()
    page.locator("#status", has_text="top_p must be a number in (0, 1], not 7").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    for field in page.locator("input, textarea").all():
        assert (
            field.get_attribute("aria-label")
            or page.locator(f"label[for={field.get_attribute('id')}]").count()
        )
