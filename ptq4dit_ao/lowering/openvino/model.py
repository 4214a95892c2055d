"""A graph of aten ops as an ``openvino.Model``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec

from ptq4dit_ao._optional import require
from ptq4dit_ao.lowering.backend import Request
from ptq4dit_ao.lowering.openvino.rewrite import dequantize_constants, quantize_early, store_int4, widen_activations


@torch.no_grad()
def to_openvino(graph_module: GraphModule, example_inputs: tuple[Tensor, ...]) -> tuple[Any, TreeSpec]:
    """The model, and the structure of what the graph returns.

    Only the batch may differ from call to call: the first axis of the first input and of those with as many rows, if
    the graph does not fix it and the example has two rows or more.
    """
    ov = require("openvino", extra="openvino")
    rows = example_inputs[0].shape[:1]
    shapes = tuple({0: Dim.AUTO} if x.ndim and x.shape[:1] == rows else {} for x in example_inputs)
    program = torch.export.export(graph_module, example_inputs, dynamic_shapes=shapes, strict=False)
    model = ov.convert_model(program)  # with every axis of every input free
    values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    inputs = [values[name].shape for name in program.graph_signature.user_inputs]
    model.reshape({i: [-1 if isinstance(n, torch.SymInt) else n for n in shape] for i, shape in enumerate(inputs)})
    return model, program.call_spec.out_spec


def quantized_model(request: Request) -> tuple[Any, TreeSpec]:
    """As :func:`to_openvino`, in the form in which the CPU plugin computes linears with integers."""
    widen_activations(request.linears)
    dequantize_constants(request.graph)
    model, outputs = to_openvino(request.graph, request.example_inputs)
    quantize_early(model)
    store_int4(model)
    return model, outputs
