"""Models that a recipe or the command line names, loaded with what is needed to sample them."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path
from ptq4dit_ao.artifact.manifest import MANIFEST, is_manifest
from ptq4dit_ao.calibration import Sampling, SamplingPipeline
from ptq4dit_ao.errors import ArgumentError, MissingDependencyError
from ptq4dit_ao.reference import DIGITS, FASHION, FLOW, Reference, load_reference_dit
from ptq4dit_ao.workflow.by_name import call_by_name

_log = logging.getLogger(__name__)

SHIPPED = {"reference": DIGITS, "fashion": FASHION, "flow": FLOW}
"""Names of the models that come with the package, as recipes write them."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A float transformer, with what is needed to calibrate it.

    ``sampling`` is known for class-conditional DiTs. ``pipeline`` is None for a bare transformer of another kind, which
    is calibrated with recorded samples.
    """

    name: str
    transformer: nn.Module
    """The float model in eval mode, which is what gets quantized."""
    pipeline: Any | None = None
    """Pipeline that calls the transformer."""
    sampling: Sampling | None = None
    """Sampling of a class-conditional model."""
    folder: Path | None = None
    """The folder that it was loaded from, if any."""
    shipped: Reference | None = None
    """Description of the shipped model, if it comes with the package."""

    def drawn_by(self, sampler: str | None) -> LoadedModel:
        """The same model with another sampler (``sampling``); None keeps its own.

        Raises:
            ArgumentError: there is no such sampler, it does not fit the model, or the model is not class-conditional.
        """
        if sampler is None:
            return self
        if self.sampling is None:
            raise ArgumentError(
                f"{self.name} is not class-conditional, so that sampler {sampler!r} cannot be used; leave it "
                "out (calibration.sampler) to use its pipeline's own"
            )
        return replace(self, sampling=self.sampling.by(sampler))

    @functools.cached_property
    def stored_dtype(self) -> torch.dtype | None:
        """Dtype that the transformer is stored in, if it comes from a folder. It is loaded as float32."""
        if self.folder is None:
            return None
        inner = self.folder / "transformer"
        files = sorted((inner if inner.is_dir() else self.folder).glob("*.safetensors"))
        for file in files[:1]:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    dtype = tensors.get_tensor(name).dtype
                    if dtype.is_floating_point:
                        return dtype
        return None


def load_model(spec: str) -> LoadedModel:
    """Load a diffusion transformer.

    Args:
        spec: ``reference``, ``fashion`` or ``flow``, which come with the package; a folder with a diffusers pipeline
            (``model_index.json``) or a bare transformer (``config.json``); or ``package.module:function``, a function
            without arguments that returns either.

    Raises:
        ArgumentError: it is none of these.
        MissingDependencyError: diffusers is needed and not installed.
    """
    if spec in SHIPPED:
        shipped = SHIPPED[spec]
        return replace(_wrap(spec, load_reference_dit(shipped.name), shipped.sampling), shipped=shipped)
    path = as_path(spec, "model")
    if path.is_dir():
        return replace(_wrap(path.name, _from_folder(path)), folder=path)
    return _wrap(spec, call_by_name("model", spec, [*map(repr, SHIPPED), "a folder"]))


def _from_folder(path: Path) -> Any:
    diffusers = require("diffusers", extra="diffusers")
    options: dict[str, Any] = {"local_files_only": True}
    if (path / "model_index.json").is_file():
        name = _class_name(path / "model_index.json")
    elif (path / "config.json").is_file():
        name, options = _class_name(path / "config.json"), {**options, "use_safetensors": True}
    else:
        if is_manifest(path / MANIFEST):
            raise ArgumentError(f"folder {path} holds a quantized model; give the float model that it was made of")
        raise ArgumentError(
            f"folder {path} has neither model_index.json nor config.json; give the folder of a diffusers pipeline or "
            "transformer"
        )
    kind: Any = getattr(diffusers, name, None)
    if not hasattr(kind, "from_pretrained"):
        raise ArgumentError(
            f"folder {path} says it holds a {name!r}, which diffusers {diffusers.__version__} lacks; install a version "
            "that has it"
        )
    try:
        return kind.from_pretrained(path, **options)
    except ImportError as error:  # for example a tokenizer that needs another package
        raise MissingDependencyError(f"folder {path} needs a package that is not installed: {error}") from error
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:  # diffusers' errors for bad files
        raise ArgumentError(f"folder {path} cannot be loaded as a {name}: {error}") from error


def _class_name(config: Path) -> str:
    try:
        name = json.loads(config.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ArgumentError(f"{config} is not the configuration of a diffusers model: {error}") from error
    if not isinstance(name, str) or not name.isidentifier():
        raise ArgumentError(f"{config} names no class ('_class_name'); give a folder that save_pretrained wrote")
    return name


def _wrap(name: str, model: Any, sampling: Sampling | None = None) -> LoadedModel:
    transformer = getattr(model, "transformer", model)
    if not isinstance(transformer, nn.Module) or not hasattr(transformer, "config"):
        raise ArgumentError(
            f"model {name!r} is a {type(model).__name__}; expected a diffusers transformer, or a pipeline with one"
        )
    transformer.eval().requires_grad_(False)
    if sampling is None and type(transformer).__name__ == "DiTTransformer2DModel":
        sampling = Sampling.of(transformer)
    pipeline = None if model is transformer else model
    if isinstance(getattr(pipeline, "transformer_2", None), nn.Module):
        _log.warning(
            "%s has two transformers, of which this takes the first; record the second with collect_from_pipeline(..., "
            'component="transformer_2") and quantize it by itself',
            name,
        )
    if pipeline is None and sampling is not None:
        pipeline = SamplingPipeline(transformer, sampling)
    return LoadedModel(name=name, transformer=transformer, pipeline=pipeline, sampling=sampling)
