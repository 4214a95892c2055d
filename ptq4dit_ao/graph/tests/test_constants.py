"""Weights made of parameters alone become buffers; everything else stays as it was captured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.graph.constants import fold_constant_weights
from ptq4dit_ao.graph.names import LINEAR, layer_name, linears

WIDTH = 6


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH, 1) + 0.5)
        self.register_buffer("mask", torch.rand(WIDTH, WIDTH).round())


class Gained(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight * self.gain, self.linear.bias)


class Deep(Parts):
    """Several steps, and a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight.t() * self.mask
        return F.linear(x, (weight / weight.norm(dim=1, keepdim=True)).reshape(WIDTH, WIDTH), self.linear.bias)


class Shared(Parts):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight * self.gain
        return F.linear(F.linear(x, weight).relu(), weight, self.linear.bias)


class Twice(Parts):
    """Two weights that start with the same parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.linear.weight * self.gain), self.linear.weight * self.mask)


class AlsoUsed(Parts):
    """The product is read elsewhere, too."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight * self.gain
        return F.linear(x, weight) + weight.sum()


class Plain(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain[:, 0]


class OfTheInput(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight * x.mean(), self.linear.bias)


class Random(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight * torch.rand(WIDTH))


class OfTheBatch(Parts):
    """Made of attributes and sizes, but of another size at another batch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight[:1].expand(x.shape[0], WIDTH))


FOLDED = {Gained: 1, Deep: 1, Shared: 1, Twice: 2, AlsoUsed: 1}
LEFT = [Plain, OfTheInput, Random, OfTheBatch]


def captured(model: nn.Module) -> GraphModule:
    """As ``torch.export`` gives it."""
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model.eval(), (torch.randn(3, WIDTH),), dynamic_shapes=({0: batch},))
    return program.module(check_guards=False)


def weights(graph_module: GraphModule) -> list:
    return [node.args[1] for node in graph_module.graph.nodes if node.target is LINEAR]


@pytest.mark.parametrize("kind", FOLDED)
def test_a_computed_weight_becomes_a_buffer(kind):
    graph_module, x = captured(kind()), torch.randn(5, WIDTH)
    expected, names = graph_module(x), set(graph_module.state_dict())
    assert not linears(graph_module)
    assert fold_constant_weights(graph_module) == FOLDED[kind]
    graph_module.graph.lint()
    assert all(node.op == "get_attr" and node.meta["val"].shape == (WIDTH, WIDTH) for node in weights(graph_module))
    assert linears(graph_module)
    assert torch.equal(graph_module(x), expected)
    buffers = dict(graph_module.named_buffers())
    added = ["linear.weight_constant", "linear.weight_constant_"][: FOLDED[kind]]
    assert set(graph_module.state_dict()) == names | set(added)
    assert all(not buffers[name].requires_grad for name in added)


def test_the_buffer_holds_the_product():
    model = Gained()
    graph_module = captured(model)
    fold_constant_weights(graph_module)
    assert torch.equal(graph_module.linear.weight_constant, (model.linear.weight * model.gain).detach())
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_function"] == [LINEAR]


def test_a_shared_weight_is_folded_once():
    graph_module = captured(Shared())
    fold_constant_weights(graph_module)
    first, second = weights(graph_module)
    assert first is second and first.target == "linear.weight_constant"


def test_other_users_keep_the_product():
    graph_module = captured(AlsoUsed())
    fold_constant_weights(graph_module)
    assert torch.ops.aten.mul.Tensor in {node.target for node in graph_module.graph.nodes}


@pytest.mark.parametrize("kind", LEFT)
def test_a_plain_parameter_and_what_differs_from_call_to_call_are_left(kind):
    graph_module = captured(kind())
    before, tensors = graph_module.code, set(graph_module.state_dict())
    assert fold_constant_weights(graph_module) == 0
    assert graph_module.code == before and set(graph_module.state_dict()) == tensors


def test_folding_again_changes_nothing():
    graph_module = captured(Gained())
    assert [fold_constant_weights(graph_module) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize("kind", [Gained, Shared])
def test_the_model_is_not_changed(kind):
    model, x = kind().eval(), torch.randn(3, WIDTH)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    exported = export_transformer(model, (x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys() and torch.equal(model(x), expected)
    torch.testing.assert_close(exported(x), expected)
    with torch.no_grad():
        exported.linear.weight_constant.zero_()  # nobody else's
    assert torch.equal(model(x), expected)


def test_its_layer_keeps_its_name():
    graph_module = captured(Gained())
    fold_constant_weights(graph_module)
    assert [layer_name(node) for node in linears(graph_module)] == ["linear"]


class Written(Parts):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight.clone().mul_(self.gain)
        return F.linear(x, weight * torch.rand_like(self.mask), self.linear.bias)


def test_what_is_written_in_place_or_random_is_no_constant():
    graph_module = captured(Written())
    assert fold_constant_weights(graph_module) == 0


class Split(Parts):
    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.linear.bias, self.linear.bias]).chunk(2)[1]
        return F.linear(x, self.linear.weight, bias)


def test_a_part_of_a_long_bias_becomes_a_buffer():
    graph_module, x = captured(Split()), torch.randn(5, WIDTH)
    expected = graph_module(x)
    assert fold_constant_weights(graph_module) == 1
    (linear,) = linears(graph_module)
    assert linear.args[2].target == "linear.bias_constant"
    assert torch.equal(graph_module(x), expected)
