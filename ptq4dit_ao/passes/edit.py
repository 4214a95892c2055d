"""Small edits of graphs and of their tensors, which are computed in float64 and stored in the tensor's own dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4dit_ao.graph.names import set_tensor
from ptq4dit_ao.graph.pending import pending, scale_later, set_pending, tensor_at
from ptq4dit_ao.graph.variables import Ids


class Snapshot:
    """The current state of a graph and its tensors. Balancing replaces tensors, so references to them are enough."""

    def __init__(self, model: GraphModule) -> None:
        self._nodes = {node: (node.target, node.args, node.kwargs) for node in model.graph.nodes}
        self._factors = {path: list(factors) for path, factors in pending(model).items()}
        self._tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

    def restore(self, model: GraphModule) -> None:
        """Restore the state exactly and in place, node by node, so that iterators over the graph stay valid."""
        for node, (target, args, kwargs) in self._nodes.items():
            node.target, node.args, node.kwargs = target, args, kwargs
        for node in reversed(list(model.graph.nodes)):
            if node not in self._nodes:
                model.graph.erase_node(node)
        for name in dict(model.named_buffers()).keys() - self._tensors.keys():
            delattr(model, name)
        for name, tensor in self._tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(tensor, nn.Parameter):
                module._parameters[leaf] = tensor
            else:
                module._buffers[leaf] = tensor
        set_pending(model, self._factors)
        model.recompile()


def scale_of(b: Tensor, variables: Ids | Sequence[int]) -> Tensor:
    """Scale of every element, float64: ``b[v - 1]`` for a variable v >= 1, and 1 for variable 0."""
    padded = torch.cat([torch.ones(1, dtype=torch.float64), b.detach().to("cpu", torch.float64)])
    return padded[torch.from_numpy(np.asarray(variables, dtype=np.int64))]


def replace_tensor(model: GraphModule, paths: Sequence[str], change: Callable[[Tensor], Tensor]) -> None:
    """Replace a tensor and its aliases by ``change(tensor)``; the old tensor, which may be shared, is not modified."""
    old = tensor_at(model, paths[0]).detach()
    new = change(old.to(torch.float64).cpu()).to(old.device, old.dtype)
    for path in paths:
        set_tensor(model, path, new)
        pending(model).pop(path, None)


def scale_tensor(model: GraphModule, paths: Sequence[str], factor: Tensor) -> None:
    """Multiply a tensor and its aliases by a factor that broadcasts to it, now or (pending) when it is read."""
    if not scale_later(model, paths, factor):
        replace_tensor(model, paths, lambda tensor: tensor * factor)


def add_constant(model: GraphModule, name: str, value: Tensor, *, like: Node) -> Node:
    """Add a buffer with the dtype and device of node ``like``; return the node that reads it at the insertion point."""
    example = like.meta["val"]
    path = next(path for i in itertools.count() if not hasattr(model, path := f"_ptq4dit_{name}_{i}"))
    tensor = value.to(example.device, example.dtype)
    model.register_buffer(path, tensor)
    node = model.graph.get_attr(path)
    # Annotators and propagation read shapes from here.
    node.meta["val"] = example.fake_mode.from_tensor(tensor, static_shapes=True)
    return node
