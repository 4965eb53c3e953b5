"""A run's folder: its lock, its checkpoints (latest, best, snapshots), and going back to one.

    out/<run>/run.json                              the command, the options chosen, the machine
    out/<run>/ckpt.safetensors                      the latest state
    out/<run>/best.safetensors                      the state with the best validation loss
    out/<run>/snapshots/iter_000500.safetensors     kept every snapshot_interval updates
    out/<run>/metrics.csv, samples.txt, loss.png    folio/metrics.py, samples.py, plot.py

The best state and the snapshots are hard links to what was ckpt.safetensors when they were made, or
copies if the disk has no hard links. A new run moves an older one aside and never overwrites it.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

import filelock
from torch import Tensor

from data import bins
from data.errors import UserError
from folio import checkpoint, distributed, gpt2, samples
from folio.checkpoint import TEMPORARY, Checkpoint, sync_folder, write_file

LATEST, BEST, SNAPSHOTS = "ckpt.safetensors", "best.safetensors", "snapshots"
RECORD, LOCK = "run.json", ".lock"
HOW_IT_BEGAN = ("init_from", "checkpoint")  # options that run.json keeps when a run is resumed


# ---- the folder ---------------------------------------------------------------------------------


@contextmanager
def lock(out_dir: Path) -> Iterator[None]:
    """Lock a run's folder; raises UserError if another process has it."""
    held = filelock.FileLock(out_dir / LOCK, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another process is training in {out_dir}; wait for it, or use another --out_dir"
        ) from None
    try:
        yield
    finally:
        held.release()


def check_new_folder(out_dir: Path) -> bool:
    """Return whether an older run is there; raises UserError if no new run can go there."""
    if not out_dir.name or (out_dir.exists() and not out_dir.is_dir()):
        raise UserError(f"--out_dir={out_dir} cannot be a folder for a run")
    entries = out_dir.iterdir() if out_dir.exists() else ()
    names = {path.name for path in entries if not path.name.startswith(".")}
    names -= {"desktop.ini", "Thumbs.db"}
    if names and not names & {"metrics.csv", RECORD}:
        raise UserError(f"--out_dir={out_dir} has files that are not a run's; use another folder")
    if names:
        with lock(out_dir):
            pass  # fails if another process trains there
    return bool(names)


@contextmanager
def new_folder(out_dir: Path) -> Iterator[None]:
    """Create and lock the folder of a new run; an older run there is moved aside first."""
    has_older_run = check_new_folder(out_dir)
    if out_dir.is_symlink():
        out_dir = out_dir.resolve()  # the link stays
    if has_older_run:  # unlocked, because Windows cannot rename a folder with an open file
        bins.move_aside(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=not has_older_run)
    except FileExistsError:
        raise UserError(f"a run has just started in {out_dir}; use another --out_dir") from None
    with lock(out_dir):
        yield


def write_record(out_dir: Path, record: dict, iter_num: int = 0) -> None:
    """Write run.json. What a resume at `iter_num` changed is kept under "before"."""
    old, before = read_record(out_dir), []
    try:
        options = {**record["options"], **{name: old["options"][name] for name in HOW_IT_BEGAN}}
        changed = {k: v for k, v in old["options"].items() if options.get(k) != v}
        differs = {k: old[k] for k in record if k in old and old[k] != record[k]}
        entry = {"until": iter_num, **differs, "options": changed}
        before = [*old.get("before", []), entry]
        record = {**record, "options": options}
        if "max_iters" not in changed:  # the length is still that of the budget
            record["minutes"] = old["minutes"]
    except (LookupError, TypeError, AttributeError):
        pass  # there is no older one
    record = {**record, "launch": distributed.launch_id()} | ({"before": before} if before else {})
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_file(out_dir / RECORD, [text.encode(errors="replace")], out_dir / TEMPORARY)


def read_record(out_dir: Path) -> dict:
    """The contents of run.json; {} if it cannot be read."""
    try:
        record = json.loads((out_dir / RECORD).read_text("utf-8"))
        return record if type(record) is dict else {}
    except (OSError, ValueError, RecursionError):
        return {}


