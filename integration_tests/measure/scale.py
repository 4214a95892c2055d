"""Sequential rounding at DiT-XL/2 size: ``python integration_tests/measure/scale.py [--blocks 28] [--resume DIR]``.

A diffusers DiT of DiT-XL/2's width with random weights, whose embedders all blocks share, is quantized by the recipe
``fast`` with 4-bit weights and 8-bit activations. The script prints the time of each block, and the peak memory of the
whole process so far as a multiple of the float32 weights. After a kill, the same command with ``--resume`` calibrates
again, reads the rounded layers, and resumes from there.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

from x86_kernels import build_model, samples

from ptq4dit_ao import load_recipe
from ptq4dit_ao.workflow import apply_recipe

BATCH = 8
INPUTS = 5
"""Quantized inputs of a block: modulation; q, k and v; attention's output; both feed-forward layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument(
        "--rows", type=int, default=32, help="calibration rows of 256 tokens each (default: %(default)s)"
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help="keep rounded layers here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    model = build_model(args.blocks)
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights / 4e6:.1f} M parameters; {_peak() / weights:.2f}x float32 before anything", flush=True)
    recipe = load_recipe("fast").model_copy(update={"weights": load_recipe("dit_w4a8").weights})
    start = last = time.perf_counter()

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        if stage == "calibrate":
            print(f"batch {done}: {time.perf_counter() - start:.0f} s, peak {_peak() / weights:.2f}x", flush=True)
        elif stage == "round" and done % INPUTS == 0:
            now = time.perf_counter()
            block = f"block {done // INPUTS} of {total // INPUTS}"
            print(f"{block}: {now - last:.0f} s, peak {_peak() / weights:.2f}x", flush=True)
            last = now

    batches = [tuple(batch) for batch in samples(args.rows // BATCH, BATCH)]
    quantized = apply_recipe(model, recipe, batches, on_progress=on_progress, resume=args.resume)
    print(f"{time.perf_counter() - start:.0f} s in all, peak {_peak() / weights:.2f}x: {quantized.report['seconds']}")


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
