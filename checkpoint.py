"""Checkpoints: one safetensors file each, saved durably, loaded only when every byte is right.

    python checkpoint.py show out/mine                   what is in a run's files, or in one file
    python checkpoint.py verify out/mine other.safetensors      whether every byte is right

    header.__metadata__.folio   JSON: format, run id, configs, tokenizer, iteration, ...
    model.* and optimizer.*     the tensors
    sha256                      uint8 (32,), the last tensor: the digest of every byte before it

Any safetensors reader reads such a file. No pickle is involved, so no file can run code.

    out/<run>/ckpt.safetensors                      the latest state
    out/<run>/best.safetensors                      the state with the best validation loss
    out/<run>/snapshots/iter_000500.safetensors     kept every snapshot_interval iterations

The latter two are hard links to what was ckpt.safetensors when they were made. Everything is
written through os.open, write, fsync, replace, link, unlink and mkdir, so that tests can fail and
count each of them.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import config
from config import UserError
from data import bins

FORMAT = 1
LATEST, BEST, SNAPSHOTS = "ckpt.safetensors", "best.safetensors", "snapshots"
RECORD = "run.json"  # whose folder it is: the run's id and its options
PARTIAL = "new.partial"  # what is being written or linked; the next save writes over it
META = {  # what train.py puts into the header, beside `format`
    "run_id": str,
    "model": str,  # gpt or bigram
    "model_config": dict,  # GPTConfig's fields
    "run_config": dict,  # the rest of TrainConfig's, nothing "auto" any more
    "tokenizer": dict,  # what tokenizer.load() takes
    "dataset": str,  # the fingerprint of its tokens
    "progress": dict,  # iteration, windows drawn, losses, seconds
    "scaler": dict,  # float16's
    "threads": int,
}
SYNCED = 1 << 26  # bytes written between syncs
AHEAD = 2 * SYNCED  # bytes that may be written before they are hashed
O_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change line ends
DIGEST = {"dtype": "U8", "shape": [32]}
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---- one file -----------------------------------------------------------------------------------


def save(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Write a checkpoint so that `path` holds either the old file or all of the new one.

    To a temporary file in the same folder, fsync, rename, fsync of the folder: once this returns
    the new one survives a loss of power. An OSError names the file.
    """
    # widest elements first, so that every tensor lies aligned in the file
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    blocks = _with_digest(_blocks(tensors, {"format": FORMAT, **meta}))
    _write_file(path, blocks, path.with_name(PARTIAL))


def _write_file(path: Path, blocks: Iterable[memoryview | bytes], partial: Path) -> None:
    """Replace `path` by a file of these blocks, durably, or leave it as it was."""
    _remove(partial)  # never written into: it may be another name of a file that is whole
    try:
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_BINARY, 0o666)
        try:
            unsynced = 0
            for block in blocks:
                block = memoryview(block)
                while block:
                    n_written = os.write(file, block[:SYNCED])
                    block, unsynced = block[n_written:], unsynced + n_written
                    if unsynced >= SYNCED:  # the disk works while the next bytes are hashed
                        os.fsync(file)
                        unsynced = 0
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            os.unlink(partial)
        error.filename = error.filename or str(path)
        raise


def _with_digest(blocks: Iterable[memoryview]) -> Iterator[memoryview | bytes]:
    """The blocks and then their SHA-256, which is taken while the caller writes them."""
    digest, pending, ahead = hashlib.sha256(), deque(), 0
    with ThreadPoolExecutor(1) as pool:
        for block in blocks:
            pending.append((pool.submit(digest.update, block), len(block)))
            ahead += len(block)
            yield block
            while ahead > AHEAD:
                hashed, size = pending.popleft()
                hashed.result()
                ahead -= size
        for hashed, _ in pending:
            hashed.result()
    yield digest.digest()


