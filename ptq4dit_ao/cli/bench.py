"""``ptq4dit-ao bench``: the figures as a table, as Markdown and as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.markup import escape

from ptq4dit_ao._progress import OnStage
from ptq4dit_ao.cli.progress import progress
from ptq4dit_ao.cli.results import check_results, write_results
from ptq4dit_ao.cli.tables import print_table
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.bench.run import COMPILED, EAGER, BenchResult, Row
from ptq4dit_ao.evaluation.bench.run import bench as measure
from ptq4dit_ao.evaluation.bench.subjects import Subject, random_subject, saved_subject
from ptq4dit_ao.evaluation.environment import one_line
from ptq4dit_ao.lowering.backend import choose_backend
from ptq4dit_ao.recipe import load_recipe

DEFAULT_RECIPE = "dit_w8a8"
COLUMNS = (
    "model", "median ms", "10-90 %", "vs eager", "vs compiled", "SQNR dB", "integer GEMMs", "ready s",
    "RSS growth while building MB",
)  # fmt: skip
NONE = "-"


def bench(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao bench``."""
    check_results(args)
    for name in args.backends or ():
        choose_backend(name)  # before the long part, which a wrong name must not waste
    with progress(console) as on_progress:
        result = measure(
            _subject(args, on_progress),
            backends=args.backends,
            peers=args.peers,
            bfloat16=args.bf16,
            float_dtype=args.float_dtype and getattr(torch, args.float_dtype),
            rounds=args.rounds,
            on_progress=on_progress,
        )
    print_table(console, title(result), COLUMNS, (cells(result, row) for row in result.rows), wide=args.wide)
    for line in remarks(result):
        console.print(escape(line), soft_wrap=True)
    write_results(args, result.to_dict(), markdown(result))


def _subject(args: argparse.Namespace, on_progress: OnStage) -> Subject:
    if args.width is None:
        _refuse(args, ("blocks", "recipe"), "it is for a random model (--width); a saved one is as it was quantized")
        return saved_subject(
            args.directory,
            args.model,
            samples=args.samples,
            batch=args.batch,
            seed=args.seed,
            on_progress=on_progress,
        )
    _refuse(args, ("model", "samples"), "it is for a saved model; one of --width has random weights and inputs")
    recipe = load_recipe(args.recipe or DEFAULT_RECIPE)
    return random_subject(args.width, args.blocks, recipe, batch=args.batch, seed=args.seed, on_progress=on_progress)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ArgumentError(f"--{name} {getattr(args, name)}: {why}")


def title(result: BenchResult) -> str:
    """Headline of a bench: the model, the batch and the number of rounds."""
    return f"{result.model}, batch {result.batch}, {result.rounds} interleaved rounds"


def cells(result: BenchResult, row: Row) -> list[str]:
    """One for each of ``COLUMNS``."""
    if row.latency is None:
        return [f"{row.name} failed", *([NONE] * (len(COLUMNS) - 1))]  # why is a remark: no name of a row is as long
    gemms = _number(row.integer_gemms, "d")
    return [
        row.name,
        f"{row.latency.median_ms:.2f}",
        f"{row.latency.low_ms:.2f}-{row.latency.high_ms:.2f}",
        _number(result.speed_up(row, EAGER), ".2f", "x"),
        _number(result.speed_up(row, COMPILED), ".2f", "x"),
        _number(row.sqnr_db, ".1f"),
        gemms if row.promised is None else f"{gemms}/{row.promised}",
        _number(row.ready_s, ".1f"),
        _number(row.rss_growth_mb, ".0f"),
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def remarks(result: BenchResult) -> Iterator[str]:
    """Remarks below the table: what was measured where, and what did not run."""
    if result.note:
        yield result.note
    yield from (f"{row.name} failed: {row.problem}" for row in result.rows if row.latency is None)
    yield from (f"not here: {name}: {why}" for name, why in result.missing.items())
    yield one_line({**result.environment, "seed": result.seed})


def markdown(result: BenchResult) -> str:
    """The same as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(result, row) for row in result.rows)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{title(result)}\n\n{table}\n\n" + "".join(f"* {line}\n" for line in remarks(result))
