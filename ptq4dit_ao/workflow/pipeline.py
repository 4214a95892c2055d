"""``quantize_pipeline``: whole pipelines of diffusers, recorded once, whose components become quantized modules."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn

from ptq4dit_ao._files import replacing_folder
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._optional import require
from ptq4dit_ao._paths import as_path, check_room, check_writable
from ptq4dit_ao._progress import OnStage, ignore, of_stage
from ptq4dit_ao.calibration import CalibrationSamples, NormalTimesteps, collect_components
from ptq4dit_ao.calibration.schedule import known_times
from ptq4dit_ao.capture.float_model import check_float_module, check_in_memory
from ptq4dit_ao.choices import MODULE_FORMATS, TEXT_METHODS, ModuleFormat, TextMethod
from ptq4dit_ao.core.qparams import FLOAT_BITS
from ptq4dit_ao.errors import ArgumentError, ArtifactError, RecipeError, check_choice, check_type
from ptq4dit_ao.modules.card import is_pipeline_card, pipeline_card
from ptq4dit_ao.modules.packing import PACKED_BITS
from ptq4dit_ao.modules.saving import CARD, cannot_save
from ptq4dit_ao.modules.text_encoders import quantized_text_encoder
from ptq4dit_ao.recipe import Recipe, load_recipe
from ptq4dit_ao.workflow.apply import convert
from ptq4dit_ao.workflow.exported import export_for
from ptq4dit_ao.workflow.main_job import evaluation_of
from ptq4dit_ao.workflow.module_form import to_module
from ptq4dit_ao.workflow.samples import sizes_of, wanted_timesteps

logger = logging.getLogger(__name__)


@own_modes()
def quantize_pipeline(
    pipeline: Any,
    recipes: Recipe | str | Mapping[str, Recipe | str],
    prompts: Sequence[int] | Sequence[str] | None = None,
    *,
    call: Mapping[str, object] | None = None,
    batch_size: int | None = None,
    output: str | Path | None = None,
    method: ModuleFormat | None = None,
    on_progress: OnStage = ignore,
) -> Any:
    """Quantize the denoisers of a pipeline, and its text encoders if asked for, as modules of diffusers.

    All denoisers are recorded in the same samples. The result is a pipeline like the given one, which is not changed.
    It can be used, saved (``save_pretrained``) and uploaded (``push_to_hub``) as any other, and
    ``DiffusionPipeline.from_pretrained`` opens its folder.

    Args:
        pipeline: a pipeline of diffusers in float.
        recipes: a recipe, or the name of a shipped one, for every denoiser (``transformer``, and ``transformer_2`` in
            pipelines that have one); or one for each component by its name. Components of transformers, such as
            ``text_encoder``, take ``int8_weight_only``, or ``int8_dynamic``, which also quantizes their inputs, per
            token. Denoisers' recipes agree in their ``calibration`` but for its ``timesteps``, which are out of a
            denoiser's own steps, and at most as many. ``balance.sites`` ``free`` is ``all`` here if the recipe chooses
            its balancing by the error. Where torchao's format will hold the weights, ``balance.center`` is off, and
            single layers that are ``dynamic`` keep their inputs in float, because it has no place for either: give
            ``method="ptq4dit"`` to have both with weights of 8 bits.
        prompts: class numbers or texts to record; by default the recipe's ``calibration.prompts``. The error of
            the result is measured on the same samples.
        call: more arguments for each call of the pipeline, beside those of the recipe.
        batch_size: number of prompts in a call of the pipeline, in place of the recipe's.
        output: folder to save the pipeline to, complete or not at all. An earlier result there is replaced.
        method: format of quantized denoisers on disk, as for :func:`~ptq4dit_ao.to_module`.
        on_progress: called with ``(stage, done, total)`` as stages of the components advance.

    Raises:
        ArgumentError: a component does not exist or cannot be quantized so, or the recipes differ in their calibration.
        PTQ4DiTError: see :func:`~ptq4dit_ao.collect_from_pipeline`, :func:`~ptq4dit_ao.apply_recipe` and
            :func:`~ptq4dit_ao.to_module`.
    """
    components = _components(pipeline)
    check_type("call", call, (Mapping, type(None)), "a dict of arguments of the pipeline")
    if method is not None:
        check_choice("method", method, MODULE_FORMATS)
    chosen = _chosen(pipeline, components, recipes, method)
    for name, recipe in chosen.items():
        if isinstance(recipe, Recipe):
            _check_held(name, components[name], recipe, method)
    target = None if output is None else _target(output, components, chosen)
    denoisers = {name: recipe for name, recipe in chosen.items() if isinstance(recipe, Recipe)}
    made: dict[str, nn.Module] = {
        name: quantized_text_encoder(name, components[name], recipe)
        for name, recipe in chosen.items()
        if isinstance(recipe, str)
    }
    samples = _recorded(pipeline, denoisers, prompts, dict(call or {}), batch_size, on_progress)
    for name, recipe in denoisers.items():
        made[name] = _quantized(name, components[name], recipe, samples.pop(name), method, on_progress)
    result = copy.copy(pipeline)
    result.register_modules(**made)
    if target is not None:
        on_progress("save", 0, 1)
        save_pipeline(result, target)
        on_progress("save", 1, 1)
    return result


def save_pipeline(pipeline: Any, target: Path) -> None:
    """Save a pipeline with its model card into a folder, as a whole or not at all.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    try:
        with replacing_folder(target) as folder:
            pipeline.save_pretrained(folder)
            (folder / CARD).write_text(pipeline_card(pipeline, folder), encoding="utf-8")
    except ArtifactError as error:  # of a component, in the folder that is not there any more
        raise ArtifactError(str(error).replace(str(folder), str(target))) from error
    except (OSError, SafetensorError) as error:
        raise cannot_save(target, error, "pipeline") from error


