"""In-place operations on fresh tensors are written out, and no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4dit_ao import export_transformer
from ptq4dit_ao.graph.names import writes_in_place

aten = torch.ops.aten


class Writes(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        fresh = x * 2
        if self.what == "fresh":
            fresh /= 3
            return fresh + x
        if self.what == "view":
            fresh[:, 0].add_(1)
            return fresh
        other = fresh.view_as(fresh)
        fresh.add_(1)
        return fresh + other


def test_a_write_into_a_fresh_tensor_returns_a_new_one():
    graph = export_transformer(Writes("fresh").eval(), (torch.randn(2, 3),))
    targets = [node.target for node in graph.graph.nodes]
    assert aten.div.Tensor in targets and aten.div_.Tensor not in targets and not writes_in_place(graph)
    x = torch.randn(4, 3)
    assert torch.equal(graph(x), Writes("fresh")(x))


def test_a_write_that_another_reader_sees_stays():
    for what in ("view", "alias"):
        graph = export_transformer(Writes(what).eval(), (torch.randn(2, 3),))
        assert writes_in_place(graph), what
        x = torch.randn(4, 3)
        assert torch.equal(graph(x), Writes(what)(x)), what
