"""Where everything lies: codes in int16 words ("W-planes"), exact rows in rings. The README draws both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 16
NARROWEST = 32


@dataclass(frozen=True)
class Planes:
    """How the codes of a tile [tokens, width] fill words [rows, words] of int16.

    Code of token `part * rows + row`, channel `plane * words + word`, sits at bit `shift(part, plane)` of word [row, word].
    """

    bits: int
    width: int
    tokens: int

    @property
    def planes(self) -> int:
        """Channels in one word: the most, as a power of two, that leave at least 32 words per row."""
        planes = WORD // self.bits
        while self.width % planes or self.width // planes < min(NARROWEST, self.width):
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
        return as_word((fields << shifts).sum((-4, -2)))

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
    """How many exact tokens the rings of keys and values hold, and how many leave at once when a ring is full."""

    k_ring: int
    k_block: int
    v_ring: int
    v_block: int


def schedule(group_size: int, residual: int, mode: str) -> Schedule:
    """The schedule of the published method ("kivi") or of one shared window ("window")."""
    if mode == "kivi":
        return Schedule(k_ring=residual, k_block=residual, v_ring=residual + 1, v_block=1)
    ring = residual + group_size
    return Schedule(k_ring=ring, k_block=group_size, v_ring=ring, v_block=group_size)


def quantized_of(total: Tensor, ring: int, block: int) -> Tensor:
    """Tokens that are quantized once `total` are stored and no ring is full: whole blocks, the oldest first."""
    return torch.div(total - (ring - block), block, rounding_mode="floor").clamp(min=0) * block


def ring_tokens(length: Tensor, ring: int) -> Tensor:
    """The newest token that each slot of a ring may hold, int64 [B, K, ring] (negative: none); token t is at t % ring."""
    newest = length.long()[..., None] - 1
    return newest - (newest - torch.arange(ring, device=length.device)) % ring


def rows_and_heads(like: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Indices of batch row and KV head of `like` [B, K, ...], to index buffers together with `axes` further axes."""
    b = torch.arange(like.shape[0], device=like.device).reshape(-1, 1, *[1] * axes)
    h = torch.arange(like.shape[1], device=like.device).reshape(-1, *[1] * axes)
    return b, h
