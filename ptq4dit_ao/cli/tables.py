"""Tables that fit the console they are printed on, with no name cut and no figure broken.

The first of these that fits is printed: a boxed table, the same without the columns that can be spared, with its
headings broken, without intervals; a name above its figures; the columns parted over several tables; and a list of
headings with their cells.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDEST = 1000
"""Columns of a console that any table fits."""

Row = tuple[str, ...]

_INTERVAL = re.compile(r" \[[^],]*, [^]]*\]")
_GAP, _INDENT = "  ", "  "
_READABLE = 24
"""Words may be wrapped in a column that is at least as wide."""
_NAME = "bold cyan"


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    heading: str
    is_text: bool = False
    """Words stand to the left and may be wrapped, figures to the right."""
    can_be_spared: bool = False
    """A table that does not fit is tried without it first."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells of plain text."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    names: int
    """Number of leading columns that name a row."""


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str | Column],
    lines: Iterable[Sequence[str]],
    *,
    names: int = 1,
    wide: bool = False,
) -> None:
    """Print a table so that it can be read at the console's width.

    Args:
        console: where to print.
        title: stands above the table; may be empty.
        columns: what the cells are; a mere heading is one of figures.
        lines: the cells of each row.
        names: how many of the first columns say what a row is about.
        wide: print everything in one table, however wide the console is.
    """
    said = [Column(one) if isinstance(one, str) else one for one in columns]
    said = [replace(column, is_text=True) if i < names else column for i, column in enumerate(said)]
    grid = Grid(title=title, columns=tuple(said), rows=tuple(map(tuple, lines)), names=names)
    whole = _boxed(grid)
    if wide:
        Console(file=console.file, width=WIDEST, force_terminal=console.is_terminal).print(whole)
    elif _fits(console, whole):
        console.print(whole)
    else:
        _print_less(console, grid)


def _print_less(console: Console, grid: Grid) -> None:
    spared = {i for i, column in enumerate(grid.columns) if column.can_be_spared}
    for part in _fitting(console, _chosen(grid, [i for i in range(len(grid.columns)) if i not in spared])):
        console.print(part, crop=False)
    if spared:
        headings = ", ".join(grid.columns[i].heading for i in sorted(spared))
        console.print(f"[dim]not shown: {escape(headings)} (--wide shows it)[/]", soft_wrap=True)


def _fitting(console: Console, grid: Grid) -> Sequence[RenderableType]:
    """The parts to print, of which the last sort always does."""
    bare = _without_intervals(grid)
    tries = (_boxed(grid), _boxed(_broken(grid)), _boxed(bare), _boxed(_broken(bare)), _stacked(_broken(bare)))
    found = next((one for one in tries if _fits(console, one)), None)
    return [found] if found is not None else _parted(console, bare) or list(_listed(bare))


def _fits(console: Console, one: RenderableType) -> bool:
    needed = Measurement.get(console, console.options.update(width=WIDEST), one)
    return (needed.minimum if isinstance(one, Table) else needed.maximum) <= console.width  # text is not to be wrapped


# Grids out of grids


def _chosen(grid: Grid, kept: Sequence[int]) -> Grid:
    """Some of the columns."""
    return replace(
        grid,
        columns=tuple(grid.columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in grid.rows),
        names=sum(i < grid.names for i in kept),
    )


def _without_intervals(grid: Grid) -> Grid:
    return replace(grid, rows=tuple(tuple(_INTERVAL.sub("", cell) for cell in row) for row in grid.rows))


def _broken(grid: Grid) -> Grid:
    """The headings in as many lines as make no column wider than its cells and the heading's longest word."""
    columns = []
    for i, column in enumerate(grid.columns):
        width = max(map(cell_len, [*column.heading.split(), *(row[i] for row in grid.rows)]), default=1)
        columns.append(replace(column, heading="\n".join(textwrap.wrap(column.heading, width))))
    return replace(grid, columns=tuple(columns))


# Ways to print a grid


def _boxed(grid: Grid) -> Table:
    table = Table(title=escape(grid.title) or None)
    for i, column in enumerate(grid.columns):
        wraps = column.is_text and i >= grid.names
        width = max(map(cell_len, [*column.heading.split("\n"), *(row[i] for row in grid.rows)]))
        table.add_column(
            escape(column.heading),
            justify="left" if column.is_text else "right",
            no_wrap=not wraps,
            min_width=min(width, _READABLE) if wraps else width,
        )
    for row in grid.rows:
        table.add_row(*map(escape, row))
    return table


def _stacked(grid: Grid) -> Text:
    """Each name on a line of its own, above its figures, which stand in columns."""
    columns, rows = grid.columns[grid.names :], [row[grid.names :] for row in grid.rows]
    headings = [column.heading.split("\n") for column in columns]
    depth = max(map(len, headings), default=0)
    head = list(zip(*([""] * (depth - len(words)) + words for words in headings), strict=True))
    widths = [max(map(cell_len, cells)) for cells in zip(*head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = map(_placed, columns, cells, widths)
        return f"{_INDENT}{_GAP.join(placed).rstrip()}"

    text = Text(f"{grid.title}\n" if grid.title else "", no_wrap=True, overflow="ignore")
    headings_of_names = _GAP.join(column.heading for column in grid.columns[: grid.names])
    text.append("\n".join([headings_of_names, *map(line, head)]), style="bold")
    for whole, figures in zip(grid.rows, rows, strict=True):
        text.append("\n" + _GAP.join(whole[: grid.names]), style=_NAME)
        text.append("\n" + line(figures))
    return text


def _placed(column: Column, cell: str, width: int) -> str:
    return set_cell_size(cell, width) if column.is_text else " " * (width - cell_len(cell)) + cell


def _parted(console: Console, grid: Grid) -> list[Table]:
    """The columns spread over several tables, each with the names; none if a name leaves no room for a column."""
    names = list(range(grid.names))
    parts: list[list[int]] = []
    for i in range(grid.names, len(grid.columns)):
        if parts and _fits(console, _boxed(_broken(_chosen(grid, [*names, *parts[-1], i])))):
            parts[-1].append(i)
        else:
            parts.append([i])
    tables = [_boxed(_broken(_chosen(grid, [*names, *part]))) for part in parts]
    return tables if all(_fits(console, table) for table in tables) else []


def _listed(grid: Grid) -> Iterator[RenderableType]:
    """Each name on a line of its own, and below it a line for each cell, with its heading."""
    if grid.title:
        yield Text(grid.title)
    for row in grid.rows:
        yield Text(_GAP.join(row[: grid.names]), style=_NAME, overflow="fold")
        cells = Table.grid(padding=(0, 2, 0, 0))
        cells.add_column(style="dim")
        cells.add_column(overflow="fold")
        for column, cell in zip(grid.columns[grid.names :], row[grid.names :], strict=True):
            cells.add_row(escape(column.heading), escape(cell))
        yield Padding(cells, (0, 0, 0, len(_INDENT)))
