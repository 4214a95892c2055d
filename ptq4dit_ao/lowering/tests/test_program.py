"""Programs: which batch they take, and which inputs they would misread."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.lowering.program import Input, as_program, check_inputs, inputs_of
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

DIT = [Input(torch.float32, ("n", 4, 8, 8)), Input(torch.int64, ("n",)), Input(torch.int64, ("n",))]


def batch_of(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(rows, 4, 8, 8), torch.arange(rows), torch.arange(rows)


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_that_a_program_takes():
    for rows in (1, 5):
        check_inputs(batch_of(rows), DIT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, y: (x, t), "got 2 inputs; this program takes 3"),
        (lambda x, t, y: (x.double(), t, y), r"input 0 is torch.float64 .* for torch.float32 \('n', 4, 8, 8\)"),
        (lambda x, t, y: (x[..., :4], t, y), r"input 0 is torch.float32 \(3, 4, 8, 4\); .* \(3, 4, 8, 8\)"),
        (lambda x, t, y: (x[..., 0], t, y), r"input 0 is torch.float32 \(3, 4, 8\)"),
        (lambda x, t, y: (x, t.int(), y), "input 1 is torch.int32"),
        (lambda x, t, y: (x, t, y[:2]), r"input 2 is torch.int64 \(2,\); .* for torch.int64 \(3,\)"),
    ],
)
def test_inputs_that_a_program_would_misread(change, message):
    with pytest.raises(ArgumentError, match=message):
        check_inputs(change(*batch_of(3)), DIT)


# -- the batch -------------------------------------------------------------------------------------------------------


def shapes(graph, inputs) -> list[tuple[int | str, ...]]:
    return [taken.shape for taken in inputs_of(as_program(graph, inputs))]


def test_the_batch_is_free_also_in_a_graph_that_says_nothing_of_its_shapes(quantized):
    x, t, y = shapes(bare(quantized()), batch_of(4))
    assert isinstance(x[0], str) and x[1:] == (4, 8, 8) and t == y == x[:1]


def test_every_size_is_free_that_the_graph_says_is_free(quantized):
    x, t, y = shapes(quantized(), batch_of(4))
    assert [type(size) for size in x] == [str, int, str, str] and t == y == x[:1]


def test_a_batch_that_the_graph_fixes_stays_fixed(tiny_dit, convert, tiny_samples):
    exported = export_transformer(tiny_dit, tiny_samples[0], dynamic=())
    converted = bare(convert(exported, PTQ4DiTQuantizer(), tiny_samples))
    assert shapes(converted, tiny_samples[0]) == [(4, 4, 8, 8), (4,), (4,)]


def bare(graph: GraphModule) -> GraphModule:
    """As it is when it has been loaded: without metadata."""
    graph = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in graph.graph.nodes:
        node.meta.clear()
    return graph
