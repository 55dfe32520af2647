"""Measure a model once, then let layers keep as many tokens as their attention needs (PrefixKV)."""

from __future__ import annotations

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

import kvfx
from kvfx import models
from kvfx.eval.text import corpus, windows
from kvfx.model import CompressedModel
from kvfx.testing.text import passages

PROMPTS, TOKENS = 4, 256
BUDGET, NEW = 0.3, 32
QUESTION = "\n\nWhat is this text about? Answer in one sentence."


def main() -> None:
    """Print the budgets of both allocators layer by layer, their bytes, and what each answers."""
    console = Console(highlight=False)
    model, tokenizer = models.load("smollm2")
    # real work calibrates on more: None reads eight built-in texts, 512 tokens of each
    prompts = windows(corpus("python"), tokenizer, tokens=TOKENS, count=PROMPTS, seed=0)
    calibration = kvfx.calibrate(model, list(prompts), tokens=TOKENS)
    allocators = (kvfx.Uniform(BUDGET), kvfx.PrefixKV(BUDGET))
    # one file holds all that was measured: calibration.save("calibration.safetensors")
    equal, prefix = (
        kvfx.compress(
            model, each | kvfx.SnapKV(), calibration=calibration, compile=False, verify=False
        )
        for each in allocators
    )

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": passages()[30][:2400] + QUESTION}],
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = tokenizer(str(text), add_special_tokens=False, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    console.print(budgets(equal, prefix, length))

    options = {**inputs, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**options)[0, length:]
    said = [fast.generate(**options)[0, length:] for fast in (equal, prefix)]
    sizes = [length * equal.report.before, equal.memory(1, length), prefix.memory(1, length)]
    names = ("dense", "Uniform | SnapKV", "PrefixKV | SnapKV")
    for name, size, tokens in zip(names, sizes, (expected, *said), strict=True):
        print(f"{name}, {size / 2**20:.1f} MiB, answers:")
        print(f"  {tokenizer.decode(tokens, skip_special_tokens=True)}")


def budgets(equal: CompressedModel, prefix: CompressedModel, length: int) -> Table:
    """What each layer keeps of a prompt of `length` tokens, as numbers and bars."""
    kept = [
        [site.schedule.kept(length, length) for site in fast.plan.sites] for fast in (equal, prefix)
    ]
    table = Table(
        title=f"entries of each KV head after {length} tokens", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for name in ("layer", "Uniform", "PrefixKV", ""):
        table.add_column(name, justify="right" if name else "left")
    most = max(map(max, kept))
    for layer, (same, own) in enumerate(zip(*kept, strict=True)):
        bar = Bar(most, 0, own, width=40, color="green" if own > same else "yellow")
        table.add_row(str(layer), str(same), str(own), bar)
    table.add_section()
    table.add_row("sum", *(str(sum(each)) for each in kept))
    return table


if __name__ == "__main__":
    main()
