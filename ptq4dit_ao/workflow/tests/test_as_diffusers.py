"""A quantized model in a pipeline: called as the transformer was, or refused; tiny random models of many families."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import subprocess
import sys
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ptq4dit_ao import apply_recipe, as_diffusers_transformer, collect_from_pipeline, export_transformer, load_quantized
from ptq4dit_ao._formats import json_digest
from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError, ArtifactError
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.testing.zoo import FAMILIES, iter_families
from ptq4dit_ao.workflow import QuantizedModel
from ptq4dit_ao.workflow.diffusers_transformer import output_class

PLAIN = Recipe(balance=Balance(method="none"))


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@functools.cache
def quantized(name: str) -> QuantizedModel:
    """A family's tiny model, captured from the keyword arguments of its pipeline. Not to be changed."""
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs(2)
    return apply_recipe(export_transformer(model, inputs), PLAIN, [tuple(flatten_call(model, inputs)[1].values())])


@functools.cache
def transformer(name: str) -> Any:
    return as_diffusers_transformer(quantized(name), backend="reference")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- the call ----------------------------------------------------------------------------------------------------------

QUICK = ["dit", "pixart_sigma", "sd3", "sana", "wan", "cogvideox", "qwenimage"]
SLOW = ["pixart_alpha_1024", "flux", "flux2", "ltx", "hunyuan_video", "ltx2", "kandinsky5", "chroma"]


def public(config: Any) -> Any:
    """Tuples as lists."""
    return json.loads(json.dumps({name: value for name, value in config.items() if not name.startswith("_")}))


@pytest.mark.parametrize("name", [*QUICK, *map(slow, SLOW)])
def test_what_was_saved_is_called_as_the_model_was(name, tmp_path):
    family, model = FAMILIES[name], quantized(name)
    model.save(tmp_path / "model")
    loaded = as_diffusers_transformer(load_quantized(tmp_path / "model"), backend="reference")
    original, inputs = family.model(), family.inputs(3, seed=1)
    output, plain = loaded(**inputs), loaded(**inputs, return_dict=False)
    expected = tree_leaves(model.graph(*flatten_call(original, inputs)[1].values()))
    assert type(output) is type(original(**inputs)) and type(plain) is tuple
    for found in (tree_leaves(output), plain):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert public(loaded.config) == public(original.config)
    assert inspect.signature(loaded.forward) == inspect.signature(original.forward)


def test_a_call_by_position_and_samples_without_names(tiny_dit, tiny_samples):
    model = as_diffusers_transformer(apply_recipe(tiny_dit, PLAIN, tiny_samples), backend="reference")
    x, t, y = tiny_samples[1]
    assert torch.equal(model(x, t, class_labels=y).sample, model(x, timestep=t, class_labels=y, return_dict=False)[0])


def test_a_model_lowered_while_it_was_loaded(tmp_path):
    quantized("dit").save(tmp_path / "model")
    inputs = FAMILIES["dit"].inputs(2)
    lowered = as_diffusers_transformer(load_quantized(tmp_path / "model", "fbgemm"))
    assert sqnr_db(transformer("dit")(**inputs).sample, lowered(**inputs).sample) > 30


def test_inputs_in_16_bits_give_outputs_in_16_bits():
    inputs = FAMILIES["sd3"].inputs(2, dtype=torch.bfloat16)
    output = transformer("sd3")(**inputs).sample
    wide = {name: x.float() for name, x in inputs.items()}
    assert output.dtype == torch.bfloat16 and torch.equal(output, transformer("sd3")(**wide).sample.bfloat16())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "sd3",
            {"hidden_states": torch.zeros(2, 4, 18, 16)},
            r"the graph cannot be called so: height is 18, more than 17; give the pipeline a height and width",
        ),
        ("sd3", {"encoder_hidden_states": torch.zeros(2, 9, 20)}, r"encoder_hidden_states has shape \(2, 9, 20\)"),
        ("sd3", {"joint_attention_kwargs": {"scale": 0.5}}, r"'joint_attention_kwargs' of SD3.* is \{'scale': 0\.5\}"),
        (
            "sd3",
            {"pooled_projections": None},
            "'pooled_projections' of SD3Transformer2DModel is None, but the graph was",
        ),
        ("pixart_sigma", {"encoder_attention_mask": None}, "'encoder_attention_mask' .* is None, .* with a tensor"),
        ("dit", {"timestep": torch.tensor([1.5, 2.0])}, r"timestep is float32 and holds 1\.5"),
        ("dit", {"mask": None}, "DiTTransformer2DModel cannot be called so: got an unexpected keyword argument 'mask'"),
    ],
)
def test_another_call_is_refused(name, change, message):
    with pytest.raises(ArgumentError, match=message):
        transformer(name)(**{**FAMILIES[name].inputs(2), **change})


