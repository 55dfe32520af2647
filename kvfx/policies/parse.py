"""Policies as text, for command lines: `StreamingLLM(budget=0.25) | KIVI(bits=4)`."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from kvfx.errors import PolicyError
from kvfx.policy import Policy


def parse_policy(text: str, methods: Mapping[str, type[Policy]]) -> Policy:
    """The policy that `text` spells: calls of `methods` with literal arguments, joined by `|`.

    Nothing is executed but the constructors of `methods`. Raises PolicyError with the nearest name.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise PolicyError(f"policy {text!r} is not an expression: {error.msg}") from error
    value = _value(tree.body, methods)
    if not isinstance(value, Policy):
        raise PolicyError(f"policy {text!r} is a {type(value).__name__}, not a policy")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names what is spelled like `name`, or everything there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {', '.join(known)}"


def _value(node: ast.expr, methods: Mapping[str, type[Policy]]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _value(node.operand, methods)
        if isinstance(operand, int | float):
            return -operand
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, methods) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_value(key, methods) for key in node.keys if key is not None]
        return dict(zip(keys, (_value(value, methods) for value in node.values), strict=True))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = _value(node.left, methods), _value(node.right, methods)
        if isinstance(left, Policy) and isinstance(right, Policy):
            return left | right
    if isinstance(node, ast.Call):
        return _call(node, methods)
    if isinstance(node, ast.Name) and node.id in methods:
        raise PolicyError(f"{node.id} is a method, not yet a policy: write {node.id}()")
    raise PolicyError(
        f"policy: {ast.unparse(node)!r} is neither a literal, nor a method with literal "
        "arguments, nor two of these joined by |"
    )


def _call(node: ast.Call, methods: Mapping[str, type[Policy]]) -> Policy:
    name = ast.unparse(node.func).removeprefix("kvfx.")
    if name not in methods:
        raise PolicyError(f"there is no method {name!r}: {nearest(name, methods)}")
    method = methods[name]
    known = [field.name for field in fields(method)]  # type: ignore[arg-type]
    given = {}
    for keyword in node.keywords:
        if keyword.arg not in known:
            raise PolicyError(
                f"{name} has no field {keyword.arg!r}: {nearest(str(keyword.arg), known)}"
            )
        given[keyword.arg] = _value(keyword.value, methods)
    positional = [_value(value, methods) for value in node.args]
    try:
        return method(*positional, **given)
    except TypeError as error:
        raise PolicyError(f"{ast.unparse(node)}: {error}") from error