def _components(pipeline: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by name."""
    diffusers = require("diffusers", extra="diffusers")
    check_type("pipeline", pipeline, diffusers.DiffusionPipeline, "a pipeline of diffusers")
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _chosen(
    pipeline: Any,
    components: Mapping[str, nn.Module],
    recipes: Recipe | str | Mapping[str, Recipe | str],
    method: ModuleFormat | None,
) -> dict[str, Recipe | TextMethod]:
    """The recipe of each component that is quantized, or the method of a text encoder."""
    check_type("recipes", recipes, (Recipe, str, Mapping), "a recipe, its name, or a dict of them by component")
    if not isinstance(recipes, Mapping):
        names = [name for name in components if name.startswith("transformer")]
        if not names:
            raise ArgumentError(
                f"{type(pipeline).__name__} has no transformer; give a dict of recipes by component: "
                f"{', '.join(components) or 'it has none'}"
            )
        recipes = dict.fromkeys(names, recipes)
    chosen: dict[str, Recipe | TextMethod] = {}
    for name, recipe in recipes.items():
        if name not in components:
            raise ArgumentError(
                f"{type(pipeline).__name__} has no module {name!r}; it has {', '.join(components) or 'none'}"
            )
        chosen[name] = _recipe(name, components[name], recipe, method)
    if not any(isinstance(recipe, Recipe) for recipe in chosen.values()):
        raise ArgumentError("recipes names no denoiser; text encoders alone need no recording: use torchao")
    return chosen


def _recipe(name: str, module: nn.Module, recipe: Recipe | str, method: ModuleFormat | None) -> Recipe | TextMethod:
    """A component's recipe, or the method of a text encoder."""
    of_transformers = any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__)
    if of_transformers != (isinstance(recipe, str) and recipe in TEXT_METHODS):
        what = "a model of transformers" if of_transformers else f"a {type(module).__name__}"
        way_out = f"give one of {', '.join(TEXT_METHODS)}" if of_transformers else "give a recipe"
        raise ArgumentError(f"{name} is {what}, which cannot be quantized by {recipe!r}; {way_out}")
    if of_transformers:
        return cast(TextMethod, recipe)
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    check_type(f"the recipe of {name}", loaded, Recipe, "what load_recipe returned, or a name")
    check_float_module(module)
    check_in_memory(module)
    return _for_modules(name, loaded, method)


def _for_modules(name: str, recipe: Recipe, method: ModuleFormat | None) -> Recipe:
    """The recipe for quantized modules in a format.

    All sites can be balanced there at no cost. torchao's format has no offsets, and no ranges per token beside static
    ones, so that single layers with such ranges keep their inputs in float, and as they are.
    """
    balance, overrides = recipe.balance, recipe.overrides
    if balance.sites == "free" and "auto" in (balance.method, balance.alpha):
        balance = balance.model_copy(update={"sites": "all"})
    few = min(recipe.weight_widths) <= PACKED_BITS or not recipe.activation_widths <= {8, 16}
    if method == "torchao" or (method is None and not few and not recipe.activations.dynamic):
        if balance.center:
            balance = balance.model_copy(update={"center": False})
            logger.info("%s: inputs are not centred: torchao's format has no offsets (method 'ptq4dit' has)", name)
        float_input = {"dynamic": None, "activation_bits": FLOAT_BITS, "balance": False}
        overrides = tuple(o.model_copy(update=float_input) if o.dynamic else o for o in overrides)
        if overrides != recipe.overrides:
            logger.warning(
                "%s: inputs with ranges per token stay float in torchao's format (method 'ptq4dit' has them)", name
            )
    return recipe.model_copy(update={"balance": balance, "overrides": overrides})


