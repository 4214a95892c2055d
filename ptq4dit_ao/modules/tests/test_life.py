"""Life of a quantized module: whatever diffusers does with a transformer has its effect, or is refused by name."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao import collect_from_pipeline, load_recipe, prove_kernels, to_module
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.modules.form import integer_weights
from ptq4dit_ao.modules.tests.test_form import case
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow.apply import apply_recipe
from ptq4dit_ao.workflow.models import load_model


@functools.cache
def original(name: str) -> Any:
    model, quantized = case(name)
    return model, to_module(quantized, model, verify=False)


def pair(name: str = "flux") -> tuple[Any, Any]:
    """A tiny float model, and its quantized module. Both may be changed."""
    model, module = original(name)
    return copy.deepcopy(model), copy.deepcopy(module)


@torch.no_grad()
def call(model: Any, name: str = "flux", **more: Any) -> Tensor:
    return model(**{**FAMILIES[name].inputs(2, seed=5), **more}, return_dict=False)[0]


# -- adapters ----------------------------------------------------------------------------------------------------------

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_mlp"]


def adapter(model: Any, seed: int, size: float, targets: list[str] = TARGETS) -> dict[str, Tensor]:
    """The weights of a LoRA as it was trained for the float model."""
    from peft import LoraConfig, get_peft_model_state_dict

    trained = copy.deepcopy(model)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    trained.add_adapter(config, adapter_name="a")
    g = torch.Generator().manual_seed(seed)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=g) * size
    return {f"transformer.{k}": v for k, v in get_peft_model_state_dict(trained, adapter_name="a").items()}


def load(models: list[Any], state: dict[str, Tensor], name: str) -> None:
    for model in models:
        model.load_lora_adapter(dict(state), adapter_name=name, prefix="transformer")


@pytest.mark.slow
def test_adapters_of_the_float_model_are_loaded_switched_scaled_and_unloaded():
    float_model, module = pair()
    plain, quantized = call(float_model), call(module)
    for name, state in {name: adapter(float_model, seed, 0.15) for seed, name in enumerate("ab")}.items():
        load([float_model, module], state, name)
    for names, scales in ((["a"], [1.0]), (["b"], [1.0]), (["a"], [0.5]), (["a", "b"], [0.7, 0.4])):
        for model in (float_model, module):
            model.set_adapters(names, scales)
        delta, found = call(float_model) - plain, call(module) - quantized
        assert float(delta.norm() / plain.norm()) > 0.1 and sqnr_db(delta, found) > 7
    assert len(integer_weights(module)) == len(integer_weights(original("flux")[1]))
    module.disable_lora()
    assert torch.equal(call(module), quantized)
    module.enable_lora()
    with pytest.raises(ArgumentError, match=r"dequantized for an adapter.*leave an adapter unfused"):
        module.fuse_lora()
    with pytest.raises(ArgumentError, match="has the adapter 'a', which is no part of the quantized model; unload it"):
        module.save_pretrained("never")
    module.unload_lora()
    assert torch.equal(call(module), quantized)


@pytest.mark.slow
@torch.no_grad()
def test_the_delta_of_an_adapter_is_that_of_the_trained_float_model_to_25_db():
    loaded = load_model("reference")
    recipe = load_recipe("digits_w8a8")
    loaded = loaded.drawn_by(recipe.calibration.sampler)
    samples = collect_from_pipeline(loaded.pipeline, list(range(10)), timesteps=10, steps=20, guidance=1.5)
    recipe = recipe.model_copy(update={"rounding": recipe.rounding.model_copy(update={"sequential": False})})
    model: Any = loaded.transformer
    module = to_module(apply_recipe(model, recipe, samples), model, verify=False)
    inputs = next(samples.batches(32))
    plain, quantized = (m(*inputs[:1], inputs[1], inputs[2], return_dict=False)[0] for m in (model, module))
    from peft import LoraConfig, inject_adapter_in_model

    targets, deltas = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"], []
    for m, before in ((copy.deepcopy(model), plain), (module, quantized)):
        adapted = inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), m)
        g = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=g) * 0.3
        deltas.append(adapted(*inputs[:1], inputs[1], inputs[2], return_dict=False)[0] - before)
    assert float(deltas[0].norm() / plain.norm()) > 0.2
    assert sqnr_db(*deltas) > 25


def test_gradients_through_it_are_refused():
    _, module = pair()
    x = FAMILIES["flux"].inputs(2)["hidden_states"].requires_grad_()
    with torch.enable_grad(), pytest.raises(ArgumentError, match="has no gradients"):
        module(**{**FAMILIES["flux"].inputs(2), "hidden_states": x})


# -- attention ---------------------------------------------------------------------------------------------------------


def test_fused_projections_are_refused():
    _, module = pair()
    with pytest.raises(ArgumentError, match=r"aten\.cat.*call fuse_qkv_projections on the float model before"):
        module.fuse_qkv_projections()
    assert sqnr_db(call(original("flux")[1]), call(module)) > 100


def test_a_model_with_fused_projections_is_quantized_and_read_as_such():
    fused = FAMILIES["sd3"].model()
    fused.fuse_qkv_projections()
    from ptq4dit_ao import Recipe, export_transformer
    from ptq4dit_ao.capture.signature import flatten_call
    from ptq4dit_ao.recipe import Balance

    batches = [tuple(flatten_call(fused, FAMILIES["sd3"].inputs(2, seed=s))[1].values()) for s in range(2)]
    graph = export_transformer(fused, FAMILIES["sd3"].inputs(2))
    module = to_module(apply_recipe(graph, Recipe(balance=Balance(method="max")), batches), fused)
    assert any(name.endswith("to_qkv") for name in integer_weights(module))


class Loud:
    """An attention processor that doubles what another one returns."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        return tuple(2 * x for x in found) if isinstance(found, tuple) else 2 * found


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_attention_processors_take_effect(name):
    float_model, module = pair(name)
    before = call(module, name)
    for model in (float_model, module):
        for part in model.modules():
            if hasattr(part, "set_processor"):
                part.set_processor(Loud(part.processor))
    assert sqnr_db(before, call(module, name)) < 15 and sqnr_db(call(float_model, name), call(module, name)) > 7


