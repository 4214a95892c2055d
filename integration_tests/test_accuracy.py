"""Gain of the recipes on the shipped digits DiT over the paper's balancing with rounding to nearest (simulated)."""

from __future__ import annotations

import functools

import pytest
import torch
from accuracy import BATCH, draw_samples, with_method

from ptq4dit_ao import export_transformer, load_recipe, load_reference_dit
from ptq4dit_ao.metrics import PairedError, paired_error
from ptq4dit_ao.workflow import apply_recipe

pytestmark = pytest.mark.slow
RECIPE = load_recipe("digits_w8a8")
STEPS = 200
"""Of methods that learn."""


@functools.cache
def error(bits: str, method: str) -> PairedError:
    model = load_reference_dit()
    calibration = draw_samples(model, RECIPE, count=RECIPE.calibration.samples, seed=0)
    evaluation = list(draw_samples(model, RECIPE, count=RECIPE.evaluation.samples, seed=1000).batches(BATCH))
    exported = export_transformer(model, evaluation[0])
    batches = calibration.shuffled(0).batches(BATCH)
    quantized = apply_recipe(exported, with_method(RECIPE, bits, method, STEPS), batches).graph
    with torch.no_grad():
        return paired_error(exported, quantized, evaluation)


@pytest.mark.parametrize(
    ("bits", "method", "gain_db"),
    [
        ("W8A8", "auto", 2.0),
        ("W4A8", "auto", 9.5),
        ("W6A6", "auto", 4.5),
        ("W4A4", "auto", 10.0),
        ("W4A8", "one pass", 8.5),
        ("W4A8", "distilled", 11.0),
    ],
)
def test_gain_over_csb_ssc_and_rounding_to_nearest(bits, method, gain_db):
    found, baseline = error(bits, method), error(bits, "CSB + SSC")
    assert found.sqnr_db > baseline.sqnr_db + gain_db
    assert all(db > baseline.per_timestep[t] for t, db in found.per_timestep.items())