def test_a_missing_argument():
    with pytest.raises(ArgumentError, match="cannot be called so: missing a required argument: 'hidden_states'"):
        transformer("dit")(timestep=torch.zeros(2))


def test_arguments_that_say_nothing_may_be_left_out_or_given():
    inputs = FAMILIES["sd3"].inputs(2)
    expected = transformer("sd3")(**inputs).sample
    assert torch.equal(transformer("sd3")(**inputs, joint_attention_kwargs={}, skip_layers=[]).sample, expected)


def test_a_graph_with_a_fixed_batch():
    model, inputs = FAMILIES["dit"].model(), FAMILIES["dit"].inputs(2)
    graph = export_transformer(model, inputs, dynamic=())
    fixed = as_diffusers_transformer(apply_recipe(graph, PLAIN, [tuple(inputs.values())]), backend="reference")
    assert torch.equal(fixed(**inputs).sample, transformer("dit")(**inputs).sample)
    with pytest.raises(
        ArgumentError, match=r"hidden_states has shape \(3, .* \(2, 4, 8, 8\); .* export with a batch of two"
    ):
        fixed(**FAMILIES["dit"].inputs(3))


# -- in a pipeline -----------------------------------------------------------------------------------------------------


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def dit(model: Any) -> Any:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    return diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())


def sd3(model: Any) -> Any:
    return diffusers.StableDiffusion3Pipeline(model, diffusers.FlowMatchEulerDiscreteScheduler(), *[None] * 7)


def wan(model: Any) -> Any:
    return diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), model)


def qwenimage(model: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.QwenImagePipeline(scheduler, None, None, None, model)


def prompts(kind: Any, rows: int) -> dict[str, Any]:
    """Arguments of a pipeline for so many samples."""
    if kind is dit:
        return {"class_labels": list(range(rows))}
    width = 20 if kind is wan else 24
    text = {"prompt_embeds": noise(rows, 7, width), "negative_prompt_embeds": noise(rows, 7, width, seed=1)}
    if kind is sd3:
        text |= {"pooled_prompt_embeds": noise(rows, 16), "negative_pooled_prompt_embeds": noise(rows, 16, seed=1)}
    if kind is wan:
        text |= {"num_frames": 5}
    if kind is qwenimage:
        masks = ("prompt_embeds_mask", "negative_prompt_embeds_mask")
        text |= {name: torch.ones(rows, 7, dtype=torch.int64) for name in masks} | {"true_cfg_scale": 3.0}
    return {**text, "height": 64, "width": 64}


@pytest.mark.parametrize("kind", [dit, sd3, wan, qwenimage])
def test_a_pipeline_draws_what_it_drew(kind):
    """With another number of samples than it was recorded with; wan calls twice within ``cache_context``."""
    pipeline = quiet(kind(FAMILIES[kind.__name__].model()))
    samples = collect_from_pipeline(pipeline, None, timesteps=2, steps=3, call=prompts(kind, 3))
    model = apply_recipe(pipeline.transformer, PLAIN, samples)
    images = []
    for module in (pipeline.transformer, as_diffusers_transformer(model, backend="fbgemm")):
        pipeline.transformer = module
        run = {"num_inference_steps": 3, "output_type": "np" if kind is dit else "latent", **prompts(kind, 1)}
        images.append(torch.as_tensor(pipeline(**run, generator=torch.Generator().manual_seed(0))[0]))
    assert sqnr_db(*images) > 20


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("pipeline")
    dit(FAMILIES["dit"].model()).save_pretrained(folder)
    return folder


def test_a_pipeline_is_loaded_with_it_and_without_the_float_model(saved_pipeline):
    half = as_diffusers_transformer(quantized("dit"), saved_pipeline, backend="reference", dtype=torch.bfloat16)
    load = functools.partial(diffusers.DiTPipeline.from_pretrained, saved_pipeline, torch_dtype=torch.bfloat16)
    pipeline = quiet(load(transformer=half))
    assert (pipeline.dtype, pipeline.device.type, pipeline.vae.dtype) == (torch.bfloat16, "cpu", torch.bfloat16)
    assert pipeline([3], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    assert pipeline.to("cpu", torch.bfloat16) is pipeline
    later = quiet(load(transformer=None))
    later.transformer = half
    assert later([3], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_makers_of_position_ids_are_at_hand():
    coordinates = transformer("ltx2").rope.prepare_video_coords(1, 2, 4, 4, torch.device("cpu"))
    assert coordinates.shape == (1, 3, 32, 2)


def test_what_pipelines_read():
    """Beside the configuration: sizes and blocks to count, but no weights of the original."""
    model = transformer("dit")
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.config.sample_size == model.config["sample_size"] == 8 and model.inner_dim == 32
    assert len(model.transformer_blocks) == 2 and not model.is_cache_enabled
    assert not any(vars(module)["_parameters"] for module in model.modules()) and not model.training
    with model.cache_context("cond", step_index=0):
        pass


@pytest.mark.parametrize(
    "change",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("meta"), lambda m: m.to("meta", torch.float32)],
)
def test_it_cannot_be_moved_or_cast(change):
    with pytest.raises(
        ArgumentError, match="stays on cpu and in torch.float32; lower it for another device, make it wi"
    ):
        change(transformer("dit"))
    same = transformer("dit")
    assert same.to("cpu") is same.to(torch.float32) is same.to(None, None) is same


def test_it_is_not_saved_by_diffusers(tmp_path):
    with pytest.raises(ArgumentError, match="save the quantized model with save_quantized"):
        dit(transformer("dit")).save_pretrained(tmp_path)


# -- what it was -------------------------------------------------------------------------------------------------------


def with_config(**change: Any) -> QuantizedModel:
    model = quantized("dit")
    assert model.captured is not None
    captured = dataclasses.replace(model.captured, config={**model.captured.config, **change})
    return dataclasses.replace(model, captured=captured)


@pytest.mark.parametrize(
    "name", ["NoSuchModel", "os", "os.system", "DDIMScheduler", "DiTPipeline", "models", "ModelMixin.from_pretrained"]
)
def test_only_models_of_diffusers_are_built(name):
    message = rf"the configuration is of the class {name!r}, which is no model of diffusers [\d.]+; give the config of"
    with pytest.raises(ArgumentError, match=message):
        as_diffusers_transformer(with_config(_class_name=name))


def test_a_configuration_that_builds_nothing():
    with pytest.raises(ArgumentError, match="no DiTTransformer2DModel can be built from its configuration: .*damaged"):
        as_diffusers_transformer(with_config(norm_num_groups="many", sample_size="big"))


def test_a_class_of_ones_own_needs_the_configuration_of_its_base(saved_pipeline):
    own = with_config(_class_name="MyDiT")
    for config in (
        saved_pipeline,
        str(saved_pipeline / "transformer"),
        {**FAMILIES["dit"].model().config, "_class_name": "DiTTransformer2DModel"},
    ):
        assert as_diffusers_transformer(own, config, backend="reference").config.sample_size == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has neither config.json nor transformer/config.json; give that of"),
        ("{", r"config\.json is not the configuration of a diffusers model: Expecting"),
        ("3", r"config\.json is not the configuration of a diffusers model"),
    ],
)
def test_folders_without_a_configuration(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArgumentError, match=message):
        as_diffusers_transformer(quantized("dit"), tmp_path)


