"""Draws assets/seconds.png: loss against seconds of training, for Folio and for nanoGPT.

    python tests/bench/picture.py NANOGPT INPUT

Arguments as in nanogpt_cpu.py. nanoGPT trains by its own recipe for CPUs; its loss is what it
estimates itself, from 100 batches, and its seconds are the sum of what it prints of its updates,
evaluations left out. Folio trains by config/shakespeare_char_cpu.py, of three lengths; its loss is
that of the whole validation split. One seed each, one after the other.
"""

import re
import statistics
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from nanogpt_cpu import EITHER, RECIPES, train_nanogpt
from shakespeare import ROOT, metrics, prepare, train

UPDATES = (100, 500, 1150)


def nanogpt_curve(checkout: Path, text: Path) -> list[tuple[float, float]]:
    """(seconds, loss) at every evaluation."""
    words = f"{EITHER} {RECIPES['small'][0]} --lr_decay_iters=2000"
    words += " --eval_interval=100 --eval_iters=100"
    output, _, _ = train_nanogpt(checkout, text, 1337, words)
    found = re.findall(r"val loss ([\d.]+)|time ([\d.]+)ms", output)
    typical = statistics.median(float(ms) for _, ms in found if ms)
    seconds, curve = 0.0, []
    for loss, ms in found:
        if loss:
            curve.append((seconds, float(loss)))
        else:  # the time of an update after an evaluation holds the evaluation
            seconds += min(float(ms), 3 * typical) / 1000
    return curve


def folio_curve(text: Path, updates: int) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), text)
        recipe = str(ROOT / "config/shakespeare_char_cpu.py")
        words = [f"--max_iters={updates}", f"--eval_interval={updates // 10}", "--num_samples=0"]
        train(Path(folder), recipe, *words)
        rows = metrics.read_metrics(Path(folder) / "out/bench/metrics.csv")
    return [(float(r["train_seconds"]), float(r["val_loss"])) for r in rows if r["val_loss"]]


def main() -> None:
    checkout, text = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    curves = {"nanoGPT, its recipe for CPUs": nanogpt_curve(checkout, text)}
    curves |= {f"Folio, {n:,} updates": folio_curve(text, n) for n in UPDATES}
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="seconds of training", ylabel="validation loss (nats per character)"
    )
    axes.set_xscale("log")
    for name, curve in curves.items():
        points = [(seconds, loss) for seconds, loss in curve if seconds]
        style = "0.4" if name.startswith("nanoGPT") else None
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=style, label=name)
        print(name, *(f"{seconds:.1f} s {loss:.4f}" for seconds, loss in points), sep="\n  ")
    axes.axhline(1.4697, color="0.6", linestyle="--", linewidth=1)
    axes.annotate("1.4697: nanoGPT's baby GPT, on an A100", (axes.get_xlim()[0], 1.48), size=8)
    axes.set_ylim(1.4, 2.8)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(ROOT / "assets/seconds.png", dpi=110)


if __name__ == "__main__":
    main()
