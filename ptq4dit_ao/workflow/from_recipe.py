"""Translation of a recipe into the quantizer, balancing, folds and overrides that it describes."""

from __future__ import annotations

import glob
import logging

from torchao.quantization.pt2e.quantizer import Quantizer

from ptq4dit_ao.choices import Dynamic
from ptq4dit_ao.core.expansion import Expansion
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph import SitePolicy
from ptq4dit_ao.passes import BalanceSettings
from ptq4dit_ao.quantizer import (
    PAPER_LAYERS,
    SAFE_LAYERS,
    Override,
    PTQ4DiTQuantizer,
)
from ptq4dit_ao.recipe import Activations, Recipe
from ptq4dit_ao.recipe import Override as RecipeOverride
from ptq4dit_ao.rounding import RoundingSettings
from ptq4dit_ao.workflow.dynamic import ChosenDynamic
from ptq4dit_ao.workflow.weight_bits import WeightBits

logger = logging.getLogger(__name__)

PRESETS = {"safe": SAFE_LAYERS, "paper": PAPER_LAYERS}
"""Overrides of each layer preset, by its name in a recipe."""


def quantizer_from_recipe(
    recipe: Recipe, base: Quantizer | None = None, *, timestep_input: str | None = None
) -> PTQ4DiTQuantizer:
    """The quantizer that a recipe describes, around any base quantizer.

    Raises:
        ArgumentError: the recipe says ``weights.bits: auto`` or ``activations.dynamic: auto``.
    """
    return PTQ4DiTQuantizer(
        base,
        weight_bits=weight_bits_of(recipe),
        activation_bits=recipe.activations.bits,
        expansion=expansion_of(recipe),
        dynamic=dynamic_of(recipe),
        attention_bits=recipe.attention.bits if recipe.attention.quantize else None,
        balance=recipe.balance.method,
        alpha=recipe.balance.alpha,
        center=recipe.balance.center,
        rounding=RoundingSettings(
            rounding=recipe.rounding.method,
            ranges=recipe.rounding.ranges,
            cutting=recipe.rounding.cutting,
            damping=recipe.rounding.damping,
            start=recipe.rounding.start,
            steps=recipe.rounding.steps,
            minutes=recipe.rounding.minutes,
        ),
        sequential=recipe.rounding.sequential,
        max_scale=recipe.balance.max_scale,
        fold_form=recipe.balance.fold_form,
        layers=(),
        overrides=overrides_of(recipe),
        timestep_input=timestep_input,
        policy=site_policy(recipe),
        verify=recipe.balance.verify,
    )


def weight_bits_of(recipe: Recipe) -> int:
    """Bits of the recipe's weights.

    Raises:
        ArgumentError: they are ``auto``.
    """
    if recipe.weights.bits == "auto":
        raise ArgumentError(
            "weights.bits is auto; apply_recipe and 'ptq4dit-ao quantize' choose them, elsewhere give a number"
        )
    return recipe.weights.bits


def expansion_of(recipe: Recipe) -> Expansion | None:
    """Rule by which the recipe's weights of 4 bits expand to 8; None for plain integers of 4 bits."""
    return Expansion(group=recipe.weights.group) if recipe.weights.levels == "normal" else None


def dynamic_of(recipe: Recipe) -> Dynamic:
    """The recipe's word on ranges at run time.

    Raises:
        ArgumentError: it is ``auto``.
    """
    if recipe.activations.dynamic == "auto":
        raise ArgumentError(
            "activations.dynamic is auto; apply_recipe and 'ptq4dit-ao quantize' choose the layers, elsewhere give "
            "token or false"
        )
    return recipe.activations.dynamic


def with_chosen_bits(recipe: Recipe, choice: WeightBits) -> Recipe:
    """The recipe with ``bits: auto`` replaced by the lowest width and an override for each layer with more bits."""
    more = (RecipeOverride(pattern=o.pattern, weight_bits=o.weight_bits) for o in choice.overrides)
    weights = recipe.weights.with_bits(choice.candidates[0])
    return recipe.model_copy(update={"weights": weights, "overrides": (*more, *recipe.overrides)})


def with_chosen_dynamic(recipe: Recipe, choice: ChosenDynamic) -> Recipe:
    """The recipe with ``dynamic: auto`` replaced by an override for each layer whose input is quantized per token."""
    token = (RecipeOverride(pattern=glob.escape(layer), dynamic="token") for layer in choice.layers)
    activations = Activations(bits=recipe.activations.bits)
    return recipe.model_copy(update={"activations": activations, "overrides": (*token, *recipe.overrides)})


def overrides_of(recipe: Recipe) -> tuple[Override, ...]:
    """Overrides of the recipe's layer preset, then its own."""
    own = [Override(**override.model_dump()) for override in recipe.overrides]
    return (*PRESETS[recipe.layers], *own)


def site_policy(recipe: Recipe) -> SitePolicy:
    """Policy of the folds that a recipe allows."""
    return SitePolicy(
        couple_blocks=recipe.balance.couple_blocks,
        vector_multiply=recipe.balance.vector_multiply,
        min_variables=recipe.balance.min_variables,
        premultiply=recipe.balance.sites == "all",
    )


def balance_settings(recipe: Recipe) -> BalanceSettings:
    """Balance settings of a recipe for a float model, without a quantizer.

    Raises:
        ArgumentError: the recipe does not balance, or its method needs a quantizer.
    """
    method, alpha = recipe.balance.method, recipe.balance.alpha
    if method == "repq":
        raise ArgumentError(
            "the recipe's method is 'repq', which is part of a quantizer and leaves no better float model: "
            "quantize with this recipe, or balance with another"
        )
    if "auto" in (method, alpha):
        method = "ssc" if method == "auto" else method
        alpha = 0.5 if isinstance(alpha, str) else alpha
        logger.warning(
            "the recipe chooses its balancing by the error after quantization, which is not known "
            "here; balancing with method %r and alpha %g",
            method,
            alpha,
        )
    return BalanceSettings(
        method=method,  # type: ignore[arg-type]  # 'none' is refused there
        alpha=alpha,
        center=recipe.balance.center,
        max_scale=recipe.balance.max_scale,
        fold_form=recipe.balance.fold_form,
    )
