"""Tensors that a graph refers to, each listed once."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao.errors import ArtifactError

# These nodes compute nothing: they check what the exporter saw, and pin its dtype and device.
_CHECKS = (("call_function", torch.ops.aten._assert_tensor_metadata.default), ("call_module", "_guards_fn"))


def stored_nodes(gm: GraphModule) -> list[Node]:
    """The nodes to store: all except the exporter's checks, and constants that nothing reads.

    Constants without a reader are not rare. If a layer is registered under two names and one is quantized, the float
    weight of the other name is left over.
    """
    checks = {node for node in gm.graph.nodes if (node.op, node.target) in _CHECKS and not node.users}
    unread = {node for node in gm.graph.nodes if node.op == "get_attr" and checks.issuperset(node.users)}
    return [node for node in gm.graph.nodes if node not in checks and node not in unread]


def graph_tensors(gm: GraphModule) -> dict[str, Tensor]:
    """Target of a get_attr node -> detached tensor. Of several targets that are one tensor, only the first is listed.

    Raises:
        ArtifactError: a target is not a plain dense tensor.
    """
    aliases = tensor_aliases(gm)
    return {name: tensor.detach() for name, tensor in _targets(gm) if name not in aliases}


def tensor_aliases(gm: GraphModule) -> dict[str, str]:
    """Tied target of a get_attr node -> the first target that is the same tensor."""
    first: dict[tuple[object, ...], str] = {}
    owners = {name: first.setdefault(_identity(name, tensor), name) for name, tensor in _targets(gm)}
    return {name: owner for name, owner in owners.items() if name != owner}


def parameter_names(gm: GraphModule) -> list[str]:
    """Names in ``graph_tensors`` of parameters. The other tensors are buffers."""
    aliases = tensor_aliases(gm)
    return [n for n, tensor in _targets(gm) if isinstance(tensor, torch.nn.Parameter) and n not in aliases]


def _targets(gm: GraphModule) -> Iterator[tuple[str, Tensor]]:
    names = dict.fromkeys(str(node.target) for node in stored_nodes(gm) if node.op == "get_attr")
    for name in names:
        yield name, _dense(name, operator.attrgetter(name)(gm))


def _dense(name: str, value: object) -> Tensor:
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise ArtifactError(
            f"{name!r} is a {type(value).__qualname__}, a stored graph refers to plain tensors only; export the model "
            f"without control flow, tensor subclasses and no_grad blocks"
        )
    assert isinstance(value, Tensor)
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise ArtifactError(
            f"tensor {name!r} ({value.dtype}, {value.layout}, on {value.device}) has no dense values to store; load "
            f"the weights, and make it dense, before saving"
        )
    return value


def _identity(name: str, tensor: Tensor) -> tuple[object, ...]:
    # Empty tensors all have address 0 without being tied.
    address = tensor.data_ptr() if tensor.numel() else name
    return address, tensor.device, tensor.dtype, tensor.shape, tensor.stride()
