"""The torchao quantizer, whose steps (annotate, observe, balance, fold, convert) torchao's own functions call."""

from ptq4dit_ao.core.expansion import Expansion
from ptq4dit_ao.quantizer.linear import LinearQuantizer
from ptq4dit_ao.quantizer.overrides import PAPER_LAYERS, SAFE_LAYERS, Override
from ptq4dit_ao.quantizer.prepared import distill, round_sequentially, salience_statistics, tokens_seen
from ptq4dit_ao.quantizer.ptq4dit import PTQ4DiTQuantizer

__all__ = [
    "PAPER_LAYERS",
    "SAFE_LAYERS",
    "Expansion",
    "LinearQuantizer",
    "Override",
    "PTQ4DiTQuantizer",
    "distill",
    "round_sequentially",
    "salience_statistics",
    "tokens_seen",
]
