"""SpecializeRows: sizes that counted rows are constants, and the numbers are those of one row."""

from __future__ import annotations

import pytest
import torch
from torch.testing import FileCheck

from kvfx.passes.specialize_rows import SpecializeRows

aten = torch.ops.aten
ARCHITECTURES = ["llama", "gpt2", "gemma3_text", "cohere", "opt"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 5])
def test_row_counts_are_constants(raised, apply, architecture, rows):
    graph = raised(architecture)
    counted = [node for node in graph.calls(aten.sym_size.int) if node.args[1] == 1]
    stats = apply(graph, [SpecializeRows(rows)])
    assert stats.hits["row-count"] == len(counted)
    assert [node for node in graph.calls(aten.sym_size.int) if node.args[1] == 1] == []
    FileCheck().check(f"%input_ids: i64[B,{rows}]").check(f"%position_ids: i64[B,{rows}]").run(
        graph.text
    )
    for node in graph.calls(torch.ops.kvfx.attention.default):
        assert node.args[0].meta["val"].shape[2] == rows
        assert isinstance(node.args[0].meta["val"].shape[0], torch.SymInt)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_of_one_row(raised, apply, run, inputs, architecture, batch):
    graph, given = raised(architecture), inputs(batch, 1)
    before = run(graph, *given)[0]
    apply(graph, [SpecializeRows(1)])
    assert torch.equal(run(graph, *given)[0], before)
