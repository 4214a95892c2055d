"""Accuracy of a shipped DiT: ``python integration_tests/measure/accuracy.py [--model fashion] [--draws 3]``.

Every bit width and method is measured over several calibration seeds (0, 1, ...) and one evaluation set:

* eps SQNR in dB, pooled over 20 timesteps (mean and standard deviation over seeds), and its median over timesteps;
* pooled eps SQNR on the 30 timesteps that were not calibrated;
* squared error of 200 final samples at equal seeds (10 steps), mean and median over samples.

``--sampler`` generates the inputs for calibration and evaluation, and the samples. All values are of the simulated
(quantize/dequantize) graph. ``--outliers`` makes four channels of every adaLN output 10 to 30 times larger and
compensates for it in the next weights, which changes nothing in float.

A method is the balancing and rounding of a recipe, and its calibration timesteps if the recipe draws them. Everything
else, such as the quantized layers, is that of ``digits_w8a8``.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from ptq4dit_ao import CalibrationSamples, collect_from_pipeline, export_transformer, load_recipe, load_reference_dit
from ptq4dit_ao.calibration import Sampling, SamplingPipeline, sample
from ptq4dit_ao.choices import SAMPLERS
from ptq4dit_ao.metrics import paired_error
from ptq4dit_ao.recipe import Activations, Balance, Distillation, NormalDraw, Recipe, Rounding, Weights
from ptq4dit_ao.reference import DIGITS, REFERENCES, SAMPLING
from ptq4dit_ao.testing.outliers import inject_outliers
from ptq4dit_ao.workflow import apply_recipe
from ptq4dit_ao.workflow.samples import wanted_timesteps

GPTQ = Rounding(method="gptq", ranges="output")
SEQUENTIAL = Rounding(method="gptq", ranges="output", sequential=True)
METHODS = {
    "min-max": load_recipe("minmax"),
    "SmoothQuant 0.5": load_recipe("smoothquant"),
    "CSB": Recipe(balance=Balance(method="mean")),
    "CSB + SSC": Recipe(balance=Balance(method="ssc")),
    "PTQ4DM": load_recipe("ptq4dm"),
    "Q-Diffusion": load_recipe("q_diffusion"),
    "RepQ": load_recipe("repq"),
    "one pass": Recipe(balance=Balance(method="auto", alpha="auto"), rounding=GPTQ),
    "sequential, not balanced": Recipe(balance=Balance(method="none"), rounding=SEQUENTIAL),
    "fast": load_recipe("fast"),
    "learned": load_recipe("learned"),
    "auto": load_recipe("auto"),
    "auto, distilled": load_recipe("auto").model_copy(update={"distillation": Distillation(steps=1000)}),
    "distilled": load_recipe("distilled"),
}
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W6A6": (6, 6), "W4A4": (4, 4)}
BATCH = 64
STEPS = 50
IMAGES = 200
IMAGE_STEPS = 10


def draw_samples(
    model: nn.Module,
    recipe: Recipe,
    *,
    count: int,
    seed: int,
    timesteps: tuple[float, ...] | None = None,
) -> CalibrationSamples:
    """Denoiser inputs along float trajectories with guidance, as the recipe's calibration section says."""
    labels = torch.randint(10, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return collect_from_pipeline(
        SamplingPipeline(model, Sampling.of(model, clip=True).by(recipe.calibration.sampler)),
        labels,
        timesteps=wanted_timesteps(recipe.calibration.timesteps) if timesteps is None else timesteps,
        steps=recipe.calibration.steps,
        guidance=recipe.calibration.guidance,
        seed=seed,
    )


def with_method(recipe: Recipe, bits: str, method: str, steps: int = 500) -> Recipe:
    weights, activations = BITS[bits]
    rounding, distillation = METHODS[method].rounding, METHODS[method].distillation
    if rounding.method == "adaround":
        rounding = rounding.model_copy(update={"steps": steps})
    if distillation.steps:
        distillation = distillation.model_copy(update={"steps": steps})
    return recipe.model_copy(
        update={
            "weights": Weights(bits=weights),
            "activations": Activations(bits=activations),
            "balance": METHODS[method].balance,
            "rounding": rounding,
            "distillation": distillation,
        }
    )


def with_timesteps(recipe: Recipe, method: str) -> Recipe:
    """The recipe, calibrated at the timesteps that the method draws, if it does."""
    timesteps = METHODS[method].calibration.timesteps
    if not isinstance(timesteps, NormalDraw):
        return recipe
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"timesteps": timesteps})})


