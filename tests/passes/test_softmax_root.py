"""Attention written out around a softmax: where it ends, on one axis or two; and real models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kvfx
from kvfx.graph import Graph, Level
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.match_attention import MatchAttention
from kvfx.testing.tiny import left_padded, tiny

RAISE = [Canonicalize(), MatchAttention()]


def given() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, 7, 8) for _ in range(3))


class OneAxis(nn.Module):
    """Bloom: batch and heads are one axis, and what is added is part of the product."""

    def __init__(self, transposed):
        super().__init__()
        self.transposed = transposed

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, rows, width = q.shape
        bias = (torch.arange(heads)[:, None, None] + 1) * torch.arange(rows) / 10
        bias = bias.repeat(batch, 1, 1)
        keys = (
            k.transpose(2, 3).reshape(batch * heads, width, rows)
            if self.transposed
            else k.reshape(batch * heads, rows, width).transpose(1, 2)
        )
        scores = bias.baddbmm(q.reshape(batch * heads, rows, width), keys, beta=2.0, alpha=0.25)
        scores = scores.view(batch, heads, rows, rows)
        mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)
        weights = (scores + mask[None, None]).softmax(-1).view(batch * heads, rows, rows)
        out = torch.bmm(weights, v.reshape(batch * heads, rows, width))
        return out.view(batch, heads, rows, width)


@pytest.mark.parametrize("transposed", [False, True])
def test_batch_and_heads_as_one_axis(exported, apply, run, transposed):
    module, inputs = OneAxis(transposed), given()
    graph = exported(module, *inputs)
    assert apply(graph, RAISE).hits == {"softmax": 1}
    (node,) = graph.calls(torch.ops.kvfx.attention.default)
    assert node.kwargs["scale"] == 0.25
    torch.testing.assert_close(run(graph, *inputs)[0], module(*inputs))


class Tail(nn.Module):
    """Causal weights, and `tail(weights, values)` behind them."""

    def __init__(self, tail):
        super().__init__()
        self.tail = tail

    def forward(self, input_ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((q.shape[2], q.shape[2]), torch.finfo(torch.float32).min).triu(1)
        return self.tail((q @ k.transpose(-1, -2) + mask).softmax(-1), v)


TAILS = {
    "live dropout": (
        lambda w, v: nn.functional.dropout(w, 0.1, training=True) @ v,
        "dropout is live (p=0.1)",
    ),
    "weights used twice": (lambda w, v: w @ v + w.sum(-1, keepdim=True), "used elsewhere too"),
    "no product": (lambda w, v: (w[..., None] * v[:, :, None]).sum(3), "not a product with values"),
    "values first": (lambda w, v: v.transpose(2, 3) @ w.transpose(2, 3), "not a product"),
}


@pytest.mark.parametrize(("tail", "reason"), TAILS.values(), ids=TAILS)
def test_a_softmax_over_tokens_is_never_overlooked(apply, tail, reason):
    """Where no product with values follows, the site is missed with a reason."""
    rows = torch.export.Dim("rows", min=2)
    inputs = (torch.zeros(2, 7, dtype=torch.int64), *given())
    shapes = ({1: rows}, *({2: rows},) * 3)
    module = torch.export.export(Tail(tail), inputs, dynamic_shapes=shapes).module()
    graph = Graph(module, Level.CAPTURED)
    apply(graph, RAISE)
    (miss,) = graph.missed.values()
    assert reason in miss.reason
    assert not graph.calls(torch.ops.kvfx.attention.default)


def test_a_softmax_over_channels_is_no_attention(apply):
    """A router's weights, say: as many for every length."""

    class Router(nn.Module):
        def forward(self, input_ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out * out.softmax(-1).amax(-1, keepdim=True)

    rows = torch.export.Dim("rows", min=2)
    inputs = (torch.zeros(2, 7, dtype=torch.int64), *given())
    shapes = ({1: rows}, *({2: rows},) * 3)
    module = torch.export.export(Router(), inputs, dynamic_shapes=shapes).module()
    graph = Graph(module, Level.CAPTURED)
    assert apply(graph, RAISE).hits == {"sdpa": 1}
    assert not graph.missed


MODELS = {
    "gptj": {"causal"},
    "codegen": {"causal"},
    "gemma2": {"window 16, softcap 50", "causal, softcap 50"},
    "gpt_oss": {"window 16, sinks", "causal, sinks"},
    "bloom": {"causal, ALiBi"},
    "mpt": {"causal, ALiBi"},
}


@pytest.mark.parametrize(("architecture", "masks"), MODELS.items(), ids=MODELS)
def test_models_that_write_attention_out(architecture, masks):
    """What they generate, in a padded batch, is what they generate alone."""
    model = tiny(architecture)
    fast = kvfx.compress(model, "full", compile=False)
    assert {site.mask for site in fast.report.sites} == masks
    prompt = left_padded((30, 12))
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(fast.generate(**prompt, **options), model.generate(**prompt, **options))
    quantized = kvfx.compress(
        model, kvfx.StreamingLLM(budget=16, positions="absolute"), compile=False
    )
    past = quantized(**prompt, logits_to_keep=1).past_key_values
    held = [
        int(buffers["length"].max())
        for site, buffers in zip(fast.plan.sites, past.state.buffers, strict=True)
        if site.site.window is None
    ]
    assert set(held) == {16}
