"""Diagnostics of a quantized model's layers: error by timestep, weight clipping, and the error each layer causes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._progress import OnStage, ignore, of_stage
from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.graph.names import get_attribute, placeholders, timestep_placeholder, weight_path
from ptq4dit_ao.lowering.match import integer_linears
from ptq4dit_ao.metrics import LeaveOneOut, layer_errors, leave_one_out
from ptq4dit_ao.metrics.layers import quantized_inputs
from ptq4dit_ao.passes import balance_result, balanced_as
from ptq4dit_ao.report import Diagnostics

ROWS_PER_TIMESTEP = 4
"""Rows per timestep on which the layers of both graphs are compared."""
FEWEST, MOST = 2, 64
"""Least and largest number of rows on which layers are left out one at a time."""


def diagnose(
    exported: GraphModule,
    quantized: GraphModule,
    samples: CalibrationSamples,
    *,
    rows: int,
    without_one: bool = True,
    on_progress: OnStage = ignore,
) -> Diagnostics:
    """Measure every layer of a converted graph.

    Args:
        exported: the float graph that it was made from.
        quantized: the converted graph.
        samples: samples for evaluation; a part of them is used.
        rows: number of rows to run at a time.
        without_one: also leave out one layer at a time. The cost per row is one half run for each quantized input. The
            number of rows is limited, so that the total is at most a quarter of what it costs to compare both graphs on
            all samples.
        on_progress: called as layers are left out.
    """
    balanced = balanced_as(exported, balance_result(quantized))
    position = timestep_position(exported)
    timesteps = len(samples.timesteps.unique())
    few = samples.spread(ROWS_PER_TIMESTEP * timesteps).by_timestep()  # of each size
    errors = layer_errors(balanced, quantized, list(few), timestep_index=position)
    inputs = len(quantized_inputs(quantized))
    affordable = min(MOST, len(samples) // inputs)
    left_out, skipped = None, None
    if not without_one:
        skipped = "switched off"
    elif affordable < FEWEST:
        skipped = f"{len(samples)} samples are too few for {inputs} quantized inputs; {FEWEST * inputs} would do"
    else:
        left_out = _leave_out(balanced, quantized, samples.spread(affordable), position, rows, on_progress)
    return Diagnostics(
        layer_errors=errors,
        weight_clipping=weight_clipping(balanced, quantized),
        leave_one_out=left_out,
        leave_one_out_skipped=skipped,
    )


def _leave_out(
    balanced: GraphModule,
    quantized: GraphModule,
    samples: CalibrationSamples,
    position: int | None,
    rows: int,
    on_progress: OnStage,
) -> LeaveOneOut:
    return leave_one_out(
        balanced,
        quantized,
        list(samples.batches(rows)),
        timestep_index=position,
        on_progress=of_stage(on_progress, "leave one out"),
    )


def timestep_position(exported: GraphModule) -> int | None:
    """Position of the timestep among the graph's inputs; None if no input is a timestep."""
    timestep = timestep_placeholder(exported)
    return None if timestep is None else placeholders(exported).index(timestep)


@own_modes()
def weight_clipping(balanced: GraphModule, quantized: GraphModule) -> dict[str, float]:
    """Node name of a quantized linear -> range of its weight over the largest absolute weight, mean over channels."""
    twins = {node.name: node for node in balanced.graph.nodes}
    ratios = {}
    for linear in integer_linears(quantized):
        weight = get_attribute(balanced, weight_path(twins[linear.name]))
        low, high = torch.aminmax(weight, dim=1)
        largest = torch.maximum(-low, high).double()
        steps = (linear.weight_range[1] - linear.weight_range[0]) / 2
        some = largest > 0
        if some.any():
            ratios[linear.name] = float((linear.weight_scale.double() * steps / largest)[some].mean())
    return ratios
