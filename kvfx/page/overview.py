"""The facts that a page begins with: the report with equal sites folded, and who wrote it."""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version

from kvfx import __version__
from kvfx.report import FOOTNOTE, LENGTH, Report, SiteReport, fold_names

PACKAGES = ("torch", "transformers", "triton")


def report_data(report: Report) -> dict:
    """The report with equal sites folded, and one bar per site."""
    kinds: dict[str, list[SiteReport]] = {}
    for site in report.sites:
        key = replace(site, name="", after=0, entries=None)
        kinds.setdefault(repr(key), []).append(site)
    return {
        "headline": report.headline(),
        "backend": report.backend,
        "verified": report.verified,
        "seconds": round(report.seconds, 1),
        "before": report.before,
        "after": report.after,
        "length": LENGTH,
        "footnote": FOOTNOTE,
        "rows": [_row(sites) for sites in kinds.values()],
        "remarks": report.remarks()[2:],
        "sites": [
            {
                "name": site.name,
                "before": site.before,
                "after": site.after,
                "entries": site.entries,
                "policy": site.policy,
            }
            for site in report.sites
        ],
    }


def _row(sites: list[SiteReport]) -> dict:
    """Sites that differ in nothing but in how much they keep; `after` and `entries` are all values
    in order.
    """
    entries = [site.entries for site in sites if site.entries is not None]
    return {
        **asdict(sites[0]),
        "names": fold_names(site.name for site in sites),
        "count": len(sites),
        "after": list(dict.fromkeys(site.after for site in sites)),
        "entries": list(dict.fromkeys(entries)),
    }


def versions() -> dict[str, str]:
    """The version of kvfx and of what it stands on, by name."""
    found = {"kvfx": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
