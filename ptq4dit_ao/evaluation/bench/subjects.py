"""Subjects of a benchmark: a float and a quantized model with inputs, saved or with random parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptq4dit_ao._optional import require
from ptq4dit_ao._progress import OnStage, ignore
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.bench.peers import FloatModel
from ptq4dit_ao.evaluation.bench.random_dit import WIDTHS, random_batches, random_dit
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow.apply import apply_recipe
from ptq4dit_ao.workflow.exported import EXAMPLE_ROWS
from ptq4dit_ao.workflow.models import load_model
from ptq4dit_ao.workflow.quantized_model import QuantizedModel, load_quantized
from ptq4dit_ao.workflow.samples import recorded_samples

BATCHES = 4
"""Least number of batches that peers are calibrated on."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A float and a quantized model, with inputs for both."""

    name: str
    float_model: FloatModel
    quantized: QuantizedModel
    seed: int
    note: str = ""


def saved_subject(
    directory: str | Path,
    model: str | None = None,
    *,
    samples: str | Path | None = None,
    batch: int = 2,
    seed: int = 0,
    on_progress: OnStage = ignore,
) -> Subject:
    """Load a saved quantized model and the float model that it was made from.

    Args:
        directory: folder that ``save_quantized`` wrote.
        model: the float model, as for :func:`load_model`. The default is the model that the recipe names.
        samples: a file of recorded inputs. The default is to record some from the model's pipeline, in as many steps as
            there are batches.
        batch: number of rows of an input.
        seed: seed of the inputs.
        on_progress: called as the pipeline advances.

    Raises:
        ArgumentError: the float model is unknown, or there are too few samples for one batch.
        PTQ4DiTError: see :func:`load_quantized` and :func:`load_model`.
    """
    quantized = load_quantized(directory)
    spec = model or quantized.recipe.model
    if spec is None:
        raise ArgumentError(f"{directory} does not know its float model; say which (model=...)")
    loaded = load_model(spec)
    recipe = quantized.recipe
    one_size = recipe.calibration.sizes and recipe.calibration.sizes[:1]  # a latency is of one size
    few = {"steps": BATCHES, "timesteps": BATCHES, "samples": batch, "seed": seed, "sizes": one_size}
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=few)})
    recorded = recorded_samples(loaded, recipe, samples, on_progress=on_progress).groups[0]
    exported = export_transformer(loaded.transformer, recorded.example(EXAMPLE_ROWS))
    batches = [rows for rows in recorded.shuffled(seed).batches(batch) if len(rows[0]) == batch]
    if not batches:
        raise ArgumentError(f"{samples} holds {len(recorded)} rows, fewer than a batch of {batch}; use a smaller batch")
    float_model = FloatModel(module=loaded.transformer, exported=exported, batches=batches)
    return Subject(name=loaded.name, float_model=float_model, quantized=quantized, seed=seed)


def random_subject(
    width: str,
    blocks: int | None,
    recipe: Recipe,
    *,
    batch: int = 2,
    seed: int = 0,
    on_progress: OnStage = ignore,
) -> Subject:
    """Make a DiT of a published width with random parameters, and quantize it in memory on random inputs.

    Args:
        width: as for :func:`random_dit`.
        blocks: as for :func:`random_dit`.
        recipe: how to quantize it.
        batch: number of rows of an input.
        seed: seed of the inputs.
        on_progress: called as it is calibrated.

    Raises:
        PTQ4DiTError: see :func:`random_dit` and :func:`apply_recipe`.
    """
    require("diffusers", extra="diffusers")
    module = random_dit(width, blocks)
    batches = random_batches(BATCHES, max(batch, EXAMPLE_ROWS), seed)
    exported = export_transformer(module, batches[0])
    name = f"{width}, depth {blocks or WIDTHS[width][-1]}"
    on_progress("calibrate", 0, BATCHES)
    quantized = apply_recipe(exported, recipe, batches, name=name, on_progress=on_progress)
    timed = [tuple(tensor[:batch] for tensor in rows) for rows in batches]
    float_model = FloatModel(module=module, exported=exported, batches=timed)
    note = "random weights: speed only"
    return Subject(name=name, float_model=float_model, quantized=quantized, seed=seed, note=note)
