"""``x86_inductor``: ``torch.compile`` with weights frozen, which fuses quantization into its neighbours.

Without freezing Inductor keeps weights symbolic, matches no int8 pattern and silently runs float; so it is switched
on here, for this compile only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from ptq4dit_ao.lowering.backend import Backend, Capabilities, Request, Runnable, register
from ptq4dit_ao.lowering.machine import no_compiler, no_onednn, no_x86, saturates
from ptq4dit_ao.lowering.match import make_unsigned, quantized_products, quantizers_of
from ptq4dit_ao.lowering.mixed import compute_in
from ptq4dit_ao.lowering.unshare import unshare_weights

aten = torch.ops.aten

KERNELS = ("onednn::qlinear_pointwise",)
"""Names of its integer kernels in torch's profiler."""

INT8 = Capabilities(activation_dtypes=(torch.uint8, torch.int8), float_dtypes=(torch.bfloat16,))


def lacks() -> str | None:
    """Why this machine cannot compile to oneDNN."""
    return no_x86() or no_onednn() or no_compiler()


def prepare(request: Request) -> None:
    """Bring a graph into the form that Inductor's int8 patterns match, in place."""
    make_unsigned(quantizers_of(quantized_products(request.graph)))
    unshare_weights(request.graph, request.linears)
    # A linear that reads across memory is decomposed otherwise, into what a pattern fails on if the batch is free.
    for quantize in dict.fromkeys(linear.quantize for linear in request.linears):
        with quantize.graph.inserting_before(quantize):
            quantize.update_arg(0, quantize.graph.call_function(aten.contiguous.default, (quantize.args[0],)))
    request.graph.recompile()
    if request.float_dtype is not None:
        compute_in(request.graph, request.float_dtype, request.example_inputs)


def build(request: Request) -> Runnable:
    """Compile; the first call with a new batch size compiles once more, then any batch runs."""
    prepare(request)
    compiled = torch.compile(request.graph)

    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        # Around the call, not in torch.compile(options=...): Dynamo reads this setting too, before the backend does.
        with torch.no_grad(), inductor_config.patch(freezing=True):
            return compiled(*inputs)

    return run


register(
    Backend(
        name="x86_inductor",
        summary="torch.compile to fused int8 kernels for x86 (oneDNN); needs a C++ compiler",
        integer=True,
        carries=INT8,
        rank=1,
        kernels=KERNELS,
        refuse=saturates,
        lacks=lacks,
        build=build,
        compiles=True,
    )
)
