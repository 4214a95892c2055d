"""What is asked before any work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptq4dit_ao.errors import CalibrationError, LoweringError, OverrideError
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow.checks import check_dtype, check_overrides, least_bytes
from ptq4dit_ao.workflow.models import LoadedModel, load_model
from ptq4dit_ao.workflow.samples import check_recording

BOTH = ("calibration", "evaluation")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.norm = nn.Linear(4, 8), nn.LayerNorm(4)


class Painter:
    """A pipeline that is asked for texts."""

    def __call__(self, prompt: list[str], num_inference_steps: int = 50) -> None: ...


def recipe(**sections: object) -> Recipe:
    return Recipe.from_dict({"version": 1, **sections})


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model("reference")


def from_text() -> LoadedModel:
    return LoadedModel(name="painter", transformer=Small(), pipeline=Painter())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"calibration": {"timesteps": 3, "steps": 10}},
            r"20 evaluation timesteps asked for, the sampler has 10 steps; ask for fewer \(evaluation.timesteps\)",
        ),
        (
            {"calibration": {"timesteps": 30, "steps": 25}},
            "30 calibration timesteps asked for, the sampler has 25",
        ),
        (
            {"evaluation": {"timesteps": [7]}},
            r"the sampler never visits timestep 7 \(evaluation.timesteps\); the nearest it visits is 0",
        ),
        (
            {"calibration": {"timesteps": {"draw": "normal", "count": 3}}},
            "3 timesteps are drawn for 16 samples; give count=16",
        ),
    ],
)
def test_timesteps_that_the_sampler_does_not_visit(reference, sections, message):
    with pytest.raises(CalibrationError, match=message):
        check_recording(reference, recipe(**sections), BOTH)


def test_more_steps_than_the_schedule_has(reference):
    with pytest.raises(
        CalibrationError, match=r"DDIMScheduler cannot take 1001 steps.*; give other steps \(calibration.steps\)"
    ):
        check_recording(reference, recipe(calibration={"steps": 1001}), BOTH)


def test_what_can_be_sampled_passes(reference):
    for timesteps in (25, [0, 980], {"draw": "normal", "count": 16}):
        check_recording(reference, recipe(calibration={"timesteps": timesteps}), BOTH)
    # DDPM goes through other timesteps than DDIM, to the last one.
    check_recording(reference, recipe(calibration={"timesteps": [999], "sampler": "ddpm"}), BOTH)
    # Which timesteps a text pipeline visits is known when it runs; how many, before.
    check_recording(from_text(), recipe(calibration={"timesteps": [0.7], "prompts": ["a"]}), BOTH)
    with pytest.raises(CalibrationError, match="51 calibration timesteps asked for"):
        check_recording(from_text(), recipe(calibration={"timesteps": 51, "prompts": ["a"]}), BOTH)


def test_only_the_sections_that_will_be_drawn_count(reference):
    check_recording(reference, recipe(calibration={"timesteps": 3, "steps": 10}), ("calibration",))


def test_overrides_know_a_layer_inside_an_adapter():
    model = Small()
    model.to_q = nn.ModuleDict({"base_layer": model.to_q, "lora_A": nn.Linear(4, 2)})
    check_overrides(model, recipe(overrides=[{"pattern": "to_q", "skip": True}]))


def test_overrides():
    check_overrides(Small(), recipe(overrides=[{"pattern": "to_*", "skip": True}]))
    with pytest.raises(OverrideError, match="override 'to_k' matches no layer of the model; the nearest .*'to_q'"):
        check_overrides(Small(), recipe(overrides=[{"pattern": "to_k", "skip": True}]))
    with pytest.raises(OverrideError, match="override 'norm' matches no layer"):
        check_overrides(Small(), recipe(overrides=[{"pattern": "norm", "skip": True}]))


def test_dtypes():
    check_dtype(Small(), "fbgemm")
    check_dtype(Small().to(torch.bfloat16), "reference")
    with pytest.raises(LoweringError, match=r"runs models of float32, and this one is bfloat16; call .float\(\)"):
        check_dtype(Small().to(torch.bfloat16), "fbgemm")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, 48),
        ({"weights": {"bits": 4}}, 24),
        ({"weights": {"bits": "auto", "average_bits": 6}}, 24),
        ({"overrides": [{"pattern": "to_q", "weight_bits": 3}]}, 24),
    ],
)
def test_what_a_model_takes_at_least(sections, expected):
    assert least_bytes(Small(), recipe(**sections)) == expected
