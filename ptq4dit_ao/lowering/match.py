"""Patterns that find quantized operations in a converted graph.

Linears are ``linear(dq(q(x)), dq(int weight), bias)``, or ``linear(x, dq(int weight), bias)`` if the input stays float.
Where tokens have ranges of their own, ops on rows stand before and after a linear
(:mod:`ptq4dit_ao.observers.per_token`), which no backend needs to know. Products of attention are
``matmul(dq(q(x)), dq(q(y)))``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  (registers the ops)
from torch.fx import GraphModule, Node

from ptq4dit_ao.core.expansion import EXPANDED_BITS, Expansion
from ptq4dit_ao.graph.attention import PRODUCTS
from ptq4dit_ao.graph.expansions import expansions
from ptq4dit_ao.graph.names import LINEAR, calls, get_attribute
from ptq4dit_ao.observers.per_token import PerToken, per_token

aten, quantized = torch.ops.aten, torch.ops.quantized_decomposed
_QUANTIZE = quantized.quantize_per_tensor.default
_DEQUANTIZE = quantized.dequantize_per_tensor.default
_DEQUANTIZE_WEIGHT = quantized.dequantize_per_channel.default


@dataclass(frozen=True, kw_only=True)
class IntegerLinear:
    """One linear of a converted graph whose weight consists of integers, and whose input may be float.

    Tensors are read from the graph on access. A backend that removes each one when it has been packed thus never holds
    two copies of all weights.
    """

    graph: GraphModule
    node: Node
    x: Node
    """The float activation of the layer."""
    dequantize_weight: Node
    weight_range: tuple[int, int]
    bias_node: Node | None
    dtype: torch.dtype
    """Dtype of the float model around the linear."""
    per_token: PerToken | None = None
    """Nodes around the linear if its input is quantized per token, else None. The linear itself has no bias then."""

    @property
    def name(self) -> str:
        """Name of the linear's node."""
        return self.node.name

    @property
    def weight(self) -> Tensor:
        """Integer weight, (C_out, C_in) int8."""
        return self._constant(self.dequantize_weight.args[0])

    @property
    def weight_scale(self) -> Tensor:
        """Scale of the weight, (C_out,)."""
        return self._constant(self.dequantize_weight.args[1])

    @property
    def weight_zero_point(self) -> Tensor:
        """Zero point of the weight, (C_out,)."""
        return self._constant(self.dequantize_weight.args[2])

    @property
    def expansion(self) -> Expansion | None:
        """Rule by which the weight expands from 4 bits; None if it does not."""
        weight = self.dequantize_weight.args[0]
        assert isinstance(weight, Node)
        return expansions(self.graph).get(str(weight.target))

    @property
    def weight_bits(self) -> int:
        """Bits of an element of the weight, without what a row or group shares."""
        low, high = self.weight_range
        return (high - low).bit_length() if self.expansion is None else EXPANDED_BITS

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk of an element of the weight on average, with its part of scales and steps."""
        rows, columns = self.weight.shape
        if self.expansion is not None:
            return self.expansion.bits_per_weight(rows, columns)
        return (4 if self.weight_bits <= 4 else 8) + 8 * 4 / columns

    @property
    def bias(self) -> Tensor | None:
        """Float bias of the linear, (C_out,), or None."""
        return None if self.bias_node is None else self._constant(self.bias_node)

    @property
    def layer_bias(self) -> Tensor | None:
        """Float bias of the layer, (C_out,), or None. Behind tokens with ranges of their own it is added later."""
        node = self.bias_node if self.per_token is None else self.per_token.bias
        return None if node is None else self._constant(node)

    def replace_by(self, node: Node) -> None:
        """Put ``node`` in the linear's place, and remove the nodes and tensors that nothing reads any more."""
        self.node.replace_all_uses_with(node)
        graph = self.node.graph
        unread = [self.node]
        while unread:
            gone = unread.pop()
            sources = gone.all_input_nodes  # each once
            graph.erase_node(gone)
            if gone.op == "get_attr" and not graph.find_nodes(op="get_attr", target=gone.target):
                _delete(self.graph, str(gone.target))
            unread += [source for source in sources if not source.users and source.op != "placeholder"]

    def _constant(self, node: object) -> Tensor:
        assert isinstance(node, Node)
        return get_attribute(self.graph, str(node.target)).detach()


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear(IntegerLinear):
    """One linear whose input is quantized, too, with everything that an integer kernel needs."""

    quantize: Node
    """The activation's quantize node. Linears that read the same tensor may share it."""
    x_scale: float
    x_zero_point: int
    x_range: tuple[int, int]
    x_dtype: torch.dtype


def integer_linears(graph_module: GraphModule) -> list[IntegerLinear]:
    """Every linear whose weight consists of integers, with a quantized input or a float one, in execution order."""
    found: list[IntegerLinear] = []
    for node in _linears(graph_module):
        linear: IntegerLinear | None = _match(graph_module, node)
        if linear is None and not calls(node.args[0], _DEQUANTIZE):
            linear = _match_weight(graph_module, node)
        if linear is not None:
            found.append(linear)
    return found


