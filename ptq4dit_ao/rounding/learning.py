"""What learns beside the roundings: ranges of activations; and a part of the quantized network that gradients pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.graph.names import get_attribute, set_tensor, writes_in_place
from ptq4dit_ao.observers import ActivationObserver
from ptq4dit_ao.rounding.layers import module_of
from ptq4dit_ao.rounding.streams import Instead, Values, copied, quantized_network, run_node

INSIDE = 0.49
"""A place that far from an integer is still nearest to it."""


class LearnedRange(nn.Module):
    """An activation's quantizer whose step is learned, its zero point kept (LSQ, Esser et al. 2020)."""

    def __init__(self, observer: ActivationObserver) -> None:
        super().__init__()
        scale, zero_point = observer.qparams()
        self.observer, self.spec, self.zero_point = observer, observer.spec, int(zero_point)
        self.log_scale = nn.Parameter(scale.log())

    def scale(self) -> Tensor:
        """(), no smaller than the quantizer has it."""
        return self.log_scale.exp().clamp_min(self.spec.eps)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()
        q = x / scale
        q = (q + (q.round() - q).detach() + self.zero_point).clamp(self.spec.quant_min, self.spec.quant_max)
        return (q - self.zero_point) * scale

    def harden(self) -> None:
        """Leave the range in the observer."""
        scale = float(self.scale())
        if self.spec.symmetric:  # the scale is that of half of all levels
            half = scale * (self.spec.quant_max - self.spec.quant_min) / 2
            self.observer.chosen_range = -half, half
        else:
            low, high = (scale * (bound - self.zero_point) for bound in (self.spec.quant_min, self.spec.quant_max))
            self.observer.chosen_range = low, high


class Run:
    """A part of the quantized network, with modules that learn in the place of some of its nodes.

    Args:
        prepared: the graph.
        nodes: of the part, in order.
        outputs: of these, what the part puts out.
        linears: what some linears do instead of what they do.
        ranges: observers whose range learns, wherever they stand; all others keep theirs.
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
            if isinstance(observer, ActivationObserver):  # rounding as such would let no gradient through
                self._instead[node] = ranges.get(observer) or LearnedRange(observer).requires_grad_(False)

    def __call__(self, inputs: Values) -> Values:
        """What the part puts out."""
        values = {node: copied(value) for node, value in inputs.items()} if self._in_place else dict(inputs)
        for node in self._nodes:
            values[node] = run_node(self._interpreter, node, values.__getitem__, self._instead)
        return {node: values[node] for node in self._outputs}

    def error(self, inputs: Values, targets: Values) -> Tensor:
        """Square error of what the part puts out, summed over the last axis and all outputs, mean over the rest."""
        outputs = self(inputs)
        pairs = zip(*(tree_leaves([values[node] for node in outputs]) for values in (outputs, targets)), strict=True)
        errors = [(x - y).float().square().sum(-1).mean() for x, y in pairs if _is_floating(y)]
        return torch.stack(errors).sum()


def learnable(prepared: GraphModule, batches: Iterable[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """The batches, with copies in the place of what inference mode has made; so, too, in the graph.

    Gradients pass no tensor that was made there.
    """
    for node in prepared.graph.find_nodes(op="get_attr"):
        tensor = get_attribute(prepared, str(node.target))
        if isinstance(tensor, Tensor) and tensor.is_inference():
            set_tensor(prepared, str(node.target), tensor.clone())
    return [tuple(x.clone() if x.is_inference() else x for x in batch) for batch in batches]


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
