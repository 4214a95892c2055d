"""Closed lists of names that an argument, a recipe key or a command-line option may have. Needs no torch."""

from __future__ import annotations

from typing import Literal, get_args

Aggregation = Literal["ssc", "max", "mean"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
"""Reductions of salience over timesteps to one vector."""

BalanceMethod = Literal[Aggregation, "none", "auto", "repq"]
BALANCE_METHODS: tuple[BalanceMethod, ...] = get_args(BalanceMethod)
"""Methods that find the balancing vectors: an aggregation, none, the best for each site, or RepQ-ViT's."""

FoldForm = Literal["constant", "bias"]
FOLD_FORMS: tuple[FoldForm, ...] = get_args(FoldForm)
"""Forms of the fold into an adaLN modulation ``1 + scale``, by where the 1 goes."""

RoundingMethod = Literal["nearest", "gptq", "adaround"]
ROUNDING_METHODS: tuple[RoundingMethod, ...] = get_args(RoundingMethod)
"""Methods that round weights."""

Start = Literal["nearest", "gptq"]
STARTS: tuple[Start, ...] = get_args(Start)
"""Roundings that AdaRound can start from."""

Levels = Literal["uniform", "normal"]
LEVELS: tuple[Levels, ...] = get_args(Levels)
"""Spacings of the 16 values that a weight of 4 bits can have."""

Ranges = Literal["minmax", "output", "percentile", "lp"]
RANGES: tuple[Ranges, ...] = get_args(Ranges)
"""Methods that choose the quantization range of an activation or a weight."""

LayerPreset = Literal["safe", "paper"]
LAYER_PRESETS: tuple[LayerPreset, ...] = get_args(LayerPreset)
"""Presets of layers that stay float, or get more bits."""

Sampler = Literal["ddim", "ddpm", "flow"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
"""Samplers of class-conditional models."""

LpipsNetwork = Literal["alex", "vgg", "squeeze"]
LPIPS_NETWORKS: tuple[LpipsNetwork, ...] = get_args(LpipsNetwork)
"""Networks that LPIPS compares images with."""

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
BETA_SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
"""Noise schedules of class-conditional models, by diffusers' names."""

FloatDtype = Literal["bfloat16", "float16"]
FLOAT_DTYPES: tuple[FloatDtype, ...] = get_args(FloatDtype)
"""Dtypes that the float part of a lowered model may compute in, besides the model's own."""

Dynamic = Literal["token", False]
"""Ranges of activations at run time: each token has its own; or False, as they were calibrated."""

Sites = Literal["free", "folded", "all"]
SITES: tuple[Sites, ...] = get_args(Sites)
"""Linears that are balanced: those that cost nothing in the form that is made, those that a fold reaches, or all."""

SiteKind = Literal["offline", "vector multiply", "partial", "premultiply", "refused"]
SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
"""Kinds of balance sites, by where their balancing vectors are folded."""

TextMethod = Literal["int8_weight_only", "int8_dynamic"]
TEXT_METHODS: tuple[TextMethod, ...] = get_args(TextMethod)
"""Methods for the linears of text encoders: int8 weights, with float or with dynamically quantized inputs."""

ModuleFormat = Literal["torchao", "ptq4dit"]
MODULE_FORMATS: tuple[ModuleFormat, ...] = get_args(ModuleFormat)
"""Formats of a quantized module on disk: one that diffusers reads alone, and one that packs 4 bits."""

AxisKind = Literal["batch", "height", "width", "frames", "text", "tokens"]
AXIS_KINDS: tuple[AxisKind, ...] = get_args(AxisKind)
"""Meanings of an input's axis whose size may differ from call to call. ``tokens`` is every length without a name."""
