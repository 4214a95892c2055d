"""Attention in a graph: search for its two matrix products, and decomposition of a fused op into them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.rules.movement import MOVEMENT
from ptq4dit_ao.graph.shapes import normalize_axis, tensor_of

aten = torch.ops.aten

FUSED = aten.scaled_dot_product_attention.default
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})

_AFTER = MOVEMENT | {aten.dropout.default}
"""Ops that are allowed between a softmax and the product with v."""

_BEFORE = MOVEMENT | {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar),
    *(aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
}
"""Ops that are allowed between the product of q and k and the softmax, which apply the scale and the mask."""


@dataclass(frozen=True)
class Attention:
    """The nodes of one ``softmax(q k^T) v``, with any number of axes before the last two."""

    scores: Node
    """The product of q and k^T."""
    softmax: Node
    mixed: Node
    """The product of the probabilities and v."""

    @property
    def name(self) -> str:
        """Name of its module, such as ``transformer_blocks.0.attn1``; else of its first node."""
        return module_of(self.scores) or self.scores.name

    @property
    def operands(self) -> dict[str, tuple[Node, Node]]:
        """Operands of the products by name (q, k, probabilities, v): the tensor, and the product that reads it."""
        return {
            name: (_operand(product, index), product)
            for name, product, index in (
                ("q", self.scores, 0),
                ("k", self.scores, 1),
                ("probabilities", self.mixed, 0),
                ("v", self.mixed, 1),
            )
        }


def find_attention(graph_module: GraphModule) -> list[Attention]:
    """Every attention of a graph that is a product, a softmax and a product, in execution order; fused ops are not."""
    found = []
    for mixed in graph_module.graph.nodes:
        if mixed.target not in PRODUCTS:
            continue
        softmax = _source(_operand(mixed, 0), SOFTMAX, _AFTER)
        if softmax is None or not _over_last_axis(softmax):
            continue
        scores = _source(_operand(softmax, 0), PRODUCTS, _BEFORE)
        if scores is not None:
            found.append(Attention(scores, softmax, mixed))
    return found


def decompose_attention(graph_module: GraphModule) -> int:
    """Replace fused attention by matmul, softmax, matmul, in place; return the number of replacements.

    Symbolic sizes stay symbolic.

    Raises:
        ArgumentError: an attention has dropout.
    """
    graph = graph_module.graph
    fused = graph.find_nodes(op="call_function", target=FUSED)
    for node in fused:
        with graph.inserting_before(node):
            mixed = _Decomposition(node).mixed()
        node.replace_all_uses_with(mixed)
        graph.erase_node(node)
    if fused:
        graph_module.recompile()
    return len(fused)


def module_of(node: Node) -> str | None:
    """Path of the module that a node was captured in; None if the graph does not have it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] or None if stack else None


class _Decomposition:
    """Decomposition of ``scaled_dot_product_attention`` of q (..., L, E), k (..., S, E) and v (..., S, D)."""

    def __init__(self, node: Node) -> None:
        names = [argument.name for argument in FUSED._schema.arguments]
        arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        self.node = node
        self.q, self.k, self.v = (arguments[name] for name in ("query", "key", "value"))
        self.mask, self.causal = arguments.get("attn_mask"), arguments.get("is_causal", False)
        self.scale = arguments.get("scale")
        self.grouped = arguments.get("enable_gqa", False)
        if arguments.get("dropout_p", 0.0):
            raise ArgumentError(
                f"attention {module_of(node) or node.name!r} has dropout {arguments['dropout_p']}, which cannot be "
                "quantized; call model.eval() before it is exported"
            )

    def mixed(self) -> Node:
        """Insert the decomposed attention and return its last node, the product of the probabilities and v."""
        k, v = (self._repeated(x) for x in (self.k, self.v))
        channels = _shape(self.q)[-1]
        scale = 1 / math.sqrt(channels) if self.scale is None else self.scale
        q = self._call(aten.mul.Tensor, (self.q, scale), _shape(self.q))
        *heads, keys, _ = _shape(k)
        k = self._call(aten.transpose.int, (k, -2, -1), (*heads, channels, keys))
        shape = (*_shape(self.node)[:-1], keys)
        scores = self._masked(self._call(aten.matmul.default, (q, k), shape), shape)
        # A mask may exclude every key of a query. The safe softmax gives probabilities of 0 then, not NaN.
        softmax = aten.softmax.int if self.mask is None else aten._safe_softmax.default
        probabilities = self._call(softmax, (scores, -1), shape)
        return self._call(aten.matmul.default, (probabilities, v), _shape(self.node))

    def _repeated(self, x: Node) -> Node:
        """Keys or values with their heads repeated to the number of query heads (grouped-query attention)."""
        groups = 1 if not self.grouped else _shape(self.q)[-3] // _shape(x)[-3]
        if groups == 1:
            return x
        *rows, heads, length, channels = _shape(x)
        shape = (*rows, groups * heads, length, channels)
        return self._call(aten.repeat_interleave.self_int, (x, groups, -3), shape)

    def _masked(self, scores: Node, shape: Sequence[Any]) -> Node:
        mask = self.mask
        if self.causal:
            ones = self._call(aten.ones_like.default, (scores,), shape, dtype=torch.bool)
            mask = self._call(aten.tril.default, (ones,), shape, torch.bool)
        if mask is None:
            return scores
        if mask.meta["val"].dtype == torch.bool:
            return self._call(aten.where.ScalarOther, (mask, scores, -math.inf), shape)
        return self._call(aten.add.Tensor, (scores, mask), shape)

    def _call(
        self, target: Any, args: tuple[Any, ...], shape: Sequence[Any], like: torch.dtype | None = None, **kwargs: Any
    ) -> Node:
        node = self.node.graph.call_function(target, args, kwargs)
        node.meta = {key: value for key, value in self.node.meta.items() if key in ("nn_module_stack", "stack_trace")}
        example = self.node.meta["val"]
        # The shape is computed from existing sizes, because running the op on fake tensors would add guards to them.
        with example.fake_mode:
            node.meta["val"] = example.new_empty(tuple(shape), dtype=like or kwargs.get("dtype"))
        return node


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def _operand(node: Node, index: int) -> Node:
    operand = node.args[index]
    assert isinstance(operand, Node)
    return operand


def _source(node: Node, targets: Collection[object], through: Collection[object]) -> Node | None:
    """The nearest node with one of these targets that reaches this node through ops in ``through`` only."""
    queue, seen = [node], {node}
    for one in queue:
        if one.target in targets:
            return one
        if one.target in through:
            new = [source for source in one.all_input_nodes if source not in seen]
            seen.update(new)
            queue += new
    return None


def _over_last_axis(softmax: Node) -> bool:
    value, axis = tensor_of(softmax), softmax.args[1]
    assert value is not None and isinstance(axis, int)
    return normalize_axis(axis, value.ndim) == value.ndim - 1
