"""Five agents read each other; when a question comes back, so do their keys and values (KVCOMM)."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kvfx
from kvfx import models
from kvfx.bench.clock import Clock
from kvfx.model import CompressedCache, CompressedModel
from kvfx.reuse import Agents, Slot

NEW = 12
TASKS = {
    "answer": "Answer the question in one short sentence.",
    "title": "Give a title of three words to the text above.",
    "critic": "Ask one question about the text above.",
    "poet": "Write one line of a poem about the text above.",
    "editor": "Sum up the text above in one short sentence.",
}
SKY, ICE = "Why is the sky blue in the day and red at night?", "Why does ice float on water?"


def main() -> None:
    """Print who was answered from what, and the time to each first token, beside that of a dense
    prefill in the same run.
    """
    model, tokenizer = models.load("smollm2")
    fast = kvfx.compress(model, "full", compile=False, verify=False)
    # the audit computes half of the prompts densely as well, and compares
    agents = Agents(fast, templates(), tokenizer=tokenizer, verify="sample:0.5")
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("agent", "texts known", "tokens", "reused", "KVCOMM, ms", "dense, ms"):
        table.add_column(name, justify="left" if name == "agent" else "right")
    for question in (SKY, ICE, SKY):
        print(f"\n{question}")
        table.add_section()
        texts = {"question": question}
        for name in TASKS:
            call = agents.prefill(name, texts)
            said, last = reply(fast, call.input_ids, call.cache, NEW)
            _, dense = reply(fast, call.input_ids, fast.new_cache(), 1)
            texts[name] = str(tokenizer.decode(said, skip_special_tokens=True)).strip() or "-"
            print(f"  {name}: {texts[name]!r}")
            known = sum(verdict.shareable for verdict in call.verdicts.values())
            table.add_row(
                name,
                f"{known} of {len(call.verdicts)}",
                str(call.served.tokens),
                str(call.served.tokens - call.served.computed),
                *(f"{1e3 * each:,.0f}" for each in (call.served.prefill_seconds + last, dense)),
            )
    print("\na prompt is reused where all its texts are known, and computed as a whole otherwise")
    Console().print(table)
    print(agents.totals)


def templates() -> dict[str, list[str | Slot]]:
    """Per agent: the question, what the agents before said, and a task."""
    found: dict[str, list[str | Slot]] = {}
    for name, task in TASKS.items():
        parts: list[str | Slot] = ["<|im_start|>user\n", Slot("question")]
        for before in found:
            parts += ["\n", Slot(before)]
        found[name] = [*parts, f"\n\n{task}<|im_end|>\n<|im_start|>assistant\n"]
    return found


def reply(
    fast: CompressedModel, ids: Tensor, cache: CompressedCache, new: int
) -> tuple[Tensor, float]:
    """`new` greedy tokens after the prompt ids [1, S], and the seconds to the first of them."""
    clock = Clock()
    tokens = fast.generate(
        ids, past_key_values=cache, max_new_tokens=new, do_sample=False, streamer=clock
    )
    return tokens[0, ids.shape[1] :], clock.first


if __name__ == "__main__":
    main()
