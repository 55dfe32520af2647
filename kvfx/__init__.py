"""kvfx: a compiler that rewrites a decoder's attention onto a compressed KV cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfx.compiler import compress, explain
    from kvfx.policies import KIVI, Full, PerLayer, StreamingLLM, policy_named

__version__ = "0.1.0"
__all__ = ["KIVI", "Full", "PerLayer", "StreamingLLM", "compress", "explain", "policy_named"]

HOMES = {
    "compress": "kvfx.compiler",
    "explain": "kvfx.compiler",
    "KIVI": "kvfx.policies",
    "Full": "kvfx.policies",
    "PerLayer": "kvfx.policies",
    "StreamingLLM": "kvfx.policies",
    "policy_named": "kvfx.policies",
}


def __getattr__(name: str) -> object:
    """The public names, each imported when it is first asked for: `kvfx --help` needs no torch."""
    if name not in HOMES:
        raise AttributeError(f"module 'kvfx' has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = value
    return value
