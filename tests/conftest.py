"""What the tests share: real text, small data sets made of it, and the scripts as users call them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SHAKESPEARE = SHARED / "tinyshakespeare" / "input.txt"
VOCABULARY = SHARED / "tiktoken"
sys.path.insert(0, str(ROOT))

os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
os.environ.pop("COLUMNS", None)

# Small enough for a step to take milliseconds, and with everything a real run has.
SMALL = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=8 --dataset=small "
    "--device=cpu --warmup_iters=5 --eval_interval=10 --log_interval=5 --sample_tokens=20"
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
    import prepare

    return prepare.python_reference()[:20_000]


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
def train(data_dir, tmp_path, monkeypatch):
    """Call train.main as a user would, on the small data set, in an empty folder."""
    import train

    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> int:
        return train.main([str(ROOT / "config/bigram.py"), "--model=gpt", "--learning_rate=1e-3",
                           *SMALL, f"--data_dir={data_dir}", "--out_dir=run", *argv])

    return run


def script(name: str, *argv: str, **kwargs) -> subprocess.CompletedProcess:
    """Run a script in a process of its own; its output as text."""
    command = [sys.executable, str(ROOT / name), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)
