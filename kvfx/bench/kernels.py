"""Every kernel on buffers of a real format: checked first, then timed against what the device can
do.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from kvfx.bench.baselines import Baselines
from kvfx.bench.cases import (
    CHECKED_SHAPES,
    DEFAULT_OPS,
    GPU_SHAPES,
    Case,
    Shape,
    formats_of,
    make_case,
)
from kvfx.bench.checks import raised, why_wrong
from kvfx.bench.machine import bytes_text, device_name, today, versions, versions_text
from kvfx.bench.roofline import (
    Launch,
    Rates,
    l2_bytes,
    measured_rates,
    replayed_us,
    sets_beyond,
)
from kvfx.errors import InputError, UnsupportedOperation, UnsupportedShape
from kvfx.op_table import OPS
from kvfx.policies.kivi import KIVI
from kvfx.policy import Store

if TYPE_CHECKING:
    from rich.table import Table

HEADER = ("op", "shape", "check", "moved", "us", "p25-p75", "roofline", "SDPA", "Flex")
FOOTNOTE = (
    "moved: bytes that have to be read and written, codes as they are packed\n"
    "roofline: share of what a device copy, or a bf16 matrix product, reached in this run\n"
    "SDPA, Flex: time as a multiple of dense bf16 attention over as many tokens, below 1 is faster"
)


@dataclass(frozen=True)
class KernelRow:
    """One op at one shape. `wrong` says why its check failed, `refused` why it does not take the
    shape; a time stands only where both are empty.
    """

    op: str
    format: str
    shape: str
    moved: int
    wrong: str
    refused: str
    us: float | None
    p25_us: float | None
    p75_us: float | None
    limit: str
    share: float | None
    of_sdpa: float | None
    of_flex: float | None


@dataclass(frozen=True)
class KernelBench:
    """All rows, and where they were measured; `skipped` says what does not exist
    here.
    """

    device: str
    backend: str
    date: str
    versions: dict[str, str]
    rates: Rates | None
    rows: tuple[KernelRow, ...]
    skipped: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(row.wrong for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        """Everything as json-able data."""
        return asdict(self)

    def headline(self) -> str:
        """Where this was measured, in two lines."""
        text = f"backend {self.backend} on {self.device}; {versions_text(self.versions)}"
        if self.rates is None:
            return f"{text}; {self.date}\nchecked, not timed"
        copy, matmul = self.rates.copy / 1e9, self.rates.matmul / 1e12
        return (
            f"{text}; {self.date}\n"
            f"copy {copy:,.0f} GB/s read and written, bf16 matrix product {matmul:,.0f} TFLOP/s"
        )

    def render(self) -> Table:
        """The table, in which a failed check is red."""
        from rich import box
        from rich.table import Table

        timed = self.rates is not None
        names = HEADER if timed else HEADER[:4]
        table = Table(box=box.SIMPLE_HEAD)
        for name in names:
            left = name in ("op", "shape", "check")
            # a reason may be long: it is folded, all else is not
            table.add_column(name, justify="left" if left else "right", no_wrap=name != "check")
        for row in self.rows:
            cells = _cells(row)
            table.add_row(*(cells if timed else cells[:4]), style="red" if row.wrong else None)
        return table

    def remarks(self) -> list[str]:
        """What the table does not say."""
        lines = [] if self.rates is None else FOOTNOTE.split("\n")
        return lines + [f"skipped: {reason}" for reason in self.skipped]


def bench_kernels(
    *,
    ops: Sequence[str] | None,
    shapes: Sequence[Shape] | None,
    check_only: bool,
    tell: Callable[[str], None],
) -> KernelBench:
    """Check every op against its definition at every shape, then time it on a GPU.

    `ops` and `shapes` are all that there are where None. Without a GPU nothing can be timed: then
    `check_only` checks small shapes, through Triton's interpreter or the reference backend.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not check_only:
        raise UnsupportedOperation(
            "there is no GPU here, and kernels cannot be timed without one: --check-only checks "
            "small shapes (through Triton's interpreter with TRITON_INTERPRET=1)"
        )
    backend = backend_of_machine(device)
    names, skipped = _choose(ops, backend)
    sizes = shapes or (CHECKED_SHAPES if check_only else GPU_SHAPES)
    rates = None if check_only else measured_rates(device)
    baselines = Baselines(device)
    rows = []
    for shape in sizes:
        for name in names:
            for store in formats_of(name):
                tell(f"{shape}: {name} {store or ''}")
                rows.append(_row(name, shape, store, backend, device, rates, baselines))
    return KernelBench(
        device=device_name(device),
        backend=backend,
        date=today(),
        versions=versions("torch", "triton", "kvfx"),
        rates=rates,
        rows=tuple(rows),
        skipped=(*skipped, *baselines.missing),
    )


