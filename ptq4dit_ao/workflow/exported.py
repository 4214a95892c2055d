"""Export of a model for recorded samples, of all their sizes."""

from __future__ import annotations

import logging

from torch import nn
from torch.fx import GraphModule

from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.float_model import device_of
from ptq4dit_ao.capture.interface import check_batch
from ptq4dit_ao.errors import CalibrationError

logger = logging.getLogger(__name__)

EXAMPLE_ROWS = 2
"""Batch size of the example inputs that a model is exported with."""

MOST_EXAMPLES = 4
"""Largest number of other examples with which an export is tried."""


def export_for(model: nn.Module, samples: CalibrationSamples) -> GraphModule:
    """The graph of a model that takes samples of all their sizes.

    Which sizes a graph leaves free depends on its example: some models have a branch for the size that they were
    trained at. Therefore, if a graph does not take a size, an example of that size is tried.

    Raises:
        CalibrationError: no graph takes all sizes.
        ExportError: the model cannot be captured.
    """
    samples = samples.on(device_of(model))
    example = samples.example(EXAMPLE_ROWS)
    tried: set[int] = set()
    first: CalibrationError | None = None
    while True:
        exported = export_transformer(model, example)
        refused, problem = first_refused(exported, samples)
        if problem is None:
            return exported
        first = first or problem
        if refused in tried or len(tried) == MOST_EXAMPLES:
            raise first
        tried.add(refused)
        logger.info("%s; exporting again with an example of that size", problem)
        try:
            example = samples.groups[refused].example(EXAMPLE_ROWS)
        except CalibrationError:  # a shared tensor looks like rows
            raise first from None


def first_refused(exported: GraphModule, samples: CalibrationSamples) -> tuple[int, CalibrationError | None]:
    """Index of the first size that a graph does not take, and why; -1 and None if it takes all."""
    groups = samples.groups
    for index, group in enumerate(groups):
        what = f"calibration size {index + 1} of {len(groups)}" if len(groups) > 1 else "calibration batch 1"
        try:
            check_batch(exported, next(group.batches(min(EXAMPLE_ROWS, len(group)))), what)
        except CalibrationError as problem:
            return index, problem
    return -1, None
