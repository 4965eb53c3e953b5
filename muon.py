"""Muon: momentum, made orthogonal, for the matrices of a network's layers.

    gradient (m, n) -> momentum = U S V^T -> five steps of Newton-Schulz -> about U V^T -> weights

A step is about equally long in every direction that the gradient has; AdamW, which looks at one
entry at a time, lets the few largest directions rule (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). The update is that of torch.optim.Muon, with matrices
of one shape, either way round, taken through Newton-Schulz together.
"""

import torch
from torch import Tensor

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # x -> a x + b x^3 + c x^5 brings 0.01..1 to 0.7..1.2
STEPS = 5


class Muon(torch.optim.Optimizer):
    """For matrices alone. As fused AdamW, a step does nothing where the tensor `found_inf` is 1.

    `pieces` says of how many matrices, one above the other, each parameter consists: 3 where it
    makes queries, keys and values at once. Each piece, no taller than it is wide unless it is the
    only one, is made orthogonal for itself, in products of `dtype`.
    """

    def __init__(
        self,
        params: list[Tensor],
        pieces: list[int],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf, self._dtype = None, dtype
        shapes = {}
        for p, n in zip(params, pieces, strict=True):
            assert n == 1 or p.shape[0] <= n * p.shape[1]
            shapes.setdefault(_wide(p, n)[0].shape, []).append((p, n))
        # of each shape (m, n): parameters with how many pieces, momenta (N, m, n), scales (N, 1, 1)
        self._stacks = []
        for shape, members in shapes.items():
            counts = [n for _, n in members]
            momenta = members[0][0].new_zeros(sum(counts), *shape)
            for (p, _), part in zip(members, momenta.split(counts), strict=True):
                part = part.flatten(0, 1)  # a view: what a checkpoint restores is in the stack
                self.state[p]["momentum_buffer"] = part if part.shape == p.shape else part.t()
            # rows that outnumber columns would each change less; so in torch.optim.Muon
            scales = [
                max(1, p.shape[0] / n / p.shape[1]) ** 0.5 for p, n in members for _ in range(n)
            ]
            self._stacks.append((members, momenta, momenta.new_tensor(scales)[:, None, None]))

    @torch.no_grad()
    def step(self) -> None:
        """Update the matrices from their gradients."""
        (group,) = self.param_groups
        for members, momenta, scales in self._stacks:
            params, lr = [p for p, _ in members], group["lr"]
            grads = torch.stack([g for p, n in members for g in _wide(p.grad, n)])  # (N, m, n)
            if self.found_inf is not None:
                grads = torch.where(self.found_inf > 0, momenta, grads)
                lr = lr * (1 - self.found_inf)
            momenta.lerp_(grads, 1 - group["momentum"])
            updates = orthogonalize(grads.lerp_(momenta, group["momentum"]), self._dtype)
            updates = updates * (-lr * scales)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_([m for p, n in members for m in _wide(p, n)], list(updates))


def _wide(matrix: Tensor, n: int) -> list[Tensor]:
    """Its n pieces; transposed where they are taller than wide."""
    return [m if m.shape[0] <= m.shape[1] else m.t() for m in matrix.chunk(n)]


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x (N, m, n), m <= n: each matrix with its singular values brought near 1, in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT  # (N, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
