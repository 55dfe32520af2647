"""What `kvfx bench kernels` runs: ops on buffers that a policy sized and its store op filled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvfx.cache import Buffer
from kvfx.errors import InputError, UnsupportedShape
from kvfx.geometry import Causal, Site
from kvfx.ops import overload
from kvfx.policies.full import Full
from kvfx.policies.kivi import KIVI
from kvfx.policy import Store

DTYPE = torch.bfloat16
# new rows of extend: a chunk of a conversation, or speculative tokens
EXTENDED = 16
SHAPE = re.compile(r"B(\d+)-H(\d+)-K(\d+)-D(\d+)-T(\d+)(-ragged)?")
FORMATS: dict[str, tuple[Store, ...]] = {
    "dense": (Full(),),
    "kivi": tuple(KIVI(bits=bits, group_size=group) for group in (32, 128) for bits in (8, 4, 2)),
}
VERBS = ("attend", "extend", "store", "append", "flush")
MUTATING = ("store", "append", "flush")
COLUMNS = "score_columns"
DEFAULT_OPS = (
    "attend_dense",
    "attend_kivi",
    "extend_dense",
    "extend_kivi",
    "store_dense",
    "store_kivi",
    "append_dense",
    "append_kivi",
    "flush_kivi",
    COLUMNS,
)


@dataclass(frozen=True)
class Shape:
    """Rows, query heads, KV heads, channels and tokens. Where `ragged`, rows and heads hold
    different numbers of entries: one, and up to `length`.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    ragged: bool

    def __str__(self) -> str:
        sizes = f"B{self.batch}-H{self.heads}-K{self.kv_heads}-D{self.head_dim}-T{self.length}"
        return f"{sizes}-ragged" if self.ragged else sizes


GPU_SHAPES = (
    Shape(8, 32, 8, 128, 32768, False),
    Shape(1, 32, 8, 128, 32768, False),
    Shape(8, 32, 8, 128, 32768, True),
    Shape(8, 32, 8, 128, 4096, False),
    Shape(8, 32, 8, 64, 8192, False),
)
# awkward on purpose, and small enough for Triton's interpreter
CHECKED_SHAPES = (Shape(1, 4, 2, 128, 417, False), Shape(2, 4, 2, 64, 321, True))


