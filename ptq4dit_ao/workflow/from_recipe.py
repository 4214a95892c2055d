"""What each key of a recipe does: the quantizer, the balancing, the folds and the exceptions it describes."""

from __future__ import annotations

import logging

from torchao.quantization.pt2e.quantizer import Quantizer

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph import SitePolicy
from ptq4dit_ao.passes import BalanceSettings
from ptq4dit_ao.quantizer import (
    PAPER_LAYERS,
    SAFE_LAYERS,
    Override,
    PTQ4DiTQuantizer,
)
from ptq4dit_ao.recipe import Override as RecipeOverride
from ptq4dit_ao.recipe import Recipe, Weights
from ptq4dit_ao.rounding import RoundingSettings
from ptq4dit_ao.workflow.weight_bits import WeightBits

logger = logging.getLogger(__name__)

PRESETS = {"safe": SAFE_LAYERS, "paper": PAPER_LAYERS}


def quantizer_from_recipe(
    recipe: Recipe, base: Quantizer | None = None, *, timestep_input: str | None = None
) -> PTQ4DiTQuantizer:
    """The quantizer that a recipe describes, around any base.

    Raises:
        ArgumentError: the recipe leaves the weights' bits to be chosen.
    """
    return PTQ4DiTQuantizer(
        base,
        weight_bits=weight_bits_of(recipe),
        activation_bits=recipe.activations.bits,
        attention_bits=recipe.attention.bits if recipe.attention.quantize else None,
        balance=recipe.balance.method,
        alpha=recipe.balance.alpha,
        rounding=RoundingSettings(
            rounding=recipe.rounding.method,
            ranges=recipe.rounding.ranges,
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
    """Raises ArgumentError if the recipe leaves them to be chosen."""
    if recipe.weights.bits == "auto":
        raise ArgumentError(
            "weights.bits is auto; apply_recipe and 'ptq4dit-ao quantize' choose them, elsewhere give a number"
        )
    return recipe.weights.bits


def with_chosen_bits(recipe: Recipe, choice: WeightBits) -> Recipe:
    """The recipe with a number, and an override for each layer with more, instead of ``bits: auto``."""
    more = (RecipeOverride(pattern=o.pattern, weight_bits=o.weight_bits) for o in choice.overrides)
    weights = Weights(bits=choice.candidates[0])
    return recipe.model_copy(update={"weights": weights, "overrides": (*more, *recipe.overrides)})


def overrides_of(recipe: Recipe) -> tuple[Override, ...]:
    """The recipe's preset of layers and its own exceptions."""
    own = [Override(**override.model_dump()) for override in recipe.overrides]
    return (*PRESETS[recipe.layers], *own)


def site_policy(recipe: Recipe) -> SitePolicy:
    """Which folds a recipe takes."""
    return SitePolicy(
        couple_blocks=recipe.balance.couple_blocks,
        vector_multiply=recipe.balance.vector_multiply,
        min_variables=recipe.balance.min_variables,
    )


def balance_settings(recipe: Recipe) -> BalanceSettings:
    """How a recipe balances a float model, whatever quantizes it then.

    Raises:
        ArgumentError: it does not balance, or only along with its quantizer.
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
            "the recipe chooses its balancing by the error after quantization, which is another tool's here: balancing "
            "with method %r and alpha %g",
            method,
            alpha,
        )
    return BalanceSettings(
        method=method,  # type: ignore[arg-type]  # 'none' is refused there
        alpha=alpha,
        max_scale=recipe.balance.max_scale,
        fold_form=recipe.balance.fold_form,
    )
