"""Tests that the code and the recipe of docs/diagnostics.md run as written."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ptq4dit_ao.recipe import load_recipe

DOC = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text()


def test_the_recipe_loads(tmp_path):
    (tmp_path / "mixed.yaml").write_text(re.findall(r"```yaml\n(.*?)```", DOC, flags=re.DOTALL)[0])
    weights = load_recipe(tmp_path / "mixed.yaml").weights
    assert (weights.bits, weights.average_bits, weights.widths) == ("auto", 5, (4, 8))


def test_the_python_snippet(tiny_exported, tiny_samples, quantized, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    x, t, y = tiny_samples[0]
    scope = {"exported": tiny_exported, "samples": tiny_samples, "quantized": quantized(weight_bits=4)}
    scope["one_timestep_each"] = [(x, torch.full_like(t, value), y) for value in (100, 900)]
    exec(compile(snippet, "diagnostics.md", "exec"), scope)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 22 + 1
    assert {override.weight_bits for override in scope["choice"].overrides} == {8}
