"""The kvfx ops: schemas, shape functions, and where each backend's implementation lives.

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
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

from kvfx.errors import PolicyError

BACKENDS = ("reference", "triton")


@dataclass(frozen=True)
class Op:
    """One op: its schema without name, its definition as `module:function`, and its shape function.

    `shape` computes the outputs from fake operands. Compilers see through a `traced` definition.
    `triton` is the function with the same signature that launches kernels, where there is one.
    """

    name: str
    schema: str
    definition: str
    shape: Callable[..., object]
    traced: bool = False
    triton: str = ""

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that have an overload of their own."""
        return BACKENDS if self.triton else BACKENDS[:1]


def _nothing(*_: object, **__: object) -> None:
    return None


def _like_query(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    # laid out [B, S, H, Dv], as SDPA returns it and as the output projection wants it
    batch, heads, rows = q.shape[:3]
    return q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)


def _like_keep(score: Tensor, live: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(live)


def _like_first(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x)


def _like_second(_: Tensor, x: Tensor, **__: object) -> Tensor:
    return torch.empty_like(x)


def _scores(q: Tensor, k: Tensor, live: Tensor, **_: object) -> Tensor:
    return k.new_empty(k.shape[:3], dtype=torch.float32)


def _key_scores(k: Tensor, live: Tensor) -> Tensor:
    return k.new_empty(k.shape[:3], dtype=torch.float32)


def _live_rows(position_ids: Tensor, kv_heads: int) -> Tensor:
    batch, rows = position_ids.shape
    return position_ids.new_empty(batch, kv_heads, rows, dtype=torch.bool)


def _live_entries(cache: Tensor, length: Tensor) -> Tensor:
    return cache.new_empty(cache.shape[:3], dtype=torch.bool)


def _entry_shift(keep: Tensor, position_ids: Tensor | None, length: Tensor | None) -> Tensor:
    return torch.empty_like(keep, dtype=torch.int64)


def _allocate(tokens: Tensor, kv_heads: int, **_: object) -> Tensor:
    return tokens.new_empty(tokens.shape[0], kv_heads)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _attend(values: int) -> Callable[..., Tensor]:
    """The shape of an attend op whose buffer number `values` holds rows of values."""

    def shape(q: Tensor, position_ids: Tensor, *buffers: Tensor, **_: object) -> Tensor:
        return q.new_empty(*q.shape[:-1], buffers[values].shape[-1])

    return shape


def _attend_scored(
    q: Tensor,
    position_ids: Tensor,
    score: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *_: object,
    **__: object,
) -> Tensor:
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1])


def _attend_scored_kivi(
    q: Tensor, position_ids: Tensor, score: Tensor, *buffers: Tensor, **_: object
) -> Tensor:
    return q.new_empty(*q.shape[:-1], buffers[7].shape[-1])


def _load_dense(k_cache: Tensor, v_cache: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(k_cache),
        torch.empty_like(v_cache),
        k_cache.new_empty(k_cache.shape[:3], dtype=torch.bool),
    )


def _load_kivi(
    k_codes: Tensor,
    k_scales: Tensor,
    k_zeros: Tensor,
    v_codes: Tensor,
    v_scales: Tensor,
    *rest: Tensor,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    k_residual, v_residual = rest[1], rest[2]
    batch, kv_heads, tiles = k_codes.shape[:3]
    entries = tiles * v_scales.shape[3] + k_residual.shape[2]
    return (
        k_residual.new_empty(batch, kv_heads, entries, k_residual.shape[-1]),
        v_residual.new_empty(batch, kv_heads, entries, v_residual.shape[-1]),
        k_residual.new_empty(batch, kv_heads, entries, dtype=torch.bool),
    )


# what attention may do besides scaled products (`Rules` of the kernels, and operands per entry)
RULES = "Tensor? position=None, Tensor? bias=None, Tensor? slopes=None, Tensor? sinks=None"
RULE_ATTRIBUTES = "float softcap=0.0, int? window=None, int? chunk=None"
DENSE = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) length"
RING = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) position, Tensor(d!) length"
KIVI = (
    "Tensor(a!) k_codes, Tensor(b!) k_scales, Tensor(c!) k_zeros, Tensor(d!) v_codes, Tensor(e!) "
    "v_scales, "
    "Tensor(f!) v_zeros, Tensor(g!) k_residual, Tensor(h!) v_residual, Tensor(i!) length, "
    "Tensor(j!) k_quantized, Tensor(k!) v_quantized"
)
KIVI_ATTRIBUTES = "int k_bits, int v_bits, int group_size, int residual, str rule"


