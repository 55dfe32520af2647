"""Scores as numbers with their 95 % intervals, for tables and pictures."""

from __future__ import annotations

import math

from kvfx.eval.answers import Retrieval
from kvfx.eval.results import Measurement
from kvfx.eval.stats import bootstrap_mean, wilson

# nats per token; perplexity over the dense one; the share of samples that were answered
KL, RATIO, RATE = "kl", "ratio", "rate"


def estimate(measure: str, found: Measurement) -> tuple[float, tuple[float, float] | None]:
    """The value of a measure and its interval; None for one window."""
    scores, seed = found.scores, found.setting.seed
    if isinstance(scores, Retrieval):
        if "score" in found.setting.options:
            return scores.rate, bootstrap_mean(scores.hits, seed)
        return scores.rate, wilson(sum(scores.answered), len(scores.hits))
    if measure == KL:
        return scores.kl, bootstrap_mean([window.kl for window in scores.windows], seed)
    edges = bootstrap_mean(scores.log_ratios, seed)
    ratio = scores.perplexity / scores.dense_perplexity
    return ratio, None if edges is None else (math.exp(edges[0]), math.exp(edges[1]))
