"""MatchAttention: operands are read as they are written, or there is a reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import FileCheck

from kvfx.errors import CaptureError
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.match_attention import MatchAttention
from kvfx.provenance import origin

RAISE = [Canonicalize(), MatchAttention()]


class Block(nn.Module):
    """An attention sub-module, so that its site has a name."""

    def __init__(self, function):
        super().__init__()
        self.attention = Attention(function)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)


class Attention(nn.Module):
    """`function(q, k, v)`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **kwargs)


def expanded(x: Tensor, repeat: int) -> Tensor:
    """HuggingFace's repeat_kv."""
    batch, heads, rows, width = x.shape
    x = x[:, :, None].expand(batch, heads, repeat, rows, width)
    return x.reshape(batch, heads * repeat, rows, width)


def cloned(x: Tensor, repeat: int) -> Tensor:
    batch, heads, rows, width = x.shape
    x = x[:, :, None].expand(batch, heads, repeat, rows, width).clone()
    return x.view(batch, heads * repeat, rows, width)


def interleaved(x: Tensor, repeat: int) -> Tensor:
    return x.repeat_interleave(repeat, 1)


def qkv(kv_heads: int, repeat: int, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    heads = kv_heads * repeat
    return tuple(torch.randn(2, h, 7, width) for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("repeat_kv", [expanded, cloned, interleaved])
@pytest.mark.parametrize(("kv_heads", "repeat"), [(1, 4), (3, 2), (5, 8)], ids=str)
def test_repeated_heads(exported, apply, run, repeat_kv, kv_heads, repeat):
    given = qkv(kv_heads, repeat)
    module = Block(lambda q, k, v: sdpa(q, repeat_kv(k, repeat), repeat_kv(v, repeat), scale=0.3))
    graph = exported(module, *given)
    stats = apply(graph, RAISE)
    assert stats.hits == {"sdpa": 1}
    FileCheck().check_not("scaled_dot").check_not("expand").check_not("repeat_interleave").check(
        f"kvfx.attention(%q, %k, %v, None, None, scale=0.3, kv_repeat={repeat})"
    ).check_same("# attention <- sdpa").run(graph.text)
    torch.testing.assert_close(run(graph, *given)[0], module(*given))


@pytest.mark.parametrize("repeat", [1, 3])
def test_enable_gqa(exported, apply, run, repeat):
    given = qkv(3, repeat)
    module = Block(lambda q, k, v: sdpa(q, k, v, enable_gqa=True))
    graph = exported(module, *given)
    apply(graph, RAISE)
    (node,) = graph.calls(torch.ops.kvfx.attention.default)
    assert node.kwargs["kv_repeat"] == repeat
    torch.testing.assert_close(run(graph, *given)[0], module(*given))


@pytest.mark.parametrize("width", [8, 20])
def test_scale_defaults_to_the_root_of_the_width(exported, apply, run, width):
    given = qkv(2, 1, width)
    graph = exported(Block(sdpa), *given)
    apply(graph, RAISE)
    (node,) = graph.calls(torch.ops.kvfx.attention.default)
    assert node.kwargs["scale"] == 1 / math.sqrt(width)
    torch.testing.assert_close(run(graph, *given)[0], sdpa(*given))


def test_mask_stays_an_operand(exported, apply, run):
    q, k, v = qkv(2, 1)
    mask = torch.rand(2, 1, 7, 7) < 0.5
    mask[..., 0] = True

    class Masked(nn.Module):
        def forward(self, q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    graph = exported(Masked(), q, k, v, mask)
    apply(graph, RAISE)
    FileCheck().check("kvfx.attention(%q, %k, %v, %mask, None").run(graph.text)
    torch.testing.assert_close(run(graph, q, k, v, mask)[0], Masked()(q, k, v, mask))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda q, k, v: sdpa(q, k, v, dropout_p=0.1),
            "dropout is live (p=0.1): put the model into eval mode",
        ),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
            "attention is bidirectional: it has no mask and is not causal",
        ),
        (
            lambda q, k, v: sdpa(
                expanded(q, 2), expanded(k, 2), interleaved(v, 1).repeat(1, 2, 1, 1)
            ),
            "K and V are repeated differently (2 and 1 times)",
        ),
    ],
    ids=["dropout", "bidirectional", "repeats"],
)
def test_miss_has_a_reason(exported, apply, function, reason):
    graph = exported(Block(function), *qkv(2, 1))
    stats = apply(graph, RAISE)
    assert [str(miss) for miss in stats.misses] == [f"attention: {reason}"]
    assert str(graph.missed["attention"]) == f"attention: {reason}"
    FileCheck().check_not("kvfx.attention").check("scaled_dot_product_attention").run(graph.text)


def test_scale_that_is_computed_misses(exported, apply):
    graph = exported(Block(sdpa), *qkv(3, 1))
    apply(graph, [Canonicalize()])
    (root,) = graph.calls(torch.ops.aten.scaled_dot_product_attention.default)
    with graph.module.graph.inserting_before(root):
        size = graph.module.graph.call_function(torch.ops.aten.sym_size.int, (root.args[0], 2))
    root.update_kwarg("scale", size)
    stats = apply(graph, [MatchAttention()])
    assert [miss.reason for miss in stats.misses] == ["the scale is not a constant"]


@pytest.mark.parametrize(
    "repeat_kv",
    [
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(x.shape[0], 6, -1, 8),
        lambda x: torch.cat((x, x), 1),
    ],
    ids=["repeat", "expand before heads", "cat"],
)
def test_heads_in_another_order_are_not_grouped_queries(exported, apply, run, repeat_kv):
    given = qkv(3, 2)
    module = Block(lambda q, k, v: sdpa(q, repeat_kv(k), repeat_kv(v)))
    graph = exported(module, *given)
    apply(graph, RAISE)
    (node,) = graph.calls(torch.ops.kvfx.attention.default)
    assert node.kwargs["kv_repeat"] == 1
    torch.testing.assert_close(run(graph, *given)[0], module(*given))


def test_two_attentions_of_one_module_are_two_sites(exported, apply):
    graph = exported(Block(lambda q, k, v: sdpa(sdpa(q, k, v), k, v)), *qkv(2, 1))
    apply(graph, RAISE)
    nodes = graph.calls(torch.ops.kvfx.attention.default)
    assert [origin(node).site for node in nodes] == ["attention", "attention#2"]


def test_no_attention_is_refused(exported, apply):
    graph = exported(Block(lambda q, k, v: q + k + v), *qkv(2, 1))
    with pytest.raises(CaptureError, match="no attention was found"):
        apply(graph, RAISE)


@pytest.mark.parametrize(
    ("architecture", "heads", "kv_heads"), [("llama", 4, 2), ("gpt2", 4, 4), ("gemma3_text", 4, 2)]
)
def test_models_are_raised_at_every_site(
    canonical, apply, run, inputs, architecture, heads, kv_heads
):
    graph, given = canonical(architecture), inputs(2, 13)
    before = run(graph, *given)[0]
    sites = graph.text.count("scaled_dot_product_attention")
    stats = apply(graph, [MatchAttention()])
    assert stats.hits == {"sdpa": sites}
    FileCheck().check_not("scaled_dot").check_count("kvfx.attention", sites, exactly=True).run(
        graph.text
    )
    for node in graph.calls(torch.ops.kvfx.attention.default):
        assert [x.meta["val"].shape[1] for x in node.args[:3]] == [heads, kv_heads, kv_heads]
    torch.testing.assert_close(run(graph, *given)[0], before)
