"""`compress`: a decoder in, the same decoder with a compressed cache out; `explain`: a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import fx

from kvfx.capture import held_capture
from kvfx.errors import (
    CalibrationError,
    KvfxError,
    PolicyError,
    UnmatchedAttention,
    UnsupportedShape,
    VerificationError,
)
from kvfx.geometry import Site
from kvfx.graph import Graph
from kvfx.op_table import BACKENDS
from kvfx.pass_manager import Pass, Step, Trail, replay, run_passes
from kvfx.passes.own_passes import check_own
from kvfx.passes.pipeline import PROGRAMS, Target, outline_passes, program_passes, raise_passes
from kvfx.planner import Plan, make_plan
from kvfx.policies import policy_named
from kvfx.policy import Policy, check_at_least
from kvfx.report import Report, make_report, short_policy
from kvfx.runtime import Executor
from kvfx.validate import validate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfx.calibration import Calibration
    from kvfx.model import CompressedModel


@dataclass(frozen=True)
class Room:
    """The bytes that a cache may take, and for what: `batch` rows of `context` tokens."""

    memory: int | str | None
    batch: int
    context: int | None


@dataclass(frozen=True)
class Lowered:
    """The programs of a model under a policy, before anything is compiled."""

    plan: Plan
    captured: Graph
    raised: Graph
    graphs: dict[str, Graph]
    target: Target
    trail: Trail


def compress(
    model: PreTrainedModel,
    policy: Policy | str | None = None,
    *,
    plan: Plan | Path | str | None = None,
    memory: int | str | None = None,
    batch: int = 1,
    context: int | None = None,
    backend: str = "auto",
    compile: bool = True,
    verify: bool = True,
    calibration: Calibration | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    strict: bool = True,
    passes: Sequence[Pass] = (),
) -> CompressedModel:
    """The model with its KV cache compressed by `policy` (a policy or a preset's name); `model`
    itself is untouched.

    `backend="auto"` picks the best backend that exists for the device. `compile=False` runs the
    rewritten graph eagerly. `verify=True` first proves on random tokens that the rewrite under
    `Full()` computes what the model does.
    `plan` is one that was made before, or its file, in place of a policy. With `memory`, or a
    budget in bytes, the policy gets the largest budget whose cache for `batch` rows of `context`
    tokens fits into that many bytes; without a policy, `kvfx.recommend` chooses one.
    `calibration` is what allocators and mixed precision read (`kvfx.calibrate`).
    `max_length` bounds the tokens of a conversation: no more is allocated than those need. With
    `prefill_chunk`, prompts are read and compressed that many tokens at a time, so that a long one
    never holds its dense cache: tokens are then ranked by what came before the end of their chunk.
    `strict=False` keeps sites dense that the policy cannot serve. `passes` are your own, of
    canonical or raised graphs: they run once, each where its level is (`docs/new_pass.md`).

    Raises InputError (a pass of `passes` cannot run), CalibrationError (the policy needs a
    calibration, or this one is of another model), CaptureError (not a decoder with attention),
    UnmatchedAttention (a site is not understood), UnsupportedShape (the policy or backend cannot
    serve a site), PolicyError (unknown or ill-composed policy), VerificationError (the rewrite is
    wrong: a bug of kvfx, or of `passes`).
    """
    from kvfx.model import CompressedModel

    start = time.perf_counter()
    if prefill_chunk is not None:
        check_at_least("compress", "prefill_chunk", prefill_chunk, 2)
    choose = _chooser(model, policy, plan, Room(memory, batch, context), strict, calibration)
    lowered = lower(
        model,
        choose,
        backend=backend,
        compile=compile,
        strict=strict,
        calibration=calibration,
        passes=passes,
    )
    if verify:
        _validate(lowered, passes)
    programs = {name: graph.module for name, graph in lowered.graphs.items()}
    compiled = _worth_compiling(lowered) if compile else ()
    programs.update({name: _compiled(lowered, name) for name in compiled})
    report = make_report(
        lowered.plan,
        lowered.graphs,
        lowered.trail,
        verified=verify,
        seconds=time.perf_counter() - start,
    )
    return CompressedModel(
        model,
        lowered.plan,
        lowered.raised,
        lowered.graphs,
        Executor(
            programs,
            compiled=compiled,
            replays=_replays(lowered, compiled),
            chunk=prefill_chunk,
        ),
        lowered.trail,
        report,
        max_length,
    )


def explain(
    model: PreTrainedModel,
    policy: Policy | str | None = None,
    *,
    memory: int | str | None = None,
    batch: int = 1,
    context: int | None = None,
    backend: str = "auto",
    strict: bool = True,
    calibration: Calibration | None = None,
    html: Path | str | None = None,
    passes: Sequence[Pass] = (),
) -> Report:
    """What `compress` would do, site by site, without compiling or running anything.

    `html` is a file to write the same to as a page to look at; where the model or the policy is
    refused, it says why, and the error is raised all the same. `passes` are your own, as for
    `compress`.
    """
    # a page is made of what this module does
    from kvfx.page.data import Subject
    from kvfx.page.write import save_page

    start, trail = time.perf_counter(), Trail()
    asked = short_policy(policy) if isinstance(policy, Policy) else policy or "as memory allows"
    subject = Subject(type(model).__name__, asked, "explain", trail)
    try:
        choose = _chooser(model, policy, None, Room(memory, batch, context), strict, calibration)
        lowered = lower(
            model,
            choose,
            backend=backend,
            compile=True,
            strict=strict,
            calibration=calibration,
            trail=trail,
            passes=passes,
        )
    except KvfxError as refusal:
        if html is not None:
            save_page(html, replace(subject, refusal=refusal))
        raise
    report = make_report(
        lowered.plan,
        lowered.graphs,
        lowered.trail,
        verified=False,
        seconds=time.perf_counter() - start,
    )
    if html is not None:
        save_page(
            html,
            replace(
                subject,
                raised=lowered.raised,
                graphs=lowered.graphs,
                plan=lowered.plan,
                report=report,
            ),
        )
    return report


def lower(
    model: PreTrainedModel,
    choose: Callable[[tuple[Site, ...]], Plan],
    *,
    backend: str,
    compile: bool,
    strict: bool,
    calibration: Calibration | None = None,
    trail: Trail | None = None,
    passes: Sequence[Pass] = (),
) -> Lowered:
    """Capture and raise `model`, a user's own `passes` among those that raise it, choose a plan for
    its sites, and lower every program that the plan needs; passes are recorded in `trail`, if one
    is given.
    """
    trail = Trail() if trail is None else trail
    # a capture takes seconds: what cannot run is refused before
    check_own(passes)
    captured = held_capture(model)
    raised = raised_graph(model, trail, strict=strict, own=passes)
    if calibration is not None:
        _check(calibration, model, raised.sites)
    plan = choose(raised.sites)
    device = raised.sites[0].device
    target = Target(_backend(backend, device), inductor_cpu=compile and device.type == "cpu")
    graphs = {
        program: run_passes(raised.copy(program), program_passes(program, plan, target), trail)
        for program in PROGRAMS
        if program != "compact" or plan.compacts
    }
    return Lowered(plan, captured, raised, graphs, target, trail)


def _check(calibration: Calibration, model: PreTrainedModel, sites: tuple[Site, ...]) -> None:
    """Raise a CalibrationError unless it is one, and was measured on `model`."""
    from kvfx.calibration import Calibration

    if not isinstance(calibration, Calibration):
        raise CalibrationError(
            f"calibration={calibration!r} is none: write one with kvfx.calibrate(model), or read "
            "one with kvfx.Calibration.load(path)"
        )
    calibration.check(model, sites)


def _chooser(
    model: PreTrainedModel,
    policy: Policy | str | None,
    plan: Plan | Path | str | None,
    room: Room,
    strict: bool,
    calibration: Calibration | None,
) -> Callable[[tuple[Site, ...]], Plan]:
    """How the plan for the sites of a model comes about."""
    # these are made of what this module does
    from kvfx.fit import bytes_asked, fitted
    from kvfx.plan_file import load_plan, move_plan
    from kvfx.recommendation import recommend

    if plan is not None:
        if policy is not None or room.memory is not None:
            raise PolicyError(
                "compress(plan=...): a plan was made of a policy and has its budgets: give no "
                "policy= and no memory= with it"
            )
        return lambda sites: (
            move_plan(plan, sites) if isinstance(plan, Plan) else load_plan(plan, sites)
        )
    if policy is None and room.memory is None:
        raise PolicyError("compress: give a policy, a plan, or memory= and context= to choose by")
    named = policy_named(policy) if isinstance(policy, str) else policy
    asked = None if named is None else bytes_asked(named)
    if asked is not None and room.memory is not None:
        raise PolicyError(f"compress({named!r}, memory={room.memory!r}): bytes are given twice")
    memory = room.memory if asked is None else asked
    if memory is None:
        assert named is not None
        return lambda sites: make_plan(named, sites, strict=strict, calibration=calibration)
    if room.context is None:
        raise PolicyError(f"compress(memory={memory!r}): for how many tokens? give context=")
    batch, context = room.batch, room.context
    if named is None:
        best = recommend(
            model,
            memory=memory,
            batch=batch,
            context=context,
            calibration=calibration,
            strict=strict,
        )
        return lambda sites: move_plan(best.plan, sites)
    return lambda sites: (
        fitted(
            named,
            sites,
            memory,
            batch=batch,
            context=context,
            strict=strict,
            calibration=calibration,
        ).plan
    )


# captures that were raised before by kvfx's own passes, and those that were proven then
_RAISED: WeakKeyDictionary[fx.GraphModule, tuple[Graph, tuple[Step, ...]]] = WeakKeyDictionary()
_PROVEN: WeakSet[fx.GraphModule] = WeakSet()


def raised_graph(
    model: PreTrainedModel, trail: Trail, *, strict: bool, own: Sequence[Pass] = ()
) -> Graph:
    """The captured graph of `model` with every attention raised: its sites are what is planned for.
    A user's `own` passes run among those of kvfx. Without any, a model that was raised before, and
    is as it was, is not raised again.

    Raises UnmatchedAttention for sites that are not understood; where not `strict`, for those that
    no cache can serve.
    """
    raised = _raised(held_capture(model), trail, own)
    dense = {site.name for site in raised.sites}
    if raised.missed and (strict or not dense.issuperset(raised.missed)):
        reasons = "\n".join(f"  {miss}" for miss in raised.missed.values())
        remedy = "strict=False keeps them dense, under masks that the model computes at every step"
        if not dense.issuperset(raised.missed):
            remedy = "no cache can serve them; kvfx.explain(model, policy) shows what was found"
        raise UnmatchedAttention(
            f"{len(raised.missed)} attention sites of {type(model).__name__} are not "
            f"understood:\n{reasons}\n{remedy}"
        )
    return raised


def _raised(captured: Graph, trail: Trail, own: Sequence[Pass]) -> Graph:
    """The capture, raised, to be changed freely."""
    known = None if own else _RAISED.get(captured.module)
    if known is not None:
        replay(known[1], trail)
        return known[0].copy()
    start = len(trail.steps)
    raised = run_passes(captured.copy(), raise_passes(own), trail)
    if not own:
        _RAISED[captured.module] = (raised.copy(), tuple(trail.steps[start:]))
    return raised


def _validate(lowered: Lowered, own: Sequence[Pass]) -> None:
    """Translation validation, once for all policies: it compares the raised graph under `Full()`
    with the capture. Where it fails, a user's `own` passes are named first.
    """
    if not own and lowered.captured.module in _PROVEN:
        return
    try:
        validate(lowered.captured, lowered.raised)
        if not own:
            _PROVEN.add(lowered.captured.module)
    except VerificationError as error:
        if not own:
            raise
        names = ", ".join(step.name for step in own)
        raise VerificationError(
            f"{error}\nyour own passes ran ({names}), suspect these first: with verify=False, "
            "trail[name].diff() shows what each changed"
        ) from error


def _backend(backend: str, device: torch.device) -> str:
    """The backend to lower to: the one asked for, or the best that this version has for the
    device.
    """
    if backend == "auto":
        return "triton" if device.type == "cuda" else "reference"
    if backend not in BACKENDS:
        raise UnsupportedShape(
            f"backend {backend!r} does not exist on {device}: choose 'auto' or "
            f"{', '.join(BACKENDS)}"
        )
    return backend


def _worth_compiling(lowered: Lowered) -> tuple[str, ...]:
    """The programs that run faster compiled.

    On a CPU that is decode alone: prompts spend their time in matrix products and attention, and
    were as fast uncompiled (SmolLM2-135M at 512, 2,048 and 4,096 tokens, within 3 %).
    """
    return ("decode",) if lowered.target.inductor_cpu else tuple(lowered.graphs)


def _replays(lowered: Lowered, compiled: tuple[str, ...]) -> bool:
    """Whether decode steps become CUDA graphs: one GPU, and no mask that grows with the history."""
    devices = {site.device for site in lowered.raised.sites}
    one_gpu = len(devices) == 1 and devices.pop().type == "cuda"
    return one_gpu and "decode" in compiled and not lowered.plan.masked


def _compiled(lowered: Lowered, program: str) -> fx.GraphModule:
    """The module that runs: layers outlined, and each distinct region compiled once."""
    outlined = run_passes(lowered.graphs[program].copy(), outline_passes(), lowered.trail)
    for name, region in list(outlined.module.named_children()):
        setattr(outlined.module, name, torch.compile(region, dynamic=True, fullgraph=True))
    return outlined.module
