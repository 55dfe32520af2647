"""Memory that nobody has written, made visible: NaN in floats, the largest value in integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

EMPTY = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.empty_permuted,
    Tensor.new_empty,
    Tensor.new_empty_strided,
}


def poison(tensor: Tensor) -> Tensor:
    """Fill `tensor` in place with what no computation may read, and return it."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def poison_beyond(cache: Tensor, length: Tensor) -> Tensor:
    """Poison the entries of cache [B, K, C, ...] that are not live, in place: length is [B, K]."""
    dead = torch.arange(cache.shape[2], device=cache.device) >= length.to(cache.device)[..., None]
    cache[dead] = poison(cache.new_zeros(()))
    return cache


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within, eager `torch.empty` and its relatives give poison (compiled code is not reached)."""
    with _Poison():
        yield


class _Poison(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if func not in EMPTY or not isinstance(out, Tensor) or out.is_meta:
            return out
        return poison(out)
