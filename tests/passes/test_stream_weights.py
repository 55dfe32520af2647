"""StreamWeights: every linear layer becomes the op, and no number changes by more than rounding."""

from __future__ import annotations

import pytest
import torch
from torch.testing import FileCheck

from kvfx.pass_manager import Statistics
from kvfx.passes.stream_weights import StreamWeights
from kvfx.provenance import origin

aten = torch.ops.aten


@pytest.mark.parametrize(("architecture", "bias"), [("llama", False), ("phi", True)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 5)], ids=str)
def test_linear_layers(raised, apply, run, inputs, architecture, bias, shape):
    graph, given = raised(architecture), inputs(*shape)
    before = run(graph, *given)[0]
    layers = graph.calls(aten.linear.default)
    assert any(len(node.args) > 2 and node.args[2] is not None for node in layers) is bias
    stats = Statistics()
    StreamWeights().run(graph, stats)
    graph.clean()
    assert stats.hits == {"linear": len(layers)}
    FileCheck().check_not(" linear(").check_count("kvfx.linear(", len(layers), exactly=True).run(
        graph.text
    )
    torch.testing.assert_close(run(graph, *given)[0], before, rtol=1e-4, atol=1e-4)


def test_layers_keep_their_names(raised):
    graph = raised("llama")
    StreamWeights().run(graph, Statistics())
    sites = [origin(node).site for node in graph.calls(torch.ops.kvfx.linear.default)]
    assert sites[0] == "model.layers.0.self_attn.q_proj"
    assert sites[-1] == "lm_head"
    assert len(set(sites)) == len(sites)


def test_nothing_to_stream(raised):
    # gpt2 spells its layers as addmm on transposed weights
    graph, stats = raised("gpt2"), Statistics()
    before = graph.text.count("addmm")
    StreamWeights().run(graph, stats)
    assert stats.hits["linear"] == 1
    assert graph.text.count("addmm") == before > 0
