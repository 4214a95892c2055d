"""Tests that the scripts of docs/diffusers.md run as written, except for models, sizes and steps."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ptq4dit_ao import Recipe, load_recipe
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow import pipeline

DOC = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
SCRIPTS = {
    re.search(r"from diffusers import (\w+)", text)[1]: text  # type: ignore[index]
    for text in re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    if "MODEL =" in text
}

TOKENS = 7


def embeddings(rows: int, width: int = 24) -> Tensor:
    return torch.randn(rows, TOKENS, width, generator=torch.Generator().manual_seed(rows))


def mask(rows: int) -> Tensor:
    return torch.arange(TOKENS).lt(5).long().repeat(rows, 1)


def pooled(rows: int, width: int = 16) -> Tensor:
    return embeddings(rows, width)[:, 0]


def masked(rows: int, width: int = 24) -> tuple[Tensor, ...]:
    return embeddings(rows, width), mask(rows), embeddings(rows, width), mask(rows)


TEXTS = {
    "PixArtSigmaPipeline": masked,
    "StableDiffusion3Pipeline": lambda n: (embeddings(n), embeddings(n), pooled(n), pooled(n)),
    "FluxPipeline": lambda n: (embeddings(n), pooled(n), torch.zeros(TOKENS, 3)),
    "SanaPipeline": masked,
    "WanPipeline": lambda n: (embeddings(n, 20), embeddings(n, 20)),
    "LTXPipeline": lambda n: masked(n, 20),
    "CogVideoXPipeline": lambda n: (embeddings(n, 20), embeddings(n, 20)),
    "HunyuanVideoPipeline": lambda n: (embeddings(n, 20), pooled(n, 18), mask(n)),
}
"""What ``encode_prompt`` returns for so many prompts."""

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
TINY: dict[str, tuple[str, Any]] = {
    "DiTPipeline": ("dit", diffusers.DDIMScheduler()),
    "PixArtSigmaPipeline": ("pixart_sigma", diffusers.DDIMScheduler()),
    "StableDiffusion3Pipeline": ("sd35", FLOW()),
    "FluxPipeline": ("flux", FLOW(use_dynamic_shifting=True)),
    "SanaPipeline": ("sana", FLOW()),
    "WanPipeline": ("wan", FLOW()),
    "LTXPipeline": ("ltx", FLOW()),
    "CogVideoXPipeline": ("cogvideox", diffusers.CogVideoXDDIMScheduler()),
    "HunyuanVideoPipeline": ("hunyuan_video", FLOW()),
}
SIZES = {"height": 64, "width": 64, "num_frames": 5}
OTHER_SIZES = {"SanaPipeline": {"height": 128, "width": 128}, "CogVideoXPipeline": {"num_frames": 17}}
OTHER_SIZES |= {"HunyuanVideoPipeline": {"num_frames": 17}, "LTXPipeline": {"height": 128, "width": 128}}


def make_tiny(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """``from_pretrained`` builds the pipeline without text encoders; it encodes and decodes nothing."""
    kind = getattr(diffusers, name)
    family, scheduler = TINY[name]
    draw = kind.__call__

    saved = kind.from_pretrained

    def build(model: str, **options: Any) -> Any:
        parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
        parts: dict[str, Any] = {p.name: None for p in parameters if p.default is p.empty}
        if Path(model).is_dir():
            made = saved(model, **{p: None for p in parts if not (Path(model) / p).is_dir()}, **options)
            made.set_progress_bar_config(disable=True)
            return made
        parts["scheduler"] = scheduler
        if name == "DiTPipeline":
            parts["vae"] = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
        made = kind(**{**parts, "transformer": FAMILIES[family].model()})
        made.set_progress_bar_config(disable=True)
        return made

    @functools.wraps(draw)
    def to_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        return draw(self, *args, **{**kwargs, "output_type": "np" if name == "DiTPipeline" else "latent"})

    def encode(self: Any, prompt: Any = None, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return TEXTS[name](len(prompt) if isinstance(prompt, list) else 1)

    monkeypatch.setattr(kind, "from_pretrained", staticmethod(build))
    monkeypatch.setattr(kind, "__call__", to_latents)
    if name in TEXTS:
        monkeypatch.setattr(kind, "encode_prompt", encode)


def shortened(name: str) -> str:
    """The script with small sizes."""
    text = re.sub(r"steps=\d\d+", "steps=3", SCRIPTS[name])
    for size, value in {**SIZES, **OTHER_SIZES.get(name, {})}.items():
        text = re.sub(rf'"{size}": \d+', f'"{size}": {value}', text)
    return text


def few_steps(name: str) -> Recipe:
    """A shipped recipe with few steps."""
    recipe = load_recipe(name)
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"timesteps": 2, "steps": 3})})


QUICK = ("DiTPipeline", "StableDiffusion3Pipeline", "WanPipeline")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TINY])
def test_a_script_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny(monkeypatch, name)
    monkeypatch.setattr(pipeline, "load_recipe", few_steps)
    scope: dict[str, Any] = {}
    exec(compile(shortened(name), "docs/diffusers.md", "exec"), scope)
    drawn = torch.as_tensor(scope.get("image", scope.get("frames")))
    assert drawn.isfinite().all() and drawn.std() > 0
    weights = {type(x.weight).__name__ for x in scope["pipe"].transformer.modules() if isinstance(x, torch.nn.Linear)}
    own = "SanaPipeline"  # rounding has added biases to its linears, which torchao's format cannot hold
    assert ("StaticInt8Weight" if name == own else "Int8Tensor") in weights


def test_there_is_a_script_for_each():
    assert sorted(SCRIPTS) == sorted(TINY)