def _check_held(name: str, module: nn.Module, recipe: Recipe, method: ModuleFormat | None) -> None:
    """Refuse, before the work, what a quantized module cannot hold and what is not done for whole pipelines."""
    bits = recipe.activation_widths
    problems = {
        "attention.quantize is true": recipe.attention.quantize,
        f"balance.fold_form is {recipe.balance.fold_form!r}": recipe.balance.fold_form == "bias",
        f"calibration.sampler is {recipe.calibration.sampler!r}": recipe.calibration.sampler is not None,
        f"noise_correction.images is {recipe.noise_correction.images}": recipe.noise_correction.images > 0,
        f"activations have {min(bits)} bits and the format is torchao": method == "torchao" and not bits <= {8, 16},
        "activations are dynamic and the format is torchao": method == "torchao" and bool(recipe.activations.dynamic),
        "balance.method is 'repq' and the format is torchao": method == "torchao" and recipe.balance.method == "repq",
    }
    problem = next((text for text, wrong in problems.items() if wrong), None)
    if problem is not None:
        raise RecipeError(
            f"the recipe of {name} cannot be followed for a quantized module: {problem}; change that, or quantize the "
            "transformer alone ('ptq4dit-ao quantize', apply_recipe)"
        )
    adapters: Any = getattr(module, "peft_config", None) or {}
    if adapters:
        raise ArgumentError(
            f"{name} has the adapter {next(iter(adapters))!r}; unload it and load it on the quantized module, or fuse "
            "and unload it"
        )


def _recorded(
    pipeline: Any,
    recipes: Mapping[str, Recipe],
    prompts: Sequence[int] | Sequence[str] | None,
    call: Mapping[str, object],
    batch_size: int | None,
    on_progress: OnStage,
) -> dict[str, CalibrationSamples]:
    (first, recipe), *others = recipes.items()
    settings = recipe.calibration
    for name, other in others:
        theirs, ours = other.calibration.model_dump(), settings.model_dump()
        key = next((key for key in ours if key != "timesteps" and ours[key] != theirs[key]), None)
        if key is not None:
            raise RecipeError(
                f"calibration.{key} is {ours[key]!r} for {first} and {theirs[key]!r} for {name}, which are recorded in "
                "the same samples; make them equal"
            )
    if prompts is None and settings.prompts:
        prompts = list(itertools.islice(itertools.cycle(settings.prompts), settings.samples))
    if prompts is None:
        raise ArgumentError("there are no prompts; give some like those of later use, or list them in the recipe")
    call = {**settings.size, **call}
    return collect_components(
        pipeline,
        prompts,
        {name: _timesteps(pipeline, name, recipe, call) for name, recipe in recipes.items()},
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seed,
        batch_size=settings.batch_size if batch_size is None else batch_size,
        call=call,
        sizes=sizes_of(recipe),
        on_progress=of_stage(on_progress, "record"),
    )


def _timesteps(
    pipeline: Any, name: str, recipe: Recipe, call: Mapping[str, object]
) -> int | Sequence[float] | NormalTimesteps:
    """The timesteps of a denoiser, at most as many as its steps where those are known."""
    timesteps = wanted_timesteps(recipe.calibration.timesteps)
    known = known_times(pipeline, name, recipe.calibration.steps, call)
    if isinstance(timesteps, int) and known and len(known) < min(timesteps, recipe.calibration.steps):
        logger.info("%s is called at %d steps, and recorded at all of them", name, len(known))
        return len(known)
    return timesteps


def _quantized(
    name: str,
    module: nn.Module,
    recipe: Recipe,
    samples: CalibrationSamples,
    method: ModuleFormat | None,
    on_progress: OnStage,
) -> nn.Module:
    """A denoiser as a quantized module."""

    def stage(what: str, done: int, total: int) -> None:
        on_progress(f"{name}: {what}", done, total)

    exported = export_for(module, samples)
    converted = convert(exported, recipe, samples, name=type(module).__name__, on_progress=stage)
    evaluation = evaluation_of(exported, converted, samples, on_calibration=True)
    return to_module(converted.quantized(evaluation=evaluation), module, method=method)


def _target(output: str | Path, components: Mapping[str, nn.Module], chosen: Mapping[str, Recipe | TextMethod]) -> Path:
    """The folder to save to, which holds an earlier result or nothing, on a disk with room for another one."""
    target = as_path(output, "output").resolve()
    check_writable(target, ArtifactError)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or is_pipeline_card(target / CARD))):
        raise ArtifactError(
            f"{target} holds something other than a pipeline that this package has quantized; give another folder, or "
            "remove it first"
        )
    least = 0
    for name, module in components.items():
        sizes = [parameter.numel() * (1 if name in chosen else parameter.itemsize) for parameter in module.parameters()]
        least += sum(sizes) // (2 if name in chosen else 1)
    check_room(target, least, ArtifactError)
    return target
