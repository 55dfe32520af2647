"""The compiler's table of contents: which passes run, in which order, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfx.graph import Level
from kvfx.pass_manager import Pass
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.history_masks import HistoryMasks
from kvfx.passes.insert_cache import InsertCache
from kvfx.passes.insert_reuse import Check, InsertReuse
from kvfx.passes.join_writes import JoinWrites
from kvfx.passes.match_attention import MatchAttention
from kvfx.passes.match_latents import MatchLatents
from kvfx.passes.match_masks import MatchMasks
from kvfx.passes.match_positions import MatchPositions
from kvfx.passes.match_rope import MatchRope
from kvfx.passes.outline_layers import OutlineLayers
from kvfx.passes.own_passes import check_own
from kvfx.passes.select_backend import SelectBackend
from kvfx.passes.snapshot_reads import SnapshotReads
from kvfx.passes.specialize_rows import SpecializeRows
from kvfx.passes.stream_weights import StreamWeights
from kvfx.planner import Plan

PROGRAMS = ("prefill", "extend", "decode", "compact")


@dataclass(frozen=True)
class Target:
    """What programs are compiled for: the backend of the ops, and whether Inductor compiles for a
    CPU.
    """

    backend: str
    inductor_cpu: bool


def raise_passes(own: Sequence[Pass] = ()) -> tuple[Pass, ...]:
    """CAPTURED to RAISED: once per model; a user's `own` passes stand where their level is."""
    check_own(own)
    return (
        # export leaves assertions, wrappers and no-ops behind: they hide patterns and keep dead
        # code alive
        Canonicalize(),
        # a tensor that is filled in place hides what it is computed from
        JoinWrites(),
        # rows behind a cache do not begin at position zero, as a count of the input would have it
        MatchPositions(),
        # a user's own: what these spell anew is matched below
        *(step for step in own if step.consumes is Level.CANONICAL),
        # one op per attention, with K and V before they are repeated for grouped queries
        MatchAttention(),
        # masks become facts about positions, so that no mask has to be built for a cache
        MatchMasks(),
        # the rotary embedding of each site, for formats that move keys to other positions
        MatchRope(),
        # a user's own: every site is known by now, and no node is held by its name yet
        *(step for step in own if step.consumes is Level.RAISED),
        # what K and V are computed from, for formats that keep that instead
        MatchLatents(),
    )


def program_passes(program: str, plan: Plan, target: Target) -> tuple[Pass, ...]:
    """RAISED to LOWERED: once per program."""
    return (
        # masks that were not proven are computed over the history, before rows are specialized
        *((HistoryMasks(),) if plan.masked and program != "compact" else ()),
        # decode reads one row: a constant, so that shapes say so and one-row kernels can be chosen
        *((SpecializeRows(rows=1),) if program == "decode" else ()),
        # the cache enters the graph here, and only here
        InsertCache(plan, program),
        # one row through a linear layer is bound by memory: let Inductor fuse it instead of
        # calling a GEMM
        *((StreamWeights(),) if program == "decode" and target.inductor_cpu else ()),
        # from here on each op says who runs it
        SelectBackend(target.backend),
    )


def reuse_passes(check: Check | None, watch: int | None, target: Target) -> tuple[Pass, ...]:
    """RAISED to LOWERED: once per program of reuse, `partial` or, with a check, `precheck`."""
    return (
        # rows at any positions write over the live rows and see them: no cache is asked
        InsertReuse(check, watch),
        # from here on each op says who runs it
        SelectBackend(target.backend),
    )


def outline_passes() -> tuple[Pass, ...]:
    """LOWERED to LOWERED: what is compiled."""
    return (
        # Inductor may postpone a read behind a write that it does not see through
        SnapshotReads(),
        # equal layers share one region, which is compiled once and called once per layer
        OutlineLayers(),
    )
