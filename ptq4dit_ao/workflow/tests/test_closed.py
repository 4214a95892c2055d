"""A quantized transformer does what its list says, and refuses the rest by name; nothing is taken and does nothing.

The lists are walked over the installed versions of diffusers, accelerate and peft, so that a new method or hook fails
here until it is in one of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import multiprocessing
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import diffusers.hooks
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from ptq4dit_ao import apply_recipe, as_diffusers_transformer, export_transformer
from ptq4dit_ao.calibration import Sampling, SamplingPipeline
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.errors import AbsentError, ArgumentError, ExportError
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.testing.zoo import FAMILIES, iter_families
from ptq4dit_ao.workflow import QuantizedModel
from ptq4dit_ao.workflow.diffusers_transformer import BINNED

PLAIN = Recipe(balance=Balance(method="none"))
CPU = torch.device("cpu")
WALKED = ("flux", "sd3", "dit", "wan")
"""Blocks of two kinds and fused projections, joint attention, a class without mixins, video."""


@functools.cache
def quantized(name: str) -> QuantizedModel:
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs(2)
    return apply_recipe(export_transformer(model, inputs), PLAIN, [tuple(flatten_call(model, inputs)[1].values())])


@functools.cache
def transformer(name: str, backend: str = "reference") -> Any:
    return as_diffusers_transformer(quantized(name), backend=backend)


@functools.cache
def inputs(name: str) -> dict[str, Any]:
    return FAMILIES[name].inputs(2)


@functools.cache
def output(name: str) -> Tensor:
    return transformer(name)(**inputs(name)).sample


def unchanged(name: str) -> bool:
    """Does it still compute what it did, and show no trace of a hook?"""
    model = transformer(name)
    traces = ("_diffusers_hook", "_hf_hook", "_old_forward", "peft_config")
    hooked = any(trace in vars(module) for module in model.modules() for trace in traces)
    return not hooked and torch.equal(model(**inputs(name)).sample, output(name))


# -- every public method -----------------------------------------------------------------------------------------------


def of_the_float_model(m: Any) -> bool:
    original = FAMILIES["sd3"].model()
    counts = [original.num_parameters(exclude_embeddings=flag) for flag in (False, True)]
    return [m.num_parameters(False, flag) for flag in (False, True)] == counts and m.num_parameters(True) == 0


def sees_calls(register: str) -> Callable[[Any], bool]:
    """A hook on the transformer itself sees its calls, until it is removed."""

    def check(m: Any) -> bool:
        seen: list[Any] = []
        handle = getattr(m, register)(lambda module, *args: seen.append(module))
        m(**inputs("sd3"))
        handle.remove()
        m(**inputs("sd3"))
        return seen == [m]

    return check


def switches_off(name: str) -> Callable[[Any], bool]:
    """Off is nothing to do; on is refused."""

    def check(m: Any) -> bool:
        with pytest.raises(ArgumentError, match=f"has no {name}: attention is part of its graph"):
            getattr(m, name)(True)
        return getattr(m, name)(False) is None

    return check


def refuses(call: Callable[[Any], object], message: str) -> Callable[[Any], bool]:
    def check(m: Any) -> bool:
        with pytest.raises(ArgumentError, match=message):
            call(m)
        return True

    return check


STAYS = "stays on cpu and in torch.float32; lower it for another device, make it"

WORKS: dict[str, Callable[[Any], bool]] = {
    "bfloat16": refuses(lambda m: m.bfloat16(), STAYS),
    "cache_context": lambda m: m.cache_context("cond").__enter__() is None,
    "children": lambda m: [type(x).__name__ for x in m.children()][:1] == ["PatchEmbed"],
    "config": lambda m: m.config.sample_size == FAMILIES["sd3"].model().config.sample_size,
    "cpu": lambda m: m.cpu() is m,
    "cuda": refuses(lambda m: m.cuda(), STAYS),
    "device": lambda m: m.device == CPU,
    "disable_gradient_checkpointing": lambda m: m.disable_gradient_checkpointing() is None,
    "disable_npu_flash_attention": lambda m: m.disable_npu_flash_attention() is None,
    "disable_xformers_memory_efficient_attention": lambda m: m.disable_xformers_memory_efficient_attention() is None,
    "disable_xla_flash_attention": lambda m: m.disable_xla_flash_attention() is None,
    "double": refuses(lambda m: m.double(), STAYS),
    "dtype": lambda m: m.dtype is torch.float32,
    "eval": lambda m: m.eval() is m and not m.training,
    "extra_repr": lambda m: m.extra_repr() == "",
    "extract_init_dict": lambda m: callable(m.extract_init_dict),
    "float": lambda m: m.float() is m,
    "forward": lambda m: torch.equal(m.forward(**inputs("sd3")).sample, output("sd3")),
    "get_config_dict": lambda m: callable(m.get_config_dict),
    "get_submodule": lambda m: m.get_submodule("transformer_blocks.0") is m.transformer_blocks[0],
    "half": refuses(lambda m: m.half(), STAYS),
    "ipu": refuses(lambda m: m.ipu(), STAYS),
    "is_cache_enabled": lambda m: m.is_cache_enabled is False,
    "is_gradient_checkpointing": lambda m: m.is_gradient_checkpointing is False,
    "load_config": lambda m: callable(m.load_config),
    "modules": lambda m: next(m.modules()) is m,
    "mtia": refuses(lambda m: m.mtia(), STAYS),
    "named_children": lambda m: "transformer_blocks" in dict(m.named_children()),
    "named_modules": lambda m: "transformer_blocks.1.attn.to_q" in dict(m.named_modules()),
    "num_parameters": of_the_float_model,
    "register_forward_hook": sees_calls("register_forward_hook"),
    "register_forward_pre_hook": sees_calls("register_forward_pre_hook"),
    "requires_grad_": lambda m: m.requires_grad_(False) is m
    and refuses(lambda m: m.requires_grad_(), "has no gradients: it is for inference; train the float")(m),
    "save_pretrained": refuses(lambda m: m.save_pretrained("x"), "save the quantized model with save_quantized"),
    "set_use_memory_efficient_attention_xformers": switches_off("set_use_memory_efficient_attention_xformers"),
    "set_use_npu_flash_attention": switches_off("set_use_npu_flash_attention"),
    "set_use_xla_flash_attention": switches_off("set_use_xla_flash_attention"),
    "to": lambda m: m.to("cpu") is m and m.to(torch.float32) is m and refuses(lambda m: m.to("cuda"), STAYS)(m),
    "train": lambda m: m.train(False) is m
    and refuses(lambda m: m.train(), "has no training mode: it is for inference; train the float transformer")(m),
    "xpu": refuses(lambda m: m.xpu(), STAYS),
    "zero_grad": lambda m: m.zero_grad() is None,
}  # fmt: skip
"""What it does, or refuses by what it is given; every other method is refused."""


def public_names() -> list[str]:
    """Of diffusers' base class of models, torch's, and of all mixins that the families' models have."""
    bases: set[type] = {nn.Module, ModelMixin, ConfigMixin}
    for family in iter_families():
        kind = type(family.build())
        bases |= {base for base in kind.__mro__[1:] if base.__module__.startswith("diffusers")}
    names = {name: getattr(base, name) for base in bases for name in dir(base) if not name.startswith("_")}
    return sorted(name for name, value in names.items() if isinstance(value, property) or inspect.isroutine(value))


