"""What every layer keeps under a plan file: a bar per site, coloured by how entries are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfx.errors import InputError
from kvfx.figures import canvas
from kvfx.planner import Share
from kvfx.policies import METHODS
from kvfx.policies.flat_dense import FlatDense
from kvfx.policies.layer_budgets import LayerBudgets
from kvfx.policies.masked_dense import MaskedDense
from kvfx.policies.parse import parse_policy
from kvfx.policies.window_ring import WindowRing
from kvfx.policy import Allocate, Policy, Select, Store
from kvfx.report import LENGTH, short_policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPELLED = {kind.__name__: kind for kind in (*METHODS, FlatDense, MaskedDense, WindowRing)}
READS = "reads the cache of "
# inches: of the picture's least width, of a bar, of the height
WIDTH, BAR, HEIGHT = 5.4, 0.13, 2.6
# more bars than that are numbered in steps
NUMBERED = 40


def data(document: dict[str, Any], source: str, tokens: int = LENGTH) -> dict:
    """What is drawn of the document of a plan file: per site the entries that a KV head keeps of a
    prompt of `tokens` tokens, and how they are stored. `entries` is None where what is read
    decides, and 0 where a site has no cache of its own.

    Raises InputError where the file names a policy that this version does not know.
    """
    rows = document["sites"]
    try:
        budgets = _part(parse_policy(document["policy"], SPELLED), LayerBudgets)
        policies = [parse_policy(row["policy"], SPELLED) for row in rows]
        sites = [_site(row, policy, tokens) for row, policy in zip(rows, policies, strict=True)]
        if budgets is not None:
            _share(sites, policies, budgets, tokens)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(f"{source}: its budgets cannot be read: {error}: plan again") from error
    return {
        "figure": "layer_budgets",
        "source": source,
        "policy": document["policy"],
        "tokens": tokens,
        "sites": sites,
    }


def draw(data: dict) -> Figure:
    """The picture of that data."""
    canvas.need_matplotlib("layer_budgets")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    sites, tokens = data["sites"], data["tokens"]
    stores = list(dict.fromkeys(site["store"] for site in sites))
    colours = {store: canvas.pen(number).colour for number, store in enumerate(stores)}
    entries: list = [(store, Patch(facecolor=colour)) for store, colour in colours.items()]
    if any(site["entries"] is None for site in sites):
        hatched = Patch(facecolor="none", edgecolor=canvas.QUIET, hatch="///")
        entries.append(("at most: what is read decides", hatched))
    entries.append(("all tokens", Line2D([], [], color=canvas.INK, linestyle=canvas.DENSE)))
    width = max(WIDTH, BAR * len(sites) + 0.8)
    with canvas.look():
        more = canvas.legend_inches(width, [name for name, _ in entries])
        figure, (axes,) = canvas.panels(1, 1, (width, HEIGHT), more)
        for at, site in enumerate(sites):
            colour, known = colours[site["store"]], site["entries"] is not None
            axes.bar(
                at,
                site["entries"] if known else tokens,
                facecolor=colour if known else "none",
                edgecolor=colour,
                hatch="" if known else "///",
            )
        axes.axhline(tokens, color=canvas.INK, linestyle=canvas.DENSE, linewidth=1)
        step = 1 if len(sites) <= NUMBERED else 5
        axes.set_xticks(range(0, len(sites), step))
        axes.set_xlim(-0.8, len(sites) - 0.2)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("site, in the order in which they run")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        canvas.titled(axes, "entries per KV head", f"after a prompt of {tokens:,} tokens")
        canvas.legend(figure, entries)
    return figure


def _site(row: dict[str, Any], policy: Policy, tokens: int) -> dict:
    """A site without what other layers leave it."""
    select, store = _part(policy, Select), _part(policy, Store)
    entries: int | None = tokens
    if isinstance(store, WindowRing):
        entries = min(tokens, store.window)
    if select is not None:
        entries = None if _decided_later(policy) else int(select.kept(tokens))
    if row["note"].startswith(READS):
        entries = 0
    shown = "no cache of its own" if entries == 0 else short_policy(store or policy)
    return {"name": row["name"], "entries": entries, "store": shown, "note": row["note"]}


def _share(sites: list[dict], policies: list[Policy], budgets: LayerBudgets, tokens: int) -> None:
    """Set the entries of the sites that share a budget."""
    if len(budgets.shares) != len(sites):
        raise InputError(f"{len(budgets.shares)} shares for {len(sites)} sites")
    selects = [_part(policy, Select) for policy in policies]
    chosen = [
        at
        for at, site in enumerate(sites)
        if selects[at] is not None and not site["note"].startswith(READS)
    ]
    shares = tuple(budgets.shares[at] for at in chosen)
    for layer, at in enumerate(chosen):
        select = selects[at]
        assert select is not None
        if sites[at]["entries"] is not None:
            allowed = int(Share(shares, layer).allowed(tokens, select))
            sites[at]["entries"] = select.keeps(tokens, allowed)


def _decided_later(policy: Policy) -> bool:
    """Whether only what is read tells how many entries stay."""
    select, allocate = _part(policy, Select), _part(policy, Allocate)
    return allocate is not None or (select is not None and select.measured)


def _part(policy: Policy, kind: type) -> Any:
    """The first part of a policy that is of a kind, or None."""
    return next((part for part in policy.parts() if isinstance(part, kind)), None)
