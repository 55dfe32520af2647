"""What tests of whole prompts share: a small model, what it was compressed to, and its oracle."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import kvfx
from kvfx.compiler import raised_graph
from kvfx.model import CompressedModel
from kvfx.pass_manager import Trail
from kvfx.reuse.runner import Runner
from kvfx.testing.tiny import tiny_llama

LAYERS = 3


@pytest.fixture(scope="session")
def model():
    """A Llama in fp64, so that what is exact differs by less than what is not."""
    return tiny_llama(layers=LAYERS, head_dim=32).double()


@pytest.fixture(scope="session")
def compressed(model):
    """The compressed model of a policy, compiled once."""

    @cache
    def compressed(policy: str = "Full()", max_length: int | None = None) -> CompressedModel:
        return kvfx.compress(model, policy, compile=False, verify=False, max_length=max_length)

    return compressed


@pytest.fixture(scope="session")
def fast(compressed):
    """The model with a dense cache."""
    return compressed()


@pytest.fixture(scope="session")
def runner(model):
    """The programs of reuse on the model's graph."""
    return Runner(raised_graph(model, Trail(), strict=True))


@pytest.fixture(scope="session")
def some():
    """Different token ids for every seed."""

    def some(count: int, seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(3, 99, (count,), generator=generator).tolist())

    return some


@pytest.fixture(scope="session")
def read():
    """The logits [V] of the last token of a prefilled prompt."""

    def read(fast, prefilled):
        last = prefilled.input_ids[:, -1:]
        return fast(last, past_key_values=prefilled.cache).logits[0, -1]

    return read


@pytest.fixture(scope="session")
def reply():
    """What is generated greedily, with or without a prefilled cache."""

    def reply(model, ids, cache=None, new: int = 8, **knobs):
        return model.generate(
            ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **knobs
        )

    return reply
