"""``evaluate``: each figure is that of the function it comes from, on the same inputs and noise."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

from ptq4dit_ao.calibration import Sampling, as_denoiser, sample
from ptq4dit_ao.cli.evaluate import sheets
from ptq4dit_ao.errors import ArgumentError, LoweringError, MissingDependencyError
from ptq4dit_ao.evaluation import baseline, run
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.evaluation.run import evaluate
from ptq4dit_ao.metrics import ReferenceStatistics, image_errors, paired_error, perceptual
from ptq4dit_ao.recipe import Calibration, Evaluation, Recipe
from ptq4dit_ao.reference.models import DIT_CONFIG, SAMPLING
from ptq4dit_ao.workflow import apply_recipe, image_sampling, load_model, load_quantized, quantize
from ptq4dit_ao.workflow.samples import recorded_samples

SAMPLES, STEPS = 12, 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``model``, W8A8, and the ``float`` model it was made of: one random block that denoises 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("saved")
    few = {"timesteps": 2, "samples": 2}
    recipe = Recipe(calibration=Calibration(**few, steps=2, guidance=1.5), evaluation=Evaluation(**few, seed=5))
    transformer = randomize_(DiTTransformer2DModel(**{**DIT_CONFIG, "num_layers": 1}), seed=0).eval()
    transformer.save_pretrained(folder / "float")
    quantized = apply_recipe(transformer, recipe, recorded_samples(load_model(str(folder / "float")), recipe))
    dataclasses.replace(quantized, sampling=SAMPLING).save(folder / "model")
    return folder


@pytest.fixture(scope="module")
def result(saved):
    options = {"backends": ("reference", "fbgemm"), "samples": SAMPLES, "steps": STEPS, "seed": 3}
    return evaluate(saved / "model", str(saved / "float"), features="digits", **options)


def drawn(denoiser):
    labels = torch.arange(SAMPLES) % 10
    generator = torch.Generator().manual_seed(3)
    return sample(denoiser, SAMPLING, labels, steps=STEPS, guidance=1.5, generator=generator)


def test_simulated_and_integer_execution_have_rows_of_their_own(result):
    assert [(row.model, row.execution, row.backend) for row in result.rows] == [
        ("float32", "float", None),
        ("W8A8", "simulated", "reference"),
        ("W8A8", "integer", "fbgemm"),
    ]
    assert "7/7 quantized linears" in result.rows[2].proof and result.rows[1].proof is None


def test_figures_are_those_of_the_same_inputs_and_noise(result, saved):
    loaded, quantized = load_model(str(saved / "float")), load_quantized(saved / "model")
    float_model = as_denoiser(loaded.transformer)
    recorded = recorded_samples(loaded, quantized.recipe, evaluate=True)
    error = paired_error(float_model, quantized.graph, recorded.batches(32))
    row = result.rows[1]
    assert row.eps.pooled.value == pytest.approx(error.sqnr_db) and row.eps.rows == len(recorded) == 8
    assert row.eps.median.value == pytest.approx(error.median_db)
    assert {t: e.value for t, e in row.eps.per_timestep} == pytest.approx(error.per_timestep)
    assert row.eps.worst[1].value == min(error.per_timestep.values())
    images = image_errors(drawn(float_model), drawn(quantized.graph), seed=3)
    assert row.images.mse.value == pytest.approx(images.mse.value) and row.images.images == SAMPLES
    assert row.images.ssim.low == pytest.approx(images.ssim.low)
    assert (result.samples, result.steps, result.guidance, result.seed, result.eps_seed) == (SAMPLES, STEPS, 1.5, 3, 5)


def test_lpips_is_measured_where_it_is_asked_for(result, saved, monkeypatch):
    monkeypatch.setattr(run, "check_lpips", lambda *_: None)
    monkeypatch.setattr(perceptual, "lpips", lambda x, y, network: (x - y).abs().double().flatten(1).mean(1))
    asked = evaluate(saved / "model", str(saved / "float"), samples=SAMPLES, steps=STEPS, seed=3, lpips="vgg")
    assert (asked.lpips, result.lpips) == ("vgg", None) and result.rows[1].images.lpips is None
    assert 0 < asked.rows[1].images.lpips.value < 2 * math.sqrt(asked.rows[1].images.mse.value)
    assert next(sheets(asked)).columns[-1] == "LPIPS (vgg)" and "LPIPS" not in str(next(sheets(result)).columns)


def test_without_a_reference_the_float_model_is_one_and_that_is_said(result):
    assert result.rows[0].distances is None
    assert result.rows[1].distances.frechet > 0 and result.rows[2].distances.frechet > 0
    assert (result.network, result.is_inception) == ("digits classifier", False)
    assert (result.reference, result.reference_images) == ("what the float model draws", SAMPLES)
    assert result.notes == ("no reference set: distances are to what the float model draws",)


def test_without_a_network_there_are_no_distances_and_that_is_said(saved):
    result = evaluate(saved / "model", str(saved / "float"), samples=2, steps=1)
    assert [row.distances for row in result.rows] == [None, None]
    assert (result.network, result.reference, result.reference_images) == (None, None, None)
    assert result.notes == ("no distances: there is no feature network; give one (features=...)",)


def test_a_reference_set_measures_the_float_model_too(saved, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=levels)
    options = {"features": "digits", "samples": 8, "steps": 1, "cache": tmp_path / "kept.safetensors"}
    first = evaluate(saved / "model", str(saved / "float"), reference=tmp_path / "real.npz", **options)
    assert first.rows[0].distances is not None and first.notes == ()
    assert (first.reference, first.reference_images) == ("real.npz", 9)
    options["cache"] = None
    second = evaluate(saved / "model", str(saved / "float"), reference=tmp_path / "kept.safetensors", **options)
    assert second.reference == "kept.safetensors"
    assert [row.distances for row in second.rows] == [row.distances for row in first.rows]


@pytest.mark.parametrize("installed", [True, False])
def test_the_shipped_model_knows_its_digits(saved, installed, monkeypatch):
    def missing():
        raise MissingDependencyError("no scikit-learn")

    if not installed:
        monkeypatch.setattr(baseline, "load_digits", missing)
    stages = []
    result = evaluate(
        saved / "model", "reference", samples=4, steps=1, on_progress=lambda stage, *n: stages.append((stage, *n))
    )
    assert result.network == "digits classifier"
    reference = ("scikit-learn's digits", 1797) if installed else ("what the float model draws", 4)
    assert (result.reference, result.reference_images) == reference
    assert len(result.notes) == (not installed)
    last = {stage: (done, total) for stage, done, total in stages}
    assert list(last)[-3:] == ["sample reference", "eps reference", "features reference"]
    assert last["sample float32"] == (1, 1) and last["eps reference"] == (8, 8) and last["features reference"] == (4, 4)


def test_many_images_are_drawn_in_batches(saved, monkeypatch):
    monkeypatch.setattr(image_sampling, "BATCH", 4)
    told = []
    denoiser = as_denoiser(load_model(str(saved / "float")).transformer)
    settings = image_sampling.ImageSampling(sampling=SAMPLING, samples=10, steps=2, guidance=1.5, seed=3)
    images = settings.draw(denoiser, lambda *n: told.append(n))
    assert images.shape == (10, 1, 8, 8) and told == [(i, 6) for i in range(1, 7)]
    assert torch.equal(images[:4], dataclasses.replace(settings, samples=4).draw(denoiser))
    assert not torch.equal(images[:4], images[4:8])


def test_infinite_figures_are_null_in_json(result):
    row = result.rows[1]
    eps = dataclasses.replace(row.eps, pooled=dataclasses.replace(row.eps.pooled, high=math.inf))
    changed = dataclasses.replace(result, rows=(dataclasses.replace(row, eps=eps),))
    data = json.loads(json.dumps(changed.to_dict(), allow_nan=False))
    assert data["rows"][0]["eps"]["pooled"] == {
        "value": row.eps.pooled.value,
        "low": row.eps.pooled.low,
        "high": None,
    }
    assert data["environment"]["threads"] == torch.get_num_threads()


# -- user errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backends": ("fbgem",), "features": "no"},
            LoweringError,
            "backend 'fbgem' is unknown; .* did you mean 'fbgemm'",
        ),
        ({"steps": 1001}, ArgumentError, "steps is 1001; it must lie between 1 and the model's 1000 timesteps"),
        ({"seed": -1}, ArgumentError, "seed is -1; it must be at least 0"),
        ({"sampler": "dpm"}, ArgumentError, "sampler is 'dpm'; choose one of ddim, ddpm"),
        ({"reference": "real.npz"}, ArgumentError, "real.npz: a reference set is measured with a feature network"),
        ({"cache": "kept"}, ArgumentError, "kept: a reference set is measured with a feature network"),
        ({"features": "digits", "samples": 3}, ArgumentError, "3 images are too few for distances; sample at least 4"),
        ({"lpips": "alex"}, ArgumentError, "images have 8 pixels a side, and LPIPS is for 64 and more; leave it out"),
        ({"features": "didgits"}, ArgumentError, "feature network 'didgits' is none of 'digits', 'fashion'"),
        (
            {"features": "digits", "reference": "missing.npz"},
            ArgumentError,
            "cannot read reference images from missing",
        ),
    ],
)
def test_wrong_options_are_found_before_the_work(saved, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(saved / "model", str(saved / "float"), **options, on_progress=lambda *_: pytest.fail("began"))


def test_another_float_model_is_refused(saved):
    message = r"model was quantized from a model of 1 x 8 x 8 and 10 classes .*; fashion is one of 1 x 28 x 28 and 10"
    with pytest.raises(ArgumentError, match=message):
        evaluate(saved / "model", "fashion", on_progress=lambda *_: pytest.fail("began"))


def test_kept_statistics_are_of_one_network_and_have_no_cache(saved, tmp_path):
    kept = tmp_path / "kept.safetensors"
    options = {"features": "digits", "samples": 4, "steps": 1}
    evaluate(saved / "model", str(saved / "float"), cache=kept, **options)
    with pytest.raises(ArgumentError, match=r"cache other: the reference .*kept.safetensors is statistics already"):
        evaluate(saved / "model", str(saved / "float"), reference=kept, cache="other", **options)
    dataclasses.replace(ReferenceStatistics.load(kept), network="other").save(kept)
    with pytest.raises(ArgumentError, match="kept.safetensors is of the network 'other', not of 'digits classifier'"):
        evaluate(saved / "model", str(saved / "float"), reference=kept, **options)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (None, "was saved without the way to sample it, so no images can be compared; compare predictions with"),
        ({"channels": 4}, "quantized from a model of 4 x 8 x 8 and 10 classes"),
        ({"sampler": "flow", "patch": 2}, "10 classes that predicts velocity; .*/float is one of 1 .* predicts noise"),
        ({}, r"does not know its float model; say which \(model=\.\.\.\)"),
    ],
)
def test_models_that_cannot_be_evaluated(saved, tmp_path, sampling, message):
    quantized = load_quantized(saved / "model")
    known = None if sampling is None else dataclasses.replace(SAMPLING, **sampling)
    dataclasses.replace(quantized, sampling=known).save(tmp_path / "odd")
    with pytest.raises(ArgumentError, match=message):
        evaluate(tmp_path / "odd", str(saved / "float") if sampling else None)


# -- latents ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """``float``, a pipeline whose VAE decodes 4 x 8 x 8 latents into 3 x 16 x 16, and ``model``, its quantized form."""
    folder = tmp_path_factory.mktemp("latent")
    config = {**DIT_CONFIG, "num_layers": 1, "in_channels": 4, "out_channels": 4, "num_embeds_ada_norm": 1000}
    transformer = randomize_(DiTTransformer2DModel(**config), seed=0).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    DiTPipeline(transformer=transformer, vae=vae, scheduler=SAMPLING.scheduler(2)).save_pretrained(folder / "float")
    few = {"timesteps": 2, "samples": 2}
    recipe = Recipe(calibration=Calibration(**few, steps=2), evaluation=Evaluation(**few))
    quantize(load_model(str(folder / "float")), recipe, folder / "model")
    return folder


def test_latents_are_decoded_before_images_are_compared(latent, monkeypatch):
    monkeypatch.setattr(image_sampling, "DECODED", 2)
    told = []
    result = evaluate(
        latent / "model", str(latent / "float"), samples=3, steps=2, on_progress=lambda *n: told.append(n)
    )
    pipeline = load_model(str(latent / "float")).pipeline
    sampling = Sampling.of(pipeline.transformer)

    def drawn(denoiser):
        generator = torch.Generator().manual_seed(image_sampling.NOISE_SEED)
        latents = sample(denoiser, sampling, torch.arange(3), steps=2, guidance=1.5, generator=generator)
        return pipeline.vae.decode(latents / 0.5).sample.clamp(-1, 1)

    with torch.no_grad():
        images = drawn(as_denoiser(pipeline.transformer)), drawn(load_quantized(latent / "model").graph)
    assert images[0].shape == (3, 3, 16, 16)
    assert result.rows[1].images.mse.value == pytest.approx(image_errors(*images).mse.value, rel=1e-3)
    assert [n[1:] for n in told if n[0] == "sample reference"] == [(1, 3), (2, 3), (3, 3)]


def test_latents_are_drawn_as_the_pipeline_draws_them(latent):
    model = load_model(str(latent / "float"))
    sampling, pipeline = model.sampling, model.pipeline
    pipeline.scheduler = sampling.scheduler(2)
    pipeline.set_progress_bar_config(disable=True)
    images = image_sampling.draw_images(
        as_denoiser(model.transformer),
        sampling,
        torch.tensor([7, 1]),
        steps=2,
        guidance=3.0,
        seed=5,
        decode=image_sampling.decoder(model, sampling),
    )
    generator = torch.Generator().manual_seed(5)
    own = pipeline([7, 1], guidance_scale=3.0, generator=generator, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(images / 2 + 0.5, own, rtol=1e-4, atol=1e-4)


def test_the_report_of_a_model_with_a_vae_has_images(latent):
    assert (latent / "model" / "report.html").read_text().count("Samples of the quantized model") == 1


def test_a_vae_of_other_latents_is_refused(latent):
    model = load_model(str(latent / "float"))
    with pytest.raises(ArgumentError, match=r"VAE of float decodes 4-channel latents, and these have 16; give"):
        image_sampling.decoder(model, dataclasses.replace(model.sampling, channels=16))


def test_images_that_are_not_finite_are_said(caplog):
    def broken(x, t, y):
        return torch.where((y == 1).view(-1, 1, 1, 1), torch.nan, x)

    with caplog.at_level("WARNING"):
        image_sampling.draw_images(broken, SAMPLING, torch.tensor([0, 1, 2]), steps=2, guidance=1.5, seed=0)
    assert "1 of 3 images hold NaN or infinity" in caplog.text


def test_latents_without_a_vae_are_refused(latent):
    with pytest.raises(ArgumentError, match="transformer denoises 4-channel latents and has no VAE .* whole pipeline"):
        evaluate(latent / "model", str(latent / "float" / "transformer"))
