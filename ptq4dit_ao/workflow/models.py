"""What a recipe or the command line calls a model."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ptq4dit_ao._optional import require
from ptq4dit_ao.calibration import Sampling, SamplingPipeline
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.reference import SAMPLING, load_reference_dit

REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A float transformer and the pipeline that calibrates it."""

    name: str
    pipeline: Any
    sampling: Sampling

    @property
    def transformer(self) -> nn.Module:
        return self.pipeline.transformer


def load_model(spec: str) -> LoadedModel:
    """Load a class-conditional DiT.

    Args:
        spec: ``reference``; a folder with a diffusers pipeline (``model_index.json``) or a bare
            ``DiTTransformer2DModel`` (``config.json``); or ``package.module:function``, a function without arguments
            that returns either.

    Raises:
        ArgumentError: it is none of these.
        MissingDependencyError: diffusers is needed and not installed.
    """
    if spec == REFERENCE:
        return _wrap(REFERENCE, load_reference_dit(), SAMPLING)
    path = Path(spec)
    if path.is_dir():
        return _from_folder(path)
    module, colon, function = spec.partition(":")
    if colon and all(part.isidentifier() for part in module.split(".")) and function.isidentifier():
        return _wrap(spec, _call(module, function))
    raise ArgumentError(
        f"model {spec!r} is neither {REFERENCE!r}, nor a folder, nor 'package.module:function'; check its spelling"
    )


def _from_folder(path: Path) -> LoadedModel:
    diffusers = require("diffusers", extra="diffusers")
    options: dict[str, Any] = {"local_files_only": True}
    if (path / "model_index.json").is_file():
        kind = diffusers.DiTPipeline
    elif (path / "config.json").is_file():
        kind, options = diffusers.DiTTransformer2DModel, {**options, "use_safetensors": True}
    else:
        raise ArgumentError(f"folder {path} has neither model_index.json nor config.json; it is no diffusers model")
    try:
        model = kind.from_pretrained(path, **options)
    except (OSError, KeyError, RuntimeError, ValueError) as error:  # what diffusers raises for files it cannot use
        raise ArgumentError(f"folder {path} cannot be loaded as a {kind.__name__}: {error}") from error
    return _wrap(path.name, model)


def _call(module: str, function: str) -> object:
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"model '{module}:{function}' cannot be loaded: {error}") from error


def _wrap(name: str, model: Any, sampling: Sampling | None = None) -> LoadedModel:
    transformer = getattr(model, "transformer", model)
    if not isinstance(transformer, nn.Module) or not hasattr(transformer, "config"):
        raise ArgumentError(
            f"model {name!r} is a {type(model).__name__}; expected a diffusers DiT transformer, or a pipeline with one"
        )
    transformer.eval().requires_grad_(False)
    sampling = sampling or Sampling.of(transformer)
    pipeline = SamplingPipeline(transformer, sampling) if model is transformer else model
    return LoadedModel(name=name, pipeline=pipeline, sampling=sampling)
