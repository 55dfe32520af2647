"""The stages of a policy as nodes: score, count, select, refine, merge, and what is then stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from kvfx.emit import Emitter
from kvfx.policy import Attributes, Select

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """What stages work on: `k`, `v` [B, K, T, D] and which are `live` [B, K, T], in order of
    position.

    A prompt has queries `q` and counts positions from `position_ids`. Entries of a cache have none,
    but numbers beside them, by name.
    """

    k: fx.Node | None
    v: fx.Node | None
    live: fx.Node
    q: fx.Node | None
    numbers: dict[str, fx.Node]


@dataclass(frozen=True)
class Chosen:
    """The rows that keep an entry, the attention they got, what ranked them, and into which row
    each row goes (None: rows that are not kept are dropped).
    """

    keep: fx.Node
    attention: fx.Node | None
    rank: fx.Node | None
    target: fx.Node | None


def compress_rows(
    emit: Emitter, rows: Rows, *, interval: int | None = None, count: fx.Node | None = None
) -> Chosen:
    """Decide which rows stay: `count` [B, K] of them, or as many as budgets say. With an
    `interval`, rows of the batch wait until they hold so many entries more than they may.
    """
    plan, select = emit.plan, emit.plan.select
    if select is None:
        return Chosen(rows.live, None, None, None)
    attention = attention_of(emit, rows)
    rank = ranks_of(emit, rows, attention)
    if select.counts is not None:
        asked = {**_operands(emit, rows), "score": rank}
        count = emit.named(select.counts, asked, select.count_attributes())
    elif count is None:
        count = _count(emit, rows.live, interval)
    known = {**_operands(emit, rows), "score": rank, "count": count}
    if plan.divide is not None:
        divided = emit.named(plan.divide.divide, known, plan.divide.attributes(select))
        known["count"] = divided
    chosen = emit.named(select.select, known, select.attributes())
    if plan.merge is not None and plan.merge is select and plan.merge.target is None:
        return Chosen(emit.op("lead_rows", chosen), attention, rank, chosen)
    if plan.refine is not None:
        known["keep"] = chosen
        chosen = emit.named(plan.refine.refine, known, plan.refine.attributes(select))
    target = None
    if plan.merge is not None and plan.merge.target is not None:
        known["keep"] = chosen
        target = emit.named(plan.merge.target, known, plan.merge.target_attributes())
    return Chosen(chosen, attention, rank, target)


def attention_of(emit: Emitter, rows: Rows) -> fx.Node | None:
    """The attention [B, K, T] that rows got so far, where a policy asks for it."""
    asks = emit.plan.attention
    if asks is None or "score" in rows.numbers:
        return rows.numbers.get("score")
    assert asks.score is not None
    return emit.named(asks.score, _operands(emit, rows), asks.score_attributes(emit.plan.site))


def merge_rows(emit: Emitter, rows: Rows, chosen: Chosen) -> tuple[fx.Node, fx.Node]:
    """Keys and values [B, K, T, D] in which the chosen rows took in what goes into them."""
    k, v, merge = rows.k, rows.v, emit.plan.merge
    assert k is not None
    assert v is not None
    if merge is None:
        return k, v
    if merge.turned:
        assert chosen.target is not None
        shift = emit.op("target_shift", chosen.target, _positions(emit, rows))
        k = turn(emit, k, shift)
    attention = chosen.attention
    if merge.averaged:
        seen = {**_operands(emit, rows), "score": attention}
        attention = emit.named("average_attention", seen, {})
    known = {
        **_operands(emit, rows),
        "k": k,
        "keep": chosen.keep,
        "target": chosen.target,
        "score": attention,
        "weight": chosen.rank,
    }
    merged = emit.named(merge.merge, known, merge.merge_attributes(emit.plan.site))
    return emit.item(merged, 0), emit.item(merged, 1)


def numbers_of(emit: Emitter, rows: Rows, chosen: Chosen) -> dict[str, fx.Node]:
    """What is to be known about each chosen row, [B, K, T] by name."""
    merge, target = emit.plan.merge, chosen.target
    out = {}
    for name in emit.plan.numbers:
        summed = merge is not None and target is not None and name in merge.summed
        if name == "votes":
            if target is None:
                # each row stands for itself, as an empty buffer says
                continue
            out[name] = emit.op("merge_votes", target, rows.numbers.get("votes"))
            continue
        number = _positions(emit, rows) if name == "position" else chosen.attention
        assert number is not None
        out[name] = emit.op("merge_numbers", number, target) if summed else number
    return out


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
    if not moves_keys(emit):
        return rows
    shift = emit.op("entry_shift", keep, position_ids, length)
    return tuple(turn(emit, x, shift) for x in rows)


def moves_keys(emit: Emitter) -> bool:
    """Whether keys are rotated to the index of their entry."""
    select = emit.plan.select
    return select is not None and select.positions == "cache" and emit.plan.site.rope is not None


def turn(emit: Emitter, x: fx.Node, shift: fx.Node) -> fx.Node:
    """Queries or keys x [B, H, T, D] rotated by `shift` positions [B, H, T]."""
    rope = emit.plan.site.rope
    assert rope is not None
    return emit.op("rotate", x, shift, emit.frequencies(), style=rope.style)


def _operands(emit: Emitter, rows: Rows) -> dict[str, fx.Node | None]:
    """What ops of the stages may ask for by name."""
    state = {
        name: emit.inputs[name]
        for stage in emit.plan.stages
        for name in stage.state(emit.plan.site)
    }
    return {
        "k": rows.k,
        "v": rows.v,
        "live": rows.live,
        "q": rows.q,
        "position": rows.numbers.get("position"),
        "votes": rows.numbers.get("votes"),
        **state,
    }


def observe(emit: Emitter, rows: Rows) -> dict[str, fx.Node | None]:
    """What the select policy wants to know about the queries of a prompt, which it remembers."""
    select, site = emit.plan.select, emit.plan.site
    if select is None or select.observe is None or rows.q is None:
        return {}
    known = _operands(emit, rows)
    known |= {"position_ids": emit.position_ids, "frequencies": emit.frequencies()}
    values = emit.named(select.observe, known, select.observe_attributes(site))
    seen: dict[str, fx.Node | None] = {}
    for index, name in enumerate(select.state(site)):
        seen[name] = emit.item(values, index)
        emit.call(aten.copy_.default, emit.inputs[name], seen[name])
    return seen


def ranks_of(emit: Emitter, rows: Rows, attention: fx.Node | None) -> fx.Node | None:
    """What the select policy ranks rows by, as its rule compares them; None where position
    decides.
    """
    select, site = emit.plan.select, emit.plan.site
    assert select is not None
    if select.score is None:
        return None
    known = {**_operands(emit, rows), **observe(emit, rows), "score": attention}
    score = attention
    if select.decay is None:
        score = emit.named(select.score, known, select.score_attributes(site))
    if select.rank is not None:
        score = emit.named(select.rank, known, {})
    if select.pool > 1:
        score = emit.op("smooth", score, kernel=select.pool, mode=select.pooling)
    return emit.op("share_heads", score) if select.shared else score


def _count(emit: Emitter, live: fx.Node, interval: int | None) -> fx.Node:
    """Entries that each row and head may keep."""
    select = emit.plan.select
    assert select is not None
    if emit.plan.allocate is not None:
        count = emit.inputs["allowed"]
        if isinstance(select.budget, float):
            count = emit.op("allocate_again", count, emit.inputs["asked"], emit.tokens)
    else:
        count = allocate(emit, select)
    if interval is None:
        return count
    # a row that has not reached its limit waits, whatever its neighbours do
    return emit.op("hold_back", live, count, interval=interval)


def allocate(emit: Emitter, select: Select) -> fx.Node:
    """Entries that each row and head may keep by the budget, [B, K]."""
    counted, share = isinstance(select.budget, int), emit.plan.share
    budget: Attributes = {
        "kv_heads": emit.plan.site.kv_heads,
        "fraction": 1.0 if counted else select.budget,
        "entries": select.budget if counted else 0,
        "least": select.least(),
    }
    if share is None:
        return emit.op("allocate_uniform", emit.tokens, **budget)
    protected = select.protected()
    return emit.op(
        "share_entries",
        emit.tokens,
        **budget,
        protected=protected["sinks"] + protected["recent"],
        shares=list(share.shares),
        layer=share.layer,
    )


def _positions(emit: Emitter, rows: Rows) -> fx.Node:
    """The position of each row [B, K, T]."""
    if "position" in rows.numbers:
        return rows.numbers["position"]
    return emit.op("position_rows", emit.position_ids, kv_heads=emit.plan.site.kv_heads)
