"""For the benchmarks of single updates: a data set of random tokens, and a run on it."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import bins  # noqa: E402
from data.writer import Writer  # noqa: E402
from folio import machine  # noqa: E402
from folio.options import read_options  # noqa: E402
from folio.run import Run, build_run  # noqa: E402

QUICK_START = str(ROOT / "config/shakespeare_char_cpu.py")
RECIPE, _ = read_options(train.TrainConfig, [QUICK_START])


@contextmanager
def noise(vocab_size: int = 65, n_tokens: int = 20_000) -> Iterator[Path]:
    """The folder of a data set of random ids."""
    with tempfile.TemporaryDirectory() as parent:
        ids = np.random.default_rng(0).integers(0, vocab_size, n_tokens)
        with Writer(Path(parent) / "noise", vocab_size) as writer:
            for split in bins.SPLITS:
                writer.add(split, ids)
            writer.finish({s: {"bytes": len(ids)} for s in bins.SPLITS}, {"kind": "byte"}, [])
        yield Path(parent) / "noise"


def make_run(folder: Path, **options) -> Run:
    """A run with these options, ready for update()."""
    cfg = train.TrainConfig(**options)
    device, dtype, compile = machine.resolve_machine(cfg.device, cfg.dtype, cfg.compile)
    machine.setup_torch(device, dtype, cfg.deterministic)
    cfg = replace(cfg, device=device, dtype=dtype, compile=compile)
    return build_run(cfg, bins.load(folder), None)
