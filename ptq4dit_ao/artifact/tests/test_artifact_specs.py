from __future__ import annotations

import collections
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from ptq4dit_ao.artifact.specs import spec_from_json, spec_to_json
from ptq4dit_ao.errors import ArtifactError

Pair = collections.namedtuple("Pair", "a b")
TREES = st.recursive(
    st.none() | st.integers(),
    lambda t: st.lists(t) | st.lists(t).map(tuple) | st.dictionaries(st.text(), t),
    max_leaves=20,
)


@given(TREES)
def test_nesting_comes_back(tree: object) -> None:
    spec = pytree.tree_structure(tree)
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


def test_form() -> None:
    spec = pytree.tree_structure((1, {"t": [2]}))
    assert spec_to_json(spec) == {"tuple": ["*", {"dict": {"t": {"list": ["*"]}}}]}


def test_dict_order_is_kept() -> None:
    values, spec = pytree.tree_flatten({"b": 1, "a": 2})
    assert list(pytree.tree_unflatten(values, spec_from_json(spec_to_json(spec)))) == ["b", "a"]


@pytest.mark.parametrize("tree", [Pair(1, 2), collections.OrderedDict(a=1), [collections.deque([1])]], ids=repr)
def test_other_containers_are_refused_by_name(tree: object) -> None:
    expected = r"type (namedtuple|Pair|OrderedDict|deque) cannot be stored; export the model so that it returns tensors"
    with pytest.raises(ArtifactError, match=expected):
        spec_to_json(pytree.tree_structure(tree))


def test_other_dict_keys_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"dict has the key 1, a int; export the model with dicts whose keys"):
        spec_to_json(pytree.tree_structure({1: 2}))


@pytest.mark.parametrize("doc", ["x", None, {}, {"set": []}, {"tuple": "*"}, {"dict": []}, {"list": [], "tuple": []}])
def test_damaged_specs_are_refused(doc: object) -> None:
    with pytest.raises(ArtifactError, match=r"nesting .* is not readable; save the model again"):
        spec_from_json(doc)
