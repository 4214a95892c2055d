"""Storage of a quantized model in a folder. Writing and reading either succeed completely or fail."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao._files import is_unfinished, replacing_folder, set_aside
from ptq4dit_ao._paths import as_path, because, check_writable
from ptq4dit_ao.artifact.graph_json import graph_from_json, graph_to_json
from ptq4dit_ao.artifact.manifest import (
    BESIDE,
    FORMAT,
    GRAPH,
    MANIFEST,
    VECTORS,
    WEIGHTS,
    ArtifactSize,
    Manifest,
    check_digest,
    file_digest,
    is_manifest,
    read_manifest,
)
from ptq4dit_ao.artifact.strict import check_json, dump_json, load_json
from ptq4dit_ao.artifact.weights import StoredTensor, load_tensors, pack_tensors, save_tensors
from ptq4dit_ao.errors import ArtifactError
from ptq4dit_ao.graph.expansions import expansions

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A saved model in memory, ready to run."""

    graph_module: GraphModule
    metadata: dict[str, Any]
    input_signature: list[dict[str, Any]]
    sizes: ArtifactSize
    vectors: dict[str, Tensor] | None
    """Balancing vectors by name; None for a model that was stored without."""


def write_artifact(
    directory: str | Path,
    gm: GraphModule,
    metadata: Mapping[str, Any] | Callable[[int], Mapping[str, Any]],
    input_signature: Sequence[Mapping[str, Any]],
    beside: Callable[[Path], None] | None = None,
    vectors: Mapping[str, Tensor] | None = None,
) -> ArtifactSize:
    """Save a quantized model as the folder ``directory``. A model saved there before is replaced at the very end.

    Args:
        directory: a new or empty folder, or an earlier artifact.
        gm: a graph from ``torch.export`` and ``convert_pt2e``.
        metadata: JSON-safe data, stored unchanged (tuples become lists); or a function that makes it from the number of
            bytes that graph and weights take on disk.
        input_signature: JSON-safe entries, one for each input.
        beside: writes the files :data:`BESIDE` into the new folder before it takes its place.
        vectors: balancing vectors by name.

    Raises:
        ArtifactError: the folder holds something else, the model or metadata has no stored form, or the disk is full.
            The folder's earlier content is then unchanged.
    """
    graph = dump_json(graph_to_json(gm))
    table, payload = pack_tensors(gm)
    stored_bytes = len(graph) + sum(tensor.nbytes for tensor in payload.values())
    metadata = metadata(stored_bytes) if callable(metadata) else metadata
    about = {"metadata": dict(metadata), "input_signature": [dict(entry) for entry in input_signature]}
    for name, value in about.items():
        check_json(value, name)
    target = as_path(directory, "directory").resolve()
    try:
        _check_replaceable(target)
        with replacing_folder(target) as folder:
            sizes = _write_files(folder, graph, table, payload, about, vectors)
            if beside is not None:
                beside(folder)
            return sizes
    except OSError as error:
        raise _cannot_write(target, error, stored_bytes) from error


def read_artifact(directory: str | Path, device: str | torch.device = "cpu") -> StoredModel:
    """Load a saved model onto ``device``. It needs no other file, and runs no code from the folder.

    Raises:
        ArtifactError: a file is missing, altered, of another format version, or asks for what it may not do.
    """
    folder = as_path(directory, "directory")
    try:
        _check_present(folder)
        return _read_files(folder, torch.device(device))
    except OSError as error:
        raise ArtifactError(f"cannot read {folder}: {because(error)}; check that you may read its files") from error


def check_target(directory: str | Path) -> None:
    """Check before a long computation that its result may be saved to ``directory``.

    Raises:
        ArtifactError: the folder holds something other than a saved model, or cannot be written.
    """
    target = as_path(directory, "output").resolve()
    check_writable(target, ArtifactError)
    _check_replaceable(target)


