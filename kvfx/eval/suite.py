"""What is asked of an evaluation: policies, budgets, tasks and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvfx.errors import InputError
from kvfx.eval.answers import HIDDEN, VISIBLE, Prompt, make_prompts
from kvfx.eval.tasks import ALL_TASKS
from kvfx.eval.tasks.sample import Task
from kvfx.eval.text import Corpus, windows
from kvfx.policies.parse import nearest
from kvfx.policy import Budget, Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERPLEXITY = "perplexity"
# one word for several tasks
FAMILIES = {
    "needle": ("needle-prose", "needle-noise"),
    "niah-single": ("needle-noise", "needle-prose", "niah-single-3"),
    "niah-multikey": ("needle-4-keys", "needle-16-keys", "niah-multikey-2", "niah-multikey-3"),
    "ruler": tuple(ALL_TASKS),
}


@dataclass(frozen=True)
class Suite:
    """What is asked: `policies` as they are, or at each `memory` (bytes, or a part of the dense
    cache's) with the largest budget that fits; `windows` of `scored` tokens, read `chunk` at a
    time, for perplexity; `samples` with the answer at `depths` in turns, for each of the other
    tasks.
    """

    policies: tuple[Policy, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    text: Corpus
    seed: int
    windows: int = 8
    scored: int = 128
    chunk: int = 32
    samples: int = 20
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    question: str = HIDDEN
    memory: tuple[float | int | str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("windows", "scored", "chunk", "samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r}: at least 1")
        if self.question not in (HIDDEN, VISIBLE):
            raise InputError(f"question={self.question!r}: choose {HIDDEN} or {VISIBLE}")
        if not self.depths or not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise InputError(f"depths={self.depths!r}: numbers between 0 (start) and 1 (end)")

    def texts(self, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
        """The windows [W, S] for perplexity behind `length` tokens."""
        # one more: the row that predicts the first scored token is read through the cache
        tokens = length + self.scored + 1
        return windows(self.text, tokenizer, tokens=tokens, count=self.windows, seed=self.seed)

    def prompts(self, task: Task, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Prompt]:
        """The samples of another task in at most `length` tokens."""
        return make_prompts(
            task,
            self.text,
            tokenizer,
            tokens=length,
            count=self.samples,
            depths=self.depths,
            question=self.question,
            seed=self.seed,
        )


def with_budgets(policies: Sequence[Policy], budgets: Sequence[Budget]) -> tuple[Policy, ...]:
    """Every policy at every budget; those that have none, once."""
    given = [policy.with_budget(budget) for policy in policies for budget in budgets] or policies
    return tuple(dict.fromkeys(given))


def task_names(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that `names` stand for; an unknown one raises an InputError with the nearest."""
    known = (PERPLEXITY, *ALL_TASKS)
    chosen = [each for name in names for each in FAMILIES.get(name, (name,))]
    for name in chosen:
        if name not in known:
            raise InputError(f"there is no task {name!r}: {nearest(name, (*known, *FAMILIES))}")
    return tuple(dict.fromkeys(chosen))
