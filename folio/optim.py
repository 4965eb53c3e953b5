"""The optimizers, AdamW and Muon, the learning rate's schedule, and the watch for divergence.

Muon is momentum, made orthogonal, for the weight matrices of the blocks:

    gradient (m, n) -> momentum = U S V^T -> five Newton-Schulz iterations -> about U V^T -> weights

An update is about equally large in every direction that the gradient has. AdamW looks at one
element at a time, so that the few largest directions rule (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/).
"""

import math

import torch
from torch import Tensor

from model import LanguageModel

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # x -> a x + b x^3 + c x^5 maps 0.01..1 to 0.7..1.2
NEWTON_SCHULZ_ITERS = 5


def get_lr(
    iter_num: int,
    schedule: str,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    lr_decay_iters: int,
) -> float:
    """The learning rate of update `iter_num`: linear warm-up, then down to min_lr as scheduled."""
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    decay_iters = lr_decay_iters - warmup_iters
    done = min(1.0, (iter_num - warmup_iters) / decay_iters) if decay_iters > 0 else 1.0
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_lr + left * (learning_rate - min_lr)


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
    """Fused AdamW for all parameters, or for all but the blocks' matrices, which Muon takes.

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
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(beta1, beta2),
        fused=True,
    )
    for p in params.values():  # as the first step would, so that it can be saved or restored now
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    if not matrices:
        return [adamw]
    # c_attn is split into values, keys, and queries, the latter in pieces as tall as the keys
    c = model.config
    n_pieces = [
        c.n_head // (c.n_kv_head or c.n_head) + 2 if name.endswith("c_attn.weight") else 1
        for name in matrices
    ]
    muon = Muon(list(matrices.values()), n_pieces, muon_lr, beta1, weight_decay, muon_dtype)
    return [adamw, muon]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with matrices of one shape, or its transpose, iterated on together.

    `n_pieces` says into how many matrices each parameter is split along its rows: 3 if it makes
    queries, keys and values at once. Each piece is orthogonalized on its own, in products of
    `dtype`. A piece must not be taller than wide unless it is the only one. As with fused AdamW, a
    step changes nothing where the tensor `found_inf` is 1.
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
            # without this, the more rows than columns, the less would each change
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
            updates = iter(updates * (-lr * scales))
            for p, n in members:
                p.mul_(1 - lr * group["weight_decay"])
                for piece in _wide_pieces(p, n):
                    piece.add_(next(updates))


def _wide_pieces(matrix: Tensor, n: int) -> list[Tensor]:
    """Its n pieces, transposed if they are taller than wide."""
    return [m if m.shape[0] <= m.shape[1] else m.t() for m in matrix.chunk(n)]


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x (N, m, n), m <= n, with the singular values of each matrix brought near 1, in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_ITERS):
        gram = x @ x.mT  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class DivergenceWatch:
    """Remembers, on the device, the first update whose loss or gradient was not finite.

    From then on every update is to be skipped, which needs no look by the host. `ignore_norm`: a
    gradient that overflows float16 is no divergence; its update alone is skipped.
    """

    def __init__(self, device: str, ignore_norm: bool):
        self._first = torch.zeros(5, device=device)  # diverged?, iter_num, loss, norm, lr
        self._ignore_norm = ignore_norm

    def observe(self, iter_num: int, loss: Tensor, norm: Tensor, lr: float) -> Tensor:
        """Look at an update; return 1.0 if it is to be skipped, else 0.0."""
        bad = ~loss.isfinite() if self._ignore_norm else ~(loss + norm).isfinite()
        iter_num, lr = torch.full_like(loss, iter_num), torch.full_like(loss, lr)
        latest = torch.stack([bad, iter_num, loss, norm, lr])
        self._first.copy_(torch.where(self._first[0] > 0, self._first, latest))
        return torch.maximum(self._first[0], (~norm.isfinite()).float())

    def first(self) -> tuple[bool, int, float, float, float]:
        """Has it diverged? And the iter_num, loss, gradient norm and lr of the first such update,
        else of the last one. Waits for the device."""
        diverged, iter_num, loss, norm, lr = self._first.tolist()
        return diverged > 0, int(iter_num), loss, norm, lr

    def skip_all(self, skip: bool) -> None:
        """Have all following updates skipped, or forget what was seen."""
        self._first.zero_()
        self._first[0] = float(skip)
