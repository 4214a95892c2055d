"""What is asked before any work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ptq4dit_ao.errors import ArgumentError, CalibrationError, LoweringError, OverrideError
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow.checks import check_dtype, check_overrides, check_sampling, least_bytes
from ptq4dit_ao.workflow.models import LoadedModel, load_model

BOTH = ("calibration", "evaluation")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.norm = nn.Linear(4, 8), nn.LayerNorm(4)


def recipe(**sections: object) -> Recipe:
    return Recipe.from_dict({"version": 1, **sections})


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model("reference")


def from_text() -> LoadedModel:
    return LoadedModel(name="painter", transformer=Small(), pipeline=SimpleNamespace())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"calibration": {"timesteps": 3, "steps": 10}},
            r"evaluation.timesteps is 20, and the sampler takes 10 steps \(calibration.steps\); ask for fewer .*: 10\)",
        ),
        (
            {"calibration": {"timesteps": 30, "steps": 25}},
            "calibration.timesteps is 30, and the sampler takes 25",
        ),
        (
            {"evaluation": {"timesteps": [7]}},
            "evaluation.timesteps: the sampler never visits timestep 7; .* in 50 s",
        ),
        (
            {"calibration": {"timesteps": {"draw": "normal", "count": 3}}},
            "count is 3, and calibration.samples 16; ea",
        ),
    ],
)
def test_timesteps_that_the_sampler_does_not_visit(reference, sections, message):
    with pytest.raises(CalibrationError, match=message):
        check_sampling(reference, recipe(**sections), BOTH)


def test_more_steps_than_the_schedule_has(reference):
    with pytest.raises(ArgumentError, match="calibration.steps is 1001, and reference has 1000 timesteps; ask for"):
        check_sampling(reference, recipe(calibration={"steps": 1001}), BOTH)


def test_what_can_be_sampled_passes(reference):
    for timesteps in (25, [0, 980], {"draw": "normal", "count": 16}):
        check_sampling(reference, recipe(calibration={"timesteps": timesteps}), BOTH)
    # DDPM goes through other timesteps than DDIM, to the last one.
    check_sampling(reference, recipe(calibration={"timesteps": [999], "sampler": "ddpm"}), BOTH)
    # Which timesteps a text pipeline visits is known when it runs; how many, before.
    check_sampling(from_text(), recipe(calibration={"timesteps": [0.7]}), BOTH)
    with pytest.raises(CalibrationError, match="calibration.timesteps is 51"):
        check_sampling(from_text(), recipe(calibration={"timesteps": 51}), BOTH)


def test_only_the_sections_that_will_be_drawn_count(reference):
    check_sampling(reference, recipe(calibration={"timesteps": 3, "steps": 10}), ("calibration",))


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
