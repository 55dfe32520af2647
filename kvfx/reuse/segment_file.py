"""One segment as the bytes of a safetensors file, and the way back that believes nothing."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from typing import BinaryIO

from torch import Tensor

from kvfx.errors import InputError, StoreError
from kvfx.reuse.fingerprint import tensor_bytes
from kvfx.reuse.owner import KIND, Owner
from kvfx.reuse.segment import Segment, Stored

# bytes of text before the tensors: about four million token ids
HEADER_LIMIT = 2**25
# safetensors: the header's length, little-endian
LENGTH_BYTES = 8


def encode(segment: Segment, owner: Owner) -> bytes:
    """The bytes of the file of `segment`; raises StoreError for more tokens than a header holds."""
    from safetensors.torch import save

    tensors = _named(segment)
    facts = {
        "kind": KIND,
        "model": owner.model,
        "tenant": owner.tenant,
        "provenance": segment.provenance,
        "context": segment.context,
        "depth": str(segment.depth),
        "sites": str(len(segment.keys)),
        "nbytes": str(segment.nbytes),
        "tensors": _digest(tensors),
        "tokens": " ".join(map(str, segment.tokens)),
    }
    data = save(tensors, {**facts, "seal": owner.seal(facts)})
    if _header_length(data[:LENGTH_BYTES]) > HEADER_LIMIT:
        raise StoreError(f"{len(segment.tokens)} tokens are more than a file's header may list")
    return data


def decode_facts(file: BinaryIO, key: str, owner: Owner) -> Stored:
    """What the header says, which is what was written: nothing of it, nor the file's size, changed.

    Raises StoreError, which says what is wrong, for everything that is not the file of `key`.
    """
    return _stored(_facts(file, owner), key, owner)


def decode(file: BinaryIO, key: str, owner: Owner) -> Segment:
    """The segment of a file, bit for bit what was written; raises StoreError as `decode_facts`
    does, and for tensors that were changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    facts = _facts(file, owner)
    stored = _stored(facts, key, owner)
    file.seek(0)
    try:
        tensors = load(file.read())
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"its tensors cannot be read: {error}") from error
    sites = range(int(facts["sites"]))
    names = [f"{part}.{site}" for part in ("key", "value") for site in sites]
    if tensors.keys() != set(names) or _digest(tensors) != facts["tensors"]:
        raise StoreError("its tensors are not those that were written")
    parts = [tensors[name] for name in names]
    keys, values = tuple(parts[: len(sites)]), tuple(parts[len(sites) :])
    segment = Segment(stored.tokens, keys, values, stored.provenance, stored.context, stored.depth)
    try:
        segment.check()
    except InputError as error:
        raise StoreError(f"it is no segment: {error}") from error
    return segment


def _named(segment: Segment) -> dict[str, Tensor]:
    pairs = (("key", segment.keys), ("value", segment.values))
    return {f"{part}.{site}": x for part, tensors in pairs for site, x in enumerate(tensors)}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes: equal bytes of another dtype are other numbers."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor_bytes(tensor))
    return content.hexdigest()


def _header_length(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _facts(file: BinaryIO, owner: Owner) -> dict[str, str]:
    """The sealed facts in the header of a whole file."""
    start = file.read(LENGTH_BYTES)
    length = _header_length(start)
    if len(start) == LENGTH_BYTES and length > HEADER_LIMIT:
        raise StoreError(f"its header would be {length:,} bytes, {HEADER_LIMIT:,} are the most")
    text = file.read(length)
    if len(start) < LENGTH_BYTES or len(text) < length:
        raise StoreError("it is truncated: its header is not whole")
    facts = _metadata(text)
    seal = facts.pop("seal", "")
    for name, expected, reason in (
        ("kind", KIND, "it is no segment of this version of kvfx"),
        ("model", owner.model, "it is of another model"),
        ("tenant", owner.tenant, "it is of another tenant"),
    ):
        if facts.get(name) != expected:
            raise StoreError(f"{reason}: its {name} is {facts.get(name, '')[:40]!r}")
    # a text of other characters than ASCII cannot be compared in constant time
    if not seal.isascii() or not hmac.compare_digest(seal, owner.seal(facts)):
        raise StoreError("its header was changed: the seal does not fit")
    expected = LENGTH_BYTES + length + int(facts["nbytes"])
    found = os.fstat(file.fileno()).st_size
    if found != expected:
        raise StoreError(f"it has {found:,} bytes, {expected:,} were written")
    return facts


def _metadata(text: bytes) -> dict[str, str]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"its header cannot be read ({type(error).__name__})") from error
    facts = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(facts, dict) or not all(isinstance(fact, str) for fact in facts.values()):
        raise StoreError("its header has no texts about a segment")
    return facts


def _stored(facts: dict[str, str], key: str, owner: Owner) -> Stored:
    tokens = tuple(map(int, facts["tokens"].split()))
    if owner.key(tokens, facts["provenance"], facts["context"]) != key:
        raise StoreError("it was renamed: its tokens belong to another key")
    return Stored(
        key,
        tokens,
        facts["provenance"],
        facts["context"],
        int(facts["depth"]),
        int(facts["nbytes"]),
    )
