"""Every installed peer runs the tiny DiT, about right and, where it says int8, on integer kernels."""

from __future__ import annotations

import pytest
import torch

from ptq4dit_ao._version import installed_version
from ptq4dit_ao.core import sqnr_db
from ptq4dit_ao.evaluation.bench import peers
from ptq4dit_ao.evaluation.bench.peers import PEERS, Contender, FloatModel

COMPILED = {"torchao int8 dynamic", "torchao X86 static int8", "torchao SmoothQuant static int8", "SDNQ int8"}
LINEARS = 22
"""Of the tiny DiT, quantized or not."""


@pytest.fixture(scope="module")
def model(tiny_dit, tiny_exported, tiny_samples) -> FloatModel:
    return FloatModel(module=tiny_dit, exported=tiny_exported, batches=tiny_samples[:2])


@pytest.mark.parametrize(
    "peer",
    [pytest.param(p, id=p.name, marks=[pytest.mark.x86] if p.name in COMPILED else []) for p in PEERS],
)
@torch.no_grad()
def test_a_peer_runs(peer: Contender, model):
    absent = [package for package in peer.packages if installed_version(package) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} is not installed")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    started, expected = peer.start(model), model.exported(*model.batches[0])
    integer = "int8" in peer.name and "weights" not in peer.name
    assert (10 <= started.integer_gemms <= LINEARS) if integer else started.integer_gemms == 0
    assert sqnr_db(expected, started.run(*model.batches[0])) > (20 if "int8" in peer.name else 80)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


@torch.no_grad()
def test_bfloat16_casts_the_model_and_its_floating_inputs(model, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    output = peers.bfloat16_compiled(model).run(*model.batches[0])
    assert output.dtype == torch.bfloat16
    assert 20 < sqnr_db(model.exported(*model.batches[0]), output.float()) < 70
    assert next(model.module.parameters()).dtype == torch.float32


def test_what_is_compiled_is_not_the_module_itself(model, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function: seen.append(function) or function)
    peers.float_compiled(model)
    assert len(seen) == 1 and "forward" not in vars(model.module)
