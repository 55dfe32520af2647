"""One peer in an environment of its own, measured as `kvfx eval` measures kvfx; imports no kvfx.

`python peer.py WORKLOAD` reads a request per line and answers in JSON lines: `{"tell": ...}` while
it works, then `{"done": ...}`, or `{"failed": ...}` with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peer_caches import Way, cache_bytes, fill, fill_all, held_by, read
from torch import Tensor
from transformers import AutoModelForCausalLM

PACKAGES = ("torch", "transformers", "kvpress", "optimum-quanto", "hqq")
Tell = Callable[[str], None]
Score = Callable[[Any, list[Way], dict, Any], dict[str, Any]]


def compare(logits: Tensor, dense: Tensor, targets: Tensor) -> Tensor:
    """Per row: both negative log-likelihoods, KL(dense || way), and whether the best differs."""
    found = logits.double().log_softmax(-1)
    kl = (dense.exp() * (dense - found)).sum(-1)
    flips = (dense.argmax(-1) != found.argmax(-1)).double()
    index = targets[:, None]
    return torch.stack((-dense.gather(1, index)[:, 0], -found.gather(1, index)[:, 0], kl, flips))


def score_window(model: Any, ways: list[Way], task: dict, row: list[int]) -> dict[str, Any]:
    """Per way: the means of `compare` over the scored tokens of a window, and the most bytes of its
    cache after any read.
    """
    ids, scored, chunk = torch.tensor(row), task["scored"], task["chunk"]
    # the row that predicts the first scored token is read through the cache as well
    start = len(ids) - scored - 1
    context, rows, targets = ids[:start], ids[start:-1], ids[start + 1 :]
    logits = model(ids[None], use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
    dense = logits.double().log_softmax(-1)
    caches, _ = fill_all(model, ways, context)
    found = {}
    for name, cache in caches.items():
        parts, most = [], cache_bytes(cache)
        for at in range(0, scored, chunk):
            part = slice(at, at + chunk)
            logits = read(model, cache, rows[part], start + at)
            parts.append(compare(logits, dense[part], targets[part]))
            most = max(most, cache_bytes(cache))
        found[name] = torch.cat(parts, 1).mean(1).tolist(), most
    return found


def score_prompt(model: Any, ways: list[Way], task: dict, row: dict) -> dict[str, Any]:
    """Per way: whether all tokens of the answer are the best ones, its negative log-likelihood, and
    the most bytes of its cache after any read.
    """
    del task
    context, question, answer = (
        torch.tensor(row[key], dtype=torch.int64) for key in ("context", "question", "answer")
    )
    caches, after = fill_all(model, ways, context)
    behind = torch.cat((question, answer[:-1]))
    found = {}
    for name, cache in caches.items():
        rows, most = after, cache_bytes(cache)
        if len(behind):
            rows = torch.cat((after, read(model, cache, behind, len(context), keep=len(answer))))
            most = max(most, cache_bytes(cache))
        log_probs = rows[-len(answer) :].double().log_softmax(-1)
        hit = bool((log_probs.argmax(-1) == answer).all())
        found[name] = (hit, -float(log_probs.gather(1, answer[:, None]).sum())), most
    return found


def tried(one: Score, model: Any, ways: list[Way], task: dict, row: Any) -> tuple[dict, dict]:
    """What `one` gives for a row, and why those ways that cannot read it cannot."""
    try:
        return one(model, ways, task, row), {}
    except Exception as error:
        # code of others may fail in any way: each way alone says which one did
        if len(ways) == 1:
            return {}, {ways[0]["name"]: f"{type(error).__name__}: {str(error)[:300]}"}
    parts = [tried(one, model, [way], task, row) for way in ways]
    found = {name: value for part, _ in parts for name, value in part.items()}
    return found, {name: reason for _, part in parts for name, reason in part.items()}


def same_cache(model: Any, ways: list[Way], task: dict, ids: Tensor) -> dict[str, bool]:
    """Per way: True, after a proof that the shared pass over `ids` [S] gives the peer's cache."""
    del task
    for name, shared in fill_all(model, ways, ids)[0].items():
        own, _ = fill(model, next(way for way in ways if way["name"] == name), ids)
        pairs = list(zip(held_by(shared), held_by(own), strict=True))
        if not pairs or not all(torch.equal(*pair) for pair in pairs):
            raise RuntimeError("one dense pass for all does not give the cache of the peer")
    return {way["name"]: True for way in ways}


def score(model: Any, tasks: dict[str, Any], tell: Tell, *, task: str, ways: list[Way]) -> dict:
    """Per way, the scores of all inputs of a task and the most bytes of a cache; and the reasons of
    those that cannot read them all.
    """
    given = tasks[task]
    read_text = "windows" in given
    one, rows = (score_window, given["windows"]) if read_text else (score_prompt, given["prompts"])
    first = rows[0][: -given["scored"] - 1] if read_text else rows[0]["context"]
    tell(f"{task}: checking {len(ways)} ways")
    _, refused = tried(same_cache, model, ways, given, torch.tensor(first))
    scores: dict[str, list] = {way["name"]: [] for way in ways}
    sizes: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        able = [way for way in ways if way["name"] not in refused]
        if not able:
            break
        tell(f"{task}: {number} of {len(rows)}")
        found, failed = tried(one, model, able, given, row)
        refused |= {name: f"input {number}: {reason}" for name, reason in failed.items()}
        for name, (numbers, size) in found.items():
            scores[name].append(numbers)
            sizes[name] = max(sizes.get(name, 0), size)
    kept = {name: numbers for name, numbers in scores.items() if name not in refused}
    return {"scores": kept, "bytes": sizes, "refused": refused}


def generate(model: Any, tasks: dict, tell: Tell, *, way: Way, ids: list[int], tokens: int) -> dict:
    """Greedy tokens after the prompt `ids`, and when they came: first the start, then each."""
    del tasks, tell
    times = [time.perf_counter()]
    cache, logits = fill(model, way, torch.tensor(ids))
    said, largest = [int(logits[-1].argmax())], [float(logits.abs().max())]
    times.append(time.perf_counter())
    while len(said) < tokens:
        logits = read(model, cache, torch.tensor(said[-1:]), len(ids) + len(said) - 1)
        said.append(int(logits[-1].argmax()))
        largest.append(float(logits.abs().max()))
        times.append(time.perf_counter())
    finite = all(map(math.isfinite, largest))
    return {"tokens": said, "times": times, "bytes": cache_bytes(cache), "finite": finite}


def installed() -> dict[str, str]:
    """The version of each package that is there, and Python's."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {**found, "torch": str(torch.__version__), "python": platform.python_version()}


@torch.no_grad()
def main() -> None:
    """Answer requests until there are none."""
    # what libraries print must not stand between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(kind: str, value: object) -> None:
        print(json.dumps({kind: value}), file=answers, flush=True)

    with open(sys.argv[1], encoding="utf-8") as file:
        workload = json.load(file)
    torch.set_num_threads(workload["threads"])
    model = AutoModelForCausalLM.from_pretrained(workload["model"], dtype=torch.float32).eval()
    answer("done", {"versions": installed(), "threads": torch.get_num_threads()})
    verbs = {"score": score, "generate": generate}
    for line in sys.stdin:
        request = json.loads(line)
        verb = verbs[request.pop("verb")]
        try:
            answer(
                "done", verb(model, workload["tasks"], functools.partial(answer, "tell"), **request)
            )
        except Exception as error:
            answer("failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
