"""Distillation: all linears that were quantized learn together, until the network puts out what the float one does.

Rounding a layer, or a block, for its own output's sake cannot know what the rest of the network makes of the error.
Here integers, scales, biases and the steps of activations all follow the gradient of the mean square error of the
network's output. Integers move by a straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): gradients pass
the rounding as if it was not there. Scales are learned as in LSQ (Esser et al. 2020, arXiv 1902.08153). No data is
needed but what calibrates, and the targets are the float network's own.
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
"""Learning rate, in steps of the quantizer: of a weight's place among its integers, of the last integer as a scale or a
range grows, of a bias beside inputs of size 1. It falls to 0 along a cosine.
"""

REACH = 1.0
"""How far a weight can get at least, in steps of its quantizer: with few steps, the rate is higher. It starts in the
middle of its integer's cell.
"""

COMPARED = 32
"""Batches on which the network must have gained."""

SEED = 0

FILE = "distillation.safetensors"
FORMAT = TensorFormat(name="distillation", version=2, error=CalibrationError, remedy="remove it to start again")

PAUSE = 60.0
"""Seconds between two notes of how far it has come."""

SHARE = 0.05
"""Of the time that may go into notes; where they take more, the pauses are longer."""


class LearnedLinear(nn.Module):
    """A linear whose integers, scales and bias learn, from where rounding has left them."""

    def __init__(self, prepared: GraphModule, layer: Layer) -> None:
        super().__init__()
        rounded, self.spec = layer.observer.rounded, layer.observer.spec
        assert rounded is not None
        self.layer, self.start = layer, rounded.scale
        self.position = nn.Parameter(rounded.integers.to(torch.float32))
        scales = rounded.scale if self.spec.channel_axis == 0 else rounded.scale[:1]
        self.log_ratio = nn.Parameter(torch.zeros_like(scales))
        bias = layer.bias(prepared) if rounded.bias is None else rounded.bias
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        position = self.position
        integers = position + (self.integers() - position).detach()  # the gradient is that of the position
        weight = integers * self.scale().unsqueeze(1)
        return functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def integers(self) -> Tensor:
        """(C_out, C_in), as floating point numbers."""
        return self.position.round().clamp(self.spec.quant_min, self.spec.quant_max)

    def scale(self) -> Tensor:
        """(C_out,)."""
        return self.start * self.log_ratio.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep every place beside an integer that there is: what goes astray would be long in coming back."""
        self.position.clamp_(self.spec.quant_min - INSIDE, self.spec.quant_max + INSIDE)

    def harden(self) -> None:
        """Leave what was learned in the layer's observer."""
        self.layer.observer.rounded = Rounded(
            integers=self.integers().detach().to(torch.int8),
            scale=self.scale().detach(),
            bias=None if self.bias is None else self.bias.detach(),
        )


def distill(
    prepared: GraphModule,
    batches: Sequence[Sequence[Tensor]],
    settings: DistillationSettings,
    *,
    on_progress: OnProgress = ignore,
    resume: Path | None = None,
) -> None:
    """Let all rounded weights and their inputs' ranges learn, and leave in the observers what was learned.

    Where the output's error is no smaller then, on some of the batches, all is left as it was.

    Args:
        prepared: a balanced graph whose weights have been rounded.
        batches: input tuples. The float network's outputs are held for each.
        settings: how long.
        on_progress: called after each step.
        resume: a folder to note in how far it has come; what is found there is not done again.

    Raises:
        CalibrationError: there are no batches; the folder has notes of another run, or cannot be written.
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
    ranges: dict[ActivationObserver, LearnedRange] = {g.observer: LearnedRange(g.observer) for g in groups}
    run = Run(prepared, nodes, outputs, {**linears}, ranges)
    some = range(0, len(inputs), -(-len(inputs) // COMPARED))
    before = _error(run, inputs, targets, some)
    learning = nn.ModuleList([*linears.values(), *ranges.values()])
    rate = max(RATE, 2 * REACH / settings.steps)  # along the cosine, Adam gets half its rate a step at most
    optimizer = _optimizer(linears.values(), ranges.values(), rate)
    clock = _Clock(settings)
    notes = None
    if resume is not None:
        start = [(g.observer.chosen_range, [_sums_of(layer.observer.rounded) for layer in g.layers]) for g in groups]
        notes = _Notes(resume, fingerprint(prepared, groups, batches, (settings, start)), learning, optimizer, clock)
    with torch.enable_grad():
        while (spent := clock.spent()) < 1:
            for parameters in optimizer.param_groups:
                parameters["lr"] = parameters["rate"] * (1 + math.cos(math.pi * spent)) / 2
            batch = _batch(clock.steps, len(inputs))
            loss = run.error(inputs[batch], targets[batch]) / (before or 1.0)  # gradients of a size that Adam can tell
            optimizer.zero_grad()
            loss.backward(inputs=list(learning.parameters()))  # type: ignore[no-untyped-call]
            optimizer.step()
            for linear in linears.values():
                linear.clamp_()
            clock.steps += 1
            on_progress(round(clock.spent() * settings.steps), settings.steps)
            if notes is not None:
                notes.write()
    after = _error(run, inputs, targets, some)
    logger.info("distilled in %d steps: square error of the output %.3g, before %.3g", clock.steps, after, before)
    if not after < before:
        logger.warning("%d steps of distillation gained nothing; all is left as it was rounded", clock.steps)
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
def _error(run: Run, inputs: Sequence[Values], targets: Sequence[Values], batches: range) -> float:
    return sum(float(run.error(inputs[i], targets[i])) for i in batches) / len(batches)


def _optimizer(linears: Iterable[LearnedLinear], ranges: Iterable[LearnedRange], rate: float) -> torch.optim.Optimizer:
    rates: list[tuple[nn.Parameter, float]] = []
    for linear in linears:
        rates += [(linear.position, rate), (linear.log_ratio, rate / linear.spec.quant_max)]
        if linear.bias is not None:
            rates.append((linear.bias, rate * float(linear.start.mean())))
    rates += [(quantizer.log_scale, 2 * rate / quantizer.spec.levels) for quantizer in ranges]
    return torch.optim.Adam([{"params": [parameter], "rate": rate} for parameter, rate in rates])


def _sums_of(rounded: Rounded | None) -> tuple[object, ...]:
    assert rounded is not None
    return tuple(None if part is None else sums(part) for part in (rounded.integers, rounded.scale, rounded.bias))


def _batch(step: int, count: int) -> int:
    """All batches in random order, then all in another."""
    generator = torch.Generator().manual_seed(SEED + step // count)
    return int(torch.randperm(count, generator=generator)[step % count])


class _Clock:
    """How far learning has come: in steps, or in time where that runs out sooner."""

    def __init__(self, settings: DistillationSettings) -> None:
        self._settings = settings
        self._start = time.monotonic()
        self.steps = 0
        self.earlier = 0.0
        """Seconds that runs before this one took."""

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self._start

    def spent(self) -> float:
        """The part of the budget, from 0 to 1."""
        steps = self.steps / self._settings.steps
        minutes = self._settings.minutes
        return min(1.0, steps if minutes is None else max(steps, self.seconds() / (60 * minutes)))


class _Notes:
    """A file with all that a killed run needs to go on: what has been learned, the optimizer's state, the clock."""

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
                f"{self._path} was learned by another model, recipe or calibration set; remove it to start anew, or "
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
        """Note how far it has come, if the last time was long ago.

        Raises:
            CalibrationError: it cannot be written.
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
