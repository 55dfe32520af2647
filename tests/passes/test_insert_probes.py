"""InsertProbes: sites that a policy may change report what they do, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import FileCheck

from kvfx.graph import Level, Miss
from kvfx.pass_manager import run_passes
from kvfx.passes.insert_probes import STATISTICS, InsertProbes, is_probed, residual_sum
from kvfx.passes.pipeline import raise_passes
from kvfx.provenance import origin
from kvfx.testing.tiny import tiny

ROWS = 70
# architecture -> sites that are probed: rotated, learned positions, windows, parallel blocks
PROBED = {"llama": 2, "gpt2": 2, "gemma3_text": 1, "gpt_neox": 2, "olmo2": 2, "phi3": 2}


@pytest.mark.parametrize("architecture", PROBED)
def test_logits_stay_and_statistics_follow(raised, apply, run, inputs, architecture):
    graph = raised(architecture)
    expected = run(graph, *inputs(2, ROWS))
    stats = apply(graph, [InsertProbes()])
    assert stats.hits == {"probe": PROBED[architecture]}
    assert (graph.program, graph.level) == ("calibrate", Level.CACHED)
    logits, *measured = run(graph, *inputs(2, ROWS))
    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-5)
    assert len(measured) == PROBED[architecture] * len(STATISTICS)
    for value in measured:
        assert value.shape[0] == 2
        assert bool(value.isfinite().all())


def test_ops_of_a_probe(raised, apply):
    graph = raised("llama")
    apply(graph, [InsertProbes()])
    check = FileCheck().check_not("kvfx.attention(")
    for name in ("attend_prompt", "live_rows", "score_columns", "probe", "probe_similarity"):
        check.check_count(f"kvfx.{name}(", 2, exactly=True).run(graph.text)
        check = FileCheck()
    marks = [origin(node) for node in graph.nodes]
    added = [mark for mark in marks if mark is not None and mark.by == "insert-probes"]
    assert {mark.site for mark in added} == {site.name for site in graph.sites}
    assert {mark.rule for mark in added} == {"probe", "attend", "similarity"}


def test_windows_are_not_probed(raised, apply):
    graph = raised("gemma3_text")
    stats = apply(graph, [InsertProbes()])
    assert [is_probed(site) for site in graph.sites] == [False, False, False, True]
    assert [(miss.at, miss.reason) for miss in stats.misses] == [
        (site.name, "the model sees window 16") for site in graph.sites[:3]
    ]
    check = FileCheck().check_count("kvfx.attend_prompt(", 4, exactly=True)
    check.run(graph.text)
    FileCheck().check_count("window=16)", 3, exactly=True).run(graph.text)
    assert {origin(node).site for node in graph.nodes if "probe" in str(node.target)} == {
        graph.sites[3].name
    }


class Dilated(nn.Module):
    """A causal mask that sees every other token: no family."""

    def forward(self, input_ids, position_ids):
        rows = torch.arange(input_ids.shape[1])
        distance = rows[:, None] - rows
        return ((distance >= 0) & (distance % 2 == 0))[None, None]


def test_masks_that_are_not_proven_are_not_probed(captured_decoder, decoder, apply, run, inputs):
    graph = run_passes(captured_decoder(decoder(Dilated())), raise_passes(), None)
    expected = run(graph, *inputs(2, ROWS))
    stats = apply(graph, [InsertProbes()])
    assert [miss.reason for miss in stats.misses] == ["the mask is not proven"]
    assert stats.hits == {}
    FileCheck().check("scaled_dot_product_attention").check_not("probe").run(graph.text)
    found = run(graph, *inputs(2, ROWS))
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected[0])


class Bare(nn.Module):
    """An attention whose output is the logits: there is no residual stream."""

    def forward(self, input_ids, position_ids):
        return None


def test_a_model_without_a_residual_stream_has_no_similarity(
    captured_decoder, decoder, apply, run, inputs
):
    graph = run_passes(captured_decoder(decoder(Bare())), raise_passes(), None)
    attention = graph.calls(torch.ops.kvfx.attention.default)[0]
    found = residual_sum(graph, attention)
    assert isinstance(found, Miss)
    assert found.reason == "nothing that its queries come from is added to what it gives"
    stats = apply(graph, [InsertProbes()])
    assert [miss.reason for miss in stats.misses] == [found.reason]
    measured = run(graph, *inputs(2, ROWS))[1:]
    assert len(measured) == len(STATISTICS)
    assert [value is None for value in measured] == [name == "similarity" for name in STATISTICS]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_similarity_is_that_of_the_residual_stream(raised, apply, run, inputs, architecture):
    """Against hooks on the modules of the model: what goes into a block, and what its second norm
    gets.
    """
    graph = raised(architecture)
    apply(graph, [InsertProbes()])
    ids, positions, index = inputs(2, ROWS)
    measured = run(graph, ids, positions, index)[1:]
    found = measured[len(STATISTICS) - 1 :: len(STATISTICS)]

    model = tiny(architecture)
    blocks = model.transformer.h if architecture == "gpt2" else model.model.layers
    second = {
        "llama": "post_attention_layernorm",
        "gpt2": "ln_2",
        "gemma3_text": "pre_feedforward_layernorm",
    }
    seen = []
    for block in blocks.children():
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        norm = getattr(block, second[architecture])
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
    cosines = [
        torch.cosine_similarity(before, after, dim=-1).mean(1)
        for before, after in zip(seen[::2], seen[1::2], strict=True)
    ]
    expected = [
        cosine for cosine, site in zip(cosines, graph.sites, strict=True) if is_probed(site)
    ]
    assert len(found) == len(expected)
    for value, cosine in zip(found, expected, strict=True):
        torch.testing.assert_close(value, cosine, rtol=1e-5, atol=1e-5)


def test_parallel_blocks_are_compared_as_a_whole(raised, apply, run, inputs):
    """GPT-NeoX adds attention to its MLP first: that sum is no residual stream."""
    graph = raised("gpt_neox")
    apply(graph, [InsertProbes()])
    ids, positions, index = inputs(2, ROWS)
    found = run(graph, ids, positions, index)[len(STATISTICS) :: len(STATISTICS)]
    model, expected = tiny("gpt_neox"), []

    def compare(_, args, out):
        out = out if isinstance(out, torch.Tensor) else out[0]
        expected.append(torch.cosine_similarity(args[0], out, dim=-1).mean(1))

    for block in model.gpt_neox.layers.children():
        block.register_forward_hook(compare)
    with torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-5)
