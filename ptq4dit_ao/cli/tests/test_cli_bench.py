"""``bench``, ``backends`` and ``export``: what they print and write."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ptq4dit_ao.cli import bench as cli_bench
from ptq4dit_ao.errors import PTQ4DiTError
from ptq4dit_ao.evaluation.bench.run import BenchResult, Row
from ptq4dit_ao.lowering import Capabilities
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.metrics import LatencyResult
from ptq4dit_ao.recipe import Recipe, shipped_recipes
from ptq4dit_ao.workflow import apply_recipe

ALL = ("float32 eager", "float32 compiled", "reference", "fbgemm")


@pytest.fixture(scope="module")
def saved(tiny_dit, tiny_samples, tmp_path_factory) -> Path:
    """``model`` and the ``float`` model it was made of."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_dit.save_pretrained(folder / "float")
    apply_recipe(tiny_dit, Recipe(), tiny_samples).save(folder / "model")
    return folder


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.fixture
def writer(monkeypatch) -> list[object]:
    """A backend ``scribe`` that writes a file; the requests it gets."""
    requests = []

    def write(request, path):
        requests.append(request)
        path.write_bytes(b"x" * 1_500_000)
        return BACKENDS["fbgemm"].build(request)

    carries = Capabilities(float_dtypes=(torch.bfloat16,))
    scribe = dataclasses.replace(BACKENDS["fbgemm"], name="scribe", carries=carries, write=write, suffix=".quill")
    monkeypatch.setitem(BACKENDS, "scribe", scribe)
    absent = dataclasses.replace(scribe, name="absent", lacks=lambda: "there is no [such] device")
    monkeypatch.setitem(BACKENDS, "absent", absent)
    return requests


# -- bench -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_bench_writes_what_it_prints(run, saved, tmp_path):
    figures, markdown = tmp_path / "figures.json", tmp_path / "table.md"
    code, out, _ = run(
        "bench", saved / "model", "--model", saved / "float", "--backends", "reference", "fbgemm", "--rounds", 2,
        "--no-bf16", "--json", figures, "--markdown", markdown,
    )  # fmt: skip
    assert code == 0 and "build" in out and "rounds" in out and "eta" in out
    written = json.loads(figures.read_text())
    assert (written["rounds"], written["batch"], written["seed"]) == (2, 2, 0)
    assert written["environment"]["threads"] == torch.get_num_threads()
    assert [row["name"] for row in written["rows"]] == [*ALL]
    table = markdown.read_text()
    for name, row in zip(ALL, written["rows"], strict=True):
        line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert all(cell in out for cell in cells) and len(cells) == len(cli_bench.COLUMNS)
        assert cells[1] == f"{row['latency']['median_ms']:.2f}" and cells[3] == f"{row['vs_eager']:.2f}x"
    assert "14/14" in table and "1.00x" in table and "float, W8A8, batch 2, 2 interleaved rounds" in table
    assert f"torch {torch.__version__}" in out and "random weights" not in out


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_bench_without_weights_says_so(run):
    code, out, _ = run(
        "bench", "--width", "dit-s", "--blocks", 1, "--recipe", "dit_w4a8", "--backends", "fbgemm", "--rounds", 1
    )
    assert code == 0
    assert "\nrandom weights: speed only\n" in out and "dit-s, depth 1, W4A8, batch 2" in out and "7/7" in out


def result(*rows: Row, **changes: object) -> BenchResult:
    about = {"cpu": "a", "gpu": None, "versions": {"torch": "2"}}
    options = {"note": "", "environment": about, "batch": 1, "rounds": 1, "seed": 0, "missing": {}, **changes}
    return BenchResult(model="m", rows=rows, **options)


