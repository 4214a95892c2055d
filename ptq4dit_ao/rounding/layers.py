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
    """One linear of a prepared graph, with the observer of its weight."""

    node: Node
    observer: WeightObserver

    def weight(self, model: GraphModule) -> Tensor:
        """The balanced weight, (C_out, C_in) float32."""
        return tensor_at(model, weight_path(self.node)).detach().to(torch.float32)

    def bias(self, model: GraphModule) -> Tensor | None:
        """The balanced bias, (C_out,) float32; None if there is none."""
        path = bias_of(self.node)
        return None if path is None else tensor_at(model, path).detach().to(torch.float32)


@dataclass(frozen=True)
class Group:
    """Linears that read one quantized input."""

    node: Node
    """Node of the input's observer."""
    observer: ActivationObserver
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """Name of the group's first layer."""
        return layer_name(self.layers[0].node)

    def by_spec(self) -> dict[QuantSpec, list[Layer]]:
        """Layers by the spec of their weights."""
        layers = defaultdict(list)
        for layer in self.layers:
            layers[layer.observer.spec].append(layer)
        return layers


def find_groups(prepared: GraphModule) -> list[Group]:
    """Every group of a model that ``prepare_pt2e`` has prepared with our quantizer, in execution order.

    Groups include only weights that a single linear reads, quantized to symmetric int8 with one scale per output
    channel or per tensor. All other weights are rounded to nearest.
    """
    groups = []
    for node in prepared.graph.nodes:
        observer = module_of(prepared, node)
        if isinstance(observer, ActivationObserver) and (layers := tuple(_layers(prepared, node))):
            groups.append(Group(node, observer, layers))
    return groups


def activation_clipping(prepared: GraphModule) -> dict[str, float]:
    """Width of the quantization range of each linear's input, by node name, as a fraction of the float network's range.

    The fraction is above 1 if the range was chosen in the quantized network and is wider there. Inputs without one
    range are left out.
    """
    groups = (group for group in find_groups(prepared) if group.observer.spec.ranged)
    return {layer.node.name: _clipping(group.observer) for group in groups for layer in group.layers}


def _clipping(observer: ActivationObserver) -> float:
    low, high = map(float, observer.range())
    widths = [max(b, 0.0) - min(a, 0.0) for a, b in (observer.chosen_range or (low, high), (low, high))]
    return widths[0] / widths[1] if widths[1] else 1.0


def weight_observer(prepared: GraphModule, linear: Node) -> WeightObserver | None:
    """The :class:`WeightObserver` of a linear's weight; None without one."""
    weight = linear.args[1]
    assert isinstance(weight, Node)
    observer = module_of(prepared, weight)
    return observer if isinstance(observer, WeightObserver) else None


def bias_of(linear: Node) -> str | None:
    """Attribute path of a linear's bias; None without one."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    return str(bias.target) if isinstance(bias, Node) else None


def is_stored(linear: Node) -> bool:
    """Whether a linear's bias is an attribute or missing, and not computed."""
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
