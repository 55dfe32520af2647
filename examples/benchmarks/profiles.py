"""How much is measured: in minutes to see that it works, or for a table."""

from __future__ import annotations

from dataclasses import dataclass

from kvfx.eval.suite import PERPLEXITY, Suite
from kvfx.eval.text import Corpus
from kvfx.policies import policy_named


@dataclass(frozen=True)
class Profile:
    """`windows` of `length` tokens and `scored` more; `samples` of each needle task behind at most
    `hidden_in` tokens; `rounds` of `new_tokens` behind each of `timed_at` tokens.
    """

    windows: int
    length: int
    scored: int
    samples: int
    hidden_in: int
    tasks: tuple[str, ...]
    timed_at: tuple[int, ...]
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
    windows=5,
    length=1024,
    scored=128,
    samples=100,
    hidden_in=384,
    tasks=("needle-prose", "needle-noise"),
    timed_at=(512, 4096),
    new_tokens=24,
    rounds=2,
    policies=(
        "KIVI(bits=4)",
        "KIVI(bits=4, residual=0)",
        "KIVI(bits=2)",
        "Auto(budget=1, context=1, residual=0) | SnapKV()",
        "SnapKV(window=64)",
        "KeyDiff()",
        "ExpectedAttention()",
    ),
    timed=("full", "k8v4", "kivi-4bit", "snapkv-25%", "snapkv-25%|kvcrush", "h2o-20%"),
)
QUICK = Profile(
    windows=2,
    length=512,
    scored=64,
    samples=5,
    hidden_in=300,
    tasks=("needle-noise",),
    timed_at=(256,),
    new_tokens=8,
    rounds=2,
    policies=("KIVI(bits=4)", "SnapKV()"),
    timed=("kivi-4bit",),
)
