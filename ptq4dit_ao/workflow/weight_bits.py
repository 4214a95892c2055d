"""Mixed precision: choose which weights get more bits, under a budget for the average.

The bits go to the layers whose quantization changes the predicted noise most. That change is measured after rounding,
with one layer's weights quantized and everything else float, so that no other layer's error hides it. The errors of
different layers then add up, and the choice is a knapsack problem.
"""

from __future__ import annotations

import copy
import glob
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real

from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._progress import OnProgress, ignore, part_of
from ptq4dit_ao.capture.interface import batches_by_size, check_batch
from ptq4dit_ao.core import allocate
from ptq4dit_ao.errors import ArgumentError, CalibrationError, check_type
from ptq4dit_ao.graph.names import get_attribute, joint_name, layer_name, linears, weight_path
from ptq4dit_ao.metrics import weight_errors
from ptq4dit_ao.passes import balance_result, balanced_as
from ptq4dit_ao.quantizer import Override, PTQ4DiTQuantizer
from ptq4dit_ao.quantizer.overrides import check_bits
from ptq4dit_ao.report import WeightBitsEntry

logger = logging.getLogger(__name__)

HELD_OUT = 16
"""Ratio of all batches to those that are held out from rounding, for measuring."""

BIT = 1 / 4
"""Factor by which one more bit reduces the energy of a quantization error (6 dB)."""


@dataclass(frozen=True, kw_only=True)
class ChosenBits:
    """Bits of the weights that read one quantized input."""

    layers: tuple[str, ...]
    parameters: int
    noise: tuple[float, ...]
    """Energy that these weights add to the output's error, at the width of each candidate."""
    bits: int


@dataclass(frozen=True, kw_only=True)
class WeightBits:
    """A choice of bits for all weights whose bits no override sets."""

    candidates: tuple[int, ...]
    chosen: tuple[ChosenBits, ...]
    """Choices, in execution order."""
    average_bits: float
    """Mean bits of all quantized weights, including those whose bits an override sets."""

    @property
    def overrides(self) -> tuple[Override, ...]:
        """Overrides for a quantizer whose ``weight_bits`` is the lowest candidate.

        Other overrides follow them and win.
        """
        return tuple(
            Override(pattern=glob.escape(layer), weight_bits=inputs.bits)
            for inputs in self.chosen
            for layer in inputs.layers
            if inputs.bits != self.candidates[0]
        )

    def to_dict(self) -> WeightBitsEntry:
        """JSON-safe entry for the report. Noise is relative to the total at the lowest candidate."""
        total = sum(inputs.noise[0] for inputs in self.chosen) or 1.0
        return {
            "candidates": list(self.candidates),
            "average_bits": self.average_bits,
            "inputs": [
                {
                    "name": joint_name(inputs.layers),
                    "layers": list(inputs.layers),
                    "parameters": inputs.parameters,
                    "noise": [float(f"{noise / total:.4g}") for noise in inputs.noise],
                    "bits": inputs.bits,
                }
                for inputs in self.chosen
            ],
        }


@own_modes()
def choose_weight_bits(
    exported: GraphModule,
    batches: Iterable[Sequence[Tensor]],
    *,
    average_bits: float,
    candidates: Sequence[int] = (4, 8),
    quantizer: PTQ4DiTQuantizer | None = None,
    on_progress: OnProgress = ignore,
) -> WeightBits:
    """Choose the bits of all weights, more for those whose quantization causes most error.

    For every candidate but the highest, the model is calibrated, rounded in one pass, and run once for each quantized
    input on the batches held out. Each run costs half a run on average, because the nodes before the input are shared.
    The error at the highest candidate is extrapolated from the one below, by 6 dB per bit.

    Args:
        exported: a graph from :func:`~ptq4dit_ao.export_transformer`. It is not changed.
        batches: calibration inputs. The last sixteenth of each size, at least one batch, is held out from rounding for
            measuring.
        average_bits: upper limit of the mean over all quantized weights.
        candidates: widths to choose from.
        quantizer: how to balance and round. Its ``weight_bits`` are ignored, and its overrides are kept. The default
            rounds with GPTQ.
        on_progress: called as inputs are measured.

    Raises:
        ArgumentError: a candidate is not a valid width, the average is not between them, or overrides leave a smaller
            budget than needed.
        CalibrationError: there are no batches.
    """
    widths = _checked(candidates, average_bits)
    quantizer = quantizer or PTQ4DiTQuantizer(rounding="gptq")
    check_type("exported", exported, GraphModule, "a graph of export_transformer")
    samples = [check_batch(exported, batch, f"calibration batch {number}") for number, batch in enumerate(batches, 1)]
    if not samples:
        raise CalibrationError("there are no calibration samples; pass at least one tuple of inputs")
    rounded, measured = held_out(exported, samples)
    low, high = (_planned_bits(exported, quantizer, bits) for bits in (widths[0], widths[-1]))
    free = {layer for layer, bits in low.items() if high[layer] != bits}
    if not free:
        raise ArgumentError(
            f"overrides set the bits of all {len(low)} quantized layers; there is none to choose: take out overrides, "
            "or give bits as a number"
        )
    noise: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for done, bits in enumerate(widths[:-1]):
        step = quantizer.variant(weight_bits=bits, sequential=False)
        found = _noise(exported, step, free, rounded, measured, part_of(on_progress, done, len(widths) - 1))
        for layers, energy in found.items():
            noise[layers].append(energy)
    return _choose(exported, noise, widths, average_bits, {layer: low[layer] for layer in low.keys() - free})


