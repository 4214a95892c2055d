from __future__ import annotations

import collections
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph

from ptq4dit_ao.artifact.values import decode_value, encode_value
from ptq4dit_ao.errors import ArtifactError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ARGUMENTS = st.recursive(SCALARS, lambda v: st.lists(v) | st.lists(v).map(tuple), max_leaves=20)
Pair = collections.namedtuple("Pair", "a b")


def through_json(value: object, **kwargs: Any) -> Any:
    return decode_value(json.loads(json.dumps(encode_value(value), allow_nan=False)), {}, **kwargs)


@given(ARGUMENTS)
def test_scalars_and_containers_come_back_equal_and_of_the_same_type(value: object) -> None:
    # repr tells 1 from 1.0 and True, a tuple from a list, -0.0 from 0.0, and holds for nan.
    assert repr(through_json(value)) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        torch.float32,
        torch.int8,
        torch.float8_e4m3fn,
        torch.strided,
        torch.contiguous_format,
        torch.channels_last,
        torch.device("cpu"),
        torch.device("cuda", 1),
        slice(0, None, 2),
        slice(None),
        2**63 - 1,
        math.inf,
    ],
    ids=str,
)
def test_torch_constants_come_back(value: object) -> None:
    back = through_json(value)
    assert back == value
    assert type(back) is type(value)


def test_a_size_comes_back_as_a_tuple() -> None:
    assert through_json(torch.Size([1, 2])) == (1, 2)


def test_nodes_are_found_by_name_inside_containers() -> None:
    node = Graph().placeholder("x")
    assert encode_value([(node, slice(node, None, None))]) == [
        {"tuple": [{"node": "x"}, {"slice": [{"node": "x"}, None, None]}]}
    ]
    assert decode_value([{"tuple": [{"node": "x"}]}], {"x": node}) == [(node,)]


def test_an_asked_for_device_takes_the_place_of_stored_ones() -> None:
    assert through_json([torch.device("cuda")], device=torch.device("meta")) == [torch.device("meta")]


@pytest.mark.parametrize("value", [1j, {"a": 1}, torch.ones(1), Pair(1, 2), ..., range(3), object, b"x"], ids=repr)
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(ArtifactError, match=r"argument of type .* cannot be stored: .*; replace it by a number"):
        encode_value(value)


@pytest.mark.parametrize(
    "doc",
    [
        {},
        {"node": "x", "dtype": "int8"},
        {"eval": "1"},
        {"dtype": "Tensor"},
        {"dtype": ["int8"]},
        {"layout": "int8"},
        {"float": "1"},
        {"slice": [1, 2]},
        {"tuple": "ab"},
        {"device": "floppy"},
        {"tuple": [{"dtype": "nn"}]},
    ],
    ids=repr,
)
def test_damaged_values_are_refused(doc: object) -> None:
    with pytest.raises(ArtifactError, match=r"argument .* is not readable; the file is damaged or newer"):
        decode_value(doc, {})


def test_an_unknown_node_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"refers to node 'y', which does not come before it; save the model again"):
        decode_value({"node": "y"}, {})