NAMES = public_names()


@pytest.mark.parametrize("name", NAMES)
def test_every_public_method_works_or_is_refused_by_name(name):
    model = transformer("sd3")
    if name in WORKS:
        assert WORKS[name](model)
    else:
        with pytest.raises(ArgumentError, match=rf"^a quantized transformer has no {name}: .*(;|,) "):
            getattr(model, name)()
    assert unchanged("sd3")


def test_the_mixins_are_among_them():
    expected = {"enable_cache", "set_attn_processor", "load_lora_adapter", "from_single_file", "enable_group_offload"}
    assert expected <= set(NAMES) and set(WORKS) <= set(NAMES)


@pytest.mark.parametrize("name", WALKED)
def test_methods_of_a_class_of_its_own_are_refused(name):
    """``fuse_qkv_projections`` of one, ``enable_forward_chunking`` of another: whatever the wrapper does not list."""
    kind = type(FAMILIES[name].build())
    for method in {n for n in vars(kind) if not n.startswith("_")} - {"forward", *WORKS}:
        assert not hasattr(transformer(name), method)
        with pytest.raises(AbsentError, match=f"a quantized transformer has no {method}: "):
            getattr(transformer(name), method)


def test_a_name_that_is_nowhere_is_torchs_error():
    with pytest.raises(AttributeError, match="object has no attribute 'no_such_thing'"):
        transformer("sd3").no_such_thing  # noqa: B018


