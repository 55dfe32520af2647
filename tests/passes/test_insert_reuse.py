"""InsertReuse: what the programs `partial` and `precheck` are made of, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import FileCheck

from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.graph import Graph, Level
from kvfx.pass_manager import run_passes
from kvfx.passes.insert_reuse import KINDS, Check, InsertReuse
from kvfx.passes.pipeline import Target, raise_passes, reuse_passes
from kvfx.provenance import origin

ROWS = 23


def live(graph: Graph, batch: int, rows: int) -> list[Tensor]:
    return [
        torch.zeros(batch, site.kv_heads, rows, width)
        for site in graph.sites
        for width in (site.head_dim, site.value_dim)
    ]


def inputs_of(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_partial_in_batches(raised, apply, run, inputs, architecture):
    """Requests of one batch are at positions of their own, and one of them is padded."""
    graph = raised(architecture)
    ids, positions, index = inputs(2, ROWS)
    (expected,) = run(graph, ids, positions, index)
    stats = apply(graph, [InsertReuse(check=None, watch=None)])
    assert stats.hits == {"partial": 2}
    assert (graph.program, graph.level) == ("partial", Level.CACHED)
    order = torch.stack([torch.randperm(ROWS) for _ in range(2)])
    ids, positions = ids.gather(1, order), order.clone()
    positions[1, order[1] > 17] = -1
    (found,) = run(graph, ids, positions, index, *live(graph, 2, ROWS + 4))
    for batch, last in ((0, ROWS), (1, 18)):
        seen = order[batch] < last
        assert (found[batch, seen] - expected[batch, order[batch, seen]]).abs().max() < 1e-4


def test_ops_of_partial(raised, apply):
    graph = raised("gemma3_text")
    apply(graph, [InsertReuse(check=None, watch=3)])
    FileCheck().check_not("kvfx.attention(").run(graph.text)
    for name, count in (("scatter_rows", 4), ("attend_rows", 4), ("column_attention", 1)):
        FileCheck().check_count(f"kvfx.{name}(", count, exactly=True).run(graph.text)
    windows = [
        str(node.kwargs.get("window")) for node in graph.calls(torch.ops.kvfx.attend_rows.default)
    ]
    assert windows == ["16", "16", "16", "None"]
    assert inputs_of(graph)[3:] == [
        f"site_{site}_{name}" for site in range(4) for name in ("k_rows", "v_rows")
    ]
    marks = {mark for node in graph.nodes if (mark := origin(node)) is not None}
    added = {(mark.site, mark.rule) for mark in marks if mark.by == "insert-reuse"}
    assert added == {("", "hide-padding"), *((site.name, "partial") for site in graph.sites)}


@pytest.mark.parametrize("kind", KINDS)
def test_ops_of_precheck(raised, apply, kind):
    graph = raised("llama", {"num_hidden_layers": 3})
    apply(graph, [InsertReuse(Check(1, kind), watch=None)])
    assert inputs_of(graph)[3:6] == ["must", "may", "slots"]
    norms = [str(node.kwargs["norm"]) for node in graph.calls(torch.ops.kvfx.row_deviation.default)]
    assert sorted(norms) == (["l1"] if kind == "attention" else ["l1", "l2"])
    weighed = graph.calls(torch.ops.kvfx.weigh_rows.default)
    assert len(weighed) == (kind == "attention")
    # what was there is compared before it is overwritten
    check = FileCheck().check("scatter_rows").check("row_deviation").check("scatter_rows")
    check.check("choose_rows").check("attend_rows").check("scatter_rows").run(graph.text)
    # the query and the residual stream are taken: nothing else goes on
    taken = [node.kwargs["axis"] for node in graph.calls(torch.ops.kvfx.take_rows.default)]
    assert taken == [2, 1]
    assert len(graph.calls(torch.ops.aten.cos.default)) == 2


def test_precheck_in_batches(raised, apply, run, inputs):
    """Each request of a batch goes on with rows of its own."""
    graph = raised("llama")
    ids, positions, index = inputs(2, ROWS)
    (expected,) = run(graph, ids, positions, index)
    apply(graph, [InsertReuse(Check(0, "values"), watch=None)])
    must = torch.zeros(2, ROWS, dtype=torch.bool)
    must[0, [3, 7, 22]] = must[1, [0, 20, 21]] = True
    rows = live(graph, 2, ROWS)
    none = torch.zeros_like(must)
    logits, deviation, chosen = run(
        graph, ids, positions, torch.arange(4), must, none, torch.empty(4), *rows
    )
    assert chosen.tolist() == [[3, 7, 22, -1], [0, 20, 21, -1]]
    assert deviation.shape == (2, 2, ROWS)
    # the row at position 0 needs no other row: it is the dense one
    assert (logits[1, 0] - expected[1, 0]).abs().max() < 1e-4
    assert bool((rows[2][0, :, [3, 7, 22]] != 0).all())
    assert bool((rows[2][0, :, [0, 1, 2, 4, 21]] == 0).all())
    assert bool((rows[2][1, :, [3, 7, 22]] == 0).all())


def test_the_pipeline_of_reuse(raised):
    target = Target("reference", inductor_cpu=False)
    graph = run_passes(raised("llama"), reuse_passes(Check(0, "keys"), 1, target), None)
    assert (graph.program, graph.level) == ("precheck", Level.LOWERED)
    FileCheck().check("kvfx.scatter_rows.reference(").run(graph.text)


def test_checks_are_of_a_known_kind():
    with pytest.raises(PolicyError, match=r"kind='norm'\): choose one of values, keys, attention"):
        Check(1, "norm")


@pytest.mark.parametrize(("check", "watch"), [(Check(2, "keys"), None), (None, 5), (None, -1)])
def test_sites_must_be_there(raised, check, watch):
    with pytest.raises(UnsupportedShape, match="the model has 2 sites"):
        run_passes(raised("llama"), [InsertReuse(check, watch)], None)


class Dilated(nn.Module):
    """A causal mask that sees every other token: no family."""

    def forward(self, input_ids, position_ids):
        rows = torch.arange(input_ids.shape[1])
        distance = rows[:, None] - rows
        return ((distance >= 0) & (distance % 2 == 0))[None, None]


def test_masks_must_be_proven(captured_decoder, decoder):
    graph = run_passes(captured_decoder(decoder(Dilated())), raise_passes(), None)
    with pytest.raises(UnsupportedShape, match="rows need a mask that is proven"):
        run_passes(graph, [InsertReuse(check=None, watch=None)], None)
