"""The sweep: every policy at every budget, task and length, each prompt read densely once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
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
    """One task at one length: its inputs, the most `tokens` that are read of one of them, and how
    models are measured.
    """

    setting: Setting
    tokens: int
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
    jobs = _jobs(name, model, tokenizer, suite, tell)
    # for every job: the setting of each policy
    settings: list[dict[Policy, Setting]] = []
    for job in jobs:
        policies = (Full(), *_policies(model, suite, job, results, calibration))
        settings.append({each: replace(job.setting, policy=repr(each)) for each in policies})
    missing = [
        {each: setting for each, setting in asked.items() if results.find(setting) is None}
        for asked in settings
    ]
    models = _compressed(model, list(dict.fromkeys(chain(*missing))), results, tell, calibration)
    for job, turn in zip(jobs, missing, strict=True):
        measured = job.measure({each: models[each] for each in turn if each in models})
        for policy, scores in measured.items():
            results.add(_measured(turn[policy], short_policy(policy), scores, model.device))
    found = (results.find(setting) for asked in settings for setting in asked.values())
    return [measurement for measurement in found if measurement is not None]


def _policies(
    model: PreTrainedModel,
    suite: Suite,
    job: Job,
    results: Results,
    calibration: Calibration | None,
) -> tuple[Policy, ...]:
    """What is measured besides the dense cache."""
    chosen = tuple(dict.fromkeys(policy for policy in suite.policies if policy != Full()))
    if not suite.memory:
        return chosen
    return at_equal_bytes(
        model,
        chosen,
        suite.memory,
        tokens=job.tokens,
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
    # the last token is predicted and not read
    tokens = ids.shape[1] - 1
    return Job(setting, tokens, lambda models: _fidelity(model, models, ids, suite, title, tell))


def _fidelity(
    model: Any,
    models: dict[Policy, CompressedModel],
    ids: Tensor,
    suite: Suite,
    title: str,
    tell: Tell,
) -> dict[Policy, Scores]:
    found: dict[Policy, list] = {policy: [] for policy in models}
    sizes = dict.fromkeys(models, 0)
    for number, window in enumerate(ids.to(model.device), 1):
        tell(f"{title}: window {number} of {len(ids)}, dense")
        dense = dense_log_probs(model, window, suite.scored)
        for policy, fast in models.items():
            tell(f"{title}: window {number} of {len(ids)}, {short_policy(policy)}")
            score, size = score_window(fast, window, dense, chunk=suite.chunk)
            found[policy].append(score)
            sizes[policy] = max(sizes[policy], size)
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
    most = max(prompt.read for prompt in prompts)
    return Job(setting, most, lambda models: _answers(models, prompts, title, tell))


def _answers(
    models: dict[Policy, CompressedModel], prompts: Sequence[Prompt], title: str, tell: Tell
) -> dict[Policy, Scores]:
    found: dict[Policy, list[tuple[float, float]]] = {policy: [] for policy in models}
    sizes = dict.fromkeys(models, 0)
    for number, prompt in enumerate(prompts, 1):
        for policy, fast in models.items():
            tell(f"{title}: sample {number} of {len(prompts)}, {short_policy(policy)}")
            hit, nll, size = answer_prompt(fast, prompt)
            found[policy].append((hit, nll))
            sizes[policy] = max(sizes[policy], size)
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
