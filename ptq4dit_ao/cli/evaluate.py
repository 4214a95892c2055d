"""``ptq4dit-ao evaluate``: the figures as tables, as Markdown and as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from ptq4dit_ao.cli.messages import with_flags
from ptq4dit_ao.cli.progress import progress
from ptq4dit_ao.cli.results import check_results, write_results
from ptq4dit_ao.cli.tables import print_table
from ptq4dit_ao.evaluation.environment import one_line
from ptq4dit_ao.evaluation.result import EvaluationResult, EvaluationRow
from ptq4dit_ao.evaluation.run import evaluate as measure
from ptq4dit_ao.metrics import Estimate

IMAGE_ERRORS = ("image MSE", "MSE GM", "MSE median")
"""Columns of the mean square error of images: its mean, geometric mean and median over images."""


@dataclass(frozen=True)
class Sheet:
    """A table as text."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def evaluate(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao evaluate``."""
    check_results(args)
    with progress(console) as on_progress:
        result = measure(
            args.directory,
            args.model,
            backends=args.backend,
            samples=args.samples,
            steps=args.steps,
            sampler=args.sampler,
            seed=args.seed,
            features=args.features,
            reference=args.reference,
            cache=args.cache,
            lpips=args.lpips,
            on_progress=on_progress,
        )
    for sheet in sheets(result):
        print_table(console, sheet.title, sheet.columns, sheet.lines, wide=args.wide)
    for remark in remarks(result):
        console.print(escape(with_flags(remark, args)), soft_wrap=True)
    write_results(args, result.to_dict(), markdown(result))


def sheets(result: EvaluationResult) -> Iterator[Sheet]:
    """Tables of an evaluation: paired figures, and distances where there are some."""
    perceptual = () if result.lpips is None else (f"LPIPS ({result.lpips})",)
    yield Sheet(
        f"Model {result.model!r} against its float32 form: equal inputs, equal noise",
        ("model", "eps SQNR dB", "median over t", "worst t", *IMAGE_ERRORS, "PSNR dB", "SSIM", *perceptual),
        tuple(_paired(row) for row in result.rows if row.eps is not None),
    )
    if result.network is not None:
        names = ("FID", "sFID") if result.is_inception else ("Frechet distance", "spatial Frechet distance")
        yield Sheet(
            f"{result.samples} images of each against {result.reference_images}: {result.reference}",
            ("model", *(f"{name} ({result.network})" for name in (*names, "Inception score", "precision", "recall"))),
            tuple(_distances(row) for row in result.rows if row.distances is not None),
        )


def _paired(row: EvaluationRow) -> tuple[str, ...]:
    assert row.eps is not None and row.images is not None
    t, worst = row.eps.worst
    images = row.images
    return (
        _name(row),
        _interval(row.eps.pooled, ".2f"),
        _interval(row.eps.median, ".2f"),
        f"{worst.value:.2f} at {t:g}",
        _interval(images.mse, ".2e"),
        _interval(images.mse_geometric, ".2e"),
        _interval(images.mse_median, ".2e"),
        _interval(images.psnr_db, ".2f"),
        _interval(images.ssim, ".4f"),
        *(() if images.lpips is None else (_interval(images.lpips, ".4f"),)),
    )


def _distances(row: EvaluationRow) -> tuple[str, ...]:
    d = row.distances
    assert d is not None
    figures = (d.frechet, d.spatial_frechet, d.inception_score, d.precision, d.recall)
    return (_name(row), *(f"{figure:#.4g}" for figure in figures))


def _name(row: EvaluationRow) -> str:
    """Simulated and integer execution are never one row."""
    return row.model if row.backend is None else f"{row.model} {row.execution}, {row.backend}"


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def remarks(result: EvaluationResult) -> Iterator[str]:
    """Remarks below the tables: notes, seeds and environment."""
    yield from result.notes
    yield from (row.proof for row in result.rows if row.proof is not None)
    rows, width = next((row.eps.rows, row.images.data_range) for row in result.rows if row.eps and row.images)
    yield f"[95 % bootstrap intervals] over {rows} rows of inputs (seed {result.eps_seed}) and {result.samples} images"
    steps = f"{result.steps} {result.sampler.upper()} steps"
    yield f"{steps}, guidance {result.guidance:g}, seed {result.seed}; data range {width:g}"
    yield one_line(result.environment)


def markdown(result: EvaluationResult) -> str:
    """The same as Markdown tables."""
    pages = []
    for sheet in sheets(result):
        lines = [sheet.columns, ("---",) * len(sheet.columns), *sheet.lines]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        pages.append(f"{sheet.title}\n\n{table}\n\n")
    return "".join(pages) + "".join(f"* {line}\n" for line in remarks(result))
