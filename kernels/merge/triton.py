"""Merging on a GPU: similar neighbours, means of runs of rows, and values that are given ahead."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.rows import kept_first
from kvfx.kernels.merge.configs import ahead_config, config
from kvfx.kernels.merge.links import check_linkage, leaders, links, protection
from kvfx.kernels.merge.runs import run_sum, runs
from kvfx.kernels.merge.triton_rows import (
    ahead_kernel,
    distance_kernel,
    mean_kernel,
    similarity_kernel,
)
from kvfx.kernels.merge.weights import ahead_shares, check_sigma, gauss

WIDEST = 512
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def constraint(
    verb: str, *operands: Tensor | None, linkage: str = "chain", **attributes: object
) -> str | None:
    """Why the kernels of `verb` ("sets", "gaussian", "weighted", "ahead") cannot serve these
    operands, or None.
    """
    del attributes
    # keys and values; sets reads keys alone
    for x in operands[: 1 if verb == "sets" else 2]:
        assert x is not None
        if x.dtype not in DTYPES:
            return f"keys and values are fp32, fp16 or bf16, not {x.dtype}"
        if x.shape[3] > WIDEST:
            return f"head_dim {x.shape[3]} is more than {WIDEST}"
    if linkage == "anchor":
        return "linkage 'anchor' goes through the rows one by one: the reference does that"
    first = operands[0]
    assert first is not None
    return launch.unavailable(first.device)


def sets(
    k: Tensor, score: Tensor, live: Tensor, count: Tensor, *, threshold: float | None, sinks: int,
    recent: float, heavy: float, linkage: str,
) -> Tensor:  # fmt: skip
    """KVMerger's sets: runs of rows whose neighbouring keys are similar, led by the row of largest
    score; `threshold` None leaves exactly count [B, K] of them.
    """
    check_linkage(linkage, threshold)
    launch.require("merge_sets", constraint("sets", k, linkage=linkage))
    stage = protection(score, live, sinks, recent, heavy)
    similar = _per_row(similarity_kernel, k)
    return leaders(links(similar, stage, live, count, threshold), score, live)


def gaussian(
    k: Tensor, v: Tensor, target: Tensor, votes: Tensor | None, *, sigma: str, width: float,
    scaled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KVMerger's merge: a target's key and value become means, weighed by exp(votes) and by a
    Gaussian of the distance between keys. Sets are runs of rows.
    """
    check_sigma(sigma)
    launch.require("merge_gaussian", constraint("gaussian", k, v))
    target = target.contiguous()
    first, last = runs(target)
    distance = _per_row(distance_kernel, k, target)
    weight = gauss(distance, lambda x: run_sum(x, first, last), sigma, width)
    count, factor = None, None
    if votes is not None:
        # rows that are dropped may hold anything
        count = torch.where(target >= 0, torch.exp(votes.float()), 1.0).contiguous()
        weight = weight * count
    if scaled:
        tokens = torch.ones_like(weight) if count is None else count
        factor = run_sum(tokens, first, last)
    merged = _means(k, weight, target, first, last, None, None)
    return merged, _means(v, weight, target, first, last, count if scaled else None, factor)


def weighted(k: Tensor, v: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """WeightedKV's merge: a target's value becomes the mean of its rows by weight [B, K, T]; keys
    stay. Sets are runs of rows.
    """
    launch.require("merge_weighted", constraint("weighted", k, v))
    return k.clone(), _means(v, weight.float(), target, *runs(target), None, None)


def ahead(
    k: Tensor, v: Tensor, keep: Tensor, live: Tensor, score: Tensor, position: Tensor | None, *,
    targets: int, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """CaM's merge: evicted values are added, in equal parts, to the next `targets` kept rows, with
    a probability of their score over the targets' mean; keys stay.
    """
    launch.require("merge_ahead", constraint("ahead", k, v))
    order, kept = kept_first(keep)
    share, before = ahead_shares(keep, live, score, position, order, targets=targets, seed=seed)
    out, v = v.clone(), launch.with_adjacent_channels(v)
    if out.stride(3) != 1:
        out = out.contiguous()
    batch, kv_heads, rows, _ = v.shape
    block_j, block_e, warps = ahead_config(launch.machine(v.device).arch)
    if out.numel() > 0:
        launch.run(
            ahead_kernel, (triton.cdiv(rows, block_j), batch * kv_heads), v, out,
            share.contiguous(), before.contiguous(), order.contiguous(), kept.contiguous(),
            *v.stride()[:3], *out.stride()[:3], kv_heads, rows, targets,
            **_widths(v, 16), BLOCK_J=block_j, BLOCK_E=block_e, warps=warps, stages=1,
        )  # fmt: skip
    return k.clone(), out


def _per_row(kernel: object, k: Tensor, *operands: Tensor) -> Tensor:
    """One fp32 number per row of k: [B, K, T]."""
    out = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    if k.numel() == 0:
        return out
    k = launch.with_adjacent_channels(k)
    batch, kv_heads, rows, width = k.shape
    chosen = config(launch.machine(k.device).arch)
    block = chosen.rows(width)
    launch.run(
        kernel, (triton.cdiv(rows, block), batch * kv_heads), k, *operands, out, *k.stride()[:3],
        kv_heads, rows, **_widths(k, 1), BLOCK_T=block, warps=chosen.warps, stages=1,
    )  # fmt: skip
    return out


def _means(
    x: Tensor, weight: Tensor, target: Tensor, first: Tensor, last: Tensor, count: Tensor | None,
    factor: Tensor | None,
) -> Tensor:  # fmt: skip
    """Copies of rows x [B, K, T, D] in which leaders are the weighted means of their runs."""
    x = launch.with_adjacent_channels(x)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, kv_heads, rows, width = x.shape
    chosen = config(launch.machine(x.device).arch)
    block = chosen.rows(width)
    launch.run(
        mean_kernel, (triton.cdiv(rows, block), batch * kv_heads), x, out, weight.contiguous(),
        target.contiguous(), first.contiguous(), last.contiguous(), count, factor,
        *x.stride()[:3], *out.stride()[:3], kv_heads, rows,
        **_widths(x, 1), BLOCK_T=block, warps=chosen.warps, stages=1,
    )  # fmt: skip
    return out


def _widths(x: Tensor, least: int) -> dict[str, int]:
    return {"WIDTH": x.shape[3], "BLOCK_D": max(least, triton.next_power_of_2(x.shape[3]))}
