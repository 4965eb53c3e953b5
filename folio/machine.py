"""The machine: its device, what "auto" means on it, memory estimates, and torch's settings."""

import ctypes
import importlib.util
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from folio import __version__, distributed
from folio.fast import MATMUL_ATTENTION_BLOCK, cpu_has_bfloat16
from model import GPT, GPTConfig, LanguageModel

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
COMPILE_PAYS = 180.0  # seconds of training from which on compiling saves more than it takes
FLOAT32_SHARE = 1 / 15  # float32 over half-precision peak FLOP/s, from the H100's data sheet
EAGER_SHARE = 0.3  # of a GPU's peak that GPT-2 (124M) reaches without compiling
REUSED_BYTES = 2**25  # malloc reuses freed buffers below this; the largest M_MMAP_THRESHOLD
CGROUP_LIMITS = (  # a container's memory limit, in cgroup versions 2 and 1
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
PEAK_FLOPS = {  # dense, in half precision, from the vendors' data sheets; the first match wins
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


def find_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first of cuda, mps and cpu that exists.

    Raises UserError if it does not exist.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    names = [kind for kind, exists in found.items() if exists]
    if name == "auto":
        name = names[0]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"no device {name!r}; this machine has {', '.join(names)}") from None
    if not found.get(device.type):
        raise UserError(
            f"no device {name!r}; this machine has {', '.join(names)}: use --device={names[0]}"
        )
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"no device {name!r}; this machine has {count} of type {device.type}")
    return torch.device("cpu") if device.type == "cpu" else device  # also for "cpu:0"


def fast_dtype(device: torch.device) -> str:
    """The dtype in which the device multiplies large matrices fastest."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (7, 0):  # no tensor cores
            return "float32"
        return "bfloat16" if capability >= (8, 0) else "float16"
    return "bfloat16" if device.type == "cpu" and cpu_has_bfloat16() else "float32"


def resolve_machine(device: str, dtype: str, compile: bool | str) -> tuple[str, str, bool | str]:
    """Replace each "auto" with the fastest choice; raises UserError for an impossible one.

    Compiling needs Triton, which Windows and old GPUs lack. Where Triton works, compile="auto" is
    left for compiles() to decide.
    """
    found = find_device(device)
    if dtype == "auto":
        dtype = fast_dtype(found)
    if dtype == "float16" and found.type != "cuda":
        raise UserError(f"dtype=float16 needs CUDA; use float32 or bfloat16 on {found.type}")
    if compile == "auto":
        possible = found.type == "cuda" and importlib.util.find_spec("triton") is not None
        possible = possible and torch.cuda.get_device_capability(found) >= (7, 0)
        compile = "auto" if possible else False
    return str(found), dtype, compile


def setup_torch(device: str, dtype: str, deterministic: bool, threads: int | None = None) -> None:
    """Set torch's global options for a run; `threads` is the number that a resumed run used."""
    if device == "cpu":
        reuse_freed_memory()
        if threads and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, min(threads, 1024)))
    torch.backends.cuda.matmul.allow_tf32 = dtype != "float32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    use_deterministic_algorithms(deterministic)


def use_deterministic_algorithms(mode: bool) -> None:
    """torch.use_deterministic_algorithms(), which takes most of a second at its first call."""
    if torch.are_deterministic_algorithms_enabled() != mode:
        torch.use_deterministic_algorithms(mode)


