"""Recipes that come with the package."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from ptq4dit_ao.errors import RecipeError
from ptq4dit_ao.recipe.problems import did_you_mean
from ptq4dit_ao.recipe.yaml_text import read_yaml

_SUFFIX = ".yaml"


def shipped_recipes() -> list[str]:
    """Names that ``load_recipe`` and ``extends`` accept without a path, sorted."""
    return sorted(path.stem for path in _folder().glob(f"*{_SUFFIX}"))


def shipped_descriptions() -> dict[str, str]:
    """Name -> description of every shipped recipe. Only its own file is read, none that it extends."""
    paths = {name: _folder() / f"{name}{_SUFFIX}" for name in shipped_recipes()}
    texts = {name: read_yaml(path.read_text(encoding="utf-8"), str(path)) for name, path in paths.items()}
    return {name: str(text.value["description"]) for name, text in texts.items()}


def shipped_recipe_path(name: str) -> Path:
    """The file of a shipped recipe, whose name may end in ``.yaml``."""
    names = shipped_recipes()
    stem = name.removesuffix(_SUFFIX)
    if stem not in names:
        raise RecipeError(f"no shipped recipe is called {name!r}{did_you_mean(stem, names)}{listed_recipes()}")
    return _folder() / f"{stem}{_SUFFIX}"


def listed_recipes() -> str:
    """The end of a message about a missing recipe."""
    return " (`ptq4dit-ao recipes` lists the shipped ones)"


def _folder() -> Path:
    """Folder of the shipped recipes: ``ptq4dit_ao.recipes`` once installed, or ``recipes`` in a source checkout."""
    try:
        return Path(str(importlib.resources.files("ptq4dit_ao.recipes")))
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "recipes"
