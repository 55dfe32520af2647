"""JoinWrites: what is written slice by slice becomes one `cat`, where nothing else can have been
meant.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.join_writes import JoinWrites

CAT, COPY = torch.ops.aten.cat.default, torch.ops.aten.copy_.default


class Written(nn.Module):
    """A new tensor [B, 3, S, 8] that `fill(new, x, y)` fills from x, y [B, 3, S, 8]."""

    def __init__(self, fill) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x, y):
        new = x.new_empty(x.shape)
        return self.fill(new, x, y) + 1


def in_two_pieces(new, x, y):
    new[..., :5] = x[..., :5]
    new[..., 5:] = y[..., 5:]
    return new


def from_behind(new, x, y):
    new[..., 6:] = y[..., 6:]
    new[..., :2] = y[..., :2]
    new[..., 2:6] = x[..., 2:6]
    return new


def over_heads(new, x, y):
    new[:, :1] = x[:, :1]
    new[:, 1:] = y[:, 1:]
    return new


def broadcast(new, x, y):
    new[..., :5] = x[..., :1]
    new[..., 5:] = y[..., 5:]
    return new


@pytest.mark.parametrize("fill", [in_two_pieces, from_behind, over_heads, broadcast])
def test_pieces_side_by_side(exported, apply, run, fill):
    given = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    graph = exported(Written(fill), *given)
    stats = apply(graph, [Canonicalize(), JoinWrites()])
    assert stats.hits == {"cat": 1}
    assert (len(graph.calls(CAT)), graph.calls(COPY)) == (1, [])
    (found,) = run(graph, *given)
    assert torch.equal(found, Written(fill)(*given))


def gap(new, x, y):
    new[..., :5] = x[..., :5]
    new[..., 6:] = y[..., 6:]
    return new.zero_()


def overlap(new, x, y):
    new[..., :5] = x[..., :5]
    new[..., 4:] = y[..., 4:]
    return new


def moved(new, x, y):
    """As many elements as there are, and not side by side."""
    new[..., :4] = x[..., :4]
    new[..., 2:6] = y[..., 2:6]
    return new


def every_other(new, x, y):
    new[..., ::2] = x[..., ::2]
    new[..., 1::2] = y[..., ::2]
    return new


def another_dtype(new, x, y):
    new[..., :5] = x[..., :5].double()
    new[..., 5:] = y[..., 5:]
    return new


def read_early(new, x, y):
    new[..., :5] = x[..., :5]
    seen = new * 0 + 1
    new[..., 5:] = y[..., 5:]
    return new + seen.nan_to_num(0)


def across(new, x, y):
    new[:, :1] = x[:, :1]
    new[..., 5:] = y[..., 5:]
    return new


@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (gap, "the written slices leave gaps or overlap"),
        (overlap, "the written slices leave gaps or overlap"),
        (moved, "the written slices leave gaps or overlap"),
        (every_other, "the written slices leave gaps or overlap"),
        (another_dtype, "what is written into a slice is of another shape or dtype"),
        (read_early, "a tensor is read while it is filled"),
        (across, "slices along different axes are written"),
    ],
)
def test_what_is_left_alone(exported, apply, fill, reason):
    given = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    graph = exported(Written(fill), *given)
    stats = apply(graph, [Canonicalize(), JoinWrites()])
    assert [miss.reason for miss in stats.misses] == [reason]
    assert len(graph.calls(COPY)) == 2


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_keys_of_models(captured, apply, architecture):
    graph = captured(architecture)
    stats = apply(graph, [Canonicalize(), JoinWrites()])
    assert stats.hits == {"cat": 2}
    assert graph.calls(COPY) == []
