"""MatchMasks: a mask is a proven fact about positions, or a miss with a reason; never a guess."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import FileCheck

from kvfx.constants import tensor_of
from kvfx.geometry import Causal, Chunk, Window
from kvfx.mask_proof import LONGEST
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.match_attention import MatchAttention
from kvfx.passes.match_masks import MatchMasks

RAISE = [Canonicalize(), MatchAttention(), MatchMasks()]


class Mask(nn.Module):
    """`function(distance [S, S], input_ids, position_ids)` where distance is query minus key."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("hundred", torch.tensor(100))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        index = torch.arange(input_ids.shape[1])
        mask = self.function(index[:, None] - index, input_ids, position_ids)
        return mask if mask.dim() == 4 else mask[None, None]


class Buffered(Mask):
    """A window of 100 that is a tensor of the model."""

    def __init__(self):
        super().__init__(lambda d, ids, p: (d >= 0) & (d < self.hundred))


def window(size: int) -> Mask:
    return Mask(lambda d, ids, p: (d >= 0) & (d < size))


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def by_position(size: int) -> Mask:
    def seen(d, ids, p):
        d = p[:, None, :, None] - p[:, None, None, :]
        return (d >= 0) & (d < size)

    return Mask(seen)


def chunks(size: int, written=lambda seen: seen) -> Mask:
    """Rows see the earlier keys of their own block of `size`."""

    def seen(d, ids, p):
        block = torch.arange(ids.shape[1]) // size
        return written((d >= 0) & (block[:, None] == block))

    return Mask(seen)


def out_of_sight(d: Tensor, size: int | None) -> Tensor:
    return (d < 0) if size is None else (d < 0) | (d >= size)


def sloped(slopes: list[float], *, bias=lambda d: -d, size: int | None = None) -> Mask:
    """Each head loses its slope per position of distance (ALiBi)."""

    def mask(d, ids, p):
        lost = torch.tensor(slopes)[:, None, None] * bias(d).float()
        return lost.masked_fill(out_of_sight(d, size), torch.finfo(torch.float32).min)[None]

    return Mask(mask)


PROVEN = {
    "comparison": (Mask(lambda d, ids, p: d >= 0), Causal()),
    "tril": (Mask(lambda d, ids, p: torch.ones(d.shape, dtype=torch.bool).tril()), Causal()),
    "additive": (Mask(lambda d, ids, p: additive(d >= 0)), Causal()),
    "additive window": (Mask(lambda d, ids, p: additive((d >= 0) & (d < 8))), Window(8)),
    "window of itself": (window(1), Window(1)),
    "window 8": (window(8), Window(8)),
    "at most 8 back": (Mask(lambda d, ids, p: (d >= 0) & (d <= 8)), Window(9)),
    "window 50, beyond the shortest probe": (window(50), Window(50)),
    "window 4096": (window(4096), Window(4096)),
    "window 50000": (window(50000), Window(50000)),
    "window 50000, negated": (Mask(lambda d, ids, p: (d >= 0) & (-d > -50000)), Window(50000)),
    "window 50001 by at most": (Mask(lambda d, ids, p: (d >= 0) & (d <= 50000)), Window(50001)),
    "positions": (by_position(70), Window(70)),
    "chunk 8": (chunks(8), Chunk(8)),
    "chunk 50, beyond the shortest probe": (chunks(50), Chunk(50)),
    "chunk 8192": (chunks(8192), Chunk(8192)),
    "chunk 8192, additive": (chunks(8192, additive), Chunk(8192)),
}


