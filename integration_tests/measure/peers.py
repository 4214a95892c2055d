"""Public quantizers beside this one on the digits DiT: ``python integration_tests/measure/peers.py [--json FILE]``.

All get the same float model, the same calibration batches, 8-bit weights per output channel and 8-bit static
activations per tensor. They run with integer kernels, whose calls are counted in one forward. The metric is eps SQNR in
dB on samples that none was calibrated on, pooled and as the median over timesteps. NNCF's quantizer includes
SmoothQuant and bias correction. It also quantizes the products of attention, and operations other than linear layers.
The public quantizers take all linears. This package's recipes leave embedders and output layers in float, unless the
row says "all linears". Quantizers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from accuracy import BATCH, draw_samples, with_method
from rich.progress import Progress

from ptq4dit_ao import export_transformer, load_recipe, load_reference_dit, lower
from ptq4dit_ao.evaluation.bench.peers import (
    Contender,
    FloatModel,
    Started,
    nncf_int8,
    torchao_smoothquant,
    torchao_static,
)
from ptq4dit_ao.metrics import paired_error
from ptq4dit_ao.workflow import apply_recipe

OURS = ("CSB + SSC", "fast", "auto")
BACKENDS = {"fbgemm": "torch", "openvino": "openvino"}


def ours(method: str, backend: str, layers: str = "safe") -> Contender:
    def start(model: FloatModel) -> Started:
        graph = copy.deepcopy(model.exported)
        recipe = with_method(load_recipe("digits_w8a8"), "W8A8", method).model_copy(update={"layers": layers})
        quantized = apply_recipe(graph, recipe, model.batches).graph
        lowered = lower(quantized, backend, example_inputs=model.batches[0])
        return Started(run=lowered, integer_gemms=lowered.proof.integer_gemms)

    name = f"ptq4dit-ao {method}{', all linears' if layers == 'paper' else ''} ({backend})"
    return Contender(name=name, start=start, packages=(BACKENDS[backend],))


def accurate_bias_correction(model: FloatModel) -> Started:
    return nncf_int8(model, fast_bias_correction=False)


CONTENDERS = (
    Contender(name="torchao X86 quantizer, min-max", start=torchao_static, packages=("torchao",)),
    Contender(name="torchao SmoothQuant 0.5", start=torchao_smoothquant, packages=("torchao",)),
    Contender(name="NNCF, fast bias correction", start=nncf_int8, packages=("nncf", "openvino")),
    Contender(name="NNCF, bias correction", start=accurate_bias_correction, packages=("nncf", "openvino")),
    *(ours(method, backend) for backend in BACKENDS for method in OURS),
    ours("auto", "fbgemm", "paper"),
)


@torch.no_grad()  # else Inductor does not freeze, and finds no integer kernels
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only rows whose names contain this text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    recipe, module = load_recipe("digits_w8a8"), load_reference_dit()
    evaluation = list(draw_samples(module, recipe, count=recipe.evaluation.samples, seed=1000).batches(BATCH))
    exported = export_transformer(module, evaluation[0])
    contenders = [c for c in CONTENDERS if args.only in c.name and all(map(find_spec, c.packages))]
    rows: list[dict[str, object]] = []
    with Progress() as progress:
        task = progress.add_task("quantize and evaluate", total=len(contenders) * args.draws)
        for contender in contenders:
            pooled, median, gemms = [], [], None
            for seed in range(args.draws):
                samples = draw_samples(module, recipe, count=recipe.calibration.samples, seed=seed).shuffled(0)
                batches = [batch for batch in samples.batches(BATCH) if len(batch[0]) == BATCH]
                started = contender.start(FloatModel(module=module, exported=exported, batches=batches))
                error = paired_error(exported, started.run, evaluation)
                pooled.append(error.sqnr_db)
                median.append(statistics.median(error.per_timestep.values()))
                gemms = started.integer_gemms
                progress.advance(task)
            rows.append(
                {
                    "name": contender.name,
                    "sqnr_db": statistics.mean(pooled),
                    "sd": statistics.stdev(pooled) if args.draws > 1 else 0.0,
                    "median_t_db": statistics.mean(median),
                    "integer_gemms": gemms,
                }
            )
            progress.console.print(as_row(rows[-1]))
    print("\n| quantizer | pooled | sd | median over t | integer products |\n" + "|---" * 5 + "|")
    print("\n".join(map(as_row, rows)))
    if args.json:
        args.json.write_text(
            json.dumps({"draws": args.draws, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )


def as_row(row: dict) -> str:
    figures = " | ".join(f"{row[name]:.2f}" for name in ("sqnr_db", "sd", "median_t_db"))
    return f"| {row['name']} | {figures} | {row['integer_gemms']} |"


if __name__ == "__main__":
    main()
