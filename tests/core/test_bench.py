"""The decode bench: checked first, in turns, and honest about what cannot run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvfx.bench import contenders, decode
from kvfx.bench.clock import Clock
from kvfx.bench.contenders import HF_DEFAULT, Contender, Generated
from kvfx.bench.decode import DecodeBench, bench_decode, text_ids
from kvfx.testing.tiny import VOCAB, tiny_llama


class Tokenizer:
    """Characters as tokens of the tiny models."""

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % (VOCAB - 3) for letter in text]}


LETTERS: Any = Tokenizer()


def run_bench(model, *, told=None, **changes) -> DecodeBench:
    options = {
        "lengths": (16, 48),
        "policies": ("full", "streaming-50%"),
        "new_tokens": 3,
        "rounds": 2,
        "compile": False,
        "cold": True,
        "tell": [].append if told is None else told.append,
        **changes,
    }
    return bench_decode("tiny", model, LETTERS, **options)


@pytest.fixture(scope="module")
def measured() -> DecodeBench:
    return run_bench(tiny_llama())


def test_every_contender_at_every_length(measured):
    names = [HF_DEFAULT, "kvfx full", "kvfx streaming-50%"]
    assert [(row.length, row.contender) for row in measured.rows] == [
        (length, name) for length in (16, 48) for name in names
    ]
    for row in measured.rows:
        assert row.refusal == ""
        assert 0 < row.p25_ms <= row.median_ms <= row.p75_ms
        assert row.prefill_ms > 0
        assert row.cold_seconds > 0
        assert (row.ratio == 1.0) or row.contender != HF_DEFAULT


def test_bytes_are_measured(measured):
    bytes_of = {(row.contender, row.length): row.cache_bytes for row in measured.rows}
    # 48 tokens and the 3 of 4 new ones that were read; 2 layers, k and v, 2 heads of 16 floats
    assert bytes_of[HF_DEFAULT, 48] == (48 + 3) * 2 * 2 * 2 * 16 * 4
    assert bytes_of["kvfx streaming-50%", 48] < bytes_of["kvfx full", 48]


def test_text_says_where_and_how(measured):
    text = str(measured)
    for word in (
        "tiny in float32 on ",
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        "2 interleaved rounds of 3 tokens",
        "an empty Inductor cache",
        "p25-p75",
        "kvfx streaming-50%",
    ):
        assert word in text
    assert "maybe warm" in str(replace(measured, cold_compile=False))


def test_json(measured):
    data = json.loads(json.dumps(measured.to_dict()))
    assert data["rows"][1]["contender"] == "kvfx full"
    assert data["versions"]["torch"] == torch.__version__


def stub(name: str, tokens: list[int], logits: float = 0.0, log: list | None = None) -> Contender:
    """A contender that answers at once."""

    def generate(ids, count):
        if log is not None:
            log.append(name)
        clock = Clock()
        for _ in range(count + 1):
            clock.put(ids)
        return Generated(tokens, torch.tensor([logits]), 1, clock)

    return Contender(name, generate)


def race(*racing: Contender):
    return decode._bench_length(racing, torch.ones(1, 5, dtype=torch.int64), 2, 3, [].append)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (stub("kvfx full", [1, 2, 4]), "wrong: its 8 greedy tokens are not the dense model's"),
        (stub("HF static + compile", [1, 2, 4]), "wrong: its 8 greedy tokens"),
        (stub("kvfx kivi", [2, 2, 3]), "wrong: its first token is not the dense model's"),
        (stub("kvfx kivi", [1, 2, 3], float("nan")), "wrong: logits are not finite"),
    ],
    ids=lambda value: value.name if isinstance(value, Contender) else "",
)
def test_a_wrong_contender_is_not_timed(wrong, reason):
    rows = race(stub(HF_DEFAULT, [1, 2, 3]), wrong)
    assert rows[0].refusal == ""
    assert rows[1].refusal.startswith(reason)
    assert (rows[1].median_ms, rows[1].ratio, rows[1].cache_bytes) == (None, None, None)


def test_a_lossy_policy_may_continue_otherwise():
    assert race(stub(HF_DEFAULT, [1, 2, 3]), stub("kvfx kivi", [1, 5, 6]))[1].refusal == ""


def test_a_contender_that_cannot_run_says_why():
    def fails(ids, count):
        raise RuntimeError("no compiler\nat all")

    rows = race(stub(HF_DEFAULT, [1, 2, 3]), Contender("HF static + compile", fails))
    assert rows[1].refusal == "cannot run: RuntimeError: no compiler"
    bench = DecodeBench("m", "d", "f", 1, {}, True, 1, 1, tuple(rows))
    assert "not timed: HF static + compile at 5: cannot run: RuntimeError: no compiler" in str(
        bench
    )


def test_the_default_has_to_run():
    def fails(ids, count):
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        race(Contender(HF_DEFAULT, fails))


def test_contenders_take_turns():
    log: list[str] = []
    race(stub(HF_DEFAULT, [1], log=log), stub("kvfx a", [1], log=log), stub("kvfx b", [1], log=log))
    # two calls each to warm up and to check, then three rounds with another first one each
    assert log[6:] == [
        *(HF_DEFAULT, "kvfx a", "kvfx b"),
        *("kvfx a", "kvfx b", HF_DEFAULT),
        *("kvfx b", HF_DEFAULT, "kvfx a"),
    ]


def test_a_broken_rewrite_is_found(monkeypatch):
    real = contenders._generate

    def off_by_one(model, ids, tokens, options):
        found = real(model, ids, tokens, options)
        shifted = type(model).__name__ == "CompressedModel"
        return replace(found, tokens=[token + shifted for token in found.tokens])

    monkeypatch.setattr(contenders, "_generate", off_by_one)
    rows = run_bench(tiny_llama(), lengths=(16,), policies=("full",)).rows
    assert [bool(row.refusal) for row in rows] == [False, True]


def test_progress_is_told():
    told: list[str] = []
    run_bench(tiny_llama(layers=1), told=told, lengths=(16,), policies=("full",), rounds=1)
    assert told[0] == "preparing contender 1 of 2"
    assert "16 tokens: round 1 of 1, kvfx full" in told


def test_inductor_cache_is_put_back(monkeypatch):
    monkeypatch.setenv(decode.CACHE_VARIABLE, "mine")
    with decode._inductor_cache(True):
        assert os.path.isdir(os.environ[decode.CACHE_VARIABLE])
    assert os.environ[decode.CACHE_VARIABLE] == "mine"
    monkeypatch.delenv(decode.CACHE_VARIABLE)
    with decode._inductor_cache(True):
        assert decode.CACHE_VARIABLE in os.environ
    assert decode.CACHE_VARIABLE not in os.environ
    with decode._inductor_cache(False):
        assert decode.CACHE_VARIABLE not in os.environ


def test_text_is_long_enough():
    ids = text_ids(LETTERS, 50)
    assert ids.shape == (1, 50)

    class Words(Tokenizer):
        def __call__(self, text):
            return {"input_ids": [7, 8, 9]}

    words: Any = Words()
    assert text_ids(words, 8).tolist() == [[7, 8, 9, 7, 8, 9, 7, 8]]


def test_clock():
    clock = Clock()
    clock.times = [1.0, 1.5, 1.75, 2.5]
    assert (clock.first, clock.steps) == (0.5, [0.25, 0.75])
    clock.times = [1.0, 1.5]
    assert clock.steps == []


@pytest.mark.slow
def test_static_cache_is_a_contender_when_compiling():
    rows = run_bench(tiny_llama(layers=1), lengths=(16,), policies=("full",), compile=True).rows
    assert [row.contender for row in rows] == [HF_DEFAULT, "kvfx full", "HF static + compile"]
    assert [row.refusal for row in rows[:2]] == ["", ""]
