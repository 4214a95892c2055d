"""Accuracy of a shipped model: ``python integration_tests/measure/accuracy.py [--model fashion] [--draws 3]``.

Every bit width and method is measured over several calibration seeds (0, 1, ...) and one evaluation set. All figures
are means over these draws, with their standard deviation (sd):

* SQNR in dB of the predicted noise (or velocity): pooled over 20 timesteps, and its median over timesteps;
* the pooled SQNR on the 30 timesteps that were not calibrated;
* for each of ``--image-steps``, squared error of 200 images at equal seeds: geometric mean (GM), median and mean over
  images, and their PSNR in dB. The mean is that of the one or two images that become another object.

``--sampler`` generates the inputs for calibration and evaluation, and the images. All values are of the simulated
(quantize/dequantize) graph. ``--outliers`` makes four channels of every adaLN output 10 to 30 times larger and
compensates for it in the next weights, which changes nothing in float.

A method is the balancing and rounding of a recipe, and its calibration timesteps if the recipe draws them. Everything
else, such as the quantized layers, is that of ``digits_w8a8``.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from ptq4dit_ao import CalibrationSamples, collect_from_pipeline, load_recipe, load_reference_dit
from ptq4dit_ao.calibration import Sampling, SamplingPipeline, sample
from ptq4dit_ao.choices import SAMPLERS
from ptq4dit_ao.metrics import image_errors, paired_error
from ptq4dit_ao.recipe import Activations, Balance, Distillation, NormalDraw, Recipe, Rounding, Weights
from ptq4dit_ao.reference import DIGITS, REFERENCES
from ptq4dit_ao.testing.outliers import inject_outliers
from ptq4dit_ao.workflow import apply_recipe
from ptq4dit_ao.workflow.exported import export_for
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
IMAGE_FIGURES = {
    "psnr_db": "PSNR",
    "mse_geometric": "image MSE GM",
    "mse_median": "median",
    "mse": "mean",
}
"""Errors of images, and their columns."""


def draw_samples(
    model: nn.Module,
    recipe: Recipe,
    *,
    count: int,
    seed: int,
    timesteps: int | tuple[float, ...] | None = None,
    sampling: Sampling | None = None,
) -> CalibrationSamples:
    """Denoiser inputs along float trajectories with guidance, as the recipe's calibration section says."""
    sampling = Sampling.of(model, clip=True) if sampling is None else sampling
    labels = torch.randint(10, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return collect_from_pipeline(
        SamplingPipeline(model, sampling.by(recipe.calibration.sampler)),
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


def draw_images(graph: nn.Module, sampling: Sampling, steps: int) -> Tensor:
    labels = torch.arange(10).repeat(IMAGES // 10)
    generator = torch.Generator().manual_seed(7)
    return sample(sampling.denoiser(graph), sampling, labels, steps=steps, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--samples", type=int, help="calibration images per seed (default: the recipe's)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--model", choices=REFERENCES, default=DIGITS.name)
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help="default: ddpm, and flow for a model that predicts velocity"
    )
    parser.add_argument("--image-steps", nargs="+", type=int, default=[10], metavar="N", help="default: 10")
    parser.add_argument(
        "--steps", type=int, default=500, help="optimizer steps of methods that learn (default: %(default)s)"
    )
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    recipe = load_recipe("digits_w8a8")
    model, sampling = load_reference_dit(args.model), REFERENCES[args.model].sampling
    sampling = sampling.by(args.sampler or ("ddpm" if sampling.predicts == "noise" else None))
    calibration = recipe.calibration.model_copy(update={"sampler": sampling.sampler})
    recipe = recipe.model_copy(update={"calibration": calibration})
    if args.outliers:
        model = inject_outliers(model, seed=0)
    count = args.samples or recipe.calibration.samples

    @functools.cache
    def calibration_of(recipe: Recipe) -> list[CalibrationSamples]:
        return [draw(recipe, count=count, seed=seed) for seed in range(args.draws)]

    draw = functools.partial(draw_samples, model, sampling=sampling)
    used = {float(t) for t in calibration_of(recipe)[0].inputs["timestep"]}
    other = tuple(
        t for t in draw(recipe, count=1, seed=0, timesteps=STEPS).timesteps.unique().tolist() if t not in used
    )
    samples = draw(recipe, count=recipe.evaluation.samples, seed=1000)
    off_grid = draw(recipe, count=recipe.evaluation.samples, seed=1000, timesteps=other)
    exported = export_for(model, samples)
    evaluation = list(samples.batches(BATCH))
    expected = {steps: draw_images(exported, sampling, steps) for steps in args.image_steps}
    compare = functools.partial(paired_error, exported, timestep_index=sampling.timestep_index)

    rows: list[dict[str, object]] = []
    cases = [(bits, method) for bits in args.bits for method in args.methods]
    with Progress() as progress:
        task = progress.add_task("quantize and evaluate", total=len(cases) * args.draws)
        for bits, method in cases:
            figures: dict[str, list[float]] = collections.defaultdict(list)
            curves = []
            for calibration in calibration_of(with_timesteps(recipe, method)):
                start = time.perf_counter()
                batches = calibration.shuffled(0).batches(BATCH)
                quantized = apply_recipe(exported, with_method(recipe, bits, method, args.steps), batches).graph
                figures["s"].append(time.perf_counter() - start)
                error = compare(quantized, evaluation)
                curves.append(list(error.per_timestep.values()))
                figures["sqnr_db"].append(error.sqnr_db)
                figures["median_t_db"].append(statistics.median(error.per_timestep.values()))
                figures["off_grid_db"].append(compare(quantized, off_grid.batches(BATCH)).sqnr_db)
                for steps, images in expected.items():
                    errors = image_errors(images, draw_images(quantized, sampling, steps))
                    for name in IMAGE_FIGURES:
                        figures[f"{name}_{steps}"].append(getattr(errors, name).value)
                progress.advance(task)
            mean = {name: statistics.mean(values) for name, values in figures.items()}
            spread = {f"{name}_sd": statistics.stdev(v) if args.draws > 1 else 0.0 for name, v in figures.items()}
            curve = [round(statistics.mean(column), 2) for column in zip(*curves, strict=True)]
            rows.append({"bits": bits, "method": method, **mean, **spread, "per_timestep": curve})
            progress.console.print(as_row(rows[-1], args.image_steps))

    drawn = f"{args.draws} calibration draws of {count} images, {sampling.sampler.upper()}"
    print(f"\nSQNR of the {sampling.predicts} (dB), {drawn}; mean ± sd; simulated; torch {torch.__version__}\n")
    head = ["bits", "method", "pooled", "median over t", "other timesteps"]
    for steps in args.image_steps:
        head += [f"{name}, {steps} steps" for name in IMAGE_FIGURES.values()]
    print("| " + " | ".join([*head, "s"]) + " |\n" + "|---" * (len(head) + 1) + "|")
    print("\n".join(as_row(row, args.image_steps) for row in rows))
    if args.json:
        about = {
            "model": args.model,
            "draws": args.draws,
            "samples": count,
            "sampler": sampling.sampler,
            "steps": args.steps,
            "outliers": args.outliers,
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps({**about, "timesteps": sorted(used), "rows": rows}, indent=1) + "\n")


def as_row(row: dict, image_steps: list[int]) -> str:
    def cell(name: str, form: str) -> str:
        return f"{row[name]:{form}} ± {row[f'{name}_sd']:{form}}"

    cells = [row["bits"], row["method"], *(cell(name, ".2f") for name in ("sqnr_db", "median_t_db", "off_grid_db"))]
    for steps in image_steps:
        cells += [cell(f"{name}_{steps}", ".2f" if name == "psnr_db" else ".1e") for name in IMAGE_FIGURES]
    return "| " + " | ".join([*cells, f"{row['s']:.0f}"]) + " |"


if __name__ == "__main__":
    main()
