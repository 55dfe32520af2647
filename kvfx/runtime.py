"""The allocated cache of one conversation, and the host-side counts that schedule it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config

from kvfx.cache import CAPACITY
from kvfx.cuda_graph import ReplayedStep
from kvfx.errors import CapacityExceeded, InputError, UnsupportedOperation
from kvfx.planner import Plan, Schedule, SitePlan


class State:
    """The buffers of every site for one batch of conversations, with counts that never need a
    device sync.

    `columns` counts the columns of the token matrix read so far, padding included; `positions` [B]
    the next position of each row; `prompt_tokens` [B] the tokens that budgets refer to: those seen
    when the last prompt ended. `measured` are the entries that sites without a budget held after
    their last compression.
    """

    def __init__(self, plan: Plan, batch: int, max_length: int | None) -> None:
        self.plan = plan
        self.batch = batch
        self.max_length = max_length
        self.columns = 0
        self.positions = [0] * batch
        self.prompt_tokens = [0] * batch
        self.entries: dict[Schedule, list[int]] = {
            site.schedule: [0] * batch for site in plan.sites
        }
        self.measured: dict[Schedule, list[int]] = {}
        self.capacities = [0] * len(plan.sites)
        self.buffers: list[dict[str, Tensor]] = [{} for _ in plan.sites]
        self.moved = False
        device = plan.sites[0].site.device
        self.history = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.next_position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.replayed: ReplayedStep | None = None

    def read(self, input_ids: Tensor, tokens: Sequence[int], logits_index: Tensor) -> Tensor | None:
        """Read rows [B, S], `tokens` [B] of them real, without the programs of the model: logits
        [B, L, V], or None where this state has nothing of its own to do so.
        """
        del input_ids, tokens, logits_index
        return None

    def tensors(self) -> list[Tensor]:
        """All buffers in the order in which programs take them."""
        return [tensor for buffers in self.buffers for tensor in buffers.values()]

    def nbytes(self) -> int:
        """Bytes that the buffers occupy, as allocated."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    def admit(
        self, columns: int, tokens: Sequence[int], prompt_tokens: Sequence[int] | None = None
    ) -> None:
        """Make room for `columns` new rows of which `tokens` [B] are real; a first prompt is
        compressed before it is stored. Rows of a prompt that ends at `prompt_tokens` [B] change
        what budgets refer to.
        """
        first = self.columns == 0
        seen = [position + count for position, count in zip(self.positions, tokens, strict=True)]
        if self.max_length is not None and max(seen) > self.max_length:
            raise CapacityExceeded(
                f"{max(seen)} tokens do not fit into max_length={self.max_length}: give a "
                "larger one"
            )
        if self.plan.masked and min(tokens) < columns:
            raise InputError(
                "padded batches cannot be read: a site is dense under the model's own mask "
                "(strict=False), which knows no padding: give one row, or rows of equal length"
            )
        budget = list(prompt_tokens or self.prompt_tokens)
        entries = {}
        for schedule, held in self.entries.items():
            pairs = zip(tokens, budget, strict=True)
            new = [schedule.kept(*pair) for pair in pairs] if first else tokens
            entries[schedule] = [old + count for old, count in zip(held, new, strict=True)]
        # buffers first: memory that runs out leaves the counts with what is stored
        self._fit(entries, budget, shrink=False)
        self.entries, self.prompt_tokens, self.positions = entries, budget, seen
        self.columns += columns

    def due(self) -> bool:
        """Whether any row of any site is to be flushed or evicted now."""
        return any(
            schedule.due(count, tokens)
            for schedule, entries in self.entries.items()
            for count, tokens in zip(entries, self._budget(schedule), strict=True)
        )

    def compacted(self) -> None:
        """Account for a run of the compact program, and give back what a long prompt had needed."""
        for schedule, entries in self.entries.items():
            pairs = zip(entries, self._budget(schedule), strict=True)
            self.entries[schedule] = [schedule.compacted(*pair) for pair in pairs]
        self._read_back()
        self._fit(self.entries, self.prompt_tokens, shrink=True)

    def measure(self) -> None:
        """Read back how many entries a prompt left where only the data tell, and give back the
        rest.
        """
        self._read_back()
        if self.measured:
            self._fit(self.entries, self.prompt_tokens, shrink=True)

    def _read_back(self) -> None:
        for plan, buffers in zip(self.plan.sites, self.buffers, strict=True):
            if plan.schedule.measured and buffers:
                # heads share their memory: what counts is their mean
                held = buffers["length"].double().mean(1).ceil().long().tolist()
                self.entries[plan.schedule] = self.measured[plan.schedule] = held

    def _budget(self, schedule: Schedule) -> Sequence[int]:
        """The tokens that the budget of a schedule refers to."""
        return self.measured.get(schedule, self.prompt_tokens)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` columns; only for plans that keep every entry in
        order.
        """
        if not self.plan.croppable:
            raise UnsupportedOperation(
                f"the cache under {self.plan.policy!r} cannot be cropped: entries are evicted, "
                "quantized or in a ring "
                "(assisted decoding needs a croppable cache: use kvfx.Full())"
            )
        dropped = self.columns - length
        self.columns = length
        self.positions = [position - dropped for position in self.positions]
        self.prompt_tokens = [
            min(tokens, seen)
            for tokens, seen in zip(self.prompt_tokens, self.positions, strict=True)
        ]
        self.entries = {
            key: [count - dropped for count in entries] for key, entries in self.entries.items()
        }
        self.next_position -= dropped
        self.history = self.history[:, :length]
        for buffers in filter(None, self.buffers):
            buffers["length"] -= dropped

    def take_rows(self, rows: Tensor) -> None:
        """Let row i of the batch continue what was row `rows[i]`: beam search, repeats, and
        selections.
        """
        order = rows.tolist()
        self.batch = len(order)
        self.positions = [self.positions[row] for row in order]
        self.prompt_tokens = [self.prompt_tokens[row] for row in order]
        self.entries = {
            key: [entries[row] for row in order] for key, entries in self.entries.items()
        }
        self.measured = {
            key: [entries[row] for row in order] for key, entries in self.measured.items()
        }
        self.next_position = self.next_position.index_select(0, rows)
        self.history = self.history.index_select(0, rows)
        for index, buffers in enumerate(self.buffers):
            chosen = {name: old.index_select(0, rows) for name, old in buffers.items()}
            self._replace(index, chosen)

    def _fit(
        self, entries: dict[Schedule, list[int]], tokens: Sequence[int], *, shrink: bool
    ) -> None:
        """Allocate or grow the buffers of every site; after an eviction, shrink them as well."""
        for index, plan in enumerate(self.plan.sites):
            budget = self.measured.get(plan.schedule, tokens)
            pairs = zip(entries[plan.schedule], budget, strict=True)
            needed = max(plan.schedule.capacity(*pair) for pair in pairs)
            if self.max_length is not None:
                needed = min(needed, plan.schedule.most(self.max_length))
            if needed > self.capacities[index] or (
                shrink and plan.select is not None and needed < self.capacities[index]
            ):
                self._resize(index, plan, needed)

    def _resize(self, index: int, plan: SitePlan, capacity: int) -> None:
        old, device = self.buffers[index], plan.site.device
        if old and plan.store.ragged:
            old = _spread(plan, old, capacity)
        new = {
            name: buffer.resize(old[name], self.batch, capacity)
            if old
            else buffer.allocate(self.batch, capacity, device)
            for name, buffer in plan.buffers.items()
        }
        self._replace(index, new)
        self.capacities[index] = capacity

    def _replace(self, index: int, buffers: dict[str, Tensor]) -> None:
        self.buffers[index] = buffers
        self.moved = True
        self.replayed = None


class Executor:
    """The compiled programs of a model: runs one step on a `State`.

    `replays` says that decode steps are captured and replayed as CUDA graphs. `chunk` is the most
    rows of a prompt that are read at once.
    """

    def __init__(
        self,
        programs: Mapping[str, Callable[..., Any]],
        *,
        compiled: tuple[str, ...] = (),
        replays: bool = False,
        chunk: int | None = None,
    ) -> None:
        self.programs = programs
        self.chunk = chunk
        self.compiled = compiled
        self.replays = replays

    def prompt(
        self,
        state: State,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_index: Tensor,
        tokens: Sequence[int],
    ) -> Tensor:
        """Read S >= 1 rows, `tokens` [B] of them real (position -1: padding), into a cache: logits
        [B, L, V].

        A prompt longer than `chunk` rows is read and compressed chunk by chunk.
        """
        own = state.read(input_ids, tokens, logits_index)
        if own is not None:
            return own
        rows, seen = input_ids.shape[1], state.positions
        ends = [before + count for before, count in zip(seen, tokens, strict=True)]
        step = rows if self.chunk is None else self.chunk
        if rows <= step:
            return self._read(state, input_ids, position_ids, logits_index, tokens, ends)
        wanted, logits = logits_index.tolist(), {}
        for first in range(0, rows, step):
            last = min(first + step, rows)
            real = [max(0, last - max(first, rows - count)) for count in tokens]
            # the last row stands in where no logits are asked for
            index = [row for row in wanted if first <= row < last] or [last - 1]
            part = self._read(
                state,
                input_ids[:, first:last],
                position_ids[:, first:last],
                logits_index.new_tensor(index) - first,
                real,
                ends,
            )
            logits.update(zip(index, part.unbind(1), strict=True))
        return torch.stack([logits[row] for row in wanted], 1)

    def _read(
        self,
        state: State,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_index: Tensor,
        tokens: Sequence[int],
        ends: Sequence[int],
    ) -> Tensor:
        """Read one chunk of a prompt that ends at `ends` [B] tokens.

        Programs are compiled for two rows or more: a single one gets padding beside it.
        """
        program = "prefill" if state.columns == 0 else "extend"
        state.admit(input_ids.shape[1], tokens, ends)
        seen = self._history(state, input_ids)
        if input_ids.shape[1] == 1 and not state.plan.masked:
            input_ids = torch.cat((input_ids, input_ids), 1)
            position_ids = torch.cat((torch.full_like(position_ids, -1), position_ids), 1)
            logits_index = logits_index + 1
        extra = [self._tokens(state)] if program == "prefill" and state.plan.selects else []
        logits = self._run(
            state, program, input_ids, position_ids, logits_index, *seen, *extra, *state.tensors()
        )[0]
        # in place: a captured step reads it where it is
        torch.maximum(
            state.next_position,
            position_ids.amax(1, keepdim=True) + 1,
            out=state.next_position,
        )
        if program == "prefill":
            state.measure()
        self._compact(state)
        return logits

    def decode(self, state: State, input_ids: Tensor) -> Tensor:
        """Read one row [B, 1] that is nowhere padding: logits [B, 1, V]."""
        index = torch.zeros(1, dtype=torch.int64, device=input_ids.device)
        own = state.read(input_ids, [1] * state.batch, index)
        if own is not None:
            return own
        state.admit(1, [1] * state.batch)
        logits = self._replayed(state, input_ids) if self.replays else self._step(state, input_ids)
        state.next_position += 1
        self._compact(state)
        return logits

    def _step(self, state: State, input_ids: Tensor) -> Tensor:
        index = torch.zeros(1, dtype=torch.int64, device=input_ids.device)
        seen = self._history(state, input_ids)
        return self._run(
            state, "decode", input_ids, state.next_position, index, *seen, *state.tensors()
        )[0]

    def _replayed(self, state: State, input_ids: Tensor) -> Tensor:
        """A decode step through the CUDA graph of this state's buffers."""
        if state.replayed is None:
            index = torch.zeros(1, dtype=torch.int64, device=input_ids.device)
            state.replayed = ReplayedStep(
                partial(self._run, state, "decode"),
                (state.next_position, index, *state.tensors()),
            )
        return state.replayed(input_ids)

    def _compact(self, state: State) -> None:
        if not state.due():
            return
        extra = [self._tokens(state)] if state.plan.selects else []
        self._run(state, "compact", *extra, *state.tensors())
        state.compacted()

    def _run(self, state: State, program: str, *args: Tensor) -> tuple[Tensor, ...]:
        if program not in self.compiled:
            return self.programs[program](*args)
        if state.moved:
            _mark_fixed_axes(state)
        # sizes that happen to be equal at the first call (rows and batch, say) are not one size
        with _config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
            return self.programs[program](*args)

    def _history(self, state: State, input_ids: Tensor) -> tuple[Tensor, ...]:
        """All tokens and their positions [B, T], for models that compute a mask from them."""
        if not state.plan.masked:
            return ()
        state.history = torch.cat((state.history, input_ids), 1)
        rows = torch.arange(state.history.shape[1], device=input_ids.device)
        return state.history, rows.expand(state.batch, -1)

    def _tokens(self, state: State) -> Tensor:
        return torch.tensor(state.prompt_tokens, device=state.next_position.device)


def _spread(plan: SitePlan, old: dict[str, Tensor], capacity: int) -> dict[str, Tensor]:
    """Buffers of heads that share their memory, with the room behind each head for `capacity`."""
    # tensors are moved here, between programs: no op of a graph
    from kvfx.kernels.flat.layout import resized, take

    source, start = resized(old["start"], old["length"], plan.site.kv_heads * capacity)
    per_slot = plan.site.kv_heads * CAPACITY
    moved = {
        name: take(old[name], source)
        for name, buffer in plan.buffers.items()
        if buffer.shape[1] == per_slot
    }
    return {**old, **moved, "start": start}


def _mark_fixed_axes(state: State) -> None:
    """Tell the compiler which axes of new buffers never change: fewer symbols, tighter loops."""
    # loads the whole of Dynamo: only where something is compiled
    from torch._dynamo import mark_static

    for site, buffers in zip(state.plan.sites, state.buffers, strict=True):
        layouts = site.buffers
        for name, tensor in buffers.items():
            mark_static(tensor, list(layouts[name].fixed_axes))
    state.moved = False
