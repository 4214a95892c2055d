"""``table``: its cells are what ``evaluate`` finds, are kept, are not computed twice, and belong to their settings."""

from __future__ import annotations

import dataclasses
import json

import pytest
from diffusers import DiTTransformer2DModel
from torch import nn

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.evaluation.result import finite
from ptq4dit_ao.evaluation.run import evaluate
from ptq4dit_ao.evaluation.table import TableSettings, make_table, runner
from ptq4dit_ao.recipe import load_recipe
from ptq4dit_ao.reference.models import DIT_CONFIG
from ptq4dit_ao.workflow.image_sampling import NOISE_SEED, ImageSampling
from ptq4dit_ao.workflow.main_job import quantize
from ptq4dit_ao.workflow.models import LoadedModel, load_model
from ptq4dit_ao.workflow.quantized_model import load_quantized

FEW = "calibration: {timesteps: 2, steps: 2}\nevaluation: {timesteps: 2, samples: 2}"
NAMES = ["float32-2", "plain-w4a8-2", "corrected-w4a8-2"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """``settings(**changes)``: two methods, of one random block that denoises 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("inputs")
    randomize_(DiTTransformer2DModel(**{**DIT_CONFIG, "num_layers": 1}), seed=0).save_pretrained(folder / "float")
    (folder / "plain").write_text(f"version: 1\n{FEW}\n")
    (folder / "corrected").write_text(f"version: 1\n{FEW}\nnoise_correction: {{images: 3}}\n")
    (folder / "balanced").write_text(f"version: 1\n{FEW}\nbalance: {{method: max}}\n")
    (folder / "failing").write_text(
        f"version: 1\n{FEW}\noverrides: [{{pattern: '*class_embedder.embedding_table', skip: true}}]\n"
    )

    def make(**changes):
        changes["methods"] = tuple(str(folder / name) for name in changes.get("methods", ("plain", "corrected")))
        options = {"bits": ("w4a8",), "steps": (2,), "samples": 6, "calibration_images": 2, "features": "digits"}
        options["sampler"] = "ddim"
        return TableSettings(model=str(folder / "float"), **{**options, **changes})

    return make


@pytest.fixture(scope="module")
def filled(settings, tmp_path_factory):
    """A folder with a table, and the table."""
    folder = tmp_path_factory.mktemp("table")
    return folder, make_table(settings(), folder)


@pytest.fixture
def counted(monkeypatch):
    """Names of the models that are quantized from now on, and of the stages of drawing."""
    quantized, drawn = [], []
    quantize, draw = runner.quantize, ImageSampling.draw
    monkeypatch.setattr(runner, "quantize", lambda *a, **k: quantized.append(a[2].name) or quantize(*a, **k))
    monkeypatch.setattr(ImageSampling, "draw", lambda self, *a, **k: drawn.append(self.steps) or draw(self, *a, **k))
    return quantized, drawn


def names(result):
    return ["-".join(filter(None, (row.method, row.bits, str(row.steps)))) for row in result.rows]


def test_rows_are_those_of_the_papers_tables(filled):
    folder, result = filled
    assert names(result) == NAMES and result.failed == {} and result.paper is None
    assert sorted(path.stem for path in (folder / "cells").iterdir()) == sorted(NAMES)
    assert all(row.figures["execution"] == "simulated" for row in result.rows[1:])
    assert (result.network, result.reference) == ("digits classifier", "what the float model draws")


def test_a_cell_is_what_evaluate_finds(filled, settings, tmp_path):
    folder, result = filled
    corrected = settings().recipe(load_recipe(settings().methods[1]), "w4a8")
    quantize(load_model(settings().model), corrected, tmp_path / "corrected", grids=False)
    for row, model in zip(result.rows[1:], (folder / "models" / "plain-w4a8", tmp_path / "corrected"), strict=True):
        options = {"samples": 6, "steps": 2, "seed": NOISE_SEED, "features": "digits"}
        found = evaluate(model, settings().model, **options).to_dict()["rows"][1]
        assert row.figures == json.loads(json.dumps(found))
    recipe = json.loads((folder / "cells" / "plain-w4a8-2.json").read_text())["depends"]["recipe"]
    assert (recipe["weights"]["bits"], recipe["layers"], recipe["calibration"]["samples"]) == (4, "paper", 2)


@pytest.mark.slow
def test_a_sampler_has_a_table_of_its_own(filled, settings, tmp_path):
    """It draws what calibrates, what is compared, what the correction is fitted to, and the images."""
    folder, ddim = filled
    asked = settings(sampler="ddpm")
    with pytest.raises(ArgumentError, match='made with sampling.sampler "ddim", not "ddpm"'):
        make_table(asked, folder)
    result = make_table(asked, tmp_path / "table")
    for row, method in zip(result.rows[1:], asked.methods, strict=True):
        model = tmp_path / row.method
        quantize(load_model(asked.model), asked.recipe(load_recipe(method), "w4a8"), model, grids=False)
        options = {"samples": 6, "steps": 2, "seed": NOISE_SEED, "features": "digits"}
        found = evaluate(model, asked.model, **options)
        assert found.sampler == "ddpm" and row.figures == json.loads(json.dumps(found.to_dict()["rows"][1]))
    for row, other in zip(result.rows[1:], ddim.rows[1:], strict=True):
        assert row.figures["eps"] != other.figures["eps"] and row.figures["images"] != other.figures["images"]


def test_steps_that_no_sampler_takes_are_refused_before_the_work(settings, tmp_path):
    with pytest.raises(ArgumentError, match="steps is 1001; it must lie between 1 and the model's 1000 timesteps"):
        make_table(settings(steps=(2, 1001)), tmp_path, on_progress=lambda *_: pytest.fail("began"))


def test_a_finished_table_is_read(filled, settings, counted):
    folder, result = filled
    again = make_table(settings(), folder, on_cell=lambda *_: pytest.fail("computed"))
    assert again.rows == result.rows and counted == ([], [])


def test_another_step_count_quantizes_nothing_again(filled, settings, counted):
    folder, result = filled
    told = []
    longer = make_table(settings(steps=(2, 3)), folder, on_progress=lambda *n: told.append(n))
    assert longer.rows[:3] == result.rows and names(longer)[3] == "float32-3" and len(longer.rows) == 6
    assert counted == ([], [3] * 3)
    counts = [n[1:] for n in told if n[0] == runner.ALL]
    assert counts[-1] == (9, 9) and [done for done, _ in counts] == sorted(done for done, _ in counts)


def test_the_float_models_images_are_drawn_once(settings, tmp_path, counted):
    def interrupt(name, problem):
        if name == NAMES[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_table(settings(), tmp_path, on_cell=interrupt)
    assert counted == (["plain-w4a8"], [2, 2])
    result = make_table(settings(), tmp_path)
    assert counted == (["plain-w4a8"], [2, 2, 2]) and len(result.rows) == 3  # noise is corrected in the scheduler
    _, plain, corrected = result.rows
    assert plain.seconds["quantize"] == corrected.seconds["quantize"]
    measured = sum(row.seconds["measure"] for row in result.rows)
    assert result.seconds == pytest.approx(measured + plain.seconds["quantize"])


def test_methods_that_differ_in_more_have_models_of_their_own(settings, tmp_path, counted):
    result = make_table(settings(methods=("corrected", "balanced")), tmp_path)
    assert counted[0] == ["corrected-w4a8", "balanced-w4a8"]
    assert load_quantized(tmp_path / "models" / "corrected-w4a8").recipe.noise_correction.images == 0
    assert result.seconds == pytest.approx(sum(sum(row.seconds.values()) for row in result.rows))


def test_a_method_finds_the_model_that_another_left(settings, tmp_path, counted):
    make_table(settings(methods=("corrected",)), tmp_path)
    result = make_table(settings(methods=("plain", "corrected")), tmp_path)
    assert counted[0] == ["corrected-w4a8"] and [row.model for row in result.rows[1:]] == ["corrected-w4a8"] * 2


def test_what_is_no_error_of_ours_leaves_the_rest_alone_too(settings, tmp_path, monkeypatch):
    quantize = runner.quantize

    def fails(model, recipe, folder, **options):
        if folder.name == "plain-w4a8":
            raise RuntimeError("no kernel")
        return quantize(model, recipe, folder, **options)

    monkeypatch.setattr(runner, "quantize", fails)
    result = make_table(settings(methods=("plain", "balanced")), tmp_path)
    assert result.failed == {"plain-w4a8-2": "RuntimeError('no kernel')"}
    assert names(result) == ["float32-2", "balanced-w4a8-2"]


def test_damaged_images_of_the_float_model_are_told(settings, tmp_path):
    make_table(settings(methods=("plain",)), tmp_path)
    (tmp_path / "cells" / "plain-w4a8-2.json").unlink()
    (tmp_path / "float32" / "images-2.safetensors").write_bytes(b"half")
    result = make_table(settings(methods=("plain",)), tmp_path)
    assert "images-2.safetensors: Error while" in result.failed["plain-w4a8-2"]
    assert "remove it to sample them again" in result.failed["plain-w4a8-2"]


def test_what_fails_leaves_the_rest_alone(settings, tmp_path, counted):
    told = []
    options = settings(methods=("failing", "plain"), steps=(2, 1))
    result = make_table(options, tmp_path, on_cell=lambda *n: told.append(n))
    assert names(result) == ["float32-2", "plain-w4a8-2", "float32-1", "plain-w4a8-1"]
    assert (
        list(result.failed) == ["failing-w4a8-2", "failing-w4a8-1"]
        and "embedding_table" in result.failed["failing-w4a8-1"]
    )
    assert counted[0] == ["failing-w4a8", "plain-w4a8"]
    assert [name for name, problem in told if problem] == list(result.failed)
    assert "* failed: failing-w4a8-2: " in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 7}, r"float32-2.json was made with samples 6, not 7; give another folder \(output=\.\.\.\)"),
        ({"seed": 1}, r"float32-2.json was made with seed 3000, not 3001"),
        ({"guidance": 2.0}, r"float32-2.json was made with guidance 1.5, not 2.0"),
        ({"calibration_images": 3}, r"plain-w4a8.json was made with recipe.calibration.samples 2, not 3"),
        ({"backend": "fbgemm"}, r'plain-w4a8-2.json was made with backend "reference", not "fbgemm"'),
        ({"layers": "safe"}, r'plain-w4a8.json was made with recipe.layers "paper", not "safe"'),
        ({"features": "digits", "model": "reference"}, r"float32-2.json was made with model \"[0-9a-f]+\", not"),
    ],
)
def test_a_folder_of_other_settings_is_refused_before_the_work(filled, settings, counted, changes, message):
    options = settings(**{key: value for key, value in changes.items() if key != "model"})
    if "model" in changes:
        options = TableSettings(**{**vars(options), "model": changes["model"]})
    with pytest.raises(ArgumentError, match=message):
        make_table(options, filled[0])
    assert counted == ([], [])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "x"}'])
def test_a_damaged_cell_is_named(filled, settings, text):
    path = filled[0] / "cells" / f"{NAMES[1]}.json"
    before = path.read_text()
    path.write_text(text)
    try:
        with pytest.raises(
            ArgumentError,
            match=r"plain-w4a8-2.json (is damaged|is not a table cell file).*; .*remove it, and it is computed",
        ):
            make_table(settings(), filled[0])
    finally:
        path.write_text(before)


def test_what_is_written(filled):
    folder, result = filled
    page, data = (folder / "table.md").read_text(), json.loads((folder / "table.json").read_text())
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert lines[0][9] == "Frechet distance (digits classifier)" and "FID" not in page and "paper" not in lines[0]
    assert lines[2][:4] == ["2", "-", "float32", "-"] and lines[3][:3] == ["2", "W4A8", "plain"]
    mse = result.rows[1].figures["images"]["mse"]
    assert lines[3][5] == f"{mse['value']:.2e} [{mse['low']:.2e}, {mse['high']:.2e}]"
    assert lines[0][5:8] == ["image MSE", "MSE GM", "MSE median"]
    assert lines[3][9] == f"{result.rows[1].figures['distances']['frechet']:#.4g}"
    assert page.startswith("Model 'float', simulated (Q/DQ): integers computed in float\n") and "integer," not in page
    assert data["rows"][1]["figures"] == result.rows[1].figures
    assert data["execution"] == "simulated (Q/DQ): integers computed in float" and "GEMM" not in page
    assert data["command"].startswith("ptq4dit-ao table --model ") and data["rows"][1]["seconds"].keys() == {
        "quantize",
        "measure",
    }
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG") and finite(data) == data


def test_a_method_that_quantizes_attention_says_so(settings, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "more").write_text(f"version: 1\n{FEW}\nattention: {{quantize: true}}\n")
    asked = dataclasses.replace(settings(), methods=(str(folder / "more"),))
    make_table(asked, tmp_path / "out")
    assert "* more: attention is quantized, too, to 8 bits\n" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.fbgemm
def test_integer_execution_is_proved(settings, filled, tmp_path):
    result = make_table(settings(methods=("plain",), backend="fbgemm"), tmp_path)
    row, simulated = result.rows[1].figures, filled[1].rows[1].figures
    assert (row["execution"], row["backend"]) == ("integer", "fbgemm") and "proof" in row
    assert row["eps"]["pooled"]["value"] == pytest.approx(simulated["eps"]["pooled"]["value"], abs=0.5)
    page = (tmp_path / "table.md").read_text()
    assert page.startswith("Model 'float', integer execution (fbgemm)\n") and f"* {row['proof']}\n" in page
    assert "quantized linears on integer GEMMs" in row["proof"]


def test_transformers_that_are_not_drawn_by_class(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", lambda spec: LoadedModel(name="flux", transformer=nn.Identity()))
    with pytest.raises(ArgumentError, match="flux is not class-conditional; a table compares class-conditional DiTs"):
        make_table(settings(), tmp_path)
