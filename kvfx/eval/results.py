"""Measurements as data: what was measured, where, and a file that remembers what is done."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvfx.errors import InputError
from kvfx.eval.answers import Retrieval
from kvfx.eval.fidelity import Fidelity, WindowScore

FORMAT = 1


@dataclass(frozen=True)
class Setting:
    """What is measured: equal settings give equal numbers, on one machine with one set of
    versions.

    `policy` is its `repr`. `inputs_sha256` is the hash of all tokens that are read. `options` are
    those of the task: what is scored, how it is asked, the hash of its template.
    """

    model: str
    dtype: str
    task: str
    policy: str
    length: int
    samples: int
    seed: int
    text: str
    inputs_sha256: str
    options: dict[str, int | str]


@dataclass(frozen=True)
class Measurement:
    """The scores of one policy at one task and length; `label` is the policy as it is typed."""

    setting: Setting
    label: str
    scores: Fidelity | Retrieval
    device: str
    threads: int
    versions: dict[str, str]
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as json-able data, with what follows from the scores."""
        return {**asdict(self), "kind": type(self.scores).__name__, "summary": _summary(self)}


@dataclass
class Results:
    """All measurements, kept in a file if `path` is not None; `refused` says why a policy could not
    be measured.
    """

    path: Path | None
    measurements: list[Measurement] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def find(self, setting: Setting) -> Measurement | None:
        """The measurement of this setting, if there is one."""
        return next((found for found in self.measurements if found.setting == setting), None)

    def add(self, measurement: Measurement) -> None:
        """Remember a measurement; the file is whole at any time."""
        self.measurements.append(measurement)
        if self.path is None:
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")
        os.replace(partial, self.path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as json-able data."""
        return {
            "format": FORMAT,
            "measurements": [found.to_dict() for found in self.measurements],
            "refused": self.refused,
        }


def open_results(path: Path | None) -> Results:
    """The results in the file at `path`, or none yet."""
    if path is None or not path.exists():
        return Results(path)
    try:
        document = json.loads(path.read_text("utf-8"))
        if document["format"] != FORMAT:
            raise InputError(
                f"{path} has format {document['format']!r}, this version writes {FORMAT}: name "
                "another file"
            )
        return Results(path, [_measurement(row) for row in document["measurements"]])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} does not hold results of kvfx eval: {error!r}") from error


def _measurement(row: dict[str, Any]) -> Measurement:
    scores = row["scores"]
    if row["kind"] == Fidelity.__name__:
        windows = tuple(WindowScore(**window) for window in scores["windows"])
        found: Fidelity | Retrieval = Fidelity(windows, scores["cache_bytes"])
    else:
        lists = {name: tuple(scores[name]) for name in ("depths", "hits", "nll")}
        found = Retrieval(**lists, cache_bytes=scores["cache_bytes"])
    facts = {name: row[name] for name in ("label", "device", "threads", "versions", "date")}
    return Measurement(Setting(**row["setting"]), scores=found, **facts)


def _summary(found: Measurement) -> dict[str, float]:
    scores = found.scores
    if isinstance(scores, Retrieval):
        return {"rate": scores.rate}
    names = ("perplexity", "dense_perplexity", "kl", "flips")
    return {name: getattr(scores, name) for name in names}
