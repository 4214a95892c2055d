"""The tensor code of the method against its NumPy reference, torchao's observers, and the errors it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver

from ptq4dit_ao import core
from ptq4dit_ao.choices import AGGREGATIONS
from ptq4dit_ao.core.tests import reference
from ptq4dit_ao.errors import ArgumentError

many = settings(max_examples=40, deadline=None, derandomize=True)

values = st.floats(-1e6, 1e6, allow_subnormal=False)
tied = st.sampled_from([0.0, 0.25, 1.0, 1.0, 2.0, 7.5])
"""Few distinct magnitudes: ties and dead channels in almost every vector."""
magnitudes = st.floats(1e-6, 1e6) | tied
odd = magnitudes | st.sampled_from([0.0, math.inf, math.nan])


def vectors(size: int, elements: st.SearchStrategy[float] = magnitudes) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, size, elements=elements, fill=st.nothing())


@st.composite
def saliences(draw: st.DrawFn, elements: st.SearchStrategy[float] = magnitudes) -> tuple[np.ndarray, np.ndarray]:
    """Of activations per timestep (T, C), and of weights (C,)."""
    timesteps, channels = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    table = hnp.arrays(np.float64, (timesteps, channels), elements=elements, fill=st.nothing())
    return draw(table), draw(vectors(channels, elements))


def same(actual: torch.Tensor, expected: np.ndarray, rtol: float = 1e-12) -> None:
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=rtol, atol=1e-14)


# Salience


@many
@given(st.data())
def test_channel_salience_is_the_reference_on_every_axis(data):
    x = data.draw(hnp.arrays(np.float64, hnp.array_shapes(max_dims=4, max_side=4), elements=values))
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    np.testing.assert_array_equal(core.channel_salience(torch.from_numpy(x), axis).numpy(), reference.salience(x, axis))


def test_channel_salience_keeps_the_dtype_and_sees_the_largest_magnitude_of_either_sign():
    x = torch.tensor([[[1.0, -5.0], [2.0, 3.0]], [[-4.0, 0.0], [0.5, 1.0]]], dtype=torch.bfloat16)
    assert core.channel_salience(x).tolist() == [4.0, 5.0]
    assert core.channel_salience(x).dtype == torch.bfloat16


# Spearman's rho and the weights of timesteps


@many
@given(saliences(tied))
def test_spearman_with_ties_is_the_reference(pair):
    table, weights = pair
    rho = core.spearman(torch.from_numpy(table), torch.from_numpy(weights))
    same(rho, np.array([reference.spearman(row, weights) for row in table]))
    assert bool((rho.abs() <= 1 + 1e-12).all())


@many
@given(saliences())
def test_ssc_weights_are_the_reference_and_sum_to_one(pair):
    table, weights = pair
    eta, rho = core.ssc_weights(torch.from_numpy(table), torch.from_numpy(weights))
    expected_eta, expected_rho = reference.ssc_weights(table, weights)
    same(eta, expected_eta)
    same(rho, expected_rho)
    assert float(eta.sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("constant", [torch.zeros(4), torch.full((4,), 0.1), torch.full((4,), 1e30)])
def test_a_constant_vector_has_no_rank_correlation(constant):
    ramp = torch.arange(4.0)
    assert core.spearman(constant, ramp) == 0.0
    assert core.spearman(ramp, constant) == 0.0


def test_a_single_channel_has_no_rank_correlation():
    eta, rho = core.ssc_weights(torch.tensor([[3.0], [1.0]]), torch.tensor([2.0]))
    assert rho.tolist() == [0.0, 0.0]
    assert eta.tolist() == [0.5, 0.5]


def test_spearman_takes_any_leading_axes_and_sees_order_only():
    ramp = torch.arange(1.0, 6.0)
    u = torch.stack([ramp, ramp.exp(), -ramp]).reshape(3, 1, 5)
    assert core.spearman(u, ramp).shape == (3, 1)
    torch.testing.assert_close(core.spearman(u, ramp).flatten(), torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))


def test_the_timestep_that_disagrees_with_the_weights_weighs_more():
    ramp = torch.arange(1.0, 6.0)
    eta, rho = core.ssc_weights(torch.stack([ramp, ramp.flip(0)]), ramp)
    assert rho.tolist() == pytest.approx([1.0, -1.0])
    assert float(eta[1] / eta[0]) == pytest.approx(math.e**2)


# Aggregation over timesteps


@many
@given(saliences(), st.sampled_from(AGGREGATIONS))
def test_aggregation_is_the_reference_and_lies_between_the_extremes(pair, how):
    table, weights = pair
    result = core.aggregate_salience(torch.from_numpy(table), torch.from_numpy(weights), how)
    same(result, reference.aggregate(table, weights, how))
    assert bool((result.numpy() <= table.max(0) * (1 + 1e-12)).all())
    assert bool((result.numpy() >= table.min(0) * (1 - 1e-12)).all())


def test_aggregations_are_those_that_work():
    assert AGGREGATIONS == ("ssc", "max", "mean")


def test_aggregation_of_float32_is_computed_in_float64():
    assert core.aggregate_salience(torch.rand(3, 4), torch.rand(4), "mean").dtype == torch.float64


def test_an_unknown_aggregation_is_refused_with_the_choices():
    with pytest.raises(ArgumentError, match=r"aggregation 'median' is unknown; choose one of ssc, max, mean"):
        core.aggregate_salience(torch.ones(2, 3), torch.ones(3), "median")  # type: ignore[arg-type]


# The balancing vector


@many
@given(st.data(), st.floats(0, 1))
def test_balance_vector_is_the_reference_with_dead_channels(data, alpha):
    size = data.draw(st.integers(1, 9))
    sx, sw = data.draw(vectors(size, odd)), data.draw(vectors(size, odd))
    b = core.balance_vector(torch.from_numpy(sx), torch.from_numpy(sw), alpha)
    same(b, reference.balance_vector(sx, sw, alpha))
    assert bool((b.isfinite() & (b > 0)).all())


@many
@given(vectors(5, st.floats(1e-6, 1e6)), vectors(5, st.floats(1e-6, 1e6)))
def test_both_sides_get_the_geometric_mean(sx, sw):
    b = core.balance_vector(torch.from_numpy(sx), torch.from_numpy(sw)).numpy()
    np.testing.assert_allclose(sx / b, np.sqrt(sx * sw), rtol=1e-12)
    np.testing.assert_allclose(sw * b, np.sqrt(sx * sw), rtol=1e-12)


@pytest.mark.parametrize("dead", [0.0, math.inf, math.nan])
def test_a_dead_channel_on_either_side_gets_one(dead):
    b = core.balance_vector(torch.tensor([dead, 4.0, 4.0]), torch.tensor([4.0, dead, 1.0]))
    assert b.tolist() == pytest.approx([1.0, 1.0, 2.0])
    assert b[:2].tolist() == [1.0, 1.0]


def test_extreme_saliences_neither_overflow_nor_underflow():
    large = torch.tensor([1e300, 1e-300], dtype=torch.float64)
    b = core.balance_vector(large, large.flip(0))
    torch.testing.assert_close(b, torch.tensor([1e300, 1e-300], dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 1 / 4.0), (1.0, 9.0)])
def test_the_ends_of_alpha_use_one_salience_only(alpha, expected):
    assert float(core.balance_vector(torch.tensor([9.0]), torch.tensor([4.0]), alpha)) == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [-0.1, 1.0001, math.nan])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ArgumentError, match=rf"alpha is {alpha}; it must lie in \[0, 1\]"):
        core.balance_vector(torch.ones(1), torch.ones(1), alpha)


@many
@given(vectors(6, st.floats(1e-9, 1e9)), st.floats(1, 1e4))
def test_clipped_balance_is_the_reference_and_says_which_channels(b, max_scale):
    clipped, mask = core.clip_balance(torch.from_numpy(b), max_scale)
    same(clipped, reference.balance_vector(b * b, np.ones(6), 0.5, max_scale))
    np.testing.assert_array_equal(mask.numpy(), clipped.numpy() != b)


def test_a_bound_of_one_switches_balancing_off():
    clipped, mask = core.clip_balance(torch.tensor([0.5, 1.0, 3.0]), 1.0)
    assert clipped.tolist() == [1.0, 1.0, 1.0]
    assert mask.tolist() == [True, False, True]


@pytest.mark.parametrize("max_scale", [0.5, -1.0, math.nan])
def test_a_bound_below_one_is_refused(max_scale):
    with pytest.raises(ArgumentError, match=f"max_scale is {max_scale}; it must be at least 1"):
        core.clip_balance(torch.ones(1), max_scale)


# Quantization parameters

RANGES = [(0, 255), (-128, 127), (-127, 127), (-8, 7), (0, 15)]


@many
@given(st.data(), st.sampled_from(RANGES), st.booleans(), st.sampled_from([2.0**-12, 1e-5]))
def test_qparams_are_the_reference(data, bounds, symmetric, eps):
    if symmetric and bounds[0] == 0:
        bounds = (-128, 127)  # the reference knows symmetric for signed integers only
    shape = data.draw(hnp.array_shapes(max_dims=2, max_side=4))
    a, b = (data.draw(hnp.arrays(np.float64, shape, elements=values)) for _ in range(2))
    low, high = np.minimum(a, b), np.maximum(a, b)
    scale, zero_point = core.affine_qparams(
        torch.from_numpy(low), torch.from_numpy(high), *bounds, symmetric=symmetric, eps=eps
    )
    expected_scale, expected_zero_point = reference.affine_qparams(low, high, *bounds, symmetric, eps)
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(scale.numpy(), expected_scale.astype(np.float32))
    np.testing.assert_array_equal(zero_point.numpy(), expected_zero_point)


@many
@given(values, values, st.sampled_from(RANGES))
def test_the_range_is_covered_and_zero_is_exact(a, b, bounds):
    low, high = torch.tensor(min(a, b), dtype=torch.float64), torch.tensor(max(a, b), dtype=torch.float64)
    scale, zero_point = core.affine_qparams(low, high, *bounds)
    ends = torch.stack([low, high, torch.zeros_like(low)])
    seen = core.fake_quantize(ends, scale.double(), zero_point, *bounds)
    # Half a step for rounding the value, half a step for rounding the zero point, and float32.
    assert float((seen - ends).abs().max()) <= float(scale) * (1 + 1e-4)
    assert seen[2] == 0.0


@pytest.mark.parametrize("bounds", [(0, 255), (-128, 127)])
def test_a_range_away_from_zero_is_extended_to_it(bounds):
    for low, high in ((2.0, 6.0), (-6.0, -2.0)):
        scale, zero_point = core.affine_qparams(torch.tensor(low), torch.tensor(high), *bounds)
        assert float(scale) == pytest.approx(6 / 255)
        assert int(zero_point) == (bounds[0] if low > 0 else bounds[1])


def test_an_empty_range_gets_the_smallest_scale():
    scale, zero_point = core.affine_qparams(torch.zeros(2), torch.tensor([0.0, 1e-9]), 0, 255, eps=1e-5)
    torch.testing.assert_close(scale, torch.full((2,), 1e-5), rtol=1e-6, atol=0)
    assert zero_point.tolist() == [0, 0]


def test_symmetric_unsigned_integers_have_their_zero_in_the_middle():
    scale, zero_point = core.affine_qparams(torch.tensor(-1.0), torch.tensor(3.0), 0, 255, symmetric=True)
    assert int(zero_point) == 128
    assert float(scale) == pytest.approx(3 / 127.5)


@pytest.mark.parametrize(("low", "high"), [(5, 5), (7, -8)])
def test_an_empty_integer_range_is_refused(low, high):
    with pytest.raises(ArgumentError, match=f"quant_min {low} must be below quant_max {high}"):
        core.affine_qparams(torch.zeros(1), torch.ones(1), low, high)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-math.inf, 1.0),
        (0.0, math.inf),
        (math.nan, 1.0),
        (0.0, math.nan),
        (math.inf, -math.inf),  # of an observer that never saw a value
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_bounds_that_are_not_finite_are_refused(low, high, symmetric):
    low, high = torch.tensor([-1.0, low]), torch.tensor([1.0, high])
    with pytest.raises(ArgumentError, match="NaN or infinite bounds; check the calibration data"):
        core.affine_qparams(low, high, -128, 127, symmetric=symmetric)


SCHEMES = {
    "affine uint8": (torch.uint8, 0, 255, False),
    "affine int8": (torch.int8, -128, 127, False),
    "affine uint4": (torch.uint8, 0, 15, False),
    "symmetric int8": (torch.int8, -128, 127, True),
    "symmetric narrow int8": (torch.int8, -127, 127, True),
    "symmetric int4": (torch.int8, -8, 7, True),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_qparams_are_those_of_torchao(scheme, axis):
    dtype, quant_min, quant_max, symmetric = scheme
    kind = ("per_tensor_" if axis is None else "per_channel_") + ("symmetric" if symmetric else "affine")
    settings_ = {
        "dtype": dtype,
        "qscheme": getattr(torch, kind),
        "quant_min": quant_min,
        "quant_max": quant_max,
        "eps": 2**-12,
    }
    observer_class, channel = (MinMaxObserver, {}) if axis is None else (PerChannelMinMaxObserver, {"ch_axis": axis})
    generator = torch.Generator().manual_seed(0)
    for magnitude in (1e-9, 1e-3, 1.0, 300.0):
        x = magnitude * (torch.randn(6, 40, generator=generator) + torch.randn(6, 1, generator=generator))
        observer = observer_class(**settings_, **channel)
        observer(x)
        expected_scale, expected_zero_point = observer.calculate_qparams()
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0)
        scale, zero_point = core.affine_qparams(rows.amin(1), rows.amax(1), quant_min, quant_max, symmetric=symmetric)
        torch.testing.assert_close(scale, expected_scale, rtol=2**-22, atol=0)  # torchao divides in float32
        assert zero_point.tolist() == expected_zero_point.tolist()


# Quantize and dequantize


@many
@given(st.data(), st.sampled_from(RANGES))
def test_fake_quantize_is_the_reference(data, bounds):
    x = data.draw(hnp.arrays(np.float64, (3, 4), elements=st.floats(-50, 50)))
    scale = data.draw(hnp.arrays(np.float64, (3, 1), elements=st.sampled_from([0.01, 0.25, 0.3, 8.0])))
    zero_point = data.draw(hnp.arrays(np.int64, (3, 1), elements=st.integers(*bounds)))
    actual = core.fake_quantize(*(torch.from_numpy(v) for v in (x, scale, zero_point)), *bounds)
    same(actual, reference.fake_quantize(x, scale, zero_point, *bounds), rtol=0)
    again = core.fake_quantize(actual, torch.from_numpy(scale), torch.from_numpy(zero_point), *bounds)
    torch.testing.assert_close(again, actual, rtol=0, atol=0)


def test_ties_round_to_even_and_the_ends_saturate():
    x = torch.tensor([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0])
    result = core.fake_quantize(x, torch.tensor(1.0), torch.tensor(0), -4, 3)
    assert result.tolist() == [-4.0, -2.0, 0.0, 0.0, 2.0, 2.0, 3.0]


def test_a_tie_is_decided_before_the_zero_point_is_added():
    x = torch.tensor([0.5, 1.5])
    assert core.fake_quantize(x, torch.tensor(1.0), torch.tensor(3), 0, 7).tolist() == [0.0, 2.0]


# Signal to noise


@many
@given(hnp.arrays(np.float64, (2, 3), elements=values), hnp.arrays(np.float64, (2, 3), elements=values))
def test_sqnr_is_the_reference(a, b):
    assert core.sqnr_db(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(reference.sqnr_db(a, b))


def test_sqnr_by_hand():
    assert core.sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)


def test_sqnr_of_equal_tensors_is_infinite_and_of_a_lost_signal_minus_infinite():
    x = torch.tensor([1.0, -2.0])
    assert core.sqnr_db(x, x.clone()) == math.inf
    assert core.sqnr_db(torch.zeros(2), torch.zeros(2)) == math.inf
    assert core.sqnr_db(torch.zeros(2), x) == -math.inf


@pytest.mark.parametrize("broken", [math.inf, -math.inf, 1e100])
def test_sqnr_of_a_broken_approximation_is_minus_infinite(broken):
    reference_ = torch.full((2,), 1e-150, dtype=torch.float64)
    approximation = torch.tensor([0.0, broken], dtype=torch.float64)
    assert core.sqnr_db(reference_, approximation) <= -3000


def test_sqnr_accumulates_16_bit_tensors_in_float64():
    x = torch.full((10_000,), 100.0, dtype=torch.float16)  # squares and sums leave float16
    assert core.sqnr_db(x, x * 1.125) == pytest.approx(20 * math.log10(8))


def test_sqnr_of_different_shapes_is_refused():
    with pytest.raises(ArgumentError, match=r"shapes differ: reference \(2,\), got \(2, 1\); give two"):
        core.sqnr_db(torch.ones(2), torch.ones(2, 1))
