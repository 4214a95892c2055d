"""A recipe in, a model on disk out: the same whichever way it goes in, and to the bit what comes back."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors import safe_open
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from ptq4dit_ao.artifact import write_artifact
from ptq4dit_ao.artifact.manifest import read_manifest
from ptq4dit_ao.artifact.strict import dump_json
from ptq4dit_ao.calibration import Sampling, SamplingPipeline
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.capture.interface import random_inputs
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.errors import ArgumentError, ArtifactError, CalibrationError, OverrideError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.graph.names import layer_name, linears
from ptq4dit_ao.lowering.tests.batches import batch_of
from ptq4dit_ao.metrics import paired_error
from ptq4dit_ao.quantizer import LinearQuantizer
from ptq4dit_ao.recipe import (
    Activations,
    Balance,
    Calibration,
    Distillation,
    Evaluation,
    NormalDraw,
    Override,
    Recipe,
    Rounding,
    Weights,
    load_recipe,
)
from ptq4dit_ao.reference.models import DIT_CONFIG, SAMPLING
from ptq4dit_ao.report import summary
from ptq4dit_ao.workflow import QuantizedModel, apply_recipe, load_model, load_quantized, quantize, save_quantized
from ptq4dit_ao.workflow.quantized_model import InputSpec
from ptq4dit_ao.workflow.samples import recorded_samples

BITS = {"W8A8": 8, "W4A8": 4}


@pytest.fixture(scope="module")
def apply(tiny_exported, tiny_samples) -> Callable[[Recipe], QuantizedModel]:
    """``apply(recipe)`` on the tiny DiT's graph, once per recipe."""
    made: dict[str, QuantizedModel] = {}

    def run(recipe: Recipe) -> QuantizedModel:
        key = recipe.to_yaml()
        if key not in made:
            made[key] = apply_recipe(tiny_exported, recipe, tiny_samples, name="tiny")
        return made[key]

    return run


@pytest.fixture(scope="module")
def digits_block() -> tuple[DiTTransformer2DModel, GraphModule]:
    """One block of the digits DiT with random weights."""
    model = randomize_(DiTTransformer2DModel(**{**DIT_CONFIG, "num_layers": 1}), seed=0).eval().requires_grad_(False)
    return model, export_transformer(model, batch_of(4, channels=1))


# -- apply_recipe ----------------------------------------------------------------------------------------------------


def test_a_module_and_its_graph_give_the_same_model(digits_block):
    model, exported = digits_block
    samples, seen = [batch_of(rows, channels=1) for rows in (4, 5, 6)], []
    from_module = apply_recipe(model, Recipe(), iter(samples), on_progress=lambda *at: seen.append(at))
    from_graph = apply_recipe(exported, Recipe(), samples)
    assert seen == [("calibrate", done, 3) for done in (1, 2, 3)]
    assert from_module.graph.code == from_graph.graph.code
    first, second = from_module.graph.state_dict(), from_graph.graph.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert from_module.inputs == from_graph.inputs
    assert [spec.name for spec in from_graph.inputs] == ["hidden_states", "timestep", "class_labels"]
    assert [spec.dtype for spec in from_graph.inputs] == [torch.float32, torch.int64, torch.int64]


def test_the_float_model_is_not_changed(tiny_exported, tiny_samples, duplicate):
    exported = duplicate(tiny_exported)
    graph, tensors = str(exported.graph), copy.deepcopy(exported.state_dict())
    apply_recipe(exported, Recipe(weights=Weights(bits=5)), tiny_samples)
    assert str(exported.graph) == graph
    assert all(torch.equal(value, tensors[name]) for name, value in exported.state_dict().items())


