"""The pictures that a set of inputs has, each with a name, a caption and its data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvfx.eval.answers import Retrieval
from kvfx.eval.results import Measurement
from kvfx.eval.table import DENSE
from kvfx.figures import layer_budgets, needles, quality_bytes, speed
from kvfx.figures.inputs import Inputs, steps
from kvfx.figures.save import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """One picture: the section of the page it stands in, its file name, caption and data."""

    section: str
    name: str
    caption: str
    data: dict
    draw: Callable[[dict], Figure]

    @functools.cached_property
    def figure(self) -> Figure:
        """The picture, drawn once."""
        return self.draw(self.data)


def pictures(inputs: Inputs) -> list[Picture]:
    """Every picture, in the order of a page; names differ."""
    found = [*_quality(inputs), *_needles(inputs), *_speed(inputs), *_layers(inputs)]
    names = [picture.name for picture in found]
    return [
        replace(picture, name=f"{picture.name}_{names[: at + 1].count(picture.name)}")
        if names.count(picture.name) > 1
        else picture
        for at, picture in enumerate(found)
    ]


def _quality(inputs: Inputs) -> Iterator[Picture]:
    keys = ("model", "dtype", "length")
    order = quality_bytes.methods(inputs.measurements)
    for group in _groups(inputs.measurements, keys):
        if all(found.setting.policy != DENSE for found in group):
            continue
        setting = group[0].setting
        caption = (
            f"Quality against the bytes of the cache: {setting.model}, {setting.length:,} tokens"
        )
        data = quality_bytes.data(group, order)
        if data["left_out"]:
            caption += f" (not {', '.join(data['left_out'])}: the dense cache was not measured)"
        yield Picture("quality", "quality_bytes", caption, data, quality_bytes.draw)


def _needles(inputs: Inputs) -> Iterator[Picture]:
    asked = [
        found
        for found in inputs.measurements
        if isinstance(found.scores, Retrieval) and found.setting.task not in needles.WITHOUT_DEPTH
    ]
    for group in _groups(asked, ("model", "dtype", "task", "seed", "text", "options")):
        setting = group[0].setting
        caption = f"Answered by depth and length: {setting.task}, {setting.model}"
        yield Picture("quality", "needles", caption, needles.data(group), needles.draw)


def _speed(inputs: Inputs) -> Iterator[Picture]:
    for bench in inputs.benches:
        data = speed.data(bench.model, bench.device, steps(bench))
        caption = f"Time and bytes against the context: {bench.model} on {bench.device}"
        if any(contender["points"] for contender in data["contenders"]):
            yield Picture("speed", "speed", caption, data, speed.draw)


def _layers(inputs: Inputs) -> Iterator[Picture]:
    for name, document in inputs.plans.items():
        data = layer_budgets.data(document, name)
        yield Picture("layers", "layer_budgets", f"What layers keep: {name}", data,
                      layer_budgets.draw)  # fmt: skip


def _groups(found: Sequence[Measurement], keys: Sequence[str]) -> list[list[Measurement]]:
    """Measurements whose settings agree in `keys`."""
    groups: dict[str, list[Measurement]] = {}
    for measurement in found:
        setting = asdict(measurement.setting)
        groups.setdefault(repr([setting[key] for key in keys]), []).append(measurement)
    return list(groups.values())


def save_all(found: Sequence[Picture], folder: Path) -> list[Path]:
    """Write every picture into a folder, which is made: all paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        path
        for picture in found
        for path in save(picture.figure, picture.data, folder / picture.name)
    ]
