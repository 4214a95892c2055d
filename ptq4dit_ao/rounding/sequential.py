"""Rounding layer by layer, with the float and the quantized network in lockstep.

Each layer is rounded for its inputs in the quantized network and fitted to its output in the float network, so that it
also compensates for the errors of the layers before it. All calibration batches advance together from one quantized
input to the next. Memory holds only activations that a later node still reads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4dit_ao._memory import trim
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.observers import ActivationObserver, TokenSample
from ptq4dit_ao.rounding.blocks import Block, find_blocks
from ptq4dit_ao.rounding.layers import Group, find_groups
from ptq4dit_ao.rounding.learning import learnable
from ptq4dit_ao.rounding.reconstruct import Budget, reconstruct
from ptq4dit_ao.rounding.resume import Progress, fingerprint
from ptq4dit_ao.rounding.settings import RoundingSettings
from ptq4dit_ao.rounding.solve import Inputs, choose_range, solve_group
from ptq4dit_ao.rounding.streams import Streams

logger = logging.getLogger(__name__)


PARTS = 100
"""Number of parts in which the progress of a block that learns is reported."""


@own_modes()
def round_sequentially(
    prepared: GraphModule,
    batches: Iterable[Sequence[Tensor]],
    settings: RoundingSettings,
    *,
    on_progress: OnProgress = ignore,
    resume: Path | None = None,
) -> None:
    """Round a balanced, prepared graph layer by layer, and store the result in its observers for ``convert_pt2e``.

    Args:
        prepared: a calibrated and balanced graph from ``prepare_pt2e`` with our quantizer.
        batches: input tuples; memory holds all of them.
        settings: settings of rounding.
        on_progress: called with the number of parts done and the total.
        resume: a checkpoint folder; results in it are reused.

    Raises:
        CalibrationError: there are no batches; the folder has the checkpoint of another run, or cannot be written.
    """
    groups, batches = find_groups(prepared), learnable(prepared, batches)
    learns = settings.learned
    parts = PARTS if learns else 1
    blocks = list(find_blocks(prepared, groups, together=learns))
    found = "" if resume is None else fingerprint(prepared, groups, batches, settings)
    device = next((str(parameter.device) for parameter in prepared.parameters()), "cpu")
    progress = Progress(resume, found, device)
    budget = Budget(settings, [block.weights(prepared) for block in blocks])
    streams = Streams(prepared, batches)
    given = {group.observer: group.observer.chosen_range for group in groups}
    try:
        for index, block in enumerate(blocks):
            streams.advance(block.start)
            trim()
            if not progress.load(index + 1, block.parts(groups)):
                if learns:
                    fractions = _reported(budget.progress(index), index, len(blocks), on_progress)
                    _learn(prepared, block, streams, settings, fractions)
                else:
                    _round(prepared, block.groups[0], streams, settings)
                progress.save(index + 1, block.parts(groups))
            on_progress((index + 1) * parts, len(blocks) * parts)
    except BaseException:  # restore the observers, so that the caller can try again
        for group in groups:
            group.observer.chosen_range = given[group.observer]
            for layer in group.layers:
                layer.observer.rounded = None
        raise
    logger.info("rounded %d weights with %s, layer by layer", sum(len(g.layers) for g in groups), settings.rounding)


def _learn(
    prepared: GraphModule, block: Block, streams: Streams, settings: RoundingSettings, progress: Iterator[float]
) -> None:
    held = streams.held(block.nodes)
    here = set(block.layers)
    new = [g.observer for g in block.groups if _has_no_range(g.observer) and not here.isdisjoint(g.layers)]
    for group in block.groups:
        streams.advance(group.node)
        _round(prepared, group, streams, settings)
    streams.advance(block.end)
    targets = streams.exact(block.outputs())
    reconstruct(prepared, block, held, targets, settings, progress=progress, ranges=new)
    streams.redo(block.nodes, held)


def _reported(progress: Iterator[float], block: int, blocks: int, on_progress: OnProgress) -> Iterator[float]:
    """The fractions of ``progress``, of which every hundredth is reported to ``on_progress``."""
    reported = 0
    for spent in progress:
        if int(spent * PARTS) > reported:
            reported = int(spent * PARTS)
            on_progress(block * PARTS + reported, blocks * PARTS)
        yield spent


def _round(prepared: GraphModule, group: Group, streams: Streams, settings: RoundingSettings) -> None:
    observer = group.observer
    weights = {layer: layer.weight(prepared) for layer in group.layers}
    if _has_no_range(observer):  # a shared observer has its range from an earlier group
        tokens, low, high = _look(streams, group.node)
        weight = torch.cat(list(weights.values()))
        levels = group.weight_levels
        observer.chosen_range = choose_range(observer.spec, tokens, low, high, weight, levels, settings)
    inputs = _inputs(streams, group.node, observer)
    solve_group(prepared, group, weights, inputs, settings)


def _has_no_range(observer: ActivationObserver) -> bool:
    return observer.chosen_range is None and observer.spec.ranged


def _look(streams: Streams, node: Node) -> tuple[Tensor, Tensor, Tensor]:
    """A sample of tokens of a node's input in the quantized network, and the input's minimum and maximum."""
    sample, low, high = None, [], []
    for _, x in streams.inputs(node):
        rows = x.flatten(0, -2)
        sample = sample or TokenSample(rows.shape[1])
        sample.update(rows)
        low.append(rows.amin())
        high.append(rows.amax())
    assert sample is not None
    return sample.tokens, torch.stack(low).amin(), torch.stack(high).amax()


def _inputs(streams: Streams, node: Node, observer: ActivationObserver) -> Inputs:
    """Moments of a layer's inputs in both networks."""
    example, _ = next(streams.inputs(node))
    channels, device = example.shape[-1], example.device
    mean, quantized_mean = torch.zeros(2, channels, dtype=torch.float64, device=device)
    moment, cross = torch.zeros(2, channels, channels, device=device)
    count = 0
    for x, unquantized in streams.inputs(node):
        x = x.flatten(0, -2).to(torch.float32)
        q = observer.fake_quantize(unquantized).flatten(0, -2).to(torch.float32)
        count += len(x)
        mean += x.sum(0, dtype=torch.float64)
        quantized_mean += q.sum(0, dtype=torch.float64)
        moment.addmm_(q.T, q)
        cross.addmm_(q.T, x - q)
    means = (mean / count).float(), (quantized_mean / count).float()
    return Inputs.from_moments(*means, moment.div_(count), cross.div_(count))