def test_every_setting_of_a_recipe_arrives(apply):
    recipe = Recipe(
        description="all of it",
        weights=Weights(bits=4),
        activations=Activations(bits=7),
        balance=Balance(method="max", alpha=0.6, max_scale=1.5, fold_form="bias"),
        layers="paper",
        overrides=[
            Override(pattern="*.to_q", weight_bits=6),
            Override(pattern="transformer_blocks.1.ff.net.2", skip=True),
            Override(pattern="transformer_blocks.0.ff.net.0.proj", balance=False),
        ],
    )
    model = apply(recipe)
    layers = {layer["name"]: (layer["weight_bits"], layer["activation_bits"]) for layer in model.report["layers"]}
    assert layers["transformer_blocks.0.attn1.to_q"] == (6, 7)
    assert layers["transformer_blocks.0.attn1.to_k"] == (4, 7)
    assert layers["transformer_blocks.1.ff.net.2"] == (None, None)
    assert layers["proj_out_2"] == (8, 7)
    assert model.report["settings"] == {"method": "max", "alpha": 0.6, "max_scale": 1.5, "fold_form": "bias"}
    folded = {site["name"]: site for site in model.report["sites"] if site["status"] == "folded"}
    assert len(folded) == 6 and "transformer_blocks.0.ff.net.0.proj" not in folded
    assert any(site["num_clipped"] for site in folded.values())
    assert all(1 / 1.501 < value < 1.501 for site in folded.values() for value in site["b"])
    assert not any("_ptq4dit_" in name for name, _ in model.graph.named_buffers())  # bias form: no constants
    assert model.recipe == recipe


def test_a_recipe_without_balancing(apply):
    report = apply(Recipe(balance=Balance(method="none"))).report
    assert report["settings"] is None and report["sites"] == []
    assert sum(layer["status"] == "integer" for layer in report["layers"]) == 14


class FirstBlock(LinearQuantizer):
    """Leaves the second block alone."""

    def annotate(self, model: GraphModule) -> GraphModule:
        super().annotate(model)
        for node in linears(model):
            if layer_name(node).startswith("transformer_blocks.1."):
                del node.meta[Q_ANNOTATION_KEY]
        return model


def test_any_base_may_be_wrapped(tiny_exported, tiny_samples):
    report = apply_recipe(tiny_exported, Recipe(), tiny_samples, base=FirstBlock()).report
    integer = [layer["name"] for layer in report["layers"] if layer["status"] == "integer"]
    assert len(integer) == 7 and all(name.startswith("transformer_blocks.0.") for name in integer)
    assert {site["name"][:21] for site in report["sites"] if site["status"] == "folded"} == {"transformer_blocks.0."}


def test_distillation(tiny_exported, tiny_samples, tmp_path):
    options = {"weights": Weights(bits=4), "rounding": Rounding(method="gptq", sequential=True)}
    recipe = Recipe(**options, distillation=Distillation(steps=40))
    told = []
    distilled = apply_recipe(
        tiny_exported, recipe, tiny_samples, on_progress=lambda *n: told.append(n), resume=tmp_path
    )
    assert [at for stage, *at in told if stage == "distill"] == [[step, 40] for step in range(1, 41)]
    assert list(dict.fromkeys(stage for stage, *_ in told)) == ["calibrate", "round", "distill"]
    assert distilled.report["seconds"]["distill"] > 0
    rounded = apply_recipe(tiny_exported, Recipe(**options), tiny_samples)
    error, before = (paired_error(tiny_exported, q.graph, tiny_samples).sqnr_db for q in (distilled, rounded))
    assert error > before + 0.5


def test_autocast_reaches_neither_the_graph_nor_its_calibration(tiny_dit, tiny_samples, caplog):
    with torch.autocast("cpu", torch.bfloat16), caplog.at_level(logging.WARNING):
        quantized = apply_recipe(tiny_dit, Recipe(), tiny_samples)
    assert "self-check" not in caplog.text
    expected = apply_recipe(tiny_dit, Recipe(), tiny_samples)
    assert torch.equal(quantized.graph(*tiny_samples[0]), expected.graph(*tiny_samples[0]))


def test_no_samples(tiny_exported):
    with pytest.raises(CalibrationError, match="there are no calibration samples; pass at least one tuple of inputs"):
        apply_recipe(tiny_exported, Recipe(), [])


def test_an_override_of_the_recipe_that_matches_nothing(tiny_exported, tiny_samples):
    recipe = Recipe(overrides=[Override(pattern="blocks.*", skip=True)])
    with pytest.raises(OverrideError, match=r"'blocks\.\*' matches none of the model's 22 linear layers"):
        apply_recipe(tiny_exported, recipe, tiny_samples)


# -- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_what_happened(apply, tiny_dit):
    model = apply(Recipe(description="tiny W8A8"))
    report = model.report
    assert report["title"] == "tiny W8A8 on tiny"
    assert report["model"] == {"name": "tiny", "parameters": sum(p.numel() for p in tiny_dit.parameters())}
    assert report["recipe"] == model.recipe.to_dict()
    assert report["versions"]["torch"] == torch.__version__
    assert list(report["seconds"]) == ["export", "prepare", "calibrate", "convert"]
    assert (report["evaluation"], report["size"], report["notes"]) == (None, None, [])
    assert (report["leave_one_out"], report["weight_bits"]) == (None, None)
    json.dumps(report, allow_nan=False)


