"""What tests share: where Triton runs, how Hypothesis draws, the real model, poisoned memory, a
browser.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

# tests need no network, and say so before transformers is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

# without a GPU, kernels are interpreted: read when they are decorated, so before triton is imported
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

import pytest
from hypothesis import HealthCheck, settings

from kvfx import models
from kvfx.testing.poison import poisoned_empty

HAS_GPU = torch.cuda.is_available()
THREADS = 2
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=20,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")
LONGEST = (
    "test_matrix.py",
    "test_long_replies.py",
    "test_smollm2.py",
    "test_layer_budgets.py",
    "test_memory.py",
    "test_eval_smollm2.py",
    "test_examples.py",
    "test_pages.py",
    "test_notebooks.py",
    "test_measured_pages.py",
    "test_record.py",
    "test_offline.py",
)


def pytest_configure() -> None:
    """Fix the threads: sums in another order are other numbers."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker ends alone; what needs a GPU is skipped where
    there is none.
    """
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured with `record_property`: how many values, their sum and maximum."""
    measured: dict[str, list[float]] = {}
    for report in terminalreporter.getreports("passed"):
        if getattr(report, "when", None) == "call":
            for name, value in report.user_properties:
                measured.setdefault(name, []).append(value)
    for name, values in measured.items():
        text = f"{name}: {len(values)} values, sum {sum(values):.4g}, maximum {max(values):.4g}"
        terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Eager `torch.empty` gives NaN (or the largest integer) during the test."""
    with poisoned_empty():
        yield


@pytest.fixture(scope="session")
def smollm2():
    """The demo's model and tokenizer, in fp32; mark the test `slow`, leave the model as it is."""
    model, tokenizer = models.load("smollm2", torch.float32)
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright (no download of browsers)"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install -y --no-install-recommends chromium")
    with playwright.sync_playwright() as play:
        started = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
