"""What is known before any work, and asked then: hours of sampling and calibration are not spent on what must fail."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ptq4dit_ao.calibration import SamplingPipeline
from ptq4dit_ao.calibration.timesteps import nearest_timestep
from ptq4dit_ao.errors import ArgumentError, CalibrationError, LoweringError, OverrideError
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.recipe import NormalDraw, Recipe
from ptq4dit_ao.workflow.models import LoadedModel


def check_sampling(model: LoadedModel, recipe: Recipe, sections: Iterable[str]) -> None:
    """Ask whether the sampler that the recipe names visits the timesteps of these of its sections.

    Raises:
        CalibrationError: it does not.
        ArgumentError: the model's schedule has fewer timesteps than the sampler is to take steps.
    """
    steps = recipe.calibration.steps
    if model.sampling is not None and steps > model.sampling.train_timesteps:
        raise ArgumentError(
            f"calibration.steps is {steps}, and {model.name} has {model.sampling.train_timesteps} timesteps; ask for "
            "fewer steps"
        )
    for section in sections:
        wanted = getattr(recipe, section).timesteps
        if isinstance(wanted, NormalDraw):
            _check_draw(wanted, recipe)
        elif isinstance(wanted, int):
            _check_count(section, wanted, steps)
        elif (visited := _visited(model, recipe)) is not None:
            _check_list(section, wanted, visited, steps)


def check_overrides(transformer: nn.Module, recipe: Recipe) -> None:
    """Ask whether every override of a recipe can match a layer.

    Whether it does match a linear layer of the graph is known when that has been captured.

    Raises:
        OverrideError: one matches nothing that has a matrix for a parameter.
    """
    names = [
        name
        for name, module in transformer.named_modules()
        if any(parameter.ndim == 2 for parameter in module.parameters(recurse=False))
    ]
    for override in recipe.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in names):
            near = difflib.get_close_matches(override.pattern, names, n=1, cutoff=0.3)
            hint = f"; the nearest layer is {near[0]!r}" if near else ""
            raise OverrideError(f"override {override.pattern!r} matches no layer of the model{hint}")


def check_dtype(transformer: nn.Module, backend: str) -> None:
    """Ask whether a backend runs models of this one's dtype.

    Raises:
        LoweringError: it does not.
    """
    carries = BACKENDS[backend].carries
    dtype = next((p.dtype for p in transformer.parameters() if p.is_floating_point()), torch.float32)
    if carries is not None and dtype not in carries.model_dtypes:
        taken, found = (
            " or ".join(str(d).removeprefix("torch.") for d in some) for some in (carries.model_dtypes, [dtype])
        )
        raise LoweringError(
            f"backend {backend!r} runs models of {taken}, and this one is {found}; call .float() on it before "
            "quantizing, or use another backend"
        )


def least_bytes(transformer: nn.Module, recipe: Recipe) -> int:
    """What a quantized model takes on disk at least: as if all its parameters were quantized."""
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    bits = min(recipe.weights.widths) if recipe.weights.bits == "auto" else recipe.weights.bits
    narrowest = min([bits, *(o.weight_bits for o in recipe.overrides if o.weight_bits is not None)])
    return parameters if narrowest > 4 else parameters // 2


def _check_draw(draw: NormalDraw, recipe: Recipe) -> None:
    images = recipe.calibration.samples
    if draw.count < images:
        raise CalibrationError(
            f"calibration.timesteps.count is {draw.count}, and calibration.samples {images}; each image needs a draw: "
            f"give a count of at least {images}"
        )


def _check_count(section: str, count: int, steps: int) -> None:
    if count > steps:
        raise CalibrationError(
            f"{section}.timesteps is {count}, and the sampler takes {steps} steps (calibration.steps); ask for fewer "
            f"timesteps ({section}.timesteps: {steps}), or for more steps"
        )


def _check_list(section: str, wanted: Sequence[float], visited: Sequence[float], steps: int) -> None:
    for t in wanted:
        try:
            nearest_timestep(visited, t)
        except CalibrationError as error:
            raise CalibrationError(
                f"{section}.timesteps: {error}, in {steps} steps (calibration.steps); name those it visits, or how many"
            ) from error


def _visited(model: LoadedModel, recipe: Recipe) -> list[float] | None:
    """The timesteps that a class-conditional model's sampler visits; of other pipelines that is known when they run."""
    if model.sampling is None:
        return None
    steps = recipe.calibration.steps
    if recipe.calibration.sampler is not None or isinstance(model.pipeline, SamplingPipeline):
        scheduler: Any = model.sampling.by(recipe.calibration.sampler).scheduler(steps)
    else:
        scheduler = copy.deepcopy(getattr(model.pipeline, "scheduler", None))
        if scheduler is None:
            return None
        scheduler.set_timesteps(steps)
    return None if scheduler.timesteps.is_floating_point() else [float(t) for t in scheduler.timesteps]
