"""Curves and histograms as pictures: SVG in a data URI, the same bytes for the same figures, no font of the reader.

matplotlib is loaded when the first picture is made, and drawn with directly: no pyplot, no window, no global state.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_ft.system.escape import printable
from gemma_ft.ui.pages.facts import Points

WIDE, SMALL = 9.2, 3.1  # inches: a picture as wide as the page, and one of three side by side
MOST_POINTS = 800  # of a drawn curve
LONG = 60  # points from which a line is drawn with its smoothed course
LOG_FROM = 30.0  # largest over smallest value from which an axis is logarithmic
COLOURS = ("#2563c9", "#d9730d", "#2e8b57", "#8e44ad", "#c0392b", "#16899c", "#7f6a3f", "#d6589f")
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "svg.hashsalt": "gemma-ft",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name with dollars in it is no formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#444444",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel; `style`: noisy (with its smoothed course when it is long), line, points, or dashed."""

    name: str
    points: Points
    style: str = "noisy"
    colour: int = 0


@dataclass(frozen=True)
class Panel:
    """One pair of axes over steps."""

    title: str
    curves: Sequence[Curve]
    logarithmic: bool = False  # where the values allow it and ask for it


def curve_picture(panel: Panel, *, width: float = WIDE, height: float = 2.9) -> str | None:
    """A panel as a data URI, so many inches large; None when no curve has a point."""
    if not any(curve.points for curve in panel.curves):
        return None
    with _figure(width, height) as (axis, uri):
        _draw(axis, panel)
        return uri()


def histogram_picture(
    counts: Sequence[int], bin_width: int, *, title: str, x_label: str, mark: tuple[int, str] | None = None
) -> str:
    """Counts of values 1..w, w+1..2w, ... as a data URI; `mark`: a value and its name, where it is near the bars."""
    with _figure(WIDE, 2.3) as (axis, uri):
        axis.set_title(title)
        starts = [number * bin_width for number in range(len(counts))]
        axis.bar(starts, counts, width=bin_width * 0.94, align="edge", color=COLOURS[0])
        axis.set_xlabel(x_label)
        axis.set_xlim(left=0)
        axis.grid(axis="x", visible=False)
        if mark and mark[0] <= 1.25 * bin_width * len(counts):
            axis.axvline(mark[0], color=COLOURS[4], linestyle="--", linewidth=1.2, label=mark[1])
            axis.legend(fontsize=8, loc="upper center" if mark[0] > 0.7 * axis.get_xlim()[1] else "upper right")
        return uri()


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points with the course and every spike of the original: of each stretch its lowest and highest."""
    if len(points) <= most:
        return points
    kept = []
    stretches = most // 2
    for number in range(stretches):
        part = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def smoothed(points: Points, *, geometric: bool = False) -> Points:
    """The mean of each point and its neighbours, a sixtieth of the curve to either side; of their logarithms when
    `geometric`, so that a steep fall on a logarithmic axis stays where it is.
    """
    values = [math.log(value) if geometric else value for _, value in points]
    sums = [0.0, *itertools.accumulate(values)]
    reach = max(1, len(points) // 60)
    result = []
    for place, (step, _) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        mean = (sums[place + near + 1] - sums[place - near]) / (2 * near + 1)
        result.append((step, math.exp(mean) if geometric else mean))
    return result


def _draw(axis: Any, panel: Panel) -> None:
    values = [value for curve in panel.curves for _, value in curve.points]
    logarithmic = panel.logarithmic and min(values) > 0 and max(values) / min(values) >= LOG_FROM
    for curve in panel.curves:
        if curve.points:
            _draw_curve(axis, curve, geometric=logarithmic)
    if logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, place: "")
    axis.set_title(panel.title)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.02)
    handles, names = axis.get_legend_handles_labels()
    if len(handles) > 1:
        axis.legend(handles, names, fontsize=8)


def _draw_curve(axis: Any, curve: Curve, *, geometric: bool) -> None:
    colour = COLOURS[curve.colour % len(COLOURS)]
    steps, values = zip(*thinned(curve.points), strict=True)
    name = printable(curve.name)
    if curve.style == "points":
        form = "o-" if len(steps) > 2 else "o"  # between the two ends nothing is known
        axis.plot(steps, values, form, color=colour, markersize=4.5, linewidth=1.0, label=name, zorder=3)
    elif curve.style == "dashed":
        axis.plot(steps, values, "--", color=colour, linewidth=1.2, label=name)
    elif curve.style == "noisy" and len(curve.points) >= LONG:
        axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        steps, values = zip(*thinned(smoothed(curve.points, geometric=geometric)), strict=True)
        axis.plot(steps, values, color=colour, label=name)
    else:
        axis.plot(steps, values, color=colour, label=name, marker="." if len(steps) < 20 else None)


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Axes in a figure of so many inches, and a function that gives the data URI of what was drawn on them."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home it cannot write to is no fault of the run
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signs in a run's name that the font does not have
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        figure.subplots_adjust(left=0.7 / width, right=1 - 0.09 / width, top=1 - 0.3 / height, bottom=0.48 / height)

        def uri() -> str:
            stream = io.BytesIO()
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
            return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")

        yield axis, uri
