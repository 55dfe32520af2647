"""`Layout`: a prompt as the pieces that it is put together from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from kvfx.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Layout:
    """Token ids of the `pieces` of one prompt, in order: documents, instructions, and last what is
    asked, which is always computed.

    Pieces are tokenized on their own, so that a piece has the same tokens in every prompt; a dense
    reference has to use these tokens as well.
    """

    pieces: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.pieces or not all(self.pieces) or len(self.tokens) < 2:
            raise InputError(
                f"a layout of {len(self.pieces)} pieces with {len(self.tokens)} tokens: every "
                "piece needs a token, and a prompt two"
            )

    @classmethod
    def of(
        cls, pieces: Sequence[str | Sequence[int]], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Layout:
        """The layout of texts and token ids; texts need a `tokenizer`, whose special tokens go in
        front of the first piece alone.
        """
        found = []
        for piece in pieces:
            if not isinstance(piece, str):
                found.append(tuple(map(int, piece)))
                continue
            if tokenizer is None:
                raise InputError("pieces are texts: give a tokenizer, or token ids")
            ids = tokenizer(piece, add_special_tokens=not found, verbose=False)["input_ids"]
            found.append(tuple(map(int, ids)))
        return cls(tuple(found))

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids, in order."""
        return tuple(token for piece in self.pieces for token in piece)

    @property
    def starts(self) -> tuple[int, ...]:
        """The position at which each piece begins."""
        return tuple(accumulate(map(len, self.pieces[:-1]), initial=0))
