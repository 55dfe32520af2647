"""How fast caches decode: transformers, kvfx and the peers, in turns, as `kvfx bench decode`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.benchmarks.contenders import Environment, Way
from examples.benchmarks.peer_process import PeerProcess
from kvfx.bench.clock import Clock
from kvfx.bench.contenders import Contender, Generated, hf_default, hf_static, kvfx_under
from kvfx.bench.decode import (
    DecodeBench,
    bench_length,
    inductor_cache,
    measured_here,
    text_ids,
    why_wrong,
)
from kvfx.bench.machine import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def peer_contender(peer: PeerProcess, way: Way) -> Contender:
    """A way of a peer that takes turns with the others."""

    def generate(ids: Tensor, tokens: int) -> Generated:
        answer = peer.ask("generate", way=dict(way.given), ids=ids[0].tolist(), tokens=tokens)
        clock = Clock()
        clock.times = answer["times"]
        # logits stay where they are: whether they are finite is all that is asked of them
        logits = torch.tensor(0.0 if answer["finite"] else float("nan"))
        return Generated(answer["tokens"], logits, answer["bytes"], clock)

    return Contender(way.label, generate)


def bench(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policies: Sequence[str],
    peers: Sequence[tuple[Environment, PeerProcess]],
    *,
    lengths: Sequence[int],
    new_tokens: int,
    rounds: int,
    tell: Callable[[str], None],
) -> DecodeBench:
    """Time all behind contexts of `lengths` tokens; those that are wrong are refused."""
    with inductor_cache(cold=False):
        contenders = [hf_default(model)]
        for policy in policies:
            tell(f"preparing kvfx {policy}")
            contenders.append(kvfx_under(model, policy, compile=True))
        contenders += [
            peer_contender(peer, way)
            for environment, peer in peers
            for way in environment.ways
            if way.timed
        ]
        contenders.append(hf_static(model))
        rows = [
            row
            for length in lengths
            for row in bench_length(
                contenders,
                text_ids(tokenizer, length).to(model.device),
                new_tokens,
                rounds,
                why_wrong,
                tell,
            )
        ]
    found = _versions(peers)
    return measured_here(name, model, rows, found, cold=False, rounds=rounds, new_tokens=new_tokens)


def _versions(peers: Sequence[tuple[Environment, PeerProcess]]) -> dict[str, str]:
    """The versions of kvfx's environment, and what is another one in those of the peers."""
    found = versions("kvfx", "torch", "transformers")
    for environment, peer in peers:
        for package, version in peer.versions.items():
            if package not in found:
                found[package] = version
            elif found[package] != version:
                found[f"{package} of {environment.name}"] = version
    return found
