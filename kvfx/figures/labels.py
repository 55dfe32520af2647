"""The method that a label stands for."""

from __future__ import annotations

import re


def method_of(label: str) -> str:
    """The policy without its budgets, or a peer without its size: one method, one line."""
    without = re.sub(r"\b(?:budget|context)=[^,()]*(?:, )?", "", label)
    return re.sub(r" \d+(?:%|-bit)$", "", without.replace(", )", ")").replace("()", ""))
