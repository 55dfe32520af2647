"""To whom a stored segment belongs: a model and a tenant, in every key and under every file."""

from __future__ import annotations

import hashlib
import hmac
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvfx.errors import InputError
from kvfx.reuse.segment import provenance_class

# what a file says that it is; the number changes with its layout and with that of keys
KIND = "kvfx segment 1"


@dataclass(frozen=True)
class Owner:
    """The model with the fingerprint `model`, used by the tenant with the secret `salt`."""

    model: str
    salt: str = field(repr=False)

    @property
    def tenant(self) -> str:
        """A hex hash that tells tenants apart and does not show the salt."""
        return self.seal({"kind": KIND, "tenant": ""})

    @property
    def folder(self) -> str:
        """The name of the folder of all its segments."""
        return self.seal({"kind": KIND, "model": self.model})[:32]

    def seal(self, facts: dict[str, str]) -> str:
        """A hex hash of `facts` that only those who know the salt can make (HMAC-SHA-256)."""
        text = json.dumps(facts, sort_keys=True)
        return hmac.new(self.salt.encode(), text.encode(), hashlib.sha256).hexdigest()

    def key(self, tokens: Sequence[int], provenance: str, context: str) -> str:
        """The key of a segment: a hex hash over owner, class of provenance, context and tokens."""
        return self.prefix_keys(tokens, [len(tokens)], provenance, context)[0]

    def prefix_keys(
        self, tokens: Sequence[int], lengths: Iterable[int], provenance: str, context: str
    ) -> list[str]:
        """The keys of the first tokens, for every one of ascending `lengths`, in one pass."""
        content = hashlib.sha256(
            self.seal(
                {
                    "kind": KIND,
                    "model": self.model,
                    "provenance": provenance_class(provenance),
                    "context": context,
                }
            ).encode()
        )
        raw, keys, start = _token_bytes(tokens), [], 0
        for length in lengths:
            content.update(raw[8 * start : 8 * length])
            keys.append(content.hexdigest())
            start = length
        return keys


def _token_bytes(tokens: Sequence[int]) -> memoryview:
    """Eight bytes per token: no two sequences of tokens have the same."""
    try:
        return memoryview(array("q", tokens)).cast("B")
    except (TypeError, OverflowError) as error:
        raise InputError(f"tokens must be token ids, whole numbers: {error}") from error
