"""File formats that this package writes and reads, with their names, versions, digests and error messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq4dit_ao._files import replacing_file
from ptq4dit_ao._paths import as_path, because
from ptq4dit_ao.errors import PTQ4DiTError

_DIGEST = "sha256"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format. The version that is written is read, and those in :attr:`reads`."""

    name: str
    """Name of the content, such as ``salience statistics``."""
    version: int
    error: type[PTQ4DiTError]
    """Exception for files that cannot be written or read."""
    remedy: str
    """Remedy if a file cannot be read, such as ``run calibration again``."""
    reads: tuple[int, ...] = ()
    """Earlier versions that are read."""

    @property
    def tag(self) -> str:
        """Text in a file that identifies its format and version."""
        return f"ptq4dit-ao {self.name} {self.version}"

    def check(self, path: Path, found: object) -> None:
        """Compare the identification in a file with :attr:`tag`, up to versions that are read.

        Raises:
            error: the file is something else, or of another version.
        """
        name, _, version = str(found).rpartition(" ")
        if name == self.tag.rpartition(" ")[0]:
            if version in map(str, (self.version, *self.reads)):
                return
            raise self.error(
                f"{path} has {self.name} of format version {version}, and this version of ptq4dit-ao reads "
                f"{self.version}; {self.remedy}"
            )
        raise self.error(f"{path} is not a {self.name} file; check the path, or {self.remedy}")


@dataclass(frozen=True, kw_only=True)
class TensorFormat(Format):
    """A format of safetensors files, with a digest of their whole content in the metadata."""

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
        """Write a file, atomically.

        Args:
            path: the file.
            tensors: any dense tensors. Those that share memory are written twice.
            about: metadata to store beside the format and the digest.

        Raises:
            error: it cannot be written.
        """
        path = as_path(path)
        if path.is_dir():
            raise self.error(f"cannot write {self.name} to {path}: it is a folder; give the name of a file in it")
        stored = _apart(tensors)
        metadata = {**(about or {}), "format": self.tag}
        metadata[_DIGEST] = tensors_digest(stored, metadata)
        try:
            with replacing_file(path) as temporary:
                save_file(stored, temporary, metadata=metadata)
        except (OSError, SafetensorError) as problem:
            reason = f"{_because(problem)}; choose a place that you may write to"
            raise self.error(f"cannot write {self.name} to {path}: {reason}") from problem

    def read(self, path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Metadata and tensors of a file that :meth:`write` wrote.

        Raises:
            error: the file is missing, damaged or altered, of another version, or holds something else.
        """
        path = as_path(path)
        if path.is_dir():
            raise self.error(f"cannot read {self.name} from {path}: it is a folder; give the name of a file in it")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (OSError, SafetensorError) as problem:
            reason = f"{_because(problem)}; check the path, or {self.remedy}"
            raise self.error(f"cannot read {self.name} from {path}: {reason}") from problem
        self.check(path, metadata.get("format"))
        if metadata.pop(_DIGEST, None) != tensors_digest(tensors, metadata):
            raise self.error(
                f"{path} was altered: its sha256 is not that of the {self.name} in it; copy it again, or {self.remedy}"
            )
        return metadata, tensors


@dataclass(frozen=True, kw_only=True)
class JsonFormat(Format):
    """A format of JSON files: an object with its format and a digest of its content."""

    def sign(self, content: Mapping[str, object]) -> dict[str, object]:
        """The content with its format and digest."""
        said = {"format": self.tag, **content}
        return {**said, _DIGEST: json_digest(said)}

    def checked(self, path: Path, found: object) -> dict[str, object]:
        """The content of an object that :meth:`sign` made, once it is verified.

        Raises:
            error: it is something else, of another version, or was altered.
        """
        said = dict(found) if isinstance(found, Mapping) else {}
        self.check(path, said.get("format"))
        if said.pop(_DIGEST, None) != json_digest(said):
            raise self.error(f"{path} was altered: its sha256 is not its own; copy it again, or {self.remedy}")
        del said["format"]
        return said


def json_digest(doc: Mapping[str, object]) -> str:
    """SHA-256 of the content of a JSON document, independent of its layout."""
    return hashlib.sha256(json.dumps(doc, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """SHA-256 of named tensors on the CPU and their metadata."""
    digest = hashlib.sha256(json_digest(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU.

    Those that share memory with another one, which safetensors refuses, are copied.
    """
    stored: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return stored


def _because(problem: OSError | SafetensorError) -> str:
    return because(problem) if isinstance(problem, OSError) else str(problem)
