"""The table of all kvfx ops: schema, shape function, and where each backend's definition lives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def _like_second(_: Tensor, x: Tensor, *__: object, **___: object) -> Tensor:
    return torch.empty_like(x)


def _like_third(_: Tensor, __: Tensor, x: Tensor, **___: object) -> Tensor:
    return torch.empty_like(x)


def _scores(q: Tensor, k: Tensor, live: Tensor, *_: object, **__: object) -> Tensor:
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


def _query_statistics(
    q: Tensor, position_ids: Tensor, frequencies: Tensor, **_: object
) -> tuple[Tensor, Tensor]:
    batch, heads, _rows, width = q.shape
    mean = q.new_empty(batch, heads, width, dtype=torch.float32)
    return mean, q.new_empty(batch, heads, width, width, dtype=torch.float32)


def _expected(mean: Tensor, covariance: Tensor, k: Tensor, *_: object, **__: object) -> Tensor:
    return k.new_empty(k.shape[:3], dtype=torch.float32)


def _targets(k: Tensor, *_: object, **__: object) -> Tensor:
    return k.new_empty(k.shape[:3], dtype=torch.int64)


def _next_target(keep: Tensor, live: Tensor) -> Tensor:
    return torch.empty_like(keep, dtype=torch.int64)


def _lead(target: Tensor) -> Tensor:
    return torch.empty_like(target, dtype=torch.bool)


def _target_shift(target: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(target)


def _votes(target: Tensor, votes: Tensor | None) -> Tensor:
    return torch.empty_like(target, dtype=torch.float32)


def _like_rows(k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v)


def _position_rows(position_ids: Tensor, kv_heads: int) -> Tensor:
    batch, rows = position_ids.shape
    return position_ids.new_empty(batch, kv_heads, rows)


def _live_flat(k_flat: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return _flat_entries(k_flat, start)


def _flat_entries(k_flat: Tensor, start: Tensor) -> Tensor:
    return k_flat.new_empty(*start.shape, k_flat.shape[1], dtype=torch.bool)


def _flat_numbers(entries: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return entries.new_empty(*start.shape, entries.shape[1])


def _load_flat(
    k_flat: Tensor, v_flat: Tensor, start: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def padded(x: Tensor) -> Tensor:
        return x.new_empty(*start.shape, *x.shape[1:])

    return padded(k_flat), padded(v_flat), _flat_entries(k_flat, start)


def _layers(score: Tensor, live: Tensor, *_: object, **__: object) -> Tensor:
    return live.new_empty(live.shape[0], score.shape[0], dtype=torch.int64)


def _per_head(score: Tensor, live: Tensor, **_: object) -> Tensor:
    return live.new_empty(live.shape[:2], dtype=torch.int64)


def _allocate(tokens: Tensor, kv_heads: int, **_: object) -> Tensor:
    return tokens.new_empty(tokens.shape[0], kv_heads)


def _probe(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, *,
    scale: float, rows: int, steps: int, fractions: Sequence[float], bits: Sequence[int],
    group_size: int, rank: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, kv_heads = columns.shape[:2]
    curves = ((steps,), (steps,), (kv_heads, steps))
    numbers = ((), (), (), (len(fractions),), (len(bits) ** 2,))
    return (
        *(columns.new_empty(batch, *shape, dtype=torch.float64) for shape in curves),
        *(columns.new_empty(batch, *shape, dtype=torch.float32) for shape in numbers),
    )


def _per_row(x: Tensor, _: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _attend_rows(
    q: Tensor, position_ids: Tensor, k_rows: Tensor, v_rows: Tensor, *_: object, **__: object
) -> Tensor:
    return _like_query(q, k_rows, v_rows)


def _received(q: Tensor, k_rows: Tensor, *_: object, **__: object) -> Tensor:
    return k_rows.new_empty(k_rows.shape[:3], dtype=torch.float32)


def _deviation(new: Tensor, *_: object, **__: object) -> Tensor:
    return new.new_empty(new.shape[:3], dtype=torch.float32)


def _weighed(deviation: Tensor, *_: object) -> Tensor:
    return deviation.new_empty(deviation.shape[0], deviation.shape[2])


def _chosen(score: Tensor, must: Tensor, may: Tensor, slots: Tensor) -> Tensor:
    return score.new_empty(score.shape[0], slots.shape[0], dtype=torch.int64)


def _taken(x: Tensor, rows: Tensor, *, axis: int) -> Tensor:
    moved = x.movedim(axis, 1)
    return moved.new_empty(*rows.shape, *moved.shape[2:]).movedim(1, axis)


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
# the same without operands per entry, where positions or a mask are operands of their own
HEAD_RULES = "Tensor? slopes=None, Tensor? sinks=None"
PROMPT_ATTRIBUTES = "int? window=None, int? chunk=None, float softcap=0.0"
# a ring has its window beside them
RING_ATTRIBUTES = "float softcap=0.0, int? chunk=None"
DENSE = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) length"
RING = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) position, Tensor(d!) length"
LATENT = "Tensor(a!) latent, Tensor(b!) length"
FLAT = "Tensor(a!) k_flat, Tensor(b!) v_flat, Tensor(c!) start, Tensor(d!) length"
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

    def op(
        verb: str, schema: str, shape: Callable[..., object], *, traced: bool = False,
        kernel: bool = True,
    ) -> Op:  # fmt: skip
        where = f"kvfx.kernels.{room}"
        triton = f"{where}.triton:{verb}" if kernel else ""
        return Op(f"{verb}_{room}", schema, f"{where}.reference:{verb}", shape, traced, triton)

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
    # copies of rows as they are need no kernel
    outputs = "(Tensor, Tensor, Tensor)"
    load_op = op("load", f"({reads}{extra}) -> {outputs}", load, kernel=room == "kivi")
    return (*ops, load_op)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "attention",
            "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? position_ids, "
            f"{HEAD_RULES}, *, float scale, int kv_repeat, {PROMPT_ATTRIBUTES}) -> Tensor",
            "kvfx.kernels.prompt.reference:attention",
            _like_query,
        ),
        Op(
            "attend_prompt",
            f"(Tensor q, Tensor k, Tensor v, Tensor position_ids, {HEAD_RULES}, *, "
            f"float scale, {PROMPT_ATTRIBUTES}) -> Tensor",
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
            "share_entries",
            "(Tensor tokens, *, int kv_heads, float fraction, int entries, int protected, "
            "int least, float[] shares, int layer) -> Tensor",
            "kvfx.kernels.budgets.reference:share_entries",
            _allocate,
        ),
        Op(
            "allocate_prefix",
            "(Tensor score, Tensor live, Tensor total, *, int sinks, int recent, float share, "
            "int least) -> Tensor",
            "kvfx.kernels.budgets.reference:allocate_prefix",
            _layers,
        ),
        Op(
            "allocate_mass",
            "(Tensor score, Tensor live, *, float threshold, int sinks, int recent, int least) "
            "-> Tensor",
            "kvfx.kernels.budgets.reference:allocate_mass",
            _per_head,
        ),
        Op(
            "allocate_dbudget",
            "(Tensor score, Tensor live, *, float threshold, int sinks) -> Tensor",
            "kvfx.kernels.budgets.reference:allocate_dbudget",
            _per_head,
        ),
        Op(
            "allocate_again",
            "(Tensor allowed, Tensor asked, Tensor tokens) -> Tensor",
            "kvfx.kernels.budgets.reference:allocate_again",
            _like_first,
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
            f"(Tensor q, Tensor k, Tensor live, Tensor? position=None, {HEAD_RULES}, *, "
            "float scale, int window, float softcap=0.0) -> Tensor",
            "kvfx.kernels.scores.reference:window",
            _scores,
            triton="kvfx.kernels.scores.triton:window",
        ),
        Op(
            "score_columns",
            f"(Tensor q, Tensor k, Tensor live, Tensor? position=None, {HEAD_RULES}, *, "
            "float scale, float softcap=0.0) -> Tensor",
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
            "refine_crush",
            "(Tensor score, Tensor keep, Tensor live, Tensor? position, *, int sinks, int recent, "
            "float share, float ratio, str anchor, str bits, str pick, int page, int seed) "
            "-> Tensor",
            "kvfx.kernels.crush.reference:refine",
            _like_second,
            triton="kvfx.kernels.crush.triton:refine",
        ),
        Op(
            "allocate_heads",
            "(Tensor score, Tensor live, Tensor count, *, int sinks, int recent, float share, "
            "float floor) -> Tensor",
            "kvfx.kernels.select.reference:allocate_heads",
            _like_third,
        ),
        Op(
            "select_chunks",
            "(Tensor score, Tensor live, Tensor count, *, int chunk, int recent) -> Tensor",
            "kvfx.kernels.select.reference:select_chunks",
            _like_keep,
        ),
        Op(
            "query_statistics",
            "(Tensor q, Tensor position_ids, Tensor frequencies, *, str style, int sinks, "
            "int future) -> (Tensor, Tensor)",
            "kvfx.kernels.scores.reference:query_statistics",
            _query_statistics,
        ),
        Op(
            "score_expected",
            "(Tensor mean, Tensor covariance, Tensor k, Tensor v, Tensor live, *, float scale, "
            "float epsilon, bool spread, bool value_norm) -> Tensor",
            "kvfx.kernels.scores.reference:expected",
            _expected,
        ),
        Op(
            "average_attention",
            "(Tensor score, Tensor live, Tensor? position) -> Tensor",
            "kvfx.kernels.scores.reference:average",
            _like_first,
            traced=True,
        ),
        Op(
            "merge_sets",
            "(Tensor k, Tensor score, Tensor live, Tensor count, *, float? threshold, int sinks, "
            "float recent, float heavy, str linkage) -> Tensor",
            "kvfx.kernels.merge.reference:sets",
            _targets,
            triton="kvfx.kernels.merge.triton:sets",
        ),
        Op(
            "merge_next",
            "(Tensor keep, Tensor live) -> Tensor",
            "kvfx.kernels.merge.reference:next_kept",
            _next_target,
            traced=True,
        ),
        Op(
            "merge_nearest",
            "(Tensor k, Tensor keep, Tensor live, Tensor(a!) gate, *, float past, float present) "
            "-> Tensor",
            "kvfx.kernels.merge.reference:nearest",
            _targets,
        ),
        Op(
            "lead_rows",
            "(Tensor target) -> Tensor",
            "kvfx.kernels.merge.reference:lead_rows",
            _lead,
            traced=True,
        ),
        Op(
            "target_shift",
            "(Tensor target, Tensor position) -> Tensor",
            "kvfx.kernels.merge.reference:target_shift",
            _target_shift,
            traced=True,
        ),
        Op(
            "merge_numbers",
            "(Tensor x, Tensor target) -> Tensor",
            "kvfx.kernels.merge.reference:numbers",
            _like_first,
            traced=True,
        ),
        Op(
            "merge_votes",
            "(Tensor target, Tensor? votes) -> Tensor",
            "kvfx.kernels.merge.reference:votes",
            _votes,
            traced=True,
        ),
        Op(
            "merge_gaussian",
            "(Tensor k, Tensor v, Tensor target, Tensor? votes, *, str sigma, float width, "
            "bool scaled) -> (Tensor, Tensor)",
            "kvfx.kernels.merge.reference:gaussian",
            _like_rows,
            triton="kvfx.kernels.merge.triton:gaussian",
        ),
        Op(
            "merge_weighted",
            "(Tensor k, Tensor v, Tensor target, Tensor weight) -> (Tensor, Tensor)",
            "kvfx.kernels.merge.reference:weighted",
            _like_rows,
            triton="kvfx.kernels.merge.triton:weighted",
        ),
        Op(
            "merge_similar",
            "(Tensor k, Tensor v, Tensor target) -> (Tensor, Tensor)",
            "kvfx.kernels.merge.reference:similar",
            _like_rows,
        ),
        Op(
            "merge_ahead",
            "(Tensor k, Tensor v, Tensor keep, Tensor live, Tensor score, Tensor? position, *, "
            "int targets, int seed) -> (Tensor, Tensor)",
            "kvfx.kernels.merge.reference:ahead",
            _like_rows,
            triton="kvfx.kernels.merge.triton:ahead",
        ),
        Op(
            "position_rows",
            "(Tensor position_ids, *, int kv_heads) -> Tensor",
            "kvfx.kernels.common.rows:position_rows",
            _position_rows,
            traced=True,
        ),
        Op(
            "append_entries",
            "(Tensor x, Tensor keep, Tensor length, Tensor(a!) entries) -> ()",
            "kvfx.kernels.entries.reference:append",
            _nothing,
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
            "snapshot",
            "(Tensor x) -> Tensor",
            "kvfx.kernels.entries.reference:snapshot",
            _like_first,
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
            f"(Tensor q, Tensor k, Tensor v, Tensor mask, {_read(DENSE)}, Tensor? sinks=None, *, "
            "float scale, float softcap=0.0) -> Tensor",
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
        *_room("flat", FLAT, "", _load_flat, (RULES, RULE_ATTRIBUTES)),
        Op(
            "attend_scored_flat",
            f"(Tensor q, Tensor position_ids, Tensor(z!) score, {_read(FLAT)}, {RULES}, *, "
            f"float scale, float decay=1.0, {RULE_ATTRIBUTES}) -> Tensor",
            "kvfx.kernels.flat.reference:attend_scored",
            _attend_scored,
            triton="kvfx.kernels.flat.triton:attend_scored",
        ),
        Op(
            "live_entries_flat",
            "(Tensor k_flat, Tensor start, Tensor length) -> Tensor",
            "kvfx.kernels.flat.reference:live_entries",
            _live_flat,
        ),
        Op(
            "compact_flat",
            f"(Tensor keep, Tensor? frequencies, {FLAT}, *, str style) -> ()",
            "kvfx.kernels.flat.reference:compact",
            _nothing,
        ),
        Op(
            "load_entries_flat",
            "(Tensor entries, Tensor start, Tensor length) -> Tensor",
            "kvfx.kernels.flat.reference:load_entries",
            _flat_numbers,
        ),
        Op(
            "store_entries_flat",
            "(Tensor x, Tensor keep, Tensor start, Tensor length, Tensor(a!) entries) -> ()",
            "kvfx.kernels.flat.reference:store_entries",
            _nothing,
        ),
        Op(
            "extend_entries_flat",
            "(Tensor x, Tensor keep, Tensor start, Tensor length, Tensor(a!) entries) -> ()",
            "kvfx.kernels.flat.reference:extend_entries",
            _nothing,
        ),
        Op(
            "append_entries_flat",
            "(Tensor x, Tensor keep, Tensor start, Tensor length, Tensor(a!) entries) -> ()",
            "kvfx.kernels.flat.reference:append_entries",
            _nothing,
            traced=True,
        ),
        Op(
            "compact_entries_flat",
            "(Tensor keep, Tensor start, Tensor length, Tensor(a!) entries) -> ()",
            "kvfx.kernels.flat.reference:compact_entries",
            _nothing,
        ),
        Op(
            "store_latent",
            f"(Tensor rows, Tensor keep, {LATENT}) -> ()",
            "kvfx.kernels.latent.reference:store",
            _nothing,
        ),
        Op(
            "append_latent",
            f"(Tensor rows, Tensor keep, {LATENT}) -> ()",
            "kvfx.kernels.latent.reference:append",
            _nothing,
            traced=True,
        ),
        *_room("ring", RING, "int window", None, (HEAD_RULES, RING_ATTRIBUTES)),
        *_room("kivi", KIVI, KIVI_ATTRIBUTES, _load_kivi, (RULES, RULE_ATTRIBUTES)),
        Op(
            "attend_scored_kivi",
            f"(Tensor q, Tensor position_ids, Tensor(z!) score, {_read(KIVI)}, {RULES}, *, "
            f"float scale, {KIVI_ATTRIBUTES}, float decay=1.0, {RULE_ATTRIBUTES}) -> Tensor",
            "kvfx.kernels.kivi.reference:attend_scored",
            _attend_scored_kivi,
            traced=True,
            triton="kvfx.kernels.kivi.triton:attend_scored",
        ),
        Op(
            "flush_kivi",
            f"({KIVI}, *, {KIVI_ATTRIBUTES}) -> ()",
            "kvfx.kernels.kivi.reference:flush",
            _nothing,
            triton="kvfx.kernels.kivi.triton:flush",
        ),
        Op(
            "probe",
            "(Tensor q, Tensor k, Tensor v, Tensor columns, *, float scale, int rows, int steps, "
            "float[] fractions, int[] bits, int group_size, int rank) -> (Tensor, Tensor, Tensor, "
            "Tensor, Tensor, Tensor, Tensor, Tensor)",
            "kvfx.kernels.probe.reference:probe",
            _probe,
        ),
        Op(
            "probe_similarity",
            "(Tensor before, Tensor after) -> Tensor",
            "kvfx.kernels.probe.reference:similarity",
            _per_row,
        ),
        Op(
            "scatter_rows",
            "(Tensor k, Tensor v, Tensor position_ids, Tensor(a!) k_rows, Tensor(b!) v_rows) -> ()",
            "kvfx.kernels.reuse.reference:scatter_rows",
            _nothing,
        ),
        Op(
            "attend_rows",
            f"(Tensor q, Tensor position_ids, Tensor k_rows, Tensor v_rows, {HEAD_RULES}, *, "
            f"float scale, {PROMPT_ATTRIBUTES}) -> Tensor",
            "kvfx.kernels.reuse.reference:attend_rows",
            _attend_rows,
        ),
        Op(
            "column_attention",
            f"(Tensor q, Tensor k_rows, Tensor position_ids, {HEAD_RULES}, *, float scale, "
            f"{PROMPT_ATTRIBUTES}) -> Tensor",
            "kvfx.kernels.reuse.reference:column_attention",
            _received,
        ),
        Op(
            "row_deviation",
            "(Tensor new, Tensor old_rows, Tensor position_ids, *, str norm) -> Tensor",
            "kvfx.kernels.reuse.reference:row_deviation",
            _deviation,
        ),
        Op(
            "weigh_rows",
            "(Tensor deviation, Tensor received, Tensor position_ids) -> Tensor",
            "kvfx.kernels.reuse.reference:weigh_rows",
            _weighed,
        ),
        Op(
            "choose_rows",
            "(Tensor score, Tensor must, Tensor may, Tensor slots) -> Tensor",
            "kvfx.kernels.reuse.reference:choose_rows",
            _chosen,
        ),
        Op(
            "take_rows",
            "(Tensor x, Tensor rows, *, int axis) -> Tensor",
            "kvfx.kernels.reuse.reference:take_rows",
            _taken,
        ),
        Op(
            "take_positions",
            "(Tensor position_ids, Tensor rows) -> Tensor",
            "kvfx.kernels.reuse.reference:take_positions",
            _like_second,
        ),
    )
}
