"""Commands that need torch; everything that prints is here."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from ptq4dit_ao._paths import check_file, check_writable
from ptq4dit_ao._progress import of_stage
from ptq4dit_ao.artifact import check_target
from ptq4dit_ao.calibration import Sampling
from ptq4dit_ao.capture.sizes import FreeSizes
from ptq4dit_ao.cli.bench import bench as bench  # a command like those below
from ptq4dit_ao.cli.evaluate import evaluate as evaluate
from ptq4dit_ao.cli.progress import progress
from ptq4dit_ao.cli.recipes import chosen_recipe, component_recipes
from ptq4dit_ao.cli.table import table as table
from ptq4dit_ao.cli.tables import Column, print_table
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.lowering import export_to, missing_backends
from ptq4dit_ao.lowering.backend import BACKENDS, Capabilities
from ptq4dit_ao.modules.card import component_entries
from ptq4dit_ao.recipe import load_recipe
from ptq4dit_ao.report import Report, save_image_grid
from ptq4dit_ao.report.reasons import by_reason
from ptq4dit_ao.report.types import LayerEntry
from ptq4dit_ao.workflow import QuantizedModel, balance_checkpoint, load_model, load_quantized
from ptq4dit_ao.workflow import quantize as run_quantize
from ptq4dit_ao.workflow.checkpoint import check_empty
from ptq4dit_ao.workflow.correction import corrected_scheduler
from ptq4dit_ao.workflow.image_sampling import decoder
from ptq4dit_ao.workflow.image_sampling import draw_images as draw
from ptq4dit_ao.workflow.models import LoadedModel
from ptq4dit_ao.workflow.pipeline import quantize_pipeline

SHOWN_PIXELS = 64
"""Smallest width of a shown image, in pixels."""
DRAWN_CLASSES = 10
"""Number of classes that are sampled of a model with more, if none are named."""

_BACKEND_COLUMNS = tuple(Column(name, is_text=True) for name in ("backend", "here", "what it is", "carries", "writes"))
_SITE_COLUMNS = (
    Column("balanced site"),
    Column("channels"),
    Column("salience, alpha", is_text=True),
    Column("b", is_text=True),
    Column("folded into", is_text=True, can_be_spared=True),
)
_COMPONENT_COLUMNS = (Column("component"), Column("quantized linears"), "MB", "of float32", "SQNR dB")
_LAYER_COLUMNS = (Column("layer"), Column("bits", is_text=True), Column("SQNR dB"))


def quantize(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao quantize``."""
    if args.pipeline is not None:
        _quantize_pipeline(args, console)
        return
    recipe, spec = chosen_recipe(args)
    if not args.leave_one_out:
        recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"leave_one_out": False})})
    recipe = recipe.model_copy(update={"model": spec})  # what "evaluate" will load
    check_target(args.output)
    model = _loaded(spec, console)
    with progress(console) as on_progress:
        quantized = run_quantize(model, recipe, args.output, samples=args.samples, on_progress=on_progress)
    _print_report(quantized.report, console, wide=args.wide)
    console.print(f"\nsaved to [bold]{args.output}[/]; open {args.output / 'report.html'}")


def _quantize_pipeline(args: argparse.Namespace, console: Console) -> None:
    pipeline = _loaded(str(args.pipeline), console).pipeline
    if pipeline is None:
        raise ArgumentError(f"{args.pipeline} holds a transformer alone; give it with --model, or a pipeline's folder")
    pipeline.set_progress_bar_config(disable=True)  # there is one for all samples
    names = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    recipes = {name: args.recipe for name in names if name.startswith("transformer")} | component_recipes(args)
    with progress(console) as on_progress:
        quantized = quantize_pipeline(
            pipeline, recipes, output=args.output, method=args.format, on_progress=on_progress
        )
    lines = [
        (name, f"{entry.quantized} of {entry.linears}", f"{entry.stored / 1e6:.2f}", f"{entry.ratio:.3f}", entry.error)
        for name, entry in component_entries(quantized, args.output).items()
    ]
    print_table(console, "", _COMPONENT_COLUMNS, lines, wide=args.wide)
    console.print(f"saved to [bold]{args.output}[/]; DiffusionPipeline.from_pretrained opens it")


