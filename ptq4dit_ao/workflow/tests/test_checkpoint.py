"""A checkpoint in, the same architecture out, balanced; or nothing at all, and why."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ptq4dit_ao.calibration import CalibrationSamples, NormalTimesteps
from ptq4dit_ao.capture.signature import CallSignature, TensorName, flatten_call
from ptq4dit_ao.errors import ArgumentError, BalanceError, CalibrationError, ExportError
from ptq4dit_ao.passes import ModuleBalance
from ptq4dit_ao.recipe import Balance, Override, Recipe
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow import balance_checkpoint, load_model, samples
from ptq4dit_ao.workflow.models import LoadedModel
from ptq4dit_ao.workflow.samples import recorded_samples

FAMILY, ROWS = FAMILIES["sd3"], 12
QKV = "transformer_blocks.0.attn.{to_q,to_k,to_v}"
EXCLUDED = "transformer_blocks.0.attn.to_out.0"
RECIPE = Recipe(overrides=[Override(pattern=EXCLUDED, balance=False)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One block of Stable Diffusion 3 as a bare transformer, ``model``, and ``samples`` recorded of it."""
    folder = tmp_path_factory.mktemp("sd3")
    model = type(FAMILY.build()).from_config({**FAMILY.build().config, "num_layers": 1})
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "model")
    signature, rows = flatten_call(model, FAMILY.inputs(ROWS))
    CalibrationSamples(rows, {}, signature).save(folder / "samples")
    return folder


@pytest.fixture
def model(folder) -> LoadedModel:
    return load_model(str(folder / "model"))


@pytest.fixture(scope="module")
def balanced(folder) -> tuple[Path, ModuleBalance, list[tuple[str, int, int]]]:
    """The balanced checkpoint, what was done, and the progress that was reported."""
    progress: list[tuple[str, int, int]] = []
    result = balance_checkpoint(
        load_model(str(folder / "model")), RECIPE, folder / "deep" / "balanced", samples=folder / "samples",
        on_progress=lambda *stage: progress.append(stage),
    )  # fmt: skip
    return folder / "deep" / "balanced", result, progress


def output(model: LoadedModel) -> Tensor:
    with torch.no_grad():
        return model.transformer(**FAMILY.inputs(3, seed=9), return_dict=False)[0]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# -- the checkpoint --------------------------------------------------------------------------------------------------


def test_a_balanced_checkpoint_is_the_same_architecture_and_function(balanced, model):
    reloaded = load_model(str(balanced[0]))
    assert type(reloaded.transformer) is type(model.transformer)
    before, after = model.transformer.state_dict(), reloaded.transformer.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert error(output(reloaded), output(model)) < 1e-5
    moved = {name for name, tensor in before.items() if error(after[name], tensor) > 0.05}
    block = "transformer_blocks.0"
    assert {f"{block}.norm1.linear.bias", f"{block}.attn.to_q.weight", f"{block}.attn.to_v.weight"} <= moved
    assert f"{EXCLUDED}.weight" not in moved


def test_nothing_else_is_left_behind(balanced):
    folder = balanced[0]
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "balance_report.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["balanced"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_the_report_says_what_was_done(balanced):
    folder, result, _ = balanced
    report = json.loads((folder / "balance_report.json").read_text())
    assert list(report) == ["recipe", "output_change", "balanced", "left", "unread"]
    assert Recipe.from_dict(report["recipe"]) == RECIPE
    assert 0 <= report["output_change"] < 1e-5 and report["output_change"] == result.output_change
    sites = {site["site"]: site for site in report["balanced"]}
    assert sites.keys() == result.outcomes.keys() and report["left"] == result.left
    site, outcome = sites[QKV], result.outcomes[QKV]
    assert site["layers"] == [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    assert (site["variables"], site["channels"], site["num_clipped"]) == (32, 32, 0)
    assert (site["b_min"], site["b_max"]) == (float(outcome.b.min()), float(outcome.b.max()))
    assert site["b_max"] > 1.2 * site["b_min"] > 0
    assert "gelu does not commute" in report["left"]["transformer_blocks.0.ff.net.2"]
    assert not any(EXCLUDED in site["layers"] for site in sites.values())


def test_progress_is_reported(balanced):
    assert balanced[2] == [("measure salience", 1, 1), ("balance", 0, 1), ("balance", 1, 1)]


def test_an_interrupted_save_leaves_nothing(folder, model, tmp_path, monkeypatch):
    def save_pretrained(path: Path, **options: object) -> None:
        assert options == {"safe_serialization": True}
        (path / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model.transformer, "save_pretrained", save_pretrained)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        balance_checkpoint(model, RECIPE, tmp_path / "out", samples=folder / "samples")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]  # empty, as it was


