"""Checkpoint of a sequential rounding: a folder with one safetensors file per block and a fingerprint of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao._files import is_unfinished, replace_json
from ptq4dit_ao._formats import TensorFormat
from ptq4dit_ao._paths import because
from ptq4dit_ao.core.expansion import Codebook
from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.observers import ActivationObserver, Rounded
from ptq4dit_ao.rounding.layers import Group

PARTS = ("integers", "scale", "bias")
"""Attributes of :class:`~ptq4dit_ao.observers.Rounded` that are stored; the bias may be missing."""
FORMAT = TensorFormat(
    name="rounded layers", version=4, error=CalibrationError, remedy="remove it, and it is computed again"
)


class Progress:
    """The checkpoint folder of rounded layers; without a folder, nothing is stored or found.

    Args:
        folder: the folder, which is created if it is missing; or None.
        fingerprint: fingerprint of the model, the batches and the settings.
        device: device of the model, to which tensors are loaded.

    Raises:
        CalibrationError: the folder belongs to another run, or cannot be created.
    """

    def __init__(self, folder: Path | None, fingerprint: str, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        if folder is None:
            return
        about = folder / "about.json"
        expected = {"format": FORMAT.tag, "fingerprint": fingerprint}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if about.exists():
                found = json.loads(about.read_text())
                FORMAT.check(about, found.get("format") if isinstance(found, dict) else None)
                if found != expected:
                    raise CalibrationError(
                        f"{folder} holds layers that were rounded for another model, recipe or calibration set; "
                        "remove it to start again, or give another folder"
                    )
            elif not all(is_unfinished(path) for path in folder.iterdir()):
                raise CalibrationError(f"{folder} holds something else than rounded layers; give another folder")
            else:
                replace_json(about, expected)
        except (OSError, ValueError) as error:
            reason = because(error) if isinstance(error, OSError) else f"{about} is damaged ({error})"
            raise CalibrationError(
                f"cannot keep rounded layers in {folder}: {reason}; remove it to start again, or give another folder"
            ) from error

    def load(self, index: int, groups: Sequence[Group]) -> bool:
        """Load the results of groups into their observers; False if the folder has none."""
        if self._folder is None or not (path := self._path(index)).exists():
            return False
        _, tensors = FORMAT.read(path)
        tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        found = [_read(tensors, f"{number}.", group) for number, group in enumerate(groups)]
        for group, (bounds, rounded) in zip(groups, found, strict=True):
            group.observer.chosen_range = bounds
            for layer, solution in zip(group.layers, rounded, strict=True):
                layer.observer.rounded = solution
        return True

    def save(self, index: int, groups: Sequence[Group]) -> None:
        """Save the results of groups.

        Raises:
            CalibrationError: the file cannot be written.
        """
        if self._folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for number, group in enumerate(groups):
            tensors |= _tensors(f"{number}.", group)
        FORMAT.write(self._path(index), tensors)

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{index:04d}.safetensors"


def fingerprint(
    prepared: GraphModule, groups: Iterable[Group], batches: Sequence[Sequence[Tensor]], settings: object
) -> str:
    """A digest of everything that determines the result; tensors enter by their shapes and sums."""
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(repr([(name, sums(parameter)) for name, parameter in prepared.named_parameters()]).encode())
    activations = [module for module in prepared.modules() if isinstance(module, ActivationObserver)]
    digest.update(repr([(observer.layer, observer.spec) for observer in activations]).encode())
    for group in groups:
        digest.update(repr((group.name, group.observer.spec)).encode())
        for layer in group.layers:
            digest.update(repr((layer.observer.spec, sums(layer.weight(prepared)))).encode())
    for batch in batches:
        digest.update(repr([sums(x) for x in batch]).encode())
    return digest.hexdigest()


def _tensors(prefix: str, group: Group) -> dict[str, Tensor]:
    tensors = {}
    if group.observer.chosen_range is not None:
        tensors[f"{prefix}range"] = torch.tensor(group.observer.chosen_range, dtype=torch.float64)
    for i, layer in enumerate(group.layers):
        assert layer.observer.rounded is not None
        for part in PARTS:
            if (value := getattr(layer.observer.rounded, part)) is not None:
                tensors[f"{prefix}{i}.{part}"] = value
        if (codebook := layer.observer.rounded.codebook) is not None:
            tensors[f"{prefix}{i}.step"] = codebook.step
    return tensors


def _read(tensors: Mapping[str, Tensor], prefix: str, group: Group) -> tuple[tuple[float, float] | None, list[Rounded]]:
    bounds = None
    if group.observer.spec.ranged:
        low, high = tensors[f"{prefix}range"].tolist()
        bounds = low, high
    rounded = []
    for i, layer in enumerate(group.layers):
        found = {part: name for part in PARTS if (name := f"{prefix}{i}.{part}") in tensors or part != "bias"}
        # A tensor that is not copied would keep the whole file in memory.
        parts = {part: tensors[name].clone() for part, name in found.items()}
        codebook, expansion = None, layer.observer.spec.expansion
        if expansion is not None:
            step, channels = tensors[f"{prefix}{i}.step"].clone(), parts["integers"].shape[1]
            codebook = Codebook(expansion=expansion, step=step, channels=channels)
        rounded.append(Rounded(codebook=codebook, **parts))
    return bounds, rounded


def sums(x: Tensor) -> tuple[object, ...]:
    """Shape, sum and sum of squares of a tensor, which identify it in a fingerprint."""
    x = x.to(torch.float64)
    return tuple(x.shape), float(x.sum()), float(x.square().sum())
