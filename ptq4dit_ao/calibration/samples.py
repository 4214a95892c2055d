"""Recorded denoiser inputs, as tensors by input name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4dit_ao.errors import CalibrationError

_FORMAT = "ptq4dit-ao calibration samples"


class CalibrationSamples:
    """Inputs of a denoiser, one tensor per input in the order of its ``forward``; all (N, ...)."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        sizes = {name: len(tensor) for name, tensor in inputs.items()}
        if not sizes or len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise CalibrationError(f"calibration inputs need one common, non-zero number of rows, got {sizes}")
        self.inputs = dict(inputs)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Tuples of inputs, ``size`` rows each; the last may be smaller."""
        for start in range(0, len(self), size):
            yield tuple(tensor[start : start + size] for tensor in self.inputs.values())

    def shuffled(self, seed: int) -> CalibrationSamples:
        """The same rows in a seeded random order, so that batches mix timesteps."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return CalibrationSamples({name: tensor[order] for name, tensor in self.inputs.items()})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {name: tensor.contiguous() for name, tensor in self.inputs.items()}
        save_file(tensors, path, metadata={"format": _FORMAT, "inputs": ",".join(self.inputs)})

    @classmethod
    def load(cls, path: str | Path) -> CalibrationSamples:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: the file is missing or is something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise CalibrationError(f"{path} is not a file of calibration samples")
                return cls({name: file.get_tensor(name) for name in metadata["inputs"].split(",")})
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot read calibration samples from {path}: {error}") from error
