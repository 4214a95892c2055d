"""Recipe files written by a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe import load_recipe

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write("x.yaml", text)``: a file with this text, dedented."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def refusal(write: Write, tmp_path: Path) -> Callable[[str], list[str]]:
    """``refusal(text)``: the lines of the error that the recipe ``text``, as ``x.yaml``, is refused with."""

    def refusal(text: str) -> list[str]:
        path = write("x.yaml", text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return refusal
