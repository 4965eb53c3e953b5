"""Pictures of metrics.csv: a run's loss.png, and the losses of several runs.

matplotlib is imported where a picture is drawn, since that takes half a second.
"""

import math
import secrets
import warnings
from itertools import accumulate
from pathlib import Path

from data.errors import UserError
from folio.metrics import name_file, read_metrics

GRAY = {"color": "0.45", "linestyle": "--", "linewidth": 1}


def plot_losses(out_dir: Path, baselines: dict[str, float]) -> None:
    """Plot a run's metrics.csv to its loss.png, with the losses of baselines, in nats per token."""
    rows = read_metrics(out_dir / "metrics.csv")
    figure = _figure(out_dir.name, size=(7.5, 5.2))
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(5, 1))
    for name, loss in baselines.items():
        losses.axhline(loss, **GRAY)
        losses.annotate(
            f"{name} {loss:.2f}",
            (0.99, loss),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            horizontalalignment="right",
            color="0.35",
            fontsize="small",
        )
    iters, training = points(rows, "loss")
    losses.plot(iters, training, color="C0", alpha=0.25, linewidth=1)
    losses.plot(iters, smooth(training), color="C0", label="training")
    iters, val_losses = points(rows, "val_loss")
    losses.plot(iters, val_losses, color="C1", marker="o", markersize=4, label="validation")
    if val_losses:
        best = min(val_losses)
        losses.annotate(
            f"best {best:.3f}",
            (iters[val_losses.index(best)], best),
            xytext=(0, 7),
            textcoords="offset points",
            horizontalalignment="right",
            color="C1",
            weight="bold",
        )
        losses.margins(y=0.12)
    losses.set_ylabel("loss (nats per token)")
    losses.legend(loc="best")
    rates.plot(*points(rows, "lr"), color="C2")
    rates.set(xlabel="updates (iter_num)", ylabel="lr", ylim=(0, None))
    rates.ticklabel_format(axis="y", scilimits=(-2, 3))
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    ratios = {int(row["tokens"]) / int(row["iter_num"]) for row in rows if row["iter_num"] != "0"}
    if len(ratios) == 1:  # a resume did not change the batch size
        (per_iter,) = ratios
        tokens = losses.secondary_xaxis(
            "top", functions=(lambda x: x * per_iter, lambda x: x / per_iter)
        )
        tokens.set_xlabel("tokens")
        tokens.xaxis.set_major_formatter("{x:,.0f}")
    _save(figure, out_dir / "loss.png")


def plot_runs(out_dirs: list[Path], path: Path) -> None:
    """Plot the validation losses of several runs, and faintly their training losses, to `path`."""
    figure = _figure("validation loss, and training loss (faint)", size=(7.5, 4.5))
    axes = figure.add_subplot(xlabel="updates (iter_num)", ylabel="loss (nats per token)")
    for i, out_dir in enumerate(out_dirs):
        rows, color = read_metrics(out_dir / "metrics.csv"), f"C{i % 10}"
        iters, training = points(rows, "loss")
        axes.plot(iters, smooth(training), color=color, alpha=0.3)
        iters, val_losses = points(rows, "val_loss")
        label = "./" * (str(out_dir)[0] == "_") + _printable(str(out_dir)).replace("$", r"\$")
        if val_losses:
            label += f": {min(val_losses):.3f}"
        axes.plot(iters, val_losses, color=color, marker="o", markersize=4, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    """The iterations and the values of a column of metrics.csv, where it has a finite one."""
    measured = [row for row in rows if row[column] and math.isfinite(float(row[column]))]
    return [int(row["iter_num"]) for row in measured], [float(row[column]) for row in measured]


def smooth(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours, a twentieth of all; with fewer near the ends."""
    sums, n, reach = list(accumulate(values, initial=0.0)), len(values), len(values) // 40
    nearest = (min(reach, i, n - 1 - i) for i in range(n))
    return [(sums[i + k + 1] - sums[i - k]) / (2 * k + 1) for i, k in enumerate(nearest)]


def _figure(title: str, size: tuple[float, float]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(_printable(title), parse_math=False)
    return figure


def _save(figure, path: Path) -> None:
    """Save a figure to `path`, atomically; raises UserError for an unknown format."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with name_file(path), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the font may lack a glyph
            figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")
        temporary.replace(path)
    except ValueError as error:  # the ending is not a format of matplotlib
        raise UserError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
