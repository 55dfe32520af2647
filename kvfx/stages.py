"""The stages of a policy as nodes: what ranks rows, how many stay, which ones, where keys go."""

from __future__ import annotations

from torch import fx

from kvfx.emit import Emitter
from kvfx.ops import overload


def score_rows(
    emit: Emitter, q: fx.Node | None, k: fx.Node, v: fx.Node, live: fx.Node
) -> fx.Node | None:
    """What the select policy ranks rows by, or None where position decides."""
    select = emit.plan.select
    if select is None or select.score is None:
        return None
    # a score op takes those that its schema names
    rows = {"q": q, "k": k, "v": v, "live": live}
    named = [argument.name for argument in overload(select.score)._schema.arguments]
    operands = [rows[name] for name in named if name in rows]
    return emit.op(select.score, *operands, **select.score_attributes(emit.plan.site))


def count_entries(emit: Emitter) -> fx.Node:
    """Entries that each row and head may keep."""
    select = emit.plan.select
    assert select is not None
    counted = isinstance(select.budget, int)
    return emit.op(
        "allocate_uniform",
        emit.tokens,
        kv_heads=emit.plan.site.kv_heads,
        fraction=1.0 if counted else select.budget,
        entries=select.budget if counted else 0,
        least=select.least(),
    )


def select_rows(
    emit: Emitter, score: fx.Node | None, live: fx.Node, count: fx.Node | None
) -> fx.Node:
    """The rows that keep an entry: all live ones, or those that the select policy chooses."""
    select = emit.plan.select
    if select is None or count is None:
        return live
    if score is None:
        return emit.op(select.select, live, count, **select.attributes())
    if select.pool > 1:
        score = emit.op("smooth", score, kernel=select.pool, mode=select.pooling)
    if select.shared:
        score = emit.op("share_heads", score)
    return emit.op(select.select, score, live, count, **select.attributes())


def rotate_to_entries(
    emit: Emitter,
    rows: tuple[fx.Node, ...],
    keep: fx.Node,
    position_ids: fx.Node | None,
    length: fx.Node | None,
) -> tuple[fx.Node, ...]:
    """Queries and keys rotated from their position to their entry's index, if the policy says
    so.
    """
    select, rope = emit.plan.select, emit.plan.site.rope
    if select is None or rope is None or select.positions == "absolute":
        return rows
    shift = emit.op("entry_shift", keep, position_ids, length)
    turn = emit.frequencies()
    return tuple(emit.op("rotate", x, shift, turn, style=rope.style) for x in rows)
