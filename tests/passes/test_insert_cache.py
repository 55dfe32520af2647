"""InsertCache: each program has its ops, each site its own buffers, and nothing sees padding."""

from __future__ import annotations

import pytest
import torch
from torch.testing import FileCheck

from kvfx.graph import Level
from kvfx.pass_manager import run_passes
from kvfx.passes.insert_cache import InsertCache
from kvfx.passes.pipeline import Target, program_passes
from kvfx.passes.specialize_rows import SpecializeRows
from kvfx.planner import make_plan
from kvfx.policies import H2O, KIVI, Full, StreamingLLM
from kvfx.provenance import origin
from kvfx.runtime import Executor, State

POLICIES = {
    "full": Full(),
    "streaming": StreamingLLM(budget=8, interval=4),
    "h2o": H2O(budget=8, interval=4),
    "absolute": StreamingLLM(budget=8, interval=4, positions="absolute"),
}
# (policy, program) -> op -> how often per site
OPS = {
    ("full", "prefill"): {"attend_prompt": 1, "live_rows": 1, "store_dense": 1},
    ("full", "extend"): {"live_rows": 1, "extend_dense": 1, "store_dense": 1},
    ("full", "decode"): {"live_rows": 1, "append_dense": 1, "attend_dense": 1},
    ("streaming", "prefill"): {
        "attend_prompt": 1,
        "allocate_uniform": 1,
        "select_recent": 1,
        "rotate": 1,
        "store_dense": 1,
    },
    ("streaming", "extend"): {"rotate": 2, "extend_dense": 1, "store_dense": 1},
    ("streaming", "decode"): {"rotate": 2, "append_dense": 1, "attend_dense": 1},
    ("streaming", "compact"): {
        "live_entries": 1,
        "allocate_uniform": 1,
        "select_recent": 1,
        "compact_dense": 1,
        "load_dense": 0,
    },
    ("h2o", "prefill"): {"score_columns": 1, "select_top": 1, "store_entries": 1},
    ("h2o", "extend"): {"load_dense": 1, "score_columns": 1, "extend_entries": 1},
    ("h2o", "decode"): {"append_dense": 1, "attend_scored_dense": 1, "attend_dense": 0},
    ("h2o", "compact"): {"select_top": 1, "compact_entries": 1, "compact_dense": 1},
    ("absolute", "prefill"): {"rotate": 0, "select_recent": 1, "store_dense": 1},
    ("absolute", "decode"): {"rotate": 0, "append_dense": 1, "attend_dense": 1},
    ("absolute", "compact"): {"rotate": 0, "compact_dense": 1},
}


def insert(graph, policy, program, apply):
    plan = make_plan(policy, graph.sites)
    first = [SpecializeRows(1)] if program == "decode" else []
    return plan, apply(graph, [*first, InsertCache(plan, program)])


@pytest.mark.parametrize(("case", "ops"), OPS.items(), ids=["-".join(case) for case in OPS])
def test_ops_of_a_program(raised, apply, case, ops):
    policy, program = case
    graph = raised("llama")
    plan, stats = insert(graph, POLICIES[policy], program, apply)
    assert stats.hits == {f"{program} dense": 2}
    assert (graph.program, graph.level) == (program, Level.CACHED)
    check = FileCheck().check_not("kvfx.attention(")
    for name, count in ops.items():
        check.check_count(f"kvfx.{name}(", 2 * count, exactly=True)
        check.run(graph.text)
        check = FileCheck()
    for node in graph.nodes:
        mark = origin(node)
        if mark is not None and mark.by == "insert-cache" and mark.site:
            assert mark.site in [site.site.name for site in plan.sites]
            assert mark.rule == plan.sites[0].methods


@pytest.mark.parametrize("program", ["prefill", "extend", "decode", "compact"])
def test_each_site_has_its_own_buffers(raised, apply, program):
    graph = raised("llama")
    plan, _ = insert(graph, POLICIES["streaming"], program, apply)
    buffers = [str(node.target) for node in graph.nodes if str(node.target).startswith("site_")]
    names = list(plan.sites[0].store.buffers(plan.sites[0].site))
    assert buffers == [f"site_{index}_{name}" for index in range(2) for name in names]
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in buffers:
            index = int(str(node.target).split("_")[1])
            assert {origin(user).site for user in node.users} == {plan.sites[index].site.name}
    if program == "compact":
        check = FileCheck().check_not("input_ids").check_not("@layers").check("compact_dense")
        check.run(graph.text)


def test_formats_that_cannot_close_gaps_are_stored_anew(raised, apply):
    graph = raised("llama", {"head_dim": 32})
    insert(graph, StreamingLLM(budget=8) | KIVI(), "compact", apply)
    check = FileCheck().check("kvfx.load_kivi(").check("kvfx.rotate(")
    check.check_count("zero_", 3, exactly=False).check("kvfx.store_kivi(").run(graph.text)


def test_shapes_of_buffers_follow_the_layout(raised, apply):
    graph = raised("gemma3_text", {"num_key_value_heads": 1})
    insert(graph, Full(), "decode", apply)
    FileCheck().check("%site_0_k_cache: f32[B,1,").check("%site_0_position: i32[B,").check(
        "%site_0_length: i32[B,1]"
    ).check("%site_3_k_cache: f32[B,1,").check("%site_3_length: i32[B,1]").check(
        "kvfx.append_ring"
    ).check("kvfx.append_dense").run(graph.text)


def test_flush_is_all_that_compact_does_for_kivi(raised, apply):
    graph = raised("llama", {"head_dim": 32})
    insert(graph, KIVI(bits=2), "compact", apply)
    FileCheck().check_not("kvfx.load").check_count("kvfx.flush_kivi(", 2, exactly=True).check(
        "return []"
    ).run(graph.text)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_model_never_sees_minus_one(raised, apply, architecture):
    graph = raised(architecture)
    insert(graph, Full(), "prefill", apply)
    position_ids = graph.input("position_ids")
    users = {user for user in position_ids.users if "sym_size" not in str(user.target)}
    clamped = graph.calls(torch.ops.aten.clamp_min.default)
    assert len(clamped) == 1
    assert str(origin(clamped[0])) == "model <- hide-padding"
    assert users - set(clamped) == {user for user in users if "kvfx" in str(user.target)}


@pytest.mark.parametrize("policy", ["full", "absolute", "streaming"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "cohere"])
def test_programs_continue_the_prompt(raised, captured, run, inputs, architecture, policy):
    """As long as nothing is evicted, every policy computes what the model does."""
    graph, rows = raised(architecture), 21
    chosen = (
        POLICIES[policy]
        if policy == "full"
        else type(POLICIES[policy])(budget=64, positions=POLICIES[policy].positions)
    )
    plan = make_plan(chosen, graph.sites)
    programs = {
        name: run_passes(
            graph.copy(), program_passes(name, plan, Target("reference", False)), None
        ).module
        for name in ("prefill", "extend", "decode")
    }
    ids, positions, index = inputs(2, rows)
    expected = run(captured(architecture), ids, positions, index)[0]
    state, executor = State(plan, 2, None), Executor(programs)
    found = []
    with torch.no_grad():
        for start, end in ((0, 9), (9, 18)):
            here = slice(start, end)
            found.append(
                executor.prompt(
                    state, ids[:, here], positions[:, here], index[: end - start], [9, 9]
                )
            )
        found += [executor.decode(state, ids[:, at : at + 1]) for at in range(18, rows)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-3, atol=1e-3)
