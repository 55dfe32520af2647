"""docs/architectures.md names every model type once, and at least a hundred work."""

from __future__ import annotations

import transformers

from kvfx.testing.architectures import CHANGES, PARTS, UNBUILT, model_types
from kvfx.testing.architectures_page import PAGE, known_rows, written


def test_the_page_is_what_would_be_written():
    page = PAGE.read_text()
    rows = known_rows(page)
    assert sorted(rows) == sorted(model_types())
    assert page == written(rows)
    assert f"transformers {transformers.__version__} " in page


def test_at_least_a_hundred_work():
    rows = known_rows(PAGE.read_text())
    assert sum("Full" in line for line in rows.values()) >= 100


def test_every_refusal_has_a_reason_that_is_no_failure_of_ours():
    for name, line in known_rows(PAGE.read_text()).items():
        if "Full" not in line:
            assert "differs from the model" not in line, name
            assert "please report" not in line, name


def test_changes_are_of_model_types():
    assert {*CHANGES, *PARTS, *UNBUILT} <= set(model_types())
