"""Who takes part in a benchmark: transformers with its own caches, and kvfx under each policy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfx.bench.clock import GREEDY, Clock, generate_clocked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfx.model import CompressedModel

HF_DEFAULT = "HF default"
HF_STATIC = "HF static + compile"
KVFX_EXACT = "kvfx full"
# where the layers of transformers' caches keep entries; the last two only in quantized ones
ENTRIES = ("keys", "values", "_quantized_keys", "_quantized_values")


@dataclass(frozen=True)
class Generated:
    """What one call of `generate` gave: new tokens and logits of the first row, cache bytes, and
    when. `fill_seconds` went into filling the cache before.
    """

    tokens: list[int]
    logits: Tensor
    cache_bytes: int
    clock: Clock
    fill_seconds: float = 0.0
    peak_bytes: int | None = None


@dataclass
class Contender:
    """A way to generate greedily. `cold_seconds` is its first prefill and decode, compilation
    included; `refusal` says why it cannot be timed. `release` gives back memory that it keeps
    between two calls; `checked` is what it gave at each length in the first round.
    """

    name: str
    generate: Callable[[Tensor, int], Generated]
    compress_seconds: float = 0.0
    cold_seconds: float = 0.0
    refusal: str = ""
    refused: dict[int, str] = field(default_factory=dict)
    checked: dict[int, Generated] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None

    @property
    def exact(self) -> bool:
        """Whether it has to give what HF's default gives."""
        return self.name in (HF_DEFAULT, HF_STATIC, KVFX_EXACT)


def hf_default(model: PreTrainedModel) -> Contender:
    """`model.generate` as it comes."""
    return Contender(HF_DEFAULT, lambda ids, tokens: generated(model, ids, tokens, {}))


def hf_static(model: PreTrainedModel) -> Contender:
    """`model.generate` with a static cache and a compiled forward, also on a CPU."""

    def generate(ids: Tensor, tokens: int) -> Generated:
        options = {"cache_implementation": "static", **compiled_everywhere()}
        return generated(model, ids, tokens, options)

    return Contender(HF_STATIC, generate)


def kvfx_under(model: PreTrainedModel, policy: str, *, compile: bool) -> Contender:
    """`kvfx.compress(model, policy)`, compiled once for all lengths; a cache is for as many tokens
    as it will hold, like the static one of transformers.
    """
    fast, seconds = compressed(model, policy, compile=compile)

    def generate(ids: Tensor, tokens: int) -> Generated:
        # the last token is not read
        cache = fast.new_cache(ids.shape[1] + tokens - 1)
        return generated(fast, ids, tokens, {"past_key_values": cache})

    return Contender(f"kvfx {policy}", generate, compress_seconds=seconds)


def compressed(
    model: PreTrainedModel, policy: str, *, compile: bool
) -> tuple[CompressedModel, float]:
    """`kvfx.compress(model, policy)`, and the seconds it took."""
    from kvfx.compiler import compress

    start = time.perf_counter()
    fast = compress(model, policy, compile=compile)
    return fast, time.perf_counter() - start


def compiled_everywhere() -> dict[str, object]:
    """The option of `generate` that compiles the forward pass, on every device."""
    from transformers import CompileConfig

    # transformers compiles by itself on GPUs only, unless it is told so
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True  # type: ignore[reportAttributeAccessIssue]
    return {"compile_config": everywhere}


def generated(model, ids: Tensor, tokens: int, options: dict[str, object]) -> Generated:
    """Exactly `tokens` greedy tokens after the prompt `ids` [B, S].

    Logits are kept where there is one row: those of a large batch would be large themselves.
    """
    single = ids.shape[0] == 1
    shown = {"return_dict_in_generate": True, "output_logits": single, "min_new_tokens": tokens}
    result, clock = generate_clocked(model, ids, tokens, {**GREEDY, **shown, **options}, None)
    return Generated(
        result.sequences[0, ids.shape[1] :].tolist(),
        torch.stack(result.logits) if single else ids.new_empty(0),
        cache_bytes(result.past_key_values),
        clock,
    )


def cache_bytes(cache) -> int:
    """Bytes of the tensors that a cache holds, as allocated."""
    from kvfx.model import CompressedCache

    if isinstance(cache, CompressedCache):
        return cache.nbytes()
    values = (getattr(layer, name, None) for layer in cache.layers for name in ENTRIES)
    tensors = [tensor for value in values for tensor in _in(value)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _in(value: object) -> list[Tensor]:
    """The plain tensors in what a layer holds: itself, a tuple, or a quantized tensor's parts."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _in(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _in(part)]
    if not isinstance(value, Tensor):
        return []
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None:
        return [value]
    return [tensor for name in flatten()[0] for tensor in _in(getattr(value, name))]
