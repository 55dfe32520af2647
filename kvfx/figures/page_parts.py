"""What stands on the page of a report: facts, tables, and settings."""

from __future__ import annotations

from collections.abc import Sequence

from kvfx.bench.machine import versions_text
from kvfx.eval.table import sections
from kvfx.figures import markup
from kvfx.figures.collect import Picture
from kvfx.figures.inputs import Inputs, steps
from kvfx.figures.speed import MEBIBYTE, said

BENCH = ("contender", "context", "ms/token", "p25-p75", "vs HF", "cache MiB")
EVEN = ("contender", "faster than dense", "smaller than dense")
SETTINGS = ("task", "length", "samples", "seed", "text", "options", "hash of all tokens read")


def overview(inputs: Inputs) -> list[str]:
    """Each place of measurements once, then those of benchmarks, which say it themselves."""
    places = [
        {
            "model": f"{found.setting.model} in {found.setting.dtype}",
            "device": f"{found.device}, {found.threads} threads",
            "versions": versions_text(found.versions),
            "date": found.date,
        }
        for found in inputs.measurements
    ]
    once = [place for at, place in enumerate(places) if place not in places[:at]]
    parts = [markup.facts(place) for place in once]
    for bench in inputs.benches:
        parts += [markup.note(line) for line in bench.headline().splitlines()]
    if inputs.repeated:
        said_twice = f"{inputs.repeated} measurements are in more than one file, and shown once"
        parts.append(markup.note(said_twice))
    return parts


def tables(inputs: Inputs) -> list[str]:
    """Every table of the measurements, and what was refused."""
    parts = []
    for part in sections(inputs.measurements):
        parts.append(f"<h3>{markup.text(part.title)}</h3>")
        parts.append(markup.table(part.title, part.header, part.rows))
        parts.append(markup.note(part.remark))
    if inputs.refused:
        rows = list(inputs.refused.items())
        table = markup.table("not measured", ("policy", "reason"), rows, left=(0, 1))
        parts.append(markup.details(f"Not measured, and why: {len(rows)}", table))
    return parts


def benches(inputs: Inputs) -> list[str]:
    """The rows of every benchmark, and what was not timed."""
    parts = []
    for bench in inputs.benches:
        rows = [
            (
                row.contender,
                f"{row.length:,}",
                f"{row.median_ms:.1f}",
                f"{row.p25_ms:.1f}-{row.p75_ms:.1f}",
                "-" if row.ratio is None else f"{row.ratio:.2f}x",
                "-" if row.cache_bytes is None else f"{row.cache_bytes / MEBIBYTE:.1f}",
            )
            for row in steps(bench)
            if row.median_ms is not None
        ]
        parts.append(f"<h3>{markup.text(bench.model)}</h3>")
        parts.append(markup.table(f"speed of {bench.model}", BENCH, rows))
        parts.append(markup.note("vs HF: time per token as a multiple of HF default's"))
        parts += [
            markup.note(f"not timed: {row.contender} at {row.length:,}: {row.refusal}")
            for row in steps(bench)
            if row.refusal
        ]
    return parts


def even(pictures: Sequence[Picture]) -> list[str]:
    """From which context on caches pay."""
    parts = []
    for picture in pictures:
        if picture.section != "speed":
            continue
        rows = [
            (one["name"], said(one["faster"]), said(one["smaller"]))
            for one in picture.data["contenders"]
            if one["points"] and one["name"] != picture.data["dense"]
        ]
        parts.append(markup.table("break-even", EVEN, rows, left=(0, 1, 2)))
        parts.append(
            markup.note(
                "tokens of context; interpolated: where straight lines between measured contexts "
                "cross"
            )
        )
    return parts


def plans(inputs: Inputs) -> list[str]:
    """The whole policy of every plan."""
    return [
        markup.details(f"{name}: the policy", f"<p><code>{markup.text(plan['policy'])}</code></p>")
        for name, plan in inputs.plans.items()
    ]


def settings(inputs: Inputs) -> list[str]:
    """What each table was measured with, to be repeated."""
    rows = []
    for found in inputs.measurements:
        setting = found.setting
        options = ", ".join(f"{name} {value}" for name, value in setting.options.items())
        row = (setting.task, f"{setting.length:,}", str(setting.samples), str(setting.seed),
               setting.text, options, setting.inputs_sha256)  # fmt: skip
        rows += [] if row in rows else [row]
    if not rows:
        return []
    table = markup.table("settings", SETTINGS, rows, left=(0, 4, 5, 6))
    return [markup.details("Seeds, options and hashes of every table", table)]
