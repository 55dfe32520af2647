"""One dense pass over a prompt for many policies: a prompt's own attention is dense under all of
them, only what they store differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfx.graph import Graph
from kvfx.prefill_parts import MODEL_INPUTS, dense_part, store_part
from kvfx.runtime import Executor

if TYPE_CHECKING:
    from kvfx.model import CompressedModel


class DensePass:
    """Logits, and q, k, v of every site, of the newest prompt: computed when it is another one."""

    def __init__(self, program: Graph) -> None:
        self.module = dense_part(program)
        self.prompt: tuple[Tensor, ...] = ()
        self.values: tuple[Tensor, ...] = ()
        self.runs = 0

    def __call__(self, *prompt: Tensor) -> tuple[Tensor, ...]:
        """The values for input_ids, position_ids and logits_index."""
        known = zip(self.prompt, prompt, strict=True) if self.prompt else ()
        if not self.prompt or not all(torch.equal(*pair) for pair in known):
            # the old values go first: two prompts need not fit
            self.values = ()
            self.values = tuple(self.module(*prompt))
            self.prompt = tuple(tensor.clone() for tensor in prompt)
            self.runs += 1
        return self.values


def share_prefill(models: Sequence[CompressedModel]) -> DensePass | None:
    """Let all `models`, made of one model and not compiled, read a prompt in one dense pass.

    Models under a mask that no rule describes keep their own prefill; None where all do.
    """
    able = [fast for fast in models if not fast.plan.masked and not fast.executor.compiled]
    if not able:
        return None
    dense = DensePass(able[0].graph("prefill"))
    for fast in able:
        stored = _prefill_from(dense, store_part(fast.graph("prefill")))
        fast.executor = Executor({**fast.executor.programs, "prefill": stored})
    return dense


def _prefill_from(
    dense: DensePass, stored: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """A prefill program that takes what it can from the dense pass."""

    def prefill(*args: Tensor) -> tuple[Tensor, ...]:
        logits, *shared = dense(*args[:MODEL_INPUTS])
        stored(*shared, *args)
        # the dense pass keeps its own: a caller may write into these
        return (logits.clone(),)

    return prefill
