"""Speed of a quantized module beside the backends and other quantizers, in one interleaved run.

    python integration_tests/measure/module_speed.py [--blocks 4] [--tokens 256] [--rounds 20] [--modulation]

A diffusers DiT at DiT-XL/2 width with random weights is quantized to W8A8. The script prints the table of
``ptq4dit-ao bench --peers``. With ``--modulation``, the linears of adaLN, which the recipe leaves in float, are
quantized too.
"""

from __future__ import annotations

import argparse
import math
import warnings

from ptq4dit_ao import apply_recipe, export_transformer, load_recipe
from ptq4dit_ao.cli.bench import markdown
from ptq4dit_ao.evaluation.bench.peers import FloatModel
from ptq4dit_ao.evaluation.bench.random_dit import random_batches, random_dit
from ptq4dit_ao.evaluation.bench.run import bench
from ptq4dit_ao.evaluation.bench.subjects import Subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--modulation", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    size = 2 * math.isqrt(args.tokens)
    module, batches = random_dit("dit-xl", args.blocks, size), random_batches(2, args.batch, size=size)
    recipe = load_recipe("dit_w8a8")
    rounding = recipe.rounding.model_copy(update={"method": "nearest", "ranges": "minmax", "sequential": False})
    overrides = () if args.modulation else recipe.overrides
    layers = "paper" if args.modulation else recipe.layers
    recipe = recipe.model_copy(update={"rounding": rounding, "overrides": overrides, "layers": layers})
    exported = export_transformer(module, batches[0])
    quantized = apply_recipe(exported, recipe, batches)
    float_model = FloatModel(module=module, exported=exported, batches=batches)
    name = f"DiT-XL/2 width, {args.blocks} blocks, {args.tokens} tokens{', adaLN quantized' * args.modulation}"
    subject = Subject(
        name=name, float_model=float_model, quantized=quantized, seed=0, note="random weights: speed only"
    )
    print(markdown(bench(subject, peers=True, bfloat16=False, rounds=args.rounds)))


if __name__ == "__main__":
    main()
