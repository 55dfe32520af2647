"""Cuts: which tensors K and V are computed from, and that nothing mixes tokens behind them."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, fx, nn

from kvfx.cuts import Cut, Tokens, find_cut
from kvfx.graph import Graph, Level, Miss, call
from kvfx.ops import overload
from kvfx.pass_manager import run_passes
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.join_writes import JoinWrites
from kvfx.passes.match_attention import MatchAttention
from kvfx.provenance import Stamp
from kvfx.rebuild import refute

CPU = torch.device("cpu")
VOCAB, WIDE, HEADS, HEAD = 50, 40, 4, 12


class Decoder(nn.Module):
    """One attention, whose keys and values `make(module, x, position_ids)` computes from the hidden
    state [B, S, 40].
    """

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make
        self.embed, self.head = nn.Embedding(VOCAB, WIDE), nn.Linear(HEADS * HEAD, VOCAB)
        self.down, self.up = nn.Linear(WIDE, 6), nn.Linear(6, 2 * HEADS * HEAD, bias=False)
        self.norm, self.query = nn.LayerNorm(WIDE), nn.Linear(WIDE, HEADS * HEAD)
        self.shared, self.wide = nn.Linear(WIDE, HEAD), nn.Linear(WIDE, 2 * HEADS * HEAD)
        self.conv = nn.Conv1d(HEADS * HEAD, HEADS * HEAD, 3, groups=HEADS)
        self.mix = nn.Linear(HEADS, HEADS)

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm(x)
        k, v = self.make(self, h, position_ids)
        q = heads(self.query(h))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        o = o.transpose(1, 2).flatten(2)
        return self.head(o)[:, logits_index] + x[:, logits_index, :1]


def heads(x: Tensor) -> Tensor:
    """[B, S, H D] -> [B, H, S, D]."""
    return x.unflatten(2, (-1, HEAD)).transpose(1, 2)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    k, v = x.chunk(2, -1)
    return heads(k), heads(v)


def low_rank(model, h, position_ids):
    return halves(model.up(model.down(h)))


def low_rank_gated(model, h, position_ids):
    """Arithmetic between the latent and the heads."""
    x = model.down(h)
    return halves(model.up(x * x.sigmoid() / (1 + x.abs().amax(-1, keepdim=True))))


def with_positions(model, h, position_ids):
    """A latent, and one key that is turned by its position and shared by heads."""
    k, v = low_rank(model, h, position_ids)
    angle = (position_ids[:, :, None] * torch.arange(1, HEAD + 1) * 0.1).float()
    return k + (model.shared(h) * angle.cos())[:, None], v


def wide(model, h, position_ids):
    return halves(model.wide(h))


def one_tensor(model, h, position_ids):
    """Values that are keys, but for their sign."""
    x = model.shared(h)[:, None]
    return x, -x


def two_narrow(model, h, position_ids):
    """One head of keys and values: together narrower than the hidden state."""
    return model.shared(h)[:, None], model.query(h)[:, None, :, :HEAD]


def flat(model, h, position_ids):
    """Through [B S, D], as fused projections are written."""
    batch, rows = h.shape[:2]
    x = model.up(model.down(h).view(-1, 6)).view(batch, rows, -1)
    return halves(x)


def causal_conv(model, h, position_ids):
    """Keys mixed over tokens behind the latent."""
    k, v = low_rank(model, h, position_ids)
    x = k.transpose(2, 3).flatten(1, 2)
    x = model.conv(nn.functional.pad(x, (2, 0)))
    return x.unflatten(1, (HEADS, HEAD)).transpose(2, 3), v


def summed(model, h, position_ids):
    k, v = low_rank(model, h, position_ids)
    return k.cumsum(2), v


def turned_over(model, h, position_ids):
    k, v = low_rank(model, h, position_ids)
    return k.flip(2), v


def normed_over_tokens(model, h, position_ids):
    k, v = low_rank(model, h, position_ids)
    return k.softmax(2), v


def seen_as_others(model, h, position_ids):
    """A view that takes heads for tokens: every size is right and no element is."""
    k, v = low_rank(model, h, position_ids)
    batch, _, rows, _ = k.shape
    flat = k.transpose(1, 2).reshape(batch, rows * HEADS, HEAD)
    return flat.view(batch, HEADS, rows, HEAD), v


def scaled_by_length(model, h, position_ids):
    k, v = low_rank(model, h, position_ids)
    return k * h.shape[1], v


def counted(model, h, position_ids):
    """A table of positions that is counted and not given."""
    k, v = low_rank(model, h, position_ids)
    return k + torch.arange(h.shape[1])[:, None], v


def cut_of(make, attention: int = 0) -> tuple[Graph, Cut | Miss]:
    """The cut of a decoder's attention, and its graph."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(make).eval().requires_grad_(False)
    ids = torch.arange(14).reshape(2, 7)
    names = [torch.export.Dim(name, min=1) for name in ("batch", "rows", "kept")]
    tokens = {0: names[0], 1: names[1]}
    found = torch.export.export(
        model,
        (ids, ids % 7, torch.tensor([1, 3, 4])),
        dynamic_shapes=(tokens, tokens, {0: names[2]}),
        strict=False,
    )
    graph = Graph(found.module(), Level.CAPTURED).copy()
    run_passes(graph, [Canonicalize(), JoinWrites(), MatchAttention()], None)
    node = graph.calls(overload("attention"))[attention]
    return graph, find_cut(Tokens(graph), node)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (low_rank, ((6,),)),
        (low_rank_gated, ((6,),)),
        (flat, ((6,),)),
        (with_positions, ((6,), (1, HEAD))),
        (wide, ((WIDE,),)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_cheapest_cut(make, shapes):
    graph, cut = cut_of(make)
    assert isinstance(cut, Cut)
    assert cut.shapes == shapes
    assert refute(graph, cut, torch.float32, CPU) is None


def test_the_cut_is_the_nearest_of_the_cheapest():
    graph, cut = cut_of(low_rank_gated)
    assert isinstance(cut, Cut)
    targets = [str(node.target) for node in cut.template.nodes]
    assert "aten.linear.default" in targets
    assert "aten.sigmoid.default" not in targets
    (name,) = cut.names
    assert str(next(n for n in graph.nodes if n.name == name).target) == "aten.div.Tensor"


MIXED = (
    causal_conv,
    summed,
    turned_over,
    normed_over_tokens,
    seen_as_others,
    scaled_by_length,
    counted,
)


@pytest.mark.parametrize("make", MIXED, ids=lambda make: make.__name__)
def test_nothing_that_mixes_tokens_lies_behind_a_cut(make):
    """Keys are kept as they are, and values, whose latent is narrower, by that."""
    graph, cut = cut_of(make)
    assert isinstance(cut, Cut)
    node = graph.calls(overload("attention"))[0]
    assert cut.shapes == ((6,), (HEADS, HEAD))
    assert node.args[1].name in cut.names
    assert refute(graph, cut, torch.float32, CPU) is None


def test_keys_and_values_that_nothing_is_narrower_than():
    graph, cut = cut_of(two_narrow)
    assert isinstance(cut, Cut)
    node = graph.calls(overload("attention"))[0]
    assert set(cut.names) == {node.args[1].name, node.args[2].name}
    assert sum(cut.widths) == 2 * HEAD


def test_a_tensor_that_both_are_computed_from_is_kept_once():
    graph, cut = cut_of(one_tensor)
    assert isinstance(cut, Cut)
    assert cut.shapes == ((1, HEAD),)
    assert refute(graph, cut, torch.float32, CPU) is None


def test_a_view_that_takes_heads_for_tokens_mixes_them():
    """Every size is as it should be, and the elements of a token come from several."""
    graph, _ = cut_of(low_rank)
    node = graph.calls(overload("attention"))[0]
    k = node.args[1]
    size, mark = torch.ops.aten.sym_size.int, Stamp("", "test", "test")
    with graph.module.graph.inserting_before(node):
        batch, rows = (call(graph, size, (graph.input("input_ids"), axis), mark) for axis in (0, 1))
        sizes = [batch, HEADS, rows, HEAD]
        viewed = graph.module.graph.call_function(
            torch.ops.aten.reshape.default, (k.args[0], sizes)
        )
    viewed.meta = dict(k.meta)
    node.replace_input_with(k, viewed)
    graph.clean()
    cut = find_cut(Tokens(graph), node)
    assert isinstance(cut, Cut)
    assert viewed.name in cut.names


def test_a_cut_that_mixes_tokens_is_refuted():
    """The proof does not rest on the rules: a template with another op is found out."""
    graph, cut = cut_of(low_rank)
    assert isinstance(cut, Cut)
    for target in (torch.ops.aten.cumsum.default, torch.ops.aten.roll.default):
        broken = fx.Graph()
        k, v = cast(tuple[fx.Node, fx.Node], broken.graph_copy(cut.template, {}))
        more = (2,) if target is torch.ops.aten.cumsum.default else ([1], [2])
        with broken.inserting_after(k):
            mixed = broken.call_function(target, (k, *more))
        broken.output((mixed, v))
        found = refute(graph, Cut(cut.names, cut.shapes, cut.axes, broken), torch.float32, CPU)
        assert isinstance(found, Miss)
        assert found.reason == "K and V of a token depend on other tokens"
