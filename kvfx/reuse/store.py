"""`SegmentStore`: token ids to canonical keys and values, in memory and on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvfx.errors import InputError, StoreError
from kvfx.reuse.files import SegmentFiles
from kvfx.reuse.fingerprint import Fingerprint, fingerprint
from kvfx.reuse.owner import Owner
from kvfx.reuse.segment import (
    DECODED,
    EXACT_PREFIX,
    REPAIRED,
    Segment,
    Stored,
    check_provenance,
    is_hash,
    provenance_class,
)
from kvfx.reuse.stats import Stats
from kvfx.sizes import parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvfx.model import CompressedModel

# one provenance of every class, the nearest to exact arithmetic first
CLASSES = (EXACT_PREFIX, DECODED, REPAIRED)


class SegmentStore:
    """Segments of the model with `fingerprint`, for the tenant with the secret `salt`.

    `memory` bounds the bytes of tensors held here, `disk` those of all files in `folder`, sizes as
    `parse_size` reads them; both drop what was used least recently. Processes may share a folder,
    with other models and tenants too; one store is for one thread at a time. Segments that come out
    share memory with the store: do not write to their tensors.

    Raises StoreError for a folder that cannot be used, and InputError for a size that is none.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        *,
        memory: int | str = "1GiB",
        folder: str | Path | None = None,
        disk: int | str = "16GiB",
        salt: str = "",
    ) -> None:
        self.stats = Stats()
        self.fingerprint = fingerprint
        self._owner = Owner(fingerprint.digest, salt)
        self._budget = parse_size(memory, "memory")
        self._memory: OrderedDict[str, Segment] = OrderedDict()
        self._nbytes = 0
        self._form: tuple[object, ...] | None = None
        budget = parse_size(disk, "disk")
        self._files = (
            None if folder is None else SegmentFiles(Path(folder), budget, self._owner, self.stats)
        )

    @classmethod
    def of(
        cls,
        fast: CompressedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        memory: int | str = "1GiB",
        folder: str | Path | None = None,
        disk: int | str = "16GiB",
        salt: str = "",
    ) -> SegmentStore:
        """A store for the model that `fast` came from; hashes all its weights."""
        found = _fingerprint(fast, tokenizer)
        return cls(found, memory=memory, folder=folder, disk=disk, salt=salt)

    def check(self, fast: CompressedModel) -> None:
        """Raise a StoreError unless this is a store for the model that `fast` came from, whose
        weights are hashed for that.
        """
        found, held = _fingerprint(fast, None), self.fingerprint
        for what in ("weights", "rope", "dtype"):
            if getattr(found, what) != getattr(held, what):
                raise StoreError(
                    f"the store is of another model: its {what} are not those of this one "
                    "(SegmentStore.of(fast) makes one)"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in memory."""
        return self._nbytes

    @property
    def disk_nbytes(self) -> int:
        """Bytes of all files in the folder; 0 without one."""
        return 0 if self._files is None else self._files.nbytes

    def put(self, segment: Segment) -> str:
        """Store a copy of `segment`, and return its key.

        What is there under the same key stays unless it is at a greater depth. What fits into no
        tier, or cannot be written, is a refusal in `stats`. Raises InputError for a segment whose
        parts do not fit together, StoreError for one of other shapes or dtypes than those before.
        """
        segment.check()
        if self._form is None:
            self._form = segment.form
        if segment.form != self._form:
            raise StoreError(
                "put(): the segment's heads, widths or dtypes are not those of the segments before "
                "it: it is of another model"
            )
        key = self._owner.key(segment.tokens, segment.provenance, segment.context)
        copy = segment.stored()
        held = self._memory.get(key)
        if held is None or held.depth > copy.depth:
            self._hold(key, copy)
        else:
            self._memory.move_to_end(key)
        if self._files is not None:
            self._files.write(key, copy)
        return key

    def get(
        self, tokens: Sequence[int], *, provenance: str | None = None, context: str = ""
    ) -> Segment | None:
        """The segment of exactly these tokens behind `context` (a `context_hash`), or None.

        A `provenance` is only answered by its own class: who asks for EXACT_PREFIX or ISOLATED
        never gets decoded or repaired rows. None takes what there is, the most exact first.
        """
        if provenance is not None:
            check_provenance(provenance)
        for name in CLASSES if provenance is None else (provenance,):
            segment = self._find(self._owner.key(tokens, name, context))
            if segment is not None:
                return self._counted(segment)
        return self._counted(None)

    def find_prefix(self, tokens: Sequence[int]) -> Segment | None:
        """The longest exact segment with nothing before it that `tokens` start with, or None."""
        stored = self._stored()
        lengths = sorted(
            {
                len(facts.tokens)
                for facts in stored.values()
                if provenance_class(facts.provenance) == EXACT_PREFIX and not facts.context
            }
        )
        fitting = [length for length in lengths if length <= len(tokens)]
        for key in reversed(self._owner.prefix_keys(tokens, fitting, EXACT_PREFIX, "")):
            segment = self._find(key) if key in stored else None
            if segment is not None:
                return self._counted(segment)
        return self._counted(None)

    def segments(self) -> list[Stored]:
        """What is stored now, in both tiers, without its tensors."""
        return list(self._stored().values())

    def load(self, key: str) -> Segment | None:
        """The segment under `key`, or None; raises InputError for what is no key."""
        return self._counted(self._find(_checked(key)))

    def remove(self, key: str) -> None:
        """Forget what is under `key`, if anything is; raises InputError for what is no key."""
        self._drop(_checked(key))
        if self._files is not None:
            self._files.remove(key)

    def clear(self) -> None:
        """Forget every segment of this model and tenant; those of others stay."""
        self._memory.clear()
        self._nbytes = 0
        if self._files is not None:
            self._files.clear()

    def _stored(self) -> dict[str, Stored]:
        held = {key: Stored.of(key, segment) for key, segment in self._memory.items()}
        return held if self._files is None else {**self._files.scan(), **held}

    def _find(self, key: str) -> Segment | None:
        """What is under `key`, now the one that was used last in both tiers."""
        held = self._memory.get(key)
        if held is not None:
            self._memory.move_to_end(key)
            if self._files is not None:
                self._files.touch(key)
            return held
        segment = None if self._files is None else self._files.read(key)
        if segment is None:
            return None
        if self._form not in (None, segment.form):
            self.stats.refuse(key, "its heads, widths or dtypes are not those of this model")
            return None
        if segment.nbytes <= self._budget:
            self._hold(key, segment)
        return segment

    def _hold(self, key: str, segment: Segment) -> None:
        """Keep `segment` in memory, in place of those that were used least recently."""
        self._drop(key)
        if segment.nbytes > self._budget:
            if self._files is None:
                self.stats.refuse(
                    key, f"{segment.nbytes:,} bytes do not fit into memory={self._budget:,}"
                )
            return
        while self._nbytes + segment.nbytes > self._budget:
            self._drop(next(iter(self._memory)))
            self.stats.evictions += 1
        self._memory[key] = segment
        self._nbytes += segment.nbytes

    def _drop(self, key: str) -> None:
        segment = self._memory.pop(key, None)
        if segment is not None:
            self._nbytes -= segment.nbytes

    def _counted(self, segment: Segment | None) -> Segment | None:
        if segment is None:
            self.stats.misses += 1
        else:
            self.stats.hits += 1
        return segment


def _fingerprint(fast: CompressedModel, tokenizer: PreTrainedTokenizerBase | None) -> Fingerprint:
    sites = tuple(plan.site for plan in fast.plan.sites)
    return fingerprint(fast.source, tokenizer, sites)


def _checked(key: str) -> str:
    if not is_hash(key):
        raise InputError(f"{key!r} is no key of a segment: put() and segments() give those")
    return key
