"""Logging: metrics.csv, the console, loss.png, TensorBoard, and Weights & Biases.

metrics.csv has a row for every log and every evaluation. A cell without a measurement is empty:

    iter_num, tokens               updates made, tokens trained on
    lr, loss, grad_norm            of the last update; loss in nats per token
    train_loss, val_loss           of an evaluation, in nats per token
    val_bits_per_byte              validation loss in bits per byte, comparable across tokenizers
    tokens_per_second, mfu         since the last log; MFU if the device's peak is known
    train_seconds, wall_seconds    without and with evaluation, saving and compilation

TensorBoard and Weights & Biases get the same numbers under the same names.
"""

import csv
import html
import importlib.util
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data.errors import UserError
from folio import distributed
from folio.checkpoint import TEMPORARY

COLUMNS = (
    "iter_num,tokens,lr,loss,grad_norm,train_loss,val_loss,val_bits_per_byte,"
    "tokens_per_second,mfu,train_seconds,wall_seconds"
).split(",")


class Clock:
    """Measures training time and wall time, on top of those of a run that is resumed.

    Training time is paused between stop() and start(), for evaluation, saving and compilation.
    """

    def __init__(self, device: str, train_seconds: float = 0.0, wall_seconds: float = 0.0):
        self._device, self._train_seconds, self._started = device, train_seconds, None
        self._wall_start = time.perf_counter() - wall_seconds

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._device != "cpu":
            torch.accelerator.synchronize(self._device)
        self._train_seconds, _ = self.read()
        self._started = None

    def read(self) -> tuple[float, float]:
        """Seconds of training and of wall time, up to now."""
        now = time.perf_counter()
        running = 0.0 if self._started is None else now - self._started
        return self._train_seconds + running, now - self._wall_start


class Log:
    """Writes metrics.csv, and a progress bar on a terminal or plain lines elsewhere; on rank 0."""

    def __init__(
        self,
        out_dir: Path,
        iter_num: int,
        tokens: int,
        train_seconds: float,
        max_iters: int,
        trackers: "list[TensorBoard | WandB]",
    ):
        """Continue at `iter_num`; later rows, written before a kill, are removed."""
        self._trackers, self._is_main = trackers, distributed.is_main()
        self._previous = tokens, train_seconds
        bar = {"disable": None if self._is_main else True, "dynamic_ncols": True, "unit": "it"}
        self.bar = tqdm(initial=iter_num, total=max_iters or None, **bar)
        if not self._is_main:
            return
        self._path = path = out_dir / "metrics.csv"
        rows = [row for row in read_metrics(path) if int(row["iter_num"]) <= iter_num]
        temporary = path.with_name(TEMPORARY)
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
        self._file = open(path, "a", newline="", encoding="utf-8")
        self._csv = self._writer(self._file)

    @staticmethod
    def _writer(file) -> csv.DictWriter:
        return csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self._is_main:
            with suppress(OSError):  # every row was flushed
                self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def tokens_per_second(self, tokens: int, train_seconds: float) -> float:
        """The speed since the previous call."""
        previous_tokens, previous_seconds = self._previous
        self._previous = tokens, train_seconds
        return (tokens - previous_tokens) / (train_seconds - previous_seconds)

    def write(self, **row: int | float | None) -> None:
        """Append a row; None becomes an empty cell."""
        if not self._is_main:
            return
        with _name_file(self._path):
            self._csv.writerow({k: f"{v:.7g}" if type(v) is float else v for k, v in row.items()})
            self._file.flush()
        measured = {k: v for k, v in row.items() if v is not None}
        for tracker in self._trackers:
            tracker.write(measured)

    def add_samples(self, iter_num: int, texts: Iterable[str]) -> None:
        """Print generated texts, and pass them on."""
        for text in texts:
            print_line(f"--- sample at iteration {iter_num:,}\n{text}")
            for tracker in self._trackers:
                tracker.add_sample(iter_num, text)

    def show_status(self, iter_num: int, text: str) -> None:
        """Show the state of the run, in the progress bar or else on a line."""
        if self.bar.disable:
            print_line(f"iter {iter_num:,}: {text}")
        else:
            self.bar.set_postfix_str(text, refresh=False)


def print_line(text: str) -> None:
    """Print a line without breaking the progress bar."""
    tqdm.write(text)
    sys.stdout.flush()


