"""Models, tokens and segments for tests of rows that are computed at any positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.compiler import raised_graph
from kvfx.pass_manager import Trail
from kvfx.reuse.runner import LiveRows, Runner
from kvfx.testing.tiny import tiny

if TYPE_CHECKING:
    from transformers import PreTrainedModel

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
THREE: dict[str, object] = {"num_hidden_layers": 3}
# one model per way of knowing positions: its row of the table of tiny models, and what differs
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "half": ("llama", THREE),
    "interleaved": ("cohere", {}),
    "partial": ("gpt_neox", {}),
    "interleaved partial": ("glm", {}),
    "two tables": (
        "gemma3_text",
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "nope": ("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "window": ("mistral", {**THREE, "sliding_window": 5}),
    "sinks": ("granite_swa", {"sliding_window": 5}),
    "learned positions": ("gpt2", {}),
}
ROTATED = tuple(name for name in MODELS if name != "learned positions")
# the rotary embedding of transformers runs in fp32, whatever the model's dtype
FLOOR = 2e-5


@cache
def built(name: str) -> tuple[PreTrainedModel, Runner]:
    """A tiny fp64 model of `MODELS`, and the runner of its graph; both are shared."""
    architecture, changes = MODELS[name]
    model = tiny(architecture, changes).double()
    return model, runner_of(model)


def runner_of(model: PreTrainedModel) -> Runner:
    """A runner of a model's raised graph."""
    return Runner(raised_graph(model, Trail(), strict=True))


def some_tokens(count: int, seed: int = 1) -> Tensor:
    """Random token ids [count] of a tiny model, none of them special."""
    return torch.randint(3, 99, (count,), generator=torch.Generator().manual_seed(seed))


def dense(runner: Runner, tokens: Tensor) -> tuple[Tensor, LiveRows]:
    """Logits [V] of the last of tokens [N] and the rows of all, computed without reuse."""
    rows = runner.rows(len(tokens))
    return runner.dense(rows, tokens).logits, rows


def segment(runner: Runner, tokens: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Canonical keys and values, [K, T, D] per site, of tokens [T] that were computed alone."""
    return runner.canonical(dense(runner, tokens)[1], 0, len(tokens))


def assembled(runner: Runner, tokens: Tensor, cuts: Sequence[int]) -> LiveRows:
    """Live rows of segments that were computed alone, tokens [N] cut at `cuts`."""
    rows = runner.rows(len(tokens))
    for start, stop in pairwise([0, *cuts, len(tokens)]):
        runner.write(rows, start, *segment(runner, tokens[start:stop]))
    return rows


def copied(rows: LiveRows) -> LiveRows:
    """The same rows in memory of their own."""
    return LiveRows(tuple(k.clone() for k in rows.keys), tuple(v.clone() for v in rows.values))


def close(found: Tensor, expected: Tensor, within: float) -> bool:
    """Whether the largest difference is at most `within`, relative to the largest value."""
    return bool((found - expected).abs().max() <= within * expected.abs().max())


def same_rows(found: LiveRows, expected: LiveRows, within: float) -> bool:
    """Whether keys and values of all sites are `close`."""
    pairs = zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True)
    return all(close(x, y, within) for x, y in pairs)