def held_out(
    exported: GraphModule, samples: Sequence[tuple[Tensor, ...]]
) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """The batches to round with, and those to measure on. A single batch of a size is among both."""
    rounded, measured = set(), set()
    for found in batches_by_size(exported, samples):
        held = max(1, len(found) // HELD_OUT)
        rounded.update(found[:-held] or found)
        measured.update(found[-held:])
    return [samples[i] for i in sorted(rounded)], [samples[i] for i in sorted(measured)]


def _checked(candidates: Sequence[int], average_bits: float) -> tuple[int, ...]:
    """The candidates, ascending, once they and the average are checked."""
    for bits in candidates:
        check_bits("a candidate for weight_bits", bits)
    widths = tuple(sorted(set(candidates)))
    if len(widths) < 2:
        raise ArgumentError(f"candidates are {list(candidates)}; give at least two different widths, such as [4, 8]")
    check_type("average_bits", average_bits, Real, "a number of bits")
    if not widths[0] <= average_bits <= widths[-1]:
        raise ArgumentError(
            f"average_bits is {average_bits:g}, and the candidates go from {widths[0]} to {widths[-1]}; choose it "
            "between them, or other candidates"
        )
    return widths


def _noise(
    exported: GraphModule,
    quantizer: PTQ4DiTQuantizer,
    free: Set[str],
    rounded: Sequence[tuple[Tensor, ...]],
    measured: Sequence[tuple[Tensor, ...]],
    on_progress: OnProgress,
) -> dict[tuple[str, ...], float]:
    """Names of the free layers that read one quantized input -> energy of the output error that they cause."""
    prepared = prepare_pt2e(GraphModule(exported, copy.deepcopy(exported.graph)), quantizer)
    for inputs in rounded:
        prepared(*inputs)
    converted = convert_pt2e(prepared)
    result = balance_result(converted)
    found = weight_errors(
        balanced_as(exported, result),
        converted,
        measured,
        only={node for node, layer in result.layers.items() if layer in free},
        timestep_index=None,
        on_progress=on_progress,
    )
    noise: dict[tuple[str, ...], float] = defaultdict(float)
    for nodes, error in found.items():  # a module that is called twice has one choice
        noise[tuple(dict.fromkeys(result.layers[node] for node in nodes))] += float(error.noise.sum())
    return noise


def _choose(
    exported: GraphModule,
    noise: Mapping[tuple[str, ...], Sequence[float]],
    widths: tuple[int, ...],
    average_bits: float,
    others: Mapping[str, int],
) -> WeightBits:
    """Spend the budget that remains after ``others``, layers whose bits are given."""
    sizes = {layer_name(node): get_attribute(exported, weight_path(node)).numel() for node in linears(exported)}
    parameters = [sum(map(sizes.__getitem__, layers)) for layers in noise]
    total = sum(parameters) + sum(map(sizes.__getitem__, others))
    fixed = sum(sizes[layer] * bits for layer, bits in others.items())
    least = fixed + widths[0] * sum(parameters)
    budget = math.floor(average_bits * total)
    if budget < least:
        raise ArgumentError(
            f"average_bits is {average_bits:g}, but with the overrides, and {widths[0]} bits elsewhere, the weights "
            f"take {least / total:.3g} on average; raise it, or take out overrides"
        )
    energies = [(*found, found[-1] * BIT ** (widths[-1] - widths[-2])) for found in noise.values()]
    choice = allocate([[bits * n for bits in widths] for n in parameters], energies, budget - fixed)
    chosen = tuple(
        ChosenBits(layers=layers, parameters=n, noise=energy, bits=widths[k])
        for layers, n, energy, k in zip(noise, parameters, energies, choice, strict=True)
    )
    taken = (fixed + sum(inputs.bits * inputs.parameters for inputs in chosen)) / total
    logger.info("chose %s bits for %d inputs' weights: %.3g on average", widths, len(chosen), taken)
    return WeightBits(candidates=widths, chosen=chosen, average_bits=taken)


def _planned_bits(exported: GraphModule, quantizer: PTQ4DiTQuantizer, bits: int) -> dict[str, int]:
    """Quantized layer -> bits of its weight, if all weights without an override get ``bits``."""
    plans = quantizer.variant(weight_bits=bits, sequential=False).plan(exported).values()
    return {plan.layer: plan.weight_bits for plan in plans if not plan.skip}
