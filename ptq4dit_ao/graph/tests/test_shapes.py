"""Moving id arrays against moving full-size index tensors with torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ptq4dit_ao.capture.export import export_transformer
from ptq4dit_ao.graph.shapes import (
    FIRST,
    align_groups,
    batch_axis,
    broadcast_ids,
    embed_ids,
    example_shape,
    example_size,
    hint,
    normalize_axis,
    part_sizes,
    prime_of,
    reshape_ids,
    shape_of,
    size_per_sample,
    symbolic_axes,
    take_axis,
    tensor_of,
)

many = settings(max_examples=50, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def ids_of(draw: st.DrawFn, shape: tuple[int, ...], start: int = 1) -> np.ndarray:
    """Distinct ids, on axes chosen at random; the others have length 1."""
    short = tuple(size if draw(st.booleans()) else 1 for size in shape)
    return np.arange(start, start + math.prod(short), dtype=np.int64).reshape(short)


@st.composite
def refactored(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape of as many elements."""
    rest, target = math.prod(shape), []
    while rest > 1:
        size = draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
        target.append(size)
        rest //= size
        assume(len(target) < 7)
    return (*target, *[1] * draw(st.integers(0, 2)))


def full(ids: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """One id per element, as a torch tensor."""
    return torch.from_numpy(np.broadcast_to(ids, shape).copy())


def assert_same_elements(ids: np.ndarray, expected: Tensor) -> None:
    assert ids.ndim == expected.ndim
    assert all(i in (1, size) for i, size in zip(ids.shape, expected.shape, strict=True))
    np.testing.assert_array_equal(np.broadcast_to(ids, expected.shape), expected.numpy())


# Reshape


@many
@given(st.data(), shapes)
def test_reshaped_ids_are_those_of_the_reshaped_tensor(data, source):
    ids, target = data.draw(ids_of(source)), data.draw(refactored(source))
    moved = reshape_ids(ids, source, target)
    assert_same_elements(moved, full(ids, source).reshape(target))
    assert_same_elements(reshape_ids(moved, target, source), full(ids, source))


@many
@given(st.data(), shapes)
def test_aligned_groups_cover_both_shapes_with_equal_products_and_cannot_be_split(data, source):
    target = data.draw(refactored(source))
    groups = align_groups(source, target)
    for side, shape in enumerate((source, target)):
        covered = [axis for group in groups for axis in range(*group[side])]
        assert covered == list(range(len(shape)))
    for (i0, i1), (j0, j1) in groups:
        assert math.prod(source[i0:i1]) == math.prod(target[j0:j1])
        left = {math.prod(source[i0:i]) for i in range(i0 + 1, i1)} - {1}
        right = {math.prod(target[j0:j]) for j in range(j0 + 1, j1)} - {1}
        assert not left & right


def test_uniform_axes_stay_short_through_a_reshape():
    ids = np.arange(12, dtype=np.int64).reshape(1, 1, 12)
    assert reshape_ids(ids, (2, 5, 12), (10, 3, 4)).shape == (1, 3, 4)
    assert reshape_ids(ids, (2, 5, 12), (2, 5, 12, 1, 1)).shape == (1, 1, 12, 1, 1)


def test_heads_merged_into_the_batch_take_the_whole_group():
    ids = np.arange(6, dtype=np.int64).reshape(1, 3, 2)
    assert reshape_ids(ids, (2, 3, 2), (6, 2)).tolist() == [[0, 1], [2, 3], [4, 5]] * 2


# Slices


@many
@given(st.data(), shapes)
def test_embedding_lays_the_part_over_its_window(data, shape):
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis] - 1))
    length = data.draw(st.integers(1, shape[axis] - start))
    part_shape = (*shape[:axis], length, *shape[axis + 1 :])
    part = data.draw(ids_of(part_shape, start=1000))
    assume(part.shape[axis] == length)
    whole = data.draw(ids_of(shape))
    whole = np.broadcast_to(whole, (*whole.shape[:axis], shape[axis], *whole.shape[axis + 1 :]))
    expected = full(whole, shape)
    expected.narrow(axis, start, length).copy_(full(part, part_shape))
    before = whole.copy()
    assert_same_elements(embed_ids(part, axis, start, whole), expected)
    np.testing.assert_array_equal(whole, before)


@many
@given(st.data(), shapes)
def test_taking_a_slice_is_narrowing(data, shape):
    ids = data.draw(ids_of(shape))
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis] - 1))
    length = data.draw(st.integers(1, shape[axis] - start))
    assert_same_elements(take_axis(ids, axis, start, length), full(ids, shape).narrow(axis, start, length))


@many
@given(st.integers(1, 40), st.integers(1, 12))
def test_part_sizes_are_those_of_torch_chunk(total, chunks):
    assert part_sizes(total, chunks) == [len(part) for part in torch.arange(total).chunk(chunks)]


