"""An integer weight computes what its numbers say, lives as a parameter does, and refuses what would change it."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.core.per_token import fake_quantize_tokens
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.modules import weight as weight_module
from ptq4dit_ao.modules.kernels import PACKED, takes_unsigned
from ptq4dit_ao.modules.weight import StaticInt8Weight

CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(c_out: int = 24, c_in: int = 32, *, balanced: bool = True, bits: int = 8, **options) -> StaticInt8Weight:
    g, top, x_bits = generator(0), 2 ** (bits - 1) - 1, options.pop("x_bits", 8)
    if options.get("dynamic"):
        x_scale, zero_point = 2.0 ** (1 - x_bits), 2 ** (x_bits - 1)
    else:
        x_scale, zero_point = 6.0 / (2**x_bits - 1), 2 ** (x_bits - 1) - 3
    return StaticInt8Weight.of(
        torch.randint(-top, top + 1, (c_out, c_in), generator=g, dtype=torch.int8),
        torch.rand(c_out, generator=g) / 100 + 0.001,
        x_scale,
        zero_point,
        bits=bits,
        x_bits=x_bits,
        x_ndim=3,
        dtype=torch.float32,
        pre_scale=0.5 + torch.rand(c_in, generator=g) if balanced else None,
        **options,
    )


def expected(weight: StaticInt8Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The formula of the module's docstring, in float64 but for the rounding itself."""
    balanced = x.float() if weight.pre_scale is None else x.float() * weight.pre_scale
    q = torch.round(balanced * (1 / weight.x_scale)) + weight.x_zero_point
    x_back = (q.clamp(0, 2**weight.x_bits - 1) - weight.x_zero_point).double() * weight.x_scale.double()
    y = x_back @ (weight.qdata.double() * weight.scale.double().unsqueeze(1)).T
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("balanced", "x_bits"), [(True, 8), (False, 8), (True, 6)])
def test_tokens_with_ranges_of_their_own(balanced, x_bits, dtype):
    weight, g = made(balanced=balanced, x_bits=x_bits, dynamic=True), generator(1)
    x = torch.randn(2, 7, 32, generator=g) * torch.logspace(-3, 3, 7).unsqueeze(1) + 1
    x[0, :3] = torch.tensor([0.0, 2.0, -5.0]).unsqueeze(1)
    x, bias = x.to(dtype), torch.randn(24, generator=g)
    rows = x.float() if weight.pre_scale is None else x.float() * weight.pre_scale
    weights = weight.qdata.double() * weight.scale.double().unsqueeze(1)
    y = functional.linear(x, weight, bias)
    assert y.dtype == dtype and y.isfinite().all()
    exact = fake_quantize_tokens(rows, 0, 2**x_bits - 1).double() @ weights.T + bias
    for token in range(7):
        assert sqnr_db(exact[:, token], y[:, token].double()) > (95 if dtype == torch.float32 else 40)
    assert repr(weight).startswith(f"StaticInt8Weight((24, 32), W8A{x_bits} per token")


@pytest.mark.parametrize("shape", [(5, 32), (1, 32), (2, 7, 32), (2, 3, 4, 32)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("balanced", "x_bits"), [(True, 8), (False, 8), (True, 6)])
def test_a_linear_is_its_formula(shape, with_bias, balanced, x_bits):
    weight, g = made(balanced=balanced, x_bits=x_bits), generator(1)
    x, bias = torch.randn(shape, generator=g) * 2, torch.randn(24, generator=g) if with_bias else None
    y = functional.linear(x, weight, bias)
    assert y.shape == (*shape[:-1], 24)
    assert sqnr_db(expected(weight, x, bias), y.double()) > 110


@pytest.mark.parametrize("sizes", [(24, 32), (5, 32), (24, 30), (3, 7)])
@pytest.mark.parametrize("rows", [1, 17, 40])
def test_the_kernel_of_other_devices_computes_the_same_at_any_size(sizes, rows, monkeypatch):
    monkeypatch.setattr(weight_module, "takes_unsigned", lambda device: False)
    weight, g = made(*sizes), generator(1)
    x, bias = torch.randn(rows, sizes[1], generator=g), torch.randn(sizes[0], generator=g)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = functional.linear(x, weight, bias)
    assert {event.key: event.count for event in profiler.key_averages()}.get("aten::_int_mm") == 1
    assert sqnr_db(expected(weight, x, bias), found.double()) > 110


def test_a_linear_runs_one_integer_product_and_no_float_one():
    weight, x = made(), torch.randn(2, 9, 32)
    functional.linear(x, weight)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        functional.linear(x, weight)
    events = {event.key: event.count for event in profiler.key_averages()}
    kernel = "onednn::qlinear_pointwise" if takes_unsigned(CPU) else "aten::_int_mm"
    assert events.get(kernel) == 1 and not events.keys() & {"aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"}


def test_it_is_the_float_weight_of_the_unbalanced_input():
    weight, x = made(), torch.randn(64, 32, generator=generator(1)) / 2
    assert sqnr_db(functional.linear(x, weight.float_weight()), functional.linear(x, weight)) > 30


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_scales_and_ranges_keep_32(dtype, balanced):
    weight, x = made(balanced=balanced).to(dtype), torch.randn(8, 32, generator=generator(1))
    parts = [part for part in (weight.scale, weight.x_scale, weight.pre_scale) if part is not None]
    assert weight.dtype == dtype and {part.dtype for part in parts} == {torch.float32}
    y = functional.linear(x.to(dtype), weight)
    assert y.dtype == dtype and sqnr_db(expected(weight, x.to(dtype), None), y.double()) > 45


def linear() -> nn.Linear:
    module = nn.Linear(32, 24)
    module.weight = nn.Parameter(made(), requires_grad=False)
    return module.requires_grad_(False)


def test_it_is_moved_copied_and_loaded_as_a_parameter():
    module, x = linear(), torch.randn(4, 32)
    y = module(x)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), y) and copied.weight.qdata.data_ptr() != module.weight.qdata.data_ptr()
    away = copy.deepcopy(module).to("meta")
    assert {p.device.type for p in (away.weight, away.weight.qdata, away.weight.scale, away.weight.pre_scale)} == {
        "meta"
    }
    copied.weight.qdata.zero_()
    assert not torch.equal(copied(x), y)
    copied.load_state_dict(module.state_dict())
    assert torch.equal(copied(x), y)
    with pytest.raises(RuntimeError, match="cannot be copied from or to a float weight"):
        copied.load_state_dict(nn.Linear(32, 24).state_dict())


