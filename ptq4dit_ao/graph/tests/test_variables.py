"""The vectorised union-find against one of plain Python sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptq4dit_ao.graph.variables import PINNED, ScaleVariables

many = settings(max_examples=40, deadline=None, derandomize=True)


class Classes:
    """Union-find in the plainest way: a set of members for every variable."""

    def __init__(self, size: int) -> None:
        self.members = {i: {i} for i in range(size)}

    def join(self, i: int, j: int) -> None:
        merged = self.members[i] | self.members[j]
        for k in merged:
            self.members[k] = merged

    def root(self, i: int) -> int:
        return min(self.members[i])


@st.composite
def broadcastable_ids(draw: st.DrawFn, size: int) -> tuple[np.ndarray, np.ndarray]:
    shapes = draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=4)).input_shapes
    elements = st.integers(0, size - 1)
    a, b = (draw(hnp.arrays(np.int64, shape, elements=elements)) for shape in shapes)
    return a, b


@many
@given(st.data(), st.integers(1, 20))
def test_unions_of_arrays_are_unions_of_their_elements(data, size):
    variables, classes = ScaleVariables(), Classes(size + 1)
    variables.fresh((size,))
    for _ in range(data.draw(st.integers(1, 6))):
        a, b = data.draw(broadcastable_ids(size + 1))
        pairs = [(int(i), int(j)) for i, j in np.broadcast(a, b)]
        news = any(classes.root(i) != classes.root(j) for i, j in pairs)
        for i, j in pairs:
            classes.join(i, j)
        assert variables.union(a, b) == news
        everything = np.arange(size + 1)
        np.testing.assert_array_equal(variables.find(everything), [classes.root(i) for i in everything])


@many
@given(st.data(), st.integers(1, 12))
def test_pinning_anything_pins_its_whole_class(data, size):
    variables, classes = ScaleVariables(), Classes(size + 1)
    variables.fresh((size,))
    for _ in range(data.draw(st.integers(1, 4))):
        a, b = data.draw(broadcastable_ids(size + 1))
        variables.union(a, b)
        for i, j in np.broadcast(a, b):
            classes.join(int(i), int(j))
    pinned = data.draw(hnp.arrays(np.int64, hnp.array_shapes(max_dims=2, max_side=3), elements=st.integers(0, size)))
    was_free = any(classes.root(int(i)) != PINNED for i in pinned.flat)
    for i in pinned.flat:
        classes.join(int(i), PINNED)
    assert variables.pin(pinned) == was_free
    assert not variables.is_free(pinned)
    for i in range(size + 1):
        assert variables.is_free(np.array([i])) == (classes.root(i) != PINNED)


def test_fresh_variables_are_distinct_free_and_in_order():
    variables = ScaleVariables()
    first, second = variables.fresh((2, 3)), variables.fresh((4,))
    assert first.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert second.tolist() == [7, 8, 9, 10]
    assert variables.is_free(first)
    np.testing.assert_array_equal(variables.find(second), second)


def test_fresh_variables_after_many_others_keep_the_earlier_classes():
    variables = ScaleVariables()
    first = variables.fresh((10,))
    variables.union(first, first[:1])
    variables.pin(first[:1])
    later = [variables.fresh((n,)) for n in (1, 100, 3, 1000)]
    assert not variables.is_free(first)
    ids = np.concatenate(later)
    np.testing.assert_array_equal(variables.find(ids), ids)
    assert len(np.unique(ids)) == len(ids)


def test_no_fresh_variables_is_an_empty_array():
    variables = ScaleVariables()
    assert variables.fresh((0, 3)).shape == (0, 3)
    assert variables.fresh(()).shape == ()


def test_pinned_is_not_free_and_find_keeps_the_shape():
    variables = ScaleVariables()
    ids = variables.fresh((2, 1, 3))
    assert variables.find(ids).shape == (2, 1, 3)
    assert not variables.is_free(np.zeros((2, 2), dtype=np.int64))
    assert variables.is_free(np.array([PINNED, 1]))


def test_a_long_chain_has_one_representative():
    variables = ScaleVariables()
    ids = variables.fresh((1000,))
    for i in reversed(range(999)):  # each union joins two classes at their ends
        variables.union(ids[i : i + 1], ids[i + 1 : i + 2])
    assert set(variables.find(ids).tolist()) == {1}


def test_the_smallest_variable_represents_its_class():
    variables = ScaleVariables()
    ids = variables.fresh((6,))
    variables.union(ids[3:], ids[2:3])
    assert variables.find(ids).tolist() == [1, 2, 3, 3, 3, 3]


def test_a_union_that_says_nothing_new_is_false():
    variables = ScaleVariables()
    ids = variables.fresh((3,))
    assert variables.union(ids, ids) is False
    assert variables.union(ids[:1], ids[1:2]) is True
    assert variables.union(ids[1:2], ids[:1]) is False


def test_arrays_that_do_not_broadcast_are_an_error():
    variables = ScaleVariables()
    with pytest.raises(ValueError, match="broadcast"):
        variables.union(variables.fresh((3,)), variables.fresh((2,)))
