"""Keyword arguments to a flat, named list of tensors, and back."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ptq4dit_ao.capture.signature import CONSTANTS, CallSignature, TensorName, flatten_call, tensors_like
from ptq4dit_ao.errors import ArgumentError


class Takes(nn.Module):
    def forward(self, x, t=None, ids=None, sizes=None, scale=1.0, return_dict=True):
        return x


def tensors(count: int) -> list[Tensor]:
    return [torch.full((2,), float(i)) for i in range(count)]


def test_tensors_come_in_the_order_of_forward_whatever_the_order_of_the_call():
    x, t, ids = tensors(3)
    signature, found = flatten_call(Takes(), {"ids": ids, "scale": 2.0, "x": x, "t": t})
    assert list(found) == signature.names == ["x", "t", "ids"]
    assert found["x"] is x and found["t"] is t and found["ids"] is ids
    assert list(signature.arguments) == ["x", "t", "ids", "scale"]


def test_tensors_in_containers_are_named_after_their_place():
    a, b, c, d, e = tensors(5)
    call = {"x": [a, (b, None)], "sizes": {"height": c, "crops": [d, {"left": e}]}}
    signature, found = flatten_call(Takes(), call)
    assert list(found) == ["x_0", "x_1_0", "sizes_height", "sizes_crops_0", "sizes_crops_1_left"]
    assert list(found.values()) == [a, b, c, d, e]
    assert signature.arguments == {
        "x": [TensorName("x_0"), (TensorName("x_1_0"), None)],
        "sizes": {
            "height": TensorName("sizes_height"),
            "crops": [TensorName("sizes_crops_0"), {"left": TensorName("sizes_crops_1_left")}],
        },
    }


@pytest.mark.parametrize("constant", [True, 3, 0.5, "text", None])
def test_constants_are_kept(constant):
    assert isinstance(constant, CONSTANTS)
    signature, found = flatten_call(Takes(), {"x": torch.zeros(1), "scale": constant, "ids": [constant, {}, []]})
    assert signature.arguments["scale"] == constant and type(signature.arguments["scale"]) is type(constant)
    assert signature.arguments["ids"] == [constant, {}, []]
    assert list(found) == ["x"]


def test_what_is_left_out_stays_left_out():
    signature, _ = flatten_call(Takes(), {"x": torch.zeros(1)})
    assert list(signature.arguments) == ["x"]


def test_the_caller_keeps_his_containers():
    parts = [torch.zeros(1), None]
    signature, _ = flatten_call(Takes(), {"x": parts})
    assert torch.is_tensor(parts[0]) and signature.arguments["x"] is not parts


# Back again


def test_binding_puts_other_tensors_in_the_same_places():
    a, b, c = tensors(3)
    signature, _ = flatten_call(Takes(), {"sizes": {"h": a, "w": 5}, "x": (b, [c]), "scale": None})
    p, q, r = tensors(3)
    assert signature.names == ["x_0", "x_1_0", "sizes_h"]
    assert signature.bind([p, q, r]) == {"x": (p, [q]), "sizes": {"h": r, "w": 5}, "scale": None}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_binding_takes_all_tensors_and_no_more(count):
    signature, _ = flatten_call(Takes(), {"x": torch.zeros(1), "t": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is (shorter|longer) than argument 1"):
        signature.bind(tensors(count))


def same(one: object, other: object) -> bool:
    """Equal containers of the same types, with the same tensor objects."""
    if isinstance(one, Tensor):
        return one is other
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


leaves = st.one_of(st.builds(lambda: torch.zeros(1)), st.none(), st.booleans(), st.integers(), st.just("a"))
keys = st.sampled_from(["left", "right", "height"])
values = st.recursive(
    leaves,
    lambda part: st.one_of(
        st.lists(part, max_size=3), st.lists(part, max_size=3).map(tuple), st.dictionaries(keys, part, max_size=3)
    ),
    max_leaves=8,
)


calls = st.dictionaries(st.sampled_from(["x", "t", "ids", "sizes", "scale"]), values, max_size=5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(calls)
def test_binding_the_tensors_gives_the_call_back(call):
    signature, found = flatten_call(Takes(), call)
    assert list(found) == signature.names
    bound = signature.bind(list(found.values()))
    assert call.keys() == bound.keys() and all(same(call[name], bound[name]) for name in call)
    again, _ = flatten_call(Takes(), bound)
    assert again == signature


def test_a_mapping_of_another_kind_becomes_a_dict():
    signature, _ = flatten_call(Takes(), {"sizes": OrderedDict(h=torch.zeros(1))})
    assert type(signature.arguments["sizes"]) is dict


class Size(NamedTuple):
    height: object
    width: object


def test_special_tuples():
    x = torch.zeros(1)
    signature, found = flatten_call(Takes(), {"x": torch.Size([2, 3]), "sizes": Size(x, 4)})
    assert signature.names == list(found) == ["sizes_0"]
    bound = signature.bind([x])
    assert bound == {"x": (2, 3), "sizes": Size(x, 4)} and type(bound["x"]) is tuple
    assert type(bound["sizes"]) is Size


def test_tensors_whose_places_spell_the_same_name_stay_apart():
    a, b, c = tensors(3)
    call = {"sizes": {"h": [a], "h_0": b, 1: c, "1": a}}
    signature, found = flatten_call(Takes(), call)
    assert list(found) == signature.names == ["sizes_h_0", "sizes_h_0_", "sizes_1", "sizes_1_"]
    assert same(signature.bind(list(found.values())), call)


def test_signatures_are_compared_by_structure():
    x = {"x": TensorName("x")}
    assert CallSignature(x) == CallSignature(dict(x)) != CallSignature({"x": TensorName("t")})


# Stored


@settings(max_examples=100, deadline=None, derandomize=True)
@given(calls)
def test_a_signature_comes_back_from_json(call):
    signature, _ = flatten_call(Takes(), call)
    again = CallSignature.from_json(json.loads(json.dumps(signature.to_json())))
    assert repr(again) == repr(signature)


@pytest.mark.parametrize("data", [None, [], {"x": {"set": []}}, {"x": {"tensor": 1}}, {"x": {"list": 1}}, {"x": {}}])
def test_json_of_something_else(data):
    with pytest.raises(ValueError, match="unknown structure .* in the signature"):
        CallSignature.from_json(data)


# Another call of the same kind


def test_the_tensors_of_another_call_come_in_the_captured_order():
    captured, _ = flatten_call(Takes(), {"sizes": {"h": torch.zeros(1)}, "x": torch.zeros(1), "t": [torch.zeros(1)]})
    x, t, h = tensors(3)
    assert same(tensors_like(captured, Takes(), {"t": (t,), "sizes": {"h": h}, "x": x}), [x, t, h])


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {"ids": None, "scale": 1.0}),  # the defaults
        ({"ids": {}, "sizes": []}, {"ids": None}),
        ({"sizes": {"height": None, "width": None}}, {}),
        ({"sizes": {"height": 4, "crop": None}}, {"sizes": {"height": 4}}),
        ({"sizes": (4, 6)}, {"sizes": [4, 6]}),
        ({"sizes": [[(1, 4, 4)]] * 3}, {"sizes": [[(1, 4, 4)]]}),  # Qwen-Image: one for each sample
    ],
)
def test_calls_that_mean_the_same(then, now):
    (x,) = tensors(1)
    for captured, given_ in ((then, now), (now, then)):
        signature, _ = flatten_call(Takes(), {"x": torch.zeros(1), **captured})
        assert same(tensors_like(signature, Takes(), {"x": x, **given_}), [x])


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"scale": 2.0}, r"argument 'scale' of Takes is 2\.0, but the graph was captured with 1\.0; call it with"),
        ({"scale": 2.0}, {}, r"'scale' of Takes is 1\.0, but the graph was captured with 2\.0"),
        ({"t": torch.zeros(1)}, {"t": None}, "'t' of Takes is None, but the graph was captured with a tensor"),
        ({"t": None}, {"t": torch.zeros(1)}, "'t' of Takes is a tensor, but the graph was captured with None"),
        ({"sizes": [4, 6]}, {"sizes": [4, 4]}, r"'sizes' of Takes is \[4, 4\], but .* with \[4, 6\]"),
        ({"sizes": [4, 4]}, {"sizes": [4]}, r"'sizes' of Takes is \[4\], but"),
        ({"sizes": [[4], [6]]}, {"sizes": [[4]]}, r"'sizes' of Takes is \[\[4\]\], but"),
        ({"sizes": {"h": 1}}, {"sizes": {"h": 1, "w": 1}}, r"'sizes' of Takes is \{'h': 1, 'w': 1\}, but"),
        (
            {"t": [torch.zeros(1)]},
            {"t": [torch.zeros(1)] * 2},
            r"'t' of Takes is \[a tensor, a tensor\], but the graph was captured with \[a tensor\]; call it",
        ),
        ({"t": torch.zeros(1)}, {"t": True}, "'t' of Takes is True, but the graph was captured with a tensor"),
        ({"t": [torch.zeros(1)]}, {"t": 3}, r"'t' of Takes is 3, but the graph was captured with \[a tensor\]"),
    ],
)
def test_calls_that_the_graph_does_not_compute(then, now, message):
    signature, _ = flatten_call(Takes(), {"x": torch.zeros(1), **then})
    with pytest.raises(ArgumentError, match=message):
        tensors_like(signature, Takes(), {"x": torch.zeros(1), **now})


@pytest.mark.parametrize(("number", "dtype"), [(7, torch.int64), (7.5, torch.float32)])
def test_a_number_stands_for_a_tensor(number, dtype):
    signature, _ = flatten_call(Takes(), {"x": torch.zeros(1), "t": torch.zeros(1)})
    _, t = tensors_like(signature, Takes(), {"x": torch.zeros(1), "t": number})
    assert t.shape == () and t.dtype is dtype and t == number


# Refusals


def test_an_argument_that_forward_does_not_take():
    with pytest.raises(ArgumentError, match=r"Takes takes no argument 'mask'; it takes 'x', 't', 'ids', 'sizes', 'sca"):
        flatten_call(Takes(), {"x": torch.zeros(1), "mask": None})


class Reference:
    pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"t": Reference()}, "argument 't' of Takes is a Reference; only tensors, numbers, strings, None and lists of"),
        ({"x": [None, {"a": {1, 2}}]}, "argument 'x_1_a' of Takes is a set; only tensors"),
        ({"scale": torch.float32}, "argument 'scale' of Takes is a dtype; only tensors"),
    ],
)
def test_a_value_that_cannot_be_captured(call, message):
    with pytest.raises(ArgumentError, match=message):
        flatten_call(Takes(), call)