def test_the_report_lists_every_layer_and_site(apply):
    report = apply(Recipe()).report
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert len(report["layers"]) == 22
    assert {layer["status"] for layer in report["layers"] if "transformer_blocks.1.attn1" in layer["name"]} == {
        "integer"
    }
    assert layers["proj_out_2"] == {
        "name": "proj_out_2", "node": "linear_21", "status": "float",
        "weight_bits": None, "activation_bits": None, "dynamic": False, "activation_clipping": None,
        "weight_clipping": None, "sqnr_db": None, "sqnr_db_t": [],
    }  # fmt: skip
    assert {layer["activation_clipping"] for layer in report["layers"] if layer["status"] == "integer"} == {1}
    sites = {site["name"]: site for site in report["sites"]}
    site = sites["transformer_blocks.1.attn1.{to_q,to_k,to_v}"]
    assert (site["status"], site["channels"], site["variables"], site["reason"]) == ("folded", 32, 32, None)
    assert len(site["b"]) == len(site["salience_x"]) == len(site["salience_w"]) == 32
    assert len(site["timesteps"]) == len(site["eta"]) == len(site["rho"]) == len(site["salience_t"]) > 2
    assert site["folded_into"] == ["transformer_blocks.1.norm1.linear.weight", "transformer_blocks.1.norm1.linear.bias"]
    refused = sites["transformer_blocks.0.ff.net.2"]
    assert refused["status"] == "refused" and "gelu does not commute with a scale" in refused["reason"]


def test_the_summary_leaves_the_vectors_out(apply):
    report = apply(Recipe()).report
    short = summary(report)
    assert [site["name"] for site in short["sites"]] == [site["name"] for site in report["sites"]]
    assert not any(isinstance(value, list) and len(value) > 8 for site in short["sites"] for value in site.values())
    assert "b" in report["sites"][3]


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=BITS)
def recipe(request) -> Recipe:
    return Recipe(weights=Weights(bits=BITS[request.param]))


@pytest.mark.parametrize("backend", ["reference", "fbgemm"])
def test_what_comes_back_is_the_same_to_the_bit(apply, recipe, backend, tmp_path):
    model = apply(recipe)
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    before, after = model.lower(backend), loaded.lower(backend)
    assert after.proof == before.proof
    for rows in (4, 1, 6):  # exported at 4
        assert torch.equal(before(*batch_of(rows)), after(*batch_of(rows)))
        assert torch.equal(model.graph(*batch_of(rows)), loaded.graph(*batch_of(rows)))


def test_everything_else_comes_back_too(apply, tmp_path):
    sampling = Sampling(channels=4, size=8, null_label=10, clip=False)
    model = apply(Recipe(description="with sampling"))
    model = QuantizedModel(
        graph=model.graph, recipe=model.recipe, inputs=model.inputs, report=model.report, sampling=sampling
    )
    size = model.save(tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert (loaded.recipe, loaded.inputs, loaded.sampling) == (model.recipe, model.inputs, sampling)
    assert loaded.report.pop("size")["artifact_bytes"] > 0
    expected = json.loads(json.dumps(summary(model.report)))
    assert expected.pop("size") is None  # known once it is saved
    assert loaded.report == expected
    assert size.total_bytes == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())


def test_a_model_that_was_saved_before_sizes_were_free_is_read(apply, tmp_path):
    model = apply(Recipe())
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "manifest.json"
    manifest = read_manifest(path)
    del manifest.metadata["sizes"], manifest.metadata["report"]["inputs"]
    for entry in manifest.input_signature:
        entry["batched"] = entry.pop("sizes")[0] == "batch"
    path.write_bytes(dump_json(manifest.to_json(), indent=1))
    loaded = load_quantized(tmp_path / "model")
    assert loaded.sizes.names == ("batch",) and loaded.report["inputs"] is None
    assert [spec.shape for spec in loaded.inputs] == [spec.shape for spec in model.inputs]
    inputs = random_inputs(loaded.inputs)
    assert torch.equal(loaded.graph(*inputs), model.graph(*inputs))


