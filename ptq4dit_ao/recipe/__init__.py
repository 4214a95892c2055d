"""Recipes: strict YAML that says how a model is quantized, calibrated and evaluated."""

from ptq4dit_ao.recipe.json_schema import recipe_json_schema
from ptq4dit_ao.recipe.load import load_recipe
from ptq4dit_ao.recipe.schema import (
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
    Size,
    Weights,
)
from ptq4dit_ao.recipe.shipped import shipped_descriptions, shipped_recipe_path, shipped_recipes

__all__ = [
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
