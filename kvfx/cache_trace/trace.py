"""What became of every token in every cache, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from kvfx.errors import InputError

STATUSES = {
    "exact": "held as computed",
    "quantized": "held as codes: key, value or both",
    "merged": "taken in by the entry of another token",
    "dropped": "gone",
    "passed": "gone, and out of the model's own window",
}
HELD = ("exact", "quantized")


@dataclass(frozen=True)
class Change:
    """From `step` on the token at `position` has this status; `into` is the position of the token
    whose entry took it in, where that is known.
    """

    step: int
    position: int
    status: str
    into: int | None = None


@dataclass(frozen=True)
class SiteTrace:
    """The changes at one site in order, for each of its KV heads."""

    name: str
    heads: tuple[tuple[Change, ...], ...]


@dataclass(frozen=True)
class CacheTrace:
    """What became of every token: `steps` are the programs that ran, `seen` the tokens read when
    each of them was through, `prompt` of which were the prompt.
    """

    policy: str
    tokens: tuple[int, ...]
    prompt: int
    steps: tuple[str, ...]
    seen: tuple[int, ...]
    sites: tuple[SiteTrace, ...]

    def status(self, site: int, head: int = 0, step: int = -1) -> tuple[str, ...]:
        """The status of each token that was seen when `step` (-1: the last) was through."""
        step = range(len(self.steps))[step]
        found = [""] * self.seen[step]
        for change in self.sites[site].heads[head]:
            if change.step <= step:
                found[change.position] = change.status
        return tuple(found)

    def held(self, site: int, head: int = 0, step: int = -1) -> tuple[int, ...]:
        """The positions of the entries in a cache, in order."""
        found = enumerate(self.status(site, head, step))
        return tuple(position for position, status in found if status in HELD)

    def to_dict(self) -> dict[str, object]:
        """Everything as json-able data; a change is `[step, position, status, into]`."""
        sites = [
            {
                "name": site.name,
                "heads": [
                    [list(asdict(change).values()) for change in head] for head in site.heads
                ],
            }
            for site in self.sites
        ]
        return {**asdict(self), "statuses": STATUSES, "sites": sites}

    def svg(self, head: int = 0) -> str:
        """The picture of a KV head: a panel per site, positions to the right, steps downwards."""
        from kvfx.cache_trace.picture import svg_of

        return svg_of(self, self.checked(head))

    def _repr_svg_(self) -> str:
        """The picture of the first KV head, for notebooks."""
        return self.svg()

    def save(self, path: Path | str, head: int = 0) -> Path:
        """Write the picture of a KV head: `.svg`, or with matplotlib `.png`, `.pdf` and others.
        Returns the path.
        """
        from kvfx.cache_trace.picture import plot

        path, head = Path(path), self.checked(head)
        if path.suffix == ".svg":
            path.write_text(self.svg(head), "utf-8")
        else:
            plot(self, head, path)
        return path

    @property
    def heads(self) -> int:
        """KV heads of the site that has most of them."""
        return max(len(site.heads) for site in self.sites)

    def checked(self, head: int) -> int:
        """A KV head, which some site has; raises an InputError for others."""
        if not 0 <= head < self.heads:
            raise InputError(f"head={head!r}: the model has KV heads 0 to {self.heads - 1}")
        return head