def test_loading_needs_neither_diffusers_nor_the_float_model(apply, tmp_path):
    model = apply(Recipe(weights=Weights(bits=4)))
    model.save(tmp_path / "model")
    script = """
        import sys

        sys.modules["diffusers"] = sys.modules["transformers"] = None  # an import of either fails
        import torch

        from ptq4dit_ao import load_quantized

        inputs = torch.load(sys.argv[1])
        lowered = load_quantized(sys.argv[2]).lower("fbgemm")
        torch.save(lowered(*inputs), sys.argv[1])
    """
    exchange = tmp_path / "tensors.pt"
    torch.save(batch_of(3), exchange)
    command = [sys.executable, "-c", textwrap.dedent(script), str(exchange), str(tmp_path / "model")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert torch.equal(torch.load(exchange), model.lower("fbgemm")(*batch_of(3)))


def test_the_paper_recipe_quantizes_attention_too(apply, tmp_path):
    recipe = load_recipe("paper_w4a8")
    model = apply(recipe.model_copy(update={"rounding": recipe.rounding.model_copy(update={"steps": 5})}))
    assert model.report["attention"] == {"matmuls": 4, "bits": [8]}
    model.save(tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert torch.equal(loaded.graph(*batch_of(3)), model.graph(*batch_of(3)))
    assert loaded.report["attention"] == model.report["attention"]
    lowered = loaded.lower("fbgemm")
    assert lowered.proof.attention == 4
    assert sqnr_db(model.graph(*batch_of(3)), lowered(*batch_of(3))) > 40


def test_a_folder_that_was_written_some_other_way(apply, tmp_path):
    write_artifact(tmp_path / "model", apply(Recipe()).graph, {"about": 1}, [])
    with pytest.raises(ArtifactError, match=r"not saved with save_quantized: its metadata holds \['about'\]; give the"):
        load_quantized(tmp_path / "model")
    with pytest.raises(ArtifactError, match="there is no folder"):
        load_quantized(tmp_path / "missing")


@pytest.mark.parametrize(
    "data", [{}, {"name": "x", "shape": [1], "dtype": "float33"}, {"name": "x", "shape": [1], "dtype": "nn"}]
)
def test_input_signatures_that_cannot_be_read(data):
    with pytest.raises(ArtifactError, match="is not one this version reads; quantize again"):
        InputSpec.from_dict(data)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.30), (4, 0.18)])
def test_quantized_layers_are_small_on_disk(bits, limit, digits_block, tmp_path):
    """int8 or packed int4 weights, scales and biases, against float32."""
    model, exported = digits_block
    samples = [batch_of(rows, channels=1) for rows in (4, 5)]
    quantized = apply_recipe(exported, Recipe(weights=Weights(bits=bits)), samples)
    artifact = quantized.save(tmp_path / "model")
    block = model.transformer_blocks[0]
    layers = [m for part in (block.norm1.linear, block.attn1, block.ff) for m in part.modules()]
    parameters = [p for layer in layers if isinstance(layer, nn.Linear) for p in layer.parameters()]
    before = sum(4 * p.numel() for p in parameters)
    read = exported.state_dict().keys()  # a graph for any size computes the positions, and has no table of them
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    rest = sum(4 * x.numel() for name, x in tensors.items() if name in read) - before
    after = _tensor_bytes(tmp_path / "model" / "weights.safetensors") - rest
    assert after <= limit * before
    # What is said of it is what is there, but for two balancing constants.
    size = load_quantized(tmp_path / "model").report["size"]
    assert size["quantized_layers_float32_bytes"] == before
    assert size["quantized_layers_bytes"] == pytest.approx(after, abs=4 * 2 * 128)
    assert size["quantized_layers_ratio"] <= limit
    assert size["float32_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert size["ratio"] == size["artifact_bytes"] / size["float32_bytes"]
    # The header of the tensors' file is not counted.
    assert 0 <= artifact.graph_bytes + artifact.weights_bytes - size["artifact_bytes"] < 16_384


def _tensor_bytes(path) -> int:
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  (not a mapping)


# -- models by name --------------------------------------------------------------------------------------------------

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 4,
    "num_embeds_ada_norm": 10,
}  # fmt: skip


def tiny_transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(**TINY)


def test_the_reference_model():
    loaded = load_model("reference")
    assert (loaded.name, loaded.sampling) == ("reference", SAMPLING)
    assert isinstance(loaded.pipeline, SamplingPipeline) and loaded.transformer is loaded.pipeline.transformer


