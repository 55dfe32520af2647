"""What fits into a memory, which policy suits it, and whether the plan was right."""

from __future__ import annotations

import kvfx
from kvfx import models
from kvfx.report import short_policy
from kvfx.testing.text import prompts

MEMORY, CONTEXT = "10MiB", 1024
# some of those that are tried where nothing is named
CANDIDATES = (kvfx.SnapKV(), kvfx.KIVI(bits=2), kvfx.SnapKV() | kvfx.KIVI(bits=4))


def main() -> None:
    """Print three plans and a recommendation for one memory, then what a cache really takes."""
    model, tokenizer = models.load("smollm2")
    texts = prompts(tokenizer)[-2:]
    policy = kvfx.H2O(0.2)
    print(f"{MEMORY} of cache, and what is left open: context, batch, or budget")
    print(kvfx.plan(model, policy, memory=MEMORY).headline())
    print(kvfx.plan(model, policy, memory=MEMORY, context=256).headline())
    print(kvfx.plan(model, policy, memory=MEMORY, context=CONTEXT, batch=1).headline())

    print("\nwhich policy, each with the largest budget that fits")
    # two prompts, to be quick; without `prompts`, four built-in ones of 1,024 tokens are read
    best = kvfx.recommend(
        model,
        memory=MEMORY,
        context=CONTEXT,
        candidates=CANDIDATES,
        prompts=texts,
        tokenizer=tokenizer,
        tokens=256,
    )
    print(best)

    # kvfx.compress(model, memory=MEMORY, context=CONTEXT) does both in one call
    fast = kvfx.compress(model, plan=best.plan, compile=False, verify=False)
    ids = tokenizer(texts[-1], return_tensors="pt")["input_ids"][:, :CONTEXT]
    cache = fast.new_cache()
    fast(ids, past_key_values=cache, logits_to_keep=1)
    print(f"\na prompt of {ids.shape[1]:,} tokens under {short_policy(best.candidates[0].policy)}")
    print(f"planned   {fast.memory(1, CONTEXT):>12,} bytes")
    print(f"allocated {cache.nbytes():>12,} bytes")
    print(f"allowed   {best.memory:>12,} bytes")
    print(f"dense     {round(CONTEXT * fast.report.before):>12,} bytes")


if __name__ == "__main__":
    main()
