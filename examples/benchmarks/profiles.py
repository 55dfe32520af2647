"""How much is measured: in minutes to see that it works, or for a table."""

from __future__ import annotations

from dataclasses import dataclass

from kvfx.eval.suite import PERPLEXITY, Suite
from kvfx.eval.text import Corpus
from kvfx.policies import policy_named


@dataclass(frozen=True)
class Profile:
    """`windows` of `length` tokens and `scored` more; `samples` of each needle task behind at most
    `hidden_in` tokens; `rounds` of `new_tokens` behind `timed_at` tokens.
    """

    windows: int
    length: int
    scored: int
    samples: int
    hidden_in: int
    tasks: tuple[str, ...]
    timed_at: int
    new_tokens: int
    rounds: int
    policies: tuple[str, ...]
    timed: tuple[str, ...]

    @property
    def calibrated(self) -> bool:
        """Whether a policy reads a calibration."""
        return any(policy.startswith("Auto") for policy in self.policies)

    def suites(self, text: Corpus) -> tuple[Suite, Suite]:
        """What `kvfx eval` is asked for: perplexity, and needles whose question is hidden."""
        policies = tuple(map(policy_named, self.policies))
        read = Suite(
            policies,
            (PERPLEXITY,),
            (self.length,),
            text,
            seed=0,
            windows=self.windows,
            scored=self.scored,
        )
        asked = Suite(policies, self.tasks, (self.hidden_in,), text, seed=0, samples=self.samples)
        return read, asked


FULL = Profile(
    windows=8,
    length=1024,
    scored=128,
    samples=100,
    hidden_in=600,
    tasks=("needle-prose",),
    timed_at=4096,
    new_tokens=32,
    rounds=3,
    policies=(
        "KIVI(bits=4)",
        "KIVI(bits=4, residual=32)",
        "KIVI(bits=2)",
        "SnapKV() | KIVI(bits=4)",
        "Auto(budget=1, context=1) | SnapKV()",
        "SnapKV()",
        "KeyDiff()",
        "ExpectedAttention()",
    ),
    timed=("full", "kivi-4bit", "kivi-2bit", "snapkv-25%"),
)
QUICK = Profile(
    windows=2,
    length=512,
    scored=64,
    samples=5,
    hidden_in=300,
    tasks=("needle-noise",),
    timed_at=512,
    new_tokens=8,
    rounds=2,
    policies=("KIVI(bits=4)", "SnapKV()"),
    timed=("kivi-4bit",),
)
