"""Search for the int8 tensors of a graph that hold only 4-bit values."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ptq4dit_ao.artifact.tensors import graph_tensors, stored_nodes, tensor_aliases
from ptq4dit_ao.core.int4 import INT4_MAX, INT4_MIN


def four_bit_tensors(gm: GraphModule) -> set[str]:
    """Names in ``graph_tensors(gm)`` of the int8 tensors that only 4-bit dequantize nodes read."""
    aliases = tensor_aliases(gm)
    narrow: dict[str, bool] = {}
    for node in stored_nodes(gm):
        if node.op == "get_attr":
            name = aliases.get(str(node.target), str(node.target))
            narrow[name] = narrow.get(name, True) and all(_is_four_bit_reader(user, node) for user in node.users)
    tensors = graph_tensors(gm)
    return {name for name, is_narrow in narrow.items() if is_narrow and tensors[name].dtype == torch.int8}


def _is_four_bit_reader(user: Node, tensor: Node) -> bool:
    target = user.target
    if not isinstance(target, OpOverload) or not target._schema.name.startswith("quantized_decomposed::dequantize_"):
        return False
    arguments = _arguments(user, target)
    quant_min, quant_max = arguments.get("quant_min"), arguments.get("quant_max")
    return (
        arguments.pop("input", None) is tensor
        and tensor not in arguments.values()
        and isinstance(quant_min, int)
        and isinstance(quant_max, int)
        and quant_min >= INT4_MIN
        and quant_max <= INT4_MAX
    )


def _arguments(node: Node, target: OpOverload) -> dict[str, Any]:
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
