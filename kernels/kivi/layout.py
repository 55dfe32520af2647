"""Where everything lies: codes in int16 words ("W-planes"), exact rows in rings. See the README."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 16
NARROWEST = 32


class Entries(NamedTuple):
    """The buffers of a site, in the order in which every op takes them.

    With N tiles of G = group_size tokens and R rows of W words per tile: codes are [B, K, N, R, W],
    parameters of keys [B, K, N, D], of values [B, K, N, G, Dv / G]. Token t is in slot t % ring of
    `k_residual` [B, K, k_ring, D] and `v_residual` [B, K, v_ring, Dv]. Counters are [B, K]: live
    entries, and how many of the oldest have their keys and values as codes.
    """

    k_codes: Tensor
    k_scales: Tensor
    k_zeros: Tensor
    v_codes: Tensor
    v_scales: Tensor
    v_zeros: Tensor
    k_residual: Tensor
    v_residual: Tensor
    length: Tensor
    k_quantized: Tensor
    v_quantized: Tensor


@dataclass(frozen=True)
class Planes:
    """How the codes of a tile [tokens, width] fill words [rows, words] of int16.

    The code of token `part * rows + row`, channel `plane * words + word`, is in word [row, word],
    from bit `shift(part, plane)` on.
    """

    bits: int
    width: int
    tokens: int

    @property
    def planes(self) -> int:
        """Channels in one word: the largest power of two that leaves 32 words per row."""
        planes = WORD // self.bits
        while self.width % planes or self.width // planes < NARROWEST:
            planes //= 2
        return planes

    @property
    def words(self) -> int:
        """Words per row (W)."""
        return self.width // self.planes

    @property
    def parts(self) -> int:
        """Tokens in one word (U)."""
        return WORD // self.bits // self.planes

    @property
    def rows(self) -> int:
        """Rows of words per tile (R)."""
        return self.tokens // self.parts

    @property
    def mask(self) -> int:
        """The largest code, which is also the mask that cuts one code out."""
        return 2**self.bits - 1

    def shift(self, part: int, plane: int) -> int:
        """The lowest bit of a code in its word."""
        return (part * self.planes + plane) * self.bits

    def pack(self, codes: Tensor) -> Tensor:
        """Words int16 [..., R, W] of the codes of whole tiles, int32 [..., G, D]."""
        fields = codes.unflatten(-1, (self.planes, self.words)).unflatten(
            -3, (self.parts, self.rows)
        )
        shifts = self.bits * torch.arange(
            self.parts * self.planes, dtype=torch.int32, device=codes.device
        )
        shifts = shifts.reshape(self.parts, 1, self.planes, 1)
        # axis by axis, in int32: both at once, widened to int64, took seven times as long
        shifted = (fields << shifts).sum(-4, dtype=torch.int32).sum(-2, dtype=torch.int32)
        return as_word(shifted)

    def unpack(self, words: Tensor) -> Tensor:
        """Codes int32 [..., G, D] of whole tiles, from their words [..., R, W]."""
        shifts = self.bits * torch.arange(
            self.parts * self.planes, dtype=torch.int32, device=words.device
        )
        shifts = shifts.reshape(self.parts, 1, self.planes, 1)
        fields = (words.to(torch.int32)[..., None, :, None, :] >> shifts) & self.mask
        return fields.flatten(-2).flatten(-3, -2)


def as_word(x: Tensor) -> Tensor:
    """The low 16 bits of non-negative integers, as int16."""
    return (((x + 0x8000) & 0xFFFF) - 0x8000).to(torch.int16)


@dataclass(frozen=True)
class Schedule:
    """How many exact tokens the rings hold, and how many leave at once when a ring is full."""

    k_ring: int
    k_block: int
    v_ring: int
    v_block: int


def schedule(group_size: int, residual: int, rule: str) -> Schedule:
    """The schedule of the published method ("kivi") or of one shared window ("window")."""
    if rule == "kivi":
        return Schedule(k_ring=residual, k_block=residual, v_ring=residual + 1, v_block=1)
    ring = residual + group_size
    return Schedule(k_ring=ring, k_block=group_size, v_ring=ring, v_block=group_size)


def quantized_of(total: Tensor, ring: int, block: int) -> Tensor:
    """Tokens that are codes once `total` are stored and no ring is full: whole blocks."""
    return torch.div(total - (ring - block), block, rounding_mode="floor").clamp(min=0) * block


def ring_tokens(length: Tensor, ring: int) -> Tensor:
    """The newest token that each slot of a ring may hold, int64 [B, K, ring] (negative: none)."""
    newest = length.long()[..., None] - 1
    return newest - (newest - torch.arange(ring, device=length.device)) % ring


def rows_and_heads(like: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Indices of batch row and KV head, shaped to index buffers with `axes` further axes."""
    b = torch.arange(like.shape[0], device=like.device).reshape(-1, 1, *[1] * axes)
    h = torch.arange(like.shape[1], device=like.device).reshape(-1, *[1] * axes)
    return b, h
