"""Time of ranges at run time: ``python integration_tests/measure/dynamic_speed.py [--width dit-xl] [--blocks 1]``.

A DiT of random weights is quantized to W8A8 with static ranges, per token everywhere, per token at FC1 and FC2, and
with adaLN's modulation weight-only. All are lowered to every backend, and timed in interleaved rounds in one process.
The columns are the median latency in ms, and its ratio to the static form on the same backend.
"""

from __future__ import annotations

import argparse
import functools
import warnings

import torch

from ptq4dit_ao import apply_recipe, export_transformer, load_recipe, lower, to_module
from ptq4dit_ao.evaluation.bench.random_dit import WIDTHS, random_batches, random_dit
from ptq4dit_ao.metrics import measure_latency
from ptq4dit_ao.recipe import Activations, Override

TOKEN = Activations(dynamic="token")
VARIANTS = {
    "static": {},
    "token": {"activations": TOKEN},
    "token, FC1 and FC2": {"overrides": tuple(Override(pattern=p, dynamic="token") for p in ("*net.0.proj", "*net.2"))},
    "adaLN weight-only": {"overrides": (Override(pattern="*norm1.linear", activation_bits=16),)},
}
BACKENDS = ("fbgemm", "x86_inductor", "openvino", "module eager", "module compiled")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="dit-xl")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = random_dit(args.width, args.blocks)
    batches = random_batches(2, args.batch, 0)
    exported = export_transformer(model, batches[0])
    recipe = load_recipe("minmax")
    runs = {"float32 eager": lambda x, t, y: model(x, timestep=t, class_labels=y).sample}
    for name, changes in VARIANTS.items():
        quantized = apply_recipe(exported, recipe.model_copy(update=changes), batches)
        for backend in args.backends:
            if not backend.startswith("module"):
                lowered = lower(quantized.graph, backend, example_inputs=batches[0], verify=False)
                assert lowered.proof.integer_gemms == lowered.proof.promised
                runs[f"{backend} | {name}"] = lowered
                continue
            module = to_module(quantized, model, example_inputs=batches[0], verify=False)
            if backend == "module compiled":
                module.forward = torch.compile(module.forward)
            runs[f"{backend} | {name}"] = functools.partial(_call, module)
    latency = measure_latency(runs, batches[0], rounds=args.rounds, warmup=2)
    print(f"{args.width}, {args.blocks} blocks, batch {args.batch}, {torch.get_num_threads()} threads\n")
    print("| backend | form | ms | of static |\n|---|---|---|---|")
    for name, result in latency.items():
        backend, _, form = name.partition(" | ")
        static = latency.get(f"{backend} | static")
        ratio = "" if static is None else f"{result.median_ms / static.median_ms:.2f}"
        print(f"| {backend} | {form} | {result.median_ms:.1f} | {ratio} |", flush=True)


def _call(module: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return module(x, timestep=t, class_labels=y).sample


if __name__ == "__main__":
    main()
