"""One dense pass over a prompt for many policies: a prompt's own attention is dense under all of
them, only what they store differs. What several policies ask of the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kvfx.graph import Graph
from kvfx.prefill_parts import MODEL_INPUTS, dense_part, store_part, told_by_prompt
from kvfx.runtime import Executor

if TYPE_CHECKING:
    from kvfx.model import CompressedModel


class DensePass:
    """Logits, and q, k, v of every site, of the newest prompt: computed when it is another one."""

    def __init__(self, program: Graph) -> None:
        self.module = dense_part(program)
        self.prompt: tuple[Tensor, ...] = ()
        self.values: tuple[Tensor, ...] = ()
        # what policies computed of it so far
        self.known: dict[Hashable, Any] = {}
        self.constants: dict[Hashable, Tensor] = {}
        self.runs = 0

    def __call__(self, *prompt: Tensor) -> tuple[Tensor, ...]:
        """The values for input_ids, position_ids and logits_index."""
        known = zip(self.prompt, prompt, strict=True) if self.prompt else ()
        if not self.prompt or not all(torch.equal(*pair) for pair in known):
            # the old values go first: two prompts need not fit
            self.values, self.known = (), {}
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
        stored = _prefill_from(dense, _Stored(store_part(fast.graph("prefill")), dense))
        fast.executor = Executor({**fast.executor.programs, "prefill": stored})
    return dense


class _Stored(fx.Interpreter):
    """Runs the store part of one policy; what the prompt alone tells is asked of the dense pass."""

    def __init__(self, module: fx.GraphModule, dense: DensePass) -> None:
        super().__init__(module)
        self.dense, self.alike = dense, told_by_prompt(module.graph)
        for node in module.graph.find_nodes(op="get_attr"):
            # equal constants of all policies are one tensor
            own = getattr(module, str(node.target))
            key = (own.dtype, *own.shape, *own.flatten().tolist())
            setattr(module, str(node.target), dense.constants.setdefault(key, own))

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node: that of an equal op on the same tensors, if one ran before."""
        if n not in self.alike:
            return super().run_node(n)
        leaves, form = pytree.tree_flatten(self.fetch_args_kwargs_from_env(n))
        # tensors that are known live as long as what was computed of them
        key = (n.target, form, *(id(x) if isinstance(x, Tensor) else x for x in leaves))
        if key not in self.dense.known:
            self.dense.known[key] = super().run_node(n)
        return self.dense.known[key]


def _prefill_from(dense: DensePass, stored: _Stored) -> Callable[..., tuple[Tensor, ...]]:
    """A prefill program that takes what it can from the dense pass."""

    def prefill(*args: Tensor) -> tuple[Tensor, ...]:
        logits, *shared = dense(*args[:MODEL_INPUTS])
        # the prompt as the pass keeps it: equal ones are the same tensors
        stored.run(*shared, *dense.prompt, *args[MODEL_INPUTS:])
        # the dense pass keeps its own: a caller may write into these
        return (logits.clone(),)

    return prefill
