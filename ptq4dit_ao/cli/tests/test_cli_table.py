"""``table``: what it asks for, prints, and exits with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ptq4dit_ao.cli import table as cli_table
from ptq4dit_ao.evaluation.table import TableResult, TableSettings
from ptq4dit_ao.evaluation.table.result import Row


@pytest.fixture
def asked(monkeypatch):
    """What ``make_table`` was called with; one cell is done, and 'auto' fails if it is asked for."""
    calls = []

    def make_table(settings, output, *, on_progress, on_cell):
        calls.append((settings, output))
        failed = {"auto-w8a8-5": "no [room]"} if "auto" in settings.methods else {}
        for stage, done, total in (("sample reference", 2, 2), ("all cells", 2, 4), ("sample reference", 1, 2)):
            on_progress(stage, done, total)
        on_cell("minmax-w8a8-5", None)
        for name, problem in failed.items():
            on_cell(name, problem)
        one = {"value": 1.5, "low": 1.0, "high": None}
        figures = {
            "eps": {"pooled": one, "median": one, "rows": 9},
            "images": {"mse": one},
            "distances": None,
            "proof": None,
        }
        row = Row(
            steps=5, bits="w8a8", method="minmax", model="minmax-w8a8", figures=figures, paper=None, notes=("said",),
            seconds={"measure": 2.0, "quantize": 1.0}, environment={"cpu": "c", "versions": {"torch": "2"}},
        )  # fmt: skip
        return TableResult(
            settings=dataclasses.replace(settings, sampler="ddpm"), model="m", network=None, is_inception=False,
            reference=None, rows=(row,), failed=failed, paper=None, environment={},
        )  # fmt: skip

    monkeypatch.setattr(cli_table, "make_table", make_table)
    return calls


def test_the_table_is_printed_with_what_it_must_be_read_with(run, asked, tmp_path):
    code, out, _ = run("table", "--methods", "minmax", "--bits", "w8a8", "--steps", "5", "--output", tmp_path)
    assert code == 0 and "minmax-w8a8-5: done" in out and "all cells" in out and "eta" in out
    assert "1.50 [1.00, -]" in out and "simulated (Q/DQ)" in out
    for remark in ("said", "3 s in all", "ptq4dit-ao table --model reference --methods minmax", "cpu c, torch 2"):
        assert remark in out
    assert f"saved to {tmp_path}: table.md, table.json, table.png" in out


def test_a_failed_cell_is_an_error_in_the_end(run, asked, tmp_path):
    code, out, err = run("table", "--methods", "minmax,auto", "--output", tmp_path)
    assert code == 1 and "auto-w8a8-5: failed: no [room]" in out and "1.50 [1.00, -]" in out
    assert err.strip() == f"error: 1 cells of {tmp_path} failed: auto-w8a8-5; the table has the others"


def test_options_reach_the_settings(run, asked):
    run("table", "--output", "a")
    run(
        "table", "--model", "x", "--methods", "", "--bits", "w3a8, w4a4", "--steps", "7", "--samples", 9,
        "--calibration-images", 3, "--seed", 2, "--guidance", 4, "--layers", "safe", "--features", "f:g",
        "--reference", "r.npz", "--lpips", "vgg", "--ablation", "--output", "b",
    )  # fmt: skip
    defaults = TableSettings(
        model="reference", methods=("minmax", "smoothquant", "paper", "ptqd", "fast", "auto"),
        bits=("w8a8", "w4a8", "w6a6", "w4a4"), steps=(100, 50),
    )  # fmt: skip
    changed = TableSettings(
        model="x", methods=(), bits=("w3a8", "w4a4"), steps=(7,), samples=9, calibration_images=3, seed=2,
        guidance=4.0, layers="safe", features="f:g", reference=Path("r.npz"), lpips="vgg", ablation=True,
    )  # fmt: skip
    assert asked == [(defaults, Path("a")), (changed, Path("b"))]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--bits", "w4"], 1, "bits 'w4' are not like 'w4a8'"),
        (["--methods", "auto,auto"], 1, "methods has 'auto' twice"),
        (["--steps", "5,x"], 2, "argument --steps: 'x' is not a positive whole number"),
        (["--layers", "all"], 2, "argument --layers: invalid choice"),
    ],
)
def test_user_errors(run, options, code, message):
    found, _, err = run("table", *options, "--output", "nowhere")
    assert found == code and message in err
