"""What a sequential rounding has done so far, on disk: one safetensors file for each input, and what they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.errors import CalibrationError
from ptq4dit_ao.observers import ActivationObserver, Rounded
from ptq4dit_ao.rounding.layers import Group
from ptq4dit_ao.rounding.settings import RoundingSettings

FORMAT = "ptq4dit-ao rounded layers 1"


class Progress:
    """A folder of rounded layers, or nothing at all if there is no folder.

    Args:
        folder: made if it is missing.
        fingerprint: of the model, the batches and the settings.

    Raises:
        CalibrationError: the folder belongs to another run, or cannot be made.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self._folder = folder
        if folder is None:
            return
        about = folder / "about.json"
        expected = {"format": FORMAT, "fingerprint": fingerprint}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if about.exists():
                if json.loads(about.read_text()) != expected:
                    raise CalibrationError(
                        f"{folder} holds layers that were rounded for another model, recipe or calibration set; "
                        "remove it to start anew, or give another folder"
                    )
            elif any(folder.iterdir()):
                raise CalibrationError(f"{folder} holds something else than rounded layers; give another folder")
            else:
                _write(about, lambda path: path.write_text(json.dumps(expected)))
        except (OSError, ValueError) as error:
            raise CalibrationError(f"cannot keep rounded layers in {folder}: {error}") from error

    def load(self, index: int, group: Group) -> bool:
        """Give a group what was found for it; False if there is nothing."""
        if self._folder is None or not (path := self._path(index)).exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                low, high = file.get_tensor("range").tolist()
                parts = ("integers", "scale", "bias")
                rounded = [
                    Rounded(**{part: file.get_tensor(f"{i}.{part}") for part in parts})
                    for i in range(len(group.layers))
                ]
        except (OSError, SafetensorError, ValueError) as error:
            raise CalibrationError(f"{path} is damaged ({error}); remove it, and it is computed again") from error
        group.observer.clipped = (low, high)
        for layer, found in zip(group.layers, rounded, strict=True):
            layer.observer.rounded = found
        return True

    def save(self, index: int, group: Group) -> None:
        """Note what was found for a group.

        Raises:
            CalibrationError: it cannot be written.
        """
        if self._folder is None:
            return
        assert group.observer.clipped is not None
        tensors = {"range": torch.tensor(group.observer.clipped, dtype=torch.float64)}
        for i, layer in enumerate(group.layers):
            assert layer.observer.rounded is not None
            tensors |= {f"{i}.{part}": value.contiguous() for part, value in vars(layer.observer.rounded).items()}
        try:
            _write(self._path(index), lambda path: save_file(tensors, path))
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot write {self._path(index)}: {error}") from error

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{index:04d}.safetensors"


def fingerprint(
    prepared: GraphModule, groups: Iterable[Group], batches: Sequence[Sequence[Tensor]], settings: RoundingSettings
) -> str:
    """A digest of all that decides what is found: balanced weights and batches by their sums."""
    digest = hashlib.sha256(repr(settings).encode())
    activations = [module for module in prepared.modules() if isinstance(module, ActivationObserver)]
    digest.update(repr([(observer.layer, observer.spec) for observer in activations]).encode())
    for group in groups:
        digest.update(repr((group.name, group.observer.spec)).encode())
        for layer in group.layers:
            digest.update(repr((layer.observer.spec, _sums(layer.weight(prepared)))).encode())
    for batch in batches:
        digest.update(repr([_sums(x) for x in batch]).encode())
    return digest.hexdigest()


def _sums(x: Tensor) -> tuple[object, ...]:
    x = x.to(torch.float64)
    return tuple(x.shape), float(x.sum()), float(x.square().sum())


def _write(path: Path, write) -> None:  # type: ignore[no-untyped-def]
    partial = path.with_suffix(".tmp")
    write(partial)
    partial.replace(path)
