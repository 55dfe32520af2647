"""Compile every shipped launch for every arch and print what it needs: Markdown, or JSON."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator

from kvfx.testing.offline import TARGETS, Built, Note, build, count, launches

ROOMS = ("dense", "flat", "kivi", "scores", "compact", "select", "crush", "merge")
# kernels that any room launches: shown once, in the first one
SHARED = ("combine_kernel", "accumulate_kernel")
HEAD = (
    "| room | launch | kernel | warps | registers | shared KiB | instructions per KV element |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def rows(rooms: tuple[str, ...]) -> Iterator[dict]:
    """One row per variant and kernel, with what each arch needs."""
    shown: set[str] = set()
    for room in rooms:
        module = importlib.import_module(f"kvfx.testing.shipped.{room}")
        for variant, launcher in module.VARIANTS.items():
            notes = {arch: launches(launcher, arch) for arch in TARGETS}
            for index, note in enumerate(notes["sm_90"]):
                name = note.kernel.__name__
                if name in SHARED and (name in shown or room != ROOMS[0]):
                    continue
                shown.add(name)
                row = {"room": room, "variant": variant, "kernel": name}
                for arch, found in notes.items():
                    row[arch] = _facts(module, found[index], arch)
                yield row


def _facts(module: object, note: Note, arch: str) -> dict:
    built = build(note, arch)
    elements = getattr(module, "elements", lambda note: None)(note)
    return {
        "warps": built.warps,
        "registers": built.registers,
        "stack": built.stack,
        "spills": built.spills,
        "shared": built.shared,
        "copies": built.count(r"LDGSTS\S*\.128"),
        "wide": built.count(r"LD\S*\.128|(global|buffer)_load_dwordx4"),
        "per_element": _per_element(built, elements),
    }


def _per_element(built: Built, elements: int | None) -> float | None:
    """Instructions per element in the innermost loop with the most products."""
    if elements is None or not built.loops:
        return None
    loop = max(built.loops, key=lambda body: count(body, r"\bHMMA\b"))
    return round(len(loop) / elements, 2)


def table(found: list[dict]) -> list[str]:
    """Lines of Markdown; what a launch repeats is shown once."""
    return [*HEAD.splitlines(), *dict.fromkeys(map(markdown, found))]


def markdown(row: dict) -> str:
    """One row of the table; numbers are those of sm_80 / sm_90 / gfx942."""
    registers, shared = (
        " / ".join(f"{row[arch][key]:,}" if key == "registers" else f"{row[arch][key] / 1024:.0f}"
                   for arch in TARGETS)
        for key in ("registers", "shared")
    )  # fmt: skip
    each = [row[arch]["per_element"] for arch in ("sm_80", "sm_90")]
    per_element = "" if None in each else " / ".join(f"{x:.2f}" for x in each)
    warps = row["sm_90"]["warps"]
    return (
        f"| {row['room']} | {row['variant']} | `{row['kernel']}` | {warps} | {registers} | "
        f"{shared} | {per_element} |"
    )


def main(arguments: list[str]) -> None:
    """`python -m kvfx.testing.shipped [--json] [room ...]`."""
    rooms = tuple(name for name in arguments if not name.startswith("--")) or ROOMS
    found = list(rows(rooms))
    if "--json" in arguments:
        sys.stdout.write(json.dumps(found))
        return
    sys.stdout.write("\n".join(table(found)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
