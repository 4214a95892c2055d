"""JSON Schema of a recipe file, for editors. ``recipes/recipe.schema.json`` holds a copy."""

from __future__ import annotations

from ptq4dit_ao.recipe.allowed import model_json_schema
from ptq4dit_ao.recipe.schema import RecipeFile


def recipe_json_schema() -> dict[str, object]:
    """JSON Schema (draft 2020-12) of every recipe file; ``version`` is const 1."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **model_json_schema(RecipeFile), "title": "PTQ4DiT recipe"}