def check_disk(out_dir: Path, n_bytes: int, n_snapshots: int, resuming: bool) -> None:
    """Raise UserError if a run's checkpoints, of n_bytes each, clearly do not fit on the disk.

    These are the latest, the best, the one being written, and the snapshots.
    """
    folder, reused = out_dir.absolute(), {}
    if resuming:  # its checkpoints will be replaced; a file may have several names
        paths = [folder / LATEST, folder / BEST, *snapshots(folder)]
        reused = {p.stat().st_ino: p.stat().st_size for p in paths if p.exists()}
    needed = (3 + n_snapshots) * n_bytes
    free = free_space(folder) + sum(reused.values())
    if free < needed:
        fewer = ", or set keep_snapshots" if n_snapshots else ""
        raise UserError(
            f"--out_dir={out_dir}: {3 + n_snapshots} checkpoints need about "
            f"{math.ceil(needed / 2**20):,} MiB and {free / 2**20:,.0f} MiB are free; "
            f"use another disk{fewer}"
        )


def free_space(folder: Path) -> int:
    """The free bytes on the disk where a folder is, or will be."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- saving -------------------------------------------------------------------------------------


def save_run(
    out_dir: Path,
    tensors: dict[str, Tensor],
    meta: dict,
    best: bool,
    snapshot: bool,
    keep: int,
    values: Iterable[Tensor] | None = None,
) -> None:
    """Save a run's state as the latest, and on request as the best and as a snapshot.

    The newest `keep` snapshots are kept; 0 keeps all. `values` is as in checkpoint.save().
    """
    checkpoint.save(out_dir / LATEST, tensors, meta, values)
    link_latest(out_dir, meta["progress"]["iter_num"], best, snapshot)
    if snapshot and keep:
        for old in snapshots(out_dir)[:-keep]:
            os.unlink(old)


def link_latest(out_dir: Path, iter_num: int, best: bool, snapshot: bool) -> None:
    """Link the latest state as the best, and as the snapshot of its iteration, on request."""
    if best:
        _link(out_dir, out_dir / LATEST, out_dir / BEST)
    if snapshot:
        folder = out_dir / SNAPSHOTS
        if not folder.is_dir():
            os.mkdir(folder)
            sync_folder(out_dir)
        _link(out_dir, out_dir / LATEST, folder / f"iter_{iter_num:06d}.safetensors")


def snapshots(out_dir: Path) -> list[Path]:
    """A run's snapshots, the oldest first."""
    return sorted((out_dir / SNAPSHOTS).glob("iter_*.safetensors"), key=_snapshot_iter)


def _snapshot_iter(path: Path) -> int:
    return int(re.sub(r"\D", "", path.stem) or 0)


