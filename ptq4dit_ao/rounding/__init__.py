"""Rounding of weights for small errors of the layers' outputs: in one pass, layer by layer, and by distillation."""

from ptq4dit_ao.rounding.distillation import distill
from ptq4dit_ao.rounding.layers import activation_clipping
from ptq4dit_ao.rounding.one_pass import round_in_one_pass
from ptq4dit_ao.rounding.search import PostRoundingScore
from ptq4dit_ao.rounding.sequential import round_sequentially
from ptq4dit_ao.rounding.settings import DistillationSettings, RoundingSettings

__all__ = [
    "DistillationSettings",
    "PostRoundingScore",
    "RoundingSettings",
    "activation_clipping",
    "distill",
    "round_in_one_pass",
    "round_sequentially",
]
