"""Distillation: all quantized linears learn together from the float network's output.

Rounding that minimizes the output error of a layer or block ignores the effect of the error on the rest of the network.
Here integers, scales, biases and the scales of activations follow the gradient of the mean square error of the
network's output. Integers learn by a straight-through estimator (Bengio et al. 2013, arXiv 1308.3432), whose gradient
ignores the rounding. Scales learn as in LSQ (Esser et al. 2020, arXiv 1902.08153). Distillation needs only calibration
data; the targets are the float network's outputs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from ptq4dit_ao._formats import TensorFormat
from ptq4dit_ao._paths import cannot_write
from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.capture.interface import batches_by_size
from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.graph.names import placeholders
from ptq4dit_ao.observers import ActivationObserver, Rounded
from ptq4dit_ao.rounding.layers import Layer, find_groups
from ptq4dit_ao.rounding.learning import INSIDE, LearnedRange, Run, learnable
from ptq4dit_ao.rounding.resume import fingerprint, sums
from ptq4dit_ao.rounding.settings import DistillationSettings
from ptq4dit_ao.rounding.streams import Values, copied, float_network, run_node

logger = logging.getLogger(__name__)

RATE = 0.01
"""Learning rate in steps of the quantizer, which falls to 0 along a cosine.

It is the rate of a weight's position among its integers, of the largest integer's position under a change of the scale
or range, and of a bias for inputs of size 1.
"""

REACH = 1.0
"""Minimum distance that a weight can move in total, in steps of its quantizer, from the middle of its integer's cell.

The learning rate is increased for it if there are few updates.
"""

COMPARED = 32
"""Maximum number of batches on which the errors before and after distillation are compared, up to one of each size."""

SEED = 0

FILE = "distillation.safetensors"
FORMAT = TensorFormat(name="distillation", version=2, error=CalibrationError, remedy="remove it to start again")

PAUSE = 60.0
"""Minimum number of seconds between two checkpoints."""

SHARE = 0.05
"""Maximum fraction of the time that is spent on checkpoints; the pauses become longer if writing takes more."""


class LearnedLinear(nn.Module):
    """A linear whose integers, scales and bias are learned, starting from the result of rounding.

    The integers' positions are in units of the distance of two neighbours. Codebooks are fixed.
    """

    def __init__(self, prepared: GraphModule, layer: Layer) -> None:
        super().__init__()
        rounded, self.spec = layer.observer.rounded, layer.observer.spec
        assert rounded is not None
        self.layer, self.start, self.codebook = layer, rounded.scale, rounded.codebook
        self.allowed = rounded.allowed(self.spec)
        self.position = nn.Parameter(rounded.integers / self.allowed.unit())
        scales = rounded.scale if self.spec.channel_axis == 0 else rounded.scale[:1]
        self.log_ratio = nn.Parameter(torch.zeros_like(scales))
        bias = layer.bias(prepared) if rounded.bias is None else rounded.bias
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Output (..., C_out) for an input (..., C_in), with a straight-through gradient for the integers."""
        position = self.position * self.allowed.unit()
        # It has the value of the integers, and the gradient of the position.
        integers = position + (self.allowed.nearest(position) - position).detach()
        weight = integers * self.scale().unsqueeze(1)
        return functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def integers(self) -> Tensor:
        """Integers of the weight as floating-point numbers, (C_out, C_in)."""
        return self.allowed.nearest(self.position * self.allowed.unit())

    def scale(self) -> Tensor:
        """Scale of each output channel, (C_out,)."""
        return self.start * self.log_ratio.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp positions to the integer range, because positions far outside would take many steps to return."""
        unit = self.allowed.unit()
        low, high = self.allowed.ends()
        # Both are numbers, or both are tensors.
        self.position.clamp_(low / unit - INSIDE, high / unit + INSIDE)  # type: ignore[arg-type]

    def harden(self) -> None:
        """Store the learned weight and bias in the layer's observer."""
        self.layer.observer.rounded = Rounded(
            integers=self.integers().detach().to(torch.int8),
            scale=self.scale().detach(),
            bias=None if self.bias is None else self.bias.detach(),
            codebook=self.codebook,
        )


