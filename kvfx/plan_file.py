"""A plan as a JSON file: shipped with a model, it needs neither calibration nor search again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvfx.errors import InputError, PolicyError
from kvfx.geometry import Site
from kvfx.planner import Plan, SitePlan, make_plan
from kvfx.policies import policy_named

FORMAT = 1


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write the plan to the file at `path`, which is whole at any time; equal plans give equal
    bytes.

    Raises PolicyError if what is written would be read back as another plan.
    """
    target, document = Path(path), _document(plan)
    sites = tuple(site.site for site in plan.sites)
    if _plan(document, sites, str(path)) != plan:
        raise PolicyError(f"{plan.policy!r} does not spell its plan: {path} was not written")
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load_plan(path: str | Path, sites: tuple[Site, ...]) -> Plan:
    """The plan in the file at `path`, for the sites of a model.

    Raises InputError, which names what differs, for a file that is no plan, is of another version,
    or belongs to a model with other sites.
    """
    try:
        document = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a plan: {error}") from error
    return _plan(document, sites, str(path))


def move_plan(plan: Plan, sites: tuple[Site, ...]) -> Plan:
    """The plan for the sites of another copy of its model; others raise an InputError."""
    return _plan(_document(plan), sites, repr(plan.policy))


def _document(plan: Plan) -> dict[str, Any]:
    """Everything as json-able data; the policy alone says it all, rows are there to be checked."""
    return {"kvfx_plan": FORMAT, "policy": repr(plan.policy), "sites": [*map(_row, plan.sites)]}


def _row(plan: SitePlan) -> dict[str, Any]:
    return {**_facts(plan.site), "policy": plan.rule, "note": plan.note}


def _facts(site: Site) -> dict[str, str | int]:
    """What has to be as it was: names, shapes, dtype, and what tokens see."""
    return {
        "name": site.name,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "value_dim": site.value_dim,
        "dtype": str(site.dtype).removeprefix("torch."),
        "mask": str(site.mask),
        "rope": "none" if site.rope is None else str(site.rope),
    }


def _plan(document: Any, sites: tuple[Site, ...], source: str) -> Plan:
    """The plan that a document spells, checked row by row."""
    policy, rows = _checked(document, source)
    if len(rows) != len(sites):
        raise InputError(f"{source} is for {len(rows)} sites, the model has {len(sites)}")
    for row, site in zip(rows, sites, strict=True):
        _check_row(row, _facts(site), f"{source} is of another model: {site.name}")
    try:
        plan = make_plan(policy_named(policy), sites, strict=False)
    except PolicyError as error:
        raise InputError(f"{source} names a policy that cannot be used: {error}") from error
    for row, site in zip(rows, plan.sites, strict=True):
        _check_row(row, _row(site), f"{source}: {policy} is not the plan of {site.site.name}")
    return plan


def _checked(document: Any, source: str) -> tuple[str, list[dict[str, Any]]]:
    """The policy and the rows of a document of this version."""
    if not isinstance(document, dict) or "kvfx_plan" not in document:
        raise InputError(f"{source} is no plan of kvfx: it does not say kvfx_plan")
    if document["kvfx_plan"] != FORMAT:
        raise InputError(
            f"{source} has format {document['kvfx_plan']!r}, this version reads {FORMAT}: plan "
            "again"
        )
    policy, rows = document.get("policy"), document.get("sites")
    if not isinstance(policy, str):
        raise InputError(f"{source}: policy is {policy!r}, not the text of a policy")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{source}: sites is not a list of one object per site")
    return policy, rows


def _check_row(row: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Raise an InputError that names every fact in which a row differs."""
    differs = [
        f"{name} is {value!r}, the file says {row.get(name)!r}"
        for name, value in expected.items()
        if row.get(name) != value
    ]
    if differs:
        raise InputError(f"{what}: {'; '.join(differs)}")
