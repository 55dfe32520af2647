"""How alike keys are, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.merge.links import beside


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of rows [..., D] in fp32, never beyond 1; 0 where a row is 0."""
    a, b = a.float(), b.float()
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    product = (a * b).sum(-1) / norms.clamp(min=torch.finfo(torch.float32).tiny)
    return product.clamp(-1.0, 1.0)


def anchored(k: Tensor, free: Tensor, threshold: float) -> Tensor:
    """The links of free rows [B, K, T] to sets whose first key has a larger cosine with theirs."""
    link, allowed, first = torch.zeros_like(free), beside(free), k[:, :, 0]
    for row in range(1, k.shape[2]):
        joins = allowed[..., row - 1] & (cosine(first, k[:, :, row]) > threshold)
        link[..., row - 1] = joins
        first = torch.where(joins[..., None], first, k[:, :, row])
    return link


def most_similar(rows: Tensor, unit: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of each of `rows` [B, K, R, D] with a kept one of `unit` [B, K, T, D], and
    which that is; -inf where none is kept.
    """
    product = torch.einsum("bkrd,bktd->bkrt", rows, unit).clamp(-1.0, 1.0)
    values, index = product.masked_fill(~keep[:, :, None], float("-inf")).max(-1)
    return values, index
