"""AdamW and Muon, the learning rate schedule, and the detection of divergence.

Muon orthogonalizes the momentum of each weight matrix in the blocks:

    gradient (m, n) -> momentum = U S V^T -> five Newton-Schulz iterations -> about U V^T -> weights

So the update is about equally large in every singular direction of the momentum. AdamW scales each
element on its own, and a few directions dominate (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/).
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from folio.fast import Number
from model import LanguageModel

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # a, b, c of x -> a x + b x^3 + c x^5
NEWTON_SCHULZ_ITERS = 5  # which map 0.01..1 to about 0.7..1.2


def get_lr(cfg: Any, iter_num: int) -> float:
    """AdamW's learning rate in update `iter_num` of a run with train.py's TrainConfig: linear
    warm-up, then decay to min_lr."""
    if iter_num < cfg.warmup_iters:
        return cfg.learning_rate * (iter_num + 1) / (cfg.warmup_iters + 1)
    if cfg.schedule == "constant":
        return cfg.learning_rate
    decay_iters = (cfg.lr_decay_iters or cfg.max_iters) - cfg.warmup_iters
    t = min(1.0, (iter_num - cfg.warmup_iters) / decay_iters) if decay_iters > 0 else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * t)) if cfg.schedule == "cosine" else 1 - t
    return cfg.min_lr + decay * (cfg.learning_rate - cfg.min_lr)


def make_optimizers(
    model: LanguageModel,
    use_muon: bool,
    learning_rate: float,
    muon_lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    muon_dtype: torch.dtype,
) -> list[torch.optim.Optimizer]:
    """Fused AdamW for all parameters; or AdamW, then Muon for the weight matrices of the blocks.

    Matrices and embeddings decay; biases and the weights of LayerNorms and convolutions do not.
    """
    params, matrices = dict(model.named_parameters()), {}
    if use_muon:
        names = [n for n, p in params.items() if n.startswith("h.") and p.dim() == 2]
        matrices = {name: params.pop(name) for name in names}
    groups = [
        {"params": [p for p in params.values() if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in params.values() if p.dim() != 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(beta1, beta2),
        fused=True,
        capturable=next(iter(params.values())).device.type == "cuda",  # by a CUDA graph
    )
    for p in params.values():  # created now, not in the first step, so that it can be restored
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    if not matrices:
        return [adamw]
    # c_attn is split into queries, keys and values, and queries into pieces as tall as the keys
    c = model.config
    n_pieces = [
        c.n_head // (c.n_kv_head or c.n_head) + 2 if name.endswith("c_attn.weight") else 1
        for name in matrices
    ]
    muon = Muon(list(matrices.values()), n_pieces, muon_lr, beta1, weight_decay, muon_dtype)
    return [adamw, muon]


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that is never compiled. torch wraps these methods for torch.compile, and the
    wrappers import torch._dynamo, which takes most of a second."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """Fused AdamW. step() does nothing if the tensor `found_inf` is 1.

    torch's kernel for MPS did not look at it before pytorch/pytorch#186360, so there the host does.
    """

    found_inf: Tensor | None = None
    _step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def step(self) -> None:
        on_mps = self.found_inf is not None and self.found_inf.device.type == "mps"
        if not on_mps or not self.found_inf:
            self._step()


class Muon(EagerOptimizer):
    """torch.optim.Muon, with matrices of the same shape (or its transpose) processed as one batch.

    `n_pieces` is the number of row blocks of each parameter: 3 if it computes queries, keys and
    values at once. Each block is orthogonalized on its own, in `dtype`. A block must not be taller
    than wide unless it is the only one. As with fused AdamW, step() does nothing where the tensor
    `found_inf` is 1.
    """

    def __init__(
        self,
        params: list[Tensor],
        n_pieces: list[int],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf, self._dtype = None, dtype
        by_shape = {}
        for p, n in zip(params, n_pieces, strict=True):
            assert n == 1 or p.shape[0] <= n * p.shape[1]
            by_shape.setdefault(_wide_pieces(p, n)[0].shape, []).append((p, n))
        # for each shape (m, n): parameters and their piece counts; momenta (N, m, n) and scales
        # (N, 1, 1) of all N pieces
        self._stacks = []
        for shape, members in by_shape.items():
            counts = [n for _, n in members]
            momenta = members[0][0].new_zeros(sum(counts), *shape)
            for (p, _), part in zip(members, momenta.split(counts), strict=True):
                part = part.flatten(0, 1)  # a view, so that a restored state is in the stack
                self.state[p]["momentum_buffer"] = part if part.shape == p.shape else part.t()
            # tall matrices are scaled up, or their updates would be smaller
            scales = [
                max(1, p.shape[0] / n / p.shape[1]) ** 0.5 for p, n in members for _ in range(n)
            ]
            self._stacks.append((members, momenta, momenta.new_tensor(scales)[:, None, None]))

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients."""
        (group,) = self.param_groups
        for members, momenta, scales in self._stacks:
            lr = group["lr"]
            grads = torch.stack([g for p, n in members for g in _wide_pieces(p.grad, n)])
            if self.found_inf is not None:
                grads = torch.where(self.found_inf > 0, momenta, grads)
                lr = lr * (1 - self.found_inf)
            momenta.lerp_(grads, 1 - group["momentum"])
            updates = orthogonalize(grads.lerp_(momenta, group["momentum"]), self._dtype)
            pieces = [piece for p, n in members for piece in _wide_pieces(p, n)]
            torch._foreach_mul_([p for p, _ in members], 1 - lr * group["weight_decay"])
            torch._foreach_add_(pieces, list(updates * (-lr * scales)))


def _wide_pieces(matrix: Tensor, n: int) -> list[Tensor]:
    """The n row blocks of a matrix, transposed if they are taller than wide."""
    return [m if m.shape[0] <= m.shape[1] else m.t() for m in matrix.chunk(n)]


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Orthogonalize each matrix of x (N, m, n), m <= n, approximately, in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_ITERS):
        gram = x @ x.mT  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class DivergenceGuard:
    """Records, on the device, the first update whose loss or gradient was not finite.

    That update and all later ones are skipped, without the host waiting for the device. With
    `ignore_norm` a gradient that is not finite skips its own update only: float16 overflows.
    """

    def __init__(self, device: str, ignore_norm: bool):
        self._first = torch.zeros(5, device=device)  # diverged?, iter_num, loss, norm, lr
        self._ignore_norm = ignore_norm

    def check(self, iter_num: Number, loss: Tensor, norm: Tensor, lr: Number) -> Tensor:
        """Check an update; return 1.0 if it is to be skipped, else 0.0."""
        bad = ~loss.isfinite() if self._ignore_norm else ~(loss + norm).isfinite()
        iter_num, lr = torch.zeros_like(loss) + iter_num, torch.zeros_like(loss) + lr
        latest = torch.stack([bad, iter_num, loss, norm, lr])
        self._first.copy_(torch.where(self._first[0] > 0, self._first, latest))
        return torch.maximum(self._first[0], (~norm.isfinite()).float())

    def first(self) -> tuple[bool, int, float, float, float]:
        """(diverged, iter_num, loss, gradient norm, lr) of the first update that was not finite,
        or of the last one. Waits for the device."""
        diverged, iter_num, loss, norm, lr = self._first.tolist()
        return diverged > 0, int(iter_num), loss, norm, lr

    def skip_all(self, skip: bool) -> None:
        """Skip all following updates, or start anew."""
        self._first.zero_()
        self._first[0] = float(skip)
