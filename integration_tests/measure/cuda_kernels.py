"""Speed on an NVIDIA GPU.

    python integration_tests/measure/cuda_kernels.py [--blocks 28] [--rounds 30] [--json FILE]

A DiT-XL/2 with random weights is quantized on the CPU to W8A8 and W4A8. The script prints, and writes to the JSON file:

* each integer kernel against the CPU reference, at every shape of a layer;
* for each batch size: latency of bfloat16 (eager, compiled, compiled to CUDA graphs) and of the ``cuda`` backend with a
  bfloat16 rest, interleaved; the number of linears proven, and the integer kernels that the GPU ran in a replay;
* for comparison the roofline: the time of the quantized layers' matrix products alone, in int8, int4 and bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.profiler import ProfilerActivity, profile
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao import PTQ4DiTQuantizer, export_transformer, lower
from ptq4dit_ao._version import installed_version
from ptq4dit_ao.evaluation.bench.random_dit import random_batches, random_dit
from ptq4dit_ao.evaluation.environment import environment
from ptq4dit_ao.lowering import missing_backends, quantized_linears
from ptq4dit_ao.lowering.cuda import int4_linear, int8_linear
from ptq4dit_ao.lowering.cuda.ops import pack_halves
from ptq4dit_ao.metrics import measure_latency

SEED = 0
BITS = {"W8A8": 8, "W4A8": 4}
OPS = {8: int8_linear, 4: int4_linear}
Shape = tuple[int, int, int]
"""Rows (M), output channels (N) and input channels (K) of a matrix product."""


def convert(model: torch.nn.Module, bits: int) -> GraphModule:
    batches = random_batches(2, 2, seed=SEED)
    prepared = prepare_pt2e(export_transformer(model, batches[0]), PTQ4DiTQuantizer(weight_bits=bits))
    for batch in batches:
        prepared(*batch)
    return convert_pt2e(prepared)


def shapes(converted: GraphModule, batch: int) -> list[Shape]:
    """Of every quantized linear, in execution order; those of the modulation have a row for each image, not token."""
    found = []
    for linear in quantized_linears(converted):
        rows = [int(size) for size in linear.node.meta["val"].shape[1:-1]]  # all but the batch is fixed
        found.append((batch * (rows[0] if rows else 1), *linear.weight.shape))
    return found


def operands(shape: Shape, bits: int) -> tuple[Any, ...]:
    """Random arguments of the operator, on the CPU."""
    m, n, k = shape
    g = torch.Generator().manual_seed(SEED)
    bound = 2 ** (bits - 1)
    weight = torch.randint(-bound, bound, (n, k), generator=g, dtype=torch.int8)
    return (
        torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8),
        pack_halves(weight) if bits == 4 else weight,
        torch.rand(n, generator=g) / 1000,
        weight.sum(dim=1, dtype=torch.int32) * 17,
        torch.randn(n, generator=g),
        torch.float32,
    )


def on_gpu(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)


def largest_error(shape: Shape, bits: int) -> float:
    """Of the GPU's kernel against the CPU reference, relative to the largest output."""
    arguments = operands(shape, bits)
    expected = OPS[bits](*arguments)
    actual = OPS[bits](*on_gpu(arguments)).cpu()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def roofline_ms(layers: Sequence[Shape], rounds: int) -> dict[str, float]:
    """Milliseconds of all layers' matrix products alone, each with a weight of its own, replayed as one CUDA graph."""
    calls: dict[str, list[Callable[[], Tensor]]] = {"bf16": [], "int8": [], "int4": []}
    for m, n, k in layers:
        x, w = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
        calls["bf16"].append(lambda x=x, w=w: torch.nn.functional.linear(x, w))
        for bits, op in OPS.items():
            *tensors, _ = on_gpu(operands((m, n, k), bits))
            calls[f"int{bits}"].append(lambda op=op, tensors=tensors: op(*tensors, torch.bfloat16))
    return {name: graph_ms(lambda todo=todo: [call() for call in todo], rounds) for name, todo in calls.items()}


