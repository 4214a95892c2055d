"""The recipes that come with the package, and the JSON Schema beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

import ptq4dit_ao
from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe import (
    NormalDraw,
    Recipe,
    load_recipe,
    recipe_json_schema,
    shipped_descriptions,
    shipped_recipe_path,
    shipped_recipes,
)
from ptq4dit_ao.recipe.yaml_text import read_yaml

REGENERATE = (
    'python -c "import json, ptq4dit_ao.recipe as r; print(json.dumps(r.recipe_json_schema(), indent=2))" '
    "> recipes/recipe.schema.json"
)

METHODS = {
    "auto",
    "csb_ssc",
    "distilled",
    "fast",
    "learned",
    "minmax",
    "ptq4dm",
    "ptqd",
    "q_diffusion",
    "repq",
    "smoothquant",
}
"""Recipes that say how and leave the bits at 8; the others build on one of them, or are a paper's."""


def matches_schema(text: str) -> bool:
    return bool(jsonschema.Draft202012Validator(recipe_json_schema()).is_valid(read_yaml(text, "x.yaml").value))


def test_names() -> None:
    names = shipped_recipes()
    assert names == sorted(names)
    assert {"digits_w4a8", "digits_w8a8", "dit_w4a8", "dit_w8a8", "paper_w4a8", "paper_w8a8"} <= set(names)
    assert set(names) >= METHODS
    assert {name.replace("w4a8", "w8a8") for name in names} <= set(names), "4 bits without 8"


def test_every_file_describes_itself() -> None:
    assert shipped_descriptions() == {name: load_recipe(name).description for name in shipped_recipes()}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_described_and_matches_the_schema(name: str) -> None:
    text = shipped_recipe_path(name).read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n# ") and matches_schema(text)
    assert load_recipe(name).description and load_recipe(name).weights.bits == 8


def test_what_is_no_papers_builds_on_auto() -> None:
    auto = load_recipe("auto")
    for name in set(shipped_recipes()) - METHODS - {"paper_w4a8", "paper_w8a8"}:
        recipe = load_recipe(name)
        assert (recipe.rounding, recipe.balance) == (auto.rounding, auto.balance), name
    assert auto.balance.alpha == "auto" and auto.rounding.method == "gptq" and auto.rounding.sequential


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - METHODS))
def test_shipped_recipe(name: str) -> None:
    text = shipped_recipe_path(name).read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n# ")
    assert matches_schema(text)
    recipe = load_recipe(name)
    bits = f"w{recipe.weights.bits}a{recipe.activations.bits}"
    assert name.endswith(bits)
    assert recipe.description.startswith(load_recipe(name.replace("_w4", "_w8")).description.split(",")[0])
    assert f"{recipe.weights.bits}-bit weights" in recipe.description


def test_the_paper_recipe_is_the_paper() -> None:
    recipe = load_recipe("paper_w4a8")
    assert (recipe.balance.method, recipe.balance.alpha, recipe.layers) == ("ssc", 0.5, "paper")
    assert (recipe.attention.quantize, recipe.attention.bits) == (True, 8)
    calibration = recipe.calibration
    assert (calibration.timesteps, calibration.steps, calibration.samples, calibration.guidance) == (25, 50, 32, 1.5)


def test_the_baselines_are_their_papers() -> None:
    ptq4dm, q_diffusion, repq = (load_recipe(name) for name in ("ptq4dm", "q_diffusion", "repq"))
    assert ptq4dm.calibration.timesteps == NormalDraw(draw="normal", mean=0.4, std=0.4, count=1024)
    assert ptq4dm.layers == "paper" and q_diffusion.calibration.timesteps == 25
    assert {(r.balance.method, r.rounding.ranges) for r in (ptq4dm, q_diffusion)} == {("none", "lp")}
    assert (repq.balance.method, repq.rounding.ranges) == ("repq", "percentile")


