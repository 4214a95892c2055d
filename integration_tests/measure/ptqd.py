"""Gain of PTQD on the shipped digits DiT: ``python integration_tests/measure/ptqd.py [--seeds 3] [--json FILE]``.

For each quantized model (simulated), without and with the correction, it prints the SQNR in dB of the guided noise
along the float model's trajectory, pooled and as the median over steps, and the pixel error of samples against the
float model's from equal noise. Sampling takes 50 DDIM steps with eta 0 and guidance 1.5. Calibration and correction are
repeated for each seed (256 samples for the correction), and evaluated on 100 other samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from ptq4dit_ao import apply_recipe, collect_from_pipeline, load_recipe, load_reference_dit
from ptq4dit_ao.calibration import SamplingPipeline, as_denoiser, sample
from ptq4dit_ao.calibration.sampling import Denoiser, guided_noise, trajectory
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler, fit_noise_correction
from ptq4dit_ao.recipe import Activations, Balance, Recipe, Rounding, Weights
from ptq4dit_ao.reference import SAMPLING

BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
STEPS, GUIDANCE = 50, 1.5
FITTED, EVALUATED = 256, 100


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantize(model: torch.nn.Module, recipe: Recipe, bits: tuple[int, int], seed: int) -> Denoiser:
    """Without balancing, ranges from the smallest to the largest value."""
    update = {"weights": Weights(bits=bits[0]), "activations": Activations(bits=bits[1])}
    recipe = recipe.model_copy(update={**update, "balance": Balance(method="none"), "rounding": Rounding()})
    c = recipe.calibration
    labels = torch.randint(10, (c.samples,), generator=generator(seed)).tolist()
    samples = collect_from_pipeline(
        SamplingPipeline(model, SAMPLING), labels, timesteps=c.timesteps, steps=c.steps, guidance=c.guidance, seed=seed
    )
    return apply_recipe(model, recipe, samples).graph


def noise_sqnr_db(
    model: Denoiser, quantized: Denoiser, tables: dict[str, NoiseCorrection | None], seed: int
) -> dict[str, tuple[float, float]]:
    """Pooled over the steps of the float trajectory, and the median of the steps' own, for each correction."""
    labels = torch.arange(EVALUATED) % 10
    expected: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in tables}
    for t, x, eps, _ in trajectory(model, SAMPLING, labels, steps=STEPS, guidance=GUIDANCE, generator=generator(seed)):
        expected.append(eps)
        eps_q = guided_noise(quantized, SAMPLING, x, t, labels, GUIDANCE)
        for name, table in tables.items():
            found[name].append(eps_q if table is None else table.correct(eps_q, t))
    return {
        name: (
            sqnr_db(torch.cat(expected), torch.cat(noises)),
            statistics.median(map(sqnr_db, expected, noises)),
        )
        for name, noises in found.items()
    }


def draw(denoiser: Denoiser, table: NoiseCorrection | None, seed: int) -> Tensor:
    scheduler = None if table is None else PTQDScheduler(SAMPLING.scheduler(STEPS), table)
    labels = torch.arange(EVALUATED) % 10
    return sample(
        denoiser, SAMPLING, labels, steps=STEPS, guidance=GUIDANCE, generator=generator(seed), scheduler=scheduler
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", nargs="+", choices=list(BITS), default=list(BITS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    model, recipe = load_reference_dit(), load_recipe("digits_w4a8")
    exact = as_denoiser(model)
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    with Progress() as progress:
        task = progress.add_task("quantize, fit, compare", total=len(args.bits) * args.seeds)
        for bits in args.bits:
            for seed in range(args.seeds):
                quantized = quantize(model, recipe, BITS[bits], seed)
                labels = torch.randint(10, (FITTED,), generator=generator(seed))
                table = fit_noise_correction(
                    exact, quantized, SAMPLING, labels, steps=STEPS, guidance=GUIDANCE, generator=generator(100 + seed)
                )
                tables = {"as it is": None, "PTQD": table}
                sqnr = noise_sqnr_db(exact, quantized, tables, 1000 + seed)
                reference = draw(exact, None, 2000 + seed)
                for name, noise in tables.items():
                    mse = (draw(quantized, noise, 2000 + seed) - reference).square().mean().item()
                    row = {"pooled_db": sqnr[name][0], "median_db": sqnr[name][1], "sample_mse": mse}
                    figures.setdefault(bits, {}).setdefault(name, []).append(row)
                figures[bits]["PTQD"][-1] |= {"largest_k": table.k.max().item(), "median_k": table.k.median().item()}
                progress.advance(task)

    print(f"\nmean (standard deviation) over {args.seeds} seeds; simulated; torch {torch.__version__}\n")
    print("| bits | | noise SQNR, pooled (dB) | median over steps (dB) | sample MSE |\n|---|---|---|---|---|")
    for bits, rows in figures.items():
        for name, runs in rows.items():
            pooled, median, mse = ([run[key] for run in runs] for key in ("pooled_db", "median_db", "sample_mse"))
            print(f"| {bits} | {name} | {spread(pooled)} | {spread(median)} | {spread(mse, '.2e')} |")
    if args.json:
        args.json.write_text(json.dumps({"seeds": args.seeds, "figures": figures}, indent=1) + "\n")


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean (standard deviation)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ({deviation:{form}})"


if __name__ == "__main__":
    main()
