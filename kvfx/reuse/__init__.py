"""Keys and values of earlier prompts in later ones: what is stored, found, trusted and repaired."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfx.reuse.agents import Agents
    from kvfx.reuse.layout import Layout
    from kvfx.reuse.pool import Pool
    from kvfx.reuse.requests import Reply, Request, serve
    from kvfx.reuse.store import SegmentStore
    from kvfx.reuse.template import Slot

__all__ = [
    "Agents",
    "Layout",
    "Pool",
    "Reply",
    "Request",
    "SegmentStore",
    "Slot",
    "serve",
]
HOMES = {
    "Agents": "agents",
    "Layout": "layout",
    "Pool": "pool",
    "Reply": "requests",
    "Request": "requests",
    "SegmentStore": "store",
    "Slot": "template",
    "serve": "requests",
}


def __getattr__(name: str) -> object:
    """The public names, each imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'kvfx.reuse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kvfx.reuse.{HOMES[name]}"), name)
    globals()[name] = value
    return value
