"""A compressed model in lm-evaluation-harness: a task of pass keys, drawn without a download."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

import kvfx
from kvfx import models
from kvfx.errors import InputError
from kvfx.eval.tasks import ALL_TASKS
from kvfx.eval.tasks.sample import Draw
from kvfx.testing.text import count

TASK, TOKENS = "passkey", 200
DEPTHS = (0.1, 0.4, 0.6, 0.9)
# every token in fewer bits, or half of the tokens
POLICIES = (kvfx.KIVI(k_bits=8, v_bits=4, residual=32), kvfx.StreamingLLM(budget=0.5, interval=16))


def main() -> None:
    """Print how often the dense model and two compressed ones give a pass key back, as
    lm-evaluation-harness scores it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed: pip install lm-eval accelerate")
    # nothing is asked of the hub, and hints of the harness about its command line are left out
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = models.load("smollm2")
    rows = list(documents(tokenizer))
    table = Table("policy", "cache, of dense", "exact match", title=f"{len(rows)} x {TASK}")
    table.add_row("none", "100.0%", f"{exact_match(model, tokenizer, rows):.0%}")
    for policy in POLICIES:
        fast = kvfx.compress(model, policy, compile=False)
        share = fast.memory(batch=1, length=TOKENS) / (fast.report.before * TOKENS)
        score = exact_match(fast, tokenizer, rows)
        table.add_row(repr(policy), f"{share:.1%}", f"{score:.0%}")
    Console().print(table)


def documents(tokenizer: Any) -> Iterator[dict[str, str]]:
    """One document per depth: the prompt, and the key that stands there."""
    for seed, depth in enumerate(DEPTHS):
        draw = Draw(TOKENS, depth, Random(seed), (), lambda text: count(tokenizer, text))
        sample = ALL_TASKS[TASK].make(draw)
        yield {"prompt": sample.context + sample.question, "key": sample.answer.strip()}


def exact_match(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """The share of documents whose first generated number is the key."""
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    task = {
        "task": TASK,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "key",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(\d+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    # the harness pads batches on the left, as kvfx wants it
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=len(rows))
    found = simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0, log_samples=False)
    return found["results"][TASK]["exact_match,number"]


if __name__ == "__main__":
    main()
