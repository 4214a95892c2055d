"""PTQD noise correction of a quantized model: fitted as the recipe says, and stored beside the model."""

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
"""Name of the correction's file in the folder of a saved model."""


def fit_correction(
    model: LoadedModel, quantized: GraphModule, recipe: Recipe, steps: int, on_progress: OnProgress = ignore
) -> NoiseCorrection | None:
    """Fit the noise correction that the recipe asks for, for a sampler of ``steps`` steps; None if it asks for none.

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
    """Check before a long computation that the recipe's noise correction can be fitted.

    Raises:
        ArgumentError: the model is not class-conditional, or does not predict noise.
    """
    if not recipe.noise_correction.images:
        return
    asked = (
        f"the recipe corrects the noise (noise_correction.images {recipe.noise_correction.images}), but {model.name}"
    )
    if model.sampling is None:
        raise ArgumentError(
            f"{asked} is not class-conditional; fit one with ptq4dit_ao.ptqd for its own pipeline, and leave that out"
        )
    if model.sampling.predicts != "noise":
        raise ArgumentError(f"{asked} predicts {model.sampling.predicts}; leave that out")


def correction_for(
    directory: str | Path,
    model: LoadedModel,
    quantized: QuantizedModel,
    steps: int,
    on_progress: OnProgress = ignore,
) -> NoiseCorrection | None:
    """The noise correction stored with a saved model; None if its recipe asks for none.

    It is fitted again if the stored one has other timesteps or another guidance scale.
    """
    kept = _kept(directory, quantized)
    if kept is not None and model.sampling is not None and model.sampling.sampler == _sampler(quantized):
        timesteps = model.sampling.scheduler(steps).timesteps.tolist()
        if kept.serves(timesteps, quantized.recipe.calibration.guidance):
            return kept
    return fit_correction(model, quantized.graph, quantized.recipe, steps, on_progress)


def corrected_scheduler(
    directory: str | Path, quantized: QuantizedModel, sampling: Sampling, steps: int, guidance: float
) -> PTQDScheduler | None:
    """A scheduler with the noise correction stored with a saved model, or None if its recipe asks for none.

    Raises:
        ArgumentError: the correction is missing, or has other timesteps or another guidance scale.
    """
    kept = _kept(directory, quantized)
    if kept is None:
        if quantized.recipe.noise_correction.images:
            raise ArgumentError(f"{directory} lacks {FILE}, its noise correction; quantize again")
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
    """Name of the sampler that a saved model was calibrated with, and its correction fitted for."""
    return "ddim" if quantized.sampling is None else quantized.sampling.sampler
