"""AdaRound by blocks: all weights of a block learn which way to round, so that its output comes close to the float one.

As in BRECQ (Li et al. 2021, arXiv 2102.05426), whose procedure PTQ4DiT follows: what goes in is the quantized
network's, the target is the float network's, and the steps of the activations are learned, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from ptq4dit_ao.core.adaround import exponent, inverse_rectified_sigmoid, rectified_sigmoid, undecided
from ptq4dit_ao.observers import ActivationObserver, Rounded
from ptq4dit_ao.rounding.blocks import Block
from ptq4dit_ao.rounding.layers import Layer
from ptq4dit_ao.rounding.learning import INSIDE, LearnedRange, Run
from ptq4dit_ao.rounding.settings import RoundingSettings
from ptq4dit_ao.rounding.streams import Values

REGULARIZER = 0.01
"""Weight of the regularizer against the block's square error, summed over channels (BRECQ, Q-Diffusion)."""

NEAR = 0.5
"""How far on the way from GPTQ's integer to the float weight, or to the next integer, learning starts."""

RANGE_RATE = 4e-4
"""Learning rate of the logarithm of an activation's step."""

SEED = 0


def rounding_rate(steps: float) -> float:
    """Learning rate of V: the papers' 1e-3 for their 20,000 steps, so that fewer can lead as far."""
    return min(0.03, 20 / steps)


class Budget:
    """How far a block's learning has come: in steps, or in time where that runs out sooner.

    Args:
        settings: ``steps`` of every block, ``minutes`` for all of them.
        work: of each block; time is shared out accordingly.
    """

    def __init__(self, settings: RoundingSettings, work: Sequence[int]) -> None:
        self._settings = settings
        self._work = list(work)
        self._deadline = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes

    def progress(self, block: int) -> Iterator[float]:
        """Parts of a block's budget that are spent, rising from 0, one for each step that is to be made."""
        start = time.monotonic()
        seconds = float("inf")
        if self._deadline is not None:
            seconds = (self._deadline - start) * self._work[block] / sum(self._work[block:])
        step = 0
        while step < self._settings.steps and (spent := time.monotonic() - start) < seconds:
            yield max(step / self._settings.steps, spent / seconds)
            step += 1


class SoftLinear(nn.Module):
    """A linear whose weight lies between its two nearest roundings."""

    def __init__(self, prepared: GraphModule, layer: Layer, settings: RoundingSettings) -> None:
        super().__init__()
        assert layer.observer.rounded is not None
        self.layer, self.rounded, self.spec = layer, layer.observer.rounded, layer.observer.spec
        self.scale = self.rounded.scale.unsqueeze(1)
        self.bias = layer.bias(prepared) if self.rounded.bias is None else self.rounded.bias
        position = layer.weight(prepared) / self.scale
        if settings.start == "gptq":  # its integers are the nearest to where learning starts
            position = self.rounded.integers + NEAR * (position - self.rounded.integers).clamp(-INSIDE, INSIDE)
        self.floor = position.floor()
        self.v = nn.Parameter(inverse_rectified_sigmoid(position - self.floor))

    def forward(self, x: Tensor) -> Tensor:
        weight = self._integers(self.h()) * self.scale
        return functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def h(self) -> Tensor:
        return rectified_sigmoid(self.v)

    def harden(self) -> None:
        """Leave the decision in the layer's observer."""
        integers = self._integers(self.h() >= 0.5).to(torch.int8)
        self.layer.observer.rounded = Rounded(integers=integers, scale=self.rounded.scale, bias=self.rounded.bias)

    def _integers(self, up: Tensor) -> Tensor:
        return (self.floor + up).clamp(self.spec.quant_min, self.spec.quant_max)


def reconstruct(
    prepared: GraphModule,
    block: Block,
    inputs: Sequence[Values],
    targets: Sequence[Values],
    settings: RoundingSettings,
    *,
    progress: Iterator[float],
    ranges: Sequence[ActivationObserver],
) -> None:
    """Let a block's weights, rounded before, and some of its ranges learn.

    Args:
        prepared: the graph.
        block: part of it.
        inputs: what the block reads in the quantized network, batch by batch.
        targets: what its outputs are in the float network.
        settings: how.
        progress: parts of the time that are spent, one for each step.
        ranges: observers whose range may change.
    """
    linears = {layer.node: SoftLinear(prepared, layer, settings) for layer in block.layers}
    learned = {observer: LearnedRange(observer) for observer in ranges}
    run = Run(prepared, block.nodes, block.outputs(), {**linears}, learned)
    roundings, scales = [linear.v for linear in linears.values()], [q.log_scale for q in learned.values()]
    optimizer = torch.optim.Adam(
        [{"params": roundings, "lr": rounding_rate(settings.steps)}, {"params": scales, "lr": RANGE_RATE}]
    )
    generator = torch.Generator().manual_seed(SEED)
    with torch.enable_grad():
        for step, spent in enumerate(progress):
            if step and spent > 0:  # as many steps as are to be expected, where time limits them
                optimizer.param_groups[0]["lr"] = rounding_rate(step / spent)
            batch = int(torch.randint(len(inputs), (), generator=generator))
            loss = run.error(inputs[batch], targets[batch])
            if (beta := exponent(spent)) is not None:
                loss = loss + REGULARIZER * torch.stack([undecided(m.h(), beta).sum() for m in linears.values()]).sum()
            optimizer.zero_grad()
            loss.backward(inputs=[*roundings, *scales])  # type: ignore[no-untyped-call]
            optimizer.step()
    for linear in linears.values():
        linear.harden()
    for quantizer in learned.values():
        quantizer.harden()
