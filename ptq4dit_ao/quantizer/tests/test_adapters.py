"""Adapters that were not fused: the layer that one wraps keeps its name, and the adapter's own linears stay float."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from ptq4dit_ao import Override, apply_recipe, balance_module, choose_weight_bits, collect_salience, export_transformer
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ExportError, OverrideError
from ptq4dit_ao.graph import find_sites
from ptq4dit_ao.graph.names import layer_name, linears
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.recipe import Override as RecipeOverride
from ptq4dit_ao.testing.zoo import FAMILIES

RANK = 6
SKIPPED = "*.norm1.linear"
WRAPPED = ("norm1.linear", "attn1.to_q", "attn1.to_out.0", "ff.net.0.proj")


class Adapter(nn.Module):
    """The shape of PEFT's LoRA."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"x": nn.Linear(base.in_features, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"x": nn.Linear(RANK, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["x"](self.lora_A["x"](x))


def home_made(model):
    block = model.transformer_blocks[0]
    for path in WRAPPED:
        owner, _, name = path.rpartition(".")
        setattr(block.get_submodule(owner), name, Adapter(block.get_submodule(path)))


def by_peft(model):
    peft = pytest.importorskip("peft")
    targets = [f"transformer_blocks.0.{path}" for path in WRAPPED]
    config = peft.LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)  # what add_adapter of diffusers calls


@pytest.fixture(params=[home_made, by_peft])
def adapted(request, tiny_dit):
    """The tiny DiT with an adapter on some layers of its first block; large enough to matter."""
    model = copy.deepcopy(tiny_dit)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        request.param(model)
    return model.eval().requires_grad_(False)


def names(graph):
    return [layer_name(node) for node in linears(graph)]


def statuses(quantized):
    return {layer["name"]: layer["status"] for layer in quantized.report["layers"]}


def test_a_recipe_finds_the_layer_that_an_adapter_wraps(adapted, tiny_dit, tiny_samples, caplog):
    recipe = Recipe(overrides=(RecipeOverride(pattern=SKIPPED, skip=True),))
    with caplog.at_level(logging.INFO, "ptq4dit_ao"):
        quantized = apply_recipe(adapted, recipe, tiny_samples)
    found, plain = statuses(quantized), statuses(apply_recipe(tiny_dit, recipe, tiny_samples))
    assert {name: status for name, status in found.items() if "lora" not in name} == plain
    assert found["transformer_blocks.0.norm1.linear"] == "float"
    assert {status for name, status in found.items() if "lora" in name} == {"float"}
    assert len(found) == len(plain) + 2 * len(WRAPPED)
    assert "8 linears of adapters stay float (transformer_blocks.0.attn1.to_out.0.lora_A." in caplog.text
    outputs = [torch.cat([run(*sample) for sample in tiny_samples]) for run in (quantized.graph, as_tensor(adapted))]
    assert sqnr_db(outputs[1], outputs[0]) > 25


def as_tensor(model):
    return lambda *inputs: model(*inputs, return_dict=False)[0]


def test_an_override_for_an_adapter_alone_matches_nothing(adapted, tiny_samples):
    quantizer = PTQ4DiTQuantizer(overrides=(Override(pattern="*.lora_A.*", weight_bits=4),))
    with pytest.raises(OverrideError, match=r"'\*\.lora_A\.\*' matches none of the model's \d+ linear layers"):
        quantizer.plan(export_transformer(adapted, tiny_samples[0]))


def test_sites_have_the_names_they_had(adapted, tiny_exported, tiny_samples):
    exported = export_transformer(adapted, tiny_samples[0])
    statistics = collect_salience(exported, tiny_samples[:2], exclude=["transformer_blocks.0.attn1.to_q"])
    assert not any("lora" in name for name in statistics)
    assert not any("blocks.0.attn1.to_q" in name for name in statistics)  # k and v read the same
    assert len(find_sites(exported)) >= len(find_sites(tiny_exported))


def test_bits_are_chosen_for_the_layers_alone(adapted, tiny_samples):
    exported = export_transformer(adapted, tiny_samples[0])
    chosen = choose_weight_bits(exported, tiny_samples[:2], average_bits=6).chosen
    layers = [layer for inputs in chosen for layer in inputs.layers]
    assert not any("lora" in layer or "base_layer" in layer for layer in layers)
    assert "transformer_blocks.0.attn1.to_q" in layers


def test_a_module_with_an_adapter_is_balanced_together_with_it(adapted, tiny_samples):
    before = as_tensor(adapted)(*tiny_samples[0])
    exported = export_transformer(adapted, tiny_samples[0])
    result = balance_module(adapted, exported, collect_salience(exported, tiny_samples))
    assert "transformer_blocks.0.attn1.to_out.0" in result.outcomes  # by its own name, with the adapter in it
    assert sqnr_db(before, as_tensor(adapted)(*tiny_samples[0])) > 100


def test_without_the_adapter_a_balanced_module_is_the_original(tiny_dit, tiny_samples):
    model = copy.deepcopy(tiny_dit)
    home_made(model)
    exported = export_transformer(model.eval(), tiny_samples[0])
    balance_module(model, exported, collect_salience(exported, tiny_samples))
    for path in WRAPPED:
        path = f"transformer_blocks.0.{path}"
        model.set_submodule(path, model.get_submodule(path).base_layer)
    assert sqnr_db(as_tensor(tiny_dit)(*tiny_samples[0]), as_tensor(model)(*tiny_samples[0])) > 100


def test_an_adapter_that_diffusers_adds():
    peft = pytest.importorskip("peft")
    family = FAMILIES["flux"]
    model, inputs = family.model(), family.inputs(2)
    targets = ["transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn.to_q"]
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    overrides = (RecipeOverride(pattern="*.norm*.linear", skip=True),)
    recipe = Recipe(balance=Balance(method="none"), overrides=overrides)
    tensors = tuple(flatten_call(model, inputs)[1].values())
    found = statuses(apply_recipe(export_transformer(model, inputs), recipe, [tensors]))
    assert found["transformer_blocks.0.norm1.linear"] == "float"
    assert found["transformer_blocks.0.attn.to_q"] == "integer"
    assert {status for name, status in found.items() if ".lora_" in name} == {"float"}


def test_a_model_that_peft_wraps_as_a_whole_is_refused(tiny_dit, tiny_samples):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(tiny_dit), peft.LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ExportError, match=r"PeftModel renames all layers; pass its get_base_model\(\)"):
        apply_recipe(wrapped, Recipe(balance=Balance(method="none")), tiny_samples)
