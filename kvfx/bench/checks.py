"""Whether a kernel computes what it is defined to: against a truth in fp64, and the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.bench.cases import DTYPE, Case
from kvfx.errors import UnsupportedShape
from kvfx.kernels.common.attention import masked_attention, visible
from kvfx.policies.kivi import KIVI
from kvfx.testing.numerics import assert_as_accurate_as, rounding_step

# rows of queries whose weights exist at once
BLOCK = 512


def why_wrong(case: Case, backend: str) -> str:
    """Why `backend` must not be timed at this case; "" where it is right.

    What only reads is compared with a truth in fp64 and with plain attention in the same precision,
    over the same entries (`kvfx.testing.numerics`). What writes has to leave exactly the entries
    that the reference leaves, and those have to be the rows that were stored, to rounding.
    """
    try:
        reason = _wrong_entries(case, backend) if case.mutates else _wrong_output(case, backend)
    except UnsupportedShape:
        raise
    except AssertionError as error:
        return str(error)
    except Exception as error:
        # a kernel that cannot run is a wrong one, and the others are measured all the same
        return raised(error)
    return reason


def raised(error: Exception) -> str:
    """What was raised first, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = (str(error).strip() or "no message").splitlines()[0]
    return f"raised {type(error).__name__}: {said}"


def _wrong_output(case: Case, backend: str) -> str:
    out = case.run(backend, case.buffers)
    plain, truth = _columns(case) if case.store is None else _attention(case)
    assert_as_accurate_as(out, low_precision=plain, truth=truth)
    return ""


def _attention(case: Case) -> tuple[Tensor, Tensor]:
    """Plain attention over the loaded entries in the model's dtype, and in fp64."""
    plain, truth = [], []
    # one row of the batch at a time: in fp64 a long cache is large
    for row in range(case.shape.batch):
        rows = [x[row : row + 1] for x in case.rows]
        k, v, live = case.loaded([x[row : row + 1] for x in case.buffers])
        q, position = rows[0], rows[-1]
        seen = live[:, :, None]
        if case.verb == "extend":
            own = visible(position, position)[:, None].expand(-1, k.shape[1], -1, -1)
            seen = torch.cat((seen.expand(-1, -1, q.shape[2], -1), own), -1)
            k, v = torch.cat((k, rows[1].to(k.dtype)), 2), torch.cat((v, rows[2].to(v.dtype)), 2)
        for found, dtype in ((plain, DTYPE), (truth, torch.float64)):
            x, y, z = (each.to(dtype) for each in (q, k, v))
            scale, repeat = case.site.scale, case.site.kv_repeat
            found.append(masked_attention(x, y, z, seen, scale, repeat).cpu())
    return torch.cat(plain), torch.cat(truth)


def _columns(case: Case) -> tuple[Tensor, Tensor]:
    """Sums of the attention weights of every column [B, K, S], in fp32 and in fp64."""
    q, k, live = case.rows
    plain, truth = (
        _column_sums(q.to(dtype), k.to(dtype), live, case.site.scale)
        for dtype in (torch.float32, torch.float64)
    )
    return plain, truth


def _column_sums(q: Tensor, k: Tensor, live: Tensor, scale: float) -> Tensor:
    sums = torch.zeros(live.shape, dtype=q.dtype, device=q.device)
    repeat, at = q.shape[1] // k.shape[1], torch.arange(q.shape[2], device=q.device)
    for rows in at.split(BLOCK):
        seen = (at <= rows[:, None]) & live[:, :, None]
        for head in range(q.shape[1]):
            own = head // repeat
            score = q[:, head, rows] @ k[:, own].transpose(-1, -2) * scale
            weight = score.masked_fill(~seen[:, own], float("-inf")).softmax(-1)
            # a row of padding sees nothing, and nothing is not a number
            weight = weight.masked_fill(~live[:, own, rows, None], 0.0)
            sums[:, own] += weight.sum(1)
    return sums


def _wrong_entries(case: Case, backend: str) -> str:
    """Compare what the op leaves in its buffers with what the reference leaves."""
    expected, found = case.cloned().buffers, case.cloned().buffers
    case.run("reference", expected)
    case.run(backend, found)
    names = list(case.layout)
    for index in case.counters:
        if not torch.equal(expected[index], found[index]):
            return f"{names[index]} is not what the reference counts"
    entries = [case.loaded(buffers) for buffers in (expected, found)]
    live = entries[0][2]
    for name, old, new in zip("kv", entries[0], entries[1], strict=False):
        differ = (old != new).any(-1) & live
        if bool(differ.any()):
            far = (old - new)[differ].abs().max().item()
            count, of = int(differ.sum()), int(live.sum())
            return (
                f"{name}: {count:,} of {of:,} entries are not the reference's, by up to {far:.3g}"
            )
    return _wrong_rows(case, entries[1]) if case.verb == "store" else ""


def _wrong_rows(case: Case, entries: tuple[Tensor, Tensor, Tensor]) -> str:
    """Compare stored entries with the rows that were given: within half a step of their codes."""
    bits = case.store.bits if isinstance(case.store, KIVI) else None
    keep = case.rows[2]
    for name, row, entry in zip("kv", case.rows, entries, strict=False):
        row = row.masked_fill(~keep[..., None], 0.0).float()
        entry = entry.masked_fill(~entries[2][..., None], 0.0).float()
        shared = min(row.shape[2], entry.shape[2])
        far = (row[:, :, :shared] - entry[:, :, :shared]).abs().max().item()
        budget = _quantization(row, bits)
        # written so that NaN fails
        if not far <= budget:
            return (
                f"{name}: stored entries are {far:.3g} away from their rows, {budget:.3g} allowed"
            )
    return ""


def _quantization(row: Tensor, bits: int | None) -> float:
    """Half a scale of the widest possible group, and the rounding of its zero and scale to fp16
    and of the entry to the model's dtype.
    """
    if bits is None:
        return 0.0
    span = (row.max() - row.min()).item()
    rounding = 2 * rounding_step(torch.float16) + rounding_step(DTYPE)
    return span / (2**bits - 1) / 2 + rounding * span