def test_distilled_is_learned_and_then_learns_as_a_whole() -> None:
    distilled, learned = load_recipe("distilled"), load_recipe("learned")
    assert (distilled.balance, distilled.rounding) == (learned.balance, learned.rounding)
    assert learned.distillation.steps == 0 < distilled.distillation.steps


def test_distillation_needs_weights_that_were_rounded_layer_by_layer(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("version: 1\nextends: auto\ndistillation: {steps: 9}\n")  # auto rounds so
    assert load_recipe(mine).distillation.steps == 9
    mine.write_text("version: 1\ndistillation: {steps: 9}\n")
    with pytest.raises(RecipeError, match="mine.yaml: distillation.steps is 9: what learns must have been rounded "):
        load_recipe(mine)


def test_a_method_can_be_extended(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "version: 1\nextends: ptq4dm\nweights: {bits: 4}\ncalibration: {timesteps: {draw: normal, count: 9}}"
    )
    recipe = load_recipe(mine)
    assert recipe.calibration.timesteps == NormalDraw(draw="normal", count=9)
    assert (recipe.rounding.ranges, recipe.weights.bits) == ("lp", 4)


def test_unknown_name() -> None:
    with pytest.raises(RecipeError) as caught:
        shipped_recipe_path("paper_w8a4.yaml")
    near = "did you mean 'paper_w8a8'?"
    assert str(caught.value) == (
        f"no shipped recipe is called 'paper_w8a4.yaml'; {near} (`ptq4dit-ao recipes` lists the shipped ones)"
    )


def test_an_installed_package_finds_its_own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "only.yaml").write_text("version: 1\n", encoding="utf-8")
    monkeypatch.setattr(ptq4dit_ao, "__path__", [str(tmp_path), *ptq4dit_ao.__path__])
    monkeypatch.delitem(sys.modules, "ptq4dit_ao.recipes", raising=False)
    try:
        assert shipped_recipes() == ["only"]
        assert shipped_recipe_path("only") == folder / "only.yaml"
    finally:
        sys.modules.pop("ptq4dit_ao.recipes", None)


def test_committed_schema_is_the_generated_one() -> None:
    committed = shipped_recipe_path("paper_w8a8").with_name("recipe.schema.json").read_text(encoding="utf-8")
    assert committed == json.dumps(recipe_json_schema(), indent=2) + "\n", f"out of date; run: {REGENERATE}"


def test_schema_is_a_schema() -> None:
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["title"] == "PTQ4DiT recipe"
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_key_is_described() -> None:
    schema: dict[str, Any] = recipe_json_schema()
    for node in (schema, *schema["$defs"].values()):
        for key, value in node["properties"].items():
            assert value.get("description") or "$ref" in value, key
        assert node["description"]


def test_defaults_match_the_schema() -> None:
    assert matches_schema(Recipe().to_yaml())


SCHEMA_REFUSES = [
    "layers: safe",
    "version: 2",
    "version: 1\nlayres: safe",
    "version: 1\nweights: {bits: '8'}",
    "version: 1\nbalance: {max_scale: 1}",
    "version: 1\nbalance: {method: scc}",
    "version: 1\ncalibration: {timesteps: []}",
    "version: 1\ncalibration: {timesteps: [1, 1]}",
    "version: 1\ncalibration: {timesteps: 0}",
    "version: 1\ncalibration: {timesteps: {mean: 0.4}}",
    "version: 1\ncalibration: {timesteps: {draw: normal, std: -1}}",
    "version: 1\nevaluation: {timesteps: {draw: normal}}",
    "version: 1\noverrides: [{pattern: a}]",
    "version: 1\noverrides: [{pattern: a, skip: true, weight_bits: 4}]",
    "version: 1\noverrides: [{pattern: a, skip: false}]",
]


@pytest.mark.parametrize("text", SCHEMA_REFUSES)
def test_editors_refuse_what_the_loader_refuses(text: str) -> None:
    assert not matches_schema(text)
