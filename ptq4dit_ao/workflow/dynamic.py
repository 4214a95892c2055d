"""Choice of the inputs whose tokens get ranges of their own, within a share of the linears' multiplications.

They are those whose static quantization changes the output most for each multiplication. That change is measured on the
balanced float network, with one input quantized and everything else float, once in its static range and once per token.
The errors of different inputs then add up, and the choice is a knapsack problem, as for the bits of weights.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.core import allocate
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.graph.names import is_linear, joint_name
from ptq4dit_ao.metrics.layers import input_errors
from ptq4dit_ao.passes import balance_result, balanced_as
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer
from ptq4dit_ao.report.types import DynamicEntry
from ptq4dit_ao.workflow.weight_bits import held_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChosenInput:
    """One quantized input."""

    layers: tuple[str, ...]
    """Layers that read it."""
    share: float
    """Part of all quantized linears' multiplications that is theirs."""
    noise: tuple[float, float]
    """Energy that its quantization adds to the output's error, with a static range and per token."""
    dynamic: bool


@dataclass(frozen=True, kw_only=True)
class ChosenDynamic:
    """A choice for all quantized inputs on which no override decides."""

    chosen: tuple[ChosenInput, ...]
    """Choices, in execution order."""
    share: float
    """Part of all quantized linears' multiplications whose inputs are dynamic, those of overrides included."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers whose input is to be dynamic."""
        return tuple(layer for inputs in self.chosen for layer in inputs.layers if inputs.dynamic)

    def to_dict(self) -> DynamicEntry:
        """JSON-safe entry for the report. Noise is relative to the total with static ranges."""
        total = sum(inputs.noise[0] for inputs in self.chosen) or 1.0
        return {
            "share": self.share,
            "inputs": [
                {
                    "name": joint_name(inputs.layers),
                    "layers": list(inputs.layers),
                    "share": inputs.share,
                    "noise": [float(f"{noise / total:.4g}") for noise in inputs.noise],
                    "dynamic": inputs.dynamic,
                }
                for inputs in self.chosen
            ],
        }


@own_modes()
def choose_dynamic(
    exported: GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    share: float,
    quantizer: PTQ4DiTQuantizer,
    on_progress: OnProgress = ignore,
) -> ChosenDynamic:
    """Choose the inputs that are quantized per token, those that gain most.

    Args:
        exported: a graph from :func:`~ptq4dit_ao.export_transformer`. It is not changed.
        batches: calibration inputs. The last sixteenth of each size, at least one batch, is held out for measuring.
        share: upper limit of their part of all quantized linears' multiplications, above 0 and at most 1.
        quantizer: how to balance. Its overrides are kept; those on ``dynamic`` decide.
        on_progress: called as inputs are measured.

    Raises:
        ArgumentError: overrides leave nothing to choose, or make more dynamic than the share allows.
    """
    plans = [quantizer.variant(dynamic=word).plan(exported) for word in ("token", False)]
    free = {node for node, plan in plans[0].items() if plan.is_dynamic and not plans[1][node].is_dynamic}
    if not free:
        raise ArgumentError(
            "overrides decide on the ranges of all quantized layers; there is none to choose: take out overrides, or "
            "say dynamic: token or false"
        )
    calibrated, measured = held_out(exported, batches)
    prepared = prepare_pt2e(
        GraphModule(exported, copy.deepcopy(exported.graph)), quantizer.variant(dynamic=False, sequential=False)
    )
    for inputs in calibrated:
        prepared(*inputs)
    converted = convert_pt2e(prepared)
    result = balance_result(converted)
    balanced = balanced_as(exported, result)
    found = input_errors(balanced, converted, measured, only=free, timestep_index=None, on_progress=on_progress)
    work = _multiplications(balanced, measured[0])
    quantized = {node for node, plan in plans[1].items() if not plan.skip and node in work}
    total = sum(work[node] for node in quantized)
    spent = sum(work[node] for node in quantized if plans[1][node].is_dynamic)
    # A module that is called twice has one choice.
    costs: dict[tuple[str, ...], int] = defaultdict(int)
    noise: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for nodes, errors in found.items():
        layers = tuple(dict.fromkeys(result.layers[node] for node in nodes))
        costs[layers] += sum(work[node] for node in nodes)
        noise[layers] = [sum(pair) for pair in zip(noise[layers], (float(e.noise.sum()) for e in errors), strict=True)]
    budget = math.floor(share * total) - spent
    if budget < 0:
        raise ArgumentError(
            f"share is {share:g}, but overrides make {spent / total:.3g} of the multiplications dynamic; raise it, or "
            "take out overrides"
        )
    picks = allocate([[0, cost] for cost in costs.values()], list(noise.values()), budget)
    chosen = tuple(
        ChosenInput(
            layers=layers, share=costs[layers] / total, noise=(noise[layers][0], noise[layers][1]), dynamic=pick == 1
        )
        for layers, pick in zip(costs, picks, strict=True)
    )
    taken = spent / total + sum(inputs.share for inputs in chosen if inputs.dynamic)
    logger.info(
        "%d of %d inputs are quantized per token: %.0f %% of all multiplications",
        sum(picks),
        len(picks),
        100 * taken,
    )
    return ChosenDynamic(chosen=chosen, share=taken)


def _multiplications(graph: GraphModule, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Multiplications of each linear in one run, by node name."""
    counted: dict[str, int] = {}

    class Counter(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if is_linear(n):
                counted[n.name] = value.numel() * self.env[n.all_input_nodes[0]].shape[-1]
            return value

    Counter(graph).run(*inputs)
    return counted
