"""Compress a real model, let it answer, and look at what was done."""

from __future__ import annotations

import kvfx
from kvfx import models

PROMPT = "Name three things that live in the sea."


def main() -> None:
    """Print an answer from a compressed cache, the report, and what the cache weighs."""
    # any decoder of AutoModelForCausalLM will do; this one comes with `make demo`
    model, tokenizer = models.load("smollm2")
    # 8 bit keys and 4 bit values, the newest 128 tokens exact
    fast = kvfx.compress(model, "k8v4")

    messages = [{"role": "user", "content": PROMPT}]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    # the first tokens take longer: torch.compile works when a program runs for the first time
    tokens = fast.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    print(f"\n{fast.report}\n")
    for length in (128, 1024, 8192):
        dense = fast.report.before * length
        bytes_now = fast.memory(batch=1, length=length)
        print(f"{length:>5} tokens: {bytes_now / dense:6.1%} of a dense cache")


if __name__ == "__main__":
    main()