@pytest.mark.parametrize(("mask", "fact"), PROVEN.values(), ids=PROVEN)
def test_proven(decoder, captured_decoder, apply, run, inputs, mask, fact):
    module = decoder(mask)
    graph = captured_decoder(module)
    stats = apply(graph, RAISE)
    assert stats.hits == {str(fact): 1}
    assert not stats.misses
    rules = "" if isinstance(fact, Causal) else f", {str(fact).replace(' ', '=')}"
    FileCheck().check_count("kvfx.attention", 1, exactly=True).check_same(
        f"None, %position_ids, scale=0.353553, kv_repeat=1{rules})"
    ).check_same(f"attention <- sdpa, {fact}").run(graph.text)
    # nothing of the mask is left
    assert "arange" not in graph.text
    for rows in (1, 2, 63):
        given = inputs(2, rows)
        torch.testing.assert_close(run(graph, *given)[0], module(*given), rtol=1e-5, atol=1e-5)


def test_no_mask_is_causal(decoder, captured_decoder, apply):
    class NoMask(nn.Module):
        def forward(self, input_ids, position_ids):
            return None

    graph = captured_decoder(decoder(NoMask()))
    assert apply(graph, RAISE).hits == {"causal": 1}


@pytest.mark.parametrize(("size", "name"), [(None, "causal"), (6, "window 6")])
@pytest.mark.parametrize("bias", [lambda d: -d, lambda d: 7 - d, None], ids=["d", "7 - d", "key"])
def test_slopes(decoder, captured_decoder, apply, run, inputs, size, name, bias):
    """A bias that falls with distance is one slope per head, whatever is added to whole rows."""
    slopes = [0.5, 0.0625]
    mask = sloped(slopes, bias=bias, size=size) if bias else by_key(slopes, size)
    module = decoder(mask)
    graph = captured_decoder(module)
    assert apply(graph, RAISE).hits == {f"{name}, slopes": 1}
    (node,) = graph.calls(torch.ops.kvfx.attention.default)
    torch.testing.assert_close(tensor_of(graph, node.kwargs["slopes"]), torch.tensor(slopes))
    for rows in (1, 2, 63):
        given = inputs(2, rows)
        torch.testing.assert_close(run(graph, *given)[0], module(*given), rtol=1e-4, atol=1e-4)


def by_key(slopes: list[float], size: int | None) -> Mask:
    """The same bias as Bloom writes it: by the position of the key alone."""

    def mask(d, ids, p):
        added = torch.tensor(slopes)[:, None, None] * torch.arange(ids.shape[1])
        added = added.expand(-1, ids.shape[1], -1)[None]
        return added.masked_fill(out_of_sight(d, size), torch.finfo(torch.float32).min)

    return Mask(mask)