def test_classes_are_not_loaded():
    for name in ("from_pretrained", "from_config"):
        with pytest.raises(ArgumentError, match=f"has no {name}: read a quantized model with load_quantized"):
            getattr(type(transformer("sd3")), name)("folder")


# -- hooks of diffusers ------------------------------------------------------------------------------------------------

H = diffusers.hooks
FACTORS = {"num_inference_steps": 4, "mag_ratios": [1.0] * 4}
MESH = SimpleNamespace(_mesh=SimpleNamespace(device_type="cuda", size=lambda: 2))
DISTRIBUTED = ("apply_context_parallel", "apply_tensor_parallel")
"""They need several processes; how far they come shows enough."""

HOOKS: dict[str, Callable[[Any], object]] = {
    "apply_context_parallel": lambda m: H.apply_context_parallel(m, MESH, {"": {}}),
    "apply_faster_cache": lambda m: H.apply_faster_cache(
        m, H.FasterCacheConfig(current_timestep_callback=lambda: 1, attention_weight_callback=lambda _: 0.5)
    ),
    "apply_first_block_cache": lambda m: H.apply_first_block_cache(m, H.FirstBlockCacheConfig(threshold=0.2)),
    "apply_group_offloading": lambda m: H.apply_group_offloading(m, CPU, CPU, "leaf_level"),
    "apply_layer_skip": lambda m: H.apply_layer_skip(m, H.LayerSkipConfig([0], fqn=blocks(m))),
    "apply_layerwise_casting": lambda m: H.apply_layerwise_casting(m, torch.float8_e4m3fn, torch.float32),
    "apply_layerwise_casting_hook": lambda m: H.apply_layerwise_casting_hook(
        m, torch.float8_e4m3fn, torch.float32, False
    ),
    "apply_mag_cache": lambda m: H.apply_mag_cache(m, H.MagCacheConfig(**FACTORS)),
    "apply_pyramid_attention_broadcast": lambda m: H.apply_pyramid_attention_broadcast(
        m,
        H.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1),
    ),
    "apply_sea_cache": lambda m: H.apply_sea_cache(m, H.SeaCacheConfig()),
    "apply_taylorseer_cache": lambda m: H.apply_taylorseer_cache(m, H.TaylorSeerCacheConfig()),
    "apply_tensor_parallel": lambda m: H.apply_tensor_parallel(
        m, MESH, {f"{blocks(m)}.*.{feed_forward(m)}": "rowwise"}
    ),
    "apply_text_kv_cache": lambda m: H.apply_text_kv_cache(m, H.TextKVCacheConfig()),
    "HookRegistry": lambda m: H.HookRegistry.check_if_exists_or_initialize(m),
    "group offloading by blocks": lambda m: H.apply_group_offloading(m, CPU, CPU, "block_level", 1),
}


def blocks(model: Any) -> str:
    return next(name for name in ("transformer_blocks", "blocks") if hasattr(model, name))


def feed_forward(model: Any) -> str:
    return "ff.net.2" if hasattr(model, "transformer_blocks") else "ffn.net.2"


def test_every_function_of_diffusers_hooks_is_tried():
    assert {name for name in dir(H) if name.startswith("apply_")} <= set(HOOKS)


@pytest.mark.parametrize("name", WALKED)
@pytest.mark.parametrize("hook", HOOKS)
def test_what_hooks_into_the_float_model_is_refused(hook, name):
    """Where the float model takes it; some functions know no block of some model, and do nothing or raise."""
    original = FAMILIES[name].model()
    takes = hook in DISTRIBUTED
    if not takes:
        with contextlib.suppress(Exception):
            HOOKS[hook](original)
        takes = any("_diffusers_hook" in vars(module) for module in original.modules())
    if takes:
        with pytest.raises(
            ArgumentError,
            match="quantized transformer (takes no hook of diffusers|has no '?weight|has no named_parameters)",
        ):
            HOOKS[hook](transformer(name))
    assert unchanged(name)