@many
@given(st.data(), shapes, st.integers(0, 2))
def test_broadcasting_prepends_axes(data, shape, extra):
    ids = data.draw(ids_of(shape))
    expected = full(ids, shape).expand(*[1] * extra, *shape)
    assert_same_elements(broadcast_ids(ids, len(shape) + extra), expected)


@pytest.mark.parametrize(("axis", "expected"), [(0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_axes_count_from_either_end(axis, expected):
    assert normalize_axis(axis, 3) == expected


# Shapes of exported nodes


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return left * x.shape[0] + right


@pytest.fixture(scope="module")
def nodes():
    graph_module = export_transformer(Halves().eval(), (torch.randn(3, 4),))
    return {node.name: node for node in graph_module.graph.nodes}


def test_no_two_symbols_share_a_prime():
    """``s0`` and ``s17``, ``s1`` and ``s11``, ``s5`` and ``s7`` once did."""
    primes = [prime_of(f"s{i}") for i in range(100)]
    assert len(set(primes)) == 100
    assert all(prime % divisor for prime in primes for divisor in range(2, math.isqrt(prime) + 1))
    assert prime_of("s17") == primes[17]  # however often it is asked for


def test_symbolic_sizes_are_stood_for_by_a_prime(nodes):
    batch = hint(tensor_of(nodes["x"]).shape[0])
    assert batch >= FIRST
    assert shape_of(nodes["x"]) == (batch, 4)
    assert symbolic_axes(nodes["x"]) == [0]
    size = next(node for node in nodes.values() if node.target is torch.ops.aten.sym_size.int)
    assert hint(size) == batch
    assert hint(7) == 7
    assert size_per_sample(nodes["x"]) == 4


def test_a_size_made_of_a_symbolic_one_is_made_of_its_prime(nodes):
    size = tensor_of(nodes["x"]).shape[0]
    assert hint(3 * size + 1) == 3 * hint(size) + 1


def test_sizes_at_the_example(nodes):
    assert example_shape(nodes["x"]) == (3, 4)
    size = next(node for node in nodes.values() if node.target is torch.ops.aten.sym_size.int)
    assert example_size(size) == 3
    assert example_size(7) == 7


def test_a_node_that_makes_several_tensors_is_no_tensor(nodes):
    assert tensor_of(nodes["chunk"]) is None
    with pytest.raises(AssertionError, match="chunk is not a tensor"):
        shape_of(nodes["chunk"])


# Where the samples lie


class TokensFirst(nn.Module):
    """(N, 5, 4), (N,), (5, 4) -> (N, 5, 4), by tensors of (5, N, 4), (5 * N, 4), (N, 2, 5, 2), (5, 4)."""

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        tokens = x.transpose(0, 1).relu()
        heads = x.unflatten(2, (2, 2)).transpose(1, 2).neg()
        shared = ids.sin() * torch.arange(4).exp()
        merged = tokens.flatten(0, 1).cos()
        features = x.permute(1, 2, 0).tanh()
        last = (features.permute(2, 0, 1) + t.abs()[:, None, None]).sigmoid()
        return last + merged.unflatten(0, tokens.shape[:2]).transpose(0, 1) + shared + heads.sum((1, 3))[..., None]


AXES = {"x": 0, "t": None, "ids": None, "relu": 1, "neg": 0, "cos": 0, "tanh": None, "sigmoid": 0, "sin": None}
"""(N,) and (4, 5, N) have their samples where channels are."""


def tokens_first(*, dynamic: bool) -> dict[str, torch.fx.Node]:
    inputs = {"x": torch.randn(3, 5, 4), "t": torch.randn(3), "ids": torch.randn(5, 4)}
    graph_module = export_transformer(TokensFirst().eval(), inputs, dynamic=("batch",) if dynamic else ())
    return {node.name: node for node in graph_module.graph.nodes}


def test_the_batch_axis_is_the_one_that_is_made_of_the_batch():
    nodes = tokens_first(dynamic=True)
    assert {name: batch_axis(nodes[name]) for name in AXES} == AXES
    assert batch_axis(nodes["exp"]) is None


def test_in_a_static_graph_the_batch_is_the_first_axis():
    nodes = tokens_first(dynamic=False)
    assert {batch_axis(nodes[name]) for name in AXES} == {0}


def test_a_size_that_is_no_batch_is_no_batch_axis():
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0].nonzero().relu()

    graph_module = export_transformer(Chosen().eval(), (torch.ones(3, 4),))
    (node,) = (node for node in graph_module.graph.nodes if node.target is torch.ops.aten.relu.default)
    assert symbolic_axes(node) and batch_axis(node) is None
