"""Real English text without a download: the documentation that ships with Python."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokens of each prompt, at most: awkward on purpose, and around the block sizes of kernels
LENGTHS = (5, 6, 9, 14, 21, 31, 33, 47, 63, 64, 65, 100, 127, 180, 257, 390, 511, 777, 1300, 2000)
# modules of the standard library whose docstrings are prose
DOCUMENTED = (
    "argparse",
    "decimal",
    "difflib",
    "doctest",
    "fractions",
    "logging",
    "optparse",
    "random",
    "statistics",
)
PASS_KEY_HINT = "The pass key is {key}. Remember it. {key} is the pass key."
PASS_KEY_QUESTION = "\n\nWhat is the pass key? The pass key is"


@cache
def passages() -> tuple[str, ...]:
    """Long pieces of prose, in a fixed order: Python's manual, and docstrings of its library."""
    topics = importlib.import_module("pydoc_data.topics").topics
    docs = [inspect.getdoc(importlib.import_module(name)) or "" for name in DOCUMENTED]
    texts = [" ".join(text.split()) for text in (*(topics[name] for name in sorted(topics)), *docs)]
    return tuple(text for text in texts if len(text) > 400)


def prompts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """20 different real prompts; the n-th has at most `LENGTHS[n]` tokens (5 to 2,000)."""
    texts = passages()
    stride = len(texts) // len(LENGTHS)
    return tuple(
        _cut(tokenizer, texts[i * stride :] + texts, length) for i, length in enumerate(LENGTHS)
    )


def pass_key_prompt(
    tokenizer: PreTrainedTokenizerBase, tokens: int, depth: float, key: str = "71432"
) -> str:
    """About `tokens` tokens of prose that hide `key` at `depth` (0 start, 1 end), then ask.

    The prompt ends where a model that remembers continues with the key.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(
            f"depth={depth!r}: the key is hidden between 0 (start) and 1 (end) of the text"
        )
    hint = PASS_KEY_HINT.format(key=key)
    room = tokens - count(tokenizer, hint) - count(tokenizer, PASS_KEY_QUESTION)
    if room < 1:
        raise ValueError(
            f"tokens={tokens}: the key and the question alone need {tokens - room} tokens"
        )
    sentences = _sentences(_cut(tokenizer, passages(), room))
    place = round(depth * len(sentences))
    return " ".join((*sentences[:place], hint, *sentences[place:])) + PASS_KEY_QUESTION


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of `text`, as a model sees them."""
    return len(tokenizer(text)["input_ids"])


def _cut(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], tokens: int) -> str:
    """The longest run of whole words from the start of `texts` with at most `tokens` tokens."""
    words: list[str] = []
    for text in texts:
        words.extend(text.split())
        # a token is at least a character, and rarely more than two words
        if len(words) > 2 * tokens:
            break
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = count(tokenizer, " ".join(words[:middle])) <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return " ".join(words[:low])


def _sentences(text: str) -> list[str]:
    parts = text.split(". ")
    return [f"{part}." for part in parts[:-1]] + parts[-1:]