def draw_images(denoiser, sampling: Sampling = SAMPLING) -> Tensor:
    labels = torch.arange(10).repeat(IMAGES // 10)
    return sample(denoiser, sampling, labels, steps=IMAGE_STEPS, generator=torch.Generator().manual_seed(7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, help="calibration images per seed (default: the recipe's)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--model", choices=REFERENCES, default=DIGITS.name)
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=500, help="optimizer steps of methods that learn (default: %(default)s)"
    )
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    recipe = load_recipe("digits_w8a8")
    calibration = recipe.calibration.model_copy(update={"sampler": args.sampler})
    recipe = recipe.model_copy(update={"calibration": calibration})
    model, sampling = load_reference_dit(args.model), REFERENCES[args.model].sampling.by(args.sampler)
    if args.outliers:
        model = inject_outliers(model, seed=0)
    count = args.samples or recipe.calibration.samples

    @functools.cache
    def calibration_of(recipe: Recipe) -> list[CalibrationSamples]:
        return [draw_samples(model, recipe, count=count, seed=seed) for seed in range(args.draws)]

    used = {float(t) for t in calibration_of(recipe)[0].inputs["timestep"]}
    other = tuple(t for t in sampling.scheduler(STEPS).timesteps.double().tolist() if t not in used)
    evaluation = list(draw_samples(model, recipe, count=recipe.evaluation.samples, seed=1000).batches(BATCH))
    off_grid = draw_samples(model, recipe, count=recipe.evaluation.samples, seed=1000, timesteps=other)
    exported = export_transformer(model, evaluation[0])
    expected = draw_images(exported, sampling)

    rows: list[dict[str, object]] = []
    cases = [(bits, method) for bits in args.bits for method in args.methods]
    with Progress() as progress:
        task = progress.add_task("quantize and evaluate", total=len(cases) * args.draws)
        for bits, method in cases:
            names = ("sqnr_db", "median_t_db", "off_grid_db", "mse", "median_mse", "s")
            figures: dict[str, list[float]] = {name: [] for name in names}
            curves = []
            for calibration in calibration_of(with_timesteps(recipe, method)):
                start = time.perf_counter()
                batches = calibration.shuffled(0).batches(BATCH)
                quantized = apply_recipe(exported, with_method(recipe, bits, method, args.steps), batches).graph
                figures["s"].append(time.perf_counter() - start)
                error = paired_error(exported, quantized, evaluation)
                curves.append(list(error.per_timestep.values()))
                figures["sqnr_db"].append(error.sqnr_db)
                figures["median_t_db"].append(statistics.median(error.per_timestep.values()))
                figures["off_grid_db"].append(paired_error(exported, quantized, off_grid.batches(BATCH)).sqnr_db)
                errors = (draw_images(quantized, sampling) - expected).square().flatten(1).mean(1)
                figures["mse"].append(float(errors.mean()))
                figures["median_mse"].append(float(errors.median()))
                progress.advance(task)
            spread = statistics.stdev(figures["sqnr_db"]) if args.draws > 1 else 0.0
            mean = {name: statistics.mean(values) for name, values in figures.items()}
            curve = [round(statistics.mean(column), 2) for column in zip(*curves, strict=True)]
            rows.append({"bits": bits, "method": method, **mean, "sd": spread, "per_timestep": curve})
            progress.console.print(as_row(rows[-1]))

    drawn = f"{args.draws} calibration draws of {count} images, {args.sampler.upper()}"
    print(f"\neps SQNR (dB), {drawn}; simulated; torch {torch.__version__}\n")
    print(
        "| bits | method | pooled | sd | median over t | other timesteps | sample MSE | median | s |\n"
        + "|---" * 9
        + "|"
    )
    print("\n".join(map(as_row, rows)))
    if args.json:
        about = {
            "model": args.model,
            "draws": args.draws,
            "samples": count,
            "sampler": args.sampler,
            "steps": args.steps,
            "outliers": args.outliers,
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps({**about, "timesteps": sorted(used), "rows": rows}, indent=1) + "\n")


def as_row(row: dict) -> str:
    return (
        f"| {row['bits']} | {row['method']} | {row['sqnr_db']:.2f} | {row['sd']:.2f} | {row['median_t_db']:.2f} | "
        f"{row['off_grid_db']:.2f} | {row['mse']:.1e} | {row['median_mse']:.1e} | {row['s']:.0f} |"
    )


if __name__ == "__main__":
    main()
