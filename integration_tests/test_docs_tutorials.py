"""The tutorials run as written, and print what they show, but for numbers that depend on the machine."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe import load_recipe

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
PAGES = sorted({path.stem for path in TUTORIALS.glob("*.md")} - {"index"})


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each block of code, in order."""
    return re.findall(r"```(\w+)\n(.*?)```", (TUTORIALS / f"{page}.md").read_text(), flags=re.DOTALL)


def texts(page: str, language: str) -> list[str]:
    return [text for kind, text in blocks(page) if kind == language]


def run(page: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the Python blocks in order; a text block after one is what that one prints, beside NNCF's progress."""
    scope: dict[str, Any] = {}
    code = [(i, text) for i, (language, text) in enumerate(blocks(page)) if language == "python"]
    for i, text in code:
        exec(compile(text, f"{page}.md", "exec"), scope)
        printed = capsys.readouterr().out
        shown = dict(enumerate(blocks(page))).get(i + 1, ("", ""))
        if shown[0] == "text":
            assert without_fractions(shown[1]) in without_fractions(printed)
        elif "print(" in text:
            raise AssertionError(f"{page}.md does not show what this prints:\n{text}")
    return scope


def without_fractions(text: str) -> str:
    """Whole numbers stay: counts and shapes are the same everywhere."""
    return re.sub(r"\d+\.\d+", "#", text)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_pt2e(capsys):
    scope = run("pt2e", capsys)
    assert len([line for line in blocks("pt2e")[2][1].splitlines() if line.strip()]) <= 10
    assert scope["error"].sqnr_db > 33


def test_diffusers_pipeline(capsys):
    scope = run("diffusers_pipeline", capsys)
    assert scope["images"].shape == scope["float_images"].shape and scope["errors"].psnr_db.value > 20
    assert type(scope["pipe"].transformer).__name__ == "QuantizedTransformer"


def test_nncf(capsys):
    pytest.importorskip("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    run("nncf", capsys)


def test_recipe(capsys):
    *steps, wrong = texts("recipe", "yaml")
    loads, applies = texts("recipe", "python")
    shown = texts("recipe", "text")
    scope: dict[str, Any] = {}

    Path("my.yaml").write_text(steps[0])
    exec(compile(loads, "recipe.md", "exec"), scope)
    assert capsys.readouterr().out == shown[0]

    Path("my.yaml").write_text(wrong)
    with pytest.raises(RecipeError) as raised:
        load_recipe("my.yaml")
    assert str(raised.value) == shown[1].strip()

    Path("my.yaml").write_text(steps[1])
    assert [override.skip for override in load_recipe("my.yaml").overrides] == [None, True]
    Path("my.yaml").write_text(steps[2])
    assert load_recipe("my.yaml").calibration.sampler == "ddpm"
    exec(compile(applies, "recipe.md", "exec"), scope)
    assert capsys.readouterr().out == shown[2]
    assert scope["quantized"].recipe.weights.bits == 4


def test_every_tutorial_is_run():
    assert [page for page in PAGES if f"test_{page}" not in globals()] == []
