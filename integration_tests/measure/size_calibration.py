"""Calibration over three sizes in one run, against calibration at each size alone.

    python integration_tests/measure/size_calibration.py [--batches 16] [--weight-bits 8]

Tiny transformers (Flux, SD3, PixArt, DiT, Wan) with random parameters are quantized to W8A8, or with 4-bit weights, on
batches of one of three sizes, and on the batches of all three. The simulated graph is compared with the float graph on
batches of each size that no calibration saw. Each figure is the SQNR over those batches, in dB.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from importlib.metadata import version

import torch
from any_size import NAMES, chosen_sizes, first
from torch import Tensor

from ptq4dit_ao import apply_recipe, export_transformer, free_sizes
from ptq4dit_ao.capture.interface import input_specs, resized
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.graph.names import timestep_placeholder
from ptq4dit_ao.recipe import Balance, Recipe, Weights
from ptq4dit_ao.testing.zoo import FAMILIES

UNSEEN = 1000
"""Seed of the first batch that no calibration sees."""


def measure(name: str, batches: int, bits: int) -> list[str]:
    """The rows of one family: a size, the SQNR after its own calibration and after that of all sizes."""
    family = FAMILIES[name]
    model = family.model()
    graph = export_transformer(model, family.inputs(2))
    float_graph, specs = export_transformer(model, family.inputs(2)), input_specs(graph)
    assert specs is not None

    def inputs(values: Mapping[str, int], seed: int) -> tuple[Tensor, ...]:
        tensors = flatten_call(model, family.inputs(2, seed=seed))[1]
        return tuple(resized(tensors[spec.name], spec, values) for spec in specs)

    sizes = chosen_sizes(free_sizes(graph))
    samples = [[inputs(values, seed) for seed in range(batches)] for values in sizes]
    method = "ssc" if timestep_placeholder(graph) is not None else "max"
    recipe = Recipe(layers="paper", weights=Weights(bits=bits), balance=Balance(method=method))
    together = apply_recipe(graph, recipe, [batch for row in zip(*samples, strict=True) for batch in row]).graph
    rows = []
    for values, own in zip(sizes, samples, strict=True):
        alone = apply_recipe(graph, recipe, own).graph
        unseen = [inputs(values, seed) for seed in range(UNSEEN, UNSEEN + batches)]
        wanted = torch.cat([first(float_graph(*x)).flatten() for x in unseen])
        found = [sqnr_db(wanted, torch.cat([first(g(*x)).flatten() for x in unseen])) for g in (alone, together)]
        size = ", ".join(f"{key} {value}" for key, value in values.items())
        rows.append(f"| {name} | {size} | {found[0]:.2f} | {found[1]:.2f} | {found[1] - found[0]:+.2f} |")
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--batches", type=int, default=16, help="calibration batches of two rows for each size")
    parser.add_argument("--weight-bits", type=int, default=8)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "torchao", "diffusers"))
    print(f"{versions}, W{args.weight_bits}A8, {args.batches} batches a size\n")
    print("| family | size | alone | all three | difference |\n|---|---|---|---|---|", flush=True)
    for name in args.names:
        print("\n".join(measure(name, args.batches, args.weight_bits)), flush=True)


if __name__ == "__main__":
    main()
