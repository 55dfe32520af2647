"""`Pool`: prompts that take rows from earlier ones, and the caches to generate from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.errors import PolicyError
from kvfx.model import CompressedCache, CompressedModel
from kvfx.policies import KVShare, policy_named
from kvfx.policy import Reuse
from kvfx.reuse.account import Clock, Served, Totals, audit, sampled_by
from kvfx.reuse.compute import Computed, compute
from kvfx.reuse.finders import Finder, FragmentFinder, Outcome, PieceFinder, alone
from kvfx.reuse.ground import ground
from kvfx.reuse.layout import Layout
from kvfx.reuse.repaired import RepairedState
from kvfx.reuse.runner import LiveRows, Runner
from kvfx.reuse.store import SegmentStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvfx.reuse.requests import Reply, Request


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A cache that holds all tokens of a prompt but the last, for `fast.generate(input_ids,
    past_key_values=cache)`; `input_ids` [1, N] is the prompt.
    """

    cache: CompressedCache
    input_ids: Tensor
    served: Served


class Pool:
    """Prefills prompts for `fast` with rows of earlier ones, as the reuse `policy` says (None: the
    one that `fast` was compressed with). Reused rows are stored as they were computed, whatever the
    format of the cache.

    `store` keeps them (None: 1 GiB in memory). `verify` is `"off"`, `"always"`, or `"sample:0.05"`:
    that part of the prompts, chosen by their tokens, is computed densely as well and compared
    (`totals.audits`). Repairs while decoding need a cache that is dense everywhere; others are
    filled and left.

    Raises UnsupportedShape for a model that fails the probe (`kvfx.reuse.probe`), and for policies
    that rank tokens by a prompt's queries; StoreError for a store of another model; PolicyError for
    a policy that does not reuse.
    """

    def __init__(
        self,
        fast: CompressedModel,
        policy: Reuse | str | None = None,
        *,
        store: SegmentStore | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        verify: str = "off",
    ) -> None:
        self.fast = fast
        self.tokenizer = tokenizer
        self.policy = _reuse(fast, policy)
        self.sampled = sampled_by(verify)
        self.totals = Totals()
        base = ground(fast, store, tokenizer, approximate=self.policy.approximate)
        self.runner, self.adopter = base.runner, base.adopter
        self.probe, self.store = base.probe, base.store
        self.finder: Finder = _finder(self.policy, self.store, self.runner)

    @property
    def repairs(self) -> int:
        """Rows that each decode step computes again, at most."""
        dense = self.fast.plan.croppable or all(
            site.select is None and site.store.room in ("dense", "ring")
            for site in self.fast.plan.sites
        )
        return self.policy.repairs if dense else 0

    def add(self, piece: str | Sequence[int]) -> str:
        """Compute a piece alone and store it, so that prompts find it: its key. A text is tokenized
        as it is behind another piece, without special tokens.
        """
        tokens = Layout.of([[0], piece], self.tokenizer).pieces[1]
        return self.finder.add(alone(self.runner, tokens))

    def prefill(self, layout: Layout | Sequence[str | Sequence[int]]) -> Prefilled:
        """The cache of a prompt, whose pieces are texts or token ids.

        Raises InputError for a prompt of fewer than two tokens, CapacityExceeded for one that is
        too long.
        """
        if not isinstance(layout, Layout):
            layout = Layout.of(layout, self.tokenizer)
        tokens, clock = layout.tokens, Clock(self.fast.device)
        body = tokens[:-1]
        with clock("retrieve"):
            found = self.finder.find(layout)
        with clock("assemble"):
            # one row more, for the audit
            rows = self.runner.rows(len(tokens))
            for each in found:
                self.runner.write(rows, each.start, each.segment.keys, each.segment.values)
        with clock("compute"):
            done = compute(self.runner, self.policy, rows, body, found)
        outcome = Outcome(layout, rows, found, done.new, done.depth)
        if self.sampled(tokens):
            self.totals.audits.append(audit(self.runner, rows, tokens))
        with clock("adopt"):
            cache = self._cache(rows, body, done)
        with clock("learn"):
            self.finder.learn(outcome)
        served = Served(
            tokens=len(body),
            exact=sum(len(each.segment.tokens) for each in found if each.exact),
            approximate=done.approximate,
            repaired=done.repaired,
            computed=done.new,
            read=sum(each.segment.nbytes for each in found),
            seconds=clock.seconds,
        )
        self.totals.add(served)
        return Prefilled(cache, torch.tensor([tokens], device=self.fast.device), served)

    def run(self, requests: Sequence[Request], *, active: int = 4) -> list[Reply]:
        """Answer many requests, those with the least to compute first: `kvfx.reuse.serve`."""
        from kvfx.reuse.requests import serve

        return serve(self, requests, active=active)

    def _cache(self, rows: LiveRows, body: Sequence[int], done: Computed) -> CompressedCache:
        if self.repairs == 0 or done.deviation is None or done.attention is None:
            return self.adopter.cache(rows, body)
        cache = self.fast.new_cache()
        cache.state = RepairedState(
            self.fast.plan,
            self.fast.max_length,
            self.runner,
            rows,
            body,
            done.deviation,
            done.attention,
            dense=done.first,
            repairs=self.repairs,
            watch=self.policy.layer,
        )
        return cache


def _reuse(fast: CompressedModel, policy: Reuse | str | None) -> Reuse:
    """The policy that says what is reused."""
    given = policy_named(policy) if isinstance(policy, str) else policy
    parts = (fast.plan.policy if given is None else given).parts()
    found = next((part for part in parts if isinstance(part, Reuse)), None)
    if found is None:
        raise PolicyError(
            f"{given or fast.plan.policy!r} reuses nothing: give one of ExactPrefix, NaiveReuse, "
            "EPIC, CacheBlend, KVShare"
        )
    if found.finds == "anchors":
        raise PolicyError(f"{found!r} fills the slots of templates: use kvfx.reuse.Agents")
    return found


def _finder(policy: Reuse, store: SegmentStore, runner: Runner) -> Finder:
    if isinstance(policy, KVShare):
        return FragmentFinder(
            store, runner, least=policy.least, window=policy.window, similar=policy.semantic
        )
    return PieceFinder(store, runner, exact=policy.finds == "prefix")
