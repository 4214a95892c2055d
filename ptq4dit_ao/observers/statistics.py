"""Minimum and maximum per timestep and channel, from which CSB, SSC and exact ranges after balancing follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ptq4dit_ao._formats import TensorFormat
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao.errors import CalibrationError, check_type

FORMAT = TensorFormat(name="salience statistics", version=2, error=CalibrationError, remedy="run calibration again")


class ChannelStatistics:
    """Minimum and maximum per timestep and channel of one tensor; the order of updates does not matter."""

    def __init__(self, channels: int) -> None:
        self._row: dict[float, int] = {}
        self._minimum = torch.empty(0, channels)
        self._maximum = torch.empty(0, channels)

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self._minimum.shape[1]

    @property
    def timesteps(self) -> Tensor:
        """Distinct timesteps seen, ascending: (T,) float64."""
        return torch.tensor(sorted(self._row), dtype=torch.float64)

    @property
    def minimum(self) -> Tensor:
        """Minimum per timestep and channel, (T, C) float32, rows in the order of :attr:`timesteps`."""
        return self._minimum[self._order()]

    @property
    def maximum(self) -> Tensor:
        """Maximum per timestep and channel, (T, C) float32, rows in the order of :attr:`timesteps`."""
        return self._maximum[self._order()]

    @property
    def salience(self) -> Tensor:
        """Salience ``max |x|`` per timestep and channel, (T, C) float32, rows in the order of :attr:`timesteps`."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    def range(self, scale: Tensor | None = None, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Smallest and largest value over all channels, after subtraction of an offset and division by a scale.

        Args:
            scale: (C,), positive; 1 by default.
            offset: (C,); 0 by default.

        Returns:
            Two scalars, float64.
        """
        low, high = self.minimum.amin(0).to(torch.float64), self.maximum.amax(0).to(torch.float64)
        if offset is not None:
            low, high = low - offset, high - offset
        if scale is not None:
            low, high = low / scale, high / scale
        return low.amin(), high.amax()

    @own_modes()
    def update(self, timesteps: Tensor, minimum: Tensor, maximum: Tensor) -> None:
        """Merge rows: timesteps (N,), minimum and maximum (N, C)."""
        keys = timesteps.to(torch.float64).tolist()
        for key in keys:
            self._row.setdefault(key, len(self._row))
        new = len(self._row) - len(self._minimum)
        if new:
            shape = (new, self.channels)
            self._minimum = torch.cat([self._minimum, torch.full(shape, torch.inf)])
            self._maximum = torch.cat([self._maximum, torch.full(shape, -torch.inf)])
        rows = torch.tensor([self._row[key] for key in keys]).unsqueeze(1).expand(-1, self.channels)
        self._minimum.scatter_reduce_(0, rows, minimum.to("cpu", torch.float32), "amin")
        self._maximum.scatter_reduce_(0, rows, maximum.to("cpu", torch.float32), "amax")

    def merge(self, other: ChannelStatistics) -> None:
        """Merge the statistics of another observer of the same tensor.

        Raises:
            CalibrationError: the channel counts differ.
        """
        if other.channels != self.channels:
            raise CalibrationError(
                f"cannot merge statistics of {other.channels} channels into {self.channels}; merge those of one tensor"
            )
        self.update(other.timesteps, other.minimum, other.maximum)

    def _order(self) -> list[int]:
        return [self._row[key] for key in sorted(self._row)]


class SalienceStatistics(Mapping[str, ChannelStatistics]):
    """Statistics of a model's balance sites, by the name of the first layer that reads the tensor."""

    def __init__(
        self, tables: Mapping[str, ChannelStatistics] | None = None, example: tuple[Tensor, ...] | None = None
    ) -> None:
        check_type("tables", tables, (Mapping, type(None)), "a dict of ChannelStatistics by site")
        self._tables = dict(tables or {})
        self.example = example
        """Inputs of the model from the first calibration batch; not saved."""

    def __getitem__(self, name: str) -> ChannelStatistics:
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def merge(self, other: SalienceStatistics) -> None:
        """Merge the statistics of another run over the same model, such as another process's share of the samples.

        Raises:
            CalibrationError: the sites differ.
        """
        check_type("other", other, SalienceStatistics, "SalienceStatistics")
        if set(other) != set(self):
            odd = sorted(set(other) ^ set(self))[0]
            raise CalibrationError(
                f"cannot merge statistics of different models: {odd!r} is in one of them only; gather both with the "
                "same model and the same settings"
            )
        for name, table in self._tables.items():
            table.merge(other[name])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with three tensors per site.

        Raises:
            CalibrationError: the file cannot be written.
        """
        tensors = {}
        for name, table in self._tables.items():
            tensors[f"{name}/timesteps"] = table.timesteps
            tensors[f"{name}/minimum"] = table.minimum.contiguous()
            tensors[f"{name}/maximum"] = table.maximum.contiguous()
        FORMAT.write(path, tensors)

    @classmethod
    def load(cls, path: str | Path) -> SalienceStatistics:
        """Read a file that :meth:`save` wrote.

        Raises:
            CalibrationError: the file is missing, or holds no salience statistics.
        """
        _, tensors = FORMAT.read(path)
        try:
            names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
            tables = {}
            for name in names:
                timesteps, minimum, maximum = (
                    tensors[f"{name}/{part}"] for part in ("timesteps", "minimum", "maximum")
                )
                if timesteps.shape != minimum.shape[:1] or minimum.shape != maximum.shape:
                    raise ValueError(f"the tables of {name!r} differ in shape")
                tables[name] = ChannelStatistics(minimum.shape[1])
                tables[name].update(timesteps, minimum, maximum)
        except (KeyError, IndexError, ValueError) as error:
            raise CalibrationError(f"{path} holds no salience statistics ({error}); run calibration again") from error
        return cls(tables)
