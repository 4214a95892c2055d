"""Models that are no float models are refused where they are given, by name and with the way out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.errors import ArgumentError, ExportError
from ptq4dit_ao.lowering import lower
from ptq4dit_ao.passes import balance_module, collect_salience
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer
from ptq4dit_ao.recipe import Recipe
from ptq4dit_ao.workflow import apply_recipe


def layerwise_cast(model, _):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


def quantized_by_torchao(model, _):
    quantize_(model, Int8WeightOnlyConfig())
    return model


def with_foreign_layer(model, _):
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.transformer_blocks[0].attn1.to_q = kind(32, 32)
    return model


def with_bytes(model, _):
    weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    model.transformer_blocks[0].attn1.to_k.weight = weight
    return model


def with_hook(model, _):
    from diffusers.hooks import HookRegistry, ModelHook

    registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1])
    registry.register_hook(ModelHook(), "some_cache")
    return model


def offloaded(model, _):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.transformer_blocks[0], hooks.AlignDevicesHook("cpu", offload=True))
    return model


def lowered(_, quantized):
    return lower(quantized(), "reference")


class Holder(nn.Module):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def forward(self, *inputs):
        return self.graph(*inputs)


CASES = {
    layerwise_cast: r"is already cast, by diffusers' layerwise casting \('transformer_blocks\.0\..*start from the",
    quantized_by_torchao: r"is already quantized, by torchao \('transformer_blocks\.0\..*start from the float model",
    with_foreign_layer: r"by bitsandbytes \('transformer_blocks\.0\.attn1\.to_q' is a Linear4bit\); start from",
    with_bytes: r"quantized or cast \('transformer_blocks\.0\.attn1\.to_k\.weight' is uint8\); start from",
    with_hook: r"has diffusers' hook 'some_cache' on 'transformer_blocks\.1', which a graph cannot keep; take it away",
    offloaded: r"accelerate's hook AlignDevicesHook on 'transformer_blocks\.0', .* load it without offloading",
    lowered: r"LoweredModel is already quantized, and lowered, by ptq4dit_ao; start from the float model",
    lambda _, quantized: Holder(quantized()): r"Holder is already quantized, by PT2E or NNCF \(node 'dequantize",
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_float_model_is_named(case, tiny_dit, tiny_samples, quantized):
    model = case(copy.deepcopy(tiny_dit), quantized)
    with pytest.raises(ExportError, match=CASES[case]):
        export_transformer(model, tiny_samples[0])
    with pytest.raises(ExportError, match=CASES[case]):
        apply_recipe(model, Recipe(), tiny_samples)


def test_a_model_that_was_quantized_after_its_export_is_not_balanced(tiny_dit, tiny_samples):
    model = copy.deepcopy(tiny_dit)
    exported = export_transformer(model, tiny_samples[0])
    statistics = collect_salience(exported, tiny_samples)
    with pytest.raises(ExportError, match="already quantized, by torchao"):
        balance_module(quantized_by_torchao(model, None), exported, statistics)


def test_a_quantized_graph_is_not_quantized_again(quantized, tiny_samples, tiny_exported, duplicate):
    converted = quantized()
    with pytest.raises(ExportError, match="the graph is already quantized, by PT2E or NNCF .* start from the float"):
        prepare_pt2e(duplicate(converted), PTQ4DiTQuantizer())
    with pytest.raises(ExportError, match="the graph is already quantized, by PT2E or NNCF"):
        collect_salience(converted, tiny_samples)
    with pytest.raises(ExportError, match="the graph is already quantized, by PT2E or NNCF"):
        apply_recipe(converted, Recipe(), tiny_samples)
    prepared = prepare_pt2e(duplicate(tiny_exported), PTQ4DiTQuantizer())
    with pytest.raises(ExportError, match="has observers already .*: prepare_pt2e was called on it"):
        apply_recipe(prepared, Recipe(), tiny_samples)


def test_a_model_without_weights_is_not_calibrated(tiny_dit, tiny_samples):
    model = copy.deepcopy(tiny_dit).to("meta")
    with pytest.raises(ExportError, match=r"parameter 'pos_embed\.proj\.weight' of DiT\w+ is on the meta device, with"):
        apply_recipe(model, Recipe(), tiny_samples)
    exported = export_transformer(model, [x.to("meta") for x in tiny_samples[0]])
    with pytest.raises(ExportError, match="is on the meta device"):
        prepare_pt2e(exported, PTQ4DiTQuantizer())


def test_what_is_no_module_is_named(tiny_dit, tiny_samples):
    class Pipeline:
        transformer = tiny_dit

    with pytest.raises(ExportError, match=r"Pipeline is not a torch module \(its transformer is one\); pass the float"):
        apply_recipe(Pipeline(), Recipe(), tiny_samples)
    with pytest.raises(ArgumentError, match="exported is of type DiTTransformer2DModel; give a graph of export_transf"):
        collect_salience(tiny_dit, tiny_samples)


def test_hooks_that_were_taken_away_do_not_matter(tiny_dit, tiny_samples, tiny_exported):
    model = with_hook(copy.deepcopy(tiny_dit), None)
    model.transformer_blocks[1]._diffusers_hook.remove_hook("some_cache")
    assert torch.equal(export_transformer(model, tiny_samples[0])(*tiny_samples[0]), tiny_exported(*tiny_samples[0]))


def test_a_compiled_model_is_captured_under_its_own_names(tiny_dit, tiny_samples, tiny_exported):
    exported = export_transformer(torch.compile(tiny_dit), tiny_samples[0])
    assert exported.state_dict().keys() == tiny_exported.state_dict().keys()
    model = copy.deepcopy(tiny_dit)
    exported = export_transformer(torch.compile(model), tiny_samples[0])
    result = balance_module(torch.compile(model), exported, collect_salience(exported, tiny_samples))
    assert result.outcomes and result.output_change < 1e-5
