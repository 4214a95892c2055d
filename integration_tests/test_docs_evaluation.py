"""Tests that the code of docs/evaluation.md runs as written, and that its commands and options exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ptq4dit_ao.cli.main import build_parser
from ptq4dit_ao.evaluation.feature_networks import load_features
from ptq4dit_ao.metrics import extract

DOC = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
NETWORK, SNIPPET = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    trunk = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU())
    weights = nn.ModuleDict({"trunk": trunk, "head": nn.Linear(32, 10)}).state_dict()
    save_file(weights, "weights.safetensors")
    features = extract(load_features("my_networks:mine"), torch.zeros(3, 1, 8, 8))
    assert features.pooled.shape == (3, 32) and features.probabilities.sum().item() > 2.99


def test_the_python_snippet(tiny_dit, tiny_samples, quantized, capsys):
    images = torch.rand(6, 1, 8, 8)
    scope = {"model": lambda *inputs: tiny_dit(*inputs).sample, "quantized": quantized(), "batches": tiny_samples}
    scope |= {"float_images": images, "quantized_images": images * 0.9}
    scope |= {"real_features": torch.randn(9, 3), "features": torch.randn(8, 3)}
    exec(compile(SNIPPET, "evaluation.md", "exec"), scope)
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert scope["error"].sqnr_db > 30


def test_the_commands_parse():
    commands = re.findall(r"^\$ ptq4dit-ao ([^#\n]+)", DOC, flags=re.MULTILINE)
    assert [build_parser().parse_args(command.split()).command for command in commands] == ["quantize", "evaluate"]


def test_the_options_exist():
    for option, value in re.findall(r"`(--[a-z]+)(?: ([^ `]+))?", DOC):
        assert build_parser().parse_args(["evaluate", "x", option, value or "1"])
