"""Rewrites of what OpenVINO cannot import, or would compute in float, into equivalent operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao._optional import require
from ptq4dit_ao.graph.names import get_attribute
from ptq4dit_ao.lowering.match import quantized

aten = torch.ops.aten

MOVES = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operations that only move elements."""


def dequantize_constants(graph_module: GraphModule) -> None:
    """Write ``(integers - zero point) * scale`` out for integer constants.

    The importer takes every dequantize node for half of a quantize/dequantize pair, and drops it.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not quantized.dequantize_per_channel.default:
            continue
        arguments: tuple[Any, ...] = node.args
        integers, scale, zero_point, axis = arguments[:4]
        if integers.op != "get_attr":
            continue
        shape = [-1 if i == axis else 1 for i in range(_tensor(graph_module, integers).ndim)]
        with graph.inserting_before(node):
            value = graph.call_function(aten.to.dtype, (integers, torch.float32))
            if _tensor(graph_module, zero_point).any():
                value = graph.call_function(aten.sub.Tensor, (value, _as_float(zero_point, shape)))
            value = graph.call_function(aten.mul.Tensor, (value, _as_float(scale, shape)))
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    graph_module.recompile()


def quantize_early(model: Any) -> None:
    """Move quantizations before operations that move elements, next to the linear or attention that computes them.

    A per-tensor quantization commutes with moving elements, and on its own it costs a pass over memory.
    """
    ov = require("openvino", extra="openvino")
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        bounds = [value.get_node() for value in node.input_values()[1:]]
        moves = _moves_before(node.input_value(0))
        if not moves or any(bound.get_type_name() != "Constant" or bound.data.size > 1 for bound in bounds):
            continue
        for port, bound in enumerate(bounds, start=1):  # as scalars: they may have more axes than the moved tensor
            node.input(port).replace_source_output(ov.op.Constant(bound.data.reshape(())).output(0))
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(moves[0].output(0))
        node.input(0).replace_source_output(moves[-1].input_value(0))
        moves[-1].input(0).replace_source_output(node.output(0))
    model.validate_nodes_and_infer_types()


def multiply_by_head(model: Any) -> None:
    """Multiply tensors of more than three axes directly.

    Export turns such a product into Broadcast, Reshape, a product of three axes and Reshape. The product is then not
    next to the quantization of its factors, and would be computed in float.
    """
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        factors = [_before_flattening(value) for value in product.input_values()]
        readers = list(product.output(0).get_target_inputs())
        result = readers[0].get_node() if len(readers) == 1 else None
        if result is None or result.get_type_name() != "Reshape" or any(factor is None for factor in factors):
            continue
        if len({len(value.get_partial_shape()) for value in (result.output(0), *factors)}) > 1:
            continue
        for port, factor in enumerate(factors):
            product.input(port).replace_source_output(factor)
        for reader in result.output(0).get_target_inputs():
            reader.replace_source_output(product.output(0))
    model.validate_nodes_and_infer_types()


def store_int4(model: Any) -> None:
    """Store int8 weights that fit 4 bits as int4, two per byte.

    They are converted back to int8, which the plugin folds. With int4 weights it would silently compute in float.
    """
    ov = require("openvino", extra="openvino")
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.i8 or node.data.size == 0:
            continue
        if node.data.min() < -8 or node.data.max() > 7:
            continue
        packed = ov.Tensor(ov.Type.i4, node.get_output_shape(0))
        nibbles = np.zeros(2 * packed.byte_size, np.int8)
        nibbles[: node.data.size] = node.data.ravel() & 15
        packed.data[...] = nibbles[0::2] | nibbles[1::2] << 4
        wide = ov.opset13.convert(ov.op.Constant(packed), ov.Type.i8)
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()


def _before_flattening(output: Any) -> Any:
    """The tensor before its leading axes were broadcast and flattened into one; None if they were not."""
    node = output.get_node()
    if node.get_type_name() != "Reshape":
        return None
    whole = node.input_value(0)
    after, before = output.get_partial_shape(), whole.get_partial_shape()
    matrix = after[-2:]
    if len(before) <= 3 or len(after) != 3 or any(size.is_dynamic for size in matrix) or before[-2:] != matrix:
        return None
    broadcast = whole.get_node()
    return broadcast.input_value(0) if broadcast.get_type_name() == "Broadcast" else whole


def _moves_before(output: Any) -> list[Any]:
    """The operations that moved the elements of an output, the last one first.

    Empty if their source has other readers.
    """
    moves = []
    while output.get_node().get_type_name() in MOVES and len(output.get_target_inputs()) == 1:
        moves.append(output.get_node())
        output = moves[-1].input_value(0)
    return moves if len(output.get_target_inputs()) == 1 else []


def _as_float(node: Node, shape: list[int]) -> Node:
    """A per-channel vector as float32, in a shape that broadcasts along its axis."""
    view = node.graph.call_function(aten.view.default, (node, shape))
    return node.graph.call_function(aten.to.dtype, (view, torch.float32))


def _tensor(graph_module: GraphModule, node: Node) -> Tensor:
    return get_attribute(graph_module, str(node.target))
