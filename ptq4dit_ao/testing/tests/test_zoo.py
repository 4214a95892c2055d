"""Every family of the zoo is what the other tests take it for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ptq4dit_ao.capture.signature import flatten_call
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.testing.zoo import FAMILIES, Family, iter_families
from ptq4dit_ao.testing.zoo.family import family

ALL = list(iter_families())
MOST_PARAMETERS = 1_000_000


def tensors(inputs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


@pytest.fixture(params=ALL, ids=lambda f: f.name)
def one(request) -> Family:
    return request.param


def test_families_are_sorted_and_complete():
    assert sorted(FAMILIES) == sorted(f.name for f in ALL) and len(ALL) >= 60
    assert [(f.group, f.name) for f in ALL] == sorted((f.group, f.name) for f in ALL)


def test_a_family_has_a_name_and_a_group(one):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", one.name) and FAMILIES[one.name] is one
    assert one.group in ("image", "video", "audio")
    assert one.note == one.note.strip() and "\n" not in one.note and not one.note.endswith(".")


def test_names_are_taken_once():
    with pytest.raises(ArgumentError, match="there is a family 'dit' already; register this one under another name"):
        family("dit", "image", lambda batch, g: {})(lambda: nn.Linear(1, 1))


# Inputs


def test_inputs_are_equal_for_equal_seeds(one):
    first, second, other = (tensors(one.inputs(2, seed=seed)) for seed in (1, 1, 2))
    assert len(first) == len(second) and all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, other))
    assert not torch.equal(first[0], other[0])


def test_floating_inputs_take_the_dtype(one):
    for dtype in (torch.float32, torch.bfloat16):
        found = {x.dtype for x in tensors(one.inputs(2, dtype=dtype)) if x.is_floating_point()}
        assert found == {dtype}


def carriers(family: Family, flatten: Any) -> Iterator[tuple[str, bool]]:
    """Names of the tensors with a first axis of 2 or 3 at that batch, and whether it follows the batch."""
    two, three, five = (flatten(family.inputs(batch)) for batch in (2, 3, 5))
    assert list(two) == list(three) == list(five)
    for name in two:
        sizes = [x[name].shape[:1] for x in (two, three, five)]
        if sizes[0] == (2,) or sizes[1] == (3,):
            yield name, sizes == [(2,), (3,), (5,)]


# Models


@pytest.fixture(params=ALL, ids=lambda f: f.name)
def built(request) -> tuple[Family, nn.Module]:
    return request.param, request.param.model()


def test_a_model_is_tiny_random_and_takes_the_batch_in_front(built):
    family, model = built
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < MOST_PARAMETERS
    zero = [name for name, p in model.named_parameters() if not p.any() or not p.isfinite().all()]
    assert not zero
    names = list(flatten_call(model, family.inputs(2))[1])
    if len(flatten_call(model, family.inputs(3))[1]) > len(names):  # a list with a tensor for each sample
        assert not family.dynamic_batch
        return
    found = dict(carriers(family, lambda inputs: flatten_call(model, inputs)[1]))
    assert found.get(names[0]), "the first axis of the first tensor is the batch"
    assert [name for name, follows in found.items() if not follows] == []


def test_a_model_is_equal_for_equal_seeds(one):
    before = torch.random.get_rng_state()
    first, second, other = (one.model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_model_of_another_dtype():
    wide = FAMILIES["dit"].model(dtype=torch.float64)
    narrow = FAMILIES["dit"].model()
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert all(map(torch.equal, wide.parameters(), (p.double() for p in narrow.parameters())))