@pytest.mark.skipif(not takes_unsigned(CPU), reason="weights are packed for oneDNN only")
def test_a_weight_is_packed_once_again_after_a_change_and_freed_with_it():
    gc.collect()
    before, module, x = len(PACKED), linear(), torch.randn(4, 32)
    y = module(x)
    module(x)
    assert len(PACKED) == before + 1
    module.weight.qdata.neg_()
    assert not torch.equal(module(x), y) and len(PACKED) == before + 1
    del module
    gc.collect()
    assert len(PACKED) == before


@pytest.mark.skipif(not takes_unsigned(CPU), reason="weights are packed for oneDNN only")
def test_weights_in_one_buffer_are_packed_apart():
    buffer, x = torch.randint(-9, 9, (48, 32), dtype=torch.int8), torch.randn(4, 32)
    parts = [made(), made()]
    for part, rows in zip(parts, buffer.split(24), strict=True):
        part.qdata, part.row_sums = rows, rows.sum(1, dtype=torch.int32)
    for part in parts:
        assert sqnr_db(expected(part, x, None), functional.linear(x, part).double()) > 100


def test_arguments_by_name_and_dtypes_that_no_kernel_takes():
    weight, x, bias = made(), torch.randn(4, 32), torch.randn(24)
    assert torch.equal(functional.linear(bias=bias, weight=weight, input=x), functional.linear(x, weight, bias))
    with pytest.raises(ArgumentError, match=r"an input of torch\.float64; give float32"):
        functional.linear(x.double(), weight)


def test_threads_share_it():
    module, x, found = linear(), torch.randn(4, 32), []
    threads = [threading.Thread(target=lambda: found.append(module(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda w: torch.cat([w, w]), r"used in aten\.cat.*call fuse_qkv_projections on the float model"),
        (lambda w: w.add_(1.0), r"used in aten\.add_.*leave an adapter unfused"),
        (lambda w: torch.ones(2, 24) @ w, r"used in aten\.\w+.*take float_weight\(\)"),
        (lambda w: w.dequantize(), "dequantized for an adapter.*leave an adapter unfused"),
        (lambda w: functional.linear(w, torch.ones(3, 32)), "the input of another linear"),
    ],
)
def test_what_would_change_it_is_refused(use, message):
    with pytest.raises(ArgumentError, match=message):
        use(made())


def test_gradients_are_refused_rather_than_lost():
    x = torch.randn(2, 32, requires_grad=True)
    with pytest.raises(ArgumentError, match=r"has no gradients; run the module under torch\.no_grad"):
        linear()(x)
    with torch.no_grad():
        linear()(x)


@pytest.mark.parametrize("balanced", [True, False])
def test_torchao_computes_the_same_from_its_own_tensor(balanced):
    weight, g = made(balanced=balanced), generator(1)
    x, bias = torch.randn(2, 9, 32, generator=g), torch.randn(24, generator=g)
    theirs = weight.as_int8_tensor()
    assert sqnr_db(functional.linear(x, weight, bias), functional.linear(x, theirs, bias)) > 100
    back = StaticInt8Weight.of_int8_tensor(theirs)
    assert torch.equal(functional.linear(x, back, bias), functional.linear(x, weight, bias))


def test_what_torchao_cannot_hold_says_why():
    assert "has 6 bits" in made(x_bits=6).not_stock()
    weight = made()
    weight.x_ndim = None
    assert "several ranks" in weight.not_stock()
    assert made(bits=4).not_stock() is None


@pytest.mark.x86
def test_compiled_it_computes_the_same_with_one_product():
    module, x = nn.Sequential(linear(), nn.GELU(), nn.Linear(24, 8)).requires_grad_(False), torch.randn(4, 9, 32)
    compiled = torch.compile(module)
    compiled(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        y = compiled(x)
    events = {event.key: event.count for event in profiler.key_averages()}
    assert events.get("onednn::qlinear_pointwise") == 1
    assert sqnr_db(module(x), y) > 90
