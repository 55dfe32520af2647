"""One dense pass over a prompt for many policies: a prompt's own attention is dense under all of
them, only what they store differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from kvfx.graph import Graph, operand
from kvfx.runtime import Executor

if TYPE_CHECKING:
    from kvfx.model import CompressedModel

# the op that a policy's prefill program has at each site, and its operands q, k, v
ATTEND_PROMPT = "kvfx::attend_prompt"
OPERANDS = 3
# input_ids, position_ids, logits_index
MODEL_INPUTS = 3


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


def dense_part(program: Graph) -> fx.GraphModule:
    """Of a prefill program what no policy changes: its logits, then q, k, v of every site."""
    module = program.copy().module
    graph = module.graph
    output = graph.output_node()
    # the only result of a program
    (logits,) = output.all_input_nodes
    graph.erase_node(output)
    graph.output((logits, *_operands(graph)))
    # what is stored nobody reads any more
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    for node in graph.find_nodes(op="placeholder")[MODEL_INPUTS:]:
        graph.erase_node(node)
    module.recompile()
    return module


def store_part(program: Graph) -> fx.GraphModule:
    """Of a prefill program what the policy does: q, k, v of every site are inputs, before all
    others.
    """
    module = program.copy().module
    graph = module.graph
    first = next(iter(graph.nodes))
    for index, node in enumerate(_operands(graph)):
        with graph.inserting_before(first):
            given = graph.placeholder(f"shared_{index}")
        given.meta = dict(node.meta)
        node.replace_all_uses_with(given)
    graph.erase_node(graph.output_node())
    graph.output(())
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _operands(graph: fx.Graph) -> list[fx.Node]:
    """q, k, v of every site, in order, each once."""
    attentions = [node for node in graph.nodes if _is_attend_prompt(node)]
    found = [operand(node, index) for node in attentions for index in range(OPERANDS)]
    return list(dict.fromkeys(found))


def _is_attend_prompt(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.name().startswith(ATTEND_PROMPT)


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
