"""Learned ranges of activations, and differentiable runs of a part of the quantized network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.graph.names import get_attribute, set_tensor, writes_in_place
from ptq4dit_ao.observers import ActivationObserver
from ptq4dit_ao.rounding.layers import module_of
from ptq4dit_ao.rounding.streams import Instead, Values, copied, quantized_network, run_node

INSIDE = 0.49
"""Distance from an integer, in steps, within which a position is still rounded to it."""


class LearnedRange(nn.Module):
    """An activation's quantizer with a learned scale and a fixed zero point (LSQ, Esser et al. 2020)."""

    def __init__(self, observer: ActivationObserver) -> None:
        super().__init__()
        scale, zero_point = observer.qparams()
        self.observer, self.spec, self.zero_point = observer, observer.spec, int(zero_point)
        self.log_scale = nn.Parameter(scale.log())

    def scale(self) -> Tensor:
        """Scale, (), at least the eps of the quantizer."""
        return self.log_scale.exp().clamp_min(self.spec.eps)

    def forward(self, x: Tensor) -> Tensor:
        """The activation quantized and dequantized, with a straight-through gradient."""
        scale = self.scale()
        q = x / scale
        q = (q + (q.round() - q).detach() + self.zero_point).clamp(self.spec.quant_min, self.spec.quant_max)
        return (q - self.zero_point) * scale

    def harden(self) -> None:
        """Store the learned range in the observer."""
        scale = float(self.scale())
        if self.spec.symmetric:  # a symmetric scale is the largest magnitude over half the number of steps
            half = scale * (self.spec.quant_max - self.spec.quant_min) / 2
            self.observer.chosen_range = -half, half
        else:
            low, high = (scale * (bound - self.zero_point) for bound in (self.spec.quant_min, self.spec.quant_max))
            self.observer.chosen_range = low, high


def straight_through(observer: ActivationObserver) -> Callable[[Tensor], Tensor]:
    """The quantizer of an activation whose range is not learned, with a straight-through gradient."""
    if observer.spec.ranged:
        return LearnedRange(observer).requires_grad_(False)
    return lambda x: x + (observer.fake_quantize(x) - x).detach()


class Run:
    """A runnable part of the quantized network, in which learned modules replace some nodes.

    Args:
        prepared: the graph.
        nodes: nodes of the part, in order.
        outputs: nodes among them whose values are the part's outputs.
        linears: functions that replace some linears.
        ranges: learned ranges by observer; the ranges of all other observers are fixed.
    """

    def __init__(
        self,
        prepared: GraphModule,
        nodes: Sequence[Node],
        outputs: Sequence[Node],
        linears: Instead,
        ranges: Mapping[ActivationObserver, LearnedRange],
    ) -> None:
        self._interpreter, self._nodes, self._outputs = Interpreter(prepared), nodes, outputs
        self._in_place = writes_in_place(prepared)
        self._instead = quantized_network(prepared, [node for node in nodes if node not in linears]) | linears
        for node in nodes:
            observer = module_of(prepared, node)
            if isinstance(observer, ActivationObserver):  # plain rounding has no gradient
                self._instead[node] = ranges.get(observer) or straight_through(observer)

    def __call__(self, inputs: Values) -> Values:
        """The part's outputs for the values that it reads."""
        values = {node: copied(value) for node, value in inputs.items()} if self._in_place else dict(inputs)
        for node in self._nodes:
            values[node] = run_node(self._interpreter, node, values.__getitem__, self._instead)
        return {node: values[node] for node in self._outputs}

    def error(self, inputs: Values, targets: Values) -> Tensor:
        """Square error of the part's outputs, summed over outputs and the last axis, averaged over the other axes."""
        outputs = self(inputs)
        pairs = zip(*(tree_leaves([values[node] for node in outputs]) for values in (outputs, targets)), strict=True)
        errors = [(x - y).float().square().sum(-1).mean() for x, y in pairs if _is_floating(y)]
        return torch.stack(errors).sum()


def learnable(prepared: GraphModule, batches: Iterable[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """The batches, with copies in place of inference tensors; such tensors of the graph are replaced as well, in place.

    Autograd does not accept tensors that were created in inference mode.
    """
    for node in prepared.graph.find_nodes(op="get_attr"):
        tensor = get_attribute(prepared, str(node.target))
        if isinstance(tensor, Tensor) and tensor.is_inference():
            set_tensor(prepared, str(node.target), tensor.clone())
    return [tuple(x.clone() if x.is_inference() else x for x in batch) for batch in batches]


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
