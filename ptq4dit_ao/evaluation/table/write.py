"""Output of a table as Markdown, JSON and a chart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ptq4dit_ao._files import replace_json, replace_text, replacing_file
from ptq4dit_ao.evaluation.environment import one_line
from ptq4dit_ao.evaluation.table.paper import METRICS
from ptq4dit_ao.evaluation.table.result import Row, TableResult
from ptq4dit_ao.evaluation.table.settings import FLOAT
from ptq4dit_ao.report.comparison import Dot, Panel, comparison_chart

NONE = "-"
"""Text of an empty cell."""
_PAIRED = {
    "eps SQNR dB": ("eps", "pooled", ".2f"),
    "median over t": ("eps", "median", ".2f"),
    "image MSE": ("images", "mse", ".2e"),
    "MSE GM": ("images", "mse_geometric", ".2e"),
    "MSE median": ("images", "mse_median", ".2e"),
    "PSNR dB": ("images", "psnr_db", ".2f"),
}
_DISTANCES = ("frechet", "spatial_frechet", "inception_score", "precision", "recall")


def write_table(result: TableResult, folder: Path) -> None:
    """Write ``table.md``, ``table.json`` and ``table.png``."""
    replace_text(folder / "table.md", markdown(result))
    replace_json(folder / "table.json", result.to_dict())
    with replacing_file(folder / "table.png") as temporary:
        temporary.write_bytes(comparison_chart(panels(result)))


def columns(result: TableResult) -> tuple[str, ...]:
    """Names of the columns. Those measured with a feature network contain its name."""
    names = ["steps", "bits", "method", *_paired(result)]
    if result.network is not None:
        distances = ("FID", "sFID") if result.is_inception else ("Frechet distance", "spatial Frechet distance")
        names += [f"{name} ({result.network})" for name in (*distances, "Inception score", "precision", "recall")]
    if result.paper is not None:
        names += [f"{name}, the paper ({result.paper.solver})" for name in METRICS]
    return tuple(names)


def _paired(result: TableResult) -> dict[str, tuple[str, str, str]]:
    """Columns of paired figures: header -> part of a row, figure in it, and format."""
    network = result.settings.lpips
    return _PAIRED if network is None else {**_PAIRED, f"LPIPS ({network})": ("images", "lpips", ".4f")}


def lines(result: TableResult) -> Iterator[tuple[str, ...]]:
    """Texts of the cells of each row."""
    for row in result.rows:
        cells = [str(row.steps), (row.bits or "").upper() or NONE, row.method]
        cells += [_interval((row.figures[part] or {}).get(name), form) for part, name, form in _paired(result).values()]
        if result.network is not None:
            cells += [_number((row.figures["distances"] or {}).get(name)) for name in _DISTANCES]
        if result.paper is not None:
            cells += map(_number, row.paper or (None,) * len(METRICS))
        yield tuple(cells)


def title(result: TableResult) -> str:
    """Title of the table: the model, and how the quantized models were executed."""
    return f"Model {result.model!r}, {result.execution}"


def remarks(result: TableResult) -> Iterator[str]:
    """Remarks below the table: notes, proofs, failures, settings and environment."""
    settings = result.settings
    yield from dict.fromkeys(note for row in result.rows for note in row.notes)
    proofs = (row.figures["proof"] for row in result.rows)
    yield from dict.fromkeys(proof for proof in proofs if proof is not None)
    yield from (f"failed: {name}: {why}" for name, why in result.failed.items())
    if result.reference is not None:
        yield f"distances of {settings.samples} images to: {result.reference}"
    paired = next((row.figures for row in result.rows if row.figures["eps"] is not None), None)
    if paired is not None:
        over = f"{paired['eps']['rows']} rows of inputs and {settings.samples} images at equal seeds"
        yield f"[95 % bootstrap intervals] over {over}; eps SQNR is the same at any number of steps"
    assert settings.sampler is not None
    drawn = f"{settings.sampler.upper()}, guidance {settings.guidance:g}, seed {settings.seed}"
    yield f"{drawn}, layers {settings.layers!r} for all methods"
    yield f"{settings.calibration_images} calibration images at each timestep; {result.seconds:.0f} s in all"
    yield settings.command
    yield from dict.fromkeys(one_line(row.environment) for row in result.rows)


def markdown(result: TableResult) -> str:
    """The whole table as Markdown."""
    head = columns(result)
    grid = [head, ("---",) * len(head), *lines(result)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in grid)
    return f"{title(result)}\n\n{table}\n\n" + "".join(f"* {line}\n" for line in remarks(result))


def panels(result: TableResult) -> list[list[Panel]]:
    """Panels of the chart, with a column for each step count: image error and, if measured, Frechet distance."""
    name = "FID" if result.is_inception else "Frechet distance"
    rows = [[_panel(result, steps, "image MSE", _mse) for steps in result.settings.steps]]
    if result.network is not None:
        label = f"{name} ({result.network})"
        rows.append([_panel(result, steps, label, _frechet) for steps in result.settings.steps])
    return rows


def _panel(result: TableResult, steps: int, label: str, read: Callable[[Row], Dot | None]) -> Panel:
    rows = {(row.method, row.bits): read(row) for row in result.rows if row.steps == steps}
    methods = dict.fromkeys(row.method for row in result.rows if row.method != FLOAT)
    bits = result.settings.bits
    baseline = rows.get((FLOAT, None))
    return Panel(
        title=f"{steps} steps",
        label=label,
        groups=tuple(name.upper() for name in bits),
        series={method: [rows.get((method, name)) for name in bits] for method in methods},
        baseline=None if baseline is None else baseline[0],
    )


def _mse(row: Row) -> Dot | None:
    found = (row.figures["images"] or {}).get("mse")
    return None if found is None else (found["value"], found["low"], found["high"])


def _frechet(row: Row) -> Dot | None:
    found = row.figures["distances"]
    return None if found is None else (found["frechet"],) * 3


def _interval(estimate: dict[str, Any] | None, form: str) -> str:
    """Text of an estimate with its interval. Infinite values are None, because JSON does not have them."""
    if estimate is None or estimate["value"] is None:
        return NONE
    low, high = (NONE if estimate[end] is None else f"{estimate[end]:{form}}" for end in ("low", "high"))
    return f"{estimate['value']:{form}} [{low}, {high}]"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:#.4g}"
