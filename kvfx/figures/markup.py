"""Pieces of HTML from plain values; every text is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def text(value: object) -> str:
    """A value as the text of an element or of an attribute in double quotes."""
    return escape(str(value))


def section(name: str, title: str, *parts: str) -> str:
    """A section that links lead to by its name."""
    head = f'<section id="{name}" aria-labelledby="{name}-title">'
    return "\n".join([head, f'<h2 id="{name}-title">{text(title)}</h2>', *parts, "</section>"])


def facts(values: Mapping[str, object]) -> str:
    """Names and values in two columns."""
    rows = (f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in values.items())
    return f'<dl class="facts">{"".join(rows)}</dl>'


def table(
    label: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> str:
    """A table with `label` for those who do not see it; columns that are not `left` are numbers,
    the first is code.
    """
    kinds = ['class="long"' if at in left[1:] else "" if at in left else 'class="number"'
             for at in range(len(header))]  # fmt: skip
    heads = "".join(
        f'<th scope="col" {kind}>{text(name)}</th>'
        for name, kind in zip(header, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td {kind}>{f'<code>{text(cell)}</code>' if at == 0 else text(cell)}</td>"
            for at, (cell, kind) in enumerate(zip(row, kinds, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}"><table>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str) -> str:
    """A picture with its caption."""
    return (
        f'<figure><figcaption>{text(caption)}</figcaption><div class="canvas">{svg}</div></figure>'
    )


def note(said: str) -> str:
    """A quiet line."""
    return f'<p class="note">{text(said)}</p>'


def details(summary: str, *parts: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"
