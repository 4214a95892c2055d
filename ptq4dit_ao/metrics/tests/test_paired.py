"""Paired errors and latency: against sums written out, and on models whose answers and speeds are known."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4dit_ao.errors import ArgumentError, CalibrationError
from ptq4dit_ao.metrics import PairedError, measure_latency, paired_error


def noisy(relative: float):
    """A model whose error is a fixed part of its answer at even timesteps, ten times that at odd ones."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x * (1 + relative * torch.where(t % 2 == 1, 10.0, 1.0)).view(-1, 1)

    return model


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    x = torch.ones(6, 3)
    return [(x[:4], torch.tensor([2, 3, 2, 8]), torch.zeros(4)), (x[4:], torch.tensor([3, 8]), torch.zeros(2))]


def test_error_is_pooled_over_batches_and_split_by_timestep():
    error = paired_error(noisy(0), noisy(0.01), iter(batches()))
    assert error.rows == 6
    assert error.per_timestep == pytest.approx({2: 40.0, 3: 20.0, 8: 40.0}, abs=1e-4)
    assert list(error.per_timestep) == [2, 3, 8]
    # Pooled energies, not averaged decibels: four rows at 1 % and two at 10 %.
    assert error.sqnr_db == pytest.approx(10 * math.log10(6 / (4 * 1e-4 + 2 * 1e-2)), abs=1e-4)


def test_equal_models_have_no_error():
    error = paired_error(noisy(0.1), noisy(0.1), batches())
    assert error.sqnr_db == math.inf and set(error.per_timestep.values()) == {math.inf}


def test_a_model_that_is_not_finite_has_no_figure():
    def broken(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where((t == 3).view(-1, 1), torch.nan, x)

    with pytest.raises(
        CalibrationError, match=r"quantized model predicts NaN or infinity for 1 of 4 rows, .* timestep 3;"
    ):
        paired_error(noisy(0), broken, batches())
    with pytest.raises(CalibrationError, match="the float model predicts NaN or infinity for 1 of 4 rows"):
        paired_error(broken, noisy(0), batches())


def test_the_timestep_may_be_another_input():
    swapped = [(x, y, t) for x, t, y in batches()]
    error = paired_error(lambda x, y, t: x, lambda x, y, t: 1.1 * x, swapped, timestep_index=2)
    assert list(error.per_timestep) == [2, 3, 8] and error.sqnr_db == pytest.approx(20, abs=1e-4)


def test_rounding_to_another_dtype_counts_as_error():
    x = torch.full((6, 3), 1 + 2**-10)
    inputs = [(x, torch.arange(6), torch.zeros(6))]
    error = paired_error(lambda x, t, y: x, lambda x, t, y: x.bfloat16(), inputs)  # bfloat16 has no 1 + 2**-10
    assert error.sqnr_db == pytest.approx(20 * math.log10(2**10 + 1), abs=1e-4)


def test_the_median_counts_every_timestep_once():
    error = paired_error(noisy(0), noisy(0.01), batches())
    assert error.median_db == pytest.approx(40, abs=1e-4)
    assert error.timesteps.tolist() == [2, 3, 2, 8, 3, 8] and error.signal.tolist() == [3.0] * 6
    assert error.noise == pytest.approx([3e-4, 3e-2, 3e-4, 3e-4, 3e-2, 3e-4], rel=1e-3)


def four_rows(timesteps: list[float], noise: list[float]) -> PairedError:
    return PairedError(timesteps=np.array(timesteps), signal=np.ones(4), noise=np.array(noise))


def test_intervals_are_those_of_rows_drawn_with_replacement():
    estimate = four_rows([0, 0, 1, 1], [0.1, 0, 0, 0]).sqnr_estimate(seed=3)
    # The noisy row is drawn not at all with probability 0.32, three times or more with 0.051, four times with 0.004.
    assert estimate.value == pytest.approx(10 * math.log10(4 / 0.1))
    assert estimate.low == pytest.approx(10 * math.log10(4 / 0.3)) and estimate.high == math.inf


def test_the_median_has_an_interval_over_the_same_rows():
    estimate = four_rows([0, 0, 1, 1], [0.1, 0.1, 0.001, 0.001]).median_estimate()
    # A timestep is not drawn at all with probability 1/16; the median is then that of the other.
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((10, 20, 30))


def test_a_timestep_has_an_interval_over_its_own_rows():
    estimates = four_rows([7, 5, 7, 5], [0.1, 0.001, 0.1, 0.1]).timestep_estimates(seed=1)
    assert list(estimates) == [5, 7]
    assert dataclasses.astuple(estimates[7]) == pytest.approx((10, 10, 10))
    assert dataclasses.astuple(estimates[5]) == pytest.approx((10 * math.log10(2 / 0.101), 10, 30))


def test_outputs_of_different_shapes_are_refused():
    with pytest.raises(ArgumentError, match=r"shapes differ: reference \(\d, 3\), got \(\d, 2\); compare a"):
        paired_error(noisy(0), lambda x, t, y: x[:, :2], batches())


# -- latency ---------------------------------------------------------------------------------------------------------


def test_every_round_runs_every_model_once():
    order, rounds = [], []

    def model(name: str):
        def run(x: Tensor) -> None:
            assert not torch.is_grad_enabled()
            order.append((name, x.item()))

        return run

    inputs = (torch.tensor(7.0),)
    models = {"a": model("a"), "b": model("b")}
    results = measure_latency(models, inputs, rounds=3, warmup=1, on_progress=lambda *at: rounds.append(at))
    assert order == [("a", 7.0), ("b", 7.0)] * 4
    assert rounds == [(done, 4) for done in (1, 2, 3, 4)]
    assert {name: result.rounds for name, result in results.items()} == {"a": 3, "b": 3}


def test_latency_is_in_milliseconds_and_warm_up_does_not_count():
    naps = iter([0.2, 0.02, 0.03, 0.01])
    (result,) = measure_latency({"a": lambda: time.sleep(next(naps))}, (), rounds=3, warmup=1).values()
    assert 20 <= result.median_ms < 190
    assert 10 <= result.low_ms <= result.median_ms <= result.high_ms
    assert result.low_ms < 190