@dataclass(frozen=True)
class Case:
    """One op at one shape. `rows` come before `buffers` in its operands.

    `moved` counts the bytes that have to be read and written, `work` the
    floating-point operations where those are the limit.
    """

    op: str
    shape: Shape
    store: Store | None
    site: Site
    rows: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]
    attributes: dict[str, Any]
    moved: int
    work: int

    @property
    def verb(self) -> str:
        """What the op does: attend, extend, store, append, flush, or the name of a score."""
        return self.op if self.store is None else self.op.rsplit("_", 1)[0]

    @property
    def mutates(self) -> bool:
        """Whether the op writes to its buffers."""
        return self.verb in MUTATING

    @property
    def counters(self) -> tuple[int, ...]:
        """Which of the buffers count entries."""
        return tuple(i for i, buffer in enumerate(self.layout.values()) if buffer.counter)

    @property
    def layout(self) -> dict[str, Buffer]:
        """The buffers as the policy sizes them."""
        return {} if self.store is None else self.store.buffers(self.site)

    def cloned(self) -> Case:
        """The same operands elsewhere in memory."""
        rows, buffers = (tuple(x.clone() for x in xs) for xs in (self.rows, self.buffers))
        return replace(self, rows=rows, buffers=buffers)

    def run(self, backend: str, buffers: Sequence[Tensor]) -> Any:
        """Call the op of `backend` on `buffers`."""
        return overload(self.op, backend)(*self.rows, *buffers, **self.attributes)

    def loaded(self, buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The entries that `buffers` hold, by the reference: k, v, live."""
        assert self.store is not None
        attributes = self.store.attributes(self.site)
        return overload(f"load_{self.store.room}", "reference")(*buffers, **attributes)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Shapes as the table prints them, separated by commas."""
    shapes = []
    for part in text.split(","):
        match = SHAPE.fullmatch(part.strip())
        sizes = [] if match is None else [int(size) for size in match.groups()[:5]]
        if match is None or min(sizes) < 1 or sizes[1] % sizes[2]:
            raise InputError(
                f"--shapes {part.strip()!r}: expected rows, query heads, KV heads (which divide "
                "them), channels and tokens, as in B8-H32-K8-D128-T32768 or "
                "B8-H32-K8-D128-T32768-ragged"
            )
        shapes.append(Shape(*sizes, ragged=match[6] is not None))
    return tuple(shapes)


def formats_of(op: str) -> tuple[Store | None, ...]:
    """The formats in which an op is measured; none for an op that is not of this table."""
    verb, _, room = op.rpartition("_")
    if op == COLUMNS:
        return (None,)
    return FORMATS.get(room, ()) if verb in VERBS else ()


def make_case(op: str, shape: Shape, store: Store | None, device: torch.device) -> Case:
    """The operands of one call, from seeded random rows."""
    generator = torch.Generator(device).manual_seed(shape.length)
    site = _site(shape, device)
    if store is None:
        return _columns(op, shape, site, generator)
    reason = store.constraint(site)
    if reason is not None:
        raise UnsupportedShape(reason)
    verb = op.rsplit("_", 1)[0]
    tokens = _tokens(verb, shape, store)
    keep = _keep(shape, tokens, device)
    if verb == "flush":
        # every ring is one entry short of full: the append below decides which are due
        keep = torch.ones_like(keep)
    old = tuple(_random(site, shape, shape.kv_heads, tokens, generator) for _ in range(2))
    new = tuple(_random(site, shape, shape.kv_heads, EXTENDED, generator) for _ in range(2))
    one = (*(x[:, :, :1] for x in new), _alternate(shape, device))
    # one more entry than there are: append writes it
    capacity = store.capacity(tokens + 1, bounded=True)
    buffers = tuple(x.allocate(shape.batch, capacity, device) for x in store.buffers(site).values())
    attributes = store.attributes(site)
    if verb != "store":
        overload(f"store_{store.room}", "reference")(*old, keep, *buffers, **attributes)
    if verb == "flush":
        overload(f"append_{store.room}", "reference")(*one, *buffers, **attributes)
    rows: dict[str, tuple[Tensor, ...]] = {
        "store": (*old, keep),
        "append": one,
        "flush": (),
        "attend": (_random(site, shape, shape.heads, 1, generator), _positions(shape, 1, device)),
        "extend": (
            _random(site, shape, shape.heads, EXTENDED, generator),
            *new,
            _positions(shape, EXTENDED, device),
        ),
    }
    scaled = {"scale": site.scale} if verb in ("attend", "extend") else {}
    moved = _moved(verb, store, site, rows[verb], buffers, keep, one[-1], capacity)
    return Case(op, shape, store, site, rows[verb], buffers, {**scaled, **attributes}, moved, 0)


def _site(shape: Shape, device: torch.device) -> Site:
    width = shape.head_dim
    sizes = (shape.heads, shape.kv_heads, width, width, width**-0.5)
    return Site(0, "bench", *sizes, Causal(), None, DTYPE, device)


def _columns(op: str, shape: Shape, site: Site, generator: torch.Generator) -> Case:
    q = _random(site, shape, shape.heads, shape.length, generator)
    k = _random(site, shape, shape.kv_heads, shape.length, generator)
    # padding is on the left of a prompt
    live = _keep(shape, shape.length, site.device).flip(-1)
    live = live[:, :1].expand(-1, shape.kv_heads, -1).contiguous()
    tokens = live[:, 0].sum(-1).double()
    # two passes over the causal half of the products
    work = 2 * shape.heads * 2 * shape.head_dim * float((tokens * (tokens + 1) / 2).sum())
    moved = q.nbytes + k.nbytes + 4 * live.numel()
    return Case(op, shape, None, site, (q, k, live), (), {"scale": site.scale}, moved, int(work))


def _tokens(verb: str, shape: Shape, store: Store) -> int:
    """Tokens to store; for flush one less than fill a ring."""
    if verb != "flush":
        return shape.length
    due = (n for n in range(shape.length, 0, -1) if store.flush_due(n))
    full = next(due, None)
    if full is None:
        raise UnsupportedShape(f"no ring is full at {shape.length} tokens or fewer")
    return full - 1


def _random(
    site: Site, shape: Shape, heads: int, tokens: int, generator: torch.Generator
) -> Tensor:
    sizes = (shape.batch, heads, tokens, shape.head_dim)
    return torch.randn(sizes, generator=generator, dtype=site.dtype, device=site.device)


def _keep(shape: Shape, tokens: int, device: torch.device) -> Tensor:
    """The first rows are kept: all, or another number for every row and head."""
    pairs = shape.batch * shape.kv_heads
    lengths = torch.full((pairs,), tokens, device=device)
    if shape.ragged:
        lengths = torch.linspace(1, tokens, pairs, device=device).long()
    lengths = lengths.reshape(shape.batch, shape.kv_heads, 1)
    return torch.arange(tokens, device=device) < lengths


def _alternate(shape: Shape, device: torch.device) -> Tensor:
    """Every row and head keeps its one row; where ragged, every other one."""
    pairs = torch.arange(shape.batch * shape.kv_heads, device=device)
    kept = pairs % 2 == 0 if shape.ragged else pairs >= 0
    return kept.reshape(shape.batch, shape.kv_heads, 1)


def _positions(shape: Shape, rows: int, device: torch.device) -> Tensor:
    return (shape.length + torch.arange(rows, device=device)).expand(shape.batch, -1).contiguous()


def _moved(
    verb: str,
    store: Store,
    site: Site,
    rows: tuple[Tensor, ...],
    buffers: tuple[Tensor, ...],
    keep: Tensor,
    one: Tensor,
    capacity: int,
) -> int:
    """Bytes that the op cannot avoid to read and write: live entries in the format they have."""
    has = dict(zip(store.buffers(site), buffers, strict=True))
    exact = (site.head_dim + site.value_dim) * site.dtype.itemsize
    coded = [name for name in has if name.endswith(("_codes", "_scales", "_zeros"))]
    per_entry = sum(has[name].nbytes for name in coded) / (keep[..., 0].numel() * capacity)
    if verb == "append":
        return 2 * exact * int(one.sum())
    if verb == "flush":
        assert isinstance(store, KIVI)
        return int(int(one.sum()) * store.group_size * (exact + per_entry))
    live, old = _held(store, keep.sum(-1))
    entries = int((live - old) * exact + old * per_entry)
    if verb == "store":
        return entries + int(live) * exact
    # the output is as large as the queries
    return entries + rows[0].nbytes + sum(row.nbytes for row in rows if row.is_floating_point())


def _held(store: Store, length: Tensor) -> tuple[float, float]:
    """Entries in all, and how many of them are codes."""
    live = float(length.sum())
    if not isinstance(store, KIVI):
        return live, 0.0
    blocks = torch.div(length - store.residual, store.group_size, rounding_mode="floor")
    return live, float(blocks.clamp(min=0).sum() * store.group_size)
