"""Perplexity through the cache, and how far each prediction is from the dense model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfx.model import CompressedModel


@dataclass(frozen=True)
class WindowScore:
    """Means over the scored tokens of one window: negative log-likelihoods and KL(dense || policy)
    in nats, and the fraction of tokens whose most probable successor is another one.
    """

    tokens: int
    dense_nll: float
    nll: float
    kl: float
    flips: float


@dataclass(frozen=True)
class Fidelity:
    """The scores of all windows; `cache_bytes`: the most that was allocated after any read."""

    windows: tuple[WindowScore, ...]
    cache_bytes: int

    @property
    def perplexity(self) -> float:
        """Perplexity of the text, read through the cache."""
        return math.exp(_mean([window.nll for window in self.windows]))

    @property
    def dense_perplexity(self) -> float:
        """Perplexity of the same tokens under the dense model."""
        return math.exp(_mean([window.dense_nll for window in self.windows]))

    @property
    def kl(self) -> float:
        """Mean KL(dense || policy) per token, in nats."""
        return _mean([window.kl for window in self.windows])

    @property
    def flips(self) -> float:
        """The fraction of tokens whose most probable successor is not the dense model's."""
        return _mean([window.flips for window in self.windows])

    @property
    def log_ratios(self) -> list[float]:
        """Per window, the logarithm of its perplexity over the dense one."""
        return [window.nll - window.dense_nll for window in self.windows]


@torch.no_grad()
def dense_log_probs(model: PreTrainedModel, ids: Tensor, scored: int) -> Tensor:
    """Log-probabilities [scored, V] of the last `scored` tokens of `ids` [S], from one forward pass
    of the model itself.
    """
    # one row more: the last one predicts what is beyond the window
    logits = model(ids[None], use_cache=False, logits_to_keep=scored + 1).logits
    # fp64: the sum over a vocabulary in fp32 is off by as much as 8 bits cost
    return logits[0, :-1].double().log_softmax(-1)


def score_window(
    fast: CompressedModel, ids: Tensor, dense: Tensor, *, chunk: int
) -> tuple[WindowScore, int]:
    """Prefill all of `ids` [S] but the scored tokens, then read those `chunk` by `chunk` through
    the cache; `dense` [scored, V] is what the dense model predicts for them. Also the most bytes
    that were allocated after any of these reads.

    The first scored token is predicted by the row before it. That row is read through the cache as
    well, not with the prompt, whose own attention is exact: no prediction is free.
    """
    scored = len(dense)
    context, rows, targets = ids[: -scored - 1], ids[-scored - 1 : -1], ids[-scored:]
    cache = fast.new_cache(len(ids) - 1)
    fast(context[None], past_key_values=cache, logits_to_keep=1)
    parts, most = [], cache.nbytes()
    for new, expected, target in zip(
        rows.split(chunk), dense.split(chunk), targets.split(chunk), strict=True
    ):
        logits = fast(new[None], past_key_values=cache).logits[0]
        parts.append(_compare(logits, expected, target))
        most = max(most, cache.nbytes())
    dense_nll, nll, kl, flips = torch.cat(parts, 1).mean(1).tolist()
    return WindowScore(scored, dense_nll, nll, kl, flips), most


def _compare(logits: Tensor, dense: Tensor, targets: Tensor) -> Tensor:
    """Per row of `logits` and log-probabilities `dense` [S, V]: both negative log-likelihoods of
    the target, the divergence, and whether the best token differs [4, S].
    """
    found = logits.double().log_softmax(-1)
    kl = (dense.exp() * (dense - found)).sum(-1)
    flips = (dense.argmax(-1) != found.argmax(-1)).double()
    index = targets[:, None]
    return torch.stack((-dense.gather(1, index)[:, 0], -found.gather(1, index)[:, 0], kl, flips))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
