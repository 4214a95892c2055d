"""A prepared graph run as two networks at once, float and quantized so far, over all calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.nn import functional

from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.graph.names import is_linear, placeholders, weight_path
from ptq4dit_ao.graph.pending import tensor_at
from ptq4dit_ao.observers import ActivationObserver
from ptq4dit_ao.rounding.layers import bias_of, is_stored, weight_observer

Values = dict[Node, Any]


class Streams:
    """Of every batch, what the rest of the graph still reads, in both networks.

    Where they agree, as before the first quantized layer, a value is held once.

    Args:
        prepared: a balanced graph with our observers.
        batches: input tuples.

    Raises:
        CalibrationError: there are no batches.
    """

    def __init__(self, prepared: GraphModule, batches: Iterable[Sequence[Tensor]]) -> None:
        self._model = prepared
        self._interpreter = Interpreter(prepared)
        self._nodes = list(prepared.graph.nodes)
        self._next = 0
        self._last_reader = {source: node for node in self._nodes for source in node.all_input_nodes}
        self._in_place = any(_writes(node) for node in self._nodes)
        inputs = placeholders(prepared)
        self._float: list[Values] = [dict(zip(inputs, batch, strict=True)) for batch in batches]
        if not self._float:
            raise CalibrationError("there are no calibration samples; pass at least one tuple of inputs")
        self._quantized: list[Values] = [{} for _ in self._float]
        if self._in_place:  # nothing may be shared
            self._quantized = [{node: value.clone() for node, value in batch.items()} for batch in self._float]

    def advance(self, stop: Node) -> None:
        """Run every batch up to a node."""
        end = self._nodes.index(stop)
        segment = [node for node in self._nodes[self._next : end] if node.op != "placeholder"]
        self._next = max(self._next, end)
        linears = {node: _Linear(self._model, node) for node in segment if is_linear(node) and is_stored(node)}
        for exact, quantized in zip(self._float, self._quantized, strict=True):
            for node in segment:
                self._step(node, linears.get(node), exact, quantized)

    def inputs(self, node: Node) -> Iterator[tuple[Tensor, Tensor]]:
        """What a node is about to read, batch by batch: in the float network, and in the quantized one."""
        (source,) = node.all_input_nodes
        for exact, quantized in zip(self._float, self._quantized, strict=True):
            yield exact[source], quantized[source] if source in quantized else exact[source]

    def _step(self, node: Node, linear: _Linear | None, exact: Values, quantized: Values) -> None:
        module = self._interpreter.fetch_attr(str(node.target)) if node.op == "call_module" else None
        changes = isinstance(module, ActivationObserver) or (linear is not None and linear.changes)
        value = self._value(node, linear, module, exact.__getitem__, quantize=False)
        if changes or self._in_place or any(source in quantized for source in node.all_input_nodes):

            def read(source: Node) -> Any:
                return quantized.get(source, exact.get(source))

            other = self._value(node, linear, module, read, quantize=True)
            if node.users:
                quantized[node] = other
        if node.users:
            exact[node] = value
        for source in node.all_input_nodes:
            if self._last_reader[source] is node:
                exact.pop(source, None)
                quantized.pop(source, None)

    def _value(
        self, node: Node, linear: _Linear | None, module: object, read: Callable[[Node], Any], *, quantize: bool
    ) -> Any:
        if node.op == "get_attr":
            return self._interpreter.fetch_attr(str(node.target))
        if linear is not None:
            return linear(read(node.all_input_nodes[0]), quantize=quantize)
        if node.op == "call_module":
            x = read(node.all_input_nodes[0])
            return module.fake_quantize(x) if quantize and isinstance(module, ActivationObserver) else x
        args, kwargs = map_arg((node.args, node.kwargs), read)  # type: ignore[misc]
        return self._interpreter.call_function(node.target, args, kwargs)  # type: ignore[arg-type]


class _Linear:
    """A linear's weight and bias in both networks."""

    def __init__(self, model: GraphModule, node: Node) -> None:
        path, bias = weight_path(node), bias_of(node)
        self._float = tensor_at(model, path), None if bias is None else tensor_at(model, bias)
        observer = weight_observer(model, node)
        self.changes = observer is not None
        self._quantized = self._float
        if observer is not None:
            weight = observer.fake_quantize(path, self._float[0])
            corrected = None if observer.rounded is None else observer.rounded.bias
            self._quantized = (weight, self._float[1] if corrected is None else corrected.to(weight))

    def __call__(self, x: Tensor, *, quantize: bool) -> Tensor:
        return functional.linear(x, *(self._quantized if quantize else self._float))


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return isinstance(schema, torch.FunctionSchema) and schema.is_mutable