def reuse_freed_memory() -> None:
    """Let glibc reuse freed buffers of less than REUSED_BYTES.

    By default it returns every large buffer to the kernel, which must zero the pages of the next
    one. Reusing even larger ones would waste memory: a few bytes allocated inside a freed buffer
    would make it useless for another one of its size.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, REUSED_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def auto_micro_batch_size(model: LanguageModel, cfg: Any) -> int:
    """The micro-batch size of a run whose options, train.py's TrainConfig, leave it open.

    It divides this process's share of the batch. On a CPU a layer's activations fit REUSED_BYTES;
    on a GPU everything should fit the memory that is free.
    """
    share = cfg.batch_size // distributed.world_size()
    if cfg.device == "cpu":
        elements = max(4 * cfg.n_embd, attention_elements(cfg, cfg.device, cfg.dtype))
        bytes_per_sequence = cfg.block_size * elements * (4 if cfg.dtype == "float32" else 2)
        while share % 2 == 0 and share * bytes_per_sequence >= REUSED_BYTES:
            share //= 2
        return share
    available = available_memory(torch.device(cfg.device)) or math.inf
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    fitting = (
        n for n in sizes if memory_needed(model, replace(cfg, micro_batch_size=n)) < available
    )
    return next(fitting, 1)


def compiles(model: LanguageModel, cfg: Any) -> bool:
    """Whether to compile the model of a run with train.py's TrainConfig. "auto" does if training
    would take more than COMPILE_PAYS without."""
    if cfg.compile != "auto":
        return cfg.compile
    if cfg.minutes:
        return 60 * cfg.minutes > COMPILE_PAYS
    flops = cfg.max_iters * cfg.batch_size * cfg.block_size * model.flops_per_token()
    speed = EAGER_SHARE * (peak_flops(cfg.device) or min(PEAK_FLOPS.values()))
    if cfg.dtype == "float32":
        speed *= FLOAT32_SHARE
    return cfg.max_iters == 0 or flops / speed / distributed.world_size() > COMPILE_PAYS


def uses_cuda_graphs(model: LanguageModel, cfg: Any) -> bool:
    """Whether a run with train.py's TrainConfig launches its updates as CUDA graphs.

    A graph keeps its activations, so the run must leave most of the GPU's free memory to others. It
    cannot hold what asks for values on the host: the loss scale and activation checkpointing.
    """
    if not cfg.device.startswith("cuda") or cfg.dtype == "float16":
        return False
    plain = distributed.world_size() == 1 and cfg.activation_checkpointing == "none"
    return plain and memory_needed(model, cfg) < available_memory(torch.device(cfg.device)) / 4


def attention_elements(config: GPTConfig, device: str, dtype: str) -> int:
    """Attention weights per token that a layer saves for backward."""
    materialized = device == "cpu" and dtype == "bfloat16"
    materialized = materialized and config.block_size <= MATMUL_ATTENTION_BLOCK
    return config.n_head * config.block_size if materialized else 0


def memory_needed(model: LanguageModel, cfg: Any) -> int:
    """Rough number of bytes for a process of a run with train.py's TrainConfig."""
    return sum(memory_parts(model, cfg).values())


