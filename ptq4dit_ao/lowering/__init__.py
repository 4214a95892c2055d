"""Backends that run a quantized graph, one per file, and the proof that integer kernels run."""

from ptq4dit_ao.lowering import (  # noqa: F401  (they register themselves)
    aoti,
    cuda,
    fbgemm,
    onnx,
    openvino,
    reference,
    x86_inductor,
)
from ptq4dit_ao.lowering.backend import (
    BACKENDS,
    Backend,
    Capabilities,
    Request,
    available_backends,
    backends_for,
    missing_backends,
    register,
)
from ptq4dit_ao.lowering.build import export_to, lower
from ptq4dit_ao.lowering.lowered_model import LoweredModel
from ptq4dit_ao.lowering.match import QuantizedLinear, float_linears, quantized_linears
from ptq4dit_ao.lowering.proof import KernelProof

__all__ = [
    "BACKENDS",
    "Backend",
    "Capabilities",
    "KernelProof",
    "LoweredModel",
    "QuantizedLinear",
    "Request",
    "available_backends",
    "backends_for",
    "export_to",
    "float_linears",
    "lower",
    "missing_backends",
    "quantized_linears",
    "register",
]
