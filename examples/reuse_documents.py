"""Documents that were read once stand in other prompts, in another order."""

from __future__ import annotations

import kvfx
from kvfx import models
from kvfx.reuse import Pool
from kvfx.testing.text import passages

DOCUMENTS, LETTERS = 3, 1000
QUESTION = "\n\nQuestion: What is the text above about?\nAnswer: It is about"
POLICIES = (kvfx.ExactPrefix(), kvfx.KVShare(ratio=0.2))


def main() -> None:
    """Read documents once, then ask about them in other orders; print what was computed by a pool
    that is exact and by one that is not, and how far the second is from the dense model.
    """
    model, tokenizer = models.load("smollm2")
    fast = kvfx.compress(model, "full", compile=False)
    texts = [" ".join(passages())[at * 5000 :][:LETTERS] for at in range(1, DOCUMENTS + 1)]
    # the audit computes every prompt densely as well, and compares; exact rows need none
    pools = [
        Pool(fast, policy, tokenizer=tokenizer, verify="always" if policy.approximate else "off")
        for policy in POLICIES
    ]
    # the second prompt also builds the program that ranks rows
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):
        print(f"documents {order}")
        for pool in pools:
            pre = pool.prefill([*(texts[place] for place in order), QUESTION])
            found, audits = pre.served, pool.totals.audits
            print(
                f"  {type(pool.policy).__name__}: {found.tokens} tokens, {found.computed} new, "
                f"{found.repaired} computed again, cache ready after {found.prefill_seconds:.2f} s"
                + (f", KL {audits[-1].kl:.2g}" if audits else "")
            )
            reply = fast.generate(
                pre.input_ids, past_key_values=pre.cache, max_new_tokens=16, do_sample=False
            )
            said = str(tokenizer.decode(reply[0, pre.input_ids.shape[1] :]))
            print(f"    {' '.join(said.split())}")
    for pool in pools:
        print(f"{type(pool.policy).__name__}: {pool.totals}")


if __name__ == "__main__":
    main()
