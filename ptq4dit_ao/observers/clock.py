"""The timesteps of the current batch, which an observer reads from the graph's timestep input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase

from ptq4dit_ao._modes import autocasts
from ptq4dit_ao.errors import CalibrationError


class TimestepClock:
    """The current timesteps, shared by all observers of a prepared model; the :class:`InputObserver` sets them."""

    def __init__(self) -> None:
        self.current: Tensor | None = None
        self.example: tuple[Tensor, ...] | None = None
        """Inputs of the first batch; None before it."""

    def rows(self, batch: int, where: str) -> Tensor:
        """One timestep per row of a tensor with ``batch`` rows: (batch,) float64; zeros without a timestep input.

        If there are several rows per sample, the rows of a sample are assumed to be adjacent. If each token has a
        timestep, (N, T), the largest one of the sample is used.

        Raises:
            CalibrationError: the rows cannot be assigned to samples.
        """
        if self.current is None:
            return torch.zeros(batch, dtype=torch.float64)
        t = self.current.detach().to("cpu", torch.float64)
        t = t.flatten(1).amax(1) if t.ndim > 1 else t.reshape(-1)
        if len(t) and batch % len(t) == 0:
            return t.repeat_interleave(batch // len(t))
        if len(t) and bool((t == t[0]).all()):
            return t[:1].expand(batch)
        raise CalibrationError(
            f"{where}: a tensor of {batch} rows was computed from {len(t)} samples with different timesteps; "
            "calibrate this model with one timestep per batch"
        )

    def all(self) -> Tensor:
        """The distinct timesteps of the current batch: (T,) float64."""
        samples = 1 if self.current is None or not self.current.ndim else len(self.current)
        return self.rows(samples, "the batch").unique()


class InputObserver(ObserverBase):
    """Observer that sets the clock from a graph's inputs and keeps those of the first batch; conversion removes it."""

    def __init__(self, clock: TimestepClock, timestep: int | None) -> None:
        super().__init__(dtype=torch.float32)
        self.clock = clock
        self.timestep = timestep
        """Position of the input that holds the timestep."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Set the clock; return the first input.

        Raises:
            CalibrationError: autocast is on, so the graph would compute in dtypes other than its own.
        """
        if autocasts():
            raise CalibrationError(
                "the prepared model is called under torch.autocast, which changes what it computes; calibrate outside "
                "of it, or inside torch.autocast(..., enabled=False)"
            )
        if self.timestep is not None:
            self.clock.current = inputs[self.timestep]
        if self.clock.example is None:
            self.clock.example = tuple(x.detach().clone() for x in inputs)
        return inputs[0]

    def calculate_qparams(self, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Raise AssertionError, because inputs are not quantized here."""
        raise AssertionError("inputs are not quantized here")

    def convert(self, model: GraphModule, node: Node) -> None:
        """Remove the observer from the graph; called by ``convert_pt2e``."""
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        model.graph.erase_node(node)
