"""The static facts of a model's attention: what each site computes, before any policy is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Causal:
    """Row q sees every key with `0 <= pos_k <= pos_q`."""

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Window:
    """Row q sees the newest `size` keys, itself included: `pos_q - pos_k < size`."""

    size: int

    def __str__(self) -> str:
        return f"window {self.size}"


@dataclass(frozen=True)
class Chunk:
    """Row q sees the earlier keys of its own block of `size` positions: `pos_q // size == pos_k //
    size`.
    """

    size: int

    def __str__(self) -> str:
        return f"chunk {self.size}"


@dataclass(frozen=True)
class Unproven:
    """Who sees what is known to the model alone; `reason` says why no family fits its mask."""

    reason: str

    def __str__(self) -> str:
        return "unproven"


Mask = Causal | Window | Chunk | Unproven


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the first `2 * len(frequencies)` channels turn by `position * frequency`
    radians.

    `style` is `"half"` (channel i pairs with i + width / 2) or `"interleaved"` (2i with 2i + 1).
    """

    style: str
    frequencies: tuple[float, ...]

    @property
    def width(self) -> int:
        """Channels that are rotated."""
        return 2 * len(self.frequencies)

    def __str__(self) -> str:
        return f"{self.style} {self.width}"


@dataclass(frozen=True)
class Site:
    """One attention computation of the model, named by module path.

    Scores are `scale` times products; where the model says so they become
    `softcap * tanh(score / softcap)`, lose `slopes[head]` per position of distance (ALiBi), and
    share their softmax with one learned logit per head, which takes weight and gives nothing
    (`sinks`). Where K and V are computed from narrower tensors, token by token, `latent` are their
    widths; `linear` says whether that is linear.
    """

    index: int
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    mask: Mask
    rope: Rope | None
    dtype: torch.dtype
    device: torch.device
    softcap: float = 0.0
    slopes: tuple[float, ...] | None = None
    sinks: bool = False
    reads: int | None = None
    latent: tuple[int, ...] = ()
    linear: bool = False

    @property
    def width(self) -> int:
        """Numbers per token of keys and values."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def kv_repeat(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def is_outer(self, sites: int) -> bool:
        """Whether it is one of the first two of `sites` or the last: several papers leave those
        alone.
        """
        return self.index in (0, 1, sites - 1)

    @property
    def sees(self) -> str:
        """Who is seen and how, in words: the mask, and the rules of scores."""
        rules = (
            f"softcap {self.softcap:g}" if self.softcap else "",
            "ALiBi" if self.slopes else "",
        )
        return ", ".join(filter(None, (str(self.mask), *rules, "sinks" if self.sinks else "")))

    @property
    def chunk(self) -> int | None:
        """The blocks of positions that see only themselves, if the model has them at this site."""
        return self.mask.size if isinstance(self.mask, Chunk) else None

    @property
    def window(self) -> int | None:
        """The sliding window of the model at this site, if it has one."""
        return self.mask.size if isinstance(self.mask, Window) else None


@dataclass(frozen=True)
class Geometry:
    """All sites of a model, in the order in which they run."""

    sites: tuple[Site, ...]
