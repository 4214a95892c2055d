"""``make_table``: fill the cells of a table one after another. Cells that exist in its folder are not repeated."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path, check_writable
from ptq4dit_ao._progress import OnStage, ignore
from ptq4dit_ao.errors import ArgumentError, PTQ4DiTError
from ptq4dit_ao.evaluation.environment import environment
from ptq4dit_ao.evaluation.table.cells import Json
from ptq4dit_ao.evaluation.table.paper import PaperFigures, paper_figures
from ptq4dit_ao.evaluation.table.result import Row, TableResult
from ptq4dit_ao.evaluation.table.runner import Cell, TableRunner
from ptq4dit_ao.evaluation.table.settings import TableSettings
from ptq4dit_ao.evaluation.table.write import write_table

logger = logging.getLogger(__name__)


def make_table(
    settings: TableSettings,
    output: str | Path,
    *,
    on_progress: OnStage = ignore,
    on_cell: Callable[[str, str | None], None] = lambda *_: None,
) -> TableResult:
    """Quantize with each method at each width, measure at each step count, and write the table.

    Args:
        settings: settings of the comparison.
        output: folder for ``table.md``, ``table.json``, ``table.png``, the cells, and what they share: quantized
            models, the float model's images, and statistics of the reference set. The same call resumes from the cells
            that exist there.
        on_progress: called with ``(stage, done, total)`` as stages advance. The stage ``all cells`` counts over the
            whole table.
        on_cell: called for each newly computed cell, with its name and, if it failed, the reason.

    Raises:
        ArgumentError: the model is not class-conditional, an option is wrong, or the folder holds cells of other
            settings.
        RecipeError: a method is not a recipe.
        PTQ4DiTError: the float model cannot be sampled or measured. A failure of one method does not affect the others.
    """
    output = as_path(output, "output")
    _check_folder(output)
    runner = TableRunner(settings, output, on_progress)
    settings = runner.settings
    paper = paper_figures(runner.model, runner.network, settings.reference is not None, settings)
    rows, failed = [], {}
    for cell in runner.cells():
        found, problem = runner.found(cell), None
        if found is None:
            try:
                found = runner.fill(cell)
            except Exception as error:  # errors of any package, since the other methods may work
                if cell.recipe is None:
                    raise
                failed[cell.name] = problem = str(error) if isinstance(error, PTQ4DiTError) else repr(error)
                logger.debug("%s failed", cell.name, exc_info=True)
            runner.done(cell)
            on_cell(cell.name, problem)
        if found is not None:
            rows.append(_row(cell, found, paper))
    result = TableResult(
        settings=settings,
        model=runner.model.name,
        network=None if runner.network is None else runner.network.name,
        is_inception=runner.network is not None and runner.network.is_inception,
        reference=runner.reference,
        rows=tuple(rows),
        failed=failed,
        paper=paper,
        environment=environment(),
    )
    write_table(result, output)
    return result


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{folder} is a file; give the table a folder of its own (output=...)")
    check_writable(folder / "table.md")
    require("matplotlib", extra="report")


def _row(cell: Cell, found: Json, paper: PaperFigures | None) -> Row:
    return Row(
        steps=cell.steps,
        bits=cell.bits,
        method=cell.method,
        model=cell.model,
        figures=found["row"],
        paper=None if paper is None else paper.of(cell.steps, cell.bits, cell.method),
        seconds=found["seconds"],
        notes=tuple(found["notes"]),
        environment=found["environment"],
    )
