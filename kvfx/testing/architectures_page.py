"""docs/architectures.md: written from what was found, and read again by its test.

`python -m kvfx.testing.architectures_page [model types]` writes the page anew, with new rows for
these types, or for all.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvfx.testing.architectures import model_types
from kvfx.testing.examine import Finding, examine

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
WORKS = "## What works"
REFUSED = "## What is refused, and why"
HEAD = (
    "type", "class", "sites", "written as", "who is seen", "rope", "rules", "heads",
    "bytes per token", "cut", "runs under",
)  # fmt: skip


def row(finding: Finding) -> str:
    """One line of one of the two tables."""
    if finding.refused:
        cells = (finding.model_type, finding.kind, finding.refused)
    else:
        cells = (
            finding.model_type, finding.kind, str(finding.sites), finding.roots, finding.masks,
            finding.rope, finding.rules, finding.heads, finding.entry, finding.cut,
            finding.policies,
        )  # fmt: skip
    return f"| {' | '.join(cell.replace('|', '/') or '-' for cell in cells)} |"


def known_rows(page: str) -> dict[str, str]:
    """The rows of a page by model type."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    rows = {line.split("|")[1].strip(): line for line in lines}
    return {name: line for name, line in rows.items() if name not in ("type", "---")}


def written(rows: dict[str, str]) -> str:
    """The whole page."""
    import transformers

    works = [line for _, line in sorted(rows.items()) if line.count("|") > 4]
    refused = [line for _, line in sorted(rows.items()) if line.count("|") <= 4]
    return f"""# Architectures

<!-- written by `python -m kvfx.testing.architectures_page`: do not edit -->

What `kvfx.compress` makes of every model type that transformers {transformers.__version__} maps to
a causal language model: {len(works)} of {len(rows)} work. Each row is the result of a test on a
tiny model of the real class with random weights: a padded batch, read through the cache in pieces,
must give the logits that the model gives to each prompt alone, at shifted positions too where the
model takes positions and counts no chunks. Your own model need not be here:
[a decoder of your own](your_model.md).

{WORKS}

*written as*: one call of SDPA, or products around a softmax. *rope* is the rotary embedding that
was proven (style and rotated channels): where there is none, policies that move keys are refused.
*bytes per token* are those of the tiny model's keys and values in one layer, in fp32; *cut*, where
there is one, those of the narrowest tensors that keys and values are computed from token by token,
which `CacheLatent()` keeps instead. *runs under*: policies that ran; sites with a window or chunks
keep a ring, the others follow the policy.

| {" | ".join(HEAD)} |
| {" | ".join("---" for _ in HEAD)} |
{chr(10).join(works)}

{REFUSED}

| type | class | reason |
| --- | --- | --- |
{chr(10).join(refused)}
"""


def main(names: list[str]) -> None:
    """Write the page."""
    rows = known_rows(PAGE.read_text()) if PAGE.exists() else {}
    for name in names or model_types():
        rows[name] = row(examine(name))
        sys.stdout.write(f"{rows[name]}\n")
        sys.stdout.flush()
    PAGE.write_text(written({name: line for name, line in rows.items() if name in model_types()}))


if __name__ == "__main__":
    main(sys.argv[1:])
