"""The flat room: what the dense room does, head by head, in as many slots as there are entries."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfx.kernels.compact import reference as compact
from kvfx.kernels.dense import reference as dense
from kvfx.kernels.flat import reference
from kvfx.kernels.flat.layout import closed, layout, resized, spread
from kvfx.testing.numerics import assert_as_accurate_as

SCALE = 0.3
# query heads per KV head, slots, live entries of the KV heads of each row of the batch
SHAPES = {
    "MHA": (1, 30, [[0, 1, 13], [5, 0, 2]]),
    "GQA": (3, 100, [[63, 1], [0, 0]]),
    "GQA full": (2, 33, [[33, 0, 0], [1, 31, 1]]),
    "MQA": (4, 7, [[7], [3]]),
}
NAN = float("nan")


def holes(x: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """x [B, N, ...] with the largest garbage in its free slots."""
    slot = torch.arange(x.shape[1])
    mine = (slot >= start[..., None]) & (slot < (start + length)[..., None])
    return torch.where(mine.any(1).reshape(*x.shape[:2], *(1,) * (x.dim() - 2)), x, NAN)


def filled(lengths: list[list[int]], slots: int, width: int, value_width: int) -> list[Tensor]:
    """Random live entries, NaN in free slots."""
    start, length = (x.int() for x in spread(torch.tensor(lengths), slots))
    rows = [holes(torch.randn(len(lengths), slots, x), start, length) for x in (width, value_width)]
    return [*rows, start, length]


def rules(names: str, shape: str) -> dict:
    """The optional operands and attributes that a test names; positions have gaps."""
    repeat, slots, lengths = SHAPES[shape]
    heads = repeat * len(lengths[0])
    choices = {
        "position": torch.arange(slots).mul(2).expand(len(lengths), -1).int(),
        "bias": torch.rand(len(lengths), slots),
        "slopes": torch.rand(heads) * 0.1,
        "sinks": torch.randn(heads),
        "softcap": 2.0,
        "window": 21,
        "chunk": 16,
    }
    return {name: choices[name] for name in names.split()}


def by_head(verb, q, *new, buffers, positions, score=None, **extra) -> Tensor:
    """What the dense room gives for each row of the batch and KV head alone."""
    k_flat, v_flat, start, length = buffers
    batch, kv_heads = start.shape
    repeat = q.shape[1] // kv_heads
    out = []
    for b in range(batch):
        for h in range(kv_heads):
            slots = slice(int(start[b, h]), int(start[b, h] + length[b, h]))
            heads = slice(h * repeat, (h + 1) * repeat)
            # one dead entry: the plain path of the dense room divides by zero without any
            cache = [
                torch.nn.functional.pad(x[None, None, b, slots], (0, 0, 0, 1))
                for x in (k_flat, v_flat)
            ]
            mine = {
                name: x
                if not isinstance(x, Tensor)
                else x[heads]
                if name in ("slopes", "sinks")
                else torch.nn.functional.pad(x[None, None, b, slots], (0, 1))
                for name, x in extra.items()
            }
            own = [x[None, None, b, h] for x in new]
            given = [q[None, b, heads], *own, positions[None, b]]
            if score is not None:
                given.append(score[b, h, None, None, : cache[0].shape[2]])
            found = getattr(dense, verb)(*given, *cache, length[None, None, b, h], **mine)
            out.append(found.nan_to_num(0.0)[0])
    return torch.stack(out).reshape(batch, -1, *out[0].shape[1:])


def in_double(function, *operands, **extra) -> Tensor:
    """What `function` gives in fp64."""

    def wide(x):
        if isinstance(x, list):
            return [wide(y) for y in x]
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    extra = {name: wide(x) for name, x in extra.items()}
    with mock.patch.object(Tensor, "float", lambda x: x.double()):
        return function(*map(wide, operands), **extra)


RULES = (
    "",
    "softcap",
    "sinks",
    "bias",
    "slopes",
    "window",
    "chunk",
    "position window",
    "position bias slopes sinks softcap window",
)


@pytest.mark.parametrize("names", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_row_attends_what_its_head_keeps(shape, names):
    repeat, slots, lengths = SHAPES[shape]
    buffers, positions = filled(lengths, slots, 20, 12), torch.tensor([[60], [9]])
    q, extra = torch.randn(2, repeat * len(lengths[0]), 1, 20), rules(names, shape)
    out = reference.attend(q, positions, *buffers, scale=SCALE, **extra)
    given = {"buffers": buffers, "positions": positions, "scale": SCALE, **extra}
    low = by_head("attend", q, **given)
    truth = in_double(lambda q, **given: by_head("attend", q, **given), q, **given)
    assert_as_accurate_as(out, low_precision=low, truth=truth)


@pytest.mark.parametrize("decay", [1.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_accumulate(shape, decay):
    repeat, slots, lengths = SHAPES[shape]
    buffers = filled(lengths, slots, 20, 12)
    start, length = buffers[2:]
    found, expected = torch.zeros(2, slots), torch.zeros(*start.shape, slots + 1)
    for step in range(2):
        q, positions = torch.randn(2, repeat * len(lengths[0]), 1, 20), torch.full((2, 1), 70)
        out = reference.attend_scored(q, positions, found, *buffers, scale=SCALE, decay=decay)
        dense_out = by_head(
            "attend_scored", q, buffers=buffers, positions=positions, score=expected,
            scale=SCALE, decay=decay,
        )  # fmt: skip
        torch.testing.assert_close(out, dense_out)
        total = found.sum(-1)
        torch.testing.assert_close(total, (length > 0).sum(1) * repeat * (1.0 + step * decay))
    torch.testing.assert_close(reference.load_entries(found, start, length), expected[..., :slots])
    assert not holes(found, start, length).nan_to_num(0.0).ne(found).any()


@pytest.mark.parametrize("names", ["", "softcap sinks", "slopes chunk", RULES[-1]])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_attend_the_past_and_themselves(shape, rows, names):
    repeat, slots, lengths = SHAPES[shape]
    buffers, kv_heads = filled(lengths, slots, 20, 12), len(lengths[0])
    q = torch.randn(2, repeat * kv_heads, rows, 20)
    new = [torch.randn(2, kv_heads, rows, width) for width in (20, 12)]
    positions = 70 + torch.arange(rows).expand(2, -1).clone()
    # padding on the left
    positions[1, : rows // 2] = -1
    given = {"buffers": buffers, "positions": positions, "scale": SCALE, **rules(names, shape)}
    operands = {name: x for name, x in given.items() if name not in ("buffers", "positions")}
    out = reference.extend(q, *new, positions, *buffers, **operands)
    torch.testing.assert_close(out, by_head("extend", q, *new, **given), rtol=1e-4, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


def test_low_precision_is_summed_in_fp32():
    buffers = [x.bfloat16() if x.is_floating_point() else x for x in filled([[63, 9]], 80, 16, 16)]
    q = torch.randn(1, 4, 1, 16).bfloat16()
    out = reference.attend(q, torch.tensor([[70]]), *buffers, scale=SCALE)
    wide = [x.double() if x.is_floating_point() else x for x in (q, *buffers)]
    given = {"buffers": wide[1:], "positions": torch.tensor([[70]]), "scale": SCALE}
    truth = by_head("attend", wide[0], **given)
    assert_as_accurate_as(out, low_precision=truth.bfloat16(), truth=truth)


def test_rows_of_the_batch_are_independent():
    _, slots, lengths = SHAPES["MHA"]
    buffers, q = filled(lengths, slots, 8, 8), torch.randn(2, 3, 1, 8)
    positions = torch.tensor([[40], [50]])
    out = reference.attend(q, positions, *buffers, scale=SCALE)
    turned = [x.flip(0) for x in (q, positions, *buffers)]
    assert torch.equal(reference.attend(*turned, scale=SCALE).flip(0), out)


class Model:
    """The room as lists per row and head of (key, value, number)."""

    def __init__(self, batch: int, kv_heads: int, slots: int):
        self.heads = [[[] for _ in range(kv_heads)] for _ in range(batch)]
        self.buffers = [torch.full((batch, slots, 3), NAN), torch.full((batch, slots, 2), NAN)]
        self.buffers += [torch.zeros(batch, kv_heads, dtype=torch.int32) for _ in range(2)]
        self.numbers = torch.zeros(batch, slots)

    def rows(self, count: int, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New rows; the kept ones join the lists."""
        k, v = (torch.randn(*keep.shape[:2], count, width) for width in (3, 2))
        x = torch.rand(*keep.shape[:2], count) + 1.0
        for b, row in enumerate(self.heads):
            for h, entries in enumerate(row):
                entries += [
                    (k[b, h, s], v[b, h, s], x[b, h, s]) for s in keep[b, h].nonzero()[:, 0]
                ]
        return k, v, x

    def store(self, keep: Tensor, gain: bool = False) -> None:
        slots, (start, length) = self.numbers.shape[1], self.buffers[2:]
        past = torch.rand(*keep.shape[:2], slots)
        if gain:
            for b, row in enumerate(self.heads):
                for h, entries in enumerate(row):
                    entries[:] = [(k, v, x + past[b, h, i]) for i, (k, v, x) in enumerate(entries)]
        k, v, x = self.rows(keep.shape[2], keep)
        if gain:
            x = torch.cat((past, x), 2)
            reference.extend_entries(x, keep, start, length, self.numbers)
        else:
            reference.store_entries(x, keep, start, length, self.numbers)
        reference.store(k, v, keep, *self.buffers)

    def append(self, keep: Tensor) -> None:
        k, v, x = self.rows(1, keep)
        reference.append_entries(x, keep, *self.buffers[2:], self.numbers)
        reference.append(k, v, keep, *self.buffers)

    def compact(self, keep: Tensor) -> None:
        for b, row in enumerate(self.heads):
            for h, entries in enumerate(row):
                entries[:] = [entry for i, entry in enumerate(entries) if keep[b, h, i]]
        reference.compact_entries(keep, *self.buffers[2:], self.numbers)
        reference.compact(keep, None, *self.buffers, style="half")

    def check(self) -> None:
        """Buffers hold the lists, heads lie one behind the other, numbers are zero elsewhere."""
        _, _, start, length = self.buffers
        slots = self.numbers.shape[1]
        k, v, live = reference.load(*self.buffers)
        numbers = reference.load_entries(self.numbers, start, length)
        assert torch.equal(live, reference.live_entries(self.buffers[0], start, length))
        assert torch.equal(live.sum(2), length.long())
        total = 0.0
        for b, row in enumerate(self.heads):
            end = 0
            for h, entries in enumerate(row):
                assert start[b, h] >= end
                end = int(start[b, h] + length[b, h])
                assert length[b, h] == len(entries)
                for i, entry in enumerate(entries):
                    for found, expected in zip((k, v, numbers), entry, strict=True):
                        assert torch.equal(found[b, h, i], expected.reshape(found[b, h, i].shape))
                    total += float(entry[2])
            assert end <= slots
        assert float(self.numbers.double().sum()) == pytest.approx(total)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_turns_of_a_conversation(kv_heads):
    model = Model(2, kv_heads, 40)
    for share in (0.6, 0.3):
        model.store(torch.rand(2, kv_heads, 11) < share)
        model.check()
        for _ in range(2):
            model.append(torch.rand(2, kv_heads, 1) < 0.6)
            model.check()
        model.store(torch.rand(2, kv_heads, 1) < 0.5, gain=True)
        model.check()
        model.compact(torch.rand(2, kv_heads, 40) < 0.5)
        model.check()


