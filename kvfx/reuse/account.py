"""What reuse did: rows by where they came from, seconds by step, and prompts that were checked."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kvfx.errors import InputError
from kvfx.reuse.runner import LiveRows, Runner

STEPS: tuple[str, ...] = ("retrieve", "assemble", "compute", "adopt", "learn")


@dataclass(frozen=True)
class Served:
    """What the tokens of a prompt, all but the last, were made of: `exact` rows are those that the
    prompt itself would have made, `approximate` ones were computed in another context, `repaired`
    ones were found and computed again, `computed` ones were found nowhere.

    `read` are bytes of stored rows. `seconds` per step; what is learnt from a prompt is stored when
    its cache is ready, so that step is not in `prefill_seconds`.
    """

    tokens: int
    exact: int
    approximate: int
    repaired: int
    computed: int
    read: int
    seconds: dict[str, float]

    @property
    def hit_rate(self) -> float:
        """The part of the tokens that was found."""
        return 1.0 - self.computed / self.tokens

    @property
    def prefill_seconds(self) -> float:
        """From the request to the cache."""
        return sum(seconds for step, seconds in self.seconds.items() if step != "learn")


@dataclass(frozen=True)
class Audit:
    """A prompt that was computed densely beside: KL(dense || reused) of the next token in nats, and
    whether the most probable one is the same.
    """

    kl: float
    agrees: bool


@dataclass
class Totals:
    """Sums over all prompts of a pool; `calls_reused` are those with any row that was found."""

    calls: int = 0
    calls_reused: int = 0
    tokens: int = 0
    exact: int = 0
    approximate: int = 0
    repaired: int = 0
    computed: int = 0
    read: int = 0
    audits: list[Audit] = field(default_factory=list)

    def add(self, served: Served) -> None:
        """Count one prompt."""
        self.calls += 1
        self.calls_reused += served.computed < served.tokens
        for name in ("tokens", "exact", "approximate", "repaired", "computed", "read"):
            setattr(self, name, getattr(self, name) + getattr(served, name))

    def __str__(self) -> str:
        found = self.tokens - self.computed
        text = (
            f"{self.calls_reused} of {self.calls} calls and {found:,} of {self.tokens:,} tokens "
            f"found ({self.exact:,} exact, {self.approximate:,} approximate, {self.repaired:,} "
            f"computed again), {self.computed:,} computed; {self.read:,} bytes read"
        )
        if not self.audits:
            return text
        kl = sum(audit.kl for audit in self.audits) / len(self.audits)
        agree = sum(audit.agrees for audit in self.audits)
        return (
            f"{text}; {len(self.audits)} audits: mean KL {kl:.2g} nats, {agree} agree on the next "
            "token"
        )


class Clock:
    """Seconds of each step on a device: `with clock("compute"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STEPS, 0.0)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time one step."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[step] += time.perf_counter() - start


def audit(runner: Runner, rows: LiveRows, tokens: Sequence[int]) -> Audit:
    """Compare the distribution of the next token, read over `rows`, with the dense one's."""
    last = len(tokens) - 1
    found = runner.partial(rows, tokens[-1:], [last], watch=None).logits
    dense = runner.dense(runner.rows(len(tokens)), tokens).logits
    p, q = (x.double().log_softmax(-1) for x in (dense, found))
    return Audit(float((p.exp() * (p - q)).sum()), bool(p.argmax() == q.argmax()))


def sampled_by(verify: str) -> Callable[[Sequence[int]], bool]:
    """Whether a prompt is computed densely as well."""
    name, _, part = verify.partition(":")
    fractions = {"off": 0.0, "always": 1.0}
    try:
        share = fractions[verify] if verify in fractions else float(part)
    except ValueError:
        share = math.nan
    if (verify not in fractions and name != "sample") or not 0.0 <= share <= 1.0:
        raise InputError(f"verify={verify!r}: use 'off', 'always', or 'sample:0.05'")

    def sampled(tokens: Sequence[int]) -> bool:
        digest = hashlib.sha256(",".join(map(str, tokens)).encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    return sampled
