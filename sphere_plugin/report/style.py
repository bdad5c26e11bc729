"""How figures look: one colour for a method everywhere, dashed without SPHERE and solid with it.

A figure is made of panels. The page gets every panel as an SVG of its own, whose colours are the page's and so change
with light and dark; the files beside the page get all panels on one white sheet, as PNG and PDF.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from sphere_plugin.report.studies import Entry

# On white and on near-black; both at least 4.5 : 1, told apart by marker and dash as well.
COLOURS: Final = (
    ("#0b5fad", "#6cb4ff"),
    ("#b8400b", "#ff9466"),
    ("#0b7048", "#4fd69a"),
    ("#8236a6", "#d597f5"),
    ("#855800", "#ecbc45"),
    ("#0a6b79", "#52ccdb"),
    ("#b02163", "#ff8dbc"),
    ("#4d5665", "#b0bac9"),
)
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "h")
INK, MUTED, GRID = "#1d2129", "#636b78", "#dfe3e8"
FONT: Final = 9.0
LETTERS: Final = 10  # of a title, to an inch of its panel
PANEL: Final = (4.4, 3.0)  # inches
COLUMNS: Final = 3  # of panels on a sheet
RESOLUTION: Final = 200
SETTINGS: Final = MappingProxyType(
    {
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "text.parse_math": False,
        "font.size": FONT,
        "axes.titlesize": FONT + 1,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": INK,
        "lines.linewidth": 1.7,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "figure.facecolor": "white",
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.1,
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
)


def colour(entry: Entry) -> str:
    """Returns an entry's colour on white."""
    return COLOURS[entry.family % len(COLOURS)][0]


def dash(entry: Entry) -> str:
    """Returns how an entry's lines are drawn: solid with SPHERE, dotted for a control, else dashed."""
    return "-" if entry.sphere else ":" if entry.control else "--"


def marker(entry: Entry) -> str:
    """Returns the shape of an entry's points."""
    return MARKERS[entry.family % len(MARKERS)]


def decades(axes: Any, *sides: str) -> None:
    """Make the ``sides`` of a chart, "x" and "y", logarithmic; their ticks are written as 10⁻³."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def power(value: float, _: int) -> str:
        exponent = round(math.log10(value)) if value > 0 else 0
        return "10" + f"{exponent}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))

    for side in sides:
        getattr(axes, f"set_{side}scale")("log")
        axis = getattr(axes, f"{side}axis")
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_major_formatter(FuncFormatter(power))
        axis.set_minor_formatter(NullFormatter())


@dataclass
class Pen:
    """Draws on one pair of axes and remembers what belongs to whom, for the page.

    Attributes:
        axis: matplotlib's.
        tips: id of an artist -> what to show over each of its points.
    """

    axis: Any
    tips: dict[str, list[str]] = field(default_factory=dict)
    _claimed: int = 0

    def claim(self, artist: Any, entry: Entry | None, tips: Sequence[str] = ()) -> None:
        """Have the page show and hide an artist with its entry, and show ``tips`` over its points."""
        self._claimed += 1
        name = f"{'all' if entry is None else f'm{entry.slot}'}-{self._claimed}"
        artist.set_gid(name)
        if tips:
            self.tips[name] = list(tips)

    def line(self, entry: Entry, xs: Sequence[float], ys: Sequence[float], tips: Sequence[str], points: bool) -> None:
        """Draw an entry's curve, with its points or, where there are too many of them, without."""
        (line,) = self.axis.plot(xs, ys, color=colour(entry), linestyle=dash(entry), zorder=3)
        self.claim(line, entry)
        size = 4.5 if points else 2.0
        (dots,) = self.axis.plot(
            xs, ys, linestyle="none", marker=marker(entry), markersize=size, color=colour(entry), zorder=4
        )
        self.claim(dots, entry, tips)

    def band(self, entry: Entry, xs: Sequence[float], low: Sequence[float], high: Sequence[float]) -> None:
        """Shade between two curves."""
        self.claim(self.axis.fill_between(xs, low, high, color=colour(entry), alpha=0.15, linewidth=0), entry)

    def dots(self, entry: Entry, xs: Sequence[float], ys: Sequence[float], tips: Sequence[str]) -> None:
        """Draw points alone, hollow for entries without SPHERE."""
        face = colour(entry) if entry.sphere else "none"
        (dots,) = self.axis.plot(
            xs, ys, linestyle="none", marker=marker(entry), markersize=4.5, color=colour(entry), markerfacecolor=face
        )
        self.claim(dots, entry, tips)

    def text(self, entry: Entry | None, x: float, y: float, text: str, **settings: Any) -> None:
        """Write beside the data, in the entry's colour."""
        ink = MUTED if entry is None else colour(entry)
        self.claim(self.axis.text(x, y, text, color=ink, fontsize=FONT - 1.5, **settings), entry)


@dataclass(frozen=True)
class Panel:
    """One small chart.

    Attributes:
        title: shown above it.
        draw: draws it.
        size: in inches, alone in the page.
        entry: whom the whole panel belongs to, if it is one entry's.
    """

    title: str
    draw: Callable[[Pen], None]
    size: tuple[float, float] = PANEL
    entry: Entry | None = None


@dataclass(frozen=True)
class Plate:
    """A figure: panels that belong together.

    Attributes:
        name: of its files.
        title: its heading.
        caption: what is to be seen, how it was computed.
        panels: the charts; none if there is nothing to draw.
        entries: for the legend; none for no legend.
        missing: what is not there, and why.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    entries: tuple[Entry, ...] = ()
    missing: tuple[str, ...] = ()


def settings() -> AbstractContextManager[Any]:
    """Have matplotlib draw as set here, inside a `with` block."""
    import matplotlib

    return matplotlib.rc_context(dict(SETTINGS))


def alone(panel: Panel) -> tuple[Any, Mapping[str, Sequence[str]]]:
    """Returns a panel as a figure of its own, and its tips."""
    from matplotlib.figure import Figure

    with settings():
        figure: Any = Figure(figsize=panel.size, layout="constrained")
        figure.patch.set_alpha(0.0)
        pen = Pen(figure.add_subplot())
        _draw(panel, pen)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    return figure, pen.tips


def sheet(plate: Plate) -> Any:
    """Returns all panels of a plate in one figure, with a legend."""
    from matplotlib.figure import Figure

    with settings():
        return _sheet(Figure, plate)


def _sheet(make: Callable[..., Any], plate: Plate) -> Any:
    columns = min(COLUMNS, len(plate.panels))
    rows = math.ceil(len(plate.panels) / columns)
    width, height = (max(panel.size[side] for panel in plate.panels) for side in (0, 1))
    figure = make(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, axis in zip(plate.panels, axes, strict=False):
        _draw(panel, Pen(axis))
    for axis in axes[len(plate.panels) :]:
        axis.set_axis_off()
    if plate.entries:
        handles = [_handle(entry) for entry in plate.entries]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns))
    return figure


def picture(figure: Any, kind: str) -> bytes:
    """Returns a figure as the content of a file that depends on nothing but the figure. ``kind`` is "png" or "pdf"."""
    content = io.BytesIO()
    undated = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    with settings():
        figure.savefig(content, format=kind, dpi=RESOLUTION, facecolor="white", metadata=undated)
    return content.getvalue()


def _draw(panel: Panel, pen: Pen) -> None:
    pen.axis.set_title(textwrap.fill(panel.title, int(LETTERS * panel.size[0])))
    panel.draw(pen)


def _handle(entry: Entry) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour(entry), linestyle=dash(entry), marker=marker(entry), label=entry.label)
