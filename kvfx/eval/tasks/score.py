"""How much of an answer was said, for tasks whose answers have parts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvfx.eval.tasks.sample import Sample


def parts_said(text: str, sample: Sample) -> float:
    """The share of the parts that stand in `text`, in any order: RULER's string_match_all, but as
    whole words.
    """
    return sum(says(text, part) for part in sample.parts) / len(sample.parts)


def listed(parts: Sequence[str]) -> str:
    """The parts as one lists them: a, b, and c."""
    return f" {', '.join(parts[:-1])}, and {parts[-1]}"


def says(text: str, part: str) -> bool:
    """Whether `part` stands in `text` as a whole word, whatever its case."""
    pattern = rf"(?<![\w-]){re.escape(part)}(?![\w-])"
    return re.search(pattern, text, re.IGNORECASE) is not None