def test_each_hook_is_taken_by_some_float_model():
    """So that the test before is of something."""
    for hook in set(HOOKS) - {*DISTRIBUTED}:
        original = FAMILIES["flux"].model()
        HOOKS[hook](original)
        assert any("_diffusers_hook" in vars(module) for module in original.modules()), hook


# -- accelerate and peft -----------------------------------------------------------------------------------------------

ACCELERATE: dict[str, Callable[[Any, Any], object]] = {
    "add_hook_to_module": lambda a, m: a.hooks.add_hook_to_module(m, a.hooks.ModelHook()),
    "attach_align_device_hook": lambda a, m: a.hooks.attach_align_device_hook(m, CPU, offload=True, weights_map={}),
    "attach_align_device_hook_on_blocks": lambda a, m: a.hooks.attach_align_device_hook_on_blocks(m, {"": CPU}),
    "cpu_offload": lambda a, m: a.cpu_offload(m),
    "cpu_offload to a device": lambda a, m: a.cpu_offload(m, CPU),
    "cpu_offload_with_hook": lambda a, m: a.cpu_offload_with_hook(m, CPU),
    "disk_offload": lambda a, m: a.disk_offload(m, "offload_folder"),
    "dispatch_model": lambda a, m: a.dispatch_model(m, {"": "cpu"}, force_hooks=True),
    "dispatch_model by blocks": lambda a, m: a.dispatch_model(
        m, {name: "disk" if name == "proj_out" else "cpu" for name, _ in m.named_children()}, offload_dir="x"
    ),
    "Accelerator.prepare": lambda a, m: a.Accelerator(cpu=True).prepare(m),
}


@pytest.mark.parametrize("name", ACCELERATE)
def test_what_accelerate_puts_on_it_is_refused(name, tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="a quantized transformer (takes|has) no (hook of accelerate|[a-z_]+): "):
        ACCELERATE[name](accelerate, transformer("sd3"))
    assert unchanged("sd3") and not list(tmp_path.glob("*/*"))


PEFT: dict[str, Callable[[Any, Any, Any], object]] = {
    "get_peft_model": lambda p, m, config: p.get_peft_model(m, config),
    "inject_adapter_in_model": lambda p, m, config: p.inject_adapter_in_model(config, m),
    "add_adapter": lambda p, m, config: m.add_adapter(config),
    "load_lora_adapter": lambda p, m, config: m.load_lora_adapter({}),
}


