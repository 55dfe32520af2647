"""A compressed model that the tests of the page share, and its page."""

from __future__ import annotations

import pytest

import kvfx
from kvfx.testing.tiny import tiny_llama


@pytest.fixture(scope="session")
def fast():
    policy = kvfx.SnapKV(budget=0.5) | kvfx.KIVI(bits=4)
    return kvfx.compress(tiny_llama(head_dim=32), policy, compile=False, verify=False)


@pytest.fixture(scope="session")
def page(fast, tmp_path_factory):
    """The file of its page."""
    return fast.save_html(tmp_path_factory.mktemp("page") / "page.html")
