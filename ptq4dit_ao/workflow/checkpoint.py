"""``balance_checkpoint``: balance a float checkpoint, so that any quantizer can use it. The architecture stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao._files import is_unfinished, replacing_folder
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._paths import as_path, because, check_room, check_writable
from ptq4dit_ao._progress import OnStage, ignore
from ptq4dit_ao.capture.export import call_like
from ptq4dit_ao.errors import ArgumentError, ArtifactError
from ptq4dit_ao.passes import ModuleBalance, balance_module, collect_salience
from ptq4dit_ao.passes.verify import floating_outputs, relative_error
from ptq4dit_ao.quantizer.overrides import plan_layers
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow.apply import SHUFFLE_SEED
from ptq4dit_ao.workflow.checks import check_overrides
from ptq4dit_ao.workflow.exported import EXAMPLE_ROWS, export_for
from ptq4dit_ao.workflow.from_recipe import balance_settings, overrides_of, site_policy
from ptq4dit_ao.workflow.models import LoadedModel
from ptq4dit_ao.workflow.samples import check_recording, recorded_samples

REPORT = "balance_report.json"
"""Name of the report in the checkpoint's folder."""


@own_modes()
def balance_checkpoint(
    model: LoadedModel,
    recipe: Recipe,
    output: str | Path,
    *,
    samples: str | Path | None = None,
    on_progress: OnStage = ignore,
) -> ModuleBalance:
    """Balance a model in its own parameters and save it with ``save_pretrained``, atomically.

    Args:
        model: the float model. It is changed in place.
        recipe: its ``balance`` and ``calibration`` sections, and overrides with ``balance: false``, are used. Layers
            that the recipe leaves float are balanced, too, because the next quantizer may quantize them.
        output: a folder that does not exist or is empty, for the checkpoint and ``balance_report.json``.
        samples: a file of recorded calibration samples. The default is to record some from the model's pipeline.
        on_progress: called with ``(stage, done, total)`` as stages advance.

    Raises:
        ArgumentError: the folder is not empty, or the recipe does not balance.
        PTQ4DiTError: see :func:`~ptq4dit_ao.collect_salience` and :func:`~ptq4dit_ao.balance_module`.
    """
    folder = as_path(output, "output").resolve()
    settings = replace(balance_settings(recipe), stored_dtype=model.stored_dtype)
    policy = replace(site_policy(recipe), vector_multiply=False)  # a checkpoint has no place for the multiplied vector
    check_empty(folder)
    check_room(folder, _bytes_of(model))
    if samples is None:
        check_recording(model, recipe, ("calibration",))
    check_overrides(model.transformer, recipe)
    recorded = recorded_samples(model, recipe, samples, on_progress=on_progress)
    exported = export_for(model.transformer, recorded)
    plans = plan_layers(exported, weight_bits=8, activation_bits=8, overrides=overrides_of(recipe))
    exclude = [plan.layer for plan in plans.values() if not plan.balance]
    number = recorded.num_batches(recipe.calibration.rows)

    def counted() -> Iterator[tuple[Tensor, ...]]:
        shuffled = recorded.shuffled(SHUFFLE_SEED)
        for done, batch in enumerate(shuffled.batches(recipe.calibration.rows), start=1):
            yield batch
            on_progress("measure salience", done, number)

    statistics = collect_salience(exported, counted(), exclude=exclude, policy=policy)
    on_progress("balance", 0, 1)
    example = next(recorded.batches(EXAMPLE_ROWS))
    before = _outputs(model, exported, example)
    result = balance_module(model.transformer, exported, statistics, settings, exclude=exclude, policy=policy)
    if model.stored_dtype is not None:
        dtype = next(model.transformer.parameters()).dtype
        model.transformer.to(model.stored_dtype).to(dtype)  # round the parameters as they will be stored
        result = replace(result, output_change=relative_error(before, _outputs(model, exported, example)))
    on_progress("balance", 1, 1)
    _save(model, recipe, result, folder)
    return result


def check_empty(folder: Path) -> None:
    """Check before the work that a checkpoint can be written to a folder.

    Raises:
        ArgumentError: the folder is not empty, or cannot be written.
    """
    check_writable(folder)
    if folder.exists() and (not folder.is_dir() or any(not is_unfinished(path) for path in folder.iterdir())):
        raise ArgumentError(f"{folder} exists and is not an empty folder; choose another, nothing is overwritten")


def _bytes_of(model: LoadedModel) -> int:
    """Size of the transformer as it will be stored, in bytes."""
    parameters = list(model.transformer.parameters())
    return sum(p.numel() * (model.stored_dtype or p.dtype).itemsize for p in parameters)


@torch.no_grad()
def _outputs(model: LoadedModel, exported: GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return floating_outputs(call_like(exported, model.transformer, inputs))


def _save(model: LoadedModel, recipe: Recipe, result: ModuleBalance, folder: Path) -> None:
    """Write to a folder beside it, then rename, so that an interrupted save leaves nothing behind.

    The transformer is stored in the dtype it had. The other parts of a pipeline are copied unchanged.
    """
    transformer: Any = model.transformer.to(model.stored_dtype) if model.stored_dtype else model.transformer
    try:
        with replacing_folder(folder) as partial:
            if model.folder is not None and (model.folder / "model_index.json").is_file():
                others = shutil.ignore_patterns("transformer")
                shutil.copytree(model.folder, partial, ignore=others, dirs_exist_ok=True)
                partial.chmod(0o755)
                transformer.save_pretrained(partial / "transformer", safe_serialization=True)
            else:
                transformer.save_pretrained(partial, safe_serialization=True)
            (partial / REPORT).write_text(json.dumps(balance_report(result, recipe), indent=1, allow_nan=False) + "\n")
            check_empty(folder)
    except (SafetensorError, OSError) as error:
        reason = because(error) if isinstance(error, OSError) else str(error)
        raise ArtifactError(f"{folder} cannot be written: {reason}; nothing was left behind") from error


def balance_report(result: ModuleBalance, recipe: Recipe) -> dict[str, Any]:
    """Report of the balancing, as JSON."""
    return {
        "recipe": recipe.to_dict(),
        "output_change": result.output_change,
        "balanced": [
            {
                "site": name,
                "layers": list(dict.fromkeys(consumer.layer for consumer in outcome.site.consumers)),
                "variables": outcome.site.num_variables,
                "channels": outcome.site.channels,
                "b_min": float(outcome.b.min()),
                "b_max": float(outcome.b.max()),
                "num_clipped": int(outcome.clipped.sum()),
            }
            for name, outcome in result.outcomes.items()
        ],
        "left": result.left,
        "unread": list(result.unread),
    }
