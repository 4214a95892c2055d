"""``as_diffusers_transformer``: a quantized model as the transformer of a diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ptq4dit_ao._optional import require
from ptq4dit_ao.errors import ArgumentError, check_type
from ptq4dit_ao.lowering import LoweredModel
from ptq4dit_ao.workflow.quantized_model import QuantizedModel

if TYPE_CHECKING:
    from ptq4dit_ao.workflow.diffusers_transformer import QuantizedTransformer


def as_diffusers_transformer(
    quantized: QuantizedModel | LoweredModel,
    config: Mapping[str, Any] | str | Path | None = None,
    *,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> QuantizedTransformer:
    """Make a module for ``pipe.transformer = ...``, with the call and the attributes of the diffusers model.

    Args:
        quantized: a quantized or lowered model that was captured from a diffusers model.
        config: the ``config`` of the diffusers model, its folder, or the folder of its pipeline. The quantized model
            stores its own. It is needed only for a class that diffusers does not know: give the ``config`` of the
            diffusers class that it derives from.
        backend: backend to lower a :class:`~ptq4dit_ao.QuantizedModel` to; see :func:`~ptq4dit_ao.lower`.
        dtype: dtype of the pipeline's other components, which may have 16 bits while the graph computes in 32. The
            default is the dtype of the graph.

    Raises:
        ArgumentError: it was not captured from a diffusers model, or the configuration is not that of a diffusers
            model.
        LoweringError: the backend cannot run it.
        MissingDependencyError: diffusers is not installed.
    """
    check_type("quantized", quantized, (QuantizedModel, LoweredModel), "what apply_recipe or load_quantized returned")
    if quantized.captured is None:
        raise ArgumentError(
            "this quantized model does not know how its transformer was called: it was not captured from a diffusers "
            "model; quantize one with apply_recipe, which keeps that"
        )
    remembered = quantized.captured.config
    original = _original({"_class_name": remembered["_class_name"], **_configuration(config)} if config else remembered)
    from ptq4dit_ao.workflow.diffusers_transformer import QuantizedTransformer

    lowered = quantized.lower(backend) if isinstance(quantized, QuantizedModel) else quantized
    return QuantizedTransformer(lowered, original, quantized.captured.call, dtype)


def _original(config: Mapping[str, Any]) -> Any:
    """The diffusers model that a configuration describes, on the meta device."""
    diffusers = require("diffusers", extra="diffusers")
    name = config["_class_name"]
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise ArgumentError(
            f"the configuration is of the class {name!r}, which is no model of diffusers {diffusers.__version__}; give "
            "the config of the class of diffusers that it comes from, with its '_class_name'"
        )
    try:
        with torch.device("meta"):
            return kind.from_config(config).eval()  # type: ignore[attr-defined]
    except Exception as error:  # whatever a constructor makes of wrong values
        raise ArgumentError(f"no {name} can be built from its configuration: {error}; is it damaged?") from error


def _configuration(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """The configuration itself, or that in a folder's ``config.json`` or ``transformer/config.json``."""
    if isinstance(config, Mapping):
        return config
    paths = [Path(config) / "config.json", Path(config) / "transformer" / "config.json"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ArgumentError(
            f"folder {config} has neither config.json nor transformer/config.json; give that of the float transformer "
            "or of its pipeline"
        )
    try:
        return {**json.loads(path.read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(f"{path} is not the configuration of a diffusers model: {error}") from error
