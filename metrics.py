"""What a run tells while it goes on: metrics.csv, a progress bar or plain lines, loss.png.

On request TensorBoard and Weights & Biases get the same numbers under the same names.

metrics.csv has a row for every log and every evaluation, empty where nothing was measured:

    iter_num, tokens               updates made, tokens trained on
    lr, loss, grad_norm            of the update just made; loss in nats per token
    train_loss, val_loss           of an evaluation, nats per token
    val_bits_per_byte              the same in the unit that compares tokenizers
    tokens_per_second, mfu         since the last log; MFU where the device's peak is known
    train_seconds, wall_seconds    without and with evaluation, saving and compilation
"""

import csv
import html
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from config import UserError

COLUMNS = (
    "iter_num,tokens,lr,loss,grad_norm,train_loss,val_loss,val_bits_per_byte,"
    "tokens_per_second,mfu,train_seconds,wall_seconds"
).split(",")
NUMBER = re.compile(r"-?[0-9.]+(e[+-]?[0-9]+)?|nan|-?inf")
PEAK_FLOPS = {  # dense, in half precision, from the vendors' data sheets; first match counts
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "T4": 65e12,
}


class Log:
    """Writes metrics.csv and speaks: on a terminal with a progress bar, elsewhere in lines."""

    def __init__(
        self,
        out_dir: Path,
        iter_num: int,
        tokens: int,
        train_seconds: float,
        max_iters: int,
        boards: "list[TensorBoard | WandB]",
    ):
        """Go on from there; rows from beyond `iter_num`, left by a run that was killed, go."""
        self._boards = boards
        self._path = path = out_dir / "metrics.csv"
        self._logged = tokens, train_seconds
        kept = [row for row in read(path) if int(row["iter_num"]) <= iter_num]
        partial = path.with_name(path.name + ".partial")
        self._file = open(partial, "w", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        self._csv.writeheader()
        self._csv.writerows(kept)
        self._file.flush()
        os.replace(partial, path)
        total = max_iters or None
        self.bar = tqdm(initial=iter_num, total=total, unit="it", dynamic_ncols=True, disable=None)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        with suppress(OSError):  # every row was flushed
            self._file.close()
        for board in self._boards:
            board.close()

    def tokens_per_second(self, tokens: int, train_seconds: float) -> float:
        """The speed since the last call."""
        before_tokens, before_seconds = self._logged
        self._logged = tokens, train_seconds
        return (tokens - before_tokens) / (train_seconds - before_seconds)

    def write(self, **row: int | float | None) -> None:
        with _naming(self._path):
            self._csv.writerow({k: f"{v:.7g}" if type(v) is float else v for k, v in row.items()})
            self._file.flush()
        measured = {k: v for k, v in row.items() if v is not None}
        for board in self._boards:
            board.write(measured)

    def sample(self, iter_num: int, text: str) -> None:
        """Print a text that the model made, and give it to the boards."""
        say(f"--- sample at iteration {iter_num:,}\n{text}")
        for board in self._boards:
            board.sample(iter_num, text)

    def show(self, iter_num: int, words: str) -> None:
        """A passing state: in the bar, or as a line where there is none."""
        if self.bar.disable:
            say(f"iter {iter_num:,}: {words}")
        else:
            self.bar.set_postfix_str(words, refresh=False)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError within it says which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class TensorBoard:
    """Event files in out/<run>/tensorboard, for `tensorboard --logdir out`."""

    def __init__(self, out_dir: Path, iter_num: int, options: dict):
        from torch.utils.tensorboard import SummaryWriter

        # where a run resumes, its curves go on from there; events beyond are hidden
        resumed = iter_num + 1 if iter_num else None
        self._writer = SummaryWriter(out_dir / "tensorboard", purge_step=resumed)
        rows = [f"| {name} | {value} |" for name, value in options.items()]
        self._writer.add_text("options", "\n".join(["| option | value |", "|--|--|", *rows]))

    def write(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, row["iter_num"])

    def sample(self, iter_num: int, text: str) -> None:
        fenced = "".join(f"    {line}\n" for line in text.split("\n"))  # shown as it is
        self._writer.add_text("sample", fenced, iter_num)

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

    def sample(self, iter_num: int, text: str) -> None:
        shown = self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"iter_num": iter_num, "sample": shown})

    def close(self) -> None:
        self._run.finish()


def require(package: str) -> None:
    """Refuse, before anything is done, a board whose package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--{package} needs the package {package}: pip install {package}")


def say(words: str) -> None:
    """Print a line that stays, above the progress bar where there is one."""
    tqdm.write(words)
    sys.stdout.flush()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; lines that a kill cut short, or that are none, are left out."""
    if not path.exists():
        return []
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for line in file:
            row = dict(zip(COLUMNS, values := line.rstrip("\n").split(","), strict=False))
            whole = len(values) == len(COLUMNS) and row["iter_num"].isdecimal() and values[-1]
            if whole and all(not v or NUMBER.fullmatch(v) for v in values):
                rows.append(row)
    return rows


def draw_losses(out_dir: Path, baseline: float) -> None:
    """Draw metrics.csv as loss.png; `baseline` is the bigram's loss, in nats per token."""
    from matplotlib.figure import Figure  # takes half a second, so not before it is needed

    rows = read(out_dir / "metrics.csv")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="updates (iter_num)", ylabel="loss (nats per token)")
    for column, style in {
        "loss": {"color": "0.75", "label": "training, each batch"},
        "train_loss": {"color": "C0", "marker": "o", "label": "training, evaluated"},
        "val_loss": {"color": "C1", "marker": "o", "label": "validation"},
    }.items():
        points = [(int(row["iter_num"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), markersize=4, **style)
    axes.axhline(baseline, color="0.3", linestyle="--", linewidth=1, label="bigram, from counts")
    axes.set_title(out_dir.name.encode(errors="replace").decode(), parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = out_dir / "loss.png.partial"
    with _naming(out_dir / "loss.png"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a letter of the title has no glyph
            figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, out_dir / "loss.png")


def peak_flops(device: str) -> float | None:
    """Operations per second that the device could do in half precision; None where not known."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None
    )


def in_words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