# -- refusals, before any work ---------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """ImageSampling samples, the first thing that takes long, fails."""
    monkeypatch.setattr("ptq4dit_ao.workflow.checkpoint.recorded_samples", lambda *_, **__: pytest.fail("worked"))


@pytest.mark.usefixtures("no_work")
def test_repq_is_no_balancing_of_a_float_model(model, tmp_path):
    with pytest.raises(ArgumentError, match="method is 'repq', which is part of a quantizer"):
        balance_checkpoint(model, Recipe(balance=Balance(method="repq")), tmp_path / "out")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("kind", ["full folder", "file"])
def test_nothing_is_overwritten(kind, model, tmp_path):
    target = tmp_path / "out"
    kept = target if kind == "file" else target / "mine"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(ArgumentError, match="out exists and is not an empty folder; choose another, nothing is overwr"):
        balance_checkpoint(model, Recipe(), target)
    assert kept.read_text() == "mine" and len(list(tmp_path.rglob("*"))) == (1 if kind == "file" else 2)


@pytest.mark.usefixtures("no_work")
def test_a_recipe_that_does_not_balance(model, tmp_path):
    with pytest.raises(ArgumentError, match="method is 'none'; choose one of ssc, max"):
        balance_checkpoint(model, Recipe(balance=Balance(method="none")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_leaves_every_layer(folder, model, tmp_path):
    recipe = Recipe(overrides=[Override(pattern="*", balance=False)])
    with pytest.raises(BalanceError, match=r"nothing in this graph can be .*\(all its linear layers are excluded\)"):
        balance_checkpoint(model, recipe, tmp_path / "out", samples=folder / "samples")
    assert not list(tmp_path.iterdir())


# -- samples ---------------------------------------------------------------------------------------------------------


def test_a_bare_transformer_needs_samples(model, tmp_path):
    with pytest.raises(CalibrationError, match=r"model is a transformer without a pipeline .* \(samples=\.\.\.\)"):
        balance_checkpoint(model, Recipe(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def wrong_file(kind: str, path: Path) -> Path:
    x, t = FAMILY.inputs(2)["hidden_states"], torch.tensor([1.0, 2.0])
    if kind == "text":
        path.write_text("hidden_states")
    elif kind == "weights":
        save_file({"hidden_states": x}, path)
    elif kind == "another model":
        names = ("hidden_states", "class_labels")
        CalibrationSamples(
            dict(zip(names, (x, t), strict=True)), {}, CallSignature({name: TensorName(name) for name in names})
        ).save(path)
    elif kind == "another size":
        inputs = {**FAMILY.inputs(2), "encoder_hidden_states": torch.zeros(2, 7, 5)}
        CalibrationSamples(inputs, {}, CallSignature({name: TensorName(name) for name in inputs})).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", CalibrationError, "cannot read calibration samples from .*samples: No such file"),
        ("text", CalibrationError, "cannot read calibration samples from .*samples: "),
        ("weights", CalibrationError, "samples is not a calibration samples file"),
        ("another model", ArgumentError, "SD3Transformer2DModel takes no argument 'class_labels'; it takes 'hidden_st"),
        (
            "another size",
            ExportError,
            "SD3Transformer2DModel cannot run on the example inputs: RuntimeError: mat1 and mat2",
        ),
    ],
)
def test_a_wrong_file_of_samples(kind, error, message, model, tmp_path):
    with pytest.raises(error, match=message):
        balance_checkpoint(model, Recipe(), tmp_path / "out", samples=wrong_file(kind, tmp_path / "samples"))
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) <= 1


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[tuple, dict]]:
    """What the pipeline would be asked for."""
    calls: list[tuple[tuple, dict]] = []

    def collect(*args: object, **kwargs: object) -> CalibrationSamples:
        calls.append((args, kwargs))
        return CalibrationSamples({"x": torch.zeros(1)})

    monkeypatch.setattr(samples, "collect_from_pipeline", collect)
    return calls


def with_pipeline(**options: object) -> LoadedModel:
    return LoadedModel(name="painter", transformer=torch.nn.Linear(1, 1), pipeline=SimpleNamespace(), **options)


def test_a_text_pipeline_needs_prompts(drawn, tmp_path):
    with pytest.raises(CalibrationError, match=r"painter is text-conditional, and the recipe has no calibration"):
        balance_checkpoint(with_pipeline(), Recipe(), tmp_path / "out")
    assert not drawn and not list(tmp_path.iterdir())


CALIBRATION = {
    "prompts": ["a", "b"], "samples": 5, "timesteps": 3, "steps": 7, "guidance": 2.5, "seed": 4, "height": 16,
}  # fmt: skip


EVALUATION = {"samples": 3, "seed": 8, "timesteps": 6}


