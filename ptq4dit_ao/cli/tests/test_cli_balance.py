"""``balance``, and ``quantize`` on recorded samples: for transformers that no sampler of ours draws from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao.artifact.manifest import GRAPH, MANIFEST, VECTORS, WEIGHTS
from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.testing.zoo import FAMILIES
from ptq4dit_ao.workflow import load_model, load_quantized

FAMILY, ROWS = FAMILIES["flux"], 12
LAYER = "transformer_blocks.0.attn.to_q"
RECIPE = """
version: 1
extends: dit_w8a8
description: A tiny model
overrides: [{pattern: "*.to_v", skip: true}]
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A Flux with one block, ``model``; recorded ``samples``, of which the position ids are shared; two recipes."""
    folder = tmp_path_factory.mktemp("flux")
    built = FAMILY.build()
    model = type(built).from_config({**built.config, "num_layers": 1, "num_single_layers": 0})
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "model")
    signature, tensors = flatten_call(model, FAMILY.inputs(ROWS))
    rows = {name: tensor for name, tensor in tensors.items() if len(tensor) == ROWS}
    shared = {name: tensor for name, tensor in tensors.items() if name not in rows}
    assert list(shared) == ["img_ids", "txt_ids"]
    CalibrationSamples(rows, shared, signature).save(folder / "samples")
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "plain.yaml").write_text("version: 1\nbalance: {method: none}\n")
    return folder


def inputs(seed: int) -> tuple[Tensor, ...]:
    return tuple(flatten_call(FAMILY.build(), FAMILY.inputs(3, seed=seed))[1].values())


def output(model: nn.Module, seed: int) -> Tensor:
    with torch.no_grad():
        return model(**FAMILY.inputs(3, seed=seed), return_dict=False)[0]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("command", ["balance", "quantize"])
def test_help_tells_of_samples(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: ptq4dit-ao {command}")
    assert "--samples FILE" in out and "calibrate on recorded samples" in out


@pytest.mark.parametrize(
    ("line", "missing"), [("balance", "--model, --output"), ("balance dit_w8a8 --model m", "--output")]
)
def test_what_balance_must_be_told(run, line, missing):
    code, out, err = run(*line.split())
    assert (code, out) == (2, "") and f"the following arguments are required: {missing}\n" in err


def test_balance_leaves_a_checkpoint_and_says_what_it_did(run, workshop, tmp_path):
    folder = tmp_path / "balanced"
    code, out, err = run(
        "balance", "--model", workshop / "model", "--output", folder, "--samples", workshop / "samples"
    )
    assert (code, err) == (0, "")
    report = json.loads((folder / "balance_report.json").read_text())
    assert report["recipe"]["description"] == "Any adaLN-Zero DiT, 8-bit weights and activations"
    count = len(report["balanced"])
    assert count > 3 and f"{count} sites balanced; the output changed by " in " ".join(out.split())
    assert all(site["site"] in out for site in report["balanced"])
    assert "sites left: " in out and "gelu does not commute with a scale per channel" in out
    text = " ".join(out.split())
    assert (
        "balanced, an ordinary diffusers checkpoint; a LoRA of the original no longer fits it: fuse it before" in text
    )

    before, after = load_model(str(workshop / "model")).transformer, load_model(str(folder)).transformer
    assert error(output(after, 5), output(before, 5)) < 1e-5
    assert error(after.get_submodule(LAYER).weight, before.get_submodule(LAYER).weight) > 0.05


def test_quantize_on_recorded_samples(run, workshop, tmp_path):
    code, out, err = run(
        "quantize", workshop / "tiny.yaml", "--model", workshop / "model", "--samples", workshop / "samples",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "") and "A tiny model on model" in out and "sites: " in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {MANIFEST, GRAPH, WEIGHTS, VECTORS, "report.json", "report.html"}
    evaluation = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
    assert evaluation["on_calibration_samples"] is True and evaluation["samples"] == ROWS
    assert evaluation["sqnr_db"] > 25

    model = load_quantized(tmp_path / "out")
    lowered = model.lower("fbgemm")
    integer = [layer["name"] for layer in model.report["layers"] if layer["status"] == "integer"]
    assert LAYER in integer and not any(name.endswith("to_v") for name in integer)
    assert lowered.proof.integer_gemms == lowered.proof.promised == len(integer) > 5
    expected = output(load_model(str(workshop / "model")).transformer, 5)  # other samples, another batch
    assert 1e-4 < error(lowered(*inputs(5)), expected) < 0.1
    names = [spec.name for spec in model.inputs]
    assert names[:2] == ["hidden_states", "encoder_hidden_states"] and names[4:] == ["img_ids", "txt_ids", "guidance"]


@pytest.mark.parametrize(
    ("command", "recipe", "options", "message"),
    [
        ("balance", "plain", ["--samples", "samples"], "method is 'none'; choose one of ssc, max"),
        ("balance", "tiny", [], "model is a transformer without a pipeline to record calibration samples from"),
        ("quantize", "tiny", [], "or samples recorded with collect_from_pipeline (--samples)"),
        ("balance", "tiny", ["--samples", "tiny.yaml"], "cannot read calibration samples from "),
        ("quantize", "tiny", ["--samples", "no"], "cannot read calibration samples from "),
        (
            "quantize",
            "tiny",
            ["--samples", "model/diffusion_pytorch_model.safetensors"],
            "is not a calibration",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(run, workshop, monkeypatch, command, recipe, options, message):
    monkeypatch.chdir(workshop)
    before = sorted(workshop.rglob("*"))
    code, _, err = run(command, f"{recipe}.yaml", "--model", "model", "--output", "out", *options)
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err
    assert sorted(workshop.rglob("*")) == before


def test_a_folder_with_something_in_it_is_not_written_to(run, workshop, tmp_path):
    (tmp_path / "mine").write_text("mine")
    options = ("--output", tmp_path, "--samples", workshop / "samples")
    code, _, err = run("balance", "--model", workshop / "model", *options)
    assert code == 1 and err.startswith(f"error: {tmp_path} exists and is not an empty folder; choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
