"""The operators, on every machine that can run one of their implementations, against NumPy in float64.

The Triton kernels run on a CPU, too, in Triton's interpreter: ``TRITON_INTERPRET=1 pytest -k interpreter``.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4dit_ao.core.expansion import CODES, Expansion, expanded_integers
from ptq4dit_ao.lowering.cuda.ops import (
    expand,
    expanded_linear,
    int4_linear,
    int8_linear,
    int_mm,
    pack_halves,
    unpack_halves,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
IMPLEMENTATIONS = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")],
    ),
    pytest.param(
        "interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
    ),
]
SHAPES = [  # of the rows, then columns of the weight
    ((1,), 1, 1),
    ((5,), 7, 9),
    ((3, 11), 17, 33),
    ((2, 3, 16), 48, 64),
    ((130,), 65, 258),
    ((33,), 160, 511),
]


@dataclass(frozen=True)
class Case:
    """A linear as the graph holds it; ``x`` uint8."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    zero_point: int
    x_scale: float
    weight_scale: Tensor

    @classmethod
    def random(cls, shape: tuple[int, ...], n: int, k: int, *, bits: int, zero_point: int, bias: bool) -> Case:
        g = torch.Generator().manual_seed(n * k)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        return cls(
            x=torch.randint(0, 256, (*shape, k), generator=g, dtype=torch.uint8),
            weight=torch.randint(low, high, (n, k), generator=g, dtype=torch.int8),
            bias=torch.randn(n, generator=g) if bias else None,
            zero_point=zero_point,
            x_scale=0.02,
            weight_scale=torch.rand(n, generator=g) / 100 + 1e-4,
        )

    def expected(self) -> np.ndarray:
        x = (self.x.numpy().astype(np.float64) - self.zero_point) * self.x_scale
        weight = self.weight.numpy().astype(np.float64) * self.weight_scale.numpy().astype(np.float64)[:, None]
        return x @ weight.T + (0 if self.bias is None else self.bias.numpy().astype(np.float64))

    def arguments(self, *, packed: bool, out_dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple:
        shifted = (self.x.to(torch.int16) - 128).to(torch.int8)
        correction = (self.zero_point - 128) * self.weight.sum(dim=1, dtype=torch.int32)
        weight = pack_halves(self.weight) if packed else self.weight
        tensors = (shifted, weight, self.weight_scale * self.x_scale, correction, self.bias)
        return (*(None if t is None else t.to(device) for t in tensors), out_dtype)


def interpret(arguments: tuple, *, packed: bool) -> Tensor:
    """The Triton kernel on the CPU, in small tiles."""
    import triton

    from ptq4dit_ao.lowering.cuda import kernels

    tile = triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64})
    kernels.int8_linear_kernel.configs = kernels.int4_linear_kernel.configs = [tile]  # one: nothing is timed
    x, *rest = arguments
    run = kernels.int4_linear if packed else kernels.int8_linear
    return run(x.reshape(-1, x.shape[-1]), *rest).reshape(*x.shape[:-1], -1)


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request):
    """``run(case, packed=..., out_dtype=...) -> Tensor`` by one of the implementations."""

    def call(case: Case, *, packed: bool, out_dtype: torch.dtype = torch.float32) -> Tensor:
        device = "cuda" if request.param == "cuda" else "cpu"
        arguments = case.arguments(packed=packed, out_dtype=out_dtype, device=device)
        if request.param == "interpreter":
            return interpret(arguments, packed=packed)
        return (int4_linear if packed else int8_linear)(*arguments).cpu()

    return call


