"""What the benchmarks of single updates share: a data set of random tokens, and a run on it."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
import train  # noqa: E402
from data import bins  # noqa: E402

RECIPE = config.read(train.TrainConfig, [str(ROOT / "config/shakespeare_char_cpu.py")])


@contextmanager
def noise(vocab_size: int = 65, n_tokens: int = 20_000) -> Iterator[Path]:
    """The folder of a data set of random ids."""
    with tempfile.TemporaryDirectory() as parent:
        ids = np.random.default_rng(0).integers(0, vocab_size, n_tokens)
        with bins.Writer(Path(parent) / "noise", vocab_size) as writer:
            for split in bins.SPLITS:
                writer.add(split, ids)
            writer.finish({s: {"bytes": len(ids)} for s in bins.SPLITS}, {"kind": "byte"}, [])
        yield Path(parent) / "noise"


def make_run(folder: Path, **options) -> train.Run:
    cfg = train.choose_machine(train.TrainConfig(**options), None)
    return train.make_run(cfg, bins.load(folder), {}, {}, None)
