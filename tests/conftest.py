"""What the tests share: real text, a small data set made of it, and the scripts to call."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SHAKESPEARE = SHARED / "tinyshakespeare" / "input.txt"
VOCABULARY = SHARED / "tiktoken"
sys.path.insert(0, str(ROOT))

# Scripts inherit ignored signals: a background job ignores SIGINT, and nohup SIGHUP.
for name in {"SIGINT", "SIGHUP"} & set(dir(signal)):
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    signal.signal(getattr(signal, name), handler)

os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors this small gain nothing from more

# A run whose updates take milliseconds, with everything that a large one has.
SMALL = (
    f"{ROOT}/config/shakespeare_char_gpt2.py --dataset=small --out_dir=run "
    "--device=cpu --dtype=float32 "
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=8 --dropout=0.1 "
    "--learning_rate=1e-3 --max_iters=20 --warmup_iters=5 "
    "--eval_interval=10 --log_interval=5 --sample_tokens=20"
).split()
# and with every part that is not GPT-2's
MODERN = (
    "--activation=relu2 --norm=rmsnorm --rotary --qk_norm --n_kv_head=1 --key_shift --conv=3 "
    "--optimizer=muon"
).split()

needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.exists(), reason=f"needs tiny Shakespeare at {SHAKESPEARE}"
)
needs_gpt2_vocabulary = pytest.mark.skipif(
    not VOCABULARY.exists(), reason=f"needs GPT-2's vocabulary in {VOCABULARY}"
)


@pytest.fixture(scope="session")
def text() -> str:
    """20,000 characters of real English that is on every machine."""
    from data.documents import Corpus

    (document,) = Corpus(("pydocs",), Path())
    return b"".join(document.blocks()).decode()[:20_000]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, text) -> Path:
    """A folder with the data set "small": characters of real text."""
    import prepare

    folder = tmp_path_factory.mktemp("data")
    (folder / "small.txt").write_text(text, encoding="utf-8", newline="")
    argv = ["--name=small", f"--input={folder / 'small.txt'}", f"--data_dir={folder}"]
    assert prepare.main(argv) == 0
    return folder


@pytest.fixture
def train_small(data_dir, tmp_path, monkeypatch):
    """Call train.main in an empty folder, on the small data set; the run is in run/."""
    import train

    monkeypatch.chdir(tmp_path)
    return lambda *argv: train.main([*SMALL, f"--data_dir={data_dir}", *argv])


@pytest.fixture
def resume_run(train_small):
    """Resume the run in run/ with its own options."""
    import train

    return lambda *argv: train.main(["--init_from=resume", "--out_dir=run", *argv])


class TracedGraph:
    """folio.fast.CudaGraph for a CPU: what torch does in the second call is traced and repeated."""

    def __init__(self, function):
        self.function, self.calls, self.traced = function, 0, None

    def __call__(self, *args):
        from torch.fx.experimental.proxy_tensor import make_fx

        args, results = [torch.as_tensor(arg) for arg in args], []
        self.calls += 1
        if self.calls == 1:
            return self.function(*args)
        if self.calls > 2:
            with torch.no_grad():
                return self.traced(*args)
        # make_fx() runs the function, and cannot trace the types that it returns
        self.traced = make_fx(lambda *args: results.append(self.function(*args)) or results[0])(
            *args
        )
        return results[0]


def load(path) -> tuple[dict, dict]:
    """A checkpoint's tensors and meta."""
    from folio import checkpoint

    ckpt = checkpoint.load(Path(path))
    return ckpt.tensors, ckpt.meta


def after_backward(monkeypatch, hook) -> None:
    """Call hook(run) in every update, between backward and the optimizers."""
    import train

    build_run = train.build_run

    def hooked(*args):
        run = build_run(*args)

        def call(_):
            hook(run)

        run.model.wte.weight.register_post_accumulate_grad_hook(call)
        return run

    monkeypatch.setattr(train, "build_run", hooked)


def write_bins(folder: Path, ids: np.ndarray, vocab_size: int) -> None:
    """A data set of bytes, so it says, with the same ids in both splits."""
    from data import bins
    from data.writer import Writer

    with Writer(folder, vocab_size) as writer:
        for split in bins.SPLITS:
            writer.add(split, ids)
        extra = {split: {"bytes": len(ids)} for split in bins.SPLITS}
        writer.finish(extra, {"kind": "byte"}, [])


def script(name: str, *argv: str, **kwargs) -> subprocess.CompletedProcess:
    """Run a script in a process of its own; its output is text unless text=False."""
    command = [sys.executable, str(ROOT / name), *argv]
    return subprocess.run(command, capture_output=True, timeout=120, **{"text": True, **kwargs})