@pytest.mark.parametrize("name", PEFT)
def test_what_peft_puts_into_it_is_refused(name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    with pytest.raises(ArgumentError, match="of a quantized transformer has no|a quantized transformer (has|takes) no"):
        PEFT[name](peft, transformer("sd3"), config)
    assert unchanged("sd3")


# -- methods of pipelines ----------------------------------------------------------------------------------------------


def sd3(model: Any) -> Any:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(model, scheduler, vae, *[None] * 6)


LORA = {
    f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.zeros(shape)
    for side, shape in {"A": (2, 32), "B": (32, 2)}.items()
}
REFUSED_PIPELINE: dict[str, Callable[[Any], object]] = {
    "enable_group_offload": lambda p: p.enable_group_offload(CPU, offload_type="leaf_level"),
    "enable_model_cpu_offload": lambda p: p.enable_model_cpu_offload(device="cuda"),
    "enable_sequential_cpu_offload": lambda p: p.enable_sequential_cpu_offload(device="cpu"),
    "enable_xformers_memory_efficient_attention": lambda p: p.enable_xformers_memory_efficient_attention(),
    "fuse_lora": lambda p: p.fuse_lora(components=["transformer"]),
    "load_lora_weights": lambda p: p.load_lora_weights(dict(LORA)),
    "save_pretrained": lambda p: p.save_pretrained("folder"),
    "to": lambda p: p.to(torch.bfloat16),
    "fuse_qkv_projections": lambda p: p.transformer.fuse_qkv_projections(),
}


@pytest.mark.parametrize("name", REFUSED_PIPELINE)
def test_methods_of_pipelines_that_would_change_it_are_refused(name, tmp_path, monkeypatch):
    for package in ("accelerate", "peft"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="a (quantized|lowered) transformer"):
        REFUSED_PIPELINE[name](sd3(transformer("sd3")))
    assert unchanged("sd3")


WORKING_PIPELINE: dict[str, Callable[[Any], object]] = {
    "disable_xformers_memory_efficient_attention": lambda p: p.disable_xformers_memory_efficient_attention(),
    "enable_group_offload of the others": lambda p: p.enable_group_offload(
        CPU, offload_type="leaf_level", exclude_modules="transformer"
    ),
    "enable_vae_slicing": lambda p: p.vae.enable_slicing(),
    "enable_vae_tiling": lambda p: p.vae.enable_tiling(),
    "maybe_free_model_hooks": lambda p: p.maybe_free_model_hooks(),
    "remove_all_hooks": lambda p: p.remove_all_hooks(),
    "to": lambda p: p.to("cpu", torch.float32),
}


@pytest.mark.parametrize("name", WORKING_PIPELINE)
def test_methods_of_pipelines_that_leave_it_alone_work(name):
    pytest.importorskip("accelerate")
    pipeline = sd3(transformer("sd3"))
    WORKING_PIPELINE[name](pipeline)
    assert unchanged("sd3") and pipeline.transformer is transformer("sd3")


def test_the_pipeline_of_a_bare_transformer_asks_for_no_parameters():
    sampling = Sampling(channels=4, size=8, null_label=10, clip=False)
    drawn = SamplingPipeline(transformer("dit"), sampling)([3], num_inference_steps=2)
    assert drawn.shape == (1, 4, 8, 8) and drawn.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_pipeline_from_the_same_parts(dtype):
    model = as_diffusers_transformer(quantized("sd3"), backend="reference", dtype=dtype)
    pipeline, other = sd3(model), diffusers.StableDiffusion3Img2ImgPipeline
    made = other.from_pipe(pipeline, transformer=model, torch_dtype=dtype)
    assert type(made) is other and made.transformer is model and made.vae.dtype is dtype
    automatic = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline, torch_dtype=dtype)
    assert type(automatic) is other and automatic.transformer is model


def test_from_pipe_in_another_dtype_says_what_to_pass():
    model = as_diffusers_transformer(quantized("sd3"), backend="reference", dtype=torch.bfloat16)
    message = r"in torch\.bfloat16; .* \(from_pipe: with transformer=pipe.transformer, torch_dtype=torch.bfloat16\)"
    with pytest.raises(ArgumentError, match=message):
        diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(sd3(model), transformer=model)


# -- blocks ------------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[Any], object]] = {
    "a forward hook": lambda b: b[0].register_forward_hook(lambda *a: 1 / 0),
    "a forward pre-hook": lambda b: b[0].attn.register_forward_pre_hook(lambda *a: 1 / 0),
    "a call": lambda b: b[0](torch.zeros(1, 4, 32)),
    "a call of a layer": lambda b: b[0].attn.to_q(torch.zeros(1, 32)),
    "casting": lambda b: b[0].half(),
    "a move": lambda b: b[0].to("meta"),
    "a processor": lambda b: b[0].attn.set_processor(None),
    "fused projections": lambda b: b[0].attn.fuse_projections(),
    "compiling": lambda b: b[0].compile(),
    "training": lambda b: b[0].train(),
    "weights": lambda b: b[0].attn.to_q.weight,
    "parameters": lambda b: b[0].parameters(),
    "state": lambda b: b[0].load_state_dict({}),
    "another layer": lambda b: setattr(b[0].attn, "to_q", nn.Linear(32, 32)),
    "a number": lambda b: setattr(b[0].attn, "heads", 1),
    "a block deleted": lambda b: b.__delitem__(0),
    "a block popped": lambda b: b.pop(0),
    "a block inserted": lambda b: b.insert(0, nn.Identity()),
    "a block appended": lambda b: b.append(nn.Identity()),
    "blocks added": lambda b: b.extend([nn.Identity()]),
    "a block replaced": lambda b: b.__setitem__(0, nn.Identity()),
    "an attribute deleted": lambda b: delattr(b[0], "attn"),
    "a submodule added": lambda b: b[0].add_module("more", nn.Identity()),
}  # fmt: skip


