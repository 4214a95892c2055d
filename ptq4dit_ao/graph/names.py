"""Names of attributes, layers and inputs in exported graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ptq4dit_ao.errors import ArgumentError

LINEAR = torch.ops.aten.linear.default

WRAPPED = "base_layer"
"""PEFT's name for the original layer inside an adapter."""

CONSTANT = "_constant"
"""Suffix of the name of a weight that was computed from parameters."""


def calls(node: object, target: object) -> bool:
    """Whether an argument is a node that calls a target."""
    return isinstance(node, Node) and node.target is target


def get_attribute(module: nn.Module, path: str) -> Any:
    """The object at a dotted path."""
    owner: Any = module
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def set_tensor(module: nn.Module, path: str, value: Tensor) -> None:
    """Replace the tensor at a dotted path by a new one of the same kind (parameter or buffer).

    ``ep.module()`` shares storage with the user's model, so the old tensor is never modified.
    """
    *parents, name = path.split(".")
    owner = get_attribute(module, ".".join(parents)) if parents else module
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    elif name in owner._buffers:
        owner._buffers[name] = value
    else:
        setattr(owner, name, value)


def is_linear(node: Node) -> bool:
    """Whether a node is a linear whose weight is a parameter or buffer of the model."""
    return node.op == "call_function" and node.target is LINEAR and _weight_node(node) is not None


def linears(graph_module: GraphModule) -> list[Node]:
    """Every linear whose weight is a parameter or buffer, in execution order."""
    return [node for node in graph_module.graph.nodes if is_linear(node)]


def weight_path(node: Node) -> str:
    """Attribute path of a linear's weight, looking through observers and quantize/dequantize nodes."""
    weight = _weight_node(node)
    assert weight is not None, f"{node.name} has no weight attribute"
    return str(weight.target)


def layer_name(node: Node) -> str:
    """Module name of a linear, such as ``transformer_blocks.0.attn1.to_q``, without the names of adapters around it."""
    return unwrapped(weight_path(node).rstrip("_").removesuffix(CONSTANT).removesuffix(".weight"))


def unwrapped(path: str) -> str:
    """The path of a layer without the adapter around it."""
    return ".".join(name for name in path.split(".") if name != WRAPPED)


def adapters(graph_module: GraphModule) -> set[Node]:
    """The linears of adapters (LoRA) that were not fused, without the linears that the adapters wrap."""
    paths = {node: weight_path(node) for node in linears(graph_module)}
    wraps = {path.partition(f".{WRAPPED}.")[0] for path in paths.values() if f".{WRAPPED}." in path}
    return {
        node
        for node, path in paths.items()
        if f".{WRAPPED}." not in path and any(path.startswith(f"{layer}.") for layer in wraps)
    }


def joint_name(layers: Iterable[str]) -> str:
    """Joint name of layers, such as ``blocks.0.attn.{to_q,to_k,to_v}``; linears of adapters are left out."""
    layers = list(dict.fromkeys(layers))
    layers = [layer for layer in layers if not any(layer.startswith(f"{other}.") for other in layers)]
    if len(layers) == 1:
        return layers[0]
    parts = [layer.split(".") for layer in layers]
    shared = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False)))
    rest = ",".join(".".join(names[shared:]) for names in parts)
    return ".".join([*parts[0][:shared], f"{{{rest}}}"])


def data_input(node: Node) -> Node:
    """The tensor a linear reads, looking through an observer."""
    source = node.args[0]
    assert isinstance(source, Node)
    while source.op == "call_module":
        (source,) = source.all_input_nodes
    return source


def _weight_node(node: Node) -> Node | None:
    source = node.args[1] if len(node.args) > 1 else None
    while isinstance(source, Node) and source.op == "call_module" and len(source.all_input_nodes) == 1:
        (source,) = source.all_input_nodes
    return source if isinstance(source, Node) and source.op == "get_attr" else None


def writes_in_place(graph_module: GraphModule) -> bool:
    """Whether any node modifies a tensor that it reads."""
    targets = (node.target for node in graph_module.graph.nodes)
    return any(isinstance(target, OpOverload) and target._schema.is_mutable for target in targets)


def placeholders(graph_module: GraphModule) -> list[Node]:
    """The nodes of the graph's inputs, in order."""
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


TIMESTEP_NAMES = ("timestep", "timesteps", "t")


def timestep_placeholder(graph_module: GraphModule, name: str | None = None) -> Node | None:
    """The graph input that holds the timestep: the one with the given name, else one of :data:`TIMESTEP_NAMES` or None.

    Raises:
        ArgumentError: the graph has no input of that name.
    """
    inputs = placeholders(graph_module)
    wanted = TIMESTEP_NAMES if name is None else (name,)
    found = [node for node in inputs if node.target in wanted or node.name in wanted]
    if name is not None and not found:
        names = ", ".join(repr(node.name) for node in inputs)
        raise ArgumentError(f"timestep_input is {name!r}, but the graph's inputs are {names}; give one of these names")
    return found[0] if found else None
