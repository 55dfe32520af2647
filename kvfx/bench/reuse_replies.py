"""What follows a prompt: the dense model's reply, how far another cache is from it, and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.bench.clock import GREEDY
from kvfx.bench.reuse_contenders import Filled
from kvfx.bench.reuse_workloads import Tokens
from kvfx.reuse.layout import Layout

if TYPE_CHECKING:
    from kvfx.model import CompressedModel


@dataclass(frozen=True, eq=False)
class Expected:
    """The greedy continuation of a prompt that was computed densely: its tokens [scored], and the
    log-probabilities [scored, V] fp64 that it was taken from.
    """

    tokens: tuple[int, ...]
    log_probs: Tensor


@torch.no_grad()
def continued(fast: CompressedModel, tokens: Sequence[int], scored: int) -> Expected:
    """The next `scored` tokens after a prompt that is computed densely."""
    cache = fast.new_cache()
    ids = torch.tensor([tokens], device=fast.device)
    found, rows = [], []
    for _ in range(scored):
        logits = fast(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        rows.append(logits.double().log_softmax(-1))
        found.append(int(logits.argmax()))
        ids = ids.new_tensor([found[-1:]])
    return Expected(tuple(found), torch.stack(rows))


@torch.no_grad()
def compared(fast: CompressedModel, filled: Filled, expected: Expected) -> tuple[float, float]:
    """Mean KL(dense || found) in nats, and the part of the tokens whose most probable successor is
    the same, while the cache of `filled` reads the dense tokens.
    """
    rows = [filled.logits]
    for token in expected.tokens[:-1]:
        ids = torch.tensor([[token]], device=fast.device)
        rows.append(fast(ids, past_key_values=filled.cache).logits[0, -1])
    p, q = expected.log_probs, torch.stack(rows).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean())


def answered(fast: CompressedModel, filled: Filled, layout: Layout, count: int) -> Tokens:
    """Exactly `count` greedy tokens, from the cache of the prompt."""
    ids = torch.tensor([layout.tokens], device=fast.device)
    length = ids.shape[1]
    # generate reads the last token of the prompt itself
    filled.cache.crop(length - 1)
    options = {**GREEDY, "min_new_tokens": count, "max_new_tokens": count}
    out = fast.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=filled.cache, **options
    )
    return tuple(out[0, length:].tolist())
