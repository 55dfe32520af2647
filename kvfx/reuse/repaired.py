"""The cache of a prompt with approximate rows, some of which every step computes again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.cache import in_buckets
from kvfx.errors import CapacityExceeded, InputError, UnsupportedOperation
from kvfx.planner import Plan
from kvfx.reuse.runner import LiveRows, Runner
from kvfx.runtime import State


class RepairedState(State):
    """Live rows that are read on, and repaired while they are: with every step of one token, the
    `repairs` approximate rows whose `deviation` [K, N] weighs most under the attention [K, N] of
    the newest row at the site `watch` are computed again, in ascending order (KVShare, arXiv
    2503.16525, decode stage).

    A repaired row sees those before it as they are by then, and so did the rows that were computed
    behind approximate ones: in deeper layers they deviate, by how much nobody measured. Where fewer
    than `repairs` approximate rows are left, these follow, from the first `dense` rows on: in the
    end all rows are what a dense run computes.
    """

    def __init__(
        self,
        plan: Plan,
        max_length: int | None,
        runner: Runner,
        rows: LiveRows,
        tokens: Sequence[int],
        deviation: Tensor,
        attention: Tensor,
        *,
        dense: int,
        repairs: int,
        watch: int,
    ) -> None:
        super().__init__(plan, 1, max_length)
        self.runner, self.rows = runner, rows
        self.tokens = list(tokens)
        self.deviation, self.attention = deviation, attention
        self.dense, self.repairs, self.watch = dense, repairs, watch
        self.repaired: list[int] = []
        self._check_room(len(tokens))
        self._count(len(tokens))

    def tensors(self) -> list[Tensor]:
        """Keys and values of all sites."""
        return [*self.rows.keys, *self.rows.values]

    def read(self, input_ids: Tensor, tokens: Sequence[int], logits_index: Tensor) -> Tensor:
        """Compute the new rows, and with a single one the worst of the approximate ones. Raises
        InputError for padding.
        """
        new = input_ids[0].tolist()
        if tokens[0] < len(new):
            raise InputError("a prompt that is repaired while it is read takes no padding: one row")
        first, count = self.columns, self.columns + len(new)
        self._check_room(count)
        self._grow(count)
        again = self._worst() if len(new) == 1 else []
        self.tokens += new
        positions = [*again, *range(first, count)]
        device = input_ids.device
        ids = torch.tensor([[self.tokens[place] for place in positions]], device=device)
        logits, attention = self.runner.read(
            self.rows,
            ids,
            torch.tensor([positions], device=device),
            logits_index + len(again),
            watch=self.watch,
        )
        assert attention is not None
        self.attention = attention
        self.deviation[:, again] = 0.0
        self.repaired += again
        done = set(positions)
        while self.dense in done:
            self.dense += 1
        self._count(count)
        return logits

    def crop(self, length: int) -> None:
        """Forget all but the first `length` rows."""
        self.tokens = self.tokens[:length]
        self.deviation[:, length:] = 0.0
        self.dense = min(self.dense, length)
        self._count(length)

    def take_rows(self, rows: Tensor) -> None:
        """Refuse: the rows are those of one request."""
        if rows.tolist() != [0]:
            raise UnsupportedOperation(
                "a prompt that is repaired while it is read has one row: beam search and several "
                "sequences need a pool with repairs=0"
            )

    def _check_room(self, count: int) -> None:
        if self.max_length is not None and count > self.max_length:
            raise CapacityExceeded(
                f"{count} tokens do not fit into max_length={self.max_length}: give a larger one"
            )

    def _worst(self) -> list[int]:
        """The approximate rows that matter most to the newest one, then those that are not dense
        yet; ascending.
        """
        known = self.attention.shape[1]
        score = (self.attention * self.deviation[:, :known]).sum(0)
        best = score.topk(min(self.repairs, known)).indices.tolist()
        worst = [place for place in best if float(score[place]) > 0.0]
        others = (place for place in range(self.dense, self.columns) if place not in worst)
        return sorted([*worst, *itertools.islice(others, self.repairs - len(worst))])

    def _grow(self, count: int) -> None:
        """Make room for so many rows."""
        if count <= self.rows.length:
            return
        more = in_buckets(count) - self.rows.length
        self.rows = LiveRows(
            tuple(F.pad(k, (0, 0, 0, more)) for k in self.rows.keys),
            tuple(F.pad(v, (0, 0, 0, more)) for v in self.rows.values),
        )
        self.deviation = F.pad(self.deviation, (0, more))

    def _count(self, columns: int) -> None:
        self.columns = columns
        self.positions = self.prompt_tokens = [columns]
        self.next_position.fill_(columns)
