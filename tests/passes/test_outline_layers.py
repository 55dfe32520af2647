"""OutlineLayers: equal layers share one region that computes what the layers did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvfx.graph import Level
from kvfx.pass_manager import run_passes
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.outline_layers import OutlineLayers
from kvfx.policies import Full, PerLayer, StreamingLLM
from kvfx.runtime import Executor, State


def regions(graph) -> list[str]:
    """The calls of regions, in order."""
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize(
    ("architecture", "changes", "policy", "calls"),
    [
        ("llama", {"num_hidden_layers": 3}, None, ["layer_0"] * 3),
        ("gpt2", {"n_layer": 3}, None, ["layer_0"] * 3),
        ("gemma3_text", {}, None, ["layer_0"] * 3 + ["layer_1"]),
        (
            "llama",
            {"num_hidden_layers": 4},
            PerLayer(StreamingLLM(budget=8), {0: Full(), -1: Full()}),
            ["layer_0", "layer_1", "layer_1", "layer_0"],
        ),
    ],
    ids=["llama", "gpt2", "gemma3", "per layer"],
)
def test_equal_layers_share_a_region(lowered, apply, architecture, changes, policy, calls):
    _, graphs = lowered(architecture, changes, policy)
    stats = apply(graphs["decode"], [OutlineLayers()])
    assert regions(graphs["decode"]) == ["prelude", *calls, "epilogue"]
    assert stats.hits == {
        name: (["prelude", *calls, "epilogue"]).count(name) for name in stats.hits
    }
    assert not stats.misses
    # weights and buffers are inputs of a region
    for name in set(calls):
        region = graphs["decode"].module.get_submodule(name)
        assert not [node for node in region.graph.nodes if node.op == "get_attr"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_outlined_programs_compute_the_same(lowered, inputs, architecture):
    names = ("prefill", "extend", "decode")
    plan, graphs = lowered(architecture, programs=names)
    outlined = {name: run_passes(graphs[name].copy(), [OutlineLayers()], None) for name in names}
    ids, positions, index = inputs(2, 12)
    results = []
    for programs in (graphs, outlined):
        state = State(plan, 2, None)
        executor = Executor({name: graph.module for name, graph in programs.items()})
        with torch.no_grad():
            logits = [
                executor.prompt(state, ids[:, :6], positions[:, :6], index[:6], [6, 6]),
                executor.prompt(state, ids[:, 6:11], positions[:, 6:11], index[:5], [5, 5]),
                executor.decode(state, ids[:, 11:]),
            ]
        results.append((torch.cat(logits, 1), state.tensors()))
    (flat, flat_buffers), (regional, regional_buffers) = results
    assert torch.equal(flat, regional)
    for a, b in zip(flat_buffers, regional_buffers, strict=True):
        assert torch.equal(a, b)


def test_a_program_that_returns_nothing_keeps_its_regions(lowered, apply):
    policy = StreamingLLM(budget=8, interval=2)
    _, graphs = lowered("llama", {"num_hidden_layers": 3}, policy, ("compact",))
    apply(graphs["compact"], [OutlineLayers()])
    assert regions(graphs["compact"]) == ["layer_0"] * 3


class Twice(nn.Module):
    """Layer 0 runs before and after layer 1."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        first, second = self.layers
        return first(second(first(x)))


class Between(nn.Module):
    """What stands between two layers belongs to neither."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.layers[1](self.layers[0](x).sigmoid() * 2) + x


def as_lowered(graph):
    run_passes(graph, [Canonicalize()], None)
    graph.level = Level.LOWERED
    return graph


def test_entangled_layers_stay_and_say_why(exported, apply, run):
    x = torch.randn(2, 4)
    graph = as_lowered(exported(Twice(), x))
    text, before = graph.text, run(graph, x)[0]
    stats = apply(graph, [OutlineLayers()])
    (miss,) = stats.misses
    assert miss.at in ("layers.0", "layers.1")
    assert "before it is there" in miss.reason
    assert not stats.hits
    assert graph.text == text
    assert torch.equal(run(graph, x)[0], before)


def test_what_stands_between_layers_stays_between(exported, apply, run):
    x = torch.randn(2, 4)
    graph = as_lowered(exported(Between(), x))
    before = run(graph, x)[0]
    stats = apply(graph, [OutlineLayers()])
    assert stats.hits == {"layer_0": 2, "epilogue": 1}
    assert regions(graph) == ["layer_0", "layer_0", "epilogue"]
    assert torch.equal(run(graph, x)[0], before)


@pytest.mark.parametrize("other", [nn.Linear(4, 5), nn.Linear(4, 4, bias=False), nn.Tanh()])
def test_layers_that_differ_do_not_share(exported, apply, run, other):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), other])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    x = torch.randn(2, 4)
    graph = as_lowered(exported(Two(), x))
    before = run(graph, x)[0]
    assert apply(graph, [OutlineLayers()]).hits == {"layer_0": 1, "layer_1": 1}
    assert torch.equal(run(graph, x)[0], before)
