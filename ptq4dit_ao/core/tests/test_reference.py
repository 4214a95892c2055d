"""The NumPy reference against scipy, small cases worked by hand, and the exactness of the fold."""

from __future__ import annotations

import ast
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ptq4dit_ao.core.tests import reference
from ptq4dit_ao.core.tests.reference import (
    BlockWeights,
    affine_qparams,
    aggregate,
    average_ranks,
    balance_vector,
    dit_block_fold,
    dit_block_forward,
    fake_quantize,
    gelu_tanh,
    layer_norm,
    multi_head_attention,
    salience,
    spearman,
    sqnr_db,
    ssc_weights,
)

few_examples = settings(max_examples=40, deadline=None, derandomize=True)


def test_it_imports_nothing_but_numpy_and_the_standard_library():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} == {"__future__", "dataclasses", "typing", "numpy"}


# Salience


def test_salience_is_the_largest_magnitude_of_each_channel():
    x = np.array([[[1.0, -5.0], [2.0, 3.0]], [[-4.0, 0.0], [0.5, 1.0]]])  # (N, T, C)
    np.testing.assert_array_equal(salience(x), [4.0, 5.0])
    np.testing.assert_array_equal(salience(x, axis=0), [5.0, 4.0])


def test_salience_of_a_float32_weight_is_float64():
    weight = np.array([[1, -2, 3], [-4, 5, -6]], dtype=np.float32)
    assert salience(weight).dtype == np.float64
    np.testing.assert_array_equal(salience(weight, axis=0), [3.0, 6.0])


# Ranks and rho


def test_average_ranks_by_hand():
    np.testing.assert_array_equal(average_ranks([10.0, 20.0, 10.0, 5.0]), [2.5, 4.0, 2.5, 1.0])
    np.testing.assert_array_equal(average_ranks([7.0, 7.0, 7.0]), [2.0, 2.0, 2.0])


@few_examples
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40))
def test_average_ranks_are_those_of_scipy(v):
    np.testing.assert_array_equal(average_ranks(v), stats.rankdata(v))


@few_examples
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=40))
def test_spearman_is_that_of_scipy_and_zero_for_a_constant(pairs):
    u, v = zip(*pairs, strict=True)
    if len(set(u)) == 1 or len(set(v)) == 1:
        assert spearman(u, v) == 0.0
        return
    assert spearman(u, v) == pytest.approx(stats.spearmanr(u, v).statistic, abs=1e-12)


