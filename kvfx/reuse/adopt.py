"""From live rows to the cache of a compressed model: any format, as if its prompt had been read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfx.errors import UnsupportedShape
from kvfx.model import CompressedCache, CompressedModel
from kvfx.prefill_parts import OPERANDS, store_part
from kvfx.reuse.runner import LiveRows
from kvfx.runtime import Executor


class Adopter:
    """Stores live rows in caches of `fast`, by the part of its prefill program that does so.

    Raises UnsupportedShape for a policy that ranks tokens by the queries of a prompt: reused rows
    have none.
    """

    def __init__(self, fast: CompressedModel) -> None:
        self._fast = fast
        self._store = store_part(fast.graph("prefill"))
        given = self._store.graph.find_nodes(op="placeholder")[: OPERANDS * len(fast.plan.sites)]
        self._width = len(given)
        if any(node.users for node in given[::OPERANDS]):
            raise UnsupportedShape(
                f"{fast.plan.policy!r} ranks tokens by the queries of the prompt, which reused "
                "rows do not have: use one that stores all tokens, or ranks by position or key"
            )

    def cache(self, rows: LiveRows, tokens: Sequence[int]) -> CompressedCache:
        """A cache that holds the first rows, one per token, and goes on behind them."""
        count = len(tokens)
        cache = self._fast.new_cache()
        state = cache.allocated(1)

        def prefill(*args: Tensor) -> tuple[Tensor]:
            # a single row has padding in front of it
            padding = args[0].shape[1] - count
            given = []
            for k, v in zip(rows.keys, rows.values, strict=True):
                k, v = k[:, :, :count], v[:, :, :count]
                if padding:
                    k, v = (torch.cat((x[:, :, :padding], x), 2) for x in (k, v))
                given += [k, k, v]
            self._store(*given[: self._width], *args)
            return (rows.keys[0].new_zeros(1, 1, 1),)

        device = self._fast.device
        ids = torch.tensor([tokens], device=device)
        positions = torch.arange(count, device=device)[None]
        index = torch.tensor([count - 1], device=device)
        executor = Executor({**self._fast.executor.programs, "prefill": prefill})
        with torch.no_grad():
            executor.prompt(state, ids, positions, index, [count])
        return cache
