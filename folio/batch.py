"""Batches on the device, and the mean loss over a split."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data import bins
from folio import distributed
from model import LanguageModel


def get_batch(
    split: bins.Split, starts: np.ndarray, block_size: int, device: str
) -> tuple[Tensor, Tensor]:
    """Load the windows at `starts` (B,) as idx and targets (B, T) on the device."""
    idx, targets = (torch.from_numpy(part) for part in split.batch(starts, block_size))
    if device.startswith("cuda"):  # pinned memory is copied while the host goes on
        idx, targets = (part.pin_memory().to(device, non_blocking=True) for part in (idx, targets))
    return idx.to(device), targets.to(device)


def autocast(device: str, dtype: str) -> torch.autocast:
    """The autocast context for `dtype`, which does nothing for float32."""
    enabled = dtype != "float32"
    return torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=enabled)


def seed_dropout(seed: int, first: int) -> None:
    """Seed torch's global generator by the number of a micro-batch's first window.

    So no generator's state is saved, and dropout does not depend on which process computes it, but
    on micro_batch_size.
    """
    sequence = np.random.SeedSequence((seed, first))
    torch.manual_seed(int(sequence.generate_state(1)[0]))


@torch.inference_mode()
def split_loss(
    model: LanguageModel,
    split: bins.Split,
    max_tokens: int,
    batch_size: int,
    device: str,
    dtype: str,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss over a split in nats per token; over max_tokens of it if it is larger.

    Deterministic: always the same windows, weighted by tokens; several processes share the batches
    and get the same bits as one. All batches have one shape, so that nothing is compiled again.
    `check` is called before each batch and may raise.
    """
    block_size = model.config.block_size
    all_starts = bins.eval_windows(len(split.tokens), block_size, max_tokens)
    n_batches = math.ceil(len(all_starts) / batch_size)
    losses, counts = torch.zeros(2, n_batches, device=device)
    model.eval()
    try:
        for first in range(0, n_batches, distributed.world_size()):
            check()
            i = min(first + distributed.rank(), n_batches - 1)  # if none is left, the last again
            starts = all_starts[i * batch_size : (i + 1) * batch_size]
            idx, targets = get_batch(split, np.resize(starts, batch_size), block_size, device)
            targets[len(starts) :] = bins.IGNORED  # rows that only fill the last batch
            with autocast(device, dtype):
                _, loss = model(idx, targets)
            if i == first + distributed.rank():
                losses[i], counts[i] = loss, (targets != bins.IGNORED).sum()
    finally:
        model.train()
    losses, counts = (distributed.sum_over_ranks(x).cpu().double() for x in (losses, counts))
    return float((losses * counts).sum() / counts.sum())
