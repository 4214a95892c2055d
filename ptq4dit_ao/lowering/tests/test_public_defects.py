"""Defects that others met and reported: with us they do not happen, or do not go unnoticed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4dit_ao import SitePolicy
from ptq4dit_ao.capture import export_transformer
from ptq4dit_ao.core.metrics import sqnr_db
from ptq4dit_ao.errors import LoweringError
from ptq4dit_ao.lowering import aoti, export_to, lower
from ptq4dit_ao.lowering.x86_inductor import lacks
from ptq4dit_ao.passes import balance_result
from ptq4dit_ao.quantizer import PTQ4DiTQuantizer

STEPS = 3
COMPILES = [pytest.mark.x86, pytest.mark.skipif(lacks() is not None, reason=str(lacks()))]


class Unrolled(nn.Module):
    """A sampling loop that export unrolls: each linear is called in each step, before a ReLU and before an addition."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x + self.fc2(nn.functional.relu(self.fc1(self.norm(x)))) + t[:, None, None] * 1e-3
        return x


@pytest.fixture(scope="module")
def samples() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 6, 16, generator=generator), 100 * torch.arange(4) + i) for i in range(3)]


def export(samples, steps: int) -> GraphModule:
    """With salient channels, so that balancing has something to do."""
    torch.manual_seed(0)
    model = Unrolled(steps).eval().requires_grad_(False)
    model.norm.weight[3] *= 20
    model.fc1.weight[5] *= 15
    return export_transformer(model, samples[0])


# -- pytorch/ao#4478: X86InductorQuantizer crashed on a linear that is called more than once -------------------------


@pytest.mark.parametrize(
    "backend", ["fbgemm", pytest.param("x86_inductor", marks=COMPILES), pytest.param("aoti", marks=COMPILES)]
)
@pytest.mark.parametrize("balance", [False, True])
def test_reused_linears_are_balanced_quantized_and_run_on_integers(backend, balance, samples, convert):
    exported = export(samples, STEPS)
    options = {"policy": SitePolicy(couple_blocks=True)} if balance else {"balance": "none"}
    converted = convert(exported, PTQ4DiTQuantizer(**options), samples)
    sites = balance_result(converted).sites
    assert [site.name for site in sites if site.refusal is None] == (["fc1", "fc2"] if balance else [])
    expected, simulated = exported(*samples[0]), converted(*samples[0])
    assert sqnr_db(expected, simulated) > (25 if balance else 15)
    lowered = lower(converted, backend)
    assert lowered.proof.promised == lowered.proof.integer_gemms == 2 * STEPS
    assert sqnr_db(simulated, lowered(*samples[0])) > 60


# -- pytorch/ao#4566: without freezing, AOTInductor packs a float program without a word -----------------------------


@pytest.fixture(params=[True, False])
def freezing(request, monkeypatch) -> bool:
    monkeypatch.setitem(aoti.SETTINGS, "freezing", request.param)
    return request.param


@pytest.mark.x86
@pytest.mark.skipif(lacks() is not None, reason=str(lacks()))
def test_a_float_aoti_package_is_refused_and_not_written(freezing, samples, convert, tmp_path):
    converted = convert(export(samples, 1), PTQ4DiTQuantizer(balance="none"), samples)
    refusal = pytest.raises(LoweringError, match="'aoti' ran 0 of 2 quantized linears on integer kernels")
    with nullcontext() if freezing else refusal:
        export_to(converted, "aoti", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == (["model.pt2"] if freezing else [])
    with nullcontext() if freezing else refusal:
        lower(converted, "aoti")
