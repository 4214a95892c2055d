"""Tests that the README's code runs as written, and that its commands exist."""

from __future__ import annotations

import configparser
import logging
import re
from pathlib import Path

import pytest
import torch

from ptq4dit_ao.calibration import Sampling, SamplingPipeline
from ptq4dit_ao.cli.main import build_parser
from ptq4dit_ao.modules.form import integer_weights
from ptq4dit_ao.recipe import Recipe, load_recipe, shipped_recipes
from ptq4dit_ao.testing.pipelines import tiny_sd3_pipeline
from ptq4dit_ao.workflow import pipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_snippets_run_in_order(tiny_dit, tiny_samples, tmp_path, monkeypatch):
    others = ("import nncf", "quantize_pipeline")
    snippets = [snippet for snippet in blocks("python") if not any(word in snippet for word in others)]
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    sampling = Sampling(channels=4, size=8, null_label=10, clip=False)
    scope = {"model": tiny_dit, "samples": tiny_samples}
    scope |= {"pipe": SamplingPipeline(tiny_dit, sampling), "prompts": [0, 1, 2, 3]}
    snippets[0] = snippets[0].replace('"x86_inductor"', '"fbgemm"')  # the same call without a compiler
    with torch.no_grad():
        for snippet in snippets:
            exec(compile(snippet, "README.md", "exec"), scope)
        expected = tiny_dit(*tiny_samples[-1], return_dict=False)[0]
    assert scope["fast"].proof.integer_gemms == scope["fast"].proof.promised > 0
    assert scope["noise"].shape == expected.shape
    assert scope["quantizer"].variant
    assert scope["denoiser"].proof.integer_gemms > 0
    assert scope["pipe"].transformer.lowered is scope["denoiser"]
    assert scope["pipe"]([3], num_inference_steps=2).shape == (1, 4, 8, 8)


def test_the_snippet_of_pipelines_runs(tmp_path, monkeypatch):
    (snippet,) = (snippet for snippet in blocks("python") if "quantize_pipeline" in snippet)

    def few_steps(name: str) -> Recipe:
        recipe = load_recipe(name)
        few = recipe.calibration.model_copy(update={"timesteps": 2, "steps": 3})
        return recipe.model_copy(update={"calibration": few})

    monkeypatch.setattr(pipeline, "load_recipe", few_steps)
    monkeypatch.chdir(tmp_path)
    scope = {"pipe": tiny_sd3_pipeline(), "prompts": ["a lighthouse at dusk", "two foxes in the snow"]}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert integer_weights(scope["quantized"].transformer) and scope["image"].size == (32, 32)
    assert (tmp_path / "flux-w8a8" / "model_index.json").is_file()


def test_the_nncf_snippet_runs(tiny_dit, tiny_samples):
    pytest.importorskip("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    (snippet,) = (snippet for snippet in blocks("python") if "import nncf" in snippet)
    assert len(snippet.splitlines()) <= 6
    scope = {"model": tiny_dit, "samples": tiny_samples}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert sum(op.get_type_name() == "FakeQuantize" for op in scope["quantized"].get_ops()) > 0


def test_the_snippet_is_ten_lines_or_so():
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


def test_the_shown_recipe_is_valid(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(blocks("yaml")[0])
    assert load_recipe(path).weights.bits == 4


def test_the_commands_parse():
    commands = re.findall(r"^\$ ptq4dit-ao ([^#\n]+)", README, flags=re.MULTILINE)
    assert len(commands) > 9
    for command in commands:
        args = build_parser().parse_args(command.split())
        if args.command == "quantize" and not args.recipe.endswith(".yaml"):
            assert args.recipe in shipped_recipes()


def test_the_environments_exist():
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    for name in re.findall(r"tox run -e (\w+)", README):
        assert f"testenv:{name}" in tox


def test_the_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
