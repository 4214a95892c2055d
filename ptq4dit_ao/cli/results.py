"""Figures as a table on the console, as JSON and as Markdown."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ptq4dit_ao._files import replace_text
from ptq4dit_ao._paths import check_file
from ptq4dit_ao.errors import ArgumentError

WIDEST = 1000
"""Columns of a console that any table fits."""

_INTERVAL = re.compile(r" \[[^],]*, [^]]*\]")


def print_table(console: Console, title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table whose first column is a name and whose others are figures; without their intervals if it is too wide."""
    rows = [tuple(line) for line in lines]
    words = [max(column.split(), key=len) for column in columns]  # a heading can be broken, a figure cannot
    if Measurement.get(console, console.options.update(width=WIDEST), _table("", words, rows)).maximum > console.width:
        rows = [tuple(_INTERVAL.sub("", cell) for cell in row) for row in rows]
    console.print(_table(title, columns, rows))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=escape(title))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def check_results(args: argparse.Namespace) -> None:
    """Raises ArgumentError, before the long part, if ``--json`` or ``--markdown`` cannot be written."""
    for path in filter(None, (args.json, args.markdown)):
        if not path.parent.is_dir():
            raise ArgumentError(f"there is no folder {path.parent} to write {path.name} to; make it, or choose another")
        check_file(path)


def write_results(args: argparse.Namespace, data: Mapping[str, object], markdown: str) -> None:
    """Where ``--json`` and ``--markdown`` say."""
    if args.json:
        replace_text(args.json, json.dumps(data, indent=1, allow_nan=False) + "\n")
    if args.markdown:
        replace_text(args.markdown, markdown)
