"""``evaluate``: what it prints and writes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from diffusers import DiTTransformer2DModel
from rich.console import Console

from ptq4dit_ao.cli import evaluate as cli_evaluate
from ptq4dit_ao.cli.main import build_parser
from ptq4dit_ao.cli.tables import print_table
from ptq4dit_ao.errors import PTQ4DiTError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.evaluation.result import EvaluationResult, EvaluationRow, SqnrEstimates
from ptq4dit_ao.metrics import Distances, Estimate, ImageErrors
from ptq4dit_ao.recipe import Calibration, Evaluation, Recipe
from ptq4dit_ao.reference.models import DIT_CONFIG, SAMPLING
from ptq4dit_ao.workflow import apply_recipe, load_model
from ptq4dit_ao.workflow.image_sampling import NOISE_SEED
from ptq4dit_ao.workflow.samples import recorded_samples

FEW = {"timesteps": 2, "samples": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """``model`` and the ``float`` model it was made of."""
    folder = tmp_path_factory.mktemp("saved")
    transformer = randomize_(DiTTransformer2DModel(**{**DIT_CONFIG, "num_layers": 1}), seed=0).eval()
    transformer.save_pretrained(folder / "float")
    recipe = Recipe(calibration=Calibration(**FEW, steps=2, guidance=1.5), evaluation=Evaluation(**FEW))
    quantized = apply_recipe(transformer, recipe, recorded_samples(load_model(str(folder / "float")), recipe))
    dataclasses.replace(quantized, sampling=SAMPLING).save(folder / "model")
    return folder


def test_evaluate_writes_what_it_prints(run, saved, tmp_path):
    figures, tables = tmp_path / "figures.json", tmp_path / "tables.md"
    code, out, _ = run(
        "evaluate", saved / "model", "--model", saved / "float", "--backend", "reference", "fbgemm", "--samples", 4,
        "--steps", 2, "--features", "digits", "--json", figures, "--markdown", tables,
    )  # fmt: skip
    assert code == 0 and "sample float32" in out and "eps fbgemm" in out and "eta" in out
    written, page = json.loads(figures.read_text()), tables.read_text()
    assert (written["samples"], written["steps"], written["seed"]) == (4, 2, NOISE_SEED)
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| W8A8")]
    assert [line[0] for line in lines] == ["| W8A8 simulated, reference", "| W8A8 integer, fbgemm"] * 2
    pooled = written["rows"][1]["eps"]["pooled"]
    assert lines[0][1] == f"{pooled['value']:.2f} [{pooled['low']:.2f}, {pooled['high']:.2f}]"
    assert lines[2][1] == f"{written['rows'][1]['distances']['frechet']:#.4g}"
    for line in lines:
        assert all(cell.strip("| ") in out for cell in line)
    for remark in ("fbgemm: 7/7 quantized linears", "no reference set: distances are to what the float model draws"):
        assert f"* {remark}" in page and remark in out
    assert "digits classifier" in page and "FID" not in page


def test_a_note_names_the_option(run, saved):
    code, out, _ = run("evaluate", saved / "model", "--model", saved / "float", "--samples", 3, "--steps", 2)
    assert code == 0 and "there is no feature network; give one (--features)" in out


def result(network: str, is_inception: bool) -> EvaluationResult:
    one = Estimate(value=1.0, low=0.5, high=2.0)
    eps = SqnrEstimates(pooled=one, median=one, per_timestep=((7.0, one),), rows=3)
    row = EvaluationRow(
        model="W8A8",
        execution="simulated",
        backend="a|b",
        eps=eps,
        images=ImageErrors(mse=one, mse_geometric=one, mse_median=one, psnr_db=one, ssim=one, images=2, data_range=2.0),
        distances=Distances(frechet=9.5, spatial_frechet=8, inception_score=7, precision=0.5, recall=0.25),
    )
    return EvaluationResult(
        model="m", rows=(row,), network=network, is_inception=is_inception, reference="real", reference_images=5,
        lpips=None, samples=2, steps=1, sampler="ddpm", guidance=1.5, seed=4, eps_seed=6, notes=("said",),
        environment={"cpu": "c", "versions": {}},
    )  # fmt: skip


def test_only_inception_gives_a_distance_the_name_fid():
    _, plain = cli_evaluate.sheets(result("toy", False))
    _, inception = cli_evaluate.sheets(result("inception-2015", True))
    assert plain.columns[1:4] == ("Frechet distance (toy)", "spatial Frechet distance (toy)", "Inception score (toy)")
    assert inception.columns[1:4] == (
        "FID (inception-2015)",
        "sFID (inception-2015)",
        "Inception score (inception-2015)",
    )
    assert plain.lines == (("W8A8 simulated, a|b", "9.500", "8.000", "7.000", "0.5000", "0.2500"),)


def test_sheets_fit_a_console_of_80_columns():
    console = Console(file=io.StringIO(), width=80)
    for sheet in cli_evaluate.sheets(result("toy", False)):
        print_table(console, sheet.title, sheet.columns, sheet.lines)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and sum("W8A8 simulated, a|b" in line for line in lines) == 2
    figures = ("1.00", "1.00 at 7", "1.00e+00", "1.0000"), ("9.500", "8.000", "7.000", "0.5000", "0.2500")
    assert all(any(all(cell in line for cell in row) for line in lines) for row in figures)


def test_the_page_says_what_it_must_be_read_with():
    page = cli_evaluate.markdown(result("toy", False)).splitlines()
    assert page[0] == "Model 'm' against its float32 form: equal inputs, equal noise"
    one, two = "1.00 [0.50, 2.00]", "1.00e+00 [5.00e-01, 2.00e+00]"
    figures = f"{one} | {one} | 1.00 at 7 | {two} | {two} | {two} | {one} | 1.0000 [0.5000, 2.0000]"
    assert rf"| W8A8 simulated, a\|b | {figures} |" in page
    assert "2 images of each against 5: real" in page
    assert page[-4:] == [
        "* said",
        "* [95 % bootstrap intervals] over 3 rows of inputs (seed 6) and 2 images",
        "* 1 DDPM steps, guidance 1.5, seed 4; data range 2",
        "* cpu c",
    ]


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_folder_that_is_not_there_is_told_before_the_work(run, monkeypatch, tmp_path, option):
    monkeypatch.setattr(cli_evaluate, "measure", lambda *_, **__: pytest.fail("began"))
    code, _, errors = run("evaluate", "out", option, tmp_path / "nowhere" / "figures")
    assert code == 1 and "nowhere to write figures to; make it, or choose another" in errors


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ((), {}),
        (
            (
                "--backend",
                "a",
                "b",
                "--samples",
                9,
                "--steps",
                3,
                "--sampler",
                "ddpm",
                "--seed",
                2,
                "--features",
                "f:g",
            ),
            {"backends": ["a", "b"], "samples": 9, "steps": 3, "sampler": "ddpm", "seed": 2, "features": "f:g"},
        ),
        (
            ("--model", "m", "--reference", "r.npz", "--cache", "c", "--lpips", "alex"),
            {"model": "m", "reference": Path("r.npz"), "cache": Path("c"), "lpips": "alex"},
        ),
    ],
)
def test_options_arrive(run, monkeypatch, options, changes):
    seen = []

    def measure(directory, model, *, on_progress, **arguments):
        seen.append({"directory": directory, "model": model, **arguments})
        raise PTQ4DiTError("enough")

    monkeypatch.setattr(cli_evaluate, "measure", measure)
    assert run("evaluate", "out", *options)[0] == 1
    defaults = {
        "directory": Path("out"), "model": None, "backends": ["reference"], "samples": 200, "steps": 50,
        "sampler": None, "seed": NOISE_SEED, "features": None, "reference": None, "cache": None, "lpips": None,
    }  # fmt: skip
    assert seen == [{**defaults, **changes}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "fbgem"], "backend 'fbgem' is unknown"),
        (
            ["--features", "inception"],
            "feature network 'inception' is none of 'digits', 'fashion', ",
        ),
        (["--features", "digits", "--reference", "real.jpg"], "is neither a folder of PNG, nor .npz"),
    ],
)
def test_user_errors(run, saved, options, message):
    code, _, err = run("evaluate", saved / "model", "--model", saved / "float", *options)
    assert code == 1 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_images_start_from_noise_of_their_own():
    assert build_parser().parse_args(["evaluate", "folder"]).seed == NOISE_SEED > Recipe().evaluation.seed
