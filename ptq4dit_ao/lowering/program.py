"""Export of a quantized graph as an ``ExportedProgram``, the input of compilers and exporters."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node

from ptq4dit_ao.capture.interface import InputSpec, bind_sizes, distinct, free_sizes, input_specs, resized, shape_at
from ptq4dit_ao.capture.sizes import FreeSizes
from ptq4dit_ao.errors import ArgumentError

aten = torch.ops.aten

LIFT = 2**20
"""Quotient that is added to make a dividend positive; 32 bits hold its product with divisors below 2048."""


@torch.no_grad()
def as_program(graph: GraphModule, inputs: Sequence[Tensor]) -> ExportedProgram:
    """Export the graph again, with the same free sizes. ``inputs`` are made larger where a free size is 1.

    In a graph that does not say what its inputs look like, the batch alone is free: the first axis of the first input,
    and of every input with the same length, if that is 2 or more.
    """
    specs = input_specs(graph)
    if specs is None:
        rows = inputs[0].shape[:1]
        axes = [[0] if x.ndim and x.shape[:1] == rows else [] for x in inputs]
    else:
        axes = [[axis for axis, size in enumerate(spec.sizes) if isinstance(size, str)] for spec in specs]
        inputs = _of_two(inputs, specs, free_sizes(graph))
    free = tuple({a: Dim.AUTO for a in own if x.shape[a] > 1} for own, x in zip(axes, inputs, strict=True))
    layouts = distinct([x.contiguous() for x in inputs])
    program = torch.export.export(graph, layouts, dynamic_shapes=free, strict=False)
    # Export adds a check to every cast's input. It is one more reader, and int8 patterns allow a single one.
    for check in program.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        program.graph.erase_node(check)
    _drop_idle_squeezes(program.graph)
    _promote_einsums(program.graph)
    return program


def _of_two(inputs: Sequence[Tensor], specs: Sequence[InputSpec], sizes: FreeSizes) -> Sequence[Tensor]:
    """Inputs whose free sizes are 2 or more, because export fixes an axis of size 1."""
    given = bind_sizes(specs, [x.shape for x in inputs])
    ones = {size.name: size.nearest(2) for size in sizes.sizes if given.get(size.name) == 1}
    if not ones:
        return inputs
    values = given | ones if sizes.problem(given | ones) is None else sizes.example
    if any(1 in shape_at(spec, values) for spec in specs if any(isinstance(size, str) for size in spec.sizes)):
        values = sizes.example  # a size that follows from others is still 1
    return [resized(x, spec, values) for x, spec in zip(inputs, specs, strict=True)]


def _drop_idle_squeezes(graph: Graph) -> None:
    """Remove squeezes of an axis longer than 1. torch ignores them, but other runtimes refuse them."""
    for node in graph.find_nodes(op="call_function", target=aten.squeeze.dim):
        source, axis = node.args
        if source.meta["val"].shape[axis] != 1:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _promote_einsums(graph: Graph) -> None:
    """Cast the factors of an einsum to one dtype. torch does so itself, but other runtimes refuse mixed dtypes."""
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation, factors = node.args
        dtype = node.meta["val"].dtype
        if all(factor.meta["val"].dtype == dtype for factor in factors):
            continue
        with graph.inserting_before(node):
            cast = [graph.call_function(aten.to.dtype, (factor, dtype)) for factor in factors]
        for narrow, wide in zip(factors, cast, strict=True):
            wide.meta["val"] = narrow.meta["val"].to(dtype)
        node.args = (equation, cast)


def write_out_divisions(graph: Graph, *, remainders: bool) -> None:
    """Write out ``a // b`` of sizes where ``a`` may be negative, in place.

    Quotients of ONNX and OpenVINO round to zero, not down.

    Args:
        graph: graph of an exported program.
        remainders: whether to write out ``a % b``, too, which OpenVINO's importer does not know.
    """
    targets = (operator.floordiv, operator.mod) if remainders else (operator.floordiv,)
    divisions = [node for node in graph.nodes if node.target in targets]
    lifted = {node for node in divisions if isinstance(node.args[1], int) and _may_be_negative(node.args[0])}
    for node in divisions:
        if node.target is operator.floordiv and node not in lifted:
            continue
        value, divisor = node.args
        with graph.inserting_before(node):
            dividend = graph.call_function(operator.add, (value, divisor * LIFT)) if node in lifted else value
            result = graph.call_function(operator.floordiv, (dividend, divisor))
            if node in lifted:
                result = graph.call_function(operator.sub, (result, LIFT))
            if node.target is operator.mod:
                multiple = graph.call_function(operator.mul, (result, divisor))
                result = graph.call_function(operator.sub, (value, multiple))
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _may_be_negative(value: Any) -> bool:
    size: Any = value.meta.get("val") if isinstance(value, Node) else value
    return not (size.node.expr.is_nonnegative if isinstance(size, torch.SymInt) else size >= 0)


@dataclass(frozen=True)
class Input:
    """Dtype and shape of one input of a compiled program."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    """Size of each axis. A size that may differ from call to call is a name, and equal names are equal sizes."""

    def accepts(self, x: Tensor, sizes: dict[str, int]) -> bool:
        """Whether a tensor has this dtype and shape. Named sizes are looked up in ``sizes`` and added at first use."""
        if x.dtype != self.dtype or x.ndim != len(self.shape):
            return False
        pairs = zip(self.shape, x.shape, strict=True)
        return all(
            actual == (size if isinstance(size, int) else sizes.setdefault(size, actual)) for size, actual in pairs
        )


def inputs_of(program: ExportedProgram) -> list[Input]:
    """Inputs of a program."""
    values = [
        node.meta["val"]
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in program.graph_signature.user_inputs
    ]
    return [
        Input(value.dtype, tuple(str(size) if _varies(size) else int(size) for size in value.shape)) for value in values
    ]


def _varies(size: int | torch.SymInt) -> bool:
    """Whether a size may vary. A size that tracing fixed to the example's is symbolic, too, but has no free symbol."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def check_inputs(inputs: Sequence[Tensor], expected: Sequence[Input]) -> None:
    """Check the inputs of a compiled program, which reads them as memory of the layout it was compiled for.

    Raises:
        ArgumentError: there are more or fewer inputs, one has another dtype or shape, or their batch sizes differ.
    """
    if len(inputs) != len(expected):
        raise ArgumentError(f"got {len(inputs)} inputs; this program takes {len(expected)}")
    sizes: dict[str, int] = {}
    for i, (x, like) in enumerate(zip(inputs, expected, strict=True)):
        if not like.accepts(x, sizes):
            shape = tuple(size if isinstance(size, int) else sizes.get(size, size) for size in like.shape)
            raise ArgumentError(
                f"input {i} is {x.dtype} {tuple(x.shape)}; this program was compiled for {like.dtype} {shape}. Only "
                "sizes that the model was captured with may differ from call to call"
            )
