"""Decode speed, largest batch and peak memory of a model with random weights, at long contexts."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kvfx.bench.contenders import HF_DEFAULT, Contender, Generated
from kvfx.bench.decode import CHECKED, NOT_FINITE, Row, bench_length, inductor_cache
from kvfx.bench.fill import FILLS, filled_contenders
from kvfx.bench.machine import device_name, today, versions, versions_text
from kvfx.bench.random_weights import random_model
from kvfx.report import aligned
from kvfx.testing.numerics import FACTOR, rounding_step

SEED = 0
GPU_BATCHES = 256
# results that a layer rounds one after the other on the way of the residual stream
ROUNDINGS = 12
# every batch size compiles anew under a static cache
RECOMPILES = 64
HEADER = (
    "context",
    "contender",
    "ms/token",
    "p25-p75",
    "vs HF",
    "fill s",
    "cache MiB",
    "peak MiB",
    "logits*",
    "batch",
    "tokens/s",
    "vs HF",
    "peak MiB",
)
FOOTNOTE = (
    "left: one row, time per token as a multiple of HF default's, below 1 is faster\n"
    "right: the largest batch that fits, tokens per second as a multiple of HF default's, above 1 "
    "is faster\n"
    "* distance of the logits after the context from HF default's, relative to their norm"
)
FILL_NOTES = {
    "prefill": "contexts of random tokens, read by the model in chunks",
    "random": "caches filled with random entries: nothing was read, no prompt was compressed",
}


@dataclass(frozen=True)
class Largest:
    """The largest batch that fits: its size, the median step, new tokens of all rows
    together, and the peak memory."""

    batch: int
    median_ms: float
    tokens_per_second: float
    peak_bytes: int | None


@dataclass(frozen=True)
class LoadRow:
    """One contender at one length: one row, then the largest batch (None where not even one row
    runs). `deviation` is the distance of its logits from HF default's.
    """

    step: Row
    deviation: float | None
    peak_bytes: int | None
    largest: Largest | None
    throughput_ratio: float | None


@dataclass(frozen=True)
class ThroughputBench:
    """All rows, and how they were measured."""

    model: str
    device: str
    threads: int
    date: str
    versions: dict[str, str]
    fill: str
    max_batch: int
    cold_compile: bool
    rounds: int
    new_tokens: int
    rows: tuple[LoadRow, ...]

    def to_dict(self) -> dict[str, object]:
        """Everything as json-able data."""
        return asdict(self)

    def headline(self) -> str:
        """Where and how this was measured, in three lines."""
        cache = "an empty" if self.cold_compile else "the user's (maybe warm)"
        return (
            f"{self.model} with random weights in bfloat16 on {self.device}, {self.threads} "
            f"threads; {versions_text(self.versions)}; {self.date}\n"
            f"{FILL_NOTES[self.fill]}; largest batch searched up to {self.max_batch}\n"
            f"greedy, {self.rounds} interleaved rounds of {self.new_tokens} tokens; compiled with "
            f"{cache} Inductor cache"
        )

    def __str__(self) -> str:
        table = [HEADER, *(_cells(row) for row in self.rows)]
        lines = [self.headline(), *aligned(table, right=range(2, len(HEADER))), FOOTNOTE]
        lines += [
            f"not timed: {row.step.contender} at {row.step.length}: {row.step.refusal}"
            for row in self.rows
            if row.step.refusal
        ]
        return "\n".join(lines)


def bench_random(
    name: str,
    *,
    lengths: Sequence[int],
    policies: Sequence[str],
    fill: str,
    max_batch: int,
    new_tokens: int,
    rounds: int,
    compile: bool,
    cold: bool,
    tell: Callable[[str], None],
) -> ThroughputBench:
    """Time HF's default, kvfx under `policies`, HF's quantized and its static cache on a model of
    the shape `name`, at each length: one row in turns, then each at the largest batch that fits.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell(f"making {name}")
    model = random_model(name, device, SEED)
    vocabulary = model.config.vocab_size
    most = max(CHECKED, new_tokens + 1)
    makers = filled_contenders(model, list(policies), FILLS[fill], most, compile=compile)
    rows: list[LoadRow] = []
    with inductor_cache(cold), _many_recompiles():
        contenders: list[Contender] = []
        for number, make in enumerate(makers, 1):
            tell(f"preparing contender {number} of {len(makers)}")
            contenders.append(make())
        judge = _judge_of(model.config.num_hidden_layers)
        for length in lengths:
            ids = random_ids(vocabulary, max_batch, length)
            one = ids[:1].to(device)
            steps = bench_length(contenders, one, new_tokens, rounds, judge, tell)
            found = []
            for contender, step in zip(contenders, steps, strict=True):
                contender.release()
                largest = None
                if not step.refusal:
                    largest = _largest(contender, ids, device, new_tokens, tell)
                found.append(largest)
            rows += _load_rows(contenders, steps, found)
    return ThroughputBench(
        model=name,
        device=device_name(device),
        threads=torch.get_num_threads(),
        date=today(),
        versions=versions("torch", "triton", "transformers", "kvfx"),
        fill=fill,
        max_batch=max_batch,
        cold_compile=cold,
        rounds=rounds,
        new_tokens=new_tokens,
        rows=tuple(rows),
    )


