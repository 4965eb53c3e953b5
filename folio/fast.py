"""Faster equivalents of plain operations. When you read model.py, think of the plain ones.

    Dropout(p)                      nn.Dropout(p)
    causal_attention(q, k, v)       F.scaled_dot_product_attention(q, k, v, is_causal=True)
    token_loss(x, weight, targets)  F.cross_entropy(F.linear(x, weight), targets)
    pack(model, linear)             the model as it is
    CudaGraph(function)             the function as it is

Each equals the plain form up to rounding (Dropout: the same distribution), which tests/ checks.
Dropout, causal_attention and pack are fast paths for CPUs, CudaGraph for CUDA; token_loss is for
all devices, except under torch.compile. docs/measurements.md has the measurements behind the gains
stated here.
"""

import math
import sys
from collections.abc import Callable
from functools import cache

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

Number = float | Tensor  # a number, or a tensor () of it
Linear = Callable[[Tensor], Tensor]  # (..., C_in) -> (..., C_out)
MATMUL_ATTENTION_BLOCK = 512  # longest context for which attention runs as two matrix products
PACKED_WEIGHTS = 2**17  # smallest float32 matrix that is faster in oneDNN's layout
CHUNK_LOGITS = {"cpu": 2**22, "gpu": 2**26}  # float32 logits at a time, to saturate the device
GRAD_SCALE = 2**10  # keeps a mean gradient in float16 far from overflow and from underflow


class Dropout(nn.Module):
    """Zero a fraction p of the elements in training, and scale the others by 1 / (1 - p).

    On a CPU it draws 16 random bits per element, which is 3 times faster than F.dropout.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        n_dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the 2**16 values of 16 bits
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        bits = bits.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        keep = bits >= n_dropped - 2**15
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - n_dropped))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where no token attends to a later one; all (B, n_head, T, D).

    On a CPU, in bfloat16 and up to 512 tokens, two batched matrix products are up to 1.6 times
    faster than SDPA, although they save all T * T weights of a head for backward.
    """
    if (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.shape[2] <= MATMUL_ATTENTION_BLOCK
    ):
        return matmul_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """causal_attention() as two batched matrix products."""
    B, n_head, T, D = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * n_head, T, D)
    mask = q.new_full((T, T), -math.inf).triu(1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=D**-0.5)  # (B * n_head, T, T)
    return (scores.softmax(-1) @ v).view(B, n_head, T, D)


def token_loss(
    x: Tensor, weight: Tensor, targets: Tensor, teacher_probs: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats of the logits x weight^T over the targets that are not -1.

    x (B, T, C), weight (V, C), targets (B, T). With teacher_probs (B, T, V), the mean of that and
    of the cross-entropy with these probabilities (Hinton et al. 2015, "Distilling").

    Without them and with 50,257 ids it is 2.4 times faster on a CPU than the plain form, and needs
    no float32 copy of the logits. Under torch.compile the plain form is faster, and compiles in a
    tenth of the time.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    if teacher_probs is not None:
        logits = F.linear(x, weight).float()
        taught = F.cross_entropy(logits, teacher_probs.flatten(0, 1))
        return (F.cross_entropy(logits, targets, ignore_index=-1) + taught) / 2
    if torch.compiler.is_compiling():
        return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)
    return TokenLoss.apply(x, weight, targets, torch.is_grad_enabled())


