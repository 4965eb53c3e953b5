"""What a GPU repeats, captured once and launched whole: CUDA graphs.

The host launches a function's kernels one by one. Where they are short, because the model is small
or the tokens are few, the GPU waits for it. A graph holds all of them, and takes one launch.
"""

import gc
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


class Captured:
    """`function`, of tensors and numbers to a tensor, on a CUDA device.

    The first call runs it as it is, which makes ready what it needs; the second captures it; from
    then on its kernels are repeated on the same memory, and no line of Python in it runs again. So
    the inputs must keep their shapes (a number is given to the function as a tensor), and whatever
    else changes from call to call must be a tensor that is changed in place.
    """

    def __init__(self, function: Callable[..., Tensor], device: str | torch.device):
        self._function, self._device = function, device
        self._inputs = self._graph = self._output = None

    def __call__(self, *inputs: Tensor | float) -> Tensor:
        with torch.cuda.device(self._device):
            if self._inputs is None:
                self._inputs = [torch.as_tensor(x, device=self._device).clone() for x in inputs]
                return self._first()
            for kept, new in zip(self._inputs, inputs, strict=True):
                kept.copy_(new) if isinstance(new, Tensor) else kept.fill_(new)
            if self._graph is None:
                gc.collect()  # a dead graph that Python freed during the capture would break it
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=side_stream(self._device)):
                    self._output = self._function(*self._inputs)
            self._graph.replay()
            return self._output.clone()

    def _first(self) -> Tensor:
        """The function itself, on the stream that will capture it."""
        usual, beside = torch.cuda.current_stream(), side_stream(self._device)
        beside.wait_stream(usual)
        with torch.cuda.stream(beside), warnings.catch_warnings():
            # of an optimizer that is made to be captured, and for once is not
            warnings.filterwarnings("ignore", ".*capturable=True.*")
            output = self._function(*self._inputs)
        usual.wait_stream(beside)
        return output


@cache
def side_stream(device: str | torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: each stream keeps megabytes of cuBLAS's."""
    return torch.cuda.Stream(device)
