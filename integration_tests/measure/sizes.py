"""Sizes on disk at DiT-XL/2: ``python integration_tests/measure/sizes.py [--blocks 28] [--recipes dit_xl_2_w4a8]``.

A diffusers DiT of DiT-XL/2's shape with random weights, whose embedders are equal in all blocks as in the checkpoint,
is quantized with the layers, bits and levels of each recipe, but rounded to nearest without balancing, which does not
change sizes. The script saves it as an artifact and as a module, and prints the bytes of both as multiples of float32,
the bits of a quantized weight, and the seconds that loading takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel
from x86_kernels import build_model, samples

from ptq4dit_ao import apply_recipe, export_transformer, load_quantized, load_recipe, to_module
from ptq4dit_ao.recipe import Balance, Distillation, Recipe, Rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--recipes", nargs="+", default=["dit_xl_2_w8a8", "dit_xl_2_w4a8"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = build_model(args.blocks)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    float32 = 4 * sum(parameter.numel() for parameter in model.parameters())
    batches = samples(1, 2)
    print(f"{args.blocks} blocks, {float32 / 1e6:.1f} MB in float32\n")
    print("| recipe | bits a weight | artifact MB | x float32 | load s | module MB | x float32 | load s |")
    print("|---" * 8 + "|")
    for name in args.recipes:
        quantized = apply_recipe(export_transformer(model, batches[0]), plain(load_recipe(name)), batches)
        with tempfile.TemporaryDirectory() as folder:
            artifact, saved = Path(folder) / "artifact", Path(folder) / "module"
            quantized.save(artifact)
            to_module(quantized, model, verify=False).save_pretrained(saved)
            del quantized
            loaded, seconds = timed(lambda path=artifact: load_quantized(path))
            assert loaded.report["size"] is not None
            cells = [f"{loaded.report['size']['bits_per_weight']:.2f}"]
            del loaded
            _, of_module = timed(lambda path=saved: DiTTransformer2DModel.from_pretrained(path))
            for path, taken in ((artifact, seconds), (saved, of_module)):
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                cells += [f"{size / 1e6:.1f}", f"{size / float32:.3f}", f"{taken:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds that it takes."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def plain(recipe: Recipe) -> Recipe:
    """The recipe without what takes time and leaves sizes as they are."""
    changes = {"balance": Balance(method="none"), "rounding": Rounding(), "distillation": Distillation()}
    return recipe.model_copy(update=changes)


if __name__ == "__main__":
    main()
