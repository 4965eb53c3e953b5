"""A GPU's step, captured once and launched whole: a CUDA graph.

The host launches a step's kernels one by one. Where they are short, because the model is small or
the tokens are few, the GPU waits for it. A graph holds all of them, and takes one launch.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Captured:
    """`step`, a function of tensors and numbers that returns a tensor, on a CUDA device.

    The first call runs it as it is, which makes ready what it needs; the second captures it; from
    then on its kernels are repeated on the same memory, and no line of Python in it runs again. So
    the inputs must keep their shapes (a number is given to the step as a tensor), and whatever else
    changes from call to call must be a tensor that is changed in place.
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device):
        self._step, self._device = step, device
        self._inputs = self._graph = self._output = None

    def __call__(self, *inputs: Tensor | float) -> Tensor:
        with torch.cuda.device(self._device):
            if self._inputs is None:
                self._inputs = [torch.as_tensor(x, device=self._device).clone() for x in inputs]
                return self._first()
            for kept, new in zip(self._inputs, inputs, strict=True):
                kept.copy_(new) if isinstance(new, Tensor) else kept.fill_(new)
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._output = self._step(*self._inputs)
            self._graph.replay()
            return self._output.clone()

    def _first(self) -> Tensor:
        """The step itself, on a stream beside the usual one, as a capture will have it."""
        usual, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(usual)
        with torch.cuda.stream(beside):
            output = self._step(*self._inputs)
        usual.wait_stream(beside)
        return output
