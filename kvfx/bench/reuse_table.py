"""What `kvfx bench reuse` measured: samples, rows of medians, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvfx.bench.machine import bytes_text, versions_text
from kvfx.bench.reuse_contenders import DENSE
from kvfx.eval.table import Section

# what stands between a request and its first token; `last` is the step that reads the last token
STEPS = ("retrieve", "assemble", "compute", "adopt", "last")
# what is done before a request comes, or after its first token
APART = ("learn", "publish")
# all agents together
ALL = "all"
HEADER = (
    "policy",
    "agent",
    "first token, ms",
    "dense / policy",
    *STEPS,
    *APART,
    "found",
    "calls",
    "again",
    "new",
    "read",
    "stored",
    "KL, nats",
    "agree",
)
REMARK = (
    "median and range over prompts; dense / policy: time to the first token, above 1 is faster "
    "than the dense prefill; first token = retrieve + assemble + compute + adopt + last, in ms; "
    "learn (storing a prompt) and publish (texts computed alone) are not in it; found: tokens that "
    "were stored; calls: prompts with any; again, new: rows that were computed, found and not; KL, "
    "agree: the first tokens of the reply against the dense model, mean and largest KL of a prompt"
)


@dataclass(frozen=True)
class Sample:
    """One prompt of one contender; `seconds` per step. Of its `tokens`, all but the last, so many
    were `found` (`exact` ones without error), `repaired` though found, or `computed` as new; `read`
    and `stored` are bytes. `kl` (nats) and `agreement` are means over the scored tokens.
    """

    workload: str
    contender: str
    agent: str
    prompt: int
    tokens: int
    seconds: dict[str, float]
    found: int
    exact: int
    repaired: int
    computed: int
    read: int
    stored: int
    kl: float
    agreement: float

    @property
    def first_seconds(self) -> float:
        """From the request to the first token."""
        return sum(self.seconds.get(step, 0.0) for step in STEPS)


@dataclass(frozen=True)
class Spread:
    """The median of some values, and their range."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of `values`, at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, spec: str, unit: str) -> str:
        """The spread in a cell."""
        median, least, most = (f"{x:{spec}}" for x in (self.median, self.least, self.most))
        return f"{median}{unit} [{least}, {most}]"


@dataclass(frozen=True)
class Row:
    """All prompts of one contender (of one `agent`, or of `"all"`; "" without agents). `steps` are
    median milliseconds. `ratio` is dense time over that of the contender, prompt by prompt;
    `reused` the same for those with any token found. `found` is the part of all tokens, `calls`
    that of such prompts; `repaired` and `computed` are median rows per prompt, `read` median bytes,
    `stored` those after the last prompt.
    """

    workload: str
    contender: str
    agent: str
    prompts: int
    first_ms: Spread
    ratio: Spread
    reused: Spread | None
    steps: dict[str, float]
    found: float
    calls: float
    repaired: float
    computed: float
    read: float
    stored: int
    kl: float
    most_kl: float
    agreement: float


@dataclass(frozen=True)
class ReuseBench:
    """All samples, and where they were measured; `titles` says what each workload is."""

    model: str
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    date: str
    compiled: bool
    text: str
    seed: int
    scored: int
    titles: dict[str, str]
    samples: tuple[Sample, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """One row per workload, agent and contender; of agents, first all of them together."""
        return tuple(row for workload in self.titles for row in _rows(self.samples, workload))

    def to_dict(self) -> dict[str, object]:
        """Everything as json-able data."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> ReuseBench:
        """What `to_dict` gave."""
        given = {name: value for name, value in document.items() if name != "rows"}
        return cls(**{**given, "samples": tuple(Sample(**each) for each in given["samples"])})

    def headline(self) -> str:
        """Where and how this was measured, in two lines."""
        how = "compiled" if self.compiled else "not compiled"
        return (
            f"{self.model} in {self.dtype} on {self.device}, {self.threads} threads; "
            f"{versions_text(self.versions)}; {self.date}\n"
            f"Full() caches, {how}, rows of reuse computed eagerly; text {self.text}, seed "
            f"{self.seed}; {self.scored} tokens scored per prompt; contenders in turns"
        )

    def sections(self) -> list[Section]:
        """One table per workload."""
        return [
            _section(title, [row for row in self.rows if row.workload == workload])
            for workload, title in self.titles.items()
        ]

    def markdown(self) -> str:
        """The tables as Markdown."""
        return "\n".join((self.headline(), "", *(part.markdown() for part in self.sections())))


def _rows(samples: Sequence[Sample], workload: str) -> list[Row]:
    mine = [sample for sample in samples if sample.workload == workload]
    agents = list(dict.fromkeys(sample.agent for sample in mine if sample.agent))
    names = dict.fromkeys(sample.contender for sample in mine)
    whole = {
        (sample.agent, sample.prompt): sample.first_seconds
        for sample in mine
        if sample.contender == DENSE
    }
    rows = []
    for agent in (ALL, *agents) if agents else ("",):
        for name in names:
            chosen = [
                sample
                for sample in mine
                if sample.contender == name and agent in (ALL, sample.agent)
            ]
            rows.append(_row(workload, name, agent, chosen, whole))
    return rows


def _row(
    workload: str,
    name: str,
    agent: str,
    samples: Sequence[Sample],
    whole: dict[tuple[str, int], float],
) -> Row:
    def middle(value: Callable[[Sample], float]) -> float:
        return statistics.median(map(value, samples))

    ratios = [whole[sample.agent, sample.prompt] / sample.first_seconds for sample in samples]
    reused = [ratio for ratio, sample in zip(ratios, samples, strict=True) if sample.found > 0]
    return Row(
        workload=workload,
        contender=name,
        agent=agent,
        prompts=len(samples),
        first_ms=Spread.of([1e3 * sample.first_seconds for sample in samples]),
        ratio=Spread.of(ratios),
        reused=Spread.of(reused) if reused else None,
        steps={
            step: 1e3 * middle(lambda sample, step=step: sample.seconds.get(step, 0.0))
            for step in (*STEPS, *APART)
        },
        found=sum(sample.found for sample in samples) / sum(sample.tokens for sample in samples),
        calls=statistics.fmean(sample.found > 0 for sample in samples),
        repaired=middle(lambda sample: sample.repaired),
        computed=middle(lambda sample: sample.computed),
        read=middle(lambda sample: sample.read),
        stored=samples[-1].stored,
        kl=statistics.fmean(sample.kl for sample in samples),
        most_kl=max(sample.kl for sample in samples),
        agreement=statistics.fmean(sample.agreement for sample in samples),
    )


def _section(title: str, rows: Sequence[Row]) -> Section:
    table = [HEADER, *(_cells(row) for row in rows)]
    if not any(row.agent for row in rows):
        table = [(cells[0], *cells[2:]) for cells in table]
    return Section(title, table[0], tuple(table[1:]), REMARK)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.contender,
        row.agent,
        row.first_ms.text(",.0f", ""),
        row.ratio.text(".2f", "x"),
        *(f"{row.steps[step]:,.0f}" for step in (*STEPS, *APART)),
        f"{row.found:.0%}",
        f"{row.calls:.0%}",
        f"{row.repaired:,.0f}",
        f"{row.computed:,.0f}",
        bytes_text(row.read),
        bytes_text(row.stored),
        f"{row.kl:.2g} [{row.most_kl:.2g}]",
        f"{row.agreement:.0%}",
    )
