"""A checkpoint is one safetensors file, saved atomically and verified when it is loaded.

    header.__metadata__.folio   JSON: format, run id, configs, tokenizer, progress, ... (META)
    model.*, optimizer.*        the tensors
    sha256                      uint8 (32,), the last tensor: the digest of all bytes before it

Any safetensors reader can read the file, and loading it cannot run code. We write and read it
ourselves because the library supports neither a digest inside the file nor fsync. All writing goes
through os.open, write, fsync, replace and unlink, so that tests can make each call fail.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data import tokenizer
from data.errors import UserError
from data.tokenizer import Tokenizer
from folio.options import build_options
from model import GPT, MODELS, GPTConfig, LanguageModel

FORMAT = 1
TEMPORARY = ".folio.partial"  # the file being written; the next save replaces a leftover
META = {  # the JSON in the header, besides "format"
    "run_id": str,
    "model": str,  # gpt or bigram
    "model_config": dict,  # the fields of GPTConfig
    "run_config": dict,  # the other options of train.py, with every "auto" resolved
    "tokenizer": dict,  # what tokenizer.load() takes
    "dataset": str,  # the fingerprint of its tokens
    "teacher": str,  # that of --teacher's weights; empty: none, or an earlier version of Folio
    "progress": dict,  # folio/run.py's Progress: iteration, windows read, losses, seconds
    "scaler": dict,  # the state of float16's gradient scaler
    "threads": int,  # of torch on the CPU
}
SYNC_BYTES = 1 << 26  # bytes between two fsyncs
HASH_LAG_BYTES = 2 * SYNC_BYTES  # how far hashing may lag behind writing
O_BINARY = getattr(os, "O_BINARY", 0)  # no newline translation on Windows
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems cannot sync a folder
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Checkpoint:
    """The contents of a checkpoint file, or of an imported model."""

    path: Path
    tensors: dict[str, Tensor]  # model.* and optimizer.*, on the CPU
    meta: dict  # as in META; an imported model has no "dataset", "scaler" and "threads"


# ---- saving -------------------------------------------------------------------------------------


def save(
    path: Path, tensors: dict[str, Tensor], meta: dict, values: Iterable[Tensor] | None = None
) -> None:
    """Save a checkpoint atomically: `path` is always the complete old or the complete new file.

    Once this returns, the new one survives a power loss. An OSError names the file. `values`, in
    file order, replaces the tensors' data, if these are only shards.
    """
    tensors = in_file_order(tensors)
    header = _header(tensors, {"format": FORMAT, **meta})
    blocks = itertools.chain([header], map(bytes_of, values or tensors.values()))
    write_file(path, _append_digest(blocks), path.with_name(TEMPORARY))


def in_file_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors sorted by element size, largest first, so that each is aligned in the file."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def write_file(path: Path, blocks: Iterable[memoryview | bytes], temporary: Path) -> None:
    """Replace `path` atomically: write the blocks to `temporary`, sync it, rename it."""
    with suppress(FileNotFoundError):
        os.unlink(temporary)  # not overwritten: it may be a hard link to a good file
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_BINARY, 0o666)
        try:
            n_unsynced = 0
            for block in blocks:
                block = memoryview(block)
                while block:
                    n_written = os.write(file, block[:SYNC_BYTES])
                    block, n_unsynced = block[n_written:], n_unsynced + n_written
                    if n_unsynced >= SYNC_BYTES:  # the disk writes while the next bytes are hashed
                        os.fsync(file)
                        n_unsynced = 0
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power loss."""
    if os.name == "nt":  # not possible on Windows
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in NO_FOLDER_SYNC:
            return
        error.filename = str(folder)
        raise
    finally:
        os.close(fd)


