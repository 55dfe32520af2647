"""Attention that is written out around a softmax: its operands, or a reason; and real models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kvfx
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.match_attention import MatchAttention
from kvfx.testing.tiny import left_padded, tiny

RAISE = [Canonicalize(), MatchAttention()]


class Written(nn.Module):
    """`weights(q, k, mask)` times the values."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.register_buffer("root", torch.tensor(8.0).sqrt())

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


@pytest.mark.parametrize(
    ("weights", "scale"),
    [(plain, 8**-0.5), (in_fp32, 0.25), (mask_scaled_too, 0.25)],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_operands_are_read(exported, apply, run, weights, scale):
    module, inputs = Written(weights), given()
    graph = exported(module, *inputs)
    stats = apply(graph, RAISE)
    assert stats.hits == {"softmax": 1}
    (node,) = graph.calls(torch.ops.kvfx.attention.default)
    assert node.kwargs["scale"] == pytest.approx(scale)
    assert not [each for each in graph.nodes if "softmax" in str(each.target)]
    torch.testing.assert_close(run(graph, *inputs)[0], module(*inputs))


def no_mask(module, q, k, mask):
    return (q @ k.transpose(-1, -2)).softmax(-1)


def two_masks(module, q, k, mask):
    return (q @ k.transpose(-1, -2) + mask + 2 * mask).softmax(-1)


def capped(module, q, k, mask):
    return (torch.tanh(q @ k.transpose(-1, -2)) + mask).softmax(-1)


def over_rows(module, q, k, mask):
    return (q @ k.transpose(-1, -2) + mask).softmax(2)


def one_axis(module, q, k, mask):
    scores = torch.matmul(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    return (scores.unflatten(0, q.shape[:2]) + mask).softmax(-1)


def no_transpose(module, q, k, mask):
    return (q @ k.flatten(2).unflatten(2, (8, -1)) + mask).softmax(-1)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (no_mask, "bidirectional"),
        (two_masks, "two tensors are added"),
        (capped, "tanh"),
        (over_rows, "softmax over axis 2"),
        (one_axis, "unflatten"),
        (no_transpose, "no product with transposed keys"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_cannot_be_read_has_a_reason(exported, apply, weights, reason):
    graph = exported(Written(weights), *given())
    apply(graph, RAISE)
    (miss,) = graph.missed.values()
    assert reason in miss.reason


@pytest.mark.parametrize("architecture", ["gptj", "codegen"])
def test_models_that_write_attention_out(architecture):
    """What they generate, in a padded batch, is what they generate alone."""
    model = tiny(architecture)
    fast = kvfx.compress(model, "full", compile=False)
    assert [site.mask for site in fast.report.sites] == ["causal"] * 2
    prompt = left_padded((30, 12))
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(fast.generate(**prompt, **options), model.generate(**prompt, **options))
    quantized = kvfx.compress(
        model, kvfx.StreamingLLM(budget=16, positions="absolute"), compile=False
    )
    past = quantized(**prompt, logits_to_keep=1).past_key_values
    assert [int(buffers["length"].max()) for buffers in past.state.buffers] == [16, 16]