def _link(out_dir: Path, source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the disk has no hard links."""
    temporary = out_dir / TEMPORARY
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        write_file(target, _read_blocks(source), temporary)
        return
    os.replace(temporary, target)
    with suppress(FileNotFoundError):
        os.unlink(temporary)  # it is still there if both were links to the same file
    sync_folder(target.parent)


def _read_blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


# ---- finding and loading ------------------------------------------------------------------------


def newest_run(parent: Path) -> Path:
    """The folder in `parent` whose run saved last; raises UserError if there is none."""
    saved = [path for path in parent.glob(f"*/{LATEST}") if path.is_file()]
    if not saved:
        raise UserError(f"no run in {parent}/ has a checkpoint yet; train one: python train.py")
    return max(saved, key=lambda path: path.stat().st_mtime).parent


def open_checkpoint(name: str, cache_dir: str = "") -> Checkpoint:
    """Load the model that --checkpoint or --init_from names.

    The name is a file, a run's folder (then best.safetensors is used), a folder in transformers'
    format, or one of GPT-2's names. Raises UserError if it does not exist or cannot be used.
    """
    if folder := gpt2.find_folder(name, cache_dir):
        return gpt2.load(name, folder)
    path = Path(name)
    for file in (path, path / "ckpt.pt"):
        if checkpoint.is_torch_file(file):
            command = f"python convert.py {quote(str(file))} out/imported"
            raise UserError(
                f"{name} is from torch.save(), as nanoGPT's checkpoints are; import it: {command}, "
                "with --dataset=NAME if it was not trained on GPT-2's tokens"
            )
    if path.is_dir():
        candidates = [path / BEST, path / LATEST]
        path = next((p for p in candidates if p.is_file()), None)
        if path is None:
            raise UserError(f"{name or '.'} is a folder without {BEST} or {LATEST}")
    ckpt = checkpoint.load(path)
    checkpoint.check_model(ckpt)
    return ckpt


def load_latest(out_dir: Path) -> Checkpoint:
    """Load a run's latest state.

    If ckpt.safetensors is damaged or belongs to another run, the newest intact one of the other
    checkpoints is used, with a message. Raises UserError if there is none.
    """
    others = [path for path in (out_dir / BEST, *snapshots(out_dir)) if path.is_file()]
    others.sort(key=lambda path: _claimed_progress(path).get("iter_num", -1), reverse=True)
    problems = []
    for path in (out_dir / LATEST, *others):
        try:
            ckpt = load_from_run(out_dir, path)
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            iter_num = ckpt.meta["progress"].get("iter_num")
            print(f"{problems[0]}; resuming from {path}, iteration {iter_num}")
        return ckpt
    more = f"; none of the {len(others)} others can be used either" if others else ""
    raise UserError(problems[0] + more)


def load_from_run(out_dir: Path, path: Path) -> Checkpoint:
    """Load one of a run's checkpoints; raises UserError if run.json names another run."""
    ckpt = checkpoint.load(path)
    run_id = read_record(out_dir).get("run_id")  # None if only checkpoints were copied here
    if run_id not in (None, ckpt.meta["run_id"]):
        found = ckpt.meta["run_id"]
        raise UserError(f"{path} belongs to another run: {found!r}, not {run_id!r}")
    return ckpt


def _claimed_progress(path: Path) -> dict:
    """The progress in a file's header, unverified; {} if there is none."""
    progress = checkpoint.read_header(path).get("progress")
    return progress if type(progress) is dict and type(progress.get("iter_num")) is int else {}


# ---- going back ---------------------------------------------------------------------------------


def rewind(out_dir: Path, path: Path, iter_num: int) -> None:
    """Make the checkpoint `path`, of iteration `iter_num`, the latest.

    What it replaces, and later checkpoints, are moved to out_dir/beyond_ITER, with a message.
    """
    latest = out_dir / LATEST
    beyond = [p for p in snapshots(out_dir) if _snapshot_iter(p) > iter_num]
    if _claimed_progress(out_dir / BEST).get("iter_num", -1) > iter_num:
        beyond.append(out_dir / BEST)
    keep_latest = path != latest and latest.exists() and not path.samefile(latest)
    if beyond or keep_latest:
        folder = bins.free_name(out_dir / f"beyond_{iter_num:06d}")
        os.mkdir(folder)
        if keep_latest:
            _link(out_dir, latest, folder / LATEST)
        for p in beyond:
            os.replace(p, folder / p.name)
        for log in (out_dir / "metrics.csv", out_dir / samples.FILE):
            if log.exists():
                write_file(folder / log.name, _read_blocks(log), out_dir / TEMPORARY)
        print(f"moved the checkpoints after iteration {iter_num:,} to {folder}")
    if path != latest:
        _link(out_dir, path, latest)


def restore_best(out_dir: Path, best_val_loss: float | None) -> bool:
    """Make best.safetensors the state with `best_val_loss`; False if no checkpoint has it."""
    if best_val_loss is None:
        return False
    for path in (out_dir / BEST, *snapshots(out_dir)):
        progress = _claimed_progress(path)
        evaluated = progress.get("eval_iter") == progress.get("iter_num")
        if evaluated and progress.get("val_loss") == best_val_loss:
            if path != out_dir / BEST:
                _link(out_dir, path, out_dir / BEST)
            return True
    return False