@contextmanager
def _name_file(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# ---- trackers -----------------------------------------------------------------------------------


class TensorBoard:
    """Event files in out/<run>/tensorboard, for `tensorboard --logdir out`."""

    def __init__(self, out_dir: Path, iter_num: int, options: dict):
        from torch.utils.tensorboard import SummaryWriter

        # events after the checkpoint that a run resumes from are hidden
        resumed_from = iter_num + 1 if iter_num else None
        self._writer = SummaryWriter(out_dir / "tensorboard", purge_step=resumed_from)
        rows = [f"| {name} | {value} |" for name, value in options.items()]
        self._writer.add_text("options", "\n".join(["| option | value |", "|--|--|", *rows]))

    def write(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, row["iter_num"])

    def add_sample(self, iter_num: int, text: str) -> None:
        code_block = "".join(f"    {line}\n" for line in text.split("\n"))
        self._writer.add_text("sample", code_block, iter_num)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, out_dir: Path, project: str, name: str, run_id: str, options: dict):
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                name=name or out_dir.name,
                id=run_id,
                resume="allow",
                dir=out_dir,
                config=options,
            )
        except wandb.Error as error:
            raise UserError(
                f"--wandb: {error}; WANDB_MODE=offline needs no account and no network"
            ) from None
        self._run.define_metric("*", step_metric="iter_num")

    def write(self, row: dict[str, float]) -> None:
        self._run.log(row)

    def add_sample(self, iter_num: int, text: str) -> None:
        code_block = self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"iter_num": iter_num, "sample": code_block})

    def close(self) -> None:
        self._run.finish()


def open_trackers(
    out_dir: Path, iter_num: int, run_id: str, options: dict
) -> list[TensorBoard | WandB]:
    """Open the trackers that the options ask for, on rank 0."""
    trackers = []
    if not distributed.is_main():
        return trackers
    if options["tensorboard"]:
        trackers.append(TensorBoard(out_dir, iter_num, options))
    if options["wandb"]:
        names = options["wandb_project"], options["wandb_run_name"]
        trackers.append(WandB(out_dir, *names, run_id, options))
    return trackers


def check_trackers(options: dict) -> None:
    """Raise UserError if a tracker cannot be used: no package, or no key for wandb."""
    for package in ("tensorboard", "wandb"):
        if options[package] and importlib.util.find_spec(package) is None:
            raise UserError(f"--{package} needs the package {package}: pip install {package}")
    logs_in = options["wandb"] and os.environ.get("WANDB_MODE", "online") == "online"
    if logs_in and distributed.is_main():
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--wandb: {reason} WANDB_MODE=offline needs no key") from None


# ---- reading and drawing ------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read a metrics.csv, without incomplete and malformed lines."""
    if not path.exists():
        return []
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for line in file:
            values = line.rstrip("\r\n").split(",")
            complete = line.endswith("\n") and len(values) == len(COLUMNS) and values[-1]
            if complete and values[0].isdecimal() and all(not v or _is_number(v) for v in values):
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
        return True
    except ValueError:
        return False


def plot_losses(out_dir: Path, bigram_loss: float) -> None:
    """Plot a run's metrics.csv to its loss.png, with `bigram_loss` (nats per token) as baseline."""
    with _figure(out_dir / "loss.png", out_dir.name) as axes:
        rows = read_metrics(out_dir / "metrics.csv")
        _plot(axes, rows, "loss", color="0.75", label="training, each batch")
        _plot(axes, rows, "train_loss", color="C0", marker="o", label="training, evaluated")
        _plot(axes, rows, "val_loss", color="C1", marker="o", label="validation")
        style = {"color": "0.3", "linestyle": "--", "linewidth": 1}
        axes.axhline(bigram_loss, label="bigram, from counts", **style)


def plot_runs(out_dirs: list[Path], path: Path) -> None:
    """Plot the validation losses of several runs, and faintly their training losses, to `path`."""
    with _figure(path, "validation loss") as axes:
        for i, out_dir in enumerate(out_dirs):
            rows = read_metrics(out_dir / "metrics.csv")
            _plot(axes, rows, "loss", color=f"C{i % 10}", alpha=0.25)
            label = _printable(str(out_dir))
            _plot(axes, rows, "val_loss", color=f"C{i % 10}", marker="o", label=label)


@contextmanager
def _figure(path: Path, title: str) -> Iterator:
    """Axes for losses over updates; on exit the figure is saved to `path`, atomically."""
    from matplotlib.figure import Figure  # here: it takes half a second

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="updates (iter_num)", ylabel="loss (nats per token)")
    yield axes
    axes.set_title(_printable(title), parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _name_file(path), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the font may lack a glyph
            figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")
        os.replace(temporary, path)
    except ValueError as error:  # the ending is not a format of matplotlib
        raise UserError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _plot(axes, rows: list[dict[str, str]], column: str, **style: object) -> None:
    points = [(int(row["iter_num"]), float(row[column])) for row in rows if row[column]]
    if points:
        axes.plot(*zip(*points, strict=True), markersize=4, **style)


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def format_seconds(seconds: float) -> str:
    """Format a duration as 45 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