def test_failures_and_missing_peers_are_shown():
    time = LatencyResult(median_ms=2.0, low_ms=1.5, high_ms=2.5, rounds=1)
    rows = Row(name="float32 eager", latency=time), Row(name="odd", problem="ValueError: a | b")
    shown = result(*rows, missing={"SDNQ": "sdnq is not installed"}, note="random")
    assert cli_bench.cells(shown, rows[0]) == ["float32 eager", "2.00", "1.50-2.50", "1.00x", *["-"] * 5]
    assert cli_bench.cells(shown, rows[1]) == ["odd failed", *["-"] * 8]
    page = cli_bench.markdown(shown)
    assert "| odd failed | - |" in page
    for line in (
        "* random",
        "* odd failed: ValueError: a | b",
        "* not here: SDNQ: sdnq is not installed",
        "* cpu a, seed 0, torch 2",
    ):
        assert line in page.splitlines()


def test_memory_is_said_to_be_of_the_process():
    assert cli_bench.COLUMNS[-1] == "RSS growth while building MB"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"backends": None, "peers": False, "bfloat16": None, "float_dtype": None, "rounds": 20}),
        (
            ["--peers", "--bf16", "--float-dtype", "bfloat16", "--backends", "fbgemm", "--rounds", 3],
            {"backends": ["fbgemm"], "peers": True, "bfloat16": True, "float_dtype": torch.bfloat16, "rounds": 3},
        ),
    ],
)
def test_options_arrive(run, saved, monkeypatch, options, expected):
    seen = []

    def measure(subject, *, on_progress, **arguments):
        seen.append((subject.seed, arguments))
        raise PTQ4DiTError("enough")

    monkeypatch.setattr(cli_bench, "measure", measure)
    run("bench", saved / "model", "--model", saved / "float", "--seed", 7, *options)
    assert seen == [(7, expected)]


# -- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("writer")
def test_backends_are_listed_with_what_they_lack(run):
    code, out, err = run("backends")
    assert (code, err) == (0, "")
    text = " ".join(out.replace("│", " ").split())
    assert all(name in text for name in BACKENDS)
    lines = {line.split()[1]: " ".join(line.split()) for line in out.splitlines() if line.startswith("│ ")}
    assert lines["scribe"].startswith("│ scribe │ yes │") and lines["scribe"].endswith("│ .quill │")
    assert "│ absent │ no: there is no [such] device │" in lines["absent"]
    assert "│ anything │ - │" in lines["reference"]
    assert "uint8 activations, int8 weights, float32/bfloat16 float part" in text


@pytest.mark.parametrize("command", ["backends", "recipes"])
@pytest.mark.usefixtures("writer")
def test_lists_fit_a_console_of_80_columns(run, monkeypatch, command):
    whole = run(command, "--wide")[1]
    monkeypatch.setenv("COLUMNS", "80")
    assert run(command, "--wide")[1] == whole and max(map(len, whole.splitlines())) > 80
    code, out, _ = run(command)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    names = BACKENDS if command == "backends" else shipped_recipes()
    assert all(f"│ {name} " in out and f"│ {name} " in whole for name in names)


# -- export ----------------------------------------------------------------------------------------------------------


def test_export_writes_the_file_of_a_backend(run, saved, writer, tmp_path):
    options = ("--backend", "scribe", "--output", tmp_path / "deep" / "file")
    code, out, err = run("export", saved / "model", *options, "--float-dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert (tmp_path / "deep" / "file.quill").stat().st_size == 1_500_000
    assert "file.quill, 1.50 MB" in "".join(out.splitlines())
    (request,) = writer
    assert request.float_dtype == torch.bfloat16 and len(request.linears) == 14
    assert [tuple(x.shape) for x in request.example_inputs] == [(4, 4, 8, 8), (4,), (4,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "fbgemm"], "backend 'fbgemm' runs in this process and writes no file; these do: "),
        (["--backend", "absent"], "backend 'absent' cannot run here: there is no [such] device"),
        (["--backend", "scribe", "--float-dtype", "float16"], "cannot compute its float part in torch.float16"),
    ],
)
@pytest.mark.usefixtures("writer")
def test_what_cannot_be_exported(run, saved, tmp_path, options, message):
    code, _, err = run("export", saved / "model", "--output", tmp_path / "file", *options)
    assert code == 1 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