NEITHER = "the mask is neither causal nor a causal window nor a causal chunk"
REFUSED = {
    "prefix": (
        lambda d, ids, p: (d >= 0) | (torch.arange(ids.shape[1]) < 5),
        NEITHER,
    ),
    "bidirectional": (lambda d, ids, p: d == d, NEITHER),
    "strict": (lambda d, ids, p: d > 0, NEITHER),
    "random": (
        lambda d, ids, p: (
            (d >= 0)
            & ((torch.arange(ids.shape[1])[:, None] * 7919 + torch.arange(ids.shape[1])) % 5 > 0)
        ),
        NEITHER,
    ),
    "dilated": (lambda d, ids, p: (d >= 0) & (d % 2 == 0), NEITHER),
    "hidden by position": (
        lambda d, ids, p: (p[:, None, None, :] >= 3) & (d >= 0),
        NEITHER,
    ),
    "half the length": (
        lambda d, ids, p: (d >= 0) & (d < ids.shape[1] // 2),
        "the mask is window ",
    ),
    "bias": (
        sloped([0.5, 0.1], bias=lambda d: -d.clamp(max=9)).function,
        "the mask adds a bias that is not linear in distance",
    ),
    "bias by square": (
        sloped([0.5, 0.1], bias=lambda d: -d * d).function,
        "the mask adds a bias that is not linear in distance",
    ),
    "heads": (
        lambda d, ids, p: (d >= 0) & (d < torch.tensor([3, 9])[None, :, None, None]),
        "the mask differs between heads",
    ),
    "rows of the batch": (
        lambda d, ids, p: (d >= 0) & (d < 5 + torch.arange(ids.shape[0])[:, None, None, None]),
        "the mask differs between rows of the batch",
    ),
    "chunks of different lengths": (
        lambda d, ids, p: (
            (d >= 0)
            & ((torch.arange(ids.shape[1]) < 20)[:, None] == (torch.arange(ids.shape[1]) < 20))
        ),
        NEITHER,
    ),
    "tokens": (
        lambda d, ids, p: (d >= 0) & (ids != 0)[:, None, None],
        "the mask depends on token values",
    ),
    "two long windows": (
        lambda d, ids, p: (d >= 0) & (d < 50000) & (d > -70000),
        f"the mask has several constants beyond {LONGEST}: 50000, 70000",
    ),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(decoder, captured_decoder, apply, run, inputs, function, reason):
    module = decoder(Mask(function))
    graph = captured_decoder(module)
    stats = apply(graph, RAISE)
    assert not stats.hits
    (miss,) = stats.misses
    assert miss.at == "attention"
    assert miss.reason.startswith(reason)
    assert graph.missed == {"attention": miss}
    # the mask stays, and the numbers with it
    FileCheck().check("None, scale=0.353553, kv_repeat=1)").run(graph.text)
    given = inputs(2, 21)
    torch.testing.assert_close(run(graph, *given)[0], module(*given), rtol=1e-5, atol=1e-5)


# ways to hide a window that is longer than the shortest probe
HIDDEN = {
    "float": Mask(lambda d, ids, p: (d >= 0) & (d < 100.0)),
    "factor": Mask(lambda d, ids, p: (d >= 0) & (d * 0.01 < 1)),
    "division": Mask(lambda d, ids, p: (d >= 0) & (d // 100 < 1)),
    "triu": Mask(lambda d, ids, p: torch.ones(d.shape).tril().triu(-99).bool()),
    "tensor": Mask(lambda d, ids, p: (d >= 0) & (d < torch.tensor(100))),
    "full": Mask(lambda d, ids, p: (d >= 0) & (d < torch.full((), 100))),
    "buffer": Buffered(),
    "clamp": Mask(lambda d, ids, p: (d >= 0) & (d.clamp(0, 100) < 100)),
    "long float": Mask(lambda d, ids, p: (d >= 0) & (d < 50000.0)),
    "long tensor": Mask(lambda d, ids, p: (d >= 0) & (d < torch.tensor(50000))),
    "long triu": Mask(lambda d, ids, p: torch.ones(d.shape).tril().triu(-49999).bool()),
    "chunk": Mask(
        lambda d, ids, p: (
            (d >= 0)
            & (torch.arange(ids.shape[1])[:, None] // 100 == torch.arange(ids.shape[1]) // 100)
        )
    ),
}


@pytest.mark.parametrize("mask", HIDDEN.values(), ids=HIDDEN)
def test_a_hidden_window_is_never_causal(decoder, captured_decoder, apply, mask):
    graph = captured_decoder(decoder(mask))
    stats = apply(graph, RAISE)
    assert "causal" not in stats.hits
    for fact in stats.hits:
        assert fact in ("window 100", "window 50000", "chunk 100")


@pytest.mark.parametrize(
    ("architecture", "changes", "facts"),
    [
        ("llama", {}, {"causal": 2}),
        ("gpt2", {}, {"causal": 2}),
        ("mistral", {"sliding_window": 16}, {"window 16": 2}),
        ("mistral", {"sliding_window": 50}, {"window 50": 2}),
        ("mistral", {"sliding_window": 4096}, {"window 4096": 2}),
        ("mistral", {"sliding_window": 50000}, {"window 50000": 2}),
        ("gemma3_text", {}, {"window 16": 3, "causal": 1}),
    ],
    ids=str,
)
def test_masks_of_models(captured, apply, run, inputs, architecture, changes, facts):
    graph, given = captured(architecture, changes), inputs(2, 33)
    before = run(graph, *given)[0]
    assert apply(graph, RAISE).hits == facts
    torch.testing.assert_close(run(graph, *given)[0], before, rtol=1e-4, atol=1e-5)
