"""The canonical text of a graph, one line per node, and the diff of two of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import sympy
import torch
from torch import fx

from kvfx.graph import Graph
from kvfx.ops import name_of
from kvfx.provenance import module_path, origin

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
AXES = {
    "input_ids": ("B", "S"),
    "position_ids": ("B", "S"),
    "logits_index": ("L",),
    "prompt_tokens": ("B",),
    "must": ("B", "S"),
    "may": ("B", "S"),
    "slots": ("R",),
}


def canonical_text(graph: Graph) -> str:
    """One line per node: number, value, op with its overload, operands, and where it comes from.

    Weights are written by name where they are used; numbers do not depend on the names that capture
    chose.
    """
    names: dict[fx.Node, str] = {}
    axes = Axes(graph)
    lines, number = [], 0
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = f"@{str(node.target).removeprefix('model.')}"
            continue
        if node.op == "placeholder":
            names[node] = f"%{node.target}"
        else:
            names[node], number = f"%{number}", number + 1
        lines.append(_line(node, names, axes))
    return "\n".join(lines) + "\n"


def diff(before: str, after: str, *, before_name: str = "before", after_name: str = "after") -> str:
    """The unified diff of two canonical texts, with node numbers taken out so that only real
    changes show.
    """
    old, new = ([_unnumbered(line) for line in text.splitlines()] for text in (before, after))
    return "\n".join(difflib.unified_diff(old, new, before_name, after_name, lineterm="", n=2))


def _unnumbered(line: str) -> str:
    words = line.split("%")
    return "%".join(
        [
            words[0],
            *(word.lstrip("0123456789") if word[:1].isdigit() else word for word in words[1:]),
        ]
    )


class Axes:
    """Letters for the symbolic sizes of a graph: batch B, rows S, logits L, the capacity of a site
    C. The texts of sizes are kept: most of them occur in every layer.
    """

    def __init__(self, graph: Graph) -> None:
        self.letters: dict[str, str] = {}
        self.texts: dict[sympy.Expr, str] = {}
        for node in graph.nodes:
            if node.op != "placeholder" or not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            shape = node.meta["val"].shape
            for size, letter in zip(
                shape, AXES.get(str(node.target), ("B",) + ("C",) * (len(shape) - 1)), strict=False
            ):
                if isinstance(size, torch.SymInt):
                    self.letters.setdefault(str(size), letter)

    def text(self, size: int | torch.SymInt) -> str:
        """A size, in letters."""
        if not isinstance(size, torch.SymInt):
            return str(size)
        expression = size.node.expr
        if expression not in self.texts:
            text = str(expression)
            for symbol, letter in self.letters.items():
                text = text.replace(symbol, letter)
            self.texts[expression] = text.replace(" ", "")
        return self.texts[expression]


def _line(node: fx.Node, names: dict[fx.Node, str], axes: Axes) -> str:
    if node.op == "output":
        return f"return {_operand(node.args[0], names)}"
    value = _value(node.meta.get("val"), axes)
    if node.op == "placeholder":
        return f"{names[node]}: {value}"
    parts = [_operand(arg, names) for arg in node.args]
    parts += [f"{key}={_operand(arg, names)}" for key, arg in node.kwargs.items()]
    result = f"{names[node]}: {value} = " if value else ""
    return f"{result}{_target(node)}({', '.join(parts)}){_comment(node)}"


def _target(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(getattr(node.target, "__name__", node.target))
    if name_of(node.target) is not None:
        return str(node.target).removesuffix(".default")
    return str(node.target).removeprefix("aten.").removesuffix(".default")


def _comment(node: fx.Node) -> str:
    mark = origin(node)
    if mark is not None:
        return f"  # {mark}"
    path = module_path(node).removeprefix("model.")
    return f"  # {path}" if path and not path.startswith("_") else ""


def _value(value: object, axes: Axes) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ",".join(axes.text(size) for size in value.shape)
        return f"{DTYPES.get(value.dtype, value.dtype)}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_value(item, axes) for item in value)})"
    if isinstance(value, torch.SymInt):
        return "int"
    return ""


def _operand(arg: object, names: dict[fx.Node, str]) -> str:
    if isinstance(arg, fx.Node):
        return names[arg]
    if isinstance(arg, (list, tuple)):
        return f"[{_join(arg, names)}]"
    if isinstance(arg, float):
        return f"{arg:.6g}"
    if isinstance(arg, int) and arg == torch.iinfo(torch.int64).max:
        return "end"
    return str(arg)


def _join(items: Iterable[object], names: dict[fx.Node, str]) -> str:
    return ", ".join(_operand(item, names) for item in items)
