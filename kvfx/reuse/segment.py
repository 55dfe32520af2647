"""A run of tokens with its keys and values, free of the position at which it was computed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvfx.errors import InputError

EXACT_PREFIX = "exact-prefix"
ISOLATED = "isolated"
DECODED = "decoded"
REPAIRED = "repaired"
# the nearest to exact arithmetic first
PROVENANCES = (EXACT_PREFIX, ISOLATED, DECODED, REPAIRED)
# computed by the whole model behind the tokens of its context, and by nothing else
EXACT = (EXACT_PREFIX, ISOLATED)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Segment:
    """`tokens` (T of them) with what every site computed for them: canonical keys [K, T, D] and
    values [K, T, Dv], one pair per site, all of one floating dtype.

    Canonical keys are those before the rotary embedding, `R(-position) k`. `provenance` is how they
    came to be: EXACT_PREFIX by the whole model, behind the tokens whose `context_hash` is
    `context`; ISOLATED the same behind nothing; DECODED token by token; REPAIRED from reused rows,
    some of them computed again. `depth` counts the approximate reuses between them and exact
    arithmetic: 0 is exact for its context (specs/reuse.md 1.7 P13, 6.1).
    """

    tokens: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    provenance: str
    context: str
    depth: int

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def form(self) -> tuple[tuple[int, int, int, torch.dtype], ...]:
        """KV heads, width of keys, width of values and dtype of every site."""
        return tuple(
            (k.shape[0], k.shape[2], v.shape[2], k.dtype)
            for k, v in zip(self.keys, self.values, strict=True)
        )

    def slice(self, start: int, stop: int) -> Segment:
        """Tokens `start` to `stop` as views of the same tensors; raises InputError unless
        `0 <= start < stop <= T`.

        What stands behind other tokens now has them in its context: a later part of an ISOLATED
        segment is no longer isolated, but exact behind the part before it.
        """
        if not 0 <= start < stop <= len(self.tokens):
            raise InputError(f"slice({start}, {stop}) of a segment of {len(self.tokens)} tokens")
        moved = start > 0 and self.provenance == ISOLATED
        return Segment(
            self.tokens[start:stop],
            tuple(k[:, start:stop] for k in self.keys),
            tuple(v[:, start:stop] for v in self.values),
            EXACT_PREFIX if moved else self.provenance,
            context_hash(self.tokens[:start], self.context),
            self.depth,
        )

    def stored(self) -> Segment:
        """A copy in the main memory that shares nothing and is contiguous."""
        return Segment(
            self.tokens,
            tuple(_copied(k) for k in self.keys),
            tuple(_copied(v) for v in self.values),
            self.provenance,
            self.context,
            self.depth,
        )

    def check(self) -> None:
        """Raise an InputError that says what does not fit: tokens, provenance, shapes or dtypes."""
        for token in self.tokens:
            if not isinstance(token, int) or not 0 <= token < 2**63:
                raise InputError(f"a segment's token {token!r} is no token id")
        if not self.tokens or not self.keys or len(self.keys) != len(self.values):
            raise InputError(
                f"a segment has {len(self.tokens)} tokens, keys of {len(self.keys)} sites and "
                f"values of {len(self.values)}: it needs tokens, and both at every site"
            )
        self._check_provenance()
        for site, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            self._check_site(site, k, v)

    def _check_provenance(self) -> None:
        check_provenance(self.provenance)
        if self.context and not is_hash(self.context):
            raise InputError(
                f"a segment's context is {self.context!r}, not what context_hash gives"
            )
        if not isinstance(self.depth, int) or self.depth < (self.provenance == REPAIRED):
            raise InputError(f"a {self.provenance} segment cannot have depth {self.depth!r}")
        if self.provenance in EXACT and self.depth != 0:
            raise InputError(
                f"a segment at depth {self.depth} was made from approximate ones: it is not "
                f"{self.provenance}"
            )
        if self.provenance == ISOLATED and self.context:
            raise InputError(
                f"a segment behind a context is not {ISOLATED}: it is {EXACT_PREFIX} for it"
            )

    def _check_site(self, site: int, k: Tensor, v: Tensor) -> None:
        fits = k.dim() == v.dim() == 3 and k.shape[:2] == v.shape[:2]
        if not fits or k.shape[1] != len(self.tokens) or not k.numel() or not v.numel():
            raise InputError(
                f"site {site} of a segment of {len(self.tokens)} tokens has keys {list(k.shape)} "
                f"and values {list(v.shape)}: they must be [K, {len(self.tokens)}, D]"
            )
        if k.dtype not in DTYPES or {k.dtype, v.dtype} != {self.keys[0].dtype}:
            raise InputError(
                f"site {site} of a segment has keys of {k.dtype} and values of {v.dtype}: all must "
                f"have the dtype of the first keys, {self.keys[0].dtype}, and be floating"
            )


@dataclass(frozen=True)
class Stored:
    """What is known about a stored segment without its tensors; `nbytes` counts those."""

    key: str
    tokens: tuple[int, ...]
    provenance: str
    context: str
    depth: int
    nbytes: int

    @classmethod
    def of(cls, key: str, segment: Segment) -> Stored:
        """The facts of `segment`, stored under `key`."""
        return cls(
            key,
            segment.tokens,
            segment.provenance,
            segment.context,
            segment.depth,
            segment.nbytes,
        )


def provenance_class(provenance: str) -> str:
    """What is asked for and stored as one thing.

    An isolated segment was computed alone at position 0, so it is the exact prefix, with an empty
    context, of every prompt that starts with it; under that context the two are the same numbers.
    """
    return EXACT_PREFIX if provenance in EXACT else provenance


def check_provenance(provenance: str) -> None:
    """Raise an InputError for a provenance that there is not."""
    if provenance not in PROVENANCES:
        raise InputError(f"provenance {provenance!r} is none of {', '.join(PROVENANCES)}")


def context_hash(tokens: Iterable[int], before: str = "") -> str:
    """The hex hash of a context whose beginning has the hash `before`; "" for no tokens at all.

    A chain over single tokens: however a context is cut into pieces, its hash is the same.
    """
    digest = before
    for token in tokens:
        digest = hashlib.sha256(f"{digest} {int(token)}".encode()).hexdigest()
    return digest


def is_hash(text: str) -> bool:
    """Whether `text` is a SHA-256 in lower-case hex, as keys and contexts are."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
