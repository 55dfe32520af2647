"""Whether a generated task is answered through the cache: greedy decoding, mostly without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.eval.tasks.sample import Draw, Sample, Task
from kvfx.eval.text import Corpus, prefix_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvfx.model import CompressedModel

# the question is read after the context was compressed, or with it
HIDDEN, VISIBLE = "hidden", "visible"
# where the dense model itself answers less, nothing is measured
CEILING = 0.8
# an answer in other words may be that many tokens longer
MORE = 16


@dataclass(frozen=True)
class Prompt:
    """A sample as tokens: what is compressed, what is read through the cache, the answer [S].

    `score` gives the share of the answer that decoded tokens say; None: all of it, or nothing.
    """

    depth: float
    context: Tensor
    question: Tensor
    answer: Tensor
    score: Callable[[Sequence[int]], float] | None = None

    def tokens(self) -> tuple[list[int], list[int], list[int]]:
        """Context, question and answer as numbers."""
        return self.context.tolist(), self.question.tolist(), self.answer.tolist()

    @property
    def read(self) -> int:
        """The most tokens that are read: all but the last one of an answer, which may be decoded in
        more words.
        """
        more = 0 if self.score is None else MORE
        return len(self.context) + len(self.question) + len(self.answer) - 1 + more


@dataclass(frozen=True)
class Retrieval:
    """Per sample: its depth, whether every token of the answer was the most probable one (of an
    answer that has parts: the share of them that was said, 0.0 to 1.0), and the answer's negative
    log-likelihood in nats; `cache_bytes`: the most that was allocated after any read.
    """

    depths: tuple[float, ...]
    hits: tuple[float, ...]
    nll: tuple[float, ...]
    cache_bytes: int

    @property
    def rate(self) -> float:
        """The fraction of samples that were answered, or the mean share of parts."""
        return sum(self.hits) / len(self.hits)

    @property
    def answered(self) -> tuple[bool, ...]:
        """Per sample, whether all of the answer was given."""
        return tuple(hit == 1 for hit in self.hits)

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
        prompts.append(Prompt(depth, *tensors, score=_score(task, sample, tokenizer)))
    return prompts


def answer_prompt(fast: CompressedModel, prompt: Prompt) -> tuple[float, float, int]:
    """Whether greedy decoding would give the answer, its negative log-likelihood, and the most
    bytes that were allocated after reading the context or the rest.

    Question and answer are read in one piece: if each of the answer's tokens is the most probable
    one after those before it, decoding them one by one gives them as well (unless entries are
    evicted in between, which a policy with an `interval` of that many tokens does not do). The
    first token of an answer to a visible question comes from the prompt's own attention, which is
    exact. Where an answer has parts and is not given as it stands, it is decoded, and the share of
    the parts that are said is what counts.
    """
    cache = fast.new_cache(prompt.read)
    device = fast.device
    context, answer = prompt.context.to(device), prompt.answer.to(device)
    after = fast(context[None], past_key_values=cache, logits_to_keep=1).logits[0]
    most = cache.nbytes()
    behind = torch.cat((prompt.question.to(device), answer[:-1]))
    if len(behind) > 0:
        # the rest of a question predicts nothing that is scored
        read = fast(behind[None], past_key_values=cache, logits_to_keep=len(answer)).logits[0]
        after = torch.cat((after, read))
        most = max(most, cache.nbytes())
    log_probs = after[-len(answer) :].double().log_softmax(-1)
    hit = bool((log_probs.argmax(-1) == answer).all())
    nll = -float(log_probs.gather(1, answer[:, None]).sum())
    if prompt.score is None:
        return hit, nll, most
    return 1.0 if hit else prompt.score(_decode(fast, prompt)), nll, most


def _decode(fast: CompressedModel, prompt: Prompt) -> list[int]:
    """What greedy decoding says, a few tokens more than the answer."""
    cache, context = fast.new_cache(prompt.read), prompt.context.to(fast.device)
    logits = fast(context[None], past_key_values=cache, logits_to_keep=1).logits
    if len(prompt.question) > 0:
        logits = fast(prompt.question.to(fast.device)[None], past_key_values=cache).logits
    said = [int(logits[0, -1].argmax())]
    while len(said) < len(prompt.answer) + MORE:
        new = torch.tensor([said[-1:]], device=fast.device)
        said.append(int(fast(new, past_key_values=cache).logits[0, -1].argmax()))
    return said


def _score(
    task: Task, sample: Sample, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Sequence[int]], float] | None:
    """The task's score of decoded tokens, up to the end that the model itself sets."""
    score = task.score
    if score is None:
        return None

    def of_tokens(said: Sequence[int]) -> float:
        end = said.index(stop) if (stop := tokenizer.eos_token_id) in said else len(said)
        return score(str(tokenizer.decode(list(said[:end]))), sample)

    return of_tokens
