"""Closed lists of words: what an argument, a recipe key or an option of the command line may be. Needs no torch."""

from __future__ import annotations

from typing import Literal, get_args

Aggregation = Literal["ssc", "max", "mean"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
"""Reductions of salience over timesteps to one vector."""

BalanceMethod = Literal[Aggregation, "none", "auto", "repq"]
BALANCE_METHODS: tuple[BalanceMethod, ...] = get_args(BalanceMethod)
"""Ways to find the balancing vectors: an aggregation, no balancing, the best for each site, or RepQ-ViT's."""

FoldForm = Literal["constant", "bias"]
FOLD_FORMS: tuple[FoldForm, ...] = get_args(FoldForm)
"""Places of the 1 of ``1 + scale`` when an adaLN modulation is divided."""

RoundingMethod = Literal["nearest", "gptq", "adaround"]
ROUNDING_METHODS: tuple[RoundingMethod, ...] = get_args(RoundingMethod)
"""Ways to round weights."""

Start = Literal["nearest", "gptq"]
STARTS: tuple[Start, ...] = get_args(Start)
"""Roundings that AdaRound starts from."""

Ranges = Literal["minmax", "output", "percentile", "lp"]
RANGES: tuple[Ranges, ...] = get_args(Ranges)
"""Ways to choose the quantization range of an activation or a weight."""

LayerPreset = Literal["safe", "paper"]
LAYER_PRESETS: tuple[LayerPreset, ...] = get_args(LayerPreset)
"""Sets of layers that stay float, or get more bits."""

Sampler = Literal["ddim", "ddpm"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
"""Samplers of class-conditional models."""

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
BETA_SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
"""Noise schedules of those samplers, by diffusers' names."""

FloatDtype = Literal["bfloat16", "float16"]
FLOAT_DTYPES: tuple[FloatDtype, ...] = get_args(FloatDtype)
"""Dtypes that the float part of a lowered model may compute in, beside the model's own."""

SiteKind = Literal["offline", "vector multiply", "partial", "refused"]
SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
"""Kinds of balance sites, by where their vectors fold."""
