"""How far a text's keys and values move in a context, and how near two texts are: what KVCOMM's
anchors hold and how they are weighed.

Tensors of a text are [L, K, T, D]: layers of the model from the first on, KV heads, tokens,
channels. Arithmetic is in fp32, or in fp64 for fp64 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvfx.errors import InputError

# relative distances beyond this one are all the same
FAR = 1e6


@dataclass(frozen=True, eq=False)
class Base:
    """The text of a placeholder, computed without the prompt around it: canonical keys [L, K, T, D]
    and values [L, K, T, Dv] of one dtype.

    `content` is a hash of its tokens. `kind` says behind what it was computed (the provenance of a
    segment): offsets from bases of two kinds cannot be compared. Raises InputError for shapes that
    do not fit, for no tokens, and for fewer than two layers: the first has no offsets.
    """

    content: str
    keys: Tensor
    values: Tensor
    kind: str

    def __post_init__(self) -> None:
        _check_pair(self.keys, self.values, f"base {self.content}")
        layers, _, tokens, _ = self.keys.shape
        if layers < 2 or tokens < 1:
            raise InputError(
                f"base {self.content} has {layers} layers and {tokens} tokens: offsets need 2 "
                "layers and 1 token or more"
            )

    @property
    def tokens(self) -> int:
        """How many tokens the text has."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def is_finite(self) -> bool:
        """Whether no number of it is infinite or NaN."""
        return _is_finite(self.keys, self.values)


@dataclass(frozen=True, eq=False)
class Offsets:
    """What a context adds to canonical keys [L, K, T, D] and to values [L, K, T, Dv]; nothing in
    the first layer, whose keys and values depend on the token alone.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        _check_pair(self.keys, self.values, "offsets")

    @classmethod
    def between(cls, real: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> Offsets:
        """The offsets from canonical (keys, values) computed alone to those in a context, stored in
        their dtype. Raises InputError where shapes differ.
        """
        for k, other in zip(real, base, strict=True):
            if k.shape != other.shape:
                raise InputError(f"offsets between {list(k.shape)} and {list(other.shape)}")
        k, v = (
            _without_first(widened(x) - widened(y)).to(x.dtype)
            for x, y in zip(real, base, strict=True)
        )
        return cls(k, v)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def is_finite(self) -> bool:
        """Whether no number of it is infinite or NaN."""
        return _is_finite(self.keys, self.values)

    def added_to(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Canonical keys and values in the context, in the dtype that they had."""
        return (
            (widened(keys) + self.keys).to(keys.dtype),
            (widened(values) + self.values).to(values.dtype),
        )


class Metric(Protocol):
    """Distances from x [L, K, T, D] to y [L, K, Ta, D], Ta >= T, and the temperature at which
    anchors are weighed by them.
    """

    @property
    def temperature(self) -> float:
        """What distances are divided by before the softmax."""
        ...

    def whole(self, x: Tensor, y: Tensor) -> Tensor:
        """One number [], from the first T tokens of y."""
        ...

    def of_tokens(self, x: Tensor, y: Tensor) -> Tensor:
        """One number per token [1, 1, 1, T, 1], from the first T tokens of y."""
        ...

    def of_channels(self, x: Tensor, y: Tensor) -> Tensor:
        """One number per layer and head [L, 1, K, 1, D or 1], from the last T tokens of y."""
        ...


@dataclass(frozen=True)
class Relative:
    """Root mean squares relative to those of x, of layers 1 and up: equal at any size and scale
    (specs/reuse.md 1.8; the per-token distance is a mean of absolute values there as here).
    """

    temperature: float

    def whole(self, x: Tensor, y: Tensor) -> Tensor:
        """|x - y| / |x|, over everything."""
        x, y = widened(x)[1:], widened(y)[1:, :, : x.shape[2]]
        return _ratio((x - y).square().mean().sqrt(), x.square().mean().sqrt())

    def of_tokens(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of |x - y| over layers, heads and channels, by the root mean square of x."""
        x, y = widened(x)[1:], widened(y)[1:, :, : x.shape[2]]
        distance = (x - y).abs().mean((0, 1, 3))
        return _ratio(distance, x.square().mean().sqrt())[None, None, None, :, None]

    def of_channels(self, x: Tensor, y: Tensor) -> Tensor:
        """|x - y| / |x| over tokens and channels: one number per layer and head."""
        x, y = widened(x), widened(y)[:, :, -x.shape[2] :]
        distance, size = ((part.square().mean((2, 3))).sqrt() for part in (x - y, x))
        return _ratio(distance, size)[:, None, :, None, None]


@dataclass(frozen=True)
class Published:
    """The distances of KVCOMM's code, not normalised, at temperature 1 (specs/reuse.md 1.3, steps 5
    and 6).
    """

    temperature: float = 1.0

    def whole(self, x: Tensor, y: Tensor) -> Tensor:
        """The length of x - y as one vector, of all layers."""
        return (widened(x) - widened(y)[:, :, : x.shape[2]]).square().sum().sqrt()

    def of_tokens(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of |x - y| over layers, heads and channels."""
        distance = (widened(x) - widened(y)[:, :, : x.shape[2]]).abs().mean((0, 1, 3))
        return distance[None, None, None, :, None]

    def of_channels(self, x: Tensor, y: Tensor) -> Tensor:
        """The length of x - y over tokens: one number per layer, head and channel."""
        distance = (widened(x) - widened(y)[:, :, -x.shape[2] :]).square().sum(2).sqrt()
        return distance[:, None, :, None]


def weights_of(distances: Sequence[Tensor], temperature: float) -> Tensor:
    """The share of each anchor: `softmax(-distance / temperature)` over the new first axis."""
    return torch.softmax(-torch.stack(list(distances)) / temperature, 0)


def blended(offsets: Sequence[Offsets], k_weights: Tensor, v_weights: Tensor) -> Offsets:
    """The weighted sum of offsets of equal shapes, in fp32 or wider; weights [A, L or 1, 1, K or 1,
    T or 1, D or 1] as `Metric` gives them, with KVCOMM's axis for the batch.
    """
    k = sum(w[:, 0] * widened(each.keys) for w, each in zip(k_weights, offsets, strict=True))
    v = sum(w[:, 0] * widened(each.values) for w, each in zip(v_weights, offsets, strict=True))
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    return Offsets(_without_first(k), _without_first(v))


def widened(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64: differences of near-equal numbers keep their digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_first(x: Tensor) -> Tensor:
    """x with zeros in the first layer."""
    return torch.cat((torch.zeros_like(x[:1]), x[1:]))


def _ratio(distance: Tensor, size: Tensor) -> Tensor:
    """distance / size, at most `FAR`, so that heads of zeros get weights as well."""
    return (distance / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(FAR)


def _is_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _check_pair(keys: Tensor, values: Tensor, what: str) -> None:
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise InputError(
            f"{what}: keys {list(keys.shape)} and values {list(values.shape)} are not [L, K, T, D] "
            "and [L, K, T, Dv] of one text"
        )
