"""What a page says about one node: site, rule, op, backend, operands, buffers and definition."""

from __future__ import annotations

import importlib
import inspect

from torch import fx

from kvfx.cache import BATCH, CAPACITY, Buffer
from kvfx.drawing.boxes import Box
from kvfx.drawing.buffers import buffer_of, operands_of
from kvfx.drawing.layers import value_in
from kvfx.memory import capacity
from kvfx.op_table import OPS
from kvfx.ops import backend_of, name_of
from kvfx.planner import Plan, SitePlan
from kvfx.provenance import origin
from kvfx.report import LENGTH


def node_detail(node: fx.Node, lines: dict[fx.Node, str], plan: Plan | None) -> dict:
    """The facts of a kvfx node as json-able data; `lines` are those of its graph's text."""
    mark, name = origin(node), name_of(node.target)
    assert name is not None
    return {
        "op": name,
        "backend": backend_of(node.target),
        "site": mark.site if mark is not None else "",
        "rule": mark.rule if mark is not None else "",
        "pass": mark.by if mark is not None else "",
        "line": lines[node],
        "result": value_in(lines[node]),
        "operands": [
            _operand(name, value, written, lines, plan)
            for name, value, written in operands_of(node)
        ],
    }


def cache_detail(
    box: Box, inputs: dict[str, fx.Node], site: SitePlan, lines: dict[fx.Node, str]
) -> dict:
    """The facts of a cache: the buffers of its site that are touched there."""
    prefix = f"site_{site.site.index}_"
    return {
        "cache": box.title,
        "site": site.site.name,
        "rule": site.rule,
        "operands": [
            _buffer(name, inputs[prefix + name], lines, site, written=False) for name in box.buffers
        ],
    }


def op_data(name: str) -> dict:
    """What an op is, wherever it stands: its schema, and the source of its definition."""
    op = OPS[name]
    return {
        "schema": f"kvfx::{name}{op.schema}",
        "definition": op.definition,
        "source": _source(op.definition),
        "triton": op.triton,
        "traced": op.traced,
    }


def _source(definition: str) -> str:
    """The source of `module:function`, or why there is none (a function of a notebook, say)."""
    module, name = definition.split(":")
    try:
        return inspect.getsource(getattr(importlib.import_module(module), name))
    except (OSError, TypeError, ImportError, AttributeError) as error:
        return f"# the source of {definition} cannot be read: {error}"


def _operand(
    name: str, value: object, written: bool, lines: dict[fx.Node, str], plan: Plan | None
) -> dict:
    if not isinstance(value, fx.Node):
        return {"name": name, "value": repr(value)}
    buffer = buffer_of(value)
    if buffer is not None and plan is not None:
        return {**_buffer(buffer[1], value, lines, plan.sites[buffer[0]], written), "name": name}
    line = lines.get(value)
    if line is None:
        return {"name": name, "value": f"@{str(value.target).removeprefix('model.')}"}
    return {"name": name, "value": line.partition(":")[0], "type": value_in(line)}


def _buffer(
    name: str, value: fx.Node, lines: dict[fx.Node, str], site: SitePlan, written: bool
) -> dict:
    buffer = site.buffers[name]
    return {
        "name": name,
        "value": lines[value].partition(":")[0],
        "type": value_in(lines[value]),
        "buffer": True,
        "written": written,
        "bytes": _bytes(buffer, site),
        "formula": str(buffer.bytes()),
    }


def _bytes(buffer: Buffer, site: SitePlan) -> int:
    """Bytes for one row after a prompt of 4,096 tokens."""
    entries = capacity(site.schedule, LENGTH, 0)
    return int(buffer.bytes().subs({BATCH: 1, CAPACITY: entries}))