def balance(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao balance``."""
    recipe = load_recipe(args.recipe)
    check_empty(args.output)
    model = _loaded(args.model, console)
    with progress(console) as on_progress:
        result = balance_checkpoint(model, recipe, args.output, samples=args.samples, on_progress=on_progress)
    lines = [
        (
            name,
            f"{outcome.site.num_variables}/{outcome.site.channels}",
            f"{float(outcome.b.min()):.3g} .. {float(outcome.b.max()):.3g}",
            str(int(outcome.clipped.sum())),
        )
        for name, outcome in result.outcomes.items()
    ]
    print_table(console, "", ("balanced site", "channels", "b", "clipped"), lines, wide=args.wide)
    _print_reasons(console, "left", result.left.items())
    console.print(
        f"{len(result.outcomes)} sites balanced; the output changed by {result.output_change:.2g} of its size\n"
        f"saved to [bold]{args.output}[/], an ordinary diffusers checkpoint; a LoRA of the original no longer fits it: "
        "fuse it before balancing"
    )


def sample(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao sample``."""
    check_file(args.output)
    model = load_quantized(args.directory)
    sampling = _sampling(model).by(args.sampler)
    labels = _labels(args, sampling)
    sampling.check_steps(args.steps)
    decode = None if sampling.channels in (1, 3) else decoder(_float_model(args, model), sampling)
    guidance = model.recipe.calibration.guidance if args.guidance is None else args.guidance
    scheduler = corrected_scheduler(args.directory, model, sampling, args.steps, guidance)
    lowered = model.lower(args.backend, float_dtype=_float_dtype(args))
    console.print(str(lowered.proof))
    with progress(console) as on_progress:
        images = draw(
            sampling.denoiser(lowered),
            sampling,
            labels,
            steps=args.steps,
            guidance=guidance,
            seed=args.seed,
            scheduler=scheduler,
            decode=decode,
            on_progress=of_stage(on_progress, "sample"),
        )
    save_image_grid(images, args.output, columns=args.per_class, scale=max(1, SHOWN_PIXELS // images.shape[-1]))
    console.print(f"{len(images)} images in [bold]{args.output}[/]")


def inspect(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao inspect``."""
    model = load_quantized(args.directory)
    _print_report(model.report, console, layers=True, wide=args.wide)
    _print_sizes(model.sizes, console)
    if args.backend != "none":
        start = time.perf_counter()
        proof = model.lower(args.backend, float_dtype=_float_dtype(args)).proof
        console.print(f"\n{proof}\n{proof.parity}; ready in {time.perf_counter() - start:.1f} s")


def _print_sizes(sizes: FreeSizes, console: Console) -> None:
    """Print which sizes of the inputs may differ from call to call, and why others may not."""
    free = [*map(str, sizes.sizes), *(f"where {condition}" for condition in sizes.conditions)]
    console.print("\n[bold]sizes that may differ from call to call[/]" + ("" if free else ": none"))
    for line in free:
        console.print(f"  {line}", highlight=False, markup=False)
    for axis, reason in sizes.fixed.items():
        console.print(f"  {axis} is fixed: {reason}", highlight=False, markup=False)


def export(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao export``."""
    check_writable(args.output)
    model = load_quantized(args.directory)
    path = export_to(model.graph, args.backend, args.output, float_dtype=_float_dtype(args))
    console.print(f"saved to [bold]{path}[/], {path.stat().st_size / 1e6:.2f} MB")


def backends(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao backends``."""
    missing = missing_backends()
    lines = [
        (
            name,
            "yes" if name not in missing else f"no: {missing[name]}",
            backend.summary,
            _carried(backend.carries),
            backend.suffix or "-",
        )
        for name, backend in BACKENDS.items()
    ]
    print_table(console, "", _BACKEND_COLUMNS, lines, wide=args.wide)


def _carried(carries: Capabilities | None) -> str:
    if carries is None:
        return "anything"
    parts = {
        "activations": carries.activation_dtypes,
        "weights": carries.weight_dtypes,
        "float part": dict.fromkeys((*carries.model_dtypes, *carries.float_dtypes)),
    }
    return ", ".join(
        f"{'/'.join(str(d).removeprefix('torch.') for d in dtypes)} {what}" for what, dtypes in parts.items()
    )


def _loaded(spec: str, console: Console) -> LoadedModel:
    with console.status(f"loading {escape(spec)}"):
        return load_model(spec)


def _sampling(model: QuantizedModel) -> Sampling:
    if model.sampling is None:
        raise ArgumentError("this model was saved without the way to sample it; use it through its own pipeline")
    return model.sampling


def _labels(args: argparse.Namespace, sampling: Sampling) -> torch.Tensor:
    """The classes to draw, each as often as is asked for."""
    classes = args.classes or range(min(DRAWN_CLASSES, sampling.null_label))
    odd = [label for label in classes if not 0 <= label < sampling.null_label]
    if odd:
        raise ArgumentError(f"class {odd[0]} does not exist; the model has 0 to {sampling.null_label - 1} (--classes)")
    return torch.tensor(list(classes)).repeat_interleave(args.per_class)


def _float_model(args: argparse.Namespace, model: QuantizedModel) -> LoadedModel:
    """The pipeline that a quantized model comes from, for its VAE."""
    spec = args.model or model.recipe.model
    if spec is None:
        raise ArgumentError(
            f"{args.directory} draws latents and does not know the pipeline whose VAE decodes them; say which (--model)"
        )
    return load_model(spec)


def _float_dtype(args: argparse.Namespace) -> torch.dtype | None:
    return None if args.float_dtype is None else getattr(torch, args.float_dtype)


def _print_reasons(console: Console, what: str, refusals: Iterable[tuple[str, str]]) -> None:
    for reason, names in by_reason(refusals).items():
        console.print(f"{len(names)} site{'' if len(names) == 1 else 's'} {what}: {escape(reason)}", soft_wrap=True)


def _layer_line(layer: LayerEntry) -> tuple[str, ...]:
    bits = f"W{layer['weight_bits']}A{layer['activation_bits']}" if layer["status"] == "integer" else "float"
    bits += " per token" if layer.get("dynamic") else ""
    return layer["name"], bits, "-" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f}"


def _print_report(report: Report, console: Console, *, layers: bool = False, wide: bool = False) -> None:
    console.print(f"[bold]{report['title']}[/]: {report['model']['parameters'] / 1e6:.2f} M parameters")
    folded = [site for site in report["sites"] if site["status"] == "folded"]
    if folded:
        lines = []
        for site in folded:
            where = ", ".join(dict.fromkeys(path.rpartition(".")[0] for path in site["folded_into"]))
            spread = "{:.3g} .. {:.3g}".format(*site["b_range"])
            chosen = site["method"] if site["alpha"] is None else f"{site['method']} {site['alpha']:g}"
            chosen += " centred" * site.get("centred", False)
            where = where or "multiplied at run time"
            lines.append((site["name"], f"{site['variables']}/{site['channels']}", chosen, spread, where))
        print_table(console, "", _SITE_COLUMNS, lines, wide=wide)
    refused = [(site["name"], site["reason"] or "") for site in report["sites"] if site["status"] == "refused"]
    _print_reasons(console, "not folded", refused)
    if layers:
        print_table(console, "", _LAYER_COLUMNS, map(_layer_line, report["layers"]), wide=wide)
    counts = Counter(layer["status"] for layer in report["layers"])
    console.print(
        f"linears: {counts['integer']} integer, {counts['float']} float; "
        f"sites: {len(folded)} folded, {len(report['sites']) - len(folded)} not"
    )
    if report["evaluation"]:
        console.print(f"eps SQNR (simulated): [bold]{report['evaluation']['sqnr_db']:.2f} dB[/]")
    if report["size"]:
        size = report["size"]
        bits = "" if "bits_per_weight" not in size else f", {size['bits_per_weight']:.2f} bits a weight"
        console.print(
            f"on disk: {size['artifact_bytes'] / 1e6:.2f} MB, float32 {size['float32_bytes'] / 1e6:.2f} MB "
            f"({size['ratio']:.3f}x); quantized layers alone {size['quantized_layers_ratio']:.3f}x{bits}"
        )
    for note in report["notes"]:
        console.print(f"[yellow]note:[/] {note}")
