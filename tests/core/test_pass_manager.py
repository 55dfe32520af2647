"""The loop: levels are checked, passes are counted, the trail can be asked, texts can be shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from kvfx.errors import KvfxError, VerificationError
from kvfx.graph import Graph, Level, Miss, call
from kvfx.pass_manager import Pass, Statistics, Trail, run_passes
from kvfx.provenance import Stamp

aten = torch.ops.aten


@dataclass(frozen=True)
class Negate(Pass):
    """Negate every relu."""

    name: ClassVar[str] = "negate"
    consumes: ClassVar[Level] = Level.CAPTURED
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        for node in graph.calls(aten.relu.default):
            users = list(node.users)
            with graph.module.graph.inserting_after(node):
                new = call(graph, aten.neg.default, (node,), Stamp("", "negate", self.name))
            for user in users:
                user.replace_input_with(node, new)
            stats.hit("relu")


@dataclass(frozen=True)
class Look(Pass):
    """Change nothing and miss."""

    name: ClassVar[str] = "look"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        stats.miss(Miss("nothing to see", "layers.0"))


@dataclass(frozen=True)
class Break(Look):
    """Leave an assertion in the graph."""

    name: ClassVar[str] = "break"

    def run(self, graph: Graph, stats: Statistics) -> None:
        x = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.module.graph.inserting_after(x):
            graph.module.graph.call_function(aten._assert_tensor_metadata.default, (x,))


class Relu(nn.Module):
    def forward(self, x):
        return x.relu() + x.relu()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.delenv("KVFX_PRINT", raising=False)
    monkeypatch.delenv("KVFX_DUMP", raising=False)


@pytest.fixture
def graph() -> Graph:
    exported = torch.export.export(Relu(), (torch.randn(2, 3),), strict=False)
    return Graph(exported.module(), Level.CAPTURED).copy()


def plain(graph: Graph) -> Graph:
    """Without what export adds."""
    for node in graph.nodes:
        if node.op == "call_module":
            graph.module.graph.erase_node(node)
    return graph


def test_levels_are_checked(graph):
    with pytest.raises(
        KvfxError, match="pass 'look' takes a canonical graph, this one is captured"
    ):
        run_passes(graph, [Look()], None)


def test_the_graph_takes_the_level_of_the_pass(graph):
    assert run_passes(plain(graph), [Negate()], None) is graph
    assert graph.level is Level.CANONICAL
    x = torch.randn(2, 3)
    assert torch.equal(graph.module(x)[0], -2 * x.relu())


def test_what_a_pass_leaves_is_verified(graph):
    with pytest.raises(VerificationError, match=r"after break \(canonical\): an assertion is left"):
        run_passes(plain(graph), [Negate(), Break()], None)


def test_statistics(graph):
    trail = Trail()
    run_passes(plain(graph), [Negate(), Look()], trail)
    negate, look = (step.statistics for step in trail.steps)
    assert negate.hits == {"relu": 2}
    assert negate.nodes_after == negate.nodes_before + 2
    assert look.nodes_before == look.nodes_after == negate.nodes_after
    assert [str(miss) for miss in look.misses] == ["layers.0: nothing to see"]
    assert negate.milliseconds > 0
    table = str(trail)
    assert "relu 2" in table
    assert "miss: layers.0: nothing to see" in table


def test_the_trail_finds_passes_and_shows_their_diff(graph):
    trail = Trail()
    run_passes(plain(graph), [Negate(), Look()], trail)
    assert trail["negate"].before != trail["negate"].after == trail["look"].before
    shown = trail["negate"].diff()
    assert shown.startswith("--- before negate\n+++ after negate")
    assert shown.count("\n+%: f32[2,3] = neg(%)") == 2
    assert trail["look"].diff() == ""
    with pytest.raises(KeyError, match="no pass 'fly' in the trail; there are: negate, look"):
        trail["fly"]


def test_the_trail_tells_programs_apart(graph):
    trail = Trail()
    for program in ("prefill", "decode", "compact"):
        copy = plain(graph.copy())
        copy.program = program
        run_passes(copy, [Negate()], trail)
    assert trail["prefill/negate"].program == "prefill"
    # decode is what most questions are about
    assert trail["negate"].program == "decode"
    with pytest.raises(KeyError, match="prefill/negate, decode/negate, compact/negate"):
        trail["extend/negate"]


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ("after-all", ["negate", "look"]),
        ("after-change", ["negate"]),
        ("after:look", ["look"]),
        ("after:fly", []),
        ("", []),
    ],
)
def test_print(graph, monkeypatch, capsys, wanted, shown):
    monkeypatch.setenv("KVFX_PRINT", wanted)
    run_passes(plain(graph), [Negate(), Look()], Trail())
    captured = capsys.readouterr()
    heads = [line for line in captured.err.splitlines() if line.startswith("//")]
    assert heads == [f"// after {name} (model)" for name in shown]
    assert captured.out == ""


def test_dump(graph, monkeypatch, tmp_path):
    monkeypatch.setenv("KVFX_DUMP", str(tmp_path / "new" / "folder"))
    trail = Trail()
    run_passes(plain(graph), [Negate(), Look()], trail)
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in files] == ["01-model-negate.txt", "02-model-look.txt"]
    assert files[0].read_text() == trail["negate"].after
