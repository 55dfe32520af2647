"""What kvfx and its peers both read: the same model, windows and prompts, as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from kvfx.bench.contenders import cache_bytes
from kvfx.eval.answers import Prompt
from kvfx.eval.suite import PERPLEXITY, Suite
from kvfx.eval.tasks import TASKS
from kvfx.eval.text import digest
from kvfx.policy import Policy, compose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_workload(
    path: Path, model: Path, suites: tuple[Suite, ...], tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Write the inputs of all suites' tasks; gives each task's hash, as `kvfx eval` computes it."""
    tasks: dict[str, dict[str, Any]] = {}
    hashes: dict[str, str] = {}
    for suite in suites:
        for task in suite.tasks:
            tasks[task], hashes[task] = _inputs(task, suite, tokenizer)
    document = {"model": str(model), "threads": torch.get_num_threads(), "tasks": tasks}
    path.write_text(json.dumps(document), "utf-8")
    return hashes


def at_bytes_of_presses(
    suite: Suite,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kept: Sequence[float],
) -> Suite:
    """The suite with as much memory as a context takes of which kvpress keeps these parts, and what
    is read behind it; policies that evict have room for all of that, as presses have.
    """
    behind = [
        len(prompt.question) + len(prompt.answer) - 1
        for task in suite.tasks
        if task != PERPLEXITY
        for prompt in _prompts(task, suite, tokenizer)
    ]
    least, most = (pick(behind, default=suite.scored) for pick in (min, max))
    held = [int(suite.lengths[0] * part) + least for part in kept]
    return replace(
        suite,
        policies=tuple(with_room(policy, most) for policy in suite.policies),
        memory=tuple(count * token_bytes(model) for count in held),
    )


def with_room(policy: Policy, tokens: int) -> Policy:
    """The policy, evicting nothing until so many tokens were read behind a prompt."""
    parts = [
        replace(cast("Any", part), interval=tokens) if hasattr(part, "interval") else part
        for part in policy.parts()
    ]
    return compose(*parts)


@torch.no_grad()
def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of a token in transformers' own cache."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    return cache_bytes(model(one, use_cache=True).past_key_values)


def _inputs(
    task: str, suite: Suite, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], str]:
    if task == PERPLEXITY:
        ids = suite.texts(tokenizer, suite.lengths[0]).tolist()
        return {"windows": ids, "scored": suite.scored, "chunk": suite.chunk}, digest(ids)
    rows = [prompt.tokens() for prompt in _prompts(task, suite, tokenizer)]
    names = ("context", "question", "answer")
    return {"prompts": [dict(zip(names, row, strict=True)) for row in rows]}, digest(rows)


def _prompts(task: str, suite: Suite, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    # of one length, and none of those whose answers have parts
    return suite.prompts(TASKS[task], tokenizer, suite.lengths[0])
