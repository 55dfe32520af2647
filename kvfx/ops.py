"""The kvfx ops as torch knows them: registration, backends as overloads, and ops that users add.

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
# the definitions of ops that are not kvfx's own
_DEFINED: dict[str, Callable[..., object]] = {}


def _imported(definition: str) -> Callable[..., object]:
    """The function that `module:function` names."""
    module, name = definition.split(":")
    return getattr(importlib.import_module(module), name)


def _register(op: Op) -> None:
    """Register the abstract overload of `op` and one overload per backend.

    What they call is looked up at each call: modules are imported then, and functions may change.
    """

    def shape(*args: object, **kwargs: object) -> object:
        return OPS[op.name].shape(*args, **kwargs)

    def reference(*args: object, **kwargs: object) -> object:
        function = _DEFINED.get(op.name) or _imported(OPS[op.name].definition)
        return function(*args, **kwargs)

    def triton(*args: object, **kwargs: object) -> object:
        return _imported(OPS[op.name].triton)(*args, **kwargs)

    _LIBRARY.define(f"{op.name}{op.schema}")
    torch.library.register_fake(f"kvfx::{op.name}", shape, lib=_LIBRARY)
    for backend in op.backends:
        name = f"{op.name}.{backend}"
        _LIBRARY.define(f"{name}{op.schema}")
        if op.traced and backend == "reference":
            _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
            continue
        call = reference if backend == "reference" else triton
        _LIBRARY.impl(name, call, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kvfx::{name}", shape, lib=_LIBRARY)


# torch has to know schemas before anything is traced
for _op in OPS.values():
    _register(_op)


def define_op(
    name: str,
    schema: str,
    reference: Callable[..., object],
    shape: Callable[..., object],
    *,
    traced: bool = False,
    triton: str = "",
) -> None:
    """Make `reference` the definition of a new op `kvfx.<name>`, for policies of your own: a format
    (`Store`) needs `store_<room>`, `append_<room>`, `attend_<room>`, `extend_<room>` and
    `load_<room>`.

    `schema` is torch's without the name, `"(Tensor q, Tensor(a!) cache, *, float scale) ->
    Tensor"`: what the op writes is marked. `shape` takes the same arguments, fake, and returns
    outputs of the right shapes, dtypes and layouts. Compilers see through a `traced` definition.
    `triton` is `"module:function"`, a function with the same signature that launches kernels; its
    module has a function `constraint(function, *args, **kwargs)` that says why it cannot run, or
    None.

    Defining a name again (a notebook cell that runs twice) replaces its functions. Code that was
    compiled before keeps those that it saw through.

    Raises PolicyError for a name that kvfx uses itself, for a schema that torch cannot read, and
    for a name that this process knows with another schema, `traced` or set of backends.
    """
    where = f"{reference.__module__}:{reference.__qualname__}"
    op = Op(name, schema, where, shape, traced, triton)
    if name in _DEFINED:
        _check_again(OPS[name], op)
    elif name in OPS:
        raise PolicyError(f"kvfx has an op {name!r} already: give yours another name")
    else:
        try:
            _register(op)
        except RuntimeError as error:
            raise PolicyError(f"kvfx.{name}{schema} is not a schema of torch: {error}") from error
    OPS[name], _DEFINED[name] = op, reference


def _check_again(old: Op, new: Op) -> None:
    """Raise a PolicyError unless torch can take `new` for `old`, whose name it has."""
    for fact in ("schema", "traced", "backends"):
        before, now = getattr(old, fact), getattr(new, fact)
        if before != now:
            raise PolicyError(
                f"kvfx.{new.name} was defined with {fact} {before!r}, and is now with {now!r}: "
                "torch keeps the first as long as the process lives, so give the op another name, "
                "or start Python again"
            )


def score_op(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make `function(q, k, v, live) -> score` the op `kvfx.<function name>`, for select policies
    that rank tokens.

    q [B, H, S, D] are the prompt's queries (None when a cache is compacted), k [B, K, T, D], v [B,
    K, T, Dv], live [B, K, T] bool. The score [B, K, T] is fp32; the largest are kept. Scores of
    rows that are not live are ignored. It is defined as `define_op` does.
    """

    def shape(q: Tensor | None, k: Tensor, v: Tensor, live: Tensor) -> Tensor:
        return k.new_empty(k.shape[:3], dtype=torch.float32)

    schema = "(Tensor? q, Tensor k, Tensor v, Tensor live) -> Tensor"
    define_op(function.__name__, schema, function, shape)
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
    """The op `kvfx.<name>` for a backend; `"default"` is the abstract one.

    Raises PolicyError for an op that nobody defined: a policy names it, or its room lacks it.
    """
    if name not in OPS:
        raise PolicyError(
            f"there is no op kvfx.{name}: define it with kvfx.ops.define_op, or choose policies "
            "that do not ask for it"
        )
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
