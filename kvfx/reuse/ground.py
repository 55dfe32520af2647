"""What every kind of reuse stands on: the programs of a model, proven, and a store of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfx.compiler import raised_graph
from kvfx.model import CompressedModel
from kvfx.pass_manager import Trail
from kvfx.reuse.adopt import Adopter
from kvfx.reuse.probe import Probe, probe
from kvfx.reuse.runner import Runner
from kvfx.reuse.store import SegmentStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Ground:
    """The programs of reuse, the way into caches, what the probe found, and the store."""

    runner: Runner
    adopter: Adopter
    probe: Probe
    store: SegmentStore


def ground(
    fast: CompressedModel,
    store: SegmentStore | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    approximate: bool,
) -> Ground:
    """The ground for `fast`, with a `store` of its own if there is none.

    Raises UnsupportedShape for a model that fails the probe and for policies that rank tokens by a
    prompt's queries, StoreError for a store of another model.
    """
    raised = raised_graph(fast.source, Trail(), strict=True)
    runner, adopter = Runner(raised), Adopter(fast)
    found = probe(fast.source, raised, runner)
    found.check(approximate=approximate)
    if store is not None:
        store.check(fast)
    return Ground(runner, adopter, found, store or SegmentStore.of(fast, tokenizer))