def default_max_batch() -> int:
    """Up to where batches are tried: a CPU does not say when its memory is used up."""
    return GPU_BATCHES if torch.cuda.is_available() else 1


def random_ids(vocabulary: int, batch: int, length: int) -> Tensor:
    """Seeded random tokens [B, S]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocabulary, (batch, length), generator=generator)


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that fits (0: none), by doubling, then by halving."""
    low, high, batch = 0, most + 1, 1
    doubling = True
    while low < batch < high:
        if fits(batch):
            low = batch
        else:
            high, doubling = batch, False
        batch = min(2 * low, most) if doubling else (low + high) // 2
    return low


def _largest(
    contender: Contender,
    ids: Tensor,
    device: torch.device,
    new_tokens: int,
    tell: Callable[[str], None],
) -> Largest | None:
    runs: dict[int, Generated] = {}

    def fits(batch: int) -> bool:
        tell(f"{ids.shape[1]} tokens: {contender.name} with {batch} rows")
        contender.release()
        _free()
        try:
            runs[batch] = contender.generate(ids[:batch].to(device), new_tokens + 1)
        except torch.OutOfMemoryError:
            return False
        return True

    batch = largest_batch(fits, ids.shape[0])
    contender.release()
    if batch == 0:
        return None
    run = runs[batch]
    step = statistics.median(run.clock.steps)
    return Largest(batch, 1e3 * step, batch / step, run.peak_bytes)


def _load_rows(
    contenders: Sequence[Contender], steps: Sequence[Row], found: Sequence[Largest | None]
) -> list[LoadRow]:
    dense = next(
        (each for step, each in zip(steps, found, strict=True) if step.contender == HF_DEFAULT),
        None,
    )
    rows = []
    for contender, step, largest in zip(contenders, steps, found, strict=True):
        checked, expected = (each.checked.get(step.length) for each in (contender, contenders[0]))
        far = None
        if checked is not None and expected is not None:
            far = deviation(checked, expected)
        ratio = None
        if largest is not None and dense is not None:
            ratio = largest.tokens_per_second / dense.tokens_per_second
        rows.append(
            LoadRow(
                step,
                far,
                None if checked is None else checked.peak_bytes,
                largest,
                ratio,
            )
        )
    return rows


def deviation(found: Generated, expected: Generated) -> float:
    """Distance of the first logits from the expected ones, relative to their norm."""
    a, b = found.logits[0].double(), expected.logits[0].double()
    return ((a - b).norm() / b.norm()).item()


def allowed_deviation(layers: int) -> float:
    """What rounding in another order may cost: independent errors add up like a random walk."""
    return FACTOR * rounding_step(torch.bfloat16) * math.sqrt(ROUNDINGS * layers)


def _judge_of(layers: int) -> Callable[[Contender, Generated, Generated], str]:
    """Random weights have no clear best token: what has to be exact is compared by its logits."""

    def judge(contender: Contender, found: Generated, expected: Generated) -> str:
        if not bool(torch.isfinite(found.logits).all()):
            return NOT_FINITE
        far, allowed = deviation(found, expected), allowed_deviation(layers)
        if contender.exact and not far <= allowed:
            return f"wrong: its logits are {far:.1%} away from HF default's, {allowed:.1%} allowed"
        return ""

    return judge


def _free() -> None:
    """Give the GPU's memory back that nobody holds any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _many_recompiles() -> Iterator[None]:
    """Let torch.compile compile anew for every batch size, where it would else stop compiling."""
    # loads the whole of Dynamo
    from torch._dynamo import config

    with config.patch(recompile_limit=RECOMPILES):
        yield


def _cells(row: LoadRow) -> tuple[str, ...]:
    step, largest = row.step, row.largest
    left = (str(step.length), step.contender, *("-",) * 6, _share(row.deviation))
    if step.median_ms is not None and step.prefill_ms is not None:
        left = (
            str(step.length),
            step.contender,
            f"{step.median_ms:.2f}",
            f"{step.p25_ms:.2f}-{step.p75_ms:.2f}",
            "-" if step.ratio is None else f"{step.ratio:.2f}x",
            f"{step.prefill_ms / 1e3:.1f}",
            _mib(step.cache_bytes),
            _mib(row.peak_bytes),
            _share(row.deviation),
        )
    if largest is None:
        return (*left, *("-",) * 4)
    return (
        *left,
        str(largest.batch),
        f"{largest.tokens_per_second:,.1f}",
        "-" if row.throughput_ratio is None else f"{row.throughput_ratio:.2f}x",
        _mib(largest.peak_bytes),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f}"
