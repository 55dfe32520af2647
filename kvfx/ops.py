"""The kvfx ops as torch knows them: registration, backends as overloads, and scores that users add.

The overload of an op is its backend: `kvfx.attend_dense.default` is abstract (shapes only),
`.reference` runs the eager definition in `kernels/<room>/reference.py`, `.triton` the kernels in
`kernels/<room>/triton.py`, where there are any: the other ops are made of torch's own, which run on
every device. This module needs torch alone; a room is imported at its first use.

A *traced* op is transparent to the compiler: Inductor sees through it and fuses it with its
surroundings. An *opaque* op runs as it is written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload

from kvfx.errors import PolicyError
from kvfx.op_table import OPS, Op

_LIBRARY = torch.library.Library("kvfx", "DEF")


def _lazily(definition: str) -> Callable[..., object]:
    """Call `module:function`, importing the module at the first call."""
    module, name = definition.split(":")

    def call(*args: object, **kwargs: object) -> object:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def _define(op: Op, implementation: Callable[..., object]) -> None:
    """Register the abstract overload of `op` and one overload per backend."""
    _LIBRARY.define(f"{op.name}{op.schema}")
    torch.library.register_fake(f"kvfx::{op.name}", op.shape, lib=_LIBRARY)
    for backend in op.backends:
        name = f"{op.name}.{backend}"
        _LIBRARY.define(f"{name}{op.schema}")
        if op.traced and backend == "reference":
            _LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")
            continue
        call = implementation if backend == "reference" else _lazily(op.triton)
        _LIBRARY.impl(name, call, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kvfx::{name}", op.shape, lib=_LIBRARY)


def _register() -> None:
    """Define every op of the table (torch has to know schemas before anything is traced)."""
    for op in OPS.values():
        _define(op, _lazily(op.definition))


_register()


# the functions behind the ops that `score_op` made
_SCORES: dict[str, Callable[..., Tensor]] = {}


def score_op(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make `function(q, k, v, live) -> score` the op `kvfx.<function name>`, for select policies
    that rank tokens.

    q [B, H, S, D] are the prompt's queries (None when a cache is compacted), k [B, K, T, D], v [B,
    K, T, Dv], live [B, K, T] bool. The score [B, K, T] is fp32; the largest are kept. Scores of
    rows that are not live are ignored.

    Defining a name again (a notebook cell that runs twice) replaces the function. A name that kvfx
    uses itself raises a PolicyError.
    """

    def shape(q: Tensor | None, k: Tensor, v: Tensor, live: Tensor) -> Tensor:
        return k.new_empty(k.shape[:3], dtype=torch.float32)

    name = function.__name__
    op = Op(
        name,
        "(Tensor? q, Tensor k, Tensor v, Tensor live) -> Tensor",
        f"{function.__module__}:{name}",
        shape,
    )
    if name in OPS and name not in _SCORES:
        raise PolicyError(f"score_op: kvfx has an op {name!r} already: give {name} another name")
    _SCORES[name] = function
    if name not in OPS:
        OPS[name] = op
        _define(op, lambda *args: _SCORES[name](*args))
    return function


def backend_for(name: str, backend: str) -> str:
    """The backend that runs `kvfx.<name>` where `backend` is asked for: itself, if the op has it;
    ops without kernels of their own are torch code for every device.
    """
    return backend if backend in OPS[name].backends else "reference"


def constraint(
    name: str, backend: str, args: Sequence[object], kwargs: Mapping[str, object]
) -> str | None:
    """Why `kvfx.<name>` cannot run on a backend with these (fake) operands, or None."""
    if backend == "reference":
        return None
    module, function = OPS[name].triton.split(":")
    return importlib.import_module(module).constraint(function, *args, **kwargs)


def overload(name: str, backend: str = "default") -> OpOverload:
    """The op `kvfx.<name>` for a backend; `"default"` is the abstract one."""
    return getattr(getattr(torch.ops.kvfx, name), backend)


def name_of(target: object) -> str | None:
    """The name of a kvfx op without its overload, or None for anything else."""
    if not isinstance(target, OpOverload) or target.namespace != "kvfx":
        return None
    return target.name().removeprefix("kvfx::").split(".")[0]


def backend_of(target: object) -> str:
    """The backend that a kvfx op names: its overload."""
    assert isinstance(target, OpOverload)
    return target._overloadname