def test_a_bare_transformer_in_a_folder(tmp_path):
    saved = tiny_transformer()
    saved.save_pretrained(tmp_path / "mine")
    loaded = load_model(str(tmp_path / "mine"))
    assert loaded.name == "mine" and isinstance(loaded.pipeline, SamplingPipeline)
    assert loaded.sampling == Sampling(channels=4, size=4, null_label=10, clip=False)
    assert not loaded.transformer.training and not any(p.requires_grad for p in loaded.transformer.parameters())
    assert torch.equal(loaded.transformer.proj_out_1.weight, saved.proj_out_1.weight)


def test_a_pipeline_in_a_folder(tmp_path):
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    DiTPipeline(tiny_transformer(), vae, DDIMScheduler()).save_pretrained(tmp_path / "whole")
    loaded = load_model(str(tmp_path / "whole"))
    assert isinstance(loaded.pipeline, DiTPipeline) and loaded.sampling.null_label == 10


def test_a_pipeline_with_two_transformers_says_which_one_is_taken(tmp_path, monkeypatch, caplog):
    (tmp_path / "models_with_experts.py").write_text(
        textwrap.dedent("""
            from types import SimpleNamespace
            from ptq4dit_ao.testing.zoo import FAMILIES

            def experts():
                first, second = (FAMILIES["wan"].model(seed=seed) for seed in (0, 1))
                return SimpleNamespace(transformer=first, transformer_2=second)
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    load_model("models_with_experts:experts")
    assert "experts has two transformers, of which this takes the first; record the second with" in caplog.text


def test_another_sampler():
    loaded = load_model("reference")
    assert loaded.drawn_by(None) is loaded
    assert loaded.drawn_by("ddpm").sampling == SAMPLING.by("ddpm") and loaded.sampling == SAMPLING
    with pytest.raises(ArgumentError, match="sampler is 'dpm'; choose one of ddim, ddpm"):
        loaded.drawn_by("dpm")
    text = dataclasses.replace(loaded, name="flux", sampling=None)
    with pytest.raises(
        ArgumentError, match=r"flux is not class-conditional, so that sampler 'ddpm' cannot be used; leave it "
    ):
        text.drawn_by("ddpm")


@pytest.mark.parametrize("evaluate", [False, True])
def test_the_recipes_sampler_draws_what_the_model_is_observed_on(evaluate):
    loaded = load_model("reference")
    seen = {}
    for sampler in (None, "ddim", "ddpm"):
        calibration = Calibration(timesteps=3, samples=1, steps=3, sampler=sampler)
        recipe = Recipe(calibration=calibration, evaluation=Evaluation(timesteps=3, samples=1))
        seen[sampler] = recorded_samples(loaded, recipe, evaluate=evaluate).inputs
    assert seen["ddpm"]["timestep"].unique().tolist() == [0, 500, 999]
    assert torch.equal(seen[None]["hidden_states"], seen["ddim"]["hidden_states"])
    assert seen["ddim"]["timestep"].unique().tolist() == [0, 333, 666]


class CountedCalls(SamplingPipeline):
    """The shipped model's pipeline, and how often it was called."""

    calls = 0

    def __call__(self, class_labels: list[int], **options: object) -> torch.Tensor:
        self.calls += 1
        return super().__call__(class_labels, **options)


@pytest.mark.parametrize("sampler", [None, "ddpm"])
@pytest.mark.parametrize(
    ("calibration", "evaluation", "message"),
    [
        (
            {"timesteps": 6},
            {"timesteps": 2},
            r"^6 .* has 5 steps; ask for fewer \(calibration\.timesteps\)",
        ),
        (
            {"timesteps": 3},
            {},
            r"^20 evaluation .* 5 steps; ask for fewer \(evaluation\.timesteps\), or",
        ),
        ({"timesteps": 3}, {"timesteps": (1,)}, r"never visits timestep 1 \(evaluation\.timesteps\); the nearest"),
        ({"timesteps": NormalDraw(draw="normal", count=8)}, {}, "8 timesteps are drawn for 16 samples; give count=16"),
        ({"steps": 1001}, {}, "1001 steps|steps is 1001"),
    ],
)
def test_timesteps_of_both_sections_are_checked_before_anything_is_drawn(
    sampler, calibration, evaluation, message, tmp_path
):
    model = load_model("reference")
    pipeline = CountedCalls(model.transformer, SAMPLING)
    model = dataclasses.replace(model, pipeline=pipeline)
    recipe = Recipe(
        calibration=Calibration(**{"steps": 5, "sampler": sampler, **calibration}), evaluation=Evaluation(**evaluation)
    )
    with pytest.raises((CalibrationError, ArgumentError), match=message):
        quantize(model, recipe, tmp_path / "out")
    assert pipeline.calls == 0 and list(tmp_path.iterdir()) == []


def test_what_somebodys_pipeline_raises_says_whose_it_is():
    class Broken(SamplingPipeline):
        def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
            raise ValueError("`height` must be divisible by 8")

    model = load_model("reference")
    model = dataclasses.replace(model, pipeline=Broken(model.transformer, SAMPLING))
    message = (
        r"Broken of reference failed while it sampled calibration samples: ValueError: `height` must .*; run it by hand"
    )
    with pytest.raises(CalibrationError, match=message):
        recorded_samples(model, Recipe())


def test_a_sampler_for_a_model_that_is_not_drawn_by_class():
    text = dataclasses.replace(load_model("reference"), sampling=None)
    with pytest.raises(ArgumentError, match="is not class-conditional, so that sampler 'ddim' cannot be used"):
        recorded_samples(text, Recipe(calibration=Calibration(sampler="ddim")))


def test_a_function_that_makes_a_model(tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text(
        "from diffusers import DiTTransformer2DModel\n"
        f"def tiny():\n    return DiTTransformer2DModel(**{TINY!r})\n"
        "def none():\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("made_here:tiny").name == "made_here:tiny"
    with pytest.raises(ArgumentError, match="'made_here:none' is a NoneType; expected a diffusers transformer"):
        load_model("made_here:none")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "referense",
            "model 'referense' is none of 'reference', 'fashion', 'flow', a folder, 'package.module:function'",
        ),
        ("a b:c", "model 'a b:c' is none of 'reference'"),
        ("no_such_module:make", "model 'no_such_module:make' cannot be loaded: No module named 'no_such_module'"),
        ("json:make", "model 'json:make' cannot be loaded: module 'json' has no attribute 'make'"),
        ("builtins:list", "model 'builtins:list' is a list; expected a diffusers transformer, or a pipeline"),
    ],
)
def test_names_of_no_model(spec, message):
    with pytest.raises(ArgumentError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has neither model_index.json nor config.json; give the folder of a diffusers"),
        ({"config.json": "{"}, r"config.json is not the configuration of a diffusers model: Expecting property name"),
        ({"config.json": "{}"}, r"config.json names no class \('_class_name'\); give a folder that"),
        ({"config.json": '{"_class_name": "NoSuchModel"}'}, r"holds a 'NoSuchModel', which diffusers [\d.]+ lacks"),
        (
            {"config.json": '{"_class_name": "DiTTransformer2DModel"}'},
            "cannot be loaded as a DiTTransformer2DModel: Error no file named diffusion_pytorch_",
        ),
        ({"model_index.json": "{}"}, r"model_index.json names no class"),
        ({"model_index.json": '{"_class_name": "DiTPipeline"}'}, r"expected \['scheduler', 'transformer', 'vae'\]"),
    ],
)
def test_folders_that_hold_no_model(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ArgumentError, match=message):
        load_model(str(tmp_path))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backends_that_cannot_run_a_dtype_are_named_before_calibration(dtype, tiny_dit, tiny_samples, caplog):
    model = copy.deepcopy(tiny_dit).to(dtype)

    def samples():
        yield tuple(x.to(dtype) if x.is_floating_point() else x for x in tiny_samples[0])
        raise StoppedError

    with pytest.raises(StoppedError):
        apply_recipe(model, Recipe(), samples())
    name = str(dtype).removeprefix("torch.")
    (warning,) = (record.message for record in caplog.records if "backends" in record.message)
    assert warning.startswith(f"DiTTransformer2DModel has {name} weights, which only the backends ")
    able, _, unable = warning.partition(", and not ")
    assert "'cuda'" in able and "'reference'" in able
    assert "'fbgemm'" in unable and "'x86_inductor'" in unable and "call .float() on it before" in unable


def test_nothing_is_said_of_float32(tiny_dit, tiny_samples, caplog):
    apply_recipe(tiny_dit, Recipe(balance=Balance(method="none")), tiny_samples)
    assert not any("backends" in record.message for record in caplog.records)
