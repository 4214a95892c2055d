"""``cuda``: int8 and int4 linears on NVIDIA GPUs, with the rest of the graph compiled around them; see docs/cuda.md."""

from ptq4dit_ao.lowering.cuda.build import replace_linears
from ptq4dit_ao.lowering.cuda.ops import expanded_linear, int4_linear, int8_linear

__all__ = ["expanded_linear", "int4_linear", "int8_linear", "replace_linears"]
