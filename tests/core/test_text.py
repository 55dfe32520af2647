"""The canonical text: one spelling for one graph, and diffs that show changes only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvfx.graph import Graph, Level, call
from kvfx.pass_manager import run_passes
from kvfx.passes.canonicalize import Canonicalize
from kvfx.provenance import Stamp
from kvfx.text import diff

aten = torch.ops.aten


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))

    def forward(self, input_ids, position_ids):
        x = self.model(input_ids)
        first, second = x.chunk(2, -1)
        return (first * 0.3333333333).half() + second[:, 1:2] + position_ids[..., None]


GOLDEN = """\
%input_ids: i64[B,S]
%position_ids: i64[B,S]
%0: f32[B,S,4] = embedding(@0.weight, %input_ids)  # 0
%1: f32[B,S,4] = linear(%0, @1.weight, @1.bias)  # 1
%2: (f32[B,S,2], f32[B,S,2]) = chunk(%1, 2, -1)
%3: f32[B,S,2] = getitem(%2, 0)
%4: f32[B,S,2] = getitem(%2, 1)
%5: f32[B,S,2] = mul.Tensor(%3, 0.333333)
%6: f16[B,S,2] = to.dtype(%5, torch.float16)
%7: f32[B,1,2] = slice.Tensor(%4, 1, 1, 2)
%8: f32[B,S,2] = add.Tensor(%6, %7)
%9: i64[B,S,1] = unsqueeze(%position_ids, 2)
%10: f32[B,S,2] = add.Tensor(%8, %9)
return [%10]
"""


@pytest.fixture
def graph() -> Graph:
    tokens = {0: torch.export.Dim("b", min=1), 1: torch.export.Dim("s", min=3)}
    given = (torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    exported = torch.export.export(Decoder(), given, dynamic_shapes=(tokens, tokens), strict=False)
    return run_passes(Graph(exported.module(), Level.CAPTURED).copy(), [Canonicalize()], None)


def insert(graph: Graph):
    """An op in the middle of the graph, which renumbers what follows."""
    (linear,) = graph.calls(aten.linear.default)
    users = list(linear.users)
    with graph.module.graph.inserting_after(linear):
        node = call(graph, aten.neg.default, (linear,), Stamp("1", "negate", "test"))
    for user in users:
        user.replace_input_with(linear, node)
    return node


def test_golden(graph):
    assert graph.text == GOLDEN


def test_text_does_not_depend_on_names(graph):
    for index, node in enumerate(graph.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{index}"
    assert graph.text == GOLDEN
    assert graph.copy().text == GOLDEN


def test_a_stamp_is_the_comment(graph):
    insert(graph)
    assert "%2: f32[B,S,4] = neg(%1)  # 1 <- negate\n" in graph.text


def test_kvfx_ops_show_their_backend(graph):
    (linear,) = graph.calls(aten.linear.default)
    linear.target = torch.ops.kvfx.linear.default
    assert "= kvfx.linear(%0, @1.weight, @1.bias)" in graph.text
    linear.target = torch.ops.kvfx.linear.reference
    assert "= kvfx.linear.reference(%0, @1.weight, @1.bias)" in graph.text


def test_diff_shows_only_what_changed(graph):
    before = graph.text
    insert(graph)
    lines = diff(before, graph.text, before_name="a", after_name="b").splitlines()
    changed = [line for line in lines if line[0] in "+-"]
    assert changed == ["--- a", "+++ b", "+%: f32[B,S,4] = neg(%)  # 1 <- negate"]


def test_equal_texts_have_no_diff(graph):
    assert diff(graph.text, graph.text) == ""
