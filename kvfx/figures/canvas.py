"""What all pictures share: matplotlib if it is there, one look, colours that everybody can tell
apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfx.errors import UnsupportedOperation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

# the colours of a page, which has others of its own in the dark; nothing else is drawn in these
INK, QUIET, LINE, GREY, PAPER = "#22252b", "#5f6672", "#e3e0d9", "#9aa1ad", "#fefefe"
# Okabe and Ito's palette without black, which is text, and yellow, which white paper hides
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
DASHES = ((0.0, ()), (0.0, (3.7, 1.6)), (0.0, (1.0, 1.65)))
# of the dense cache, which is drawn in ink
DENSE = (0.0, (4.0, 3.0))
LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "grid.color": LINE,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.6,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.06,
    # the same picture gives the same bytes
    "svg.hashsalt": "kvfx",
    "svg.fonttype": "path",
}
# inches that a letter of a legend takes, with what stands around an entry
LETTER, AROUND = 0.072, 0.55
LONGEST = 60
MOST_COLUMNS = 4


@dataclass(frozen=True)
class Pen:
    """How one method is drawn everywhere on a picture."""

    colour: str
    marker: str
    dash: tuple[float, tuple[float, ...]]


def need_matplotlib(what: str, otherwise: str = "") -> None:
    """Raise UnsupportedOperation where matplotlib is missing: `what` needs it, `otherwise` says how
    to do without.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedOperation(
            f"{what}: matplotlib draws it and is not installed: pip install 'kvfx[plot]' or pip "
            f"install matplotlib{otherwise}"
        ) from error


@contextmanager
def look() -> Iterator[None]:
    """Draw and save in the look of kvfx, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


def panels(count: int, columns: int, size: tuple[float, float], more: float) -> tuple[Figure, list]:
    """A figure and `count` axes of `size` inches in rows, with `more` inches below them; call it
    within `look()`.
    """
    need_matplotlib("a figure")
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure((columns * size[0], rows * size[1] + more), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, grid[:count]


def titled(axes: Axes, title: str, note: str = "") -> None:
    """A title, and a quiet line below it."""
    axes.set_title(title, pad=17 if note else 6)
    axes.annotate(note, (0, 1), (0, 5), "axes fraction", "offset points", color=QUIET, fontsize=8)


def pen(number: int) -> Pen:
    """The pen of a method by its number: no two of the first twelve are alike."""
    turn = len(COLOURS)
    dash = DASHES[number // turn % len(DASHES)]
    return Pen(COLOURS[number % turn], MARKERS[number % len(MARKERS)], dash)


def legend(figure: Figure, entries: Sequence[tuple[str, Line2D | Patch]]) -> None:
    """A legend below everything."""
    names = [shortened(name) for name, _ in entries]
    figure.legend(
        [sample for _, sample in entries],
        names,
        loc="outside lower left",
        ncols=_columns(figure.get_figwidth(), names),
    )


def legend_inches(width: float, names: Sequence[str]) -> float:
    """The height of such a legend in a figure of `width` inches."""
    shown = [shortened(name) for name in names]
    return 0.25 + 0.19 * -(-len(shown) // _columns(width, shown))


def _columns(width: float, names: Sequence[str]) -> int:
    """The most columns that fit into `width` inches."""
    for columns in range(min(MOST_COLUMNS, len(names)), 1, -1):
        rows, longer = divmod(len(names), columns)
        sizes = [rows + (at < longer) for at in range(columns)]
        starts = [sum(sizes[:at]) for at in range(columns)]
        parts = [names[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        if sum(max(map(len, part)) * LETTER + AROUND for part in parts) <= width:
            return columns
    return 1


def shortened(name: str) -> str:
    """A name of at most 60 letters."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 2]} …"
