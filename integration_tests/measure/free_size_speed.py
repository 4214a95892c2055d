"""Time of one call of a graph with free sizes, against a graph of fixed sizes at the same size.

    python integration_tests/measure/free_size_speed.py [--blocks 2] [--rounds 20] [--backends fbgemm openvino]

A diffusers DiT at DiT-XL/2 width (16 heads x 72, 256 tokens) with random weights is quantized to W8A8 twice: captured
with every free size, and with none. Both are lowered to each backend and called in turns. The script prints a Markdown
table of the median times and of the median ratio of two calls that follow each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn
from x86_kernels import build_model, cpu_name, samples

from ptq4dit_ao import apply_recipe, export_transformer, free_sizes
from ptq4dit_ao.lowering import LoweredModel
from ptq4dit_ao.recipe import Recipe

BACKENDS = ("fbgemm", "openvino", "onnx", "aoti", "x86_inductor")


def lowered(model: nn.Module, inputs: Sequence[tuple[Tensor, ...]], backend: str, *, free: bool) -> LoweredModel:
    """The model quantized and lowered, with every free size or none."""
    graph = export_transformer(model, inputs[0], dynamic=None if free else ())
    assert bool(free_sizes(graph).names) == free
    return apply_recipe(graph, Recipe(), inputs).lower(backend, example_inputs=inputs[0])


def in_turns(
    one: LoweredModel, other: LoweredModel, inputs: Sequence[Tensor], rounds: int
) -> list[tuple[float, float]]:
    """Milliseconds of both, round by round. Which one goes first alternates."""
    found = []
    for i in range(-3, rounds):
        taken = {}
        for model in (one, other) if i % 2 else (other, one):
            start = time.perf_counter()
            model(*inputs)
            taken[id(model)] = 1000 * (time.perf_counter() - start)
        if i >= 0:
            found.append((taken[id(one)], taken[id(other)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--backends", nargs="*", default=BACKENDS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, inputs = build_model(args.blocks), samples(2, args.batch)
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, torchao {version('torchao')}, "
        f"{args.blocks} blocks, batch {args.batch}, {args.rounds} interleaved rounds\n"
    )
    print(
        "| backend | free ms | fixed ms | ratio | integer products, free and fixed |\n|---|---|---|---|---|", flush=True
    )
    for backend in args.backends:
        free, fixed = (lowered(model, inputs, backend, free=free) for free in (True, False))
        times = in_turns(free, fixed, inputs[0], args.rounds)
        own, base = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        counts = ", ".join(f"{one.proof.integer_gemms}/{one.proof.promised}" for one in (free, fixed))
        print(f"| {backend} | {own:.1f} | {base:.1f} | {ratio:.3f} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