def _write_files(
    folder: Path,
    graph: bytes,
    table: Mapping[str, StoredTensor],
    payload: Mapping[str, Tensor],
    about: Mapping[str, Any],
    vectors: Mapping[str, Tensor] | None,
) -> ArtifactSize:
    (folder / GRAPH).write_bytes(graph)
    stored = {WEIGHTS: payload} if vectors is None else {WEIGHTS: payload, VECTORS: vectors}
    for name, tensors in stored.items():
        save_tensors(tensors, folder / name)
        # safetensors makes its file private. It gets the mode that the user's umask gave to the other file.
        shutil.copymode(folder / GRAPH, folder / name)
    files = {name: file_digest(folder / name) for name in (GRAPH, *stored)}
    manifest = Manifest(tensors=table, files=files, **about)
    (folder / MANIFEST).write_bytes(dump_json(manifest.to_json(), indent=1))
    return _sizes(folder)


def _read_files(folder: Path, device: torch.device) -> StoredModel:
    manifest = read_manifest(folder / MANIFEST)
    for name, digest in manifest.files.items():
        check_digest(folder / name, digest)
    tensors = load_tensors(folder / WEIGHTS, manifest.tensors, device)
    doc = load_json(folder / GRAPH)
    try:
        gm = graph_from_json(doc, tensors, device)
    except (ArtifactError, RecursionError) as error:
        raise ArtifactError(f"{folder / GRAPH}: {error}") from error
    rules = {name: entry.expansion for name, entry in manifest.tensors.items() if entry.expansion is not None}
    expansions(gm).update(rules)
    return StoredModel(
        graph_module=gm,
        metadata=manifest.metadata,
        input_signature=manifest.input_signature,
        sizes=_sizes(folder),
        vectors=load_file(folder / VECTORS) if VECTORS in manifest.files else None,
    )


def _sizes(folder: Path) -> ArtifactSize:
    manifest, graph, weights = ((folder / name).stat().st_size for name in (MANIFEST, GRAPH, WEIGHTS))
    return ArtifactSize(manifest_bytes=manifest, graph_bytes=graph, weights_bytes=weights)


def _check_replaceable(target: Path) -> None:
    """Check that a folder may be replaced: it is empty, or holds only files of a saved model."""
    if not target.exists():
        return
    names = {path.name for path in target.iterdir() if not is_unfinished(path)} if target.is_dir() else {target.name}
    foreign = sorted(names - {MANIFEST, GRAPH, WEIGHTS, VECTORS, *BESIDE})
    if foreign or (names and not is_manifest(target / MANIFEST)):
        found = f"it holds {foreign[0]!r}" if foreign else f"its {MANIFEST} is not ours"
        raise ArtifactError(
            f"{target} exists and is not a saved {FORMAT} model ({found}); save to another folder, or remove it first"
        )


def _check_present(folder: Path) -> None:
    if not folder.is_dir():
        hint = "".join(f"; an interrupted save left the former model as {p}, rename it back" for p in set_aside(folder))
        raise ArtifactError(f"there is no folder {folder}{hint or '; check the path, or save the model there'}")
    if not (folder / MANIFEST).is_file() and _is_diffusers(folder):
        raise ArtifactError(
            f"{folder} is a float diffusers model, not a quantized one; quantize it first: "
            f"{FORMAT} quantize RECIPE --model {folder} --output ANOTHER"
        )
    for name in (MANIFEST, GRAPH, WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} has no {name}; the folder is not a complete {FORMAT} model, copy it again")


def _is_diffusers(folder: Path) -> bool:
    """Whether it is the folder of a diffusers pipeline or model."""
    return any((folder / name).is_file() for name in ("model_index.json", "config.json"))


def _cannot_write(target: Path, error: OSError, needed: int) -> ArtifactError:
    if error.errno not in _NO_ROOM:
        return ArtifactError(f"cannot write {target}: {because(error)}; choose a folder that you may write to")
    existing = next(path for path in target.parents if path.exists())
    return ArtifactError(
        f"no room to save the model as {target} ({os.strerror(error.errno)}): it takes {needed} bytes, and "
        f"{shutil.disk_usage(existing).free} are free there; make room, or save to another disk. Nothing was changed"
    )
