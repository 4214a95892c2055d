"""The main job: calibrate, balance, convert, evaluate, save."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao._atomic import remove_folder, replace_text
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path, check_room, check_writable
from ptq4dit_ao.artifact import ArtifactSize, check_target
from ptq4dit_ao.calibration import CalibrationSamples, as_denoiser
from ptq4dit_ao.calibration.sampling import Denoiser
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.float_model import check_float_module, check_in_memory
from ptq4dit_ao.errors import ArtifactError
from ptq4dit_ao.lowering import quantized_linears
from ptq4dit_ao.metrics import paired_error
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.report import build_report, write_html
from ptq4dit_ao.workflow.apply import EXAMPLE_ROWS, Stopwatch, apply_recipe, on_device_of, warn_of_dtype
from ptq4dit_ao.workflow.checks import check_overrides, least_bytes
from ptq4dit_ao.workflow.correction import FILE as CORRECTION
from ptq4dit_ao.workflow.correction import check_correction, fit_correction
from ptq4dit_ao.workflow.diagnostics import diagnose, timestep_position
from ptq4dit_ao.workflow.image_sampling import decoder, draw_images, vae_of
from ptq4dit_ao.workflow.models import LoadedModel
from ptq4dit_ao.workflow.quantized_model import QuantizedModel, write_model
from ptq4dit_ao.workflow.samples import OnProgress, check_recording, recorded_samples

GRID_CLASSES = GRID_PER_CLASS = 10
LATENT_GRID_CLASSES = 8
"""Images of models that need a VAE are large, and few are enough."""


@own_modes()
def quantize(
    model: LoadedModel,
    recipe: Recipe,
    output: str | Path,
    *,
    samples: str | Path | None = None,
    grids: bool = True,
    on_progress: OnProgress = lambda *_: None,
) -> QuantizedModel:
    """Quantize a diffusion transformer and save it with its report.

    Args:
        model: the float model.
        recipe: what to do.
        output: folder for the artifact, ``report.json`` and ``report.html``; ``ptqd.safetensors``, where the recipe
            corrects the noise. Layers that are rounded one after another, and what distillation has learned,
            are kept in ``OUTPUT.rounding`` until it is written; after a kill, the same call goes on from there.
        samples: recorded calibration samples; else the model's pipeline draws them. Recorded samples are also what
            the error is measured on.
        grids: draw images with both models for the report.
        on_progress: called as stages advance.

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
    exported = export_transformer(model.transformer, on_device_of(model.transformer, recorded.example(EXAMPLE_ROWS)))
    clock.lap("export")
    batches = -(-len(recorded) // recipe.calibration.rows)
    quantized = apply_recipe(
        exported,
        recipe,
        recorded,
        name=model.name,
        on_sample=lambda done: on_progress("calibrate", done, batches),
        on_layer=lambda done, total: on_progress("round", done, total),
        on_step=lambda done, total: on_progress("distill", done, total),
        on_choice=lambda done, total: on_progress("choose bits", done, total),
        resume=resume,
    )
    quantized = dataclasses.replace(quantized, sampling=model.sampling)
    clock.lap("quantize")
    evaluation = _evaluate(exported, quantized, evaluated, on_calibration=samples is not None)
    diagnostics = diagnose(
        exported,
        quantized.graph,
        evaluated,
        rows=recipe.calibration.rows,
        without_one=recipe.evaluation.leave_one_out,
        on_progress=on_progress,
    )
    correction = fit_correction(
        model, quantized, recipe.calibration.steps, lambda done, total: on_progress("fit correction", done, total)
    )
    images = _grids(model, quantized, correction, on_progress) if grids else None
    clock.lap("evaluate")
    report = build_report(
        quantized.graph,
        title=quantized.report["title"],
        recipe=quantized.recipe.to_dict(),
        model=quantized.report["model"],
        seconds={**quantized.report["seconds"], **clock.seconds},
        evaluation=evaluation,
        diagnostics=diagnostics,
        weight_bits=quantized.report["weight_bits"],
    )
    on_progress("save", 0, 1)
    quantized = dataclasses.replace(quantized, report=report)

    def beside(folder: Path, size: ArtifactSize) -> None:
        if correction is not None:
            correction.save(folder / CORRECTION)
        report["size"] = size_of(model.transformer, quantized, size.total_bytes)
        write_report(report, folder, images)

    write_model(quantized, output, beside)
    on_progress("save", 1, 1)
    if resume is not None:
        remove_folder(resume)
    return quantized


def _checked(model: LoadedModel, recipe: Recipe, output: Path, resume: Path | None, draws: bool) -> LoadedModel:
    """The model with the recipe's sampler, once all that is known before the work has been asked."""
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


def _evaluate(
    exported: GraphModule, quantized: QuantizedModel, samples: CalibrationSamples, *, on_calibration: bool
) -> dict[str, object]:
    """Error of the simulated integer graph's output."""
    rows = quantized.recipe.calibration.rows
    batches = (on_device_of(exported, batch) for batch in samples.batches(rows))
    error = paired_error(exported, quantized.graph, batches, timestep_index=timestep_position(exported))
    return {
        "sqnr_db": error.sqnr_db,
        "per_timestep": [[t, db] for t, db in error.per_timestep.items()],
        "samples": error.rows,
        "seed": quantized.recipe.evaluation.seed,
        "on_calibration_samples": on_calibration,
    }


def _grids(
    model: LoadedModel, quantized: QuantizedModel, correction: NoiseCorrection | None, on_progress: OnProgress
) -> tuple[Tensor, Tensor] | None:
    """Samples of the float and the quantized model from equal noise, if the model draws images or has a VAE."""
    sampling = model.sampling
    if sampling is None or (sampling.channels not in (1, 3) and vae_of(model) is None):
        return None
    decode = decoder(model, sampling)
    classes, per_class = (GRID_CLASSES, GRID_PER_CLASS) if decode is None else (LATENT_GRID_CLASSES, 1)
    labels = torch.arange(min(classes, sampling.null_label)).repeat_interleave(per_class)
    steps = quantized.recipe.calibration.steps
    corrected = None if correction is None else PTQDScheduler(sampling.scheduler(steps), correction)

    def draw(stage: str, denoiser: Denoiser, scheduler: PTQDScheduler | None = None) -> Tensor:
        return draw_images(
            denoiser,
            sampling,
            labels,
            steps=steps,
            guidance=quantized.recipe.calibration.guidance,
            seed=quantized.recipe.evaluation.seed,
            scheduler=scheduler,
            decode=decode,
            on_step=lambda done, total: on_progress(stage, done, total),
        )

    return draw("sample float", as_denoiser(model.transformer)), draw("sample quantized", quantized.graph, corrected)


def size_of(model: nn.Module, quantized: QuantizedModel, artifact_bytes: int) -> dict[str, object]:
    """Bytes before and after: of the whole model, and of the layers that were quantized."""
    float32 = 4 * sum(p.numel() for p in model.parameters())
    linears = quantized_linears(quantized.graph)
    weights = {linear.weight.data_ptr(): linear for linear in linears}.values()
    before = sum(4 * (w.weight.numel() + len(w.weight)) for w in weights)
    after = sum(w.weight.numel() * (1 if w.weight_range[1] > 7 else 0.5) + 8 * len(w.weight) for w in weights)
    return {
        "float32_bytes": float32,
        "artifact_bytes": artifact_bytes,
        "ratio": artifact_bytes / float32,
        "quantized_layers_float32_bytes": before,
        "quantized_layers_bytes": int(after),
        "quantized_layers_ratio": after / before,
    }


def write_report(report: dict[str, object], folder: Path, images: tuple[Tensor, Tensor] | None) -> None:
    """``report.json`` and ``report.html`` beside the artifact."""
    replace_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False))
    float_images, quantized_images = images or (None, None)
    write_html(report, folder / "report.html", float_images=float_images, quantized_images=quantized_images)
