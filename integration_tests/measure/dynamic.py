"""Ranges at run time on a shipped DiT: ``python integration_tests/measure/dynamic.py [--model fashion] [--draws 1]``.

Each variant of the recipe ``auto`` is measured beside the static one, as in accuracy.py: eps SQNR pooled and its median
over timesteps, and images of 10 steps at equal seeds, as PSNR of the mean error, and as median and geometric mean (GM)
of the error. The images have values from -1 to 1. All values are of the simulated graph.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from accuracy import BATCH, draw_images, draw_samples

from ptq4dit_ao import export_transformer, load_recipe, load_reference_dit
from ptq4dit_ao.metrics import paired_error
from ptq4dit_ao.recipe import Activations, Override, Recipe
from ptq4dit_ao.reference import DIGITS, REFERENCES
from ptq4dit_ao.workflow import apply_recipe

ADALN = "*norm1.linear"


def variants() -> dict[str, dict[str, object]]:
    """Name -> changes of the recipe."""
    fc = tuple(Override(pattern=pattern, dynamic="token") for pattern in ("*ff.net.0.proj", "*ff.net.2"))
    return {
        "static": {},
        "token, all linears": {"activations": Activations(dynamic="token")},
        "token, FC1 and FC2": {"overrides": fc},
        "adaLN weight-only": {"overrides": (Override(pattern=ADALN, activation_bits=16),)},
        "token, adaLN weight-only": {
            "activations": Activations(dynamic="token"),
            "overrides": (Override(pattern=ADALN, activation_bits=16),),
        },
        "weight-only": {"activations": Activations(bits=16)},
        "auto, a third": {"activations": Activations(dynamic="auto", share=1 / 3)},
        "auto, two thirds": {"activations": Activations(dynamic="auto", share=2 / 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--model", choices=REFERENCES, default=DIGITS.name)
    parser.add_argument("--bits", type=int, default=8, help="bits of weights (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=variants(), default=list(variants()))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    calibration = load_recipe("digits_w8a8").calibration.model_copy(update={"sampler": "ddpm"})
    base: Recipe = load_recipe("digits_w8a8").model_copy(update={"calibration": calibration})
    auto = load_recipe("auto")
    model, sampling = load_reference_dit(args.model), REFERENCES[args.model].sampling.by("ddpm")
    evaluation = list(draw_samples(model, base, count=base.evaluation.samples, seed=1000).batches(BATCH))
    exported = export_transformer(model, evaluation[0])
    expected = draw_images(exported, sampling)
    print("| variant | pooled dB | median over t dB | PSNR dB | median | GM | s |\n|---|---|---|---|---|---|---|")
    for name in args.variants:
        figures: list[tuple[float, ...]] = []
        for seed in range(args.draws):
            start = time.perf_counter()
            samples = draw_samples(model, base, count=base.calibration.samples, seed=seed).shuffled(0).batches(BATCH)
            changes = {"weights": auto.weights.with_bits(args.bits), "balance": auto.balance, "rounding": auto.rounding}
            quantized = apply_recipe(exported, base.model_copy(update={**changes, **variants()[name]}), samples).graph
            seconds = time.perf_counter() - start
            error = paired_error(exported, quantized, evaluation)
            each = (draw_images(quantized, sampling) - expected).square().flatten(1).mean(1)
            figures.append(
                (
                    error.sqnr_db,
                    statistics.median(error.per_timestep.values()),
                    float(10 * torch.log10(4 / each.mean())),
                    float(each.median()),
                    float(each.log().mean().exp()),
                    seconds,
                )
            )
        mean = [statistics.mean(column) for column in zip(*figures, strict=True)]
        pooled, median, psnr, middle, gm, seconds = mean
        print(
            f"| {name} | {pooled:.2f} | {median:.2f} | {psnr:.2f} | {middle:.2e} | {gm:.2e} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
