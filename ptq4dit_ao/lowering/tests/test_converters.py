"""What converters to other runtimes have got wrong: each backend computes it as torch does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ptq4dit_ao import apply_recipe
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.lowering.backend import BACKENDS
from ptq4dit_ao.recipe import Balance, Recipe

PLAIN = Recipe(balance=Balance(method="none"))
MARKS = {"x86_inductor": ("x86",), "aoti": ("x86", "aoti")}
CONVERTERS = [
    pytest.param(name, marks=[getattr(pytest.mark, mark) for mark in MARKS.get(name, (name,))])
    for name in ("onnx", "openvino", "aoti", "x86_inductor")
]


@pytest.fixture(params=CONVERTERS)
def backend(request) -> str:
    if (why := BACKENDS[request.param].unavailable()) is not None:
        pytest.skip(f"{request.param}: {why}")
    return request.param


class Behind(nn.Module):
    """Something behind two linears: a quantizer there would hide what is not a number."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(self.last(self.first(x))) + t[:, None, None]


def computed(function: Callable[[Tensor], Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """By the simulated graph, and by the backend."""
    x, t = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 0.25])
    model = apply_recipe(Behind(function).eval(), PLAIN, [(x, t)])
    return model.graph(x, t), model.lower(backend, verify=False)(x, t)


def attended(h: Tensor) -> Tensor:
    """Linear attention where a query's ReLU is all zero."""
    query, value = torch.relu(h - 100), nn.functional.pad(h, (0, 1), value=1.0)
    sums = query @ (query.transpose(1, 2) @ value)
    return sums[..., :-1] / (sums[..., -1:] + 1e-15)


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x + 1e-15": attended,
    "x - 1e-9": lambda h: h * 1e-9 / (torch.relu(h - 100) - 1e-9),
    "x * (1 + 8e-6)": lambda h: (h * (1 + 8e-6) - h) * 1e5,
    "x / (1 + 8e-6)": lambda h: (h / (1 + 8e-6) - h) * 1e5,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_are_close_to_nothing_count(backend, name):
    expected, found = computed(CONSTANTS[name], backend)
    assert expected.isfinite().all() and expected.std() > 1e-3
    assert sqnr_db(expected, found) > 30  # differences of large numbers: a few of their digits are left


def test_a_squeeze_of_a_longer_axis_does_nothing(backend):
    expected, found = computed(lambda h: h.squeeze(1), backend)
    assert sqnr_db(expected, found) > 60


def test_an_einsum_of_two_dtypes(backend):
    frequencies = torch.arange(8, dtype=torch.float64)
    expected, found = computed(
        lambda h: torch.einsum("ntc,d->ntd", h, frequencies.to(h.device) / 8).float() + h, backend
    )
    assert sqnr_db(expected, found) > 60


def rotated(h: Tensor) -> Tensor:
    """A rotary embedding as Wan computes it, into every second channel of an empty tensor."""
    out = torch.empty_like(h)
    out[..., 0::2] = h[..., 0::2] - 2 * h[..., 1::2]
    out[..., 1::2] = h[..., 0::2] + 2 * h[..., 1::2]
    return out


def test_an_empty_tensor_that_is_filled_by_channels(backend):
    expected, found = computed(rotated, backend)
    assert sqnr_db(expected, found) > 60


PADDED: dict[str, Callable[[int], int]] = {
    "-(-n // 4)": lambda n: -(-n // 4) * 4 - n,
    "nested": lambda n: -n % 4 % 4 + (-n // 4 + n) // 2 * 0,
}


@pytest.mark.parametrize("name", PADDED)
def test_a_free_size_that_is_padded_to_a_multiple(backend, name):
    def padded(h: Tensor) -> Tensor:
        more = PADDED[name](h.shape[1])
        return nn.functional.pad(h, (0, 0, 0, more), mode="replicate").unflatten(1, (-1, 4)).mean(2)

    x, t = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 0.25])
    model = apply_recipe(Behind(padded).eval(), PLAIN, [(x, t)])
    assert model.sizes.names == ("batch", "tokens")
    lowered = model.lower(backend)
    for tokens in (6, 8, 9, 3):
        more = x.repeat(1, 2, 1)[:, :tokens]
        assert lowered(more, t).shape == (2, -(-tokens // 4), 8)
        assert sqnr_db(model.graph(more, t), lowered(more, t)) > 40