@dataclass(frozen=True)
class ExpandedCase(Case):
    """A linear whose weight expands from codes, in groups of so many columns."""

    codes: Tensor
    steps: Tensor
    group: int

    @classmethod
    def drawn(cls, shape: tuple[int, ...], n: int, k: int, *, group: int | None, bias: bool = True) -> ExpandedCase:
        case = Case.random(shape, n, k, bits=8, zero_point=111, bias=bias)
        g, rule = torch.Generator().manual_seed(n + k), Expansion(group=group)
        codes = torch.randint(0, CODES, (n, k), generator=g, dtype=torch.int8)
        steps = torch.randint(1, 16, (n, rule.groups(k)), generator=g, dtype=torch.uint8)
        width = group or k
        by_column = torch.stack([steps[:, j // width] for j in range(k)], 1)
        weight = expanded_integers(torch.device("cpu"))[by_column.long(), codes.long()]
        parts = {**vars(case), "weight": weight}
        return cls(**parts, codes=codes, steps=steps, group=width)

    def expanded_arguments(self, *, out_dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple:
        x, _, *rest = self.arguments(packed=False, out_dtype=out_dtype, device=device)
        table = expanded_integers(torch.device(device))
        return (x, pack_halves(self.codes).to(device), self.steps.to(device), table, self.group, *rest)


@pytest.fixture(params=IMPLEMENTATIONS)
def run_expanded(request):
    """``run_expanded(case, out_dtype=...) -> Tensor`` by one of the implementations."""

    def call(case: ExpandedCase, out_dtype: torch.dtype = torch.float32) -> Tensor:
        arguments = case.expanded_arguments(out_dtype=out_dtype, device="cuda" if request.param == "cuda" else "cpu")
        if request.param != "interpreter":
            return expanded_linear(*arguments).cpu()
        import triton

        from ptq4dit_ao.lowering.cuda import kernels

        kernels.expanded_linear_kernel.configs = [triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64})]
        x, *rest = arguments
        return kernels.expanded_linear(x.reshape(-1, x.shape[-1]), *rest).reshape(*x.shape[:-1], -1)

    return call


@pytest.mark.parametrize("group", [16, 48, None])
@pytest.mark.parametrize(("shape", "n", "k"), SHAPES)
def test_expanded_weights_of_any_shape(run_expanded, group, shape, n, k):
    case = ExpandedCase.drawn(shape, n, k, group=group)
    check(run_expanded(case), case)


def test_expanded_output_in_16_bits_and_schema(run_expanded):
    case = ExpandedCase.drawn((20,), 24, 70, group=16, bias=False)
    actual = run_expanded(case, torch.bfloat16)
    assert actual.dtype == torch.bfloat16
    check(actual, case, relative=torch.finfo(torch.bfloat16).eps)
    assert torch.equal(expand(*case.expanded_arguments()[1:5], 70), case.weight)
    torch.library.opcheck(expanded_linear, case.expanded_arguments())


def check(actual: Tensor, case: Case, relative: float = 1e-6) -> None:
    expected = case.expected()
    assert tuple(actual.shape) == expected.shape
    assert np.abs(actual.double().numpy() - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "n", "k"), SHAPES)
def test_any_shape(run, bits, shape, n, k):
    case = Case.random(shape, n, k, bits=bits, zero_point=111, bias=True)
    check(run(case, packed=bits == 4), case)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
def test_any_zero_point(run, zero_point, bias):
    case = Case.random((2, 9), 12, 70, bits=8, zero_point=zero_point, bias=bias)
    check(run(case, packed=False), case)


@pytest.mark.parametrize(("x", "weight"), [(0, -128), (255, -128), (0, 127), (255, 127)])
def test_extremes_do_not_overflow(run, x, weight):
    case = Case.random((4,), 8, 4608, bits=8, zero_point=255 - x, bias=False)
    case.x.fill_(x)
    case.weight.fill_(weight)
    check(run(case, packed=False), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_in_16_bits(run, dtype):
    case = Case.random((20,), 24, 64, bits=4, zero_point=7, bias=True)
    for packed in (True, False):
        actual = run(case, packed=packed, out_dtype=dtype)
        assert actual.dtype == dtype
        check(actual, case, relative=torch.finfo(dtype).eps)


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_not_contiguous(packed):
    case = Case.random((6, 5), 7, 10, bits=4, zero_point=3, bias=True)
    x, *rest = case.arguments(packed=packed)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    check((int4_linear if packed else int8_linear)(strided, *rest), case)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", [int8_linear, int4_linear])
def test_schema_and_fake_agree_with_what_runs(op, bias):
    case = Case.random((3, 5), 6, 9, bits=4, zero_point=100, bias=bias)
    for out_dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(op, case.arguments(packed=op is int4_linear, out_dtype=out_dtype))


def test_packing_halves_the_bytes_and_loses_nothing():
    every = torch.arange(-8, 8, dtype=torch.int8)
    weight = torch.cartesian_prod(every, every).reshape(-1, 32)  # every pair of neighbours
    for columns in (32, 31, 2, 1):
        part = weight[:, :columns]
        packed = pack_halves(part)
        assert packed.dtype == torch.int8 and packed.shape == (len(part), (columns + 1) // 2)
        assert torch.equal(unpack_halves(packed, columns), part)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (16, 8, 8), (17, 9, 15), (33, 24, 64)])
def test_without_triton_products_are_still_exact(m, n, k, monkeypatch):
    """``torch._int_mm`` never gets a shape that CUDA refuses."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    real = torch._int_mm

    def strict(a: Tensor, b: Tensor) -> Tensor:
        assert len(a) > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    assert torch.equal(int_mm(x, weight), x.int() @ weight.int().T)
