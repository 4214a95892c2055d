"""PTQD as a recipe: the table is fitted, kept beside the model, used by whoever samples it, and fitted anew."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ptq4dit_ao.calibration import sample
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.evaluation.bench.random_dit import randomize_
from ptq4dit_ao.evaluation.run import CORRECTED, evaluate
from ptq4dit_ao.metrics import image_errors
from ptq4dit_ao.ptqd import NoiseCorrection, PTQDScheduler
from ptq4dit_ao.recipe import Activations, Calibration, Evaluation, Recipe, Weights
from ptq4dit_ao.recipe import NoiseCorrection as Asked
from ptq4dit_ao.reference.models import DIT_CONFIG, FLOW, SAMPLING
from ptq4dit_ao.workflow import correction, load_model, load_quantized, quantize

STEPS = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``model``, W3A3 with a correction for 4 steps, and the ``float`` model it was made of."""
    folder = tmp_path_factory.mktemp("saved")
    transformer = randomize_(DiTTransformer2DModel(**{**DIT_CONFIG, "num_layers": 1}), seed=0).eval()
    transformer.save_pretrained(folder / "float")
    few = {"timesteps": 2, "samples": 2}
    recipe = Recipe(
        weights=Weights(bits=3), activations=Activations(bits=3), calibration=Calibration(**few, steps=STEPS),
        evaluation=Evaluation(**few), noise_correction=Asked(images=12),
    )  # fmt: skip
    model = load_model(str(folder / "float"))
    quantize(dataclasses.replace(model, sampling=SAMPLING), recipe, folder / "model", grids=False)
    return folder


def figures(saved, steps=STEPS):
    return evaluate(saved / "model", str(saved / "float"), samples=6, steps=steps, seed=3)


def test_the_table_lies_beside_the_model(saved):
    kept = NoiseCorrection.load(saved / "model" / "ptqd.safetensors")
    assert kept.timesteps.tolist() == SAMPLING.scheduler(STEPS).timesteps.tolist() and kept.guidance == 1.5


def test_images_are_drawn_with_the_kept_correction(saved):
    result = figures(saved)
    kept, quantized = NoiseCorrection.load(saved / "model" / "ptqd.safetensors"), load_quantized(saved / "model")

    def drawn(denoiser, scheduler=None):
        generator = torch.Generator().manual_seed(3)
        options = {"steps": STEPS, "generator": generator, "scheduler": scheduler}
        return sample(denoiser, SAMPLING, torch.arange(6), **options)

    float_images = drawn(lambda x, t, y: load_model(str(saved / "float")).transformer(x, t, y).sample)
    corrected = drawn(quantized.graph, PTQDScheduler(SAMPLING.scheduler(STEPS), kept))
    expected = image_errors(float_images, corrected).mse.value
    assert result.rows[1].images.mse.value == pytest.approx(expected)
    assert expected != pytest.approx(image_errors(float_images, drawn(quantized.graph)).mse.value)
    assert CORRECTED in result.notes


def test_another_step_count_has_its_correction_fitted_anew(saved, monkeypatch):
    fitted = []
    fit = correction.fit_noise_correction
    monkeypatch.setattr(
        correction, "fit_noise_correction", lambda *a, **options: fitted.append(options["steps"]) or fit(*a, **options)
    )
    figures(saved)
    figures(saved, steps=2)  # its timesteps are two of the four
    assert fitted == []
    figures(saved, steps=3)
    assert fitted == [3]


def test_a_sampler_that_it_does_not_serve_is_refused(saved, tmp_path):
    quantized = load_quantized(saved / "model")
    options = (quantized, SAMPLING)
    scheduler = correction.corrected_scheduler(saved / "model", *options, STEPS, 1.5)
    assert scheduler.table.steps == STEPS
    message = (
        r"is for 4 steps of DDIM and guidance 1.5, not for 3 of DDIM and 1.5; sample with these, or quantize for those"
    )
    with pytest.raises(ArgumentError, match=message):
        correction.corrected_scheduler(saved / "model", *options, 3, 1.5)
    ddpm = (quantized, SAMPLING.by("ddpm"))
    with pytest.raises(ArgumentError, match="is for 4 steps of DDIM and guidance 1.5, not for 4 of DDPM and 1.5; "):
        correction.corrected_scheduler(saved / "model", *ddpm, STEPS, 1.5)
    with pytest.raises(ArgumentError, match="not for 4 of DDIM and 2; "):
        correction.corrected_scheduler(saved / "model", *options, STEPS, 2.0)
    with pytest.raises(ArgumentError, match="lacks ptqd.safetensors, its noise correction; quantize again"):
        correction.corrected_scheduler(tmp_path, *options, STEPS, 1.5)
    plain = dataclasses.replace(quantized, recipe=Recipe())
    assert correction.corrected_scheduler(saved / "model", plain, SAMPLING, 3, 1.5) is None


def test_models_that_are_not_drawn_by_class_have_none(saved, tmp_path):
    model = dataclasses.replace(load_model(str(saved / "float")), sampling=None)
    recipe = Recipe(noise_correction=Asked(images=12))
    flow = dataclasses.replace(load_model(str(saved / "float")), sampling=FLOW.sampling)
    with pytest.raises(ArgumentError, match=r"corrects the noise .*, but float predicts velocity; leave that out"):
        correction.check_correction(flow, recipe)
    with pytest.raises(ArgumentError, match=r"corrects the noise \(noise_correction.images 12\), but float is not"):
        quantize(model, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
