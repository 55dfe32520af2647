"""Rules of attention over codes and rings, in both backends: the truth is written over `load`."""

from __future__ import annotations

from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvfx.geometry import Causal, Site
from kvfx.kernels.kivi import reference, triton
from kvfx.ops import overload
from kvfx.policies.kivi import KIVI
from kvfx.testing.numerics import assert_as_accurate_as
from kvfx.testing.poison import poison_beyond

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 0.2
HEADS, REPEAT = 2, 3
# nothing, one exact entry; and more than two steps of tiles, in rows of different lengths
LENGTHS = ((0, 1), (70, 241), (133, 97))
EACH = ("softcap", "sinks", "bias", "slopes", "window", "chunk")
SOME = ("position window", "position chunk slopes", "softcap sinks bias", "bias position")
ALL = "position bias slopes sinks softcap window"


class Cache(NamedTuple):
    """Filled buffers, the keyword arguments of the ops, and what `load` gives."""

    buffers: list[Tensor]
    knobs: dict[str, Any]
    k: Tensor
    v: Tensor
    live: Tensor

    def given(self, names: str) -> dict[str, Any]:
        """The operands and attributes that a test names; numbers beside dead entries are NaN."""
        count = self.live.sum(-1)
        gaps = torch.randint(1, 4, self.live.shape, device=DEVICE)
        choices: dict[str, Any] = {
            "position": (gaps.cumsum(-1) - 1).int(),
            "bias": poison_beyond(torch.rand(self.live.shape, device=DEVICE) * 3, count),
            "slopes": torch.rand(HEADS * REPEAT, device=DEVICE) * 0.1,
            "sinks": torch.randn(HEADS * REPEAT, device=DEVICE) + 3,
            "softcap": 2.0,
            "window": 130,
            "chunk": 64,
        }
        return {name: choices[name] for name in names.split()}


def filled(mode: str = "window", width: int = 64, dtype=torch.float32, **bits: int) -> Cache:
    """A cache in which every row and head holds its own number of entries."""
    policy = KIVI(group_size=32, residual=32, mode=mode, **bits)
    where = Site(0, "a", HEADS, HEADS, width, width, SCALE, Causal(), None, dtype, DEVICE)
    length = torch.tensor(LENGTHS, device=DEVICE)
    tokens = int(length.max())
    k, v = torch.randn(2, len(LENGTHS), HEADS, tokens, width, device=DEVICE).to(dtype)
    buffers = []
    for buffer in policy.buffers(where).values():
        x = buffer.allocate(len(LENGTHS), policy.capacity(tokens, bounded=True), DEVICE)
        buffers.append(x.fill_(float("nan")) if x.is_floating_point() else x)
    keep = torch.arange(tokens, device=DEVICE) < length[..., None]
    knobs: dict[str, Any] = policy.attributes(where)
    reference.store(k, v, keep, *buffers, **knobs)
    return Cache(buffers, knobs, *reference.load(*buffers, **knobs))


