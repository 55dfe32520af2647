"""Measured files as the tables of pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kvfx.bench.contenders import HF_DEFAULT, KVFX_EXACT
from kvfx.bench.decode import DecodeBench, Row
from kvfx.bench.reuse_table import ALL, ReuseBench
from kvfx.bench.reuse_workloads import AGENTS
from kvfx.bench.throughput import ThroughputBench
from kvfx.eval.fidelity import Fidelity
from kvfx.eval.results import Measurement, open_results
from kvfx.eval.table import DENSE, dense_of, headline, markdown_table, sections
from kvfx.figures.inputs import read_inputs, steps
from kvfx.figures.labels import method_of

Bench = DecodeBench | ThroughputBench
BUDGETS = (0.75, 0.5, 0.25)
# how contenders are named that need no environment of their own
OWN = ("kvfx ", "HF ")
# what the README says a token takes under
SAID = ("kvfx kivi-4bit", "kvfx snapkv-25%")
CHOOSING = ("kvfx snapkv-25%", "kvfx snapkv-25%|kvcrush", "kvfx h2o-20%")
COMMUNICATED = (
    "policy",
    "calls reused (last agent)",
    "first token, all agents",
    "faster where reused",
    "KL, nats (worst prompt)",
    "next tokens agree",
)
# columns of what reuse gains and costs
REUSED = (
    "policy",
    "first token",
    "faster than dense",
    "found",
    "computed again",
    "KL, nats (worst prompt)",
    "next tokens agree",
)


def evaluated(path: Path) -> str:
    """Every task of an evaluation, as `kvfx eval --markdown` prints it."""
    found = open_results(path).measurements
    return "\n".join((headline(found), "", *(part.markdown() for part in sections(found))))


def fidelity(path: Path) -> str:
    """Policies by their bytes, KL and flips."""
    found = open_results(path).measurements
    dense = _dense(found)
    rows = [
        (
            each.label,
            f"{each.scores.cache_bytes / dense.scores.cache_bytes:.0%}",
            f"{_scores(each).perplexity:.2f}",
            f"{_scores(each).kl:.2g}",
            f"{_scores(each).flips:.1%}",
        )
        for each in found
    ]
    return _page(found, ("policy", "of dense", "perplexity", "KL, nats", "flips"), rows)


def by_budget(path: Path) -> str:
    """Methods in order of their KL at half the tokens, budgets side by side."""
    found = open_results(path).measurements
    groups: dict[str, list[Measurement]] = {}
    for each in found:
        if each.setting.policy != DENSE:
            groups.setdefault(method_of(each.label), []).append(each)
    for group in groups.values():
        group.sort(key=lambda each: -each.scores.cache_bytes)
    middle = len(BUDGETS) // 2
    ranked = sorted(groups.items(), key=lambda item: _scores(item[1][middle]).kl)
    rows = [
        (
            method,
            *(f"{_scores(each).perplexity:.2f}" for each in group),
            *(f"{_scores(each).kl:.4f}" for each in group),
            f"{_scores(group[-1]).flips:.0%}",
        )
        for method, group in ranked
    ]
    first, *others = (f"{budget:g}" for budget in BUDGETS)
    header = ("method", f"perplexity {first}", *others, f"KL {first}", *others, "flips 0.25")
    return _page(found, header, rows)


def by_share(path: Path) -> str:
    """Methods at the bytes that they take, each with what it costs there."""
    found = open_results(path).measurements
    dense = _dense(found)
    groups: dict[str, list[str]] = {}
    for each in found:
        if each.setting.policy != DENSE:
            share = each.scores.cache_bytes / dense.scores.cache_bytes
            scores = _scores(each)
            cell = f"{scores.kl:.2g} ({scores.perplexity:.2f}) at {share:.0%}"
            groups.setdefault(method_of(each.label), []).append(cell)
    most = max(map(len, groups.values()))
    rows = [(name, *cells, *[""] * (most - len(cells))) for name, cells in groups.items()]
    header = ("policy", "KL, nats (perplexity) at its share of the dense bytes", *[""] * (most - 1))
    return _page(found, header, rows)


def decoded(path: Path) -> str:
    """Milliseconds per token of transformers and kvfx at every context."""
    (bench,) = read_inputs([path]).benches
    return _decoded(bench, [row for row in steps(bench) if row.contender.startswith(OWN)])


def decoded_by_peers(path: Path) -> str:
    """Milliseconds per token of every contender at the longest context."""
    (bench,) = read_inputs([path]).benches
    return _decoded(bench, _longest(bench))


def in_words(path: Path) -> str:
    """What a token takes at the longest context, and what comes before the first one."""
    (bench,) = read_inputs([path]).benches
    rows = {row.contender: row for row in _longest(bench)}
    dense, *others = (f"{rows[name].median_ms:.1f} ms" for name in (HF_DEFAULT, *SAID))
    under = " and ".join(
        f"{took} under `{name.removeprefix('kvfx ')}`"
        for took, name in zip(others, SAID, strict=True)
    )
    ours = [row for row in rows.values() if row.compress_seconds]
    rewritten, compiled = (
        f"{min(seconds):.1f} to {max(seconds):.1f} s"
        for seconds in zip(*((row.compress_seconds, row.cold_seconds) for row in ours), strict=True)
    )
    shortest = min(row.length for row in steps(bench))
    return (
        f"Behind {rows[HF_DEFAULT].length:,} tokens, on a CPU with {bench.threads} threads, a "
        f"token took {dense} with transformers' default cache, {under}, in one run. Rewriting and "
        f"verifying took {rewritten} before that (the model is traced once for all policies), and "
        f"the first token of a prompt of {shortest:,}, with compiling (its cache may be warm), "
        f"{compiled}."
    )


def chosen(path: Path) -> str:
    """How long prompts take under methods that choose, beside the one that keeps all."""
    (bench,) = read_inputs([path]).benches
    known = {row.contender: row.prefill_ms for row in _longest(bench)}
    whole = known[KVFX_EXACT]
    rows = [
        (name.removeprefix("kvfx "), f"{known[name] / 1e3:.2f}", f"{known[name] / whole:.2f}")
        for name in (KVFX_EXACT, *CHOOSING)
    ]
    return markdown_table(("policy", "prefill s", "of full"), rows)


def reused(workload: str, path: Path) -> str:
    """Time to the first token and what it costs, under each way of reuse."""
    bench = ReuseBench.from_dict(json.loads(path.read_text("utf-8")))
    cells = [
        (
            row.contender,
            f"{row.first_ms.median:,.0f} ms",
            f"{row.ratio.median:.3g}x",
            f"{row.found:.0%}",
            f"{row.repaired:,.0f}",
            f"{row.kl:.2g} ({row.most_kl:.2g})",
            f"{row.agreement:.0%}",
        )
        for row in bench.rows
        if row.workload == workload
    ]
    table = markdown_table(REUSED, cells)
    return f"{bench.headline()}; {bench.titles[workload]}\n\n{table}"


def communicated(path: Path) -> str:
    """What agents gain by each other's texts: all of them, the last one, and calls that reused."""
    bench = ReuseBench.from_dict(json.loads(path.read_text("utf-8")))
    rows = {(row.contender, row.agent): row for row in bench.rows if row.workload == AGENTS}
    *_, last = (agent for _, agent in rows)
    cells = []
    for name in dict.fromkeys(name for name, _ in rows):
        every, end = rows[name, ALL], rows[name, last]
        cells.append(
            (
                name,
                f"{every.calls:.0%} ({end.calls:.0%})",
                f"{every.first_ms.median:,.0f} ms",
                f"{end.first_ms.median:,.0f} ms",
                "-" if every.reused is None else every.reused.text(".3g", "x"),
                f"{every.kl:.2g} ({every.most_kl:.2g})",
                f"{every.agreement:.0%}",
            )
        )
    header = (*COMMUNICATED[:3], f"first token, {last}", *COMMUNICATED[3:])
    table = markdown_table(header, cells)
    return f"{bench.headline()}; {bench.titles[AGENTS]}\n\n{table}"


