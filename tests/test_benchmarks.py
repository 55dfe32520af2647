"""The benchmark beside peers: what runs in their environments gives kvfx's own numbers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from examples.benchmarks import install, peer_process, peers, quality, workload
from examples.benchmarks.contenders import Environment, dynamic, environments, press, quantized
from examples.benchmarks.peer_process import PeerProcess
from examples.benchmarks.profiles import FULL, QUICK, Profile
from examples.benchmarks.speed import peer_contender
from kvfx import KIVI, Full, SnapKV
from kvfx.bench.contenders import hf_default
from kvfx.bench.decode import bench_length, why_wrong
from kvfx.errors import InputError
from kvfx.eval.fidelity import Fidelity
from kvfx.eval.results import open_results
from kvfx.eval.table import sections
from kvfx.testing.tiny import VOCAB, tiny_llama

FOLDER = Path(peer_process.__file__).parent
SMALL = Profile(
    windows=2,
    length=300,
    scored=40,
    samples=3,
    hidden_in=600,
    tasks=("needle-noise",),
    timed_at=(64,),
    new_tokens=4,
    rounds=1,
    policies=("KIVI(bits=4)", "KeyDiff()"),
    timed=(),
)
HERE = Environment("here", ("torch",), (dynamic(), press("SnapKVPress", 0.5, timed=False)))


class Letters:
    """Characters as tokens of the tiny models."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [3 + ord(letter) % (VOCAB - 3) for letter in text]}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(head_dim=32)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    tokenizer: Any = Letters()
    return peers.Run("tiny", model, tokenizer, out, out / "none", SMALL, (HERE,), lambda text: None)


@pytest.fixture(scope="module")
def document(run):
    """The file of a run whose peer is this very environment, which has no kvpress."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "python_of", lambda folder, packages: Path(sys.executable))
        peers.measure(run, ("quality",))
    return json.loads((run.out / "quality.json").read_text())


@pytest.fixture
def caches(monkeypatch) -> Any:
    """The module that peers import from their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("peer_caches")


