"""What caches cost in quality: kvfx at the bytes of its peers, and the peers, in one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from examples.benchmarks.contenders import Way
from examples.benchmarks.peer_process import PeerProcess
from kvfx.bench.machine import today
from kvfx.errors import InputError
from kvfx.eval.answers import Retrieval
from kvfx.eval.fidelity import Fidelity, WindowScore
from kvfx.eval.results import Measurement, Results

# relative: two versions of transformers add in another order
AGREE = 1e-3
Tell = Callable[[str], None]


def measure_peer(
    start: Callable[[], PeerProcess],
    ways: Sequence[Way],
    dense: Sequence[Measurement],
    results: Results,
) -> list[Measurement]:
    """The ways of one peer at every task that `dense`, kvfx's own dense cache, was measured at;
    what `results` holds is not measured again, and the peer is not started for nothing.
    """
    asked = [(base, way, replace(base.setting, policy=way.code)) for base in dense for way in ways]
    missing = [(base, way) for base, way, setting in asked if results.find(setting) is None]
    if missing:
        peer = start()
        try:
            for base in dense:
                turn = [way for each, way in missing if each is base]
                _measure(peer, turn, base, results)
        finally:
            peer.close()
    found = (results.find(setting) for _, _, setting in asked)
    return [measurement for measurement in found if measurement is not None]


def _measure(peer: PeerProcess, ways: Sequence[Way], base: Measurement, results: Results) -> None:
    if not ways:
        return
    task = base.setting.task
    answer = peer.ask("score", task=task, ways=[dict(way.given) for way in ways])
    for way in ways:
        if way.label in answer["refused"]:
            results.refused[f"{way.label} at {task}"] = answer["refused"][way.label]
    for way in ways:
        if way.label not in answer["scores"]:
            continue
        scores = scores_of(answer["scores"][way.label], answer["bytes"][way.label], base)
        results.add(
            Measurement(
                replace(base.setting, policy=way.code),
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
