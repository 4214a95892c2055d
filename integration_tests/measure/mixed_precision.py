"""Gain of mixed-precision weights: ``python integration_tests/measure/mixed_precision.py [--json FILE]``.

The shipped digits DiT is quantized with the balancing and rounding of ``fast``, 8-bit activations, and weights of 4 or
8 bits with a given mean. Bits that ``weights: {bits: auto}`` chooses are compared with layers drawn at random until the
same budget is spent. The metric is eps SQNR in dB of the simulated graph, pooled over 20 timesteps, and its median over
them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import warnings
from pathlib import Path

from accuracy import BATCH, METHODS, draw_samples

from ptq4dit_ao import apply_recipe, export_transformer, load_recipe, load_reference_dit
from ptq4dit_ao.metrics import paired_error
from ptq4dit_ao.recipe import Override, Recipe, Weights

LOW, HIGH = 4, 8


def at_random(inputs: list[dict], average: float, seed: int) -> tuple[Override, ...]:
    """More bits for layers in random order, each if the budget still allows it."""
    left = (average - LOW) * sum(entry["parameters"] for entry in inputs)
    overrides: list[Override] = []
    for entry in random.Random(seed).sample(inputs, len(inputs)):
        cost = (HIGH - LOW) * entry["parameters"]
        if cost <= left:
            left -= cost
            overrides += [Override(pattern=layer, weight_bits=HIGH) for layer in entry["layers"]]
    return tuple(overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--average-bits", type=float, nargs="+", default=[5, 6])
    parser.add_argument("--draws", type=int, default=3, help="random choices per budget")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    base = load_recipe("digits_w8a8")
    fast = METHODS["fast"]
    base = base.model_copy(update={"balance": fast.balance, "rounding": fast.rounding})
    model = load_reference_dit()
    calibration = list(draw_samples(model, base, count=base.calibration.samples, seed=0).shuffled(0).batches(BATCH))
    evaluation = list(draw_samples(model, base, count=base.evaluation.samples, seed=1000).batches(BATCH))
    exported = export_transformer(model, evaluation[0])
    rows: list[dict[str, object]] = []

    def measure(choice: str, average: float, recipe: Recipe) -> list[dict]:
        quantized = apply_recipe(exported, recipe, calibration)
        error, about = paired_error(exported, quantized.graph, evaluation), quantized.report["weight_bits"]
        rows.append({"choice": choice, "average_bits": average, "sqnr_db": error.sqnr_db, "median_db": error.median_db})
        print(f"{choice:10} {average:g} bits: {error.sqnr_db:.2f} dB, median {error.median_db:.2f}", flush=True)
        return [] if about is None else about["inputs"]

    for bits in (LOW, HIGH):
        measure("all", bits, base.model_copy(update={"weights": Weights(bits=bits)}))
    for average in args.average_bits:
        weights = Weights(bits="auto", candidates=(LOW, HIGH), average_bits=average)
        inputs = measure("chosen", average, base.model_copy(update={"weights": weights}))
        for seed in range(args.draws):
            overrides = at_random(inputs, average, seed)
            recipe = base.model_copy(update={"weights": Weights(bits=LOW), "overrides": overrides})
            measure("random", average, recipe)

    print("\n| average bits | choice | pooled | median over t |\n" + "|---" * 4 + "|")
    for average, choice in dict.fromkeys((row["average_bits"], row["choice"]) for row in rows):
        same = [row for row in rows if (row["average_bits"], row["choice"]) == (average, choice)]
        means = [statistics.mean(row[key] for row in same) for key in ("sqnr_db", "median_db")]
        print(f"| {average:g} | {choice} | {means[0]:.2f} | {means[1]:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