def test_no_slot_is_left():
    model = Model(1, 3, 10)
    model.store(torch.tensor([[[True] * 6, [False] * 6, [True] * 4 + [False] * 2]]))
    model.check()
    assert model.buffers[2].tolist() == [[0, 6, 6]]
    # nothing is kept, nothing moves, no neighbour is overwritten
    model.append(torch.zeros(1, 3, 1, dtype=torch.bool))
    model.check()
    model.compact(torch.tensor([[[False] + [True] * 9, [True] * 10, [False, True] * 5]]))
    model.append(torch.tensor([[[False], [True], [False]]]))
    model.check()
    model.append(torch.tensor([[[False], [False], [True]]]))
    model.store(torch.tensor([[[False] * 6] * 3]), gain=True)
    model.check()


def test_a_head_without_room_is_not_written():
    buffers = filled([[2, 0, 1]], 4, 3, 3)
    buffers[2].copy_(torch.tensor([[0, 2, 2]]))
    buffers[0][0], buffers[1][0] = torch.arange(4.0)[:, None], torch.arange(4.0)[:, None]
    x = torch.full((1, 3, 1, 3), 9.0)
    reference.append(x, x, torch.ones(1, 3, 1, dtype=torch.bool), *buffers)
    assert buffers[0][0, :, 0].tolist() == [0.0, 1.0, 2.0, 9.0]
    assert buffers[3].tolist() == [[2, 0, 2]]


