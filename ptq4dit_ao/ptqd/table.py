"""What PTQD knows of a quantized denoiser: for each step, how its predicted noise differs from the float model's.

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
"""Type and number of axes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseCorrection:
    """A row for each of a sampler's T steps; some kilobytes, and the same for every backend.

    Raises:
        ArgumentError: types, shapes or values are none that a measurement gives.
    """

    timesteps: Tensor
    """(T,) int64, all different."""
    k: Tensor
    """(T,) float64, >= 0: the part of the error that is proportional to the noise."""
    mu: Tensor
    """(T, C) float64: mean of the rest, for each channel."""
    sigma_q: Tensor
    """(T,) float64, >= 0: standard deviation of what is left."""
    guidance: float
    """Scale of classifier-free guidance, after which it was measured; another scale has other errors."""

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
        """T, of the sampler that it was measured for."""
        return len(self.timesteps)

    def serves(self, timesteps: Iterable[int], guidance: float) -> bool:
        """Is it of this guidance scale, and of all these timesteps?"""
        return guidance == self.guidance and set(timesteps) <= self._rows.keys()

    def correct(self, eps: Tensor, timestep: float | Tensor) -> Tensor:
        """``(eps - mu_t) / (1 + k_t)``: the quantized model's guided noise (N, C, ...) made like the float model's.

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
        """``sigma_q^2 / (1 + k_t)^2``: what quantization adds to every element of the corrected noise.

        Raises:
            ArgumentError: the table has no such timestep.
        """
        row = self._row(timestep)
        return (self.sigma_q[row] / (1 + self.k[row])).item() ** 2

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, which replaces what was there when it is complete.

        Raises:
            CalibrationError: it cannot be written.
        """
        tensors, about = {name: getattr(self, name) for name in _TENSORS}, {"guidance": repr(self.guidance)}
        FORMAT.write(path, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> NoiseCorrection:
        """Read what :meth:`save` wrote.

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
