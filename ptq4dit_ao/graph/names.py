"""Names in exported graphs: attributes, layers, inputs."""

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
"""What PEFT calls a layer inside of the adapter that takes its place."""

CONSTANT = "_constant"
"""Ends the name of a weight that was computed from parameters."""


def get_attribute(module: nn.Module, path: str) -> Any:
    """The object at a dotted path."""
    owner: Any = module
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def set_tensor(module: nn.Module, path: str, value: Tensor) -> None:
    """Put a new tensor at a dotted path, as what the old one was (parameter or buffer); never writes into it.

    ``ep.module()`` shares storage with the user's model, so parameters are replaced, not changed.
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
    """A linear whose weight is a parameter or buffer of the model."""
    return node.op == "call_function" and node.target is LINEAR and _weight_node(node) is not None


def linears(graph_module: GraphModule) -> list[Node]:
    """Every linear with a weight of its own, in execution order."""
    return [node for node in graph_module.graph.nodes if is_linear(node)]


def weight_path(node: Node) -> str:
    """Attribute path of a linear's weight, looking through observers and quantize/dequantize nodes."""
    weight = _weight_node(node)
    assert weight is not None, f"{node.name} has no weight attribute"
    return str(weight.target)


def layer_name(node: Node) -> str:
    """The module name of a linear, such as ``transformer_blocks.0.attn1.to_q``; also of one that an adapter wraps."""
    return unwrapped(weight_path(node).rstrip("_").removesuffix(CONSTANT).removesuffix(".weight"))


def unwrapped(path: str) -> str:
    """The name that a layer has without the adapter around it."""
    return ".".join(name for name in path.split(".") if name != WRAPPED)


def adapters(graph_module: GraphModule) -> set[Node]:
    """The linears of adapters that were not fused (LoRA): they stand beside the one that the adapter wraps."""
    paths = {node: weight_path(node) for node in linears(graph_module)}
    wraps = {path.partition(f".{WRAPPED}.")[0] for path in paths.values() if f".{WRAPPED}." in path}
    return {
        node
        for node, path in paths.items()
        if f".{WRAPPED}." not in path and any(path.startswith(f"{layer}.") for layer in wraps)
    }


def joint_name(layers: Iterable[str]) -> str:
    """``blocks.0.attn.{to_q,to_k,to_v}``: the common module path and what differs; without adapters' own linears."""
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
    """Does any node change a tensor that it reads?"""
    targets = (node.target for node in graph_module.graph.nodes)
    return any(isinstance(target, OpOverload) and target._schema.is_mutable for target in targets)


def placeholders(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


TIMESTEP_NAMES = ("timestep", "timesteps", "t")


def timestep_placeholder(graph_module: GraphModule, name: str | None = None) -> Node | None:
    """The graph input that holds the timestep; without a name, one that is called like it, if there is one.

    Raises:
        ArgumentError: the graph has no input of that name.
    """
    inputs = placeholders(graph_module)
    wanted = TIMESTEP_NAMES if name is None else (name,)
    found = [node for node in inputs if node.target in wanted or node.name in wanted]
    if name is not None and not found:
        names = ", ".join(repr(node.name) for node in inputs)
        raise ArgumentError(f"timestep_input is {name!r}, but the graph's inputs are {names}")
    return found[0] if found else None
