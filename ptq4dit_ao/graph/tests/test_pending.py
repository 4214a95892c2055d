"""Factors that wait until somebody reads their tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from ptq4dit_ao.graph.pending import drop_unread, factors_wait, pending, scale_later, tensor_at

ROWS, COLUMNS = torch.rand(16, 1, dtype=torch.float64) + 0.5, torch.rand(1, 64, dtype=torch.float64) + 0.5


@pytest.fixture
def model() -> GraphModule:
    return symbolic_trace(nn.Sequential(nn.Linear(64, 16)))


def test_a_tensor_is_read_with_its_factors(model):
    raw = model.get_parameter("0.weight").detach().clone()
    with factors_wait(model, may_stay=lambda path: True):
        assert scale_later(model, ["0.weight"], ROWS) and scale_later(model, ["0.weight"], COLUMNS)
    assert torch.equal(tensor_at(model, "0.weight"), (raw.double() * ROWS * COLUMNS).float())
    assert torch.equal(model.get_parameter("0.weight"), raw)


def test_what_may_not_stay_is_multiplied_out(model):
    raw = model.get_parameter("0.weight").detach().clone()
    with factors_wait(model, may_stay=lambda path: False):
        assert scale_later(model, ["0.weight"], ROWS)
    assert torch.equal(model.get_parameter("0.weight"), (raw.double() * ROWS).float())
    assert pending(model) == {}


def test_factors_wait_only_where_that_was_asked_for_and_saves_memory(model):
    assert not scale_later(model, ["0.weight"], ROWS)
    with factors_wait(model, may_stay=lambda path: True):
        assert not scale_later(model, ["0.bias"], torch.ones(16))
        assert not scale_later(model, ["0.weight"], torch.ones(16, 64))
    assert pending(model) == {}


def test_factors_are_dropped_when_nothing_reads_their_tensor(model):
    graph = model.graph
    first = graph.find_nodes(op="call_module")[0]
    with graph.inserting_before(first):
        one, other = graph.get_attr("0.weight"), graph.get_attr("0.weight")
        readers = [graph.call_function(torch.neg, (weight,)) for weight in (one, other)]
    with factors_wait(model, may_stay=lambda path: True):
        assert scale_later(model, ["0.weight"], ROWS)
    for reader in readers:
        drop_unread(model)
        assert pending(model).keys() == {"0.weight"}
        graph.erase_node(reader)
    drop_unread(model)
    assert pending(model) == {} and not model.meta
