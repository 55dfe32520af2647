"""MatchLatents: what keys and values of real models are computed from, and which have nothing."""

from __future__ import annotations

import pytest
import torch

from kvfx.absorb import matrices
from kvfx.graph import ancestors, extract
from kvfx.ops import overload
from kvfx.passes.match_latents import MatchLatents
from kvfx.passes.pipeline import raise_passes
from kvfx.rebuild import refute

LATENT = ["deepseek_v2", "deepseek_v3", "minicpm3"]


@pytest.mark.parametrize("architecture", LATENT)
def test_latent_attention(captured, apply, architecture):
    graph = captured(architecture)
    stats = apply(graph, raise_passes())
    assert stats.hits == {"latent 16 + 8 of 144": 2}
    assert not stats.misses
    for site in graph.sites:
        assert (site.latent, site.linear, site.width) == ((16, 8), True, 144)
        cut = graph.cuts[site.name]
        assert cut.shapes == ((1, 16), (1, 8))
        # one projection, and what splits and joins: positions were before
        targets = [str(node.target) for node in cut.template.nodes]
        assert targets.count("aten.linear.default") == 1
        assert not any("mul" in target for target in targets)


@pytest.mark.parametrize(
    ("architecture", "changes", "latent", "linear"),
    [
        ("llama", {}, (), False),
        ("qwen3", {}, (), False),
        ("gpt_oss", {}, (), False),
        # the position as a number, and the hidden state: keys are turned again
        ("llama", {"num_key_value_heads": 4}, (1, 64), False),
        # the hidden state: learned positions are in it already
        ("gpt2", {}, (64,), True),
        ("mpt", {}, (64,), True),
    ],
    ids=str,
)
def test_other_models(raised, architecture, changes, latent, linear):
    graph = raised(architecture, changes)
    for site in graph.sites:
        assert (site.latent, site.linear) == (latent, linear)
    assert set(graph.cuts) == ({site.name for site in graph.sites} if latent else set())


@pytest.mark.parametrize("architecture", [*LATENT, "gpt2", "gptj"])
def test_the_template_computes_what_the_model_does(raised, inputs, architecture):
    """At the first site, whose operands no attention comes before."""
    graph = raised(architecture)
    node = graph.calls(overload("attention"))[0]
    cut = graph.cuts[graph.sites[0].name]
    named = [next(n for n in graph.nodes if n.name == name) for name in cut.names]
    outputs = [*named, node.args[1], node.args[2]]
    assert not ancestors(outputs) & set(graph.calls(overload("attention")))
    ids, positions, _ = inputs(2, 9)
    probe = extract(graph.module, outputs, [graph.input("input_ids"), graph.input("position_ids")])
    module = torch.fx.GraphModule(graph.module, cut.template)
    with torch.no_grad():
        *given, k, v = probe(ids, positions)
        # other rows in another order
        order = torch.tensor([8, 0, 3])
        some = [x.index_select(axis, order) for x, axis in zip(given, cut.axes, strict=True)]
        found = module(*some, 2, 3)
    torch.testing.assert_close(found[0], k[:, :, order])
    torch.testing.assert_close(found[1], v[:, :, order])


@pytest.mark.parametrize("architecture", LATENT)
def test_matrices_are_the_weights(raised, architecture):
    graph = raised(architecture)
    site = graph.sites[0]
    keys, values = matrices(graph, graph.cuts[site.name], site.dtype, site.device)
    layer = dict(graph.module.named_parameters())
    (name,) = [name for name in layer if "layers.0" in name and "kv_b_proj" in name]
    weight = layer[name].unflatten(0, (4, 28))
    # values are exact copies
    assert torch.equal(keys[:, :16, :16], weight[:, :16].mT)
    assert torch.equal(values[:, :16], weight[:, 16:].mT)
    assert torch.equal(keys[:, 16:, 16:], torch.eye(8).expand(4, -1, -1))
    assert not keys[:, 16:, :16].any()
    assert not values[:, 16:].any()


def test_equal_layers_are_proven_once(captured, apply, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return refute(*args)

    monkeypatch.setattr("kvfx.passes.match_latents.refute", counted)
    graph = captured("minicpm3", {"num_hidden_layers": 4})
    apply(graph, raise_passes())
    assert (len(graph.cuts), len(calls)) == (4, 1)


def test_what_cannot_be_proven_has_a_reason(captured, apply, monkeypatch):
    from kvfx.graph import Miss

    graph = captured("minicpm3")
    monkeypatch.setattr("kvfx.passes.match_latents.refute", lambda *_: Miss("no"))
    stats = apply(graph, raise_passes())
    assert [str(miss) for miss in stats.misses] == [f"{site.name}: no" for site in graph.sites]
    assert [site.latent for site in graph.sites] == [(), ()]
    assert graph.cuts == {}


def test_the_graph_stays_as_it_is(captured):
    from kvfx.pass_manager import Trail, run_passes

    trail = Trail()
    run_passes(captured("deepseek_v3"), raise_passes(), trail)
    step = trail[MatchLatents.name]
    assert step.before == step.after
