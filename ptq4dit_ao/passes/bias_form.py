"""The paper's form of the adaLN fold: ``c + (W x + bias)`` scaled by 1/b is ``c + (W/b x + (bias + c)/b - c)``.

Forgetting the ``(c + ...) - c`` is the classic bug.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from ptq4dit_ao.errors import BalanceError
from ptq4dit_ao.graph.names import is_linear, weight_path
from ptq4dit_ao.graph.rules import IGNORED
from ptq4dit_ao.graph.rules.movement import MOVEMENT
from ptq4dit_ao.graph.shapes import hint, shape_of
from ptq4dit_ao.passes.edit import replace_tensor


def shift_bias(model: GraphModule, add: Node, index: int, scale: Tensor) -> None:
    """Add ``c/b - c`` to the bias behind ``add``, whose linear's rows have been divided by b: exact where b is 1.

    Args:
        model: its bias is replaced.
        add: ``c + modulation``, the number c at position ``index``.
        scale: b, broadcastable to the add's shape, float64.

    Raises:
        BalanceError: the other summand is not a rearrangement of one linear's output with a bias, or is read twice.
    """
    constant, operand = add.args[index], add.args[1 - index]
    assert isinstance(constant, (int, float)) and isinstance(operand, Node)
    chain = _chain_to_linear(add, operand)
    linear = chain[0]
    bias = linear.args[2] if len(linear.args) > 2 else None
    if not isinstance(bias, Node):
        raise BalanceError(f"{weight_path(linear)} has no bias to fold into; use fold_form 'constant'")
    size = shape_of(linear)
    channels = torch.arange(size[-1]).expand(size)
    rows = _replay(chain[1:], linear, channels)
    shift = torch.zeros(size[-1], dtype=torch.float64)
    shift[rows.reshape(-1)] = (constant / scale - constant).expand(rows.shape).reshape(-1)
    replace_tensor(model, (str(bias.target),), lambda p: p + shift)


def _chain_to_linear(add: Node, operand: Node) -> list[Node]:
    """The nodes from a linear to ``add``, the linear first; every one of them read by the next only."""
    chain, reader = [operand], add
    while True:
        node = chain[0]
        others = [user for user in node.users if user is not reader and user.target not in IGNORED]
        if is_linear(node) and not others:
            return chain
        if node.target not in MOVEMENT or (others and not _splits(node)):
            raise BalanceError(
                f"{add.name}: its modulation comes through {node.name} ({node.target}), which the bias form cannot "
                "follow; use fold_form 'constant'"
            )
        source = node.args[0]
        assert isinstance(source, Node)
        chain.insert(0, source)
        reader = node


def _splits(node: Node) -> bool:
    """Does the node return parts, each of which has its own readers?"""
    return isinstance(node.meta["val"], (list, tuple))


def _replay(chain: list[Node], source: Node, value: Tensor) -> Tensor:
    """Run movement ops on ``value`` in place of ``source``, symbolic sizes by their hints."""
    values: dict[Node, object] = {source: value}
    for node in chain:
        args = tree_map(lambda a: values[a] if a in values else hint(a) if isinstance(a, Node) else a, node.args)
        values[node] = node.target(*args)  # type: ignore[operator]
    result = values[chain[-1]] if chain else value
    assert isinstance(result, Tensor)
    return result
