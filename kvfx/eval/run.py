"""The sweep: every policy at every budget, task and length, each prompt read densely once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfx.bench.machine import device_name, today, versions
from kvfx.errors import UnsupportedShape
from kvfx.eval.answers import Prompt, Retrieval, answer_prompt
from kvfx.eval.equal_bytes import at_equal_bytes
from kvfx.eval.fidelity import Fidelity, dense_log_probs, score_window
from kvfx.eval.results import Measurement, Results, Setting
from kvfx.eval.shared_prefill import share_prefill
from kvfx.eval.suite import PERPLEXITY, Suite
from kvfx.eval.tasks import ALL_TASKS
from kvfx.eval.text import digest
from kvfx.policies import Full
from kvfx.policy import Policy
from kvfx.report import short_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvfx.calibration import Calibration
    from kvfx.model import CompressedModel

Scores = Fidelity | Retrieval
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One task at one length: its inputs, and how models are measured on them."""

    setting: Setting
    measure: Callable[[dict[Policy, CompressedModel]], dict[Policy, Scores]]


def evaluate(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    results: Results,
    tell: Tell,
    calibration: Calibration | None = None,
) -> list[Measurement]:
    """Measure what `results` does not hold yet, and give all that the suite asks for.

    The dense cache is always among the policies: it is the ceiling.
    """
    policies = {
        length: (Full(), *_policies(model, suite, length, results, calibration))
        for length in suite.lengths
    }
    jobs = _jobs(name, model, tokenizer, suite, tell)
    every = [(job, policy) for job in jobs for policy in policies[job.setting.length]]
    missing = {
        (number, policy): _setting(job, policy)
        for number, job in enumerate(jobs)
        for policy in policies[job.setting.length]
        if results.find(_setting(job, policy)) is None
    }
    asked = list(dict.fromkeys(policy for _, policy in missing))
    models = _compressed(model, asked, results, tell, calibration)
    for number, job in enumerate(jobs):
        turn = {each: fast for each, fast in models.items() if (number, each) in missing}
        for policy, scores in job.measure(turn).items() if turn else ():
            setting = missing[number, policy]
            results.add(_measured(setting, short_policy(policy), scores, model.device))
    found = (results.find(_setting(job, policy)) for job, policy in every)
    return [measurement for measurement in found if measurement is not None]


def _policies(
    model: PreTrainedModel,
    suite: Suite,
    length: int,
    results: Results,
    calibration: Calibration | None,
) -> tuple[Policy, ...]:
    """What is measured at a length, besides the dense cache."""
    chosen = tuple(dict.fromkeys(policy for policy in suite.policies if policy != Full()))
    if not suite.memory:
        return chosen
    return at_equal_bytes(
        model,
        chosen,
        suite.memory,
        # what is scored is read as well
        tokens=length + suite.scored + 1,
        calibration=calibration,
        refused=results.refused,
    )


def _jobs(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    tell: Tell,
) -> list[Job]:
    make = {True: _fidelity_job, False: _answers_job}
    jobs = []
    for task in suite.tasks:
        for length in suite.lengths:
            tell(f"making {task} at {length} tokens")
            setting = Setting(
                model=name,
                dtype=str(model.dtype).removeprefix("torch."),
                task=task,
                policy="",
                length=length,
                samples=0,
                seed=suite.seed,
                text=suite.text.name,
                inputs_sha256="",
                options={},
            )
            jobs.append(make[task == PERPLEXITY](setting, model, tokenizer, suite, tell))
    return jobs


def _fidelity_job(setting: Setting, model: Any, tokenizer: Any, suite: Suite, tell: Tell) -> Job:
    ids = suite.texts(tokenizer, setting.length)
    setting = replace(
        setting,
        samples=suite.windows,
        inputs_sha256=digest(ids.tolist()),
        options={"scored": suite.scored, "chunk": suite.chunk},
    )
    title = f"perplexity at {setting.length} tokens"
    return Job(setting, lambda models: _fidelity(model, models, ids, suite, title, tell))


def _fidelity(
    model: Any,
    models: dict[Policy, CompressedModel],
    ids: Tensor,
    suite: Suite,
    title: str,
    tell: Tell,
) -> dict[Policy, Scores]:
    found: dict[Policy, list] = {policy: [] for policy in models}
    sizes: dict[Policy, int] = {}
    for number, window in enumerate(ids.to(model.device), 1):
        tell(f"{title}: window {number} of {len(ids)}, dense")
        dense = dense_log_probs(model, window, suite.scored)
        for policy, fast in models.items():
            tell(f"{title}: window {number} of {len(ids)}, {short_policy(policy)}")
            score, cache = score_window(fast, window, dense, chunk=suite.chunk)
            found[policy].append(score)
            sizes[policy] = cache.nbytes()
    return {policy: Fidelity(tuple(scores), sizes[policy]) for policy, scores in found.items()}


def _answers_job(setting: Setting, model: Any, tokenizer: Any, suite: Suite, tell: Tell) -> Job:
    del model
    task = ALL_TASKS[setting.task]
    prompts = suite.prompts(task, tokenizer, setting.length)
    tokens = [prompt.tokens() for prompt in prompts]
    options: dict[str, int | str] = {
        "question": suite.question,
        "template_sha256": digest(task.template),
    }
    if task.score is not None:
        options["score"] = task.score.__name__
    setting = replace(setting, samples=suite.samples, inputs_sha256=digest(tokens), options=options)
    title = f"{task.name} at {setting.length} tokens"
    return Job(setting, lambda models: _answers(models, prompts, title, tell))


def _answers(
    models: dict[Policy, CompressedModel], prompts: Sequence[Prompt], title: str, tell: Tell
) -> dict[Policy, Scores]:
    found: dict[Policy, list[tuple[float, float]]] = {policy: [] for policy in models}
    sizes: dict[Policy, int] = {}
    for number, prompt in enumerate(prompts, 1):
        for policy, fast in models.items():
            tell(f"{title}: sample {number} of {len(prompts)}, {short_policy(policy)}")
            hit, nll, cache = answer_prompt(fast, prompt)
            found[policy].append((hit, nll))
            sizes[policy] = cache.nbytes()
    depths = tuple(prompt.depth for prompt in prompts)
    return {
        policy: Retrieval(
            depths, tuple(hit for hit, _ in pairs), tuple(nll for _, nll in pairs), sizes[policy]
        )
        for policy, pairs in found.items()
    }


def _compressed(
    model: PreTrainedModel,
    policies: Sequence[Policy],
    results: Results,
    tell: Tell,
    calibration: Calibration | None,
) -> dict[Policy, CompressedModel]:
    """The model under each policy that can serve it, not compiled; prompts are read once for
    all.
    """
    from kvfx.compiler import compress

    models: dict[Policy, CompressedModel] = {}
    for number, policy in enumerate(policies, 1):
        tell(f"rewriting {number} of {len(policies)}: {short_policy(policy)}")
        try:
            models[policy] = compress(
                model, policy, calibration=calibration, compile=False, verify=False
            )
        except UnsupportedShape as error:
            results.refused[short_policy(policy)] = str(error)
    share_prefill(list(models.values()))
    return models


def _setting(job: Job, policy: Policy) -> Setting:
    return replace(job.setting, policy=repr(policy))


def _measured(setting: Setting, label: str, scores: Scores, device: torch.device) -> Measurement:
    return Measurement(
        setting,
        label,
        scores,
        device=device_name(device),
        threads=torch.get_num_threads(),
        versions=versions("kvfx", "torch", "transformers"),
        date=today(),
    )
