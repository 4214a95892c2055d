"""Recipes built in Python, and their round trip through dict, JSON and YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import ptq4dit_ao.recipe
from ptq4dit_ao.choices import SITES
from ptq4dit_ao.recipe import (
    Activations,
    Attention,
    Balance,
    Calibration,
    Distillation,
    Evaluation,
    NoiseCorrection,
    NormalDraw,
    Override,
    Recipe,
    Rounding,
    Weights,
    load_recipe,
)
from ptq4dit_ao.recipe.yaml_text import read_yaml

BITS = st.integers(2, 8)
COUNTS = st.integers(1, 10**6)
SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = st.floats(0, 1e9)
TIMESTEPS = COUNTS | st.lists(NUMBERS, min_size=1, max_size=4, unique=True)
# The characters that YAML gives a meaning to, with some that it escapes.
TEXTS = st.text("a1e-+.:#'\"\n\t \\é\x85\u2028\U0001f600{}[]*&!|>%@`~,?<=", max_size=8)
DRAWS = st.builds(NormalDraw, draw=st.just("normal"), mean=st.floats(-1, 2), std=NUMBERS, count=COUNTS)
NON_EMPTY = TEXTS.filter(bool)

SKIPS = st.builds(Override, pattern=NON_EMPTY, skip=st.just(True))
CHANGES = st.builds(
    Override,
    pattern=NON_EMPTY,
    weight_bits=BITS,
    activation_bits=st.none() | BITS,
    balance=st.none() | st.just(False),
)
RECIPES = st.builds(
    Recipe,
    description=TEXTS,
    model=st.none() | NON_EMPTY | st.sampled_from(["on", "1e-5", "true", "08", "null"]),
    weights=st.builds(Weights, bits=BITS)
    | st.builds(Weights, bits=BITS, levels=st.just("normal"), group=st.none() | st.integers(16, 128))
    | st.builds(Weights, bits=st.just("auto"), candidates=st.none() | st.just((8, 4, 5)), average_bits=st.floats(4, 8)),
    activations=st.builds(Activations, bits=BITS | st.just(16))
    | st.builds(Activations, bits=BITS, dynamic=st.sampled_from(["token", False]))
    | st.builds(Activations, dynamic=st.just("auto"), share=st.floats(0.01, 1)),
    attention=st.builds(Attention, quantize=st.booleans(), bits=BITS),
    balance=st.builds(
        Balance,
        method=st.sampled_from(["ssc", "max", "mean", "none"]),
        alpha=st.floats(0, 1),
        max_scale=st.floats(1, exclude_min=True, allow_infinity=False),
        fold_form=st.sampled_from(["constant", "bias"]),
        sites=st.sampled_from(SITES),
    ),
    rounding=st.builds(Rounding, method=st.just("gptq"), sequential=st.just(True))
    | st.builds(
        Rounding, ranges=st.just("output"), cutting=st.just("auto") | st.floats(1, 99), sequential=st.just(True)
    ),
    distillation=st.builds(Distillation, steps=st.integers(0, 9), minutes=st.none() | st.floats(0.1, 9)),
    layers=st.sampled_from(["safe", "paper"]),
    overrides=st.lists(SKIPS | CHANGES, max_size=3),
    calibration=st.builds(
        Calibration,
        timesteps=TIMESTEPS | DRAWS,
        samples=COUNTS,
        steps=COUNTS,
        guidance=NUMBERS,
        sampler=st.sampled_from([None, "ddim", "ddpm"]),
        seed=SEEDS,
    ),
    noise_correction=st.builds(NoiseCorrection, images=st.integers(0, 9), seed=SEEDS),
    evaluation=st.builds(Evaluation, timesteps=TIMESTEPS, samples=COUNTS, seed=SEEDS),
)


@settings(max_examples=30, deadline=None)
@given(RECIPES)
def test_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe
    assert Recipe.from_dict(read_yaml(recipe.to_yaml(), "x.yaml").value) == recipe


def test_a_written_recipe_loads(write: Callable[[str, str], Path]) -> None:
    recipe = Recipe(model="on", overrides=(Override(pattern="a.*", balance=False),), balance=Balance(alpha=1e-5))
    assert load_recipe(write("x.yaml", recipe.to_yaml())) == recipe


def test_to_dict_holds_every_default_and_no_null() -> None:
    assert Recipe(overrides=(Override(pattern="a", skip=True),)).to_dict() == {
        "version": 1,
        "description": "",
        "weights": {"bits": 8, "levels": "uniform"},
        "activations": {"bits": 8, "dynamic": False},
        "attention": {"quantize": False, "bits": 8},
        "balance": {
            "method": "ssc",
            "alpha": 0.5,
            "center": False,
            "max_scale": 1000.0,
            "fold_form": "constant",
            "sites": "free",
            "couple_blocks": False,
            "vector_multiply": True,
            "min_variables": 4,
            "verify": True,
        },
        "rounding": {
            "method": "nearest",
            "ranges": "minmax",
            "cutting": 1.0,
            "sequential": False,
            "tokens": 32768,
            "damping": 0.01,
            "start": "nearest",
            "steps": 20000,
        },
        "distillation": {"steps": 0},
        "layers": "safe",
        "overrides": [{"pattern": "a", "skip": True}],
        "calibration": {
            "timesteps": 25,
            "samples": 16,
            "batch_size": 16,
            "steps": 50,
            "guidance": 1.5,
            "prompts": [],
            "seed": 0,
        },
        "noise_correction": {"images": 0, "seed": 2000},
        "evaluation": {"timesteps": 20, "samples": 32, "seed": 1000, "leave_one_out": True},
    }


def test_yaml_keeps_the_order_of_the_model() -> None:
    assert Recipe().to_yaml().startswith("version: 1\ndescription: ''\nweights:\n  bits: 8\n  levels: uniform\n")


def test_lists_stand_for_tuples() -> None:
    built = Recipe.model_validate({"overrides": [Override(pattern="a", skip=True)], "calibration": {"timesteps": [1]}})
    assert (built.overrides, built.calibration.timesteps) == ((Override(pattern="a", skip=True),), (1.0,))


def test_recipes_are_frozen_and_hashable() -> None:
    recipe = Recipe(calibration=Calibration(timesteps=(1, 2)))
    assert hash(recipe) == hash(Recipe.from_dict(recipe.to_dict()))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.layers = "paper"


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (Weights, {"bits": "8"}, "should be 'auto'"),
        (Weights, {"bits": 8.0}, "valid integer"),
        (Weights, {"bits": 9}, "less than or equal to 8"),
        (Weights, {"width": 4}, "Extra inputs are not permitted"),
        (Recipe, {"version": True}, "Input should be of type int"),
        (Override, {"pattern": "a"}, "pattern 'a' asks for nothing"),
        (Override, {"pattern": "a", "skip": 1}, "Input should be of type bool"),
        (Calibration, {"timesteps": [3, 3]}, "3 stands more than once"),
    ],
)
def test_wrong_values_are_refused_when_built(model: type[BaseModel], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(**values)


@pytest.mark.parametrize(
    ("data", "widths"),
    [
        ({}, "W8A8"),
        ({"weights": {"bits": 4}, "activations": {"bits": 6}}, "W4A6"),
        ({"weights": {"bits": 4}, "overrides": [{"pattern": "a", "weight_bits": 8}]}, "W4-8A8"),
        ({"overrides": [{"pattern": "a", "activation_bits": 4}, {"pattern": "b", "skip": True}]}, "W8A4-8"),
        ({"weights": {"bits": "auto", "average_bits": 5}}, "W4-8A8"),
        ({"overrides": [{"pattern": "a", "activation_bits": 16}]}, "W8A8-16"),
    ],
)
def test_widths_name_the_whole_span(data: dict[str, Any], widths: str) -> None:
    assert Recipe.from_dict({"version": 1, **data}).widths == widths


def test_public_names() -> None:
    assert ptq4dit_ao.recipe.__all__ == [
        "Activations",
        "Attention",
        "Balance",
        "Calibration",
        "Distillation",
        "Evaluation",
        "NoiseCorrection",
        "NormalDraw",
        "Override",
        "Recipe",
        "Rounding",
        "Size",
        "Weights",
        "load_recipe",
        "recipe_json_schema",
        "shipped_descriptions",
        "shipped_recipe_path",
        "shipped_recipes",
    ]


def test_import_is_light() -> None:
    code = "import sys, ptq4dit_ao.recipe; sys.exit(sorted({'torch', 'numpy'} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
