"""Time to the first token of prompts that have pieces in common, and what reuse does to the tokens
that follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from kvfx.bench.machine import device_name, today, versions
from kvfx.bench.reuse_contenders import Contender, Filled, dense, pooled, templated, timed
from kvfx.bench.reuse_replies import Expected, answered, compared, continued
from kvfx.bench.reuse_table import ReuseBench, Sample
from kvfx.bench.reuse_workloads import (
    AGENTS,
    RAG,
    TURNS,
    WORKLOADS,
    Prompts,
    Sizes,
    Team,
    name_of,
    rag,
    team,
    turns,
)
from kvfx.compiler import compress
from kvfx.errors import InputError
from kvfx.eval.text import Corpus
from kvfx.policies import Full
from kvfx.policies.parse import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvfx.model import CompressedModel

# the part of the reused rows that KVShare computes again, and EPIC with as many rows
RATIO = 0.2
EXACT = "ExactPrefix()"
COMMUNICATING = ("KVCOMM()", "KVCOMM(mode='official')")

Tell = Callable[[str], None]


def bench_reuse(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    workloads: Sequence[str],
    sizes: Sizes,
    text: Corpus,
    seed: int,
    compile: bool,
    tell: Tell,
) -> ReuseBench:
    """Read the prompts of `workloads` with every way of reuse and with none, in turns, each behind
    a dense cache (`Full()`). `tell` is told what happens.

    Raises InputError for no workload, for one that there is not, for a text that is too short, and
    where agents cannot take tokens back (sliding windows).
    """
    if not workloads:
        raise InputError(f"--workloads names none: there are {', '.join(WORKLOADS)}")
    for workload in workloads:
        if workload not in WORKLOADS:
            raise InputError(f"there is no workload {workload!r}: {nearest(workload, WORKLOADS)}")
    makers = {RAG: rag, TURNS: turns}
    prompts = [makers[each](text, tokenizer, sizes, seed) for each in workloads if each != AGENTS]
    teams = [team(text, tokenizer, sizes, seed) for each in workloads if each == AGENTS]
    tell("compressing")
    fast = compress(model, Full(), compile=compile)
    if teams and not fast.plan.croppable:
        raise InputError(
            f"{AGENTS}: agents answer from the cache that was scored, and that of {name} cannot "
            "forget tokens (sliding windows): take the other workloads"
        )
    samples: list[Sample] = []
    for work in prompts:
        samples += _read_prompts(fast, work, sizes.scored, tell)
    for group in teams:
        samples += _ask_team(fast, group, sizes.scored, tell)
    return ReuseBench(
        model=name,
        device=device_name(fast.device),
        dtype=str(fast.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions=versions("torch", "transformers"),
        date=today(),
        compiled=compile,
        text=text.name,
        seed=seed,
        scored=sizes.scored,
        titles={work.name: work.title for work in (*prompts, *teams)},
        samples=tuple(samples),
    )


def pool_policies(chunk: int) -> tuple[str, ...]:
    """The policies of pools; the second EPIC computes as many rows again as KVShare, of pieces of
    `chunk` tokens.
    """
    return (
        EXACT,
        "NaiveReuse()",
        "EPIC(k=2)",
        f"EPIC(k={math.ceil(RATIO * chunk)})",
        "CacheBlend(ratio=0.15)",
        f"KVShare(ratio={RATIO})",
    )


def in_turns(contenders: Sequence[Contender], number: int) -> Iterator[Contender]:
    """All contenders, each time beginning with another one."""
    first = number % len(contenders)
    yield from contenders[first:]
    yield from contenders[:first]


def _read_prompts(fast: CompressedModel, work: Prompts, scored: int, tell: Tell) -> list[Sample]:
    """Every prompt, read by a pool under each policy."""
    contenders = [dense(fast)]
    for policy in pool_policies(work.chunk):
        tell(f"{work.name}: preparing {policy}")
        contenders.append(pooled(fast, policy))
    for contender in contenders:
        tell(f"{work.name}: warming up {contender.name}")
        for layout in work.warm:
            compared(fast, contender.fill("", layout), continued(fast, layout.tokens, 2))
        contender.clear()
        contender.fill("", work.stored)
    samples = []
    for number, layout in enumerate(work.measured):
        expected = continued(fast, layout.tokens, scored)
        for contender in in_turns(contenders, number):
            tell(f"{work.name}: prompt {number + 1} of {len(work.measured)}, {contender.name}")
            filled = contender.fill("", layout)
            score = compared(fast, filled, expected)
            samples.append(_sample(work.name, contender, "", number, filled, score, 0.0))
    return samples


def _ask_team(fast: CompressedModel, group: Team, scored: int, tell: Tell) -> list[Sample]:
    """Every round, answered by agents under each policy, who read their own answers."""
    contenders = [dense(fast), pooled(fast, EXACT)]
    for policy in COMMUNICATING:
        tell(f"{AGENTS}: preparing {policy}")
        contenders.append(templated(fast, group.templates(), policy))
    samples = []
    known: dict[tuple[int, ...], Expected] = {}
    for number, asked in enumerate(group.asked):
        for contender in in_turns(contenders, number):
            tell(f"{AGENTS}: round {number + 1} of {len(group.asked)}, {contender.name}")
            texts = [group.questions[asked]]
            for agent in range(len(group.fixed)):
                # what is new since the agent before
                newest = texts[-1]
                _, published = timed(fast, lambda c=contender, t=newest: c.publish(t))
                layout = group.layout(agent, texts)
                tokens = layout.tokens
                if tokens not in known:
                    known[tokens] = continued(fast, tokens, scored)
                filled = contender.fill(name_of(agent), layout)
                score = compared(fast, filled, known[tokens])
                samples.append(
                    _sample(AGENTS, contender, name_of(agent), number, filled, score, published)
                )
                if agent + 1 < len(group.fixed):
                    texts.append(answered(fast, filled, layout, group.answer))
    return samples


def _sample(
    workload: str,
    contender: Contender,
    agent: str,
    number: int,
    filled: Filled,
    score: tuple[float, float],
    published: float,
) -> Sample:
    served = filled.served
    return Sample(
        workload=workload,
        contender=contender.name,
        agent=agent,
        prompt=number,
        tokens=served.tokens,
        seconds={**served.seconds, "last": filled.last_seconds, "publish": published},
        found=served.tokens - served.computed,
        exact=served.exact,
        repaired=served.repaired,
        computed=served.computed,
        read=served.read,
        stored=contender.stored(),
        kl=score[0],
        agreement=score[1],
    )
