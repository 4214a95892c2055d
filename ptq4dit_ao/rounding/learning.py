"""What learns beside the roundings: ranges of activations; and a part of the quantized network that gradients pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from ptq4dit_ao.graph.names import writes_in_place
from ptq4dit_ao.observers import ActivationObserver
from ptq4dit_ao.rounding.blocks import Block
from ptq4dit_ao.rounding.layers import module_of
from ptq4dit_ao.rounding.streams import Instead, Values, copied, quantized_network, run_node


class LearnedRange(nn.Module):
    """An activation's quantizer whose step is learned, its zero point kept (LSQ, Esser et al. 2020)."""

    def __init__(self, observer: ActivationObserver) -> None:
        super().__init__()
        scale, zero_point = observer.qparams()
        self.observer, self.spec, self.zero_point = observer, observer.spec, int(zero_point)
        self.log_scale = nn.Parameter(scale.log())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        q = x / scale
        q = (q + (q.round() - q).detach() + self.zero_point).clamp(self.spec.quant_min, self.spec.quant_max)
        return (q - self.zero_point) * scale

    def harden(self) -> None:
        """Leave the range in the observer."""
        scale = float(self.log_scale.exp())
        if self.spec.symmetric:  # the scale is that of half of all levels
            half = scale * (self.spec.quant_max - self.spec.quant_min) / 2
            self.observer.clipped = -half, half
        else:
            low, high = (scale * (bound - self.zero_point) for bound in (self.spec.quant_min, self.spec.quant_max))
            self.observer.clipped = low, high


class Run:
    """A block of the quantized network, with modules that learn in the place of some of its nodes."""

    def __init__(self, prepared: GraphModule, block: Block, learning: Instead) -> None:
        self._interpreter, self._nodes, self._outputs = Interpreter(prepared), block.nodes, block.outputs()
        observers = {node: module_of(prepared, node) for node in block.nodes}
        fixed: Instead = {
            node: LearnedRange(observer).requires_grad_(False)  # rounding as such would let no gradient through
            for node, observer in observers.items()
            if isinstance(observer, ActivationObserver) and node not in learning
        }
        self._in_place = writes_in_place(prepared)
        others = [node for node in block.nodes if node not in learning]
        self._instead = quantized_network(prepared, others) | fixed | learning

    def __call__(self, inputs: Values) -> Values:
        """What the block puts out."""
        values = {node: copied(value) for node, value in inputs.items()} if self._in_place else dict(inputs)
        for node in self._nodes:
            values[node] = run_node(self._interpreter, node, values.__getitem__, self._instead)
        return {node: values[node] for node in self._outputs}

    def error(self, inputs: Values, targets: Values) -> Tensor:
        """Square error of what the block puts out, summed over the last axis and all outputs, mean over the rest."""
        errors = [(x - targets[n]).float().square().sum(-1).mean() for n, x in self(inputs).items()]
        return torch.stack(errors).sum()
