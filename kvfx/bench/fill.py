"""Contenders whose caches are filled with a synthetic context before they generate."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfx.bench.contenders import (
    HF_DEFAULT,
    HF_STATIC,
    Contender,
    Generated,
    compiled_everywhere,
    compressed,
    generated,
)
from kvfx.ops import overload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfx.runtime import State

# rows that go through the model at once: bounds what a prompt needs besides its cache
CHUNK = 16384
LEAST_CHUNK = 64
QUANTIZED_BITS = 4
# package that quantizes -> what transformers calls it
QUANTIZERS = {"optimum.quanto": "quanto", "hqq": "hqq"}

# fills a cache of a model with the context `ids` [B, S]
Fill = Callable[[Any, Any, Tensor], None]


def by_prefill(model: Any, cache: Any, ids: Tensor) -> None:
    """Let the model read the context, in chunks."""
    size = max(LEAST_CHUNK, CHUNK // ids.shape[0])
    for chunk in ids.split(size, 1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)


def at_random(model: Any, cache: Any, ids: Tensor) -> None:
    """Write random entries: every contender gets the same ones, and nothing is computed."""
    from kvfx.model import CompressedCache

    if isinstance(cache, CompressedCache):
        _fill_state(cache.allocated(ids.shape[0]), ids)
        return
    config = model.config
    # some configurations leave the width of a head to be computed
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    (batch, tokens), kv_heads = ids.shape, config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        k, v = (
            torch.empty(batch, kv_heads, tokens, width, dtype=model.dtype, device=ids.device)
            for _ in range(2)
        )
        for row in range(batch):
            new = _entries(layer, row, tokens, kv_heads, width, model.dtype, ids.device)
            k[row], v[row] = new[0][0], new[1][0]
        cache.update(k, v, layer)


FILLS: dict[str, Fill] = {"prefill": by_prefill, "random": at_random}


def filled_contenders(
    model: PreTrainedModel, policies: list[str], fill: Fill, most: int, *, compile: bool
) -> list[Callable[[], Contender]]:
    """Makers of HF's default, kvfx under each policy, HF's quantized cache, and HF's static cache
    where something is compiled. `most` is the largest number of tokens that any call generates.
    """
    makers: list[Callable[[], Contender]] = [lambda: _default(model, fill)]
    for policy in policies:
        makers.append(lambda policy=policy: _kvfx(model, policy, fill, most, compile=compile))
    makers.append(lambda: _quantized(model, fill))
    if compile:
        makers.append(lambda: _static(model, fill, most))
    return makers


def _default(model: PreTrainedModel, fill: Fill) -> Contender:
    from transformers import DynamicCache

    def new_cache(ids: Tensor) -> object:
        del ids
        return DynamicCache(config=model.config)

    return Contender(HF_DEFAULT, _generator(model, new_cache, fill, {}))


def _kvfx(
    model: PreTrainedModel, policy: str, fill: Fill, most: int, *, compile: bool
) -> Contender:
    fast, seconds = compressed(model, policy, compile=compile)
    generate = _generator(fast, lambda ids: fast.new_cache(ids.shape[1] + most - 1), fill, {})
    return Contender(f"kvfx {policy}", generate, compress_seconds=seconds)


def _quantized(model: PreTrainedModel, fill: Fill) -> Contender:
    """HF's QuantizedCache, by the first package that is there."""
    from transformers import QuantizedCache

    found = [name for package, name in QUANTIZERS.items() if _installed(package)]

    def new_cache(ids: Tensor) -> object:
        del ids
        return QuantizedCache(found[0], model.config, nbits=QUANTIZED_BITS)

    name = f"HF quantized {QUANTIZED_BITS} bit"
    generate = _generator(model, new_cache, fill, {})
    if not found:
        missing = "neither optimum-quanto nor hqq is installed"
        return Contender(name, generate, refusal=missing)
    return Contender(f"{name} ({found[0]})", generate)


def _static(model: PreTrainedModel, fill: Fill, most: int) -> Contender:
    from transformers import StaticCache

    kept: dict[tuple[int, ...], Any] = {}

    def new_cache(ids: Tensor) -> object:
        # the compiled code is bound to the addresses of a static cache: keep it
        if tuple(ids.shape) not in kept:
            kept.clear()
            kept[tuple(ids.shape)] = StaticCache(
                config=model.config, max_cache_len=ids.shape[1] + most
            )
        cache = kept[tuple(ids.shape)]
        if cache.is_initialized:
            cache.reset()
        return cache

    generate = _generator(model, new_cache, fill, compiled_everywhere())
    return Contender(HF_STATIC, generate, release=kept.clear)


def _generator(
    model: Any, new_cache: Callable[[Tensor], Any], fill: Fill, options: dict[str, object]
) -> Callable[[Tensor, int], Generated]:
    """Fill a cache with all of `ids` but the last token, then generate from that one on."""

    def generate(ids: Tensor, tokens: int) -> Generated:
        if ids.is_cuda:
            torch.cuda.reset_peak_memory_stats(ids.device)
        start = time.perf_counter()
        with torch.no_grad():
            cache = new_cache(ids)
            fill(model, cache, ids[:, :-1])
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        seconds = time.perf_counter() - start
        found = generated(model, ids, tokens, {"past_key_values": cache, **options})
        peak = torch.cuda.max_memory_allocated(ids.device) if ids.is_cuda else None
        return replace(found, fill_seconds=seconds, peak_bytes=peak)

    return generate


def _fill_state(state: State, ids: Tensor) -> None:
    """Let the buffers hold random entries, as many as the policy keeps of a prompt."""
    batch, tokens = ids.shape
    state.admit(tokens, [tokens] * batch, [tokens] * batch)
    for plan, buffers in zip(state.plan.sites, state.buffers, strict=True):
        site, store = plan.site, plan.store
        kept = plan.schedule.kept(tokens, tokens)
        keep = torch.ones(1, site.kv_heads, kept, dtype=torch.bool, device=ids.device)
        positions = torch.arange(kept, device=ids.device)[None]
        write = overload(f"store_{store.room}", "reference")
        for row in range(batch):
            # one row at a time: the reference needs room for what it computes
            sizes = (kept, site.kv_heads, site.head_dim)
            k, v = _entries(site.index, row, *sizes, site.dtype, ids.device)
            where = keep if store.rows == "keep" else positions
            of_row = [buffer[row : row + 1] for buffer in buffers.values()]
            write(k, v, where, *of_row, **store.attributes(site))
    state.next_position += tokens
    if state.plan.masked:
        state.history = ids


def _entries(
    layer: int,
    row: int,
    tokens: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Keys and values [1, K, S, D] of one layer and row: always the same."""
    generator = torch.Generator(device).manual_seed(1000 * layer + row)
    k, v = (
        torch.randn(1, tokens, kv_heads, width, generator=generator, dtype=dtype, device=device)
        for _ in range(2)
    )
    # tokens come first: fewer of them are the first ones of more
    return k.transpose(1, 2), v.transpose(1, 2)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        # the parent of a dotted name is missing
        return False
