"""Translation validation: the rewritten programs compute what the model computes, site by site, or
nothing is returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvfx.errors import VerificationError
from kvfx.graph import Graph
from kvfx.ops import name_of
from kvfx.pass_manager import run_passes
from kvfx.passes.match_attention import attention_roots
from kvfx.passes.pipeline import Target, program_passes
from kvfx.planner import make_plan
from kvfx.policies.full import Full
from kvfx.provenance import origin
from kvfx.runtime import Executor, State

PIECES = (("prefill", 15), ("extend", 8), ("decode", 1))
ROWS = sum(rows for _, rows in PIECES)
BATCH = 2
# rows of padding before the second prompt
PADDED = 4


def validate(captured: Graph, raised: Graph) -> None:
    """Raise a VerificationError naming the first differing site unless the programs under `Full()`
    equal the capture.

    Random tokens go through the capture in one pass, and through prefill, extend and decode in
    three pieces, the second row behind padding. What each attention returns, and the logits, may
    differ by rounding: by the square root of the dtype's epsilon, relative to the largest value.
    """
    plan = make_plan(Full(), raised.sites)
    target = Target("reference", inductor_cpu=False)
    programs = {
        name: _Recorder(
            run_passes(raised.copy(), program_passes(name, plan, target), None).module, None
        )
        for name, _ in PIECES
    }
    model = _Recorder(
        captured.module, {node: site for site, node in attention_roots(captured).items()}
    )
    # where the model's own mask is asked for, nothing may be padded
    padded = 0 if plan.masked else PADDED
    given = _tokens(captured)
    input_ids, positions = _padded(given, padded)
    every = torch.arange(ROWS, device=input_ids.device)
    with torch.no_grad():
        expected = _Expected(model(*given, every)[0], padded)
        state, executor, start = State(plan, BATCH, None), Executor(programs), 0
        for name, rows in PIECES:
            here = slice(start, start + rows)
            if name == "decode":
                logits = executor.decode(state, input_ids[:, here])
            else:
                tokens = [rows, rows - padded] if start == 0 else [rows] * BATCH
                logits = executor.prompt(
                    state, input_ids[:, here], positions[:, here], every[:rows], tokens
                )
            # what only a user's own pass made an attention is none in the capture: those behind it
            # and the logits are compared
            for site in (site for site in plan.sites if site.site.name in model.outputs):
                known = _Expected(_rows_first(model.outputs[site.site.name]), padded)
                found = _rows_first(programs[name].outputs[site.site.name])
                known.compare(found, here, f"{site.site.name}: the {name} program")
            expected.compare(logits, here, f"the logits of the {name} program")
            start += rows


def _padded(given: tuple[Tensor, Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """The same tokens and positions, where the second row begins `padding` rows later."""
    ids, positions = (each.clone() for each in given)
    ids[1, padding:] = given[0][1, : ROWS - padding]
    positions[1] -= padding
    return ids, positions.clamp(min=-1)


def _rows_first(out: Tensor) -> Tensor:
    """What an attention returned, [B, S, ...], where batch and heads may have been one axis."""
    return (out if out.dim() == 4 else out.unflatten(0, (BATCH, -1))).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _Expected:
    """What the model computed for all rows [2, S, ...], the second of which is read `padded` rows
    late.
    """

    out: Tensor
    padded: int

    def compare(self, found: Tensor, here: slice, what: str) -> None:
        """Raise a VerificationError unless the rows `here` are found."""
        first = max(self.padded - here.start, 0)
        late = slice(here.start + first - self.padded, here.stop - self.padded)
        _compare(found[0], self.out[0, here], what)
        _compare(found[1, first:], self.out[1, late], f"{what} in a padded row")


class _Recorder(fx.Interpreter):
    """Runs a graph and remembers what each attention returned, by site."""

    def __init__(self, module: fx.GraphModule, roots: Mapping[fx.Node, str] | None) -> None:
        super().__init__(module)
        self.roots = roots if roots is not None else _attends(module)
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        return self.run(*args)

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n in self.roots:
            self.outputs[self.roots[n]] = result
        return result


def _attends(module: fx.GraphModule) -> dict[fx.Node, str]:
    """The attention ops of a program by site."""
    found = {}
    for node in module.graph.nodes:
        name, mark = name_of(node.target), origin(node)
        if name is not None and name.startswith(("attend_", "extend_")) and mark is not None:
            found[node] = mark.site
    return found


def _tokens(captured: Graph) -> tuple[Tensor, Tensor]:
    """Random tokens [B, S] that the embedding knows, and their positions."""
    device = captured.input("input_ids").meta["val"].device
    rows = min(
        parameter.shape[0] for parameter in captured.module.parameters() if parameter.dim() == 2
    )
    ids = torch.randint(0, rows, (BATCH, ROWS), generator=torch.Generator().manual_seed(0))
    return ids.to(device), torch.arange(ROWS, device=device).expand(BATCH, ROWS).contiguous()


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    bound = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    error = float((found - expected).abs().max())
    if not error <= bound:
        raise VerificationError(
            f"{what} differs from the model by {error:.3g}, rounding explains {bound:.3g}: this "
            "rewrite is wrong, "
            "please report the model (verify=False would run it all the same)"
        )
