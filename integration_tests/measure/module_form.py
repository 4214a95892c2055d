"""Module form against graph form of quantized models, and sites that only a multiply reaches.

    python integration_tests/measure/module_form.py parity [MODEL ...]
    python integration_tests/measure/module_form.py sites [MODEL ...]

``parity`` quantizes each model to W8A8 and W4A8 and compares the module with the graph of the same artifact: SQNR of
the module against the graph, of the graph against itself with inputs changed in their last place (what rounding errors
do to it), and of both against the float model, in dB, on samples that calibration did not see.
``sites`` quantizes with ``balance.sites`` ``folded`` and ``all``, and compares both with the float model.

Models are ``digits`` and ``fashion`` (shipped), ``digits+outliers`` and ``fashion+outliers`` (the same function with
outlier channels), and names of tiny families with random parameters.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from any_size import first
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao import Recipe, apply_recipe, export_transformer, load_recipe, to_module
from ptq4dit_ao.capture.export import call_like
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.graph.names import timestep_placeholder
from ptq4dit_ao.recipe import Balance, Weights
from ptq4dit_ao.testing.outliers import inject_outliers
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow.exported import export_for
from ptq4dit_ao.workflow.models import load_model
from ptq4dit_ao.workflow.samples import recorded_samples

SHIPPED = {"digits": "reference", "fashion": "fashion"}
TINY = ("dit", "pixart_sigma", "sd3", "flux", "flux2", "wan", "wan22", "auraflow", "lumina2", "cogvideox", "sana")
PARITY = (*SHIPPED, *TINY)
SITES = (*SHIPPED, *(f"{name}+outliers" for name in SHIPPED), "flux", "flux+outliers")
BATCHES, ROWS = 8, 16
UNSEEN = 1000
"""Seed of the first batch that no calibration sees."""

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """A float model, its graph, and batches to calibrate on and to compare on."""

    module: nn.Module
    graph: GraphModule
    calibration: Sequence[Batch]
    unseen: Sequence[Batch]
    recipe: Callable[[int, str], Recipe]
    """Recipe for bits of the weights, and sites."""


def subject(name: str) -> Subject:
    """The model of that name."""
    base, _, outliers = name.partition("+")
    return _shipped(base, bool(outliers)) if base in SHIPPED else _tiny(base, bool(outliers))


def _shipped(name: str, outliers: bool) -> Subject:
    loaded = load_model(SHIPPED[name])

    def recipe(bits: int, sites: str) -> Recipe:
        shipped = load_recipe(f"digits_w{bits}a8")
        balance = shipped.balance.model_copy(update={"sites": sites})
        return shipped.model_copy(update={"balance": balance})

    some = recipe(8, "folded")
    loaded = loaded.drawn_by(some.calibration.sampler)
    samples, unseen = recorded_samples(loaded, some), recorded_samples(loaded, some, evaluate=True)
    module = inject_outliers(loaded.transformer) if outliers else loaded.transformer
    graph = export_for(module, samples)
    batches = list(samples.shuffled(0).batches(some.calibration.rows))
    return Subject(module, graph, batches, list(unseen.batches(some.calibration.rows)), recipe)


def _tiny(name: str, outliers: bool) -> Subject:
    family = FAMILIES[name]
    module = inject_outliers(family.model()) if outliers else family.model()
    graph = export_transformer(module, family.inputs(2))
    method = "ssc" if timestep_placeholder(graph) is not None else "max"

    def batch(seed: int) -> Batch:
        return tuple(flatten_call(module, family.inputs(2, seed=seed))[1].values())

    def recipe(bits: int, sites: str) -> Recipe:
        return Recipe(layers="paper", weights=Weights(bits=bits), balance=Balance(method=method, sites=sites))

    seeds = range(BATCHES)
    return Subject(module, graph, [batch(s) for s in seeds], [batch(UNSEEN + s) for s in seeds], recipe)


def outputs(run: Callable[[Batch], object], batches: Sequence[Batch]) -> Tensor:
    """Outputs on all batches, as one vector."""
    return torch.cat([first(run(batch)).flatten() for batch in batches])


def last_place(x: Tensor) -> Tensor:
    """The tensor with each value changed by about one unit in its last place."""
    if not x.is_floating_point():
        return x
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
    return x * (1 + signs * torch.finfo(x.dtype).eps)


def parity(name: str) -> None:
    """Rows of one model: the module against the graph."""
    model = subject(name)
    wanted = outputs(lambda x: model.graph(*x), model.unseen)
    changed = [tuple(map(last_place, batch)) for batch in model.unseen]
    for bits in (8, 4):
        for sites in ("folded", "all"):
            quantized = apply_recipe(model.graph, model.recipe(bits, sites), model.calibration)
            module = to_module(quantized, model.module)
            graph = outputs(lambda x, g=quantized.graph: g(*x), model.unseen)  # type: ignore[misc]
            found = outputs(lambda x, m=module: call_like(model.graph, m, x), model.unseen)  # type: ignore[misc]
            itself = outputs(lambda x, g=quantized.graph: g(*x), changed)  # type: ignore[misc]
            pairs = ((graph, found), (graph, itself), (wanted, graph), (wanted, found))
            figures = " | ".join(f"{sqnr_db(*pair):.1f}" for pair in pairs)
            print(f"| {name} | W{bits}A8 | {sites} | {figures} |", flush=True)


def sites(name: str) -> None:
    """Row of one model: sites by kind, and the error with folded ones and with all."""
    model = subject(name)
    wanted = outputs(lambda x: model.graph(*x), model.unseen)
    for bits in (8, 4):
        cells, counts = [], []
        for which in ("folded", "all"):
            quantized = apply_recipe(model.graph, model.recipe(bits, which), model.calibration)
            module = to_module(quantized, model.module)
            graph = outputs(lambda x, g=quantized.graph: g(*x), model.unseen)  # type: ignore[misc]
            found = outputs(lambda x, m=module: call_like(model.graph, m, x), model.unseen)  # type: ignore[misc]
            kinds = [site["kind"] for site in quantized.report["sites"]]
            counts.append(f"{len(kinds) - kinds.count('refused')} of {len(kinds)}")
            cells.append((sqnr_db(wanted, graph), sqnr_db(wanted, found)))
        (graph_folded, module_folded), (graph_all, module_all) = cells
        print(
            f"| {name} | W{bits}A8 | {counts[0]} | {graph_folded:.2f} | {module_folded:.2f} | {counts[1]} | "
            f"{graph_all:.2f} | {module_all:.2f} | {module_all - graph_folded:+.2f} |",
            flush=True,
        )


HEADERS = {
    parity: "| model | bits | sites | module, graph | graph, graph at 1 ulp | float, graph | float, module |",
    sites: "| model | bits | folded: sites | graph | module | all: sites | graph | module | gain |",
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parity", "sites"])
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    measure, names = {"parity": (parity, PARITY), "sites": (sites, SITES)}[args.what]
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "torchao", "diffusers")))
    header = HEADERS[measure]
    print(header, "|" + "---|" * (header.count("|") - 1), sep="\n", flush=True)
    for name in args.names or names:
        measure(name)


if __name__ == "__main__":
    main()
