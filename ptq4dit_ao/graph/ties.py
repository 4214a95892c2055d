"""Deduplication of equal tensors, and of computations that become equal by it.

Checkpoints of DiT store the model's single timestep and class embedder once per block: 28 copies of the same
parameters, whose equality torch.export does not detect.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten

from ptq4dit_ao.graph.names import get_attribute, writes_in_place

SMALL = 1024
"""Minimum size in bytes of a tensor that is compared."""


def share_equal_tensors(model: GraphModule) -> int:
    """Make equal tensors of a graph share the path of the first of them, in place; return the bytes saved."""
    first: dict[object, str] = {}
    names: dict[str, str] = {}
    saved = 0
    for node in model.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if path not in names:
            tensor = get_attribute(model, path)
            names[path] = first.setdefault(_contents(tensor), path) if _comparable(tensor) else path
            saved += tensor.nbytes if names[path] != path else 0
        node.target = names[path]
    if saved:
        model.delete_all_unused_submodules()
        model.recompile()
    return saved


def merge_equal_computations(model: GraphModule) -> int:
    """Merge equal computations of a graph, in place; return the number of nodes removed.

    A graph that writes into tensors is not changed, because equal computations may differ after a write.
    """
    graph = model.graph
    if writes_in_place(model):
        return 0
    first: dict[object, Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or _is_random(node):
            continue
        leaves, spec = tree_flatten((node.args, node.kwargs))
        # The key includes the types, as 1 == True == 1.0.
        kept = first.setdefault((node.op, node.target, *leaves, *map(type, leaves), str(spec)), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            merged += 1
    if merged:
        model.recompile()
    return merged


def _is_random(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _comparable(value: object) -> bool:
    return isinstance(value, Tensor) and value.nbytes >= SMALL and not value.is_meta and value.layout == torch.strided


def _contents(tensor: Tensor) -> object:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(data).digest()  # type: ignore[arg-type]
    return digest, tensor.dtype, tensor.shape, tensor.device, isinstance(tensor, torch.nn.Parameter)