@pytest.fixture
def peer(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("peer")


def rows(document, task) -> dict[str, Any]:
    found = [row for row in document["measurements"] if row["setting"]["task"] == task]
    return {row["setting"]["policy"]: row for row in found}


def test_dense_numbers_of_a_peer_are_those_of_kvfx(document):
    found = rows(document, "perplexity")
    ours, theirs = found[repr(Full())], found[dynamic().code]
    for mine, other in zip(ours["scores"]["windows"], theirs["scores"]["windows"], strict=True):
        assert other["dense_nll"] == pytest.approx(mine["dense_nll"], rel=1e-6)
        assert other["nll"] == pytest.approx(mine["nll"], rel=1e-6)
        assert other["kl"] == pytest.approx(0, abs=1e-8)
        assert other["flips"] == 0
    found = rows(document, "needle-noise")
    ours, theirs = (found[each]["scores"] for each in (repr(Full()), dynamic().code))
    assert theirs["hits"] == ours["hits"]
    assert theirs["depths"] == ours["depths"]
    assert theirs["nll"] == pytest.approx(ours["nll"], rel=1e-5)


def test_bytes_of_a_peer_are_those_of_its_tensors(document, model):
    read = SMALL.length + SMALL.scored
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    scores = rows(document, "perplexity")[dynamic().code]["scores"]
    assert scores["cache_bytes"] == read * 2 * len(model.model.layers) * heads * width * 4


def test_kvfx_gets_no_more_than_what_presses_take(document, run):
    suites = SMALL.suites(peers.corpus("python"))
    for suite in suites:
        asked = workload.at_bytes_of_presses(suite, run.model, run.tokenizer, (0.25, 0.5))
        found = rows(document, suite.tasks[0])
        evicting = [row for policy, row in found.items() if policy.startswith("KeyDiff")]
        assert len(evicting) == 2
        for row, most in zip(evicting, asked.memory, strict=True):
            assert isinstance(most, int)
            assert 0.7 * most < row["scores"]["cache_bytes"] <= most


def test_what_evicts_has_the_room_that_presses_have():
    asked = SnapKV(budget=0.5) | KIVI(bits=4)
    assert workload.with_room(asked, 7) == SnapKV(budget=0.5, interval=7) | KIVI(bits=4)
    assert workload.with_room(Full(), 7) == Full()


def test_a_row_that_is_missing_has_a_reason(document):
    label = HERE.ways[1].label
    assert "kvpress" in document["refused"][f"{label} at needle-noise"]
    assert not any(row["label"] == label for row in document["measurements"])


def test_the_file_is_one_of_kvfx_eval(document, run):
    results = open_results(run.out / "quality.json")
    tables = sections(results.measurements)
    assert len(tables) == 2
    for table in tables:
        assert {"Full()", dynamic().label} < {row[0] for row in table.rows}


def test_what_is_measured_is_not_measured_again(document, run, monkeypatch):
    dense = [
        row
        for row in open_results(run.out / "quality.json").measurements
        if row.setting.policy == repr(Full())
    ]
    results = open_results(run.out / "quality.json")
    never = lambda: pytest.fail("the peer was started")  # noqa: E731
    found = quality.measure_peers([(replace(HERE, ways=HERE.ways[:1]), never)], dense, results)
    assert [each.label for each in found] == [dynamic().label] * 2


def test_peers_work_at_the_same_time(document, run):
    """Each waits for the other one; what they say is remembered in their order, and they are
    closed.
    """
    both, closed = threading.Barrier(2), []

    class Fake:
        def ask(self, verb, *, task, ways):
            both.wait(timeout=30)
            refused = {way["name"]: "fake" for way in ways}
            return {"scores": {}, "bytes": {}, "refused": refused}

        def close(self):
            closed.append(self)

    dense = [
        row
        for row in open_results(run.out / "quality.json").measurements
        if row.setting.policy == repr(Full())
    ]
    first, second = (press(name, 0.25, timed=False) for name in ("SnapKVPress", "KeyDiffPress"))
    asked: Any = [(replace(HERE, name=way.label, ways=(way,)), Fake) for way in (first, second)]
    results = open_results(None)
    assert quality.measure_peers(asked, dense, results) == []
    tasks = [row.setting.task for row in dense]
    assert list(results.refused) == [
        f"{way.label} at {task}" for task in tasks for way in (first, second)
    ]
    assert len(closed) == 2


def test_another_model_or_other_tokens_are_refused(document, run):
    dense = next(
        row
        for row in open_results(run.out / "quality.json").measurements
        if isinstance(row.scores, Fidelity)
    )
    assert isinstance(dense.scores, Fidelity)
    nll = dense.scores.windows[0].dense_nll
    same = [[window.dense_nll, window.nll, 0, 0] for window in dense.scores.windows]
    assert quality.scores_of(same, 7, dense).cache_bytes == 7
    with pytest.raises(InputError, match="nothing of this peer can be compared"):
        quality.scores_of([[nll + 0.1, nll, 0, 0]] * 2, 1, dense)
    with pytest.raises(InputError, match="nothing of this peer can be compared"):
        quality.check_dense(float("nan"), 20.0)
    quality.check_dense(20.01, 20.0)
    with pytest.raises(InputError, match="other tokens"):
        quality.check_inputs([dense], {"perplexity": "another hash"})


def test_no_peers(run, tmp_path, capsys):
    alone = replace(run, out=tmp_path, peers=())
    peers.measure(alone, ())
    assert "no peers" in capsys.readouterr().out
    assert json.loads((tmp_path / "workload.json").read_text())["tasks"].keys() == {
        "perplexity",
        "needle-noise",
    }


def test_evicted_tokens_are_not_seen_and_positions_stay(model, caches, monkeypatch):
    """A press that drops every other token, against a dense cache under a mask."""
    monkeypatch.setitem(sys.modules, "kvpress", drop_every_other())
    ids = torch.randint(3, VOCAB, (60,))
    way = {"name": "half", "press": {"name": "Half", "start": 4}}
    with torch.no_grad():
        own, _ = caches.fill(model, way, ids[:50])
        shared = caches.fill_all(model, [way, {"name": "dense"}], ids[:50])[0]
        assert shared["half"].get_seq_length() == own.get_seq_length() == 27
        assert shared["dense"].get_seq_length() == 50
        found = caches.read(model, shared["half"], ids[50:], 50)
        assert caches.cache_bytes(own) * 50 == caches.cache_bytes(shared["dense"]) * 27
        seen = torch.ones(1, 60, dtype=torch.int64)
        seen[0, 5:50:2] = 0
        places = torch.arange(50, 60)[None]
        cache = caches.fill(model, {"name": "dense"}, ids[:50])[0]
        expected = model(
            ids[None, 50:], past_key_values=cache, attention_mask=seen, position_ids=places
        )
    assert torch.allclose(found, expected.logits[0], atol=1e-4)
    assert torch.allclose(caches.read(model, own, ids[50:], 50), found, atol=1e-5)


def drop_every_other() -> Any:
    """A module that stands for kvpress: hooks of its own, as those have."""

    class Half:
        def __init__(self, start: int) -> None:
            self.start, self.hooks = start, []

        def post_init_from_model(self, model) -> None:
            pass

        def forward_hook(self, module, given, named, output):
            layer = named["past_key_values"].layers[module.layer_idx]
            length = layer.keys.shape[2]
            kept = [n for n in range(length) if n <= self.start or n % 2 == 0]
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
            return output

        def __call__(self, model):
            self.hooks = [
                layer.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True)
                for layer in model.model.layers
            ]
            return self

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            for hook in self.hooks:
                hook.remove()

    module = ModuleType("kvpress")
    module.__dict__["Half"] = Half
    return module


