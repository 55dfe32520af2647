"""What is drawn of a layer: boxes for what matters, edges that pass through the rest."""

from __future__ import annotations

import pytest

import kvfx
from kvfx.drawing.boxes import draw_layer
from kvfx.drawing.layers import layer_in, layers_of, lines_of, value_in
from kvfx.errors import InputError
from kvfx.testing.tiny import tiny, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def fast():
    policy = kvfx.SnapKV(budget=0.5) | kvfx.KIVI(bits=4)
    return kvfx.compress(tiny_llama(head_dim=32), policy, compile=False, verify=False)


def titles(drawing):
    return [box.title for box in drawing.boxes]


def ends(drawing):
    """The edges as titles, with their labels."""
    names = titles(drawing)
    return {(names[edge.source], names[edge.target]): edge.label for edge in drawing.edges}


def test_a_raised_layer_is_what_people_draw(fast):
    drawing = draw_layer(fast.raised, 1)
    attention = "input_layernorm q_proj k_proj v_proj rope rope attention o_proj +"
    mlp = "post_attention_layernorm gate_proj up_proj silu × down_proj +"
    assert sorted(titles(drawing)) == sorted(f"x {attention} {mlp} x".split())
    edges = ends(drawing)
    assert edges["v_proj", "attention"] == "v"
    assert ("q_proj", "rope") in edges
    assert ("attention", "o_proj") in edges
    assert ("x", "input_layernorm") in edges
    assert ("q_proj", "attention") not in edges


def test_every_box_but_x_is_connected(fast):
    for graph in (fast.raised, *fast.graphs.values()):
        drawing = draw_layer(graph, 0)
        touched = {end for edge in drawing.edges for end in (edge.source, edge.target)}
        assert touched == set(range(len(drawing.boxes)))


def test_decode_appends_to_the_cache_before_it_attends(fast):
    edges = ends(draw_layer(fast.graph("decode"), 0))
    assert ("append_kivi", "KIVI cache") in edges
    assert ("KIVI cache", "attend_scored_kivi") in edges
    assert edges["rope", "attend_scored_kivi"] == "q"


def test_extend_reads_one_state_of_the_cache_and_writes_the_next(fast):
    drawing = draw_layer(fast.graph("extend"), 0)
    caches = [number for number, box in enumerate(drawing.boxes) if box.kind == "cache"]
    read = {edge.source for edge in drawing.edges} & set(caches)
    written = {edge.target for edge in drawing.edges} & set(caches)
    assert len(caches) == 2
    assert not read & written


def test_compact_has_no_model(fast):
    kinds = {box.kind for box in draw_layer(fast.graph("compact"), 0).boxes}
    assert kinds <= {"kvfx", "cache"}


def test_fused_projections_and_composed_activations():
    raised = kvfx.compress(tiny_gpt2(), kvfx.Full(), compile=False, verify=False).raised
    drawing = draw_layer(raised, 0)
    assert {"c_attn", "attention", "c_fc", "NewGELUActivation", "ln_1"} <= set(titles(drawing))
    assert ends(drawing)["c_attn", "attention"] == "q, k, v"


def test_norms_of_queries_and_keys():
    raised = kvfx.compress(tiny("qwen3"), kvfx.Full(), compile=False, verify=False).raised
    edges = ends(draw_layer(raised, 0))
    assert ("q_proj", "q_norm") in edges
    assert ("k_norm", "rope") in edges


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there(fast, layer):
    with pytest.raises(InputError, match="it has 0 to 1"):
        draw_layer(fast.raised, layer)


def test_layers_come_in_the_order_of_their_sites(fast):
    assert list(layers_of(fast.graph("prefill"))) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.12.mlp.experts.3", "model.layers.12"),
        ("transformer.h.0", "transformer.h.0"),
        ("lm_head", ""),
        ("model.norm2", ""),
    ],
)
def test_the_layer_in_a_path(path, layer):
    assert layer_in(path) == layer


def test_each_node_has_its_line(fast):
    graph = fast.graph("decode")
    lines = lines_of(graph)
    attend = next(node for node in graph.nodes if "attend_scored_kivi" in str(node.target))
    assert "kvfx.attend_scored_kivi.reference(" in lines[attend]
    assert value_in(lines[attend]) == "f32[B,4,1,32]"
    assert value_in("%site_0_length: i32[B,2]") == "i32[B,2]"
    assert value_in("return [%3]") == ""
