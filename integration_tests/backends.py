"""Table of the backends that this machine can run: ``python integration_tests/backends.py`` (``tox run -e backends``).

It quantizes the shipped digits DiT to W8A8 and W4A8, lowers both to every backend, and prints one table: the number of
quantized linears that ran on integer kernels, the error against the simulation, the seconds until the first result, and
the reason for each backend that cannot run. It exits with 1 if an available backend fails.
"""

from __future__ import annotations

import sys
import time
import warnings

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ptq4dit_ao import apply_recipe, collect_from_pipeline, load_recipe, load_reference_dit
from ptq4dit_ao.calibration import SamplingPipeline
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.evaluation.environment import environment, one_line
from ptq4dit_ao.lowering.backend import BACKENDS, Backend
from ptq4dit_ao.reference import SAMPLING
from ptq4dit_ao.workflow import QuantizedModel

RECIPES = {"W8A8": "digits_w8a8", "W4A8": "digits_w4a8"}
PARITY_DB = 45
"""As in test_backends.py."""
NOTHING = ("-",) * (len(RECIPES) + 2)


def quantize() -> tuple[dict[str, QuantizedModel], tuple[Tensor, ...]]:
    """The digits DiT at both bit widths, and inputs."""
    pipeline = SamplingPipeline(load_reference_dit(), SAMPLING)
    samples = collect_from_pipeline(pipeline, list(range(10)), timesteps=8, steps=8, guidance=1.5)
    models = {bits: apply_recipe(pipeline.transformer, load_recipe(name), samples) for bits, name in RECIPES.items()}
    return models, next(samples.shuffled(1).batches(16))


def run(backend: Backend, model: QuantizedModel, inputs: tuple[Tensor, ...]) -> tuple[str, float, float]:
    """Integer kernels of promised ones, SQNR against the simulation in dB, seconds from the graph to the output.

    Raises:
        Exception: what the backend raises; or AssertionError, if it computes something else.
    """
    expected = model.lower("reference")(*inputs)
    start = time.perf_counter()
    lowered = model.lower(backend.name)
    output = lowered(*inputs)
    seconds = time.perf_counter() - start
    error = sqnr_db(expected, output)
    assert error > PARITY_DB, f"its output is {error:.1f} dB from the simulation's"
    proof = lowered.proof
    return f"{proof.integer_gemms}/{proof.promised}" if backend.integer else "simulated", error, seconds


@torch.no_grad()
def main() -> int:
    """Print the table."""
    warnings.filterwarnings("ignore")
    console, failed = Console(), []
    table = Table(
        "backend", *RECIPES, "SQNR vs simulation dB", "start-up s", "why not", title="integer kernels / promised"
    )
    with Progress(console=console) as progress:
        task = progress.add_task("quantize", total=1 + len(BACKENDS))
        models, inputs = quantize()
        for name, backend in BACKENDS.items():
            progress.update(task, advance=1, description=name)
            why = backend.unavailable()
            if why is not None:
                table.add_row(name, *NOTHING, escape(why))
                continue
            try:
                results = [run(backend, model, inputs) for model in models.values()]
            except Exception as error:  # whatever it is, the other backends are still to be shown
                failed.append(name)
                table.add_row(f"[red]{name}[/]", *NOTHING, f"failed: {type(error).__name__}: {escape(str(error))}")
                continue
            kernels, errors, seconds = zip(*results, strict=True)
            columns = [", ".join(f"{value:.1f}" for value in values) for values in (errors, seconds)]
            table.add_row(f"[green]{name}[/]", *kernels, *columns)
        progress.update(task, advance=1, description="done")
    console.print(table)
    console.print(one_line(environment()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