def _blocks(tensors: dict[str, Tensor], meta: dict) -> Iterator[memoryview]:
    """The file's bytes, but for the digest at its end: length, header, then tensor after tensor."""
    header, end = {"__metadata__": {"folio": json.dumps(meta)}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    header["sha256"] = {**DIGEST, "data_offsets": [end, end + 32]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().view(-1)
        yield memoryview(flat.view(torch.uint8).numpy())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to sync
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        error.filename = str(folder)
        raise
    finally:
        os.close(fd)


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return a checkpoint's tensors, on the CPU, and its meta; every byte has been verified.

    The tensors are views of one buffer that holds the file. Raises UserError for whatever is not
    a whole and unchanged checkpoint; no more is allocated than the file is long.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot open checkpoint {path}: it is no file")
    try:
        data = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with open(path, "rb") as file:
            n_read = file.readinto(memoryview(data.numpy()))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot open checkpoint {path}: {error.strerror}") from None
    try:
        if n_read != len(data):
            raise ValueError("it shrank while it was read")
        header, start = _parse_header(data)
        if hashlib.sha256(data[:-32].numpy()).digest() != data[-32:].numpy().tobytes():
            raise ValueError("its digest does not match: the file is damaged")
        meta = json.loads(header.pop("__metadata__")["folio"])
        if meta["format"] != FORMAT:
            raise ValueError(f"its format is {meta['format']!r:.20}, not {FORMAT}")
        for key, kind in META.items():
            if type(meta[key]) is not kind:
                raise ValueError(f"{key!r} in its header is no {kind.__name__}")
        return {name: _view(data[start:], about) for name, about in header.items()}, meta
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error)
        if type(error) is not ValueError:
            reason = f"its header is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{path} is not a checkpoint that can be used: {reason}") from None


def _parse_header(data: Tensor) -> tuple[dict, int]:
    """The header, its last entry checked to be the digest, and where the tensors' bytes start."""
    if len(data) < 8 + 2 + 32:
        raise ValueError(f"{len(data)} bytes are too few")
    length = struct.unpack("<Q", data[:8].numpy().tobytes())[0]
    if length > len(data) - 8 - 32:
        raise ValueError("the file is cut short, or no safetensors file")
    header = json.loads(data[8 : 8 + length].numpy().tobytes())
    offset = 0
    for name, about in header.items():
        if name != "__metadata__":
            start, end = about["data_offsets"]
            size = math.prod(about["shape"]) * DTYPES[about["dtype"]].itemsize
            if start != offset or end != start + size or min(about["shape"], default=0) < 0:
                raise ValueError(f"the header lies about tensor {name!r}")
            offset = end
    if 8 + length + offset != len(data):
        raise ValueError("the file is cut short, or longer than its header says")
    if header.pop("sha256", None) != {**DIGEST, "data_offsets": [offset - 32, offset]}:
        raise ValueError("it carries no digest: not written by Folio")
    return header, 8 + length


def _view(data: Tensor, about: dict) -> Tensor:
    start, end = about["data_offsets"]
    return data[start:end].view(DTYPES[about["dtype"]]).view(about["shape"])


# ---- a run's folder -----------------------------------------------------------------------------


