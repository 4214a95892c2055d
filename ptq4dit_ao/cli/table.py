"""``ptq4dit-ao table``: the comparison of a paper, resumable."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ptq4dit_ao.cli.messages import with_flags
from ptq4dit_ao.cli.progress import progress
from ptq4dit_ao.cli.tables import print_table
from ptq4dit_ao.errors import PTQ4DiTError
from ptq4dit_ao.evaluation.table import TableSettings, make_table
from ptq4dit_ao.evaluation.table.write import columns, lines, remarks, title

NAMES = 3
"""Steps, bits and method say what a row is about."""


def table(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao table``."""
    settings = TableSettings(
        model=args.model,
        methods=args.methods,
        bits=args.bits,
        steps=args.steps,
        samples=args.samples,
        calibration_images=args.calibration_images,
        seed=args.seed,
        sampler=args.sampler,
        guidance=args.guidance,
        layers=args.layers,
        backend=args.backend,
        features=args.features,
        reference=args.reference,
        lpips=args.lpips,
        adaround_steps=args.adaround_steps,
        ablation=args.ablation,
    )

    def on_cell(name: str, problem: str | None) -> None:
        console.print(
            f"{name}: done" if problem is None else escape(with_flags(f"{name}: failed: {problem}", args)),
            soft_wrap=True,
        )

    with progress(console) as on_progress:
        result = make_table(settings, args.output, on_progress=on_progress, on_cell=on_cell)
    print_table(console, title(result), columns(result), lines(result), names=NAMES, wide=args.wide)
    for remark in remarks(result):
        console.print(escape(with_flags(remark, args)), soft_wrap=True)
    console.print(f"saved to [bold]{args.output}[/]: table.md, table.json, table.png")
    _raise_for_failed(result.failed, args.output)


def _raise_for_failed(failed: dict[str, str], output: Path) -> None:
    if failed:
        raise PTQ4DiTError(f"{len(failed)} cells of {output} failed: {', '.join(failed)}; the table has the others")