def memory_parts(model: LanguageModel, cfg: Any) -> dict[str, int]:
    """memory_needed() by kind. To evaluate, there are only weights, and logits as activations.

    docs/scale.md explains the formula.
    """
    c, elements, n_params = model.config, model.activations_per_token(), model.n_params()
    if cfg.eval_only:
        elements = c.vocab_size
    elif isinstance(model, GPT):
        in_block = (elements - c.vocab_size) // c.n_layer
        if cfg.dtype != "float32":  # residuals and norms are in float32 all the same
            in_block += 4 * c.n_embd
        in_block += 2 * attention_elements(c, cfg.device, cfg.dtype)
        again = {"none": 0, "half": c.n_layer // 2, "full": c.n_layer - 1}
        n_again = again[cfg.activation_checkpointing]  # blocks that save only their input
        elements = c.vocab_size + in_block * (c.n_layer - n_again) + 2 * c.n_embd * n_again
    n_tokens = cfg.micro_batch_size * c.block_size
    parts = {"weights": 4 * n_params}
    if not cfg.eval_only:
        by_muon = 0  # matrices of blocks, which have one moment instead of AdamW's two
        if cfg.optimizer == "muon" and isinstance(model, GPT):
            by_muon = sum(p.numel() for p in model.h.parameters() if p.dim() == 2)
        parts |= {"gradients": 4 * n_params, "optimizer": 8 * n_params - 4 * by_muon}
    if cfg.fsdp:
        parts = {name: n_bytes // distributed.world_size() for name, n_bytes in parts.items()}
        # what is gathered at a time: the embeddings, and about two blocks
        block = sum(p.numel() for p in model.h[0].parameters()) if isinstance(model, GPT) else 0
        parts["gathered"] = 8 * (n_params - block * c.n_layer + block)
    parts["activations"] = n_tokens * elements * (4 if cfg.dtype == "float32" else 2)
    return parts


def print_size(model: LanguageModel, cfg: Any) -> None:
    """Print a table of the parameters, and the memory that a run is expected to need."""
    rows = {}  # the name in the table -> shape, elements, how often
    for name, p in model.named_parameters():
        name = re.sub(r"^h\.\d+\.", "h.*.", name)
        count = rows[name][2] if name in rows else 0
        rows[name] = " x ".join(map(str, p.shape)), p.numel(), count + 1
    print(f"{'parameter':<24}{'shape':>16}{'elements':>14}{'times':>7}{'in all':>17}")
    for name, (shape, elements, count) in rows.items():
        print(f"{name:<24}{shape:>16} {elements:>13,}{count:>7} {elements * count:>16,}")
    print(f"{'':<61}{model.n_params():>17,}\n")
    parts = memory_parts(model, cfg)
    size = f"micro-batches of {cfg.micro_batch_size} x {cfg.block_size} tokens"
    print(f"memory (estimated, {size}), in MiB")
    for name, n_bytes in {**parts, "": sum(parts.values())}.items():
        print(f"  {name:<22}{n_bytes / 2**20:>16,.1f}")
    print(flush=True)


def available_memory(device: torch.device) -> int | None:
    """Bytes on a GPU that no tensor holds, else the memory of this machine or container; None if
    unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    sizes = []
    if hasattr(os, "sysconf"):  # not on Windows
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(Path(limit).read_text()))
    return min(sizes, default=None)


def check_memory(model: LanguageModel, cfg: Any) -> None:
    """Raise UserError if a run with train.py's TrainConfig clearly does not fit in memory."""
    available = available_memory(torch.device(cfg.device)) or math.inf
    if cfg.device == "cpu":
        available /= distributed.local_world_size()
    needed = memory_needed(model, cfg)
    if needed > available:
        what = "evaluation" if cfg.eval_only else "training"
        fits = (less for less in less_memory(cfg) if memory_needed(model, less) < available)
        advice = _options(cfg, next(fits, cfg)) or (
            f"a smaller block_size, or a model of less than {available / 16:,.0f} parameters"
        )
        raise UserError(
            f"{what} needs about {needed / 2**30:,.1f} GiB and {cfg.device} has "
            f"{available / 2**30:,.1f} for it: use {advice}"
        )


def less_memory(cfg: Any) -> Iterator[Any]:
    """Options that need less memory and train the same, except for the masks of dropout; those that
    need most first."""
    share, size = cfg.batch_size // distributed.world_size(), cfg.micro_batch_size
    for n in range(size // 2, 0, -1):
        if share % n == 0:
            yield replace(cfg, micro_batch_size=n)
    if cfg.model == "gpt" and not cfg.eval_only:
        levels = ("none", "half", "full")
        for again in levels[levels.index(cfg.activation_checkpointing) + 1 :]:
            yield replace(cfg, micro_batch_size=1, activation_checkpointing=again)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device is out of memory; on MPS torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def out_of_memory(cfg: Any) -> UserError:
    """The error for a device that is out of memory, although the estimate fitted."""
    advice = _options(cfg, next(less_memory(cfg), cfg)) or "a smaller block_size or n_layer"
    return UserError(f"{cfg.device} is out of memory: use {advice}")


def _options(old: Any, new: Any) -> str:
    """How `new`, a TrainConfig, differs from `old`, as arguments."""
    changed = {k: v for k, v in asdict(new).items() if v != getattr(old, k)}
    return " ".join(f"--{name}={value}" for name, value in changed.items())


def peak_memory(device: str) -> int | None:
    """The peak of bytes: on a GPU of its tensors, else of the whole process; None if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_flops(device: str) -> float | None:
    """A GPU's peak FLOP/s in half precision; None if unknown."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    matches = (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name))
    return next(matches, None)


def about(device: str) -> dict[str, Any]:
    """When, with which software and on which machine a run was started, for run.json."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux
        cpuinfo = Path("/proc/cpuinfo").read_text()
        processor = next(iter(re.findall(r"model name\s*: (.*)", cpuinfo)), processor)
    hardware = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device.startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name(device)
    if memory := available_memory(torch.device("cpu")):
        hardware["memory"] = f"{memory / 2**30:.0f} GiB"
    software = {
        "folio": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"started": started, "machine": hardware, "software": software}


def _commit() -> str:
    """The git commit of this code, with "-dirty" if it was changed since; empty if unknown."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
