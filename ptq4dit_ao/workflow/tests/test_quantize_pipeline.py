"""Whole tiny pipelines, recorded once, quantized, saved, and opened again by diffusers."""

from __future__ import annotations

import functools
import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization import Int8Tensor

from ptq4dit_ao import Recipe, collect_components, collect_from_pipeline, quantize_pipeline
from ptq4dit_ao.cli.main import main
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError, ArtifactError, CalibrationError, RecipeError
from ptq4dit_ao.modules.form import integer_weights
from ptq4dit_ao.modules.tests.test_saving import hub as hub  # a fixture
from ptq4dit_ao.recipe import Attention, Balance, Calibration, Override, Weights, load_recipe
from ptq4dit_ao.testing.pipelines import tiny_sd3_pipeline, tiny_wan_pipeline
from ptq4dit_ao.workflow.pipeline import _for_modules

PROMPTS = ["a lighthouse at dusk", "two foxes in the snow"]
SD3 = {"height": 32, "width": 32}
WAN = {"height": 16, "width": 16, "num_frames": 5}
STEPS = {"num_inference_steps": 6, "guidance_scale": 3.0}


def recipe(timesteps: int = 3, bits: int = 8, **calibration: Any) -> Recipe:
    settings = {"timesteps": timesteps, "steps": 6, "guidance": 3.0, "batch_size": 2, "samples": 2, **calibration}
    return Recipe(
        layers="paper", weights=Weights(bits=bits), balance=Balance(sites="all"), calibration=Calibration(**settings)
    )


@functools.cache
def sd3() -> Any:
    return tiny_sd3_pipeline()


