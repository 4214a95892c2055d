"""Speed at real layer sizes.

    python integration_tests/measure/x86_kernels.py [--blocks 4] [--rounds 10] [--json FILE]

A diffusers DiT at DiT-XL/2 width (16 heads x 72, 256 tokens) with random weights is quantized to W8A8. The script
prints Markdown tables:

* calibration: the prepared model against the plain float graph, interleaved;
* preparation, fold and conversion, in seconds; start-up of each backend; peak memory;
* latency of float32 (eager, compiled), of every x86 backend, and of the base quantizer without balancing, interleaved,
  with the number of linears that ran on integer kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from ptq4dit_ao import PTQ4DiTQuantizer, export_transformer, load_quantized, lower
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.metrics import measure_latency
from ptq4dit_ao.quantizer import LinearQuantizer
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow import apply_recipe

Model = Callable[..., Tensor]


def build_model(blocks: int) -> DiTTransformer2DModel:
    """DiT-XL/2 width, ``blocks`` deep, parameters drawn anew (adaLN starts at zero)."""
    model = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=blocks,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip
    return randomize_(model, seed=0, std=0.02).eval().requires_grad_(False)


def samples(count: int, batch: int) -> list[tuple[Tensor, ...]]:
    """Random inputs with mixed timesteps."""
    g = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch, 4, 32, 32, generator=g),
            torch.randint(1000, (batch,), generator=g),
            torch.randint(1000, (batch,), generator=g),
        )
        for _ in range(count)
    ]


def convert_base_only(exported: GraphModule, inputs: list[tuple[Tensor, ...]]) -> GraphModule:
    """The base quantizer alone, on the same layers that the safe preset quantizes."""

    class SafeLinearQuantizer(LinearQuantizer):
        def annotate(self, model: GraphModule) -> GraphModule:
            from ptq4dit_ao.graph.names import linears
            from ptq4dit_ao.quantizer.overrides import SAFE_LAYERS, apply_plan, plan_layers

            super().annotate(model)
            plans = plan_layers(model, weight_bits=8, activation_bits=8, overrides=SAFE_LAYERS)
            for node in linears(model):
                apply_plan(node, plans[node.name])
            return model

    prepared = prepare_pt2e(exported, SafeLinearQuantizer())
    for x in inputs:
        prepared(*x)
    return convert_pt2e(prepared)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-compiled", action="store_true", help="measure only what needs no compiler")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    model = build_model(args.blocks)
    inputs = samples(4, args.batch)
    exported = export_transformer(model, inputs[0])
    prepared, prepare_s = timed(lambda: prepare_pt2e(export_transformer(model, inputs[0]), PTQ4DiTQuantizer()))
    calibration = measure_latency({"float": exported, "prepared": prepared}, inputs[0], rounds=args.rounds)
    for x in inputs:
        prepared(*x)
    converted, convert_s = timed(lambda: convert_pt2e(prepared))
    quantized = apply_recipe(model, Recipe(), inputs)
    with tempfile.TemporaryDirectory() as folder:
        quantized.save(folder + "/model")
        loaded, load_s = timed(lambda: load_quantized(folder + "/model"))
        fbgemm, fbgemm_s = timed(lambda: loaded.lower("fbgemm"))
    models: dict[str, Model] = {"float32 eager": exported, "fbgemm": fbgemm}
    proofs = {"fbgemm": fbgemm.proof}
    ready = {"load": load_s, "fbgemm": fbgemm_s}
    if not args.skip_compiled:
        models["float32 compiled"] = torch.compile(export_transformer(model, inputs[0]))
        base = convert_base_only(export_transformer(model, inputs[0]), inputs)
        for name, graph in {"x86_inductor": converted, "x86_inductor, base quantizer alone": base}.items():
            lowered, ready[name] = timed(lambda graph=graph: lower(graph, "x86_inductor", example_inputs=inputs[0]))
            models[name], proofs[name] = lowered, lowered.proof
    latency = measure_latency(models, inputs[0], rounds=args.rounds, warmup=3)

    cost = calibration["prepared"].median_ms / calibration["float"].median_ms - 1
    print(f"\n{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.blocks} blocks, "
          f"batch {args.batch}, {args.rounds} interleaved rounds\n")  # fmt: skip
    print(f"calibration over the plain float forward: {100 * cost:+.1f} %; prepare (export, sites) {prepare_s:.1f} s, "
          f"fold + convert {convert_s:.1f} s; peak RSS {peak_rss_gb():.2f} GB")  # fmt: skip
    print(", ".join(f"{name} ready in {seconds:.1f} s" for name, seconds in ready.items()) + "\n")
    print("| model | median ms | 10-90 % | vs eager | vs compiled | integer GEMMs |\n|---|---|---|---|---|---|")
    for name, r in latency.items():
        eager = latency["float32 eager"].median_ms / r.median_ms
        against = latency["float32 compiled"].median_ms / r.median_ms if "float32 compiled" in latency else float("nan")
        proof = f"{proofs[name].integer_gemms}/{proofs[name].promised}" if name in proofs else "-"
        print(
            f"| {name} | {r.median_ms:.1f} | {r.low_ms:.1f}-{r.high_ms:.1f} | {eager:.2f}x | {against:.2f}x | {proof} |"
        )
    if args.json:
        figures = {
            "calibration_overhead": cost, "prepare_s": prepare_s, "convert_s": convert_s, "ready_s": ready,
            "median_ms": {name: r.median_ms for name, r in latency.items()},
            "integer_gemms": {name: [p.integer_gemms, p.promised] for name, p in proofs.items()},
        }  # fmt: skip
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def peak_rss_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