def truth(
    q: Tensor, k: Tensor, v: Tensor, asked: Tensor, held: Tensor, live: Tensor,
    bias: Tensor | None = None, slopes: Tensor | None = None, sinks: Tensor | None = None,
    softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in fp64 of rows at `asked` [B, S] over entries at `held` [B, K, T], and the weights
    [B, H, S, T] of the entries.
    """
    k, v, held, live = (x.repeat_interleave(REPEAT, 1) for x in (k, v, held, live))
    distance = asked[:, None, :, None] - held[:, :, None]
    score = torch.einsum("bhsd,bhtd->bhst", q.double(), k.double()) * SCALE
    if softcap:
        score = softcap * (score / softcap).tanh()
    if slopes is not None:
        score = score - slopes.double()[:, None, None] * distance
    if bias is not None:
        score = score + bias.double().repeat_interleave(REPEAT, 1)[:, :, None]
    seen = live[:, :, None] & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    if chunk is not None:
        seen = seen & (asked[:, None, :, None] // chunk == held[:, :, None] // chunk)
    weight = score.exp().masked_fill(~seen, 0.0)
    total = weight.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    weight = weight / total.clamp(min=1e-300)
    return torch.einsum("bhst,bhtd->bhsd", weight, v.double()), weight


def row_of(cache: Cache, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One query row, its position behind all entries, the truth and the weights for it."""
    rest = dict(given)
    index = torch.arange(cache.live.shape[2], device=DEVICE)
    held = rest.pop("position", index.expand_as(cache.live)).long()
    asked = held.masked_fill(~cache.live, 0).flatten(1).amax(1, keepdim=True) + 2
    q = torch.randn(len(LENGTHS), HEADS * REPEAT, 1, cache.k.shape[3], device=DEVICE)
    q = q.to(cache.k.dtype)
    return q, asked, *truth(q, cache.k, cache.v, asked, held, cache.live, **rest)


@pytest.mark.parametrize("names", [*EACH, *SOME, ALL])
@pytest.mark.parametrize("mode", ["kivi", "window"])
def test_one_row_follows_the_rules(mode, names):
    cache = filled(mode, k_bits=8, v_bits=4)
    given = cache.given(names)
    q, asked, expected, _ = row_of(cache, given)
    out = reference.attend(q, asked, *cache.buffers, scale=SCALE, **cache.knobs, **given)
    assert (out - expected).abs().max() < 2e-5
    plain = reference.attend(q, asked, *cache.buffers, scale=SCALE, **cache.knobs)
    assert (out - plain)[1:].abs().amax((0, 2, 3)).min() > 1e-3, "the rule changed nothing"


@pytest.mark.parametrize(
    ("names", "mode"),
    [("", "kivi"), ("sinks", "window"), ("bias", "kivi"), ("window", "window"), (ALL, "kivi")],
)
def test_scores_add_weights_under_the_rules(mode, names):
    cache = filled(mode)
    given = cache.given(names)
    q, asked, expected, weight = row_of(cache, given)
    before = torch.rand(cache.live.shape, device=DEVICE).masked_fill(~cache.live, 0.0)
    # plain attention over no entries is no number
    rows = slice(0 if names else 1, None)
    for room in (reference, triton):
        score = before.clone()
        out = room.attend_scored(
            q, asked, score, *cache.buffers, scale=SCALE, decay=0.5, **cache.knobs, **given
        )
        added = weight.unflatten(1, (HEADS, REPEAT)).sum((2, 3))
        assert (out - expected)[rows].abs().max() < 2e-5
        assert (score - before * 0.5 - added)[rows].abs().max() < 2e-5


@pytest.mark.parametrize(
    ("names", "mode"), list(zip(["", *EACH, *SOME, ALL], cycle(("kivi", "window")), strict=False))
)
def test_several_rows_follow_the_rules(mode, names):
    cache, rows = filled(mode, k_bits=4, v_bits=8), 5
    given = cache.given(names)
    rest = dict(given)
    index = torch.arange(cache.live.shape[2], device=DEVICE).expand_as(cache.live)
    held = rest.pop("position", index).long()
    start = held.masked_fill(~cache.live, 0).flatten(1).amax(1, keepdim=True) + 1
    asked = start + torch.arange(rows, device=DEVICE)
    # padding on the left: seen by nobody, and it sees nothing
    asked[1, :2] = -1
    q = torch.randn(len(LENGTHS), HEADS * REPEAT, rows, 64, device=DEVICE)
    k, v = torch.randn(2, len(LENGTHS), HEADS, rows, 64, device=DEVICE)
    own = asked[:, None].expand(-1, HEADS, -1)
    if "bias" in rest:
        rest["bias"] = torch.cat((rest["bias"], torch.zeros_like(own)), 2)
    expected, _ = truth(
        q, torch.cat((cache.k, k), 2), torch.cat((cache.v, v), 2), asked,
        torch.cat((held, own), 2), torch.cat((cache.live, own >= 0), 2), **rest,
    )  # fmt: skip
    for room in (reference, triton):
        operands = (q, k, v, asked, *cache.buffers)
        out = room.extend(*operands, scale=SCALE, **cache.knobs, **given)
        assert (out - expected).abs().max() < 2e-5
        assert not out[1, :, :2].any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("names", [*EACH, *SOME, ALL])
@pytest.mark.parametrize(
    ("k_bits", "v_bits", "width"),
    # heads as columns, heads as rows, token by token
    [(2, 2, 64), (4, 8, 64), (4, 2, 96)],
    ids=str,
)
def test_kernels_follow_the_rules(k_bits, v_bits, width, names):
    cache = filled("kivi" if width == 96 else "window", width, k_bits=k_bits, v_bits=v_bits)
    given = cache.given(names)
    q, asked, expected, _ = row_of(cache, given)
    out = triton.attend(q, asked, *cache.buffers, scale=SCALE, **cache.knobs, **given)
    assert (out - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", ["softcap sinks bias", ALL])
def test_kernels_are_as_accurate_as_their_dtype(names, dtype):
    cache = filled(dtype=dtype, bits=4)
    given = cache.given(names)
    q, asked, expected, _ = row_of(cache, given)
    out = triton.attend(q, asked, *cache.buffers, scale=SCALE, **cache.knobs, **given)
    low = reference.attend(q, asked, *cache.buffers, scale=SCALE, **cache.knobs, **given)
    assert_as_accurate_as(out, low_precision=low, truth=expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_row_that_sees_nothing_is_zero(bits):
    cache = filled(bits=bits)
    q = torch.randn(len(LENGTHS), HEADS * REPEAT, 1, 64, device=DEVICE)
    far = torch.full((len(LENGTHS), 1), 1000, device=DEVICE)
    for room in (reference, triton):
        operands = (q, far, *cache.buffers)
        assert not room.attend(*operands, scale=SCALE, window=9, **cache.knobs).any()


@pytest.mark.slow
def test_compiled_rules_equal_eager():
    cache = filled("kivi", k_bits=8, v_bits=4)
    given = cache.given(ALL)
    q, asked, _, _ = row_of(cache, given)

    def step(q: Tensor, asked: Tensor, *buffers: Tensor) -> Tensor:
        attend = overload("attend_kivi", "reference")
        return attend(q, asked, *buffers, scale=SCALE, **cache.knobs, **given)

    eager = step(q, asked, *cache.buffers)
    compiled = torch.compile(step, fullgraph=True)
    assert (compiled(q, asked, *cache.buffers) - eager).abs().max() < 2e-5
