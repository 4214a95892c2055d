"""``quantize``: the main job, from a model and a recipe to a saved artifact with its report."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao._files import remove_folder, replace_json
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path, check_room, check_writable
from ptq4dit_ao._progress import OnStage, ignore, of_stage
from ptq4dit_ao.artifact import check_target
from ptq4dit_ao.calibration import CalibrationSamples, as_denoiser
from ptq4dit_ao.calibration.sampling import Denoiser
from ptq4dit_ao.capture.float_model import check_float_module, check_in_memory
from ptq4dit_ao.errors import ArtifactError
from ptq4dit_ao.metrics import paired_error
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.report import EvaluationEntry, Report, write_html
from ptq4dit_ao.workflow.apply import Converted, Stopwatch, convert, warn_of_dtype
from ptq4dit_ao.workflow.checks import check_overrides, least_bytes
from ptq4dit_ao.workflow.correction import FILE as CORRECTION
from ptq4dit_ao.workflow.correction import check_correction, fit_correction
from ptq4dit_ao.workflow.diagnostics import diagnose, timestep_position
from ptq4dit_ao.workflow.exported import export_for
from ptq4dit_ao.workflow.image_sampling import decoder, draw_images, vae_of
from ptq4dit_ao.workflow.models import LoadedModel
from ptq4dit_ao.workflow.quantized_model import QuantizedModel, write_model
from ptq4dit_ao.workflow.samples import check_recording, recorded_samples

GRID_CLASSES = GRID_PER_CLASS = 10
"""Numbers of classes, and of images per class, in the report's grids of images."""
LATENT_GRID_CLASSES = 8
"""Number of classes in the grids of models with a VAE, one image each: their images are large."""


@own_modes()
def quantize(
    model: LoadedModel,
    recipe: Recipe,
    output: str | Path,
    *,
    samples: str | Path | None = None,
    grids: bool = True,
    on_progress: OnStage = ignore,
) -> QuantizedModel:
    """Quantize a diffusion transformer and save it with its report.

    Args:
        model: the float model.
        recipe: how to quantize it.
        output: folder for the artifact, ``report.json`` and ``report.html``, and for ``ptqd.safetensors`` if the recipe
            corrects the noise. Sequential rounding and distillation keep checkpoints in ``OUTPUT.rounding`` until the
            artifact is written. After an interruption, the same call resumes from there.
        samples: a file of recorded calibration samples. The default is to record some from the model's pipeline. If
            given, the error is measured on them, too.
        grids: sample images with both models for the report.
        on_progress: called with ``(stage, done, total)`` as stages advance.

    Raises:
        PTQ4DiTError: see :func:`~ptq4dit_ao.apply_recipe` and :func:`~ptq4dit_ao.save_quantized`.
    """
    output = as_path(output, "output").resolve()
    resume = output.with_name(f"{output.name}.rounding") if recipe.rounding.sequential else None
    model = _checked(model, recipe, output, resume, samples is None)
    clock = Stopwatch()
    recorded = evaluated = recorded_samples(model, recipe, samples, on_progress=on_progress)
    if samples is None:  # before the long part, which a wrong setting must not waste
        evaluated = recorded_samples(model, recipe, evaluate=True, on_progress=on_progress)
    clock.lap("collect samples")
    exported = export_for(model.transformer, recorded)
    clock.lap("export")
    converted = convert(exported, recipe, recorded, name=model.name, on_progress=on_progress, resume=resume)
    clock.lap("quantize")
    recipe = converted.recipe
    evaluation = evaluation_of(exported, converted, evaluated, on_calibration=samples is not None)
    diagnostics = diagnose(
        exported,
        converted.graph,
        evaluated,
        rows=recipe.calibration.rows,
        without_one=recipe.evaluation.leave_one_out,
        on_progress=on_progress,
    )
    fitting = of_stage(on_progress, "fit correction")
    correction = fit_correction(model, converted.graph, recipe, recipe.calibration.steps, fitting)
    images = _grids(model, converted, correction, on_progress) if grids else None
    clock.lap("evaluate")
    quantized = converted.quantized(
        sampling=model.sampling, evaluation=evaluation, diagnostics=diagnostics, seconds=clock.seconds
    )
    on_progress("save", 0, 1)

    def beside(folder: Path, report: Report) -> None:
        if correction is not None:
            correction.save(folder / CORRECTION)
        write_report(report, folder, images)

    quantized, _ = write_model(quantized, output, beside)
    on_progress("save", 1, 1)
    if resume is not None:
        remove_folder(resume)
    return quantized


