"""Integers, scales, biases and a range for one group of linears, from the statistics of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.core.clipping import WEIGHT_RATIOS, clipped_activation_range, clipped_weight_range
from ptq4dit_ao.core.expansion import Codebook, fit_codebooks, floored
from ptq4dit_ao.core.gptq import gptq_and_codebook, gptq_and_scale, nearest, nearest_and_codebook
from ptq4dit_ao.core.per_token import fake_quantize_tokens
from ptq4dit_ao.core.qparams import fake_quantize
from ptq4dit_ao.core.range_search import search_range
from ptq4dit_ao.core.refit import corrected_bias, refit
from ptq4dit_ao.observers import Rounded
from ptq4dit_ao.observers.qdq import QuantSpec
from ptq4dit_ao.rounding.layers import Group, Layer
from ptq4dit_ao.rounding.settings import RoundingSettings

FEW_LEVELS = 64
"""Maximum number of levels (6 bits) for which GPTQ tries several scales.

With more levels it gains little over the scale for rounding to nearest (0.05 dB at W8A8, but 0.4 dB at W4A8).
"""

FLOOR = 1e-5
"""Fraction of the mean square below which a variance from float32 sums cannot be distinguished from 0."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Statistics of a group's input after balancing, quantized (q) and in the float network (x).

    The bias compensates for the means, so the weight is rounded and fitted for the centred inputs.
    """

    mean: Tensor
    """Mean E[x], (C,)."""
    quantized_mean: Tensor
    """Mean E[q], (C,)."""
    covariance: Tensor
    """Covariance of q, or of x if q is not known, (C, C), with :data:`FLOOR` times the mean squares on the diagonal."""
    cross: Tensor | None = None
    """Covariance of q and x - q, (C, C); None if only x is known."""

    @classmethod
    def from_moments(cls, mean: Tensor, quantized_mean: Tensor, moment: Tensor, cross: Tensor | None = None) -> Inputs:
        """Statistics from ``E[q q^T]`` (``moment``) and ``E[q (x - q)^T]`` (``cross``), which are overwritten.

        Without ``cross``, ``moment`` is ``E[x x^T]``, and the covariance of q is assumed to be that of x.
        """
        center, floor = mean if cross is None else quantized_mean, FLOOR * moment.diagonal()
        moment.addr_(center, center, alpha=-1).diagonal().add_(floor)
        if cross is not None:
            cross.addr_(quantized_mean, mean - quantized_mean, alpha=-1)
        return cls(mean=mean, quantized_mean=quantized_mean, covariance=moment, cross=cross)


def choose_range(
    spec: QuantSpec,
    tokens: Tensor,
    low: Tensor,
    high: Tensor,
    weight: Tensor,
    levels: int,
    settings: RoundingSettings,
) -> tuple[float, float] | None:
    """Quantization range of an activation; None if each token has its own, or it stays float.

    Args:
        spec: spec of the activation.
        tokens: sample of tokens, (n, C_in).
        low: smallest value of the whole activation.
        high: largest value of the whole activation.
        weight: weights of the layers that read it, (C_out, C_in).
        levels: number of different values of an element of these weights, the least of all layers.
        settings: method, and weight of errors of cutting.

    Returns:
        Minimum and maximum.
    """
    if not spec.ranged:
        return None
    ranges = settings.ranges
    if ranges == "minmax" or len(tokens) == 0:
        return float(low), float(high)
    quantizer = (spec.qparams, spec.quant_min, spec.quant_max)
    if ranges == "output":
        cutting = settings.cutting_of(spec.levels, levels)
        return clipped_activation_range(tokens, float(low), float(high), weight, *quantizer, cutting=cutting)
    low, high = low.reshape(1).to(tokens), high.reshape(1).to(tokens)
    low, high = search_range(tokens.reshape(1, -1), low, high, ranges, *quantizer)
    return float(low), float(high)


def quantize_tokens(spec: QuantSpec, tokens: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Tokens quantized and dequantized in a range; None for those that have their own, or stay float."""
    if spec.stays_float:
        return tokens
    if bounds is None:
        return fake_quantize_tokens(tokens, spec.quant_min, spec.quant_max)
    scale, zero_point = spec.qparams(torch.tensor(bounds[0]), torch.tensor(bounds[1]))
    return fake_quantize(tokens, scale, zero_point, spec.quant_min, spec.quant_max)