def weight_only_linears(graph_module: GraphModule) -> list[IntegerLinear]:
    """Every linear of a float input whose weight consists of integers, in execution order."""
    return [linear for linear in integer_linears(graph_module) if not isinstance(linear, QuantizedLinear)]


def quantized_linears(graph_module: GraphModule) -> list[QuantizedLinear]:
    """Every linear whose input and weight come from dequantize nodes, in execution order."""
    found = (_match(graph_module, node) for node in _linears(graph_module))
    return [linear for linear in found if linear is not None]


def float_linears(graph_module: GraphModule) -> list[Node]:
    """Every linear whose input and weight are float."""
    matched = {linear.node for linear in integer_linears(graph_module)}
    return [node for node in _linears(graph_module) if node not in matched]


def unread_linears(graph_module: GraphModule) -> list[Node]:
    """Linears with a quantized input whose weight is in a form that no backend reads."""
    return [node for node in float_linears(graph_module) if calls(node.args[0], _DEQUANTIZE)]


def quantized_products(graph_module: GraphModule) -> list[Node]:
    """Every product of two quantized activations, as in attention, in execution order."""
    return [
        node
        for node in graph_module.graph.nodes
        if node.target in PRODUCTS and all(calls(factor, _DEQUANTIZE) for factor in node.args[:2])
    ]


def is_quantizer(node: Node) -> bool:
    """Whether a node quantizes or dequantizes."""
    return node.target in (_QUANTIZE, _DEQUANTIZE, _DEQUANTIZE_WEIGHT)


def quantizers_of(products: Iterable[Node]) -> list[Node]:
    """The quantize nodes of the factors of products, without repeats."""
    factors = (factor.args[0] for product in products for factor in product.all_input_nodes)
    return list(dict.fromkeys(node for node in factors if isinstance(node, Node) and calls(node, _QUANTIZE)))


def widen(quantizers: Iterable[Node]) -> None:
    """Make activations of fewer than 8 bits use the full range of their dtype, clamped to their own range before.

    It is for runtimes that know no other range than that of the dtype.
    """
    for quantize in quantizers:
        arguments: tuple[Any, ...] = quantize.args
        x, scale, zero_point, low, high, dtype = arguments
        full = torch.iinfo(dtype)
        if (low, high) == (full.min, full.max):
            continue
        with quantize.graph.inserting_before(quantize):
            bounds = ((bound - zero_point) * scale for bound in (low, high))
            clamped = quantize.graph.call_function(aten.clamp.default, (x, *bounds))
        for node in (quantize, *quantize.users):
            node.args = (node.args[0], scale, zero_point, full.min, full.max, dtype)
        quantize.update_arg(0, clamped)


def make_unsigned(quantizers: Iterable[Node]) -> None:
    """Turn int8 activations into uint8 ones with the same values: the zero point is moved up by 128.

    Inductor fuses a linear whose output is quantized to int8 and whose input to uint8, and then takes the output for
    uint8.
    """
    for quantize in quantizers:
        for node in (quantize, *quantize.users) if quantize.args[5] == torch.int8 else ():
            arguments: tuple[Any, ...] = node.args
            x, scale, *bounds, _ = arguments
            node.args = (x, scale, *(bound + 128 for bound in bounds), torch.uint8)


def _match(graph_module: GraphModule, node: Node) -> QuantizedLinear | None:
    # fx types arguments as Any, so the checks below verify the types.
    arguments: tuple[Any, ...] = node.args
    dq_x = arguments[0]
    weight = _match_weight(graph_module, node)
    if weight is None or not calls(dq_x, _DEQUANTIZE) or not calls(q_x := dq_x.args[0], _QUANTIZE):
        return None
    x, scale, zero_point, low, high, dtype = q_x.args
    tokens = per_token(node)
    return QuantizedLinear(
        graph=graph_module,
        node=node,
        quantize=q_x,
        x=x if tokens is None else tokens.x,
        x_scale=scale,
        x_zero_point=zero_point,
        x_range=(low, high),
        x_dtype=dtype,
        dequantize_weight=weight.dequantize_weight,
        weight_range=weight.weight_range,
        bias_node=weight.bias_node,
        dtype=dq_x.kwargs.get("out_dtype") or torch.float32,
        per_token=tokens,
    )


def _match_weight(graph_module: GraphModule, node: Node) -> IntegerLinear | None:
    arguments: tuple[Any, ...] = node.args
    x, dequantize, *rest = arguments
    bias = rest[0] if rest else None
    if not calls(dequantize, _DEQUANTIZE_WEIGHT) or dequantize.args[3] != 0:
        return None
    weight = dequantize.args[0]
    if not (isinstance(weight, Node) and weight.op == "get_attr" and (bias is None or bias.op == "get_attr")):
        return None
    return IntegerLinear(
        graph=graph_module,
        node=node,
        x=x,
        dequantize_weight=dequantize,
        weight_range=(dequantize.args[4], dequantize.args[5]),
        bias_node=bias,
        dtype=dequantize.kwargs.get("out_dtype") or torch.float32,
    )


def _linears(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if node.target is LINEAR]


def _delete(graph_module: GraphModule, path: str) -> None:
    owner, _, name = path.rpartition(".")
    delattr(graph_module.get_submodule(owner), name)