def _checked(model: LoadedModel, recipe: Recipe, output: Path, resume: Path | None, draws: bool) -> LoadedModel:
    """Check everything that can be checked before the work, and return the model with the recipe's sampler."""
    check_float_module(model.transformer)
    check_in_memory(model.transformer)
    check_target(output)
    if resume is not None:
        check_writable(resume, ArtifactError)
        if resume.exists() and not resume.is_dir():
            raise ArtifactError(
                f"{resume} is a file, and rounded layers are kept in a folder of that name; move it away"
            )
    check_room(output, least_bytes(model.transformer, recipe), ArtifactError)
    require("matplotlib", extra="report")
    model = model.drawn_by(recipe.calibration.sampler)
    check_correction(model, recipe)
    if draws:
        check_recording(model, recipe, ("calibration", "evaluation"))
    check_overrides(model.transformer, recipe)
    warn_of_dtype(model.transformer)
    return model


def evaluation_of(
    exported: GraphModule, converted: Converted, samples: CalibrationSamples, *, on_calibration: bool
) -> EvaluationEntry:
    """Error of the output of the simulated integer graph."""
    batches = samples.batches(converted.recipe.calibration.rows)
    error = paired_error(exported, converted.graph, batches, timestep_index=timestep_position(exported))
    return {
        "sqnr_db": error.sqnr_db,
        "per_timestep": list(error.per_timestep.items()),
        "samples": error.rows,
        "seed": converted.recipe.evaluation.seed,
        "on_calibration_samples": on_calibration,
    }


def _grids(
    model: LoadedModel, converted: Converted, correction: NoiseCorrection | None, on_progress: OnStage
) -> tuple[Tensor, Tensor] | None:
    """Images of the float and the quantized model from equal noise; None for a model of latents without a VAE."""
    sampling = model.sampling
    if sampling is None or (sampling.channels not in (1, 3) and vae_of(model) is None):
        return None
    decode = decoder(model, sampling)
    classes, per_class = (GRID_CLASSES, GRID_PER_CLASS) if decode is None else (LATENT_GRID_CLASSES, 1)
    labels = torch.arange(min(classes, sampling.null_label)).repeat_interleave(per_class)
    steps = converted.recipe.calibration.steps
    corrected = None if correction is None else PTQDScheduler(sampling.scheduler(steps), correction)

    def draw(stage: str, denoiser: Denoiser, scheduler: PTQDScheduler | None = None) -> Tensor:
        return draw_images(
            denoiser,
            sampling,
            labels,
            steps=steps,
            guidance=converted.recipe.calibration.guidance,
            seed=converted.recipe.evaluation.seed,
            scheduler=scheduler,
            decode=decode,
            on_progress=of_stage(on_progress, stage),
        )

    exact, quantized = as_denoiser(model.transformer, sampling), sampling.denoiser(converted.graph)
    return draw("sample float", exact), draw("sample quantized", quantized, corrected)


def write_report(report: Report, folder: Path, images: tuple[Tensor, Tensor] | None) -> None:
    """Write ``report.json`` and ``report.html`` beside the artifact."""
    replace_json(folder / "report.json", report)
    float_images, quantized_images = images or (None, None)
    write_html(report, folder / "report.html", float_images=float_images, quantized_images=quantized_images)
