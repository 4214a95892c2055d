"""Figures as a table on the console, as JSON and as Markdown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(console: Console, title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table whose first column is a name and whose others are figures."""
    table = Table(title=escape(title))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table)


def write_results(args: argparse.Namespace, data: Mapping[str, object], markdown: str) -> None:
    """Where ``--json`` and ``--markdown`` say."""
    if args.json:
        args.json.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown)
