"""Calibration and evaluation samples that a recipe asks for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ptq4dit_ao._progress import OnStage, ignore, of_stage
from ptq4dit_ao.calibration import (
    CalibrationSamples,
    NormalTimesteps,
    SamplingPipeline,
    check_timesteps,
    collect_from_pipeline,
)
from ptq4dit_ao.capture.float_model import device_of
from ptq4dit_ao.errors import CalibrationError, PTQ4DiTError
from ptq4dit_ao.recipe import NormalDraw, Recipe
from ptq4dit_ao.workflow.models import LoadedModel


def recorded_samples(
    model: LoadedModel,
    recipe: Recipe,
    file: str | Path | None = None,
    *,
    evaluate: bool = False,
    on_progress: OnStage = ignore,
) -> CalibrationSamples:
    """Record the transformer's inputs from its own pipeline or the recipe's sampler, or read them from a file.

    Their batches come on the transformer's device.

    Args:
        model: the float model. It needs a pipeline, unless a file is given.
        recipe: its ``calibration`` section, and for evaluation its ``evaluation`` section, say what to record.
        file: a file that :meth:`~ptq4dit_ao.CalibrationSamples.save` wrote.
        evaluate: record the samples for evaluation instead of those for calibration.
        on_progress: called as the pipeline advances.

    Raises:
        CalibrationError: there is neither a pipeline nor a file, or the recipe has no prompts for a text pipeline.
        ArgumentError: the recipe names a sampler, and the model is not class-conditional.
    """
    if file is not None:
        return CalibrationSamples.load(file).on(device_of(model.transformer))
    pipeline, settings = _pipeline(model, recipe), recipe.evaluation if evaluate else recipe.calibration
    prompts = _prompts(model, recipe, settings.samples, settings.seed)
    _check_section(pipeline, recipe, "evaluation" if evaluate else "calibration")
    stage = "evaluation samples" if evaluate else "calibration samples"
    try:
        recorded = collect_from_pipeline(
            pipeline,
            prompts,
            timesteps=wanted_timesteps(settings.timesteps),
            steps=recipe.calibration.steps,
            guidance=recipe.calibration.guidance,
            seed=settings.seed,
            batch_size=recipe.calibration.batch_size,
            call=recipe.calibration.size,
            sizes=sizes_of(recipe),
            on_progress=of_stage(on_progress, stage),
        )
    except PTQ4DiTError:
        raise
    except Exception as error:  # whatever somebody's pipeline makes of its arguments
        raise CalibrationError(
            f"{type(pipeline).__name__} of {model.name} failed while it sampled {stage}: {type(error).__name__}: "
            f"{error}; run it by hand with the recipe's steps, guidance and sizes, or record samples (samples=...)"
        ) from error
    return recorded.on(device_of(model.transformer))


def check_recording(
    model: LoadedModel, recipe: Recipe, sections: Sequence[str] = ("calibration", "evaluation")
) -> None:
    """Check before any sampling that the samples of a recipe's sections can be recorded.

    Raises:
        CalibrationError: see :func:`recorded_samples`; or there are fewer steps than timesteps, or fewer timestep draws
            than samples.
        ArgumentError: the recipe names a sampler, and the model is not class-conditional.
    """
    pipeline = _pipeline(model, recipe)
    _prompts(model, recipe, 1, recipe.calibration.seed)
    for section in sections:
        _check_section(pipeline, recipe, section)


def _check_section(pipeline: Any, recipe: Recipe, section: str) -> None:
    settings, steps = getattr(recipe, section), recipe.calibration.steps
    timesteps = wanted_timesteps(settings.timesteps)
    check_timesteps(pipeline, timesteps, steps, call=_one_size(recipe), what=section)
    if isinstance(timesteps, NormalTimesteps):
        timesteps.deal(settings.samples, steps, settings.seed)


def _pipeline(model: LoadedModel, recipe: Recipe) -> Any:
    """The pipeline that samples the images: the model's own, or one with the sampler that the recipe names."""
    sampling = model.drawn_by(recipe.calibration.sampler).sampling
    if recipe.calibration.sampler is not None and sampling is not None:
        sampling.check_steps(recipe.calibration.steps)
        return SamplingPipeline(model.transformer, sampling)
    if model.pipeline is None:
        raise CalibrationError(
            f"{model.name} is a transformer without a pipeline to record calibration samples from; give the folder "
            "of the pipeline, or samples recorded with collect_from_pipeline (samples=...)"
        )
    return model.pipeline


def sizes_of(recipe: Recipe) -> list[dict[str, int]] | None:
    """Arguments of the pipeline's calls that set different sizes of its images; None if all have one size."""
    sizes = recipe.calibration.sizes
    return None if sizes is None else [size.arguments for size in sizes]


def _one_size(recipe: Recipe) -> dict[str, int]:
    """Arguments of a call of the pipeline that set the size of its images: one of them, where there are several."""
    return recipe.calibration.size | (sizes_of(recipe) or [{}])[0]


def wanted_timesteps(timesteps: int | Sequence[float] | NormalDraw) -> int | Sequence[float] | NormalTimesteps:
    """Timesteps of a recipe, as :func:`~ptq4dit_ao.collect_from_pipeline` takes them."""
    if isinstance(timesteps, NormalDraw):
        return NormalTimesteps(mean=timesteps.mean, std=timesteps.std, count=timesteps.count)
    return timesteps


def _prompts(model: LoadedModel, recipe: Recipe, count: int, seed: int) -> Sequence[int] | Sequence[str]:
    if model.sampling is not None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(model.sampling.null_label, (count,), generator=generator).tolist()
    if not recipe.calibration.prompts:
        raise CalibrationError(
            f"{model.name} is text-conditional, and the recipe has no calibration.prompts; list some, like "
            "those it will be used with"
        )
    return list(itertools.islice(itertools.cycle(recipe.calibration.prompts), count))
