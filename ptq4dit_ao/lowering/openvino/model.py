"""Conversion of a graph of aten ops to an ``openvino.Model``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ptq4dit_ao._optional import require
from ptq4dit_ao.lowering.backend import Request
from ptq4dit_ao.lowering.match import quantized_products, quantizers_of, widen
from ptq4dit_ao.lowering.openvino.rewrite import dequantize_constants, multiply_by_head, quantize_early, store_int4
from ptq4dit_ao.lowering.program import as_program, inputs_of, write_out_divisions


def to_openvino(graph: GraphModule, example_inputs: tuple[Tensor, ...]) -> tuple[Any, ExportedProgram]:
    """The converted model and the program it was converted from. The model's dynamic axes are those of the program."""
    program = as_program(graph, example_inputs)
    write_out_divisions(program.graph, remainders=True)
    model = require("openvino", extra="openvino").convert_model(program)  # all axes are dynamic here
    sizes = enumerate(like.shape for like in inputs_of(program))
    model.reshape({i: [size if isinstance(size, int) else -1 for size in shape] for i, shape in sizes})
    return model, program


def quantized_model(request: Request) -> tuple[Any, ExportedProgram]:
    """The model of :func:`to_openvino`, rewritten to what the CPU plugin computes as integers: ranges of 256 steps."""
    products = quantizers_of(quantized_products(request.graph))
    widen(dict.fromkeys([*(linear.quantize for linear in request.linears), *products]))
    dequantize_constants(request.graph)
    model, program = to_openvino(request.graph, request.example_inputs)
    multiply_by_head(model)
    quantize_early(model)
    store_int4(model)
    return model, program
