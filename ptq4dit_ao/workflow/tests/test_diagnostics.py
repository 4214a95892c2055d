"""What quantize says of layers: which rows it takes, what it leaves out, and that the report holds it."""

from __future__ import annotations

import json

import pytest
import torch

from ptq4dit_ao.calibration import CalibrationSamples
from ptq4dit_ao.passes import balance_result
from ptq4dit_ao.report import Diagnostics, build_report, summary
from ptq4dit_ao.workflow.diagnostics import diagnose


@pytest.fixture(scope="module")
def samples(tiny_samples) -> CalibrationSamples:
    columns = zip(*tiny_samples, strict=True)
    return CalibrationSamples(
        dict(zip(("hidden_states", "timestep", "class_labels"), map(torch.cat, columns), strict=True))
    )


@pytest.fixture(scope="module")
def diagnostics(tiny_exported, quantized, samples) -> Diagnostics:
    return diagnose(tiny_exported, quantized(weight_bits=4, rounding="gptq"), samples, rows=4)


def test_every_layer_is_measured_at_every_timestep(diagnostics, samples):
    assert len(diagnostics.layer_errors) == 22
    timesteps = sorted(samples.timesteps.unique().tolist())
    assert all(list(error.per_timestep) == timesteps for error in diagnostics.layer_errors.values())


def test_no_more_is_run_than_a_quarter_of_the_evaluation(tiny_exported, quantized, samples):
    seen: list[tuple[str, int, int]] = []
    found = diagnose(
        tiny_exported, quantized(weight_bits=8), samples, rows=4, on_progress=lambda *stage: seen.append(stage)
    )
    assert found.leave_one_out.quantized.rows == 24 // 10  # each of ten inputs costs half a run of each row
    assert seen[-1] == ("leave one out", 10, 10)


@pytest.mark.parametrize(
    ("rows", "without_one", "reason"),
    [(24, False, "switched off"), (19, True, "19 samples are too few for 10 quantized inputs; 20 would do")],
)
def test_leaving_out_may_be_left_out(tiny_exported, quantized, samples, rows, without_one, reason):
    found = diagnose(tiny_exported, quantized(weight_bits=8), samples.spread(rows), rows=4, without_one=without_one)
    assert found.leave_one_out is None and found.leave_one_out_skipped == reason
    report = build_report(quantized(weight_bits=8), title="", recipe={}, model={}, seconds={}, diagnostics=found)
    assert report["leave_one_out"] == {"skipped": reason}


def test_ranges_are_cut_by_gptq_and_whole_without(tiny_exported, quantized, samples, diagnostics):
    whole = diagnose(tiny_exported, quantized(weight_bits=8), samples, rows=4, without_one=False)
    assert list(whole.weight_clipping.values()) == pytest.approx([1] * 14)
    assert all(0.4 < ratio <= 1.0001 for ratio in diagnostics.weight_clipping.values())
    assert min(diagnostics.weight_clipping.values()) < 0.95
    clipping = balance_result(quantized(weight_bits=4, rounding="gptq")).clipping
    assert (
        len(clipping) == 14 and all(0.1 < ratio <= 1 for ratio in clipping.values()) and min(clipping.values()) < 0.97
    )
    assert set(balance_result(quantized(weight_bits=8)).clipping.values()) == {1}


def test_the_report_has_it_and_the_manifest_what_is_short_of_it(quantized, diagnostics):
    converted = quantized(weight_bits=4, rounding="gptq")
    report = build_report(converted, title="", recipe={}, model={}, seconds={}, diagnostics=diagnostics)
    json.dumps(report, allow_nan=False)
    for layer in report["layers"]:
        error = diagnostics.layer_errors[layer["node"]]
        assert [t for t, _ in layer["sqnr_db_t"]] == list(error.per_timestep)
        assert (layer["weight_clipping"] is None) == (layer["status"] == "float")
        assert layer["sqnr_db"] is None or layer["sqnr_db"] == pytest.approx(error.sqnr_db, rel=1e-5)
    inputs = report["leave_one_out"]["inputs"]
    assert [entry["gain_db"] for entry in inputs] == sorted((entry["gain_db"] for entry in inputs), reverse=True)
    assert "transformer_blocks.0.attn1.{to_q,to_k,to_v}" in [entry["name"] for entry in inputs]
    assert not any("sqnr_db_t" in layer for layer in summary(report)["layers"])