def _read(buffers: str) -> str:
    """The same buffers as operands that are only read."""
    for letter in "abcdefghijk":
        buffers = buffers.replace(f"({letter}!)", "")
    return buffers


def _room(
    room: str,
    buffers: str,
    attributes: str,
    load: Callable[..., object] | None,
    rules: tuple[str, str] = ("", ""),
) -> tuple[Op, ...]:
    """The five ops that every store room has; `rules` are optional operands and attributes of
    attention.
    """
    reads = _read(buffers)
    extra = f", *, {attributes}" if attributes else ""
    scaled = ", *, " + ", ".join(filter(None, ("float scale", attributes, rules[1])))
    operands = f", {rules[0]}" if rules[0] else ""
    rows = (
        "Tensor k, Tensor v, Tensor keep"
        if room != "ring"
        else "Tensor k, Tensor v, Tensor position_ids"
    )

    def op(verb: str, schema: str, shape: Callable[..., object], *, traced: bool = False) -> Op:
        where = f"kvfx.kernels.{room}"
        return Op(
            f"{verb}_{room}",
            schema,
            f"{where}.reference:{verb}",
            shape,
            traced,
            f"{where}.triton:{verb}",
        )

    ops = (
        op("store", f"({rows}, {buffers}{extra}) -> ()", _nothing),
        op("append", f"({rows}, {buffers}{extra}) -> ()", _nothing, traced=True),
        op(
            "attend",
            f"(Tensor q, Tensor position_ids, {reads}{operands}{scaled}) -> Tensor",
            _attend(7 if room == "kivi" else 1),
            traced=True,
        ),
        op(
            "extend",
            "(Tensor q, Tensor k, Tensor v, Tensor position_ids, "
            f"{reads}{operands}{scaled}) -> Tensor",
            _like_query,
        ),
    )
    if load is None:
        return ops
    return (*ops, op("load", f"({reads}{extra}) -> (Tensor, Tensor, Tensor)", load))


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "attention",
            "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? position_ids, *, float scale, "
            "int kv_repeat, "
            "int? window=None) -> Tensor",
            "kvfx.kernels.prompt.reference:attention",
            _like_query,
        ),
        Op(
            "attend_prompt",
            "(Tensor q, Tensor k, Tensor v, Tensor position_ids, *, float scale, int? "
            "window=None) -> Tensor",
            "kvfx.kernels.prompt.reference:attend",
            _like_query,
        ),
        Op(
            "live_rows",
            "(Tensor position_ids, *, int kv_heads) -> Tensor",
            "kvfx.kernels.common.rows:live_rows",
            _live_rows,
            traced=True,
        ),
        Op(
            "live_entries",
            "(Tensor cache, Tensor length) -> Tensor",
            "kvfx.kernels.common.rows:live_entries",
            _live_entries,
            traced=True,
        ),
        Op(
            "entry_shift",
            "(Tensor keep, Tensor? position_ids, Tensor? length) -> Tensor",
            "kvfx.kernels.common.rows:entry_shift",
            _entry_shift,
            traced=True,
        ),
        Op(
            "rotate",
            "(Tensor x, Tensor shift, Tensor frequencies, *, str style) -> Tensor",
            "kvfx.kernels.rope.reference:rotate",
            _like_first,
            traced=True,
        ),
        Op(
            "allocate_uniform",
            "(Tensor tokens, *, int kv_heads, float fraction, int entries, int least) -> Tensor",
            "kvfx.kernels.select.reference:allocate_uniform",
            _allocate,
            traced=True,
        ),
        Op(
            "hold_back",
            "(Tensor live, Tensor count, *, int interval) -> Tensor",
            "kvfx.kernels.select.reference:hold_back",
            _like_second,
            traced=True,
        ),
        Op(
            "select_recent",
            "(Tensor live, Tensor count, *, int sinks) -> Tensor",
            "kvfx.kernels.select.reference:select_recent",
            _like_first,
            traced=True,
        ),
        Op(
            "select_top",
            "(Tensor score, Tensor live, Tensor count, *, int sinks, int recent, "
            "float share=0.0) -> Tensor",
            "kvfx.kernels.select.reference:select_top",
            _like_keep,
            triton="kvfx.kernels.select.triton:select_top",
        ),
        Op(
            "score_window",
            "(Tensor q, Tensor k, Tensor live, *, float scale, int window) -> Tensor",
            "kvfx.kernels.scores.reference:window",
            _scores,
            triton="kvfx.kernels.scores.triton:window",
        ),
        Op(
            "score_columns",
            "(Tensor q, Tensor k, Tensor live, *, float scale) -> Tensor",
            "kvfx.kernels.scores.reference:columns",
            _scores,
            triton="kvfx.kernels.scores.triton:columns",
        ),
        Op(
            "score_key_norm",
            "(Tensor k, Tensor live) -> Tensor",
            "kvfx.kernels.scores.reference:key_norm",
            _key_scores,
            traced=True,
        ),
        Op(
            "score_key_difference",
            "(Tensor k, Tensor live) -> Tensor",
            "kvfx.kernels.scores.reference:key_difference",
            _key_scores,
            traced=True,
        ),
        Op(
            "store_entries",
            "(Tensor x, Tensor keep, Tensor length, Tensor(a!) entries) -> ()",
            "kvfx.kernels.entries.reference:store",
            _nothing,
            traced=True,
        ),
        Op(
            "extend_entries",
            "(Tensor x, Tensor keep, Tensor length, Tensor(a!) entries) -> ()",
            "kvfx.kernels.entries.reference:extend",
            _nothing,
            traced=True,
        ),
        Op(
            "compact_entries",
            "(Tensor keep, Tensor(a!) entries) -> ()",
            "kvfx.kernels.entries.reference:compact",
            _nothing,
            traced=True,
        ),
        Op(
            "share_heads",
            "(Tensor score) -> Tensor",
            "kvfx.kernels.entries.reference:share_heads",
            _like_first,
            traced=True,
        ),
        Op(
            "smooth",
            "(Tensor score, *, int kernel, str mode) -> Tensor",
            "kvfx.kernels.entries.reference:smooth",
            _like_first,
            traced=True,
        ),
        Op(
            "linear",
            "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
            "kvfx.kernels.linear.reference:linear",
            _linear,
            traced=True,
        ),
        *_room("dense", DENSE, "", _load_dense, (RULES, RULE_ATTRIBUTES)),
        Op(
            "attend_scored_dense",
            f"(Tensor q, Tensor position_ids, Tensor(z!) score, {_read(DENSE)}, {RULES}, *, "
            f"float scale, float decay=1.0, {RULE_ATTRIBUTES}) -> Tensor",
            "kvfx.kernels.dense.reference:attend_scored",
            _attend_scored,
            traced=True,
            triton="kvfx.kernels.dense.triton:attend_scored",
        ),
        Op(
            "attend_masked",
            f"(Tensor q, Tensor k, Tensor v, Tensor mask, {_read(DENSE)}, *, "
            "float scale) -> Tensor",
            "kvfx.kernels.masked.reference:attend",
            _like_query,
        ),
        Op(
            "store_masked",
            f"(Tensor k, Tensor v, Tensor keep, {DENSE}) -> ()",
            "kvfx.kernels.dense.reference:store",
            _nothing,
            triton="kvfx.kernels.dense.triton:store",
        ),
        Op(
            "compact_dense",
            f"(Tensor keep, Tensor? frequencies, {DENSE}, *, str style) -> ()",
            "kvfx.kernels.compact.reference:compact",
            _nothing,
            triton="kvfx.kernels.compact.triton:compact",
        ),
        *_room("ring", RING, "int window", None),
        *_room("kivi", KIVI, KIVI_ATTRIBUTES, _load_kivi),
        Op(
            "attend_scored_kivi",
            f"(Tensor q, Tensor position_ids, Tensor(z!) score, {_read(KIVI)}, *, float scale, "
            f"{KIVI_ATTRIBUTES}, float decay=1.0) -> Tensor",
            "kvfx.kernels.kivi.reference:attend_scored",
            _attend_scored_kivi,
            traced=True,
        ),
        Op(
            "flush_kivi",
            f"({KIVI}, *, {KIVI_ATTRIBUTES}) -> ()",
            "kvfx.kernels.kivi.reference:flush",
            _nothing,
            triton="kvfx.kernels.kivi.triton:flush",
        ),
    )
}

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
