"""The verifier: one red case for every row of every table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvfx.capture import capture
from kvfx.errors import VerificationError
from kvfx.graph import Graph, Level
from kvfx.ops import name_of, overload
from kvfx.pass_manager import run_passes
from kvfx.passes.pipeline import Target, program_passes, raise_passes
from kvfx.planner import make_plan
from kvfx.policies import Full
from kvfx.testing.tiny import tiny_llama
from kvfx.verify import LEVELS, verify

aten = torch.ops.aten


@pytest.fixture(scope="module")
def at_level():
    """A correct graph of each level."""
    captured = capture(tiny_llama())
    graphs = {Level.CAPTURED: captured.copy()}
    passes = raise_passes()
    graphs[Level.CANONICAL] = run_passes(captured.copy(), passes[:1], None)
    graphs[Level.RAISED] = run_passes(captured.copy(), passes, None)
    plan = make_plan(Full(), graphs[Level.RAISED].sites)
    steps = program_passes("extend", plan, Target("reference", False))
    graphs[Level.CACHED] = run_passes(graphs[Level.RAISED].copy(), steps[:1], None)
    graphs[Level.LOWERED] = run_passes(graphs[Level.RAISED].copy(), steps, None)
    return graphs


def kvfx_node(graph: Graph):
    return next(node for node in graph.nodes if name_of(node.target) is not None)


def forget_input(graph: Graph) -> None:
    del graph.input("input_ids").meta["val"]


def call_method(graph: Graph) -> None:
    x = graph.input("input_ids")
    with graph.module.graph.inserting_after(x):
        graph.module.graph.call_method("sum", (x,))


def assert_something(graph: Graph) -> None:
    x = graph.input("input_ids")
    with graph.module.graph.inserting_after(x):
        graph.module.graph.call_function(aten._assert_tensor_metadata.default, (x,))


def call_module(graph: Graph) -> None:
    graph.module.add_module("part", nn.Identity())
    x = graph.input("input_ids")
    with graph.module.graph.inserting_after(x):
        graph.module.graph.call_module("part", (x,))


def forget_stamp(graph: Graph) -> None:
    kvfx_node(graph).meta["custom"] = {}


def forget_value(graph: Graph) -> None:
    del kvfx_node(graph).meta["val"]


def name_backend(graph: Graph) -> None:
    node = kvfx_node(graph)
    node.target = overload(name_of(node.target), "reference")


def unname_backend(graph: Graph) -> None:
    node = kvfx_node(graph)
    node.target = overload(name_of(node.target))


def keep_attention(graph: Graph) -> None:
    node = kvfx_node(graph)
    q = next(node for node in graph.nodes if "extend_dense" in str(node.target)).args[0]
    with graph.module.graph.inserting_after(q):
        backend = "reference" if graph.level is Level.LOWERED else "default"
        new = graph.module.graph.call_function(
            overload("attention", backend),
            (q, q, q, None, None),
            {"scale": 1.0, "kv_repeat": 1},
        )
    new.meta.update(custom=dict(node.meta["custom"]), val=q.meta["val"])


def keep_mask(graph: Graph) -> None:
    node = kvfx_node(graph)
    node.args = (*node.args[:3], node.args[0], *node.args[4:])


def share_buffer(graph: Graph) -> None:
    graph.input("site_1_k_cache").replace_all_uses_with(graph.input("site_0_k_cache"))


CANONICAL_UP = (Level.CANONICAL, Level.RAISED, Level.CACHED)
KVFX = (Level.RAISED, Level.CACHED, Level.LOWERED)
RED = {
    "an input has no fake value": (forget_input, (Level.CAPTURED, *CANONICAL_UP)),
    "a method call is left": (call_method, (Level.CAPTURED, *CANONICAL_UP)),
    "an assertion is left": (assert_something, CANONICAL_UP),
    "a sub-module call is left": (call_module, CANONICAL_UP),
    "a kvfx node has no stamp": (forget_stamp, KVFX),
    "a kvfx node has no fake value": (forget_value, KVFX),
    "a backend is named before select-backend ran": (name_backend, (Level.RAISED, Level.CACHED)),
    "a kvfx op names no backend": (unname_backend, (Level.LOWERED,)),
    "an attention node has no cache": (keep_attention, (Level.CACHED, Level.LOWERED)),
    "still has a mask tensor": (keep_mask, (Level.RAISED,)),
    "is shared by": (share_buffer, (Level.CACHED,)),
}
CASES = [(message, spoil, level) for message, (spoil, levels) in RED.items() for level in levels]


@pytest.mark.parametrize("level", Level, ids=lambda level: level.value)
def test_correct_graphs_pass(at_level, level):
    verify(at_level[level].copy(), after="test")


@pytest.mark.parametrize(
    ("message", "spoil", "level"), CASES, ids=[f"{s.__name__}-{lv.value}" for _, s, lv in CASES]
)
def test_red(at_level, message, spoil, level):
    graph = at_level[level].copy()
    spoil(graph)
    with pytest.raises(VerificationError, match=message) as caught:
        verify(graph, after="some-pass")
    assert str(caught.value).startswith("after some-pass")


def test_every_row_of_every_table_is_red_once():
    for level, rows in LEVELS.items():
        for _, _, message in rows:
            assert any(text in message and at is level for text, _, at in CASES), (level, message)


def test_a_broken_graph_is_found(at_level):
    graph = at_level[Level.CANONICAL].copy()
    first, last = graph.calls(aten.linear.default)[0], graph.calls(aten.linear.default)[-1]
    first.args = (last, *first.args[1:])
    with pytest.raises(RuntimeError):
        verify(graph, after="test")


def test_the_message_names_the_node(at_level):
    graph = at_level[Level.RAISED].copy()
    node = kvfx_node(graph)
    forget_stamp(graph)
    with pytest.raises(VerificationError, match=f"%{node.name} "):
        verify(graph, after="test")