@contextmanager
def lock(out_dir: Path) -> Iterator[None]:
    """Hold a run's folder for this process alone."""
    held = filelock.FileLock(out_dir / ".lock", timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise UserError(f"a run is going on in {out_dir}; choose another --out_dir") from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def new_folder(out_dir: Path) -> Iterator[None]:
    """Hold a folder for a new run; an older run in it is moved aside first."""
    if not out_dir.name or (out_dir.exists() and not out_dir.is_dir()):
        raise UserError(f"--out_dir={out_dir} cannot be a run's folder")
    there = out_dir.iterdir() if out_dir.exists() else ()
    files = {path.name for path in there if path.suffix != ".partial"}
    if files - {".lock"} and not files & {"metrics.csv", RECORD}:
        raise UserError(f"--out_dir={out_dir} holds something that is no run; choose another")
    if out_dir.is_symlink():
        out_dir = out_dir.resolve()  # the link stays
    if files:
        with lock(out_dir):
            bins.move_aside(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=not files)
    except FileExistsError:
        raise UserError(f"a run has just begun in {out_dir}; choose another --out_dir") from None
    with lock(out_dir):
        yield


def save_run(
    out_dir: Path, tensors: dict[str, Tensor], meta: dict, best: bool, snapshot: bool, keep: int
) -> None:
    """Save the state of a run as its latest; as its best and as a snapshot too where asked.

    Of the snapshots the newest `keep` stay, all of them where it is 0.
    """
    save(out_dir / LATEST, tensors, meta)
    link_latest(out_dir, meta["progress"]["iter_num"], best, snapshot)
    if snapshot and keep:
        for old in snapshots(out_dir)[:-keep]:
            os.unlink(old)


def link_latest(out_dir: Path, iter_num: int, best: bool, snapshot: bool) -> None:
    """Name the latest state as the best, and as the snapshot of its iteration, where asked."""
    if best:
        _link(out_dir, out_dir / LATEST, out_dir / BEST)
    if snapshot:
        folder = out_dir / SNAPSHOTS
        if not folder.is_dir():
            os.mkdir(folder)
            _sync_folder(out_dir)
        _link(out_dir, out_dir / LATEST, folder / f"iter_{iter_num:06d}.safetensors")


def snapshots(out_dir: Path) -> list[Path]:
    """A run's snapshots, the oldest first."""
    return sorted((out_dir / SNAPSHOTS).glob("iter_*.safetensors"), key=_number)


def _number(snapshot: Path) -> int:
    return int(re.sub(r"\D", "", snapshot.stem) or 0)


def _link(out_dir: Path, source: Path, target: Path) -> None:
    """Give a file a second name, replacing what had it; a copy where the disk knows no links."""
    partial = out_dir / PARTIAL
    _remove(partial)
    try:
        os.link(source, partial)
    except OSError:
        _write_file(target, _read_blocks(source), partial)
    else:
        os.replace(partial, target)
        _remove(partial)  # where both were names of one file, rename did nothing
        _sync_folder(target.parent)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _read_blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def write_record(out_dir: Path, run_id: str, options: dict) -> None:
    """Write down whose folder it is: run.json."""
    text = json.dumps({"run_id": run_id, "options": options}, indent=1) + "\n"
    _write_file(out_dir / RECORD, [text.encode()], out_dir / PARTIAL)


def load_run(out_dir: Path) -> tuple[Path, dict[str, Tensor], dict]:
    """Load the latest state of a run: (path, tensors, meta).

    Where ckpt.safetensors is damaged, or another run's, the newest of the others that is neither
    takes its place, and that is said; UserError where there is none.
    """
    others = [path for path in (out_dir / BEST, *snapshots(out_dir)) if path.is_file()]
    others.sort(key=_claimed_iter_num, reverse=True)
    reasons = []
    for path in (out_dir / LATEST, *others):
        try:
            tensors, meta = load_of_run(out_dir, path)
        except UserError as error:
            reasons.append(str(error))
            continue
        if reasons:
            iter_num = meta["progress"].get("iter_num")
            print(f"{reasons[0]}; going on from {path}, iteration {iter_num}")
        return path, tensors, meta
    more = f"; nor is any of {len(others)} others" if others else ""
    raise UserError(reasons[0] + more)


def load_of_run(out_dir: Path, path: Path) -> tuple[dict[str, Tensor], dict]:
    """As load(); UserError too where run.json says that the folder is another run's."""
    tensors, meta = load(path)
    try:
        run_id = json.loads((out_dir / RECORD).read_text("utf-8"))["run_id"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        run_id = None  # a folder that only a checkpoint was copied to
    if run_id not in (None, meta["run_id"]):
        raise UserError(f"{path} is another run's: {meta['run_id']!r}, not {run_id!r}")
    return tensors, meta


def _claimed_iter_num(path: Path) -> int:
    """The iteration in a header, which has yet to be verified; -1 where there is none."""
    try:
        with safe_open(path, "numpy") as file:
            return int(json.loads(file.metadata()["folio"])["progress"]["iter_num"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError):
        return -1


def go_back(out_dir: Path, path: Path, iter_num: int) -> None:
    """Make `path`, the state at `iter_num`, the latest; what it replaces, and files from beyond,
    are moved, not lost."""
    latest = out_dir / LATEST
    beyond = [p for p in snapshots(out_dir) if _number(p) > iter_num]
    if _claimed_iter_num(out_dir / BEST) > iter_num:
        beyond.append(out_dir / BEST)
    keep_latest = path != latest and latest.exists() and not path.samefile(latest)
    if beyond or keep_latest:
        folder = bins.free_name(out_dir / f"beyond_{iter_num:06d}")
        os.mkdir(folder)
        if keep_latest:
            _link(out_dir, latest, folder / LATEST)
        for p in beyond:
            os.replace(p, folder / p.name)
        if (log := out_dir / "metrics.csv").exists():
            _write_file(folder / log.name, _read_blocks(log), out_dir / PARTIAL)
        print(f"moved what lies beyond iteration {iter_num:,} to {folder}")
    if path != latest:
        _link(out_dir, path, latest)


def match(
    params: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str, path: Path
) -> dict[str, Tensor]:
    """The tensors PREFIX* of a checkpoint, without the prefix; UserError unless they are one for
    one like `params`, which may lie on "meta"."""
    saved = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    if odd := sorted(params.keys() ^ saved.keys()):
        state = "lacks" if odd[0] in params else "has an unknown"
        raise UserError(f"{path} {state} tensor {prefix}{odd[0]}")
    for name, param in params.items():
        has, wanted = (f"{tuple(t.shape)} of {t.dtype}" for t in (saved[name], param))
        if has != wanted:
            raise UserError(f"{path}: {prefix}{name} is {has}, not {wanted}")
    return saved


@torch.no_grad()
def restore(params: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str, path: Path) -> None:
    """Copy the tensors PREFIX* of a checkpoint into `params`; UserError as match()."""
    for name, tensor in match(params, tensors, prefix, path).items():
        params[name].copy_(tensor)


def newest_run(parent: Path) -> Path:
    """The folder in `parent` whose run saved last; UserError where there is none."""
    saved = [p for p in parent.glob(f"*/{LATEST}") if p.is_file()]
    if not saved:
        raise UserError(
            f"no run in {parent}/ has saved a checkpoint yet; python train.py makes one"
        )
    return max(saved, key=lambda p: p.stat().st_mtime).parent


def find(path: str, in_folder: tuple[str, ...]) -> Path:
    """The checkpoint that `path` means: a file, or a folder that holds one of `in_folder`."""
    if not Path(path).is_dir():
        return Path(path)
    for name in in_folder:
        if (Path(path) / name).is_file():
            return Path(path) / name
    raise UserError(f"{path or '.'} is a folder without {' or '.join(in_folder)}")


# ---- as a script --------------------------------------------------------------------------------


@config.script
def main(argv: list[str]) -> int:
    action, *words = argv or [""]
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if action not in ("show", "verify") or not words:
        raise UserError(
            "write: python checkpoint.py show PATH, or python checkpoint.py verify PATH"
        )
    damaged, files = 0, [file for word in words for file in _files(Path(word))]
    for path in files:
        try:
            tensors, meta = load(path)
        except UserError as error:
            print(error)
            damaged += 1
            continue
        print(f"{path}: every byte is right")
        if action == "show":
            _show(path, tensors, meta)
    return 2 if damaged else 0


def _files(path: Path) -> list[Path]:
    """The checkpoints that are meant: the file itself, or all of a run's folder."""
    if not path.is_dir():
        return [path]
    files = [p for p in (path / LATEST, path / BEST, *snapshots(path)) if p.is_file()]
    if not files:
        raise UserError(f"{path} is a folder without checkpoints")
    return files


def _show(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    n_params = sum(t.numel() for name, t in tensors.items() if name.startswith("model."))
    print(f"  run          {meta['run_id']}: {meta['model']}, {n_params:,} parameters")
    print(f"  size         {path.stat().st_size:,} bytes, {len(tensors)} tensors")
    print(f"  tokenizer    {meta['tokenizer'].get('kind')}")
    for title in ("progress", "model_config", "run_config"):
        for name, value in meta[title].items():
            print(f"  {title:<12} {name} = {value}")


if __name__ == "__main__":
    raise SystemExit(main())
