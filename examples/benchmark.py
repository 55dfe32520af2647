"""Speed and quality of two policies beside transformers, in one table: a benchmark in small."""

from __future__ import annotations

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kvfx
from kvfx import models
from kvfx.bench.contenders import HF_DEFAULT, Contender, generated, hf_default
from kvfx.bench.decode import bench_length, text_ids, why_wrong
from kvfx.eval.fidelity import Fidelity, dense_log_probs, score_window
from kvfx.eval.text import corpus, windows
from kvfx.model import CompressedModel

POLICIES = ("k8v4", "snapkv-25%")
CONTEXT, NEW, ROUNDS = 256, 8, 2
WINDOWS, SCORED, CHUNK = 2, 64, 32


def main() -> None:
    """Print milliseconds per token, bytes, and the distance to the dense model's predictions.

    Nothing is compiled, so that this takes a minute: `kvfx bench decode` compiles, and is what to
    believe about speed; `kvfx eval` reads more and longer text, with intervals.
    """
    model, tokenizer = models.load("smollm2")
    fasts = {
        policy: kvfx.compress(model, policy, compile=False, verify=False) for policy in POLICIES
    }
    ids = text_ids(tokenizer, CONTEXT)
    contenders = [hf_default(model), *(contender(*each) for each in fasts.items())]
    # each is checked against transformers first; then all of them are timed in turns
    rows = bench_length(contenders, ids, NEW, ROUNDS, why_wrong, lambda step: None)
    text = windows(corpus("python"), tokenizer, tokens=CONTEXT + SCORED + 1, count=WINDOWS, seed=0)
    truths = [dense_log_probs(model, window, SCORED) for window in text]
    scores = {name: quality(fast, text, truths) for name, fast in fasts.items()}

    table = Table(
        title=f"SmolLM2-135M after {CONTEXT} tokens, eager, threads: {torch.get_num_threads()}",
        box=box.SIMPLE_HEAD,
    )
    for name in ("", "ms/token", "p25-p75", "MiB", "perplexity", "KL, nats", "flips"):
        table.add_column(name, justify="right" if name else "left")
    dense = next(iter(scores.values())).dense_perplexity
    for row in rows:
        if row.median_ms is None or row.cache_bytes is None:
            table.add_row(row.contender, row.refusal)
            continue
        read = [f"{dense:.2f}", "-", "-"]
        if row.contender != HF_DEFAULT:
            score = scores[row.contender]
            read = [f"{score.perplexity:.2f}", f"{score.kl:.2g}", f"{score.flips:.1%}"]
        speed = (f"{row.median_ms:.0f}", f"{row.p25_ms:.0f}-{row.p75_ms:.0f}")
        table.add_row(row.contender, *speed, f"{row.cache_bytes / 2**20:.1f}", *read)
    Console().print(table)


def contender(name: str, fast: CompressedModel) -> Contender:
    """A compressed model that takes part."""
    return Contender(name, lambda ids, tokens: generated(fast, ids, tokens, {}))


def quality(fast: CompressedModel, text: Tensor, truths: list[Tensor]) -> Fidelity:
    """What `fast` predicts of the end of each window [W, S], read through its cache."""
    found = [
        score_window(fast, window, truth, chunk=CHUNK)
        for window, truth in zip(text, truths, strict=True)
    ]
    return Fidelity(tuple(score for score, _ in found), max(size for _, size in found))


if __name__ == "__main__":
    main()
