"""AdaRound by blocks: the weights of a block learn to round up or down so that its output is close to the float one.

The procedure is that of BRECQ (Li et al. 2021, arXiv 2102.05426), which PTQ4DiT follows. The inputs are the quantized
network's, the targets are the float network's, and the scales of activations are learned as well.
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
"""Weight of the regularizer relative to the block's square error summed over channels (BRECQ, Q-Diffusion)."""

NEAR = 0.5
"""Start of learning with ``start="gptq"``, as a fraction of the way from GPTQ's integer to the float weight."""

RANGE_RATE = 4e-4
"""Learning rate of the logarithm of an activation's scale."""

SEED = 0


def rounding_rate(steps: float) -> float:
    """Learning rate of V, which is the papers' 1e-3 at their 20,000 steps and larger for fewer steps."""
    return min(0.03, 20 / steps)


class Budget:
    """Budget of all blocks' learning, in steps and in time.

    Args:
        settings: ``steps`` for every block, ``minutes`` for all of them together.
        work: amount of work of each block, in proportion to which blocks get time.
    """

    def __init__(self, settings: RoundingSettings, work: Sequence[int]) -> None:
        self._settings = settings
        self._work = list(work)
        self._deadline = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes

    def progress(self, block: int) -> Iterator[float]:
        """Fractions of a block's budget that are spent, rising from 0, one for each step that is to be made."""
        start = time.monotonic()
        seconds = float("inf")
        if self._deadline is not None:
            seconds = (self._deadline - start) * self._work[block] / sum(self._work[block:])
        step = 0
        while step < self._settings.steps and (spent := time.monotonic() - start) < seconds:
            yield max(step / self._settings.steps, spent / seconds)
            step += 1


class SoftLinear(nn.Module):
    """A linear whose weight elements lie between rounding down and up, by a learned h(V) in [0, 1]."""

    def __init__(self, prepared: GraphModule, layer: Layer, settings: RoundingSettings) -> None:
        super().__init__()
        assert layer.observer.rounded is not None
        self.layer, self.rounded, self.spec = layer, layer.observer.rounded, layer.observer.spec
        self.scale = self.rounded.scale.unsqueeze(1)
        self.bias = layer.bias(prepared) if self.rounded.bias is None else self.rounded.bias
        position = layer.weight(prepared) / self.scale
        allowed = self.rounded.allowed(self.spec)
        if settings.start == "gptq":  # GPTQ's integers must be the nearest ones to the start
            integers, unit = self.rounded.integers, allowed.unit()
            position = integers + NEAR * unit * ((position - integers) / unit).clamp(-INSIDE, INSIDE)
        self.floor, above = allowed.neighbours(position)
        self.gap = above - self.floor
        self.v = nn.Parameter(inverse_rectified_sigmoid(((position - self.floor) / self.gap).clamp(0, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Output (..., C_out) for an input (..., C_in), with the soft-rounded weight."""
        weight = self._integers(self.h()) * self.scale
        return functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def h(self) -> Tensor:
        """Fraction h(V) of rounding up, (C_out, C_in), in [0, 1]."""
        return rectified_sigmoid(self.v)

    def harden(self) -> None:
        """Round every element up if h >= 0.5, else down, and store the result in the layer's observer."""
        integers = self._integers(self.h() >= 0.5).to(torch.int8)
        old = self.rounded
        self.layer.observer.rounded = Rounded(integers=integers, scale=old.scale, bias=old.bias, codebook=old.codebook)

    def _integers(self, up: Tensor) -> Tensor:
        return (self.floor + up * self.gap).clamp(self.spec.quant_min, self.spec.quant_max)


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
    """Learn the rounding of a block's weights, which are rounded already, and some of its ranges.

    Args:
        prepared: the graph.
        block: a block of the graph.
        inputs: values that the block reads in the quantized network, batch by batch.
        targets: the block's outputs in the float network, batch by batch.
        settings: settings of rounding.
        progress: fractions of the block's budget that are spent, one for each step.
        ranges: observers whose range is learned.
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
            if step and spent > 0:  # step / spent is the expected number of steps, also with a time limit
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
