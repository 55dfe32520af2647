"""Canonicalize: what returns its operand goes, everything else stays, and numbers do not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import FileCheck

from kvfx.graph import Level
from kvfx.passes.canonicalize import Canonicalize

aten = torch.ops.aten


class Calls(nn.Module):
    """`function(x) + 1`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + 1


class Guarded(nn.Module):
    """Three things that export leaves behind: a wrapped region, an assertion, no-ops."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            y = x * 2
        return y.to(torch.float32)[:, :, :] - 1


NO_OPS = {
    "slice": lambda x: x[:, 0:],
    "slice to the end": lambda x: x[:, None:None:1],
    "to dtype": lambda x: x.to(torch.float32),
    "to device": lambda x: x.to("cpu"),
    "to layout": lambda x: aten.to.dtype_layout(x, dtype=torch.float32),
    "_to_copy": lambda x: aten._to_copy(x),
    "expand": lambda x: x.expand(-1, -1, -1),
    "view": lambda x: x.view(x.shape),
    "reshape": lambda x: x.reshape(x.shape),
    "dropout in eval": lambda x: nn.functional.dropout(x, 0.5, False),
    "dropout of nothing": lambda x: nn.functional.dropout(x, 0.0, True),
    "detach": lambda x: x.detach(),
    "detach_": lambda x: (x * 1.0).detach_(),
    "alias": lambda x: aten.alias(x),
    "lift_fresh_copy": lambda x: aten.lift_fresh_copy(x),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
}
KEPT = {
    aten.slice.Tensor: lambda x: x[..., 1:],
    aten.to.dtype: lambda x: x.to(torch.float64),
    aten.expand.default: lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1),
    aten.view.default: lambda x: x.view(x.shape[0], -1),
    aten.dropout.default: lambda x: nn.functional.dropout(x, 0.5, True),
    aten.clone.default: lambda x: x.clone(),
}


@pytest.mark.parametrize("function", NO_OPS.values(), ids=NO_OPS)
def test_no_op_goes(exported, apply, run, function):
    x = torch.randn(2, 7, 4)
    graph = exported(Calls(function), x)
    before = run(graph, x)[0]
    stats = apply(graph, [Canonicalize()])
    assert stats.hits["no-op"] >= 1
    left = [node.target for node in graph.nodes if node.op == "call_function"]
    assert set(left) <= {aten.add.Tensor, aten.mul.Tensor, aten.transpose.int}
    assert torch.equal(run(graph, x)[0], before)


@pytest.mark.parametrize(("target", "function"), KEPT.items(), ids=map(str, KEPT))
def test_what_changes_its_operand_stays(exported, apply, target, function):
    graph = exported(Calls(function), torch.randn(2, 7, 4))
    apply(graph, [Canonicalize()])
    assert len(graph.calls(target)) == 1


@pytest.mark.parametrize("part", [slice(None, None, 2), slice(0, -1), slice(0, 3)], ids=str)
def test_a_part_is_not_the_whole(exported, apply, run, part):
    x = torch.randn(2, 7, 4)
    graph = exported(Calls(lambda x: x[..., part]), x)
    apply(graph, [Canonicalize()])
    assert len(graph.calls(aten.slice.Tensor)) == 1
    assert torch.equal(run(graph, x)[0], x[..., part] + 1)


def test_wrapped_region_is_inlined(exported, apply, run):
    x = torch.randn(2, 7, 4)
    graph = exported(Guarded().eval(), x)
    FileCheck().check("wrap_with_set_grad_enabled").check("_assert_tensor_metadata").run(graph.text)
    stats = apply(graph, [Canonicalize()])
    assert stats.hits["inline"] >= 1
    assert stats.hits["erase-check"] >= 1
    FileCheck().check("%0: f32[B,C,4] = mul.Tensor(%x, 2)").check_next(
        "%1: f32[B,C,4] = sub.Tensor(%0, 1)"
    ).check_next("return [%1]").run(graph.text)
    assert torch.equal(run(graph, x)[0], x * 2 - 1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_canonical_is_canonical(canonical, apply, architecture):
    graph = canonical(architecture)
    text = graph.text
    for word in ("assert", "wrap_with", "_guards_fn", "dropout", "detach", "lift_fresh"):
        assert word not in text
    graph.level = Level.CAPTURED
    stats = apply(graph, [Canonicalize()])
    assert not stats.hits
    assert graph.text == text


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 13)], ids=str)
def test_logits_are_the_same(captured, apply, run, inputs, architecture, shape):
    graph = captured(architecture)
    given = inputs(*shape)
    before = run(graph, *given)[0]
    apply(graph, [Canonicalize()])
    assert torch.equal(run(graph, *given)[0], before)


def test_a_view_of_what_was_contiguous_still_runs(exported, apply, run):
    x = torch.randn(2, 7, 4)
    module = Calls(lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], -1))
    graph = exported(module, x)
    apply(graph, [Canonicalize()])
    assert torch.equal(run(graph, x)[0], module(x))


WRITTEN = {
    "constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]).add_(1),
    "copy": lambda x: x.to(torch.float32, copy=True).add_(1) + x,
    "lifted": lambda x: aten.lift_fresh_copy(x).mul_(2) + x,
}


@pytest.mark.parametrize("function", WRITTEN.values(), ids=WRITTEN)
def test_a_copy_that_is_written_stays_a_copy(exported, apply, run, function):
    x = torch.randn(2, 7, 4)
    module = Calls(function)
    expected = module(x)
    graph = exported(module, x.clone())
    apply(graph, [Canonicalize()])
    for _ in range(2):
        assert torch.equal(run(graph, x)[0], expected)
