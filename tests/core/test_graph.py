"""The graph and its verbs: copy, call, replace, extract."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvfx.graph import Graph, Level, Miss, ancestors, call, extract, infer, replace
from kvfx.provenance import Stamp, origin

aten = torch.ops.aten
MARK = Stamp("inner", "test", "test")


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.inner(x.relu()) + self.inner(y)


@pytest.fixture
def graph() -> Graph:
    batch = torch.export.Dim("batch", min=1)
    given = (torch.randn(2, 4), torch.randn(2, 4))
    shapes = ({0: batch}, {0: batch})
    module = torch.export.export(Outer(), given, dynamic_shapes=shapes, strict=False).module()
    return Graph(module, Level.CAPTURED, windows=(7,), missed={"a": Miss("why", "a")}).copy()


def run(graph: Graph, *given):
    with torch.no_grad():
        return graph.module(*given)


def test_a_miss_is_false_and_says_why():
    assert not Miss("no scale")
    assert str(Miss("no scale", "layers.0")) == "layers.0: no scale"
    assert str(Miss("no scale")) == "no scale"


def test_inputs_and_calls(graph):
    assert graph.input("x").target == "x"
    assert len(graph.calls(aten.linear.default)) == 2
    assert graph.calls(aten.mul.Tensor) == []
    with pytest.raises(StopIteration):
        graph.input("z")
    assert str(graph) == graph.text


def test_a_copy_changes_alone_and_shares_weights(graph):
    given, text = (torch.randn(3, 4), torch.randn(3, 4)), graph.text
    copy = graph.copy()
    assert (copy.level, copy.windows, copy.missed) == (graph.level, (7,), graph.missed)
    copy.missed["b"] = Miss("other")
    (relu,) = copy.calls(aten.relu.default)
    relu.replace_all_uses_with(relu.args[0])
    copy.clean()
    copy.module.recompile()
    assert "relu" not in copy.text
    assert graph.text == text
    assert list(graph.missed) == ["a"]
    pointers = [p.data_ptr() for p in copy.module.parameters()]
    assert pointers == [p.data_ptr() for p in graph.module.parameters()]
    assert not torch.equal(run(copy, *given)[0], run(graph, *given)[0])


def test_call_adds_a_stamped_node_with_its_value(graph):
    (relu,) = graph.calls(aten.relu.default)
    with graph.module.graph.inserting_after(relu):
        node = call(graph, aten.mul.Tensor, (relu, 2.0), MARK)
    assert origin(node) == MARK
    assert node.meta["val"].shape == relu.meta["val"].shape
    assert isinstance(node.meta["val"], torch._subclasses.FakeTensor)


def test_infer_sees_a_changed_operand(graph):
    (relu,) = graph.calls(aten.relu.default)
    relu.meta["val"] = None
    infer(relu)
    assert tuple(relu.meta["val"].shape[1:]) == (4,)


def test_replace_keeps_the_place_in_the_model(graph):
    first = graph.calls(aten.linear.default)[0]
    stack = first.meta["nn_module_stack"]
    with graph.module.graph.inserting_before(first):
        new = call(graph, torch.ops.kvfx.linear.default, first.args, MARK)
    replace(first, new)
    assert new.meta["nn_module_stack"] == stack
    assert first not in graph.nodes
    assert len(graph.calls(aten.linear.default)) == 1
    graph.module.graph.lint()


def test_clean_drops_what_nothing_uses(graph):
    with graph.module.graph.inserting_after(graph.input("y")):
        call(graph, aten.relu.default, (graph.input("y"),), MARK)
    assert len(graph.calls(aten.relu.default)) == 2
    graph.clean()
    assert len(graph.calls(aten.relu.default)) == 1


def test_ancestors_stop(graph):
    (relu,) = graph.calls(aten.relu.default)
    first = next(node for node in graph.calls(aten.linear.default) if relu in node.args)
    assert graph.input("x") in ancestors([first])
    assert graph.input("y") not in ancestors([first])
    stopped = ancestors([first], stop=[relu])
    assert relu in stopped
    assert graph.input("x") not in stopped


def test_extract_runs_a_part(graph):
    (relu,) = graph.calls(aten.relu.default)
    first = next(node for node in graph.calls(aten.linear.default) if relu in node.args)
    x = torch.randn(5, 4)
    part = extract(graph.module, [first, relu], [relu])
    with torch.no_grad():
        out, same = part(x)
        weight, bias = (p for p in graph.module.parameters())
        torch.testing.assert_close(out, nn.functional.linear(x, weight, bias))
    assert same is x
    assert {p.data_ptr() for p in part.parameters()} == {
        p.data_ptr() for p in graph.module.parameters()
    }