def drawn(pipeline: Any, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(np.array(pipeline("a red fox", generator=generator, output_type="np", **call, **STEPS)[0]))


def opened(folder: Any) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_stable_diffusion_3_with_its_text_encoders(tmp_path):
    pipeline, stages = sd3(), []
    recipes = {
        "transformer": recipe(), "text_encoder": "int8_weight_only", "text_encoder_2": "int8_dynamic",
        "text_encoder_3": "int8_weight_only",
    }  # fmt: skip
    before = dict(pipeline.components)
    quantized = quantize_pipeline(
        pipeline, recipes, PROMPTS, call=SD3, output=tmp_path / "q", on_progress=lambda *x: stages.append(x)
    )
    assert pipeline.components == before and not integer_weights(pipeline.transformer)
    assert {stage for stage, *_ in stages} == {"record", "transformer: calibrate", "save"}
    assert len(integer_weights(quantized.transformer)) == 32
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        kinds = {type(x.weight) for x in getattr(quantized, name).modules() if isinstance(x, nn.Linear)}
        assert Int8Tensor in kinds
    image = drawn(quantized, SD3)
    assert sqnr_db(drawn(pipeline, SD3), image) > 12
    again = opened(tmp_path / "q")
    assert sqnr_db(image, drawn(again, SD3)) > 30 and torch.equal(drawn(again, SD3), drawn(opened(tmp_path / "q"), SD3))
    assert json.loads((tmp_path / "q" / "transformer" / "config.json").read_text())["quantization_config"]
    card = (tmp_path / "q" / "README.md").read_text()
    assert "| transformer | 32 of 32 |" in card and "| text_encoder | 12 of 13 |" in card and "ptq4dit_ao" not in card
    other = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(quantized)
    assert other.transformer is quantized.transformer and integer_weights(other.transformer)


@pytest.mark.slow
def test_both_experts_of_wan_are_recorded_in_the_same_samples(tmp_path):
    pipeline, runs = tiny_wan_pipeline(), []
    encode = pipeline.encode_prompt
    pipeline.encode_prompt = lambda *args, **options: (runs.append("run"), encode(*args, **options))[1]
    recipes = {**dict.fromkeys(["transformer", "transformer_2"], recipe(3, bits=4)), "text_encoder": "int8_weight_only"}
    quantized = quantize_pipeline(pipeline, recipes, PROMPTS, call=WAN, output=tmp_path / "q")  # one has 2 steps only
    assert runs == ["run"]
    for name in ("transformer", "transformer_2"):
        assert min(w.bits for w in integer_weights(getattr(quantized, name)).values()) == 4
    video = drawn(quantized, WAN)
    assert sqnr_db(drawn(pipeline, WAN), video) > 12
    again = opened(tmp_path / "q")
    assert sqnr_db(video, drawn(again, WAN)) > 90 and again.config.boundary_ratio == 0.875
    assert "import ptq4dit_ao" in (tmp_path / "q" / "README.md").read_text()


@pytest.mark.slow
def test_a_pipeline_is_pushed_to_a_hub_with_quantized_parts(hub, tmp_path):
    quantized = quantize_pipeline(sd3(), {"transformer": recipe(bits=4)}, PROMPTS, call=SD3)
    quantized.push_to_hub("me/sd3")
    for name, content in hub.repositories["me/sd3"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert b"PTQ4DiT" in hub.repositories["me/sd3"]["transformer/README.md"]
    assert sqnr_db(drawn(quantized, SD3), drawn(opened(tmp_path), SD3)) > 90


def test_components_are_recorded_as_each_alone_would_be():
    pipeline = tiny_wan_pipeline()
    options = {"steps": 6, "guidance": 3.0, "batch_size": 2, "call": WAN}
    together = collect_components(pipeline, PROMPTS, {"transformer": 2, "transformer_2": 3}, **options)
    for name, timesteps in (("transformer", 2), ("transformer_2", 3)):
        alone = collect_from_pipeline(pipeline, PROMPTS, component=name, timesteps=timesteps, **options)
        one, other = (next(samples.batches(len(samples))) for samples in (alone, together[name]))
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    for wrong, message in (({}, "components is empty"), (["transformer"], "give a dict of timesteps by component")):
        with pytest.raises(ArgumentError, match=message):
            collect_components(pipeline, PROMPTS, wrong, **options)


@pytest.mark.parametrize(
    ("recipes", "error", "message"),
    [
        ({"unet": recipe()}, ArgumentError, "StableDiffusion3Pipeline has no module 'unet'; it has .*transformer"),
        (
            {"text_encoder": recipe()},
            ArgumentError,
            "text_encoder is a model of transformers, which .*int8_weight_only",
        ),
        ({"transformer": "int8_dynamic"}, ArgumentError, "transformer is a SD3Transformer2DModel, .*; give a recipe"),
        ({"transformer": "no_such"}, RecipeError, "no_such"),
        ({"text_encoder": "int8_dynamic"}, ArgumentError, "recipes names no denoiser"),
        (7, ArgumentError, "recipes is 7"),
        (recipe().model_copy(update={"balance": Balance(fold_form="bias")}), RecipeError, "fold_form is 'bias'"),
        (
            recipe().model_copy(update={"attention": Attention(quantize=True)}),
            RecipeError,
            "attention.quantize is true",
        ),
        ("digits_w8a8", RecipeError, "calibration.sampler is 'ddpm'; change that, or quantize the transformer alone"),
        ("dit_w8a8", ArgumentError, "there are no prompts; give some"),
    ],
)
def test_wrong_recipes_are_named(recipes, error, message):
    with pytest.raises(error, match=message):
        quantize_pipeline(sd3(), recipes)


def test_recipes_of_one_recording_must_agree():
    recipes = {"transformer": recipe(2), "transformer_2": recipe(3, steps=7)}
    with pytest.raises(RecipeError, match=r"calibration\.steps is 6 for transformer and 7 for transformer_2"):
        quantize_pipeline(tiny_wan_pipeline(), recipes, PROMPTS, call=WAN)
    with pytest.raises(CalibrationError, match="7 calibration timesteps asked for.* 6 steps; ask for fewer"):
        quantize_pipeline(sd3(), recipe(7), PROMPTS, call=SD3)


def test_what_is_in_the_way_is_kept_and_said_before_the_work(tmp_path):
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(
        ArtifactError, match="holds something other than a pipeline that this package has quantized; give"
    ):
        quantize_pipeline(sd3(), recipe(), PROMPTS, call=SD3, output=tmp_path)
    with pytest.raises(ArgumentError, match="method is 'zip'; choose one of torchao, ptq4dit"):
        quantize_pipeline(sd3(), recipe(), PROMPTS, method="zip")
    with pytest.raises(ArgumentError, match="batch_size is 0; it must be at least 1"):
        quantize_pipeline(sd3(), recipe(), PROMPTS, batch_size=0)
    with pytest.raises(ArgumentError, match=r"call is 3 \(int\); give a dict of arguments"):
        quantize_pipeline(sd3(), recipe(), PROMPTS, call=3)
    with pytest.raises(ArgumentError, match="give a pipeline of diffusers"):
        quantize_pipeline(sd3().transformer, recipe(), PROMPTS)
    assert (tmp_path / "thesis").read_text() == "mine"


def test_the_command_quantizes_a_folder(tmp_path, capsys):
    sd3().save_pretrained(tmp_path / "float")
    text = """version: 1
calibration: {timesteps: 2, steps: 4, guidance: 3.0, batch_size: 2, samples: 2, height: 32, width: 32,
              prompts: [a lighthouse at dusk, two foxes in the snow]}
"""
    (tmp_path / "r.yaml").write_text(text)
    command = ["quantize", str(tmp_path / "r.yaml"), "--pipeline", str(tmp_path / "float"), "--output"]
    assert main([*command, str(tmp_path / "float")]) == 1
    assert "holds something other than a pipeline that this package has quantized" in capsys.readouterr().err
    assert not integer_weights(opened(tmp_path / "float").transformer)
    options = ["--component", "text_encoder_3=int8_weight_only", "--format", "ptq4dit"]
    assert main([*command, str(tmp_path / "q"), *options]) == 0
    printed = capsys.readouterr().out
    assert "transformer" in printed and "saved to" in printed
    assert drawn(opened(tmp_path / "q"), SD3).isfinite().all()
    assert main([*command, str(tmp_path / "q"), *options]) == 0  # an earlier result is replaced
    capsys.readouterr()
    for wrong, message in (
        (["--component", "x"], "--component is 'x'; give NAME=RECIPE"),
        (["--component", "text_encoder=nothing"], "nothing"),
        (["--model", "reference"], "--model is for a single transformer"),
        (["--no-leave-one-out"], "--no-leave-one-out is for a single transformer"),
    ):
        assert main([*command, str(tmp_path / "other"), *wrong]) == 1
        assert message in " ".join(capsys.readouterr().err.split())
    assert main(["quantize", "digits_w8a8", "--output", str(tmp_path / "o"), "--format", "torchao"]) == 1
    assert "--format is for whole pipelines" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "method", "centred", "modulation"),
    [
        ("sd3_5_w8a8", None, False, {"activation_bits": 16, "balance": False}),
        ("sd3_5_w8a8", "torchao", False, {"activation_bits": 16, "balance": False}),
        ("sd3_5_w8a8", "ptq4dit", True, {"dynamic": "token"}),
        ("sd3_5_w4a8", None, True, {"dynamic": "token"}),
    ],
)
def test_a_recipe_asks_a_format_for_what_it_can_hold(name, method, centred, modulation):
    recipe = load_recipe(name)
    centring = recipe.model_copy(update={"balance": recipe.balance.model_copy(update={"center": True})})
    made = _for_modules("transformer", centring, method)
    assert made.balance.center == centred and made.balance.sites == "all"
    assert Override(pattern="*.norm1*.linear", **modulation) in made.overrides
    assert Recipe.from_dict(made.to_dict()) == made
