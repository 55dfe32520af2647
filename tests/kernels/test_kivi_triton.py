"""The Triton kernels of the kivi room: the reference's codes bit for bit, and its attention."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.geometry import Causal, Site
from kvfx.kernels.common import launch
from kvfx.kernels.common.combine import LOG2E
from kvfx.kernels.kivi import reference, triton
from kvfx.kernels.kivi.layout import Entries
from kvfx.kernels.kivi.triton_unpack import instructions
from kvfx.policies.kivi import KIVI
from kvfx.testing.numerics import assert_as_accurate_as

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODES = ("kivi", "window")
SCALE = 0.2
HEADS = 2


def site(width: int, value_width: int, dtype: torch.dtype) -> Site:
    """Where the policy of a test is used."""
    sizes = (HEADS, HEADS, width, value_width)
    return Site(0, "layers.0", *sizes, SCALE, Causal(), None, dtype, DEVICE)


def garbage(policy: KIVI, where: Site, entries: int, batch: int) -> list[Tensor]:
    """Empty buffers: random codes, NaN everywhere else but in the counters."""
    buffers = []
    for buffer in policy.buffers(where).values():
        x = buffer.allocate(batch, policy.capacity(entries, bounded=True), DEVICE)
        if x.dtype == torch.int16:
            x = torch.randint(-32768, 32767, x.shape, dtype=torch.int16, device=DEVICE)
        buffers.append(x if buffer.counter or x.dtype == torch.int16 else x.fill_(float("nan")))
    return buffers


def rows_of(lengths: list[list[int]], where: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Strided keys and values, of which every row and head keeps its number."""
    length = torch.tensor(lengths, device=DEVICE)
    tokens = int(length.max()) + 3
    # the first rows of a prompt, and never the last one, are padding
    at = torch.arange(tokens, device=DEVICE)
    keep = (at >= tokens - 1 - length[..., None]) & (at < tokens - 1)
    k, v = (
        torch.randn(len(lengths), tokens, HEADS, size, device=DEVICE)
        .transpose(1, 2)
        .to(where.dtype)
        for size in (where.head_dim, where.value_dim)
    )
    return k, v, keep


def filled(policy: KIVI, where: Site, lengths: list[list[int]]) -> list[Tensor]:
    """Buffers in which every row and head holds its number of entries."""
    rows = rows_of(lengths, where)
    buffers = garbage(policy, where, rows[0].shape[2], len(lengths))
    reference.store(*rows, *buffers, **policy.attributes(where))
    return buffers


def in_double() -> AbstractContextManager[object]:
    """Within it, `Tensor.float` gives fp64: the reference computes the truth."""
    return mock.patch.object(torch.Tensor, "float", lambda x: x.double())


