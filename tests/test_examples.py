"""Every example runs to its end and prints something."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, smollm2, capsys, monkeypatch):
    if example.stem == "lm_eval_task":
        pytest.importorskip("lm_eval")
    monkeypatch.setattr("kvfx.models.load", lambda _: smollm2)
    spec = importlib.util.spec_from_file_location(f"example_{example.stem}", example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_every_example_is_found():
    found = {path.stem for path in EXAMPLES}
    assert found == {
        "quickstart",
        "chat_constant_memory",
        "compose",
        "custom_model",
        "reuse_documents",
        "lm_eval_task",
        "calibrate_budgets",
        "plan_memory",
        "agents",
        "custom_policy",
        "benchmark",
    }