@pytest.mark.parametrize("change", BLOCKS)
def test_blocks_are_there_to_be_read(change):
    with pytest.raises(
        ArgumentError, match=r"^'transformer_blocks[\w.]*' of a quantized transformer \w+ .*: the graph"
    ):
        BLOCKS[change](transformer("sd3").transformer_blocks)
    assert unchanged("sd3")


def test_what_blocks_show():
    model, original = transformer("sd3"), FAMILIES["sd3"].model()
    block = model.transformer_blocks[0]
    assert isinstance(block, type(original.transformer_blocks[0]))
    assert len(model.transformer_blocks) == len(original.transformer_blocks)
    assert block.attn.heads == original.transformer_blocks[0].attn.heads
    assert not hasattr(transformer("pixart_sigma"), "scale_shift_table")
    assert block.attn.to_q.in_features == 32 and not hasattr(block.attn.to_q, "weight")
    assert [name for name, _ in model.named_modules()] == [name for name, _ in original.named_modules()]
    assert "JointTransformerBlock" in repr(model)


def test_attributes_are_not_set():
    model = transformer("sd3")
    other = as_diffusers_transformer(quantized("sd3"), backend="fbgemm").lowered
    with pytest.raises(
        ArgumentError, match=r"takes no other lowered model: make .* as_diffusers_transformer\(lowered\)"
    ):
        model.lowered = other
    with pytest.raises(ArgumentError, match="takes no value for 'inner_dim': its graph is fixed"):
        model.inner_dim = 3
    with pytest.raises(ArgumentError, match="keeps its 'transformer_blocks': its graph is fixed"):
        del model.transformer_blocks
    assert unchanged("sd3")


# -- copies, pickles, compilers ----------------------------------------------------------------------------------------

