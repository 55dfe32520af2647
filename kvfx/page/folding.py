"""Texts of graphs by layer, and which layers read the same: a page shows those once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvfx.drawing.layers import layer_in
from kvfx.geometry import Site
from kvfx.report import fold_names

COMMENT = re.compile(r"  # (\S+)(?: <- .*)?$")
BUFFER = re.compile(r"%site_(\d+)_")
NODE = re.compile(r"%\d+")
ATTRIBUTE = re.compile(r"\b(\w+)=(\[[^\]]*\]|[^,()\[\]]+)")
# what a pass adds around its ops: `slice.Tensor(%, 1, 3, 4)  # site <- method`
AROUND = re.compile(r"^(?!.*kvfx\.)(.* = )([\w.]+)\((.*)\)(  # .* <- .*)$")
NUMBERED = re.compile(r"\b(site|frequencies)_\d+")
# values of an attribute that are listed
LISTED = 6


def parts_of(lines: Iterable[str], sites: Sequence[Site]) -> dict[str, list[str]]:
    """The `lines` of a canonical text by layer, with those outside of all layers under "".

    Buffers belong to the layer of their site; a line that does not say where it is from stays with
    the line before.
    """
    parts: dict[str, list[str]] = {}
    layer = ""
    for line in lines:
        buffer, comment = BUFFER.match(line), COMMENT.search(line)
        if comment is not None:
            layer = layer_in(comment.group(1))
        elif buffer is not None:
            layer = layer_in(sites[int(buffer.group(1))].name)
        elif line.startswith("return ") or re.match(r"%[a-z]\w*: ", line):
            layer = ""
        parts.setdefault(layer, []).append(line)
    return parts


def unnumbered(line: str) -> str:
    """A line without the numbers of nodes, which every pass gives anew."""
    return NODE.sub("%", line)


def specific(line: str, layer: str) -> str:
    """A line as every layer would write it, its attributes included."""
    if layer:
        general = re.sub(r"\d+$", "#", layer)
        line = re.sub(rf"{re.escape(layer)}(?!\d)", lambda _: general, line)
        line = NUMBERED.sub(r"\1_#", line)
    return unnumbered(line)


def general(line: str, layer: str) -> str:
    """The same without the values of attributes: lines of layers of one kind are equal."""
    return ATTRIBUTE.sub(r"\1=", AROUND.sub(r"\1\2()\4", specific(line, layer)))


def folded(
    layers: Iterable[str], signature: Callable[[str], object]
) -> list[tuple[str, list[str]]]:
    """The layers with equal signatures together: their name (`layers.0-29`), and which they are."""
    found: dict[object, list[str]] = {}
    for layer in layers:
        found.setdefault(signature(layer), []).append(layer)
    return [(fold_names(names) if names != [""] else "", names) for names in found.values()]


def differences(parts: Mapping[str, Sequence[str]], layers: Sequence[str]) -> list[dict]:
    """The attributes that differ between layers of one kind: op, name, and the layers of each
    value.
    """
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    lines = {layer: [specific(line, layer) for line in parts.get(layer, ())] for layer in layers}
    for rows in zip(*(lines[layer] for layer in layers), strict=False):
        if len(set(rows)) == 1:
            continue
        for layer, row in zip(layers, rows, strict=True):
            for key, value in _attributes(row):
                of = found.setdefault(key, {}).setdefault(value, [])
                of.extend([] if layer in of else [layer])
    return [
        {"op": op, "attribute": name, "values": _listed(values)}
        for (op, name), values in found.items()
        if len(values) > 1
    ]


def _attributes(line: str) -> list[tuple[tuple[str, str], str]]:
    """What may differ in a line: op and name, and the value."""
    around, op = AROUND.match(line), re.search(r"kvfx\.(\w+)", line)
    if around is not None:
        return [((around.group(2), "operands"), around.group(3))]
    name = op.group(1) if op is not None else ""
    return [((name, attribute), value) for attribute, value in ATTRIBUTE.findall(line)]


def _listed(values: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The first few values, each with its layers, and how many more there are."""
    shown = [[value, fold_names(of)] for value, of in list(values.items())[:LISTED]]
    more = len(values) - LISTED
    return [*shown, ["…", f"{more} more values"]] if more > 0 else shown
