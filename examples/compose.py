"""Two methods in one compiled program, and other choices for some layers."""

from __future__ import annotations

import kvfx
from kvfx import models
from kvfx.testing.text import pass_key_prompt

LENGTH = 600


def main() -> None:
    """Print the report of a composed policy, one layer of its graph, and what a model remembers."""
    model, tokenizer = models.load("smollm2")
    # which tokens keep an entry, and how an entry is held: two roles, one policy
    streaming = kvfx.StreamingLLM(budget=0.5) | kvfx.KIVI(k_bits=8, v_bits=4)
    # the first two layers and the last one keep every token, in 8 bits
    careful = kvfx.KIVI(bits=8)
    policy = kvfx.PerLayer(default=streaming, layers={0: careful, 1: careful, -1: careful})
    print(f"{policy!r}\n")
    fast = kvfx.compress(model, policy, compile=False)
    print(f"{fast.report}\n")

    print("what the decode program does at layer 2, buffers left out:")
    for line in fast.graph("decode").text.splitlines():
        if "kvfx." in line and "layers.2.self_attn" in line:
            operation = line.partition("kvfx.")[2].partition("(")[0]
            print(f"  {operation}")

    for depth in (0.1, 0.9):
        prompt = pass_key_prompt(tokenizer, LENGTH, depth, key="71432")
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = fast.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
        print(f"the pass key 71432 at {depth:.0%} of the prompt, remembered as: {answer!r}")


if __name__ == "__main__":
    main()
