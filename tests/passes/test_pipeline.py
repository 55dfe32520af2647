"""The table of contents: levels fit, every pass stands where it says, names are unique."""

from __future__ import annotations

import itertools

import pytest

from kvfx.graph import Level
from kvfx.passes.pipeline import PROGRAMS, Target, outline_passes, program_passes, raise_passes
from kvfx.planner import Plan
from kvfx.policies import Full

PLAN = Plan(Full(), ())


def chain(program: str, target: Target):
    return (*raise_passes(), *program_passes(program, PLAN, target), *outline_passes())


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("cpu", [True, False])
def test_levels_fit(program, cpu):
    passes = chain(program, Target("reference", cpu))
    assert passes[0].consumes is Level.CAPTURED
    assert passes[-1].produces is Level.LOWERED
    for before, after in itertools.pairwise(passes):
        assert before.produces is after.consumes, f"{before.name} -> {after.name}"
    assert raise_passes()[-1].produces is Level.RAISED


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_are_unique(program):
    names = [step.name for step in chain(program, Target("reference", True))]
    assert len(set(names)) == len(names)


def test_only_decode_reads_one_row_and_streams_weights():
    for program in PROGRAMS:
        for cpu in (True, False):
            names = [step.name for step in program_passes(program, PLAN, Target("reference", cpu))]
            assert ("specialize-rows" in names) is (program == "decode")
            assert ("stream-weights" in names) is (program == "decode" and cpu)


def test_the_backend_of_the_target_is_selected():
    last = program_passes("prefill", PLAN, Target("triton", False))[-1]
    assert (last.name, last.backend) == ("select-backend", "triton")
