"""SnapshotReads: what is read ahead of an opaque write is copied, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from kvfx import H2O, KIVI, Full
from kvfx.ops import name_of, overload
from kvfx.passes.snapshot_reads import SnapshotReads

POLICY = H2O(budget=8, interval=2)


def ops(graph, name: str):
    return [node for node in graph.nodes if name_of(node.target) == name]


def test_a_read_ahead_of_a_write_sees_a_copy(lowered, apply):
    _, graphs = lowered("llama", policy=POLICY, programs=("prefill",))
    stats = apply(graphs["prefill"], [SnapshotReads()])
    assert stats.hits == {"site_0_length": 1, "site_1_length": 1}
    order = graphs["prefill"].nodes
    calls = (
        ops(graphs["prefill"], f"{verb}") for verb in ("snapshot", "store_entries", "store_dense")
    )
    for index, (copy, entries, dense) in enumerate(zip(*calls, strict=True)):
        length = graphs["prefill"].input(f"site_{index}_length")
        assert copy.args == (length,)
        assert copy in entries.args
        assert length not in entries.args
        assert length in dense.args
        assert order.index(copy) < order.index(entries) < order.index(dense)


@pytest.mark.parametrize(
    ("policy", "program"),
    [
        (Full(), "prefill"),
        (Full(), "extend"),
        (Full(), "decode"),
        (POLICY, "decode"),
        (KIVI(4), "compact"),
    ],
    ids=str,
)
def test_what_nothing_reads_ahead_is_not_copied(lowered, apply, policy, program):
    """Traced writes are no danger: compilers see them. Nor are reads by ops that are not traced."""
    _, graphs = lowered("llama", {"head_dim": 32}, policy, (program,))
    before = graphs[program].text
    assert not apply(graphs[program], [SnapshotReads()]).hits
    assert graphs[program].text == before


def test_reads_between_two_writes_have_a_copy_of_their_own(lowered, apply):
    """The second sees what the first write left."""
    _, graphs = lowered("llama", policy=POLICY, programs=("prefill",))
    graph = graphs["prefill"]
    entries, dense = ops(graph, "store_entries")[0], ops(graph, "store_dense")[0]
    with graph.module.graph.inserting_after(dense):
        again = graph.module.graph.node_copy(dense)
    with graph.module.graph.inserting_before(again):
        late = graph.module.graph.node_copy(entries)
    graph.module.graph.lint()
    assert apply(graph, [SnapshotReads()]).hits["site_0_length"] == 2
    first, second = (node.args[2] for node in (entries, late))
    assert first is not second
    assert graph.nodes.index(dense) < graph.nodes.index(second) < graph.nodes.index(late)


@pytest.mark.slow
def test_inductor_needs_it():
    """The smallest case, as torch has it; if this fails, the pass may go."""

    def write(read):
        def run(x, keep, k, k_cache, v_cache, length, entries):
            number = overload("store_entries", "reference")
            number(x, keep, read(length), entries)
            overload("store_dense", "reference")(k, k, keep, k_cache, v_cache, length)

        return run

    def found(run):
        generator = torch.Generator().manual_seed(0)
        x, k = (torch.rand(shape, generator=generator) for shape in ((2, 2, 9), (2, 2, 9, 4)))
        keep, length = torch.ones(2, 2, 9, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int32)
        entries = torch.zeros(2, 2, 16)
        run(x, keep, k, torch.zeros(2, 2, 16, 4), torch.zeros(2, 2, 16, 4), length, entries)
        return entries

    snapshot = overload("snapshot", "reference")
    expected = found(write(lambda length: length))
    assert torch.equal(found(torch.compile(write(snapshot), fullgraph=True)), expected)
    assert not torch.equal(
        found(torch.compile(write(lambda length: length), fullgraph=True)), expected
    )
