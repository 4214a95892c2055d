"""Environment of a measurement: processor, threads, versions and commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

import ptq4dit_ao
from ptq4dit_ao._version import __version__, installed_version

PACKAGES = ("torch", "torchao", "diffusers", "openvino", "nncf", "onnxruntime")
"""Packages whose versions are reported."""


def environment() -> dict[str, object]:
    """Environment of this process as JSON, to be reported with every measurement."""
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed_version(name)) is not None},
        "ptq4dit-ao": commit() or __version__,
    }


def one_line(about: Mapping[str, object]) -> str:
    """Text of an :func:`environment`, perhaps with more entries, in one line. Entries that are None are left out."""
    versions = about["versions"]
    assert isinstance(versions, Mapping)
    flat = {**{name: value for name, value in about.items() if name != "versions"}, **versions}
    return ", ".join(f"{name} {value}" for name, value in flat.items() if value is not None)


def commit() -> str | None:
    """Commit that this package runs from, with ``-dirty`` if files differ from it; None outside a git checkout."""
    folder = Path(ptq4dit_ao.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def has_native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 without converting it to float32 first."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resident_mb() -> float | None:
    """Resident memory of this process in MB (VmRSS); None where the system does not report it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024 / 1e6
