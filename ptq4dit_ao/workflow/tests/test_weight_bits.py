"""Bits of weights under a budget: what is chosen, that it is what runs, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx import GraphModule

from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.graph.names import get_attribute, layer_name, linears, set_tensor, weight_path
from ptq4dit_ao.quantizer import Override, PTQ4DiTQuantizer
from ptq4dit_ao.recipe import Override as RecipeOverride
from ptq4dit_ao.recipe import Recipe, Rounding, Weights
from ptq4dit_ao.workflow import apply_recipe, choose_weight_bits, load_quantized, quantizer_from_recipe

FRAGILE = "transformer_blocks.1.ff.net.0.proj"


@pytest.fixture(scope="module")
def fragile(tiny_exported) -> GraphModule:
    """The tiny DiT with a layer that 4 bits ruin: one weight of each output channel is far larger than the rest."""
    graph = copy.deepcopy(tiny_exported)
    (node,) = (node for node in linears(graph) if layer_name(node) == FRAGILE)
    weight = get_attribute(graph, weight_path(node)).clone()
    weight[:, 3] *= 40
    set_tensor(graph, weight_path(node), weight)
    return graph


def mean_bits(report: dict, graph: GraphModule) -> float:
    sizes = {layer_name(node): get_attribute(graph, weight_path(node)).numel() for node in linears(graph)}
    layers = {x["name"]: x["weight_bits"] for x in report["layers"] if x["status"] == "integer"}
    return sum(sizes[name] * bits for name, bits in layers.items()) / sum(sizes[name] for name in layers)


@pytest.fixture(scope="module")
def choice(fragile, tiny_samples):
    return choose_weight_bits(
        fragile, tiny_samples, average_bits=5, quantizer=PTQ4DiTQuantizer(balance="none", rounding="gptq")
    )


def test_the_layer_that_4_bits_ruin_gets_8(choice):
    (ruined,) = (inputs for inputs in choice.chosen if inputs.layers == (FRAGILE,))
    assert ruined.bits == 8 and ruined.noise[0] == max(inputs.noise[0] for inputs in choice.chosen)
    assert {inputs.bits for inputs in choice.chosen} == {4, 8}
    assert Override(pattern=FRAGILE, weight_bits=8) in choice.overrides


def test_the_budget_is_kept_and_used(choice, fragile):
    total = sum(inputs.parameters for inputs in choice.chosen)
    assert choice.average_bits == sum(inputs.bits * inputs.parameters for inputs in choice.chosen) / total
    smallest = min(inputs.parameters for inputs in choice.chosen if inputs.bits == 4)
    assert 5 - 4 * smallest / total < choice.average_bits <= 5
    # q, k and v read one input, so that they are one choice.
    assert sorted(len(inputs.layers) for inputs in choice.chosen) == [1] * 8 + [3] * 2


def test_the_highest_width_is_6_db_a_bit_better_than_the_one_before(choice):
    assert all(high == pytest.approx(low / 256) for low, high in (inputs.noise for inputs in choice.chosen))


def test_what_a_recipe_chooses_is_what_runs_and_is_saved(fragile, tiny_samples, tmp_path):
    seen: list[tuple[int, int]] = []
    recipe = Recipe(
        weights=Weights(bits="auto", average_bits=5, candidates=(8, 4)),
        rounding=Rounding(method="gptq", ranges="output", sequential=True),
        overrides=(
            RecipeOverride(pattern=FRAGILE, weight_bits=4),
            RecipeOverride(pattern="*.to_q", skip=True),
            RecipeOverride(pattern="transformer_blocks.0.norm1.linear", weight_bits=8),
        ),
    )
    model = apply_recipe(fragile, recipe, tiny_samples, on_progress=lambda *at: seen.append(at))
    seen = [at for at in seen if at[0] == "choose bits"]
    layers = {layer["name"]: layer["weight_bits"] for layer in model.report["layers"]}
    # Overrides win, and are paid for.
    assert (layers[FRAGILE], layers["transformer_blocks.0.norm1.linear"]) == (4, 8)
    assert layers["transformer_blocks.0.attn1.to_q"] is None
    chosen = {name: entry["bits"] for entry in model.report["weight_bits"]["inputs"] for name in entry["layers"]}
    assert FRAGILE not in chosen and {4, 8} == set(chosen.values())
    assert all(layers[name] == bits for name, bits in chosen.items())
    assert mean_bits(model.report, fragile) == pytest.approx(model.report["weight_bits"]["average_bits"])
    assert 4.5 < model.report["weight_bits"]["average_bits"] <= 5
    assert seen[-1] == ("choose bits", 8, 8)  # without those that have their bits
    # The recipe that is kept says it in numbers, and gives the same model again.
    assert model.recipe.weights == Weights(bits=4) and len(model.recipe.overrides) > 3
    model.save(tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert loaded.recipe == model.recipe and loaded.report["weight_bits"] == model.report["weight_bits"]
    again = apply_recipe(fragile, loaded.recipe, tiny_samples)
    assert torch.equal(again.graph(*tiny_samples[0]), model.graph(*tiny_samples[0]))


def test_layers_with_bits_of_their_own_do_not_count_against_their_neighbours(tiny_exported, tiny_samples):
    def noise(**bits):
        overrides = [Override(pattern="*.attn1.to_v", **bits)] if bits else []
        quantizer = PTQ4DiTQuantizer(balance="none", rounding="gptq", overrides=overrides)
        chosen = choose_weight_bits(tiny_exported, tiny_samples, average_bits=5, quantizer=quantizer).chosen
        return {inputs.layers: inputs.noise[0] for inputs in chosen}

    free, fixed = noise(), noise(weight_bits=2)
    names = {layer.rpartition(".")[2] for layers in fixed for layer in layers}
    assert "to_v" not in names and {"to_q", "to_k"} <= names
    for layers, energy in fixed.items():
        whole = next(free[found] for found in free if set(layers) <= set(found))
        assert energy < 1.05 * whole  # that of v at 2 bits is many times this


def test_three_candidates(fragile, tiny_samples):
    seen: list[tuple[int, int]] = []
    found = choose_weight_bits(
        fragile,
        tiny_samples,
        average_bits=4,
        candidates=(8, 3, 4),
        quantizer=PTQ4DiTQuantizer(balance="none"),
        on_progress=lambda *run: seen.append(run),
    )
    assert found.candidates == (3, 4, 8) and found.average_bits <= 4
    assert all(inputs.noise[0] > inputs.noise[1] > inputs.noise[2] for inputs in found.chosen)
    assert seen == [(done, 20) for done in range(1, 21)]


@pytest.mark.parametrize(
    ("average", "candidates", "message"),
    [
        (3, (4, 8), "average_bits is 3, and the candidates go from 4 to 8; choose it between them"),
        (9, (4, 8), "average_bits is 9, and the candidates go from 4 to 8"),
        (5, (4, 4), r"candidates are \[4, 4\]; give at least two different widths, such as \[4, 8\]"),
        (5, (4, 16), "a candidate for weight_bits is 16; it must be an integer from 2 to 8"),
    ],
)
def test_budgets_that_make_no_sense(tiny_exported, tiny_samples, average, candidates, message):
    with pytest.raises(ArgumentError, match=message):
        choose_weight_bits(tiny_exported, tiny_samples, average_bits=average, candidates=candidates)


def test_overrides_may_leave_too_little_or_nothing(tiny_exported, tiny_samples):
    def choose(average: float, *patterns: str) -> None:
        overrides = [Override(pattern=pattern, weight_bits=8) for pattern in patterns]
        quantizer = PTQ4DiTQuantizer(overrides=overrides, rounding="nearest")
        choose_weight_bits(tiny_exported, tiny_samples[:2], average_bits=average, quantizer=quantizer)

    with pytest.raises(ArgumentError, match=r"with the overrides, and 4 bits elsewhere, the weights take 5\.\d+ on av"):
        choose(4.5, "*.ff.*")
    with pytest.raises(ArgumentError, match="overrides set the bits of all 20 quantized layers; there is none to"):
        choose(5, "*")


def test_without_samples_or_outside_of_apply_recipe(tiny_exported):
    with pytest.raises(CalibrationError, match="there are no calibration samples"):
        choose_weight_bits(tiny_exported, [], average_bits=5)
    with pytest.raises(ArgumentError, match="weights.bits is auto; apply_recipe and 'ptq4dit-ao quantize' choose them"):
        quantizer_from_recipe(Recipe(weights=Weights(bits="auto", average_bits=5)))
