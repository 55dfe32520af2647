"""A prefill program in two parts: what the model computes, and what a policy stores of it."""

from __future__ import annotations

import torch
from torch import fx

from kvfx.graph import Graph, operand

# the op that a policy's prefill program has at each site, and its operands q, k, v
ATTEND_PROMPT = "kvfx::attend_prompt"
OPERANDS = 3
# input_ids, position_ids, logits_index
MODEL_INPUTS = 3


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


def told_by_prompt(graph: fx.Graph) -> set[fx.Node]:
    """Of a store part the ops that nothing but the prompt has a say in: they write nothing, and
    read what all policies share, the positions, constants, or one another.
    """
    given = ("shared_", "position_ids")
    inputs = graph.find_nodes(op="placeholder")
    known = {node for node in inputs if str(node.target).startswith(given)}
    known.update(graph.find_nodes(op="get_attr"))
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and known.issuperset(node.all_input_nodes):
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                continue
            known.add(node)
            found.add(node)
    return found


def _operands(graph: fx.Graph) -> list[fx.Node]:
    """q, k, v of every site, in order, each once."""
    attentions = [node for node in graph.nodes if _is_attend_prompt(node)]
    found = [operand(node, index) for node in attentions for index in range(OPERANDS)]
    return list(dict.fromkeys(found))


def _is_attend_prompt(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.name().startswith(ATTEND_PROMPT)
