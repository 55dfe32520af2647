"""The benches: checked first, in turns, and honest about what cannot run."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from kvfx.bench import contenders, decode, kernels, throughput
from kvfx.bench.baselines import Baselines
from kvfx.bench.cases import Shape, formats_of, make_case, parse_shapes
from kvfx.bench.checks import why_wrong
from kvfx.bench.clock import Clock
from kvfx.bench.contenders import HF_DEFAULT, Contender, Generated, compressed
from kvfx.bench.decode import DecodeBench, bench_decode, text_ids
from kvfx.bench.fill import at_random, by_prefill, filled_contenders
from kvfx.bench.kernels import KernelBench, bench_kernels
from kvfx.bench.random_weights import SHAPES, random_model, without_weights
from kvfx.bench.roofline import LAUNCHES, SETS, Rates, replayed_us, rounds_of, sets_beyond
from kvfx.bench.throughput import (
    ThroughputBench,
    allowed_deviation,
    bench_random,
    deviation,
    largest_batch,
    random_ids,
)
from kvfx.errors import InputError, ModelNotFound, UnsupportedOperation, UnsupportedShape
from kvfx.op_table import OPS
from kvfx.policies.full import Full
from kvfx.policies.kivi import KIVI
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
    # the same entries, and how many there are: one int32 per layer and head
    assert bytes_of["kvfx full", 48] == bytes_of[HF_DEFAULT, 48] + 2 * 2 * 4
    # what is evicted every 64 tokens keeps all of so few
    assert bytes_of["kvfx streaming-50%", 48] == bytes_of["kvfx full", 48]


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
    ids = torch.ones(1, 5, dtype=torch.int64)
    return decode.bench_length(racing, ids, 2, 3, decode.why_wrong, [].append)


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
    bench = DecodeBench("m", "d", "f", 1, "2026-11-22", {}, True, 1, 1, tuple(rows))
    assert "not timed: HF static + compile at 5: cannot run: RuntimeError: no compiler" in str(
        bench
    )


def test_generated_is_what_generate_gives():
    model: Any = tiny_llama(layers=1)
    ids = torch.arange(3, 12)[None]
    expected = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 9:]
    found = contenders.generated(model, ids, 4, {})
    assert found.tokens == expected.tolist()
    assert found.logits.shape == (4, 1, VOCAB)
    assert contenders.generated(model, ids.expand(2, -1), 4, {}).logits.numel() == 0


def test_bytes_of_quantized_entries():
    class Packed:
        keys = torch.zeros(3)
        values = None
        _quantized_keys = (torch.zeros(5, dtype=torch.uint8), {"scale": torch.zeros(1), "axis": 0})
        _quantized_values = torch.zeros(2)

    class Layers:
        layers = (Packed(),)

    assert contenders.cache_bytes(Layers()) == 12 + 5 + 4 + 8


def test_the_default_has_to_run():
    def fails(ids, count):
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        race(Contender(HF_DEFAULT, fails))


def test_memory_that_is_too_small_is_no_failure():
    def fails(ids, count):
        raise torch.OutOfMemoryError

    racing = [Contender(HF_DEFAULT, fails), stub("kvfx kivi", [1, 2, 3])]
    rows = race(*racing)
    assert [row.refusal for row in rows] == ["does not fit into memory", ""]
    assert rows[1].ratio is None
    # another length may fit
    assert racing[0].refusal == ""


def test_contenders_take_turns():
    log: list[str] = []
    race(stub(HF_DEFAULT, [1], log=log), stub("kvfx a", [1], log=log), stub("kvfx b", [1], log=log))
    # one call more for each in the first round, to warm up; then another one is the first each time
    assert log == [
        *(name for name in (HF_DEFAULT, "kvfx a", "kvfx b") for _ in range(2)),
        *("kvfx a", "kvfx b", HF_DEFAULT),
        *("kvfx b", HF_DEFAULT, "kvfx a"),
    ]


def test_a_broken_rewrite_is_found(monkeypatch):
    real = contenders.generated

    def off_by_one(model, ids, tokens, options):
        found = real(model, ids, tokens, options)
        shifted = type(model).__name__ == "CompressedModel"
        return replace(found, tokens=[token + shifted for token in found.tokens])

    monkeypatch.setattr(contenders, "generated", off_by_one)
    rows = run_bench(tiny_llama(), lengths=(16,), policies=("full",)).rows
    assert [bool(row.refusal) for row in rows] == [False, True]


def test_progress_is_told():
    told: list[str] = []
    run_bench(tiny_llama(layers=1), told=told, lengths=(16,), policies=("full",), rounds=1)
    assert told[0] == "preparing contender 1 of 2"
    assert "16 tokens: round 1 of 1, kvfx full" in told


def test_inductor_cache_is_put_back(monkeypatch):
    monkeypatch.setenv(decode.CACHE_VARIABLE, "mine")
    with decode.inductor_cache(True):
        assert os.path.isdir(os.environ[decode.CACHE_VARIABLE])
    assert os.environ[decode.CACHE_VARIABLE] == "mine"
    monkeypatch.delenv(decode.CACHE_VARIABLE)
    with decode.inductor_cache(True):
        assert decode.CACHE_VARIABLE in os.environ
    assert decode.CACHE_VARIABLE not in os.environ
    with decode.inductor_cache(False):
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


CPU = torch.device("cpu")
EVEN = Shape(1, 4, 2, 64, 161, False)
RAGGED = Shape(2, 4, 2, 64, 161, True)


def check(monkeypatch, *, interpreted: bool, ops, shapes=(EVEN, RAGGED)) -> KernelBench:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    return bench_kernels(ops=ops, shapes=shapes, check_only=True, tell=[].append)


def text_of(bench: KernelBench) -> str:
    """The table as a terminal with colors shows it."""
    console = Console(width=200, force_terminal=True, color_system="standard", file=StringIO())
    console.print(bench.render())
    return console.file.getvalue()


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU where there is one")


@no_gpu
def test_kernels_are_checked_without_a_gpu(monkeypatch):
    bench = check(monkeypatch, interpreted=False, ops=None)
    assert bench.backend == "reference"
    assert not bench.failed
    assert {row.op for row in bench.rows} == {op for op in kernels.DEFAULT_OPS if op in OPS}
    assert {row.us for row in bench.rows} == {None}
    assert all(row.moved > 0 for row in bench.rows if not row.refused)
    # group 128 does not fit 64 channels
    assert {row.format for row in bench.rows if row.refused} == {
        f"{bits} bit, group 128" for bits in (8, 4, 2)
    }
    assert "refused: head_dim 64 is not a multiple of group_size 128" in text_of(bench)
    assert "\x1b[31m" not in text_of(bench)
    assert "checked, not timed" in bench.headline()
    assert bench.date in bench.headline()
    assert f"torch {torch.__version__}" in bench.headline()


@no_gpu
@pytest.mark.parametrize(
    ("op", "where", "reason"),
    [
        ("attend_kivi", "kvfx.kernels.kivi.reference.attend", "error"),
        ("extend_dense", "kvfx.kernels.dense.reference.extend", "error"),
        ("store_kivi", "kvfx.kernels.kivi.reference.store", "away from their rows"),
        ("store_dense", "kvfx.kernels.dense.reference.store", "away from their rows"),
    ],
)
def test_a_wrong_definition_is_red(monkeypatch, op, where, reason):
    module, name = where.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def broken(first, *rest, **attributes):
        # an extended row is not to be mistaken for one that filled the cache
        return real(first * 1.25, *rest, **attributes)

    case = make_case(op, EVEN, formats_of(op)[0], CPU)
    assert why_wrong(case, "reference") == ""
    monkeypatch.setattr(where, broken)
    assert reason in why_wrong(case, "reference")


def broken_append(k, v, keep, k_cache, v_cache, length):
    """Writes to the first entry."""
    k_cache[:, :, 0], v_cache[:, :, 0] = k[:, :, 0], v[:, :, 0]
    length += keep[..., 0].int()


def deaf_append(k, v, keep, k_cache, v_cache, length):
    """Does not ask which rows are kept."""
    length += 1


def raising_append(*_):
    raise ValueError("out of luck\nand more")


@no_gpu
@pytest.mark.parametrize(
    ("broken", "shape", "reason"),
    [
        (broken_append, EVEN, "k: 4 of 324 entries are not the reference's, by up to "),
        (deaf_append, RAGGED, "length is not what the reference counts"),
        (raising_append, EVEN, "raised ValueError: out of luck"),
    ],
)
def test_a_wrong_kernel_is_red_and_not_timed(monkeypatch, broken, shape, reason):
    monkeypatch.setattr("kvfx.kernels.dense.triton.append", broken)
    bench = check(monkeypatch, interpreted=True, ops=("append_dense",), shapes=(shape,))
    (row,) = bench.rows
    assert bench.failed
    assert reason in row.wrong
    assert row.us is None
    assert "\x1b[31m" in text_of(bench)
    assert "WRONG: " in text_of(bench)


@no_gpu
def test_a_kernel_that_refuses_is_not_wrong(monkeypatch):
    def refuses(*_, **__):
        raise UnsupportedShape("head_dim 64 is too round")

    monkeypatch.setattr("kvfx.kernels.dense.triton.attend", refuses)
    bench = check(monkeypatch, interpreted=True, ops=("attend_dense",), shapes=(EVEN,))
    assert not bench.failed
    assert bench.rows[0].refused == "head_dim 64 is too round"


@no_gpu
def test_kernels_in_the_interpreter(monkeypatch):
    ops = ("attend_dense", "store_dense", "append_dense")
    bench = check(monkeypatch, interpreted=True, ops=ops, shapes=(RAGGED,))
    assert bench.backend == "triton"
    assert [row.wrong for row in bench.rows] == [""] * 3


@no_gpu
def test_timing_needs_a_gpu():
    with pytest.raises(UnsupportedOperation, match=r"no GPU here, .* --check-only checks"):
        bench_kernels(ops=None, shapes=None, check_only=False, tell=[].append)


def test_unknown_ops_are_named(monkeypatch):
    with pytest.raises(InputError, match=r"no op 'attend_dens'; .*for 'rotate'\. There are: att"):
        check(monkeypatch, interpreted=False, ops=("attend_dens", "attend_dense", "rotate"))
    op = replace(OPS["attend_dense"], triton="")
    monkeypatch.setitem(OPS, "attend_dense", op)
    with pytest.raises(InputError, match=r"'attend_dense' has no backend 'triton' \(it has: ref"):
        check(monkeypatch, interpreted=True, ops=("attend_dense",))
    assert kernels._choose(None, "triton")[1][0].startswith("'attend_dense' has no backend")


def test_shapes():
    text = "B8-H32-K8-D128-T32768, B1-H4-K4-D64-T7-ragged"
    shapes = parse_shapes(text)
    assert shapes == (Shape(8, 32, 8, 128, 32768, False), Shape(1, 4, 4, 64, 7, True))
    assert ", ".join(map(str, shapes)) == text
    for wrong in ("B8", "B1-H3-K2-D64-T9", "B0-H1-K1-D64-T9", "B1-H1-K1-D64-T9-rugged"):
        with pytest.raises(InputError, match=r"--shapes .*: expected rows, query heads"):
            parse_shapes(wrong)


def test_moved_bytes():
    # 161 tokens, 2 heads, 64 channels of bf16, k and v; the query and the output
    dense = 161 * 2 * 64 * 2 * 2
    assert make_case("attend_dense", EVEN, Full(), CPU).moved == dense + 2 * 4 * 64 * 2
    assert make_case("store_dense", EVEN, Full(), CPU).moved == 2 * dense
    assert make_case("append_dense", EVEN, Full(), CPU).moved == 2 * 2 * 64 * 2 * 2
    # one block of 32 tokens is codes: 4 bits, and a scale and a zero of 2 bytes per 32 elements
    coded, exact = 32 * 2 * 64 * 2 * (0.5 + 4 / 32), 129 * 2 * 64 * 2 * 2
    kivi = make_case("attend_kivi", EVEN, KIVI(bits=4), CPU)
    assert kivi.moved == coded + exact + 2 * 4 * 64 * 2
    flush = make_case("flush_kivi", EVEN, KIVI(bits=4), CPU)
    assert flush.moved == coded + 32 * 2 * 64 * 2 * 2
    # 1, 54, 107 and 161 live entries
    ragged = make_case("attend_dense", RAGGED, Full(), CPU)
    assert ragged.buffers[2].flatten().tolist() == [1, 54, 107, 161]
    assert ragged.moved == 323 * 64 * 2 * 2 + 2 * 2 * 4 * 64 * 2


@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=str)
def test_flush_has_something_to_do(shape):
    case = make_case("flush_kivi", shape, KIVI(bits=4), CPU)
    before = case.buffers[-1].clone()
    case.run("reference", case.buffers)
    flushed = (case.buffers[-1] > before).flatten().tolist()
    assert flushed == ([True, True] if shape is EVEN else [True, False] * 2)


def test_sets_are_larger_than_l2():
    assert sets_beyond(50, 10_000) == SETS
    assert sets_beyond(50, 1) == 100
    assert sets_beyond(50, 0) == 100
    for sets in (1, 4, 7, 20, 300):
        assert rounds_of(sets) * sets >= LAUNCHES


def fake_gpu(monkeypatch, launched: list[int]) -> None:
    """Launch once instead of replaying; the time is 5 us, or 2 us for what puts counters back."""

    def replayed(launches):
        for launch in launches:
            launch()
        launched.append(len(launches))
        return [2.0 if "_reset" in launches[0].__qualname__ else 5.0] * 3

    for module in ("kernels", "baselines"):
        monkeypatch.setattr(f"kvfx.bench.{module}.replayed_us", replayed)
        monkeypatch.setattr(f"kvfx.bench.{module}.l2_bytes", lambda device: 10)


def test_time_of_what_moves_counters(monkeypatch):
    launched: list[int] = []
    fake_gpu(monkeypatch, launched)
    case = make_case("append_dense", EVEN, Full(), CPU)
    held = case.buffers[2].clone()
    assert kernels._timed_us(case, "reference") == [3.0] * 3
    assert launched == [SETS, SETS]
    assert torch.equal(case.buffers[2], held)
    read = make_case("attend_dense", EVEN, Full(), CPU)
    assert kernels._timed_us(read, "reference") == [5.0] * 3


def test_counters_are_put_back_before_each_launch(monkeypatch):
    lengths: list[list[int]] = []
    case = make_case("append_dense", EVEN, Full(), CPU)

    def replayed(launches):
        for _ in range(3):
            launches[0]()
            lengths.append(case.buffers[2].flatten().tolist())
        return [1.0]

    fake_gpu(monkeypatch, [])
    monkeypatch.setattr("kvfx.bench.kernels.replayed_us", replayed)
    kernels._timed_us(case, "reference")
    assert lengths == [[162, 162]] * 3 + [[161, 161]] * 3


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    launched: list[int] = []
    fake_gpu(monkeypatch, launched)
    monkeypatch.setattr("kvfx.kernels.dense.triton.append", broken_append)
    row = kernels._row("append_dense", EVEN, Full(), "triton", CPU, Rates(1, 1), Baselines(CPU))
    assert row.wrong
    assert (row.us, row.share, launched) == (None, None, [])


def test_sets_share_no_memory():
    case = make_case("attend_kivi", EVEN, KIVI(bits=4), CPU)
    other = case.cloned()
    for a, b in zip((*case.rows, *case.buffers), (*other.rows, *other.buffers), strict=True):
        assert a.data_ptr() != b.data_ptr()
        assert torch.equal(a, b)


def test_a_timed_row(monkeypatch):
    fake_gpu(monkeypatch, [])
    rates = Rates(copy=2e12, matmul=1e12)
    baselines = Baselines(CPU)
    monkeypatch.setattr("kvfx.bench.baselines._flex", lambda: None)
    row = kernels._row("attend_dense", EVEN, Full(), "reference", CPU, rates, baselines)
    assert (row.us, row.of_sdpa, row.of_flex, row.limit) == (5.0, 1.0, None, "copy")
    assert row.share == pytest.approx(row.moved / 2e12 / 5e-6)
    assert baselines.missing[0].startswith("flex at (1, 4, 2, 64, 161, 1) raised TypeError: ")
    append = kernels._row("append_dense", EVEN, Full(), "reference", CPU, rates, baselines)
    assert (append.us, append.of_sdpa) == (3.0, None)
    bench = KernelBench("d", "triton", "2026-11-21", {}, rates, (row, append), ("this",))
    assert "copy 2,000 GB/s read and written, bf16 matrix product 1 TFLOP/s" in bench.headline()
    for word in (" 5.0 ", "5.0-5.0", f"{row.share:.0%} copy", "1.00x"):
        assert word in text_of(bench)
    assert bench.remarks()[-1] == "skipped: this"
    assert json.loads(json.dumps(bench.to_dict()))["rows"][0]["us"] == 5.0


def test_what_cannot_be_captured_is_not_timed(monkeypatch):
    def fails(launches):
        raise RuntimeError("operation not permitted when stream is capturing")

    fake_gpu(monkeypatch, [])
    monkeypatch.setattr("kvfx.bench.kernels.replayed_us", fails)
    row = kernels._row("attend_dense", EVEN, Full(), "reference", CPU, Rates(1, 1), Baselines(CPU))
    assert row.us is None
    assert row.wrong.startswith("raised RuntimeError: operation not permitted")


def test_column_sums(monkeypatch):
    """The op may not exist yet: a stand-in made of plain softmax."""

    def columns(q, k, live, scale, wrong):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
        score = q.float() @ k.transpose(-1, -2) * scale
        seen = torch.ones(score.shape[-2:], dtype=torch.bool).tril() & live[:, :1, None]
        weight = score.masked_fill(~seen, float("-inf")).softmax(-1)
        sums = weight.masked_fill(~live[:, :1, :, None], 0.0).sum(2)
        return sums.unflatten(1, (live.shape[1], -1)).sum(2) * wrong

    case = make_case("score_columns", RAGGED, None, CPU)
    assert case.work > 0
    for wrong in (1.0, 1.001):
        monkeypatch.setattr(
            "kvfx.bench.cases.overload",
            lambda name, backend, wrong=wrong: lambda *xs, scale: columns(*xs, scale, wrong),
        )
        assert why_wrong(case, "triton").startswith("largest error" if wrong > 1 else "")
        assert bool(why_wrong(case, "triton")) == (wrong > 1)


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    shape = Shape(2, 8, 2, 128, 4096, True)
    ops = ("attend_dense", "append_dense")
    bench = bench_kernels(ops=ops, shapes=(shape,), check_only=False, tell=[].append)
    assert bench.rates is not None
    rows: Any = bench.rows
    for row in rows:
        assert row.wrong == ""
        assert row.us > 0
        assert 0 < row.share < 2
    assert rows[0].of_sdpa > 0


@pytest.mark.gpu
def test_replay_takes_turns():
    counters = [torch.zeros(1, device="cuda") for _ in range(SETS)]
    times = replayed_us([lambda x=x: x.add_(1) for x in counters])
    assert all(time > 0 for time in times)
    assert len({int(x) for x in counters}) == 1


# parameters of the published checkpoints
@pytest.mark.parametrize(
    ("name", "count", "tied"),
    [
        ("llama-3.1-8b", 8_030_261_248, False),
        ("llama-3.2-1b", 1_235_814_400, True),
        ("llama-3.2-3b", 3_212_749_824, True),
        ("qwen2.5-7b", 7_615_616_512, False),
        ("qwen3-8b", 8_190_735_360, False),
        ("mistral-7b-v0.3", 7_248_023_552, False),
    ],
)
def test_published_shapes(name, count, tied):
    model = without_weights(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.config.tie_word_embeddings == tied
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_every_shape_is_tested():
    assert set(SHAPES) == {
        *("llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "qwen2.5-7b", "qwen3-8b"),
        *("mistral-7b-v0.3", "tiny"),
    }


def test_random_weights():
    before = torch.get_rng_state()
    model, again, other = (random_model("tiny", CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    named = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, named[name])
        spread = parameter.float().std().item()
        assert parameter.eq(1).all() if "norm" in name else spread == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    frequencies = model.model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, 1e4 ** -(torch.arange(16) / 16), rtol=1e-5)


def test_unknown_shape():
    with pytest.raises(ModelNotFound, match=r"'llama-3\.1-7b' is not known: did you mean llama-3"):
        random_model("llama-3.1-7b", CPU, 0)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 6, 66, 99, 1000])
def test_largest_batch(room, most):
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= room

    assert largest_batch(fits, most) == min(room, most)
    assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1
    assert max(tried) <= most


def run_random(fill: str, **changes) -> ThroughputBench:
    options = {
        "lengths": (40,),
        "policies": ("full",),
        "fill": fill,
        "max_batch": 3,
        "new_tokens": 2,
        "rounds": 1,
        "compile": False,
        "cold": False,
        "tell": [].append,
        **changes,
    }
    return bench_random("tiny", **options)


@pytest.mark.parametrize(
    ("fill", "policies"), [("prefill", ("full",)), ("random", ("full", "kivi-4bit"))]
)
def test_random_weights_end_to_end(fill, policies):
    bench = run_random(fill, policies=policies)
    names = [row.step.contender for row in bench.rows]
    assert names[:-1] == [HF_DEFAULT, *(f"kvfx {policy}" for policy in policies)]
    assert names[-1].startswith("HF quantized 4 bit")
    rows: Any = bench.rows[:-1]
    for row in rows:
        assert row.step.refusal == ""
        assert row.step.median_ms > 0
        assert row.largest.batch == 3
        assert row.largest.tokens_per_second == pytest.approx(3e3 / row.largest.median_ms)
        assert row.deviation <= allowed_deviation(layers=2)
        assert row.throughput_ratio > 0
    assert bench.rows[0].deviation == 0
    assert bench.rows[0].step.ratio == bench.rows[0].throughput_ratio == 1
    text = str(bench)
    for word in (
        "tiny with random weights in bfloat16 on ",
        throughput.FILL_NOTES[fill],
        "searched up to 3",
        "tokens/s",
        bench.date,
    ):
        assert word in text
    data = json.loads(json.dumps(bench.to_dict()))
    assert data["rows"][1]["largest"]["batch"] == 3
    assert data["rows"][1]["step"]["contender"] == "kvfx full"


def test_quantized_cache_needs_its_package(monkeypatch):
    monkeypatch.setattr("kvfx.bench.fill._installed", lambda package: False)
    makers = filled_contenders(tiny_llama(), [], at_random, 8, compile=False)
    contender = makers[-1]()
    assert contender.refusal == "neither optimum-quanto nor hqq is installed"


def test_random_entries_are_the_same_everywhere():
    from transformers import DynamicCache

    model = tiny_llama()
    fast, _ = compressed(model, "full", compile=False)
    ids = random_ids(VOCAB, 2, 21)
    dense, cache = DynamicCache(config=model.config), fast.new_cache()
    at_random(model, dense, ids)
    at_random(fast, cache, ids)
    assert cache.get_seq_length() == dense.get_seq_length() == 21
    for layer, buffers in zip(dense.layers, cache.state.buffers, strict=True):
        assert (buffers["length"] == 21).all()
        assert torch.equal(buffers["k_cache"][:, :, :21], layer.keys)
        assert torch.equal(buffers["v_cache"][:, :, :21], layer.values)
    last = ids[:, -1:]
    expected = model(input_ids=last, past_key_values=dense).logits
    assert torch.allclose(fast(input_ids=last, past_key_values=cache).logits, expected, atol=1e-4)


def test_prefill_in_chunks_is_the_prompt(monkeypatch):
    from transformers import DynamicCache

    monkeypatch.setattr("kvfx.bench.fill.CHUNK", 1)
    monkeypatch.setattr("kvfx.bench.fill.LEAST_CHUNK", 8)
    model, ids = tiny_llama(), random_ids(VOCAB, 2, 21)
    chunks, whole = (DynamicCache(config=model.config) for _ in range(2))
    by_prefill(model, chunks, ids)
    model(input_ids=ids, past_key_values=whole)
    for a, b in zip(chunks.layers, whole.layers, strict=True):
        assert torch.allclose(a.keys, b.keys, atol=1e-5)


def test_an_exact_contender_is_judged_by_its_logits():
    judge = throughput._judge_of(layers=2)
    clock = Clock()
    right = Generated([1], torch.tensor([[[3.0, 4.0]]]), 1, clock)
    far = replace(right, logits=torch.tensor([[[3.0, 4.5]]]))
    assert deviation(far, right) == pytest.approx(0.1)
    assert judge(Contender("kvfx full", run_random), right, right) == ""
    wrong = judge(Contender("kvfx full", run_random), far, right)
    assert wrong == "wrong: its logits are 10.0% away from HF default's, 3.8% allowed"
    assert judge(Contender("kvfx kivi-4bit", run_random), far, right) == ""
    broken = replace(right, logits=torch.tensor([[[float("nan"), 4.5]]]))
    assert judge(Contender("kvfx kivi-4bit", run_random), broken, right) == decode.NOT_FINITE


def test_the_largest_batch_is_found_by_running_out_of_memory():
    released: list[int] = []

    def generate(ids, count):
        if ids.shape[0] > 5:
            raise torch.OutOfMemoryError
        clock = Clock()
        clock.times = [0.0, 1.0, 1.5, 2.0]
        return Generated([1], torch.empty(0), 7, clock)

    contender = Contender("kvfx full", generate, release=lambda: released.append(1))
    found = throughput._largest(contender, random_ids(9, 64, 4), CPU, 2, [].append)
    assert (found.batch, found.median_ms, found.tokens_per_second) == (5, 500.0, 10.0)
    assert released

    def never(ids, count):
        raise torch.OutOfMemoryError

    nobody = Contender("kvfx full", never)
    assert throughput._largest(nobody, random_ids(9, 64, 4), CPU, 2, [].append) is None


@pytest.mark.slow
def test_random_weights_with_a_static_cache():
    rows = run_random("random", compile=True, max_batch=1).rows
    assert rows[-1].step.contender == "HF static + compile"
    assert [row.step.refusal for row in (rows[0], rows[1], rows[-1])] == [""] * 3
