"""Tensors of an artifact in one safetensors file, each in its smallest exact form.

========  ==========================================================  =============================
form      content of the file                                         tensors
========  ==========================================================  =============================
raw       the tensor itself                                           everything else
int4      two values per byte                                         int8 that is used as 4-bit only
expanded  codes, and steps of its groups, in one row                  int8 that expands from 4 bits
zeros     nothing, because dtype and shape say it all                 integers that are all 0
pairs     (..., 2) real numbers, as safetensors has no such dtype     complex128, complex32
========  ==========================================================  =============================
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao._paths import error_number
from ptq4dit_ao.artifact.graph_json import graph_tensors
from ptq4dit_ao.artifact.narrow import four_bit_tensors
from ptq4dit_ao.artifact.strict import check_keys
from ptq4dit_ao.artifact.values import DTYPES
from ptq4dit_ao.core.expansion import Expansion
from ptq4dit_ao.core.int4 import pack_int4, packed_length, unpack_int4
from ptq4dit_ao.errors import ArtifactError
from ptq4dit_ao.graph.expansions import expansions

MAPPED_BYTES = 2**26
"""Bytes of the file that are mapped at a time."""

_STORAGES = ("raw", "int4", "expanded", "zeros", "pairs")
_PARTS = {torch.complex128: torch.float64, torch.complex32: torch.float16}
"""Complex dtypes that are stored as pairs -> dtype of their parts."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Form in which one tensor is stored, with the dtype and shape it is restored with."""

    storage: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    expansion: Expansion | None = None
    """Rule by which it expands from 4 bits; None in another form."""

    @property
    def in_file(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of the tensor in the file."""
        if self.storage == "int4":
            return torch.uint8, (packed_length(self.shape),)
        if self.expansion is not None:
            return torch.uint8, (self.expansion.packed_length(self.matrix),)
        return (_PARTS[self.dtype], (*self.shape, 2)) if self.storage == "pairs" else (self.dtype, self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of a matrix."""
        rows, columns = self.shape
        return rows, columns

    def to_json(self) -> dict[str, Any]:
        """JSON-safe form of the entry, for :meth:`from_json`."""
        dtype = str(self.dtype).removeprefix("torch.")
        about = {"storage": self.storage, "dtype": dtype, "shape": list(self.shape)}
        return about if self.expansion is None else {**about, "expansion": self.expansion.to_text()}

    @classmethod
    def from_json(cls, name: str, doc: Any) -> StoredTensor:
        """Read an entry that :meth:`to_json` wrote.

        Raises:
            ArtifactError: the entry is damaged.
        """
        what = f"entry of tensor {name!r}"
        expands = isinstance(doc, dict) and doc.get("storage") == "expanded"
        check_keys(doc, {"storage", "dtype", "shape", *(["expansion"] if expands else [])}, what)
        storage, dtype, shape = doc["storage"], doc["dtype"], doc["shape"]
        sound = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if storage not in _STORAGES or not isinstance(dtype, str) or dtype not in DTYPES or not sound:
            raise ArtifactError(f"{what} is {doc!r}, which is not readable; copy or save the model again")
        if storage == "pairs":
            sound = DTYPES[dtype] in _PARTS
        elif storage != "raw" and (
            DTYPES[dtype].is_floating_point or (storage in ("int4", "expanded") and dtype != "int8")
        ):
            raise ArtifactError(f"{what} stores {dtype} as {storage!r}, which is for integers; save the model again")
        if not expands:
            return cls(storage=storage, dtype=DTYPES[dtype], shape=tuple(shape))
        if len(shape) != 2 or not isinstance(doc["expansion"], str):
            raise ArtifactError(f"{what} is {doc!r}, which is no matrix that expands from 4 bits; save the model again")
        expansion = Expansion.from_text(doc["expansion"])
        return cls(storage=storage, dtype=DTYPES[dtype], shape=tuple(shape), expansion=expansion)


def pack_tensors(gm: GraphModule) -> tuple[dict[str, StoredTensor], dict[str, Tensor]]:
    """The table of a graph's tensors, and the tensors that go into the file.

    Raises:
        ArtifactError: a tensor is not dense, or a 4-bit weight holds values of more bits.
    """
    tensors = graph_tensors(gm)
    four_bit, rules = four_bit_tensors(gm), expansions(gm)
    table = {
        name: StoredTensor(storage="expanded", dtype=t.dtype, shape=tuple(t.shape), expansion=rules[name])
        if name in rules
        else StoredTensor(storage=_storage(name, t, four_bit), dtype=t.dtype, shape=tuple(t.shape))
        for name, t in tensors.items()
    }
    return table, {n: _pack(n, tensors[n], entry) for n, entry in table.items() if entry.storage != "zeros"}


def save_tensors(payload: Mapping[str, Tensor], path: Path) -> None:
    """Write the tensors of ``pack_tensors`` to a file.

    Raises:
        OSError: the file cannot be written.
        ArtifactError: safetensors does not support a dtype.
    """
    try:
        save_file(dict(payload), path)
    except SafetensorError as error:
        if (number := error_number(error)) is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise ArtifactError(f"the weights cannot be stored: {error}; cast them to a common dtype first") from error
    except KeyError as error:
        raise ArtifactError(f"safetensors cannot hold dtype {error}; cast the tensor to a common dtype") from error


def load_tensors(path: Path, table: Mapping[str, StoredTensor], device: torch.device) -> dict[str, Tensor]:
    """Load the tensors of ``pack_tensors``, each into memory of its own, so that it can be freed alone.

    The file is mapped again after every :data:`MAPPED_BYTES`, because pages read from a mapping count as memory until
    it is closed.

    Raises:
        ArtifactError: the file is damaged, or holds other tensors than the table lists.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_names(path, set(file.keys()), {n for n, entry in table.items() if entry.storage != "zeros"})
        tensors: dict[str, Tensor] = {}
        for names in _chunks(table):
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors |= {name: _unpack(path, name, table[name], file).to(device) for name in names}
        return tensors
    except SafetensorError as error:
        raise ArtifactError(f"{path} is not readable ({error}); copy or save the model again") from error


def _chunks(table: Mapping[str, StoredTensor]) -> Iterator[list[str]]:
    """Names of the tensors, in portions of about :data:`MAPPED_BYTES` in the file."""
    names, size = [], 0
    for name, entry in table.items():
        names.append(name)
        dtype, shape = entry.in_file
        size += 0 if entry.storage == "zeros" else dtype.itemsize * math.prod(shape)
        if size >= MAPPED_BYTES:
            yield names
            names, size = [], 0
    yield names


def _storage(name: str, tensor: Tensor, four_bit: set[str]) -> str:
    if name in four_bit:
        return "int4"
    if tensor.dtype in _PARTS:
        return "pairs"
    # Zeros are not used for floats, because -0.0 would come back as 0.0.
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return "zeros" if is_integer and tensor.numel() and not tensor.any() else "raw"


def _pack(name: str, tensor: Tensor, entry: StoredTensor) -> Tensor:
    if entry.storage == "pairs":
        return torch.view_as_real(tensor.resolve_conj().contiguous())
    if entry.storage == "raw":
        # safetensors refuses tensors that share memory in part, so they are copied. Tied ones are aliases already.
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)
    try:
        return pack_int4(tensor) if entry.expansion is None else entry.expansion.pack(tensor)
    except ArtifactError as error:
        raise ArtifactError(f"tensor {name!r}: {error}") from error


def _unpack(path: Path, name: str, entry: StoredTensor, file: Any) -> Tensor:
    if entry.storage == "zeros":
        return torch.zeros(entry.shape, dtype=entry.dtype)
    stored = file.get_tensor(name)
    found = (stored.dtype, tuple(stored.shape))
    if found != entry.in_file:
        raise ArtifactError(
            f"tensor {name!r} in {path} is {found}, the manifest says {entry.in_file}; they belong to different "
            f"models, copy or save the model again"
        )
    if entry.storage == "pairs":
        return torch.view_as_complex(stored.clone())
    if entry.expansion is not None:
        return entry.expansion.unpack(stored, entry.matrix)
    return unpack_int4(stored, entry.shape) if entry.storage == "int4" else stored.clone()


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    for verb, names in (("lacks", expected - found), ("has the unknown", found - expected)):
        if names:
            raise ArtifactError(
                f"{path} {verb} {', '.join(sorted(names))}; it does not belong to this manifest, copy or save the "
                f"model again"
            )
