"""`Agents`: prompts from templates whose slots are filled with texts that others wrote (KVCOMM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.errors import InputError, PolicyError, UnsupportedShape
from kvfx.model import CompressedModel
from kvfx.policies import KVCOMM, policy_named
from kvfx.reuse.account import Clock, Served, Totals, audit, sampled_by
from kvfx.reuse.anchors import AnchorPool
from kvfx.reuse.finders import alone
from kvfx.reuse.gate import Verdict
from kvfx.reuse.ground import ground
from kvfx.reuse.layout import Layout
from kvfx.reuse.offsets import Base, Offsets
from kvfx.reuse.pool import Prefilled
from kvfx.reuse.runner import LiveRows
from kvfx.reuse.segment import ISOLATED, Segment, context_hash
from kvfx.reuse.store import SegmentStore
from kvfx.reuse.template import Slot, Template, canonical_stack, computed_pieces, slots_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class Call(Prefilled):
    """A prefilled prompt of an agent, and what the gate said about the text of each slot."""

    verdicts: Mapping[str, Verdict]

    @property
    def reused(self) -> bool:
        """Whether nothing of the prompt had to be computed."""
        return all(verdict.shareable for verdict in self.verdicts.values())


class Agents:
    """Prefills the prompts of agents, `templates` of fixed texts and `Slot`s, from texts that were
    computed once: `KVCOMM` estimates what each prompt makes of them.

    A prompt is reused as a whole, or computed as a whole and remembered. `store` keeps the texts,
    computed alone. `verify` is that of `Pool`.

    Raises PolicyError for a policy other than KVCOMM, InputError for a template that does not begin
    with a fixed piece and have one behind every slot, UnsupportedShape for a model that fails the
    probe or whose layers differ in width.
    """

    def __init__(
        self,
        fast: CompressedModel,
        templates: Mapping[str, Sequence[Text | Slot]],
        policy: KVCOMM | str | None = None,
        *,
        store: SegmentStore | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        verify: str = "off",
    ) -> None:
        self.fast, self.tokenizer = fast, tokenizer
        self.policy = _kvcomm(fast, policy)
        self.sampled = sampled_by(verify)
        self.totals = Totals()
        base = ground(fast, store, tokenizer, approximate=True)
        _check_widths(base.runner.sites)
        self.runner, self.adopter = base.runner, base.adopter
        self.probe, self.store = base.probe, base.store
        self.pools: dict[str, AnchorPool] = {}
        self.templates = {name: self._template(name, parts) for name, parts in templates.items()}

    def publish(self, text: Text) -> Base:
        """Compute a text alone, unless it is stored: what slots are filled with. Prompts do this
        for texts that nobody published.
        """
        tokens = self._tokens(text, "publish")
        segment = self.store.get(tokens, provenance=ISOLATED)
        if segment is None:
            segment = alone(self.runner, tokens)
            self.store.put(segment)
        keys, values = _stacked(segment)
        return Base(context_hash(tokens), keys, values, ISOLATED)

    def prefill(self, agent: str, texts: Mapping[str, Text]) -> Call:
        """The cache of an agent's prompt with `texts` in its slots, by name; texts for other slots
        are not read.

        Raises InputError for an agent that there is not, and for slots without a text.
        """
        template = self._known(agent, texts)
        clock = Clock(self.fast.device)
        filled = [self._tokens(texts[name], name) for name in template.slots]
        with clock("retrieve"):
            bases = [self.publish(tokens) for tokens in filled]
            consumers = [f"{agent}:{index}" for index in range(len(bases))]
            verdicts = [
                self.pools[name].gate(base, consumer)
                for name, base, consumer in zip(template.slots, bases, consumers, strict=True)
            ]
        layout = template.layout(filled)
        tokens = layout.tokens
        rows = self.runner.rows(len(tokens))
        reused = all(verdict.shareable for verdict in verdicts)
        if reused:
            with clock("assemble"):
                self._assemble(rows, layout, template, bases, consumers, verdicts)
        else:
            with clock("compute"):
                self.runner.dense(rows, tokens)
        if self.sampled(tokens):
            self.totals.audits.append(audit(self.runner, rows, tokens))
        with clock("adopt"):
            cache = self.adopter.cache(rows, tokens[:-1])
        if not reused:
            with clock("learn"):
                self._learn(rows, layout, template, bases, consumers, verdicts)
        exact = len(template.pieces[0].tokens) if reused else 0
        body = len(tokens) - 1
        served = Served(
            tokens=body,
            exact=min(exact, body),
            approximate=body - min(exact, body) if reused else 0,
            repaired=0,
            computed=0 if reused else body,
            read=sum(base.nbytes for base in bases) if reused else 0,
            seconds=clock.seconds,
        )
        self.totals.add(served)
        ids = torch.tensor([tokens], device=self.fast.device)
        return Call(cache, ids, served, dict(zip(template.slots, verdicts, strict=True)))

    def _assemble(
        self,
        rows: LiveRows,
        layout: Layout,
        template: Template,
        bases: Sequence[Base],
        consumers: Sequence[str],
        verdicts: Sequence[Verdict],
    ) -> None:
        """Write all rows: texts and fixed pieces with the offsets that they are estimated to have
        here.
        """
        first = template.pieces[0]
        parts = [(first.keys, first.values)]
        for index, base in enumerate(bases):
            pool, piece = self.pools[template.slots[index]], template.pieces[index + 1]
            slot, behind = pool.estimate(base, consumers[index], verdicts[index])
            pool.count(verdicts[index])
            parts.append(slot.added_to(base.keys, base.values))
            parts.append(behind.added_to(piece.keys, piece.values))
        for start, (keys, values) in zip(layout.starts, parts, strict=True):
            self.runner.write(rows, start, keys.unbind(0), values.unbind(0))

    def _learn(
        self,
        rows: LiveRows,
        layout: Layout,
        template: Template,
        bases: Sequence[Base],
        consumers: Sequence[str],
        verdicts: Sequence[Verdict],
    ) -> None:
        """Remember what this prompt made of the texts that were not shareable, and of the pieces
        behind them.
        """
        real = [
            canonical_stack(self.runner, rows, start, start + len(tokens))
            for start, tokens in zip(layout.starts, layout.pieces, strict=True)
        ]
        for index, base in enumerate(bases):
            if verdicts[index].shareable:
                continue
            piece = template.pieces[index + 1]
            self.pools[template.slots[index]].add(
                base,
                consumers[index],
                self._offsets(real[2 * index + 1], (base.keys, base.values)),
                self._offsets(real[2 * index + 2], (piece.keys, piece.values)),
            )

    def _offsets(self, real: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> Offsets:
        """The difference in fp32, kept in the dtype of the model."""
        found, dtype = Offsets.between(real, base), base[0].dtype
        return Offsets(found.keys.to(dtype), found.values.to(dtype))

    def _template(self, name: str, parts: Sequence[Text | Slot]) -> Template:
        """A template whose fixed pieces are computed, and pools of anchors for its slots."""
        slots = slots_of(name, parts)
        for slot in slots:
            self.pools.setdefault(slot, _pool(self.policy))
        fixed = [
            self._tokens(part, name, first=not place)
            for place, part in enumerate(part for part in parts if not isinstance(part, Slot))
        ]
        return Template(computed_pieces(self.runner, fixed), slots)

    def _known(self, agent: str, texts: Mapping[str, Text]) -> Template:
        """The template of an agent, whose slots all have a text."""
        if agent not in self.templates:
            raise InputError(f"there is no agent {agent!r}: {', '.join(self.templates)}")
        template = self.templates[agent]
        missing = [name for name in template.slots if name not in texts]
        if missing:
            raise InputError(
                f"agent {agent!r}: slots without a text: {', '.join(missing)}; there are texts for "
                f"{', '.join(texts) or 'none'}"
            )
        return template

    def _tokens(self, text: Text, what: str, *, first: bool = False) -> tuple[int, ...]:
        """Token ids; special tokens of the tokenizer go in front of a template alone."""
        if not isinstance(text, str):
            tokens = tuple(map(int, text))
        elif self.tokenizer is None:
            raise InputError("texts need a tokenizer: Agents(..., tokenizer=), or give token ids")
        else:
            ids = self.tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]
            tokens = tuple(ids)
        if not tokens:
            raise InputError(f"{what}: a text without tokens")
        return tokens


def _kvcomm(fast: CompressedModel, policy: KVCOMM | str | None) -> KVCOMM:
    given = policy_named(policy) if isinstance(policy, str) else policy
    parts = fast.plan.policy.parts() if given is None else given.parts()
    found = next((part for part in parts if isinstance(part, KVCOMM)), None)
    if found is None and given is not None:
        raise PolicyError(f"{given!r} knows no slots: agents need KVCOMM()")
    return found or KVCOMM()


def _pool(policy: KVCOMM) -> AnchorPool:
    return AnchorPool(
        max_anchors=policy.max_anchors,
        window=policy.window,
        mode=policy.mode,
        gamma=policy.gamma,
        temperature=policy.temperature,
        furthest=policy.furthest,
        most=policy.most,
        lengths=policy.lengths,
    )


def _check_widths(sites: Sequence) -> None:
    """Anchors hold all layers in one tensor."""
    widths = {(site.kv_heads, site.head_dim, site.value_dim) for site in sites}
    if len(widths) > 1 or len(sites) < 2:
        raise UnsupportedShape(
            f"anchors need two layers or more of one width, this model has {len(sites)} layers of "
            f"KV heads and widths {sorted(widths)}"
        )


def _stacked(segment: Segment) -> tuple[Tensor, Tensor]:
    return torch.stack(segment.keys), torch.stack(segment.values)
