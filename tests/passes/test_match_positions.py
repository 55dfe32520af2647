"""MatchPositions: a lookup by the length becomes one by position, or stays with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kvfx
from kvfx.errors import VerificationError
from kvfx.passes import pipeline
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.match_positions import MatchPositions
from kvfx.testing.architectures import tiny_architecture
from kvfx.testing.tiny import left_padded

RAISE = [Canonicalize(), MatchPositions()]


class Counted(nn.Module):
    """Tokens plus positions: `index(input_ids)` is looked up."""

    def __init__(self, index):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 8), nn.Embedding(90, 8)
        self.index = index

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor) -> Tensor:
        found = self.tokens(input_ids) + self.places(self.index(input_ids))
        return found[:, logits_index]


def index_of(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])


COUNTED = {
    "rows": (index_of, 0),
    "an offset": (lambda ids: index_of(ids) + 2, 2),
    "one row of the batch": (lambda ids: index_of(ids)[None], 0),
    "every row": (lambda ids: index_of(ids).expand(ids.shape[0], -1) + 1, 1),
    "a mask, counted": (lambda ids: torch.ones(ids.shape, dtype=torch.int64).cumsum(1) - 1, None),
}


def captured(module: nn.Module):
    from kvfx.graph import Graph, Level

    inputs = (
        torch.zeros(2, 7, dtype=torch.int64),
        torch.arange(7).expand(2, 7).contiguous(),
        torch.tensor([2, 5]),
    )
    batch, rows = torch.export.Dim("batch"), torch.export.Dim("rows")
    shapes = ({0: batch, 1: rows}, {0: batch, 1: rows}, {})
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    return Graph(exported.module(), Level.CAPTURED)


@pytest.mark.parametrize(("index", "offset"), COUNTED.values(), ids=COUNTED)
def test_what_counts_by_one_reads_positions(apply, run, index, offset):
    module = Counted(index)
    graph = captured(module)
    hits = apply(graph, RAISE).hits
    if offset is None:
        # no range is looked up: translation validation has the last word
        assert not hits
        return
    assert hits == {f"positions + {offset}": 1}
    assert "arange" not in graph.text
    ids = torch.randint(50, (3, 11))
    positions = torch.stack([torch.arange(11) + first for first in (0, 5, 30)])
    every = torch.arange(2)
    expected = (module.tokens(ids) + module.places(positions + offset))[:, every]
    torch.testing.assert_close(run(graph, ids, positions, every)[0], expected)


class Turned(nn.Module):
    """Phases of positions that are counted, [1, 1, S] or [1, S, 1], as rotary embeddings do."""

    turns: Tensor

    def __init__(self, axis):
        super().__init__()
        self.tokens, self.axis = nn.Embedding(50, 8), axis
        self.register_buffer("turns", torch.rand(8))

    def phases(self, positions: Tensor) -> Tensor:
        turns = self.turns[:, None] if self.axis == 1 else self.turns
        phase = positions.unsqueeze(self.axis).float() * turns
        return (phase.transpose(1, 2) if self.axis == 1 else phase).cos()

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1])[None]
        return (self.tokens(input_ids) * self.phases(positions))[:, logits_index]


@pytest.mark.parametrize("axis", [1, 2])
def test_phases_that_count_read_positions(apply, run, axis):
    module = Turned(axis)
    graph = captured(module)
    assert apply(graph, RAISE).hits == {"positions + 0": 1}
    ids = torch.randint(50, (3, 11))
    positions = torch.stack([torch.arange(11) + first for first in (0, 5, 30)])
    every = torch.arange(2)
    expected = (module.tokens(ids) * module.phases(positions))[:, every]
    torch.testing.assert_close(run(graph, ids, positions, every)[0], expected)


OTHERS = {
    "backwards": (lambda ids: ids.shape[1] - 1 - index_of(ids), "not by one from row to row"),
    "from the end": (lambda ids: index_of(ids) + ids.shape[1], "depends on the length itself"),
}


@pytest.mark.parametrize(("index", "reason"), OTHERS.values(), ids=OTHERS)
def test_what_counts_otherwise_has_a_reason(apply, index, reason):
    class Summed(Counted):
        def forward(self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor) -> Tensor:
            place = self.places(self.index(input_ids))
            place = place.sum(1) if place.dim() == 3 else place
            return (self.tokens(input_ids) + place)[:, logits_index]

    stats = apply(captured(Summed(index)), RAISE)
    (miss,) = stats.misses
    assert reason in miss.reason


@pytest.mark.parametrize("architecture", ["bart", "marian", "trocr"])
def test_models_that_take_no_positions(architecture, monkeypatch):
    """They generate in padded batches what they generate alone; without the pass, they are
    refused.
    """
    model = tiny_architecture(architecture)
    fast = kvfx.compress(model, "full", compile=False)
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = left_padded((20, 9))
    said = fast.generate(**batch, **options)
    for row, length in enumerate((20, 9)):
        alone = batch["input_ids"][row : row + 1, -length:]
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(said[row, 20 - length :], expected[0])
    passes = tuple(p for p in pipeline.raise_passes() if p.name != "match-positions")
    monkeypatch.setattr("kvfx.compiler.raise_passes", lambda own: passes)
    with pytest.raises(VerificationError, match="differs from the model"):
        # one that was not raised and proven before
        kvfx.compress(tiny_architecture(architecture), "full", compile=False)
