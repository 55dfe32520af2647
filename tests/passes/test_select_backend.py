"""SelectBackend: every op names its backend, and one that does not exist is refused by site."""

from __future__ import annotations

import pytest

from kvfx.errors import UnsupportedShape
from kvfx.graph import Level
from kvfx.ops import backend_of, name_of
from kvfx.passes.insert_cache import InsertCache
from kvfx.passes.select_backend import SelectBackend
from kvfx.planner import make_plan
from kvfx.policies import Full


@pytest.fixture
def cached(raised, apply):
    graph = raised("llama")
    apply(graph, [InsertCache(make_plan(Full(), graph.sites), "prefill")])
    return graph


def test_every_op_names_its_backend(cached, apply):
    stats = apply(cached, [SelectBackend("reference")])
    ops = [node.target for node in cached.nodes if name_of(node.target) is not None]
    assert {backend_of(op) for op in ops} == {"reference"}
    assert stats.hits == {
        "attend_prompt.reference": 2,
        "live_rows.reference": 2,
        "store_dense.reference": 2,
    }
    assert cached.level is Level.LOWERED
    assert cached.text.count("kvfx.store_dense.reference(") == 2


def test_what_is_not_ours_stays(cached, apply):
    others = [node.target for node in cached.nodes if name_of(node.target) is None]
    apply(cached, [SelectBackend("reference")])
    assert [node.target for node in cached.nodes if name_of(node.target) is None] == others


@pytest.mark.parametrize("backend", ["cuda", "default", ""])
def test_unknown_backend_is_refused(cached, apply, backend):
    message = (
        r"model\.layers\.0\.self_attn: kvfx\.\w+ has no backend "
        rf"{backend!r}: choose one of .*reference.*, or 'auto'"
    )
    with pytest.raises(UnsupportedShape, match=message):
        apply(cached, [SelectBackend(backend)])
