"""The compressed model as transformers sees it: `generate`, pipelines and chat work as with the
model it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache as HFCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvfx.errors import InputError, PolicyError, UnsupportedOperation
from kvfx.graph import Graph
from kvfx.memory import memory_bytes, memory_formula
from kvfx.pass_manager import Trail
from kvfx.planner import Plan
from kvfx.report import Report
from kvfx.runtime import Executor, State

if TYPE_CHECKING:
    from kvfx.cache_trace.trace import CacheTrace


class CompressedCache(HFCache):
    """The cache of one conversation, to be passed on as `past_key_values`; allocated when the first
    prompt is read.
    """

    def __init__(self, plan: Plan, max_length: int | None) -> None:
        self.layers = []
        self.plan = plan
        self.max_length = max_length
        self.state: State | None = None

    def allocated(self, batch: int) -> State:
        """The state for a batch of `batch` rows; a batch of another size than before raises an
        InputError.
        """
        if self.state is None:
            self.state = State(self.plan, batch, self.max_length)
        if self.state.batch != batch:
            raise InputError(
                f"this cache holds {self.state.batch} rows, the inputs have {batch}: start a new "
                "cache"
            )
        return self.state

    def nbytes(self) -> int:
        """Bytes of all buffers, as allocated."""
        return 0 if self.state is None else self.state.nbytes()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included (what generate slices its inputs by); never the
        number of entries.
        """
        return 0 if self.state is None else self.state.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: the cache grows."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: programs are compiled already, generate has nothing to add."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a prompt has been read."""
        return self.state is not None

    def __len__(self) -> int:
        return len(self.plan.sites)

    def reset(self) -> None:
        """Forget the conversation."""
        self.state = None

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns (negative: drop that many); evicted or quantized
        caches refuse.
        """
        if self.state is not None:
            length = self.state.columns + max_length if max_length <= 0 else max_length
            self.state.crop(min(length, self.state.columns))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row `beam_idx[i]` as row i."""
        if self.state is not None:
            self.state.take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            rows = torch.arange(self.state.batch, device=self.state.next_position.device)
            self.state.take_rows(rows.repeat_interleave(repeats))


class CompressedModel(GenerationMixin, nn.Module):
    """A decoder whose KV cache is compressed: use it like the model it came from, whose weights it
    shares.

    `report` says what was done, `graph(program)` shows a program, `trail` how it came about,
    `memory` what it costs.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    output_modalities = ("text",)
    _is_stateful = False
    _supports_cache_class = True

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        raised: Graph,
        graphs: Mapping[str, Graph],
        executor: Executor,
        trail: Trail,
        report: Report,
        max_length: int | None,
    ) -> None:
        super().__init__()
        # not a sub-module: parameters belong to the model, and moving it would leave the programs
        # behind
        self.__dict__["source"] = model
        self.config = model.config
        self.generation_config = getattr(
            model, "generation_config", None
        ) or GenerationConfig.from_model_config(model.config)
        self.plan = plan
        self.raised = raised
        self.graphs = graphs
        self.executor = executor
        self.trail = trail
        self.report = report
        self.max_length = max_length
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """What is not about the cache is asked of the original model: embeddings, names, flags that
        pipelines read.
        """
        source = self.__dict__.get("source")
        if source is None or name in ("_modules", "_parameters", "_buffers"):
            raise AttributeError(name)
        return getattr(source, name)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.plan.sites[0].site.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return next(self.source.parameters()).dtype

    def can_generate(self) -> bool:
        """True."""
        return True

    def graph(self, program: str = "decode") -> Graph:
        """The lowered graph of `"prefill"`, `"extend"`, `"decode"` or `"compact"`: `.text`,
        `.module`.
        """
        if program not in self.graphs:
            raise KeyError(f"no program {program!r}: this model has {', '.join(self.graphs)}")
        return self.graphs[program]

    def trace_cache(self, prompt_ids: Tensor, max_new_tokens: int = 32) -> CacheTrace:
        """What becomes of every token in every cache while prompt_ids [1, S] are read and
        `max_new_tokens` are decoded greedily, node by node: slower than `generate`, and exact.
        """
        from kvfx.cache_trace.record import trace_cache

        return trace_cache(
            self.plan,
            self.graphs,
            prompt_ids,
            max_new_tokens,
            max_length=self.max_length,
            chunk=self.executor.chunk,
        )

    def save_html(self, path: Path | str, *, trace: CacheTrace | None = None) -> Path:
        """Write one page that shows what was done: the report, the layers before and after, every
        pass, every node of kvfx with its definition; with a `trace`, the cache over time. It needs
        no network. Returns the path.
        """
        from kvfx.page.data import Subject
        from kvfx.page.write import save_page

        return save_page(
            path,
            Subject(
                type(self.source).__name__,
                self.report.policy,
                "compress",
                self.trail,
                self.raised,
                self.graphs,
                self.plan,
                self.report,
                trace=trace,
            ),
        )

    def _repr_html_(self) -> str:
        """The report, for notebooks."""
        return self.report._repr_html_()

    def memory(self, batch: int = 1, length: int = 1, new: int = 0) -> int:
        """Bytes of the cache after a prompt of `length` tokens in each of `batch` rows and `new`
        decoded ones, exactly as allocated (an upper bound where only the data tell what stays).
        """
        return memory_bytes(self.plan, batch, length, new, self.max_length)

    def memory_formula(self) -> sympy.Expr:
        """The same as a sympy expression in `batch`, `length` and `new`."""
        return memory_formula(self.plan, self.max_length)

    def new_cache(self, max_length: int | None = None) -> CompressedCache:
        """An empty cache, for a conversation that is driven by hand or handed to `generate`; for
        one of at most `max_length` tokens no more is allocated than those need.
        """
        bounds = [bound for bound in (max_length, self.max_length) if bound is not None]
        return CompressedCache(self.plan, min(bounds, default=None))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedModel:
        """Refuse to move or cast: programs are compiled for the device and dtype of the model."""
        del recurse
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.device != self.device or probe.dtype != self.dtype:
            raise UnsupportedOperation(
                "a compressed model cannot be moved or cast: move the model, then compress it"
            )
        return self

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What `transformers` generates, through the compressed cache; asks for a croppable cache
        raise before any token.
        """
        config = kwargs.get("generation_config") or self.generation_config
        lookup = kwargs.get("prompt_lookup_num_tokens") or getattr(
            config, "prompt_lookup_num_tokens", None
        )
        if (kwargs.get("assistant_model") is not None or lookup) and not self.plan.croppable:
            raise UnsupportedOperation(
                f"assisted decoding takes tokens back, which {self.plan.policy!r} cannot: use "
                "kvfx.Full(), or no assistant"
            )
        implementation = kwargs.get("cache_implementation") or getattr(
            config, "cache_implementation", None
        )
        if implementation is not None:
            raise PolicyError(
                f"cache_implementation={implementation!r} chooses one of transformers' caches: "
                "a compressed model has its own, drop the argument"
            )
        # some configurations say that generation does without a cache: here one was asked for
        kwargs.setdefault("use_cache", getattr(kwargs.get("generation_config"), "use_cache", True))
        if kwargs.get("past_key_values") is None and kwargs["use_cache"]:
            kwargs["past_key_values"] = self.new_cache()
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CompressedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, CompressedCache | None]:
        """Logits [B, L, V] of new tokens [B, S] after those in `past_key_values`, which is updated
        in place.

        `attention_mask` is [B, S], or [B, past + S] with the past included; padding is on the left.
        Several rows are read by the prefill or extend program, one row by the decode program.
        Raises InputError for right padding, positions that restart, or a batch that does not fit
        the cache.
        """
        if input_ids is None:
            raise InputError(
                "a compressed model reads input_ids"
                + (", not inputs_embeds" if inputs_embeds is not None else "")
            )
        if 0 in input_ids.shape:
            raise InputError(f"input_ids is {list(input_ids.shape)}: there is no token to read")
        wanted = {
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        for name, value in wanted.items():
            if value is not None and value is not False:
                raise UnsupportedOperation(
                    f"a compressed model does not compute {name}: ask the original model"
                )
        cache = self.new_cache() if past_key_values is None else past_key_values
        if not isinstance(cache, CompressedCache) or cache.plan is not self.plan:
            raise InputError(
                f"past_key_values is a {type(cache).__name__} that this model did not make: "
                "pass what it returned, or fast.new_cache()"
            )
        state = cache.allocated(input_ids.shape[0])
        rows = input_ids.shape[1]
        positions, tokens = read_positions(state, rows, attention_mask, position_ids)
        index = logits_rows(rows, logits_to_keep, input_ids.device)
        if rows == 1 and state.columns > 0:
            logits = self.executor.decode(state, input_ids)[:, : len(index)]
        else:
            logits = self.executor.prompt(state, input_ids, positions, index, tokens)
        kept = cache if use_cache is not False else None
        if return_dict is False:
            return logits, kept
        return CausalLMOutputWithPast(logits=logits, past_key_values=kept)


def logits_rows(rows: int, logits_to_keep: int | Tensor, device: torch.device) -> Tensor:
    """The rows that get logits [L]: the last `logits_to_keep`, all for 0, or those that a tensor
    names.
    """
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep.to(device) % rows
    return torch.arange(rows, device=device)[-logits_to_keep:]


def read_positions(
    state: State, rows: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, list[int]]:
    """The position of each new row [B, S] (-1: padding) and the real rows per batch row, checked.

    Positions continue the conversation. A new conversation may start at any position that
    `position_ids` names.
    """
    device = state.next_position.device
    real = torch.ones(state.batch, rows, dtype=torch.bool, device=device)
    if attention_mask is not None:
        real = _new_columns(state, rows, attention_mask).to(device)
    if rows > 1 or device.type == "cpu":
        _check_padding(state, real)
    start = state.next_position
    if position_ids is not None and state.columns == 0:
        first = real.int().argmax(1, keepdim=True)
        start = position_ids.expand(state.batch, rows).to(device).gather(1, first)
        if state.plan.chunked and bool((start != 0).any()):
            raise InputError(
                "position_ids do not begin at 0, but this model counts chunks from its first token"
            )
    positions = (start + real.long().cumsum(1) - 1).masked_fill(~real, -1)
    if position_ids is not None and (rows > 1 or device.type == "cpu"):
        given = position_ids.expand(state.batch, rows).to(device).masked_fill(~real, -1)
        if not torch.equal(given, positions):
            raise InputError(
                "position_ids do not continue by one from row to row (packed sequences, or "
                "positions that restart): "
                "give each sequence a row of its own, padded on the left"
            )
    return positions, real.sum(1).tolist() if rows > 1 else [1] * state.batch


def _new_columns(state: State, rows: int, attention_mask: Tensor) -> Tensor:
    """The part of a 2-D mask that belongs to the new rows."""
    if attention_mask.dim() != 2:
        raise InputError(
            f"attention_mask must be [batch, length], this one is {list(attention_mask.shape)}"
        )
    columns = attention_mask.shape[1]
    if attention_mask.shape[0] != state.batch or columns not in (rows, state.columns + rows):
        raise InputError(
            f"attention_mask is {list(attention_mask.shape)}: expected [{state.batch}, {rows}], or "
            f"[{state.batch}, {state.columns + rows}] with the {state.columns} columns already in "
            "the cache"
        )
    return attention_mask[:, -rows:].bool()


def _check_padding(state: State, real: Tensor) -> None:
    """Refuse rows that are padded on the right, in the middle, or entirely."""
    if not bool(real[:, -1].all()):
        row = int((~real[:, -1]).nonzero()[0])
        raise InputError(
            f"row {row} is padded on the right: kvfx reads left-padded batches "
            "(tokenizer.padding_side = 'left')"
        )
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise InputError(
            "attention_mask has holes: padding must be one block on the left of each row"
        )
