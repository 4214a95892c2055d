"""Cells of a table on disk: a JSON file each, with all that it depends on."""

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
"""Folder of the quantized models of a table, and of notes on each."""
Json = dict[str, Any]


def read_cell(path: Path, depends: Mapping[str, Any]) -> Json | None:
    """What was found before, None if there is no such file.

    Raises:
        ArgumentError: it is damaged, or was found with other settings; the message names one.
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
            f"{path} was made with {difference}; give another folder (output=...), or remove the file to make it anew"
        )
    return cell


def models_of(folder: Path) -> dict[str, str]:
    """What each quantized model of a table depends on (:func:`as_key`) -> its name."""
    models: dict[str, str] = {}
    for path in sorted((folder / MODELS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # read_cell will tell
            models.setdefault(as_key(json.loads(path.read_text(encoding="utf-8"))["depends"]), path.stem)
    return models


def as_key(depends: Mapping[str, Any]) -> str:
    """Equal for what is equal as JSON."""
    return json.dumps(depends, sort_keys=True)


def write_cell(path: Path, depends: Mapping[str, Any], content: Mapping[str, Any]) -> Json:
    """Note what was found, and return it as it will be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = _plain({"depends": dict(depends), **content})
    replace_json(path, FORMAT.sign(cell))
    return cell


def model_digest(*modules: nn.Module | None) -> str:
    """Half of the SHA-256 of the parameters and buffers of modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in ({} if module is None else module.state_dict()).items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _plain(value: Mapping[str, Any]) -> Json:
    """As JSON gives it back: tuples are lists."""
    plain: Json = json.loads(json.dumps(value))
    return plain


def _difference(was: Any, now: Any, path: str = "") -> str | None:
    """The first setting that differs, in words."""
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
