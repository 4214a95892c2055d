"""Safetensors files that say what they hold."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptq4dit_ao.errors import PTQ4DiTError


def read_tensors(
    path: str | Path, *, form: str, what: str, error: type[PTQ4DiTError], hint: str = ""
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file whose metadata has ``format: form``.

    Raises:
        error: the file is missing, is damaged, or holds something else than ``what``.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError) as problem:
        raise error(f"cannot read {what} from {path}: {problem}") from problem
    if metadata.get("format") != form:
        raise error(f"{path} is not a file of {what}{hint}")
    return metadata, tensors