class TokenLoss(torch.autograd.Function):
    """token_loss() of N tokens, with the gradients computed in forward.

    The logits (N, V) are by far the largest tensor of a small model. They are stored once, in the
    dtype of the product, and overwritten by their own gradient, softmax(logits) minus 1 at the
    target, a few rows at a time. Only these rows exist in float32. The gradient is divided by N
    before it is summed over the tokens, because the sum could overflow float16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, needs_grad: bool) -> Tensor:
        logits = F.linear(x, weight)
        acc_dtype = torch.promote_types(logits.dtype, torch.float32)
        rows = max(1, CHUNK_LOGITS["cpu" if x.device.type == "cpu" else "gpu"] // len(weight))
        loss_sum = torch.zeros((), dtype=acc_dtype, device=x.device)
        for chunk, t in zip(logits.split(rows), targets.split(rows), strict=True):
            log_probs = chunk.log_softmax(-1, dtype=acc_dtype)
            loss_sum += F.nll_loss(log_probs, t, ignore_index=-1, reduction="sum")
            if needs_grad:
                grad = log_probs.exp_()
                grad[torch.arange(len(t), device=t.device), t.clamp(min=0)] -= 1
                grad.masked_fill_(t[:, None] < 0, 0)
                chunk.copy_(grad.mul_(GRAD_SCALE / len(x)))
        n_targets = (targets >= 0).sum()
        if needs_grad:
            dx = logits @ weight.to(logits.dtype)
            dweight = logits.t() @ x.to(logits.dtype)
            unscale = len(x) / GRAD_SCALE / n_targets.to(acc_dtype)
            ctx.save_for_backward(dx.to(x.dtype), dweight.to(weight.dtype), unscale)
        return loss_sum / n_targets

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight, unscale = ctx.saved_tensors
        return dx * (grad * unscale), dweight * (grad * unscale), None, None


class CudaGraph:
    """A function whose kernels are launched all at once, instead of one by one.

    The first call runs the function, so that it can allocate what it keeps, such as gradients. The
    second records the kernels, and each further call repeats these alone, with new arguments of the
    same shapes. Numbers become tensors, so that they can change too; the first argument is one. If
    a recording fails, this and all other functions go on without.
    """

    can_record = True

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self._function, self._args, self._graph, self._results = function, [], None, ()

    def __call__(self, *args: Tensor | Number) -> tuple[Tensor, ...]:
        device = args[0].device
        if not self._args:
            self._args = [torch.as_tensor(arg, device=device).clone() for arg in args]
            return self._function(*self._args)
        for mine, arg in zip(self._args, args, strict=True):
            if isinstance(arg, Tensor):
                mine.copy_(arg)
            else:
                mine.fill_(arg)  # without waiting for the device
        if self._graph is None and CudaGraph.can_record:
            self._record(device)
        if self._graph is None:
            return self._function(*self._args)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)

    def _record(self, device: torch.device) -> None:
        try:
            graph, stream = torch.cuda.CUDAGraph(), _recording_stream(device)
            here = torch.cuda.stream(torch.cuda.current_stream(device))  # to return to if it fails
            with torch.cuda.device(device), here, torch.cuda.graph(graph, stream=stream):
                self._results = self._function(*self._args)
        except RuntimeError as error:
            CudaGraph.can_record = False
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"slower, as CUDA graphs cannot be used: {reason}", file=sys.stderr)
        else:
            self._graph = graph
            self._function = None  # with all that it holds


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which to capture on this GPU; torch's default one belongs to the first GPU."""
    return torch.cuda.Stream(device)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16, and ONEDNN_MAX_CPU_ISA lets oneDNN use it."""
    has = torch.cpu.get_capabilities().get("avx512_bf16") and torch.backends.mkldnn.is_available()
    return bool(has and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: nn.Module, linear: Callable[[Tensor, Tensor | None], Linear]) -> None:
    """Replace a model's submodules with plain functions, in place, for inference on a CPU.

    With small batches, calling modules takes a quarter of a small model's time. A linear layer
    becomes linear(weight, bias), which is packed_linear() or half_linear(). Afterwards only the
    embeddings are registered parameters.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Embedding):
            continue
        if isinstance(child, nn.ModuleList):
            for block in child:
                pack(block, linear)
            function = [block.forward for block in child]
        elif isinstance(child, nn.Linear):
            function = linear(child.weight.detach(), child.bias)
        elif isinstance(child, nn.LayerNorm):
            function = packed_norm(child)
        else:
            pack(child, linear)
            function = child.forward
        delattr(model, name)
        setattr(model, name, function)


def packed_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """F.linear with its weight in the layout that is fastest for small batches on a CPU.

    oneDNN's layout keeps both cores reading, where F.linear may compute one row on a single core.
    But a call of it takes 10 microseconds, which small matrices do not repay in float32.
    """
    if weight.dtype == torch.bfloat16:
        packs = cpu_has_bfloat16()
    else:
        packs = torch.cpu.get_capabilities().get("avx2") and torch.backends.mkldnn.is_available()
        packs = packs and weight.numel() >= PACKED_WEIGHTS
    if packs:
        # private operators, because one sample of GPT-2 is generated twice as fast
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")
    transposed = weight.t().contiguous()
    return lambda x: x @ transposed if bias is None else (x @ transposed).add_(bias)


def half_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """F.linear with its weight (C_out, C_in) in float16, for a single token at a time on a CPU.

    One token waits for the weights to be read, so half the bytes take about half the time. The
    products are added up in float32, and their sum is rounded to float16. Several tokens, as in a
    prompt, and values too large for float16 are computed in float32, with the same weights.
    """
    half = weight.half()
    if not half.isfinite().all():
        return packed_linear(weight, bias)

    def linear(x: Tensor) -> Tensor:
        if x.shape[:-1].numel() == 1:
            y = F.linear(x.half(), half).float()
            if math.isfinite(y.sum()):
                return y if bias is None else y.add_(bias)
        return F.linear(x, half.float(), bias)

    return linear


def packed_norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias = norm.normalized_shape, norm.weight, norm.bias
    return lambda x: torch.layer_norm(x, shape, weight, bias)
