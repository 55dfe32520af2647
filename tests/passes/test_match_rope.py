"""MatchRope: pairing, width and frequencies are learnt, and rotate what the graph rotates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kvfx.geometry import Rope
from kvfx.graph import Miss, ancestors, extract
from kvfx.ops import overload
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.match_attention import MatchAttention
from kvfx.passes.match_masks import MatchMasks
from kvfx.passes.match_rope import MatchRope, peel_rotation
from kvfx.rotation import fit_rotation

RAISE = [Canonicalize(), MatchAttention(), MatchMasks(), MatchRope()]
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}


def powers(theta: float, width: int) -> Tensor:
    """The frequencies of the original formula."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)


@pytest.mark.parametrize(
    ("architecture", "changes", "style", "width", "theta"),
    [
        ("llama", {}, "half", 16, 10000.0),
        ("llama", {"head_dim": 24}, "half", 24, 10000.0),
        ("qwen3", {}, "half", 16, 10000.0),
        ("cohere", {}, "interleaved", 16, 500000.0),
        ("phi", {}, "half", 8, 10000.0),
        ("glm", {}, "interleaved", 8, 10000.0),
        ("gpt_neox", {}, "half", 4, 10000.0),
    ],
    ids=str,
)
def test_rope_of_models(raised, architecture, changes, style, width, theta):
    sites = raised(architecture, changes).sites
    assert len(sites) == 2
    for site in sites:
        assert isinstance(site.rope, Rope)
        assert (site.rope.style, site.rope.width) == (style, width)
        expected = powers(theta, width)
        assert (torch.tensor(site.rope.frequencies) / expected - 1).abs().max() < 1e-6


@pytest.mark.parametrize("changes", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_scaled_frequencies(raised, changes):
    from kvfx.testing.tiny import tiny

    expected = tiny("llama", changes).get_submodule("model.rotary_emb").get_buffer("inv_freq")
    assert (expected.double() / powers(10000.0, 16) - 1).abs().max() > 0.1
    for site in raised("llama", changes).sites:
        assert (torch.tensor(site.rope.frequencies) / expected.double() - 1).abs().max() < 1e-6


def test_each_kind_of_layer_has_its_own_base(raised):
    sites = raised("gemma3_text").sites
    bases = [site.rope.frequencies[1] ** (-len(site.rope.frequencies)) for site in sites]
    assert bases == pytest.approx([1e4, 1e4, 1e4, 1e6], rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "cohere", "phi", "glm", "qwen3"])
def test_rotating_the_key_before_gives_the_key(raised, inputs, architecture):
    graph = raised(architecture)
    ids, positions, _ = inputs(2, 21)
    positions = positions + 300
    by_tokens = dependents(graph, "input_ids")
    by_positions = dependents(graph, "position_ids") - by_tokens
    for site, node in zip(graph.sites, graph.calls(torch.ops.kvfx.attention.default), strict=True):
        key = node.args[1]
        pre = peel_rotation(key, by_positions, by_tokens)
        assert not isinstance(pre, Miss)
        outputs = [pre, key]
        if ancestors(outputs) & set(graph.calls(torch.ops.kvfx.attention.default)):
            continue
        probe = extract(
            graph.module, outputs, [graph.input("input_ids"), graph.input("position_ids")]
        )
        with torch.no_grad():
            before, after = probe(ids, positions)
        shift = positions[:, None].expand(-1, site.kv_heads, -1)
        frequencies = torch.tensor(site.rope.frequencies, dtype=torch.float32)
        turned = overload("rotate", "reference")(before, shift, frequencies, style=site.rope.style)
        torch.testing.assert_close(turned, after, rtol=1e-4, atol=1e-4)


def dependents(graph, name: str) -> set:
    """What is computed from the values of an input."""
    found = {graph.input(name)}
    for node in graph.nodes:
        if "sym_size" not in str(node.target) and found & set(node.all_input_nodes):
            found.add(node)
    return found


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gpt2", "no rotation by position between the projections and the attention"),
        ("opt", "no rotation by position between the projections and the attention"),
    ],
)
def test_no_rope_has_a_reason(captured, apply, architecture, reason):
    graph = captured(architecture)
    stats = apply(graph, RAISE)
    assert [miss.reason for miss in stats.misses] == [reason] * 2
    assert [miss.at for miss in stats.misses] == [site.name for site in graph.sites]
    assert [site.rope for site in graph.sites] == [None, None]
    assert not graph.missed


