"""The peers: which packages each needs, and which ways to hold a cache it offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvfx.errors import InputError

# what presses of kvpress keep of a context; kvfx gets the same bytes
KEPT = (0.25, 0.5)
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Way:
    """A cache of a peer: `label` as it is shown, `code` as it is typed, and `name`, `cache` and
    `press` as peer.py reads them.
    """

    label: str
    code: str
    given: Mapping[str, object]
    timed: bool


@dataclass(frozen=True)
class Environment:
    """Packages that are installed together, and the ways that they offer."""

    name: str
    packages: tuple[str, ...]
    ways: tuple[Way, ...]


def dynamic() -> Way:
    """What `generate` uses by itself: the check that both sides read the same tokens."""
    label = "transformers DynamicCache"
    return Way(label, "transformers.DynamicCache()", {"name": label}, timed=False)


def quantized(backend: str, bits: int, axis: int, *, timed: bool) -> Way:
    """QuantizedCache with its defaults, and the axis that its documentation names for the
    backend.
    """
    options = {"nbits": bits, "axis_key": axis, "axis_value": axis}
    typed = ", ".join(f"{name}={value}" for name, value in options.items())
    label = f"transformers {backend} {bits}-bit"
    code = f'transformers.QuantizedCache("{backend}", config, {typed})'
    # written out: other versions of transformers may have other defaults
    cache = {"backend": backend, **options, "q_group_size": 64, "residual_length": 128}
    return Way(label, code, {"name": label, "cache": cache}, timed)


def press(name: str, kept: float, *, timed: bool) -> Way:
    """A press of kvpress that keeps this part of the context."""
    label = f"kvpress {name.removesuffix('Press')} {kept:.0%}"
    code = f"kvpress.{name}(compression_ratio={1 - kept})"
    given = {"name": label, "press": {"name": name, "compression_ratio": 1 - kept}}
    return Way(label, code, given, timed)


ENVIRONMENTS = (
    Environment(
        "transformers",
        (TORCH, "transformers==5.23.0", "optimum-quanto==0.2.7", "hqq==0.2.8.post1"),
        (
            dynamic(),
            *(quantized("quanto", bits, 0, timed=bits == 4) for bits in (4, 2)),
            quantized("hqq", 4, 1, timed=True),
        ),
    ),
    Environment(
        "kvpress",
        (TORCH, "transformers==5.2.0", "kvpress==0.5.5"),
        tuple(
            press(name, kept, timed=kept == min(KEPT))
            for name in ("SnapKVPress", "KeyDiffPress", "ExpectedAttentionPress")
            for kept in KEPT
        ),
    ),
)


def environments(names: str) -> tuple[Environment, ...]:
    """Those that `names` stands for: `all`, `none`, or names with commas between them."""
    known = {each.name: each for each in ENVIRONMENTS}
    if names in ("all", "none"):
        return ENVIRONMENTS if names == "all" else ()
    for name in names.split(","):
        if name not in known:
            raise InputError(f"--peers {name!r}: choose from all, none, {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names.split(",")))
