"""In-place operations on fresh tensors are written out, and no others."""

from __future__ import annotations

import pytest
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


class Rotary(nn.Module):
    """Rotary embedding as Wan computes it, filling every second channel of an empty tensor."""

    def __init__(self, how: str = "all") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "transposed":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        out = torch.empty_like(x)
        if self.how == "half":
            out.zero_()
        first = (x[..., 0::2].double() if self.how == "cast" else x[..., 0::2]) * 2
        out[..., 0::2] = first
        if self.how == "source":
            first.neg_()
        if self.how == "between":
            x = x + out.nan_to_num().clamp(0, 0)
        if self.how != "half":
            out[..., 1::2] = first if self.how == "source" else x[..., 0::2] - x[..., 1::2]
        return out + x


@pytest.mark.parametrize("how", ["all", "cast"])
def test_a_tensor_that_is_filled_by_channels_is_stacked(how):
    graph = export_transformer(Rotary(how).eval(), (torch.randn(2, 3, 8),))
    targets = [node.target for node in graph.graph.nodes]
    assert aten.stack.default in targets and aten.copy_.default not in targets and not writes_in_place(graph)
    assert aten.empty_like.default not in targets
    x = torch.randn(4, 5, 8)
    assert torch.equal(graph(x), Rotary(how)(x))


@pytest.mark.parametrize("how", ["half", "between", "source", "transposed"])
def test_a_tensor_that_is_filled_in_another_way_stays(how):
    graph = export_transformer(Rotary(how).eval(), (torch.randn(2, 3, 8),), check=False)
    assert aten.stack.default not in [node.target for node in graph.graph.nodes]
    assert writes_in_place(graph)
    x = torch.randn(4, 5, 8)
    assert how == "between" or torch.equal(graph(x), Rotary(how)(x))
