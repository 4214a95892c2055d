"""The paper's form of the adaLN fold: ``c + (W x + bias)`` divided by b is ``c + (W/b x + (bias + c)/b - c)``.

The bias must become ``(bias + c)/b - c``. Storing ``bias/b`` instead is a common bug.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from ptq4dit_ao.errors import BalanceError
from ptq4dit_ao.graph.names import is_linear, weight_path
from ptq4dit_ao.graph.propagation import op_name
from ptq4dit_ao.graph.rules import IGNORED
from ptq4dit_ao.graph.rules.movement import COPIES, MOVEMENT
from ptq4dit_ao.graph.shapes import example_shape, example_size


def bias_shift(add: Node, index: int, scale: Tensor) -> tuple[str, Tensor]:
    """The term to add to the bias behind ``add`` once its linear's rows are divided by b; exactly 0 where b is 1.

    For ``k y + c`` with a linear's rearranged output y, the term is ``(c/b - c) / k``.

    Args:
        add: an add or sub of a number.
        index: the number's position in the op's arguments.
        scale: b, broadcastable to the add's shape, float64.

    Returns:
        The bias's attribute path and the term, (C_out,) float64.

    Raises:
        BalanceError: the other operand is not a rearrangement of one linear's output with a bias of its own.
    """
    constant, operand = add.args[index], add.args[1 - index]
    if not isinstance(constant, (int, float)):
        raise BalanceError(f"{add.name}: its number is a tensor already; use fold_form 'constant'")
    assert isinstance(operand, Node)
    chain = _chain_to_linear(add, operand)
    linear = chain[0]
    bias = linear.args[2] if len(linear.args) > 2 else None
    if not isinstance(bias, Node):
        raise BalanceError(f"{weight_path(linear)} has no bias to fold into; use fold_form 'constant'")
    readers = [
        user for node in add.graph.nodes if node.op == "get_attr" and node.target == bias.target for user in node.users
    ]
    if readers != [linear]:
        raise BalanceError(f"{bias.target} is used {len(readers)} times; use fold_form 'constant'")
    number, weight = _terms(add, index)
    size = example_shape(linear)
    rows = replay(chain[1:], linear, torch.arange(size[-1]).expand(size).contiguous())
    shift = torch.zeros(size[-1], dtype=torch.float64)
    shift[rows.reshape(-1)] = ((number / scale - number) / weight).expand(rows.shape).reshape(-1)
    return str(bias.target), shift


def _terms(add: Node, index: int) -> tuple[float, float]:
    """``(c, k)`` of ``k y + c``, for ``a + alpha b`` and ``a - alpha b``."""
    alpha = add.args[2] if len(add.args) > 2 else add.kwargs.get("alpha", 1)
    constant = add.args[index]
    assert isinstance(alpha, (int, float)) and isinstance(constant, (int, float))
    second = alpha if "add" in op_name(add) else -alpha
    return (constant * second, 1.0) if index == 1 else (constant, second)


def _chain_to_linear(add: Node, operand: Node) -> list[Node]:
    """The nodes from a linear (the first) to ``add``; each node is read by the next one only."""
    chain, reader = [operand], add
    while True:
        node = chain[0]
        others = [user for user in node.users if user is not reader and user.target not in IGNORED]
        if is_linear(node) and not others:
            return chain
        if node.target not in MOVEMENT or (others and not splits(node)):
            raise BalanceError(
                f"{add.name}: its modulation comes through {node.name} ({node.target}), which the bias form cannot "
                "follow; use fold_form 'constant'"
            )
        source = node.args[0]
        assert isinstance(source, Node)
        chain.insert(0, source)
        reader = node


def splits(node: Node) -> bool:
    """Whether the node returns parts, each of which has its own readers."""
    return isinstance(node.meta["val"], (list, tuple))


def replay(chain: list[Node], source: Node, value: Tensor) -> Tensor:
    """Run a chain of movement ops on ``value`` in place of ``source``; symbolic sizes become their hints.

    Each node of the chain reads the one before it. For an op that is no movement, such as a sum, the value is expanded
    to the op's shape.
    """
    values: dict[Node, object] = {source: value}
    for before, node in pairwise([source, *chain]):
        if node.target in COPIES:  # indices would not survive a cast
            values[node] = values[before]
            continue
        if node.target not in MOVEMENT:
            values[node] = values[before].expand(example_shape(node))  # type: ignore[attr-defined]
            continue
        args = tree_map(
            lambda a: values[a] if a in values else example_size(a) if isinstance(a, Node) else a, node.args
        )
        values[node] = node.target(*args)  # type: ignore[operator]
    result = values[chain[-1]] if chain else value
    assert isinstance(result, Tensor)
    return result