def test_scipy_has_no_rho_for_a_constant_vector():
    """Why 0 is a convention of the method and not a fact of statistics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(stats.spearmanr([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).statistic)
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0.0
    assert spearman([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0


def test_spearman_sees_order_only():
    assert spearman([1.0, 2.0, 3.0], [1.0, 10.0, 1e6]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [9.0, 4.0, -1.0]) == pytest.approx(-1.0)
    assert spearman([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]) == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)


# SSC


def test_ssc_weights_by_hand():
    sw = [1.0, 2.0, 3.0]
    eta, rho = ssc_weights([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [4.0, 4.0, 4.0]], sw)
    np.testing.assert_allclose(rho, [1.0, -1.0, 0.0], atol=1e-15)
    total = np.exp(-1) + np.exp(1) + 1
    np.testing.assert_allclose(eta, [np.exp(-1) / total, np.exp(1) / total, 1 / total], rtol=1e-14)
    assert eta.sum() == pytest.approx(1.0)


def test_aggregate_by_hand():
    sx_t, sw = [[1.0, 2.0], [4.0, 1.0]], [1.0, 2.0]  # rho = 1, -1
    late = np.exp(1) / (np.exp(1) + np.exp(-1))
    np.testing.assert_allclose(aggregate(sx_t, sw, "ssc"), [1 + 3 * late, 2 - late], rtol=1e-14)
    np.testing.assert_array_equal(aggregate(sx_t, sw, "max"), [4.0, 2.0])
    np.testing.assert_array_equal(aggregate(sx_t, sw, "mean"), [2.5, 1.5])
    with pytest.raises(ValueError, match="how='median'"):
        aggregate(sx_t, sw, "median")


# CSB


def test_balance_vector_by_hand():
    np.testing.assert_allclose(balance_vector([4.0, 9.0], [1.0, 4.0]), [2.0, 1.5], rtol=1e-15)
    np.testing.assert_allclose(balance_vector([4.0, 9.0], [1.0, 4.0], alpha=1.0), [4.0, 9.0], rtol=1e-15)
    np.testing.assert_allclose(balance_vector([4.0, 9.0], [1.0, 4.0], alpha=0.0), [1.0, 0.25], rtol=1e-15)
    np.testing.assert_allclose(balance_vector([16.0], [81.0], alpha=0.75), [8 / 3], rtol=1e-15)


def test_balanced_salience_is_the_geometric_mean():
    rng = np.random.default_rng(0)
    sx, sw = 10 ** rng.uniform(-3, 3, 50), 10 ** rng.uniform(-3, 3, 50)
    b = balance_vector(sx, sw)
    np.testing.assert_allclose(sx / b, np.sqrt(sx * sw), rtol=1e-14)
    np.testing.assert_allclose(sw * b, np.sqrt(sx * sw), rtol=1e-14)


@pytest.mark.parametrize(
    ("sx", "sw"),
    [(0.0, 4.0), (4.0, 0.0), (0.0, 0.0), (np.inf, 4.0), (4.0, np.inf), (np.nan, 4.0), (4.0, np.nan), (1e308, 5e-324)],
)
def test_a_dead_channel_keeps_its_scale(sx, sw):
    np.testing.assert_array_equal(balance_vector([sx, 4.0], [sw, 1.0]), [1.0, 2.0])


def test_balance_vector_is_clipped():
    b = balance_vector([1e6, 1e-6, 4.0, 0.0], [1.0, 1.0, 1.0, 1.0], max_scale=10.0)
    np.testing.assert_allclose(b, [10.0, 0.1, 2.0, 1.0], rtol=1e-15)


# Quantizers


def test_affine_qparams_by_hand():
    scale, zero_point = affine_qparams(-1.0, 3.0, 0, 255, symmetric=False, eps=1e-9)
    assert scale == pytest.approx(4 / 255)
    assert zero_point == 64  # 63.75


def test_affine_range_is_extended_to_zero():
    scale, zero_point = affine_qparams([1.0, -3.0], [3.0, -1.0], -128, 127, symmetric=False, eps=1e-9)
    np.testing.assert_allclose(scale, [3 / 255, 3 / 255], rtol=1e-15)
    np.testing.assert_array_equal(zero_point, [-128, 127])


def test_affine_zero_point_rounds_a_tie_to_even():
    _, zero_point = affine_qparams([-0.5, -1.5, -2.5], [14.5, 13.5, 12.5], 0, 15, symmetric=False, eps=1e-9)
    np.testing.assert_array_equal(zero_point, [0, 2, 2])


def test_symmetric_qparams_by_hand():
    scale, zero_point = affine_qparams([-1.0, -6.0], [3.0, 2.0], -8, 7, symmetric=True, eps=1e-9)
    np.testing.assert_allclose(scale, [3 / 7.5, 6 / 7.5], rtol=1e-15)
    np.testing.assert_array_equal(zero_point, [0, 0])
    scale, _ = affine_qparams(-1.0, 3.0, -127, 127, symmetric=True, eps=1e-9)
    assert scale == pytest.approx(3 / 127)


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_empty_range_gets_the_smallest_scale(symmetric):
    scale, zero_point = affine_qparams(0.0, 0.0, -128, 127, symmetric=symmetric, eps=2**-12)
    assert scale == 2**-12
    assert zero_point == (0 if symmetric else -128)


def test_symmetric_needs_signed_integers():
    with pytest.raises(ValueError, match=r"signed integers, not \[0, 255\]"):
        affine_qparams(0.0, 1.0, 0, 255, symmetric=True, eps=1e-9)


def test_fake_quantize_rounds_a_tie_to_even_and_clamps():
    x = [0.25, 0.75, 1.25, -0.25, -0.75, 99.0, -99.0]
    np.testing.assert_array_equal(fake_quantize(x, 0.5, 0, -8, 7), [0.0, 1.0, 1.0, 0.0, -1.0, 3.5, -4.0])
    np.testing.assert_array_equal(fake_quantize(x, 0.5, 3, 0, 15), [0.0, 1.0, 1.0, 0.0, -1.0, 6.0, -1.5])


def test_fake_quantize_broadcasts_per_channel_parameters():
    weight = np.array([[1.0, 2.0], [1.0, 2.0]])
    np.testing.assert_array_equal(
        fake_quantize(weight, [[1.0], [4.0]], [[0], [0]], -8, 7), [[1.0, 2.0], [0.0, 0.0]]
    )  # 2 / 4 is a tie


def test_sqnr_db_by_hand():
    assert sqnr_db([3.0, 4.0], [3.0, 4.5]) == pytest.approx(20.0)
    assert sqnr_db([1.0, 0.0], [0.0, 0.0]) == pytest.approx(0.0)
    assert sqnr_db([1.0, 2.0], [1.0, 2.0]) == np.inf
    assert sqnr_db([0.0, 0.0], [0.0, 0.0]) == np.inf
    assert sqnr_db([0.0], [1.0]) == -np.inf


# The block


def test_layer_norm_by_hand():
    np.testing.assert_allclose(layer_norm(np.array([[1.0, 3.0]]), eps=0.0), [[-1.0, 1.0]], rtol=1e-15)
    np.testing.assert_allclose(layer_norm(np.array([[1.0, 3.0]]), eps=3.0), [[-0.5, 0.5]], rtol=1e-15)


def test_gelu_tanh_by_hand():
    assert gelu_tanh(np.array(0.0)) == 0.0
    assert gelu_tanh(np.array(1.0)) == pytest.approx(0.5 * (1 + np.tanh(0.7978845608028654 * 1.044715)))
    assert gelu_tanh(np.array(20.0)) == pytest.approx(20.0)
    assert gelu_tanh(np.array(-20.0)) == pytest.approx(0.0, abs=1e-12)


def test_multi_head_attention_by_hand():
    """Two tokens, two heads of width 1; head 0 looks at the second token three times as much, head 1 at both."""
    q = np.array([[[np.log(3.0), 0.0], [0.0, 0.0]]])
    k = np.array([[[0.0, 5.0], [1.0, -5.0]]])
    v = np.array([[[4.0, 2.0], [8.0, 6.0]]])
    np.testing.assert_allclose(multi_head_attention(q, k, v, heads=2), [[[7.0, 4.0], [6.0, 4.0]]], rtol=1e-14)


def test_block_forward_by_hand():
    """Identity matrices and one token: the attention of a single token is its own V."""
    eye = np.eye(2)
    zero = np.zeros(2)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation = (1.0, 2.0, 3.0, 30.0, 9.0, 5.0)
    block = BlockWeights(
        adaln_weight=np.zeros((12, 2)),
        adaln_bias=np.repeat(modulation, 2),
        q_weight=eye, q_bias=zero, k_weight=eye, k_bias=zero, v_weight=eye, v_bias=zero,
        proj_weight=eye, proj_bias=zero, fc1_weight=eye, fc1_bias=zero, fc2_weight=eye, fc2_bias=zero,
    )  # fmt: skip
    x = np.array([[[-1e4, 1e4]]])  # so large that eps vanishes, and LN of x and of what follows is [-1, 1]
    normed = np.array([-1.0, 1.0])
    attention = normed * (1 + scale_msa) + shift_msa
    mlp = normed * (1 + scale_mlp) + shift_mlp  # [20, 40], where GELU is the identity
    expected = x + gate_msa * attention + gate_mlp * mlp
    np.testing.assert_allclose(dit_block_forward(block, x, np.zeros((1, 2)), heads=1), expected, rtol=1e-13)


def random_block(rng: np.random.Generator, width: int, hidden: int) -> BlockWeights:
    shapes = {"adaln": (6 * width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    values = {}
    for name in ("adaln", "q", "k", "v", "proj", "fc1", "fc2"):
        rows, columns = shapes.get(name, (width, width))
        values[f"{name}_weight"] = rng.normal(0, columns**-0.5, (rows, columns))
        values[f"{name}_bias"] = rng.normal(0, 0.5, rows)
    return BlockWeights(**values)


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(expected - found).max() / np.abs(expected).max())


@few_examples
@given(seed=st.integers(0, 2**31), heads=st.sampled_from([1, 2, 4]), head_width=st.sampled_from([1, 4, 8]))
def test_fold_is_exact_for_b_over_six_decades(seed, heads, head_width):
    rng = np.random.default_rng(seed)
    width = heads * head_width
    block = random_block(rng, width, 4 * width)
    x, c = rng.normal(size=(2, 5, width)), rng.normal(size=(2, width))
    b_qkv, b_proj, b_fc1 = 10 ** rng.uniform(-3, 3, (3, width))
    folded = dit_block_fold(block, b_qkv=b_qkv, b_proj=b_proj, b_fc1=b_fc1)
    assert relative_error(dit_block_forward(block, x, c, heads), dit_block_forward(folded, x, c, heads)) < 1e-12


FOLDED = {
    "b_qkv": {"adaln_weight", "adaln_bias", "q_weight", "k_weight", "v_weight"},
    "b_proj": {"v_weight", "v_bias", "proj_weight"},
    "b_fc1": {"adaln_weight", "adaln_bias", "fc1_weight"},
}


@pytest.mark.parametrize("site", FOLDED)
def test_one_site_alone_is_exact_and_leaves_its_neighbours_untouched(site):
    rng = np.random.default_rng(1)
    block = random_block(rng, 8, 16)
    x, c = rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 8))
    folded = dit_block_fold(block, **{site: 10 ** rng.uniform(-3, 3, 8)})
    changed = {f.name for f in fields(block) if not np.array_equal(getattr(block, f.name), getattr(folded, f.name))}
    assert changed == FOLDED[site]
    assert relative_error(dit_block_forward(block, x, c, 2), dit_block_forward(folded, x, c, 2)) < 1e-12


def test_fold_by_hand():
    """Width 1, so each matrix is one number and the modulation six."""
    one = np.ones((1, 1))
    block = BlockWeights(
        adaln_weight=np.full((6, 1), 8.0), adaln_bias=np.full(6, 3.0),
        q_weight=one, q_bias=one[0], k_weight=one, k_bias=one[0], v_weight=one, v_bias=one[0],
        proj_weight=one, proj_bias=one[0], fc1_weight=one, fc1_bias=one[0], fc2_weight=one, fc2_bias=one[0],
    )  # fmt: skip
    folded = dit_block_fold(block, b_qkv=[2.0], b_proj=[5.0], b_fc1=[4.0])
    np.testing.assert_array_equal(folded.adaln_weight[:, 0], [4.0, 4.0, 8.0, 2.0, 2.0, 8.0])
    np.testing.assert_array_equal(folded.adaln_bias, [1.5, 1.0, 3.0, 0.75, 0.0, 3.0])
    assert (folded.q_weight, folded.k_weight, folded.v_weight) == (2.0, 2.0, 0.4)
    assert (folded.q_bias, folded.k_bias, folded.v_bias) == (1.0, 1.0, 0.2)
    assert (folded.proj_weight, folded.fc1_weight, folded.fc2_weight) == (5.0, 4.0, 1.0)
    assert (folded.proj_bias, folded.fc1_bias, folded.fc2_bias) == (1.0, 1.0, 1.0)


def test_the_forward_notices_gamma_folded_like_beta():
    """``bias / b`` in place of ``(1 + bias) / b - 1``: the check that the exactness tests can fail."""
    rng = np.random.default_rng(2)
    block = random_block(rng, 8, 16)
    x, c = rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 8))
    b = 10 ** rng.uniform(-0.5, 0.5, 8)
    folded = dit_block_fold(block, b_qkv=b)
    bias = folded.adaln_bias.copy()
    bias[8:16] = block.adaln_bias[8:16] / b
    wrong = replace(folded, adaln_bias=bias)
    assert relative_error(dit_block_forward(block, x, c, 2), dit_block_forward(wrong, x, c, 2)) > 1e-2
