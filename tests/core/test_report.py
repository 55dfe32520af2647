"""The report: its data, its table, and the names in it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

import kvfx
from kvfx.policies import KIVI, Full, PerLayer, StreamingLLM, policy_named
from kvfx.report import LENGTH, MissReport, Report, aligned, fold_names, short_policy
from kvfx.testing.tiny import tiny_gemma3, tiny_llama


@pytest.fixture(scope="module")
def mixed() -> Report:
    """The first layer dense, the others on a budget."""
    policy = PerLayer(default=StreamingLLM(budget=0.5), layers={0: Full()})
    return kvfx.explain(tiny_llama(layers=3), policy)


def test_bytes_per_token(mixed):
    dense = 2 * (16 + 16) * 4
    assert [site.before for site in mixed.sites] == [dense] * 3
    # the counters of the live entries weigh something as well
    assert mixed.sites[0].after == pytest.approx(dense, rel=1e-3)
    assert mixed.sites[1].after == pytest.approx(dense * (0.5 + 64 / LENGTH), rel=1e-3)
    assert mixed.before == 3 * dense
    assert mixed.after == sum(site.after for site in mixed.sites)


def test_bytes_are_those_of_the_memory_model():
    fast = kvfx.compress(tiny_llama(), StreamingLLM(budget=0.5), compile=False, verify=False)
    assert fast.report.after * LENGTH == fast.memory(1, LENGTH)


def test_ops_of_each_program(mixed):
    assert mixed.programs == ("prefill", "extend", "decode", "compact")
    dense, streaming = mixed.sites[0].ops, mixed.sites[1].ops
    assert dense["decode"][-2:] == ("append_dense.reference", "attend_dense.reference")
    assert dense["compact"] == ()
    assert "select_recent.reference" in streaming["prefill"]
    assert "select_recent.reference" not in streaming["decode"]


def test_facts(mixed):
    assert mixed.backend == "reference"
    assert (mixed.verified, mixed.misses) == (False, ())
    assert mixed.seconds > 0
    assert (mixed.sites[0].mask, mixed.sites[0].rope) == ("causal", "half 16")


def test_equal_sites_are_one_row(mixed):
    lines = str(mixed).splitlines()
    # a headline, a header, its rule, two kinds of sites, the total, how it was measured
    assert len(lines) == 7
    assert lines[0].startswith("PerLayer(default=StreamingLLM(budget=0.5), layers={0: Full()}): ")
    assert "not verified" in lines[0]
    assert lines[3].startswith("model.layers.0.self_attn ")
    assert lines[3].endswith("256 -> 256")
    assert lines[4].startswith("model.layers.1-2.self_attn  x2  causal  half 16  StreamingLLM(")
    assert lines[4].endswith("256 -> 132")
    assert lines[5] == "all 3 sites: 768 -> 520 bytes/token*, 68% of dense"
    assert "4,096 tokens" in lines[6]


def test_rendered_table_has_the_same_rows(mixed):
    from rich.console import Console

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(mixed.render())
    text = console.export_text()
    for word in ("model.layers.1-2.self_attn  x2", "256 -> 132", "68% of dense", "4,096 tokens"):
        assert word in text


def test_budgets_that_differ_are_drawn(mixed):
    assert mixed.bars() == []
    report = kvfx.explain(tiny_llama(layers=3), "PyramidKV(0.25) | SnapKV()")
    kept = [site.entries or 0 for site in report.sites]
    assert sum(kept) == 3 * LENGTH // 4
    bars = report.bars()
    assert bars == str(report).splitlines()[-4:]
    for bar, entries in zip(bars[1:], kept, strict=True):
        assert bar.endswith(f" {entries:,}")
        assert bar.count("█") == round(40 * entries / max(kept))


def test_windows_are_noted():
    text = str(kvfx.explain(tiny_gemma3(), Full()))
    assert "window 16" in text
    assert "note: model.layers.0-2.self_attn: the model sees 16 tokens: lossless ring" in text


def test_a_site_kept_dense_is_noted():
    text = str(kvfx.explain(tiny_llama(head_dim=16), KIVI(bits=4), strict=False))
    assert "note: model.layers.0-1.self_attn: dense: head_dim 16 is not a multiple" in text


def test_no_rope_is_a_dash(mixed):
    sites = tuple(replace(site, rope="") for site in mixed.sites)
    assert "causal  -     Full()" in str(replace(mixed, sites=sites))


def test_misses_are_folded_with_their_reason(mixed):
    misses = tuple(MissReport("match-rope", f"layers.{i}.attn", "no sine") for i in (0, 1, 3))
    found = Report(mixed.policy, "reference", (), mixed.sites, misses, verified=True, seconds=1.0)
    assert found.remarks()[2:] == ["miss (match-rope): layers.0-1,3.attn: no sine"]
    assert "miss (match-rope): layers.0-1,3.attn: no sine" in str(found)
    assert "verified against the model" in found.headline()


def test_json(mixed):
    data = json.loads(json.dumps(mixed.to_dict()))
    assert data["policy"] == mixed.policy
    assert data["sites"][1]["ops"]["decode"] == list(mixed.sites[1].ops["decode"])
    assert data["bytes_per_token"] == {"before": 768, "after": mixed.after, "length": LENGTH}


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.b"], "a.0.b"),
        (["a.0.b", "a.1.b", "a.2.b"], "a.0-2.b"),
        (["a.9.b", "a.0.b", "a.1.b", "a.10.b"], "a.0-1,9-10.b"),
        (["a.0.b", "a.1.c"], "a.0.b, a.1.c"),
        (["h.0.attn1", "h.1.attn1"], "h.0.attn1, h.1.attn1"),
        (["x", "x", ""], "x, "),
    ],
    ids=str,
)
def test_fold_names(names, folded):
    assert fold_names(names) == folded


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Full(), "Full()"),
        (KIVI(), "KIVI(bits=2)"),
        (KIVI(bits=4), "KIVI(bits=4)"),
        (KIVI(k_bits=8, v_bits=4), "KIVI(k_bits=8, v_bits=4)"),
        (StreamingLLM() | KIVI(bits=8), "StreamingLLM(budget=0.25) | KIVI(bits=8)"),
        (
            PerLayer(KIVI(bits=4), {0: Full(), -1: Full()}),
            "PerLayer(default=KIVI(bits=4), layers={0: Full(), -1: Full()})",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_short_policy_is_read_back(policy, text):
    assert short_policy(policy) == text
    assert policy_named(text) == policy


def test_aligned():
    assert aligned([("a", "b"), ("long", "1"), ("x", "1000")], right=(1,)) == [
        "a        b",
        "----------",
        "long     1",
        "x     1000",
    ]


def test_report_is_data(mixed):
    assert isinstance(mixed.sites[0].ops, Mapping)
    assert kvfx.explain(tiny_llama(layers=3), Full()) != mixed
