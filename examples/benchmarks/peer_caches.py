"""The caches of a peer: filled by a prompt, read further, and weighed; imports no kvfx.

A way to hold a cache is a dict: `name`; `cache`, the arguments of transformers' QuantizedCache;
`press`, the name and arguments of a class of kvpress. With neither, it is transformers'
DynamicCache.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

Way = dict[str, Any]


def new_cache(model: Any, way: Way) -> Any:
    """An empty cache."""
    if not way.get("cache"):
        return DynamicCache()
    options = dict(way["cache"])
    return QuantizedCache(options.pop("backend"), model.config, **options)


def new_press(way: Way) -> Any:
    """The press of kvpress, or None."""
    if not way.get("press"):
        return None
    import kvpress  # type: ignore[reportMissingImports]

    options = dict(way["press"])
    return getattr(kvpress, options.pop("name"))(**options)


def fill(model: Any, way: Way, ids: Tensor) -> tuple[Any, Tensor]:
    """The cache after a prompt `ids` [S] as the peer documents it, and logits [1, V] after that."""
    cache, press = new_cache(model, way), new_press(way)
    with contextlib.nullcontext() if press is None else press(model):
        logits = model(ids[None], past_key_values=cache, logits_to_keep=1).logits[0]
    return cache, logits


def fill_all(model: Any, ways: list[Way], ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The caches of all ways after a prompt `ids` [S], and logits [1, V]: one dense pass, since a
    prompt's own attention is exact under all of them.
    """
    caches = {way["name"]: new_cache(model, way) for way in ways}
    pairs = [(caches[way["name"]], new_press(way)) for way in ways]

    def store(module: Any, given: Any, named: dict[str, Any], output: Any) -> None:
        dense = named["past_key_values"].layers[module.layer_idx]
        for cache, press in pairs:
            cache.update(dense.keys, dense.values, module.layer_idx)
            if press is not None:
                press.forward_hook(module, given, {**named, "past_key_values": cache}, output)

    with contextlib.ExitStack() as hooks:
        for _, press in pairs:
            if press is not None:
                press.post_init_from_model(model)
        for layer in model.model.layers:
            # some presses look for it there
            layer.self_attn.rotary_emb = model.model.rotary_emb
            hook = layer.self_attn.register_forward_hook(store, with_kwargs=True)
            hooks.callback(hook.remove)
        logits = model(ids[None], past_key_values=DynamicCache(), logits_to_keep=1).logits[0]
    return caches, logits


def read(model: Any, cache: Any, ids: Tensor, position: int, *, keep: int = 0) -> Tensor:
    """Logits [S, V] of `ids` [S] (of the last `keep`, unless that is 0), read through the cache at
    their positions in the text.
    """
    # after eviction the cache is shorter than the text: positions are given, as kvpress does
    places = torch.arange(position, position + len(ids))[None]
    found = model(ids[None], past_key_values=cache, position_ids=places, logits_to_keep=keep)
    return found.logits[0]


def held(value: object) -> list[Tensor]:
    """The plain tensors in a cache: of its layers, their tuples, and their packed tensors."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in held(part)]
    if isinstance(value, dict):
        return held(list(value.values()))
    if not isinstance(value, Tensor):
        return []
    packed = getattr(value, "__tensor_flatten__", None)
    return [value] if packed is None else held([getattr(value, name) for name in packed()[0]])


def held_by(cache: Any) -> list[Tensor]:
    """The plain tensors of all layers."""
    return [tensor for layer in cache.layers for tensor in held(vars(layer))]


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that the cache holds, as allocated: each storage once."""
    storages = [tensor.untyped_storage() for tensor in held_by(cache)]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.nbytes()}.values())
