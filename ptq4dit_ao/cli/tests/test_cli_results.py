"""Tables on consoles of any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ptq4dit_ao.cli.results import print_table

COLUMNS = ("model", "image MSE (digits classifier)")


@pytest.mark.parametrize(
    ("width", "shown"),
    [(120, "1.18e-02 [1.07e-02, 1.30e-02]"), (46, "1.18e-02 [1.07e-02, 1.30e-02]"), (36, "1.18e-02 │")],
)
def test_figures_are_whole_and_intervals_go_first(width, shown):
    console = Console(file=io.StringIO(), width=width)
    print_table(console, "T", COLUMNS, [("a [b]", "1.18e-02 [1.07e-02, 1.30e-02]"), ("float32", "-")])
    text = console.file.getvalue()
    assert shown in text and "a [b]" in text and max(map(len, text.splitlines())) <= width
