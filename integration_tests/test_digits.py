"""Main job on the shipped model, from the recipe to samples on integer kernels."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import torch

from ptq4dit_ao import load_quantized, load_reference_classifier, load_reference_dit
from ptq4dit_ao.calibration import as_denoiser, sample
from ptq4dit_ao.cli.main import main
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.recipe import Calibration, Evaluation, load_recipe
from ptq4dit_ao.reference import FASHION, FLOW, SAMPLING

FBGEMM = ("--backend", "fbgemm")


@pytest.fixture(scope="module", params=["digits_w8a8", "digits_w4a8"])
def artifact(request, tmp_path_factory):
    """A quantized digits DiT, calibrated on less than the shipped recipe asks for."""
    folder = tmp_path_factory.mktemp(request.param)
    small = load_recipe(request.param).model_copy(
        update={
            "calibration": Calibration(timesteps=8, samples=4, steps=16),
            "evaluation": Evaluation(timesteps=8, samples=4),
        }
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(small.to_yaml())
    assert main(["quantize", str(recipe), "--output", str(folder / "model")]) == 0
    return folder / "model"


def test_the_report_says_what_happened(artifact):
    report = json.loads((artifact / "report.json").read_text())
    folded = [site["name"] for site in report["sites"] if site["status"] == "folded"]
    kept = [site for site in report["sites"] if site["status"] == "refused" and "left as it is" in site["reason"]]
    assert len(folded) + len(kept) == 18 and len(folded) > 9  # QKV, attention output and FC1 in six blocks
    assert all(site["reason"] for site in report["sites"] if site["status"] == "refused")
    assert sum(layer["status"] == "integer" for layer in report["layers"]) == 42
    wide = report["recipe"]["weights"]["bits"] == 8
    assert report["evaluation"]["sqnr_db"] > (34 if wide else 25)
    assert report["size"]["quantized_layers_ratio"] < (0.30 if wide else 0.18)
    page = (artifact / "report.html").read_text()
    HTMLParser().feed(page)
    assert "transformer_blocks.5.attn1" in page.replace("<wbr>", "")


def test_integer_kernels_compute_what_the_simulation_says(artifact):
    model = load_quantized(artifact)
    lowered = model.lower("fbgemm")
    assert lowered.proof.integer_gemms == lowered.proof.promised == 42
    g = torch.Generator().manual_seed(0)
    inputs = (torch.randn(5, 1, 8, 8, generator=g), torch.randint(1000, (5,), generator=g), torch.arange(5))
    # A value that falls on a rounding boundary may land one step aside; nothing more may differ.
    assert sqnr_db(model.lower("reference")(*inputs), lowered(*inputs)) > 45


def test_sampling_and_inspecting_the_artifact(artifact, tmp_path, capsys):
    png = tmp_path / "grid.png"
    assert main(["sample", str(artifact), *FBGEMM, "--steps", "4", "--per-class", "2", "--output", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(artifact), *FBGEMM]) == 0
    assert "42/42 quantized linears on integer GEMMs" in capsys.readouterr().out


def test_the_float_model_draws_digits():
    labels = torch.arange(10).repeat_interleave(10)
    images = sample(as_denoiser(load_reference_dit()), SAMPLING, labels, generator=torch.Generator().manual_seed(7))
    correct = load_reference_classifier()(images).argmax(1) == labels
    assert correct.float().mean() >= 0.95 - 0.04  # 100 samples; the slow test draws more
    assert correct.view(10, 10).float().mean(1).min() >= 0.6


@pytest.mark.slow
def test_a_thousand_samples_are_legible():
    labels = torch.arange(10).repeat_interleave(100)
    images = sample(as_denoiser(load_reference_dit()), SAMPLING, labels, generator=torch.Generator().manual_seed(1))
    assert (load_reference_classifier()(images).argmax(1) == labels).float().mean() >= 0.95


def test_the_other_float_model_draws_clothes():
    labels = torch.arange(10).repeat(5)
    generator = torch.Generator().manual_seed(7)
    images = sample(as_denoiser(load_reference_dit("fashion")), FASHION.sampling, labels, steps=10, generator=generator)
    judged = load_reference_classifier("fashion")(images).argmax(1)
    assert (judged == labels).float().mean() >= 0.75  # of held-out photographs the judge knows 90 %


def test_the_flow_model_draws_clothes():
    labels, generator = torch.arange(10).repeat(5), torch.Generator().manual_seed(7)
    denoiser = as_denoiser(load_reference_dit("flow"), FLOW.sampling)
    images = sample(denoiser, FLOW.sampling, labels, steps=10, generator=generator)
    assert (load_reference_classifier("flow")(images).argmax(1) == labels).float().mean() >= 0.75


@pytest.mark.slow
def test_the_flow_model_is_quantized_and_evaluated(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    few = "{samples: 3, timesteps: 3}"
    recipe.write_text(f"version: 1\nextends: minmax\nmodel: flow\ncalibration: {few}\nevaluation: {few}\n")
    assert main(["quantize", str(recipe), "--output", str(tmp_path / "w8a8")]) == 0
    sampled = ["--samples", "10", "--steps", "4"]
    assert main(["evaluate", str(tmp_path / "w8a8"), *sampled, "--json", str(tmp_path / "figures.json")]) == 0
    row = json.loads((tmp_path / "figures.json").read_text())["rows"][1]
    assert row["eps"]["pooled"]["value"] > 30 and row["images"]["psnr_db"]["value"] > 30
    assert max(t for t, _ in row["eps"]["per_timestep"]) <= 1
    table = ["--model", "flow", "--methods", "minmax", "--bits", "w8a8", "--steps", "4", "--samples", "10"]
    assert main(["table", *table, "--calibration-images", "3", "--output", str(tmp_path / "table")]) == 0
    assert "--sampler flow" in (tmp_path / "table" / "table.md").read_text()