def test_prompts_repeat_and_the_recipe_says_the_rest(drawn):
    recipe = Recipe.from_dict({"version": 1, "calibration": CALIBRATION, "evaluation": EVALUATION})
    model, progress = with_pipeline(), []
    recorded_samples(model, recipe, on_progress=lambda *stage: progress.append(stage))
    recorded_samples(model, recipe, evaluate=True, on_progress=lambda *stage: progress.append(stage))
    (first, options), (second, others) = drawn
    assert first == (model.pipeline, ["a", "b", "a", "b", "a"]) and second == (model.pipeline, ["a", "b", "a"])
    assert options.pop("on_progress")(2, 7) is None and others.pop("on_progress")(3, 7) is None
    assert progress == [("calibration samples", 2, 7), ("evaluation samples", 3, 7)]
    assert options == {
        "timesteps": 3, "steps": 7, "guidance": 2.5, "seed": 4, "batch_size": 16, "call": {"height": 16}, "sizes": None,
    }  # fmt: skip
    assert others == {**options, "timesteps": 6, "seed": 8}


def test_the_sizes_of_a_recipe_are_those_of_both_kinds_of_samples(drawn):
    sizes = [{"width": 8}, {"width": 24, "num_frames": 5}]
    recipe = Recipe.from_dict({"version": 1, "calibration": {**CALIBRATION, "sizes": sizes}, "evaluation": EVALUATION})
    recorded_samples(with_pipeline(), recipe)
    recorded_samples(with_pipeline(), recipe, evaluate=True)
    assert [(options["call"], options["sizes"]) for _, options in drawn] == [({"height": 16}, sizes)] * 2


DRAW = {"draw": "normal", "mean": 0.3, "std": 0.2, "count": 6}


def test_timesteps_are_drawn_as_the_recipe_says(drawn):
    calibration = {**CALIBRATION, "timesteps": DRAW}
    recipe = Recipe.from_dict({"version": 1, "calibration": calibration, "evaluation": EVALUATION})
    recorded_samples(with_pipeline(), recipe)
    recorded_samples(with_pipeline(), recipe, evaluate=True)
    assert drawn[0][1]["timesteps"] == NormalTimesteps(mean=0.3, std=0.2, count=6)
    assert drawn[1][1]["timesteps"] == 6


def test_each_row_of_a_draw_has_a_timestep_of_its_own():
    calibration = {"timesteps": DRAW, "samples": 3, "batch_size": 2, "steps": 8}
    samples = recorded_samples(load_model("reference"), Recipe.from_dict({"version": 1, "calibration": calibration}))
    drawn = NormalTimesteps(mean=0.3, std=0.2, count=6).deal(3, 8, seed=0)
    expected = sorted(875 - 125 * position for sample in drawn for position in sample for _ in ("label", "null"))
    assert sorted(samples.inputs["timestep"].tolist()) == expected and len(set(expected)) > 2
    assert (samples.inputs["class_labels"] == 10).sum() == 6


def test_labels_are_drawn_where_the_model_takes_them(drawn):
    model = with_pipeline(sampling=SimpleNamespace(null_label=10))
    for _ in range(2):
        recorded_samples(model, Recipe())
    recorded_samples(model, Recipe(), evaluate=True)
    labels = [args[1] for args, _ in drawn]
    assert labels[0] == labels[1] and len(labels[0]) == 16 and set(labels[0]) <= set(range(10))
    assert len(set(labels[0])) > 3 and labels[2][:16] != labels[0]


# -- how it is stored ------------------------------------------------------------------------------------------------


def test_a_16_bit_checkpoint_stays_one(folder, tmp_path):
    loaded = load_model(str(folder / "model"))
    loaded.transformer.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    narrow = load_model(str(tmp_path / "narrow"))
    expected = output(narrow)
    result = balance_checkpoint(narrow, Recipe(), tmp_path / "balanced", samples=folder / "samples")
    again = load_model(str(tmp_path / "balanced"))
    assert again.stored_dtype is torch.bfloat16
    assert 1e-4 < result.output_change < 0.02  # as stored: rounding shows, and is bounded
    assert error(output(again), expected) < 0.02
    largest = max(float(o.b.max()) for o in result.outcomes.values() if o.site.scalars)
    assert largest <= 2.56 * 1.001


def test_the_other_parts_of_a_pipeline_are_copied_as_they_lie(folder, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(folder / "model", whole / "transformer")
    (whole / "vae").mkdir()
    (whole / "vae" / "weights").write_bytes(b"as they lie")
    (whole / "model_index.json").write_text("{}")
    loaded = replace(load_model(str(folder / "model")), folder=whole)
    balance_checkpoint(loaded, Recipe(), tmp_path / "balanced", samples=folder / "samples")
    assert (tmp_path / "balanced" / "vae" / "weights").read_bytes() == b"as they lie"
    names = {path.name for path in (tmp_path / "balanced" / "transformer").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    kept = load_model(str(tmp_path / "balanced" / "transformer"))
    assert error(output(kept), output(load_model(str(folder / "model")))) < 1e-5
