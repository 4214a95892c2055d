"""``apply_recipe``: quantize a model inside the caller's own pipeline."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from ptq4dit_ao._memory import trim
from ptq4dit_ao._modes import own_modes
from ptq4dit_ao._progress import OnProgress, OnStage, ignore, of_stage
from ptq4dit_ao.calibration import CalibrationSamples, Sampling
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.export import captured_module
from ptq4dit_ao.capture.float_model import check_float_module, check_in_memory, device_of
from ptq4dit_ao.capture.interface import CapturedModule, InputSpec, batches_by_size, cannot_run, check_batch
from ptq4dit_ao.errors import CalibrationError, check_type
from ptq4dit_ao.graph.constants import folded_sources
from ptq4dit_ao.graph.names import placeholders
from ptq4dit_ao.graph.ties import share_equal_tensors
from ptq4dit_ao.lowering import BACKENDS, backends_for
from ptq4dit_ao.modules.linears import module_linears
from ptq4dit_ao.passes import balance_result
from ptq4dit_ao.quantizer import (
    distill,
    round_sequentially,
    tokens_seen,
)
from ptq4dit_ao.recipe import Activations, Recipe
from ptq4dit_ao.report import Diagnostics, EvaluationEntry, build_report
from ptq4dit_ao.workflow.dynamic import ChosenDynamic, choose_dynamic
from ptq4dit_ao.workflow.exported import export_for, first_refused
from ptq4dit_ao.workflow.from_recipe import quantizer_from_recipe, with_chosen_bits, with_chosen_dynamic
from ptq4dit_ao.workflow.quantized_model import QuantizedModel
from ptq4dit_ao.workflow.weight_bits import WeightBits, choose_weight_bits

logger = logging.getLogger(__name__)

SHUFFLE_SEED = 0
"""Seed of the shuffle of recorded samples, after which each batch mixes timesteps."""


@own_modes()
def apply_recipe(
    model: nn.Module,
    recipe: Recipe,
    samples: CalibrationSamples | Iterable[Sequence[Tensor]],
    *,
    base: Quantizer | None = None,
    timestep_input: str | None = None,
    name: str | None = None,
    on_progress: OnStage = ignore,
    resume: str | Path | None = None,
) -> QuantizedModel:
    """Quantize a denoiser as a recipe says.

    Args:
        model: an eval-mode module, or the graph that ``export_transformer`` made of it. It is not changed.
        recipe: the recipe. Its ``calibration`` section is not executed here: the caller provides ``samples``.
        samples: what :func:`~ptq4dit_ao.collect_from_pipeline` recorded, or tuples of inputs in the order of
            ``forward``. The first tuple has a batch size of at least 2. Samples may have several sizes if the model can
            be captured with these sizes free.
        base: the torchao quantizer to wrap; the default is this package's own.
        timestep_input: name of the input that holds the timestep, where it cannot be found by its name.
        name: name of the model in the report.
        on_progress: called with ``(stage, done, total)``. The stages are ``choose dynamic`` and ``choose bits`` (count
            quantized inputs), ``calibrate`` (batches), ``round`` (parts of a sequential rounding) and ``distill``
            (steps), those that the recipe has. ``total`` is 0 where ``samples`` has no length.
        resume: a folder for checkpoints of sequential rounding and distillation. Work that is found there is not
            repeated.

    Raises:
        ExportError: the model is not a float model with its weights in memory, or cannot be captured.
        CalibrationError: there are no samples, they are not finite, or they cover too few timesteps.
        PTQ4DiTError: see :class:`~ptq4dit_ao.PTQ4DiTQuantizer`.
    """
    converted = convert(
        model,
        recipe,
        samples,
        base=base,
        timestep_input=timestep_input,
        name=name,
        on_progress=on_progress,
        resume=resume,
    )
    return converted.quantized()


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A converted graph and the record of how it was made: its report, except for what is measured afterwards."""

    graph: GraphModule
    recipe: Recipe
    """The recipe, with the chosen bits where it says ``bits: auto``."""
    name: str
    parameters: int
    seconds: dict[str, float]
    """Wall time per stage, in seconds."""
    captured: CapturedModule | None
    folded: frozenset[str]
    """Paths of the parameters that weights in the graph were computed from."""
    weight_bits: WeightBits | None
    dynamic: ChosenDynamic | None

    def quantized(
        self,
        *,
        sampling: Sampling | None = None,
        evaluation: EvaluationEntry | None = None,
        diagnostics: Diagnostics | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> QuantizedModel:
        """The quantized model with its report. Every report is built here.

        Args:
            sampling: how to sample the model, where that is known.
            evaluation: error of the model's output.
            diagnostics: measurements of its layers.
            seconds: wall time of the stages before and after the conversion.
        """
        report = build_report(
            self.graph,
            title=f"{self.recipe.description or 'recipe'} on {self.name}",
            recipe=self.recipe.to_dict(),
            model={"name": self.name, "parameters": self.parameters},
            seconds={**self.seconds, **(seconds or {})},
            evaluation=evaluation,
            diagnostics=diagnostics,
            weight_bits=None if self.weight_bits is None else self.weight_bits.to_dict(),
            dynamic=None if self.dynamic is None else self.dynamic.to_dict(),
        )
        return QuantizedModel(
            graph=self.graph,
            recipe=self.recipe,
            inputs=tuple(InputSpec.of(node) for node in placeholders(self.graph)),
            report=report,
            sampling=sampling,
            captured=self.captured,
            linears=module_linears(self.graph, balance_result(self.graph), self.folded),
        )


@own_modes()
def convert(
    model: nn.Module,
    recipe: Recipe,
    samples: CalibrationSamples | Iterable[Sequence[Tensor]],
    *,
    base: Quantizer | None = None,
    timestep_input: str | None = None,
    name: str | None = None,
    on_progress: OnStage = ignore,
    resume: str | Path | None = None,
) -> Converted:
    """Calibrate, balance, round and convert a model: :func:`apply_recipe` without the report."""
    check_type("recipe", recipe, Recipe, "what load_recipe returned")
    check_type(
        "samples",
        samples,
        (CalibrationSamples, Iterable),
        "what collect_from_pipeline recorded, or a list of tuples of tensors",
    )
    recorded = samples if isinstance(samples, CalibrationSamples) else None
    number = length_hint(samples)
    if isinstance(samples, CalibrationSamples):
        number = samples.num_batches(recipe.calibration.rows)
        samples = samples.shuffled(SHUFFLE_SEED).batches(recipe.calibration.rows)
    iterator = iter(samples)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError("there are no calibration samples; pass at least one tuple of inputs")
    if not isinstance(model, GraphModule):
        check_float_module(model)
        check_in_memory(model)
    warn_of_dtype(model)
    clock, device = Stopwatch(), device_of(model)
    if isinstance(model, GraphModule):
        exported = model
        if recorded is not None and len(recorded.groups) > 1 and (problem := first_refused(exported, recorded)[1]):
            raise problem  # before the work
    else:
        exported = export_transformer(model, _on(device, first)) if recorded is None else export_for(model, recorded)
    captured, folded = captured_module(exported), folded_sources(exported)
    choice, dynamic = None, None
    if recipe.activations.dynamic == "auto":
        batches = [
            check_batch(exported, _on(device, b), "a calibration batch") for b in itertools.chain([first], iterator)
        ]
        dynamic = _choose_dynamic(
            exported, recipe, batches, base, timestep_input, of_stage(on_progress, "choose dynamic")
        )
        recipe, first, iterator = with_chosen_dynamic(recipe, dynamic), batches[0], iter(batches[1:])
        clock.lap("choose dynamic")
    if recipe.weights.bits == "auto":
        batches = [_on(device, tuple(batch)) for batch in itertools.chain([first], iterator)]
        choice = _choose_bits(exported, recipe, batches, base, timestep_input, of_stage(on_progress, "choose bits"))
        recipe, first, iterator = with_chosen_bits(recipe, choice), batches[0], iter(batches[1:])
        clock.lap("choose bits")
    # prepare_pt2e changes the graph it is given.
    exported = GraphModule(exported, copy.deepcopy(exported.graph))
    clock.lap("export")
    prepared = prepare_pt2e(exported, quantizer_from_recipe(recipe, base, timestep_input=timestep_input))
    clock.lap("prepare")
    kept = []
    for done, inputs in enumerate(itertools.chain([first], iterator), start=1):
        what = f"calibration batch {done}"
        inputs = check_batch(prepared, inputs, what)
        try:
            prepared(*_on(device, inputs))
        except (RuntimeError, IndexError) as error:
            raise cannot_run(what, error) from error
        if recipe.rounding.sequential:
            kept.append(inputs)
        on_progress("calibrate", done, number)
    clock.lap("calibrate")
    if recipe.rounding.sequential:
        some = enough(prepared, kept, recipe.rounding.tokens, tokens_seen(prepared))
        if len(some) < len(kept):
            logger.info("rounding looks at %d of %d batches (rounding.tokens)", len(some), len(kept))
        batches = [_on(device, batch) for batch in some]
        round_sequentially(prepared, batches, on_progress=of_stage(on_progress, "round"), resume=resume)
        clock.lap("round")
        if recipe.distillation.steps:
            batches = [_on(device, batch) for batch in kept]
            steps, minutes = recipe.distillation.steps, recipe.distillation.minutes
            distilled = of_stage(on_progress, "distill")
            distill(prepared, batches, steps=steps, minutes=minutes, on_progress=distilled, resume=resume)
            clock.lap("distill")
    trim()
    converted = convert_pt2e(prepared)
    share_equal_tensors(converted)
    clock.lap("convert")
    return Converted(
        graph=converted,
        recipe=recipe,
        name=name or type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=clock.seconds,
        captured=captured,
        folded=folded,
        weight_bits=choice,
        dynamic=dynamic,
    )


def _choose_dynamic(
    exported: GraphModule,
    recipe: Recipe,
    batches: list[tuple[Tensor, ...]],
    base: Quantizer | None,
    timestep_input: str | None,
    on_progress: OnProgress,
) -> ChosenDynamic:
    assert recipe.activations.share is not None
    weights = recipe.weights.with_bits(max(recipe.weights.widths)) if recipe.weights.bits == "auto" else recipe.weights
    static = recipe.model_copy(update={"weights": weights, "activations": Activations(bits=recipe.activations.bits)})
    return choose_dynamic(
        exported,
        batches,
        share=recipe.activations.share,
        quantizer=quantizer_from_recipe(static, base, timestep_input=timestep_input),
        on_progress=on_progress,
    )


def _choose_bits(
    exported: GraphModule,
    recipe: Recipe,
    batches: list[tuple[Tensor, ...]],
    base: Quantizer | None,
    timestep_input: str | None,
    on_progress: OnProgress,
) -> WeightBits:
    settings = recipe.weights
    assert settings.average_bits is not None
    lowest = recipe.model_copy(update={"weights": settings.with_bits(settings.widths[0])})
    return choose_weight_bits(
        exported,
        batches,
        average_bits=settings.average_bits,
        candidates=settings.widths,
        quantizer=quantizer_from_recipe(lowest, base, timestep_input=timestep_input),
        on_progress=on_progress,
    )


def warn_of_dtype(model: nn.Module) -> None:
    """Log which backends can run a model of this dtype, if not all can.

    The others refuse it, but only after quantization.
    """
    for dtype in {p.dtype for p in model.parameters() if p.ndim > 1 and p.is_floating_point()}:
        able = backends_for(dtype)
        if unable := [name for name in BACKENDS if name not in able]:
            logger.warning(
                "%s has %s weights, which only the backends %s can run, and not %s; for those, call .float() on it "
                "before quantizing",
                type(model).__name__,
                str(dtype).removeprefix("torch."),
                " and ".join(map(repr, able)),
                ", ".join(map(repr, unable)),
            )


def enough(
    prepared: GraphModule, batches: list[tuple[Tensor, ...]], tokens: int, seen: int
) -> list[tuple[Tensor, ...]]:
    """The first batches of each size, as many as hold about ``tokens`` of all ``seen`` tokens, and at least one."""
    some: list[int] = []
    for found in batches_by_size(prepared, batches):
        some += found[: max(1, round(len(found) * tokens / max(1, seen)))]
    return [batches[index] for index in sorted(some)]


def _on(device: torch.device, inputs: Any) -> Any:
    """Inputs on the model's device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, inputs)


class Stopwatch:
    """Stopwatch for the wall time per stage, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage and start the next one."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._start
        self._start = now
