"""Figures as JSON and as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ptq4dit_ao._files import replace_json, replace_text
from ptq4dit_ao._paths import check_file
from ptq4dit_ao.errors import ArgumentError


def check_results(args: argparse.Namespace) -> None:
    """Raises ArgumentError, before the long part, if ``--json`` or ``--markdown`` cannot be written."""
    for path in filter(None, (args.json, args.markdown)):
        if not path.parent.is_dir():
            raise ArgumentError(f"there is no folder {path.parent} to write {path.name} to; make it, or choose another")
        check_file(path)


def write_results(args: argparse.Namespace, data: Mapping[str, object], markdown: str) -> None:
    """Write results to the files that ``--json`` and ``--markdown`` name."""
    if args.json:
        replace_json(args.json, data)
    if args.markdown:
        replace_text(args.markdown, markdown)