def test_attention_backends_compute_the_same():
    _, module = pair()
    before = call(module)
    try:
        module.set_attention_backend("_native_math")
        assert sqnr_db(before, call(module)) > 40
    finally:
        module.set_attention_backend("native")
    with pytest.raises(ValueError, match="must be one of"):
        module.set_attention_backend("no such")


# -- calls -------------------------------------------------------------------------------------------------------------


def residuals(model: Any, scale: float = 0.5) -> list[Tensor]:
    tokens = FAMILIES["flux"].inputs(2)["hidden_states"].shape[1]
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, tokens, model.inner_dim, generator=g) * scale for _ in model.transformer_blocks]


def test_controlnet_residuals_are_added_when_they_are_given():
    float_model, module = pair()
    added = residuals(float_model)
    change = call(module, controlnet_block_samples=added) - call(module)
    expected = call(float_model, controlnet_block_samples=added) - call(float_model)
    assert float(expected.norm() / call(float_model).norm()) > 0.05 and sqnr_db(expected, change) > 10


def test_an_ip_adapter_adds_its_own_float_layers():
    float_model, module = pair()
    torch.manual_seed(0)
    width, layers = float_model.inner_dim, len(float_model.transformer_blocks)
    state = {
        "image_proj": {
            "proj.weight": torch.randn(4 * float_model.config.joint_attention_dim, 8),
            "proj.bias": torch.randn(4 * float_model.config.joint_attention_dim),
            "norm.weight": torch.ones(float_model.config.joint_attention_dim),
            "norm.bias": torch.zeros(float_model.config.joint_attention_dim),
        },
        "ip_adapter": {
            f"{i}.{part}": torch.randn(width, float_model.config.joint_attention_dim)
            if "weight" in part
            else torch.zeros(width)
            for i in range(layers)
            for part in ("to_k_ip.weight", "to_v_ip.weight", "to_k_ip.bias", "to_v_ip.bias")
        },
    }
    for model in (float_model, module):
        model._load_ip_adapter_weights(copy.deepcopy(state))
        for processor in model.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [2.0]
    embeds = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(2, 1, 8)]}}
    without = call(original("flux")[1])
    assert sqnr_db(without, call(module, **copy.deepcopy(embeds))) < 30
    assert sqnr_db(call(float_model, **copy.deepcopy(embeds)), call(module, **copy.deepcopy(embeds))) > 10


