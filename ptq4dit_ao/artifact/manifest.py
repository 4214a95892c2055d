"""``manifest.json``: description of a saved model, with the digests of its other files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq4dit_ao._formats import json_digest
from ptq4dit_ao._version import installed_version
from ptq4dit_ao.artifact.strict import check_keys, load_json
from ptq4dit_ao.artifact.weights import StoredTensor
from ptq4dit_ao.errors import ArtifactError

FORMAT = "ptq4dit-ao"
"""Name of the format in the manifest."""
FORMAT_VERSION = 5
"""Format version that is written."""
READ_VERSIONS = (3, 4, 5)
"""Format versions that are read. In version 2, recipes had ``balance.aggregation``; version 3 had no vectors,
version 4 no weights that expand."""
MANIFEST, GRAPH, WEIGHTS = "manifest.json", "graph.json", "weights.safetensors"
"""Names of the files of a saved model."""
VECTORS = "balance.safetensors"
"""Name of the file of its balancing vectors, which only its module form needs."""
BESIDE = ("report.json", "report.html", "ptqd.safetensors")
"""Names of files that may be stored beside a model. They are not part of it."""

_KEYS = {"format", "format_version", "versions", "input_signature", "metadata", "tensors", "files"}
_DIGEST = "sha256"
_PACKAGES = ("ptq4dit-ao", "torch", "torchao")


@dataclass(frozen=True, kw_only=True)
class ArtifactSize:
    """Size of a saved model on disk, in bytes."""

    manifest_bytes: int
    graph_bytes: int
    weights_bytes: int

    @property
    def total_bytes(self) -> int:
        """Size of all files of the model, in bytes."""
        return self.manifest_bytes + self.graph_bytes + self.weights_bytes


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of the manifest except for its format and versions."""

    input_signature: list[dict[str, Any]]
    metadata: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """JSON-safe form of the manifest, with the format, the versions and its own digest."""
        doc = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "versions": {name: installed_version(name) for name in _PACKAGES},
            "input_signature": self.input_signature,
            "metadata": self.metadata,
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
            "files": dict(self.files),
        }
        return {**doc, _DIGEST: json_digest(doc)}


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest at ``path``.

    Raises:
        ArtifactError: it is damaged, altered, of something else, or of a format version that is not read here.
    """
    doc = load_json(path)
    _check_format(path, doc)
    check_keys(doc, {*_KEYS, _DIGEST}, str(path))
    if doc.pop(_DIGEST) != json_digest(doc):
        raise ArtifactError(f"{path} was altered: its sha256 is not its own; copy or save the model again")
    for key, kind in (("input_signature", list), ("metadata", dict), ("tensors", dict), ("versions", dict)):
        if not isinstance(doc[key], kind):
            raise ArtifactError(f"{path}: {key} is a {type(doc[key]).__name__}; copy or save the model again")
    vectors = {VECTORS} if isinstance(doc["files"], dict) and VECTORS in doc["files"] else set()
    check_keys(doc["files"], {GRAPH, WEIGHTS, *vectors}, f"{path}: files")
    return Manifest(
        input_signature=doc["input_signature"],
        metadata=doc["metadata"],
        tensors={name: StoredTensor.from_json(name, entry) for name, entry in doc["tensors"].items()},
        files=doc["files"],
    )


def is_manifest(path: Path) -> bool:
    """Whether ``path`` is a manifest of this package, of any version."""
    try:
        return load_json(path).get("format") == FORMAT
    except (ArtifactError, OSError):
        return False


def file_digest(path: Path) -> dict[str, Any]:
    """Size and digest of a file, ``{"bytes": size, "sha256": hex digest}``."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_digest(path: Path, expected: Any) -> None:
    """Refuse a file that differs from its digest. The size is compared first, because that is fast and tells more.

    Raises:
        ArtifactError: it differs. The message names the file.
    """
    check_keys(expected, {"bytes", "sha256"}, f"digest of {path}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ArtifactError(
            f"{path} has {size} bytes, the manifest says {expected['bytes']}; the copy is incomplete or of another "
            f"model, copy or save the model again"
        )
    if file_digest(path) != expected:
        raise ArtifactError(f"{path} was altered: its sha256 is not the manifest's; copy or save the model again")


def _check_format(path: Path, doc: dict[str, Any]) -> None:
    if doc.get("format") != FORMAT:
        raise ArtifactError(f"{path} is of format {doc.get('format')!r}, not {FORMAT!r}; point to a model saved by it")
    version = doc.get("format_version")
    if version not in READ_VERSIONS or type(version) is not int:
        raise ArtifactError(
            f"{path} has format_version {version!r}, this version reads {', '.join(map(str, READ_VERSIONS))}; "
            f"install the {FORMAT} that saved it, or quantize the model again with this one"
        )
