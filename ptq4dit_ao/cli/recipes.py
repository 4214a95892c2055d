"""``ptq4dit-ao recipes``, and what else can be said of a recipe before torch is loaded."""

from __future__ import annotations

import argparse
import json
import re

from rich.console import Console

from ptq4dit_ao.choices import TEXT_METHODS
from ptq4dit_ao.cli.tables import Column, print_table
from ptq4dit_ao.errors import ArgumentError
from ptq4dit_ao.recipe import Recipe, load_recipe, recipe_json_schema, shipped_descriptions, shipped_recipe_path
from ptq4dit_ao.recipe.load import load_method

_FAMILY = re.compile(r"(?!paper_).+_w\d+a\d+")
"""A family's recipes end in their bits; so do the paper's, which are a method."""
_COLUMNS = ("recipe", Column("what it is", is_text=True))
_METHODS = "Methods, for any model: extend one, or compare them with 'table'"
_FAMILIES = "Families of models: a method and what else their models want"


def recipes(args: argparse.Namespace, console: Console) -> None:
    """``ptq4dit-ao recipes``."""
    if args.schema:
        print(json.dumps(recipe_json_schema(), indent=2))
    elif args.name:
        print(shipped_recipe_path(args.name).read_text(), end="")
    else:
        lines = shipped_descriptions().items()
        families = [line for line in lines if _FAMILY.fullmatch(line[0])]
        methods = [line for line in lines if line not in families]
        print_table(console, _METHODS, _COLUMNS, methods, wide=args.wide)
        print_table(console, _FAMILIES, _COLUMNS, families, wide=args.wide)


def check_recipes(args: argparse.Namespace) -> None:
    """Raises RecipeError or ArgumentError if there is something wrong with a recipe that the command names."""
    if args.command == "quantize" and args.pipeline is not None:
        component_recipes(args)
    elif args.command == "quantize":
        chosen_recipe(args)
    elif args.command == "table":
        for method in args.methods:
            load_method(method)
    elif getattr(args, "recipe", None) is not None:
        load_recipe(args.recipe)


def chosen_recipe(args: argparse.Namespace) -> tuple[Recipe, str]:
    """The recipe of ``quantize``, and the model to quantize.

    Raises:
        RecipeError: the recipe is not there, or has faults.
        ArgumentError: neither the recipe nor the command line names a model.
    """
    for flag in ("component", "format"):
        if getattr(args, flag):
            raise ArgumentError(f"--{flag} is for whole pipelines; give the folder of one with --pipeline")
    recipe = load_recipe(args.recipe)
    model = args.model or recipe.model
    if model is None:
        raise ArgumentError(f"recipe {args.recipe!r} names no model; say which with --model")
    return recipe, model


def component_recipes(args: argparse.Namespace) -> dict[str, str]:
    """The recipes that ``quantize --pipeline`` names for components. A text encoder's is the name of a method.

    Raises:
        RecipeError: a recipe is not there, or has faults.
        ArgumentError: a component is named twice, or another option is for single models.
    """
    for flag in ("model", "samples"):
        if getattr(args, flag) is not None:
            raise ArgumentError(f"--{flag} is for a single transformer; leave it out with --pipeline")
    if not args.leave_one_out:
        raise ArgumentError("--no-leave-one-out is for a single transformer; nothing is left out with --pipeline")
    load_recipe(args.recipe)
    chosen: dict[str, str] = {}
    for given in args.component:
        name, equals, recipe = given.partition("=")
        if not equals or name in chosen:
            raise ArgumentError(f"--component is {given!r}; give NAME=RECIPE, each name once")
        if recipe not in TEXT_METHODS:
            load_recipe(recipe)
        chosen[name] = recipe
    return chosen
