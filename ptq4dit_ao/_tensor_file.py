"""Safetensors files that say what they hold, with a digest of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4dit_ao._atomic import replacing_file
from ptq4dit_ao._digest import tensors_digest
from ptq4dit_ao._paths import as_path, because
from ptq4dit_ao.errors import PTQ4DiTError

_CHECKED = " 2"
"""After the form of files that have a digest; those without it were written by earlier versions."""
_DIGEST = "sha256"


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    form: str,
    what: str,
    error: type[PTQ4DiTError],
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a file whose metadata has ``format: form``, and replace what was there when it is complete.

    Raises:
        error: it cannot be written.
    """
    path = as_path(path)
    if path.is_dir():
        raise error(f"cannot write {what} to {path}: it is a folder; give the name of a file in it")
    stored = _apart(tensors)
    metadata = {**(about or {}), "format": f"{form}{_CHECKED}"}
    metadata[_DIGEST] = tensors_digest(stored, metadata)
    try:
        with replacing_file(path) as temporary:
            save_file(stored, temporary, metadata=metadata)
    except (OSError, SafetensorError) as problem:
        reason = f"{_because(problem)}; choose a place that you may write to"
        raise error(f"cannot write {what} to {path}: {reason}") from problem


def read_tensors(
    path: str | Path, *, form: str, what: str, error: type[PTQ4DiTError], hint: str = "", way_out: str = "make it anew"
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that :func:`write_tensors` wrote.

    Raises:
        error: the file is missing, is damaged or altered, or holds something else than ``what``.
    """
    path = as_path(path)
    if path.is_dir():
        raise error(f"cannot read {what} from {path}: it is a folder; give the name of a file in it")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError) as problem:
        raise error(f"cannot read {what} from {path}: {_because(problem)}; check the path, or {way_out}") from problem
    found = metadata.get("format")
    if found not in (form, f"{form}{_CHECKED}"):
        raise error(f"{path} is not a file of {what}{hint or f'; check the path, or {way_out}'}")
    if found != form:
        digest = metadata.pop(_DIGEST, None)
        if digest != tensors_digest(tensors, metadata):
            raise error(f"{path} was altered: its sha256 is not that of {what} in it; copy it again, or {way_out}")
    return metadata, tensors


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU; those that share memory with another, which safetensors refuses, are copied."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        taken = {other.untyped_storage().data_ptr() for other in stored.values()}
        stored[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor
    return stored


def _because(problem: OSError | SafetensorError) -> str:
    return because(problem) if isinstance(problem, OSError) else str(problem)
