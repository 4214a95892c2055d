"""Accuracy of the shipped digits DiT: ``python integration_tests/measure_accuracy.py [--draws 8] [--json FILE]``.

For every bit width and balancing method, over several calibration draws (seeds 0, 1, ...) and one evaluation set:
eps SQNR in dB, pooled over 20 timesteps (mean and standard deviation over draws) and the median over timesteps.
All figures are of the simulated (quantize/dequantize) graph. Then the outlier test: four channels of every adaLN
output are made 10 to 30 times larger and undone in the next weights, which changes nothing in float.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao import CalibrationSamples, collect_from_pipeline, export_transformer, load_recipe, load_reference_dit
from ptq4dit_ao.calibration import SamplingPipeline
from ptq4dit_ao.evaluation import paired_error
from ptq4dit_ao.recipe import Activations, Balance, Recipe, Weights
from ptq4dit_ao.reference import SAMPLING
from ptq4dit_ao.testing.outliers import inject_outliers
from ptq4dit_ao.workflow import apply_recipe

METHODS = {"min-max": "none", "SmoothQuant 0.5": "max", "CSB": "mean", "CSB + SSC": "ssc"}
BITS = {"W8A8": (8, 8), "W4A8": (4, 8)}
BATCH = 32


def draw_samples(model: nn.Module, recipe: Recipe, *, count: int, seed: int) -> CalibrationSamples:
    """Denoiser inputs along float trajectories with guidance, as the recipe's calibration section says."""
    labels = torch.randint(10, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return collect_from_pipeline(
        SamplingPipeline(model, SAMPLING),
        labels,
        timesteps=recipe.calibration.timesteps,
        steps=recipe.calibration.steps,
        guidance=recipe.calibration.guidance,
        seed=seed,
    )


def with_method(recipe: Recipe, bits: tuple[int, int], aggregation: str) -> Recipe:
    return recipe.model_copy(
        update={
            "weights": Weights(bits=bits[0]),
            "activations": Activations(bits=bits[1]),
            "balance": Balance(aggregation=aggregation),
        }
    )


def measure(
    exported: GraphModule, recipe: Recipe, calibration: CalibrationSamples, evaluation: Sequence[tuple[Tensor, ...]]
) -> tuple[float, float]:
    """Pooled SQNR and its median over timesteps, in dB."""
    quantized = apply_recipe(exported, recipe, calibration.shuffled(0).batches(BATCH))
    error = paired_error(exported, quantized.graph, evaluation)
    return error.sqnr_db, statistics.median(error.per_timestep.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    recipe = load_recipe("digits_w8a8")
    model = load_reference_dit()
    calibrations = [
        draw_samples(model, recipe, count=recipe.calibration.samples, seed=seed) for seed in range(args.draws)
    ]
    evaluation = list(draw_samples(model, recipe, count=recipe.evaluation.samples, seed=1000).batches(BATCH))
    exported = export_transformer(model, evaluation[0])
    injected = export_transformer(inject_outliers(load_reference_dit(), seed=0), evaluation[0])

    figures: dict[str, dict[str, dict[str, float]]] = {}
    cases = [(bits, method) for bits in BITS for method in METHODS]
    with Progress() as progress:
        task = progress.add_task("quantize and evaluate", total=len(cases) * args.draws + 2)
        for bits, method in cases:
            results = []
            for calibration in calibrations:
                variant = with_method(recipe, BITS[bits], METHODS[method])
                results.append(measure(exported, variant, calibration, evaluation))
                progress.advance(task)
            pooled, median = zip(*results, strict=True)
            figures.setdefault(bits, {})[method] = {
                "sqnr_db": statistics.mean(pooled),
                "sd": statistics.stdev(pooled) if len(pooled) > 1 else 0.0,
                "median_t_db": statistics.mean(median),
            }
        outliers = {}
        for method in ("min-max", "CSB + SSC"):
            variant = with_method(recipe, BITS["W8A8"], METHODS[method])
            outliers[method] = measure(injected, variant, calibrations[0], evaluation)[0]
            progress.advance(task)

    print(f"\neps SQNR (dB), mean and sd over {args.draws} calibration draws; simulated; torch {torch.__version__}\n")
    print("| bits | method | pooled | sd | median over timesteps |\n|---|---|---|---|---|")
    for bits, rows in figures.items():
        for method, row in rows.items():
            print(f"| {bits} | {method} | {row['sqnr_db']:.2f} | {row['sd']:.2f} | {row['median_t_db']:.2f} |")
    print("\noutliers injected, W8A8, draw 0: " + ", ".join(f"{m} {db:.2f} dB" for m, db in outliers.items()))
    if args.json:
        args.json.write_text(json.dumps({"draws": args.draws, "sqnr": figures, "outliers": outliers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
