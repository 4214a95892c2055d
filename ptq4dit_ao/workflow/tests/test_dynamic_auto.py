"""Inputs that are quantized per token under a budget: which are chosen, that they are what runs, and refusals."""

from __future__ import annotations

import pytest
import torch

from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.lowering import quantized_linears
from ptq4dit_ao.passes import balance_result
from ptq4dit_ao.quantizer import Override, PTQ4DiTQuantizer
from ptq4dit_ao.recipe import Activations, Recipe
from ptq4dit_ao.recipe import Override as RecipeOverride
from ptq4dit_ao.report import write_html
from ptq4dit_ao.workflow import apply_recipe, load_quantized, quantizer_from_recipe
from ptq4dit_ao.workflow.dynamic import choose_dynamic


@pytest.fixture(scope="module")
def samples(tiny_samples):
    """Samples of very different sizes, which one range does not fit."""
    sizes = torch.logspace(-1.5, 1.5, 4).view(4, 1, 1, 1)
    return [(x * sizes, t, y) for x, t, y in tiny_samples]


def chosen(quantized) -> set[str]:
    layers = balance_result(quantized.graph).layers
    return {layers[linear.name] for linear in quantized_linears(quantized.graph) if linear.per_token is not None}


@pytest.mark.parametrize("share", [0.35, 0.7])
def test_the_share_is_kept_and_what_gains_most_is_chosen(share, tiny_exported, samples):
    choice = choose_dynamic(tiny_exported, samples, share=share, quantizer=PTQ4DiTQuantizer())
    assert sum(inputs.share for inputs in choice.chosen) == pytest.approx(1)
    taken = [inputs for inputs in choice.chosen if inputs.dynamic]
    assert 0 < choice.share <= share and choice.share == pytest.approx(sum(inputs.share for inputs in taken))
    left = [inputs for inputs in choice.chosen if not inputs.dynamic and inputs.noise[0] > inputs.noise[1]]
    assert taken and left
    fits = [inputs for inputs in left if choice.share + inputs.share <= share]
    assert not fits  # nothing that gains would still fit
    assert all(inputs.noise[0] > inputs.noise[1] for inputs in taken)
    q, k, v = (f"transformer_blocks.0.attn1.to_{name}" for name in "qkv")
    assert any(inputs.layers == (q, k, v) for inputs in choice.chosen)


def test_a_recipe_is_followed_and_reported(tiny_exported, samples, tmp_path):
    recipe = Recipe(
        activations=Activations(dynamic="auto", share=0.6),
        overrides=(RecipeOverride(pattern="*attn1.to_out.0", dynamic=False),),
    )
    stages = set()
    model = apply_recipe(tiny_exported, recipe, samples, on_progress=lambda stage, *_: stages.add(stage))
    entry = model.report["dynamic"]
    layers = {layer for inputs in entry["inputs"] if inputs["dynamic"] for layer in inputs["layers"]}
    assert layers == chosen(model) and 0 < entry["share"] <= 0.6 and "choose dynamic" in stages
    assert not any("to_out" in layer for inputs in entry["inputs"] for layer in inputs["layers"])
    assert model.recipe.activations.dynamic is False and sum(x["noise"][0] for x in entry["inputs"]) == pytest.approx(
        1, 1e-2
    )
    static = apply_recipe(tiny_exported, Recipe(), samples)
    expected = torch.cat([tiny_exported(*s) for s in samples])
    db = [sqnr_db(expected, torch.cat([m.graph(*s) for s in samples])) for m in (static, model)]
    assert db[1] > db[0] + 1
    assert {x["name"] for x in model.report["layers"] if x["dynamic"] == "token"} == layers
    model.save(tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert chosen_names(loaded) == chosen_names(model)
    assert torch.equal(loaded.graph(*samples[0]), model.graph(*samples[0]))
    assert loaded.lower("fbgemm").proof.integer_gemms == 14
    write_html(model.report, tmp_path / "report.html")
    assert "Ranges at run time" in (tmp_path / "report.html").read_text()


def chosen_names(model) -> list[str]:
    return [linear.name for linear in quantized_linears(model.graph) if linear.per_token is not None]


def test_nothing_to_choose_or_no_room_is_refused(tiny_exported, samples):
    everything = PTQ4DiTQuantizer(overrides=(Override(pattern="*", dynamic="token"),))
    with pytest.raises(ArgumentError, match="overrides decide on the ranges of all quantized layers"):
        choose_dynamic(tiny_exported, samples, share=0.5, quantizer=everything)
    much = PTQ4DiTQuantizer(overrides=(Override(pattern="*ff.net*", dynamic="token"),))
    with pytest.raises(ArgumentError, match=r"share is 0.1, but overrides make 0\.\d+ of the multiplications dynamic"):
        choose_dynamic(tiny_exported, samples, share=0.1, quantizer=much)
    with pytest.raises(ArgumentError, match="activations.dynamic is auto; apply_recipe"):
        quantizer_from_recipe(Recipe(activations=Activations(dynamic="auto", share=0.5)))