def test_one_way_that_fails_does_not_stop_the_others(peer):
    def one(model, ways, task, row):
        if any(way["name"] == "bad" for way in ways):
            raise ValueError("sizes do not match")
        return {way["name"]: row for way in ways}

    found, refused = peer.tried(one, None, [{"name": "good"}, {"name": "bad"}], {}, 7)
    assert found == {"good": 7}
    assert refused == {"bad": "ValueError: sizes do not match"}


def test_a_cache_that_is_not_the_peers_own_is_refused(model, peer, caches, monkeypatch):
    real, ids = peer.fill, torch.randint(3, VOCAB, (20,))
    assert peer.same_cache(model, [{"name": "dense"}], {}, ids) == {"dense": True}

    def other(model, way, ids):
        cache, logits = real(model, way, ids)
        cache.layers[-1].values += 1e-3
        return cache, logits

    monkeypatch.setattr(peer, "fill", other)
    with pytest.raises(RuntimeError, match="does not give the cache of the peer"):
        peer.same_cache(model, [{"name": "dense"}], {}, ids)


def test_a_peer_takes_its_turn(document, run, model, monkeypatch):
    """Its tokens are those of `generate`, and it fits into the benchmark of decoding."""
    # `generate` would leave the end out where so many tokens are asked for
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    log = run.out / "turn.log"
    process = PeerProcess(Path(sys.executable), run.out / "workload.json", log, run.tell)
    try:
        contender = peer_contender(process, dynamic())
        ids = torch.randint(3, VOCAB, (1, 64))
        found, expected = contender.generate(ids, 6), hf_default(model).generate(ids, 6)
        assert found.tokens == expected.tokens
        assert len(found.clock.steps) == 5
        timed = bench_length([hf_default(model), contender], ids, 4, 2, why_wrong, run.tell)
        assert [row.refusal for row in timed] == ["", ""]
        assert timed[1].median_ms is not None
        with pytest.raises(InputError, match="kvpress"):
            peer_contender(process, HERE.ways[1]).generate(ids, 6)
    finally:
        process.close()
    with pytest.raises(InputError, match=r"ended with code 1: read .*turn.log"):
        PeerProcess(Path(sys.executable), run.out / "nowhere.json", log, run.tell)


def test_environments_are_made_once(tmp_path, monkeypatch):
    calls = []

    def install_nothing(command, **options):
        calls.append(command)
        if "venv" in command:
            (tmp_path / "peer" / "bin").mkdir(parents=True)
        return SimpleNamespace(returncode=int("broken" in command))

    monkeypatch.setattr(subprocess, "run", install_nothing)
    folder = tmp_path / "peer"
    assert install.python_of(folder, ("torch==2.13.0",)) == folder / "bin" / "python"
    install.python_of(folder, ("torch==2.13.0",))
    assert len(calls) == 2
    with pytest.raises(InputError, match=r"broken cannot be installed: read .*peer.log"):
        install.python_of(folder, ("broken",))
    install.python_of(folder, ("torch==2.13.0",))
    assert len(calls) == 6


def test_names_of_peers():
    assert environments("none") == ()
    assert [each.name for each in environments("all")] == ["transformers", "kvpress"]
    assert [each.name for each in environments("kvpress,kvpress")] == ["kvpress"]
    with pytest.raises(InputError, match="'vllm': choose from all, none, transformers, kvpress"):
        environments("vllm")


def test_names_are_those_that_are_typed():
    assert (
        press("SnapKVPress", 0.25, timed=True).code == "kvpress.SnapKVPress(compression_ratio=0.75)"
    )
    assert quantized("hqq", 2, 1, timed=False).label == "transformers hqq 2-bit"
    for profile in (FULL, QUICK):
        codes = [way.code for each in environments("all") for way in each.ways]
        assert len(set(codes)) == len(codes)
        assert profile.suites(peers.corpus("python"))[1].question == "hidden"
