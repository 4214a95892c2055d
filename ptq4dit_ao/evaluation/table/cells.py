"""Cells of a table on disk: one JSON file each, with everything that its result depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq4dit_ao._files import replace_json
from ptq4dit_ao._formats import JsonFormat
from ptq4dit_ao.errors import ArgumentError, PTQ4DiTError

FORMAT = JsonFormat(name="table cell", version=2, error=ArgumentError, remedy="remove it, and it is computed again")
MODELS = "models"
"""Name of the folder with the quantized models of a table and a JSON file about each."""
Json = dict[str, Any]
"""A JSON object."""


def read_cell(path: Path, depends: Mapping[str, Any]) -> Json | None:
    """Read the stored result of a cell; None if there is no file.

    Raises:
        ArgumentError: the file is damaged, or was made with other settings. The message names one of them.
    """
    if not path.exists():
        return None
    try:
        cell: Json = FORMAT.checked(path, json.loads(path.read_text(encoding="utf-8")))
        was = cell["depends"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, PTQ4DiTError):
            raise
        raise ArgumentError(f"{path} is damaged ({error!r}); remove it, and it is computed again") from error
    if (difference := _difference(was, _plain(depends))) is not None:
        raise ArgumentError(
            f"{path} was made with {difference}; give another folder (output=...), or remove the file to make it again"
        )
    return cell


def models_of(folder: Path) -> dict[str, str]:
    """Settings that each quantized model of a table was made with (:func:`as_key`) -> name of the model."""
    models: dict[str, str] = {}
    for path in sorted((folder / MODELS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # read_cell reports such files
            models.setdefault(as_key(json.loads(path.read_text(encoding="utf-8"))["depends"]), path.stem)
    return models


def as_key(depends: Mapping[str, Any]) -> str:
    """A text that is equal for settings that are equal as JSON."""
    return json.dumps(depends, sort_keys=True)


def write_cell(path: Path, depends: Mapping[str, Any], content: Mapping[str, Any]) -> Json:
    """Write the result of a cell, and return it as :func:`read_cell` will read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = _plain({"depends": dict(depends), **content})
    replace_json(path, FORMAT.sign(cell))
    return cell


def model_digest(*modules: nn.Module | None) -> str:
    """First half of the SHA-256 of the parameters and buffers of modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in ({} if module is None else module.state_dict()).items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _plain(value: Mapping[str, Any]) -> Json:
    """The value as it is read back from JSON, with lists in place of tuples."""
    plain: Json = json.loads(json.dumps(value))
    return plain


def _difference(was: Any, now: Any, path: str = "") -> str | None:
    """Text that names the first setting that differs; None if all are equal."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *was]):
            found = _difference(was.get(key), now.get(key), f"{path}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if was == now else f"{path} {_shown(was)}, not {_shown(now)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
