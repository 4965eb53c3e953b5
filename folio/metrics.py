"""Logging: metrics.csv, samples.txt, the console, TensorBoard, and Weights & Biases.

metrics.csv has a row for every log and every evaluation. A cell without a measurement is empty:

    iter_num, tokens               updates made, tokens trained on
    lr, loss, grad_norm            of the last update; loss in nats per token, with --teacher the
                                   mean of the loss on the text and that on the teacher
    train_loss, val_loss           of an evaluation, in nats per token
    val_bits_per_byte              validation loss in bits per byte, comparable across tokenizers
    tokens_per_second, mfu         since the last log; MFU if the device's peak is known
    train_seconds, wall_seconds    without and with evaluation, saving and compilation

TensorBoard and Weights & Biases get the same numbers under the same names.
"""

import csv
import html
import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data.errors import UserError
from folio import distributed, samples
from folio.checkpoint import TEMPORARY
from folio.samples import Sample

MAX_SHARE = 0.02  # of a run's time may go to samples.txt, and as much to loss.png
BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
BAR_WITHOUT_END = "{n_fmt} updates in {elapsed}{postfix}"
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


class Share:
    """Allows something as long as it has taken at most a share of the time since this was made."""

    def __init__(self, share: float):
        self._share, self._spent, self._start = share, 0.0, time.perf_counter()

    def allows(self) -> bool:
        return self._spent <= self._share * (time.perf_counter() - self._start)

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Measure what is done in this context."""
        start = time.perf_counter()
        yield
        self._spent += time.perf_counter() - start


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
        self._width, self._n_logs = len(f"{max_iters or 10**6:,}"), 0
        self.sampling, self.drawing = Share(MAX_SHARE), Share(MAX_SHARE)
        self.bar = tqdm(
            initial=iter_num,
            total=max_iters or None,
            disable=None if self._is_main else True,
            dynamic_ncols=True,
            bar_format=BAR if max_iters else BAR_WITHOUT_END,
        )
        if not self._is_main:
            return
        samples.rewind(out_dir, iter_num)
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
        with name_file(self._path):
            self._csv.writerow({k: f"{v:.7g}" if type(v) is float else v for k, v in row.items()})
            self._file.flush()
        measured = {k: v for k, v in row.items() if v is not None}
        for tracker in self._trackers:
            tracker.write(measured)

    def add_continuation(self, sample: Sample) -> None:
        """Add a sample to samples.txt, and pass it on."""
        samples.append(self._path.parent, sample)
        for tracker in self._trackers:
            tracker.add_text("continuation", sample.iter_num, sample.prompt + sample.text)

    def add_samples(self, iter_num: int, texts: Iterable[str]) -> None:
        """Print generated texts, and pass them on."""
        for text in texts:
            print_line(f"--- sample at iteration {iter_num:,}\n{text}")
            for tracker in self._trackers:
                tracker.add_text("sample", iter_num, text)

    def show_status(self, iter_num: int, text: str) -> None:
        """Show the state of the run in the progress bar, or else every tenth time on a line."""
        self._n_logs += 1
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
        elif self._n_logs % 10 == 0:
            self.print_state(iter_num, text)

    def print_state(self, iter_num: int, text: str) -> None:
        """Print a line that begins with the iteration."""
        print_line(f"iter {iter_num:>{self._width},}: {text}")


def print_line(text: str) -> None:
    """Print a line without breaking the progress bar."""
    tqdm.write(text)
    sys.stdout.flush()


@contextmanager
def name_file(path: Path) -> Iterator[None]:
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

    def add_text(self, name: str, iter_num: int, text: str) -> None:
        code_block = "".join(f"    {line}\n" for line in text.split("\n"))
        self._writer.add_text(name, code_block, iter_num)

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

    def add_text(self, name: str, iter_num: int, text: str) -> None:
        code_block = self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"iter_num": iter_num, name: code_block})

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


# ---- reading ------------------------------------------------------------------------


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
    """Whether a cell can have been measured."""
    try:
        return abs(float(text)) < 1e18
    except ValueError:
        return False


def format_seconds(seconds: float) -> str:
    """Format a duration as 45 s, 2.4 min, 12 min or 3.5 h."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (math.inf, 3600, "h")):
        if seconds < limit:
            n = seconds / unit
            return f"{n:.0f} {name}" if unit == 1 or n >= 10 else f"{n:.1f} {name}"
