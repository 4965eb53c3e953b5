"""Promise: main(argv) can be called from anywhere: a thread, a notebook, with streams replaced."""

import io
import signal
import threading
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import prepare
import sample
import train as script


def test_a_thread_prepares_trains_and_samples(train_small, text):
    """Where Python lets nobody handle signals."""
    codes = []

    def work():
        Path("text.txt").write_text(text)
        codes.append(prepare.main(["--name=mine", "--input=text.txt"]))
        codes.append(train_small("--max_iters=2"))
        codes.append(sample.main(["--checkpoint=run", "--max_new_tokens=5"]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0, 0, 0]


def test_streams_that_are_no_files(train_small):
    """Such as a notebook's, which cannot be reconfigured."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert train_small("--max_iters=2") == 0
        assert sample.main(["--checkpoint=run", "--prompt=The", "--max_new_tokens=5"]) == 0
    assert "done:" in out.getvalue() and "\nThe" in out.getvalue()


def test_the_handlers_of_signals_are_put_back(train_small):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert train_small("--max_iters=1") == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("resuming", [False, True])
def test_a_signal_during_the_plan_changes_nothing(
    train_small, resume_run, monkeypatch, capsys, resuming
):
    if resuming:
        assert train_small("--max_iters=4", "--snapshot_interval=4") == 0
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    update = script.update

    def interrupted(run):
        signal.raise_signal(signal.SIGTERM)
        return update(run)

    monkeypatch.setattr(script, "update", interrupted)
    main = resume_run if resuming else train_small
    assert main("--snapshot_interval=1", "--max_iters=9") == 143
    when = "after 4 updates" if resuming else "before the first update"
    assert f"stopped: SIGTERM {when}" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*")} == before