def test_an_empty_cache_takes_no_rows():
    model = Model(2, 3, 12)
    model.store(torch.zeros(2, 3, 5, dtype=torch.bool))
    model.check()
    # room for everybody
    assert model.buffers[2].tolist() == [[0, 4, 8]] * 2
    q, positions = torch.randn(2, 3, 1, 3), torch.zeros(2, 1).long()
    assert not reference.attend(q, positions, *model.buffers, scale=SCALE).any()


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_keys_turn_by_how_far_they_move(style):
    _, slots, lengths = SHAPES["MHA"]
    buffers, keep = filled(lengths, slots, 12, 4), torch.rand(2, 3, slots) < 0.5
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    k, v, _ = reference.load(*buffers)
    expected = [k, v, buffers[3].clone()]
    compact.compact(keep, frequencies, *expected, style=style)
    reference.compact(keep, frequencies, *buffers, style=style)
    k, v, live = reference.load(*buffers)
    assert torch.equal(buffers[3], expected[2])
    torch.testing.assert_close(k[live], expected[0][live])
    assert torch.equal(v[live], expected[1][live])


def test_numbers_keep_their_dtype():
    entries = torch.zeros(1, 6, dtype=torch.int32)
    start, length = (torch.zeros(1, 2, dtype=torch.int32) for _ in range(2))
    x = torch.tensor([[[4, 5], [6, 7]]])
    keep = torch.tensor([[[True, True], [False, True]]])
    reference.store_entries(x, keep, start, length, entries)
    # three of six slots are free: one of them behind each head, the last one at the end
    assert entries.tolist() == [[4, 5, 0, 7, 0, 0]]


