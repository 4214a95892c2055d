"""Picture of the README: ``python integration_tests/measure/sample_counts.py docs/images/digits.png``.

It shows samples of the shipped digits DiT in float32, W8A8 and W4A8 (simulated) from equal noise, the pixel error
against float32, and how many samples the judge assigns to the requested digit.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ptq4dit_ao import apply_recipe, load_recipe, load_reference_classifier, load_reference_dit
from ptq4dit_ao.calibration import as_denoiser, sample
from ptq4dit_ao.calibration.sampling import Denoiser
from ptq4dit_ao.reference import SAMPLING
from ptq4dit_ao.workflow import load_model
from ptq4dit_ao.workflow.samples import recorded_samples

PER_CLASS = 20
SHOWN_PER_CLASS = 2


def draw(denoiser: Denoiser) -> Tensor:
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    generator = torch.Generator().manual_seed(2)
    return sample(denoiser, SAMPLING.by("ddpm"), labels, steps=50, guidance=1.5, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    model, judge = load_reference_dit(), load_reference_classifier()
    images = {"float32": draw(as_denoiser(model))}
    for title, name in {"W8A8": "digits_w8a8", "W4A8": "digits_w4a8"}.items():
        recipe = load_recipe(name)
        images[title] = draw(apply_recipe(model, recipe, recorded_samples(load_model("reference"), recipe)).graph)
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    for axes, (title, x) in zip(figure.subplots(3, 1), images.items(), strict=True):
        tiles = torch.nn.functional.pad(x.view(10, PER_CLASS, 8, 8)[:, :SHOWN_PER_CLASS], (1, 1, 1, 1), value=-0.4)
        grid = tiles.permute(1, 2, 0, 3).reshape(10 * SHOWN_PER_CLASS, 100)  # a column a class
        axes.imshow(grid, cmap="gray", vmin=-1, vmax=1)
        axes.set_title(title)
        axes.set_axis_off()
        accuracy = (judge(x).argmax(1) == labels).float().mean().item()
        mse = (x - images["float32"]).square().mean().item()
        print(f"{title}: judged right {100 * accuracy:.1f} % of {len(x)}, pixel MSE against float32 {mse:.2e}")
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
