"""Stamps: what is written is read, and survives copies and re-export."""

from __future__ import annotations

import torch
from torch import fx, nn

from kvfx.graph import Graph, Level
from kvfx.provenance import Stamp, module_path, origin, stamp

MARK = Stamp("layers.0", "sdpa", "match-attention")


def traced() -> fx.GraphModule:
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            return self.inner(x) + 1

    return torch.export.export(Outer(), (torch.randn(2, 4),), strict=False).module()


def calls(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


def test_what_is_stamped_is_read():
    module = traced()
    first, *others = calls(module)
    first.meta["custom"] = {"other": 1}
    stamp(first, MARK)
    assert origin(first) == MARK
    assert first.meta["custom"]["other"] == 1
    assert [origin(node) for node in others] == [None] * len(others)
    assert str(MARK) == "layers.0 <- sdpa"
    assert str(Stamp("", "hide-padding", "insert-cache")) == "model <- hide-padding"


def test_stamps_survive_a_copy():
    module = traced()
    stamp(calls(module)[0], MARK)
    copy = Graph(module, Level.CAPTURED).copy()
    assert [origin(node) for node in calls(copy.module)] == [origin(node) for node in calls(module)]


def test_module_paths_are_the_innermost():
    linear, add = (
        node
        for node in calls(traced())
        if "linear" in str(node.target) or "add" in str(node.target)
    )
    assert module_path(linear) == "inner.0"
    assert module_path(add) == ""
    assert module_path(fx.Graph().placeholder("x")) == ""