BACKENDS = ["reference", "fbgemm"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_computes_the_same(copied, backend):
    model = transformer("sd3", backend)
    other = copied(model)
    expected = model(**inputs("sd3")).sample
    assert other is not model and torch.equal(other(**inputs("sd3")).sample, expected)
    other.register_forward_hook(lambda *_: 1 / 0)
    assert torch.equal(model(**inputs("sd3")).sample, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pickles_are_refused(backend, tmp_path):
    model = transformer("sd3", backend)
    for thing in (model, model.lowered):
        for dump in (pickle.dumps, functools.partial(torch.save, f=tmp_path / "x")):
            with pytest.raises(ArgumentError, match=f"process and backend '{backend}', .* with save_quantized"):
                dump(thing)
    with pytest.raises(ArgumentError, match="a quantized model cannot be pickled, .* write it with save_quantized"):
        pickle.dumps(quantized("sd3"))
    context = multiprocessing.get_context("spawn")
    with pytest.raises(ArgumentError, match="a quantized model cannot be pickled"):
        context.Process(target=print, args=(quantized("sd3"),)).start()


def test_a_copied_quantized_model_is_another():
    model = quantized("dit")
    same, other = copy.copy(model), copy.deepcopy(model)
    x = tuple(inputs("dit").values())
    expected = model.graph(*x)
    assert same.graph is model.graph and other.recipe == model.recipe and other.captured == model.captured
    for buffer in other.graph.buffers():
        buffer.zero_()
    assert torch.equal(model.graph(*x), expected) and not torch.equal(other.graph(*x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiler_leaves_it_alone(backend):
    model = transformer("sd3", backend)
    expected = model(**inputs("sd3")).sample
    assert torch.equal(torch.compile(model, backend="eager")(**inputs("sd3")).sample, expected)
    assert torch.equal(torch.compile(model)(**inputs("sd3")).sample, expected)


# -- what it is called with --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [torch.float32, torch.bool])
def test_a_mask_of_another_kind_is_refused(recorded):
    """A bool one hides tokens, a floating one is added to scores."""
    model, given = FAMILIES["chroma"].model(), FAMILIES["chroma"].inputs(2)
    given["attention_mask"] = torch.ones_like(given["attention_mask"]).to(recorded)
    graph = export_transformer(model, given)
    own = apply_recipe(graph, PLAIN, [tuple(flatten_call(model, given)[1].values())])
    called = as_diffusers_transformer(own, backend="reference")
    other = torch.bool if recorded is torch.float32 else torch.float32
    names = [str(dtype).removeprefix("torch.") for dtype in (other, recorded)]
    message = f"attention_mask is {names[0]}, but the graph was captured for {names[1]}, and bool means something else"
    with pytest.raises(ArgumentError, match=f"{message} .* in a mask; give it as {names[1]}, or quantize with"):
        called(**given | {"attention_mask": given["attention_mask"].to(other)})


@pytest.mark.parametrize("timestep", [500, 500.0])
def test_a_timestep_may_be_a_number(timestep):
    """As the float model of CogVideoX takes it; whole numbers of either type."""
    given = inputs("cogvideox")
    expected = transformer("cogvideox")(**given | {"timestep": torch.tensor([500, 500])}).sample
    assert torch.equal(transformer("cogvideox")(**given | {"timestep": timestep}).sample, expected)


@pytest.mark.parametrize("timestep", [500.5, True, "500"])
def test_a_timestep_that_is_no_such_number(timestep):
    with pytest.raises(ArgumentError, match="timestep"):
        transformer("dit")(**inputs("dit") | {"timestep": timestep})


def test_sizes_are_said_in_pixels():
    wide = torch.zeros(2, 4, 18, 16)
    factor = r"\(in pixels: those of the latents times its vae_scale_factor\)"
    advice = f"give the pipeline a height and width {factor}, frames and a text length that fit"
    with pytest.raises(ArgumentError, match=f"height is 18, more than 17; {advice}; or quantize"):
        transformer("sd3")(**inputs("sd3") | {"hidden_states": wide})
    odd = torch.zeros(2, 5, 16, 16)
    with pytest.raises(ArgumentError, match=f"{advice}, and use_resolution_binning=False, without which"):
        transformer("pixart_sigma")(**inputs("pixart_sigma") | {"hidden_states": odd})


def test_the_classes_whose_pipelines_bin_resolutions():
    found = set()
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline) and "__call__" in vars(kind)):
            continue
        if "use_resolution_binning" in inspect.signature(kind.__call__).parameters:
            found |= {one.__name__ for one in kind._get_signature_types()["transformer"]}
    assert found and all(name.startswith(BINNED) for name in found), found


def test_an_output_beyond_float16_is_said_once(caplog):
    given = {name: x.half() if x.is_floating_point() else x for name, x in inputs("dit").items()}
    large = FAMILIES["dit"].model()
    large.proj_out_2.weight.data.mul_(1e6)
    model = apply_recipe(export_transformer(large, inputs("dit")), PLAIN, [tuple(inputs("dit").values())])
    loud = as_diffusers_transformer(model, backend="reference")
    with caplog.at_level(logging.WARNING, "ptq4dit_ao"):
        transformer("dit")(**given)
        assert not loud(**given).sample.isfinite().all()
        loud(**given)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("ptq4dit_ao.workflow.diff")]
    message = r"the output of a quantized transformer reaches [\d.e+]+, which is infinite in float16, its inputs' "
    assert re.match(message + r"dtype; run the pipeline in bfloat16, with as_diffusers_transformer\(", said)


def test_the_table_of_the_docs_is_right():
    text = (
        (Path(__file__).parents[3] / "docs" / "graphs_in_diffusers.md")
        .read_text()
        .partition("## What a quantized tran")[2]
    )
    rows = re.findall(r"^\| (.*?) \| (.*?) \| .* \|$", text.partition("\n\n`enable_vae")[0], flags=re.MULTILINE)
    said = {
        answer: set(NAMES) & set(re.findall(r"`(\w+)", " ".join(x for x, y in rows if y == answer)))
        for _, answer in rows
    }
    assert len(said["no"]) > 10 and said["no"] - {"save_pretrained"} <= set(NAMES) - set(WORKS)
    assert len(said["yes"]) > 8 and said["yes"] <= set(WORKS) and said["to where it is"] <= set(WORKS)


def test_it_is_not_quantized_again():
    model, inputs = transformer("dit"), FAMILIES["dit"].inputs(2)
    with pytest.raises(
        ExportError, match="QuantizedTransformer is already quantized, and lowered, by ptq4dit_ao; start"
    ):
        apply_recipe(model, PLAIN, [tuple(inputs.values())])