def _decoded(bench: Bench, chosen: Sequence[Row]) -> str:
    rows = [
        (
            row.contender,
            f"{row.length:,}",
            *(_timed(row) if row.median_ms is not None else (row.refusal, "", "", "")),
        )
        for row in chosen
    ]
    times = ("ms/token (p25-p75)", "of HF default", "prefill s", "cache MiB")
    table = markdown_table(("contender", "context", *times), rows)
    return f"{bench.headline()}\n\n{table}"


def _longest(bench: Bench) -> list[Row]:
    most = max(row.length for row in steps(bench))
    return [row for row in steps(bench) if row.length == most]


def _timed(row: Row) -> tuple[str, ...]:
    assert row.ratio is not None
    assert row.prefill_ms is not None
    assert row.cache_bytes is not None
    return (
        f"{row.median_ms:.1f} ({row.p25_ms:.1f}-{row.p75_ms:.1f})",
        f"{row.ratio:.2f}",
        f"{row.prefill_ms / 1e3:.2f}",
        f"{row.cache_bytes / 2**20:.1f}",
    )


def _dense(found: Sequence[Measurement]) -> Measurement:
    dense = dense_of(found)
    assert dense is not None
    return dense


def _scores(found: Measurement) -> Fidelity:
    assert isinstance(found.scores, Fidelity)
    return found.scores


def _page(
    found: Sequence[Measurement], header: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    setting = found[0].setting
    what = (
        f"{setting.length:,} tokens, then {setting.options['scored']} scored, read by "
        f"{setting.options['chunk']}; {setting.samples} windows of text {setting.text}, seed "
        f"{setting.seed}; dense perplexity {_scores(found[0]).dense_perplexity:.2f}"
    )
    return f"{headline(found)}. {what}.\n\n{markdown_table(header, rows)}"
