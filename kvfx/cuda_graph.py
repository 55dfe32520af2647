"""One decode step as one CUDA graph: the device gets its work in a single launch.

A graph holds addresses: it is made for the buffers of one state, and dropped when one of them
moves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ReplayedStep:
    """Runs the same step again and again on tensors that stay where they are.

    The first call runs the step as it is, which compiles and loads every kernel; the second one
    captures it; from then on it is replayed. Nothing that `step` does may wait for the device.
    """

    def __init__(
        self, step: Callable[..., tuple[Tensor, ...]], operands: tuple[Tensor, ...]
    ) -> None:
        self.step = step
        self.operands = operands
        self.input_ids: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Read one row [B, 1]: logits [B, 1, V]."""
        if self.input_ids is None:
            self.input_ids = input_ids.clone()
            return self.step(self.input_ids, *self.operands)[0]
        self.input_ids.copy_(input_ids)
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        assert self.logits is not None
        self.graph.replay()
        # the next replay writes to the same place
        return self.logits.clone()

    def _capture(self) -> None:
        """Record the step; capturing runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.step(self.input_ids, *self.operands)[0]
        self.graph = graph