def backend_of_machine(device: torch.device) -> str:
    """Triton on a GPU or where it is interpreted, else the reference."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if device.type == "cuda" or interpreted else "reference"


def _choose(ops: Sequence[str] | None, backend: str) -> tuple[list[str], list[str]]:
    """The ops to run, and why others are not; what was asked for by name has to exist."""
    reasons = {name: _missing(name, backend) for name in ops or DEFAULT_OPS}
    chosen = [name for name, reason in reasons.items() if reason is None]
    missing = [reason for reason in reasons.values() if reason is not None]
    if ops is not None and missing:
        known = ", ".join(name for name in DEFAULT_OPS if _missing(name, backend) is None)
        raise InputError(f"--ops: {'; '.join(missing)}. There are: {known or 'none'}")
    return chosen, missing


def _missing(name: str, backend: str) -> str | None:
    """Why an op cannot be measured, or None."""
    if name not in OPS:
        return f"there is no op {name!r}"
    if not formats_of(name):
        return f"the bench has no operands for {name!r}"
    if backend not in OPS[name].backends:
        return f"{name!r} has no backend {backend!r} (it has: {', '.join(OPS[name].backends)})"
    return None


def _row(
    op: str,
    shape: Shape,
    store: Store | None,
    backend: str,
    device: torch.device,
    rates: Rates | None,
    baselines: Baselines,
) -> KernelRow:
    try:
        case = make_case(op, shape, store, device)
        wrong = why_wrong(case, backend)
    except UnsupportedShape as error:
        return _untimed(op, store, shape, 0, "", str(error))
    if wrong or rates is None:
        return _untimed(op, store, shape, case.moved, wrong, "")
    try:
        times = _timed_us(case, backend)
    except Exception as error:
        # what cannot be captured cannot be replayed; the others are measured all the same
        return _untimed(op, store, shape, case.moved, raised(error), "")
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive")
    # seconds that the device needs at the rate that limits the op
    limit, least = "copy", case.moved / rates.copy
    if case.work:
        limit, least = "matmul", case.work / rates.matmul
    return KernelRow(
        op=op,
        format=_format(store),
        shape=str(shape),
        moved=case.moved,
        wrong="",
        refused="",
        us=median,
        p25_us=p25,
        p75_us=p75,
        limit=limit,
        share=1e6 * least / median,
        of_sdpa=baselines.ratio("sdpa", case, median),
        of_flex=baselines.ratio("flex", case, median),
    )


def _timed_us(case: Case, backend: str) -> list[float]:
    """Microseconds per call in each replay, over sets of operands that L2 cannot hold together.

    An op that moves counters is launched behind a copy that puts them back; the time of that copy,
    measured alone, is taken off.
    """
    operands = (*case.rows, *case.buffers)
    count = sets_beyond(l2_bytes(operands[0].device), sum(x.nbytes for x in operands))
    sets = [case, *(case.cloned() for _ in range(count - 1))]
    if not case.mutates:
        return replayed_us([_call(each, backend) for each in sets])
    resets = [_reset(each) for each in sets]
    both = [_both(reset, _call(each, backend)) for reset, each in zip(resets, sets, strict=True)]
    times = replayed_us(both)
    alone = statistics.median(replayed_us(resets))
    return [time - alone for time in times]


def _call(case: Case, backend: str) -> Launch:
    return lambda: case.run(backend, case.buffers)


def _reset(case: Case) -> Launch:
    counters = [case.buffers[index] for index in case.counters]
    saved = [counter.clone() for counter in counters]
    # one launch for all of them
    copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
    return lambda: copy(counters, saved)


def _both(first: Launch, then: Launch) -> Launch:
    return lambda: (first(), then())


def _untimed(
    op: str, store: Store | None, shape: Shape, moved: int, wrong: str, refused: str
) -> KernelRow:
    return KernelRow(
        op=op,
        format=_format(store),
        shape=str(shape),
        moved=moved,
        wrong=wrong,
        refused=refused,
        us=None,
        p25_us=None,
        p75_us=None,
        limit="",
        share=None,
        of_sdpa=None,
        of_flex=None,
    )


def _format(store: Store | None) -> str:
    return f"{store.bits} bit, group {store.group_size}" if isinstance(store, KIVI) else ""


def _cells(row: KernelRow) -> tuple[str, ...]:
    check = f"refused: {row.refused}" if row.refused else "ok"
    check = f"WRONG: {row.wrong}" if row.wrong else check
    moved = bytes_text(row.moved) if row.moved else "-"
    cells = (f"{row.op} {row.format}".strip(), row.shape, check, moved)
    if row.us is None or row.share is None:
        return (*cells, *("-",) * 5)
    return (
        *cells,
        f"{row.us:,.1f}",
        f"{row.p25_us:,.1f}-{row.p75_us:,.1f}",
        f"{row.share:.0%} {row.limit}",
        *("-" if ratio is None else f"{ratio:.2f}x" for ratio in (row.of_sdpa, row.of_flex)),
    )
