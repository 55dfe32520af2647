"""A chat of many turns on one cache that stops growing: StreamingLLM with a fixed budget."""

from __future__ import annotations

import torch

import kvfx
from kvfx import models

BUDGET = 96
INTERVAL = 32
TURNS = (
    "Which planet is the largest?",
    "And which one is the smallest?",
    "What is the capital of France?",
    "Name a river there.",
    "What is two plus three?",
    "Which color has the sky?",
)


def main() -> None:
    """Print every turn with the tokens read so far, the entries held, and the cache's bytes."""
    model, tokenizer = models.load("smollm2")
    # the first 4 tokens and the newest 92; up to 32 more before the next eviction
    policy = kvfx.StreamingLLM(sinks=4, budget=BUDGET, interval=INTERVAL)
    # eager, for a quick start: a real chat is faster with compile=True
    fast = kvfx.compress(model, policy, compile=False)
    cache = fast.new_cache()
    said = torch.empty(1, 0, dtype=torch.int64)
    for turn in TURNS:
        text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        new = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        # generate wants all tokens since the start, and reads those that the cache has not seen
        ids = torch.cat((said, new), 1)
        said = fast.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=24,
            do_sample=False,
        )
        reply = str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        entries = int(cache.allocated(batch=1).buffers[0]["length"].max())
        dense = fast.report.before * cache.get_seq_length()
        print(f"> {turn}\n{reply}")
        print(
            f"  [{cache.get_seq_length()} tokens read, {entries} entries held, cache "
            f"{cache.nbytes() / 2**20:.1f} MiB, a dense one has {dense / 2**20:.1f} MiB]\n"
        )


if __name__ == "__main__":
    main()
