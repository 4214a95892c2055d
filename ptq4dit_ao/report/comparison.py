"""A picture of a table of methods: one dot a method, grouped by bits, a panel for each figure and step count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptq4dit_ao.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Dot = tuple[float, float, float]
"""A figure and its interval; three times the same where there is none."""

_PANEL_IN = 2.6
_SPREAD = 0.76
"""Width of a group of dots, as a part of the distance between two groups."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of all methods, the lower the better, at one step count."""

    title: str
    label: str
    groups: tuple[str, ...]
    series: Mapping[str, Sequence[Dot | None]]
    """Method -> what is known of it in each group."""
    baseline: float | None = None
    """Figure of the float model."""


def comparison_chart(panels: Sequence[Sequence[Panel]]) -> bytes:
    """Panels side by side and one above another, as PNG; all have the same methods. Values are on a log scale."""
    methods = list(panels[0][0].series)
    figure = plots._figure(_PANEL_IN * len(panels) + 0.2 * math.ceil(len(methods) / 2))
    grid = figure.subplots(len(panels), len(panels[0]), squeeze=False, sharey="row")
    handles: list[Line2D] = []
    for axes_row, row in zip(grid, panels, strict=True):
        for axes, panel in zip(axes_row, row, strict=True):
            handles = _draw(axes, panel, first=axes is axes_row[0])
    plots._legend(figure, handles, methods, loc="outside lower left")
    return plots._png(figure)


def _draw(axes: Axes, panel: Panel, *, first: bool) -> list[Line2D]:
    plots._style(axes, "", panel.label if first else "")
    axes.set_title(panel.title, loc="left", fontsize=plots._TEXT, color=plots.INK)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(panel.groups)), panel.groups)
    axes.set_xlim(-0.5, len(panel.groups) - 0.5)
    axes.tick_params(axis="x", length=0)
    for i in range(1, len(panel.groups)):
        axes.axvline(i - 0.5, color="#bbbbbb", linewidth=0.7)
    handles = []
    for i, (dots, (colour, _, marker)) in enumerate(zip(panel.series.values(), _styles(panel), strict=True)):
        shift = _SPREAD * ((i + 0.5) / len(panel.series) - 0.5)
        (line,) = axes.plot([], [], color=colour, marker=marker, linestyle="none", markersize=4.5)
        handles.append(line)
        for group, dot in enumerate(dots):
            if dot is not None:
                value, low, high = dot
                axes.vlines(group + shift, low, high, color=colour, linewidth=1.4)
                axes.plot([group + shift], [value], color=colour, marker=marker, markersize=4.5)
    if panel.baseline is not None:
        axes.axhline(panel.baseline, color=plots.INK, linewidth=0.8, linestyle="--")
        plots._annotate(axes, "float32", panel.baseline)
    plots._log_scale(axes)
    return handles


def _styles(panel: Panel) -> list[tuple[str, str, str]]:
    """One a method; beyond twelve they repeat."""
    return [plots._SERIES[i % len(plots._SERIES)] for i in range(len(panel.series))]
