"""The shipped recipes of model families, against the layer names of tiny models with the checkpoints' structure."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from ptq4dit_ao.graph.names import layer_name, linears
from ptq4dit_ao.quantizer.overrides import SAFE_LAYERS
from ptq4dit_ao.recipe import Override, load_recipe, shipped_recipes
from ptq4dit_ao.testing.zoo import FAMILIES

pytest.importorskip("diffusers")

Variant = tuple[str, dict[str, Any]]
"""A family of the zoo, and what its configuration has else: options that add or take away layers."""

RECIPES: dict[str, list[Variant]] = {
    "auraflow": [("auraflow", {})],
    "chroma": [("chroma", {})],
    "cogvideox": [("cogvideox", {}), ("cogvideox", {"use_rotary_positional_embeddings": True}), ("cogvideox15", {})],
    "cogview4": [("cogview4", {}), ("cogview3plus", {})],
    "dit_xl_2": [("dit", {})],
    "flux2_dev": [("flux2", {}), ("flux2", {"guidance_embeds": False})],
    "flux_dev": [("flux", {}), ("flux", {"guidance_embeds": False})],
    "hidream": [("hidream", {})],
    "hunyuan_dit": [("hunyuan_dit", {}), ("hunyuan_dit", {"use_style_cond_and_image_meta_size": False})],
    "hunyuan_video": [("hunyuan_video", {}), ("hunyuan_video_i2v", {})],
    "latte": [("latte", {})],
    "ltx": [("ltx", {})],
    "lumina2": [("lumina2", {})],
    "mochi": [("mochi", {})],
    "pixart_sigma": [("pixart_sigma", {}), ("pixart_alpha", {}), ("pixart_alpha_1024", {})],
    "qwenimage": [("qwenimage", {})],
    "sana": [("sana", {}), ("sana_sprint", {})],
    "sd3_5": [("sd35", {}), ("sd35", {"dual_attention_layers": ()}), ("sd3", {})],
    "wan": [("wan", {}), ("wan22", {}), ("wan_i2v", {})],
    "z_image": [("z_image", {})],
}

VARIANTS = [
    pytest.param(recipe, *variant, id="-".join([recipe, variant[0], *variant[1]]))
    for recipe, variants in RECIPES.items()
    for variant in variants
]

BLOCK = r"(\w*blocks|layers|(noise|context)_refiner)\.\d+\.(block\.)?"
WORK = r"(attn\d?|attention|ff|ff_context|ff_[it]|ffn|feed_forward|(img|txt)_mlp)\.(?!gate$)|proj_(mlp|out)$"
QUANTIZED = re.compile(f"{BLOCK}({WORK})")
"""Attention and feed-forward of the blocks, but not the router in front of experts."""

GENERAL = {"digits", "dit", "paper"}


@cache
def layer_names(family: str, options: tuple[tuple[str, Any], ...]) -> list[str]:
    """Names of the linears, and of the routers, which hold a weight and call ``linear`` themselves."""
    model: Any = FAMILIES[family].build()
    if options:
        model = type(model).from_config({**model.config, **dict(options)})
    return [name for name, module in model.named_modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "MoEGate"


def matches(patterns: list[str], names: list[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


SAFE = [override.pattern for override in SAFE_LAYERS]


def skips(recipe: str) -> list[str]:
    return [override.pattern for override in load_recipe(f"{recipe}_w8a8").overrides if override.skip]


def modulations(recipe: str) -> list[str]:
    """Patterns of layers of one row a sample, which have ranges for each row."""
    overrides = [override for override in load_recipe(f"{recipe}_w8a8").overrides if not override.skip]
    assert all(override == Override(pattern=override.pattern, dynamic="token") for override in overrides)
    return [override.pattern for override in overrides]


def test_every_family_recipe_is_tested() -> None:
    general = {f"{name}_{bits}" for name in GENERAL for bits in ("w4a8", "w8a8")}
    families = {f"{name}_{bits}" for name in RECIPES for bits in ("w4a8", "w8a8")}
    methods = {name for name in shipped_recipes() if not name.endswith(("_w4a8", "_w8a8"))}
    assert set(shipped_recipes()) - methods == general | families


@pytest.mark.parametrize(("recipe", "family", "options"), VARIANTS)
def test_attention_feed_forward_and_modulation_are_quantized_and_nothing_else(
    recipe: str, family: str, options: dict[str, Any]
) -> None:
    names = layer_names(family, tuple(options.items()))
    skipped = matches([*SAFE, *skips(recipe)], names)
    rows = matches(modulations(recipe), names) - matches(skips(recipe), names)
    assert all(re.match(BLOCK, name) and not QUANTIZED.match(name) for name in rows)
    assert set(names) - skipped == {name for name in names if QUANTIZED.match(name)} | rows != rows


@pytest.mark.parametrize(("recipe", "family", "options"), VARIANTS)
def test_every_pattern_matches(recipe: str, family: str, options: dict[str, Any]) -> None:
    names = layer_names(family, tuple(options.items()))
    patterns = [*skips(recipe), *modulations(recipe)]
    assert [pattern for pattern in patterns if not matches([pattern], names)] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_pattern_is_needed(recipe: str) -> None:
    names = {name for family, options in RECIPES[recipe] for name in layer_names(family, tuple(options.items()))}
    left = sorted(names - matches(SAFE, sorted(names)))
    for pattern in skips(recipe):
        others = [other for other in skips(recipe) if other != pattern]
        assert matches([pattern], left) - matches(others, left), f"{pattern} skips nothing that is not skipped anyway"


@pytest.mark.parametrize("recipe", RECIPES)
def test_four_bits_differ_in_bits_only(recipe: str) -> None:
    low, high = (load_recipe(f"{recipe}_{bits}").to_dict() for bits in ("w4a8", "w8a8"))
    levels = {"levels": "normal", "group": 16}
    assert (low.pop("weights"), high.pop("weights")) == ({"bits": 4, **levels}, {"bits": 8, **levels})
    assert low.pop("description") != high.pop("description")
    assert low == high


@pytest.mark.parametrize("recipe", RECIPES)
def test_as_many_steps_as_timesteps(recipe: str) -> None:
    loaded = load_recipe(f"{recipe}_w8a8")
    for timesteps in (loaded.calibration.timesteps, loaded.evaluation.timesteps):
        assert isinstance(timesteps, int) and timesteps <= loaded.calibration.steps


def test_a_router_is_a_linear_once_exported() -> None:
    model: Any = FAMILIES["hidream"].build()
    gate = model.double_stream_blocks[0].block.ff_i.gate
    exported = torch.export.export(nn.Sequential(gate).eval(), (torch.randn(2, 6, gate.weight.shape[1]),))
    assert [layer_name(node) for node in linears(exported.module())] == ["0"]