def _append_digest(blocks: Iterable[memoryview | bytes]) -> Iterator[memoryview | bytes]:
    """Yield the blocks, then their SHA-256, which a thread computes while the caller writes."""
    digest, pending, n_pending = hashlib.sha256(), deque(), 0
    with ThreadPoolExecutor(1) as pool:
        for block in blocks:
            pending.append((pool.submit(digest.update, block), len(block)))
            n_pending += len(block)
            yield block
            while n_pending > HASH_LAG_BYTES:
                hashed, size = pending.popleft()
                hashed.result()
                n_pending -= size
        for hashed, _ in pending:
            hashed.result()
    yield digest.digest()


def _header(tensors: dict[str, Tensor], meta: dict) -> bytes:
    """The start of the file: the header's length and the header."""
    header, end = {"__metadata__": {"folio": json.dumps(meta)}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header["sha256"] = {**DIGEST, "data_offsets": [end, end + 32]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The data of a tensor, copied only if it is on a device or not contiguous."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


# ---- loading ------------------------------------------------------------------------------------


def load(path: Path) -> Checkpoint:
    """Load a checkpoint and verify all of its bytes.

    The tensors are views of one buffer that holds the file. Raises UserError for anything but an
    intact checkpoint. Memory is bounded by the size of the file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot open checkpoint {path}: not a regular file")
    try:
        data = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with open(path, "rb") as file:
            n_read = file.readinto(memoryview(data.numpy()))
    except OSError as error:  # a bad sector too: another checkpoint may be intact
        raise UserError(f"cannot open checkpoint {path}: {error.strerror}") from None
    try:
        if n_read != len(data):
            raise ValueError("the file shrank while it was read")
        header, start = _parse_header(data)
        if hashlib.sha256(data[:-32].numpy()).digest() != data[-32:].numpy().tobytes():
            raise ValueError("its digest does not match: the file is damaged")
        meta = json.loads(header.pop("__metadata__")["folio"])
        if meta["format"] != FORMAT:
            raise ValueError(f"its format is {meta['format']!r:.20}, not {FORMAT}")
        meta.setdefault("teacher", "")
        for key, kind in META.items():
            if type(meta[key]) is not kind:
                raise ValueError(f"{key!r} in its header is not a {kind.__name__}")
        tensors = {name: _view(data[start:], entry) for name, entry in header.items()}
        return Checkpoint(path, tensors, meta)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error)
        if type(error) is not ValueError:
            reason = f"its header is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{path} is not a usable checkpoint: {reason}") from None


def read_header(path: Path) -> dict:
    """A file's meta, unverified and without reading the rest; {} if there is none."""
    try:
        with safe_open(path, "numpy") as file:
            meta = json.loads(file.metadata()["folio"])
        return meta if type(meta) is dict else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError):
        return {}


def _parse_header(data: Tensor) -> tuple[dict, int]:
    """Return the header, checked for consistency, and the offset of the first tensor."""
    if len(data) < 8 + 2 + 32:
        raise ValueError(f"it has only {len(data)} bytes")
    length = struct.unpack("<Q", data[:8].numpy().tobytes())[0]
    if length > len(data) - 8 - 32:
        raise ValueError("the file is truncated, or not in safetensors format")
    header = json.loads(data[8 : 8 + length].numpy().tobytes())
    offset = 0
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if start != offset or end != start + size or min(entry["shape"], default=0) < 0:
                raise ValueError(f"the header entry of tensor {name!r} is invalid")
            offset = end
    if 8 + length + offset != len(data):
        raise ValueError("the file is truncated, or longer than its header says")
    if header.pop("sha256", None) != {**DIGEST, "data_offsets": [offset - 32, offset]}:
        raise ValueError("it has no digest: not written by Folio")
    return header, 8 + length


def _view(data: Tensor, entry: dict) -> Tensor:
    start, end = entry["data_offsets"]
    return data[start:end].view(DTYPES[entry["dtype"]]).view(entry["shape"])


# ---- from tensors to a model --------------------------------------------------------------------


def match(ckpt: Checkpoint, prefix: str, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors PREFIX* of a checkpoint, without the prefix; they must match `params`.

    Raises UserError for a name, shape or dtype that differs. `params` may be on "meta".
    """
    saved = {n.removeprefix(prefix): t for n, t in ckpt.tensors.items() if n.startswith(prefix)}
    if mismatched := sorted(params.keys() ^ saved.keys()):
        problem = "lacks" if mismatched[0] in params else "has an unknown"
        raise UserError(f"{ckpt.path} {problem} tensor {prefix}{mismatched[0]}")
    for name, param in params.items():
        found, wanted = (f"{tuple(t.shape)} of {t.dtype}" for t in (saved[name], param))
        if found != wanted:
            raise UserError(f"{ckpt.path}: {prefix}{name} is {found}, not {wanted}")
    return saved


@torch.no_grad()
def restore(ckpt: Checkpoint, prefix: str, params: dict[str, Tensor]) -> None:
    """Copy the tensors PREFIX* of a checkpoint into `params`; raises UserError as match() does."""
    for name, tensor in match(ckpt, prefix, params).items():
        params[name].copy_(tensor)


def check_model(ckpt: Checkpoint) -> LanguageModel:
    """Return the checkpoint's model on "meta"; raises UserError if its tensors do not fit it.

    Nothing of the size that its config claims is allocated.
    """
    config = build_options(GPTConfig, ckpt.meta["model_config"], source=str(ckpt.path))
    if ckpt.meta["model"] not in MODELS:
        known = ", ".join(MODELS)
        raise UserError(f"{ckpt.path} has a model {ckpt.meta['model']!r}; the kinds are {known}")
    model = empty_model(ckpt.meta["model"], config)
    match(ckpt, "model.", dict(model.named_parameters()))
    return model


def build_model(ckpt: Checkpoint) -> LanguageModel:
    """The checkpoint's model in evaluation mode. Its parameters are the tensors, not copies."""
    model = check_model(ckpt)
    weights = match(ckpt, "model.", dict(model.named_parameters()))
    model.load_state_dict(weights, strict=False, assign=True)
    if isinstance(model, GPT):
        model.lm_head.weight = model.wte.weight
    return model.eval()


def load_tokenizer(ckpt: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer; raises UserError if it has more ids than the model."""
    tok = tokenizer.load(ckpt.meta["tokenizer"])
    vocab_size = check_model(ckpt).config.vocab_size
    if tok.vocab_size > vocab_size:
        raise UserError(
            f"{ckpt.path}: the tokenizer has {tok.vocab_size} ids, but the model has {vocab_size}"
        )
    return tok


def is_torch_file(path: Path) -> bool:
    """Whether a file starts as those of torch.save() do: as a zip archive or a pickle."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\3\4", b"\x80\2"))


def empty_model(kind: str, config: GPTConfig, device: str = "meta") -> LanguageModel:
    """A model without initial weights; on "meta" it has shapes, but no memory."""
    with torch.device(device), _NoInit():
        return MODELS[kind](config)


class _NoInit(TorchFunctionMode):
    """Skips random initialization. On "meta" it would also import torch's compiler."""

    SKIPPED = (Tensor.normal_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def fit_model(ckpt: Checkpoint, config: GPTConfig) -> Checkpoint:
    """The checkpoint with positions cropped to block_size and the vocabulary padded to vocab_size.

    New ids get the mean embedding, and so logits far below the likely ones (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models").
    """
    if ckpt.meta["model"] != "gpt":
        return ckpt
    tensors, wte = dict(ckpt.tensors), ckpt.tensors["model.wte.weight"]
    if (n_new := config.vocab_size - len(wte)) > 0:
        new = wte.mean(0, keepdim=True).expand(n_new, -1)
        tensors["model.wte.weight"] = torch.cat((wte, new))
    if (wpe := tensors.get("model.wpe.weight")) is not None:
        tensors["model.wpe.weight"] = wpe[: config.block_size]
    return Checkpoint(ckpt.path, tensors, ckpt.meta)
