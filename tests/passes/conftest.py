"""Graphs that the tests of passes start from: tiny modules, and tiny models captured once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from kvfx.capture import capture
from kvfx.graph import Graph, Level
from kvfx.ops import name_of, overload
from kvfx.pass_manager import Pass, Statistics, Trail, run_passes
from kvfx.passes.canonicalize import Canonicalize
from kvfx.passes.pipeline import Target, program_passes, raise_passes
from kvfx.planner import Plan, make_plan
from kvfx.policies import Full
from kvfx.policy import Policy
from kvfx.testing.tiny import VOCAB, tiny

Capture = Callable[..., Graph]
_CAPTURED: dict[str, Graph] = {}


class _Decoder(nn.Module):
    """One attention behind an embedding, with the mask that `mask(input_ids, position_ids)` makes.

    `attention` gets q, k, v [B, 2, S, 8] and the mask; `turn` changes q and k before that.
    """

    def __init__(self, mask: nn.Module, turn: nn.Module | None) -> None:
        super().__init__()
        self.mask, self.turn = mask, turn
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.attention = _Attention()

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_index: Tensor) -> Tensor:
        batch, rows = input_ids.shape
        x = self.embed(input_ids).view(batch, rows, 2, 8).transpose(1, 2)
        q, k = (x, x + 1) if self.turn is None else self.turn(x, x + 1, position_ids)
        o = self.attention(q, k, x, self.mask(input_ids, position_ids))
        return self.head(o.transpose(1, 2).flatten(2))[:, logits_index]


class _Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )


@pytest.fixture
def decoder() -> Callable[..., nn.Module]:
    """`decoder(mask, turn)`: a module that is captured like a decoder."""

    def build(mask: nn.Module, turn: nn.Module | None = None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Decoder(mask, turn).eval().requires_grad_(False)

    return build


@pytest.fixture
def exported() -> Callable[..., Graph]:
    """`exported(module, *inputs)`: its CAPTURED graph; batch (2) and rows (7) are symbolic."""

    def export(module: nn.Module, *inputs: Tensor) -> Graph:
        names = {2: torch.export.Dim("batch", min=1), 7: torch.export.Dim("rows", min=1)}
        shapes = [
            {
                axis: names[size]
                for axis, size in enumerate(x.shape)
                if size == (2 if axis == 0 else 7)
            }
            for x in inputs
        ]
        found = torch.export.export(module, inputs, dynamic_shapes=tuple(shapes), strict=False)
        return Graph(found.module(), Level.CAPTURED).copy()

    return export


@pytest.fixture
def captured_decoder(exported: Capture) -> Capture:
    """`captured_decoder(module)`: the CAPTURED graph of a decoder(...)."""

    def build(module: nn.Module) -> Graph:
        rows, kept = torch.export.Dim("rows", min=1), torch.export.Dim("kept", min=1)
        batch = torch.export.Dim("batch", min=1)
        tokens = {0: batch, 1: rows}
        with torch.no_grad():
            found = torch.export.export(
                module,
                (*example_inputs(), torch.tensor([2, 5, 6])),
                dynamic_shapes=(tokens, tokens, {0: kept}),
                strict=False,
            )
        return Graph(found.module(), Level.CAPTURED).copy()

    return build


def example_inputs(batch: int = 2, rows: int = 7) -> tuple[Tensor, Tensor]:
    """Random tokens [B, S] and their positions."""
    ids = torch.randint(3, VOCAB, (batch, rows), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(rows).expand(batch, rows).contiguous()


@pytest.fixture
def inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`inputs(batch, rows)`: tokens, positions, and the index of every row."""

    def make(batch: int = 2, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
        return *example_inputs(batch, rows), torch.arange(rows)

    return make


@pytest.fixture
def captured() -> Capture:
    """`captured(architecture, changes)`: the CAPTURED graph of a tiny model, captured once."""

    def get(architecture: str, changes: Mapping[str, object] | None = None) -> Graph:
        key = architecture + json.dumps(changes or {}, sort_keys=True)
        if key not in _CAPTURED:
            _CAPTURED[key] = capture(tiny(architecture, changes))
        return _CAPTURED[key].copy()

    return get


@pytest.fixture
def canonical(captured: Capture) -> Capture:
    """`canonical(architecture, changes)`: the CANONICAL graph of a tiny model."""

    def get(architecture: str, changes: Mapping[str, object] | None = None) -> Graph:
        return run_passes(captured(architecture, changes), [Canonicalize()], None)

    return get


@pytest.fixture
def raised(captured: Capture) -> Capture:
    """`raised(architecture, changes)`: the RAISED graph of a tiny model."""

    def get(architecture: str, changes: Mapping[str, object] | None = None) -> Graph:
        return run_passes(captured(architecture, changes), raise_passes(), None)

    return get


@pytest.fixture
def lowered(raised: Capture) -> Callable[..., tuple[Plan, dict[str, Graph]]]:
    """`lowered(architecture, changes, policy, programs)`: a plan, and the LOWERED graphs of its
    programs.
    """

    def get(
        architecture: str,
        changes: Mapping[str, object] | None = None,
        policy: Policy | None = None,
        programs: Sequence[str] = ("decode",),
    ) -> tuple[Plan, dict[str, Graph]]:
        graph = raised(architecture, changes)
        plan = make_plan(policy or Full(), graph.sites)
        target = Target("reference", inductor_cpu=True)
        return plan, {
            name: run_passes(graph.copy(), program_passes(name, plan, target), None)
            for name in programs
        }

    return get


@pytest.fixture
def apply() -> Callable[[Graph, Sequence[Pass]], Statistics]:
    """`apply(graph, passes)`: run the passes, all verified; the statistics of the last one."""

    def statistics(graph: Graph, passes: Sequence[Pass]) -> Statistics:
        trail = Trail()
        run_passes(graph, passes, trail)
        return trail.steps[-1].statistics

    return statistics


@pytest.fixture
def run() -> Callable[..., tuple[Tensor, ...]]:
    """`run(graph, *inputs)`: what the graph computes, abstract kvfx ops by their definition."""

    def execute(graph: Graph, *inputs: Tensor) -> tuple[Tensor, ...]:
        graph = graph.copy()
        for node in graph.nodes:
            name = name_of(node.target)
            if name is not None:
                node.target = overload(name, "reference")
        graph.module.recompile()
        with torch.no_grad():
            return graph.module(*inputs)

    return execute