def distill(
    prepared: GraphModule,
    batches: Sequence[Sequence[Tensor]],
    settings: DistillationSettings,
    *,
    on_progress: OnProgress = ignore,
    resume: Path | None = None,
) -> None:
    """Learn all rounded weights and their inputs' ranges, and store the result in the observers.

    If this does not reduce the output's error on some of the batches, the observers are not changed.

    Args:
        prepared: a balanced graph whose weights have been rounded.
        batches: input tuples. Memory holds the float network's outputs for all of them.
        settings: number of steps and time limit.
        on_progress: called after each step.
        resume: a checkpoint folder; a run resumes from a checkpoint in it.

    Raises:
        CalibrationError: no layer was rounded; there are no batches; the folder has the checkpoint of another run, or
            cannot be written.
    """
    groups = find_groups(prepared)
    layers = [layer for group in groups for layer in group.layers]
    if not layers:
        raise CalibrationError(
            "no layer was rounded, so that none can learn; leave distillation out, or look at what the quantizer and "
            "its overrides leave in float"
        )
    if not batches:
        raise CalibrationError("there are no samples to learn from; pass at least one tuple of inputs")
    batches = learnable(prepared, batches)
    *nodes, end = (node for node in prepared.graph.nodes if node.op != "placeholder")
    outputs = [node for node in end.all_input_nodes if node.op != "placeholder"]
    inputs = [dict(zip(placeholders(prepared), batch, strict=True)) for batch in batches]
    targets = list(_float_outputs(prepared, nodes, outputs, inputs))
    linears = {layer.node: LearnedLinear(prepared, layer) for layer in layers}
    ranges: dict[ActivationObserver, LearnedRange] = {
        g.observer: LearnedRange(g.observer) for g in groups if g.observer.spec.ranged
    }
    run = Run(prepared, nodes, outputs, {**linears}, ranges)
    pause = -(-len(inputs) // COMPARED)
    some = [index for found in batches_by_size(prepared, batches) for index in found[::pause]]
    before = _error(run, inputs, targets, some)
    learning = nn.ModuleList([*linears.values(), *ranges.values()])
    rate = max(RATE, 2 * REACH / settings.steps)  # the cosine halves Adam's largest step on average
    optimizer = _optimizer(linears.values(), ranges.values(), rate)
    clock = _Clock(settings)
    checkpoint = None
    if resume is not None:
        start = [(g.observer.chosen_range, [_sums_of(layer.observer.rounded) for layer in g.layers]) for g in groups]
        found = fingerprint(prepared, groups, batches, (settings, start))
        checkpoint = _Checkpoint(resume, found, learning, optimizer, clock)
    with torch.enable_grad():
        while (spent := clock.spent()) < 1:
            for parameters in optimizer.param_groups:
                parameters["lr"] = parameters["rate"] * (1 + math.cos(math.pi * spent)) / 2
            batch = _batch(clock.steps, len(inputs))
            # The division keeps gradients well above Adam's epsilon.
            loss = run.error(inputs[batch], targets[batch]) / (before or 1.0)
            optimizer.zero_grad()
            loss.backward(inputs=list(learning.parameters()))  # type: ignore[no-untyped-call]
            optimizer.step()
            for linear in linears.values():
                linear.clamp_()
            clock.steps += 1
            on_progress(round(clock.spent() * settings.steps), settings.steps)
            if checkpoint is not None:
                checkpoint.write()
    after = _error(run, inputs, targets, some)
    logger.info("distilled in %d steps: square error of the output %.3g, before %.3g", clock.steps, after, before)
    if not after < before:
        logger.warning("%d steps of distillation did not reduce the error; the rounded model is kept", clock.steps)
        return
    for linear in linears.values():
        linear.harden()
    for learned in ranges.values():
        learned.harden()


def _float_outputs(
    prepared: GraphModule, nodes: Sequence[Node], outputs: Sequence[Node], inputs: Sequence[Values]
) -> Iterator[Values]:
    interpreter, instead = Interpreter(prepared), float_network(prepared, nodes)
    for batch in inputs:
        values = {node: copied(value) for node, value in batch.items()}
        for node in nodes:
            values[node] = run_node(interpreter, node, values.__getitem__, instead)
        yield {node: values[node] for node in outputs}


@torch.no_grad()
def _error(run: Run, inputs: Sequence[Values], targets: Sequence[Values], batches: Sequence[int]) -> float:
    return sum(float(run.error(inputs[i], targets[i])) for i in batches) / len(batches)


def _optimizer(linears: Iterable[LearnedLinear], ranges: Iterable[LearnedRange], rate: float) -> torch.optim.Optimizer:
    rates: list[tuple[nn.Parameter, float]] = []
    for linear in linears:
        rates += [(linear.position, rate), (linear.log_ratio, rate / (linear.spec.levels // 2 - 1))]
        if linear.bias is not None:
            rates.append((linear.bias, rate * float(linear.start.mean())))
    rates += [(quantizer.log_scale, 2 * rate / quantizer.spec.levels) for quantizer in ranges]
    return torch.optim.Adam([{"params": [parameter], "rate": rate} for parameter, rate in rates])


def _sums_of(rounded: Rounded | None) -> tuple[object, ...]:
    assert rounded is not None
    return tuple(None if part is None else sums(part) for part in (rounded.integers, rounded.scale, rounded.bias))


def _batch(step: int, count: int) -> int:
    """Index of the batch for a step; every pass over all batches has another random order."""
    generator = torch.Generator().manual_seed(SEED + step // count)
    return int(torch.randperm(count, generator=generator)[step % count])


class _Clock:
    """Progress of learning, in steps or in time, whichever is further."""

    def __init__(self, settings: DistillationSettings) -> None:
        self._settings = settings
        self._start = time.monotonic()
        self.steps = 0
        self.earlier = 0.0
        """Seconds that earlier runs of a resumed distillation took."""

    def seconds(self) -> float:
        """Seconds that learning has taken, earlier runs included."""
        return self.earlier + time.monotonic() - self._start

    def spent(self) -> float:
        """The fraction of the budget that is spent, from 0 to 1."""
        steps = self.steps / self._settings.steps
        minutes = self._settings.minutes
        return min(1.0, steps if minutes is None else max(steps, self.seconds() / (60 * minutes)))


class _Checkpoint:
    """The checkpoint file from which a killed run resumes: learned parameters, optimizer state and clock."""

    def __init__(
        self, folder: Path, fingerprint: str, learning: nn.Module, optimizer: torch.optim.Optimizer, clock: _Clock
    ) -> None:
        self._path, self._fingerprint = folder / FILE, fingerprint
        self._learning, self._optimizer, self._clock = learning, optimizer, clock
        self._pause, self._last = PAUSE, time.monotonic()
        if self._path.exists():
            self._read()

    def _read(self) -> None:
        metadata, tensors = FORMAT.read(self._path)
        if metadata["fingerprint"] != self._fingerprint:
            raise CalibrationError(
                f"{self._path} was learned by another model, recipe or calibration set; remove it to start again, or "
                "give another folder"
            )
        state: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, parameter in self._learning.named_parameters():
                parameter.copy_(tensors.pop(name))
        for name, tensor in tensors.items():
            index, key = name.removeprefix("adam.").split(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._clock.steps, self._clock.earlier = int(metadata["steps"]), float(metadata["seconds"])

    def write(self) -> None:
        """Write a checkpoint, if enough time has passed since the last one.

        Raises:
            CalibrationError: the file cannot be written.
        """
        start = time.monotonic()
        if start - self._last < self._pause:
            return
        tensors = {name: parameter.detach() for name, parameter in self._learning.named_parameters()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
        about = {"fingerprint": self._fingerprint}
        about |= {"steps": str(self._clock.steps), "seconds": str(self._clock.seconds())}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CalibrationError(cannot_write(self._path, error)) from error
        FORMAT.write(self._path, tensors, about)
        self._last = time.monotonic()
        self._pause = max(PAUSE, (self._last - start) / SHARE)
