"""Lockstep execution of a prepared graph as a float and a quantized network, over all calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional

from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.graph.names import is_linear, placeholders, weight_path, writes_in_place
from ptq4dit_ao.graph.pending import tensor_at
from ptq4dit_ao.observers import ActivationObserver
from ptq4dit_ao.rounding.layers import bias_of, is_stored, module_of, weight_observer

Values = dict[Node, Any]
Instead = dict[Node, Callable[[Tensor], Tensor]]


class Streams:
    """Values of every batch that the rest of the graph still reads, in both networks.

    A value that is equal in both networks, such as before the first quantized layer, is stored once.

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
        self._in_place = writes_in_place(prepared)
        inputs = placeholders(prepared)
        self._float: list[Values] = [dict(zip(inputs, batch, strict=True)) for batch in batches]
        if not self._float:
            raise CalibrationError("there are no calibration samples; pass at least one tuple of inputs")
        self._quantized: list[Values] = [{} for _ in self._float]
        if self._in_place:  # in-place writes of one network must not change values of the other
            self._quantized = [{node: value.clone() for node, value in batch.items()} for batch in self._float]

    def advance(self, stop: Node) -> None:
        """Run every batch up to a node, which is not run itself."""
        end = self._nodes.index(stop)
        segment = [node for node in self._nodes[self._next : end] if node.op != "placeholder"]
        self._next = max(self._next, end)
        instead = float_network(self._model, segment), quantized_network(self._model, segment)
        for exact, quantized in zip(self._float, self._quantized, strict=True):
            for node in segment:
                self._step(node, instead, exact, quantized)

    def inputs(self, node: Node) -> Iterator[tuple[Tensor, Tensor]]:
        """The input of the next node, batch by batch: in the float network, and in the quantized one."""
        (source,) = node.all_input_nodes
        for exact, quantized in zip(self._float, self._quantized, strict=True):
            yield exact[source], quantized[source] if source in quantized else exact[source]

    def held(self, nodes: Sequence[Node]) -> list[Values]:
        """Values that the next nodes read from earlier ones, batch by batch, in the quantized network."""
        inside = set(nodes)
        sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
        batches = zip(self._float, self._quantized, strict=True)
        held = [{s: quantized[s] if s in quantized else exact[s] for s in sources} for exact, quantized in batches]
        if self._in_place:
            return [{source: copied(value) for source, value in values.items()} for values in held]
        return held

    def exact(self, nodes: Sequence[Node]) -> list[Values]:
        """Outputs of nodes that a later node reads, batch by batch, in the float network."""
        return [{node: values[node] for node in nodes} for values in self._float]

    def redo(self, nodes: Sequence[Node], held: Sequence[Values]) -> None:
        """Run nodes again in the quantized network, with their new weights."""
        instead = quantized_network(self._model, nodes)
        for before, quantized in zip(held, self._quantized, strict=True):
            values = dict(before)
            for node in nodes:
                values[node] = run_node(self._interpreter, node, values.__getitem__, instead)
            quantized.update((node, values[node]) for node in nodes if node in quantized)

    def _step(self, node: Node, instead: tuple[Instead, Instead], exact: Values, quantized: Values) -> None:
        value = run_node(self._interpreter, node, exact.__getitem__, instead[0])
        changes = _quantizes(self._model, node) or any(source in quantized for source in node.all_input_nodes)
        if changes or self._in_place:

            def read(source: Node) -> Any:
                return quantized.get(source, exact.get(source))

            other = run_node(self._interpreter, node, read, instead[1])
            if node.users:
                quantized[node] = other
        if node.users:
            exact[node] = value
        for source in node.all_input_nodes:
            if self._last_reader[source] is node:
                exact.pop(source, None)
                quantized.pop(source, None)


def run_node(interpreter: Interpreter, node: Node, read: Callable[[Node], Any], instead: Instead) -> Any:
    """The value of one node of a prepared graph.

    Args:
        interpreter: interpreter of the graph.
        node: any node other than a placeholder or the output.
        read: function that returns the value of an earlier node.
        instead: functions of the first input that replace some nodes. Other observers pass their input on.
    """
    if node.op == "get_attr":
        return interpreter.fetch_attr(str(node.target))
    if node in instead:
        return instead[node](read(node.all_input_nodes[0]))
    if node.op == "call_module":
        return read(node.all_input_nodes[0])
    args, kwargs = map_arg((node.args, node.kwargs), read)  # type: ignore[misc]
    return interpreter.call_function(node.target, args, kwargs)  # type: ignore[arg-type]


def float_network(model: GraphModule, nodes: Iterable[Node]) -> Instead:
    """Functions of a prepared graph's linears in the float network, with balanced weights."""
    return {node: _Linear(*_stored(model, node)) for node in nodes if is_linear(node) and is_stored(node)}


def quantized_network(model: GraphModule, nodes: Iterable[Node]) -> Instead:
    """Functions of a prepared graph's observers and linears in the quantized network."""
    instead = float_network(model, nodes)
    for node in nodes:
        if isinstance(module := module_of(model, node), ActivationObserver):
            instead[node] = module.fake_quantize
        elif node in instead and (observer := weight_observer(model, node)) is not None:
            weight, bias = _stored(model, node)
            weight = observer.fake_quantize(weight_path(node), weight)
            corrected = None if observer.rounded is None else observer.rounded.bias
            instead[node] = _Linear(weight, bias if corrected is None else corrected.to(weight))
    return instead


def _quantizes(model: GraphModule, node: Node) -> bool:
    """Whether a node's output differs in the quantized network even for equal inputs."""
    if isinstance(module_of(model, node), ActivationObserver):
        return True
    return is_linear(node) and is_stored(node) and weight_observer(model, node) is not None


@dataclass(frozen=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def _stored(model: GraphModule, node: Node) -> tuple[Tensor, Tensor | None]:
    bias = bias_of(node)
    return tensor_at(model, weight_path(node)), None if bias is None else tensor_at(model, bias)


def copied(value: Any) -> Any:
    """A copy of a node's value, whose tensors share no memory with the original."""
    return map_aggregate(value, lambda part: part.clone() if isinstance(part, Tensor) else part)
