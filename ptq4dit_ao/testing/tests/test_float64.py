"""A graph in float64: the same function, wherever the model casts, and the original as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.testing.float64 import in_float64, wide

WIDTH = 6


class Casting(nn.Module):
    """Casts to float32 and float16 inside, constants, a complex rotation, indices; (N, WIDTH), (N,) -> several."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(10, WIDTH))
        self.constant = torch.randn(WIDTH)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        h = self.linear(x).float() + self.constant.to(x.dtype) + self.table[index]
        rotated = torch.view_as_complex(h.unflatten(1, (-1, 2))) * torch.polar(torch.ones(3), torch.arange(3.0))
        h = torch.view_as_real(rotated).flatten(1)
        ramp = torch.arange(WIDTH, dtype=torch.float32) / 7 + torch.zeros(WIDTH, dtype=torch.float16)
        return (h * ramp).to(torch.float16).type_as(h), h.half(), index + 1


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch)
    return torch.randn(batch, WIDTH, generator=g), torch.randint(0, 10, (batch,), generator=g)


@pytest.fixture(scope="module")
def model() -> Casting:
    torch.manual_seed(0)
    return Casting().eval()


@pytest.fixture(scope="module")
def exported(model) -> GraphModule:
    return export_transformer(model, inputs(3))


@pytest.fixture(scope="module")
def widened(exported) -> GraphModule:
    return in_float64(exported)


@pytest.mark.parametrize("batch", [3, 1, 5])
def test_outputs_are_float64_and_close(exported, widened, batch):
    x, index = inputs(batch)
    narrow, outputs = exported(x, index), widened(x.double(), index)
    assert [output.dtype for output in outputs] == [torch.float64, torch.float64, torch.int64]
    for one, other in zip(narrow, outputs, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-3, atol=2e-3)
    assert torch.equal(narrow[2], outputs[2])


def test_nothing_is_rounded_on_the_way(model, widened):
    """Against the formula in float64 throughout."""
    x, index = inputs(3)
    weight, bias = model.linear.weight.detach().double(), model.linear.bias.detach().double()
    h = x.double() @ weight.T + bias + model.constant.double() + model.table[index].double()
    angles = torch.arange(3, dtype=torch.float64)
    even, odd = h[:, 0::2], h[:, 1::2]
    h = torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], 2).flatten(1)
    first, second, _ = widened(x.double(), index)
    torch.testing.assert_close(second, h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first, h * torch.arange(WIDTH, dtype=torch.float64) / 7, rtol=1e-12, atol=1e-12)


class Recorder(Interpreter):
    """The dtypes of all tensors as they are made, by node."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.dtypes: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.dtypes[n] = result.dtype
        return result


def test_every_tensor_is_wide_and_the_graph_says_so(widened):
    x, index = inputs(3)
    recorder = Recorder(widened)
    recorder.run(x.double(), index)
    assert {str(dtype) for dtype in recorder.dtypes.values()} == {"torch.float64", "torch.complex128", "torch.int64"}
    assert {node: node.meta["val"].dtype for node in recorder.dtypes} == recorder.dtypes


def test_the_original_is_not_touched():
    exported, example = export_transformer(Casting().eval(), inputs(3)), inputs(3)
    code, expected = exported.code, exported(*example)
    before = {name: value.clone() for name, value in exported.state_dict().items()}
    in_float64(exported)
    assert exported.code == code and all(map(torch.equal, exported(*example), expected))
    assert {name: value.dtype for name, value in exported.state_dict().items()} == dict.fromkeys(before, torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in exported.state_dict().items())


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.zeros(1, dtype=torch.bfloat16), torch.float64),
        (torch.zeros(1), torch.float64),
        (torch.zeros(1, dtype=torch.float64), torch.float64),
        (torch.zeros(1, dtype=torch.complex64), torch.complex128),
        (torch.zeros(1, dtype=torch.int32), torch.int32),
        (torch.zeros(1, dtype=torch.bool), torch.bool),
    ],
)
def test_floating_tensors_are_widened(value, dtype):
    assert wide(value).dtype == dtype


@pytest.mark.parametrize("value", [3, "text", None])
def test_other_values_are_as_they_are(value):
    assert wide(value) is value
