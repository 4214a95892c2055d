"""The quantized linears of a prepared graph, grouped by the input they read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao.graph.names import is_linear, layer_name, weight_path
from ptq4dit_ao.graph.pending import tensor_at
from ptq4dit_ao.observers import ActivationObserver, WeightObserver
from ptq4dit_ao.observers.qdq import QuantSpec


@dataclass(frozen=True)
class Layer:
    """One linear of a prepared graph."""

    node: Node
    observer: WeightObserver

    def weight(self, model: GraphModule) -> Tensor:
        """(C_out, C_in) float32, balanced."""
        return tensor_at(model, weight_path(self.node)).detach().to(torch.float32)

    def bias(self, model: GraphModule) -> Tensor | None:
        """(C_out,) float32, balanced."""
        path = bias_of(self.node)
        return None if path is None else tensor_at(model, path).detach().to(torch.float32)


@dataclass(frozen=True)
class Group:
    """Linears that read one quantized input."""

    node: Node
    """The observer's."""
    observer: ActivationObserver
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return layer_name(self.layers[0].node)

    def by_spec(self) -> dict[QuantSpec, list[Layer]]:
        """Layers that are quantized alike."""
        layers = defaultdict(list)
        for layer in self.layers:
            layers[layer.observer.spec].append(layer)
        return layers


def find_groups(prepared: GraphModule) -> list[Group]:
    """Every group of a model from ``prepare_pt2e`` with our quantizer, in execution order.

    Left out, and rounded to nearest, are weights that several linears read, and those of another form than symmetric
    int8 with one scale for each output channel, or for all of them.
    """
    groups = []
    for node in prepared.graph.nodes:
        observer = module_of(prepared, node)
        if isinstance(observer, ActivationObserver) and (layers := tuple(_layers(prepared, node))):
            groups.append(Group(node, observer, layers))
    return groups


def activation_clipping(prepared: GraphModule) -> dict[str, float]:
    """Node name of a linear -> the range of its input, as a part of the float network's from minimum to maximum.

    Above 1 where the range was taken from the quantized network, and that goes further.
    """
    return {layer.node.name: _clipping(group.observer) for group in find_groups(prepared) for layer in group.layers}


def _clipping(observer: ActivationObserver) -> float:
    low, high = map(float, observer.range())
    widths = [max(b, 0.0) - min(a, 0.0) for a, b in (observer.chosen_range or (low, high), (low, high))]
    return widths[0] / widths[1] if widths[1] else 1.0


def weight_observer(prepared: GraphModule, linear: Node) -> WeightObserver | None:
    """Ours, if the linear's weight has one."""
    weight = linear.args[1]
    assert isinstance(weight, Node)
    observer = module_of(prepared, weight)
    return observer if isinstance(observer, WeightObserver) else None


def bias_of(linear: Node) -> str | None:
    """Attribute path of a linear's bias."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    return str(bias.target) if isinstance(bias, Node) else None


def is_stored(linear: Node) -> bool:
    """Is the bias, if there is one, an attribute?"""
    bias = linear.args[2] if len(linear.args) > 2 else None
    return bias is None or (isinstance(bias, Node) and bias.op == "get_attr")


def _layers(prepared: GraphModule, observed: Node) -> Iterator[Layer]:
    for user in observed.users:
        if is_linear(user) and user.args[0] is observed:
            observer = weight_observer(prepared, user)
            if observer is not None and _can_round(observer, user):
                yield Layer(user, observer)


def _can_round(observer: WeightObserver, linear: Node) -> bool:
    spec, weight = observer.spec, linear.args[1]
    alone = isinstance(weight, Node) and len(weight.users) == 1
    return (
        alone and is_stored(linear) and spec.symmetric and spec.channel_axis in (0, None) and spec.dtype == torch.int8
    )


def module_of(prepared: GraphModule, node: Node) -> object:
    """The module that a node calls; None if it calls none."""
    return prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
