"""Several processes that train one model, started by torchrun, with PyTorch's DDP or FSDP2.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --fsdp

Each process, a "rank", computes its share of every batch. DDP keeps the whole model on each rank
and averages the gradients; FSDP2 also shards weights, gradients and optimizer states among them.
Rank 0 alone reads the options and the checkpoint, logs and saves. Without torchrun there is one
process, which shares nothing.

All ranks must take part in a collective operation, or the others wait for the missing one until a
time-out. So what may fail on one rank alone is done in together(), after which all ranks go on or
none does.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stdout,
)
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from folio.process import EndedElsewhere, explain, is_of_torchrun
from model import GPT, LanguageModel

TIMEOUT = timedelta(minutes=30)  # for the slowest rank; rank 0 must load and save within it
LOST = {  # in the errors of gloo and NCCL: what another process did
    "timed out": f"did not answer for {TIMEOUT.seconds // 60} minutes",
    "by peer": "ended",
    "broken pipe": "ended",
    "remote process": "ended",
}
T = TypeVar("T")


# ---- the group of processes ---------------------------------------------------------------------


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started with this one. Only rank 0 prints.

    Raises OSError if another rank dies or does not answer within TIMEOUT.
    """
    if not is_of_torchrun():
        yield
        return
    if not dist.is_initialized():  # a second main() in the same process finds it
        _join()
    try:
        with nullcontext() if is_main() else redirect_stdout(open(os.devnull, "w")):
            yield
    except RuntimeError as error:
        reasons = [what for text, what in LOST.items() if text in str(error).lower()]
        if not reasons:
            raise
        if not is_main():
            raise EndedElsewhere(1) from None
        raise OSError(f"another process {reasons[0]}; the last save is intact") from None


def _join() -> None:
    local_rank, has_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if has_gpu and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # the one that "cuda" means
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # the store outlives a restart, and still has the addresses of the processes before it
    store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    group = {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, timeout=TIMEOUT, **group)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


def launch_id() -> str:
    """Identifies one start of torchrun, whose processes it may restart; empty without torchrun."""
    if not is_of_torchrun():
        return ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']}:{os.getppid()}"


def is_restart() -> bool:
    """Whether torchrun starts the processes again, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


# ---- agreement ----------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """Raise on all ranks if the block raises on any.

    The first of these ranks raises its error, the others EndedElsewhere, so it is printed once.
    Collective operations in the block must be reached by all ranks, whatever fails.
    """
    try:
        yield
        error = None
    except (Exception, SystemExit) as raised:
        error = raised
    if world_size() > 1:
        codes = torch.zeros(world_size(), dtype=torch.int64)
        codes[rank()] = 0 if error is None else explain(error)[1] + 1  # of --help it is 0
        failed = sum_over_ranks(codes).nonzero().flatten().tolist()
        if failed and failed[0] != rank():
            raise EndedElsewhere(int(codes[failed[0]]) - 1)
    if error is not None:
        raise error


@contextmanager
def on_main(context: AbstractContextManager) -> Iterator[None]:
    """Enter and leave a context on rank 0 alone; if that fails, raise on all ranks."""
    with ExitStack() as stack:
        with together():
            if is_main():
                stack.enter_context(context)
        yield


def from_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on all ranks.

    It is sent as a pickle, but only between the processes of one torchrun, which trust each other.
    """
    with together():
        result = work() if is_main() else None
    if world_size() == 1:
        return result
    shared = [result]
    dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    return shared[0]


def maximum(value: float) -> float:
    """The largest value of all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


# ---- the model ----------------------------------------------------------------------------------


def parallelize(model: LanguageModel, cfg: Any) -> nn.Module:
    """Prepare a model for training with train.py's TrainConfig, in place; return what to call.

    With activation checkpointing, every second or every block is computed again in backward instead
    of keeping its activations (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    blocks = list(model.h) if isinstance(model, GPT) else []
    again = {"none": [], "half": blocks[::2], "full": blocks}
    for block in again[cfg.activation_checkpointing]:
        block.forward = partial(_compute_again, block.forward)
    if cfg.fsdp:
        return _shard(model, blocks, cfg)
    model.to(cfg.device)
    if cfg.compile:
        model.compile(dynamic=False)  # another micro_batch_size would make the shapes symbols
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _compute_again(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """forward(*args), which backward computes a second time. Without gradients there is no
    backward, and a CUDA graph of sampling could not hold what checkpoint() asks the generator."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def _shard(model: LanguageModel, blocks: list[nn.Module], cfg: Any) -> nn.Module:
    """Shard a model with FSDP2: the matrices of a block are a unit, which is gathered in cfg.dtype;
    the rest, with the tied embedding, is another, in float32, as are the sums of gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: it takes 0.7 s

    low = getattr(torch, cfg.dtype) if cfg.dtype != "float32" else None
    policy = MixedPrecisionPolicy(low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(torch.device(cfg.device).type, (world_size(),))
    for block in blocks:
        if cfg.compile:
            block.compile(dynamic=False)
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def set_gradient_sync(module: nn.Module, sync: bool) -> None:
    """Whether the next backward averages DDP's gradients over the ranks, or only accumulates them.

    FSDP2 averages in every backward, because it would otherwise keep the gradients of all weights.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = sync


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all ranks, if it is sharded by FSDP."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without the import of that class."""
    return hasattr(tensor, "full_tensor")


def gather(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors whole, one at a time. All ranks must iterate to the end."""
    return map(whole, tensors)


@torch.no_grad()
def load(params: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Copy `source`, which rank 0 alone has, into the parameters of all ranks."""
    for name, p in params.items():
        if is_sharded(p):
            from torch.distributed.tensor import distribute_tensor  # here: it takes 0.7 s

            full = source[name] if is_main() else torch.empty(p.shape, dtype=p.dtype)
            p.copy_(distribute_tensor(full.to(p.device), p.device_mesh, p.placements))
            continue
        if is_main():
            p.copy_(source[name])
        if world_size() > 1:
            full = p.detach().contiguous()  # NCCL takes no other; Muon's momenta are views
            dist.broadcast(full, src=0)
            p.copy_(full)
