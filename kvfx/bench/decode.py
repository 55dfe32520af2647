"""Decode speed of every contender at several context lengths, measured side by side."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.bench.contenders import (
    HF_DEFAULT,
    Contender,
    Generated,
    hf_default,
    hf_static,
    kvfx_under,
)
from kvfx.bench.machine import device_name, today, versions, versions_text
from kvfx.report import aligned

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# tokens that have to be right before anything is timed
CHECKED = 8
# characters of prose that hold at least one token
CHARACTERS = 8
HEADER = (
    "context",
    "contender",
    "ms/token",
    "p25-p75",
    "vs HF",
    "prefill ms",
    "cache MiB",
    "compress s",
    "first call s*",
)
FOOTNOTE = (
    "vs HF: time per token as a multiple of HF default's, below 1 is faster\n"
    "* the very first prefill and decode step, in which torch.compile works"
)
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
NO_ROOM = "does not fit into memory"
NOT_FINITE = "wrong: logits are not finite"

# why a contender must not be timed, from what it gave and what HF's default gave
Judge = Callable[[Contender, Generated, Generated], str]


@dataclass(frozen=True)
class Row:
    """One contender at one length; times in milliseconds per token, `ratio` to HF's default.

    `refusal` says why it was not timed. `cold_seconds` is the first prefill and decode of the
    contender with everything compiled.
    """

    contender: str
    length: int
    median_ms: float | None
    p25_ms: float | None
    p75_ms: float | None
    ratio: float | None
    prefill_ms: float | None
    compress_seconds: float
    cold_seconds: float
    cache_bytes: int | None
    refusal: str


@dataclass(frozen=True)
class DecodeBench:
    """All rows, and where they were measured."""

    model: str
    device: str
    dtype: str
    threads: int
    date: str
    versions: dict[str, str]
    cold_compile: bool
    rounds: int
    new_tokens: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, object]:
        """Everything as json-able data."""
        return asdict(self)

    def headline(self) -> str:
        """Where and how this was measured, in two lines."""
        versions = versions_text(self.versions)
        cache = "an empty" if self.cold_compile else "the user's (maybe warm)"
        return (
            f"{self.model} in {self.dtype} on {self.device}, {self.threads} threads; {versions}; "
            f"{self.date}\n"
            f"batch 1, greedy, {self.rounds} interleaved rounds of {self.new_tokens} tokens, real "
            f"text; compiled with {cache} Inductor cache"
        )

    def __str__(self) -> str:
        table = [HEADER, *(_cells(row) for row in self.rows)]
        lines = [self.headline(), *aligned(table, right=range(2, len(HEADER))), FOOTNOTE]
        lines += [
            f"not timed: {row.contender} at {row.length}: {row.refusal}"
            for row in self.rows
            if row.refusal
        ]
        return "\n".join(lines)


def bench_decode(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int],
    policies: Sequence[str],
    new_tokens: int,
    rounds: int,
    compile: bool,
    cold: bool,
    tell: Callable[[str], None],
) -> DecodeBench:
    """Time HF's default, HF's static cache, and kvfx under `policies` in turns, at each length.

    Every contender is checked against HF's default in the first round, and refused with a reason
    where it is wrong or cannot run. `tell` is told what happens.
    """
    # the static cache comes last: the ways that have to work are known to work before it is tried
    makers: list[Callable[[], Contender]] = [lambda: hf_default(model)]
    for policy in policies:
        makers.append(lambda policy=policy: kvfx_under(model, policy, compile=compile))
    if compile:
        makers.append(lambda: hf_static(model))
    rows: list[Row] = []
    with inductor_cache(cold):
        contenders: list[Contender] = []
        for number, make in enumerate(makers, 1):
            tell(f"preparing contender {number} of {len(makers)}")
            contenders.append(make())
        for length in lengths:
            ids = text_ids(tokenizer, length).to(model.device)
            rows += bench_length(contenders, ids, new_tokens, rounds, why_wrong, tell)
    found = versions("torch", "transformers")
    return measured_here(name, model, rows, found, cold=cold, rounds=rounds, new_tokens=new_tokens)


def measured_here(
    name: str,
    model: PreTrainedModel,
    rows: Sequence[Row],
    versions: dict[str, str],
    *,
    cold: bool,
    rounds: int,
    new_tokens: int,
) -> DecodeBench:
    """Rows that were just measured on this machine."""
    return DecodeBench(
        model=name,
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        date=today(),
        versions=versions,
        cold_compile=cold,
        rounds=rounds,
        new_tokens=new_tokens,
        rows=tuple(rows),
    )


def text_ids(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """`length` tokens of prose [1, S]; the passages repeat where they are not long enough."""
    from kvfx.testing.text import passages

    text = " ".join(passages())[: CHARACTERS * length]
    ids = list(tokenizer(text)["input_ids"])
    repeats = -(-length // len(ids))
    return torch.tensor([(ids * repeats)[:length]])


def bench_length(
    contenders: Sequence[Contender],
    ids: Tensor,
    new_tokens: int,
    rounds: int,
    judge: Judge,
    tell: Callable[[str], None],
) -> list[Row]:
    """Time all contenders in turns after the prompt `ids` [1, S]. The first round is checked: who
    is wrong there is refused, and not timed.
    """
    length, tokens = ids.shape[1], new_tokens + 1
    expected: Generated | None = None
    runs: dict[str, list[Generated]] = {}
    for contender in contenders:
        tell(f"{length} tokens: round 1 of {rounds}, {contender.name}")
        found = _try(contender, ids, max(CHECKED, tokens))
        expected = found if expected is None else expected
        if found is not None and expected is not None:
            reason = judge(contender, found, expected)
            contender.refused.update({length: reason} if reason else {})
        if found is not None and length not in contender.refused:
            runs[contender.name] = [found]
    racing = [contender for contender in contenders if contender.name in runs]
    for number in range(1, rounds):
        # each round starts with another one, so that no contender is always the first
        turn = number % len(racing)
        for contender in racing[turn:] + racing[:turn]:
            tell(f"{length} tokens: round {number + 1} of {rounds}, {contender.name}")
            runs[contender.name].append(contender.generate(ids, tokens))
    dense = _median_ms(runs[HF_DEFAULT]) if runs.get(HF_DEFAULT) else None
    return [
        _row(contender, length, runs.get(contender.name, []), dense) for contender in contenders
    ]


def _try(contender: Contender, ids: Tensor, tokens: int) -> Generated | None:
    """The first tokens of a contender that was run before; None where it cannot run, with the
    reason noted.

    HF's default has to run, but for memory that is too small: what it raises is the user's to see.
    """
    length = ids.shape[1]
    if contender.refusal:
        contender.refused[length] = contender.refusal
        return None
    try:
        if not contender.cold_seconds:
            first = contender.generate(ids, 2)
            contender.cold_seconds = first.clock.times[2] - first.clock.times[0]
        found = contender.generate(ids, tokens)
        contender.checked[length] = found
        return found
    except torch.OutOfMemoryError:
        # a shorter context or another contender may fit
        contender.refused[length] = NO_ROOM
        return None
    except Exception as error:
        if contender.name == HF_DEFAULT:
            raise
        # code of others may fail in any way: the row says how
        said = str(error).strip() or "no message"
        contender.refusal = f"cannot run: {type(error).__name__}: {said.splitlines()[0]}"
        contender.refused[length] = contender.refusal
        return None


def why_wrong(contender: Contender, found: Generated, expected: Generated) -> str:
    """Why a contender must not be timed: its tokens or logits are wrong; "" where they are not."""
    if not bool(torch.isfinite(found.logits).all()):
        return NOT_FINITE
    if found.tokens[0] != expected.tokens[0]:
        return "wrong: its first token is not the dense model's"
    if contender.exact and found.tokens[:CHECKED] != expected.tokens[:CHECKED]:
        return f"wrong: its {CHECKED} greedy tokens are not the dense model's"
    return ""


def _row(contender: Contender, length: int, runs: Sequence[Generated], dense: float | None) -> Row:
    if not runs:
        return Row(
            contender.name,
            length,
            *(None,) * 5,
            compress_seconds=contender.compress_seconds,
            cold_seconds=contender.cold_seconds,
            cache_bytes=None,
            refusal=contender.refused[length],
        )
    p25, median, p75 = statistics.quantiles(_steps_ms(runs), n=4, method="inclusive")
    return Row(
        contender.name,
        length,
        median,
        p25,
        p75,
        ratio=None if dense is None else median / dense,
        prefill_ms=1e3 * statistics.median(run.fill_seconds + run.clock.first for run in runs),
        compress_seconds=contender.compress_seconds,
        cold_seconds=contender.cold_seconds,
        cache_bytes=runs[-1].cache_bytes,
        refusal="",
    )


def _steps_ms(runs: Sequence[Generated]) -> list[float]:
    return [1e3 * step for run in runs for step in run.clock.steps]


def _median_ms(runs: Sequence[Generated]) -> float:
    return statistics.median(_steps_ms(runs))


def _cells(row: Row) -> tuple[str, ...]:
    compress = f"{row.compress_seconds:.1f}" if row.compress_seconds else "-"
    cold = f"{row.cold_seconds:.1f}" if row.cold_seconds else "-"
    if row.median_ms is None or row.cache_bytes is None:
        return (str(row.length), row.contender, *("-",) * 5, compress, cold)
    return (
        str(row.length),
        row.contender,
        f"{row.median_ms:.1f}",
        f"{row.p25_ms:.1f}-{row.p75_ms:.1f}",
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        f"{row.prefill_ms:,.0f}",
        f"{row.cache_bytes / 2**20:.1f}",
        compress,
        cold,
    )


@contextmanager
def inductor_cache(cold: bool) -> Iterator[None]:
    """Let Inductor start from an empty cache of its own, if `cold`; the user's is left alone."""
    if not cold:
        yield
        return
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="kvfx-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            if before is not None:
                os.environ[CACHE_VARIABLE] = before