class Causal(nn.Module):
    def forward(self, input_ids, position_ids):
        index = torch.arange(input_ids.shape[1])
        return (index[:, None] >= index)[None, None]


def angles(position_ids: Tensor, step: float = 1.0) -> Tensor:
    return (position_ids[:, None, :, None] * (step * torch.tensor([1.0, 0.1, 0.01, 0.001]))).float()


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate pairs (i, i + 4) of x [B, H, S, 8]."""
    first, second = x[..., :4], x[..., 4:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Turn(nn.Module):
    """q and k through `function(x, position_ids, is_key)`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(q, position_ids, False), self.function(k, position_ids, True)


REFUSED = {
    "differently": (
        lambda x, p, is_key: turned(x, angles(p, 2.0 if is_key else 1.0)),
        "query and key are rotated differently",
    ),
    "shear": (
        lambda x, p, is_key: x + torch.cat((x[..., 4:] * angles(p), 0 * x[..., 4:]), -1),
        "the key's path is linear but no rotation of pairs of channels",
    ),
    "growing": (
        lambda x, p, is_key: turned(x, angles(p)) * (1 + 0.01 * p[:, None, :, None]),
        "the key's path is linear but no rotation of pairs of channels",
    ),
    "odd": (
        lambda x, p, is_key: torch.cat((x[..., :3] * (1 + p[:, None, :, None]), x[..., 3:]), -1),
        "an odd number of channels (3) is rotated",
    ),
    "nothing": (
        lambda x, p, is_key: x + 0 * p[:, None, :, None],
        "the key is not rotated",
    ),
}


def test_a_rotation_by_hand_is_matched(decoder, captured_decoder, apply):
    graph = captured_decoder(decoder(Causal(), Turn(lambda x, p, _: turned(x, angles(p)))))
    stats = apply(graph, RAISE)
    assert stats.hits == {"rope half 8": 1}
    assert graph.sites[0].rope.frequencies == pytest.approx((1.0, 0.1, 0.01, 0.001), rel=1e-6)


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(decoder, captured_decoder, apply, function, reason):
    graph = captured_decoder(decoder(Causal(), Turn(function)))
    stats = apply(graph, RAISE)
    assert [str(miss) for miss in stats.misses] == [f"attention: {reason}"]
    assert graph.sites[0].rope is None


def rotation(rope: Rope, factor: float = 1.0, size: int = 12):
    """The matrices of a rotary embedding, with fp32 phases as models compute them."""

    def matrix(position: int) -> Tensor:
        half, frequencies = rope.width // 2, torch.tensor(rope.frequencies)
        phase = (position * frequencies).float().double()
        index = torch.arange(half)
        first, second = (
            (index, index + half) if rope.style == "half" else (2 * index, 2 * index + 1)
        )
        found = torch.eye(size, dtype=torch.float64)
        found[first, first] = found[second, second] = phase.cos() * factor
        found[first, second], found[second, first] = phase.sin() * factor, -phase.sin() * factor
        return found

    return matrix


def complex_turned(x: Tensor, angle: Tensor) -> Tensor:
    """Llama's own form: pairs of channels are complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turns = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


def test_the_complex_form_is_matched(decoder, captured_decoder, apply):
    turn = Turn(lambda x, p, _: complex_turned(x, angles(p)))
    graph = captured_decoder(decoder(Causal(), turn))
    stats = apply(graph, RAISE)
    assert stats.hits == {"rope interleaved 8": 1}, stats.misses
    assert graph.sites[0].rope.frequencies == pytest.approx((1.0, 0.1, 0.01, 0.001), rel=1e-6)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("frequencies", [(1.0,), (1.0, 0.03), (2.0, 0.5, 1e-3, 1e-4)], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.138])
def test_fit(style, frequencies, factor):
    rope = fit_rotation(rotation(Rope(style, frequencies), factor))
    assert isinstance(rope, Rope)
    # a single pair has both styles
    assert rope.style == ("half" if len(frequencies) == 1 else style)
    assert rope.frequencies == pytest.approx(frequencies, rel=1e-6)


def test_fit_refuses_a_frequency_that_depends_on_the_position():
    def matrix(position: int) -> Tensor:
        return rotation(Rope("half", (1.0, 0.1 if position < 500 else 0.05)))(position)

    assert (
        str(fit_rotation(matrix)) == "the key's path is linear but no rotation of pairs of channels"
    )