def test_a_model_that_was_not_of_diffusers():
    model = dataclasses.replace(quantized("dit"), captured=None)
    for unknown in (model, model.lower("reference")):
        with pytest.raises(ArgumentError, match="does not know how its transformer was called: .* with apply_recipe"):
            as_diffusers_transformer(unknown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {}}, "not a configuration and a call; quantize again"),
        ({"call": {"hidden_states": {"code": "x"}}}, "the transformer's call is damaged"),
        (
            {"call": {"hidden_states": {"tensor": "x"}}},
            r"call has the tensors \['x'\], the graph takes 3; quantize again",
        ),
    ],
)
def test_a_saved_model_whose_call_was_altered(change, message, tmp_path):
    quantized("dit").save(tmp_path / "model")
    manifest = tmp_path / "model" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["metadata"]["captured"] |= change
    del document["sha256"]
    manifest.write_text(json.dumps({**document, "sha256": json_digest(document)}))
    with pytest.raises(ArtifactError, match=message):
        load_quantized(tmp_path / "model")


def test_recorded_samples_say_how_it_is_called():
    model, inputs = FAMILIES["pixart_sigma"].model(), FAMILIES["pixart_sigma"].inputs(2)
    signature, tensors = flatten_call(model, inputs)
    captured = apply_recipe(model, PLAIN, CalibrationSamples(tensors, signature=signature)).captured
    assert captured is not None and captured.call == signature
    assert captured.call.arguments["added_cond_kwargs"] == {"resolution": None, "aspect_ratio": None}


OWN_OUTPUT = {"ltx2": AudioVisualModelOutput, "flux": Transformer2DModelOutput, "wan": Transformer2DModelOutput}


@pytest.mark.parametrize("name", OWN_OUTPUT)
def test_output_classes(name):
    assert output_class(type(FAMILIES[name].build())) is OWN_OUTPUT[name]


def test_output_classes_are_those_that_the_classes_are_annotated_with():
    """As far as they are annotated with one."""
    for family in iter_families():
        kind = type(family.build())
        if not issubclass(kind, diffusers.ModelMixin):
            continue
        annotation = inspect.signature(kind.forward).return_annotation
        named = [part for part in getattr(annotation, "__args__", ()) if hasattr(part, "to_tuple")]
        assert named in ([], [output_class(kind)]), family.name


def test_nothing_else_needs_diffusers():
    script = """
        import sys
        import ptq4dit_ao, ptq4dit_ao.workflow
        assert "diffusers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(script)], check=True)
