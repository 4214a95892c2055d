"""One artifact at several sizes on each backend, called as the pipeline calls the transformer.

    python integration_tests/measure/any_size.py --output out/any_size.md

Tiny transformers (Flux, SD3, PixArt, DiT, Wan) with random parameters are quantized to W8A8 on samples of two sizes,
saved, and loaded on each backend. ``as_diffusers_transformer`` is called at three sizes and two lengths of text, of
which one was not calibrated. Each output is compared with the simulated graph's; the integer kernels of a call at each
size are counted by the profiler where the backend's proof counts that way; the first call at a size is timed, and a
later one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ptq4dit_ao import (
    PTQ4DiTError,
    apply_recipe,
    as_diffusers_transformer,
    export_transformer,
    free_sizes,
    load_quantized,
)
from ptq4dit_ao._files import replace_text
from ptq4dit_ao.capture.interface import input_specs, resized
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.capture.sizes import FreeSizes
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.graph.names import timestep_placeholder
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.testing.zoo import FAMILIES

NAMES = ("flux", "sd3", "pixart_sigma", "dit", "wan")
TRIED = ("reference", "fbgemm", "openvino", "onnx", "aoti", "x86_inductor", "cuda")
CALLS = 3
"""Repetitions of a later call, of which the fastest counts."""


def chosen_sizes(sizes: FreeSizes) -> list[dict[str, int]]:
    """The example's sizes, smaller ones, and larger ones with a longer text."""
    larger = sizes.example
    for size in sizes.sizes:
        changed = larger | {size.name: size.nearest(size.example + 4 * size.multiple)}
        larger = changed if sizes.problem(changed) is None else larger
    return [sizes.example, sizes.other()[0], larger]


def measure(name: str, backends: Sequence[str], console: Console) -> Iterator[list[str]]:
    """The rows of one family, each as soon as it is measured."""
    family = FAMILIES[name]
    model = family.model()
    graph = export_transformer(model, family.inputs(2))
    sizes, specs = free_sizes(graph), input_specs(graph)
    assert specs is not None
    signature, _ = flatten_call(model, family.inputs(2))

    def inputs(values: Mapping[str, int], seed: int) -> list[Tensor]:
        tensors = flatten_call(model, family.inputs(2, seed=seed))[1]
        return [resized(tensors[spec.name], spec, values) for spec in specs]

    example, smaller, larger = chosen_sizes(sizes)
    method = "ssc" if timestep_placeholder(graph) is not None else "max"
    recipe = Recipe(layers="paper", balance=Balance(method=method))
    samples = [tuple(inputs(values, seed)) for seed in range(2) for values in (example, smaller)]
    quantized = apply_recipe(graph, recipe, samples)
    with tempfile.TemporaryDirectory() as folder:
        quantized.save(folder)
        for backend in backends:
            console.print(f"{name} on {backend}")
            start = time.perf_counter()
            try:
                lowered = load_quantized(folder).lower(backend)
            except PTQ4DiTError as error:
                yield [name, backend, str(error).splitlines()[0][:160], "", "", "", "", ""]
                continue
            built = time.perf_counter() - start
            transformer = as_diffusers_transformer(lowered)
            for values in (example, smaller, larger):
                tensors = inputs(values, 9)
                times = []
                for _ in range(1 + CALLS):
                    start = time.perf_counter()
                    found = transformer(**signature.bind(tensors), return_dict=False)[0]
                    times.append(time.perf_counter() - start)
                parity = sqnr_db(first(quantized.graph(*tensors)), found)
                yield [
                    name,
                    backend,
                    f"{built:.1f}",
                    ", ".join(f"{key} {value}" for key, value in values.items()),
                    f"{min(parity, 200.0):.0f}",
                    kernels(lowered, backend, tensors),
                    f"{times[0]:.2f}",
                    f"{1000 * min(times[1:]):.1f}",
                ]


def first(outputs: Any) -> Tensor:
    """The first output."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def kernels(lowered: Any, backend: str, tensors: list[Tensor]) -> str:
    """Integer matrix products counted in one call at this size, and those promised."""
    entry = BACKENDS[backend]
    if not entry.integer:
        return "-"
    if backend == "onnx":  # its profile is read once, by the proof
        return f"{lowered.proof.integer_gemms}/{lowered.proof.promised} when lowered"
    return f"{sum(entry.integer_gemms(lowered.run, tuple(tensors)).values())}/{lowered.proof.promised}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("any_size.md"))
    parser.add_argument("--backends", nargs="*", default=list(TRIED), help="default: %(default)s")
    parser.add_argument("families", nargs="*", default=NAMES)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console(stderr=True)
    about = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchao", "diffusers"))
    head = [
        f"Made by `python integration_tests/measure/any_size.py` ({about}, {torch.get_num_threads()} threads).",
        "",
        "| family | backend | lowered in s | sizes | dB to the simulated graph | integer products | first call s "
        "| later ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows: list[str] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.families:
        for row in measure(name, args.backends, console):
            rows.append(f"| {' | '.join(row)} |")
            replace_text(args.output, "\n".join([*head, *rows, ""]))


if __name__ == "__main__":
    main()
