"""Rounding from the float model's moments, without a second pass over the samples."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.observers import Moments
from ptq4dit_ao.rounding.layers import Group, find_groups
from ptq4dit_ao.rounding.settings import RoundingSettings
from ptq4dit_ao.rounding.solve import Inputs, choose_range, quantize_tokens, solve_group

logger = logging.getLogger(__name__)


def round_in_one_pass(prepared: GraphModule, settings: RoundingSettings) -> None:
    """Round the weights of a balanced, prepared graph, and store the result in its observers for ``convert_pt2e``.

    Raises:
        CalibrationError: an input was never observed.
    """
    if settings.plain:
        return
    groups = find_groups(prepared)
    for group in groups:
        moments = group.observer.moments
        if moments is None or moments.count == 0:
            raise CalibrationError(
                f"{group.name!r} was never run: call the prepared model on calibration samples before convert_pt2e"
            )
        _round(prepared, group, moments, settings)
    logger.info("rounded %d weights with %s", sum(len(g.layers) for g in groups), settings.rounding)


def _round(prepared: GraphModule, group: Group, moments: Moments, settings: RoundingSettings) -> None:
    observer = group.observer
    tokens, second, mean = balanced_moments(moments, observer.balance, observer.offset)
    weights = {layer: layer.weight(prepared) for layer in group.layers}
    if observer.chosen_range is None:
        weight = torch.cat(list(weights.values()))
        observer.chosen_range = choose_range(
            observer.spec, tokens, *observer.range(), weight, group.weight_levels, settings
        )
    shift = (quantize_tokens(observer.spec, tokens, observer.chosen_range) - tokens).mean(0)
    inputs = Inputs.from_moments(mean, mean + shift, second)
    solve_group(prepared, group, weights, inputs, settings)


def balanced_moments(
    moments: Moments, balance: Tensor | None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (n, C), ``E[x x^T]`` and ``E[x]`` of the inputs after an offset is subtracted and b divides them."""
    tokens, second, mean = moments.tokens, moments.second, moments.mean
    if offset is not None:
        c = offset.to(tokens)
        second = second - torch.outer(c, mean) - torch.outer(mean, c) + torch.outer(c, c)
        tokens, mean = tokens - c, mean - c
    if balance is not None:
        inverse = (1 / balance).to(tokens)
        tokens, second, mean = tokens * inverse, second * torch.outer(inverse, inverse), mean * inverse
    return tokens, second, mean
