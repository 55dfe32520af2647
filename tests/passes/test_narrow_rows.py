"""Narrowing: what goes on with some of the rows, and what refuses to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvfx.errors import UnsupportedShape
from kvfx.pass_manager import run_passes
from kvfx.passes.insert_reuse import Check, InsertReuse
from kvfx.passes.pipeline import raise_passes

ROWS = 9


class Model(nn.Module):
    """One attention; `rest(x, o, position_ids)` makes the logits [B, S, V] of what goes in, x [B,
    S, 16], and of what comes out.
    """

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.embed, self.rest = nn.Embedding(99, 16), rest

    def forward(self, input_ids, position_ids, logits_index):
        x = self.embed(input_ids)
        q = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
        o = nn.functional.scaled_dot_product_attention(q, q + 1, q, is_causal=True)
        o = o.transpose(1, 2).reshape(*x.shape[:2], 16)
        return self.rest(x, o, position_ids)[:, logits_index]


class Residual(nn.Module):
    """Tokens, positions, and sizes are used behind the attention."""

    def forward(self, x, o, position_ids):
        batch, rows = position_ids.shape
        o = (o + x).reshape(batch * rows, 16).sin().view(batch, rows, 16)
        return o * (position_ids * 0.3).cos()[..., None] + o.shape[1] * 0


class Flat(nn.Module):
    """What goes in has lost its axis of rows before it is used."""

    def forward(self, x, o, position_ids):
        return (o.flatten(0, 1) + x.flatten(0, 1)).view(o.shape)


class Mean(nn.Module):
    """What goes in is averaged over rows."""

    def forward(self, x, o, position_ids):
        return o + x.mean(1, keepdim=True)


class Counted(nn.Module):
    """Rows are told apart by their index."""

    def forward(self, x, o, position_ids):
        return o + torch.arange(o.shape[1])[:, None]


@pytest.fixture
def narrowed(captured_decoder):
    """`narrowed(rest)`: the raised graph of a model, and the same narrowed behind its attention."""

    def build(rest: nn.Module):
        graph = run_passes(captured_decoder(Model(rest).eval()), raise_passes(), None)
        return graph, run_passes(graph.copy(), [InsertReuse(Check(0, "values"), None)], None)

    return build


def test_tokens_positions_and_sizes_are_those_of_the_chosen_rows(narrowed, run, inputs):
    graph, program = narrowed(Residual())
    ids, positions, index = inputs(2, ROWS)
    (expected,) = run(graph, ids, positions, index)
    must = torch.zeros(2, ROWS, dtype=torch.bool)
    must[0, [1, 4, 8]] = must[1, [0, 5, 6]] = True
    live = [torch.zeros(2, 2, ROWS, 8) for _ in range(2)]
    logits, _, chosen = run(
        program, ids, positions, torch.arange(3), must, must, torch.empty(3), *live
    )
    for batch in range(2):
        torch.testing.assert_close(logits[batch], expected[batch, chosen[batch]])
    # values were inferred again: what counted rows counts chosen ones
    rows, slots = (program.input(name).meta["val"].shape[-1] for name in ("must", "slots"))
    attend = program.calls(torch.ops.kvfx.attend_rows.default)[0]
    after = program.nodes[program.nodes.index(attend) :]
    sizes = {str(size) for node in after for size in getattr(node.meta.get("val"), "shape", ())}
    assert str(slots) in sizes
    assert str(rows) not in sizes


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (Flat(), "has 0 axes of rows instead of one"),
        (Mean(), "has 0 axes of rows instead of one"),
        (Counted(), "counts rows by their index"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_one_value_per_row_is_refused(narrowed, rest, reason):
    with pytest.raises(UnsupportedShape, match=reason):
        narrowed(rest)
