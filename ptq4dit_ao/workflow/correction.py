"""PTQD's correction of a quantized model's noise: fitted as the recipe says, kept beside the model, or fitted anew."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.fx import GraphModule

from ptq4dit_ao._paths import as_path
from ptq4dit_ao._progress import OnProgress, ignore
from ptq4dit_ao.calibration import Sampling, as_denoiser
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler, fit_noise_correction
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow.models import LoadedModel
from ptq4dit_ao.workflow.quantized_model import QuantizedModel

FILE = "ptqd.safetensors"


def fit_correction(
    model: LoadedModel, quantized: GraphModule, recipe: Recipe, steps: int, on_progress: OnProgress = ignore
) -> NoiseCorrection | None:
    """Fit the correction that the recipe asks for, if it does, for a sampler of so many steps.

    Raises:
        ArgumentError: see :func:`check_correction`.
        CalibrationError: see :func:`~ptq4dit_ao.ptqd.fit_noise_correction`.
    """
    settings, guidance = recipe.noise_correction, recipe.calibration.guidance
    if not settings.images:
        return None
    check_correction(model, recipe)
    assert model.sampling is not None
    return fit_noise_correction(
        as_denoiser(model.transformer),
        quantized,
        model.sampling,
        torch.arange(settings.images) % model.sampling.null_label,
        steps=steps,
        guidance=guidance,
        generator=torch.Generator().manual_seed(settings.seed),
        on_progress=on_progress,
    )


def check_correction(model: LoadedModel, recipe: Recipe) -> None:
    """Ask before a long computation whether the recipe's correction can be fitted.

    Raises:
        ArgumentError: the model is not drawn by class.
    """
    if recipe.noise_correction.images and model.sampling is None:
        raise ArgumentError(
            f"the recipe corrects the noise (noise_correction.images {recipe.noise_correction.images}), but "
            f"{model.name} is not drawn by class; fit one with ptq4dit_ao.ptqd for its own pipeline, and leave that out"
        )


def correction_for(
    directory: str | Path,
    model: LoadedModel,
    quantized: QuantizedModel,
    steps: int,
    on_progress: OnProgress = ignore,
) -> NoiseCorrection | None:
    """The correction kept with a saved model; if that is of other timesteps or guidance, one fitted anew."""
    kept = _kept(directory, quantized)
    if kept is not None and model.sampling is not None and model.sampling.sampler == _sampler(quantized):
        timesteps = model.sampling.scheduler(steps).timesteps.tolist()
        if kept.serves(timesteps, quantized.recipe.calibration.guidance):
            return kept
    return fit_correction(model, quantized.graph, quantized.recipe, steps, on_progress)


def corrected_scheduler(
    directory: str | Path, quantized: QuantizedModel, sampling: Sampling, steps: int, guidance: float
) -> PTQDScheduler | None:
    """A scheduler with the correction kept with a saved model, or None if its recipe asks for none.

    Raises:
        ArgumentError: it is of other timesteps or guidance, or is not there.
    """
    kept = _kept(directory, quantized)
    if kept is None:
        if quantized.recipe.noise_correction.images:
            raise ArgumentError(f"{directory} lacks {FILE}, which corrects its noise; quantize again")
        return None
    own = _sampler(quantized)
    if sampling.sampler != own or not kept.serves(sampling.scheduler(steps).timesteps.tolist(), guidance):
        raise ArgumentError(
            f"the noise correction of {directory} is for {kept.steps} steps of {own.upper()} and guidance "
            f"{kept.guidance:g}, not for {steps} of {sampling.sampler.upper()} and {guidance:g}; sample with these, or "
            "quantize for those"
        )
    return PTQDScheduler(sampling.scheduler(steps), kept)


def _kept(directory: str | Path, quantized: QuantizedModel) -> NoiseCorrection | None:
    path = as_path(directory, "directory") / FILE
    return NoiseCorrection.load(path) if quantized.recipe.noise_correction.images and path.exists() else None


def _sampler(quantized: QuantizedModel) -> str:
    """What a saved model was calibrated with, and its correction fitted."""
    return "ddim" if quantized.sampling is None else quantized.sampling.sampler
