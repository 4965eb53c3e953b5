"""List, show, verify, plot and report on runs.

python runs.py                                       list the runs in out/
python runs.py list elsewhere                        list those in another folder
python runs.py show out/mine                         print the contents of checkpoints
python runs.py verify out/mine data/mine             check the digests of checkpoints, data sets
python runs.py plot out/a out/b --output=ab.png      plot the losses of several runs
python runs.py report out/mine                       show in one HTML file what a run has learned
python runs.py report out/a out/b --output=ab.html   show several side by side
"""

from folio.process import script  # isort: skip  (first, for Ctrl-C during other imports)
import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from data import bins
from data.errors import UserError
from folio import checkpoint, metrics, plot, report, run_folder
from folio.checkpoint import Checkpoint
from folio.options import PathStr, PathStrs, build_options, read_options


@dataclass
class RunsConfig:
    action: Literal["list", "show", "verify", "plot", "report"] = "list"  # what to do
    paths: PathStrs = ()  # runs' folders, checkpoints or data sets; for list the runs' parent
    output: PathStr = ""  # empty: runs.png for plot, report.html in the first folder for report


@script
def main(argv: list[str]) -> int:
    given, _ = read_options(RunsConfig, argv, positional=("action", "paths"))
    options = build_options(RunsConfig, given)
    paths = [Path(word) for word in options.paths]
    if options.output and options.action not in ("plot", "report"):
        raise UserError(f"--output is for plot and report; {options.action} prints")
    if options.action == "list":
        return list_runs(paths or [Path("out")])
    if not paths:
        raise UserError(f"usage: python runs.py {options.action} PATH ...")
    if options.action == "plot":
        return plot_runs(paths, Path(options.output or "runs.png"))
    if options.action == "report":
        output = Path(options.output or paths[0] / "report.html")
        report.write(paths, output)
        print(f"saved:   {output}")
        return 0
    return check_files(paths, show=options.action == "show")


def list_runs(parents: list[Path]) -> int:
    """Print a line per run, the newest last, from the unverified headers of checkpoints; then the
    mean and the spread of runs that differ in their seeds alone."""
    found = [path for parent in parents for path in parent.glob(f"*/{run_folder.LATEST}")]
    if not found:
        raise UserError(f"no runs in {', '.join(map(str, parents))}")
    width = max(24, *(len(str(path.parent)) for path in found))
    print(f"{'run':<{width}}{'model':>10}{'updates':>9}{'best loss':>10}{'minutes':>8}  saved")
    groups = {}  # options and data -> the first run, {seed: best loss}
    for path in sorted(found, key=lambda path: path.stat().st_mtime):
        saved, meta = time.localtime(path.stat().st_mtime), checkpoint.read_header(path)
        print(
            f"{str(path.parent):<{width}}{describe(meta)}  {time.strftime('%Y-%m-%d %H:%M', saved)}"
        )
        with suppress(LookupError, TypeError, ValueError, AttributeError):
            loss = float(meta["progress"]["best_val_loss"])
            of_seeds = groups.setdefault(what_was_done(path.parent, meta), (path.parent, {}))[1]
            of_seeds[meta["run_config"]["seed"]] = loss
    for first, losses in groups.values():
        if len(losses) > 1:
            spread = f"{mean(losses.values()):.4f}, standard deviation {stdev(losses.values()):.4f}"
            print(f"{len(losses)} seeds of the options of {first}: best loss {spread}")
    return 0


def what_was_done(folder: Path, meta: dict) -> str:
    """The options and the data of a run, without what may differ between seeds."""
    record = run_folder.read_record(folder)
    other = {"seed", "out_dir", "checkpoint", "tensorboard", "wandb", "wandb_run_name"}
    if record["minutes"]:  # it fixed these
        other |= {"max_iters", "eval_interval", "log_interval"}
    options = {name: value for name, value in record["options"].items() if name not in other}
    return json.dumps([options, record["minutes"], meta["dataset"]], sort_keys=True)


def describe(meta: dict) -> str:
    """Columns about a checkpoint: model, updates, best loss, minutes."""
    try:
        config, progress = meta["model_config"], meta["progress"]
        model = f"{config['n_layer']} x {config['n_embd']}" if meta["model"] == "gpt" else "bigram"
        loss, minutes = progress.get("best_val_loss"), progress.get("wall_seconds", 0.0) / 60
        loss = "-" if loss is None else f"{loss:.4f}"
        return f"{model:>10}{progress['iter_num']:>9,}{loss:>10}{minutes:>8.1f}"
    except (LookupError, TypeError, ValueError, AttributeError):
        return f"{'unreadable':>10}{'':27}"


def plot_runs(paths: list[Path], output: Path) -> int:
    for path in paths:
        if not (path / "metrics.csv").is_file():
            raise UserError(f"{path} is not a run's folder: it has no metrics.csv")
        if not metrics.read_metrics(path / "metrics.csv"):
            raise UserError(f"{path / 'metrics.csv'} has no rows that can be read")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}")
    plot.plot_runs(paths, output)
    print(f"saved:   {output}")
    return 0


def check_files(paths: list[Path], show: bool) -> int:
    """Verify the digests of checkpoints and data sets; return 2 if one is wrong.

    With `show`, also print what checkpoints contain.
    """
    files, n_damaged = [file for path in paths for file in find_files(path)], 0
    for file in files:
        try:
            check_file(file, show)
        except UserError as error:
            print(error)
            n_damaged += 1
    if n_damaged:
        print(f"error: {n_damaged} of {len(files)} could not be verified", file=sys.stderr)
    return 2 if n_damaged else 0


def check_file(file: Path, show: bool) -> None:
    """Verify a checkpoint, or the folder of a data set, and print that it is intact; with `show`
    also what a checkpoint contains. Raises UserError if it is damaged."""
    if file.is_dir():
        bins.verify(file)
    else:
        ckpt = checkpoint.load(file)
    print(f"{file}: OK")
    if show and not file.is_dir():
        print_meta(ckpt)


def find_files(path: Path) -> list[Path]:
    """The checkpoint or the data set's folder itself, or all checkpoints of a run's folder."""
    if not path.is_dir() or (path / "meta.json").is_file():
        return [path]
    candidates = [path / run_folder.LATEST, path / run_folder.BEST, *run_folder.snapshots(path)]
    files = [file for file in candidates if file.is_file()]
    if not files:
        raise UserError(f"{path} is a folder without checkpoints")
    return files


def print_meta(ckpt: Checkpoint) -> None:
    meta, tensors = ckpt.meta, ckpt.tensors
    n_params = sum(t.numel() for name, t in tensors.items() if name.startswith("model."))
    print(f"  run          {meta['run_id']}: {meta['model']}, {n_params:,} parameters")
    print(f"  size         {ckpt.path.stat().st_size:,} bytes, {len(tensors)} tensors")
    print(f"  tokenizer    {meta['tokenizer'].get('kind')}")
    for title in ("progress", "model_config", "run_config"):
        for name, value in meta[title].items():
            print(f"  {title:<12} {name} = {value}")


if __name__ == "__main__":
    raise SystemExit(main())