def test_layers_are_skipped_when_a_call_says_so():
    float_model, module = pair("sd3")
    ran = counted(module, "attn.to_q")
    call(module, "sd3")
    whole = len(ran)
    ran.clear()
    skipped = call(module, "sd3", skip_layers=[0])
    assert len(ran) == whole - 1
    assert sqnr_db(call(float_model, "sd3", skip_layers=[0]), skipped) > 15


def counted(module: nn.Module, ending: str) -> list[str]:
    """A list to which the names of submodules with this ending are added as they run."""
    ran: list[str] = []
    for name, part in module.named_modules():
        if name.endswith(ending):
            part.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


STEP = [900]
CACHES: dict[str, tuple[Callable[[], Any], str]] = {
    "FirstBlockCache": (lambda: diffusers.FirstBlockCacheConfig(threshold=1e9), "to_q"),
    "PyramidAttentionBroadcast": (
        lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: STEP[0],
        ),
        "to_out.0",
    ),
    "TaylorSeerCache": (
        lambda: diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
        "to_out.0",
    ),
    "MagCache": (
        lambda: diffusers.MagCacheConfig(
            threshold=10.0, max_skip_steps=2, retention_ratio=0.0, num_inference_steps=4, mag_ratios=torch.ones(4)
        ),
        "to_q",
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_step_caches_skip_blocks_as_they_do_in_the_float_model(name):
    make, ending = CACHES[name]
    ran = []
    for model in pair():
        STEP[0] = 900
        done, counts = counted(model, ending), []
        model.enable_cache(make())
        with model.cache_context("cond"):
            for _ in range(4):
                done.clear()
                call(model)
                counts.append(len(done))
                STEP[0] -= 10
        model.disable_cache()
        done.clear()
        call(model)
        ran.append((counts, len(done)))
    (float_counts, _), (counts, whole) = ran
    assert counts == float_counts and min(counts) < whole == max(counts)


# -- devices, dtypes, copies -------------------------------------------------------------------------------------------


def test_offloading_by_accelerate_moves_the_weights():
    from accelerate import cpu_offload

    _, module = pair()
    before = call(module)
    cpu_offload(module, execution_device=torch.device("cpu"))
    weights = integer_weights(module)
    assert len(weights) > 10
    assert {part.device.type for w in weights.values() for part in (w.qdata, w.scale, w.x_scale)} == {"meta"}
    seen: list[str] = []
    linear = module.get_submodule(next(iter(weights)))
    forward = linear._old_forward  # accelerate calls it between loading and freeing the weights
    linear._old_forward = lambda x: (seen.append(linear.weight.qdata.device.type), forward(x))[1]
    assert torch.equal(call(module), before) and set(seen) == {"cpu"}
    assert {w.qdata.device.type for w in integer_weights(module).values()} == {"meta"}


def test_offloading_of_whole_models_as_pipelines_do_it():
    from accelerate import cpu_offload_with_hook

    _, module = pair()
    before = call(module)
    module, hook = cpu_offload_with_hook(module, torch.device("cpu"))
    assert torch.equal(call(module), before)
    hook.offload()
    assert torch.equal(call(module), before)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_keeps_the_result_and_disks_are_refused(kind, tmp_path):
    from diffusers.hooks import apply_group_offloading

    _, module = pair()
    before, cpu = call(module), torch.device("cpu")
    options = {"onload_device": cpu, "offload_device": cpu, "offload_type": kind, "num_blocks_per_group": 1}
    apply_group_offloading(module, **options)
    assert torch.equal(call(module), before)
    _, module = pair()
    with pytest.raises(ValueError, match="Disk offloading is not supported for TorchAO"):
        apply_group_offloading(module, **options, offload_to_disk_path=str(tmp_path))


def test_it_is_moved_but_not_cast_and_a_copy_is_its_own():
    _, module = pair()
    before = call(module)
    assert module.to("cpu") is module and torch.equal(call(module), before)
    for cast in (lambda: module.to(torch.bfloat16), module.half, module.float):
        with pytest.raises(ValueError, match="uantized"):
            cast()
    other = copy.deepcopy(module)
    first = next(iter(integer_weights(other).values()))
    first.qdata.zero_()
    assert torch.equal(call(module), before) and not torch.equal(call(other), before)
    assert {p.device.type for p in other.to("meta").parameters()} == {"meta"}


def test_threads_call_it_at_once():
    _, module = pair()
    before, found = call(module), []
    threads = [threading.Thread(target=lambda: found.append(call(module))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(y, before) for y in found)


def test_dequantized_it_is_a_float_model_again():
    float_model, module = pair()
    module.dequantize()
    assert not integer_weights(module) and not module.is_quantized
    assert sqnr_db(call(float_model), call(module)) > 28


def test_any_size_and_batch_runs_eagerly():
    float_model, module = pair("sd3")
    for batch, size, text in ((1, 4, 3), (2, 8, 7), (3, 12, 20)):
        g = torch.Generator().manual_seed(batch)
        inputs = {
            "hidden_states": torch.randn(batch, 4, size, size, generator=g),
            "encoder_hidden_states": torch.randn(batch, text, float_model.config.joint_attention_dim, generator=g),
            "pooled_projections": torch.randn(batch, float_model.config.pooled_projection_dim, generator=g),
            "timestep": torch.full((batch,), 500.0),
        }
        expected, found = (m(**inputs, return_dict=False)[0] for m in (float_model, module))
        assert found.shape == (batch, 4, size, size) and sqnr_db(expected, found) > 15


# -- compilers ---------------------------------------------------------------------------------------------------------


@pytest.mark.x86
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_compiled_it_runs_integer_kernels_in_as_many_graphs_as_the_float_model(how):
    _, eager = original("flux")
    graphs = []
    for model in pair():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.compile() if how == "whole" else model.compile_repeated_blocks()
        call(model)
        call(model)
        assert not torch._dynamo.utils.counters["graph_break"]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= (1 if how == "whole" else 3)
    assert sqnr_db(call(eager), call(model)) > 45
    proof = prove_kernels(model, lambda: call(model), compiled=True)
    assert proof.integer_gemms == len(integer_weights(model))


@pytest.mark.x86
@pytest.mark.slow
def test_three_sizes_and_two_batches_of_a_saved_module_compile_once_for_each_class_of_sizes(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = original("sd3")[1]
    to_module(case("sd3")[1], case("sd3")[0], method="ptq4dit", verify=False).save_pretrained(tmp_path / "m")
    module: Any = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "m")
    module.compile()
    graphs = []
    for size, text in ((8, 7), (12, 11), (4, 20)):
        for batch in (2, 4):
            inputs = {
                "hidden_states": torch.randn(batch, 4, size, size),
                "encoder_hidden_states": torch.randn(batch, text, eager.config.joint_attention_dim),
                "pooled_projections": torch.randn(batch, eager.config.pooled_projection_dim),
                "timestep": torch.full((batch,), 500.0),
            }
            with torch.no_grad():
                assert sqnr_db(*(m(**inputs, return_dict=False)[0] for m in (eager, module))) > 45
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] - graphs[2] == 0 and graphs[-1] <= 3