def past(buffers: list[Tensor], knobs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The entries in fp64, with zeros for what is dead."""
    has = Entries(*buffers)
    wide = has._replace(k_residual=has.k_residual.double(), v_residual=has.v_residual.double())
    with in_double():
        k, v, live = reference.load(*wide, **knobs)
    k, v = (x.masked_fill(~live[..., None], 0.0) for x in (k, v))
    return k, v, live


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention of q [B, H, S, D] where seen [B, K, S, T]; rows that see nothing are zeros."""
    rows = q.to(k.dtype).unflatten(1, (k.shape[1], -1))
    score = torch.einsum("bkrsd,bktd->bkrst", rows, k) * SCALE
    weight = score.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bkrst,bktd->bkrsd", weight, v).flatten(1, 2)


def low_precision(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The same in the dtype of q, weights included, with scores in base 2 as kernels have them."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    rows = q.unflatten(1, (k.shape[1], -1))
    score = torch.einsum("bkrsd,bktd->bkrst", rows, k) * (SCALE * LOG2E)
    score = score.masked_fill(~seen[:, :, None], float("-inf"))
    weight = (score - score.amax(-1, keepdim=True)).exp2()
    weight = (weight / weight.sum(-1, keepdim=True)).nan_to_num(0.0)
    return torch.einsum("bkrst,bktd->bkrsd", weight, v).flatten(1, 2)


def assert_tiles_are_read(run: mock.Mock, buffers: list[Tensor]) -> None:
    """Some row holds a whole step of tiles, so that the loop over words had something to do."""
    has, constants = Entries(*buffers), run.call_args_list[0].kwargs
    step = constants["PACK"] * constants["BLOCKS"] * constants["GROUP"]
    coded = int(torch.minimum(has.k_quantized, has.v_quantized).max())
    assert coded >= step or not constants["TAILS"], f"{coded} coded tokens, {step} per step"


def check_attend(policy: KIVI, where: Site, repeat: int, lengths: list[list[int]]) -> None:
    """One row over the cache, against the truth."""
    knobs = policy.attributes(where)
    buffers = filled(policy, where, lengths)
    q = torch.randn(len(lengths), HEADS * repeat, 1, where.head_dim, device=DEVICE).to(where.dtype)
    position = torch.zeros(len(lengths), 1, dtype=torch.long, device=DEVICE)
    with mock.patch.object(launch, "run", wraps=launch.run) as run:
        out = triton.attend(q, position, *buffers, scale=SCALE, **knobs)
    assert_tiles_are_read(run, buffers)
    assert out.dtype == q.dtype
    k, v, live = past(buffers, knobs)
    seen = live[:, :, None]
    low, truth = low_precision(q, k, v, seen), attention(q, k, v, seen)
    if where.dtype == torch.float32:
        # in full precision, what folded scales round adds to what scores round
        folded = reference.attend(q, position, *buffers, scale=SCALE, **knobs).nan_to_num(0.0)
        low = truth + (folded - truth).abs() + (low - truth).abs()
    assert_as_accurate_as(out, low_precision=low, truth=truth)
    empty = torch.tensor(lengths, device=DEVICE).repeat_interleave(repeat, 1) == 0
    assert bool((out[empty] == 0).all())


def check_attend_scored(
    policy: KIVI, where: Site, repeat: int, lengths: list[list[int]], decay: float
) -> None:
    """One row over the cache, and what its weights add to the scores of the entries."""
    knobs = policy.attributes(where)
    buffers = filled(policy, where, lengths)
    q = torch.randn(len(lengths), HEADS * repeat, 1, where.head_dim, device=DEVICE).to(where.dtype)
    position = torch.zeros(len(lengths), 1, dtype=torch.long, device=DEVICE)
    k, _, live = past(buffers, knobs)
    before = torch.rand(live.shape, device=DEVICE).masked_fill(~live, 0.0)
    score = before.clone()
    operands = (position, score, *buffers)
    with mock.patch.object(launch, "run", wraps=launch.run) as run:
        out = triton.attend_scored(q, *operands, scale=SCALE, **knobs, decay=decay)
    assert_tiles_are_read(run, buffers)
    assert torch.equal(out, triton.attend(q, position, *buffers, scale=SCALE, **knobs))
    assert bool((score[~live] == 0).all())

    def received(rows: Tensor) -> Tensor:
        """What a softmax gives to entries: values of one channel each."""
        given = torch.eye(live.shape[2], dtype=rows.dtype, device=DEVICE).expand(*live.shape, -1)
        found = low_precision if rows.dtype == where.dtype else attention
        weight = found(q, rows, given, live[:, :, None])
        return before * decay + weight.unflatten(1, (HEADS, repeat)).sum((2, 3))

    low, truth = received(k.to(where.dtype)), received(k)
    if where.dtype == torch.float32:
        # in full precision, what folded scales round adds to what scores round
        folded = before.clone()
        operands = (position, folded, *buffers)
        reference.attend_scored(q, *operands, scale=SCALE, **knobs, decay=decay)
        low = truth + (folded.nan_to_num(0.0) - truth).abs() + (low - truth).abs()
    assert_as_accurate_as(score, low_precision=low, truth=truth)


# around a tile, around a step of tiles in the interpreter, and around a ring
AROUND = [[0, 1], [63, 64], [65, 163]]
LONG = [[133, 0], [97, 70]]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("k_bits", [2, 4, 8])
@pytest.mark.parametrize("v_bits", [2, 4, 8])
def test_every_pair_of_bits(k_bits, v_bits):
    mode = MODES[(k_bits + v_bits) % 4 // 2]
    policy = KIVI(k_bits=k_bits, v_bits=v_bits, group_size=32, residual=32, mode=mode)
    check_attend(policy, site(64, 64, torch.float32), 3, [[161, 200]])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(2, torch.bfloat16), (4, torch.float32), (4, torch.float16), (8, torch.float32)],
    ids=str,
)
def test_every_dtype_and_length(bits, dtype):
    policy = KIVI(bits=bits, group_size=32, residual=32)
    check_attend(policy, site(64, 64, dtype), 4, AROUND)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("width", "value_width", "group_size", "k_bits", "v_bits", "repeat"),
    [
        (128, 128, 128, 4, 4, 4),
        (128, 128, 128, 2, 2, 8),
        (128, 128, 64, 2, 2, 9),
        (128, 64, 32, 4, 2, 1),
        (64, 128, 64, 2, 4, 5),
        (32, 32, 32, 2, 2, 17),
        (256, 256, 64, 2, 2, 2),
        (256, 128, 32, 8, 8, 2),
        # sizes that are no powers of two
        (96, 96, 96, 4, 2, 3),
        (192, 96, 32, 2, 8, 2),
    ],
    ids=str,
)
def test_every_shape(width, value_width, group_size, k_bits, v_bits, repeat):
    policy = KIVI(k_bits=k_bits, v_bits=v_bits, group_size=group_size, residual=group_size)
    tokens = [[max(group_size * 4, 300) + 5, group_size * 2 - 1]]
    check_attend(policy, site(width, value_width, torch.float32), repeat, tokens)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("k_bits", "v_bits", "width", "value_width", "repeat", "mode", "dtype"),
    [
        (4, 4, 64, 64, 3, "kivi", torch.float32),
        (2, 2, 64, 64, 4, "window", torch.float32),
        # parts of keys and of values differ, rows of heads fill two blocks, sizes are no powers
        (8, 2, 64, 128, 2, "kivi", torch.float32),
        (2, 8, 128, 32, 2, "window", torch.float32),
        (4, 2, 64, 64, 17, "window", torch.float32),
        (4, 2, 96, 96, 3, "kivi", torch.float32),
        (2, 4, 64, 64, 2, "window", torch.bfloat16),
    ],
    ids=str,
)
def test_scores_add_what_entries_get(k_bits, v_bits, width, value_width, repeat, mode, dtype):
    policy = KIVI(k_bits=k_bits, v_bits=v_bits, group_size=32, residual=32, mode=mode)
    where = site(width, value_width, dtype)
    check_attend_scored(policy, where, repeat, [[0, 1], [70, 200]], decay=0.5)