def solve_group(
    prepared: GraphModule, group: Group, weights: Mapping[Layer, Tensor], inputs: Inputs, settings: RoundingSettings
) -> None:
    """Round a group's weights, (C_out, C_in) each, and store the result in their observers."""
    for spec, layers in group.by_spec().items():
        biases = [layer.bias(prepared) for layer in layers]
        solved = solve([weights[layer] for layer in layers], biases, spec, inputs, settings)
        for layer, rounded in zip(layers, solved, strict=True):
            layer.observer.rounded = rounded


def solve(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    spec: QuantSpec,
    inputs: Inputs,
    settings: RoundingSettings,
    *,
    try_scales: bool = True,
) -> list[Rounded]:
    """Round the weights of linears that read one input and share one spec; only GPTQ corrects biases.

    Args:
        weights: (C_out, C_in) each.
        biases: (C_out,) each, or None.
        spec: spec of the weights; symmetric.
        inputs: statistics of the weights' input.
        settings: settings of rounding.
        try_scales: whether GPTQ, if it rounds to few levels and clips ranges, rounds with each candidate scale and
            keeps the best one of each channel. Otherwise the scale is chosen for rounding to nearest.
    """
    weight = torch.cat(list(weights))
    target, compensated = weight, settings.closed_form == "gptq"
    if inputs.cross is not None and compensated:
        target = refit(weight, inputs.covariance, inputs.cross, damping=settings.damping)
    parts = [len(w) for w in weights]
    integers, scale, codebook = _rounded(target, parts, spec, inputs.covariance, settings, try_scales)
    solved, start = [], 0
    for w, bias in zip(weights, biases, strict=True):
        rows = slice(start, start := start + len(w))
        q, s = integers[rows], scale[rows]
        new = None
        if compensated:
            new = corrected_bias(bias, w, inputs.mean, q * s.unsqueeze(1), inputs.quantized_mean).to(torch.float32)
        part = None if codebook is None else codebook.rows(rows)
        solved.append(Rounded(integers=q.clone(), scale=s.clone(), bias=new, codebook=part))
    return solved


def _rounded(
    weight: Tensor,
    parts: Sequence[int],
    spec: QuantSpec,
    covariance: Tensor,
    settings: RoundingSettings,
    try_scales: bool,
) -> tuple[Tensor, Tensor, Codebook | None]:
    """Integers (C_out, C_in), scales (C_out,) and codebook, if they expand from 4 bits, of joined weights."""
    compensated, importance = settings.closed_form == "gptq", covariance.diagonal()
    several = try_scales and settings.ranges == "output" and spec.channel_axis is not None
    if spec.expansion is not None:
        importance = floored(importance)
        candidates = fit_codebooks(weight, importance, spec.expansion, several=several)
        if compensated:
            return gptq_and_codebook(weight, candidates, covariance, damping=settings.damping)
        return nearest_and_codebook(weight, candidates, importance)
    bounds = (spec.quant_min, spec.quant_max)
    if compensated and several and spec.levels <= FEW_LEVELS:
        low, high = torch.aminmax(weight, dim=1)
        scales = torch.stack([spec.qparams(low * r, high * r)[0] for r in WEIGHT_RATIOS])
    else:
        scales = torch.cat([weight_scale(part, spec, importance, settings) for part in weight.split(list(parts))])[None]
    if compensated:
        integers, scale = gptq_and_scale(weight, scales, covariance, *bounds, damping=settings.damping)
    else:
        (scale,) = scales
        integers = nearest(weight, scale, *bounds)
    return integers, scale, None


def weight_scale(weight: Tensor, spec: QuantSpec, importance: Tensor, settings: RoundingSettings) -> Tensor:
    """Scale of each output channel, (C_out,) float32; equal for all channels if the spec is per tensor."""
    quantizer = (spec.qparams, spec.quant_min, spec.quant_max)
    rows = weight if spec.channel_axis is not None else weight.reshape(1, -1)
    low, high = torch.aminmax(rows, dim=1)
    if settings.ranges == "output":
        low, high = clipped_weight_range(weight, importance.clamp_min(0), *quantizer)
    elif settings.ranges != "minmax":
        low, high = search_range(rows, low, high, settings.ranges, *quantizer)
    if spec.channel_axis is None:
        low, high = low.amin().expand(len(weight)), high.amax().expand(len(weight))
    return spec.qparams(low, high)[0]
