"""The picture of a table: dots where the figures are, gaps where there are none."""

from __future__ import annotations

import struct

from ptq4dit_ao.report import comparison, plots
from ptq4dit_ao.report.comparison import Panel, comparison_chart

ONE = Panel(
    title="50 steps",
    label="image MSE",
    groups=("W8A8", "W4A8"),
    series={"minmax": [(1e-4, 5e-5, 2e-4), (1e-2, 5e-3, 2e-2)], "auto": [(2e-5, 1e-5, 3e-5), None]},
    baseline=1e-3,
)


def test_it_is_a_png_as_wide_as_the_others_and_higher_with_more_rows():
    sizes = [struct.unpack(">II", comparison_chart(rows)[16:24]) for rows in ([[ONE]], [[ONE, ONE], [ONE, ONE]])]
    assert sizes[0][0] == sizes[1][0] == round(plots._WIDTH_IN * plots._DPI) and sizes[1][1] > 1.5 * sizes[0][1]


def test_dots_stand_side_by_side_around_their_group():
    figure = plots._figure(3)
    axes = figure.subplots()
    handles = comparison._draw(axes, ONE, first=True)
    dots = [line.get_xydata()[0].tolist() for line in axes.lines if len(line.get_xydata()) == 1]
    assert [y for _, y in dots] == [1e-4, 1e-2, 2e-5]
    assert dots[0][0] < 0 < dots[2][0] and dots[0][0] + 1 == dots[1][0]
    assert len(handles) == 2 and axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["W8A8", "W4A8"]
    assert [text.get_text() for text in axes.texts] == ["float32"]


def test_more_methods_than_styles():
    many = {f"m{i}": [(1.0, 1.0, 1.0)] for i in range(14)}
    assert comparison_chart([[Panel(title="", label="", groups=("W8A8",), series=many)]]).startswith(b"\x89PNG")
