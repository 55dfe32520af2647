"""A way to choose tokens of your own, in one file: it composes like the others."""

from dataclasses import dataclass
from typing import ClassVar

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

import kvfx
from kvfx import models
from kvfx.ops import score_op
from kvfx.policy import Select, check_at_least, check_budget
from kvfx.testing.text import pass_key_prompt

LENGTH, DEPTHS, KEY = 400, (0.1, 0.4, 0.7, 0.95), "71432"


@score_op
def score_odd_values(q: Tensor | None, k: Tensor, v: Tensor, live: Tensor) -> Tensor:
    """The negative cosine of each value with the mean direction of all values, [B, K, T] fp32."""
    del q, k
    directions = normalize(v.float(), dim=-1).where(live[..., None], 0.0)
    mean = normalize(directions.sum(2, keepdim=True), dim=-1)
    return -(directions * mean).sum(-1)


@dataclass(frozen=True)
class OddValues(Select):
    """Keep the tokens whose values point elsewhere than most: what is said once in a long text.

    Not published: KeyDiff asks keys the same. The first 4 and the newest `recent` tokens stay.
    """

    budget: float | int | str = 0.5
    recent: int = 16
    interval: int = 64
    positions: ClassVar[str] = "absolute"
    score: ClassVar[str] = "score_odd_values"
    select: ClassVar[str] = "select_top"

    def __post_init__(self) -> None:
        check_budget("OddValues", self.budget)
        check_at_least("OddValues", "recent", self.recent, 0)
        check_at_least("OddValues", "interval", self.interval, 1)

    def attributes(self) -> dict[str, int | float | str]:
        """The tokens that no score can drop."""
        return {"sinks": 4, "recent": self.recent}

    def least(self) -> int:
        """Those, and one that is chosen."""
        return 4 + self.recent + 1


def main() -> None:
    """Print what the compiler makes of the policy, and which hidden pass keys are remembered."""
    model, tokenizer = models.load("smollm2")
    selections = (OddValues(budget=0.5), kvfx.StreamingLLM(budget=0.5))
    fasts = {
        type(select).__name__: kvfx.compress(
            model, select | kvfx.KIVI(k_bits=8, v_bits=4), compile=False, verify=False
        )
        for select in selections
    }
    print("where the prefill program asks it, at layer 3:")
    for line in fasts["OddValues"].graph("prefill").text.splitlines():
        if "layers.3.self_attn" in line and ("score_odd" in line or "select_top" in line):
            print(f"  {line.partition('  #')[0]}")

    table = Table(title=f"the pass key {KEY}, hidden in {LENGTH} tokens", box=box.SIMPLE_HEAD)
    for name in ("depth", "dense", *fasts):
        table.add_column(name, justify="right")
    for depth in DEPTHS:
        prompt = pass_key_prompt(tokenizer, LENGTH, depth, key=KEY)
        inputs = tokenizer(prompt, return_tensors="pt")
        said = [
            fast.generate(**inputs, max_new_tokens=6, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
            for fast in (model, *fasts.values())
        ]
        table.add_row(f"{depth:.0%}", *(repr(tokenizer.decode(tokens)) for tokens in said))
    Console().print(table)
    for name, fast in fasts.items():
        share = fast.memory(1, 4096) / (4096 * fast.report.before)
        print(f"{name} | KIVI: {share:.0%} of a dense cache after 4,096 tokens")


if __name__ == "__main__":
    main()
