"""Which policy suits a model and a memory: candidates of equal bytes, ranked by what they do to its
predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.calibration import calibrate
from kvfx.calibration_prompts import default_prompts
from kvfx.compiler import compress
from kvfx.errors import CapacityExceeded, InputError, PolicyError, UnsupportedShape
from kvfx.eval.fidelity import Fidelity, dense_log_probs, score_window
from kvfx.eval.shared_prefill import share_prefill
from kvfx.fit import MemoryPlan, fitted, sites_of
from kvfx.geometry import Site
from kvfx.planner import Plan
from kvfx.policies import (
    KIVI,
    Auto,
    ExpectedAttention,
    Full,
    KVTuner,
    PrefixKV,
    PyramidKV,
    SnapKV,
    policy_named,
)
from kvfx.policy import Policy
from kvfx.report import aligned, short_policy
from kvfx.sizes import parse_size, size_text

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvfx.calibration import Calibration
    from kvfx.model import CompressedModel

COLUMNS = ("policy", "bytes", "KL, nats", "flips")
# tokens whose predictions are compared, after each prompt, and how many are read at once
SCORED, CHUNK = 64, 32
# prompts that are read where none are given, and where in the built-in texts they begin: a
# calibration has read what comes before
PROMPTS, BEGIN = 4, 1024


def default_candidates(memory: int, context: int) -> tuple[Policy, ...]:
    """What is tried where nothing else is named: fewer bits, fewer tokens, and both."""
    return (
        Full(),
        KIVI(k_bits=8, v_bits=4),
        KIVI(bits=4),
        KVTuner(3.25),
        KIVI(bits=2),
        SnapKV(),
        ExpectedAttention(),
        PrefixKV() | SnapKV(),
        PyramidKV() | SnapKV(),
        SnapKV() | KIVI(k_bits=8, v_bits=4),
        SnapKV() | KIVI(bits=4),
        Auto(memory, context) | SnapKV(),
    )


@dataclass(frozen=True)
class Candidate:
    """A policy with the budget that fits, its `bytes` at the context, and its mean KL(dense ||
    policy) per token in nats; `flips` is the fraction of tokens whose best successor is another
    one. `reason` says why one was not measured.
    """

    policy: Policy
    bytes: int | None = None
    kl: float | None = None
    flips: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Recommendation:
    """The candidates for `batch` rows of `context` tokens in `memory` bytes, the best one first,
    and the plan of that.

    They were compared on `prompts` prompts of `tokens` tokens, at the budgets that fit at
    `context`.
    """

    plan: Plan
    memory: int
    batch: int
    context: int
    prompts: int
    tokens: int
    candidates: tuple[Candidate, ...]

    @property
    def policy(self) -> Policy:
        """The best policy, resolved for the model."""
        return self.plan.policy

    def to_dict(self) -> dict[str, object]:
        """Everything as json-able data; policies as they are typed."""
        given = ("memory", "batch", "context", "prompts", "tokens")
        return {
            "policy": repr(self.policy),
            **{name: getattr(self, name) for name in given},
            "candidates": [
                {**asdict(each), "policy": repr(each.policy)} for each in self.candidates
            ],
        }

    def __str__(self) -> str:
        table = aligned([COLUMNS, *self._rows()], right=(1, 2, 3))
        return "\n".join([self.headline(), *table, *self.remarks()])

    def render(self) -> Table:
        """The same table for a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=self.headline(),
            caption="\n".join(self.remarks()),
            box=box.SIMPLE_HEAD,
            title_style="bold",
            title_justify="left",
            caption_justify="left",
        )
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == COLUMNS[0] else "right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def headline(self) -> str:
        """One line: what is recommended, and for what."""
        return (
            f"{short_policy(self.candidates[0].policy)} for batch {self.batch:,}, {self.context:,} "
            f"tokens in {size_text(self.memory)}"
        )

    def remarks(self) -> list[str]:
        """What stands below the table: how it was measured, and what was not."""
        how = (
            f"KL against the dense model and flips: {SCORED} tokens read through the cache after "
            f"each of {self.prompts} prompts of {self.tokens:,} tokens"
        )
        rest = [each for each in self.candidates if each.reason]
        return [
            how,
            *(f"not measured: {short_policy(each.policy)}: {each.reason}" for each in rest),
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (short_policy(each.policy), f"{each.bytes:,}", f"{each.kl:.2g}", f"{each.flips:.1%}")
            for each in self.candidates
            if each.kl is not None
        ]


