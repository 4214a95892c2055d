"""Run a quantized graph: one small backend per file, and the proof that integer kernels run."""

from ptq4dit_ao.lowering import fbgemm, reference, x86_inductor  # noqa: F401  (they register themselves)
from ptq4dit_ao.lowering.lower import LoweredModel, available_backends, lower
from ptq4dit_ao.lowering.match import QuantizedLinear, float_linears, quantized_linears
from ptq4dit_ao.lowering.proof import KernelProof

__all__ = [
    "KernelProof",
    "LoweredModel",
    "QuantizedLinear",
    "available_backends",
    "float_linears",
    "lower",
    "quantized_linears",
]
