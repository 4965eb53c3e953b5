"""Checkpoints: one safetensors file each, saved durably, loaded only when every byte is right.

    header.__metadata__.folio   JSON: format, run id, configs, tokenizer, iteration, ...
    model.* and optimizer.*     the tensors
    sha256                      uint8 (32,), the last tensor: the digest of every byte before it

Any safetensors reader reads such a file. No pickle is involved, so no file can run code.

    out/<run>/ckpt.safetensors                      the latest state
    out/<run>/best.safetensors                      the state with the best validation loss
    out/<run>/snapshots/iter_000500.safetensors     kept every snapshot_interval iterations

The latter two are hard links to what was ckpt.safetensors when they were made.
"""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from config import UserError

FORMAT = 1
LATEST, BEST, SNAPSHOTS = "ckpt.safetensors", "best.safetensors", "snapshots"
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

    To a temporary file in the same folder, fsync, rename, fsync of the folder.
    """
    # widest elements first, so that every tensor lies aligned in the file
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    partial = path.with_name(path.name + ".partial")
    digest = hashlib.sha256()
    try:
        with open(partial, "wb", buffering=0) as file:
            for block in _blocks(tensors, {"format": FORMAT, **meta}):
                digest.update(block)
                _write_all(file, block)
            _write_all(file, digest.digest())
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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


def _write_all(file, block) -> None:
    block = memoryview(block)
    while block:
        block = block[file.write(block) :]


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to sync
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return a checkpoint's tensors, on the CPU, and its meta; every byte has been verified.

    The tensors are views of one buffer that holds the file. Raises UserError for whatever is not
    a whole and unchanged checkpoint; no more is allocated than the file is long.
    """
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
            raise ValueError(f"its format is {meta['format']}, not {FORMAT}")
        for key, kind in META.items():
            if type(meta[key]) is not kind:
                raise ValueError(f"{key!r} in its header is no {kind.__name__}")
        return {name: _view(data[start:], about) for name, about in header.items()}, meta
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
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


def save_run(
    out_dir: Path, tensors: dict[str, Tensor], meta: dict, best: bool, snapshot: str, keep: int
) -> None:
    """Save the state of a run as its latest; as its best and as a named snapshot too where asked.

    Of the snapshots the newest `keep` stay, all of them where it is 0.
    """
    latest = out_dir / LATEST
    save(latest, tensors, meta)
    if best:
        _link(latest, out_dir / BEST)
    if snapshot:
        folder = out_dir / SNAPSHOTS
        folder.mkdir(exist_ok=True)
        _link(latest, folder / f"{snapshot}.safetensors")
        kept = sorted(folder.glob("iter_*.safetensors"), key=lambda p: (len(p.name), p.name))
        for old in kept[: -keep if keep else 0]:
            old.unlink()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, replacing what had it; a copy where the disk knows no links."""
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
    _sync_folder(target.parent)


@torch.no_grad()
def restore(params: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str, path: Path) -> None:
    """Copy the tensors PREFIX* of a checkpoint into `params`, which they must match one to one."""
    saved = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    if odd := sorted(params.keys() ^ saved.keys()):
        state = "lacks" if odd[0] in params else "has an unknown"
        raise UserError(f"{path} {state} tensor {prefix}{odd[0]}")
    for name, param in params.items():
        if param.shape != saved[name].shape:
            raise UserError(
                f"{path}: {prefix}{name} has shape {tuple(saved[name].shape)}, "
                f"not {tuple(param.shape)}"
            )
        param.copy_(saved[name])


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
    raise UserError(f"{path} is a folder without {' or '.join(in_folder)}")
