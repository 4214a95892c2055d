"""Parameters of any memory layout: strided and expanded views, transposed weights, inputs that are views."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao import apply_recipe
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.recipe import Balance, Recipe
from ptq4dit_ao.testing.zoo import FAMILIES

PLAIN = Recipe(balance=Balance(method="none"))
PARITY_DB = 60

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.t().contiguous().t(),
    "every second column of a larger one": lambda w: torch.stack([w, w + 9], 2)[..., 0],
    "rows of a larger one": lambda w: torch.cat([w + 9, w])[len(w) :],
}
BIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "every second of a larger one": lambda b: torch.stack([b, b + 9], 1)[:, 0],
    "one value, expanded": lambda b: b[:1].expand_as(b),
}
MARKS = {"reference": (), "x86_inductor": ("x86",), "aoti": ("x86", "aoti")}
ALL = [
    pytest.param(name, marks=[getattr(pytest.mark, mark) for mark in MARKS.get(name, (name,))])
    for name, backend in BACKENDS.items()
    if backend.integer
]


def first_quick(names: Iterable[str]) -> list[Any]:
    """Names as parameters, of which all but the first are slow."""
    first, *rest = names
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in rest)]


def quantized(change: Callable[[str, Tensor], Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Callable]:
    """Outputs of the model and its simulated graph, the inputs, and ``lower``; ``change`` lays parameters out anew."""
    model, inputs = FAMILIES["dit"].model(), tuple(FAMILIES["dit"].inputs(2).values())
    for name, parameter in model.named_parameters():
        parameter.data = change(name, parameter.data)
    made = apply_recipe(model, PLAIN, [inputs])
    return model(*inputs, return_dict=False)[0], made.graph(*inputs), inputs, made.lower


@pytest.fixture(params=ALL)
def backend(request) -> str:
    if (why := BACKENDS[request.param].unavailable()) is not None:
        pytest.skip(f"{request.param}: {why}")
    return request.param


@pytest.mark.parametrize("layout", first_quick(WEIGHTS))
def test_weights_of_any_layout(backend, layout):
    change = WEIGHTS[layout]
    expected, simulated, inputs, lower = quantized(
        lambda name, p: change(p) if p.ndim == 2 and "emb" not in name else p
    )
    assert sqnr_db(simulated, lower(backend, verify=False)(*inputs)) > PARITY_DB
    assert sqnr_db(expected, simulated) > 30


@pytest.mark.parametrize("layout", first_quick(BIASES))
def test_biases_of_any_layout(backend, layout):
    change = BIASES[layout]
    expected, simulated, inputs, lower = quantized(
        lambda name, p: change(p) if p.ndim == 1 and name.endswith("bias") else p
    )
    assert sqnr_db(simulated, lower(backend, verify=False)(*inputs)) > PARITY_DB
    assert sqnr_db(expected, simulated) > 30


class Tokens(nn.Module):
    """Linears on the tokens of an image (N, C, H, W), which are read across its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.first(x.flatten(2).transpose(1, 2)))) + t[:, None, None]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:1].expand_as(x),
        lambda x: torch.stack([x, x + 9], -1)[..., 0],
        lambda x: x.transpose(2, 3),
    ],
)
def test_inputs_of_any_layout(backend, view):
    torch.manual_seed(0)
    x, t = torch.randn(2, 8, 4, 4), torch.rand(2)
    model = apply_recipe(Tokens().eval(), PLAIN, [(x, t)])
    assert sqnr_db(model.graph(view(x), t), model.lower(backend)(view(x), t)) > PARITY_DB
