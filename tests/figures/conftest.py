"""Results made by hand, small enough to be checked by hand."""

from __future__ import annotations

import json

import pytest

from kvfx.bench.decode import DecodeBench, Row
from kvfx.eval.answers import Retrieval
from kvfx.eval.fidelity import Fidelity, WindowScore
from kvfx.eval.results import Measurement, Results, Setting

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
POLICIES = {
    "Full()": (1000, 1e-12, 10),
    "KIVI(bits=4)": (250, 1e-3, 10),
    "SnapKV(budget=0.25)": (300, 0.25, 2),
    "SnapKV(budget=0.5)": (550, 0.04, 6),
}


def measured(label, task, length, scores, options):
    setting = Setting("tiny", "float32", task, label, length, 10, 0, "python", "abc", options)
    versions = {"kvfx": "0.1.0", "torch": "2.13.0"}
    return Measurement(setting, label, scores, "a CPU", 1, versions, "2026-11-21")


@pytest.fixture(scope="session")
def fidelity():
    """`fidelity(label, length)`: a measurement of perplexity in two windows."""

    def make(label, length=512):
        size, kl, _ = POLICIES[label]
        windows = tuple(WindowScore(8, 2.0, 2.0 + part * kl, part * kl, kl) for part in (0.5, 1.5))
        options = {"scored": 8, "chunk": 4}
        return measured(label, "perplexity", length, Fidelity(windows, size), options)

    return make


@pytest.fixture(scope="session")
def retrieval():
    """`retrieval(label, length, hits)`: ten samples, of which the first are answered."""

    def make(label, length=512, hits=None, task="needle-prose"):
        size, _, known = POLICIES[label]
        count = known if hits is None else hits
        found = tuple(float(at < count) for at in range(10))
        scores = Retrieval(DEPTHS * 2, found, (0.5,) * 10, size)
        options = {"question": "hidden", "template_sha256": "0123"}
        return measured(label, task, length, scores, options)

    return make


@pytest.fixture(scope="session")
def measurements(fidelity, retrieval):
    """Four policies at two tasks."""
    return [make(label) for make in (fidelity, retrieval) for label in POLICIES]


@pytest.fixture(scope="session")
def rows():
    """Three contexts: `kvfx small` is slower, then faster, and smaller from the second one on."""
    times = {
        "HF default": ((10.0, 20.0, 40.0), (100, 200, 400)),
        "kvfx small": ((13.0, 19.0, 30.0), (150, 150, 150)),
        "kvfx full": ((9.0, 15.0, 30.0), (100, 200, 400)),
    }
    made = [
        Row(name, length, ms[at], ms[at] - 1, ms[at] + 1, None, 5.0, 0.0, 1.0, size[at], "")
        for name, (ms, size) in times.items()
        for at, length in enumerate((1000, 2000, 4000))
    ]
    wrong = Row("kvfx wrong", 1000, *(None,) * 5, 0.0, 0.0, None, "wrong: logits are not finite")
    return (*made, wrong)


@pytest.fixture(scope="session")
def bench(rows):
    versions = {"torch": "2.13.0"}
    return DecodeBench("tiny", "a CPU", "float32", 1, "2026-11-22", versions, False, 3, 32, rows)


@pytest.fixture
def results_file(measurements, tmp_path):
    """What `kvfx eval --out` writes."""
    results = Results(tmp_path / "results.json", refused={"KIVI(bits=2)": "head_dim <is> odd"})
    for found in measurements:
        results.add(found)
    return results.path


@pytest.fixture
def bench_file(bench, tmp_path):
    """What `kvfx bench decode --json` prints."""
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench.to_dict()))
    return path
