"""What stands between a softmax and the product of queries and keys: read, or a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.match_attention import MatchAttention

RAISE = [Canonicalize(), MatchAttention()]


class Written(nn.Module):
    """`weights(q, k, mask)` times the values."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.register_buffer("root", torch.tensor(8.0).sqrt())
        self.register_buffer("logits", torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.shape[2]
        mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)[None, None]
        return torch.matmul(self.weights(self, q, k, mask), v)


def given() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, 7, 8) for _ in range(3))


def plain(module, q, k, mask):
    return ((q @ k.transpose(-1, -2)) / module.root + mask).softmax(-1)


def in_fp32(module, q, k, mask):
    scores = torch.matmul(q.double(), k.double().transpose(2, 3)) * 0.25
    return nn.functional.dropout((mask + scores).softmax(3).to(q.dtype), 0.1, training=False)


def twice_scaled(module, q, k, mask):
    return (2.0 * (q @ k.permute(0, 1, 3, 2)) * 0.25 + mask).softmax(-1)


def mask_scaled_too(module, q, k, mask):
    return ((q @ k.transpose(-1, -2) + mask) / 4.0).softmax(-1)


def two_masks(module, q, k, mask):
    return (q @ k.transpose(-1, -2) + mask / 8 + mask / 4).softmax(-1)


def filled(module, q, k, mask):
    scores = (q @ k.transpose(-1, -2)).masked_fill(mask < 0, -1e9)
    return scores.softmax(-1)


def chosen(module, q, k, mask):
    scores = torch.where(mask == 0, q @ k.transpose(-1, -2), torch.full([], -1e9))
    return torch.max(scores, torch.tensor(torch.finfo(torch.float32).min)).softmax(-1)


def capped(module, q, k, mask):
    scores = q @ k.transpose(-1, -2) * 0.25
    return (5.0 * torch.tanh(scores / 5.0) + mask).softmax(-1)


def with_sinks(module, q, k, mask):
    scores = q @ k.transpose(2, 3) * 0.25 + mask
    sinks = module.logits.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    every = torch.cat([scores, sinks], -1)
    every = every - every.max(-1, keepdim=True).values
    return every.softmax(-1)[..., :-1]


@pytest.mark.parametrize(
    ("weights", "rules"),
    [
        (plain, {"scale": 8**-0.5}),
        (in_fp32, {"scale": 0.25}),
        (mask_scaled_too, {"scale": 0.25}),
        (twice_scaled, {"scale": 0.5}),
        (two_masks, {"scale": 1.0}),
        (filled, {"scale": 1.0}),
        (chosen, {"scale": 1.0}),
        (capped, {"scale": 0.25, "softcap": 5.0}),
        (with_sinks, {"scale": 0.25}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_operands_are_read(exported, apply, run, weights, rules):
    module, inputs = Written(weights), given()
    graph = exported(module, *inputs)
    stats = apply(graph, RAISE)
    assert stats.hits == {"softmax": 1}
    (node,) = graph.calls(torch.ops.kvfx.attention.default)
    for name, value in {"softcap": 0.0, **rules}.items():
        assert node.kwargs.get(name, 0.0) == pytest.approx(value)
    assert ("sinks" in node.kwargs) == (weights is with_sinks)
    assert not [each for each in graph.nodes if "softmax" in str(each.target)]
    torch.testing.assert_close(run(graph, *inputs)[0], module(*inputs))


def no_mask(module, q, k, mask):
    return (q @ k.transpose(-1, -2)).softmax(-1)


def capped_masks(module, q, k, mask):
    return torch.tanh(q @ k.transpose(-1, -2) + mask).softmax(-1)


def capped_twice(module, q, k, mask):
    return (torch.tanh(torch.tanh(q @ k.transpose(-1, -2))) + mask).softmax(-1)


def filled_with_little(module, q, k, mask):
    return (q @ k.transpose(-1, -2)).masked_fill(mask < 0, -1.0).softmax(-1)


def sink_stays(module, q, k, mask):
    return with_sinks_of(module.logits.reshape(1, -1, 1, 1), q, k, mask)[..., 1:]


def sink_from_tokens(module, q, k, mask):
    return with_sinks_of(q.sum((2, 3), keepdim=True), q, k, mask)[..., :-1]


def with_sinks_of(sinks, q, k, mask):
    scores = q @ k.transpose(2, 3) + mask
    return torch.cat([scores, sinks.expand(q.shape[0], -1, q.shape[2], -1)], -1).softmax(-1)


def rooted(module, q, k, mask):
    return ((q @ k.transpose(-1, -2)).sqrt() + mask).softmax(-1)


def over_rows(module, q, k, mask):
    return (q @ k.transpose(-1, -2) + mask).softmax(2)


def no_transpose(module, q, k, mask):
    return (q @ k.flatten(2).unflatten(2, (8, -1)) + mask).softmax(-1)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (no_mask, "bidirectional"),
        (capped_masks, "a mask is added to scores before they are capped"),
        (capped_twice, "capped twice"),
        (filled_with_little, "does not hide"),
        (sink_stays, "not dropped again"),
        (sink_from_tokens, "not one learned logit per head"),
        (rooted, "sqrt"),
        (over_rows, "softmax over axis 2"),
        (no_transpose, "no product with transposed keys"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_cannot_be_read_has_a_reason(exported, apply, weights, reason):
    graph = exported(Written(weights), *given())
    apply(graph, RAISE)
    (miss,) = graph.missed.values()
    assert reason in miss.reason
