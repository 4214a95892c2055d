"""Registration of the format ``ptq4dit`` with diffusers, now or when diffusers is imported.

Neither diffusers nor torch is imported for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "ptq4dit"
TABLES = "diffusers.quantizers.auto"
"""The module of diffusers that knows its quantizers."""


def register() -> None:
    """Register the format, once."""
    if TABLES in sys.modules:
        _fill(sys.modules[TABLES])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Config:
    """Stand-in for the configuration's class, which is imported at its first use."""

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        return _home().PTQ4DiTConfig.from_dict(*args, **kwargs)


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    return _home().PTQ4DiTHfQuantizer(*args, **kwargs)


def _home() -> Any:
    return importlib.import_module("ptq4dit_ao.modules.diffusers_quantizer")


def _fill(tables: ModuleType) -> None:
    for table, value in (("AUTO_QUANTIZER_MAPPING", _quantizer), ("AUTO_QUANTIZATION_CONFIG_MAPPING", _Config)):
        getattr(tables, table).setdefault(METHOD, value)


class _Finder(MetaPathFinder):
    """Finder that waits for diffusers' tables, and leaves when they are there."""

    _searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec


class _Then(Loader):
    """Loader that fills the tables after another loader has made them."""

    def __init__(self, loader: Loader, finder: MetaPathFinder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _fill(module)
        sys.meta_path.remove(self._finder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
