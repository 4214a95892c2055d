"""Tables on consoles of any width: no name is cut, no figure is broken, and no line is longer than the console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ptq4dit_ao.cli.bench import COLUMNS as BENCH
from ptq4dit_ao.cli.commands import _SITE_COLUMNS
from ptq4dit_ao.cli.tables import Column, print_table

LAYER = "transformer_blocks.27.norm1.emb.timestep_embedder.linear_1"
SITE = "single_transformer_blocks.37.attn.{to_q,to_k,to_v,proj_mlp}"
FIGURES = ("123.45", "121.10-1300.23", "1.23x", "0.98x", "45.1", "42/42", "12.3", "1024")
INTERVAL = "1.18e-02 [1.07e-02, 1.30e-02]"
DISTANCES = tuple(
    f"{name} (digits classifier)" for name in ("Frechet distance", "spatial Frechet distance", "precision", "recall")
)
TABLE = ("steps", "bits", "method", "eps SQNR dB", "median over t", "image MSE", "PSNR dB", *DISTANCES)
WORDS = "quantize/dequantize nodes run eagerly in float: a simulation, on any machine"


def printed(width: int, *table: object, **options: object) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_table(console, *table, **options)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "shown"), [(120, INTERVAL), (46, INTERVAL), (36, "1.18e-02 │")])
def test_figures_are_whole_and_intervals_go_first(width, shown):
    lines = printed(width, "T", ("model", "image MSE (digits classifier)"), [("a [b]", INTERVAL), ("float32", "-")])
    text = "\n".join(lines)
    assert shown in text and "a [b]" in text and max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
def test_a_long_name_stands_above_its_figures_if_not_beside_them(width):
    lines = printed(width, "dit-s, batch 2", BENCH, [("float32 compiled", *FIGURES), ("fbgemm", *FIGURES)])
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(text.count(figure) == 2 for figure in FIGURES) and "float32 compiled" in text
    assert all(word in text for heading in BENCH for word in heading.split())
    if width == 80:
        assert lines[-1].split() == list(FIGURES) and lines[-2] == "fbgemm" and lines[-4] == "float32 compiled"
        ends = [{line.index(figure) + len(figure) for line in (lines[-1], lines[-3])} for figure in FIGURES]
        assert all(len(end) == 1 for end in ends)  # in columns


def test_columns_are_parted_over_tables_that_all_have_the_names():
    row = ("100", "W4A8", "smoothquant", INTERVAL, "40.12 [40.00, 41.00]", INTERVAL, "28.10 [27.00, 29.00]", "9.5")
    lines = printed(80, "Model 'm'", TABLE, [(*row, "8.25", "0.5", "0.75")], names=3)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.count("smoothquant") == text.count("W4A8") == 3
    assert all(figure in text for figure in ("1.18e-02", "40.12", "28.10", "9.5", "8.25", "0.75"))
    assert "[" not in text and text.count("Model 'm'") == 3


def test_a_column_that_can_be_spared_is_named_when_it_is_left_out():
    row = (SITE, "1152/1152", "ssc 0.5", "0.00123 .. 1e+03", f"{SITE}.norm, {SITE}.other")
    lines = printed(80, "", _SITE_COLUMNS, [row])
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80 and SITE in text and ".norm" not in text
    assert all(cell in text for cell in row[1:4])
    assert lines[-1] == "not shown: folded into (--wide shows it)"
    assert "not shown" not in "\n".join(printed(300, "", _SITE_COLUMNS, [row]))


def test_words_are_wrapped_in_columns_that_can_be_read():
    columns = [Column(heading, is_text=True) for heading in ("backend", "here", "what it is", "writes")]
    lines = printed(80, "", columns, [("x86_inductor", f"no: {WORDS}", WORDS, "-")])
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [" ".join(filter(None, column)) for column in zip(*cells, strict=True)] == [
        "x86_inductor", f"no: {WORDS}", WORDS, "-"
    ]  # fmt: skip
    assert all(len(cell) > 12 for row in cells[:-1] for cell in row[1:3])


@pytest.mark.parametrize("width", [80, 30])
def test_a_name_wider_than_the_console_is_folded_and_not_cut(width):
    name = LAYER * 2
    lines = printed(width, "T", ("layer", "SQNR dB", "bits"), [(name, "45.1", "W8A8"), ("b", "-", "float")])
    assert max(map(len, lines)) <= width and "".join(line.strip() for line in lines[1:]).startswith(name)
    assert any(line.split() == ["SQNR", "dB", "45.1"] for line in lines)


def test_wide_prints_it_all_in_one_table():
    row = (SITE, "1152/1152", "ssc 0.5", "0.00123 .. 1e+03", SITE)
    lines = printed(80, "", _SITE_COLUMNS, [row], wide=True)
    assert len([line for line in lines if all(cell in line for cell in row)]) == 1


def test_a_table_without_rows_has_its_headings():
    assert "balanced site" in "\n".join(printed(80, "", _SITE_COLUMNS, []))