def test_load_gives_copies():
    buffers = filled([[3, 0]], 5, 4, 4)
    k, v, live = reference.load(*buffers)
    assert live.sum(2).tolist() == [[3, 0]]
    assert not k[~live].any()
    k.zero_()
    v.zero_()
    assert buffers[0][0, :3].all()


lengths_of_heads = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@given(lengths_of_heads, st.integers(1, 6), st.integers(0, 9), st.integers(0, 2**16))
def test_layout(lengths, rows, free, seed):
    """Old entries, then kept rows, head by head; what is free is shared out to one slot."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(1, len(lengths), rows, generator=generator) < 0.5
    slots = max(sum(lengths) + int(keep.sum()) + free, 1)
    start, length = spread(torch.tensor([lengths]), slots)
    new = layout(keep, start, length, slots)
    assert torch.equal(new.length, length + keep.sum(2))
    found = [
        new.source[0, begin : begin + count].tolist()
        for begin, count in zip(new.start[0].tolist(), new.length[0].tolist(), strict=True)
    ]
    assert found == [
        [*range(int(start[0, h]), int(start[0, h]) + count)]
        + [slots + h * rows + int(s) for s in keep[0, h].nonzero()]
        for h, count in enumerate(lengths)
    ]
    assert int((new.source >= 0).sum()) == int(new.length.sum())
    ends = (new.start + new.length)[0].tolist()
    rooms = [b - a for a, b in zip(ends, [*new.start[0, 1:].tolist(), slots], strict=True)]
    even = (slots - int(new.length.sum())) // len(lengths)
    assert rooms[:-1] == [even] * (len(rooms) - 1)
    assert even <= rooms[-1] < even + len(lengths)
    # what does not fit is left out, nothing is out of bounds
    small = layout(keep, start.clamp(max=0), length.clamp(max=1), 2)
    assert int((small.start + small.length).max()) <= 2
    assert int(small.start.max()) <= 2
    assert int(small.length.min()) >= 0
    assert int(small.source.max()) < 2 + keep[0].numel()


@given(lengths_of_heads, st.integers(0, 9), st.integers(0, 2**16))
def test_closed(lengths, free, seed):
    """Kept entries close up, as far as their number in front of them says."""
    generator = torch.Generator().manual_seed(seed)
    slots = max(sum(lengths) + free, 1)
    start, length = spread(torch.tensor([lengths]), slots)
    keep = torch.rand(1, len(lengths), slots, generator=generator) < 0.5
    new, shift = closed(keep, start, length)
    for h, count in enumerate(lengths):
        kept = keep[0, h, :count].nonzero()[:, 0]
        here = slice(int(new.start[0, h]), int(new.start[0, h] + new.length[0, h]))
        assert torch.equal(new.source[0, here], start[0, h] + kept)
        assert torch.equal(shift[0, here], torch.arange(len(kept)) - kept)
    assert int((new.source >= 0).sum()) == int(new.length.sum())
    assert not shift[new.source < 0].any()


@given(lengths_of_heads, st.integers(0, 9), st.integers(0, 9))
def test_resized(lengths, free, more):
    """Entries stay in their order, whatever the sizes of the buffers."""
    slots, length = max(sum(lengths) + free, 1), torch.tensor([lengths])
    start, _ = spread(length, slots)
    source, begin = resized(start.int(), length.int(), max(sum(lengths) + more, 1))
    assert begin.dtype == torch.int32
    for h, count in enumerate(lengths):
        here = source[0, int(begin[0, h]) : int(begin[0, h]) + count]
        assert torch.equal(here, start[0, h] + torch.arange(count))
    assert int((source >= 0).sum()) == sum(lengths)


@pytest.mark.slow
def test_decode_compiles_and_counts_on():
    def step(q, k, v, x, keep, positions, numbers, *buffers):
        reference.append_entries(x, keep, *buffers[2:], numbers)
        reference.append(k, v, keep, *buffers)
        return reference.attend(q, positions, *buffers, scale=SCALE)

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True)
    start, length = (x.int() for x in spread(torch.tensor([[9, 2], [0, 1]]), 40))
    buffers = [torch.rand(2, 40), *(torch.randn(2, 40, 16) for _ in range(2)), start, length]
    same = [x.clone() for x in buffers]
    for at in range(3):
        q, keep = torch.randn(2, 6, 1, 16), torch.rand(2, 2, 1) < 0.7
        k, v = (torch.randn(2, 2, 1, 16) for _ in range(2))
        given = (q, k, v, torch.rand(2, 2, 1), keep, torch.full((2, 1), 9 + at))
        torch.testing.assert_close(fast(*given, *same), step(*given, *buffers))
        for a, b in zip(same, buffers, strict=True):
            assert torch.equal(a, b)
