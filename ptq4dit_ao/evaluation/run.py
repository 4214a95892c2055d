"""Evaluation of a quantized model: first paired with its float model, then by the distribution of its images.

Paired metrics compare both models on equal inputs, or equal noise. They show the effect of quantization with little
statistical noise. Distances to a reference set show the effect on image quality, and need many images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from ptq4dit_ao._paths import as_path, check_file
from ptq4dit_ao._progress import OnStage, ignore, of_stage
from ptq4dit_ao.calibration import Sampling
from ptq4dit_ao.choices import LpipsNetwork
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.baseline import baseline_of, given_reference_features, network_for
from ptq4dit_ao.evaluation.environment import environment
from ptq4dit_ao.evaluation.result import EvaluationResult
from ptq4dit_ao.lowering.backend import choose_backend
from ptq4dit_ao.metrics import ReferenceStatistics
from ptq4dit_ao.metrics.perceptual import check_lpips
from ptq4dit_ao.workflow.correction import correction_for
from ptq4dit_ao.workflow.image_sampling import NOISE_SEED, ImageSampling, decoder
from ptq4dit_ao.workflow.models import LoadedModel, load_model
from ptq4dit_ao.workflow.quantized_model import QuantizedModel, load_quantized
from ptq4dit_ao.workflow.samples import check_recording, recorded_samples

CORRECTED = "images are drawn with the noise corrected in the scheduler (PTQD); eps SQNR is the model's own"
"""Note on results with noise correction."""


@torch.no_grad()
def evaluate(
    directory: str | Path,
    model: str | None = None,
    *,
    backends: Sequence[str] = ("reference",),
    samples: int = 200,
    steps: int = 50,
    sampler: str | None = None,
    seed: int = NOISE_SEED,
    features: str | None = None,
    reference: str | Path | None = None,
    cache: str | Path | None = None,
    lpips: LpipsNetwork | None = None,
    on_progress: OnStage = ignore,
) -> EvaluationResult:
    """Evaluate a saved quantized model that has a description of how to sample it.

    Args:
        directory: folder that ``save_quantized`` wrote.
        model: the float model, as for :func:`load_model`. The default is the model that the recipe names.
        backends: backends that execute the quantized model, with a result each.
        samples: number of images per model, of all classes in turn.
        steps: number of sampling steps.
        sampler: ``ddim``, or ``ddpm`` as in the DiT authors' code; ``flow`` for models that predict velocity. The
            default is the sampler of the recipe.
        seed: seed of the images' noise and of the intervals. The predicted noise is compared on the recipe's evaluation
            samples.
        features: feature network, as for :func:`load_features`. By default the shipped models use their classifiers,
            and no distances are measured for other models.
        reference: reference set, as for :func:`read_reference`. By default it is scikit-learn's digits for the shipped
            digits model, if scikit-learn is installed, and the float model's images otherwise.
        cache: a file for the statistics of the reference set. It is read if it exists.
        lpips: a network to compare images with, too, see :func:`~ptq4dit_ao.metrics.lpips`.
        on_progress: called with ``(stage, done, total)`` as stages advance.

    Raises:
        ArgumentError: the float model or its sampling is unknown, the model has latents and no VAE, or an option is
            wrong.
        PTQ4DiTError: see :func:`load_quantized`, :func:`load_model` and :func:`~ptq4dit_ao.lower`.
    """
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if value < least:
            raise ArgumentError(f"{name} is {value}; it must be at least {least}")
    for name in backends:
        choose_backend(name)  # before the long part, which a wrong name would waste
    if not backends:
        raise ArgumentError("there are no backends; give at least one, such as 'reference'")
    kept = None if cache is None else as_path(cache, "cache")
    if kept is not None and not kept.exists():
        check_file(kept)
    quantized = load_quantized(directory)
    recipe = quantized.recipe
    loaded, sampling = _float_model(directory, quantized, model, sampler)
    sampling.check_steps(steps)
    check_recording(loaded, recipe, ["evaluation"])
    image_sampling = ImageSampling(
        sampling=sampling,
        samples=samples,
        steps=steps,
        guidance=recipe.calibration.guidance,
        seed=seed,
        decode=decoder(loaded, sampling),
    )
    if lpips is not None:
        check_lpips(lpips, image_sampling.pixels)
    network = network_for(loaded, features, reference or kept, samples)
    if kept is not None and kept.exists() and network is not None:
        ReferenceStatistics.load(kept).check(str(kept), network.name)
    given = given_reference_features(loaded, network, reference, kept, of_stage(on_progress, "reference set"))
    lowered = [quantized.lower(name) for name in dict.fromkeys(backends)]
    correction = correction_for(directory, loaded, quantized, steps, of_stage(on_progress, "fit correction"))
    recorded = recorded_samples(loaded, recipe, evaluate=True, on_progress=on_progress)
    baseline = baseline_of(loaded, image_sampling, network, given, kept, on_progress=on_progress)
    rows = [baseline.row(run, recipe, recorded, correction, on_progress, lpips=lpips) for run in lowered]
    measure = baseline.reference_features
    return EvaluationResult(
        model=loaded.name,
        rows=(baseline.float_row, *rows),
        network=None if network is None else network.name,
        is_inception=network is not None and network.is_inception,
        lpips=lpips,
        reference=None if measure is None else measure.name,
        reference_images=None if measure is None else len(measure.statistics.pooled),
        samples=samples,
        steps=steps,
        sampler=sampling.sampler,
        guidance=image_sampling.guidance,
        seed=seed,
        eps_seed=recipe.evaluation.seed,
        notes=baseline.notes if correction is None else (*baseline.notes, CORRECTED),
        environment=environment(),
    )


def _float_model(
    directory: str | Path, quantized: QuantizedModel, spec: str | None, sampler: str | None
) -> tuple[LoadedModel, Sampling]:
    if quantized.sampling is None:
        raise ArgumentError(
            f"{directory} was saved without the way to sample it, so no images can be compared; compare predictions "
            "with ptq4dit_ao.metrics.paired_error"
        )
    spec = spec or quantized.recipe.model
    if spec is None:
        raise ArgumentError(f"{directory} does not know its float model; say which (model=...)")
    sampling = quantized.sampling.by(sampler)
    loaded = load_model(spec)
    if loaded.sampling is not None and (found := _shape(loaded.sampling)) != (expected := _shape(sampling)):
        raise ArgumentError(
            f"{directory} was quantized from a model of {expected}; {spec} is one of {found}; give its float model "
            "(model=...)"
        )
    return dataclasses.replace(loaded, sampling=sampling), sampling


def _shape(sampling: Sampling) -> str:
    shape = f"{sampling.channels} x {sampling.size} x {sampling.size} and {sampling.null_label} classes"
    return f"{shape} that predicts {sampling.predicts}"
