"""``onnx``: a file of QuantizeLinear and DequantizeLinear around float products, which runtimes fuse to integer ones.

Here onnxruntime runs it, and the proof counts its integer kernels.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import TreeSpec, tree_unflatten

from ptq4dit_ao._optional import require
from ptq4dit_ao.lowering.backend import Backend, Capabilities, Request, Runnable, register
from ptq4dit_ao.lowering.machine import no_x86, saturates
from ptq4dit_ao.lowering.match import QuantizedLinear, quantized_products, quantizers_of, widen
from ptq4dit_ao.lowering.program import as_program, write_out_divisions

aten = torch.ops.aten

SUFFIX = ".onnx"
FULL_RANGE = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
"""Range at which QuantizeLinear saturates, by dtype."""
INTEGER_GEMMS = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm")
"""Operators of onnxruntime that multiply integers by integers."""


class Session:
    """An ONNX file in onnxruntime, called with tensors. It is profiled until :attr:`ran` has read the profile."""

    def __init__(self, path: Path, result: TreeSpec, attention: frozenset[str]) -> None:
        runtime = require("onnxruntime", extra="onnx")
        self.profile = tempfile.TemporaryDirectory()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_profiling, options.profile_file_prefix = True, f"{self.profile.name}/run"
        # By default, onnxruntime would quantize the inputs of linears whose weights alone are integers.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]
        self.result = result
        self.attention = attention
        """Names of the products of two activations."""

    @cached_property
    def ran(self) -> list[tuple[str, str]]:
        """Every kernel that ran so far, as (node, operator). Reading it ends the profiling."""
        with self.profile:
            events = json.loads(Path(self.session.end_profiling()).read_text())
        suffix = "_kernel_time"
        kernels = [event for event in events if event["name"].endswith(suffix)]
        return [(event["name"].removesuffix(suffix), event["args"]["op_name"]) for event in kernels]

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the model on the graph's inputs."""
        feed = {name: x.detach().numpy() for name, x in zip(self.names, inputs, strict=True)}
        return tree_unflatten([torch.from_numpy(y) for y in self.session.run(None, feed)], self.result)


def count(run: Runnable, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Integer matrix products of linears in a session's first call: operator -> count. It ends the profiling."""
    return _count(run, inputs, attention=False)


def count_attention(run: Runnable, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Integer matrix products of two activations in a session's first call: operator -> count.

    It ends the profiling.
    """
    return _count(run, inputs, attention=True)


def _count(run: Runnable, inputs: Sequence[Tensor], *, attention: bool) -> dict[str, int]:
    assert isinstance(run, Session)
    if "ran" not in vars(run):
        run(*inputs)
    counted = Counter(operator for node, operator in run.ran if (node in run.attention) == attention)
    return {name: counted[name] for name in INTEGER_GEMMS if name in counted}


def refuse(linear: QuantizedLinear) -> str | None:
    """The reason why QuantizeLinear cannot express a linear, or onnxruntime computes it wrongly; None if neither."""
    full = FULL_RANGE[linear.x_dtype]
    if linear.x_range != full:
        return f"QuantizeLinear saturates at {full}, the graph at {linear.x_range}"
    return None if no_x86() else saturates(linear)


def build(request: Request) -> Session:
    """Export the graph to a temporary file and load that into onnxruntime, which optimizes it."""
    with tempfile.TemporaryDirectory() as folder:
        return write(request, Path(folder) / f"model{SUFFIX}")


def write(request: Request, path: Path) -> Session:
    """Write the file and load it. Weights beyond 1.5 GiB are stored beside it, in ``PATH.data``."""
    widen(quantizers_of(quantized_products(request.graph)))
    for linear in request.linears:
        _spell_out(linear)
    request.graph.recompile()
    program = as_program(request.graph, request.example_inputs)
    write_out_divisions(program.graph, remainders=False)
    exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert exported is not None
    _tidy(exported.model)
    exported.save(path)
    return Session(path, program.call_spec.out_spec, frozenset(_products_of_activations(exported.model.graph)))


def _tidy(model: Any) -> None:
    """Optimize the model like ``optimize=True``, but without the rules that take a number close to 0 or 1 for it.

    Those rules drop the ``+ 1e-15`` that keeps linear attention from dividing by 0. onnxruntime has rules of its own.
    """
    optimizer = require("onnxscript", extra="onnx").optimizer
    optimizer.inline(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    optimizer.remove_unused_functions(model)


def _products_of_activations(graph: Iterable[Any]) -> Iterator[str]:
    """Names of the products both of whose factors are quantized at run time."""
    for node in graph:
        if node.op_type == "MatMul":
            dequantized = [value.producer() for value in node.inputs]
            sources = [d.inputs[0].producer() for d in dequantized if d is not None and d.inputs]
            if [s.op_type for s in sources if s is not None] == ["QuantizeLinear"] * 2:
                yield node.name


def _spell_out(linear: QuantizedLinear) -> None:
    """Replace ``linear(x, W, b)`` by ``squeeze(unsqueeze(x) W^T) + b``.

    onnxruntime would make a Gemm of a product of two axes and the addition after it, and compute that in float.
    """
    graph, (dequantize, weight) = linear.node.graph, linear.node.args[:2]
    assert isinstance(dequantize, Node)
    with graph.inserting_before(linear.node):
        # The unsqueeze goes before DequantizeLinear, which has to stay next to the product.
        integers = graph.call_function(aten.unsqueeze.default, (linear.quantize, 0))
        x = graph.node_copy(dequantize, lambda quantize: integers)
        product = graph.call_function(aten.matmul.default, (x, graph.call_function(aten.t.default, (weight,))))
        result = graph.call_function(aten.squeeze.dim, (product, 0))
        if linear.bias_node is not None:
            result = graph.call_function(aten.add.Tensor, (result, linear.bias_node))
    linear.node.replace_all_uses_with(result)
    graph.erase_node(linear.node)


register(
    Backend(
        name="onnx",
        summary="ONNX file of QuantizeLinear and DequantizeLinear, run by onnxruntime",
        integer=True,
        carries=Capabilities(activation_dtypes=tuple(FULL_RANGE)),
        refuse=refuse,
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        build=build,
        count=count,
        count_attention=count_attention,
        write=write,
        prunes=True,
        suffix=SUFFIX,
    )
)
