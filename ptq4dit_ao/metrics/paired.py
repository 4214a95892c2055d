"""Paired errors: the float and the quantized model on the same inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.core.metrics import energy_ratio_db
from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.metrics.intervals import Estimate, bootstrap

Denoiser = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedError:
    """Signal-to-quantization-noise ratio (SQNR) of the predicted noise in dB, from the energies of every row.

    The bootstrap intervals resample rows as if they were independent. The rows of one image are not fully independent.
    """

    timesteps: np.ndarray
    """Timestep of every row, (rows,) float64."""
    signal: np.ndarray
    """Energy of the float output, ``sum ref^2``, (rows,) float64."""
    noise: np.ndarray
    """Energy of the error, ``sum (ref - approx)^2``, (rows,) float64."""

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> PairedError:
        """Errors from parts of (3, rows): timestep, signal and noise."""
        if not parts:
            raise ArgumentError("there are no batches to compare on; pass at least one tuple of inputs")
        timesteps, signal, noise = torch.cat(list(parts), dim=1).numpy()
        return cls(timesteps=timesteps, signal=signal, noise=noise)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.timesteps)

    @property
    def sqnr_db(self) -> float:
        """SQNR of all rows by their summed energies, so that the largest errors dominate."""
        return self._pooled_db(np.arange(self.rows))

    @functools.cached_property
    def per_timestep(self) -> dict[float, float]:
        """Timestep -> SQNR of its rows in dB, ascending."""
        return {float(t): self._pooled_db(self._rows_at(t)) for t in np.unique(self.timesteps)}

    @property
    def median_db(self) -> float:
        """Median of the SQNR over timesteps, in which each timestep counts the same."""
        return float(np.median(list(self.per_timestep.values())))

    def sqnr_estimate(self, *, seed: int = 0) -> Estimate:
        """Estimate of :attr:`sqnr_db` with its bootstrap interval."""
        return self._estimate(np.arange(self.rows), seed)

    def median_estimate(self, *, seed: int = 0) -> Estimate:
        """Estimate of :attr:`median_db` with its bootstrap interval."""
        _, which = np.unique(self.timesteps, return_inverse=True)

        def median(rows: np.ndarray) -> float:
            drawn = np.bincount(which[rows]) > 0
            signal, noise = (np.bincount(which[rows], energy[rows])[drawn] for energy in (self.signal, self.noise))
            return float(np.median(energy_ratio_db(signal, noise)))

        return bootstrap(self.rows, median, seed=seed)

    def timestep_estimates(self, *, seed: int = 0) -> dict[float, Estimate]:
        """Estimates of :attr:`per_timestep`, with bootstrap intervals over the rows of each timestep."""
        return {t: self._estimate(self._rows_at(t), seed) for t in self.per_timestep}

    def _estimate(self, rows: np.ndarray, seed: int) -> Estimate:
        return bootstrap(len(rows), lambda drawn: self._pooled_db(rows[drawn]), seed=seed)

    def _rows_at(self, t: float) -> np.ndarray:
        return np.flatnonzero(self.timesteps == t)

    def _pooled_db(self, rows: np.ndarray) -> float:
        return float(energy_ratio_db(self.signal[rows].sum(), self.noise[rows].sum()))


@own_modes()
def paired_error(
    reference: Denoiser, quantized: Denoiser, batches: Iterable[tuple[Tensor, ...]], *, timestep_index: int | None = 1
) -> PairedError:
    """Compare two models on the same inputs.

    Args:
        reference: the float model.
        quantized: the quantized model.
        batches: input tuples, each tensor (N, ...).
        timestep_index: index of the input that holds the timestep, (N,) or, with one for each token, (N, T); None if
            none does.

    Raises:
        ArgumentError: the outputs have different shapes.
        CalibrationError: an output is not finite.
    """
    parts = []
    for inputs in batches:
        expected, actual = rows_of(reference(*inputs)), rows_of(quantized(*inputs))
        if expected.shape != actual.shape:
            raise ArgumentError(
                f"shapes differ: reference {tuple(expected.shape)}, got {tuple(actual.shape)}; compare a quantized "
                "model with the float model that it was made of"
            )
        timesteps = timesteps_of(inputs, timestep_index)
        for name, output in (("float", expected), ("quantized", actual)):
            _check_finite(name, output, timesteps)
        parts.append(energies(timesteps, expected, actual))
    return PairedError.of(parts)


def _check_finite(name: str, output: Tensor, timesteps: Tensor) -> None:
    """Check that a model does not overflow, because no metric would be meaningful.

    Raises:
        CalibrationError: its output is not finite.
    """
    bad = ~output.flatten(1).isfinite().all(1)
    if bad.any():
        raise CalibrationError(
            f"the {name} model predicts NaN or infinity for {int(bad.sum())} of {len(bad)} rows, first at timestep "
            f"{timesteps[bad][0].item():g}; run it there by itself, in float32"
        )


def energies(timesteps: Tensor, expected: Tensor, actual: Tensor) -> Tensor:
    """Timestep, signal and noise of every row of two (N, ...) float64 tensors: (3, N)."""
    noise = expected - actual
    return torch.stack([timesteps, *(x.square().flatten(1).sum(1).cpu() for x in (expected, noise))])


def rows_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A model's output as float64 on the CPU, (N, ...). Several outputs are joined to (N, values)."""
    if isinstance(output, Tensor):
        return output.double().cpu()
    return torch.cat([part.double().cpu().flatten(1) for part in output], dim=1)


def timesteps_of(inputs: Sequence[Tensor], index: int | None) -> Tensor:
    """Timestep of every row of a batch, (N,) float64: the largest of a row's tokens; zeros if no input holds it."""
    if index is None:
        return torch.zeros(len(inputs[0]), dtype=torch.float64)
    if not -len(inputs) <= index < len(inputs):
        raise ArgumentError(
            f"timestep_index is {index}, and a batch has {len(inputs)} inputs; say which is the timestep, or None"
        )
    t = inputs[index].double().cpu()
    return t.flatten(1).amax(1) if t.ndim > 1 else t
