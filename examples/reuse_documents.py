"""Documents that were read once stand in other prompts, in another order."""

from __future__ import annotations

import kvfx
from kvfx import models
from kvfx.reuse import Pool
from kvfx.testing.text import passages

DOCUMENTS, LETTERS = 3, 2000
QUESTION = "\n\nQuestion: What is the text above about?\nAnswer: It is about"


def main() -> None:
    """Read documents once, then ask about them in other orders; print what was computed, and how
    far the next token is from the dense model's.
    """
    model, tokenizer = models.load("smollm2")
    fast = kvfx.compress(model, "full", compile=False)
    texts = [" ".join(passages())[at * 5000 :][:LETTERS] for at in range(1, DOCUMENTS + 1)]
    # the audit computes every prompt densely as well, and compares
    pool = Pool(fast, kvfx.KVShare(ratio=0.2), tokenizer=tokenizer, verify="always")
    # the second prompt also builds the program that ranks rows
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        pre = pool.prefill([*(texts[place] for place in order), QUESTION])
        found, audit = pre.served, pool.totals.audits[-1]
        print(
            f"documents {order}: {found.tokens} tokens, {found.computed} new, {found.repaired} "
            f"computed again, cache ready after {found.prefill_seconds:.2f} s; KL {audit.kl:.2g}"
        )
        reply = fast.generate(
            pre.input_ids, past_key_values=pre.cache, max_new_tokens=16, do_sample=False
        )
        print(tokenizer.decode(reply[0, pre.input_ids.shape[1] :]).strip(), "\n")
    print(pool.totals)


if __name__ == "__main__":
    main()
