"""Who takes part in a benchmark: transformers with its own caches, and kvfx under each policy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.bench.clock import Clock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HF_DEFAULT = "HF default"
HF_STATIC = "HF static + compile"


@dataclass(frozen=True)
class Generated:
    """What one call of `generate` gave: new tokens, the logits of each, cache bytes, and when."""

    tokens: list[int]
    logits: Tensor
    cache_bytes: int
    clock: Clock


@dataclass
class Contender:
    """A way to generate greedily. `cold_seconds` is its first prefill and decode, compilation
    included; `refusal` says why it cannot be timed.
    """

    name: str
    generate: Callable[[Tensor, int], Generated]
    compress_seconds: float = 0.0
    cold_seconds: float = 0.0
    refusal: str = ""
    refused: dict[int, str] = field(default_factory=dict)


def hf_default(model: PreTrainedModel) -> Contender:
    """`model.generate` as it comes."""
    return Contender(HF_DEFAULT, lambda ids, tokens: _generate(model, ids, tokens, {}))


def hf_static(model: PreTrainedModel) -> Contender:
    """`model.generate` with a static cache and a compiled forward, also on a CPU."""

    def generate(ids: Tensor, tokens: int) -> Generated:
        from transformers import CompileConfig

        # transformers compiles by itself on GPUs only, unless it is told so
        everywhere = CompileConfig()
        everywhere._compile_all_devices = True  # type: ignore[reportAttributeAccessIssue]
        options = {"cache_implementation": "static", "compile_config": everywhere}
        return _generate(model, ids, tokens, options)

    return Contender(HF_STATIC, generate)


def kvfx_under(model: PreTrainedModel, policy: str, *, compile: bool) -> Contender:
    """`kvfx.compress(model, policy)`, compiled once for all lengths."""
    from kvfx.compiler import compress

    start = time.perf_counter()
    fast = compress(model, policy, compile=compile)
    seconds = time.perf_counter() - start
    return Contender(
        f"kvfx {policy}",
        lambda ids, tokens: _generate(fast, ids, tokens, {}),
        compress_seconds=seconds,
    )


def _generate(model, ids: Tensor, tokens: int, options: dict[str, object]) -> Generated:
    """Exactly `tokens` greedy tokens after the prompt `ids` [1, S]."""
    clock = Clock()
    with torch.no_grad():
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return Generated(
        result.sequences[0, ids.shape[1] :].tolist(),
        torch.stack(result.logits),
        _cache_bytes(result.past_key_values),
        clock,
    )


def _cache_bytes(cache) -> int:
    """Bytes of the tensors that a cache holds, as allocated."""
    from kvfx.model import CompressedCache

    if isinstance(cache, CompressedCache):
        return cache.nbytes()
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
