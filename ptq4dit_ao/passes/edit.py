"""Small edits of graphs and their tensors: computed in float64, stored in the tensor's own dtype."""

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
    """A graph and its tensors as they are now; balancing replaces tensors, so references are enough."""

    def __init__(self, model: GraphModule) -> None:
        self._nodes = {node: (node.target, node.args, node.kwargs) for node in model.graph.nodes}
        self._factors = {path: list(factors) for path, factors in pending(model).items()}
        self._tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

    def restore(self, model: GraphModule) -> None:
        """Bring everything back, exactly, node by node: whoever iterates over the graph may go on."""
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
    """``b`` spread over channels: variables of any shape, 1-based, 0 meaning 1 -> float64 of that shape."""
    padded = torch.cat([torch.ones(1, dtype=torch.float64), b.detach().to("cpu", torch.float64)])
    return padded[torch.from_numpy(np.asarray(variables, dtype=np.int64))]


def replace_tensor(model: GraphModule, paths: Sequence[str], change: Callable[[Tensor], Tensor]) -> None:
    """Put ``change(tensor)`` where a tensor (and its aliases) stood; the old tensor, perhaps shared, is untouched."""
    old = tensor_at(model, paths[0]).detach()
    new = change(old.to(torch.float64).cpu()).to(old.device, old.dtype)
    for path in paths:
        set_tensor(model, path, new)
        pending(model).pop(path, None)


def scale_tensor(model: GraphModule, paths: Sequence[str], factor: Tensor) -> None:
    """Multiply a tensor (and its aliases) by a factor that broadcasts to it; at once, or when it is read."""
    if not scale_later(model, paths, factor):
        replace_tensor(model, paths, lambda tensor: tensor * factor)


def add_constant(model: GraphModule, name: str, value: Tensor, *, like: Node) -> Node:
    """A buffer of the dtype and device of node ``like``, read at the graph's insertion point."""
    example = like.meta["val"]
    path = next(path for i in itertools.count() if not hasattr(model, path := f"_ptq4dit_{name}_{i}"))
    tensor = value.to(example.device, example.dtype)
    model.register_buffer(path, tensor)
    node = model.graph.get_attr(path)
    # Annotators and propagation read shapes from here.
    node.meta["val"] = example.fake_mode.from_tensor(tensor, static_shapes=True)
    return node
