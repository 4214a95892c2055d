"""Equal tensors, equal computations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.graph.ties import merge_equal_computations, share_equal_tensors


class Blocks(nn.Module):
    """Every block embeds the timestep with a copy of the same layer."""

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.mix = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        for copy in self.embed[1:]:
            copy.load_state_dict(self.embed[0].state_dict())
        self.writes = writes

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for embed, mix in zip(self.embed, self.mix, strict=True):
            h = nn.functional.silu(embed(t[:, None].expand(-1, 32) / 1000))
            if self.writes:
                h = h.clone()[:].add_(1)  # into a view, which another reader could see
            x = x + mix(x + h[:, None])
        return x


def exported(**options: bool) -> tuple[GraphModule, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 32), torch.arange(2))
    return export_transformer(Blocks(**options).eval(), inputs), inputs


def count(graph: GraphModule, target: object) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


def test_equal_parameters_become_one_and_the_result_is_the_same():
    graph, inputs = exported()
    expected = graph(*inputs)
    assert share_equal_tensors(graph) == 2 * 32 * 32 * 4  # two copies of the weight; biases are too small to look at
    weights = {node.target for node in graph.graph.nodes if node.op == "get_attr" and node.target.endswith("weight")}
    assert weights == {"embed.0.weight", "mix.0.weight", "mix.1.weight", "mix.2.weight"}
    assert torch.equal(graph(*inputs), expected)


def test_equal_computations_are_done_once():
    graph, inputs = exported()
    expected = graph(*inputs)
    for node in graph.graph.find_nodes(op="get_attr"):
        node.target = node.target.replace("embed.1", "embed.0").replace("embed.2", "embed.0")
    before = count(graph, torch.ops.aten.silu.default)
    assert merge_equal_computations(graph) > 0
    assert (before, count(graph, torch.ops.aten.silu.default)) == (3, 1)
    assert count(graph, torch.ops.aten.linear.default) == 1 + 3
    assert torch.equal(graph(*inputs), expected)


def test_a_graph_that_writes_is_left_alone():
    graph, _ = exported(writes=True)
    assert merge_equal_computations(graph) == 0
    assert count(graph, torch.ops.aten.silu.default) == 3


def test_values_that_differ_in_type_or_at_random_are_not_equal():
    class Odd(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x.sum(-1, True) * 1 + x.sum(-1, True) * 1.0 + torch.rand_like(x) - torch.rand_like(x)

    graph = export_transformer(Odd().eval(), (torch.randn(2, 5, 32), torch.arange(2)), check=False)
    merge_equal_computations(graph)
    assert count(graph, torch.ops.aten.rand_like.default) == 2
    assert count(graph, torch.ops.aten.mul.Tensor) == 2
    assert count(graph, torch.ops.aten.sum.dim_IntList) == 1
