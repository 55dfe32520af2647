"""What the page knows, as plain data: every text once, equal layers folded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from kvfx.cache_trace.picture import svg_of
from kvfx.cache_trace.trace import STATUSES, CacheTrace
from kvfx.drawing.boxes import Drawing, draw
from kvfx.drawing.layers import layer_in, layer_of, lines_of
from kvfx.drawing.svg import svg_for_page
from kvfx.errors import KvfxError
from kvfx.graph import Graph
from kvfx.ops import name_of
from kvfx.page.details import cache_detail, node_detail, op_data
from kvfx.page.folding import differences, folded, general, parts_of
from kvfx.page.overview import report_data, versions
from kvfx.page.steps import steps_data
from kvfx.pass_manager import Trail
from kvfx.planner import Plan, SitePlan
from kvfx.report import Report

# KV heads whose caches are drawn
PICTURES = 8
BEFORE = "before"
DOES = {
    "prefill": "reads a prompt into an empty cache, then selects, merges and stores",
    "extend": "reads new rows over the compressed cache and themselves, then stores them",
    "decode": "reads one token: appends its entry, then attends to the cache",
    "compact": "flushes, evicts or merges entries, at steps that the host knows; "
    "the model takes no part",
}


@dataclass(frozen=True)
class Subject:
    """What a page is about: the model by class name, the policy as it was asked for, and all that
    came of them. `by` is `"compress"` or `"explain"`; what was not reached is None or empty;
    `refusal` says why.
    """

    model: str
    policy: str
    by: str
    trail: Trail
    raised: Graph | None = None
    graphs: Mapping[str, Graph] = field(default_factory=dict)
    plan: Plan | None = None
    report: Report | None = None
    refusal: KvfxError | None = None
    trace: CacheTrace | None = None


def page_data(subject: Subject) -> dict:
    """Everything that the page shows, json-able."""
    sites = subject.raised.sites if subject.raised is not None else ()
    graphs = {} if subject.raised is None else {BEFORE: subject.raised, **subject.graphs}
    kinds, drawings, details = _layers(graphs, subject.plan)
    ops = sorted({detail["op"] for detail in details.values() if "op" in detail})
    return {
        "model": subject.model,
        "policy": subject.policy,
        "resolved": "" if subject.report is None else subject.report.policy,
        "by": subject.by,
        "versions": versions(),
        "refusal": _refusal(subject.refusal),
        "report": None if subject.report is None else report_data(subject.report),
        "programs": [
            {"name": name, "does": DOES.get(name, ""), "nodes": len(graph.nodes)}
            for name, graph in subject.graphs.items()
        ],
        "kinds": kinds,
        "drawings": drawings,
        "details": details,
        "ops": {name: op_data(name) for name in ops},
        "steps": steps_data(subject.trail, sites),
        "trace": None if subject.trace is None else _trace(subject.trace),
    }


def _layers(
    graphs: Mapping[str, Graph], plan: Plan | None
) -> tuple[list[dict], dict[str, str], dict[str, dict]]:
    """The kinds of layers; the drawing of each kind in each program, and the details of its boxes,
    by `program/kind` and `program/kind/box`.
    """
    lines = {name: lines_of(graph) for name, graph in graphs.items()}
    texts = {name: parts_of(lines[name].values(), graph.sites) for name, graph in graphs.items()}
    layers = dict.fromkeys(layer for parts in texts.values() for layer in parts)

    def signature(layer: str) -> object:
        return layer == "", *(
            tuple(general(line, layer) for line in parts.get(layer, ())) for parts in texts.values()
        )

    kinds, drawings, details = [], {}, {}
    found = sorted(folded(layers, signature), key=lambda kind: kind[1] == [""])
    for number, (name, members) in enumerate(found):
        for program, graph in graphs.items():
            drawing, opened = _drawn(graph, members[0], lines[program], plan)
            if not drawing.boxes:
                continue
            key = f"{program}/{number}"
            title = f"{program}: {name or 'outside of the layers'}"
            drawings[key] = svg_for_page(drawing, title, opened)
            details |= {f"{key}/{box}": detail for box, detail in opened.items()}
        differ = [item for parts in texts.values() for item in differences(parts, members)]
        unique = [item for index, item in enumerate(differ) if item not in differ[:index]]
        kinds.append({"name": name, "count": len(members), "differences": unique})
    return kinds, drawings, details


def _drawn(
    graph: Graph, layer: str, lines: dict[fx.Node, str], plan: Plan | None
) -> tuple[Drawing, dict[int, dict]]:
    """The drawing of a layer, and the details of its kvfx nodes and caches by box."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and layer_of(node) == layer]
    drawing, details = draw(graph, nodes, lines), {}
    inputs = {str(node.target): node for node in graph.module.graph.find_nodes(op="placeholder")}
    site = _site_in(plan, layer)
    for number, box in enumerate(drawing.boxes):
        if box.kind == "cache" and site is not None:
            details[number] = cache_detail(box, inputs, site, lines)
        elif box.nodes and _is_own(box.nodes[0]):
            details[number] = node_detail(box.nodes[0], lines, plan)
    return drawing, details


def _site_in(plan: Plan | None, layer: str) -> SitePlan | None:
    sites = () if plan is None else plan.sites
    return next((site for site in sites if layer_in(site.site.name) == layer), None)


def _is_own(node: fx.Node) -> bool:
    return name_of(node.target) is not None


def _trace(trace: CacheTrace) -> dict:
    """One picture per KV head, styled by the page."""
    return {
        "prompt": trace.prompt,
        "new": len(trace.tokens) - trace.prompt,
        "steps": len(trace.steps),
        "statuses": STATUSES,
        "pictures": [svg_of(trace, head, style="") for head in range(min(trace.heads, PICTURES))],
    }


def _refusal(error: KvfxError | None) -> dict | None:
    if error is None:
        return None
    return {
        "error": type(error).__name__,
        "lines": [line.strip() for line in str(error).splitlines()],
    }
