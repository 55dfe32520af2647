"""What `kvfx report` reads: files that are known by what they say, not by their names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfx.bench.decode import DecodeBench, Row
from kvfx.bench.throughput import Largest, LoadRow, ThroughputBench
from kvfx.errors import InputError
from kvfx.eval.results import Measurement, open_results
from kvfx.plan_file import FORMAT as PLAN_FORMAT

EXPECTED = (
    "expected the results of kvfx eval --out, what kvfx bench decode --json prints, or a plan of "
    "kvfx plan --to"
)
# keys of a foreign document that are named
NAMED = 6


@dataclass(frozen=True)
class Inputs:
    """Everything that was read: measurements (each setting once), why policies were not measured,
    benchmarks, and documents of plans by file name. `repeated` counts measurements of a setting
    that an earlier file has.
    """

    measurements: tuple[Measurement, ...]
    refused: dict[str, str]
    benches: tuple[DecodeBench | ThroughputBench, ...]
    plans: dict[str, dict[str, Any]]
    repeated: int


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """What the files hold. Raises InputError for one that cannot be read or is something else."""
    measurements: list[Measurement] = []
    refused: dict[str, str] = {}
    benches: list[DecodeBench | ThroughputBench] = []
    plans: dict[str, dict[str, Any]] = {}
    repeated = 0
    for path in paths:
        document = _document(path)
        if "measurements" in document:
            known = [found.setting for found in measurements]
            read = open_results(path).measurements
            new = [found for found in read if found.setting not in known]
            measurements += new
            repeated += len(read) - len(new)
            refused.update(document.get("refused", {}))
        elif "kvfx_plan" in document:
            plans[_unique(path, plans)] = _plan(document, path)
        elif "rows" in document and "new_tokens" in document:
            benches.append(_bench(document, path))
        else:
            raise InputError(f"{path} is {_described(document)}: {EXPECTED}")
    if not measurements and not benches and not plans:
        raise InputError(f"{', '.join(map(str, paths))}: no measurement is in there: measure first")
    return Inputs(tuple(measurements), refused, tuple(benches), plans, repeated)


def steps(bench: DecodeBench | ThroughputBench) -> list[Row]:
    """The rows of a benchmark, each of one contender at one context."""
    return [row.step if isinstance(row, LoadRow) else row for row in bench.rows]


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): {EXPECTED}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is {_described(document)}: {EXPECTED}")
    return document


def _described(document: Any) -> str:
    """What a foreign document is."""
    if isinstance(document, list):
        return f"a JSON list of {len(document)} items"
    if not isinstance(document, dict):
        return f"a JSON {type(document).__name__}"
    keys = ", ".join(list(map(repr, document))[:NAMED]) or "no keys"
    return f"a JSON object with {keys}{', ...' if len(document) > NAMED else ''}"


def _unique(path: Path, plans: dict[str, Any]) -> str:
    """The name of a file, or its path where another one has that name."""
    return str(path) if path.name in plans else path.name


def _plan(document: dict[str, Any], path: Path) -> dict[str, Any]:
    if document["kvfx_plan"] != PLAN_FORMAT:
        raise InputError(
            f"{path} has format {document['kvfx_plan']!r}, this version reads {PLAN_FORMAT}: plan "
            "again"
        )
    sites = document.get("sites")
    if not isinstance(document.get("policy"), str) or not isinstance(sites, list) or not sites:
        raise InputError(f"{path} says kvfx_plan, but has no policy or no sites: plan again")
    return document


def _bench(document: dict[str, Any], path: Path) -> DecodeBench | ThroughputBench:
    """A benchmark as it was before it was printed."""
    try:
        rows = document["rows"]
        if "fill" in document:
            return ThroughputBench(**{**document, "rows": tuple(map(_load_row, rows))})
        return DecodeBench(**{**document, "rows": tuple(Row(**row) for row in rows)})
    except (TypeError, KeyError) as error:
        raise InputError(
            f"{path} looks like kvfx bench decode --json, but is not of this version: {error}: "
            "measure again"
        ) from error


def _load_row(row: dict[str, Any]) -> LoadRow:
    largest = row["largest"] and Largest(**row["largest"])
    return LoadRow(**{**row, "step": Row(**row["step"]), "largest": largest})
