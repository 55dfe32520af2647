"""Prompts of agents: fixed pieces, and slots for texts that others wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfx.errors import InputError
from kvfx.reuse.layout import Layout
from kvfx.reuse.runner import LiveRows, Runner


@dataclass(frozen=True)
class Slot:
    """Where a template takes a text: `name` says which. Slots of one name share their anchors."""

    name: str


@dataclass(frozen=True, eq=False)
class Piece:
    """A fixed piece of a template: its tokens, and canonical keys and values [L, K, P, D] as they
    are behind the fixed pieces before it.
    """

    tokens: tuple[int, ...]
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Template:
    """An agent's prompt: a fixed piece, then each slot with the fixed piece behind it."""

    pieces: tuple[Piece, ...]
    slots: tuple[str, ...]

    def layout(self, texts: Sequence[tuple[int, ...]]) -> Layout:
        """The prompt with a text in each slot."""
        pieces = [self.pieces[0].tokens]
        for text, piece in zip(texts, self.pieces[1:], strict=True):
            pieces += [text, piece.tokens]
        return Layout(tuple(pieces))


def slots_of(name: str, parts: Sequence[object]) -> tuple[str, ...]:
    """The names of a template's slots.

    Raises InputError unless it is a fixed piece, then slots of different names with a fixed piece
    behind each.
    """
    slots = tuple(part.name for part in parts if isinstance(part, Slot))
    shape = [isinstance(part, Slot) for part in parts]
    if not slots or shape != [False, *([True, False] * len(slots))]:
        raise InputError(
            f"template {name!r}: a fixed piece, then slots with a fixed piece behind each; it has "
            f"{', '.join('slot' if is_slot else 'piece' for is_slot in shape) or 'nothing'}"
        )
    if len(set(slots)) < len(slots):
        raise InputError(f"template {name!r} has two slots of one name: {', '.join(slots)}")
    return slots


def computed_pieces(runner: Runner, fixed: Sequence[tuple[int, ...]]) -> tuple[Piece, ...]:
    """Fixed pieces, each computed behind those before it, without what fills the slots."""
    layout = Layout(tuple(fixed))
    rows = runner.rows(len(layout.tokens))
    runner.dense(rows, layout.tokens)
    dtype = runner.sites[0].dtype
    pieces = []
    for start, tokens in zip(layout.starts, fixed, strict=True):
        keys, values = canonical_stack(runner, rows, start, start + len(tokens))
        pieces.append(Piece(tokens, keys.to(dtype), values.to(dtype)))
    return tuple(pieces)


def canonical_stack(runner: Runner, rows: LiveRows, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Canonical rows of a prompt as anchors have them: keys [L, K, T, D] and values [L, K, T, Dv]
    in the main memory.
    """
    keys, values = runner.canonical(rows, start, stop)
    return torch.stack(keys).cpu(), torch.stack(values).cpu()
