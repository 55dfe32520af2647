"""Pieces of prompts for tests of reuse, and what is said to prompts that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvfx.testing.live_rows import some_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfx.model import CompressedModel
    from kvfx.reuse.account import Served
    from kvfx.reuse.pool import Prefilled

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def some(count: int, seed: int) -> list[int]:
    """Random token ids, different ones for every seed."""
    return some_tokens(count, seed).tolist()


A, B, C, QUESTION = some(21, 1), some(17, 2), some(19, 3), some(6, 4)


def counts(served: Served) -> tuple[int, int, int, int]:
    """Exact, approximate, repaired and computed tokens."""
    return served.exact, served.approximate, served.repaired, served.computed


def dense(model: PreTrainedModel, pre: Prefilled) -> Tensor:
    """The prompt and what the model itself says to it."""
    return model.generate(pre.input_ids, **GREEDY)  # pyright: ignore


def reply(fast: CompressedModel, pre: Prefilled) -> Tensor:
    """The prompt and what is said from its cache."""
    return fast.generate(pre.input_ids, past_key_values=pre.cache, **GREEDY)
