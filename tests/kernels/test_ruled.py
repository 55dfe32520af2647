"""Soft-cap, slopes, sinks and chunks in the rooms of prompts, rings, masks, reuse and scores: each
rule and all together, against attention written out.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from kvfx.kernels.common import ruled
from kvfx.kernels.masked.reference import attend as attend_masked
from kvfx.kernels.prompt import reference as prompt
from kvfx.kernels.reuse import reference as reuse
from kvfx.kernels.scores import reference as scores
from kvfx.kernels.scores import triton as kernels

SCALE = 0.4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# each rule alone, and together
RULES = ("slopes", "sinks", "softcap", "slopes sinks softcap")
PLACED = (*RULES, "chunk", "window chunk", "slopes sinks softcap window chunk")
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def extra(names: str, heads: int, device: str = "cpu") -> dict:
    """The operands and attributes that a test names."""
    every = {
        "slopes": 2.0 ** -torch.arange(1, heads + 1.0, device=device),
        "sinks": torch.randn(heads, device=device),
        "softcap": 1.5,
        "window": 9,
        "chunk": 7,
    }
    return {name: every[name] for name in names.split()}


def weights(
    q: Tensor, k: Tensor, seen: Tensor, distance: Tensor | None = None, *,
    slopes: Tensor | None = None, sinks: Tensor | None = None, softcap: float = 0.0,
    added: Tensor | float = 0.0,
) -> Tensor:  # fmt: skip
    """Weights [B, H, S, T] in fp64 for q [B, H, S, D], k [B, K, T, D]; the rest broadcasts."""
    score = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * SCALE
    if softcap:
        score = softcap * (score / softcap).tanh()
    if slopes is not None:
        assert distance is not None
        score = score - slopes.double()[:, None, None] * distance
    score = (score + added).masked_fill(~seen, float("-inf"))
    if sinks is None:
        return score.softmax(-1).nan_to_num(0.0)
    sink = sinks.double()[:, None, None].expand(*score.shape[:3], 1)
    return torch.cat((score, sink), 3).softmax(-1)[..., :-1]


def attended(weight: Tensor, v: Tensor) -> Tensor:
    return weight @ v.double().repeat_interleave(weight.shape[1] // v.shape[1], 1)


def by_positions(q: Tensor, k: Tensor, asked: Tensor, held: Tensor, extra: dict) -> Tensor:
    """Weights of rows at asked [B, S] over keys at held [B or 1, T], inside window and chunk."""
    asked, held = asked[:, None, :, None], held[:, None, None]
    distance = asked - held
    seen = (distance >= 0) & (held >= 0) & (distance < extra.get("window", 10**9))
    chunk = extra.get("chunk", 10**9)
    seen &= asked // chunk == held // chunk
    named = {name: extra[name] for name in ("slopes", "sinks", "softcap") if name in extra}
    return weights(q, k, seen, distance, **named)


def padded(rows: int, *paddings: int) -> Tensor:
    """Positions [B, S] of prompts with so many rows of padding on the left."""
    return torch.stack([(torch.arange(rows) - padding).clamp(min=-1) for padding in paddings])


@pytest.fixture(params=[16, 512], ids="blocks of {}".format)
def block(request, monkeypatch) -> int:
    """Query rows that are attended at once."""
    for module in (prompt, reuse, ruled):
        monkeypatch.setattr(module, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("names", PLACED)
def test_prompt(names, repeat, block):
    q, k, v = (torch.randn(3, heads, 63, 12) for heads in (2 * repeat, 2, 2))
    # padding that ends inside a block, and beyond the first one
    positions, rules = padded(63, 0, 5, 36), extra(names, 2 * repeat)
    out = prompt.attend(q, k, v, positions, scale=SCALE, **rules)
    expected = attended(by_positions(q, k, positions, positions, rules), v)
    torch.testing.assert_close(out.double(), expected, **NEAR)
    assert not out[1, :, :5].any()
    assert not out[2, :, :36].any()
    assert out.transpose(1, 2).is_contiguous()
    raised = prompt.attention(q, k, v, None, positions, scale=SCALE, kv_repeat=repeat, **rules)
    assert torch.equal(raised, out)


@pytest.mark.parametrize("paddings", [(0,), (3, 0), (20, 33, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(None, 7), (None, 16), (None, 40), (9, 7), (5, 40)], ids=str)
def test_blocks_of_a_prompt_start_at_the_first_key_that_is_seen(sizes, paddings, monkeypatch):
    monkeypatch.setattr(prompt, "BLOCK", 16)
    window, chunk = sizes
    positions = padded(70, *paddings)
    far = positions[:, :, None] - positions[:, None]
    seen = (far >= 0) & (positions >= 0)[:, None] & (far < (window or 99))
    seen &= positions[:, :, None] // chunk == positions[:, None] // chunk
    expected = [
        min([start, *seen[:, start : start + 16].any(0).nonzero()[:, 1].tolist()])
        for start in range(0, 70, 16)
    ]
    rules = ruled.Rules(window=window, chunk=chunk)
    assert prompt._first_keys(positions, rules) == expected


@pytest.mark.parametrize("first", [0, 3, 5])
def test_a_chunk_may_end_inside_a_short_prompt(first):
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    positions, rules = first + torch.arange(4)[None], {"chunk": 5}
    out = prompt.attend(q, k, v, positions, scale=SCALE, **rules)
    expected = attended(by_positions(q, k, positions, positions, rules), v)
    torch.testing.assert_close(out.double(), expected, **NEAR)


MASKS = ("boolean", "additive", "per head", "none")


def mask_of(kind: str, heads: int, rows: int, keys: int) -> tuple[Tensor | None, Tensor]:
    """A mask, and the same as numbers [B, H, S, T] to add."""
    seen = torch.rand(2, 1, rows, keys) < 0.6
    seen[1, :, 2] = False
    if kind == "none":
        seen = torch.ones(rows, keys, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    added = torch.zeros(2, 1, rows, keys).masked_fill(~seen, float("-inf"))
    if kind == "per head":
        added = torch.randn(1, heads, rows, keys) + added[:1]
    return {"boolean": seen, "none": None}.get(kind, added), added


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("names", ["softcap", "sinks", "softcap sinks"])
def test_raised_attention_by_its_mask(names, kind, repeat, block):
    q, k, v = (torch.randn(2, heads, 37, 12) for heads in (2 * repeat, 2, 2))
    mask, added = mask_of(kind, 2 * repeat, 37, 37)
    rules = extra(names, 2 * repeat)
    # what the mask says already changes nothing more
    out = prompt.attention(
        q, k, v, mask, None, scale=SCALE, kv_repeat=repeat, window=3, chunk=2, **rules
    )
    expected = attended(weights(q, k, added > float("-inf"), **rules, added=added), v)
    torch.testing.assert_close(out.double(), expected, **NEAR)
    if kind in ("boolean", "additive"):
        assert not out[1, :, 2].any()


@pytest.mark.parametrize("kind", MASKS[:3])
@pytest.mark.parametrize("names", ["softcap", "sinks", "softcap sinks"])
def test_entries_under_a_mask(names, kind):
    q, k, v = (torch.randn(2, heads, 5, 12) for heads in (6, 2, 2))
    caches = [torch.randn(2, 2, 40, 12) for _ in range(2)]
    mask, added = mask_of(kind, 6, 5, 25)
    rules, length = extra(names, 6), torch.full((2, 2), 20, dtype=torch.int32)
    assert mask is not None
    out = attend_masked(q, k, v, mask, *caches, length, scale=SCALE, **rules)
    keys, values = (torch.cat((x[:, :, :20], y), 2) for x, y in zip(caches, (k, v), strict=True))
    expected = attended(weights(q, keys, added > float("-inf"), **rules, added=added), values)
    torch.testing.assert_close(out.double(), expected, **NEAR)


@pytest.mark.parametrize("room", ["reference", "triton"])
@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("names", PLACED)
def test_ring(names, repeat, room):
    """Rows in pieces, from a ring that wraps: a chunk is a window that closes at its end."""
    ring = importlib.import_module(f"kvfx.kernels.ring.{room}")
    device = DEVICE if room == "triton" else "cpu"
    q, k, v = (torch.randn(2, heads, 31, 16, device=device) for heads in (2 * repeat, 2, 2))
    positions, rules = padded(31, 0, 3).to(device), extra(names, 2 * repeat, device)
    window = rules.setdefault("window", 7 if names == "chunk" else 12)
    buffers = [
        torch.full((2, 2, window, 16), float("nan"), device=device),
        torch.full((2, 2, window, 16), 1e4, device=device),
        torch.full((2, window), -1, dtype=torch.int32, device=device),
        torch.zeros(2, 1, dtype=torch.int32, device=device),
    ]
    out, start = [], 0
    for size in (5, 1, 1, 9, 1, 1, 13):
        here = slice(start, start + size)
        rows, at = (k[:, :, here], v[:, :, here]), positions[:, here]
        if size == 1:
            ring.append(*rows, at, *buffers, window=window)
            out.append(ring.attend(q[:, :, here], at, *buffers, scale=SCALE, **rules))
        else:
            filled = [buffers[0].nan_to_num(1e3), *buffers[1:]]
            out.append(ring.extend(q[:, :, here], *rows, at, *filled, scale=SCALE, **rules))
            ring.store(*rows, at, *buffers, window=window)
        start += size
    expected = attended(by_positions(q, k, positions, positions, rules), v)
    torch.testing.assert_close(torch.cat(out, 2).double(), expected, **NEAR)


@pytest.mark.parametrize("room", ["reference", "triton"])
def test_padding_in_a_ring_sees_nothing_but_the_sink(room):
    ring = importlib.import_module(f"kvfx.kernels.ring.{room}")
    device = DEVICE if room == "triton" else "cpu"
    q, k = torch.randn(1, 2, 1, 16, device=device), torch.randn(1, 1, 4, 16, device=device)
    held = torch.tensor([[0, 1, 2, -1]], dtype=torch.int32, device=device)
    rest = (held, torch.full((1, 1), 3, dtype=torch.int32, device=device))
    nowhere = torch.full((1, 1), -1, device=device)
    rules = extra("slopes sinks softcap chunk", 2, device)
    assert not ring.attend(q, nowhere, k, k, *rest, scale=SCALE, window=4, **rules).any()


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("names", PLACED)
def test_rows_at_any_positions(names, repeat, block):
    q, k, v = (torch.randn(2, heads, 63, 12) for heads in (2 * repeat, 2, 2))
    index, rules = torch.arange(63)[None], extra(names, 2 * repeat)
    order = torch.stack([torch.randperm(63) for _ in range(2)])
    order[:, 40:42] = -1
    for positions in (order, index.expand(2, -1), index[:, :6].expand(2, -1) + 50):
        rows = q[:, :, : positions.shape[1]]
        weight = by_positions(rows, k, positions, index, rules)
        out = reuse.attend_rows(rows, positions, k, v, scale=SCALE, **rules)
        torch.testing.assert_close(out.double(), attended(weight, v), **NEAR)
        received = reuse.column_attention(rows, k, positions, scale=SCALE, **rules)
        expected = weight.sum(2).unflatten(1, (2, repeat)).sum(2)
        torch.testing.assert_close(received.double(), expected, **NEAR)
    assert not reuse.attend_rows(q, order, k, v, scale=SCALE, **rules)[:, :, 40:42].any()


def test_live_rows_of_a_chunk_are_read_from_its_start():
    asked = torch.tensor([[23, -1, 31], [29, 22, -1]])
    for (window, chunk), expected in (
        ((None, 8), slice(16, 32)),
        ((3, 8), slice(20, 32)),
        ((3, 22), slice(22, 32)),
        ((None, 40), slice(0, 32)),
    ):
        assert reuse._reached(asked, 99, ruled.Rules(window=window, chunk=chunk)) == expected


def assert_scores(
    q: Tensor, k: Tensor, live: Tensor, rules: dict, position: Tensor | None, held: Tensor
) -> None:
    """Both backends' scores against whole matrices of weights; held [B, K, T] are positions."""
    rows, repeat = k.shape[2], q.shape[1] // k.shape[1]
    index = torch.arange(rows, device=q.device)
    ahead = rows - q.shape[2]
    each = live.repeat_interleave(repeat, 1)
    seen = each[:, :, None] & (index <= index[ahead:, None]) & each[:, :, ahead:, None]
    held = held.repeat_interleave(repeat, 1)
    distance = held[:, :, ahead:, None] - held[:, :, None]
    weight = weights(q.nan_to_num(0.0), k.nan_to_num(0.0), seen, distance, **rules)
    # padding takes no sink, and gives nothing
    weight = weight.masked_fill(~each[:, :, ahead:, None], 0.0)
    near = {"rtol": 1e-4, "atol": 1e-6}
    for room in (scores, kernels):
        found = room.columns(q, k, live, position, scale=SCALE, **rules)
        expected = weight.sum(2).unflatten(1, (-1, repeat)).sum(2)
        torch.testing.assert_close(found.double(), expected, **near)
        found = room.window(q, k, live, position, scale=SCALE, window=11, **rules)
        expected = weight[:, :, -11:].sum(2).unflatten(1, (-1, repeat)).mean(2)
        torch.testing.assert_close(found.double(), expected, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kv_heads", "repeat", "rows"), [(2, 1, 33), (1, 3, 70)], ids=str)
@pytest.mark.parametrize("names", RULES)
def test_scores_of_a_prompt(names, kv_heads, repeat, rows, dtype, poison):
    heads = kv_heads * repeat
    q, k = (torch.randn(3, n, rows, 16, device=DEVICE).to(dtype) for n in (heads, kv_heads))
    positions = padded(rows, 0, 20, rows).to(DEVICE)
    live = (positions >= 0)[:, None].expand(-1, kv_heads, -1)
    for x in (q, k):
        x.masked_fill_((positions < 0)[:, None, :, None], float("nan"))
    held = positions[:, None].expand(-1, kv_heads, -1)
    assert_scores(q, k, live, extra(names, heads, DEVICE), None, held)


@pytest.mark.parametrize("names", RULES)
def test_scores_of_a_turn_behind_entries_with_gaps(names, poison):
    """Slopes count positions: neither slots that are free nor tokens that were evicted matter."""
    q, k = torch.randn(2, 4, 9, 16, device=DEVICE), torch.randn(2, 2, 50, 16, device=DEVICE)
    live = torch.ones(2, 2, 50, dtype=torch.bool, device=DEVICE)
    live[0, 0, 30:41] = False
    live[1, :, 12:41] = False
    # a row that is not live asks nothing, whatever stands before it
    live[0, 1, 45] = False
    k = k.masked_fill(~live[..., None], float("nan"))
    rules = extra(names, 4, DEVICE)
    assert_scores(q, k, live, rules, None, live.long().cumsum(-1) - 1)
    gaps = torch.randint(1, 4, (2, 2, 50), device=DEVICE).cumsum(-1)
    gaps = gaps.masked_fill(~live, 2**31 - 1).int()
    assert_scores(q, k, live, rules, gaps, gaps.masked_fill(~live, 0).long())


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_the_keys_share_one_sink(parts, monkeypatch, poison):
    monkeypatch.setattr(kernels.launch, "parts", lambda *_, **__: parts)
    q, k = torch.randn(1, 4, 70, 16, device=DEVICE), torch.randn(1, 2, 70, 16, device=DEVICE)
    live = torch.ones(1, 2, 70, dtype=torch.bool, device=DEVICE)
    held = torch.arange(70, device=DEVICE).expand(1, 2, -1)
    assert_scores(q, k, live, extra("slopes sinks softcap", 4, DEVICE), None, held)


def test_rows_give_less_than_one_beside_a_sink():
    q, k = torch.randn(1, 2, 20, 16, device=DEVICE), torch.randn(1, 1, 20, 16, device=DEVICE)
    live = torch.ones(1, 1, 20, dtype=torch.bool, device=DEVICE)
    sinks = torch.tensor([float("-inf"), 50.0], device=DEVICE)
    for room in (scores, kernels):
        given = room.columns(q, k, live, sinks=sinks, scale=SCALE).sum()
        torch.testing.assert_close(given, torch.tensor(20.0, device=DEVICE))