@pytest.mark.usefixtures("poison")
def test_large_queries_and_keys_stay_finite():
    policy, where = KIVI(bits=2, group_size=32, residual=32), site(64, 64, torch.bfloat16)
    knobs = policy.attributes(where)
    k, v, keep = rows_of([[300, 97]], where)
    k[..., 7] *= 3000
    buffers = garbage(policy, where, k.shape[2], 1)
    reference.store(k, v, keep, *buffers, **knobs)
    q = torch.randn(1, 4, 1, 64, device=DEVICE).mul(3000).to(where.dtype)
    with mock.patch.object(launch, "run", wraps=launch.run) as run:
        out = triton.attend(q, keep, *buffers, scale=1e-6, **knobs)
    assert_tiles_are_read(run, buffers)
    assert bool(out.isfinite().all())
    expected = reference.attend(q, keep, *buffers, scale=1e-6, **knobs)
    assert (out - expected).abs().max() < 0.02


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("rows", "dtype", "mode"),
    [(1, torch.float32, "kivi"), (5, torch.float32, "window"), (9, torch.float16, "kivi")],
    ids=str,
)
def test_several_rows(rows, dtype, mode):
    policy = KIVI(k_bits=8, v_bits=4, group_size=32, residual=32, mode=mode)
    where = site(64, 128, dtype)
    knobs, repeat = policy.attributes(where), 3
    buffers = filled(policy, where, LONG)
    q = torch.randn(2, rows, HEADS * repeat, 64, device=DEVICE).transpose(1, 2).to(dtype)
    k, v = (torch.randn(2, HEADS, rows, size, device=DEVICE).to(dtype) for size in (64, 128))
    position = torch.arange(rows, device=DEVICE).expand(2, -1) + 300
    # padding on the left: seen by nobody, and it sees nothing
    position = torch.cat((position[:1], position[:1] - 300 - rows // 2))
    position = position.clamp(min=-1)
    with mock.patch.object(launch, "run", wraps=launch.run) as run:
        out = triton.extend(q, k, v, position, *buffers, scale=SCALE, **knobs)
    assert_tiles_are_read(run, buffers)
    assert out.transpose(1, 2).is_contiguous()
    k_past, v_past, live = past(buffers, knobs)
    asked, held = position[:, None, :, None], position[:, None, None]
    own = ((held >= 0) & (held <= asked)).expand(-1, HEADS, -1, -1)
    seen = torch.cat((live[:, :, None] & (asked >= 0), own), -1)
    keys, values = torch.cat((k_past, k.double()), 2), torch.cat((v_past, v.double()), 2)
    low, truth = low_precision(q, keys, values, seen), attention(q, keys, values, seen)
    assert_as_accurate_as(out, low_precision=low, truth=truth)
    assert bool((out[1, :, : rows // 2] == 0).all())


def assert_same(found: list[Tensor], expected: list[Tensor], group_size: int) -> None:
    """Equal counters, and equal codes, scales, zeros and exact rows that they cover."""
    a, b = Entries(*found), Entries(*expected)
    for name in ("length", "k_quantized", "v_quantized"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    tile = torch.arange(a.k_codes.shape[2], device=DEVICE)
    for names, coded in (("k_codes k_scales k_zeros", b.k_quantized), ("v_codes", b.v_quantized)):
        whole = (tile + 1) * group_size <= coded[..., None]
        for name in names.split():
            assert torch.equal(getattr(a, name)[whole], getattr(b, name)[whole]), name
    token = torch.arange(tile.shape[0] * group_size, device=DEVICE)
    coded = token < b.v_quantized[..., None]
    for name in ("v_scales", "v_zeros"):
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x.flatten(2, 3)[coded], y.flatten(2, 3)[coded]), name
    for name, start in (("k_residual", b.k_quantized), ("v_residual", b.v_quantized)):
        x, y = getattr(a, name), getattr(b, name)
        newest = b.length[..., None] - 1
        slot = torch.arange(x.shape[2], device=DEVICE)
        live = newest - (newest - slot) % x.shape[2] >= start[..., None]
        assert torch.equal(x[live], y[live]), name


WRITTEN = [
    ("window", 4, 2, 32, 64, 96, torch.float32),
    ("kivi", 2, 4, 32, 64, 64, torch.bfloat16),
    ("kivi", 8, 2, 32, 96, 32, torch.float16),
    ("window", 2, 8, 96, 96, 96, torch.float32),
]


@pytest.mark.parametrize(
    ("mode", "k_bits", "v_bits", "group_size", "width", "value_width", "dtype"), WRITTEN, ids=str
)
def test_written_codes_are_those_of_the_reference(
    mode, k_bits, v_bits, group_size, width, value_width, dtype
):
    policy = KIVI(
        k_bits=k_bits, v_bits=v_bits, group_size=group_size, residual=group_size, mode=mode
    )
    where = site(width, value_width, dtype)
    knobs = policy.attributes(where)
    expected = garbage(policy, where, group_size * 5, 2)
    found = [x.clone() for x in expected]
    # tiles that were begun go on, and nothing is stored for some rows
    for lengths in ([[group_size + 9, 1], [2, 0]], [[group_size * 2, 70], [group_size - 1, 0]]):
        rows = rows_of(lengths, where)
        reference.store(*rows, *expected, **knobs)
        triton.store(*rows, *found, **knobs)
        assert_same(found, expected, group_size)
    for step in range(3):
        k, v, keep = rows_of([[1, 1], [1, step % 2]], where)
        rows = (k[:, :, 2:3], v[:, :, 2:3], keep[:, :, 2:3])
        for room, buffers in ((reference, expected), (triton, found)):
            room.append(*rows, *buffers, **knobs)
        assert_same(found, expected, group_size)
        for room, buffers in ((reference, expected), (triton, found)):
            room.flush(*buffers, **knobs)
        assert_same(found, expected, group_size)


@pytest.mark.parametrize("mode", MODES)
def test_a_flush_moves_only_what_is_due(mode):
    policy, where = KIVI(bits=2, group_size=32, residual=64, mode=mode), site(64, 64, torch.float32)
    knobs = policy.attributes(where)
    full = 64 if mode == "kivi" else 96
    expected = garbage(policy, where, 200, 2)
    reference.store(*rows_of([[full - 1, 5], [full - 2, full - 1]], where), *expected, **knobs)
    row = rows_of([[1, 1], [1, 1]], where)
    reference.append(*(x[:, :, 2:3] for x in row), *expected, **knobs)
    found, before = [x.clone() for x in expected], [x.clone() for x in expected]
    reference.flush(*expected, **knobs)
    triton.flush(*found, **knobs)
    block = full if mode == "kivi" else 32
    assert Entries(*found).k_quantized.tolist() == [[block, 0], [0, block]]
    assert_same(found, expected, 32)
    for old, new in zip(before, found, strict=True):
        for row, head in ((0, 1), (1, 0)):
            a, b = old[row, head], new[row, head]
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", MODES)
def test_load_gives_what_the_reference_gives(mode):
    policy = KIVI(k_bits=8, v_bits=2, group_size=32, residual=32, mode=mode)
    # the interpreter rounds to bf16 in a way of its own
    where = site(96, 64, torch.float16)
    buffers = filled(policy, where, LONG)
    loaded = triton.load(*buffers, **policy.attributes(where))
    for a, b in zip(loaded, reference.load(*buffers, **policy.attributes(where)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_assembly_gives_what_plain_operations_give(bits, width):
    policy, where = KIVI(bits=bits, group_size=32), site(width, width, torch.bfloat16)
    buffers = filled(policy, where, [[700, 333]])
    q = torch.randn(1, 8, 1, width, device=DEVICE, dtype=torch.bfloat16)
    found = triton.attend(q, q, *buffers, scale=SCALE, **policy.attributes(where))
    with mock.patch("kvfx.kernels.kivi.triton_split.instructions", return_value=""):
        plain = triton.attend(q, q, *buffers, scale=SCALE, **policy.attributes(where))
    assert torch.equal(found, plain)


def test_assembly_cuts_every_field_once():
    text = instructions(bits=2, planes=2)
    assert text.count("and.b32") == 8
    # the offset of a plane is the same in every part
    assert [text.count(mask) for mask in ("0x00030003", "0x000c000c")] == [4, 4]
    assert "shr.b32 t, $8, 12;" in text


def test_what_cannot_be_served_is_refused():
    policy, where = KIVI(bits=2, group_size=32), site(288, 64, torch.float32)
    buffers = garbage(policy, where, 64, 1)
    q = torch.zeros(1, 2, 1, 288, device=DEVICE)
    with pytest.raises(UnsupportedShape, match="attend_kivi: keys have 288 channels"):
        triton.attend(q, q, *buffers, scale=1.0, **policy.attributes(where))
    old = launch.Machine("gfx90a", 104)
    where = site(64, 64, torch.float32)
    buffers = garbage(policy, where, 64, 1)
    with mock.patch.object(launch, "machine", return_value=old):
        reason = triton.constraint("flush", *buffers, **policy.attributes(where))
    assert reason is not None
    assert "subnormal" in reason
