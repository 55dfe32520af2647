"""Whether a generated task is answered through the cache: greedy decoding, without decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.eval.tasks.sample import Draw, Task
from kvfx.eval.text import Corpus, prefix_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvfx.model import CompressedCache, CompressedModel

# the question is read after the context was compressed, or with it
HIDDEN, VISIBLE = "hidden", "visible"
# where the dense model itself answers less, nothing is measured
CEILING = 0.8


@dataclass(frozen=True)
class Prompt:
    """A sample as tokens: what is compressed, what is read through the cache, the answer [S]."""

    depth: float
    context: Tensor
    question: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Retrieval:
    """Per sample: its depth, whether every token of the answer was the most probable one, and the
    answer's negative log-likelihood in nats; `cache_bytes` as allocated after the last sample.
    """

    depths: tuple[float, ...]
    hits: tuple[bool, ...]
    nll: tuple[float, ...]
    cache_bytes: int

    @property
    def rate(self) -> float:
        """The fraction of samples that were answered."""
        return sum(self.hits) / len(self.hits)

    @property
    def below_ceiling(self) -> bool:
        """Whether this, as the dense model's score, is too low to rank anybody."""
        return self.rate < CEILING


def make_prompts(
    task: Task,
    text: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    count: int,
    depths: Sequence[float],
    question: str,
    seed: int,
) -> list[Prompt]:
    """`count` samples of at most `tokens` tokens of context; their depths take turns.

    A visible question is part of the context. Context, question and answer are tokenized apart.
    """
    sentences, start = text.sentences(), prefix_ids(tokenizer)
    count_tokens = cache(lambda piece: len(token_ids(tokenizer, piece)))
    prompts = []
    for index in range(count):
        depth = depths[index % len(depths)]
        # the same sample at every depth and length would share its numbers: each draws its own
        random = Random(f"{seed} {task.name} {tokens} {index}")
        sample = task.make(Draw(tokens - len(start), depth, random, sentences, count_tokens))
        context, asked, answer = (
            token_ids(tokenizer, part) for part in (sample.context, sample.question, sample.answer)
        )
        context = start + context
        if question == VISIBLE:
            context, asked = context + asked, []
        tensors = (torch.tensor(ids, dtype=torch.int64) for ids in (context, asked, answer))
        prompts.append(Prompt(depth, *tensors))
    return prompts


def answer_prompt(fast: CompressedModel, prompt: Prompt) -> tuple[bool, float, CompressedCache]:
    """Whether greedy decoding would give the answer, its negative log-likelihood, and the cache.

    Question and answer are read in one piece: if each of the answer's tokens is the most probable
    one after those before it, decoding them one by one gives them as well (unless entries are
    evicted in between, which a policy with an `interval` of that many tokens does not do). The
    first token of an answer to a visible question comes from the prompt's own attention, which is
    exact.
    """
    cache = fast.new_cache()
    device = fast.device
    context, answer = prompt.context.to(device), prompt.answer.to(device)
    after = fast(context[None], past_key_values=cache, logits_to_keep=1).logits[0]
    behind = torch.cat((prompt.question.to(device), answer[:-1]))
    if len(behind) > 0:
        read = fast(behind[None], past_key_values=cache).logits[0]
        after = torch.cat((after, read))
    log_probs = after[-len(answer) :].double().log_softmax(-1)
    hit = bool((log_probs.argmax(-1) == answer).all())
    return hit, -float(log_probs.gather(1, answer[:, None]).sum()), cache
