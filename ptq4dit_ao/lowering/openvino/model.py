"""A graph of aten ops as an ``openvino.Model``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ptq4dit_ao._optional import require
from ptq4dit_ao.lowering.backend import Request
from ptq4dit_ao.lowering.match import quantized_products, quantizers_of, widen
from ptq4dit_ao.lowering.openvino.rewrite import dequantize_constants, multiply_by_head, quantize_early, store_int4
from ptq4dit_ao.lowering.program import as_program, inputs_of


def to_openvino(graph: GraphModule, example_inputs: tuple[Tensor, ...]) -> tuple[Any, ExportedProgram]:
    """The model, whose inputs vary as those of the program do from which it was converted."""
    program = as_program(graph, example_inputs)
    model = require("openvino", extra="openvino").convert_model(program)  # with every axis of every input free
    sizes = enumerate(like.shape for like in inputs_of(program))
    model.reshape({i: [size if isinstance(size, int) else -1 for size in shape] for i, shape in sizes})
    return model, program


def quantized_model(request: Request) -> tuple[Any, ExportedProgram]:
    """As :func:`to_openvino`, in the form in which the CPU plugin computes with integers: it knows 256 steps only."""
    products = quantizers_of(quantized_products(request.graph))
    widen(dict.fromkeys([*(linear.quantize for linear in request.linears), *products]))
    dequantize_constants(request.graph)
    model, program = to_openvino(request.graph, request.example_inputs)
    multiply_by_head(model)
    quantize_early(model)
    store_int4(model)
    return model, program
