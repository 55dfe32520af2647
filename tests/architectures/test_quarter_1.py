"""Every fourth architecture, from number 0 on: four files, so that two workers share them."""

from __future__ import annotations

import pytest

from kvfx.testing.architectures import model_types
from kvfx.testing.architectures_page import PAGE, known_rows, row
from kvfx.testing.examine import examine


@pytest.mark.parametrize("model_type", model_types()[0::4])
def test_architecture(model_type):
    """It computes what the model computes, or is refused, as the page says."""
    assert row(examine(model_type)) == known_rows(PAGE.read_text()).get(model_type)
