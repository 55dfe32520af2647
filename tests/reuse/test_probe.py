"""The probe: which models pass is shown on tiny ones of every kind of rotation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from kvfx.compiler import raised_graph
from kvfx.errors import UnsupportedShape
from kvfx.graph import Graph
from kvfx.kernels.common import ruled
from kvfx.kernels.reuse import reference
from kvfx.pass_manager import Trail
from kvfx.reuse import probe as probing
from kvfx.reuse.probe import Probe, probe
from kvfx.reuse.runner import Runner
from kvfx.testing.tiny import tiny

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
TWO: dict[str, object] = {"num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "half": ("llama", {}),
    "interleaved": ("cohere", {}),
    "partial": ("gpt_neox", {}),
    "interleaved partial": ("glm", {}),
    "two tables": ("gemma3_text", {**TWO, "layer_types": ["sliding_attention", "full_attention"]}),
    "nope": ("smollm3", {**TWO, "no_rope_layers": [1, 0]}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "window": ("mistral", {"sliding_window": 5}),
    "sinks": ("granite_swa", {"sliding_window": 5}),
    "sinks and experts": ("gpt_oss", {"sliding_window": 5}),
    "capped": ("gemma2", {"sliding_window": 5}),
}


@cache
def built(architecture: str, name: str = "") -> tuple[torch.nn.Module, Graph]:
    """A tiny fp32 model and its raised graph."""
    model = tiny(architecture, MODELS[name][1] if name else {})
    return model, raised_graph(model, Trail(), strict=True)


def probed(model: torch.nn.Module, raised: Graph) -> Probe:
    return probe(model, raised, Runner(raised))


@pytest.mark.parametrize("name", MODELS)
def test_rotated_keys_can_be_moved(name):
    found = probed(*built(MODELS[name][0], name))
    assert found.failures == ()
    # rounding of fp32
    assert found.moved < 1e-5
    assert found.rows < 1e-5
    assert found.later == 0.0
    found.check(approximate=True)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_learned_positions_cannot_be_moved(architecture):
    found = probed(*built(architecture))
    assert len(found.failures) == 1
    assert found.moved > 0.1
    assert found.rows < 1e-5
    assert found.later == 0.0
    # what is never moved is exact
    found.check(approximate=False)
    with pytest.raises(UnsupportedShape, match="moved keys are not those of the model"):
        found.check(approximate=True)


def test_half_precision_is_probed_with_its_own_rounding():
    model = tiny("llama").to(torch.bfloat16)
    found = probed(model, raised_graph(model, Trail(), strict=True))
    assert found.failures == ()
    assert found.moved > 1e-3


def with_rope(raised: Graph, **changes: object) -> Graph:
    """The graph with another rotation noted at its first site."""
    graph = raised.copy()
    site = graph.sites[0]
    assert site.rope is not None
    other = replace(site, rope=replace(site.rope, **changes))
    graph.sites = (other, *graph.sites[1:])
    return graph


@pytest.mark.parametrize("change", ["style", "frequency"])
def test_another_rotation_than_the_noted_one_is_seen(change):
    model, raised = built("llama", "half")
    rope = raised.sites[0].rope
    assert rope is not None
    assert rope.style == "half"
    changes: dict[str, object] = {
        "style": {"style": "interleaved"},
        "frequency": {"frequencies": (*rope.frequencies[:-1], 2 * rope.frequencies[-1])},
    }[change]  # pyright: ignore[reportAssignmentType]
    found = probed(model, with_rope(raised, **changes))
    assert found.moved > 1e-3
    assert found.failures[0].startswith("moved")


def test_another_model_than_the_graph_is_seen():
    raised = built("llama", "half")[1]
    found = probed(tiny("llama", seed=1), raised)
    assert found.rows > 1e-2
    assert len(found.failures) == 1
    for approximate in (False, True):
        with pytest.raises(UnsupportedShape, match="rows computed on live rows give other logits"):
            found.check(approximate=approximate)


def test_rows_that_see_later_ones_are_seen(monkeypatch):
    model, raised = built("llama", "half")
    monkeypatch.setattr(reference, "_reached", lambda asked, count, rules: slice(0, count))
    monkeypatch.setattr(
        ruled,
        "inside",
        lambda asked, held, rules: torch.ones(
            1, 1, asked.shape[2], held.shape[-1], dtype=torch.bool
        ),
    )
    found = probed(model, raised)
    assert found.later > 0.0
    with pytest.raises(UnsupportedShape, match="later rows are seen by earlier ones"):
        found.check(approximate=False)


def test_an_error_that_is_no_number_is_a_failure(monkeypatch):
    model, raised = built("llama", "half")
    monkeypatch.setattr(probing, "_moved", lambda raised, ids: float("nan"))
    assert probed(model, raised).failures[0].startswith("moved")


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    probed(*built("llama", "half"))
    assert torch.equal(torch.get_rng_state(), state)
