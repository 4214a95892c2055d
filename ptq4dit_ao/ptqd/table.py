"""PTQD's table: the difference of a quantized denoiser's predicted noise from the float model's, for each step.

eps_q = (1 + k_t) eps + mu_{t,c} + r,    r of mean 0 and standard deviation sigma_q,t
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ptq4dit_ao._formats import TensorFormat
from ptq4dit_ao.errors import ArgumentError, CalibrationError

FORMAT = TensorFormat(name="noise correction", version=2, error=CalibrationError, remedy="fit it again")
_TENSORS = {
    "timesteps": (torch.int64, 1),
    "k": (torch.float64, 1),
    "mu": (torch.float64, 2),
    "sigma_q": (torch.float64, 1),
}
"""Dtype and number of axes of each tensor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseCorrection:
    """Noise correction, with a row for each of a sampler's T steps. It takes some kilobytes, and fits every backend.

    Raises:
        ArgumentError: dtypes, shapes or values are not those of a measurement.
    """

    timesteps: Tensor
    """Timesteps of the sampler, (T,) int64, all different."""
    k: Tensor
    """Factor of the error that is proportional to the noise, (T,) float64, >= 0."""
    mu: Tensor
    """Mean of the remaining error for each channel, (T, C) float64."""
    sigma_q: Tensor
    """Standard deviation of the remaining error, (T,) float64, >= 0."""
    guidance: float
    """Scale of classifier-free guidance at which it was measured. The error depends on it."""

    def __post_init__(self) -> None:
        found = {name: getattr(self, name) for name in _TENSORS}
        kinds = {name: (x.dtype, x.ndim) for name, x in found.items()}
        if kinds != _TENSORS or len({len(x) for x in found.values()}) != 1 or self.mu.numel() == 0:
            shapes = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in found.items())
            raise ArgumentError(
                f"a noise correction is timesteps (T,) of int64, k (T,), mu (T, C) and sigma_q (T,) of float64; got "
                f"{shapes}"
            )
        if not math.isfinite(self.guidance):
            raise ArgumentError(f"guidance of a noise correction is {self.guidance}; it must be finite")
        if len(self.timesteps.unique()) != self.steps:
            raise ArgumentError(f"the timesteps of a noise correction occur once each, got {self.timesteps.tolist()}")
        for name, least in {"k": 0.0, "mu": -torch.inf, "sigma_q": 0.0}.items():
            bad = ~(found[name].isfinite() & (found[name] >= least))
            if bad.any():
                raise ArgumentError(
                    f"{name} of a noise correction is {found[name][bad][0].item()}; it must be finite"
                    + (" and not negative" if least == 0 else "")
                )

    @property
    def steps(self) -> int:
        """Number of steps T of the sampler that it was measured for."""
        return len(self.timesteps)

    def serves(self, timesteps: Iterable[int], guidance: float) -> bool:
        """Whether it is of this guidance scale and has all these timesteps."""
        return guidance == self.guidance and set(timesteps) <= self._rows.keys()

    def correct(self, eps: Tensor, timestep: float | Tensor) -> Tensor:
        """Correct the quantized model's guided noise (N, C, ...): ``(eps - mu_t) / (1 + k_t)``.

        Raises:
            ArgumentError: the table has no such timestep, or other channels.
        """
        row = self._row(timestep)
        channels = self.mu.shape[1]
        if eps.shape[1] != channels:
            raise ArgumentError(f"the noise has {eps.shape[1]} channels, its correction {channels}; fit one for it")
        mu = self.mu[row].to(eps).view(channels, *[1] * (eps.ndim - 2))
        return (eps - mu) / (1 + self.k[row].item())

    def remaining_variance(self, timestep: float | Tensor) -> float:
        """Variance that quantization adds to every element of the corrected noise: ``sigma_q^2 / (1 + k_t)^2``.

        Raises:
            ArgumentError: the table has no such timestep.
        """
        row = self._row(timestep)
        return (self.sigma_q[row] / (1 + self.k[row])).item() ** 2

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically.

        Raises:
            CalibrationError: it cannot be written.
        """
        tensors, about = {name: getattr(self, name) for name in _TENSORS}, {"guidance": repr(self.guidance)}
        FORMAT.write(path, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> NoiseCorrection:
        """Read a file that :meth:`save` wrote.

        Raises:
            CalibrationError: the file is missing, is something else, or is damaged.
        """
        metadata, tensors = FORMAT.read(path)
        if tensors.keys() != _TENSORS.keys():
            raise CalibrationError(f"the noise correction in {path} holds {', '.join(sorted(tensors))}; fit it again")
        try:
            return cls(**tensors, guidance=float(metadata["guidance"]))
        except (KeyError, ValueError) as error:
            raise CalibrationError(f"the noise correction in {path} is damaged ({error}); fit it again") from error

    @cached_property
    def _rows(self) -> dict[int, int]:
        return {t: row for row, t in enumerate(self.timesteps.tolist())}

    def _row(self, timestep: float | Tensor) -> int:
        if torch.as_tensor(timestep).numel() != 1:
            raise ArgumentError(f"the timestep of a noise correction is {timestep}; give one for the whole batch")
        row = self._rows.get(float(timestep))  # type: ignore[call-overload]  # equal to an int, if it is one
        if row is None:
            known = [str(t) for t in self._rows]
            shown = known if self.steps <= 8 else [*known[:3], "...", known[-1]]
            raise ArgumentError(
                f"the noise correction has no timestep {float(timestep):g}; it was fitted for {self.steps} steps at "
                f"{', '.join(shown)}: sample with these, or fit one for this schedule"
            )
        return row