def recommend(
    model: PreTrainedModel,
    *,
    memory: int | str,
    context: int,
    batch: int = 1,
    candidates: Sequence[Policy | str] | None = None,
    calibration: Calibration | None = None,
    prompts: Sequence[str] | Sequence[Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int = 1024,
    strict: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Recommendation:
    """Rank `candidates` (policies or names of presets) for a cache of at most `memory` bytes for
    `batch` rows of `context` tokens, by their KL against the dense model.

    Each gets the largest budget that fits; one without a budget fits or not. `prompts` are texts
    for `tokenizer` or rows of token ids, None for built-in texts; of each, up to `tokens` tokens
    are read and compressed. Without a `calibration`, one is made of the same prompts, or of
    built-in ones. `tell(what)` is called before each step.

    Prompts shorter than `context` favour methods that keep the newest tokens exact.
    Raises CapacityExceeded where no candidate fits, InputError for prompts that cannot be read,
    and what `compress` raises for models that it cannot capture.
    """
    tell = tell or _silent
    size, sites = parse_size(memory), sites_of(model, strict=strict)
    named = default_candidates(size, context) if candidates is None else candidates
    policies = [policy_named(each) if isinstance(each, str) else each for each in named]
    if not policies:
        raise InputError("recommend(candidates=[]): name at least one policy, or None")
    rows = _rows(model, prompts, tokenizer, min(tokens, context))
    if calibration is None:
        tell("calibrating")
        calibration = calibrate(model, _calibrating(model, prompts, rows, tokenizer))
    found = {
        policy: _fit(policy, sites, size, batch, context, strict, calibration)
        for policy in policies
    }
    fits = {policy: plan for policy, plan in found.items() if isinstance(plan, MemoryPlan)}
    if not fits:
        reasons = "\n".join(f"  {short_policy(policy)}: {why}" for policy, why in found.items())
        raise CapacityExceeded(f"no candidate fits into {size_text(size)}:\n{reasons}")
    scores = _measure(model, fits, rows, strict, tell)
    ranked = sorted(
        (
            Candidate(plan.asked, plan.bytes, scores[policy].kl, scores[policy].flips)
            for policy, plan in fits.items()
        ),
        key=lambda each: (each.kl, each.bytes),
    )
    rest = [Candidate(policy, reason=why) for policy, why in found.items() if isinstance(why, str)]
    best = next(plan for plan in fits.values() if plan.asked == ranked[0].policy)
    length = len(rows[0]) - SCORED - 1
    return Recommendation(best.plan, size, batch, context, len(rows), length, (*ranked, *rest))


def _fit(
    policy: Policy,
    sites: tuple[Site, ...],
    memory: int,
    batch: int,
    context: int,
    strict: bool,
    calibration: Calibration,
) -> MemoryPlan | str:
    """The plan with the largest budget that fits, or why there is none."""
    try:
        return fitted(
            policy,
            sites,
            memory,
            batch=batch,
            context=context,
            strict=strict,
            calibration=calibration,
        )
    except (CapacityExceeded, PolicyError, UnsupportedShape) as error:
        return str(error).removeprefix(f"{policy!r} ").partition(": give more memory")[0]


def _measure(
    model: PreTrainedModel,
    fits: dict[Policy, MemoryPlan],
    rows: Sequence[Tensor],
    strict: bool,
    tell: Callable[[str], None],
) -> dict[Policy, Fidelity]:
    """Every policy on every prompt, whose dense pass is shared."""
    models: dict[Policy, CompressedModel] = {}
    for number, (policy, plan) in enumerate(fits.items(), 1):
        tell(f"rewriting {number} of {len(fits)}: {short_policy(policy)}")
        models[policy] = compress(model, plan=plan.plan, compile=False, verify=False, strict=strict)
    share_prefill(list(models.values()))
    scores: dict[Policy, list] = {policy: [] for policy in models}
    for number, row in enumerate(rows, 1):
        tell(f"prompt {number} of {len(rows)}")
        ids = row.to(model.device)
        dense = dense_log_probs(model, ids, SCORED)
        for policy, fast in models.items():
            scores[policy].append(score_window(fast, ids, dense, chunk=CHUNK)[0])
    return {
        policy: Fidelity(tuple(windows), fits[policy].bytes) for policy, windows in scores.items()
    }


def _rows(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Tensor] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: int,
) -> list[Tensor]:
    """Token ids of prompts, all of one length, with the scored tokens behind."""
    begin = BEGIN if prompts is None else 0
    texts = default_prompts()[:PROMPTS] if prompts is None else prompts
    if not texts:
        raise InputError("recommend(prompts=[]): give at least one, or None for built-in ones")
    ids = [_token_ids(prompt, tokenizer, model)[begin:] for prompt in texts]
    length = min(tokens + SCORED + 1, *map(len, ids))
    if length < 2 * SCORED:
        raise InputError(
            f"prompts of {length} tokens are too short: {2 * SCORED} or more, since {SCORED} are "
            "scored"
        )
    return [row[:length] for row in ids]


def _token_ids(
    prompt: str | Tensor, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> Tensor:
    if isinstance(prompt, Tensor):
        return prompt
    reader = tokenizer or _tokenizer(model)
    # texts are longer than what is read of them: tokenizers would warn about that
    return torch.tensor(reader(prompt, verbose=False)["input_ids"], dtype=torch.int64)


def _calibrating(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Tensor] | None,
    rows: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Sequence[Tensor]:
    """What a calibration reads: the prompts, or built-in texts from their beginning."""
    if prompts is not None:
        return rows
    reader = tokenizer or _tokenizer(model)
    return [_token_ids(prompt, reader, model) for prompt in default_prompts()]


def _tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights that `model` was loaded from."""
    from transformers import AutoTokenizer

    source = model.config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"texts need a tokenizer, and there is none beside the model ({source!r}): "
            "kvfx.recommend(model, tokenizer=...), or give prompts as rows of token ids"
        ) from error


def _silent(what: str) -> None:
    del what