def graph_ms(work: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of a replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # tunes the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return measure_latency({"replay": synchronized(graph.replay)}, (), rounds=rounds)["replay"].median_ms


def synchronized(model: Callable[..., object]) -> Callable[..., None]:
    """Returns when the GPU has finished."""

    def run(*inputs: Tensor) -> None:
        model(*inputs)
        torch.cuda.synchronize()

    return run


def bf16_peers(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Callable[..., object]]:
    """The exported float model in bfloat16: eager, compiled, and compiled to CUDA graphs."""
    half = model.bfloat16().cuda()
    x, t, y = inputs
    graphs = [export_transformer(half, (x.bfloat16(), t, y)) for _ in range(3)]
    ways = {
        "bf16 eager": graphs[0],
        "bf16 compiled": torch.compile(graphs[1]),
        "bf16 compiled, CUDA graphs": torch.compile(graphs[2], mode="reduce-overhead"),
    }
    return {name: lambda x, t, y, run=run: run(x.bfloat16(), t, y) for name, run in ways.items()}


def device_kernels(model: Callable[..., object], inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Integer kernels that the GPU itself ran in one call; after two calls that is a replay."""
    for _ in range(3):
        model(*inputs)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        model(*inputs)
        torch.cuda.synchronize()
    on_device = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return dict(Counter(event.name for event in on_device if event.name.endswith("_linear_kernel")))


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    why = missing_backends().get("cuda")
    if why is not None:
        sys.exit(f"cuda_kernels: {why}")
    warnings.filterwarnings("ignore")

    model = random_dit("dit-xl", args.blocks)
    converted, quantize_s = {}, {}
    for name, bits in BITS.items():
        start = time.perf_counter()
        converted[name] = convert(model, bits)
        quantize_s[name] = time.perf_counter() - start
    layers = {batch: shapes(converted["W8A8"], batch) for batch in args.batches}

    errors = {
        f"int{bits} {m}x{n}x{k}": largest_error((m, n, k), bits)
        for bits in OPS
        for m, n, k in sorted(set(layers[args.batches[0]]))
    }
    print("\n| kernel, shape | largest error, relative |\n|---|---|")
    for name, error in errors.items():
        print(f"| {name} | {error:.1e} |")
    if max(errors.values()) > 1e-5:
        sys.exit("cuda_kernels: a kernel does not compute what the CPU reference does; no speed is worth that")

    figures: dict[str, Any] = {
        "environment": {**environment(), "driver": driver(), "cuda": torch.version.cuda},
        "triton": installed_version("triton"),
        "seed": SEED, "blocks": args.blocks, "rounds": args.rounds, "quantize_s": quantize_s, "errors": errors,
        "batches": {},
    }  # fmt: skip
    for batch in args.batches:
        figures["batches"][str(batch)] = measure(model, converted, batch, layers[batch], args.rounds)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(
    model: torch.nn.Module, converted: dict[str, GraphModule], batch: int, layers: list[Shape], rounds: int
) -> dict[str, Any]:
    """One table, and what it says as JSON."""
    cpu_inputs = random_batches(1, batch, seed=SEED)[0]
    inputs = tuple(x.cuda() for x in cpu_inputs)
    lowered, ready_s = {}, {}
    for name, graph in converted.items():
        start = time.perf_counter()
        lowered[name] = lower(graph, "cuda", example_inputs=inputs, float_dtype=torch.bfloat16)
        ready_s[name] = time.perf_counter() - start
    ran = {name: device_kernels(run, inputs) for name, run in lowered.items()}
    models = {**bf16_peers(model, inputs), **lowered}
    latency = measure_latency({n: synchronized(run) for n, run in models.items()}, inputs, rounds=rounds, warmup=5)
    roofline = roofline_ms(layers, rounds)

    baseline = min(latency[name].median_ms for name in latency if name.startswith("bf16 compiled"))
    print(f"\nbatch {batch}, {torch.cuda.get_device_name()}; matrix products alone: "
          + ", ".join(f"{name} {ms:.2f} ms" for name, ms in roofline.items()) + "\n")  # fmt: skip
    print("| model | median ms | 10-90 % | vs best bf16 | proven | ran on the GPU |\n|---|---|---|---|---|---|")
    for name, r in latency.items():
        proof = f"{lowered[name].proof.integer_gemms}/{lowered[name].proof.promised}" if name in lowered else "-"
        print(f"| {name} | {r.median_ms:.2f} | {r.low_ms:.2f}-{r.high_ms:.2f} | {baseline / r.median_ms:.2f}x | "
              f"{proof} | {ran.get(name, '-')} |")  # fmt: skip
    return {
        "median_ms": {name: r.median_ms for name, r in latency.items()},
        "spread_ms": {name: [r.low_ms, r.high_ms] for name, r in latency.items()},
        "speedup_over_best_compiled_bf16": {name: baseline / latency[name].median_ms for name in lowered},
        "roofline_ms": roofline, "ready_s": ready_s, "device_kernels": ran,
        "proof": {name: [m.proof.integer_gemms, m.proof.promised] for name, m in lowered.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
