"""kvfx beside what one would use instead: the same model and tokens, bytes counted the same way.

From the root of the repository: python -m examples.benchmarks.peers --quick
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import kvfx
from examples.benchmarks.contenders import KEPT, Environment, environments
from examples.benchmarks.install import python_of
from examples.benchmarks.peer_process import PeerProcess
from examples.benchmarks.profiles import FULL, QUICK, Profile
from examples.benchmarks.quality import check_inputs, measure_peers
from examples.benchmarks.speed import bench
from examples.benchmarks.workload import at_bytes_of_presses, write_workload
from kvfx import models
from kvfx.errors import InputError, KvfxError
from kvfx.eval.results import Measurement, Results, open_results
from kvfx.eval.run import evaluate
from kvfx.eval.suite import Suite
from kvfx.eval.table import DENSE, headline, sections
from kvfx.eval.text import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = ("quality", "speed")


@dataclass(frozen=True)
class Run:
    """What is measured on which model, the folder of everything that is written, the file of its
    calibration, and who is told what happens.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    out: Path
    calibration: Path
    profile: Profile
    peers: Sequence[Environment]
    tell: Callable[[str], None]

    def start(self, peer: Environment, python: Path) -> PeerProcess:
        """The process of a peer."""
        self.tell(f"starting {peer.name}")
        return PeerProcess(
            python,
            self.out / "workload.json",
            self.out / f"{peer.name}.log",
            lambda text: self.tell(f"{peer.name}, {text}"),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the folder does not hold yet, and print all of it."""
    parser = argparse.ArgumentParser("peers", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as for kvfx eval")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="a folder")
    parser.add_argument("--quick", action="store_true", help="to see that everything works")
    parser.add_argument("--peers", default="all", help="all, none, transformers, kvpress")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--calibration", type=Path, help="a file; by default one is made")
    parser.add_argument("--windows", type=int, help="of perplexity, not those of the profile")
    parser.add_argument("--samples", type=int, help="of each needle task, as well")
    asked = parser.parse_args(arguments)
    try:
        peers = environments(asked.peers)
        sizes = {"windows": asked.windows, "samples": asked.samples}
        given = {name: count for name, count in sizes.items() if count is not None}
        profile = replace(QUICK if asked.quick else FULL, **given)
        model, tokenizer = models.load(asked.model)
        known = asked.calibration or asked.out / "calibration.safetensors"
        run = Run(asked.model, model, tokenizer, asked.out, known, profile, peers, _tell)
        measure(run, PARTS if asked.only is None else (asked.only,))
    except KvfxError as error:
        sys.exit(f"error: {error}")


def measure(run: Run, parts: Sequence[str]) -> None:
    """Write and print the parts of a run."""
    run.out.mkdir(parents=True, exist_ok=True)
    if not (run.out / "model" / "config.json").is_file():
        run.model.save_pretrained(run.out / "model")
    suites = tuple(
        at_bytes_of_presses(suite, run.model, run.tokenizer, KEPT)
        for suite in run.profile.suites(corpus("python"))
    )
    hashes = write_workload(run.out / "workload.json", run.out / "model", suites, run.tokenizer)
    installed = _installed(run)
    if "quality" in parts:
        results = open_results(run.out / "quality.json")
        _show(_quality(run, suites, hashes, installed, results), results)
    if "speed" in parts:
        _speed(run, installed)


def _installed(run: Run) -> list[tuple[Environment, Path]]:
    """The Python of each peer; those that cannot be installed are named and left out."""
    found: list[tuple[Environment, Path]] = []
    for peer in run.peers:
        folder = run.out / "environments" / peer.name
        run.tell(f"{folder}: {' '.join(peer.packages)}")
        try:
            found.append((peer, python_of(folder, peer.packages)))
        except InputError as error:
            print(f"not measured: {peer.name}: {error}")
    if not found:
        print("no peers: kvfx and transformers alone")
    return found


def _quality(
    run: Run,
    suites: Sequence[Suite],
    hashes: dict[str, str],
    installed: Sequence[tuple[Environment, Path]],
    results: Results,
) -> list[Measurement]:
    calibration = _calibration(run)
    found = [
        each
        for suite in suites
        for each in evaluate(
            run.name, run.model, run.tokenizer, suite, results, run.tell, calibration
        )
    ]
    dense = [each for each in found if each.setting.policy == DENSE]
    check_inputs(dense, hashes)
    starts = [(peer, partial(run.start, peer, python)) for peer, python in installed]
    return found + measure_peers(starts, dense, results)


def _calibration(run: Run) -> kvfx.Calibration | None:
    """What the policies read that need it, made once."""
    if not run.profile.calibrated:
        return None
    if not run.calibration.is_file():
        run.tell("calibrating")
        kvfx.calibrate(run.model, tokenizer=run.tokenizer).save(run.calibration)
    return kvfx.Calibration.load(run.calibration)


def _speed(run: Run, installed: Sequence[tuple[Environment, Path]]) -> None:
    profile = run.profile
    path = run.out / "speed.json"
    if path.exists():
        print(f"speed is measured: {path}")
        return
    with contextlib.ExitStack() as running:
        peers = [(peer, run.start(peer, python)) for peer, python in installed]
        for _, process in peers:
            running.callback(process.close)
        found = bench(
            run.name,
            run.model,
            run.tokenizer,
            profile.timed,
            peers,
            lengths=profile.timed_at,
            new_tokens=profile.new_tokens,
            rounds=profile.rounds,
            tell=run.tell,
        )
    path.write_text(json.dumps(found.to_dict(), indent=2) + "\n", "utf-8")
    print(found)


def _show(found: Sequence[Measurement], results: Results) -> None:
    for what, reason in results.refused.items():
        print(f"not measured: {what}: {reason}")
    print(headline(found))
    for section in sections(found):
        print(f"\n{section.markdown()}")


def _tell(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
