"""What caches cost in quality: kvfx at the bytes of its peers, and the peers, in one file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from examples.benchmarks.contenders import Environment, Way
from examples.benchmarks.peer_process import PeerProcess
from kvfx.bench.machine import today
from kvfx.errors import InputError
from kvfx.eval.answers import Retrieval
from kvfx.eval.fidelity import Fidelity, WindowScore
from kvfx.eval.results import Measurement, Results, Setting

# relative: two versions of transformers add in another order
AGREE = 1e-3


def measure_peers(
    peers: Sequence[tuple[Environment, Callable[[], PeerProcess]]],
    dense: Sequence[Measurement],
    results: Results,
) -> list[Measurement]:
    """All ways of all peers at every task that `dense`, kvfx's own dense cache, was measured at.
    Peers work at the same time; what `results` holds is not measured again, and no peer is started
    for nothing.
    """
    running: dict[str, PeerProcess] = {}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(max(1, len(peers))) as pool:
        for base in dense:
            asked = []
            for peer, start in peers:
                ways = [way for way in peer.ways if results.find(_setting(base, way)) is None]
                if ways and peer.name not in running:
                    running[peer.name] = start()
                    stack.callback(running[peer.name].close)
                if ways:
                    asked.append((running[peer.name], ways))
            task = base.setting.task
            turns = [
                pool.submit(process.ask, "score", task=task, ways=[dict(way.given) for way in ways])
                for process, ways in asked
            ]
            for (process, ways), turn in zip(asked, turns, strict=True):
                _keep(process, ways, turn.result(), base, results)
    found = (
        results.find(_setting(base, way))
        for peer, _ in peers
        for base in dense
        for way in peer.ways
    )
    return [measurement for measurement in found if measurement is not None]


def _setting(base: Measurement, way: Way) -> Setting:
    return replace(base.setting, policy=way.code)


def _keep(
    peer: PeerProcess,
    ways: Sequence[Way],
    answer: Mapping[str, Any],
    base: Measurement,
    results: Results,
) -> None:
    """Remember what a peer answered: scores, or why a way has none."""
    for way in ways:
        if way.label in answer["refused"]:
            results.refused[f"{way.label} at {base.setting.task}"] = answer["refused"][way.label]
    for way in ways:
        if way.label not in answer["scores"]:
            continue
        scores = scores_of(answer["scores"][way.label], answer["bytes"][way.label], base)
        results.add(
            Measurement(
                _setting(base, way),
                way.label,
                scores,
                device=base.device,
                threads=peer.threads,
                versions=peer.versions,
                date=today(),
            )
        )


def scores_of(rows: Sequence[Any], size: int, base: Measurement) -> Fidelity | Retrieval:
    """What a peer answered, as kvfx holds it; raises an InputError where its dense model is not
    that of kvfx.
    """
    if isinstance(base.scores, Retrieval):
        hits, nll = zip(*rows, strict=True)
        return Retrieval(base.scores.depths, hits, nll, size)
    scored = int(base.setting.options["scored"])
    found = Fidelity(tuple(WindowScore(scored, *row) for row in rows), size)
    check_dense(found.dense_perplexity, base.scores.dense_perplexity)
    return found


def check_dense(found: float, expected: float) -> None:
    """Raise an InputError where a peer reads other tokens or another model than kvfx."""
    if not abs(found / expected - 1) <= AGREE:
        raise InputError(
            f"the dense perplexity is {found:.6g} in the environment of the peer and "
            f"{expected:.6g} in that of kvfx: nothing of this peer can be compared"
        )


def check_inputs(dense: Sequence[Measurement], hashes: Mapping[str, str]) -> None:
    """Raise an InputError where the workload is not what kvfx was measured on."""
    for found in dense:
        task = found.setting.task
        if hashes[task] != found.setting.inputs_sha256:
            raise InputError(f"{task}: the workload holds other tokens than kvfx was measured on")
