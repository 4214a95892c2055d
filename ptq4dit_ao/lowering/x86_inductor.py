"""``x86_inductor``: Inductor with frozen weights, which fuses quantization into neighbouring operations.

Without freezing, Inductor keeps weights symbolic, matches no int8 pattern and silently computes in float. Freezing is
therefore switched on here, for this compilation only. The graph goes to Inductor as ``torch.export`` gave it, with its
free sizes: ``torch.compile`` would compile again for a second size, and once more for a size of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves, tree_unflatten

from ptq4dit_ao.capture.tracing import module_of
from ptq4dit_ao.graph.names import placeholders
from ptq4dit_ao.lowering.backend import Backend, Capabilities, Request, Runnable, register
from ptq4dit_ao.lowering.machine import no_compiler, no_onednn, no_x86, saturates
from ptq4dit_ao.lowering.match import make_unsigned, quantized_products, quantizers_of
from ptq4dit_ao.lowering.mixed import compute_in
from ptq4dit_ao.lowering.program import as_program, check_inputs, inputs_of
from ptq4dit_ao.lowering.unshare import unshare_weights

aten = torch.ops.aten

KERNELS = ("onednn::qlinear_pointwise",)
"""Names of its integer kernels in torch's profiler."""

INT8 = Capabilities(activation_dtypes=(torch.uint8, torch.int8), float_dtypes=(torch.bfloat16,))
"""Linears that Inductor's int8 patterns match."""


def read_sizes_once(graph: Graph) -> None:
    """Read each free size from one tensor, an input if one has it, in place.

    Export reads sizes from whichever tensor is at hand. Inductor counts such a read of a linear's output as a reader,
    and would then not fuse the activation that follows.
    """
    inputs = graph.find_nodes(op="placeholder")
    sizes = {
        str(size): (node, axis)
        for node in reversed(inputs)
        if isinstance(value := node.meta.get("val"), Tensor)
        for axis, size in enumerate(value.shape)
    }
    known: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node.target is not aten.sym_size.int:
            continue
        size = str(node.meta["val"])
        if size not in known and size in sizes and node.args != sizes[size]:
            with graph.inserting_after(inputs[-1]):
                known[size] = graph.call_function(aten.sym_size.int, sizes[size])
            known[size].meta["val"] = node.meta["val"]
        if (first := known.setdefault(size, node)) is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


SETTINGS = {"freezing": True, "joint_custom_pre_pass": read_sizes_once}
"""Settings of Inductor, for one compilation."""


def lacks() -> str | None:
    """The reason why this machine cannot compile to oneDNN; None if it can."""
    return no_x86() or no_onednn() or no_compiler()


def prepare(request: Request) -> None:
    """Bring a graph into the form that Inductor's int8 patterns match, in place."""
    make_unsigned(quantizers_of(quantized_products(request.graph)))
    unshare_weights(request.graph, request.linears)
    # Without this, Inductor decomposes a linear of a non-contiguous input into a form that its pattern fails on.
    for quantize in dict.fromkeys(linear.quantize for linear in request.linears):
        with quantize.graph.inserting_before(quantize):
            quantize.update_arg(0, quantize.graph.call_function(aten.contiguous.default, (quantize.args[0],)))
    request.graph.recompile()
    if request.float_dtype is not None:
        compute_in(request.graph, request.float_dtype, request.example_inputs)


def build(request: Request) -> Runnable:
    """Compile the graph, once for all sizes that are free in it."""
    prepare(request)
    program = as_program(request.graph, request.example_inputs)
    expected, structure = inputs_of(program), program.call_spec.out_spec
    compiled = _compiled(program)

    @torch.no_grad()
    def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_inputs(inputs, expected)
        return tree_unflatten(compiled(*(x.contiguous() for x in inputs)), structure)

    return run


@torch.no_grad()
def _compiled(program: ExportedProgram) -> Callable[..., Sequence[Tensor]]:
    """The compiled program, which takes its inputs by position and returns its outputs in a sequence."""
    module = module_of(program)
    output = module.graph.output_node()
    output.args = (tree_leaves(output.args),)
    module.graph.set_codegen(CodeGen())
    module.recompile()
    inputs = [node.meta["val"] for node in placeholders(module)]
    with tracing(TracingContext(detect_fake_mode(inputs))), inductor_config.patch(SETTINGS):
        compiled: Any = compile_fx(module, inputs)
    return compiled  # type: ignore[no-any-return]


register(
    Backend(
        name="x86_inductor",
        summary="Inductor: fused int8 kernels for x86 (oneDNN); needs a C++ compiler",
        integer=True,
        carries=INT8,
        rank=1,
        kernels=KERNELS,
        refuse=saturates,
        lacks=lacks,
        build=build,
        compiles=True,
        prunes=True,
    )
)
