"""Promise: main(argv) can be called from anywhere: a thread, a notebook, with streams replaced."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from conftest import script as run_script

import prepare
import sample
import train as script
from folio.fast import cpu_has_bfloat16


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


def test_the_notebook_of_one_gpu(tmp_path, text):
    """The four cells of docs/notebooks.md in a real kernel, with a smaller model."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (tmp_path / "book.txt").write_text(text)
    page = (ROOT / "docs/notebooks.md").read_text("utf-8")
    cells = re.findall(r"```python\n(.*?)```", page, re.S)[0]
    small = ", ".join(f'"{word}"' for word in SMALL[3:])
    cells = cells.replace("%pip install -q -r requirements.txt", f"%cd {tmp_path}")
    cells = cells.replace('"--minutes=5"', small).replace("Once", "The").split("\n\n")
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    client = nbclient.NotebookClient(notebook, timeout=120)
    client.execute(cwd=str(tmp_path), env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert len(cells) == 4
    for cell in notebook.cells[1:]:
        assert cell.outputs[-1]["data"]["text/plain"] == "0", cell.outputs
    printed = "".join(o["text"] for o in notebook.cells[3].outputs if o["output_type"] == "stream")
    assert printed.count("\nThe") + printed.startswith("The") == 3
    assert (tmp_path / "out" / "mine" / "loss.png").is_file()


@pytest.mark.parametrize("name", ["train", "sample", "prepare", "convert", "runs", "evaluate"])
def test_ctrl_c_during_the_imports_and_help_without_docstrings(tmp_path, name):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    done = run_script(f"{name}.py", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode in (130, -signal.SIGINT)
    assert (done.stdout, done.stderr) == ("", "error: interrupted\n")
    command = [sys.executable, "-OO", str(ROOT / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout and not done.stderr


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


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        ("", {}, "2000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "active"}, None),
        ("import torch", {}, None),  # libgomp has read its settings
    ],
)
def test_waiting_threads_spin_briefly(before, given, expected):
    """Unless the user has decided how they wait."""
    code = f"{before}\nimport os, folio.process; print(os.environ.get('GOMP_SPINCOUNT'))"
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command, env = [sys.executable, "-c", code], {**env, **given}
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(expected)


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="needs AVX512-bf16")
def test_onednn_may_be_told_not_to_use_bfloat16():
    """Its operators raise an error then."""
    code = "import torch; from folio import machine; print(machine.fast_dtype(torch.device('cpu')))"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert out.stdout == "float32\n"


def test_training_does_not_import_what_it_does_not_need(data_dir, tmp_path):
    """torch._dynamo alone takes most of a second."""
    argv = [*SMALL, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", "--max_iters=2"]
    code = f"import sys, train; train.main({argv!r}); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(out.stdout.splitlines()[-1].split())
    heavy = {"torch._dynamo", "torch._inductor", "sympy", "pandas", "transformers", "tiktoken"}
    assert "torch" in loaded and not loaded & heavy
