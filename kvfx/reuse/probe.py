"""What has to hold before rows are reused on a model: shown by running it, not by its
configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvfx.errors import UnsupportedShape
from kvfx.graph import Graph
from kvfx.kernels.common.rotation import rotate
from kvfx.pass_manager import run_passes
from kvfx.passes.pipeline import Target, program_passes
from kvfx.planner import make_plan
from kvfx.policies import Full
from kvfx.prefill_parts import OPERANDS, dense_part
from kvfx.reuse.runner import Runner

# rows of the probe, and where they are moved to
ROWS, SHIFT = 24, 137
# relative to the largest value; of the half-precision types, their own rounding adds up
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
COARSE = 5e-2


@dataclass(frozen=True)
class Probe:
    """Largest errors, relative to the largest value: `moved` keys and values against the model's
    own at other positions, `rows` computed on live rows against the model's logits, and what an
    earlier row sees of `later` ones. `failures` says what is too large.
    """

    moved: float
    rows: float
    later: float
    failures: tuple[str, ...]

    def check(self, *, approximate: bool) -> None:
        """Raise an UnsupportedShape that names what fails; exact prefixes are never moved."""
        found = [each for each in self.failures if approximate or not each.startswith("moved")]
        if found:
            raise UnsupportedShape(f"rows of this model cannot be reused: {'; '.join(found)}")


@torch.no_grad()
def probe(model: nn.Module, raised: Graph, runner: Runner) -> Probe:
    """Run the three experiments on random tokens of `model`, whose raised graph and runner these
    are (specs/reuse.md 4.6: rotary style, width, scaling and table, end to end, mask leak).
    """
    site = raised.sites[0]
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, (ROWS,), generator=generator).to(site.device)
    moved = _moved(raised, ids)
    rows = runner.rows(ROWS)
    logits = runner.dense(rows, ids).logits
    expected = model(ids[None], use_cache=False).logits[0, -1]
    whole = _error(logits, expected)
    # whatever stands behind a row must not reach it
    middle = ROWS // 2
    before = runner.partial(rows, ids[middle : middle + 1], [middle], watch=None).logits
    for tensor in (*rows.keys, *rows.values):
        tensor[:, :, middle + 1 :] += 3.0
    after = runner.partial(rows, ids[middle : middle + 1], [middle], watch=None).logits
    later = _error(after, before)
    limit = TOLERANCE.get(site.dtype, COARSE)
    failures = [
        f"{name} {what} ({error:.2g}, at most {most:.2g})"
        for name, error, most, what in (
            ("moved", moved, limit, "keys are not those of the model at the new positions"),
            ("rows", whole, limit, "computed on live rows give other logits"),
            ("later", later, 0.0, "rows are seen by earlier ones"),
        )
        if not error <= most
    ]
    return Probe(moved, whole, later, tuple(failures))


def _moved(raised: Graph, ids: Tensor) -> float:
    """The largest error of a key turned to another position, and of a value left as it is."""
    plan = make_plan(Full(), raised.sites)
    passes = program_passes("prefill", plan, Target("reference", inductor_cpu=False))
    inputs = dense_part(run_passes(raised.copy(), passes, None))
    index = torch.arange(len(ids), device=ids.device)
    last = index[-1:]
    here, there = (inputs(ids[None], (index + by)[None], last) for by in (0, SHIFT))
    worst = 0.0
    for number, site in enumerate(raised.sites):
        (_, k, v), (_, other_k, other_v) = (
            found[1 + number * OPERANDS :][:OPERANDS] for found in (here, there)
        )
        if site.rope is not None:
            frequencies = torch.tensor(site.rope.frequencies, device=k.device)
            shift = torch.full_like(index, SHIFT)[None, None]
            k = rotate(k, shift, frequencies, site.rope.style)
        worst = max(worst, _error(k, other_k), _error(v, other_v))
    return worst


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    size = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found - expected).abs().max() / size)
